# SPDX-License-Identifier: Apache-2.0
"""Text that a model writes: the same tokens as a plain loop, and as PyTorch's generate; what a run does with it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxlm import generation, models, sharding
from tests import oracle
from tests.test_torch import small_config

CAUSAL = ["gpt2", "llama", "opt", "bloom", "gpt_neo", "mistral"]
SEQ2SEQ = ["t5", "umt5", "bart", "pegasus"]
TYPES = [*CAUSAL, *SEQ2SEQ]
LENGTHS = (6, 3, 1, 4)


def model_of(model_type: str, **more: Any) -> tuple[str, Any, Any]:
    """(kind, model, weights) of a small model whose parts all matter."""
    kind = "seq2seq" if model_type in SEQ2SEQ else "causal"
    classes = models.SPANS | models.DENOISING if kind == "seq2seq" else models.CAUSAL
    config = small_config(model_type, is_decoder=True, forced_eos_token_id=None, forced_bos_token_id=None, **more)
    config.forced_eos_token_id = None  # which generate() would put at the end
    if kind == "seq2seq":
        config.decoder_start_token_id = config.pad_token_id
    model = classes[model_type](config)
    params = oracle.random_weights(model, oracle.make_inputs(kind, config), 0.3)

    def changed(path: tuple, array: np.ndarray) -> np.ndarray:  # or some types write one token only
        name = jax.tree_util.keystr(path)
        return array * (4 if "position" in name else 0 if ("norm" in name and "bias" in name) or "logits_bias" in name else 1)

    return kind, model, jax.tree_util.tree_map_with_path(changed, params)


def prompts_of(kind: str, config: Any) -> generation.Prompts:
    rng = np.random.default_rng(3)
    rows = [rng.integers(5, config.vocab_size, length).tolist() for length in LENGTHS]
    return (
        generation.Prompts([[config.decoder_start_token_id]] * len(rows), rows)
        if kind == "seq2seq"
        else generation.Prompts(rows)
    )


def written(model, params, prompts, max_new_tokens=12, row_length=64, step=0, devices=None, **sampling) -> list[list[int]]:
    sampling = generation.Sampling(**sampling)
    devices = devices or sharding.one_device()
    return generation.Generator(model, prompts, max_new_tokens, row_length, sampling, devices)(params, step)


def loop(model: Any, params: Any, begun: list[int], source: list[int] | None, num_tokens: int, eos: int | None) -> list[int]:
    """The likeliest token of the growing row, one after the other."""
    ones = lambda row: np.ones((1, len(row)), np.int32)  # noqa: E731

    @jax.jit
    def scores_of_next(*inputs: np.ndarray) -> jax.Array:
        return model.apply({"params": params}, model.apply({"params": params}, *inputs)[0, -1], method="scores")

    ids, before = list(begun), () if source is None else (np.array([source]), ones(source))
    while len(ids) < len(begun) + num_tokens:
        scores = scores_of_next(*before, np.array([ids]), ones(ids))
        if int(scores.argmax()) == eos:
            break
        ids.append(int(scores.argmax()))
    return ids[len(begun) :]


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bart"])
def test_the_likeliest_tokens(model_type):
    """Prompts of different lengths in one batch: what a loop writes that takes them one by one; ends at the end of text."""
    kind, model, params = model_of(model_type)
    prompts = prompts_of(kind, model.config)
    sources = prompts.source or [None] * len(LENGTHS)
    expected = [loop(model, params, *row, 5, None) for row in zip(prompts.begun, sources, strict=True)]
    assert written(model, params, prompts, 5) == expected
    assert len({tuple(ids) for ids in expected}) > 1
    eos = expected[0][3]
    stopped = [loop(model, params, *row, 5, eos) for row in zip(prompts.begun, sources, strict=True)]
    assert written(model, params, prompts, 5, eos_token_id=eos) == stopped
    assert len(stopped[0]) <= 3


def test_the_end_of_a_row():
    """Where there is no more room, one row ends before another."""
    kind, model, params = model_of("gpt2")
    prompts = prompts_of(kind, model.config)
    assert list(map(len, written(model, params, prompts, 12, row_length=10))) == [4, 7, 9, 6]
    assert list(map(len, written(model, params, prompts, 2, row_length=7))) == [1, 2, 2, 2]


def test_tokens_that_the_tokenizer_has():
    """A model has rows for more tokens than a tokenizer, which could not decode them."""
    kind, model, params = model_of("gpt2")
    prompts = prompts_of(kind, model.config)
    assert (
        max(map(max, written(model, params, prompts, num_tokens=100))) < 100 <= max(map(max, written(model, params, prompts)))
    )


def test_what_is_drawn():
    """By (seed, step, row): the same again, other at another step or seed; near zero the likeliest, as with a low top_p."""
    kind, model, params = model_of("gpt2")
    prompts = prompts_of(kind, model.config)
    drawn = written(model, params, prompts, temperature=1.0, step=3)
    assert drawn == written(model, params, prompts, temperature=1.0, step=3)
    assert drawn != written(model, params, prompts, temperature=1.0, step=4)
    assert drawn != written(model, params, prompts, temperature=1.0, step=3, seed=1)
    likeliest = written(model, params, prompts)
    assert drawn != likeliest
    assert likeliest == written(model, params, prompts, temperature=1e-4)
    assert likeliest == written(model, params, prompts, temperature=1.0, top_p=1e-6)


@pytest.mark.parametrize(("top_p", "kept"), [(1.0, 4), (0.9, 3), (0.79, 2), (0.5, 1), (0.51, 2), (0.01, 1)])
def test_the_likeliest_that_have_a_probability_together(top_p, kept):
    """Drawn as often as their share of what is kept."""
    scores = jnp.log(jnp.array([0.3, 0.5, 0.15, 0.05]))
    num_draws = 4000
    sampling = generation.Sampling(1.0, top_p)
    rows = jnp.arange(num_draws)
    drawn = generation.choose(jnp.tile(scores, (num_draws, 1)), rows, jnp.zeros_like(rows), jax.random.key(0), sampling)
    shares = np.bincount(np.asarray(drawn), minlength=4) / num_draws
    expected = np.where(np.argsort([1, 0, 2, 3]) < kept, [0.3, 0.5, 0.15, 0.05], 0)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.03)
    assert (shares[expected == 0] == 0).all()


@pytest.mark.torch
@pytest.mark.parametrize("model_type", TYPES)
def test_the_tokens_of_pytorch(model_type):
    """generate(do_sample=False) writes the same on the same weights, its prompts filled up on the left."""
    import torch

    kind, model, params = model_of(model_type)
    config, prompts = model.config, prompts_of(kind, model.config)
    other = oracle.torch_model(kind, config, params)
    rows = prompts.source or prompts.begun
    width = max(map(len, rows))
    left = kind == "causal"
    ids = [[0] * (width - len(row)) * left + row + [0] * (width - len(row)) * (not left) for row in rows]
    mask = [[0] * (width - len(row)) * left + [1] * len(row) + [0] * (width - len(row)) * (not left) for row in rows]
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": 20, "use_cache": False}
    with torch.no_grad():
        found = other.generate(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **options).numpy()
    eos = config.eos_token_id
    expected = [[*row[: row.index(eos) if eos in row else None]] for row in found[:, width if left else 1 :].tolist()]
    assert written(model, params, prompts, 20, eos_token_id=eos) == expected
    assert sum(map(len, expected)) > 40
