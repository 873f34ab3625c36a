# SPDX-License-Identifier: Apache-2.0
"""How a program ends and what it says then."""

import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import types
from dataclasses import dataclass, field

import pytest

from flaxlm import cli, processes
from tests.conftest import ROOT

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
        (KeyboardInterrupt(signal.SIGTERM), 75, "run_mine.py: interrupted before training began; nothing to save\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_line_and_a_status(error, status, line, capsys):
    assert end_with(error) == status
    assert capsys.readouterr().err.startswith(line)


def test_what_nobody_thought_of_is_one_line_too(capsys, monkeypatch):
    """With the traceback where it is asked for."""
    assert end_with(ZeroDivisionError("by zero\nand more")) == 1
    assert capsys.readouterr().err == (
        "run_mine.py: error: unexpected ZeroDivisionError: by zero; FLAXLM_TRACEBACK=1 in the environment shows where\n"
    )
    monkeypatch.setenv("FLAXLM_TRACEBACK", "1")
    assert end_with(ZeroDivisionError("by zero")) == 1
    assert "Traceback (most recent call last):" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("odd"), 2), (OSError(errno.ENOENT, "gone"), 2), (OSError(errno.ENOSPC, "full"), 1), (MemoryError(), 1)],
    ids=repr,
)
def test_reading_names_what_was_read(error, status):
    with pytest.raises(cli.Ending, match=r"^--tokenizer_name x: .* \(\w+Error\)$") as caught, cli.reading("--tokenizer_name x"):
        raise error
    assert caught.value.status == status


def test_a_mistake_is_one_line(refuses):
    with refuses("^--flag x: cannot be read: so it says$"):
        cli.fail("--flag x:  cannot be read:\n so it says ")


@dataclass
class Flags:
    number: int = field(default=1, metadata={"help": "A number."})
    old_name: str = field(default="a", metadata={"aliases": ["--other_name"], "help": "A word."})


@dataclass
class Resume:
    resume: str | None = field(default=None, metadata={"nargs": "?", "const": "latest", "help": "Go on."})


@pytest.mark.parametrize(("value", "expected"), [("true", "latest"), ("false", None), ("null", None), ('"path"', "path")])
def test_a_bare_flag_in_a_json_file(value, expected, tmp_path):
    (tmp_path / "flags.json").write_text(f'{{"resume": {value}}}')
    assert cli.ScriptArgumentParser(Resume).parse([str(tmp_path / "flags.json")]) == (Resume(expected),)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--number", "x"], "--number: invalid int value: 'x'"),
        (["--nubmer", "1"], "^--nubmer: no such flag; --help lists them all$"),
        (["--n_ipu", "1"], "^--n_ipu: is made for one vendor's hardware"),
        (["missing.json"], "missing.json: cannot be read as JSON: "),
        (["bad.json"], "bad.json: must hold one JSON object"),
        (["unknown.json"], "unknown.json: 'nubmer': no such flag"),
        (["--number", "1", "bad.json"], "^bad.json: a JSON file of arguments must come first, before all flags$"),
        (["nested.json"], "nested.json: cannot be read as JSON: "),
        (["deep.json"], "deep.json: cannot be read as JSON: "),
        (["list.json"], "list.json: 'number': takes one value, not a list"),
        (["half.json"], "--old_name: holds a character that is no text"),
        (["--old_name", "a\0b"], "--old_name: holds a character that is no text"),
        (["--hub_tokn=SECRET"], "^--hub_tokn: no such flag; --help lists them all$"),
    ],
)
def test_flags_that_are_refused(argv, message, refuses, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("[1]")
    (tmp_path / "unknown.json").write_text('{"nubmer": 1}')
    (tmp_path / "nested.json").write_text("[" * 100_000)
    (tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    (tmp_path / "list.json").write_text('{"number": [1]}')
    (tmp_path / "half.json").write_text('{"old_name": "a\\ud800"}')
    with refuses(message):
        cli.ScriptArgumentParser(Flags).parse(argv)


def test_a_json_file_and_flags_behind_it(tmp_path):
    path = tmp_path / "flags.json"
    path.write_text('\ufeff{"number": 2.0, "other_name": "b"}', "utf-8")  # a whole number, and a byte-order mark
    assert cli.ScriptArgumentParser(Flags).parse([str(path)]) == (Flags(2, "b"),)
    assert cli.ScriptArgumentParser(Flags).parse([str(path), "--number", "3"]) == (Flags(3, "b"),)


def test_progress_in_a_log_file(capsys, messages_logged, monkeypatch):
    """A line a minute, with what is to go; nothing for what is done sooner, and no cursor codes."""
    clock = [0.0]
    monkeypatch.setattr(cli, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    with cli.progress_bar(total=100, desc="Doing", unit="step", initial=20) as bar:
        for _ in range(80):
            clock[0] += 2.5
            bar.update()
    assert messages_logged == [
        "Doing: step 44 of 100 (0:01:00 so far, 0:02:20 to go)",
        "Doing: step 68 of 100 (0:02:00 so far, 0:01:20 to go)",
        "Doing: step 92 of 100 (0:03:00 so far, 0:00:20 to go)",
    ]
    assert capsys.readouterr().err == ""


# ---- Real programs -------------------------------------------------------------------------------------------------------


def start(body: str) -> subprocess.Popen:
    """A program whose main() is `body`, after it has said that it runs."""
    code = f"""
import flaxlm
flaxlm.begin(flaxlm.__version__, "run_mine.py", as_program=True)
import atexit, gc, sys, threading, time
from flaxlm import cli
def main():
    print("running", flush=True)
{textwrap.indent(textwrap.dedent(body), "    ")}
cli.end(cli.run(main, "run_mine.py"))
"""
    command, environment = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "running\n"
    return process


# After SIGTERM it is not 143, by which docs/train.sbatch knows a run that has gained something and is to be started again.
SIGNALS = pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)], ids=["INT", "TERM"])


