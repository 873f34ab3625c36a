#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Pretrain or fine-tune a masked language model (RoBERTa, BERT, ALBERT, ...) with JAX and Flax.

A share of the tokens is hidden and the model predicts them from both sides (Devlin et al. 2019, arXiv:1810.04805; masks
are redrawn for every batch as in Liu et al. 2019, arXiv:1907.11692). These commands work as pasted, on a laptop too:

    python quickstart/python_docs_corpus.py --output_dir corpus
    python prepare_model_dir.py --model_type roberta --train_file corpus/train.txt --vocab_size 4096 \
        --config_overrides "hidden_size=128,num_hidden_layers=2,intermediate_size=512" --output_dir my-roberta
    python run_mlm_flax.py --config_name my-roberta --tokenizer_name my-roberta --output_dir my-run \
        --train_file corpus/train.txt --validation_file corpus/validation.txt --max_seq_length 128 --max_steps 300 \
        --per_device_train_batch_size 16 --learning_rate 2e-3 --warmup_steps 30 --logging_steps 50

Weights (for Flax and for PyTorch), tokenizer, results and TensorBoard curves are in my-run afterwards. All that decides what
the model learns is in this file, from the flags of the objective to the loop at the end; what keeps it running is in the
package flaxlm. To make an objective of your own, copy this file and change it.
"""

import functools
import json
import math
import os
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

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
    files,
    generation,
    hub,
    inputs,
    logs,
    losses,
    models,
    optimizers,
    processes,
    randomness,
    runs,
    sharding,
    token_ids,
    token_rows,
    tokenization,
    weights,
)

# Shape letters at the end of names, outermost dimension first:
#   A  micro-batches in one update      D  devices of this process      B  rows per device       T  tokens in a row
#   V  vocabulary                       H  hidden size                  K  labelled positions per device
# A joined letter is a merged dimension: input_ids_NT holds N = A * D * B rows. Model inputs keep their transformers names.


# ---- Flags of the objective ----------------------------------------------------------------------------------------------


@dataclass
class DataTrainingArguments(arguments.DataArguments):
    """What to train on, and how rows are made and masked."""

    noise: ClassVar[tuple[str, ...]] = ("mlm_probability",)

    train_ref_file: str | None = field(
        default=None,
        metadata={
            "help": "Word references for whole-word masking (Chinese): for each text row a JSON list with the positions"
            " of the tokens, [CLS] being 0, that continue a word."
        },
    )
    validation_ref_file: str | None = field(default=None, metadata={"help": "The same for validation_file."})
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Tokens per row. Unset: what tokenizer and model can take, at most 1024."}
    )
    line_by_line: bool = field(
        default=False, metadata={"help": "One text row = one truncated row of tokens; unset: texts are joined and cut."}
    )
    pad_to_max_length: bool = field(
        default=False,
        metadata={"help": "line_by_line: pad to max_seq_length; unset: to the longest row (a multiple of 16)."},
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens to predict, in (0, 1)."})
    whole_word_mask: bool = field(
        default=False, metadata={"help": "Mask all tokens of a word together; in scripts without spaces, of a character."}
    )

    def check(self, model_args: arguments.ModelArguments) -> None:
        """Refuse impossible settings of the objective before anything is loaded."""
        if not 0 < self.mlm_probability < 1:
            cli.fail(f"--mlm_probability {self.mlm_probability}: must lie between 0 and 1, both excluded")
        if self.whole_word_mask and not model_args.use_fast_tokenizer:
            cli.fail("--whole_word_mask: needs the fast tokenizer's character offsets; drop --no_use_fast_tokenizer")
        if self.streaming and self.train_ref_file:
            cli.fail("--train_ref_file: not with --streaming, which does not know the row of a text")
        for split in ("train", "validation"):
            flag, path = f"--{split}_ref_file", getattr(self, f"{split}_ref_file")
            if path and not self.whole_word_mask:
                cli.fail(f"{flag}: holds word references, which only --whole_word_mask uses; add that flag or drop this one")
            if path and not getattr(self, f"{split}_file"):
                cli.fail(f"{flag}: refers to the rows of --{split}_file, which is not given")
            if path and not os.path.isfile(path):
                cli.fail(f"{flag} {path}: no such file")
            names = getattr(self, f"{split}_file")
            if path and len(inputs.find(names, f"--{split}_file", model_args.token).paths) > 1:
                cli.fail(f"{flag} {path}: refers to the rows of one file, and --{split}_file names several; put them into one")

    def adapt_config(self, config: PretrainedConfig, row_length: int) -> None:
        """BigBird sees all of a row."""
        configurations.give_full_attention(config, row_length)

    def add_columns(self, dataset: datasets.Dataset, split: str) -> datasets.Dataset:
        """Add the word references of a file, one JSON list for every row, or for every row that is not blank."""
        path = getattr(self, f"{split}_ref_file")
        if path is None:
            return dataset
        if files.find_token_column(dataset, self.text_column_name, self.token_depths):
            cli.fail(f"--{split}_ref_file {path}: refers to rows of text, and the data is tokenised already")
        try:
            lines = Path(path).read_text("utf-8-sig").splitlines()
            references = [json.loads(line) for line in lines if line.strip()]
        except ValueError as error:
            cli.fail(f"{path}: is not one JSON list per line: {cli.first_line(error)}")
        texts = dataset[files.find_text_column(dataset, self.text_column_name)]
        blank = [not text or text.isspace() for text in texts]
        if len(references) == len(blank) - sum(blank):
            remaining = iter(references)
            references = [[] if is_blank else next(remaining) for is_blank in blank]
        if len(references) != len(blank):
            cli.fail(f"{path}: has {len(references)} word references for {len(blank)} rows ({sum(blank)} of them blank)")
        return dataset.add_column(REFERENCE_COLUMN, references)


# ---- Text to rows of tokens ----------------------------------------------------------------------------------------------


REFERENCE_COLUMN = "word_references"


def tokenize_texts(
    batch: Mapping[str, list],
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    max_length: int | None,
    with_word_starts: bool,
) -> dict[str, list]:
    """Tokenise the non-blank texts of one `Dataset.map` batch, with the special tokens that the tokenizer adds.

    Texts are truncated to `max_length` if that is given. A second column, `word_starts`, is 1 where a word begins.
    """
    if token_ids.are_ids(batch[text_column]):
        return take_tokens(batch[text_column], tokenizer, max_length, with_word_starts)
    keep = [i for i, text in enumerate(batch[text_column]) if text and not text.isspace()]
    texts = [batch[text_column][i] for i in keep]
    if not texts:
        return {"input_ids": [], **({"word_starts": []} if with_word_starts else {})}
    with tokenization.tokenizer_as_loaded(tokenizer):
        encoding = tokenizer(
            texts,
            truncation=max_length is not None,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=with_word_starts,
            return_special_tokens_mask=with_word_starts,
            verbose=False,
        )
    if not with_word_starts:
        return {"input_ids": encoding["input_ids"]}
    word_starts = list(map(find_word_starts, texts, encoding["offset_mapping"], encoding["special_tokens_mask"]))
    if REFERENCE_COLUMN in batch:
        for starts, i in zip(word_starts, keep, strict=True):
            continues = np.asarray(batch[REFERENCE_COLUMN][i], np.int64)
            starts[continues[(continues > 0) & (continues < len(starts))]] = 0
    return {"input_ids": encoding["input_ids"], "word_starts": word_starts}


def take_tokens(
    lists: Sequence[list[int] | None], tokenizer: PreTrainedTokenizerBase, max_length: int | None, with_word_starts: bool
) -> dict[str, list]:
    """The same of texts that are tokenised already: their tokens as they are. Words are found in what they stand for."""
    input_ids = token_ids.known_ids(lists, tokenizer)
    columns: dict[str, list] = {"input_ids": input_ids}
    if with_word_starts:
        columns["word_starts"] = list(map(find_word_starts, *token_ids.decode_with_offsets(input_ids, tokenizer)))
    if max_length is None:
        return columns
    kept = [token_ids.truncated(ids, max_length, tokenizer) for ids in input_ids]
    return {
        name: [np.asarray(row)[positions] for row, positions in zip(rows, kept, strict=True)] for name, rows in columns.items()
    }


def find_word_starts(text: str, offsets: Sequence[tuple[int, int]], special_tokens_mask: Sequence[int]) -> np.ndarray:
    """Mark the tokens that begin a word: int32 [tokens], 1 at a beginning.

    Only characters count, so byte-level BPE, WordPiece and unigram tokenizers agree: a word is a run of letters and digits;
    punctuation, symbols and the characters of scripts without spaces stand alone. A combining mark belongs to what it stands
    behind. `offsets` are the fast tokenizer's (start, end).
    """
    start, end = np.asarray(offsets, np.int64).reshape(-1, 2).T
    codepoints, inverse = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_inverse=True)
    in_word, is_mark, is_space = (
        np.append(np.array([is_kind(chr(c)) for c in codepoints], bool)[inverse], False)
        for is_kind in (is_word_character, is_combining_mark, str.isspace)
    )
    in_word = in_word[np.maximum.accumulate(np.where(is_mark, 0, np.arange(len(is_mark))))]  # as what a mark stands behind
    num_visible = np.append(0, np.cumsum(~is_space[:-1]))
    blank = num_visible[start] == num_visible[end]
    special = np.asarray(special_tokens_mask, bool)

    previous_end = end[:-1]
    touches = start[1:] == previous_end
    same_word = touches & in_word[start[1:]] & in_word[previous_end - 1]
    same_letter = touches & is_mark[start[1:]] & ~is_space[previous_end - 1]
    after_its_space = touches & blank[:-1] & ~blank[1:]  # some tokenizers have pieces of mere white space
    same_character = start[1:] < previous_end  # byte-level pieces of one character share its offsets
    starts = np.ones(len(start), np.int32)
    starts[1:] = ~((same_word | same_letter | after_its_space | same_character) & ~special[1:] & ~special[:-1])
    return starts


# Scripts that put no spaces between words, by the names that Unicode gives their characters: of East Asia, of South-East Asia
# and Tibet, and of antiquity. Without a dictionary nobody can tell words there: a whole row would be one.
SCRIPTS_WITHOUT_SPACES = {
    "CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HENTAIGANA", "BOPOMOFO", "HANGZHOU", "YI", "NUSHU", "TANGUT", "KHITAN",
    "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "TAI", "AHOM", "CHAM", "JAVANESE", "BALINESE", "SUNDANESE", "BATAK",
    "BUGINESE", "MAKASAR", "REJANG", "KAWI", "MARCHEN", "SOYOMBO", "ZANABAZAR", "BRAHMI", "GRANTHA", "SIDDHAM", "VAI",
    "CUNEIFORM", "EGYPTIAN", "ANATOLIAN", "LINEAR", "CYPRIOT",
}  # fmt: skip


@functools.cache
def is_word_character(character: str) -> bool:
    """True for what continues a word: letters, digits, marks and underscore, but not in scripts without spaces."""
    name = unicodedata.name(character, "").replace("-", " ").split()[:2]  # the script is the first word, or the second
    is_letter = unicodedata.category(character)[0] in "LNM"
    return character == "_" or (is_letter and SCRIPTS_WITHOUT_SPACES.isdisjoint(name))


@functools.cache
def is_combining_mark(character: str) -> bool:
    """True for accents, vowel signs, tone marks and the like, which are written on, below or around the letter before."""
    return unicodedata.category(character)[0] == "M"


# ---- Rows to batches: noise and labels -----------------------------------------------------------------------------------


class Collator:
    """Hide tokens for masked language modelling: a pure function of rows and uniform random numbers.

    Of the ordinary tokens (not special, not padding) a share `mlm_probability` is selected, token by token or word by word;
    a selected token becomes the mask token in 80 % of cases, an ordinary token drawn at random in 10 %, and stays in 10 %
    (Devlin et al. 2019, section 3.1). Labels come as flat positions within each device's rows, at most `K` of them, so that
    the model has to score the vocabulary only there; `K` is six standard deviations above the mean, hence shapes are fixed.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
        data_args: DataTrainingArguments,
        max_seq_length: int,
    ):
        for name, use in (("mask_token", "hide words"), ("pad_token", "fill up rows")):
            if getattr(tokenizer, name) is None:
                cli.fail(f"--tokenizer_name: has no {name}, needed to {use}; use a tokenizer made for masked models")
        # Rows of tokens: their columns with what fills them up, their length, and how text becomes tokens.
        self.columns = {"input_ids": tokenizer.pad_token_id} | ({"word_starts": 1} if data_args.whole_word_mask else {})
        if data_args.document_attention:
            self.columns[token_rows.TEXT_STARTS] = 0
        self.row_length, self.line_by_line = max_seq_length, data_args.line_by_line
        self.pad_to = max_seq_length if data_args.pad_to_max_length else None
        self.tokenize_options = {
            "max_length": max_seq_length if data_args.line_by_line else None,
            "with_word_starts": data_args.whole_word_mask,
        }
        self.draws_per_row = max_seq_length  # uniform numbers that __call__ needs for a row

        ids = np.array(sorted(tokenizer.get_vocab().values()), np.int32)
        self.ordinary_ids = np.setdiff1d(ids, tokenizer.all_special_ids)
        self.is_special_V = np.zeros(ids[-1] + 1, bool)
        self.is_special_V[[i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id]] = True
        self.pad_token_id = tokenizer.pad_token_id
        self.mask_token_id = tokenizer.mask_token_id
        self.mlm_probability = data_args.mlm_probability

    def num_label_positions(self, num_tokens: int, mean_squared_unit: float = 1.0) -> int:
        """Capacity K for `num_tokens` positions: mean + 6 sigma of a binomial, rounded up to a multiple of 16."""
        mean = num_tokens * self.mlm_probability
        sigma = math.sqrt(mean * (1 - self.mlm_probability) * mean_squared_unit)
        return min(num_tokens, 16 * math.ceil((mean + 6 * sigma) / 16))

    def __call__(
        self, rows: Mapping[str, np.ndarray], uniforms_NR: np.ndarray, is_real_N: np.ndarray, num_groups: int
    ) -> dict[str, np.ndarray]:
        """Collate N rows for `num_groups` equal groups (devices x micro-batches) of N / num_groups rows.

        Args:
            rows: `input_ids` int [N, T]; `word_starts` [N, T] for whole-word masking; `text_starts` if texts are apart.
            uniforms_NR: float64 [N, draws_per_row] in [0, 1), the only source of randomness; the first T of a row are used.
            is_real_N: bool [N]; rows that only fill up a batch are False and get no label.

        Returns:
            input_ids, attention_mask int32 [N, T]; label_positions, labels int32 and label_weights float32 [num_groups * K].
        """
        input_ids_NT = rows["input_ids"].astype(np.int32)
        uniforms_NT = uniforms_NR[:, : input_ids_NT.shape[1]]  # rows that are texts may be narrower than the limit
        attention_mask_NT = token_rows.number_texts(rows, input_ids_NT != self.pad_token_id)
        starts_word_NT, selected_NT = self.select(rows, input_ids_NT, uniforms_NT, is_real_N)
        K = self.num_label_positions(input_ids_NT.size // num_groups, 4.0 if "word_starts" in rows else 1.0)
        flat_positions = np.flatnonzero(self.within_capacity(selected_NT, starts_word_NT, num_groups, K))

        labels = input_ids_NT.reshape(-1)[flat_positions]
        # Given that a unit was selected, its uniform number is uniform in [0, mlm_probability): what is left of it decides
        # between mask, random and unchanged, and which random token. Later tokens of a word have an unused number.
        chance = uniforms_NT.reshape(-1)[flat_positions]
        chance = np.where(starts_word_NT.reshape(-1)[flat_positions], chance / self.mlm_probability, chance)
        random_ids = self.ordinary_ids[(np.clip((chance - 0.8) / 0.1, 0, 1 - 1e-9) * len(self.ordinary_ids)).astype(np.int64)]
        shown = np.where(chance < 0.8, self.mask_token_id, np.where(chance < 0.9, random_ids, labels))
        input_ids_NT.reshape(-1)[flat_positions] = shown

        group, position = np.divmod(flat_positions, input_ids_NT.size // num_groups)
        slot = np.arange(len(group)) - np.searchsorted(group, np.arange(num_groups))[group]
        batch = {
            "input_ids": input_ids_NT,
            "attention_mask": attention_mask_NT,
            "label_positions": np.zeros((num_groups, K), np.int32),
            "labels": np.zeros((num_groups, K), np.int32),
            "label_weights": np.zeros((num_groups, K), np.float32),
        }
        for name, values in (("label_positions", position), ("labels", labels), ("label_weights", 1)):
            batch[name][group, slot] = values
            batch[name] = batch[name].reshape(-1)
        return batch

    def select(self, rows, input_ids_NT, uniforms_NT, is_real_N) -> tuple[np.ndarray, np.ndarray]:
        """Select positions to predict; also say which positions begin a unit (a token, or a word): two bool [N, T]."""
        maskable_NT = ~self.is_special_V[input_ids_NT] & is_real_N[:, None]
        if "word_starts" not in rows:
            return np.ones_like(maskable_NT), (uniforms_NT < self.mlm_probability) & maskable_NT
        starts_word_NT = rows["word_starts"].astype(bool)
        starts_word_NT[:, 0] = True  # a word cut by the row's border
        start_NT = np.maximum.accumulate(np.where(starts_word_NT, np.arange(starts_word_NT.shape[1]), 0), axis=1)
        word_uniforms_NT = np.take_along_axis(uniforms_NT, start_NT, axis=1)
        return starts_word_NT, (word_uniforms_NT < self.mlm_probability) & maskable_NT

    @staticmethod
    def within_capacity(selected_NT, starts_word_NT, num_groups: int, K: int) -> np.ndarray:
        """Deselect whole units, spread over the group, where a group has more than K positions (hardly ever)."""
        selected = selected_NT.reshape(num_groups, -1)
        for group in np.flatnonzero(selected.sum(axis=1) > K):
            unit = np.cumsum(starts_word_NT.reshape(num_groups, -1)[group])
            sizes = np.bincount(unit, weights=selected[group])
            order = np.argsort(np.arange(len(sizes)) * 0.6180339887498949 % 1)  # a fixed, evenly spread order
            keep = np.zeros(len(sizes), bool)
            keep[order] = np.cumsum(sizes[order]) <= K
            selected[group] &= keep[unit]
        return selected


# ---- Loss ----------------------------------------------------------------------------------------------------------------


MODELS = models.MASKED


def loss_fn(
    params,
    batch: Mapping[str, jax.Array],
    model: nn.Module,
    rngs: Mapping[str, jax.Array] | None = None,
    z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum of the cross-entropies at the labelled positions of one device's rows, in float32; with dropout if there are `rngs`.

    Returns:
        The sum, and {"weight": number of labels, "correct": labels that score highest}; all scalars, to be summed over
        micro-batches and devices before the division. With `z_loss` the sum is the two parts that stand beside the others:
        "loss", the cross-entropies, and "z_loss".
    """
    hidden_BTH = model.apply({"params": params}, batch["input_ids"], batch["attention_mask"], rngs=rngs)
    labels = batch["label_positions"], batch["labels"], batch["label_weights"]
    loss, sums = losses.labelled_cross_entropy(model, params, hidden_BTH, *labels, z_loss)
    return loss, {"weight": batch["label_weights"].sum(), **sums}


def eval_metrics(totals: Mapping[str, float]) -> dict[str, float]:
    """Evaluation results from the sums over all labels: loss (nats per label), accuracy, perplexity."""
    loss = totals["loss"] / max(totals["weight"], 1)
    accuracy = totals["correct"] / max(totals["weight"], 1)
    return {"eval_loss": loss, "eval_accuracy": accuracy, "eval_perplexity": float(np.exp(loss))}


# ---- Steps ---------------------------------------------------------------------------------------------------------------


def sum_gradients(
    params: Any, batch: Mapping[str, jax.Array], step_rng: jax.Array, loss_fn: Callable, z_loss: float = 0.0
) -> tuple[dict[str, jax.Array], Any]:
    """Loss, weight and gradients of [A, ...] micro-batches; runs on each device with its own rows.

    Sums over micro-batches and then over devices, to be divided once, so every label counts the same however the rows are
    spread. "stop" is above 0 if any process was told to stop, so that all learn it at the same step.
    """
    device_rng = jax.random.fold_in(step_rng, jax.lax.axis_index("data"))
    names = ("loss", "weight", "z_loss") if z_loss else ("loss", "weight")

    def add_micro_batch(sums, indexed_micro_batch):
        index, micro_batch = indexed_micro_batch
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        rngs = {"dropout": jax.random.fold_in(device_rng, index)}
        (loss, aux), grads = grad_fn(params, micro_batch, rngs=rngs, z_loss=z_loss)
        found = {"loss": loss, **aux}  # with z_loss the loss that aux tells is the cross-entropy alone
        return jax.tree.map(jnp.add, sums, ({name: found[name] for name in names}, grads)), None

    zeros = {name: jnp.zeros(()) for name in names}, jax.tree.map(jnp.zeros_like, params)
    micro_batches = {name: array for name, array in batch.items() if name != "stop"}
    (sums, grads), _ = jax.lax.scan(add_micro_batch, zeros, (jnp.arange(len(batch["stop"])), micro_batches))
    return sharding.sum_over_devices((sums | {"stop": batch["stop"].max()}, grads))


def train_step(
    state: sharding.TrainState,
    batch: Mapping[str, jax.Array],
    dropout_rng: jax.Array,
    gradients_fn: Callable,
    optimizer: optax.GradientTransformation,
    learning_rate_fn: optax.Schedule,
) -> tuple[sharding.TrainState, dict[str, jax.Array]]:
    """One update, of whole arrays wherever their parts lie, by the gradients that the devices have summed.

    Metrics: loss per label, with z_loss that too, number of labels, gradient norm before clipping, learning rate, stop.
    """
    sums, grads = gradients_fn(state.params, batch, jax.random.fold_in(dropout_rng, state.step))
    num_labels = jnp.maximum(sums["weight"], 1)
    grads = jax.tree.map(lambda grad: grad / num_labels, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = sums | {
        **{name: total / num_labels for name, total in sums.items() if name.endswith("loss")},
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
