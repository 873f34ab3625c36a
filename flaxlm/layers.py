# SPDX-License-Identifier: Apache-2.0
"""What models are made of, as it is fast: products and sums in an order that suits a CPU, dropout by hashing, stacks."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxlm import sharding


class Compute(NamedTuple):
    """How a model is computed; what it computes does not depend on it, but for rounding."""

    dtype: jnp.dtype = jnp.float32  # of activations; weights, norms and softmax are float32
    attention: str = "eager"  # implementation, see attention.Attention
    remat: bool = False  # layers are computed again in the backward pass, instead of keeping their activations
    scan: bool = False  # one program for all layers of a stack: it compiles faster, but moves weights and activations
    lean: bool = False  # layers keep only what they name for the backward pass, see `remember`


def platform() -> str:
    """Of the devices that a program is traced for, which need not be there; else of those that jax has here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


# ---- Products and sums -------------------------------------------------------------------------------------------------


def contract(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int, dtype: jnp.dtype) -> jax.Array:
    """Sums of products over an axis of each, in float32: asked for bfloat16 sums, XLA on a CPU converts the operands."""
    axes = ((left_axis,), (right_axis,)), ((), ())
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32).astype(dtype)


@jax.custom_vjp
def matmul(inputs: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    """inputs [..., D] @ kernel [D, F] in the type of the inputs, with the gradients in the order that is fast on a CPU."""
    return contract(inputs, kernel_DF.astype(inputs.dtype), inputs.ndim - 1, 0, inputs.dtype)


def matmul_bwd(residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    inputs, kernel_DF = residuals
    inputs_ND, cotangent_NF = inputs.reshape(-1, inputs.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    # One operand of the kernel's gradient is written transposed, with all that XLA fused into it: let it be the narrow one.
    widens = kernel_DF.shape[0] <= kernel_DF.shape[1]
    narrow_NX, wide_NY = (inputs_ND, cotangent_NF) if widens else (cotangent_NF, inputs_ND)
    narrow_XN = narrow_NX.T
    if narrow_NX.dtype == jnp.bfloat16:  # XLA would multiply a mere transpose in float32: a row of zeros makes it more
        narrow_XN = jnp.pad(narrow_XN, ((0, 1), (0, 0)))
    kernel_grad_XY = contract(narrow_XN, wide_NY, 1, 0, kernel_DF.dtype)[: narrow_NX.shape[1]]
    inputs_grad = contract(cotangent, kernel_DF.astype(cotangent.dtype), cotangent.ndim - 1, 1, inputs.dtype)
    return inputs_grad, kernel_grad_XY if widens else kernel_grad_XY.T


matmul.defvjp(lambda inputs, kernel_DF: (matmul(inputs, kernel_DF), (inputs, kernel_DF)), matmul_bwd)


def sum_rows(array: jax.Array) -> jax.Array:
    """The sum over the first axis, in float32: [N, ...] to [...].

    On a CPU it is a product with ones: of long rows XLA's own sum takes up to fifty times as long, a quarter of an MLM step.
    """
    if platform() != "cpu":
        return array.sum(0, dtype=jnp.float32)
    flat_NX = array.reshape(len(array), -1)
    return contract(jnp.ones((1, len(array)), array.dtype), flat_NX, 1, 0, jnp.float32).reshape(array.shape[1:])


@jax.custom_vjp
def add_bias(scores: jax.Array, bias_V: jax.Array) -> jax.Array:
    """scores [..., V] + bias [V] in the type of the scores."""
    return scores + bias_V.astype(scores.dtype)


def add_bias_bwd(bias_V: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    return cotangent, sum_rows(cotangent.reshape(-1, len(bias_V))).astype(bias_V.dtype)


add_bias.defvjp(lambda scores, bias_V: (add_bias(scores, bias_V), bias_V), add_bias_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def repeat_rows(array: jax.Array, num_rows: int) -> jax.Array:
    """[1, ...] to [num_rows, ...], with `sum_rows` as the gradient."""
    return jnp.broadcast_to(array, (num_rows, *array.shape[1:]))


def repeat_rows_bwd(num_rows: int, residuals: None, cotangent: jax.Array) -> tuple[jax.Array]:
    return (sum_rows(cotangent)[None].astype(cotangent.dtype),)


repeat_rows.defvjp(lambda array, num_rows: (repeat_rows(array, num_rows), None), repeat_rows_bwd)


def dropout(inputs: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Dropout by a hash of key and position instead of random bits, which are what it costs; `rate` in [0, 1).

    The hash is a 32-bit finalizer of the murmur family (Wellons 2018, "lowbias32"), keyed at its beginning and in the middle.
    It takes few operations that XLA fuses with their neighbours, in the backward pass again, so no mask is kept in memory.
    """
    key_data = jax.random.key_data(key)
    bits = jax.lax.iota(jnp.uint32, inputs.size).reshape(inputs.shape) + key_data[0]
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D) ^ key_data[1]
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    keep = bits ^ (bits >> 16) >= jnp.uint32(rate * 2**32)
    return jnp.where(keep, inputs / (1 - rate), 0).astype(inputs.dtype)


# ---- Modules -----------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def gelu_from_input(inputs: jax.Array) -> jax.Array:
    """GELU by the error function, whose backward pass begins with the inputs anew instead of keeping two arrays as large."""
    return nn.gelu(inputs, approximate=False)


def gelu_from_input_bwd(inputs: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    inputs = jax.lax.optimization_barrier(inputs)  # else XLA finds what the forward pass had, and keeps that
    return jax.vjp(functools.partial(nn.gelu, approximate=False), inputs)[1](cotangent)


gelu_from_input.defvjp(lambda inputs: (gelu_from_input(inputs), inputs), gelu_from_input_bwd)


def gelu(inputs: jax.Array) -> jax.Array:
    """x Phi(x) (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    # In float32 XLA computes more than that again by itself. Asked last: shapes are made before any device may be touched.
    if inputs.dtype == jnp.bfloat16 and platform() == "tpu":
        return gelu_from_input(inputs)
    return nn.gelu(inputs, approximate=False)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_new": nn.gelu,
    "gelu_fast": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": nn.tanh,
}


def product(module: nn.Module, inputs: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    """inputs [..., D] @ kernel [D, F] in the type of the inputs, within a module, by `matmul` where that is faster."""
    # When weights are made only shapes matter, and no device must be touched: the process may still fork.
    if module.is_initializing() or platform() != "cpu":
        return inputs @ kernel_DF.astype(inputs.dtype)
    return matmul(inputs, kernel_DF)


class Dense(nn.Module):
    """inputs [..., D] to [..., features] in `dtype`."""

    features: int
    dtype: jnp.dtype
    use_bias: bool = True
    kernel_init: Callable = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        kernel_DF = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features))
        outputs = product(self, inputs.astype(self.dtype), kernel_DF)
        if not self.use_bias:
            return outputs
        return outputs + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)


class RMSNorm(nn.Module):
    """Divide by the root of the mean square, then multiply by a weight (Zhang & Sennrich 2019, arXiv:1910.07467).

    `offset` is added to the weight, which then begins at 1 - offset: Gemma's is 1.
    """

    epsilon: float
    dtype: jnp.dtype
    offset: float = 0.0

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        weight_H = self.param("weight", nn.initializers.constant(1 - self.offset), (inputs.shape[-1],))
        inputs = inputs.astype(jnp.float32)
        inputs *= jax.lax.rsqrt(jnp.square(inputs).mean(-1, keepdims=True) + self.epsilon)
        return (inputs * (weight_H + self.offset)).astype(self.dtype)


class Dropout(nn.Module):
    """Dropout by hashing, in training, which is where there is a random key named "dropout"."""

    rate: float

    def __call__(self, inputs: jax.Array) -> jax.Array:
        if not self.rate or not self.has_rng("dropout"):
            return inputs
        return dropout(inputs, self.rate, self.make_rng("dropout"))


class Layers(nn.Module):
    """Layers that are alike, one after the other; their weights are named 0, 1, ... as they are in files.

    Attributes:
        layer: makes one of them: a module that takes hidden states, perhaps its share of `each`, and what all get, and
            returns the new hidden states.
        first: makes the first one, if that has other weights than the rest.
        drop_rate: share of the layers that are left out, at random, in training (Fan et al. 2020, arXiv:1909.11556).
    """

    layer: Callable[..., nn.Module]
    num_layers: int
    compute: Compute
    first: Callable[..., nn.Module] | None = None
    drop_rate: float = 0.0

    @nn.compact
    def __call__(self, hidden: jax.Array, *common: Any, each: Any = None) -> jax.Array:
        """`each` is a tree of arrays [layers, ...], of which each layer gets its part; None if there is none."""
        parts = [jax.tree.map(lambda array, i=i: array[i], each) for i in range(self.num_layers)]
        made = [(self.first if self.first and i == 0 else self.layer)(parent=None) for i in range(self.num_layers)]
        if self.is_initializing():
            for i, layer in enumerate(made):
                inputs = (hidden, *([] if each is None else [parts[i]]), *common)
                self.param(str(i), lambda rng, layer=layer, inputs=inputs: layer.init(rng, *inputs)["params"])
            return hidden

        def run(layer: nn.Module, hidden: jax.Array, params: Any, part: Any, rng: jax.Array | None) -> jax.Array:
            inputs = (hidden, *([] if part is None else [part]), *common)
            if rng is None:
                return layer.apply({"params": params}, *inputs)
            outputs = layer.apply({"params": params}, *inputs, rngs={"dropout": rng})
            if not self.drop_rate:
                return outputs
            return jnp.where(jax.random.bernoulli(jax.random.fold_in(rng, 1), self.drop_rate), hidden, outputs)

        params = [self.get_variable("params", str(i)) for i in range(self.num_layers)]
        rngs = [None] * self.num_layers
        if self.has_rng("dropout"):
            rngs = jax.random.split(self.make_rng("dropout"), self.num_layers)
        one_by_one = self.num_layers if not self.compute.scan else 1 if self.first else 0
        for i in range(one_by_one):
            step = remember(functools.partial(run, made[i]), self.compute, params[i])
            hidden = step(hidden, params[i], parts[i], rngs[i])
        if one_by_one == self.num_layers:
            return hidden

        def body(hidden: jax.Array, inputs: tuple) -> tuple[jax.Array, None]:
            return run(made[-1], hidden, *inputs), None

        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *params[one_by_one:])
        rest = jax.tree.map(lambda array: array[one_by_one:], each)
        body = remember(body, self.compute, stacked, prevent_cse=False)
        return jax.lax.scan(body, hidden, (stacked, rest, None if rngs[0] is None else rngs[one_by_one:]))[0]


# What policies of jax.checkpoint call results that are worth keeping for the backward pass:
KEPT = "attention"  # always
FED = "feed-forward"  # by `lean` layers


def remember(function: Callable, compute: Compute, params: Any, prevent_cse: bool = True) -> Callable:
    """A layer, and what its backward pass finds of it: all activations, with `remat` those that are named KEPT.

    With `lean` also those that are named FED. Weights that were gathered are gathered again. On a GPU it finds products of
    matrices, and what is named KEPT: the rest is soon computed again, and would take a third to a half of the memory. For
    TPUs XLA sees to that, and better.
    """
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(KEPT)
    if not compute.remat and platform() == "gpu":
        policy = policies.save_from_both_policies(policies.dots_saveable, policy)
    elif not compute.remat and compute.lean:
        policy = policies.save_only_these_names(KEPT, FED)
    elif not compute.remat and any(map(sharding.is_part, jax.tree.leaves(params, is_leaf=sharding.is_part))):
        policy = policies.save_anything_except_these_names(sharding.GATHERED)
    elif not compute.remat:
        return function
    return jax.checkpoint(function, prevent_cse=prevent_cse, policy=policy)


def weight_at(module: nn.Module, path: str) -> jax.Array:
    """A weight of a module or of one within it, by its path, as "embeddings/word_embeddings/embedding"."""
    return sharding.whole(functools.reduce(lambda tree, name: tree[name], path.split("/"), module.variables["params"]))


def vocabulary_scores(
    module: nn.Module, hidden_XH: jax.Array, table_VH: jax.Array, bias_V: jax.Array | None = None
) -> jax.Array:
    """Scores of a vocabulary by its table of embeddings, in the type of the hidden states, within a module: [..., V]."""
    scores_XV = product(module, hidden_XH, table_VH.T)
    return scores_XV if bias_V is None else add_bias(scores_XV, bias_V)


class VocabularyHead(nn.Module):
    """Scores of a vocabulary by its table of embeddings or, where there is none to share, by weights of its own: [..., V].

    Either way the bias, if there is one, is its own.
    """

    num_tokens: int
    dtype: jnp.dtype
    use_bias: bool = True
    kernel_init: Callable = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, hidden_XH: jax.Array, table_VH: jax.Array | None) -> jax.Array:
        bias_V = self.param("bias", nn.initializers.zeros, (self.num_tokens,)) if self.use_bias else None
        if table_VH is not None:
            return vocabulary_scores(self, hidden_XH, table_VH, bias_V)
        dense = Dense(self.num_tokens, self.dtype, use_bias=False, kernel_init=self.kernel_init)
        nn.share_scope(self, dense)
        scores_XV = dense(hidden_XH)
        return scores_XV if bias_V is None else add_bias(scores_XV, bias_V)
