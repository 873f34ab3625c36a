# SPDX-License-Identifier: Apache-2.0
"""Token ids that the data has already: checked, cut as a tokenizer would cut them, and the text they stand for."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from flaxlm import cli, tokenization


def are_ids(values: Sequence[Any]) -> bool:
    """Does a column hold lists of token ids, not texts?"""
    return any(isinstance(value, list) for value in values)


def known_ids(lists: Sequence[list[int] | None], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The lists of token ids that are not empty. Those that are no ids of the tokenizer are a person's mistake."""
    lists = [ids for ids in lists if ids]
    flat = np.array(list(itertools.chain.from_iterable(lists)))
    if flat.size and flat.dtype.kind not in "iu":
        cli.fail("column input_ids: holds what is no whole number; give the ids of tokens alone")
    if flat.size and flat.min() < 0:
        cli.fail(f"column input_ids: holds {flat.min()}, which is no token; write the ids of each text alone, without padding")
    if flat.size and (flat.max() >= 2**31 or tokenizer.convert_ids_to_tokens(int(flat.max())) is None):
        cli.fail(f"column input_ids: holds {flat.max()}, unknown to the tokenizer; use the one that made the data")
    return lists


def truncated(ids: Sequence[int], length: int, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Which tokens of a text stay if it is cut to `length`, as the tokenizer cuts it: not those that it puts at the ends."""
    is_special = np.isin(ids, special_ids(tokenizer))
    most = tokenizer.num_special_tokens_to_add()
    head, tail = (int(np.argmin(np.append(side[:most], False))) for side in (is_special, is_special[::-1]))
    positions = np.arange(len(ids))
    if len(ids) <= length:
        return positions
    if tokenizer.truncation_side == "left":
        return np.delete(positions, np.s_[head : head + len(ids) - length])
    return np.delete(positions, np.s_[length - tail : len(ids) - tail])


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Of tokens that are no text; the unknown one is."""
    return [i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id]


class DecodedTexts(NamedTuple):
    """Texts, where in them each token stands (start, end), and which tokens are special: those stand at (0, 0)."""

    texts: list[str]
    offsets: list[list[tuple[int, int]]]
    special_tokens_masks: list[list[int]]


def decode_with_offsets(lists: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase) -> DecodedTexts:
    """The texts of tokens. Where tokenising a text gives its tokens again, all is as it was when they were made.

    Else (unknown tokens, tokenizers that lose spaces or case) the text is put together token by token: there are words and
    sentences in it too, but not always the same.
    """
    found: list[tuple[str, list[tuple[int, int]], list[int]] | None] = [None] * len(lists)
    with tokenization.tokenizer_as_loaded(tokenizer):
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        options |= {"return_offsets_mapping": True, "return_special_tokens_mask": True}
        texts = tokenizer.batch_decode(lists, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for add_special_tokens in (True, False):
            left = [i for i, row in enumerate(found) if row is None]
            if left:
                encoding = tokenizer([texts[i] for i in left], add_special_tokens=add_special_tokens, **options)
                columns = (encoding[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
                for i, ids, offsets, mask in zip(left, *columns, strict=True):
                    found[i] = (texts[i], offsets, mask) if ids == list(lists[i]) else None
        rows = [row or put_together(ids, tokenizer) for row, ids in zip(found, lists, strict=True)]
    return DecodedTexts(*map(list, zip(*rows, strict=True))) if rows else DecodedTexts([], [], [])


def put_together(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]], list[int]]:
    """A text token by token, each decoded with the few before it: some are half a character, some lose a space alone."""
    special, text, offsets, before = set(special_ids(tokenizer)), "", [], []
    for token in ids:
        if token in special:
            before = []
            offsets.append((0, 0))
            continue
        known = tokenizer.decode(before, clean_up_tokenization_spaces=False)
        both = tokenizer.decode([*before, token], clean_up_tokenization_spaces=False)
        common = next((i for i, pair in enumerate(zip(known, both, strict=False)) if pair[0] != pair[1]), len(known))
        start = len(text) - (len(known) - common)
        text = text[:start] + both[common:]
        offsets.append((start, len(text)))
        before = [*before, token][-4:]
    return text, offsets, [int(token in special) for token in ids]
