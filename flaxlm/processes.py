# SPDX-License-Identifier: Apache-2.0
"""Several processes that train together: joining them, who goes first, gathering; and being told to stop, all at one step."""

import contextlib
import importlib.util
import json
import logging
import os
import signal
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import flaxlm
from flaxlm import arguments, cli

logger = logging.getLogger(__name__)


def join(training_args: arguments.TrainingArguments) -> None:
    """Join the other processes, if this run has several. Must come before anything else touches a device."""
    if training_args.compile_for and training_args.compile_for != "this":
        jax.config.update("jax_platforms", "cpu")  # another machine is compiled for; its plugins must not look for it here
        return
    check_platforms(os.environ.get("JAX_PLATFORMS", ""))
    if not (training_args.multihost or training_args.coordinator_address):
        return
    if "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = training_args.coordinator_address
    try:
        jax.distributed.initialize(address, training_args.num_processes, training_args.process_id)
    except (ValueError, RuntimeError) as error:
        cli.fail(f"--multihost: the processes do not find each other: {cli.first_line(error)}")
    handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGTERM, handler)  # jax has put one in its place that only takes notice
    logger.info("Process %d of %d, with %d device(s)", jax.process_index(), jax.process_count(), jax.local_device_count())
    if jax.process_index() > 0:
        cli.logger.setLevel(logging.WARNING)


# What jax needs beside itself for a platform: one of these packages, and how to get it.
PLUGINS = {
    "cuda": (("jax_cuda12_plugin", "jax_cuda13_plugin"), "jax[cuda12]"),
    "rocm": (("jax_rocm60_plugin", "jax_rocm7_plugin"), "jax[rocm]"),
    "tpu": (("libtpu",), "jax[tpu]"),
}


def check_platforms(platforms: str) -> None:
    """Refuse JAX_PLATFORMS that jax cannot serve; it would end in an assertion, after the text has been prepared."""
    for platform in filter(None, platforms.split(",")):
        packages, extra = PLUGINS.get("cuda" if platform == "gpu" else platform, ((), ""))
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            install = f'pip install -U "{extra}=={jax.__version__}"'
            cli.fail(f"JAX_PLATFORMS={platforms}: jax has no support for {platform} here; {install}, or unset the variable")


def devices() -> list[jax.Device]:
    """All devices of all processes; that there are none is told in a line."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        what = f"JAX_PLATFORMS={platforms}" if platforms else "jax"
        cli.fail(f"{what}: no device can be used: {cli.first_line(error)}; check the driver, or set JAX_PLATFORMS=cpu")


@contextlib.contextmanager
def main_first():
    """Let process 0 go through first, so that the others find what it put into a cache they share."""
    if jax.process_count() > 1 and jax.process_index() > 0:
        multihost_utils.sync_global_devices("process 0 first")
    yield
    if jax.process_count() > 1 and jax.process_index() == 0:
        multihost_utils.sync_global_devices("process 0 first")


def is_main() -> bool:
    """Is this the process that writes files, uploads and talks?"""
    return jax.process_index() == 0


def gather_json(value: Any) -> list[Any]:
    """The values of all processes, in order, on each of them."""
    if jax.process_count() == 1:
        return [value]
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(encoded)))
    padded = multihost_utils.process_allgather(np.pad(encoded, (0, sizes.max() - len(encoded))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(padded, sizes, strict=True)]


def gather_rows(rows: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The rows of all processes, in order of the processes, on each of them."""
    if jax.process_count() == 1:
        return rows
    sizes = multihost_utils.process_allgather(np.array(len(rows["input_ids"])))
    gathered = {}
    for name, array in rows.items():
        parts = multihost_utils.process_allgather(np.pad(array, ((0, sizes.max() - len(array)), (0, 0))))
        gathered[name] = np.concatenate([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return gathered


RESUME = "to go on, run the same command with --resume_from_checkpoint"
AGAIN = "to go on, run the same command again"


class StopSignal:
    """SIGTERM and SIGINT ask the run to save and end; a second SIGINT ends it at once.

    `promise` is what is said then that the run will do; who does something else for a while says so here. `advice` says at
    the end how to go on. `has_gained` is set when a step has been made: the run is further than when it was started.
    """

    def __init__(self, advice: str = RESUME):
        self.requested, self.previous, self.advice, self.has_gained = 0, {}, advice, False
        self.promise = "finishing the step, then saving"

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self.previous[signum] = signal.signal(signum, self.handle)
        return self

    def __exit__(self, *exception) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def check(self, agreed: bool) -> None:
        """Raise Stopped if all processes agreed to stop; a single process has nobody to ask."""
        if agreed or (self.requested and jax.process_count() == 1):
            raise Stopped(self.requested or signal.SIGTERM, self.advice, self.has_gained)

    def handle(self, signum: int, frame) -> None:
        if self.requested and signum == signal.SIGINT:
            os._exit(128 + signum)
        self.requested = signum
        logger.warning("%s: %s. Interrupt again to end at once.", signal.Signals(signum).name, self.promise)


class Stopped(cli.Ending):
    """The run was told to stop, and all processes know it.

    By a scheduler, before it made a step, it ends with another status: after as long it would get no further the next time.
    """

    def __init__(self, signum: int, advice: str = RESUME, has_gained: bool = True):
        for_nothing = signum == signal.SIGTERM and not has_gained
        super().__init__(f"stopped as asked{', before its first step: it needs more time' if for_nothing else ''}; {advice}")
        self.status = flaxlm.NOTHING_GAINED if for_nothing else 128 + signum
