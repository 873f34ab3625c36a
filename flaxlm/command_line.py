# SPDX-License-Identifier: Apache-2.0
"""The command line of a training script, read and checked: numbers, paths, and one flag against another."""

import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from transformers import CONFIG_MAPPING

from flaxlm import arguments, cli, files, formats, identity, inputs, mixtures, outputs, profiles, reporters, selection

# Headings of --help; an objective's own flags stand above them.
GROUPS = {
    "model": [f.name for f in dataclasses.fields(arguments.ModelArguments)],
    "data": [f.name for f in dataclasses.fields(arguments.DataArguments)],
    "training": [
        "do_train", "do_eval", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
        "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "min_lr_ratio", "num_decay_steps",
        "lr_power", "warmup_steps", "warmup_ratio", "groupbert_schedule", "optim", "weight_decay", "adam_beta1", "adam_beta2",
        "adam_epsilon", "adafactor", "lamb", "lamb_no_bias_correction", "max_grad_norm", "z_loss", "seed",
        "attention_implementation", "gradient_checkpointing", "fsdp",
        "compile_for", "json",
    ],
    "logging, saving, resuming": [
        "output_dir", "overwrite_output_dir", "logging_steps", "logging_first_step", "report_to", "project", "run_name",
        "profile_steps", "eval_steps", "generate_samples", "max_new_tokens", "temperature", "top_p", "save_steps",
        "save_total_limit", "save_safetensors", "resume_from_checkpoint", "resume_changes", "load_best_model_at_end",
        "metric_for_best_model", "greater_is_better", "early_stopping_patience", "early_stopping_threshold",
    ],
    "the Hub": ["push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_strategy"],
    "several processes": ["multihost", "coordinator_address", "num_processes", "process_id"],
}  # fmt: skip


def parse(
    argv: Sequence[str] | None,
    data_class: type[arguments.DataArguments],
    classes: arguments.Classes,
    description: str | None,
) -> arguments.Arguments:
    """Read the command line (or its JSON file) and check all that can be checked without loading anything.

    `data_class` has the objective's own flags beside those of DataArguments; `description` heads what --help prints.
    """
    parser = cli.ScriptArgumentParser(
        (arguments.ModelArguments, data_class, arguments.TrainingArguments),
        description=(description or "").partition("\n")[0],
        groups=GROUPS,
    )
    args = arguments.Arguments(*parser.parse(argv))
    if "logging_steps" not in parser.given:
        args.training.least_log_lines = 10
    for name in ("report_to", "resume_changes"):
        if isinstance(words := getattr(args.training, name), list):  # as argparse gives several
            setattr(args.training, name, " ".join(words))
    args.training.output_dir = os.path.expanduser(args.training.output_dir)
    if not (args.training.do_train or args.training.do_eval):
        args.training.do_train = args.training.do_eval = True
    for part in args:
        check_numbers(part)
    check_paths(args)
    if args.training.compile_for:
        forget_the_run(args.training)
    check_training_arguments(args.training)
    settle_optimizer(args.training, parser.given)
    check_model_arguments(args.model, args.training, classes)
    if not args.training.compile_for:
        check_data_arguments(args.data, args.training, args.model.token)
        check_mixture(args)
        reporters.check(args.training)
        profiles.check(args.training, args.training.max_steps if args.training.max_steps > 0 else sys.maxsize)
        check_output_dir(args.training)
    check_samples(args.training, args.data)
    args.data.check(args.model)
    selection.check(args.training)
    identity.check_changes(args)
    if not args.training.compile_for:
        reporters.check_login(args.training, outputs.goes_on(args.training))
    return args


