# SPDX-License-Identifier: Apache-2.0
"""T5 (Raffel et al. 2020, arXiv:1910.10683) and T5 1.1, mT5 (Xue et al. 2021, arXiv:2010.11934), umT5 (Chung et al. 2023).

An encoder and a decoder without positions: scores of attention, which are not scaled, get a bias by the distance of two
tokens instead, the same one in all layers of a stack; umT5 (arXiv:2304.09151) has one for each layer. Norms are RMS norms
before each part of a layer, and nothing has a bias of its own.

S tokens of the encoder, T of the decoder or of either; B, H, V, M and E as elsewhere, F numbers within feed-forward layers.
"""

import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from transformers import T5Config

from flaxlm import attention, layers, positions

FIRST_BIAS = "block/0/layer/0/SelfAttention/relative_attention_bias"


def normal(config: T5Config, fan_in: int) -> nn.initializers.Initializer:
    """As large as T5's authors have it, by the number of terms in a sum."""
    return nn.initializers.normal(config.initializer_factor * fan_in**-0.5)


class T5PositionBias(nn.Module):
    """What is added to the scores of each head, by how far the key is from the query: float32 [M, T, T]."""

    config: T5Config
    is_causal: bool
    embedding_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, num_tokens: int) -> jax.Array:
        num_buckets, max_distance = self.config.relative_attention_num_buckets, self.config.relative_attention_max_distance
        buckets_TT = positions.relative_buckets(num_tokens, num_tokens, self.is_causal, num_buckets, max_distance)
        table_NM = self.param("embedding", self.embedding_init, (num_buckets, self.config.num_heads))
        return jnp.moveaxis(table_NM[buckets_TT], -1, 0)


class T5Attention(nn.Module):
    """What queries make of what keys and values come from, which are the same tokens or those of the encoder: [B, T, H].

    With `has_bias` it has weights of a bias by distance. They are used where none is passed; T5's stack passes that of the
    first layer to all.
    """

    config: T5Config
    compute: layers.Compute
    has_bias: bool = False

    @nn.compact
    def __call__(
        self, hidden_BTH: jax.Array, memory_BSH: jax.Array, mask: attention.Mask, bias_MTS: jax.Array | None = None
    ) -> jax.Array:
        config, (B, T, H) = self.config, hidden_BTH.shape
        S, M, E = memory_BSH.shape[1], config.num_heads, config.d_kv
        fan_in = H if config.model_type == "umt5" else M * E  # the others' as transformers' Flax classes had it
        init = normal(config, fan_in)
        dense = functools.partial(layers.Dense, dtype=self.compute.dtype, use_bias=False)
        query_BTME = dense(M * E, kernel_init=normal(config, fan_in * E), name="q")(hidden_BTH).reshape(B, T, M, E)
        key_BSME = dense(M * E, kernel_init=init, name="k")(memory_BSH).reshape(B, S, M, E)
        value_BSME = dense(M * E, kernel_init=init, name="v")(memory_BSH).reshape(B, S, M, E)
        if self.has_bias and bias_MTS is None:
            bias_MTS = T5PositionBias(config, mask.is_causal, init, name="relative_attention_bias")(T)
        attend = attention.Attention(self.compute.attention, config.dropout_rate, scale=1.0)
        attended_BTF = attend(query_BTME, key_BSME, value_BSME, mask, bias_MTS).reshape(B, T, M * E)
        return dense(H, kernel_init=normal(config, M * E), name="o")(attended_BTF)


class T5FeedForward(nn.Module):
    """Wider, through an activation, which another projection may multiply (Shazeer 2020, arXiv:2002.05202), and back."""

    config: T5Config
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array) -> jax.Array:
        config = self.config
        dense = functools.partial(layers.Dense, dtype=self.compute.dtype, use_bias=False)
        widen = functools.partial(dense, config.d_ff, kernel_init=normal(config, config.d_model))
        activation = layers.ACTIVATIONS[config.dense_act_fn]
        if config.is_gated_act:
            hidden_BTF = activation(widen(name="wi_0")(hidden_BTH)) * widen(name="wi_1")(hidden_BTH)
        else:
            hidden_BTF = activation(widen(name="wi")(hidden_BTH))
        hidden_BTF = layers.Dropout(config.dropout_rate)(hidden_BTF)
        return dense(config.d_model, kernel_init=normal(config, config.d_ff), name="wo")(hidden_BTF)


