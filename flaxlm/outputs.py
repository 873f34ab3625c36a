# SPDX-License-Identifier: Apache-2.0
"""What lies in output_dir: whose it is, making it ready, checkpoints in it."""

import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from flaxlm import arguments, cli, processes, profiles

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)
TEMPORARY_SUFFIX = ".orbax-checkpoint-tmp"  # of a checkpoint that is being written
CARD_TAG = "generated_from_script"  # stands in every model card of ours


class OutputDir:
    """output_dir while a run is writing to it: a second run is refused until this one has ended, however it ended."""

    def __init__(self, training_args: arguments.TrainingArguments):
        """Create it if need be, and remove what of an earlier run would pass for results of this one."""
        self.args, self.path, self.lock = training_args, training_args.output_dir, None
        with processes.main_first():
            if processes.is_main():
                create(self.path)
                self.lock = lock(self.path, patience(training_args))
                if self.lock is None:
                    logger.warning("%s cannot be locked: nothing keeps another run from writing there too.", self.path)
                if training_args.do_train:
                    refuse_files_of_others(self.path)
        if training_args.resume_from_checkpoint == AUTO:  # decided here, where nobody else can change what is there
            goes_on = training_args.do_train and bool(processes.is_main() and found_checkpoints(self.path))
            goes_on = processes.gather_json(goes_on)[0]
            training_args.resume_from_checkpoint = "latest" if goes_on else None
            if training_args.do_train:
                logger.info("Going on from a checkpoint." if goes_on else "There is no checkpoint to go on from: starting.")
        if processes.is_main():
            remove(stale_files(training_args))

    def close(self) -> None:
        if self.lock is not None:
            release(self.lock, self.path)
            self.lock = None


def create(directory: str) -> None:
    """Make a directory if need be; one that cannot be written to is refused."""
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        cli.fail(f"--output_dir {directory}: cannot be written to: {error.strerror}")


# ---- The lock ------------------------------------------------------------------------------------------------------------

AUTO = "auto"  # --resume_from_checkpoint: go on if there is a checkpoint, else start
PATIENCE = 60.0  # seconds that a run with AUTO waits for the one before it, which may be saving
LOCK_FILE = ".lock"  # where a directory itself cannot be locked, as on NFS; it says nothing by being there


def patience(training_args: arguments.TrainingArguments) -> float:
    return PATIENCE if training_args.resume_from_checkpoint == AUTO else 0.0


def lock(directory: str, patience: float = 0.0, shared: bool = False) -> int | None:
    """Hold a directory until `release`, or the process dies; None where the system has no such locks.

    Where another run holds it that is waited for as many seconds as `patience` says; one that is removed meanwhile is made
    again. `shared` lets others in that are too, and makes nothing.
    """
    deadline, said = time.monotonic() + max(patience, 0.5), False  # who only asks holds it for a moment
    while True:
        try:
            return try_to_lock(directory, shared)
        except FileNotFoundError:
            if shared:
                return None
            create(directory)
            continue
        except BlockingIOError:
            if time.monotonic() >= deadline:
                waited = f", after {patience:.0f} seconds still" if patience else ""
                remedy = "wait for its end, or name another directory"
                cli.fail(f"--output_dir {directory}: another run is writing there{waited}; {remedy}")
        if patience and not said:
            logger.info("Another run is writing to %s: waiting up to %.0f seconds for its end ...", directory, patience)
            said = True
        time.sleep(0.1)


def try_to_lock(directory: str, shared: bool) -> int | None:
    """As `lock`, and at once.

    Raises:
        BlockingIOError: another run holds it.
        FileNotFoundError: it is not there.
    """
    if fcntl is None:
        return None
    for path, flags in ((directory, os.O_RDONLY), (os.path.join(directory, LOCK_FILE), os.O_RDWR | os.O_CREAT)):
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileNotFoundError:
            raise
        except OSError:  # a file where nothing may be written
            continue
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                raise FileNotFoundError  # removed, and made anew by somebody else
            return descriptor
        except (BlockingIOError, FileNotFoundError):
            os.close(descriptor)
            raise
        except OSError:  # of this kind there are no locks here
            os.close(descriptor)
    return None


def release(descriptor: int, directory: str) -> None:
    """Let others have it; a file that was locked goes, while it still is."""
    path = os.path.join(directory, LOCK_FILE)
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            os.unlink(path)
    os.close(descriptor)


def check_free(training_args: arguments.TrainingArguments) -> None:
    """Refuse a directory that another run holds, before anything is loaded; processes of one run may all ask at a time."""
    directory = training_args.output_dir
    if (descriptor := lock(directory, patience(training_args), shared=True)) is not None:
        release(descriptor, directory)


def is_occupied(directory: str) -> bool:
    return os.path.isdir(directory) and not {LOCK_FILE}.issuperset(os.listdir(directory))


