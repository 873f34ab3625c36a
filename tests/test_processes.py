# SPDX-License-Identifier: Apache-2.0
"""Several processes, here two on the CPU that share one output_dir: the numbers of one process, one stop, one set of files."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

import run_mlm_flax as script
from tests.conftest import read_events, run

STEPS, SAVE = 40, 5
TAGS = ("train_loss", "train_grad_norm", "train_learning_rate", "eval_loss", "eval_accuracy")
FLAGS = [
    "--max_steps", STEPS, "--save_steps", SAVE, "--save_total_limit", 100, "--logging_steps", 4, "--eval_steps", 20,
    "--learning_rate", 1e-3, "--adam_epsilon", 1e-4, "--max_eval_samples", 23,
]  # fmt: skip
ROWS_OF_EACH = ["--per_device_train_batch_size", 4, "--per_device_eval_batch_size", 4]
STREAM = ["--streaming", "--shuffle_buffer_size", 60, "--num_eval_samples", 24]


class Ended(NamedTuple):
    statuses: list[int]
    logs: list[str]


@pytest.fixture(scope="module")
def start(roberta_dir):
    """start(output_dir, *flags) -> two processes that train together, and the files of their logs."""

    def call(output_dir: Path, *flags) -> tuple[list[subprocess.Popen], list[Path]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, script.__file__, "--config_name", roberta_dir, "--tokenizer_name", roberta_dir]
        command += ["--max_seq_length", 32, "--output_dir", output_dir, *FLAGS, *ROWS_OF_EACH, *flags]
        command += ["--coordinator_address", address, "--num_processes", 2, "--process_id"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
        processes, logs = [], []
        for i in range(2):
            logs.append(output_dir.with_name(f"{output_dir.name}-{i}.log"))
            with open(logs[i], "w") as log:
                arguments = [*map(str, command), str(i)]
                processes.append(subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, env=environment))
        return processes, logs

    return call


def end_of(processes: list[subprocess.Popen], logs: list[Path]) -> Ended:
    try:
        statuses = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return Ended(statuses, [log.read_text() for log in logs])


def checkpoints(output_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in output_dir.glob("checkpoint-*") if path.suffix == "")


def assert_same_run(first: Path, second: Path):
    """Weights and curves, bit for bit."""
    one, two = (load_file(path / "model.safetensors") for path in (first, second))
    assert all((one[key] == two[key]).all() for key in one)
    one, two = read_events(first), read_events(second)
    for tag in TAGS:
        assert one[tag] == two[tag], tag


@pytest.fixture(scope="module")
def together(start, corpus, tmp_path_factory):
    """The uninterrupted run of two processes."""
    output_dir = tmp_path_factory.mktemp("two") / "together"
    ended = end_of(*start(output_dir, "--train_file", corpus))
    assert ended.statuses == [0, 0], "\n".join(ended.logs)
    return output_dir, ended


def test_two_processes_give_what_one_gives(together, roberta_dir, corpus, tmp_path):
    """2 x 4 rows against 1 x 8, dropout off: loss curve, evaluation (its last batch is not full), weights."""
    output_dir, ended = together
    batch = ["--per_device_train_batch_size", 8, "--per_device_eval_batch_size", 8]
    run(tmp_path / "alone", roberta_dir, "--train_file", corpus, *FLAGS, *batch)
    assert "on 2 device(s)" in ended.logs[0]
    assert "8 rows = 256 tokens per step" in ended.logs[0]
    one, two = read_events(tmp_path / "alone"), read_events(output_dir)
    for tag in TAGS:
        assert [step for step, _ in one[tag]] == [step for step, _ in two[tag]]
        assert [value for _, value in one[tag]] == pytest.approx([value for _, value in two[tag]], rel=1e-5)
    one, two = (load_file(path / "model.safetensors") for path in (tmp_path / "alone", output_dir))
    for key in one:
        np.testing.assert_allclose(one[key], two[key], atol=2e-5)


def test_only_process_0_writes(together):
    """One set of events, one log of training, one point per step."""
    output_dir, ended = together
    assert len(list(output_dir.glob("events.out.tfevents.*"))) == 2  # the session start, and the points
    assert [step for step, _ in read_events(output_dir)["train_loss"]] == list(range(1, STEPS + 1))
    assert "evaluation at step" in ended.logs[0]
    assert " INFO step " not in ended.logs[1]
    assert "Process 1 of 2, with 1 device(s)" in ended.logs[1]
    assert checkpoints(output_dir) == list(range(SAVE, STEPS + 1, SAVE))
    leftovers = [path.name for path in output_dir.iterdir() if path.name.startswith(".") or path.suffix == ".tmp"]
    assert leftovers == []


def stop_and_resume(start, stopped: Path, *flags) -> None:
    """SIGTERM reaches process 1 only: both save the same step and end with 143; resumed, they run to the end."""
    processes, logs = start(stopped, *flags)
    deadline = time.monotonic() + 90
    while not (stopped / f"checkpoint-{SAVE}").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    processes[1].send_signal(signal.SIGTERM)
    ended = end_of(processes, logs)
    assert ended.statuses == [143, 143], "\n".join(ended.logs)
    for log in ended.logs:
        assert log.splitlines()[-1].endswith("to go on, run the same command with --resume_from_checkpoint")
    last = checkpoints(stopped)[-1]
    assert SAVE <= last < STEPS
    assert f"Saving step {last}" in ended.logs[0]

    ended = end_of(*start(stopped, *flags, "--resume_from_checkpoint", "auto"))
    assert ended.statuses == [0, 0], "\n".join(ended.logs)
    assert f"Resuming after step {last}" in ended.logs[0]


def test_one_process_goes_on_where_two_were(together, roberta_dir, corpus, tmp_path):
    """With rows as many in a batch: the numbers of two, to rounding; no checkpoint is taken for damaged."""
    output_dir = shutil.copytree(together[0], tmp_path / "run")
    for step in range(25, STEPS + 1, SAVE):
        shutil.rmtree(output_dir / f"checkpoint-{step}")
    batch = ["--per_device_train_batch_size", 8, "--per_device_eval_batch_size", 8]
    run(output_dir, roberta_dir, "--train_file", corpus, *FLAGS, *batch, "--resume_from_checkpoint")
    assert not list(output_dir.glob("*.damaged"))
    one, two = read_events(output_dir), read_events(together[0])
    for tag in TAGS:
        assert one[tag][:20] == two[tag][:20]
        assert [step for step, _ in one[tag]] == [step for step, _ in two[tag]]
        assert [value for _, value in one[tag]] == pytest.approx([value for _, value in two[tag]], rel=1e-5)


def test_stopped_by_a_signal_to_one_process_goes_on_exactly(together, start, corpus, tmp_path):
    """Bit for bit like the run that nobody stopped."""
    stop_and_resume(start, tmp_path / "stopped", "--train_file", corpus)
    assert_same_run(tmp_path / "stopped", together[0])


def test_a_model_spread_over_two_processes(start, roberta_dir, corpus, tmp_path):
    """--fsdp: what one process gives that has all of it; saved whole by process 0; and stopped and resumed exactly."""
    flags = ["--train_file", corpus, "--config_overrides", "hidden_size=128,intermediate_size=256"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    ended = end_of(*start(whole, *flags, "--fsdp"))
    assert ended.statuses == [0, 0], "\n".join(ended.logs)
    assert "MiB on each device instead of" in ended.logs[0]
    batch = ["--per_device_train_batch_size", 8, "--per_device_eval_batch_size", 8]
    run(tmp_path / "alone", roberta_dir, *flags, *FLAGS, *batch)
    one, two = read_events(tmp_path / "alone"), read_events(whole)
    for tag in TAGS:
        assert [value for _, value in one[tag]] == pytest.approx([value for _, value in two[tag]], rel=1e-5)
    one, two = (load_file(path / "model.safetensors") for path in (tmp_path / "alone", whole))
    for key in one:
        np.testing.assert_allclose(one[key], two[key], atol=2e-5, err_msg=key)

    stop_and_resume(start, stopped, *flags, "--fsdp")
    assert_same_run(stopped, whole)


def test_two_processes_choose_the_best_and_stop_early(start, roberta_dir, corpus, tmp_path):
    """At the same step, which is told by both; the files are of the best, and started again there is nothing to do."""
    worse = ["--learning_rate", 0.05, "--lr_scheduler_type", "constant", "--eval_steps", 3, "--save_total_limit", 1]
    flags = ["--train_file", corpus, *worse, "--load_best_model_at_end", "--early_stopping_patience", 2]
    output_dir = tmp_path / "best"
    for _ in range(2):
        ended = end_of(*start(output_dir, *flags, "--resume_from_checkpoint", "auto"))
        assert ended.statuses == [0, 0], "\n".join(ended.logs)
        assert "Stopping early: 2 evaluation(s) in a row not better" in ended.logs[0]
        (last, _), (best, loss) = (
            read_events(output_dir)["eval_loss"][-1],
            min(read_events(output_dir)["eval_loss"], key=lambda point: point[1]),
        )
        assert best < last < STEPS
        assert checkpoints(output_dir) == [best, last]
        assert json.loads((output_dir / "train_results.json").read_text())["best_step"] == best
        alone = ["--do_eval", "--model_name_or_path", output_dir, "--train_file", corpus, "--max_eval_samples", 23]
        assert run(tmp_path / "evaluation", roberta_dir, *alone)["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_stream_stopped_by_a_signal_to_one_process_goes_on_exactly(start, texts, tmp_path):
    """The same where each process reads texts of its own."""
    data = tmp_path / "some.txt"
    data.write_text("\n".join(text for text in texts[:300] if "\r" not in text) + "\n", "utf-8")
    flags = ["--train_file", data, *STREAM]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    ended = end_of(*start(whole, *flags))
    assert ended.statuses == [0, 0], "\n".join(ended.logs)
    results = json.loads((whole / "eval_results.json").read_text())
    assert 1 < results["eval_loss"] < 6.5
    assert [step for step, _ in read_events(whole)["eval_loss"]] == [STEPS // 2, STEPS]
    progress = json.loads((whole / f"checkpoint-{STEPS}" / "progress" / "metadata").read_text())
    first, second = progress["positions"]
    assert first["carried"] != second["carried"]

    stop_and_resume(start, stopped, *flags)
    assert_same_run(stopped, whole)
