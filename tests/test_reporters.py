# SPDX-License-Identifier: Apache-2.0
"""Where points go: the same ones to TensorBoard, Weights & Biases and Trackio, read back from what their own clients wrote."""

import contextlib
import json
import os
import re
import socket
import sqlite3
import struct
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

import run_clm_flax as script
from flaxlm import arguments, command_line, outputs, reporters
from tests.conftest import read_events


def wandb_records(output_dir: Path) -> list[list]:
    """The records of each run that wandb wrote below a directory, oldest first: LevelDB's log format, and wandb's messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    runs = []
    for path in sorted(output_dir.glob("wandb/*run-*/*.wandb")):
        data, position, whole, records = path.read_bytes(), 7, b"", []
        while position + 7 <= len(data):
            if position % 2**15 > 2**15 - 7:  # no header fits into what is left of the block
                position += -position % 2**15
                continue
            size, kind = struct.unpack_from("<HB", data, position + 4)
            whole += data[position + 7 : position + 7 + size]
            position += 7 + size
            if kind in (1, 4):  # whole, or its last part
                records.append(Record.FromString(whole))
                whole = b""
        runs.append(records)
    return runs


def wandb_rows(records: list) -> list[dict]:
    """The rows of a run in order; without what wandb adds."""
    items = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    rows = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in items]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]


def trackio_rows(directory: Path, project: str) -> list[tuple[str, int, dict]]:
    """(run, step, values) in order."""
    with contextlib.closing(sqlite3.connect(directory / f"{project}.db")) as database:
        rows = database.execute("select run_id, step, metrics from metrics order by id").fetchall()
    return [(run, step, json.loads(values)) for run, step, values in rows]


def renamed(points: dict[str, list[tuple[int, float]]]) -> dict[tuple[str, int], float]:
    return {(tag.replace("_", "/", 1), step): value for tag, found in points.items() for step, value in found}


def by_name_and_step(rows: list[tuple[int, dict]]) -> dict[tuple[str, int], float]:
    found = {}
    for step, row in rows:
        for name, value in row.items():
            assert (name, step) not in found, f"{name} is there twice at step {step}"
            found[name, step] = value
    return found


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    place = tmp_path_factory.mktemp("reports")
    environment = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(place / "trackio"), "WANDB_DIR": ""}
    return place, environment


@pytest.fixture(scope="module")
def train(places, gpt2_dir, corpus):
    """Train in a process of its own, as the clients want it."""
    place, environment = places

    def run(*flags, **changes):
        base = ["--config_name", gpt2_dir, "--tokenizer_name", gpt2_dir, "--train_file", corpus, "--block_size", 32]
        base += ["--max_train_samples", 64, "--max_eval_samples", 8, "--max_steps", 6, "--logging_steps", 3, "--eval_steps", 2]
        command = [sys.executable, script.__file__, *base, "--save_steps", 2, "--save_total_limit", 9, *flags]
        env = environment | {"XLA_FLAGS": ""} | changes
        return subprocess.run([*map(str, command)], env=env, cwd=place, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="module")
def reported(places, train):
    """A run with all three: its directory and what it said."""
    output_dir = places[0] / "my-run"
    flags = ["--report_to", "tensorboard", "wandb", "trackio", "--project", "tests", "--token", "hf_verysecret"]
    done = train("--output_dir", output_dir, *flags)
    assert done.returncode == 0, done.stderr
    return output_dir, done


def test_all_get_the_same_points(reported, places):
    """Under the names of the HF Trainer, at completed updates, in rows whose steps never fall."""
    output_dir, _ = reported
    expected = renamed(read_events(output_dir))
    assert {name for name, _ in expected} == {
        "train/loss", "train/learning_rate", "train/grad_norm", "train/time", "train/tokens_per_second", "train/memory_gib",
        "eval/loss", "eval/accuracy", "eval/perplexity", "eval/bits_per_byte",
    }  # fmt: skip
    assert [step for name, step in expected if name == "train/loss"] == [1, 2, 3, 4, 5, 6]
    (records,) = wandb_records(output_dir)
    from_wandb = [(row.pop("train/global_step"), row) for row in wandb_rows(records)]
    from_trackio = [(step, row) for _, step, row in trackio_rows(places[0] / "trackio", "tests")]
    for rows in (from_wandb, from_trackio):
        assert [step for step, _ in rows] == sorted(step for step, _ in rows)
        assert by_name_and_step(rows) == pytest.approx(expected, rel=1e-6)


def test_a_run_is_known_by_its_names(reported, places):
    """Project, name and configuration; the step axis."""
    output_dir, _ = reported
    (records,) = wandb_records(output_dir)
    of_kind = {record.WhichOneof("record_type"): record for record in records}
    run = of_kind["run"].run
    assert (run.project, run.display_name) == ("tests", "my-run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    axes = {
        r.metric.glob_name or r.metric.name: r.metric.step_metric for r in records if r.WhichOneof("record_type") == "metric"
    }
    assert axes["*"] == "train/global_step"
    with contextlib.closing(sqlite3.connect(places[0] / "trackio" / "tests.db")) as database:
        ((name, text),) = database.execute("select run_name, config from configs").fetchall()
    assert name == "my-run"
    for found in (config, json.loads(text)):
        assert found["learning_rate"] == 5e-5
        assert found["n_embd"] == 32
        assert found["model_type"] == "gpt2"
        assert "token" not in found


def test_what_they_say_does_not_drown_the_log(reported):
    """A line each from us, and nothing on standard output."""
    _, done = reported
    lines = [line for line in done.stderr.splitlines() if re.search("wandb|trackio|Weights & Biases", line, re.IGNORECASE)]
    assert done.stdout == ""
    assert len(lines) == 3, lines  # the first says the flags
    assert "Weights & Biases: offline in " in lines[1]
    assert "to upload: wandb sync " in lines[1]
    assert "Trackio: run my-run; to look at it: trackio show --project tests" in lines[2]


def test_tokens_reach_no_reporter(reported, places):
    """Not even by the command line, which wandb would keep."""
    for path in places[0].rglob("*"):
        assert not path.is_file() or b"hf_verysecret" not in path.read_bytes(), path


def test_a_resumed_run_goes_on(reported, places, train):
    """As the same run. What is there already of steps after the checkpoint is not sent to Trackio again; wandb knows nothing
    of it offline, so that those steps are there twice, with the same values."""
    output_dir, _ = reported
    before = trackio_rows(places[0] / "trackio", "tests")
    flags = ["--report_to", "wandb", "trackio", "--project", "tests", "--output_dir", output_dir]
    for step in (4, 6):  # as if killed before it was saved
        checkpoint = output_dir / f"checkpoint-{step}"
        checkpoint.rename(places[0] / checkpoint.name)
    with contextlib.closing(sqlite3.connect(places[0] / "trackio" / "tests.db")) as database:
        # before the last row reached the disk, too
        database.execute("delete from metrics where step = 6")
        database.commit()
    done = train(*flags, "--resume_from_checkpoint")
    assert done.returncode == 0, done.stderr
    after = trackio_rows(places[0] / "trackio", "tests")
    assert {run for run, _, _ in after} == {run for run, _, _ in before}
    rows = by_name_and_step([(step, row) for _, step, row in after])
    losses = {step: value for (name, step), value in rows.items() if name == "train/loss"}
    assert losses == dict(read_events(output_dir)["train_loss"]) == pytest.approx(losses)
    first, second = wandb_records(output_dir)
    ids = {record.run.run_id for records in (first, second) for record in records if record.WhichOneof("record_type") == "run"}
    assert len(ids) == 1
    of_first, of_second = ({row["train/global_step"]: row for row in wandb_rows(records)} for records in (first, second))
    assert sorted(of_second) == [1, 2, 3, 4, 5, 6] or sorted(of_second) == [3, 4, 5, 6]
    assert all(of_first[step].get("train/loss") == row.get("train/loss") for step, row in of_second.items())


def test_a_run_of_the_same_name_is_another(reported, places, train):
    output_dir = places[0] / "again" / "my-run"
    done = train("--output_dir", output_dir, "--report_to", "trackio", "--project", "tests", "--max_steps", 1)
    assert done.returncode == 0, done.stderr
    assert len({run for run, _, _ in trackio_rows(places[0] / "trackio", "tests")}) == 2
    assert not list(output_dir.glob("events*"))


AWAY = {"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}  # a login, and a server that does not answer


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (AWAY | {"WANDB_MODE": "online", "WANDB_INIT_TIMEOUT": "2"}, "Weights & Biases's points"),
        ({"TRACKIO_DIR": "/dev/null/x"}, "trackio failed to flush"),  # which it tells itself, and forgets
    ],
    ids=["no server", "no place"],
)
def test_a_reporter_that_fails_does_not_stop_training(changes, reason, places, train):
    """Told of once; the exit status is that of the training."""
    output_dir = places[0] / f"failing-{len(changes)}"
    done = train("--output_dir", output_dir, "--report_to", "tensorboard", "wandb", "trackio", "--max_steps", 2, **changes)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "no longer be written" in line or "trackio failed" in line]
    assert len(told) == 1, done.stderr
    assert reason in told[0]
    assert [step for step, _ in read_events(output_dir)["train_loss"]] == [1, 2]
    assert "step 2 of 2" in done.stderr


def test_a_point_that_cannot_be_sent(messages_logged):
    """The reporter is left alone from then on, and the others go on."""

    class Client:
        """A client of a service, as it fails."""

        def __init__(self, fails):
            self.identity, self.last, self.rows, self.fails = {}, 0, [], fails

        def send(self, step, row):
            if self.fails:
                raise ConnectionError("the network is away\nmore about it")
            self.rows.append((step, row))

        def finish(self):
            self.rows.append("end")

    reports = reporters.Reports()
    bad, good = Client(True), Client(False)
    reports.reporters = {"wandb": reporters.Rows(bad), "trackio": reporters.Rows(good)}
    for step in (1, 2):
        reports.add(step, {"train_loss": 1.0})
        reports.flush(step)
    reports.close()
    assert bad.rows == []
    assert good.rows == [(1, {"train/loss": 1.0}), (2, {"train/loss": 1.0}), "end"]
    assert messages_logged == ["Weights & Biases's points can no longer be written: the network is away; training goes on"]


def test_text(tmp_path):
    """TensorBoard's page of texts, beside the points."""
    reports = reporters.Reports()
    reports.open("tensorboard", lambda: reporters.TensorBoard(str(tmp_path), 0))
    reports.add(1, {"train_loss": 1.0})
    reports.add_text(2, "samples", "**Once** upon a time")
    reports.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["tensors"] == ["train_loss", "samples"]
    (event,) = events.Tensors("samples")
    assert (event.step, event.tensor_proto.string_val[0]) == (2, b"**Once** upon a time")
    assert events.SummaryMetadata("samples").plugin_data.plugin_name == "text"


