# SPDX-License-Identifier: Apache-2.0
"""Cross-entropies of some tokens and of all, a chunk at a time: those of all scores at once."""

import types
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxlm import layers, losses

V, H = 11, 6


class Model(nn.Module):
    """A head, and weights that it does not read."""

    config: ClassVar = types.SimpleNamespace(vocab_size=V)
    head_weights = ("head/predictions", "words/embedding")

    def setup(self):
        self.words = nn.Embed(V, H)
        self.head = Head()

    def scores(self, hidden_XH: jax.Array) -> jax.Array:
        return self.head.predictions(hidden_XH, self.words.embedding)


class Head(nn.Module):
    def setup(self):
        self.predictions, self.other = layers.VocabularyHead(V, jnp.float32), nn.Dense(3)


def make_inputs(shape: tuple[int, ...]) -> tuple[dict, jax.Array, jax.Array, jax.Array]:
    """Weights, hidden states, labels, and how much each counts, at times nothing."""
    rng = np.random.default_rng(0)
    embedding, bias, kernel = (rng.standard_normal(size).astype(np.float32) for size in ((V, H), V, (H, 3)))
    params = {"words": {"embedding": embedding}, "head": {"predictions": {"bias": bias}, "other": {"kernel": kernel}}}
    hidden, weights = rng.standard_normal((*shape, H)), np.maximum(rng.random(shape) - 0.3, 0)
    return params, jnp.asarray(hidden, jnp.float32), jnp.asarray(rng.integers(0, V, shape)), jnp.asarray(weights, jnp.float32)


def plainly(params, hidden, labels, weights, z_loss=0.0) -> tuple[jax.Array, dict[str, jax.Array]]:
    scores = hidden @ params["words"]["embedding"].T + params["head"]["predictions"]["bias"]
    loss = (optax.softmax_cross_entropy_with_integer_labels(scores, labels) * weights).sum()
    sums = {"correct": ((scores.argmax(-1) == labels) * weights).sum()}
    if not z_loss:
        return loss, sums
    penalty = z_loss * (jnp.log(jnp.exp(scores).sum(-1)) ** 2 * weights).sum()
    return loss + penalty, sums | {"loss": loss, "z_loss": penalty}


def assert_same(function, expected, *args) -> None:
    """Sums to 1e-5, and the gradients of three times the first one."""
    for ours, plain in zip(
        *(
            jax.tree.leaves(jax.jit(jax.value_and_grad(lambda *args: (3 * f(*args)[0], f(*args)[1]), (0, 1), True))(*args))  # noqa: B023
            for f in (function, expected)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (4, 16)], ids=str)
@pytest.mark.parametrize(("most_scores", "most_chunks"), [(2**22, 16), (V, 100), (4 * V, 16), (1, 4)])
def test_all_tokens(shape, most_scores, most_chunks, z_loss, monkeypatch):
    """In one chunk, in many, and in a number that leaves the last one short."""
    monkeypatch.setattr(losses, "CHUNK_SCORES", most_scores)
    monkeypatch.setattr(losses, "MAX_CHUNKS", most_chunks)
    params, hidden, labels, weights = make_inputs(shape)

    def fused(params, hidden):
        return losses.fused_cross_entropy(Model(), params, hidden, labels, weights, z_loss)

    assert_same(fused, lambda params, hidden: plainly(params, hidden, labels, weights, z_loss), params, hidden)
    num_tokens = np.prod(shape)
    num_chunks = min(-(-num_tokens * V // most_scores), most_chunks)
    program = str(jax.make_jaxpr(fused)(params, hidden))
    assert f"f32[{-(-num_tokens // num_chunks)},{V}]" in program
    assert num_chunks == 1 or num_tokens == 1 or f"f32[{num_tokens},{V}]" not in program


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_tokens_with_a_label(z_loss):
    """At flat positions, which may be met twice; others have no part."""
    params, hidden, _, _ = make_inputs((3, 7))
    _, _, labels, weights = make_inputs((5,))
    positions = jnp.array([20, 0, 8, 0, 13])

    def labelled(params, hidden):
        return losses.labelled_cross_entropy(Model(), params, hidden, positions, labels, weights, z_loss)

    def expected(params, hidden):
        return plainly(params, hidden.reshape(21, H)[positions], labels, weights, z_loss)

    assert_same(labelled, expected, params, hidden)
    assert f"f32[21,{V}]" not in str(jax.make_jaxpr(labelled)(params, hidden))


def test_parts_of_a_tree():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": {"f": 3, "g": 4}}
    assert losses.only(tree, ("a/c", "e/g")) == {"a": {"c": {"d": 2}}, "e": {"g": 4}}
    assert losses.only(tree, ("a",)) == {"a": tree["a"]}


def fused_z_loss(monkeypatch) -> tuple:
    """(a function of weights and hidden states, in three chunks and with a z-loss of 0.1; these; labels; their weights)."""
    monkeypatch.setattr(losses, "CHUNK_SCORES", 8 * V)
    params, hidden, labels, weights = make_inputs((3, 7))
    function = lambda params, hidden: losses.fused_cross_entropy(Model(), params, hidden, labels, weights, 0.1)[0]  # noqa: E731
    return function, params, hidden, labels, weights


def test_z_loss_by_finite_differences(monkeypatch):
    """The slope along a direction is what a small step that way changes."""
    function, params, hidden, _, _ = fused_z_loss(monkeypatch)
    rng = np.random.default_rng(1)
    way = jax.tree.map(lambda array: jnp.asarray(rng.standard_normal(array.shape), jnp.float32), (params, hidden))
    slopes = jax.tree.map(jnp.vdot, jax.grad(function, (0, 1))(params, hidden), way)
    at = lambda size: function(*jax.tree.map(lambda array, one: array + size * one, (params, hidden), way))  # noqa: E731
    assert float((at(1e-2) - at(-1e-2)) / 2e-2) == pytest.approx(float(sum(jax.tree.leaves(slopes))), rel=2e-3)


@pytest.mark.torch
def test_z_loss_is_that_of_torch(monkeypatch):
    import torch

    function, params, hidden, labels, weights = fused_z_loss(monkeypatch)
    words = torch.tensor(params["words"]["embedding"], requires_grad=True)
    states = torch.tensor(np.asarray(hidden), requires_grad=True)
    scores = (states @ words.T + torch.tensor(params["head"]["predictions"]["bias"])).flatten(0, 1)
    found = torch.nn.functional.cross_entropy(scores, torch.tensor(np.asarray(labels)).flatten().long(), reduction="none")
    expected = ((found + 0.1 * scores.logsumexp(-1) ** 2) * torch.tensor(np.asarray(weights)).flatten()).sum()
    expected.backward()
    loss, (grads, hidden_grads) = jax.value_and_grad(function, (0, 1))(params, hidden)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    np.testing.assert_allclose(grads["words"]["embedding"], words.grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(hidden_grads, states.grad, rtol=1e-4, atol=1e-5)
