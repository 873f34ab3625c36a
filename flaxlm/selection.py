# SPDX-License-Identifier: Apache-2.0
"""Which evaluation was the best, and is it time to stop: as transformers' Trainer has it, from the evaluations alone."""

import math
from collections.abc import Mapping

from flaxlm import arguments, cli

Evaluations = Mapping[int, Mapping[str, float]]  # metrics by step
LOW_IS_GOOD = ("loss", "perplexity", "bits_per_byte")  # ends of names


def metric_name(training_args: arguments.TrainingArguments) -> str:
    """As evaluations have it, with eval_ in front."""
    return f"eval_{(training_args.metric_for_best_model or 'loss').removeprefix('eval_')}"


def high_is_good(training_args: arguments.TrainingArguments) -> bool:
    if training_args.greater_is_better is not None:
        return training_args.greater_is_better
    return not metric_name(training_args).endswith(LOW_IS_GOOD)


def best_step(training_args: arguments.TrainingArguments, evaluations: Evaluations) -> int | None:
    """The step of the best evaluation, the first of equal ones; None if there is none, or none that gave a number."""
    scores = {step: score(training_args, metrics) for step, metrics in evaluations.items()}
    known = [step for step in sorted(scores) if not math.isnan(scores[step])]
    return max(known, key=lambda step: scores[step]) if known else None


def score(training_args: arguments.TrainingArguments, metrics: Mapping[str, float]) -> float:
    """The metric, so that more is better; NaN where an evaluation of another version has none."""
    value = metrics.get(metric_name(training_args), math.nan)
    return value if high_is_good(training_args) else -value


def num_without_improvement(training_args: arguments.TrainingArguments, evaluations: Evaluations) -> int:
    """How many evaluations, the last ones, were not better than the best before them by `early_stopping_threshold`.

    The first has none before it and never counts.
    """
    best, count = -math.inf, -1
    for step in sorted(evaluations):
        found = score(training_args, evaluations[step])
        is_better = found > best and not found - best <= training_args.early_stopping_threshold
        count = 0 if is_better else count + 1
        best = max(best, found) if not math.isnan(found) else best
    return max(count, 0)


def should_stop(training_args: arguments.TrainingArguments, evaluations: Evaluations) -> bool:
    """Has `early_stopping_patience` run out?"""
    patience = training_args.early_stopping_patience
    return patience is not None and num_without_improvement(training_args, evaluations) >= patience


def check(training_args: arguments.TrainingArguments) -> None:
    """Refuse flags that have nothing to choose from, or no effect."""
    chooses = training_args.load_best_model_at_end or training_args.early_stopping_patience is not None
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(training_args, name) not in (False, None) and not (training_args.eval_steps and training_args.do_eval):
            cli.fail(f"--{name}: needs evaluations to choose from; add --eval_steps (and --do_eval if --do_train is given)")
    for name in ("metric_for_best_model", "greater_is_better"):
        if getattr(training_args, name) is not None and not chooses:
            cli.fail(f"--{name}: says what is best; add --load_best_model_at_end or --early_stopping_patience, or drop it")
    if training_args.early_stopping_threshold and training_args.early_stopping_patience is None:
        cli.fail("--early_stopping_threshold: goes with --early_stopping_patience; add that, or drop it")


def check_metric(training_args: arguments.TrainingArguments, metrics: Mapping[str, float]) -> None:
    """Refuse a metric that evaluations, of which this is one, don't have."""
    if metric_name(training_args) not in metrics:
        names = ", ".join(metrics)
        cli.fail(f"--metric_for_best_model {training_args.metric_for_best_model}: evaluations give {names}; name one of them")
