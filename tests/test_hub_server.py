# SPDX-License-Identifier: Apache-2.0
"""hub_server.py with the real client: what is pushed is there, and which failures the client survives without help."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, list_repo_files
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http

from tests.conftest import ROOT
from tests.hub_server import HubServer, Repo, serve

REPO = "tester/model"
WEIGHTS = os.urandom(12_000_000)
BACKOFF = [1, 2, 4, 8, 8]  # the client's waits; after the last one it gives up


hub = pytest.fixture(serve, name="hub")


@pytest.fixture(autouse=True)
def waits(monkeypatch) -> list[float]:
    """How long the client meant to wait between its attempts; it does not."""
    waits = []
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=waits.append))
    return waits


@pytest.fixture
def api(hub) -> HfApi:
    api = HfApi(token="hf_good")
    api.create_repo(REPO)
    return api


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "folder"
    (folder / "logs").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Ein Modell – 模型\n", "utf-8")
    (folder / "logs" / "a b+c%.txt").write_text("a name to be quoted")
    (folder / "logs" / "events.out.tfevents.1").write_bytes(b"small, but large by name")
    (folder / "empty.bin").touch()
    (folder / "flax_model.msgpack").write_bytes(WEIGHTS)
    return folder


def contents(folder: str | Path) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def statuses(hub: HubServer, method: str, part: str) -> list[int | None]:
    return [status for m, path, status, _ in hub.requests if m == method and part in path]


def status_of(error: BaseException) -> int:
    """Of an error, or of the one it was raised from."""
    while not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error.response.status_code


def test_push_and_fetch(hub, folder, tmp_path):
    api = HfApi(token="hf_good")
    assert api.whoami()["name"] == "tester"
    url = api.create_repo(REPO, private=True)
    assert (url, url.repo_id) == (f"{hub.endpoint}/{REPO}", REPO)
    assert api.create_repo("model", exist_ok=True) == url
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo(REPO)
    info = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="All of it")
    expected = contents(folder)
    assert hub.private(REPO)
    assert {path: data for path, data in hub.files(REPO).items() if path != ".gitattributes"} == expected

    initial, commit = hub.commits(REPO)
    assert (initial["added"], initial["parent"]) == ([".gitattributes"], None)
    assert (commit["message"], commit["oid"], commit["parent"]) == ("All of it", info.oid, initial["oid"])
    assert (commit["added"], commit["deleted"]) == (sorted(expected), [])
    assert statuses(hub, "PUT", "/lfs-storage/") == [200, 200]
    assert {request.headers["authorization"] for request in hub.requests} == {"Bearer hf_good", None}
    assert not [request for request in hub.requests if (request.method == "PUT") != (request.headers["authorization"] is None)]

    assert sorted(list_repo_files(REPO, token="hf_good")) == sorted(hub.files(REPO))
    assert [entry.path for entry in api.list_repo_tree(REPO, "logs")] == ["logs/a b+c%.txt", "logs/events.out.tfevents.1"]
    large, regular = api.get_paths_info(REPO, ["flax_model.msgpack", "config.json", "missing"])
    assert (large.size, large.lfs.size, regular.lfs) == (len(WEIGHTS), len(WEIGHTS), None)
    assert (api.repo_info(REPO).sha, api.repo_info(REPO).private) == (info.oid, True)
    assert contents(api.snapshot_download(REPO, cache_dir=tmp_path / "cache")) == hub.files(REPO)
    path = api.hf_hub_download(REPO, "flax_model.msgpack", local_dir=tmp_path / "local")
    assert Path(path).read_bytes() == WEIGHTS


def test_second_push(hub, api, folder):
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    (folder / "config.json").write_text("{}")
    (folder / "logs" / "events.out.tfevents.1").rename(folder / "logs" / "events.out.tfevents.2")
    api.upload_folder(repo_id=REPO, folder_path=folder, delete_patterns="logs/*")
    assert {path: data for path, data in hub.files(REPO).items() if path != ".gitattributes"} == contents(folder)
    last = hub.commits(REPO)[-1]
    assert last["added"] == ["config.json", "logs/events.out.tfevents.2"]
    assert last["deleted"] == ["logs/events.out.tfevents.1"]
    assert len(statuses(hub, "PUT", "/lfs-storage/")) == 2  # not a byte of the large files again

    api.upload_folder(repo_id=REPO, folder_path=folder)  # nothing new, no commit
    assert hub.commits(REPO)[-1] == last
    operations = [CommitOperationDelete("logs/"), CommitOperationAdd("flax_model.msgpack", b"short")]
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        api.create_commit(REPO, operations, commit_message="Late", parent_commit=first.oid)
    assert status_of(caught.value) == 412
    api.create_commit(REPO, operations, commit_message="In time", parent_commit=last["oid"], commit_description="Why")
    assert sorted(hub.files(REPO)) == [".gitattributes", "README.md", "config.json", "empty.bin", "flax_model.msgpack"]
    assert hub.files(REPO)["flax_model.msgpack"] == b"short"
    assert hub.commits(REPO)[-1]["description"] == "Why"
    with pytest.raises(EntryNotFoundError):
        api.create_commit(REPO, [CommitOperationDelete("missing")], commit_message="Nothing to delete")
    assert len(hub.commits(REPO)) == 4


def test_an_older_commit_can_be_read(hub, api, tmp_path):
    first = api.upload_file(repo_id=REPO, path_or_fileobj=b"one", path_in_repo="a.txt")
    api.upload_file(repo_id=REPO, path_or_fileobj=b"two", path_in_repo="a.txt")
    assert [
        Path(api.hf_hub_download(REPO, "a.txt", cache_dir=tmp_path, revision=rev)).read_bytes() for rev in (first.oid, None)
    ]
    assert hub.files(REPO)["a.txt"] == b"two"
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(REPO, revision="missing")
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"", path_in_repo="a.txt", revision="missing")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "missing", cache_dir=tmp_path)
    assert not api.file_exists(REPO, "missing")


def test_ignored_files_stay_away(hub, api):
    operations = [CommitOperationAdd(path, b"1\n") for path in ("a.log", "b.txt", "cache/c.bin")]
    operations.append(CommitOperationAdd(".gitignore", b"*.log\ncache/\n"))
    api.create_commit(REPO, operations, commit_message="With .gitignore")
    assert sorted(hub.files(REPO)) == [".gitattributes", ".gitignore", "b.txt"]


def test_who_may(hub, api, folder):
    stranger, nobody = (HfApi(token=token) for token in ("hf_bad", False))
    for call in (
        lambda: stranger.create_repo(REPO, exist_ok=True),
        lambda: stranger.upload_folder(repo_id=REPO, folder_path=folder),
        lambda: stranger.whoami(),
        lambda: nobody.create_repo("tester/another", exist_ok=True),
    ):
        with pytest.raises(HfHubHTTPError) as caught:
            call()
        assert status_of(caught.value) == 401
    nobody.create_repo(REPO, exist_ok=True)  # it can be seen that it is there
    for client in (stranger, nobody):
        with pytest.raises(HfHubHTTPError):
            client.auth_check(REPO, write=True)
    api.auth_check(REPO, write=True)
    with pytest.raises(RepositoryNotFoundError):
        nobody.upload_file(repo_id=REPO, path_or_fileobj=b"", path_in_repo="a.txt")
    assert len(hub.commits(REPO)) == 1
    assert nobody.repo_info(REPO).id == REPO

    api.create_repo("secret", private=True)
    assert not nobody.repo_exists("tester/secret")
    with pytest.raises(RepositoryNotFoundError):
        api.upload_folder(repo_id="tester/missing", folder_path=folder)
    with pytest.raises(HfHubHTTPError, match="namespace") as caught:
        api.create_repo("somebody/model", exist_ok=True)
    assert status_of(caught.value) == 403


def test_what_is_refused(hub, api):
    sent = {"headers": {"authorization": "Bearer hf_good"}}
    url, oid = f"{hub.endpoint}/{REPO}.git/info/lfs/objects", hashlib.sha256(b"1").hexdigest()
    batch = get_session().post(f"{url}/batch", json={"objects": [{"oid": oid, "size": 1}]}, **sent).json()
    link = batch["objects"][0]["actions"]["upload"]["href"]
    assert get_session().post(f"{url}/verify", json={"oid": oid, "size": 1}, **sent).status_code == 404
    assert get_session().put(link, content=b"2").status_code == 400  # other bytes than those announced
    assert get_session().put(link, content=b"1", **sent).status_code == 400  # a link needs no token
    assert get_session().put(link[:-1], content=b"1").status_code == 403
    assert get_session().put(link, content=b"1").status_code == 200
    assert get_session().post(f"{url}/verify", json={"oid": oid, "size": 1}, **sent).status_code == 200
    for size in (1, 12_000_000):
        addition = CommitOperationAdd("model.bin", bytes(size))  # and then the client is told a lie
        addition._upload_mode, addition._is_uploaded = ("lfs", True) if size == 1 else ("regular", False)
        with pytest.raises(BadRequestError, match=r"does not exist|larger than 10 MiB"):
            api.create_commit(REPO, [addition], commit_message="Not uploaded, or too large")
    assert len(hub.commits(REPO)) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_commits_are_not_repeated(hub, api, folder, waits, status):
    """Every failure ends the push; what was uploaded before stays uploaded."""
    hub.fail("POST", "/commit/", status, times=3, retry_after=7)
    for _ in range(3):
        with pytest.raises(HfHubHTTPError) as caught:
            api.upload_folder(repo_id=REPO, folder_path=folder)
        assert status_of(caught.value) == status
        assert caught.value.response.headers["Retry-After"] == "7"
        assert len(hub.commits(REPO)) == 1
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.files(REPO)["flax_model.msgpack"] == WEIGHTS
    assert statuses(hub, "POST", "/commit/") == [status, status, status, 200]
    assert len(statuses(hub, "PUT", "/lfs-storage/")) == 2
    assert not waits


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("path", ["/preupload/", "/objects/batch", "/objects/verify"])
def test_other_posts_are_repeated(hub, api, folder, waits, path, status):
    """As often as uploads, and after the time that the server asks for."""
    hub.fail("POST", path, status, times=2, retry_after=7)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.files(REPO)["flax_model.msgpack"] == WEIGHTS
    assert statuses(hub, "POST", path)[:3] == [status, status, 200] or path == "/objects/verify"
    assert waits == [8, 8]


def test_the_card_is_validated(hub, api, folder):
    """The client reads the answer before it looks at the status: a gateway's error is one of JSON."""
    hub.fail("POST", "/validate-yaml", 503, times=1)
    with pytest.raises(json.JSONDecodeError):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    (folder / "README.md").write_text("no metadata")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_folder(repo_id=REPO, folder_path=folder, allow_patterns="*.md")
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.files(REPO)["README.md"] == b"no metadata"


