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
import contextlib
import dataclasses
import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")  # of a GPU: PyTorch needs room beside JAX
# PyTorch's threads wait without spinning. Where other programs run, that made its steps 2.5 times as fast.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, PartitionSpec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    BartConfig,
    BertConfig,
    GPT2Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from quickstart.python_docs_corpus import documents, standard_library_files  # noqa: E402


class Objective(NamedTuple):
    module: str
    config_class: type[PretrainedConfig]
    config: dict[str, Any]  # of both sizes
    torch_class: str
    sizes: dict[str, tuple[int, int, dict[str, Any]]]  # rows in a batch, tokens in a row, configuration


TINY_ROBERTA = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
T5_V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "vocab_size": 32128, "decoder_start_token_id": 0}
OBJECTIVES = {
    "mlm": Objective(
        "run_mlm_flax", RobertaConfig,
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
        "RobertaForMaskedLM",
        {
            "tiny": (16, 128, TINY_ROBERTA),
            "base": (128, 128, {}),
        },
    ),
    "clm": Objective(
        "run_clm_flax", GPT2Config, {"vocab_size": 50257}, "GPT2LMHeadModel",
        {"tiny": (8, 512, {"n_embd": 256, "n_layer": 4, "n_head": 4}), "base": (64, 512, {})},
    ),
    "t5": Objective(
        "run_t5_mlm_flax", T5Config, T5_V1_1, "T5ForConditionalGeneration",
        {
            "tiny": (
                *(8, 512),  # with a vocabulary as large as the others', like that of the Norwegian T5
                {"vocab_size": 50257, "d_model": 256, "num_layers": 4, "num_heads": 4, "d_kv": 64, "d_ff": 1024},
            ),
            "base": (32, 512, {"d_model": 768, "num_layers": 12, "num_heads": 12, "d_kv": 64, "d_ff": 2048}),
        },
    ),
    "bart": Objective(
        "run_bart_dlm_flax", BartConfig, {"vocab_size": 50265}, "BartForConditionalGeneration",
        {
            size: (rows, length, {"d_model": width} | {
                f"{part}_{name}": value for part in ("encoder", "decoder")
                for name, value in (("layers", layers), ("attention_heads", heads), ("ffn_dim", 4 * width))
            })
            for size, rows, length, width, layers, heads in (("tiny", 8, 512, 256, 4, 4), ("base", 32, 1024, 768, 6, 12))
        },
    ),
    "nsp": Objective(
        "run_pretraining_flax", BertConfig, {}, "BertForPreTraining",
        {"tiny": (16, 128, TINY_ROBERTA), "base": (128, 128, {})},
    ),
}  # fmt: skip
DROPOUT_FIELDS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    *("dropout_rate", "dropout", "attention_dropout", "activation_dropout"),
)
SPECIAL_TOKENS = {
    "bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>",
    "cls_token": "<cls>", "sep_token": "<sep>",
}  # fmt: skip
# Dense matrix FLOP/s of a device as JAX counts them (TPU v3: a core), and of float32 where products are rounded to TF32.
PEAK_FLOPS = {
    "H200|H100 80GB HBM3|H100 SXM": {"bfloat16": 989e12, "float32": 494e12},
    "H100 PCIe": {"bfloat16": 756e12, "float32": 378e12},
    "A100": {"bfloat16": 312e12, "float32": 156e12},
    "NVIDIA L4$": {"bfloat16": 121e12, "float32": 60e12},
    "TPU v6": {"bfloat16": 918e12},
    "TPU v5 lite|TPU v5e": {"bfloat16": 197e12},
    "TPU v5": {"bfloat16": 459e12},
    "TPU v4": {"bfloat16": 275e12},
    "TPU v3": {"bfloat16": 61.5e12},
}


# ---- Text and model ------------------------------------------------------------------------------------------------------


