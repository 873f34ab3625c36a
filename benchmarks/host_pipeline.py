#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time what the host does for a batch, on one core: draw random numbers, put noise into rows, label them.

    python benchmarks/host_pipeline.py

Tokens are those of the rows of text that go in. `collate` is the collator with its random numbers, `whole` what the training
loop takes from the prefetching thread: rows gathered from a memory-mapped file in random order, and collated.
"""

import argparse
import functools
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BartConfig, GPT2Config, PretrainedConfig, PreTrainedTokenizerFast, RobertaConfig, T5Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flaxlm.batches import Plan, train_batches

OBJECTIVES = {
    "mlm": ("run_mlm_flax", RobertaConfig, {}),
    "mlm, whole words": ("run_mlm_flax", RobertaConfig, {"whole_word_mask": True}),
    "clm": ("run_clm_flax", GPT2Config, {}),
    "clm, fim of tokens": ("run_clm_flax", GPT2Config, {"fim_rate": 0.5, "fim_level": "token"}),
    "clm, fim": ("run_clm_flax", GPT2Config, {"fim_rate": 0.5}),
    "t5": ("run_t5_mlm_flax", T5Config, {}),
    "t5, ul2": ("run_t5_mlm_flax", T5Config, {"objective": "ul2"}),
    "bart": ("run_bart_dlm_flax", BartConfig, {}),
}
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
EXTRA_TOKENS = [*(f"<extra_id_{i}>" for i in reversed(range(100))), "[NLU]", "[NLG]", "[S2S]"]
CODE = [path.read_text("utf-8") for path in sorted(Path(os.__file__).parent.glob("*.py"))]
FIM_TOKENS = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>"]


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Words that need no text: what counts are ids, and which of them are special."""
    words = [f"w{i}" for i in range(vocab_size - len(SPECIAL_TOKENS) - len(EXTRA_TOKENS))]
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *words, *EXTRA_TOKENS])}
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), SPECIAL_TOKENS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<unk>")), **names)


def make_rows(columns: dict[str, int], num_rows: int, row_length: int, vocab_size: int, rng) -> dict[str, np.ndarray]:
    """Rows in memory-mapped files: random words, documents of about 300 tokens, starts of words or sentences at random."""
    rows = {}
    for name in columns:
        with tempfile.TemporaryFile() as file:
            rows[name] = np.memmap(file, np.int32, "w+", shape=(num_rows, row_length))
        if name == "input_ids":
            rows[name][:] = rng.integers(len(SPECIAL_TOKENS), vocab_size - len(EXTRA_TOKENS), (num_rows, row_length))
            rows[name][rng.random((num_rows, row_length)) < 1 / 300] = SPECIAL_TOKENS.index("</s>")
        else:
            rows[name][:] = rng.random((num_rows, row_length)) < {"word_starts": 0.7, "sentence_starts": 0.05}[name]
    return rows


def make_code_tokenizer() -> PreTrainedTokenizerFast:
    """For noise that reads tokens as text: byte-level, of the standard library, from which its rows come too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=FIM_TOKENS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CODE, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_code_rows(tokenizer: PreTrainedTokenizerFast, num_rows: int, row_length: int) -> dict[str, np.ndarray]:
    """Rows of the standard library's text, in texts of about 300 tokens."""
    ids = np.concatenate([tokenizer.backend_tokenizer.encode(text).ids for text in CODE])
    rows = {"input_ids": np.resize(ids, (num_rows, row_length)).astype(np.int32)}
    return rows | {"text_starts": (np.random.default_rng(0).random((num_rows, row_length)) < 1 / 300).astype(np.int32)}


def million_tokens_per_second(function: Callable[[], None], num_tokens: int, repeats: int) -> list[float]:
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        rates.append(num_tokens / (time.perf_counter() - start) / 1e6)
    return rates


def measure(module: str, config: PretrainedConfig, flags: dict, args: argparse.Namespace) -> dict[str, list[float]]:
    script, rng = importlib.import_module(module), np.random.default_rng(0)
    config.decoder_start_token_id = SPECIAL_TOKENS.index("<pad>")
    reads_text = "fim_rate" in flags
    tokenizer = make_code_tokenizer() if reads_text else make_tokenizer(args.vocab_size)
    collator = script.Collator(tokenizer, config, script.DataTrainingArguments(**flags), args.seq_length)
    num_rows = 100 * args.batch_size
    if reads_text:
        rows = make_code_rows(tokenizer, num_rows, collator.row_length)
    else:
        rows = make_rows(collator.columns, num_rows, collator.row_length, args.vocab_size, rng)
    first_rows = {name: np.array(array[: args.batch_size]) for name, array in rows.items()}
    is_real, num_tokens = np.ones(args.batch_size, bool), args.batch_size * collator.row_length

    def collate():
        collator(first_rows, rng.random((args.batch_size, collator.draws_per_row)), is_real, 1)

    sizes = {"train_batch_size": args.batch_size, "eval_batch_size": args.batch_size, "num_micro_batches": 1}
    lengths = {"steps_per_epoch": 100, "num_steps": 10**9, "num_warmup_steps": 0}
    plan = Plan(num_local_devices=1, num_processes=1, process_index=0, **sizes, **lengths)
    batches = train_batches(rows, collator, plan, seed=0)
    found = {}
    for name, function in (("collate", collate), ("whole", functools.partial(next, batches))):
        million_tokens_per_second(function, num_tokens, 5)
        found[name] = million_tokens_per_second(function, num_tokens, args.num_batches)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=64, help="rows")
    parser.add_argument("--seq_length", type=int, default=512, help="tokens per row (t5: per input)")
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--num_batches", type=int, default=100, help="timed batches of each kind")
    parser.add_argument("--only", default="", help="objectives whose names begin like that")
    parser.add_argument("--json", type=Path, help="write the figures there: million tokens per second, batch by batch")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(f"{args.batch_size} x {args.seq_length} tokens, one core, numpy {np.__version__}; million tokens per second")
    print(f"{'':18s}{'collate: median':>16s}{'min':>8s}{'max':>8s}{'whole: median':>16s}{'min':>8s}{'max':>8s}")
    figures = {}
    for name, (module, config_class, flags) in OBJECTIVES.items():
        if not name.startswith(args.only):
            continue
        found = figures[name] = measure(module, config_class(), flags, args)
        cells = [f"{np.median(r):{w}.1f}{min(r):8.1f}{max(r):8.1f}" for w, r in zip((16, 16), found.values(), strict=True)]
        print(f"{name:18s}{''.join(cells)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=4) + "\n")


if __name__ == "__main__":
    main()
