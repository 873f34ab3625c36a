# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens: text tokenised, joined and cut or padded to one length, in memory-mapped arrays."""

import contextlib
import errno
import functools
import inspect
import logging
import math
import os
import tempfile
import types
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn, Protocol

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute

from flaxlm import arguments, cli, files, randomness

logger = logging.getLogger(__name__)

# Columns of token ids and the like, each int32 [rows, T], by name.
TokenRows = dict[str, np.ndarray]
# What a script tokenises with: a batch of texts, and the name of their column, to lists of numbers by column.
TokenizeFn = Callable[..., Mapping[str, list]]


class TextSize(NamedTuple):
    """Of the text that rows were made of, all of it, whatever was left out of the rows afterwards."""

    num_tokens: int
    num_bytes: int  # in UTF-8


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


def for_evaluation(collator: Collator) -> Collator:
    """The collator of rows that are evaluated: another one where the script's has such a method, else the same.

    For noise that makes training data, and no task of its own: its loss would tell nothing.
    """
    return collator.for_evaluation() if hasattr(collator, "for_evaluation") else collator


TEXT_STARTS = "text_starts"  # a column of rows for collators that ask for it: 1 where a text begins


def with_text_starts(batch: Mapping[str, list], tokenize_fn: Callable[..., Mapping[str, list]]) -> dict[str, list]:
    """What `tokenize_fn` makes of a batch of texts, and a column that marks the first token of each."""
    columns = tokenize_fn(batch)
    return {**columns, TEXT_STARTS: [[1] * (len(ids) > 0) + [0] * (len(ids) - 1) for ids in columns["input_ids"]]}


def number_texts(rows: TokenRows, is_token_NT: np.ndarray) -> np.ndarray:
    """Which text of its row a token is of, from 1, if the rows mark texts, else 1; and 0 for padding: int32 [N, T].

    As an attention mask it lets tokens see those of the same number.
    """
    if TEXT_STARTS not in rows:
        return is_token_NT.astype(np.int32)
    return np.where(is_token_NT, 1 + np.cumsum(rows[TEXT_STARTS], axis=1), 0).astype(np.int32)


def tokenize_and_group(
    splits: Mapping[str, datasets.Dataset],
    tokenize_fn: TokenizeFn,
    collator: Collator,
    data_args: arguments.DataArguments,
    cache_dir: str | None,
) -> dict[str, TokenRows]:
    """Turn text into rows of tokens per split: all texts joined and cut, or one row per text if the collator wants it so."""
    rows, code = {}, fingerprint(tokenize_fn)
    for split, dataset in splits.items():
        text_column = source_column(split, dataset, collator, data_args)
        column_fn = column_function(tokenize_fn, text_column, collator)
        parts = {"text_column": text_column, "columns": list(collator.columns)}
        result = datasets.fingerprint.update_fingerprint(dataset._fingerprint, code, parts)
        with told_of_split(split):
            tokenized = tokenize(dataset, column_fn, split, result, list(collator.columns), data_args, cache_dir)
        if sum(len(values) for values, _ in token_chunks(tokenized, "input_ids")) == 0:
            cli.fail(f"the {split} data {data_args.reason_for_no_rows(text_column)}")
        if collator.line_by_line:
            rows[split] = pad_rows(tokenized, collator.columns, collator.row_length, collator.pad_to, cache_dir)
        else:
            rows[split] = cut_rows(tokenized, collator.columns, collator.row_length, cache_dir)
    return rows


def column_function(tokenize_fn: TokenizeFn, text_column: str, collator: Collator) -> Callable[..., Mapping[str, list]]:
    """What tokenises texts of that column to the columns that the collator wants."""
    column_fn = functools.partial(tokenize_fn, text_column=text_column)
    return functools.partial(with_text_starts, tokenize_fn=column_fn) if TEXT_STARTS in collator.columns else column_fn


def source_column(split: str, dataset: datasets.Dataset, collator: Collator, data_args: arguments.DataArguments) -> str:
    """The column of a split that rows of tokens are made of; the log names it, and a mistake the split."""
    with told_of_split(split):
        column = data_args.source_column(dataset, collator)
    is_tokenized = column == files.TOKENS and files.kind_of(dataset.features[column]) == "lists"
    said = ", which is tokenised already and used as it is" if is_tokenized else ""
    logger.info("The %s data is column '%s'%s.", split, column, said)
    return column


@contextlib.contextmanager
def told_of_split(split: str) -> Iterator[None]:
    """A mistake within names the split."""
    try:
        yield
    except cli.Mistake as mistake:
        raise cli.Mistake(f"{mistake} (in the {split} data)") from mistake


def fingerprint(tokenize_fn: TokenizeFn) -> str:
    """What the result of tokenising follows from, beside the text: the code, the tokenizer, and other options."""
    function, options = getattr(tokenize_fn, "func", tokenize_fn), getattr(tokenize_fn, "keywords", {})
    code = datasets.fingerprint.Hasher.hash(sorted(code_of(function).items()))
    return datasets.fingerprint.update_fingerprint(code, function.__qualname__, options)


def code_of(function: Callable) -> dict[str, str]:
    """The source of a function, of the functions and classes of its file that it uses, and of our modules; constants.

    `datasets` would pickle all that, which fails for what jax has compiled, or for an open file.
    """
    found: dict[str, str] = {}
    waiting = [function]
    while waiting:
        function = inspect.unwrap(waiting.pop())
        found[function.__qualname__] = inspect.getsource(function)
        for name in names_in(function.__code__):
            value = inspect.unwrap(function.__globals__.get(name))
            if inspect.ismodule(value) and value.__name__.startswith("flaxlm."):
                found[name] = inspect.getsource(value)
            elif inspect.isfunction(value) and value.__module__ == function.__module__ and value.__qualname__ not in found:
                waiting.append(value)
            elif inspect.isclass(value) and value.__module__ == function.__module__:
                found[name] = inspect.getsource(value)
            elif isinstance(value, str | int | float | tuple | list | dict | set | frozenset):
                found[name] = repr(sorted(map(repr, value)) if isinstance(value, set | frozenset) else value)
    return found


