# SPDX-License-Identifier: Apache-2.0
"""How a program ends and what it says then."""

from dataclasses import dataclass, field

import pytest

from flaxlm import cli, processes

SCRIPT = "/somewhere/run_mine.py"


def end_with(error: BaseException | None) -> int:
    def main():
        if error is not None:
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "silence_late_writes", lambda: None)  # for programs: it would silence pytest too
        return cli.run(main, SCRIPT)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (None, 0, ""),
        (cli.Mistake("--flag 1: is wrong"), 2, "run_mine.py: error: --flag 1: is wrong\n"),
        (cli.Accident("the disk is full"), 1, "run_mine.py: error: the disk is full\n"),
        (processes.Stopped(15), 143, "run_mine.py: stopped as asked; to go on, run the same command with --resume_from_chec"),
        (KeyboardInterrupt(), 130, "run_mine.py: interrupted before training began; nothing to save\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_line_and_a_status(error, status, line, capsys):
    assert end_with(error) == status
    assert capsys.readouterr().err.startswith(line)


def test_other_errors_are_ours_to_mend(capsys):
    with pytest.raises(ZeroDivisionError):
        end_with(ZeroDivisionError())


def test_a_mistake_is_one_line(refuses):
    with refuses("^--flag x: cannot be read: so it says$"):
        cli.fail("--flag x:  cannot be read:\n so it says ")


@dataclass
class Flags:
    number: int = field(default=1, metadata={"help": "A number."})
    old_name: str = field(default="a", metadata={"aliases": ["--other_name"], "help": "A word."})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--number", "x"], "--number: invalid int value: 'x'"),
        (["--nubmer", "1"], "^--nubmer: no such flag; --help lists them all$"),
        (["--n_ipu", "1"], "^--n_ipu: is made for one vendor's hardware"),
        (["missing.json"], "missing.json: cannot be read as JSON: "),
        (["bad.json"], "bad.json: must hold one JSON object"),
        (["unknown.json"], "unknown.json: 'nubmer': no such flag"),
    ],
)
def test_flags_that_are_refused(argv, message, refuses, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("[1]")
    (tmp_path / "unknown.json").write_text('{"nubmer": 1}')
    with refuses(message):
        cli.ScriptArgumentParser(Flags).parse(argv)


def test_a_json_file_and_flags_behind_it(tmp_path):
    path = tmp_path / "flags.json"
    path.write_text('{"number": 2, "other_name": "b"}')
    assert cli.ScriptArgumentParser(Flags).parse([str(path), "--number", "3"]) == (Flags(3, "b"),)


def test_a_bar_in_a_log_file_is_silent_at_first(capsys):
    with cli.progress_bar(total=2, desc="Doing") as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""
