# SPDX-License-Identifier: Apache-2.0
"""Weights of a model: fresh, or from files of a directory or of the Hub; and saving the whole model, in two layouts."""

import copy
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.serialization import msgpack_serialize
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from flaxlm import arguments, cli, layers, layouts, models, randomness, sharding, tokenization, weight_files

logger = logging.getLogger(__name__)


def check(config: PretrainedConfig, args: arguments.Arguments, classes: arguments.Classes) -> None:
    """Refuse a configuration that no model follows, and weights that are not there or cut short.

    Before the text is prepared, in less than a second, and without touching a device, so that the process can still fork.
    """
    source = args.model.model_name_or_path
    if source and os.path.isdir(source):
        weight_files.check(source)
    models.check(config, args.training.attention_implementation)
    shallow = copy.deepcopy(config)  # layers are alike
    for name in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"):
        if isinstance(getattr(shallow, name, None), int):
            setattr(shallow, name, min(getattr(shallow, name), 2))
    try:
        shapes_of(classes[config.model_type](shallow))
    except Exception as error:  # whatever the classes and jax make of sizes that do not go together
        cli.fail(f"the configuration makes no model: {type(error).__name__}: {cli.first_line(error)}")


def init(model: nn.Module, rng: jax.Array) -> dict[str, Any]:
    """Fresh weights, float32."""
    ids = jnp.ones((1, 2), jnp.int32)
    return model.init(rng, *((ids, ids) * (2 if models.has_decoder(model) else 1)))["params"]


def shapes_of(model: nn.Module) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """The shapes of a model's weights by their paths; no device is touched."""
    return flatten_dict(jax.eval_shape(lambda: init(model, jax.random.key(0))))


def load(model: nn.Module, args: arguments.Arguments, devices: sharding.Devices) -> Any:
    """The weights to start from, float32, on every device or spread over them; never all on one if they are spread."""
    source, found = args.model.model_name_or_path, {}
    if source:
        logger.info("Loading weights from %s", source)
        found = read(model, args.model)
        model.config.dtype = "float32"  # what is trained and saved here, whatever the checkpoint was stored in

    return initialize(model, randomness.device_rng(args.training.seed, "weights"), found, devices)


def initialize(
    model: nn.Module, rng: jax.Array, found: Mapping[tuple[str, ...], np.ndarray], devices: sharding.Devices
) -> dict[str, Any]:
    """The weights that were found, by their paths, and fresh ones for the rest, float32."""
    shardings = devices.shardings(shapes_of(model))

    def complete(rng: jax.Array, found: Mapping[str, jax.Array]) -> dict[str, Any]:
        return unflatten_dict(flatten_dict(init(model, rng), sep="/") | found, sep="/")

    placed = {"/".join(path): jax.device_put(array, shardings[path]) for path, array in found.items()}
    return jax.jit(complete, out_shardings=unflatten_dict(shardings))(rng, placed)


def from_pretrained(source: str, classes: arguments.Classes, compute: layers.Compute | None = None) -> tuple[nn.Module, Any]:
    """A model of a directory or of the Hub and its weights, for use elsewhere: (model, params). As in

    model, params = weights.from_pretrained("my-run", models.CAUSAL)
    hidden_BTH = model.apply({"params": params}, input_ids_BT, attention_mask_BT)
    scores_BTV = model.apply({"params": params}, hidden_BTH, method="scores")
    """
    config = AutoConfig.from_pretrained(source)
    model = classes[config.model_type](config, compute or layers.Compute())
    found = read(model, arguments.ModelArguments(model_name_or_path=source))
    if missing := [path for path in shapes_of(model) if path not in found]:
        raise ValueError(f"{source} has no weights for {', '.join(map('.'.join, missing))}")
    return model, unflatten_dict(found)


# ---- From files --------------------------------------------------------------------------------------------------------


