# SPDX-License-Identifier: Apache-2.0
"""What a resumed run must have in common with the one that it goes on from. Whole runs: tests/test_checkpoints.py."""

import dataclasses
from typing import Any

import pytest
from transformers import RobertaConfig

import run_mlm_flax
from flaxlm import arguments, batches, identity


def make(data: Any = 1, num_steps: int = 100, **flags) -> identity.Identity:
    training = arguments.TrainingArguments(output_dir="x", max_steps=num_steps, warmup_steps=10, **flags)
    args = arguments.Arguments(arguments.ModelArguments(), run_mlm_flax.DataTrainingArguments(), training)
    plan = batches.Plan(1, 1, 0, 8, 8, 1, 20, num_steps, 10)
    return identity.of_run(args, RobertaConfig(), plan, data)


def test_the_same_run_has_nothing_to_allow():
    assert identity.compare(make().values, make(), 50, "x") == {}


def test_a_checkpoint_from_before_a_flag_was_made():
    """It was not set then: that is what the default says; another value differs from it."""
    before = {name: value for name, value in make().values.items() if name not in ("--optim", "--z_loss", "--min_lr_ratio")}
    assert identity.compare(before, make(), 50, "x") == {}
    changed = make(z_loss=1e-4, resume_changes="z_loss")
    assert identity.compare(before, changed, 50, "x") == {"--z_loss": [0.0, 1e-4]}


@pytest.mark.parametrize(
    ("then", "now", "step", "is_same"),
    [
        ({}, {"num_steps": 200}, 10, True),  # still in the warmup
        ({}, {"num_steps": 200}, 50, False),
        ({"lr_scheduler_type": "constant"}, {"lr_scheduler_type": "constant", "num_steps": 200}, 100, True),
        ({"lr_scheduler_type": "constant"}, {"lr_scheduler_type": "warmup_stable_decay"}, 90, True),
        ({"lr_scheduler_type": "constant"}, {"lr_scheduler_type": "warmup_stable_decay"}, 95, False),
        ({"lr_scheduler_type": "inverse_sqrt"}, {"lr_scheduler_type": "inverse_sqrt", "num_steps": 999}, 100, True),
        ({}, {"lr_scheduler_type": "polynomial"}, 100, True),  # of power 1, which is a line
        ({}, {"learning_rate": 1e-3}, 50, False),
    ],
)
def test_a_schedule_is_compared_by_its_rates_so_far(then, now, step, is_same, refuses):
    if is_same:
        assert identity.compare(make(**then).values, make(**now), step, "x") == {}
        return
    with refuses("allow it with --resume_changes"):
        identity.compare(make(**then).values, make(**now), step, "x")


def test_what_follows_from_an_allowed_change_is_allowed():
    """Other rows, where a flag that makes them is named; other rows for no reason are refused."""
    now = make(data=2, seed=7, resume_changes="seed")
    assert identity.compare(make().values, now, 50, "x") == {"--seed": [42, 7], identity.DATA: [1, 2]}


def test_other_data_is_not_allowed_by_a_name_that_did_not_change(refuses):
    with refuses(r"^the training data \(checksum\) is 2, but x was made with 1"):
        identity.compare(make().values, make(data=2, resume_changes="seed"), 50, "x")


def test_names_in_any_spelling():
    assert list(identity.named("--max-steps, learning_rate,num_train_steps,")) == ["max_steps", "learning_rate", "max_steps"]
    assert list(identity.named(None)) == []


def test_every_flag_of_a_schedule_is_one():
    """So that none is compared by its name alone, or forgotten."""
    fields = {f"--{field.name}" for field in dataclasses.fields(arguments.TrainingArguments)}
    assert {name for name in identity.SCHEDULE if name.startswith("--")} <= fields
    assert {name for name in fields if "lr_" in name or name.endswith("decay_steps")} <= identity.SCHEDULE
