# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of ALBERT, for every field that changes what is computed."""

from flaxlm.models import albert

TINY = {
    "vocab_size": 48,
    "embedding_size": 12,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}
UNTIED = {"tie_word_embeddings": False}

VARIANTS: list[tuple[str, str, dict]] = [
    ("masked", "albert", TINY),
    ("masked", "albert", TINY | UNTIED | {"hidden_act": "relu", "layer_norm_eps": 0.01}),
    ("masked", "albert", TINY | {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2}),
    ("masked", "albert", TINY | {"num_hidden_layers": 5, "num_hidden_groups": 3, "embedding_size": 16}),
    ("masked", "albert", TINY | {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_act": "gelu"}),
    ("pretraining", "albert", TINY),
    ("pretraining", "albert", TINY | UNTIED | {"num_hidden_groups": 2, "hidden_act": "silu"}),
]

CLASSES: dict[tuple[str, str], type] = {
    ("masked", "albert"): albert.AlbertForMaskedLM,
    ("pretraining", "albert"): albert.AlbertForPreTraining,
}
