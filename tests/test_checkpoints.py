# SPDX-License-Identifier: Apache-2.0
"""A run that is stopped, killed or damaged and then resumed gives what it would have given without: bit for bit."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import run_mlm_flax as script
from flaxlm import batches, checkpoints, cli, identity, logs, outputs, processes
from tests.conftest import ROOT, read_events

# Nothing lines up: epochs end after steps 5 and 10, evaluations are due after 4, 8 and 12, saves after 3, 6, 9 and 12, log
# lines after 7 and 12. Dropout is on.
FLAGS = [
    "--max_seq_length", 32, "--max_train_samples", 43, "--max_eval_samples", 12, "--max_steps", 12, "--eval_steps", 4,
    "--save_steps", 3, "--logging_steps", 7, "--learning_rate", 1e-3, "--warmup_steps", 2,
    "--config_overrides", "hidden_dropout_prob=0.1,attention_probs_dropout_prob=0.1",
]  # fmt: skip


MEASURED = ("train_runtime", "train_tokens_per_second", "train_memory_gib")


def outcome(output_dir: Path) -> dict:
    """All that a finished run leaves, times excepted; arrays and files as digests."""
    _, checkpoint = outputs.find_checkpoints(output_dir)[0]
    leaves, _ = jax.tree_util.tree_flatten_with_path(read_state(checkpoint))
    points = read_events(output_dir)
    for tag in ("train_time", "train_tokens_per_second", "train_memory_gib"):
        points[tag] = [step for step, _ in points[tag]]
    train_results = json.loads((output_dir / "train_results.json").read_text())
    evaluation = output_dir / "eval_results.json"
    return {
        "names": {
            path.name for path in output_dir.iterdir() if not re.match(r"events\.out|checkpoint-\d+(\.damaged)?$", path.name)
        },
        "weights": {name: digest((output_dir / name).read_bytes()) for name in ("model.safetensors", "flax_model.msgpack")},
        "picture": digest((output_dir / "training_curves.png").read_bytes()),
        "checkpoint": os.path.basename(checkpoint),
        "state": {jax.tree_util.keystr(path): digest(np.asarray(array).tobytes()) for path, array in leaves},
        "points": points,
        "train_results": {k: v for k, v in train_results.items() if k not in MEASURED},
        "eval_results": json.loads(evaluation.read_text()) if evaluation.exists() else None,
    }


def read_state(checkpoint: str | Path) -> dict:
    """The arrays of a checkpoint, as orbax itself restores them."""
    return ocp.StandardCheckpointer().restore(Path(checkpoint).resolve() / "state")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def files(directory: Path) -> dict[str, str]:
    """What is in a directory, to see whether anything changes."""
    return {str(path.relative_to(directory)): digest(path.read_bytes()) for path in directory.rglob("*") if path.is_file()}


def saved_steps(output_dir: Path) -> list[int]:
    """The steps of the complete ones."""
    return sorted(step for step, _ in outputs.find_checkpoints(output_dir))


@pytest.fixture(scope="module")
def common(roberta_dir, corpus) -> list:
    """The flags of all runs here, but for the output directory."""
    return ["--config_name", roberta_dir, "--tokenizer_name", roberta_dir, "--train_file", corpus, *FLAGS]


@pytest.fixture(scope="module")
def train(common) -> Callable:
    """train(output_dir, *more_flags): main() in this process."""

    def call(output_dir: Path, *more) -> dict[str, float]:
        return script.main([str(flag) for flag in [*common, "--output_dir", output_dir, *more]])

    return call


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("uninterrupted")
    train(output_dir)
    return output_dir


@pytest.fixture(scope="module")
def expected(uninterrupted) -> dict:
    return outcome(uninterrupted)


def signal_after(monkeypatch, step: int, signum: int = signal.SIGTERM) -> None:
    """Arrange for a real signal to this process when the given step has been dispatched."""
    add = logs.TrainingLog.add

    def add_and_signal(log, current, *args):
        add(log, current, *args)
        if current == step:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(logs.TrainingLog, "add", add_and_signal)


def train_until(train, output_dir: Path, step: int, *more) -> None:
    """Train and be told to stop after a step."""
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(processes.Stopped):
        signal_after(monkeypatch, step)
        train(output_dir, *more)
    assert step in saved_steps(output_dir)


@pytest.fixture(scope="module")
def stopped_after_8(train, tmp_path_factory) -> Path:
    """A run that ended after step 8 of 12; it holds checkpoints 6 and 8. Copy it before use."""
    output_dir = tmp_path_factory.mktemp("stopped")
    train_until(train, output_dir, 8)
    assert saved_steps(output_dir) == [6, 8]
    return output_dir


@pytest.fixture
def stopped(stopped_after_8, tmp_path) -> Path:
    """A copy of it to go on from, or to spoil."""
    return shutil.copytree(stopped_after_8, tmp_path / "run")


# ---- Stopped and resumed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [(6,), (2, 4), (5, 7, 11)], ids=str)
def test_resumed_equals_uninterrupted(stops, train, expected, tmp_path):
    """However often, and wherever in an epoch, a log window, or between saves and evaluations."""
    train_until(train, tmp_path, stops[0])
    for step in stops[1:]:
        train_until(train, tmp_path, step, "--resume_from_checkpoint")
    train(tmp_path, "--resume_from_checkpoint")
    assert outcome(tmp_path) == expected


def test_dropout_and_order_matter_here(expected, train, tmp_path):
    """The comparison would notice: another seed gives other weights, another state, another curve."""
    train(tmp_path, "--seed", 7)
    other = outcome(tmp_path)
    assert {key for key, value in expected.items() if value == other[key]} == {"names", "checkpoint"}


def test_resuming_a_finished_run(uninterrupted, train, expected, tmp_path):
    """It changes nothing; and what a crash between checkpoint and model files left undone is made up for."""
    output_dir = shutil.copytree(uninterrupted, tmp_path / "run")
    (output_dir / "model.safetensors").unlink()
    (output_dir / "flax_model.msgpack").write_text("of an earlier step")
    before = files(output_dir / "checkpoint-12")
    train(output_dir, "--resume_from_checkpoint")
    assert outcome(output_dir) == expected
    assert files(output_dir / "checkpoint-12") == before  # written anew, it could be lost in a crash


@pytest.mark.parametrize("evaluation", [1, 3], ids=["in training", "at the end"])
def test_stopped_in_an_evaluation(evaluation, train, expected, monkeypatch, tmp_path):
    """The signal comes between two batches of the evaluation; the resumed run evaluates again, once."""
    calls = []
    eval_batches = batches.eval_batches

    def eval_batches_and_signal(*args):
        calls.append(args)
        for batch in eval_batches(*args):
            if len(calls) == 1 + evaluation:  # before training one is tried
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(batches, "eval_batches", eval_batches_and_signal)
    with pytest.raises(processes.Stopped):
        train(tmp_path)
    assert len(calls) == 1 + evaluation
    assert not (tmp_path / "eval_results.json").exists()
    assert saved_steps(tmp_path)[-1] == 4 * evaluation
    train(tmp_path, "--resume_from_checkpoint")
    assert outcome(tmp_path) == expected


# ---- Processes that are killed or told to stop ---------------------------------------------------------------------------

# Imports everything once, then forks a process for every run: a real one, without the seconds that importing takes.
LAUNCHER = """
import json, os, resource, sys
import run_mlm_flax
from flaxlm import checkpoints, cli, logs
for line in sys.stdin:
    flags, stderr, environment = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.environ |= environment
        if "FILE_SIZE_LIMIT" in environment:  # from the moment a checkpoint has been read, or a log begins
            limits = int(environment["FILE_SIZE_LIMIT"]), resource.RLIM_INFINITY
            place, name = (logs.TrainingLog, "add") if "LIMIT_FROM" in environment else (checkpoints.Saver, "resume")
            original = getattr(place, name)
            def limited(*args):
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                return original(*args)
            setattr(place, name, limited)
        sys.argv[1:] = flags
        sys.exit(cli.run(run_mlm_flax.main, run_mlm_flax.__file__))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Process:
    """A run in a process of its own, to be killed, frozen or told to stop at chosen moments."""

    def __init__(self, launcher: subprocess.Popen, flags: list, stderr: Path, environment: dict[str, str]):
        self.launcher, self.stderr = launcher, stderr
        self.stderr.write_text("")
        launcher.stdin.write(json.dumps([[str(flag) for flag in flags], str(stderr), environment]) + "\n")
        launcher.stdin.flush()
        self.pid = int(launcher.stdout.readline())

    def said(self) -> str:
        return self.stderr.read_text()

    def wait_for(self, text: str) -> None:
        """Wait until it says something, looking every millisecond."""
        limit = time.monotonic() + 60
        while text not in self.said():
            assert time.monotonic() < limit, self.said()
            time.sleep(0.001)

    def send(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def end(self) -> int:
        """Wait for the end: the exit status, or minus the signal that ended it."""
        return int(self.launcher.stdout.readline())

    def last_line(self) -> str:
        return self.said().splitlines()[-1]


@pytest.fixture(scope="module")
def launcher() -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", LAUNCHER]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def start(launcher, common, tmp_path) -> Callable:
    """start(output_dir, *more_flags): a process that trains."""

    def call(output_dir: Path, *more, **environment: str) -> Process:
        return Process(launcher, [*common, "--output_dir", output_dir, *more], tmp_path / "stderr.txt", environment)

    return call


def test_killed_while_saving_and_while_training(start, train, expected, tmp_path):
    """SIGKILL while a save is being written, then again; what was half-written goes, and nothing is lost."""
    output_dir = tmp_path / "run"
    process = start(output_dir)
    process.wait_for("Saving step 6")
    half_written = None
    while not half_written:
        process.send(signal.SIGSTOP)
        half_written = [path for pattern in ("*-tmp*", ".saving-*") for path in output_dir.glob(pattern)]
        process.send(signal.SIGKILL if half_written else signal.SIGCONT)
        time.sleep(0.001)
    assert process.end() == -signal.SIGKILL

    process = start(output_dir, "--resume_from_checkpoint")
    process.wait_for("evaluation at step 8")
    process.send(signal.SIGKILL)
    assert process.end() == -signal.SIGKILL
    assert re.search("Resuming after step [36]", process.said())
    assert not any(path.exists() for path in half_written if path.name.startswith(".saving-"))

    train(output_dir, "--resume_from_checkpoint")
    assert outcome(output_dir) == expected


def test_signals_save_and_say_how_to_go_on(start, train, expected, tmp_path):
    """SIGTERM while the step is compiled, when nothing is gained yet; then SIGINT in training: one line, and nothing lost."""
    output_dir = tmp_path / "run"
    advice = "; to go on, run the same command with --resume_from_checkpoint"
    process = start(output_dir)
    process.wait_for("Compiling the training step")
    process.send(signal.SIGTERM)
    assert process.end() == 75
    assert process.last_line() == f"run_mlm_flax.py: stopped as asked, before its first step: it needs more time{advice}"
    assert saved_steps(output_dir) == [0]

    process = start(output_dir, "--resume_from_checkpoint")
    process.wait_for("step 7 of 12")
    process.send(signal.SIGINT)
    assert process.end() == 130
    assert process.last_line() == f"run_mlm_flax.py: stopped as asked{advice}"
    assert "Resuming after step 0" in process.said()
    assert saved_steps(output_dir)[-1] >= 7

    train(output_dir, "--resume_from_checkpoint")
    assert outcome(output_dir) == expected


def test_a_second_interrupt_ends_at_once(start, tmp_path):
    """Without finishing what is being compiled, and without saving."""
    process = start(tmp_path / "run")
    process.wait_for("Compiling the training step")
    process.send(signal.SIGINT)
    process.wait_for("Interrupt again to end at once")
    process.send(signal.SIGINT)
    assert process.end() == 130
    assert "Saving" not in process.said()
    assert saved_steps(tmp_path / "run") == []


# ---- Damage --------------------------------------------------------------------------------------------------------------


def largest_file(checkpoint: Path) -> Path:
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(checkpoint: Path) -> None:
    path = largest_file(checkpoint)
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(checkpoint: Path) -> None:
    path = largest_file(checkpoint)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose_a_file(checkpoint: Path) -> None:
    largest_file(checkpoint).unlink()


def lose_the_state(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "state")


def empty_the_progress(checkpoint: Path) -> None:
    (checkpoint / "progress" / "metadata").write_text("")


def change_a_digit_of_the_progress(checkpoint: Path) -> None:
    path = checkpoint / "progress" / "metadata"
    path.write_text(path.read_text().replace('"weight_sum": ', '"weight_sum": 1'))


DAMAGES = [truncate, flip_a_bit, lose_a_file, lose_the_state, empty_the_progress, change_a_digit_of_the_progress]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_passed_over(damage, stopped, train, expected, capsys):
    """With a warning that names it; the run goes on from the one before, and still gives the same."""
    damage(stopped / "checkpoint-8")
    train(stopped, "--resume_from_checkpoint")
    stderr = capsys.readouterr().err
    assert f"WARNING {stopped / 'checkpoint-8'} is damaged and passed over: " in stderr
    assert "Resuming after step 6" in stderr
    assert outcome(stopped) == expected


def test_a_damaged_checkpoint_does_not_outlive_the_good_ones(stopped, train, expected):
    """It does not count among the newest to keep: else a good one is deleted for it."""
    truncate(stopped / "checkpoint-8")
    flags = ["--resume_from_checkpoint", "--save_total_limit", 1]
    train_until(train, stopped, 7, *flags)
    train(stopped, *flags)
    assert saved_steps(stopped) == [12]
    assert outcome(stopped) == expected


def test_all_checkpoints_damaged(stopped, train, error_of):
    for checkpoint in stopped.glob("checkpoint-*"):
        truncate(checkpoint)
    message = error_of(train, stopped, "--resume_from_checkpoint")
    assert f"--resume_from_checkpoint: no checkpoint in {stopped} can be read" in message


def test_no_checkpoint(train, error_of, tmp_path):
    """Nor does a half-written one count, and a path that leads nowhere is named."""
    (tmp_path / "run" / "checkpoint-3.orbax-checkpoint-tmp").mkdir(parents=True)
    message = error_of(train, tmp_path / "run", "--resume_from_checkpoint")
    assert f"--resume_from_checkpoint: there is no checkpoint in {tmp_path / 'run'}" in message
    message = error_of(train, tmp_path / "new", "--resume_from_checkpoint", tmp_path / "nowhere")
    assert f"--resume_from_checkpoint {tmp_path / 'nowhere'}: no such directory" in message


def test_half_written_checkpoints_are_cleared_away(stopped, train, expected):
    shutil.copytree(stopped / "checkpoint-8", stopped / "checkpoint-9.orbax-checkpoint-tmp")
    (stopped / ".saving-abc").mkdir()
    (stopped / ".saving-abc" / "model.safetensors").write_text("half of")
    train(stopped, "--resume_from_checkpoint")
    assert outcome(stopped) == expected  # which lists the names


def spoil_progress(checkpoint: Path, change: Callable[[dict], None]) -> None:
    """Change what the progress says, with checksums that fit: damage that no checksum tells."""
    path = checkpoint / "progress" / "metadata"
    progress = json.loads(path.read_text())
    change(progress)
    path.write_text(json.dumps(progress))
    (checkpoint / "checksums.json").unlink()


PROGRESS_DAMAGES = {
    "no window": lambda progress: progress.pop("window"),
    "a window of numbers": lambda progress: progress.update(window=[1, 2]),
    "a point without loss": lambda progress: progress["window"][0].pop("loss"),
    "evaluations of words": lambda progress: progress.update(evaluations={"four": {}}),
    "a list": lambda progress: progress.update(evaluations=[]),
    "a step of text": lambda progress: progress.update(step="8"),
    "a negative step": lambda progress: progress.update(step=-8),
    "no positions": lambda progress: progress.update(positions=[]),
    "identity of text": lambda progress: progress.update(identity="x"),
    "no time": lambda progress: progress.update(train_time=None),
    "changes of text": lambda progress: progress.update(changes="x"),
}


@pytest.mark.parametrize("change", PROGRESS_DAMAGES.values(), ids=PROGRESS_DAMAGES)
def test_progress_that_is_json_and_nonsense(change, stopped, capsys):
    """Is passed over like other damage."""
    spoil_progress(stopped / "checkpoint-8", change)
    restored = read_progress(stopped)
    assert restored["step"] == 6
    assert "checkpoint-8 is damaged and passed over: " in capsys.readouterr().err
    assert (stopped / "checkpoint-8.damaged").is_dir()


def read_progress(output_dir: Path) -> dict:
    """What `restore` finds, whatever the identity."""
    cli.set_up_logging()
    _, newest = outputs.find_checkpoints(output_dir)[-1]
    state = jax.tree.map(jax.numpy.asarray, read_state(newest))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "compare", lambda *args: {})
        return checkpoints.restore("latest", str(output_dir), state, None)[1]