def read(model: nn.Module, model_args: arguments.ModelArguments) -> dict[tuple[str, ...], np.ndarray]:
    """The weights of a model that are in files, float32, by their paths; what is missing or superfluous is named in the log.

    With --resize_token_embeddings tables that are too short for the model's vocabulary get rows.
    """
    place = f"--model_name_or_path {model_args.model_name_or_path}"
    stored = weight_files.open_weights(model_args)
    names = layouts.find(stored.keys(), shapes_of(model), stored.is_pytorch)
    if not names:
        some = ", ".join(sorted(stored.keys())[:3])
        cli.fail(f"{place}: no model: its files hold none of the weights of {type(model).__name__}, but {some}, ...")
    check_one_table(stored, names, place)
    found, resized = {}, []
    for path, shape in shapes_of(model).items():
        if path not in names:
            continue
        array = stored.read(names[path])
        if stored.is_pytorch and layouts.pytorch_name(path, array.ndim)[1]:
            array = array.T
        if array.shape != shape.shape and model_args.resize_token_embeddings:
            longer = add_rows(array, shape.shape, model.config.vocab_size)
            resized += [path] if longer is not array else []
            array = longer
        if array.shape != shape.shape:
            reason = f"{names[path]} has the shape {array.shape} in one and {shape.shape} in the other"
            cli.fail(f"{place}: no model: the configuration is not that of the weights: {reason}")
        found[path] = np.asarray(array, np.float32)
    if resized:
        logger.info("New rows, each the mean of those that were there: %s", ", ".join(map("/".join, resized)))
    tell(
        "Fresh, since the files have no such weights",
        [layouts.pytorch_name(p, 2)[0] for p in shapes_of(model) if p not in found],
    )
    tell("Not used of the files", layouts.unused(stored.keys(), names.values(), model.config.tie_word_embeddings))
    return found


def check_one_table(stored: weight_files.Stored, names: Mapping[tuple[str, ...], str], place: str) -> None:
    """Refuse a BART whose sides have tables of embeddings of their own, as PyTorch trains it where the head has one too."""
    tables = [f"model.{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
    is_one = ("model", "shared", "embedding") in names and set(tables) <= stored.keys()
    if is_one and not np.array_equal(*map(stored.read, tables)):
        cli.fail(f"{place}: no model: {' and '.join(tables)} differ; here encoder and decoder have one table")


def add_rows(array: np.ndarray, shape: tuple[int, ...], num_tokens: int) -> np.ndarray:
    """An array of `shape`, whose new rows (or columns) are the mean of those that are there; only of the axis of tokens."""
    axes = [axis for axis, (has, needs) in enumerate(zip(array.shape, shape, strict=False)) if has < needs == num_tokens]
    if len(axes) != 1 or array.shape != (*shape[: axes[0]], array.shape[axes[0]], *shape[axes[0] + 1 :]):
        return array
    mean = array.mean(axes[0], keepdims=True, dtype=np.float32)
    return np.concatenate((array, np.repeat(mean, num_tokens - array.shape[axes[0]], axes[0])), axes[0])


def tell(what: str, names: list[str], most: int = 6) -> None:
    """Log names, the first ones if there are many."""
    if names:
        more = f", and {len(names) - most} more" if len(names) > most else ""
        logger.warning("%s: %s%s", what, ", ".join(sorted(names)[:most]), more)


# ---- To files ----------------------------------------------------------------------------------------------------------


def save_model(
    output_dir: str,
    model: nn.Module,
    params: Any,
    tokenizer: PreTrainedTokenizerBase,
    save_safetensors: bool,
) -> None:
    """Write configuration, tokenizer and weights (NumPy arrays); each file appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".saving-") as staging:
        with tokenization.TOKENIZER_IN_USE:
            tokenizer.save_pretrained(staging)
        config = copy.deepcopy(model.config)
        config.architectures = [models.pytorch_class(model)]
        if getattr(model, "has_own_head", False):  # T5 1.1, which transformers 5 calls tied, and 4 would then tie
            config.tie_word_embeddings = False
        config.save_pretrained(staging)
        with open(os.path.join(staging, "flax_model.msgpack"), "wb") as file:
            file.write(msgpack_serialize(params))
        if save_safetensors:
            path = os.path.join(staging, "model.safetensors")
            save_file(layouts.to_pytorch(params), path, metadata={"format": "pt"})
            shutil.copymode(os.path.join(staging, "config.json"), path)  # safetensors keeps others from reading it
        for name in sorted(os.listdir(staging)):
            os.replace(os.path.join(staging, name), os.path.join(output_dir, name))
