# SPDX-License-Identifier: Apache-2.0
"""Files of weights, in a directory or on the Hub: which there are, whole or in parts, and reading one array after the other."""

import contextlib
import importlib.util
import json
import os
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open

from flaxlm import arguments, cli

NAMES = (  # in the order in which they are looked for; an index lists parts
    "flax_model.msgpack", "flax_model.msgpack.index.json", "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip


class Stored(NamedTuple):
    """Arrays in files: names as in PyTorch's layout or, joined by "/", as in Flax's, and a function that reads each."""

    readers: dict[str, Callable[[], np.ndarray]]
    is_pytorch: bool

    def keys(self) -> set[str]:
        return set(self.readers)

    def read(self, name: str) -> np.ndarray:
        return self.readers[name]()


def find(directory: str) -> str | None:
    """The file of a directory that weights are read from, or an index of such files."""
    return next((name for name in NAMES if os.path.isfile(os.path.join(directory, name))), None)


def check(directory: str) -> None:
    """Are there weights in a directory that can be read; and is model.safetensors, whose beginning tells its size, whole?"""
    name, place = find(directory), f"--model_name_or_path {directory}"
    if name is None:
        cli.fail(f"{place}: no model: there is no flax_model.msgpack, no model.safetensors and no pytorch_model.bin in it")
    paths = [os.path.join(directory, part) for part in parts(os.path.join(directory, name), place)]
    for path in paths:
        if not os.path.isfile(path):
            cli.fail(f"{place}: no model: {name} names {os.path.basename(path)}, which is not there")
    if name.startswith("pytorch_model.bin"):
        require_pytorch(place)
    if name.startswith("model.safetensors"):
        for path in paths:
            with opening(path, place), safe_open(path, "numpy"):
                pass


def open_weights(model_args: arguments.ModelArguments) -> Stored:
    """The weights that --model_name_or_path names; from the Hub they are downloaded first."""
    source = model_args.model_name_or_path
    place = f"--model_name_or_path {source}"
    if os.path.isdir(source):
        check(source)
        name = find(source)
        paths = [os.path.join(source, part) for part in parts(os.path.join(source, name), place)]
    else:
        name, paths = download(model_args, place)
    if name.startswith("pytorch_model.bin"):
        require_pytorch(place)
    open_file = {"flax_model": open_msgpack, "model": open_safetensors, "pytorch_model": open_pickle}[name.partition(".")[0]]
    readers: dict[str, Callable[[], np.ndarray]] = {}
    for path in paths:
        with opening(path, place):
            found = open_file(path)
            if not found:
                raise ValueError("it holds no arrays")
            readers |= found
    return Stored(readers, not name.startswith("flax_model"))


def parts(path: str, place: str) -> list[str]:
    """The names of the files that an index lists; of a file that is none, its own."""
    name = os.path.basename(path)
    if not name.endswith(".index.json"):
        return [name]
    try:
        names = set(json.loads(Path(path).read_text("utf-8"))["weight_map"].values())
        if not names or any(not part or os.path.basename(part) != part for part in names):
            raise ValueError("it names no files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        cli.fail(f"{place}: no model: {name} is no index of weights: {cli.first_line(error)}")
    return sorted(names)


def download(model_args: arguments.ModelArguments, place: str) -> tuple[str, list[str]]:
    """The name of the file or index that a repository of the Hub has, and the paths of its parts in the cache."""
    options = {"repo_id": model_args.model_name_or_path, "revision": model_args.model_revision}
    fetch = partial(
        huggingface_hub.hf_hub_download, cache_dir=model_args.cache_dir or default_cache(), token=model_args.token, **options
    )
    for name in NAMES:
        file = name
        try:
            path, paths = fetch(filename=name), []
            for file in parts(path, place):
                paths.append(path if file == name else fetch(filename=file))
            return name, paths
        except EntryNotFoundError as error:  # there is none, or none in the cache while the Hub cannot be reached
            if file != name:
                cli.fail(f"{place}: no model: {name} names {file}, which is not there: {cli.first_line(error)}")
            missing = error
        except cli.Ending:
            raise
        except Exception as error:
            cli.fail(f"{place}: no model: {cli.first_line(error)}")
    cli.fail(f"{place}: no model: neither {' nor '.join(NAMES[::2])} is there: {cli.first_line(missing)}")


def default_cache() -> str:
    return huggingface_hub.constants.HF_HUB_CACHE


# ---- Three kinds of files ----------------------------------------------------------------------------------------------


def open_msgpack(path: str) -> dict[str, Callable[[], np.ndarray]]:
    tree = msgpack_restore(Path(path).read_bytes())
    if not isinstance(tree, dict):
        raise ValueError("it holds no tree")
    flat = flatten_dict(tree)
    return {"/".join(map(str, key)): partial(as_float, array) for key, array in flat.items() if hasattr(array, "shape")}


def open_safetensors(path: str) -> dict[str, Callable[[], np.ndarray]]:
    file = safe_open(path, "flax")
    return {name: lambda name=name: as_float(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def open_pickle(path: str) -> dict[str, Callable[[], np.ndarray]]:
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    return {name: lambda tensor=tensor: tensor.float().numpy() for name, tensor in tensors.items()}


def as_float(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float32)


def require_pytorch(place: str) -> None:
    if importlib.util.find_spec("torch") is None:
        remedy = "install it (pip install torch), or save the model as model.safetensors elsewhere"
        cli.fail(f"{place}: its weights are in pytorch_model.bin, which needs PyTorch: {remedy}")


@contextlib.contextmanager
def opening(path: str, place: str) -> Iterator[None]:
    """Within this context an error of the libraries that read weights is one line that names the file."""
    name = os.path.basename(path)
    try:
        yield
    except (cli.Ending, MemoryError):
        raise
    except pickle.UnpicklingError:
        cli.fail(f"{place}: no model: {name} is damaged, or holds more than weights, which is not opened")
    except Exception as error:
        reason = f"{type(error).__name__}: {cli.first_line(error)}"
        cli.fail(f"{place}: no model: {name} is cut short, damaged or of another kind: {reason}")
