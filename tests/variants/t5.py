# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of T5, mT5 and umT5, for every field that changes what is computed."""

from flaxlm.models import t5

TINY = {
    "vocab_size": 48, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
}  # fmt: skip
UNTIED = {"tie_word_embeddings": False}

VARIANTS: list[tuple[str, str, dict]] = [
    ("seq2seq", "t5", TINY),
    ("seq2seq", "t5", TINY | UNTIED | {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 3}),  # T5 1.1
    ("seq2seq", "t5", TINY | {"feed_forward_proj": "gated-silu", "num_layers": 3, "num_decoder_layers": 1}),
    ("seq2seq", "t5", TINY | {"feed_forward_proj": "gelu", "num_heads": 2, "d_kv": 3, "layer_norm_epsilon": 0.01}),
    ("seq2seq", "t5", TINY | UNTIED | {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}),
    ("seq2seq", "mt5", TINY),
    ("seq2seq", "mt5", TINY | {"feed_forward_proj": "relu", "num_heads": 3, "relative_attention_num_buckets": 4}),
    ("seq2seq", "umt5", TINY),
    ("seq2seq", "umt5", TINY | UNTIED | {"num_layers": 3, "num_decoder_layers": 2, "num_heads": 3}),
    ("seq2seq", "umt5", TINY | {"feed_forward_proj": "relu", "relative_attention_max_distance": 6}),
]

CLASSES: dict[tuple[str, str], type] = {
    ("seq2seq", "t5"): t5.T5ForConditionalGeneration,
    ("seq2seq", "mt5"): t5.MT5ForConditionalGeneration,
    ("seq2seq", "umt5"): t5.UMT5ForConditionalGeneration,
}
