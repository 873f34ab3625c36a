# SPDX-License-Identifier: Apache-2.0
"""Evaluation over all rows, exact whatever the batches."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from flaxlm import batches, cli, processes, sharding
from flaxlm.token_rows import Collator, TokenRows


class Evaluator:
    """Metrics over all evaluation rows: every label counts once, whichever batch it is in."""

    def __init__(
        self,
        rows: TokenRows,
        collator: Collator,
        plan: batches.Plan,
        seed: int,
        mesh: Mesh,
        p_eval_step: sharding.CompiledStep,
        eval_metrics: Callable[[Mapping[str, float]], dict[str, float]],
    ):
        self.rows, self.collator, self.plan, self.seed = rows, collator, plan, seed
        self.mesh, self.p_eval_step, self.eval_metrics = mesh, p_eval_step, eval_metrics

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
        return self.eval_metrics(add_sums(totals, pending))


def add_sums(totals: Mapping[str, float], sums: Mapping[str, jax.Array]) -> dict[str, float]:
    """Add the sums of one batch to those of the batches before, in double precision."""
    return dict(totals) | {name: totals.get(name, 0.0) + float(value) for name, value in sums.items()}
