# SPDX-License-Identifier: Apache-2.0
"""Which weights decay, by how much, and how the learning rate goes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import AutoConfig

from flaxlm import arguments, batches, models, optimizers, weights


def old_mask(path, array) -> bool:
    """The originals' rule, for the families where it was right: no decay of biases, nor of anything in a norm."""
    names = ("layernorm", "layer_norm", "ln")
    parent = "".join(path[-2:-1]).lower()
    is_norm = any(name in parent for name in names[:2]) or re.search(r"(^|_)ln(_|$)|norm", parent)
    return path[-1] not in ("bias", "final_logits_bias") and not is_norm


@pytest.mark.parametrize(
    ("model_type", "classes"),
    [(model_type, models.MASKED) for model_type in models.MASKED]
    + [(model_type, models.CAUSAL) for model_type in models.CAUSAL if model_type not in models.MASKED],
)
def test_decay_mask(model_type, classes):
    """Exactly matrices and embeddings decay, in families where the originals' name matching failed too (defects 83 to 85)."""
    config = AutoConfig.for_model(model_type)
    for name, value in {"num_hidden_layers": 1, "vocab_size": 128}.items():
        if model_type != "gpt_neo" or name != "num_hidden_layers":
            setattr(config, name, value)
    flat = weights.shapes_of(classes[model_type](config))
    mask = flatten_dict(optimizers.decay_mask(unflatten_dict(flat)))
    wrong = [path for path, array in flat.items() if mask[path] != old_mask(path, array)]
    assert not wrong
    assert 0 < sum(mask.values()) < len(mask)


OPTIMIZERS = ["adamw", "adafactor", "lamb", "lion", "muon"]


@pytest.mark.parametrize("optim", [name for name in OPTIMIZERS if name != "lamb"])  # whose trust ratio changes it
def test_weight_decay_follows_the_learning_rate(optim):
    """With gradients of zero a matrix shrinks by lr * decay per step, a bias not at all; Adafactor too (defect 81)."""
    args = arguments.TrainingArguments(output_dir="", optim=optim, weight_decay=0.1, learning_rate=0.5)
    optimizer = optimizers.make_optimizer(args, optax.constant_schedule(0.5))
    params = {
        "layer": {"0": {"kernel": jnp.ones((4, 4))}, "kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
        "final_logits_bias": jnp.ones((1, 4)),
    }
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["layer"]["0"]["kernel"], -0.5 * 0.1, atol=1e-6)
    np.testing.assert_allclose(updates["layer"]["kernel"], -0.5 * 0.1, atol=1e-6)
    np.testing.assert_allclose(updates["layer"]["bias"], 0, atol=1e-6)
    np.testing.assert_allclose(updates["final_logits_bias"], 0, atol=1e-6)


def test_adafactor_without_decay_is_optax_adafactor():
    args = arguments.TrainingArguments(output_dir="", adafactor=True)
    ours, theirs = optimizers.make_optimizer(args, optax.constant_schedule(0.1)), optax.adafactor(0.1)
    params = {"w": jnp.linspace(-1, 1, 256 * 256).reshape(256, 256)}
    grads = {"w": jnp.cos(params["w"] * 9)}
    updates = [optimizer.update(grads, optimizer.init(params), params)[0]["w"] for optimizer in (ours, theirs)]
    np.testing.assert_allclose(*updates, rtol=1e-5)


def test_adam_epsilon_and_betas_arrive():
    """Defect 82: the flag was accepted and dropped."""
    params, grads = {"w": jnp.ones((2, 2))}, {"w": jnp.full((2, 2), 0.5)}

    def update(**flags):
        optimizer = optimizers.make_optimizer(arguments.TrainingArguments(output_dir="", **flags), optax.constant_schedule(1.0))
        state = optimizer.init(params)
        for scale in (1.0, 2.0):
            updates, state = optimizer.update(jax.tree.map(lambda g: g * scale, grads), state, params)  # noqa: B023
        return float(updates["w"][0, 0])

    base = update()
    assert base != update(adam_epsilon=1.0)
    assert base != update(adam_beta1=0.5)
    assert base != update(adam_beta2=0.5)


