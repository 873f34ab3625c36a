# SPDX-License-Identifier: Apache-2.0
"""Which texts of a stream each of several processes reads: each one, once; what one of them held out none trains on."""

import itertools
import json
import os
import socket
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest

from flaxlm import files, streams, text
from tests.conftest import ROOT
from tests.test_streams import COPIES, number_file, number_tokenizer, numbers, same_texts

__all__ = ["number_tokenizer"]  # a fixture


@pytest.fixture
def deal(monkeypatch):
    """deal(path, num_processes, skipped) -> what open_shard opens in each of so many processes."""

    def call(path, num_processes: int, num_skipped=(0,) * 8, by_files: bool = True) -> list:
        source = text.find_named_splits(str(path))["train"] if path.is_dir() else files.text_files(str(path), "--train_file")
        monkeypatch.setattr(jax, "process_count", lambda: num_processes)
        opened = []
        for index in range(num_processes):
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            opened.append(streams.open_shard(source, num_skipped[index], by_files))
        return opened

    return call


def texts_of(shard) -> list[str]:
    return [row["text"] for row in shard]


def file_of(directory, lines) -> "os.PathLike":
    path = directory / "lines.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize("num_texts", [3, 4, 7, 100, 1000])
@pytest.mark.parametrize("num_processes", [2, 3])
def test_nobody_goes_without(num_texts, num_processes, deal, tmp_path):
    """All texts, each in one process, in the order of the file; and no process has less than a third of its share."""
    parts = [texts_of(shard) for shard in deal(number_file(tmp_path, num_texts), num_processes)]
    first_words = [[int(line.split()[0]) for line in part] for part in parts]
    assert sorted(itertools.chain(*first_words)) == list(range(num_texts))
    assert all(part == sorted(part) for part in first_words)
    assert min(map(len, parts)) >= num_texts / num_processes / 3


@pytest.mark.parametrize("period", [2, 3, 4, 8, 64])
def test_regular_files_are_dealt_evenly(period, deal, tmp_path):
    """A text on every second, third, ... line and blank ones between: each process has its part of both."""
    lines = ["" if number % period else "text" for number in range(period * 200)]
    for num_processes in (2, 4):
        counts = [Counter(texts_of(shard)) for shard in deal(file_of(tmp_path, lines), num_processes)]
        assert sum(counts, Counter()) == {"text": 200, "": 200 * (period - 1)}
        assert min(count["text"] for count in counts) >= 200 / num_processes / 2


def test_neighbours_stay_together(deal, tmp_path):
    """Else a text of several lines would reach the model as every other line of it."""
    for shard in deal(number_file(tmp_path, 900), 2):
        found = [int(line.split()[0]) for line in texts_of(shard)]
        assert sum(b - a > 1 for a, b in itertools.pairwise(found)) < 15


@pytest.mark.parametrize("kind", ["txt", "jsonl", "several", "saved", "directory"])
@pytest.mark.parametrize("num_processes", [2, 3])
def test_held_out_texts_are_not_trained_on(kind, num_processes, deal, tmp_path):
    """What a process skips are its own first texts, as many as it held out, whether it has files of its own or not."""
    path = number_file(tmp_path, 300)
    path = path if kind == "txt" else same_texts(path, kind)
    path = path if kind != "several" else path.rename(tmp_path / "data")
    whole = [texts_of(shard) for shard in deal(path, num_processes)]
    assert sorted(itertools.chain(*whole)) == sorted(number_file(tmp_path, 300).read_text().splitlines())
    skipped = (5, 30, 17)[:num_processes]
    for number, part, rest in zip(skipped, whole, deal(path, num_processes, skipped), strict=True):
        assert texts_of(rest) == part[number:]


