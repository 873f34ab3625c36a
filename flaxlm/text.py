# SPDX-License-Identifier: Apache-2.0
"""The text of a run: where its splits are, in files or in a dataset with a name; and loading them before training."""

import contextlib
import dataclasses
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas

from flaxlm import addresses, arguments, cli, files, formats, inputs, randomness

logger = logging.getLogger(__name__)


class StreamedSplit(NamedTuple):
    """A split that `datasets` streams: of the Hub, or of a directory of files that are not of our formats."""

    split: str
    options: Mapping[str, Any]  # of datasets.load_dataset


# Where a split is. A Dataset is one that save_to_disk wrote, or that is loaded already.
Source = files.TextFiles | datasets.Dataset | StreamedSplit


# ---- Which splits --------------------------------------------------------------------------------------------------------


def find_sources(args: arguments.Arguments) -> dict[str, Source]:
    """Where this run's training and validation data are: "train", "validation" or both, as far as they are there."""
    data_args, sources = args.data, {}
    text_options = data_args.text_loader_options()
    if data_args.dataset_name:
        if data_args.train_file:
            logger.warning("--train_file %s is not read: the data is --dataset_name.", inputs.shown(data_args.train_file))
        common = {"data_dir": data_args.data_dir, "cache_dir": args.model.cache_dir, "token": args.model.token}
        named = (data_args.dataset_name, data_args.dataset_config_name)
        options = {"text_options": text_options, "encoding": data_args.encoding, "streaming": data_args.streaming}
        found = find_named_splits(*named, **common, **options)
        sources = {role: found[split] for role, split in choose_splits(list(found), args).items()}
    options = {"text_options": text_options, "encoding": data_args.encoding, "token": args.model.token}
    if data_args.train_file and not data_args.dataset_name:
        sources["train"] = files.text_files(data_args.train_file, "--train_file", **options)
    if data_args.validation_file:
        sources["validation"] = files.text_files(data_args.validation_file, "--validation_file", **options)
    return sources


def choose_splits(available: Sequence[str], args: arguments.Arguments) -> dict[str, str]:
    """Which splits of a dataset are trained on and evaluated: {"train": name, "validation": name}, or one of the two."""
    data_args, names = args.data, ", ".join(available)
    for flag in ("train_split_name", "eval_split_name"):
        if getattr(data_args, flag) not in (None, *available):
            cli.fail(f"--{flag} {getattr(data_args, flag)}: {data_args.dataset_name} has no such split, only {names}")
    train = data_args.train_split_name or ("train" if "train" in available else None)
    validation = data_args.eval_split_name
    if validation is None and not data_args.validation_file and "validation" in available and train != "validation":
        validation = "validation"
    if args.training.do_train and train is None:
        remedy = "name the one to train on with --train_split_name, or give --do_eval alone"
        cli.fail(f"--dataset_name {data_args.dataset_name}: has no train split, only {names}; {remedy}")
    if train is None and validation is None and not data_args.validation_file:
        if len(available) > 1:
            remedy = "name the one to evaluate with --eval_split_name"
            cli.fail(f"--dataset_name {data_args.dataset_name}: has neither validation nor train, but {names}; {remedy}")
        validation = available[0]
        logger.info("Evaluating the only split there is, %s.", validation)
    if args.training.do_train and train == validation:
        logger.warning("--eval_split_name %s: evaluated is what is trained on.", validation)
    return {role: split for role, split in (("train", train), ("validation", validation)) if split}


def find_named_splits(
    name: str,
    config_name: str | None = None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    text_options: Mapping[str, Any] | None = None,
    streaming: bool = False,
    encoding: str | None = None,
) -> dict[str, Source]:
    """All splits of a dataset, by their names. `text_options` say how its txt files are read, if it has such.

    An `encoding` is for local files of text; anywhere else it is refused.
    """
    if os.path.isfile(name):
        cli.fail(f"--dataset_name {name}: is a file; read it with --train_file")
    with cli.reading(f"--dataset_name {name}: cannot be loaded"):
        if inputs.is_saved_to_disk(name):
            refuse_encoding(encoding, name)
            loaded = datasets.load_from_disk(name)
            return dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
        found = find_text_files(name, config_name, data_dir, text_options or {}, encoding) if os.path.isdir(name) else None
        if found:
            return found
        refuse_encoding(encoding, name)
        logger.info("Loading dataset %s", name)
        with files.using_cache(cache_dir):
            return load_with_library(name, config_name, data_dir, cache_dir, token, text_options or {}, streaming)


