# SPDX-License-Identifier: Apache-2.0
"""Formats of text: txt, csv, json and parquet files, compressed or not, read table by table."""

import bz2
import codecs
import contextlib
import csv
import functools
import glob
import gzip
import io
import itertools
import logging
import lzma
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.packaged_modules.json.json import Json

from flaxlm import addresses, cli

# By suffix: the format, as `datasets` calls it. A compression is told by a second suffix.
DATA_LOADERS = {"txt": "text", "csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet", "tsv": "csv"}
COMPRESSIONS: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def suffixes(path: str) -> tuple[str, str]:
    """What tells the format of a file and what tells its compression, in lower case; "" where there is none."""
    name = os.path.basename(addresses.path_of(path)).lower()
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    return name.removesuffix(compression).rpartition(".")[2], compression


def loader_of(path: str) -> str | None:
    """The format of a file, by its suffix; None if it is none of ours."""
    return DATA_LOADERS.get(suffixes(path)[0])


ROWS_PER_TABLE = 1000
CHARACTERS_PER_TABLE = 2**20


def read_tables(
    paths: Sequence[str], flag: str, loader: str, options: Mapping[str, Any], token: str | None = None
) -> Iterator[pa.Table]:
    """The rows of files of one format, all in the columns of the first.

    Args:
        paths: local files, or addresses.
        flag: what named them: a file that cannot be read ends the program with a line that names both.
        loader: the format.
        options: of the function that reads it: `encoding`, unless the text is UTF-8, and what the format needs.
        token: for addresses of the Hub.
    """
    schema = None
    for path in paths:
        what = f"{flag} {addresses.shown(path)}: is empty or cannot be read as {loader}"
        with cli.reading(what):
            try:
                for table in READERS[loader](path, token=token, **options):
                    plain = as_plain_types(table)
                    schema = schema or plain.schema
                    yield plain if plain.schema.equals(schema) else fit_columns(plain, schema)
            except (UnicodeError, pa.ArrowInvalid) as error:
                if options.get("encoding") and isinstance(error, UnicodeError):
                    cli.fail(f"{what}: its text is not {options['encoding']}; name another --encoding")
                if isinstance(error, UnicodeError) or "UTF8" in str(error):
                    cli.fail(f"{what}: {not_utf8('ISO-8859-1')}")
                raise
            except UnreadableError as error:
                cli.fail(f"{what}: {error}")
            except Exception as error:
                if addresses.is_address(path) and addresses.is_about_server(error):
                    raise addresses.explain(f"{flag} {addresses.shown(path)}", error) from error
                raise


def not_utf8(encoding: str) -> str:
    """What is wrong with text that may be of that encoding, and what to do."""
    return (
        f"its text is not UTF-8; name its encoding, for example with --encoding {encoding}, or convert it, for example with"
        f" `iconv -f {encoding} -t UTF-8`"
    )


class UnreadableError(Exception):
    """What a person would have to change in a file."""


def check_encoding_name(encoding: str, paths: Sequence[str]) -> None:
    """Refuse an --encoding that Python has not, or not for text, and files that have one of their own."""
    try:
        with io.TextIOWrapper(io.BytesIO(), encoding) as file:
            file.read()
    except Exception as error:  # LookupError, or whatever a codec of another kind raises
        cli.fail(f"--encoding {encoding}: is no encoding of text that Python knows: {cli.first_line(error)}")
    for path in paths:
        if loader_of(path) == "parquet":
            cli.fail(f"--encoding {encoding}: not for {addresses.shown(path)}; text in parquet files is always UTF-8")


def open_bytes(path: str, token: str | None = None) -> Any:
    """A file opened for reading, decompressed as its suffix says."""
    decompress = COMPRESSIONS.get(suffixes(path)[1])
    if not addresses.is_address(path):
        return (decompress or open)(path, "rb")
    file = addresses.open_file(path, token)
    return decompress(file, "rb") if decompress else file


