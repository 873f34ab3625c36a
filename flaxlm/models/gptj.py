# SPDX-License-Identifier: Apache-2.0
"""GPT-J (Wang & Komatsuzaki 2021, github.com/kingoflolz/mesh-transformer-jax).

A decoder with rotated positions (Su et al. 2021, arXiv:2104.09864), whose layers have one norm, for attention and MLP alike,
which are computed side by side.
"""

import functools

import flax.linen as nn
import jax
from transformers import GPTJConfig

from flaxlm import attention, layers, positions

WORDS = "transformer/wte/embedding"


class GPTJAttention(nn.Module):
    """What a token makes of those before it: [B, T, H]."""

    config: GPTJConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask, rotations: tuple[jax.Array, jax.Array]) -> jax.Array:
        config, (B, T, H) = self.config, hidden_BTH.shape
        M = config.num_attention_heads
        init = nn.initializers.normal(config.initializer_range)
        dense = functools.partial(layers.Dense, H, self.compute.dtype, use_bias=False, kernel_init=init)
        query_BTME, key_BTME, value_BTME = (
            dense(name=name)(hidden_BTH).reshape(B, T, M, H // M) for name in ("q_proj", "k_proj", "v_proj")
        )
        query_BTME, key_BTME = (positions.rotate_neighbours(heads_BTME, rotations) for heads_BTME in (query_BTME, key_BTME))
        attend = attention.Attention(self.compute.attention, config.attn_pdrop)
        hidden_BTH = dense(name="out_proj")(attend(query_BTME, key_BTME, value_BTME, mask).reshape(B, T, H))
        return layers.Dropout(config.resid_pdrop)(hidden_BTH)


class GPTJMLP(nn.Module):
    config: GPTJConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array) -> jax.Array:
        config, H = self.config, hidden_BTH.shape[-1]
        init = nn.initializers.normal(config.initializer_range)
        dense = functools.partial(layers.Dense, dtype=self.compute.dtype, kernel_init=init)
        hidden_BTF = dense(4 * H if config.n_inner is None else config.n_inner, name="fc_in")(hidden_BTH)
        hidden_BTF = layers.ACTIVATIONS[config.activation_function](hidden_BTF)
        return layers.Dropout(config.resid_pdrop)(dense(H, name="fc_out")(hidden_BTF))


class GPTJBlock(nn.Module):
    config: GPTJConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask, rotations: tuple[jax.Array, jax.Array]) -> jax.Array:
        normed_BTH = nn.LayerNorm(self.config.layer_norm_epsilon, dtype=self.compute.dtype, name="ln_1")(hidden_BTH)
        attended_BTH = GPTJAttention(self.config, self.compute, name="attn")(normed_BTH, mask, rotations)
        return hidden_BTH + attended_BTH + GPTJMLP(self.config, self.compute, name="mlp")(normed_BTH)


class GPTJ(nn.Module):
    """Token ids to hidden states [B, T, H]."""

    config: GPTJConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        config, dtype = self.config, self.compute.dtype
        init = nn.initializers.normal(config.initializer_range)
        embed = nn.Embed(config.vocab_size, config.hidden_size, embedding_init=init, dtype=dtype, name="wte")
        hidden_BTH = layers.Dropout(config.embd_pdrop)(embed(input_ids_BT))
        frequencies = positions.rotary_frequencies(config.rotary_dim, {"rope_theta": 10000.0})
        rotations = positions.rotary_table(positions.within_segments(segment_ids_BT), frequencies)
        layer = functools.partial(GPTJBlock, config, self.compute)
        stack = layers.Layers(layer, config.num_hidden_layers, self.compute, name="h")
        hidden_BTH = stack(hidden_BTH, attention.Mask(segment_ids_BT, segment_ids_BT, is_causal=True), rotations)
        return nn.LayerNorm(config.layer_norm_epsilon, dtype=dtype, name="ln_f")(hidden_BTH)


class GPTJForCausalLM(nn.Module):
    """Hidden states, and scores of the vocabulary from them."""

    config: GPTJConfig
    compute: layers.Compute = layers.Compute()

    def setup(self):
        self.transformer = GPTJ(self.config, self.compute)
        init = nn.initializers.normal(self.config.initializer_range)
        self.lm_head = layers.VocabularyHead(self.config.vocab_size, self.compute.dtype, kernel_init=init)

    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """[B, T, H]; tokens see those before them of the same segment, and 0 is padding."""
        hidden_BTH = self.transformer(input_ids_BT, segment_ids_BT)
        if self.is_initializing():
            self.scores(hidden_BTH)
        return hidden_BTH

    def scores(self, hidden_XH: jax.Array) -> jax.Array:
        """[..., V]"""
        return self.lm_head(hidden_XH, layers.weight_at(self, WORDS) if self.config.tie_word_embeddings else None)

    @property
    def head_weights(self) -> tuple[str, ...]:
        """Where the weights are that `scores` reads."""
        return ("lm_head", WORDS) if self.config.tie_word_embeddings else ("lm_head",)
