# SPDX-License-Identifier: Apache-2.0
"""What lies where: weights, gradients and optimizer state spread over eight devices compute what they compute on each."""

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file
from transformers import GPT2Config

from flaxlm import sharding, weights
from flaxlm.models import gpt2
from tests.conftest import ROOT, read_events
from tests.test_streams import assert_same_run, back_to


class Case(NamedTuple):
    """A script, and a model whose matrices eight devices can share; with dropout."""

    script: str
    model_dir: str  # fixture
    overrides: str
    length: str = "--max_seq_length"
    flag: str = ""


BERT = "hidden_size=128,intermediate_size=256,hidden_dropout_prob=0.1"
BART = "d_model=128,encoder_ffn_dim=256,decoder_ffn_dim=256,dropout=0.1"
CASES = [
    Case("run_mlm_flax.py", "roberta_dir", BERT),
    Case("run_clm_flax.py", "gpt2_dir", "n_embd=128,resid_pdrop=0.1", "--block_size"),
    Case("run_t5_mlm_flax.py", "t5_dir", "d_model=128,d_ff=256,d_kv=64,dropout_rate=0.1,initializer_factor=0.1"),
    Case("run_bart_dlm_flax.py", "bart_dir", BART),
    Case("run_pretraining_flax.py", "bert_dir", BERT, flag="--line_by_line"),
]
# The main of a script once for each line of flags, in one process with eight devices.
RUNS = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
script = importlib.import_module(sys.argv[2])
for line in sys.stdin:
    script.main(line.split())
"""


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.script.removesuffix(".py"))
def case(request) -> Case:
    return request.param


@pytest.fixture(scope="module")
def line(case, request, corpus) -> Callable:
    """line(output_dir, *flags): what one would type behind the script's name."""
    model_dir = request.getfixturevalue(case.model_dir)
    common = [
        "--config_name", model_dir, "--tokenizer_name", model_dir, "--train_file", corpus, case.length, 32, "--max_steps", 20,
        "--learning_rate", 1e-3, "--logging_steps", 1, "--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 2,
        "--max_eval_samples", 40, "--config_overrides", case.overrides, case.flag,
        "--adam_epsilon", 1e-4,  # gradients that are zero but for rounding, as that of the bias of keys, Adam would blow up
    ]  # fmt: skip
    return lambda output_dir, *flags: " ".join(map(str, [*common, "--output_dir", output_dir, *flags]))


