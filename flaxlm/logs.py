# SPDX-License-Identifier: Apache-2.0
"""The log of training: lines, progress bar and TensorBoard points, without making the devices wait."""

import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary import Writer
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

from flaxlm import arguments, batches, cli, corpus, processes

logger = logging.getLogger(__name__)


class Stopwatch:
    """Seconds spent training: runs between `start` and `stop`, so compiling, evaluating and saving don't count."""

    def __init__(self):
        self.total, self.started = 0.0, None

    def start(self) -> None:
        self.started = time.monotonic()

    def stop(self) -> None:
        self.total, self.started = self.seconds(), None  # harmless where it is not running

    def seconds(self) -> float:
        return self.total + (0.0 if self.started is None else time.monotonic() - self.started)


class NonFiniteError(cli.Accident):
    """A loss or gradient norm that is NaN or infinite: the weights after that step are lost, those saved before are not."""

    def __init__(self, step: int, loss: float, grad_norm: float):
        super().__init__(
            f"step {step}: the loss is {loss}, the gradient norm {grad_norm}. Nothing was saved since. Try a lower"
            " --learning_rate, a longer --warmup_steps, --max_grad_norm 1, or --dtype float32"
        )


class Points:
    """TensorBoard points, from process 0. Where they cannot be written that is reported, once, and training goes on.

    Those from step `first` on that are there already are struck out.
    """

    def __init__(self, output_dir: str, first: int):
        self.failed, self.writer = False, None
        if processes.is_main():
            self.attempt(self.open, output_dir, first)

    def open(self, output_dir: str, first: int) -> None:
        # TensorBoard drops points from this step on at every session start but the first, so a fresh run needs one too.
        events = EventFileWriter(output_dir)
        events.add_event(Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START)))
        events.close()
        self.writer = Writer(output_dir)

    def attempt(self, write: Callable, *args) -> None:
        """Do this, unless it has failed before. TensorBoard writes in a thread and raises what happened there later."""
        if self.failed:
            return
        try:
            write(*args)
        except Exception as error:
            self.failed = True
            logger.error("TensorBoard's points can no longer be written: %s; training goes on", cli.first_line(error))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if self.writer:
                self.attempt(self.writer.add_scalar, name, value, step)

    def add_text(self, step: int, tag: str, text: str) -> None:
        """A text in Markdown."""
        if self.writer:
            metadata = text_metadata.create_summary_metadata(display_name=tag, description="")
            value = Summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto([text.encode()]))
            event = Event(wall_time=time.time(), step=step, summary=Summary(value=[value]))
            self.attempt(self.writer._output._ev_writer.add_event, event)

    def flush(self) -> None:
        if self.writer:
            self.attempt(self.writer.flush)

    def close(self) -> None:
        if self.writer:
            self.attempt(self.writer.close)


