# SPDX-License-Identifier: Apache-2.0
"""XGLM (Lin et al. 2021, arXiv:2112.10668).

A decoder with sinusoids for positions, and norms before each half of a layer.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from transformers import XGLMConfig

from flaxlm import attention, layers, positions

WORDS = "model/embed_tokens/embedding"
FIRST_POSITION = 2  # what positions are counted from


def sinusoids(num_positions: int, size: int, pad_token_id: int | None) -> np.ndarray:
    """Sines, then cosines of positions, of waves from 2 pi to exactly 20,000 pi long: float32 [positions, size].

    The position that has the number of the padding token is left without any, wherever that token stands.
    """
    num_waves = size // 2
    angles = np.arange(num_positions)[:, None] / 10000 ** (np.arange(num_waves) / (num_waves - 1))
    table = np.zeros((num_positions, size), np.float32)
    table[:, : 2 * num_waves] = np.concatenate((np.sin(angles), np.cos(angles)), axis=1)
    table[np.arange(num_positions) == pad_token_id] = 0
    return table


class XGLMAttention(nn.Module):
    """What a token makes of those before it: [B, T, H]."""

    config: XGLMConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask) -> jax.Array:
        config, (B, T, H) = self.config, hidden_BTH.shape
        M = config.num_attention_heads
        dense = functools.partial(layers.Dense, H, self.compute.dtype, kernel_init=nn.initializers.normal(config.init_std))
        query_BTME, key_BTME, value_BTME = (
            dense(name=name)(hidden_BTH).reshape(B, T, M, H // M) for name in ("q_proj", "k_proj", "v_proj")
        )
        attend = attention.Attention(self.compute.attention, config.attention_dropout)
        return dense(name="out_proj")(attend(query_BTME, key_BTME, value_BTME, mask).reshape(B, T, H))


class XGLMDecoderLayer(nn.Module):
    config: XGLMConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask) -> jax.Array:
        config, dtype = self.config, self.compute.dtype
        norm = functools.partial(nn.LayerNorm, 1e-5, dtype=dtype)
        dense = functools.partial(layers.Dense, dtype=dtype, kernel_init=nn.initializers.normal(config.init_std))
        dropout = layers.Dropout(config.dropout)

        normed_BTH = norm(name="self_attn_layer_norm")(hidden_BTH)
        hidden_BTH += dropout(XGLMAttention(config, self.compute, name="self_attn")(normed_BTH, mask))
        hidden_BTF = dense(config.ffn_dim, name="fc1")(norm(name="final_layer_norm")(hidden_BTH))
        hidden_BTF = layers.Dropout(config.activation_dropout)(layers.ACTIVATIONS[config.activation_function](hidden_BTF))
        return hidden_BTH + dropout(dense(config.hidden_size, name="fc2")(hidden_BTF))


class XGLM(nn.Module):
    """Token ids to hidden states [B, T, H]."""

    config: XGLMConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        config, dtype, H = self.config, self.compute.dtype, self.config.hidden_size
        init = nn.initializers.normal(config.init_std)
        hidden_BTH = nn.Embed(config.vocab_size, H, embedding_init=init, dtype=dtype, name="embed_tokens")(input_ids_BT)
        if config.scale_embedding:
            hidden_BTH *= H**0.5
        table_PH = jnp.asarray(sinusoids(FIRST_POSITION + input_ids_BT.shape[1], H, config.pad_token_id), dtype)
        hidden_BTH += table_PH[FIRST_POSITION + positions.within_segments(segment_ids_BT)]
        layer = functools.partial(XGLMDecoderLayer, config, self.compute)
        stack = layers.Layers(layer, config.num_hidden_layers, self.compute, drop_rate=config.layerdrop, name="layers")
        mask = attention.Mask(segment_ids_BT, segment_ids_BT, is_causal=True)
        hidden_BTH = stack(layers.Dropout(config.dropout)(hidden_BTH), mask)
        return nn.LayerNorm(1e-5, dtype=dtype, name="layer_norm")(hidden_BTH)


class XGLMForCausalLM(nn.Module):
    """Hidden states, and scores of the vocabulary from them."""

    config: XGLMConfig
    compute: layers.Compute = layers.Compute()

    def setup(self):
        self.model = XGLM(self.config, self.compute)
        if not self.config.tie_word_embeddings:
            init = nn.initializers.normal(self.config.init_std)
            self.lm_head = layers.Dense(self.config.vocab_size, self.compute.dtype, use_bias=False, kernel_init=init)

    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """[B, T, H]; tokens see those before them of the same segment, and 0 is padding."""
        hidden_BTH = self.model(input_ids_BT, segment_ids_BT)
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
