# SPDX-License-Identifier: Apache-2.0
"""Text in every format, from files and datasets; and what is held out."""

import gzip
import json
import shutil

import datasets
import pytest

import run_mlm_flax as script
from flaxlm import text
from tests.conftest import run


def test_validation_split_is_drawn_and_keeps_order():
    """Drawn with the seed, not taken from the top (defect 77); both parts in the order of the text."""
    dataset = script.datasets.Dataset.from_dict({"text": [str(i) for i in range(1000)]})
    splits = text.draw_validation_split(dataset, 5, seed=3)
    train, held_out = ([int(text) for text in splits[name]["text"]] for name in ("train", "validation"))
    assert len(held_out) == 50
    assert sorted(train + held_out) == list(range(1000))
    assert train == sorted(train)
    assert held_out == sorted(held_out)
    assert max(held_out) > 500
    assert held_out != [int(text) for text in text.draw_validation_split(dataset, 5, seed=4)["validation"]["text"]]


def test_data_formats(texts, roberta_dir, tmp_path):
    """txt, csv, json, jsonl, parquet, compressed, a directory, a saved dataset: the same text, the same loss."""
    texts = [text for text in texts if "\r" not in text][:150]
    dataset = datasets.Dataset.from_dict({"id": list(range(150)), "body": texts})
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n", "utf-8")
    with gzip.open(tmp_path / "a.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(texts) + "\n")
    dataset.to_csv(tmp_path / "a.csv", index=False)
    dataset.to_json(tmp_path / "a.jsonl")
    dataset.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps([{"id": i, "body": text} for i, text in enumerate(texts)]))
    (tmp_path / "directory").mkdir()
    shutil.copy(tmp_path / "a.parquet", tmp_path / "directory" / "train.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "saved_dict")

    def loss(flag, name):
        flags = [flag, tmp_path / name, "--do_eval", "--max_eval_samples", 8]
        return run(tmp_path / f"out-{name}", roberta_dir, *flags)["eval_loss"]

    names = ["a.txt", "a.txt.gz", "a.csv", "a.json", "a.jsonl", "a.parquet"]
    losses = {name: loss("--train_file", name) for name in names}
    losses |= {name: loss("--dataset_name", name) for name in ("directory", "saved", "saved_dict")}
    assert set(losses.values()) == {losses["a.txt"]}, losses


@pytest.mark.parametrize("more", [[], ["--streaming", "--num_eval_samples", 4]], ids=["", "streaming"])
def test_parts_of_a_dataset(more, texts, roberta_dir, error_of, tmp_path):
    """--data_dir takes one directory of a dataset, --dataset_config_name one of the configurations its card names."""
    parts = {"en": texts[:60], "no": texts[60:120]}
    for part, some_texts in parts.items():
        (tmp_path / "data" / part).mkdir(parents=True)
        (tmp_path / "data" / part / "train.txt").write_text("\n".join(some_texts))
        (tmp_path / f"{part}.txt").write_text("\n".join(some_texts))

    def loss(*flags) -> float:
        flags = [*flags, *more, "--do_eval", "--max_steps", 2, "--max_eval_samples", 4, "--overwrite_output_dir"]
        return run(tmp_path / "out", roberta_dir, *flags)["eval_loss"]

    losses = {part: loss("--train_file", tmp_path / f"{part}.txt") for part in parts}
    assert losses["en"] != losses["no"]
    dataset = ["--dataset_name", tmp_path / "data"]
    assert {part: loss(*dataset, "--data_dir", part) for part in parts} == losses
    entries = "\n".join(f"- config_name: '{part}'\n  data_files: {part}/train.txt" for part in parts)
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n{entries}\n---\n")
    assert {part: loss(*dataset, "--dataset_config_name", part) for part in parts} == losses
    assert f"--dataset_name {tmp_path / 'data'}" in error_of(loss, *dataset, "--dataset_config_name", "dk")


def test_mixed_suffixes(texts, roberta_dir, tmp_path):
    """Each file is read by its own suffix (defect 78)."""
    (tmp_path / "train.txt").write_text("\n".join(texts[:50]))
    (tmp_path / "validation.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts[50:80]))
    results = run(
        tmp_path / "out", roberta_dir, "--train_file", tmp_path / "train.txt", "--max_steps", 1,
        "--validation_file", tmp_path / "validation.jsonl",
    )  # fmt: skip
    assert results["eval_loss"] > 0
