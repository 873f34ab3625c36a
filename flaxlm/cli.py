# SPDX-License-Identifier: Apache-2.0
"""How a program talks and ends: flags, one line for a mistake, exit statuses, log and progress bars."""

import argparse
import atexit
import contextlib
import datetime
import errno
import faulthandler
import functools
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import datasets
import huggingface_hub
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import HfArgumentParser

import flaxlm

logger = logging.getLogger("flaxlm")  # for scripts; the modules' own loggers are its children


# ---- The end -------------------------------------------------------------------------------------------------------------


class Ending(Exception):  # noqa: N818 (not all of them are errors)
    """The program ends with a line that says why, and an exit status."""

    status, label = 1, ""


class Mistake(Ending):
    """A person's mistake, to be told in one line: the flag or file, what is wrong, what to do."""

    status, label = 2, "error: "


class Accident(Ending):
    """The program's own misfortune: a full disk, a loss that is no number."""

    status, label = 1, "error: "


def fail(message: str) -> NoReturn:
    """End the program because of a person's mistake: one line, exit status 2."""
    raise Mistake(" ".join(message.split()))


def first_line(error: BaseException) -> str:
    """What went wrong, without the advice that libraries print below it."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those behind it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # they may go in a circle
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever a library raises within is told in a line about `what`, which names flags: the net below better messages.

    A full disk or too little memory is an accident; anything else in a file or a value is a mistake.
    """
    try:
        yield
    except Ending:
        raise
    except Exception as error:
        reason = f"{what}: {first_line(error)} ({type(error).__name__})"
        if is_accident(error):
            raise Accident(reason) from error
        raise Mistake(" ".join(reason.split())) from error


def is_accident(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in ACCIDENTS


ACCIDENTS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EFBIG}
TRACEBACK = "FLAXLM_TRACEBACK"  # in the environment: show where it happened, too


def run(main: Callable[[], Any], script: str) -> int:
    """main() as a program: its exit status; how it ended, if not well, is one line that begins with the script's name."""
    silence_late_writes()
    name = Path(script).name
    try:
        with interruptible(name):
            main()
        return 0
    except KeyboardInterrupt as interrupt:
        signum = next(iter(interrupt.args), signal.SIGINT)
        status, line = flaxlm.STATUS_BEFORE_TRAINING[signum], flaxlm.INTERRUPTED
    except Exception as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        if isinstance(error, Ending):
            status, line = error.status, f"{error.label}{error}"
        else:
            status, reason = 1, f"unexpected {type(error).__name__}: {first_line(error)}"
            line = f"error: {reason}; {TRACEBACK}=1 in the environment shows where"
    print(f"{name}: {line}", file=sys.stderr)
    return status


@contextlib.contextmanager
def interruptible(name: str) -> Iterator[None]:
    """Within this context Ctrl-C and SIGTERM raise KeyboardInterrupt and, should a library swallow that, end the program all
    the same.

    jax calls Python back from garbage collection, where an exception is printed and forgotten. Training has a handler of its
    own in place of this one (processes.StopSignal).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, timers, received = os.getpid(), [], []

    def handle(signum: int, frame) -> None:
        if os.getpid() != owner:  # a process that tokenises: its owner has been interrupted as well
            os._exit(128 + signum)
        received.append(signum)
        timers.append(threading.Timer(1.0, flaxlm.end_at_once, [name, signum]))
        timers[-1].daemon = True
        timers[-1].start()
        raise KeyboardInterrupt(signum)

    previous = {signum: signal.signal(signum, handle) for signum in flaxlm.STATUS_BEFORE_TRAINING}
    try:
        yield
    except Exception as error:
        if received:  # a library has made this of it
            raise KeyboardInterrupt(received[0]) from error
        raise
    finally:
        for timer in timers:
            timer.cancel()
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def end(status: int) -> NoReturn:
    """Leave the program, within seconds, whatever libraries still wait for.

    orbax leaves threads behind after a save that failed, and Python would wait for them for ever: so it is left without being
    taken apart. The exit functions of libraries are called, since they remove temporary files, but not waited for either; one
    that hangs and lets no other thread run, so that the timer cannot either, is ended by faulthandler, with status 1.
    """
    for signum in flaxlm.STATUS_BEFORE_TRAINING:  # what comes now comes too late to say anything
        signal.signal(signum, signal.SIG_DFL)
    timer = threading.Timer(5.0, os._exit, [status])
    timer.daemon = True
    timer.start()
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(8.0, exit=True, file=sys.stderr if os.environ.get(TRACEBACK) else nowhere)
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


def silence_late_writes() -> None:
    """Failed writes are reported by us; threads of orbax and TensorBoard would protest besides, in one of these ways."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = lambda unraisable: (
        str(unraisable.exc_value) == "Event loop is closed" or sys.__unraisablehook__(unraisable)
    )
    threading.excepthook = lambda args: type(args.thread).__name__ == "_AsyncWriterThread" or threading.__excepthook__(args)


