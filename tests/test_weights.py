# SPDX-License-Identifier: Apache-2.0
"""Weights from files, of whichever layout."""

import copy
import functools
import importlib.util
import json
import os
import pickle
import shutil
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, GPT2Config, configuration_utils

import run_bart_dlm_flax
import run_clm_flax
import run_mlm_flax as script
import run_pretraining_flax
import run_t5_mlm_flax
from flaxlm import arguments, layouts, models, sharding, tokenization, weights
from tests import golden
from tests.conftest import ROOT
from tests.test_fields import CASES, KINDS, variants


def test_weights_that_only_pytorch_can_read(trained, corpus, error_of, tmp_path):
    """pytorch_model.bin without PyTorch, or an index of nothing: what it is, and what to do."""
    source, flags = tmp_path / "source", ["--do_eval", "--train_file", str(corpus), "--max_seq_length", "32"]
    shutil.copytree(trained[0], source, ignore=shutil.ignore_patterns("*.msgpack", "*.safetensors", "events*", "checkpoint*"))
    flags += ["--model_name_or_path", str(source), "--output_dir", str(tmp_path / "out")]
    assert "no model: " in error_of(script.main, flags)
    (source / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        message = error_of(script.main, flags)
    assert f"--model_name_or_path {source}: its weights are in pytorch_model.bin, which needs PyTorch: install it" in message
    (source / "pytorch_model.bin").unlink()
    (source / "model.safetensors.index.json").write_text("{}")
    assert "no model: model.safetensors.index.json is no index of weights" in error_of(script.main, flags)


def test_fine_tuning_starts_from_the_weights(trained, corpus, tmp_path, monkeypatch):
    """From a bfloat16 checkpoint in PyTorch layout: float32 masters, and the loss goes on from where it was (defect 86)."""
    warnings = []
    monkeypatch.setattr(configuration_utils.logger, "warning_once", warnings.append)
    output_dir, results = trained
    source = tmp_path / "source"
    shutil.copytree(output_dir, source, ignore=shutil.ignore_patterns("*.msgpack", "events*"))
    weights = load_file(source / "model.safetensors")
    save_file({k: v.astype(jnp.bfloat16) for k, v in weights.items()}, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    tuned = script.main(
        ["--model_name_or_path", str(source), "--train_file", str(corpus), "--max_seq_length", "32", "--max_steps", "3",
         "--output_dir", str(tmp_path / "tuned"), "--learning_rate", "1e-4"]
    )  # fmt: skip
    assert tuned["train_loss"] == pytest.approx(results["eval_loss"], rel=0.1)
    saved = load_file(tmp_path / "tuned" / "model.safetensors")
    assert {array.dtype for array in saved.values()} == {np.dtype("float32")}
    saved_config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert not [message for message in warnings if "torch_dtype" in message]  # a name that transformers warns of
    assert saved_config.get("dtype", saved_config.get("torch_dtype")) == "float32"


# ---- Files that are damaged, or of another model -------------------------------------------------------------------------


def arguments_for(module=script, **model_args) -> arguments.Arguments:
    training_args = arguments.TrainingArguments(output_dir="out")
    return arguments.Arguments(arguments.ModelArguments(**model_args), module.DataTrainingArguments(), training_args)


def load(source: Path, config=None, **flags):
    config, flags = config or AutoConfig.from_pretrained(source), flags | {"model_name_or_path": str(source)}
    return weights.load(script.MODELS[config.model_type](config), arguments_for(**flags), sharding.all_devices())


@pytest.fixture
def source(trained, tmp_path) -> Path:
    """A model in both layouts."""
    for name in ("config.json", "flax_model.msgpack", "model.safetensors"):
        shutil.copy(trained[0] / name, tmp_path)
    return tmp_path


class Malicious:
    """An object whose unpickling would run a program."""

    def __init__(self, path: Path):
        self.command = f"touch {path}"

    def __reduce__(self):
        return os.system, (self.command,)


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "cut at the beginning": lambda content: content[:20],
    "empty": lambda content: b"",
    "of git-lfs": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n",
    "text": lambda content: b"not weights",
    "noise": lambda content: np.random.default_rng(0).bytes(1000),
    "msgpack of a number": lambda content: msgpack_serialize(5),
    "msgpack of text": lambda content: msgpack_serialize({"roberta": "text"}),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["flax_model.msgpack", "model.safetensors"])
def test_a_file_of_weights_that_is_damaged(name, damage, source, refuses):
    if name == "model.safetensors":
        (source / "flax_model.msgpack").unlink()
    path = source / name
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with refuses(rf"^--model_name_or_path {source}: no model: .*({name}|git-lfs)"):
        load(source)
    if name == "model.safetensors":  # seen before the text is prepared
        with refuses(rf"^--model_name_or_path {source}: no model: model.safetensors is cut short, damaged or"):
            weights.check(AutoConfig.from_pretrained(source), arguments_for(model_name_or_path=str(source)), script.MODELS)


@pytest.mark.parametrize("name", ["flax_model.msgpack", "model.safetensors"])
def test_nothing_in_a_file_of_weights_is_executed(name, source, refuses):
    if name == "model.safetensors":
        (source / "flax_model.msgpack").unlink()
    (source / name).write_bytes(pickle.dumps(Malicious(source / "executed")))
    with refuses(rf"^--model_name_or_path {source}: no model: .*{name}"):
        load(source)
    assert not (source / "executed").exists()


@pytest.mark.torch
@pytest.mark.parametrize("content", ["pickle", "malicious", "cut", "empty", "text", "list"])
def test_a_pickle_that_is_damaged_or_does_something(content, source, refuses):
    import torch

    (source / "flax_model.msgpack").unlink()
    (source / "model.safetensors").rename(source / "weights")
    path, state = source / "pytorch_model.bin", {k: torch.tensor(v) for k, v in load_file(source / "weights").items()}
    torch.save(state, path)
    load(source)
    if content == "pickle":
        path.write_bytes(pickle.dumps(Malicious(source / "executed")))
    elif content in ("malicious", "list"):
        torch.save(state | {"more": Malicious(source / "executed")} if content == "malicious" else [1, 2], path)
    else:
        path.write_bytes({"cut": path.read_bytes()[:5000], "empty": b"", "text": b"not weights"}[content])
    with refuses(rf"^--model_name_or_path {source}: no model: pytorch_model.bin is (damaged, or holds more|cut short)"):
        load(source)
    assert not (source / "executed").exists()


@pytest.mark.parametrize("name", ["flax_model.msgpack", "model.safetensors"])
def test_weights_of_another_shape(name, source, refuses):
    """No advice that only Python code could follow."""
    if name == "model.safetensors":
        (source / "flax_model.msgpack").unlink()
    config = AutoConfig.from_pretrained(source)
    config.vocab_size += 64
    with refuses("no model: the configuration is not that of the weights: .* has the shape .*576.*512|512.*576"):
        load(source, config)


def test_no_weights_at_all(source, refuses):
    """Seen before the text is prepared; as are an index of nothing, and those that only PyTorch could read."""
    args, config = arguments_for(model_name_or_path=str(source)), AutoConfig.from_pretrained(source)
    weights.check(config, args, script.MODELS)
    (source / "flax_model.msgpack").unlink()
    weights.check(config, args, script.MODELS)
    (source / "model.safetensors").unlink()
    with refuses(f"^--model_name_or_path {source}: no model: there is no flax_model.msgpack, no model.safetensors and no"):
        weights.check(config, args, script.MODELS)
    (source / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with refuses("its weights are in pytorch_model.bin, which needs PyTorch: install it"):
            weights.check(config, args, script.MODELS)
    (source / "model.safetensors.index.json").write_text("{}")
    with refuses("no model: model.safetensors.index.json is no index of weights"):
        weights.check(config, args, script.MODELS)


def test_a_tokenizer_in_use_is_saved_as_it_was(byte_level_tokenizer, source, tmp_path):
    """A stream tokenises, and truncates, in another thread while the model is saved."""
    tokenizer, started = copy.deepcopy(byte_level_tokenizer), threading.Event()

    def tokenize():
        with tokenization.tokenizer_as_loaded(tokenizer):
            assert len(tokenizer("one two three four five", truncation=True, max_length=4).input_ids) == 4
            started.set()
            time.sleep(0.3)

    thread = threading.Thread(target=tokenize)
    thread.start()
    started.wait()
    assert tokenizer.backend_tokenizer.truncation is not None
    config = AutoConfig.from_pretrained(source)
    model = script.MODELS[config.model_type](config)
    (tmp_path / "out").mkdir()
    params = load_file(source / "model.safetensors")
    weights.save_model(str(tmp_path / "out"), model, params, tokenizer, save_safetensors=False)
    thread.join()
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["truncation"] is None


# ---- Can a model be made? ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [script, run_clm_flax, run_t5_mlm_flax, run_bart_dlm_flax, run_pretraining_flax],
    ids=lambda module: module.__name__,
)
def test_models_of_all_types_can_be_made(module):
    """In their default sizes; their configurations are left as they were."""
    for model_type in module.MODELS:
        config = CONFIG_MAPPING[model_type]()
        module.DataTrainingArguments().adapt_config(config, 128)
        before = config.to_dict()
        weights.check(config, arguments_for(module), module.MODELS)
        assert config.to_dict() == before


def test_sizes_that_nobody_thought_of(refuses):
    """Whatever jax and the classes make of them is one line."""
    config = GPT2Config(n_embd=32, n_head=2, n_inner=-1)  # past the checks of values
    with refuses("^the configuration makes no model: [A-Z]\\w+: "):
        weights.check(config, arguments_for(run_clm_flax), run_clm_flax.MODELS)


def test_checking_touches_no_device(run_script, tmp_path):
    """Of any type, so that the process can still be forked, to tokenise."""
    (tmp_path / "check.py").write_text(
        """from jax._src import xla_bridge
from flaxlm import arguments, weights
import run_bart_dlm_flax, run_clm_flax, run_mlm_flax, run_pretraining_flax, run_t5_mlm_flax
from transformers import CONFIG_MAPPING
training_args = arguments.TrainingArguments(output_dir="out")
for script in (run_bart_dlm_flax, run_clm_flax, run_mlm_flax, run_pretraining_flax, run_t5_mlm_flax):
    args = arguments.Arguments(arguments.ModelArguments(), script.DataTrainingArguments(), training_args)
    for model_type in script.MODELS:
        config = CONFIG_MAPPING[model_type]()
        args.data.adapt_config(config, 128)
        weights.check(config, args, script.MODELS)
        assert not xla_bridge.backends_are_initialized(), (script.__name__, model_type)
"""
    )
    done = run_script(tmp_path / "check.py", env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


# ---- What is read of files, and said of it -------------------------------------------------------------------------------


def tiny_model(module: ModuleType, model_type: str, **fields) -> nn.Module:
    """A tiny model of a type that a script trains."""
    values = variants(KINDS.get(module.__name__, "seq2seq"), model_type)[0]
    return module.MODELS[model_type](CONFIG_MAPPING[model_type](**values | fields))


def random_params(model: nn.Module, seed: int = 0) -> dict[str, Any]:
    rng, shapes = np.random.default_rng(seed), weights.shapes_of(model)
    return unflatten_dict({path: rng.standard_normal(shape.shape, np.float32) for path, shape in shapes.items()})


def write_pytorch(directory: Path, model: nn.Module, state: dict[str, np.ndarray]) -> None:
    model.config.save_pretrained(directory)
    save_file(state, directory / "model.safetensors", {"format": "pt"})


def read(directory: Path, model: nn.Module, **flags) -> dict[str, np.ndarray]:
    """The weights of a model that a directory holds, by their paths joined by dots."""
    found = weights.read(model, arguments.ModelArguments(model_name_or_path=str(directory), **flags))
    assert {array.dtype for array in found.values()} == {np.dtype("float32")}
    return {".".join(path): array for path, array in found.items()}


def assert_equal(found: dict[str, np.ndarray], params: Any) -> None:
    expected = flatten_dict(params, sep=".")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_read_again(case, byte_level_tokenizer, messages_logged, tmp_path):
    """In either layout: every weight, nothing left over, and nothing to say."""
    module, model_type = CASES[case]
    model = tiny_model(module, model_type)
    params = random_params(model)
    weights.save_model(str(tmp_path), model, params, byte_level_tokenizer, save_safetensors=True)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == [models.pytorch_class(model)]
    again = module.MODELS[config.model_type](config)
    assert_equal(read(tmp_path, again), params)
    (tmp_path / "flax_model.msgpack").unlink()
    assert_equal(read(tmp_path, again), params)
    assert not [message for message in messages_logged if "Fresh" in message or "Not used" in message]


def test_from_pretrained(byte_level_tokenizer, tmp_path):
    """Model and weights, for use elsewhere; weights that are missing are an error."""
    model = tiny_model(run_clm_flax, "llama")
    params = random_params(model)
    weights.save_model(str(tmp_path), model, params, byte_level_tokenizer, save_safetensors=True)
    again, found = weights.from_pretrained(str(tmp_path), models.CAUSAL)
    assert type(again) is type(model)
    assert_equal(flatten_dict(found, sep="."), params)
    (tmp_path / "flax_model.msgpack").unlink()
    state = load_file(tmp_path / "model.safetensors")
    write_pytorch(tmp_path, model, {name: array for name, array in state.items() if name != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"has no weights for model\.norm\.weight"):
        weights.from_pretrained(str(tmp_path), models.CAUSAL)


SAVED = {saved.model_type: saved for saved in golden.read_saved()}
TRAINED = {"masked": models.MASKED, "causal": models.CAUSAL, "pretraining": models.SENTENCE_PAIRS}
TRAINED["seq2seq"] = models.SPANS | models.DENOISING


@pytest.mark.parametrize("model_type", SAVED)
def test_models_that_transformers_4_saved(model_type, messages_logged):
    """flax_model.msgpack of each family: every weight is used, and none is missing."""
    saved = SAVED[model_type]
    classes = TRAINED[saved.kind]
    config = AutoConfig.from_pretrained(saved.directory)
    args = arguments_for(model_name_or_path=str(saved.directory))
    params = weights.load(classes[model_type](config), args, sharding.all_devices())
    assert flatten_dict(params).keys() == weights.shapes_of(classes[model_type](config)).keys()
    assert messages_logged == [f"Loading weights from {saved.directory}"]


def test_missing_and_superfluous_weights_are_named(messages_logged, tmp_path):
    """Six of them, by the names that they have in files; fresh ones take the place of those that are missing."""
    model = tiny_model(script, "bert")
    state = layouts.to_pytorch(random_params(model))
    missing = [name for name in state if name.startswith("cls.")]
    assert len(missing) == 5
    write_pytorch(
        tmp_path, model,
        {name: array for name, array in state.items() if name not in missing}
        | {f"more.{i}.weight": np.ones(1, np.float32) for i in range(8)} | {"position_ids": np.arange(4)},
    )  # fmt: skip
    params = load(tmp_path, model.config)
    assert messages_logged[1:] == [
        f"Fresh, since the files have no such weights: {', '.join(sorted(missing))}",
        f"Not used of the files: {', '.join(f'more.{i}.weight' for i in range(6))}, and 2 more",
    ]
    np.testing.assert_array_equal(params["cls"]["predictions"]["transform"]["LayerNorm"]["scale"], 1)
    name = "bert.embeddings.word_embeddings.weight"
    np.testing.assert_array_equal(params["bert"]["embeddings"]["word_embeddings"]["embedding"], state[name])


def test_fresh_weights_follow_the_seed(tmp_path):
    """Those that files don't hold are the ones that a run from nothing begins with."""
    model = tiny_model(script, "bert")
    state = {k: v for k, v in layouts.to_pytorch(random_params(model)).items() if not k.startswith("cls.")}
    write_pytorch(tmp_path, model, state)
    head = load(tmp_path, model.config)["cls"]
    fresh = weights.load(model, arguments_for(), sharding.all_devices())["cls"]
    jax.tree.map(np.testing.assert_array_equal, head, fresh)


def test_files_of_another_model(refuses, tmp_path):
    """None of its weights: what there is, is named; and nothing is trained under its name."""
    model = tiny_model(script, "bert")
    write_pytorch(tmp_path, model, {f"vision.{i}": np.ones(1, np.float32) for i in range(5)})
    pattern = "its files hold none of the weights of BertForMaskedLM, but vision.0, vision.1, vision.2, ...$"
    with refuses(rf"^--model_name_or_path {tmp_path}: no model: {pattern}"):
        read(tmp_path, model)


@pytest.mark.parametrize("without", ["a head", "a head, in early names"])
@pytest.mark.parametrize("case", ["run_mlm_flax/bert", "run_mlm_flax/roberta", "run_mlm_flax/modernbert", "run_clm_flax/gpt2",
                                  "run_clm_flax/llama", "run_bart_dlm_flax/bart"])  # fmt: skip
def test_a_model_without_its_head(case, without, messages_logged, tmp_path):
    """As AutoModel saves it: names lack their first part, and the head is fresh."""
    module, model_type = CASES[case]
    model = tiny_model(module, model_type)
    params = random_params(model)
    body = next(path[0] for path in weights.shapes_of(model) if len(path) > 3 and path[0] not in ("cls", "lm_head"))
    state = {name.partition(".")[2]: array for name, array in layouts.to_pytorch(params).items() if name.startswith(f"{body}.")}
    if without != "a head":
        early = dict(layouts.EARLY_NAMES)
        state = {functools.reduce(lambda name, now: name.replace(now, early[now]), early, k): v for k, v in state.items()}
    write_pytorch(tmp_path, model, state)
    assert_equal(read(tmp_path, model), {body: params[body]})
    fresh = {layouts.pytorch_name(path, 2)[0] for path in weights.shapes_of(model) if path[0] != body}
    assert messages_logged == ([f"Fresh, since the files have no such weights: {', '.join(sorted(fresh))}"] if fresh else [])


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(
    ("case", "head"),
    [("run_mlm_flax/bert", "cls.predictions.decoder"), ("run_clm_flax/gpt2", "lm_head"), ("run_clm_flax/llama", "lm_head"),
     ("run_mlm_flax/electra", "generator_lm_head"), ("run_mlm_flax/distilbert", "vocab_projector"),
     ("run_mlm_flax/modernbert", "decoder"), ("run_mlm_flax/roberta", "lm_head.decoder"),
     ("run_mlm_flax/albert", "predictions.decoder")],
)  # fmt: skip
def test_heads_with_the_weights_of_the_words(case, head, is_tied, messages_logged, tmp_path):
    """A file may have the table twice, as pickles do; a model with a head of its own reads it, and misses it."""
    module, model_type = CASES[case]
    model = tiny_model(module, model_type, tie_word_embeddings=is_tied)
    params = random_params(model)
    state = layouts.to_pytorch(params)
    name = f"{head}.weight"
    assert (name in state) != is_tied
    write_pytorch(tmp_path, model, state | ({name: np.ones((2, 2), np.float32)} if is_tied else {}))
    assert_equal(read(tmp_path, model), params)
    assert not messages_logged
    if not is_tied:
        kept = state.keys() - {name, *layouts.copies(state)}
        write_pytorch(tmp_path, model, {key: state[key] for key in kept})
        read(tmp_path, model)
        assert messages_logged == [f"Fresh, since the files have no such weights: {name}"]


def test_tables_that_are_two(refuses, tmp_path):
    """PyTorch trains one for each side if BART's head is its own; here there is one, and none is dropped without a word."""
    model = tiny_model(run_bart_dlm_flax, "bart", tie_word_embeddings=False)
    params = random_params(model)
    state = layouts.to_pytorch(params)
    names = "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"
    for name in names:
        state[name] = state[name] + 1
    write_pytorch(tmp_path, model, state)  # and none of them is model.shared.weight, with which nothing is computed
    np.testing.assert_array_equal(read(tmp_path, model)["model.shared.embedding"], state[names[0]])
    write_pytorch(tmp_path, model, state | {names[0]: state[names[0]] + 1})
    with refuses(f"no model: {' and '.join(names)} differ; here encoder and decoder have one table$"):
        read(tmp_path, model)


def test_numbers_of_half_the_size(tmp_path):
    """bfloat16 and float16 are read exactly."""
    model = tiny_model(run_clm_flax, "llama")
    params = random_params(model)
    for dtype in (jnp.bfloat16, jnp.float16):
        state = {name: array.astype(dtype) for name, array in layouts.to_pytorch(params).items()}
        write_pytorch(tmp_path, model, state)
        assert_equal(read(tmp_path, model), jax.tree.map(lambda a: a.astype(dtype).astype(np.float32), params))  # noqa: B023


def test_weights_in_parts(messages_logged, tmp_path):
    model = tiny_model(run_clm_flax, "llama")
    params = random_params(model)
    state = layouts.to_pytorch(params)
    names = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(state)}
    for part in set(names.values()):
        save_file({name: state[name] for name in state if names[name] == part}, tmp_path / part)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert_equal(read(tmp_path, model), params)
    assert not messages_logged


@pytest.mark.torch
@pytest.mark.parametrize("case", ["run_mlm_flax/bert", "run_clm_flax/gpt2", "run_clm_flax/qwen3", "run_t5_mlm_flax/t5",
                                  "run_bart_dlm_flax/bart"])  # fmt: skip
def test_parts_that_pytorch_wrote(case, messages_logged, tmp_path):
    """save_pretrained with a limit of a file's size: the same weights, of which none is missing or left over."""
    import transformers

    module, model_type = CASES[case]
    model = tiny_model(module, model_type)
    params = random_params(model)
    write_pytorch(tmp_path, model, layouts.to_pytorch(params))
    pytorch_model = getattr(transformers, models.pytorch_class(model)).from_pretrained(tmp_path)
    pytorch_model.save_pretrained(tmp_path / "parts", max_shard_size="8KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    config = AutoConfig.from_pretrained(tmp_path / "parts")
    assert_equal(read(tmp_path / "parts", module.MODELS[model_type](config)), params)
    assert not messages_logged


# ---- More tokens ---------------------------------------------------------------------------------------------------------


def test_rows_for_tokens_that_the_weights_do_not_know(messages_logged, tmp_path):
    """The mean of the others: of embeddings, of the head's bias, of columns of a head of its own; nothing else is touched."""
    for is_tied in (True, False):
        model = tiny_model(script, "bert", tie_word_embeddings=is_tied)
        params, num_tokens = random_params(model), model.config.vocab_size
        write_pytorch(tmp_path, model, layouts.to_pytorch(params))
        model.config.vocab_size += 16
        messages_logged.clear()
        found, expected = read(tmp_path, model, resize_token_embeddings=True), flatten_dict(params, sep=".")
        changed = {name for name in expected if found[name].shape != expected[name].shape}
        assert changed == {"bert.embeddings.word_embeddings.embedding", "cls.predictions.bias"} | (
            set() if is_tied else {"cls.predictions.decoder.kernel"}
        )
        for name, array in found.items():
            axis = 1 if name.endswith("kernel") else 0
            kept, new = np.split(array, [num_tokens], axis) if name in changed else (array, None)
            np.testing.assert_array_equal(kept, expected[name])
            if new is not None:
                mean = np.broadcast_to(expected[name].mean(axis, keepdims=True), new.shape)
                np.testing.assert_allclose(new, mean, rtol=1e-5, atol=1e-6)
        (message,) = messages_logged
        assert message.startswith("New rows, each the mean of those that were there: ")
        assert {name.replace(".", "/") for name in changed} == set(message.partition(": ")[2].split(", "))


def test_only_tokens_get_rows(refuses, tmp_path):
    """Not positions, nor a vocabulary that shrinks; without the flag nothing does."""
    model = tiny_model(script, "bert")
    write_pytorch(tmp_path, model, layouts.to_pytorch(random_params(model)))
    sizes = model.config.vocab_size, model.config.max_position_embeddings
    for vocab_size, num_positions, resize in ((0, 4, True), (-8, 0, True), (8, 0, False)):
        model.config.vocab_size, model.config.max_position_embeddings = sizes[0] + vocab_size, sizes[1] + num_positions
        with refuses("no model: the configuration is not that of the weights: .* has the shape "):
            read(tmp_path, model, resize_token_embeddings=resize)


def test_training_with_more_tokens_than_the_weights_know(trained, corpus, error_of, byte_level_tokenizer, tmp_path):
    """The configuration grows with the tokenizer, to a multiple of 64; else the line says what to do."""
    tokenizer = copy.deepcopy(byte_level_tokenizer)
    assert tokenizer.add_tokens([f"<new{i}>" for i in range(6)]) == 6  # 515 ids, of which the weights have rows for 512
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("<new1> <new5> a few words\n" * 40)
    flags = ["--model_name_or_path", trained[0], "--tokenizer_name", tmp_path / "tokenizer", "--max_seq_length", 32]
    flags += ["--train_file", tmp_path / "text.txt", "--output_dir", tmp_path / "out", "--max_steps", 2]
    flags = [str(flag) for flag in flags]
    line = error_of(script.main, flags)
    assert "the tokenizer has ids up to 514, the model embeds only 512: use the tokenizer these weights were" in line
    assert "or add --resize_token_embeddings" in line
    results = script.main([*flags, "--resize_token_embeddings"])
    assert np.isfinite(results["eval_loss"])
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.vocab_size == 576
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved["roberta.embeddings.word_embeddings.weight"].shape == (576, 32)
    assert saved["lm_head.bias"].shape == (576,)
    before = load_file(trained[0] / "model.safetensors")["roberta.embeddings.word_embeddings.weight"]
    np.testing.assert_allclose(saved["roberta.embeddings.word_embeddings.weight"][:512], before, atol=1e-3)


def test_a_fresh_model_is_not_resized(roberta_dir, corpus, error_of, tmp_path):
    flags = ["--config_name", roberta_dir, "--tokenizer_name", roberta_dir, "--train_file", corpus, "--output_dir", tmp_path]
    line = error_of(script.main, [str(flag) for flag in [*flags, "--resize_token_embeddings"]])
    assert (
        "--resize_token_embeddings: adds rows to the weights of --model_name_or_path; a fresh model has what it needs" in line
    )


@pytest.mark.parametrize("is_tied", [True, False])
def test_what_config_json_says_of_the_head(is_tied, t5_dir, tmp_path):
    """transformers 5 calls all of T5 tied and keeps the difference under another name; 4 must not tie T5 1.1."""
    model = tiny_model(run_t5_mlm_flax, "t5", tie_word_embeddings=is_tied)
    tokenizer = AutoTokenizer.from_pretrained(t5_dir)
    weights.save_model(str(tmp_path), model, random_params(model), tokenizer, save_safetensors=True)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is is_tied
    again = run_t5_mlm_flax.MODELS["t5"](AutoConfig.from_pretrained(tmp_path))
    assert again.has_own_head is not is_tied
