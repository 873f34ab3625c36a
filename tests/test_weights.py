# SPDX-License-Identifier: Apache-2.0
"""Weights from files, of whichever layout."""

import copy
import importlib.util
import json
import os
import pickle
import shutil
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, BertConfig, GPT2Config, configuration_utils

import run_bart_dlm_flax
import run_clm_flax
import run_mlm_flax as script
import run_t5_mlm_flax
from flaxlm import arguments, sharding, tokenization, weights
from tests.conftest import ROOT, TINY


def test_weights_that_only_pytorch_can_read(trained, corpus, error_of, tmp_path):
    """pytorch_model.bin without PyTorch, or several files of weights: what it is, and what to do."""
    source, flags = tmp_path / "source", ["--do_eval", "--train_file", str(corpus), "--max_seq_length", "32"]
    shutil.copytree(trained[0], source, ignore=shutil.ignore_patterns("*.msgpack", "*.safetensors", "events*", "checkpoint*"))
    flags += ["--model_name_or_path", str(source), "--output_dir", str(tmp_path / "out")]
    assert "no model: " in error_of(script.main, flags)
    (source / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        message = error_of(script.main, flags)
    assert f"--model_name_or_path {source}: its weights are in pytorch_model.bin, which needs PyTorch: install it" in message
    (source / "pytorch_model.bin").unlink()
    (source / "model.safetensors.index.json").write_text("{}")
    assert "its model.safetensors is in several files" in error_of(script.main, flags)


def test_fine_tuning_starts_from_the_weights(trained, corpus, tmp_path, monkeypatch):
    """From a bfloat16 checkpoint in PyTorch layout: float32 masters, and the loss goes on from where it was (defect 86)."""
    warnings = []
    monkeypatch.setattr(configuration_utils.logger, "warning_once", warnings.append)
    output_dir, results = trained
    source = tmp_path / "source"
    shutil.copytree(output_dir, source, ignore=shutil.ignore_patterns("*.msgpack", "events*"))
    weights = load_file(source / "model.safetensors")
    save_file({k: v.astype(jnp.bfloat16) for k, v in weights.items()}, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    tuned = script.main(
        ["--model_name_or_path", str(source), "--train_file", str(corpus), "--max_seq_length", "32", "--max_steps", "3",
         "--output_dir", str(tmp_path / "tuned"), "--learning_rate", "1e-4"]
    )  # fmt: skip
    assert tuned["train_loss"] == pytest.approx(results["eval_loss"], rel=0.1)
    saved = load_file(tmp_path / "tuned" / "model.safetensors")
    assert {array.dtype for array in saved.values()} == {np.dtype("float32")}
    saved_config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert not [message for message in warnings if "torch_dtype" in message]  # a name that transformers warns of
    assert saved_config.get("dtype", saved_config.get("torch_dtype")) == "float32"


# ---- Files that are damaged, or of another model -------------------------------------------------------------------------


def arguments_for(module=script, **model_args) -> arguments.Arguments:
    training_args = arguments.TrainingArguments(output_dir="out")
    return arguments.Arguments(arguments.ModelArguments(**model_args), module.DataTrainingArguments(), training_args)


def load(source: Path, config=None):
    config = config or AutoConfig.from_pretrained(source)
    return weights.load_model(config, arguments_for(model_name_or_path=str(source)), script.MODELS, sharding.make_mesh())


@pytest.fixture
def source(trained, tmp_path) -> Path:
    """A model in both layouts."""
    for name in ("config.json", "flax_model.msgpack", "model.safetensors"):
        shutil.copy(trained[0] / name, tmp_path)
    return tmp_path


class Malicious:
    """An object whose unpickling would run a program."""

    def __init__(self, path: Path):
        self.command = f"touch {path}"

    def __reduce__(self):
        return os.system, (self.command,)


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "cut at the beginning": lambda content: content[:20],
    "empty": lambda content: b"",
    "of git-lfs": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n",
    "text": lambda content: b"not weights",
    "noise": lambda content: np.random.default_rng(0).bytes(1000),
    "msgpack of a number": lambda content: msgpack_serialize(5),
    "msgpack of text": lambda content: msgpack_serialize({"roberta": "text"}),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["flax_model.msgpack", "model.safetensors"])
def test_a_file_of_weights_that_is_damaged(name, damage, source, refuses):
    if name == "model.safetensors":
        (source / "flax_model.msgpack").unlink()
    path = source / name
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with refuses(rf"^--model_name_or_path {source}: no model: .*({name}|git-lfs)"):
        load(source)
    if name == "model.safetensors":  # seen before the text is prepared
        with refuses(rf"^--model_name_or_path {source}: no model: model.safetensors is cut short, damaged or"):
            weights.check(AutoConfig.from_pretrained(source), arguments_for(model_name_or_path=str(source)), script.MODELS)


@pytest.mark.parametrize("name", ["flax_model.msgpack", "model.safetensors"])
def test_nothing_in_a_file_of_weights_is_executed(name, source, refuses):
    if name == "model.safetensors":
        (source / "flax_model.msgpack").unlink()
    (source / name).write_bytes(pickle.dumps(Malicious(source / "executed")))
    with refuses(rf"^--model_name_or_path {source}: no model: .*{name}"):
        load(source)
    assert not (source / "executed").exists()


@pytest.mark.torch
@pytest.mark.parametrize("content", ["pickle", "malicious", "cut", "empty", "text", "list"])
def test_a_pickle_that_is_damaged_or_does_something(content, source, refuses):
    import torch

    (source / "flax_model.msgpack").unlink()
    (source / "model.safetensors").rename(source / "weights")
    path, state = source / "pytorch_model.bin", {k: torch.tensor(v) for k, v in load_file(source / "weights").items()}
    torch.save(state, path)
    load(source)
    if content == "pickle":
        path.write_bytes(pickle.dumps(Malicious(source / "executed")))
    elif content in ("malicious", "list"):
        torch.save(state | {"more": Malicious(source / "executed")} if content == "malicious" else [1, 2], path)
    else:
        path.write_bytes({"cut": path.read_bytes()[:5000], "empty": b"", "text": b"not weights"}[content])
    with refuses(rf"^--model_name_or_path {source}: no model: pytorch_model.bin is (damaged, or holds more|cut short)"):
        load(source)
    assert not (source / "executed").exists()


@pytest.mark.parametrize("name", ["flax_model.msgpack", "model.safetensors"])
def test_weights_of_another_shape(name, source, refuses):
    """No advice that only Python code could follow."""
    if name == "model.safetensors":
        (source / "flax_model.msgpack").unlink()
    config = AutoConfig.from_pretrained(source)
    config.vocab_size += 64
    with refuses("no model: the configuration is not that of the weights: .* has the shape .*576.*512|512.*576"):
        load(source, config)


def test_no_weights_at_all(source, refuses):
    """Seen before the text is prepared; as are weights in several files, and those that only PyTorch could read."""
    args, config = arguments_for(model_name_or_path=str(source)), AutoConfig.from_pretrained(source)
    weights.check(config, args, script.MODELS)
    (source / "flax_model.msgpack").unlink()
    weights.check(config, args, script.MODELS)
    (source / "model.safetensors").unlink()
    with refuses(f"^--model_name_or_path {source}: no model: there is no flax_model.msgpack, no model.safetensors and no"):
        weights.check(config, args, script.MODELS)
    (source / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with refuses("its weights are in pytorch_model.bin, which needs PyTorch: install it"):
            weights.check(config, args, script.MODELS)
    (source / "model.safetensors.index.json").write_text("{}")
    with refuses("its model.safetensors is in several files"):
        weights.check(config, args, script.MODELS)


def test_a_tokenizer_in_use_is_saved_as_it_was(byte_level_tokenizer, source, tmp_path):
    """A stream tokenises, and truncates, in another thread while the model is saved."""
    tokenizer, started = copy.deepcopy(byte_level_tokenizer), threading.Event()

    def tokenize():
        with tokenization.tokenizer_as_loaded(tokenizer):
            assert len(tokenizer("one two three four five", truncation=True, max_length=4).input_ids) == 4
            started.set()
            time.sleep(0.3)

    thread = threading.Thread(target=tokenize)
    thread.start()
    started.wait()
    assert tokenizer.backend_tokenizer.truncation is not None
    config = AutoConfig.from_pretrained(source)
    model = script.MODELS.auto_class.from_config(config, _do_init=False)
    (tmp_path / "out").mkdir()
    params = load_file(source / "model.safetensors")
    weights.save_model(str(tmp_path / "out"), model, params, tokenizer, save_safetensors=False)
    thread.join()
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["truncation"] is None


# ---- Can a model be made? ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", [script, run_clm_flax, run_t5_mlm_flax, run_bart_dlm_flax], ids=lambda module: module.__name__
)
def test_models_of_all_types_can_be_made(module):
    """In their default sizes; their configurations are left as they were."""
    for config_class in module.MODELS.by_config:
        config = config_class()
        module.DataTrainingArguments().adapt_config(config, 128)
        before = config.to_dict()
        weights.check(config, arguments_for(module), module.MODELS)
        assert config.to_dict() == before


def test_sizes_that_nobody_thought_of(refuses):
    """Whatever jax and the classes make of them is one line."""
    config = GPT2Config(n_embd=32, n_head=2)
    config.n_inner = -1  # past the checks of values
    with refuses("^the configuration makes no model: [A-Z]\\w+: "):
        weights.check(config, arguments_for(run_clm_flax), run_clm_flax.MODELS)


def test_gradient_checkpointing_is_refused_before_the_text_is_prepared(refuses):
    args = arguments_for()
    args.training.gradient_checkpointing = True
    weights.check(BertConfig(**TINY), args, script.MODELS)
    with refuses("--gradient_checkpointing: not implemented for distilbert, only for bert, big_bird, electra"):
        weights.check(AutoConfig.for_model("distilbert"), args, script.MODELS)


def test_checking_touches_no_device(run_script, tmp_path):
    """So that the process can still be forked, to tokenise."""
    (tmp_path / "check.py").write_text(
        """from jax._src import xla_bridge
from flaxlm import arguments, tokenization, weights
import run_clm_flax
from transformers import LlamaConfig, GPT2Config
training_args = arguments.TrainingArguments(output_dir="out")
args = arguments.Arguments(arguments.ModelArguments(), run_clm_flax.DataTrainingArguments(), training_args)
for config in (LlamaConfig(), GPT2Config()):
    weights.check(config, args, run_clm_flax.MODELS)
assert not xla_bridge.backends_are_initialized()
"""
    )
    done = run_script(tmp_path / "check.py", env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
