# SPDX-License-Identifier: Apache-2.0
"""Files of weights: which is read, whole or in parts, from a directory or from the Hub, and in which number formats."""

import importlib.util
import json
import os
import pickle
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from huggingface_hub import HfApi
from safetensors.numpy import save_file

from flaxlm import arguments, weight_files
from tests.hub_server import serve

hub = pytest.fixture(serve, name="hub")

ARRAYS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b.bias": np.float32([0.5, -2])}


def open_weights(source, **flags) -> weight_files.Stored:
    return weight_files.open_weights(arguments.ModelArguments(model_name_or_path=str(source), **flags))


def assert_holds(stored: weight_files.Stored, arrays=ARRAYS) -> None:
    """These arrays, float32."""
    assert stored.keys() == set(arrays)
    for name, array in arrays.items():
        assert stored.read(name).dtype == np.float32
        np.testing.assert_array_equal(stored.read(name), array.astype(np.float32))


def write_parts(directory: Path, name: str = "model.safetensors", save=save_file) -> list[str]:
    """ARRAYS, each in a file of its own, and their index."""
    stem, _, suffix = name.partition(".")
    names = [f"{stem}-{i:05}-of-00002.{suffix}" for i in (1, 2)]
    for part, (key, array) in zip(names, ARRAYS.items(), strict=True):
        save({key: array}, directory / part)
    index = {"metadata": {"total_size": 32}, "weight_map": dict(zip(ARRAYS, names, strict=True))}
    (directory / f"{name}.index.json").write_text(json.dumps(index))
    return names


# ---- In a directory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, np.float64])
def test_numbers_become_float32(dtype, tmp_path):
    arrays = {name: array.astype(dtype) for name, array in ARRAYS.items()}
    save_file(arrays, tmp_path / "model.safetensors", {"format": "pt"})
    assert_holds(open_weights(tmp_path), arrays)
    assert open_weights(tmp_path).is_pytorch
    tree = {"a": {"weight": arrays["a.weight"]}, "b": {"bias": arrays["b.bias"]}}
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack_serialize(tree))
    assert_holds(open_weights(tmp_path), {name.replace(".", "/"): array for name, array in arrays.items()})
    assert not open_weights(tmp_path).is_pytorch


def test_which_file_is_read(tmp_path):
    """Ours before PyTorch's, whole files before parts; and none where there is none."""
    assert weight_files.find(str(tmp_path)) is None
    for name in reversed(weight_files.NAMES):
        (tmp_path / name).write_text("")
        assert weight_files.find(str(tmp_path)) == name


@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack"])
def test_parts(name, tmp_path):
    """As PyTorch and transformers 4's Flax classes write them."""

    def save_tree(arrays, path):
        ((key, array),) = arrays.items()
        path.write_bytes(msgpack_serialize({key.partition(".")[0]: {key.partition(".")[2]: array}}))

    write_parts(tmp_path, name, save_file if name == "model.safetensors" else save_tree)
    weight_files.check(str(tmp_path))
    separator = "." if name == "model.safetensors" else "/"
    assert_holds(open_weights(tmp_path), {key.replace(".", separator): array for key, array in ARRAYS.items()})


def test_a_part_that_is_not_there(tmp_path, refuses):
    names = write_parts(tmp_path)
    (tmp_path / names[1]).unlink()
    line = f"^--model_name_or_path {tmp_path}: no model: model.safetensors.index.json names {names[1]}, which is not there$"
    for function in (open_weights, weight_files.check):
        with refuses(line):
            function(str(tmp_path))