def open_text(path: str, token: str | None = None, encoding: str | None = None, newline: str | None = None) -> io.TextIOWrapper:
    """The same as text, without a byte-order mark; `newline` as for open()."""
    file = open_bytes(path, token)
    if encoding is None:
        check_encoding(file)
    elif codecs.lookup(encoding).name == "utf-8":
        encoding = None
    return io.TextIOWrapper(file, encoding or "utf-8-sig", newline=newline)


def check_encoding(file: Any) -> None:
    """Raise UnreadableError if a file begins as other encodings than UTF-8 do; nothing of it is used up."""
    head = file.peek(4096)[:4096]
    for mark, encoding in ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16")):
        if head.startswith(mark):
            raise UnreadableError(not_utf8(encoding))
    if head.count(0) > len(head) / 4:
        raise UnreadableError(not_utf8(f"UTF-16{'LE' if head[1:2] == bytes(1) else 'BE'}"))


def read_text(
    path: str,
    token: str | None = None,
    encoding: str | None = None,
    keep_linebreaks: bool = False,
    sample_by: str = "line",
) -> Iterator[pa.Table]:
    """A row per line, with or without its line break; or per "paragraph": what blank lines divide."""
    yield text_table([])
    rest = ""
    with open_text(path, token, encoding) as file:
        while chunk := file.read(CHARACTERS_PER_TABLE):
            chunk += file.readline()
            if sample_by == "paragraph":
                *texts, rest = (rest + chunk).split("\n\n")
                texts = [text for text in texts if text]
            else:
                texts = io.StringIO(chunk).readlines()  # divides at \n only, unlike str.splitlines
                texts = texts if keep_linebreaks else [text.rstrip("\n") for text in texts]
            yield text_table(texts)
    if rest:
        yield text_table([rest])


def text_table(texts: Sequence[str]) -> pa.Table:
    return pa.table({"text": pa.array(texts, pa.string())})


def read_csv(path: str, sep: str, token: str | None = None, encoding: str | None = None) -> Iterator[pa.Table]:
    """A row per record; all columns are text, as it is written: NA, 007 and 1.0 too. Surplus fields are an error."""
    csv.field_size_limit(sys.maxsize)
    with open_text(path, token, encoding, newline="") as file:
        lines: list[str] = []  # of the record that is being read
        reader = csv.reader(noting(file, lines), delimiter=sep)
        names = distinct_names(next((row for row in reader if is_record(row)), []))
        records, count, last = [], 0, []
        for row in reader:
            last = lines.copy()
            lines.clear()
            if not is_record(row, len(names)):
                continue
            count += 1
            if len(row) > len(names):
                raise UnreadableError(
                    f"row {count} (line {reader.line_num}) has {len(row)} fields, more than the header, {len(names)}: put texts"
                    f" with {sep!r} in them in double quotes"
                )
            records.append(row + [""] * (len(names) - len(row)))
            if len(records) == ROWS_PER_TABLE:
                yield csv_table(names, records)
                records = []
        check_quotes(last, sep, count)
        yield csv_table(names, records)


def noting(lines: Iterable[str], noted: list[str]) -> Iterator[str]:
    for line in lines:
        noted.append(line)
        yield line


def is_record(row: Sequence[str], num_fields: int = 2) -> bool:
    """Blank lines are none; where there is one column only, white space is a text."""
    return len(row) > 1 or (len(row) == 1 and (num_fields == 1 or bool(row[0].strip())))


def distinct_names(header: Sequence[str]) -> list[str]:
    """Names of columns, as pandas has them: those without get one, equal ones a number."""
    names: list[str] = []
    for i, given in enumerate(header):
        name = given or f"Unnamed: {i}"
        choices = itertools.chain([name], (f"{name}.{number}" for number in itertools.count(1)))
        names.append(next(choice for choice in choices if choice not in names))
    return names


def check_quotes(lines: Sequence[str], sep: str, count: int) -> None:
    """Raise UnreadableError if the last record begins a quotation that does not end: it has swallowed all records behind it."""
    try:
        list(csv.reader(lines, delimiter=sep, strict=True))
    except csv.Error as error:
        if "unexpected end" in str(error):
            raise UnreadableError(f"row {count} opens a double quote that is never closed") from error