def check_resumable(directory: str) -> None:
    """Refuse to start, for want of a checkpoint, where there is something that a run which was cut short does not leave."""
    if found_checkpoints(directory):
        return
    remedy = "name another directory, or add --overwrite_output_dir to start anew in this one"
    if not holds_training_record(directory):
        cli.fail(f"--resume_from_checkpoint auto: {directory} is not empty and holds no run of ours; {remedy}")
    if Path(directory, "train_results.json").exists():
        cli.fail(f"--resume_from_checkpoint auto: {directory} holds a finished run without its checkpoints; {remedy}")


def goes_on(training_args: arguments.TrainingArguments) -> bool:
    """Will it train on from a checkpoint, as far as that can be seen before output_dir is held?"""
    path = training_args.output_dir
    is_there = training_args.resume_from_checkpoint == AUTO and os.path.isdir(path) and bool(found_checkpoints(path))
    return is_there or training_args.resume_from_checkpoint not in (None, AUTO)


def found_checkpoints(directory: str) -> list[str]:
    """Names of checkpoints of ours, be they damaged: that none can be read must not mean that there was none."""
    names = (name for name in os.listdir(directory) if re.fullmatch(r"checkpoint-\d+(\.damaged)?", name))
    return [name for name in names if is_checkpoint(Path(directory, name))]


# ---- Whose files ---------------------------------------------------------------------------------------------------------


def refuse_files_of_others(directory: str) -> None:
    """A run replaces README.md and config.json: only its own card, and the configuration of a model."""
    card, config = Path(directory, "README.md"), Path(directory, "config.json")
    if card.exists() and CARD_TAG not in card.read_text("utf-8", errors="replace"):
        cli.fail(f"--output_dir {directory}: README.md in it is no model card of ours and would be replaced; move it")
    for path in sorted(Path(directory).glob("checkpoint-*")):
        if re.fullmatch(r"checkpoint-\d+", path.name) and not (path.is_symlink() or is_checkpoint(path)):
            cli.fail(
                f"--output_dir {directory}: {path.name} in it is no checkpoint of ours; move it, or name another directory"
            )
    if config.exists() and "model_type" not in read_json_object(config):
        cli.fail(f"--output_dir {directory}: config.json in it is of no model and would be replaced; name another one")


def read_json_object(path: Path) -> dict:
    """What a JSON file holds, if that is an object; else an empty one."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def holds_training_record(directory: str) -> bool:
    """Has a script of ours trained in this directory?"""
    record = read_json_object(Path(directory, "run_info.json"))
    return {"script", "arguments", "versions"} <= record.keys()


def is_checkpoint(path: Path) -> bool:
    """Is it a training state that we wrote, be it damaged?"""
    parts = ("state", "progress", "checksums.json", "_CHECKPOINT_METADATA")
    return path.is_dir() and not path.is_symlink() and any((path / part).exists() for part in parts)


def stale_files(training_args: arguments.TrainingArguments) -> Iterator[Path]:
    """What of an earlier run must not be taken for this one's: what it half wrote, and if this one starts anew its results."""
    directory = Path(training_args.output_dir)
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".saving-") or re.fullmatch(rf"checkpoint-\d+{re.escape(TEMPORARY_SUFFIX)}", path.name):
            yield path
    if training_args.resume_from_checkpoint:
        return
    if not training_args.do_train:
        yield from (path for name in ("eval_results.json", "samples.json") if (path := directory / name).exists())
        return
    for path in sorted(directory.glob("checkpoint-*")):
        if re.fullmatch(r"checkpoint-\d+(\.damaged)?", path.name) and (path.is_symlink() or is_checkpoint(path)):
            yield path
    if holds_training_record(training_args.output_dir):
        yield from sorted(directory.glob("events.out.tfevents.*"))
        yield from (path for path in [directory / profiles.DIRECTORY] if path.is_dir())
        yield from (path for name in RESULTS if (path := directory / name).exists())


RESULTS = ("run_info.json", "train_results.json", "eval_results.json", "eval_info.json", "samples.json", "training_curves.png")


def remove(paths: Iterator[Path]) -> None:
    """Remove files, directories and links (not what they lead to), and say which."""
    removed = []
    for path in list(paths):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        removed.append(path.name)
    if shown := [name for name in removed if not name.startswith(".saving-")]:
        logger.info("Removed what an earlier run left: %s", ", ".join(shown))


# ---- Checkpoints ---------------------------------------------------------------------------------------------------------


def checkpoint_path(output_dir: str, step: int) -> str:
    return os.path.join(output_dir, f"checkpoint-{step}")


def find_checkpoints(directory: str) -> list[tuple[int, str]]:
    """The checkpoints of ours in a directory, (step, path), newest first; half-written ones have another name."""
    found = (re.fullmatch(r"checkpoint-(\d+)", name) for name in os.listdir(directory))
    paths = [(int(match[1]), os.path.join(directory, match[0])) for match in found if match]
    return sorted((item for item in paths if is_checkpoint(Path(item[1]))), reverse=True)
