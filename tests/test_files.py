# SPDX-License-Identifier: Apache-2.0
"""Text in files of every format, read as it is written; which column it is in; files that are written whole."""

import gzip
import itertools
import json
import random

import datasets
import pandas
import pyarrow as pa
import pytest

from flaxlm import cli, files, formats


def rows_in(path, loader: str, **options) -> list[dict]:
    return [row for table in formats.read_tables([str(path)], "--train_file", loader, options) for row in table.to_pylist()]


@pytest.mark.parametrize("options", [{}, {"keep_linebreaks": True}, {"sample_by": "paragraph"}], ids=str)
def test_txt_is_read_as_datasets_reads_it(options, monkeypatch, tmp_path):
    """Line breaks of all kinds, and characters that Python takes for such, also where a chunk ends."""
    monkeypatch.setattr(formats, "CHARACTERS_PER_TABLE", 17)
    chance = random.Random(0)
    parts = ["a", "b c", "\n", "\n\n", "\r\n", "\r", "  ", "\t", "é", "\u2028", "\x0c", "\x85", "\n\n\n", "x" * 30, "z\ufeff"]
    for number in range(25):
        text = "q" + "".join(chance.choice(parts) for _ in range(chance.randint(1, 60)))
        path = tmp_path / f"{number}.txt"
        path.write_bytes(text.encode())
        (tmp_path / f"{number}.txt.gz").write_bytes(gzip.compress(text.encode()))
        expected = list(datasets.load_dataset("text", data_files=str(path), split="train", cache_dir=tmp_path, **options))
        assert rows_in(path, "text", **options) == expected, text
        assert rows_in(f"{path}.gz", "text", **options) == expected, text


def test_csv_is_read_as_pandas_reads_text(monkeypatch, tmp_path):
    """Quotes, line breaks within them, missing fields, blank lines, several kinds of line breaks."""
    monkeypatch.setattr(formats, "ROWS_PER_TABLE", 3)
    chance = random.Random(0)
    fields = [
        "a",
        "b c",
        '"q, r"',
        '"x ""y"" z"',
        '"line\nbreak"',
        "5",
        "007",
        "NA",
        "",
        "é",
        'mid"quote',
        "' s",
        '"a"b',
        " sp ",
    ]
    for number in range(60):
        num_columns = chance.randint(1, 3)
        lines = [",".join(["text", "id", "id"][:num_columns])]
        for _ in range(chance.randint(1, 12)):
            some = chance.choice([num_columns] * 9 + [max(1, num_columns - 1)])
            lines.append(",".join(chance.choice(fields) for _ in range(some)))
        lines.insert(chance.randint(1, len(lines)), "")
        path = tmp_path / f"{number}.csv"
        path.write_bytes(("\n".join(lines) + "\n" * chance.randint(0, 1)).replace("\n", chance.choice(["\n", "\r\n"])).encode())
        expected = pandas.read_csv(path, dtype=str, na_filter=False).to_dict("records")
        assert rows_in(path, "csv", sep=",") == expected, lines


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('text\nfine\n"never closed, and\nall that follows\n', "row 2 opens a double quote that is never closed"),
        ('text\nfine\n"closed" \n"open', "row 3 opens a double quote that is never closed"),
        (
            "text\nfine\ntoo, many\n",
            r"row 2 \(line 3\) has 2 fields, more than the header, 1: put texts with ',' in them in double",
        ),
        ('text\n"over\ntwo lines"\ntoo, many\n', r"row 2 \(line 4\) has 2 fields"),
    ],
)
def test_csv_that_is_damaged(content, expected, refuses, tmp_path):
    (tmp_path / "a.csv").write_text(content)
    with refuses(f"--train_file {tmp_path / 'a.csv'}: is empty or cannot be read as csv: {expected}"):
        files.load(str(tmp_path / "a.csv"), "--train_file", str(tmp_path))
    with refuses(expected):
        list(files.load(str(tmp_path / "a.csv"), "--train_file", None, streaming=True))


