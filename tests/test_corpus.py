# SPDX-License-Identifier: Apache-2.0
"""The rows of a run, from the flags on: the same text whatever file, directory or dataset it is in, prepared or streamed."""

import functools
import gzip
import itertools
import json
import logging
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoConfig, AutoTokenizer

import run_clm_flax
import run_mlm_flax
import run_pretraining_flax
from flaxlm import cli, command_line, corpus, formats, streams

BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streaming"])
TEXTS = [f"This is text number {number}, of some words." for number in range(30)]


@pytest.fixture
def prepare(roberta_dir, tmp_path):
    """A corpus as a run with these flags gets it."""

    def call(*flags, module=run_mlm_flax, model_dir=roberta_dir, streaming=False) -> corpus.Corpus:
        common = ["--config_name", model_dir, "--tokenizer_name", model_dir, "--output_dir", tmp_path / "out"]
        common += ["--cache_dir", tmp_path / "cache", *["--streaming", "--max_steps", 2] * streaming]
        argv = [str(flag) for flag in (*common, *flags)]
        args = command_line.parse(argv, module.DataTrainingArguments, module.MODELS, None)
        tokenizer, config = AutoTokenizer.from_pretrained(model_dir), AutoConfig.from_pretrained(model_dir)
        collator = module.Collator(tokenizer, config, args.data, 64)
        tokenize_fn = functools.partial(module.tokenize_texts, tokenizer=tokenizer, **collator.tokenize_options)
        return corpus.prepare(args, tokenize_fn, collator)

    return call


@pytest.fixture
def decode(roberta_dir):
    """Rows of tokens back to text; of a stream those of its first epoch."""
    tokenizer = AutoTokenizer.from_pretrained(roberta_dir)

    def call(rows) -> list[str]:
        if isinstance(rows, streams.TextStream):
            windows = itertools.takewhile(lambda window: window[1]["epoch"] == 0, rows.windows(None))
            rows = {"input_ids": np.concatenate([part["input_ids"] for part, _ in windows])}
        return [tokenizer.decode(row, skip_special_tokens=True) for row in rows["input_ids"]]

    return call


@pytest.fixture
def evaluated(prepare, decode):
    """The texts that --do_eval alone finds with these flags, one a row."""
    return lambda *flags, **options: decode(prepare(*flags, "--do_eval", "--line_by_line", **options).validation)


@pytest.fixture
def log(monkeypatch):
    """Lines of the log, as they come."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    cli.log_once.cache_clear()
    monkeypatch.setattr(cli.logger, "handlers", [handler])
    monkeypatch.setattr(cli.logger, "level", logging.INFO)
    return lines


def write(path, text: str):
    """A text file, compressed if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix.lower() == ".gz" else text.encode())
    return path


# ---- Files ---------------------------------------------------------------------------------------------------------------

SURPLUS = {
    "every row": (
        "a.csv",
        "text\n" + "".join(f"Hello number {n}, how are you today\n" for n in range(9)),
        "row 1 .line 2. has 2",
    ),
    "one row": ("a.csv", "text\nHello\nHello, you\nHello\n", "row 2 .line 3. has 2 fields, more than the header, 1"),
    "after a quoted one": ("a.csv", 'id,text\n1,"a,\nb"\n2,a,b,c\n', "row 2 .line 4. has 4 fields, more than the header, 2"),
    "first columns": ("a.csv", "id,text\n1,Hello, you\n2,Hello, you, too\n", "row 1 .line 2. has 3"),
    "late": ("a.csv", "text\n" + "Hello\n" * 2500 + "Hello, you\n", "row 2501 "),
    "compressed": ("a.csv.gz", "text\nHello, you\n", "row 1 "),
    "tabs": ("a.tsv", "id\ttext\n1\tHello\n2\tHello\tyou\n", "row 2 "),
    "upper case": ("A.CSV", "text\nHello, you\n", "row 1 "),
}


