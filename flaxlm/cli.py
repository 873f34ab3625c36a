# SPDX-License-Identifier: Apache-2.0
"""How a program talks and ends: flags, one line for a mistake, exit statuses, log and progress bars."""

import contextlib
import functools
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import HfArgumentParser

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


def run(main: Callable[[], Any], script: str) -> int:
    """main() as a program: its exit status; how it ended, if not well, is one line that begins with the script's name."""
    silence_late_writes()
    try:
        main()
    except Ending as ending:
        print(f"{Path(script).name}: {ending.label}{ending}", file=sys.stderr)
        return ending.status
    except KeyboardInterrupt:
        print(f"{Path(script).name}: interrupted before training began; nothing to save", file=sys.stderr)
        return 130
    return 0


def silence_late_writes() -> None:
    """When a save fails, orbax stops listening to its other writes; each would protest, in one of these ways."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = lambda unraisable: (
        str(unraisable.exc_value) == "Event loop is closed" or sys.__unraisablehook__(unraisable)
    )


# ---- The command line ----------------------------------------------------------------------------------------------------


class ScriptArgumentParser(HfArgumentParser):
    """HfArgumentParser whose errors are one line, and whose first argument may be a JSON file of arguments.

    Flags after the JSON file override it. Its values are checked as if they stood on the command line.
    """

    VENDOR_FLAGS = (
        "ipu_config_name", "ipu_config_overrides", "n_ipu", "fp32", "loss_scaling", "auto_loss_scaling", "dataloader_mode",
        "compile_only", "pad_on_batch_axis",
    )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        fail(message)

    def parse(self, argv: Sequence[str] | None) -> tuple:
        """The dataclasses, filled; without `argv` from the command line."""
        argv = list(sys.argv[1:] if argv is None else argv)
        if argv and argv[0].endswith(".json"):
            argv[:1] = self.read_json(argv[0])
        *arguments, unknown = self.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        if unknown:
            fail(f"{unknown[0]}: {self.objection(unknown[0])}")
        return tuple(arguments)

    def objection(self, flag: str) -> str:
        if flag.lstrip("-").partition("=")[0] in self.VENDOR_FLAGS:
            return "is made for one vendor's hardware, remove it: JAX places the program on the devices by itself"
        return "no such flag; --help lists them all"

    def read_json(self, path: str) -> list[str]:
        try:
            values = json.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            fail(f"{path}: cannot be read as JSON: {first_line(error)}")
        if not isinstance(values, dict):
            fail(f"{path}: must hold one JSON object, of flag names and values")
        for name in values:
            if f"--{name}" not in self._option_string_actions:  # the names of flags, and other names they go by
                fail(f"{path}: '{name}': {self.objection(name)}")
        return [f"--{name}={value}" for name, value in values.items() if value is not None]


# ---- Log and progress ----------------------------------------------------------------------------------------------------


def set_up_logging() -> None:
    """Our messages on standard error; libraries speak up through handlers of their own, from warnings on."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    # Said at every start; requirements.txt pins the release for that reason and the documentation explains it.
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax; what fails there is reported here
    flax_logger = logging.getLogger("transformers.modeling_flax_utils")
    flax_logger.addFilter(lambda record: "classes are deprecated" not in record.getMessage())


@functools.cache
def log_once(message: str, *args) -> None:
    logger.warning(message, *args)


def progress_bar(**kwargs) -> tqdm:
    """A bar on standard error: lively on a terminal; in a log file a line a minute, and none for what is done sooner."""
    if not sys.stderr.isatty():
        bar_format = "{desc}: {n_fmt} of {total_fmt} ({elapsed} so far, {remaining} to go)\n"
        kwargs |= {"mininterval": 60, "maxinterval": 60, "delay": 60, "bar_format": bar_format}
    return tqdm(leave=False, dynamic_ncols=True, **kwargs)


def log_above_bars() -> contextlib.AbstractContextManager:
    """Within this context lines of the log are written above the progress bars of a terminal, not through them."""
    return logging_redirect_tqdm([logger] if sys.stderr.isatty() else [])