def test_a_quote_within_a_text_is_no_damage(tmp_path):
    """5" pipes, also in the last row, do not open a quotation."""
    (tmp_path / "a.csv").write_text('text\n5" pipes\nand "said" so\nlast 6"')
    assert [row["text"] for row in rows_in(tmp_path / "a.csv", "csv", sep=",")] == ['5" pipes', 'and "said" so', 'last 6"']


@pytest.mark.parametrize("name", ["nothing.txt.gz", "blank.csv", "header.csv", "list.json", "blank.jsonl", "none.parquet"])
def test_files_without_rows(name, error_of, run_nothing, tmp_path):
    """Empty behind their compression or their header: told as such, prepared and streamed."""
    contents = {"nothing.txt.gz": gzip.compress(b""), "blank.csv": b"\n\n", "header.csv": b"id,text\n", "list.json": b"[]"}
    path = tmp_path / name
    path.write_bytes(contents.get(name, b"\n \n"))
    if name == "none.parquet":
        datasets.Dataset(pa.table({"text": pa.array([], pa.string())})).to_parquet(path)
    for more in ([], ["--streaming"]):
        line = error_of(run_nothing, "--validation_file", path, *more)
        assert "empty" in line
        assert str(path) in line


@pytest.fixture
def run_nothing(roberta_dir, tmp_path):
    """An evaluation, which will not come so far."""
    from tests.conftest import run

    return lambda *flags: run(tmp_path / "out", roberta_dir, "--do_eval", *flags)


# ---- The column with the text --------------------------------------------------------------------------------------------


def column_of(name=None, **columns) -> str:
    return files.find_text_column(datasets.Dataset.from_dict(columns), name)


def test_which_column_is_the_text(refuses):
    words = ["some words", "and more"]
    assert column_of(a=[1, 2], b=words) == "b"
    assert column_of(a=words, text=words) == "text"
    assert column_of("a", a=words, text=words) == "a"
    assert (
        column_of(a=["1", "2.5"], b=["2020-01-01", "2020-01-01T10:00:00Z"], c=["true", "False"], d=["+", "?"], e=words) == "e"
    )
    assert column_of(a=[None, ""], b=[None, "words"]) == "b"
    assert column_of(a=[None, None], b=[1, 2]) == "a"  # may hold text later on
    assert column_of(a=["模型", "词语"]) == "a"
    assert column_of(text=["1", "2"]) == "text"
    with refuses(
        "the data has no text column, only a .numbers., b .dates., c .numbers.: write the texts as strings; --text_col"
    ):
        column_of(a=["1", "2"], b=["2020-01-01", "2020-01-02"], c=[1, 2])
    with refuses("only a .lists.: write one row per text, in JSON an object per line that holds the text as a string"):
        column_of(a=[["words"], ["more"]])
    with refuses("--text_column_name a: holds numbers; write the texts as strings"):
        column_of("a", a=[1, 2], b=words)
    with refuses("--text_column_name c: the data has no such text column, only .'a', 'b'."):
        column_of("c", a=[1, 2], b=words)


def test_a_guess_between_columns_is_told_once(monkeypatch):
    lines: list[str] = []
    cli.log_once.cache_clear()
    monkeypatch.setattr(cli.logger, "warning", lambda message, *args: lines.append(message % args))
    for _ in range(2):
        assert column_of(title=["A title"], n=["5"], body=["Some words"]) == "title"
    assert lines == ["Several columns hold text (title, body): 'title' is used, the first; --text_column_name names another."]


# ---- Writing -------------------------------------------------------------------------------------------------------------


def test_write_json_is_standard_json(tmp_path):
    """No NaN, no Infinity (defect 35)."""
    files.write_json(str(tmp_path / "a.json"), {"a": float("nan"), "b": float("inf"), "c": 1.5})
    values = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert values == {"a": None, "b": None, "c": 1.5}


def test_a_cause_in_a_circle_is_followed_once():
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert list(itertools.islice(cli.causes(first), 5)) == [first, second]
