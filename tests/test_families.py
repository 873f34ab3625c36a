# SPDX-License-Identifier: Apache-2.0
"""The architectures, tiny: what transformers' classes computed and compute, and ways to compute that make no difference.

tests/variants has their configurations, for every field that changes what is computed; a text that is longer than a window
is among the inputs. Most of it is computed operation by operation: programs of one operation are soon all compiled.
"""

import functools
import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import CONFIG_MAPPING, PretrainedConfig

from flaxlm import attention, layers, models
from flaxlm.models import fields
from tests import golden, oracle

MODULES = [
    importlib.import_module(f"tests.variants.{path.stem}")
    for path in sorted((Path(__file__).parent / "variants").glob("*.py"))
    if path.stem != "__init__"
]
CLASSES: dict[tuple[str, str], type[nn.Module]] = {pair: of for module in MODULES for pair, of in module.CLASSES.items()}
TRAINED = {
    "masked": models.MASKED,
    "causal": models.CAUSAL,
    "seq2seq": models.SPANS | models.DENOISING,
    "pretraining": models.SENTENCE_PAIRS,
}


class Variant(NamedTuple):
    """A configuration of tests/variants."""

    kind: str
    model_type: str
    fields: dict[str, Any]

    def make_config(self, **more: Any) -> PretrainedConfig:
        return CONFIG_MAPPING[self.model_type](**self.fields | more)


def name_variants() -> dict[str, Variant]:
    """All of them, numbered within their kind and type."""
    found: dict[str, Variant] = {}
    for variant in (Variant(*item) for module in MODULES for item in module.VARIANTS):
        count = sum(other[:2] == variant[:2] for other in found.values())
        found[f"{variant.kind}/{variant.model_type}/{count}"] = variant
    return found


VARIANTS = name_variants()
TYPES = {name.rpartition("/")[0]: name for name in VARIANTS}  # the last of each kind and type: it is the least plain


class Tiny(NamedTuple):
    """A model that is ready to be called, and what it computes of its inputs in the plainest way."""

    kind: str
    config: PretrainedConfig
    inputs: tuple[np.ndarray, ...]
    params: Any
    counts: np.ndarray  # tokens of which the scores are looked at: all but padding
    scores: tuple[jax.Array, ...]

    def model(self, **compute: Any) -> nn.Module:
        return CLASSES[self.kind, self.config.model_type](self.config, layers.Compute(**compute))


@functools.cache
def make_tiny(name: str) -> Tiny:
    variant = VARIANTS[name]
    config = variant.make_config()
    inputs = oracle.make_inputs(variant.kind, config)
    params = oracle.random_weights(CLASSES[variant.kind, variant.model_type](config), inputs)
    tiny = Tiny(variant.kind, config, inputs, params, inputs[3 if variant.kind == "seq2seq" else 1] == 1, ())
    tiny = tiny._replace(scores=scores_of(tiny, tiny.model()))
    assert np.abs(tiny.scores[0]).max() > 0.3, "scores too small to tell anything"
    return tiny


def scores_of(tiny: Tiny, model: nn.Module, dropout: int | None = None) -> tuple[jax.Array, ...]:
    """Of the vocabulary for all tokens that count, and of next sentences; with dropout if there is a number for it."""
    variables = {"params": tiny.params}
    rngs = None if dropout is None else {"dropout": jax.random.key(dropout)}
    hidden = model.apply(variables, *tiny.inputs, rngs=rngs)
    scores = model.apply(variables, hidden, method="scores")[tiny.counts].astype(jnp.float32)
    if tiny.kind != "pretraining":
        return (scores,)
    return scores, model.apply(variables, hidden, method="next_sentence_scores").astype(jnp.float32)


def assert_same(found: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...], tolerance: float = 1e-5) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


# Recorded with jax 0.10; another compiler rounds otherwise.
TOLERANCE = 1e-5 if jax.__version__.startswith("0.10.") else 2e-5


def test_every_type_that_is_trained_has_variants():
    for kind, classes in TRAINED.items():
        for model_type, of in classes.items():
            assert CLASSES[kind, model_type] is of
            assert f"{kind}/{model_type}" in TYPES


# ---- What transformers 4's Flax classes computed -----------------------------------------------------------------------


CASES = {case.key: case for case in golden.read_cases()}
REFUSED = [key for key, case in CASES.items() if case.config["add_cross_attention"]]
LEFT_OUT = ["seq2seq/mt5/tied"]  # mT5 has a head of its own, whatever the configuration says: in transformers 5 always "tied"
WRONG = dict.fromkeys((key for key, case in CASES.items() if case.wrong), "") | {  # and the weights that are not ours
    "masked/big_bird/no bias": r"bert/encoder/layer/./attention/self/(query|key|value)/bias",
    "causal/llama/tied": "lm_head/kernel",
    "causal/mistral/tied": "lm_head/kernel",
}
SAVED = {saved.key: saved for saved in golden.read_saved()}
LOGITS = golden.read_logits()


