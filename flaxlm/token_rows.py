# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens: text tokenised, joined and cut or padded to one length, in memory-mapped arrays."""

import functools
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import datasets
import numpy as np

from flaxlm import arguments, cli

# Columns of token ids and the like, each int32 [rows, T], by name.
TokenRows = dict[str, np.ndarray]
# What a script tokenises with: a batch of texts, and the name of their column, to lists of numbers by column.
TokenizeFn = Callable[..., Mapping[str, list]]


class Collator(Protocol):
    """What a script makes batches with, noise and labels; and what it says of the rows of tokens that it takes."""

    columns: Mapping[str, int]  # names, and what fills up a short row
    row_length: int  # tokens in a row, at most
    line_by_line: bool  # a row per text; else texts are joined and cut
    pad_to: int | None  # with line_by_line: the length of all rows; None: that of the longest text
    draws_per_row: int  # uniform random numbers that a row needs

    def __call__(
        self, rows: TokenRows, uniforms_NR: np.ndarray, is_real_N: np.ndarray, num_groups: int
    ) -> dict[str, np.ndarray]:
        """Rows, random numbers [rows, draws_per_row] and which rows count, to model inputs and labels."""


def tokenize_and_group(
    splits: Mapping[str, datasets.Dataset],
    tokenize_fn: TokenizeFn,
    collator: Collator,
    data_args: arguments.DataArguments,
    cache_dir: str | None,
) -> dict[str, TokenRows]:
    """Turn text into rows of tokens per split: all texts joined and cut, or one row per text if the collator wants it so."""
    rows = {}
    for split, dataset in splits.items():
        text_column = data_args.source_column(dataset, collator)
        tokenized = dataset.map(
            functools.partial(tokenize_fn, text_column=text_column),
            batched=True,
            num_proc=data_args.preprocessing_num_workers,
            remove_columns=dataset.column_names,
            features=datasets.Features({name: datasets.Sequence(datasets.Value("int32")) for name in collator.columns}),
            load_from_cache_file=not data_args.overwrite_cache,
            desc=f"Tokenising {split}",
        )
        if len(tokenized) == 0:
            cli.fail(f"the {split} data {data_args.reason_for_no_rows(text_column)}")
        if collator.line_by_line:
            rows[split] = pad_rows(tokenized, collator.columns, collator.row_length, collator.pad_to, cache_dir)
        else:
            rows[split] = cut_rows(tokenized, collator.columns, collator.row_length, cache_dir)
    return rows


def token_chunks(tokenized: datasets.Dataset, column: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Arrow's own buffers, chunk by chunk: all tokens of the chunk's texts end to end, and the number in each text."""
    for chunk in tokenized.data.column(column).chunks:
        yield chunk.flatten().to_numpy(), chunk.value_lengths().to_numpy()


def disk_array(shape: tuple[int, ...], cache_dir: str | None) -> np.ndarray:
    """An int32 array in an unnamed file: not held in memory, shared with nobody, gone when the program ends."""
    directory = cache_dir or datasets.config.HF_DATASETS_CACHE
    os.makedirs(directory, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as file:
        return np.memmap(file, np.int32, "w+", shape=shape)


def cut_rows(tokenized: datasets.Dataset, fill: Mapping[str, int], row_length: int, cache_dir: str | None) -> TokenRows:
    """Join all texts and cut them into rows of `row_length`; the last row is padded with `fill[column]`.

    Nothing is lost between `Dataset.map` batches, and the rows do not depend on the number of processes.
    """
    rows = {}
    for column, padding in fill.items():
        num_tokens = sum(len(values) for values, _ in token_chunks(tokenized, column))
        rows[column] = disk_array((math.ceil(num_tokens / row_length), row_length), cache_dir)
        flat, end = rows[column].reshape(-1), 0
        for values, _ in token_chunks(tokenized, column):
            flat[end : end + len(values)] = values
            end += len(values)
        flat[end:] = padding
    return rows


def pad_rows(
    tokenized: datasets.Dataset, fill: Mapping[str, int], max_length: int, pad_to: int | None, cache_dir: str | None
) -> TokenRows:
    """One row per text, padded with `fill[column]` to `pad_to`, or to the longest text rounded up to a multiple of 16.

    All rows have one length, so that there is one shape to compile; it is never more than `max_length`.
    """
    rows = {}
    for column, padding in fill.items():
        longest = max((lengths.max(initial=1) for _, lengths in token_chunks(tokenized, column)), default=1)
        row_length = pad_to or min(16 * math.ceil(longest / 16), max_length)
        rows[column] = disk_array((len(tokenized), row_length), cache_dir)
        rows[column][:] = padding
        first = 0
        for values, lengths in token_chunks(tokenized, column):
            part = rows[column][first : first + len(lengths)]
            part[np.arange(row_length) < lengths[:, None]] = values
            first += len(lengths)
    return rows


def checksum(rows: TokenRows) -> int:
    """A checksum of the number of rows and of up to a thousand of them."""
    total = 0
    for name, array in sorted(rows.items()):
        sample = np.asarray(array[:: max(1, len(array) // 1000)])
        total = zlib.crc32(sample.tobytes(), zlib.crc32(f"{name} {array.shape}".encode(), total))
    return total
