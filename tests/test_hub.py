# SPDX-License-Identifier: Apache-2.0
"""--push_to_hub: the real client against the server of hub_server.py. What it holds is what output_dir holds, whatever goes
wrong on the way; training never waits for it; a token is nowhere to be found."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.utils import _http
from safetensors.numpy import load_file

from flaxlm import arguments, cli, logs, processes, sharding
from flaxlm import hub as hub_module
from tests.conftest import ROOT, read_events, run
from tests.hub_server import HubServer, serve

hub = pytest.fixture(serve, name="hub")

TOKEN = "hf_good"
REPO = "tester/model"
FLAGS = ["--max_steps", 12, "--save_steps", 4, "--logging_steps", 3, "--eval_steps", 6, "--learning_rate", 1e-3]
FLAGS += ["--max_eval_samples", 16, "--push_to_hub", "--hub_model_id", REPO, "--hub_token", TOKEN]
TRAINED = {"flax_model.msgpack", "model.safetensors", "config.json", "tokenizer.json", "run_info.json"}
FINISHED = TRAINED | {"README.md", "training_curves.png", "train_results.json", "eval_results.json"}


@pytest.fixture(autouse=True)
def default_client():
    """The script sets a client of its own; other tests should not meet it."""
    yield
    huggingface_hub.set_client_factory(_http.default_client_factory)


@pytest.fixture
def no_waiting(monkeypatch):
    """Between two tries nobody sleeps; what would have been slept is noted."""
    naps = []

    class Clock:
        monotonic, time = staticmethod(time.monotonic), staticmethod(time.time)
        sleep = staticmethod(naps.append)

    monkeypatch.setattr(hub_module, "time", Clock)
    monkeypatch.setattr(_http, "time", Clock)
    return naps


@pytest.fixture
def push(roberta_dir, corpus, tmp_path):
    """push(*flags) -> output_dir: a short run that uploads; later flags override earlier ones."""

    def call(*flags, name: str = "out"):
        run(tmp_path / name, roberta_dir, "--train_file", corpus, *FLAGS, *flags)
        return tmp_path / name

    return call


def local_files(output_dir) -> dict[str, bytes]:
    """What should be on the server: all of output_dir but the training state."""
    return {path.name: path.read_bytes() for path in output_dir.iterdir() if path.is_file()}


def pushed_files(hub, with_state: bool = False) -> dict[str, bytes]:
    files = hub.files(REPO)
    del files[".gitattributes"]
    return {path: data for path, data in files.items() if with_state or not path.startswith("last-checkpoint/")}


def assert_all_there(hub, output_dir):
    """File by file, byte by byte."""
    here, there = local_files(output_dir), pushed_files(hub)
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []
    assert here.keys() >= FINISHED
    assert not any("checkpoint-" in path or "saving" in path for path in hub.files(REPO) if "last-" not in path)


def messages(hub) -> list[str]:
    return [commit["message"] for commit in hub.commits(REPO)][1:]


def events_in(output_dir) -> list[int]:
    return [step for step, _ in read_events(output_dir)["train_loss"]]


def test_at_the_end_the_server_holds_what_output_dir_holds(hub, push, corpus):
    """hub_strategy end: one commit, whatever save_steps is; a picture, results, curves, and a card that says it all."""
    output_dir = push("--hub_strategy", "end")
    assert messages(hub) == ["Step 12, the last of this run"]
    assert_all_there(hub, output_dir)
    assert not hub.private(REPO)
    picture = hub.files(REPO)["training_curves.png"]
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.rstrip().endswith(b"IEND\xaeB`\x82")
    assert len(picture) > 5000
    assert events_in(output_dir) == list(range(1, 13))
    card = hub.files(REPO)["README.md"].decode()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: fill-mask\n")
    assert f"# {REPO}" in card
    assert f"trained by `run_mlm_flax.py` on {corpus.name}, from fresh weights" in card
    for flag in ("--max_steps 12", "--learning_rate 0.001", "--push_to_hub", "--hub_strategy end"):
        assert flag in card
    results = json.loads((output_dir / "eval_results.json").read_text())
    assert f"| evaluation loss, nats per label | {results['eval_loss']:.3f} |" in card
    assert f"| evaluation accuracy | {results['eval_accuracy']:.1%} |" in card
    assert "| training loss, mean over the run, nats per label |" in card
    assert str(corpus.parent) not in card
    assert "![Training and evaluation curves](training_curves.png)" in card
    assert f"jax {json.loads((output_dir / 'run_info.json').read_text())['versions']['jax']}" in card
    assert f'model = RobertaForMaskedLM.from_pretrained("{REPO}")\n' in card
    assert f'model, params = weights.from_pretrained("{REPO}", models.MASKED)' in card


def test_card_without_the_hub(roberta_dir, corpus, tmp_path):
    run(tmp_path / "mine", roberta_dir, "--train_file", corpus, *FLAGS[:6], "--do_train")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "# mine" in card
    assert "| training loss, mean over the run, nats per label |" in card
    assert 'from_pretrained(".")  # the directory of this file, or its path' in card
    assert (tmp_path / "mine" / "training_curves.png").stat().st_size > 5000


def test_every_save_is_pushed(hub, push):
    """In between too, but never two at a time, and the training state stays here."""
    output_dir = push("--hub_private_repo")
    assert hub.private(REPO)
    steps = [int(re.search(r"Step (\d+)", message)[1]) for message in messages(hub)]
    assert steps == sorted(steps)
    assert steps[0] in (4, 8)
    assert messages(hub)[-1] == "Step 12, the last of this run"
    assert not any(path.startswith("last-checkpoint") for path in hub.files(REPO))
    assert_all_there(hub, output_dir)


def test_another_machine_goes_on_from_the_pushed_state(hub, push, roberta_dir, corpus, tmp_path):
    """hub_strategy checkpoint: a run that was stopped is fetched elsewhere, and ends with the whole run's weights."""
    whole = push("--hub_strategy", "checkpoint", name="whole")
    state = {path for path in hub.files(REPO) if path.startswith("last-checkpoint/")}
    local = whole / "checkpoint-12"
    assert {f"last-checkpoint/{path.relative_to(local)}" for path in local.rglob("*") if path.is_file()} == state
    assert_all_there(hub, whole)

    add = logs.TrainingLog.add

    def told_to_stop(self, step, *args):
        add(self, step, *args)
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(processes.Stopped):
        patch.setattr(logs.TrainingLog, "add", told_to_stop)
        push("--hub_strategy", "checkpoint", "--hub_model_id", "tester/stopped", name="stopped")
    assert hub.commits("tester/stopped")[-1]["message"].startswith("Step 7")
    fetched = huggingface_hub.snapshot_download("tester/stopped", token=TOKEN, local_dir=tmp_path / "fetched")
    elsewhere = tmp_path / "elsewhere"
    flags = ["--train_file", corpus, *FLAGS[:-5], "--resume_from_checkpoint", f"{fetched}/last-checkpoint"]
    run(elsewhere, roberta_dir, *flags)
    first, second = (load_file(path / "model.safetensors") for path in (whole, elsewhere))
    assert all((first[key] == second[key]).all() for key in first)
    assert not np.array_equal(*(load_file(p / "model.safetensors")["lm_head.bias"] for p in (whole, tmp_path / "stopped")))


