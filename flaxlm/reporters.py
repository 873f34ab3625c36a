# SPDX-License-Identifier: Apache-2.0
"""Where the points of a run go: TensorBoard, Weights & Biases, Trackio. None of them can stop a training."""

import contextlib
import importlib.util
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from transformers import PretrainedConfig

from flaxlm import arguments, cli, processes

logger = logging.getLogger(__name__)
TITLES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "trackio": "Trackio"}
PROJECT = "flaxlm"  # unless --project, or for wandb WANDB_PROJECT, names another
PATIENCE = 120.0  # seconds in which a server may take the last points
START = 90.0  # seconds in which a server may answer before training begins
SILENCE = 5.0  # seconds of waiting for a server after which that is told
LIMITS = {"wandb": ", or those of WANDB_INIT_TIMEOUT"}  # wandb's own is as long


def check(training_args: arguments.TrainingArguments) -> None:
    """Refuse a --report_to that is unknown, or whose package is not installed."""
    names = training_args.report_to.split()
    for name in names:
        if name not in (*TITLES, "none"):
            cli.fail(f"--report_to {name}: unknown; known are {', '.join(TITLES)}, and none")
    if "none" in names and len(names) > 1:
        cli.fail(f"--report_to {' '.join(names)}: none goes with nothing else")
    for name in {"wandb", "trackio"} & set(names):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, as wandb leaves, is no package
            install = f'pip install "flaxlm[{name}]", or from a clone: pip install ".[{name}]"'
            cli.fail(f"--report_to {name}: its package is not installed; {install}")


ASK_WANDB = """
import sys
sys.path[:] = {path}
import wandb
try:
    wandb.login(verify=False)
except (wandb.Error, ValueError) as error:
    print(error)
    sys.exit(3 if isinstance(error, wandb.Error) else 4)
"""


def check_login(training_args: arguments.TrainingArguments, goes_on: bool) -> None:
    """Refuse a run whose points Weights & Biases would not take, for want of a login or by a wrong setting.

    Asked is the client itself, in a process of its own: here it would leave threads, which what is forked afterwards does not
    survive; its server is not. A run that goes on from a checkpoint is not refused, since no reporter may stop a training; nor
    are several processes, of which only one needs a login: there the reporter fails and is told of.
    """
    is_alone = not (training_args.multihost or training_args.coordinator_address)
    if "wandb" not in training_args.report_to.split() or not training_args.do_train or goes_on or not is_alone:
        return
    command = [sys.executable, "-c", ASK_WANDB.format(path=sys.path)]
    environment = os.environ | {"WANDB_SILENT": "true"}
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        asked = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE
        )
        reason = " ".join(asked.stdout.strip().splitlines()[:3])
        if asked.returncode == 3:
            remedy = "run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline to upload later"
            cli.fail(f"--report_to wandb: {reason.partition('.')[0]}; {remedy}")
        if asked.returncode == 4:
            cli.fail(f"--report_to wandb: {reason}; see the variables WANDB_... in the environment")


class TensorBoard:
    """Event files in output_dir. Points from step `first` on that are there already are struck out."""

    identity: Mapping[str, str] = {}

    def __init__(self, output_dir: str, first: int):
        # TensorBoard drops points from this step on at every session start but the first, so a fresh run needs one too.
        events = EventFileWriter(output_dir)
        events.add_event(Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START)))
        events.close()
        self.writer = EventFileWriter(output_dir)  # it writes in a thread, and raises what happened there later

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_event(Event(wall_time=time.time(), step=step, summary=scalar_pb(name, value)))

    def add_text(self, step: int, tag: str, markdown: str) -> None:
        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=text_pb(tag, markdown)))

    def flush(self, through: int | None) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


FLUSHING = "x_transaction_log_flush_interval"  # seconds between writes of wandb's file; 15 by itself


