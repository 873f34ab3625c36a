# SPDX-License-Identifier: Apache-2.0
"""What a run would take of a machine that need not be there: its steps are compiled for it, and their memory read off.

No data is needed: the shapes of a batch follow from flags, tokenizer and configuration.
"""

import dataclasses
import functools
import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from transformers import PretrainedConfig

from flaxlm import (
    arguments,
    batches,
    cli,
    flops,
    layers,
    machines,
    models,
    optimizers,
    randomness,
    sharding,
    token_rows,
    weights,
)
from flaxlm.machines import GIB

logger = logging.getLogger(__name__)
PATIENCE = 600.0  # seconds after which nothing new is tried; what is being compiled is waited for
UTILISATION = (0.3, 0.5)  # of the peak: what training reaches as a rule, and what it reaches when all goes well


class Script(NamedTuple):
    """What a training script brings: the same that its main uses."""

    config: PretrainedConfig
    collator: token_rows.Collator
    classes: arguments.Classes
    loss_fn: Callable
    make_steps: Callable


class Estimate(NamedTuple):
    """Bytes on each device; the whole of a step is None where not even the compiler says how much is missing."""

    rows: int  # per device and micro-batch
    weights: int
    optimizer: int
    training: int | None
    evaluation: int | None  # None too if it was not compiled
    saving: int  # by a save, while the next steps run
    in_use: int  # by the program itself, where it shares the memory
    limit: int | None
    seconds: float  # of compiling

    @property
    def peak(self) -> int | None:
        """While a step runs and what the step before has made is being saved."""
        if self.training is None:
            return None
        evaluation = (self.evaluation or 0) + self.optimizer
        return max(self.training, evaluation) + self.saving + self.in_use

    @property
    def fits(self) -> bool:
        return self.peak is not None and (self.limit is None or self.peak <= self.limit)


class DoesNotFit(cli.Ending):
    """The answer to --compile_for, as an exit status."""


def report(args: arguments.Arguments, script: Script) -> dict[str, Any]:
    """Compile for the machine of --compile_for, print what that says, and with --json the same in JSON.

    Raises:
        DoesNotFit: exit status 1, with what was tried in its place.
    """
    machine = machines.find(args.training.compile_for)
    found = describe(args, script, machine)
    if args.training.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(lines(found)))
    sys.stdout.flush()
    if not found["fits"]:
        raise DoesNotFit(f"does not fit: {advice(found)}")
    return found


def describe(args: arguments.Arguments, script: Script, machine: machines.Machine) -> dict[str, Any]:
    """All that `report` prints; bytes and seconds."""
    begun = time.monotonic()
    estimate = compile_steps(args, script, machine, with_evaluation=True)
    tried = {} if estimate.fits else try_remedies(args, script, machine, begun)  # first, should time be short
    largest = find_largest(args, script, machine, estimate, begun)
    num_flops, num_tokens = count_flops(args, script)
    peak_flops = machine.peak_flops.get(args.model.dtype)
    speeds = {}
    if peak_flops:
        seconds = {share: num_flops / (share * peak_flops) for share in UTILISATION}
        speeds = {
            f"{share:.0%}": {"seconds": s, "tokens_per_second": num_tokens * len(machine.devices) / s}
            for share, s in seconds.items()
        }
    return {
        "machine": {
            "name": machine.name, "kind": machine.kind, "devices": len(machine.devices), "bytes": machine.memory,
            "peak_flops": peak_flops,
        },
        "model": {
            "type": script.config.model_type,
            "parameters": sum(math.prod(shape.shape) for shape in weights.shapes_of(build(args, script, machine)).values()),
            "dtype": args.model.dtype, "attention": build(args, script, machine).compute.attention,
            "gradient_checkpointing": args.training.gradient_checkpointing, "fsdp": args.training.fsdp,
        },
        "rows_per_device": estimate.rows,
        "gradient_accumulation_steps": args.training.gradient_accumulation_steps,
        "tokens_per_row": script.collator.row_length,
        "bytes": {
            "weights": estimate.weights, "optimizer": estimate.optimizer, "program": estimate.in_use,
            "save": estimate.saving,
            "activations": estimate.training and estimate.training - estimate.weights - estimate.optimizer,
            "training_step": estimate.training, "evaluation_step": estimate.evaluation, "peak": estimate.peak,
        },
        "flops_per_step_and_device": num_flops, "tokens_per_step_and_device": num_tokens, "speed": speeds,
        "compile_seconds": estimate.seconds, "largest_rows_per_device": largest, "fits": estimate.fits,
        "tried": {name: {"peak": one.peak, "fits": one.fits} for name, one in tried.items()},
    }  # fmt: skip


