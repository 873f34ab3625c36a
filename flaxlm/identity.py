# SPDX-License-Identifier: Apache-2.0
"""What a run's result follows from: a resumed run must have the same, but for what is said to differ."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from transformers import PretrainedConfig

from flaxlm import arguments, batches, cli, optimizers

# Flags that a resumed run may change: they decide what is written, where and when, not what is computed.
FREE_FLAGS = {
    "output_dir", "overwrite_output_dir", "do_train", "do_eval", "per_device_eval_batch_size", "logging_steps",
    "logging_first_step", "report_to", "project", "run_name", "profile_steps", "save_steps", "save_total_limit",
    "save_safetensors", "eval_steps", "resume_from_checkpoint",
    "resume_changes", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "early_stopping_patience",
    "early_stopping_threshold", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "multihost",
    "coordinator_address", "num_processes", "process_id", "fsdp", "compile_for", "json", "cache_dir", "overwrite_cache",
    "preprocessing_num_workers", "max_eval_samples", "trust_remote_code", "generate_samples", "max_new_tokens",
    "temperature", "top_p",
    "validation_file", "validation_ref_file", "train_split_name", "eval_split_name",
    # Compared by what they yield: rows of tokens, a configuration, the size of a batch.
    "train_file", "train_ref_file", "encoding", "dataset_name", "dataset_config_name", "mixture_file", "config_name",
    "config_overrides", "model_name_or_path", "model_type", "tokenizer_name", "use_fast_tokenizer",
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "warmup_steps",
    "warmup_ratio",
}  # fmt: skip

STEPS = "the number of steps (--max_steps, --num_train_epochs)"
WARMUP = "the number of warmup steps (--warmup_steps, --warmup_ratio)"
BATCH = "the batch size (--per_device_train_batch_size x devices x --gradient_accumulation_steps)"
DATA = "the training data (checksum)"
# Flags that decide what of a run has these names, for --resume_changes.
CHANGED_BY = {
    STEPS: ("max_steps", "num_train_epochs"),
    WARMUP: ("warmup_steps", "warmup_ratio"),
    BATCH: ("per_device_train_batch_size", "gradient_accumulation_steps"),
    DATA: ("train_file", "mixture_file", "encoding", "dataset_name", "dataset_config_name", "train_ref_file"),
}
# The learning rate follows from them: where it has been the same so far, they have made no difference yet.
SCHEDULE = {
    STEPS, WARMUP, "--learning_rate", "--lr_scheduler_type", "--groupbert_schedule", "--min_lr_ratio", "--num_decay_steps",
    "--lr_power",
}  # fmt: skip
# What the state of an optimizer is made for; another one has nothing to go on from.
FIXED = {"optim", "adafactor", "lamb", "lamb_no_bias_correction"}


class Identity(NamedTuple):
    """Everything that a run's result follows from, by a name that a person understands; and where that is from."""

    values: Mapping[str, Any]
    args: arguments.Arguments
    plan: batches.Plan


def of_run(args: arguments.Arguments, config: PretrainedConfig, plan: batches.Plan, data: Any) -> Identity:
    """`data` tells the rows that are trained on from others."""
    flags = {f"--{name}": value for name, value in arguments.public(*args).items() if name not in FREE_FLAGS}
    configuration = {
        f"the configuration's {name}": value
        for name, value in json.loads(config.to_json_string(use_diff=False)).items()
        if name not in ("transformers_version", "_name_or_path", "architectures", "torch_dtype", "dtype")
    }
    sizes = {STEPS: plan.num_steps, WARMUP: plan.num_warmup_steps, BATCH: plan.train_batch_size, DATA: data}
    return Identity({**flags, **configuration, **sizes}, args, plan)


