#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time the inference of BERT, or another encoder, with JAX and Flax in float32 and bfloat16.

These commands work as pasted. On a few CPU cores the first takes minutes; the second is small enough for a laptop:

    python run_bert_flax.py
    python run_bert_flax.py --precision both --batch_size 8 --num_batches 10

The result is on standard output: seconds and examples per second, or with `--precision both` a table of the two. Device,
compile time and latencies are logged to standard error. Timed is what a server would run: weights and inputs are arguments
of one compiled program, the weights lie on the device in the precision asked for, and every batch is waited for.
"""

import functools
import itertools
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

try:
    import flaxlm
except ImportError:
    print(
        f"{Path(__file__).name}: error: needs the package flaxlm 0.5.0: install it, from a clone of its repository with"
        " `pip install .`, or copy the folder flaxlm from there beside this script",
        file=sys.stderr,
    )
    raise SystemExit(2) from None
flaxlm.begin("0.5.0", __file__, as_program=__name__ == "__main__")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from transformers import BertConfig, PretrainedConfig

from flaxlm import arguments, cli, configurations, layers, models, randomness, sharding, weight_files, weights

# Shape letters at the end of names: B  rows in a batch, T  tokens in a row. Model inputs keep their transformers names.

PRECISIONS = ("float32", "bfloat16")  # in the order of the table; ratios refer to the first
NUM_INPUTS = 8  # different batches, timed in turn: enough that no result can be reused, few enough to lie on the device
# Where these cannot be loaded, random weights take their place: BertConfig() describes exactly this model.
BASE_MODELS = ("bert-base-uncased", "google-bert/bert-base-uncased")
MODELS = {name: model for name, model in models.MASKED.items() if name not in ("bart", "mbart")}  # encoders


# ---- Arguments -----------------------------------------------------------------------------------------------------------


@dataclass
class TimingArguments:
    """Which model, in which precision, and how much of it to time."""

    precision: Literal["float32", "bfloat16", "both"] = field(
        default="float32", metadata={"help": "Precision of weights and activations; both: a table, batches taking turns."}
    )
    model_name_or_path: str = field(
        default="bert-base-uncased",
        metadata={
            "help": "Encoder to time (Hub id or directory; without weights in it random ones, which are as fast)."
            " bert-base-uncased gets random weights too where the Hub cannot be reached."
        },
    )
    hidden_act: Literal["gelu", "gelu_new", "quick_gelu", "relu", "silu", "tanh"] | None = field(
        default=None,
        metadata={"help": "Activation in place of the checkpoint's; the original script timed gelu_new (tanh GELU)."},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    batch_size: int = field(default=32, metadata={"help": "Rows in a batch."})
    seq_length: int = field(default=128, metadata={"help": "Tokens in a row; at most what the model has positions for."})
    num_batches: int = field(default=100, metadata={"help": "Timed batches, per precision."})
    num_warmup_batches: int = field(default=5, metadata={"help": "Batches run before, untimed, per precision."})
    seed: int = field(default=42, metadata={"help": "Draws the token ids, and the weights if they are random."})


def read_timing_arguments(argv: Sequence[str] | None) -> TimingArguments:
    """Read the command line (or its JSON file) and check all that can be checked without loading anything."""
    parser = cli.ScriptArgumentParser(TimingArguments, description=__doc__.splitlines()[0])
    (args,) = parser.parse(argv)
    least = {"batch_size": 1, "seq_length": 1, "num_batches": 1, "num_warmup_batches": 0, "seed": 0}
    for name, limit in least.items():
        if getattr(args, name) < limit:
            cli.fail(f"--{name} {getattr(args, name)}: must be at least {limit}")
    if os.path.isfile(args.model_name_or_path):
        cli.fail(f"--model_name_or_path {args.model_name_or_path}: is a file; name a directory or a Hub id")
    # transformers would guess a configuration from the path, if there is a model type somewhere in it.
    if os.path.isdir(args.model_name_or_path) and not os.path.isfile(os.path.join(args.model_name_or_path, "config.json")):
        cli.fail(f"--model_name_or_path {args.model_name_or_path}: cannot be loaded: there is no config.json in it")
    return args


# ---- Model and inputs ----------------------------------------------------------------------------------------------------


def load_encoder(args: TimingArguments) -> tuple[PretrainedConfig, Any]:
    """The configuration of the model, and its weights as they are stored or drawn."""
    source = args.model_name_or_path
    has_weights = not os.path.isdir(source) or weight_files.find(source) is not None
    try:
        config = configurations.read_config(source, "--model_name_or_path", cache_dir=args.cache_dir)
    except cli.Mistake as mistake:
        if not may_be_replaced(source, str(mistake)):
            raise
        config, has_weights = BertConfig(), False
    fit_config(config, args)
    model, found = MODELS[config.model_type](config), {}
    if has_weights:
        try:
            found = weights.read(model, arguments.ModelArguments(model_name_or_path=source, cache_dir=args.cache_dir))
        except cli.Mistake as mistake:
            if not may_be_replaced(source, str(mistake)):
                raise
    if not found:
        cli.logger.warning("No weights loaded: random ones are timed in their place, which are as fast.")
    return config, weights.initialize(model, randomness.device_rng(args.seed, "weights"), found, sharding.one_device())


def may_be_replaced(source: str, reason: str) -> bool:
    """Another model must not be timed under the name of one that cannot be loaded; only BERT-base has a stand-in."""
    if source not in BASE_MODELS or os.path.isdir(source):
        return False
    cli.logger.warning("%s cannot be loaded: %s", source, reason)
    return True


def fit_config(config: PretrainedConfig, args: TimingArguments) -> None:
    """Apply the flags to the configuration and refuse what the model cannot do, before its weights are loaded."""
    if config.model_type not in MODELS:
        cli.fail(f"--model_name_or_path: {config.model_type} is no encoder of text; {arguments.supported(MODELS)}")
    origin = configurations.Origin(f"--model_name_or_path {args.model_name_or_path}: config.json")
    configurations.check_values(config.to_dict(), type(config), origin)
    configurations.check_sizes(config, origin)
    configurations.give_full_attention(config, args.seq_length, "lower --seq_length")
    models.check(config, "auto")
    limit = configurations.max_positions(config)
    if limit is not None and args.seq_length > limit:
        cli.fail(f"--seq_length {args.seq_length}: the model has positions for {limit} tokens")
    if args.hidden_act and not hasattr(config, "hidden_act"):
        cli.fail(f"--hidden_act {args.hidden_act}: the configuration of {config.model_type} has no hidden_act to replace")
    if args.hidden_act:
        config.hidden_act = args.hidden_act


def cast_weights(params: Any, precision: str) -> Any:
    """The weights on the device in this precision, ready to use. Cast here, once, they are not cast in every batch."""

    def cast(params: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(precision) if jnp.issubdtype(a.dtype, jnp.floating) else a, params)

    return jax.block_until_ready(jax.jit(cast)(params))


def make_inputs(config: PretrainedConfig, args: TimingArguments) -> list[dict[str, jax.Array]]:
    """A few full batches of ordinary token ids [B, T] in one segment, on the device."""
    special = {value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    # Low ids are special or unused in most vocabularies: in BERT's the first thousand but for single characters.
    ordinary = [i for i in range(min(1000, config.vocab_size // 2), config.vocab_size) if i not in special]
    np_rng, shape_BT = randomness.host_rng(args.seed, "inputs"), (args.batch_size, args.seq_length)
    inputs = []
    for _ in range(min(NUM_INPUTS, args.num_batches)):
        batch = {"input_ids": np_rng.choice(np.array(ordinary, np.int32), shape_BT)}
        batch["attention_mask"] = np.ones(shape_BT, np.int32)
        inputs.append(jax.device_put(batch))
    return jax.block_until_ready(inputs)


# ---- Timing --------------------------------------------------------------------------------------------------------------


def encode(params: Any, batch: Mapping[str, jax.Array], model: nn.Module) -> jax.Array:
    """Hidden states [B, T, H] of the last layer."""
    return model.apply({"params": params}, batch["input_ids"], batch["attention_mask"])


class TimedEncoder:
    """The model in one precision as a compiled program, and the seconds that its batches took."""

    def __init__(
        self,
        precision: str,
        config: PretrainedConfig,
        params: Any,
        batch: Mapping[str, jax.Array],
    ):
        self.precision, self.params, self.seconds = precision, cast_weights(params, precision), []
        compute = layers.Compute(jnp.dtype(precision), "chunked")
        model = MODELS[config.model_type](config, compute)
        start = time.perf_counter()
        cli.logger.info("Compiling for %s ...", precision)
        # Weights and inputs are arguments: of what a program closes over, XLA may compute results while compiling.
        lowered = jax.jit(functools.partial(encode, model=model)).lower(self.params, batch)
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        cli.logger.info("Compiled for %s in %.1f s", precision, self.compile_seconds)

    def __call__(self, batch: Mapping[str, jax.Array]) -> float:
        """Run one batch; the seconds until its results were there, not until the call came back."""
        start = time.perf_counter()
        jax.block_until_ready(self.compiled(self.params, batch))
        return time.perf_counter() - start

    def summary(self, batch_size: int) -> dict[str, float]:
        elapsed = sum(self.seconds)
        return {
            "compile_seconds": self.compile_seconds,
            "elapsed_seconds": elapsed,
            "median_ms": 1000 * float(np.median(self.seconds)),
            "p90_ms": 1000 * float(np.quantile(self.seconds, 0.9)),
            "examples_per_second": len(self.seconds) * batch_size / elapsed,
        }


def time_in_turns(encoders: Sequence[TimedEncoder], inputs: Iterable[dict[str, jax.Array]], args: TimingArguments) -> None:
    """Warm up, then time: the precisions alternate batch by batch, so that what slows the machine slows them alike."""
    batches = itertools.cycle(inputs)
    for batch in itertools.islice(batches, args.num_warmup_batches):
        for encoder in encoders:
            encoder(batch)
    with cli.progress_bar(total=args.num_batches, desc="Timing", unit="batch") as bar:
        for batch in itertools.islice(batches, args.num_batches):
            for encoder in encoders:
                encoder.seconds.append(encoder(batch))
            bar.update()


# ---- Results -------------------------------------------------------------------------------------------------------------


def log_task(config: PretrainedConfig, params: Any, args: TimingArguments) -> None:
    """Say what is about to be timed, and where."""
    device, num_params = jax.devices()[0], sum(array.size for array in jax.tree.leaves(params))
    activation = getattr(config, "hidden_act", getattr(config, "activation", "unknown"))
    cli.logger.info("Model: %s, %s parameters, activation %s", config.model_type, f"{num_params:,}", activation)
    cli.logger.info("Batch: %d rows of %d tokens; %d batches, %d before them to warm up",
                args.batch_size, args.seq_length, args.num_batches, args.num_warmup_batches)  # fmt: skip
    where = f"{os.cpu_count()} cores" if device.platform == "cpu" else f"one of {jax.device_count()}"
    cli.logger.info("Device: %s (%s), jax %s", device.device_kind, where, jax.__version__)


def turn_ratio(reference: TimedEncoder, encoder: TimedEncoder) -> float:
    """How many times as fast as the reference: the median over the turns, which a disturbed turn does not move."""
    return float(np.median(np.divide(reference.seconds, encoder.seconds)))


def results_table(encoders: Sequence[TimedEncoder], args: TimingArguments) -> str:
    """Precisions below each other, the last column being the speed relative to the first."""
    rows = [("precision", "compile s", "median ms", "p90 ms", "examples/s", "ratio")]
    for encoder in encoders:
        s, ratio = encoder.summary(args.batch_size), turn_ratio(encoders[0], encoder)
        numbers = (s["compile_seconds"], s["median_ms"], s["p90_ms"], s["examples_per_second"])
        rows.append((encoder.precision, *(f"{number:.1f}" for number in numbers), f"{ratio:.2f}"))
    return "\n".join("  ".join([f"{row[0]:<9}", *(f"{cell:>10}" for cell in row[1:])]) for row in rows)


# ---- Main ----------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Time the model as the arguments say (default: the command line); returns the figures by precision."""
    cli.set_up_logging()
    args = read_timing_arguments(argv)
    config, params = load_encoder(args)
    log_task(config, params, args)
    inputs = make_inputs(config, args)
    precisions = PRECISIONS if args.precision == "both" else (args.precision,)
    encoders = [TimedEncoder(precision, config, params, inputs[0]) for precision in precisions]
    del params  # the encoders hold their own
    time_in_turns(encoders, inputs, args)

    results = {encoder.precision: encoder.summary(args.batch_size) for encoder in encoders}
    for precision, figures in results.items():
        median_and_p90 = (figures["median_ms"], figures["p90_ms"])
        cli.logger.info("%s: median %.1f ms, 90th percentile %.1f ms per batch", precision, *median_and_p90)
    if len(encoders) > 1:
        print(results_table(encoders, args))
    else:
        (figures,) = results.values()
        print(f"{figures['elapsed_seconds']:.3f} seconds, {figures['examples_per_second']:.3f} examples per second")
    return results


if __name__ == "__main__":
    cli.end(cli.run(main, __file__))
