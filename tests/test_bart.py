# SPDX-License-Identifier: Apache-2.0
"""Properties of the BART collator, of sentence boundaries and of their tokens."""

import math
import sys
from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BartConfig

import run_bart_dlm_flax as script
from flaxlm import arguments
from tests.test_sentences import SENTENCES

BOS, PAD, EOS, UNK, MASK = range(5)  # of byte_level_tokenizer; BOS, PAD, EOS and MASK are special, UNK is text
SEEDS = st.integers(0, 2**32 - 1)


def make_collator(tokenizer, row_length, q=0.3, r=1.0, rate=3.0, config=None):
    data_args = script.DataTrainingArguments(mlm_probability=q, permute_sentence_ratio=r, poisson_lambda=rate)
    return script.Collator(tokenizer, config or BartConfig(), data_args, row_length)


def make_rows(rng, N, T, share_special=0.1, share_starts=0.2, full=False):
    """Rows whose text tokens all differ, of documents and sentences of any length, cut and padded anywhere."""
    ids = np.argsort(rng.random((N, 504)), axis=1)[:, :T] + 5
    ids[rng.random((N, T)) < share_special] = BOS
    ids[(rng.random((N, T)) < 0.5) & (ids == BOS)] = EOS
    if not full:
        ids[np.arange(T) >= rng.integers(0, T + 1, N)[:, None]] = PAD
    return {"input_ids": ids.astype(np.int32), "sentence_starts": (rng.random((N, T)) < share_starts).astype(np.int32)}


def cut_padding(rows):
    """The rows as the script has them: -1 where PAD stands behind a row's last token."""
    behind = np.flip(np.logical_and.accumulate(np.flip(rows["input_ids"] == PAD, axis=1), axis=1), axis=1)
    return rows | {"input_ids": np.where(behind, -1, rows["input_ids"])}


def collate(collator, rows, seed=0, is_real=None):
    N = len(rows["input_ids"])
    uniforms = np.random.default_rng(seed).random((N, collator.draws_per_row))
    return collator(cut_padding(rows), uniforms, np.ones(N, bool) if is_real is None else is_real, 1)


def is_text(token):
    return token not in (BOS, PAD, EOS, MASK)


def documents(ids, starts):
    """One row as documents, lists of sentences, lists of tokens; a special token is a document [[token]]."""
    found = []
    for position, token in enumerate(ids):
        if not is_text(token) or position == 0 or not is_text(ids[position - 1]):
            found.append([[token]])
        elif starts[position]:
            found[-1].append([token])
        else:
            found[-1][-1].append(token)
    return found


def infill_slowly(ids, uniforms, T, q, rate):
    """The infilling of one row (without padding) token by token, from the numbers that the docstring says."""
    rounding, _, lengths, places, empty, empty_places = uniforms[0], *uniforms[1:].reshape(5, T)
    text = [position for position, token in enumerate(ids) if is_text(token)]
    budget = left = math.floor(q * len(text) + rounding)
    spans, num_empty = [], 0
    while left:
        number, length = lengths[len(spans)] * (1 - math.exp(-rate)), 1
        weight = total = math.exp(-rate) * rate
        while total <= number:
            length += 1
            weight *= rate / length
            total += weight
        num_empty += math.floor(-math.log(1 - empty[len(spans)]) / rate)
        spans.append(min(length, left))
        left -= spans[-1]
    items = len(text) - budget + len(spans)
    chosen = set(np.argsort(places[:items])[: len(spans)])
    span_of, remaining = {}, iter(text)
    for item in range(items):
        for _ in range(spans[len(chosen & set(range(item)))] if item in chosen else 1):
            span_of[next(remaining)] = item if item in chosen else None
    out, sites = [], []
    for position, token in enumerate(ids):
        span = span_of.get(position)
        if span is not None and position and span_of.get(position - 1) == span:
            continue
        if position in span_of:
            sites.append(len(out))
        out.append(token if span is None else MASK)
    num_empty = min(num_empty, T - len(out))
    inserted = Counter(sites[int(number * len(sites))] for number in empty_places[:num_empty])
    return [token for place, kept in enumerate(out) for token in [MASK] * inserted[place] + [kept]]


