# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of BLOOM, for every field that changes what is computed."""

from flaxlm.models import bloom

TINY = {"vocab_size": 48, "hidden_size": 16, "n_layer": 2, "n_head": 4}

VARIANTS: list[tuple[str, str, dict]] = [
    ("causal", "bloom", TINY),
    ("causal", "bloom", TINY | {"tie_word_embeddings": False}),
    ("causal", "bloom", TINY | {"apply_residual_connection_post_layernorm": True}),
    ("causal", "bloom", TINY | {"hidden_size": 24, "n_head": 6, "n_layer": 3, "layer_norm_epsilon": 0.01}),
    ("causal", "bloom", TINY | {"n_head": 1}),
    ("causal", "bloom", TINY | {"hidden_dropout": 0.1, "attention_dropout": 0.1, "pretraining_tp": 2}),
]

CLASSES: dict[tuple[str, str], type] = {("causal", "bloom"): bloom.BloomForCausalLM}
