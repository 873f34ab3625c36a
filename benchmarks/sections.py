# SPDX-License-Identifier: Apache-2.0
"""What `make results` measures, section by section: the commands that are run, and the figures that are kept of each."""

import importlib.util
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import ROOT

OBJECTIVES = ("mlm", "clm", "t5", "bart", "nsp")
SEEDS = (42, 1, 2)
POINTS_OF_A_CURVE = 100


class FailedError(Exception):
    """A command of a section ended otherwise than it should."""


class Runner(NamedTuple):
    """How commands are run."""

    directory: Path  # for their output, logs and figures
    quick: bool = False  # shows that all of it works, in a minute or two; the figures say nothing

    def run(self, argv: Sequence[str], name: str, may_fail: bool = False) -> float:
        """Run a command in the checkout, its output in a log file of that name; returns its seconds."""
        log = self.directory / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        shown = " ".join("python" if word == sys.executable else word for word in argv)
        print(f"  {time.strftime('%H:%M:%S')}  {shown}", file=sys.stderr, flush=True)
        environment = os.environ.copy()
        if sys.platform == "linux":  # as the Makefile does
            environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        started = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(argv, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode and not may_fail:
            last = log.read_text("utf-8", errors="replace").splitlines()[-15:]
            raise FailedError(f"exit status {done.returncode}: {shown}\n" + "\n".join(f"    {line}" for line in last))
        return time.monotonic() - started

    def figures(self, name: str, script: str, *flags: str) -> Any:
        """What a benchmark writes with --json."""
        path = self.directory / f"{name}.json"
        path.unlink(missing_ok=True)
        self.run([sys.executable, f"benchmarks/{script}.py", *flags, "--json", str(path)], name)
        return json.loads(path.read_text())


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and most."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# ---- Quick starts ----


def quickstart_target(objective: str) -> str:
    return "quickstart" if objective == "mlm" else f"quickstart-{objective}"


def quickstart_commands(objective: str) -> list[list[str]]:
    """The commands of a quick start as the Makefile has them, the libraries taken to be installed."""
    make = ["make", "--dry-run", "--no-print-directory", "--assume-old=.venv/runtime", f"RUN={sys.executable}"]
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        [*make, quickstart_target(objective)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    commands = [command for command in commands if command[:1] == [sys.executable]]
    if done.returncode or not any(is_training(command) for command in commands):
        raise FailedError(f"make --dry-run {quickstart_target(objective)}: names no script that trains\n{done.stderr}")
    return commands


def is_training(command: list[str]) -> bool:
    return command[1].startswith("run_")


def replace_flag(command: list[str], flag: str, value: str) -> list[str]:
    """The command with another value behind a flag, which is added where it is missing."""
    if flag not in command:
        return [*command, flag, value]
    place = command.index(flag) + 1
    return [*command[:place], value, *command[place + 1 :]]


def shorten(training: list[str]) -> list[str]:
    """The command that trains, for a few steps only."""
    settings = json.loads((ROOT / training[2]).read_text("utf-8")) if training[2].endswith(".json") else {}
    lengths = {"max_steps": 20, "warmup_steps": 2, "eval_steps": 10, "save_steps": 10, "logging_steps": 5}
    lengths |= {"max_eval_samples": 64} | ({"num_decay_steps": 5} if "num_decay_steps" in settings else {})
    for name, value in lengths.items():
        training = replace_flag(training, f"--{name}", str(value))
    return training


def measure_quickstart(objective: str, runner: Runner) -> dict[str, Any]:
    """The quick start with three seeds: text, tokenizer and configuration are made once, the rest for each.

    Seconds are those that `make` would take with this seed. Measures are what the last command says with --results_file, the
    first of them being the one to show; curves are the run's own points.
    """
    commands = quickstart_commands(objective)
    (place,) = (i for i, command in enumerate(commands) if is_training(command))
    preparing, training, showing = commands[:place], commands[place], commands[place + 1 :]
    seconds_to_prepare = sum(runner.run(command, f"{objective}-prepare-{i}") for i, command in enumerate(preparing))
    found: dict[str, Any] = {"command": f"make {quickstart_target(objective)}", "seconds_to_prepare": seconds_to_prepare}
    found["seeds"] = {}
    for seed in SEEDS[:2] if runner.quick else SEEDS:
        model_dir = runner.directory / f"{objective}-{seed}"
        results_file = runner.directory / f"{objective}-{seed}.json"
        results_file.unlink(missing_ok=True)
        command = replace_flag(training, "--seed", str(seed))
        command = replace_flag(command, "--output_dir", os.path.relpath(model_dir, ROOT))
        if runner.quick:
            command = shorten(command)
        seconds_to_train = runner.run(command, f"{objective}-{seed}-train")
        seconds = seconds_to_prepare + seconds_to_train
        for i, command in enumerate(showing):
            command = replace_flag(command, "--model_dir", os.path.relpath(model_dir, ROOT))
            command = replace_flag(command, "--results_file", str(results_file))
            # A model that is hardly better than the baseline is an error to these programs. Here it is a result.
            seconds += runner.run(command, f"{objective}-{seed}-show-{i}", may_fail=True)
        found["seeds"][str(seed)] = {"seconds": seconds, "seconds_to_train": seconds_to_train}
        found["seeds"][str(seed)] |= read_measures(results_file) | {"curve": read_curve(model_dir)}
        if "model" not in found:
            found["model"] = describe_model(model_dir)
        for path in model_dir.glob("checkpoint-*"):
            shutil.rmtree(path)
    return found


def read_measures(path: Path) -> dict[str, Any]:
    """Of {"measures": [{"name", "model", "baseline", "baseline_name"}, ...]}, which the program that shows a model writes.

    With a number "baseline_loss" in each, nats per token, the curves can be drawn beside the baseline.
    """
    try:
        measures = json.loads(path.read_text())["measures"]
        for measure in measures:
            float(measure["model"]), float(measure["baseline"]), str(measure["name"]), str(measure["baseline_name"])
        measures[0]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise FailedError(f"{path}: holds no measures: {type(error).__name__}: {error}") from None
    return {"measures": measures}


def read_curve(model_dir: Path) -> dict[str, list]:
    """Points of the run's event files: training loss, averaged over as many steps as make a hundred points, and evaluations.

    train: [last step of a stretch, mean loss]; eval_loss, eval_accuracy and others: [step, value]. Nats per token.
    """
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(model_dir), size_guidance={TENSORS: 0})
    events.Reload()
    points = {}
    for tag in events.Tags()["tensors"]:
        if tag == "train_loss" or (tag.startswith("eval_") and ("loss" in tag or "accuracy" in tag)):
            by_step = {event.step: float(make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)}
            points[tag] = sorted(map(list, by_step.items()))
    losses = points.pop("train_loss", [])
    if not losses:
        raise FailedError(f"{model_dir}: there is no train_loss in its event files")
    stretch = -(-len(losses) // POINTS_OF_A_CURVE)
    stretches = [losses[i : i + stretch] for i in range(0, len(losses), stretch)]
    return {"train": [[part[-1][0], statistics.fmean(loss for _, loss in part)] for part in stretches]} | points


def describe_model(model_dir: Path) -> dict[str, Any]:
    """What was trained: type, layers of encoder and decoder, width, weights; steps, rows in a batch, tokens in a row."""
    from flax.serialization import msgpack_restore
    from flax.traverse_util import flatten_dict
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_dir)
    weights = flatten_dict(msgpack_restore((model_dir / "flax_model.msgpack").read_bytes()))
    arguments = json.loads((model_dir / "run_info.json").read_text())["arguments"]
    layers = [config.num_hidden_layers]
    if config.is_encoder_decoder:
        layers.append(getattr(config, "decoder_layers", None) or config.num_decoder_layers)
    tokens = next(arguments[name] for name in ("block_size", "max_seq_length") if arguments.get(name))
    rows = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    return {
        "type": config.model_type, "layers": layers, "width": config.hidden_size,
        "parameters": sum(array.size for array in weights.values()),
        "steps": arguments["max_steps"], "rows": rows, "tokens": tokens,
    }  # fmt: skip


# ---- Benchmarks ----


def measure_throughput(objective: str, runner: Runner) -> dict[str, Any]:
    """Our training loop and PyTorch's in turns, float32."""
    flags = ["--objective", objective, "--peer", "torch"]
    if runner.quick:
        flags += ["--torch_compile", "off", "--num_windows", "1", "--steps_per_window", "1", "--num_overhead_windows", "1"]
        flags += ["--batch_size", "2", "--seq_length", "64", "--vocab_size", "9000"]
    else:
        flags += ["--num_windows", "5", "--window_seconds", "3", "--num_overhead_windows", "3"]
    found = runner.figures(f"throughput-{objective}", "throughput", *flags)
    ours, torch = found["sides"]
    (ratios,) = found["ratios"].values()
    return {
        "command": shown("throughput", flags),
        "task": found["model"],
        "tokens_per_second": spread(ours["tokens_per_second"]),
        "torch_tokens_per_second": spread(torch["tokens_per_second"]),
        "torch": torch["name"].removeprefix("PyTorch, "),
        "ratio": spread(ratios),
        "loop_percent": spread(found["loop_overhead_percent"]["clock"]),
        "step_mib": ours["memory"][0] / 2**20,
    }


def measure_vocab_head(objective: str, runner: Runner) -> dict[str, Any]:
    flags = ["--objective", objective]
    if runner.quick:
        flags += ["--num_steps", "1", "--hidden_size", "64", "--num_hidden_layers", "1", "--batch_size", "2"]
    found = runner.figures(f"vocab_head-{objective}", "vocab_head", *flags)
    steps = {
        name: {"seconds": spread(step["seconds"]), "ratio": spread(step["ratios"]), "mib": step["mib"]}
        for name, step in found["steps"].items()
    }
    return {"command": shown("vocab_head", flags), "task": found["task"], "steps": steps}


def measure_host_pipeline(runner: Runner) -> dict[str, Any]:
    flags = ["--num_batches", "3", "--only", "mlm"] if runner.quick else []
    found = runner.figures("host_pipeline", "host_pipeline", *flags)
    rates = {name: {kind: spread(values) for kind, values in kinds.items()} for name, kinds in found.items()}
    return {"command": shown("host_pipeline", flags), "million_tokens_per_second": rates}


def measure_preprocessing(runner: Runner) -> dict[str, Any]:
    flags = ["--objective", "clm", "mlm", "--num_runs", "1"] + (["--megabytes", "2"] if runner.quick else [])
    rows = runner.figures("preprocessing", "preprocessing", *flags)
    return {"command": shown("preprocessing", flags), "rows": [row | {"seconds": spread(row["seconds"])} for row in rows]}


def measure_first_step(runner: Runner) -> dict[str, Any]:
    flags = ["--objective", *(("mlm",) if runner.quick else ("mlm", "t5")), "--num_runs", "1"]
    found = runner.figures("first_step", "time_to_first_step", *flags)
    rows = [
        {"objective": row["objective"], "cache": row["cache"]}
        | {name: statistics.median(run[name] for run in row["runs"]) for name in row["runs"][0]}
        for row in found
    ]
    return {"command": shown("time_to_first_step", flags), "rows": rows}


def measure_run_bert(runner: Runner) -> dict[str, Any]:
    """Its table: a row for a precision, the last column being the speed against the first row."""
    flags = ["--precision", "both", "--batch_size", "8", "--num_batches", "10"]
    if runner.quick:
        flags = ["--precision", "both", "--batch_size", "1", "--num_batches", "2", "--seq_length", "16"]
    seconds = runner.run([sys.executable, "run_bert_flax.py", *flags], "run_bert")
    words = [line.split() for line in (runner.directory / "logs" / "run_bert.log").read_text("utf-8").splitlines()]
    rows = [row for row in words if row[:1] in (["float32"], ["bfloat16"]) and len(row) == 6]
    if len(rows) != 2:
        raise FailedError("run_bert_flax.py: there are no two rows in its table")
    names = ("compile_seconds", "median_ms", "p90_ms", "examples_per_second", "ratio")
    precisions = {row[0]: dict(zip(names, map(float, row[1:]), strict=True)) for row in rows}
    return {"command": " ".join(["python run_bert_flax.py", *flags]), "seconds": seconds, "precisions": precisions}


def shown(script: str, flags: Sequence[str]) -> str:
    return " ".join([f"python benchmarks/{script}.py", *flags])


# ---- Machines that are not there ----

COMPILED = (
    ("v3-8",),
    ("v3-8", "h100", "--", "--dtype", "bfloat16"),
    ("v3-8", "v5litepod-8", "v5p-8", "h100:8"),
)
COMPILED_MODELS = {2: ("llama-1.1b", "llama-7b")}


def measure_compile(runner: Runner) -> dict[str, Any]:
    """What the originals' commands, and larger models, take of TPUs and GPUs, from their compilers."""
    commands, rows = [], []
    for i, machines in enumerate(COMPILED[:1] if runner.quick else COMPILED):
        flags = ["--models", *(("roberta-base",) if runner.quick else COMPILED_MODELS[i])] if runner.quick or i == 2 else []
        flags += ["--machines", *machines]
        path = runner.directory / f"compile-{i}.json"
        end = flags.index("--") if "--" in flags else len(flags)
        command = ["benchmarks/compile_table.py", *flags[:end], "--output_file", str(path), *flags[end:]]
        runner.run([sys.executable, *command], f"compile-{i}")
        commands.append(shown("compile_table", flags))
        rows += [compiled_row(case) for case in json.loads(path.read_text())]
    return {"commands": commands, "rows": rows}


def compiled_row(case: dict[str, Any]) -> dict[str, Any]:
    """GiB of 2^30 bytes for a device; tokens per second of all devices at half of their peak, which is arithmetic."""
    found, gib = case["found"], 2**30
    if isinstance(found, str):
        return {"model": case["model"], "machine": case["machine"], "error": found}
    sizes, given = found["bytes"], " ".join(case["flags"])
    fsdp = case["model"].startswith("llama")
    how = "bfloat16, `--fsdp`, gradient checkpointing" if fsdp else "bfloat16" if "bfloat16" in given else "float32"
    return {
        "model": f"{case['model']} {found['rows_per_device']} x {found['tokens_per_row']}",
        "machine": case["machine"],
        "how": how + (", Adafactor" if case["model"].startswith("t5") else ""),
        "step_gib": sizes["training_step"] and sizes["training_step"] / gib,
        "peak_gib": sizes["peak"] and sizes["peak"] / gib,
        "machine_gib": found["machine"]["bytes"] / gib,
        "fits": found["fits"],
        "tokens_per_second": found["speed"].get("50%", {}).get("tokens_per_second"),
        "compile_seconds": found["compile_seconds"],
    }


def missing_compilers() -> str | None:
    if importlib.util.find_spec("libtpu") and importlib.util.find_spec("jax_cuda12_plugin"):
        return None
    return 'the compilers are not installed (make test-compile does it, or pip install ".[compile]")'


def missing_torch() -> str | None:
    return None if importlib.util.find_spec("torch") else "PyTorch is not installed (make results does it)"


# ---- All of them ----


class Section(NamedTuple):
    measure: Callable[[Runner], dict[str, Any]]
    minutes: float  # on 2 cores, roughly
    missing: Callable[[], str | None] = lambda: None  # why it cannot be measured here


def bind(measure: Callable[[str, Runner], dict[str, Any]], objective: str) -> Callable[[Runner], dict[str, Any]]:
    return lambda runner: measure(objective, runner)


SECTIONS = {
    **{f"quickstarts/{name}": Section(bind(measure_quickstart, name), 9) for name in OBJECTIVES},
    **{f"throughput/{name}": Section(bind(measure_throughput, name), 3, missing_torch) for name in OBJECTIVES},
    **{f"vocab_head/{name}": Section(bind(measure_vocab_head, name), 1) for name in ("mlm", "clm")},
    "host_pipeline": Section(measure_host_pipeline, 2),
    "preprocessing": Section(measure_preprocessing, 1),
    "first_step": Section(measure_first_step, 1),
    "run_bert": Section(measure_run_bert, 0.5),
    "compile": Section(measure_compile, 30, missing_compilers),
}
GROUPS = tuple(dict.fromkeys(name.partition("/")[0] for name in SECTIONS))
