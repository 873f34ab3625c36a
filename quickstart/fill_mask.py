#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Show what the quick start's masked model learnt: accuracy beside a baseline, and words for blanks in text it never saw.

    python quickstart/fill_mask.py --model_dir quickstart/build/mlm --corpus_dir quickstart/build/corpus

The blanks are chosen by the text alone: short sentences, and in each the word that is the commonest in the training text. A
model that was trained on pairs of sentences also says which belong together.
"""

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flaxlm import cli, models, tokenization  # noqa: I001 (first: it keeps transformers quiet)
from quickstart import measures
from transformers import PreTrainedTokenizerBase

NUM_BLANKS, NUM_GUESSES, NUM_PAIRS = 8, 4, 4
PLAIN_SENTENCE = re.compile(r"[A-Z][A-Za-z ,'-]{38,73}\.")
WORD = re.compile(r"\b[a-z]{4,}\b")
FEWEST = 10  # times that plain sentences of the training text have a word that is hidden


class Word(NamedTuple):
    """A word of a text that is one token: where it stands among the tokens and among the characters."""

    place: int
    start: int
    end: int


class Sentence(NamedTuple):
    """A plain sentence: its text, its tokens and those of them that are words."""

    text: str
    ids: list[int]
    words: list[Word]


def plain_sentences(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Sentence]:
    """The paragraphs of a text file that are one short sentence of words."""
    texts = list(filter(PLAIN_SENTENCE.fullmatch, path.read_text("utf-8").splitlines()))
    if not texts:
        return []
    with tokenization.tokenizer_as_loaded(tokenizer):
        encoding = tokenizer(texts, return_offsets_mapping=True, verbose=False)
    found = []
    for text, ids, offsets in zip(texts, encoding["input_ids"], encoding["offset_mapping"], strict=True):
        spans = {match.span() for match in WORD.finditer(text)}
        starts = [start + text[start:end].startswith(" ") for start, end in offsets]  # some pieces have the space too
        words = [Word(place, start, end) for place, (start, (_, end)) in enumerate(zip(starts, offsets, strict=True))]
        found.append(Sentence(text, ids, [word for word in words if word[1:] in spans]))
    return found


def choose_blanks(sentences: Sequence[Sentence], counts: Mapping[int, int]) -> list[tuple[Sentence, Word]]:
    """Of each sentence the word that is the commonest in the training text, if it has one that is common there."""
    chosen = []
    for sentence in filter(lambda sentence: sentence.words, sentences):
        count, word = max((counts.get(sentence.ids[word.place], 0), word) for word in sentence.words)
        if count >= FEWEST:
            chosen.append((sentence, word))
    return chosen


def fill_blanks(trained: measures.Trained, blanks: Sequence[tuple[Sentence, Word]], known_ids: Sequence[int]) -> None:
    """Print each sentence with the hidden word in brackets, and below the words that the model finds likeliest there."""
    tokenizer, model, variables = trained.tokenizer, trained.model, {"params": trained.params}
    rows = np.full((len(blanks), max(len(sentence.ids) for sentence, _ in blanks)), tokenizer.pad_token_id, np.int32)
    is_token = np.zeros_like(rows)
    for i, (sentence, word) in enumerate(blanks):
        rows[i, : len(sentence.ids)], is_token[i, : len(sentence.ids)] = sentence.ids, 1
        rows[i, word.place] = tokenizer.mask_token_id
    hidden = model.apply(variables, rows, is_token)[np.arange(len(blanks)), [word.place for _, word in blanks]]
    probabilities = jax.nn.softmax(model.apply(variables, hidden, method="scores")[:, : len(tokenizer)])
    print("\nA word is hidden in each of these sentences, the one in [brackets]. Words that the model finds likeliest there:")
    for (text, ids, _), word, shares in zip(*zip(*blanks, strict=True), np.asarray(probabilities), strict=True):
        best = sorted(known_ids, key=lambda i, shares=shares: -shares[i])[:NUM_GUESSES]
        verdict = "right" if best[0] == ids[word.place] else ""
        print(f"\n  {text[: word.start]}[{text[word.start : word.end]}]{text[word.end :]}")
        print(f"  {verdict:8s}{'   '.join(f'{tokenizer.decode([i]).strip()} {shares[i]:.0%}' for i in best)}")


def judge_pairs(trained: measures.Trained) -> None:
    """Print pairs of text, and what the model thinks of whether the second follows on the first."""
    rows, tokenizer = trained.data.validation, trained.tokenizer
    lengths = (rows["input_ids"] != tokenizer.pad_token_id).sum(axis=1)
    chosen = []
    is_short = lengths <= np.median(lengths)
    for label in (0, 1):
        of_kind = np.flatnonzero(is_short & (rows["next_sentence_label"][:, 0] == label))
        chosen += list(measures.evenly(of_kind, NUM_PAIRS // 2))
    ids, types = rows["input_ids"][chosen], rows["token_type_ids"][chosen]
    is_token = (ids != tokenizer.pad_token_id).astype(np.int32)
    variables = {"params": trained.params}
    hidden = trained.model.apply(variables, ids, is_token, types)
    scores = trained.model.apply(variables, hidden, method="next_sentence_scores")
    print("\nDoes the second line follow on the first, or is it from another text?")
    for row, kinds, used, label, share in zip(
        ids, types, is_token, rows["next_sentence_label"][chosen, 0], np.asarray(jax.nn.softmax(scores))[:, 0], strict=True
    ):
        first, second = (tokenizer.decode(row[(kinds == kind) & (used == 1)], skip_special_tokens=True) for kind in (0, 1))
        verdict = "right" if (share > 0.5) == (label == 0) else "wrong"
        said = f"it follows: {share:.0%}" if share > 0.5 else f"from another text: {1 - share:.0%}"
        print(f"\n  {first}\n  {second}\n  {verdict:8s}{said}")


def main() -> None:
    args = measures.begin(__doc__.splitlines()[0])
    trained = measures.load(args.model_dir, args.corpus_dir)
    found = measures.find(trained)
    measures.show(found)
    if trained.script.MODELS is models.SENTENCE_PAIRS:
        judge_pairs(trained)
    train, validation = (plain_sentences(args.corpus_dir / f"{s}.txt", trained.tokenizer) for s in ("train", "validation"))
    counts = Counter(sentence.ids[word.place] for sentence in train for word in sentence.words)
    blanks = measures.evenly(choose_blanks(validation, counts), NUM_BLANKS)
    if blanks:
        fill_blanks(trained, blanks, list(counts))
    measures.conclude(args, found)


if __name__ == "__main__":
    sys.exit(cli.run(main, __file__))
