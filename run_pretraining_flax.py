#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Pretrain BERT as it was published: masked tokens and next sentence prediction, with JAX and Flax.

The model reads pairs of text; it predicts hidden tokens, and whether the second part follows the first or comes from another
document (Devlin et al. 2019, arXiv:1810.04805). These commands work as pasted, on a laptop too:

    python quickstart/python_docs_corpus.py --output_dir corpus --documents
    python prepare_model_dir.py --model_type bert --train_file corpus/train.txt --vocab_size 4096 \
        --config_overrides "hidden_size=128,num_hidden_layers=2,intermediate_size=512" --output_dir my-bert
    python run_pretraining_flax.py --config_name my-bert --tokenizer_name my-bert --output_dir my-run \
        --train_file corpus/train.txt --validation_file corpus/validation.txt --max_seq_length 128 --max_steps 300 \
        --per_device_train_batch_size 16 --learning_rate 1e-3 --warmup_steps 30 --logging_steps 50

Weights (for Flax and for PyTorch), tokenizer, results and TensorBoard curves are in my-run afterwards. All that decides what
the model learns is in this file, from the flags of the objective to the loop at the end; what keeps it running is in the
package flaxlm. To make an objective of your own, copy this file and change it.
"""

import functools
import itertools
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

try:
    import flaxlm
except ImportError:
    print(
        f"{Path(__file__).name}: error: needs the package flaxlm 0.5.0: install it, from a clone of its repository with"
        " `pip install .`, or copy the folder flaxlm from there beside this script",
        file=sys.stderr,
    )
    raise SystemExit(2) from None
flaxlm.begin("0.5.0", __file__, as_program=__name__ == "__main__")

import datasets
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from flaxlm import (
    arguments,
    batches,
    cli,
    command_line,
    configurations,
    corpus,
    estimates,
    evaluation,
    generation,
    hub,
    logs,
    losses,
    models,
    optimizers,
    processes,
    randomness,
    runs,
    sentences,
    sharding,
    token_ids,
    token_rows,
    tokenization,
    weights,
)

# Shape letters at the end of names, outermost dimension first:
#   A  micro-batches in one update      D  devices of this process      B  rows per device       T  tokens in a row
#   V  vocabulary                       H  hidden size                  M  labelled positions per row; K = B * M of them
# A joined letter is a merged dimension: input_ids_NT holds N = A * D * B rows. Model inputs keep their transformers names.


# ---- Flags of the objective ----------------------------------------------------------------------------------------------


@dataclass
class DataTrainingArguments(arguments.DataArguments):
    """What to train on, how pairs are made of it, and how they are masked."""

    token_depths: ClassVar[tuple[int, ...]] = (2,)
    noise: ClassVar[tuple[str, ...]] = ("mlm_probability", "max_predictions_per_seq")
    limits: ClassVar = {"max_predictions_per_seq": (1, math.inf), "dupe_factor": (1, math.inf)}

    use_auth_token: bool = field(
        default=False, metadata={"help": "Accepted for old commands; the token of `hf auth login` is used anyway."}
    )
    is_already_preprocessed: bool = field(
        default=False,
        metadata={"help": "The data has pairs: input_ids, next_sentence_label (0: follows, 1: random), token_type_ids."},
    )
    is_already_masked: bool = field(
        default=False, metadata={"help": "Its input_ids are masked too; labels has the hidden tokens, and -100 elsewhere."}
    )
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Tokens per row. Unset: what tokenizer and model can take, at most 1024."}
    )
    line_by_line: bool = field(
        default=False, metadata={"help": "Each line of a txt file is a document; unset: blank lines divide documents."}
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad to max_seq_length; unset: to the longest row (a multiple of 16)."}
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens to predict, in (0, 1)."})
    max_predictions_per_seq: int | None = field(
        default=None, metadata={"help": "Most tokens to predict in a row. Unset: mlm_probability of the row's length."}
    )
    dupe_factor: int = field(
        default=1, metadata={"help": "Times that pairs are made of each document, with other borders and partners."}
    )
    sentence_language: str = field(
        default="en",
        metadata={
            "help": "Language of the texts (ISO 639: en, de, no, zh), whose abbreviations end no sentence. A language that"
            " the splitter doesn't know is split like a related one, or like English."
        },
    )

    def check(self, model_args: arguments.ModelArguments) -> None:
        """Refuse impossible settings of the objective before anything is loaded."""
        if not 0 < self.mlm_probability < 1:
            cli.fail(f"--mlm_probability {self.mlm_probability}: must lie between 0 and 1, both excluded")
        sentences.check_language(self.sentence_language)
        if self.is_already_masked and not self.is_already_preprocessed:
            cli.fail("--is_already_masked: needs --is_already_preprocessed too, text has no masks")
        if self.is_already_preprocessed and self.streaming:
            cli.fail("--is_already_preprocessed: not with --streaming, which reads text only")
        if self.is_already_preprocessed and self.dupe_factor > 1:
            cli.fail("--dupe_factor: not with --is_already_preprocessed, the pairs are there already")
        if self.document_attention:
            cli.fail("--document_attention: a row is one pair of texts here, which see each other; drop the flag")
        if self.use_auth_token:
            cli.logger.warning("--use_auth_token has no effect: the token of `hf auth login` is used anyway.")

    def adapt_config(self, config: PretrainedConfig, row_length: int) -> None:
        """Rows must fit the attention."""
        configurations.give_full_attention(config, row_length)

    def text_loader_options(self) -> dict[str, Any]:
        """Documents are divided by blank lines."""
        return {} if self.line_by_line else {"sample_by": "paragraph"}

    def source_column(self, dataset: datasets.Dataset, collator: "Collator") -> str:
        """The column with documents, or with pairs that were made before."""
        if self.is_already_preprocessed:
            check_pairs(dataset, collator)
            return "input_ids"
        if "next_sentence_label" in dataset.column_names:
            cli.fail("the data has a next_sentence_label, so its pairs are made: add --is_already_preprocessed")
        if len(dataset) == 1:  # of a stream these are the first thousand
            remedy = "" if self.line_by_line else ", divided by blank lines (not of spaces) in a txt file (or --line_by_line)"
            cli.fail(f"the data is one document, in which no sentence is from another: give several{remedy}")
        return super().source_column(dataset, collator)

    def reason_for_no_rows(self, text_column: str) -> str:
        """Pairs are made of two sentences or more of one document."""
        if self.is_already_preprocessed:
            return "has no pairs"
        if self.line_by_line:
            remedy = "drop --line_by_line, which makes every line a document, and put blank lines between documents"
        else:
            remedy = "give documents of several sentences; in a txt file blank lines stand between documents, not within"
        return f"has no document of two or more sentences in column {text_column}, of which pairs are made: {remedy}"


def check_pairs(dataset: datasets.Dataset, collator: "Collator") -> None:
    """Refuse pairs made elsewhere if columns are missing, or don't fit the model, the tokenizer or the flags."""
    for name in collator.columns.keys() - {"token_type_ids"} - set(dataset.column_names):
        cli.fail(f"--is_already_preprocessed: the data has no column {name}, only {', '.join(dataset.column_names)}")
    for name in collator.columns.keys() & set(dataset.column_names):
        feature = dataset.features[name]
        is_list = isinstance(feature, datasets.List | datasets.LargeList)
        dtype = str(getattr(feature.feature if is_list else feature, "dtype", ""))
        if is_list != (name != "next_sentence_label") or not dtype.startswith(("int", "uint", "bool")):
            wanted = "a whole number" if name == "next_sentence_label" else "a list of whole numbers"
            cli.fail(f"--is_already_preprocessed: column {name} must hold {wanted} in each row")
        if dataset.data.column(name).null_count:
            cli.fail(f"--is_already_preprocessed: column {name} has rows without a value")
    if "token_type_ids" not in dataset.column_names:
        cli.logger.warning("The data has no token_type_ids: both parts of a pair get type 0.")
    if max(dataset["next_sentence_label"][:]) > 1:
        cli.fail("--is_already_preprocessed: next_sentence_label must be 0 (follows), 1 (random) or negative (not known)")
    longest = highest = 0
    for ids, lengths in token_rows.token_chunks(dataset, "input_ids"):
        longest, highest = max(longest, lengths.max(initial=0)), max(highest, ids.max(initial=0))
    if longest > collator.row_length:
        cli.fail(f"--max_seq_length {collator.row_length}: the data has rows of {longest} tokens")
    if highest >= len(collator.is_special_V):
        cli.fail(f"the data has token {highest}, unknown to the tokenizer: use the one that made the data")
    if "labels" not in collator.columns:
        if "labels" in dataset.column_names:
            cli.logger.warning(
                "The data has labels, which have no effect without --is_already_masked: its rows are masked here."
            )
        return
    most, limit = 0, collator.num_predictions(longest)
    for labels, lengths in token_rows.token_chunks(dataset, "labels"):
        row = np.repeat(np.arange(len(lengths)), lengths)
        most = max(most, np.bincount(row[labels >= 0], minlength=1).max())
    if most > limit:
        cli.fail(f"--max_predictions_per_seq: rows have up to {most} labels, the limit is {limit}; set it to {most}")


