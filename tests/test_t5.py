# SPDX-License-Identifier: Apache-2.0
"""Properties of span corruption (T5) and of the mixture of denoisers (UL2)."""

import functools
import itertools
import math
import re
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, T5Config

import run_t5_mlm_flax as script
from flaxlm import arguments, cli

PAD, EOS, NUM_WORDS = 0, 1, 500
MODES = ("[NLU]", "[NLG]", "[S2S]")
WORDS = np.arange(2, 2 + NUM_WORDS)


def make_tokenizer(num_sentinels=100, descending=True, modes=MODES) -> PreTrainedTokenizerFast:
    """<pad> 0, </s> 1, the words 2 to 501, sentinels in either order of ids, and modes; each token has a token after it."""
    sentinels = [f"<extra_id_{j}>" for j in range(num_sentinels)]
    names = ["<pad>", "</s>", *(f"w{i}" for i in WORDS), *(sentinels[::-1] if descending else sentinels), *modes, "after"]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="after"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="after")


TOKENIZER = make_tokenizer(2000)


def make_collator(max_seq_length=64, probability=0.15, mean_length=3.0, objective="span_corruption", tokenizer=TOKENIZER):
    data_args = script.DataTrainingArguments(
        objective=objective, mlm_probability=probability, mean_noise_span_length=mean_length
    )
    data_args.check(arguments.ModelArguments())
    return script.Collator(tokenizer, T5Config(decoder_start_token_id=PAD), data_args, max_seq_length)


def make_rows(collator, num_rows, rng, lengths=None):
    ids = rng.choice(WORDS, (num_rows, collator.row_length)).astype(np.int32)
    if lengths is not None:
        ids[np.arange(collator.row_length) >= np.asarray(lengths)[:, None]] = -1
    return {"input_ids": ids}


def collate(collator, rows, rng, is_real=None):
    num_rows = len(rows["input_ids"])
    uniforms = rng.random((num_rows, collator.draws_per_row))
    return collator(rows, uniforms, np.ones(num_rows, bool) if is_real is None else is_real, 1)


@functools.cache
def sentinel_numbers(tokenizer):
    vocab = tokenizer.get_vocab()
    return {vocab[f"<extra_id_{j}>"]: j for j in range(2000) if f"<extra_id_{j}>" in vocab}


def decode(batch, row, tokenizer=TOKENIZER, text_start=0):
    """Put a row together again: tokens of its text, and for each whether it is noise (the number of its span, else -1).

    Walks along the input; at the j-th sentinel it reads the target from that sentinel to the next.
    """
    number_of = sentinel_numbers(tokenizer)
    source = list(batch["input_ids"][row][batch["attention_mask"][row] == 1])
    assert not batch["attention_mask"][row][len(source) :].any()
    assert (batch["input_ids"][row][len(source) :] == PAD).all()
    target = list(batch["labels"][row][batch["label_weights"][row] > 0])
    np.testing.assert_array_equal(batch["decoder_attention_mask"][row], batch["label_weights"][row] > 0)
    assert not batch["label_weights"][row][len(target) :].any()
    assert (batch["labels"][row][len(target) :] == PAD).all()
    assert list(batch["decoder_input_ids"][row][: len(target)]) == [PAD, *target[:-1]]
    assert (batch["decoder_input_ids"][row][len(target) :] == PAD).all()
    assert source.pop() == target.pop() == tokenizer.eos_token_id

    spans, text, span_of = [], [], []
    for token in target:
        if token in number_of:
            assert number_of[token] == len(spans)
            spans.append([])
        else:
            spans[-1].append(token)
    for token in source[text_start:]:
        if token in number_of:
            assert number_of[token] == (max(span_of) + 1)
            text += spans[number_of[token]]
            span_of += [number_of[token]] * len(spans[number_of[token]])
        else:
            text.append(token)
            span_of.append(-1)
    assert max(span_of) + 1 == len(spans)
    return np.array(text), np.array(span_of)


