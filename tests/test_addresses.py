# SPDX-License-Identifier: Apache-2.0
"""Files at addresses, read from real servers: of the web, of the Hub, and of a file system that lists."""

import gzip
import http.server
import itertools
import json
import logging
import os
import re
import socket
import sys
import threading
import zipfile
from urllib.parse import urlsplit

import fsspec
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flaxlm import addresses, arguments, cli, files, formats, inputs, streams
from tests.conftest import run
from tests.hub_server import HubServer

TEXTS = [f"This is text number {number}, of some words." for number in range(300)]


class Handler(http.server.SimpleHTTPRequestHandler):
    """The files of a directory; the server says whether in parts, with what marks, and what goes wrong."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, path = self.server, urlsplit(self.path).path
        server.asked.append((self.path, dict(self.headers)))
        if status := server.refused.get(path):
            return self.send_error(status)
        file = server.directory / path.lstrip("/")
        if not file.is_file():
            return self.send_error(404)
        data = file.read_bytes()
        mark = f'"{hash(data)}"'
        part = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        is_same = self.headers.get("If-Range", mark) == mark
        start = int(part[1]) if part and server.sends_parts and is_same else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if server.has_marks:
            self.send_header("ETag", mark)
        if server.sends_parts:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(data[start : start + server.cut_after] if server.cut_after else data[start:])
        if server.cut_after:
            self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def web(tmp_path):
    """A web server: its files are in web.directory, its address is web.address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # of connections that we end
    server.directory, server.address = tmp_path / "web", f"http://127.0.0.1:{server.server_port}"
    server.asked, server.refused, server.sends_parts, server.has_marks, server.cut_after = [], {}, False, True, 0
    server.directory.mkdir()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def write(path, texts=TEXTS) -> None:
    """Texts in the format that the name of the file says."""
    content = {
        "txt": "".join(f"{text}\n" for text in texts),
        "csv": "text\n" + "".join(f'"{text}"\n' for text in texts),
        "jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts),
        "json": json.dumps([{"text": text} for text in texts]),
    }.get(path.name.removesuffix(".gz").rpartition(".")[2], "")
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    if ".parquet" in path.name:
        pq.write_table(pa.table({"text": texts}), path, row_group_size=50)
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(path.read_bytes()))


def texts_of(names, directory, streaming: bool, **options) -> list[str]:
    rows = files.load(names, "--train_file", str(directory), streaming=streaming, **options)
    return [row["text"] for row in rows]


@pytest.fixture
def no_clients(monkeypatch):
    """As if s3fs and gcsfs were not installed; where they are, they may have been imported already."""
    for package, protocols in (("s3fs", ("s3", "s3a")), ("gcsfs", ("gs", "gcs"))):
        monkeypatch.setitem(sys.modules, package, None)
        for protocol in protocols:
            monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)


BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streaming"])
NAMES = ["a.txt", "a.txt.gz", "a.csv", "a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.parquet.gz"]


# ---- The web -------------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("sends_parts", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("name", NAMES)
def test_formats_over_the_web(name, sends_parts, streaming, web, tmp_path):
    """The same as from the disk, whether the server can send parts of a file or not; a query tells no format."""
    web.sends_parts = sends_parts
    write(web.directory / name)
    assert texts_of(f"{web.address}/{name}?download=1.zip", tmp_path / "cache", streaming) == TEXTS
    assert all(path.endswith("?download=1.zip") for path, _ in web.asked)


@BOTH
def test_several_addresses_and_files(streaming, web, tmp_path):
    for number in range(3):
        write(web.directory / f"{number}.txt", TEXTS[number * 100 : (number + 1) * 100])
    names = [f"{web.address}/0.txt", str(web.directory / "1.txt"), f"{web.address}/2.txt"]
    assert texts_of(names, tmp_path / "cache", streaming) == TEXTS


def test_a_file_that_changes_is_read_again(web, tmp_path):
    """By ETag; where the server tells nothing that would show a change, always."""

    def read() -> tuple[list[str], int]:
        web.asked.clear()
        found = texts_of(f"{web.address}/a.txt", tmp_path / "cache", False)
        return found, len(web.asked)

    write(web.directory / "a.txt")
    first, again = read(), read()
    assert (first[0], again[0]) == (TEXTS, TEXTS)
    assert again[1] < first[1]  # asked for its marks, not for the file
    write(web.directory / "a.txt", [text.swapcase() for text in TEXTS])  # of the same size
    assert read()[0] == [text.swapcase() for text in TEXTS]
    web.has_marks = False
    assert read()[0] == [text.swapcase() for text in TEXTS]
    write(web.directory / "a.txt")
    assert read()[0] == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.parquet"])
