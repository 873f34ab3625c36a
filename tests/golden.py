# SPDX-License-Identifier: Apache-2.0
"""What transformers' Flax classes computed, recorded in tests/golden while they were there (tests/record_golden.py).

golden/cases.json     the cases: objective, model type, variant, configuration, and the tree of parameters
golden/logits.npz     the logits of each case, of weights and inputs made by the rules below
golden/<model type>/  a model as the class of that type saved it; its logits, of inputs by the same rule, are in logits.npz too

Logits count where the attention mask is 1: what a class computes for padding is of no use to anyone, and with local
attention a mean over tokens that nobody may see. Needs neither transformers nor PyTorch.
"""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DIRECTORY = Path(__file__).resolve().parent / "golden"
ROWS, LENGTH, DECODER_LENGTH, PADDED_FROM = 3, 14, 11, 9  # row 2 is padded
FIRST_SEGMENT = (5, 9, 4)  # tokens of each row that are of type 0


class Case(NamedTuple):
    """One model, whose weights follow from `shapes` by weights_by_rule."""

    kind: str  # objective: masked, causal, seq2seq or pretraining
    model_type: str
    variant: str
    config: dict[str, Any]  # all fields, after the script's adapt_config
    shapes: list[tuple[str, list[int]]]  # of parameters: path joined by "/", and shape; sorted
    wrong: str | None = None  # why PyTorch's class computes something else; None: it computes the same

    @property
    def key(self) -> str:
        """Name of its logits; those of next sentences have "/next_sentence" behind it."""
        return f"{self.kind}/{self.model_type}/{self.variant}"


class Saved(NamedTuple):
    """A model in a directory of its own: config.json and flax_model.msgpack."""

    kind: str
    model_type: str

    @property
    def key(self) -> str:
        """Name of its logits."""
        return f"{self.kind}/{self.model_type}/saved"

    @property
    def directory(self) -> Path:
        """Where it is."""
        return DIRECTORY / self.model_type


def read_cases() -> list[Case]:
    """All cases, the wrong ones too."""
    sections, cases = read_json(), []
    (common,) = sections["common"]
    for item in sections["cases"]:
        shapes = [(path, shape) for path, shape in sections["trees"][item.pop("tree")]]
        cases.append(Case(**item | {"config": common | item["config"], "shapes": shapes}))
    return cases


def read_saved() -> list[Saved]:
    """All models that were saved."""
    return [Saved(**fields) for fields in read_json()["saved"]]


def read_json() -> dict[str, list[Any]]:
    """cases.json: fields that all configurations have, trees of parameters, cases that refer to both, and saved models."""
    return json.loads((DIRECTORY / "cases.json").read_text("utf-8"))


def read_logits() -> dict[str, np.ndarray]:
    """Logits float32 [rows, tokens, vocabulary], and [rows, 2] of next sentences, by their cases' keys."""
    with np.load(DIRECTORY / "logits.npz") as arrays:
        return dict(arrays)


def weights_by_rule(shapes: Iterable[tuple[str, Sequence[int]]]) -> dict[str, np.ndarray]:
    """Weights float32 by path, of (path, shape): the same path and shape have the same weights in every model.

    Around 0, but scales around 1, and the weights of RMS norms between what does nothing in Llama's, 1, and in Gemma's, 0.
    """
    centres, spreads, weights = {"scale": 1.0, "weight": 0.6}, {"embedding": 0.3}, {}
    for path, shape in shapes:
        noise = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(tuple(shape), np.float32)
        leaf = path.rpartition("/")[2]
        weights[path] = np.float32(centres.get(leaf, 0)) + np.float32(spreads.get(leaf, 0.2)) * noise
    return weights


def inputs_by_rule(kind: str, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the model of a configuration (its dictionary) is called with: int32 arrays by name."""
    ids = np.random.default_rng(0).integers(5, config["vocab_size"], (ROWS, LENGTH), np.int32)
    mask = np.ones_like(ids)
    ids[2, PADDED_FROM:], mask[2, PADDED_FROM:] = config.get("pad_token_id") or 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind in ("masked", "pretraining") and (config.get("type_vocab_size") or 0) > 1:
        is_second = np.arange(LENGTH) >= np.array(FIRST_SEGMENT)[:, None]
        inputs["token_type_ids"] = is_second.astype(np.int32) * mask
    elif config["model_type"] == "electra":  # whose old class would take ones
        inputs["token_type_ids"] = np.zeros_like(ids)
    if kind == "seq2seq":
        decoder_ids = np.random.default_rng(1).integers(5, config["vocab_size"], (ROWS, DECODER_LENGTH), np.int32)
        inputs["decoder_input_ids"] = decoder_ids
    return inputs