def test_a_checkpoint_that_is_not_to_blame_keeps_its_name(stopped, monkeypatch):
    """What is whole by its checksums and cannot be read all the same is not renamed, nor passed over."""

    def fail(*args, **kwargs):
        raise ValueError("no such device")

    monkeypatch.setattr(ocp.args, "StandardRestore", fail)
    with pytest.raises(cli.Accident, match="checkpoint-8 cannot be read, though its files are whole: no such device"):
        read_progress(stopped)
    assert saved_steps(stopped) == [6, 8]
    assert not list(stopped.glob("*.damaged"))


def test_where_nothing_may_be_renamed(stopped, monkeypatch, capsys):
    """A damaged checkpoint of a read-only directory is passed over under its name."""

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    truncate(stopped / "checkpoint-8")
    monkeypatch.setattr(checkpoints.os, "replace", refuse)
    assert read_progress(stopped)["step"] == 6
    assert saved_steps(stopped) == [6, 8]


def test_the_last_evaluation_of_a_finished_run_is_written_once(train, tmp_path):
    """Also where no evaluation was due at the last step; and if it was not written, it is made up for."""
    flags = ["--max_steps", 4, "--eval_steps", 3, "--save_steps", 4, "--warmup_steps", 1]
    train(tmp_path, *flags)
    train(tmp_path, *flags, "--resume_from_checkpoint")

    def raw_steps() -> list[int]:
        """Of every point that stands in a file, those that TensorBoard strikes out and shows twice included."""
        found = []
        for path in sorted(tmp_path.glob("events.out.tfevents.*")):
            for event in EventFileLoader(str(path)).Load():
                found += [event.step for value in event.summary.value if value.tag == "eval_loss"]
        return sorted(found)

    assert raw_steps() == [3, 4]
    for path in tmp_path.glob("events.out.tfevents.*"):
        path.unlink()
    train(tmp_path, *flags, "--resume_from_checkpoint")
    assert raw_steps() == [4]