class Wandb:
    """A run of Weights & Biases, or the same run again."""

    def __init__(self, training_args: arguments.TrainingArguments, config: Mapping[str, Any], known: Mapping[str, str]):
        import wandb

        wandb.setup(wandb.Settings(silent=True))  # so it asks no questions either: nobody may be there to answer
        # Without x_disable_meta the command line goes there, and with it the tokens that may be in it.
        settings = wandb.Settings(silent=True, console=os.environ.get("WANDB_CONSOLE", "off"), x_disable_meta=True)
        if hasattr(settings, FLUSHING):  # a setting of newer versions: what is killed has lost no more than a second
            setattr(settings, FLUSHING, 1.0)
        directory = os.environ.get("WANDB_DIR") or training_args.output_dir
        self.wandb = wandb
        self.run = wandb.init(
            project=training_args.project or os.environ.get("WANDB_PROJECT") or known.get("project", PROJECT),
            name=training_args.run_name or os.environ.get("WANDB_NAME") or run_name(training_args),
            id=os.environ.get("WANDB_RUN_ID") or known.get("id"),
            resume="allow", dir=directory, config=dict(config), allow_val_change=True, settings=settings,
        )  # fmt: skip
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step", step_sync=True)
        self.identity = {"id": self.run.id, "project": self.run.project}
        # What the server has of a run that goes on; nobody knows it offline.
        self.last = int(self.run.summary.get("train/global_step") or 0) if self.run.resumed else 0
        self.directory = os.path.dirname(self.run.dir)
        self.where = f"offline in {self.directory}; to upload: wandb sync {self.directory}"
        if not self.run.offline:
            self.where = self.run.url or "disabled"

    def send(self, step: int, row: Mapping[str, Any]) -> None:
        self.run.log({**row, "train/global_step": step})

    def text(self, markdown: str) -> Any:
        return self.wandb.Html(f"<pre>{escape(markdown)}</pre>", inject=False)

    def finish(self) -> None:
        """Wait for the upload, but not for ever: a server that is away keeps wandb waiting."""
        try:
            within(PATIENCE, self.run.finish)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; to upload what is missing: wandb sync {self.directory}") from error


def within(seconds: float, function: Callable, *args: Any, **options: Any) -> Any:
    """What the function gives, in a thread that is left alone if it takes longer: then TimeoutError."""
    results, failures = [], []

    def call() -> None:
        try:
            results.append(function(*args, **options))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=call, name=function.__name__, daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    if not results:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    return results[0]


def escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


