# SPDX-License-Identifier: Apache-2.0
"""Parts that every training script shares, one by one."""

import ast
import dataclasses
import importlib
import json
import re
import shlex
import threading
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from transformers import AutoConfig, FlaxAutoModelForCausalLM, FlaxAutoModelForMaskedLM

import run_mlm_flax as script
from tests.conftest import ROOT

SCRIPTS = sorted(ROOT.glob("run_*_flax.py"))


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "prepare_model_dir.py"], ids=lambda path: path.name)
def test_every_flag_is_read(path):
    """A flag that is declared and never looked at is a lie (defects 63, 82)."""
    tree = ast.parse(path.read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments")]
    fields = [part for node in classes for part in node.body if isinstance(part, ast.AnnAssign)]
    flags = [part for part in fields if "ClassVar" not in ast.unparse(part.annotation)]
    declared = {part.target.id for part in flags}
    # Everything else in the file reads: functions, methods, and constants that hold a flag's name.
    readers = [node for node in tree.body if node not in classes]
    readers += [part for node in classes for part in node.body if part not in flags]
    nodes = [node for part in readers for node in ast.walk(part)]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    read |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    read |= {f"{split}{suffix}" for split in ("train", "validation") for suffix in ("_file", "_ref_file")}  # read in loops
    unread = declared - read
    assert len(declared) > 8
    assert not unread


def test_every_flag_has_help_and_a_default():
    for arguments in (script.TrainingArguments, script.ModelArguments, script.DataTrainingArguments):
        for field in dataclasses.fields(arguments):
            assert len(field.metadata["help"]) > 10, field.name
            assert field.name == "output_dir" or field.default is not dataclasses.MISSING


ORIGINAL_FLAGS = {
    "overwrite_output_dir": False, "do_train": False, "do_eval": False, "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8, "learning_rate": 5e-5, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999,
    "adam_epsilon": 1e-8, "adafactor": False, "num_train_epochs": 3.0, "warmup_steps": 0, "logging_steps": 500,
    "save_steps": 500, "eval_steps": None, "seed": 42, "model_name_or_path": None, "model_type": None, "config_name": None,
    "tokenizer_name": None, "cache_dir": None, "use_fast_tokenizer": True, "dtype": "float32", "token": None,
    "trust_remote_code": False, "dataset_name": None, "dataset_config_name": None, "train_file": None,
    "validation_file": None, "overwrite_cache": False, "validation_split_percentage": 5, "preprocessing_num_workers": None,
    "push_to_hub": False, "hub_model_id": None, "hub_token": None,
}  # fmt: skip
REFERENCE_FILES = {"train_ref_file": None, "validation_ref_file": None}
ORIGINAL_FLAGS_OF = {
    "run_mlm_flax": REFERENCE_FILES
    | {"gradient_checkpointing": False, "max_seq_length": None, "mlm_probability": 0.15, "pad_to_max_length": False}
    | {"line_by_line": False},
    "run_clm_flax": {"block_size": None, "max_train_samples": None, "max_eval_samples": None, "keep_linebreaks": True},
    "run_t5_mlm_flax": REFERENCE_FILES | {"max_seq_length": None, "mlm_probability": 0.15, "mean_noise_span_length": 3.0},
    "run_bart_dlm_flax": REFERENCE_FILES
    | {"max_seq_length": None, "mlm_probability": 0.3, "permute_sentence_ratio": 1.0, "poisson_lambda": 3.0},
}


@pytest.mark.parametrize("name", ORIGINAL_FLAGS_OF)
def test_original_flags_and_defaults(name):
    """Every flag of the original script, with its default: old command lines go on working."""
    module, original = importlib.import_module(name), ORIGINAL_FLAGS | ORIGINAL_FLAGS_OF[name]
    parts = (module.TrainingArguments, module.ModelArguments, module.DataTrainingArguments)
    fields = {field.name: field for part in parts for field in dataclasses.fields(part)}
    assert {flag: fields[flag].default for flag in original} == original
    assert fields["output_dir"].default is dataclasses.MISSING


def readme_commands() -> list[list[str]]:
    """The commands in README's fenced blocks, joined at backslashes, with shell arrays filled in."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    arrays = dict(re.findall(r"^([A-Z]+)=\((.*?)\)$", text, re.DOTALL | re.MULTILINE))
    text = re.sub(r"^[A-Z]+=\(.*?\)$", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = re.sub(r'"\$\{([A-Z]+)\[@\]\}"', lambda name: " ".join(arrays[name[1]].split()), text).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip() and not line.strip().startswith("#")]


def test_readme_commands_parse():
    """Each command names a script that exists and flags that it knows (defect 111)."""
    commands = readme_commands()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = [word for command in commands if command[0] == "make" for word in command[1:] if "=" not in word]
    assert used
    assert set(used) <= targets
    parsed = 0
    for command in commands:
        words = [word for word in command if not re.fullmatch(r"[A-Z_]+=.*", word)]
        words = words[words.index("python") :] if words[0] == "timeout" else words
        if words[0] not in ("python", "python3") or not words[1].endswith(".py"):
            continue
        assert (ROOT / words[1]).exists(), command
        if not words[1].startswith("run_"):
            continue
        module = __import__(words[1].removesuffix(".py"))
        names = ("ModelArguments", "DataTrainingArguments", "TrainingArguments", "TimingArguments")
        parser = module.ScriptArgumentParser([getattr(module, name) for name in names if hasattr(module, name)])
        flags = words[2:]
        if flags and flags[0].endswith(".json"):
            assert set(json.loads((ROOT / flags[0]).read_text())) <= {action.dest for action in parser._actions}
            flags[:1] = ["--output_dir", "x"]
        parser.parse(flags)
        parsed += 1
    assert parsed >= 3


def old_mask(path, array) -> bool:
    """The originals' rule, for the families where it was right: no decay of biases, nor of anything in a norm."""
    names = ("layernorm", "layer_norm", "ln")
    parent = "".join(path[-2:-1]).lower()
    is_norm = any(name in parent for name in names[:2]) or re.search(r"(^|_)ln(_|$)|norm", parent)
    return path[-1] not in ("bias", "final_logits_bias") and not is_norm


@pytest.mark.parametrize(
    ("model_type", "auto"),
    [(t, FlaxAutoModelForMaskedLM) for t in ("albert", "bart", "bert", "distilbert", "electra", "roberta", "roformer")]
    + [("roberta-prelayernorm", FlaxAutoModelForMaskedLM)]
    + [(t, FlaxAutoModelForCausalLM) for t in ("gpt2", "llama", "bloom", "xglm", "gpt_neo", "opt")],
)
def test_decay_mask(model_type, auto):
    """Exactly matrices and embeddings decay, in families where the originals' name matching failed too (defects 83 to 85)."""
    config = AutoConfig.for_model(model_type)
    for name, value in {"num_hidden_layers": 1, "vocab_size": 128}.items():
        if model_type != "gpt_neo" or name != "num_hidden_layers":
            setattr(config, name, value)
    model = auto.from_config(config, _do_init=False)
    flat = flatten_dict(model.params_shape_tree)
    mask = flatten_dict(script.decay_mask(model.params_shape_tree))
    wrong = [path for path, array in flat.items() if mask[path] != old_mask(path, array)]
    assert not wrong
    assert 0 < sum(mask.values()) < len(mask)


@pytest.mark.parametrize("adafactor", [False, True])
def test_weight_decay_follows_the_learning_rate(adafactor):
    """With gradients of zero a matrix shrinks by lr * decay per step, a bias not at all; Adafactor too (defect 81)."""
    args = script.TrainingArguments(output_dir="", adafactor=adafactor, weight_decay=0.1, learning_rate=0.5)
    optimizer = script.make_optimizer(args, optax.constant_schedule(0.5))
    params = {"layer": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "final_logits_bias": jnp.ones((1, 4))}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["layer"]["kernel"], -0.5 * 0.1, atol=1e-6)
    np.testing.assert_allclose(updates["layer"]["bias"], 0, atol=1e-6)
    np.testing.assert_allclose(updates["final_logits_bias"], 0, atol=1e-6)


