# SPDX-License-Identifier: Apache-2.0
"""OPT (Zhang et al. 2022, arXiv:2205.01068).

A decoder with learned positions, and norms before each half of a layer, or after it (350m). Its words may be narrower than
its hidden states.
"""

import functools

import flax.linen as nn
import jax
from transformers import OPTConfig

from flaxlm import attention, layers, positions

WORDS = "model/decoder/embed_tokens/embedding"
FIRST_POSITION = 2  # row of the table; nothing stands at the rows before it


def make_norm(config: OPTConfig, compute: layers.Compute, name: str) -> nn.LayerNorm:
    has_weights = config.layer_norm_elementwise_affine
    return nn.LayerNorm(1e-5, dtype=compute.dtype, use_bias=has_weights, use_scale=has_weights, name=name)


class OPTAttention(nn.Module):
    """What a token makes of those before it: [B, T, H]."""

    config: OPTConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask) -> jax.Array:
        config, (B, T, H) = self.config, hidden_BTH.shape
        M = config.num_attention_heads
        dense = functools.partial(
            layers.Dense, H, self.compute.dtype, config.enable_bias, nn.initializers.normal(config.init_std)
        )
        query_BTME, key_BTME, value_BTME = (
            dense(name=name)(hidden_BTH).reshape(B, T, M, H // M) for name in ("q_proj", "k_proj", "v_proj")
        )
        attend = attention.Attention(self.compute.attention, config.attention_dropout)
        return dense(name="out_proj")(attend(query_BTME, key_BTME, value_BTME, mask).reshape(B, T, H))


class OPTDecoderLayer(nn.Module):
    config: OPTConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask) -> jax.Array:
        config, dtype = self.config, self.compute.dtype
        dense = functools.partial(
            layers.Dense, dtype=dtype, use_bias=config.enable_bias, kernel_init=nn.initializers.normal(config.init_std)
        )
        dropout, attend = layers.Dropout(config.dropout), OPTAttention(config, self.compute, name="self_attn")
        fc1, fc2 = dense(config.ffn_dim, name="fc1"), dense(config.hidden_size, name="fc2")
        activation = layers.ACTIVATIONS[config.activation_function]
        norms = (make_norm(config, self.compute, name) for name in ("self_attn_layer_norm", "final_layer_norm"))
        halves = lambda hidden_BTH: attend(hidden_BTH, mask), lambda hidden_BTH: fc2(activation(fc1(hidden_BTH)))
        for half, norm in zip(halves, norms, strict=True):
            if config.do_layer_norm_before:
                hidden_BTH += dropout(half(norm(hidden_BTH)))
            else:
                hidden_BTH = norm(hidden_BTH + dropout(half(hidden_BTH)))
        return hidden_BTH


class OPTDecoder(nn.Module):
    """Token ids to hidden states, as wide as words are."""

    config: OPTConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        config, dtype = self.config, self.compute.dtype
        num_words, num_places, H = config.vocab_size, FIRST_POSITION + config.max_position_embeddings, config.hidden_size
        embed = functools.partial(nn.Embed, embedding_init=nn.initializers.normal(config.init_std), dtype=dtype)
        project = functools.partial(layers.Dense, dtype=dtype, use_bias=False, kernel_init=nn.initializers.lecun_normal())
        is_projected = config.word_embed_proj_dim != H

        hidden_BTH = embed(num_words, config.word_embed_proj_dim, name="embed_tokens")(input_ids_BT)
        if is_projected:
            hidden_BTH = project(H, name="project_in")(hidden_BTH)
        position_ids_BT = FIRST_POSITION + positions.within_segments(segment_ids_BT)
        hidden_BTH += embed(num_places, H, name="embed_positions")(position_ids_BT)
        layer = functools.partial(OPTDecoderLayer, config, self.compute)
        stack = layers.Layers(layer, config.num_hidden_layers, self.compute, drop_rate=config.layerdrop, name="layers")
        hidden_BTH = stack(hidden_BTH, attention.Mask(segment_ids_BT, segment_ids_BT, is_causal=True))
        if config.do_layer_norm_before and not config._remove_final_layer_norm:
            hidden_BTH = make_norm(config, self.compute, "final_layer_norm")(hidden_BTH)
        return project(config.word_embed_proj_dim, name="project_out")(hidden_BTH) if is_projected else hidden_BTH


class OPT(nn.Module):
    config: OPTConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        return OPTDecoder(self.config, self.compute, name="decoder")(input_ids_BT, segment_ids_BT)


class OPTForCausalLM(nn.Module):
    """Hidden states, and scores of the vocabulary from them."""

    config: OPTConfig
    compute: layers.Compute = layers.Compute()

    def setup(self):
        self.model = OPT(self.config, self.compute)
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
