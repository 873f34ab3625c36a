# SPDX-License-Identifier: Apache-2.0
"""--fim_rate: texts rearranged as prefix, suffix and middle, in training alone."""

import functools
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2Tokenizer, PreTrainedTokenizerFast

import run_clm_flax
from flaxlm import batches, command_line, corpus, evaluation, infilling, token_rows
from tests.test_optimizers import plan_of

EOS, PRE, MID, SUF = range(4)  # of fim_tokenizer
NAMES = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>"]


@pytest.fixture(scope="session")
def fim_tokenizer(texts) -> GPT2Tokenizer:
    """Bytes and 300 merges, with the sentinels; some texts are not of ASCII."""
    return make_tokenizer(texts, NAMES)


def make_tokenizer(texts: list[str], names: list[str]) -> GPT2Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", *names],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return GPT2Tokenizer(tokenizer_object=tokenizer, extra_special_tokens=names, model_max_length=64)


@pytest.fixture(scope="session")
def fim_dir(fim_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("fim")
    fim_tokenizer.save_pretrained(path)
    sizes = {"vocab_size": 512, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "initializer_range": 0.1}
    GPT2Config(**sizes, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0).save_pretrained(path)
    return path


def make_collator(tokenizer, row_length: int, **flags) -> run_clm_flax.Collator:
    return run_clm_flax.Collator(tokenizer, GPT2Config(), run_clm_flax.DataTrainingArguments(**flags), row_length)


def rows_of(texts: list[list[list[int]]], row_length: int, goes_on: bool = False) -> dict[str, np.ndarray]:
    """Rows of texts of tokens, cut at their ends; the first text of each began in the row before if it `goes_on`."""
    ids = np.full((len(texts), row_length), -1, np.int32)
    starts = np.zeros_like(ids)
    for row, parts in enumerate(texts):
        flat = [(token, place == 0) for part in parts for place, token in enumerate(part)][:row_length]
        ids[row, : len(flat)] = [token for token, _ in flat]
        starts[row, : len(flat)] = [begins for _, begins in flat]
        starts[row, :1] &= not goes_on
    return {"input_ids": ids, token_rows.TEXT_STARTS: starts}


def reference(rows, uniforms, rate, spm_rate, tokenizer, level) -> dict[str, np.ndarray]:
    """What `infilling.rearrange` makes, one text after the other."""
    found = {"input_ids": np.full_like(rows["input_ids"], -1), token_rows.TEXT_STARTS: np.zeros_like(rows["input_ids"])}
    row_length = rows["input_ids"].shape[1]
    for row, (ids, marks) in enumerate(zip(rows["input_ids"].tolist(), rows[token_rows.TEXT_STARTS].tolist(), strict=True)):
        texts: list[tuple[int, list[int]]] = []
        for token, mark in zip(ids, marks, strict=True):
            if token < 0:
                break
            if mark or not texts:
                texts.append((mark, []))
            texts[-1][1].append(token)
        new_ids, new_marks = [], []
        for number, (mark, text) in enumerate(texts):
            text = rearranged(text, uniforms[row][4 * number : 4 * number + 4], rate, spm_rate, tokenizer, level)
            new_ids += text
            new_marks += [mark] + [0] * (len(text) - 1)
        new_ids, new_marks = new_ids[:row_length], new_marks[:row_length]
        found["input_ids"][row, : len(new_ids)], found[token_rows.TEXT_STARTS][row, : len(new_ids)] = new_ids, new_marks
    return found


def rearranged(text: list[int], draws, rate, spm_rate, tokenizer, level) -> list[int]:
    head, tail = [], []
    while text and text[0] == EOS:
        head.append(text.pop(0))
    while text and text[-1] == EOS:
        tail.append(text.pop())
    if not text or draws[0] >= rate:
        return [*head, *text, *tail]
    whole = tokenizer.decode(text, clean_up_tokenization_spaces=False)
    if level == "token" or "\ufffd" in whole:
        whole = text
    first, second = sorted(int(draw * (len(whole) + 1)) for draw in draws[2:])
    parts = whole[:first], whole[first:second], whole[second:]
    if whole is not text:
        parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    prefix, middle, suffix = parts
    if draws[1] < spm_rate:
        return [*head, PRE, SUF, *suffix, MID, *prefix, *middle, *tail]
    return [*head, PRE, *prefix, SUF, *suffix, MID, *middle, *tail]


TEXTS = st.lists(st.lists(st.one_of(st.just(EOS), st.integers(4, 499)), min_size=1, max_size=9), max_size=6)


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=4),
    row_length=st.integers(2, 24),
    goes_on=st.booleans(),
    level=st.sampled_from(["token", "character"]),
    rates=st.sampled_from([(1.0, 0.5), (0.5, 0.5), (1.0, 0.0), (0.7, 1.0)]),
    seed=st.integers(0, 2**16),
)
def test_as_one_text_after_the_other(fim_tokenizer, texts, row_length, goes_on, level, rates, seed):
    """Any tokens: many, none or one in a text, parts of characters, ends of texts anywhere, rows cut and padded."""
    rows = rows_of(texts, row_length, goes_on)
    uniforms = np.random.default_rng(seed).random((len(texts), infilling.DRAWS_PER_TOKEN * row_length))
    before = {name: array.copy() for name, array in rows.items()}
    found = infilling.rearrange(rows, uniforms, infilling.make(fim_tokenizer, *rates, level))
    expected = reference(rows, uniforms, *rates, fim_tokenizer, level)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    jax.tree.map(np.testing.assert_array_equal, rows, before)
    assert {name: array.dtype for name, array in found.items()} == dict.fromkeys(rows, np.int32)


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        ([0.0, 0.9, 0.35, 0.6], [PRE, 10, 11, SUF, 14, 15, MID, 12, 13, EOS]),
        ([0.0, 0.9, 0.6, 0.35], [PRE, 10, 11, SUF, 14, 15, MID, 12, 13, EOS]),
        ([0.0, 0.1, 0.35, 0.6], [PRE, SUF, 14, 15, MID, 10, 11, 12, 13, EOS]),
        ([0.0, 0.9, 0.0, 0.99], [PRE, SUF, MID, 10, 11, 12, 13, 14, 15, EOS]),
        ([0.0, 0.9, 0.5, 0.5], [PRE, 10, 11, 12, SUF, 13, 14, 15, MID, EOS]),
        ([0.9, 0.9, 0.35, 0.6], [10, 11, 12, 13, 14, 15, EOS]),
    ],
    ids=["PSM", "in the other order", "SPM", "all is middle", "no middle", "as it was"],
)
def test_forms(draws, expected, fim_tokenizer):
    rows = rows_of([[[10, 11, 12, 13, 14, 15, EOS]]], 12)
    uniforms = np.array([draws + [0.5] * 44])
    found = infilling.rearrange(rows, uniforms, infilling.make(fim_tokenizer, 0.8, 0.5, "token"))
    assert found["input_ids"][0].tolist() == expected + [-1] * (12 - len(expected))


