# SPDX-License-Identifier: Apache-2.0
"""Batches: how large and how many, which rows are in one, its noise, and on to the devices ahead of time."""

import math
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxlm import arguments, cli, mixtures, processes, randomness
from flaxlm.corpus import Mixture
from flaxlm.streams import TextStream
from flaxlm.token_rows import Collator, TokenRows


@dataclass(frozen=True)
class Plan:
    """Sizes that follow from flags, data and devices. "Rows" are rows of tokens; "local" means of this process."""

    num_local_devices: int
    num_processes: int
    process_index: int
    train_batch_size: int  # rows in one update, all processes
    eval_batch_size: int
    num_micro_batches: int
    steps_per_epoch: int
    num_steps: int
    num_warmup_steps: int

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` updates; 0 where its size is not known."""
        return step / self.steps_per_epoch if self.steps_per_epoch else 0.0

    def local_rows(self, batch_size: int) -> slice:
        """Which rows of a batch this process prepares."""
        size = self.local_size(batch_size)
        return slice(self.process_index * size, (self.process_index + 1) * size)

    def local_size(self, batch_size: int) -> int:
        return batch_size // self.num_processes


MAX_STEPS = 2**31  # in an int32


def make_plan(training_args: arguments.TrainingArguments, num_train_rows: int | None, row_length: int) -> Plan:
    """Work out batch sizes and numbers of steps, and refuse what cannot train; a stream's number of rows is None."""
    num_devices = len(processes.devices())
    micro_batch_size = training_args.per_device_train_batch_size * num_devices
    train_batch_size = micro_batch_size * training_args.gradient_accumulation_steps
    steps_per_epoch = (num_train_rows or 0) // train_batch_size
    num_steps = num_warmup_steps = 0
    if training_args.do_train:
        if steps_per_epoch == 0 and num_train_rows is not None:
            cli.fail(
                f"the training data gives {num_train_rows} rows of {row_length} tokens, fewer than one batch of"
                f" {train_batch_size}: lower --per_device_train_batch_size or the row length, or give more text"
            )
        num_steps = math.ceil(training_args.num_train_epochs * steps_per_epoch)
        if training_args.max_steps > 0:
            num_steps = training_args.max_steps
        if num_steps >= MAX_STEPS:
            flag = "--max_steps" if training_args.max_steps > 0 else "--num_train_epochs"
            cli.fail(f"{flag}: makes {num_steps} steps; at most {MAX_STEPS - 1} can be counted")
        num_warmup_steps = training_args.warmup_steps or math.ceil(training_args.warmup_ratio * num_steps)
        if num_warmup_steps >= num_steps:
            flag = "--warmup_steps" if training_args.warmup_steps else "--warmup_ratio"
            cli.fail(f"{flag}: a warmup of {num_warmup_steps} steps does not fit into {num_steps} steps of training")
    return Plan(
        num_local_devices=jax.local_device_count(),
        num_processes=jax.process_count(),
        process_index=jax.process_index(),
        train_batch_size=train_batch_size,
        eval_batch_size=training_args.per_device_eval_batch_size * num_devices,
        num_micro_batches=training_args.gradient_accumulation_steps,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        num_warmup_steps=num_warmup_steps,
    )


def train_batches(
    train: TokenRows | TextStream | Mixture,
    collator: Collator,
    plan: Plan,
    seed: int,
    first_step: int = 0,
    position: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """This process's part of every training batch from `first_step` on, as arrays [A, ...].

    Of a stream also with the "position" behind it, from which it goes on when it is given here; of a mixture also with
    "rows_by_corpus", how many rows of each corpus all processes have in this step.
    """
    if isinstance(train, Mixture):
        if train.is_stream:
            return mixed_stream_batches(train, collator, plan, seed, first_step, position)
        return mixed_epoch_batches(train, collator, plan, seed, first_step)
    if isinstance(train, TextStream):
        return stream_batches(train, collator, plan, seed, first_step, position)
    return epoch_batches(train, collator, plan, seed, first_step)


def epoch_batches(
    rows: TokenRows, collator: Collator, plan: Plan, seed: int, first_step: int
) -> Iterator[dict[str, np.ndarray]]:
    """Epochs of the same rows, each in a new order, its remainder left out."""
    local, epoch_of_order = plan.local_rows(plan.train_batch_size), None
    for step in range(first_step, plan.num_steps):
        epoch, index = divmod(step, plan.steps_per_epoch)
        if epoch != epoch_of_order:
            order, epoch_of_order = randomness.host_rng(seed, "order", epoch).permutation(len(rows["input_ids"])), epoch
        chosen = order[index * plan.train_batch_size :][local]
        yield collate({name: np.asarray(array[chosen]) for name, array in rows.items()}, collator, plan, seed, step)


class StreamReader:
    """Rows of a stream's windows, so many at a time; `position` is behind those that were taken."""

    def __init__(self, windows: Iterator[tuple[TokenRows, dict[str, Any]]], position: Mapping[str, Any] | None):
        self.windows = prefetch(windows, depth=1)
        self.rows_used = position["rows_used"] if position else 0
        self.rows, self.start = next(self.windows)

    def take(self, num_rows: int) -> TokenRows:
        parts, missing = [{name: array[:0] for name, array in self.rows.items()}], num_rows
        while missing:
            if self.rows_used == len(self.rows["input_ids"]):
                (self.rows, self.start), self.rows_used = next(self.windows), 0
            part = {name: array[self.rows_used : self.rows_used + missing] for name, array in self.rows.items()}
            taken = len(part["input_ids"])
            parts, missing, self.rows_used = [*parts, part], missing - taken, self.rows_used + taken
        return {name: np.concatenate([part[name] for part in parts]) for name in self.rows}

    @property
    def position(self) -> dict[str, Any]:
        return self.start | {"rows_used": self.rows_used}


def stream_batches(
    stream: TextStream, collator: Collator, plan: Plan, seed: int, first_step: int, position: Mapping[str, Any] | None
) -> Iterator[dict[str, Any]]:
    """Rows of a stream in its own order, window after window."""
    reader = StreamReader(stream.windows(position), position)
    for step in range(first_step, plan.num_steps):
        rows = reader.take(plan.local_size(plan.train_batch_size))
        yield collate(rows, collator, plan, seed, step) | {"position": reader.position}


def mixed_epoch_batches(
    mixture: Mixture, collator: Collator, plan: Plan, seed: int, first_step: int
) -> Iterator[dict[str, Any]]:
    """Epochs of a mixture, in each as many rows of every corpus; the rows themselves stay where they are."""
    local, epoch_of_order = plan.local_rows(plan.train_batch_size), None
    counts = rows_per_epoch(mixture, plan)
    for step in range(first_step, plan.num_steps):
        epoch, index = divmod(step, plan.steps_per_epoch)
        if epoch != epoch_of_order:
            order, epoch_of_order = mixtures.order_of_epoch(mixture.names, mixture.sizes, counts, seed, epoch), epoch
        batch = slice(index * plan.train_batch_size, (index + 1) * plan.train_batch_size)
        corpora_N, rows_N = (part[batch][local] for part in order)
        parts = [
            {name: np.asarray(array[rows_N[corpora_N == number]]) for name, array in rows.items()}
            for number, rows in enumerate(mixture.corpora)
        ]
        rows = mixtures.interleave(parts, corpora_N, collator.columns)
        yield collate(rows, collator, plan, seed, step) | count_rows(mixture, order[0][batch])


def rows_per_epoch(mixture: Mixture, plan: Plan) -> list[int]:
    """How many rows of each corpus an epoch has: its share of those in whole batches, so that none is drawn and left out."""
    counts = mixtures.apportion(plan.steps_per_epoch * plan.train_batch_size, mixture.shares)
    for part, count in zip(mixture.parts, counts, strict=True):
        if count == 0:
            with mixtures.telling(mixture.path, part.name):
                cli.fail(f"its weight gives it none of the {sum(counts)} rows of an epoch; raise it, or leave the corpus out")
    return counts


def mixed_stream_batches(
    mixture: Mixture, collator: Collator, plan: Plan, seed: int, first_step: int, position: Mapping[str, Any] | None
) -> Iterator[dict[str, Any]]:
    """Rows of several streams, each in its own order; of all rows of a step each stream gives its share, to within one."""
    readers = []
    for name, stream in zip(mixture.names, mixture.corpora, strict=True):
        own = position[name] if position else None
        readers.append(StreamReader(mixtures.iterate(stream.windows(own), mixture.path, name), own))
    num_rows = plan.local_size(plan.train_batch_size)
    for step in range(first_step, plan.num_steps):
        corpora_PN = mixtures.divide_step(num_rows, mixture.shares, seed, step, plan.num_processes)
        corpora_N = corpora_PN[plan.process_index]
        parts = [reader.take(int((corpora_N == number).sum())) for number, reader in enumerate(readers)]
        rows = mixtures.interleave(parts, corpora_N, collator.columns)
        positions = {name: reader.position for name, reader in zip(mixture.names, readers, strict=True)}
        carried_along = count_rows(mixture, corpora_PN.reshape(-1)) | {"position": positions}
        yield collate(rows, collator, plan, seed, step) | carried_along


def count_rows(mixture: Mixture, corpora_N: np.ndarray) -> dict[str, dict[str, int]]:
    """How many rows of each corpus there are among these, for the log."""
    counts = np.bincount(corpora_N, minlength=len(mixture.parts)).tolist()
    return {"rows_by_corpus": dict(zip(mixture.names, counts, strict=True))}


def collate(rows: TokenRows, collator: Collator, plan: Plan, seed: int, step: int) -> dict[str, np.ndarray]:
    """Noise and labels for this process's rows of a training step, divided into micro-batches: arrays [A, ...]."""
    local = plan.local_rows(plan.train_batch_size)
    num_rows = local.stop - local.start
    uniforms_NR = randomness.row_uniforms(seed, ("noise", step), local.start, num_rows, collator.draws_per_row)
    batch = collator(rows, uniforms_NR, np.ones(num_rows, bool), plan.num_micro_batches * plan.num_local_devices)
    return {name: array.reshape(plan.num_micro_batches, -1, *array.shape[1:]) for name, array in batch.items()}


def eval_batches(rows: TokenRows, collator: Collator, plan: Plan, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of every evaluation batch, in order; all rows, each with the same noise at every evaluation."""
    num_rows = len(rows["input_ids"])
    local = plan.local_rows(plan.eval_batch_size)
    for first in range(0, num_rows, plan.eval_batch_size):
        chosen = np.arange(first + local.start, first + local.stop)
        draws = randomness.row_uniforms(seed, ("evaluation noise",), first + local.start, len(chosen), collator.draws_per_row)
        found = {name: np.asarray(array[np.minimum(chosen, num_rows - 1)]) for name, array in rows.items()}
        yield collator(found, draws, chosen < num_rows, plan.num_local_devices)


class DeviceBatch(NamedTuple):
    """A batch on the devices, and what is to be known of it on the host."""

    arrays: dict[str, jax.Array]
    num_tokens: int  # that this process put into it
    position: dict | None  # where in a stream it ends; None: no stream
    rows_by_corpus: dict[str, int] | None  # of a mixture, in the whole batch


def put_on_devices(
    host_batches: Iterable[Mapping[str, Any]], mesh: Mesh, spec: PartitionSpec, stop: processes.StopSignal
) -> Iterator[DeviceBatch]:
    """Copy batches to the devices, in a background thread. Each carries the news whether this process was told to stop."""
    sharding = NamedSharding(mesh, spec)

    def put(batch):
        batch = dict(batch)
        position, rows_by_corpus = batch.pop("position", None), batch.pop("rows_by_corpus", None)
        num_tokens = int((batch["attention_mask"] > 0).sum())  # padding is left out of "tokens per second"
        num_micro_batches = batch["input_ids"].shape[: len(spec) - 1]
        batch["stop"] = np.full((*num_micro_batches, jax.local_device_count()), stop.requested, np.int32)
        arrays = {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
        return DeviceBatch(arrays, num_tokens, position, rows_by_corpus)

    return prefetch(map(put, host_batches))


def prefetch(items: Iterable, depth: int = 2) -> Iterator:
    """Iterate in a background thread that is up to `depth` items ahead. Its exceptions surface here, at once."""
    ready: queue.Queue = queue.Queue(depth)
    errors: list[BaseException] = []
    stopped, finished = threading.Event(), threading.Event()

    def work():
        try:
            for item in items:
                while not stopped.is_set():
                    try:
                        ready.put(item, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if stopped.is_set():
                    return
        except BaseException as error:
            errors.append(error)
        finally:
            finished.set()

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while not errors:
            try:
                yield ready.get(timeout=0.1)
            except queue.Empty:
                if finished.is_set() and ready.empty():
                    break
        if errors:
            raise errors[0]
    finally:
        stopped.set()
        thread.join()
