# SPDX-License-Identifier: Apache-2.0
"""Which files a flag names: several, patterns, directories; in which order, each once, all of one format."""

import gzip
import json
import os

import pytest

from flaxlm import cards, cli, files, inputs
from tests.conftest import run


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Files with their own names as text, below the current directory."""
    names = ["b.txt", "a.txt", "sub/c.txt.gz", "sub/deep/D.TXT", ".hidden.txt", ".git/e.txt", "README.md", "sub/notes.doc"]
    for name in names:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = f"{name}\n".encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


@pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streaming"])
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["data"], "a.txt b.txt sub/c.txt.gz sub/deep/D.TXT"),
        (["data/"], "a.txt b.txt sub/c.txt.gz sub/deep/D.TXT"),
        (["data/b.txt", "data/a.txt"], "b.txt a.txt"),
        (["data/*.txt"], "a.txt b.txt"),
        ("data/*.txt", "a.txt b.txt"),
        (["data/**/*.[tT][xX][tT]*"], "a.txt b.txt sub/c.txt.gz sub/deep/D.TXT"),
        (["data/*"], "a.txt b.txt"),
        (["data/b.txt", "data", "./data/a.txt"], "b.txt a.txt sub/c.txt.gz sub/deep/D.TXT"),
        (["data/sub", "data/?.txt"], "sub/c.txt.gz sub/deep/D.TXT a.txt b.txt"),
    ],
    ids=str,
)
def test_what_is_read(names, expected, streaming, tree, tmp_path):
    """Rows come in the order of the files: as they are typed, and by path in a directory or a pattern."""
    rows = files.load(names, "--train_file", str(tmp_path / "cache"), streaming=streaming)
    assert [row["text"] for row in rows] == expected.split()
    if streaming:
        assert rows.num_shards == len(expected.split())


def test_what_the_log_says(tree, tmp_path, messages_logged):
    files.load(["data", "data/a.txt"], "--train_file", str(tmp_path / "cache"))
    assert messages_logged == [
        "--train_file data data/a.txt: 4 file(s), and 2 of other formats, which are ignored",
        "--train_file: names 1 file(s) twice, which are read once: data/a.txt",
    ]
    messages_logged.clear()
    files.load("data/a.txt", "--train_file", str(tmp_path / "cache"))
    assert messages_logged == []


def test_a_name_is_a_file_before_it_is_a_pattern(tmp_path):
    for name in ("a[1].txt", "a1.txt", "b*.txt", "b2.txt"):
        (tmp_path / name).write_text(name)
    names = [str(tmp_path / name) for name in ("a[1].txt", "b*.txt", "b[2].txt")]
    assert [row["text"] for row in files.load(names, "--train_file", None, streaming=True)] == ["a[1].txt", "b*.txt", "b2.txt"]


def test_links_in_a_circle_and_to_what_is_there_already(tree):
    os.symlink(tree, tree / "sub" / "again")
    os.symlink(tree / "a.txt", tree / "z.txt")
    found = inputs.find(["data"], "--train_file")
    assert [os.path.basename(path) for path in found.paths] == ["a.txt", "b.txt", "c.txt.gz", "D.TXT"]
    assert found.repeated == ["data/z.txt"]


@pytest.mark.parametrize("name", ["", "*", "b.txt"])
def test_a_link_to_nothing_is_refused(name, refuses, tmp_path):
    """In a directory or by a pattern too: text would be missing without a word."""
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.txt").symlink_to("/nowhere/b.txt")
    with refuses(f"^--train_file {tmp_path}/b.txt: (is a link to a file that is not there|no such file)"):
        inputs.find(str(tmp_path / name), "--train_file")


def test_home(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree.parent))
    assert inputs.find("~/data/*.txt", "--train_file").paths == [str(tree / "a.txt"), str(tree / "b.txt")]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["none.txt"], "^--train_file none.txt: no such file$"),
        (["data/a.txt", "none.txt"], "^--train_file none.txt: no such file$"),
        (["data/README.md"], "^--train_file data/README.md: unknown suffix; use txt, csv"),
        (["data/*.jsonl"], r"^--train_file data/\*.jsonl: there is no txt, csv, .* file of that name$"),
        (["data/sub/*.doc"], r"--train_file data/sub/\*.doc: there is no .* file of that name, only 1 other.s. as data/sub/n"),
        (["nothing"], "^--train_file nothing: there is no txt, .* file in it$"),
        (["data", "data/sub/zero.txt"], "^--train_file data/sub/zero.txt: is empty$"),
        (["data/a.txt", "rows.jsonl"], "^--train_file: names files of several formats, as data/a.txt and rows.jsonl; name th"),
        (["a.csv", "a.tsv"], "^--train_file: names files of several formats, as a.csv and a.tsv"),
        (["saved"], "^--train_file saved: was written by save_to_disk; read it with --dataset_name"),
    ],
)
def test_what_is_refused(names, message, tree, refuses):
    os.mkdir("nothing")
    os.mkdir("saved")
    for name in ("rows.jsonl", "saved/state.json"):
        (tree.parent / name).write_text(json.dumps({"text": "a"}))
    for name in ("a.csv", "a.tsv"):
        (tree.parent / name).write_text("text\na\n")
    if "data/sub/zero.txt" in names:
        (tree / "sub" / "zero.txt").touch()
    with refuses(message):
        inputs.find(names, "--train_file")


def test_json_and_jsonl_are_one_format(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "one"}]')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}\n'))
    assert [row["text"] for row in files.load(str(tmp_path), "--train_file", None, streaming=True)] == ["one", "two"]


def test_the_cache_knows_each_file(tree, tmp_path):
    """One of several that changes is read again, and so is another order."""

    def read(*names) -> list[str]:
        return files.load(list(names), "--train_file", str(tmp_path / "cache"))["text"]

    assert read("data/a.txt", "data/b.txt") == ["a.txt", "b.txt"]
    assert read("data/b.txt", "data/a.txt") == ["b.txt", "a.txt"]
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}
    (tree / "b.txt").write_text("changed\n")
    assert read("data/a.txt", "data/b.txt") == ["a.txt", "changed"]
    (tree / "b.txt").write_text("b.txt\n")
    os.utime(tree / "b.txt", ns=(0, 0))
    read("data/a.txt", "data/b.txt")
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 4
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())


# ---- From the command line on --------------------------------------------------------------------------------------------


def test_several_files_train_as_one(texts, roberta_dir, error_of, tmp_path):
    """The same losses; what was typed is in the card; and a file of word references is for one file of text."""
    for name, part in {
        "data/0.txt": texts[:40],
        "data/1.txt": texts[40:90],
        "one.txt": texts[:90],
        "val.txt": texts[90:120],
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join(part) + "\n")
    (tmp_path / "flags.json").write_text(json.dumps({"train_file": [str(tmp_path / "data" / f"{n}.txt") for n in (0, 1)]}))

    def train(name, *flags) -> dict:
        return run(
            tmp_path / name, roberta_dir, "--validation_file", tmp_path / "val.txt", "--max_steps", 2, "--cache_dir",
            tmp_path / "cache", *flags,
        )  # fmt: skip

    one = train("one", "--train_file", tmp_path / "one.txt")
    for number, names in enumerate([[tmp_path / "data"], [tmp_path / "data" / "*.txt"], sorted((tmp_path / "data").iterdir())]):
        results = train(f"several{number}", "--train_file", *names)
        assert {key: results[key] for key in ("eval_loss", "train_loss")} == {
            key: one[key] for key in ("eval_loss", "train_loss")
        }
    assert "--train_file '*.txt'" in (tmp_path / "several1" / "README.md").read_text()
    assert "--train_file 0.txt 1.txt" in (tmp_path / "several2" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "several2" / "README.md").read_text()
    line = error_of(
        train, "refs", "--train_file", tmp_path / "data", "--whole_word_mask", "--train_ref_file", tmp_path / "flags.json"
    )
    assert "--train_ref_file" in line
    assert "refers to the rows of one file" in line


def test_names_in_cards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").touch()
    assert cards.shown_path(["data/*.txt", str(tmp_path / "x" / "*.csv"), "a.txt", "https://x.org/a.txt"]) == (
        "data/*.txt *.csv a.txt https://x.org/a.txt"
    )


def test_many_names_are_shortened():
    assert inputs.shown([f"{n}.txt" for n in range(10)]) == "0.txt 1.txt 2.txt and 7 more"
    assert inputs.shown("a.txt") == "a.txt"


@pytest.mark.parametrize(
    ("value", "expected"),
    [('"a.txt"', ["a.txt"]), ('["a.txt", "b.txt"]', ["a.txt", "b.txt"]), ('["-a.txt"]', ["./-a.txt"]), ("null", None)],
)
def test_lists_in_json_files(value, expected, tmp_path):
    from dataclasses import dataclass, field

    @dataclass
    class Flags:
        train_file: list[str] | None = field(default=None, metadata={"help": "Files of text."})

    (tmp_path / "flags.json").write_text(f'{{"train_file": {value}}}')
    assert cli.ScriptArgumentParser(Flags).parse([str(tmp_path / "flags.json")]) == (Flags(expected),)


@pytest.mark.parametrize("value", ["[]", "[1]", '["a", null]', '[["a"]]'])
def test_lists_that_are_refused(value, refuses, tmp_path):
    from dataclasses import dataclass, field

    @dataclass
    class Flags:
        train_file: list[str] | None = field(default=None, metadata={"help": "Files of text."})

    (tmp_path / "flags.json").write_text(f'{{"train_file": {value}}}')
    with refuses("flags.json: 'train_file': must be a list of strings, of at least one"):
        cli.ScriptArgumentParser(Flags).parse([str(tmp_path / "flags.json")])
    with refuses("--train_file: holds a character that is no text"):
        cli.ScriptArgumentParser(Flags).parse(["--train_file", "a", "b\0"])
