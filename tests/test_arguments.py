# SPDX-License-Identifier: Apache-2.0
"""The flags: each is read, explained, and as in the original scripts."""

import ast
import dataclasses
import importlib

import pytest

import run_mlm_flax as script
from flaxlm import arguments, batches, command_line, processes
from tests.conftest import ROOT

SCRIPTS = sorted(ROOT.glob("run_*_flax.py"))
PACKAGE = [path.stem for path in (ROOT / "flaxlm").glob("*.py")]


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "prepare_model_dir.py"], ids=lambda path: path.name)
def test_every_flag_is_read(path):
    """A flag that is declared and never looked at is a lie (defects 63, 82)."""
    package = [ROOT / "flaxlm" / f"{name}.py" for name in PACKAGE] if "DataArguments" in path.read_text() else []
    nodes_of = {file: ast.parse(file.read_text()).body for file in (path, *package)}
    tree = ast.Module([node for nodes in nodes_of.values() for node in nodes], [])
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments")]
    fields = [part for node in classes for part in node.body if isinstance(part, ast.AnnAssign)]
    flags = [part for part in fields if "ClassVar" not in ast.unparse(part.annotation)]
    declared = {part.target.id for part in flags}
    # Everything else in the file reads: functions, methods, and constants that hold a flag's name.
    readers = [node for node in tree.body if node not in classes]
    readers += [part for node in classes for part in node.body if part not in flags]
    nodes = [node for part in readers for node in ast.walk(part)]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    read |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    read |= {f"{split}{suffix}" for split in ("train", "validation") for suffix in ("_file", "_ref_file")}  # read in loops
    unread = declared - read
    assert len(declared) > 8
    assert not unread


def test_every_flag_has_help_and_a_default():
    for part in (arguments.TrainingArguments, arguments.ModelArguments, script.DataTrainingArguments):
        for field in dataclasses.fields(part):
            assert len(field.metadata["help"]) > 10, field.name
            assert field.name == "output_dir" or field.default is not dataclasses.MISSING


ORIGINAL_FLAGS = {
    "overwrite_output_dir": False, "do_train": False, "do_eval": False, "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8, "learning_rate": 5e-5, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999,
    "adam_epsilon": 1e-8, "adafactor": False, "num_train_epochs": 3.0, "warmup_steps": 0, "logging_steps": 500,
    "save_steps": 500, "eval_steps": None, "seed": 42, "model_name_or_path": None, "model_type": None, "config_name": None,
    "tokenizer_name": None, "cache_dir": None, "use_fast_tokenizer": True, "dtype": "float32", "token": None,
    "trust_remote_code": False, "dataset_name": None, "dataset_config_name": None, "train_file": None,
    "validation_file": None, "overwrite_cache": False, "validation_split_percentage": 5, "preprocessing_num_workers": None,
    "push_to_hub": False, "hub_model_id": None, "hub_token": None,
}  # fmt: skip


REFERENCE_FILES = {"train_ref_file": None, "validation_ref_file": None}


ORIGINAL_FLAGS_OF = {
    "run_mlm_flax": REFERENCE_FILES
    | {"gradient_checkpointing": False, "max_seq_length": None, "mlm_probability": 0.15, "pad_to_max_length": False}
    | {"line_by_line": False},
    "run_clm_flax": {"block_size": None, "max_train_samples": None, "max_eval_samples": None, "keep_linebreaks": True},
    "run_t5_mlm_flax": REFERENCE_FILES | {"max_seq_length": None, "mlm_probability": 0.15, "mean_noise_span_length": 3.0},
    "run_bart_dlm_flax": REFERENCE_FILES
    | {"max_seq_length": None, "mlm_probability": 0.3, "permute_sentence_ratio": 1.0, "poisson_lambda": 3.0},
}


@pytest.mark.parametrize("name", ORIGINAL_FLAGS_OF)
def test_original_flags_and_defaults(name):
    """Every flag of the original script, with its default: old command lines go on working."""
    module, original = importlib.import_module(name), ORIGINAL_FLAGS | ORIGINAL_FLAGS_OF[name]
    parts = (arguments.TrainingArguments, arguments.ModelArguments, module.DataTrainingArguments)
    fields = {field.name: field for part in parts for field in dataclasses.fields(part)}
    assert {flag: fields[flag].default for flag in original} == original
    assert fields["output_dir"].default is dataclasses.MISSING


