# SPDX-License-Identifier: Apache-2.0
"""ELECTRA's generator (Clark et al. 2020, arXiv:2003.10555): BERT, whose embeddings may be smaller than its hidden states."""

from typing import ClassVar

import flax.linen as nn
import jax
from transformers import ElectraConfig

from flaxlm import attention, layers, positions
from flaxlm.models import bert

WORDS = "electra/embeddings/word_embeddings/embedding"


class Electra(nn.Module):
    """Token ids to hidden states [B, T, H]."""

    config: ElectraConfig
    compute: layers.Compute
    is_causal: bool

    def setup(self):
        self.embeddings = bert.BertEmbeddings(self.config, self.compute)
        if self.config.embedding_size != self.config.hidden_size:
            init = nn.initializers.lecun_normal()
            self.embeddings_project = layers.Dense(self.config.hidden_size, self.compute.dtype, kernel_init=init)
        self.encoder = bert.BertEncoder(self.config, self.compute)

    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array, token_type_ids_BT: jax.Array | None) -> jax.Array:
        if token_type_ids_BT is None:
            token_type_ids_BT = jax.numpy.zeros_like(input_ids_BT)
        hidden_BTH = self.embeddings(input_ids_BT, positions.within_segments(segment_ids_BT), token_type_ids_BT)
        if self.config.embedding_size != self.config.hidden_size:
            hidden_BTH = self.embeddings_project(hidden_BTH)
        return self.encoder(hidden_BTH, attention.Mask(segment_ids_BT, segment_ids_BT, self.is_causal))


class ElectraPredictions(nn.Module):
    """Back to the size of the embeddings."""

    config: ElectraConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_XH: jax.Array) -> jax.Array:
        config, dtype = self.config, self.compute.dtype
        init = nn.initializers.lecun_normal()
        hidden_XH = layers.Dense(config.embedding_size, dtype, kernel_init=init, name="dense")(hidden_XH)
        return nn.LayerNorm(config.layer_norm_eps, dtype=dtype, name="LayerNorm")(layers.ACTIVATIONS["gelu"](hidden_XH))


class ElectraForMaskedLM(nn.Module):
    """Hidden states, and scores of the vocabulary from them."""

    config: ElectraConfig
    compute: layers.Compute = layers.Compute()

    is_causal: ClassVar[bool] = False

    def setup(self):
        config, dtype = self.config, self.compute.dtype
        self.electra = Electra(config, self.compute, self.is_causal or config.is_decoder)
        self.generator_predictions = ElectraPredictions(config, self.compute)
        init = nn.initializers.lecun_normal()
        self.generator_lm_head = layers.VocabularyHead(config.vocab_size, dtype, kernel_init=init)

    def __call__(
        self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array, token_type_ids_BT: jax.Array | None = None
    ) -> jax.Array:
        """[B, T, H]; tokens see those of the same segment, and 0 is padding."""
        hidden_BTH = self.electra(input_ids_BT, segment_ids_BT, token_type_ids_BT)
        if self.is_initializing():
            self.scores(hidden_BTH)
        return hidden_BTH

    def scores(self, hidden_XH: jax.Array) -> jax.Array:
        """[..., V]"""
        table_VH = layers.weight_at(self, WORDS) if self.config.tie_word_embeddings else None
        return self.generator_lm_head(self.generator_predictions(hidden_XH), table_VH)

    @property
    def head_weights(self) -> tuple[str, ...]:
        """Where the weights are that `scores` reads."""
        own = ("generator_predictions", "generator_lm_head")
        return (*own, WORDS) if self.config.tie_word_embeddings else own


class ElectraForCausalLM(ElectraForMaskedLM):
    """The same, where a token sees only those before it."""

    is_causal = True
