# SPDX-License-Identifier: Apache-2.0
"""Mixtures of corpora: the file that names them with their weights, and of which corpus each row of a batch is."""

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from flaxlm import arguments, cli, randomness

# Flags that a corpus may have of its own; all others hold for the whole mixture.
KEYS = (
    "train_file", "validation_file", "dataset_name", "dataset_config_name", "data_dir", "train_split_name",
    "eval_split_name", "text_column_name", "encoding", "validation_split_percentage", "max_train_samples",
)  # fmt: skip
# Those of them that say nothing of a mixture as a whole.
OF_ONE_CORPUS = ("train_file", "dataset_name", "dataset_config_name", "data_dir", "train_split_name", "eval_split_name")


class Part(NamedTuple):
    """A corpus of a mixture: its name, its share of all rows of tokens, and the data flags that say which text it is.

    Shares are exact fractions that add up to 1, so that no rounding decides how many rows a corpus gets.
    """

    name: str
    share: Fraction
    flags: Mapping[str, Any]


# ---- The file ------------------------------------------------------------------------------------------------------------


def read(path: str) -> list[Part]:
    """The corpora that a file names, in its order; mistakes in it are refused with file, corpus and key."""
    entries, whole = load(path), f"--mixture_file {path}"
    if not isinstance(entries, dict) or not entries:
        cli.fail(f"{whole}: must map names to corpora, such as wikipedia: {{train_file: wiki.jsonl, weight: 3}}")
    weights, flags = {}, {}
    for name, entry in entries.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
            cli.fail(f"{whole}: {name!r} is no name; a name is of letters, digits, _, - and ., in YAML in quotes if need be")
        with telling(path, name):
            if not isinstance(entry, dict):
                cli.fail(f"must map keys to values, such as {{train_file: {name}.jsonl, weight: 1}}")
            weights[name] = read_weight(entry)
            flags[name] = read_flags({key: value for key, value in entry.items() if key != "weight"})
    total = sum(weights.values())
    return [Part(name, weight / total, flags[name]) for name, weight in weights.items()]


def load(path: str) -> Any:
    """What a JSON or YAML file holds; a key that stands twice in one place is refused, of which libraries take the last."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", ".yaml", ".yml"):
        cli.fail(f"--mixture_file {path}: unknown suffix; use .json, .yaml or .yml")
    if not os.path.isfile(path):
        cli.fail(f"--mixture_file {path}: no such file")
    with cli.reading(f"--mixture_file {path}: cannot be read"):
        text = Path(path).read_text("utf-8-sig")
        if suffix == ".json":
            return json.loads(text, object_pairs_hook=unique_keys)
        try:
            return yaml.load(text, UniqueKeysLoader)
        except yaml.MarkedYAMLError as error:  # it tells what is wrong and where in several lines
            mark = error.problem_mark
            where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            raise ValueError(f"{error.problem}{where}") from error


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"'{key}' stands in it twice")
    return dict(pairs)


class UniqueKeysLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        unique_keys([(str(key.value), None) for key, _ in node.value])
        return super().construct_mapping(node, deep)


def read_weight(entry: Mapping[str, Any]) -> Fraction:
    """As it is written: 0.1 is a tenth, and YAML's 1e-3, a string to the library, a thousandth."""
    if "weight" not in entry:
        cli.fail("has no weight; a weight is its part of the rows, in proportion to the other weights")
    value, number = entry["weight"], math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
    if not (math.isfinite(number) and number > 0):
        cli.fail(f"weight {value}: must be a finite number above 0")
    return Fraction(str(value))


