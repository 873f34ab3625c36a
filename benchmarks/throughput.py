#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Training throughput of a script, and side by side with it that of the same model in PyTorch.

    python benchmarks/throughput.py --objective mlm                                            # this script alone
    python benchmarks/throughput.py --objective mlm --peer torch --precision float32 bfloat16 --peer_precision float32 bfloat16
    python benchmarks/throughput.py --objective clm --model_size base --precision bfloat16 --peer torch     # for a GPU

Both sides train on the same text (the quick start's, tokenised; a vocabulary of full size, of which it uses the first 8,192
words), from the same weights, with the same batches, dropout and AdamW. Ours is what main() of the script runs: batches
made and copied to the device by the prefetching thread, the compiled step, metrics fetched a step late. The peer is the
PyTorch class of transformers with fused AdamW, autocast for bfloat16, scaled_dot_product_attention where the class has it,
torch.compile where that is faster, and batches made by such a thread too. Windows of the sides take turns, so that a
machine that slows down slows all; ratios are taken turn by turn. Exit status 2: no PyTorch is installed.

Tokens are those the (encoder of the) model reads; `cores` is processor time by the clock, below their number where other
programs run. FLOPs are the model's by the usual convention (Chowdhery et al. 2022,
arXiv:2204.02311, appendix B): 6 per token and matrix weight, the vocabulary head at every position of the output included,
and attention; the same number for both sides, so that their ratio is that of tokens. Our MLM head does less than that.
"""

import argparse
import functools
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")  # of a GPU: PyTorch needs room beside JAX
# PyTorch's threads wait without spinning. Where other programs run, that made its steps 2.5 times as fast.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jax
from flax.traverse_util import flatten_dict
from tqdm import tqdm
from transformers import PretrainedConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.machine import environment, forget_peak, resident_bytes  # noqa: E402
from benchmarks.sides import OurSide, TorchSide  # noqa: E402
from benchmarks.workloads import OBJECTIVES, describe_model, set_up  # noqa: E402
from flaxlm import machines  # noqa: E402


def model_flops_per_row(weights: Any, config: PretrainedConfig, seq_length: int, target_length: int) -> float:
    """FLOPs of one row, forward and backward. Weights of a decoder see the target, but for keys and values of its input."""
    total = 0.0
    for path, array in flatten_dict(weights).items():
        name = "/".join(path)
        cross_keys = re.search(r"(EncDecAttention|encoder_attn)/(k|v)", name)
        if path[-1] == "kernel" and array.ndim == 2:
            if "pooler" in name or "seq_relationship" in name:  # of one token in a row
                total += 6 * array.size
                continue
            in_decoder = name.startswith("lm_head/kernel") or ("decoder" in name and not cross_keys)
            total += 6 * array.size * (target_length if in_decoder and config.is_encoder_decoder else seq_length)
    if config.tie_word_embeddings:
        total += 6 * config.hidden_size * config.vocab_size * target_length
    T, U = seq_length, target_length
    if not config.is_encoder_decoder:
        return total + 12 * config.num_hidden_layers * config.hidden_size * T * T
    width = config.num_heads * config.d_kv if config.model_type == "t5" else config.d_model
    num_encoder = getattr(config, "encoder_layers", None) or config.num_layers
    num_decoder = getattr(config, "decoder_layers", None) or config.num_decoder_layers
    return total + 12 * width * (num_encoder * T * T + num_decoder * (U * U + U * T))


def steps_per_window(side: OurSide | TorchSide, args: argparse.Namespace) -> int:
    """Warm up, and find how many steps fill a window."""
    side.window(1)
    seconds = min(side.window(1)[0] for _ in range(2))
    return args.steps_per_window or max(1, round(args.window_seconds / seconds))


def measure(sides: list, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Windows of all sides in turn. Returns for each side its tokens per second, window by window, and losses."""
    found, num_steps = [], []
    for side in sides:
        first_loss = side.window(1)[2]
        if isinstance(side, TorchSide):
            side.compile_if_faster(args.torch_compile)
        num_steps.append(steps_per_window(side, args))
        found.append({"name": side.name, "precision": side.precision, "first_loss": first_loss})
        found[-1] |= {"steps_per_window": num_steps[-1], "tokens_per_second": [], "cores": []}
    if args.side != "both":
        forget_peak()
    for _ in tqdm(range(args.num_windows), desc="Timing", unit="turn"):
        for side, figures, n in zip(sides, found, num_steps, strict=True):
            processor_seconds = time.process_time()
            seconds, num_tokens, figures["last_loss"] = side.window(n)
            figures["tokens_per_second"].append(num_tokens / seconds)
            figures["cores"].append((time.process_time() - processor_seconds) / seconds)
    return found


