# SPDX-License-Identifier: Apache-2.0
"""Properties of the MLM collator and of word boundaries."""

import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, PretrainedConfig

import run_mlm_flax as script
from flaxlm import randomness, sharding, weights
from tests.conftest import BART_SIDE, TINY, run


def make_collator(tokenizer, row_length, mlm_probability=0.15):
    return script.Collator(tokenizer, None, script.DataTrainingArguments(mlm_probability=mlm_probability), row_length)


def uniforms(shape, seed=0):
    return np.random.default_rng(seed).random(shape)


def scatter_labels(batch, num_groups):
    """Labels at their places: int [N, T], -100 elsewhere."""
    N, T = batch["input_ids"].shape
    labels = np.full((num_groups, N * T // num_groups), -100)
    K = len(batch["labels"]) // num_groups
    for group in range(num_groups):
        part = slice(group * K, (group + 1) * K)
        counted = batch["label_weights"][part] > 0
        positions = batch["label_positions"][part][counted]
        assert len(set(positions)) == len(positions)
        labels[group, positions] = batch["labels"][part][counted]
    return labels.reshape(N, T)


@settings(max_examples=60, deadline=None)
@given(
    num_groups=st.integers(1, 4),
    rows_per_group=st.integers(1, 5),
    T=st.integers(1, 70),
    probability=st.floats(0.01, 0.99),
    num_fake=st.integers(0, 3),
    whole_words=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_collator_invariants(byte_level_tokenizer, num_groups, rows_per_group, T, probability, num_fake, whole_words, seed):
    """Any rows: only ordinary tokens are hidden, labels are the originals, everything else stays as it was."""
    tokenizer = byte_level_tokenizer
    rng = np.random.default_rng(seed)
    N = num_groups * rows_per_group
    input_ids = rng.integers(0, len(tokenizer), (N, T)).astype(np.int32)
    input_ids[np.arange(T) >= rng.integers(0, T + 1, N)[:, None]] = tokenizer.pad_token_id
    original = input_ids.copy()
    is_real = np.arange(N) < N - num_fake
    rows = {"input_ids": input_ids} | ({"word_starts": rng.integers(0, 2, (N, T))} if whole_words else {})
    batch = make_collator(tokenizer, T, probability)(rows, rng.random((N, T)), is_real, num_groups)

    np.testing.assert_array_equal(input_ids, original)  # rows may be a view of a file: not to be written to
    labels = scatter_labels(batch, num_groups)
    hidden = labels != -100
    np.testing.assert_array_equal(labels[hidden], original[hidden])
    np.testing.assert_array_equal(batch["input_ids"][~hidden], original[~hidden])
    np.testing.assert_array_equal(batch["attention_mask"], original != tokenizer.pad_token_id)
    special = np.isin(original, [0, 1, 2, 4])  # <unk>, 3, is ordinary text
    assert not (hidden & (special | ~is_real[:, None])).any()
    replaced = batch["input_ids"][hidden & (batch["input_ids"] != original)]
    assert np.isin(replaced, [*range(5, len(tokenizer)), tokenizer.mask_token_id]).all()
    assert np.isin(batch["label_weights"], [0, 1]).all()
    assert len(batch["labels"]) % num_groups == 0
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["label_positions"].dtype == np.int32


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_masked_share_and_80_10_10(byte_level_tokenizer, probability, whole_words):
    """Over 512,000 tokens: the share asked for is selected; 80 % masked, 10 % random, 10 % unchanged (defect 64)."""
    N, T, V = 1000, 512, len(byte_level_tokenizer)
    rng = np.random.default_rng(0)
    rows = {"input_ids": rng.integers(5, V, (N, T)).astype(np.int32)}
    if whole_words:
        rows["word_starts"] = (rng.random((N, T)) < 0.7).astype(np.int32)
    batch = make_collator(byte_level_tokenizer, T, probability)(rows, rng.random((N, T)), np.ones(N, bool), 4)
    hidden = scatter_labels(batch, 4) != -100
    assert hidden.mean() == pytest.approx(probability, rel=0.01)
    shown, original = batch["input_ids"][hidden], rows["input_ids"][hidden]
    assert (shown == byte_level_tokenizer.mask_token_id).mean() == pytest.approx(0.8, abs=0.01)
    assert (shown == original).mean() == pytest.approx(0.1 + 0.1 / V, abs=0.005)
    drawn = shown[(shown != original) & (shown != byte_level_tokenizer.mask_token_id)]
    assert set(range(5, V)) == set(drawn)
    counts = np.bincount(drawn, minlength=V)[5:]
    assert counts.std() < 1.3 * np.sqrt(counts.mean())  # uniform


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("T", [16, 40])
def test_rows_narrower_than_the_limit(byte_level_tokenizer, T, whole_words):
    """Rows that are texts are as wide as the longest: selected, masked, random and kept in the same shares there."""
    rng, N, limit = np.random.default_rng(0), 12_000, 64
    rows = {"input_ids": rng.integers(5, 509, (N, T)).astype(np.int32)}
    if whole_words:
        rows["word_starts"] = (rng.random((N, T)) < 0.7).astype(np.int32)
    collator = make_collator(byte_level_tokenizer, limit)
    assert collator.draws_per_row == limit
    batch = collator(rows, rng.random((N, limit)), np.ones(N, bool), 4)
    hidden = scatter_labels(batch, 4) != -100
    assert hidden.mean() == pytest.approx(0.15, rel=0.03)
    np.testing.assert_allclose(hidden.mean(axis=0), 0.15, atol=0.02)  # at every place
    shown, original = batch["input_ids"][hidden], rows["input_ids"][hidden]
    is_mask = shown == byte_level_tokenizer.mask_token_id
    assert is_mask.mean() == pytest.approx(0.8, abs=0.015)
    assert (shown == original).mean() == pytest.approx(0.1, abs=0.012)
    assert (~is_mask & (shown != original)).mean() == pytest.approx(0.1, abs=0.012)


def test_rows_of_full_width_use_the_same_numbers(byte_level_tokenizer):
    """A row is hidden in the same places whether it stands in a wide array or in a narrow one."""
    rng, collator = np.random.default_rng(0), make_collator(byte_level_tokenizer, 64)
    ids, uniforms = rng.integers(5, 509, (50, 64)).astype(np.int32), rng.random((50, 64))
    ids[:, 48:] = byte_level_tokenizer.pad_token_id
    wide, narrow = (collator({"input_ids": ids[:, :width]}, uniforms, np.ones(50, bool), 1) for width in (64, 48))
    np.testing.assert_array_equal(wide["input_ids"][:, :48], narrow["input_ids"])
    assert (narrow["input_ids"] != ids[:, :48]).any()


def test_a_word_is_masked_whole_or_not_at_all(byte_level_tokenizer):
    rng = np.random.default_rng(0)
    N, T = 200, 64
    rows = {
        "input_ids": rng.integers(5, 500, (N, T)).astype(np.int32),
        "word_starts": (rng.random((N, T)) < 0.5).astype(np.int32),
    }
    batch = make_collator(byte_level_tokenizer, T)(rows, rng.random((N, T)), np.ones(N, bool), 1)
    hidden = scatter_labels(batch, 1) != -100
    continues = rows["word_starts"][:, 1:] == 0
    assert (hidden[:, 1:] == hidden[:, :-1])[continues].all()
    assert not (hidden[:, 1:] == hidden[:, :-1])[~continues].all()


def test_surplus_is_cut_in_whole_words_and_spread(byte_level_tokenizer):
    """More selected than the capacity (here by unlikely numbers): what is left fits, and comes from everywhere."""
    N, T = 16, 256
    rows = {"input_ids": np.full((N, T), 7, np.int32), "word_starts": np.tile([1, 0], (N, T // 2))}
    collator = make_collator(byte_level_tokenizer, T)
    batch = collator(rows, np.zeros((N, T)), np.ones(N, bool), 2)
    hidden = scatter_labels(batch, 2) != -100
    K = len(batch["labels"]) // 2
    assert K - 2 < hidden.reshape(2, -1).sum(axis=1).min() <= hidden.reshape(2, -1).sum(axis=1).max() <= K
    assert (hidden[:, 0::2] == hidden[:, 1::2]).all()
    assert hidden.any(axis=1).all()


def test_rows_do_not_depend_on_their_neighbours(byte_level_tokenizer):
    """Noise belongs to the row: batches of 8 and of 3, on 4 devices or 1, mask a row alike."""
    T, collator = 32, make_collator(byte_level_tokenizer, 32)
    ids = np.random.default_rng(0).integers(5, 500, (9, T)).astype(np.int32)

    def masked(first, count, num_groups=1):
        noise = randomness.row_uniforms(42, ("noise", 3), first, count, T)
        return collator({"input_ids": ids[first : first + count]}, noise, np.ones(count, bool), num_groups)["input_ids"]

    np.testing.assert_array_equal(masked(0, 8, 4), masked(0, 9)[:8])
    np.testing.assert_array_equal(masked(3, 3), masked(0, 9)[3:6])
    assert (masked(0, 9) != ids).any()


def test_capacity_is_fixed_and_rounded(byte_level_tokenizer):
    collator = make_collator(byte_level_tokenizer, 128)
    assert collator.num_label_positions(16 * 128) == 416
    assert collator.num_label_positions(40) == 32
    assert collator.num_label_positions(12) == 12


def test_throughput_is_not_a_python_loop(byte_level_tokenizer):
    """No per-token Python: the interpreter runs the same number of lines for 4 rows as for 400."""
    import sys

    def lines_run(num_rows):
        rows = {"input_ids": np.full((num_rows, 64), 9, np.int32)}
        noise, count = uniforms((num_rows, 64)), 0

        def trace(frame, event, argument):
            nonlocal count
            count += event == "line" and frame.f_code.co_filename == script.__file__
            return trace

        collator = make_collator(byte_level_tokenizer, 64)
        previous = sys.gettrace()
        sys.settrace(trace)
        try:
            collator(rows, noise, np.ones(num_rows, bool), 1)
        finally:
            sys.settrace(previous)
        return count

    assert 0 < lines_run(4) == lines_run(400)


TEXT = "The naïve über-tokeniser isn't re-tokenising 12,345 snake_case words."
WORDS = [
    "The", "naïve", "über", "-", "tokeniser", "isn", "'", "t", "re", "-", "tokenising", "12", ",", "345", "snake_case",
    "words", ".",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["byte_level", "word_piece", "unigram"])
def test_word_starts_from_offsets(kind, request):
    """Byte-level BPE, WordPiece and unigram agree on the words (defect 63)."""
    tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    batch = script.tokenize_texts({"text": [TEXT]}, tokenizer, "text", None, True)
    ids, starts = np.array(batch["input_ids"][0]), np.array(batch["word_starts"][0])
    assert len(ids) == len(starts)
    pieces = np.split(ids, np.flatnonzero(starts))[1:]
    words = [tokenizer.decode(piece).replace(" ", "") for piece in pieces[1:-1]]  # without <s> and </s>
    assert len(words) == len(WORDS)
    known = [(word, expected) for word, expected in zip(words, WORDS, strict=True) if tokenizer.unk_token not in word]
    assert len(known) >= len(WORDS) - 2
    assert all(word.replace("##", "") == expected for word, expected in known)
    assert max(map(len, pieces)) > 1


def test_word_starts_within_one_character(byte_level_tokenizer):
    """A character of several bytes is never torn apart; CJK characters stand alone."""
    batch = script.tokenize_texts({"text": ["模型 ok 🙂"]}, byte_level_tokenizer, "text", None, True)
    ids, starts = np.array(batch["input_ids"][0]), np.array(batch["word_starts"][0])
    words = [byte_level_tokenizer.decode(piece).strip() for piece in np.split(ids, np.flatnonzero(starts))[2:-1]]
    assert words == ["模", "型", "ok", "🙂"]


# Each with its letters and marks as they stand alone; a bar stands between them.
WITHOUT_SPACES = {
    "Thai": "ภ|า|ษ|า|ไ|ท|ย|ที่|นี่",
    "Lao": "ພ|າ|ສ|າ|ລ|າ|ວ|ນີ້",
    "Khmer": "ភា|សា|ខ្|មែ|រ",
    "Myanmar": "မြ|န်|မာ|ဘာ|သာ",
    "Tibetan": "བོ|ད|་|སྐ|ད",
    "Javanese": "ꦧ|ꦱ|ꦗ|ꦮ|ꦏꦶ",
    "Balinese": "ᬩ|ᬲ|ᬩ|ᬮᬶ",
    "New Tai Lue": "ᦑ|ᦺ|ᦟ|ᦹ",
    "Tai Tham": "ᨾᩮᩬᩥ|ᨦ",
    "Tai Le": "ᥖ|ᥭ|ᥰ",
    "Tai Viet": "ꪼ|ꪕ",
    "Cham": "ꨌ|ꨠ|ꨇꩌ",
    "Buginese": "ᨅ|ᨔ|ᨕᨘ|ᨁᨗ",
    "Yi": "ꆈ|ꌠ|ꁱ|ꂷ",
    "Chinese": "模|型|〇|々",
    "Japanese": "日|本|語|の|ｶ|ﾅ|ー",
    "Bopomofo": "ㄅ|ㄆ",
}
WITH_SPACES = ["नमस्ते", "العربيّة", "한국어", "e\u0301te\u0301", "தமிழ்", "עִבְרִית", "ქართული", "አማርኛ"]


def letters_as_words(text: str, pieces: list[str]) -> list[str]:
    """The words that find_word_starts sees where every piece is a token."""
    ends = np.cumsum([len(piece) for piece in pieces])
    starts = script.find_word_starts(
        text, list(zip(ends - [len(piece) for piece in pieces], ends, strict=True)), [0] * len(ends)
    )
    words: list[str] = []
    for piece, is_start in zip(pieces, starts, strict=True):
        words += [piece] if is_start else [words.pop() + piece]
    return words


@pytest.mark.parametrize("name", WITHOUT_SPACES)
def test_scripts_without_spaces(name, byte_level_tokenizer):
    """Every character stands alone with its combining marks, cut into characters and into bytes; else a row is one word."""
    expected = WITHOUT_SPACES[name].split("|")
    text = "".join(expected)
    assert letters_as_words(text, list(text)) == expected
    batch = script.tokenize_texts({"text": [f"so {text} {text}x y"]}, byte_level_tokenizer, "text", None, True)
    ids, starts = np.array(batch["input_ids"][0]), np.array(batch["word_starts"][0])
    words = [byte_level_tokenizer.decode(piece).strip() for piece in np.split(ids, np.flatnonzero(starts))[2:-1]]
    assert words == ["so", *expected, *expected, "x", "y"]


@pytest.mark.parametrize("word", WITH_SPACES)
def test_scripts_with_spaces(word):
    """Marks are part of words there."""
    assert letters_as_words(f"{word} {word},", [*word, " ", *word, ","]) == [word, f" {word}", ","]


def test_a_mark_belongs_to_whatever_stands_before_it():
    assert letters_as_words("☕\ufe0f(\u0301a", list("☕\ufe0f(\u0301a")) == ["☕\ufe0f", "(\u0301", "a"]


def test_whole_word_masking_of_thai(byte_level_tokenizer):
    """Each row has labels, in the share asked for (T13)."""
    text = "ภาษาไทยเป็นภาษาที่มีผู้พูดมากที่สุดในประเทศไทย" * 40
    data_args = script.DataTrainingArguments(whole_word_mask=True)
    collator = script.Collator(byte_level_tokenizer, None, data_args, 64)
    tokens = script.tokenize_texts({"text": [text]}, byte_level_tokenizer, "text", None, True)
    num_rows = len(tokens["input_ids"][0]) // 64
    rows = {name: np.array(values[0][: 64 * num_rows]).reshape(num_rows, 64) for name, values in tokens.items()}
    rows = {name: np.tile(array, (8, 1)) for name, array in rows.items()}
    batch = collator(rows, uniforms(rows["input_ids"].shape), np.ones(8 * num_rows, bool), 1)
    labels_per_row = (scatter_labels(batch, 1) != -100).sum(axis=1)
    assert (labels_per_row > 0).mean() > 0.9  # 18 characters of three bytes in a row: 0.85 ** 18 of them have none
    assert labels_per_row.max() < 48  # before, rows were hidden as a whole or not at all
    assert labels_per_row.mean() / 64 == pytest.approx(0.15, rel=0.1)


def test_word_references_join_characters(word_piece_tokenizer):
    """train_ref_file lists the tokens that continue a word, [CLS] being 0."""
    texts, references = ["模型预测词语", " ", "模型"], [[2, 4, 6], [], []]
    columns = {"text": texts, script.REFERENCE_COLUMN: references}
    batch = script.tokenize_texts(columns, word_piece_tokenizer, "text", None, True)
    assert [list(starts) for starts in batch["word_starts"]] == [[1, 1, 0, 1, 0, 1, 0, 1], [1, 1, 1, 1]]


def tiny_config(model_type: str, **more) -> PretrainedConfig:
    """Two layers, 32 wide, without dropout; for rows of 32 tokens, which BigBird sees whole."""
    sizes = TINY | {"embedding_size": 16, "max_position_embeddings": 66}
    sizes |= {"dim": 32, "n_layers": 2, "n_heads": 2, "d_model": 32, "dropout": 0.0, "attention_dropout": 0.0}
    sizes |= {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in BART_SIDE.items()}
    config = CONFIG_MAPPING[model_type](**sizes | more)
    script.DataTrainingArguments().adapt_config(config, 32)
    assert getattr(config, "attention_type", "original_full") == "original_full"
    return config


def fresh(config: PretrainedConfig) -> tuple[nn.Module, dict]:
    """A model and weights to begin with."""
    model = script.MODELS[config.model_type](config)
    return model, jax.jit(lambda rng: weights.init(model, rng))(jax.random.key(1))


@pytest.mark.parametrize("model_type", script.MODELS)
def test_loss_equals_the_plain_computation(model_type, byte_level_tokenizer):
    """Loss and gradients at labelled positions = cross-entropy of the model's own full logits, id 0 and padding rows
    included (defects 25, 28); also where hidden, intermediate and vocabulary sizes coincide."""
    sizes = {"intermediate_size": 512, "hidden_dim": 512, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "vocab_size": 512}
    config = tiny_config(model_type, **sizes)
    model, params = fresh(config)
    collator = script.Collator(byte_level_tokenizer, config, script.DataTrainingArguments(), 32)
    ids = np.random.default_rng(0).integers(5, 509, (6, 32)).astype(np.int32)
    ids[0, 20:] = 1
    noise = randomness.row_uniforms(0, ("noise",), 0, 6, 32)
    batch = collator({"input_ids": ids}, noise, np.arange(6) < 5, 1)
    batch["labels"][:2] = 0  # an id like any other

    def plain_loss(params):
        hidden = model.apply({"params": params}, batch["input_ids"], batch["attention_mask"])
        logits = model.apply({"params": params}, hidden, method="scores").reshape(-1, 512)
        logits = logits[batch["label_positions"]].astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]) * batch["label_weights"]
        return losses.sum(), ((logits.argmax(-1) == batch["labels"]) * batch["label_weights"]).sum()

    def fast_loss(params):
        loss, aux = script.loss_fn(params, batch, model)
        return loss, aux["correct"]

    (plain, plain_correct), plain_grads = jax.jit(jax.value_and_grad(plain_loss, has_aux=True))(params)
    (fast, fast_correct), fast_grads = jax.jit(jax.value_and_grad(fast_loss, has_aux=True))(params)
    assert float(fast) == pytest.approx(float(plain), rel=1e-5)
    assert fast_correct == plain_correct
    for a, b in zip(jax.tree.leaves(plain_grads), jax.tree.leaves(fast_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("model_type", script.MODELS)
def test_no_scores_at_unlabelled_positions(model_type, byte_level_tokenizer):
    """Nothing of the shape [rows, tokens, vocabulary] in the program (defect 100)."""
    config = tiny_config(model_type, vocab_size=509, num_hidden_layers=1, n_layers=1)
    model, params = fresh(config)
    batch = {"input_ids": np.ones((4, 32), np.int32), "attention_mask": np.ones((4, 32), np.int32)}
    batch |= {"label_positions": np.arange(7), "labels": np.arange(7), "label_weights": np.ones(7, np.float32)}
    program = str(jax.make_jaxpr(lambda params: script.loss_fn(params, batch, model)[0])(params))
    assert "[7,509]" in program
    assert "[4,32,509]" not in program


def test_no_label_in_the_batch_is_no_nan():
    """Loss 0 and unchanged weights instead of 0 / 0 (defect 28)."""
    devices, optimizer = sharding.all_devices(), optax.sgd(1.0)

    def loss_fn(params, batch, rngs, z_loss):
        return (params["w"] * batch["x"]).sum() * 0.0, {"weight": batch["x"].sum()}

    p_step, _ = script.make_steps(loss_fn, optimizer, optax.constant_schedule(1.0), devices)
    state = sharding.create_train_state({"w": jnp.ones(())}, optimizer, devices)
    state, metrics = p_step(state, {"x": jnp.zeros((1, 4)), "stop": jnp.zeros((1, 1), jnp.int32)}, jax.random.PRNGKey(0))
    assert metrics["loss"] == 0
    assert state.params["w"] == 1


def test_whole_word_mask_runs_with_references(bert_dir, tmp_path):
    (tmp_path / "zh.txt").write_text("模型预测词语\n" * 200)
    (tmp_path / "zh.ref").write_text("[2, 4, 6]\n" * 200)
    results = run(
        tmp_path / "out", bert_dir, "--train_file", tmp_path / "zh.txt", "--train_ref_file", tmp_path / "zh.ref",
        "--whole_word_mask", "--max_steps", 30, "--learning_rate", 1e-2,
    )  # fmt: skip
    assert results["eval_accuracy"] > 0.2


def test_line_by_line_masks_in_the_usual_shares(roberta_dir, tmp_path):
    """Texts far shorter than max_seq_length (J4): it runs."""
    (tmp_path / "short.txt").write_text("one short line\nanother one\n" * 50)
    flags = ["--train_file", tmp_path / "short.txt", "--line_by_line", "--max_seq_length", 64, "--max_steps", 2]
    for whole_words in ([], ["--whole_word_mask"]):
        results = run(tmp_path / f"out{len(whole_words)}", roberta_dir, *flags, *whole_words)
        assert 0 < results["eval_loss"] < 10


@pytest.mark.parametrize("truncation", [None, {"max_length": 24, "stride": 2}])
def test_the_tokenizer_is_saved_as_it_was_loaded(truncation, roberta_dir, corpus, tmp_path):
    """Whether texts were tokenised and truncated by it, or came from the cache."""
    directory = tmp_path / "model"
    shutil.copytree(roberta_dir, directory)
    if truncation:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.enable_truncation(**truncation)
        tokenizer.enable_padding(pad_id=1, pad_token="<pad>", length=32)
        tokenizer.save(str(directory / "tokenizer.json"))
    flags = ["--train_file", corpus, "--max_steps", 1, "--max_train_samples", 16, "--max_eval_samples", 8]

    def read(place: Path) -> dict:
        """Without the difference between an empty prefix or suffix and none, which transformers does not make."""
        fields = json.loads((place / "tokenizer.json").read_text())
        none = {name: fields["model"][name] or None for name in ("continuing_subword_prefix", "end_of_word_suffix")}
        return fields | {"model": fields["model"] | none}

    loaded = read(directory)
    assert (loaded["truncation"] is not None) == (loaded["padding"] is not None) == bool(truncation)
    for name, more in (("first", ["--overwrite_cache"]), ("cached", []), ("rows", ["--overwrite_cache"])):
        run(tmp_path / name, directory, *flags, *more, *(["--line_by_line"] if name != "rows" else []))
        assert read(tmp_path / name) == loaded, name