def make_corpus(cache_dir: Path, as_documents: bool = False) -> Path:
    """The quick start's text in one file: a paragraph a line; as documents, with an empty line between two."""
    path = cache_dir / ("documents.txt" if as_documents else "corpus.txt")
    if not path.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        found = documents(tqdm(standard_library_files(), desc="Reading the standard library", unit="file"))
        text = ("\n\n" if as_documents else "\n").join(map("\n".join, found))
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(text + "\n", "utf-8", errors="replace")
        partial.replace(path)
    return path


def make_tokenizer(corpus: Path, vocab_size: int = 8192) -> PreTrainedTokenizerFast:
    """Byte-level BPE with every special token that an objective asks for, made from the corpus."""
    path = corpus.with_name(f"tokenizer-{vocab_size}-{len(SPECIAL_TOKENS)}.json")
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        special_tokens = [*SPECIAL_TOKENS.values(), *(f"<extra_id_{i}>" for i in range(100))]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train([str(corpus)], trainer)
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
        tokenizer.save(str(path))
    return PreTrainedTokenizerFast(tokenizer_file=str(path), **SPECIAL_TOKENS)


def make_config(args: argparse.Namespace) -> PretrainedConfig:
    """The model's configuration; sets the sizes that were not asked for."""
    objective = OBJECTIVES[args.objective]
    batch_size, seq_length, sizes = objective.sizes[args.model_size]
    args.batch_size, args.seq_length = args.batch_size or batch_size, args.seq_length or seq_length
    config = objective.config_class(**objective.config | sizes)
    if args.vocab_size:
        config.vocab_size = args.vocab_size
    if hasattr(config, "max_position_embeddings"):
        config.max_position_embeddings = max(config.max_position_embeddings, args.seq_length + 2)
    for name in DROPOUT_FIELDS:
        if args.dropout is not None and hasattr(config, name):
            setattr(config, name, args.dropout)
    return config


class Setup(NamedTuple):
    """What both sides share."""

    script: ModuleType
    arguments: tuple
    config: PretrainedConfig
    rows: dict[str, np.ndarray]
    collator: Callable
    plan: Any

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        return self.script.train_batches(self.rows, self.collator, self.plan, self.arguments[2].seed)


def set_up(args: argparse.Namespace) -> Setup:
    """Arguments of the script, rows of tokens, and the plan, as main() makes them."""
    script, config = importlib.import_module(OBJECTIVES[args.objective].module), make_config(args)
    corpus = make_corpus(args.cache_dir, as_documents=args.objective == "nsp")
    flags = {
        "model_type": config.model_type, "tokenizer_name": "none", "train_file": corpus,
        "output_dir": args.cache_dir / "run",
        script.DataTrainingArguments.row_length_flag: args.seq_length, "per_device_train_batch_size": args.batch_size,
        "attention_implementation": args.attention_implementation, "learning_rate": args.learning_rate, "weight_decay": 0.01,
        "max_steps": 10**9, "lr_scheduler_type": "constant",
    }  # fmt: skip
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    model_args, data_args, training_args = script.parse_arguments([*argv, "--do_train"])
    tokenizer = make_tokenizer(corpus)
    script.match_config_and_tokenizer(config, tokenizer, model_args)
    row_length = script.choose_row_length(data_args, config, tokenizer)
    data_args.adapt_config(config, row_length)
    collator = script.Collator(tokenizer, config, data_args, row_length)
    cache_dir = str(args.cache_dir / "datasets")
    raw_datasets = {"train": script.load_text_file(str(corpus), "train", data_args, cache_dir)}
    rows = script.tokenize_and_group(raw_datasets, tokenizer, collator, data_args, cache_dir)["train"]
    rows = {name: array[:-1] for name, array in rows.items()}  # the last row is padded; without it the peer needs no mask
    plan = script.make_plan(training_args, len(rows["input_ids"]), collator.row_length)
    return Setup(script, (model_args, data_args, training_args), config, rows, collator, plan)


# ---- The sides -----------------------------------------------------------------------------------------------------------


