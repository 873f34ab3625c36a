#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Pretrain or fine-tune a T5-like encoder-decoder (T5 v1.1, mT5) on span corruption with JAX and Flax.

Spans of the text are replaced by sentinels and the model writes down what they stand for (Raffel et al. 2020,
arXiv:1910.10683); `--objective ul2` mixes seven kinds of such noise (Tay et al. 2022, arXiv:2205.05131). These commands
work as pasted, on a laptop too:

    python quickstart/python_docs_corpus.py --output_dir corpus
    python prepare_model_dir.py --model_type t5 --train_file corpus/train.txt --vocab_size 4096 \
        --config_overrides "d_model=128,num_layers=2,num_heads=2,d_kv=64,d_ff=256" --output_dir my-t5
    python run_t5_mlm_flax.py --config_name my-t5 --tokenizer_name my-t5 --output_dir my-run \
        --train_file corpus/train.txt --validation_file corpus/validation.txt --max_seq_length 128 --max_steps 300 \
        --per_device_train_batch_size 16 --learning_rate 2e-3 --warmup_steps 30 --logging_steps 50

Weights (for Flax and for PyTorch), tokenizer, results and TensorBoard curves are in my-run afterwards. All that decides what
the model learns is in this file, from the flags of the objective to the loop at the end; what keeps it running is in the
package flaxlm. To make an objective of your own, copy this file and change it.
"""

import bisect
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

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
    sharding,
    token_ids,
    token_rows,
    tokenization,
    weights,
)

# Shape letters at the end of names, outermost dimension first:
#   A  micro-batches in one update      D  devices of this process      B  rows per device       N  rows
#   E  tokens of text in a row          T  tokens in an input           U  tokens in a target    S  spans in a row
#   V  vocabulary                       H  hidden size                  C  tokens in a chunk     R  uniform numbers per row
#   W  E + 1 or 2: a row's text, its mode token if any, and eos         G  E - 2 gaps where a span can be cut in two
# A joined letter is a merged dimension: input_ids_NT holds N = A * D * B rows. Model inputs keep their transformers names.


# ---- Flags of the objective ----------------------------------------------------------------------------------------------


@dataclass
class DataTrainingArguments(arguments.DataArguments):
    """What to train on, and what noise to put into it."""

    writes_text: ClassVar[bool] = True

    train_ref_file: str | None = field(default=None, metadata={"help": "Accepted for old commands; spans ignore words."})
    validation_ref_file: str | None = field(default=None, metadata={"help": "The same for validation_file."})
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Tokens per input. Unset: what tokenizer and model can take, at most 1024."}
    )
    objective: Literal["span_corruption", "ul2"] = field(
        default="span_corruption",
        metadata={"help": "span_corruption: T5's. ul2: a mixture of seven denoisers, which needs mode tokens."},
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "span_corruption: share of noise tokens, in (0, 1)."})
    mean_noise_span_length: float = field(
        default=3.0,
        metadata={"help": "span_corruption: tokens in a span of noise on average, at least 1; for more than half noise, more."},
    )

    def check(self, model_args: arguments.ModelArguments) -> None:
        """Refuse impossible settings of the objective before anything is loaded."""
        if not 0 < self.mlm_probability < 1:
            cli.fail(f"--mlm_probability {self.mlm_probability}: must lie between 0 and 1, both excluded")
        if not self.mean_noise_span_length >= 1:
            cli.fail(f"--mean_noise_span_length {self.mean_noise_span_length}: a span has 1 token or more")
        for name in ("mlm_probability", "mean_noise_span_length"):
            if self.objective == "ul2" and getattr(self, name) != getattr(DataTrainingArguments, name):
                cli.fail(f"--{name}: not with --objective ul2, whose denoisers have their own; drop one of the two")
        least = self.mlm_probability / (1 - self.mlm_probability)  # of mean lengths that leave a clean token between spans
        if self.objective == "span_corruption" and self.mean_noise_span_length < least * (1 - 1e-9):
            noise = f"--mlm_probability {self.mlm_probability} --mean_noise_span_length {self.mean_noise_span_length}"
            least = math.ceil(1000 * least * (1 - 1e-9)) / 1000
            cli.fail(
                f"{noise}: no clean token is left between so many spans; give a mean length of {least:g} or more, or a lower"
                " probability"
            )
        shortest = 4 if self.objective == "ul2" else 3
        if self.max_seq_length is not None and self.max_seq_length < shortest:
            cli.fail(f"--max_seq_length {self.max_seq_length}: noise of this kind needs {shortest} tokens or more")
        if self.train_ref_file or self.validation_ref_file:
            cli.logger.warning("--train_ref_file and --validation_ref_file have no effect: spans of noise ignore words.")


# ---- Text to rows of tokens ----------------------------------------------------------------------------------------------


def tokenize_texts(batch: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, text_column: str) -> dict[str, list]:
    """Tokenise the non-blank texts of one `Dataset.map` batch, each with the end-of-sequence token the tokenizer adds.

    Of texts that are tokenised already the tokens are used as they are.
    """
    if token_ids.are_ids(batch[text_column]):
        return {"input_ids": token_ids.known_ids(batch[text_column], tokenizer)}
    texts = [text for text in batch[text_column] if text and not text.isspace()]
    if not texts:
        return {"input_ids": []}
    with tokenization.tokenizer_as_loaded(tokenizer):
        encoding = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    return {"input_ids": encoding["input_ids"]}


# ---- Rows to batches: noise and labels -----------------------------------------------------------------------------------


class Denoiser(NamedTuple):
    """A kind of noise. The input begins with its `mode` token, if it has one, by which the model knows the task."""

    noise_density: float
    mean_span_length: float  # infinite: one span at the end
    mode: str | None = None


# Tay et al. 2022, arXiv:2205.05131, table 1; each row of text gets one of them, all equally likely.
UL2_DENOISERS = (
    Denoiser(0.15, 3.0, "[NLU]"),  # R: regular, short spans
    Denoiser(0.15, 8.0, "[NLU]"),
    Denoiser(0.25, math.inf, "[S2S]"),  # S: sequential, the last quarter of the text from the rest (prefix LM)
    Denoiser(0.5, 3.0, "[NLG]"),  # X: extreme, much noise or long spans
    Denoiser(0.5, 8.0, "[NLG]"),
    Denoiser(0.15, 64.0, "[NLG]"),
    Denoiser(0.5, 64.0, "[NLG]"),
)


def noise_counts(num_tokens, noise_density, mean_span_length) -> tuple[np.ndarray, np.ndarray]:
    """How many of `num_tokens` tokens become noise, and in how many spans; numbers or arrays that broadcast.

    A row of two or more tokens has at least one of noise, one of clean text, and one span; a shorter one has no noise.
    There are never more spans than clean tokens between them. Halves are rounded to even. This is the only such formula:
    lengths and noise cannot disagree.
    """
    noise = np.minimum(np.maximum(np.rint(num_tokens * noise_density), 1), np.maximum(num_tokens - 1, 0))
    rarer = np.minimum(noise, num_tokens - noise)
    # Spans are of noise, as in T5's random_spans_helper. Up to a half of noise the rarer of the two is divided, as ever: where
    # noise is the odd token more, it decides between two counts.
    divided = np.where(np.asarray(noise_density) > 0.5, noise, rarer)
    spans = np.minimum(np.maximum(np.rint(divided / mean_span_length), 1), rarer)
    return noise.astype(np.int64), spans.astype(np.int64)


def span_corruption_lengths(max_seq_length: int, noise_density, mean_span_length) -> tuple[int, int]:
    """Tokens of text E that corruption makes into an input of at most `max_seq_length`, and its target length U.

    The input has the clean text, one sentinel per span and eos; the target one sentinel per span, the noise and eos. For
    several denoisers (arrays of densities and span lengths) E and U are such that each of them fits. E is at most 100
    times `max_seq_length`, which matters for a `noise_density` above 0.99 only.
    """
    if max_seq_length < 3:
        cli.fail("--max_seq_length: must be 3 or more, for a token, a sentinel and eos; 4 with --objective ul2")

    def input_and_target_length(num_tokens: int) -> tuple[int, int]:
        noise, spans = noise_counts(num_tokens, noise_density, mean_span_length)
        return int(np.max(num_tokens - noise + spans + 1)), int(np.max(noise + spans + 1))

    # Both lengths never fall as a row grows, hence the bisection, and hence shorter rows fit as well.
    lengths_to_try = range(100 * max_seq_length)
    row_length = bisect.bisect_right(lengths_to_try, max_seq_length, key=lambda n: input_and_target_length(n)[0]) - 1
    input_length, target_length = input_and_target_length(row_length)
    if np.all(np.equal(noise_density, 0.5)) and target_length > input_length:  # as in T5: two halves of equal length
        return row_length - 1, target_length - 1
    return row_length, target_length


class Collator:
    """Corrupt spans of text for an encoder-decoder: a pure function of rows and uniform random numbers.

    A share of the tokens, `mlm_probability`, is noise, in spans of `mean_noise_span_length` tokens on average (Raffel et al.
    2020, arXiv:1910.10683, section 3.1.4). The input has one sentinel in place of each span; the target lists each sentinel
    with the tokens it stands for; both end with eos. Clean text and noise take turns, so that a row's first token is never
    noise and its last always is; all divisions of noise and of clean text into spans are equally likely. Sentinels are found
    by name: the first span gets <extra_id_0>, the next <extra_id_1>, whatever their ids are. A sentinel in the text
    itself is text like any other. With `objective` ul2 each row is corrupted by one of `UL2_DENOISERS`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
        data_args: DataTrainingArguments,
        max_seq_length: int,
    ):
        for name in ("pad_token", "eos_token"):
            if getattr(tokenizer, name) is None:
                cli.fail(f"--tokenizer_name: has no {name}; use a tokenizer made for T5, prepare_model_dir.py trains one")
        self.denoisers, noise = UL2_DENOISERS, "--objective ul2"
        if data_args.objective == "span_corruption":
            self.denoisers = (Denoiser(data_args.mlm_probability, data_args.mean_noise_span_length),)
            noise = "--mlm_probability {} --mean_noise_span_length {}".format(*self.denoisers[0])
        self.noise_density = np.array([denoiser.noise_density for denoiser in self.denoisers])
        self.mean_span_length = np.array([denoiser.mean_span_length for denoiser in self.denoisers])
        self.mode_ids = find_mode_ids(tokenizer, self.denoisers)
        self.text_start = min(len(self.mode_ids), 1)  # where the text begins, behind the mode token if there is one
        self.input_length = max_seq_length
        self.row_length, self.target_length = span_corruption_lengths(
            max_seq_length - self.text_start, self.noise_density, self.mean_span_length
        )
        # Rows of tokens: their columns with what fills them up, and how text becomes tokens.
        self.columns = {"input_ids": -1} | ({token_rows.TEXT_STARTS: 0} if data_args.document_attention else {})
        self.line_by_line, self.pad_to, self.tokenize_options = False, None, {}
        self.draws_per_row = self.row_length - 1  # uniform numbers: one for the denoiser, one per gap
        num_spans = noise_counts(self.row_length, self.noise_density, self.mean_span_length)[1].max()
        self.sentinel_ids_S = find_sentinel_ids(tokenizer, num_spans, f"--max_seq_length {max_seq_length} {noise}")
        self.pad_token_id, self.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.decoder_start_token_id = config.decoder_start_token_id

    def __call__(
        self, rows: Mapping[str, np.ndarray], uniforms_NR: np.ndarray, is_real_N: np.ndarray, num_groups: int
    ) -> dict[str, np.ndarray]:
        """Collate N rows. A row of fewer than two tokens cannot have noise: its input is the text, its weights are 0.

        Args:
            rows: `input_ids` int [N, E], -1 behind the end of a short row; `text_starts` [N, E] if texts are apart. Then the
                decoder starts anew with each text, and a span over the end of one is in both.
            uniforms_NR: float64 [N, R] in [0, 1), the only source of randomness.
            is_real_N: bool [N]; rows that only fill up a batch are False and get weights of 0.
            num_groups: not used; the rows of a group stay together whatever it is.

        Returns:
            input_ids, attention_mask int32 [N, T]; decoder_input_ids, decoder_attention_mask, labels int32 and
            label_weights float32 [N, U].
        """
        N, E = rows["input_ids"].shape
        num_tokens_N = (rows["input_ids"] >= 0).sum(axis=1)
        denoiser_N = (uniforms_NR[:, 0] * len(self.denoisers)).astype(np.int64)
        noise_N, spans_N = noise_counts(num_tokens_N, self.noise_density[denoiser_N], self.mean_span_length[denoiser_N])
        input_lengths_N = self.text_start + num_tokens_N - noise_N + spans_N + 1
        target_lengths_N = noise_N + spans_N + 1
        starts_NS, ends_NS = span_edges(uniforms_NR[:, 1:], num_tokens_N, noise_N, spans_N, len(self.sentinel_ids_S))

        W = self.text_start + E + 1
        text_NW = np.full((N, W), self.pad_token_id, np.int32)
        if self.text_start:
            text_NW[:, 0] = self.mode_ids[denoiser_N]
        text_NW[:, self.text_start : -1] = rows["input_ids"]
        text = text_NW.reshape(-1)
        # Flat positions into [N, W]: where each row's text begins, its eos, and all spans' edges.
        text_starts_N = np.arange(N) * W + self.text_start
        eos = text_starts_N + num_tokens_N
        text[eos] = self.eos_token_id
        is_span_NS = np.arange(len(self.sentinel_ids_S)) < spans_N[:, None]
        starts = (text_starts_N[:, None] + starts_NS)[is_span_NS]
        ends = (text_starts_N[:, None] + ends_NS)[is_span_NS]
        sentinels = np.broadcast_to(self.sentinel_ids_S, is_span_NS.shape)[is_span_NS]

        turns = np.zeros(N * W, np.int8)
        turns[starts], turns[ends] = 1, -1
        is_noise = np.cumsum(turns, dtype=np.int8) == 1
        # Which text of its row a token is of: the mode token of the first, eos of the last.
        numbers_NE = token_rows.number_texts(rows, rows["input_ids"] >= 0)
        input_number = np.pad(numbers_NE, ((0, 0), (self.text_start, 1)), mode="edge").reshape(-1)
        input_number[eos] = numbers_NE.max(axis=1, initial=1)
        target_number = input_number.copy()
        target_number[starts - 1] = input_number[starts]
        # A sentinel takes the place of the span's first token in the input, of the clean token before it in the target.
        input_text, in_input = text.copy(), ~is_noise
        input_text[starts], in_input[starts] = sentinels, True
        in_input &= (np.arange(W) <= (self.text_start + num_tokens_N)[:, None]).reshape(-1)
        target_text, in_target = text, is_noise
        target_text[starts - 1], in_target[starts - 1] = sentinels, True
        in_target[eos] = True

        is_input_NT = np.arange(self.input_length) < input_lengths_N[:, None]
        is_target_NU = np.arange(self.target_length) < target_lengths_N[:, None]
        input_ids_NT = np.full(is_input_NT.shape, self.pad_token_id, np.int32)
        input_ids_NT[is_input_NT] = input_text[in_input]  # what is left of a row closes up
        labels_NU = np.full(is_target_NU.shape, self.pad_token_id, np.int32)
        labels_NU[is_target_NU] = target_text[in_target]
        attention_mask_NT, decoder_attention_mask_NU = np.zeros_like(input_ids_NT), np.zeros_like(labels_NU)
        attention_mask_NT[is_input_NT] = input_number[in_input]
        decoder_attention_mask_NU[is_target_NU] = target_number[in_target]
        decoder_input_ids_NU = np.full_like(labels_NU, self.decoder_start_token_id)
        goes_on_NU = decoder_attention_mask_NU[:, 1:] == decoder_attention_mask_NU[:, :-1]
        decoder_input_ids_NU[:, 1:][goes_on_NU] = labels_NU[:, :-1][goes_on_NU]
        return {
            "input_ids": input_ids_NT,
            "attention_mask": attention_mask_NT,
            "decoder_input_ids": decoder_input_ids_NU,
            "decoder_attention_mask": decoder_attention_mask_NU,
            "labels": labels_NU,
            "label_weights": (is_target_NU & (is_real_N & (spans_N > 0))[:, None]).astype(np.float32),
        }


