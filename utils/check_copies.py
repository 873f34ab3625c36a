#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Watch the copies that standalone scripts share: one name, one source.

    python utils/check_copies.py          report functions, classes and constants that differ between scripts
    python utils/check_copies.py --fix    overwrite the differing ones with the source in run_mlm_flax.py

Compared are top-level functions and classes, with their decorators, and constants of all scripts in the root. What
differs on purpose stands in ALLOWED_VARIANTS, with the reason; an entry that no longer differs is an error too.
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = "run_mlm_flax.py"
MAX_VARIANTS = 9

# Name of the function or class: why it differs from script to script.
ALLOWED_VARIANTS: dict[str, str] = {
    "main": "prepare_model_dir.py has a main of its own; the training scripts share theirs",
    "DataTrainingArguments": "an objective's own flags and their checks",
    "tokenize_texts": "an objective's own columns: words, sentences, end-of-sequence tokens",
    "Collator": "an objective's noise and labels",
    "loss_fn": "an objective's inputs and labelled positions",
    "train_step": "run_pretraining_flax.py has two losses, each divided by a number of its own",
    "eval_metrics": "and reports them together and apart",
}


def definitions(path: Path) -> dict[str, tuple[int, int]]:
    """Lines, from the first decorator to the last (0-based, end excluded), of what a script defines at its top level."""
    spans = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            spans[node.name] = (first - 1, node.end_lineno)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            spans[node.targets[0].id] = (node.lineno - 1, node.end_lineno)
    return spans


def sources(path: Path) -> dict[str, str]:
    lines = path.read_text("utf-8").splitlines()
    return {name: "\n".join(lines[first:end]) for name, (first, end) in definitions(path).items()}


def compare(scripts: list[Path]) -> tuple[dict[str, list[Path]], list[str]]:
    """Differing names, each with the scripts that have it; and names allowed to differ that don't."""
    by_script = {path: sources(path) for path in scripts}
    names = {name for found in by_script.values() for name in found}
    differing = {}
    for name in sorted(names):
        holders = [path for path in scripts if name in by_script[path]]
        if len({by_script[path][name] for path in holders}) > 1:
            differing[name] = holders
    unneeded = [name for name in ALLOWED_VARIANTS if name not in differing]
    return {name: holders for name, holders in differing.items() if name not in ALLOWED_VARIANTS}, unneeded


def fix(differing: dict[str, list[Path]], reference: Path) -> list[str]:
    """Copy the reference's source over the others; names that the reference lacks are returned."""
    wanted, left = sources(reference), []
    for name, holders in differing.items():
        if name not in wanted:
            left.append(name)
            continue
        for path in holders:
            lines = path.read_text("utf-8").splitlines()
            first, end = definitions(path)[name]
            lines[first:end] = wanted[name].splitlines()
            path.write_text("\n".join(lines) + "\n", "utf-8")
    return left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fix", action="store_true", help=f"copy the source in {REFERENCE} to the other scripts")
    parser.add_argument("--root", type=Path, default=ROOT, help="directory of the scripts")
    args = parser.parse_args()
    scripts = sorted(args.root.glob("*.py"))
    differing, unneeded = compare(scripts)
    if args.fix:
        differing = {name: differing[name] for name in fix(differing, args.root / REFERENCE)}
    for name, holders in differing.items():
        print(f"{name} differs between {', '.join(path.name for path in holders)}: run make fix-copies, or name a reason")
    for name in unneeded:
        print(f"ALLOWED_VARIANTS lists {name}, which does not differ: remove it")
    if len(ALLOWED_VARIANTS) > MAX_VARIANTS:
        print(f"{len(ALLOWED_VARIANTS)} allowed variants are too many: at most {MAX_VARIANTS}")
    if differing or unneeded or len(ALLOWED_VARIANTS) > MAX_VARIANTS:
        sys.exit(1)
    print(f"{len(scripts)} scripts: every function, class and constant they share is the same")


if __name__ == "__main__":
    main()
