# SPDX-License-Identifier: Apache-2.0
"""The best evaluation is the model, and evaluations that get no better end a run; exact over resumes."""

import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import run_mlm_flax
from flaxlm import arguments, outputs, selection
from tests.conftest import read_events
from tests.test_checkpoints import common, outcome, saved_steps, train, train_until  # noqa: F401 (fixtures)

# So high a rate that evaluations get worse again, evaluated every second step.
WORSE = ["--learning_rate", 0.05, "--lr_scheduler_type", "constant", "--eval_steps", 2, "--warmup_steps", 0]


def make(**flags) -> arguments.TrainingArguments:
    return arguments.TrainingArguments(output_dir="x", **flags)


def series(*values: float, name: str = "eval_loss") -> dict[int, dict[str, float]]:
    return {10 * (i + 1): {name: value} for i, value in enumerate(values)}


def test_which_is_best():
    nan = float("nan")
    assert selection.best_step(make(), {}) is None
    assert selection.best_step(make(), series(nan)) is None
    assert selection.best_step(make(), series(3.0, nan, 2.0, 2.0, 2.5)) == 30
    accuracy = series(0.1, 0.3, 0.2, name="eval_accuracy")
    for name in ("accuracy", "eval_accuracy"):
        assert selection.best_step(make(metric_for_best_model=name), accuracy) == 20
    assert selection.best_step(make(metric_for_best_model="accuracy", greater_is_better=False), accuracy) == 10
    for name in ("perplexity", "bits_per_byte", "masked_lm_loss"):
        assert selection.best_step(make(metric_for_best_model=name), series(9.0, 7.0, 8.0, name=f"eval_{name}")) == 20


@pytest.mark.parametrize(
    ("losses", "threshold", "expected"),
    [
        ([], 0.0, 0),
        ([3.0], 0.0, 0),
        ([3.0, 3.0, 3.1], 0.0, 2),
        ([3.0, 3.1, 2.9], 0.0, 0),
        ([3.0, 2.95, 2.91, 2.85], 0.1, 3),  # each is compared with the best before it, as in transformers
        ([3.0, 2.95, 2.5], 0.1, 0),
        ([3.0, float("nan"), float("nan")], 0.0, 2),
    ],
)
def test_how_long_without_improvement(losses, threshold, expected):
    assert selection.num_without_improvement(make(early_stopping_threshold=threshold), series(*losses)) == expected


@pytest.mark.torch
def test_patience_is_that_of_transformers():
    """Its own callback counts the same, over random series."""
    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState  # needs PyTorch

    rng = np.random.default_rng(0)
    for threshold in (0.0, 0.3):
        theirs = types.SimpleNamespace(greater_is_better=False)  # all that it reads of its arguments
        callback, state, control = EarlyStoppingCallback(3, threshold), TrainerState(), TrainerControl()
        losses = rng.normal(size=30).round(1).tolist()
        for count in range(1, 31):
            callback.check_metric_value(theirs, state, control, losses[count - 1])
            if state.best_metric is None or losses[count - 1] < state.best_metric:
                state.best_metric = losses[count - 1]
            ours = selection.num_without_improvement(make(early_stopping_threshold=threshold), series(*losses[:count]))
            assert callback.early_stopping_patience_counter == ours


# ---- Whole runs ----------------------------------------------------------------------------------------------------------


def best_of(output_dir: Path) -> tuple[int, float]:
    points = read_events(output_dir)["eval_loss"]
    return min(points, key=lambda point: point[1])


@pytest.fixture(scope="module")
def best(train, tmp_path_factory) -> Path:  # noqa: F811
    """A run whose best evaluation is not the last, and whose saves fall elsewhere."""
    output_dir = tmp_path_factory.mktemp("best")
    train(output_dir, *WORSE, "--load_best_model_at_end", "--save_steps", 5, "--save_total_limit", 1)
    assert best_of(output_dir)[0] < 12
    return output_dir