def read_flags(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a corpus; are they those that it may have, with values as on a command line?"""
    for key in entry:
        if key not in KEYS:
            cli.fail(f"{key}: is no key of a corpus; these are weight, {', '.join(KEYS)}")
    if ("train_file" in entry) == ("dataset_name" in entry):
        cli.fail("train_file, dataset_name: must name its text with one of them")
    kinds = {field.name: str(field.type) for field in dataclasses.fields(arguments.DataArguments)}
    return {key: read_value(key, value, kinds[key]) for key, value in entry.items()}


def read_value(key: str, value: Any, kind: str) -> Any:
    """A value for a flag of such a type. Flags that take several values take a single one too."""
    if "int" in kind:
        if not isinstance(value, int) or isinstance(value, bool):
            cli.fail(f"{key} {value}: must be a whole number")
        return value
    values = value if isinstance(value, list) and "list" in kind else [value]
    if not values or not all(isinstance(item, str) and item for item in values):
        cli.fail(f"{key} {value}: must be text{' or a list of texts' if 'list' in kind else ''}; in quotes if need be")
    return values if "list" in kind else value


@contextlib.contextmanager
def telling(path: str, name: str) -> Iterator[None]:
    """What goes wrong with a corpus is told with the file and its name; what else is a flag is a key there."""
    try:
        yield
    except (cli.Mistake, cli.Accident) as ending:
        message = re.sub(rf"--({'|'.join(KEYS)})\b", r"\1", str(ending))
        kind = cli.Mistake if isinstance(ending, cli.Mistake) else cli.Accident
        raise kind(f"--mixture_file {path}: {name}: {message}") from ending


def iterate(items: Iterable, path: str, name: str) -> Iterator:
    """The same items; what goes wrong with the next one is told with the name of the corpus."""
    with telling(path, name):
        yield from items


def check_names_no_other_data(data_args: arguments.DataArguments) -> None:
    """The text of a mixture is that of its corpora."""
    for flag in OF_ONE_CORPUS:
        if getattr(data_args, flag):
            cli.fail(f"--{flag}: not with --mixture_file, whose corpora have it as a key; drop one of them")


def arguments_of(parts: Sequence[Part], args: arguments.Arguments) -> Iterator[arguments.Arguments]:
    """The arguments of a run on each corpus alone, in order.

    Numbers of rows to evaluate are divided by shares, at least one each; with a --validation_file, which is for all, nothing
    is evaluated of a corpus, and nothing held out.
    """
    flags = [flag for flag in ("num_eval_samples", "max_eval_samples") if getattr(args.data, flag)]
    counts = {flag: apportion(getattr(args.data, flag), [part.share for part in parts]) for flag in flags}
    training = dataclasses.replace(args.training, do_eval=args.training.do_eval and not args.data.validation_file)
    for index, part in enumerate(parts):
        if args.data.validation_file and "validation_file" in part.flags:
            remedy = "not with --validation_file, which is for all corpora; name one thing to evaluate"
            cli.fail(f"--mixture_file {args.data.mixture_file}: {part.name}: validation_file: {remedy}")
        sizes = {flag: max(counts[flag][index], 1) for flag in flags}
        data = dataclasses.replace(args.data, mixture_file=None, **sizes | dict(part.flags))
        yield args._replace(data=data, training=training)


# ---- Whose row comes next ------------------------------------------------------------------------------------------------


def apportion(total: int, shares: Sequence[Fraction]) -> list[int]:
    """Divide a number by shares into whole ones that add up to it, by largest remainders: each less than 1 off."""
    exact = [total * share for share in shares]
    counts = [math.floor(part) for part in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def order_of_epoch(
    names: Sequence[str], sizes: Sequence[int], counts: Sequence[int], seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """The corpus of each row of an epoch, and which row of that corpus it is: two int [sum(counts)].

    A corpus gives `counts` of its `sizes` rows in each epoch, one after the other from a sequence without end in which none
    comes again before all have come. Costs, of time and memory, what an order of all rows of all corpora does.
    """
    corpora_N = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    corpora_N = corpora_N[randomness.host_rng(seed, "order", epoch).permutation(len(corpora_N))]
    rows_N = np.empty(len(corpora_N), np.int64)
    for index, (name, size, count) in enumerate(zip(names, sizes, counts, strict=True)):
        rows_N[corpora_N == index] = draw_rows(name, size, seed, epoch * count, count)
    return corpora_N, rows_N


def draw_rows(name: str, size: int, seed: int, first: int, count: int) -> np.ndarray:
    """`count` draws of a corpus from number `first` on; each `size` of them are its rows, in an order of their own."""
    passes = range(first // size, -(-(first + count) // size))
    orders = [randomness.host_rng(seed, f"order of {name}", number).permutation(size) for number in passes]
    return np.concatenate([np.zeros(0, np.int64), *orders])[first - passes.start * size :][:count]


def divide_step(num_rows: int, shares: Sequence[Fraction], seed: int, step: int, num_processes: int) -> np.ndarray:
    """The corpora of the rows that P processes put into a step, `num_rows` each: int [P, num_rows].

    Systematic sampling: evenly spaced points behind an offset, so that of all these rows a corpus gets its share to within
    one, however small that is. From step to step the offset moves on by the golden ratio, which keeps what a corpus has had
    since the first step near its share too. A process has every P-th point, from another place in each step, in random order.
    """
    offset = (randomness.host_rng(seed, "mixture").random() + step * GOLDEN_RATIO) % 1
    points_N = (np.arange(num_rows * num_processes) + offset) / (num_rows * num_processes)
    borders = np.cumsum([float(share) for share in shares])[:-1]
    corpora_NP = np.searchsorted(borders, points_N, side="right").reshape(num_rows, num_processes)
    orders = (randomness.host_rng(seed, "mixture", step, process) for process in range(num_processes))
    corpora_PN = np.roll(corpora_NP.T, step, axis=0)
    return np.stack([np_rng.permutation(corpora_N) for np_rng, corpora_N in zip(orders, corpora_PN, strict=True)])


GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def interleave(
    parts: Sequence[Mapping[str, np.ndarray]], corpora_N: np.ndarray, fill: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Rows of tokens of all corpora as one array per column: row i is the next of corpus `corpora_N[i]`.

    All are as long as those of the corpus with the longest, so that there is one shape to compile.
    """
    rows = {}
    for column, padding in fill.items():
        width = max(part[column].shape[1] for part in parts)
        rows[column] = np.full((len(corpora_N), width), padding, np.int32)
        for index, part in enumerate(parts):
            rows[column][corpora_N == index, : part[column].shape[1]] = part[column]
    return rows