# ---- Compiling -----------------------------------------------------------------------------------------------------------


def build(args: arguments.Arguments, script: Script, machine: machines.Machine) -> Any:
    return models.build(script.config, args, script.classes, machine.platform)


def compile_steps(
    args: arguments.Arguments, script: Script, machine: machines.Machine, with_evaluation: bool = False
) -> Estimate:
    """Compile the training step for a machine, and that of evaluation; shapes only, nothing is computed."""
    devices = sharding.Devices(machine.mesh(), args.training.fsdp)
    model = build(args, script, machine)
    plan = make_plan(args)
    learning_rate_fn = optimizers.make_learning_rate(args.training, plan)
    optimizer = optimizers.make_optimizer(args.training, learning_rate_fn)
    loss_fn = functools.partial(script.loss_fn, model=model)
    p_train_step, p_eval_step = script.make_steps(loss_fn, optimizer, learning_rate_fn, devices, args.training.z_loss)
    state = sharding.shapes_of_state(unflatten_dict(weights.shapes_of(model)), optimizer, devices)
    num_micro_batches = args.training.gradient_accumulation_steps
    batch = shapes_of_batch(script.collator, args.training.per_device_train_batch_size, devices, num_micro_batches)
    rng = jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))
    rng = jax.ShapeDtypeStruct(rng.shape, rng.dtype, sharding=NamedSharding(devices.mesh, sharding.REPLICATED))
    begun = time.monotonic()
    training = bytes_of(p_train_step, machine, state, batch, rng)
    evaluation = None
    if with_evaluation:
        rows = args.training.per_device_eval_batch_size
        evaluation = bytes_of(p_eval_step, machine, state.params, shapes_of_batch(script.collator, rows, devices))
    return Estimate(
        rows=args.training.per_device_train_batch_size,
        weights=bytes_of_state(state.params),
        optimizer=bytes_of_state(state.opt_state),
        training=training,
        evaluation=evaluation,
        saving=bytes_of_save(state, machine),
        in_use=machine.in_use(),
        limit=machine.memory,
        seconds=time.monotonic() - begun,
    )


def bytes_of(step: sharding.CompiledStep, machine: machines.Machine, *shapes: Any) -> int | None:
    """Bytes on each device at most, arguments included, as the compiler says; also where it says that they are too many."""
    logger.info("Compiling the %s step for %s ...", step.name, machine.name)
    begun = time.monotonic()
    try:
        memory = step.lower(*shapes).compile(dict(machine.compiler_options) or None).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        logger.info("It does not fit (%.0f s)", time.monotonic() - begun)
        return wanted(str(error))
    logger.info("Compiled it in %.0f s", time.monotonic() - begun)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return max(memory.peak_memory_in_bytes, memory.argument_size_in_bytes + memory.temp_size_in_bytes + results)


def wanted(message: str) -> int | None:
    """The bytes that XLA says a program would have needed."""
    match = re.search(r"([Uu]sed |required[^(]*\()([\d.]+)([KMG])", message)
    return match and int(float(match[2]) * {"K": 2**10, "M": 2**20, "G": 2**30}[match[3]])


def make_plan(args: arguments.Arguments) -> batches.Plan:
    """As many steps as the flags say; where they speak of epochs, some: the program is the same but for a constant."""
    num_steps = args.training.max_steps if args.training.max_steps > 0 else 2**20
    num_warmup_steps = args.training.warmup_steps or math.ceil(args.training.warmup_ratio * num_steps)
    return batches.Plan(1, 1, 0, 1, 1, args.training.gradient_accumulation_steps, 0, num_steps, num_warmup_steps)


def example_batch(collator: token_rows.Collator, num_rows: int) -> dict[str, np.ndarray]:
    """What the collator makes of rows without meaning: right in its shapes."""
    rows = {name: np.full((num_rows, collator.row_length), fill, np.int32) for name, fill in collator.columns.items()}
    uniforms_NR = randomness.row_uniforms(0, ("shapes",), 0, num_rows, collator.draws_per_row)
    return collator(rows, uniforms_NR, np.ones(num_rows, bool), 1)


