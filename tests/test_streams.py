# SPDX-License-Identifier: Apache-2.0
"""--streaming: windows of texts lose and repeat nothing, go on from anywhere; what is held out is never trained on."""

import bz2
import functools
import gzip
import itertools
import json
import lzma
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter

import datasets
import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import run_mlm_flax as script
from flaxlm import arguments, batches, cli, streams
from tests.conftest import read_events, run

COPIES = 7  # of its number, in each numbered text: no divisor of ROW, so that texts cross the borders of rows
ROW = 16


def checkpoints(output_dir) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in output_dir.glob("checkpoint-*") if path.suffix == "")


def assert_same_run(first, second):
    """Weights and training curves, bit for bit."""
    one, two = (load_file(path / "model.safetensors") for path in (first, second))
    assert one.keys() == two.keys()
    assert all((one[key] == two[key]).all() for key in one)
    one, two = read_events(first), read_events(second)
    for tag in ("train_loss", "train_grad_norm", "train_learning_rate", "eval_loss"):
        assert one.get(tag) == two.get(tag), tag


def back_to(source, target, step: int):
    """A copy of a run as it was when it was cut off after its checkpoint of `step`."""
    shutil.copytree(source, target)
    for newer in checkpoints(target):
        if newer > step:
            shutil.rmtree(target / f"checkpoint-{newer}")
    return target


# The windows themselves, on texts that are numbers.


