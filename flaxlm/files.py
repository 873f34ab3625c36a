# SPDX-License-Identifier: Apache-2.0
"""Files: text in them and what is prepared of it; writing others whole or not at all."""

import contextlib
import datetime
import errno
import itertools
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from datasets.iterable_dataset import ExamplesIterable

from flaxlm import addresses, cli, formats, inputs

logger = logging.getLogger(__name__)

# ---- Text ----------------------------------------------------------------------------------------------------------------


MOST_PROMPTS = 1024  # all are one batch
MOST_BYTES = 2**24


def read_prompts(path: str, flag: str) -> list[str]:
    """The lines of a txt file, in UTF-8, that are not blank."""
    if formats.suffixes(path) != ("txt", ""):
        cli.fail(f"{flag} {path}: must be a txt file with a prompt per line")
    (path, *others), *_ = inputs.find(path, flag)
    if others:
        cli.fail(f"{flag}: names {1 + len(others)} files, as {path}; name one of them")
    with cli.reading(f"{flag} {path}"), open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        cli.fail(f"{flag} {path}: cannot be read as text: it is not UTF-8; convert it, as `iconv -f ISO-8859-1 -t UTF-8` does")
    prompts = [line.strip("\r") for line in text.split("\n") if line.strip()]
    if not prompts:
        cli.fail(f"{flag} {path}: has blank lines only; write a prompt per line")
    if len(prompts) > MOST_PROMPTS or len(data) > MOST_BYTES:
        limit = f"{MOST_PROMPTS} lines" if len(prompts) > MOST_PROMPTS else f"{MOST_BYTES // 2**20} MiB"
        cli.fail(f"{flag} {path}: has more than {limit}; name a file with a few prompts")
    return prompts


class TextFiles(NamedTuple):
    """The files of one split, all of one format; what formats.read_tables takes."""

    paths: Sequence[str]
    flag: str  # what named them, for messages
    loader: str
    options: Mapping[str, Any]  # keep_linebreaks or sample_by for text, sep for csv; encoding if it is not UTF-8
    token: str | None = None  # for addresses of the Hub


def text_files(
    names: str | Sequence[str],
    flag: str,
    text_options: Mapping[str, Any] | None = None,
    encoding: str | None = None,
    token: str | None = None,
) -> TextFiles:
    """The files that a flag names, and the log says how many. `text_options` are for txt files only."""
    found = inputs.find(names, flag, token)
    if encoding:
        formats.check_encoding_name(encoding, found.paths)
    if len(found.paths) > 1 or found.num_ignored:
        ignored = f", and {found.num_ignored} of other formats, which are ignored" if found.num_ignored else ""
        logger.info("%s %s: %d file(s)%s", flag, inputs.shown(names), len(found.paths), ignored)
    if found.repeated:
        example = addresses.shown(found.repeated[0])
        logger.warning("%s: names %d file(s) twice, which are read once: %s", flag, len(found.repeated), example)
    suffix, loader = formats.suffixes(found.paths[0])[0], formats.loader_of(found.paths[0])
    options = {"text": text_options or {}, "csv": {"sep": "\t" if suffix == "tsv" else ","}}.get(loader, {})
    return TextFiles(found.paths, flag, loader, {**options, **with_encoding(encoding)}, token)


def with_encoding(encoding: str | None) -> dict[str, str]:
    return {"encoding": encoding} if encoding else {}


def load(
    names: str | Sequence[str],
    flag: str,
    cache_dir: str | None,
    text_options: Mapping[str, Any] | None = None,
    streaming: bool = False,
    encoding: str | None = None,
    token: str | None = None,
):
    """Read files: a Dataset, or with `streaming` an IterableDataset of the same rows. `flag` is what named them."""
    files = text_files(names, flag, text_options, encoding, token)
    return stream_rows(files) if streaming else load_rows(files, cache_dir)


def load_rows(files: TextFiles, cache_dir: str | None) -> datasets.Dataset:
    """All rows, converted to a file of the cache that is mapped into memory; again when one of the files has changed."""
    stamps, is_known = stamp(files)
    fingerprint = datasets.fingerprint.Hasher.hash((stamps, files.loader, sorted(files.options.items())))
    with using_cache(cache_dir) as directory:
        target = os.path.join(directory, f"text-{fingerprint}.arrow")
        if not (is_known and os.path.exists(target)):
            with replacing(target) as temporary:
                write_arrow(temporary, formats.read_tables(*files))
        return datasets.Dataset.from_file(target)