def make_old(key: str, kind: str, config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> tuple[Tiny, set[str]]:
    """A model with the weights of an old class and the logits that it had, and paths of weights that ours has not."""
    inputs = golden.inputs_by_rule(kind, config)
    names = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")  # in the order of our arguments
    arrays = [inputs[name] for name in names if name in inputs]
    arrays += [np.ones_like(arrays[-1])] if kind == "seq2seq" else []
    tiny = Tiny(kind, CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)), tuple(arrays), {}, np.empty(0), ())
    tree = jax.eval_shape(lambda: tiny.model().init(jax.random.key(0), *arrays)["params"])
    ours = {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}
    assert ours == {path: weights[path].shape for path in ours}
    params = unflatten_dict({path: jnp.asarray(weights[path]) for path in ours}, sep="/")
    counts = arrays[3 if kind == "seq2seq" else 1] == 1
    logits = (LOGITS[key][counts], *([LOGITS[f"{key}/next_sentence"]] if kind == "pretraining" else []))
    return tiny._replace(params=params, counts=counts, scores=logits), weights.keys() - ours.keys()


@pytest.mark.parametrize("key", [key for key in CASES if key not in {*WRONG, *REFUSED, *LEFT_OUT}])
def test_old_weights_give_old_scores(key):
    case = CASES[key]
    tiny, not_ours = make_old(key, case.kind, case.config, golden.weights_by_rule(case.shapes))
    assert not not_ours
    assert_same(scores_of(tiny, tiny.model()), tiny.scores, TOLERANCE)


@pytest.mark.parametrize("key", WRONG)
def test_where_old_classes_were_wrong(key):
    """As golden.Case.wrong says; PyTorch's class computes something else, with which ours is compared for the same fields."""
    case = CASES[key]
    tiny, not_ours = make_old(key, case.kind, case.config, golden.weights_by_rule(case.shapes))
    assert all(re.fullmatch(WRONG[key], path) for path in not_ours)
    assert bool(not_ours) == bool(WRONG[key])
    assert np.abs(scores_of(tiny, tiny.model())[0] - tiny.scores[0]).max() > 1e-4


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_computed_is_refused(key, refuses):
    """Attention to an encoder that a model on its own does not have."""
    case = CASES[key]
    with refuses("add_cross_attention=true"):
        fields.check(CONFIG_MAPPING[case.model_type].from_dict(case.config))


@pytest.mark.parametrize("key", SAVED)
def test_models_that_old_classes_saved(key):
    saved = SAVED[key]
    config = json.loads((saved.directory / "config.json").read_text("utf-8"))
    weights = serialization.msgpack_restore((saved.directory / "flax_model.msgpack").read_bytes())
    tiny, not_ours = make_old(key, saved.kind, config, flatten_dict(weights, sep="/"))
    assert not not_ours
    assert_same(scores_of(tiny, tiny.model()), tiny.scores)


# ---- Ways to compute ---------------------------------------------------------------------------------------------------


DROPOUT = 3  # number of a random key
FAST = {"xla_backend_optimization_level": 0}  # to compile


@pytest.mark.parametrize("name", VARIANTS)
def test_ways_to_attend_agree(name):
    """With dropout, which draws the same masks, where there is any."""
    tiny = make_tiny(name)
    assert_same(scores_of(tiny, tiny.model(attention="chunked"), DROPOUT), scores_of(tiny, tiny.model(), DROPOUT))
    if getattr(tiny.config, "attn_logit_softcapping", None):
        with pytest.raises(ValueError, match="xla cannot squeeze scores"):
            scores_of(tiny, tiny.model(attention="xla"))
    else:
        assert_same(scores_of(tiny, tiny.model(attention="xla")), tiny.scores)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_loop_of_layers_is_the_layers(name):
    """With dropout, of which each layer has its own."""
    tiny = make_tiny(name)

    def scores(params: Any) -> tuple[jax.Array, ...]:
        return scores_of(tiny._replace(params=params), tiny.model(scan=True), DROPOUT)

    found = jax.jit(scores, compiler_options=FAST)(tiny.params)
    assert_same(found, scores_of(tiny, tiny.model(), DROPOUT))


@pytest.mark.parametrize("name", TYPES.values())
def test_gradients_agree(name, monkeypatch):
    """Those of all weights, with dropout."""
    monkeypatch.setattr(attention, "CHUNK_SCORES", 1)  # a row at a time
    tiny = make_tiny(name)

    def loss_fn(params: Any, **compute: Any) -> jax.Array:
        model, rngs = tiny.model(**compute), {"dropout": jax.random.key(DROPOUT)}
        hidden = model.apply({"params": params}, *tiny.inputs, rngs=rngs)
        return jnp.square(model.apply({"params": params}, hidden, method="scores")[tiny.counts]).mean()

    ways = ({}, {"attention": "chunked", "scan": True, "remat": True})
    expected, found = (
        flatten_dict(jax.jit(jax.grad(functools.partial(loss_fn, **way)), compiler_options=FAST)(tiny.params)) for way in ways
    )
    largest = max(np.abs(grad).max() for grad in expected.values())
    assert largest > 1e-3
    for path, grad in found.items():
        np.testing.assert_allclose(grad, expected[path], rtol=1e-5, atol=1e-5 * largest, err_msg="/".join(path))


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16(name):
    """A few percent off, by root mean square; and it is not float32 after all."""
    tiny = make_tiny(name)
    for found, expected in zip(scores_of(tiny, tiny.model(dtype=jnp.bfloat16)), tiny.scores, strict=True):
        error = np.sqrt(np.square(found - expected).mean() / np.square(expected).mean())
        assert 1e-4 < error < 0.04


