# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of GPT-Neo, for every field that changes what is computed."""

from flaxlm.models import gpt_neo

TINY = {
    "vocab_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 24,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "window_size": 4,
    "attention_types": [[["global", "local"], 1]],
}

DROPOUT = {"resid_dropout": 0.1, "embed_dropout": 0.1, "attention_dropout": 0.1}

VARIANTS: list[tuple[str, str, dict]] = [
    ("causal", "gpt_neo", TINY),
    ("causal", "gpt_neo", TINY | {"tie_word_embeddings": False}),
    (
        "causal",
        "gpt_neo",
        TINY
        | {"num_layers": 3, "attention_types": [[["local"], 2], [["global"], 1]], "window_size": 1, "intermediate_size": 24},
    ),
    ("causal", "gpt_neo", TINY | {"attention_types": [[["global"], 2]]}),
    (
        "causal",
        "gpt_neo",
        TINY
        | {"attention_types": [[["local"], 2]], "window_size": 6, "activation_function": "relu", "layer_norm_epsilon": 0.01},
    ),
    ("causal", "gpt_neo", TINY | {"activation_function": "gelu", "num_heads": 2, "window_size": 256} | DROPOUT),
]

CLASSES: dict[tuple[str, str], type] = {("causal", "gpt_neo"): gpt_neo.GPTNeoForCausalLM}
