# SPDX-License-Identifier: Apache-2.0
"""Llama (Touvron et al. 2023, arXiv:2302.13971) and its relatives Mistral, Qwen 2 and 3, Gemma and Gemma 2.

Decoders with RMS norms before each half of a layer, rotated queries and keys, heads that share keys and values, gated
feed-forward layers, and hardly a bias. Llama is the first half of this file; each relative below it says what it has instead.
"""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from transformers import Gemma2Config, GemmaConfig, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from flaxlm import attention, layers, positions

WORDS = "model/embed_tokens/embedding"


def head_size(config: PretrainedConfig) -> int:
    """Of a query; all heads together need not be as wide as the hidden states."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# ---- Llama -------------------------------------------------------------------------------------------------------------


class LlamaAttention(nn.Module):
    """Each token looks at those before it: [B, T, H]. A group of heads has the same keys and values (N of them)."""

    config: PretrainedConfig
    compute: layers.Compute

    has_query_bias: ClassVar[bool] = False  # and those of keys and values, whatever the configuration says
    has_head_norms: ClassVar[bool] = False

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
        config, dtype, (B, T, H), E = self.config, self.compute.dtype, hidden_BTH.shape, head_size(self.config)
        init = nn.initializers.normal(config.initializer_range)
        dense = functools.partial(layers.Dense, dtype=dtype, kernel_init=init)
        has_bias = getattr(config, "attention_bias", False)

        def heads(name: str, num_heads: int) -> jax.Array:
            projection = dense(num_heads * E, use_bias=has_bias or self.has_query_bias, name=name)
            return projection(hidden_BTH).reshape(B, T, num_heads, E)

        query_BTME = heads("q_proj", config.num_attention_heads)
        key_BTNE = heads("k_proj", config.num_key_value_heads)
        value_BTNE = heads("v_proj", config.num_key_value_heads)
        if self.has_head_norms:
            query_BTME = layers.RMSNorm(config.rms_norm_eps, dtype, name="q_norm")(query_BTME)
            key_BTNE = layers.RMSNorm(config.rms_norm_eps, dtype, name="k_norm")(key_BTNE)
        query_BTME, key_BTNE = (positions.rotate_halves(array, rotation) for array in (query_BTME, key_BTNE))
        attend = attention.Attention(self.compute.attention, config.attention_dropout, **self.scores_options())
        attended_BTX = attend(query_BTME, key_BTNE, value_BTNE, mask).reshape(B, T, -1)
        return dense(H, use_bias=has_bias, name="o_proj")(attended_BTX)

    def scores_options(self) -> dict[str, Any]:
        """What the configuration says of the scores."""
        return {}


class LlamaMLP(nn.Module):
    """Wide features, gated, back to the hidden size (Shazeer 2020, arXiv:2002.05202): [B, T, H]."""

    config: PretrainedConfig
    compute: layers.Compute
    activation: str

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array) -> jax.Array:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        has_bias = getattr(config, "mlp_bias", False)
        dense = functools.partial(layers.Dense, dtype=self.compute.dtype, use_bias=has_bias, kernel_init=init)
        gate_BTF = layers.ACTIVATIONS[self.activation](dense(config.intermediate_size, name="gate_proj")(hidden_BTH))
        features_BTF = gate_BTF * dense(config.intermediate_size, name="up_proj")(hidden_BTH)
        return dense(config.hidden_size, name="down_proj")(features_BTF)


class LlamaLayer(nn.Module):
    config: PretrainedConfig
    compute: layers.Compute

    attention_class: ClassVar[type[LlamaAttention]] = LlamaAttention
    norm_offset: ClassVar[float] = 0.0

    @nn.compact
    def __call__(
        self,
        hidden_BTH: jax.Array,
        limits: Mapping[str, jax.Array],
        mask: attention.Mask,
        rotation: tuple[jax.Array, jax.Array],
    ) -> jax.Array:
        """`limits` is what the mask has in this layer only: its `reach`, or nothing."""
        config, compute = self.config, self.compute
        norm = functools.partial(layers.RMSNorm, config.rms_norm_eps, compute.dtype, self.norm_offset)
        attend = self.attention_class(config, compute, name="self_attn")
        hidden_BTH += attend(norm(name="input_layernorm")(hidden_BTH), mask._replace(**limits), rotation)
        feed_forward = LlamaMLP(config, compute, config.hidden_act, name="mlp")
        return hidden_BTH + feed_forward(norm(name="post_attention_layernorm")(hidden_BTH))


class LlamaModel(nn.Module):
    """Token ids to hidden states [B, T, H]."""

    config: PretrainedConfig
    compute: layers.Compute
    layer_class: type[LlamaLayer]
    windows: tuple[int | None, ...]
    embedding_scale: float

    @nn.compact
    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        config, compute = self.config, self.compute
        init = nn.initializers.normal(config.initializer_range)
        words = nn.Embed(config.vocab_size, config.hidden_size, compute.dtype, embedding_init=init, name="embed_tokens")
        hidden_BTH = words(input_ids_BT) * jnp.asarray(self.embedding_scale, compute.dtype)
        frequencies = positions.rotary_frequencies(head_size(config), config.rope_parameters)
        rotation = positions.rotary_table(positions.within_segments(segment_ids_BT), frequencies)
        mask = attention.Mask(segment_ids_BT, segment_ids_BT, is_causal=True)
        layer = functools.partial(self.layer_class, config, compute)
        stack = layers.Layers(layer, config.num_hidden_layers, compute, name="layers")
        hidden_BTH = stack(hidden_BTH, mask, rotation, each=self.limits(input_ids_BT.shape[1]))
        return layers.RMSNorm(config.rms_norm_eps, compute.dtype, self.layer_class.norm_offset, name="norm")(hidden_BTH)

    def limits(self, num_tokens: int) -> dict[str, jax.Array]:
        """How far back each layer looks, where a window is narrower than a row: `reach` [layers]."""
        widths = [num_tokens if window is None else min(window, num_tokens) for window in self.windows]
        return {"reach": jnp.array(widths) - 1} if min(widths, default=num_tokens) < num_tokens else {}


class LlamaForCausalLM(nn.Module):
    """Hidden states, and scores of the vocabulary from them."""

    config: LlamaConfig
    compute: layers.Compute = layers.Compute()

    layer_class: ClassVar[type[LlamaLayer]] = LlamaLayer

    def setup(self):
        config, compute = self.config, self.compute
        self.model = LlamaModel(config, compute, self.layer_class, self.windows(), self.embedding_scale())
        if not config.tie_word_embeddings:
            init = nn.initializers.normal(config.initializer_range)
            self.lm_head = layers.Dense(config.vocab_size, compute.dtype, use_bias=False, kernel_init=init)

    def windows(self) -> tuple[int | None, ...]:
        """How many tokens a token sees in each layer, itself included; None: all before it."""
        return (None,) * self.config.num_hidden_layers

    def embedding_scale(self) -> float:
        """What embeddings are multiplied with, but not where they are the head's weights."""
        return 1.0

    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """[B, T, H]; tokens see those of the same segment that are not after them, and 0 is padding."""
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


