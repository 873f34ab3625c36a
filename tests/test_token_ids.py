# SPDX-License-Identifier: Apache-2.0
"""Data that is tokenised already: its rows are those of the text that it was made of, in every script."""

import functools
import importlib
import itertools
import json

import datasets
import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer

import run_clm_flax
import run_mlm_flax
from flaxlm import command_line, corpus, token_ids
from tests.conftest import run

SCRIPTS = {
    "run_mlm_flax": ("roberta_dir", []),
    "run_mlm_flax by lines": ("roberta_dir", ["--line_by_line"]),
    "run_mlm_flax whole words": ("roberta_dir", ["--whole_word_mask"]),
    "run_mlm_flax whole words by lines": ("roberta_dir", ["--whole_word_mask", "--line_by_line"]),
    "run_clm_flax": ("gpt2_dir", []),
    "run_clm_flax with ends": ("gpt2_dir", ["--append_eos_token"]),
    "run_clm_flax apart": ("gpt2_dir", ["--document_attention"]),
    "run_t5_mlm_flax": ("t5_dir", []),
    "run_bart_dlm_flax": ("bart_dir", []),
}
BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streaming"])


@pytest.fixture
def prepare(request, tmp_path):
    """The evaluation rows of a script (a key of SCRIPTS), as a run with these flags gets them."""

    def call(name, *flags, streaming=False) -> dict[str, np.ndarray]:
        module, (fixture, more) = importlib.import_module(name.split()[0]), SCRIPTS[name]
        model_dir = request.getfixturevalue(fixture)
        common = ["--config_name", model_dir, "--tokenizer_name", model_dir, "--output_dir", tmp_path / "out", "--do_eval"]
        common += ["--cache_dir", tmp_path / "cache", *["--streaming"] * streaming]
        argv = [str(flag) for flag in (*common, *more, *flags)]
        args = command_line.parse(argv, module.DataTrainingArguments, module.MODELS, None)
        tokenizer, config = AutoTokenizer.from_pretrained(model_dir), AutoConfig.from_pretrained(model_dir)
        collator = module.Collator(tokenizer, config, args.data, 32)
        tokenize_fn = functools.partial(module.tokenize_texts, tokenizer=tokenizer, **collator.tokenize_options)
        call.tokenize_texts = functools.partial(tokenize_fn, text_column="text")
        return corpus.prepare(args, tokenize_fn, collator).validation

    return call


def save(kind: str, rows: dict[str, list], directory) -> list:
    """Write rows and return the flags that name them."""
    dataset = datasets.Dataset.from_dict(rows)
    if kind == "saved":
        dataset.save_to_disk(directory / "saved")
        return ["--dataset_name", directory / "saved", "--eval_split_name", "train"]
    if kind == "jsonl":
        dataset.to_json(directory / "a.jsonl")
    else:
        dataset.to_parquet(directory / "a.parquet")
    return ["--validation_file", directory / f"a.{kind}"]


@BOTH
@pytest.mark.parametrize("name", SCRIPTS)
def test_rows_are_those_of_the_text(name, streaming, prepare, texts, tmp_path):
    """Text tokenised by the script, its ids saved and read again: the same rows in all columns, whatever noise needs."""
    (tmp_path / "a.txt").write_text("\n".join(["", *texts[:150], "   ", "Two. Sentences? Of course!"]))
    expected = prepare(name, "--validation_file", tmp_path / "a.txt", streaming=streaming)
    # As the script tokenises, but neither cut nor with ends, which its flags add.
    options = prepare.tokenize_texts.keywords | {"max_length": None, "append_eos_token": False}
    options = {key: value for key, value in options.items() if key in prepare.tokenize_texts.keywords}
    tokenize_fn = getattr(prepare.tokenize_texts.func, "func", prepare.tokenize_texts.func)
    with open(tmp_path / "a.txt", newline="\n") as file:
        lines = [line if "clm" in name else line.rstrip("\n") for line in file]
    made = tokenize_fn({"text": lines}, **options)["input_ids"]
    for kind in ("jsonl", "parquet", "saved"):
        found = prepare(name, *save(kind, {"input_ids": made}, tmp_path), streaming=streaming)
        assert found.keys() == expected.keys()
        for column in expected:
            assert (found[column] == expected[column]).all(), (kind, column)


def test_a_run_has_the_same_losses(texts, roberta_dir, byte_level_tokenizer, messages_logged, tmp_path):
    """From the flags on, and the log says what was done."""
    (tmp_path / "a.txt").write_text("\n".join(texts[:200]))
    ids = byte_level_tokenizer(texts[:200])["input_ids"]
    datasets.Dataset.from_dict({"input_ids": ids}).to_parquet(tmp_path / "a.parquet")

    def train(name) -> dict:
        flags = ["--train_file", tmp_path / name, "--max_steps", 3, "--max_eval_samples", 16, "--cache_dir", tmp_path / "cache"]
        return run(tmp_path / f"out-{name}", roberta_dir, *flags)

    text, tokens = train("a.txt"), train("a.parquet")
    assert {key: text[key] for key in ("train_loss", "eval_loss")} == {key: tokens[key] for key in ("train_loss", "eval_loss")}