@pytest.mark.parametrize("status", [500, 429])
def test_creation_is_not_repeated(hub, waits, status):
    hub.fail("POST", "/repos/create", status, times=1)
    api = HfApi(token="hf_good")
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo(REPO)
    assert status_of(caught.value) == status
    api.create_repo(REPO)
    assert not waits


def test_uploads_are_repeated(hub, api, folder, waits):
    """Three errors of the server, or three connections that break in the middle of the file: waits, and then it is there."""
    hub.fail("PUT", "/lfs-storage/", 500, times=3)
    api.upload_file(repo_id=REPO, path_or_fileobj=folder / "flax_model.msgpack", path_in_repo="a.msgpack")
    assert waits == BACKOFF[:3]
    assert statuses(hub, "PUT", "/lfs-storage/") == [500, 500, 500, 200]
    hub.drop("/lfs-storage/", after_bytes=5_000_000, times=3)
    data = WEIGHTS[::-1]
    api.upload_file(repo_id=REPO, path_or_fileobj=data, path_in_repo="b.msgpack")
    assert waits[3:] == BACKOFF[:3]
    assert statuses(hub, "PUT", "/lfs-storage/")[4:] == [None, None, None, 200]
    assert (hub.files(REPO)["a.msgpack"], hub.files(REPO)["b.msgpack"]) == (WEIGHTS, data)