def test_text_for_the_others(places, tmp_path):
    """In a process of its own, for trackio keeps its directory from when it is imported."""
    code = f"""
from pathlib import Path
from flaxlm import arguments, reporters
args = arguments.TrainingArguments({str(tmp_path / "out")!r}, project="texts")
Path(args.output_dir).mkdir()
reports = reporters.Reports()
for name, client in {{"wandb": reporters.Wandb, "trackio": reporters.Trackio}}.items():
    reports.open(name, lambda: reporters.Rows(client(args, {{}}, {{}})))
reports.add_text(2, "samples", "1 < 2, **Once**")
reports.flush(2)
reports.close()
assert not reports.failed, reports.failed
"""
    env = places[1] | {"PYTHONPATH": os.getcwd(), "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ((_, step, row),) = trackio_rows(tmp_path / "trackio", "texts")
    assert (step, row["samples"]) == (2, {"_type": "trackio.markdown", "_value": "1 < 2, **Once**"})
    (records,) = wandb_records(tmp_path / "out")
    rows = wandb_rows(records)
    assert rows[0]["train/global_step"] == 2
    (page,) = (tmp_path / "out").rglob("*.html")
    assert "1 &lt; 2, **Once**" in page.read_text()


def test_what_wandb_has_when_a_run_is_killed(places, tmp_path):
    """All but what came in the last moments: what a checkpoint says is sent does not come again."""
    code = f"""
import os, signal, time
from flaxlm import arguments, reporters
client = reporters.Rows(reporters.Wandb(arguments.TrainingArguments({str(tmp_path)!r}), {{}}, {{}}))
client.add(1, {{"train_loss": 1.0}})
client.flush(1)
time.sleep(5)
os.kill(os.getpid(), signal.SIGKILL)
"""
    env = places[1] | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr
    (records,) = wandb_records(tmp_path)
    assert wandb_rows(records) == [{"train/loss": 1.0, "train/global_step": 1}]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["mlflow"], "--report_to mlflow: unknown; known are tensorboard, wandb, trackio, and none"),
        (["none", "wandb"], "--report_to none wandb: none goes with nothing else"),
    ],
)
def test_names_that_cannot_be(names, message, refuses):
    with refuses(message):
        reporters.check(arguments.TrainingArguments("out", report_to=" ".join(names)))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.parametrize("folder", [False, True], ids=["", "a folder of that name"])