def test_model_revision(hub, push, roberta_dir, corpus, error_of, tmp_path):
    """Configuration, tokenizer and weights are those of the commit that --model_revision names; the newest by default."""
    import run_mlm_flax as script

    first = push("--hub_strategy", "end", "--max_steps", 2, name="first")
    commit = hub.commits(REPO)[-1]["oid"]
    second = push("--hub_strategy", "end", "--seed", 1, "--max_steps", 2, name="second")

    def evaluate(source, *flags) -> float:
        flags = ["--model_name_or_path", source, "--train_file", corpus, *flags]
        flags += ["--do_eval", "--max_seq_length", 32, "--output_dir", tmp_path / "scores", "--token", TOKEN]
        flags += ["--cache_dir", tmp_path / "cache", "--max_eval_samples", 16]
        return script.main([str(flag) for flag in flags])["eval_loss"]

    losses = [evaluate(first), evaluate(second)]
    assert losses[0] != losses[1]
    before = len(hub.requests)
    assert evaluate(REPO, "--model_revision", commit) == losses[0]
    asked = [request.path.split("/resolve/")[1] for request in hub.requests[before:] if "/resolve/" in request.path]
    assert {f"{commit}/{name}" for name in ("config.json", "tokenizer.json", "flax_model.msgpack")} <= set(asked)
    assert all(path.startswith(commit) for path in asked)
    assert evaluate(REPO) == losses[1]
    message = error_of(evaluate, REPO, "--model_revision", "0" * 40)
    assert f"--model_name_or_path {REPO}" in message


