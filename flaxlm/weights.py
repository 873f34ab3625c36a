# SPDX-License-Identifier: Apache-2.0
"""Weights of a model: fresh or from a file, in Flax's or in PyTorch's layout; and saving them in both."""

import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding
from safetensors.numpy import save_file
from transformers import FlaxPreTrainedModel, PretrainedConfig, PreTrainedTokenizerBase

from flaxlm import arguments, cli, randomness, sharding

logger = logging.getLogger(__name__)


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
            config.torch_dtype = "float32"  # what is trained and saved here, whatever the checkpoint was stored in
        else:
            model = models.auto_class.from_config(config, dtype=dtype, _do_init=False)
    except (OSError, ValueError, ZeroDivisionError) as error:
        cli.fail(f"{f'--model_name_or_path {source}' if source else 'the configuration'}: no model: {cli.first_line(error)}")
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
    try:
        return models.auto_class.from_pretrained(source, config=config, **options)
    except OSError as error:
        if "from_pt=True" not in str(error):  # what transformers says where pytorch_model.bin is all there is
            raise
    except NotImplementedError:
        cli.fail(
            f"--model_name_or_path {source}: its model.safetensors is in several files, which cannot be read here: save it"
            " again in one, with save_pretrained(..., max_shard_size='100GB')"
        )
    if importlib.util.find_spec("torch") is None:
        remedy = "install it (pip install torch), or save the model as model.safetensors elsewhere"
        cli.fail(f"--model_name_or_path {source}: its weights are in pytorch_model.bin, which needs PyTorch: {remedy}")
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
