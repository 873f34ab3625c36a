# SPDX-License-Identifier: Apache-2.0
"""The best evaluation is the model, and evaluations that get no better end a run; exact over resumes."""

import json
import math
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import run_mlm_flax
from flaxlm import arguments, checkpoints, evaluation, outputs, selection
from tests.conftest import read_events
from tests.test_checkpoints import common, outcome, saved_steps, train, train_until  # noqa: F401 (fixtures)

# A high loss counts as good, so that the first of the evaluations, after every second step, is the best on any machine.
FIRST_IS_BEST = ["--learning_rate", 1e-3, "--lr_scheduler_type", "constant", "--warmup_steps", 0]
FIRST_IS_BEST += ["--eval_steps", 2, "--greater_is_better", "true"]


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
        ([float("nan")], 0.0, 0),  # there is none before it
        ([float("nan"), float("nan"), 3.0, 3.1], 0.0, 1),
    ],
)
def test_how_long_without_improvement(losses, threshold, expected):
    assert selection.num_without_improvement(make(early_stopping_threshold=threshold), series(*losses)) == expected


@pytest.mark.torch
@pytest.mark.parametrize("name", ["loss", "eval_loss", "accuracy"])
def test_the_choice_is_that_of_transformers(name):
    """Its own trainer and callback choose and count the same, over random series with some that are no numbers."""
    from transformers import EarlyStoppingCallback, Trainer, TrainerControl, TrainerState  # needs PyTorch

    rng = np.random.default_rng(0)
    for threshold, first in [(0.0, 1.0), (0.3, 1.0), (0.3, float("nan")), (0.0, float("inf"))]:
        flags = {"metric_for_best_model": name, "load_best_model_at_end": True}
        # All that is read of its arguments, which would need accelerate; whether more is better is their own rule.
        theirs = types.SimpleNamespace(**flags, save_strategy="steps", greater_is_better=not name.endswith("loss"))
        callback, state, control = EarlyStoppingCallback(3, threshold), TrainerState(), TrainerControl()
        trainer = types.SimpleNamespace(args=theirs, state=state)
        ours = make(**flags, early_stopping_threshold=threshold, early_stopping_patience=3)
        values = [first, *rng.choice([*rng.normal(size=30).round(1), float("nan")], size=30).tolist()]
        evaluations = series(*values, name=f"eval_{name.removeprefix('eval_')}")
        for count, step in enumerate(evaluations, 1):
            state.global_step, so_far = step, dict(list(evaluations.items())[:count])
            callback.on_evaluate(theirs, state, control, evaluations[step])
            Trainer._determine_best_metric(trainer, evaluations[step], None)
            assert selection.high_is_good(ours) == theirs.greater_is_better
            assert selection.num_without_improvement(ours, so_far) == callback.early_stopping_patience_counter
            if not math.isinf(first):  # theirs never takes a state whose loss is infinite; ours has no other yet
                assert selection.best_step(ours, so_far) == state.best_global_step


# ---- Whole runs ----------------------------------------------------------------------------------------------------------


def best_of(output_dir: Path) -> tuple[int, float]:
    points = read_events(output_dir)["eval_loss"]
    return max(points, key=lambda point: point[1])


@pytest.fixture(scope="module")
def best(train, tmp_path_factory) -> Path:  # noqa: F811
    """A run whose best evaluation is not the last, and whose saves fall elsewhere."""
    output_dir = tmp_path_factory.mktemp("best")
    train(output_dir, *FIRST_IS_BEST, "--load_best_model_at_end", "--save_steps", 5, "--save_total_limit", 1)
    assert best_of(output_dir)[0] == 2
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
    more = [*FIRST_IS_BEST, "--load_best_model_at_end", "--save_steps", 5, "--save_total_limit", 1]
    train_until(train, tmp_path, stops[0], *more)
    for step in stops[1:]:
        train_until(train, tmp_path, step, *more, "--resume_from_checkpoint")
    train(tmp_path, *more, "--resume_from_checkpoint")
    assert outcome(tmp_path) == outcome(best)


