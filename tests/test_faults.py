# SPDX-License-Identifier: Apache-2.0
"""Real processes killed at random moments, over and over: the end is what it would have been. `make test-faults`."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import run_mlm_flax as script
from flaxlm import outputs
from tests.test_checkpoints import outcome
from tests.test_streams import assert_same_run

pytestmark = pytest.mark.faults

NUM_KILLS = 20
NUM_STEPS = 600  # so many that the run is not over before the last kill
FLAGS = [
    "--max_seq_length", 32, "--max_steps", NUM_STEPS, "--warmup_steps", 20, "--learning_rate", 1e-3, "--logging_steps", 7,
    "--eval_steps", 25, "--save_steps", 4, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2,
    "--load_best_model_at_end",
    "--config_overrides", "num_hidden_layers=1,hidden_dropout_prob=0.1,attention_probs_dropout_prob=0.1",
]  # fmt: skip


def start(flags: list, output_dir: Path, stderr: Path) -> subprocess.Popen:
    """The same command for the first and every later start."""
    command = [sys.executable, script.__file__, *map(str, flags), "--output_dir", str(output_dir)]
    command += ["--resume_from_checkpoint", "auto"]
    with stderr.open("w") as file:
        return subprocess.Popen(command, stderr=file)


def half_written(output_dir: Path) -> list[Path]:
    return [path for pattern in (f"*{outputs.TEMPORARY_SUFFIX}", ".saving-*") for path in output_dir.glob(pattern)]


def wait_for_lines(process: subprocess.Popen, stderr: Path, text: str, number: int) -> None:
    """Wait until so many lines with this text have been said."""
    while stderr.read_text().count(text) < number:
        assert process.poll() is None, stderr.read_text()
        time.sleep(0.001)


def kill_and_resume_until_done(flags: list, output_dir: Path, stderr: Path, rng: random.Random) -> int:
    """Kill NUM_KILLS times, then let it end; every other kill comes while a save is, probably, being written.

    The others come after any line of the log, from the first on. Returns how many kills left something half-written.
    """
    num_half_written = 0
    for number in range(NUM_KILLS):
        process = start(flags, output_dir, stderr)
        if number % 2:
            wait_for_lines(process, stderr, " INFO Saving step ", rng.randint(1, 3))
            time.sleep(rng.uniform(0, 0.1))
        else:
            wait_for_lines(process, stderr, "\n", rng.randint(1, 25))
            time.sleep(rng.uniform(0, 0.3))
        process.kill()
        assert process.wait() < 0, f"over before kill {number}: {stderr.read_text()}"
        num_half_written += bool(half_written(output_dir))
    process = start(flags, output_dir, stderr)
    assert process.wait() == 0, stderr.read_text()
    return num_half_written


STREAM = ["--streaming", "--shuffle_buffer_size", 50, "--num_eval_samples", 20]
WIDER = "num_hidden_layers=1,hidden_size=128,intermediate_size=256,hidden_dropout_prob=0.1"
SPREAD = ["--fsdp", "--per_device_train_batch_size", 1, "--config_overrides", WIDER]  # over four devices


@pytest.mark.parametrize("more_flags", [[], STREAM, SPREAD], ids=["rows on disk", "stream", "spread"])
def test_killed_twenty_times(more_flags, roberta_dir, corpus, tmp_path, monkeypatch):
    """Weights, optimizer state and all logged values equal those of a run that nobody disturbed, bit for bit."""
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={4 if more_flags is SPREAD else 1}")
    flags = ["--config_name", roberta_dir, "--tokenizer_name", roberta_dir, "--train_file", corpus, *FLAGS, *more_flags]
    seed = int(os.environ.get("FAULTS_SEED", 0))
    num_half_written = kill_and_resume_until_done(flags, tmp_path / "killed", tmp_path / "stderr.txt", random.Random(seed))
    assert num_half_written > 0
    assert start(flags, tmp_path / "undisturbed", tmp_path / "stderr.txt").wait() == 0
    if more_flags is SPREAD:  # its state cannot be read in this process, which has one device
        assert_same_run(tmp_path / "undisturbed", tmp_path / "killed")
    else:
        assert outcome(tmp_path / "killed") == outcome(tmp_path / "undisturbed")
