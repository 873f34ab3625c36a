# SPDX-License-Identifier: Apache-2.0
"""Products and sums on a CPU: the numbers of plain ones in another order, and native bfloat16. And dropout by hashing."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import run_bart_dlm_flax
import run_clm_flax
import run_mlm_flax
import run_t5_mlm_flax
from flaxlm import layers, randomness
from tests.test_scripts import SIZES, make_batch, make_config, make_model, make_params

MODELS = {  # GPT-2 has layers of a class of its own; the head of the last three is fused, and the last one's is untied
    "roberta": (run_mlm_flax, make_config("roberta")),
    "gpt2": (run_clm_flax, make_config("gpt2")),
    "bart": (run_bart_dlm_flax, make_config("bart")),
    "t5": (run_t5_mlm_flax, make_config("t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
}


def read_cpuinfo() -> str:
    """What Linux says of the processor."""
    return Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


def loss_and_params(module, config, dtype):
    """(loss, as a function of the weights and with dropout; weights)."""
    model, batch = make_model(module, config, layers.Compute(dtype, "chunked")), make_batch(module, config)
    return lambda params: module.loss_fn(params, batch, model, {"dropout": jax.random.key(0)})[0], make_params(model)


def elsewhere(function):
    """The function as it is traced where the device is no CPU: with plain products and sums."""

    def call(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda: "gpu")
            return function(*args)

    return call


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_plain_products(name):
    loss_fn, params = loss_and_params(*MODELS[name], jnp.float32)
    grad_fn = jax.value_and_grad(loss_fn)
    compute = jax.jit(
        lambda params: (elsewhere(grad_fn)(params), grad_fn(params)), compiler_options={"xla_backend_optimization_level": 0}
    )
    (expected, expected_grads), (found, grads) = compute(params)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    noise = 1e-6 * max(np.abs(grad).max() for grad in jax.tree.leaves(expected_grads))
    for (path, grad), expected_grad in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True):
        allowed = 1e-5 * np.abs(expected_grad).max() + noise
        np.testing.assert_allclose(grad, expected_grad, rtol=0, atol=allowed, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", MODELS)
def test_every_product_is_meant(name):
    """No product with a matrix of weights is a plain one: all ask for sums in float32, in bfloat16 too."""
    loss_fn, params = loss_and_params(*MODELS[name], jnp.bfloat16)

    def products(grad_fn):
        lines = [line for line in str(jax.make_jaxpr(grad_fn)(params)).splitlines() if "dot_general[" in line]
        return [line for line in lines if line.strip().split("]", 1)[0].count(",") == 1]  # results of two dimensions

    assert any(":bf16[" in line for line in products(elsewhere(jax.grad(loss_fn))))
    assert not any(":bf16[" in line for line in products(jax.grad(loss_fn)))


@pytest.mark.skipif("bf16" not in read_cpuinfo(), reason="this processor multiplies no bfloat16")
def test_bfloat16_is_multiplied_as_it_is():
    """In the compiled program of a product and its gradients; of a sum in bfloat16 XLA converts the operands to float32."""
    hidden, kernel = jnp.ones((40, 24), jnp.bfloat16), jnp.ones((24, 56))

    def operands(product) -> set[str]:
        """Types of what is multiplied."""
        grad_fn = jax.grad(lambda *args: jnp.square(product(*args).astype(jnp.float32)).sum(), (0, 1))
        program = jax.jit(grad_fn).lower(hidden, kernel).compile().as_text()
        types = dict(re.findall(r"%(\S+) = (\w+)\[", program))
        pairs = re.findall(r" dot\(%([^\s,]+), %([^\s,)]+)\)", program)
        assert len(pairs) == 3
        return {types[name] for pair in pairs for name in pair}

    assert operands(layers.matmul) == {"bf16"}
    assert "f32" in operands(lambda inputs, kernel: inputs @ kernel.astype(inputs.dtype))  # all of them, until jax 0.12


def test_bfloat16_gradients():
    """Of a layer that widens and one that narrows: as exact as bfloat16 operands allow."""
    rng = np.random.default_rng(0)
    for sizes in ((24, 40), (40, 24)):
        inputs = jnp.asarray(rng.standard_normal((3, 7, sizes[0])), jnp.bfloat16)
        kernel = jnp.asarray(rng.standard_normal(sizes), jnp.float32)
        factors = jnp.asarray(rng.standard_normal((3, 7, sizes[1])), jnp.float32)
        grads = jax.grad(lambda *args: (layers.matmul(*args) * factors).sum(), (0, 1))(inputs, kernel)  # noqa: B023
        exact = inputs.astype(jnp.float32), kernel
        expected = jax.grad(lambda *args: ((args[0] @ args[1]) * factors).sum(), (0, 1))(*exact)  # noqa: B023
        for grad, expected_grad, dtype in zip(grads, expected, (jnp.bfloat16, jnp.float32), strict=True):
            assert grad.dtype == dtype
            np.testing.assert_allclose(grad.astype(jnp.float32), expected_grad, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sum_over_the_first_axis(dtype):
    array = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3, 7)), dtype)
    found = layers.sum_rows(array)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.asarray(array, np.float32).sum(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "sum_of", "number"),
    [  # of the bias of the vocabulary head; of T5's position biases, in encoder and decoder
        ("roberta", rf":f32\[{SIZES['vocab_size']}\] = reduce_sum", 1),
        ("t5", r":f32\[2,(\d+),\1\] = reduce_sum\[axes=\(0,\)", 2),
    ],
)
def test_sums_of_long_rows_are_products(name, sum_of, number):
    """On a CPU; on other devices they are sums."""
    loss_fn, params = loss_and_params(*MODELS[name], jnp.float32)

    def count(grad_fn):
        return len(re.findall(sum_of, str(jax.make_jaxpr(grad_fn)(params))))

    assert count(elsewhere(jax.grad(loss_fn))) == count(jax.grad(loss_fn)) + number


@pytest.mark.parametrize("is_tied", [True, False])
def test_scores_with_a_bias(is_tied):
    """They are those of a plain product and sum, with their gradients."""
    rng = np.random.default_rng(0)
    hidden, table, factors = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3, 5, 8), (11, 8), (3, 5, 11))
    )
    head = layers.VocabularyHead(11, jnp.float32)
    params = head.init(jax.random.key(0), hidden, table if is_tied else None)["params"]
    assert params.keys() == ({"bias"} if is_tied else {"bias", "kernel"})
    params = jax.tree.map(lambda array: jnp.asarray(rng.standard_normal(array.shape), jnp.float32), params)

    def found(params, hidden, table):
        return (head.apply({"params": params}, hidden, table if is_tied else None) * factors).sum()

    def expected(params, hidden, table):
        return ((hidden @ (table.T if is_tied else params["kernel"]) + params["bias"]) * factors).sum()

    pairs = zip(
        *(jax.tree.leaves(jax.value_and_grad(f, (0, 1, 2))(params, hidden, table)) for f in (found, expected)), strict=True
    )
    for ours, plain in pairs:
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_other_devices_multiply_as_they_like():
    loss_fn, params = loss_and_params(*MODELS["gpt2"], jnp.float32)
    assert "matmul_bwd" in str(jax.make_jaxpr(loss_fn)(params))
    assert "matmul_bwd" not in str(jax.make_jaxpr(elsewhere(loss_fn))(params))


# ---- Dropout -------------------------------------------------------------------------------------------------------------


def dropped(rate, key, shape):
    """A mask of dropout, as a model gets it."""
    return np.asarray(layers.Dropout(rate).apply({}, jnp.ones(shape), rngs={"dropout": key}))


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


def test_dropout_in_training_only():
    """That is, where there is a random key of that name; a rate of 0 needs none."""
    inputs = jnp.ones((4, 4))
    assert (layers.Dropout(0.5).apply({}, inputs) == inputs).all()
    assert (layers.Dropout(0.5).apply({}, inputs, rngs={"other": jax.random.key(0)}) == inputs).all()
    assert (layers.Dropout(0.0).apply({}, inputs, rngs={"dropout": jax.random.key(0)}) == inputs).all()
    assert (layers.Dropout(0.5).apply({}, inputs, rngs={"dropout": jax.random.key(0)}) != inputs).all()
