# SPDX-License-Identifier: Apache-2.0
"""What tells about a run afterwards: its record (run_info.json), the model card and a picture of its curves."""

import datetime
import importlib.metadata
import math
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import huggingface_hub
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


class Objective(NamedTuple):
    """What a card says of an objective.

    Attributes:
        task: by the Hub's name. None where models are fine-tuned before they do one.
        learnt: what the model was trained to do.
        usage: how PyTorch's model is tried, in a line or two.
    """

    task: str | None
    learnt: str
    usage: str


FILL = 'pipeline("fill-mask", model=model, tokenizer=tokenizer)(f"This is a {tokenizer.mask_token}.")'
GO_ON = 'pipeline("text-generation", model=model, tokenizer=tokenizer)("This is", max_new_tokens=20)'
WRITE = 'tokenizer.decode(model.generate(**tokenizer("This is a text.", return_tensors="pt"), max_new_tokens=20)[0])'
OBJECTIVES = {  # by the name that the mapping of its models has in flaxlm.models
    "MASKED": Objective("fill-mask", "to predict hidden tokens from both sides", FILL),
    "CAUSAL": Objective("text-generation", "to predict each token from those before it", GO_ON),
    "SENTENCE_PAIRS": Objective(
        "fill-mask",
        "to predict hidden tokens, and whether the second of two parts of text follows the first",
        'model(**tokenizer("One part.", "The other part.", return_tensors="pt")).seq_relationship_logits',
    ),
    "SPANS": Objective(
        None, "to write down the spans of a text that sentinels in it stand for", WRITE.replace("a text", "<extra_id_0>")
    ),
    "DENOISING": Objective(None, "to write down a text of which it reads a damaged form", WRITE),
}


def write_model_card(
    script: str,
    args: arguments.Arguments,
    model: nn.Module,
    num_params: int,
    curve: Sequence[tuple[int, float]],
    results: Mapping[str, float],
    evaluations: Mapping[int, Mapping[str, float]],
    changes: Sequence[Mapping[str, Any]],
    samples: Sequence[generation.Sample],
    repo_id: str | None,
) -> None:
    """README.md for people who find the model: what it is, results, how to use it, how it was trained, its limits."""
    output_dir = args.training.output_dir
    draw_curves(os.path.join(output_dir, "training_curves.png"), curve, evaluations)
    classes = next(name for name, value in vars(models).items() if name.isupper() and type(model) in value.values())
    objective, name = OBJECTIVES[classes], repo_id or os.path.basename(os.path.abspath(output_dir))
    found = {key: value for key, value in results.items() if key.startswith("eval_")}
    source = args.model.model_name_or_path and shown_path(args.model.model_name_or_path)
    parts = [
        f"---\n{metadata(args, model, objective, name, found)}---",
        f"# {name}",
        f"{models.pytorch_class(model)} trained by `{Path(script).name}` on {training_data(args, results)}, from"
        f" {source or 'fresh weights'}. It learnt {objective.learnt}, and has {num_params:,} parameters and a vocabulary of"
        f" {model.config.vocab_size:,}.",
        f"## Results\n\nOn {held_out(args)}:\n\n{table('held-out text', found)}" if found else "",
        "![Training and evaluation curves](training_curves.png)",
        f"## What it writes\n\n{generation.markdown(samples).strip()}" if samples else "",
        f"## How to use it\n\n{usage(model, classes, repo_id)}",
        f"## How it was trained\n\n```bash\n{command(script, args)}\n```",
        describe_changes(changes),
        table("training", {key: value for key, value in results.items() if key not in found}),
        machine_and_versions(run_info(script, args)),
        f"## Limits\n\n{limits(args, objective)}",
    ]
    files.write_text(os.path.join(output_dir, "README.md"), "\n\n".join(filter(None, parts)) + "\n")


def metadata(args: arguments.Arguments, model: nn.Module, objective: Objective, name: str, results: Mapping[str, float]) -> str:
    """The YAML that the Hub reads, in its schema. Licence and language are left to the owner, who knows them."""
    hub_data = None if args.data.mixture_file else on_the_hub(args.data.dataset_name)
    where = {"dataset_name": held_out(args), "dataset_type": hub_data or "text"}
    where |= {"dataset_config": args.data.dataset_config_name} if hub_data else {}
    task = {"task_type": objective.task or "text2text-generation"}
    figures = {name: value for name, value in results.items() if math.isfinite(value)}
    card = huggingface_hub.ModelCardData(
        library_name="transformers",
        pipeline_tag=objective.task,
        tags=["jax", "flax", model.config.model_type, outputs.CARD_TAG],
        datasets=hub_data and [hub_data],
        base_model=on_the_hub(args.model.model_name_or_path),
        model_name=name.rpartition("/")[2],
        eval_results=[
            huggingface_hub.EvalResult(
                **task, **where, metric_type=key.removeprefix("eval_"), metric_name=label_of(key), metric_value=value
            )
            for key, value in figures.items()
        ]
        or None,
    )
    return card.to_yaml() + "\n"