# ---- Text to rows of tokens ----------------------------------------------------------------------------------------------


class Document(NamedTuple):
    """A tokenised text of S sentences: all its ids, and where sentences begin and the last one ends, int [S + 1]."""

    ids: np.ndarray
    bounds: np.ndarray


def tokenize_texts(
    batch: Mapping[str, list],
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    columns: Sequence[str],
    row_length: int,
    dupe_factor: int,
    sentence_language: str,
) -> dict[str, list]:
    """Make pairs of the documents of one `Dataset.map` batch, as rows [CLS] A [SEP] B [SEP]; pairs in it stay as they are.

    Documents may be tokenised already, as lists of sentences. What is random follows from the texts, so it is the same in
    every run. Partners are found within the batch.
    """
    if "next_sentence_label" in batch:
        pairs = {"token_type_ids": [[0] * len(ids) for ids in batch["input_ids"]]} | dict(batch)
        pairs["next_sentence_label"] = [[label] for label in batch["next_sentence_label"]]
        return {name: pairs[name] for name in columns}
    if token_ids.are_ids(batch[text_column]):
        documents = take_documents(batch[text_column], tokenizer)
        seed = zlib.crc32(b"".join(array.astype(np.int32).tobytes() for document in documents for array in document))
    else:
        texts = [text for text in batch[text_column] if text and not text.isspace()]
        documents = tokenize_documents(texts, tokenizer, sentence_language)
        seed = zlib.crc32("\n".join(texts).encode("utf-8", "surrogatepass"))
    np_rng = randomness.host_rng(seed, "pairs")
    rows: dict[str, list] = {"input_ids": [], "token_type_ids": [], "next_sentence_label": []}
    begin, end = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    for _ in range(dupe_factor):
        for ids_a, ids_b, is_random in make_pairs(documents, row_length - 3, np_rng):
            rows["input_ids"].append(np.concatenate([begin, ids_a, end, ids_b, end]))
            rows["token_type_ids"].append(np.repeat([0, 1], [len(ids_a) + 2, len(ids_b) + 1]))
            rows["next_sentence_label"].append([is_random])
    return rows


