# SPDX-License-Identifier: Apache-2.0
"""Products and sums on a CPU, and dropout by hashing."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxlm import layers, patches, randomness


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sum_over_the_first_axis(dtype):
    array = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3, 7)), dtype)
    found = layers.sum_rows(array)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.asarray(array, np.float32).sum(0), rtol=1e-6, atol=1e-6)


def dropped(rate, key, shape):
    """A mask of hashed_dropout, as a model gets it."""
    with nn.intercept_methods(patches.hashed_dropout):
        return np.asarray(nn.Dropout(rate, deterministic=False).apply({}, jnp.ones(shape), rngs={"dropout": key}))


@pytest.mark.parametrize("impl", ["rbg", "threefry2x32"])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_hashed_dropout(rate, impl):
    """The share is the rate, what is kept is scaled, and masks of neighbours, of shifted positions and keys are unrelated."""
    key = randomness.device_rng(0, "dropout", impl=impl)
    masks = [dropped(rate, jax.random.fold_in(key, i), (64, 4096)) for i in range(4)]
    for mask in masks:
        assert set(np.unique(mask)) == {0, np.float32(1 / (1 - rate))}
    assert (dropped(rate, jax.random.fold_in(key, 0), (64, 4096)) == masks[0]).all()
    kept = np.stack([mask.reshape(-1) > 0 for mask in masks]).astype(np.float64)
    tolerance = 5 / np.sqrt(kept.shape[1])  # five standard deviations of a correlation
    assert kept.mean(axis=1) == pytest.approx(1 - rate, abs=tolerance * np.sqrt(rate * (1 - rate)))
    centred = (kept - (1 - rate)) / np.sqrt(rate * (1 - rate))
    assert (np.abs(np.corrcoef(kept) - np.eye(4)) < tolerance).all()
    for shift in (1, 2, 3, 7, 64, 4096):
        assert abs((centred[0, shift:] * centred[0, :-shift]).mean()) < tolerance
        assert abs((centred[0, shift:] * centred[1, :-shift]).mean()) < tolerance


def test_hashed_dropout_leaves_the_rest_alone():
    inputs = jnp.ones((4, 4))
    with nn.intercept_methods(patches.hashed_dropout):
        assert (nn.Dropout(0.5).apply({}, inputs, deterministic=True) == inputs).all()
        assert (nn.Dropout(0.0, deterministic=False).apply({}, inputs) == inputs).all()
        rngs = {"dropout": jax.random.key(0)}
        row = nn.Dropout(0.5, broadcast_dims=(0,), deterministic=False).apply({}, inputs, rngs=rngs)
        assert (row == row[0]).all()