def test_a_connection_that_breaks_is_made_anew(name, web, tmp_path, monkeypatch):
    """Where the server sends parts: after each so many bytes, without a byte lost."""
    monkeypatch.setattr(addresses.HttpFile, "WAITS", (0.0, 0.0))
    write(web.directory / name)
    web.sends_parts, web.cut_after = True, 1000
    assert texts_of(f"{web.address}/{name}", tmp_path / "cache", True) == TEXTS
    assert sum("Range" in headers for _, headers in web.asked) >= (web.directory / name).stat().st_size // 1000


@BOTH
def test_a_connection_that_breaks_for_good_is_an_accident(streaming, web, tmp_path):
    write(web.directory / "a.txt")
    web.cut_after = 1000
    with pytest.raises(cli.Accident, match=f"^--train_file {web.address}/a.txt: the network failed: peer closed"):
        texts_of(f"{web.address}/a.txt", tmp_path / "cache", streaming)


def test_a_stream_that_breaks_says_how_to_go_on(web):
    write(web.directory / "a.txt")
    web.cut_after = 1000
    with (
        pytest.raises(
            cli.Accident, match=r"^--train_file X: the network failed: peer closed .*; if a checkpoint was saved, the "
        ),
        streams.told_of_streams("--train_file X"),
    ):
        list(files.load(f"{web.address}/a.txt", "--train_file", None, streaming=True))


def test_a_file_that_changes_while_it_is_read(web, tmp_path, monkeypatch, refuses):
    """Is not put together of two."""
    monkeypatch.setattr(addresses.HttpFile, "WAITS", (0.0, 0.0))
    write(web.directory / "a.txt")
    web.sends_parts, web.cut_after = True, 1000
    file = addresses.HttpFile(f"{web.address}/a.txt")
    file.read(1000)
    write(web.directory / "a.txt", reversed(TEXTS))
    with pytest.raises(OSError, match="the file has changed while it was read"):
        file.read(1000)


def test_seeking(web):
    write(web.directory / "a.txt")
    web.sends_parts = True
    data = (web.directory / "a.txt").read_bytes()
    with addresses.open_file(f"{web.address}/a.txt", None) as file:
        for offset, whence in ((-10, os.SEEK_END), (100, os.SEEK_SET), (5, os.SEEK_CUR), (0, os.SEEK_SET), (0, os.SEEK_END)):
            file.seek(offset, whence)
            assert file.read(7) == data[file.tell() - 7 : file.tell()] or (offset == 0 and whence == os.SEEK_END)
    with addresses.open_file(f"{web.address}/a.txt", None) as file:
        assert file.read() == data


@pytest.mark.parametrize(
    ("status", "ending", "message"),
    [
        (404, cli.Mistake, "no such file"),
        (401, cli.Mistake, "may not be read; "),
        (403, cli.Mistake, "may not be read; "),
        (500, cli.Accident, "the network failed: the server answered 500 Internal Server Error"),
    ],
)
def test_refusals_of_a_server(status, ending, message, web):
    web.refused["/a.txt"] = status
    with pytest.raises(ending, match=f"^--train_file {web.address}/a.txt: {message}"):
        inputs.find(f"{web.address}/a.txt", "--train_file")


def test_a_server_that_is_not_there():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/a.txt"
        with pytest.raises(cli.Accident, match=f"^--train_file {address}: the network failed: "):
            inputs.find(address, "--train_file")


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://x.org/a.txt?X-Signature=secret#x", "https://x.org/a.txt"),
        ("https://me:secret@x.org:8080/a.txt", "https://x.org:8080/a.txt"),
        ("sftp://me:secret@host/a.txt", "sftp://host/a.txt"),
        ("hf://datasets/me/data@main/a.txt", "hf://datasets/me/data@main/a.txt"),
        ("s3://bucket/a?.txt", "s3://bucket/a?.txt"),
        ("a?.txt", "a?.txt"),
    ],
)
def test_secrets_in_addresses_are_not_shown(address, shown, no_clients, tmp_path):
    """Neither in messages nor in what is logged and written of a run."""
    assert addresses.shown(address) == shown
    data_args = arguments.DataArguments(train_file=[address])
    assert arguments.changed(data_args) == f"--train_file {shown}"
    assert arguments.public(data_args)["train_file"] == [shown]
    with pytest.raises(cli.Ending) as caught:
        inputs.find(address.replace("x.org", "127.0.0.1:9"), "--train_file")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("https://x.org/a.txt?format=csv", ("txt", "")),
        ("https://x.org/a%20b.JSONL.GZ?x=1#y", ("jsonl", ".gz")),
        ("s3://bucket/what?.txt", ("txt", "")),
        ("zip://a.csv::https://x.org/a.zip", ("csv", "")),
        ("simplecache::https://x.org/a.parquet", ("parquet", "")),
    ],
)
def test_what_tells_the_format(name, expected):
    assert formats.suffixes(name) == expected