def names_in(code: types.CodeType) -> set[str]:
    """All names that a function's code looks up outside, its inner functions' too."""
    return set(code.co_names).union(*(names_in(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


def tokenize(
    dataset: datasets.Dataset,
    tokenize_fn: Callable[[Mapping[str, list]], Mapping[str, list]],
    split: str,
    result: str,
    columns: Sequence[str],
    data_args: arguments.DataArguments,
    cache_dir: str | None,
) -> datasets.Dataset:
    """Texts to lists of numbers, kept in the cache under the fingerprint `result` and never beside the user's data."""
    with files.using_cache(cache_dir) as cache, contextlib.ExitStack() as on_failure:
        directory = os.path.join(cache, f"tokens-{result}")
        if dataset.cache_files:  # else nothing would tell an old result from one of other text
            os.makedirs(directory, exist_ok=True)
            on_failure.callback(remove_temporary_files, directory)
        tokenized = dataset.map(
            tokenize_fn,
            batched=True,
            num_proc=data_args.preprocessing_num_workers,
            remove_columns=dataset.column_names,
            features=datasets.Features({name: datasets.Sequence(datasets.Value("int32")) for name in columns}),
            load_from_cache_file=not data_args.overwrite_cache,
            cache_file_name=os.path.join(directory, "rows.arrow") if dataset.cache_files else None,
            new_fingerprint=result,
            desc=f"Tokenising {split}",
        )
        on_failure.pop_all()
        return tokenized


def remove_temporary_files(directory: str) -> None:
    """What `datasets` leaves when a disk is full."""
    for path in Path(directory).glob("tmp*"):
        path.unlink(missing_ok=True)


def token_chunks(tokenized: datasets.Dataset, column: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Arrow's own buffers, chunk by chunk: all tokens of the chunk's texts end to end, and the number in each text."""
    for chunk in tokenized.data.column(column).chunks:
        yield chunk.flatten().to_numpy(), chunk.value_lengths().to_numpy()


def disk_array(shape: tuple[int, ...], cache_dir: str | None) -> np.ndarray:
    """An int32 array in an unnamed file: not held in memory, shared with nobody, gone when the program ends.

    Its space is taken at once: of a file with holes a full disk would be noticed by a signal that ends the program.
    """
    with files.using_cache(cache_dir) as directory, tempfile.TemporaryFile(dir=directory) as file:
        reserve(file, math.prod(shape) * np.dtype(np.int32).itemsize)
        return np.memmap(file, np.int32, "r+", shape=shape)


def reserve(file: BinaryIO, num_bytes: int) -> None:
    """Take up so much of the disk; where the file system cannot do that by itself, by writing. Raises OSError if it is full."""
    try:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    except (AttributeError, OSError) as error:  # macOS has no such function
        if getattr(error, "errno", None) not in (None, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        zeros = bytes(2**20)
        for start in range(0, num_bytes, len(zeros)):
            file.write(zeros[: num_bytes - start])
        file.flush()


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


def size_of(dataset: datasets.Dataset, column: str, rows: TokenRows, collator: Collator) -> TextSize | None:
    """How large the text is that `rows` are all of; None where its column holds other than text."""
    if not is_text(dataset.features.arrow_schema.field(column).type):
        return None
    texts = dataset.select_columns(column).with_format("arrow").iter(batch_size=10_000)
    num_bytes = sum(pa.compute.sum(pa.compute.binary_length(table[column])).as_py() or 0 for table in texts)
    return TextSize(count_tokens(rows, collator), num_bytes)


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def count_tokens(rows: TokenRows, collator: Collator) -> int:
    """Tokens in rows of joined texts, of which only the last is filled up."""
    full_rows, last_row = rows["input_ids"][:-1], rows["input_ids"][-1:]
    return full_rows.size + int((last_row != collator.columns["input_ids"]).sum())


def checksum(rows: TokenRows) -> int:
    """A checksum of the number of rows and of up to a thousand of them."""
    total = 0
    for name, array in sorted(rows.items()):
        sample = np.asarray(array[:: max(1, len(array) // 1000)])
        total = zlib.crc32(sample.tobytes(), zlib.crc32(f"{name} {array.shape}".encode(), total))
    return total


Draw = Callable[[int, int], np.ndarray]  # a first row and a number of rows, to their uniform numbers


def gives_labels(rows: TokenRows, collator: Collator, draw: Draw | None = None) -> bool:
    """Does a row give a label? Without `draw`: can it, whatever numbers are drawn? (The lowest choose the most tokens.)

    It cannot where all is padding and special tokens.
    """
    draw = draw or (lambda first, num: 1e-6 * randomness.row_uniforms(0, ("labels",), first, num, collator.draws_per_row))
    for first in range(0, len(rows["input_ids"]), 256):
        part = {name: np.asarray(array[first : first + 256]) for name, array in rows.items()}
        num_rows = len(part["input_ids"])
        if collator(part, draw(first, num_rows), np.ones(num_rows, bool), 1)["label_weights"].any():
            return True
    return False


def refuse_without_labels(split: str) -> NoReturn:
    """What is trained on or evaluated gives no label: the loss would be 0 whatever the model does."""
    cli.fail(f"the {split} data gives not one label: its texts hold only padding and special tokens, or too few others")
