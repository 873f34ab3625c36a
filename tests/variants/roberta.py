# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of RoBERTa and its relatives, for every field that changes what is computed."""

from flaxlm.models import roberta

TINY = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
    "type_vocab_size": 1,
}
UNTIED, CAUSAL = {"tie_word_embeddings": False}, {"is_decoder": True}

VARIANTS: list[tuple[str, str, dict]] = [
    ("masked", "roberta", TINY),
    ("masked", "roberta", TINY | UNTIED | {"hidden_act": "relu", "pad_token_id": 0}),
    ("masked", "roberta", TINY | {"type_vocab_size": 2, "pad_token_id": 4, "layer_norm_eps": 0.01, "num_attention_heads": 1}),
    ("masked", "roberta", TINY | CAUSAL | {"num_hidden_layers": 3, "hidden_act": "gelu_new"}),
    ("causal", "roberta", TINY | CAUSAL),
    ("causal", "roberta", TINY | CAUSAL | UNTIED | {"hidden_act": "silu"}),
    ("masked", "xlm-roberta", TINY),
    ("masked", "xlm-roberta", TINY | UNTIED | {"hidden_act": "relu"}),
    ("causal", "xlm-roberta", TINY | CAUSAL),
    ("masked", "camembert", TINY),
    ("masked", "camembert", TINY | UNTIED | {"hidden_act": "relu"}),
    ("causal", "camembert", TINY | CAUSAL),
    ("masked", "roberta-prelayernorm", TINY),
    ("masked", "roberta-prelayernorm", TINY | UNTIED | {"hidden_act": "relu", "layer_norm_eps": 0.01, "pad_token_id": 0}),
    ("masked", "roberta-prelayernorm", TINY | {"type_vocab_size": 2, "num_hidden_layers": 3, "num_attention_heads": 1}),
    ("causal", "roberta-prelayernorm", TINY | CAUSAL),
    ("causal", "roberta-prelayernorm", TINY | CAUSAL | UNTIED | {"hidden_act": "gelu_new"}),
]

CLASSES: dict[tuple[str, str], type] = {
    ("masked", "roberta"): roberta.RobertaForMaskedLM,
    ("causal", "roberta"): roberta.RobertaForCausalLM,
    ("masked", "xlm-roberta"): roberta.XLMRobertaForMaskedLM,
    ("causal", "xlm-roberta"): roberta.XLMRobertaForCausalLM,
    ("masked", "camembert"): roberta.CamembertForMaskedLM,
    ("causal", "camembert"): roberta.CamembertForCausalLM,
    ("masked", "roberta-prelayernorm"): roberta.RobertaPreLayerNormForMaskedLM,
    ("causal", "roberta-prelayernorm"): roberta.RobertaPreLayerNormForCausalLM,
}
