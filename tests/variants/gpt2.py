# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of GPT-2, for every field that changes what is computed."""

from flaxlm.models import gpt2

TINY = {"vocab_size": 48, "n_positions": 24, "n_embd": 16, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}

VARIANTS: list[tuple[str, str, dict]] = [
    ("causal", "gpt2", TINY),
    ("causal", "gpt2", TINY | {"tie_word_embeddings": False}),
    ("causal", "gpt2", TINY | {"n_inner": 24, "activation_function": "relu", "layer_norm_epsilon": 0.01}),
    ("causal", "gpt2", TINY | {"scale_attn_weights": False}),
    ("causal", "gpt2", TINY | {"scale_attn_by_inverse_layer_idx": True}),
    (
        "causal",
        "gpt2",
        TINY | {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ),
    ("causal", "gpt2", TINY | {"activation_function": "gelu", "n_layer": 1, "n_head": 1}),
    ("causal", "gpt2", TINY | {"activation_function": "silu"}),
]

CLASSES: dict[tuple[str, str], type] = {("causal", "gpt2"): gpt2.GPT2LMHeadModel}
