#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Pretrain or fine-tune BART, a denoising encoder-decoder, with JAX and Flax.

The sentences of a text are permuted, spans of it replaced by a mask token each, and the model writes down the text as it
was (Lewis et al. 2019, arXiv:1910.13461). These commands work as pasted, on a laptop too:

    python quickstart/python_docs_corpus.py --output_dir corpus
    python prepare_model_dir.py --model_type bart --train_file corpus/train.txt --vocab_size 4096 \
        --config_overrides "d_model=128,encoder_layers=2,decoder_layers=2,encoder_attention_heads=2,\
decoder_attention_heads=2,encoder_ffn_dim=512,decoder_ffn_dim=512,max_position_embeddings=128" --output_dir my-bart
    python run_bart_dlm_flax.py --config_name my-bart --tokenizer_name my-bart --output_dir my-run \
        --train_file corpus/train.txt --validation_file corpus/validation.txt --max_seq_length 128 --max_steps 300 \
        --per_device_train_batch_size 16 --learning_rate 2e-3 --warmup_steps 30 --logging_steps 50

Weights (for Flax and for PyTorch), tokenizer, results and TensorBoard curves are in my-run afterwards. All that decides what
the model learns is in this file, from the flags of the objective to the loop at the end; what keeps it running is in the
package flaxlm. To make an objective of your own, copy this file and change it.
"""

import functools
import math
import sys
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
#   N  rows                             R  uniform numbers per row      G  stretches of all rows
#   S  sentences or spans of all rows   V  vocabulary                   H  hidden size           C  tokens in a chunk
# A joined letter is a merged dimension: input_ids_NT holds N = A * D * B rows. Model inputs keep their transformers names.


# ---- Flags of the objective ----------------------------------------------------------------------------------------------


@dataclass
class DataTrainingArguments(arguments.DataArguments):
    """What to train on, and what noise to put into it."""

    token_depths: ClassVar[tuple[int, ...]] = (1, 2)
    writes_text: ClassVar[bool] = True
    noise: ClassVar[tuple[str, ...]] = ("mlm_probability", "permute_sentence_ratio", "poisson_lambda")

    train_ref_file: str | None = field(default=None, metadata={"help": "Accepted for old commands; spans ignore words."})
    validation_ref_file: str | None = field(default=None, metadata={"help": "The same for validation_file."})
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Tokens per row. Unset: what tokenizer and model can take, at most 1024."}
    )
    mlm_probability: float = field(
        default=0.3, metadata={"help": "Share of tokens that spans hide, in [0, 1); 0: no infilling."}
    )
    permute_sentence_ratio: float = field(
        default=1.0, metadata={"help": "Share of the sentences of a document that change places, in [0, 1]; 0: none."}
    )
    poisson_lambda: float = field(
        default=3.0, metadata={"help": "Mean length of a span in tokens, in (0, 100]; empty spans only insert a mask."}
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
        if not 0 <= self.mlm_probability < 1:
            cli.fail(f"--mlm_probability {self.mlm_probability}: must be at least 0 and below 1")
        if not 0 <= self.permute_sentence_ratio <= 1:
            cli.fail(f"--permute_sentence_ratio {self.permute_sentence_ratio}: must lie between 0 and 1")
        if not 0 < self.poisson_lambda <= 100:
            cli.fail(f"--poisson_lambda {self.poisson_lambda}: must be above 0 and at most 100 tokens")
        sentences.check_language(self.sentence_language)
        if not model_args.use_fast_tokenizer:
            cli.fail("--no_use_fast_tokenizer: sentences are found by the fast tokenizer's character offsets; drop that flag")
        if self.train_ref_file or self.validation_ref_file:
            cli.logger.warning("--train_ref_file and --validation_ref_file have no effect: spans of noise ignore words.")


# ---- Text to rows of tokens ----------------------------------------------------------------------------------------------


def tokenize_texts(
    batch: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, text_column: str, sentence_language: str
) -> dict[str, list]:
    """Tokenise the non-blank texts of one `Dataset.map` batch, white space as it is, and mark where sentences start.

    Texts are tokenised whole, with the special tokens that the tokenizer adds. Needs a fast tokenizer, for its offsets.
    """
    if token_ids.are_ids(batch[text_column]):
        return take_tokens(batch[text_column], tokenizer, sentence_language)
    texts = [text for text in batch[text_column] if text and not text.isspace()]
    if not texts:
        return {"input_ids": [], "sentence_starts": []}
    with tokenization.tokenizer_as_loaded(tokenizer):
        encoding = tokenizer(
            texts,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
            verbose=False,
        )
    mark = functools.partial(mark_sentence_starts, language=sentence_language)
    return {"input_ids": encoding["input_ids"], "sentence_starts": list(map(mark, texts, encoding["offset_mapping"]))}


def take_tokens(lists: Sequence[list | None], tokenizer: PreTrainedTokenizerBase, sentence_language: str) -> dict[str, list]:
    """The same of texts that are tokenised already: their tokens as they are.

    In lists of sentences each begins one; in flat lists sentences are found in the text that the tokens stand for.
    """
    lists = [tokens for tokens in lists if tokens]
    if not any(isinstance(tokens[0], list) for tokens in lists):
        input_ids = token_ids.known_ids(lists, tokenizer)
        texts, offsets, _ = token_ids.decode_with_offsets(input_ids, tokenizer)
        mark = functools.partial(mark_sentence_starts, language=sentence_language)
        return {"input_ids": input_ids, "sentence_starts": list(map(mark, texts, offsets))}
    special, rows = token_ids.special_ids(tokenizer), {"input_ids": [], "sentence_starts": []}
    for found in (token_ids.known_ids(sentence_lists, tokenizer) for sentence_lists in lists):
        sentence = np.repeat(np.arange(len(found)), list(map(len, found)))
        ids, starts = np.concatenate([[], *found]).astype(np.int32), np.zeros(len(sentence), np.int32)
        ordinary = np.flatnonzero(~np.isin(ids, special))  # the tokens that may begin a sentence
        starts[ordinary[np.unique(sentence[ordinary], return_index=True)[1]]] = 1
        rows["input_ids"].append(ids)
        rows["sentence_starts"].append(starts)
    return rows


def mark_sentence_starts(text: str, offsets: Sequence[tuple[int, int]], language: str) -> np.ndarray:
    """Mark the first token of each sentence: int32 [tokens]. A token that joins two sentences counts for the second.

    `offsets` are the fast tokenizer's (start, end). Special tokens that it added have (0, 0) and are never marked.
    """
    end = np.maximum.accumulate(np.fromiter((end for _, end in offsets), np.int64, len(offsets)))
    first = np.searchsorted(end, sentences.split_sentences(text, language), side="right")
    starts = np.zeros(len(end), np.int32)
    starts[first[first < len(end)]] = 1
    return starts


# ---- Rows to batches: noise and labels -----------------------------------------------------------------------------------


class Collator:
    """Noise for BART (Lewis et al. 2019, arXiv:1910.13461): a pure function of rows and uniform random numbers.

    The encoder reads rows whose sentences are permuted and whose spans are each replaced by one mask token; the decoder
    reads, shifted by one, and predicts the whole row as it was. Special tokens stay where they are, and a document is what
    lies between two of them; the unknown token is text. Each row is noised by itself, by its own random numbers:

        number 0                   rounds the count of tokens to hide
        1 + k * T and T - 1 more   k = 0: the order of sentences, each at its first token; 1: the length of each span;
                                   2: where spans are; 3: how many empty spans come before each span; 4: where those are
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
        data_args: DataTrainingArguments,
        max_seq_length: int,
    ):
        for name in ("mask_token", "eos_token", "pad_token"):
            if getattr(tokenizer, name) is None:
                cli.fail(f"--tokenizer_name: has no {name}; use a tokenizer made for BART, prepare_model_dir.py trains one")
        # Rows of tokens: their columns with what fills them up, their length, and how text becomes tokens.
        self.columns = {"input_ids": -1, "sentence_starts": 0}
        if data_args.document_attention:
            self.columns[token_rows.TEXT_STARTS] = 0
        self.row_length, self.line_by_line, self.pad_to = max_seq_length, False, None
        self.tokenize_options = {"sentence_language": data_args.sentence_language}
        self.draws_per_row = 1 + 5 * max_seq_length  # uniform numbers that __call__ needs for a row

        self.pad_token_id = tokenizer.pad_token_id
        self.mask_token_id = tokenizer.mask_token_id
        self.decoder_start_token_id = config.decoder_start_token_id
        self.is_special_V = np.zeros(max(tokenizer.get_vocab().values()) + 1, bool)
        self.is_special_V[[i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id]] = True
        self.mlm_probability = data_args.mlm_probability
        self.permute_sentence_ratio = data_args.permute_sentence_ratio
        self.poisson_lambda = data_args.poisson_lambda
        self.span_length_cdf = truncated_poisson_cdf(data_args.poisson_lambda)

    def __call__(
        self, rows: Mapping[str, np.ndarray], uniforms_NR: np.ndarray, is_real_N: np.ndarray, num_groups: int
    ) -> dict[str, np.ndarray]:
        """Collate N rows; `num_groups` does not matter, as no array is shared by rows.

        Args:
            rows: `input_ids` int [N, T], -1 behind the end of a row, and `sentence_starts` [N, T], 1 where one starts; and
                `text_starts` if texts are apart. Then the decoder starts anew with each.
            uniforms_NR: float64 [N, draws_per_row] in [0, 1), the only source of randomness.
            is_real_N: bool [N]; rows that only fill up a batch are False and get no label.

        Returns:
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, labels int32 and label_weights float32,
            all [N, T]. Every token of a row is a label, those at its ends too; padding is none.
        """
        in_row_NT = rows["input_ids"] >= 0
        labels_NT = np.where(in_row_NT, rows["input_ids"], self.pad_token_id).astype(np.int32)
        texts_NT = token_rows.number_texts(rows, in_row_NT)
        input_ids_NT, attention_mask_NT = self.noise(rows, uniforms_NR, labels_NT, self.mask_token_id, self.pad_token_id)
        decoder_input_ids_NT = np.full_like(labels_NT, self.decoder_start_token_id)
        same_text_NT = (texts_NT[:, 1:] == texts_NT[:, :-1]) | ~in_row_NT[:, 1:]
        decoder_input_ids_NT[:, 1:][same_text_NT] = labels_NT[:, :-1][same_text_NT]
        return {
            "input_ids": input_ids_NT,
            "attention_mask": attention_mask_NT,
            "decoder_input_ids": decoder_input_ids_NT,
            "decoder_attention_mask": texts_NT,
            "labels": labels_NT,
            "label_weights": (in_row_NT & is_real_N[:, None]).astype(np.float32),
        }

    def noise(
        self, rows: Mapping[str, np.ndarray], uniforms_NR: np.ndarray, values_NT: np.ndarray, mask: int, padding: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rearrange `values_NT` as the noise does the tokens of the rows: their ids, or their positions, to see what it did.

        Returns the values with `mask` for each span, then `padding`, int32 [N, T]; and which texts they are of.
        """
        in_row_NT = rows["input_ids"] >= 0
        N, T = in_row_NT.shape
        draws_5NT = np.moveaxis(uniforms_NR[:, 1 : 1 + 5 * T].reshape(N, 5, T), 1, 0)
        is_text_NT = in_row_NT & ~self.is_special_V[np.where(in_row_NT, rows["input_ids"], self.pad_token_id)]
        texts_NT = noised_texts_NT = token_rows.number_texts(rows, in_row_NT)
        if self.permute_sentence_ratio > 0:
            values_NT = self.permute(values_NT, is_text_NT, texts_NT, rows["sentence_starts"] != 0, draws_5NT[0])
        if self.mlm_probability > 0:
            draws = uniforms_NR[:, 0], draws_5NT[1:]
            values_NT, noised_texts_NT = self.infill(values_NT, is_text_NT, texts_NT, *draws, mask, padding)
        return values_NT, noised_texts_NT

    def permute(
        self,
        values_NT: np.ndarray,
        is_text_NT: np.ndarray,
        texts_NT: np.ndarray,
        starts_NT: np.ndarray,
        uniforms_NT: np.ndarray,
    ) -> np.ndarray:
        """Let ceil(ratio * m) of the m sentences of each document change places among themselves, at random.

        Position 0 stays: where a row begins in mid-text, that is the rest of a sentence, which follows on the row before.
        """
        is_border_NT = np.pad(texts_NT[:, 1:] != texts_NT[:, :-1], ((0, 0), (1, 0)))
        begins_NT = starts_NT | ~is_text_NT | is_border_NT
        begins_NT[:, 1:] |= ~is_text_NT[:, :-1]
        begins_NT[:, 0] = True
        first_G = np.flatnonzero(begins_NT)  # stretches: sentences, and each other token by itself
        size_G = np.diff(first_G, append=begins_NT.size)
        moves_G = is_text_NT.reshape(-1)[first_G] & (first_G % begins_NT.shape[1] > 0)
        movable_S = np.flatnonzero(moves_G)
        is_border_G = ~moves_G | is_border_NT.reshape(-1)[first_G]  # what stays divides documents, and rows
        document_S = np.cumsum(is_border_G)[movable_S]

        # The lowest numbers of a document choose its sentences, and their order is the new one: equally likely, all of them.
        order_S = np.lexsort((uniforms_NT.reshape(-1)[first_G[movable_S]], document_S))
        rank_S = np.arange(len(movable_S)) - np.searchsorted(document_S, document_S)
        num_chosen_S = np.ceil(np.bincount(document_S)[document_S] * self.permute_sentence_ratio - 1e-9)
        chosen = movable_S[order_S[rank_S < num_chosen_S]]
        stretch_G = np.arange(len(first_G))
        stretch_G[np.sort(chosen)] = chosen

        size_G = size_G[stretch_G]
        shift_G = first_G[stretch_G] - (np.cumsum(size_G) - size_G)
        source = np.repeat(shift_G, size_G) + np.arange(begins_NT.size)
        return values_NT.reshape(-1)[source].reshape(values_NT.shape)

    def infill(
        self,
        values_NT: np.ndarray,
        is_text_NT: np.ndarray,
        texts_NT: np.ndarray,
        rounding_N: np.ndarray,
        draws_4NT: np.ndarray,
        mask: int,
        padding: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Replace each span of text by one `mask`; returns the rows, packed to the left, and which texts they are of.

        Span lengths are Poisson. Spans of tokens take exactly the share asked for (the last one is cut, the share is rounded
        at random), do not overlap, and every arrangement is equally likely; a span across a border of documents is two.
        Empty spans, as many as a Poisson distribution has, insert a mask before any token or span, while there is room.
        """
        N, T = values_NT.shape
        lengths_NT, places_NT, empty_NT, empty_places_NT = draws_4NT
        num_text_N = is_text_NT.sum(axis=1)
        budget_N = np.minimum(np.floor(self.mlm_probability * num_text_N + rounding_N).astype(np.int64), num_text_N)
        most = budget_N.max(initial=0)  # spans of a row

        length_NS = np.searchsorted(self.span_length_cdf, lengths_NT[:, :most], side="right") + 1
        before_NS = np.cumsum(length_NS, axis=1) - length_NS
        is_used_NS = before_NS < budget_N[:, None]
        num_spans_N = is_used_NS.sum(axis=1)
        length_S = np.minimum(length_NS, budget_N[:, None] - before_NS)[is_used_NS]

        # Of the tokens that stay and the spans, which are the spans? In text tokens, a span then starts after so many.
        num_items_N = num_text_N - budget_N + num_spans_N
        place_S, span_S = choose(places_NT, num_items_N, num_spans_N)
        text_before_N = np.cumsum(num_text_N) - num_text_N
        start_S = np.repeat(text_before_N, num_spans_N) + place_S - span_S + before_NS[is_used_NS]
        change = np.zeros(num_text_N.sum() + 1, np.int8)
        change[start_S] += 1
        change[start_S + length_S] -= 1
        text_positions = np.flatnonzero(is_text_NT)
        is_hidden_NT = np.zeros((N, T), bool)
        is_hidden_NT.reshape(-1)[text_positions] = np.cumsum(change[:-1], dtype=np.int8)
        is_mask_NT = np.zeros((N, T), bool)
        is_mask_NT.reshape(-1)[text_positions[start_S]] = True
        is_mask_NT[:, 1:] |= is_hidden_NT[:, 1:] & ~is_hidden_NT[:, :-1]  # after a special token within a span
        is_mask_NT[:, 1:] |= is_hidden_NT[:, 1:] & (texts_NT[:, 1:] != texts_NT[:, :-1])
        is_mask_NT[:, 0] |= is_hidden_NT[:, 0]

        is_kept_NT = (texts_NT > 0) & ~is_hidden_NT
        num_out_NT = (is_kept_NT | is_mask_NT).astype(np.int64)
        # Before each span come empty ones, as many as zeros come in a row in Poisson numbers: geometric.
        exponential_NS = np.where(is_used_NS, -np.log1p(-empty_NT[:, :most]), 0)
        num_empty_NS = np.minimum(exponential_NS, self.poisson_lambda * T) // self.poisson_lambda
        room_N = T - num_out_NT.sum(axis=1)
        num_empty_N = np.minimum(num_empty_NS.sum(axis=1), room_N).astype(np.int64)
        num_out_NT += self.insertions(num_out_NT.astype(bool) & is_text_NT, num_empty_N, empty_places_NT)

        end_NT = np.cumsum(num_out_NT, axis=1)
        is_noised_NT = np.arange(T) < end_NT[:, -1:]
        noised_NT = np.where(is_noised_NT, mask, padding).astype(np.int32)
        flat_place_NT = end_NT - 1 + T * np.arange(N)[:, None]
        noised_NT.reshape(-1)[flat_place_NT[is_kept_NT]] = values_NT[is_kept_NT]
        noised_texts_NT = np.zeros_like(texts_NT)
        noised_texts_NT[is_noised_NT] = np.repeat(texts_NT.reshape(-1), num_out_NT.reshape(-1))
        return noised_NT, noised_texts_NT

    @staticmethod
    def insertions(is_site_NT: np.ndarray, num_insertions_N: np.ndarray, uniforms_NT: np.ndarray) -> np.ndarray:
        """Spread the insertions of each row over its sites, independently: how many come before each position, [N, T]."""
        num_sites_N = is_site_NT.sum(axis=1)
        is_used_NT = np.arange(uniforms_NT.shape[1]) < num_insertions_N[:, None]
        row, column = np.nonzero(is_used_NT)
        site = (np.cumsum(num_sites_N) - num_sites_N)[row] + (uniforms_NT[row, column] * num_sites_N[row]).astype(np.int64)
        return np.bincount(np.flatnonzero(is_site_NT)[site], minlength=is_site_NT.size).reshape(is_site_NT.shape)


def truncated_poisson_cdf(rate: float) -> np.ndarray:
    """P(length <= 1), P(length <= 2), ... of a Poisson number above zero, without the final 1, for `np.searchsorted`."""
    lengths = np.arange(1, math.ceil(rate + 12 * math.sqrt(rate)) + 20)
    log_weights = np.cumsum(math.log(rate) - np.log(lengths))
    cdf = np.cumsum(np.exp(log_weights - log_weights.max()))
    return cdf[:-1] / cdf[-1]


def choose(uniforms_NT: np.ndarray, num_items_N: np.ndarray, num_chosen_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose so many of the first so many items of each row; every choice is equally likely.

    Returns:
        The chosen items of all rows, row after row, in order; and their numbers 0, 1, ... within the row.
    """
    N, T = uniforms_NT.shape
    candidates_NT = np.where(np.arange(T) < num_items_N[:, None], uniforms_NT, 2.0)
    highest_N = np.sort(candidates_NT, axis=1)[np.arange(N), num_chosen_N - 1]
    row_S, item_S = np.nonzero((candidates_NT <= highest_N[:, None]) & (num_chosen_N > 0)[:, None])
    number_S = np.arange(len(row_S)) - np.searchsorted(row_S, np.arange(N))[row_S]
    in_number = number_S < num_chosen_N[row_S]  # equal random numbers make no difference
    return item_S[in_number], number_S[in_number]


# ---- Loss ----------------------------------------------------------------------------------------------------------------


MODELS = models.DENOISING


def loss_fn(
    params,
    batch: Mapping[str, jax.Array],
    model: nn.Module,
    rngs: Mapping[str, jax.Array] | None = None,
    z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum of the cross-entropies of all tokens of one device's rows as they were before the noise, in float32.

    Returns:
        The sum, and {"weight": number of labels, "correct": labels that score highest}; all scalars, to be summed over
        micro-batches and devices before the division. With `z_loss` the sum is the two parts that stand beside the others:
        "loss", the cross-entropies, and "z_loss".
    """
    inputs = batch["input_ids"], batch["attention_mask"], batch["decoder_input_ids"], batch["decoder_attention_mask"]
    hidden_BTH = model.apply({"params": params}, *inputs, rngs=rngs)
    weights_BT = batch["label_weights"]
    loss, sums = losses.fused_cross_entropy(model, params, hidden_BTH, batch["labels"], weights_BT, z_loss)
    return loss, {"weight": weights_BT.sum(), **sums}


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
