# SPDX-License-Identifier: Apache-2.0
"""--mixture_file: each corpus gets its share of the rows, all of it before any of it again, exactly so after a resume."""

import functools
import itertools
import json
import os
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from transformers import AutoConfig, AutoTokenizer

import run_bart_dlm_flax
import run_clm_flax
import run_mlm_flax
import run_pretraining_flax
import run_t5_mlm_flax
from flaxlm import arguments, batches, checkpoints, command_line, corpus, logs, mixtures, outputs
from tests.conftest import read_events
from tests.test_batches import Recorder
from tests.test_checkpoints import outcome, train_until
from tests.test_optimizers import plan_of
from tests.test_processes import STREAM, end_of
from tests.test_processes import assert_same_run as assert_same_curves
from tests.test_processes import start as start  # a fixture
from tests.test_streams import assert_same_run, back_to, damaged

BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streaming"])

# ---- Rows that are numbers -----------------------------------------------------------------------------------------------

SIZES = {"large": 23, "small": 5, "tiny": 1}
WEIGHTS = {"large": 4, "small": 3, "tiny": 1}
ROWS = {name: np.arange(size)[:, None] + 100 * i for i, (name, size) in enumerate(SIZES.items())}


class Numbers(Recorder):
    """Passes on the first token, which is the number of the row in its corpus, and 100 for each corpus before it."""

    columns = {"input_ids": -1}  # noqa: RUF012
    row_length = 1


def mixture_of(weights=WEIGHTS, rows=ROWS) -> corpus.Mixture:
    total = sum(weights.values())
    parts = [mixtures.Part(name, Fraction(weight, total), {}) for name, weight in weights.items()]
    return corpus.Mixture("m.yaml", parts, [{"input_ids": rows[name]} for name in weights])


def mixed_batches(mixture=None, first_step=0, num_steps=70, **sizes) -> list[dict]:
    """Batches of 4 rows, 7 steps in an epoch, unless said otherwise."""
    plan = plan_of(**{"steps_per_epoch": 7, "num_steps": num_steps} | sizes)
    return list(batches.train_batches(mixture or mixture_of(), Numbers(), plan, seed=1, first_step=first_step))


def ids(found: list[dict]) -> np.ndarray:
    return np.concatenate([batch["id"].reshape(-1) for batch in found])


