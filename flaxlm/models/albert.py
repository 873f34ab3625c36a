# SPDX-License-Identifier: Apache-2.0
"""ALBERT (Lan et al. 2020, arXiv:1909.11942): BERT, whose layers share their weights, and whose embeddings are small.

The layers fall into groups; those of a group are all the same, and may each be a few different ones in a row.
"""

import functools
from typing import ClassVar

import flax.linen as nn
import jax
from transformers import AlbertConfig

from flaxlm import attention, layers, positions
from flaxlm.models import bert

WORDS = "albert/embeddings/word_embeddings/embedding"


class AlbertAttention(nn.Module):
    """The first half of a layer: what tokens make of each other, the sum with what went in, normalised."""

    config: AlbertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask) -> jax.Array:
        config, dtype, (B, T, H) = self.config, self.compute.dtype, hidden_BTH.shape
        M = config.num_attention_heads
        init = nn.initializers.normal(config.initializer_range)
        dense = functools.partial(layers.Dense, H, dtype, kernel_init=init)
        query_BTME, key_BTME, value_BTME = (
            dense(name=name)(hidden_BTH).reshape(B, T, M, H // M) for name in ("query", "key", "value")
        )
        attend = attention.Attention(self.compute.attention, config.attention_probs_dropout_prob)
        attended_BTH = dense(name="dense")(attend(query_BTME, key_BTME, value_BTME, mask).reshape(B, T, H))
        attended_BTH = layers.Dropout(config.hidden_dropout_prob)(attended_BTH)
        return nn.LayerNorm(config.layer_norm_eps, dtype=dtype, name="LayerNorm")(attended_BTH + hidden_BTH)


class AlbertLayer(nn.Module):
    config: AlbertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask) -> jax.Array:
        config, dtype = self.config, self.compute.dtype
        init = nn.initializers.normal(config.initializer_range)
        hidden_BTH = AlbertAttention(config, self.compute, name="attention")(hidden_BTH, mask)
        fed_BTF = layers.Dense(config.intermediate_size, dtype, kernel_init=init, name="ffn")(hidden_BTH)
        fed_BTF = layers.ACTIVATIONS[config.hidden_act](fed_BTF)
        fed_BTH = layers.Dense(config.hidden_size, dtype, kernel_init=init, name="ffn_output")(fed_BTF)
        fed_BTH = layers.Dropout(config.hidden_dropout_prob)(fed_BTH)
        return nn.LayerNorm(config.layer_norm_eps, dtype=dtype, name="full_layer_layer_norm")(fed_BTH + hidden_BTH)


class AlbertGroup(nn.Module):
    """Layers one after the other, and all of them again, so many times in all: with other dropout each time."""

    config: AlbertConfig
    compute: layers.Compute
    num_times: int

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask) -> jax.Array:
        layer = functools.partial(AlbertLayer, self.config, self.compute)
        one_by_one = self.compute._replace(scan=False)
        albert_layers = layers.Layers(layer, self.config.inner_group_num, one_by_one, name="albert_layers")
        if not self.compute.scan:
            for _ in range(self.num_times):
                hidden_BTH = albert_layers(hidden_BTH, mask)
            return hidden_BTH

        def body(albert_layers: nn.Module, hidden_BTH: jax.Array, _: None) -> tuple[jax.Array, None]:
            return albert_layers(hidden_BTH, mask), None

        scan = functools.partial(nn.scan, variable_broadcast="params", split_rngs={"params": False, "dropout": True})
        return scan(body, length=self.num_times)(albert_layers, hidden_BTH, None)[0]


class AlbertGroups(nn.Module):
    config: AlbertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, mask: attention.Mask) -> jax.Array:
        num_layers, num_groups = self.config.num_hidden_layers, self.config.num_hidden_groups
        group_of_layer = [int(i / (num_layers / num_groups)) for i in range(num_layers)]
        for i in range(num_groups):
            hidden_BTH = AlbertGroup(self.config, self.compute, group_of_layer.count(i), name=str(i))(hidden_BTH, mask)
        return hidden_BTH


class AlbertEncoder(nn.Module):
    config: AlbertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTX: jax.Array, mask: attention.Mask) -> jax.Array:
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        widen = layers.Dense(config.hidden_size, self.compute.dtype, kernel_init=init, name="embedding_hidden_mapping_in")
        return AlbertGroups(config, self.compute, name="albert_layer_groups")(widen(hidden_BTX), mask)


