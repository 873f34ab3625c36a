# SPDX-License-Identifier: Apache-2.0
"""Text that is read while training: windows of rows, shuffled, exact to resume."""

import contextlib
import copy
import functools
import itertools
import logging
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets
import datasets.distributed
import jax
import numpy as np

from flaxlm import addresses, arguments, cli, files, inputs, processes, randomness, text, token_rows
from flaxlm.token_rows import Collator, TextSize, TokenizeFn, TokenRows

logger = logging.getLogger(__name__)


class TextStream:
    """Rows of tokens from a stream of texts, shuffled window by window; exact to resume, and no more memory than a window.

    A window is `shuffle_buffer_size` texts: they are tokenised, joined to the tokens that the window before left over, cut
    into rows, and the rows permuted by (seed, epoch, window). A position is JSON: the state of the dataset at the window's
    start, the left-over tokens, and the number of the window's rows that are used up. Each process has its part of the texts.
    `source` is the flag and name that messages begin with; `identity` tells this stream from one of other texts.
    """

    def __init__(
        self,
        open_dataset: Callable[[], "datasets.IterableDataset | DealtTexts"],
        tokenize_fn: Callable[[Mapping[str, list]], Mapping[str, list]],
        text_column: str,
        collator: Collator,
        window_size: int,
        seed: int,
        source: str = "",
    ):
        self.open_dataset, self.tokenize_fn, self.text_column = open_dataset, tokenize_fn, text_column
        self.collator, self.window_size, self.seed, self.source = collator, window_size, seed, source
        self.identity = ""

    def take(self, examples: Iterator[Mapping[str, Any]], count: int) -> list[Any]:
        """The next texts, or lists of their tokens; fewer at the end of the data. A row without one counts as an empty text."""
        with told_of_streams(self.source):
            rows = list(itertools.islice(examples, count))
        if any(self.text_column not in row for row in rows):
            cli.log_once("%s: some rows have no column '%s': they count as empty.", self.source, self.text_column)
        return [row.get(self.text_column) or "" for row in rows]

    def make_rows(self, texts: list[Any], carried: Mapping[str, list[int]]) -> tuple[TokenRows, dict[str, list[int]]]:
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

    def first_rows(self, num_rows: int) -> tuple[TokenRows, int, TextSize | None]:
        """The first rows, unshuffled, the number of texts they took and how large these are: what evaluation holds out.

        Of data that is tokenised already there is no text to be measured.
        """
        texts, carried, num_texts, found, num_bytes = iter(self.open_dataset()), {}, 0, 0, 0
        parts = [{name: np.zeros((0, self.collator.row_length), np.int32) for name in self.collator.columns}]
        while found < num_rows:
            batch = self.take(texts, 100)
            if not batch:
                if carried.get("input_ids"):  # all the data is read: what is left over becomes a row that is filled up
                    parts.append({name: self.fill_up(name, values) for name, values in carried.items()})
                break
            part, carried = self.make_rows(batch, carried)
            parts.append(part)
            num_texts, found = num_texts + len(batch), found + len(part["input_ids"])
            if all(isinstance(text, str) for text in batch) and num_bytes is not None:
                num_bytes += sum(len(text.encode("utf-8", "surrogatepass")) for text in batch)
            else:
                num_bytes = None
        num_tokens = found * self.collator.row_length + len(carried.get("input_ids", ()))
        size = None if num_bytes is None else TextSize(num_tokens, num_bytes)
        rows = {name: np.concatenate([part[name] for part in parts])[:num_rows] for name in self.collator.columns}
        return rows, num_texts, size

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
                batch = self.take(texts, self.window_size)
                if not batch:
                    break
                rows, carried = self.make_rows(batch, carried)
                found_tokens |= bool(len(rows["input_ids"]) or carried.get("input_ids"))
                order = randomness.host_rng(self.seed, "window", epoch, window, jax.process_index())
                order = order.permutation(len(rows["input_ids"]))
                yield {name: array[order] for name, array in rows.items()}, start
                window += 1
            if first_window == 0 and not found_tokens:
                advice = (
                    "give more text, --validation_file, or a lower --num_eval_samples; a hundred texts are held out at least"
                )
                cli.fail(f"no text is left to train on: {advice}")
            dataset, epoch, window = self.open_dataset(), epoch + 1, 0


