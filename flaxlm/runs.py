# SPDX-License-Identifier: Apache-2.0
"""What a run keeps between its steps: where it is, what is due, log, saves, uploads, and the signal to stop."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
from transformers import PreTrainedTokenizerBase

from flaxlm import (
    arguments,
    batches,
    cards,
    checkpoints,
    cli,
    corpus,
    files,
    generation,
    hub,
    logs,
    outputs,
    processes,
    sharding,
)


class Run:
    """Used by the loop of a script, which has the state and calls the steps:

        with run:                                  # SIGTERM and SIGINT ask it to stop, from here on
            state = run.start(state)               # or the one of a checkpoint
            with run.training():                   # stopped within, it saves; at the end it saves too
                for batch in ...:
                    run.begin_step()
                    state, metrics = p_train_step(state, batch.arrays, dropout_rng)
                    run.end_step(state, metrics, batch)
                    if run.is_due("save"):
                        run.save()
            run.finish()                           # results, model card, the last upload

    `step` counts completed updates; `position` is where a stream has been read to; `evaluations` are metrics by step, and
    `samples` what the model wrote then, of the last evaluation and of those since the last line of the log;
    `results` is what train_results.json and eval_results.json say. `script` is the path of the script, for its record.
    """

    def __init__(
        self,
        script: str,
        args: arguments.Arguments,
        data: corpus.Corpus,
        plan: batches.Plan,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        uploads: hub.Hub | None,
    ):
        self.script, self.args, self.data, self.plan = script, args, data, plan
        self.model, self.tokenizer, self.hub = model, tokenizer, uploads
        self.stop, self.exits = processes.StopSignal(), contextlib.ExitStack()
        self.saver: checkpoints.Saver | None = None
        self.log: logs.TrainingLog | None = None
        self.points: logs.Points | None = None
        self.state: sharding.TrainState | None = None
        self.step, self.position = 0, None
        self.evaluations: dict[int, dict[str, float]] = {}
        self.samples: dict[int, list[generation.Sample]] = {}
        self.results: dict[str, float] = {}
        self.unwritten: list[str] = []  # files that could not be written

    def __enter__(self) -> "Run":
        self.exits.enter_context(contextlib.closing(outputs.OutputDir(self.args.training)))
        self.exits.enter_context(self.stop)
        self.exits.enter_context(cli.log_above_bars())
        if not self.args.training.do_train:  # the record of the training that may be there stays
            self.write("eval_info.json", cards.run_info(self.script, self.args))
        return self

    def __exit__(self, *exception) -> None:
        self.exits.close()

    def start(self, state: sharding.TrainState) -> sharding.TrainState:
        """The state to train from: the one given or, with --resume_from_checkpoint, the one of a checkpoint."""
        training_args, progress = self.args.training, None
        identity = checkpoints.run_identity(self.args, self.model.config, self.plan, self.data.identity)
        self.saver = checkpoints.Saver(training_args, self.model, self.tokenizer, identity, self.hub)
        if training_args.resume_from_checkpoint:
            resume_from, output_dir = training_args.resume_from_checkpoint, training_args.output_dir
            state, progress = checkpoints.restore(resume_from, output_dir, state, identity)
            cli.logger.info("Resuming after step %d", progress["step"])
        self.write("run_info.json", cards.run_info(self.script, self.args))
        self.points = logs.open_training_points(training_args.output_dir, progress)
        self.log = logs.TrainingLog(training_args, self.plan, self.points)
        if progress:
            self.log.resume(progress)
            self.saver.resume(progress["step"])
            self.evaluations = {int(step): metrics for step, metrics in progress["evaluations"].items()}
            self.take_up_samples(progress)
            self.position = progress["positions"][self.plan.process_index]
        self.state, self.step = state, int(state.step)
        return state

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Around the loop: the state is saved at its end, also when it is told to stop.

        Raises:
            Stopped: it was told to stop; the state is saved.
            NonFiniteError: training diverged.
        """
        try:
            yield
            self.log.fetch()
        except processes.Stopped:
            self.log.fetch()
            self.log.stopwatch.stop()
            self.save()
            self.saver.wait()
            self.saver.check()
            if self.hub and self.args.training.hub_strategy != "end":
                self.hub.push(self.step, final=True)
            raise
        finally:
            self.log.close()
            self.saver.wait()
        self.save()
        self.saver.wait()
        self.results |= self.log.results(self.data.num_train_rows)
        self.write("train_results.json", self.results)

    def begin_step(self) -> None:
        """Raise Stopped if all processes were told to stop; the clock of training runs from here on."""
        if self.log.stopwatch.started is None:
            self.log.stopwatch.start()
        self.stop.check(self.log.stop_agreed)

    def end_step(self, state: sharding.TrainState, metrics: Mapping[str, jax.Array], batch: batches.DeviceBatch) -> None:
        """Take what a step gave. Its metrics are fetched at the next step, or now if something is due, which is not timed."""
        self.step, self.state, self.position = self.step + 1, state, batch.position
        self.log.add(self.step, metrics, batch.num_tokens)
        if self.is_due("eval") or self.is_due("save"):
            self.log.fetch()
            self.log.stopwatch.stop()

    def is_due(self, what: Literal["eval", "save", "last eval"]) -> bool:
        """After this step? What is evaluated already is not due; nor is the last save, which `training` makes."""
        training_args = self.args.training
        if what == "save":
            return self.step % training_args.save_steps == 0 and self.step < self.plan.num_steps
        if not training_args.do_eval or self.step in self.evaluations:
            return False
        at_intervals = training_args.eval_steps and self.step > 0 and self.step % training_args.eval_steps == 0
        return what == "last eval" or bool(at_intervals)

    def report(self, metrics: dict[str, float], samples: Sequence[generation.Sample] = ()) -> None:
        """Note the metrics of an evaluation, and what the model wrote, in the log and in TensorBoard."""
        self.evaluations[self.step] = metrics
        figures = ", ".join(f"{name[5:]} {value:.4f}" for name, value in metrics.items())
        cli.logger.info("evaluation at step %d: %s", self.step, figures)
        points = None if self.is_reported(next(iter(metrics))) else self.points
        if samples:
            self.report_samples(list(samples), points)
        if points:
            points.add(self.step, metrics)
            points.flush()

    def report_samples(self, samples: list[generation.Sample], points: logs.Points | None) -> None:
        """Note what the model wrote: its beginning in the log, all of it in samples.json and in TensorBoard."""
        first = self.first_unwritten(self.log.progress()) if self.log else self.step
        self.samples = {step: found for step, found in self.samples.items() if step >= first} | {self.step: samples}
        for sample in samples:
            cli.logger.info("  %s | %s", *map(generation.in_a_line, sample))
        self.write("samples.json", {"step": self.step, "samples": [sample._asdict() for sample in samples]})
        if points:
            points.add_text(self.step, "samples", generation.markdown(samples))

    def first_unwritten(self, progress: Mapping[str, Any]) -> int:
        """The first step whose points are struck out if a run goes on from here: those before the last log line stay."""
        window = progress["window"]
        return window[0]["step"] if window else progress.get("step", self.step) + 1

    def take_up_samples(self, progress: Mapping[str, Any]) -> None:
        """What was written before the checkpoint; into TensorBoard what was struck out there."""
        found = progress.get("samples", {})  # older checkpoints have none
        self.samples = {int(step): [generation.Sample(*sample) for sample in samples] for step, samples in found.items()}
        for step, samples in self.samples.items():
            if step >= self.first_unwritten(progress):
                self.points.add_text(step, "samples", generation.markdown(samples))

    def is_reported(self, name: str) -> bool:
        """Has a run that was finished already, and is resumed, written this point of its last evaluation?"""
        is_resumed = self.saver is not None and self.saver.resumed_step == self.step == self.plan.num_steps
        return is_resumed and processes.is_main() and logs.has_point(self.args.training.output_dir, name, self.step)

    def save(self) -> None:
        """Save the state after this step and the model, in the background; an upload follows."""
        progress = {"positions": processes.gather_json(self.position), "evaluations": self.evaluations}
        progress["samples"] = {step: [list(sample) for sample in samples] for step, samples in self.samples.items()}
        self.saver.save(self.step, self.state, self.log.progress() | progress)

    def finish(self) -> None:
        """Write what there is to say at the end, upload, and tell by an error if the last state is not where it should be."""
        if self.args.training.do_eval:
            self.write("eval_results.json", self.evaluations[self.step])
            self.results |= self.evaluations[self.step]
        if self.points:
            self.points.close()
        if self.log and processes.is_main():
            repo_id, curve = self.hub and self.hub.repo_id, self.log.curve
            with self.noting("README.md"):
                evaluations, samples = self.evaluations, self.samples.get(max(self.samples, default=0), [])
                cards.write_model_card(self.script, self.args, self.model, curve, self.results, evaluations, samples, repo_id)
        if self.hub:
            self.stop.promise = "leaving the upload unfinished"
            self.hub.push(self.step, final=True, stop=self.stop)
        self.check()

    def check(self) -> None:
        """Tell by an error if anything is not where it should be."""
        if self.saver:
            self.saver.check()
        if self.hub:
            self.hub.check()
        if self.unwritten or (self.points and self.points.failed):
            missing = [*self.unwritten, *["TensorBoard's points"] * bool(self.points and self.points.failed)]
            raise cli.Accident(f"not written in {self.args.training.output_dir}: {', '.join(missing)}; the log says why")

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file of output_dir, from process 0."""
        if processes.is_main():
            with self.noting(name):
                files.write_json(os.path.join(self.args.training.output_dir, name), values)

    @contextlib.contextmanager
    def noting(self, name: str) -> Iterator[None]:
        """A file that cannot be written is reported, and the run goes on."""
        try:
            yield
        except OSError as error:
            self.unwritten.append(name)
            cli.logger.error("%s could not be written: %s", name, error.strerror or cli.first_line(error))
