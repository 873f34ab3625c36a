# SPDX-License-Identifier: Apache-2.0
"""--profile_steps: a trace of some steps."""

import jax
import pytest

from flaxlm import arguments, logs, profiles
from tests.conftest import run


def steps_in(output_dir) -> list[int]:
    """The steps that the trace in a directory holds, by the annotation that TensorBoard reads."""
    (path,) = output_dir.glob("plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events if event.name == "train"]
    return sorted(dict(event.stats)["step_num"] for event in events)


def test_a_trace_holds_its_steps(roberta_dir, corpus, tmp_path, messages_logged):
    """The first one and the last one included; a save may lie between them."""
    flags = ["--train_file", corpus, "--max_steps", 6, "--save_steps", 3, "--do_train"]
    results = run(tmp_path / "a", roberta_dir, *flags, "--profile_steps", "2:4")
    assert steps_in(tmp_path / "a") == [2, 3, 4]
    run(tmp_path / "b", roberta_dir, *flags)
    plain = run(tmp_path / "b", roberta_dir, *flags, "--overwrite_output_dir")
    assert plain["train_loss"] == results["train_loss"]
    # An overwritten run's trace is not taken for one of the new run; and a resumed run may be past it.
    run(tmp_path / "a", roberta_dir, *flags, "--overwrite_output_dir")
    assert not (tmp_path / "a" / "plugins" / "profile").exists()
    run(
        tmp_path / "a",
        roberta_dir,
        *flags,
        "--resume_from_checkpoint",
        tmp_path / "a" / "checkpoint-3",
        "--profile_steps",
        "2:4",
    )
    assert not (tmp_path / "a" / "plugins" / "profile").exists()


def test_the_clock_stands_still_while_a_trace_is_written(tmp_path):
    """Of 8 steps two are traced; the time is theirs alone, and none for beginning and writing the trace."""
    profile = profiles.Profile(arguments.TrainingArguments(str(tmp_path), do_train=True, profile_steps="3:4"), 8)
    clock, state = logs.Stopwatch(), jax.numpy.ones(())
    for step in range(1, 9):
        if clock.started is None:
            clock.start()
        profile.begin(step, state, clock)
        assert profile.is_running == (step in (3, 4))
        profile.end(step, state, clock)
        assert (clock.started is None) == (step == 4)
    assert steps_in(tmp_path) == [3, 4]
    assert clock.seconds() < 0.05  # to begin a trace takes longer than that, to write it too


def test_a_run_that_is_stopped_within(tmp_path):
    profile = profiles.Profile(arguments.TrainingArguments(str(tmp_path), do_train=True, profile_steps="1:9"), 9)
    clock = logs.Stopwatch()
    profile.begin(1, None, clock)
    profile.end(1, None, clock)
    profile.close()
    assert steps_in(tmp_path) == [1]
    profile.close()


def test_a_trace_that_cannot_be_written(tmp_path, messages_logged):
    """It is told of once, and stops nothing."""
    (tmp_path / "plugins").write_text("")
    profile = profiles.Profile(arguments.TrainingArguments(str(tmp_path), do_train=True, profile_steps="1:1"), 9)
    clock = logs.Stopwatch()
    profile.begin(1, None, clock)
    profile.end(1, None, clock)
    assert not profile.is_running
    assert len(messages_logged) == 1
    assert "the trace could not be written: " in messages_logged[0]


@pytest.mark.parametrize("text", ["10", "13:10", "0:3", "a:b", "1:2:3", "-1:4", "1.5:2", ""])
def test_malformed(text, refuses):
    with refuses("--profile_steps .*: must be first:last, as 10:13"):
        profiles.parse(text)


def test_steps_that_a_run_does_not_have(roberta_dir, corpus, tmp_path, refuses):
    flags = ["--train_file", corpus, "--max_steps", 6, "--do_train", "--profile_steps", "2:7"]
    with refuses("--profile_steps 2:7: the run ends with step 6"):
        run(tmp_path / "a", roberta_dir, *flags)
    with refuses(r"--profile_steps 2:7: the run ends with step \d$"):  # known when the data has been read
        run(tmp_path / "b", roberta_dir, *flags[:2], "--max_train_samples", 16, "--do_train", "--profile_steps", "2:7")
    assert not (tmp_path / "b").exists()


def test_an_evaluation_has_no_steps(refuses):
    """Told before anything is loaded, whatever the plan of a run that is only evaluated says."""
    training_args = arguments.TrainingArguments("out", do_eval=True, profile_steps="1:2")
    with refuses("--profile_steps 1:2: traces steps of training; add --do_train or drop the flag"):
        profiles.check(training_args, 100)
