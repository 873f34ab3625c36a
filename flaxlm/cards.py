# SPDX-License-Identifier: Apache-2.0
"""What tells about a run afterwards: its record (run_info.json), the model card and a picture of its curves."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib.figure
from transformers import FlaxPreTrainedModel

from flaxlm import arguments, files


def run_info(script: str, args: arguments.Arguments) -> dict[str, Any]:
    """What is needed to run this again: arguments, versions, devices, and the commit of the script if it is in git."""
    path = Path(script).resolve()
    packages = ("transformers", "jax", "jaxlib", "flax", "optax", "datasets", "tokenizers", "numpy")
    git = ["git", "-C", str(path.parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "script": path.name,
        "arguments": arguments.public(*args),
        "versions": {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()},
        "devices": [str(device) for device in jax.devices()],
        "device_kind": jax.devices()[0].device_kind,
        "git_commit": commit,
    }


def write_model_card(
    script: str,
    args: arguments.Arguments,
    model: FlaxPreTrainedModel,
    curve: Sequence[tuple[int, float]],
    results: Mapping[str, float],
    evaluations: Mapping[int, Mapping[str, float]],
    repo_id: str | None,
) -> None:
    """README.md for people who find the model: what it was trained on and how, results, curves, how to load it."""
    flags, info, output_dir = arguments.public(*args), run_info(script, args), args.training.output_dir
    data = flags["dataset_name"] or os.path.basename(flags["train_file"] or flags["validation_file"])
    architecture = type(model).__name__.removeprefix("Flax")
    name = repo_id or os.path.basename(os.path.abspath(output_dir))
    draw_curves(os.path.join(output_dir, "training_curves.png"), curve, evaluations)
    table = "\n".join(f"| {key} | {value:.4g} |" for key, value in sorted(results.items()))
    versions = ", ".join(f"{key} {value}" for key, value in info["versions"].items())
    card = f"""---
library_name: transformers
tags: [{", ".join(("jax", "flax", model.config.model_type, "generated_from_script"))}]
---

# {name}

{architecture} trained by `{info["script"]}` on {data}, from {flags["model_name_or_path"] or "fresh weights"}.

![Training and evaluation curves](training_curves.png)

| result | value |
|---|---|
{table}

## How it was trained

`python {info["script"]} {arguments.changed(*args)}`

Devices: {len(info["devices"])} of kind {info["device_kind"]}. Versions: {versions}.

## How to load it

```python
from transformers import {architecture}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {architecture}.from_pretrained("{name}")  # PyTorch, transformers 4 or 5
```

```python
from transformers import Flax{architecture}

model = Flax{architecture}.from_pretrained("{name}")  # Flax, transformers 4
```
"""
    files.write_text(os.path.join(output_dir, "README.md"), card)


def draw_curves(path: str, training: Sequence[tuple[int, float]], evaluations: Mapping[int, Mapping[str, float]]) -> None:
    """A picture of the loss: training (mean of each logging window) and evaluation."""
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*training, strict=True), label="training")
    if evaluations:
        evaluation = [(step, evaluations[step]["eval_loss"]) for step in sorted(evaluations)]
        axes.plot(*zip(*evaluation, strict=True), "o-", label="evaluation")
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(f"{path}.tmp", format="png", dpi=120)
    os.replace(f"{path}.tmp", path)
