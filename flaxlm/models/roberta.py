# SPDX-License-Identifier: Apache-2.0
"""RoBERTa (Liu et al. 2019, arXiv:1907.11692), which XLM-RoBERTa and CamemBERT are too, and one with its norms elsewhere.

RoBERTa is BERT, whose positions are counted from the id of padding. RoBERTa-PreLayerNorm (Wettig et al. 2023, arXiv:2202.08005)
has its norms before each half of a layer, and one behind the last layer.
"""

import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from transformers import RobertaConfig

from flaxlm import attention, layers, positions
from flaxlm.models import bert


class Roberta(nn.Module):
    """Token ids to hidden states [B, T, H]."""

    config: RobertaConfig
    compute: layers.Compute
    is_causal: bool

    def setup(self):
        self.embeddings = bert.BertEmbeddings(self.config, self.compute)
        self.encoder = bert.BertEncoder(self.config, self.compute)

    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array, token_type_ids_BT: jax.Array | None) -> jax.Array:
        if token_type_ids_BT is None:
            token_type_ids_BT = jnp.zeros_like(input_ids_BT)
        position_ids_BT = positions.after_padding_id(segment_ids_BT, self.config.pad_token_id)
        hidden_BTH = self.embeddings(input_ids_BT, position_ids_BT, token_type_ids_BT)
        return self.encoder(hidden_BTH, attention.Mask(segment_ids_BT, segment_ids_BT, self.is_causal))


# ---- Norms first -------------------------------------------------------------------------------------------------------


class PreLayerNormOutput(nn.Module):
    """Back to the hidden size, dropout, and the sum with what went in: the end of both halves of a layer."""

    config: RobertaConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTF: jax.Array, residual_BTH: jax.Array) -> jax.Array:
        init = nn.initializers.normal(self.config.initializer_range)
        dense = layers.Dense(self.config.hidden_size, self.compute.dtype, kernel_init=init, name="dense")
        return layers.Dropout(self.config.hidden_dropout_prob)(dense(hidden_BTF)) + residual_BTH


class PreLayerNormAttention(nn.Module):
    config: RobertaConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask) -> jax.Array:
        norm = nn.LayerNorm(self.config.layer_norm_eps, dtype=self.compute.dtype, name="LayerNorm")
        attended_BTH = bert.BertSelfAttention(self.config, self.compute, name="self")(norm(hidden_BTH), mask)
        return PreLayerNormOutput(self.config, self.compute, name="output")(attended_BTH, hidden_BTH)


class PreLayerNormIntermediate(nn.Module):
    config: RobertaConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array) -> jax.Array:
        config, dtype = self.config, self.compute.dtype
        init = nn.initializers.normal(config.initializer_range)
        hidden_BTH = nn.LayerNorm(config.layer_norm_eps, dtype=dtype, name="LayerNorm")(hidden_BTH)
        hidden_BTF = layers.Dense(config.intermediate_size, dtype, kernel_init=init, name="dense")(hidden_BTH)
        return layers.ACTIVATIONS[config.hidden_act](hidden_BTF)


class PreLayerNormLayer(nn.Module):
    config: RobertaConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask) -> jax.Array:
        hidden_BTH = PreLayerNormAttention(self.config, self.compute, name="attention")(hidden_BTH, mask)
        hidden_BTF = PreLayerNormIntermediate(self.config, self.compute, name="intermediate")(hidden_BTH)
        return PreLayerNormOutput(self.config, self.compute, name="output")(hidden_BTF, hidden_BTH)


class PreLayerNormEncoder(nn.Module):
    config: RobertaConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask) -> jax.Array:
        layer = functools.partial(PreLayerNormLayer, self.config, self.compute)
        return layers.Layers(layer, self.config.num_hidden_layers, self.compute, name="layer")(hidden_BTH, mask)


