# SPDX-License-Identifier: Apache-2.0
"""Learning rate schedules and optimizers, and which weights they treat in which way."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import path_aware_map

from flaxlm import arguments, batches, cli

# ---- Learning rate -------------------------------------------------------------------------------------------------------


def make_learning_rate(training_args: arguments.TrainingArguments, plan: batches.Plan) -> optax.Schedule:
    """Linear warmup from 0, then what `lr_scheduler_type` says, which ends at `min_lr_ratio` of the peak at the last step.

    Update s (from 0) gets lr * s / warmup steps, so the first of a warmup changes nothing: as in the original scripts.
    The schedule takes a step or an array of them. GroupBERT (Chelombiev et al. 2021, arXiv:2106.05822) has a warmup along a
    square root, and goes down to 1e-7. inverse_sqrt: Vaswani et al. 2017, arXiv:1706.03762; warmup_stable_decay: Hu et al.
    2024, MiniCPM, arXiv:2404.06395.
    """
    kind, peak, num_warmup_steps = training_args.lr_scheduler_type, training_args.learning_rate, plan.num_warmup_steps
    end = training_args.min_lr_ratio * peak
    num_steps = max(plan.num_steps - num_warmup_steps, 1)  # behind the warmup; a run that only evaluates has none
    warmup = optax.linear_schedule(0.0, peak, num_warmup_steps)
    if kind == "cosine":
        decay = optax.cosine_decay_schedule(peak, num_steps, training_args.min_lr_ratio)
    elif training_args.groupbert_schedule:
        decay = optax.linear_schedule(peak, 1e-7, num_steps)
        warmup = lambda step: peak * jnp.sqrt(step / num_warmup_steps)  # noqa: E731
    elif kind == "polynomial":
        decay = optax.polynomial_schedule(peak, end, training_args.lr_power, num_steps)
    elif kind == "warmup_stable_decay":
        warmup = optax.linear_schedule(end, peak, num_warmup_steps)  # as in transformers, of this schedule only
        num_decay_steps = count_decay_steps(training_args, plan)
        decay = optax.linear_schedule(peak, end, num_decay_steps, transition_begin=num_steps - num_decay_steps)
    elif kind == "inverse_sqrt":
        timescale = num_warmup_steps or 10_000
        decay = lambda step: peak / jnp.sqrt(1 + jnp.maximum(step, 0) / timescale)  # noqa: E731
    else:
        decay = optax.linear_schedule(peak, end if kind == "linear" else peak, num_steps)
    return optax.join_schedules([warmup, decay], [num_warmup_steps]) if num_warmup_steps else decay


def count_decay_steps(training_args: arguments.TrainingArguments, plan: batches.Plan) -> int:
    """Steps in which warmup_stable_decay goes down, at the end of a run; refused if warmup and decay are longer than it."""
    num_decay_steps = training_args.num_decay_steps or max(math.ceil(plan.num_steps / 10), 1)
    if plan.num_steps and plan.num_warmup_steps + num_decay_steps > plan.num_steps:
        cli.fail(
            f"--num_decay_steps: a warmup of {plan.num_warmup_steps} and a decay of {num_decay_steps} steps do not fit into"
            f" {plan.num_steps} steps of training; lower one of them"
        )
    return num_decay_steps


# ---- Optimizers ----------------------------------------------------------------------------------------------------------


def decay_mask(params) -> Any:
    """Which arrays weight decay applies to: matrices and embeddings, not biases and norms (all of rank 1)."""
    return path_aware_map(lambda path, array: array.ndim >= 2 and path[-1] != "final_logits_bias", params)


def is_in_a_layer(path: tuple[str, ...], array: jax.Array) -> bool:
    """Is it a matrix of one of a model's layers, which have numbers in their paths? Heads and embeddings do not."""
    return array.ndim == 2 and path[-1] == "kernel" and any(name.isdecimal() for name in path)


def muon_mask(params) -> Any:
    """Which arrays Muon updates; AdamW has the others: embeddings, whatever is in a head, biases and norms."""
    return path_aware_map(is_in_a_layer, params)


def adam_mask(params) -> Any:
    """All the others."""
    return path_aware_map(lambda path, array: not is_in_a_layer(path, array), params)