def stamp(files: TextFiles) -> tuple[list[Any], bool]:
    """By what files are known again as long as they have not changed; False if an address tells nothing of that."""
    stamps, is_known = [], True
    for path in files.paths:
        if addresses.is_address(path):
            with addresses.told_of(files.flag, path):
                told, _, tells_changes = addresses.stamp(path, files.flag, files.token)
            stamps.append(told)
            is_known &= tells_changes
        else:
            stamps.append((os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns))
    return stamps, is_known


def write_arrow(path: str, tables: Iterator[pa.Table]) -> None:
    first = next(tables)
    with open(path, "wb") as file, pa.ipc.new_stream(file, first.schema) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table)


def stream_rows(files: TextFiles) -> datasets.IterableDataset:
    """All rows, read when they are asked for; each file is a shard."""
    return datasets.IterableDataset(ExamplesIterable(read_examples, files._asdict() | {"paths": list(files.paths)}))


def read_examples(**files: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    return enumerate(row for table in formats.read_tables(**files) for row in table.to_pylist())


def first_rows(files: TextFiles, count: int) -> datasets.Dataset:
    """So many rows from the beginning, in memory."""
    tables, num_rows = [], 0
    for table in formats.read_tables(*files):
        tables.append(table)
        num_rows += len(table)
        if num_rows >= count:
            break
    return datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(tables).slice(0, count)))


# ---- The column with the text --------------------------------------------------------------------------------------------


TOKENS = "input_ids"  # the column of data that is tokenised already
DEPTHS = {1: "a list of token ids in each row", 2: "a list of sentences in each row, each a list of token ids"}


def find_token_column(dataset: datasets.Dataset, text_column_name: str | None, depths: Sequence[int]) -> str | None:
    """The column with token ids, unless another one is named or it is of another kind; `depths` are the lists it may hold."""
    if TOKENS not in dataset.features or text_column_name not in (None, TOKENS):
        return None
    depth, inner = 0, dataset.features[TOKENS]
    while isinstance(inner, datasets.List | datasets.LargeList):
        depth, inner = depth + 1, inner.feature
    texts = [name for name, feature in dataset.features.items() if kind_of(feature) == "text"]
    is_whole = str(getattr(inner, "dtype", "")).startswith(("int", "uint"))
    if depth == 0 or (not is_whole and texts and text_column_name is None):
        return None
    if not is_whole or depth not in depths:
        kind = f"{'lists of ' * depth}{getattr(inner, 'dtype', 'objects')}"
        wanted = " or ".join(DEPTHS[depth] for depth in depths)
        cli.fail(f"column {TOKENS} holds {kind}; wanted is {wanted}, or text in another column")
    if texts and text_column_name is None:
        cli.log_once("The data has text too, in column '%s': --text_column_name %s tokenises that instead.", texts[0], texts[0])
    return TOKENS


TEXT_TYPES = ("string", "large_string", "string_view")
NUM_ROWS_TO_LOOK_AT = 1000


def find_text_column(dataset: datasets.Dataset, text_column_name: str | None) -> str:
    """The column named, else "text", else the first one whose first rows hold words."""
    kinds = {name: kind_of(feature) for name, feature in dataset.features.items()}
    if text_column_name is not None:
        if text_column_name not in kinds:
            cli.fail(f"--text_column_name {text_column_name}: the data has no such text column, only {dataset.column_names}")
        if kinds[text_column_name] != "text":
            cli.fail(f"--text_column_name {text_column_name}: holds {kinds[text_column_name]}; {as_text(kinds)}")
        return text_column_name
    if kinds.get("text") == "text":
        return "text"
    strings = [name for name, kind in kinds.items() if kind == "text"]
    head = dataset.select(range(min(len(dataset), NUM_ROWS_TO_LOOK_AT))).select_columns(strings)
    for name in strings:
        kinds[name] = kind_of_strings(head[name])
    choice = [name for name in strings if kinds[name] == "text"] or [name for name in strings if kinds[name] == "nothing"]
    if not choice:
        columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        cli.fail(f"the data has no text column, only {columns}: {as_text(kinds)}; --text_column_name names one of strings")
    if len(choice) > 1:
        cli.log_once(
            "Several columns hold text (%s): '%s' is used, the first; --text_column_name names another.",
            ", ".join(choice), choice[0],
        )  # fmt: skip
    return choice[0]