def tokenize_documents(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, language: str) -> list[Document]:
    """Split texts into sentences and tokenise these, without special tokens; what has no tokens is left out."""
    texts_of_sentences: list[str] = []
    sizes = []
    for text in texts:
        starts = sentences.split_sentences(text, language)
        texts_of_sentences += [text[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
        sizes.append(len(starts))
    if not texts_of_sentences:
        return []
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    with tokenization.tokenizer_as_loaded(tokenizer):
        tokens = iter(tokenizer(texts_of_sentences, **options)["input_ids"])
    documents = []
    for size in sizes:
        found = [np.asarray(ids, np.int32) for ids in itertools.islice(tokens, size) if ids]
        if found:
            documents.append(Document(np.concatenate(found), np.cumsum([0, *map(len, found)])))
    return documents


def take_documents(lists: Sequence[list[list[int]] | None], tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """Documents whose sentences are tokenised already, without the tokens that mark borders: pairs have their own."""
    borders = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    documents = []
    for sentence_lists in lists:
        known = token_ids.known_ids(sentence_lists or [], tokenizer)
        found = [np.array(ids, np.int32) for ids in ([i for i in ids if i not in borders] for ids in known) if ids]
        if found:
            documents.append(Document(np.concatenate(found), np.cumsum([0, *map(len, found)])))
    return documents


SHARE_OF_SHORT_PAIRS = 0.1  # as BERT will meet short texts in use


def make_pairs(
    documents: Sequence[Document], num_tokens: int, np_rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Cut documents into pairs (A, B, is_random) of at most `num_tokens` (Devlin et al. 2019, section A.2).

    Sentences are collected until they fill a row, at least two, and divided between two of them. In half of the pairs the
    second part goes back, and B is as much from another document instead. A sentence that is left alone at the end makes no
    pair: it could only be a random one, so that its length would tell the label.
    """
    sizes = [len(document.bounds) - 1 for document in documents]
    first_of_document = np.cumsum([0, *sizes])  # the number of its first sentence among all
    for index, (ids, bounds) in enumerate(documents):
        first = 0
        while first + 2 <= sizes[index]:
            is_short = np_rng.random() < SHARE_OF_SHORT_PAIRS
            target = np_rng.integers(2, num_tokens, endpoint=True) if is_short else num_tokens
            last = end_of_part(bounds, first, target, fewest=2)
            border = np_rng.integers(first + 1, last)
            ids_a, ids_b = ids[bounds[first] : bounds[border]], ids[bounds[border] : bounds[last]]
            is_random = len(documents) > 1 and np_rng.random() < 0.5  # a batch of one happens where the data ends
            if is_random:
                sentence = np_rng.integers(first_of_document[-1] - sizes[index])
                sentence += sizes[index] * (sentence >= first_of_document[index])  # any but those of this document
                other = np.searchsorted(first_of_document, sentence, side="right") - 1
                ids_b = part_of(documents[other], sentence - first_of_document[other], len(ids_b))
            yield *truncate_pair(ids_a, ids_b, num_tokens, np_rng), int(is_random)
            first = border if is_random else last


def end_of_part(bounds: np.ndarray, first: int, num_tokens: int, fewest: int) -> int:
    """Behind which sentence there are `num_tokens` since the beginning of sentence `first`, if the document has so many."""
    return min(max(int(np.searchsorted(bounds, bounds[first] + num_tokens)), first + fewest), len(bounds) - 1)


def part_of(document: Document, first: int, num_tokens: int) -> np.ndarray:
    """Sentences that hold `num_tokens`, from sentence `first` on, or from an earlier one if too little is left there."""
    ids, bounds = document
    first = max(min(first, int(np.searchsorted(bounds, bounds[-1] - num_tokens, side="right")) - 1), 0)
    return ids[bounds[first] : bounds[end_of_part(bounds, first, num_tokens, fewest=1)]]


def truncate_pair(
    ids_a: np.ndarray, ids_b: np.ndarray, num_tokens: int, np_rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the longer part, or both to equal lengths, until they have `num_tokens`: each token from the front or the back."""
    if len(ids_a) + len(ids_b) <= num_tokens:
        return ids_a, ids_b
    length_a = min(len(ids_a), max(num_tokens - len(ids_b), math.ceil(num_tokens / 2)))
    cut = []
    for ids, length in ((ids_a, length_a), (ids_b, num_tokens - length_a)):
        start = np_rng.binomial(len(ids) - length, 0.5)
        cut.append(ids[start : start + length])
    return cut[0], cut[1]


# ---- Rows to batches: noise and labels -----------------------------------------------------------------------------------


class Collator:
    """Hide tokens of pairs: a pure function of rows and uniform random numbers.

    Of the ordinary tokens of a row (not special, not padding) a share `mlm_probability` is drawn, rounded, at least one and
    at most `M`. A drawn token becomes the mask token in 80 % of cases, an ordinary token drawn at random in 10 %, and stays
    in 10 % (Devlin et al. 2019, section 3.1). Labels come as flat positions within each device's rows, `K = B * M` of them,
    so that the model has to score the vocabulary only there; those that a row does not need have weight 0.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
        data_args: DataTrainingArguments,
        max_seq_length: int,
    ):
        for name in ("cls_token", "sep_token", "mask_token", "pad_token"):
            if getattr(tokenizer, name) is None:
                cli.fail(f"--tokenizer_name: has no {name}; use a tokenizer made for BERT, prepare_model_dir.py trains one")
        if max_seq_length < 5:
            cli.fail(f"--max_seq_length {max_seq_length}: must be at least 5, two tokens and three that mark borders")
        # Rows of tokens: their columns with what fills them up, their length, and how text becomes tokens.
        self.columns = {"input_ids": tokenizer.pad_token_id, "token_type_ids": 0, "next_sentence_label": 0}
        self.columns |= {"labels": -100} if data_args.is_already_masked else {}
        self.row_length, self.line_by_line = max_seq_length, True
        self.pad_to = max_seq_length if data_args.pad_to_max_length else None
        self.tokenize_options = {
            "columns": list(self.columns),
            "row_length": max_seq_length,
            "dupe_factor": data_args.dupe_factor,
            "sentence_language": data_args.sentence_language,
        }
        self.draws_per_row = 2 * max_seq_length  # uniform numbers that __call__ needs for a row

        ids = np.array(sorted(tokenizer.get_vocab().values()), np.int32)
        self.ordinary_ids = np.setdiff1d(ids, tokenizer.all_special_ids)
        self.is_special_V = np.zeros(ids[-1] + 1, bool)
        self.is_special_V[[i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id]] = True
        self.pad_token_id = tokenizer.pad_token_id
        self.mask_token_id = tokenizer.mask_token_id
        self.mlm_probability = data_args.mlm_probability
        self.max_predictions_per_seq = data_args.max_predictions_per_seq

    def num_predictions(self, row_length: int) -> int:
        """The most labels, M, that rows of so many tokens have."""
        return min(row_length, self.max_predictions_per_seq or math.ceil(row_length * self.mlm_probability))

    def __call__(
        self, rows: Mapping[str, np.ndarray], uniforms_NR: np.ndarray, is_real_N: np.ndarray, num_groups: int
    ) -> dict[str, np.ndarray]:
        """Collate N rows for `num_groups` equal groups (devices x micro-batches) of B = N / num_groups rows.

        Args:
            rows: `input_ids`, `token_type_ids` int [N, T]; `next_sentence_label` [N, any], of which the first counts;
                and `labels` [N, T], -100 at most places, if rows are masked already.
            uniforms_NR: float64 [N, draws_per_row] in [0, 1), the only source of randomness: half of them choose tokens to
                predict, the other half what the model reads there.
            is_real_N: bool [N]; rows that only fill up a batch are False and get no label.

        Returns:
            input_ids, attention_mask, token_type_ids int32 [N, T]; label_positions, labels int32 and label_weights float32
            [N * M]; next_sentence_labels int32 and next_sentence_weights float32 [N].
        """
        input_ids_NT = rows["input_ids"].astype(np.int32)
        N, T = input_ids_NT.shape
        M = self.num_predictions(T)
        attention_mask_NT = (input_ids_NT != self.pad_token_id).astype(np.int32)
        draws_NT, chance_NM = uniforms_NR[:, :T], uniforms_NR[:, self.draws_per_row // 2 :][:, :M]
        if "labels" in rows:
            labels_NT, is_label_NT = rows["labels"], (rows["labels"] >= 0) & is_real_N[:, None]
            draws_NT, num_labels_N = np.zeros((N, T)), is_label_NT.sum(axis=1)
        else:
            labels_NT, is_label_NT = input_ids_NT, ~self.is_special_V[input_ids_NT] & is_real_N[:, None]
            num_labels_N = np.clip(np.rint(is_label_NT.sum(axis=1) * self.mlm_probability), 1, M)
            num_labels_N = np.minimum(num_labels_N, is_label_NT.sum(axis=1))
        # The lowest numbers among the tokens that may be drawn are drawn.
        positions_NM = np.argsort(np.where(is_label_NT, draws_NT, 2.0), axis=1, kind="stable")[:, :M]
        is_used_NM = np.arange(M) < num_labels_N[:, None]
        labels_NM = np.where(is_used_NM, np.take_along_axis(labels_NT, positions_NM, axis=1), 0)
        if "labels" not in rows:
            self.hide(input_ids_NT, positions_NM, is_used_NM, chance_NM)
        first_of_row_N = np.arange(N) % (N // num_groups) * T
        return {
            "input_ids": input_ids_NT,
            "attention_mask": attention_mask_NT,
            "token_type_ids": rows["token_type_ids"].astype(np.int32),
            "label_positions": (positions_NM + first_of_row_N[:, None]).astype(np.int32).reshape(-1),
            "labels": labels_NM.astype(np.int32).reshape(-1),
            "label_weights": is_used_NM.astype(np.float32).reshape(-1),
            "next_sentence_labels": np.maximum(rows["next_sentence_label"][:, 0], 0).astype(np.int32),
            "next_sentence_weights": (is_real_N & (rows["next_sentence_label"][:, 0] >= 0)).astype(np.float32),
        }

    def hide(self, input_ids_NT: np.ndarray, positions_NM: np.ndarray, is_used_NM: np.ndarray, chance_NM: np.ndarray) -> None:
        """Put the mask token, a random one, or the old one at the positions in use, as uniform random numbers say."""
        old_NM = np.take_along_axis(input_ids_NT, positions_NM, axis=1)
        index_NM = (np.clip((chance_NM - 0.8) / 0.1, 0, 1 - 1e-9) * len(self.ordinary_ids)).astype(np.int64)
        new_NM = np.where(chance_NM < 0.8, self.mask_token_id, self.ordinary_ids[index_NM])
        np.put_along_axis(input_ids_NT, positions_NM, np.where(is_used_NM & (chance_NM < 0.9), new_NM, old_NM), axis=1)


# ---- Loss ----------------------------------------------------------------------------------------------------------------


MODELS = models.SENTENCE_PAIRS


def loss_fn(
    params,
    batch: Mapping[str, jax.Array],
    model: nn.Module,
    rngs: Mapping[str, jax.Array] | None = None,
    z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sums of the cross-entropies of masked tokens and of next sentences in one device's rows, in float32.

    Returns:
        The sum over masked tokens, and {"weight": their number, "correct": those whose label scores highest, and the three
        of the same for next sentences}; all scalars, to be summed over micro-batches and devices before the division. With
        `z_loss` the sum is the two parts that stand beside the others: "loss", the cross-entropies, and "z_loss".
    """
    inputs = batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]
    hidden_BTH = model.apply({"params": params}, *inputs, rngs=rngs)
    labels = batch["label_positions"], batch["labels"], batch["label_weights"]
    loss, sums = losses.labelled_cross_entropy(model, params, hidden_BTH, *labels, z_loss)
    logits_B2 = model.apply({"params": params}, hidden_BTH, method="next_sentence_scores")
    weights_B = batch["next_sentence_weights"]
    next_loss, next_sums = losses.cross_entropy(logits_B2, batch["next_sentence_labels"], weights_B)
    return loss, {
        "weight": batch["label_weights"].sum(),
        **sums,
        "next_sentence_loss": next_loss,
        "next_sentence_weight": weights_B.sum(),
        "next_sentence_correct": next_sums["correct"],
    }


def eval_metrics(totals: Mapping[str, float]) -> dict[str, float]:
    """Evaluation results from the sums over all labels: losses (nats per label), accuracies, perplexity of masked tokens."""
    num_tokens, num_pairs = max(totals["weight"], 1), max(totals["next_sentence_weight"], 1)
    masked_lm_loss, next_sentence_loss = totals["loss"] / num_tokens, totals["next_sentence_loss"] / num_pairs
    return {
        "eval_loss": masked_lm_loss + next_sentence_loss,
        "eval_masked_lm_loss": masked_lm_loss,
        "eval_next_sentence_loss": next_sentence_loss,
        "eval_accuracy": totals["correct"] / num_tokens,
        "eval_next_sentence_accuracy": totals["next_sentence_correct"] / num_pairs,
        "eval_perplexity": float(np.exp(masked_lm_loss)),
    }


# ---- Steps ---------------------------------------------------------------------------------------------------------------


def sum_gradients(
    params: Any, batch: Mapping[str, jax.Array], step_rng: jax.Array, loss_fn: Callable, z_loss: float = 0.0
) -> tuple[dict[str, jax.Array], Any]:
    """Losses and gradients of [A, ...] micro-batches; runs on each device with its own rows.

    The loss is the mean over all masked tokens plus the mean over all pairs, of all micro-batches and devices: what they are
    divided by is summed first, so every label counts the same however the rows are spread. "stop" is above 0 if any process
    was told to stop, so that all learn it at the same step.
    """
    device_rng = jax.random.fold_in(step_rng, jax.lax.axis_index("data"))
    num_tokens, num_pairs = jax.lax.psum((batch["label_weights"].sum(), batch["next_sentence_weights"].sum()), "data")

    names = ("masked_lm_loss", "next_sentence_loss", "z_loss") if z_loss else ("masked_lm_loss", "next_sentence_loss")

    def micro_batch_loss(params, micro_batch, rngs):
        loss, aux = loss_fn(params, micro_batch, rngs=rngs, z_loss=z_loss)
        masked_lm_loss = loss / jnp.maximum(num_tokens, 1)
        next_sentence_loss = aux["next_sentence_loss"] / jnp.maximum(num_pairs, 1)
        terms = {"masked_lm_loss": masked_lm_loss, "next_sentence_loss": next_sentence_loss}
        if z_loss:  # which is a part of what is differentiated, and told apart
            terms |= {"masked_lm_loss": aux["loss"] / jnp.maximum(num_tokens, 1)}
            terms |= {"z_loss": aux["z_loss"] / jnp.maximum(num_tokens, 1)}
        return masked_lm_loss + next_sentence_loss, terms

    def add_micro_batch(sums, indexed_micro_batch):
        index, micro_batch = indexed_micro_batch
        grad_fn = jax.grad(micro_batch_loss, has_aux=True)
        grads, terms = grad_fn(params, micro_batch, {"dropout": jax.random.fold_in(device_rng, index)})
        return jax.tree.map(jnp.add, sums, (terms, grads)), None

    zeros = {name: jnp.zeros(()) for name in names}, jax.tree.map(jnp.zeros_like, params)
    micro_batches = {name: array for name, array in batch.items() if name != "stop"}
    (losses, grads), _ = jax.lax.scan(add_micro_batch, zeros, (jnp.arange(len(batch["stop"])), micro_batches))
    sums, grads = sharding.sum_over_devices((losses | {"stop": batch["stop"].max()}, grads))
    return sums | {"weight": num_tokens}, grads


def train_step(
    state: sharding.TrainState,
    batch: Mapping[str, jax.Array],
    dropout_rng: jax.Array,
    gradients_fn: Callable,
    optimizer: optax.GradientTransformation,
    learning_rate_fn: optax.Schedule,
) -> tuple[sharding.TrainState, dict[str, jax.Array]]:
    """One update, of whole arrays wherever their parts lie, by the gradients that the devices have summed.

    Metrics: the loss and its parts, the number of masked tokens, gradient norm before clipping, learning rate, stop.
    """
    sums, grads = gradients_fn(state.params, batch, jax.random.fold_in(dropout_rng, state.step))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = {
        "loss": sums["masked_lm_loss"] + sums["next_sentence_loss"],
        **sums,
        "grad_norm": optax.global_norm(grads),
        "learning_rate": learning_rate_fn(state.step),
    }
    return sharding.TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics


def eval_step(params, batch: Mapping[str, jax.Array], loss_fn: Callable) -> dict[str, jax.Array]:
    """Sums over the labels of one batch: loss, weight, correct; and "stop", above 0 if a process was told to stop."""
    rows = {name: array for name, array in batch.items() if name != "stop"}
    loss, aux = loss_fn(params, rows)
    return jax.lax.psum({"loss": loss, **aux, "stop": batch["stop"].max()}, "data")


def make_steps(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    learning_rate_fn: optax.Schedule,
    devices: sharding.Devices,
    z_loss: float = 0.0,
) -> tuple[sharding.CompiledStep, sharding.CompiledStep]:
    """Both steps as programs over all devices, p_train_step and p_eval_step, compiled when they are first called.

    `z_loss` is of training only, so that evaluations are comparable.
    """
    sum_fn = functools.partial(sum_gradients, loss_fn=loss_fn, z_loss=z_loss)
    gradients_fn = sharding.on_each_device(sum_fn, devices, sharding.PER_MICRO_BATCH, gives_gradients=True)
    step_fn = functools.partial(train_step, gradients_fn=gradients_fn, optimizer=optimizer, learning_rate_fn=learning_rate_fn)
    eval_fn = sharding.on_each_device(functools.partial(eval_step, loss_fn=loss_fn), devices, sharding.PER_ROW)
    return sharding.CompiledStep("training", step_fn, gives_state=True), sharding.CompiledStep("evaluation", eval_fn)


# ---- Main ----------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train and evaluate as the arguments say (default: the command line); returns the results it also writes."""
    cli.set_up_logging()
    args = model_args, data_args, training_args = command_line.parse(argv, DataTrainingArguments, MODELS, __doc__)
    cli.logger.info("Arguments other than the defaults: %s", arguments.changed(*args))
    processes.join(training_args)
    uploads = hub.connect(training_args)

    # Text to rows of tokens. With one process nothing here touches a device, so that it can still be forked.
    with processes.main_first():
        config = configurations.load_config(model_args, MODELS)
        tokenizer = tokenization.load_tokenizer(model_args)
    tokenization.match_config_and_tokenizer(config, tokenizer, model_args)
    row_length = tokenization.choose_row_length(data_args, config, tokenizer)
    data_args.adapt_config(config, row_length)
    weights.check(config, args, MODELS)
    collator = Collator(tokenizer, config, data_args, row_length)
    if training_args.compile_for:  # does it fit on a machine that may not be there? Nothing is read or trained for that
        return estimates.report(args, estimates.Script(config, collator, MODELS, loss_fn, make_steps))
    tokenize_fn = functools.partial(tokenize_texts, tokenizer=tokenizer, **collator.tokenize_options)
    data = corpus.prepare(args, tokenize_fn, collator)

    plan = batches.make_plan(training_args, data.num_train_rows, collator.row_length)
    devices = sharding.all_devices(training_args.fsdp)
    model = models.build(config, args, MODELS)
    params = weights.load(model, args, devices)
    logs.log_plan(plan, data, collator.row_length, params)
    logs.advise_on_cpu(model_args.dtype)
    learning_rate_fn = optimizers.make_learning_rate(training_args, plan)
    optimizer = optimizers.make_optimizer(training_args, learning_rate_fn)
    model_loss_fn = functools.partial(loss_fn, model=model)
    p_train_step, p_eval_step = make_steps(model_loss_fn, optimizer, learning_rate_fn, devices, training_args.z_loss)
    evaluate = evaluation.Evaluator(data, collator, plan, training_args.seed, devices.mesh, p_eval_step, eval_metrics)
    write_samples = generation.Writer(args, model, tokenizer, collator.row_length, devices)

    with runs.Run(__file__, args, data, plan, model, tokenizer, uploads) as run:
        if training_args.do_train:
            state = run.start(sharding.create_train_state(params, optimizer, devices))
            run.measure(estimates.Script(config, collator, MODELS, loss_fn, make_steps))
            host_batches = batches.train_batches(data.train, collator, plan, training_args.seed, run.step, run.position)
            dropout_rng = randomness.device_rng(training_args.seed, "dropout", impl="rbg")
            if training_args.do_eval:
                run.check_metrics(evaluate.try_out(state.params, run.stop))
                write_samples.try_out(state.params)
            with run.training():
                if run.is_due("eval"):  # a resumed run may have been stopped in an evaluation
                    run.report(evaluate(state.params, run.stop), write_samples(state.params, run.step))
                for batch in batches.put_on_devices(host_batches, devices.mesh, sharding.PER_MICRO_BATCH, run.stop):
                    if run.is_over():  # by early stopping
                        break
                    p_train_step.compile(state, batch.arrays, dropout_rng)
                    run.begin_step()
                    state, metrics = p_train_step(state, batch.arrays, dropout_rng)
                    run.end_step(state, metrics, batch)
                    if run.is_due("eval"):
                        run.report(evaluate(state.params, run.stop), write_samples(state.params, run.step))
                    if run.is_due("save"):
                        run.save()
            params = state.params
        if run.is_due("last eval"):
            run.report(evaluate(params, run.stop), write_samples(params, run.step))
        run.finish()
    return run.results


if __name__ == "__main__":
    cli.end(cli.run(main, __file__))
