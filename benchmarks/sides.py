# SPDX-License-Identifier: Apache-2.0
"""The two sides that are timed: the training loop of a script, and the usual one in PyTorch."""

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from benchmarks.workloads import OBJECTIVES, Setup, compile_later
from flaxlm import batches, layouts, logs, models, processes, randomness, sharding, weights


class OurSide:
    """The training loop of main(), without evaluation, saving and TensorBoard."""

    def __init__(self, setup: Setup, precision: str):
        self.name, self.precision = Path(setup.script.__file__).name, precision
        args = setup.args._replace(model=dataclasses.replace(setup.args.model, dtype=precision))
        devices = sharding.all_devices()
        model = models.build(setup.config, args, setup.script.MODELS)
        params = weights.load(model, args, devices)
        self.weights = jax.tree.map(np.array, params)  # copies: training takes over the buffers
        self.p_train_step, optimizer = compile_later(setup.script, args, model, setup.plan, devices)
        self.state = sharding.create_train_state(params, optimizer, devices)
        self.log = logs.TrainingLog(args.training, setup.plan, None)
        self.log.bar = tqdm(disable=True)
        stop = processes.StopSignal()
        self.batches = batches.put_on_devices(setup.batches(), devices.mesh, sharding.PER_MICRO_BATCH, stop)
        self.dropout_rng = randomness.device_rng(args.training.seed, "dropout", impl="rbg")
        self.batch = next(self.batches)
        self.p_train_step.compile(self.state, self.batch.arrays, self.dropout_rng)

    def window(self, num_steps: int) -> tuple[float, int, float]:
        """Train for so many steps: seconds, tokens, and the last loss."""
        num_tokens, start = 0, time.perf_counter()
        self.log.stopwatch.start()
        for _ in range(num_steps):
            self.batch = next(self.batches)
            self.state, metrics = self.p_train_step(self.state, self.batch.arrays, self.dropout_rng)
            self.log.add(1, metrics, self.batch.num_tokens)
            num_tokens += self.batch.num_tokens
        self.log.fetch()
        jax.block_until_ready(self.state)
        return time.perf_counter() - start, num_tokens, float(metrics["loss"])

    def bare_window(self, num_steps: int) -> None:
        """The compiled step alone, on one batch that lies on the device."""
        for _ in range(num_steps):
            self.state, _ = self.p_train_step.compiled(self.state, self.batch.arrays, self.dropout_rng)
        jax.block_until_ready(self.state)

    def peak_memory(self) -> float:
        """Bytes: the compiled step's arguments (the state and a batch) and everything in between."""
        memory = self.p_train_step.compiled.memory_analysis()
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes + results


class TorchSide:
    """The usual PyTorch training loop."""

    def __init__(self, setup: Setup, args: argparse.Namespace, precision: str, initial_weights: Any):
        import torch
        import transformers

        self.torch, self.precision, self.how = torch, precision, "eager"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        model_class = getattr(transformers, OBJECTIVES[args.objective].torch_class)
        attention = "sdpa" if model_class._supports_sdpa else "eager"
        self.model = model_class._from_config(setup.config, attn_implementation=attention).to(torch.float32)
        if initial_weights is not None:
            load_weights(self.model, layouts.to_pytorch(initial_weights), torch)
        self.model.to(self.device).train()
        training_args = setup.args.training
        matrices = [p for name, p in self.model.named_parameters() if p.ndim >= 2]
        others = [p for name, p in self.model.named_parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": training_args.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=training_args.learning_rate,
            betas=(training_args.adam_beta1, training_args.adam_beta2),
            eps=training_args.adam_epsilon,
            fused=True,
        )
        self.forward, self.attention = self.model, attention
        self.batches = batches.prefetch(map(self.put_on_device, setup.batches()))

    @property
    def name(self) -> str:
        return f"PyTorch, {self.attention} attention, {self.how}".replace("eager attention, ", "")

    def put_on_device(self, batch: dict[str, np.ndarray]) -> tuple[dict, int]:
        """A batch of this project in the layout of the PyTorch classes, and its number of tokens. Runs in the thread."""
        arrays = {name: self.torch.from_numpy(array) for name, array in peer_batch(batch).items()}
        if self.device.type == "cuda":
            arrays = {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in arrays.items()}
        return arrays, int(batch["attention_mask"].sum())

    def window(self, num_steps: int) -> tuple[float, int, float]:
        """Train for so many steps: seconds, tokens, and the last loss."""
        num_tokens, start = 0, time.perf_counter()
        for _ in range(num_steps):
            arrays, tokens = next(self.batches)
            with self.torch.autocast(self.device.type, self.torch.bfloat16, enabled=self.precision == "bfloat16"):
                loss = self.forward(**arrays).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            num_tokens += tokens
        last_loss = loss.item()
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter() - start, num_tokens, last_loss

    def compile_if_faster(self, choice: str) -> None:
        """Try torch.compile, and keep it if a short window says so."""
        if choice == "off":
            return
        eager_seconds = min(self.window(1)[0] for _ in range(3))
        try:
            self.forward = self.torch.compile(self.model, dynamic=False)
            self.window(1)
            compiled_seconds = min(self.window(1)[0] for _ in range(3))
        except Exception as error:
            print(f"torch.compile: {next(iter(str(error).splitlines()), type(error).__name__)}", file=sys.stderr)
            compiled_seconds = math.inf
        found = f"eager {eager_seconds:.2f} s, torch.compile {compiled_seconds:.2f} s"
        print(f"PyTorch in {self.precision}, seconds of a step: {found}", file=sys.stderr)
        if choice == "auto" and compiled_seconds > eager_seconds:
            self.forward = self.model
        else:
            self.how = "torch.compile"

    def peak_memory(self) -> float | None:
        return self.torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


def peer_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch as PyTorch classes take it: int64, labels of -100 where none is; no mask where there is no padding."""
    batch = {name: array[0] for name, array in batch.items() if name != "stop"}
    inputs = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")
    arrays = {name: batch[name] for name in inputs if name in batch}
    if batch["attention_mask"].all():
        del arrays["attention_mask"]
    is_label = batch["label_weights"] > 0
    if "label_positions" in batch:
        labels = np.full(batch["input_ids"].size, -100)
        labels[batch["label_positions"][is_label]] = batch["labels"][is_label]
        arrays["labels"] = labels.reshape(batch["input_ids"].shape)
        if "next_sentence_labels" in batch:
            arrays["next_sentence_label"] = batch["next_sentence_labels"]
    elif "decoder_input_ids" in batch:
        arrays["labels"] = np.where(is_label, batch["labels"], -100)
    else:
        arrays["labels"] = batch["input_ids"]  # the class shifts them
    return {name: array.astype(np.int64) for name, array in arrays.items()}


def load_weights(model, arrays: dict[str, np.ndarray], torch: ModuleType) -> None:
    """Our initial weights; what Flax has no copy of is tied to something that it has."""
    state = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()
    own = {id(parameter) for name, parameter in model.named_parameters() if name in state}
    untied = [name for name, parameter in model.named_parameters() if name in missing and id(parameter) not in own]
    if untied or unexpected:
        raise ValueError(f"weights do not fit: none for {untied}, no place for {unexpected}")
