# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of RoFormer, for every field that changes what is computed."""

from flaxlm.models import roformer

TINY = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}
UNTIED, CAUSAL = {"tie_word_embeddings": False}, {"is_decoder": True}

VARIANTS: list[tuple[str, str, dict]] = [
    ("masked", "roformer", TINY),
    ("masked", "roformer", TINY | UNTIED | {"hidden_act": "relu", "layer_norm_eps": 0.01}),
    ("masked", "roformer", TINY | {"rotary_value": True, "num_hidden_layers": 3, "num_attention_heads": 2}),
    ("masked", "roformer", TINY | {"embedding_size": 12, "type_vocab_size": 1}),
    ("masked", "roformer", TINY | CAUSAL | UNTIED | {"embedding_size": 24, "num_attention_heads": 1}),
    ("causal", "roformer", TINY | CAUSAL),
    ("causal", "roformer", TINY | CAUSAL | UNTIED | {"rotary_value": True, "hidden_act": "gelu_new"}),
]

CLASSES: dict[tuple[str, str], type] = {
    ("masked", "roformer"): roformer.RoFormerForMaskedLM,
    ("causal", "roformer"): roformer.RoFormerForCausalLM,
}
