# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of ELECTRA's generator, for every field that changes what is computed."""

from flaxlm.models import electra

TINY = {
    "vocab_size": 48,
    "embedding_size": 12,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}
UNTIED, CAUSAL = {"tie_word_embeddings": False}, {"is_decoder": True}

VARIANTS: list[tuple[str, str, dict]] = [
    ("masked", "electra", TINY),
    ("masked", "electra", TINY | UNTIED | {"hidden_act": "relu", "layer_norm_eps": 0.01}),
    ("masked", "electra", TINY | {"embedding_size": 16, "num_hidden_layers": 3, "type_vocab_size": 1}),
    ("masked", "electra", TINY | CAUSAL | {"embedding_size": 24, "num_attention_heads": 1}),
    ("causal", "electra", TINY | CAUSAL),
    ("causal", "electra", TINY | CAUSAL | UNTIED | {"embedding_size": 16, "hidden_act": "gelu_new"}),
]

CLASSES: dict[tuple[str, str], type] = {
    ("masked", "electra"): electra.ElectraForMaskedLM,
    ("causal", "electra"): electra.ElectraForCausalLM,
}