def span_edges(
    uniforms_NG: np.ndarray, num_tokens_N: np.ndarray, noise_N: np.ndarray, spans_N: np.ndarray, S: int
) -> tuple[np.ndarray, np.ndarray]:
    """First position of each span of noise and the one after its last: two int [N, S], `num_tokens` where there is no span.

    To divide m tokens into k spans is to cut k - 1 of the m - 1 gaps between them. Of a row's numbers the first noise - 1
    stand for gaps between noise tokens, the next clean - 1 for gaps in the clean text; of both, the lowest are cut.
    """
    N, G = uniforms_NG.shape
    noise_gaps_N1, gaps_N1 = noise_N[:, None] - 1, num_tokens_N[:, None] - 2
    # Sorted, the numbers of noise gaps come first, then those of gaps in clean text, then the unused ones of short rows.
    gap_G = np.arange(G)
    order_NG = np.argsort(uniforms_NG + 2.0 * (gap_G >= noise_gaps_N1) + 2.0 * (gap_G >= gaps_N1), axis=1)
    rank_G, cuts_N1 = gap_G, spans_N[:, None] - 1
    is_cut_NG = (rank_G < cuts_N1) | ((rank_G >= noise_gaps_N1) & (rank_G < noise_gaps_N1 + cuts_N1))
    cut = np.zeros((N, G), bool)
    np.put_along_axis(cut, order_NG, is_cut_NG, axis=1)
    row, gap = np.nonzero(cut)
    of_noise = gap < noise_N[row] - 1

    # A span ends behind all noise and all clean text so far; after the last span of a row, at the row's end.
    has_successor_NS = np.arange(S) < cuts_N1
    noise_until_NS = np.repeat(noise_N[:, None], S, axis=1)
    noise_until_NS[has_successor_NS] = gap[of_noise] + 1
    noise_before_NS = np.pad(noise_until_NS[:, :-1], ((0, 0), (1, 0)))
    clean_before_NS = np.repeat((num_tokens_N - noise_N)[:, None], S, axis=1)
    clean_before_NS[has_successor_NS] = (gap - noise_N[row] + 2)[~of_noise]
    return clean_before_NS + noise_before_NS, clean_before_NS + noise_until_NS