@pytest.fixture(scope="module")
def number_tokenizer() -> PreTrainedTokenizerFast:
    """One token per number and no special tokens around a text: a token says which text it is from."""
    specials = {"<pad>": 0, "<unk>": 1, "<mask>": 2}
    tokenizer = Tokenizer(models.WordLevel(specials | {f"{n}": n + 3 for n in range(1000)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def number_file(directory, count: int):
    path = directory / "numbers.txt"
    path.write_text("".join(f"{' '.join([str(n)] * COPIES)}\n" for n in range(count)))
    return path


def open_stream(path, tokenizer, num_eval_samples=1, **flags):
    """(stream, evaluation rows) as a run with these flags gets them."""
    several = path.name == "several"  # several files given by the directory they are in
    source = {"train_file": [f"{path}/*.csv"]} if several else {"train_file": [str(path)]}
    source = {"dataset_name": str(path)} if path.is_dir() and not several else source
    data_args = script.DataTrainingArguments(
        **source, streaming=True, num_eval_samples=num_eval_samples, **{"shuffle_buffer_size": 30} | flags
    )
    training_args = arguments.TrainingArguments(output_dir="", do_train=True, do_eval=True, max_steps=1)
    collator = script.Collator(tokenizer, None, data_args, ROW)
    tokenize_fn = functools.partial(script.tokenize_texts, tokenizer=tokenizer, **collator.tokenize_options)
    args = arguments.Arguments(arguments.ModelArguments(), data_args, training_args)
    stream, rows, _ = streams.open_streams(args, tokenize_fn, collator)
    return stream, rows["input_ids"]


def epochs(stream, count: int):
    """The windows of the first epochs, and the tokens that are carried into the next one."""
    found = []
    for rows, start in stream.windows(None):
        if start["epoch"] == count:
            return found, start["carried"]
        found.append((rows["input_ids"], start))


def numbers(*arrays) -> Counter:
    return Counter(np.concatenate([np.asarray(array).reshape(-1) for array in arrays]) - 3)


def test_every_text_once_per_epoch_and_no_token_lost(number_tokenizer, tmp_path):
    """What the rows of n epochs and the left-over hold is n times every text, whole."""
    stream, _ = open_stream(number_file(tmp_path, 450), number_tokenizer)
    for num_epochs in (1, 2, 3):
        windows, carried = epochs(stream, num_epochs)
        found = numbers(*(rows for rows, _ in windows), carried["input_ids"])
        assert found == dict.fromkeys(range(100, 450), num_epochs * COPIES)  # the first hundred texts are held out
    assert all(rows.shape[1] == ROW for rows, _ in windows)
    assert len(carried["input_ids"]) < ROW


def test_evaluation_texts_never_reach_training(number_tokenizer, tmp_path):
    stream, held_out = open_stream(number_file(tmp_path, 600), number_tokenizer, num_eval_samples=60)
    assert held_out.shape == (60, ROW)
    windows, _ = epochs(stream, 2)
    assert not numbers(held_out).keys() & numbers(*(rows for rows, _ in windows)).keys()
    assert 0 in numbers(held_out)


def test_evaluation_has_the_last_tokens_too(number_tokenizer, tmp_path):
    """All tokens of a validation file are scored; its last row is filled up."""
    (tmp_path / "validation").mkdir()
    validation = number_file(tmp_path / "validation", 7)
    _, held_out = open_stream(
        number_file(tmp_path, 60), number_tokenizer, num_eval_samples=1000, validation_file=str(validation)
    )
    found = numbers(held_out)
    padding = number_tokenizer.pad_token_id - 3
    assert found.pop(padding, 0) == held_out.size - 7 * COPIES < ROW
    assert found == dict.fromkeys(range(7), COPIES)


def test_each_window_and_epoch_has_an_order_of_its_own(number_tokenizer, tmp_path):
    """The same texts in the same windows, but rows in another order; in no window the order of the file."""
    stream, _ = open_stream(number_file(tmp_path, 324), number_tokenizer, shuffle_buffer_size=112)  # 7 * 112 = 49 rows
    windows, _ = epochs(stream, 2)
    assert [(start["epoch"], start["window"]) for _, start in windows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    orders = [rows[:, 0].argsort().tolist() for rows, _ in windows]
    assert len({tuple(order) for order in orders}) == 4
    assert list(range(49)) not in orders
    assert (np.sort(windows[0][0], axis=0) == np.sort(windows[2][0], axis=0)).all()
    again, _ = epochs(open_stream(tmp_path / "numbers.txt", number_tokenizer, shuffle_buffer_size=112)[0], 2)
    assert all((a == b).all() for (a, _), (b, _) in zip(windows, again, strict=True))


def same_texts(path, kind: str):
    """The texts of a txt file in another format, or as save_to_disk writes them in two parts."""
    lines, target = path.read_text().splitlines(), path.with_name(f"numbers.{kind}")
    dataset = datasets.Dataset.from_dict({"id": list(range(len(lines))), "text": lines})
    if kind == "txt.gz":
        target.write_bytes(gzip.compress(path.read_bytes()))
    elif kind == "saved":
        datasets.DatasetDict(train=dataset).save_to_disk(target, num_shards={"train": 2})
    elif kind in ("directory", "several"):
        target = path.with_name("several") if kind == "several" else target
        target.mkdir()
        for part in range(3):  # three shards, of which the last is longer
            part_of = dataset.select(range(part * 80, 80 * (part + 1) if part < 2 else len(lines)))
            part_of.to_csv(target / f"train-{part}.csv", index=False)
    else:
        {"csv": dataset.to_csv, "jsonl": dataset.to_json, "parquet": dataset.to_parquet}[kind](target)
    return target


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "csv", "jsonl", "parquet", "directory", "several", "saved"])
def test_windows_go_on_from_every_position(number_tokenizer, tmp_path, kind):
    """From the JSON of each window's start, over the ends of epochs: the windows that would have followed."""
    path = number_file(tmp_path, 300)
    path = path if kind == "txt" else same_texts(path, kind)
    stream, _ = open_stream(path, number_tokenizer, shuffle_buffer_size=45)
    expected = list(itertools.islice(stream.windows(None), 14))
    assert {start["epoch"] for _, start in expected} == {0, 1, 2}
    for i in range(12):
        position = json.loads(json.dumps(expected[i][1]))
        found = itertools.islice(stream.windows(position), 2)
        for (rows, start), (wanted, wanted_start) in zip(found, expected[i : i + 2], strict=True):
            assert (rows["input_ids"] == wanted["input_ids"]).all()
            assert start == wanted_start


def test_old_windows_are_let_go(number_tokenizer, tmp_path):
    """After fifty windows, at most the last two are still in memory."""
    stream, _ = open_stream(number_file(tmp_path, 900), number_tokenizer, shuffle_buffer_size=20)
    seen = []
    for rows, _ in itertools.islice(stream.windows(None), 50):
        seen.append(weakref.ref(rows["input_ids"]))
    assert sum(reference() is not None for reference in seen) <= 2


# What may go wrong with a stream while it is read.


def damaged(kind: str, directory):
    """A file that begins well and then is damaged, (path, what the line says of it)."""
    lines = [" ".join(map(str, np.random.default_rng(n).integers(0, 1000, 500))) for n in range(1500)]  # more than a table
    text = "".join(f"{line}\n" for line in lines).encode()
    name, _, what = kind.partition(" ")
    path = directory / name
    if what == "cut":
        packed = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[path.suffix].compress(text)
        path.write_bytes(packed[: len(packed) // 2])
        return path, "ended before the end-of-stream marker"
    if what == "overwritten":
        packed = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[path.suffix].compress(text)
        middle = len(packed) // 2
        path.write_bytes(packed[:middle] + bytes(1000) + packed[middle + 1000 :])
        return path, "cannot be read as text: "
    if name == "a.txt":
        path.write_bytes(text + b"caf\xe9\n")
        return path, "not UTF-8; name its encoding, for example with --encoding ISO-8859-1"
    if name == "a.csv":
        path.write_bytes(b"text\n" + text + b"a, b\n")
        return path, "row 1501 .line 1502. has 2 fields"
    if name == "a.jsonl":
        rows = "".join(json.dumps({"text": line}) + "\n" for line in lines).encode() * 4  # more than a chunk of 10 MB
        path.write_bytes(rows + b'{"text": "a')
        return path, "cannot be read as json: "
    pq.write_table(pa.table({"text": lines}), path, row_group_size=500, compression="none")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4000] = b"\xff" * 4000
    path.write_bytes(content)
    return path, "cannot be read as parquet: "


KINDS = ["a.txt", "a.csv", "a.jsonl", "a.parquet"]
KINDS += [f"a.txt.{packed} {what}" for what in ("cut", "overwritten") for packed in ("gz", "bz2", "xz")]


@pytest.mark.parametrize("given_by", ["file", "directory"])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_told_in_one_line(kind, given_by, refuses, number_tokenizer, tmp_path):
    """In the middle of training too, with the flag and the file; the line comes out of the background thread."""
    (tmp_path / "data").mkdir()
    path, expected = damaged(kind, tmp_path / "data")
    flag = "--train_file" if given_by == "file" else f"--dataset_name {tmp_path / 'data'}:"
    with refuses(f"{flag} {path}: is empty or .*{expected}"):
        stream, _ = open_stream(path if given_by == "file" else path.parent, number_tokenizer, shuffle_buffer_size=300)
        for _ in batches.prefetch(itertools.islice(stream.windows(None), 1000)):
            pass


def test_damage_ends_a_run_with_one_line(some_text, roberta_dir, run_script, tmp_path):
    """As a program: exit status 2, no traceback, and the checkpoints before are kept."""
    path = tmp_path / "cut.txt.gz"
    packed = gzip.compress(some_text.read_bytes() * 60, compresslevel=0)
    path.write_bytes(packed[: len(packed) * 3 // 4])
    flags = ["--config_name", roberta_dir, "--tokenizer_name", roberta_dir, "--max_seq_length", 32, "--train_file", path]
    flags += ["--streaming", "--num_eval_samples", 8, "--max_steps", 10_000, "--shuffle_buffer_size", 50, "--save_steps", 5]
    flags += ["--per_device_train_batch_size", 128]
    done = run_script(script.__file__, *flags, "--output_dir", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert (
        f"error: --train_file {path}: is empty or cannot be read as text: Compressed file ended" in done.stderr.splitlines()[-1]
    )
    assert checkpoints(tmp_path / "out")


def test_a_file_that_goes_is_told(refuses, number_tokenizer, tmp_path):
    path = number_file(tmp_path, 200)
    stream, _ = open_stream(path, number_tokenizer)
    with refuses(f"--train_file {path}: .*No such file"):
        for _, start in stream.windows(None):
            if start["epoch"] == 0:
                path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "error", [ConnectionError("Server Disconnected"), TimeoutError("timed out"), httpx2.ReadTimeout("slow")]
)
def test_a_lost_network_is_an_accident(error, number_tokenizer, monkeypatch, tmp_path):
    """Nobody's mistake: exit status 1, and how to go on."""
    stream, _ = open_stream(number_file(tmp_path, 300), number_tokenizer)

    def examples():
        yield from ({"text": "1 2 3"} for _ in range(100))
        raise OSError("reading failed") from error

    monkeypatch.setattr(stream, "open_dataset", lambda: datasets.IterableDataset.from_generator(examples))
    stream.source = "--dataset_name someone/something (train)"
    with pytest.raises(cli.Accident) as caught:
        list(itertools.islice(stream.windows(None), 10))
    assert caught.value.status == 1
    assert "--dataset_name someone/something (train): the network failed: " in str(caught.value)
    assert "--resume_from_checkpoint" in str(caught.value)


# Which stream it is.


def test_a_stream_is_known_by_its_texts(number_tokenizer, tmp_path):
    """Not by its name; and by how much was held out. What comes later in it is not looked at."""
    for name in "abcd":
        (tmp_path / name).mkdir()
    first = number_file(tmp_path / "a", 400)
    known = open_stream(first, number_tokenizer)[0].identity
    assert open_stream(shutil.copy(first, tmp_path / "b" / "other.txt"), number_tokenizer)[0].identity == known
    assert open_stream(same_texts(first, "txt.gz"), number_tokenizer)[0].identity == known
    lines = first.read_text().splitlines()
    (tmp_path / "c" / "numbers.txt").write_text("\n".join([*lines[:50], "999", *lines[51:]]))
    assert open_stream(tmp_path / "c" / "numbers.txt", number_tokenizer)[0].identity != known
    assert open_stream(first, number_tokenizer, num_eval_samples=60)[0].identity != known
    assert open_stream(first, number_tokenizer, validation_file=str(first))[0].identity != known
    (tmp_path / "d" / "numbers.txt").write_text("\n".join([*lines, "999"]))
    assert open_stream(tmp_path / "d" / "numbers.txt", number_tokenizer)[0].identity == known


def test_line_by_line_rows(number_tokenizer, tmp_path):
    """One text, one padded row; blank lines none."""
    path = number_file(tmp_path, 150)
    path.write_text(path.read_text().replace("\n", "\n\n"))
    stream, _ = open_stream(path, number_tokenizer, line_by_line=True)
    windows, _ = epochs(stream, 1)
    rows = np.concatenate([rows for rows, _ in windows])
    assert (rows[:, :COPIES] == rows[:, :1]).all()
    assert (rows[:, COPIES:] == number_tokenizer.pad_token_id).all()
    assert sorted(rows[:, 0] - 3) == list(range(50, 150))  # a hundred lines, every other one blank, are held out


# Whole runs.

STEPS, SAVE = 60, 5
FLAGS = [
    "--streaming", "--shuffle_buffer_size", 50, "--num_eval_samples", 20, "--max_steps", STEPS, "--save_steps", SAVE,
    "--save_total_limit", 100, "--logging_steps", 7, "--eval_steps", 25, "--learning_rate", 1e-3,
]  # fmt: skip


@pytest.fixture(scope="module")
def some_text(texts, tmp_path_factory):
    """So few texts that a run reads them more than once."""
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text("\n".join(text for text in texts[:240] if "\r" not in text) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def uninterrupted(some_text, roberta_dir, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("uninterrupted")
    run(output_dir, roberta_dir, "--train_file", some_text, *FLAGS)
    return output_dir


def progress_at(output_dir, step: int) -> dict:
    """What the checkpoint of a step holds beside weights: position in the stream, log."""
    return json.loads((output_dir / f"checkpoint-{step}" / "progress" / "metadata").read_text())


def positions(output_dir) -> dict[int, dict]:
    """Where in the stream each checkpoint is."""
    return {step: progress_at(output_dir, step)["positions"][0] for step in checkpoints(output_dir)}


def test_checkpoint_holds_the_log_up_to_its_step(uninterrupted):
    """Though it is written while training goes on; else a resumed run would log steps twice."""
    for step in checkpoints(uninterrupted):
        progress = progress_at(uninterrupted, step)
        logged = 7 * (step // 7) if step < STEPS else STEPS
        assert [point["step"] for point in progress["window"]] == list(range(logged + 1, step + 1))
        assert progress["curve"][-1:] == [] or progress["curve"][-1][0] == logged
        assert all(int(evaluated) <= step for evaluated in progress["evaluations"])


def resume_points(output_dir) -> dict[str, int]:
    """The first checkpoint in the middle of the second window, and the one behind which the first epoch ends."""
    where = positions(output_dir)
    window = min(step for step, position in where.items() if (position["epoch"], position["window"]) == (0, 1))
    assert where[window + SAVE]["window"] == 1
    assert where[window]["rows_used"] > 0
    last = max(step for step, position in where.items() if position["epoch"] == 0)
    assert SAVE < last < STEPS - SAVE
    return {"window": window, "epoch": last}


@pytest.mark.parametrize("place", ["window", "epoch"])
def test_resumed_run_equals_the_uninterrupted_one(place, uninterrupted, some_text, roberta_dir, tmp_path):
    """Cut off in the middle of a window, then once more in the same one; and before the end of an epoch."""
    step = resume_points(uninterrupted)[place]
    once = back_to(uninterrupted, tmp_path / "once", step)
    run(once, roberta_dir, "--train_file", some_text, *FLAGS, "--resume_from_checkpoint")
    assert_same_run(once, uninterrupted)
    if place == "window":
        twice = back_to(once, tmp_path / "twice", step + SAVE)
        assert positions(twice)[step + SAVE]["window"] == 1  # the window that the first resumed run began in
        run(twice, roberta_dir, "--train_file", some_text, *FLAGS, "--resume_from_checkpoint")
        assert_same_run(twice, uninterrupted)


def test_killed_run_equals_the_uninterrupted_one(uninterrupted, some_text, roberta_dir, tmp_path):
    """A process killed with SIGKILL while it trains and saves."""
    flags = ["--config_name", roberta_dir, "--tokenizer_name", roberta_dir, "--max_seq_length", 32, "--train_file", some_text]
    command = [sys.executable, script.__file__, *flags, *FLAGS, "--output_dir", tmp_path / "out"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([str(part) for part in command], stderr=log, stdout=log)
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / f"checkpoint-{2 * SAVE}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (tmp_path / "out" / "train_results.json").exists()
    run(tmp_path / "out", roberta_dir, "--train_file", some_text, *FLAGS, "--resume_from_checkpoint")
    assert_same_run(tmp_path / "out", uninterrupted)


@pytest.mark.parametrize("change", ["text", "validation"])
def test_a_run_goes_on_with_its_own_stream_only(change, uninterrupted, some_text, roberta_dir, error_of, tmp_path):
    """A file of the same name with other text is refused, and validation data that was not there: it moves what is held out."""
    once = back_to(uninterrupted, tmp_path / "once", 2 * SAVE)
    other = tmp_path / some_text.name
    lines = some_text.read_text("utf-8").splitlines()
    other.write_text("\n".join(lines[1:] if change == "text" else lines) + "\n", "utf-8")
    more = ["--validation_file", some_text] if change == "validation" else []
    line = error_of(run, once, roberta_dir, "--train_file", other, *more, *FLAGS, "--resume_from_checkpoint")
    assert "the training data (checksum) is" in line
    assert (", 0 text(s) held out" in line) == (change == "validation")
    assert "going on would not give what an uninterrupted run gives" in line


def test_another_stream_begins_at_its_beginning(uninterrupted, some_text, roberta_dir, tmp_path, capsys):
    """Where the change is allowed: what has been trained on so far was of the old one, the next step is of the new."""
    once = back_to(uninterrupted, tmp_path / "once", 2 * SAVE)
    other = tmp_path / "other.txt"
    other.write_text("\n".join(some_text.read_text("utf-8").splitlines()[1:]) + "\n", "utf-8")
    allowed = ["--resume_from_checkpoint", "--resume_changes", "train_file"]
    run(once, roberta_dir, "--train_file", other, *FLAGS, *allowed)
    assert "The stream of texts is another one: it is read from its beginning." in capsys.readouterr().err
    where = positions(once)
    assert (where[3 * SAVE]["epoch"], where[3 * SAVE]["window"]) == (0, 0)
    old, new = (dict(read_events(path)["train_loss"]) for path in (uninterrupted, once))
    assert [old[step] for step in range(1, 2 * SAVE + 1)] == [new[step] for step in range(1, 2 * SAVE + 1)]
    assert old[2 * SAVE + 2] != new[2 * SAVE + 2]


def test_other_noise_leaves_the_stream_where_it_is(uninterrupted, some_text, roberta_dir, capsys, tmp_path):
    """Masks are made of batches of the same rows: none of them is read twice for another share of masks."""
    once = back_to(uninterrupted, tmp_path / "once", resume_points(uninterrupted)["window"])
    allowed = ["--mlm_probability", 0.3, "--resume_from_checkpoint", "--resume_changes", "mlm_probability"]
    run(once, roberta_dir, "--train_file", some_text, *FLAGS, *allowed)
    said = capsys.readouterr().err
    assert "--mlm_probability is 0.3 from here on, it was 0.15" in said
    assert "read from its beginning" not in said
    assert positions(once) == positions(uninterrupted)


def test_formats_give_the_same_rows(uninterrupted, some_text, roberta_dir, byte_level_tokenizer, tmp_path):
    """txt.gz, jsonl with another column in front, a directory of files, what save_to_disk wrote: the same text and rows."""
    lines = some_text.read_text("utf-8").splitlines()
    with gzip.open(tmp_path / "some.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    dataset = datasets.Dataset.from_dict({"id": list(range(len(lines))), "body": lines})
    dataset.to_json(tmp_path / "some.jsonl")
    (tmp_path / "directory").mkdir()
    dataset.to_parquet(tmp_path / "directory" / "train.parquet")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "saved")
    expected_stream, expected_held_out = open_stream(some_text, byte_level_tokenizer)
    expected, expected_left_over = epochs(expected_stream, 1)
    for name in ("some.txt.gz", "some.jsonl", "directory", "saved"):
        stream, held_out = open_stream(tmp_path / name, byte_level_tokenizer)
        assert (held_out == expected_held_out).all()
        windows, left_over = epochs(stream, 1)
        assert left_over == expected_left_over, name
        assert all((a == b).all() for (a, _), (b, _) in zip(windows, expected, strict=True)), name
    flags = [*FLAGS[:5], "--max_steps", 1, "--learning_rate", 1e-3]
    run(tmp_path / "out", roberta_dir, "--dataset_name", tmp_path / "saved", *flags)
    assert read_events(tmp_path / "out")["train_loss"] == read_events(uninterrupted)["train_loss"][:1]


def test_other_flags_stream(some_text, roberta_dir, tmp_path, capfd):
    """Whole words, padded rows, validation data of its own; the stream ends where num_train_steps, the old name, says."""
    flags = ["--streaming", "--num_train_steps", 30, "--learning_rate", 1e-2, "--whole_word_mask", "--num_eval_samples", 16]
    results = run(
        tmp_path / "a", roberta_dir, "--train_file", some_text, "--validation_file", some_text, "--line_by_line", *flags
    )
    assert results["train_steps"] == 30
    assert results["eval_loss"] < 6.2
    assert results["train_samples"] == 30 * 8
    assert "step 30 of 30: loss" in capfd.readouterr().err  # no epoch, whose length is not known


def test_errors_in_one_line(error_of, corpus, roberta_dir, tmp_path):
    """A person's mistakes: exit status 2 and what to do, before any training."""

    def message(*flags, data=("--train_file", corpus)):
        return error_of(run, tmp_path / "out", roberta_dir, *data, "--streaming", *flags)

    assert "--streaming: needs --max_steps" in message()
    assert "--max_train_samples: not with --streaming" in message("--max_steps", 2, "--max_train_samples", 5)
    (tmp_path / "ref").write_text("[]\n")
    assert "--train_ref_file" in message("--max_steps", 2, "--train_ref_file", tmp_path / "ref", "--whole_word_mask")
    assert "--num_eval_samples" in message("--max_steps", 2)  # 50 000 rows by default
    assert "--dataset_name nobody/nothing" in message("--max_steps", 2, data=("--dataset_name", "nobody/nothing"))
    assert "no such text column" in message("--max_steps", 2, "--text_column_name", "body")
    assert not (tmp_path / "out").exists()


def test_no_text_left_for_training_is_an_error_in_one_line(error_of, texts, roberta_dir, tmp_path):
    """All the texts are held out for evaluation."""
    (tmp_path / "few.txt").write_text("\n".join(texts[:60]))
    flags = ["--train_file", tmp_path / "few.txt", "--streaming", "--max_steps", 2, "--num_eval_samples", 20]
    assert "--num_eval_samples" in error_of(run, tmp_path / "out", roberta_dir, *flags)
