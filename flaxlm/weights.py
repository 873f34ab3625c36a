# SPDX-License-Identifier: Apache-2.0
"""Weights of a model: fresh or from a file, in Flax's or in PyTorch's layout; and saving the whole model in both."""

import copy
import importlib.util
import logging
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import FlaxPreTrainedModel, PretrainedConfig, PreTrainedTokenizerBase

from flaxlm import arguments, cli, patches, randomness, sharding, tokenization

logger = logging.getLogger(__name__)


def check(config: PretrainedConfig, args: arguments.Arguments, models: arguments.ModelClasses) -> None:
    """Refuse a configuration that no Flax class follows, and weights that are not there or cut short.

    Before the text is prepared, in less than a second, and without touching a device, so that the process can still fork.
    """
    source = args.model.model_name_or_path
    if source and os.path.isdir(source):
        check_files(source)
    if type(config) not in models.by_config:
        return  # comes with a Hub repository
    patches.check_fields(config, models.by_config[type(config)])
    shallow = copy.deepcopy(config)  # layers are alike, and tables of positions take time
    for name, most in LARGEST_TO_TRY.items():
        if getattr(shallow, name, None) is not None:
            setattr(shallow, name, min(getattr(shallow, name), most))

    def build() -> None:
        model = models.auto_class.from_config(shallow, dtype=jnp.dtype(args.model.dtype), _do_init=False)
        if args.training.gradient_checkpointing:
            enable_gradient_checkpointing(model, models)

    try:
        jax.eval_shape(build)
    except cli.Ending:
        raise
    except Exception as error:  # whatever the classes and jax make of sizes that do not go together
        cli.fail(f"the configuration makes no model: {type(error).__name__}: {cli.first_line(error)}")


