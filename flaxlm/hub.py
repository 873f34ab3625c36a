# SPDX-License-Identifier: Apache-2.0
"""Uploads to the Hugging Face Hub, in the background."""

import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub

from flaxlm import addresses, arguments, cli, outputs, processes

logger = logging.getLogger(__name__)


class NotUploadedError(cli.Accident):
    """Training has ended, but its result is not on the Hub."""


def connect(training_args: arguments.TrainingArguments) -> "Hub | None":
    """The repository to upload to, created if need be; None if nothing is to be uploaded, or by another process."""
    return Hub(training_args) if training_args.push_to_hub and processes.is_main() else None


class Hub:
    """Uploads to the Hugging Face Hub in the background, one at a time; training never waits for them.

    A failed upload is tried again, then reported; the next one brings everything that it would have brought.
    """

    NUM_TRIES = 5
    TIMEOUT = 120.0  # seconds without an answer after which a request counts as failed

    def __init__(self, training_args: arguments.TrainingArguments):
        self.args, self.failed, self.thread = training_args, False, None
        name = training_args.hub_model_id or os.path.basename(os.path.abspath(training_args.output_dir))
        huggingface_hub.set_client_factory(client_factory(self.TIMEOUT))
        self.api = huggingface_hub.HfApi(token=training_args.hub_token)
        try:
            url = self.api.create_repo(name, private=training_args.hub_private_repo or None, exist_ok=True)
            self.repo_id = url.repo_id
            self.api.auth_check(self.repo_id, write=True)  # one that is there already is no error, whoever it belongs to
        except Exception as error:  # of the client, and of the library that it talks with
            cli.fail(f"--push_to_hub: the repository {name} cannot be created: {self.describe(error)}")
        logger.info("Uploading to %s", url)

    def push(self, step: int, final: bool = False, stop: processes.StopSignal | None = None) -> None:
        """Upload what output_dir holds now; while an upload is under way only the final one waits for it and follows.

        Raises:
            Stopped: `stop` was requested while the final upload went on; what was uploaded before is on the Hub.
        """
        if final:
            logger.info("Uploading to the Hub: the last state")
            self.join(stop)
        elif (self.thread and self.thread.is_alive()) or self.args.hub_strategy == "end":
            return
        self.thread = threading.Thread(target=self.upload, args=(step, self.snapshot(step), final), name="upload", daemon=True)
        self.thread.start()
        if final:
            self.join(stop)

    def join(self, stop: processes.StopSignal | None) -> None:
        """Wait for the upload that is under way, or for the signal to stop."""
        before = stop.requested if stop else 0
        while self.thread and self.thread.is_alive():
            self.thread.join(0.2)
            if stop and stop.requested != before:
                advice = f"the files are all here, to upload them: {self.by_hand()}"
                raise processes.Stopped(stop.requested, advice, stop.has_gained)

    def snapshot(self, step: int) -> tempfile.TemporaryDirectory:
        """The files to upload as they are now: linked, since training replaces them whole; events copied, since they grow."""
        source = Path(self.args.output_dir)
        snapshot = tempfile.TemporaryDirectory(dir=source, prefix=".saving-")
        for path in source.iterdir():
            if path.is_file() and not path.name.startswith((".saving-", outputs.LOCK_FILE)):
                copy_file = shutil.copy2 if path.name.startswith("events.out.tfevents") else os.link
                copy_file(path, os.path.join(snapshot.name, path.name))
        checkpoint = outputs.checkpoint_path(self.args.output_dir, step)
        if self.args.hub_strategy == "checkpoint" and os.path.isdir(checkpoint):
            shutil.copytree(checkpoint, os.path.join(snapshot.name, "last-checkpoint"), copy_function=os.link)
        return snapshot

    def upload(self, step: int, snapshot: tempfile.TemporaryDirectory, final: bool) -> None:
        message = f"Step {step}, the last of this run" if final else f"Step {step}"
        with snapshot:
            for attempt in range(self.NUM_TRIES):
                try:
                    self.api.create_commit(self.repo_id, self.changes(snapshot.name), commit_message=message)
                    self.failed = False
                    return
                except Exception as error:
                    self.failed = True
                    logger.warning("Upload of step %d failed: %s", step, self.describe(error))
                    if not self.is_temporary(error) or attempt == self.NUM_TRIES - 1:
                        break
                    time.sleep(min(2.0**attempt, 30))
        logger.error("Step %d is not on the Hub; training goes on. By hand: %s", step, self.by_hand())

    def changes(self, directory: str) -> list[huggingface_hub.CommitOperationAdd | huggingface_hub.CommitOperationDelete]:
        """All files of a directory as one commit, which does away with an older training state too.

        Not upload_folder, which may make several commits: who fetches the repository between two would get a torn state.
        """
        paths = {path.relative_to(directory).as_posix(): str(path) for path in Path(directory).rglob("*") if path.is_file()}
        changes = [huggingface_hub.CommitOperationAdd(name, path) for name, path in sorted(paths.items())]
        if self.args.hub_strategy == "checkpoint":
            there = self.api.list_repo_files(self.repo_id)
            gone = [name for name in there if name.startswith("last-checkpoint/") and name not in paths]
            changes += [huggingface_hub.CommitOperationDelete(name) for name in gone]
        return changes

    def check(self) -> None:
        """Raise NotUploadedError if the last upload failed."""
        if self.failed:
            raise NotUploadedError(f"the last upload failed; the files are all here, to upload them: {self.by_hand()}")

    def by_hand(self) -> str:
        return f"hf upload {self.repo_id} {self.args.output_dir} . --exclude 'checkpoint-*' '.saving-*' 'plugins/*' 'wandb/*'"

    @staticmethod
    def describe(error: BaseException) -> str:
        """The reason in a line; the client hides it behind errors of its own."""
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        reason = {401: "the token is wrong or missing", 403: "the token may not write there"}.get(status, cli.first_line(cause))
        return f"{reason} (HTTP {status})" if status else reason

    @staticmethod
    def is_temporary(error: BaseException) -> bool:
        """Is it worth trying again: no answer, a server in trouble, too many requests?"""
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return status in (408, 429) or status >= 500
        is_gateway = isinstance(cause, json.JSONDecodeError)  # which answers in HTML, where the client reads JSON
        return is_gateway or addresses.is_about_network(cause)


def client_factory(seconds: float) -> Callable[[], Any]:
    """What makes the client's connections: as by default, but a request without an answer for so long counts as failed.

    By default it waits without end, and some calls ask for that themselves.
    """
    default = huggingface_hub.get_session()
    hooks = default.event_hooks["request"]

    def limit(request: Any) -> None:
        asked = request.extensions.get("timeout") or {}
        names = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {name: asked.get(name) or seconds for name in names}

    return lambda: type(default)(event_hooks={"request": [*hooks, limit]}, follow_redirects=True, timeout=None)
