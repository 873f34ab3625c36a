# SPDX-License-Identifier: Apache-2.0
"""GPT-Neo (Black et al. 2021, doi:10.5281/zenodo.5297715).

A decoder with learned positions and norms before each half of a layer, like GPT-2, but in some layers a token sees only those
of a window before it, and attention scores are not scaled.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from transformers import GPTNeoConfig

from flaxlm import attention, layers, positions

WORDS = "transformer/wte/embedding"
NO_LIMIT = np.iinfo(np.int32).max


class GPTNeoSelfAttention(nn.Module):
    """What a token makes of those before it: [B, T, H]."""

    config: GPTNeoConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask) -> jax.Array:
        config, (B, T, H) = self.config, hidden_BTH.shape
        M = config.num_attention_heads
        init = nn.initializers.normal(config.initializer_range)
        dense = functools.partial(layers.Dense, H, self.compute.dtype, kernel_init=init)
        query_BTME, key_BTME, value_BTME = (
            dense(use_bias=False, name=name)(hidden_BTH).reshape(B, T, M, H // M) for name in ("q_proj", "k_proj", "v_proj")
        )
        attend = attention.Attention(self.compute.attention, config.attention_dropout, scale=1.0)
        hidden_BTH = dense(name="out_proj")(attend(query_BTME, key_BTME, value_BTME, mask).reshape(B, T, H))
        return layers.Dropout(config.resid_dropout)(hidden_BTH)


class GPTNeoAttention(nn.Module):
    config: GPTNeoConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask) -> jax.Array:
        return GPTNeoSelfAttention(self.config, self.compute, name="attention")(hidden_BTH, mask)


class GPTNeoMLP(nn.Module):
    config: GPTNeoConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array) -> jax.Array:
        config, H = self.config, hidden_BTH.shape[-1]
        init = nn.initializers.normal(config.initializer_range)
        dense = functools.partial(layers.Dense, dtype=self.compute.dtype, kernel_init=init)
        hidden_BTF = dense(4 * H if config.intermediate_size is None else config.intermediate_size, name="c_fc")(hidden_BTH)
        hidden_BTF = layers.ACTIVATIONS[config.activation_function](hidden_BTF)
        return layers.Dropout(config.resid_dropout)(dense(H, name="c_proj")(hidden_BTF))


class GPTNeoBlock(nn.Module):
    """A layer; `fields` of the mask are as it has them."""

    config: GPTNeoConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, fields: dict[str, Any], mask: attention.Mask) -> jax.Array:
        norm = functools.partial(nn.LayerNorm, self.config.layer_norm_epsilon, dtype=self.compute.dtype)
        attend = GPTNeoAttention(self.config, self.compute, name="attn")
        hidden_BTH += attend(norm(name="ln_1")(hidden_BTH), mask._replace(**fields))
        return hidden_BTH + GPTNeoMLP(self.config, self.compute, name="mlp")(norm(name="ln_2")(hidden_BTH))


class GPTNeo(nn.Module):
    """Token ids to hidden states [B, T, H]."""

    config: GPTNeoConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        config, dtype = self.config, self.compute.dtype
        init = nn.initializers.normal(config.initializer_range)
        embed = functools.partial(nn.Embed, features=config.hidden_size, embedding_init=init, dtype=dtype)
        words_BTH = embed(config.vocab_size, name="wte")(input_ids_BT)
        places_BTH = embed(config.max_position_embeddings, name="wpe")(positions.within_segments(segment_ids_BT))
        hidden_BTH = layers.Dropout(config.embed_dropout)(words_BTH + places_BTH)
        layer = functools.partial(GPTNeoBlock, config, self.compute)
        stack = layers.Layers(layer, config.num_hidden_layers, self.compute, name="h")
        mask = attention.Mask(segment_ids_BT, segment_ids_BT, is_causal=True)
        hidden_BTH = stack(hidden_BTH, mask, each=fields_of_masks(config))
        return nn.LayerNorm(config.layer_norm_epsilon, dtype=dtype, name="ln_f")(hidden_BTH)


def fields_of_masks(config: GPTNeoConfig) -> dict[str, np.ndarray]:
    """How far the tokens see in each layer, int32 [layers]; nothing if there is no limit in any."""
    if "local" not in config.attention_layers:
        return {}
    reaches = {"global": NO_LIMIT, "local": config.window_size - 1}  # a window holds the token itself
    return {"reach": np.array([reaches[kind] for kind in config.attention_layers], np.int32)}


class GPTNeoForCausalLM(nn.Module):
    """Hidden states, and scores of the vocabulary from them."""

    config: GPTNeoConfig
    compute: layers.Compute = layers.Compute()

    def setup(self):
        self.transformer = GPTNeo(self.config, self.compute)
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
