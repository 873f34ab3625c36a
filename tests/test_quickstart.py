# SPDX-License-Identifier: Apache-2.0
"""What shows the results of the quick starts runs to its end; `make quickstart` itself takes minutes."""

import re

import pytest

import run_bart_dlm_flax
import run_clm_flax
import run_mlm_flax
import run_t5_mlm_flax
from quickstart import fill_mask
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("module", "model_dir", "row_length", "shown", "section"),
    [
        (run_mlm_flax, "roberta_dir", ["--max_seq_length", 32], "fill_mask.py", r"What it puts in place of <mask>"),
        (run_clm_flax, "gpt2_dir", ["--block_size", 32], "write_text.py", r"How it goes on .*\n  .* \| "),
        (
            run_t5_mlm_flax,
            "t5_dir",
            ["--max_seq_length", 32],
            "write_text.py",
            r"as it reads them, .*\n  reads: .*<extra_id_0>",
        ),
        (run_bart_dlm_flax, "bart_dir", ["--max_seq_length", 32], "write_text.py", r"as it reads them, .*\n  reads: .*<mask>"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_results_are_shown(module, model_dir, row_length, shown, section, texts, request, run_script, tmp_path):
    """Of a model that has learnt nothing: that is an error, said at the end."""
    directory = request.getfixturevalue(model_dir)
    for name, part in (("train.txt", texts[:-60]), ("validation.txt", texts[-60:])):
        (tmp_path / name).write_text("\n".join(part) + "\n", "utf-8")
    flags = ["--config_name", directory, "--tokenizer_name", directory, "--train_file", tmp_path / "train.txt", *row_length]
    flags += ["--validation_file", tmp_path / "validation.txt", "--max_steps", 1, "--output_dir", tmp_path / "model"]
    module.main([str(flag) for flag in flags])
    done = run_script(ROOT / "quickstart" / shown, "--model_dir", tmp_path / "model", "--corpus_dir", tmp_path)
    assert re.search(r"unigram baseline .* +\d+\.\d%", done.stdout), done.stderr
    assert re.search(section, done.stdout), done.stdout + done.stderr
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: the model is not clearly better")


def test_the_baseline_counts(tmp_path, byte_level_tokenizer):
    """Guessing the commonest of the training text."""
    (tmp_path / "text.txt").write_text("a a a b\n")
    counts = fill_mask.count_tokens(tmp_path / "text.txt", byte_level_tokenizer)
    accuracy, loss = fill_mask.unigram_baseline(counts, counts)
    assert accuracy == counts.max() / counts.sum()
    assert 0 < loss < 7