def test_every_epoch_has_each_corpus_by_its_weight():
    """28 rows by 4, 3 and 1 of 8: 14, 10.5 and 3.5, of which the larger remainder comes first, in the order of the file."""
    found = mixed_batches()
    for epoch in range(10):
        assert Counter(ids(found[7 * epoch : 7 * epoch + 7]) // 100) == {0: 14, 1: 11, 2: 3}
    counted = Counter()
    for batch in found:
        assert Counter(batch["id"].reshape(-1) // 100) == {i: n for i, n in enumerate(batch["rows_by_corpus"].values()) if n}
        counted.update(batch["rows_by_corpus"])
    assert counted == {"large": 140, "small": 110, "tiny": 30}


def test_no_row_again_before_all_have_come():
    """Across the ends of epochs, and each time in another order."""
    found = ids(mixed_batches())
    for i, size in enumerate(SIZES.values()):
        own = found[found // 100 == i] % 100
        passes = [tuple(own[first : first + size]) for first in range(0, len(own) - size + 1, size)]
        assert len(passes) > 5
        assert all(sorted(rows) == list(range(size)) for rows in passes)
        assert len(set(passes)) > 1 or size == 1
    assert len({tuple(found[28 * epoch : 28 * epoch + 28] // 100) for epoch in range(10)}) == 10


def test_goes_on_from_every_step():
    whole = mixed_batches()
    for step in range(70):
        rest = mixed_batches(first_step=step)
        assert len(rest) == 70 - step
        for one, other in zip(whole[step:], rest, strict=True):
            assert (one["id"] == other["id"]).all() and (one["noise"] == other["noise"]).all()
            assert one["rows_by_corpus"] == other["rows_by_corpus"]


def test_two_processes_have_the_halves_of_what_one_has():
    whole = mixed_batches()
    halves = [mixed_batches(num_processes=2, process_index=i) for i in range(2)]
    for one, first, second in zip(whole, *halves, strict=True):
        for name in ("id", "noise"):
            np.testing.assert_array_equal(np.concatenate([first[name][0], second[name][0]]), one[name][0])
        assert first["rows_by_corpus"] == second["rows_by_corpus"] == one["rows_by_corpus"]


def test_a_mixture_of_one_is_gone_through_as_it_is():
    found = ids(mixed_batches(mixture_of({"large": 2}), steps_per_epoch=5, num_steps=20))
    assert sorted(found[:23]) == sorted(found[23:46]) == list(range(23))


def test_rows_of_other_lengths_are_filled_up():
    """To one length in all batches, also in those that have none of the longest."""
    mixture = mixture_of({"a": 1, "b": 30}, {"a": np.ones((40, 3), int), "b": np.full((40, 2), 2)})
    plan = plan_of(steps_per_epoch=15, num_steps=15)

    class Whole(Numbers):
        def __call__(self, rows, *others):
            return {"rows": rows["input_ids"]}

    found = [batch["rows"][0] for batch in batches.train_batches(mixture, Whole(), plan, seed=1)]
    assert {batch.shape for batch in found} == {(4, 3)}
    assert {tuple(row) for batch in found for row in batch} == {(1, 1, 1), (2, 2, -1)}


@pytest.mark.parametrize("total", [1, 7, 28, 1000])
def test_apportioned_exactly(total):
    for weights in ([1], [1, 1, 1], [5, 3, 1, 1000], [1, 10**9]):
        shares = [Fraction(weight, sum(weights)) for weight in weights]
        counts = mixtures.apportion(total, shares)
        assert sum(counts) == total
        assert all(abs(count - total * share) < 1 for count, share in zip(counts, shares, strict=True))


def test_a_corpus_without_a_row_is_refused(refuses):
    with refuses("^--mixture_file m.yaml: b: its weight gives it none of the 28 rows of an epoch; raise it"):
        batches.rows_per_epoch(
            mixture_of({"a": 1000, "b": 1}, {"a": ROWS["large"], "b": ROWS["small"]}), plan_of(steps_per_epoch=7)
        )


@pytest.mark.parametrize(("num_processes", "num_rows"), [(1, 8), (4, 2), (1, 1)])
def test_systematic_sampling(num_processes, num_rows):
    """Within one of the share in every step, and within four since the first, for a share of a hundredth of a row too."""
    shares = [Fraction(899, 1600), Fraction(1, 800), Fraction(699, 1600)]
    steps = [mixtures.divide_step(num_rows, shares, 1, step, num_processes) for step in range(2000)]
    assert {step.shape for step in steps} == {(num_processes, num_rows)}
    counts = np.array([np.bincount(step.reshape(-1), minlength=3) for step in steps])
    expected = num_processes * num_rows * np.array([float(share) for share in shares])
    assert (np.abs(counts - expected) < 1).all()
    assert (np.abs(counts.cumsum(axis=0) - expected * np.arange(1, 2001)[:, None]) < 4).all()
    of_processes = np.mean([step.mean(axis=1) for step in steps], axis=0)  # none has more of one corpus than another has
    np.testing.assert_allclose(of_processes, of_processes.mean(), atol=0.02)


def test_rows_of_a_step_are_in_random_order():
    shares = [Fraction(1, 2), Fraction(1, 2)]
    orders = {tuple(row) for step in range(2) for row in mixtures.divide_step(8, shares, 1, step, 4)}
    assert len(orders) > 4


# ---- The file ------------------------------------------------------------------------------------------------------------


def write(path: Path, entries) -> Path:
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries), "utf-8")
    return path


TEXT = {"train_file": "README.md.txt", "weight": 1}
MISTAKES = {
    "suffix": ("m.toml", "", ": unknown suffix; use .json, .yaml or .yml"),
    "json": ("m.json", '{"a": ', ": cannot be read: Expecting value"),
    "yaml": ("m.yaml", "a: {weight: 1\nb: [", ": cannot be read: .* in line 2, column 2"),
    "not text": ("m.yaml", "\x00", ": cannot be read: "),
    "empty": ("m.yaml", "", ": must map names to corpora, such as wikipedia"),
    "a list": ("m.json", [TEXT], ": must map names to corpora"),
    "none": ("m.json", {}, ": must map names to corpora"),
    "twice": ("m.json", '{"a": {"weight": 1}, "a": {"weight": 1}}', ": cannot be read: 'a' stands in it twice"),
    "twice in yaml": ("m.yml", "a: {weight: 1, weight: 2}", ": cannot be read: 'weight' stands in it twice"),
    "name": ("m.yaml", "no: {weight: 1}", ": False is no name; .* in YAML in quotes if need be"),
    "odd name": ("m.json", {"a/b": TEXT}, ": 'a/b' is no name"),
    "no mapping": ("m.json", {"a": "wiki.jsonl"}, ": a: must map keys to values, such as {train_file: a.jsonl"),
    "no weight": ("m.json", {"a": TEXT, "b": {"train_file": "x.txt"}}, ": b: has no weight"),
    "weight 0": ("m.json", {"a": {**TEXT, "weight": 0}}, ": a: weight 0: must be a finite number above 0"),
    "weight -1": ("m.json", {"a": {**TEXT, "weight": -1}}, ": a: weight -1: must be"),
    "weight inf": ("m.yaml", "a: {train_file: x.txt, weight: .inf}", ": a: weight inf: must be"),
    "weight nan": ("m.yaml", "a: {train_file: x.txt, weight: .nan}", ": a: weight nan: must be"),
    "weight huge": ("m.yaml", "a: {train_file: x.txt, weight: 1e999999999}", ": a: weight 1e999999999: must be"),
    "weight true": ("m.json", {"a": {**TEXT, "weight": True}}, ": a: weight True: must be"),
    "weight word": ("m.json", {"a": {**TEXT, "weight": "much"}}, ": a: weight much: must be"),
    "weight null": ("m.json", {"a": {**TEXT, "weight": None}}, ": a: weight None: must be"),
    "unknown key": ("m.json", {"a": {**TEXT, "file": "x"}}, ": a: file: is no key of a corpus; these are weight, train_file, "),
    "key of all": ("m.json", {"a": {**TEXT, "streaming": True}}, ": a: streaming: is no key of a corpus"),
    "no text": ("m.json", {"a": {"weight": 1}}, ": a: train_file, dataset_name: must name its text with one of them"),
    "two texts": ("m.json", {"a": {**TEXT, "dataset_name": "x"}}, ": a: train_file, dataset_name: must name its text with one"),
    "number": ("m.json", {"a": {**TEXT, "text_column_name": 5}}, ": a: text_column_name 5: must be text"),
    "no number": ("m.json", {"a": {**TEXT, "max_train_samples": "5"}}, ": a: max_train_samples 5: must be a whole number"),
    "limit": ("m.json", {"a": {**TEXT, "max_train_samples": 0}}, ": a: max_train_samples 0: must be at least 1"),
    "percentage": ("m.json", {"a": {**TEXT, "validation_split_percentage": 100}}, ": a: validation_split_percentage 100: must"),
    "no file": ("m.json", {"a": TEXT}, ": a: train_file README.md.txt: no such file"),
    "no split": ("m.json", {"a": {**TEXT, "train_split_name": "x"}}, ": a: train_split_name: names a split of dataset_name"),
    "NUL": ("m.json", {"a": {**TEXT, "train_file": "a\0b"}}, ": a: train_file: holds a character that is no text"),
}  # fmt: skip


@pytest.fixture
def parse(tmp_path):
    """The arguments of a command line with these flags."""

    def call(*flags, module=run_mlm_flax):
        argv = ["--model_type", "roberta", "--tokenizer_name", "x", "--output_dir", tmp_path / "out", *flags]
        return command_line.parse([str(flag) for flag in argv], module.DataTrainingArguments, module.MODELS, None)

    return call


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_file(mistake, parse, refuses, tmp_path):
    name, entries, message = MISTAKES[mistake]
    path = write(tmp_path / name, entries)
    with refuses(f"^--mixture_file {re.escape(str(path))}{message}"):
        parse("--mixture_file", path)


def test_mistakes_beside_the_file(parse, refuses, corpus, tmp_path):
    path = write(tmp_path / "m.json", {"a": {"train_file": str(corpus), "weight": 1}})
    assert parse("--mixture_file", path).data.mixture_file == str(path)
    for flag in ("train_file", "dataset_name", "dataset_config_name", "data_dir", "train_split_name", "eval_split_name"):
        with refuses(f"^--{flag}: not with --mixture_file, whose corpora have it as a key"):
            parse("--mixture_file", path, f"--{flag}", corpus)
    with refuses("^--mixture_file nowhere.yaml: no such file"):
        parse("--mixture_file", "nowhere.yaml")
    with refuses("^--mixture_file https://x.org/m.yaml: an address"):
        parse("--mixture_file", "https://x.org/m.yaml")
    path = write(tmp_path / "m.json", {"a": {"train_file": str(corpus), "validation_file": str(corpus), "weight": 1}})
    parse("--mixture_file", path)
    with refuses("m.json: a: validation_file: not with --validation_file, which is for all corpora"):
        parse("--mixture_file", path, "--validation_file", corpus)
    path = write(tmp_path / "m.json", {"a": {"train_file": str(corpus), "max_train_samples": 5, "weight": 1}})
    with refuses("m.json: a: max_train_samples: not with --streaming"):
        parse("--mixture_file", path, "--streaming", "--max_steps", 3)


def test_weights_are_as_written(tmp_path):
    """0.3 and 0.1 are three to one, exactly; so is 3e-1, which is a string to YAML."""
    entries = "\n".join(f"c{i}: {{train_file: x.txt, weight: {weight}}}" for i, weight in enumerate(("0.3", "1e-1", "0.4", 2)))
    parts = mixtures.read(str(write(tmp_path / "m.yaml", entries)))
    assert [part.share for part in parts] == [Fraction(n, 28) for n in (3, 1, 4, 20)]
    assert [part.name for part in parts] == ["c0", "c1", "c2", "c3"]


# ---- Prepared ------------------------------------------------------------------------------------------------------------

MODEL_DIRS = {
    run_mlm_flax: "roberta_dir", run_clm_flax: "gpt2_dir", run_t5_mlm_flax: "t5_dir", run_bart_dlm_flax: "bart_dir",
    run_pretraining_flax: "bert_dir",
}  # fmt: skip
SCRIPTS = pytest.mark.parametrize("module", MODEL_DIRS, ids=lambda module: module.__name__)


@pytest.fixture(scope="module")
def data(texts, tmp_path_factory) -> Path:
    """A mixture of a txt file and a directory of two splits, whose column is called otherwise: of 3 to 1."""
    path = tmp_path_factory.mktemp("mixture")
    texts = [" ".join(text.split()) for text in texts]
    (path / "prose.txt").write_text("\n\n".join(texts[:150]) + "\n")
    (path / "code").mkdir()
    for split, part in (("train", texts[150:400]), ("validation", texts[400:430])):
        (path / "code" / f"{split}.jsonl").write_text("".join(json.dumps({"id": "5", "content": t}) + "\n" for t in part))
    prose = f"prose: {{train_file: {path}/prose.txt, weight: 3}}"
    (path / "mixture.yaml").write_text(f"{prose}\ncode: {{dataset_name: {path}/code, text_column_name: content, weight: 1}}")
    return path


@pytest.fixture
def prepare(request, tmp_path):
    """Corpus and collator as a run with these flags has them."""

    def call(*flags, module=run_mlm_flax, streaming=False) -> tuple[corpus.Corpus, object]:
        model_dir = request.getfixturevalue(MODEL_DIRS[module])
        common = ["--config_name", model_dir, "--tokenizer_name", model_dir, "--output_dir", tmp_path / "out"]
        common += ["--streaming", "--max_steps", 2, "--num_eval_samples", 20, "--shuffle_buffer_size", 60] * streaming
        argv = [str(flag) for flag in (*common, *flags)]
        args = command_line.parse(argv, module.DataTrainingArguments, module.MODELS, None)
        tokenizer, config = AutoTokenizer.from_pretrained(model_dir), AutoConfig.from_pretrained(model_dir)
        collator = module.Collator(tokenizer, config, args.data, 32)
        tokenize_fn = functools.partial(module.tokenize_texts, tokenizer=tokenizer, **collator.tokenize_options)
        return corpus.prepare(args, tokenize_fn, collator), collator

    return call


@BOTH
def test_the_size_of_what_is_evaluated(streaming, prepare, data, tmp_path):
    """For bits per byte: each corpus counts by the rows that are evaluated of it, at its own bytes per token."""
    whole, _ = prepare("--mixture_file", data / "mixture.yaml", module=run_clm_flax, streaming=streaming)
    expected_bytes = 0.0
    for name, entry in yaml.safe_load((data / "mixture.yaml").read_text()).items():
        write(tmp_path / f"{name}.json", {name: {**entry, "weight": 1}})
        alone, _ = prepare("--mixture_file", tmp_path / f"{name}.json", module=run_clm_flax, streaming=streaming)
        is_of_it = (whole.validation["input_ids"][:, None] == alone.validation["input_ids"][None]).all(-1).any(-1)
        size = alone.validation_text
        expected_bytes += (whole.validation["input_ids"][is_of_it] >= 0).sum() * size.num_bytes / size.num_tokens
    assert whole.validation_text.num_tokens == (whole.validation["input_ids"] >= 0).sum()
    assert whole.validation_text.num_bytes == pytest.approx(expected_bytes, rel=0.05 if streaming else 1e-3)


@BOTH
def test_the_size_of_a_few_short_texts(streaming, prepare, data, tmp_path):
    """What fills up a row is no token: where all rows are evaluated tokens and bytes are those of the texts, to the last."""
    texts = {"short": "Grüße, naïve façade", "long": "模型预测词语, one two three four\n" * 8}
    mixture = {}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text, "utf-8")
        mixture[name] = {"train_file": str(data / "prose.txt"), "validation_file": str(tmp_path / f"{name}.txt"), "weight": 1}
    write(tmp_path / "mixture.json", mixture)
    whole, _ = prepare("--mixture_file", tmp_path / "mixture.json", module=run_clm_flax, streaming=streaming)
    num_tokens = (whole.validation["input_ids"] >= 0).sum()
    assert whole.validation_text == (num_tokens, sum(len(text.encode()) for text in texts.values()))


@BOTH
@SCRIPTS
def test_batches_of_every_script(module, streaming, prepare, data):
    """All of one shape, with labels, and each corpus in them by its share."""
    prepared, collator = prepare("--mixture_file", data / "mixture.yaml", module=module, streaming=streaming)
    plan = plan_of(train_batch_size=8, num_steps=6, steps_per_epoch=6)
    found = list(batches.train_batches(prepared.train, collator, plan, 1))
    assert (
        len({tuple((name, array.shape) for name, array in sorted(batch.items()) if hasattr(array, "shape")) for batch in found})
        == 1
    )
    assert all(batch["label_weights"].sum() > 0 for batch in found)
    counts = [batch["rows_by_corpus"] for batch in found]
    assert sum((Counter(count) for count in counts), Counter()) == {"prose": 36, "code": 12}
    if streaming:
        assert counts == [{"prose": 6, "code": 2}] * 6
        assert found[-1]["position"].keys() == {"prose", "code"}


@BOTH
def test_what_is_evaluated(streaming, prepare, data, byte_level_tokenizer):
    """Of one corpus what is held out, of the other its validation split; or a file for all, and nothing is held out."""

    def lines_of(rows) -> set[str]:
        return {byte_level_tokenizer.decode(row, skip_special_tokens=True) for row in rows["input_ids"]}

    def trained(prepared) -> set[str]:
        if not streaming:
            return lines_of(prepared.train.corpora[0])
        stream = prepared.train.corpora[0]
        windows = itertools.takewhile(lambda window: window[1]["epoch"] == 0, stream.windows(None))
        return set().union(*(lines_of(rows) for rows, _ in windows))

    flags = ["--mixture_file", data / "mixture.yaml", "--line_by_line"]
    (alone, _), (code, _) = (
        prepare("--line_by_line", *own, streaming=streaming)
        for own in (["--train_file", data / "prose.txt"], ["--dataset_name", data / "code", "--text_column_name", "content"])
    )
    prepared, _ = prepare(*flags, streaming=streaming)
    if streaming:  # of 20 rows, 15 and 5
        expected = lines_of({"input_ids": alone.validation["input_ids"][:15]})
        expected |= lines_of({"input_ids": code.validation["input_ids"][:5]})
    else:
        expected = lines_of(alone.validation) | lines_of(code.validation)
        assert trained(prepared) == lines_of(alone.train)
    assert lines_of(prepared.validation) == expected
    num_rows = 15 + 5 if streaming else alone.num_validation_rows + code.num_validation_rows
    assert prepared.num_validation_rows == num_rows
    assert not trained(prepared) & lines_of(prepared.validation)
    for_all, _ = prepare(*flags, "--validation_file", data / "code" / "validation.jsonl", streaming=streaming)
    assert lines_of(for_all.validation) == lines_of(code.validation)
    assert for_all.num_validation_rows == code.num_validation_rows
    assert trained(for_all) > trained(prepared)
    assert prepared.identity != for_all.identity
    (evaluated, _), (not_evaluated, _) = (prepare(*flags, f"--do_{what}", streaming=streaming) for what in ("eval", "train"))
    assert evaluated.train is None
    assert lines_of(evaluated.validation) == expected
    assert not_evaluated.identity == prepared.identity
    few, _ = prepare(*flags, "--max_eval_samples", 8, streaming=streaming)
    assert len(few.validation["input_ids"]) == 8


def test_keeps_the_first_rows_of_each_corpus(prepare, data, tmp_path):
    """--max_train_samples, or what the corpus says itself."""
    path = Path(data / "mixture.yaml").read_text().replace("content,", "content, max_train_samples: 3,")
    write(tmp_path / "m.yaml", path)
    prepared, _ = prepare("--mixture_file", tmp_path / "m.yaml", "--max_train_samples", 7)
    assert prepared.train.sizes == [7, 3]
    assert prepared.num_train_rows == 10


@BOTH
def test_what_is_wrong_with_a_corpus_is_told_with_its_name(streaming, prepare, data, refuses, tmp_path):
    def mixture(**corpus) -> list:
        good = {"train_file": str(data / "prose.txt"), "weight": 1}
        return ["--mixture_file", write(tmp_path / "m.json", {"good": good, "bad": {**corpus, "weight": 1}})]

    where = r"^--mixture_file .*m.json: bad: "
    code = {"dataset_name": str(data / "code")}
    with refuses(where + "text_column_name words: the data has no such text column"):
        prepare(*mixture(**code, text_column_name="words"), streaming=streaming)
    with refuses(where + "train_split_name test: .* has no such split, only train, validation"):
        prepare(*mixture(**code, train_split_name="test"), streaming=streaming)
    (tmp_path / "damaged.txt.gz").write_bytes(b"\x1f\x8b\x08 no gzip")
    with refuses(where + "train_file .*damaged.txt.gz: is empty or cannot be read as text"):
        prepare(*mixture(train_file=str(tmp_path / "damaged.txt.gz")), streaming=streaming)
    (tmp_path / "blank.txt").write_text("\n \n" * 150)
    with refuses(where + "the train data "):
        prepare(*mixture(train_file=str(tmp_path / "blank.txt")), streaming=streaming)


@BOTH
def test_what_is_held_out_of_one_corpus_is_not_trained_on_in_another(streaming, prepare, data, refuses, tmp_path, caplog):
    """A file that two name, by whatever path or pattern, or the same dataset; unless neither holds anything out of it."""
    prose, code = {"train_file": str(data / "prose.txt")}, {"dataset_name": str(data / "code"), "text_column_name": "content"}
    os.symlink(data / "prose.txt", tmp_path / "link.txt")
    datasets.Dataset.from_dict({"text": ["a b c"] * 300, "title": ["d e f"] * 300}).save_to_disk(tmp_path / "saved")

    def mixture(first, second) -> list:
        entries = {"first": {**first, "weight": 1}, "second": {**second, "weight": 1}}
        return ["--mixture_file", write(tmp_path / "m.json", entries)]

    where = r"^--mixture_file .*m.json: second: "
    for name in (str(data / "*.txt"), str(tmp_path / "link.txt")):
        with refuses(
            where + "has .*prose.txt, as first has: what is held out of one would be trained on in the other; name it"
        ):
            prepare(*mixture(prose, {"train_file": name}), streaming=streaming)
    saved = {"dataset_name": str(tmp_path / "saved")}
    with refuses(where + "is the same data as first: what is held out"):
        prepare(*mixture(saved, saved), streaming=streaming)
    prepare(*mixture({**saved, "text_column_name": "text"}, {**saved, "text_column_name": "title"}), streaming=streaming)
    prepare(*mixture(code, code), streaming=streaming)  # there is a validation split
    own = {"validation_file": str(data / "code" / "validation.jsonl")}
    prepare(*mixture({**prose, **own}, {**prose, **own}), streaming=streaming)
    with refuses(where + "has .*prose.txt"):
        prepare(*mixture({**prose, **own}, prose), streaming=streaming)
    prepare(*mixture(prose, prose), "--validation_file", own["validation_file"], streaming=streaming)
    caplog.clear()
    prepare(*mixture(code, {"train_file": own["validation_file"], **own, "text_column_name": "content"}), streaming=streaming)
    assert "What is evaluated of it, or of first, is trained on in the other." in caplog.text


def test_a_stream_that_is_damaged_later_is_told_with_its_name(prepare, data, refuses, tmp_path):
    """While it is trained on, from a thread."""
    path, expected = damaged("a.txt", tmp_path)
    good = {"train_file": str(data / "prose.txt"), "weight": 1}
    write(tmp_path / "m.json", {"good": good, "bad": {"train_file": str(path), "weight": 9}})
    prepared, collator = prepare("--mixture_file", tmp_path / "m.json", streaming=True)
    found = batches.train_batches(prepared.train, collator, plan_of(train_batch_size=64, num_steps=1000), 1)
    expected = expected.replace("--", "")  # flags are keys here
    with refuses(f"^--mixture_file .*m.json: bad: train_file .*a.txt: is empty or .*{expected}"):
        for _ in found:
            pass


def test_pairs_that_are_made_already(prepare, data, bert_dir, tmp_path):
    """run_pretraining_flax.py --is_already_preprocessed: corpora of pairs, longer ones and shorter ones."""
    for name, length in (("long", 30), ("short", 12)):
        rows = {"input_ids": [[2, *range(10, 7 + length), 3]] * 40, "next_sentence_label": [0, 1] * 20}
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / name)
    names = {name: {"dataset_name": str(tmp_path / name), "weight": 1} for name in ("long", "short")}
    flags = ["--mixture_file", write(tmp_path / "m.json", names), "--is_already_preprocessed"]
    prepared, collator = prepare(*flags, module=run_pretraining_flax)
    plan = plan_of(steps_per_epoch=10, num_steps=10)
    found = list(batches.train_batches(prepared.train, collator, plan, 1))
    assert {batch["input_ids"].shape for batch in found} == {(1, 4, 32)}
    lengths = Counter(np.concatenate([batch["attention_mask"][0].sum(axis=1) for batch in found]).tolist())
    assert lengths == {29: 20, 11: 20}
    assert prepared.validation["input_ids"].shape == (4, 32)


# ---- Whole runs ----------------------------------------------------------------------------------------------------------

# Epochs, saves, evaluations and log lines end at different steps.
SIX_STEPS = [
    "--max_steps", 6, "--save_steps", 2, "--eval_steps", 3, "--logging_steps", 4, "--learning_rate", 1e-3,
    "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2,
]  # fmt: skip
PREPARED = ["--max_train_samples", 10, "--max_eval_samples", 12]  # 20 rows in all: two steps in an epoch
STREAMED = ["--streaming", "--shuffle_buffer_size", 20, "--num_eval_samples", 12]


def train(module, model_dir, output_dir, *flags) -> dict[str, float]:
    length = "--block_size" if module is run_clm_flax else "--max_seq_length"
    common = ["--config_name", model_dir, "--tokenizer_name", model_dir, length, 32, "--output_dir", output_dir, *SIX_STEPS]
    return module.main([str(flag) for flag in (*common, *flags)])


@BOTH
@pytest.mark.parametrize("module", [run_mlm_flax, run_clm_flax], ids=lambda module: module.__name__)
def test_resumed_equals_uninterrupted(module, streaming, data, request, tmp_path, messages_logged):
    """Stopped after step 3 of 6: bit for bit the same weights, curves and shares; those of a run are in its record."""
    model_dir = request.getfixturevalue(MODEL_DIRS[module])
    flags = ["--mixture_file", data / "mixture.yaml", *(STREAMED if streaming else PREPARED), "--document_attention"]
    results = train(module, model_dir, tmp_path / "whole", *flags)
    assert results["share_of_prose"] == 36 / 48 if streaming else 12 / 16
    assert results["share_of_prose"] + results["share_of_code"] == 1
    points = read_events(tmp_path / "whole")
    assert [step for step, _ in points["train_share/prose"]] == [4, 6]
    assert points["train_share/code"][-1][1] == pytest.approx(results["share_of_code"])
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "on a mixture of prose (75.0%), code (25.0%), from fresh weights" in card
    assert "| share of prose | 0.7500 |" in card
    train_until(functools.partial(train, module, model_dir), tmp_path / "stopped", 3, *flags)
    train(module, model_dir, tmp_path / "stopped", *flags, "--resume_from_checkpoint")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_a_run_goes_on_with_its_own_mixture_only(data, roberta_dir, error_of, tmp_path):
    """Another weight is other data; another name of the file, and weights in the same proportion, are not."""
    text = (data / "mixture.yaml").read_text()
    flags = [*PREPARED, "--mixture_file", data / "mixture.yaml"]
    train(run_mlm_flax, roberta_dir, tmp_path / "run", *flags)
    back = back_to(tmp_path / "run", tmp_path / "back", 4)

    def resume(path: Path) -> None:
        train(run_mlm_flax, roberta_dir, back, *PREPARED, "--mixture_file", path, "--resume_from_checkpoint")

    line = error_of(resume, write(tmp_path / "other.yaml", text.replace("weight: 3", "weight: 2")))
    assert "the training data (checksum) is 2/3 prose (" in line
    assert "of --mixture_file, but " in line
    assert "was made with 3/4 prose (" in line
    resume(write(tmp_path / "same.yaml", text.replace("weight: 3", "weight: 0.3").replace("weight: 1", "weight: 0.1")))
    assert_same_run(tmp_path / "run", back)


def test_a_checkpoint_of_before_has_no_shares(trained):
    """It is read as ever; one whose shares are damaged is not."""
    _, path = outputs.find_checkpoints(trained[0])[0]
    progress = json.loads((Path(path) / "progress" / "metadata").read_text())
    assert progress["rows_by_corpus"] == {}
    progress.pop("rows_by_corpus")
    checkpoints.check_progress(progress)
    for wrong in ([], {"a": "b"}, None):
        with pytest.raises(checkpoints.DamagedError, match="rows_by_corpus in its progress"):
            checkpoints.check_progress(progress | {"rows_by_corpus": wrong})
    log = logs.TrainingLog(arguments.TrainingArguments(output_dir=""), plan_of(), None)
    log.resume(progress)
    assert log.shares() == {}


def test_two_processes_stream_a_mixture(start, data, tmp_path):
    """Each reads texts of its own; from a checkpoint in the middle they go on exactly."""
    flags = ["--mixture_file", data / "mixture.yaml", *STREAM]
    whole = tmp_path / "whole"
    ended = end_of(*start(whole, *flags))
    assert ended.statuses == [0, 0], "\n".join(ended.logs)
    assert json.loads((whole / "train_results.json").read_text())["share_of_prose"] == 0.75
    back = back_to(whole, tmp_path / "back", 35)
    ended = end_of(*start(back, *flags, "--resume_from_checkpoint"))
    assert ended.statuses == [0, 0], "\n".join(ended.logs)
    assert_same_curves(back, whole)