def test_a_package_that_is_missing(name, folder, refuses, tmp_path, monkeypatch):
    """wandb leaves a folder `wandb` where it runs, which Python takes for a package without anything in it."""
    if folder:
        (tmp_path / name).mkdir()
    keep = [path for path in sys.path if not Path(path, name).exists()]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *keep])
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    with refuses(rf'--report_to {name}: its package is not installed; pip install "flaxlm\[{name}\]", .* "\.\[{name}\]"'):
        reporters.check(arguments.TrainingArguments("out", report_to=name))


@pytest.mark.parametrize("given", [["tensorboard", "wandb"], "tensorboard wandb"])
def test_the_flag_in_a_file(given, corpus, tmp_path, monkeypatch):
    """A list, or one text."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    path = tmp_path / "arguments.json"
    values = {"config_name": "x", "tokenizer_name": "x", "train_file": str(corpus), "output_dir": str(tmp_path / "out")}
    path.write_text(json.dumps(values | {"report_to": given}))
    args = command_line.parse([str(path)], script.DataTrainingArguments, script.MODELS, None)
    assert args.training.report_to == "tensorboard wandb"
    assert "--report_to tensorboard wandb" in arguments.changed(*args)


def test_runs_of_wandb_stay_when_a_directory_is_used_again(reported):
    """They may not have been uploaded yet."""
    output_dir, _ = reported
    training_args = arguments.TrainingArguments(str(output_dir), do_train=True, overwrite_output_dir=True)
    assert "wandb" not in {path.name for path in outputs.stale_files(training_args)}


@pytest.fixture
def no_login(tmp_path, monkeypatch):
    """Nobody has logged in to Weights & Biases here: an environment without that, for a process of its own too."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "XDG_"))] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


