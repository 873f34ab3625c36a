# SPDX-License-Identifier: Apache-2.0
"""Text to rows of tokens."""

import math

import datasets
import pytest

import run_mlm_flax as script
from flaxlm import files
from tests.conftest import rows_of, run


def test_line_by_line(texts, roberta_dir, byte_level_tokenizer, tmp_path):
    """One non-blank text, one row; padded to the longest, a multiple of 16, never beyond the limit (defects 66, 67)."""
    lines = ["short", "", "   ", "a little longer than that one is", texts[0]]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    raw = {"train": files.load(str(tmp_path / "lines.txt"), "--train_file", None)}

    def rows(max_seq_length, **kwargs):
        data_args = script.DataTrainingArguments(line_by_line=True, **kwargs)
        collator = script.Collator(byte_level_tokenizer, None, data_args, max_seq_length)
        return rows_of(script, byte_level_tokenizer, collator, data_args, raw["train"])["input_ids"]

    assert rows(20).shape == (3, 20)
    assert rows(64, pad_to_max_length=True).shape == (3, 64)
    del lines[-1]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    raw = {"train": files.load(str(tmp_path / "lines.txt"), "--train_file", None)}
    found = rows(64)
    assert found.shape[0] == 2
    assert found.shape[1] % 16 == 0
    assert found.shape[1] < 64
    decoded = [byte_level_tokenizer.decode(row, skip_special_tokens=True) for row in found]
    assert decoded == [lines[0], lines[3]]
    results = run(
        tmp_path / "out", roberta_dir, "--train_file", tmp_path / "lines.txt", "--line_by_line", "--max_steps", 2,
        "--validation_file", tmp_path / "lines.txt", "--per_device_train_batch_size", 2,
    )  # fmt: skip
    assert results["eval_loss"] > 0


@pytest.mark.parametrize("num_proc", [None, 2])
def test_grouping_loses_nothing(texts, byte_level_tokenizer, num_proc):
    """All tokens, in order, whatever the number of processes; only the last row is padded (defects 74, 75)."""
    raw = {"train": datasets.Dataset.from_dict({"text": texts * 3})}
    data_args = script.DataTrainingArguments(preprocessing_num_workers=num_proc)
    collator = script.Collator(byte_level_tokenizer, None, data_args, 48)
    rows = rows_of(script, byte_level_tokenizer, collator, data_args, raw["train"])["input_ids"]
    expected = [i for ids in byte_level_tokenizer(texts, verbose=False)["input_ids"] for i in ids] * 3
    assert rows.shape == (math.ceil(len(expected) / 48), 48)
    assert rows.reshape(-1)[: len(expected)].tolist() == expected
    assert (rows.reshape(-1)[len(expected) :] == byte_level_tokenizer.pad_token_id).all()