def spans_by_hand(num_tokens: int, probability: float, mean_length: float) -> tuple[int, int]:
    """Tokens of noise and spans: T5's, up to a half of noise by the rarer of noise and clean text; clean text fits between."""
    num_noise = min(max(round(num_tokens * probability), 1), num_tokens - 1)
    rarer = min(num_noise, num_tokens - num_noise)
    return num_noise, min(max(1, round((num_noise if probability > 0.5 else rarer) / mean_length)), rarer)


@settings(max_examples=150, deadline=None)
@given(
    max_seq_length=st.integers(3, 90),
    probability=st.floats(0.001, 0.98) | st.sampled_from([0.15, 0.5]),
    mean_length=st.floats(1, 12) | st.sampled_from([1.0, 3.0, 1e9, math.inf]),
    lengths=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
@example(max_seq_length=9, probability=0.15, mean_length=3.0, lengths=[1.0], seed=0)  # defect 56, each of its cases
@example(max_seq_length=64, probability=0.15, mean_length=1.0, lengths=[1.0], seed=0)
@example(max_seq_length=64, probability=0.8, mean_length=4.0, lengths=[1.0], seed=0)
@example(max_seq_length=64, probability=0.001, mean_length=3.0, lengths=[1.0], seed=0)
@example(max_seq_length=90, probability=0.98, mean_length=49.0, lengths=[0.0, 1.0], seed=0)
def test_input_and_target_rebuild_the_text(max_seq_length, probability, mean_length, lengths, seed):
    """Any legal noise, rows of any length from 2: nothing is lost, the counts are those asked for, shapes are fixed."""
    mean_length = max(mean_length, probability / (1 - probability))  # shorter spans are refused
    collator, rng = make_collator(max_seq_length, probability, mean_length), np.random.default_rng(seed)
    E = collator.row_length
    lengths = [2 + round(share * (E - 2)) for share in lengths]
    rows = make_rows(collator, len(lengths), rng, lengths)
    original = rows["input_ids"].copy()
    batch = collate(collator, rows, rng)

    np.testing.assert_array_equal(rows["input_ids"], original)  # rows may be a view of a file: not to be written to
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(lengths), max_seq_length)
    for name in ("labels", "decoder_input_ids", "decoder_attention_mask", "label_weights"):
        assert batch[name].shape == (len(lengths), collator.target_length)
    assert {name: array.dtype for name, array in batch.items()} == dict.fromkeys(batch, np.int32) | {
        "label_weights": np.float32
    }
    for row, length in enumerate(lengths):
        text, span_of = decode(batch, row)
        np.testing.assert_array_equal(text, original[row, :length])
        num_noise, num_spans = spans_by_hand(length, probability, mean_length)
        assert ((span_of >= 0).sum(), span_of.max() + 1) == (num_noise, num_spans)
        assert span_of[0] == -1 and span_of[-1] == num_spans - 1
        starts = np.flatnonzero((span_of[1:] >= 0) & (span_of[:-1] != span_of[1:])) + 1
        assert len(starts) == num_spans and (span_of[starts - 1] == -1).all()  # clean text between any two spans


@pytest.mark.parametrize(
    ("max_seq_length", "probability", "mean_length", "expected"),
    [
        (512, 0.15, 3.0, (568, 114, 28)),
        (128, 0.15, 3.0, (141, 29, 7)),
        (1024, 0.15, 3.0, (1137, 229, 57)),
        (2048, 0.15, 3.0, (2274, 456, 114)),
        (512, 0.5, 3.0, (766, 512, 128)),  # the longest that fits is 767, with a target of 513
        (3, 0.15, 3.0, (2, 3, 1)),
        (512, 0.8, 5.0, (1421, 1365, 227)),
        (512, 0.7, 3.0, (958, 896, 224)),
        (128, 0.9, 12.0, (727, 709, 54)),
    ],
)
def test_lengths(max_seq_length, probability, mean_length, expected):
    """As T5's own code has them; full rows fill input and target to the last position."""
    collator = make_collator(max_seq_length, probability, mean_length)
    assert script.span_corruption_lengths(max_seq_length, probability, mean_length) == expected[:2]
    assert (collator.row_length, collator.target_length, len(collator.sentinel_ids_S)) == expected
    rng = np.random.default_rng(0)
    batch = collate(collator, make_rows(collator, 2, rng), rng)
    assert batch["attention_mask"].all() and batch["label_weights"].all()
    assert collator.columns == {"input_ids": -1} and collator.input_length == max_seq_length


