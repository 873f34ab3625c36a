# SPDX-License-Identifier: Apache-2.0
"""BLOOM (Scao et al. 2022, arXiv:2211.05100).

A decoder that knows positions by how much its heads prefer what is near (ALiBi), with norms before each half of a layer, and
one right after the embeddings.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from transformers import BloomConfig

from flaxlm import attention, layers, positions

WORDS = "transformer/word_embeddings/embedding"


class BloomAttention(nn.Module):
    """What a token makes of those before it: [B, T, H]."""

    config: BloomConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask, bias_M1S: jax.Array) -> jax.Array:
        config, (B, T, H) = self.config, hidden_BTH.shape
        M = config.num_attention_heads
        init = nn.initializers.normal(config.initializer_range)
        dense = functools.partial(layers.Dense, dtype=self.compute.dtype, kernel_init=init)
        heads_BTM3E = dense(3 * H, name="query_key_value")(hidden_BTH).reshape(B, T, M, 3, H // M)
        query_BTME, key_BTME, value_BTME = (heads_BTM3E[:, :, :, i] for i in range(3))
        attend = attention.Attention(self.compute.attention, config.attention_dropout)
        hidden_BTH = dense(H, name="dense")(attend(query_BTME, key_BTME, value_BTME, mask, bias_M1S).reshape(B, T, H))
        return layers.Dropout(config.hidden_dropout)(hidden_BTH)


class BloomMLP(nn.Module):
    config: BloomConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array) -> jax.Array:
        config, H = self.config, hidden_BTH.shape[-1]
        init = nn.initializers.normal(config.initializer_range)
        dense = functools.partial(layers.Dense, dtype=self.compute.dtype, kernel_init=init)
        hidden_BTF = nn.gelu(dense(4 * H, name="dense_h_to_4h")(hidden_BTH))
        return layers.Dropout(config.hidden_dropout)(dense(H, name="dense_4h_to_h")(hidden_BTF))


class BloomBlock(nn.Module):
    config: BloomConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask, bias_M1S: jax.Array) -> jax.Array:
        config = self.config
        norm = functools.partial(nn.LayerNorm, config.layer_norm_epsilon, dtype=self.compute.dtype)
        adds_to_normed = config.apply_residual_connection_post_layernorm
        normed_BTH = norm(name="input_layernorm")(hidden_BTH)
        attended_BTH = BloomAttention(config, self.compute, name="self_attention")(normed_BTH, mask, bias_M1S)
        hidden_BTH = attended_BTH + (normed_BTH if adds_to_normed else hidden_BTH)
        normed_BTH = norm(name="post_attention_layernorm")(hidden_BTH)
        return BloomMLP(config, self.compute, name="mlp")(normed_BTH) + (normed_BTH if adds_to_normed else hidden_BTH)


class Bloom(nn.Module):
    """Token ids to hidden states [B, T, H]."""

    config: BloomConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        config, dtype = self.config, self.compute.dtype
        init = nn.initializers.normal(config.initializer_range)
        embed = nn.Embed(config.vocab_size, config.hidden_size, embedding_init=init, dtype=dtype, name="word_embeddings")
        norm = functools.partial(nn.LayerNorm, config.layer_norm_epsilon, dtype=dtype)
        hidden_BTH = norm(name="word_embeddings_layernorm")(embed(input_ids_BT))
        layer = functools.partial(BloomBlock, config, self.compute)
        stack = layers.Layers(layer, config.num_hidden_layers, self.compute, name="h")
        # What counts is how far apart two tokens are: softmax does not see where the count begins.
        bias_M1S = positions.alibi_slopes(config.num_attention_heads)[:, None, None] * np.arange(input_ids_BT.shape[1])
        mask = attention.Mask(segment_ids_BT, segment_ids_BT, is_causal=True)
        return norm(name="ln_f")(stack(hidden_BTH, mask, jnp.asarray(bias_M1S, jnp.float32)))


class BloomForCausalLM(nn.Module):
    """Hidden states, and scores of the vocabulary from them."""

    config: BloomConfig
    compute: layers.Compute = layers.Compute()

    def setup(self):
        self.transformer = Bloom(self.config, self.compute)
        if not self.config.tie_word_embeddings:
            init = nn.initializers.normal(self.config.initializer_range)
            self.lm_head = layers.Dense(self.config.vocab_size, self.compute.dtype, use_bias=False, kernel_init=init)

    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """[B, T, H]; tokens see those before them of the same segment, and 0 is padding."""
        hidden_BTH = self.transformer(input_ids_BT, segment_ids_BT)
        if self.is_initializing():
            self.scores(hidden_BTH)
        return hidden_BTH

    def scores(self, hidden_XH: jax.Array) -> jax.Array:
        """[..., V]"""
        if self.config.tie_word_embeddings:
            return layers.vocabulary_scores(self, hidden_XH, layers.weight_at(self, WORDS))
        return self.lm_head(hidden_XH)

    @property
    def head_weights(self) -> tuple[str, ...]:
        """Where the weights are that `scores` reads."""
        return (WORDS,) if self.config.tie_word_embeddings else ("lm_head",)
