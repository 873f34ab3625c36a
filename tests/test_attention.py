# SPDX-License-Identifier: Apache-2.0
"""--attention_implementation: all give the same numbers, and one line where that is impossible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import run_bart_dlm_flax
import run_clm_flax
import run_mlm_flax
import run_t5_mlm_flax
from flaxlm import arguments, attention, layers, models
from tests.test_scripts import make_config, make_model, make_params

RATES = ("attention_probs_dropout_prob", "hidden_dropout_prob", "attn_pdrop", "attention_dropout", "dropout_rate")
DROPOUT = dict.fromkeys(RATES, 0.1)
FAMILIES = {
    "roberta": run_mlm_flax, "albert": run_mlm_flax, "electra": run_mlm_flax, "distilbert": run_mlm_flax,
    "modernbert": run_mlm_flax, "gpt2": run_clm_flax, "gpt_neo": run_clm_flax, "bloom": run_clm_flax, "mistral": run_clm_flax,
    "gemma2": run_clm_flax, "gptj": run_clm_flax, "t5": run_t5_mlm_flax, "umt5": run_t5_mlm_flax, "bart": run_bart_dlm_flax,
}  # fmt: skip


def compile_losses(module, config, implementations, monkeypatch, dtype=jnp.float32, num_rows=4, length=16, level=0):
    """(program, weights): loss and gradients by every implementation, with the same dropout, two rows in a chunk."""
    monkeypatch.setattr(attention, "CHUNK_SCORES", 2 * config.num_attention_heads * length**2)
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 100, (num_rows, length)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, 9:] = 0
    mask[2, 5:] = 2  # another text
    inputs = (ids, mask, ids[:, ::-1], mask) if config.is_encoder_decoder else (ids, mask)
    target = jnp.asarray(rng.standard_normal((*ids.shape, config.vocab_size), np.float32) * mask[..., None])

    def loss(params, implementation):
        model = make_model(module, config, layers.Compute(dtype, implementation))
        hidden = model.apply({"params": params}, *inputs, rngs={"dropout": jax.random.key(3)})
        return (jnp.tanh(model.apply({"params": params}, hidden, method="scores")) * target).sum()

    def compute(params):
        return [jax.value_and_grad(loss)(params, implementation) for implementation in implementations]

    params = make_params(make_model(module, config))
    options = {"xla_backend_optimization_level": level}
    return jax.jit(compute, compiler_options=options).lower(params).compile(), params


def losses_and_gradients(*args):
    program, params = compile_losses(*args)
    return program(params)


def assert_close(found, expected, tolerance):
    (loss, grads), (expected_loss, expected_grads) = found, expected
    assert float(loss) == pytest.approx(float(expected_loss), rel=tolerance)
    noise = tolerance / 10 * max(np.abs(grad).max() for grad in jax.tree.leaves(expected_grads))
    for (path, grad), expected_grad in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True):
        allowed = tolerance * np.abs(expected_grad).max() + noise
        np.testing.assert_allclose(grad, expected_grad, rtol=0, atol=allowed, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_attention_is_exact(family, monkeypatch):
    """Loss and all gradients, dropout included, which draws the same mask."""
    config = make_config(family, **DROPOUT)
    plain, chunked = losses_and_gradients(FAMILIES[family], config, ("eager", "chunked"), monkeypatch)
    assert_close(chunked, plain, 2e-5)


@pytest.mark.parametrize("family", ["roberta", "gpt2", "t5", "bart"])
def test_jax_nn_attention_is_exact(family, monkeypatch):
    config = make_config(family, **dict.fromkeys(DROPOUT, 0.0))
    plain, xla = losses_and_gradients(FAMILIES[family], config, ("eager", "xla"), monkeypatch)
    assert_close(xla, plain, 2e-5)


def test_chunked_attention_in_bfloat16(monkeypatch):
    plain, chunked = losses_and_gradients(
        run_clm_flax, make_config("gpt2", **DROPOUT), ("eager", "chunked"), monkeypatch, jnp.bfloat16
    )
    assert float(chunked[0]) == pytest.approx(float(plain[0]), rel=0.05)
    for found, expected in zip(jax.tree.leaves(chunked[1]), jax.tree.leaves(plain[1]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.05 * np.abs(expected).max() + 1e-3)


def test_chunked_attention_saves_memory(monkeypatch):
    config = make_config("gpt2", **DROPOUT | {"num_attention_heads": 8, "num_hidden_layers": 3})
    programs = [
        compile_losses(run_clm_flax, config, [name], monkeypatch, jnp.float32, 16, 64, 2)[0] for name in ("eager", "chunked")
    ]
    eager, chunked = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert eager - chunked > 2 * 2 * 4 * 16 * 8 * 64 * 64  # two arrays of all scores for each layer but the one at work


@pytest.mark.parametrize("implementation", ["eager", "chunked", "xla"])
def test_who_sees_nothing_gets_nothing(implementation):
    """Of a text that is only in the decoder: neither a mean of other texts nor NaN, and no gradient."""
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((1, length, 2, 8)), jnp.float32) for length in (5, 6, 6))
    mask = attention.Mask(jnp.array([[1, 2, 2, 3, 0]]), jnp.array([[1, 1, 3, 3, 3, 3]]))

    def attend(query, key, value):
        return attention.Attention(implementation).apply({}, query, key, value, mask)

    output = attend(query, key, value)
    assert np.abs(output).max(axis=(0, 2, 3)).astype(bool).tolist() == [True, False, False, True, False]
    grads = jax.grad(lambda *arrays: jnp.square(attend(*arrays)).sum(), (0, 1, 2))(query, key, value)
    assert all(np.isfinite(grad).all() for grad in grads)
    assert not np.asarray(grads[0])[:, [1, 2, 4]].any()


def build(implementation: str) -> layers.Compute:
    """How a GPT-2 is computed that a run builds with this flag."""
    training_args = arguments.TrainingArguments(output_dir="", attention_implementation=implementation)
    args = arguments.Arguments(arguments.ModelArguments(), run_clm_flax.DataTrainingArguments(), training_args)
    return models.build(make_config("gpt2"), args, run_clm_flax.MODELS).compute


def test_what_auto_means(monkeypatch):
    """Chunked everywhere; cuDNN where there is a GPU."""
    assert build("auto").attention == "chunked"
    assert [build(name).attention for name in ("eager", "chunked", "xla")] == ["eager", "chunked", "xla"]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [build(name).attention for name in ("auto", "cudnn")] == ["chunked", "cudnn"]


def test_cudnn_needs_a_gpu(refuses):
    with refuses("cudnn: is for NVIDIA GPUs, and JAX runs on cpu here"):
        build("cudnn")


def test_what_attention_of_jax_cannot_do():
    """Where nobody has looked before: it never leaves something out without a word."""
    array, segments = jnp.ones((1, 4, 2, 8)), jnp.ones((1, 4), jnp.int32)
    inputs = array, array, array, attention.Mask(segments, segments)
    with pytest.raises(ValueError, match="attention by xla cannot drop attention weights"):
        attention.Attention("xla", dropout_rate=0.1).apply({}, *inputs, rngs={"dropout": jax.random.key(0)})
    with pytest.raises(ValueError, match="attention by cudnn cannot squeeze scores"):
        attention.Attention("cudnn", softcap=50.0).apply({}, *inputs)


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        ("xla", "cannot drop attention weights, and the configuration has attn_pdrop=0.1: set it to 0, or use chunked"),
        ("cudnn", "has no float32; add --dtype bfloat16"),
        ("cudnn --dtype bfloat16", "cannot drop attention weights"),
        ("flash", "attention_implementation"),
    ],
)
def test_what_it_cannot_do_is_one_line(implementation, message, gpt2_dir, corpus, tmp_path, error_of):
    source = ["--config_name", gpt2_dir, "--tokenizer_name", gpt2_dir, "--train_file", corpus, "--output_dir", tmp_path / "out"]
    flags = ["--do_train", "--config_overrides", "attn_pdrop=0.1", "--attention_implementation", *implementation.split()]
    argv = [str(part) for part in (*source, *flags)]
    assert message in error_of(run_clm_flax.main, argv)
    assert not (tmp_path / "out").exists()
