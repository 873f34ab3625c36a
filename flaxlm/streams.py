# SPDX-License-Identifier: Apache-2.0
"""Text that is read while training: windows of rows, shuffled, exact to resume."""

import copy
import functools
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets
import datasets.distributed
import jax
import numpy as np

from flaxlm import arguments, cli, files, processes, randomness
from flaxlm.token_rows import Collator, TokenizeFn, TokenRows

logger = logging.getLogger(__name__)


class TextStream:
    """Rows of tokens from a stream of texts, shuffled window by window; exact to resume, and no more memory than a window.

    A window is `shuffle_buffer_size` texts: they are tokenised, joined to the tokens that the window before left over, cut
    into rows, and the rows permuted by (seed, epoch, window). A position is JSON: the state of the dataset at the window's
    start, the left-over tokens, and the number of the window's rows that are used up. Each process has a shard of the texts.
    """

    def __init__(
        self,
        open_dataset: Callable[[], datasets.IterableDataset],
        tokenize_fn: Callable[[Mapping[str, list]], Mapping[str, list]],
        text_column: str,
        collator: Collator,
        window_size: int,
        seed: int,
    ):
        self.open_dataset, self.tokenize_fn, self.text_column = open_dataset, tokenize_fn, text_column
        self.collator, self.window_size, self.seed = collator, window_size, seed

    def make_rows(self, texts: list[str], carried: Mapping[str, list[int]]) -> tuple[TokenRows, dict[str, list[int]]]:
        """Tokenise texts into full rows, and what is left over."""
        tokenized, row_length = self.tokenize_fn({self.text_column: texts}), self.collator.row_length
        rows, left_over = {}, {}
        for name, padding in self.collator.columns.items():
            if self.collator.line_by_line:
                rows[name] = np.full((len(tokenized[name]), row_length), padding, np.int32)
                for row, values in zip(rows[name], tokenized[name], strict=True):
                    row[: len(values)] = values
                continue
            parts = [np.asarray(part, np.int32) for part in (carried.get(name, []), *tokenized[name])]
            flat = np.concatenate(parts)
            end = len(flat) // row_length * row_length
            rows[name], left_over[name] = flat[:end].reshape(-1, row_length), flat[end:].tolist()
        return rows, left_over

    def first_rows(self, num_rows: int) -> tuple[TokenRows, int]:
        """The first rows, unshuffled, and the number of texts they took: what evaluation holds out."""
        parts, carried, num_texts, found = [], {}, 0, 0
        texts = iter(self.open_dataset())
        while found < num_rows:
            batch = [example[self.text_column] for example in itertools.islice(texts, 100)]
            if not batch:
                if carried.get("input_ids"):  # all the data is read: what is left over becomes a row that is filled up
                    parts.append({name: self.fill_up(name, values) for name, values in carried.items()})
                break
            part, carried = self.make_rows(batch, carried)
            parts.append(part)
            num_texts, found = num_texts + len(batch), found + len(part["input_ids"])
        return {name: np.concatenate([part[name] for part in parts])[:num_rows] for name in self.collator.columns}, num_texts

    def fill_up(self, name: str, values: list[int]) -> np.ndarray:
        """A row of a column, [1, T], from fewer than T values."""
        return np.array([values + [self.collator.columns[name]] * (self.collator.row_length - len(values))], np.int32)

    def windows(self, position: Mapping[str, Any] | None) -> Iterator[tuple[TokenRows, dict[str, Any]]]:
        """Windows without end, epoch after epoch, each with the position of its start."""
        dataset, epoch, window, carried, given_state = self.open_dataset(), 0, 0, {}, None
        if position:
            epoch, window, carried, given_state = (position[name] for name in ("epoch", "window", "carried", "dataset"))
            dataset.load_state_dict(given_state)
        while True:
            texts, first_window, found_tokens = iter(dataset), window, False
            while True:
                # Before its first text a dataset does not tell the state it was given.
                state, given_state = given_state or copy.deepcopy(dataset.state_dict()), None
                start = {"dataset": state, "epoch": epoch, "window": window, "carried": carried}
                batch = [example[self.text_column] for example in itertools.islice(texts, self.window_size)]
                if not batch:
                    break
                rows, carried = self.make_rows(batch, carried)
                found_tokens |= bool(len(rows["input_ids"]) or carried.get("input_ids"))
                order = randomness.host_rng(self.seed, "window", epoch, window, jax.process_index())
                order = order.permutation(len(rows["input_ids"]))
                yield {name: array[order] for name, array in rows.items()}, start
                window += 1
            if first_window == 0 and not found_tokens:
                cli.fail("no text is left to train on: lower --num_eval_samples or give more text")
            dataset, epoch, window = self.open_dataset(), epoch + 1, 0


