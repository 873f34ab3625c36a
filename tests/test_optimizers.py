# SPDX-License-Identifier: Apache-2.0
"""Which weights decay, by how much, and how the learning rate goes."""

import functools
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


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_clipping(optim):
    """Updates are those of clipped gradients; the state has the same structure as without, so that the norm may change."""
    make = lambda norm: optimizers.make_optimizer(  # noqa: E731
        arguments.TrainingArguments(output_dir="", optim=optim, max_grad_norm=norm), optax.constant_schedule(1.0)
    )
    params = {"0": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    grads = {"0": {"kernel": jnp.array([[3.0, 0.0], [0.0, 0.0]]), "bias": jnp.array([0.0, 4.0])}}
    states = [make(norm).init(params) for norm in (0.0, 1.0)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    clipped = make(1.0).update(grads, states[1], params)
    plain = make(0.0).update(jax.tree.map(lambda grad: grad / 5, grads), states[0], params)
    for one, other in zip(jax.tree.leaves(clipped), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 4])
def test_lion_by_hand(steps):
    """The sign of an average that its momentum does not keep (arXiv:2302.06675, program 1), and decoupled decay."""
    args = arguments.TrainingArguments(output_dir="", optim="lion", adam_beta1=0.8, adam_beta2=0.95, weight_decay=0.1)
    optimizer, np_rng = optimizers.make_optimizer(args, optax.constant_schedule(0.5)), np.random.default_rng(0)
    params = {"kernel": jnp.asarray(np_rng.normal(size=(3, 4)), jnp.float32), "bias": jnp.ones(4)}
    state, expected = optimizer.init(params), {name: np.asarray(array, np.float64) for name, array in params.items()}
    momentum = dict.fromkeys(params, 0.0)
    for _ in range(steps):
        grads = {name: np_rng.normal(size=array.shape) for name, array in params.items()}
        updates, state = optimizer.update({k: jnp.asarray(v, jnp.float32) for k, v in grads.items()}, state, params)
        params = optax.apply_updates(params, updates)
        for name, grad in grads.items():
            decay = 0.1 * expected[name] if name == "kernel" else 0.0
            expected[name] = expected[name] - 0.5 * (np.sign(0.8 * momentum[name] + 0.2 * grad) + decay)
            momentum[name] = 0.95 * momentum[name] + 0.05 * grad
    for name in params:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-5)


def np_muon(grads: list[np.ndarray], weights_XY: np.ndarray, rate: float, decay: float) -> np.ndarray:
    """In double precision: momentum as an average, and the polynomial of the singular values instead of products."""
    momentum = np.zeros_like(weights_XY)
    for grad in grads:
        momentum = 0.95 * momentum + 0.05 * grad
        left, values, right = np.linalg.svd(0.05 * grad + 0.95 * momentum, full_matrices=False)
        values = values / np.linalg.norm(values)
        for _ in range(5):
            values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
        update = 0.2 * np.sqrt(max(grad.shape)) * (left * values) @ right
        weights_XY = weights_XY - rate * (update + decay * weights_XY)
    return weights_XY


