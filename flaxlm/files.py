# SPDX-License-Identifier: Apache-2.0
"""Files: which formats of text there are and how one is read; writing others whole or not at all."""

import glob
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from flaxlm import cli

DATA_LOADERS = {"txt": "text", "csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}


def data_loader_of(path: str) -> str | None:
    """Name of the `datasets` loader for a file, by its suffix; a compression suffix counts as none."""
    name = os.path.basename(path)
    for compression in (".gz", ".bz2", ".xz"):
        name = name.removesuffix(compression)
    return DATA_LOADERS.get(name.rpartition(".")[2])


def check_text_file(path: str, flag: str) -> None:
    if data_loader_of(path) is None:
        cli.fail(f"{flag} {path}: unknown suffix; use {', '.join(DATA_LOADERS)}, or one of these with .gz, .bz2 or .xz")
    if not os.path.isfile(path):
        cli.fail(f"{flag} {path}: no such file")
    if os.path.getsize(path) == 0:
        cli.fail(f"{flag} {path}: is empty")


def load(path: str, flag: str, cache_dir: str | None, text_options: Mapping[str, Any] | None = None, **options):
    """Read one local file with the loader of its suffix: a Dataset, or with streaming=True an IterableDataset.

    `text_options` are for txt files only; `flag` is the one that named the file.
    """
    loader = data_loader_of(path)
    options |= (text_options or {}) if loader == "text" else {}
    try:
        return datasets.load_dataset(loader, data_files=glob.escape(path), split="train", cache_dir=cache_dir, **options)
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        cli.fail(f"{flag} {path}: is empty or cannot be read as {loader}: {cli.first_line(error.__cause__ or error)}")


def is_saved_to_disk(name: str) -> bool:
    """Is it a directory that Dataset.save_to_disk or DatasetDict.save_to_disk wrote?"""
    return any(os.path.isfile(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json"))


def find_text_column(dataset: datasets.Dataset, text_column_name: str | None) -> str:
    """The column named, else "text", else the first one that holds strings."""
    text_columns = [name for name, feature in dataset.features.items() if getattr(feature, "dtype", "") in TEXT_TYPES]
    if text_column_name is not None:
        if text_column_name not in text_columns:
            cli.fail(f"--text_column_name {text_column_name}: the data has no such text column, only {dataset.column_names}")
        return text_column_name
    if not text_columns:
        cli.fail(f"the data has no text column, only {dataset.column_names}; name one with --text_column_name")
    return "text" if "text" in text_columns else text_columns[0]


TEXT_TYPES = ("string", "large_string")


def write_json(path: str, values: Mapping[str, Any]) -> None:
    """Write standard JSON, whole or not at all: what is not a finite number becomes null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    write_text(path, json.dumps(finite, indent=4, sort_keys=True, allow_nan=False) + "\n")


def write_text(path: str, text: str) -> None:
    """Write a file, whole or not at all."""
    Path(f"{path}.tmp").write_text(text, "utf-8")
    os.replace(f"{path}.tmp", path)