@pytest.mark.parametrize("name", TYPES.values())
def test_each_rate_of_dropout_matters(name):
    variant, tiny = VARIANTS[name], make_tiny(name)
    no_part = (*OF_OTHER_HEADS, "encoder_") if tiny.kind == "causal" else OF_OTHER_HEADS  # a decoder alone has no encoder
    rates = [field for field in tiny.config.to_dict() if "drop" in field and not field.startswith(no_part)]
    assert rates
    for rate in rates:
        config = variant.make_config(**dict.fromkeys(rates, 0.0) | {rate: 0.5})
        dropping = tiny._replace(config=config)
        keys = range(DROPOUT, DROPOUT + (8 if "layerdrop" in rate else 2))  # of few layers at times none is left out
        once, *others = (scores_of(dropping, dropping.model(), key)[0] for key in keys)
        np.testing.assert_array_equal(once, scores_of(dropping, dropping.model(), DROPOUT)[0])
        assert max(np.abs(scores - tiny.scores[0]).max() for scores in (once, *others)) > 1e-3, rate
        assert max(np.abs(once - scores).max() for scores in others) > 1e-3, rate
        assert_same(scores_of(dropping, dropping.model()), tiny.scores)


OF_OTHER_HEADS = ("classifier_drop", "qa_drop", "seq_classif_drop", "summary_")


# ---- Texts side by side, and heads ---------------------------------------------------------------------------------------


def pack(ids_BT: np.ndarray, lengths: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and segments of three rows: two texts side by side, the first, the second; tokens elsewhere are padding."""
    first, both = lengths[0], sum(lengths)
    ids_BT = np.array(ids_BT)
    ids_BT[1, :first], ids_BT[2, : lengths[1]] = ids_BT[0, :first], ids_BT[0, first:both]
    index_T = np.arange(ids_BT.shape[1])
    segments = [(index_T < both) * (1 + (index_T >= first)), index_T < first, index_T < lengths[1]]
    return ids_BT, np.stack(segments).astype(np.int32)


@pytest.mark.parametrize("name", VARIANTS)
def test_texts_in_a_row_do_not_see_each_other(name):
    tiny = make_tiny(name)
    lengths = (5, 7) if tiny.kind != "seq2seq" else (4, 5)
    inputs = pack(tiny.inputs[0], (5, 7))
    if tiny.kind == "seq2seq":
        inputs += pack(tiny.inputs[2], lengths)

    def hidden_states(*inputs: np.ndarray) -> np.ndarray:
        return np.asarray(tiny.model().apply({"params": tiny.params}, *inputs))

    first, both = lengths[0], sum(lengths)
    hidden_BTH = hidden_states(*inputs)
    np.testing.assert_allclose(hidden_BTH[0, :first], hidden_BTH[1, :first], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(hidden_BTH[0, first:both], hidden_BTH[2, : lengths[1]], rtol=1e-5, atol=1e-5)
    as_one = hidden_states(*(np.minimum(array, 1) if i % 2 else array for i, array in enumerate(inputs)))
    assert np.abs(as_one[0, first:both] - hidden_BTH[2, : lengths[1]]).max() > 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_of_the_head(name):
    """Scores need those, each of them, and no others."""
    tiny = make_tiny(name)
    hidden = tiny.model().apply({"params": tiny.params}, *tiny.inputs)
    flat = flatten_dict(tiny.params, sep="/")

    def scores(paths: tuple[str, ...]) -> np.ndarray:
        params = {
            path: leaf for path, leaf in flat.items() if path.startswith(tuple(f"{path}/" for path in paths)) or path in paths
        }
        return tiny.model().apply({"params": unflatten_dict(params, sep="/")}, hidden, method="scores")

    head = tiny.model().head_weights
    np.testing.assert_array_equal(scores(head), tiny.model().apply({"params": tiny.params}, hidden, method="scores"))
    for path in head:
        with pytest.raises((errors.ScopeParamNotFoundError, errors.ScopeCollectionNotFound, KeyError)):
            scores(tuple(other for other in head if other != path))


# ---- PyTorch's classes ---------------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("name", VARIANTS)
def test_pytorch_computes_the_same(name):
    """Scores, and gradients of all weights; and PyTorch's class has just these weights."""
    tiny = make_tiny(name)
    oracle.compare(tiny.kind, tiny.model(), tiny.config)