class Trackio:
    """A run of Trackio, or the same run again. What it prints on standard output is left out."""

    def __init__(self, training_args: arguments.TrainingArguments, config: Mapping[str, Any], known: Mapping[str, str]):
        import trackio

        self.trackio = trackio
        project = training_args.project or known.get("project", PROJECT)
        name = known.get("name") or run_name(training_args)
        with contextlib.redirect_stdout(io.StringIO()):
            options = {"config": dict(config), "resume": "allow" if known else "never", "embed": False}
            self.run = run = within(START, trackio.init, project, name, **options)  # of a Space it would wait for ever
        self.identity = {"name": run.name, "project": project}
        self.last = getattr(run, "_next_step", 1) - 1 if known else 0  # it has no public name
        self.where = f"run {run.name}; to look at it: trackio show --project {project}"

    def send(self, step: int, row: Mapping[str, Any]) -> None:
        self.run.log(dict(row), step=step)

    def text(self, markdown: str) -> Any:
        return self.trackio.Markdown(markdown)

    def finish(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            within(PATIENCE, self.run.finish)


class Rows:
    """Points for clients that take a row of values at a step, under the names that people of the HF Trainer know.

    Steps of rows never fall, so that what is there of an interrupted run ends at one step, the client's `last`: an evaluation
    between two log lines waits for the second one. Rows up to that step are not sent again when the run goes on.
    """

    def __init__(self, client: Wandb | Trackio):
        self.client, self.identity = client, client.identity
        self.rows: dict[int, dict[str, Any]] = {}

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Values named train_loss, eval_accuracy, ..., which become train/loss, eval/accuracy, ..."""
        self.rows.setdefault(step, {}).update({name.replace("_", "/", 1): value for name, value in values.items()})

    def add_text(self, step: int, tag: str, markdown: str) -> None:
        self.rows.setdefault(step, {})[tag] = self.client.text(markdown)

    def flush(self, through: int | None) -> None:
        """Send the rows up to a step after which nothing of training will come for them; None: there are none."""
        for step in sorted(step for step in self.rows if through is not None and step <= through):
            row = self.rows.pop(step)
            if step == self.client.last:  # of this step an evaluation may be missing
                row = {name: value for name, value in row.items() if not name.startswith("train/")}
            if row and step >= self.client.last:
                self.client.send(step, row)

    def close(self) -> None:
        """What has not been flushed is in a checkpoint, if there is one, and comes when that is resumed from."""
        self.client.finish()


def run_name(training_args: arguments.TrainingArguments) -> str:
    return training_args.run_name or os.path.basename(os.path.abspath(training_args.output_dir))


@contextlib.contextmanager
def saying(line: str) -> Iterator[None]:
    """Say so if what is done within takes long."""
    timer = threading.Timer(SILENCE, logger.info, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Reports:
    """All that a run reports to, from process 0. One that fails is told of, once, and training goes on without it."""

    def __init__(self):
        self.reporters: dict[str, TensorBoard | Rows] = {}
        self.failed: set[str] = set()
        self.kept: dict[str, Any] = {}  # identities that a checkpoint brought

    @property
    def identities(self) -> dict[str, Any]:
        """By what each knows the run again, for the checkpoint; empty where there is nothing to know."""
        found = {name: dict(reporter.identity) for name, reporter in self.reporters.items() if reporter.identity}
        return self.kept | found

    def open(self, name: str, make: Callable[[], TensorBoard | Rows]) -> None:
        """Add a reporter, unless that fails."""
        limit = f"{START:.0f} seconds{LIMITS.get(name, '')}"
        line = f"{TITLES[name]} does not answer yet; training begins when it has, or without it after {limit}"
        with contextlib.nullcontext() if name == "tensorboard" else saying(line):
            self.attempt(name, lambda: self.reporters.setdefault(name, make()))
        if name in self.reporters and isinstance(self.reporters[name], Rows):
            logger.info("%s: %s", TITLES[name], self.reporters[name].client.where)

    def attempt(self, name: str, function: Callable, *args: Any) -> None:
        """Do this, unless it has failed before."""
        if name in self.failed:
            return
        try:
            function(*args)
        except Exception as error:
            self.failed.add(name)
            reason = cli.first_line(error).rstrip(".")
            logger.error("%s's points can no longer be written: %s; training goes on", TITLES[name], reason)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Points of this step, by the names that TensorBoard has for them: train_loss, eval_accuracy, ..."""
        for name, reporter in self.reporters.items():
            self.attempt(name, reporter.add, step, values)

    def add_text(self, step: int, tag: str, markdown: str) -> None:
        """Text in Markdown; Weights & Biases shows it as it is."""
        for name, reporter in self.reporters.items():
            self.attempt(name, reporter.add_text, step, tag, markdown)

    def flush(self, through: int | None) -> None:
        """On to where it goes. No point of training will be added up to the step `through`; None: that is not known."""
        for name, reporter in self.reporters.items():
            self.attempt(name, reporter.flush, through)

    def close(self) -> None:
        """Once; nothing can be added afterwards."""
        for name in list(self.reporters):
            with saying(f"Waiting for {TITLES[name]} to take the last points, which are in this machine's memory or files ..."):
                self.attempt(name, self.reporters.pop(name).close)


def open_reports(args: arguments.Arguments, config: PretrainedConfig, progress: Mapping[str, Any] | None) -> Reports:
    """Where the points of training go; what an interrupted run wrote after the checkpoint that is resumed from is struck out,
    or where that cannot be done not written again, as far as it is known."""
    first, evaluations = 0, {}
    if progress:
        window = progress["window"]
        first = window[0]["step"] if window else progress["step"] + 1  # points before it are written, those from it on not yet
        evaluations = {int(step): metrics for step, metrics in progress["evaluations"].items() if int(step) >= first}
    reports = Reports()
    if processes.is_main():
        known = (progress or {}).get("reports")
        reports.kept = dict(known) if isinstance(known, Mapping) else {}
        names = args.training.report_to.split()
        if "tensorboard" in names:
            reports.open("tensorboard", lambda: TensorBoard(args.training.output_dir, first))
        for name, client in {"wandb": Wandb, "trackio": Trackio}.items():
            if name in names:
                settings = (args.training, public_configuration(args, config), reports.kept.get(name, {}))
                reports.open(name, lambda client=client, settings=settings: Rows(client(*settings)))
    for step, metrics in evaluations.items():
        reports.add(step, metrics)
    return reports


def public_configuration(args: arguments.Arguments, config: PretrainedConfig) -> dict[str, Any]:
    """The model's configuration and the flags, no secrets; a flag that is set wins where both have the name."""
    of_model = json.loads(config.to_json_string(use_diff=False))
    flags = arguments.public(*args)
    found = {**flags, **of_model, **{name: value for name, value in flags.items() if value is not None}}
    return {name: value for name, value in found.items() if not name.startswith("_")}


def has_point(output_dir: str, tag: str, step: int) -> bool:
    """Do the event files in a directory hold a point of this name at this step?"""
    events = EventAccumulator(output_dir, tensor_size_guidance={"scalars": 0})
    events.Reload()
    return tag in events.Tags()["tensors"] and any(event.step == step for event in events.Tensors(tag))