def test_adafactor_without_decay_is_optax_adafactor():
    args = script.TrainingArguments(output_dir="", adafactor=True)
    ours, theirs = script.make_optimizer(args, optax.constant_schedule(0.1)), optax.adafactor(0.1)
    params = {"w": jnp.linspace(-1, 1, 256 * 256).reshape(256, 256)}
    grads = {"w": jnp.cos(params["w"] * 9)}
    updates = [optimizer.update(grads, optimizer.init(params), params)[0]["w"] for optimizer in (ours, theirs)]
    np.testing.assert_allclose(*updates, rtol=1e-5)


def test_adam_epsilon_and_betas_arrive():
    """Defect 82: the flag was accepted and dropped."""
    params, grads = {"w": jnp.ones((2, 2))}, {"w": jnp.full((2, 2), 0.5)}

    def update(**flags):
        optimizer = script.make_optimizer(script.TrainingArguments(output_dir="", **flags), optax.constant_schedule(1.0))
        state = optimizer.init(params)
        for scale in (1.0, 2.0):
            updates, state = optimizer.update(jax.tree.map(lambda g: g * scale, grads), state, params)  # noqa: B023
        return float(updates["w"][0, 0])

    base = update()
    assert base != update(adam_epsilon=1.0)
    assert base != update(adam_beta1=0.5)
    assert base != update(adam_beta2=0.5)


