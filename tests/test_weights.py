# SPDX-License-Identifier: Apache-2.0
"""Weights from files, of whichever layout."""

import importlib.util
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import run_mlm_flax as script


def test_weights_that_only_pytorch_can_read(trained, corpus, error_of, tmp_path):
    """pytorch_model.bin without PyTorch, or several files of weights: what it is, and what to do."""
    source, flags = tmp_path / "source", ["--do_eval", "--train_file", str(corpus), "--max_seq_length", "32"]
    shutil.copytree(trained[0], source, ignore=shutil.ignore_patterns("*.msgpack", "*.safetensors", "events*", "checkpoint*"))
    flags += ["--model_name_or_path", str(source), "--output_dir", str(tmp_path / "out")]
    assert "no model: Error no file named flax_model.msgpack" in error_of(script.main, flags)
    (source / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        message = error_of(script.main, flags)
    assert f"--model_name_or_path {source}: its weights are in pytorch_model.bin, which needs PyTorch: install it" in message
    (source / "pytorch_model.bin").unlink()
    (source / "model.safetensors.index.json").write_text("{}")
    assert "its model.safetensors is in several files" in error_of(script.main, flags)


def test_fine_tuning_starts_from_the_weights(trained, corpus, tmp_path):
    """From a bfloat16 checkpoint in PyTorch layout: float32 masters, and the loss goes on from where it was (defect 86)."""
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
    assert saved_config.get("dtype", saved_config.get("torch_dtype")) == "float32"
