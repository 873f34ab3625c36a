# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of BERT and BigBird, for every field that changes what is computed."""

from flaxlm.models import bert

TINY = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}
FULL = TINY | {"attention_type": "original_full", "sep_token_id": 3}
UNTIED, CAUSAL = {"tie_word_embeddings": False}, {"is_decoder": True}

VARIANTS: list[tuple[str, str, dict]] = [
    ("masked", "bert", TINY),
    ("masked", "bert", TINY | UNTIED | {"hidden_act": "relu", "layer_norm_eps": 0.01}),
    ("masked", "bert", TINY | CAUSAL | {"num_hidden_layers": 3, "hidden_act": "quick_gelu", "type_vocab_size": 1}),
    ("masked", "bert", TINY | {"num_hidden_layers": 1, "num_attention_heads": 1, "chunk_size_feed_forward": 7}),
    ("causal", "bert", TINY | CAUSAL),
    ("causal", "bert", TINY | CAUSAL | UNTIED | {"hidden_act": "tanh"}),
    ("pretraining", "bert", TINY),
    ("pretraining", "bert", TINY | UNTIED | {"hidden_act": "silu", "hidden_size": 24, "num_attention_heads": 2}),
    ("masked", "big_bird", FULL),
    ("masked", "big_bird", FULL | UNTIED | {"rescale_embeddings": True, "hidden_act": "relu"}),
    ("masked", "big_bird", FULL | {"use_bias": False, "layer_norm_eps": 0.01}),
    ("masked", "big_bird", TINY | {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}),  # T = 14
    ("causal", "big_bird", FULL | CAUSAL),
    ("causal", "big_bird", FULL | CAUSAL | UNTIED | {"use_bias": False, "rescale_embeddings": True}),
    ("pretraining", "big_bird", FULL),
    ("pretraining", "big_bird", FULL | UNTIED | {"use_bias": False}),
]

CLASSES: dict[tuple[str, str], type] = {
    ("masked", "bert"): bert.BertForMaskedLM,
    ("causal", "bert"): bert.BertLMHeadModel,
    ("pretraining", "bert"): bert.BertForPreTraining,
    ("masked", "big_bird"): bert.BigBirdForMaskedLM,
    ("causal", "big_bird"): bert.BigBirdForCausalLM,
    ("pretraining", "big_bird"): bert.BigBirdForPreTraining,
}
