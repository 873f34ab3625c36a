# SPDX-License-Identifier: Apache-2.0
"""ModernBERT (Warner et al. 2024, arXiv:2412.13663): an encoder with rotated queries and keys, norms first, gated feed-forward
layers, and layers that see only what is near between those that see all.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from transformers import ModernBertConfig

from flaxlm import attention, layers, positions

WORDS = "model/embeddings/tok_embeddings/embedding"
NO_LIMIT = 2**30  # reach of a layer that sees all


def initializer(config: ModernBertConfig, is_output: bool = False) -> nn.initializers.Initializer:
    """Cut off normal distribution; smaller in layers whose outputs are added to the hidden states, and behind these."""
    spread = config.initializer_range / (math.sqrt(2 * config.num_hidden_layers) if is_output else 1)
    cutoff = 3.0 if config.initializer_cutoff_factor is None else config.initializer_cutoff_factor
    return nn.initializers.truncated_normal(spread, lower=-cutoff, upper=cutoff)


def layer_norm(config: ModernBertConfig, compute: layers.Compute, **options: Any) -> nn.LayerNorm:
    return nn.LayerNorm(config.norm_eps, compute.dtype, use_bias=config.norm_bias, **options)


class ModernBertEmbeddings(nn.Module):
    """What a token is: [B, T, H]."""

    config: ModernBertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, input_ids_BT: jax.Array) -> jax.Array:
        config = self.config
        table = functools.partial(nn.Embed, config.vocab_size, config.hidden_size, embedding_init=initializer(config))
        hidden_BTH = table(dtype=self.compute.dtype, name="tok_embeddings")(input_ids_BT)
        hidden_BTH = layer_norm(config, self.compute, name="norm")(hidden_BTH)
        return layers.Dropout(config.embedding_dropout)(hidden_BTH)


class ModernBertAttention(nn.Module):
    config: ModernBertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask, table: tuple[jax.Array, jax.Array]) -> jax.Array:
        config, (B, T, H) = self.config, hidden_BTH.shape
        M = config.num_attention_heads
        dense = functools.partial(layers.Dense, dtype=self.compute.dtype, use_bias=config.attention_bias)
        heads_BT3ME = dense(3 * H, kernel_init=initializer(config), name="Wqkv")(hidden_BTH).reshape(B, T, 3, M, H // M)
        query_BTME, key_BTME, value_BTME = (heads_BT3ME[:, :, i] for i in range(3))
        query_BTME, key_BTME = (positions.rotate_halves(heads, table) for heads in (query_BTME, key_BTME))
        attend = attention.Attention(self.compute.attention, config.attention_dropout)
        attended_BTH = attend(query_BTME, key_BTME, value_BTME, mask).reshape(B, T, H)
        attended_BTH = dense(H, kernel_init=initializer(config, is_output=True), name="Wo")(attended_BTH)
        return layers.Dropout(config.attention_dropout)(attended_BTH)


class ModernBertFeedForward(nn.Module):
    """What one half of the widened states lets through of the other (Shazeer 2020, arXiv:2002.05202): [B, T, H]."""

    config: ModernBertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array) -> jax.Array:
        config = self.config
        dense = functools.partial(layers.Dense, dtype=self.compute.dtype, use_bias=config.mlp_bias)
        wide_BTX = dense(2 * config.intermediate_size, kernel_init=initializer(config), name="Wi")(hidden_BTH)
        gate_BTF, hidden_BTF = jnp.split(wide_BTX, 2, axis=-1)
        hidden_BTF = layers.Dropout(config.mlp_dropout)(layers.ACTIVATIONS[config.hidden_activation](gate_BTF) * hidden_BTF)
        return dense(config.hidden_size, kernel_init=initializer(config, is_output=True), name="Wo")(hidden_BTF)


class ModernBertLayer(nn.Module):
    """A layer that sees all or, if it `is_local`, what is near; the first one has no norm, as the embeddings have one."""

    config: ModernBertConfig
    compute: layers.Compute
    is_first: bool = False

    @nn.compact
    def __call__(
        self,
        hidden_BTH: jax.Array,
        is_local: jax.Array,
        mask: attention.Mask,
        tables: Mapping[str, tuple[jax.Array, jax.Array]],
    ) -> jax.Array:
        config, compute = self.config, self.compute
        if mask.reach is not None:
            mask = mask._replace(reach=jnp.where(is_local, mask.reach, NO_LIMIT))
        table = jax.tree.map(functools.partial(jnp.where, is_local), tables["sliding_attention"], tables["full_attention"])
        normed_BTH = hidden_BTH if self.is_first else layer_norm(config, compute, name="attn_norm")(hidden_BTH)
        hidden_BTH += ModernBertAttention(config, compute, name="attn")(normed_BTH, mask, table)
        normed_BTH = layer_norm(config, compute, name="mlp_norm")(hidden_BTH)
        return hidden_BTH + ModernBertFeedForward(config, compute, name="mlp")(normed_BTH)


class ModernBert(nn.Module):
    """Token ids to hidden states [B, T, H]."""

    config: ModernBertConfig
    compute: layers.Compute

    def setup(self):
        config, compute = self.config, self.compute
        layer = functools.partial(ModernBertLayer, config, compute)
        first = functools.partial(layer, is_first=True)
        self.embeddings = ModernBertEmbeddings(config, compute)
        self.layers = layers.Layers(layer, config.num_hidden_layers, compute, first)
        self.final_norm = layer_norm(config, compute)

    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        config, position_ids_BT = self.config, positions.within_segments(segment_ids_BT)
        size = config.hidden_size // config.num_attention_heads
        tables = {
            kind: positions.rotary_table(position_ids_BT, positions.rotary_frequencies(size, parameters))
            for kind, parameters in rotary_parameters(config).items()
        }
        is_local = np.array([kind == "sliding_attention" for kind in layer_types(config)])
        reach, num_tokens = config.local_attention // 2, input_ids_BT.shape[1]
        mask = attention.Mask(segment_ids_BT, segment_ids_BT, reach=reach if is_local.any() and reach < num_tokens else None)
        return self.final_norm(self.layers(self.embeddings(input_ids_BT), mask, tables, each=jnp.asarray(is_local)))


def rotary_parameters(config: ModernBertConfig) -> dict[str, Mapping[str, Any]]:
    """Those of layers that see all, and of layers that see what is near."""
    return {kind: config.rope_parameters[kind] for kind in ("full_attention", "sliding_attention")}


def layer_types(config: ModernBertConfig) -> list[str]:
    """Kind of attention of each layer."""
    if hasattr(config, "layer_types"):
        return config.layer_types
    every = config.global_attn_every_n_layers  # transformers 4
    return ["sliding_attention" if i % every else "full_attention" for i in range(config.num_hidden_layers)]


# ---- Head --------------------------------------------------------------------------------------------------------------


class ModernBertHead(nn.Module):
    config: ModernBertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_XH: jax.Array) -> jax.Array:
        config, dtype = self.config, self.compute.dtype
        init = initializer(config, is_output=True)
        hidden_XH = layers.Dense(config.hidden_size, dtype, config.classifier_bias, init, name="dense")(hidden_XH)
        return layer_norm(config, self.compute, name="norm")(layers.ACTIVATIONS[config.classifier_activation](hidden_XH))


class ModernBertForMaskedLM(nn.Module):
    """Hidden states, and scores of the vocabulary from them."""

    config: ModernBertConfig
    compute: layers.Compute = layers.Compute()

    def setup(self):
        config, dtype = self.config, self.compute.dtype
        self.model = ModernBert(config, self.compute)
        self.head = ModernBertHead(config, self.compute)
        init = initializer(config, is_output=True)
        self.decoder = layers.VocabularyHead(config.vocab_size, dtype, config.decoder_bias, init)

    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """[B, T, H]; tokens see those of the same segment, and 0 is padding."""
        hidden_BTH = self.model(input_ids_BT, segment_ids_BT)
        if self.is_initializing():
            self.scores(hidden_BTH)
        return hidden_BTH

    def scores(self, hidden_XH: jax.Array) -> jax.Array:
        """[..., V]"""
        return self.decoder(self.head(hidden_XH), layers.weight_at(self, WORDS) if self.config.tie_word_embeddings else None)

    @property
    def head_weights(self) -> tuple[str, ...]:
        """Where the weights are that `scores` reads."""
        own = ("head", "decoder") if self.config.decoder_bias or not self.config.tie_word_embeddings else ("head",)
        return (*own, WORDS) if self.config.tie_word_embeddings else own
