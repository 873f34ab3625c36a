# SPDX-License-Identifier: Apache-2.0
"""The rows of a run: prepared before it begins, or streamed; of one corpus, or of a mixture of several."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import datasets
import numpy as np

from flaxlm import addresses, arguments, cli, mixtures, processes, streams, text, token_rows
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


def prepare(
    args: arguments.Arguments, tokenize_fn: TokenizeFn, collator: Collator, sources: Mapping[str, text.Source] | None = None
) -> Corpus:
    """Text to rows of tokens. `tokenize_fn` and `collator` are the objective's; the other arguments say which text, unless
    `sources` are where it was found.
    """
    if args.data.mixture_file:
        return prepare_mixture(args, tokenize_fn, collator)
    if args.data.streaming:
        train, validation, size = streams.open_streams(args, tokenize_fn, collator, sources)
        identity = train and train.identity
    else:
        with processes.main_first():
            splits = text.load_splits(args, collator, sources)
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
    arguments_of_parts = list(mixtures.arguments_of(parts, args))
    for part, own, sources in zip(parts, arguments_of_parts, find_sources(path, parts, arguments_of_parts), strict=True):
        logger.info("Corpus %s of the mixture:", part.name)
        with mixtures.telling(path, part.name):
            found.append(prepare(own, tokenize_fn, collator, sources))
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


def find_sources(
    path: str, parts: Sequence[mixtures.Part], arguments_of_parts: Sequence[arguments.Arguments]
) -> list[dict[str, text.Source]]:
    """Where the text of each corpus is. What one of them evaluates must not be trained on as text of another."""
    found: list[dict[str, text.Source]] = []
    with processes.main_first():
        for part, own in zip(parts, arguments_of_parts, strict=True):
            with mixtures.telling(path, part.name):
                found.append(text.find_sources(own))
                for earlier, other, sources in zip(parts, arguments_of_parts, found[:-1], strict=False):
                    columns = {own.data.text_column_name, other.data.text_column_name}
                    if None in columns or len(columns) == 1:
                        check_apart(earlier.name, sources, found[-1])
    return found


def check_apart(name: str, sources: Mapping[str, text.Source], others: Mapping[str, text.Source]) -> None:
    """Refuse two corpora with text in common if something is held out of one of them; `name` is that of the first."""
    names, other_names = ({role: text.names_in(source) for role, source in found.items()} for found in (sources, others))
    common = names.get("train", set()) & other_names.get("train", set())
    if common and not ("validation" in sources and "validation" in others):
        files = sorted(addresses.shown(item) for item in common if isinstance(item, str))
        what = f"has {files[0]}, as {name} has" if files else f"is the same data as {name}"
        remedy = "name it once, or give both a validation_file, or one for all as a flag"
        cli.fail(f"{what}: what is held out of one would be trained on in the other; {remedy}")
    for one, other in ((names, other_names), (other_names, names)):
        if one.get("validation", set()) & other.get("train", set()):
            logger.warning("What is evaluated of it, or of %s, is trained on in the other.", name)


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
