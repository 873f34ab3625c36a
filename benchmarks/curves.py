# SPDX-License-Identifier: Apache-2.0
"""The picture of the quick starts' training in README.md, from benchmarks/results.json; it holds a checksum of its data."""

import hashlib
import json
from pathlib import Path
from typing import Any

PATH = "docs/images/quickstarts.png"
TITLES = {
    "mlm": "masked tokens (mlm)",
    "clm": "next tokens (clm)",
    "nsp": "BERT, both losses (nsp)",
    "t5": "hidden spans (t5)",
    "bart": "whole text (bart)",
}
# All that the loss of these counts is in their measures, so that there is a baseline of the same tokens and pairs. T5's loss
# is of sentinels too, and BART's of tokens that it can copy.
WITH_BASELINE = ("mlm", "clm", "nsp")
LINES = ("#1f5fa8", "#5b93d1", "#9cc0e7")  # a blue for a seed, the first one on top
BASELINE, HELD_OUT = "#6e6e6e", "#c4521b"
HIGHEST = 9  # nats: T5 begins far above, for a few steps
WIDTH, DPI = 6.0, 200  # inches; twice the 600 pixels at which the picture is shown


def curves_of(results: dict[str, Any]) -> dict[str, Any]:
    """What is drawn: for each quick start its points by seed, and the loss of the baseline."""
    found = {}
    for name in TITLES:
        quickstart = results.get(f"quickstarts/{name}", {})
        seeds = {seed: run["curve"] for seed, run in quickstart.get("seeds", {}).items() if run.get("curve", {}).get("train")}
        if not seeds:
            continue
        found[name] = {"seeds": seeds, "baseline_loss": None}
        measures = next(iter(quickstart["seeds"].values()))["measures"]
        if name in WITH_BASELINE and all("baseline_loss" in measure for measure in measures):
            found[name]["baseline_loss"] = sum(measure["baseline_loss"] for measure in measures)
    return found


def checksum(curves: dict[str, Any]) -> str:
    """Of the data and of this program: the bytes of a picture also depend on fonts and on matplotlib's version."""
    program = Path(__file__).read_bytes()
    return hashlib.sha256(program + json.dumps(curves, sort_keys=True).encode()).hexdigest()[:16]


def drawn_checksum(path: Path) -> str | None:
    """What a picture says it shows."""
    from PIL import Image

    if not path.exists():
        return None
    with Image.open(path) as image:
        return getattr(image, "text", {}).get("Description")


def draw(curves: dict[str, Any], path: Path) -> None:
    """One small diagram for a quick start, three in a row; in the place that is left, what the lines are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.5), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).ravel()
    for axis, (name, curve) in zip(axes, curves.items(), strict=False):
        draw_one(axis, name, curve)
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    for axis in axes[:: len(axes) // 2]:
        axis.set_ylabel("loss, nats", fontsize=8)
    draw_legend(axes[-1], max(len(curve["seeds"]) for curve in curves.values()))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Description": checksum(curves), "Software": None}, pil_kwargs={"optimize": True})


def draw_one(axis: Any, name: str, curve: dict[str, Any]) -> None:
    """Training losses of all seeds, held-out losses of the first, and the baseline."""
    seeds = list(curve["seeds"].values())
    for points, colour in reversed(list(zip(seeds, LINES, strict=False))):
        axis.plot(*zip(*points["train"], strict=True), color=colour, linewidth=1.0)
    held_out = seeds[0].get("eval_loss", [])
    if held_out:
        axis.plot(*zip(*held_out, strict=True), "o", color=HELD_OUT, markersize=3.5, clip_on=False)
    if curve["baseline_loss"]:
        axis.axhline(curve["baseline_loss"], color=BASELINE, linewidth=1.0, linestyle=(0, (4, 3)))
    axis.set_title(TITLES[name], fontsize=8.5, loc="left")
    axis.set_xlabel("step", fontsize=8, labelpad=1)
    axis.set_xlim(0, seeds[0]["train"][-1][0])
    axis.set_ylim(0, HIGHEST)
    axis.set_yticks(range(0, HIGHEST, 2))
    axis.locator_params(axis="x", nbins=4)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.tick_params(labelsize=7.5, length=2.5)
    axis.grid(color="#e4e4e4", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def draw_legend(axis: Any, num_seeds: int) -> None:
    from matplotlib.lines import Line2D

    names = ["training, first seed", "another seed", "a third seed"][:num_seeds]
    lines = [Line2D([], [], color=colour, linewidth=1.5) for colour in LINES[:num_seeds]]
    lines.append(Line2D([], [], color=HELD_OUT, marker="o", markersize=4, linestyle="none"))
    lines.append(Line2D([], [], color=BASELINE, linewidth=1.2, linestyle=(0, (4, 3))))
    axis.legend(lines, [*names, "held-out text", "baseline (unigrams)"], fontsize=8, loc="center left", frameon=False)