def test_ended_between_the_best_evaluation_and_its_save(best, train, monkeypatch, tmp_path):  # noqa: F811
    """The same command goes on from the save before it, evaluates again, and chooses what an undisturbed run chooses."""
    more = [
        *FIRST_IS_BEST,
        "--load_best_model_at_end",
        "--save_steps",
        5,
        "--save_total_limit",
        1,
        "--resume_from_checkpoint",
        "auto",
    ]
    save, (best_step, _) = checkpoints.Saver.save, best_of(best)

    def end_at_the_best(saver, step, *args):
        if step == best_step:
            raise KeyboardInterrupt
        save(saver, step, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints.Saver, "save", end_at_the_best)
        train(tmp_path, *more)
    assert best_step not in saved_steps(tmp_path)
    train(tmp_path, *more)
    assert outcome(tmp_path) == outcome(best)


def test_the_best_comes_along_to_another_directory(best, train, tmp_path):  # noqa: F811
    """A run that goes on elsewhere takes the best state with it; the one that it goes on from stays as it is."""
    more = [*FIRST_IS_BEST, "--load_best_model_at_end", "--save_steps", 5, "--save_total_limit", 1]
    shutil.copytree(best, tmp_path / "first")
    train(tmp_path / "second", *more, "--resume_from_checkpoint", tmp_path / "first")
    step, _ = best_of(best)
    assert step in saved_steps(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all((first[name] == second[name]).all() for name in first)


def test_stopping_early(best, train, tmp_path, capsys):  # noqa: F811
    """After the first evaluation that is not better; saved, logged and told; resumed it is over at once, and with
    more patience it goes on as if it had had that from the start."""
    stop = 4  # the evaluation at step 2 is the best
    train(tmp_path, *FIRST_IS_BEST, "--early_stopping_patience", 1)
    assert "Stopping early: 1 evaluation(s) in a row not better; the best loss was" in capsys.readouterr().err
    results = json.loads((tmp_path / "train_results.json").read_text())
    assert results["train_steps"] == stop
    assert saved_steps(tmp_path)[-1] == stop
    points = read_events(tmp_path)
    assert [step for step, _ in points["train_loss"]] == list(range(1, stop + 1))
    assert points["train_loss"] == read_events(best)["train_loss"][:stop]
    assert points["train_time"][-1][0] == stop
    train(tmp_path, *FIRST_IS_BEST, "--early_stopping_patience", 1, "--resume_from_checkpoint")
    assert saved_steps(tmp_path)[-1] == stop
    again = json.loads((tmp_path / "train_results.json").read_text())
    assert {**again, "train_memory_gib": 0} == {**results, "train_memory_gib": 0}
    train(tmp_path, *FIRST_IS_BEST, "--early_stopping_patience", 99, "--resume_from_checkpoint")
    assert outcome(tmp_path)["state"] == outcome(best)["state"]


@pytest.fixture
def evaluations_give(monkeypatch):
    """evaluations_give(losses): what the next evaluations find, one after the other, whatever the weights."""

    def arrange(losses: list[float]) -> None:
        left = iter(losses)
        monkeypatch.setattr(evaluation.Evaluator, "__call__", lambda self, params, stop: {"eval_loss": next(left)})

    return arrange


def told(output_dir: Path) -> tuple[int, float]:
    results = [json.loads((output_dir / f"{name}_results.json").read_text()) for name in ("train", "eval")]
    return results[0]["best_step"], results[1]["eval_loss"]


CONSTANT = ["--lr_scheduler_type", "constant", "--eval_steps", 2, "--save_steps", 100, "--save_total_limit", 1]


def test_the_best_of_what_is_there(evaluations_give, train, capsys, tmp_path):  # noqa: F811
    """A run in which nobody asked for the best goes on with the flag: states that were never kept are none to compare with."""
    evaluations_give([1.0, 5.0, 5.0, 5.0])
    train(tmp_path, *CONSTANT, "--max_steps", 8)
    assert saved_steps(tmp_path) == [8]
    more = [*CONSTANT, "--load_best_model_at_end", "--resume_from_checkpoint", "auto"]
    evaluations_give([4.0, 3.0, 3.5])
    train_until(train, tmp_path, 15, *more, "--max_steps", 20)
    assert "The state of the best evaluation so far, step 2, was not kept." in capsys.readouterr().err
    assert saved_steps(tmp_path) == [12, 15]
    evaluations_give([3.1, 3.2, 3.3])
    train(tmp_path, *more, "--max_steps", 20)
    assert saved_steps(tmp_path) == [12, 20]
    assert told(tmp_path) == (12, 3.0)


def test_the_best_stays_where_a_better_one_could_not_be_saved(evaluations_give, train, monkeypatch, tmp_path):  # noqa: F811
    """The disk is full when step 4 should be saved; step 2 is the best of what there is, and stays to the end."""
    write_checksums = checkpoints.write_checksums

    def fail_at_4(path):
        if path.endswith("checkpoint-4"):
            shutil.rmtree(path)
            raise OSError(28, "No space left on device")
        write_checksums(path)

    monkeypatch.setattr(checkpoints, "write_checksums", fail_at_4)
    evaluations_give([2.0, 1.0, 5.0, 5.0, 5.0, 5.0])
    train(tmp_path, *CONSTANT, "--save_steps", 3, "--load_best_model_at_end")
    assert saved_steps(tmp_path) == [2, 12]
    assert told(tmp_path) == (2, 2.0)


def test_no_evaluation_is_a_number(evaluations_give, train, capsys, tmp_path):  # noqa: F811
    """Then the model is the last one; one NaN among others is none of the best, and counts as no improvement."""
    nan = float("nan")
    evaluations_give([nan] * 6)
    train(tmp_path / "none", *CONSTANT, "--load_best_model_at_end")
    assert (
        "No evaluation of a state that was saved gave a number: the model is that of the last step." in capsys.readouterr().err
    )
    evaluations_give([nan, 3.0, nan, nan])
    train(tmp_path / "some", *CONSTANT, "--load_best_model_at_end", "--early_stopping_patience", 2)
    assert told(tmp_path / "some") == (4, 3.0)
    assert saved_steps(tmp_path / "some") == [4, 8]


def test_stopped_early_and_started_again(evaluations_give, train, capsys, tmp_path):  # noqa: F811
    """The command of a job that starts again has nothing left to do and says why; so it is with more steps, until patience
    is raised as the line says. Where it stopped there was a save due, in the middle of a log window."""
    flags = [*CONSTANT, "--save_steps", 2, "--load_best_model_at_end", "--resume_from_checkpoint", "auto"]
    evaluations_give([3.0, 2.0, 2.5, 2.6])
    train(tmp_path, *flags, "--early_stopping_patience", 2)
    before = outcome(tmp_path)
    assert (told(tmp_path), saved_steps(tmp_path)) == ((4, 2.0), [4, 8])
    for more in ([], ["--max_steps", 16]):
        capsys.readouterr()
        train(tmp_path, *flags, *more, "--early_stopping_patience", 2)
        said = capsys.readouterr().err
        assert "the best loss was 2.0000, at step 4; a higher --early_stopping_patience goes on from here" in said
        found = outcome(tmp_path)
        assert {name for name in found if found[name] != before[name]} == set()
    evaluations_give([1.0, 5.0, 5.0, 5.0])
    train(tmp_path, *flags, "--max_steps", 16, "--early_stopping_patience", 3)
    assert (told(tmp_path), saved_steps(tmp_path)) == ((10, 1.0), [10, 16])


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