# Flag: (lowest, highest legal value, both included). An objective adds its own in DataArguments.limits.
MANY = 2**20  # rows on a device, more than any can hold
LIMITS = {
    "per_device_train_batch_size": (1, MANY),
    "per_device_eval_batch_size": (1, MANY),
    "logging_steps": (1, math.inf),
    "save_steps": (1, math.inf),
    "save_total_limit": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "num_processes": (1, math.inf),
    "process_id": (0, math.inf),
    "shuffle_buffer_size": (1, math.inf),
    "num_eval_samples": (1, math.inf),
    "eval_steps": (1, math.inf),
    "early_stopping_patience": (1, math.inf),
    "early_stopping_threshold": (0, math.inf),
    "max_new_tokens": (1, 2**16),
    "temperature": (0, math.inf),
    "top_p": (math.nextafter(0, 1), 1),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, math.nextafter(1, 0)),
    "adam_beta2": (0, math.nextafter(1, 0)),
    "adam_epsilon": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "z_loss": (0, math.inf),
    "min_lr_ratio": (0, 1),
    "num_decay_steps": (1, math.inf),
    "lr_power": (math.nextafter(0, 1), math.inf),
    "num_train_epochs": (math.nextafter(0, 1), math.inf),
    "warmup_steps": (0, math.inf),
    "warmup_ratio": (0, 1),
    "validation_split_percentage": (1, 99),
    "max_seq_length": (1, math.inf),
    "preprocessing_num_workers": (1, math.inf),
    "max_train_samples": (1, math.inf),
    "max_eval_samples": (1, math.inf),
    "seed": (0, 2**32 - 1),
}


def check_numbers(part: Any) -> None:
    """Numbers that are possible at all."""
    for name, value in vars(part).items():
        if isinstance(value, float) and not math.isfinite(value):
            cli.fail(f"--{name} {value}: must be a finite number")
        low, high = (LIMITS | getattr(part, "limits", {})).get(name, (-math.inf, math.inf))
        if isinstance(value, (int, float)) and not low <= value <= high:
            limits = f"between {low:g} and {high:g}"
            if high >= MANY:
                limits = f"at least {low:g}" if value < low else f"at most {high}"
            cli.fail(f"--{name} {value}: must be {'more than 0' if 0 < low < 1e-9 else limits}")


PATHS = ("_dir", "_file", "_name", "_path", "_checkpoint", "generate_samples")  # ends of the names of flags


def check_paths(args: arguments.Arguments) -> None:
    """Files and directories are local ones, but for text to read; of the Hub there are names."""
    remedies = {
        "output_dir": "write to a local directory and copy it afterwards, or use --push_to_hub",
        "cache_dir": "name a local directory",
        "dataset_name": "give files at an address to --train_file",
    }
    for part in args:
        for name, value in vars(part).items():
            if isinstance(value, str) and "://" in value and name.endswith(PATHS):
                remedy = remedies.get(name, "download it first, and name the local copy")
                cli.fail(f"--{name} {value}: an address, which is not opened here; {remedy}")
    for name in ("output_dir", "resume_from_checkpoint"):  # orbax looks for its files by patterns
        value = getattr(args.training, name)
        path = os.path.abspath(value or args.training.output_dir)
        if value and set("*?[") & set(path):
            cli.fail(f"--{name} {path}: checkpoints cannot be kept under a path with *, ? or [ in it; rename it")


def forget_the_run(training_args: arguments.TrainingArguments) -> None:
    """The command line of a run from which only programs are compiled: alone, without uploads."""
    training_args.push_to_hub = training_args.multihost = False
    training_args.coordinator_address = training_args.num_processes = training_args.process_id = None