def muon_run(shape: tuple[int, int], num_steps: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Gradients, the weights at first, and after ours: learning rate 0.5, decay 0.1."""
    args = arguments.TrainingArguments(output_dir="", optim="muon", weight_decay=0.1)
    optimizer, np_rng = optimizers.make_optimizer(args, optax.constant_schedule(0.5)), np.random.default_rng(0)
    grads = [1e-3 * np_rng.normal(size=shape) for _ in range(num_steps)]
    first = np_rng.normal(size=shape)
    params = {"layer": {"0": {"kernel": jnp.asarray(first, jnp.float32)}}}
    state = optimizer.init(params)
    for grad in grads:
        updates, state = optimizer.update({"layer": {"0": {"kernel": jnp.asarray(grad, jnp.float32)}}}, state, params)
        params = optax.apply_updates(params, updates)
    return grads, first, np.asarray(params["layer"]["0"]["kernel"])


MATRICES = pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12)], ids=str)


@MATRICES
def test_muon_by_hand(shape):
    grads, first, found = muon_run(shape, 4)
    np.testing.assert_allclose(found, np_muon(grads, first, 0.5, 0.1), atol=1e-4)


@pytest.mark.torch
@MATRICES
def test_muon_is_that_of_torch(shape):
    """Which iterates in bfloat16: to 3 % of the way that the weights have gone."""
    import torch

    grads, first, found = muon_run(shape, 4)
    weight = torch.nn.Parameter(torch.tensor(first, dtype=torch.float32))
    muon = torch.optim.Muon([weight], lr=0.5, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for grad in grads:
        weight.grad = torch.tensor(grad, dtype=torch.float32)
        muon.step()
    way = np.linalg.norm(found - first)
    assert np.linalg.norm(found - weight.detach().numpy()) < 0.03 * way


def test_muon_leaves_the_others_to_adamw():
    """Bit for bit, decay included; the state of each array is that of one optimizer only."""
    params = {
        "wte": {"embedding": jnp.ones((8, 4))}, "wpe": {"embedding": jnp.ones((6, 4))}, "head": {"kernel": jnp.ones((4, 8))},
        "h": {"0": {"c_attn": {"kernel": jnp.ones((4, 12)), "bias": jnp.ones(12)}, "ln_1": {"scale": jnp.ones(4)}}},
    }  # fmt: skip
    np_rng, found = np.random.default_rng(0), {}
    grads = jax.tree.map(lambda array: jnp.asarray(np_rng.normal(size=array.shape), jnp.float32), params)
    for optim in ("muon", "adamw"):
        args = arguments.TrainingArguments(output_dir="", optim=optim, weight_decay=0.1)
        optimizer = optimizers.make_optimizer(args, optax.constant_schedule(0.5))
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(grads, state, params)
        found[optim] = flatten_dict(updates)
        sizes = sorted(array.size for array in jax.tree.leaves(state) if array.size > 1)
        twice = [4, 4, 12, 12, 24, 24, 32, 32, 32, 32]
        assert sizes == sorted([*twice, 48] if optim == "muon" else [*twice, 48, 48])
    differing = {path for path, update in found["adamw"].items() if not np.array_equal(update, found["muon"][path])}
    assert differing == {("h", "0", "c_attn", "kernel")}


ALL_TYPES = [
    (model_type, classes)
    for classes in (models.MASKED, models.CAUSAL, models.SPANS, models.DENOISING, models.SENTENCE_PAIRS)
    for model_type in classes
]


@pytest.mark.parametrize(("model_type", "classes"), ALL_TYPES)
def test_what_muon_updates(model_type, classes):
    """In every family all matrices of attention and feed-forward, and none that knows of vocabulary or positions."""
    config = AutoConfig.for_model(model_type)
    for name in ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers", "num_decoder_layers"):
        if hasattr(config, name) and model_type not in ("gpt_neo", "albert", "gemma2", "modernbert"):
            setattr(config, name, 2)
    config.vocab_size, config.tie_word_embeddings = 131, False
    flat = weights.shapes_of(classes[model_type](config))
    mask = flatten_dict(optimizers.muon_mask(unflatten_dict(flat)))
    others = {path for path, array in flat.items() if array.ndim == 2 and not mask[path]}
    assert not any(131 in array.shape for path, array in flat.items() if mask[path])
    outside = r"embed|wte|wpe|head|predictions|decoder/kernel|bias|vocab_|seq_relationship|pooler|project_(in|out)"
    assert not [path for path in others if not re.search(outside, "/".join(path))]
    assert sum(mask.values()) >= 6


# ---- Learning rates ------------------------------------------------------------------------------------------------------


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


STEPS, WARMUP, PEAK = 110, 10, 2e-3
# lr_scheduler_type, other flags, steps of warmup.
SCHEDULES = [
    ("linear", {}, WARMUP),
    ("linear", {"min_lr_ratio": 0.2}, WARMUP),
    ("cosine", {}, WARMUP),
    ("cosine", {"min_lr_ratio": 0.1}, WARMUP),
    ("constant", {}, WARMUP),
    ("polynomial", {}, 0),
    ("polynomial", {"lr_power": 2.5, "min_lr_ratio": 0.05}, WARMUP),
    ("warmup_stable_decay", {}, WARMUP),
    ("warmup_stable_decay", {"num_decay_steps": 37, "min_lr_ratio": 0.3}, 0),
    ("warmup_stable_decay", {"num_decay_steps": 20, "min_lr_ratio": 0.3}, WARMUP),
    ("warmup_stable_decay", {"num_decay_steps": STEPS - WARMUP}, WARMUP),
    ("inverse_sqrt", {}, WARMUP),
    ("inverse_sqrt", {}, 0),
]
ALL_SCHEDULES = pytest.mark.parametrize(("kind", "flags", "warmup"), SCHEDULES)


def rates_of(kind: str, flags: dict, warmup: int) -> np.ndarray:
    """One call for all steps, a few behind the end too."""
    args = arguments.TrainingArguments(output_dir="", learning_rate=PEAK, lr_scheduler_type=kind, **flags)
    rate = optimizers.make_learning_rate(args, plan_of(num_steps=STEPS, num_warmup_steps=warmup))
    rates, one_by_one = np.asarray(rate(np.arange(STEPS + 5))), [float(rate(step)) for step in range(STEPS + 5)]
    np.testing.assert_allclose(np.broadcast_to(rates, STEPS + 5), one_by_one, rtol=1e-6, atol=1e-6 * PEAK)
    traced = jax.jit(rate)(jnp.arange(STEPS + 5))
    np.testing.assert_allclose(traced, one_by_one, rtol=1e-6, atol=1e-6 * PEAK)
    return rates


@ALL_SCHEDULES
def test_schedules_in_closed_form(kind, flags, warmup):
    """At every step, for a step or an array of them."""
    steps, left = np.arange(STEPS + 5.0), STEPS - warmup
    share = np.clip((steps - warmup) / left, 0, 1)
    end, decay = flags.get("min_lr_ratio", 0.0), flags.get("num_decay_steps", STEPS // 10)
    timescale = warmup or 10_000
    factors = {
        "linear": 1 - share, "cosine": (1 + np.cos(np.pi * share)) / 2, "constant": np.ones_like(steps),
        "polynomial": (1 - share) ** flags.get("lr_power", 1.0), "warmup_stable_decay": np.clip((STEPS - steps) / decay, 0, 1),
        "inverse_sqrt": np.sqrt(timescale / np.maximum(steps - warmup + timescale, timescale)),
    }[kind]  # fmt: skip
    rising = steps / max(warmup, 1)
    if kind == "warmup_stable_decay":
        rising = end + (1 - end) * rising
    expected = np.where(steps < warmup, rising, end + (1 - end) * factors)
    np.testing.assert_allclose(rates_of(kind, flags, warmup), PEAK * expected, rtol=1e-5, atol=1e-6 * PEAK)


@pytest.mark.torch
def test_adafactor_is_that_of_transformers():
    """With its defaults of T5, for a rate that is given; but for the decay, which there follows the size of the weights too."""
    import torch
    from transformers.optimization import Adafactor

    np_rng = np.random.default_rng(0)
    optimizer = optimizers.make_optimizer(
        arguments.TrainingArguments(output_dir="", optim="adafactor"), optax.constant_schedule(0.01)
    )
    first = {name: 0.05 * np_rng.normal(size=shape) for name, shape in {"kernel": (256, 192), "bias": (192,)}.items()}
    params = {name: jnp.asarray(array, jnp.float32) for name, array in first.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(array, dtype=torch.float32)) for name, array in first.items()}
    adafactor, state = Adafactor(theirs.values(), lr=0.01, relative_step=False, warmup_init=False), optimizer.init(params)
    for _ in range(4):
        grads = {name: 1e-3 * np_rng.normal(size=array.shape) for name, array in first.items()}
        updates, state = optimizer.update({k: jnp.asarray(v, jnp.float32) for k, v in grads.items()}, state, params)
        params = optax.apply_updates(params, updates)
        for name, grad in grads.items():
            theirs[name].grad = torch.tensor(grad, dtype=torch.float32)
        adafactor.step()
    for name, start in first.items():
        way = np.linalg.norm(params[name] - start)
        assert np.linalg.norm(params[name] - theirs[name].detach().numpy()) < 1e-4 * way


@pytest.mark.torch
@ALL_SCHEDULES
def test_schedules_are_those_of_transformers(kind, flags, warmup):
    """Update s gets what PyTorch's optimizer has before its step s (from 0)."""
    import torch
    from transformers import optimization

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    end, power, num_decay_steps = (
        flags.get(name, unset) for name, unset in {"min_lr_ratio": 0.0, "lr_power": 1.0, "num_decay_steps": 11}.items()
    )
    polynomial = functools.partial(
        optimization.get_polynomial_decay_schedule_with_warmup, optimizer, warmup, STEPS, lr_end=end * PEAK, power=power
    )
    wsd = functools.partial(
        optimization.get_wsd_schedule, optimizer, warmup, num_decay_steps, STEPS, decay_type="linear", min_lr_ratio=end
    )
    schedule = {
        "linear": polynomial if end else lambda: optimization.get_linear_schedule_with_warmup(optimizer, warmup, STEPS),
        "cosine": lambda: optimization.get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, STEPS, min_lr_rate=end),
        "constant": lambda: optimization.get_constant_schedule_with_warmup(optimizer, warmup),
        "polynomial": polynomial,
        "warmup_stable_decay": wsd,
        "inverse_sqrt": lambda: optimization.get_inverse_sqrt_schedule(optimizer, warmup),
    }[kind]()
    expected = []
    for _ in range(STEPS):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(rates_of(kind, flags, warmup)[:STEPS], expected, rtol=1e-5, atol=1e-6 * PEAK)


def test_decay_that_does_not_fit(refuses):
    """Where epochs count it is known with the plan only; a run that only evaluates needs none."""
    args = arguments.TrainingArguments(output_dir="", lr_scheduler_type="warmup_stable_decay", num_decay_steps=101)
    with refuses("--num_decay_steps: a warmup of 10 and a decay of 101 steps do not fit into 110 steps"):
        optimizers.make_learning_rate(args, plan_of(num_steps=110, num_warmup_steps=10))
    args.num_decay_steps = None
    with refuses("--num_decay_steps: a warmup of 100 and a decay of 11 steps do not fit into 110 steps"):
        optimizers.make_learning_rate(args, plan_of(num_steps=110, num_warmup_steps=100))
    for args.lr_scheduler_type in ("warmup_stable_decay", "cosine"):
        optimizers.make_learning_rate(args, plan_of(num_steps=0))