def test_wrong_token_ends_the_run_before_anything_is_computed(hub, push, error_of, monkeypatch):
    compiled = []
    monkeypatch.setattr(sharding.CompiledStep, "compile", lambda self, *args: compiled.append(self.name))
    message = error_of(push, "--hub_token", "hf_wrong")
    assert message == (
        "run_mlm_flax.py: error: --push_to_hub: the repository tester/model cannot be created: the token is wrong or missing"
        " (HTTP 401)"
    )
    assert "HTTP 403" in error_of(push, "--hub_model_id", "somebody-else/model")
    assert not compiled
    assert all(request.status in (401, 403, 404) for request in hub.requests)


def test_server_away_at_the_start_is_an_error_in_one_line(hub, push, error_of):
    hub.down()
    assert "--push_to_hub: the repository tester/model cannot be created" in error_of(push)


@pytest.mark.parametrize(
    "fault",
    [
        lambda hub: hub.fail("POST", "/commit/", times=3),
        lambda hub: hub.fail("POST", "objects/batch", times=3),
        lambda hub: hub.fail("POST", "/commit/", status=429, times=2, retry_after=1),
        lambda hub: hub.fail("PUT", "/lfs-storage/", status=503, times=4),
        lambda hub: hub.drop("/lfs-storage/", after_bytes=20_000, times=2),
    ],
    ids=["commit-500", "batch-500", "commit-429", "storage-503", "storage-dropped"],
)
def test_faults_that_pass(fault, hub, push, no_waiting):
    """Tried again, and everything is there in the end."""
    fault(hub)
    output_dir = push("--hub_strategy", "end")
    assert any(request.status is None or request.status >= 429 for request in hub.requests)
    assert messages(hub) == ["Step 12, the last of this run"]
    assert_all_there(hub, output_dir)


def test_down_for_the_whole_run(hub, push, no_waiting, monkeypatch, capfd, corpus, roberta_dir, tmp_path):
    """Training ends as without a Hub; the exit status is 1, and the last line says what to do."""
    import run_mlm_flax as script

    log_plan = logs.log_plan

    def then_down(*args):
        hub.down()
        log_plan(*args)

    monkeypatch.setattr(logs, "log_plan", then_down)
    flags = ["--config_name", roberta_dir, "--tokenizer_name", roberta_dir, "--max_seq_length", 32, "--train_file", corpus]
    argv = ["run_mlm_flax.py", *flags, "--output_dir", tmp_path / "out", *FLAGS]
    monkeypatch.setattr(sys, "argv", [str(part) for part in argv])
    monkeypatch.setattr(cli, "silence_late_writes", lambda: None)  # it would silence pytest too
    assert cli.run(script.main, script.__file__) == 1
    assert local_files(tmp_path / "out").keys() >= FINISHED
    assert (tmp_path / "out" / "checkpoint-12").is_dir()
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("run_mlm_flax.py: error: the last upload failed; the files are all here, to upload them:")
    assert f"hf upload {REPO} {tmp_path / 'out'} ." in last
    assert len(no_waiting) >= hub_module.Hub.NUM_TRIES - 1
    hub.up()
    assert list(hub.files(REPO)) == [".gitattributes"]


def test_what_was_missed_comes_with_the_last_upload(hub, push, no_waiting):
    """The first upload fails for good; the run succeeds, since the last one brings it all."""
    hub.fail("POST", "/commit/", status=403, times=1)
    assert_all_there(hub, push())