# ---- Layers: "block/3/layer/0/SelfAttention" is the self-attention of the fourth ------------------------------------------


class T5SelfAttentionPart(nn.Module):
    config: T5Config
    compute: layers.Compute
    has_bias: bool

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask, bias_MTT: jax.Array | None) -> jax.Array:
        normed_BTH = layers.RMSNorm(self.config.layer_norm_epsilon, self.compute.dtype, name="layer_norm")(hidden_BTH)
        attend = T5Attention(self.config, self.compute, self.has_bias, name="SelfAttention")
        return hidden_BTH + layers.Dropout(self.config.dropout_rate)(attend(normed_BTH, normed_BTH, mask, bias_MTT))


class T5CrossAttentionPart(nn.Module):
    config: T5Config
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, memory_BSH: jax.Array, mask: attention.Mask) -> jax.Array:
        normed_BTH = layers.RMSNorm(self.config.layer_norm_epsilon, self.compute.dtype, name="layer_norm")(hidden_BTH)
        attend = T5Attention(self.config, self.compute, name="EncDecAttention")
        return hidden_BTH + layers.Dropout(self.config.dropout_rate)(attend(normed_BTH, memory_BSH, mask))


class T5FeedForwardPart(nn.Module):
    config: T5Config
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array) -> jax.Array:
        normed_BTH = layers.RMSNorm(self.config.layer_norm_epsilon, self.compute.dtype, name="layer_norm")(hidden_BTH)
        feed_forward = T5FeedForward(self.config, self.compute, name="DenseReluDense")
        return hidden_BTH + layers.Dropout(self.config.dropout_rate)(feed_forward(normed_BTH))


class T5Parts(nn.Module):
    """Self-attention, in the decoder attention to the encoder's hidden states (its `memory`), and a feed-forward layer."""

    config: T5Config
    compute: layers.Compute
    has_bias: bool

    @nn.compact
    def __call__(
        self,
        hidden_BTH: jax.Array,
        mask: attention.Mask,
        bias_MTT: jax.Array | None,
        memory_BSH: jax.Array | None,
        memory_mask: attention.Mask | None,
    ) -> jax.Array:
        config, compute = self.config, self.compute
        hidden_BTH = T5SelfAttentionPart(config, compute, self.has_bias, name="0")(hidden_BTH, mask, bias_MTT)
        if memory_BSH is None:
            return T5FeedForwardPart(config, compute, name="1")(hidden_BTH)
        hidden_BTH = T5CrossAttentionPart(config, compute, name="1")(hidden_BTH, memory_BSH, memory_mask)
        return T5FeedForwardPart(config, compute, name="2")(hidden_BTH)


class T5Block(nn.Module):
    config: T5Config
    compute: layers.Compute
    has_bias: bool

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, *inputs: jax.Array | attention.Mask | None) -> jax.Array:
        return T5Parts(self.config, self.compute, self.has_bias, name="layer")(hidden_BTH, *inputs)


