# SPDX-License-Identifier: Apache-2.0
"""Files on other machines, by address (https://, hf://, s3://, gs://, ...): found, told apart from changed ones, opened."""

import contextlib
import importlib.metadata
import io
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

import fsspec
import httpx2

from flaxlm import cli

# ---- Names ---------------------------------------------------------------------------------------------------------------


def is_address(name: str) -> bool:
    return "://" in name and not os.path.exists(name)


def is_of_web(name: str) -> bool:
    return is_address(name) and name.partition("://")[0].lower() in ("http", "https")


def path_of(name: str) -> str:
    """What tells the format: of an address on the web the path, without what a server is asked beside it (?download=1)."""
    if is_of_web(name):
        return unquote(split(name).path)
    return next(part for part in name.split("::") if "://" in part) if is_address(name) else name


def split(name: str) -> SplitResult:
    """The parts of an address. One that has none is refused, without showing it: there may be a password in it."""
    try:
        return urlsplit(name)
    except ValueError as error:
        cli.fail(f"an address of {name.partition('://')[0]}:// is none: {error}")


def shown(name: str) -> str:
    """A name as it may be logged: an address without a password, and without the question behind it, which may be signed."""
    if not is_address(name):
        return name
    parts = split(name)
    if not is_of_web(name):
        return name.replace(f"{parts.netloc.rpartition('@')[0]}@", "", 1) if ":" in parts.netloc.rpartition("@")[0] else name
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


# ---- What goes wrong -----------------------------------------------------------------------------------------------------


NETWORK_PACKAGES = {
    "aiohttp", "botocore", "fsspec", "gcsfs", "google", "httpcore", "httpcore2", "httpx", "httpx2", "huggingface_hub",
    "requests", "s3fs", "urllib3",
}  # fmt: skip


def is_about_network(error: BaseException) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.partition(".")[0] in NETWORK_PACKAGES


def is_about_server(error: BaseException) -> bool:
    """Does it come from where a file is, not from what is in it?"""
    kinds = FileNotFoundError | PermissionError
    return any(is_about_network(cause) or isinstance(cause, kinds) for cause in cli.causes(error))


