# SPDX-License-Identifier: Apache-2.0
"""The text of a run, prepared before training: its splits as datasets, from files or by the name of a dataset."""

import logging
from collections.abc import Mapping

import datasets
import numpy as np

from flaxlm import arguments, cli, files, randomness

logger = logging.getLogger(__name__)


def load_splits(args: arguments.Arguments) -> dict[str, datasets.Dataset]:
    """Load the splits that this run needs: "train", "validation" or both.

    Where the data has no validation split, `validation_split_percentage` of the training rows are drawn with the seed, also
    without do_eval: so a later evaluation of the same data meets rows that were never trained on.
    """
    data_args, training_args = args.data, args.training
    splits = load_named_dataset(args) if data_args.dataset_name else load_files(data_args, args.model.cache_dir)
    if "validation" not in splits:
        splits |= draw_validation_split(splits["train"], data_args.validation_split_percentage, training_args.seed)
    wanted = ["train"] * training_args.do_train + ["validation"] * training_args.do_eval
    for split in wanted:
        if len(splits[split]) == 0:
            cli.fail(f"the {split} data is empty: {data_args.dataset_name or getattr(data_args, f'{split}_file')} has no rows")
    return {split: splits[split] for split in wanted}


def load_files(data_args: arguments.DataArguments, cache_dir: str | None) -> dict[str, datasets.Dataset]:
    """Read train_file and validation_file, as far as they are given."""
    paths = {"train": data_args.train_file, "validation": data_args.validation_file}
    return {
        split: data_args.add_columns(files.load(path, f"--{split}_file", cache_dir, data_args.text_loader_options()), split)
        for split, path in paths.items()
        if path
    }


def load_named_dataset(args: arguments.Arguments) -> dict[str, datasets.Dataset]:
    """Load a dataset of the Hub, or of a local directory."""
    name = args.data.dataset_name
    try:
        if files.is_saved_to_disk(name):
            loaded = datasets.load_from_disk(name)
        else:
            logger.info("Loading dataset %s", name)
            options = {"data_dir": args.data.data_dir, "cache_dir": args.model.cache_dir, "token": args.model.token}
            loaded = datasets.load_dataset(name, args.data.dataset_config_name, **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        cli.fail(f"--dataset_name {name}: cannot be loaded: {cli.first_line(error)}")
    splits = dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
    if "train" not in splits and "validation" not in splits:
        cli.fail(f"--dataset_name {name}: has neither a train nor a validation split, only {', '.join(splits)}")
    return splits


def draw_validation_split(dataset: datasets.Dataset, percentage: int, seed: int) -> dict[str, datasets.Dataset]:
    """Hold out `percentage` of the rows at random; both parts keep the order of the data, so texts stay in one piece."""
    if len(dataset) < 2:
        cli.fail(f"the training data has {len(dataset)} row(s), too few to hold some out; give --validation_file")
    num_held_out = min(max(1, round(len(dataset) * percentage / 100)), len(dataset) - 1)
    held_out = np.zeros(len(dataset), bool)
    held_out[randomness.host_rng(seed, "validation split").choice(len(dataset), num_held_out, replace=False)] = True
    return {"train": dataset.select(np.flatnonzero(~held_out)), "validation": dataset.select(np.flatnonzero(held_out))}