REMEDY = "; run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline to upload later$"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--report_to wandb: No API key configured" + REMEDY),
        ({"WANDB_API_KEY": "short"}, "--report_to wandb: WANDB_API_KEY invalid: .*" + REMEDY),
        ({"WANDB_MODE": "ofline"}, "--report_to wandb: .*'offline'.*; see the variables WANDB_... in the environment$"),
        (AWAY, None),  # whether that is right its server knows, which is not asked
        ({"WANDB_MODE": "offline"}, None),
        ({"WANDB_MODE": "disabled"}, None),
    ],
    ids=["none", "malformed", "a mode that is none", "a key", "offline", "disabled"],
)
def test_a_login_that_is_missing(changes, message, no_login, monkeypatch, refuses):
    """Told before anything is loaded."""
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    training_args = arguments.TrainingArguments("out", do_train=True, report_to="tensorboard wandb")
    with refuses(message) if message else contextlib.nullcontext():
        reporters.check_login(training_args, goes_on=False)


@pytest.mark.parametrize(
    ("changes", "goes_on"),
    [({}, True), ({"do_train": False}, False), ({"multihost": True}, False), ({"report_to": "trackio"}, False)],
    ids=["goes on", "evaluation", "several processes", "another"],
)
def test_a_login_that_need_not_be_there(changes, goes_on, no_login):
    """Training that goes on is not stopped; of several processes only one needs it; an evaluation reports nowhere."""
    values = {"do_train": True, "report_to": "wandb"} | changes
    reporters.check_login(arguments.TrainingArguments("out", **values), goes_on)