def test_training_does_not_wait_for_uploads(hub, push, monkeypatch):
    """Each commit takes two seconds; a dozen steps with three saves go on meanwhile, and one upload runs at a time."""
    delay = 2.0
    running, most, spans = 0, 0, []
    lock = threading.Lock()
    upload = hub_module.Hub.upload

    def watched(self, step, *args):
        nonlocal running, most
        with lock:
            running, began = running + 1, time.monotonic()
            most = max(most, running)
        upload(self, step, *args)
        with lock:
            running -= 1
            spans.append((step, began, time.monotonic()))

    trained = {}
    results = logs.TrainingLog.results

    def note(self, *args):
        trained["at"], trained["seconds"] = time.monotonic(), self.stopwatch.seconds()
        return results(self, *args)

    hub.delay("/commit/", delay)
    monkeypatch.setattr(hub_module.Hub, "upload", watched)
    monkeypatch.setattr(logs.TrainingLog, "results", note)
    output_dir = push()
    assert most == 1
    assert [step for step, *_ in spans] == [4, 12]  # what was saved meanwhile came with the last one
    (_, began, ended), (_, last_began, _) = spans
    assert began < trained["at"] < ended <= last_began
    assert trained["seconds"] < delay
    assert_all_there(hub, output_dir)


def test_token_is_nowhere(hub, push, monkeypatch, capfd, caplog):
    """Not in files, here or there, nor in the log, nor in URLs or bodies: only in the header made for it."""
    calls, answer = [], HubServer._answer
    monkeypatch.setattr(HubServer, "_answer", lambda self, call: (calls.append(call), answer(self, call))[1])
    secret = hub.token = "hf_VerySecretIndeed"
    hub.fail("POST", "/commit/", status=403, times=1)  # messages of errors quote much
    output_dir = push("--hub_token", secret, "--token", "hf_AnotherSecret", "--hub_strategy", "checkpoint")
    said = "".join(capfd.readouterr()) + caplog.text
    assert "Uploading" in said
    for text in (secret, "hf_AnotherSecret"):
        assert text not in said
        for path in output_dir.rglob("*"):
            assert path.is_dir() or text.encode() not in path.read_bytes(), path
        assert all(text.encode() not in data for data in hub.files(REPO).values())
        for call in calls:
            assert text not in f"{call.path} {call.query}"
            assert text.encode() not in call.body
    assert {call.authorization for call in calls} == {f"Bearer {secret}", None}


def test_told_to_stop_in_the_last_upload(hub, roberta_dir, corpus, tmp_path):
    """A real process, ended by SIGTERM while the server takes its time: at once, and it says what it does and leaves undone."""
    hub.delay("/commit/", 120)
    command = [sys.executable, ROOT / "run_mlm_flax.py", "--config_name", roberta_dir, "--tokenizer_name", roberta_dir]
    command += [
        "--max_seq_length",
        32,
        "--train_file",
        corpus,
        "--output_dir",
        tmp_path / "out",
        *FLAGS,
        "--hub_strategy",
        "end",
    ]
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True, env=environment)
    said = []
    for line in process.stderr:
        said.append(line)
        if "Uploading to the Hub: the last state" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    said += process.communicate(timeout=100)[1].splitlines()
    assert time.monotonic() - began < 30
    assert process.returncode == 143
    assert any("SIGTERM: leaving the upload unfinished." in line for line in said)
    assert said[-1].startswith("run_mlm_flax.py: stopped as asked; the files are all here, to upload them: hf upload ")
    assert local_files(tmp_path / "out").keys() >= FINISHED


# ---- Without training ----------------------------------------------------------------------------------------------------


@pytest.fixture
def output_dir(tmp_path):
    """A few files, and the training state of step 4."""
    state = tmp_path / "out" / "checkpoint-4" / "state"
    state.mkdir(parents=True)
    (state / "a").write_text("first")
    (state / "b").write_text("only here")
    (tmp_path / "out" / "config.json").write_text("{}")
    (tmp_path / "out" / "flax_model.msgpack").write_bytes(os.urandom(30_000))
    return tmp_path / "out"


def connect(output_dir, **flags) -> hub_module.Hub:
    flags = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": TOKEN} | flags
    return hub_module.connect(arguments.TrainingArguments(output_dir=str(output_dir), **flags))