@settings(max_examples=150, deadline=None)
@given(
    num_rows=st.integers(1, 6),
    T=st.integers(1, 80),
    q=st.one_of(st.just(0.0), st.floats(0, 1, exclude_max=True)),
    r=st.floats(0, 1),
    rate=st.floats(0, 100, exclude_min=True),
    share_special=st.sampled_from([0, 0.05, 0.5]),
    share_starts=st.sampled_from([0, 0.1, 1]),
    num_fake=st.integers(0, 2),
    seed=SEEDS,
)
def test_any_row(byte_level_tokenizer, num_rows, T, q, r, rate, share_special, share_starts, num_fake, seed):
    """Any rows and noise: the decoder sees and predicts the whole row, the encoder what is left of it, in legal order."""
    rng = np.random.default_rng(seed)
    rows = make_rows(rng, num_rows, T, share_special, share_starts)
    ids, starts = rows["input_ids"].copy(), rows["sentence_starts"].copy()
    is_real = np.arange(num_rows) < num_rows - num_fake
    batch = collate(make_collator(byte_level_tokenizer, T, q, r, rate), rows, seed, is_real)

    np.testing.assert_array_equal(rows["input_ids"], ids)  # rows may be a view of a file: not to be written to
    np.testing.assert_array_equal(rows["sentence_starts"], starts)
    np.testing.assert_array_equal(batch["labels"], ids)
    np.testing.assert_array_equal(batch["decoder_input_ids"][:, 1:], ids[:, :-1])
    assert (batch["decoder_input_ids"][:, 0] == EOS).all()
    np.testing.assert_array_equal(batch["label_weights"], (ids != PAD) & is_real[:, None])
    np.testing.assert_array_equal(batch["attention_mask"], batch["input_ids"] != PAD)
    np.testing.assert_array_equal(batch["decoder_attention_mask"], ids != PAD)
    assert (np.diff(batch["attention_mask"], axis=1) <= 0).all()  # padding on the right only
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        name: ((num_rows, T), np.float32 if name == "label_weights" else np.int32)
        for name in ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "labels", "label_weights")
    }
    for row in range(num_rows):
        original = ids[row][ids[row] != PAD].tolist()
        noised = batch["input_ids"][row][batch["input_ids"][row] != PAD].tolist()
        kept, place = [token for token in noised if token != MASK], 0
        for document in documents(original, starts[row]):  # sentences in any order, the tokens of each in their own
            if not is_text(document[0][0]):
                assert kept[place] == document[0][0]
                place += 1
                continue
            sentence_of = {token: number for number, sentence in enumerate(document) for token in sentence}
            seen = []
            while place < len(kept) and kept[place] in sentence_of:
                seen.append(kept[place])
                place += 1
            order = list(dict.fromkeys(sentence_of[token] for token in seen))
            assert seen == [token for number in order for token in document[number] if token in seen]
            assert r > 0 or order == sorted(order)
        assert place == len(kept)
        num_text = sum(map(is_text, original))
        num_hidden = len(original) - len(kept)
        assert math.floor(q * num_text) <= num_hidden <= math.ceil(q * num_text)
        assert (num_hidden > 0) == (MASK in noised)


@settings(max_examples=100, deadline=None)
@given(
    T=st.integers(1, 80),
    q=st.floats(0.01, 0.99),
    rate=st.floats(0.05, 30),
    share_special=st.sampled_from([0, 0.05, 0.3]),
    seed=SEEDS,
)
def test_infilling_equals_a_slow_one(byte_level_tokenizer, T, q, rate, share_special, seed):
    """Mask for mask what the plain algorithm makes of the same numbers (defects 38, 42, 43, 44)."""
    rows = make_rows(np.random.default_rng(seed), 5, T, share_special)
    collator = make_collator(byte_level_tokenizer, T, q, 0.0, rate)
    batch = collate(collator, rows, seed)
    uniforms = np.random.default_rng(seed).random((5, collator.draws_per_row))
    for row in range(5):
        original = rows["input_ids"][row][rows["input_ids"][row] != PAD].tolist()
        expected = infill_slowly(original, uniforms[row], T, q, rate)
        assert batch["input_ids"][row].tolist() == expected + [PAD] * (T - len(expected))