@BOTH
@pytest.mark.parametrize("given_by", ["file", "directory"])
@pytest.mark.parametrize("case", SURPLUS)
def test_surplus_fields_are_refused(case, given_by, streaming, prepare, refuses, tmp_path):
    """Texts with commas that nobody quoted: of none of them only the end is trained on."""
    name, content, expected = SURPLUS[case]
    path = write(tmp_path / "data" / name, content)
    data = ["--validation_file", path] if given_by == "file" else ["--dataset_name", path.parent, "--eval_split_name", "train"]
    with refuses(f"{path}: .*{expected}"):
        prepare(*data, "--do_eval", streaming=streaming)


@BOTH
@pytest.mark.parametrize("given_by", ["file", "directory"])
def test_csv_holds_text(given_by, streaming, evaluated, tmp_path):
    """NA, null, numbers with zeros in front: text as it is written. Fields that are missing or empty are empty texts."""
    texts = ["NA", "null", "None", "nan", "N/A", "007", "1.0", "True", "#N/A", "a, b", 'say "x"', "two\nlines", " spaces "]
    records = [text if text.isalnum() else '"' + text.replace('"', '""') + '"' for text in texts]
    content = "id,text\n" + "".join(f"{n},{record}\n" for n, record in enumerate(records)) + "98,\n99\n\n"
    path = write(tmp_path / "data" / "a.csv", content)
    data = ["--validation_file", path] if given_by == "file" else ["--dataset_name", path.parent, "--eval_split_name", "train"]
    assert evaluated(*data, streaming=streaming) == texts


@BOTH
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.json", "list.json", "a.txt.gz", "a.csv.gz", "a.jsonl.gz"])
def test_byte_order_mark_is_no_text(name, streaming, evaluated, tmp_path):
    contents = {
        "txt": "".join(f"{text}\n" for text in TEXTS),
        "csv": "text\n" + "".join(f'"{text}"\n' for text in TEXTS),
        "jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS),
        "json": json.dumps(TEXTS if name == "list.json" else [{"text": text} for text in TEXTS]),
    }
    for directory in ("file", "directory"):
        for number in range(2):  # the second file of a directory has a mark of its own
            path = write(tmp_path / directory / f"{number}{name}", "\ufeff" + contents[name.removesuffix(".gz").split(".")[1]])
    assert evaluated("--validation_file", tmp_path / "file" / f"0{name}", streaming=streaming) == TEXTS
    data = ["--dataset_name", path.parent, "--eval_split_name", "train"]
    assert evaluated(*data, streaming=streaming) == TEXTS * 2


@BOTH
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.txt.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_other_encodings_are_refused(encoding, name, streaming, prepare, refuses, tmp_path):
    """With what to do; not as characters that nobody wrote."""
    lines = [f"Tekst nummer {n}: blåbærsyltetøy på brødskive" for n in range(3)]
    content = "text\n" + "\n".join(lines)
    content = "\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in lines) if "json" in name else content
    raw = content.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    with refuses(f"--validation_file {tmp_path / name}: .*not UTF-8; name its encoding, .*--encoding .*`iconv -f "):
        prepare("--validation_file", tmp_path / name, "--do_eval", streaming=streaming)


