# SPDX-License-Identifier: Apache-2.0
"""Names of weights: ours, PyTorch's, those of early files, and what of a file is no weight."""

import numpy as np
import pytest

from flaxlm import layouts

WORDS = ("bert", "embeddings", "word_embeddings", "embedding")
SCALE = ("bert", "encoder", "layer", "0", "output", "LayerNorm", "scale")
SHIFT = ("bert", "encoder", "layer", "0", "output", "LayerNorm", "bias")
BIAS = ("cls", "predictions", "bias")
BERT = (WORDS, SCALE, SHIFT, BIAS)


@pytest.mark.parametrize(
    ("path", "num_axes", "name", "is_transposed"),
    [
        (WORDS, 2, "bert.embeddings.word_embeddings.weight", False),
        (SCALE, 1, "bert.encoder.layer.0.output.LayerNorm.weight", False),
        (SHIFT, 1, "bert.encoder.layer.0.output.LayerNorm.bias", False),
        (("lm_head", "kernel"), 2, "lm_head.weight", True),
        (("model", "norm", "weight"), 1, "model.norm.weight", False),
        (("final_logits_bias",), 2, "final_logits_bias", False),
    ],
)
def test_names_in_pytorch(path, num_axes, name, is_transposed):
    assert layouts.pytorch_name(path, num_axes) == (name, is_transposed)


def test_to_pytorch():
    """Kernels are transposed, and lie in memory as safetensors writes them; all else stays."""
    kernel, table = np.arange(6.0).reshape(2, 3), np.arange(8.0).reshape(4, 2)
    state = layouts.to_pytorch({"dense": {"kernel": kernel, "bias": np.ones(3)}, "words": {"embedding": table}})
    assert state.keys() == {"dense.weight", "dense.bias", "words.weight"}
    np.testing.assert_array_equal(state["dense.weight"], kernel.T)
    np.testing.assert_array_equal(state["words.weight"], table)
    assert all(array.flags.c_contiguous for array in state.values())


def test_what_pytorch_has_twice_is_written_twice():
    """With a head of its own the table of BART's words is one tensor under three names, the bias of BERT's head under two."""
    head = {"kernel": np.ones((2, 4))}
    shared = np.arange(8.0).reshape(4, 2)
    state = layouts.to_pytorch({"model": {"shared": {"embedding": shared}}, "lm_head": head})
    for side in ("encoder", "decoder"):
        np.testing.assert_array_equal(state[f"model.{side}.embed_tokens.weight"], shared)
    assert layouts.to_pytorch({"model": {"shared": {"embedding": shared}}}).keys() == {"model.shared.weight"}
    for name in ("lm_head", "predictions"):
        state = layouts.to_pytorch({name: {"decoder": head, "bias": np.ones(4)}})
        assert state.keys() == {f"{name}.decoder.weight", f"{name}.bias", f"{name}.decoder.bias"}


# ---- Finding -------------------------------------------------------------------------------------------------------------


def names_of(*paths: tuple[str, ...]) -> list[str]:
    return [layouts.pytorch_name(path, 0)[0] for path in paths]


def test_both_layouts():
    """What is not there is left out."""
    assert layouts.find(names_of(WORDS, BIAS), BERT, is_pytorch=True) == {
        WORDS: "bert.embeddings.word_embeddings.weight",
        BIAS: "cls.predictions.bias",
    }
    stored = ["/".join(WORDS), "/".join(SCALE)]
    assert layouts.find(stored, BERT, is_pytorch=False) == {WORDS: stored[0], SCALE: stored[1]}
    assert not layouts.find(stored, BERT, is_pytorch=True)


def test_a_model_without_its_head():
    """Its names lack the first part, in either layout; what is in the head by that name is not meant."""
    stored = [name.removeprefix("bert.") for name in names_of(WORDS, SCALE, SHIFT)]
    assert layouts.find([*stored, "bias"], BERT, is_pytorch=True) == dict(zip(BERT[:3], stored, strict=True))
    stored = ["/".join(path[1:]) for path in BERT[:3]]
    assert layouts.find(stored, BERT, is_pytorch=False) == dict(zip(BERT[:3], stored, strict=True))
    # A file of the whole model, with names that could be those of another.
    both = [*names_of(*BERT), *(name.removeprefix("bert.") for name in names_of(WORDS))]
    assert layouts.find(both, BERT, is_pytorch=True)[WORDS] == "bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize("prefix", ["bert.", ""], ids=["whole", "without its head"])