def run_lines(script: str, *lines: str, devices: int = 8) -> str:
    """The log."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-c", RUNS, str(ROOT), script.removesuffix(".py")]
    done = subprocess.run(command, input="\n".join(lines), env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_spread_equals_replicated(case, line, tmp_path):
    """20 steps with each optimizer: losses, gradient norms, evaluation and weights to 1e-6."""
    more = {"adamw": [], "adafactor": ["--adafactor", "--gradient_checkpointing"]}
    more["lamb"] = ["--lamb", "--max_grad_norm", 0.5]
    more["lamb"] += ["--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 1]
    more["muon"] = ["--optim", "muon", "--z_loss", 1e-3, "--max_grad_norm", 0.5]
    runs = more | {f"{name}-spread": [*f, "--fsdp"] for name, f in more.items()}
    log = run_lines(case.script, *(line(tmp_path / name, *flags) for name, flags in runs.items()))
    for name in more:
        one, two = (read_events(tmp_path / run) for run in (name, f"{name}-spread"))
        for tag in ("train_loss", "train_grad_norm", "eval_loss", "eval_accuracy"):
            assert [x for x, _ in one[tag]] == [x for x, _ in two[tag]]
            assert [v for _, v in one[tag]] == pytest.approx([v for _, v in two[tag]], rel=1e-6), (name, tag)
        one, two = (load_file(tmp_path / run / "model.safetensors") for run in (name, f"{name}-spread"))
        assert one.keys() == two.keys()
        for key in one:
            is_of_keys = re.search(r"(key|k_proj|c_attn)\.bias", key)  # its gradient is rounding, which Adafactor makes large
            np.testing.assert_allclose(one[key], two[key], atol=1e-4 if is_of_keys else 1e-6, err_msg=f"{name} {key}")
    said = re.findall(r"([\d.]+) MiB on each device instead of ([\d.]+) MiB", log)
    assert len(said) == len(more)
    assert float(said[0][0]) < float(said[0][1]) / 5, said  # norms and biases are on every device, here not few


@pytest.mark.parametrize("case", CASES[1:2], ids=["run_clm_flax"], indirect=True)
def test_muon_on_one_device_and_spread_over_eight(case, line, tmp_path):
    """Its products are of whole matrices, wherever their parts lie; without dropout, which differs between devices."""
    flags = ["--config_overrides", "n_embd=128,resid_pdrop=0", "--max_steps", 8, "--optim", "muon", "--weight_decay", 0.1]
    run_lines(case.script, line(tmp_path / "one", *flags, "--per_device_train_batch_size", 16), devices=1)
    run_lines(case.script, line(tmp_path / "eight", *flags, "--fsdp"))
    one, two = (read_events(tmp_path / run) for run in ("one", "eight"))
    for tag in ("train_loss", "train_grad_norm", "eval_loss"):
        assert [v for _, v in one[tag]] == pytest.approx([v for _, v in two[tag]], rel=1e-5), tag


def test_spread_goes_on_exactly(case, line, tmp_path):
    """From a checkpoint in the middle, bit for bit; on four devices with the same batch too, but for rounding and dropout."""
    flags = ["--fsdp", "--save_steps", 10, "--eval_steps", 5, "--logging_steps", 3]
    run_lines(case.script, line(tmp_path / "whole", *flags))
    resumed, elsewhere = (back_to(tmp_path / "whole", tmp_path / name, 10) for name in ("resumed", "elsewhere"))
    log = run_lines(case.script, line(resumed, *flags, "--resume_from_checkpoint"))
    assert "Resuming after step 10" in log
    assert_same_run(tmp_path / "whole", resumed)
    fewer = [*flags, "--resume_from_checkpoint", "--per_device_train_batch_size", 4]
    run_lines(case.script, line(elsewhere, *fewer), devices=4)
    one, two = (read_events(path)["eval_loss"][-1][1] for path in (resumed, elsewhere))
    assert one == pytest.approx(two, rel=1e-2)


class Eight:
    size = 8


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((50257, 768), PartitionSpec(None, "data")),  # the vocabulary cannot be shared
        ((32000, 4096), PartitionSpec("data")),
        ((768, 3072), PartitionSpec(None, "data")),
        ((3072,), PartitionSpec()),  # small
        ((1 << 20,), PartitionSpec("data")),
        ((1001, 1003), PartitionSpec()),
        ((), PartitionSpec()),
    ],
)
def test_where_an_array_lies(shape, spec):
    assert sharding.Devices(Eight(), spread=True).spec(shape) == spec
    assert sharding.Devices(Eight()).spec(shape) == PartitionSpec()


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_how_little_lies_on_each_device(name):
    """Of a GPT-2 with AdamW an eighth, but for norms and biases; Adafactor's statistics are rows and columns."""
    model = gpt2.GPT2LMHeadModel(GPT2Config(n_layer=2))
    params = unflatten_dict(weights.shapes_of(model))
    shapes = jax.eval_shape(functools.partial(sharding.first_state, optimizer=getattr(optax, name)(1e-3)), params)
    mesh = jax.sharding.AbstractMesh((8,), ("data",))
    spread = sharding.bytes_per_device(shapes, sharding.Devices(mesh, spread=True).shardings(shapes))
    assert spread < sharding.bytes_per_device(shapes) / 7
    assert sharding.bytes_per_device(shapes, sharding.Devices(mesh).shardings(shapes)) == sharding.bytes_per_device(shapes)


def test_what_does_not_fit_is_told_with_the_flags_that_change_it(error_of):
    """By a real refusal of XLA to allocate 64 TiB."""
    step = sharding.CompiledStep("training", lambda size: jnp.ones((2**44,)) * size)
    line = error_of(step, 1.0)
    assert "the training step does not fit into the memory of a device: lower --per_device_train_batch_size" in line
    assert "--fsdp" in line and "--compile_for this" in line
