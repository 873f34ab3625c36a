# SPDX-License-Identifier: Apache-2.0
"""A small Hugging Face Hub on 127.0.0.1, so that tests can push and fetch models with the real client.

Written against huggingface_hub 2.4.0. What it speaks, for model repositories with the one branch `main`:

    GET  /api/whoami-v2                              POST /api/models/{repo}/preupload/{rev}
    POST /api/repos/create                           POST /{repo}.git/info/lfs/objects/batch and .../verify
    GET  /api/models/{repo}/auth-check[/write]
    GET  /api/models/{repo}[/revision/{rev}]         PUT, GET /lfs-storage/{repo}/{sha256}: signed links, no token
    GET  /api/models/{repo}/tree/{rev}[/{folder}]    POST /api/models/{repo}/commit/{rev}
    POST /api/models/{repo}/paths-info/{rev}         POST /api/validate-yaml, for README.md
    GET, HEAD /{repo}/resolve/{rev}/{path}

Large files go the classic way (transfer "basic", one PUT per file): the client no longer asks whether the server takes Xet,
so that is switched off in it, in this process and by `env`. The server is as strict as the Hub: a wrong token, a namespace of
somebody else, bytes that do not have their SHA-256, a commit of a large file that was not uploaded or of a regular one over
10 MiB, and a parent commit that is not the last one are refused.

    with HubServer(token="hf_good") as hub, hub.in_this_process():
        HfApi(token="hf_good").upload_folder(repo_id="tester/model", folder_path=...)
        assert hub.files("tester/model")["config.json"] == b"{}"

By hand: python tests/hub_server.py --port 8000 --token hf_good
"""

import argparse
import base64
import hashlib
import json
import math
import os
import re
import secrets
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch
from urllib.parse import parse_qs, unquote, urlsplit

import transformers
import yaml  # huggingface_hub requires it
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import close_session, disable_progress_bars, enable_progress_bars

MAX_REGULAR_BYTES = 10 * 2**20
LARGE = "*.bin *.gz *.h5 *.model *.msgpack *.npy *.npz *.onnx *.pickle *.pkl *.pt *.pth *.safetensors *.tar *.zip *tfevents*"
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE.split()).encode()


class Request(NamedTuple):
    """What the server was asked; the status is None where it cut the connection instead of answering."""

    method: str
    path: str
    status: int | None
    headers: dict[str, str | None]


class Call(NamedTuple):
    """A request as the functions that answer it get it."""

    method: str
    path: str
    query: dict[str, list[str]]
    authorization: str | None
    body: bytes


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, {"Content-Type": "application/json; charset=utf-8"} | headers, json.dumps(value).encode())


class HubError(Exception):
    """A refusal. Its message and code are in headers and in the body: the client reads both."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None, **body):
        super().__init__(message)
        told = {"X-Error-Message": message.encode("ascii", "replace").decode()} | ({"X-Error-Code": code} if code else {})
        self.answer = as_json({"error": message} | body, status, **told | (headers or {}))


def git_sha1(kind: str, data: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


def matches(path: str, patterns: list[str]) -> bool:
    """Git's rules, as far as a name or a whole path goes."""
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in (path, *path.split("/")))


@dataclass(frozen=True)
class Blob:
    data: bytes
    is_large: bool = False

    @cached_property
    def oid(self) -> str:
        """What the client compares its file with: SHA-256 of a large file, Git's SHA-1 of a regular one."""
        return hashlib.sha256(self.data).hexdigest() if self.is_large else git_sha1("blob", self.data)

    def describe(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        if self.is_large:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.oid}\nsize {len(self.data)}\n".encode()
            large = {"oid": self.oid, "size": len(self.data), "pointerSize": len(pointer)}
            entry |= {"oid": git_sha1("blob", pointer), "lfs": large}
        return entry


class Repo:
    def __init__(self, private: bool):
        self.private, self.commits = private, []
        self.commit("initial commit", "", {".gitattributes": Blob(GIT_ATTRIBUTES)})

    def commit(self, message: str, description: str, tree: dict[str, Blob]) -> str:
        parent, before = (self.commits[-1]["oid"], self.commits[-1]["tree"]) if self.commits else (None, {})
        added = sorted(path for path in tree if tree[path] != before.get(path))
        deleted = sorted(before.keys() - tree.keys())
        date = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        commit = {"oid": secrets.token_hex(20), "parent": parent, "message": message, "description": description}
        self.commits.append(commit | {"added": added, "deleted": deleted, "date": date, "tree": tree})
        return commit["oid"]