@BOTH
@pytest.mark.parametrize("given_by", ["file", "directory"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl", "a.json", "a.txt.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1", "UTF-8", "utf-8-sig", "shift_jis", "cp1252"])
def test_encodings(encoding, name, given_by, streaming, evaluated, tmp_path):
    """Text as it was written, in files of every format."""
    lines = [f"Text {n}: " + ("模型" if encoding == "shift_jis" else "blåbær, på brødskive") for n in range(20)]
    lines = [line.replace("模型", "日本語") for line in lines]
    kind = name.removesuffix(".gz").partition(".")[2]
    rows = [{"text": line} for line in lines]
    content = {
        "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "json": json.dumps(rows, ensure_ascii=False),
        "txt": "".join(f"{line}\n" for line in lines),
    }.get(kind, "text\n" + "".join(f'"{line}"\n' for line in lines))
    raw = content.encode(encoding)
    path = tmp_path / "data" / name
    path.parent.mkdir()
    path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    data = ["--validation_file", path] if given_by == "file" else ["--dataset_name", path.parent, "--eval_split_name", "train"]
    assert evaluated(*data, "--encoding", encoding, streaming=streaming) == lines


def test_an_encoding_is_part_of_what_the_cache_knows(evaluated, tmp_path):
    (tmp_path / "a.txt").write_bytes("blåbær\n".encode("latin-1"))
    assert evaluated("--validation_file", tmp_path / "a.txt", "--encoding", "latin-1") == ["blåbær"]
    assert evaluated("--validation_file", tmp_path / "a.txt", "--encoding", "cp1251") == ["blеbжr"]


def test_long_json_in_another_encoding(evaluated, monkeypatch, tmp_path):
    """Read a block at a time, in the columns of the first: keys that come later, or in another order, change nothing."""
    monkeypatch.setattr(formats, "JSON_BLOCK", 1000)
    rows = [{"text": f"Text {n} på brødskive", "n": n} | ({"m": {"a": n}} if n % 3 else {}) for n in range(200)]
    lines = [json.dumps(dict(sorted(row.items(), reverse=n % 2)), ensure_ascii=False) for n, row in enumerate(rows)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-16")
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-16")
    for name in ("a.jsonl", "a.json"):
        assert evaluated("--validation_file", tmp_path / name, "--encoding", "utf-16") == [row["text"] for row in rows]


@BOTH
@pytest.mark.parametrize(
    ("encoding", "name", "message"),
    [
        ("rot13", "a.txt", "^--encoding rot13: is no encoding of text that Python knows: "),
        ("base64", "a.txt", "^--encoding base64: is no encoding of text that Python knows: "),
        ("latin-99", "a.txt", "^--encoding latin-99: is no encoding of text that Python knows: unknown encoding"),
        ("undefined", "a.txt", "^--encoding undefined: is no encoding of text"),
        ("utf-16", "a.parquet", "^--encoding utf-16: not for .*a.parquet; text in parquet files is always UTF-8"),
        ("ascii", "a.txt", "--validation_file .*a.txt: .*: its text is not ascii; name another --encoding"),
        ("utf-16", "a.txt", "--validation_file .*a.txt: .*: its text is not utf-16; name another --encoding"),
        ("ascii", "a.jsonl", "--validation_file .*a.jsonl: .*: its text is not ascii; name another --encoding"),
    ],
)
def test_encodings_that_are_refused(encoding, name, message, streaming, prepare, refuses, tmp_path):
    (tmp_path / name).write_text(json.dumps({"text": "blåbær"}, ensure_ascii=False) + "\n", "utf-8")
    with refuses(message):
        prepare("--validation_file", tmp_path / name, "--do_eval", "--encoding", encoding, streaming=streaming)


def test_an_encoding_is_for_files(prepare, refuses, tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "parquet" / "train.parquet")
    for name, message in {"saved": "not for --dataset_name .*saved", "parquet": "not for .*train.parquet; text in"}.items():
        with refuses(f"^--encoding latin-1: {message}"):
            prepare("--dataset_name", tmp_path / name, "--encoding", "latin-1")


ODD_NAMES = ["a::b.txt", "CORPUS.TXT", "Corpus.Csv.GZ", "a b.txt", "a[1].jsonl", "a*?.txt", "50%.txt", "a#b.csv", "båt.txt",
    "-a.txt", "~a.txt", "{a}.txt", "x::y.JSONL.gz", "a$b.parquet", "C::D.PARQUET", "http::x.json"]  # fmt: skip


@BOTH
@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("place", [".", "an [odd] ::place"])
def test_odd_names(place, name, streaming, evaluated, monkeypatch, tmp_path):
    """A file is found whatever its name is, alone and in a directory."""
    suffix = name.lower().removesuffix(".gz").rpartition(".")[2]
    path = tmp_path / place / name
    if suffix == "parquet":
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": TEXTS}), path.open("wb"))
    else:
        lines = [f'"{text}"' if suffix == "csv" else json.dumps({"text": text}) if "json" in suffix else text for text in TEXTS]
        write(path, "\n".join(["text"] * (suffix == "csv") + lines) + "\n")
    assert evaluated("--validation_file", path, streaming=streaming) == TEXTS
    monkeypatch.chdir(tmp_path)
    assert evaluated("--validation_file", f"./{place}/{name}", streaming=streaming) == TEXTS
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert evaluated("--dataset_name", path.parent, "--eval_split_name", "train", streaming=streaming) == TEXTS


@BOTH
@pytest.mark.parametrize("kind", ["string_view", "large_string", "dictionary"])
def test_arrow_knows_several_kinds_of_strings(kind, streaming, evaluated, prepare, decode, tmp_path):
    """polars writes string_view and pandas' categories are dictionaries."""
    kinds = {"string_view": pa.string_view(), "large_string": pa.large_string()}
    strings = pa.array(TEXTS).dictionary_encode() if kind == "dictionary" else pa.array(TEXTS, kinds[kind])
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"n": range(len(TEXTS)), "text": strings}), tmp_path / "data" / "a.parquet")
    assert evaluated("--validation_file", tmp_path / "data" / "a.parquet", streaming=streaming) == TEXTS
    data = ["--dataset_name", tmp_path / "data", "--eval_split_name", "train"]
    assert evaluated(*data, streaming=streaming) == TEXTS
    if kind != "dictionary":  # which `datasets` does not keep
        dataset = datasets.Dataset(pa.table({"text": strings}))
        dataset.save_to_disk(tmp_path / "saved")
        assert evaluated("--dataset_name", tmp_path / "saved", "--eval_split_name", "train", streaming=streaming) == TEXTS
    if not streaming:  # texts here and there
        for data in (["--train_file", tmp_path / "data" / "a.parquet"], ["--dataset_name", tmp_path / "saved"]):
            if data[1].exists():
                found = prepare(*data, "--line_by_line", "--do_train", "--do_eval", "--validation_split_percentage", 40)
                assert sorted(decode(found.train) + decode(found.validation)) == sorted(TEXTS)


