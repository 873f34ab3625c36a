#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Show what the quick start's GPT-2, T5 or BART learnt: its evaluation beside the unigram baseline, and text that it writes.

    python quickstart/write_text.py --model_dir quickstart/build/clm --corpus_dir quickstart/build/corpus

GPT-2 goes on from the beginnings of paragraphs that it has never seen; T5 and BART get such paragraphs with the noise they
were trained on and write down what is missing, or the whole. The baseline always guesses the commonest token.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from fill_mask import count_tokens, unigram_baseline
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flaxlm import generation, models, randomness, sharding, weights

SCRIPTS = {"gpt2": "run_clm_flax", "t5": "run_t5_mlm_flax", "bart": "run_bart_dlm_flax"}
NUM_EXAMPLES = 4
PROMPT_TOKENS, NEW_TOKENS = 12, 30


def write(
    model: nn.Module, params: Any, prompts: generation.Prompts, num_tokens: int, tokenizer: PreTrainedTokenizerBase, **how: Any
) -> list[list[int]]:
    """What the model writes after each prompt, up to the end of the text."""
    sampling = generation.Sampling(num_tokens=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **how)
    row_length = max(map(len, prompts.begun)) + num_tokens
    return generation.Generator(model, prompts, num_tokens, row_length, sampling, sharding.one_device())(params)


def continue_paragraphs(model: nn.Module, params: Any, tokenizer: PreTrainedTokenizerBase, paragraphs: list[str]) -> None:
    """Print beginnings of paragraphs and what the model makes of them, drawn at random with low temperature."""
    prompts = [tokenizer(paragraph, verbose=False)["input_ids"][:PROMPT_TOKENS] for paragraph in paragraphs]
    written = write(model, params, generation.Prompts(prompts), NEW_TOKENS, tokenizer, temperature=0.6)
    print("\nHow it goes on from the beginnings of paragraphs that were held out:")
    for prompt, ids in zip(prompts, written, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        print(f"  {tokenizer.decode(prompt)} | {' '.join(text.split())}")


def restore_paragraphs(
    model: nn.Module,
    params: Any,
    tokenizer: PreTrainedTokenizerBase,
    paragraphs: list[str],
    script: ModuleType,
    length: int,
) -> None:
    """Print paragraphs, the noisy form that the model reads, and what it writes, the likeliest token each time."""
    config = model.config
    collator = script.Collator(tokenizer, config, script.DataTrainingArguments(), length)
    columns = script.tokenize_texts({"text": paragraphs}, tokenizer, "text", **collator.tokenize_options)
    rows = {name: np.full((len(paragraphs), collator.row_length), fill) for name, fill in collator.columns.items()}
    for name, texts in columns.items():
        for row, values in zip(rows[name], texts, strict=True):
            row[: len(values)] = values[: len(row)]
    uniforms = randomness.row_uniforms(0, ("demonstration",), 0, len(paragraphs), collator.draws_per_row)
    batch = collator(rows, uniforms, np.ones(len(paragraphs), bool), 1)
    source = [ids[is_token > 0].tolist() for ids, is_token in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    prompts = generation.Prompts([[config.decoder_start_token_id]] * len(source), source)
    written = write(model, params, prompts, batch["labels"].shape[1], tokenizer)
    print("\nParagraphs that were held out, as it reads them, and what it writes:")
    for i, ids in enumerate(written):
        noisy = tokenizer.decode(batch["input_ids"][i][batch["attention_mask"][i] > 0])
        expected = tokenizer.decode(batch["labels"][i][batch["label_weights"][i] > 0])
        for title, text in (("reads", noisy), ("writes", tokenizer.decode(ids)), ("right", expected)):
            hidden = [t for t in (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) if t]
            for token in hidden:
                text = text.replace(token, " ")
            print(f"  {title + ':':8s}{' '.join(text.split())}")
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", type=Path, required=True, help="output_dir of the training script")
    parser.add_argument("--corpus_dir", type=Path, required=True, help="directory with train.txt and validation.txt")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
    results = json.loads((args.model_dir / "eval_results.json").read_text())
    accuracy, loss = unigram_baseline(*(count_tokens(args.corpus_dir / f"{s}.txt", tokenizer) for s in ("train", "validation")))
    print("\nOn paragraphs that were held out:        accuracy     loss")
    print(f"  unigram baseline (the commonest token)  {accuracy:8.1%} {loss:8.3f}")
    print(f"  the model                               {results['eval_accuracy']:8.1%} {results['eval_loss']:8.3f}")

    arguments = json.loads((args.model_dir / "run_info.json").read_text())["arguments"]
    script = importlib.import_module(SCRIPTS[json.loads((args.model_dir / "config.json").read_text())["model_type"]])
    model, params = weights.from_pretrained(str(args.model_dir), script.MODELS)
    paragraphs = (args.corpus_dir / "validation.txt").read_text("utf-8").splitlines()
    paragraphs = [p for p in paragraphs if 25 <= len(tokenizer(p, verbose=False)["input_ids"]) <= 50]
    paragraphs = paragraphs[:: max(1, len(paragraphs) // NUM_EXAMPLES)][:NUM_EXAMPLES]
    if models.has_decoder(model):
        restore_paragraphs(model, params, tokenizer, paragraphs, script, arguments["max_seq_length"])
    else:
        continue_paragraphs(model, params, tokenizer, paragraphs)

    print(f"\n{args.model_dir} holds flax_model.msgpack, model.safetensors (for PyTorch), config, tokenizer, *_results.json.")
    print(f"Curves: {Path(sys.executable).parent / 'tensorboard'} --logdir {args.model_dir}")
    if results["eval_accuracy"] < 1.5 * accuracy:
        sys.exit("error: the model is not clearly better than the baseline; something is wrong")


if __name__ == "__main__":
    main()
