# SPDX-License-Identifier: Apache-2.0
"""RoFormer (Su et al. 2021, arXiv:2104.09864): BERT, where queries and keys are turned by where they stand."""

import functools
from typing import ClassVar

import flax.linen as nn
import jax
from transformers import RoFormerConfig

from flaxlm import attention, layers, positions
from flaxlm.models import bert

WORDS = "roformer/embeddings/word_embeddings/embedding"


class RoFormerEmbeddings(nn.Module):
    """What a token is and in which of two texts, summed: [B, T, X]."""

    config: RoFormerConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, input_ids_BT: jax.Array, token_type_ids_BT: jax.Array) -> jax.Array:
        config, dtype = self.config, self.compute.dtype
        init = nn.initializers.normal(config.initializer_range)
        embed = functools.partial(nn.Embed, features=config.embedding_size, embedding_init=init, dtype=dtype)
        hidden_BTX = embed(config.vocab_size, name="word_embeddings")(input_ids_BT)
        hidden_BTX += embed(config.type_vocab_size, name="token_type_embeddings")(token_type_ids_BT)
        hidden_BTX = nn.LayerNorm(config.layer_norm_eps, dtype=dtype, name="LayerNorm")(hidden_BTX)
        return layers.Dropout(config.hidden_dropout_prob)(hidden_BTX)


class RoFormerSelfAttention(nn.Module):
    """Queries, keys and values of all heads, and what they make of each other: [B, T, H]."""

    config: RoFormerConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask, table: tuple[jax.Array, jax.Array]) -> jax.Array:
        config, (B, T, H) = self.config, hidden_BTH.shape
        M = config.num_attention_heads
        init = nn.initializers.normal(config.initializer_range)
        dense = functools.partial(layers.Dense, H, self.compute.dtype, kernel_init=init)
        query_BTME, key_BTME, value_BTME = (
            dense(name=name)(hidden_BTH).reshape(B, T, M, H // M) for name in ("query", "key", "value")
        )
        query_BTME, key_BTME = (positions.rotate_neighbours(heads, table) for heads in (query_BTME, key_BTME))
        if config.rotary_value:
            value_BTME = positions.rotate_neighbours(value_BTME, table)
        attend = attention.Attention(self.compute.attention, config.attention_probs_dropout_prob)
        return attend(query_BTME, key_BTME, value_BTME, mask).reshape(B, T, H)


class RoFormerAttention(nn.Module):
    config: RoFormerConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask, table: tuple[jax.Array, jax.Array]) -> jax.Array:
        attended_BTH = RoFormerSelfAttention(self.config, self.compute, name="self")(hidden_BTH, mask, table)
        return bert.BertOutput(self.config, self.compute, name="output")(attended_BTH, hidden_BTH)


class RoFormerLayer(nn.Module):
    config: RoFormerConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask, table: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden_BTH = RoFormerAttention(self.config, self.compute, name="attention")(hidden_BTH, mask, table)
        hidden_BTF = bert.BertIntermediate(self.config, self.compute, name="intermediate")(hidden_BTH)
        return bert.BertOutput(self.config, self.compute, name="output")(hidden_BTF, hidden_BTH)


class RoFormerEncoder(nn.Module):
    config: RoFormerConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask, position_ids_BT: jax.Array) -> jax.Array:
        config = self.config
        frequencies = positions.rotary_frequencies(config.hidden_size // config.num_attention_heads, {"rope_theta": 10000.0})
        table = positions.rotary_table(position_ids_BT, frequencies)
        layer = functools.partial(RoFormerLayer, config, self.compute)
        return layers.Layers(layer, config.num_hidden_layers, self.compute, name="layer")(hidden_BTH, mask, table)


class RoFormer(nn.Module):
    """Token ids to hidden states [B, T, H]."""

    config: RoFormerConfig
    compute: layers.Compute
    is_causal: bool

    def setup(self):
        config = self.config
        self.embeddings = RoFormerEmbeddings(config, self.compute)
        if config.embedding_size != config.hidden_size:
            init = nn.initializers.normal(config.initializer_range)
            self.embeddings_project = layers.Dense(config.hidden_size, self.compute.dtype, kernel_init=init)
        self.encoder = RoFormerEncoder(config, self.compute)

    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array, token_type_ids_BT: jax.Array | None) -> jax.Array:
        if token_type_ids_BT is None:
            token_type_ids_BT = jax.numpy.zeros_like(input_ids_BT)
        hidden_BTH = self.embeddings(input_ids_BT, token_type_ids_BT)
        if self.config.embedding_size != self.config.hidden_size:
            hidden_BTH = self.embeddings_project(hidden_BTH)
        mask = attention.Mask(segment_ids_BT, segment_ids_BT, self.is_causal)
        return self.encoder(hidden_BTH, mask, positions.within_segments(segment_ids_BT))


class RoFormerForMaskedLM(nn.Module):
    """Hidden states, and scores of the vocabulary from them."""

    config: RoFormerConfig
    compute: layers.Compute = layers.Compute()

    is_causal: ClassVar[bool] = False

    def setup(self):
        self.roformer = RoFormer(self.config, self.compute, self.is_causal or self.config.is_decoder)
        self.cls = bert.BertHeads(self.config, self.compute, with_next_sentence=False)

    def __call__(
        self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array, token_type_ids_BT: jax.Array | None = None
    ) -> jax.Array:
        """[B, T, H]; tokens see those of the same segment, and 0 is padding."""
        hidden_BTH = self.roformer(input_ids_BT, segment_ids_BT, token_type_ids_BT)
        if self.is_initializing():
            self.scores(hidden_BTH)
        return hidden_BTH

    def scores(self, hidden_XH: jax.Array) -> jax.Array:
        """[..., V]"""
        return self.cls.predictions(hidden_XH, layers.weight_at(self, WORDS) if self.config.tie_word_embeddings else None)

    @property
    def head_weights(self) -> tuple[str, ...]:
        """Where the weights are that `scores` reads."""
        return ("cls/predictions", WORDS) if self.config.tie_word_embeddings else ("cls/predictions",)


class RoFormerForCausalLM(RoFormerForMaskedLM):
    """The same, where a token sees only those before it."""

    is_causal = True
