# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of DistilBERT, for every field that changes what is computed."""

from flaxlm.models import distilbert

TINY = {"vocab_size": 48, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 24}

VARIANTS: list[tuple[str, str, dict]] = [
    ("masked", "distilbert", TINY),
    ("masked", "distilbert", TINY | {"tie_word_embeddings": False, "activation": "relu"}),
    ("masked", "distilbert", TINY | {"sinusoidal_pos_embds": True, "n_layers": 3}),
    ("masked", "distilbert", TINY | {"activation": "gelu_new", "n_heads": 1, "n_layers": 1}),
]

CLASSES: dict[tuple[str, str], type] = {("masked", "distilbert"): distilbert.DistilBertForMaskedLM}