def find_mode_ids(tokenizer: PreTrainedTokenizerBase, denoisers: Sequence[Denoiser]) -> np.ndarray:
    """Ids of the denoisers' mode tokens, none if they have no modes."""
    modes = [denoiser.mode for denoiser in denoisers if denoiser.mode]
    ids = find_ids(tokenizer, modes)
    missing = sorted({mode for mode, token_id in zip(modes, ids, strict=True) if token_id is None})
    if missing:
        cli.fail(f"--objective ul2: the tokenizer lacks the mode tokens {', '.join(missing)}; add them to it")
    return np.array(ids, np.int32)


def find_sentinel_ids(tokenizer: PreTrainedTokenizerBase, num_sentinels: int, settings: str) -> np.ndarray:
    """Ids of <extra_id_0>, <extra_id_1>, ... by name; `settings` are the flags that ask for so many."""
    names = [f"<extra_id_{j}>" for j in range(num_sentinels)]
    ids = find_ids(tokenizer, names)
    num_found = ids.index(None) if None in ids else num_sentinels
    if num_found < num_sentinels:
        cli.fail(
            f"{settings}: up to {num_sentinels} spans in a row, each of which needs a sentinel, but the tokenizer has"
            f" {num_found}: lower --max_seq_length, or use a tokenizer with {names[0]} to {names[-1]}"
        )
    return np.array(ids, np.int32)


