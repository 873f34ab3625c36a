# SPDX-License-Identifier: Apache-2.0
"""Weights in PyTorch's layout: other names, and matrices transposed; where PyTorch has a table twice, it is written twice."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict


def pytorch_name(path: tuple[str, ...], num_axes: int) -> tuple[str, bool]:
    """The name that a weight has in PyTorch's layout, and whether it is transposed there."""
    *module_path, leaf = path
    name = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return ".".join((*module_path, name)), leaf == "kernel" and num_axes == 2


def copies(names: Mapping[str, Any]) -> dict[str, str]:
    """Names under which PyTorch has a weight once more, where it does not share it: the copy's name to the weight's."""
    found = {}
    if {"model.shared.weight", "lm_head.weight"} <= names.keys():  # BART and its kind, with a head of their own
        found |= {f"model.{side}.embed_tokens.weight": "model.shared.weight" for side in ("encoder", "decoder")}
    for head in ("cls.predictions", "lm_head", "predictions"):  # BERT's kind: the bias of an untied head
        if {f"{head}.bias", f"{head}.decoder.weight"} <= names.keys():
            found[f"{head}.decoder.bias"] = f"{head}.bias"
    return found


def to_pytorch(params: Any) -> dict[str, np.ndarray]:
    """Flax weights under PyTorch's names and in its layout: what transformers 5 and PyTorch load."""
    state = {}
    for path, array in flatten_dict(params).items():
        name, is_transposed = pytorch_name(path, array.ndim)
        state[name] = np.ascontiguousarray(np.asarray(array).T if is_transposed else array)
    return state | {copy: state[name] for copy, name in copies(state).items()}


# ---- From files ----------------------------------------------------------------------------------------------------------


# What PyTorch keeps in files beside weights: positions, causal masks, frequencies, sinusoids.
BUFFERS = re.compile(
    r"position_ids$|token_type_ids$|(^|\.)(attn|attention)\.(masked_)?bias$|inv_freq$|embed_positions\.weights?$"
)

# What a head reads that is tied to the table of embeddings; files that PyTorch pickled have it twice.
TIED_HEADS = {
    *("lm_head.weight", "lm_head.decoder.weight", "cls.predictions.decoder.weight", "predictions.decoder.weight"),
    *("generator_lm_head.weight", "vocab_projector.weight", "decoder.weight"),
}

EARLY_NAMES = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))


def find(stored: Collection[str], paths: Iterable[tuple[str, ...]], is_pytorch: bool) -> dict[tuple[str, ...], str]:
    """The names that weights have in a file, by their paths; those that it does not hold are left out.

    A file may be of the model without a head, whose names then lack the first part; may have a tied weight under its other
    name only; and may have the names that norms had in early PyTorch files.
    """
    paths = list(paths)
    names = {path: pytorch_name(path, 0)[0] if is_pytorch else "/".join(path) for path in paths}
    dot, found, others = "." if is_pytorch else "/", {}, {}
    for copy, name in copies(dict.fromkeys([*names.values(), *stored])).items():
        others.setdefault(name, []).append(copy)
    idle = set(copies(dict.fromkeys(names.values())).values())  # with a head of its own PyTorch computes with the copies
    bodies = {path[0] for path in paths if len(path) > 3}
    bodies = {body for body in bodies if not any(name.startswith(body + dot) for name in stored)}
    for path, name in names.items():
        candidates = [name, *others.get(name, [])][:: -1 if name in idle else 1]
        if path[0] in bodies:
            candidates.append(name.partition(dot)[2])
        candidates += [candidates[-1].replace(now, then) for now, then in EARLY_NAMES]
        if path == ("lm_head", "kernel") and is_pytorch:
            candidates.append("shared.weight")  # T5 1.1 of transformers 5, which ties what was two tables
        found[path] = next((candidate for candidate in candidates if candidate in stored), None)
    return {path: name for path, name in found.items() if name is not None}


def unused(stored: Collection[str], used: Collection[str], is_tied: bool) -> list[str]:
    """Names of a file that are neither used, nor a copy of what is, nor no weights."""
    used = set(used)
    pairs = copies(dict.fromkeys(stored)).items()
    same = used | {name for copy, name in pairs if copy in used}
    doubles = same | {copy for copy, name in pairs if name in same}
    heads = TIED_HEADS if is_tied else set()
    doubles |= {f"{side}.embed_tokens.weight" for side in ("encoder", "decoder")} if "shared.weight" in used else set()
    return sorted(name for name in set(stored) - used - doubles - heads if not BUFFERS.search(name))