def test_sentences_as_lists(prepare, byte_level_tokenizer, tmp_path):
    """BART: a list for each sentence; each begins where its first token is that is text."""
    sentences = [["One sentence.", " Another one!"], ["Alone."]]
    ids = [byte_level_tokenizer(parts, add_special_tokens=False)["input_ids"] for parts in sentences]
    ids[0][0].insert(0, 0)
    ids[1][0].append(2)
    rows = prepare("run_bart_dlm_flax", *save("jsonl", {"input_ids": ids}, tmp_path))
    flat = [token for lists in ids for tokens in lists for token in tokens]
    expected = np.zeros(len(flat), int)
    expected[[1, len(ids[0][0]), len(ids[0][0]) + len(ids[0][1])]] = 1
    assert rows["input_ids"].reshape(-1)[: len(flat)].tolist() == flat
    assert rows["sentence_starts"].reshape(-1)[: len(flat)].tolist() == expected.tolist()


@BOTH
def test_pairs_of_documents(streaming, bert_dir, tmp_path):
    """run_pretraining_flax.py: documents as lists of sentences; the pairs are made of those sentences, whole ones."""
    module = importlib.import_module("run_pretraining_flax")
    tokenizer, config = AutoTokenizer.from_pretrained(bert_dir), AutoConfig.from_pretrained(bert_dir)
    texts = [[f"Sentence {n} of document {m} is here." for n in range(6)] for m in range(8)]
    documents = [tokenizer(sentences, add_special_tokens=m % 2 == 0)["input_ids"] for m, sentences in enumerate(texts)]
    data = save("parquet", {"input_ids": documents}, tmp_path)
    argv = ["--config_name", bert_dir, "--tokenizer_name", bert_dir, "--output_dir", tmp_path / "out", "--do_eval", *data]
    argv += ["--cache_dir", tmp_path / "cache", *["--streaming"] * streaming]
    args = command_line.parse([str(flag) for flag in argv], module.DataTrainingArguments, module.MODELS, None)
    collator = module.Collator(tokenizer, config, args.data, 64)
    tokenize_fn = functools.partial(module.tokenize_texts, tokenizer=tokenizer, **collator.tokenize_options)
    rows = corpus.prepare(args, tokenize_fn, collator).validation
    assert len(rows["input_ids"]) > 8
    known = {tuple(ids) for parts in texts for ids in tokenizer(parts, add_special_tokens=False)["input_ids"]}
    for row in rows["input_ids"]:
        row = row[row != tokenizer.pad_token_id].tolist()
        assert row[0] == tokenizer.cls_token_id
        assert [row.count(token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)] == [1, 2]
    last = [row[row != 0].tolist() for row in rows["input_ids"]]
    assert any(tuple(row[1:-1][-len(ids) :]) == ids for row in last for ids in known)


@BOTH
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2, 600]], "column input_ids: holds 600, unknown to the tokenizer; use the one that made the data"),
        ([[5, 6, -100]], "column input_ids: holds -100, which is no token; write the ids of each text alone, without padding"),
        ([[5, 6], [2**40]], "column input_ids: holds 1099511627776, unknown to the tokenizer"),
        ([[5.5, 6.0]], "column input_ids holds lists of double|column input_ids holds lists of float64; wanted is a list of"),
        ([["5", "6"]], "column input_ids holds lists of string; wanted is a list of token ids in each row"),
        ([[[5, 6], [7]]], "column input_ids holds lists of lists of int64; wanted is a list of token ids in each row, or text"),
        ([[5, None, 6]], "column input_ids: holds what is no whole number; give the ids of tokens alone"),
    ],
    ids=str,
)
def test_ids_that_are_refused(ids, message, streaming, prepare, refuses, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    with refuses(message):
        prepare("run_mlm_flax", "--validation_file", tmp_path / "a.jsonl", streaming=streaming)


def test_ids_are_refused_by_workers_too(prepare, refuses, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"input_ids": [5, n]}) + "\n" for n in (6, 7, 600, 8)))
    with refuses("column input_ids: holds 600, unknown to the tokenizer; .* .in the validation data.$"):
        prepare("run_mlm_flax", "--validation_file", tmp_path / "a.jsonl", "--preprocessing_num_workers", 2)


def test_pairs_need_sentences(bert_dir, error_of, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"input_ids": [5, 6]}\n' * 3)
    module = importlib.import_module("run_pretraining_flax")
    flags = ["--config_name", bert_dir, "--tokenizer_name", bert_dir, "--output_dir", tmp_path / "out", "--train_file"]
    line = error_of(module.main, [str(flag) for flag in [*flags, tmp_path / "a.jsonl"]])
    assert "column input_ids holds lists of int64; wanted is a list of sentences in each row, each a list of token ids" in line