def test_early_names_of_norms(prefix):
    norm = f"{prefix}encoder.layer.0.output.LayerNorm"
    stored = [f"{prefix}embeddings.word_embeddings.weight", f"{norm}.gamma", f"{norm}.beta"]
    assert layouts.find(stored, BERT, is_pytorch=True) == dict(zip(BERT[:3], stored, strict=True))
    assert not layouts.unused(stored, stored, is_tied=True)


def test_a_table_under_its_other_name():
    """Of tensors that are one, PyTorch writes one, and not always that under the first name."""
    paths = ("model", "shared", "embedding"), ("lm_head", "kernel")
    for name in ("model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"):
        stored = [name, "lm_head.weight"]
        assert layouts.find(stored, paths, is_pytorch=True) == dict(zip(paths, stored, strict=True))
    paths = ("predictions", "bias"), ("predictions", "decoder", "kernel")
    for name in ("predictions.bias", "predictions.decoder.bias"):
        stored = [name, "predictions.decoder.weight"]
        assert layouts.find(stored, paths, is_pytorch=True) == dict(zip(paths, stored, strict=True))


def test_what_pytorch_computes_with():
    """With a head of its own, which it keeps apart, the other bias and the other table are never trained; else they are one."""
    both = ["cls.predictions.bias", "cls.predictions.decoder.bias", "cls.predictions.decoder.weight"]
    kernel = ("cls", "predictions", "decoder", "kernel")
    assert layouts.find(both, [BIAS, kernel], is_pytorch=True) == {BIAS: both[1], kernel: both[2]}
    assert layouts.find(both, [BIAS], is_pytorch=True) == {BIAS: both[0]}
    assert layouts.unused(both, both[1:], is_tied=False) == []
    shared, head = ("model", "shared", "embedding"), ("lm_head", "kernel")
    tables = ["model.shared.weight", *(f"model.{side}.embed_tokens.weight" for side in ("encoder", "decoder"))]
    found = layouts.find([*tables, "lm_head.weight"], [shared, head], is_pytorch=True)
    assert found == {shared: tables[2], head: "lm_head.weight"}
    assert layouts.unused([*tables, "lm_head.weight"], [tables[2], "lm_head.weight"], is_tied=False) == []
    assert layouts.find(tables, [shared], is_pytorch=True) == {shared: tables[0]}


# ---- What is left over ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "is_tied", "expected"),
    [
        (["a.weight", "bert.pooler.dense.weight"], True, ["bert.pooler.dense.weight"]),
        (["a.weight", "lm_head.weight"], True, []),
        (["a.weight", "lm_head.weight"], False, ["lm_head.weight"]),
        (["a.weight", "cls.predictions.decoder.weight", "generator_lm_head.weight", "vocab_projector.weight"], True, []),
        (["a.weight", "bert.embeddings.position_ids", "embeddings.position_ids"], True, []),
        (["a.weight", "h.0.attn.bias", "h.0.attn.masked_bias", "h.0.attn.attention.bias"], True, []),
        (["a.weight", "h.0.attn.c_attn.bias"], True, ["h.0.attn.c_attn.bias"]),
        (["a.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"], True, []),
        (["a.weight", "model.encoder.embed_positions.weight"], True, []),
    ],
)
def test_what_is_left_over(stored, is_tied, expected):
    """Named are weights; not buffers, and not a head that has the weights of the words."""
    assert layouts.unused(stored, ["a.weight"], is_tied) == expected


def test_copies_are_not_left_over():
    doubles = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    assert layouts.unused(["shared.weight", *doubles], ["shared.weight"], is_tied=True) == []
    assert layouts.unused(doubles, [], is_tied=True) == sorted(doubles)
    of_bart = ["model.shared.weight", "lm_head.weight", *(f"model.{name}" for name in doubles)]
    assert layouts.unused(of_bart, of_bart[:2], is_tied=False) == []
    bias = ["cls.predictions.bias", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"]
    assert layouts.unused(bias, bias[:2], is_tied=False) == []
