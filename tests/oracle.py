# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own classes as the oracle: what they compute of a model's weights, and the gradients, in our layout."""

from copy import deepcopy
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import PretrainedConfig

from flaxlm import layouts

AUTO_CLASSES = {
    "masked": "AutoModelForMaskedLM",
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "pretraining": "AutoModelForPreTraining",
}

# What PyTorch has and we have not: sinusoids, which are computed, and a layer that has no part in the scores.
NOT_OURS = (
    *("embed_positions.weight", "distilbert.embeddings.position_embeddings.weight"),
    *("bert.pooler.weight", "bert.pooler.bias"),
)


def make_inputs(kind: str, config: PretrainedConfig, num_tokens: int = 14) -> tuple[np.ndarray, ...]:
    """Ids and segments of three rows, the last one padded; for seq2seq the decoder's too; for pretraining token types."""
    rng = np.random.default_rng(0)
    ids, segments = rng.integers(5, config.vocab_size, (3, num_tokens)), np.ones((3, num_tokens), np.int64)
    ids[2, 9:], segments[2, 9:] = config.pad_token_id or 0, 0
    ids = np.where((ids == config.pad_token_id) & (segments == 1), 5, ids)
    if kind == "seq2seq":
        decoder_ids = rng.integers(5, config.vocab_size, (3, num_tokens - 3))
        return ids, segments, decoder_ids, np.ones_like(decoder_ids)
    if kind == "pretraining":
        return ids, segments, (np.arange(num_tokens) >= 6) * segments
    return ids, segments


def random_weights(model: nn.Module, inputs: tuple[np.ndarray, ...], scale: float = 0.2) -> Any:
    """Weights of a size that makes every part of the model matter: norms around 1, the rest around 0."""
    shapes = flatten_dict(jax.eval_shape(lambda rng: model.init(rng, *inputs)["params"], jax.random.key(0)))
    fresh = flatten_dict(model.init(jax.random.key(0), *inputs)["params"])
    rng = np.random.default_rng(1)
    noise = {path: rng.normal(size=shapes[path].shape).astype(np.float32) * scale for path in sorted(shapes)}
    return unflatten_dict({path: noise[path] + (np.asarray(fresh[path]) == 1) for path in noise})


def torch_model(kind: str, config: PretrainedConfig, params: Any) -> Any:
    """The PyTorch class with these weights: nothing missing, nothing unexpected, nothing of another shape."""
    import torch
    import transformers

    config = deepcopy(config)  # classes change it
    config.use_cache = False  # BART's for a decoder alone has as many layers as the encoder
    state = {name: torch.tensor(array) for name, array in layouts.to_pytorch(params).items()}
    # As from a file: there a head is not tied that has other weights than the words, whatever the configuration says.
    options = {"output_loading_info": True, "attn_implementation": "eager", "dtype": torch.float32}
    model_class = type(getattr(transformers, AUTO_CLASSES[kind]).from_config(config))
    model, info = model_class.from_pretrained(None, config=config, state_dict=state, **options)
    missing = [name for name in info["missing_keys"] if not name.endswith(NOT_OURS)]
    assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def torch_scores(kind: str, model: Any, inputs: tuple[np.ndarray, ...]) -> tuple[Any, ...]:
    """What the PyTorch class makes of the inputs: scores of the vocabulary and, for pretraining, of next sentences."""
    import torch

    names = ["input_ids", "attention_mask"]
    names += {"seq2seq": ["decoder_input_ids", "decoder_attention_mask"], "pretraining": ["token_type_ids"]}.get(kind, [])
    outputs = model(**{name: torch.tensor(array) for name, array in zip(names, inputs, strict=True)})
    if kind != "pretraining":
        return (outputs.logits,)
    return outputs.prediction_logits, next(v for k, v in outputs.items() if k in ("seq_relationship_logits", "sop_logits"))


def flax_scores(kind: str, model: nn.Module, params: Any, inputs: tuple[np.ndarray, ...]) -> tuple[jax.Array, ...]:
    """The same of ours."""
    hidden = model.apply({"params": params}, *inputs)
    scores = (model.apply({"params": params}, hidden, method="scores"),)
    if kind == "pretraining":
        scores += (model.apply({"params": params}, hidden, method="next_sentence_scores"),)
    return scores


def compare(kind: str, model: nn.Module, config: PretrainedConfig, tolerance: float = 1e-4) -> None:
    """Scores to 1e-4, and all gradients of the sum of squares of the scores that count, to 1e-4 of the largest."""
    inputs = make_inputs(kind, config)
    params = random_weights(model, inputs)
    counts = (inputs[3] if kind == "seq2seq" else inputs[1]).astype(bool)
    other = torch_model(kind, config, params)
    expected = torch_scores(kind, other, inputs)

    def loss_fn(params):
        scores = flax_scores(kind, model, params, inputs)
        return jnp.square(scores[0][counts]).mean() + sum(jnp.square(part).mean() for part in scores[1:]), scores

    (_, found), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    for ours, theirs, where in zip(found, expected, (counts, slice(None)), strict=False):
        theirs = theirs.detach().numpy()
        assert np.abs(theirs).max() > 0.3, "scores too small to tell anything"
        np.testing.assert_allclose(np.asarray(ours)[where], theirs[where], rtol=tolerance, atol=tolerance)
    loss = expected[0][counts].square().mean() + sum(part.square().mean() for part in expected[1:])
    loss.backward()
    parameters = dict(other.named_parameters(remove_duplicate=False))
    their_grads = {name: p.grad.numpy() for name, p in parameters.items() if p.grad is not None}
    largest = max(np.abs(grad).max() for grad in their_grads.values())
    for copy, name in layouts.copies(parameters).items():
        if parameters[copy] is not parameters[name] and copy in their_grads:
            their_grads[name] = their_grads.get(name, 0) + their_grads[copy]
    for path, grad in flatten_dict(grads).items():
        name, transposed = layouts.pytorch_name(path, grad.ndim)
        theirs = their_grads.get(name)
        if theirs is None:  # nothing that PyTorch trains
            assert not np.abs(grad).max(), name
            continue
        theirs = theirs.T if transposed else theirs
        np.testing.assert_allclose(grad, theirs, rtol=tolerance, atol=tolerance * largest, err_msg=name)
