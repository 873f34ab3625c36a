# SPDX-License-Identifier: Apache-2.0
"""BERT (Devlin et al. 2019, arXiv:1810.04805), and BigBird with full attention, which is BERT with other numbers.

An encoder with learned positions, and norms after each half of a layer. As a causal model a token sees only those before it.
"""

import functools
from typing import ClassVar

import flax.linen as nn
import jax
from transformers import BertConfig

from flaxlm import attention, layers, positions

WORDS = "bert/embeddings/word_embeddings/embedding"


def embedding_size(config: BertConfig) -> int:
    """Size of the embeddings, which ALBERT, ELECTRA and RoFormer have apart from that of the hidden states."""
    return config.embedding_size if config.model_type in ("albert", "electra", "roformer") else config.hidden_size


class BertEmbeddings(nn.Module):
    """What a token is, where it stands and in which of two texts, summed: [B, T, H]."""

    config: BertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, input_ids_BT: jax.Array, position_ids_BT: jax.Array, token_type_ids_BT: jax.Array) -> jax.Array:
        config, dtype = self.config, self.compute.dtype
        init = nn.initializers.normal(config.initializer_range)
        embed = functools.partial(nn.Embed, features=embedding_size(config), embedding_init=init, dtype=dtype)
        words_BTH = embed(config.vocab_size, name="word_embeddings")(input_ids_BT)
        if config.model_type == "big_bird" and config.rescale_embeddings:
            words_BTH *= config.hidden_size**0.5
        hidden_BTH = (
            words_BTH
            + embed(config.type_vocab_size, name="token_type_embeddings")(token_type_ids_BT)
            + embed(config.max_position_embeddings, name="position_embeddings")(position_ids_BT)
        )
        norm = nn.LayerNorm(config.layer_norm_eps, dtype=dtype, name="LayerNorm")
        dropout = layers.Dropout(config.hidden_dropout_prob)
        return norm(dropout(hidden_BTH)) if config.model_type == "big_bird" else dropout(norm(hidden_BTH))


class BertSelfAttention(nn.Module):
    """Queries, keys and values of all heads, and what they make of each other: [B, T, H]."""

    config: BertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask) -> jax.Array:
        config, (B, T, H) = self.config, hidden_BTH.shape
        M = config.num_attention_heads
        init = nn.initializers.normal(config.initializer_range)
        use_bias = config.model_type != "big_bird" or config.use_bias
        dense = functools.partial(layers.Dense, H, self.compute.dtype, use_bias, init)
        query_BTME, key_BTME, value_BTME = (
            dense(name=name)(hidden_BTH).reshape(B, T, M, H // M) for name in ("query", "key", "value")
        )
        attend = attention.Attention(self.compute.attention, config.attention_probs_dropout_prob)
        return attend(query_BTME, key_BTME, value_BTME, mask).reshape(B, T, H)


class BertOutput(nn.Module):
    """Back to the hidden size, dropout, and the sum with what went in, normalised: the end of both halves of a layer."""

    config: BertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTF: jax.Array, residual_BTH: jax.Array) -> jax.Array:
        config, dtype = self.config, self.compute.dtype
        init = nn.initializers.normal(config.initializer_range)
        hidden_BTH = layers.Dense(config.hidden_size, dtype, kernel_init=init, name="dense")(hidden_BTF)
        hidden_BTH = layers.Dropout(config.hidden_dropout_prob)(hidden_BTH)
        return nn.LayerNorm(config.layer_norm_eps, dtype=dtype, name="LayerNorm")(hidden_BTH + residual_BTH)


class BertAttention(nn.Module):
    config: BertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask) -> jax.Array:
        attended_BTH = BertSelfAttention(self.config, self.compute, name="self")(hidden_BTH, mask)
        return BertOutput(self.config, self.compute, name="output")(attended_BTH, hidden_BTH)


class BertIntermediate(nn.Module):
    config: BertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array) -> jax.Array:
        init = nn.initializers.normal(self.config.initializer_range)
        dense = layers.Dense(self.config.intermediate_size, self.compute.dtype, kernel_init=init, name="dense")
        return layers.ACTIVATIONS[self.config.hidden_act](dense(hidden_BTH))


class BertLayer(nn.Module):
    config: BertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask) -> jax.Array:
        hidden_BTH = BertAttention(self.config, self.compute, name="attention")(hidden_BTH, mask)
        hidden_BTF = BertIntermediate(self.config, self.compute, name="intermediate")(hidden_BTH)
        return BertOutput(self.config, self.compute, name="output")(hidden_BTF, hidden_BTH)


class BertEncoder(nn.Module):
    config: BertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask) -> jax.Array:
        layer = functools.partial(BertLayer, self.config, self.compute)
        return layers.Layers(layer, self.config.num_hidden_layers, self.compute, name="layer")(hidden_BTH, mask)


class BertPooler(nn.Module):
    """One vector for a row, from that of its first token: [B, H]."""

    config: BertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array) -> jax.Array:
        init = nn.initializers.normal(self.config.initializer_range)
        dense = layers.Dense(self.config.hidden_size, self.compute.dtype, kernel_init=init, name="dense")
        return nn.tanh(dense(hidden_BTH[:, 0]))


