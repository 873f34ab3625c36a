# SPDX-License-Identifier: Apache-2.0
"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

A decoder with learned positions, and norms before each half of a layer.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from transformers import GPT2Config

from flaxlm import attention, layers, positions

WORDS = "transformer/wte/embedding"


class Conv1D(nn.Module):
    """A dense layer, inputs [..., D] to [..., features], whose kernel is [features, D]: so files of GPT-2 have it in Flax."""

    features: int
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        kernel_FD = self.param("kernel", self.kernel_init, (self.features, inputs.shape[-1]))
        bias_F = self.param("bias", nn.initializers.zeros, (self.features,))
        return layers.product(self, inputs.astype(self.dtype), kernel_FD.T) + bias_F.astype(self.dtype)


class GPT2Attention(nn.Module):
    """What a token makes of those before it: [B, T, H]."""

    config: GPT2Config
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, scale: jax.Array, mask: attention.Mask) -> jax.Array:
        config, dtype, (B, T, H) = self.config, self.compute.dtype, hidden_BTH.shape
        M = config.num_attention_heads
        init = nn.initializers.normal(config.initializer_range)
        hidden_BTF = Conv1D(3 * H, dtype, init, name="c_attn")(hidden_BTH)
        query_BTME, key_BTME, value_BTME = (part.reshape(B, T, M, H // M) for part in jnp.split(hidden_BTF, 3, axis=-1))
        attend = attention.Attention(self.compute.attention, config.attn_pdrop, scale=1.0)
        attended_BTME = attend(query_BTME * jnp.asarray(scale, dtype), key_BTME, value_BTME, mask)
        hidden_BTH = Conv1D(H, dtype, init, name="c_proj")(attended_BTME.reshape(B, T, H))
        return layers.Dropout(config.resid_pdrop)(hidden_BTH)


class GPT2MLP(nn.Module):
    config: GPT2Config
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array) -> jax.Array:
        config, dtype, H = self.config, self.compute.dtype, hidden_BTH.shape[-1]
        init = nn.initializers.normal(config.initializer_range)
        hidden_BTF = Conv1D(4 * H if config.n_inner is None else config.n_inner, dtype, init, name="c_fc")(hidden_BTH)
        hidden_BTF = layers.ACTIVATIONS[config.activation_function](hidden_BTF)
        return layers.Dropout(config.resid_pdrop)(Conv1D(H, dtype, init, name="c_proj")(hidden_BTF))


class GPT2Block(nn.Module):
    """A layer; `scale` is that of its attention scores."""

    config: GPT2Config
    compute: layers.Compute

    @nn.compact
    def __call__(self, hidden_BTH: jax.Array, scale: jax.Array, mask: attention.Mask) -> jax.Array:
        norm = functools.partial(nn.LayerNorm, self.config.layer_norm_epsilon, dtype=self.compute.dtype)
        hidden_BTH += GPT2Attention(self.config, self.compute, name="attn")(norm(name="ln_1")(hidden_BTH), scale, mask)
        return hidden_BTH + GPT2MLP(self.config, self.compute, name="mlp")(norm(name="ln_2")(hidden_BTH))


class GPT2(nn.Module):
    """Token ids to hidden states [B, T, H]."""

    config: GPT2Config
    compute: layers.Compute

    @nn.compact
    def __call__(self, input_ids_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        config, dtype = self.config, self.compute.dtype
        init = nn.initializers.normal(config.initializer_range)
        embed = functools.partial(nn.Embed, features=config.hidden_size, embedding_init=init, dtype=dtype)
        words_BTH = embed(config.vocab_size, name="wte")(input_ids_BT)
        places_BTH = embed(config.max_position_embeddings, name="wpe")(positions.within_segments(segment_ids_BT))
        hidden_BTH = layers.Dropout(config.embd_pdrop)(words_BTH + places_BTH)
        layer = functools.partial(GPT2Block, config, self.compute)
        stack = layers.Layers(layer, config.num_hidden_layers, self.compute, name="h")
        mask = attention.Mask(segment_ids_BT, segment_ids_BT, is_causal=True)
        hidden_BTH = stack(hidden_BTH, mask, each=attention_scales(config))
        return nn.LayerNorm(config.layer_norm_epsilon, dtype=dtype, name="ln_f")(hidden_BTH)


def attention_scales(config: GPT2Config) -> np.ndarray:
    """By how much the scores of each layer are scaled: float32 [layers]."""
    scales = np.ones(config.num_hidden_layers, np.float32)
    if config.scale_attn_weights:
        scales /= np.sqrt(config.hidden_size // config.num_attention_heads)
    if config.scale_attn_by_inverse_layer_idx:
        scales /= np.arange(config.num_hidden_layers) + 1
    return scales


class GPT2LMHeadModel(nn.Module):
    """Hidden states, and scores of the vocabulary from them."""

    config: GPT2Config
    compute: layers.Compute = layers.Compute()

    def setup(self):
        self.transformer = GPT2(self.config, self.compute)
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