def csv_table(names: Sequence[str], records: Sequence[Sequence[str]]) -> pa.Table:
    columns = zip(*records, strict=True) if records else [()] * len(names)
    return pa.table([pa.array(column, pa.string()) for column in columns], list(names))


def read_json(path: str, token: str | None = None, encoding: str | None = None) -> Iterator[pa.Table]:
    """Rows of JSON lines, or of one JSON list, as `datasets` understands them."""
    is_utf8 = encoding is None or codecs.lookup(encoding).name == "utf-8"
    if not is_utf8 or addresses.is_address(path):
        yield from read_json_blocks(path, token, encoding)
        return
    with open_bytes(path) as file:
        check_encoding(file)
    yield from read_json_file(path)


def read_json_blocks(path: str, token: str | None, encoding: str | None) -> Iterator[pa.Table]:
    """The same by way of a temporary file, in UTF-8: so many lines at a time as `datasets` reads, or all of a list."""
    features = None
    with open_text(path, token, encoding) as file, tempfile.TemporaryDirectory() as directory:
        block = os.path.join(directory, "block.json")
        while text := file.read(JSON_BLOCK):
            with open(block, "w", encoding="utf-8", errors="surrogatepass", newline="") as copy:
                copy.write(text + file.readline())
                if text.lstrip().startswith("[") and features is None:
                    shutil.copyfileobj(file, copy)
            tables = read_json_file(block, features)
            first = next(tables)
            features = features or datasets.Features.from_arrow_schema(first.schema)
            yield first
            yield from tables


JSON_BLOCK = 10 * 2**20  # characters


def read_json_file(path: str, features: datasets.Features | None = None) -> Iterator[pa.Table]:
    """The rows of a local file in UTF-8; with `features` in these columns."""
    logging.getLogger("datasets.packaged_modules.json.json").setLevel(logging.CRITICAL)  # told once, by read_tables
    with tempfile.TemporaryDirectory() as directory:
        # Under a plain name: `datasets` takes some characters of a path for patterns or for a chain of archives.
        alias = os.path.join(directory, f"rows.json{suffixes(path)[1]}")
        os.symlink(os.path.abspath(path), alias)
        builder = Json(
            cache_dir=directory, data_files={"train": [glob.escape(alias)]}, parse_agent_traces=False, features=features
        )
        rows = builder.as_streaming_dataset(split="train")
        is_empty = True
        for table in rows.with_format("arrow").iter(ROWS_PER_TABLE):
            is_empty = False
            yield table
        if is_empty:
            raise UnreadableError("there are no rows in it")


def read_parquet(path: str, token: str | None = None) -> Iterator[pa.Table]:
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_bytes(path, token))
        if addresses.is_address(path) and (suffixes(path)[1] or not file.seekable()):  # its end is read first
            local = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, local)
            file = local
        parquet = pq.ParquetFile(file)
        yield parquet.schema_arrow.empty_table()
        for batch in parquet.iter_batches(ROWS_PER_TABLE):
            yield pa.Table.from_batches([batch])


READERS = {"text": read_text, "csv": read_csv, "json": read_json, "parquet": read_parquet}


def as_plain_types(table: pa.Table) -> pa.Table:
    """The same rows in types that `datasets` has; columns of other types are left out. Raises if text is not UTF-8."""
    table.validate(full=True)
    types = {field.name: plain_type(field.type) for field in table.schema}
    fields = [pa.field(name, kind) for name, kind in types.items() if kind is not None]
    schema = pa.schema(fields, table.schema.metadata)
    return table if table.schema.equals(schema) else table.select(schema.names).cast(schema)


@functools.cache
def plain_type(kind: pa.DataType) -> pa.DataType | None:
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_null(kind):
        return pa.string()
    try:
        datasets.Features.from_arrow_schema(pa.schema({"column": kind}))
    except Exception:  # whatever it raises for what it does not know
        return None
    return kind


def fit_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows of a later file, in the columns of the first: those it lacks are null. Raises UnreadableError if it has others."""
    surplus = [name for name in table.column_names if name not in schema.names]
    if surplus:
        raise UnreadableError(f"it has columns that the files before it do not have: {', '.join(surplus)}")
    columns = [
        table.column(field.name).cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)
