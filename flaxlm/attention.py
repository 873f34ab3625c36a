# SPDX-License-Identifier: Apache-2.0
"""Attention: which tokens see which, and the ways to compute it, some of which keep no array of [batch, heads, T, S].

B rows, T tokens that ask (queries), S tokens that are looked at (keys and values), M heads, E numbers in a head.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flaxlm import layers

# Scores of the chunked implementation at a time, or those of one row if it has more.
CHUNK_SCORES = 2**20  # on a CPU, whose cache holds them
DEVICE_CHUNK_SCORES = 2**24  # elsewhere: 64 MiB keep a device busy
IMPLEMENTATIONS = ("eager", "chunked", "xla", "cudnn")


class Mask(NamedTuple):
    """Which tokens see which: those of the same segment, and of these perhaps only the past, or what is near."""

    query_segments: jax.Array  # [B, T], the same number for tokens that see each other, 0 for padding
    key_segments: jax.Array  # [B, S]
    is_causal: bool = False  # only what is not after oneself
    reach: jax.Array | int | None = None  # only what is at most so many tokens away

    def visible(self) -> jax.Array:
        """Boolean [B, T, S]."""
        visible_BTS = self.query_segments[:, :, None] == self.key_segments[:, None]
        num_queries, num_keys = visible_BTS.shape[1:]
        behind_TS = jnp.arange(num_queries)[:, None] - jnp.arange(num_keys)
        if self.is_causal:
            visible_BTS &= behind_TS >= 0
        if self.reach is not None:
            visible_BTS &= jnp.abs(behind_TS) <= self.reach
        return visible_BTS


class Attention(nn.Module):
    """softmax(query key / sqrt(E) + bias) value, of what the mask shows; without weights of its own.

    Attributes:
        implementation: `eager` keeps all scores; `chunked` computes those of some rows at a time, and again in the backward
            pass; `xla` and `cudnn` are jax.nn.dot_product_attention, without dropout.
        dropout_rate: share of the attention weights that are dropped, the same for all rows and heads, in training.
        scale: of the scores; unset: 1 / sqrt(E).
        softcap: scores are squeezed to so much, by a hyperbolic tangent (Gemma 2); without a bias, by `eager` and `chunked`.
    """

    implementation: str
    dropout_rate: float = 0.0
    scale: float | None = None
    softcap: float | None = None

    def __call__(self, query_BTME, key_BSME, value_BSME, mask: Mask, bias_MTS: jax.Array | None = None) -> jax.Array:
        """[B, T, M, E]; keys and values may have fewer heads, which are shared; the bias is float32, T or M may be 1.

        A token gets 0 that sees none: one of a text of which the encoder was shown nothing.
        """
        attended_BTME = self.attend(query_BTME, key_BSME, value_BSME, mask, bias_MTS)
        if mask.query_segments is mask.key_segments:  # all see themselves
            return attended_BTME
        sees_any_BT = (mask.query_segments[:, :, None] == mask.key_segments[:, None]).any(-1)
        return jnp.where(sees_any_BT[:, :, None, None], attended_BTME, 0)

    def attend(self, query_BTME, key_BSME, value_BSME, mask: Mask, bias_MTS: jax.Array | None) -> jax.Array:
        scale = 1 / math.sqrt(query_BTME.shape[-1]) if self.scale is None else self.scale
        if self.implementation in ("xla", "cudnn"):
            return self.by_jax(query_BTME, key_BSME, value_BSME, mask, bias_MTS, scale)
        shared = query_BTME.shape[2] // key_BSME.shape[2]
        if shared > 1:
            key_BSME, value_BSME = (jnp.repeat(array, shared, axis=2) for array in (key_BSME, value_BSME))
        keep_TS = None
        if self.dropout_rate and self.has_rng("dropout"):
            shape = query_BTME.shape[1], key_BSME.shape[1]
            keep_TS = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.dropout_rate, shape) / (1 - self.dropout_rate)
        if self.implementation == "chunked":
            return chunked_attention(query_BTME * scale, key_BSME, value_BSME, mask.visible(), bias_MTS, keep_TS, self.softcap)
        scores = jnp.einsum("btme,bsme->bmts", query_BTME * scale, key_BSME, preferred_element_type=jnp.float32)
        scores = squeeze(scores, self.softcap)
        scores = scores if bias_MTS is None else scores + layers.repeat_rows(bias_MTS[None], len(scores))
        weights = nn.softmax(jnp.where(mask.visible()[:, None], scores, LOWEST))
        weights = (weights if keep_TS is None else weights * keep_TS).astype(value_BSME.dtype)
        return jnp.einsum("bmts,bsme->btme", weights, value_BSME)

    def by_jax(self, query_BTME, key_BSME, value_BSME, mask: Mask, bias_MTS: jax.Array | None, scale: float) -> jax.Array:
        if self.dropout_rate and self.has_rng("dropout"):
            raise ValueError(f"attention by {self.implementation} cannot drop attention weights")
        if self.softcap is not None:
            raise ValueError(f"attention by {self.implementation} cannot squeeze scores")
        if bias_MTS is not None and bias_MTS.shape[1] == 1:  # softmax sees differences: small ones, for bfloat16's sake
            bias_MTS = bias_MTS - jnp.swapaxes(bias_MTS, 1, 2)
        bias = None if bias_MTS is None else bias_MTS.astype(query_BTME.dtype)[None]
        return jax.nn.dot_product_attention(
            query_BTME, key_BSME, value_BSME, bias, mask.visible()[:, None], scale=scale, implementation=self.implementation
        )


LOWEST = -1e30  # a score that gets no weight; finite, so that tokens which see nothing get numbers


def squeeze(scores: jax.Array, softcap: float | None) -> jax.Array:
    """Between -softcap and softcap."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


