#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the original scripts' commands, and larger models, take of TPUs and GPUs that are not there: compiled, not guessed.

    pip install ".[compile]"
    python benchmarks/compile_table.py --machines v3-8
    python benchmarks/compile_table.py --models bart-base --machines v3-8 h100:8 -- --attention_implementation eager

Each case is a training script with --compile_for, in a process of its own; flags behind -- go to all of them. A case takes one
to three minutes for a TPU on two cores, and half a minute for a GPU. Configurations are those of the models that they are
named after, tokenizers are made up: only their sizes matter.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, models
from tqdm import tqdm
from transformers import (
    BartConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


class Case(NamedTuple):
    """A model and the command that trains it."""

    script: str
    config: PretrainedConfig
    flags: str
    num_sentinels: int = 0


FSDP = "--fsdp --dtype bfloat16 --gradient_checkpointing"
T5_BASE = {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12}
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4}
CASES = {
    "roberta-base": Case(
        "run_mlm_flax.py", RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
        "--max_seq_length 128 --per_device_train_batch_size 128 --per_device_eval_batch_size 128",
    ),
    "gpt2": Case(
        "run_clm_flax.py", GPT2Config(),
        "--block_size 512 --per_device_train_batch_size 64 --per_device_eval_batch_size 64",
    ),
    "t5-v1_1-base": Case(
        "run_t5_mlm_flax.py", T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5_BASE),
        "--max_seq_length 512 --per_device_train_batch_size 32 --per_device_eval_batch_size 32 --adafactor", 100,
    ),
    "bart-base": Case(
        "run_bart_dlm_flax.py",
        BartConfig(
            vocab_size=50265, d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12,
            decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072,
        ),
        "--max_seq_length 1024 --per_device_train_batch_size 32 --per_device_eval_batch_size 32",
    ),
    "llama-1.1b": Case(
        "run_clm_flax.py", LlamaConfig(max_position_embeddings=2048, **LLAMA_1B),
        f"--block_size 2048 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 {FSDP}",
    ),
    "llama-7b": Case(
        "run_clm_flax.py", LlamaConfig(max_position_embeddings=2048),
        f"--block_size 2048 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 {FSDP}",
    ),
}  # fmt: skip
ORIGINALS = ("roberta-base", "gpt2", "t5-v1_1-base", "bart-base")


# A script as a program that does not look for the largest batch.
RUN = """
import importlib, sys
sys.path.insert(0, {root!r})
from flaxlm import cli, estimates
estimates.PATIENCE = 0.0
script = importlib.import_module({script!r})
cli.end(cli.run(script.main, script.__file__))
"""


def program(script: str) -> list[str]:
    """The beginning of a command line."""
    return [sys.executable, "-c", RUN.format(root=str(ROOT), script=script.removesuffix(".py"))]


def make_model_dir(case: Case, directory: Path) -> None:
    """A configuration, and a tokenizer of as many tokens."""
    specials = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
    specials |= {"cls_token": "<s>", "sep_token": "</s>"}
    names = list(dict.fromkeys(specials.values()))
    sentinels = [f"<extra_id_{i}>" for i in range(case.num_sentinels)]
    words = [f"word{i}" for i in range(case.config.vocab_size - len(names) - len(sentinels))]
    vocab = {token: i for i, token in enumerate([*names, *words, *sentinels])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=sentinels, model_max_length=10**6, **specials
    ).save_pretrained(directory)
    case.config.save_pretrained(directory)


def compile_case(case: Case, machine: str, more: list[str]) -> dict | str:
    """What the script says of a machine, or the line that it ends with."""
    with tempfile.TemporaryDirectory() as directory:
        make_model_dir(case, Path(directory))
        command = [*program(case.script), "--config_name", directory, "--tokenizer_name", directory]
        command += ["--output_dir", f"{directory}/out", *case.flags.split(), "--compile_for", machine, "--json", *more]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 1) or not done.stdout:
        return done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout)


def row(model: str, machine: str, found: dict | str) -> str:
    """A line of the table."""
    if isinstance(found, str):
        return f"| {model} | {machine} | {found} ||||||"
    gib = lambda value: "?" if value is None else f"{value / GIB:.1f}"  # noqa: E731
    model_info, size = found["model"], found["bytes"]
    rows = f"{found['rows_per_device']} x {found['tokens_per_row']}"
    speed = found["speed"].get("50%", {}).get("tokens_per_second", 0)
    verdict = "fits" if found["fits"] else "**does not fit**"
    return (
        f"| {model} {rows} | {machine} | {model_info['dtype']}, {model_info['attention']} | {gib(size['training_step'])} |"
        f" {gib(size['peak'])} of {gib(found['machine']['bytes'])}: {verdict} | {speed:,.0f} | {found['compile_seconds']:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(ORIGINALS))
    parser.add_argument("--machines", nargs="+", default=["v3-8"])
    parser.add_argument("--output_file", type=Path, default=None, help="keep all that was found, in JSON")
    argv = sys.argv[1:]
    own, more = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser.parse_args(own)
    cases = [(model, machine) for model in args.models for machine in args.machines]
    print("| command, per device | machine | how | GiB of a step | GiB at most | tokens/s at 50 % | seconds to compile |")
    print("|---|---|---|---|---|---|---|", flush=True)
    everything = []
    for model, machine in tqdm(cases, desc="Compiling", unit="case", disable=not sys.stderr.isatty()):
        started = time.monotonic()
        found = compile_case(CASES[model], machine, more)
        everything.append({"model": model, "machine": machine, "flags": more, "found": found})
        tqdm.write(row(model, machine, found))
        print(f"{model} for {machine}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    if args.output_file:
        args.output_file.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