@BOTH
def test_a_run_from_the_web(streaming, web, roberta_dir, texts, tmp_path):
    """The same losses as from the disk; and a stream that was stopped goes on as if it had not been."""
    write(web.directory / "train.txt.gz", texts[:500])
    write(web.directory / "val.jsonl", texts[500:600])

    def train(name, place, *flags) -> dict:
        data = ["--train_file", f"{place}/train.txt.gz", "--validation_file", f"{place}/val.jsonl"]
        more = ["--streaming", "--shuffle_buffer_size", 60, "--num_eval_samples", 8] if streaming else ["--max_eval_samples", 8]
        flags = [*data, *more, "--max_steps", 4, "--cache_dir", tmp_path / "cache", "--save_steps", 2, *flags]
        return run(tmp_path / name, roberta_dir, *flags)

    expected, found = train("disk", web.directory), train("from-web", web.address)
    kept = ("train_loss", "eval_loss")
    assert [found[key] for key in kept] == [expected[key] for key in kept]
    newest = tmp_path / "from-web" / "checkpoint-4"
    newest.rename(tmp_path / "away")
    found = train("from-web", web.address, "--resume_from_checkpoint")
    assert [found[key] for key in kept] == [expected[key] for key in kept]
    assert f"--train_file {web.address}/train.txt.gz" in (tmp_path / "from-web" / "README.md").read_text()


# ---- File systems that list ----------------------------------------------------------------------------------------------


@pytest.fixture
def memory():
    """fsspec's file system in memory."""
    file_system = fsspec.filesystem("memory")
    yield file_system
    file_system.rm("/", recursive=True)