def test_all_that_is_there_is_one_commit(hub, output_dir):
    """A later one does away with what the training state no longer holds; other files stay."""
    uploads = connect(output_dir, hub_strategy="checkpoint")
    uploads.push(4, final=True)
    uploads.check()
    assert_state = {"last-checkpoint/state/a": b"first", "last-checkpoint/state/b": b"only here"}
    assert pushed_files(hub, with_state=True) == local_files(output_dir) | assert_state
    (output_dir / "checkpoint-4").rename(output_dir / "checkpoint-8")
    (output_dir / "checkpoint-8" / "state" / "b").unlink()
    uploads.push(8, final=True)
    assert pushed_files(hub, with_state=True) == local_files(output_dir) | {"last-checkpoint/state/a": b"first"}
    assert messages(hub) == ["Step 4, the last of this run", "Step 8, the last of this run"]


def test_more_files_than_the_client_takes_into_a_commit(hub, output_dir, no_waiting):
    """Still one commit, after one that failed too: a torn state must not be fetched."""
    for number in range(60):
        (output_dir / "checkpoint-4" / f"{number}").write_text(str(number))
    hub.fail("POST", "/commit/", status=504, times=1)
    uploads = connect(output_dir, hub_strategy="checkpoint")
    uploads.push(4, final=True)
    uploads.check()
    assert len(pushed_files(hub, with_state=True)) == 64
    assert messages(hub) == ["Step 4, the last of this run"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda hub: hub.fail("POST", "/repos/create", 500), r"Internal Server Error.*\(HTTP 500\)"),
        (lambda hub: hub.fail("POST", "/repos/create", 503), r"\(HTTP 503\)"),
        (lambda hub: hub.fail("GET", "/auth-check/write", 403), r"the token may not write there \(HTTP 403\)"),
        (lambda hub: setattr(hub, "token", "hf_other"), r"the token is wrong or missing \(HTTP 401\)"),
        (lambda hub: hub.down(), "Server disconnected"),
        (lambda hub: hub.garble("/repos/create"), "Expecting value"),
    ],
    ids=["500", "503", "may not write", "wrong token", "down", "garbage"],
)
def test_a_repository_that_cannot_be_had(fault, reason, hub, output_dir, refuses):
    fault(hub)
    with refuses(f"^--push_to_hub: the repository {REPO} cannot be created: .*{reason}"):
        connect(output_dir)


def test_somebody_elses_repository(hub, output_dir, refuses):
    """It is there and can be read, which the client takes for created."""
    connect(output_dir)
    hub.user = "somebody"
    hub.fail("GET", "/auth-check/write", 403)
    with refuses("the token may not write there"):
        connect(output_dir)


def test_an_answer_that_does_not_come(hub, output_dir, no_waiting, monkeypatch, caplog):
    """In a moment, here; also for the requests that ask for more time themselves. Then it is tried again."""
    monkeypatch.setattr(hub_module.Hub, "TIMEOUT", 0.3)
    uploads = connect(output_dir)
    client = huggingface_hub.get_session()
    hub.delay("/api/whoami", 60, times=1)
    began = time.monotonic()
    with pytest.raises(Exception, match="timed out"):
        client.get(f"{hub.endpoint}/api/whoami-v2", timeout=None)
    hub.delay("/commit/", 60, times=2)
    uploads.push(4, final=True)
    uploads.check()
    assert time.monotonic() - began < 5
    assert no_waiting == [1, 2]
    assert sum("Upload of step 4 failed: timed out" in message for message in caplog.messages) == 2


def test_what_is_worth_another_try():
    """Storage has a client of its own, with errors of its own: Python's, or one for the token."""
    for error in (ConnectionError("Network error"), TimeoutError(), json.JSONDecodeError("Expecting value", "<html>", 0)):
        assert hub_module.Hub.is_temporary(error)
    for error in (PermissionError("Authentication error"), ValueError("Invalid metadata in README.md"), RuntimeError("no")):
        assert not hub_module.Hub.is_temporary(error)
    error = RuntimeError("Error while uploading")
    error.__cause__ = ConnectionError("Network error")
    assert hub_module.Hub.is_temporary(error)
    assert hub_module.Hub.describe(error) == "Network error"