def test_files_of_its_own(deal, tmp_path):
    """As many files as processes, or twice as many: each process reads its own. Evaluation reads all from the beginning."""
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"{number}\n" * 50)
    parts = [Counter(texts_of(shard)) for shard in deal(tmp_path, 2)]
    assert [set(part) for part in parts] in ([{"0", "2"}, {"1", "3"}], [{"0", "1"}, {"2", "3"}])
    first = [next(iter(texts_of(shard))) for shard in deal(tmp_path, 2, by_files=False)]
    assert first == ["0", "0"]


@pytest.mark.parametrize("kind", ["txt", "parquet", "saved", "directory"])
def test_goes_on_from_every_place(kind, deal, tmp_path):
    """From the JSON of its state between any two texts, also before the first."""
    path = number_file(tmp_path, 300)
    path = path if kind == "txt" else same_texts(path, kind)

    def second():
        return deal(path, 2, (3, 20))[1]

    expected = texts_of(second())
    for number in (0, 1, 5, 64, len(expected) - 1):
        shard = second()
        examples = iter(shard)
        assert [row["text"] for row in itertools.islice(examples, number)] == expected[:number]
        state = json.loads(json.dumps(shard.state_dict()))
        again = second()
        again.load_state_dict(state)
        assert texts_of(again) == expected[number:]


# ---- Two processes -------------------------------------------------------------------------------------------------------

PROGRAM = """
import json, sys
import jax
from transformers import AutoTokenizer
from pathlib import Path
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from tests.test_streams import epochs, open_stream
flags = json.loads(sys.argv[5])
stream, held_out = open_stream(Path(sys.argv[3]), AutoTokenizer.from_pretrained(sys.argv[4]), **flags)
windows, left_over = epochs(stream, 1)
trained = [rows.tolist() for rows, _ in windows]
print(json.dumps({"held_out": held_out.tolist(), "trained": trained, "left_over": left_over["input_ids"]}))
"""


@pytest.fixture
def two_processes(number_tokenizer, tmp_path):
    """two_processes(path, **flags) -> what each of them holds out, trains on in an epoch, and has left over then."""
    number_tokenizer.save_pretrained(tmp_path / "tokenizer")

    def call(path, **flags) -> list[dict]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, "-c", PROGRAM, address]
        rest = [str(path), str(tmp_path / "tokenizer"), json.dumps(flags)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT, "text": True}
        processes = [subprocess.Popen([*command, str(index), *rest], **pipes) for index in range(2)]
        try:
            ended = [process.communicate(timeout=120) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0, 0], ended
        return [json.loads(out.splitlines()[-1]) for out, _ in ended]

    return call


def test_two_processes_on_a_file_with_blank_lines(two_processes, tmp_path):
    """Half of the lines are blank, every second one: both train; each text in one place, whole, held out or trained on."""
    path = number_file(tmp_path, 600)
    path.write_text(path.read_text().replace("\n", "\n\n"))
    first, second = two_processes(path, num_eval_samples=33)
    assert first["held_out"] == second["held_out"]
    assert len(first["held_out"]) == 33
    trained = [numbers(*map(np.array, part["trained"]), np.array(part["left_over"], int)) for part in (first, second)]
    assert min(sum(count.values()) for count in trained) > 600 * COPIES / 4
    assert not trained[0].keys() & trained[1].keys()
    assert not numbers(np.array(first["held_out"])).keys() & (trained[0] | trained[1]).keys()
    assert set((trained[0] | trained[1]).values()) == {COPIES}


def test_two_processes_evaluate_all_of_a_file(two_processes, tmp_path):
    """Also if one has more of it than the other; the last rows of both are filled up."""
    (tmp_path / "validation").mkdir()
    validation = number_file(tmp_path / "validation", 80)
    held_out = two_processes(number_file(tmp_path, 400), num_eval_samples=1000, validation_file=str(validation))[0]["held_out"]
    found = numbers(np.array(held_out))
    assert {number: count for number, count in found.items() if number >= 0} == dict.fromkeys(range(80), COPIES)