class OurSide:
    """The training loop of main(), without evaluation, saving and TensorBoard."""

    def __init__(self, setup: Setup, precision: str):
        self.script, (model_args, _, training_args) = setup.script, setup.arguments
        self.name, self.precision = Path(setup.script.__file__).name, precision
        model_args = dataclasses.replace(model_args, dtype=precision)
        mesh = Mesh(np.array(jax.devices()), ("data",))
        model, params = setup.script.load_params(setup.config, model_args, training_args, mesh)
        self.weights = jax.tree.map(np.array, params)  # copies: training takes over the buffers
        self.p_train_step, _, optimizer = setup.script.compile_steps(model, training_args, setup.plan, mesh)
        self.state, _ = setup.script.start_or_resume(params, optimizer, training_args, {}, mesh)
        self.log = setup.script.TrainingLog(training_args, setup.plan, None, setup.script.Stopwatch())
        self.log.bar = tqdm(disable=True)
        stop = setup.script.StopSignal()
        self.batches = setup.script.put_on_devices(setup.batches(), mesh, PartitionSpec(None, "data"), stop)
        self.dropout_rng = setup.script.device_rng(training_args.seed, "dropout", impl="rbg")
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

    def __init__(self, setup: Setup, args: argparse.Namespace, precision: str, weights: Any):
        import torch
        import transformers

        self.torch, self.precision, self.how = torch, precision, "eager"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        model_class = getattr(transformers, OBJECTIVES[args.objective].torch_class)
        attention = "sdpa" if model_class._supports_sdpa else "eager"
        self.model = model_class._from_config(setup.config, attn_implementation=attention).to(torch.float32)
        if weights is not None:
            load_weights(self.model, setup.script.pytorch_state_dict(weights), torch)
        self.model.to(self.device).train()
        training_args = setup.arguments[2]
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
        self.batches = setup.script.prefetch(map(self.put_on_device, setup.batches()))

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


# ---- Measuring -----------------------------------------------------------------------------------------------------------


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


def peak_flops(device_kind: str, precision: str) -> float | None:
    """Of the first device of the table whose pattern is found."""
    return next((peak.get(precision) for pattern, peak in PEAK_FLOPS.items() if re.search(pattern, device_kind)), None)


def resident_bytes(what: str) -> int | None:
    """VmRSS or VmHWM of this process; None where the system does not tell."""
    try:
        return 1024 * int(re.search(rf"{what}:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    except OSError:
        return None


def forget_peak() -> None:
    """Let VmHWM start from what is resident now: making the model and compiling it don't count."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


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


def cpu_name() -> str:
    try:
        return re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """What the figures hold for."""
    names = [name for name in ("jax", "flax", "optax", "transformers", "torch") if importlib.util.find_spec(name)]
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "device": jax.devices()[0].device_kind,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in names} | {"python": platform.python_version()},
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": git.stdout.strip() or None,
        "command": " ".join(sys.argv),
    }


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


def describe_model(setup: Setup, args: argparse.Namespace, num_params: int, target_length: int) -> str:
    target = f" to {target_length}" if setup.config.is_encoder_decoder else ""
    rates = sorted({getattr(setup.config, name) for name in DROPOUT_FIELDS if getattr(setup.config, name, 0)})
    dropout = ", ".join(map(str, rates)) or "none"
    return (
        f"{args.objective}, {args.model_size} {setup.config.model_type} of {num_params:,} parameters, vocabulary"
        f" {setup.config.vocab_size:,}, batches of {args.batch_size} x {args.seq_length}{target} tokens, dropout {dropout}"
    )


def main() -> None:
    args = read_arguments()
    setup = set_up(args)
    env, resident_before = environment(), resident_bytes("VmRSS")
    ours = [OurSide(setup, precision) for precision in args.precision] if args.side != "torch" else []
    weights = ours[0].weights if ours else None
    make_peer = functools.partial(TorchSide, setup, args, weights=weights)
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
        peak = peak_flops(env["device"], side.precision)
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