# ---- Directories ---------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("suffix", ["txt", "txt.gz"])
def test_a_directory_keeps_line_breaks(suffix, streaming, prepare, gpt2_dir, tmp_path):
    """--keep_linebreaks, on by default, is meant for a directory too."""
    path = write(tmp_path / "data" / f"train.{suffix}", "".join(f"{text}\n" for text in TEXTS))
    options = {"module": run_clm_flax, "model_dir": gpt2_dir, "streaming": streaming}
    tokenizer = AutoTokenizer.from_pretrained(gpt2_dir)
    for flags in ([], ["--no_keep_linebreaks"]):
        by_name = prepare(
            "--dataset_name", path.parent, "--eval_split_name", "train", "--do_eval", *flags, **options
        ).validation
        alone = prepare("--validation_file", path, "--do_eval", *flags, **options).validation
        assert (by_name["input_ids"] == alone["input_ids"]).all()
        text = tokenizer.decode([token for token in by_name["input_ids"].reshape(-1) if token >= 0])
        assert text == "".join(f"{text}{'' if flags else chr(10)}" for text in TEXTS)


@BOTH
@pytest.mark.parametrize("suffix", ["txt", "txt.gz"])
def test_a_directory_has_documents(suffix, streaming, prepare, bert_dir, tmp_path):
    """Blank lines divide documents in the files of a directory too, and --line_by_line makes every line one."""
    documents = ["\n".join(f"Sentence {n} of document {d}." for n in range(4)) for d in range(12)]
    path = write(tmp_path / "data" / f"train.{suffix}", "\n\n".join(documents) + "\n")
    options = {"module": run_pretraining_flax, "model_dir": bert_dir, "streaming": streaming}
    by_name = prepare("--dataset_name", path.parent, "--eval_split_name", "train", "--do_eval", **options).validation
    alone = prepare("--validation_file", path, "--do_eval", **options).validation
    assert all((by_name[column] == alone[column]).all() for column in alone)
    assert len(by_name["input_ids"]) >= 12