def on_the_hub(name: str | None) -> str | None:
    """The name of a model or dataset, if it is one of the Hub: no path, and no kind of file."""
    is_local = name is None or shown_path(name) != name or os.path.exists(name) or "://" in name
    return None if is_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name in KINDS_OF_FILES else name


KINDS_OF_FILES = {"text", "csv", "json", "parquet", "arrow", "pandas", "xml", "webdataset"}  # that `datasets` reads by name


def training_data(args: arguments.Arguments, results: Mapping[str, float]) -> str:
    """What the model was trained on, by name."""
    if args.data.mixture_file:
        prefix = "share_of_"
        shares = {name: share for name, share in results.items() if name.startswith(prefix)}
        return f"a mixture of {', '.join(f'{name.removeprefix(prefix)} ({share:.1%})' for name, share in shares.items())}"
    flags = arguments.changed_values(*args)
    return shown_path(args.data.dataset_name or flags.get("train_file") or flags.get("validation_file"))


def held_out(args: arguments.Arguments) -> str:
    """What evaluation was on, by name."""
    if validation_file := arguments.changed_values(*args).get("validation_file"):
        return shown_path(validation_file)
    name = "the mixture" if args.data.mixture_file else training_data(args, {})
    return f"a held-out part of {name}"


def usage(model: nn.Module, classes: str, repo_id: str | None) -> str:
    """Code that loads and tries the model, in PyTorch and in Flax."""
    architecture, name, usage = models.pytorch_class(model), repo_id or ".", OBJECTIVES[classes].usage
    names = [architecture, "AutoTokenizer", *(["pipeline"] if usage.startswith("pipeline") else [])]
    where = "" if repo_id else "  # the directory of this file, or its path"
    inputs = "input_ids, attention_mask"
    inputs += ", decoder_input_ids, decoder_attention_mask" if models.has_decoder(model) else ""
    return f"""In PyTorch, with transformers 4 or 5:

```python
from transformers import {", ".join(names)}

tokenizer = AutoTokenizer.from_pretrained("{name}"){where}
model = {architecture}.from_pretrained("{name}")
print({usage})
```

In Flax, with the package `flaxlm` of the script that trained it:

```python
from flaxlm import models, weights

model, params = weights.from_pretrained("{name}", models.{classes})
hidden = model.apply({{"params": params}}, {inputs})
scores = model.apply({{"params": params}}, hidden, method="scores")
```"""


def command(script: str, args: arguments.Arguments) -> str:
    """The command, over several lines: flags that are not as if unset, whichever start of the run this was."""
    flags = arguments.changed_values(*args)
    words = [f"python {Path(script).name}"]
    for name, value in flags.items():
        if name in ("overwrite_output_dir", "resume_from_checkpoint", "resume_changes"):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--{name} false")  # not all of them have --no_...
            continue
        values = value.split() if name == "report_to" else value if isinstance(value, list) else [value]
        words.append(f"--{name} {' '.join(shlex.quote(str(shown_path(item))) for item in values)}")
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) < 100:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}")
    return " \\\n".join(lines)


def machine_and_versions(info: Mapping[str, Any]) -> str:
    """A line: devices and libraries."""
    versions = ", ".join(f"{key} {value}" for key, value in info["versions"].items())
    return f"Devices: {len(info['devices'])} of kind {info['device_kind']}. Versions: {versions}."


def limits(args: arguments.Arguments, objective: Objective) -> str:
    """What the model cannot do, as far as that follows from how it was trained."""
    row_length = getattr(args.data, args.data.row_length_flag, None)
    rows = f" Rows of training text had up to {row_length:,} tokens: longer ones are new to it." if row_length else ""
    use = "It answers no questions and follows no instructions." if objective.task == "text-generation" else ""
    use = use or "It is made to be fine-tuned for a task of yours."
    return (
        f"The model knows what its training text says, with the errors and the one-sidedness of that. {use}{rows} Nothing was"
        " measured but what the tables say."
    )


def table(heading: str, results: Mapping[str, float]) -> str:
    """Results as a table of two columns; "" if there are none."""
    rows = "".join(f"\n| {label} | {figure} |" for label, figure in figures(results))
    return f"| {heading} | |\n|---|---|{rows}" if rows else ""


def describe_changes(changes: Sequence[Mapping[str, Any]]) -> str:
    """Sentences about flags that were others before a run was resumed; "" if there were none."""
    told = [
        f"after step {change['step']}, {name} was changed from {shown_path(then)} to {shown_path(now)}"
        for change in changes
        for name, (then, now) in change["changes"].items()
    ]
    return f"The run was resumed with other flags: {'; '.join(told)}." if told else ""


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
    return known + [(label_of(name), f"{value:,.4f}") for name, value in sorted(results.items())]


def label_of(name: str) -> str:
    """What a result is called in a card."""
    return FIGURES[name][0] if name in FIGURES else name.replace("_", " ")


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