@contextlib.contextmanager
def told_of_streams(source: str) -> Iterator[None]:
    """What goes wrong with a stream is told in a line: damaged data is a mistake, a network that fails an accident."""
    try:
        with cli.reading(f"{source}: cannot be read further"):
            yield
    except cli.Ending as ending:
        judged = addresses.explain(source, ending)
        if not isinstance(judged, cli.Accident):
            raise
        advice = "if a checkpoint was saved, the same command with --resume_from_checkpoint goes on from it"
        raise cli.Accident(f"{judged}; {advice}") from ending


class DealtTexts:
    """This process's part of texts that all processes read: blocks of neighbours, which stay together, dealt in turn.

    Blocks have 1, 2, 4, ... and at last 128 texts: nobody goes without, however few there are, and of a file with a blank line
    behind each text nobody gets only those lines. The first `num_skipped` texts that are ours are left out. Iterated once;
    between two texts `state_dict` is JSON that a new one goes on from.
    """

    MOST_DOUBLINGS = 7  # the borders of blocks tear neighbours apart

    def __init__(self, dataset: datasets.IterableDataset, index: int, num_processes: int, num_skipped: int = 0):
        self.dataset, self.index, self.num_processes = dataset, index, num_processes
        self.place = {"block": 0, "texts_of_block": 0, "num_skipped": num_skipped}

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        place = self.place
        for row in self.dataset:
            is_ours = place["block"] % self.num_processes == self.index
            place["texts_of_block"] += 1
            if place["texts_of_block"] == 2 ** min(place["block"] // self.num_processes, self.MOST_DOUBLINGS):
                place["block"], place["texts_of_block"] = place["block"] + 1, 0
            if is_ours and place["num_skipped"]:
                place["num_skipped"] -= 1
            elif is_ours:
                yield row

    def state_dict(self) -> dict[str, Any]:
        return {"dataset": self.dataset.state_dict(), **self.place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.dataset.load_state_dict(state["dataset"])
        self.place.update({name: state[name] for name in self.place})


def open_shard(source: text.Source, num_skipped: int, by_files: bool) -> datasets.IterableDataset | DealtTexts:
    """This process's part of a split as a stream, without its first texts.

    With `by_files` it is files of its own, so that it reads no others, if their number is a multiple of the processes.
    """
    dataset, index, num_processes = text.open_stream(source), jax.process_index(), jax.process_count()
    if num_processes > 1 and not (by_files and dataset.num_shards % num_processes == 0):
        return DealtTexts(dataset, index, num_processes, num_skipped)
    dataset = datasets.distributed.split_dataset_by_node(dataset, index, num_processes)
    return dataset.skip(num_skipped) if num_skipped else dataset


def open_streams(
    args: arguments.Arguments,
    tokenize_fn: TokenizeFn,
    collator: Collator,
    sources: Mapping[str, text.Source] | None = None,
) -> tuple[TextStream | None, TokenRows | None, TextSize | None]:
    """The training stream, the evaluation rows and the size of their text; without validation data these rows come from the
    beginning of the stream.

    They are held out also without do_eval, so that a later evaluation meets what was never trained on. `sources` are looked
    for unless they are found already.
    """
    sources = sources or text.find_sources(args)
    split = "validation" if "validation" in sources else "train"
    reads_rows = args.training.do_eval or split == "train"
    needed = ["train"] * args.training.do_train + [split] * reads_rows
    columns = {name: find_column(name, sources[name], collator, args.data) for name in dict.fromkeys(needed)}

    def make_stream(split: str, num_skipped: int = 0) -> TextStream:
        open_dataset = functools.partial(open_shard, sources[split], num_skipped, by_files=split == "train")
        tokenize_column = token_rows.column_function(tokenize_fn, columns[split], collator)
        sizes = args.data.shuffle_buffer_size, args.training.seed
        return TextStream(open_dataset, tokenize_column, columns[split], collator, *sizes, name_of(split, args.data))

    rows, size, num_held_out = None, None, 0
    if reads_rows:
        rows, num_texts, size = read_evaluation_rows(make_stream(split), split, args)
        num_held_out = num_texts if split == "train" else 0
    if not args.training.do_train:
        return None, rows, size
    stream = make_stream("train", num_held_out)
    stream.identity = identify(make_stream("train"), num_held_out)
    return stream, rows, size


def name_of(split: str, data_args: arguments.DataArguments) -> str:
    """A split as messages begin: the flag that names it, and what."""
    names = getattr(data_args, f"{split}_file")
    by_name = data_args.dataset_name and not (split == "validation" and names)
    return f"--dataset_name {data_args.dataset_name} ({split})" if by_name else f"--{split}_file {inputs.shown(names)}"


def find_column(split: str, source: text.Source, collator: Collator, data_args: arguments.DataArguments) -> str:
    """The column of a split that rows of tokens are made of, found in its first rows."""
    with told_of_streams(name_of(split, data_args)):
        head = text.first_rows(source, files.NUM_ROWS_TO_LOOK_AT)
    if len(head) == 0:
        cli.fail(f"the {split} data is empty: {name_of(split, data_args)} has no rows")
    return token_rows.source_column(split, head, collator, data_args)


def read_evaluation_rows(
    stream: TextStream, split: str, args: arguments.Arguments
) -> tuple[TokenRows | None, int, TextSize | None]:
    """The first `num_eval_samples` rows of a stream, shared by all processes, and how many texts this one took for them; and
    the size of the texts of all processes.

    Of a training stream of a single text, which cannot be divided, nothing is held out if nothing is evaluated.
    """
    wanted = args.data.num_eval_samples
    logger.info("Reading %d rows of tokens for evaluation", wanted)
    share = math.ceil(wanted / jax.process_count())
    found, num_texts, size = stream.first_rows(share)
    is_one_text = split == "train" and sum(processes.gather_json(num_texts)) == 1
    if is_one_text and not args.training.do_eval:
        logger.warning("The training data is one text: nothing of it is held out for evaluation.")
        return None, 0, None
    counts, rows = processes.gather_json(len(found["input_ids"])), processes.gather_rows(found)
    if sum(counts) == 0:
        cli.fail(f"the {split} data {args.data.reason_for_no_rows(stream.text_column)}")
    if is_one_text:
        cli.fail("the training data has 1 row(s), too few to hold some out; give --validation_file")
    if min(counts) < share and split == "train":
        cli.fail(f"--num_eval_samples {wanted}: all the data gives only {sum(counts)} rows; lower it")
    sizes = processes.gather_json(size)
    is_known = not stream.collator.line_by_line and None not in sizes
    size = TextSize(*map(sum, zip(*sizes, strict=True))) if is_known else None
    return {name: array[:wanted] for name, array in rows.items()}, num_texts, size


def identify(stream: TextStream, num_held_out: int) -> str:
    """What a resumed run must find again: the first texts of all processes, what was held out, the number of processes.

    By the way the first texts show whether there will be labels; that not one gives any is refused.
    """
    examples, carried = iter(stream.open_dataset()), {}
    texts = batch = stream.take(examples, 100)
    num_rows, has_labels = 0, False
    for _ in range(100):
        rows, carried = stream.make_rows(batch, carried)
        num_rows, has_labels = num_rows + len(rows["input_ids"]), token_rows.gives_labels(rows, stream.collator)
        batch = [] if has_labels else stream.take(examples, 100)
        if not batch:
            break
    checksum = zlib.crc32("\0".join(map(str, texts)).encode("utf-8", "surrogatepass"))
    shards = processes.gather_json([checksum, num_held_out, num_rows, has_labels])
    if any(shard[2] for shard in shards) and not any(shard[3] for shard in shards):
        token_rows.refuse_without_labels("train")
    checksum = zlib.crc32(repr([shard[0] for shard in shards]).encode())
    held_out = "+".join(str(shard[1]) for shard in shards)
    return f"{checksum} of the first texts, {held_out} text(s) held out, read by {jax.process_count()} process(es)"
