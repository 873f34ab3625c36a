# SPDX-License-Identifier: Apache-2.0
"""The training state on disk: saved in the background, verified, rotated, restored; and what it must be restored with."""

import concurrent.futures
import contextlib
import copy
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from transformers import PreTrainedTokenizerBase

from flaxlm import arguments, cli, files, hub, identity, outputs, sharding, weights

logger = logging.getLogger(__name__)


@jax.jit
def copy_on_devices(tree):
    return jax.tree.map(jnp.copy, tree)


def gather(array: jax.Array) -> jax.Array | np.ndarray:
    """An array as process 0 can write it: what is spread over several processes goes there, so all must call this."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return array
    return multihost_utils.process_allgather(array, tiled=True)


def to_numpy(array: jax.Array | np.ndarray) -> np.ndarray:
    """The whole of it, from one device if it lies there."""
    return np.asarray(array.addressable_data(0) if isinstance(array, jax.Array) and array.is_fully_replicated else array)


class NotSavedError(cli.Accident):
    """Training has ended, but its result is not where it should be."""


class Saver:
    """Writes training state and model in the background, one save at a time; uploads follow if there is a Hub.

    The training state goes to `checkpoint-<step>`, complete or not at all, and the newest `save_total_limit` are kept.
    """

    def __init__(
        self,
        training_args: arguments.TrainingArguments,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        identity: Mapping[str, Any],
        uploads: hub.Hub | None,
    ):
        self.args, self.model, self.tokenizer, self.identity, self.hub = training_args, model, tokenizer, identity, uploads
        self.checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self.executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="save")
        self.job: concurrent.futures.Future | None = None
        self.saved_step: int | None = None
        self.resumed_step: int | None = None
        self.failed = False

    def save(self, step: int, state: sharding.TrainState, progress: Mapping[str, Any], best_step: int | None = None) -> None:
        """Copy the state, then write it in the background. A failure is reported; what was saved before stays.

        Of older checkpoints that of `best_step` is kept too.
        """
        if step == self.saved_step:
            return
        self.wait()
        self.saved_step, self.failed = step, False
        logger.info("Saving step %d to %s", step, self.args.output_dir)
        path = os.path.abspath(outputs.checkpoint_path(self.args.output_dir, step))
        progress = copy.deepcopy(dict(progress)) | {"step": step, "identity": self.identity}  # written while training goes on
        contents = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        try:
            if step != self.resumed_step:
                self.checkpointer.save(path, args=contents, force=True)
            # The next step overwrites the weights in place, so the writer needs a copy; the devices make it.
            self.job = self.executor.submit(self.write, jax.tree.map(gather, copy_on_devices(state.params)), best_step)
        except Exception as error:
            self.report_failure(error)

    def resume(self, step: int) -> None:
        """The checkpoint that is resumed from, if it is one of output_dir, is not written over."""
        if os.path.isdir(outputs.checkpoint_path(self.args.output_dir, step)):
            self.resumed_step = step

    def write(self, params, best_step: int | None) -> None:
        """Runs in the background: model files, then the end of the training state; then old ones go, and an upload begins."""
        try:
            self.write_model(params)
        finally:
            self.checkpointer.wait_until_finished()
        if jax.process_index() == 0:
            write_checksums(outputs.checkpoint_path(self.args.output_dir, self.saved_step))
            for step, path in outputs.find_checkpoints(self.args.output_dir)[self.args.save_total_limit :]:
                if step != best_step:
                    shutil.rmtree(path, ignore_errors=True)
        if self.hub:
            self.hub.push(self.saved_step)

    def write_model(self, params) -> None:
        """What people load, from weights that `gather` has brought together."""
        if jax.process_index() == 0:
            params = jax.tree.map(to_numpy, params)
            weights.save_model(self.args.output_dir, self.model, params, self.tokenizer, self.args.save_safetensors)

    def choose(self, step: int, params: Any) -> None:
        """Make the weights of an earlier checkpoint the model; `params` says their shapes. A failure is reported."""
        path = os.path.abspath(outputs.checkpoint_path(self.args.output_dir, step))
        try:
            check_checksums(path)
            self.write_model(read_params(path, params))
        except Exception as error:
            self.failed = True
            logger.error("The weights of step %d could not be made the model: %s", step, cli.first_line(error))

    def wait(self) -> None:
        """Wait until the last save is on disk."""
        try:
            if self.job:
                self.job.result()
        except Exception as error:
            self.report_failure(error)
        self.job = None

    def report_failure(self, error: Exception) -> None:
        self.failed = True
        code = re.search(r"os_error_code='(\d+)'", str(error))  # somewhere in a long line about orbax's files
        reason = os.strerror(int(code[1])) if code else cli.first_line(error)
        logger.error("Step %d could not be saved: %s. %s.", self.saved_step, reason, self.what_is_there())
        half_written = outputs.checkpoint_path(self.args.output_dir, self.saved_step) + outputs.TEMPORARY_SUFFIX
        shutil.rmtree(half_written, ignore_errors=True)

    def check(self) -> None:
        """Raise NotSavedError if the last state did not get to the disk."""
        if self.failed:
            raise NotSavedError(
                f"the state after the last step was not saved in {self.args.output_dir}; the log says why."
                f" {self.what_is_there()}"
            )

    def what_is_there(self) -> str:
        found = outputs.find_checkpoints(self.args.output_dir)
        steps = ", ".join(str(step) for step, _ in found[::-1])
        return f"What was saved before is untouched: step {steps}" if found else "Nothing has been saved so far"


CHECKSUMS = "checksums.json"


def write_checksums(path: str) -> None:
    """Note the checksum of each file of a checkpoint, so that damage is noticed that would still load."""
    files.write_json(os.path.join(path, CHECKSUMS), file_checksums(path))


def file_checksums(path: str) -> dict[str, int]:
    """CRC-32 of all files below a directory, by relative name."""
    checksums = {}
    for file in sorted(Path(path).rglob("*")):
        if file.is_file() and not file.name.startswith(CHECKSUMS):
            checksum = 0
            with file.open("rb") as stream:
                while part := stream.read(2**22):
                    checksum = zlib.crc32(part, checksum)
            checksums[str(file.relative_to(path))] = checksum
    return checksums


class DamagedError(Exception):
    """A checkpoint is not what was written."""


def check_checksums(path: str) -> bool:
    """Raise DamagedError if a file is not what it was; False if a run killed right after its save has left no checksums."""
    noted = Path(path, CHECKSUMS)
    if not noted.exists():
        return False
    found = file_checksums(path)
    try:
        wanted = json.loads(noted.read_text("utf-8")).items()
    except (ValueError, AttributeError):
        raise DamagedError(f"{CHECKSUMS} is not what was written") from None
    for name, checksum in wanted:
        if found.get(name) != checksum:
            raise DamagedError(f"{name} is {'not what was written' if name in found else 'missing'}")
    return True


def restore(
    resume_from: str, output_dir: str, state: sharding.TrainState, current: identity.Identity
) -> tuple[sharding.TrainState, dict[str, Any], str]:
    """Read the checkpoint to go on from, (state, progress, path); where the newest is damaged, the one before it."""
    source = os.path.abspath(output_dir if resume_from == "latest" else resume_from)
    if not os.path.isdir(source):
        cli.fail(f"--resume_from_checkpoint {source}: no such directory")
    paths = [source] if outputs.is_checkpoint(Path(source)) else [path for _, path in outputs.find_checkpoints(source)]
    anew = "to start anew, put --overwrite_output_dir in the flag's place"
    if not paths:
        cli.fail(f"--resume_from_checkpoint: there is no checkpoint in {source}; {anew}")
    for path in paths:
        try:
            return *read_checkpoint(path, state, current), path
        except DamagedError as damage:
            logger.warning("%s is damaged and passed over: %s", path, cli.first_line(damage)[:200])
            if jax.process_index() == 0 and len(paths) > 1:
                set_aside(path)
    cli.fail(f"--resume_from_checkpoint: no checkpoint in {source} can be read; {anew}")


def take_along(step: int | None, source: str, output_dir: str) -> None:
    """Copy a checkpoint that may be needed at the end, the best so far, where a run goes on in another directory."""
    if step is None or jax.process_index() > 0 or os.path.isdir(outputs.checkpoint_path(output_dir, step)):
        return
    if os.path.isdir(path := outputs.checkpoint_path(source, step)):
        logger.info("Copying the best state so far, of step %d, from %s", step, source)
        with files.replacing_directory(outputs.checkpoint_path(output_dir, step)) as temporary:
            shutil.copytree(path, temporary, dirs_exist_ok=True)


def set_aside(path: str) -> None:
    """Rename a damaged checkpoint, so that it does not count as the newest; where nothing may be renamed it stays."""
    with contextlib.suppress(OSError):
        os.replace(path, f"{path}.damaged")


def read_checkpoint(
    path: str, state: sharding.TrainState, current: identity.Identity
) -> tuple[sharding.TrainState, dict[str, Any]]:
    """(state, progress) of one checkpoint, in the shapes and places of `state`; changes that are allowed are noted.

    Raises:
        DamagedError: it is not what was written.
        Accident: it is, and cannot be read all the same: the checkpoint is not to blame.
    """
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    verified = False
    try:
        verified = check_checksums(path)
        progress = checkpointer.restore(path, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]
        check_progress(progress)
        changes = identity.compare(progress["identity"], current, progress["step"], path)
        progress["changes"] = progress.get("changes", []) + [{"step": progress["step"], "changes": changes}] * bool(changes)
        contents = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        return checkpointer.restore(path, args=contents)["state"], progress
    except (DamagedError, cli.Ending):
        raise
    except Exception as error:
        if verified or isinstance(error, PermissionError):
            raise cli.Accident(f"{path} cannot be read, though its files are whole: {cli.first_line(error)}") from error
        raise DamagedError(cli.first_line(error)) from error


def read_params(path: str, params: Any) -> Any:
    """The weights of a checkpoint, on the host and without the rest of its state; `params` says their names and shapes."""
    contents = {"params": jax.tree.map(ocp.utils.to_shape_dtype_struct, params)}
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), contents)
    wanted = ocp.args.PyTreeRestore(item=contents, restore_args=on_host, partial_restore=True)
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(os.path.join(path, "state"), args=wanted)["params"]


NUMBER = (int, float)
PROGRESS = {
    "step": int, "identity": dict, "window": list, "curve": list, "evaluations": dict, "positions": list,
    **dict.fromkeys(("window_started", "loss_sum", "weight_sum", "num_tokens", "train_time"), NUMBER),
}  # fmt: skip


LOGGED = ("step", "tokens", "loss", "weight", "grad_norm", "learning_rate")  # of each step in the window


def holds_numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, NUMBER) for value in values)


def check_progress(progress: Any) -> None:
    """Raise DamagedError if it is not what `Run.save` writes; JSON tells nothing of that."""
    for name, kind in PROGRESS.items():
        if not isinstance(progress, dict) or not isinstance(progress.get(name), kind) or isinstance(progress[name], bool):
            raise DamagedError(f"its progress holds no {name}")
    window, curve, positions = progress["window"], progress["curve"], progress["positions"]
    rows_by_corpus = progress.get("rows_by_corpus", {})  # of a mixture; not in checkpoints of before there were any
    parts = {
        "step": progress["step"] >= 0,
        "window": all(isinstance(point, dict) and holds_numbers(map(point.get, LOGGED)) for point in window),
        "curve": all(isinstance(pair, list) and len(pair) == 2 and holds_numbers(pair) for pair in curve),
        "evaluations": all(
            step.isdecimal() and isinstance(metrics, dict) and holds_numbers(metrics.values())
            for step, metrics in progress["evaluations"].items()
        ),
        "rows_by_corpus": isinstance(rows_by_corpus, dict) and holds_numbers(rows_by_corpus.values()),
        "positions": len(positions) > 0 and all(p is None or isinstance(p, dict) for p in positions),
    }
    for name, is_right in parts.items():
        if not is_right:
            raise DamagedError(f"{name} in its progress is not what was written")