@BOTH
def test_a_card_says_how_csv_is_written(streaming, evaluated, refuses, tmp_path):
    """The README.md of a dataset may name files and their separator."""
    write(tmp_path / "data" / "odd.csv", "id;text\n" + "".join(f"{n};{text}\n" for n, text in enumerate(TEXTS)))
    card = "---\nconfigs:\n- config_name: c\n  sep: ';'\n  data_files:\n  - split: validation\n    path: odd.csv\n---\n"
    write(tmp_path / "data" / "README.md", card)
    assert evaluated("--dataset_name", tmp_path / "data", "--dataset_config_name", "c", streaming=streaming) == TEXTS
    write(tmp_path / "data" / "README.md", card.replace("sep: ';'", "sep: ';'\n  skiprows: 0"))  # left to `datasets`
    assert evaluated("--dataset_name", tmp_path / "data", "--dataset_config_name", "c", streaming=streaming) == TEXTS
    shutil.copytree(tmp_path / "data", tmp_path / "more")
    write(tmp_path / "more" / "odd.csv", "id;text\n" + "".join(f"{n};Hello; you\n" for n in range(9)))
    with refuses(f"--dataset_name {tmp_path / 'more'}.*Length of header .* does not match"):
        evaluated("--dataset_name", tmp_path / "more", "--dataset_config_name", "c", streaming=streaming)


@BOTH
def test_files_of_a_split_differ(streaming, evaluated, refuses, log, tmp_path):
    """A column that a file lacks is empty there; what only a later file has is refused, or counts as empty and is told."""
    write(tmp_path / "a" / "train" / "0.csv", "text,id\nfirst,1\n")
    write(tmp_path / "a" / "train" / "1.csv", "text\nsecond\n")
    assert evaluated("--dataset_name", tmp_path / "a", "--eval_split_name", "train", streaming=streaming) == ["first", "second"]
    write(tmp_path / "a" / "train" / "2.csv", "sentence\nthird\n")
    data = ["--dataset_name", tmp_path / "a", "--eval_split_name", "train"]
    with refuses("2.csv: .*it has columns that the files before it do not have: sentence"):
        evaluated(*data, streaming=streaming)
    if streaming:  # where only the beginning is looked at
        write(tmp_path / "a" / "train" / "0.csv", "text,id\n" + "first,1\n" * 1000)
        assert evaluated(*data, streaming=True) == ["first"] * 1000 + ["second"]
        assert any("some rows have no column 'text': they count as empty" in line for line in log)


# ---- The column with the text --------------------------------------------------------------------------------------------