# ---- Some rows at a time -------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def chunked_attention(query, key, value, visible, bias, keep, softcap: float | None = None) -> jax.Array:
    """Attention some rows of the batch at a time; the backward pass computes the scores again instead of keeping them.

    So no array of [batch, heads, queries, keys] is ever whole (Rabe & Staats 2021, arXiv:2112.05682). The query is scaled
    already; `visible` is boolean [B, T, S], one array for all layers; `keep` [T, S] is 0 where dropout drops, else
    1 / (1 - rate). Softmax is in float32.
    """
    return chunked_attention_fwd(query, key, value, visible, bias, keep, softcap)[0]


def scores_of_row(query, key, visible, bias, softcap: float | None) -> jax.Array:
    """[heads, queries, keys], in float32."""
    scores = squeeze(jnp.einsum("tme,sme->mts", query, key, preferred_element_type=jnp.float32), softcap)
    scores = scores if bias is None else scores + bias
    return jnp.where(visible, scores, LOWEST)


def rows_at_a_time(query: jax.Array, key: jax.Array) -> int:
    """A divisor of the batch; on a CPU a batch of one is slower than none."""
    chunk_scores = CHUNK_SCORES if layers.platform() == "cpu" else DEVICE_CHUNK_SCORES
    most = max(chunk_scores // (query.shape[1] * query.shape[2] * key.shape[1]), 1)
    return max(rows for rows in range(1, min(most, len(query)) + 1) if len(query) % rows == 0)


def map_rows(function: Any, rows: int, sums: Any, arrays: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    """`function` of each row of the arrays, so many at a time: what it returns first is summed, the rest is stacked."""

    def add_rows(sums, chunk):
        if rows == 1:
            terms, outputs = function(*(array[0] for array in chunk))
            outputs = jax.tree.map(lambda output: output[None], outputs)
        else:
            terms, outputs = jax.vmap(function)(*chunk)
            terms = jax.tree.map(layers.sum_rows, terms)
        return jax.tree.map(jnp.add, sums, terms), outputs

    if rows == len(arrays[0]):
        return add_rows(sums, arrays)
    chunks = tuple(array.reshape(-1, rows, *array.shape[1:]) for array in arrays)
    sums, outputs = jax.lax.scan(add_rows, sums, chunks)
    return sums, jax.tree.map(lambda output: output.reshape(-1, *output.shape[2:]), outputs)


def chunked_attention_fwd(query, key, value, visible, bias, keep, softcap: float | None):
    def attend_row(query, key, value, visible):
        scores = scores_of_row(query, key, visible, bias, softcap)
        highest = scores.max(-1, keepdims=True)
        exponentials = jnp.exp(scores - highest)
        sums = exponentials.sum(-1, keepdims=True)
        weights = exponentials / sums if keep is None else exponentials / sums * keep
        output = jnp.einsum("mts,sme->tme", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return None, (output.astype(value.dtype), (highest + jnp.log(sums))[..., 0])

    inputs = query, key, value, visible
    _, outputs = map_rows(attend_row, rows_at_a_time(query, key), None, inputs)
    output, log_sums = (checkpoint_name(array, layers.KEPT) for array in outputs)
    return output, (inputs, bias, keep, output, log_sums)


def chunked_attention_bwd(softcap: float | None, residuals: tuple, cotangent: jax.Array) -> tuple:
    inputs, bias, keep, output, log_sums = residuals

    def row_bwd(query, key, value, visible, output, log_sums, cotangent):
        scores = scores_of_row(query, key, visible, bias, softcap)
        probabilities = jnp.exp(scores - log_sums[..., None])
        weights_grad = jnp.einsum("tme,sme->mts", cotangent, value, preferred_element_type=jnp.float32)
        weights = probabilities
        if keep is not None:
            weights, weights_grad = weights * keep, weights_grad * keep
        mean_grad = jnp.einsum("tme,tme->mt", output, cotangent, preferred_element_type=jnp.float32)[..., None]
        scores_grad = probabilities * (weights_grad - mean_grad)
        if softcap is not None:  # by tanh's slope, which is 1 - tanh^2; masked scores have a gradient of 0
            scores_grad *= 1 - jnp.square(jnp.maximum(scores / softcap, -1))
        narrow = scores_grad.astype(query.dtype)
        grads = (
            jnp.einsum("mts,sme->tme", narrow, key, preferred_element_type=jnp.float32),
            jnp.einsum("mts,tme->sme", narrow, query, preferred_element_type=jnp.float32),
            jnp.einsum("mts,tme->sme", weights.astype(value.dtype), cotangent, preferred_element_type=jnp.float32),
        )
        return bias_grad(scores_grad), tuple(grad.astype(query.dtype) for grad in grads)

    def bias_grad(scores_grad: jax.Array) -> jax.Array | None:
        if bias is None:
            return None
        return scores_grad.sum([axis for axis, size in enumerate(bias.shape) if size == 1], keepdims=True)

    query, key = inputs[:2]
    sums = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    sums, grads = map_rows(row_bwd, rows_at_a_time(query, key), sums, (*inputs, output, log_sums, cotangent))
    return *grads, None, None if bias is None else sums.astype(bias.dtype), None


chunked_attention.defvjp(chunked_attention_fwd, chunked_attention_bwd)
