# SPDX-License-Identifier: Apache-2.0
"""Which rows are in which batch, and the thread that makes them ahead of time."""

import threading
import time

import numpy as np
import pytest

from flaxlm import batches
from tests.test_optimizers import plan_of


class Recorder:
    """A collator that only passes on what it is given."""

    draws_per_row = 3
    columns = {"input_ids": 0}  # noqa: RUF012

    def __call__(self, rows, uniforms, is_real, num_groups):
        return {"id": rows["input_ids"][:, 0], "noise": uniforms, "is_real": is_real}


def test_every_epoch_visits_rows_once_in_a_new_order():
    rows = {"input_ids": np.arange(9)[:, None]}
    found = list(batches.train_batches(rows, Recorder(), plan_of(num_steps=6), seed=1))
    epochs = [np.concatenate([batch["id"][0] for batch in found[i : i + 2]]) for i in (0, 2, 4)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    noise = np.concatenate([batch["noise"].reshape(-1) for batch in found])
    assert len(set(noise)) == noise.size


def test_processes_share_a_global_batch():
    """Two processes prepare the two halves of what one would: rows and noise (defects 88, 91, 102)."""
    rows = {"input_ids": np.arange(20)[:, None]}
    whole = next(batches.train_batches(rows, Recorder(), plan_of(), seed=1))
    halves = [
        next(batches.train_batches(rows, Recorder(), plan_of(num_processes=2, process_index=i), seed=1)) for i in range(2)
    ]
    for name in ("id", "noise"):
        np.testing.assert_array_equal(np.concatenate([half[name][0] for half in halves]), whole[name][0])


def test_evaluation_rows_are_all_there_once():
    rows = {"input_ids": np.arange(10)[:, None]}
    found = list(batches.eval_batches(rows, Recorder(), plan_of(), seed=1))
    real = np.concatenate([batch["id"][batch["is_real"]] for batch in found])
    assert real.tolist() == list(range(10))
    assert [len(batch["id"]) for batch in found] == [4, 4, 4]


def test_prefetch_keeps_order_and_stays_bounded():
    produced = []

    def produce():
        for i in range(20):
            produced.append(i)
            yield i

    items = batches.prefetch(produce(), depth=2)
    assert next(items) == 0
    time.sleep(0.3)
    assert len(produced) <= 4
    assert list(items) == list(range(1, 20))


def test_prefetch_raises_at_once():
    """Before what is still queued, and with the original exception."""

    def produce():
        yield from range(2)
        raise ZeroDivisionError("in the background")

    items = batches.prefetch(produce(), depth=5)
    time.sleep(0.3)
    with pytest.raises(ZeroDivisionError, match="in the background"):
        next(items)


def test_prefetch_ends_its_thread():
    items = batches.prefetch(iter(range(1000)))
    next(items)
    items.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
