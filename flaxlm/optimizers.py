# SPDX-License-Identifier: Apache-2.0
"""Learning rate schedules and optimizers, and which weights decay."""

from typing import Any

import jax.numpy as jnp
import optax
from flax.traverse_util import path_aware_map

from flaxlm import arguments, batches


def make_learning_rate(training_args: arguments.TrainingArguments, plan: batches.Plan) -> optax.Schedule:
    """Linear warmup from 0, then the decay of `lr_scheduler_type` to 0 at the last step.

    Update s (from 0) gets lr * s / warmup steps, so the first of a warmup changes nothing: as in the original scripts.
    GroupBERT (Chelombiev et al. 2021, arXiv:2106.05822) has the square root of that, and goes down to 1e-7.
    """
    peak, num_decay_steps = training_args.learning_rate, plan.num_steps - plan.num_warmup_steps
    warmup = optax.linear_schedule(0.0, peak, plan.num_warmup_steps)
    if training_args.lr_scheduler_type == "cosine":
        decay = optax.cosine_decay_schedule(peak, num_decay_steps)
    elif training_args.groupbert_schedule:
        decay = optax.linear_schedule(peak, 1e-7, num_decay_steps)
        warmup = lambda step: peak * jnp.sqrt(step / plan.num_warmup_steps)  # noqa: E731
    else:
        decay = optax.linear_schedule(peak, 0.0 if training_args.lr_scheduler_type == "linear" else peak, num_decay_steps)
    return optax.join_schedules([warmup, decay], [plan.num_warmup_steps]) if plan.num_warmup_steps else decay


def decay_mask(params) -> Any:
    """Which arrays weight decay applies to: matrices and embeddings, not biases and norms (all of rank 1)."""
    return path_aware_map(lambda path, array: array.ndim >= 2 and path[-1] != "final_logits_bias", params)


def make_optimizer(
    training_args: arguments.TrainingArguments, learning_rate_fn: optax.Schedule
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019), Adafactor (Shazeer & Stern 2018) or LAMB (You et al. 2020, arXiv:1904.00962).

    Gradients are clipped to `max_grad_norm` if that is set. Adafactor's decay is decoupled and follows the learning rate, as
    AdamW's does; optax's own would not. LAMB scales the update of each matrix to the matrix's norm; biases and norms, which
    are excluded from that as they are from decay, get Adam's update.
    """
    b1, b2, eps = training_args.adam_beta1, training_args.adam_beta2, training_args.adam_epsilon
    if training_args.adafactor:
        optimizer = optax.chain(
            optax.adafactor(learning_rate=None),
            optax.add_decayed_weights(-training_args.weight_decay, mask=decay_mask),
            optax.scale_by_schedule(learning_rate_fn),
        )
    elif training_args.lamb:
        correction = optax.scale_by_schedule(lambda count: (1 - b1 ** (count + 1)) / jnp.sqrt(1 - b2 ** (count + 1)))
        optimizer = optax.chain(
            optax.scale_by_adam(b1, b2, eps),
            correction if training_args.lamb_no_bias_correction else optax.identity(),  # what scale_by_adam corrected
            optax.add_decayed_weights(training_args.weight_decay, mask=decay_mask),
            optax.masked(optax.scale_by_trust_ratio(), decay_mask),
            optax.scale_by_learning_rate(learning_rate_fn),
        )
    else:
        optimizer = optax.adamw(learning_rate_fn, b1, b2, eps, weight_decay=training_args.weight_decay, mask=decay_mask)
    if training_args.max_grad_norm > 0:
        return optax.chain(optax.clip_by_global_norm(training_args.max_grad_norm), optimizer)
    return optimizer
