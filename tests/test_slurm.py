# SPDX-License-Identifier: Apache-2.0
"""docs/train.sbatch: stopped before the time limit it queues up again and goes on; what has failed does not.

There is no SLURM here. `srun` is a few lines that start the command once for each task, on this machine, with the variables
that SLURM would set; `scontrol` only notes what it was asked for. The rest is real: the batch file as it is, training on the
CPU, and the signal, which as from SLURM reaches the tasks and not the batch file.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flaxlm import outputs
from tests.conftest import ROOT

BATCH_FILE = ROOT / "docs" / "train.sbatch"
SRUN = """#!/bin/bash
while [ "${1#--}" != "$1" ]; do shift; done
status=0
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_NODELIST=127.0.0.1 "$@" &
    echo $! >> tasks
done
for task in $(jobs -p); do wait "$task"; ended=$?; if [ $ended -gt $status ]; then status=$ended; fi; done
exit $status
"""
SCONTROL = """#!/bin/bash
echo "$@" >> asked
"""


@pytest.fixture
def submit(tmp_path, roberta_dir, corpus):
    """submit(num_tasks, *flags, time_left) -> the batch file at work in tmp_path, as SLURM would start it."""
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def call(num_tasks: int, *flags, time_left: int = 300) -> subprocess.Popen:
        (tmp_path / "tasks").unlink(missing_ok=True)
        job = {"SLURM_JOB_ID": free_job_id(), "SLURM_NTASKS": str(num_tasks), "SLURM_CPUS_PER_TASK": "1"}
        job |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable}
        job |= {"SLURM_JOB_END_TIME": str(int(time.time()) + time_left)}
        command = ["bash", BATCH_FILE, ROOT / "run_mlm_flax.py", "--config_name", roberta_dir, "--tokenizer_name", roberta_dir]
        command += ["--train_file", corpus, "--output_dir", "out", "--max_seq_length", 32, "--max_steps", 60, *flags]
        command += ["--save_steps", 10, "--max_eval_samples", 16, "--per_device_train_batch_size", 4]
        with (tmp_path / "log").open("a") as log:
            return subprocess.Popen(
                list(map(str, command)), env=os.environ | job, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT
            )

    return call


def free_job_id() -> str:
    """The number of a job from which jax makes that of a free port: the last 12 bits of it, in the highest 4,096 ports."""
    for job_id in range(os.getpid(), os.getpid() + 4096):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", 61440 + job_id % 4096)):
                return str(job_id)
    raise AssertionError("no port is free")


def wait_until(has_come: Callable[[], bool], directory: Path) -> None:
    deadline = time.monotonic() + 300
    while not has_come():
        assert time.monotonic() < deadline, (directory / "log").read_text()
        time.sleep(0.01)


def signal_before_the_time_limit(directory: Path) -> None:
    """What --signal=TERM@300 does, once the run has saved something."""
    wait_until(lambda: (directory / "out" / "checkpoint-10").exists(), directory)
    for task in (directory / "tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)


@pytest.mark.parametrize("num_tasks", [1, 2])
def test_queues_up_again_and_goes_on(num_tasks, submit, tmp_path):
    """Several tasks are told --multihost, and find each other by what SLURM says, nothing else."""
    job = submit(num_tasks)
    signal_before_the_time_limit(tmp_path)
    log = tmp_path / "log"
    assert job.wait(timeout=300) == 143, log.read_text()
    assert re.fullmatch(r"requeue \d+\n", (tmp_path / "asked").read_text())
    assert log.read_text().count("stopped as asked; to go on, run the same command again") == num_tasks

    (tmp_path / "asked").unlink()
    assert submit(num_tasks).wait(timeout=300) == 0, log.read_text()
    assert not (tmp_path / "asked").exists()
    started, went_on = log.read_text().split("Going on from a checkpoint.", 1)
    assert "There is no checkpoint to go on from: starting." in started
    assert re.search(r"Resuming after step \d+", went_on)
    assert (tmp_path / "out" / "train_results.json").exists()
    for task in range(num_tasks):
        assert log.read_text().count(f"Process {task} of 2, with 1 device(s)") == (2 if num_tasks > 1 else 0)


@pytest.mark.parametrize(
    "moment", ["Arguments other than the defaults", "Compiling the training step", "Resuming after step 0"]
)
def test_what_gains_nothing_does_not_queue_up(moment, submit, tmp_path):
    """A time limit that ends before the first step, while the run prepares, compiles, or has gone on from where it was: the
    next start would end there too, and so on for ever."""
    log = tmp_path / "log"
    if moment.startswith("Resuming"):
        end_at(submit, tmp_path, "Compiling the training step")
        assert outputs.find_checkpoints(tmp_path / "out") == [(0, str(tmp_path / "out" / "checkpoint-0"))]
        log.write_text("")
    end_at(submit, tmp_path, moment)
    line = "interrupted before training began" if "Arguments" in moment else "before its first step: it needs more time"
    assert line in log.read_text().splitlines()[-1]


def test_preempted_before_the_first_step_it_queues_up_again(submit, tmp_path):
    """There is more time than the next start may need."""
    job = submit(1, time_left=3600)
    log = tmp_path / "log"
    wait_until(lambda: "Arguments other than the defaults" in log.read_text(), tmp_path)
    os.kill(int((tmp_path / "tasks").read_text()), signal.SIGTERM)
    assert job.wait(timeout=300) == 75, log.read_text()
    assert re.fullmatch(r"requeue \d+\n", (tmp_path / "asked").read_text())


def test_several_processes_that_gain_nothing(submit, tmp_path):
    """Once they have found each other, and before they train, the signal is heard as well."""
    end_at(submit, tmp_path, "Process 0 of 2", "Process 1 of 2", num_tasks=2)
    assert (tmp_path / "log").read_text().count("interrupted before training began; nothing to save") == 2
    assert not (tmp_path / "out").exists()


def end_at(submit, directory: Path, *moments: str, num_tasks: int = 1) -> None:
    """Start a job that is told to end when its log says all of this, and see that it is not queued up again."""
    job = submit(num_tasks)
    wait_until(lambda: all(moment in (directory / "log").read_text() for moment in moments), directory)
    for task in (directory / "tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    assert job.wait(timeout=300) == 75, (directory / "log").read_text()
    assert not (directory / "asked").exists()


def test_a_mistake_does_not_queue_up(submit, tmp_path):
    assert submit(1, "--no_such_flag").wait(timeout=60) == 2
    assert not (tmp_path / "asked").exists()


def test_lines_for_sbatch():
    """They come before the first command, without which SLURM would not read them; each is one flag with a value."""
    lines = BATCH_FILE.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    asked = [line.removeprefix("#SBATCH ") for line in lines[:first_command] if line.startswith("#SBATCH ")]
    assert len(asked) == sum("#SBATCH" in line for line in lines)
    assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", line) for line in asked)
    assert {"--requeue", "--open-mode=append"} <= set(asked)
    (how_soon,) = [line for line in asked if line.startswith("--signal=")]
    assert re.fullmatch(r"--signal=TERM@\d+", how_soon), "with B: the batch file would be told, and not the processes"