def open_text_stream(split: str, args: arguments.Arguments, num_skipped: int = 0) -> datasets.IterableDataset | None:
    """This process's shard of a split as a stream, without its first texts; None if there is no such split."""
    data_args, path = args.data, getattr(args.data, f"{split}_file")
    if data_args.dataset_name:
        dataset = open_named_stream(split, args)
    elif path:
        options = data_args.text_loader_options()
        dataset = files.load(path, f"--{split}_file", args.model.cache_dir, options, streaming=True)
    else:
        dataset = None
    if dataset is None:
        return None
    dataset = datasets.distributed.split_dataset_by_node(dataset, jax.process_index(), jax.process_count())
    return dataset.skip(num_skipped) if num_skipped else dataset


def open_named_stream(split: str, args: arguments.Arguments) -> datasets.IterableDataset | None:
    """A split of a dataset of the Hub or of a local directory; None if it has no such split."""
    named = args.data.dataset_name, args.data.dataset_config_name
    options = {"data_dir": args.data.data_dir, "token": args.model.token}
    try:
        if split not in datasets.get_dataset_split_names(*named, **options):
            return None
        return datasets.load_dataset(*named, split=split, streaming=True, cache_dir=args.model.cache_dir, **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        cli.fail(f"--dataset_name {args.data.dataset_name}: {cli.first_line(error)}")


def open_streams(
    args: arguments.Arguments, tokenize_fn: TokenizeFn, collator: Collator
) -> tuple[TextStream | None, TokenRows | None]:
    """The training stream and the evaluation rows; without validation data these come from the beginning of the stream.

    They are held out also without do_eval, so that a later evaluation meets what was never trained on.
    """
    streams = {split: open_text_stream(split, args) for split in ("train", "validation")}
    split = "validation" if streams["validation"] else "train"
    try:
        example = datasets.Dataset.from_list([next(iter(streams[split]))])
    except (StopIteration, datasets.exceptions.DatasetsError, ValueError) as error:
        cli.fail(f"the data cannot be streamed: {cli.first_line(error)}")
    text_column = args.data.source_column(example, collator)

    def make_stream(split: str, num_skipped: int = 0) -> TextStream:
        open_dataset = functools.partial(open_text_stream, split, args, num_skipped)
        tokenize_column = functools.partial(tokenize_fn, text_column=text_column)
        window_size, seed = args.data.shuffle_buffer_size, args.training.seed
        return TextStream(open_dataset, tokenize_column, text_column, collator, window_size, seed)

    rows, num_held_out = None, 0
    if args.training.do_eval or split == "train":
        rows, num_texts = read_evaluation_rows(make_stream(split), split, args.data, text_column)
        num_held_out = num_texts if split == "train" else 0
    return make_stream("train", num_held_out) if args.training.do_train else None, rows


def read_evaluation_rows(
    stream: TextStream, split: str, data_args: arguments.DataArguments, text_column: str
) -> tuple[TokenRows, int]:
    """The first `num_eval_samples` rows of a stream, shared by all processes, and how many texts this one took for them."""
    wanted = data_args.num_eval_samples
    logger.info("Reading %d rows of tokens for evaluation", wanted)
    share = math.ceil(wanted / jax.process_count())
    found, num_texts = stream.first_rows(share)
    rows = processes.gather_rows(found)
    if len(rows["input_ids"]) == 0:
        cli.fail(f"the {split} data {data_args.reason_for_no_rows(text_column)}")
    if len(found["input_ids"]) < share and split == "train":
        cli.fail(f"--num_eval_samples {wanted}: all the data gives only {len(found['input_ids'])} rows; lower it")
    return rows, num_texts


def stream_name(data_args: arguments.DataArguments) -> str:
    """What stands for the data of a stream, whose checksum is not known, when a run is resumed."""
    name = data_args.dataset_name or os.path.basename(data_args.train_file)
    return f"{name} {data_args.dataset_config_name or ''}, read by {jax.process_count()} process(es)"