class BigBirdPooler(nn.Module):
    """The same, whose weights are in no layer of their own."""

    config: BertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array) -> jax.Array:
        init = nn.initializers.normal(self.config.initializer_range)
        dense = layers.Dense(self.config.hidden_size, self.compute.dtype, kernel_init=init)
        nn.share_scope(self, dense)
        return nn.tanh(dense(hidden_BTH[:, 0]))


class Bert(nn.Module):
    """Token ids to hidden states [B, T, H]."""

    config: BertConfig
    compute: layers.Compute
    is_causal: bool
    pooler_class: type[nn.Module] | None = None

    def setup(self):
        self.embeddings = BertEmbeddings(self.config, self.compute)
        self.encoder = BertEncoder(self.config, self.compute)
        if self.pooler_class:
            self.pooler = self.pooler_class(self.config, self.compute)

    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array, token_type_ids_BT: jax.Array | None) -> jax.Array:
        if token_type_ids_BT is None:
            token_type_ids_BT = jax.numpy.zeros_like(input_ids_BT)
        hidden_BTH = self.embeddings(input_ids_BT, positions.within_segments(segment_ids_BT), token_type_ids_BT)
        return self.encoder(hidden_BTH, attention.Mask(segment_ids_BT, segment_ids_BT, self.is_causal))


# ---- Heads -------------------------------------------------------------------------------------------------------------


class BertTransform(nn.Module):
    config: BertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_XH: jax.Array) -> jax.Array:
        config, dtype = self.config, self.compute.dtype
        init = nn.initializers.normal(config.initializer_range)
        hidden_XH = layers.Dense(embedding_size(config), dtype, kernel_init=init, name="dense")(hidden_XH)
        hidden_XH = layers.ACTIVATIONS[config.hidden_act](hidden_XH)
        return nn.LayerNorm(config.layer_norm_eps, dtype=dtype, name="LayerNorm")(hidden_XH)


class BertPredictions(nn.Module):
    """Scores of the vocabulary [..., V], by the table of embeddings or, where there is none to share, by a layer of its own."""

    config: BertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_XH: jax.Array, table_VH: jax.Array | None) -> jax.Array:
        config = self.config
        hidden_XH = BertTransform(config, self.compute, name="transform")(hidden_XH)
        bias_V = self.param("bias", nn.initializers.zeros, (config.vocab_size,))
        if table_VH is not None:
            return layers.vocabulary_scores(self, hidden_XH, table_VH, bias_V)
        init = nn.initializers.normal(config.initializer_range)
        decoder = layers.Dense(config.vocab_size, self.compute.dtype, use_bias=False, kernel_init=init, name="decoder")
        return layers.add_bias(decoder(hidden_XH), bias_V)


class BertHeads(nn.Module):
    config: BertConfig
    compute: layers.Compute
    with_next_sentence: bool

    def setup(self):
        self.predictions = BertPredictions(self.config, self.compute)
        if self.with_next_sentence:
            init = nn.initializers.normal(self.config.initializer_range)
            self.seq_relationship = layers.Dense(2, self.compute.dtype, kernel_init=init)


class BertForMaskedLM(nn.Module):
    """Hidden states, and scores of the vocabulary from them."""

    config: BertConfig
    compute: layers.Compute = layers.Compute()

    is_causal: ClassVar[bool] = False
    pooler_class: ClassVar[type[nn.Module] | None] = None

    def setup(self):
        is_causal = self.is_causal or self.config.is_decoder
        self.bert = Bert(self.config, self.compute, is_causal, self.pooler_class)
        self.cls = BertHeads(self.config, self.compute, self.pooler_class is not None)

    def __call__(
        self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array, token_type_ids_BT: jax.Array | None = None
    ) -> jax.Array:
        """[B, T, H]; tokens see those of the same segment, and 0 is padding."""
        hidden_BTH = self.bert(input_ids_BT, segment_ids_BT, token_type_ids_BT)
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


class BertLMHeadModel(BertForMaskedLM):
    """The same, where a token sees only those before it."""

    is_causal = True


class BertForPreTraining(BertForMaskedLM):
    """The same, and whether the second of two texts follows the first."""

    pooler_class = BertPooler

    def __call__(
        self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array, token_type_ids_BT: jax.Array | None = None
    ) -> jax.Array:
        hidden_BTH = super().__call__(input_ids_BT, segment_ids_BT, token_type_ids_BT)
        if self.is_initializing():
            self.next_sentence_scores(hidden_BTH)
        return hidden_BTH

    def next_sentence_scores(self, hidden_BTH: jax.Array) -> jax.Array:
        """Of "it follows" and "it is another": [B, 2]."""
        return self.cls.seq_relationship(self.bert.pooler(hidden_BTH))


class BigBirdForMaskedLM(BertForMaskedLM):
    """BERT, but that embeddings may be multiplied by a number, and queries, keys and values be without bias."""


class BigBirdForCausalLM(BertLMHeadModel):
    """The same, where a token sees only those before it."""


class BigBirdForPreTraining(BertForPreTraining):
    """The same, and whether the second of two texts follows the first."""

    pooler_class = BigBirdPooler
