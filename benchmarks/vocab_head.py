#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How much does a training step gain by scoring the vocabulary at labelled positions only?

    python benchmarks/vocab_head.py

Times the training step of run_mlm_flax.py against the same step whose loss projects every position and builds one-hot
targets, as the original scripts did: same model, batch, optimizer and masks. The two take turns, so that a machine that
slows down slows both; the ratio is taken turn by turn. Prints one table.
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from tqdm import tqdm
from transformers import FlaxAutoModelForMaskedLM, RobertaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import run_mlm_flax as script


class FakeTokenizer:
    """As much of a tokenizer as the collator asks for."""

    all_special_ids, unk_token_id, pad_token_id, mask_token_id = (0, 1, 2, 3, 4), 3, 1, 4

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self.vocab_size)}


def every_position_loss(params, batch, dropout_rng, model, train):
    """The originals' way: scores [B, T, V], one-hot targets [B, T, V], and most of both thrown away."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits_BTV = model(**inputs, params=params, dropout_rng=dropout_rng, train=train)[0]
    losses_BT = optax.softmax_cross_entropy(logits_BTV, jax.nn.one_hot(batch["labels_BT"], logits_BTV.shape[-1]))
    weights_BT = batch["weights_BT"]
    return (losses_BT * weights_BT).sum(), {"weight": weights_BT.sum()}


def make_batches(args) -> tuple[dict, dict]:
    """The same masked rows in both layouts."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, args.vocab_size, (args.batch_size, args.seq_length)).astype(np.int32)
    collator = script.Collator(FakeTokenizer(args.vocab_size), None, script.DataTrainingArguments(), args.seq_length)
    labelled = collator({"input_ids": ids}, rng.random(ids.shape), np.ones(len(ids), bool), 1)
    labels, weights = np.zeros(ids.size, np.int32), np.zeros(ids.size, np.float32)
    counted = labelled["label_weights"] > 0
    positions = labelled["label_positions"][counted]
    labels[positions], weights[positions] = labelled["labels"][counted], 1
    everywhere = {name: labelled[name] for name in ("input_ids", "attention_mask")}
    labelled["stop"] = everywhere["stop"] = np.zeros(1, np.int32)
    everywhere |= {"labels_BT": labels.reshape(ids.shape), "weights_BT": weights.reshape(ids.shape)}
    return tuple({name: jnp.asarray(array)[None] for name, array in batch.items()} for batch in (labelled, everywhere))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=50265)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seq_length", type=int, default=128)
    parser.add_argument("--num_steps", type=int, default=10, help="timed steps of each kind")
    args = parser.parse_args()

    config = RobertaConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.hidden_size // 64,
        intermediate_size=4 * args.hidden_size,
        vocab_size=args.vocab_size,
        max_position_embeddings=args.seq_length + 2,
    )
    model = FlaxAutoModelForMaskedLM.from_config(config)
    optimizer = optax.adamw(1e-4, mask=script.decay_mask)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    everywhere, per_micro_batch = PartitionSpec(), PartitionSpec(None, "data")
    dropout_rng = script.device_rng(0, "dropout", impl="rbg")
    runs = {}
    losses = {"labelled positions": script.loss_fn, "every position": every_position_loss}
    for (name, loss_fn), batch in zip(losses.items(), make_batches(args), strict=True):
        step_fn = functools.partial(
            script.train_step,
            loss_fn=functools.partial(loss_fn, model=model),
            optimizer=optimizer,
            learning_rate_fn=optax.constant_schedule(1e-4),
        )
        step = script.CompiledStep(name, step_fn, mesh, (everywhere, per_micro_batch, everywhere), (0,))
        state = script.create_train_state(jax.tree.map(jnp.array, model.params), optimizer)
        print(f"Compiling: {name}", file=sys.stderr)
        state, metrics = step(state, batch, dropout_rng)
        runs[name] = [step, batch, state, [], float(metrics["loss"])]

    for _ in tqdm(range(args.num_steps), desc="Timing", unit="turn"):
        for run in runs.values():
            start = time.perf_counter()
            run[2], metrics = run[0](run[2], run[1], dropout_rng)
            jax.block_until_ready(metrics)
            run[3].append(time.perf_counter() - start)

    fast, plain = (run[3] for run in runs.values())
    shape = f"{args.batch_size} x {args.seq_length} tokens, {config.vocab_size:,} words"
    print(f"{shape}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{'scores at':20s} {'loss':>8s} {'median s':>9s} {'min':>7s} {'max':>7s} {'temporary memory':>17s}")
    for name, (step, _, _, times, loss) in runs.items():
        memory = step.compiled.memory_analysis().temp_size_in_bytes / 2**20
        print(f"{name:20s} {loss:8.4f} {statistics.median(times):9.3f} {min(times):7.3f} {max(times):7.3f} {memory:13.0f} MiB")
    ratios = [b / a for a, b in zip(fast, plain, strict=True)]
    print(f"ratio turn by turn: median {statistics.median(ratios):.2f}, min {min(ratios):.2f}, max {max(ratios):.2f}")


if __name__ == "__main__":
    main()