BASE = ["--config_name", "x", "--tokenizer_name", "x", "--train_file", "README.md", "--output_dir", "out"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate", "inf"], "--learning_rate inf: must be a finite number"),
        (["--weight_decay", "nan"], "--weight_decay nan: must be a finite number"),
        (["--mlm_probability", "nan"], "--mlm_probability nan: must be a finite number"),
        (["--num_train_epochs", "inf"], "--num_train_epochs inf: must be a finite number"),
        (["--warmup_ratio=-inf"], "--warmup_ratio -inf: must be a finite number"),
        (
            ["--per_device_eval_batch_size", "1000000000"],
            "--per_device_eval_batch_size 1000000000: must be at most 1048576",
        ),
        (["--per_device_train_batch_size", "2000000"], "--per_device_train_batch_size 2000000: must be at most 1048576"),
        (["--min_lr_ratio", "1.5"], "--min_lr_ratio 1.5: must be between 0 and 1"),
        (["--min_lr_ratio", "0.1", "--lr_scheduler_type", "constant"], "--min_lr_ratio 0.1: not with --lr_scheduler_type c"),
        (["--min_lr_ratio", "0.1", "--lr_scheduler_type", "inverse_sqrt"], "--min_lr_ratio 0.1: not with .* inverse_sqrt"),
        (["--min_lr_ratio", "0.1", "--groupbert_schedule"], "--min_lr_ratio 0.1: not with --groupbert_schedule"),
        (["--num_decay_steps", "0"], "--num_decay_steps 0: must be at least 1"),
        (["--num_decay_steps", "9"], "--num_decay_steps: not with --lr_scheduler_type linear; add .*warmup_stable_decay"),
        (
            ["--lr_scheduler_type", "warmup_stable_decay", "--max_steps", "9", "--warmup_steps", "5", "--num_decay_steps", "5"],
            "--num_decay_steps 5: with --warmup_steps 5 more than --max_steps 9",
        ),
        (["--lr_power", "0"], "--lr_power 0.0: must be more than 0"),
        (["--lr_power", "2"], "--lr_power: not with --lr_scheduler_type linear; add --lr_scheduler_type polynomial"),
        (["--optim", "lion", "--adafactor"], "--optim lion, --adafactor: name one optimizer"),
        (["--optim", "adafactor", "--lamb"], "--optim adafactor, --lamb: name one optimizer"),
        (["--lamb", "--adafactor"], "--lamb, --adafactor: name one optimizer"),
        (["--optim", "muon", "--lamb_no_bias_correction"], "--lamb_no_bias_correction: changes LAMB"),
        (["--optim", "sgd"], "--optim"),
        (["--z_loss", "-1"], "--z_loss -1.0: must be at least 0"),
        (["--output_dir", "gs://bucket/run"], "--output_dir gs://bucket/run: an address, .* --push_to_hub"),
        (["--output_dir", "s3://bucket/run"], "--output_dir s3://bucket/run: an address"),
        (["--config_name", "https://x.org/a"], "--config_name https://x.org/a: an address, .* download it first"),
        (["--dataset_name", "hf://datasets/a"], "--dataset_name hf://datasets/a: an address, .* to --train_file"),
        (["--train_file", "https://x.org/a.doc"], "--train_file https://x.org/a.doc: unknown suffix"),
        (["--train_file", "abfs://b/a.txt"], "--train_file abfs://b/a.txt: abfs:// needs a package .*: pip install adlfs"),
        (["--train_file", "x.txt", "gs://b/a*.txt"], "--train_file x.txt: no such file"),
        (["--train_file", "abfs://b/a*.txt"], r"--train_file abfs://b/a\*.txt: abfs:// needs a package .*: pip install adlfs"),
        (["--train_file", "odd://b/a.txt"], "--train_file odd://b/a.txt: fsspec .* has no protocol odd://"),
        (["--model_name_or_path", "gs://a"], "--model_name_or_path gs://a: an address"),
        (["--cache_dir", "gs://a"], "--cache_dir gs://a: an address, .* local directory"),
        (["--output_dir", "lr=[1e-3]"], r"--output_dir .*lr=\[1e-3\]: checkpoints cannot be kept under a path with"),
        (["--output_dir", "what?/run"], "--output_dir .*: checkpoints cannot be kept under a path with"),
        (["--resume_from_checkpoint", "a*"], "--resume_from_checkpoint .*: checkpoints cannot be kept under a path with"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_values_that_cannot_be(flags, message, refuses):
    """At once, before any file is looked for."""
    with refuses(message):
        command_line.parse([*BASE, *flags], script.DataTrainingArguments, script.MODELS, None)


@pytest.mark.parametrize(
    ("flags", "optim", "beta2"),
    [
        ([], "adamw", 0.999),
        (["--adafactor"], "adafactor", 0.999),
        (["--optim", "adafactor", "--adafactor"], "adafactor", 0.999),
        (["--lamb"], "lamb", 0.999),
        (["--optim", "lion"], "lion", 0.99),
        (["--optim", "lion", "--adam_beta2", "0.999"], "lion", 0.999),
        (["--optim", "lion", "--adam-beta2=0.95"], "lion", 0.95),
        (["--optim", "muon"], "muon", 0.999),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_name_for_an_optimizer(flags, optim, beta2, corpus, tmp_path):
    """Whichever flag named it; and Lion's own second beta, unless one is set."""
    argv = [*BASE, "--train_file", str(corpus), "--output_dir", str(tmp_path / "out"), *flags]
    found = command_line.parse(argv, script.DataTrainingArguments, script.MODELS, None).training
    assert (found.optim, found.adam_beta2, found.adafactor, found.lamb) == (optim, beta2, False, False)


def test_more_steps_than_can_be_counted(refuses):
    training_args = arguments.TrainingArguments(output_dir="", do_train=True, num_train_epochs=1e300)
    with refuses("--num_train_epochs: makes 1[0-9]+ steps; at most 2147483647 can be counted"):
        batches.make_plan(training_args, 100, 32)


@pytest.mark.parametrize("platform", ["cuda", "gpu", "tpu", "cpu,cuda"])
def test_a_platform_that_jax_has_no_support_for(platform, refuses, monkeypatch):
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    with refuses(rf"^JAX_PLATFORMS={platform}: jax has no support for (cuda|gpu|tpu) here; pip install -U \"jax\["):
        processes.check_platforms(platform)
    processes.check_platforms("cpu")
    processes.check_platforms("")


def test_no_device(refuses, monkeypatch):
    """A plugin is there, but no GPU: jax says so in an assertion."""

    def fail():
        raise AssertionError

    monkeypatch.setattr(processes.jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with refuses("^JAX_PLATFORMS=cuda: no device can be used: AssertionError; check the driver"):
        processes.devices()
