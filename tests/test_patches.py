# SPDX-License-Identifier: Apache-2.0
"""Dense layers and sums as they are computed on a CPU: the numbers of flax's own, in another order, and native bfloat16."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import (
    BartConfig,
    DistilBertConfig,
    GPT2Config,
    RobertaConfig,
    T5Config,
)  # fmt: skip

import run_bart_dlm_flax
import run_clm_flax
import run_mlm_flax
import run_t5_mlm_flax
from flaxlm import layers, patches
from tests.test_scripts import SIZES, make_batch, make_params

MODELS = {  # GPT-2 has layers of a class of its own; the head of the last three is fused, and the last one's is untied
    "roberta": (run_mlm_flax, RobertaConfig(**SIZES)),
    "gpt2": (run_clm_flax, GPT2Config(**SIZES)),
    "bart": (run_bart_dlm_flax, BartConfig(**SIZES)),
    "t5": (run_t5_mlm_flax, T5Config(**SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
}


def loss_fns(module, config, dtype):
    """(as flax computes it, as train_step does), functions of the weights, and weights."""
    model, batch = module.MODELS.auto_class.from_config(config, dtype=dtype, _do_init=False), make_batch(module, config)

    def plain(params):
        return module.loss_fn(params, batch, jax.random.key(0), model=model, train=True)[0]

    def on_cpu(params):
        with nn.intercept_methods(patches.dense_on_cpu):
            return plain(params)

    return plain, on_cpu, make_params(model)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_flax(name):
    plain, on_cpu, params = loss_fns(*MODELS[name], jnp.float32)
    compute = jax.jit(
        lambda params: (jax.value_and_grad(plain)(params), jax.value_and_grad(on_cpu)(params)),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    (expected, expected_grads), (found, grads) = compute(params)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    noise = 1e-6 * max(np.abs(grad).max() for grad in jax.tree.leaves(expected_grads))
    for (path, grad), expected_grad in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True):
        allowed = 1e-5 * np.abs(expected_grad).max() + noise
        np.testing.assert_allclose(grad, expected_grad, rtol=0, atol=allowed, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", MODELS)
def test_every_dense_layer_is_meant(name):
    """No product of a matrix of weights is left to flax: all ask for sums in float32, in bfloat16 too."""
    plain, on_cpu, params = loss_fns(*MODELS[name], jnp.bfloat16)

    def products(loss_fn):
        program = str(jax.make_jaxpr(jax.grad(loss_fn))(params))
        lines = [line for line in program.splitlines() if "dot_general[" in line]
        return [line for line in lines if line.strip().split("]", 1)[0].count(",") == 1]  # results of two dimensions

    assert any(":bf16[" in line for line in products(plain))
    assert not any(":bf16[" in line for line in products(on_cpu))


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


@pytest.mark.parametrize(
    ("name", "sum_of", "number"),
    [  # of the bias of the vocabulary head; of T5's position biases, in encoder and decoder
        ("roberta", rf":f32\[{SIZES['vocab_size']}\] = reduce_sum", 1),
        ("t5", r":f32\[2,(\d+),\1\] = reduce_sum\[axes=\(0,\)", 2),
    ],
)
def test_sums_of_long_rows_are_products(name, sum_of, number, monkeypatch):
    """On a CPU; on other devices they are sums."""

    def count():
        plain, _, params = loss_fns(*MODELS[name], jnp.float32)
        return len(re.findall(sum_of, str(jax.make_jaxpr(jax.grad(plain))(params))))

    on_cpu = count()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert count() == on_cpu + number


class HeadOfTheHub(nn.Module):
    """A head as no class of transformers is: its bias is not the last thing it adds."""

    @nn.compact
    def __call__(self, hidden):
        return nn.Dense(4, use_bias=False)(hidden) + 2 * self.param("bias", nn.initializers.ones, (4,))


@pytest.mark.parametrize("head", [nn.Dense(4, bias_init=nn.initializers.ones), HeadOfTheHub()], ids=["flax", "hub"])
def test_scores_with_a_bias(head):
    hidden, rng = jnp.ones((3, 5)), jax.random.key(0)
    variables = head.init(rng, hidden)
    expected, found = (
        jax.value_and_grad(lambda variables: (score(variables) ** 2).sum())(variables)  # noqa: B023
        for score in (
            lambda variables: head.apply(variables, hidden),
            lambda variables: patches.vocabulary_scores(head, variables, hidden),
        )
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_other_devices_keep_what_flax_does(monkeypatch):
    _, on_cpu, params = loss_fns(*MODELS["gpt2"], jnp.float32)
    assert "matmul_bwd" in str(jax.make_jaxpr(on_cpu)(params))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    _, on_gpu, params = loss_fns(*MODELS["gpt2"], jnp.float32)
    assert "matmul_bwd" not in str(jax.make_jaxpr(on_gpu)(params))


def test_the_classes_are_left_as_they_were(monkeypatch):
    import transformers.models.gpt2.modeling_flax_gpt2 as modeling

    before = modeling.jnp, modeling.dot_product_attention_weights
    model = run_clm_flax.MODELS.auto_class.from_config(GPT2Config(**SIZES), _do_init=False)
    with pytest.raises(KeyError), patches.attention("chunked", model):
        assert modeling.jnp is not jnp
        raise KeyError
    assert (modeling.jnp, modeling.dot_product_attention_weights) == before == (jnp, before[1])


def test_attention_of_its_own(refuses):
    patches.check_attention("auto", DistilBertConfig(), run_mlm_flax.MODELS)
    with refuses("chunked: distilbert has attention of its own"):
        patches.check_attention("chunked", DistilBertConfig(), run_mlm_flax.MODELS)


def test_what_only_the_model_itself_tells(refuses):
    """As with classes from the Hub, of which check_attention knows nothing."""
    model = run_mlm_flax.MODELS.auto_class.from_config(DistilBertConfig(**SIZES | {"dim": 32, "n_heads": 2}), _do_init=False)
    with refuses("FlaxDistilBertForMaskedLM has attention of its own"), patches.attention("chunked", model):
        raise AssertionError
    options = {"dropout_rate": 0.1, "deterministic": False, "dropout_rng": jax.random.key(0)}
    weights = patches.AttentionWeights(jnp.ones((1, 4, 2, 8)), jnp.ones((1, 4, 2, 8)), options)
    with refuses("xla: cannot drop attention weights: use chunked"):
        patches.attend(weights, jnp.ones((1, 4, 2, 8)), "xla")


def test_cudnn_needs_a_gpu(refuses):
    model = run_clm_flax.MODELS.auto_class.from_config(GPT2Config(**SIZES), _do_init=False)
    with refuses("cudnn: is for NVIDIA GPUs, and JAX runs on cpu here"), patches.attention("cudnn", model):
        raise AssertionError