# ---- The command line ----------------------------------------------------------------------------------------------------


class ScriptArgumentParser(HfArgumentParser):
    """HfArgumentParser whose errors are one line, and whose first argument may be a JSON file of arguments.

    Flags after the JSON file override it. Its values are checked as if they stood on the command line. `groups` are headings
    for --help, each with names of flags; what is in none stands first. After `parse`, `given` names the flags that were set.
    """

    VENDOR_FLAGS = (
        "ipu_config_name", "ipu_config_overrides", "n_ipu", "fp32", "loss_scaling", "auto_loss_scaling", "dataloader_mode",
        "compile_only", "pad_on_batch_axis",
    )  # fmt: skip

    def __init__(self, *args, groups: Mapping[str, Sequence[str]] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.groups, self.given = groups or {}, set()

    def error(self, message: str) -> NoReturn:
        fail(message)

    def parse(self, argv: Sequence[str] | None) -> tuple:
        """The dataclasses, filled; without `argv` from the command line."""
        argv = list(sys.argv[1:] if argv is None else argv)
        if argv and argv[0].endswith(".json"):
            argv[:1] = self.read_json(argv[0])
        words = [word.partition("=")[0] for word in argv]
        self.given = {self._option_string_actions[word].dest for word in words if word in self._option_string_actions}
        try:
            *arguments, unknown = self.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        except (OSError, UnicodeError) as error:  # of a .args file beside the script
            fail(f"{Path(sys.argv[0]).with_suffix('.args')}: cannot be read: {first_line(error)}")
        if unknown:
            flag = unknown[0].partition("=")[0]  # its value may be secret
            fail(f"{flag}: {self.objection(flag)}")
        for part in arguments:
            check_text(part)
        return tuple(arguments)

    def objection(self, flag: str) -> str:
        if flag.lstrip("-") in self.VENDOR_FLAGS:
            return "is made for one vendor's hardware, remove it: JAX places the program on the devices by itself"
        if flag.endswith(".json"):
            return "a JSON file of arguments must come first, before all flags"
        return "no such flag; --help lists them all"

    def read_json(self, path: str) -> list[str]:
        try:
            values = json.loads(Path(path).read_text("utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            fail(f"{path}: cannot be read as JSON: {first_line(error)}")
        if not isinstance(values, dict):
            fail(f"{path}: must hold one JSON object, of flag names and values")
        argv = []
        for name, value in values.items():
            action = self._option_string_actions.get(f"--{name}")  # the names of flags, and other names they go by
            if action is None:
                fail(f"{path}: '{name}': {self.objection(name)}")
            if isinstance(value, list) and action.nargs == "+":
                argv += [f"--{name}", *self.words_of(value, f"{path}: '{name}'")]
                continue
            if isinstance(value, dict | list):
                fail(f"{path}: '{name}': takes one value, not a {'list' if isinstance(value, list) else 'JSON object'}")
            if isinstance(value, bool) and action.type is str:
                value = None if action.const is None or not value else action.const  # a bare flag: true or false
            elif isinstance(value, float) and value.is_integer() and action.type is int:
                value = int(value)
            if value is not None:
                argv.append(f"--{name}={value}")
        return argv

    def words_of(self, values: list, what: str) -> list[str]:
        """A list of a JSON file, as words of the command line."""
        if not values or any(not isinstance(value, str) for value in values):
            fail(f"{what}: must be a list of strings, of at least one")
        # A name that begins with a hyphen would be a flag on the command line.
        return [os.path.join(".", value) if value.startswith("-") else value for value in values]

    def format_help(self) -> str:
        """Flags by groups, each once: hyphens for underscores are accepted too, but not listed."""
        formatter = FlagFormatter(self.prog)
        formatter.add_usage(f"{self.prog} [FILE.json] [--flag value ...]", [], [])
        formatter.add_text(self.description)
        grouped = {name for names in self.groups.values() for name in names}
        others = [action.dest for action in self._actions if action.dest not in grouped]
        for heading, names in {"flags of the objective" if self.groups else "flags": others, **self.groups}.items():
            formatter.start_section(heading)
            formatter.add_arguments([action for action in self._actions if action.dest in names])
            formatter.end_section()
        return formatter.format_help()


class FlagFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """A flag with its value, in one spelling; a default is told if it says something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.option_strings[0].startswith("--no_"):
            return f"Switch {action.dest} off."
        return action.help if action.default in (None, False) else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        kind = "|".join(map(str, action.choices)) if action.choices else {int: "N", float: "X"}.get(action.type, "TEXT")
        value = "" if action.nargs == 0 or isinstance(action.default, bool) else f" {kind}"
        value += " ..." if action.nargs == "+" else ""
        return ", ".join(string for string in action.option_strings if "-" not in string.strip("-")) + value


def check_text(part: Any) -> None:
    """Refuse text that no path and no tokenizer can take: NUL, or half of a surrogate pair that stands for no byte."""
    for name, value in vars(part).items():
        try:
            words = value if isinstance(value, list) else [value]
            is_text = not any(isinstance(word, str) and b"\0" in os.fsencode(word) for word in words)
        except UnicodeEncodeError:
            is_text = False
        if not is_text:
            fail(f"--{name}: holds a character that is no text (NUL, or half of a surrogate pair)")


# ---- Log and progress ----------------------------------------------------------------------------------------------------


def set_up_logging() -> None:
    """Our messages on standard error; libraries speak up through handlers of their own, from warnings on."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    if not sys.stderr.isatty():  # where their bars would be cursor codes
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax; what fails there is reported here
    # Said of every default configuration with a smaller vocabulary: its special ids follow from the tokenizer, but later.
    configurations_logger = logging.getLogger("transformers.configuration_utils")
    configurations_logger.addFilter(lambda record: "within the vocabulary" not in record.getMessage())


@functools.cache
def log_once(message: str, *args) -> None:
    logger.warning(message, *args)


class ProgressLines:
    """Progress in a log file: a line a minute, and none for what is done sooner. Used as a tqdm bar is."""

    SECONDS = 60.0

    def __init__(self, total: int, desc: str, unit: str, initial: int = 0):
        self.total, self.desc, self.unit, self.initial, self.n = total, desc, unit, initial, initial
        self.started = self.told = time.monotonic()

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        self.n += n
        now = time.monotonic()
        if now - self.told < self.SECONDS:
            return
        self.told, elapsed = now, now - self.started
        left = elapsed / max(self.n - self.initial, 1) * (self.total - self.n)
        so_far, to_go = (datetime.timedelta(seconds=round(seconds)) for seconds in (elapsed, left))
        logger.info("%s: %s %d of %d (%s so far, %s to go)", self.desc, self.unit, self.n, self.total, so_far, to_go)

    def close(self) -> None:
        """Nothing is left to clear away."""


def progress_bar(total: int, desc: str, unit: str, initial: int = 0) -> tqdm | ProgressLines:
    """A bar on a terminal; in a log file a line a minute."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=desc, unit=unit, initial=initial, leave=False, dynamic_ncols=True)
    return ProgressLines(total, desc, unit, initial)


def log_above_bars() -> contextlib.AbstractContextManager:
    """Within this context lines of the log are written above the progress bars of a terminal, not through them."""
    return logging_redirect_tqdm([logger] if sys.stderr.isatty() else [])
