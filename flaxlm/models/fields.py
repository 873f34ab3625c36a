# SPDX-License-Identifier: Apache-2.0
"""Fields of configurations that change what PyTorch's classes compute and that nothing here computes: refused by name."""

import json
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from flaxlm import cli


class Refused(NamedTuple):
    """A field, of which types (none: of all), the values with which nothing is left out, and what would be with others."""

    field: str
    types: tuple[str, ...]
    same: tuple[Any, ...]
    what: str


BERT = ("bert", "roberta", "roberta-prelayernorm", "xlm-roberta", "camembert", "electra", "albert")
LAYERS_DROPPED = "layers left out now and then"
REFUSED = (
    Refused("position_embedding_type", BERT, ("absolute", None), "positions relative to each other"),
    Refused("add_cross_attention", (), (False, None), "attention to what an encoder says"),
    Refused("tie_encoder_decoder", (), (False, None), "one set of weights for encoder and decoder"),
    Refused("pruned_heads", (), ({}, None), "layers of fewer heads"),
    Refused("quantization_config", (), (None,), "quantised weights"),
    Refused("share_encoder_decoder_embeddings", ("marian",), (True, None), "a vocabulary for each side"),
)


def check(config: PretrainedConfig) -> None:
    """Refuse a configuration of which something would be left out without a word."""
    for field, types, same, what in REFUSED:
        value = getattr(config, field, same[0])
        if (not types or config.model_type in types) and value not in same:
            value, right = (json.dumps(value, default=str) for value in (value, same[0]))
            cli.fail(f"{field}={value}: {what}: not here; {config.model_type} takes only {field}={right}")
