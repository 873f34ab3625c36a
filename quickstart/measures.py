# SPDX-License-Identifier: Apache-2.0
"""What a model of a quick start has learnt: accuracy and loss where nothing need only be copied, beside a baseline.

Counted are the masked tokens, the next tokens, T5's hidden text without sentinels and ends, the tokens that were hidden from
BART or that it must put back in order, and next sentences. All figures are of text that was held out.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import datasets
import flax.linen as nn
import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from flaxlm import arguments, batches, cli, corpus, evaluation, files, models, token_rows, tokenization, weights
from flaxlm.token_rows import Collator, TokenRows

# Shape letters: N rows, T tokens in a row, R uniform numbers per row, V vocabulary.

SEEDS = range(4)  # of the noise in held-out text: each text is measured with noise of each
HALF_WAY = {  # how many times the baseline a model that has learnt something has at least
    "masked tokens": 5.0,
    "next tokens": 5.0,
    "next sentences": 1.15,
    "own text tokens": 1.75,
    "hidden or moved tokens": 2.0,
}
LEFT_OUT = {
    "own text tokens": "sentinels and ends of texts, which follow from their order, are left out",
    "hidden or moved tokens": "tokens that only need to be copied are left out",
}


class Measure(NamedTuple):
    """Accuracy and loss (nats per label) of a model and of a baseline at the same labels."""

    name: str
    model: float
    baseline: float
    baseline_name: str
    loss: float
    baseline_loss: float


class Trained(NamedTuple):
    """A model that a training script has written, and what the script made of the text."""

    script: ModuleType
    args: arguments.Arguments
    results: Mapping[str, float]  # of the script's last evaluation
    tokenizer: PreTrainedTokenizerBase
    model: nn.Module
    params: Any
    collator: Collator
    data: corpus.Corpus


# ---- What was trained ----------------------------------------------------------------------------------------------------


def load(model_dir: Path, corpus_dir: Path) -> Trained:
    """The model of an output_dir, and the rows that its script makes of train.txt and validation.txt in a directory."""
    for name in ("train.txt", "validation.txt"):
        if not (corpus_dir / name).is_file():
            cli.fail(f"--corpus_dir {corpus_dir}: has no {name}; make it with python_docs_corpus.py")
    info, results = (read_json(model_dir, name) for name in ("run_info.json", "eval_results.json"))
    if not Path(__file__).resolve().parent.parent.joinpath(info["script"]).is_file():
        cli.fail(f"--model_dir {model_dir}: was trained by {info['script']}, which is not here")
    script = importlib.import_module(Path(info["script"]).stem)
    kinds = (arguments.ModelArguments, script.DataTrainingArguments, arguments.TrainingArguments)
    args = arguments.Arguments(*(of_record(kind, info["arguments"]) for kind in kinds))
    args = args._replace(data=of_corpus(args.data, corpus_dir))
    tokenizer = tokenization.load_tokenizer(dataclasses.replace(args.model, tokenizer_name=str(model_dir)))
    model, params = weights.from_pretrained(str(model_dir), script.MODELS)
    row_length = tokenization.choose_row_length(args.data, model.config, tokenizer)
    collator = script.Collator(tokenizer, model.config, args.data, row_length)
    tokenize_fn = functools.partial(script.tokenize_texts, tokenizer=tokenizer, **collator.tokenize_options)
    data = corpus.prepare(args, tokenize_fn, collator)
    return Trained(script, args, results, tokenizer, model, params, token_rows.for_evaluation(collator), data)


def read_json(model_dir: Path, name: str) -> dict[str, Any]:
    path = model_dir / name
    if not path.is_file():
        cli.fail(f"--model_dir {model_dir}: has no {name}; name the output_dir of a training with evaluation that is finished")
    return json.loads(path.read_text("utf-8"))


def of_record(kind: type, record: Mapping[str, Any]) -> Any:
    """Flags as run_info.json has them."""
    return kind(**{f.name: record[f.name] for f in dataclasses.fields(kind) if f.name in record})


def of_corpus(data_args: arguments.DataArguments, corpus_dir: Path) -> arguments.DataArguments:
    """The same flags with the text of a quick start, all of it."""
    paths = {f"{split}_file": [str(corpus_dir / f"{split}.txt")] for split in ("train", "validation")}
    none = dict.fromkeys(("dataset_name", "mixture_file", "max_train_samples"))
    return dataclasses.replace(data_args, **paths, **none, streaming=False)


# ---- Measuring -----------------------------------------------------------------------------------------------------------


def find(trained: Trained) -> list[Measure]:
    """The measures of a model; the first is the one that tells most."""
    results, classes = trained.results, trained.script.MODELS
    if classes is models.SPANS:
        return [measure(trained, "own text tokens", text_labels)]
    if classes is models.DENOISING:
        return [measure(trained, "hidden or moved tokens", hidden_or_moved)]
    if classes is models.CAUSAL:
        return [evaluated(trained, "next tokens", "eval_loss")]
    if classes is models.MASKED:
        return [evaluated(trained, "masked tokens", "eval_loss")]
    names = ("eval_next_sentence_accuracy", "eval_next_sentence_loss")
    accuracy, loss = (results[name] for name in names)
    pairs = Measure("next sentences", accuracy, 0.5, "chance", loss, float(np.log(2)))
    return [pairs, evaluated(trained, "masked tokens", "eval_masked_lm_loss")]


# Which of the labels [N, T] of a batch count: of the collator, the rows, the uniform numbers and what was made of them.
CountFn = Callable[[Collator, TokenRows, np.ndarray, Mapping[str, np.ndarray]], np.ndarray]


def all_labels(collator: Collator, rows: TokenRows, uniforms_NR: np.ndarray, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Those that the script itself evaluates."""
    return np.ones_like(batch["label_weights"], bool)


