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

Weights (for Flax and for PyTorch), tokenizer, results and TensorBoard curves are in my-run afterwards. README.md says what
each flag does and which results were reached; the part to change for an objective of your own is fenced off below.
"""

import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import glob
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import os
import platform
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn

import datasets
import datasets.distributed
import flax.linen as nn
import huggingface_hub
import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import orbax.checkpoint as ocp
import requests
import sentencex
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, path_aware_map
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary import Writer
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import (
    CONFIG_MAPPING,
    FLAX_MODEL_FOR_PRETRAINING_MAPPING,
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BigBirdConfig,
    FlaxAutoModelForPreTraining,
    FlaxPreTrainedModel,
    HfArgumentParser,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.gpt2.modeling_flax_gpt2 import FlaxConv1D

logger = logging.getLogger(__name__)

# Shape letters at the end of names, outermost dimension first:
#   A  micro-batches in one update      D  devices of this process      B  rows per device       T  tokens in a row
#   V  vocabulary                       H  hidden size                  M  labelled positions per row; K = B * M of them
# A joined letter is a merged dimension: input_ids_NT holds N = A * D * B rows. Model inputs keep their transformers names.
#
# In this file: arguments; the objective, which is yours to edit; the steps, and how layers are computed in them. What follows
# is scaffolding in the order of main(), which stands at the end and reads as a table of contents.


# ---- Arguments -----------------------------------------------------------------------------------------------------------


@dataclass
class TrainingArguments:
    """How to train: batch sizes, steps, optimizer, and what to write when. A step is one optimizer update."""

    output_dir: str = field(metadata={"help": "Directory for weights, tokenizer, results and TensorBoard events."})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Train into a non-empty output_dir; its old events and results are removed, weights replaced."},
    )
    do_train: bool = field(default=False, metadata={"help": "Train. With neither do_train nor do_eval, both are done."})
    do_eval: bool = field(default=False, metadata={"help": "Evaluate, every eval_steps and at the end. Alone: only that."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Training rows per device and step."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Evaluation rows per device and step."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate; typically 1e-4 to 1e-3 from scratch."})
    weight_decay: float = field(
        default=0.0, metadata={"help": "Decoupled decay, times the learning rate, of matrices; not of biases and norms."}
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW: decay of the first moment, in [0, 1)."})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW: decay of the second moment, in [0, 1)."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW: added to the denominator."})
    adafactor: bool = field(default=False, metadata={"help": "Adafactor instead of AdamW: far less optimizer memory."})
    lamb: bool = field(
        default=False, metadata={"help": "LAMB instead of AdamW, for very large batches; flags of AdamW hold for it too."}
    )
    lamb_no_bias_correction: bool = field(default=False, metadata={"help": "LAMB without Adam's bias correction."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients to this global norm; 0 does not clip."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the training rows; fractions count."})
    max_steps: int = field(
        default=-1,
        metadata={"aliases": ["--num_train_steps"], "help": "Number of steps; if positive, it overrides num_train_epochs."},
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = field(
        default="linear", metadata={"help": "Learning rate after the warmup: down to zero in a line or a cosine, or kept."}
    )
    groupbert_schedule: bool = field(
        default=False, metadata={"help": "Warmup along a square root instead of a line, then a line down to 1e-7 instead of 0."}
    )
    warmup_steps: int = field(default=0, metadata={"help": "Steps in which the learning rate grows linearly from zero."})
    warmup_ratio: float = field(default=0.0, metadata={"help": "Warmup as a share of all steps, if warmup_steps is 0."})
    logging_steps: int = field(default=500, metadata={"help": "Steps between two lines of the training log."})
    logging_first_step: bool = field(default=False, metadata={"help": "Log the first step too."})
    save_steps: int = field(default=500, metadata={"help": "Steps between two saves; the end is always saved."})
    save_safetensors: bool = field(
        default=True, metadata={"help": "Write model.safetensors in PyTorch layout beside flax_model.msgpack."}
    )
    eval_steps: int | None = field(default=None, metadata={"help": "Steps between two evaluations; unset: only at the end."})
    seed: int = field(default=42, metadata={"help": "Everything random follows from it."})
    attention_implementation: Literal["auto", "eager", "chunked", "xla", "cudnn"] = field(
        default="auto",
        metadata={
            "help": "eager: as transformers' classes; chunked: exact, saves memory, fast on CPUs; xla, cudnn: "
            "jax.nn.dot_product_attention, without attention dropout. auto: chunked on a CPU, else eager."
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: less memory, about 30%% more time."}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Micro-batches in one update: multiplies the batch, not the memory."}
    )
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep, the newest ones."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": "latest",
            "help": "Go on from a checkpoint as if never stopped: from the newest in output_dir (bare flag), or from a path.",
        },
    )
    multihost: bool = field(
        default=False, metadata={"help": "Train with several processes, which find each other (TPU pod, SLURM, Open MPI)."}
    )
    coordinator_address: str | None = field(
        default=None, metadata={"help": "host:port of process 0, where processes can't find each other; implies multihost."}
    )
    num_processes: int | None = field(default=None, metadata={"help": "Number of processes, with coordinator_address."})
    process_id: int | None = field(default=None, metadata={"help": "Number of this process, from 0."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload output_dir to the Hub, in the background."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository. Unset: the name of output_dir."})
    hub_token: str | None = field(
        default=None, repr=False, metadata={"help": "Token to write with. Unset: the one of `hf auth login` or HF_TOKEN."}
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Create the repository as a private one."})
    hub_strategy: Literal["end", "every_save", "checkpoint"] = field(
        default="every_save",
        metadata={"help": "Upload at the end, at every save too, or with the newest training state as last-checkpoint."},
    )

    def pauses_after(self, step: int) -> bool:
        """Is an evaluation or a save due after this step?"""
        return step % self.save_steps == 0 or bool(self.do_eval and self.eval_steps and step % self.eval_steps == 0)


@dataclass
class ModelArguments:
    """Which model and tokenizer to start from."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Weights to start from, Flax or PyTorch layout (Hub id or directory). Unset: fresh."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Architecture with its default configuration, if no configuration is named."}
    )
    config_name: str | None = field(default=None, metadata={"help": "Configuration (Hub id or directory)."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to the configuration of a fresh model: key=value,key=value."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer (Hub id or directory). Unset: the one of model_name_or_path."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and tokenised data are kept."})
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the Hub repositories of configuration, tokenizer, weights."}
    )
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Use the Rust tokenizer."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={"help": "Precision of activations; weights and loss stay float32. float16 is refused, see the error."},
    )
    token: str | None = field(
        default=None, repr=False, metadata={"help": "Hub token for private models and data; never logged or written."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with a Hub repository."})


@dataclass
class DataArguments:
    """Which text to train on. An objective adds its own flags, and may override the methods."""

    row_length_flag: ClassVar[str] = "max_seq_length"  # the flag that sets the tokens per row
    cuts_row_length: ClassVar[bool] = False  # what happens if it is more than the model can take: cut or refused

    dataset_name: str | None = field(
        default=None,
        metadata={
            "aliases": ["--dataset_path"],
            "help": "Hub id, or a local directory (data files, or written by save_to_disk).",
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    data_dir: str | None = field(default=None, metadata={"help": "Directory within the dataset to take data files from."})
    train_file: str | None = field(
        default=None, metadata={"help": "Training text: txt, csv, json, jsonl or parquet, also .gz, .bz2 or .xz."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Evaluation text, formats as for train_file."})
    text_column_name: str | None = field(
        default=None, metadata={"help": "Column with the text. Unset: 'text' if there is one, else the first text column."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenise again even if a cached result exists."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Percentage of rows drawn as validation set if the data has none."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Keep only the first n training rows of tokens."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Keep only the first n evaluation rows of tokens."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the data while training instead of preparing it first; needs max_steps."}
    )
    shuffle_buffer_size: int = field(
        default=10_000, metadata={"help": "streaming: texts in a window, whose rows of tokens are shuffled."}
    )
    num_eval_samples: int = field(
        default=50_000, metadata={"help": "streaming: rows of tokens for evaluation, from the beginning, never trained on."}
    )

    def check(self, model_args: ModelArguments) -> None:
        """Refuse impossible settings of the objective before anything is loaded."""

    def adapt_config(self, config: PretrainedConfig, row_length: int) -> None:
        """Set what the objective, or its rows of that many tokens, need of the model's configuration."""

    def text_loader_options(self) -> dict[str, Any]:
        """Options for reading txt files."""
        return {}

    def add_columns(self, dataset: datasets.Dataset, split: str) -> datasets.Dataset:
        """Add columns that the objective reads beside the text."""
        return dataset

    def source_column(self, dataset: datasets.Dataset, collator: "Collator") -> str:
        """The column of which rows of tokens are made; mistakes in the data may be refused here."""
        return find_text_column(dataset, self.text_column_name)

    def reason_for_no_rows(self, text_column: str) -> str:
        """Why all the data makes no row, and what to do; goes on from "the train data"."""
        return f"holds no text in column {text_column}"


# ---- Objective: yours to edit --------------------------------------------------------------------------------------------


@dataclass
class DataTrainingArguments(DataArguments):
    """What to train on, how pairs are made of it, and how they are masked."""

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

    def check(self, model_args: ModelArguments) -> None:
        """Refuse impossible settings of the objective before anything is loaded."""
        if not 0 < self.mlm_probability < 1:
            fail(f"--mlm_probability {self.mlm_probability}: must lie between 0 and 1, both excluded")
        if not re.fullmatch("[a-z]{2,3}", self.sentence_language):  # anything else would silently be split as English
            fail(f"--sentence_language {self.sentence_language}: must be a code of two or three letters: en, de, no, zh")
        if self.is_already_masked and not self.is_already_preprocessed:
            fail("--is_already_masked: needs --is_already_preprocessed too, text has no masks")
        if self.is_already_preprocessed and self.streaming:
            fail("--is_already_preprocessed: not with --streaming, which reads text only")
        if self.is_already_preprocessed and self.dupe_factor > 1:
            fail("--dupe_factor: not with --is_already_preprocessed, the pairs are there already")
        if self.use_auth_token:
            logger.warning("--use_auth_token has no effect: the token of `hf auth login` is used anyway.")

    def adapt_config(self, config: PretrainedConfig, row_length: int) -> None:
        """Rows must fit the attention."""
        fit_sparse_attention(config, row_length, self.pad_to_max_length)

    def text_loader_options(self) -> dict[str, Any]:
        """Documents are divided by blank lines."""
        return {} if self.line_by_line else {"sample_by": "paragraph"}

    def source_column(self, dataset: datasets.Dataset, collator: "Collator") -> str:
        """The column with documents, or with pairs that were made before."""
        if self.is_already_preprocessed:
            check_pairs(dataset, collator)
            return "input_ids"
        if "next_sentence_label" in dataset.column_names:
            fail("the data has a next_sentence_label, so its pairs are made: add --is_already_preprocessed")
        if len(dataset) == 1 and not self.streaming:
            remedy = "" if self.line_by_line else ", divided by blank lines in a txt file (or --line_by_line)"
            fail(f"the data is one document, in which no sentence is from another: give several{remedy}")
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


def fit_sparse_attention(config: PretrainedConfig, row_length: int, is_padded: bool) -> None:
    """BigBird's sparse attention takes whole blocks; rows too short for it get full attention, as PyTorch gives them.

    `is_padded`: are all rows of that length, rather than of the longest text's?
    """
    if config.model_type != "big_bird" or config.attention_type != "block_sparse":
        return
    longest_full = (5 + 2 * config.num_random_blocks) * config.block_size
    if row_length <= longest_full:
        config.attention_type = "original_full"
        logger.info("attention_type=original_full: sparse attention is for rows of more than %d tokens.", longest_full)
    elif row_length % config.block_size:
        fail(f"--max_seq_length {row_length}: sparse attention takes multiples of {config.block_size} tokens")
    elif not is_padded:
        fail(f"--max_seq_length {row_length}: sparse attention takes whole rows; add --pad_to_max_length")


def check_pairs(dataset: datasets.Dataset, collator: "Collator") -> None:
    """Refuse pairs made elsewhere if columns are missing, or don't fit the model, the tokenizer or the flags."""
    for name in collator.columns.keys() - {"token_type_ids"} - set(dataset.column_names):
        fail(f"--is_already_preprocessed: the data has no column {name}, only {', '.join(dataset.column_names)}")
    if "token_type_ids" not in dataset.column_names:
        logger.warning("The data has no token_type_ids: both parts of a pair get type 0.")
    if max(dataset["next_sentence_label"][:]) not in (0, 1):
        fail("--is_already_preprocessed: next_sentence_label must be 0 (follows), 1 (random) or negative (not known)")
    longest = highest = 0
    for ids, lengths in token_chunks(dataset, "input_ids"):
        longest, highest = max(longest, lengths.max(initial=0)), max(highest, ids.max(initial=0))
    if longest > collator.row_length:
        fail(f"--max_seq_length {collator.row_length}: the data has rows of {longest} tokens")
    if highest >= len(collator.is_special_V):
        fail(f"the data has token {highest}, unknown to the tokenizer: use the one that made the data")
    if "labels" not in collator.columns:
        if "labels" in dataset.column_names:
            logger.warning("The data has labels, which have no effect without --is_already_masked: its rows are masked here.")
        return
    most, limit = 0, collator.num_predictions(longest)
    for labels, lengths in token_chunks(dataset, "labels"):
        row = np.repeat(np.arange(len(lengths)), lengths)
        most = max(most, np.bincount(row[labels >= 0], minlength=1).max())
    if most > limit:
        fail(f"--max_predictions_per_seq: rows have up to {most} labels, the limit is {limit}; set it to {most}")


# sentencex 1.0.32 panics at "plan A\u00a0. So": it takes any white space for one byte. One for one, offsets stay.
WIDE_SPACE = re.compile(r"[^\S\x00-\x7f]")
# Its time grows with the square of the length where no spaces are (Chinese), so it gets so many characters at once, and
# some more to look ahead.
SPLITTER_WINDOW, SPLITTER_LOOKAHEAD = 4096, 100


def split_sentences(text: str, language: str) -> list[int]:
    """Find where the sentences of a text start: character offsets, ascending, the first one 0.

    A sentence reaches to the start of the next: white space between two belongs to the first, so nothing is lost. An empty
    line ends a sentence; a single line break does not, since text may be wrapped (but the splitter knows list items).
    """
    plain = text if text.isascii() else WIDE_SPACE.sub(" ", text)
    starts, latest, position = [0], len(plain) - len(plain.lstrip()), 0
    while position < len(plain):
        end = position + SPLITTER_WINDOW
        for boundary in sentencex.get_sentence_boundaries(language, plain[position : end + SPLITTER_LOOKAHEAD]):
            visible = boundary["text"].lstrip()
            start = position + boundary["end_index"] - len(visible)
            if visible and boundary["start_index"] > 0 and latest < start < end:
                starts.append(start)
                latest = start
        position = latest if position < latest and end < len(plain) else end  # a cut sentence again, from its start
    return starts


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

    What is random follows from the texts, so it is the same in every run. Partners are found within the batch.
    """
    if "next_sentence_label" in batch:
        pairs = {"token_type_ids": [[0] * len(ids) for ids in batch["input_ids"]]} | dict(batch)
        pairs["next_sentence_label"] = [[label] for label in batch["next_sentence_label"]]
        return {name: pairs[name] for name in columns}
    texts = [text for text in batch[text_column] if text and not text.isspace()]
    documents = tokenize_documents(texts, tokenizer, sentence_language)
    np_rng = host_rng(zlib.crc32("\n".join(texts).encode("utf-8", "surrogatepass")), "pairs")
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
    sentences: list[str] = []
    sizes = []
    for text in texts:
        starts = split_sentences(text, language)
        sentences += [text[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
        sizes.append(len(starts))
    if not sentences:
        return []
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    tokens = iter(tokenizer(sentences, **options)["input_ids"])
    documents = []
    for size in sizes:
        found = [np.asarray(ids, np.int32) for ids in itertools.islice(tokens, size) if ids]
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
                fail(f"--tokenizer_name: has no {name}; use a tokenizer made for BERT, prepare_model_dir.py trains one")
        if max_seq_length < 5:
            fail(f"--max_seq_length {max_seq_length}: must be at least 5, two tokens and three that mark borders")
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


MODEL_CLASS = FlaxAutoModelForPreTraining
FLAX_MODELS = {config_class: FLAX_MODEL_FOR_PRETRAINING_MAPPING[config_class] for config_class in (BertConfig, BigBirdConfig)}


# The module that turns hidden states into scores of the vocabulary, by the name it has in the Flax classes.
VOCABULARY_HEADS = ("lm_head", "predictions", "vocab_projector", "generator_lm_head")


def labelled_positions_only(positions_K: jax.Array):
    """Within this context a model's vocabulary head sees only the hidden states at flat positions into B * T.

    The scores then are [1, K, V] instead of [B, T, V]. No model class is edited: flax calls the interceptor for every module.
    """

    def interceptor(next_fun, args, kwargs, context):
        if context.module.name in VOCABULARY_HEADS and context.method_name == "__call__":
            hidden_BTH = args[0]
            hidden_1KH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])[positions_K][None]
            return vocabulary_scores(*context.module.unbind(), hidden_1KH, *args[1:], **kwargs)
        return next_fun(*args, **kwargs)

    return nn.intercept_methods(interceptor)


def loss_fn(
    params, batch: Mapping[str, jax.Array], dropout_rng: jax.Array, model: FlaxPreTrainedModel, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sums of the cross-entropies of masked tokens and of next sentences in one device's rows, in float32.

    Returns:
        The sum over masked tokens, and {"weight": their number, "correct": those whose label scores highest, and the three
        of the same for next sentences}; all scalars, to be summed over micro-batches and devices before the division.
    """
    with labelled_positions_only(batch["label_positions"]):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        if model.config.model_type == "big_bird" and train:
            inputs["indices_rng"] = jax.random.fold_in(dropout_rng, 1)  # for the blocks that its sparse attention draws
        logits_1KV, logits_B2 = model(**inputs, params=params, dropout_rng=dropout_rng, train=train)[:2]
    loss, correct = weighted_cross_entropy(logits_1KV[0], batch["labels"], batch["label_weights"])
    weights_B = batch["next_sentence_weights"]
    next_loss, next_correct = weighted_cross_entropy(logits_B2, batch["next_sentence_labels"], weights_B)
    return loss, {
        "weight": batch["label_weights"].sum(),
        "correct": correct,
        "next_sentence_loss": next_loss,
        "next_sentence_weight": weights_B.sum(),
        "next_sentence_correct": next_correct,
    }


def weighted_cross_entropy(logits_NV: jax.Array, labels_N: jax.Array, weights_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of the cross-entropies, in float32, and of how many labels score highest."""
    losses_N = optax.softmax_cross_entropy_with_integer_labels(logits_NV.astype(jnp.float32), labels_N)
    return (losses_N * weights_N).sum(), ((logits_NV.argmax(-1) == labels_N) * weights_N).sum()


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


class TrainState(NamedTuple):
    """What an update changes; the same on every device. `step` counts completed updates (int32 scalar)."""

    step: jax.Array
    params: Any
    opt_state: Any


def create_train_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first update; it takes over the buffers of `params`, which training donates."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train_step(
    state: TrainState,
    batch: Mapping[str, jax.Array],
    dropout_rng: jax.Array,
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    learning_rate_fn: optax.Schedule,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from a batch of [A, ...] micro-batches; runs on each device with its own rows.

    The loss is the mean over all masked tokens plus the mean over all pairs, of all micro-batches and devices: what they are
    divided by is summed first, so every label counts the same however the rows are spread. Metrics: the loss and its parts,
    the number of masked tokens, gradient norm before clipping, learning rate; "stop" is above 0 if any process was told to
    stop, so that all learn it at the same step.
    """
    device_rng = jax.random.fold_in(jax.random.fold_in(dropout_rng, state.step), jax.lax.axis_index("data"))
    num_tokens, num_pairs = jax.lax.psum((batch["label_weights"].sum(), batch["next_sentence_weights"].sum()), "data")

    def micro_batch_loss(params, micro_batch, rng):
        loss, aux = loss_fn(params, micro_batch, rng, train=True)
        masked_lm_loss = loss / jnp.maximum(num_tokens, 1)
        next_sentence_loss = aux["next_sentence_loss"] / jnp.maximum(num_pairs, 1)
        return masked_lm_loss + next_sentence_loss, (masked_lm_loss, next_sentence_loss)

    def add_micro_batch(sums, indexed_micro_batch):
        index, micro_batch = indexed_micro_batch
        grad_fn = jax.grad(micro_batch_loss, has_aux=True)
        with nn.intercept_methods(hashed_dropout), nn.intercept_methods(dense_on_cpu):
            grads, losses = grad_fn(state.params, micro_batch, jax.random.fold_in(device_rng, index))
        return jax.tree.map(jnp.add, sums, (losses, grads)), None

    zeros = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, state.params))
    micro_batches = {name: array for name, array in batch.items() if name != "stop"}
    sums, _ = jax.lax.scan(add_micro_batch, zeros, (jnp.arange(len(batch["stop"])), micro_batches))
    (masked_lm_loss, next_sentence_loss), grads = jax.lax.psum(sums, "data")
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = {
        "loss": masked_lm_loss + next_sentence_loss,
        "masked_lm_loss": masked_lm_loss,
        "next_sentence_loss": next_sentence_loss,
        "weight": num_tokens,
        "grad_norm": optax.global_norm(grads),
        "learning_rate": learning_rate_fn(state.step),
        "stop": jax.lax.psum(batch["stop"].max(), "data"),
    }
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics


def eval_step(params, batch: Mapping[str, jax.Array], loss_fn: Callable) -> dict[str, jax.Array]:
    """Sums over the labels of one batch: loss, weight, correct; and "stop", above 0 if a process was told to stop."""
    rows = {name: array for name, array in batch.items() if name != "stop"}
    loss, aux = loss_fn(params, rows, None, train=False)
    return jax.lax.psum({"loss": loss, **aux, "stop": batch["stop"].max()}, "data")


# ---- How layers are computed in a step: attention, dropout, matrix products ----------------------------------------------


ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "dropout_rate")  # in configurations


ATTENTION_CHUNK_SCORES = 2**20  # at a time, or those of one row if it has more


class AttentionWeights(NamedTuple):
    """Weights that transformers' classes ask for, put off until they are multiplied by the values."""

    query: jax.Array  # [batch, queries, heads, head size]
    key: jax.Array  # [batch, keys, heads, head size]
    options: dict[str, Any]

    def astype(self, dtype: jnp.dtype) -> "AttentionWeights":
        return self


@contextlib.contextmanager
def attention(implementation: str, model: FlaxPreTrainedModel) -> Iterator[None]:
    """Within this context, or a function decorated with it, the classes of a model compute their attention in this way.

    They all call flax's dot_product_attention_weights and multiply the result by the values with one einsum. In the file of
    the classes these two names are replaced while a step is traced; no class is edited.
    """
    modeling = attention_file(type(model))
    if implementation == "auto":  # measured on CPUs only: elsewhere nothing is changed unasked
        implementation = "chunked" if jax.default_backend() == "cpu" and modeling else "eager"
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        fail(f"--attention_implementation cudnn: is for NVIDIA GPUs, and JAX runs on {jax.default_backend()} here: use chunked")
    if implementation == "eager":
        yield
        return

    if modeling is None:
        fail(
            f"--attention_implementation {implementation}: {type(model).__name__} has attention of its own: leave the flag out"
        )
    originals = {name: getattr(modeling, name) for name in ("dot_product_attention_weights", "jnp")}

    def make_weights(query, key, **options):
        if query.ndim != 4:  # of blocks, as in LongT5
            return originals["dot_product_attention_weights"](query, key, **options)
        return AttentionWeights(query, key, options)

    def einsum(subscripts, *operands, **options):
        if not isinstance(operands[0], AttentionWeights):
            return jnp.einsum(subscripts, *operands, **options)
        if subscripts == "...hqk,h->...hqk":  # with a mask of heads: all ones, since the scripts pass none
            return operands[0]
        return attend(*operands, implementation)

    modeling.dot_product_attention_weights = make_weights
    modeling.jnp = types.SimpleNamespace(**vars(jnp) | {"einsum": einsum})
    try:
        yield
    finally:
        vars(modeling).update(originals)


def attention_file(model_class: type[FlaxPreTrainedModel]) -> types.ModuleType | None:
    """The file of a model's attention classes, if they attend as `attention` expects."""
    modeling = sys.modules[model_class.module_class.__module__]
    return modeling if hasattr(modeling, "dot_product_attention_weights") else None


def check_attention(implementation: str, config: PretrainedConfig) -> None:
    """Can the model attend in this way? Fails before the text is prepared."""
    flag = f"--attention_implementation {implementation}"
    if implementation in ("auto", "eager") or type(config) not in FLAX_MODELS:
        return
    if attention_file(FLAX_MODELS[type(config)]) is None:
        fail(f"{flag}: {config.model_type} has attention of its own: leave the flag out")
    rates = {name: getattr(config, name) for name in ATTENTION_DROPOUT if getattr(config, name, 0)}
    if implementation != "chunked" and rates:
        rate = "=".join(map(str, next(iter(rates.items()))))
        fail(f"{flag}: cannot drop attention weights, and the configuration has {rate}: set it to 0, or use chunked")


def attend(weights: AttentionWeights, value: jax.Array, implementation: str) -> jax.Array:
    """softmax(query key / sqrt(head size) + bias) value, with dropout: [batch, queries, heads, head size]."""
    query, key, options = weights
    bias, rate, keep = options.get("bias"), options.get("dropout_rate", 0), None
    if rate and not options.get("deterministic"):  # as flax draws it: the same for all rows and heads
        keep = jax.random.bernoulli(options["dropout_rng"], 1 - rate, (query.shape[1], key.shape[1])) / (1 - rate)
    if implementation == "chunked":
        return chunked_attention(query / math.sqrt(query.shape[-1]), key, value, bias, keep)
    if keep is not None:  # of a class that comes with a Hub repository, whose configuration check_attention can't read
        fail(f"--attention_implementation {implementation}: cannot drop attention weights: use chunked")
    bias = None if bias is None else bias.astype(query.dtype)
    return jax.nn.dot_product_attention(query, key, value, bias, implementation=implementation)


def attention_scores(query: jax.Array, key: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Of a row: [heads, queries, keys], in float32."""
    scores = jnp.einsum("qhd,khd->hqk", query, key, preferred_element_type=jnp.float32)
    return scores if bias is None else scores + bias


@jax.custom_vjp
def chunked_attention(query, key, value, bias: jax.Array | None, keep: jax.Array | None) -> jax.Array:
    """Attention some rows of the batch at a time; the backward pass computes the scores again instead of keeping them.

    So no array of [batch, heads, queries, keys] is ever whole, but for the gradient of a bias of that size (Rabe & Staats
    2021, arXiv:2112.05682). `keep` is 0 where dropout drops, else 1 / (1 - rate). Softmax is in float32.
    """
    return chunked_attention_fwd(query, key, value, bias, keep)[0]


def map_rows(function: Callable, query: jax.Array, key: jax.Array, bias: jax.Array | None, *others: jax.Array) -> Any:
    """function(query, key, bias, ...) of each row of the batch, as many at a time as ATTENTION_CHUNK_SCORES says."""
    num_scores = query.shape[1] * query.shape[2] * key.shape[1]
    batch_size = min(ATTENTION_CHUNK_SCORES // num_scores, len(query))
    batch_size = batch_size if batch_size > 1 else None  # on a CPU a batch of one is slower than none
    if bias is not None and len(bias) == len(query):
        return jax.lax.map(lambda row: function(*row), (query, key, bias, *others), batch_size=batch_size)
    common = None if bias is None else bias[0]
    return jax.lax.map(lambda row: function(*row[:2], common, *row[2:]), (query, key, *others), batch_size=batch_size)


def chunked_attention_fwd(query, key, value, bias, keep):
    def attend_row(query, key, bias, value):
        scores = attention_scores(query, key, bias)
        highest = scores.max(-1, keepdims=True)
        exponentials = jnp.exp(scores - highest)
        sums = exponentials.sum(-1, keepdims=True)
        weights = exponentials / sums if keep is None else exponentials / sums * keep
        output = jnp.einsum("hqk,khd->qhd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return output.astype(value.dtype), highest, sums

    output, highest, sums = map_rows(attend_row, query, key, bias, value)
    return output, (query, key, value, bias, keep, output, highest, sums)


def chunked_attention_bwd(residuals: tuple, cotangent: jax.Array) -> tuple:
    query, key, value, bias, keep, *softmax = residuals

    def row_bwd(query, key, bias, value, output, highest, sums, cotangent):
        probabilities = jnp.exp(attention_scores(query, key, bias) - highest) / sums
        weights_grad = jnp.einsum("qhd,khd->hqk", cotangent, value, preferred_element_type=jnp.float32)
        weights = probabilities
        if keep is not None:
            weights, weights_grad = weights * keep, weights_grad * keep
        mean_grad = jnp.einsum("qhd,qhd->hq", output, cotangent, preferred_element_type=jnp.float32)[..., None]
        scores_grad = probabilities * (weights_grad - mean_grad)
        narrow = scores_grad.astype(query.dtype)
        grads = (
            jnp.einsum("hqk,khd->qhd", narrow, key, preferred_element_type=jnp.float32),
            jnp.einsum("hqk,qhd->khd", narrow, query, preferred_element_type=jnp.float32),
            jnp.einsum("hqk,qhd->khd", weights.astype(value.dtype), cotangent, preferred_element_type=jnp.float32),
        )
        return *(grad.astype(query.dtype) for grad in grads), None if bias is None else scores_grad

    *grads, bias_grad = map_rows(row_bwd, query, key, bias, value, *softmax, cotangent)
    if bias is not None:
        broadcast = [axis for axis, size in enumerate(bias.shape) if size == 1]
        bias_grad = bias_grad.sum(broadcast, keepdims=True).astype(bias.dtype)
    return *grads, bias_grad, None


chunked_attention.defvjp(chunked_attention_fwd, chunked_attention_bwd)


def hashed_dropout(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
    """Interceptor of flax modules: dropout by a hash of key and position instead of random bits, which are what it costs.

    The hash is a 32-bit finalizer of the murmur family (Wellons 2018, "lowbias32"), keyed at its beginning and in the middle.
    It takes few operations that XLA fuses with their neighbours, in the backward pass again, so no mask is kept in memory.
    """
    module = context.module
    if not isinstance(module, nn.Dropout) or module.broadcast_dims or kwargs.get("rng") is not None:
        return next_fun(*args, **kwargs)
    deterministic = kwargs.get("deterministic", args[1] if len(args) > 1 else None)
    if module.rate == 0 or (module.deterministic if deterministic is None else deterministic):
        return args[0]
    inputs, key = args[0], jax.random.key_data(module.make_rng(module.rng_collection))
    bits = jax.lax.iota(jnp.uint32, inputs.size).reshape(inputs.shape) + key[0]
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D) ^ key[1]
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    keep = bits ^ (bits >> 16) >= jnp.uint32(module.rate * 2**32)
    return jnp.where(keep, inputs / (1 - module.rate), 0).astype(inputs.dtype)


def contract(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int, dtype: jnp.dtype) -> jax.Array:
    """Sums of products over an axis of each, in float32: asked for bfloat16 sums, XLA on a CPU converts the operands."""
    axes = ((left_axis,), (right_axis,)), ((), ())
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32).astype(dtype)


@jax.custom_vjp
def matmul(inputs: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    """inputs [..., D] @ kernel [D, F] in the type of the inputs, with the gradients in the order that is fast on a CPU."""
    return contract(inputs, kernel_DF.astype(inputs.dtype), inputs.ndim - 1, 0, inputs.dtype)


def matmul_bwd(residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    inputs, kernel_DF = residuals
    inputs_ND, cotangent_NF = inputs.reshape(-1, inputs.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    # One operand of the kernel's gradient is written transposed, with all that XLA fused into it: let it be the narrow one.
    widens = kernel_DF.shape[0] <= kernel_DF.shape[1]
    narrow_NX, wide_NY = (inputs_ND, cotangent_NF) if widens else (cotangent_NF, inputs_ND)
    narrow_XN = narrow_NX.T
    if narrow_NX.dtype == jnp.bfloat16:  # XLA would multiply a mere transpose in float32: a row of zeros makes it more
        narrow_XN = jnp.pad(narrow_XN, ((0, 1), (0, 0)))
    kernel_grad_XY = contract(narrow_XN, wide_NY, 1, 0, kernel_DF.dtype)[: narrow_NX.shape[1]]
    inputs_grad = contract(cotangent, kernel_DF.astype(cotangent.dtype), cotangent.ndim - 1, 1, inputs.dtype)
    return inputs_grad, kernel_grad_XY if widens else kernel_grad_XY.T


matmul.defvjp(lambda inputs, kernel_DF: (matmul(inputs, kernel_DF), (inputs, kernel_DF)), matmul_bwd)


def sum_rows(array: jax.Array) -> jax.Array:
    """The sum over the first axis, in float32: [N, ...] to [...].

    On a CPU it is a product with ones: of long rows XLA's own sum takes up to fifty times as long, a quarter of an MLM step.
    """
    if jax.default_backend() != "cpu":
        return array.sum(0, dtype=jnp.float32)
    flat_NX = array.reshape(len(array), -1)
    return contract(jnp.ones((1, len(array)), array.dtype), flat_NX, 1, 0, jnp.float32).reshape(array.shape[1:])


@jax.custom_vjp
def add_bias(scores: jax.Array, bias_V: jax.Array) -> jax.Array:
    """scores [..., V] + bias [V] in the type of the scores."""
    return scores + bias_V.astype(scores.dtype)


def add_bias_bwd(bias_V: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    return cotangent, sum_rows(cotangent.reshape(-1, len(bias_V))).astype(bias_V.dtype)


add_bias.defvjp(lambda scores, bias_V: (add_bias(scores, bias_V), bias_V), add_bias_bwd)


def vocabulary_scores(head: nn.Module, variables: Mapping[str, Any], *args, **kwargs) -> jax.Array:
    """What an unbound vocabulary head returns; a bias of its own is added outside of it, where its gradient is cheap.

    So it is with heads that add their bias at the end, as those of transformers and flax do; others stay as they are.
    """
    bias_V = variables.get("params", {}).get("bias")
    if bias_V is None or not type(head).__module__.startswith(("transformers.models.", "flax.")):
        return head.apply(variables, *args, **kwargs)
    params = {**variables["params"], "bias": jnp.zeros_like(bias_V)}
    return add_bias(head.apply({**variables, "params": params}, *args, **kwargs), bias_V)


def dense_on_cpu(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
    """Interceptor of flax modules: dense layers through `matmul` where the processor computes them; else as they are."""
    module = context.module
    is_dense = isinstance(module, (nn.Dense, FlaxConv1D)) and context.method_name == "__call__"
    if not is_dense or module.name in VOCABULARY_HEADS or jax.default_backend() != "cpu":  # heads: others intercept them
        return next_fun(*args, **kwargs)
    kernel, bias = module.get_variable("params", "kernel"), module.get_variable("params", "bias")
    inputs = args[0].astype(module.dtype or jnp.result_type(args[0], kernel))
    outputs = matmul(inputs, kernel.T if isinstance(module, FlaxConv1D) else kernel)
    return outputs if bias is None else outputs + bias.astype(outputs.dtype)


# ---- Scaffolding, the same in every script: the command line -------------------------------------------------------------


def fail(message: str) -> NoReturn:
    """End the program because of a person's mistake: one line, exit status 2."""
    print(f"{Path(__file__).name}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def first_line(error: BaseException) -> str:
    """What went wrong, without the advice that libraries print below it."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


class ScriptArgumentParser(HfArgumentParser):
    """HfArgumentParser whose errors are one line, and whose first argument may be a JSON file of arguments.

    Flags after the JSON file override it. Its values are checked as if they stood on the command line.
    """

    VENDOR_FLAGS = (
        "ipu_config_name", "ipu_config_overrides", "n_ipu", "fp32", "loss_scaling", "auto_loss_scaling", "dataloader_mode",
        "compile_only", "pad_on_batch_axis",
    )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        fail(message)

    def parse(self, argv: Sequence[str]) -> tuple:
        argv = list(argv)
        if argv and argv[0].endswith(".json"):
            argv[:1] = self.read_json(argv[0])
        *arguments, unknown = self.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        if unknown:
            fail(f"{unknown[0]}: {self.objection(unknown[0])}")
        return tuple(arguments)

    def objection(self, flag: str) -> str:
        if flag.lstrip("-").partition("=")[0] in self.VENDOR_FLAGS:
            return "is made for one vendor's hardware, remove it: JAX places the program on the devices by itself"
        return "no such flag; --help lists them all"

    def read_json(self, path: str) -> list[str]:
        try:
            values = json.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            fail(f"{path}: cannot be read as JSON: {first_line(error)}")
        if not isinstance(values, dict):
            fail(f"{path}: must hold one JSON object, of flag names and values")
        for name in values:
            if f"--{name}" not in self._option_string_actions:  # the names of flags, and other names they go by
                fail(f"{path}: '{name}': {self.objection(name)}")
        return [f"--{name}={value}" for name, value in values.items() if value is not None]


def parse_arguments(argv: Sequence[str] | None) -> tuple[ModelArguments, DataTrainingArguments, TrainingArguments]:
    """Read the command line (or its JSON file) and check all that can be checked without loading anything."""
    parser = ScriptArgumentParser(
        (ModelArguments, DataTrainingArguments, TrainingArguments), description=__doc__.splitlines()[0]
    )
    model_args, data_args, training_args = parser.parse(sys.argv[1:] if argv is None else argv)
    training_args.output_dir = os.path.expanduser(training_args.output_dir)
    if not (training_args.do_train or training_args.do_eval):
        training_args.do_train = training_args.do_eval = True
    check_arguments(model_args, data_args, training_args)
    data_args.check(model_args)
    return model_args, data_args, training_args


# Flag: (lowest, highest legal value, both included).
LIMITS = {
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "logging_steps": (1, math.inf),
    "save_steps": (1, math.inf),
    "save_total_limit": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "num_processes": (1, math.inf),
    "process_id": (0, math.inf),
    "shuffle_buffer_size": (1, math.inf),
    "num_eval_samples": (1, math.inf),
    "eval_steps": (1, math.inf),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, math.nextafter(1, 0)),
    "adam_beta2": (0, math.nextafter(1, 0)),
    "adam_epsilon": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "num_train_epochs": (math.nextafter(0, 1), math.inf),
    "warmup_steps": (0, math.inf),
    "warmup_ratio": (0, 1),
    "validation_split_percentage": (1, 99),
    "max_seq_length": (1, math.inf),
    "preprocessing_num_workers": (1, math.inf),
    "max_predictions_per_seq": (1, math.inf),
    "dupe_factor": (1, math.inf),
    "max_train_samples": (1, math.inf),
    "max_eval_samples": (1, math.inf),
    "seed": (0, 2**32 - 1),
}


def check_arguments(model_args: ModelArguments, data_args: DataTrainingArguments, training_args: TrainingArguments) -> None:
    """All checks of flags, alone and against each other, that need no file content and no model."""
    for arguments in (model_args, data_args, training_args):
        for name, value in vars(arguments).items():
            low, high = LIMITS.get(name, (-math.inf, math.inf))
            if isinstance(value, (int, float)) and not low <= value <= high:
                limits = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
                fail(f"--{name} {value}: must be {'more than 0' if 0 < low < 1e-9 else limits}")
    if training_args.max_steps == 0 or training_args.max_steps < -1:
        fail(f"--max_steps {training_args.max_steps}: must be at least 1, or -1 to train for --num_train_epochs")
    if training_args.coordinator_address is None and (training_args.num_processes or training_args.process_id) is not None:
        fail("--num_processes, --process_id: need --coordinator_address host:port, the address of process 0")
    if training_args.coordinator_address and None in (training_args.num_processes, training_args.process_id):
        fail("--coordinator_address: needs --num_processes and --process_id too")
    if data_args.streaming and training_args.do_train and training_args.max_steps < 1:
        fail("--streaming: needs --max_steps, since the length of a stream is not known")
    if data_args.streaming and data_args.max_train_samples:
        fail("--max_train_samples: not with --streaming; --max_steps says how much is trained on")
    if training_args.lamb and training_args.adafactor:
        fail("--lamb, --adafactor: name one optimizer")
    if training_args.lamb_no_bias_correction and not training_args.lamb:
        fail("--lamb_no_bias_correction: changes LAMB; add --lamb or drop the flag")
    if training_args.groupbert_schedule and training_args.lr_scheduler_type != "linear":
        fail(f"--lr_scheduler_type {training_args.lr_scheduler_type}: not with --groupbert_schedule, which is linear")
    if model_args.dtype == "float16":
        fail("--dtype float16: would need loss scaling, which this script does not do; use bfloat16")
    check_data_arguments(data_args, training_args.do_train)
    check_model_arguments(model_args)
    if os.path.exists(training_args.output_dir) and not os.path.isdir(training_args.output_dir):
        fail(f"--output_dir {training_args.output_dir}: is a file; name a directory")
    occupied = os.path.isdir(training_args.output_dir) and os.listdir(training_args.output_dir)
    may_be_occupied = training_args.overwrite_output_dir or training_args.resume_from_checkpoint
    if training_args.do_train and occupied and not may_be_occupied:
        fail(f"--output_dir {training_args.output_dir}: is not empty; name another or add --overwrite_output_dir")
    if training_args.attention_implementation == "cudnn" and model_args.dtype == "float32":
        fail("--attention_implementation cudnn: has no float32; add --dtype bfloat16, or use chunked")


def check_data_arguments(data_args: DataTrainingArguments, do_train: bool) -> None:
    """Is there data, and of a kind that can be read?"""
    if not (data_args.dataset_name or data_args.train_file or data_args.validation_file):
        fail("no data: give --dataset_name, or --train_file (and --validation_file)")
    if do_train and not (data_args.dataset_name or data_args.train_file):
        fail("--do_train: needs --train_file or --dataset_name")
    for name in ("train_file", "validation_file"):
        if getattr(data_args, name):
            check_text_file(getattr(data_args, name), f"--{name}")


def check_model_arguments(model_args: ModelArguments) -> None:
    """Is it said which model, and which tokenizer?"""
    if not (model_args.config_name or model_args.model_name_or_path or model_args.model_type):
        fail("no model: give --config_name, --model_type or --model_name_or_path")
    if not (model_args.tokenizer_name or model_args.model_name_or_path):
        fail("no tokenizer: give --tokenizer_name (prepare_model_dir.py trains one) or --model_name_or_path")
    if model_args.model_type and model_args.model_type not in CONFIG_MAPPING:
        fail(f"--model_type {model_args.model_type}: unknown; {supported_model_types()}")
    if model_args.config_overrides and model_args.model_name_or_path:
        fail("--config_overrides: changes fresh models only; the weights of --model_name_or_path fix the configuration")


DATA_LOADERS = {"txt": "text", "csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}


def data_loader_of(path: str) -> str | None:
    """Name of the `datasets` loader for a file, by its suffix; a compression suffix counts as none."""
    name = os.path.basename(path)
    for compression in (".gz", ".bz2", ".xz"):
        name = name.removesuffix(compression)
    return DATA_LOADERS.get(name.rpartition(".")[2])


def check_text_file(path: str, flag: str) -> None:
    if data_loader_of(path) is None:
        fail(f"{flag} {path}: unknown suffix; use {', '.join(DATA_LOADERS)}, or one of these with .gz, .bz2 or .xz")
    if not os.path.isfile(path):
        fail(f"{flag} {path}: no such file")
    if os.path.getsize(path) == 0:
        fail(f"{flag} {path}: is empty")


# ---- Scaffolding: messages and processes ---------------------------------------------------------------------------------


def set_up_logging() -> None:
    """This script's messages on standard error; libraries speak up through handlers of their own, from warnings on."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    # Said at every start; requirements.txt pins the release for that reason and the README explains it.
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax; what fails there is reported here
    flax_logger = logging.getLogger("transformers.modeling_flax_utils")
    flax_logger.addFilter(lambda record: "classes are deprecated" not in record.getMessage())


@functools.cache
def log_once(message: str, *args) -> None:
    logger.warning(message, *args)


def progress_bar(**kwargs) -> tqdm:
    """A bar on standard error: lively on a terminal; in a log file a line a minute, and none for what is done sooner."""
    if not sys.stderr.isatty():
        bar_format = "{desc}: {n_fmt} of {total_fmt} ({elapsed} so far, {remaining} to go)\n"
        kwargs |= {"mininterval": 60, "maxinterval": 60, "delay": 60, "bar_format": bar_format}
    return tqdm(leave=False, dynamic_ncols=True, **kwargs)


def initialize_distributed(training_args: TrainingArguments) -> None:
    """Join the other processes, if this run has several. Must come before anything else touches a device."""
    if not (training_args.multihost or training_args.coordinator_address):
        return
    if "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = training_args.coordinator_address
    try:
        jax.distributed.initialize(address, training_args.num_processes, training_args.process_id)
    except (ValueError, RuntimeError) as error:
        fail(f"--multihost: the processes do not find each other: {first_line(error)}")
    logger.info("Process %d of %d, with %d device(s)", jax.process_index(), jax.process_count(), jax.local_device_count())
    if jax.process_index() > 0:
        logger.setLevel(logging.WARNING)


@contextlib.contextmanager
def main_process_first():
    """Let process 0 go through first, so that the others find what it put into a cache they share."""
    if jax.process_count() > 1 and jax.process_index() > 0:
        multihost_utils.sync_global_devices("process 0 first")
    yield
    if jax.process_count() > 1 and jax.process_index() == 0:
        multihost_utils.sync_global_devices("process 0 first")


def gather_json(value: Any) -> list[Any]:
    """The values of all processes, in order, on each of them."""
    if jax.process_count() == 1:
        return [value]
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(encoded)))
    padded = multihost_utils.process_allgather(np.pad(encoded, (0, sizes.max() - len(encoded))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(padded, sizes, strict=True)]


def gather_rows(rows: "TokenRows") -> "TokenRows":
    """The rows of all processes, in order of the processes, on each of them."""
    if jax.process_count() == 1:
        return rows
    fewest = int(multihost_utils.process_allgather(np.array(len(rows["input_ids"]))).min())
    gathered = {name: multihost_utils.process_allgather(array[:fewest]) for name, array in rows.items()}
    return {name: array.reshape(-1, array.shape[-1]) for name, array in gathered.items()}


# ---- Scaffolding: configuration and tokenizer ----------------------------------------------------------------------------


def supported_model_types() -> str:
    """A sentence listing the model types of this script's objective."""
    return "supported are " + ", ".join(config_class.model_type for config_class in FLAX_MODELS)


def load_config(model_args: ModelArguments) -> PretrainedConfig:
    """The configuration to build the model from, with `config_overrides` applied to a fresh one."""
    source = model_args.config_name or model_args.model_name_or_path
    flag = "--config_name" if model_args.config_name else "--model_name_or_path"
    # transformers would guess a configuration from the path, if there is a model type somewhere in it.
    if source and os.path.isdir(source) and not os.path.isfile(os.path.join(source, "config.json")):
        fail(f"{flag} {source}: no configuration can be loaded: there is no config.json in it")
    if source is None:
        logger.warning("Fresh weights in the default configuration of %s.", model_args.model_type)
        try:
            config = CONFIG_MAPPING[model_args.model_type]()
        except ValueError:  # encoder-decoder and the like are made of two other models
            fail(f"--model_type {model_args.model_type}: has no default configuration; {supported_model_types()}")
    else:
        options = {"cache_dir": model_args.cache_dir, "token": model_args.token, "revision": model_args.model_revision}
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=model_args.trust_remote_code, **options)
        except (OSError, ValueError, KeyError) as error:
            fail(f"{flag} {source}: no configuration can be loaded: {first_line(error)}")
    if type(config) not in FLAX_MODELS and not model_args.trust_remote_code:
        fail(f"model type {config.model_type}: has no Flax class for this objective; {supported_model_types()}")
    if model_args.config_overrides:
        apply_config_overrides(config, model_args.config_overrides)
    return config


def apply_config_overrides(config: PretrainedConfig, overrides: str) -> None:
    """Set fields of a configuration from "key=value,key=value"; a value must fit the type that the field has now."""
    fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    changed = []
    for override in filter(None, (part.strip() for part in overrides.split(","))):
        key, equals, text = (part.strip() for part in override.partition("="))
        name = config.attribute_map.get(key, key)
        if not equals:
            fail(f"--config_overrides {override}: write key=value")
        if name in ("dense_act_fn", "is_gated_act"):
            fail(f"--config_overrides {key}: follows from feed_forward_proj; set that")
        if name not in fields:
            fail(f"--config_overrides {key}: is no field of a {config.model_type} configuration")
        kind = type(fields[name])
        if kind is int and ("prob" in name or "dropout" in name):
            kind = float  # some defaults are a plain 0
        try:
            setattr(config, name, parse_as(kind, text))
        except ValueError as error:
            fail(f"--config_overrides {override}: {key} {error}")
        changed.append(config.attribute_map.get(name, name))
    update_derived_fields(config, fields, changed)


def update_derived_fields(config: PretrainedConfig, before: Mapping[str, Any], changed: Sequence[str]) -> None:
    """Change what follows from the changed fields; `before` are all fields as they were."""
    hidden, heads = (config.attribute_map.get(name, name) for name in ("hidden_size", "num_attention_heads"))
    if hidden in changed and heads not in changed and getattr(config, hidden) % getattr(config, heads):
        setattr(config, heads, max(1, getattr(config, hidden) // 64))
        logger.info("%s=%d: heads of 64 fit a hidden size of %d.", heads, getattr(config, heads), getattr(config, hidden))
    had_equal_depths = "num_layers" in changed and before.get("num_decoder_layers") == before["num_layers"]
    if had_equal_depths and "num_decoder_layers" not in changed:  # T5
        config.num_decoder_layers = config.num_layers
    if "feed_forward_proj" in changed:  # T5
        try:
            derived = type(config)(feed_forward_proj=config.feed_forward_proj)
        except ValueError:
            fail(f"--config_overrides feed_forward_proj={config.feed_forward_proj}: write NAME or gated-NAME, as gated-gelu")
        config.dense_act_fn, config.is_gated_act = derived.dense_act_fn, derived.is_gated_act


def parse_as(kind: type, text: str) -> Any:
    """Read `text` as a value of type `kind`; a field that is None takes a number, a truth value or text."""
    truth = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if kind is bool:
        if text.lower() not in truth:
            raise ValueError("takes true or false")
        return truth[text.lower()]
    if kind is int or kind is float:
        try:
            return kind(text)
        except ValueError:
            raise ValueError("takes a whole number" if kind is int else "takes a number") from None
    if kind is type(None):
        try:
            return json.loads({"true": "true", "false": "false", "none": "null"}.get(text.lower(), text))
        except ValueError:
            return text
    if kind is not str:
        raise ValueError(f"is a {kind.__name__}, which cannot be set here; edit the config.json")
    return text


def load_tokenizer(model_args: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer named, or the one beside the weights."""
    source = model_args.tokenizer_name or model_args.model_name_or_path
    try:
        return AutoTokenizer.from_pretrained(
            source,
            cache_dir=model_args.cache_dir,
            use_fast=model_args.use_fast_tokenizer,
            token=model_args.token,
            revision=model_args.model_revision,
            trust_remote_code=model_args.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        flag = "--tokenizer_name" if model_args.tokenizer_name else "--model_name_or_path"
        fail(f"{flag} {source}: no tokenizer can be loaded: {first_line(error)}")


def match_config_and_tokenizer(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, model_args: ModelArguments
) -> None:
    """Every token id needs an embedding (else it reads NaN), and a fresh model the tokenizer's special ids."""
    num_ids = max(tokenizer.get_vocab().values()) + 1
    if num_ids > config.vocab_size and config.is_encoder_decoder and not model_args.model_name_or_path:
        config.vocab_size = 64 * math.ceil(num_ids / 64)
        logger.warning("vocab_size=%d: the configuration has fewer than the tokenizer's ids.", config.vocab_size)
    if num_ids > config.vocab_size:
        remedy = "use the tokenizer these weights were trained with"
        if not model_args.model_name_or_path:
            remedy = f"add --config_overrides vocab_size={64 * math.ceil(num_ids / 64)}"
        fail(f"the tokenizer has ids up to {num_ids - 1}, the model embeds only {config.vocab_size}: {remedy}")
    starts_with_eos = getattr(config, "decoder_start_token_id", None) == config.eos_token_id
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token_id = getattr(tokenizer, name)
        if token_id is None or token_id == getattr(config, name, None):
            continue
        if model_args.model_name_or_path:
            logger.warning("The tokenizer's %s is %d, the model's %s.", name, token_id, getattr(config, name, None))
        else:
            setattr(config, name, token_id)
    if config.is_encoder_decoder and (config.decoder_start_token_id is None or not model_args.model_name_or_path):
        config.decoder_start_token_id = config.eos_token_id if starts_with_eos else config.pad_token_id


def max_positions(config: PretrainedConfig) -> int | None:
    """Longest row the position table takes; None if there is no table."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and "roberta" in config.model_type:
        return limit - config.pad_token_id - 1  # RoBERTa counts positions from pad_token_id + 1
    return limit


def choose_row_length(data_args: DataArguments, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens per row: what is asked for if the model can take it, else the limit of tokenizer and model, at most 1024."""
    flag, asked, limit = data_args.row_length_flag, getattr(data_args, data_args.row_length_flag), max_positions(config)
    if asked is None:
        return min(tokenizer.model_max_length, limit or 1024, 1024)
    if limit is not None and asked > limit and not data_args.cuts_row_length:
        fail(f"--{flag} {asked}: the model has positions for {limit} tokens; lower it, or train a model with more")
    most = min(tokenizer.model_max_length, limit or asked)
    if asked > most:
        logger.warning("--%s %d is cut to what tokenizer and model can take, %d.", flag, asked, most)
    return min(asked, most)


# ---- Scaffolding: from text to rows of tokens ----------------------------------------------------------------------------


def prepare_data(
    data_args: DataTrainingArguments,
    model_args: ModelArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    collator: "Collator",
) -> tuple["TextStream | None", dict[str, "TokenRows"]]:
    """The rows of tokens of each split; with `streaming` a stream stands for those of training."""
    if data_args.streaming:
        stream, rows = stream_data(data_args, model_args, training_args, tokenizer, collator)
    else:
        with main_process_first():
            raw_datasets = load_raw_datasets(data_args, model_args, training_args)
            stream, rows = None, tokenize_and_group(raw_datasets, tokenizer, collator, data_args, model_args.cache_dir)
    return stream, limit_rows(rows, data_args)


def load_raw_datasets(
    data_args: DataTrainingArguments, model_args: ModelArguments, training_args: TrainingArguments
) -> dict[str, datasets.Dataset]:
    """Load the splits that this run needs: "train", "validation" or both.

    Where the data has no validation split, `validation_split_percentage` of the training rows are drawn with the seed, also
    without do_eval: so a later evaluation of the same data meets rows that were never trained on.
    """
    if data_args.dataset_name:
        splits = load_named_dataset(data_args, model_args)
    else:
        splits = {}
        for split in ("train", "validation"):
            path = getattr(data_args, f"{split}_file")
            if path:
                splits[split] = data_args.add_columns(load_text_file(path, split, data_args, model_args.cache_dir), split)
    if "validation" not in splits:
        splits |= draw_validation_split(splits["train"], data_args.validation_split_percentage, training_args.seed)
    wanted = ["train"] * training_args.do_train + ["validation"] * training_args.do_eval
    for split in wanted:
        if len(splits[split]) == 0:
            fail(f"the {split} data is empty: {data_args.dataset_name or getattr(data_args, f'{split}_file')} has no rows")
    return {split: splits[split] for split in wanted}


def load_text_file(path: str, split: str, data_args: DataArguments, cache_dir: str | None, **options):
    """Read one local file with the loader of its suffix: a Dataset, or with streaming=True an IterableDataset."""
    loader = data_loader_of(path)
    options |= data_args.text_loader_options() if loader == "text" else {}
    try:
        return datasets.load_dataset(loader, data_files=glob.escape(path), split="train", cache_dir=cache_dir, **options)
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        fail(f"--{split}_file {path}: is empty or cannot be read as {loader}: {first_line(error.__cause__ or error)}")


def load_named_dataset(data_args: DataTrainingArguments, model_args: ModelArguments) -> dict[str, datasets.Dataset]:
    """Load a dataset of the Hub, or of a local directory."""
    name = data_args.dataset_name
    try:
        if os.path.isfile(os.path.join(name, "dataset_dict.json")) or os.path.isfile(os.path.join(name, "state.json")):
            loaded = datasets.load_from_disk(name)
        else:
            logger.info("Loading dataset %s", name)
            options = {"data_dir": data_args.data_dir, "cache_dir": model_args.cache_dir, "token": model_args.token}
            loaded = datasets.load_dataset(name, data_args.dataset_config_name, **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        fail(f"--dataset_name {name}: cannot be loaded: {first_line(error)}")
    splits = dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
    if "train" not in splits and "validation" not in splits:
        fail(f"--dataset_name {name}: has neither a train nor a validation split, only {', '.join(splits)}")
    return splits


def draw_validation_split(dataset: datasets.Dataset, percentage: int, seed: int) -> dict[str, datasets.Dataset]:
    """Hold out `percentage` of the rows at random; both parts keep the order of the data, so texts stay in one piece."""
    if len(dataset) < 2:
        fail(f"the training data has {len(dataset)} row(s), too few to hold some out; give --validation_file")
    num_held_out = min(max(1, round(len(dataset) * percentage / 100)), len(dataset) - 1)
    held_out = np.zeros(len(dataset), bool)
    held_out[host_rng(seed, "validation split").choice(len(dataset), num_held_out, replace=False)] = True
    return {"train": dataset.select(np.flatnonzero(~held_out)), "validation": dataset.select(np.flatnonzero(held_out))}


def find_text_column(dataset: datasets.Dataset, text_column_name: str | None) -> str:
    """The column named, else "text", else the first one that holds strings."""
    text_columns = [name for name, feature in dataset.features.items() if getattr(feature, "dtype", "") in TEXT_TYPES]
    if text_column_name is not None:
        if text_column_name not in text_columns:
            fail(f"--text_column_name {text_column_name}: the data has no such text column, only {dataset.column_names}")
        return text_column_name
    if not text_columns:
        fail(f"the data has no text column, only {dataset.column_names}; name one with --text_column_name")
    return "text" if "text" in text_columns else text_columns[0]


TEXT_TYPES = ("string", "large_string")


# Columns of token ids and the like, each [rows, T], by name.
TokenRows = dict[str, np.ndarray]


def tokenize_and_group(
    raw_datasets: Mapping[str, datasets.Dataset],
    tokenizer: PreTrainedTokenizerBase,
    collator: "Collator",
    data_args: DataArguments,
    cache_dir: str | None,
) -> dict[str, "TokenRows"]:
    """Turn text into rows of tokens per split: all texts joined and cut, or one row per text if the collator wants it so."""
    rows = {}
    for split, dataset in raw_datasets.items():
        text_column = data_args.source_column(dataset, collator)
        tokenized = dataset.map(
            functools.partial(tokenize_texts, tokenizer=tokenizer, text_column=text_column, **collator.tokenize_options),
            batched=True,
            num_proc=data_args.preprocessing_num_workers,
            remove_columns=dataset.column_names,
            features=datasets.Features({name: datasets.Sequence(datasets.Value("int32")) for name in collator.columns}),
            load_from_cache_file=not data_args.overwrite_cache,
            desc=f"Tokenising {split}",
        )
        if len(tokenized) == 0:
            fail(f"the {split} data {data_args.reason_for_no_rows(text_column)}")
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


def limit_rows(rows: Mapping[str, TokenRows], data_args: DataTrainingArguments) -> dict[str, TokenRows]:
    """Apply max_train_samples and max_eval_samples."""
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    return {split: {name: array[: limits[split]] for name, array in columns.items()} for split, columns in rows.items()}


# ---- Scaffolding: streams of text ----------------------------------------------------------------------------------------


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
        collator: "Collator",
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
                order = host_rng(self.seed, "window", epoch, window, jax.process_index())
                order = order.permutation(len(rows["input_ids"]))
                yield {name: array[order] for name, array in rows.items()}, start
                window += 1
            if first_window == 0 and not found_tokens:
                fail("no text is left to train on: lower --num_eval_samples or give more text")
            dataset, epoch, window = self.open_dataset(), epoch + 1, 0

    def batches(self, plan: "Plan", first_step: int, position: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
        """This process's part of every training batch, as `train_batches` gives it, with the position behind it."""
        local = plan.local_rows(plan.train_batch_size)
        num_rows, rows_used = local.stop - local.start, position["rows_used"] if position else 0
        windows = prefetch(self.windows(position), depth=1)
        rows, start = next(windows)
        for step in range(first_step, plan.num_steps):
            parts, missing = [], num_rows
            while missing:
                if rows_used == len(rows["input_ids"]):
                    (rows, start), rows_used = next(windows), 0
                part = {name: array[rows_used : rows_used + missing] for name, array in rows.items()}
                taken = len(part["input_ids"])
                parts, missing, rows_used = [*parts, part], missing - taken, rows_used + taken
            batch = self.collator(
                {name: np.concatenate([part[name] for part in parts]) for name in self.collator.columns},
                row_uniforms(self.seed, ("noise", step), local.start, num_rows, self.collator.draws_per_row),
                np.ones(num_rows, bool),
                plan.num_micro_batches * plan.num_local_devices,
            )
            batch = {name: array.reshape(plan.num_micro_batches, -1, *array.shape[1:]) for name, array in batch.items()}
            yield batch | {"position": start | {"rows_used": rows_used}}


def open_text_stream(
    split: str, data_args: DataTrainingArguments, model_args: ModelArguments, num_skipped: int = 0
) -> datasets.IterableDataset | None:
    """This process's shard of a split as a stream, without its first texts; None if there is no such split."""
    path, named = getattr(data_args, f"{split}_file"), (data_args.dataset_name, data_args.dataset_config_name)
    if path and not data_args.dataset_name:
        dataset = load_text_file(path, split, data_args, model_args.cache_dir, streaming=True)
    elif not data_args.dataset_name:
        return None
    else:
        try:
            options = {"data_dir": data_args.data_dir, "token": model_args.token}
            if split not in datasets.get_dataset_split_names(*named, **options):
                return None
            options |= {"streaming": True, "cache_dir": model_args.cache_dir}
            dataset = datasets.load_dataset(*named, split=split, **options)
        except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
            fail(f"--dataset_name {data_args.dataset_name}: {first_line(error)}")
    dataset = datasets.distributed.split_dataset_by_node(dataset, jax.process_index(), jax.process_count())
    return dataset.skip(num_skipped) if num_skipped else dataset


def stream_data(
    data_args: DataTrainingArguments,
    model_args: ModelArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    collator: "Collator",
) -> tuple[TextStream | None, dict[str, TokenRows]]:
    """The training stream and the evaluation rows; without validation data these come from the beginning of the stream.

    They are held out also without do_eval, so that a later evaluation meets what was never trained on.
    """
    streams = {split: open_text_stream(split, data_args, model_args) for split in ("train", "validation")}
    source = streams["validation"] or streams["train"]
    try:
        example = datasets.Dataset.from_list([next(iter(source))])
    except (StopIteration, datasets.exceptions.DatasetsError, ValueError) as error:
        fail(f"the data cannot be streamed: {first_line(error)}")
    text_column = data_args.source_column(example, collator)
    make_stream = functools.partial(
        TextStream,
        tokenize_fn=functools.partial(
            tokenize_texts, tokenizer=tokenizer, text_column=text_column, **collator.tokenize_options
        ),
        text_column=text_column,
        collator=collator,
        window_size=data_args.shuffle_buffer_size,
        seed=training_args.seed,
    )
    rows, num_held_out = {}, 0
    split = "validation" if streams["validation"] else "train"
    if training_args.do_eval or split == "train":
        wanted = data_args.num_eval_samples
        logger.info("Reading %d rows of tokens for evaluation", wanted)
        share = math.ceil(wanted / jax.process_count())
        found, num_texts = make_stream(functools.partial(open_text_stream, split, data_args, model_args)).first_rows(share)
        rows = {"validation": gather_rows(found)}
        if len(rows["validation"]["input_ids"]) == 0:
            fail(f"the {split} data {data_args.reason_for_no_rows(text_column)}")
        if len(found["input_ids"]) < share and split == "train":
            fail(f"--num_eval_samples {wanted}: all the data gives only {len(found['input_ids'])} rows; lower it")
        num_held_out = num_texts if split == "train" else 0
    if not training_args.do_train:
        return None, rows
    return make_stream(functools.partial(open_text_stream, "train", data_args, model_args, num_held_out)), rows


def stream_name(data_args: DataTrainingArguments) -> str:
    """What stands for the data of a stream, whose checksum is not known, when a run is resumed."""
    name = data_args.dataset_name or os.path.basename(data_args.train_file)
    return f"{name} {data_args.dataset_config_name or ''}, read by {jax.process_count()} process(es)"


# ---- Scaffolding: randomness ---------------------------------------------------------------------------------------------


def seed_sequence(seed: int, *stream: str | int) -> np.random.SeedSequence:
    """Everything random follows from the seed and a name, so that nothing depends on what was drawn before."""
    spawn_key = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in stream]
    return np.random.SeedSequence(seed, spawn_key=spawn_key)


def host_rng(seed: int, *stream: str | int) -> np.random.Generator:
    """The NumPy generator of a named stream, such as ("order", epoch)."""
    return np.random.Generator(np.random.PCG64(seed_sequence(seed, *stream)))


def device_rng(seed: int, stream: str, impl: str = "threefry2x32") -> jax.Array:
    """The JAX key of a named stream. threefry2x32 gives the same numbers everywhere, rbg is cheaper (see jax.random.key)."""
    return jax.random.key(seed_sequence(seed, stream).generate_state(1)[0], impl=impl)


def row_uniforms(seed: int, stream: tuple, first_row: int, num_rows: int, draws_per_row: int) -> np.ndarray:
    """Uniform numbers of rows `first_row` to `first_row + num_rows` of a stream: float64 [num_rows, draws_per_row].

    A row's numbers do not depend on which rows are drawn with it, hence not on batch sizes, devices or processes.
    """
    bits = np.random.PCG64(seed_sequence(seed, *stream))
    bits.advance(first_row * draws_per_row)
    return np.random.Generator(bits).random((num_rows, draws_per_row))


# ---- Scaffolding: batches ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Sizes that follow from flags, data and devices. "Rows" are rows of tokens; "local" means of this process."""

    num_local_devices: int
    num_processes: int
    process_index: int
    train_batch_size: int  # rows in one update, all processes
    eval_batch_size: int
    num_micro_batches: int
    steps_per_epoch: int
    num_steps: int
    num_warmup_steps: int

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` updates; 0 where its size is not known."""
        return step / self.steps_per_epoch if self.steps_per_epoch else 0.0

    def local_rows(self, batch_size: int) -> slice:
        """Which rows of a batch this process prepares."""
        size = self.local_size(batch_size)
        return slice(self.process_index * size, (self.process_index + 1) * size)

    def local_size(self, batch_size: int) -> int:
        return batch_size // self.num_processes


def make_plan(training_args: TrainingArguments, num_train_rows: int | None, row_length: int) -> Plan:
    """Work out batch sizes and numbers of steps, and refuse what cannot train; a stream's number of rows is None."""
    micro_batch_size = training_args.per_device_train_batch_size * jax.device_count()
    train_batch_size = micro_batch_size * training_args.gradient_accumulation_steps
    steps_per_epoch = (num_train_rows or 0) // train_batch_size
    num_steps = num_warmup_steps = 0
    if training_args.do_train:
        if steps_per_epoch == 0 and num_train_rows is not None:
            fail(
                f"the training data gives {num_train_rows} rows of {row_length} tokens, fewer than one batch of"
                f" {train_batch_size}: lower --per_device_train_batch_size or the row length, or give more text"
            )
        num_steps = math.ceil(training_args.num_train_epochs * steps_per_epoch)
        if training_args.max_steps > 0:
            num_steps = training_args.max_steps
        num_warmup_steps = training_args.warmup_steps or math.ceil(training_args.warmup_ratio * num_steps)
        if num_warmup_steps >= num_steps:
            flag = "--warmup_steps" if training_args.warmup_steps else "--warmup_ratio"
            fail(f"{flag}: a warmup of {num_warmup_steps} steps does not fit into {num_steps} steps of training")
    return Plan(
        num_local_devices=jax.local_device_count(),
        num_processes=jax.process_count(),
        process_index=jax.process_index(),
        train_batch_size=train_batch_size,
        eval_batch_size=training_args.per_device_eval_batch_size * jax.device_count(),
        num_micro_batches=training_args.gradient_accumulation_steps,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        num_warmup_steps=num_warmup_steps,
    )


def train_batches(
    rows: TokenRows, collator: Callable, plan: Plan, seed: int, first_step: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of every training batch, as arrays [A, ...]; each epoch in a new order, its remainder left out."""
    local, epoch_of_order = plan.local_rows(plan.train_batch_size), None
    for step in range(first_step, plan.num_steps):
        epoch, index = divmod(step, plan.steps_per_epoch)
        if epoch != epoch_of_order:
            order, epoch_of_order = host_rng(seed, "order", epoch).permutation(len(rows["input_ids"])), epoch
        chosen = order[index * plan.train_batch_size :][local]
        uniforms = row_uniforms(seed, ("noise", step), local.start, len(chosen), collator.draws_per_row)
        batch = collator(
            {name: np.asarray(array[chosen]) for name, array in rows.items()},
            uniforms,
            np.ones(len(chosen), bool),
            plan.num_micro_batches * plan.num_local_devices,
        )
        yield {name: array.reshape(plan.num_micro_batches, -1, *array.shape[1:]) for name, array in batch.items()}


def eval_batches(rows: TokenRows, collator: Callable, plan: Plan, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of every evaluation batch, in order; all rows, each with the same noise at every evaluation."""
    num_rows = len(rows["input_ids"])
    local = plan.local_rows(plan.eval_batch_size)
    for first in range(0, num_rows, plan.eval_batch_size):
        chosen = np.arange(first + local.start, first + local.stop)
        uniforms = row_uniforms(seed, ("evaluation noise",), first + local.start, len(chosen), collator.draws_per_row)
        yield collator(
            {name: np.asarray(array[np.minimum(chosen, num_rows - 1)]) for name, array in rows.items()},
            uniforms,
            chosen < num_rows,
            plan.num_local_devices,
        )


class DeviceBatch(NamedTuple):
    """A batch on the devices, how many tokens this process put into it, and where in a stream it ends (None: no stream)."""

    arrays: dict[str, jax.Array]
    num_tokens: int
    position: dict | None


def put_on_devices(
    batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh, spec: PartitionSpec, stop: "StopSignal"
) -> Iterator[DeviceBatch]:
    """Copy batches to the devices, in a background thread. Each carries the news whether this process was told to stop."""
    sharding = NamedSharding(mesh, spec)

    def put(batch):
        batch = dict(batch)
        position = batch.pop("position", None)
        num_tokens = int(batch["attention_mask"].sum())  # padding is left out of "tokens per second"
        num_micro_batches = batch["input_ids"].shape[: len(spec) - 1]
        batch["stop"] = np.full((*num_micro_batches, jax.local_device_count()), stop.requested, np.int32)
        arrays = {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
        return DeviceBatch(arrays, num_tokens, position)

    return prefetch(map(put, batches))


def prefetch(items: Iterable, depth: int = 2) -> Iterator:
    """Iterate in a background thread that is up to `depth` items ahead. Its exceptions surface here, at once."""
    ready: queue.Queue = queue.Queue(depth)
    errors: list[BaseException] = []
    stopped, finished = threading.Event(), threading.Event()

    def work():
        try:
            for item in items:
                while not stopped.is_set():
                    try:
                        ready.put(item, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if stopped.is_set():
                    return
        except BaseException as error:
            errors.append(error)
        finally:
            finished.set()

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while not errors:
            try:
                yield ready.get(timeout=0.1)
            except queue.Empty:
                if finished.is_set() and ready.empty():
                    break
        if errors:
            raise errors[0]
    finally:
        stopped.set()
        thread.join()


def log_plan(plan: Plan, num_rows: Mapping[str, int], row_length: int, params) -> None:
    """Say what is about to happen, derived sizes first."""
    num_params = sum(array.size for array in jax.tree.leaves(params))
    logger.info(
        "Model: %s parameters, on %d device(s) of kind %s", f"{num_params:,}", jax.device_count(), jax.devices()[0].device_kind
    )
    if plan.num_steps:
        logger.info(
            "Training: %s rows of %d tokens, %d rows = %s tokens per step, %d steps (%s per epoch), %d of them warmup",
            f"{num_rows['train']:,}" if "train" in num_rows else "a stream of", row_length,
            plan.train_batch_size, f"{plan.train_batch_size * row_length:,}",
            plan.num_steps, plan.steps_per_epoch or "unknown", plan.num_warmup_steps,
        )  # fmt: skip
    if "validation" in num_rows:
        logger.info("Evaluation: %s rows, %d rows per batch", f"{num_rows['validation']:,}", plan.eval_batch_size)


# ---- Scaffolding: weights, optimizer, programs ---------------------------------------------------------------------------


def load_params(config: PretrainedConfig, model_args: ModelArguments, training_args: TrainingArguments, mesh: Mesh):
    """Build the model and its float32 weights, the same on every device of the mesh: (model, params)."""
    dtype, source, params = jnp.dtype(model_args.dtype), model_args.model_name_or_path, None
    try:
        if source:
            logger.info("Loading weights from %s", source)
            options = {"cache_dir": model_args.cache_dir, "token": model_args.token, "revision": model_args.model_revision}
            options |= {"trust_remote_code": model_args.trust_remote_code, "dtype": dtype}
            loaded = read_weights(source, config, options)
            params, model = loaded.params, type(loaded)(config, dtype=dtype, _do_init=False)  # holds no second copy
            del loaded
            config.torch_dtype = "float32"  # what is trained and saved here, whatever the checkpoint was stored in
        else:
            model = MODEL_CLASS.from_config(config, dtype=dtype, _do_init=False)
    except (OSError, ValueError, ZeroDivisionError) as error:
        fail(f"{f'--model_name_or_path {source}' if source else 'the configuration'}: no model: {first_line(error)}")
    if training_args.gradient_checkpointing:
        enable_gradient_checkpointing(model)

    def initialize(rng, params):
        params = unfreeze(params or model.init_weights(rng, model.input_shape))
        return jax.tree.map(lambda array: array.astype(jnp.float32), params)

    initialize = jax.jit(initialize, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return model, initialize(device_rng(training_args.seed, "weights"), params)


def read_weights(source: str, config: PretrainedConfig, options: Mapping[str, Any]) -> FlaxPreTrainedModel:
    """The model of a directory or of the Hub: in Flax layout or, where that is not there, in PyTorch's.

    model.safetensors is read without PyTorch; pytorch_model.bin, an older kind of file, only PyTorch can read.
    """
    try:
        return MODEL_CLASS.from_pretrained(source, config=config, **options)
    except OSError as error:
        if "from_pt=True" not in str(error):  # what transformers says where pytorch_model.bin is all there is
            raise
    except NotImplementedError:
        remedy = "save it again in one, with save_pretrained(..., max_shard_size='100GB')"
        fail(f"--model_name_or_path {source}: its model.safetensors is in several files, which cannot be read here: {remedy}")
    if importlib.util.find_spec("torch") is None:
        remedy = "install it (pip install torch), or save the model as model.safetensors elsewhere"
        fail(f"--model_name_or_path {source}: its weights are in pytorch_model.bin, which needs PyTorch: {remedy}")
    return MODEL_CLASS.from_pretrained(source, config=config, from_pt=True, **options)


def enable_gradient_checkpointing(model: FlaxPreTrainedModel) -> None:
    """Recompute activations in the backward pass, where the model class can."""
    try:
        model.enable_gradient_checkpointing()
    except NotImplementedError:
        able = [
            config_class.model_type
            for config_class, model_class in FLAX_MODELS.items()
            if model_class.enable_gradient_checkpointing is not FlaxPreTrainedModel.enable_gradient_checkpointing
        ]
        remedy = f"only for {', '.join(able)}" if able else "by no Flax class of this objective; drop the flag"
        fail(f"--gradient_checkpointing: not implemented for {model.config.model_type}, {remedy}")


def advise_on_cpu(dtype: str) -> None:
    """Say what makes this machine faster or not, if its processor is what computes."""
    if jax.default_backend() != "cpu" or not sys.platform.startswith("linux"):
        return
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge_pages.exists() and "[madvise]" in huge_pages.read_text() and "hugetlb" not in os.environ.get("GLIBC_TUNABLES", ""):
        logger.info("Faster with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment: arrays in huge pages.")
    has_bfloat16 = re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", Path("/proc/cpuinfo").read_text())
    if dtype == "bfloat16" and not has_bfloat16:
        logger.warning("--dtype bfloat16: this processor has no instructions for it, so that it saves memory but no time.")


def make_learning_rate(training_args: TrainingArguments, plan: Plan) -> optax.Schedule:
    """Linear warmup from 0, then the decay of `lr_scheduler_type` to 0 at the last step.

    Update s (from 0) gets lr * s / warmup steps, so the first of a warmup changes nothing: as in the original scripts.
    GroupBERT (Chelombiev et al. 2021, arXiv:2106.05822) has the square root of that, and goes down to 1e-7.
    """
    peak, num_decay_steps = training_args.learning_rate, plan.num_steps - plan.num_warmup_steps
    warmup = optax.linear_schedule(0.0, peak, plan.num_warmup_steps)
    if training_args.lr_scheduler_type == "cosine":
        decay = optax.cosine_decay_schedule(peak, num_decay_steps)
    elif training_args.groupbert_schedule:
        decay = optax.linear_schedule(peak, 1e-7, num_decay_steps)
        warmup = lambda step: peak * jnp.sqrt(step / plan.num_warmup_steps)  # noqa: E731
    else:
        decay = optax.linear_schedule(peak, 0.0 if training_args.lr_scheduler_type == "linear" else peak, num_decay_steps)
    return optax.join_schedules([warmup, decay], [plan.num_warmup_steps]) if plan.num_warmup_steps else decay


def decay_mask(params) -> Any:
    """Which arrays weight decay applies to: matrices and embeddings, not biases and norms (all of rank 1)."""
    return path_aware_map(lambda path, array: array.ndim >= 2 and path[-1] != "final_logits_bias", params)


def make_optimizer(training_args: TrainingArguments, learning_rate_fn: optax.Schedule) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019), Adafactor (Shazeer & Stern 2018) or LAMB (You et al. 2020, arXiv:1904.00962).

    Gradients are clipped to `max_grad_norm` if that is set. Adafactor's decay is decoupled and follows the learning rate, as
    AdamW's does; optax's own would not. LAMB scales the update of each matrix to the matrix's norm; biases and norms, which
    are excluded from that as they are from decay, get Adam's update.
    """
    b1, b2, eps = training_args.adam_beta1, training_args.adam_beta2, training_args.adam_epsilon
    if training_args.adafactor:
        optimizer = optax.chain(
            optax.adafactor(learning_rate=None),
            optax.add_decayed_weights(-training_args.weight_decay, mask=decay_mask),
            optax.scale_by_schedule(learning_rate_fn),
        )
    elif training_args.lamb:
        correction = optax.scale_by_schedule(lambda count: (1 - b1 ** (count + 1)) / jnp.sqrt(1 - b2 ** (count + 1)))
        optimizer = optax.chain(
            optax.scale_by_adam(b1, b2, eps),
            correction if training_args.lamb_no_bias_correction else optax.identity(),  # what scale_by_adam corrected
            optax.add_decayed_weights(training_args.weight_decay, mask=decay_mask),
            optax.masked(optax.scale_by_trust_ratio(), decay_mask),
            optax.scale_by_learning_rate(learning_rate_fn),
        )
    else:
        optimizer = optax.adamw(learning_rate_fn, b1, b2, eps, weight_decay=training_args.weight_decay, mask=decay_mask)
    if training_args.max_grad_norm > 0:
        return optax.chain(optax.clip_by_global_norm(training_args.max_grad_norm), optimizer)
    return optimizer


class CompiledStep:
    """A step as one program over all devices of the mesh, compiled at its first call, which says so."""

    def __init__(self, name: str, step_fn: Callable, mesh: Mesh, in_specs: tuple, donate_argnums: tuple = ()):
        sharded = jax.shard_map(step_fn, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(), check_vma=False)
        self.name, self.jitted, self.compiled = name, jax.jit(sharded, donate_argnums=donate_argnums), None

    def compile(self, *args) -> None:
        start = time.monotonic()
        logger.info("Compiling the %s step ...", self.name)
        self.compiled = self.jitted.lower(*args).compile()
        logger.info("Compiled the %s step in %.1f s", self.name, time.monotonic() - start)

    def __call__(self, *args):
        if self.compiled is None:
            self.compile(*args)
        return self.compiled(*args)


def compile_steps(
    model: FlaxPreTrainedModel, training_args: TrainingArguments, plan: Plan, mesh: Mesh
) -> tuple[CompiledStep | None, CompiledStep, optax.GradientTransformation | None]:
    """The programs of this run, compiled when first called: (training step, evaluation step, optimizer)."""
    everywhere, per_row, per_micro_batch = PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")
    model_loss_fn = functools.partial(loss_fn, model=model)
    model_loss_fn = attention(training_args.attention_implementation, model)(model_loss_fn)
    eval_step_fn = functools.partial(eval_step, loss_fn=model_loss_fn)
    p_eval_step = CompiledStep("evaluation", eval_step_fn, mesh, (everywhere, per_row))
    if not training_args.do_train:
        return None, p_eval_step, None
    learning_rate_fn = make_learning_rate(training_args, plan)
    optimizer = make_optimizer(training_args, learning_rate_fn)
    step_fn = functools.partial(train_step, loss_fn=model_loss_fn, optimizer=optimizer, learning_rate_fn=learning_rate_fn)
    p_train_step = CompiledStep("training", step_fn, mesh, (everywhere, per_micro_batch, everywhere), donate_argnums=(0,))
    return p_train_step, p_eval_step, optimizer


def start_or_resume(
    params,
    optimizer: optax.GradientTransformation,
    training_args: TrainingArguments,
    identity: Mapping[str, Any],
    mesh: Mesh,
) -> tuple[TrainState, dict[str, Any] | None]:
    """The state to train from, on every device; with a checkpoint also the progress it holds."""
    create = functools.partial(create_train_state, optimizer=optimizer)
    state = jax.jit(create, out_shardings=NamedSharding(mesh, PartitionSpec()), donate_argnums=0)(params)
    if not training_args.resume_from_checkpoint:
        return state, None
    resume_from = training_args.resume_from_checkpoint
    state, progress = restore_checkpoint(resume_from, training_args.output_dir, state, identity)
    logger.info("Resuming after step %d", progress["step"])
    return state, progress


# ---- Scaffolding: training and evaluation --------------------------------------------------------------------------------


def train(
    state: TrainState,
    batches: Iterable[DeviceBatch],
    p_train_step: CompiledStep,
    dropout_rng: jax.Array,
    training_args: TrainingArguments,
    log: "TrainingLog",
    evaluator: "Evaluator",
    saver: "Saver",
    stop: "StopSignal",
    position: dict | None,
) -> TrainState:
    """The training loop. One compiled call per step; then log, evaluate and save, each when it is due.

    Raises:
        Stopped: the run was told to stop; its state is saved.
        NonFiniteError: training diverged.
    """
    step = int(state.step)

    def evaluate_if_due():
        if training_args.do_eval and training_args.eval_steps and step % training_args.eval_steps == 0 and step > 0:
            evaluator(state.params, step, log.writer, stop)

    def save():
        progress = log.progress() | {"positions": gather_json(position), "evaluations": evaluator.history}
        saver.save(step, state, progress)

    try:
        evaluate_if_due()  # where a resumed run was stopped in an evaluation
        for batch in batches:
            if p_train_step.compiled is None:
                p_train_step.compile(state, batch.arrays, dropout_rng)
                log.stopwatch.start()
            stop.check(log.stop_agreed)
            state, metrics = p_train_step(state, batch.arrays, dropout_rng)
            step, position = step + 1, batch.position
            log.add(step, metrics, batch.num_tokens)
            if training_args.pauses_after(step):
                log.fetch()
                log.stopwatch.stop()
                evaluate_if_due()
                if step % training_args.save_steps == 0 and step < log.plan.num_steps:
                    save()
                log.stopwatch.start()
        log.fetch()
    except Stopped:
        log.fetch()
        log.stopwatch.stop()
        save()
        saver.wait()
        check_all_is_saved(saver, None)
        if saver.hub and training_args.hub_strategy != "end":
            saver.hub.push(step, final=True)
        raise
    finally:
        log.close()
        saver.wait()
    save()
    return state


class Stopwatch:
    """Seconds spent training: runs between `start` and `stop`, so compiling, evaluating and saving don't count."""

    def __init__(self):
        self.total, self.started = 0.0, None

    def start(self) -> None:
        self.started = time.monotonic()

    def stop(self) -> None:
        self.total, self.started = self.seconds(), None  # harmless where it is not running

    def seconds(self) -> float:
        return self.total + (0.0 if self.started is None else time.monotonic() - self.started)


class StopSignal:
    """SIGTERM and SIGINT ask the run to save and end; a second SIGINT ends it at once."""

    def __init__(self):
        self.requested, self.previous = 0, {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self.previous[signum] = signal.signal(signum, self.handle)
        return self

    def __exit__(self, *exception) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def check(self, agreed: bool) -> None:
        """Raise Stopped if all processes agreed to stop; a single process has nobody to ask."""
        if agreed or (self.requested and jax.process_count() == 1):
            raise Stopped(self.requested or signal.SIGTERM)

    def handle(self, signum: int, frame) -> None:
        if self.requested and signum == signal.SIGINT:
            os._exit(128 + signum)
        self.requested = signum
        name = signal.Signals(signum).name
        logger.warning("%s: finishing the step, then saving. Interrupt again to end at once.", name)


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """The run was told to stop, and all processes know it."""

    def __init__(self, signum: int):
        super().__init__("stopped as asked; to go on, run the same command with --resume_from_checkpoint")
        self.signum = signum


class NonFiniteError(Exception):
    """A loss or gradient norm that is NaN or infinite: the weights after that step are lost, those saved before are not."""

    def __init__(self, step: int, loss: float, grad_norm: float):
        super().__init__(
            f"step {step}: the loss is {loss}, the gradient norm {grad_norm}. Nothing was saved since. Try a lower"
            " --learning_rate, a longer --warmup_steps, --max_grad_norm 1, or --dtype float32"
        )


class TrainingLog:
    """Log line, progress bar and TensorBoard points of the training steps.

    The metrics of a step are fetched when the next one has been dispatched, so that the devices never wait for the log.
    """

    def __init__(self, training_args: TrainingArguments, plan: Plan, writer: Writer | None, stopwatch: Stopwatch):
        self.args, self.plan, self.writer, self.stopwatch = training_args, plan, writer, stopwatch
        self.pending: tuple | None = None
        self.window: list[dict[str, float]] = []
        self.curve: list[tuple[int, float]] = []
        self.window_started = self.loss_sum = self.weight_sum = self.num_tokens = 0.0
        self.stop_agreed = False
        self.bar = progress_bar(total=plan.num_steps, desc="Training", unit="step")

    CARRIED_ON = ("window", "curve", "window_started", "loss_sum", "weight_sum", "num_tokens")

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps of the log, so that a resumed run writes what an uninterrupted one would."""
        return {name: getattr(self, name) for name in self.CARRIED_ON} | {"train_time": self.stopwatch.seconds()}

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Take up the log of a checkpoint."""
        for name in self.CARRIED_ON:
            setattr(self, name, progress[name])
        self.stopwatch.total = progress["train_time"]
        self.bar.update(progress["step"])

    def add(self, step: int, metrics: Mapping[str, jax.Array], num_tokens: int) -> None:
        """Take the metrics of a step that has just been dispatched; write those of the step before."""
        self.fetch()
        self.pending = (step, metrics, num_tokens)

    def fetch(self) -> None:
        """Wait for the last step and write its metrics."""
        if self.pending is None:
            return
        step, metrics, num_tokens = self.pending
        self.pending = None
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        self.stop_agreed = values.pop("stop") > 0
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise NonFiniteError(step, values["loss"], values["grad_norm"])
        self.window.append({"step": step, "tokens": num_tokens * self.plan.num_processes, **values})
        self.bar.update(1)
        first = step == 1 and self.args.logging_first_step
        if first or step % self.args.logging_steps == 0 or step == self.plan.num_steps:
            self.write(step)

    def write(self, step: int) -> None:
        """Write the window since the last line: means weighted by labels on the log line, every step to TensorBoard."""
        seconds = self.stopwatch.seconds()
        last = self.window[-1]
        losses = [name for name in last if name == "loss" or name.endswith("_loss")]  # the whole, then parts if it has some
        sums = {name: sum(point[name] * point["weight"] for point in self.window) for name in losses}
        loss_sum, weight_sum = sums["loss"], sum(point["weight"] for point in self.window)
        num_tokens = sum(point["tokens"] for point in self.window)
        tokens_per_second = num_tokens / max(seconds - self.window_started, 1e-9)
        epoch = f" (epoch {self.plan.epoch(step):.2f})" if self.plan.steps_per_epoch else ""
        logger.info(
            "step %d of %d%s: %s, learning rate %.3g, gradient norm %.3g, %s tokens/s",
            step, self.plan.num_steps, epoch,
            ", ".join(f"{name.replace('_', ' ')} {sums[name] / max(weight_sum, 1):.4f}" for name in losses),
            last["learning_rate"], last["grad_norm"], f"{tokens_per_second:,.0f}",
        )  # fmt: skip
        if self.writer:
            for point in self.window:
                for name in (*losses, "learning_rate", "grad_norm"):
                    self.writer.add_scalar(f"train_{name}", point[name], point["step"])
            self.writer.add_scalar("train_time", seconds, step)
            self.writer.add_scalar("train_tokens_per_second", tokens_per_second, step)
            self.writer.flush()
        self.loss_sum, self.weight_sum = self.loss_sum + loss_sum, self.weight_sum + weight_sum
        self.num_tokens += num_tokens
        self.curve.append((step, loss_sum / max(weight_sum, 1)))
        self.window, self.window_started = [], seconds

    def close(self) -> None:
        self.stopwatch.stop()
        self.bar.close()

    def results(self, num_train_rows: int | None) -> dict[str, float]:
        """train_results.json: totals over the run."""
        seconds = self.stopwatch.seconds()
        return {
            "epoch": self.plan.epoch(self.plan.num_steps),
            "train_loss": self.loss_sum / max(self.weight_sum, 1),
            "train_runtime": seconds,
            "train_samples": num_train_rows or self.plan.num_steps * self.plan.train_batch_size,
            "train_steps": self.plan.num_steps,
            "train_tokens_per_second": self.num_tokens / max(seconds, 1e-9),
        }


class Evaluator:
    """Metrics over all evaluation rows: every label counts once, whichever batch it is in."""

    def __init__(
        self, rows: TokenRows | None, collator: Callable, plan: Plan, seed: int, mesh: Mesh, p_eval_step: CompiledStep
    ):
        self.rows, self.collator, self.plan, self.seed = rows, collator, plan, seed
        self.mesh, self.p_eval_step = mesh, p_eval_step
        self.history: dict[int, dict[str, float]] = {}

    def __call__(self, params, step: int, writer: Writer | None, stop: StopSignal) -> dict[str, float]:
        """Evaluate after `step` updates, unless that is done already; results go to the log and to TensorBoard.

        Raises:
            Stopped: the run was told to stop in the middle; the evaluation is left to the resumed run.
        """
        if step in self.history:
            return self.history[step]
        totals: dict[str, float] = {}
        pending: Mapping[str, jax.Array] = {}
        batches = eval_batches(self.rows, self.collator, self.plan, self.seed)
        num_batches = math.ceil(len(self.rows["input_ids"]) / self.plan.eval_batch_size)
        with progress_bar(total=num_batches, desc="Evaluating", unit="batch") as bar:
            for batch in put_on_devices(batches, self.mesh, PartitionSpec("data"), stop):
                done, pending = pending, self.p_eval_step(params, batch.arrays)
                totals = add_sums(totals, done)  # fetched one batch late, so that the devices don't wait
                stop.check(totals.get("stop", 0) > 0)
                bar.update(1)
        metrics = eval_metrics(add_sums(totals, pending))
        logger.info("evaluation at step %d: %s", step, ", ".join(f"{k[5:]} {v:.4f}" for k, v in metrics.items()))
        if writer:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            writer.flush()
        self.history[step] = metrics
        return metrics


def add_sums(totals: Mapping[str, float], sums: Mapping[str, jax.Array]) -> dict[str, float]:
    """Add the sums of one batch to those of the batches before, in double precision."""
    return dict(totals) | {name: totals.get(name, 0.0) + float(value) for name, value in sums.items()}


def open_writer(output_dir: str) -> Writer | None:
    """The TensorBoard writer of process 0."""
    return Writer(output_dir) if jax.process_index() == 0 else None


def open_training_writer(output_dir: str, progress: Mapping[str, Any] | None) -> Writer | None:
    """The same for training; what an interrupted run wrote after the checkpoint that is resumed from is struck out."""
    if jax.process_index() > 0:
        return None
    first, evaluations = 0, {}
    if progress:
        window = progress["window"]
        first = window[0]["step"] if window else progress["step"] + 1  # points before it are written, those from it on not yet
        evaluations = {int(step): metrics for step, metrics in progress["evaluations"].items() if int(step) >= first}
    # TensorBoard drops points from this step on at every session start but the first, so a fresh run needs one too.
    events = EventFileWriter(output_dir)
    events.add_event(Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START)))
    events.close()
    writer = open_writer(output_dir)
    for step, metrics in evaluations.items():
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
    return writer


# ---- Scaffolding: saving -------------------------------------------------------------------------------------------------


def prepare_output_dir(training_args: TrainingArguments) -> None:
    """Create the output directory; of an earlier run in it, remove what would pass for results of this one."""
    try:
        os.makedirs(training_args.output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=training_args.output_dir):
            pass
    except OSError as error:
        fail(f"--output_dir {training_args.output_dir}: cannot be written to: {error.strerror}")
    stale = [f"*{TEMPORARY_SUFFIX}", ".saving-*"]
    if not training_args.resume_from_checkpoint:
        stale += ["eval_results.json", "run_info.json"]
        if training_args.do_train:
            stale += ["train_results.json", "events.out.tfevents.*", "checkpoint-*"]
    for pattern in stale:
        for path in Path(training_args.output_dir).glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@jax.jit
def copy_on_devices(tree):
    return jax.tree.map(jnp.copy, tree)


class Saver:
    """Writes training state and model in the background, one save at a time; uploads follow if there is a Hub.

    The training state goes to `checkpoint-<step>`, complete or not at all, and the newest `save_total_limit` are kept.
    """

    def __init__(
        self,
        training_args: TrainingArguments,
        model: FlaxPreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        identity: Mapping[str, Any],
        hub: "Hub | None",
    ):
        self.args, self.model, self.tokenizer, self.identity, self.hub = training_args, model, tokenizer, identity, hub
        self.checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self.executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="save")
        self.job: concurrent.futures.Future | None = None
        self.saved_step: int | None = None
        self.resumed_step: int | None = None
        self.failed = False

    def save(self, step: int, state: TrainState, progress: Mapping[str, Any]) -> None:
        """Copy the state, then write it in the background. A failure is reported; what was saved before stays."""
        if step == self.saved_step:
            return
        self.wait()
        self.saved_step, self.failed = step, False
        logger.info("Saving step %d to %s", step, self.args.output_dir)
        path = os.path.abspath(checkpoint_path(self.args.output_dir, step))
        progress = copy.deepcopy(dict(progress)) | {"step": step, "identity": self.identity}  # written while training goes on
        contents = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        try:
            if step != self.resumed_step:
                self.checkpointer.save(path, args=contents, force=True)
            # The next step overwrites the weights in place, so the writer needs a copy; the devices make it.
            self.job = self.executor.submit(self.write, copy_on_devices(state.params))
        except Exception as error:
            self.report_failure(error)

    def resume(self, step: int) -> None:
        """The checkpoint that is resumed from, if it is one of output_dir, is not written over."""
        if os.path.isdir(checkpoint_path(self.args.output_dir, step)):
            self.resumed_step = step

    def write(self, params) -> None:
        """Runs in the background: model files, then the end of the training state; then old ones go, and an upload begins."""
        try:
            if jax.process_index() == 0:
                params = jax.tree.map(lambda array: np.asarray(array.addressable_data(0)), params)
                save_model(self.args.output_dir, self.model, params, self.tokenizer, self.args.save_safetensors)
        finally:
            self.checkpointer.wait_until_finished()
        if jax.process_index() == 0:
            write_checksums(checkpoint_path(self.args.output_dir, self.saved_step))
            for _, path in find_checkpoints(self.args.output_dir)[self.args.save_total_limit :]:
                shutil.rmtree(path, ignore_errors=True)
        if self.hub:
            self.hub.push(self.saved_step)

    def wait(self) -> None:
        """Wait until the last save is on disk."""
        try:
            if self.job:
                self.job.result()
        except Exception as error:
            self.report_failure(error)
        self.job = None

    def report_failure(self, error: Exception) -> None:
        self.failed = True
        code = re.search(r"os_error_code='(\d+)'", str(error))  # somewhere in a long line about orbax's files
        reason = os.strerror(int(code[1])) if code else first_line(error)
        logger.error("Step %d could not be saved: %s. What was saved before is untouched.", self.saved_step, reason)
        shutil.rmtree(checkpoint_path(self.args.output_dir, self.saved_step) + TEMPORARY_SUFFIX, ignore_errors=True)


def save_model(
    output_dir: str,
    model: FlaxPreTrainedModel,
    params,
    tokenizer: PreTrainedTokenizerBase,
    save_safetensors: bool,
) -> None:
    """Write configuration, tokenizer and weights (NumPy arrays); each file appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".saving-") as staging:
        tokenizer.save_pretrained(staging)
        model.save_pretrained(staging, params=params)
        if save_safetensors:
            path = os.path.join(staging, "model.safetensors")
            save_file(pytorch_state_dict(params), path, metadata={"format": "pt"})
            shutil.copymode(os.path.join(staging, "config.json"), path)  # safetensors keeps others from reading it
        for name in sorted(os.listdir(staging)):
            os.replace(os.path.join(staging, name), os.path.join(output_dir, name))


def pytorch_state_dict(params) -> dict[str, np.ndarray]:
    """Flax weights under PyTorch's names and in its layout: what transformers 5 and PyTorch load."""
    state = {}
    for (*module_path, leaf), array in flatten_dict(params).items():
        array = np.asarray(array)
        if leaf == "kernel" and array.ndim == 2:
            array = array.T
        leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
        state[".".join((*module_path, leaf))] = np.ascontiguousarray(array)
    # Families like BART, and LongT5, have three tables in PyTorch where the head has one of its own.
    prefix = "" if any("LocalSelfAttention" in name or "TransientGlobalSelfAttention" in name for name in state) else "model."
    if {f"{prefix}shared.weight", "lm_head.weight"} <= state.keys():
        table = state[f"{prefix}shared.weight"]
        state |= {f"{prefix}{side}.embed_tokens.weight": table for side in ("encoder", "decoder")}
    return state


def write_json(path: str, values: Mapping[str, Any]) -> None:
    """Write standard JSON, whole or not at all: what is not a finite number becomes null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    write_text(path, json.dumps(finite, indent=4, sort_keys=True, allow_nan=False) + "\n")


def write_text(path: str, text: str) -> None:
    """Write a file, whole or not at all."""
    Path(f"{path}.tmp").write_text(text, "utf-8")
    os.replace(f"{path}.tmp", path)


def write_results(training_args: TrainingArguments, name: str, values: Mapping[str, Any]) -> None:
    """Write a JSON file of output_dir, from process 0."""
    if jax.process_index() == 0:
        write_json(os.path.join(training_args.output_dir, name), values)


def public_arguments(*arguments: Any) -> dict[str, Any]:
    """All flags of this run except the secret ones, which are those that don't show in a repr."""
    return {f.name: getattr(part, f.name) for part in arguments for f in dataclasses.fields(part) if f.repr}


def changed_arguments(*arguments: Any) -> str:
    """The public flags that were set, as one would type them."""
    defaults = {f.name: f.default for part in arguments for f in dataclasses.fields(part)}
    return " ".join(f"--{k} {v}" for k, v in public_arguments(*arguments).items() if v != defaults[k])


def run_info(*arguments: Any) -> dict[str, Any]:
    """What is needed to run this again: arguments, versions, devices, and the commit of this script if it is in git."""
    script = Path(__file__).resolve()
    packages = ("transformers", "jax", "jaxlib", "flax", "optax", "datasets", "tokenizers", "numpy")
    git = ["git", "-C", str(script.parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "script": script.name,
        "arguments": public_arguments(*arguments),
        "versions": {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()},
        "devices": [str(device) for device in jax.devices()],
        "device_kind": jax.devices()[0].device_kind,
        "git_commit": commit,
    }


# ---- Scaffolding: resuming -----------------------------------------------------------------------------------------------


TEMPORARY_SUFFIX = ".orbax-checkpoint-tmp"  # of a checkpoint that is being written


def checkpoint_path(output_dir: str, step: int) -> str:
    return os.path.join(output_dir, f"checkpoint-{step}")


def find_checkpoints(directory: str) -> list[tuple[int, str]]:
    """The complete checkpoints of a directory, (step, path), newest first."""
    found = (re.fullmatch(r"checkpoint-(\d+)", name) for name in os.listdir(directory))
    return sorted(((int(match[1]), os.path.join(directory, match[0])) for match in found if match), reverse=True)


def write_checksums(path: str) -> None:
    """Note the checksum of each file of a checkpoint, so that damage is noticed that would still load."""
    write_json(os.path.join(path, CHECKSUMS), file_checksums(path))


CHECKSUMS = "checksums.json"


def file_checksums(path: str) -> dict[str, int]:
    """CRC-32 of all files below a directory, by relative name."""
    checksums = {}
    for file in sorted(Path(path).rglob("*")):
        if file.is_file() and not file.name.startswith(CHECKSUMS):
            checksum = 0
            with file.open("rb") as stream:
                while part := stream.read(2**22):
                    checksum = zlib.crc32(part, checksum)
            checksums[str(file.relative_to(path))] = checksum
    return checksums


def check_checksums(path: str) -> None:
    """Raise ValueError if a file is not what it was; a run killed right after a save has left no checksums."""
    noted = Path(path, CHECKSUMS)
    if not noted.exists():
        return
    found = file_checksums(path)
    for name, checksum in json.loads(noted.read_text()).items():
        if found.get(name) != checksum:
            raise ValueError(f"{name} is {'not what was written' if name in found else 'missing'}")


def restore_checkpoint(
    resume_from: str, output_dir: str, state: TrainState, identity: Mapping[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
    """Read the checkpoint to go on from, (state, progress); where the newest is damaged, the one before it."""
    source = os.path.abspath(output_dir if resume_from == "latest" else resume_from)
    if not os.path.isdir(source):
        fail(f"--resume_from_checkpoint {source}: no such directory")
    paths = [source] if os.path.isdir(os.path.join(source, "state")) else [path for _, path in find_checkpoints(source)]
    if not paths:
        fail(f"--resume_from_checkpoint: there is no checkpoint in {source}; leave the flag out to start anew")
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    for path in paths:
        try:
            check_checksums(path)
            progress = checkpointer.restore(path, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]
            check_identity(progress["identity"], identity, path)
            contents = ocp.args.Composite(state=ocp.args.StandardRestore(target))
            return checkpointer.restore(path, args=contents)["state"], progress
        except Exception as error:
            logger.warning("%s is damaged and passed over: %s", path, first_line(error)[:200])
            if jax.process_index() == 0 and len(paths) > 1:
                os.replace(path, f"{path}.damaged")  # so that it does not count as the newest
    fail(f"--resume_from_checkpoint: no checkpoint in {source} can be read; leave the flag out to start anew")


# Flags that a resumed run may change: they decide what is written, where and when, not what is computed.
FREE_FLAGS = {
    "output_dir", "overwrite_output_dir", "do_train", "do_eval", "per_device_eval_batch_size", "logging_steps",
    "logging_first_step", "save_steps", "save_total_limit", "save_safetensors", "eval_steps", "resume_from_checkpoint",
    "push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "multihost", "coordinator_address", "num_processes",
    "process_id", "cache_dir", "overwrite_cache", "preprocessing_num_workers", "max_eval_samples", "trust_remote_code",
    "validation_file", "validation_ref_file",
    # Compared by what they yield: rows of tokens, a configuration, the size of a batch.
    "train_file", "train_ref_file", "dataset_name", "dataset_config_name", "config_name", "config_overrides",
    "model_name_or_path", "model_type", "tokenizer_name", "use_fast_tokenizer", "per_device_train_batch_size",
    "gradient_accumulation_steps", "num_train_epochs", "max_steps", "warmup_steps", "warmup_ratio",
}  # fmt: skip


def run_identity(arguments: Sequence[Any], config: PretrainedConfig, plan: Plan, data: Any) -> dict[str, Any]:
    """Everything that a run's result follows from, by a name that a person understands."""
    flags = {f"--{name}": value for name, value in public_arguments(*arguments).items() if name not in FREE_FLAGS}
    configuration = {
        f"the configuration's {name}": value
        for name, value in json.loads(config.to_json_string(use_diff=False)).items()
        if name not in ("transformers_version", "_name_or_path", "architectures", "torch_dtype", "dtype")
    }
    return {
        **flags,
        **configuration,
        "the number of steps (--max_steps, --num_train_epochs)": plan.num_steps,
        "the number of warmup steps (--warmup_steps, --warmup_ratio)": plan.num_warmup_steps,
        "the batch size (--per_device_train_batch_size x devices x --gradient_accumulation_steps)": plan.train_batch_size,
        "the training data (checksum)": data,
    }


def check_identity(saved: Mapping[str, Any], current: Mapping[str, Any], path: str) -> None:
    """Refuse to go on with other settings than those the checkpoint was made with."""
    for name in [*current, *(saved.keys() - current.keys())]:
        if saved.get(name) != current.get(name):
            fail(
                f"{name} is {current.get(name)}, but {path} was made with {saved.get(name)}: going on would not give what an"
                " uninterrupted run gives; restore it, or start anew without --resume_from_checkpoint"
            )


def data_checksum(rows: TokenRows) -> int:
    """A checksum of the number of rows and of up to a thousand of them."""
    checksum = 0
    for name, array in sorted(rows.items()):
        sample = np.asarray(array[:: max(1, len(array) // 1000)])
        checksum = zlib.crc32(sample.tobytes(), zlib.crc32(f"{name} {array.shape}".encode(), checksum))
    return checksum


# ---- Scaffolding: the Hub ------------------------------------------------------------------------------------------------


class Hub:
    """Uploads to the Hugging Face Hub in the background, one at a time; training never waits for them.

    A failed upload is tried again, then reported; the next one brings everything that it would have brought.
    """

    NUM_TRIES = 5
    TIMEOUT = 120.0  # seconds without an answer after which a request counts as failed

    def __init__(self, training_args: TrainingArguments):
        self.args, self.failed, self.thread = training_args, False, None
        name = training_args.hub_model_id or os.path.basename(os.path.abspath(training_args.output_dir))
        huggingface_hub.configure_http_backend(self.make_session)
        self.api = huggingface_hub.HfApi(token=training_args.hub_token)
        try:
            url = self.api.create_repo(name, private=training_args.hub_private_repo or None, exist_ok=True)
            self.repo_id = url.repo_id
        except (OSError, ValueError) as error:
            fail(f"--push_to_hub: the repository {name} cannot be created: {self.describe(error)}")
        logger.info("Uploading to %s", url)

    def make_session(self) -> requests.Session:
        """The client waits for an answer without end, so set a limit."""
        session = requests.Session()
        send = session.send
        session.send = lambda request, **kwargs: send(request, **kwargs | {"timeout": kwargs.get("timeout") or self.TIMEOUT})
        return session

    def push(self, step: int, final: bool = False) -> None:
        """Upload what output_dir holds now; while an upload is under way only the final one waits for it and follows."""
        if final:
            logger.info("Uploading to the Hub: the last state")
            self.join()
        elif (self.thread and self.thread.is_alive()) or self.args.hub_strategy == "end":
            return
        self.thread = threading.Thread(target=self.upload, args=(step, self.snapshot(step), final), name="upload", daemon=True)
        self.thread.start()
        if final:
            self.join()

    def join(self) -> None:
        if self.thread:
            self.thread.join()

    def snapshot(self, step: int) -> tempfile.TemporaryDirectory:
        """The files to upload as they are now: linked, since training replaces them whole; events copied, since they grow."""
        source = Path(self.args.output_dir)
        snapshot = tempfile.TemporaryDirectory(dir=source, prefix=".saving-")
        for path in source.iterdir():
            if path.is_file() and path.suffix != ".tmp":
                copy_file = shutil.copy2 if path.name.startswith("events.out.tfevents") else os.link
                copy_file(path, os.path.join(snapshot.name, path.name))
        checkpoint = checkpoint_path(self.args.output_dir, step)
        if self.args.hub_strategy == "checkpoint" and os.path.isdir(checkpoint):
            shutil.copytree(checkpoint, os.path.join(snapshot.name, "last-checkpoint"), copy_function=os.link)
        return snapshot

    def upload(self, step: int, snapshot: tempfile.TemporaryDirectory, final: bool) -> None:
        message = f"Step {step}, the last of this run" if final else f"Step {step}"
        with snapshot:
            for attempt in range(self.NUM_TRIES):
                try:
                    replaced = ["last-checkpoint/**"] if self.args.hub_strategy == "checkpoint" else None
                    self.api.upload_folder(
                        repo_id=self.repo_id, folder_path=snapshot.name, commit_message=message, delete_patterns=replaced
                    )
                    self.failed = False
                    return
                except Exception as error:
                    self.failed = True
                    logger.warning("Upload of step %d failed: %s", step, self.describe(error))
                    if not self.is_temporary(error) or attempt == self.NUM_TRIES - 1:
                        break
                    time.sleep(min(2.0**attempt, 30))
        logger.error("Step %d is not on the Hub; training goes on. By hand: %s", step, self.by_hand())

    def by_hand(self) -> str:
        return f"hf upload {self.repo_id} {self.args.output_dir} . --exclude 'checkpoint-*' '.saving-*'"

    @staticmethod
    def describe(error: BaseException) -> str:
        """The reason in a line; the client hides it behind errors of its own."""
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        reason = {401: "the token is wrong or missing", 403: "the token may not write there"}.get(status, first_line(cause))
        return f"{reason} (HTTP {status})" if status else reason

    @staticmethod
    def is_temporary(error: BaseException) -> bool:
        """Is it worth trying again: no answer, a server in trouble, too many requests?"""
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return status in (408, 429) or status >= 500
        return isinstance(cause, requests.RequestException)


def write_model_card(
    training_args: TrainingArguments,
    arguments: Sequence[Any],
    model: FlaxPreTrainedModel,
    log: TrainingLog,
    results: Mapping[str, float],
    history: Mapping[int, Mapping[str, float]],
    repo_id: str | None,
) -> None:
    """README.md for people who find the model: what it was trained on and how, results, curves, how to load it."""
    flags, info = public_arguments(*arguments), run_info(*arguments)
    data = flags["dataset_name"] or os.path.basename(flags["train_file"] or flags["validation_file"])
    architecture = type(model).__name__.removeprefix("Flax")
    name = repo_id or os.path.basename(os.path.abspath(training_args.output_dir))
    draw_curves(os.path.join(training_args.output_dir, "training_curves.png"), log.curve, history)
    table = "\n".join(f"| {key} | {value:.4g} |" for key, value in sorted(results.items()))
    versions = ", ".join(f"{key} {value}" for key, value in info["versions"].items())
    card = f"""---
library_name: transformers
tags: [{", ".join(("jax", "flax", model.config.model_type, "generated_from_script"))}]
---

# {name}

{architecture} trained by `{info["script"]}` on {data}, from {flags["model_name_or_path"] or "fresh weights"}.

![Training and evaluation curves](training_curves.png)

| result | value |
|---|---|
{table}

## How it was trained

`python {info["script"]} {changed_arguments(*arguments)}`

Devices: {len(info["devices"])} of kind {info["device_kind"]}. Versions: {versions}.

## How to load it

```python
from transformers import {architecture}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {architecture}.from_pretrained("{name}")  # PyTorch, transformers 4 or 5
```

```python
from transformers import Flax{architecture}

model = Flax{architecture}.from_pretrained("{name}")  # Flax, transformers 4
```
"""
    write_text(os.path.join(training_args.output_dir, "README.md"), card)


def draw_curves(path: str, training: Sequence[tuple[int, float]], history: Mapping[int, Mapping[str, float]]) -> None:
    """A picture of the loss: training (mean of each logging window) and evaluation."""
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*training, strict=True), label="training")
    if history:
        axes.plot(
            *zip(*((step, history[step]["eval_loss"]) for step in sorted(history)), strict=True), "o-", label="evaluation"
        )
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(f"{path}.tmp", format="png", dpi=120)
    os.replace(f"{path}.tmp", path)


# ---- Main ----------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train and evaluate as the arguments say (default: the command line); returns the results it also writes."""
    model_args, data_args, training_args = arguments = parse_arguments(argv)
    set_up_logging()
    logger.info("Arguments other than the defaults: %s", changed_arguments(*arguments))

    initialize_distributed(training_args)
    hub = Hub(training_args) if training_args.push_to_hub and jax.process_index() == 0 else None

    # Text to rows of tokens. With one process nothing here touches a device, so that it can still be forked.
    with main_process_first():
        config = load_config(model_args)
        tokenizer = load_tokenizer(model_args)
    check_attention(training_args.attention_implementation, config)
    match_config_and_tokenizer(config, tokenizer, model_args)
    row_length = choose_row_length(data_args, config, tokenizer)
    data_args.adapt_config(config, row_length)
    collator = Collator(tokenizer, config, data_args, row_length)
    stream, rows = prepare_data(data_args, model_args, training_args, tokenizer, collator)
    num_rows = {split: len(columns["input_ids"]) for split, columns in rows.items()}

    # Sizes, weights, and the compiled programs.
    plan = make_plan(training_args, None if stream else num_rows.get("train", 0), collator.row_length)
    with main_process_first():
        prepare_output_dir(training_args)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    model, params = load_params(config, model_args, training_args, mesh)
    log_plan(plan, num_rows, collator.row_length, params)
    advise_on_cpu(model_args.dtype)
    p_train_step, p_eval_step, optimizer = compile_steps(model, training_args, plan, mesh)
    evaluator = Evaluator(rows.get("validation"), collator, plan, training_args.seed, mesh, p_eval_step)
    results: dict[str, float] = {}
    with StopSignal() as stop, logging_redirect_tqdm([logger] if sys.stderr.isatty() else []):
        writer = log = saver = None
        if training_args.do_train:
            identity = run_identity(arguments, config, plan, stream_name(data_args) if stream else data_checksum(rows["train"]))
            saver = Saver(training_args, model, tokenizer, identity, hub)
            state, progress = start_or_resume(params, optimizer, training_args, identity, mesh)
            del params
            write_results(training_args, "run_info.json", run_info(*arguments))
            writer = open_training_writer(training_args.output_dir, progress)
            log = TrainingLog(training_args, plan, writer, Stopwatch())
            if progress:
                log.resume(progress)
                saver.resume(progress["step"])
                evaluator.history = {int(step): metrics for step, metrics in progress["evaluations"].items()}
            step, position = int(state.step), progress["positions"][plan.process_index] if progress else None
            if stream:
                batches = stream.batches(plan, step, position)
            else:
                batches = train_batches(rows["train"], collator, plan, training_args.seed, step)
            batches = put_on_devices(batches, mesh, PartitionSpec(None, "data"), stop)
            dropout_rng = device_rng(training_args.seed, "dropout", impl="rbg")
            state = train(state, batches, p_train_step, dropout_rng, training_args, log, evaluator, saver, stop, position)
            params = state.params
            saver.wait()
            results |= log.results(num_rows.get("train"))
            write_results(training_args, "train_results.json", results)
        else:
            write_results(training_args, "run_info.json", run_info(*arguments))
        if training_args.do_eval:
            writer = writer if log else open_writer(training_args.output_dir)
            metrics = evaluator(params, plan.num_steps, writer, stop)
            write_results(training_args, "eval_results.json", metrics)
            results |= metrics
        if writer:
            writer.close()
        if writer and log:
            write_model_card(training_args, arguments, model, log, results, evaluator.history, hub and hub.repo_id)
        if hub:
            hub.push(plan.num_steps, final=True)
    check_all_is_saved(saver, hub)
    return results


def check_all_is_saved(saver: Saver | None, hub: Hub | None) -> None:
    """Let the exit status tell if the last state did not get to the disk or to the Hub."""
    if saver and saver.failed:
        raise NotSavedError(
            f"the state after the last step was not saved in {saver.args.output_dir}; the log says why, earlier ones are there"
        )
    if hub and hub.failed:
        raise NotSavedError(f"the last upload failed; the files are all here, to upload them: {hub.by_hand()}")


class NotSavedError(Exception):
    """Training has ended, but its result is not where it should be."""


def silence_late_writes() -> None:
    """When a save fails, orbax stops listening to its other writes; each would protest, in one of these ways."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = lambda unraisable: (
        str(unraisable.exc_value) == "Event loop is closed" or sys.__unraisablehook__(unraisable)
    )


def run() -> int:
    """main() as a program: exit status 0, or what went wrong in one line."""
    silence_late_writes()
    try:
        main()
    except Stopped as stopped:
        print(f"{Path(__file__).name}: {stopped}", file=sys.stderr)
        return 128 + stopped.signum
    except (NonFiniteError, NotSavedError) as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{Path(__file__).name}: interrupted before training began; nothing to save", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())