def test_rates_and_numbers_of_their_own(fim_tokenizer):
    """Texts alike, in one row and another, are each rearranged or not, and at places of their own."""
    texts = [[list(range(10, 40))] * 8] * 100
    uniforms = np.random.default_rng(0).random((100, 4 * 300))
    found = infilling.rearrange(rows_of(texts, 300), uniforms, infilling.make(fim_tokenizer, 0.3, 0.25, "token"))
    texts = [
        text.tolist()
        for ids, marks in zip(found["input_ids"], found[token_rows.TEXT_STARTS], strict=True)
        for text in np.split(ids[ids >= 0], np.flatnonzero(marks)[1:])
    ]
    assert len(texts) == 800
    changed = [text for text in texts if text[0] == PRE]
    assert len(changed) / 800 == pytest.approx(0.3, abs=0.06)
    assert sum(text[1] == SUF and text.index(MID) < 32 for text in changed) / len(changed) == pytest.approx(0.25, abs=0.1)
    assert len({tuple(text) for text in changed}) > 0.5 * len(changed)  # of SPM one of the two places shows


@pytest.mark.parametrize("level", ["token", "character"])
def test_back_to_the_text(level, fim_tokenizer, texts):
    """Prefix, middle and suffix together are what the row held; at character level tokens are cut."""
    tokens = fim_tokenizer([text + " naïve — 模型 🙂" for text in texts[:50]])["input_ids"]
    longest = 4 * max(map(len, tokens))
    uniforms = np.random.default_rng(0).random((50, 4 * longest))
    found = infilling.rearrange(
        rows_of([[[*ids, EOS]] for ids in tokens], longest), uniforms, infilling.make(fim_tokenizer, 1.0, 0.5, level)
    )
    num_cut = 0
    for new, old in zip(found["input_ids"].tolist(), tokens, strict=True):
        new = [token for token in new if token >= 0]
        assert (new[0], new.pop()) == (PRE, EOS)
        pre, suf, mid = map(new.index, (PRE, SUF, MID))
        prefix, suffix, rest = new[pre + 1 : suf], new[suf + 1 : mid], new[mid + 1 :]
        whole = [*prefix, *rest, *suffix]
        assert fim_tokenizer.decode(whole) == fim_tokenizer.decode(old)
        num_cut += whole != old
    assert (num_cut == 0) if level == "token" else (num_cut > 25)


