# SPDX-License-Identifier: Apache-2.0
"""A trace of some steps of training, for the profiler of TensorBoard."""

import logging
import os
import re
from typing import Any, Protocol

import jax

from flaxlm import arguments, cli, processes

logger = logging.getLogger(__name__)
DIRECTORY = os.path.join("plugins", "profile")  # in output_dir, where TensorBoard looks


class Clock(Protocol):
    """What is stopped while a trace is begun and written."""

    def start(self) -> None: ...
    def stop(self) -> None: ...


def parse(text: str | None) -> tuple[int, int] | None:
    """First and last step, both included, of --profile_steps 10:13."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        cli.fail(f"--profile_steps {text}: must be first:last, as 10:13, two numbers of steps from 1 on, the last one included")
    return int(match[1]), int(match[2])


def check(training_args: arguments.TrainingArguments, num_steps: int) -> None:
    """Refuse steps that a run of so many does not have."""
    steps = parse(training_args.profile_steps)
    if steps and not training_args.do_train:
        cli.fail(f"--profile_steps {training_args.profile_steps}: traces steps of training; add --do_train or drop the flag")
    if steps and steps[1] > num_steps:
        cli.fail(f"--profile_steps {training_args.profile_steps}: the run ends with step {num_steps}")


class Profile:
    """The trace of --profile_steps, written by process 0: what its host and devices do from the start of the first step to
    the end of the last one. The devices are waited for at both ends. A trace that fails is told of; training goes on.
    """

    def __init__(self, training_args: arguments.TrainingArguments, num_steps: int):
        check(training_args, num_steps)
        steps = parse(training_args.profile_steps) if training_args.do_train and processes.is_main() else None
        self.output_dir, self.first, self.last = training_args.output_dir, *(steps or (0, 0))
        self.annotation: jax.profiler.StepTraceAnnotation | None = None
        self.is_running = False

    def resume(self, step: int) -> None:
        """Go on after this step; what is over then cannot be traced."""
        if self.first and step >= self.first:
            logger.warning("--profile_steps %d:%d: step %d is over; nothing is traced", self.first, self.last, step)
            self.first = 0

    def begin(self, step: int, state: Any, clock: Clock) -> None:
        """Before a step is dispatched."""
        if step == self.first:
            jax.block_until_ready(state)
            clock.stop()
            try:
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # each call of Python would be noted, which makes the host several times slower
                jax.profiler.start_trace(self.output_dir, profiler_options=options)
                self.is_running = True
            except Exception as error:
                logger.error("--profile_steps: no trace: %s", cli.first_line(error))
            clock.start()
        if self.is_running:  # by its name TensorBoard knows the steps
            self.annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
            self.annotation.__enter__()

    def end(self, step: int, state: Any, clock: Clock) -> None:
        """After a step has been dispatched."""
        if self.annotation:
            self.annotation.__exit__(None, None, None)
            self.annotation = None
        if self.is_running and step == self.last:
            jax.block_until_ready(state)
            clock.stop()
            self.close()

    def close(self) -> None:
        """End the trace and write it, also where the run was stopped within it."""
        if not self.is_running:
            return
        self.is_running = False
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            logger.error("--profile_steps: the trace could not be written: %s", cli.first_line(error))
            return
        where = os.path.join(self.output_dir, DIRECTORY)
        logger.info("Trace of steps %d to %d in %s; to look at it: pip install xprof; xprof --logdir %s", self.first,
                    self.last, where, self.output_dir)  # fmt: skip
