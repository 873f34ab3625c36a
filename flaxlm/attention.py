# SPDX-License-Identifier: Apache-2.0
"""Attention that keeps no array of [batch, heads, queries, keys]: exact, some rows at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

CHUNK_SCORES = 2**20  # at a time, or those of one row if it has more


@jax.custom_vjp
def chunked_attention(query, key, value, bias: jax.Array | None, keep: jax.Array | None) -> jax.Array:
    """Attention some rows of the batch at a time; the backward pass computes the scores again instead of keeping them.

    So no array of [batch, heads, queries, keys] is ever whole, but for the gradient of a bias of that size (Rabe & Staats
    2021, arXiv:2112.05682). `keep` is 0 where dropout drops, else 1 / (1 - rate). Softmax is in float32.
    """
    return chunked_attention_fwd(query, key, value, bias, keep)[0]


def map_rows(function: Callable, query: jax.Array, key: jax.Array, bias: jax.Array | None, *others: jax.Array) -> Any:
    """function(query, key, bias, ...) of each row of the batch, as many at a time as CHUNK_SCORES says."""
    num_scores = query.shape[1] * query.shape[2] * key.shape[1]
    batch_size = min(CHUNK_SCORES // num_scores, len(query))
    batch_size = batch_size if batch_size > 1 else None  # on a CPU a batch of one is slower than none
    if bias is not None and len(bias) == len(query):
        return jax.lax.map(lambda row: function(*row), (query, key, bias, *others), batch_size=batch_size)
    common = None if bias is None else bias[0]
    return jax.lax.map(lambda row: function(*row[:2], common, *row[2:]), (query, key, *others), batch_size=batch_size)


def attention_scores(query: jax.Array, key: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Of a row: [heads, queries, keys], in float32."""
    scores = jnp.einsum("qhd,khd->hqk", query, key, preferred_element_type=jnp.float32)
    return scores if bias is None else scores + bias


def chunked_attention_fwd(query, key, value, bias, keep):
    def attend_row(query, key, bias, value):
        scores = attention_scores(query, key, bias)
        highest = scores.max(-1, keepdims=True)
        exponentials = jnp.exp(scores - highest)
        sums = exponentials.sum(-1, keepdims=True)
        weights = exponentials / sums if keep is None else exponentials / sums * keep
        output = jnp.einsum("hqk,khd->qhd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return output.astype(value.dtype), highest, sums

    output, highest, sums = map_rows(attend_row, query, key, bias, value)
    return output, (query, key, value, bias, keep, output, highest, sums)


def chunked_attention_bwd(residuals: tuple, cotangent: jax.Array) -> tuple:
    query, key, value, bias, keep, *softmax = residuals

    def row_bwd(query, key, bias, value, output, highest, sums, cotangent):
        probabilities = jnp.exp(attention_scores(query, key, bias) - highest) / sums
        weights_grad = jnp.einsum("qhd,khd->hqk", cotangent, value, preferred_element_type=jnp.float32)
        weights = probabilities
        if keep is not None:
            weights, weights_grad = weights * keep, weights_grad * keep
        mean_grad = jnp.einsum("qhd,qhd->hq", output, cotangent, preferred_element_type=jnp.float32)[..., None]
        scores_grad = probabilities * (weights_grad - mean_grad)
        narrow = scores_grad.astype(query.dtype)
        grads = (
            jnp.einsum("hqk,khd->qhd", narrow, key, preferred_element_type=jnp.float32),
            jnp.einsum("hqk,qhd->khd", narrow, query, preferred_element_type=jnp.float32),
            jnp.einsum("hqk,qhd->khd", weights.astype(value.dtype), cotangent, preferred_element_type=jnp.float32),
        )
        return *(grad.astype(query.dtype) for grad in grads), None if bias is None else scores_grad

    *grads, bias_grad = map_rows(row_bwd, query, key, bias, value, *softmax, cotangent)
    if bias is not None:
        broadcast = [axis for axis, size in enumerate(bias.shape) if size == 1]
        bias_grad = bias_grad.sum(broadcast, keepdims=True).astype(bias.dtype)
    return *grads, bias_grad, None


chunked_attention.defvjp(chunked_attention_fwd, chunked_attention_bwd)