def compare(saved: Mapping[str, Any], current: Identity, step: int, path: str) -> dict[str, list]:
    """What differs from the run that made a checkpoint after so many steps, {name: [then, now]}: all of it was allowed to.

    Nothing needs to be allowed if the result so far is what the current flags would have given. Anything else ends the
    program with a line that names it.
    """
    if current.plan.num_steps < step:
        cli.fail(f"{STEPS} is {current.plan.num_steps}, but {path} is after step {step} already; give at least as many")
    allowed = set(named(current.args.training.resume_changes))
    saved = defaults(current.args) | dict(saved)  # flags that came later were not set
    # The data comes last: its flags are before it.
    different = [name for name in [*current.values, *(saved.keys() - current.values.keys())]
                 if saved.get(name) != current.values.get(name)]  # fmt: skip
    changes = {}
    has_same_rates = not SCHEDULE.isdisjoint(different) and np.array_equal(
        rates(current.values, current, step), rates(saved, current, step)
    )
    for name in different:
        then, now = saved.get(name), current.values.get(name)
        if has_same_rates and name in SCHEDULE:
            continue
        follows = name == DATA and changes_text(changes, current.args.data)  # from what was allowed
        if not (follows or allowed.intersection(flags_of(name))):
            cli.fail(
                f"{name} is {now}, but {path} was made with {then}: going on would not give what an uninterrupted run gives;"
                f" restore it, {remedy(name)}, or start anew with --overwrite_output_dir in place of the flag"
            )
        changes[name] = [then, now]
    return changes


def remedy(name: str) -> str:
    """What else there is to do about a difference."""
    if flags := flags_of(name):
        return f"allow it with --resume_changes {flags[0]}"
    return "start a new run from the weights, with --model_name_or_path"


def flags_of(name: str) -> tuple[str, ...]:
    """The flags by which one of the values may be changed knowingly; none of a configuration or an optimizer's kind."""
    if name in CHANGED_BY:
        return CHANGED_BY[name]
    flag = name.removeprefix("--")
    return () if flag == name or flag in FIXED else (flag,)


def named(resume_changes: str | None) -> Iterator[str]:
    """The flags of --resume_changes, however they are spelled."""
    for name in (resume_changes or "").split(","):
        if stripped := name.strip().removeprefix("--").replace("-", "_"):
            yield "max_steps" if stripped == "num_train_steps" else stripped


def check_changes(args: arguments.Arguments) -> None:
    """Refuse names in --resume_changes that are no flags, or cannot be changed."""
    if args.training.resume_changes is None:
        return
    if not args.training.resume_from_checkpoint:
        cli.fail("--resume_changes: says what may differ from a checkpoint; add --resume_from_checkpoint")
    flags = arguments.public(*args)
    for name in named(args.training.resume_changes):
        if name not in flags:
            cli.fail(f"--resume_changes {name}: no such flag; give names as max_steps,learning_rate")
        if name in FIXED:
            cli.fail(f"--resume_changes {name}: the optimizer's state is of one kind; start from the weights, with"
                     " --model_name_or_path")  # fmt: skip
        if name in OF_THE_MODEL:
            cli.fail(f"--resume_changes {name}: the weights are of one configuration; start from them, with"
                     " --model_name_or_path")  # fmt: skip


OF_THE_MODEL = {"config_name", "config_overrides", "model_type", "model_name_or_path", "tokenizer_name"}


def changes_text(changes: Mapping[str, list], data_args: arguments.DataArguments) -> bool:
    """May what has changed make other rows of the same stream, or another stream? Then no position in it is of use."""
    return any(hasattr(data_args, name.removeprefix("--")) or name in (DATA, "--seed") for name in changes)


def defaults(args: arguments.Arguments) -> dict[str, Any]:
    return {f"--{f.name}": f.default for part in args for f in dataclasses.fields(part) if f.name not in FREE_FLAGS and f.repr}


def rates(values: Mapping[str, Any], current: Identity, num_steps: int) -> np.ndarray:
    """The learning rates of the first steps of a run of these values: float32 [num_steps]."""
    training_args = dataclasses.replace(
        current.args.training, **{name[2:]: values[name] for name in SCHEDULE & values.keys() if name.startswith("--")}
    )
    plan = dataclasses.replace(current.plan, num_steps=values[STEPS], num_warmup_steps=values[WARMUP])
    return np.asarray(optimizers.make_learning_rate(training_args, plan)(np.arange(num_steps)))
