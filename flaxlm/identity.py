# SPDX-License-Identifier: Apache-2.0
"""What a run's result follows from: a resumed run must have the same, but for what is said to differ."""

import dataclasses
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

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
VOCABULARY = "the tokenizer's vocabulary (checksum)"
FIELD = "the configuration's "
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


def of_run(
    args: arguments.Arguments,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    plan: batches.Plan,
    data: Any,
) -> Identity:
    """`data` tells the rows that are trained on from others."""
    flags = {f"--{name}": value for name, value in arguments.public(*args).items() if name not in FREE_FLAGS}
    configuration = {
        f"{FIELD}{name}": value
        for name, value in json.loads(config.to_json_string(use_diff=False)).items()
        if name not in ("transformers_version", "_name_or_path", "architectures", "torch_dtype", "dtype")
    }
    vocabulary = zlib.crc32(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    # Each behind what it may follow from.
    sizes = {BATCH: plan.train_batch_size, DATA: data, STEPS: plan.num_steps, WARMUP: plan.num_warmup_steps}
    return Identity({**flags, **configuration, VOCABULARY: vocabulary, **sizes}, args, plan)


def compare(saved: Mapping[str, Any], current: Identity, step: int, path: str) -> dict[str, list]:
    """What differs from the run that made a checkpoint after so many steps, {name: [then, now]}: all of it was allowed to.

    Nothing needs to be allowed if the result so far is what the current flags would have given. Anything else ends the
    program with a line that names it, and all that would have to be allowed.
    """
    if current.plan.num_steps < step:
        cli.fail(f"{STEPS} is {current.plan.num_steps}, but {path} is after step {step} already; give at least as many")
    # Flags that came later were not set; nor was the vocabulary noted always.
    saved = defaults(current.args) | {VOCABULARY: current.values[VOCABULARY]} | dict(saved)
    different = [name for name in [*current.values, *(saved.keys() - current.values.keys())]
                 if saved.get(name) != current.values.get(name)]  # fmt: skip
    if not SCHEDULE.isdisjoint(different) and np.array_equal(rates(current.values, current, step), rates(saved, current, step)):
        different = [name for name in different if name not in SCHEDULE]
    changes, given = {}, arguments.changed_values(*current.args)
    allowed, refused, needed = set(named(current.args.training.resume_changes)), [], []
    for name in different:
        if not follows(name, changes, saved, current):
            flags = flags_of(name)
            # That which is named already or else was given, of several that would do.
            needed += sorted(flags, key=lambda flag: (flag not in allowed, flag not in given))[:1]
            refused += [name] if allowed.isdisjoint(flags) else []
        changes[name] = [saved.get(name), current.values.get(name)]
    for name in sorted(refused, key=lambda name: bool(flags_of(name)))[:1]:  # first what nothing allows
        then, now = changes[name]
        cli.fail(
            f"{name} is {now}, but {path} was made with {then}: going on would not give what an uninterrupted run gives;"
            f" restore it, {remedy(name, needed)}, or start anew with --overwrite_output_dir in place of the flag"
        )
    return changes


def follows(name: str, changes: Mapping[str, list], saved: Mapping[str, Any], current: Identity) -> bool:
    """Is the difference one that other changes make by themselves?"""
    training_args = current.args.training
    if name == DATA:
        return changes_text(changes, current.args.data)
    if name == STEPS:  # as many as there are in the epochs
        return training_args.max_steps < 1 and (BATCH in changes or changes_text(changes, current.args.data))
    ratio = 0.0 if training_args.warmup_steps else training_args.warmup_ratio
    return name == WARMUP and STEPS in changes and saved[WARMUP] == math.ceil(ratio * saved[STEPS])


def remedy(name: str, needed: Sequence[str]) -> str:
    """What else there is to do about a difference, where so many flags have to be named to go on."""
    if flags_of(name):
        return f"allow it with --resume_changes {','.join(dict.fromkeys(needed))}"
    config = f" and a --config_name in which {name.removeprefix(FIELD)} is as you want it" if name.startswith(FIELD) else ""
    return f"start a new run from the weights, with --model_name_or_path{config}"


def flags_of(name: str) -> tuple[str, ...]:
    """The flags by which one of the values may be changed knowingly; none of a configuration or an optimizer's kind."""
    if name in CHANGED_BY:
        return CHANGED_BY[name]
    flag = name.removeprefix("--")
    return () if flag == name or flag in FIXED else (flag,)


ALIASES = {"num_train_steps": "max_steps", "dataset_path": "dataset_name"}


def named(resume_changes: str | None) -> Iterator[str]:
    """The flags of --resume_changes, however they are spelled."""
    for name in (resume_changes or "").replace(",", " ").split():
        flag = name.removeprefix("--").replace("-", "_")
        yield ALIASES.get(flag, flag)


def check_changes(args: arguments.Arguments) -> None:
    """Refuse names in --resume_changes that are no flags, or cannot be changed."""
    if args.training.resume_changes is None:
        return
    if not args.training.resume_from_checkpoint:
        cli.fail("--resume_changes: says what may differ from a checkpoint; add --resume_from_checkpoint")
    flags, names = arguments.public(*args), list(named(args.training.resume_changes))
    if not names:
        cli.fail(f"--resume_changes {args.training.resume_changes!r}: names no flag; give names as max_steps,learning_rate")
    for name in names:
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
    flags = {name.removeprefix("--") for name in changes} - set(data_args.noise)
    return any(hasattr(data_args, flag) or flag in (DATA, "seed") for flag in flags)


def defaults(args: arguments.Arguments) -> dict[str, Any]:
    return {f"--{f.name}": f.default for part in args for f in dataclasses.fields(part) if f.name not in FREE_FLAGS and f.repr}


def rates(values: Mapping[str, Any], current: Identity, num_steps: int) -> np.ndarray:
    """The learning rates of the first steps of a run of these values: float32 [num_steps]."""
    training_args = dataclasses.replace(
        current.args.training, **{name[2:]: values[name] for name in SCHEDULE & values.keys() if name.startswith("--")}
    )
    plan = dataclasses.replace(current.plan, num_steps=values[STEPS], num_warmup_steps=values[WARMUP])
    return np.asarray(optimizers.make_learning_rate(training_args, plan)(np.arange(num_steps)))
