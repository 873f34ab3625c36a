# SPDX-License-Identifier: Apache-2.0
"""Fields of configurations that change what PyTorch's classes compute and that nothing here computes: refused by name.

tests/test_fields.py goes through all fields of all types; what it finds in none of its lists belongs here, or into a model.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from flaxlm import cli


class Refused(NamedTuple):
    """A field, of which types (none: of all), the values with which nothing is left out, and what would be with others.

    "rope_parameters.rope_type" is what the object rope_parameters says, or each of those that it has for kinds of layers.
    """

    field: str
    types: tuple[str, ...]
    same: tuple[Any, ...]
    what: str


HAD_RELATIVE_POSITIONS = ("albert", "bert", "camembert", "electra", "roberta", "roberta-prelayernorm", "xlm-roberta")
REFUSED = (
    Refused("position_embedding_type", HAD_RELATIVE_POSITIONS, ("absolute", None), "positions relative to each other"),
    Refused("rope_parameters.rope_type", (), ("default", "linear", "llama3", None), "positions stretched in that way"),
    Refused("rope_parameters.partial_rotary_factor", (), (1, None), "heads that are turned in part"),
    Refused("use_bidirectional_attention", ("gemma", "gemma2"), (False, None), "sight of what comes after a token"),
    Refused("share_encoder_decoder_embeddings", ("marian",), (True, None), "a vocabulary for each side"),
    Refused("mlp_bias", ("gemma", "gemma2", "mistral", "qwen2", "qwen3"), (False, None), "biases, which only Llama has there"),
    Refused("attention_bias", ("mistral", "qwen2"), (False, None), "biases, of which this type has its own"),
    Refused("add_cross_attention", (), (False, None), "attention to what an encoder says"),
    Refused("tie_encoder_decoder", (), (False, None), "one set of weights for encoder and decoder"),
    Refused("pruned_heads", (), ({}, None), "layers of fewer heads"),
    Refused("quantization_config", (), (None,), "quantised weights"),
)


def check(config: PretrainedConfig) -> None:
    """Refuse a configuration of which something would be left out without a word."""
    for field, types, same, what in REFUSED:
        if types and config.model_type not in types:
            continue
        for value in values(config, field):
            if value not in same:
                shown, *right = (json.dumps(item, default=str) for item in (value, *same) if item is not None)
                remedy = f"{config.model_type} takes only {' or '.join(right)}" if right else "take the field out"
                cli.fail(f"{field}={shown}: {what}: not here; {remedy}")


def values(config: PretrainedConfig, field: str) -> Iterator[Any]:
    """What a configuration has under this name, nothing or once or, within the parts of an object, several times."""
    name, _, part = field.partition(".")
    if not part:
        yield from [getattr(config, name)] if hasattr(config, name) else []
        return
    whole = getattr(config, name, None) or {}
    for parameters in (whole, *(kind for kind in whole.values() if isinstance(kind, dict))):
        yield from [parameters[part]] if part in parameters else []