def test_parts_of_characters_are_kept(fim_tokenizer):
    """A row that begins or ends within a character is cut between tokens: its bytes stay."""
    smile = fim_tokenizer("🙂")["input_ids"]
    assert len(smile) == 4
    text = [*smile[2:], *fim_tokenizer(" some words and more")["input_ids"], *smile[:1]]
    uniforms = np.random.default_rng(0).random((40, 4 * 60))
    found = infilling.rearrange(rows_of([[text]] * 40, 60), uniforms, infilling.make(fim_tokenizer, 1.0, 0.0, "character"))
    for ids in found["input_ids"]:
        assert sorted(ids[ids > SUF]) == sorted(text)


@pytest.mark.parametrize("level", ["token", "character"])
def test_document_attention(level, fim_tokenizer):
    """Numbers of texts go with them; without the flag all of a row see each other."""
    rng = np.random.default_rng(0)
    rows = rows_of([[rng.integers(4, 250, n).tolist() for n in (5, 1, 9, 3)] for _ in range(20)], 40, goes_on=True)
    flags = {"fim_rate": 0.7, "fim_level": level}
    collator = make_collator(fim_tokenizer, 40, document_attention=True, **flags)
    uniforms = rng.random((20, collator.draws_per_row))
    batch = collator(rows, uniforms, np.ones(20, bool), 1)
    expected = reference(rows, uniforms, 0.7, 0.5, fim_tokenizer, level)
    numbers = np.where(expected["input_ids"] >= 0, 1 + np.cumsum(expected[token_rows.TEXT_STARTS], 1), 0)
    np.testing.assert_array_equal(batch["attention_mask"], numbers)
    assert set(numbers.max(axis=1)) == {4}
    together = make_collator(fim_tokenizer, 40, **flags)(rows, uniforms, np.ones(20, bool), 1)
    np.testing.assert_array_equal(together["attention_mask"], np.minimum(numbers, 1))
    np.testing.assert_array_equal(together["label_weights"][:, :-1], np.minimum(numbers, 1)[:, 1:])


def test_without_the_flag_nothing_changes(fim_tokenizer):
    for flags in ({}, {"fim_rate": 0.0}):
        collator = make_collator(fim_tokenizer, 16, **flags)
        assert (collator.columns, collator.draws_per_row, collator.infilling) == ({"input_ids": -1}, 0, None)


def test_what_is_evaluated_stays(fim_tokenizer):
    """Batches of the evaluation are those of a run without the flag, and of the same noise."""
    rows = rows_of([[[10, 11, 12, EOS], [13] * 9]] * 6, 12)
    with_fim, without = (make_collator(fim_tokenizer, 12, **flags) for flags in ({"fim_rate": 1.0}, {}))
    data = corpus.Corpus(None, rows, None)
    evaluator = evaluation.Evaluator(data, with_fim, plan_of(), 0, jax.make_mesh((1,), ("data",)), None, None)
    found = list(batches.eval_batches(rows, evaluator.collator, plan_of(), 0))
    expected = list(batches.eval_batches({"input_ids": rows["input_ids"]}, without, plan_of(), 0))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    trained = next(batches.train_batches(rows, with_fim, plan_of(), 0))
    assert (trained["input_ids"] == PRE).any()
    assert with_fim.infilling  # it trains on as before