# ---- Mistral (Jiang et al. 2023, arXiv:2310.06825) ---------------------------------------------------------------------


class MistralForCausalLM(LlamaForCausalLM):
    """Llama, where a token may see only so many tokens before it."""

    config: MistralConfig

    def windows(self) -> tuple[int | None, ...]:
        return (self.config.sliding_window,) * self.config.num_hidden_layers


# ---- Qwen 2 (Yang et al. 2024, arXiv:2407.10671) and 3 (Yang et al. 2025, arXiv:2505.09388) ----------------------------


def windows_by_type(config: PretrainedConfig) -> tuple[int | None, ...]:
    """A window in those layers that the configuration names."""
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)


class Qwen2Attention(LlamaAttention):
    """With biases of queries, keys and values."""

    has_query_bias = True


class Qwen2Layer(LlamaLayer):
    attention_class = Qwen2Attention


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Llama with a few biases, and a window in some layers."""

    config: Qwen2Config
    layer_class = Qwen2Layer

    def windows(self) -> tuple[int | None, ...]:
        return windows_by_type(self.config)


class Qwen3Attention(LlamaAttention):
    """With norms of queries and keys, head by head."""

    has_head_norms = True


class Qwen3Layer(LlamaLayer):
    attention_class = Qwen3Attention


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Llama with norms of queries and keys, and a window in some layers."""

    config: Qwen3Config
    layer_class = Qwen3Layer

    def windows(self) -> tuple[int | None, ...]:
        return windows_by_type(self.config)


# ---- Gemma (Gemma Team 2024, arXiv:2403.08295) and Gemma 2 (Gemma Team 2024, arXiv:2408.00118) -------------------------


class GemmaLayer(LlamaLayer):
    """Norms multiply by 1 + weight."""

    norm_offset = 1.0


class GemmaForCausalLM(LlamaForCausalLM):
    """Llama with such norms, and embeddings as large as the square root of the hidden size."""

    config: GemmaConfig
    layer_class = GemmaLayer

    def embedding_scale(self) -> float:
        return self.config.hidden_size**0.5


class Gemma2Attention(LlamaAttention):
    """With a scale that does not follow from the size of a head, and scores that are squeezed."""

    def scores_options(self) -> dict[str, Any]:
        config = self.config
        return {"scale": config.query_pre_attn_scalar**-0.5, "softcap": config.attn_logit_softcapping}


class Gemma2Layer(LlamaLayer):
    """Norms before and after each half."""

    attention_class = Gemma2Attention
    norm_offset = 1.0

    @nn.compact
    def __call__(
        self,
        hidden_BTH: jax.Array,
        limits: Mapping[str, jax.Array],
        mask: attention.Mask,
        rotation: tuple[jax.Array, jax.Array],
    ) -> jax.Array:
        config, compute = self.config, self.compute
        norm = functools.partial(layers.RMSNorm, config.rms_norm_eps, compute.dtype, self.norm_offset)
        attend = self.attention_class(config, compute, name="self_attn")
        attended_BTH = attend(norm(name="input_layernorm")(hidden_BTH), mask._replace(**limits), rotation)
        hidden_BTH += norm(name="post_attention_layernorm")(attended_BTH)
        feed_forward = LlamaMLP(config, compute, config.hidden_activation, name="mlp")
        features_BTH = feed_forward(norm(name="pre_feedforward_layernorm")(hidden_BTH))
        return hidden_BTH + norm(name="post_feedforward_layernorm")(features_BTH)


class Gemma2ForCausalLM(GemmaForCausalLM):
    """Gemma with more norms, a window in every other layer, and scores that are squeezed."""

    config: Gemma2Config
    layer_class = Gemma2Layer

    def windows(self) -> tuple[int | None, ...]:
        return windows_by_type(self.config)

    def scores(self, hidden_XH: jax.Array) -> jax.Array:
        scores_XV = super().scores(hidden_XH)
        limit = self.config.final_logit_softcapping
        return scores_XV if limit is None else limit * jnp.tanh(scores_XV / limit)