@pytest.mark.parametrize("fault", ["error", "drop", "too many"])
def test_uploads_end_some_time(hub, api, folder, waits, fault):
    """A RuntimeError hides why: the status of the sixth answer, or the sixth lost connection."""
    if fault == "drop":
        hub.drop("/lfs-storage/", after_bytes=1_000_000, times=6)
    else:
        hub.fail("PUT", "/lfs-storage/", 500 if fault == "error" else 429, times=6)
    with pytest.raises(RuntimeError, match="flax_model") as caught:
        api.upload_folder(repo_id=REPO, folder_path=folder, allow_patterns="*.msgpack")
    assert isinstance(caught.value.__cause__, httpx2.TransportError if fault == "drop" else HfHubHTTPError)
    assert waits == BACKOFF
    assert len(hub.commits(REPO)) == 1
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.files(REPO)["flax_model.msgpack"] == WEIGHTS


@pytest.mark.parametrize("after_bytes", [0, 1_000_000, 10_000_000], ids=["before", "in the middle", "behind"])
def test_a_broken_post_is_not_repeated(hub, api, waits, after_bytes):
    """A connection lost in the commit's body: a ConnectionError, and no commit."""
    hub.drop("/commit/", after_bytes)
    push = {"repo_id": REPO, "path_or_fileobj": bytes(2_000_000), "path_in_repo": "zeros.txt"}
    with pytest.raises(httpx2.TransportError):
        api.upload_file(**push)
    assert len(hub.commits(REPO)) == 1
    api.upload_file(**push)
    assert hub.files(REPO)["zeros.txt"] == bytes(2_000_000)
    assert not waits