def find_ids(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> list[int | None]:
    """Ids of tokens, None where there is no such token. In mT5's vocabulary they are pieces like others: ▁<extra_id_0>."""
    vocab = tokenizer.get_vocab()
    return [vocab.get(name, vocab.get(f"▁{name}")) for name in names]


# ---- Loss ----------------------------------------------------------------------------------------------------------------


MODELS = models.SPANS


def loss_fn(
    params,
    batch: Mapping[str, jax.Array],
    model: nn.Module,
    rngs: Mapping[str, jax.Array] | None = None,
    z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum of the cross-entropies of the targets of one device's rows, sentinels and eos included, in float32.

    Returns:
        The sum, and {"weight": number of labels, "correct": labels that score highest}; all scalars, to be summed over
        micro-batches and devices before the division. With `z_loss` the sum is the two parts that stand beside the others:
        "loss", the cross-entropies, and "z_loss".
    """
    inputs = batch["input_ids"], batch["attention_mask"], batch["decoder_input_ids"], batch["decoder_attention_mask"]
    hidden_BUH = model.apply({"params": params}, *inputs, rngs=rngs)
    weights_BU = batch["label_weights"]
    loss, sums = losses.fused_cross_entropy(model, params, hidden_BUH, batch["labels"], weights_BU, z_loss)
    return loss, {"weight": weights_BU.sum(), **sums}


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
