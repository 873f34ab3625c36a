#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Show what the quick start's model learnt: its evaluation beside the unigram baseline, and words for some masked sentences.

    python quickstart/fill_mask.py --model_dir quickstart/build/mlm --corpus_dir quickstart/build/corpus

The baseline knows how often each token occurs in the training text and nothing else: it always guesses the commonest one.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flaxlm import models, weights  # noqa: I001 (first: it keeps transformers quiet)
from transformers import AutoTokenizer, PreTrainedTokenizerBase

SENTENCES = (
    "Return the <mask> of the given object.",
    "This module provides a <mask> interface to the library.",
    "Raise a ValueError if the argument is <mask> a string.",
    "If the file does <mask> exist, an exception is raised.",
    "Create a new <mask> and return it.",
)


def count_tokens(path: Path, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """How often each id occurs in a text file, special tokens left out: int64 [vocabulary]."""
    lines = path.read_text("utf-8").splitlines()
    encoding = tokenizer(lines, add_special_tokens=False, verbose=False)
    return np.bincount(np.concatenate([np.asarray(ids, np.int64) for ids in encoding["input_ids"]]), minlength=len(tokenizer))


def unigram_baseline(train_counts: np.ndarray, validation_counts: np.ndarray) -> tuple[float, float]:
    """Accuracy and loss (nats per token) of frequencies counted, plus one, on the training text."""
    probabilities = (train_counts + 1) / (train_counts + 1).sum()
    shares = validation_counts / validation_counts.sum()
    return float(shares[train_counts.argmax()]), float(-(shares * np.log(probabilities)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", type=Path, required=True, help="output_dir of run_mlm_flax.py or another")
    parser.add_argument("--corpus_dir", type=Path, required=True, help="directory with train.txt and validation.txt")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
    results = json.loads((args.model_dir / "eval_results.json").read_text())
    accuracy, loss = unigram_baseline(*(count_tokens(args.corpus_dir / f"{s}.txt", tokenizer) for s in ("train", "validation")))
    print("\nOn paragraphs that were held out:        accuracy     loss")
    print(f"  unigram baseline (the commonest token)  {accuracy:8.1%} {loss:8.3f}")
    model_loss = results.get("eval_masked_lm_loss", results["eval_loss"])
    print(f"  the model                               {results['eval_accuracy']:8.1%} {model_loss:8.3f}")
    next_accuracy = results.get("eval_next_sentence_accuracy")
    if next_accuracy is not None:
        print("Does B follow A, or is it from another document?")
        print(f"  chance                                  {0.5:8.1%} {np.log(2):8.3f}")
        print(f"  the model                               {next_accuracy:8.1%} {results['eval_next_sentence_loss']:8.3f}")

    model, params = weights.from_pretrained(str(args.model_dir), models.MASKED)
    sentences = [sentence.replace("<mask>", tokenizer.mask_token) for sentence in SENTENCES]
    inputs = tokenizer(sentences, padding=True, return_tensors="np")
    rows, positions = np.nonzero(inputs["input_ids"] == tokenizer.mask_token_id)
    hidden = model.apply({"params": params}, inputs["input_ids"], inputs["attention_mask"])
    logits = np.asarray(model.apply({"params": params}, hidden[rows, positions], method="scores"))
    print("\nWhat it puts in place of <mask>, best first:")
    for sentence, scores in zip(SENTENCES, logits, strict=True):
        best = [repr(tokenizer.decode([i]).strip()) for i in np.argsort(-scores)[:5]]
        print(f"  {sentence:58s} {', '.join(best)}")

    print(f"\n{args.model_dir} holds flax_model.msgpack, model.safetensors (for PyTorch), config, tokenizer, *_results.json.")
    print(f"Curves: {Path(sys.executable).parent / 'tensorboard'} --logdir {args.model_dir}")
    if results["eval_accuracy"] < 1.5 * accuracy or (next_accuracy is not None and next_accuracy < 0.55):
        sys.exit("error: the model is not clearly better than the baseline; something is wrong")


if __name__ == "__main__":
    main()
