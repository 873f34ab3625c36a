# SPDX-License-Identifier: Apache-2.0
"""The rows of a run: prepared before it begins, or streamed; of one corpus, or of a mixture of several."""

import dataclasses
import logging
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import datasets
import numpy as np

from flaxlm import arguments, mixtures, processes, streams, text, token_rows
from flaxlm.streams import TextStream
from flaxlm.token_rows import Collator, TextSize, TokenizeFn, TokenRows

logger = logging.getLogger(__name__)


class Mixture(NamedTuple):
    """Corpora that are trained on together, each with its share of all rows; either all are streamed or none is."""

    path: str  # of the file that names them
    parts: Sequence[mixtures.Part]
    corpora: Sequence[TokenRows] | Sequence[TextStream]

    @property
    def names(self) -> list[str]:
        return [part.name for part in self.parts]

    @property
    def shares(self) -> list[Fraction]:
        return [part.share for part in self.parts]

    @property
    def is_stream(self) -> bool:
        return isinstance(self.corpora[0], TextStream)

    @property
    def sizes(self) -> list[int]:
        """Rows of each corpus that is not streamed."""
        return [num_rows(rows) for rows in self.corpora]


class Corpus(NamedTuple):
    """What is trained on and what is evaluated; None where this run does not."""

    train: TokenRows | TextStream | Mixture | None
    validation: TokenRows | None
    identity: str | int | None  # of what is trained on: a resumed run must have the same
    validation_text: TextSize | None = None  # what all the evaluation rows were made of; None where that is not known

    @property
    def num_train_rows(self) -> int | None:
        """None where it is not known, that is with a stream."""
        if isinstance(self.train, Mixture):
            return None if self.train.is_stream else sum(self.train.sizes)
        return None if isinstance(self.train, TextStream) else num_rows(self.train)

    @property
    def mixture(self) -> Mixture | None:
        return self.train if isinstance(self.train, Mixture) else None

    @property
    def num_validation_rows(self) -> int:
        return num_rows(self.validation)


def num_rows(rows: TokenRows | None) -> int:
    return len(rows["input_ids"]) if rows else 0


def prepare(args: arguments.Arguments, tokenize_fn: TokenizeFn, collator: Collator) -> Corpus:
    """Text to rows of tokens. `tokenize_fn` and `collator` are the objective's; the other arguments say which text."""
    if args.data.mixture_file:
        return prepare_mixture(args, tokenize_fn, collator)
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


def prepare_mixture(args: arguments.Arguments, tokenize_fn: TokenizeFn, collator: Collator) -> Corpus:
    """The corpora of --mixture_file, each as if it were the only one; what is evaluated of them is evaluated together."""
    path, found = args.data.mixture_file, []
    parts = mixtures.read(path)
    for part, own in zip(parts, mixtures.arguments_of(parts, args), strict=True):
        logger.info("Corpus %s of the mixture:", part.name)
        with mixtures.telling(path, part.name):
            found.append(prepare(own, tokenize_fn, collator))
    if args.data.validation_file and args.training.do_eval:
        found.append(prepare(of_validation_file(args), tokenize_fn, collator))
    evaluated = [corpus for corpus in found if corpus.validation]
    joined = join_rows([corpus.validation for corpus in evaluated], collator, args) if evaluated else None
    size = size_of_rows(evaluated, collator)
    if not args.training.do_train:
        return Corpus(None, joined, None, size)
    corpora = found[: len(parts)]
    identity = " + ".join(f"{part.share} {part.name} ({corpus.identity})" for part, corpus in zip(parts, corpora, strict=True))
    mixture = Mixture(path, parts, [corpus.train for corpus in corpora])
    return Corpus(mixture, joined, f"{identity} of --mixture_file", size)


def size_of_rows(corpora: Sequence[Corpus], collator: Collator) -> TextSize | None:
    """How large the text is that the evaluation rows of several corpora were made of; None if that of one is not known."""
    if not corpora or any(corpus.validation_text is None for corpus in corpora):
        return None
    tokens = [token_rows.count_tokens(corpus.validation, collator) for corpus in corpora]
    sizes = [corpus.validation_text for corpus in corpora]
    num_bytes = sum(n * size.num_bytes / size.num_tokens for n, size in zip(tokens, sizes, strict=True))
    return TextSize(sum(tokens), round(num_bytes))


def of_validation_file(args: arguments.Arguments) -> arguments.Arguments:
    """The arguments of a run that evaluates --validation_file."""
    data, training = dataclasses.replace(args.data, mixture_file=None), dataclasses.replace(args.training, do_train=False)
    return args._replace(data=data, training=training)


def join_rows(parts: Sequence[TokenRows], collator: Collator, args: arguments.Arguments) -> TokenRows:
    """Rows of several corpora one after the other; of prepared text not in memory, as they were before."""
    if len(parts) == 1:
        return parts[0]
    joined, borders = {}, np.cumsum([0, *map(num_rows, parts)])
    for name, padding in collator.columns.items():
        shape = (int(borders[-1]), max(part[name].shape[1] for part in parts))
        joined[name] = np.empty(shape, np.int32) if args.data.streaming else token_rows.disk_array(shape, args.model.cache_dir)
        joined[name][:] = padding
        for first, part in zip(borders, parts, strict=False):
            joined[name][first : first + num_rows(part), : part[name].shape[1]] = part[name]
    return joined
