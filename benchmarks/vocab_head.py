#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How much do the training steps gain by what they do at the vocabulary head?

    python benchmarks/vocab_head.py --objective mlm
    python benchmarks/vocab_head.py --objective clm

Times the training step of run_mlm_flax.py (scores at labelled positions only) or run_clm_flax.py (loss a chunk of tokens at
a time) against the same step with scores [tokens, vocabulary], its loss taken from integer labels, or from one-hot targets
as the original scripts did: same model, batch, optimizer and masks. The steps take turns, so that a machine that slows down
slows all; ratios are taken turn by turn. Prints one table.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm
from transformers import GPT2Config, PretrainedConfig, RobertaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import run_clm_flax
import run_mlm_flax as script
from flaxlm import layers, optimizers, randomness, sharding, weights


class FakeTokenizer:
    """As much of a tokenizer as the collator asks for."""

    all_special_ids, unk_token_id, pad_token_id, mask_token_id = (0, 1, 2, 3, 4), 3, 1, 4
    mask_token, pad_token = "<mask>", "<pad>"

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self.vocab_size)}


def every_position_loss(params, batch, model, rngs, one_hot: bool, z_loss: float):
    """Scores [B, T, V], and with `one_hot` targets [B, T, V], most of which is thrown away; `z_loss` is 0 here."""
    hidden_BTH = model.apply({"params": params}, batch["input_ids"], batch["attention_mask"], rngs=rngs)
    logits_BTV = model.apply({"params": params}, hidden_BTH, method="scores").astype(jnp.float32)
    if one_hot:
        losses_BT = optax.softmax_cross_entropy(logits_BTV, jax.nn.one_hot(batch["labels_BT"], logits_BTV.shape[-1]))
    else:
        losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch["labels_BT"])
    return (losses_BT * batch["weights_BT"]).sum(), {"weight": batch["weights_BT"].sum()}


def make_batches(args) -> tuple[dict, dict]:
    """The same rows as the script has them, and with a label and a weight for every position."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, args.vocab_size, (args.batch_size, args.seq_length)).astype(np.int32)
    module = {"mlm": script, "clm": run_clm_flax}[args.objective]
    collator = module.Collator(FakeTokenizer(args.vocab_size), None, module.DataTrainingArguments(), args.seq_length)
    batch = collator({"input_ids": ids}, rng.random(ids.shape), np.ones(len(ids), bool), 1)
    labels, counts = batch["labels"], batch["label_weights"]
    if args.objective == "mlm":
        labels, counts = np.zeros(ids.size, np.int32), np.zeros(ids.size, np.float32)
        counted = batch["label_weights"] > 0
        positions = batch["label_positions"][counted]
        labels[positions], counts[positions] = batch["labels"][counted], 1
    everywhere = {name: batch[name] for name in ("input_ids", "attention_mask")}
    everywhere |= {"labels_BT": labels.reshape(ids.shape), "weights_BT": counts.reshape(ids.shape)}
    batch["stop"] = everywhere["stop"] = np.zeros(1, np.int32)
    return tuple({name: jnp.asarray(array)[None] for name, array in b.items()} for b in (batch, everywhere))


def make_config(args) -> PretrainedConfig:
    if args.objective == "clm":
        sizes = {"n_embd": args.hidden_size, "n_layer": args.num_hidden_layers, "n_head": args.hidden_size // 64}
        return GPT2Config(vocab_size=args.vocab_size, n_positions=args.seq_length, **sizes)
    return RobertaConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.hidden_size // 64,
        intermediate_size=4 * args.hidden_size,
        vocab_size=args.vocab_size,
        max_position_embeddings=args.seq_length + 2,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--objective", choices=("mlm", "clm"), default="mlm")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, help="default: 50265 for mlm, 50257 for clm")
    parser.add_argument("--batch_size", type=int, help="default: 16 for mlm, 8 for clm")
    parser.add_argument("--seq_length", type=int, help="default: 128 for mlm, 512 for clm")
    parser.add_argument("--num_steps", type=int, default=10, help="timed steps of each kind")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    defaults = {"mlm": (50265, 16, 128), "clm": (50257, 8, 512)}[args.objective]
    for name, value in zip(("vocab_size", "batch_size", "seq_length"), defaults, strict=True):
        setattr(args, name, getattr(args, name) or value)

    module = {"mlm": script, "clm": run_clm_flax}[args.objective]
    config = make_config(args)
    model = module.MODELS[config.model_type](config, layers.Compute(attention="chunked"))
    params = jax.jit(functools.partial(weights.init, model))(jax.random.key(0))
    optimizer = optax.adamw(1e-4, mask=optimizers.decay_mask)
    devices = sharding.one_device()
    dropout_rng = randomness.device_rng(0, "dropout", impl="rbg")
    own_batch, other_batch = make_batches(args)
    losses = {
        "this script": (module.loss_fn, own_batch),
        "integer labels": (functools.partial(every_position_loss, one_hot=False), other_batch),
        "one-hot labels": (functools.partial(every_position_loss, one_hot=True), other_batch),
    }
    runs = {}
    for name, (loss_fn, batch) in losses.items():
        model_loss_fn = functools.partial(loss_fn, model=model)
        step, _ = module.make_steps(model_loss_fn, optimizer, optax.constant_schedule(1e-4), devices)
        state = sharding.create_train_state(jax.tree.map(jnp.array, params), optimizer, devices)
        print(f"Compiling: {name}", file=sys.stderr)
        state, metrics = step(state, batch, dropout_rng)
        runs[name] = [step, batch, state, [], float(metrics["loss"])]

    for _ in tqdm(range(args.num_steps), desc="Timing", unit="turn"):
        for run in runs.values():
            start = time.perf_counter()
            run[2], metrics = run[0](run[2], run[1], dropout_rng)
            jax.block_until_ready(metrics)
            run[3].append(time.perf_counter() - start)

    shape = f"{args.batch_size} x {args.seq_length} tokens, {config.vocab_size:,} words"
    print(f"{args.objective}, {shape}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{'':15s}{'loss':>8s}{'median s':>10s}{'min':>8s}{'max':>8s}{'ratio (min to max)':>26s}{'memory':>11s}{'ratio':>7s}")
    own_times, own_memory, figures = runs["this script"][3], memory_of(runs["this script"][0]), {}
    for name, (step, _, _, times, loss) in runs.items():
        ratios, memory = [b / a for a, b in zip(own_times, times, strict=True)], memory_of(step)
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(
            f"{name:15s}{loss:8.4f}{statistics.median(times):10.3f}{min(times):8.3f}{max(times):8.3f}{ratio:>26s}"
            f"{memory:7.0f} MiB{memory / own_memory:7.2f}"
        )
        figures[name] = {"seconds": times, "ratios": ratios, "mib": memory, "loss": loss}
    if args.json:
        args.json.write_text(json.dumps({"task": f"{args.objective}, {shape}", "steps": figures}, indent=4) + "\n")


def memory_of(step: sharding.CompiledStep) -> float:
    """MiB that the compiled step needs at once: state and batch, and what it computes in between."""
    memory = step.compiled.memory_analysis()
    return (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20


if __name__ == "__main__":
    main()