def check_training_arguments(training_args: arguments.TrainingArguments) -> None:
    """Do length, optimizer, schedule and processes go together?"""
    if training_args.max_steps == 0 or training_args.max_steps < -1:
        cli.fail(f"--max_steps {training_args.max_steps}: must be at least 1, or -1 to train for --num_train_epochs")
    if training_args.coordinator_address is None and (training_args.num_processes or training_args.process_id) is not None:
        cli.fail("--num_processes, --process_id: need --coordinator_address host:port, the address of process 0")
    if training_args.coordinator_address and None in (training_args.num_processes, training_args.process_id):
        cli.fail("--coordinator_address: needs --num_processes and --process_id too")
    if training_args.json and not training_args.compile_for:
        cli.fail("--json: says how --compile_for answers; add that or drop the flag")
    if training_args.lamb and training_args.adafactor:
        cli.fail("--lamb, --adafactor: name one optimizer")
    name = arguments.optimizer_of(training_args)
    if training_args.optim not in ("adamw", name):
        cli.fail(f"--optim {training_args.optim}, --{name}: name one optimizer")
    if training_args.lamb_no_bias_correction and name != "lamb":
        cli.fail("--lamb_no_bias_correction: changes LAMB; add --lamb or drop the flag")
    check_schedule(training_args)


DECAYING = ("linear", "cosine", "polynomial", "warmup_stable_decay")  # schedules with an end to go down to


def check_schedule(training_args: arguments.TrainingArguments) -> None:
    """Has the schedule what the flags change of it, and the run room for it? Where epochs count that is seen later."""
    kind, max_steps = training_args.lr_scheduler_type, training_args.max_steps
    if training_args.groupbert_schedule and kind != "linear":
        cli.fail(f"--lr_scheduler_type {kind}: not with --groupbert_schedule, which is linear")
    if training_args.min_lr_ratio and (training_args.groupbert_schedule or kind not in DECAYING):
        schedule = "--groupbert_schedule" if training_args.groupbert_schedule else f"--lr_scheduler_type {kind}"
        cli.fail(f"--min_lr_ratio {training_args.min_lr_ratio}: not with {schedule}; with {', '.join(DECAYING)}")
    if training_args.num_decay_steps and kind != "warmup_stable_decay":
        cli.fail(f"--num_decay_steps: not with --lr_scheduler_type {kind}; add --lr_scheduler_type warmup_stable_decay")
    if training_args.lr_power != 1 and kind != "polynomial":
        cli.fail(f"--lr_power: not with --lr_scheduler_type {kind}; add --lr_scheduler_type polynomial")
    num_steps = training_args.warmup_steps + (training_args.num_decay_steps or 0)
    if training_args.num_decay_steps and num_steps > max_steps > 0:
        cli.fail(
            f"--num_decay_steps {training_args.num_decay_steps}: with --warmup_steps {training_args.warmup_steps} more than"
            f" --max_steps {max_steps}; lower one of them"
        )


def settle_optimizer(training_args: arguments.TrainingArguments, given: set[str]) -> None:
    """One name for the optimizer, whichever flag named it, so that records and checkpoints tell it alike; Lion's defaults."""
    training_args.optim = arguments.optimizer_of(training_args)
    training_args.adafactor = training_args.lamb = False
    if training_args.optim == "lion" and "adam_beta2" not in given:
        training_args.adam_beta2 = arguments.LION_BETA2


def check_samples(training_args: arguments.TrainingArguments, data_args: arguments.DataArguments) -> None:
    """Are there prompts, a model that can continue them, and a time to do so?"""
    changes = arguments.changed_values(training_args)
    if not training_args.generate_samples:
        for name in ("max_new_tokens", "temperature", "top_p"):
            if name in changes:
                cli.fail(f"--{name}: says how --generate_samples writes; add that or drop the flag")
        return
    flag = f"--generate_samples {training_args.generate_samples}"
    if not data_args.writes_text:
        cli.fail(f"{flag}: a model of this script fills gaps and continues no text; drop the flag")
    if not training_args.do_eval:
        cli.fail(f"{flag}: samples are written when the model is evaluated; add --do_eval or drop the flag")
    if training_args.temperature == 0 and training_args.top_p < 1:
        cli.fail("--top_p: chooses among which tokens one is drawn, and --temperature 0 draws none; drop one of them")
    files.read_prompts(training_args.generate_samples, "--generate_samples")