def test_where_a_connection_breaks(hub):
    """At the byte that was named: the server does not wait for the next one."""
    hub.drop("/commit/", after_bytes=1000)
    with socket.create_connection(hub.endpoint.removeprefix("http://").split(":"), timeout=5) as connection:
        connection.sendall(b"POST /api/models/a/b/commit/main HTTP/1.1\r\nContent-Length: 2000\r\n\r\n" + bytes(999))
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(5)
        connection.sendall(bytes(1))
        assert connection.recv(1) == b""
    assert statuses(hub, "POST", "/commit/") == [None]


def test_the_answer_gets_lost(hub, api, folder):
    """The commit was made, the client hears of an error: the same push again finds nothing to do."""
    hub.fail("POST", "/commit/", 504, times=1, late=True)
    with pytest.raises(HfHubHTTPError):
        api.upload_folder(repo_id=REPO, folder_path=folder, delete_patterns="*")
    assert len(hub.commits(REPO)) == 2
    info = api.upload_folder(repo_id=REPO, folder_path=folder, delete_patterns="*")
    assert len(hub.commits(REPO)) == 2
    assert info.oid == hub.commits(REPO)[-1]["oid"]


def test_down_and_up(hub, api, folder, tmp_path, waits):
    hub.down()
    for call in (
        lambda: api.create_repo(REPO, exist_ok=True),
        lambda: api.whoami(),
        lambda: api.upload_folder(repo_id=REPO, folder_path=folder),
    ):
        with pytest.raises(httpx2.TransportError):
            call()
    with pytest.raises(httpx2.TransportError):
        api.hf_hub_download(REPO, "config.json", cache_dir=tmp_path)
    hub.up()
    api.upload_folder(repo_id=REPO, folder_path=folder)
    hub.fail("HEAD", "/resolve/", 503, times=2)  # asked once more, with patience
    hub.fail("GET", "/lfs-storage/", 503, times=1)
    with pytest.raises(HfHubHTTPError):
        api.hf_hub_download(REPO, "flax_model.msgpack", cache_dir=tmp_path)
    path = api.hf_hub_download(REPO, "flax_model.msgpack", cache_dir=tmp_path)
    assert Path(path).read_bytes() == WEIGHTS
    assert waits == [1]


def test_delay_and_an_outage_meanwhile(hub, api):
    hub.delay("/whoami", 0.3, times=1)
    start = time.monotonic()
    api.whoami()
    assert time.monotonic() - start >= 0.3
    hub.delay("/whoami", 60)
    threading.Timer(0.2, hub.down).start()
    with pytest.raises(httpx2.TransportError):
        api.whoami()
    assert time.monotonic() - start < 10


def test_many_at_once(hub, api, monkeypatch):
    """Eight threads, forty commits, in an unlucky order: one chain of them and every file."""
    commit = Repo.commit
    monkeypatch.setattr(Repo, "commit", lambda *args: time.sleep(0.005) or commit(*args))
    data = {f"{i}.{'txt' if i % 2 else 'bin'}": os.urandom(1000) for i in range(40)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: api.upload_file(repo_id=REPO, path_or_fileobj=item[1], path_in_repo=item[0]), data.items()))
    commits = hub.commits(REPO)
    assert [commit["parent"] for commit in commits[1:]] == [commit["oid"] for commit in commits[:-1]]
    assert {path: content for path, content in hub.files(REPO).items() if path != ".gitattributes"} == data


def test_a_child_process(hub, folder, tmp_path):
    """Environment variables are enough."""
    program = (
        "import huggingface_hub as h, sys\n"
        "h.create_repo('child')\n"
        "h.upload_folder(repo_id='tester/child', folder_path=sys.argv[1])\n"
        "print(h.hf_hub_download('tester/child', 'flax_model.msgpack'))\n"
    )
    environment = os.environ | hub.env(tmp_path / "home")
    child = subprocess.run([sys.executable, "-c", program, folder], env=environment, capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr
    assert Path(child.stdout.strip()).read_bytes() == hub.files("tester/child")["flax_model.msgpack"] == WEIGHTS
    assert Path(child.stdout.strip()).is_relative_to(tmp_path / "home")


def test_by_hand(hub):
    command = [sys.executable, ROOT / "tests" / "hub_server.py", "--token", "hf_other", "--user", "me"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert HfApi(endpoint=server.stdout.readline().strip(), token="hf_other").whoami()["name"] == "me"
        finally:
            server.terminate()