# ---- Changed flags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--learning_rate", 2e-3], "--learning_rate is 0.002, but "),
        (["--seed", 7], "--seed is 7, but "),
        (["--mlm_probability", 0.2], "--mlm_probability is 0.2, but "),
        (["--max_seq_length", 16], "--max_seq_length is 16, but "),
        (["--document_attention"], "--document_attention is True, but "),
        (["--max_train_samples", 42], "--max_train_samples is 42, but "),
        (["--per_device_train_batch_size", 4], "the batch size (--per_device_train_batch_size x devices x "),
        (["--gradient_accumulation_steps", 2], "--gradient_accumulation_steps) is 16, but "),
        (["--max_steps", 13], "the number of steps (--max_steps, --num_train_epochs) is 13, but "),
        (["--warmup_steps", 3], "the number of warmup steps (--warmup_steps, --warmup_ratio) is 3, but "),
        (["--adafactor"], "--optim is adafactor, but "),
        (["--config_overrides", "hidden_dropout_prob=0.1"], "the configuration's attention_probs_dropout_prob is 0.0, but "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_changed_flag_is_named(change, named, stopped_after_8, train, error_of):
    """With both values, and it is the flag, not what follows from it (such as other rows of tokens)."""
    message = error_of(train, stopped_after_8, *change, "--resume_from_checkpoint")
    assert named in message
    assert f"{stopped_after_8}/checkpoint-8 was made with " in message


def test_changed_text_is_named(stopped_after_8, train, texts, error_of, tmp_path):
    """One word is enough."""
    changed = tmp_path / "changed.txt"
    changed.write_text("\n".join([*texts[:9], texts[9].replace("the", "a"), *texts[10:]]) + "\n", "utf-8")
    assert texts[9].count("the")
    message = error_of(train, stopped_after_8, "--train_file", changed, "--resume_from_checkpoint")
    assert "the training data (checksum) is " in message


def test_a_mistake_costs_no_results(uninterrupted, train, error_of):
    """A finished run's results survive a resume that is refused."""
    before = files(uninterrupted)
    error_of(train, uninterrupted, "--learning_rate", 1, "--resume_from_checkpoint")
    assert files(uninterrupted) == before


def test_free_flags_may_change(stopped, corpus, train, expected, tmp_path):
    """What is written, where and when: also a directory that was moved, text under another name, --num_train_steps."""
    moved, copy = tmp_path / "elsewhere" / "moved", tmp_path / "copy.txt"
    moved.parent.mkdir()
    stopped.rename(moved)
    shutil.copy(corpus, copy)
    train(
        moved, "--resume_from_checkpoint", moved / "checkpoint-6", "--train_file", copy, "--num_train_steps", 12,
        "--logging_steps", 2, "--eval_steps", 6, "--save_steps", 1, "--save_total_limit", 3,
    )  # fmt: skip
    assert saved_steps(moved) == [10, 11, 12]
    found = outcome(moved)
    assert {key for key, value in expected.items() if value != found[key]} == {"picture", "points"}
    assert found["points"]["train_loss"] == expected["points"]["train_loss"]
    assert [step for step, _ in found["points"]["eval_loss"]] == [4, 6, 12]


# ---- Knowingly otherwise -------------------------------------------------------------------------------------------------


def losses_of(output_dir: Path) -> list[float]:
    return [value for _, value in read_events(output_dir)["train_loss"]]


@pytest.fixture(scope="module")
def constant_for_14(train, tmp_path_factory) -> dict:
    """What 14 steps at a constant rate give, asked for at once."""
    output_dir = tmp_path_factory.mktemp("constant")
    train(output_dir, "--lr_scheduler_type", "constant", "--max_steps", 14)
    return outcome(output_dir)


@pytest.mark.parametrize("first", [9, 13])
def test_train_longer_where_the_schedule_does_not_look_at_the_end(first, train, constant_for_14, tmp_path):
    """A finished run goes on with more steps, bit for bit as if they had been asked for at once, without another flag."""
    train(tmp_path, "--lr_scheduler_type", "constant", "--max_steps", first)
    train(tmp_path, "--lr_scheduler_type", "constant", "--max_steps", 14, "--resume_from_checkpoint")
    found = outcome(tmp_path)
    for name in ("state", "weights", "train_results", "eval_results"):
        assert found[name] == constant_for_14[name], name
    for tag in ("train_loss", "train_grad_norm", "train_learning_rate"):
        assert found["points"][tag] == constant_for_14["points"][tag], tag
    assert "resume_changes" not in json.loads((tmp_path / "run_info.json").read_text())


def test_train_longer_before_the_decay_begins(train, error_of, tmp_path):
    """warmup_stable_decay: while the rate is kept nothing looks at the end; once it goes down that must be allowed."""
    schedule = ["--lr_scheduler_type", "warmup_stable_decay", "--num_decay_steps", 4]
    train(tmp_path / "at once", *schedule, "--max_steps", 14)
    train_until(train, tmp_path / "longer", 8, *schedule)  # of 12, whose decay begins after step 8
    train(tmp_path / "longer", *schedule, "--max_steps", 14, "--resume_from_checkpoint")
    assert outcome(tmp_path / "longer")["state"] == outcome(tmp_path / "at once")["state"]
    longer = [*schedule, "--max_steps", 20, "--resume_from_checkpoint"]
    line = error_of(train, tmp_path / "longer", *longer)  # after all 14 steps, four of them going down
    assert "allow it with --resume_changes max_steps" in line


def test_a_change_that_is_allowed_is_made_and_recorded(stopped, uninterrupted, train):
    """From its step on: until then the curve is the old one. It is told in run_info.json and the model card, once."""
    flags = ["--max_steps", 14, "--learning_rate", 2e-3, "--resume_from_checkpoint", "--resume_changes"]
    train(stopped, *flags, "max_steps,--learning-rate")
    found, rates = losses_of(stopped), dict(read_events(stopped)["train_learning_rate"])
    assert len(found) == 14
    assert found[:9] == losses_of(uninterrupted)[:9]  # the rate of step 9 shows in the loss of step 10
    assert found[9] != losses_of(uninterrupted)[9]
    assert rates[9] == pytest.approx(2e-3 * (14 - 8) / (14 - 2))
    told = json.loads((stopped / "run_info.json").read_text())["resume_changes"]
    steps = "the number of steps (--max_steps, --num_train_epochs)"
    assert told == [{"step": 8, "changes": {"--learning_rate": [1e-3, 2e-3], steps: [12, 14]}}]
    card = (stopped / "README.md").read_text()
    assert (
        f"after step 8, --learning_rate was changed from 0.001 to 0.002; after step 8, {steps} was changed from 12 to 14"
        in card
    )
    # The same command line again, as a requeued job has it: nothing differs from the newest checkpoint any more.
    train(stopped, *flags, "max_steps", "learning_rate")
    assert json.loads((stopped / "run_info.json").read_text())["resume_changes"] == told


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (["--max_steps", 13], "allow it with --resume_changes max_steps"),
        (["--mlm_probability", 0.2], "allow it with --resume_changes mlm_probability"),
        (["--per_device_train_batch_size", 4], "allow it with --resume_changes per_device_train_batch_size"),
        (["--max_train_samples", 42], "allow it with --resume_changes max_train_samples"),
        (["--adafactor"], "start a new run from the weights, with --model_name_or_path"),
        (["--config_overrides", "hidden_dropout_prob=0.1"], "start a new run from the weights, with --model_name_or_path"),
        (["--max_steps", 7], "is after step 8 already; give at least as many"),
        (["--max_steps", 7, "--resume_changes", "max_steps"], "is after step 8 already; give at least as many"),
        (["--mlm_probability", 0.2, "--max_steps", 13, "--resume_changes", "max_steps"], "--mlm_probability is 0.2, but "),
        (["--resume_changes", "max_stepz"], "--resume_changes max_stepz: no such flag"),
        (["--resume_changes", "lamb"], "--resume_changes lamb: the optimizer's state is of one kind; start from the weights"),
        (["--resume_changes", "max_steps,config_name"], "--resume_changes config_name: the weights are of one configuration"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_is_not_allowed_says_what_would_allow_it(change, advice, stopped_after_8, train, error_of):
    before = files(stopped_after_8)
    assert advice in error_of(train, stopped_after_8, *change, "--resume_from_checkpoint")
    assert files(stopped_after_8) == before


@pytest.mark.parametrize("change", ["optimizer", "dropout"])
def test_a_new_run_from_the_weights(change, stopped_after_8, common, error_of, capsys, tmp_path):
    """What the line about an optimizer or a configuration advises, to the letter."""
    flags, more = common[: common.index("--config_overrides")], []  # which weights would refuse
    fields = json.loads((stopped_after_8 / "config.json").read_text())
    if change == "optimizer":
        more, advice = ["--optim", "lion"], "start a new run from the weights, with --model_name_or_path, or"
    else:
        fields["hidden_dropout_prob"], advice = 0.3, "and a --config_name in which hidden_dropout_prob is as you want it"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    flags[flags.index("--config_name") + 1] = tmp_path

    def train(*where) -> None:
        script.main([str(flag) for flag in [*flags, *more, *where]])

    assert advice in error_of(train, "--output_dir", stopped_after_8, "--resume_from_checkpoint")
    train("--output_dir", tmp_path / "new", "--model_name_or_path", stopped_after_8)
    assert f"Loading weights from {stopped_after_8}" in capsys.readouterr().err
    trained = json.loads((tmp_path / "new" / "config.json").read_text())
    assert trained["hidden_dropout_prob"] == (0.3 if change == "dropout" else 0.1)


def test_changes_need_a_checkpoint(train, error_of, tmp_path):
    message = error_of(train, tmp_path / "new", "--resume_changes", "max_steps")
    assert "--resume_changes: says what may differ from a checkpoint; add --resume_from_checkpoint" in message


@pytest.mark.parametrize(
    "change", [["--mlm_probability", 0.3], ["--per_device_train_batch_size", 4], ["--max_grad_norm", 0.5], ["--seed", 3],
               ["--weight_decay", 0.1], ["--max_train_samples", 30], ["--z_loss", 0.1]], ids=lambda change: change[0],
)  # fmt: skip
def test_other_changes(change, stopped, train, uninterrupted):
    """Whatever the optimizer's state does not depend on may change: training goes on, otherwise than it would have."""
    train(stopped, *change, "--resume_from_checkpoint", "--resume_changes", change[0].strip("-"))
    found = losses_of(stopped)
    assert len(found) == 12
    assert found[:8] == losses_of(uninterrupted)[:8] != found[:8] + found[8:] != losses_of(uninterrupted)


def test_a_loss_with_other_parts_than_before(stopped, train):
    """z_loss is switched on within a log window, and off again within the next: each point has the parts that it had."""
    allowed = ["--resume_from_checkpoint", "--resume_changes", "z_loss"]
    train_until(train, stopped, 10, "--z_loss", 0.1, *allowed, "--logging_steps", 9)
    train(stopped, *allowed)
    points = read_events(stopped)
    assert [step for step, _ in points["train_loss"]] == list(range(1, 13))
    assert [step for step, _ in points["train_z_loss"]] == [9, 10]
    told = json.loads((stopped / "run_info.json").read_text())["resume_changes"]
    assert told == [{"step": 8, "changes": {"--z_loss": [0.0, 0.1]}}, {"step": 10, "changes": {"--z_loss": [0.1, 0.0]}}]


def test_changes_one_after_the_other(stopped, start, train):
    """There and back and there again, killed in between and started anew: the record has each one that was made."""
    allowed = ["--save_steps", 1, "--resume_from_checkpoint", "auto", "--resume_changes", "learning_rate"]
    train_until(train, stopped, 9, "--learning_rate", 2e-3, *allowed)
    process = start(stopped, "--learning_rate", 3e-3, *allowed)  # told before it has saved anything
    process.wait_for("Compiled the training step")
    process.send(signal.SIGKILL)
    process.end()
    for path in stopped.glob("checkpoint-1?"):  # should it have been quicker
        shutil.rmtree(path)
    train_until(train, stopped, 10, *allowed)
    train(stopped, "--learning_rate", 2e-3, *allowed)
    told = json.loads((stopped / "run_info.json").read_text())["resume_changes"]
    rates = [(8, [1e-3, 2e-3]), (9, [2e-3, 1e-3]), (10, [1e-3, 2e-3])]
    assert told == [{"step": step, "changes": {"--learning_rate": change}} for step, change in rates]


# ---- The same command line, always ---------------------------------------------------------------------------------------


def test_the_same_command_for_every_start(train, expected, tmp_path, capsys):
    """--resume_from_checkpoint auto: nothing there, then a run that was cut short before its first save, then checkpoints."""
    auto = ["--resume_from_checkpoint", "auto"]
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(checkpoints.Saver, "save", interrupt)
        train(tmp_path, *auto)
    assert {path.name.partition(".")[0] for path in tmp_path.iterdir()} == {"events", "run_info"}
    capsys.readouterr()
    train_until(train, tmp_path, 5, *auto)
    assert "There is no checkpoint to go on from: starting." in capsys.readouterr().err
    train_until(train, tmp_path, 8, *auto)
    assert "Resuming after step 5" in capsys.readouterr().err
    train(tmp_path, *auto)
    assert outcome(tmp_path) == expected
    train(tmp_path, *auto)  # finished: nothing is left to do
    assert outcome(tmp_path) == expected


def interrupt(*args):
    raise KeyboardInterrupt


def test_stopped_it_says_to_run_the_same_command(train, tmp_path):
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(processes.Stopped, match=r"run the same command again$"):
        signal_after(monkeypatch, 2)
        train(tmp_path, "--resume_from_checkpoint", "auto")


def test_auto_starts_nothing_where_others_keep_things(stopped, train, error_of, tmp_path):
    """A directory of something else; a finished run whose checkpoints were taken away; checkpoints that are all damaged."""
    auto = ["--resume_from_checkpoint", "auto"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    assert "is not empty and holds no run of ours; name another directory" in error_of(train, tmp_path / "mine", *auto)
    for _, checkpoint in outputs.find_checkpoints(stopped):
        Path(checkpoint).rename(f"{checkpoint}.damaged")
    before = files(stopped)
    assert f"there is no checkpoint in {stopped}; to start anew" in error_of(train, stopped, *auto)
    assert files(stopped) == before
    for path in stopped.glob("checkpoint-*"):
        shutil.rmtree(path)
    (stopped / "train_results.json").write_text("{}")
    assert "holds a finished run without its checkpoints; name another" in error_of(train, stopped, *auto)


def test_into_another_directory(stopped_after_8, train, expected, tmp_path):
    """A path may lead to the checkpoint of another output directory, which stays as it is."""
    before = files(stopped_after_8)
    train(tmp_path / "other", "--resume_from_checkpoint", stopped_after_8, "--save_total_limit", 1)
    found = outcome(tmp_path / "other")
    assert {key for key, value in expected.items() if value != found[key]} == {"points"}  # which begin with the window
    assert found["points"]["train_loss"] == expected["points"]["train_loss"][7:]
    assert saved_steps(tmp_path / "other") == [12]
    assert files(stopped_after_8) == before


# ---- Gradient accumulation -----------------------------------------------------------------------------------------------

# Adam would blow up the rounding error of gradients that are zero, those of key biases.
LARGE_BATCH = [
    "--config_overrides", "hidden_dropout_prob=0.0", "--adam_epsilon", 1e-4, "--max_steps", 4, "--max_train_samples", 100,
    "--logging_steps", 2,
]  # fmt: skip


@pytest.fixture(scope="module")
def batches_of_32(train, tmp_path_factory) -> Path:
    """4 updates from 32 rows each, at once; dropout off."""
    output_dir = tmp_path_factory.mktemp("large")
    train(output_dir, *LARGE_BATCH, "--per_device_train_batch_size", 32)
    return output_dir


def assert_close(found: Path, expected: Path) -> None:
    """Curves to 1e-5, weights to 2e-5; steps exactly."""
    points, expected_points = read_events(found), read_events(expected)
    assert points.keys() == expected_points.keys()
    for tag in ("train_loss", "train_grad_norm", "train_learning_rate", "eval_loss"):
        assert dict(points[tag]) == pytest.approx(dict(expected_points[tag]), rel=1e-5), tag
    weights, expected_weights = (load_file(path / "model.safetensors") for path in (found, expected))
    for name in expected_weights:
        np.testing.assert_allclose(weights[name], expected_weights[name], atol=2e-5, err_msg=name)


def test_accumulation_equals_a_large_batch(batches_of_32, train, tmp_path):
    """4 x 8 gives what 1 x 32 gives; steps, epochs, schedule and log count updates. And it is resumed exactly."""
    flags = [*LARGE_BATCH, "--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 4]
    results = train(tmp_path / "run", *flags)
    assert_close(tmp_path / "run", batches_of_32)
    assert [step for step, _ in read_events(tmp_path / "run")["train_loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in read_events(tmp_path / "run")["train_time"]] == [2, 4]
    rates = [rate for _, rate in read_events(tmp_path / "run")["train_learning_rate"]]
    assert rates == pytest.approx([0, 0.5e-3, 1e-3, 0.5e-3])
    assert results["train_steps"] == 4
    assert results["epoch"] == 4 / 3

    train_until(train, tmp_path / "resumed", 1, *flags)
    train(tmp_path / "resumed", *flags, "--resume_from_checkpoint")
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "run")


def test_accumulation_on_two_devices(batches_of_32, start, tmp_path):
    """2 devices x 2 micro-batches x 8 rows give the same as well."""
    flags = [*LARGE_BATCH, "--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 2]
    process = start(tmp_path / "run", *flags, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert process.end() == 0, process.said()
    assert "on 2 device(s)" in process.said()
    assert_close(tmp_path / "run", batches_of_32)


# ---- What goes wrong in training and saving ------------------------------------------------------------------------------


def test_divergence_stops_the_run(start, tmp_path):
    """Status 1 and one line, which names the step and a remedy; the checkpoint before it is whole, and finite.

    The warmup begins at 0, so the first step changes nothing, the second ruins the weights and the third shows it.
    """
    output_dir = tmp_path / "run"
    process = start(output_dir, "--learning_rate", 1e30, "--save_steps", 1, "--logging_steps", 5)
    assert process.end() == 1
    (line,) = (line for line in process.said().splitlines() if not re.match(r"\d\d:\d\d:\d\d (INFO|WARNING) ", line))
    assert re.match(r"run_mlm_flax.py: error: step 3: the loss is (nan|inf), the gradient norm (nan|inf)\. ", line)
    assert "--learning_rate" in line
    assert saved_steps(output_dir) == [1, 2]
    for step in (1, 2):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(read_state(output_dir / f"checkpoint-{step}")))
    assert all(np.isfinite(array).all() for array in load_file(output_dir / "model.safetensors").values())
    assert not (output_dir / "train_results.json").exists()


# Bytes in a file: less than the weights take, and than a description of the arrays that every checkpoint holds in one file
# (the arrays themselves are spread over files of any size); more than anything else that is written from then on.
LIMIT = 60_000


def test_full_disk(start, stopped, train, expected):
    """No file may grow beyond a limit that the kernel sets: saves fail, earlier ones stay, and the exit status is 1."""
    weights = (stopped / "model.safetensors").read_bytes()
    process = start(stopped, "--resume_from_checkpoint", FILE_SIZE_LIMIT=str(LIMIT))
    assert process.end() == 1
    for step in (9, 12):
        (line,) = re.findall(f"ERROR Step {step} could not be saved: .*", process.said())
        assert re.search(r": (\[Errno 27\] )?File too large\b.*\. What was saved before is untouched: step 6, 8\.$", line)
    others = [line for line in process.said().splitlines() if not re.match(r"\d\d:\d\d:\d\d (INFO|ERROR) ", line)]
    assert len(others) == 1, others  # orbax has much to say of each array that it could not write
    assert f"run_mlm_flax.py: error: the state after the last step was not saved in {stopped}" in process.said()
    assert saved_steps(stopped) == [6, 8]
    assert (stopped / "model.safetensors").read_bytes() == weights
    train(stopped, "--resume_from_checkpoint")
    assert outcome(stopped) == expected


def test_a_disk_that_is_full_from_the_start(start, tmp_path):
    """No save succeeds, nor what is written beside; nothing temporary stays, and nobody is told of checkpoints that are not."""
    output_dir = tmp_path / "run"
    process = start(output_dir, FILE_SIZE_LIMIT="20000", LIMIT_FROM="the first step")  # what it says is a file as well
    assert process.end() == 1
    assert process.last_line().startswith("run_mlm_flax.py: error: the state after the last step was not saved in ")
    assert process.last_line().endswith("; the log says why. Nothing has been saved so far")
    assert "ERROR Step 3 could not be saved: File too large. Nothing has been saved so far." in process.said()
    assert "ERROR README.md could not be written: File too large" in process.said()  # for its picture
    assert "step 12 of 12" in process.said()
    left = {path.name for path in output_dir.iterdir() if not path.name.startswith("events.out")}
    assert left == {"run_info.json", "train_results.json", "eval_results.json"}
    assert "Traceback" not in process.said()


def test_disk_that_has_space_again(stopped, train, expected, monkeypatch, capfd):
    """A failed save neither stops the run nor spoils the next one."""
    save, unlimited = checkpoints.Saver.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_with_limit(saver, step, *args):
        if step == 9:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, unlimited[1]))
        save(saver, step, *args)
        saver.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    monkeypatch.setattr(checkpoints.Saver, "save", save_with_limit)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # to be put back
    cli.silence_late_writes()  # pytest would format a traceback in a thread of orbax, which CPython 3.11 can't do safely
    train(stopped, "--resume_from_checkpoint")
    assert "ERROR Step 9 could not be saved: " in capfd.readouterr().err
    assert saved_steps(stopped) == [8, 12]
    assert outcome(stopped) == expected
