# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over a vocabulary, summed and weighted, from hidden states and a model's head; never [tokens, vocabulary]."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from flaxlm import sharding

CHUNK_SCORES = 2**22  # scores at a time, 16 MiB in float32, or more if there were more than ...
MAX_CHUNKS = 16  # ... so many chunks, or chunks of fewer tokens than ...
CHUNK_TOKENS = 1024  # ... so many: small ones keep no accelerator busy


def labelled_cross_entropy(
    model: nn.Module, params: Any, hidden_BTH: jax.Array, positions_K: jax.Array, labels_K: jax.Array, weights_K: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of the tokens at flat positions into B * T only: the weighted sum, and that of how many labels score highest.

    So the head sees [K, H], and the scores are [K, V].
    """
    hidden_KH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])[positions_K]
    scores_KV = model.apply({"params": params}, hidden_KH, method="scores")
    return weighted_cross_entropy(scores_KV, labels_K, weights_K)


def fused_cross_entropy(
    model: nn.Module, params: Any, hidden_BTH: jax.Array, labels_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of all tokens: the weighted sum, and that of how many labels score highest; head and loss a chunk of them at a time."""
    most_chunks = max(MAX_CHUNKS, labels_BT.size // CHUNK_TOKENS)
    num_chunks = min(math.ceil(labels_BT.size * model.config.vocab_size / CHUNK_SCORES), most_chunks)

    def head_fn(head_params: Any, hidden_CH: jax.Array) -> jax.Array:
        return model.apply({"params": head_params}, hidden_CH, method="scores").astype(jnp.float32)

    def cut(array: jax.Array) -> jax.Array:
        """[N, ...] to [chunks, C, ...], the last one filled up with zeros: its weights too."""
        size = math.ceil(len(array) / num_chunks)
        array = jnp.pad(array, [(0, size * num_chunks - len(array)), *[(0, 0)] * (array.ndim - 1)])
        return array.reshape(num_chunks, size, *array.shape[1:])

    hidden_NH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])
    chunks = (cut(array) for array in (hidden_NH, labels_BT.reshape(-1), weights_BT.reshape(-1)))
    return chunked_cross_entropy(head_fn, sharding.whole(only(params, model.head_weights)), *chunks)


def only(tree: Mapping[str, Any], paths: tuple[str, ...]) -> dict[str, Any]:
    """The parts of a tree that lie at these paths, as "cls/predictions": what a function of no other parts gets."""
    found: dict[str, Any] = {}
    for path in paths:
        *parents, name = path.split("/")
        source, target = tree, found
        for parent in parents:
            source, target = source[parent], target.setdefault(parent, {})
        target[name] = source[name]
    return found


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