def check_data_arguments(
    data_args: arguments.DataArguments, training_args: arguments.TrainingArguments, token: str | None = None
) -> None:
    """Is there data, and of a kind that can be read?"""
    if data_args.streaming and training_args.do_train and training_args.max_steps < 1:
        cli.fail("--streaming: needs --max_steps, since the length of a stream is not known")
    if data_args.streaming and data_args.max_train_samples:
        cli.fail("--max_train_samples: not with --streaming; --max_steps says how much is trained on")
    if data_args.mixture_file:
        mixtures.check_names_no_other_data(data_args)
    elif not (data_args.dataset_name or data_args.train_file or data_args.validation_file):
        cli.fail("no data: give --dataset_name, or --train_file (and --validation_file)")
    if training_args.do_train and not (data_args.dataset_name or data_args.train_file or data_args.mixture_file):
        cli.fail("--do_train: needs --train_file or --dataset_name")
    for name in ("train_split_name", "eval_split_name"):
        if getattr(data_args, name) and not data_args.dataset_name:
            cli.fail(f"--{name}: names a split of --dataset_name, which is not given")
    if data_args.eval_split_name and data_args.validation_file:
        cli.fail("--eval_split_name, --validation_file: name one thing to evaluate")
    for name in ("train_file", "validation_file"):
        found = inputs.find(getattr(data_args, name), f"--{name}", token) if getattr(data_args, name) else None
        if data_args.encoding:
            formats.check_encoding_name(data_args.encoding, found.paths if found else [])


def check_mixture(args: arguments.Arguments) -> None:
    """Could each corpus of --mixture_file be trained on alone?"""
    path = args.data.mixture_file
    parts = mixtures.read(path) if path else []
    for part, own in zip(parts, mixtures.arguments_of(parts, args), strict=True):
        with mixtures.telling(path, part.name):
            cli.check_text(own.data)
            check_numbers(own.data)
            check_paths(own)
            check_data_arguments(own.data, own.training, own.model.token)


def check_model_arguments(
    model_args: arguments.ModelArguments, training_args: arguments.TrainingArguments, classes: arguments.Classes
) -> None:
    """Is it said which model, and which tokenizer; can it compute like that?"""
    if not (model_args.config_name or model_args.model_name_or_path or model_args.model_type):
        cli.fail("no model: give --config_name, --model_type or --model_name_or_path")
    if not (model_args.tokenizer_name or model_args.model_name_or_path):
        cli.fail("no tokenizer: give --tokenizer_name (prepare_model_dir.py trains one) or --model_name_or_path")
    if model_args.model_type and model_args.model_type not in CONFIG_MAPPING:
        cli.fail(f"--model_type {model_args.model_type}: unknown; {arguments.supported(classes)}")
    if model_args.config_overrides and model_args.model_name_or_path:
        cli.fail("--config_overrides: changes fresh models only; the weights of --model_name_or_path fix the configuration")
    if model_args.resize_token_embeddings and not model_args.model_name_or_path:
        cli.fail("--resize_token_embeddings: adds rows to the weights of --model_name_or_path; a fresh model has what it needs")
    if model_args.dtype == "float16":
        cli.fail("--dtype float16: would need loss scaling, which this script does not do; use bfloat16")
    if training_args.attention_implementation == "cudnn" and model_args.dtype == "float32":
        cli.fail("--attention_implementation cudnn: has no float32; add --dtype bfloat16, or use chunked")


def check_output_dir(training_args: arguments.TrainingArguments) -> None:
    """Is there a place for the results, and nothing in it that would be lost?"""
    path = training_args.output_dir
    if os.path.exists(path) and not os.path.isdir(path):
        cli.fail(f"--output_dir {path}: is a file; name a directory")
    outputs.check_free(training_args)
    if not (training_args.do_train and outputs.is_occupied(path)) or training_args.overwrite_output_dir:
        return
    if training_args.resume_from_checkpoint == outputs.AUTO:
        outputs.check_resumable(path)
    elif not training_args.resume_from_checkpoint:
        cli.fail(f"--output_dir {path}: is not empty; name another or add --overwrite_output_dir")