@SIGNALS
@pytest.mark.parametrize(
    "body",
    [
        # As jax does when Python's garbage collection calls it.
        """
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                pass
        """,
        # As datasets does, when the processes that tokenise are gone.
        """
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            raise TimeoutError
        """,
    ],
    ids=["swallowed", "made another error"],
)
def test_an_interrupt_ends_the_program_whatever_a_library_makes_of_it(body, signum, status):
    process = start(body)
    process.send_signal(signum)
    _, error = process.communicate(timeout=20)
    assert process.returncode == status
    assert error == "run_mine.py: interrupted before training began; nothing to save\n"


@SIGNALS
def test_an_interrupt_cleans_up(signum, status):
    """Where nothing swallows it, what is half-written goes."""
    process = start("""
        try:
            print("within", flush=True)
            time.sleep(60)
        finally:
            print("cleaned up", flush=True)
    """)
    assert process.stdout.readline() == "within\n"
    process.send_signal(signum)
    output, error = process.communicate(timeout=20)
    assert (process.returncode, output) == (status, "cleaned up\n")
    assert error == "run_mine.py: interrupted before training began; nothing to save\n"


@SIGNALS
def test_an_interrupt_while_libraries_are_imported(signum, status):
    """The first seconds of a script."""
    command = [sys.executable, str(ROOT / "run_clm_flax.py"), "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(1.0)
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert error == "run_clm_flax.py: interrupted before training began; nothing to save\n"


ENDINGS = [("", 0), ("raise cli.Accident('not saved')", 1), ("cli.fail('--flag')", 2)]


@pytest.mark.parametrize(("error", "status"), ENDINGS)
@pytest.mark.parametrize(
    "leftover",
    [
        "threading.Thread(target=time.sleep, args=(600,)).start()",  # as orbax leaves them behind when a save has failed
        "atexit.register(time.sleep, 600)",
        "global left; left = type('Left', (), {'__del__': lambda self, sleep=time.sleep: sleep(600)})()",
    ],
    ids=["thread", "exit function", "object"],
)
def test_what_libraries_leave_behind_does_not_keep_the_program(leftover, error, status):
    process = start(f"""
        {leftover}
        {error}
    """)
    assert process.wait(timeout=20) == status
    process.communicate()


def test_an_exit_function_that_lets_nobody_else_run_does_not_keep_the_program():
    """As a library that waits for a thread which needs what it holds itself."""
    process = start("""
        import ctypes
        atexit.register(ctypes.PyDLL(None).sleep, 600)
        cli.fail("--flag")
    """)
    assert process.wait(timeout=30) == 1
    assert process.stderr.read() == "run_mine.py: error: --flag\n"


def test_exit_functions_are_called(tmp_path):
    """Libraries remove their temporary files in them."""
    process = start(f"""
        atexit.register(open, {str(tmp_path / "called")!r}, "w")
        print("unflushed", end="")
        cli.fail("--flag")
    """)
    assert (process.wait(timeout=20), process.stdout.read()) == (2, "unflushed")
    assert os.listdir(tmp_path) == ["called"]


# ---- Help ----------------------------------------------------------------------------------------------------------------


def test_help_has_groups_and_each_flag_once():
    parser = cli.ScriptArgumentParser(Flags, groups={"words": ["old_name"]})
    text = parser.format_help()
    assert re.findall(r"^(\w[\w ]*):$", text, re.MULTILINE) == ["flags of the objective", "words"]
    assert text.count("--number") == text.count("--old_name") == text.count("--other_name") == 1
    assert "--old-name" not in text
    assert parser.parse(["--old-name", "b"]) == (Flags(1, "b"),)  # still accepted
    assert "A number. (default: 1)" in text