def loop_overhead(side: OurSide, num_steps: int, num_windows: int) -> dict[str, list[float]]:
    """Percent by which the loop is slower than its compiled step alone, turn by turn: by the clock and in processor time."""
    found: dict[str, list[float]] = {"clock": [], "processor": []}
    side.window(num_steps)  # the memory that others gave back is taken again
    for _ in tqdm(range(num_windows), desc="Loop overhead", unit="turn"):
        readings = [(time.perf_counter(), time.process_time())]
        for window in (side.window, side.bare_window):
            window(num_steps)
            readings.append((time.perf_counter(), time.process_time()))
        for overhead, (start, middle, end) in zip(found.values(), zip(*readings, strict=True), strict=True):
            overhead.append(100 * (1 - (end - middle) / (middle - start)))
    return found


def per_processor_second(figures: dict[str, Any]) -> float:
    """Tokens per second of processor time: says more than the clock where other programs run."""
    return statistics.median(r / c for r, c in zip(figures["tokens_per_second"], figures["cores"], strict=True))


def resident_growth(args: argparse.Namespace, side: str, precision: str) -> int | None:
    """Run one side alone in a process of its own: by how many bytes did its memory grow, at the highest?"""
    argv = [arg for arg in sys.argv[1:] if arg != "--memory"]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "figures.json"
        argv += ["--side", side, "--num_windows", "1", "--json", str(path)]
        argv += ["--peer_precision" if side == "torch" else "--precision", precision]
        subprocess.run([sys.executable, __file__, *argv], check=True, stdout=subprocess.DEVNULL)
        return json.loads(path.read_text())["resident_growth"]