def refuse_encoding(encoding: str | None, name: str) -> None:
    if encoding:
        cli.fail(f"--encoding {encoding}: not for --dataset_name {name}; it is for local txt, csv, tsv and json files")


def load_with_library(
    name: str,
    config_name: str | None,
    data_dir: str | None,
    cache_dir: str | None,
    token: str | None,
    text_options: Mapping[str, Any],
    streaming: bool,
) -> dict[str, Source]:
    """All splits of a dataset as `datasets` reads them, where they are streamed not before they are asked for."""
    options = {"path": name, "name": config_name, "data_dir": data_dir, "cache_dir": cache_dir, "token": token}
    loader = loader_of(datasets.load_dataset_builder(**options))
    options |= {"text": {"encoding": "utf-8-sig", **text_options}, "csv": CSV_OPTIONS}.get(loader, {})
    if loader == "csv":  # pandas leaves out surplus fields, with a warning
        warnings.filterwarnings("error", "Length of header", pandas.errors.ParserWarning)
    if streaming:
        names = datasets.get_dataset_split_names(name, config_name, data_dir=data_dir, token=token)
        return {split: StreamedSplit(split, options) for split in names}
    try:
        return dict(datasets.load_dataset(**options))
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(cli.first_line(error.__cause__ or error)) from error  # it says only that something went wrong


CSV_OPTIONS = {"keep_default_na": False, "na_values": [""], "index_col": False}  # NA is text, no column is a name of the row


def loader_of(builder: datasets.DatasetBuilder) -> str:
    """The format of what a builder reads, as in formats.DATA_LOADERS if it is one of these."""
    return type(builder).__module__.rpartition(".")[2]


def find_text_files(
    directory: str,
    config_name: str | None,
    data_dir: str | None,
    text_options: Mapping[str, Any],
    encoding: str | None = None,
) -> dict[str, files.TextFiles] | None:
    """The files of a local directory by splits, which `datasets` tells by their names; None if we cannot read their format."""
    with plain_names(directory) as (mirror, links), tempfile.TemporaryDirectory() as cache_dir:
        try:
            builder = datasets.load_dataset_builder(mirror, config_name, data_dir=data_dir, cache_dir=cache_dir)
        except Exception as error:
            reason = cli.first_line(error).replace(mirror, directory)
            if "same data file format" in reason:
                reason = "the splits are of different formats; name their files with --train_file and --validation_file"
            raise ValueError(reason) from error
    config, loader = builder.config, loader_of(builder)
    splits = {str(split): [links.get(path, path) for path in paths] for split, paths in (config.data_files or {}).items()}
    usual = {"name", "version", "description", "data_dir", "data_files", "sep", "delimiter"}
    is_special = any(getattr(config, f.name) != f.default for f in dataclasses.fields(config) if f.name not in usual)
    if is_special or any(formats.loader_of(path) != loader for paths in splits.values() for path in paths):
        return None
    if encoding:
        formats.check_encoding_name(encoding, [path for paths in splits.values() for path in paths])
    options = {"text": text_options, "csv": {"sep": getattr(config, "sep", ",")}}.get(loader, {})
    options = {**options, **files.with_encoding(encoding)}
    return {split: files.TextFiles(paths, f"--dataset_name {directory}:", loader, options) for split, paths in splits.items()}


@contextlib.contextmanager
def plain_names(directory: str) -> Iterator[tuple[str, dict[str, str]]]:
    """A directory with links to the files of another, and the files by their links, under names that `datasets` can read.

    It takes brackets, ? and :: in a path for patterns or archives, and knows suffixes in lower case only.
    """
    with tempfile.TemporaryDirectory() as temporary:
        mirror, links, visited = os.path.join(os.path.realpath(temporary), "data"), {}, {os.path.realpath(temporary)}
        os.mkdir(mirror)
        has_card = os.path.isfile(os.path.join(directory, "README.md"))  # which may name the files
        for parent, names, file_names in os.walk(directory, followlinks=True):
            names[:] = [name for name in names if not name.startswith(".")]
            if os.path.realpath(parent) in visited:  # a link that goes in a circle
                names.clear()
                continue
            visited.add(os.path.realpath(parent))
            for name in file_names:
                path = os.path.abspath(os.path.join(parent, name))
                plain = os.path.relpath(path, os.path.abspath(directory)).replace("::", "__")
                if formats.loader_of(path) and not has_card and not name.endswith("".join(formats.suffixes(path))):
                    plain = os.path.join(os.path.dirname(plain), os.path.basename(plain).lower())
                link = os.path.join(mirror, plain)
                while link in links:
                    link = os.path.join(os.path.dirname(link), f"_{os.path.basename(link)}")
                os.makedirs(os.path.dirname(link), exist_ok=True)
                os.symlink(path, link)
                links[link] = path
        yield mirror, links


