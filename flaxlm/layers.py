# SPDX-License-Identifier: Apache-2.0
"""Layers as they are fast: products and sums in the order that suits a CPU, dropout by hashing."""

import functools

import jax
import jax.numpy as jnp


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
    if jax.default_backend() != "cpu":
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