@BOTH
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("memory://data", "a b c"),
        ("memory://data/*.txt", "a b"),
        ("memory://data/**", "a b c"),
        (["memory://data/b.txt", "memory://data/sub/"], "b c"),
        ("memory://data/[ab].txt", "a b"),
    ],
    ids=str,
)
def test_directories_and_patterns_at_addresses(names, expected, streaming, memory, tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt.gz", ".hidden.txt", "README.md"):
        text = f"{os.path.basename(name).partition('.')[0]}\n".encode()
        memory.pipe(f"/data/{name}", gzip.compress(text) if name.endswith(".gz") else text)
    assert texts_of(names, tmp_path / "cache", streaming) == expected.split()


@BOTH
@pytest.mark.parametrize("name", ["zip://sub/a.txt", "zip://sub", "zip://**", "zip://sub/*.txt"])
@pytest.mark.parametrize("place", ["memory://data/a.zip", "the disk"])
def test_files_in_archives(place, name, streaming, memory, tmp_path):
    """Which may lie at an address themselves."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("sub/a.txt", "one\ntwo\n")
        archive.writestr("sub/notes.md", "")
    memory.pipe("/data/a.zip", (tmp_path / "a.zip").read_bytes())
    place = f"file://{tmp_path}/a.zip" if place == "the disk" else place
    assert texts_of(f"{name}::{place}", tmp_path / "cache", streaming) == ["one", "two"]


def test_a_change_in_a_file_system_is_seen(memory, tmp_path):
    memory.pipe("/data/a.txt", b"one\n")
    assert texts_of("memory://data", tmp_path / "cache", False) == ["one"]
    memory.pipe("/data/a.txt", b"two\n")
    assert texts_of("memory://data", tmp_path / "cache", False) == ["two"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("memory://none/a.txt", "^--train_file memory://none/a.txt: no such file$"),
        ("memory://data/*.csv", r"^--train_file memory://data/\*.csv: there is no txt, .* file there$"),
        ("memory://data/notes.doc", "^--train_file memory://data/notes.doc: unknown suffix"),
        ("odd://a/b.txt", "^--train_file odd://a/b.txt: fsspec .* has no protocol odd://"),
    ],
)
def test_what_is_not_there(name, message, memory, refuses):
    memory.pipe("/data/notes.doc", b"x")
    with refuses(message):
        inputs.find(name, "--train_file")


@pytest.mark.parametrize(("name", "package"), [("s3://bucket/a.txt", "s3fs"), (r"gs://bucket/*.txt", "gcsfs")])
def test_a_package_that_is_not_installed(name, package, no_clients, refuses):
    protocol = name.partition(":")[0]
    with refuses(
        rf"^--train_file {protocol}://.*: {protocol}:// needs a package that is not installed: pip install {package}$"
    ):
        inputs.find(name, "--train_file")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://me:secret@[::1/a.txt", "^an address of https:// is none: Invalid IPv6 URL$"),
        ("http:///a.txt", "^--train_file http:///a.txt: is no address: "),
    ],
)
def test_what_is_no_address(name, message, refuses):
    with refuses(message):
        inputs.find(name, "--train_file")


def test_empty_files_are_refused(memory, web, refuses):
    """As local ones are; alone, and in a directory."""
    memory.pipe("/data/a.txt", b"one\n")
    memory.pipe("/data/b.txt", b"")
    (web.directory / "a.txt").touch()
    for name, empty in (("memory://data", "memory:///data/b.txt"), (f"{web.address}/a.txt",) * 2):
        with refuses(f"^--train_file {empty}: is empty$"):
            inputs.find(name, "--train_file")
    with refuses("^--train_file memory://: names no file$"):
        inputs.find("memory://", "--train_file")


# ---- The Hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub():
    with HubServer(token="hf_good") as server, server.in_this_process():
        huggingface_hub.HfFileSystem.clear_instance_cache()
        yield server
        huggingface_hub.HfFileSystem.clear_instance_cache()


@pytest.fixture
def private_data(hub, tmp_path):
    """The address of a private repository with text in two files."""
    api = huggingface_hub.HfApi(token="hf_good")
    api.create_repo("tester/data", private=True)
    for number, part in enumerate((TEXTS[:100], TEXTS[100:])):
        write(tmp_path / f"{number}.txt.gz", part)
        api.upload_file(
            path_or_fileobj=tmp_path / f"{number}.txt.gz", path_in_repo=f"text/{number}.txt.gz", repo_id="tester/data"
        )
    return "hf://tester/data"


@BOTH
@pytest.mark.parametrize("names", ["text", "text/*.gz", "text/0.txt.gz text/1.txt.gz", ""])
def test_text_of_the_hub(names, streaming, private_data, hub, tmp_path):
    """With the token that was given, by directory, by pattern, by name."""
    names = [f"{private_data}/{name}" for name in names.split()] or [private_data]
    assert texts_of(names, tmp_path / "cache", streaming, token="hf_good") == TEXTS
    asked = [request for request in hub.requests if request.method == "GET" and "lfs-storage" not in request.path]
    assert {request.headers.get("authorization") for request in asked} == {"Bearer hf_good"}


@pytest.mark.parametrize("name", ["text/0.txt.gz", "text", "text/*"])
def test_a_token_that_may_not_read(name, private_data, refuses):
    with refuses(f"^--train_file {re.escape(private_data)}/{re.escape(name)}: (no such file, or|may not be read|cannot)"):
        inputs.find(f"{private_data}/{name}", "--train_file", "hf_other")


def test_a_hub_that_is_not_there(private_data, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 1)
    hub.down()
    with pytest.raises(cli.Accident, match=f"^--train_file {private_data}/text: the network failed: "):
        inputs.find(f"{private_data}/text", "--train_file", "hf_good")


def test_the_token_is_never_said(private_data, roberta_dir, tmp_path, caplog):
    """A whole run with a token: neither in the log nor in what it writes."""
    caplog.set_level(logging.DEBUG)
    flags = ["--train_file", f"{private_data}/text", "--token", "hf_good", "--cache_dir", tmp_path / "cache", "--max_steps", 2]
    run(tmp_path / "out", roberta_dir, *flags)
    assert "hf_good" not in caplog.text
    written = list(itertools.chain((tmp_path / "out").rglob("*"), (tmp_path / "cache").rglob("*")))
    assert len(written) > 5
    assert not any(b"hf_good" in path.read_bytes() for path in written if path.is_file())


def test_parts_of_a_large_file(web):
    """Chunks that don't end where reads do."""
    data = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8).tobytes()
    (web.directory / "a.txt").write_bytes(data)
    with addresses.open_file(f"{web.address}/a.txt", None) as file:
        assert b"".join(iter(lambda: file.read(77_777), b"")) == data
