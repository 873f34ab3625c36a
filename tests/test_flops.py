# SPDX-License-Identifier: Apache-2.0
"""How much arithmetic a function is."""

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import unflatten_dict
from transformers import GPT2Config

import run_clm_flax
from flaxlm import flops, layers, weights

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
