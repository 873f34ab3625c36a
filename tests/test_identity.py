# SPDX-License-Identifier: Apache-2.0
"""What a resumed run must have in common with the one that it goes on from. Whole runs: tests/test_checkpoints.py."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
from transformers import RobertaConfig

import run_bart_dlm_flax
import run_clm_flax
import run_mlm_flax
import run_pretraining_flax
import run_t5_mlm_flax
from flaxlm import arguments, batches, cli, identity

SCRIPTS = (run_mlm_flax, run_clm_flax, run_t5_mlm_flax, run_bart_dlm_flax, run_pretraining_flax)


class Tokenizer:
    """All that is read of one."""

    def __init__(self, *words: str):
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}


def make(
    data: Any = 1, num_steps: int = 100, words: str = "ab", batch_size: int = 8, config: Mapping[str, Any] = {}, **flags
) -> identity.Identity:
    own = {flag: flags.pop(flag) for flag in ("mlm_probability", "max_train_samples") if flag in flags}
    flags = {"max_steps": num_steps, "warmup_steps": 10} | flags
    training = arguments.TrainingArguments(output_dir="x", **flags)
    args = arguments.Arguments(arguments.ModelArguments(), run_mlm_flax.DataTrainingArguments(**own), training)
    num_warmup_steps = training.warmup_steps or math.ceil(training.warmup_ratio * num_steps)
    plan = batches.Plan(1, 1, 0, batch_size, 8, 1, 20, num_steps, num_warmup_steps)
    return identity.of_run(args, RobertaConfig(**config), Tokenizer(*words), plan, data)


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


def test_noise_makes_no_other_rows(refuses):
    """Whoever changes the noise has not said that the text may differ too."""
    assert identity.compare(make().values, make(mlm_probability=0.3, resume_changes="mlm_probability"), 50, "x")
    with refuses(r"^the training data \(checksum\) is 2, but x was made with 1"):
        identity.compare(make().values, make(data=2, mlm_probability=0.3, resume_changes="mlm_probability"), 50, "x")


EPOCHS = {"max_steps": -1}
FOLLOWING = {
    "warmup from steps": ({"warmup_steps": 0, "warmup_ratio": 0.1}, {"num_steps": 200}, "max_steps"),
    "steps from a batch": (EPOCHS, {"num_steps": 200, "batch_size": 4}, "per_device_train_batch_size"),
    "steps from rows": (EPOCHS, {"num_steps": 50, "data": 2, "max_train_samples": 9}, "max_train_samples"),
}


@pytest.mark.parametrize(("both", "change", "flag"), FOLLOWING.values(), ids=FOLLOWING)
def test_numbers_that_follow_from_a_change_that_is_named(both, change, flag, refuses):
    """Where they are shares, or epochs; and the line that refuses names that one flag, whose name is enough."""
    then, now = make(**both), make(**both, **change)
    with refuses(rf"allow it with --resume_changes {flag}, or"):
        identity.compare(then.values, now, 40, "x")
    allowed = make(**both, **change, resume_changes=flag)
    assert len(identity.compare(then.values, allowed, 40, "x")) == len(change) + (flag == "max_steps")


@pytest.mark.parametrize("given", [None, "adam_beta1", "lr_scheduler_type", "warmup_ratio,seed"])
def test_the_advice_is_enough_where_several_things_differ(given):
    """Followed to the letter, the line that refuses is the last one; what is named already stays in it."""
    change = {"data": 2, "lr_scheduler_type": "cosine", "adam_beta1": 0.8, "num_steps": 120, "warmup_steps": 20}
    with pytest.raises(cli.Mistake) as refused:
        identity.compare(make().values, make(**change, resume_changes=given), 50, "x")
    (advice,) = re.findall("allow it with --resume_changes ([a-z_0-9,]+), or", str(refused.value))
    changes = identity.compare(make().values, make(**change, resume_changes=advice), 50, "x")
    assert set(changes) == {"--lr_scheduler_type", "--adam_beta1", identity.STEPS, identity.WARMUP, identity.DATA}


def test_what_no_flag_allows_is_told_first(refuses):
    """So that nobody allows one thing only to be refused another; and what it takes is told whole."""
    now = make(config={"hidden_dropout_prob": 0.3}, learning_rate=1e-3)
    advice = "with --model_name_or_path and a --config_name in which hidden_dropout_prob is as you want it"
    with refuses(f"^the configuration's hidden_dropout_prob is 0.3, but x was made with 0.1: .* {advice}, or start anew"):
        identity.compare(make().values, now, 50, "x")


def test_another_vocabulary_is_another_model(refuses):
    """Also where the flag that names the data is allowed to change; a checkpoint from before it was noted says nothing."""
    now = make(words="abc", data=2, resume_changes="train_file")
    with refuses(
        r"^the tokenizer's vocabulary \(checksum\) is .* start a new run from the weights, with --model_name_or_path,"
    ):
        identity.compare(make().values, now, 50, "x")
    before = {name: value for name, value in make().values.items() if name != identity.VOCABULARY}
    assert identity.compare(before, make(), 50, "x") == {}


def test_the_advice_names_the_flag_that_was_given():
    """Where one of several would do: that of the epochs, not of the steps."""
    with pytest.raises(cli.Mistake, match="allow it with --resume_changes num_train_epochs, or"):
        identity.compare(make().values, make(num_steps=200, max_steps=-1, num_train_epochs=9.0), 50, "x")


@pytest.mark.parametrize("names", ["", " , "])
def test_no_names(names, refuses):
    args = make(resume_from_checkpoint="latest", resume_changes=names).args
    with refuses(f"--resume_changes '{names}': names no flag"):
        identity.check_changes(args)


def test_names_in_any_spelling():
    names = list(identity.named("--max-steps, learning_rate,num_train_steps,,  dataset_path"))
    assert names == ["max_steps", "learning_rate", "max_steps", "dataset_name"]
    assert list(identity.named(None)) == []


def test_every_flag_of_a_schedule_is_one():
    """So that none is compared by its name alone, or forgotten."""
    fields = {f"--{field.name}" for field in dataclasses.fields(arguments.TrainingArguments)}
    assert {name for name in identity.SCHEDULE if name.startswith("--")} <= fields
    assert {name for name in fields if "lr_" in name or name.endswith("decay_steps")} <= identity.SCHEDULE


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_noise_is_a_flag(script):
    own = {field.name for field in dataclasses.fields(script.DataTrainingArguments)}
    assert set(script.DataTrainingArguments.noise) <= own


def test_every_alias_is_known():
    """A name that a flag goes by besides its own."""
    parser = cli.ScriptArgumentParser((arguments.ModelArguments, arguments.DataArguments, arguments.TrainingArguments))
    named = {string[2:]: action.dest for action in parser._actions for string in action.option_strings}
    aliases = {name: dest for name, dest in named.items() if name != dest != "help" and "-" not in name}
    assert {name: dest for name, dest in aliases.items() if not name.startswith("no_")} == identity.ALIASES