class T5Stack(nn.Module):
    """Encoder or decoder: embedded tokens to hidden states [B, T, H]."""

    config: T5Config
    compute: layers.Compute
    num_layers: int
    is_causal: bool
    bias_in_every_layer: bool

    @nn.compact
    def __call__(
        self,
        words_BTH: jax.Array,
        segment_ids_BT: jax.Array,
        memory_BSH: jax.Array | None = None,
        memory_segment_ids_BS: jax.Array | None = None,
    ) -> jax.Array:
        config, compute = self.config, self.compute
        mask = attention.Mask(segment_ids_BT, segment_ids_BT, self.is_causal)
        memory_mask = None if memory_BSH is None else attention.Mask(segment_ids_BT, memory_segment_ids_BS)
        bias_MTT = None
        if not self.bias_in_every_layer and not self.is_initializing():
            bias = T5PositionBias(config, self.is_causal, nn.initializers.zeros, parent=None)
            bias_MTT = bias.apply({"params": layers.weight_at(self, FIRST_BIAS)}, words_BTH.shape[1])
        first = functools.partial(T5Block, config, compute, has_bias=True)
        rest = functools.partial(T5Block, config, compute, has_bias=self.bias_in_every_layer)
        blocks = layers.Layers(rest, self.num_layers, compute, None if self.bias_in_every_layer else first, name="block")
        dropout = layers.Dropout(config.dropout_rate)
        hidden_BTH = blocks(dropout(words_BTH), mask, bias_MTT, memory_BSH, memory_mask)
        return dropout(layers.RMSNorm(config.layer_norm_epsilon, compute.dtype, name="final_layer_norm")(hidden_BTH))


# ---- Models ------------------------------------------------------------------------------------------------------------


class T5ForConditionalGeneration(nn.Module):
    """Hidden states of the decoder, and scores of the vocabulary from them."""

    config: T5Config
    compute: layers.Compute = layers.Compute()

    bias_in_every_layer: ClassVar[bool] = False

    def setup(self):
        config, compute = self.config, self.compute
        init = nn.initializers.normal(config.initializer_factor)
        self.shared = nn.Embed(config.vocab_size, config.d_model, embedding_init=init, dtype=compute.dtype)
        self.encoder = T5Stack(config, compute, config.num_layers, False, self.bias_in_every_layer)
        self.decoder = T5Stack(config, compute, config.num_decoder_layers, True, self.bias_in_every_layer)
        if self.has_own_head:
            self.lm_head = layers.Dense(config.vocab_size, compute.dtype, use_bias=False, kernel_init=init)

    @property
    def has_own_head(self) -> bool:
        """T5 1.1 has; transformers 5 says that all are tied, but keeps under another name what config.json said."""
        return not getattr(self.config, "scale_decoder_outputs", self.config.tie_word_embeddings)

    def __call__(
        self,
        input_ids_BS: jax.Array,
        segment_ids_BS: jax.Array,
        decoder_input_ids_BT: jax.Array,
        decoder_segment_ids_BT: jax.Array,
    ) -> jax.Array:
        """[B, T, H]; tokens see those of the same segment, of the encoder's and of the decoder's, and 0 is padding."""
        memory_BSH = self.encode(input_ids_BS, segment_ids_BS)
        hidden_BTH = self.decode(decoder_input_ids_BT, decoder_segment_ids_BT, memory_BSH, segment_ids_BS)
        if self.is_initializing():
            self.scores(hidden_BTH)
        return hidden_BTH

    def encode(self, input_ids_BS: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
        """What the decoder looks at: [B, S, H]."""
        return self.encoder(self.shared(input_ids_BS), segment_ids_BS)

    def decode(
        self,
        decoder_input_ids_BT: jax.Array,
        decoder_segment_ids_BT: jax.Array,
        memory_BSH: jax.Array,
        segment_ids_BS: jax.Array,
    ) -> jax.Array:
        """[B, T, H]"""
        return self.decoder(self.shared(decoder_input_ids_BT), decoder_segment_ids_BT, memory_BSH, segment_ids_BS)

    def scores(self, hidden_XH: jax.Array) -> jax.Array:
        """[..., V]"""
        if self.has_own_head:
            return self.lm_head(hidden_XH)
        return layers.vocabulary_scores(self, hidden_XH * self.config.d_model**-0.5, self.shared.embedding)

    @property
    def head_weights(self) -> tuple[str, ...]:
        """Where the weights are that `scores` reads."""
        return ("lm_head",) if self.has_own_head else ("shared/embedding",)


class MT5ForConditionalGeneration(T5ForConditionalGeneration):
    """T5 1.1 of many languages: always with a head of its own, whatever the configuration says."""

    has_own_head = True


class UMT5ForConditionalGeneration(T5ForConditionalGeneration):
    """The same with a position bias in every layer."""

    bias_in_every_layer = True