def shapes_of_batch(
    collator: token_rows.Collator, rows_per_device: int, devices: sharding.Devices, num_micro_batches: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of all devices: [A, ...] for training, else without A."""
    leading = () if num_micro_batches is None else (num_micro_batches,)
    where = NamedSharding(devices.mesh, PartitionSpec(*[None] * len(leading), "data"))
    example = example_batch(collator, rows_per_device) | {"stop": np.zeros(1, np.int32)}
    return {
        name: jax.ShapeDtypeStruct(
            (*leading, array.shape[0] * devices.mesh.size, *array.shape[1:]), array.dtype, sharding=where
        )
        for name, array in example.items()
    }


def bytes_of_save(state: sharding.TrainState, machine: machines.Machine) -> int:
    """A copy of the weights on the devices. On a CPU all else of a save lies in the same memory.

    That is: the weights again, once in each layout of files, and the state twice, as orbax holds it and as it writes it.
    """
    copy_of_weights = bytes_of_state(state.params)
    return copy_of_weights if machine.platform != "cpu" else 2 * copy_of_weights + 2 * bytes_of_state(state)


def bytes_of_state(tree: Any) -> int:
    """Of shapes that say where they lie."""
    return sharding.bytes_per_device(tree, jax.tree.map(lambda shape: shape.sharding, tree))


def count_flops(args: arguments.Arguments, script: Script) -> tuple[float, int]:
    """Of a step, on one device: floating-point operations of the model and its gradients, and its tokens.

    Nothing counts twice that is only computed again to save memory, as is the custom (Chowdhery et al. 2022, PaLM, B).
    """
    model = script.classes[script.config.model_type](script.config, layers.Compute())
    batch = example_batch(script.collator, args.training.per_device_train_batch_size)
    gradients_fn = jax.value_and_grad(functools.partial(script.loss_fn, model=model), has_aux=True)
    params = unflatten_dict(weights.shapes_of(model))
    num_micro_batches = args.training.gradient_accumulation_steps
    num_flops = flops.count(gradients_fn, params, batch) * num_micro_batches
    return num_flops, batch["input_ids"].size * num_micro_batches


# ---- What else would fit ---------------------------------------------------------------------------------------------------


def with_training(args: arguments.Arguments, **changes: Any) -> arguments.Arguments:
    return args._replace(training=dataclasses.replace(args.training, **changes))


def find_largest(
    args: arguments.Arguments, script: Script, machine: machines.Machine, first: Estimate, begun: float
) -> int | None:
    """The largest power of two of rows per device that fits; 0 if one row does not, None if time was up before it was known.

    Memory grows with the rows: the first guess is where that leads, then one up or down at a time.
    """
    if machine.memory is None:
        return None

    def power_of_two(rows: float) -> int:
        return 2 ** max(math.floor(math.log2(rows)), 0)

    known = {first.rows: first.fits}
    rows = power_of_two(first.rows if first.fits else max(first.rows / 2, 1))
    if first.training:
        fixed = first.weights + first.optimizer
        per_row = (first.training - fixed) / first.rows
        rows = power_of_two(max((machine.memory - first.in_use - first.saving - fixed) / per_row, 1))
    while True:
        if rows not in known:
            if time.monotonic() - begun > PATIENCE:
                return None
            logger.info("Would %d rows per device fit?", rows)
            known[rows] = compile_steps(with_training(args, per_device_train_batch_size=rows), script, machine).fits
        if known[rows] and known.get(2 * rows) is False:
            return rows
        if not known[rows] and rows == 1:
            return 0
        rows = rows * 2 if known[rows] else rows // 2


Change = Callable[[arguments.Arguments], arguments.Arguments]


def remedies(args: arguments.Arguments, num_devices: int) -> dict[str, Change]:
    """Ways to need less memory, by what one would type, that are not taken already."""
    training, found = args.training, {}
    if training.attention_implementation not in ("auto", "chunked"):
        found["--attention_implementation chunked"] = lambda args: with_training(args, attention_implementation="chunked")
    if args.model.dtype == "float32":
        found["--dtype bfloat16"] = lambda args: args._replace(model=dataclasses.replace(args.model, dtype="bfloat16"))
    if num_devices > 1 and not training.fsdp:
        found["--fsdp"] = lambda args: with_training(args, fsdp=True)
    if training.per_device_train_batch_size % 2 == 0:
        rows, steps = training.per_device_train_batch_size // 2, 2 * training.gradient_accumulation_steps
        halved = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        found[" ".join(f"--{name} {value}" for name, value in halved.items())] = lambda args: with_training(args, **halved)
    if not training.gradient_checkpointing:
        found["--gradient_checkpointing"] = lambda args: with_training(args, gradient_checkpointing=True)
    return found


def try_remedies(args: arguments.Arguments, script: Script, machine: machines.Machine, begun: float) -> dict[str, Estimate]:
    """What each gives alone, and if none is enough all together, as far as time allows."""
    changes, tried = remedies(args, len(machine.devices)), {}
    for flags, change in changes.items():
        if time.monotonic() - begun < PATIENCE:
            logger.info("Would it fit with %s?", flags)
            tried[flags] = compile_steps(change(args), script, machine)
    if len(tried) > 1 and not any(one.fits for one in tried.values()) and time.monotonic() - begun < PATIENCE:
        logger.info("Would it fit with all of that?")
        everything = functools.reduce(lambda args, change: change(args), changes.values(), args)
        tried[" ".join(changes)] = compile_steps(everything, script, machine)
    return tried


# ---- Words ---------------------------------------------------------------------------------------------------------------


def gib(num_bytes: int | None) -> str:
    return "more than it has" if num_bytes is None else f"{num_bytes / GIB:.2f} GiB"


def lines(found: Mapping[str, Any]) -> list[str]:
    """What was found, for people."""
    machine, model, size = found["machine"], found["model"], found["bytes"]
    has = f", {gib(machine['bytes'])} each" if machine["bytes"] else ""
    how = [model["dtype"], f"attention {model['attention']}"]
    how += ["gradient checkpointing"] * model["gradient_checkpointing"] + ["fsdp"] * model["fsdp"]
    steps = found["gradient_accumulation_steps"]
    micro = f" x {steps} micro-batches" if steps > 1 else ""
    rows, length = found["rows_per_device"], found["tokens_per_row"]
    text = [
        f"{model['type']}, {model['parameters']:,} parameters, {', '.join(how)}",
        f"{machine['name']}: {machine['devices']} x {machine['kind']}{has}; {rows} rows of {length} tokens per device{micro}",
        "",
        "on each device",
        f"  weights                      {gib(size['weights']):>10}",
        f"  optimizer                    {gib(size['optimizer']):>10}",
        f"  gradients, activations       {gib(size['activations']):>10}",
        f"  training step, all of these  {gib(size['training_step']):>10}",
        f"  evaluation step              {gib(size['evaluation_step']):>10}, beside the optimizer",
        f"  a save, in the background    {gib(size['save']):>10}",
    ]
    if size["program"]:
        text.append(f"  Python and its libraries     {gib(size['program']):>10}")
    of = f" of {gib(machine['bytes'])}: it {'fits' if found['fits'] else 'does not fit'}" if machine["bytes"] else ""
    text += [f"  at most                      {gib(size['peak']):>10}{of}", ""]
    if machine["kind"].startswith("NVIDIA") and machine["name"] != "this":
        share = machines.share_of_gpu()
        text[1] += f" ({share:.0%} of the card: XLA_PYTHON_CLIENT_MEM_FRACTION)"
    tflops = found["flops_per_step_and_device"] / 1e12
    text.append(f"{tflops:.3g} TFLOP a step and device, for {found['tokens_per_step_and_device']:,} tokens")
    for share, speed in found["speed"].items():
        per_second, peak = f"{speed['tokens_per_second']:,.0f}", machine["peak_flops"] / 1e12
        seconds = f"{speed['seconds']:.3g} s a step, {per_second} tokens/s on all devices"
        text.append(f"  at {share} of the {peak:g} TFLOP/s of a device: {seconds}")
    largest = found["largest_rows_per_device"]
    if largest is not None:
        text.append(f"largest batch that fits: {largest} rows per device (powers of two were tried)")
    for flags, one in found["tried"].items():
        text.append(f"with {flags}: {gib(one['peak'])}, {'fits' if one['fits'] else 'does not fit'}")
    text.append(f"compiled in {found['compile_seconds']:.0f} s")
    return text


def advice(found: Mapping[str, Any]) -> str:
    """What to try, from what was tried."""
    good = [flags for flags, one in found["tried"].items() if one["fits"]]
    if good:
        return f"try {' or '.join(good)}"
    if found["largest_rows_per_device"]:
        return f"try --per_device_train_batch_size {found['largest_rows_per_device']}"
    return (
        "nothing that was tried is enough; take a machine with more memory, more devices with --fsdp, or fewer tokens per row"
    )
