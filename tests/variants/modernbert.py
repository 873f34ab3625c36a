# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of ModernBERT, for every field that changes what is computed."""

from flaxlm.models import modernbert

TINY = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "local_attention": 6,
    "global_rope_theta": 500.0,
    "local_rope_theta": 20.0,
}
BIASES = dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True)
FULL, LOCAL = "full_attention", "sliding_attention"

VARIANTS: list[tuple[str, str, dict]] = [
    ("masked", "modernbert", TINY),
    ("masked", "modernbert", TINY | BIASES | {"tie_word_embeddings": False, "hidden_activation": "relu"}),
    ("masked", "modernbert", TINY | {"decoder_bias": False, "norm_eps": 0.01, "classifier_activation": "silu"}),
    ("masked", "modernbert", TINY | {"decoder_bias": False, "tie_word_embeddings": False, "global_attn_every_n_layers": 2}),
    ("masked", "modernbert", TINY | {"local_attention": 5, "num_hidden_layers": 3, "global_attn_every_n_layers": 1}),
    ("masked", "modernbert", TINY | {"local_attention": 64, "num_hidden_layers": 2, "num_attention_heads": 1}),
    ("masked", "modernbert", TINY | {"layer_types": [LOCAL, LOCAL, FULL, LOCAL], "local_attention": 7}),
    ("masked", "modernbert", TINY | {"layer_types": [LOCAL] * 4}),
    (
        "masked",
        "modernbert",
        TINY
        | {
            "rope_parameters": {
                FULL: {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
                LOCAL: {
                    "rope_type": "llama3",
                    "rope_theta": 20.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 12,
                },
            }
        },
    ),
]

CLASSES: dict[tuple[str, str], type] = {("masked", "modernbert"): modernbert.ModernBertForMaskedLM}
