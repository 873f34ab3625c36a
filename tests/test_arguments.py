# SPDX-License-Identifier: Apache-2.0
"""The flags: each is read, explained, and as in the original scripts."""

import ast
import dataclasses
import importlib

import pytest

import run_mlm_flax as script
from flaxlm import arguments
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
