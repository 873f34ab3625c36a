# SPDX-License-Identifier: Apache-2.0
"""What a run keeps between its steps: where it is, what is due, log, saves, uploads, and the signal to stop."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    estimates,
    files,
    generation,
    hub,
    identity,
    logs,
    machines,
    outputs,
    processes,
    profiles,
    reporters,
    selection,
    sharding,
)


def how_to_go_on(training_args: arguments.TrainingArguments) -> str:
    is_the_same = training_args.resume_from_checkpoint == outputs.AUTO or not training_args.do_train
    return processes.AGAIN if is_the_same else processes.RESUME


def steps_in(directory: str) -> list[int]:
    """The steps of its checkpoints."""
    return [step for step, _ in outputs.find_checkpoints(directory)]


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
    `samples` what the model wrote then, of the last evaluation, of the best, and of those since the last line of the log;
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
        self.stop, self.exits = processes.StopSignal(how_to_go_on(args.training)), contextlib.ExitStack()
        self.saver: checkpoints.Saver | None = None
        self.log: logs.TrainingLog | None = None
        self.points: reporters.Reports | None = None
        self.state: sharding.TrainState | None = None
        self.step, self.position = 0, None
        self.evaluations: dict[int, dict[str, float]] = {}
        self.lost: set[int] = set()  # of those the steps whose states are not there, as where nobody asked for the best
        self.changes: list[dict[str, Any]] = []  # of flags in resumed runs, each with the step at which it was made
        self.samples: dict[int, list[generation.Sample]] = {}
        self.results: dict[str, float] = {}
        self.profile = profiles.Profile(args.training, plan.num_steps)
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
        current = identity.of_run(self.args, self.model.config, self.tokenizer, self.plan, self.data.identity)
        self.saver = checkpoints.Saver(training_args, self.model, self.tokenizer, current.values, self.hub)
        if training_args.resume_from_checkpoint:
            resume_from, output_dir = training_args.resume_from_checkpoint, training_args.output_dir
            state, progress, path = checkpoints.restore(resume_from, output_dir, state, current)
            self.resume(progress, path)
        self.write("run_info.json", cards.run_info(self.script, self.args, self.changes))
        self.points = reporters.open_reports(self.args, self.model.config, progress)
        self.exits.callback(self.points.close)
        self.exits.callback(self.profile.close)
        self.log = logs.TrainingLog(training_args, self.plan, self.points)
        if progress:
            self.log.resume(progress)
            self.take_up_samples(progress)
        self.state, self.step = state, int(state.step)
        if self.is_over() and self.step < self.plan.num_steps:
            self.tell_why_it_is_over("; a higher --early_stopping_patience goes on from here")
        return state

    def resume(self, progress: Mapping[str, Any], path: str) -> None:
        """Take up what a checkpoint tells of the run."""
        cli.logger.info("Resuming after step %d", progress["step"])
        self.evaluations = {int(step): metrics for step, metrics in progress["evaluations"].items()}
        positions, self.changes = progress["positions"], progress["changes"]
        # Another number of processes has other parts of a stream, which is another one then.
        self.position = positions[self.plan.process_index] if len(positions) == self.plan.num_processes else None
        for change in self.changes[-1:] if self.changes and self.changes[-1]["step"] == progress["step"] else []:
            for name, (then, now) in change["changes"].items():
                cli.logger.warning("%s is %s from here on, it was %s (--resume_changes).", name, now, then)
            if any(positions) and identity.changes_text(change["changes"], self.args.data):
                cli.logger.warning("The stream of texts is another one: it is read from its beginning.")
                self.position = None
        self.saver.resume(progress["step"])
        self.profile.resume(progress["step"])
        if self.args.training.load_best_model_at_end:
            source, output_dir = os.path.dirname(path), self.args.training.output_dir
            self.lost = self.evaluations.keys() - set(processes.gather_json(steps_in(source) + steps_in(output_dir))[0])
            if self.best_step() != (best := self.best_of(self.evaluations)):
                cli.logger.warning("The state of the best evaluation so far, step %s, was not kept.", best)
            checkpoints.take_along(self.best_step(), source, output_dir)

    def measure(self, script: estimates.Script) -> None:
        """Count the model's arithmetic, so that the log tells how much of the devices' speed it uses, if that is known.

        It takes a second or more, and none where the speed is not known: on a CPU.
        """
        machine = machines.this()
        peak_flops = machine.peak_flops.get(self.args.model.dtype)
        if peak_flops:
            flops_per_device, _ = estimates.count_flops(self.args, script)
            num_devices = len(machine.devices)
            self.log.speed = logs.Speed(flops_per_device * num_devices, num_devices, peak_flops)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Around the loop: the state is saved at its end, also when it is told to stop.

        Raises:
            Stopped: it was told to stop; the state is saved.
            NonFiniteError: training diverged.
        """
        try:
            yield
            self.log.finish(self.step)
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
        self.results |= self.log.results(self.step, self.data.num_train_rows)
        self.write("train_results.json", self.results)

    def begin_step(self) -> None:
        """Raise Stopped if all processes were told to stop; the clock of training runs from here on."""
        if self.log.stopwatch.started is None:
            self.log.stopwatch.start()
        self.stop.check(self.log.stop_agreed)
        self.profile.begin(self.step + 1, self.state, self.log.stopwatch)

    def end_step(self, state: sharding.TrainState, metrics: Mapping[str, jax.Array], batch: batches.DeviceBatch) -> None:
        """Take what a step gave. Its metrics are fetched at the next step, or now if something is due, which is not timed."""
        self.step, self.state, self.position, self.stop.has_gained = self.step + 1, state, batch.position, True
        self.profile.end(self.step, state, self.log.stopwatch)
        self.log.add(self.step, metrics, batch.num_tokens, batch.rows_by_corpus)
        if self.is_due("eval") or self.is_due("save"):
            self.log.fetch()
            self.log.stopwatch.stop()

    def is_due(self, what: Literal["eval", "save", "last eval"]) -> bool:
        """After this step? What is evaluated already is not due; nor is the last save, which `training` makes."""
        training_args = self.args.training
        if what == "save":
            may_be_best = training_args.load_best_model_at_end and self.step in self.evaluations
            is_best = may_be_best and self.step == self.best_step()
            return (self.step % training_args.save_steps == 0 or is_best) and self.step < self.plan.num_steps
        if not training_args.do_eval or self.step in self.evaluations:
            return False
        at_intervals = training_args.eval_steps and self.step > 0 and self.step % training_args.eval_steps == 0
        return what == "last eval" or bool(at_intervals)

    def check_metrics(self, metrics: Mapping[str, float]) -> None:
        """Before training: refuse to choose the best model by what evaluations, of which this is one, don't have."""
        selection.check_metric(self.args.training, metrics)

    def is_over(self) -> bool:
        """Have evaluations stopped getting better, as far as --early_stopping_patience goes?"""
        return self.step in self.evaluations and selection.should_stop(self.args.training, self.evaluations)

    def best_step(self) -> int | None:
        """The step of the best evaluation so far whose state can be had."""
        return self.best_of(self.evaluations.keys() - self.lost)

    def best_of(self, steps: Iterable[int]) -> int | None:
        """The one of these steps whose evaluation was the best."""
        there = {step: self.evaluations[step] for step in steps if step in self.evaluations}
        return selection.best_step(self.args.training, there)

    def report(self, metrics: dict[str, float], samples: Sequence[generation.Sample] = ()) -> None:
        """Note the metrics of an evaluation, and what the model wrote, in the log and to the reporters."""
        self.evaluations[self.step] = metrics
        figures = ", ".join(f"{name[5:]} {value:.4f}" for name, value in metrics.items())
        cli.logger.info("evaluation at step %d: %s", self.step, figures)
        points = None if self.is_reported(next(iter(metrics))) else self.points
        if samples:
            self.report_samples(list(samples), points)
        if points:
            points.add(self.step, metrics)
            points.flush(through=None if self.log.window else self.step)  # a window is written at its log line
        if self.is_over() and self.saver:
            self.tell_why_it_is_over()

    def tell_why_it_is_over(self, advice: str = "") -> None:
        """That patience has run out, and what the best was."""
        name, best = selection.metric_name(self.args.training), self.best_of(self.evaluations)
        value = self.evaluations.get(best, {}).get(name, float("nan"))
        line = "Stopping early: %d evaluation(s) in a row not better; the best %s was %.4f, at step %s%s"
        cli.logger.info(line, self.args.training.early_stopping_patience, name[5:], value, best, advice)

    def report_samples(self, samples: list[generation.Sample], points: reporters.Reports | None) -> None:
        """Note what the model wrote: its beginning in the log, all of it in samples.json and to the reporters."""
        first = self.first_unwritten(self.log.progress()) if self.log else self.step
        kept = {step for step in self.samples if step >= first or step == self.best_step()}
        self.samples = {step: self.samples[step] for step in sorted(kept)} | {self.step: samples}
        for sample in samples:
            cli.logger.info("  %s | %s", *map(generation.in_a_line, sample))
        self.write_samples(self.step)
        if points:
            points.add_text(self.step, "samples", generation.markdown(samples))

    def write_samples(self, step: int) -> None:
        """samples.json: what the model of this step wrote, if that is kept."""
        if step in self.samples:
            self.write("samples.json", {"step": step, "samples": [sample._asdict() for sample in self.samples[step]]})

    def first_unwritten(self, progress: Mapping[str, Any]) -> int:
        """The first step whose points are struck out if a run goes on from here: those before the last log line stay."""
        window = progress["window"]
        return window[0]["step"] if window else progress.get("step", self.step) + 1

    def take_up_samples(self, progress: Mapping[str, Any]) -> None:
        """What was written before the checkpoint; to the reporters what was struck out there."""
        found = progress.get("samples", {})  # older checkpoints have none
        self.samples = {int(step): [generation.Sample(*sample) for sample in samples] for step, samples in found.items()}
        for step, samples in self.samples.items():
            if step >= self.first_unwritten(progress):
                self.points.add_text(step, "samples", generation.markdown(samples))

    def is_reported(self, name: str) -> bool:
        """Has a run that was finished already, and is resumed, written this point of its last evaluation?"""
        is_resumed = self.saver is not None and self.saver.resumed_step == self.step == self.plan.num_steps
        return is_resumed and processes.is_main() and reporters.has_point(self.args.training.output_dir, name, self.step)

    def save(self) -> None:
        """Save the state after this step and the model, in the background; an upload follows."""
        positions = processes.gather_json(self.position)
        progress = {"positions": positions, "evaluations": self.evaluations, "changes": self.changes}
        progress["samples"] = {step: [list(sample) for sample in samples] for step, samples in self.samples.items()}
        best_step = None
        if self.args.training.load_best_model_at_end:
            self.saver.wait()  # a save that failed has left nothing that could be kept
            best_step = self.best_of([*steps_in(self.args.training.output_dir), self.step])
        self.saver.save(self.step, self.state, self.log.progress() | progress, best_step)

    def finish(self) -> None:
        """Write what there is to say at the end, upload, and tell by an error if the last state is not where it should be."""
        chosen = self.choose() if self.args.training.load_best_model_at_end and self.saver else self.step
        if self.args.training.do_eval:
            self.write("eval_results.json", self.evaluations[chosen])
            self.results |= self.evaluations[chosen]
        if self.points:
            self.points.close()
        if self.log and processes.is_main():
            repo_id, curve = self.hub and self.hub.repo_id, self.log.curve
            with self.noting("README.md"):
                num_params = sum(array.size for array in jax.tree.leaves(self.state.params))
                evaluations, samples = self.evaluations, self.samples.get(chosen, [])
                cards.write_model_card(
                    self.script, self.args, self.model, num_params, curve, self.results, evaluations, self.changes, samples,
                    repo_id,
                )  # fmt: skip
        if self.hub:
            self.stop.promise = "leaving the upload unfinished"
            self.hub.push(self.step, final=True, stop=self.stop)
        self.check()

    def choose(self) -> int:
        """Make the best weights the model, of those that were evaluated and are still there; the step they are of."""
        # Process 0 may remove some while others look.
        chosen = self.best_of(processes.gather_json(steps_in(self.args.training.output_dir))[0])
        if chosen is None:
            cli.logger.warning("No evaluation of a state that was saved gave a number: the model is that of the last step.")
            return self.step
        if chosen != (best := self.best_of(self.evaluations)):
            cli.logger.warning("The state of the best evaluation, step %s, was not saved.", best)
        if chosen != self.step:
            self.saver.choose(chosen, self.state.params)
            self.write_samples(chosen)
        name = selection.metric_name(self.args.training)
        cli.logger.info("The model is that of step %d: %s %.4f", chosen, name[5:], self.evaluations[chosen][name])
        self.results |= {"best_step": chosen}
        self.write("train_results.json", self.results)
        return chosen

    def check(self) -> None:
        """Tell by an error if anything is not where it should be."""
        if self.saver:
            self.saver.check()
        if self.hub:
            self.hub.check()
        missing = [*self.unwritten, *["TensorBoard's points"] * bool(self.points and "tensorboard" in self.points.failed)]
        if missing:  # a server that keeps points for others is no part of the results
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
