#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Pretrain or fine-tune a causal language model (GPT-2, Llama, Mistral, ...) with JAX and Flax.

The model predicts each token from those before it (Radford et al. 2019, Language Models are Unsupervised Multitask
Learners). These commands work as pasted, on a laptop too:

    python quickstart/python_docs_corpus.py --output_dir corpus
    python prepare_model_dir.py --model_type gpt2 --train_file corpus/train.txt --vocab_size 4096 \
        --config_overrides "n_embd=128,n_layer=2,n_head=2,n_positions=128" --output_dir my-gpt2
    python run_clm_flax.py --config_name my-gpt2 --tokenizer_name my-gpt2 --output_dir my-run \
        --train_file corpus/train.txt --validation_file corpus/validation.txt --block_size 128 --max_steps 300 \
        --per_device_train_batch_size 16 --learning_rate 2e-3 --warmup_steps 30 --logging_steps 50

Weights (for Flax and for PyTorch), tokenizer, results and TensorBoard curves are in my-run afterwards. All that decides what
the model learns is in this file, from the flags of the objective to the loop at the end; what keeps it running is in the
package flaxlm. To make an objective of your own, copy this file and change it.
"""

import copy
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

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
    infilling,
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
#   V  vocabulary                       H  hidden size                  C  tokens in a chunk
# A joined letter is a merged dimension: input_ids_NT holds N = A * D * B rows. Model inputs keep their transformers names.


# ---- Flags of the objective ----------------------------------------------------------------------------------------------


@dataclass
class DataTrainingArguments(arguments.DataArguments):
    """What to train on, and how text becomes rows."""

    row_length_flag: ClassVar[str] = "block_size"
    cuts_row_length: ClassVar[bool] = True
    writes_text: ClassVar[bool] = True
    noise: ClassVar[tuple[str, ...]] = ("fim_spm_rate",)
    limits: ClassVar = {"fim_rate": (0, 1), "fim_spm_rate": (0, 1)}

    block_size: int | None = field(
        default=None, metadata={"help": "Tokens per row. Unset: what tokenizer and model can take, at most 1024."}
    )
    keep_linebreaks: bool = field(default=True, metadata={"help": "Keep the line breaks of txt files."})
    append_eos_token: bool = field(
        default=False, metadata={"help": "End every text with the end-of-sequence token, if the tokenizer does not anyway."}
    )
    fim_rate: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training texts that are rearranged as prefix, suffix, middle, so that the model learns to"
            " fill in the middle too; 0.5 and more are usual. Unset: none."
        },
    )
    fim_spm_rate: float | None = field(
        default=None, metadata={"help": "fim_rate: share of these with the suffix before the prefix. Unset: 0.5."}
    )
    fim_level: Literal["character", "token"] | None = field(
        default=None,
        metadata={"help": "fim_rate: cut between characters, also within tokens, or between tokens. Unset: character."},
    )

    def check(self, model_args: arguments.ModelArguments) -> None:
        """Refuse impossible settings of the objective before anything is loaded."""
        for name in ("fim_spm_rate", "fim_level"):
            if getattr(self, name) is not None and self.fim_rate is None:
                cli.fail(f"--{name} {getattr(self, name)}: says how texts are rearranged; add --fim_rate or drop the flag")

    def adapt_config(self, config: PretrainedConfig, row_length: int) -> None:
        """Classes that are encoders by default look at both sides of a token unless told otherwise."""
        if config.model_type in ENCODERS:
            config.is_decoder = True
        if config.model_type == "big_bird":
            config.attention_type = "original_full"  # sparse attention, its default, has no causal mask

    def text_loader_options(self) -> dict[str, Any]:
        """Options for reading txt files."""
        return {"keep_linebreaks": self.keep_linebreaks}


ENCODERS = ("bert", "big_bird", "camembert", "electra", "roberta", "roberta-prelayernorm", "roformer", "xlm-roberta")


# ---- Text to rows of tokens ----------------------------------------------------------------------------------------------


def tokenize_texts(
    batch: Mapping[str, list], tokenizer: PreTrainedTokenizerBase, text_column: str, append_eos_token: bool
) -> dict[str, list]:
    """Tokenise the non-empty texts of one `Dataset.map` batch, with the special tokens that the tokenizer adds.

    Of texts that are tokenised already the tokens are used as they are.
    """
    texts = [text for text in batch[text_column] if text]
    if not texts:
        return {"input_ids": []}
    if token_ids.are_ids(texts):
        input_ids = token_ids.known_ids(texts, tokenizer)
    else:
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        with tokenization.tokenizer_as_loaded(tokenizer):
            input_ids = tokenizer(texts, **options)["input_ids"]
    if append_eos_token:
        eos = tokenizer.eos_token_id
        input_ids = [ids if ids and ids[-1] == eos else [*ids, eos] for ids in input_ids]
    return {"input_ids": input_ids}


# ---- Rows to batches: noise and labels -----------------------------------------------------------------------------------


class Collator:
    """Label each token with the one that follows it (causal language modelling); nothing is random without `fim_rate`.

    Rows are stretches of the joined texts; the last token of a row has no label, nor has padding, which is -1 here since
    causal tokenizers often have no padding token. With `fim_rate` a share of the texts is rearranged first, for training
    alone: a text is cut at two random places into prefix P, middle M and suffix S and becomes <fim_prefix> P <fim_suffix> S
    <fim_middle> M (PSM), or with the share `fim_spm_rate` <fim_prefix> <fim_suffix> S <fim_middle> P M (SPM).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
        data_args: DataTrainingArguments,
        max_seq_length: int,
    ):
        if data_args.append_eos_token and tokenizer.eos_token_id is None:
            cli.fail("--append_eos_token: the tokenizer has no end-of-sequence token; drop the flag or use another tokenizer")
        if max_seq_length < 2:
            cli.fail(f"--block_size {max_seq_length}: must be at least 2, a token and the one that follows it")
        self.document_attention, self.infilling = data_args.document_attention, None
        if data_args.fim_rate:
            spm_rate = 0.5 if data_args.fim_spm_rate is None else data_args.fim_spm_rate
            self.infilling = infilling.make(tokenizer, data_args.fim_rate, spm_rate, data_args.fim_level or "character")
        # Rows of tokens: their columns with what fills them up, their length, and how text becomes tokens.
        knows_texts = self.document_attention or self.infilling is not None
        self.columns = {"input_ids": -1} | ({token_rows.TEXT_STARTS: 0} if knows_texts else {})
        self.row_length, self.line_by_line, self.pad_to = max_seq_length, False, None
        self.tokenize_options = {"append_eos_token": data_args.append_eos_token}
        # Uniform numbers that __call__ needs for a row.
        self.draws_per_row = infilling.DRAWS_PER_TOKEN * max_seq_length if self.infilling else 0

    def for_evaluation(self) -> "Collator":
        """The same for texts as they are, so that losses can be compared whatever was trained on."""
        plain = copy.copy(self)
        plain.infilling, plain.draws_per_row = None, 0
        return plain

    def __call__(
        self, rows: Mapping[str, np.ndarray], uniforms_NR: np.ndarray, is_real_N: np.ndarray, num_groups: int
    ) -> dict[str, np.ndarray]:
        """Collate N rows.

        Args:
            rows: `input_ids` int [N, T], -1 where a row is padded; `text_starts` [N, T] if texts are apart, where no token
                is asked for the first one of another text, or rearranged.
            uniforms_NR: float64 [N, R] in [0, 1), by which texts are rearranged.
            is_real_N: bool [N]; rows that only fill up a batch are False and get no label.
            num_groups: not used; rows don't depend on the device they go to.

        Returns:
            input_ids, attention_mask, labels int32 [N, T]; label_weights float32 [N, T].
        """
        if self.infilling:
            rows = infilling.rearrange(rows, uniforms_NR, self.infilling)
        is_token_NT = rows["input_ids"] >= 0
        input_ids_NT = np.where(is_token_NT, rows["input_ids"], 0).astype(np.int32)
        labels_NT, weights_NT = np.zeros_like(input_ids_NT), np.zeros(input_ids_NT.shape, np.float32)
        labels_NT[:, :-1] = input_ids_NT[:, 1:]
        texts_NT = token_rows.number_texts(rows if self.document_attention else {}, is_token_NT)
        weights_NT[:, :-1] = is_token_NT[:, 1:] & (texts_NT[:, 1:] == texts_NT[:, :-1]) & is_real_N[:, None]
        return {
            "input_ids": input_ids_NT,
            "attention_mask": texts_NT,
            "labels": labels_NT,
            "label_weights": weights_NT,
        }


