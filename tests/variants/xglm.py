# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of XGLM, for every field that changes what is computed."""

from flaxlm.models import xglm

TINY = {"vocab_size": 48, "max_position_embeddings": 24, "d_model": 16, "num_layers": 2, "attention_heads": 4, "ffn_dim": 24}

VARIANTS: list[tuple[str, str, dict]] = [
    ("causal", "xglm", TINY),
    ("causal", "xglm", TINY | {"tie_word_embeddings": False}),
    ("causal", "xglm", TINY | {"scale_embedding": False, "activation_function": "relu"}),
    ("causal", "xglm", TINY | {"pad_token_id": 4}),
    ("causal", "xglm", TINY | {"pad_token_id": 0, "num_layers": 3}),
    ("causal", "xglm", TINY | {"d_model": 18, "attention_heads": 2, "activation_function": "gelu_new"}),
    ("causal", "xglm", TINY | {"d_model": 9, "attention_heads": 3, "max_position_embeddings": 8}),
    ("causal", "xglm", TINY | {"layerdrop": 0.5, "activation_dropout": 0.1}),
]

CLASSES: dict[tuple[str, str], type] = {("causal", "xglm"): xglm.XGLMForCausalLM}