class Albert(nn.Module):
    """Token ids to hidden states [B, T, H]."""

    config: AlbertConfig
    compute: layers.Compute
    has_pooler: bool

    def setup(self):
        self.embeddings = bert.BertEmbeddings(self.config, self.compute)
        self.encoder = AlbertEncoder(self.config, self.compute)
        if self.has_pooler:
            init = nn.initializers.normal(self.config.initializer_range)
            self.pooler = layers.Dense(self.config.hidden_size, self.compute.dtype, kernel_init=init)

    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array, token_type_ids_BT: jax.Array | None) -> jax.Array:
        if token_type_ids_BT is None:
            token_type_ids_BT = jax.numpy.zeros_like(input_ids_BT)
        hidden_BTX = self.embeddings(input_ids_BT, positions.within_segments(segment_ids_BT), token_type_ids_BT)
        return self.encoder(hidden_BTX, attention.Mask(segment_ids_BT, segment_ids_BT))


# ---- Heads -------------------------------------------------------------------------------------------------------------


class AlbertPredictions(nn.Module):
    """Scores of the vocabulary [..., V], by the table of embeddings or, where there is none to share, by a layer of its own."""

    config: AlbertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_XH: jax.Array, table_VH: jax.Array | None) -> jax.Array:
        config, dtype = self.config, self.compute.dtype
        init = nn.initializers.lecun_normal()
        hidden_XH = layers.Dense(config.embedding_size, dtype, kernel_init=init, name="dense")(hidden_XH)
        hidden_XH = layers.ACTIVATIONS[config.hidden_act](hidden_XH)
        hidden_XH = nn.LayerNorm(config.layer_norm_eps, dtype=dtype, name="LayerNorm")(hidden_XH)
        bias_V = self.param("bias", nn.initializers.zeros, (config.vocab_size,))
        if table_VH is not None:
            return layers.vocabulary_scores(self, hidden_XH, table_VH, bias_V)
        decoder = layers.Dense(config.vocab_size, dtype, use_bias=False, kernel_init=init, name="decoder")
        return layers.add_bias(decoder(hidden_XH), bias_V)


class AlbertOrder(nn.Module):
    """Scores of "in order" and "the other way round": [B, 2]."""

    config: AlbertConfig
    compute: layers.Compute

    @nn.compact
    def __call__(self, pooled_BH: jax.Array) -> jax.Array:
        pooled_BH = layers.Dropout(self.config.classifier_dropout_prob)(pooled_BH)
        init = nn.initializers.lecun_normal()
        return layers.Dense(2, self.compute.dtype, kernel_init=init, name="classifier")(pooled_BH)


class AlbertForMaskedLM(nn.Module):
    """Hidden states, and scores of the vocabulary from them."""

    config: AlbertConfig
    compute: layers.Compute = layers.Compute()

    has_pooler: ClassVar[bool] = False

    def setup(self):
        self.albert = Albert(self.config, self.compute, self.has_pooler)
        self.predictions = AlbertPredictions(self.config, self.compute)

    def __call__(
        self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array, token_type_ids_BT: jax.Array | None = None
    ) -> jax.Array:
        """[B, T, H]; tokens see those of the same segment, and 0 is padding."""
        hidden_BTH = self.albert(input_ids_BT, segment_ids_BT, token_type_ids_BT)
        if self.is_initializing():
            self.scores(hidden_BTH)
        return hidden_BTH

    def scores(self, hidden_XH: jax.Array) -> jax.Array:
        """[..., V]"""
        return self.predictions(hidden_XH, layers.weight_at(self, WORDS) if self.config.tie_word_embeddings else None)

    @property
    def head_weights(self) -> tuple[str, ...]:
        """Where the weights are that `scores` reads."""
        return ("predictions", WORDS) if self.config.tie_word_embeddings else ("predictions",)


class AlbertForPreTraining(AlbertForMaskedLM):
    """The same, and in which order two texts are."""

    has_pooler = True

    def setup(self):
        super().setup()
        self.sop_classifier = AlbertOrder(self.config, self.compute)

    def __call__(
        self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array, token_type_ids_BT: jax.Array | None = None
    ) -> jax.Array:
        hidden_BTH = super().__call__(input_ids_BT, segment_ids_BT, token_type_ids_BT)
        if self.is_initializing():
            self.next_sentence_scores(hidden_BTH)
        return hidden_BTH

    def next_sentence_scores(self, hidden_BTH: jax.Array) -> jax.Array:
        """Of "the second text follows the first" and "it comes before it": [B, 2]."""
        return self.sop_classifier(nn.tanh(self.albert.pooler(hidden_BTH[:, 0])))
