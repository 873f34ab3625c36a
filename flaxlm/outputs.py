# SPDX-License-Identifier: Apache-2.0
"""What lies in output_dir: names, making it ready, checkpoints in it."""

import os
import re
import shutil
import tempfile
from pathlib import Path

from flaxlm import arguments, cli, processes

TEMPORARY_SUFFIX = ".orbax-checkpoint-tmp"  # of a checkpoint that is being written


def prepare(training_args: arguments.TrainingArguments) -> None:
    """Create the output directory; of an earlier run in it, remove what would pass for results of this one."""
    with processes.main_first():
        prepare_here(training_args)


def prepare_here(training_args: arguments.TrainingArguments) -> None:
    try:
        os.makedirs(training_args.output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=training_args.output_dir):
            pass
    except OSError as error:
        cli.fail(f"--output_dir {training_args.output_dir}: cannot be written to: {error.strerror}")
    stale = [f"*{TEMPORARY_SUFFIX}", ".saving-*"]
    if not training_args.resume_from_checkpoint:
        stale += ["eval_results.json", "run_info.json"]
        if training_args.do_train:
            stale += ["train_results.json", "events.out.tfevents.*", "checkpoint-*"]
    for pattern in stale:
        for path in Path(training_args.output_dir).glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def checkpoint_path(output_dir: str, step: int) -> str:
    return os.path.join(output_dir, f"checkpoint-{step}")


def find_checkpoints(directory: str) -> list[tuple[int, str]]:
    """The complete checkpoints of a directory, (step, path), newest first."""
    found = (re.fullmatch(r"checkpoint-(\d+)", name) for name in os.listdir(directory))
    return sorted(((int(match[1]), os.path.join(directory, match[0])) for match in found if match), reverse=True)
