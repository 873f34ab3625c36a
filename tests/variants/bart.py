# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of BART and its kind, for every field that changes what is computed."""

from flaxlm.models import bart

TINY = {
    "vocab_size": 48, "max_position_embeddings": 24, "d_model": 16, "encoder_ffn_dim": 24, "encoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_ffn_dim": 24, "decoder_layers": 2, "decoder_attention_heads": 4,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "forced_eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
UNTIED, SCALED, RELU = {"tie_word_embeddings": False}, {"scale_embedding": True}, {"activation_function": "relu"}
SKEWED = {"encoder_layers": 1, "decoder_layers": 3, "decoder_ffn_dim": 40, "decoder_attention_heads": 2}

SEQ2SEQ = {
    "bart": bart.BartForConditionalGeneration,
    "mbart": bart.MBartForConditionalGeneration,
    "pegasus": bart.PegasusForConditionalGeneration,
    "marian": bart.MarianMTModel,
    "blenderbot": bart.BlenderbotForConditionalGeneration,
    "blenderbot-small": bart.BlenderbotSmallForConditionalGeneration,
}

VARIANTS: list[tuple[str, str, dict]] = [
    *[("seq2seq", model_type, TINY | fields) for model_type in SEQ2SEQ for fields in ({}, UNTIED | SKEWED, SCALED | RELU)],
    ("seq2seq", "bart", TINY | {"activation_function": "gelu_new"}),
    ("seq2seq", "marian", TINY | {"activation_function": "swish", "d_model": 12}),
    *[("masked", model_type, TINY | fields) for model_type in ("bart", "mbart") for fields in ({}, UNTIED | SCALED)],
    ("masked", "bart", TINY | {"decoder_start_token_id": 7}),
    *[("causal", "bart", TINY | fields) for fields in ({}, UNTIED | SKEWED, SCALED | RELU)],
]

CLASSES: dict[tuple[str, str], type] = {
    **{("seq2seq", model_type): model_class for model_type, model_class in SEQ2SEQ.items()},
    ("masked", "bart"): bart.BartForMaskedLM,
    ("masked", "mbart"): bart.MBartForMaskedLM,
    ("causal", "bart"): bart.BartForCausalLM,
}