def test_the_model_is_the_best(best, common, train, tmp_path):  # noqa: F811
    """Its files hold the weights of that step, its results are of it; the checkpoint is kept, and so is the last."""
    step, loss = best_of(best)
    assert saved_steps(best) == sorted({step, 12})
    results = json.loads((best / "eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert json.loads((best / "train_results.json").read_text())["best_step"] == step
    assert f"| step that the weights are of, the best by evaluation | {step} |" in (best / "README.md").read_text()
    data = ["--do_eval", "--model_name_or_path", best, "--tokenizer_name", best, "--config_name", best]
    where = common.index("--train_file")
    flags = [*data, *common[where : where + 2], "--max_seq_length", 32, "--max_eval_samples", 12, "--output_dir", tmp_path]
    evaluated = run_mlm_flax.main([str(flag) for flag in flags])
    assert evaluated["eval_loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("stops", [(3,), (8, 11)], ids=str)
def test_the_best_is_the_same_in_a_resumed_run(stops, best, train, tmp_path):  # noqa: F811
    more = [*WORSE, "--load_best_model_at_end", "--save_steps", 5, "--save_total_limit", 1]
    train_until(train, tmp_path, stops[0], *more)
    for step in stops[1:]:
        train_until(train, tmp_path, step, *more, "--resume_from_checkpoint")
    train(tmp_path, *more, "--resume_from_checkpoint")
    assert outcome(tmp_path) == outcome(best)


def test_the_best_comes_along_to_another_directory(best, train, tmp_path):  # noqa: F811
    """A run that goes on elsewhere takes the best state with it; the one that it goes on from stays as it is."""
    more = [*WORSE, "--load_best_model_at_end", "--save_steps", 5, "--save_total_limit", 1]
    shutil.copytree(best, tmp_path / "first")
    train(tmp_path / "second", *more, "--resume_from_checkpoint", tmp_path / "first")
    step, _ = best_of(best)
    assert step in saved_steps(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all((first[name] == second[name]).all() for name in first)


def test_stopping_early(best, train, tmp_path, capsys):  # noqa: F811
    """After the first evaluation that is not better; saved, logged and told; resumed it is over at once, and with
    more patience it goes on as if it had had that from the start."""
    losses = [value for _, value in read_events(best)["eval_loss"]]
    steps = [step for step, _ in read_events(best)["eval_loss"]]
    stop = next(steps[i] for i in range(1, 6) if losses[i] >= min(losses[:i]))
    assert stop < 12
    train(tmp_path, *WORSE, "--early_stopping_patience", 1)
    assert "Stopping early: 1 evaluation(s) in a row not better; the best loss was" in capsys.readouterr().err
    results = json.loads((tmp_path / "train_results.json").read_text())
    assert results["train_steps"] == stop
    assert saved_steps(tmp_path)[-1] == stop
    points = read_events(tmp_path)
    assert [step for step, _ in points["train_loss"]] == list(range(1, stop + 1))
    assert points["train_loss"] == read_events(best)["train_loss"][:stop]
    assert points["train_time"][-1][0] == stop
    train(tmp_path, *WORSE, "--early_stopping_patience", 1, "--resume_from_checkpoint")
    assert saved_steps(tmp_path)[-1] == stop
    again = json.loads((tmp_path / "train_results.json").read_text())
    assert {**again, "train_memory_gib": 0} == {**results, "train_memory_gib": 0}
    train(tmp_path, *WORSE, "--early_stopping_patience", 99, "--resume_from_checkpoint")
    assert outcome(tmp_path)["state"] == outcome(best)["state"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load_best_model_at_end"], "--load_best_model_at_end: needs evaluations to choose from; add --eval_steps"),
        (["--early_stopping_patience", 2], "--early_stopping_patience: needs evaluations to choose from; add --eval_steps"),
        (["--metric_for_best_model", "loss"], "--metric_for_best_model: says what is best; add --load_best_model_at_end"),
        (["--early_stopping_threshold", 0.1], "--early_stopping_threshold: goes with --early_stopping_patience"),
        (["--early_stopping_patience", 0], "--early_stopping_patience 0: must be at least 1"),
        (["--do_train", "--eval_steps", 2, "--load_best_model_at_end"], "--load_best_model_at_end: needs evaluations"),
        (["--eval_steps", 2, "--load_best_model_at_end", "--metric_for_best_model", "bleu"],
         "--metric_for_best_model bleu: evaluations give eval_loss, eval_accuracy, eval_perplexity; name one of them"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes(flags, message, common, error_of, tmp_path):  # noqa: F811
    without = common[: common.index("--eval_steps")] + common[common.index("--eval_steps") + 2 :]
    line = error_of(lambda: run_mlm_flax.main([str(flag) for flag in [*without, "--output_dir", tmp_path, *flags]]))
    assert message in line
    assert not outputs.find_checkpoints(str(tmp_path))
