# SPDX-License-Identifier: Apache-2.0
"""s3:// and gs://: the clients that people have, s3fs and gcsfs, against servers of these protocols on this machine."""

import asyncio
import functools
import gzip
import io
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
import types

import fsspec
import gcsfs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from flaxlm import addresses, cli, files, inputs, streams
from tests.conftest import run
from tests.test_addresses import BOTH, TEXTS, texts_of
from tests.test_processes import STREAM, assert_same_run, end_of
from tests.test_processes import start as start  # a fixture
from tests.test_streams import back_to

SERVERS = {"s3": ["moto.server", "-p"], "gs": ["gcp_storage_emulator", "start", "--in-memory", "--host", "127.0.0.1", "--port"]}
KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
ADDRESS_OF_SERVER = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """serve(protocol, **environment) -> the process of a server, and its address, once it answers."""
    started = []

    def call(protocol: str, **environment) -> tuple[subprocess.Popen, str]:
        port, path = free_port(), tmp_path_factory.mktemp("server") / "log"
        command = [sys.executable, "-m", *SERVERS[protocol], str(port)]
        with open(path, "w") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and started[-1].poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                return started[-1], f"http://127.0.0.1:{port}"
            except OSError:
                time.sleep(0.05)
        raise AssertionError(path.read_text())

    yield call
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def servers(serve):
    """Both servers, and an environment in which the clients find them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            patch.setenv(name, "/nowhere")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("NO_GCE_CHECK", "true")
        for protocol in SERVERS:
            patch.setenv(ADDRESS_OF_SERVER[protocol], serve(protocol)[1])
            forget_clients()
            fsspec.filesystem(protocol).mkdir("data")
        yield


def forget_clients() -> None:
    """They keep what they know of a server, and whether they have keys."""
    for client in (s3fs.S3FileSystem, gcsfs.GCSFileSystem, fsspec.get_filesystem_class("gs")):
        client.clear_instance_cache()


@pytest.fixture(params=["s3", "gs"])
def store(request, servers):
    """A bucket with nothing in it: (its address, put(key, bytes)), which the client that reads knows nothing of."""
    forget_clients()
    writer = fsspec.filesystem(request.param, skip_instance_cache=True)
    yield f"{request.param}://data", lambda key, content: writer.pipe(f"data/{key}", content)
    forget_clients()
    writer.invalidate_cache()
    for path in writer.find("data"):
        writer.rm_file(path)


def lines(texts) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


def parquet(texts) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file, row_group_size=50)
    return file.getvalue()


@BOTH
@pytest.mark.parametrize("names", ["0.txt 1.txt sub/2.txt.gz", "", "**", "[0-9].txt sub/"])
def test_files_directories_and_patterns(names, streaming, store, tmp_path):
    address, put = store
    for key, content in (
        ("0.txt", lines(TEXTS[:100])),
        ("1.txt", lines(TEXTS[100:200])),
        (".hidden.txt", b"x\n"),
        ("a.md", b"x"),
    ):
        put(key, content)
    put("sub/2.txt.gz", gzip.compress(lines(TEXTS[200:])))
    names = [f"{address}/{name}" for name in names.split()] or [address]
    assert texts_of(names, tmp_path / "cache", streaming) == TEXTS


@BOTH
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
def test_formats(name, streaming, store, tmp_path):
    address, put = store
    rows = lines(json.dumps({"text": text}) for text in TEXTS)
    content = {"a.parquet": parquet(TEXTS), "a.jsonl": rows, "a.csv": lines(["text", *(f'"{text}"' for text in TEXTS)])}
    put(name, content[name])
    assert texts_of(f"{address}/{name}", tmp_path / "cache", streaming) == TEXTS


def test_read_once_until_it_changes(store, tmp_path, monkeypatch):
    """A second run finds it in the cache; other text of the same length is seen, in the same program too."""
    address, put = store
    opened, open_file = [], addresses.open_file
    monkeypatch.setattr(addresses, "open_file", lambda *given: opened.append(given) or open_file(*given))
    put("sub/a.txt", b"one\n")
    for name in (address, address, f"{address}/sub/", f"{address}/**", f"{address}/sub/*", f"{address}/sub/a.txt"):
        assert texts_of(name, tmp_path / "cache", False) == ["one"]
    assert len(opened) == 1
    put("sub/a.txt", b"two\n")
    for name in (f"{address}/sub/a.txt", address, f"{address}/**"):
        assert texts_of(name, tmp_path / "cache", False) == ["two"]
    assert len(opened) == 2
    put("sub/b.txt", b"three\n")
    assert texts_of(f"{address}/sub/*.txt", tmp_path / "cache", True) == ["two", "three"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.txt", "no such file$"),
        ("none/", "no such file$"),
        ("*.csv", "there is no txt, .* file there$"),
        ("a.md", "unknown suffix"),
        ("empty.txt", "is empty$"),
        ("../nowhere/a.txt", "no such file$"),
    ],
)
def test_mistakes(name, message, store, refuses):
    address, put = store
    put("a.md", b"x")
    put("empty.txt", b"")
    name = f"{address}/{name}".replace("/data/..", "")  # another bucket
    with refuses(f"^--train_file {name.replace('*', '.*')}: {message}"):
        inputs.find(name, "--train_file")


def test_a_server_that_is_away(store, monkeypatch, caplog):
    """An accident, told in a line and not shown in tracebacks. The clients try again for a while, which is cut short here."""
    address, _ = store
    protocol = address.partition(":")[0]
    monkeypatch.setenv(ADDRESS_OF_SERVER[protocol], f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0)))
    for name in ("a.txt", "*.txt"):
        forget_clients()
        with pytest.raises(cli.Accident, match=rf"^--train_file {address}/.*txt: the network failed: C\w+ (not )?connect "):
            inputs.find(f"{address}/{name}", "--train_file")
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(("store", "loss"), [("s3", "changed"), ("s3", "deleted"), ("gs", "deleted")], indirect=["store"])
def test_a_file_that_goes_while_it_is_read(loss, store, refuses, monkeypatch):
    """The client for S3 knows a file by its ETag; that for Google goes on in a new one, and is not asked."""
    address, put = store
    put("a.txt", lines(TEXTS * 100))
    client = type(fsspec.filesystem(address.partition(":")[0]))
    monkeypatch.setattr(client, "open", functools.partialmethod(client.open, block_size=2**16))
    rows = iter(files.load(f"{address}/a.txt", "--train_file", None, streaming=True))
    next(rows)
    if loss == "changed":
        put("a.txt", lines(TEXTS[::-1] * 100))
    else:
        fsspec.filesystem(address.partition(":")[0], skip_instance_cache=True).rm_file("data/a.txt")
    message = "the file has changed while it was read" if loss == "changed" else "no such file"
    with refuses(f"^--train_file {address}/a.txt: {message}$"), streams.told_of_streams("--train_file"):
        list(rows)


def test_keys(servers, serve, monkeypatch, refuses):
    """None, or such as the server does not know: mistakes, told with what the client says."""
    where = "; keys are looked for where its package says, in the environment or in files$"
    monkeypatch.setenv("AWS_ENDPOINT_URL", serve("s3", INITIAL_NO_AUTH_ACTION_COUNT="0")[1])
    for name in ("s3://data/a.txt", "s3://data/"):
        forget_clients()
        with refuses(
            f"^--train_file {name}: may not be read: (Forbidden|.*Access Key Id .* does not exist in our records.){where}"
        ):
            inputs.find(name, "--train_file")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget_clients()
    with refuses(f"^--train_file s3://data/a.txt: may not be read: Unable to locate credentials{where}"):
        inputs.find("s3://data/a.txt", "--train_file")
    forget_clients()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_google_answers(status):
    """The emulator lets everybody read; these are the errors that the client makes of answers of the real one."""
    try:
        gcsfs.retry.validate_response(status, json.dumps({"error": {"message": "No, invalid", "code": status}}), "b/o/a.txt")
    except Exception as error:
        ending = addresses.explain("--train_file gs://b/a.txt", error)
    expected = "no such file" if status == 404 else "may not be read: .*; keys are looked for"
    assert isinstance(ending, cli.Mistake)
    assert re.match(f"--train_file gs://b/a.txt: {expected}", str(ending))


# ---- Whole runs ----------------------------------------------------------------------------------------------------------


@BOTH
def test_a_run_from_a_store(streaming, store, roberta_dir, texts, tmp_path):
    """The same losses as from the disk; and a run that was stopped goes on as if it had not been."""
    address, put = store
    (tmp_path / "disk").mkdir()
    for name, part in (("0.txt", texts[:250]), ("1.txt", texts[250:500]), ("val.txt", texts[500:600])):
        (tmp_path / "disk" / name).write_bytes(lines(part))
        put(name, lines(part))

    def train(name, place, *flags) -> dict:
        data = ["--train_file", f"{place}/[01].txt", "--validation_file", f"{place}/val.txt"]
        more = ["--streaming", "--shuffle_buffer_size", 60, "--num_eval_samples", 8] if streaming else ["--max_eval_samples", 8]
        flags = [*data, *more, "--max_steps", 4, "--cache_dir", tmp_path / "cache", "--save_steps", 2, *flags]
        return run(tmp_path / name, roberta_dir, *flags)

    expected, found = train("from-disk", tmp_path / "disk"), train("from-store", address)
    kept = ("train_loss", "eval_loss")
    assert [found[key] for key in kept] == [expected[key] for key in kept]
    (tmp_path / "from-store" / "checkpoint-4").rename(tmp_path / "away")
    forget_clients()
    found = train("from-store", address, "--resume_from_checkpoint")
    assert [found[key] for key in kept] == [expected[key] for key in kept]


def test_two_processes_stream_a_mixture_of_stores(servers, start, texts, tmp_path):
    """A file of S3, with a blank line behind each text, a directory of Google's; from a checkpoint they go on exactly."""
    fsspec.filesystem("s3").pipe("data/two/prose.txt", lines(itertools.chain(*((text, "") for text in texts[:200]))))
    for number, part in enumerate((texts[200:350], texts[350:500])):
        rows = lines(json.dumps({"text": text}) for text in part)
        fsspec.filesystem("gs").pipe(f"data/two/{number}.jsonl.gz", gzip.compress(rows))
    entries = {
        "prose": {"train_file": "s3://data/two/*.txt", "weight": 3},
        "code": {"train_file": "gs://data/two", "weight": 1},
    }
    (tmp_path / "m.json").write_text(json.dumps(entries))
    whole, flags = tmp_path / "whole", ["--mixture_file", tmp_path / "m.json", *STREAM]
    ended = end_of(*start(whole, *flags))
    assert ended.statuses == [0, 0], "\n".join(ended.logs)
    assert json.loads((whole / "train_results.json").read_text())["share_of_prose"] == 0.75
    assert "Traceback" not in "\n".join(ended.logs)
    back = back_to(whole, tmp_path / "back", 35)
    ended = end_of(*start(back, *flags, "--resume_from_checkpoint", "auto"))
    assert ended.statuses == [0, 0], "\n".join(ended.logs)
    assert_same_run(back, whole)