class RobertaPreLayerNorm(Roberta):
    """Token ids to hidden states [B, T, H], which a last norm has seen."""

    def setup(self):
        self.embeddings = bert.BertEmbeddings(self.config, self.compute)
        self.encoder = PreLayerNormEncoder(self.config, self.compute)
        self.LayerNorm = nn.LayerNorm(self.config.layer_norm_eps, dtype=self.compute.dtype)

    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array, token_type_ids_BT: jax.Array | None) -> jax.Array:
        return self.LayerNorm(super().__call__(input_ids_BT, segment_ids_BT, token_type_ids_BT))


# ---- Heads -------------------------------------------------------------------------------------------------------------


class RobertaHead(nn.Module):
    """Scores of the vocabulary [..., V], by the table of embeddings or, where there is none to share, by a layer of its own."""

    config: RobertaConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_XH: jax.Array, table_VH: jax.Array | None) -> jax.Array:
        config, dtype = self.config, self.compute.dtype
        init = nn.initializers.normal(config.initializer_range)
        hidden_XH = layers.Dense(config.hidden_size, dtype, kernel_init=init, name="dense")(hidden_XH)
        hidden_XH = nn.LayerNorm(config.layer_norm_eps, dtype=dtype, name="layer_norm")(layers.ACTIVATIONS["gelu"](hidden_XH))
        bias_V = self.param("bias", nn.initializers.zeros, (config.vocab_size,))
        if table_VH is not None:
            return layers.vocabulary_scores(self, hidden_XH, table_VH, bias_V)
        decoder = layers.Dense(config.vocab_size, dtype, use_bias=False, kernel_init=init, name="decoder")
        return layers.add_bias(decoder(hidden_XH), bias_V)


class RobertaForMaskedLM(nn.Module):
    """Hidden states, and scores of the vocabulary from them."""

    config: RobertaConfig
    compute: layers.Compute = layers.Compute()

    is_causal: ClassVar[bool] = False
    encoder_class: ClassVar[type[nn.Module]] = Roberta
    encoder_name: ClassVar[str] = "roberta"

    def setup(self):
        is_causal = self.is_causal or self.config.is_decoder
        setattr(self, self.encoder_name, self.encoder_class(self.config, self.compute, is_causal))
        self.lm_head = RobertaHead(self.config, self.compute)

    def __call__(
        self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array, token_type_ids_BT: jax.Array | None = None
    ) -> jax.Array:
        """[B, T, H]; tokens see those of the same segment, and 0 is padding."""
        hidden_BTH = getattr(self, self.encoder_name)(input_ids_BT, segment_ids_BT, token_type_ids_BT)
        if self.is_initializing():
            self.scores(hidden_BTH)
        return hidden_BTH

    def scores(self, hidden_XH: jax.Array) -> jax.Array:
        """[..., V]"""
        return self.lm_head(hidden_XH, layers.weight_at(self, self.words) if self.config.tie_word_embeddings else None)

    @property
    def words(self) -> str:
        """Where the table of embeddings is."""
        return f"{self.encoder_name}/embeddings/word_embeddings/embedding"

    @property
    def head_weights(self) -> tuple[str, ...]:
        """Where the weights are that `scores` reads."""
        return ("lm_head", self.words) if self.config.tie_word_embeddings else ("lm_head",)


class RobertaForCausalLM(RobertaForMaskedLM):
    """The same, where a token sees only those before it."""

    is_causal = True


class XLMRobertaForMaskedLM(RobertaForMaskedLM):
    """RoBERTa of many languages (Conneau et al. 2020, arXiv:1911.02116)."""


class XLMRobertaForCausalLM(RobertaForCausalLM):
    """The same, where a token sees only those before it."""


class CamembertForMaskedLM(RobertaForMaskedLM):
    """RoBERTa of French (Martin et al. 2020, arXiv:1911.03894)."""


class CamembertForCausalLM(RobertaForCausalLM):
    """The same, where a token sees only those before it."""


class RobertaPreLayerNormForMaskedLM(RobertaForMaskedLM):
    """RoBERTa with norms first."""

    encoder_class = RobertaPreLayerNorm
    encoder_name = "roberta_prelayernorm"


class RobertaPreLayerNormForCausalLM(RobertaPreLayerNormForMaskedLM):
    """The same, where a token sees only those before it."""

    is_causal = True
