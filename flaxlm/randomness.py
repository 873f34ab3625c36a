# SPDX-License-Identifier: Apache-2.0
"""Named streams of random numbers: all that is random follows from (seed, name, epoch or step, row)."""

import zlib

import jax
import numpy as np


def seed_sequence(seed: int, *stream: str | int) -> np.random.SeedSequence:
    """Everything random follows from the seed and a name, so that nothing depends on what was drawn before."""
    spawn_key = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in stream]
    return np.random.SeedSequence(seed, spawn_key=spawn_key)


def host_rng(seed: int, *stream: str | int) -> np.random.Generator:
    """The NumPy generator of a named stream, such as ("order", epoch)."""
    return np.random.Generator(np.random.PCG64(seed_sequence(seed, *stream)))


def device_rng(seed: int, stream: str, impl: str = "threefry2x32") -> jax.Array:
    """The JAX key of a named stream. threefry2x32 gives the same numbers everywhere, rbg is cheaper (see jax.random.key)."""
    return jax.random.key(seed_sequence(seed, stream).generate_state(1)[0], impl=impl)


def row_uniforms(seed: int, stream: tuple, first_row: int, num_rows: int, draws_per_row: int) -> np.ndarray:
    """Uniform numbers of rows `first_row` to `first_row + num_rows` of a stream: float64 [num_rows, draws_per_row].

    A row's numbers do not depend on which rows are drawn with it, hence not on batch sizes, devices or processes.
    """
    bits = np.random.PCG64(seed_sequence(seed, *stream))
    bits.advance(first_row * draws_per_row)
    return np.random.Generator(bits).random((num_rows, draws_per_row))
