# SPDX-License-Identifier: Apache-2.0
"""What tells about a run afterwards: its record (run_info.json), the model card and a picture of its curves."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import matplotlib.figure

from flaxlm import arguments, files, generation, models, outputs


def run_info(script: str, args: arguments.Arguments, changes: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """What is needed to run this again: arguments, versions, devices, and the commit of the script if it is in git.

    `changes` are those of flags in resumed runs: {"step": ..., "changes": {name: [then, now]}}.
    """
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
        **({"resume_changes": list(changes)} if changes else {}),
        "versions": {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()},
        "devices": [str(device) for device in jax.devices()],
        "device_kind": jax.devices()[0].device_kind,
        "git_commit": commit,
    }


def write_model_card(
    script: str,
    args: arguments.Arguments,
    model: nn.Module,
    curve: Sequence[tuple[int, float]],
    results: Mapping[str, float],
    evaluations: Mapping[int, Mapping[str, float]],
    changes: Sequence[Mapping[str, Any]],
    samples: Sequence[generation.Sample],
    repo_id: str | None,
) -> None:
    """README.md for people who find the model: what it was trained on and how, results, curves, how to load it."""
    info, output_dir, flags = run_info(script, args), args.training.output_dir, arguments.changed_values(*args)
    source = args.model.model_name_or_path and shown_path(args.model.model_name_or_path)
    data = shown_path(args.data.dataset_name or flags.get("train_file") or flags.get("validation_file"))
    if args.data.mixture_file:
        prefix = "share_of_"
        shares = {name: share for name, share in results.items() if name.startswith(prefix)}
        data = f"a mixture of {', '.join(f'{name.removeprefix(prefix)} ({share:.1%})' for name, share in shares.items())}"
    architecture = models.pytorch_class(model)
    draw_curves(os.path.join(output_dir, "training_curves.png"), curve, evaluations)
    table = "\n".join(f"| {label} | {figure} |" for label, figure in figures(results))
    versions = ", ".join(f"{key} {value}" for key, value in info["versions"].items())
    tags = ", ".join(("jax", "flax", model.config.model_type, outputs.CARD_TAG))
    name = repo_id or "."
    objective = next(name for name, value in vars(models).items() if name.isupper() and type(model) in value.values())
    inputs = "input_ids, attention_mask"
    inputs += ", decoder_input_ids, decoder_attention_mask" if models.has_decoder(model) else ""
    written = f"## What it writes\n\n{generation.markdown(samples)}\n" if samples else ""
    where = "" if repo_id else "  # the directory of this file, or its path"
    card = f"""---
library_name: transformers
tags: [{tags}]
---

# {repo_id or os.path.basename(os.path.abspath(output_dir))}

{architecture} trained by `{info["script"]}` on {data}, from {source or "fresh weights"}.

![Training and evaluation curves](training_curves.png)

| result | |
|---|---|
{table}

{written}## How to load it

```python
from transformers import {architecture}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"){where}
model = {architecture}.from_pretrained("{name}")  # PyTorch, transformers 4 or 5
```

```python
from flaxlm import models, weights

model, params = weights.from_pretrained("{name}", models.{objective})  # Flax
hidden = model.apply({{"params": params}}, {inputs})
scores = model.apply({{"params": params}}, hidden, method="scores")
```

## How it was trained

`python {info["script"]} {" ".join(f"--{k} {shown_path(v)}" for k, v in flags.items())}`

{describe_changes(changes)}Devices: {len(info["devices"])} of kind {info["device_kind"]}. Versions: {versions}.
"""
    files.write_text(os.path.join(output_dir, "README.md"), card)


def describe_changes(changes: Sequence[Mapping[str, Any]]) -> str:
    """Sentences about flags that were others before a run was resumed; "" if there were none."""
    told = [
        f"after step {change['step']}, {name} was changed from {shown_path(then)} to {shown_path(now)}"
        for change in changes
        for name, (then, now) in change["changes"].items()
    ]
    return f"The run was resumed with other flags: {'; '.join(told)}.\n\n" if told else ""


def shown_path(value: Any) -> Any:
    """The last part of what is a path of this machine, which is nobody else's business; anything else as it is."""
    if isinstance(value, list):
        return " ".join(map(shown_path, value))
    is_local = isinstance(value, str) and (os.path.isabs(value) or value.startswith((".", "~")) or os.path.exists(value))
    return os.path.basename(os.path.abspath(value)) if is_local else value


# What results are called in a card, and how they are written.
FIGURES = {
    "eval_loss": ("evaluation loss, nats per label", "{:.3f}"),
    "eval_masked_lm_loss": ("evaluation loss of masked tokens, nats per label", "{:.3f}"),
    "eval_next_sentence_loss": ("evaluation loss of next sentences, nats per pair", "{:.3f}"),
    "eval_accuracy": ("evaluation accuracy", "{:.1%}"),
    "eval_next_sentence_accuracy": ("evaluation accuracy of next sentences", "{:.1%}"),
    "eval_perplexity": ("evaluation perplexity", "{:,.2f}"),
    "eval_bits_per_byte": ("evaluation loss, bits per byte of text", "{:.3f}"),
    "train_loss": ("training loss, mean over the run, nats per label", "{:.3f}"),
    "train_steps": ("steps", "{:,.0f}"),
    "best_step": ("step that the weights are of, the best by evaluation", "{:,.0f}"),
    "epoch": ("epochs", "{:.2f}"),
    "train_samples": ("rows of training data", "{:,.0f}"),
    "train_runtime": ("training time", "{}"),
    "train_tokens_per_second": ("tokens per second in training", "{:,.0f}"),
    "train_mfu": ("model FLOP utilisation in training", "{:.1%}"),
    "train_memory_gib": ("memory in use at most, GiB", "{:.2f}"),
}


def figures(results: Mapping[str, float]) -> list[tuple[str, str]]:
    """(name, figure with its unit) of results, the known ones first."""
    results = dict(results)
    if "train_runtime" in results:
        results["train_runtime"] = datetime.timedelta(seconds=round(results["train_runtime"]))
    known = [(label, form.format(results.pop(name))) for name, (label, form) in FIGURES.items() if name in results]
    return known + [(name.replace("_", " "), f"{value:,.4f}") for name, value in sorted(results.items())]


def draw_curves(path: str, training: Sequence[tuple[int, float]], evaluations: Mapping[int, Mapping[str, float]]) -> None:
    """A picture of the loss: training (mean of each logging window) and evaluation."""
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*training, strict=True), "-" if len(training) > 1 else "o", label="training")
    if evaluations:
        evaluation = [(step, evaluations[step]["eval_loss"]) for step in sorted(evaluations)]
        axes.plot(*zip(*evaluation, strict=True), "o-", label="evaluation")
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