def text_labels(collator: Collator, rows: TokenRows, uniforms_NR: np.ndarray, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Labels of T5 that are text: neither a sentinel nor an end."""
    return ~np.isin(batch["labels"], [*collator.sentinel_ids_S, collator.eos_token_id])


def hidden_or_moved(
    collator: Collator, rows: TokenRows, uniforms_NR: np.ndarray, batch: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Labels of BART that cannot be copied from behind the one before: covered by a mask, or the first of a moved sentence.

    Moved is a token that stands behind another one than in the text. Behind a mask nobody can see whether it was moved.
    """
    N, T = rows["input_ids"].shape
    places_NT = np.broadcast_to(np.arange(T, dtype=np.int32), (N, T))
    noised_NT, _ = collator.noise(rows, uniforms_NR, places_NT, mask=-1, padding=-2)
    row, column = np.nonzero(noised_NT >= 0)
    place, before = noised_NT[row, column], noised_NT[row, column - 1]
    counted_NT = np.ones((N, T), bool)  # a place that is not seen is hidden
    counted_NT[row, place] = (column > 0) & (before >= 0) & (before != place - 1)
    return counted_NT & ~collator.is_special_V[batch["labels"]] & (rows["input_ids"] >= 0)


@dataclasses.dataclass
class Counting:
    """A collator that gives a weight only to labels that count."""

    collator: Collator
    count_fn: CountFn

    @property
    def draws_per_row(self) -> int:
        return self.collator.draws_per_row

    def __call__(
        self, rows: TokenRows, uniforms_NR: np.ndarray, is_real_N: np.ndarray, num_groups: int
    ) -> dict[str, np.ndarray]:
        batch = self.collator(rows, uniforms_NR, is_real_N, num_groups)
        counted = self.count_fn(self.collator, rows, uniforms_NR, batch)
        return batch | {"label_weights": batch["label_weights"] * counted.astype(np.float32)}


def batches_of(trained: Trained, rows: TokenRows, count_fn: CountFn, seeds: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
    """All rows, with noise by each of the seeds."""
    plan = batches.make_plan(dataclasses.replace(trained.args.training, do_train=False), None, trained.collator.row_length)
    for seed in seeds:
        yield from batches.eval_batches(rows, Counting(trained.collator, count_fn), plan, seed)


def measure(trained: Trained, name: str, count_fn: CountFn, seeds: Sequence[int] = SEEDS) -> Measure:
    """What the model puts at the labels that count, by the script's own loss."""
    p_loss = jax.jit(functools.partial(trained.script.loss_fn, model=trained.model))
    totals: dict[str, float] = {}
    for batch in batches_of(trained, trained.data.validation, count_fn, seeds):
        loss, sums = p_loss(trained.params, batch)
        totals = evaluation.add_sums(totals, {"loss": loss, **sums})
    num_labels = max(totals["weight"], 1)
    baseline, baseline_loss = unigram_baseline(trained, count_fn, seeds)
    return Measure(name, totals["correct"] / num_labels, baseline, "unigram", totals["loss"] / num_labels, baseline_loss)


def evaluated(trained: Trained, name: str, loss_name: str) -> Measure:
    """What the script's evaluation found, whose labels are all that count."""
    baseline, baseline_loss = unigram_baseline(trained, all_labels, [trained.args.training.seed])
    return Measure(name, trained.results["eval_accuracy"], baseline, "unigram", trained.results[loss_name], baseline_loss)


def unigram_baseline(trained: Trained, count_fn: CountFn, seeds: Sequence[int]) -> tuple[float, float]:
    """Accuracy and loss of who knows only how often each token is a label that counts in the training text."""
    train_counts, validation_counts = (
        count_labels(batches_of(trained, rows, count_fn, numbers), trained.model.config.vocab_size)
        for rows, numbers in ((trained.data.train, [trained.args.training.seed]), (trained.data.validation, seeds))
    )
    return score_unigrams(train_counts, validation_counts, len(trained.tokenizer))


def count_labels(found: Iterator[Mapping[str, np.ndarray]], vocab_size: int) -> np.ndarray:
    """How often each id is a label that counts: int64 [V]."""
    counts = (np.bincount(batch["labels"][batch["label_weights"] > 0].reshape(-1), minlength=vocab_size) for batch in found)
    return sum(counts, np.zeros(vocab_size, np.int64))


def score_unigrams(train_counts: np.ndarray, validation_counts: np.ndarray, num_ids: int) -> tuple[float, float]:
    """Accuracy and loss (nats per label) of frequencies counted, plus one, on the training text."""
    probabilities = (train_counts[:num_ids] + 1) / (train_counts[:num_ids] + 1).sum()
    shares = validation_counts[:num_ids] / max(validation_counts.sum(), 1)
    return float(shares[train_counts.argmax()]), float(-(shares * np.log(probabilities)).sum())


# ---- As a program --------------------------------------------------------------------------------------------------------


def begin(description: str) -> argparse.Namespace:
    """Read the command line, and have libraries and our own modules keep to warnings."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model_dir", type=Path, required=True, help="output_dir of a training script")
    parser.add_argument("--corpus_dir", type=Path, required=True, help="directory with train.txt and validation.txt")
    parser.add_argument("--results_file", type=Path, help="JSON file to write the measures to; unset: they are only shown")
    cli.set_up_logging()
    cli.logger.setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    return parser.parse_args()


def show(measures: Sequence[Measure]) -> None:
    """Print the measures as a table, the first first."""
    print(f"\n{'':28s}{'the model':>19s}{'baseline':>19s}")
    print(f"{'On text that was held out:':28s}" + 2 * f"{'accuracy':>11s}{'loss':>8s}")
    for it in measures:
        figures = f"{it.model:11.1%}{it.loss:8.3f}{it.baseline:11.1%}{it.baseline_loss:8.3f}"
        print(f"  {it.name:26s}{figures}  {it.baseline_name}")
    print("unigram: always the commonest token of the training text")
    for it in measures:
        if it.name in LEFT_OUT:
            print(f"{it.name}: {LEFT_OUT[it.name]}")


def evenly(items: Sequence, number: int) -> Sequence:
    """So many of them, from the first on."""
    return items[:: max(1, len(items) // number)][:number]


def write(path: Path, measures: Sequence[Measure]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(str(path), {"measures": [it._asdict() for it in measures]})


def conclude(args: argparse.Namespace, measures: Sequence[Measure]) -> None:
    """Say where everything is, and end the program with an error if the model has not learnt what it should have."""
    if args.results_file:
        write(args.results_file, measures)
    print(f"\n{args.model_dir} holds flax_model.msgpack, model.safetensors (for PyTorch), config, tokenizer, *_results.json.")
    print(f"Curves: {Path(sys.executable).parent / 'tensorboard'} --logdir {args.model_dir}")
    if measures[0].model < HALF_WAY[measures[0].name] * measures[0].baseline:
        sys.exit("error: the model is not clearly better than the baseline; something is wrong")