@pytest.mark.parametrize(
    ("probability", "mean_length"),
    [(0.15, 3.0), (0.3, 2.0), (0.5, 8.0), (0.6, 3.0), (0.7, 3.0), (0.8, 4.0), (0.8, 12.0), (0.15, 1.0), (0.9, 9.0)],
)
def test_share_of_noise(probability, mean_length):
    """Over many rows: within 1 % the share and the mean span length asked for, also where there is more noise than text."""
    collator, rng = make_collator(512, probability, mean_length), np.random.default_rng(0)
    batch = collate(collator, make_rows(collator, 500, rng), rng)
    num_noise = np.isin(batch["labels"], WORDS).sum()
    num_spans = np.isin(batch["labels"], collator.sentinel_ids_S).sum()
    num_tokens = 500 * collator.row_length
    assert num_noise / num_tokens == pytest.approx(probability, rel=0.01)
    assert num_noise / num_spans == pytest.approx(mean_length, rel=0.02)
    # Rows differ, and no place in the middle is preferred.
    noise_in_row = np.array([decode(batch, row)[1] >= 0 for row in range(500)])
    middle = noise_in_row[:, 50:-50].mean(axis=0)
    assert abs(middle - probability).max() < 6 * math.sqrt(probability * (1 - probability) / 500)


def test_counts_up_to_a_half_are_as_ever():
    """Of the rarer of noise and clean text: at a half, where noise may be the odd token more, it decides; UL2 has that."""
    num_tokens = np.arange(1, 3000)
    for density, mean_length in [(0.15, 3.0), (0.3, 2.0), (0.5, 3.0), (0.5, 8.0), (0.5, 64.0), (0.499, 1.5), (0.25, math.inf)]:
        noise, spans = script.noise_counts(num_tokens, density, mean_length)
        expected_noise = np.minimum(np.maximum(np.rint(num_tokens * density), 1), num_tokens - 1)
        rarer = np.minimum(expected_noise, num_tokens - expected_noise)
        np.testing.assert_array_equal(noise, expected_noise)
        np.testing.assert_array_equal(spans, np.minimum(np.maximum(np.rint(rarer / mean_length), 1), rarer))


@pytest.mark.parametrize(("probability", "mean_length"), [(0.8, 3.0), (0.6, 1.0), (0.99, 50.0), (0.51, 1.0)])
def test_more_spans_than_clean_text_are_refused(probability, mean_length, refuses):
    """One token of clean text stands between two spans: so many spans there cannot be; the length named does."""
    data_args = script.DataTrainingArguments(mlm_probability=probability, mean_noise_span_length=mean_length)
    with refuses(f"--mlm_probability {probability} --mean_noise_span_length {mean_length}: no clean token is left"):
        data_args.check(arguments.ModelArguments())
    with pytest.raises(cli.Mistake) as caught:
        data_args.check(arguments.ModelArguments())
    data_args.mean_noise_span_length = float(re.search(r"length of ([\d.]+) or more", str(caught.value))[1])
    data_args.check(arguments.ModelArguments())
    assert data_args.mean_noise_span_length == pytest.approx(probability / (1 - probability), abs=2e-3)


def test_divisions_are_equally_likely():
    """11 tokens, 5 of noise in 3 spans: the 6 x 10 ways to divide noise and clean text come up alike."""
    num_rows, rng = 30_000, np.random.default_rng(0)
    cuts = rng.random((num_rows, 9))
    starts, ends = script.span_edges(cuts, *(np.full(num_rows, count) for count in (11, 5, 3)), S=3)
    counts = Counter(map(tuple, np.hstack([starts, ends])))
    expected = set()
    triples = list(itertools.product(range(1, 7), repeat=3))
    for noise, clean in itertools.product(triples, triples):
        if sum(noise) == 5 and sum(clean) == 6:
            first = [sum(clean[: j + 1]) + sum(noise[:j]) for j in range(3)]
            expected.add((*first, *(start + length for start, length in zip(first, noise, strict=True))))
    assert len(expected) == 60 and set(counts) == expected
    chi_square = sum((counts[way] - num_rows / 60) ** 2 / (num_rows / 60) for way in expected)
    assert 59 - 4 * math.sqrt(2 * 59) < chi_square < 59 + 4 * math.sqrt(2 * 59)  # mean and deviation for 59 degrees


