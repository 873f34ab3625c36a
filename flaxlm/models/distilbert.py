# SPDX-License-Identifier: Apache-2.0
"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108): BERT without types of tokens, half as deep."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from transformers import DistilBertConfig

from flaxlm import attention, layers, positions

WORDS = "distilbert/embeddings/word_embeddings/embedding"
EPSILON = 1e-12  # of all norms


class DistilBertEmbeddings(nn.Module):
    """What a token is and where it stands, summed: [B, T, H]."""

    config: DistilBertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, input_ids_BT: jax.Array, position_ids_BT: jax.Array) -> jax.Array:
        config, dtype = self.config, self.compute.dtype
        init = nn.initializers.normal(config.initializer_range)
        embed = functools.partial(nn.Embed, features=config.dim, embedding_init=init, dtype=dtype)
        hidden_BTH = embed(config.vocab_size, name="word_embeddings")(input_ids_BT)
        if config.sinusoidal_pos_embds:
            sines_PX, cosines_PX = np.split(positions.sinusoids(config.max_position_embeddings, config.dim), 2, axis=1)
            table_PH = np.stack((sines_PX, cosines_PX), axis=-1).reshape(-1, config.dim)
            hidden_BTH += jnp.asarray(table_PH, dtype)[position_ids_BT]
        else:
            hidden_BTH += embed(config.max_position_embeddings, name="position_embeddings")(position_ids_BT)
        hidden_BTH = nn.LayerNorm(EPSILON, dtype=dtype, name="LayerNorm")(hidden_BTH)
        return layers.Dropout(config.dropout)(hidden_BTH)


class DistilBertAttention(nn.Module):
    config: DistilBertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask) -> jax.Array:
        config, (B, T, H) = self.config, hidden_BTH.shape
        M = config.n_heads
        init = nn.initializers.normal(config.initializer_range)
        dense = functools.partial(layers.Dense, H, self.compute.dtype, kernel_init=init)
        query_BTME, key_BTME, value_BTME = (
            dense(name=name)(hidden_BTH).reshape(B, T, M, H // M) for name in ("q_lin", "k_lin", "v_lin")
        )
        attend = attention.Attention(self.compute.attention, config.attention_dropout)
        return dense(name="out_lin")(attend(query_BTME, key_BTME, value_BTME, mask).reshape(B, T, H))


class DistilBertFeedForward(nn.Module):
    config: DistilBertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array) -> jax.Array:
        config, dtype = self.config, self.compute.dtype
        init = nn.initializers.normal(config.initializer_range)
        hidden_BTF = layers.Dense(config.hidden_dim, dtype, kernel_init=init, name="lin1")(hidden_BTH)
        hidden_BTF = layers.ACTIVATIONS[config.activation](hidden_BTF)
        hidden_BTH = layers.Dense(config.dim, dtype, kernel_init=init, name="lin2")(hidden_BTF)
        return layers.Dropout(config.dropout)(hidden_BTH)


class DistilBertLayer(nn.Module):
    config: DistilBertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask) -> jax.Array:
        norm = functools.partial(nn.LayerNorm, EPSILON, dtype=self.compute.dtype)
        attended_BTH = DistilBertAttention(self.config, self.compute, name="attention")(hidden_BTH, mask)
        hidden_BTH = norm(name="sa_layer_norm")(attended_BTH + hidden_BTH)
        fed_BTH = DistilBertFeedForward(self.config, self.compute, name="ffn")(hidden_BTH)
        return norm(name="output_layer_norm")(fed_BTH + hidden_BTH)


class DistilBertTransformer(nn.Module):
    config: DistilBertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask) -> jax.Array:
        layer = functools.partial(DistilBertLayer, self.config, self.compute)
        return layers.Layers(layer, self.config.n_layers, self.compute, name="layer")(hidden_BTH, mask)


class DistilBert(nn.Module):
    """Token ids to hidden states [B, T, H]."""

    config: DistilBertConfig
    compute: layers.Compute

    def setup(self):
        self.embeddings = DistilBertEmbeddings(self.config, self.compute)
        self.transformer = DistilBertTransformer(self.config, self.compute)

    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        hidden_BTH = self.embeddings(input_ids_BT, positions.within_segments(segment_ids_BT))
        return self.transformer(hidden_BTH, attention.Mask(segment_ids_BT, segment_ids_BT))


class DistilBertForMaskedLM(nn.Module):
    """Hidden states, and scores of the vocabulary from them."""

    config: DistilBertConfig
    compute: layers.Compute = layers.Compute()

    def setup(self):
        config, dtype = self.config, self.compute.dtype
        init = nn.initializers.normal(config.initializer_range)
        self.distilbert = DistilBert(config, self.compute)
        self.vocab_transform = layers.Dense(config.dim, dtype, kernel_init=init)
        self.vocab_layer_norm = nn.LayerNorm(EPSILON, dtype=dtype)
        self.vocab_projector = layers.VocabularyHead(config.vocab_size, dtype, kernel_init=init)

    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """[B, T, H]; tokens see those of the same segment, and 0 is padding."""
        hidden_BTH = self.distilbert(input_ids_BT, segment_ids_BT)
        if self.is_initializing():
            self.scores(hidden_BTH)
        return hidden_BTH

    def scores(self, hidden_XH: jax.Array) -> jax.Array:
        """[..., V]"""
        hidden_XH = self.vocab_layer_norm(layers.ACTIVATIONS[self.config.activation](self.vocab_transform(hidden_XH)))
        return self.vocab_projector(hidden_XH, layers.weight_at(self, WORDS) if self.config.tie_word_embeddings else None)

    @property
    def head_weights(self) -> tuple[str, ...]:
        """Where the weights are that `scores` reads."""
        own = ("vocab_transform", "vocab_layer_norm", "vocab_projector")
        return (*own, WORDS) if self.config.tie_word_embeddings else own