@settings(max_examples=100, deadline=None)
@given(T=st.integers(1, 80), r=st.floats(0, 1), share_special=st.sampled_from([0, 0.05, 0.3]), seed=SEEDS)
def test_sentences_are_permuted_within_documents(byte_level_tokenizer, T, r, share_special, seed):
    """Infilling off: sentences whole, at most ceil(m r) of them moved, position 0 pinned (defects 40, 41)."""
    rows = make_rows(np.random.default_rng(seed), 5, T, share_special)
    batch = collate(make_collator(byte_level_tokenizer, T, 0.0, r), rows, seed)
    for original, starts, noised in zip(rows["input_ids"], rows["sentence_starts"], batch["input_ids"], strict=True):
        assert noised[0] == original[0]
        place = 0
        for number, document in enumerate(documents(original, starts)):
            size = sum(map(len, document))
            part = noised[place : place + size].tolist()
            place += size
            sentence_of = {sentence[0]: i for i, sentence in enumerate(document)}
            order = [sentence_of[token] for token in part if token in sentence_of]
            assert part == [token for i in order for token in document[i]]
            assert sorted(order) == list(range(len(document)))
            movable = len(document) - (number == 0)  # a row that begins in mid-text keeps the rest of a sentence
            assert number or order[0] == 0
            assert sum(i != new for i, new in enumerate(order)) <= math.ceil(round(movable * r, 9))