def test_the_command_line_asks_for_a_login(no_login, corpus, tmp_path, refuses):
    """At a start, also one that may become another; not where there is a checkpoint."""
    output_dir = tmp_path / "out"
    flags = ["--config_name", "x", "--tokenizer_name", "x", "--train_file", corpus, "--output_dir", output_dir]
    flags += ["--report_to", "wandb", "--resume_from_checkpoint", "auto"]

    def parse():
        command_line.parse([*map(str, flags)], script.DataTrainingArguments, script.MODELS, None)

    with refuses("No API key configured"):
        parse()
    (output_dir / "checkpoint-2" / "state").mkdir(parents=True)
    (output_dir / "run_info.json").write_text('{"script": "", "arguments": {}, "versions": {}}')
    parse()


def test_nobody_is_asked_on_a_terminal(no_login, tmp_path):
    """wandb would show a menu there, and a run that nobody watches would stand still."""
    code = f"""
from flaxlm import arguments, reporters
reports = reporters.Reports()
args = arguments.TrainingArguments({str(tmp_path)!r})
reports.open("wandb", lambda: reporters.Rows(reporters.Wandb(args, {{}}, {{}})))
assert reports.failed == {{"wandb"}}
"""
    ours, theirs = os.openpty()
    env = os.environ | {"PYTHONPATH": os.getcwd(), "TERM": "xterm"}
    with contextlib.closing(os.fdopen(ours, "rb", buffering=0)) as terminal:
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=env, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        try:
            assert process.wait(timeout=120) == 0
        finally:
            process.kill()
        assert b"No API key configured" in (said := terminal.read(65536)), said
        assert b"Enter your choice" not in said


def test_a_space_that_never_answers(places, tmp_path):
    """Trackio would wait for ever, and training with it."""
    code = f"""
import sys
from flaxlm import arguments, reporters
reporters.START = 3.0
reports = reporters.Reports()
reports.open("trackio", lambda: reporters.Rows(reporters.Trackio(arguments.TrainingArguments({str(tmp_path)!r}), {{}}, {{}})))
assert reports.failed == {{"trackio"}}
assert sys.stdout is sys.__stdout__
"""
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, and says nothing
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        env = places[1] | {"PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_TOKEN": "hf_x"}
        env |= {"TRACKIO_SPACE_ID": "me/space", "TRACKIO_DIR": str(tmp_path / "trackio")}
        done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Trackio's points can no longer be written: no answer in 3 s; training goes on" in done.stderr


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_who_does_not_answer_is_told(seconds, messages_logged, monkeypatch):
    """Before the first step and after the last; not what is done at once."""

    class Client:
        identity, last = {}, 0

        def finish(self):
            time.sleep(seconds)

    def make():
        time.sleep(seconds)
        raise TimeoutError("no answer")

    monkeypatch.setattr(reporters, "SILENCE", 0.3)
    reports = reporters.Reports()
    reports.open("wandb", make)
    reports.reporters = {"trackio": reporters.Rows(Client())}
    reports.close()
    waiting = [line for line in messages_logged if "does not answer yet" in line or "Waiting for" in line]
    assert len(waiting) == (2 if seconds else 0)
    if seconds:
        assert "Weights & Biases does not answer yet" in waiting[0]
        assert "90 seconds, or those of WANDB_INIT_TIMEOUT" in waiting[0]
        assert "Trackio" in waiting[1]


@pytest.mark.parametrize(("flag", "name"), [(None, "of-variable"), ("of-flag", "of-flag")])
def test_what_is_said_wins_over_the_environment(flag, name, monkeypatch):
    """--project and --run_name over WANDB_PROJECT and WANDB_NAME; and wandb that is switched off says so."""
    import wandb

    given, run = {}, mock.Mock(id="abc", project="p", resumed=False, offline=False, url=None, dir="here/files")
    monkeypatch.setattr(wandb, "setup", lambda settings: None)  # which would leave a thread
    monkeypatch.setattr(wandb, "init", lambda **options: given.update(options) or run)
    for variable in ("WANDB_NAME", "WANDB_PROJECT"):
        monkeypatch.setenv(variable, "of-variable")
    client = reporters.Wandb(arguments.TrainingArguments("out", run_name=flag, project=flag), {}, {})
    assert (given["name"], given["project"], client.where) == (name, name, "disabled")
