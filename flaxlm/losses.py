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


Sums = tuple[jax.Array, dict[str, jax.Array]]  # what is differentiated, and what is known beside it: see `cross_entropy`


def labelled_cross_entropy(
    model: nn.Module,
    params: Any,
    hidden_BTH: jax.Array,
    positions_K: jax.Array,
    labels_K: jax.Array,
    weights_K: jax.Array,
    z_loss: float = 0.0,
) -> Sums:
    """`cross_entropy` of the tokens at flat positions into B * T only: so the head sees [K, H], and the scores are [K, V]."""
    hidden_KH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])[positions_K]
    scores_KV = model.apply({"params": params}, hidden_KH, method="scores")
    return cross_entropy(scores_KV, labels_K, weights_K, z_loss)


def fused_cross_entropy(
    model: nn.Module,
    params: Any,
    hidden_BTH: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
    z_loss: float = 0.0,
) -> Sums:
    """`cross_entropy` of all tokens; head and loss a chunk of them at a time."""
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
    return chunked_cross_entropy(head_fn, z_loss, sharding.whole(only(params, model.head_weights)), *chunks)


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


def cross_entropy(logits_NV: jax.Array, labels_N: jax.Array, weights_N: jax.Array, z_loss: float = 0.0) -> Sums:
    """Weighted sum of the cross-entropies, in float32, and {"correct": that of how many labels score highest}.

    With `z_loss` the first is to be differentiated only: it has z_loss * log(Z)^2 of each label in it, Z being what its
    softmax divides by (Chowdhery et al. 2022, PaLM, section 5, there 1e-4). What that adds is "z_loss", the rest "loss".
    """
    scores_NV = logits_NV.astype(jnp.float32)
    if z_loss == 0:
        losses_N = optax.softmax_cross_entropy_with_integer_labels(scores_NV, labels_N)
        return (losses_N * weights_N).sum(), {"correct": ((logits_NV.argmax(-1) == labels_N) * weights_N).sum()}
    log_z_N = jax.nn.logsumexp(scores_NV, axis=-1)
    losses_N = log_z_N - jnp.take_along_axis(scores_NV, labels_N[:, None], axis=-1)[:, 0]
    loss, penalty = (losses_N * weights_N).sum(), z_loss * (log_z_N**2 * weights_N).sum()
    correct = ((logits_NV.argmax(-1) == labels_N) * weights_N).sum()
    return loss + penalty, {"correct": correct, "loss": loss, "z_loss": penalty}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked_cross_entropy(head_fn: Callable, z_loss: float, head_inputs: Any, hidden, labels, weights) -> Sums:
    """`cross_entropy` summed over chunks [chunks, C, ...]. The gradients of the first sum are formed in the forward pass.

    There each chunk's scores exist already, so that the backward pass has only to scale: three matrix products in all, as
    without chunks, and never more than one chunk of scores in memory. The other sums have no gradients.
    """

    def add_chunk(sums, chunk):
        hidden_CH, labels_C, weights_C = chunk
        found = cross_entropy(head_fn(head_inputs, hidden_CH), labels_C, weights_C, z_loss)
        return jax.tree.map(jnp.add, sums, found), None

    return jax.lax.scan(add_chunk, zero_sums(z_loss), (hidden, labels, weights))[0]


def zero_sums(z_loss: float) -> Sums:
    """What `cross_entropy` gives of no labels."""
    names = ("correct", "loss", "z_loss") if z_loss else ("correct",)
    return jnp.zeros(()), {name: jnp.zeros(()) for name in names}


def chunked_cross_entropy_fwd(head_fn: Callable, z_loss: float, head_inputs: Any, hidden, labels, weights):
    def add_chunk(sums, chunk):
        hidden_CH, labels_C, weights_C = chunk

        def loss_fn(head_inputs: Any, hidden_CH: jax.Array) -> Sums:
            return cross_entropy(head_fn(head_inputs, hidden_CH), labels_C, weights_C, z_loss)

        loss, vjp_fn, others = jax.vjp(loss_fn, head_inputs, hidden_CH, has_aux=True)
        head_grads, hidden_grads_CH = vjp_fn(jnp.ones(()))
        return jax.tree.map(jnp.add, sums, ((loss, others), head_grads)), hidden_grads_CH

    zeros = zero_sums(z_loss), jax.tree.map(jnp.zeros_like, head_inputs)
    (sums, head_grads), hidden_grads = jax.lax.scan(add_chunk, zeros, (hidden, labels, weights))
    return sums, (head_grads, hidden_grads)


def chunked_cross_entropy_bwd(head_fn: Callable, z_loss: float, residuals: tuple, cotangents: tuple) -> tuple:
    grads = jax.tree.map(lambda grad: grad * cotangents[0].astype(grad.dtype), residuals)
    return *grads, None, None


chunked_cross_entropy.defvjp(chunked_cross_entropy_fwd, chunked_cross_entropy_bwd)
