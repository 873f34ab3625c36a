# SPDX-License-Identifier: Apache-2.0
"""--document_attention: texts in a row are apart, in batches and in what models make of them; without it nothing changes."""

import zlib
from collections.abc import Mapping

import jax
import numpy as np
import pytest
from transformers import T5Config

import run_bart_dlm_flax
import run_clm_flax
import run_mlm_flax
import run_t5_mlm_flax
from flaxlm import layers, token_rows
from tests.test_scripts import make_config, make_model, make_params, small_tokenizer
from tests.test_t5 import decode

PAD, BOS, EOS, UNK, MASK = range(5)  # of small_tokenizer
NUM_ROWS, LENGTH = 24, 57
NOISES = {
    "mlm": (run_mlm_flax, {}),
    "mlm of words": (run_mlm_flax, {"whole_word_mask": True, "mlm_probability": 0.4}),
    "clm": (run_clm_flax, {}),
    "t5": (run_t5_mlm_flax, {}),
    "t5 of much noise": (run_t5_mlm_flax, {"mlm_probability": 0.5, "mean_noise_span_length": 4.0}),
    "bart": (run_bart_dlm_flax, {}),
    "bart of short spans": (run_bart_dlm_flax, {"permute_sentence_ratio": 0.5, "poisson_lambda": 0.5}),
}
ALL = pytest.mark.parametrize("name", NOISES)


def make_rows(columns: Mapping[str, int], row_length: int) -> dict[str, np.ndarray]:
    """Rows in which texts of about seven tokens end with EOS; the first one of a row is the rest of one, or a whole one.

    Half of the rows are padded. All columns but the first are the same whether texts are marked or not.
    """
    rng = np.random.default_rng(0)
    ids = rng.integers(UNK, 100, (NUM_ROWS, row_length)).astype(np.int32)
    is_padding = np.arange(row_length) >= rng.integers(0, 2 * row_length, NUM_ROWS)[:, None]
    ends = (rng.random((NUM_ROWS, row_length)) < 0.15).astype(np.int32)
    ids[ends == 1] = EOS
    rows = {"input_ids": ids}
    for name in sorted(columns.keys() - {"input_ids", token_rows.TEXT_STARTS}):
        rows[name] = (rng.random(ids.shape) < 0.3).astype(np.int32)
    if token_rows.TEXT_STARTS in columns:
        rows[token_rows.TEXT_STARTS] = np.roll(ends, 1)
    return {name: np.where(is_padding, columns[name], array).astype(np.int32) for name, array in rows.items()}


def collate(name: str, num_groups: int = 3, **more) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(rows, batch), of the same texts and random numbers with or without --document_attention."""
    module, flags = NOISES[name]
    data_args = module.DataTrainingArguments(**flags | more)
    collator = module.Collator(small_tokenizer(), T5Config(decoder_start_token_id=PAD), data_args, LENGTH)
    rows = make_rows(collator.columns, collator.row_length)
    uniforms = np.random.default_rng(1).random((NUM_ROWS, collator.draws_per_row))
    return rows, collator(rows, uniforms, np.arange(NUM_ROWS) != 5, num_groups)


def collate_both(name: str, **more) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(rows, batch with the flag, batch without)."""
    return *collate(name, document_attention=True, **more), collate(name, **more)[1]


def numbers_of(rows: Mapping[str, np.ndarray], padding: int) -> np.ndarray:
    """Which text of its row each token is of, counted one by one from the row's first; 0 for padding: int [N, T]."""
    numbers = np.zeros(rows["input_ids"].shape, int)
    for number, ids, starts in zip(numbers, rows["input_ids"], rows[token_rows.TEXT_STARTS], strict=True):
        current = 1
        for place in range(len(ids)):
            current += starts[place]
            number[place] = current if ids[place] != padding else 0
    return numbers


# ---- Batches -------------------------------------------------------------------------------------------------------------

# Of what the collators made before there was such a flag; they had no decoder_attention_mask.
CHECKSUMS = {
    "mlm": 494190931,
    "mlm of words": 1590905341,
    "clm": 2614164754,
    "t5": 1352856643,
    "t5 of much noise": 3369010589,
    "bart": 2135647139,
    "bart of short spans": 555067643,
}


