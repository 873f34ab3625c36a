# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of OPT, for every field that changes what is computed."""

from flaxlm.models import opt

TINY = {
    "vocab_size": 48,
    "max_position_embeddings": 24,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 24,
}

VARIANTS: list[tuple[str, str, dict]] = [
    ("causal", "opt", TINY),
    ("causal", "opt", TINY | {"tie_word_embeddings": False}),
    ("causal", "opt", TINY | {"word_embed_proj_dim": 8, "do_layer_norm_before": False}),
    ("causal", "opt", TINY | {"word_embed_proj_dim": 24, "tie_word_embeddings": False, "activation_function": "gelu"}),
    ("causal", "opt", TINY | {"_remove_final_layer_norm": True}),
    ("causal", "opt", TINY | {"do_layer_norm_before": False, "_remove_final_layer_norm": True, "num_hidden_layers": 3}),
    ("causal", "opt", TINY | {"enable_bias": False}),
    ("causal", "opt", TINY | {"layer_norm_elementwise_affine": False}),
    (
        "causal",
        "opt",
        TINY
        | {
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "do_layer_norm_before": False,
            "activation_function": "tanh",
        },
    ),
    ("causal", "opt", TINY | {"layerdrop": 0.5, "attention_dropout": 0.2, "pad_token_id": 0}),
]

CLASSES: dict[tuple[str, str], type] = {("causal", "opt"): opt.OPTForCausalLM}
