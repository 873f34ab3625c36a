# SPDX-License-Identifier: Apache-2.0
"""What shows the results of the quick starts counts what it should; `make quickstart` itself takes minutes."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, LlamaConfig, ModernBertConfig, T5Config

import run_bart_dlm_flax
import run_clm_flax
import run_mlm_flax
import run_pretraining_flax
import run_t5_mlm_flax
from quickstart import fill_mask, measures, write_text
from tests.conftest import ROOT, TINY
from tests.test_bart import make_collator, make_rows

BOS, EOS, MASK = 0, 2, 4  # of byte_level_tokenizer


@pytest.fixture(scope="session")
def modernbert_dir(byte_level_tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("modernbert")
    byte_level_tokenizer.save_pretrained(path)
    sizes = {name: TINY[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    ModernBertConfig(vocab_size=512, max_position_embeddings=64, **sizes).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def llama_dir(gpt2_dir, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    AutoTokenizer.from_pretrained(gpt2_dir).save_pretrained(path)
    sizes = {name: TINY[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    LlamaConfig(vocab_size=512, max_position_embeddings=64, **sizes).save_pretrained(path)
    return path


SENTENCE = "Return the object that this function was given, or the object it made."  # plain, and common


@pytest.fixture(scope="module")
def run_of(texts, request, tmp_path_factory):
    """A step of training by a script: a directory with train.txt, validation.txt and the model."""

    @functools.cache
    def train(module) -> Path:
        path = tmp_path_factory.mktemp(module.__name__)
        for name, part in (("train.txt", texts[:-90] + 10 * [SENTENCE]), ("validation.txt", [*texts[-90:], SENTENCE])):
            size = 6 if module is run_pretraining_flax else len(part)  # paragraphs in a document, if pairs are made of it
            found = ["\n".join(part[start : start + size]) for start in range(0, len(part), size)]
            (path / name).write_text("\n\n".join(found) + "\n", "utf-8")
        directory, length = request.getfixturevalue(DIRECTORIES[module]), "block" if module is run_clm_flax else "max_seq"
        flags = ["--config_name", directory, "--tokenizer_name", directory, "--train_file", path / "train.txt"]
        flags += ["--validation_file", path / "validation.txt", "--output_dir", path / "model", "--max_steps", 1, "--seed", 3]
        flags += [f"--{length}_{'size' if length == 'block' else 'length'}", 64 if module is run_pretraining_flax else 32]
        module.main([str(flag) for flag in flags])
        return path

    return train


DIRECTORIES = {
    run_mlm_flax: "modernbert_dir",
    run_clm_flax: "llama_dir",
    run_t5_mlm_flax: "t5_dir",
    run_bart_dlm_flax: "bart_dir",
    run_pretraining_flax: "bert_dir",
}


@pytest.mark.parametrize(
    ("module", "shown", "names", "section"),
    [
        (
            run_mlm_flax,
            "fill_mask.py",
            ["masked tokens"],
            r"finds likeliest there:\n\n  .*\[\w+\].*\n  (right)? +\w+ \d+%",
        ),
        (
            run_clm_flax,
            "write_text.py",
            ["next tokens"],
            r"How it goes on, .*\n\n  .*\w \|",
        ),
        (
            run_t5_mlm_flax,
            "write_text.py",
            ["own text tokens"],
            r"\n  reads:  .*___.*\n  writes: .*\[.*\].*\n  right:  .*\[.+\]",
        ),
        (
            run_bart_dlm_flax,
            "write_text.py",
            ["hidden or moved tokens"],
            r"\n  reads:  .*___.*\n  writes: .*\n  right:  .*\[.+\]",
        ),
        (
            run_pretraining_flax,
            "fill_mask.py",
            ["next sentences", "masked tokens"],
            r"(?s)follow on the first, .*\n  (right|wrong)  .*\d+%\n.*finds likeliest there:",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_results_are_shown(module, shown, names, section, run_of, run_script, tmp_path):
    """Of a model that has learnt nothing: that is an error, said at the end."""
    path, file = run_of(module), tmp_path / "new" / "results.json"
    flags = ["--model_dir", path / "model", "--corpus_dir", path, "--results_file", file]
    done = run_script(ROOT / "quickstart" / shown, *flags, cwd=tmp_path)
    assert re.search(section, done.stdout), done.stdout + done.stderr
    found = json.loads(file.read_text())["measures"]
    assert [measure["name"] for measure in found] == names
    for measure in found:
        assert measure.keys() == {"name", "model", "baseline", "baseline_name", "loss", "baseline_loss"}
        assert 0 < measure["baseline"] <= 0.5
        assert 0 < measure["baseline_loss"] < 7
        line = rf"{measure['name']} +{measure['model']:.1%} .* {measure['baseline']:.1%} .*{measure['baseline_name']}"
        assert re.search(line, done.stdout), done.stdout
    if module is not run_pretraining_flax:  # of so few pairs many may be right by chance
        assert done.returncode == 1
        assert done.stderr.splitlines() == ["error: the model is not clearly better than the baseline; something is wrong"]


def test_mistakes(corpus, tmp_path, error_of):
    error = error_of(measures.load, tmp_path, tmp_path)
    assert f"--corpus_dir {tmp_path}: has no train.txt; make it with python_docs_corpus.py" in error
    for name in ("train.txt", "validation.txt"):
        (tmp_path / name).write_text(corpus.read_text("utf-8"), "utf-8")
    assert f"--model_dir {tmp_path}: has no run_info.json; name the output_dir" in error_of(measures.load, tmp_path, tmp_path)
    (tmp_path / "run_info.json").write_text('{"script": "run_mine.py", "arguments": {}}')
    assert "has no eval_results.json" in error_of(measures.load, tmp_path, tmp_path)
    (tmp_path / "eval_results.json").write_text("{}")
    assert "was trained by run_mine.py, which is not here" in error_of(measures.load, tmp_path, tmp_path)


@pytest.mark.parametrize("module", [run_t5_mlm_flax, run_bart_dlm_flax])
def test_measuring_all_labels_gives_what_the_script_evaluates(module, run_of):
    trained = measures.load(run_of(module) / "model", run_of(module))
    everything = measures.measure(trained, "all", measures.all_labels, seeds=[3])
    assert everything.model == pytest.approx(trained.results["eval_accuracy"], abs=1e-6)
    assert everything.loss == pytest.approx(trained.results["eval_loss"], rel=1e-4)


def test_text_labels_of_t5(t5_dir):
    """Neither sentinels nor ends count, those between two texts included."""
    tokenizer = AutoTokenizer.from_pretrained(t5_dir)
    data_args = run_t5_mlm_flax.DataTrainingArguments(mlm_probability=0.5)
    collator = run_t5_mlm_flax.Collator(tokenizer, T5Config(decoder_start_token_id=0), data_args, 16)
    ids = np.arange(20, 20 + collator.row_length, dtype=np.int32)
    ids[[5, 9, 13]] = tokenizer.eos_token_id
    rows = {"input_ids": np.tile(ids, (40, 1))}
    uniforms = np.random.default_rng(0).random((40, collator.draws_per_row))
    batch = collator(rows, uniforms, np.ones(40, bool), 1)
    counted = measures.Counting(collator, measures.text_labels)(rows, uniforms, np.ones(40, bool), 1)
    for labels, weights, source in zip(counted["labels"], counted["label_weights"], batch["input_ids"], strict=True):
        hidden = [i for i in ids if i not in source and i != tokenizer.eos_token_id]
        assert labels[weights > 0].tolist() == hidden
        assert len(hidden) > 0


def test_hidden_or_moved_tokens_of_bart(byte_level_tokenizer):
    """A worked example: of four sentences one stands first that stood third, and two tokens are hidden."""
    ids = np.array([[BOS, 10, 11, 12, 20, 21, 30, 31, 40, EOS, -1]], np.int32)
    rows = {"input_ids": ids, "sentence_starts": np.isin(ids, [10, 20, 30, 40]).astype(np.int32)}
    collator = make_collator(byte_level_tokenizer, 11, q=0.25, r=1.0, rate=3.0)
    uniforms = np.full((1, collator.draws_per_row), 0.5)
    rounding, order, lengths, places, empty = 0, 1, 12, 23, 34  # where these numbers begin
    uniforms[0, rounding] = 0.0  # a quarter of 8: two tokens
    uniforms[0, order + np.array([1, 4, 6, 8])] = 0.2, 0.3, 0.1, 0.4  # 30 31, 10 11 12, 20 21, 40
    uniforms[0, lengths] = 0.9  # one span, which is cut to two tokens
    uniforms[0, places + 4] = 0.0  # it hides the fifth token, which is 12, and the next
    uniforms[0, empty] = 0.0  # none that hides nothing
    batch = collator(rows, uniforms, np.ones(1, bool), 1)
    assert batch["input_ids"].tolist() == [[BOS, 30, 31, 10, 11, MASK, 21, 40, EOS, 1, 1]]
    counted = measures.Counting(collator, measures.hidden_or_moved)(rows, uniforms, np.ones(1, bool), 1)
    # 30 is behind BOS, 10 behind 31; 12 and 20 are hidden; 40 is behind 21, not behind 31.
    assert counted["labels"][counted["label_weights"] > 0].tolist() == [10, 12, 20, 30, 40]
    uniforms[0, places + np.array([4, 6])] = 0.5, 0.0  # 21 and 40
    batch = collator(rows, uniforms, np.ones(1, bool), 1)
    assert batch["input_ids"].tolist() == [[BOS, 30, 31, 10, 11, 12, 20, MASK, EOS, 1, 1]]
    counted = measures.Counting(collator, measures.hidden_or_moved)(rows, uniforms, np.ones(1, bool), 1)
    assert counted["labels"][counted["label_weights"] > 0].tolist() == [10, 21, 30, 40]  # EOS begins no sentence


def test_hidden_or_moved_tokens_of_any_row(byte_level_tokenizer):
    """As the input itself tells, where all tokens of text differ."""
    collator = make_collator(byte_level_tokenizer, 60)
    rows = make_rows(np.random.default_rng(0), 200, 60, share_special=0.05)
    rows["input_ids"][rows["input_ids"] == 1] = -1
    uniforms = np.random.default_rng(1).random((200, collator.draws_per_row))
    counted = measures.Counting(collator, measures.hidden_or_moved)(rows, uniforms, np.ones(200, bool), 1)
    num_moved = 0
    for labels, weights, source in zip(counted["labels"], counted["label_weights"], counted["input_ids"], strict=True):
        before = {token: source[i] for i, token in enumerate(source[1:].tolist()) if token > MASK}
        text = [i for i in range(60) if labels[i] > MASK]
        hidden = {i for i in text if labels[i] not in source}
        seen = [i for i in text if i > 0 and labels[i] in before]
        moved = {i for i in seen if before[labels[i]] not in (MASK, labels[i - 1])}
        assert set(np.flatnonzero(weights)) == hidden | moved
        num_moved += len(moved)
    assert num_moved > 200


def test_what_the_baseline_knows():
    """It guesses what is commonest in the training text, whatever is in the text that is held out."""
    accuracy, loss = measures.score_unigrams(np.array([1, 5, 2, 0]), np.array([6, 2, 2, 0]), num_ids=3)
    assert accuracy == pytest.approx(0.2)
    assert loss == pytest.approx(-(0.6 * np.log(2 / 11) + 0.2 * np.log(6 / 11) + 0.2 * np.log(3 / 11)))


@pytest.mark.parametrize("name", ["byte_level_tokenizer", "word_piece_tokenizer", "unigram_tokenizer"])
def test_blanks_are_common_words(name, request, tmp_path):
    tokenizer = request.getfixturevalue(name)
    text = "Return the name of this argument and not zzyx argument."
    (tmp_path / "text.txt").write_text(f"{text}\nshort\nReturn this, and then one of those that (code) follows here.\n")
    (sentence,) = fill_mask.plain_sentences(tmp_path / "text.txt", tokenizer)
    words = [text[word.start : word.end] for word in sentence.words]
    lengths = [len(tokenizer(f"a {word}", add_special_tokens=False)["input_ids"]) for word in fill_mask.WORD.findall(text)]
    bare = len(tokenizer("a", add_special_tokens=False)["input_ids"])
    assert words == [word for word, n in zip(fill_mask.WORD.findall(text), lengths, strict=True) if n == bare + 1]
    assert {"argument"} < set(words) < set(fill_mask.WORD.findall(text))
    for word in sentence.words:
        assert tokenizer.decode([sentence.ids[word.place]]).strip() == text[word.start : word.end]
    first, *_ = sentence.words
    common = sentence.ids[first.place]
    assert fill_mask.choose_blanks([sentence], {common: fill_mask.FEWEST}) == [(sentence, first)]
    assert fill_mask.choose_blanks([sentence], {common: fill_mask.FEWEST - 1}) == []


def test_gaps_are_filled(byte_level_tokenizer):
    def ids(text):
        return byte_level_tokenizer(text, add_special_tokens=False)["input_ids"]

    source = [*ids("Return the"), 600, *ids(" of the"), 601, *ids(" and"), 602]
    spans = [*ids("lost"), 601, *ids(" argu"), *ids("ment"), 600, *ids(" name"), 603, *ids("x")]
    parts = write_text.fill_gaps(source, spans, {600, 601, 602, 603})
    assert write_text.show_parts(byte_level_tokenizer, parts) == "Return the [name] of the [argument] and[]"
    assert write_text.show_parts(byte_level_tokenizer, parts, gap="___") == "Return the___ of the___ and___"
    parts = write_text.compare([*ids("Return the"), MASK, *ids(" of it")], ids("Return the name of it all"))
    assert write_text.show_parts(byte_level_tokenizer, parts) == "Return the [name] of it [all]"
