# SPDX-License-Identifier: Apache-2.0
"""Texts rearranged so that a model that reads from left to right learns to fill in their middle.

Bavarian et al. 2022, arXiv:2207.14255, in the forms of StarCoder (Li et al. 2023, arXiv:2305.06161).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from flaxlm import cli, token_rows, tokenization
from flaxlm.token_rows import TokenRows

DRAWS_PER_TOKEN = 4  # a row may hold as many texts as tokens; a text needs one for if, one for how, two for where

# What the tokens before prefix, middle and suffix are called: by StarCoder, Qwen2.5-Coder, SantaCoder and CodeLlama.
SPELLINGS = (
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
    ("▁<PRE>", "▁<MID>", "▁<SUF>"),
)

# The pieces of a text, by number: what stays before it, three sentinels, three parts, what stays behind it.
HEAD, PRE, MID, SUF, PREFIX, MIDDLE, SUFFIX, TAIL = range(8)
PSM = (HEAD, PRE, PREFIX, SUF, SUFFIX, MID, MIDDLE, TAIL)
SPM = (HEAD, PRE, SUF, SUFFIX, MID, PREFIX, MIDDLE, TAIL)  # StarCoder's: the prefix runs on into the middle


class Infilling(NamedTuple):
    """Which texts are rearranged, and how."""

    rate: float  # share of the texts that are
    spm_rate: float  # share of these in the order SPM
    sentinel_ids: tuple[int, int, int]  # before prefix, middle, suffix
    outer_ids: tuple[int, ...]  # special tokens that stay where they are at either end of a text
    rust: Tokenizer | None  # cuts between characters, with parts tokenised anew; None: between tokens
    tokenizer: PreTrainedTokenizerBase


def make(tokenizer: PreTrainedTokenizerBase, rate: float, spm_rate: float, level: str) -> Infilling:
    """Settings for that tokenizer; refuses one that lacks the sentinels or, for `level` character, alters parts of texts."""
    vocabulary = tokenizer.get_vocab()
    sentinels = next((names for names in SPELLINGS if vocabulary.keys() >= set(names)), None)
    if sentinels is None or any(len(encode(tokenizer, name)) != 1 for name in sentinels):
        names = ", ".join(SPELLINGS[0])
        cli.fail(
            f"--fim_rate {rate}: the tokenizer has no tokens {names}; make one with them: prepare_model_dir.py --fim_tokens"
        )
    if level == "character" and not gives_parts_back(tokenizer):
        cli.fail("--fim_level character: this tokenizer does not give back text that was cut anywhere; use --fim_level token")
    ends = (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id)
    return Infilling(
        rate,
        spm_rate,
        sentinel_ids=tuple(vocabulary[name] for name in sentinels),
        outer_ids=tuple({token for token in ends if token is not None}),
        rust=tokenizer.backend_tokenizer if level == "character" else None,
        tokenizer=tokenizer,
    )


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text, without special ones around it."""
    with tokenization.tokenizer_as_loaded(tokenizer):
        return tokenizer(text, add_special_tokens=False)["input_ids"]


PROBE = "def add(a, b):\n    return a  + b\n"


