# SPDX-License-Identifier: Apache-2.0
"""The rows of a run: prepared before it begins, or streamed."""

from typing import NamedTuple

import datasets

from flaxlm import arguments, processes, streams, text, token_rows
from flaxlm.streams import TextStream
from flaxlm.token_rows import Collator, TextSize, TokenizeFn, TokenRows


class Corpus(NamedTuple):
    """What is trained on and what is evaluated; None where this run does not."""

    train: TokenRows | TextStream | None
    validation: TokenRows | None
    identity: str | int | None  # of what is trained on: a resumed run must have the same
    validation_text: TextSize | None = None  # what all the evaluation rows were made of; None where that is not known

    @property
    def num_train_rows(self) -> int | None:
        """None where it is not known, that is with a stream."""
        return None if isinstance(self.train, TextStream) else num_rows(self.train)

    @property
    def num_validation_rows(self) -> int:
        return num_rows(self.validation)


def num_rows(rows: TokenRows | None) -> int:
    return len(rows["input_ids"]) if rows else 0


def prepare(args: arguments.Arguments, tokenize_fn: TokenizeFn, collator: Collator) -> Corpus:
    """Text to rows of tokens. `tokenize_fn` and `collator` are the objective's; the other arguments say which text."""
    if args.data.streaming:
        train, validation, size = streams.open_streams(args, tokenize_fn, collator)
        identity = train and train.identity
    else:
        with processes.main_first():
            splits = text.load_splits(args, collator)
            rows = token_rows.tokenize_and_group(splits, tokenize_fn, collator, args.data, args.model.cache_dir)
        train, validation = rows.get("train"), rows.get("validation")
        size = validation and measure(splits["validation"], validation, args.data, collator)
        train = train and first_rows(train, args.data.max_train_samples)
        identity = train and token_rows.checksum(train)
        if train and not token_rows.gives_labels(train, collator):
            token_rows.refuse_without_labels("train")
    return Corpus(train, validation and first_rows(validation, args.data.max_eval_samples), identity, size)


def measure(
    split: datasets.Dataset, rows: TokenRows, data_args: arguments.DataArguments, collator: Collator
) -> TextSize | None:
    """How large the text of a split is, of which these are all the rows; None where rows need not hold all of a text."""
    if collator.line_by_line:
        return None
    return token_rows.size_of(split, data_args.source_column(split, collator), rows, collator)


def first_rows(rows: TokenRows, limit: int | None) -> TokenRows:
    return {name: array[:limit] for name, array in rows.items()}
