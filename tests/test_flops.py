# SPDX-License-Identifier: Apache-2.0
"""How much arithmetic a function is."""

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import unflatten_dict
from transformers import GPT2Config

import run_bart_dlm_flax
import run_clm_flax
import run_mlm_flax
import run_pretraining_flax
import run_t5_mlm_flax
from flaxlm import flops, layers, weights
from tests.test_scripts import make_batch, make_config

A, B = jnp.ones((3, 5)), jnp.ones((5, 7))
PRODUCT = 2 * 3 * 5 * 7


def loop(a, b):
    return jax.lax.scan(lambda total, _: (total + a @ b, None), a @ b, length=10)[0]


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (lambda a, b: a @ b, 1),
        (lambda a, b: jnp.sin(a) + 1, 0),
        (loop, 11),
        (jax.jit(lambda a, b: (a @ b) @ b.T), 2),
        (jax.checkpoint(lambda a, b: a @ b), 1),
        (lambda a, b: jax.lax.cond(a.sum() > 0, lambda: a @ b, lambda: (a @ b) + (a @ b)), 2),
        (lambda a, b: jax.grad(lambda a: (a @ b).sum())(a), 2),
    ],
    ids=["product", "none", "loop", "compiled within", "remat", "the larger branch", "gradient"],
)
def test_count(function, products):
    assert flops.count(function, A, B) == products * PRODUCT


def test_a_model_and_its_gradients():
    """Six for each weight of a matrix and token, twelve for each pair of tokens, layer and feature (Kaplan et al. 2020)."""
    config = GPT2Config(n_layer=3, n_embd=64, n_head=4, n_positions=32, vocab_size=500)
    model, length = run_clm_flax.MODELS["gpt2"](config, layers.Compute()), 32
    ids = jnp.ones((2, length), jnp.int32)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids, "label_weights": jnp.ones(ids.shape)}
    params = unflatten_dict(weights.shapes_of(model))
    found = flops.count(jax.grad(lambda p: run_clm_flax.loss_fn(p, batch, model)[0]), params)
    num_weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    assert found == ids.size * (6 * num_weights + 12 * config.n_layer * config.n_embd * length)


WIDE = {"hidden_size": 256, "intermediate_size": 384, "n_embd": 256, "d_model": 256, "d_ff": 384, "d_kv": 128}
WIDE |= {"encoder_ffn_dim": 384, "decoder_ffn_dim": 384, "head_dim": 128}


@pytest.mark.parametrize(
    ("script", "model_type"),
    [
        (run_mlm_flax, "roberta"), (run_clm_flax, "gpt2"), (run_clm_flax, "llama"), (run_t5_mlm_flax, "t5"),
        (run_bart_dlm_flax, "bart"), (run_pretraining_flax, "bert"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
@pytest.mark.parametrize("with_gradients", [False, True], ids=["forward", "with gradients"])
def test_it_is_what_xla_counts(script, model_type, with_gradients):
    """But for what is no product, sums and exponentials, which are a few per cent of a model that is not tiny."""
    config = make_config(model_type, **WIDE)
    batch, model = make_batch(script, config), script.MODELS[model_type](config, layers.Compute())
    params = unflatten_dict(weights.shapes_of(model))

    def loss_fn(params, batch):
        return script.loss_fn(params, batch, model)

    function = jax.value_and_grad(loss_fn, has_aux=True) if with_gradients else loss_fn
    found, theirs = flops.count(function, params, batch), jax.jit(function).lower(params, batch).cost_analysis()["flops"]
    assert found < theirs < 1.06 * found