def gives_parts_back(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Are two parts of a text, each tokenised, together still that text? Not where words or texts get a space in front."""
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if rust is None:
        return False
    pairs = ((PROBE[:place], PROBE[place:]) for place in range(len(PROBE)))
    tokens = ([*encode(tokenizer, first), *encode(tokenizer, second)] for first, second in pairs)
    return all(rust.decode(ids, skip_special_tokens=False) == PROBE for ids in tokens)


def rearrange(rows: TokenRows, uniforms_NR: np.ndarray, infilling: Infilling) -> TokenRows:
    """Rearrange the texts of N rows, each by random numbers of its own.

    Args:
        rows: `input_ids` int [N, T], -1 where a row is padded on the right; `text_starts` [N, T]. What a row holds of a text
            counts as a whole one.
        uniforms_NR: float64 [N, R], R = T * DRAWS_PER_TOKEN.

    Returns:
        The same columns. A row that grows beyond T is cut there; one that becomes shorter is padded.
    """
    ids_NT, begins_NT = rows["input_ids"], rows[token_rows.TEXT_STARTS] == 1
    N, T = ids_NT.shape
    num_tokens_N = (ids_NT >= 0).sum(axis=1)
    begins_NT[:, 0] = num_tokens_N > 0
    # All texts X of all rows, by their places in the flat array.
    starts_X = np.flatnonzero(begins_NT)
    rows_X = starts_X // T
    ends_X = np.minimum(np.append(starts_X[1:], N * T), rows_X * T + num_tokens_N[rows_X])
    numbers_X = np.arange(len(rows_X)) - np.searchsorted(rows_X, rows_X)  # in their row, from 0
    draws_X4 = uniforms_NR.reshape(N, T, DRAWS_PER_TOKEN)[rows_X, numbers_X]

    pool, begins_X8, lengths_X8 = cut(ids_NT.reshape(-1), starts_X, ends_X, draws_X4, infilling)
    order_X8 = np.where(draws_X4[:, 1:2] < infilling.spm_rate, SPM, PSM)
    begins_X8, lengths_X8 = (np.take_along_axis(table, order_X8, axis=1) for table in (begins_X8, lengths_X8))
    tokens = gather(pool, begins_X8.reshape(-1), lengths_X8.reshape(-1))

    # Back to rows: what stands behind place T of its row is lost.
    lengths_X = lengths_X8.sum(axis=1)
    ends_N = np.cumsum(np.bincount(rows_X, lengths_X, minlength=N).astype(np.int64))
    row_starts_N = np.append(0, ends_N[:-1])
    places = np.arange(len(tokens)) - np.repeat(row_starts_N, ends_N - row_starts_N)
    new_ids_NT, new_starts_NT = np.full_like(ids_NT, -1), np.zeros_like(rows[token_rows.TEXT_STARTS])
    new_ids_NT[np.arange(T) < (ends_N - row_starts_N)[:, None]] = tokens[places < T]
    places_X = np.cumsum(lengths_X) - lengths_X - row_starts_N[rows_X]
    marks_X = rows[token_rows.TEXT_STARTS].reshape(-1)[starts_X]  # 0 where a row begins within a text
    is_left_X = places_X < T
    new_starts_NT[rows_X[is_left_X], places_X[is_left_X]] = marks_X[is_left_X]
    return rows | {"input_ids": new_ids_NT, token_rows.TEXT_STARTS: new_starts_NT}


def cut(
    ids: np.ndarray, starts_X: np.ndarray, ends_X: np.ndarray, draws_X4: np.ndarray, infilling: Infilling
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut texts into pieces: an array of tokens, and where in it the eight pieces of each text begin and how long they are.

    A text that stays as it is, by its first number or for want of other than special tokens, is all HEAD.
    """
    is_inner = (ids >= 0) & ~np.isin(ids, infilling.outer_ids)
    inner = np.flatnonzero(is_inner)
    first_X, last_X = np.searchsorted(inner, starts_X), np.searchsorted(inner, ends_X) - 1
    chosen_C = np.flatnonzero((draws_X4[:, 0] < infilling.rate) & (first_X <= last_X))
    starts_C, stops_C = inner[first_X[chosen_C]], inner[last_X[chosen_C]] + 1  # without special tokens at the ends
    cuts_C2 = np.sort(draws_X4[chosen_C, 2:], axis=1)
    cuts_at_C2 = starts_C[:, None] + places_of(cuts_C2, (stops_C - starts_C)[:, None])
    edges_C4 = np.column_stack([starts_C, cuts_at_C2, stops_C])
    begins_C3, lengths_C3 = edges_C4[:, :3], np.diff(edges_C4, axis=1)
    pool = np.concatenate([ids, np.array(infilling.sentinel_ids, ids.dtype)])
    if infilling.rust is not None and len(chosen_C):
        texts = [ids[start:stop].tolist() for start, stop in zip(starts_C, stops_C, strict=True)]
        tokens, new_lengths_C3, is_exact_C = cut_characters(texts, cuts_C2, infilling)
        new_begins_C3 = len(pool) + (np.cumsum(new_lengths_C3) - new_lengths_C3.reshape(-1)).reshape(-1, 3)
        begins_C3 = np.where(is_exact_C[:, None], new_begins_C3, begins_C3)
        lengths_C3 = np.where(is_exact_C[:, None], new_lengths_C3, lengths_C3)
        pool = np.concatenate([pool, tokens])

    begins_X8, lengths_X8 = np.zeros((2, len(starts_X), 8), np.int64)
    begins_X8[:, HEAD], lengths_X8[:, HEAD] = starts_X, ends_X - starts_X
    lengths_X8[chosen_C, HEAD] = starts_C - starts_X[chosen_C]
    begins_X8[:, [PRE, MID, SUF]] = len(ids) + np.arange(3)
    lengths_X8[chosen_C, PRE : SUF + 1] = 1
    begins_X8[chosen_C[:, None], [PREFIX, MIDDLE, SUFFIX]] = begins_C3
    lengths_X8[chosen_C[:, None], [PREFIX, MIDDLE, SUFFIX]] = lengths_C3
    begins_X8[chosen_C, TAIL], lengths_X8[chosen_C, TAIL] = stops_C, ends_X[chosen_C] - stops_C
    return pool, begins_X8, lengths_X8


def places_of(uniforms: np.ndarray, num_items: np.ndarray | int) -> np.ndarray:
    """Places to cut between items, and before the first and behind the last, all equally likely."""
    return (uniforms * (num_items + 1)).astype(np.int64)


def cut_characters(
    texts: Sequence[list[int]], cuts_C2: np.ndarray, infilling: Infilling
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut C texts, given as tokens, between characters: the tokens of all parts, their number [C, 3], and what is exact [C].

    Not exact is a text of which the parts would not be the same characters: where a row begins or ends within a character,
    of which the row has some bytes only, or where the tokenizer's normal form depends on what stands beside a character.
    """
    rust = infilling.rust
    with tokenization.tokenizer_as_loaded(infilling.tokenizer):
        rust.no_truncation()
        rust.no_padding()
        strings = rust.decode_batch(texts, skip_special_tokens=False)
        places_C2 = places_of(cuts_C2, np.array([len(string) for string in strings])[:, None]).tolist()
        parts = []
        for string, (first, second) in zip(strings, places_C2, strict=True):
            parts += [string[:first], string[first:second], string[second:]]
        tokens = [encoding.ids for encoding in rust.encode_batch_fast(parts, add_special_tokens=False)]
        joined = [[*prefix, *middle, *suffix] for prefix, middle, suffix in zip(*[iter(tokens)] * 3, strict=True)]
        decoded = rust.decode_batch(joined, skip_special_tokens=False)
    is_exact_C = [new == old and "\ufffd" not in old for new, old in zip(decoded, strings, strict=True)]
    lengths_C3 = np.array([len(ids) for ids in tokens]).reshape(-1, 3)
    return np.concatenate([np.array(ids, np.int32) for ids in joined]), lengths_C3, np.array(is_exact_C)


def gather(pool: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Stretches of an array end to end."""
    shifts = begins - (np.cumsum(lengths) - lengths)
    return pool[np.repeat(shifts, lengths) + np.arange(lengths.sum())]
