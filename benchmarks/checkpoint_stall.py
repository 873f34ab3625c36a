#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How long does a save hold up training?

    python benchmarks/checkpoint_stall.py

Trains a RoBERTa of the size of roberta-base (125 million parameters) on random tokens and saves it as run_mlm_flax.py does,
training state, flax_model.msgpack and model.safetensors, some times waiting for the disk (synchronous) and some times not
(asynchronous, as in training). Reported are the call that starts a save, which is all that the next step waits for, and what
the steps lose to the writing that goes on beside them. Prints one table. Needs 10 GB of memory and 6 GB of disk.
"""

import argparse
import functools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import optax
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, RobertaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import run_mlm_flax as script
from benchmarks.vocab_head import make_batches
from flaxlm import arguments, checkpoints, optimizers, randomness, sharding, weights


def make_step(args, config: RobertaConfig):
    """The training step of the script, its first state and a batch."""
    model = script.MODELS[config.model_type](config)
    optimizer = optax.adamw(1e-4, mask=optimizers.decay_mask)
    devices = sharding.one_device()
    loss_fn = functools.partial(script.loss_fn, model=model)
    step, _ = script.make_steps(loss_fn, optimizer, optax.constant_schedule(1e-4), devices)
    params = jax.jit(functools.partial(weights.init, model))(jax.random.key(0))
    state = sharding.create_train_state(params, optimizer, devices)
    return model, step, state, make_batches(args)[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--num_saves", type=int, default=3, help="saves of each kind")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seq_length", type=int, default=128)
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--num_hidden_layers", type=int, default=12)
    parser.add_argument("--output_dir", type=Path, default=None, help="where to save; unset: the temporary directory")
    args = parser.parse_args()
    args.vocab_size = 50265
    config = RobertaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.hidden_size // 64,
        intermediate_size=4 * args.hidden_size,
        max_position_embeddings=514,
    )
    model, step, state, batch = make_step(args, config)
    num_params = sum(array.size for array in jax.tree.leaves(state.params))
    rng = randomness.device_rng(0, "dropout", impl="rbg")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))

    def timed_step() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = step(state, batch, rng)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory(dir=args.output_dir) as output_dir:
        saver = checkpoints.Saver(arguments.TrainingArguments(output_dir=output_dir), model, tokenizer, {}, None)
        for _ in range(2):
            timed_step()
        plain = statistics.median(timed_step() for _ in range(5))
        synchronous, calls, losses = [], [], []
        for number in range(2 * args.num_saves):
            start = time.perf_counter()
            saver.save(number, state, {})
            if number % 2:
                saver.wait()
                synchronous.append(time.perf_counter() - start)
                continue
            calls.append(time.perf_counter() - start)
            num_steps = 0
            while not saver.job.done():
                timed_step()
                num_steps += 1
            losses.append(time.perf_counter() - start - calls[-1] - num_steps * plain)
            saver.wait()
    print(
        f"{num_params / 1e6:.0f} million parameters, {jax.devices()[0].device_kind}, jax {jax.__version__}; step {plain:.2f} s"
    )
    for name, times in (
        ("synchronous save", synchronous),
        ("asynchronous: the call that the next step waits for", calls),
        ("asynchronous: what the steps beside the writing lose", losses),
    ):
        print(f"{name:54s} median {statistics.median(times):6.2f} s, min {min(times):6.2f}, max {max(times):6.2f}")
    print(f"the next step waits for {statistics.median(calls) / statistics.median(synchronous):.1%} of a synchronous save")


if __name__ == "__main__":
    main()