MUON_MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5; five times, that takes singular values to about 0.7 to 1.2


def orthogonalize(matrix: jax.Array) -> jax.Array:
    """U V^T of a matrix U S V^T, roughly, by products only (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    As updates these have singular values of 1 whatever the matrix's shape. Times 0.2 sqrt(longer side) their root mean square
    is that of AdamW's updates, so that its learning rates and decay hold (Liu et al. 2025, Moonlight, arXiv:2502.16982).
    """
    linear, cubic, quintic = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix  # the squares below have the shorter side
    x /= jnp.maximum(jnp.linalg.norm(x), 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = linear * x + (cubic * square + quintic * square @ square) @ x
    return (x.T if is_tall else x) * (0.2 * math.sqrt(max(matrix.shape)))


def scale_by_muon() -> optax.GradientTransformation:
    """Nesterov's momentum, orthogonalised; of matrices only. A fused matrix, as GPT-2's c_attn, is taken as one."""
    orthogonal = optax.stateless(lambda updates, params: jax.tree.map(orthogonalize, updates))
    return optax.chain(optax.trace(MUON_MOMENTUM, nesterov=True), orthogonal)


def make_optimizer(
    training_args: arguments.TrainingArguments, learning_rate_fn: optax.Schedule
) -> optax.GradientTransformation:
    """The optimizer of --optim, behind the clipping of gradients to `max_grad_norm` if that is set.

    AdamW (Loshchilov & Hutter 2019), Adafactor (Shazeer & Stern 2018), LAMB (You et al. 2020, arXiv:1904.00962), Lion (Chen et
    al. 2023, arXiv:2302.06675) or Muon. The decay of all is decoupled and follows the learning rate; of optax's own
    Adafactor it would not. LAMB scales the update of each matrix to the matrix's norm; biases and norms, which are excluded
    from that as they are from decay, get Adam's update.
    """
    b1, b2, eps = training_args.adam_beta1, training_args.adam_beta2, training_args.adam_epsilon
    name, weight_decay = arguments.optimizer_of(training_args), training_args.weight_decay
    if name == "adafactor":
        optimizer = optax.chain(
            optax.adafactor(learning_rate=None),
            optax.add_decayed_weights(-weight_decay, mask=decay_mask),
            optax.scale_by_schedule(learning_rate_fn),
        )
    elif name == "lamb":
        correction = optax.scale_by_schedule(lambda count: (1 - b1 ** (count + 1)) / jnp.sqrt(1 - b2 ** (count + 1)))
        optimizer = optax.chain(
            optax.scale_by_adam(b1, b2, eps),
            correction if training_args.lamb_no_bias_correction else optax.identity(),  # what scale_by_adam corrected
            optax.add_decayed_weights(weight_decay, mask=decay_mask),
            optax.masked(optax.scale_by_trust_ratio(), decay_mask),
            optax.scale_by_learning_rate(learning_rate_fn),
        )
    elif name == "lion":
        optimizer = optax.lion(learning_rate_fn, b1, b2, weight_decay=weight_decay, mask=decay_mask)
    elif name == "muon":  # optax.contrib.muon would let norms and biases decay, and give the others Nesterov's Adam
        optimizer = optax.chain(
            optax.masked(scale_by_muon(), muon_mask),
            optax.masked(optax.scale_by_adam(b1, b2, eps), adam_mask),
            optax.add_decayed_weights(weight_decay, mask=decay_mask),
            optax.scale_by_learning_rate(learning_rate_fn),
        )
    else:
        optimizer = optax.adamw(learning_rate_fn, b1, b2, eps, weight_decay=weight_decay, mask=decay_mask)
    return clipping_first(optimizer, training_args.max_grad_norm) if training_args.max_grad_norm > 0 else optimizer


def clipping_first(optimizer: optax.GradientTransformation, max_norm: float) -> optax.GradientTransformation:
    """The optimizer of gradients that are clipped to a global norm; its state is the same as without."""
    clip = optax.clip_by_global_norm(max_norm)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        clipped, _ = clip.update(grads, optax.EmptyState())
        return optimizer.update(clipped, state, params)

    return optax.GradientTransformation(optimizer.init, update)