def test_which_column_it_is(prepare, messages_logged, tmp_path):
    """Tokens before text, unless --text_column_name says otherwise; a column of that name may hold text."""
    rows = {"text": ["Some words.", "More."], "input_ids": [[5, 6], [7]]}
    data = save("parquet", rows, tmp_path)
    assert prepare("run_mlm_flax", *data)["input_ids"][0, :3].tolist() == [5, 6, 7]
    assert "The validation data is column 'input_ids', which is tokenised already and used as it is." in messages_logged
    assert prepare("run_mlm_flax", *data, "--text_column_name", "text")["input_ids"][0, 0] == 0
    assert prepare("run_mlm_flax", *data, "--text_column_name", "input_ids")["input_ids"][0, 0] == 5
    data = save("parquet", {"input_ids": ["Some words.", "More."]}, tmp_path)
    assert prepare("run_mlm_flax", *data)["input_ids"][0, 0] == 0
    data = save("parquet", {"input_ids": [[0.5], [1.5]], "text": ["Some words.", "More."]}, tmp_path)
    assert prepare("run_mlm_flax", *data)["input_ids"][0, 0] == 0


def test_word_references_need_text(roberta_dir, error_of, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"input_ids": [5, 6]}\n' * 3)
    (tmp_path / "refs").write_text("[1]\n" * 3)
    flags = ["--train_file", tmp_path / "a.jsonl", "--train_ref_file", tmp_path / "refs", "--whole_word_mask"]
    assert "refers to rows of text, and the data is tokenised already" in error_of(run, tmp_path / "out", roberta_dir, *flags)


@pytest.mark.parametrize("side", ["right", "left"])
def test_cut_as_the_tokenizer_cuts(side, byte_level_tokenizer, word_piece_tokenizer, texts):
    for tokenizer in (byte_level_tokenizer, word_piece_tokenizer):
        before, tokenizer.truncation_side = tokenizer.truncation_side, side
        try:
            for length in (3, 10, 30):
                whole = tokenizer(texts[:50], verbose=False)["input_ids"]
                expected = tokenizer(texts[:50], truncation=True, max_length=length)["input_ids"]
                found = [np.array(ids)[token_ids.truncated(ids, length, tokenizer)].tolist() for ids in whole]
                assert found == expected
        finally:
            tokenizer.truncation_side = before
            tokenizer.backend_tokenizer.no_truncation()


def test_texts_of_tokens(byte_level_tokenizer, word_piece_tokenizer, unigram_tokenizer, texts):
    """Exact where tokenising gives the tokens again; else each token stands where its text is."""
    ids = byte_level_tokenizer(texts[:50], verbose=False)["input_ids"]
    encoding = byte_level_tokenizer(texts[:50], return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    found = token_ids.decode_with_offsets(ids, byte_level_tokenizer)
    assert found.texts == texts[:50]
    assert found.offsets == encoding["offset_mapping"]
    assert found.special_tokens_masks == encoding["special_tokens_mask"]
    some = "One sentence. Another one!"
    for tokenizer, sample in ((byte_level_tokenizer, f"{some} 模é!"), (word_piece_tokenizer, some), (unigram_tokenizer, some)):
        ids = tokenizer(sample, verbose=False)["input_ids"]
        text, offsets, mask = token_ids.put_together(ids, tokenizer)
        assert text.split() == tokenizer.decode(ids, skip_special_tokens=True).split()
        assert all(first[1] <= second[1] for first, second in itertools.pairwise(offsets[1:-1]))
        assert [mask[0], *mask[1:-1], mask[-1]] == [1, *[0] * (len(ids) - 2), 1]


def test_ids_that_no_text_gives(byte_level_tokenizer):
    """Letter by letter, as the tokenizer never cuts: the text all the same, and where each token stands."""
    vocabulary = byte_level_tokenizer.get_vocab()
    ids = [vocabulary[character] for character in "word.ĠTwo"]
    (text,), (offsets,), _ = token_ids.decode_with_offsets([ids], byte_level_tokenizer)
    assert text == "word. Two"
    assert offsets == [(n, n + 1) for n in range(9)]


def test_ends_are_added_once(gpt2_dir):
    tokenizer = AutoTokenizer.from_pretrained(gpt2_dir)
    made = run_clm_flax.tokenize_texts({"input_ids": [[5, 6], [7, 0], None, []]}, tokenizer, "input_ids", True)
    assert made == {"input_ids": [[5, 6, 0], [7, 0]]}
    assert run_mlm_flax.tokenize_texts({"input_ids": [None, []]}, tokenizer, "input_ids", None, False) == {"input_ids": []}