def test_divisions_of_short_rows_are_equally_likely():
    """The same for a row of 6 in a batch of longer ones: 3 of noise in 2 spans, 2 x 2 ways."""
    num_rows, rng = 8000, np.random.default_rng(0)
    counts = [np.tile(pair, num_rows) for pair in ((6, 20), (3, 9), (2, 4))]
    starts, ends = script.span_edges(rng.random((2 * num_rows, 18)), *counts, S=5)
    ways = Counter(map(tuple, np.hstack([starts[::2, :2], ends[::2, :2]])))
    assert set(ways) == {(1, 4, 2, 6), (1, 5, 3, 6), (2, 4, 3, 6), (2, 5, 4, 6)}
    assert all(abs(count - num_rows / 4) < 5 * math.sqrt(num_rows * 3 / 16) for count in ways.values())


@pytest.mark.parametrize("objective", ["span_corruption", "ul2"])
def test_rows_do_not_depend_on_their_neighbours(objective):
    """9 rows together are 9 rows alone, bit for bit, whatever their lengths and the number of groups."""
    collator, rng = make_collator(objective=objective), np.random.default_rng(0)
    E = collator.row_length
    rows = make_rows(collator, 9, rng, [E, 5, E, 2, E - 1, 30, E, 1, 0])
    uniforms = rng.random((9, collator.draws_per_row))
    is_real = np.arange(9) != 4
    together = collator(rows, uniforms, is_real, 3)
    for row in range(9):
        part = slice(row, row + 1)
        alone = collator({"input_ids": rows["input_ids"][part]}, uniforms[part], is_real[part], 1)
        for name, array in together.items():
            np.testing.assert_array_equal(array[part], alone[name])


def test_rows_without_weight():
    """Rows that fill up a batch count for nothing; a row of one token or none is shown as it is."""
    collator, rng = make_collator(), np.random.default_rng(0)
    E = collator.row_length
    rows = make_rows(collator, 4, rng, [E, E, 1, 0])
    batch = collate(collator, rows, rng, np.array([True, False, True, True]))
    assert batch["label_weights"].any(axis=1).tolist() == [True, False, False, False]
    word = rows["input_ids"][2, 0]
    for row, shown in ((2, [word, EOS]), (3, [EOS])):
        assert list(batch["input_ids"][row]) == shown + [PAD] * (64 - len(shown))
        assert batch["attention_mask"][row].sum() == len(shown)
        assert list(batch["labels"][row]) == [EOS] + [PAD] * (collator.target_length - 1)
    assert batch["attention_mask"][1].all()


def test_pad_and_sentinels_inside_the_text_are_text():
    collator, rng = make_collator(), np.random.default_rng(0)
    rows = make_rows(collator, 8, rng)
    rows["input_ids"][:, 5:40:3] = PAD
    rows["input_ids"][:, 6:40:3] = collator.sentinel_ids_S[0]
    batch = collate(collator, rows, rng)
    assert batch["attention_mask"].all() and batch["label_weights"].all()
    shown = np.hstack([batch["input_ids"], batch["labels"]])
    added = 2 * len(collator.sentinel_ids_S) + 2
    assert shown.shape[1] == collator.row_length + added
    for token in (PAD, *WORDS):
        np.testing.assert_array_equal((shown == token).sum(axis=1), (rows["input_ids"] == token).sum(axis=1))


