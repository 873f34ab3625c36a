# SPDX-License-Identifier: Apache-2.0
"""The log of training: lines, progress bar and points for reporters, without making the devices wait."""

import logging
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from flaxlm import arguments, batches, cli, corpus, machines, reporters
from flaxlm.machines import GIB

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


class Speed(NamedTuple):
    """What a step computes, and what the devices could.

    Attributes:
        flops_per_step: floating-point operations of the model and its gradients in one update, on all devices.
        peak_flops: per second and device.
    """

    flops_per_step: float
    num_devices: int
    peak_flops: float


def mfu(speed: Speed, num_steps: int, seconds: float) -> float:
    """Model FLOP utilisation, 0 to 1: what of the devices' arithmetic went into the model (Chowdhery et al. 2022, PaLM, B).

    What --gradient_checkpointing and chunked attention compute again is no part of the model and does not count.
    """
    return speed.flops_per_step * num_steps / (max(seconds, 1e-9) * speed.num_devices * speed.peak_flops)


class TrainingLog:
    """Log line, progress bar and points of the training steps.

    The metrics of a step are fetched when the next one has been dispatched, so that the devices never wait for the log.
    """

    def __init__(self, training_args: arguments.TrainingArguments, plan: batches.Plan, points: reporters.Reports | None):
        self.args, self.plan, self.points, self.stopwatch = training_args, plan, points, Stopwatch()
        self.pending: tuple | None = None
        self.window: list[dict[str, float]] = []
        self.curve: list[tuple[int, float]] = []
        self.window_started = self.loss_sum = self.weight_sum = self.num_tokens = 0.0
        self.rows_by_corpus: dict[str, int] = {}  # of a mixture, over the run
        self.stop_agreed = False
        self.speed: Speed | None = None  # where the devices' is known
        self.memory = 0  # bytes, the most that a log line has told
        self.interval = training_args.logging_steps
        if training_args.least_log_lines:  # a short run should not be silent to its end
            self.interval = max(1, min(self.interval, plan.num_steps // training_args.least_log_lines))
        self.bar = cli.progress_bar(total=plan.num_steps, desc="Training", unit="step")

    CARRIED_ON = ("window", "curve", "window_started", "loss_sum", "weight_sum", "num_tokens", "rows_by_corpus")

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps of the log, so that a resumed run writes what an uninterrupted one would."""
        progress = {name: getattr(self, name) for name in self.CARRIED_ON} | {"train_time": self.stopwatch.seconds()}
        identities = self.points.identities if self.points else {}
        return progress | ({"reports": identities} if identities else {})

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Take up the log of a checkpoint."""
        for name in self.CARRIED_ON:
            setattr(self, name, progress.get(name, getattr(self, name)))  # checkpoints of before have no rows_by_corpus
        self.stopwatch.total = progress["train_time"]
        self.bar.close()
        self.bar = cli.progress_bar(total=self.plan.num_steps, desc="Training", unit="step", initial=progress["step"])

    def add(
        self,
        step: int,
        metrics: Mapping[str, jax.Array],
        num_tokens: int,
        rows_by_corpus: Mapping[str, int] | None = None,
    ) -> None:
        """Take the metrics of a step that has just been dispatched; write those of the step before."""
        self.fetch()
        self.pending = (step, metrics, num_tokens, rows_by_corpus or {})

    def fetch(self) -> None:
        """Wait for the last step and write its metrics."""
        if self.pending is None:
            return
        step, metrics, num_tokens, rows_by_corpus = self.pending
        self.pending = None
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        self.stop_agreed = values.pop("stop") > 0
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise NonFiniteError(step, values["loss"], values["grad_norm"])
        self.rows_by_corpus |= {name: self.rows_by_corpus.get(name, 0) + rows for name, rows in rows_by_corpus.items()}
        self.window.append({"step": step, "tokens": num_tokens * self.plan.num_processes, **values})
        self.bar.update(1)
        first = step == 1 and self.args.logging_first_step
        if first or step % self.interval == 0 or step == self.plan.num_steps:
            self.write(step)

    def write(self, step: int) -> None:
        """Write the window since the last line: means weighted by labels on the log line, every step to the reporters."""
        seconds = self.stopwatch.seconds()
        last = self.window[-1]
        # The whole, then its parts if it has some; a resumed run that was told to may have others than before.
        losses = [name for name in last if is_loss(name) and all(name in point for point in self.window)]
        sums = {name: sum(point[name] * point["weight"] for point in self.window) for name in losses}
        loss_sum, weight_sum = sums["loss"], sum(point["weight"] for point in self.window)
        num_tokens = sum(point["tokens"] for point in self.window)
        tokens_per_second = num_tokens / max(seconds - self.window_started, 1e-9)
        measured = {"train_time": seconds, "train_tokens_per_second": tokens_per_second}
        words = [f"{tokens_per_second:,.0f} tokens/s"]
        if self.speed:
            measured["train_mfu"] = mfu(self.speed, len(self.window), seconds - self.window_started)
            words.append(f"MFU {measured['train_mfu']:.1%}")
        if memory := machines.memory_in_use():
            self.memory = max(self.memory, memory.used)
            measured["train_memory_gib"] = memory.used / GIB
            words.append(f"memory {memory.used / GIB:.1f} of {memory.limit / GIB:.1f} GiB")
        epoch = f" (epoch {self.plan.epoch(step):.2f})" if self.plan.steps_per_epoch else ""
        logger.info(
            "step %d of %d%s: %s, learning rate %.3g, gradient norm %.3g, %s",
            step, self.plan.num_steps, epoch,
            ", ".join(f"{name.replace('_', ' ')} {sums[name] / max(weight_sum, 1):.4f}" for name in losses),
            last["learning_rate"], last["grad_norm"], ", ".join(words),
        )  # fmt: skip
        if self.points:
            for point in self.window:
                named = (*filter(is_loss, point), "learning_rate", "grad_norm")
                self.points.add(point["step"], {f"train_{name}": point[name] for name in named})
            self.points.add(step, measured)
            self.points.add(step, {f"train_share/{name}": share for name, share in self.shares().items()})
            self.points.flush(through=step)
        self.loss_sum, self.weight_sum = self.loss_sum + loss_sum, self.weight_sum + weight_sum
        self.num_tokens += num_tokens
        self.curve.append((step, loss_sum / max(weight_sum, 1)))
        self.window, self.window_started = [], seconds

    def finish(self, step: int) -> None:
        """Write what is left of the last window, after so many steps."""
        self.fetch()
        if self.window:
            self.write(step)

    def shares(self) -> dict[str, float]:
        """Which part of all rows of the run so far was of each corpus of a mixture."""
        total = sum(self.rows_by_corpus.values())
        return {name: rows / total for name, rows in self.rows_by_corpus.items()}

    def close(self) -> None:
        self.stopwatch.stop()
        self.bar.close()

    def results(self, num_steps: int, num_train_rows: int | None) -> dict[str, float]:
        """train_results.json: totals over the run."""
        seconds, measured = self.stopwatch.seconds(), {}
        if self.speed:
            measured["train_mfu"] = mfu(self.speed, num_steps, seconds)
        if self.memory:
            measured["train_memory_gib"] = self.memory / GIB
        for name, share in self.shares().items():
            logger.info("Corpus %s: %s rows were trained on, a share of %.4f", name, f"{self.rows_by_corpus[name]:,}", share)
            measured[f"share_of_{name}"] = share
        return measured | {
            "epoch": self.plan.epoch(num_steps),
            "train_loss": self.loss_sum / max(self.weight_sum, 1),
            "train_runtime": seconds,
            "train_samples": num_train_rows or num_steps * self.plan.train_batch_size,
            "train_steps": num_steps,
            "train_tokens_per_second": self.num_tokens / max(seconds, 1e-9),
        }


def is_loss(name: str) -> bool:
    return name == "loss" or name.endswith("_loss")


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
    if data.mixture:
        log_mixture(plan, data.mixture)
    if data.validation is not None:
        logger.info("Evaluation: %s rows, %d rows per batch", f"{data.num_validation_rows:,}", plan.eval_batch_size)


def log_mixture(plan: batches.Plan, mixture: corpus.Mixture) -> None:
    """What is planned of each corpus of a mixture; one that would get no row is refused."""
    if mixture.is_stream:
        for part in mixture.parts:
            rows = float(part.share * plan.train_batch_size)
            logger.info("Corpus %s: a share of %.4f, %.2f rows per step", part.name, part.share, rows)
        return
    for part, size, count in zip(mixture.parts, mixture.sizes, batches.rows_per_epoch(mixture, plan), strict=True):
        logger.info(
            "Corpus %s: a share of %.4f, %s rows of each epoch, which is %.2f passes over its %s rows",
            part.name, part.share, f"{count:,}", count / size, f"{size:,}",
        )  # fmt: skip


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
