# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of GPT-J, for every field that changes what is computed."""

from flaxlm.models import gptj

TINY = {
    "vocab_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "n_positions": 24,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "rotary_dim": 4,
}

DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}

VARIANTS: list[tuple[str, str, dict]] = [
    ("causal", "gptj", TINY),
    ("causal", "gptj", TINY | {"tie_word_embeddings": True}),
    ("causal", "gptj", TINY | {"rotary_dim": 8, "n_inner": 24, "activation_function": "relu"}),
    ("causal", "gptj", TINY | {"rotary_dim": 2, "n_layer": 3, "layer_norm_epsilon": 0.01} | DROPOUT),
    ("causal", "gptj", TINY | {"rotary_dim": 6, "n_head": 2, "activation_function": "gelu"}),
]

CLASSES: dict[tuple[str, str], type] = {("causal", "gptj"): gptj.GPTJForCausalLM}