def answer_of(error: BaseException) -> int | None:
    """The status of a server's answer that an error tells of; the libraries each keep it in a place of their own."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    told = (getattr(response, "status_code", None), getattr(error, "code", None), getattr(error, "status", None))
    return next((int(number) for number in told if str(number).isdecimal()), None)


# Of botocore and google.auth: no keys, half of them, or old ones, found before a server is asked or when they are renewed.
ABOUT_KEYS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "DefaultCredentialsError",
    "RefreshError",
}


def explain(what: str, error: BaseException) -> cli.Ending:
    """What ends the program because of an error with an address: a person's mistake, or else the network's accident."""
    chain = list(cli.causes(error))
    answers = {answer_of(cause) for cause in chain if not isinstance(cause, cli.Ending)}
    is_of_hub = " hf://" in what
    malformed = next((cause for cause in chain if isinstance(cause, httpx2.UnsupportedProtocol | httpx2.InvalidURL)), None)
    if malformed is not None:
        return cli.Mistake(f"{what}: is no address: {cli.first_line(malformed)}")
    if any(type(cause).__name__ == "FileExpired" for cause in chain):  # of s3fs, by ETag
        return cli.Mistake(f"{what}: the file has changed while it was read")
    if any(isinstance(cause, FileNotFoundError | IsADirectoryError) for cause in chain) or answers & {404, 410}:
        return cli.Mistake(f"{what}: no such file" + (", or one that only the --token of another may read" * is_of_hub))
    refused = next((cause for cause in chain if is_refusal(cause)), None)
    if refused is not None and (is_of_hub or " http://" in what or " https://" in what):
        remedy = "give the --token of somebody who may" if is_of_hub else "the server wants to know who asks"
        return cli.Mistake(f"{what}: may not be read; {remedy}")
    if refused is not None:
        remedy = "keys are looked for where its package says, in the environment or in files"
        return cli.Mistake(f"{what}: may not be read: {cli.first_line(refused)}; {remedy}")
    cause = next((cause for cause in chain if is_about_network(cause)), None)
    if cause is not None:
        return cli.Accident(f"{what}: the network failed: {cli.first_line(cause)}")
    return cli.Mistake(f"{what}: cannot be read: {cli.first_line(error)} ({type(error).__name__})")


def is_refusal(error: BaseException) -> bool:
    """Does a server not let the one read who asks, or has nobody a key to ask with?"""
    if isinstance(error, cli.Ending):
        return False
    is_told_so = isinstance(error, PermissionError) or str(error).startswith("Forbidden: ")  # gcsfs has a plain OSError
    return is_told_so or answer_of(error) in (401, 403) or type(error).__name__ in ABOUT_KEYS


@contextlib.contextmanager
def told_of(flag: str, name: str) -> Iterator[None]:
    """Whatever goes wrong with an address within is told in a line that names it, and the flag."""
    try:
        yield
    except cli.Ending:
        raise
    except Exception as error:
        raise explain(f"{flag} {shown(name)}", error) from error


# ---- File systems --------------------------------------------------------------------------------------------------------


def file_system(name: str, flag: str, token: str | None) -> tuple[fsspec.AbstractFileSystem, str]:
    """What opens an address, and the path there. A package that is missing is named; `token` is for the Hub."""
    protocols = [part.partition("://")[0] for part in name.split("::") if "://" in part]
    for package in ("fsspec", "gcsfs"):
        logging.getLogger(package).setLevel(logging.CRITICAL)  # they log tracebacks of what is told in a line
    for protocol in protocols:
        try:
            fsspec.get_filesystem_class(protocol)
        except ImportError as error:
            missing = getattr(error.__cause__, "name", None)
            remedy = f"pip install {missing}" if missing else cli.first_line(error)
            cli.fail(f"{flag} {shown(name)}: {protocol}:// needs a package that is not installed: {remedy}")
        except ValueError:
            cli.fail(f"{flag} {shown(name)}: fsspec {importlib.metadata.version('fsspec')} has no protocol {protocol}://")
    options: dict[str, Any] = {}
    if token and "hf" in protocols:
        options = {"token": token} if protocols == ["hf"] else {"hf": {"token": token}}
    return fsspec.core.url_to_fs(name, **options)


class Listing(NamedTuple):
    """What stands for an address: itself, or the files that a pattern or a directory is of, sorted."""

    names: list[str]
    is_list: bool
    sizes: list[int | None]  # bytes; None where it is not told


def find(name: str, flag: str, token: str | None) -> Listing:
    """The files of an address: one, or of a pattern (*, ?, [, **) or a directory all that are not hidden."""
    if is_of_web(name):
        with HttpFile(name) as file:
            return Listing([name], False, [file.size])
    if not name.partition("://")[2].strip("/"):
        cli.fail(f"{flag} {name}: names no file")
    fs, path = file_system(name, flag, token)
    fs.invalidate_cache()  # of listings: another run in this program may have been before a change
    chain = "".join(name.partition("::")[1:])
    is_pattern = any(character in path for character in "*?[") and not fs.exists(path)
    if not is_pattern and (told := fs.info(path))["type"] != "directory":  # raises FileNotFoundError
        return Listing([name], False, [told.get("size")])
    found = fs.find(path, detail=True) if not is_pattern else fs.glob(path, detail=True)
    fixed = re.split(r"[^/]*[*?\[]", path)[0] if is_pattern else path  # what was named may be hidden
    sizes = {file: told.get("size") for file, told in sorted(found.items()) if told.get("type") == "file"}
    sizes = {file: size for file, size in sizes.items() if not is_hidden(file.removeprefix(fixed))}
    return Listing([f"{fs.unstrip_protocol(file)}{chain}" for file in sizes], True, list(sizes.values()))


def is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def stamp(name: str, flag: str, token: str | None) -> tuple[Any, int | None, bool]:
    """By what a changed file is known: what its file system tells of it; its bytes; and would a change show in that?"""
    if is_of_web(name):
        with HttpFile(name) as file:
            marks = [file.headers.get(header) for header in ("etag", "last-modified")]
            return (shown(name), file.size, marks), file.size, any(marks)
    fs, path = file_system(name, flag, token)
    told = fs.info(path)
    if "ETag" in told:  # of S3, where a listing tells other things beside it than the file itself
        return (name, told["size"], [told["ETag"]]), told["size"], True
    marks = sorted((key, str(value)) for key, value in told.items() if key not in ("name", "Key", "size"))
    return (name, told.get("size"), marks), told.get("size"), True


def open_file(name: str, token: str | None) -> BinaryIO:
    """An address opened for reading from its beginning; with peek()."""
    if is_of_web(name):
        return io.BufferedReader(HttpFile(name), BLOCK)
    fs, path = file_system(name, "", token)
    file = io.BufferedReader(fs.open(path, "rb"), BLOCK)
    file.file_system = fs  # an archive is closed with the last that knows its file system
    return file


BLOCK = 2**20


# ---- The web -------------------------------------------------------------------------------------------------------------


class HttpFile(io.RawIOBase):
    """A file of a web server, read as it comes.

    By httpx2, which huggingface_hub needs anyway; fsspec would need aiohttp. Between windows of a stream minutes may pass,
    and servers hang up: where the server sends parts of files, reading goes on where it stopped. There seek() works too.
    """

    WAITS = (0.5, 2.0, 8.0)  # seconds before it is tried again

    def __init__(self, url: str):
        self.url, self.position, self.left_over, self.response = url, 0, b"", None
        self.client = httpx2.Client(follow_redirects=True, timeout=60.0)
        try:
            self.ask()
        except BaseException:
            self.close()
            raise
        self.headers = self.response.headers
        length = self.headers.get("content-length", "")
        encoded = self.headers.get("content-encoding", "identity") != "identity"
        self.size = int(length) if length.isdecimal() and not encoded else None
        self.sends_parts = self.headers.get("accept-ranges") == "bytes" and self.size is not None

    def ask(self) -> None:
        """Ask for the file from `position` on. Raises OSErrors of the kind that local files have."""
        headers = {"Accept-Encoding": "identity"}
        if self.position:
            headers |= {"Range": f"bytes={self.position}-"}
            mark = self.headers.get("etag", "W/")
            headers |= {"If-Range": mark} if not mark.startswith("W/") else {}
        response = self.client.send(self.client.build_request("GET", self.url, headers=headers), stream=True)
        status = response.status_code
        if status == (206 if self.position else 200):
            is_compressed = urlsplit(self.url).path.lower().endswith((".gz", ".bz2", ".xz"))
            self.response, self.chunks = response, response.iter_raw() if is_compressed else response.iter_bytes()
            self.left_over = b""
            return
        response.close()
        kinds = {404: FileNotFoundError, 410: FileNotFoundError, 401: PermissionError, 403: PermissionError}
        if self.position and status in (200, 416):
            raise OSError("the file has changed while it was read")
        raise kinds.get(status, ConnectionError)(f"the server answered {status} {response.reason_phrase}")

    def readinto(self, buffer: Any) -> int:
        if not self.left_over:
            self.left_over = self.next_chunk()
        part = self.left_over[: len(buffer)]
        buffer[: len(part)] = part
        self.left_over = self.left_over[len(part) :]
        self.position += len(part)
        return len(part)

    def next_chunk(self) -> bytes:
        """The next bytes, none at the end; a connection that breaks is made anew if the server sends parts."""
        for wait in (*self.WAITS, None):
            try:
                if self.response is None:
                    if self.size is not None and self.position >= self.size:
                        return b""
                    self.ask()
                return next((chunk for chunk in self.chunks if chunk), b"")
            except (httpx2.TransportError, ConnectionError):
                if wait is None or not self.sends_parts:
                    raise
                self.drop()
                time.sleep(wait)
        raise AssertionError

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if not self.sends_parts:
            raise io.UnsupportedOperation("the server sends no parts of files")
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        if position != self.position:
            self.drop()
            self.position = position
        return position

    def drop(self) -> None:
        if self.response is not None:
            self.response.close()
        self.response, self.left_over = None, b""

    def tell(self) -> int:
        return self.position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.sends_parts

    def close(self) -> None:
        if not self.closed:
            self.drop()
            self.client.close()
        super().close()