def names_in(source: Source) -> set[Any]:
    """What a split is of: its files, or the part of a dataset. Splits that have a name in common have text in common."""
    if isinstance(source, files.TextFiles):
        return {path if addresses.is_address(path) else os.path.realpath(path) for path in source.paths}
    if isinstance(source, datasets.Dataset):
        return {("dataset", source._fingerprint)}
    return {(*(source.options[name] for name in ("path", "name", "data_dir")), source.split)}


# ---- Opening and loading -------------------------------------------------------------------------------------------------


def first_rows(source: Source, count: int) -> datasets.Dataset:
    """So many rows from the beginning of a split, in memory."""
    if isinstance(source, files.TextFiles):
        return files.first_rows(source, count)
    if isinstance(source, datasets.Dataset):
        return source.select(range(min(count, len(source))))
    stream = open_stream(source)
    rows = list(stream.take(count))
    names = dict.fromkeys(name for row in rows for name in row)  # in the order they come
    return datasets.Dataset.from_list([{name: row.get(name) for name in names} for row in rows], features=stream.features)


def open_stream(source: Source) -> datasets.IterableDataset:
    """The rows of a split, from its beginning."""
    if isinstance(source, files.TextFiles):
        return files.stream_rows(source)
    if isinstance(source, datasets.Dataset):
        return source.to_iterable_dataset()
    return datasets.load_dataset(**source.options, split=source.split, streaming=True)


def load_splits(
    args: arguments.Arguments, collator: Any, sources: Mapping[str, Source] | None = None
) -> dict[str, datasets.Dataset]:
    """Load the splits that this run needs: "train", "validation" or both; of `sources`, if they are found already.

    Where the data has no validation split, `validation_split_percentage` of the training rows are drawn with the seed, also
    without do_eval: so a later evaluation of the same data meets rows that were never trained on.
    """
    sources = sources or find_sources(args)
    wanted = ["train"] * args.training.do_train + ["validation"] * args.training.do_eval
    needed = [role for role in sources if role in wanted or "validation" not in sources]
    splits = {role: load_source(sources[role], args.model.cache_dir) for role in needed}
    for role, dataset in splits.items():
        if len(dataset) == 0:
            name = args.data.dataset_name or inputs.shown(getattr(args.data, f"{role}_file"))
            cli.fail(f"the {role} data is empty: {name} has no rows")
        if getattr(sources[role], "flag", "") == f"--{role}_file":
            splits[role] = args.data.add_columns(dataset, role)
    if "validation" not in sources:
        splits |= hold_out(splits["train"], args, collator)
    return {role: splits[role] for role in wanted}


def load_source(source: Source, cache_dir: str | None) -> datasets.Dataset:
    """All rows of a split that is not streamed."""
    return source if isinstance(source, datasets.Dataset) else files.load_rows(source, cache_dir)


def hold_out(dataset: datasets.Dataset, args: arguments.Arguments, collator: Any) -> dict[str, datasets.Dataset]:
    """Divide the only data there is; of a single row, which cannot be divided, all is trained on if nothing is evaluated."""
    if len(dataset) == 1:
        args.data.source_column(dataset, collator)  # the objective may know better what is wrong
        if not args.training.do_eval:
            logger.warning("The training data is one text: nothing of it is held out for evaluation.")
            return {"train": dataset}
    return draw_validation_split(dataset, args.data.validation_split_percentage, args.training.seed)


def draw_validation_split(dataset: datasets.Dataset, percentage: int, seed: int) -> dict[str, datasets.Dataset]:
    """Hold out `percentage` of the rows at random; both parts keep the order of the data, so texts stay in one piece."""
    if len(dataset) < 2:
        cli.fail(f"the training data has {len(dataset)} row(s), too few to hold some out; give --validation_file")
    num_held_out = min(max(1, round(len(dataset) * percentage / 100)), len(dataset) - 1)
    held_out = np.zeros(len(dataset), bool)
    held_out[randomness.host_rng(seed, "validation split").choice(len(dataset), num_held_out, replace=False)] = True
    return {"train": dataset.select(np.flatnonzero(~held_out)), "validation": dataset.select(np.flatnonzero(held_out))}
