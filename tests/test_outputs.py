# SPDX-License-Identifier: Apache-2.0
"""output_dir: one run at a time, and files that are not ours stay."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flaxlm import arguments, command_line, files, outputs
from tests.conftest import ROOT, read_events, run


@pytest.fixture
def training_args(tmp_path) -> arguments.TrainingArguments:
    return arguments.TrainingArguments(output_dir=str(tmp_path / "run"), do_train=True, overwrite_output_dir=True)


def write_checkpoint(path: Path) -> Path:
    (path / "state").mkdir(parents=True)
    return path


def enter(training_args: arguments.TrainingArguments) -> set[str]:
    """What is in the directory after a run has made it ready."""
    place = outputs.OutputDir(training_args)
    place.close()
    return set(os.listdir(training_args.output_dir))


def write_run(directory: Path) -> None:
    """What a run of ours leaves."""
    write_checkpoint(directory / "checkpoint-5")
    files.write_json(str(directory / "run_info.json"), {"script": "x", "arguments": {}, "versions": {}})
    for name in ("train_results.json", "eval_results.json", "events.out.tfevents.1.host"):
        (directory / name).write_text("{}")


def test_what_an_earlier_run_wrote_goes(training_args, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(outputs.logger.parent, "propagate", True)
    caplog.set_level("INFO")
    write_run(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").write_text("replaced later, whole")
    assert enter(training_args) == {"model.safetensors"}
    assert "Removed what an earlier run left: checkpoint-5, events.out.tfevents.1.host, run_info.json" in caplog.text


def test_names_like_ours_stay(training_args, tmp_path):
    """Directories and files that no run of ours wrote, and TensorBoard's of a directory that is not ours."""
    names = {"checkpoint-best", "checkpoint-notes.md", "checkpoint-5-old", "events.out.tfevents.9.other", "eval_results.json"}
    (tmp_path / "run" / "checkpoint-best").mkdir(parents=True)
    for name in names - {"checkpoint-best"}:
        (tmp_path / "run" / name).write_text("mine")
    assert enter(training_args) == names


def test_a_link_goes_and_its_target_stays(training_args, tmp_path):
    write_checkpoint(tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-5").symlink_to(tmp_path / "elsewhere")
    assert enter(training_args) == set()
    assert (tmp_path / "elsewhere" / "state").is_dir()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("README.md", "# My project", "README.md in it is no model card of ours"),
        ("config.json", '{"debug": true}', "config.json in it is of no model"),
        ("config.json", "[1]", "config.json in it is of no model"),
        ("checkpoint-7/notes.txt", "mine", "checkpoint-7 in it is no checkpoint of ours"),
    ],
)
def test_files_of_a_project_are_not_replaced(name, text, message, training_args, tmp_path, refuses):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with refuses(message):
        outputs.OutputDir(training_args)
    assert path.read_text() == text


def test_a_model_directory_may_be_trained_in(training_args, tmp_path):
    """Its configuration, and a card of ours, are what a run replaces."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"model_type": "roberta"}')
    (tmp_path / "run" / "README.md").write_text(f"---\ntags: [{outputs.CARD_TAG}]\n---\n")
    assert enter(training_args) == {"config.json", "README.md"}


def test_rotation_leaves_directories_of_others(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    write_checkpoint(tmp_path / "checkpoint-4")
    assert outputs.find_checkpoints(str(tmp_path)) == [(4, str(tmp_path / "checkpoint-4"))]


def test_a_temporary_name_cannot_be_foreseen(tmp_path):
    """A link under the name that one would guess is not written through; and what fails leaves nothing."""
    (tmp_path / "target").write_text("mine")
    for name in ("README.md.tmp", "README.md"):
        (tmp_path / name).symlink_to(tmp_path / "target")
    files.write_text(str(tmp_path / "README.md"), "new")
    assert (tmp_path / "target").read_text() == "mine"
    assert (tmp_path / "README.md").read_text() == "new"
    assert (tmp_path / "README.md").stat().st_mode & 0o777 == 0o666 & ~umask()
    with pytest.raises(ZeroDivisionError), files.replacing(str(tmp_path / "README.md")):
        raise ZeroDivisionError
    assert {path.name for path in tmp_path.iterdir()} == {"target", "README.md", "README.md.tmp"}


def umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


def test_a_second_run_is_refused(training_args, refuses):
    first = outputs.OutputDir(training_args)
    with refuses("run: another run is writing there"):
        outputs.OutputDir(training_args)
    first.close()
    outputs.OutputDir(training_args).close()


def test_a_requeued_run_waits_for_the_one_before_it(training_args, monkeypatch, caplog, refuses):
    """With --resume_from_checkpoint auto, as long as it may take to save; then it says so."""
    monkeypatch.setattr(outputs.logger.parent, "propagate", True)
    caplog.set_level("INFO")
    first = outputs.OutputDir(training_args)
    again = dataclasses.replace(training_args, resume_from_checkpoint="auto")
    timer = threading.Timer(1.5, first.close)
    timer.start()
    outputs.check_free(again)
    assert first.lock is None
    assert f"Another run is writing to {training_args.output_dir}: waiting up to 60 seconds for its end" in caplog.text
    second = outputs.OutputDir(again)
    assert again.resume_from_checkpoint is None
    monkeypatch.setattr(outputs, "PATIENCE", 1.0)
    with refuses("run: another run is writing there, after 1 seconds still; wait for its end, or name another directory"):
        outputs.check_free(dataclasses.replace(training_args, resume_from_checkpoint="auto"))
    second.close()


@pytest.fixture
def locks_no_directories(monkeypatch):
    """A file system as NFS, which locks files that are open for writing only."""
    flock = outputs.fcntl.flock

    def refuse_directories(descriptor: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    monkeypatch.setattr(outputs.fcntl, "flock", refuse_directories)


def test_where_directories_cannot_be_locked(locks_no_directories, training_args, refuses, tmp_path):
    """A file in it is, which goes with the lock; left by a run that was killed it is nothing, and is not in anybody's way."""
    auto = dataclasses.replace(training_args, resume_from_checkpoint="auto", overwrite_output_dir=False)
    first = outputs.OutputDir(training_args)
    with refuses("run: another run is writing there"):
        outputs.check_free(training_args)
    with refuses("run: another run is writing there"):
        outputs.OutputDir(training_args)
    first.close()
    assert os.listdir(tmp_path / "run") == []
    outputs.check_free(training_args)
    assert os.listdir(tmp_path / "run") == []
    (tmp_path / "run" / ".lock").touch()
    command_line.check_output_dir(auto)
    assert enter(training_args) == set()
    command_line.check_output_dir(auto)