@pytest.mark.parametrize("descending", [True, False])
def test_sentinels_are_found_by_name(descending):
    """First <extra_id_0>, then <extra_id_1>, whether ids fall (T5's own tokenizer) or rise (defects 54, 55)."""
    tokenizer, rng = make_tokenizer(100, descending), np.random.default_rng(0)
    collator = make_collator(128, tokenizer=tokenizer)
    rows = make_rows(collator, 3, rng)
    batch = collate(collator, rows, rng)
    for row in range(3):
        ids = batch["input_ids"][row]
        names = [name for name in tokenizer.convert_ids_to_tokens(ids) if name.startswith("<extra_id_")]
        assert names == [f"<extra_id_{j}>" for j in range(7)]
        np.testing.assert_array_equal(decode(batch, row, tokenizer)[0], rows["input_ids"][row])


@pytest.mark.parametrize("pieces", [True, False])
@pytest.mark.parametrize("objective", ["span_corruption", "ul2"])
def test_sentinels_that_are_pieces(pieces, objective):
    """As in mT5's vocabulary: ▁<extra_id_0>, and no added tokens; also in mine, where only some are (J1)."""
    names = [f"<extra_id_{j}>" for j in range(100)] + list(MODES)
    vocab = {name: i for i, name in enumerate(["<pad>", "</s>", *(f"w{i}" for i in WORDS)])}
    vocab |= {f"▁{name}" if pieces or j % 2 else name: len(vocab) + j for j, name in enumerate(names[::-1])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="w2")), pad_token="<pad>", eos_token="</s>", unk_token="w2"
    )
    collator, rng = make_collator(128, objective=objective, tokenizer=tokenizer), np.random.default_rng(0)
    batch = collate(collator, make_rows(collator, 3, rng), rng)
    for row in range(3):
        shown = tokenizer.convert_ids_to_tokens(batch["labels"][row])
        found = [name.removeprefix("▁") for name in shown if "<extra_id_" in name]
        assert found == [f"<extra_id_{j}>" for j in range(len(found))] and found
        if objective == "ul2":
            assert tokenizer.convert_ids_to_tokens(int(batch["input_ids"][row, 0])).removeprefix("▁") in MODES


def test_too_few_sentinels(refuses):
    make_collator(1809, tokenizer=make_tokenizer(100))
    with refuses("up to 101 spans"):
        make_collator(1810, tokenizer=make_tokenizer(100))
    with refuses(r"--max_seq_length 2048 --mlm_probability 0.15 .* 114 spans .* has 100: .*<extra_id_0> to <extra_id_113>"):
        make_collator(2048, tokenizer=make_tokenizer(100))
    with refuses(r"--max_seq_length 64 --objective ul2: .* 11 spans .* has 10: "):
        make_collator(64, objective="ul2", tokenizer=make_tokenizer(10))
    with refuses("has 0: "):
        make_collator(tokenizer=make_tokenizer(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlm_probability": 0.0}, "--mlm_probability 0.0"),
        ({"mlm_probability": 1.0}, "--mlm_probability 1.0"),
        ({"mlm_probability": math.nan}, "--mlm_probability nan"),
        ({"mean_noise_span_length": 0.9}, "--mean_noise_span_length 0.9"),
        ({"mean_noise_span_length": math.nan}, "--mean_noise_span_length nan"),
        ({"max_seq_length": 2}, "--max_seq_length 2"),
        ({"objective": "ul2", "max_seq_length": 3}, "--max_seq_length 3.* 4 "),
        ({"objective": "ul2", "mlm_probability": 0.2}, "--mlm_probability: not with --objective ul2"),
        ({"objective": "ul2", "mean_noise_span_length": 8.0}, "--mean_noise_span_length: not with --objective ul2"),
    ],
)
def test_impossible_noise_is_refused(changes, message, refuses):
    with refuses(message):
        script.DataTrainingArguments(**changes).check(arguments.ModelArguments())


def test_shortest_inputs(refuses):
    for objective, shortest in (("span_corruption", 3), ("ul2", 4)):
        assert make_collator(shortest, objective=objective).row_length == 2
        with refuses("--max_seq_length"):
            make_collator(shortest - 1, objective=objective)


def test_decoder_start_token():
    """It is the configuration's."""
    rng = np.random.default_rng(0)
    for start, expected in ((7, 7), (PAD, PAD)):
        collator = script.Collator(
            TOKENIZER, T5Config(decoder_start_token_id=start), script.DataTrainingArguments(), max_seq_length=32
        )
        assert (collate(collator, make_rows(collator, 2, rng), rng)["decoder_input_ids"][:, 0] == expected).all()