@BOTH
def test_the_column_in_use_is_named(streaming, evaluated, log, tmp_path):
    """Which one of several is a guess, which the log tells and a flag corrects."""
    rows = [{"url": f"https://example.org/{n}", "n": n, "title": f"Title {n}", "content": text} for n, text in enumerate(TEXTS)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluated("--validation_file", path, streaming=streaming) == [row["url"] for row in rows]
    assert "The validation data is column 'url'." in log
    warning = next(line for line in log if "--text_column_name" in line)
    assert "url, title, content" in warning
    assert "'url'" in warning
    log.clear()
    flags = ["--text_column_name", "content"]
    assert evaluated("--validation_file", path, *flags, streaming=streaming) == [row["content"] for row in rows]
    assert "The validation data is column 'content'." in log
    assert not any("--text_column_name" in line for line in log)


@BOTH
@pytest.mark.parametrize("first", [{"text": None}, {"id": "5"}, {"text": "NA"}, {"text": ""}, {"id": "5", "text": None}])
def test_first_rows_may_be_without_text(first, streaming, evaluated, tmp_path):
    """Null or missing is empty text, wherever it is."""
    expected = TEXTS if first.get("text") != "NA" else [text for text in TEXTS for text in ("NA", text)]
    rows = [row for text in TEXTS for row in (first, {"text": text})]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluated("--validation_file", tmp_path / "a.jsonl", streaming=streaming) == expected
    table = pa.table({"text": [row.get("text") for row in rows]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    assert evaluated("--validation_file", tmp_path / "a.parquet", streaming=streaming) == expected
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    assert evaluated("--dataset_name", tmp_path / "saved", "--eval_split_name", "train", streaming=streaming) == expected
    write(tmp_path / "a.csv", "id,text\n" + "".join(f"7,{row.get('text') or ''}\n".replace(", of", " of") for row in rows))
    expected = [text.replace(", of", " of") for text in expected]
    assert evaluated("--validation_file", tmp_path / "a.csv", streaming=streaming) == expected


@BOTH
def test_a_column_that_tells_late(streaming, evaluated, tmp_path):
    """Hundreds of rows without text before the first one, in a column of another name, beside dates, numbers and nothing."""
    rows = [{"day": "2020-01-01", "code": "0012", "note": None, "body": None}] * 700
    rows += [{"day": "2020-01-02", "code": "3", "note": None, "body": text} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluated("--validation_file", tmp_path / "a.jsonl", streaming=streaming) == TEXTS
    content = "day,code,note,body\n" + "".join(f'{row["day"]},{row["code"]},,"{row["body"] or ""}"\n' for row in rows)
    assert evaluated("--validation_file", write(tmp_path / "a.csv", content), streaming=streaming) == TEXTS


@BOTH
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_each_split_has_a_column_of_its_own(suffix, streaming, prepare, decode, tmp_path):
    """Two files, or the files of a directory, need not have the same columns."""

    def content(**columns) -> str:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if suffix == "jsonl":
            return "".join(json.dumps(row) + "\n" for row in rows)
        return ",".join(columns) + "\n" + "".join(",".join(f'"{value}"' for value in row.values()) + "\n" for row in rows)

    train = write(tmp_path / "data" / f"train.{suffix}", content(sentence=TEXTS))
    validation = write(tmp_path / "data" / f"validation.{suffix}", content(id=range(5), text=TEXTS[:5]))
    flags = ["--line_by_line", "--do_train", "--do_eval"]
    for data in (["--train_file", train, "--validation_file", validation], ["--dataset_name", train.parent]):
        found = prepare(*data, *flags, streaming=streaming)
        assert decode(found.validation) == TEXTS[:5]
        assert sorted(decode(found.train)) == sorted(TEXTS)


NO_TEXT = {
    "nested.json": ({"data": [{"text": "a"}]}, "no text column, only data .lists.: write one row per text, in JSON an object"),
    "columns.json": ({"text": {"0": "a", "1": "b"}}, "no text column, only text .objects.: write one row per text"),
    "numbers.jsonl": ({"text": 5}, "no text column, only text .numbers.: write the texts as strings"),
    "dates.jsonl": ({"text": "2020-01-01"}, "no text column, only text .dates.: write the texts as strings"),
    "objects.jsonl": ({"text": {"body": "a"}}, "no text column, only text .objects.: write one row per text"),
    "lists.jsonl": ({"text": ["a", "b"]}, "no text column, only text .lists.: write one row per text"),
}


@BOTH
@pytest.mark.parametrize("name", NO_TEXT)
def test_what_is_no_text_is_called_what_it_is(name, streaming, prepare, refuses, tmp_path):
    content, expected = NO_TEXT[name]
    (tmp_path / name).write_text(f"{json.dumps(content)}\n" * 2)
    with refuses(f"{expected}.*in the validation data"):
        prepare("--validation_file", tmp_path / name, "--do_eval", streaming=streaming)
    if "text" in content:
        with refuses(r"--text_column_name text: holds (numbers|dates|objects|lists); write"):
            flags = ["--text_column_name", "text"]
            prepare("--validation_file", tmp_path / name, "--do_eval", *flags, streaming=streaming)


@BOTH
def test_one_document_is_told_as_such(streaming, prepare, bert_dir, refuses, tmp_path):
    """A txt file without blank lines; lines of spaces are none."""
    path = write(tmp_path / "a.txt", "\n \n".join(f"Sentence {n} is here." for n in range(30)))
    options = {"module": run_pretraining_flax, "model_dir": bert_dir, "streaming": streaming}
    for flags in (["--do_train"], ["--do_train", "--do_eval"], ["--do_eval"]):
        with refuses(r"the data is one document, .* divided by blank lines \(not of spaces\) in a txt file"):
            prepare("--train_file", path, *flags, **options)


# ---- Splits --------------------------------------------------------------------------------------------------------------


def make_dataset(path, kind: str, splits: dict[str, list[str]]):
    """A dataset with these splits, as files or as save_to_disk writes them."""
    if kind == "saved":
        datasets.DatasetDict({n: datasets.Dataset.from_dict({"text": t}) for n, t in splits.items()}).save_to_disk(path)
    for split, texts in splits.items() if kind != "saved" else ():
        lines = [json.dumps({"text": text}) for text in texts] if kind == "jsonl" else texts
        write(path / f"{split}.{kind}", "".join(f"{line}\n" for line in lines))
    return path


@BOTH
@pytest.mark.parametrize("kind", ["txt", "jsonl", "saved"])
def test_splits_of_a_dataset(kind, streaming, prepare, decode, evaluated, refuses, tmp_path):
    """Whatever splits there are: what is asked for is trained on and evaluated, or one true line says what is missing."""
    parts = {"train": [f"train {n}" for n in range(260)], "validation": ["validation 1"], "test": ["test 1", "test 2"]}

    def data(*names) -> list:
        path = tmp_path / "-".join(names)
        make_dataset(path, kind, {name: parts[name] for name in names}) if not path.exists() else None
        return ["--dataset_name", path]

    def trained(*flags) -> list[str]:
        return decode(prepare(*flags, "--do_train", "--line_by_line", streaming=streaming).train)

    few = ["--num_eval_samples", 4] if streaming else []
    assert evaluated(*data("validation"), streaming=streaming) == parts["validation"]
    assert evaluated(*data("test"), streaming=streaming) == parts["test"]
    assert evaluated(*data("validation", "test"), streaming=streaming) == parts["validation"]
    assert evaluated(*data("train", "validation", "test"), streaming=streaming) == parts["validation"]
    assert set(evaluated(*data("train", "test"), *few, streaming=streaming)) < set(parts["train"])
    every = data("train", "validation", "test")
    assert evaluated(*every, "--eval_split_name", "test", streaming=streaming) == parts["test"]
    assert sorted(trained(*every)) == sorted(parts["train"])
    assert set(trained(*data("train", "test"), *few)) < set(parts["train"])
    assert sorted(trained(*every, "--train_split_name", "test")) == parts["test"]
    for flags in (["--do_train"], ["--do_train", "--do_eval"]):
        with refuses("has no train split, only validation; name the one to train on with --train_split_name"):
            prepare(*data("validation"), *flags, streaming=streaming)
        with refuses("has no train split, only test, validation|has no train split, only validation, test"):
            prepare(*data("validation", "test"), *flags, streaming=streaming)
    for flag in ("--train_split_name", "--eval_split_name"):
        with refuses(f"{flag} dev: .* has no such split, only train"):
            prepare(*data("train"), flag, "dev", "--do_train", "--do_eval", streaming=streaming)
    write(tmp_path / "own.txt", "my own\n")
    own = ["--validation_file", tmp_path / "own.txt"]
    assert evaluated(*data("test"), *own, streaming=streaming) == ["my own"]
    assert sorted(trained(*data("train", "validation"), *own)) == sorted(parts["train"])


@BOTH
def test_names_of_files_tell_their_splits(streaming, evaluated, prepare, refuses, tmp_path):
    """In capital letters too; files of one format have to be in one directory."""
    write(tmp_path / "upper" / "TRAIN.TXT", "train\n")
    write(tmp_path / "upper" / "VALIDATION.TXT.GZ", "validation\n")
    assert evaluated("--dataset_name", tmp_path / "upper", streaming=streaming) == ["validation"]
    write(tmp_path / "mixed" / "train.txt", "train\n")
    write(tmp_path / "mixed" / "validation.csv", "text\nvalidation\n")
    with refuses("mixed: cannot be loaded: the splits are of different formats; name their files with --train_file and"):
        prepare("--dataset_name", tmp_path / "mixed", "--do_eval", streaming=streaming)
    (tmp_path / "upper" / "circle").symlink_to(tmp_path / "upper")
    assert evaluated("--dataset_name", tmp_path / "upper", streaming=streaming) == ["validation"]


@BOTH
def test_splits_that_cannot_be_named(streaming, prepare, refuses, corpus, tmp_path):
    for split in ("train", "eval"):
        with refuses(f"--{split}_split_name: names a split of --dataset_name, which is not given"):
            prepare("--train_file", corpus, f"--{split}_split_name", "x", "--do_eval", streaming=streaming)
    own = make_dataset(tmp_path / "own", "saved", {"a": ["x"], "b": ["y"]})
    with refuses("has neither validation nor train, but a, b; name the one to evaluate with --eval_split_name"):
        prepare("--dataset_name", own, "--do_eval", streaming=streaming)
    with refuses("--eval_split_name, --validation_file: name one thing to evaluate"):
        more = ["--eval_split_name", "a", "--validation_file", corpus]
        prepare("--dataset_name", own, *more, "--do_eval", streaming=streaming)
    with refuses(f"--dataset_name {corpus}: is a file; read it with --train_file"):
        prepare("--dataset_name", corpus, "--do_eval", streaming=streaming)


@BOTH
def test_one_text_is_trained_on_whole(streaming, prepare, decode, refuses, log, tmp_path):
    """Nothing of it can be held out; where something is to be evaluated that is an error."""
    path = write(tmp_path / "one.txt", "All the text there is, in one line.")
    found = prepare("--train_file", path, "--do_train", "--line_by_line", streaming=streaming)
    assert decode(found.train) == ["All the text there is, in one line."]
    assert found.validation is None
    assert any("nothing of it is held out" in line for line in log)
    with refuses("the training data has 1 row.*too few to hold some out; give --validation_file"):
        prepare("--train_file", path, "--do_train", "--do_eval", streaming=streaming)


# ---- Saved datasets, and where results of preparing are kept ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Dataset", "DatasetDict"])
def test_a_saved_dataset_is_left_as_it_is(kind, prepare, decode, tmp_path):
    """Prepared or streamed, before and after each other; it may be read-only, and nothing is written beside it."""
    dataset = datasets.Dataset.from_dict({"text": [f"{text} {n}" for n in range(10) for text in TEXTS]})
    dataset = dataset if kind == "Dataset" else datasets.DatasetDict(train=dataset)
    dataset.save_to_disk(tmp_path / "saved")
    before = sorted(str(path) for path in (tmp_path / "saved").rglob("*"))
    flags = ["--dataset_name", tmp_path / "saved", "--do_train", "--line_by_line"]
    for streaming in (False, True, False, True):
        more = ["--num_eval_samples", 4] if streaming else ["--preprocessing_num_workers", 2]
        assert decode(prepare(*flags, *more, streaming=streaming).train)
        assert sorted(str(path) for path in (tmp_path / "saved").rglob("*")) == before
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}
    assert cached
    prepare(*flags)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")} == cached  # used again
    prepare(*flags, "--overwrite_cache")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")} != cached


def test_the_cache_knows_a_file_that_changed(prepare, decode, tmp_path):
    """Also one of the same size."""
    for text in ("some words", "more words"):
        path = write(tmp_path / "a.txt", f"{text}\n")
        assert decode(prepare("--validation_file", path, "--do_eval", "--line_by_line").validation) == [text]