def test_clipping():
    args = script.TrainingArguments(output_dir="", max_grad_norm=1.0, adafactor=False)
    optimizer = script.make_optimizer(args, optax.constant_schedule(1.0))
    assert len(optimizer.init({"w": jnp.ones(2)})) == 2
    clipped, _ = optax.clip_by_global_norm(1.0).update({"w": jnp.array([3.0, 4.0])}, optax.EmptyState())
    np.testing.assert_allclose(clipped["w"], [0.6, 0.8])


def plan_of(**kwargs) -> script.Plan:
    sizes = {"num_local_devices": 1, "num_processes": 1, "process_index": 0, "num_micro_batches": 1, "num_warmup_steps": 0}
    sizes |= {"train_batch_size": 4, "eval_batch_size": 4, "steps_per_epoch": 2, "num_steps": 5}
    return script.Plan(**sizes | kwargs)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_learning_rate_shapes(kind):
    """Up from 0 in a line, then to 0 at the last step, or constant; one T for schedule and loop (defects 18, 19)."""
    args = script.TrainingArguments(output_dir="", learning_rate=2.0, lr_scheduler_type=kind)
    rate = script.make_learning_rate(args, plan_of(num_steps=110, num_warmup_steps=10))
    assert [float(rate(s)) for s in (0, 5, 10)] == pytest.approx([0.0, 1.0, 2.0])
    assert float(rate(60)) == pytest.approx(2.0 if kind == "constant" else 1.0)
    assert float(rate(110)) == pytest.approx(2.0 if kind == "constant" else 0.0, abs=1e-6)


class Recorder:
    """A collator that only passes on what it is given."""

    draws_per_row = 3

    def __call__(self, rows, uniforms, is_real, num_groups):
        return {"id": rows["input_ids"][:, 0], "noise": uniforms, "is_real": is_real}


