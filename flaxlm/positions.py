# SPDX-License-Identifier: Apache-2.0
"""Where tokens stand: positions within a text, and what attention makes of them (rotations, buckets, slopes, sinusoids)."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def within_segments(segment_ids_BT: jax.Array) -> jax.Array:
    """Positions that start anew where another text begins: int32 [B, T].

    `segment_ids_BT` has the same number for the tokens of a text, which stand side by side, and 0 for padding.
    """
    index_T = jnp.arange(segment_ids_BT.shape[1])
    begins_BT = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)))
    return index_T - jax.lax.cummax(jnp.where(begins_BT, index_T, 0), axis=1)


def after_padding_id(segment_ids_BT: jax.Array, pad_token_id: int) -> jax.Array:
    """RoBERTa's positions: counted from `pad_token_id` + 1, and `pad_token_id` for padding; int32 [B, T]."""
    return (within_segments(segment_ids_BT) + 1) * (segment_ids_BT > 0) + pad_token_id


# ---- Rotations ---------------------------------------------------------------------------------------------------------


def rotary_frequencies(size: int, parameters: Mapping[str, Any]) -> np.ndarray:
    """Radians by which a step forward turns each pair of a head's `size` numbers (Su et al. 2021, arXiv:2104.09864): [size/2].

    `parameters` are a configuration's `rope_parameters`: `rope_theta`, and `rope_type` with what it needs, which is one of
    `default`, `linear` (Chen et al. 2023, arXiv:2306.15595) and `llama3` (Llama 3.1: long waves are slowed down by `factor`,
    short ones kept, those between blended).
    """
    frequencies = 1.0 / parameters["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float64) / size)
    kind = parameters.get("rope_type", "default")
    if kind == "linear":
        return frequencies / parameters["factor"]
    if kind == "llama3":
        turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / parameters["factor"])
    return frequencies


def rotary_table(positions_BT: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the angles at each position, for `rotate`: two float32 [B, T, size / 2]."""
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate_halves(heads_BTME: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn the pairs (i, i + E/2) of each head, as Llama does; numbers beyond those of the table stay as they are."""
    cos, sin = (part[:, :, None].astype(heads_BTME.dtype) for part in table)
    size = 2 * cos.shape[-1]
    left, right, rest = jnp.split(heads_BTME, (size // 2, size), axis=-1)
    return jnp.concatenate((left * cos - right * sin, right * cos + left * sin, rest), axis=-1)


def rotate_neighbours(heads_BTME: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn the pairs (2i, 2i + 1) of each head, as GPT-J and RoFormer do; numbers beyond those of the table stay."""
    cos, sin = (part[:, :, None].astype(heads_BTME.dtype) for part in table)
    size = 2 * cos.shape[-1]
    turned, rest = jnp.split(heads_BTME, (size,), axis=-1)
    even, odd = turned[..., ::2], turned[..., 1::2]
    turned = jnp.stack((even * cos - odd * sin, odd * cos + even * sin), axis=-1).reshape(turned.shape)
    return jnp.concatenate((turned, rest), axis=-1)


# ---- Biases ------------------------------------------------------------------------------------------------------------


def relative_buckets(num_queries: int, num_keys: int, is_causal: bool, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of T5's position bias for each pair of a query and a key (Raffel et al. 2020, section 2.1): int32 [T, S].

    Half of a direction's buckets are for one distance each, the others grow like a logarithm up to `max_distance`.
    """
    relative = np.arange(num_keys) - np.arange(num_queries)[:, None]
    num_buckets = num_buckets if is_causal else num_buckets // 2
    distance = np.maximum(-relative, 0) if is_causal else np.abs(relative)
    num_exact = num_buckets // 2
    growth = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(num_exact)) / math.log(max_distance / num_exact)
    far = np.minimum((num_exact + growth * (num_buckets - num_exact)).astype(np.int32), num_buckets - 1)
    buckets = np.where(distance < num_exact, distance, far).astype(np.int32)
    return buckets if is_causal else buckets + num_buckets * (relative > 0)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """How much each head prefers what is near (Press et al. 2021, arXiv:2108.12409): float32 [M].

    Where the heads are no power of two, those of the next one are taken, every other.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return np.array(slopes, np.float32)


def sinusoids(num_positions: int, size: int) -> np.ndarray:
    """Sines, then cosines of positions, of waves 2 pi to 20,000 pi long (Vaswani et al. 2017): float32 [positions, size]."""
    angles = np.arange(num_positions)[:, None] / 10000 ** (2 * np.arange((size + 1) // 2) / size)
    return np.concatenate((np.sin(angles), np.cos(angles)), axis=1)[:, :size].astype(np.float32)