@settings(max_examples=60, deadline=None)
@given(
    max_seq_length=st.integers(4, 150),
    lengths=st.lists(st.floats(0, 1), min_size=7, max_size=7),
    seed=st.integers(0, 2**32 - 1),
)
@example(max_seq_length=150, lengths=[1.0] * 7, seed=0)
def test_ul2_rebuilds_the_text(max_seq_length, lengths, seed):
    """Every denoiser, in one batch and rows of any length: mode in front, then as above."""
    collator, rng = make_collator(max_seq_length, objective="ul2"), np.random.default_rng(seed)
    lengths = [2 + round(share * (collator.row_length - 2)) for share in lengths]
    rows = make_rows(collator, 7, rng, lengths)
    uniforms = rng.random((7, collator.draws_per_row))
    uniforms[:, 0] = (np.arange(7) + 0.5) / 7
    batch = collator(rows, uniforms, np.ones(7, bool), 1)
    assert batch["input_ids"].shape == (7, max_seq_length)
    for row, (length, denoiser) in enumerate(zip(lengths, script.UL2_DENOISERS, strict=True)):
        assert TOKENIZER.convert_ids_to_tokens(int(batch["input_ids"][row, 0])) == denoiser.mode
        text, span_of = decode(batch, row, text_start=1)
        np.testing.assert_array_equal(text, rows["input_ids"][row, :length])
        num_noise = min(max(round(length * denoiser.noise_density), 1), length - 1)
        rarer = min(num_noise, length - num_noise)
        num_spans = 1 if denoiser.mode == "[S2S]" else max(1, round(rarer / denoiser.mean_span_length))
        assert ((span_of >= 0).sum(), span_of.max() + 1) == (num_noise, num_spans)
        if num_spans == 1:
            np.testing.assert_array_equal(span_of >= 0, np.arange(length) >= length - num_noise)


def test_ul2_lengths_and_shares():
    """The tightest denoisers fill input and target exactly; two rows of seven are [NLU], four [NLG], one [S2S]."""
    collator, rng = make_collator(512, objective="ul2"), np.random.default_rng(0)
    batch = collate(collator, make_rows(collator, 7000, rng), rng)
    assert batch["attention_mask"].sum(axis=1).max() == 512
    assert batch["label_weights"].sum(axis=1).max() == collator.target_length
    modes = Counter(TOKENIZER.convert_ids_to_tokens(batch["input_ids"][:, 0].tolist()))
    assert set(modes) == set(MODES)
    for mode, share in (("[NLU]", 2 / 7), ("[NLG]", 4 / 7), ("[S2S]", 1 / 7)):
        assert modes[mode] / 7000 == pytest.approx(share, abs=0.025)
    drawn = Counter(zip(batch["attention_mask"].sum(axis=1), batch["label_weights"].sum(axis=1), strict=True))
    assert len(drawn) == 7 and min(drawn.values()) > 850


def test_ul2_needs_its_mode_tokens(refuses):
    with refuses(r"--objective ul2: .* lacks the mode tokens \[NLG\], \[S2S\]; "):
        make_collator(objective="ul2", tokenizer=make_tokenizer(modes=["[NLU]"]))
    make_collator(tokenizer=make_tokenizer(modes=[]))


def test_no_python_loop_over_rows_tokens_or_spans():
    """The interpreter runs the same number of lines for 4 rows as for 400, for 2 spans as for 30."""

    def lines_run(num_rows, max_seq_length):
        collator, rng, count = make_collator(max_seq_length), np.random.default_rng(0), 0
        rows = make_rows(collator, num_rows, rng)

        def trace(frame, event, argument):
            nonlocal count
            count += event == "line" and frame.f_code.co_filename == script.__file__
            return trace

        previous = sys.gettrace()
        sys.settrace(trace)
        try:
            collate(collator, rows, rng)
        finally:
            sys.settrace(previous)
        return count

    assert 0 < lines_run(4, 32) == lines_run(400, 32) == lines_run(4, 512)