def test_devices_and_processes_change_nothing(fim_tokenizer):
    rng = np.random.default_rng(0)
    rows = rows_of([[rng.integers(4, 250, 7).tolist() for _ in range(3)] for _ in range(40)], 21)
    collator = make_collator(fim_tokenizer, 21, fim_rate=0.8)

    def ids_of(**sizes) -> np.ndarray:
        batch = next(batches.train_batches(rows, collator, plan_of(**sizes), seed=3))
        return batch["input_ids"].reshape(-1, 21)

    whole = ids_of()
    np.testing.assert_array_equal(ids_of(num_local_devices=4), whole)
    np.testing.assert_array_equal(ids_of(num_micro_batches=2), whole)
    parts = [ids_of(num_processes=2, process_index=index) for index in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


# ---- Mistakes ------------------------------------------------------------------------------------------------------------

BASE = ["--config_name", "x", "--tokenizer_name", "x", "--train_file", "requirements.txt", "--output_dir", "out"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fim_rate", "1.5"], "--fim_rate 1.5: must be between 0 and 1"),
        (["--fim_rate=-0.1"], "--fim_rate -0.1: must be between 0 and 1"),
        (["--fim_rate", "0.5", "--fim_spm_rate", "2"], "--fim_spm_rate 2.0: must be between 0 and 1"),
        (["--fim_spm_rate", "0.5"], "--fim_spm_rate 0.5: .* add --fim_rate or drop the flag"),
        (["--fim_level", "token"], "--fim_level token: .* add --fim_rate or drop the flag"),
    ],
)
def test_flags_that_cannot_be(flags, message, refuses):
    with refuses(message):
        command_line.parse([*BASE, *flags], run_clm_flax.DataTrainingArguments, run_clm_flax.MODELS, None)


def test_a_tokenizer_without_sentinels(byte_level_tokenizer, refuses):
    with refuses("--fim_rate 0.5: the tokenizer has no tokens <fim_prefix>, .*: prepare_model_dir.py --fim_tokens"):
        make_collator(byte_level_tokenizer, 16, fim_rate=0.5)


@pytest.mark.parametrize("spelling", infilling.SPELLINGS, ids=" ".join)
def test_spellings(spelling, texts):
    tokenizer = make_tokenizer(texts[:20], list(spelling))
    assert infilling.make(tokenizer, 1.0, 0.5, "character").sentinel_ids == (PRE, MID, SUF)


def test_sentinels_that_text_is_not_tokenised_to(refuses):
    """Entries of the vocabulary, but no tokens that text can have."""
    vocabulary = {name: number for number, name in enumerate(["<unk>", *NAMES])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Punctuation()
    with refuses("--fim_rate 1.0: the tokenizer has no tokens"):
        infilling.make(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"), 1.0, 0.5, "token")


def test_a_tokenizer_that_puts_spaces_before_parts(unigram_tokenizer, refuses):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(unigram_tokenizer.backend_tokenizer.to_str()))
    tokenizer.add_special_tokens({"extra_special_tokens": NAMES})
    with refuses("--fim_level character: this tokenizer does not give back text .*; use --fim_level token"):
        make_collator(tokenizer, 16, fim_rate=0.5)
    make_collator(tokenizer, 16, fim_rate=0.5, fim_level="token")


# ---- Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [["--document_attention"], ["--streaming", "--num_eval_samples", "8"]], ids=" ".join)
def test_a_resumed_run(more, fim_dir, texts, tmp_path):
    """As if never stopped; and it is evaluated as without the flag, before anything is learned."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = ["--config_name", fim_dir, "--tokenizer_name", fim_dir, "--train_file", tmp_path / "texts.jsonl", "--do_train"]
    flags += ["--block_size", 32, "--per_device_train_batch_size", 4, "--max_steps", 4, "--save_steps", 2]
    flags += ["--fim_rate", 0.9, "--append_eos_token", *more]
    train = functools.partial(train_in, flags=flags)
    whole = train(tmp_path / "whole")
    for path in sorted(tmp_path.joinpath("whole").glob("checkpoint-2")):
        (tmp_path / "resumed").mkdir()
        path.rename(tmp_path / "resumed" / path.name)
    assert train(tmp_path / "resumed", "--resume_from_checkpoint") == whole
    assert train(tmp_path / "plain", "--fim_rate", 0) != whole


def train_in(output_dir, *more, flags) -> bytes:
    """Weights after a run."""
    run_clm_flax.main([str(flag) for flag in [*flags, "--output_dir", output_dir, *more]])
    return (output_dir / "flax_model.msgpack").read_bytes()