# ---- Loss ----------------------------------------------------------------------------------------------------------------


MODELS = models.CAUSAL


def loss_fn(
    params,
    batch: Mapping[str, jax.Array],
    model: nn.Module,
    rngs: Mapping[str, jax.Array] | None = None,
    z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum of the cross-entropies of the next tokens of one device's rows, in float32; with dropout if there are `rngs`.

    Returns:
        The sum, and {"weight": number of labels, "correct": labels that score highest}; all scalars, to be summed over
        micro-batches and devices before the division. With `z_loss` the sum is the two parts that stand beside the others:
        "loss", the cross-entropies, and "z_loss".
    """
    hidden_BTH = model.apply({"params": params}, batch["input_ids"], batch["attention_mask"], rngs=rngs)
    weights_BT = batch["label_weights"]
    loss, sums = losses.fused_cross_entropy(model, params, hidden_BTH, batch["labels"], weights_BT, z_loss)
    return loss, {"weight": weights_BT.sum(), **sums}


def eval_metrics(totals: Mapping[str, float]) -> dict[str, float]:
    """Evaluation results from the sums over all labels: loss (nats per label), accuracy, perplexity, bits per byte of text.

    The last compares models whose tokenizers differ: bits per token, times the tokens in a byte of the evaluation text. It is
    left out where there are tokens only and no text.
    """
    loss = totals["loss"] / max(totals["weight"], 1)
    accuracy = totals["correct"] / max(totals["weight"], 1)
    metrics = {"eval_loss": loss, "eval_accuracy": accuracy, "eval_perplexity": float(np.exp(loss))}
    if totals.get("text_bytes"):
        metrics["eval_bits_per_byte"] = loss / math.log(2) * totals["text_tokens"] / totals["text_bytes"]
    return metrics


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