def test_clipping():
    args = arguments.TrainingArguments(output_dir="", max_grad_norm=1.0, adafactor=False)
    optimizer = optimizers.make_optimizer(args, optax.constant_schedule(1.0))
    assert len(optimizer.init({"w": jnp.ones(2)})) == 2
    clipped, _ = optax.clip_by_global_norm(1.0).update({"w": jnp.array([3.0, 4.0])}, optax.EmptyState())
    np.testing.assert_allclose(clipped["w"], [0.6, 0.8])


def plan_of(**kwargs) -> batches.Plan:
    sizes = {"num_local_devices": 1, "num_processes": 1, "process_index": 0, "num_micro_batches": 1, "num_warmup_steps": 0}
    sizes |= {"train_batch_size": 4, "eval_batch_size": 4, "steps_per_epoch": 2, "num_steps": 5}
    return batches.Plan(**sizes | kwargs)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_learning_rate_shapes(kind):
    """Up from 0 in a line, then to 0 at the last step, or constant; one T for schedule and loop (defects 18, 19)."""
    args = arguments.TrainingArguments(output_dir="", learning_rate=2.0, lr_scheduler_type=kind)
    rate = optimizers.make_learning_rate(args, plan_of(num_steps=110, num_warmup_steps=10))
    assert [float(rate(s)) for s in (0, 5, 10)] == pytest.approx([0.0, 1.0, 2.0])
    assert float(rate(60)) == pytest.approx(2.0 if kind == "constant" else 1.0)
    assert float(rate(110)) == pytest.approx(2.0 if kind == "constant" else 0.0, abs=1e-6)


@pytest.mark.parametrize("bias_correction", [True, False])
def test_lamb_by_hand(bias_correction):
    """Three updates as in the paper; a bias gets Adam's, without decay and trust ratio."""
    args = arguments.TrainingArguments(
        output_dir="", lamb=True, lamb_no_bias_correction=not bias_correction, weight_decay=0.1, adam_epsilon=1e-12
    )
    optimizer = optimizers.make_optimizer(args, optax.constant_schedule(0.5))
    np_rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(np_rng.normal(size=(3, 4)), jnp.float32), "bias": jnp.ones(4)}
    state, expected = optimizer.init(params), {name: np.asarray(array, np.float64) for name, array in params.items()}
    moments = dict.fromkeys(params, (0.0, 0.0))
    for step in range(1, 4):
        grads = {name: np_rng.normal(size=array.shape) for name, array in params.items()}
        updates, state = optimizer.update({k: jnp.asarray(v, jnp.float32) for k, v in grads.items()}, state, params)
        params = optax.apply_updates(params, updates)
        for name, grad in grads.items():
            first, second = moments[name]
            moments[name] = first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
            if bias_correction:
                first, second = first / (1 - 0.9**step), second / (1 - 0.999**step)
            update = first / np.sqrt(second)
            if name == "kernel":
                update += 0.1 * expected[name]
                update *= np.linalg.norm(expected[name]) / np.linalg.norm(update)
            expected[name] = expected[name] - 0.5 * update
    for name in params:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-3)


def test_groupbert_schedule():
    """lr sqrt(s / W), then a line to 1e-7; without max_steps too (defect 131)."""
    args = arguments.TrainingArguments(
        output_dir="", groupbert_schedule=True, learning_rate=1e-3, warmup_ratio=0.1, do_train=True
    )
    plan = batches.make_plan(args, 8 * 100, 32)
    assert (plan.num_steps, plan.num_warmup_steps) == (300, 30)
    rate = optimizers.make_learning_rate(args, plan)
    assert [float(rate(s)) for s in (0, 1, 7, 30)] == pytest.approx([0, 1e-3 * (1 / 30) ** 0.5, 1e-3 * (7 / 30) ** 0.5, 1e-3])
    assert float(rate(165)) == pytest.approx(1e-7 + (1e-3 - 1e-7) * 0.5)
    assert float(rate(300)) == pytest.approx(1e-7, rel=1e-3)