def kind_of(feature: Any) -> str:
    """What a column holds, in words; "text" if it is of strings."""
    dtype = str(getattr(feature, "dtype", ""))
    if dtype in (*TEXT_TYPES, "null"):
        return "text"
    if isinstance(feature, datasets.Value):
        is_number = dtype.startswith(("int", "uint", "float", "decimal"))
        is_date = dtype.startswith(("timestamp", "date", "time", "duration"))
        return "numbers" if is_number else "dates" if is_date else dtype
    if isinstance(feature, datasets.Json):
        return "values of several kinds"
    return "objects" if isinstance(feature, dict) else "lists"


def kind_of_strings(texts: Sequence[str | None]) -> str:
    """The same of strings, which may all be numbers or dates: "text" if one is neither."""
    kinds = [kind_of_string(text) for text in texts if text and not text.isspace()]
    return "text" if "text" in kinds else kinds[0] if kinds else "nothing"


def kind_of_string(text: str) -> str:
    for kind, parse in (("numbers", float), ("dates", datetime.datetime.fromisoformat)):
        with contextlib.suppress(ValueError):
            parse(text.strip())
            return kind
    return "text" if any(map(str.isalpha, text)) and text.strip().lower() not in ("true", "false") else "numbers"


def as_text(kinds: Mapping[str, str]) -> str:
    """What to do about data without a column of text."""
    if {"objects", "lists"} & set(kinds.values()):
        return "write one row per text, in JSON an object per line that holds the text as a string"
    return "write the texts as strings"


# ---- The cache -----------------------------------------------------------------------------------------------------------


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT}


@contextlib.contextmanager
def using_cache(cache_dir: str | None) -> Iterator[str]:
    """The directory for what is prepared of text. That it is full or may not be written is told in a line."""
    root = os.path.abspath(cache_dir or datasets.config.HF_DATASETS_CACHE)
    directory = os.path.join(root, "flaxlm")
    try:
        os.makedirs(directory, exist_ok=True)
        yield directory
    except cli.Ending:
        raise
    except Exception as error:
        cause = next((cause for cause in cli.causes(error) if is_about_writing(cause, root)), None)
        if cause is None:
            raise
        place = f"{root}, where prepared text is kept, cannot be written to: {os.strerror(cause.errno)}"
        if cause.errno in FULL:
            raise cli.Accident(f"{place}; make room, or name another directory with --cache_dir") from error
        cli.fail(f"{place}; name another directory with --cache_dir")


def is_about_writing(error: BaseException, directory: str) -> bool:
    """Is it because the disk is full, or because a directory, its parents or what is in it may not be written?"""
    if not isinstance(error, OSError) or error.errno not in FULL | FORBIDDEN:
        return False
    path = os.path.abspath(os.fsdecode(error.filename or "/"))
    return error.errno in FULL or os.path.commonpath([path, directory]) in (path, directory)


# ---- Writing -------------------------------------------------------------------------------------------------------------


def write_json(path: str, values: Mapping[str, Any]) -> None:
    """Write standard JSON, whole or not at all: what is not a finite number becomes null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    write_text(path, json.dumps(finite, indent=4, sort_keys=True, allow_nan=False) + "\n")


def write_text(path: str, text: str) -> None:
    """Write a file, whole or not at all."""
    with replacing(path) as temporary:
        Path(temporary).write_text(text, "utf-8")


@contextlib.contextmanager
def replacing_directory(path: str) -> Iterator[str]:
    """A directory to fill, which gets its name if all goes well, and else goes."""
    temporary = tempfile.mkdtemp(dir=os.path.dirname(path) or ".", prefix=".saving-")
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~get_umask())
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def get_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """A file to write, under a name that nobody can foresee; it takes the place of `path` if all goes well, else it goes."""
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=".saving-")
    os.close(descriptor)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~get_umask())  # mkstemp keeps others from reading it
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