def test_where_nothing_can_be_locked(training_args, monkeypatch, caplog):
    """That is told, and the run goes on."""
    monkeypatch.setattr(outputs.logger.parent, "propagate", True)

    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(outputs.fcntl, "flock", refuse)
    outputs.check_free(training_args)
    outputs.OutputDir(training_args).close()
    assert "run cannot be locked: nothing keeps another run from writing there too." in caplog.text


@pytest.mark.parametrize("locks", ["directories", "files"])
def test_a_directory_that_is_removed_while_it_is_waited_for(locks, training_args, monkeypatch, request, refuses, tmp_path):
    """It is made again, and what is held is what is there: nobody else comes in."""
    if locks == "files":
        request.getfixturevalue("locks_no_directories")
    first = outputs.OutputDir(training_args)
    again = dataclasses.replace(training_args, resume_from_checkpoint="auto")
    timer = threading.Timer(0.5, shutil.rmtree, [tmp_path / "run"])
    timer.start()
    second = outputs.OutputDir(again)
    assert timer.finished.is_set()
    assert again.resume_from_checkpoint is None
    with refuses("run: another run is writing there"):
        outputs.OutputDir(training_args)
    first.close()  # of a directory that is no more: the lock of the new one is the second's
    with refuses("run: another run is writing there"):
        outputs.OutputDir(training_args)
    second.close()
    outputs.OutputDir(training_args).close()


def test_what_cannot_be_made_or_written_to(training_args, refuses, tmp_path):
    """A line, also if it is seen only while waiting."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "run", "/proc/run"):
        with refuses(f"--output_dir {path}: cannot be written to: "):
            outputs.OutputDir(dataclasses.replace(training_args, output_dir=str(path)))
    outputs.check_free(dataclasses.replace(training_args, output_dir="/proc"))


def test_two_runs_started_together(roberta_dir, corpus, tmp_path):
    """In one fresh directory: one trains, the other is refused in a line; a killed one does not bar the way."""
    flags = ["--config_name", roberta_dir, "--tokenizer_name", roberta_dir, "--train_file", corpus, "--max_seq_length", 32]
    flags += ["--max_steps", 3, "--do_train", "--output_dir", tmp_path / "run"]
    command = [sys.executable, str(ROOT / "run_mlm_flax.py"), *map(str, flags)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ends = sorted((process.communicate(timeout=200)[1], process.returncode)[::-1] for process in both)
    assert [status for status, _ in ends] == [0, 2]
    assert ends[1][1].splitlines()[-1].endswith("another run is writing there; wait for its end, or name another directory")

    killed = subprocess.Popen([*command, "--overwrite_output_dir", "--max_steps", "9999"], stderr=subprocess.PIPE, text=True)
    for line in killed.stderr:
        if "Compiled the training step" in line:
            break
    refused = subprocess.run([*command, "--overwrite_output_dir"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "another run is writing there" in refused.stderr.splitlines()[-1]
    assert "Model:" not in refused.stderr  # before anything is loaded
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    time.sleep(0.1)
    assert subprocess.run([*command, "--overwrite_output_dir"], capture_output=True).returncode == 0


def test_evaluation_alone_leaves_the_record_of_the_training(roberta_dir, corpus, tmp_path):
    flags = ["--train_file", corpus, "--max_eval_samples", 8]
    run(tmp_path, roberta_dir, *flags, "--max_steps", 2)
    record, points = (tmp_path / "run_info.json").read_text(), read_events(tmp_path)
    run(tmp_path, roberta_dir, "--do_eval", "--model_name_or_path", tmp_path, *flags)
    assert (tmp_path / "run_info.json").read_text() == record
    assert read_events(tmp_path) == points
    assert json.loads((tmp_path / "eval_info.json").read_text())["arguments"]["do_eval"]
    assert (tmp_path / "eval_results.json").exists()