ROUTES: list[tuple[set[str], re.Pattern, Any]] = []


def route(methods: str, pattern: str):
    pattern = pattern.replace("{repo}", "(?P<repo>[^/]+/[^/]+)").replace("{rev}", "(?P<rev>[^/]+)")

    def register(function):
        ROUTES.append((set(methods.split()), re.compile(pattern), function))
        return function

    return register


class HubServer:
    """The server: what it holds, what it was asked, what is to go wrong. Only `user` and `orgs` may own repositories."""

    def __init__(self, token: str = "hf_good", user: str = "tester", orgs: tuple[str, ...] = (), port: int = 0):
        self.token, self.user, self.orgs = token, user, orgs
        self.requests: list[Request] = []
        self._repos: dict[str, Repo] = {}
        self._storage: dict[tuple[str, str], bytes] = {}  # large files by repository and SHA-256, committed or not
        self._signature = secrets.token_hex(16)
        self._faults: list[SimpleNamespace] = []
        self._is_down = threading.Event()
        self._lock = threading.RLock()
        self._server = Server(("127.0.0.1", port), Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="hub", daemon=True).start()
        return self

    def __exit__(self, *_):
        self.down()
        self._server.shutdown()
        self._server.server_close()

    def env(self, home: Any) -> dict[str, str]:
        """The environment that sends a child process here, with `home` for the client's cache and token."""
        where = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": self.token, "HF_HOME": str(home), "HF_HUB_CACHE": f"{home}/hub"}
        switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return where | switches | {"no_proxy": "127.0.0.1,localhost"}

    @contextmanager
    def in_this_process(self):
        """Send the client of this process here, though it was imported offline or with another endpoint."""
        url = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        with (
            patch.object(constants, "HF_HUB_OFFLINE", False),
            patch.object(constants, "HF_HUB_DISABLE_XET", True),
            patch.object(constants, "ENDPOINT", self.endpoint),
            patch.object(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url),
            patch.object(hf_api.api, "endpoint", self.endpoint),
            patch.object(transformers.utils.hub, "_hf_api", None),  # it keeps a client of its own
            patch.dict(os.environ, no_proxy="127.0.0.1,localhost"),
        ):
            close_session()  # made when it was first needed, with what was true then
            disable_progress_bars()
            try:
                yield
            finally:
                enable_progress_bars()
                close_session()

    # What it holds.

    def files(self, repo_id: str) -> dict[str, bytes]:
        """All files of the repository now; like on the Hub, it begins with a .gitattributes."""
        with self._lock:
            return {path: blob.data for path, blob in self._repos[repo_id].commits[-1]["tree"].items()}

    def commits(self, repo_id: str) -> list[dict]:
        """Oldest first, "initial commit" included: oid, parent, message, description, added (or changed), deleted, date."""
        with self._lock:
            return [{k: v for k, v in commit.items() if k != "tree"} for commit in self._repos[repo_id].commits]

    def private(self, repo_id: str) -> bool:
        with self._lock:
            return self._repos[repo_id].private

    # What is to go wrong. `path` is a regular expression, searched for in the decoded path without its query.

    def fail(self, method: str, path: str, status=500, times: float = 3, retry_after: int | None = None, late: bool = False):
        """Answer with an error; with late=True, do what was asked nevertheless. 502 to 504 are a gateway's: not JSON."""
        self._add("fail", path, times, method=method, status=status, retry_after=retry_after, late=late)

    def garble(self, path: str, times: float = 1, content: bytes = b"<html>Moved</html>"):
        """Answer with something else, as if nothing were wrong."""
        self._add("garble", path, times, content=content)

    def drop(self, path: str, after_bytes: int, times: float = 1):
        """Cut the connection when so much of the body has come in, or all of it if it is shorter."""
        self._add("drop", path, times, after_bytes=after_bytes)

    def delay(self, path: str, seconds: float, times: float = math.inf):
        """Take in the request, then wait before doing anything about it."""
        self._add("delay", path, times, seconds=seconds)

    def down(self):
        """From now on cut every connection, those of requests under way included; the port stays ours."""
        self._is_down.set()

    def up(self):
        self._is_down.clear()

    def _add(self, kind: str, path: str, times: float, method: str | None = None, **what):
        with self._lock:
            self._faults.append(SimpleNamespace(kind=kind, path=path, left=times, method=method, **what))

    def _take(self, kind: str, method: str, path: str) -> SimpleNamespace | None:
        with self._lock:
            for fault in self._faults:
                if fault.kind == kind and fault.left > 0 and fault.method in (None, method) and re.search(fault.path, path):
                    fault.left -= 1
                    return fault
        return None

    # Answers.

    def _answer(self, call: Call) -> Answer:
        if delay := self._take("delay", call.method, call.path):
            self._is_down.wait(delay.seconds)
        if garbled := self._take("garble", call.method, call.path):
            return Answer(200, {"Content-Type": "text/html"}, garbled.content)
        fault = self._take("fail", call.method, call.path)
        try:
            if fault is None or fault.late:
                with self._lock:
                    answer = self._dispatch(call)
        except HubError as error:
            answer = error.answer
        if fault is None:
            return answer
        headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
        phrase = HTTPStatus(fault.status).phrase
        if fault.status in (502, 503, 504):
            return Answer(fault.status, headers | {"Content-Type": "text/html"}, f"<html>{phrase}</html>".encode())
        return HubError(fault.status, phrase, headers=headers).answer

    def _dispatch(self, call: Call) -> Answer:
        for methods, pattern, function in ROUTES:
            if call.method in methods and (found := pattern.fullmatch(call.path)):
                if call.authorization not in (None, f"Bearer {self.token}"):
                    raise HubError(401, "Invalid credentials in Authorization header")
                answer = function(self, call, **{name: value for name, value in found.groupdict().items() if value})
                return answer if isinstance(answer, Answer) else as_json(answer)
        raise HubError(404, "Sorry, we can't find the page you are looking for.")

    def _find(self, call: Call, repo_id: str, rev: str = "main", write: bool = False) -> tuple[Repo, dict]:
        """The repository and the commit, for those who may read or write it."""
        repo = self._repos.get(repo_id)
        if call.authorization is None and (write or repo is None or repo.private):
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if repo is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        known = {} if write else {commit["oid"]: commit for commit in repo.commits}
        known["main"] = repo.commits[-1]
        if rev not in known:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return repo, known[rev]

    def _link(self, repo_id: str, oid: str, size: int) -> str:
        storage = self.endpoint.replace("127.0.0.1", "localhost")  # another host, so that the client sends it no token
        return f"{storage}/lfs-storage/{repo_id}/{oid}?size={size}&signature={self._signature}"

    @route("GET", "/api/whoami-v2")
    def _whoami(self, call: Call):
        if call.authorization is None:
            raise HubError(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": org} for org in self.orgs]
        auth = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
        return {"type": "user", "id": "1", "name": self.user, "fullname": self.user, "orgs": orgs, "auth": auth}

    @route("POST", "/api/repos/create")
    def _create(self, call: Call):
        asked = json.loads(call.body)
        namespace = asked.get("organization") or self.user
        if call.authorization is None:
            raise HubError(401, "Invalid username or password.")
        if asked.get("type", "model") != "model":
            raise HubError(400, "This server holds nothing but models")
        if namespace not in (self.user, *self.orgs):
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        repo_id = f"{namespace}/{asked['name']}"
        names = {"name": repo_id, "url": f"{self.endpoint}/{repo_id}"}
        if repo_id in self._repos:
            raise HubError(409, "You already created this model repo", **names)
        self._repos[repo_id] = Repo(asked.get("visibility") == "private")
        return names

    @route("GET", "/api/models/{repo}/auth-check(?P<write>/write)?")
    def _auth_check(self, call: Call, repo: str, write: str = ""):
        self._find(call, repo, write=bool(write))
        return {}

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, call: Call):
        card = re.match(r"\s*---\r?\n(.*?)^---\s*$", json.loads(call.body)["content"], re.DOTALL | re.MULTILINE)
        if card is None:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        try:
            problem = None if isinstance(yaml.safe_load(card[1]), dict) else "must be of type object"
        except yaml.YAMLError as error:
            problem = str(error)
        if problem:
            raise HubError(400, "Invalid metadata", errors=[{"message": problem}], warnings=[])
        return {"errors": [], "warnings": []}

    @route("GET", "/api/models/{repo}(/revision/{rev})?")
    def _info(self, call: Call, repo: str, rev: str = "main"):
        found, commit = self._find(call, repo, rev)
        siblings = [{"rfilename": path} for path in sorted(commit["tree"])]
        info = {"id": repo, "author": repo.split("/")[0], "sha": commit["oid"], "siblings": siblings, "private": found.private}
        return info | {"createdAt": found.commits[0]["date"], "lastModified": commit["date"], "gated": False, "tags": []}

    @route("GET", "/api/models/{repo}/tree/{rev}(/(?P<folder>.+))?")
    def _tree(self, call: Call, repo: str, rev: str, folder: str = ""):
        recursive = call.query.get("recursive", [""])[0].lower() in ("true", "1")
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for path, blob in self._find(call, repo, rev)[1]["tree"].items():
            if path.startswith(prefix):
                parts = path[len(prefix) :].split("/")
                for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                    inner = prefix + "/".join(parts[:depth])
                    entries[inner] = {"type": "directory", "path": inner, "size": 0, "oid": git_sha1("tree", inner.encode())}
                if recursive or len(parts) == 1:
                    entries[path] = blob.describe(path)
        if folder and not entries:
            raise HubError(404, f'{folder} does not exist on "{rev}"', "EntryNotFound")
        return [entries[path] for path in sorted(entries)]

    @route("POST", "/api/models/{repo}/paths-info/{rev}")
    def _paths_info(self, call: Call, repo: str, rev: str):
        tree = self._find(call, repo, rev)[1]["tree"]
        return [tree[path].describe(path) for path in parse_qs(call.body.decode())["paths"] if path in tree]

    @route("GET HEAD", "/{repo}/resolve/{rev}/(?P<path>.+)")
    def _resolve(self, call: Call, repo: str, rev: str, path: str):
        commit = self._find(call, repo, rev)[1]
        blob, headers = commit["tree"].get(path), {"X-Repo-Commit": commit["oid"]}
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        if not blob.is_large:
            return Answer(200, headers | {"ETag": f'"{blob.oid}"', "Content-Type": "application/octet-stream"}, blob.data)
        size = len(blob.data)
        headers |= {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{blob.oid}"', "Location": self._link(repo, blob.oid, size)}
        return Answer(302, headers, b"")

    @route("POST", "/api/models/{repo}/preupload/{rev}")
    def _preupload(self, call: Call, repo: str, rev: str):
        asked, tree = json.loads(call.body), self._find(call, repo, rev, write=True)[1]["tree"]
        attributes, ignored = (tree[name].data.decode() if name in tree else "" for name in (".gitattributes", ".gitignore"))
        large = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line.split()]
        ignored = [line.strip("/ ") for line in asked.get("gitIgnore", ignored).splitlines() if line.strip()]
        files = []
        for file in asked["files"]:
            path = file["path"]
            mode = "lfs" if file["size"] > MAX_REGULAR_BYTES or matches(path, large) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": matches(path, ignored)})
            if path in tree:
                files[-1]["oid"] = tree[path].oid
        return {"files": files}

    @route("POST", r"/{repo}\.git/info/lfs/objects/batch")
    def _batch(self, call: Call, repo: str):
        self._find(call, repo, write=True)
        objects = [{"oid": asked["oid"], "size": asked["size"]} for asked in json.loads(call.body)["objects"]]
        for wanted in objects:
            if (repo, wanted["oid"]) not in self._storage:
                verify = f"{self.endpoint}/{repo}.git/info/lfs/objects/verify"
                wanted["actions"] = {"upload": {"href": self._link(repo, **wanted)}, "verify": {"href": verify}}
        return {"transfer": "basic", "objects": objects}

    @route("GET PUT", "/lfs-storage/{repo}/(?P<oid>[0-9a-f]{64})")
    def _store(self, call: Call, repo: str, oid: str):
        if call.query.get("signature") != [self._signature]:
            raise HubError(403, "SignatureDoesNotMatch")
        if call.method == "GET":
            return Answer(200, {"Content-Type": "application/octet-stream"}, self._storage[repo, oid])
        if call.authorization is not None:
            raise HubError(400, "Only one auth mechanism allowed")  # and the storage is no place to send the token to
        if [str(len(call.body))] != call.query["size"] or hashlib.sha256(call.body).hexdigest() != oid:
            raise HubError(400, "The bytes are not those that were announced")
        self._storage[repo, oid] = call.body
        return Answer(200, {"ETag": f'"{oid}"'}, b"")

    @route("POST", r"/{repo}\.git/info/lfs/objects/verify")
    def _verify(self, call: Call, repo: str):
        self._find(call, repo, write=True)
        asked = json.loads(call.body)
        if len(self._storage.get((repo, asked["oid"]), b"")) != asked["size"]:
            raise HubError(404, "No such object of this size")
        return {}

    @route("POST", "/api/models/{repo}/commit/{rev}")
    def _commit(self, call: Call, repo: str, rev: str):
        found, head = self._find(call, repo, rev, write=True)
        header, *operations = (json.loads(line) for line in call.body.split(b"\n") if line)
        if "create_pr" in call.query:
            raise HubError(400, "This server has no pull requests")
        if header["value"].get("parentCommit", head["oid"]) != head["oid"]:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(head["tree"])
        for operation in operations:
            kind, value, path = operation["key"], operation["value"], operation["value"]["path"]
            if kind == "file":
                tree[path] = Blob(base64.b64decode(value["content"], validate=True))
                if len(tree[path].data) > MAX_REGULAR_BYTES:
                    raise HubError(400, f"Your push was rejected because it contains files larger than 10 MiB: {path}")
            elif kind == "lfsFile":
                if (repo, value["oid"]) not in self._storage:
                    raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
                tree[path] = Blob(self._storage[repo, value["oid"]], is_large=True)
            elif kind in ("deletedFile", "deletedFolder"):
                folder = path.rstrip("/") + "/"
                gone = [name for name in tree if (name == path if kind == "deletedFile" else name.startswith(folder))]
                if not gone:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                tree = {name: blob for name, blob in tree.items() if name not in gone}
            else:
                raise HubError(400, f"Unknown operation: {kind}")
        oid = found.commit(header["value"]["summary"], header["value"].get("description", ""), tree)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{repo}/commit/{oid}"}


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    hub: HubServer

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a client that went away is none
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept
    disable_nagle_algorithm = True
    server: Server

    def respond(self):
        hub, url = self.server.hub, urlsplit(self.path)
        path = unquote(url.path)
        names = ("authorization", "content-type", "content-length", "user-agent", "range")
        seen = {name: self.headers.get(name) for name in names}
        try:
            body = self.read_body(hub._take("drop", self.command, path))
            answer = hub._answer(Call(self.command, path, parse_qs(url.query), seen["authorization"], body))
            if hub._is_down.is_set():
                raise ConnectionAbortedError
        except ConnectionError:
            hub.requests.append(Request(self.command, path, None, seen))
            self.close_connection = True
            return
        if path != "/api/agent-harnesses":  # what the client asks by itself, in some environments
            hub.requests.append(Request(self.command, path, answer.status, seen))
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = respond  # noqa: N815

    def read_body(self, drop: SimpleNamespace | None) -> bytes:
        length, body = int(self.headers.get("Content-Length", 0)), bytearray()
        limit = length if drop is None else min(length, drop.after_bytes)
        while len(body) < limit and not self.server.hub._is_down.is_set():
            piece = self.rfile.read1(min(2**16, limit - len(body)))
            if not piece:
                raise ConnectionResetError
            body += piece
        if drop or len(body) < length or self.server.hub._is_down.is_set():
            raise ConnectionAbortedError
        return bytes(body)

    def log_message(self, *_):
        pass


def serve() -> Iterator[HubServer]:
    """For conftest.py: hub = pytest.fixture(serve, name="hub")."""
    with HubServer() as hub, hub.in_this_process():
        yield hub


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--token", default="hf_good")
    parser.add_argument("--user", default="tester")
    args = parser.parse_args()
    with HubServer(args.token, args.user, port=args.port) as hub:
        print(hub.endpoint, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
