# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over a vocabulary, summed and weighted; for many tokens a chunk at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def weighted_cross_entropy(logits_NV: jax.Array, labels_N: jax.Array, weights_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of the cross-entropies, in float32, and of how many labels score highest."""
    losses_N = optax.softmax_cross_entropy_with_integer_labels(logits_NV.astype(jnp.float32), labels_N)
    return (losses_N * weights_N).sum(), ((logits_NV.argmax(-1) == labels_N) * weights_N).sum()


def cross_entropy(head_fn: Callable, head_inputs: Any, hidden_CH, labels_C, weights_C) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of the cross-entropies of some tokens, and of how many labels score highest."""
    scores_CV = head_fn(head_inputs, hidden_CH)
    losses_C = optax.softmax_cross_entropy_with_integer_labels(scores_CV, labels_C)
    return (losses_C * weights_C).sum(), ((scores_CV.argmax(-1) == labels_C) * weights_C).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_cross_entropy(head_fn: Callable, head_inputs: Any, hidden, labels, weights) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy` summed over chunks [chunks, C, ...]. Its gradients are formed in the forward pass.

    There each chunk's scores exist already, so that the backward pass has only to scale: three matrix products in all, as
    without chunks, and never more than one chunk of scores in memory.
    """

    def add_chunk(sums, chunk):
        return jax.tree.map(jnp.add, sums, cross_entropy(head_fn, head_inputs, *chunk)), None

    return jax.lax.scan(add_chunk, (jnp.zeros(()), jnp.zeros(())), (hidden, labels, weights))[0]


def chunked_cross_entropy_fwd(head_fn: Callable, head_inputs: Any, hidden, labels, weights):
    def add_chunk(sums, chunk):
        hidden_CH, labels_C, weights_C = chunk
        loss_fn = functools.partial(cross_entropy, head_fn, labels_C=labels_C, weights_C=weights_C)
        loss, vjp_fn, correct = jax.vjp(loss_fn, head_inputs, hidden_CH, has_aux=True)
        head_grads, hidden_grads_CH = vjp_fn(jnp.ones(()))
        return jax.tree.map(jnp.add, sums, ((loss, correct), head_grads)), hidden_grads_CH

    zeros = (jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, head_inputs)
    (sums, head_grads), hidden_grads = jax.lax.scan(add_chunk, zeros, (hidden, labels, weights))
    return sums, (head_grads, hidden_grads)


def chunked_cross_entropy_bwd(head_fn: Callable, residuals: tuple, cotangents: tuple) -> tuple:
    grads = jax.tree.map(lambda grad: grad * cotangents[0].astype(grad.dtype), residuals)
    return *grads, None, None


chunked_cross_entropy.defvjp(chunked_cross_entropy_fwd, chunked_cross_entropy_bwd)