def test_every_epoch_visits_rows_once_in_a_new_order():
    rows = {"input_ids": np.arange(9)[:, None]}
    batches = list(script.train_batches(rows, Recorder(), plan_of(num_steps=6), seed=1))
    epochs = [np.concatenate([batch["id"][0] for batch in batches[i : i + 2]]) for i in (0, 2, 4)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    noise = np.concatenate([batch["noise"].reshape(-1) for batch in batches])
    assert len(set(noise)) == noise.size


def test_processes_share_a_global_batch():
    """Two processes prepare the two halves of what one would: rows and noise (defects 88, 91, 102)."""
    rows = {"input_ids": np.arange(20)[:, None]}
    whole = next(script.train_batches(rows, Recorder(), plan_of(), seed=1))
    halves = [next(script.train_batches(rows, Recorder(), plan_of(num_processes=2, process_index=i), seed=1)) for i in range(2)]
    for name in ("id", "noise"):
        np.testing.assert_array_equal(np.concatenate([half[name][0] for half in halves]), whole[name][0])


def test_evaluation_rows_are_all_there_once():
    rows = {"input_ids": np.arange(10)[:, None]}
    batches = list(script.eval_batches(rows, Recorder(), plan_of(), seed=1))
    real = np.concatenate([batch["id"][batch["is_real"]] for batch in batches])
    assert real.tolist() == list(range(10))
    assert [len(batch["id"]) for batch in batches] == [4, 4, 4]


def test_streams_of_random_numbers_differ():
    draws = [script.host_rng(1, *stream).random() for stream in (("a",), ("b",), ("a", 0), ("a", 1))]
    draws += [script.host_rng(2, "a").random()]
    assert len(set(draws)) == 5
    assert script.host_rng(1, "a").random() == draws[0]


def test_prefetch_keeps_order_and_stays_bounded():
    produced = []

    def produce():
        for i in range(20):
            produced.append(i)
            yield i

    items = script.prefetch(produce(), depth=2)
    assert next(items) == 0
    time.sleep(0.3)
    assert len(produced) <= 4
    assert list(items) == list(range(1, 20))


def test_prefetch_raises_at_once():
    """Before what is still queued, and with the original exception."""

    def produce():
        yield from range(2)
        raise ZeroDivisionError("in the background")

    items = script.prefetch(produce(), depth=5)
    time.sleep(0.3)
    with pytest.raises(ZeroDivisionError, match="in the background"):
        next(items)


def test_prefetch_ends_its_thread():
    items = script.prefetch(iter(range(1000)))
    next(items)
    items.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_validation_split_is_drawn_and_keeps_order():
    """Drawn with the seed, not taken from the top (defect 77); both parts in the order of the text."""
    dataset = script.datasets.Dataset.from_dict({"text": [str(i) for i in range(1000)]})
    splits = script.draw_validation_split(dataset, 5, seed=3)
    train, held_out = ([int(text) for text in splits[name]["text"]] for name in ("train", "validation"))
    assert len(held_out) == 50
    assert sorted(train + held_out) == list(range(1000))
    assert train == sorted(train)
    assert held_out == sorted(held_out)
    assert max(held_out) > 500
    assert held_out != [int(text) for text in script.draw_validation_split(dataset, 5, seed=4)["validation"]["text"]]


def test_write_json_is_standard_json(tmp_path):
    """No NaN, no Infinity (defect 35)."""
    script.write_json(str(tmp_path / "a.json"), {"a": float("nan"), "b": float("inf"), "c": 1.5})
    values = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert values == {"a": None, "b": None, "c": 1.5}


def test_stopwatch_leaves_out_the_stops():
    watch = script.Stopwatch()
    watch.start()
    time.sleep(0.05)
    watch.stop()
    time.sleep(0.2)
    watch.start()
    assert 0.05 <= watch.seconds() < 0.15


def test_max_positions():
    """RoBERTa's positions start behind its padding id; other types use the whole table (defects 16, 66, 71, 72)."""
    assert script.max_positions(AutoConfig.for_model("roberta", max_position_embeddings=514)) == 512
    assert script.max_positions(AutoConfig.for_model("bert")) == 512
    assert script.max_positions(AutoConfig.for_model("gpt2", n_positions=48)) == 48
    assert script.max_positions(AutoConfig.for_model("bloom")) is None


def test_parse_as():
    assert script.parse_as(int, "12") == 12
    assert script.parse_as(float, "3") == 3.0
    assert script.parse_as(bool, "False") is False
    assert script.parse_as(str, "gelu") == "gelu"
    assert [script.parse_as(type(None), text) for text in ("7", "0.5", "true", "word")] == [7, 0.5, True, "word"]
    for kind, text in ((int, "1.5"), (float, "x"), (bool, "2"), (list, "1")):
        with pytest.raises(ValueError, match=r"takes|is a"):
            script.parse_as(kind, text)


def dropped(rate, key, shape):
    """A mask of hashed_dropout, as a model gets it."""
    with nn.intercept_methods(script.hashed_dropout):
        return np.asarray(nn.Dropout(rate, deterministic=False).apply({}, jnp.ones(shape), rngs={"dropout": key}))


@pytest.mark.parametrize("impl", ["rbg", "threefry2x32"])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_hashed_dropout(rate, impl):
    """The share is the rate, what is kept is scaled, and masks of neighbours, of shifted positions and keys are unrelated."""
    key = script.device_rng(0, "dropout", impl=impl)
    masks = [dropped(rate, jax.random.fold_in(key, i), (64, 4096)) for i in range(4)]
    for mask in masks:
        assert set(np.unique(mask)) == {0, np.float32(1 / (1 - rate))}
    assert (dropped(rate, jax.random.fold_in(key, 0), (64, 4096)) == masks[0]).all()
    kept = np.stack([mask.reshape(-1) > 0 for mask in masks]).astype(np.float64)
    tolerance = 5 / np.sqrt(kept.shape[1])  # five standard deviations of a correlation
    assert kept.mean(axis=1) == pytest.approx(1 - rate, abs=tolerance * np.sqrt(rate * (1 - rate)))
    centred = (kept - (1 - rate)) / np.sqrt(rate * (1 - rate))
    assert (np.abs(np.corrcoef(kept) - np.eye(4)) < tolerance).all()
    for shift in (1, 2, 3, 7, 64, 4096):
        assert abs((centred[0, shift:] * centred[0, :-shift]).mean()) < tolerance
        assert abs((centred[0, shift:] * centred[1, :-shift]).mean()) < tolerance


def test_hashed_dropout_leaves_the_rest_alone():
    inputs = jnp.ones((4, 4))
    with nn.intercept_methods(script.hashed_dropout):
        assert (nn.Dropout(0.5).apply({}, inputs, deterministic=True) == inputs).all()
        assert (nn.Dropout(0.0, deterministic=False).apply({}, inputs) == inputs).all()
        rngs = {"dropout": jax.random.key(0)}
        row = nn.Dropout(0.5, broadcast_dims=(0,), deterministic=False).apply({}, inputs, rngs=rngs)
        assert (row == row[0]).all()
