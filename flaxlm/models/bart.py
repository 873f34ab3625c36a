# SPDX-License-Identifier: Apache-2.0
"""BART (Lewis et al. 2019, arXiv:1910.13461) and what was made from it: mBART, Pegasus, Marian, Blenderbot.

An encoder and a decoder, or the decoder alone as a causal model, or both as a masked model. The types differ in where norms
are and in what tells positions; `Variant` says how.

S tokens of the encoder, T of the decoder or of either; B, H, V, M and E as elsewhere, F numbers within feed-forward layers.
"""

import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from transformers import BartConfig

from flaxlm import attention, layers, positions

EPSILON = 1e-5  # of all norms


class Variant(NamedTuple):
    """What the types differ in; the defaults are BART's."""

    norm_first: bool = False  # norms are before each part of a layer and after the last layer, not after each part
    norm_embeddings: bool = True
    norm_words: bool = False  # in the decoder only words are normed, without `scale_embedding`; then come positions
    position_offset: int | None = 2  # unused rows before those of a learned table of positions; None: sinusoids


class BartAttention(nn.Module):
    """What queries make of what keys and values come from, which are the same tokens or those of the encoder: [B, T, H]."""

    config: BartConfig
    compute: layers.Compute
    num_heads: int

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, memory_BSH: jax.Array, mask: attention.Mask) -> jax.Array:
        (B, T, H), M = hidden_BTH.shape, self.num_heads
        init = nn.initializers.normal(self.config.init_std)
        dense = functools.partial(layers.Dense, H, self.compute.dtype, kernel_init=init)
        query_BTME = dense(name="q_proj")(hidden_BTH).reshape(B, T, M, H // M)
        key_BSME, value_BSME = (dense(name=name)(memory_BSH).reshape(B, -1, M, H // M) for name in ("k_proj", "v_proj"))
        attend = attention.Attention(self.compute.attention, self.config.attention_dropout)
        return dense(name="out_proj")(attend(query_BTME, key_BSME, value_BSME, mask).reshape(B, T, H))


class BartLayer(nn.Module):
    """Self-attention, in the decoder attention to the encoder's hidden states (its `memory`), and a feed-forward layer."""

    config: BartConfig
    compute: layers.Compute
    variant: Variant
    side: str  # encoder or decoder

    @nn.compact
    def __call__(
        self, hidden_BTH: jax.Array, mask: attention.Mask, memory_BSH: jax.Array | None, memory_mask: attention.Mask | None
    ) -> jax.Array:
        num_heads = getattr(self.config, f"{self.side}_attention_heads")
        attend = BartAttention(self.config, self.compute, num_heads, name="self_attn")
        hidden_BTH = self.add(lambda inputs_BTH: attend(inputs_BTH, inputs_BTH, mask), hidden_BTH, "self_attn_layer_norm")
        if self.side == "decoder" and memory_BSH is None and self.is_initializing():
            memory_BSH, memory_mask = hidden_BTH, mask  # a decoder alone has these weights too, and no use for them
        if memory_BSH is not None:
            attend = BartAttention(self.config, self.compute, num_heads, name="encoder_attn")
            look = functools.partial(attend, memory_BSH=memory_BSH, mask=memory_mask)
            hidden_BTH = self.add(look, hidden_BTH, "encoder_attn_layer_norm")
        return self.add(self.feed_forward, hidden_BTH, "final_layer_norm")

    def add(self, part: Callable[[jax.Array], jax.Array], hidden_BTH: jax.Array, norm_name: str) -> jax.Array:
        """The hidden states and what a part of the layer makes of them, with dropout, and with the norm where it belongs."""
        norm = nn.LayerNorm(EPSILON, dtype=self.compute.dtype, name=norm_name)
        dropout = layers.Dropout(self.config.dropout)
        if self.variant.norm_first:
            return hidden_BTH + dropout(part(norm(hidden_BTH)))
        return norm(hidden_BTH + dropout(part(hidden_BTH)))

    def feed_forward(self, hidden_BTH: jax.Array) -> jax.Array:
        """Wider, through the activation, and back."""
        config, dtype = self.config, self.compute.dtype
        init = nn.initializers.normal(config.init_std)
        ffn_dim = getattr(config, f"{self.side}_ffn_dim")
        hidden_BTF = checkpoint_name(layers.Dense(ffn_dim, dtype, kernel_init=init, name="fc1")(hidden_BTH), layers.FED)
        hidden_BTF = layers.Dropout(config.activation_dropout)(layers.ACTIVATIONS[config.activation_function](hidden_BTF))
        return checkpoint_name(layers.Dense(config.d_model, dtype, kernel_init=init, name="fc2")(hidden_BTF), layers.FED)


class BartStack(nn.Module):
    """Encoder or decoder: embedded words to hidden states [B, T, H]."""

    config: BartConfig
    compute: layers.Compute
    variant: Variant
    side: str

    def setup(self):
        config, compute, variant = self.config, self.compute, self.variant
        if variant.position_offset is not None:
            self.embed_positions = embedding(config, compute, config.max_position_embeddings + variant.position_offset)
        if variant.norm_embeddings:
            self.layernorm_embedding = nn.LayerNorm(EPSILON, dtype=compute.dtype)
        self.dropout = layers.Dropout(config.dropout)
        layer = functools.partial(BartLayer, config, compute, variant, self.side)
        num_layers, drop_rate = (getattr(config, f"{self.side}_{name}") for name in ("layers", "layerdrop"))
        self.layers = layers.Layers(layer, num_layers, compute, drop_rate=drop_rate)
        if variant.norm_first:
            self.layer_norm = nn.LayerNorm(EPSILON, dtype=compute.dtype)

    def __call__(
        self,
        words_BTH: jax.Array,
        segment_ids_BT: jax.Array,
        memory_BSH: jax.Array | None = None,
        memory_segment_ids_BS: jax.Array | None = None,
    ) -> jax.Array:
        hidden_BTH = self.dropout(self.add_positions(words_BTH, segment_ids_BT))
        mask = attention.Mask(segment_ids_BT, segment_ids_BT, self.side == "decoder")
        memory_mask = None if memory_BSH is None else attention.Mask(segment_ids_BT, memory_segment_ids_BS)
        hidden_BTH = self.layers(hidden_BTH, mask, memory_BSH, memory_mask)
        return self.layer_norm(hidden_BTH) if self.variant.norm_first else hidden_BTH

    def add_positions(self, words_BTH: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """Words and where they stand, normed or not: [B, T, H]."""
        positions_BT = positions.within_segments(segment_ids_BT)
        if self.variant.position_offset is None:
            sinusoids_TH = positions.sinusoids(*words_BTH.shape[1:])
            positions_BTH = jnp.asarray(sinusoids_TH, self.compute.dtype)[positions_BT]
        else:
            positions_BTH = self.embed_positions(positions_BT + self.variant.position_offset)
        if self.variant.norm_words and self.side == "decoder":
            return self.layernorm_embedding(words_BTH) + positions_BTH
        scale = self.config.d_model**0.5 if self.config.scale_embedding else 1
        hidden_BTH = words_BTH * scale + positions_BTH
        return self.layernorm_embedding(hidden_BTH) if self.variant.norm_embeddings else hidden_BTH


class BartModel(nn.Module):
    """Ids of the encoder to its hidden states [B, S, H]; with these, ids of the decoder to its own [B, T, H]."""

    config: BartConfig
    compute: layers.Compute
    variant: Variant

    def setup(self):
        self.shared = embedding(self.config, self.compute, self.config.vocab_size)
        self.encoder = BartStack(self.config, self.compute, self.variant, "encoder")
        self.decoder = BartStack(self.config, self.compute, self.variant, "decoder")

    def encode(self, input_ids_BS: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
        return self.encoder(self.shared(input_ids_BS), segment_ids_BS)

    def decode(
        self,
        decoder_input_ids_BT: jax.Array,
        decoder_segment_ids_BT: jax.Array,
        memory_BSH: jax.Array,
        segment_ids_BS: jax.Array,
    ) -> jax.Array:
        return self.decoder(self.shared(decoder_input_ids_BT), decoder_segment_ids_BT, memory_BSH, segment_ids_BS)


def embedding(config: BartConfig, compute: layers.Compute, num_rows: int) -> nn.Embed:
    """A table of rows, each as long as hidden states are."""
    init = nn.initializers.normal(config.init_std)
    return nn.Embed(num_rows, config.d_model, embedding_init=init, dtype=compute.dtype)


def own_head(config: BartConfig, compute: layers.Compute) -> layers.Dense | None:
    """A head that has weights of its own; None where it has those of the words."""
    if config.tie_word_embeddings:
        return None
    init = nn.initializers.normal(config.init_std)
    return layers.Dense(config.vocab_size, compute.dtype, use_bias=False, kernel_init=init)


# ---- Encoder and decoder -----------------------------------------------------------------------------------------------


class BartForConditionalGeneration(nn.Module):
    """Hidden states of the decoder, and scores of the vocabulary from them."""

    config: BartConfig
    compute: layers.Compute = layers.Compute()

    variant: ClassVar[Variant] = Variant()

    def setup(self):
        self.model = BartModel(self.config, self.compute, self.variant)
        self.lm_head = own_head(self.config, self.compute)
        self.final_logits_bias = self.param("final_logits_bias", nn.initializers.zeros, (1, self.config.vocab_size))

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
        return self.model.encode(input_ids_BS, segment_ids_BS)

    def decode(
        self,
        decoder_input_ids_BT: jax.Array,
        decoder_segment_ids_BT: jax.Array,
        memory_BSH: jax.Array,
        segment_ids_BS: jax.Array,
    ) -> jax.Array:
        """[B, T, H]"""
        return self.model.decode(decoder_input_ids_BT, decoder_segment_ids_BT, memory_BSH, segment_ids_BS)

    def scores(self, hidden_XH: jax.Array) -> jax.Array:
        """[..., V]; the bias is not trained."""
        bias_V = jax.lax.stop_gradient(self.final_logits_bias[0])
        if self.lm_head is None:
            return layers.vocabulary_scores(self, hidden_XH, self.model.shared.embedding, bias_V)
        return layers.add_bias(self.lm_head(hidden_XH), bias_V)

    @property
    def head_weights(self) -> tuple[str, ...]:
        """Where the weights are that `scores` reads."""
        return ("final_logits_bias", "model/shared/embedding" if self.config.tie_word_embeddings else "lm_head")


class MBartForConditionalGeneration(BartForConditionalGeneration):
    """BART of many languages (Liu et al. 2020, arXiv:2001.08210)."""

    variant = Variant(norm_first=True)


class PegasusForConditionalGeneration(BartForConditionalGeneration):
    """For summaries (Zhang et al. 2019, arXiv:1912.08777)."""

    variant = Variant(norm_first=True, norm_embeddings=False, position_offset=None)


class MarianMTModel(BartForConditionalGeneration):
    """For translations (Junczys-Dowmunt et al. 2018, arXiv:1804.00344)."""

    variant = Variant(norm_embeddings=False, position_offset=None)


class BlenderbotForConditionalGeneration(BartForConditionalGeneration):
    """For conversations (Roller et al. 2020, arXiv:2004.13637)."""

    variant = Variant(norm_first=True, norm_embeddings=False, position_offset=0)


class BlenderbotSmallForConditionalGeneration(BartForConditionalGeneration):
    """The smallest Blenderbot, which is built otherwise."""

    variant = Variant(norm_words=True, position_offset=0)


# ---- The decoder alone ---------------------------------------------------------------------------------------------------


class BartDecoder(BartStack):
    """The decoder with a table of words of its own: ids to hidden states [B, T, H]."""

    def setup(self):
        super().setup()
        self.embed_tokens = embedding(self.config, self.compute, self.config.vocab_size)

    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        return super().__call__(self.embed_tokens(input_ids_BT), segment_ids_BT)


class BartDecoderModel(nn.Module):
    config: BartConfig
    compute: layers.Compute

    def setup(self):
        self.decoder = BartDecoder(self.config, self.compute, Variant(), "decoder")

    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        return self.decoder(input_ids_BT, segment_ids_BT)


class BartForCausalLM(nn.Module):
    """Hidden states of BART's decoder, which has nothing to look at but what it has written, and scores from them."""

    config: BartConfig
    compute: layers.Compute = layers.Compute()

    def setup(self):
        self.model = BartDecoderModel(self.config, self.compute)
        self.lm_head = own_head(self.config, self.compute)

    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """[B, T, H]; tokens see those of the same segment before them, and 0 is padding."""
        hidden_BTH = self.model(input_ids_BT, segment_ids_BT)
        if self.is_initializing():
            self.scores(hidden_BTH)
        return hidden_BTH

    def scores(self, hidden_XH: jax.Array) -> jax.Array:
        """[..., V]"""
        if self.lm_head is None:
            return layers.vocabulary_scores(self, hidden_XH, self.model.decoder.embed_tokens.embedding)
        return self.lm_head(hidden_XH)

    @property
    def head_weights(self) -> tuple[str, ...]:
        """Where the weights are that `scores` reads."""
        return ("model/decoder/embed_tokens/embedding",) if self.config.tie_word_embeddings else ("lm_head",)


# ---- As a masked model ---------------------------------------------------------------------------------------------------


class BartForMaskedLM(BartForConditionalGeneration):
    """BART whose decoder reads what the encoder reads, shifted by one; PyTorch's class does so if it gets ids of one side."""

    pytorch_class = "BartForConditionalGeneration"

    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """[B, T, H]"""
        begins_BT = positions.within_segments(segment_ids_BT) == 0
        decoder_input_ids_BT = jnp.where(
            begins_BT, self.first_ids(input_ids_BT, segment_ids_BT), jnp.roll(input_ids_BT, 1, axis=1)
        )
        return super().__call__(input_ids_BT, segment_ids_BT, decoder_input_ids_BT, segment_ids_BT)

    def first_ids(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array | int:
        """What the decoder reads first, of the text that a token is in."""
        return self.config.decoder_start_token_id


class MBartForMaskedLM(BartForMaskedLM):
    """mBART likewise; its decoder begins with the last token of the text, which says its language."""

    pytorch_class = "MBartForConditionalGeneration"
    variant = MBartForConditionalGeneration.variant

    def first_ids(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """The last id of each segment, at all its tokens."""
        index_T = jnp.arange(input_ids_BT.shape[1])
        ends_BT = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (0, 1)), constant_values=True)
        last_BT = jax.lax.cummin(jnp.where(ends_BT, index_T, len(index_T)), axis=1, reverse=True)
        return jnp.take_along_axis(input_ids_BT, last_BT, axis=1)
