# SPDX-License-Identifier: Apache-2.0
"""What benchmarks train: models by objective and size, the quick start's text, and all that main() of a script makes of it."""

import argparse
import functools
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
import optax
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

from flaxlm import arguments, batches, command_line, files, optimizers, sharding, token_rows, tokenization
from flaxlm.token_rows import Collator, TokenRows
from quickstart.python_docs_corpus import documents, standard_library_files


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
    args: arguments.Arguments
    config: PretrainedConfig
    rows: TokenRows
    collator: Collator
    plan: batches.Plan

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        return batches.train_batches(self.rows, self.collator, self.plan, self.args.training.seed)


def set_up(options: argparse.Namespace) -> Setup:
    """Arguments of the script, rows of tokens, and the plan, as main() makes them."""
    script, config = importlib.import_module(OBJECTIVES[options.objective].module), make_config(options)
    text_file = make_corpus(options.cache_dir, as_documents=options.objective == "nsp")
    flags = {
        "model_type": config.model_type, "tokenizer_name": "none", "train_file": text_file,
        "output_dir": options.cache_dir / "run", "cache_dir": options.cache_dir / "datasets",
        script.DataTrainingArguments.row_length_flag: options.seq_length, "per_device_train_batch_size": options.batch_size,
        "attention_implementation": options.attention_implementation, "learning_rate": options.learning_rate,
        "weight_decay": 0.01, "max_steps": 10**9, "lr_scheduler_type": "constant",
    }  # fmt: skip
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    args = command_line.parse([*argv, "--do_train"], script.DataTrainingArguments, script.MODELS, None)
    tokenizer = make_tokenizer(text_file)
    tokenization.match_config_and_tokenizer(config, tokenizer, args.model)
    row_length = tokenization.choose_row_length(args.data, config, tokenizer)
    args.data.adapt_config(config, row_length)
    collator = script.Collator(tokenizer, config, args.data, row_length)
    rows = prepare_rows(script, text_file, tokenizer, collator, args.data, args.model.cache_dir)
    rows = {name: array[:-1] for name, array in rows.items()}  # the last row is padded; without it the peer needs no mask
    plan = batches.make_plan(args.training, len(rows["input_ids"]), collator.row_length)
    return Setup(script, args, config, rows, collator, plan)


def prepare_rows(
    script: ModuleType,
    text_file: Path,
    tokenizer: PreTrainedTokenizerFast,
    collator: Collator,
    data_args: arguments.DataArguments,
    cache_dir: str,
) -> TokenRows:
    """Rows of tokens of all the text in a file."""
    dataset = files.load(str(text_file), "--train_file", cache_dir, data_args.text_loader_options())
    tokenize_fn = functools.partial(script.tokenize_texts, tokenizer=tokenizer, **collator.tokenize_options)
    return token_rows.tokenize_and_group({"train": dataset}, tokenize_fn, collator, data_args, cache_dir)["train"]


def compile_later(
    script: ModuleType, args: arguments.Arguments, model: nn.Module, plan: batches.Plan, devices: sharding.Devices
) -> tuple[sharding.CompiledStep, optax.GradientTransformation]:
    """The training step of a script and its optimizer, as main() makes them."""
    loss_fn = functools.partial(script.loss_fn, model=model)
    learning_rate_fn = optimizers.make_learning_rate(args.training, plan)
    optimizer = optimizers.make_optimizer(args.training, learning_rate_fn)
    return script.make_steps(loss_fn, optimizer, learning_rate_fn, devices, args.training.z_loss)[0], optimizer


def describe_model(setup: Setup, args: argparse.Namespace, num_params: int, target_length: int) -> str:
    target = f" to {target_length}" if setup.config.is_encoder_decoder else ""
    rates = sorted({getattr(setup.config, name) for name in DROPOUT_FIELDS if getattr(setup.config, name, 0)})
    dropout = ", ".join(map(str, rates)) or "none"
    return (
        f"{args.objective}, {args.model_size} {setup.config.model_type} of {num_params:,} parameters, vocabulary"
        f" {setup.config.vocab_size:,}, batches of {args.batch_size} x {args.seq_length}{target} tokens, dropout {dropout}"
    )