@ALL
def test_without_the_flag_nothing_changes(name):
    _, batch = collate(name)
    arrays = [array.tobytes() for key, array in sorted(batch.items()) if key != "decoder_attention_mask"]
    assert zlib.crc32(b"".join(arrays)) == CHECKSUMS[name]
    assert set(np.unique(batch["attention_mask"])) == {0, 1}
    if "decoder_attention_mask" in batch:
        is_target = batch["decoder_attention_mask"] == 1
        assert (is_target | (batch["decoder_attention_mask"] == 0)).all()
        np.testing.assert_array_equal(is_target[:, 1:] & is_target[:, :-1], is_target[:, 1:])  # padding on the right
        assert (is_target >= batch["label_weights"]).all()


@ALL
def test_rows_hold_several_texts(name):
    """Else the tests here would tell nothing: many, short and long, cut and whole, at both ends of rows."""
    rows, _ = collate(name, document_attention=True)
    assert rows.keys() > {token_rows.TEXT_STARTS}
    numbers = numbers_of(rows, rows["input_ids"][rows["input_ids"] < UNK].min())
    assert 3 < numbers.max(axis=1).mean() < 12
    assert {0, 1} == set(rows[token_rows.TEXT_STARTS][:, 0])
    assert (numbers.min(axis=1) == 0).sum() > 5


@pytest.mark.parametrize("name", ["mlm", "mlm of words"])
def test_masked_tokens_stay(name):
    """Only the attention mask is another."""
    rows, apart, together = collate_both(name)
    np.testing.assert_array_equal(apart.pop("attention_mask"), numbers_of(rows, PAD))
    del together["attention_mask"]
    jax.tree.map(np.testing.assert_array_equal, apart, together)


