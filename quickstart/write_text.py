#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Show what the quick start's GPT-2, T5 or BART learnt: accuracy beside a baseline, and text that it writes.

    python quickstart/write_text.py --model_dir quickstart/build/clm --corpus_dir quickstart/build/corpus

GPT-2 goes on from the beginnings of paragraphs that it has never seen; T5 and BART get such paragraphs with the noise they
were trained on and put back what is missing.
"""

import difflib
import itertools
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flaxlm import cli, generation, models, randomness, sharding  # noqa: I001 (first: it keeps transformers quiet)
from quickstart import measures
from transformers import PreTrainedTokenizerBase

NUM_EXAMPLES = 4
PROMPT_WORDS, NEW_TOKENS = 6, 30
LENGTHS = range(25, 51)  # of paragraphs that are shown, in tokens
PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,.;:'()-]+\.")

# A text in parts: their tokens, and whether they are something that was missing.
Parts = list[tuple[Sequence[int], bool]]


def write(trained: measures.Trained, prompts: generation.Prompts, num_tokens: int, **how: Any) -> list[list[int]]:
    """What the model writes after each prompt, up to the end of the text."""
    tokenizer = trained.tokenizer
    sampling = generation.Sampling(num_tokens=len(tokenizer), eos_token_id=generation.end_of_text(tokenizer), **how)
    row_length = max(map(len, prompts.begun)) + num_tokens
    generate = generation.Generator(trained.model, prompts, num_tokens, row_length, sampling, sharding.one_device())
    return generate(trained.params)


def continue_paragraphs(trained: measures.Trained, paragraphs: Sequence[str]) -> None:
    """Print beginnings of paragraphs and what the model makes of them, drawn at random with low temperature."""
    tokenizer = trained.tokenizer
    begun = [" ".join(paragraph.split()[:PROMPT_WORDS]) for paragraph in paragraphs]
    prompts = tokenizer(begun, verbose=False)["input_ids"]
    end = generation.end_of_text(tokenizer)
    prompts = [ids[:-1] if ids[-1] == end else ids for ids in prompts]
    written = write(trained, generation.Prompts(prompts), NEW_TOKENS, temperature=0.6)
    print("\nHow it goes on, behind the bar, from the beginnings of paragraphs that were held out:")
    for beginning, prompt, ids in zip(begun, prompts, written, strict=True):
        text = generation.decode_behind(tokenizer, prompt, ids)
        print(f"\n  {beginning} |{' ' * text.startswith(' ')}{' '.join(text.split())}")


def restore_paragraphs(trained: measures.Trained, paragraphs: Sequence[str]) -> None:
    """Print paragraphs as the model reads them, as it restores them, the likeliest token each time, and as they were."""
    tokenizer, collator = trained.tokenizer, trained.collator
    is_spans = trained.script.MODELS is models.SPANS
    columns = trained.script.tokenize_texts({"text": paragraphs}, tokenizer, "text", **collator.tokenize_options)
    rows = {name: np.full((len(paragraphs), collator.row_length), fill) for name, fill in collator.columns.items()}
    for name, texts in columns.items():
        for row, values in zip(rows[name], texts, strict=True):
            values = values[: len(values) - is_spans][: len(row)]  # T5's last token, the end, would be all of its last span
            row[: len(values)] = values
    uniforms = randomness.row_uniforms(0, ("demonstration",), 0, len(paragraphs), collator.draws_per_row)
    batch = collator(rows, uniforms, np.ones(len(paragraphs), bool), 1)
    sources, targets = (
        [ids[is_token > 0].tolist() for ids, is_token in zip(batch[name], batch[mask], strict=True)]
        for name, mask in (("input_ids", "attention_mask"), ("labels", "label_weights"))
    )
    prompts = generation.Prompts([[trained.model.config.decoder_start_token_id]] * len(sources), sources)
    written = write(trained, prompts, batch["labels"].shape[1])
    print("\nParagraphs that were held out, as it reads them and as it writes them, with what it put in in [brackets]:")
    marks = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    for source, ids, target in zip(sources, written, targets, strict=True):
        source, ids, target = ([token for token in tokens if token not in marks] for tokens in (source, ids, target))
        if is_spans:
            gaps = set(collator.sentinel_ids_S.tolist())
            restored, right = (fill_gaps(source, spans, gaps) for spans in (ids, target))
        else:
            gaps = {tokenizer.mask_token_id}
            restored, right = (compare(source, text) for text in (ids, target))
        print(f"\n  reads:  {show_parts(tokenizer, fill_gaps(source, [], gaps), gap='___')}")
        print(f"  writes: {show_parts(tokenizer, restored)}")
        print(f"  right:  {show_parts(tokenizer, right)}")


def fill_gaps(source: Sequence[int], spans: Sequence[int], gaps: Collection[int]) -> Parts:
    """A text with sentinels, in place of each the tokens that follow it in `spans`."""
    ids_of: dict[int, list[int]] = {}
    current = None
    for token in spans:
        if token in gaps:
            current = ids_of.setdefault(token, [])
        elif current is not None:
            current.append(token)
    parts = itertools.groupby(source, key=lambda token: token if token in gaps else None)
    return [(list(ids), False) if gap is None else (ids_of.get(gap, []), True) for gap, ids in parts]


def compare(source: Sequence[int], text: Sequence[int]) -> Parts:
    """A text, and what of it does not stand there, or in that order, in what was read."""
    matcher = difflib.SequenceMatcher(None, source, text, autojunk=False)
    return [(text[start:end], kind != "equal") for kind, _, _, start, end in matcher.get_opcodes() if start < end]


def show_parts(tokenizer: PreTrainedTokenizerBase, parts: Parts, gap: str | None = None) -> str:
    """A text in one line with what was missing in brackets, or `gap` in its place."""
    shown, before = "", []
    for ids, was_missing in parts:
        text = generation.decode_behind(tokenizer, before, ids)
        before = [*before, *ids]
        if was_missing:
            text = gap or f"{' ' * text.startswith(' ')}[{text.strip()}]"
        shown += text
    return " ".join(shown.split())


def main() -> None:
    args = measures.begin(__doc__.splitlines()[0])
    trained = measures.load(args.model_dir, args.corpus_dir)
    found = measures.find(trained)
    measures.show(found)
    paragraphs = (args.corpus_dir / "validation.txt").read_text("utf-8").splitlines()
    paragraphs = [
        p for p in filter(PROSE.fullmatch, paragraphs) if len(trained.tokenizer(p, verbose=False)["input_ids"]) in LENGTHS
    ]
    paragraphs = measures.evenly(paragraphs, NUM_EXAMPLES)
    if paragraphs and models.has_decoder(trained.model):
        restore_paragraphs(trained, paragraphs)
    elif paragraphs:
        continue_paragraphs(trained, paragraphs)
    measures.conclude(args, found)


if __name__ == "__main__":
    sys.exit(cli.run(main, __file__))