class TrainingLog:
    """Log line, progress bar and TensorBoard points of the training steps.

    The metrics of a step are fetched when the next one has been dispatched, so that the devices never wait for the log.
    """

    def __init__(self, training_args: arguments.TrainingArguments, plan: batches.Plan, points: Points | None):
        self.args, self.plan, self.points, self.stopwatch = training_args, plan, points, Stopwatch()
        self.pending: tuple | None = None
        self.window: list[dict[str, float]] = []
        self.curve: list[tuple[int, float]] = []
        self.window_started = self.loss_sum = self.weight_sum = self.num_tokens = 0.0
        self.stop_agreed = False
        self.interval = training_args.logging_steps
        if training_args.least_log_lines:  # a short run should not be silent to its end
            self.interval = max(1, min(self.interval, plan.num_steps // training_args.least_log_lines))
        self.bar = cli.progress_bar(total=plan.num_steps, desc="Training", unit="step")

    CARRIED_ON = ("window", "curve", "window_started", "loss_sum", "weight_sum", "num_tokens")

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps of the log, so that a resumed run writes what an uninterrupted one would."""
        return {name: getattr(self, name) for name in self.CARRIED_ON} | {"train_time": self.stopwatch.seconds()}

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Take up the log of a checkpoint."""
        for name in self.CARRIED_ON:
            setattr(self, name, progress[name])
        self.stopwatch.total = progress["train_time"]
        self.bar.close()
        self.bar = cli.progress_bar(total=self.plan.num_steps, desc="Training", unit="step", initial=progress["step"])

    def add(self, step: int, metrics: Mapping[str, jax.Array], num_tokens: int) -> None:
        """Take the metrics of a step that has just been dispatched; write those of the step before."""
        self.fetch()
        self.pending = (step, metrics, num_tokens)

    def fetch(self) -> None:
        """Wait for the last step and write its metrics."""
        if self.pending is None:
            return
        step, metrics, num_tokens = self.pending
        self.pending = None
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        self.stop_agreed = values.pop("stop") > 0
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise NonFiniteError(step, values["loss"], values["grad_norm"])
        self.window.append({"step": step, "tokens": num_tokens * self.plan.num_processes, **values})
        self.bar.update(1)
        first = step == 1 and self.args.logging_first_step
        if first or step % self.interval == 0 or step == self.plan.num_steps:
            self.write(step)

    def write(self, step: int) -> None:
        """Write the window since the last line: means weighted by labels on the log line, every step to TensorBoard."""
        seconds = self.stopwatch.seconds()
        last = self.window[-1]
        losses = [name for name in last if name == "loss" or name.endswith("_loss")]  # the whole, then parts if it has some
        sums = {name: sum(point[name] * point["weight"] for point in self.window) for name in losses}
        loss_sum, weight_sum = sums["loss"], sum(point["weight"] for point in self.window)
        num_tokens = sum(point["tokens"] for point in self.window)
        tokens_per_second = num_tokens / max(seconds - self.window_started, 1e-9)
        epoch = f" (epoch {self.plan.epoch(step):.2f})" if self.plan.steps_per_epoch else ""
        logger.info(
            "step %d of %d%s: %s, learning rate %.3g, gradient norm %.3g, %s tokens/s",
            step, self.plan.num_steps, epoch,
            ", ".join(f"{name.replace('_', ' ')} {sums[name] / max(weight_sum, 1):.4f}" for name in losses),
            last["learning_rate"], last["grad_norm"], f"{tokens_per_second:,.0f}",
        )  # fmt: skip
        if self.points:
            for point in self.window:
                values = {f"train_{name}": point[name] for name in (*losses, "learning_rate", "grad_norm")}
                self.points.add(point["step"], values)
            self.points.add(step, {"train_time": seconds, "train_tokens_per_second": tokens_per_second})
            self.points.flush()
        self.loss_sum, self.weight_sum = self.loss_sum + loss_sum, self.weight_sum + weight_sum
        self.num_tokens += num_tokens
        self.curve.append((step, loss_sum / max(weight_sum, 1)))
        self.window, self.window_started = [], seconds

    def close(self) -> None:
        self.stopwatch.stop()
        self.bar.close()

    def results(self, num_train_rows: int | None) -> dict[str, float]:
        """train_results.json: totals over the run."""
        seconds = self.stopwatch.seconds()
        return {
            "epoch": self.plan.epoch(self.plan.num_steps),
            "train_loss": self.loss_sum / max(self.weight_sum, 1),
            "train_runtime": seconds,
            "train_samples": num_train_rows or self.plan.num_steps * self.plan.train_batch_size,
            "train_steps": self.plan.num_steps,
            "train_tokens_per_second": self.num_tokens / max(seconds, 1e-9),
        }


def open_training_points(output_dir: str, progress: Mapping[str, Any] | None) -> Points:
    """Where those of training go; what an interrupted run wrote after the checkpoint that is resumed from is struck out."""
    first, evaluations = 0, {}
    if progress:
        window = progress["window"]
        first = window[0]["step"] if window else progress["step"] + 1  # points before it are written, those from it on not yet
        evaluations = {int(step): metrics for step, metrics in progress["evaluations"].items() if int(step) >= first}
    points = Points(output_dir, first)
    for step, metrics in evaluations.items():
        points.add(step, metrics)
    return points


def has_point(output_dir: str, tag: str, step: int) -> bool:
    """Do the event files in a directory hold a point of this name at this step?"""
    events = EventAccumulator(output_dir, tensor_size_guidance={"scalars": 0})
    events.Reload()
    return tag in events.Tags()["tensors"] and any(event.step == step for event in events.Tensors(tag))


def log_plan(plan: batches.Plan, data: corpus.Corpus, row_length: int, params: Any) -> None:
    """Say what is about to happen, derived sizes first."""
    num_params = sum(array.size for array in jax.tree.leaves(params))
    kind = jax.devices()[0].device_kind
    logger.info("Model: %s parameters, on %d device(s) of kind %s", f"{num_params:,}", jax.device_count(), kind)
    if plan.num_steps:
        logger.info(
            "Training: %s rows of %d tokens, %d rows = %s tokens per step, %d steps (%s per epoch), %d of them warmup",
            "a stream of" if data.num_train_rows is None else f"{data.num_train_rows:,}", row_length,
            plan.train_batch_size, f"{plan.train_batch_size * row_length:,}",
            plan.num_steps, plan.steps_per_epoch or "unknown", plan.num_warmup_steps,
        )  # fmt: skip
    if data.validation is not None:
        logger.info("Evaluation: %s rows, %d rows per batch", f"{data.num_validation_rows:,}", plan.eval_batch_size)


def advise_on_cpu(dtype: str) -> None:
    """Say what makes this machine faster or not, if its processor is what computes."""
    if jax.default_backend() != "cpu" or not sys.platform.startswith("linux"):
        return
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge_pages.exists() and "[madvise]" in huge_pages.read_text() and "hugetlb" not in os.environ.get("GLIBC_TUNABLES", ""):
        logger.info("Faster with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment: arrays in huge pages.")
    has_bfloat16 = re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", Path("/proc/cpuinfo").read_text())
    if dtype == "bfloat16" and not has_bfloat16:
        logger.warning("--dtype bfloat16: this processor has no instructions for it, so that it saves memory but no time.")