def print_table(figures: dict[str, Any]) -> None:
    env = figures["environment"]
    where = f"{env['cpu']}, {env['cores']} cores" if env["device"] == "cpu" else env["device"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    print(f"{figures['model']}\n{where}, load {env['load_average']:.1f} at the start; {versions}")
    print(f"{'':34s}{'precision':>10s}{'tokens/s: median':>18s}{'min':>9s}{'max':>9s}", end="")
    print(f"{'cores':>7s}{'TFLOP/s':>9s}{'of peak':>8s}{'memory':>11s}{'resident':>11s}{'loss: first':>13s}{'last':>8s}")
    for side in figures["sides"]:
        rates = side["tokens_per_second"]
        share, mib = side["utilisation"], [(f"{b / 2**20:,.0f} MiB" if b else "-") for b in side["memory"]]
        print(f"{side['name']:34s}{side['precision']:>10s}{statistics.median(rates):18,.0f}", end="")
        print(f"{min(rates):9,.0f}{max(rates):9,.0f}{statistics.median(side['cores']):7.2f}", end="")
        print(f"{side['flops'] / 1e12:9.3f}{f'{share:.1%}' if share else '-':>8s}{mib[0]:>11s}{mib[1]:>11s}", end="")
        print(f"{side['first_loss']:13.3f}{side['last_loss']:8.3f}")
    for name, ratios in figures["ratios"].items():
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(f"ratio of {name}, turn by turn: median {middle:.2f}, min {low:.2f}, max {high:.2f}", end="")
        print(f"; tokens per processor second {figures['processor_ratios'][name]:.2f}")
    for kind, overhead in figures["loop_overhead_percent"].items():
        if overhead:
            middle, low, high = statistics.median(overhead), min(overhead), max(overhead)
            print(f"loop over its compiled step alone, % of {kind} time: median {middle:.1f}, min {low:.1f}, max {high:.1f}")


def read_arguments() -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    parser.add_argument("--objective", choices=OBJECTIVES, default="mlm")
    parser.add_argument("--model_size", choices=("tiny", "base"), default="tiny")
    parser.add_argument("--precision", nargs="+", choices=("float32", "bfloat16"), default=["float32"], help="of ours")
    parser.add_argument("--attention_implementation", default="auto", help="of ours, as the scripts' flag")
    parser.add_argument("--peer", choices=("torch",), help="measure PyTorch beside it")
    parser.add_argument("--peer_precision", nargs="+", choices=("float32", "bfloat16"), help="unset: as precision")
    parser.add_argument("--torch_compile", choices=("auto", "on", "off"), default="auto", help="auto: if it is faster")
    parser.add_argument("--batch_size", type=int, help="rows; unset: by objective and size")
    parser.add_argument("--seq_length", type=int, help="tokens in a row; unset: by objective and size")
    parser.add_argument("--vocab_size", type=int, help="unset: by objective")
    parser.add_argument("--dropout", type=float, help="all rates of the model; unset: those of its configuration class")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--num_windows", type=int, default=7, help="timed windows of each side")
    parser.add_argument("--window_seconds", type=float, default=5)
    parser.add_argument("--steps_per_window", type=int, help="unset: as many as fill window_seconds")
    parser.add_argument("--num_overhead_windows", type=int, default=7, help="timed windows for the loop overhead")
    parser.add_argument("--memory", action="store_true", help="run each side alone too, to see its resident memory grow")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--cache_dir", type=Path, default=ROOT / "quickstart/build/benchmark", help="text, tokenizer, rows")
    parser.add_argument("--side", choices=("both", "ours", "torch"), default="both", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.peer_precision = args.peer_precision or args.precision
    if args.peer and not importlib.util.find_spec("torch"):
        print(f"{Path(__file__).name}: error: --peer torch: PyTorch is not installed (make bench does it)", file=sys.stderr)
        raise SystemExit(2)
    if args.peer and jax.device_count() > 1:
        print(f"{Path(__file__).name}: error: --peer torch: takes one device, not {jax.device_count()}", file=sys.stderr)
        raise SystemExit(2)
    return args


def main() -> None:
    args = read_arguments()
    setup = set_up(args)
    env, resident_before = environment(), resident_bytes("VmRSS")
    ours = [OurSide(setup, precision) for precision in args.precision] if args.side != "torch" else []
    weights = ours[0].weights if ours else None
    make_peer = functools.partial(TorchSide, setup, args, initial_weights=weights)
    peers = [make_peer(precision) for precision in args.peer_precision] if args.peer and args.side != "ours" else []
    sides = [*ours, *peers]
    found = measure(sides, args)
    if args.side != "both":
        growth = resident_bytes("VmHWM") - resident_before if resident_before else None
        args.json.write_text(json.dumps({"resident_growth": growth}))
        return

    target_length = getattr(setup.collator, "target_length", args.seq_length)
    row_flops = model_flops_per_row(weights, setup.config, args.seq_length, target_length)
    tokens_per_row = float(next(setup.batches())["attention_mask"].sum()) / args.batch_size
    for side, figures in zip(sides, found, strict=True):
        figures["flops"] = statistics.median(figures["tokens_per_second"]) / tokens_per_row * row_flops
        peak = machines.peak_flops(env["device"]).get(side.precision)
        figures["utilisation"] = figures["flops"] / (peak * jax.device_count()) if peak else None
        figures["memory"] = [side.peak_memory() if side in ours or len(peers) == 1 else None, None]
        if args.memory:
            figures["memory"][1] = resident_growth(args, "ours" if side in ours else "torch", side.precision)
    ratios, processor_ratios = {}, {}
    for mine in found[: len(ours)]:
        for other in found[len(ours) :]:
            name = f"ours in {mine['precision']} to PyTorch in {other['precision']}"
            pairs = zip(mine["tokens_per_second"], other["tokens_per_second"], strict=True)
            ratios[name] = [my_rate / other_rate for my_rate, other_rate in pairs]
            processor_ratios[name] = per_processor_second(mine) / per_processor_second(other)
    result = {
        "model": describe_model(setup, args, sum(a.size for a in jax.tree.leaves(weights)), target_length),
        "environment": env,
        "sides": found,
        "ratios": ratios,
        "processor_ratios": processor_ratios,
        "loop_overhead_percent": loop_overhead(ours[0], found[0]["steps_per_window"], args.num_overhead_windows),
    }
    print_table(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=4) + "\n")


if __name__ == "__main__":
    main()
