# SPDX-License-Identifier: Apache-2.0
"""Tiny Llamas and their relatives."""

from typing import Any

from flaxlm.models import llama

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.1,
}
SIZES_GEMMA = SIZES | {"head_dim": 6}
BIASES, TIED, UNTIED = {"attention_bias": True}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Of the two turns of heads of four, the longer wave is slowed down; in heads of eight one wave lies between.
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 100.0}
WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
TYPES = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("causal", "llama", SIZES),
    ("causal", "llama", SIZES | TIED | BIASES | {"mlp_bias": True, "num_key_value_heads": 4}),
    ("causal", "llama", SIZES | {"head_dim": 6, "num_key_value_heads": 1, "hidden_act": "gelu", "rms_norm_eps": 0.01}),
    ("causal", "llama", SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    ("causal", "llama", SIZES | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}}),
    ("causal", "llama", SIZES | {"rope_parameters": LLAMA3, "head_dim": 8}),
    ("causal", "mistral", SIZES | {"sliding_window": None}),
    ("causal", "mistral", SIZES | TIED | {"sliding_window": 4, "head_dim": 6}),
    ("causal", "mistral", SIZES | {"sliding_window": 20, "hidden_act": "gelu_new"}),
    ("causal", "qwen2", SIZES),
    ("causal", "qwen2", SIZES | TIED | WINDOWS),
    ("causal", "qwen2", SIZES | WINDOWS | TYPES | {"hidden_act": "relu"}),
    ("causal", "qwen3", SIZES | {"head_dim": 4}),
    ("causal", "qwen3", SIZES | TIED | BIASES | WINDOWS | {"head_dim": 6}),
    ("causal", "gemma", SIZES_GEMMA),
    ("causal", "gemma", SIZES_GEMMA | UNTIED | BIASES | {"hidden_act": "silu"}),
    ("causal", "gemma2", SIZES_GEMMA | {"sliding_window": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    (
        "causal",
        "gemma2",
        SIZES_GEMMA
        | UNTIED
        | BIASES
        | TYPES
        | {"sliding_window": 5, "query_pre_attn_scalar": 7, "hidden_activation": "gelu"}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
]

CLASSES: dict[tuple[str, str], type] = {
    ("causal", "gemma"): llama.GemmaForCausalLM,
    ("causal", "gemma2"): llama.Gemma2ForCausalLM,
    ("causal", "llama"): llama.LlamaForCausalLM,
    ("causal", "mistral"): llama.MistralForCausalLM,
    ("causal", "qwen2"): llama.Qwen2ForCausalLM,
    ("causal", "qwen3"): llama.Qwen3ForCausalLM,
}
