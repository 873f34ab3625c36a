# SPDX-License-Identifier: Apache-2.0
"""Evaluation over all rows, exact whatever the batches."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flaxlm import batches, cli, corpus, processes, randomness, sharding, token_rows
from flaxlm.token_rows import Collator


class Evaluator:
    """Metrics over all evaluation rows: every label counts once, whichever batch it is in."""

    def __init__(
        self,
        data: corpus.Corpus,
        collator: Collator,
        plan: batches.Plan,
        seed: int,
        mesh: Mesh,
        p_eval_step: sharding.CompiledStep,
        eval_metrics: Callable[[Mapping[str, float]], dict[str, float]],
    ):
        rows, self.text = data.validation, data.validation_text
        if rows:  # a batch larger than all rows would hold nothing more
            most = mesh.size * math.ceil(len(rows["input_ids"]) / mesh.size)
            plan = dataclasses.replace(plan, eval_batch_size=min(plan.eval_batch_size, most))
        collator = token_rows.for_evaluation(collator)
        self.rows, self.collator, self.plan, self.seed = rows, collator, plan, seed
        self.mesh, self.p_eval_step, self.eval_metrics = mesh, p_eval_step, eval_metrics
        if rows and not token_rows.gives_labels(rows, collator, self.draw):  # better told now than after hours of training
            token_rows.refuse_without_labels("validation")

    def draw(self, first_row: int, num_rows: int) -> np.ndarray:
        """The noise of these rows at every evaluation, as in batches.eval_batches."""
        return randomness.row_uniforms(self.seed, ("evaluation noise",), first_row, num_rows, self.collator.draws_per_row)

    def try_out(self, params: Any, stop: processes.StopSignal) -> dict[str, float]:
        """The metrics of one batch: if it does not fit into memory, that is known before training and not behind it."""
        host_batches = itertools.islice(batches.eval_batches(self.rows, self.collator, self.plan, self.seed), 1)
        for batch in batches.put_on_devices(host_batches, self.mesh, sharding.PER_ROW, stop):
            sums = self.p_eval_step(params, batch.arrays)
        return self.eval_metrics(add_sums({}, sums))

    def __call__(self, params: Any, stop: processes.StopSignal) -> dict[str, float]:
        """The metrics of these weights.

        Raises:
            Stopped: the run was told to stop in the middle; the evaluation is left to the resumed run.
        """
        totals: dict[str, float] = {}
        pending: Mapping[str, jax.Array] = {}
        host_batches = batches.eval_batches(self.rows, self.collator, self.plan, self.seed)
        num_batches = math.ceil(len(self.rows["input_ids"]) / self.plan.eval_batch_size)
        with cli.progress_bar(total=num_batches, desc="Evaluating", unit="batch") as bar:
            for batch in batches.put_on_devices(host_batches, self.mesh, sharding.PER_ROW, stop):
                done, pending = pending, self.p_eval_step(params, batch.arrays)
                totals = add_sums(totals, done)  # fetched one batch late, so that the devices don't wait
                stop.check(totals.get("stop", 0) > 0)
                bar.update(1)
        totals = add_sums(totals, pending)
        if self.text:  # what a loss per label is of the text, for an objective that says so
            totals |= {"text_tokens": self.text.num_tokens, "text_bytes": self.text.num_bytes}
        return self.eval_metrics(totals)


def add_sums(totals: Mapping[str, float], sums: Mapping[str, jax.Array]) -> dict[str, float]:
    """Add the sums of one batch to those of the batches before, in double precision."""
    return dict(totals) | {name: totals.get(name, 0.0) + float(value) for name, value in sums.items()}