def test_a_part_that_is_cut_short(tmp_path, refuses):
    names = write_parts(tmp_path)
    (tmp_path / names[1]).write_bytes((tmp_path / names[1]).read_bytes()[:-1])
    for function in (open_weights, weight_files.check):
        with refuses(f"no model: {names[1]} is cut short, damaged or of another kind: "):
            function(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        "", "not JSON", "[1]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 5}}',
        '{"weight_map": null}', '{"weight_map": {"a": ""}}', b"\xff\xfe",
    ],
)  # fmt: skip
def test_an_index_that_is_none(content, tmp_path, refuses):
    (tmp_path / "model.safetensors.index.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    for function in (open_weights, weight_files.check):
        with refuses(f"^--model_name_or_path {tmp_path}: no model: model.safetensors.index.json is no index of weights: "):
            function(str(tmp_path))


@pytest.mark.parametrize(
    "where", ["../secret.safetensors", "{outside}/secret.safetensors", "sub/../../secret.safetensors", "/etc/passwd"]
)
def test_an_index_leads_nowhere_else(where, tmp_path, refuses):
    """Only to files beside it."""
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    save_file(ARRAYS, tmp_path / "secret.safetensors")
    index = {"weight_map": dict.fromkeys(ARRAYS, where.format(outside=tmp_path))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    for function in (open_weights, weight_files.check):
        with refuses("model.safetensors.index.json is no index of weights: it names no files beside it$"):
            function(str(directory))


# ---- Pickles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickles_without_pytorch(name, tmp_path, refuses, monkeypatch):
    """Said before anything is done, with what to do."""
    part = "pytorch_model-00001-of-00001.bin"
    (tmp_path / part).write_bytes(b"not read")
    (tmp_path / name).write_text(json.dumps({"weight_map": {"a": part}}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for function in (open_weights, weight_files.check):
        with refuses(
            r"its weights are in pytorch_model.bin, which needs PyTorch: install it \(pip install torch\), or save the"
        ):
            function(str(tmp_path))


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("in_parts", [False, True])
def test_pickles(dtype, in_parts, tmp_path):
    import torch

    def save(arrays, path):
        torch.save({key: torch.tensor(array).to(getattr(torch, dtype)) for key, array in arrays.items()}, path)

    if in_parts:
        write_parts(tmp_path, "pytorch_model.bin", save)
    else:
        save(ARRAYS, tmp_path / "pytorch_model.bin")
    weight_files.check(str(tmp_path))
    assert_holds(open_weights(tmp_path))


@pytest.mark.torch
def test_a_pickle_holds_more_than_weights(tmp_path):
    """Numbers and texts, as some programs save them beside the weights, are left alone."""
    import torch

    torch.save({"a.weight": torch.tensor(ARRAYS["a.weight"]), "step": 5, "note": "mine"}, tmp_path / "pytorch_model.bin")
    assert_holds(open_weights(tmp_path), {"a.weight": ARRAYS["a.weight"]})


# ---- On the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(hub, tmp_path, monkeypatch):
    """repository(directory) -> name, with its files; what is downloaded goes into a cache of its own."""
    monkeypatch.setattr(weight_files, "default_cache", lambda: str(tmp_path / "cache"))

    def upload(directory: Path) -> str:
        api = HfApi(token="hf_good")
        api.create_repo("tester/model", exist_ok=True)
        api.upload_folder(repo_id="tester/model", folder_path=directory)
        return "tester/model"

    return upload


@pytest.fixture
def directory(tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def test_parts_from_the_hub(hub, repository, directory):
    names = write_parts(directory)
    name = repository(directory)
    assert_holds(open_weights(name))
    asked = {request.path.rpartition("/")[2] for request in hub.requests if "/resolve/" in request.path}
    assert asked == {*weight_files.NAMES[:4], *names}


def test_the_revision_that_is_asked_for(hub, repository, directory):
    save_file(ARRAYS, directory / "model.safetensors")
    name = repository(directory)
    first = hub.commits(name)[-1]["oid"]
    other = {"other": np.ones(1, np.float32)}
    save_file(other, directory / "model.safetensors")
    repository(directory)
    assert_holds(open_weights(name), other)
    assert_holds(open_weights(name, model_revision=first))


def test_a_repository_without_weights(hub, repository, directory, refuses):
    (directory / "config.json").write_text("{}")
    with refuses(
        "^--model_name_or_path tester/model: no model: neither flax_model.msgpack nor model.safetensors nor pytorch_m"
    ):
        open_weights(repository(directory))


def test_a_repository_that_is_not_there(hub, repository, refuses):
    with refuses("^--model_name_or_path tester/none: no model: "):
        open_weights("tester/none")


def test_a_part_that_is_not_in_the_repository(hub, repository, directory, refuses):
    names = write_parts(directory)
    (directory / names[1]).unlink()
    with refuses(f"^--model_name_or_path tester/model: no model: model.safetensors.index.json names {names[1]}, which is not"):
        open_weights(repository(directory))


def test_an_index_on_the_hub_leads_nowhere_else(hub, repository, directory, refuses):
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../other/model/resolve/main/a"}}')
    with refuses("model.safetensors.index.json is no index of weights: it names no files beside it$"):
        open_weights(repository(directory))


def test_nothing_of_the_hub_is_executed(hub, repository, directory, refuses, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    (directory / "model.safetensors").write_bytes(pickle.dumps(Malicious()))
    with refuses("no model: model.safetensors is cut short, damaged or of another kind"):
        open_weights(repository(directory))
    assert not (tmp_path / "executed").exists()