@pytest.mark.parametrize("r, chosen", [(1.0, 4), (0.75, 3), (0.5, 2), (0.3, 2)])
def test_choice_and_order_of_sentences_are_uniform(byte_level_tokenizer, r, chosen):
    """Of four sentences every choice of ceil(4 r), and every order of those, is equally likely; the last too (defect 39)."""
    N = 24_000
    ids = [BOS, 10, 11, 12, 20, 30, 31, 40, EOS, BOS, 50, 51]  # 10 and 50 begin sentences too: they begin documents
    rows = {"input_ids": np.tile(np.array(ids, np.int32), (N, 1)), "sentence_starts": np.isin(ids, [20, 30, 40])}
    rows["sentence_starts"] = np.tile(rows["sentence_starts"].astype(np.int32), (N, 1))
    batch = collate(make_collator(byte_level_tokenizer, len(ids), 0.0, r), rows)["input_ids"]
    assert (batch[:, [0, 8, 9, 10, 11]] == [BOS, EOS, BOS, 50, 51]).all()
    observed = Counter(tuple(token // 10 for token in row[1:8] if token % 10 == 0) for row in batch)
    expected = Counter()
    for slots in combinations(range(4), chosen):
        orders = list(permutations(slots))
        for order in orders:
            result = [1, 2, 3, 4]
            for slot, source in zip(slots, order, strict=True):
                result[slot] = source + 1
            expected[tuple(result)] += N / math.comb(4, chosen) / len(orders)
    assert observed.keys() == expected.keys()
    assert sum((observed[order] - expected[order]) ** 2 / expected[order] for order in expected) < 60  # p < 1e-4


def test_the_last_sentence_of_a_row_and_of_a_text_moves(byte_level_tokenizer):
    ids = [BOS, 10, 11, 20, 21, EOS, BOS, 30, 31, 40, 41]
    rows = {
        "input_ids": np.tile(np.array(ids, np.int32), (50, 1)),
        "sentence_starts": np.tile(np.isin(ids, [10, 20, 30, 40]), (50, 1)),
    }
    batch = collate(make_collator(byte_level_tokenizer, len(ids), 0.0, 1.0), rows)["input_ids"].tolist()
    assert {tuple(row[1:5]) for row in batch} == {(10, 11, 20, 21), (20, 21, 10, 11)}
    assert {tuple(row[7:]) for row in batch} == {(30, 31, 40, 41), (40, 41, 30, 31)}


@pytest.mark.parametrize("q, rate, T", [(0.3, 3.0, 128), (0.15, 3.0, 64), (0.5, 0.5, 64), (0.3, 12.0, 500), (0.05, 3.5, 32)])
def test_masked_share(byte_level_tokenizer, q, rate, T):
    """Over 3000 rows the share asked for is hidden, in each row within one token (defect 42)."""
    N = 3000
    rng = np.random.default_rng(0)
    rows = make_rows(rng, N, T, share_special=0.02, full=True)
    batch = collate(make_collator(byte_level_tokenizer, T, q, 1.0, rate), rows)
    num_text = (rows["input_ids"] > MASK).sum(axis=1)
    num_hidden = num_text - (batch["input_ids"] > MASK).sum(axis=1)
    assert num_hidden.sum() / num_text.sum() == pytest.approx(q, rel=0.01)
    assert (abs(num_hidden - q * num_text) < 1).all()


@pytest.mark.parametrize("q, rate, T", [(0.3, 3.0, 480), (0.3, 1.0, 480), (0.2, 0.5, 480), (0.1, 2.0, 480)])
def test_mean_span_length(byte_level_tokenizer, q, rate, T):
    """Empty spans counted, a mask stands for lambda tokens; as many spans are empty as Poisson says (defect 43)."""
    N = 2000
    rows = make_rows(np.random.default_rng(0), N, T, share_special=0, full=True)
    rows["input_ids"][:, T // 2 :] = PAD  # room for insertions
    noised = collate(make_collator(byte_level_tokenizer, T, q, 0.0, rate), rows)["input_ids"]
    num_hidden = N * T // 2 - (noised > MASK).sum()
    assert num_hidden / (noised == MASK).sum() == pytest.approx(rate, rel=0.05)  # the last span of a row is cut

    place = np.full((N, 512), -1)
    np.put_along_axis(place, rows["input_ids"].astype(int), np.arange(T)[None], axis=1)
    original_place = np.take_along_axis(place, noised.astype(int), axis=1)
    num_empty = num_lone = 0
    for row, places in zip(noised, original_place, strict=True):
        kept = np.append(places[row > MASK], T // 2)
        masks_before = np.diff(np.flatnonzero(np.append(row[row != PAD] > MASK, True)), prepend=-1) - 1
        hidden_before = np.diff(kept, prepend=-1) - 1
        num_empty += masks_before[hidden_before == 0].sum()
        num_lone += (hidden_before == 0).sum()
        assert (masks_before[hidden_before > 0] > 0).all()
    assert num_empty > 0
    density = num_empty / num_lone  # insertions per site, of all sites
    num_spans = (noised == MASK).sum() / N
    sites = T // 2 * (1 - q) + num_spans * (1 - math.exp(-rate))
    assert density * sites == pytest.approx(num_spans * math.exp(-rate), rel=0.1)


def test_arrangements_are_uniform(byte_level_tokenizer):
    """Two spans of one token among five: each of the ten pairs is hidden equally often, neighbours as two masks."""
    N = 20_000
    rows = {"input_ids": np.tile(np.arange(10, 15, dtype=np.int32), (N, 1)), "sentence_starts": np.zeros((N, 5), np.int32)}
    noised = collate(make_collator(byte_level_tokenizer, 5, 0.4, 0.0, 1e-6), rows)["input_ids"]
    counts = Counter(tuple(np.flatnonzero(row == MASK)) for row in noised)
    assert counts.keys() == set(combinations(range(5), 2))
    assert sum((count - N / 10) ** 2 / (N / 10) for count in counts.values()) < 34  # p < 1e-4


def test_nothing_wraps_around(byte_level_tokenizer):
    """First and last column hidden: both masks are there (defect 38)."""
    rows = make_rows(np.random.default_rng(0), 500, 16, share_special=0, full=True)
    noised = collate(make_collator(byte_level_tokenizer, 16, 0.7, 0.0), rows)["input_ids"]
    kept = [set(row[row > MASK]) for row in noised]
    both = [i for i, row in enumerate(rows["input_ids"]) if row[0] not in kept[i] and row[-1] not in kept[i]]
    assert len(both) > 20
    for i in both:
        assert noised[i][0] == MASK
        assert noised[i][noised[i] != PAD][-1] == MASK


def test_a_span_is_split_at_a_special_token(byte_level_tokenizer):
    """All text hidden: one mask on each side of a document's border, which stays."""
    ids = np.array([[10, 11, EOS, BOS, 12, 13, EOS, PAD]], np.int32)
    collator = make_collator(byte_level_tokenizer, 8, 0.9999, 0.0, 100.0)
    batch = collator(
        {"input_ids": ids, "sentence_starts": np.zeros_like(ids)},
        np.full((1, collator.draws_per_row), 0.9),
        np.ones(1, bool),
        1,
    )
    assert batch["input_ids"].tolist() == [[MASK, EOS, BOS, MASK, EOS, PAD, PAD, PAD]]


def test_equal_random_numbers_are_harmless(byte_level_tokenizer):
    for value in (0.0, 0.5, math.nextafter(1, 0)):
        for rate in (1e-300, 0.1, 3.0, 100.0):
            rows = make_rows(np.random.default_rng(0), 20, 40)
            collator = make_collator(byte_level_tokenizer, 40, math.nextafter(1, 0) if value else 0.3, 1.0, rate)
            batch = collator(rows, np.full((20, collator.draws_per_row), value), np.ones(20, bool), 1)
            hidden = (rows["input_ids"] > MASK).sum() - (batch["input_ids"] > MASK).sum()
            assert (hidden > 0) == bool((batch["input_ids"] == MASK).any())


def test_no_noise_is_identity_and_ends_are_labelled(byte_level_tokenizer):
    """Whatever the noise, the loss is the same: every token, <s> and </s> too, and no padding (defects 45, 46)."""
    ids = np.array([[BOS, 10, UNK, 12, EOS, BOS, 13, EOS, PAD, PAD]], np.int32)
    rows = {"input_ids": ids, "sentence_starts": (ids == 12).astype(np.int32)}
    plain = collate(make_collator(byte_level_tokenizer, 10, 0.0, 0.0), rows)
    np.testing.assert_array_equal(plain["input_ids"], ids)
    for q, r in ((0, 0), (0.3, 0), (0, 1), (0.5, 1)):
        batch = collate(make_collator(byte_level_tokenizer, 10, q, r), rows)
        np.testing.assert_array_equal(batch["label_weights"], ids != PAD)
        np.testing.assert_array_equal(batch["labels"], ids)


def test_a_padding_token_in_the_text_is_no_padding(byte_level_tokenizer):
    """Padding goes by length: no hole in the attention, and the row's end is found (defect 47)."""
    ids = np.array([[10, PAD, 11, PAD, PAD]], np.int32)
    batch = collate(make_collator(byte_level_tokenizer, 5, 0.0), {"input_ids": ids, "sentence_starts": ids * 0})
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0]]
    assert batch["label_weights"].tolist() == [[1, 1, 1, 0, 0]]


def test_unknown_tokens_are_text(byte_level_tokenizer):
    ids = np.full((200, 8), UNK, np.int32)
    noised = collate(make_collator(byte_level_tokenizer, 8), {"input_ids": ids, "sentence_starts": ids * 0})["input_ids"]
    assert ((noised == MASK).any(axis=1)).all()


def test_rows_do_not_depend_on_their_neighbours(byte_level_tokenizer):
    """Noise belongs to the row: nine rows at once equal nine times one."""
    rows = cut_padding(make_rows(np.random.default_rng(0), 9, 64))
    collator = make_collator(byte_level_tokenizer, 64)
    uniforms = np.random.default_rng(1).random((9, collator.draws_per_row))
    together = collator(rows, uniforms, np.ones(9, bool), 1)
    for i in range(9):
        alone = collator({name: array[i : i + 1] for name, array in rows.items()}, uniforms[i : i + 1], np.ones(1, bool), 1)
        for name, array in together.items():
            np.testing.assert_array_equal(alone[name], array[i : i + 1])
    assert (together["input_ids"] != rows["input_ids"]).any()


def test_throughput_is_not_a_python_loop(byte_level_tokenizer):
    """No Python per row, sentence or span: the interpreter runs the same number of lines for 4 rows as for 400."""

    def lines_run(num_rows):
        rows = make_rows(np.random.default_rng(0), num_rows, 64, full=True)
        collator, count = make_collator(byte_level_tokenizer, 64), 0
        uniforms = np.random.default_rng(0).random((num_rows, collator.draws_per_row))

        def trace(frame, event, argument):
            nonlocal count
            count += event == "line" and frame.f_code.co_filename == script.__file__
            return trace

        previous = sys.gettrace()
        sys.settrace(trace)
        try:
            collator(rows, uniforms, np.ones(num_rows, bool), 1)
        finally:
            sys.settrace(previous)
        return count

    assert 0 < lines_run(4) == lines_run(400)


def test_what_the_collator_says_of_itself(byte_level_tokenizer, word_piece_tokenizer, refuses):
    collator = make_collator(byte_level_tokenizer, 32)
    assert (collator.columns, collator.row_length) == ({"input_ids": -1, "sentence_starts": 0}, 32)
    with refuses("has no eos_token"):
        make_collator(word_piece_tokenizer, 32)


@pytest.mark.parametrize(
    "name, value",
    [
        *(("mlm_probability", value) for value in (-0.1, 1.0, 1.5, math.nan)),
        *(("permute_sentence_ratio", value) for value in (-0.1, 1.1, math.nan)),
        *(("poisson_lambda", value) for value in (0.0, -1.0, 101.0, math.inf, math.nan)),
    ],
)
def test_impossible_noise_is_refused(name, value, refuses):
    """Defect 51."""
    script.DataTrainingArguments().check(arguments.ModelArguments())
    with refuses(f"^--{name} "):
        script.DataTrainingArguments(**{name: value}).check(arguments.ModelArguments())


def test_languages(refuses):
    script.DataTrainingArguments(sentence_language="nb").check(arguments.ModelArguments())
    for language in ("english", "en_GB", "DE", ""):
        with refuses("--sentence_language "):
            script.DataTrainingArguments(sentence_language=language).check(arguments.ModelArguments())


@pytest.mark.parametrize("language, sentences, space", SENTENCES)
@pytest.mark.parametrize("kind", ["byte_level", "word_piece", "unigram"])
def test_sentence_starts_of_tokens(kind, language, sentences, space, request):
    """Each sentence has one mark, at its first token; the tokens between two marks are the sentence (defect 48)."""
    tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    text = space.join(sentences)
    batch = script.tokenize_texts({"content": [text, " \n", None, ""]}, tokenizer, "content", language)
    assert batch.keys() == {"input_ids", "sentence_starts"}  # defects 49, 80
    (ids,), (starts,) = batch["input_ids"], batch["sentence_starts"]
    assert ids == tokenizer(text)["input_ids"]
    assert (len(starts), starts.dtype, starts[0], starts[-1], starts[1]) == (len(ids), np.int32, 0, 0, 1)
    assert set(starts) == {0, 1}

    def spell(tokens):
        decoded = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return "".join(decoded.replace("##", "").split())

    if kind == "byte_level":
        decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert decoded == text
    pieces = [piece.tolist() for piece in np.split(ids, np.flatnonzero(starts))[1:]]
    if kind == "byte_level":
        assert [spell(piece) for piece in pieces] == ["".join(sentence.split()) for sentence in sentences]
    elif tokenizer.unk_token_id not in ids or " " in space:
        assert len(pieces) == len(sentences)


def test_leading_space_belongs_to_the_next_sentence(byte_level_tokenizer):
    batch = script.tokenize_texts({"text": ["One is here. Two is there."]}, byte_level_tokenizer, "text", "en")
    ids = np.array(batch["input_ids"][0])
    pieces = np.split(ids, np.flatnonzero(batch["sentence_starts"][0]))
    assert byte_level_tokenizer.decode(pieces[1]) == "One is here."
    assert byte_level_tokenizer.decode(pieces[2][:-1]) == " Two is there."


def test_blank_batch_has_both_columns(byte_level_tokenizer):
    blank = script.tokenize_texts({"text": ["", None, " \n"]}, byte_level_tokenizer, "text", "en")
    assert blank == {"input_ids": [], "sentence_starts": []}


def test_text_to_noise(byte_level_tokenizer, texts):
    """Real text, from tokens to batch: sentences change places, and come back whole."""
    batch = script.tokenize_texts({"text": texts}, byte_level_tokenizer, "text", "en")
    T = 256
    flat = {name: np.concatenate(columns) for name, columns in batch.items()}
    rows = {name: array[: len(array) // T * T].reshape(-1, T) for name, array in flat.items()}
    moved = collate(make_collator(byte_level_tokenizer, T, 0.0), rows)["input_ids"]
    np.testing.assert_array_equal(np.sort(moved, axis=1), np.sort(rows["input_ids"], axis=1))
    assert 0.05 < (moved != rows["input_ids"]).mean() < 0.95
    noised = collate(make_collator(byte_level_tokenizer, T), rows)["input_ids"]
    assert 0.6 < (noised > MASK).sum() / (rows["input_ids"] > MASK).sum() < 0.75