def test_no_label_across_texts():
    """The last token of a text is asked for nothing; all else stays."""
    rows, apart, together = collate_both("clm")
    numbers = numbers_of(rows, -1)
    np.testing.assert_array_equal(apart["attention_mask"], numbers)
    crosses = np.pad(numbers[:, 1:] != numbers[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    np.testing.assert_array_equal(apart["label_weights"], together["label_weights"] * ~crosses)
    assert (together["label_weights"] > apart["label_weights"]).sum() > 50
    for key in ("input_ids", "labels"):
        np.testing.assert_array_equal(apart[key], together[key])


@pytest.mark.parametrize("name", ["t5", "t5 of much noise"])
def test_spans_of_texts(name):
    """The noise stays. A span's sentinel is of the text that it begins in; the decoder starts anew with each text."""
    rows, apart, together = collate_both(name)
    for key in ("input_ids", "labels", "label_weights"):
        np.testing.assert_array_equal(apart[key], together[key])
    numbers, num_across, num_hidden = numbers_of(rows, -1), 0, 0
    for row in range(NUM_ROWS):
        num_tokens = (rows["input_ids"][row] >= 0).sum()
        if num_tokens < 2 or row == 5:
            continue
        span_of = decode(together, row, small_tokenizer())[1].tolist()
        of_input, of_target = [], []
        for place, (span, number) in enumerate(zip(span_of, numbers[row].tolist(), strict=False)):
            begins = span >= 0 and (place == 0 or span_of[place - 1] != span)
            of_input += [number] * (span < 0 or begins)
            of_target += [number] * ((span >= 0) + begins)
            num_across += span >= 0 and not begins and numbers[row][place - 1] != number
        num_hidden += len({*of_target} - {*of_input})
        last = numbers[row][num_tokens - 1]
        for key, expected in (("attention_mask", [*of_input, last]), ("decoder_attention_mask", [*of_target, last])):
            assert apart[key][row].tolist() == expected + [0] * (apart[key].shape[1] - len(expected))
        starts_anew = np.diff(of_target, prepend=0) != 0
        shifted = np.where([*starts_anew, False], PAD, [PAD, *apart["labels"][row][: len(of_target)]])
        np.testing.assert_array_equal(apart["decoder_input_ids"][row][: len(shifted)], shifted)
    assert num_across > 10
    assert num_hidden > 1  # texts within one span, of which the encoder is shown nothing


@pytest.mark.parametrize("name", ["bart", "bart of short spans"])
def test_decoder_of_texts(name):
    """It has the whole row to predict, and starts anew with each text."""
    rows, apart, together = collate_both(name)
    numbers = numbers_of(rows, -1)
    np.testing.assert_array_equal(apart["decoder_attention_mask"], numbers)
    for key in ("labels", "label_weights"):
        np.testing.assert_array_equal(apart[key], together[key])
    begins = (np.diff(numbers, axis=1, prepend=0) != 0) & (numbers > 0)
    assert (apart["decoder_input_ids"][begins] == PAD).all()
    others = np.pad(apart["labels"][:, :-1], ((0, 0), (1, 0)), constant_values=PAD)[~begins]
    np.testing.assert_array_equal(apart["decoder_input_ids"][~begins], others)


def distinct(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same with other ids, which tell where in the row a token stood, and without special tokens between the texts."""
    ids = np.broadcast_to(UNK + 2 + np.arange(LENGTH), rows["input_ids"].shape)
    return rows | {"input_ids": np.where(rows["input_ids"] >= 0, ids, -1).astype(np.int32)}


def noised(rows: dict[str, np.ndarray], with_texts: bool, **flags) -> dict[str, np.ndarray]:
    """A batch of BART's."""
    data_args = run_bart_dlm_flax.DataTrainingArguments(document_attention=with_texts, **flags)
    collator = run_bart_dlm_flax.Collator(small_tokenizer(), T5Config(decoder_start_token_id=PAD), data_args, LENGTH)
    rows = {name: rows[name] for name in collator.columns}
    return collator(rows, np.random.default_rng(1).random((NUM_ROWS, collator.draws_per_row)), np.ones(NUM_ROWS, bool), 1)


@pytest.fixture
def plain_texts() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows for BART without special tokens, which would divide documents by themselves, and their texts' numbers."""
    rows = distinct(make_rows({"input_ids": -1, "sentence_starts": 0, token_rows.TEXT_STARTS: 0}, LENGTH))
    return rows, numbers_of(rows, -1)


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_sentences_stay_in_their_text(ratio, plain_texts):
    rows, numbers = plain_texts
    flags = {"mlm_probability": 0.0, "permute_sentence_ratio": ratio}
    batch, mixed = noised(rows, True, **flags), noised(rows, False, **flags)
    np.testing.assert_array_equal(batch["attention_mask"], numbers)
    places = batch["input_ids"] - UNK - 2
    texts_of = np.take_along_axis(numbers, np.where(numbers > 0, places, 0), axis=1)
    np.testing.assert_array_equal(texts_of * (numbers > 0), numbers)
    assert (batch["input_ids"] != np.maximum(rows["input_ids"], PAD)).mean() > 0.1  # they do move
    mixed_texts = np.take_along_axis(numbers, np.where(numbers > 0, mixed["input_ids"] - UNK - 2, 0), axis=1)
    assert (mixed_texts != numbers)[numbers > 0].mean() > 0.1  # and would leave


@pytest.mark.parametrize("rate", [0.5, 3.0, 12.0])
def test_spans_end_with_their_text(rate, plain_texts):
    """What is hidden stays hidden; a span over a border is a mask in each of the two texts, and tokens keep their text."""
    rows, numbers = plain_texts
    flags = {"permute_sentence_ratio": 0.0, "poisson_lambda": rate}
    batch, merged = noised(rows, True, **flags), noised(rows, False, **flags)
    num_cut = 0
    for row, number in enumerate(numbers):
        ids, texts = batch["input_ids"][row], batch["attention_mask"][row]
        others = merged["input_ids"][row]
        kept = ids[ids > MASK]
        np.testing.assert_array_equal(kept, others[others > MASK])
        np.testing.assert_array_equal(texts[ids > MASK], number[kept - UNK - 2])
        length = (texts > 0).sum()
        assert (np.diff(texts[:length]) >= 0).all() and not texts[length:].any()
        assert (ids[:length] >= MASK).all() and (ids[length:] == PAD).all()
        hidden = np.setdiff1d(np.flatnonzero(number), kept - UNK - 2)
        assert set(texts[ids == MASK]) >= set(number[hidden])  # so no text is lost
        stretches = np.split(hidden, np.flatnonzero((np.diff(hidden) > 1) | (np.diff(number[hidden]) != 0)) + 1)
        assert (ids == MASK).sum() >= len([stretch for stretch in stretches if len(stretch)])
        num_cut += (ids == MASK).sum() - (others == MASK).sum()
    assert num_cut > (0 if rate == 0.5 else 10)


# ---- Models --------------------------------------------------------------------------------------------------------------

# Of each script types with learned positions and sinusoids, with rotations, with biases by distance, and with windows.
TYPES = {
    "mlm of words": ("roberta", "bert", "distilbert", "roformer", "modernbert", "bart", "mbart"),
    "clm": ("gpt2", "roberta", "gptj", "llama", "mistral", "gpt_neo", "bloom", "opt", "xglm", "bart"),
    "t5 of much noise": ("t5", "umt5"),
    "bart": ("bart", "pegasus", "blenderbot-small"),
}
WINDOWS = {"mistral": {"sliding_window": 4}, "modernbert": {"local_attention": 8}}


def cut(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch for one device with each text alone in a row, at its beginning."""
    batch, shape = dict(batch), batch["attention_mask"].shape
    is_scattered = "label_positions" in batch
    if is_scattered:
        counts = batch["label_weights"] > 0
        places = batch.pop("label_positions")[counts]
        for name in ("labels", "label_weights"):
            values, batch[name] = batch[name][counts], np.zeros(shape, batch[name].dtype)
            batch[name].reshape(-1)[places] = values
    of_encoder = {"input_ids", "attention_mask"} if "decoder_attention_mask" in batch else batch.keys()
    masks = {name: batch["attention_mask" if name in of_encoder else "decoder_attention_mask"] for name in batch}
    texts = [(row, number) for row in range(shape[0]) for number in range(1, 60)]
    texts = [(row, number) for row, number in texts if any((mask[row] == number).any() for mask in masks.values())]
    found = {name: np.zeros((len(texts), array.shape[1]), array.dtype) for name, array in batch.items()}
    for place, (row, number) in enumerate(texts):
        for name, array in batch.items():
            part = array[row][masks[name][row] == number]
            found[name][place, : len(part)] = np.minimum(part, 1) if name.endswith("mask") else part
    if is_scattered:
        found["label_positions"] = np.arange(found["labels"].size)
        found |= {name: found[name].reshape(-1) for name in ("labels", "label_weights")}
    return found


@pytest.mark.parametrize(("name", "model_type"), [(name, kind) for name, kinds in TYPES.items() for kind in kinds])
def test_a_row_of_texts_is_each_text_alone(name, model_type):
    """The loss is the sum of theirs; it would be another if they saw each other, or positions went on."""
    module, batch = NOISES[name][0], collate(name, num_groups=1, document_attention=True)[1]
    config = make_config(model_type, **WINDOWS.get(model_type, {}))
    module.DataTrainingArguments().adapt_config(config, LENGTH)
    model = make_model(module, config, layers.Compute(attention="chunked"))
    params, alone = make_params(model), cut(batch)
    assert len(alone["attention_mask"]) > 100
    together = batch | {key: np.minimum(mask, 1) for key, mask in batch.items() if key.endswith("mask")}
    compute = jax.jit(
        lambda params, batch: module.loss_fn(params, batch, model), compiler_options={"xla_backend_optimization_level": 0}
    )
    (loss, aux), (sum_of_losses, alone_aux), (mixed, _) = (compute(params, rows) for rows in (batch, alone, together))
    assert aux["weight"] == alone_aux["weight"] > 100
    assert aux["correct"] == alone_aux["correct"]
    assert float(loss) == pytest.approx(float(sum_of_losses), rel=1e-5)
    assert abs(float(mixed) / float(loss) - 1) > 1e-4