LARGEST_TO_TRY = {
    "num_hidden_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "num_decoder_layers": 2, "max_position_embeddings": 128,
}  # fmt: skip
WEIGHTS_FILES = (  # in the order in which transformers looks for them
    "flax_model.msgpack", "flax_model.msgpack.index.json", "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip


def check_files(source: str) -> None:
    """Are there weights in a directory that can be read; and is model.safetensors, whose beginning tells its size, whole?"""
    name = weights_file(source)
    if name is None:
        files = "no flax_model.msgpack, no model.safetensors and no pytorch_model.bin"
        cli.fail(f"--model_name_or_path {source}: no model: there is {files} in it")
    if name == "model.safetensors.index.json":
        refuse_shards(source)
    if name.startswith("pytorch_model.bin"):
        require_pytorch(source)
    if name == "model.safetensors":
        try:
            with safe_open(os.path.join(source, name), "numpy"):
                pass
        except Exception as error:
            cli.fail(f"--model_name_or_path {source}: no model: {why_not_loaded(source, error)}")


def weights_file(source: str) -> str | None:
    """The file of a directory that weights are read from."""
    return next((name for name in WEIGHTS_FILES if os.path.isfile(os.path.join(source, name))), None)


def refuse_shards(source: str) -> NoReturn:
    cli.fail(
        f"--model_name_or_path {source}: its model.safetensors is in several files, which cannot be read here: save it"
        " again in one, with save_pretrained(..., max_shard_size='100GB')"
    )


def require_pytorch(source: str) -> None:
    if importlib.util.find_spec("torch") is None:
        remedy = "install it (pip install torch), or save the model as model.safetensors elsewhere"
        cli.fail(f"--model_name_or_path {source}: its weights are in pytorch_model.bin, which needs PyTorch: {remedy}")


def why_not_loaded(source: str, error: Exception) -> str:
    """The reason why there is no model, for an error of the libraries that read weights."""
    name, reason = weights_file(source), cli.first_line(error)
    shapes = SHAPES.search(reason)
    if shapes:
        weight, one, other = (group for group in shapes.groups() if group)
        return f"the configuration is not that of the weights: {weight} has the shape {one} in one and {other} in the other"
    if isinstance(error, pickle.UnpicklingError):
        return f"{name or 'pytorch_model.bin'} is damaged, or holds more than weights, which is not opened"
    if name is None or (isinstance(error, OSError) and error.errno is None):  # transformers says what it misses
        return reason
    return f"{name} is cut short, damaged or of another kind: {type(error).__name__}: {reason}"


# What transformers says of one weight's name and two shapes, in Flax's and in PyTorch's layout.
SHAPES = re.compile(
    r"weight for (.*) failed: .*? has shape (\(.*?\)) .* model shape (\(.*?\))"
    r"|Weight (.*) was expected to be of shape (\(.*?\)), but is (\(.*?\))"
)


def load_model(
    config: PretrainedConfig, args: arguments.Arguments, models: arguments.ModelClasses, mesh: Mesh
) -> tuple[FlaxPreTrainedModel, Any]:
    """Build the model and its float32 weights, the same on every device of the mesh: (model, params)."""
    model_args, params = args.model, None
    dtype, source = jnp.dtype(model_args.dtype), model_args.model_name_or_path
    try:
        if source:
            logger.info("Loading weights from %s", source)
            options = {"cache_dir": model_args.cache_dir, "token": model_args.token, "revision": model_args.model_revision}
            options |= {"trust_remote_code": model_args.trust_remote_code, "dtype": dtype}
            loaded = read_weights(source, config, models, options)
            params, model = loaded.params, type(loaded)(config, dtype=dtype, _do_init=False)  # holds no second copy
            del loaded
            config.dtype = "float32"  # what is trained and saved here, whatever the checkpoint was stored in
        else:
            model = models.auto_class.from_config(config, dtype=dtype, _do_init=False)
    except (cli.Ending, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # each library that reads weights has errors of its own
        place = f"--model_name_or_path {source}" if source else "the configuration"
        cli.fail(f"{place}: no model: {why_not_loaded(source or '', error)}")
    if args.training.gradient_checkpointing:
        enable_gradient_checkpointing(model, models)

    def initialize(rng, params):
        params = unfreeze(params or model.init_weights(rng, model.input_shape))
        return jax.tree.map(lambda array: array.astype(jnp.float32), params)

    initialize = jax.jit(initialize, out_shardings=NamedSharding(mesh, sharding.REPLICATED))
    return model, initialize(randomness.device_rng(args.training.seed, "weights"), params)


def read_weights(
    source: str, config: PretrainedConfig, models: arguments.ModelClasses, options: Mapping[str, Any]
) -> FlaxPreTrainedModel:
    """The model of a directory or of the Hub: in Flax layout or, where that is not there, in PyTorch's.

    model.safetensors is read without PyTorch; pytorch_model.bin, an older kind of file, only PyTorch can read.
    """
    is_pickle = os.path.isdir(source) and (weights_file(source) or "").startswith("pytorch_model.bin")
    try:
        if not is_pickle:
            return models.auto_class.from_pretrained(source, config=config, **options)
    except OSError as error:
        if "from_pt=True" not in str(error):  # what transformers says where pytorch_model.bin is all there is
            raise
    except NotImplementedError:
        refuse_shards(source)
    require_pytorch(source)
    return models.auto_class.from_pretrained(source, config=config, from_pt=True, **options)


def enable_gradient_checkpointing(model: FlaxPreTrainedModel, models: arguments.ModelClasses) -> None:
    """Recompute activations in the backward pass, where the model class can."""
    try:
        model.enable_gradient_checkpointing()
    except NotImplementedError:
        able = [
            config_class.model_type
            for config_class, model_class in models.by_config.items()
            if model_class.enable_gradient_checkpointing is not FlaxPreTrainedModel.enable_gradient_checkpointing
        ]
        remedy = f"only for {', '.join(able)}" if able else "by no Flax class of this objective; drop the flag"
        cli.fail(f"--gradient_checkpointing: not implemented for {model.config.model_type}, {remedy}")


def save_model(
    output_dir: str,
    model: FlaxPreTrainedModel,
    params,
    tokenizer: PreTrainedTokenizerBase,
    save_safetensors: bool,
) -> None:
    """Write configuration, tokenizer and weights (NumPy arrays); each file appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".saving-") as staging:
        with tokenization.TOKENIZER_IN_USE:
            tokenizer.save_pretrained(staging)
        model.save_pretrained(staging, params=params)
        if save_safetensors:
            path = os.path.join(staging, "model.safetensors")
            save_file(pytorch_state_dict(params), path, metadata={"format": "pt"})
            shutil.copymode(os.path.join(staging, "config.json"), path)  # safetensors keeps others from reading it
        for name in sorted(os.listdir(staging)):
            os.replace(os.path.join(staging, name), os.path.join(output_dir, name))


def pytorch_state_dict(params) -> dict[str, np.ndarray]:
    """Flax weights under PyTorch's names and in its layout: what transformers 5 and PyTorch load."""
    state = {}
    for (*module_path, leaf), array in flatten_dict(params).items():
        array = np.asarray(array)
        if leaf == "kernel" and array.ndim == 2:
            array = array.T
        leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
        state[".".join((*module_path, leaf))] = np.ascontiguousarray(array)
    # Families like BART, and LongT5, have three tables in PyTorch where the head has one of its own.
    prefix = "" if any("LocalSelfAttention" in name or "TransientGlobalSelfAttention" in name for name in state) else "model."
    if {f"{prefix}shared.weight", "lm_head.weight"} <= state.keys():
        table = state[f"{prefix}shared.weight"]
        state |= {f"{prefix}{side}.embed_tokens.weight": table for side in ("encoder", "decoder")}
    return state
