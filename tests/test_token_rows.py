# SPDX-License-Identifier: Apache-2.0
"""Text to rows of tokens."""

import errno
import functools
import importlib
import math
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

import run_mlm_flax as script
from flaxlm import files, token_rows
from tests.conftest import ROOT, rows_of, run


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


# ---- Room on the disk ----------------------------------------------------------------------------------------------------


def test_room_is_reserved(monkeypatch, tmp_path):
    """Not a file with holes, of which a full disk makes a signal that kills; also where the file system cannot reserve."""
    for error in (None, errno.EOPNOTSUPP, errno.EINVAL):
        if error:
            refusal = OSError(error, os.strerror(error))
            monkeypatch.setattr(os, "posix_fallocate", lambda *_, refusal=refusal: (_ for _ in ()).throw(refusal))
        with open(tmp_path / str(error), "w+b") as file:
            token_rows.reserve(file, 3 * 2**20 + 5)
            assert os.fstat(file.fileno()).st_blocks * 512 >= os.fstat(file.fileno()).st_size == 3 * 2**20 + 5
    reserved = []
    monkeypatch.setattr(token_rows, "reserve", lambda file, num_bytes: (reserved.append(num_bytes), file.truncate(num_bytes)))
    rows = token_rows.disk_array((1000, 7), str(tmp_path))
    assert reserved == [4 * 1000 * 7]
    assert rows.shape == (1000, 7)
    assert not rows.any()
    assert rows.flags.writeable


# A program for a process of its own, in which files cannot grow beyond a size, as on a full disk.
LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
from flaxlm import cli, files, token_rows
import run_mlm_flax
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(cli.run(lambda: {call}, "run_mlm_flax.py"))
"""


@pytest.mark.parametrize("stage", ["reading", "tokenising", "cutting", "streaming"])
def test_a_full_cache_is_told_in_one_line(stage, texts, roberta_dir, tmp_path):
    """Whatever is being written: a line with the directory and --cache_dir, exit status 1, nothing half written left."""
    (tmp_path / "text.txt").write_text("\n".join(texts * 4))
    size = (tmp_path / "text.txt").stat().st_size
    limit = {"reading": size // 2, "tokenising": int(1.3 * size), "cutting": 2**20, "streaming": 2**20}[stage]
    argv = ["--config_name", roberta_dir, "--tokenizer_name", roberta_dir, "--train_file", tmp_path / "text.txt"]
    argv += ["--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache", "--max_steps", 1]
    call = f"run_mlm_flax.main({[str(flag) for flag in argv]!r})"
    if stage == "cutting":
        call = f"token_rows.disk_array((1000, 1000), {str(tmp_path / 'cache')!r})"
    if stage == "streaming":  # needs no cache
        call = f"next(iter(files.load({str(tmp_path / 'text.txt')!r}, '--train_file', '/dev/null/x', streaming=True)))"
    program = LIMITED.format(root=str(ROOT), limit=limit, call=call)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    if stage == "streaming":
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1, done.stderr
    expected = f"{tmp_path / 'cache'}, where prepared text is kept, cannot be written to: File too large; make room, or name"
    assert expected in done.stderr.splitlines()[-1]
    assert "--cache_dir" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    left = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert all(name.startswith("text-") for name in left), left
    assert len(left) == (stage == "tokenising")


def test_a_cache_that_may_not_be_written(error_of, corpus, roberta_dir, tmp_path):
    (tmp_path / "file").touch()
    for place, reason in ((tmp_path / "file", "Not a directory"), (tmp_path / "file" / "cache", "Not a directory")):
        line = error_of(run, tmp_path / "out", roberta_dir, "--train_file", corpus, "--max_steps", 1, "--cache_dir", place)
        assert f"{place}, where prepared text is kept, cannot be written to: {reason}; name another directory" in line


@pytest.mark.parametrize(
    "flags", [[], ["--cache_dir"], ["--streaming", "--num_eval_samples", 4]], ids=["", "cache", "streaming"]
)
def test_a_home_that_may_not_be_written(flags, run_script, corpus, roberta_dir, tmp_path):
    """The default cache is below it; --cache_dir is enough to go on, and a stream needs none."""
    flags = [*flags, tmp_path / "cache"] if flags == ["--cache_dir"] else flags
    env = {"HOME": "/dev/null", "HF_DATASETS_CACHE": "/dev/null/.cache/huggingface/datasets", "MPLCONFIGDIR": str(tmp_path)}
    data = ["--config_name", roberta_dir, "--tokenizer_name", roberta_dir, "--train_file", corpus, "--max_seq_length", 16]
    done = run_script(script.__file__, *data, "--max_steps", 1, "--output_dir", tmp_path / "out", *flags, env=env)
    if flags:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2
        assert "/dev/null/.cache/huggingface/datasets, where prepared text is kept, cannot be written to" in done.stderr
        assert "Traceback" not in done.stderr


# ---- Labels --------------------------------------------------------------------------------------------------------------

SPECIAL_ONLY = {
    "run_mlm_flax": ("roberta", ["</s>", "<pad><pad>", "<s>"]),
    "run_clm_flax": ("gpt2", ["a"]),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streaming"])
@pytest.mark.parametrize("name", SPECIAL_ONLY)
def test_rows_without_a_label_are_refused(name, streaming, request, error_of, texts, tmp_path):
    """Training and evaluation on them would give a loss of 0, whatever the model does."""
    model, lines = SPECIAL_ONLY[name]
    model_dir, main = request.getfixturevalue(f"{model}_dir"), importlib.import_module(name).main
    bad, good = tmp_path / "bad.txt", tmp_path / "good.txt"
    bad.write_text("\n".join(lines * (20 if model == "roberta" else 1)))
    good.write_text("\n".join(texts[:200]))
    length = ["--block_size" if model == "gpt2" else "--max_seq_length", 16, "--per_device_train_batch_size", 1]
    more = [*length, "--max_steps", 2, *["--streaming"] * streaming, "--output_dir", tmp_path / "out", "--no_keep_linebreaks"]
    more = [str(flag) for flag in (more if model == "gpt2" else more[:-1])]
    given = ["--config_name", str(model_dir), "--tokenizer_name", str(model_dir), *more]
    for train, validation, expected in ((bad, good, "train"), (good, bad, "validation")):
        if streaming and train == bad and model != "roberta":
            continue  # what does not fill a row is joined to what comes next
        line = error_of(main, [*given, "--train_file", str(train), "--validation_file", str(validation)])
        assert f"the {expected} data gives not one label" in line
    assert not (tmp_path / "out" / "checkpoint-2").exists()


def test_one_row_with_a_label_is_enough(byte_level_tokenizer):
    """Wherever it is; and no row need have one by chance."""
    collator = script.Collator(byte_level_tokenizer, None, script.DataTrainingArguments(mlm_probability=0.01), 8)
    rows = {"input_ids": np.full((1000, 8), byte_level_tokenizer.pad_token_id, np.int32)}
    assert not token_rows.gives_labels(rows, collator)
    rows["input_ids"][999, 3] = 100
    assert token_rows.gives_labels(rows, collator)


# ---- What is kept --------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_told_from_what_would_be_other(roberta_dir, byte_level_tokenizer):
    """Tokeniser, options, and all code that the function uses in its file, but nothing else in it."""
    options = {"tokenizer": byte_level_tokenizer, "max_length": None, "with_word_starts": False}
    given = functools.partial(script.tokenize_texts, **options)
    again = functools.partial(script.tokenize_texts, **options | {"tokenizer": AutoTokenizer.from_pretrained(roberta_dir)})
    assert token_rows.fingerprint(given) == token_rows.fingerprint(functools.partial(script.tokenize_texts, **options))
    assert token_rows.fingerprint(again) == token_rows.fingerprint(again)
    assert token_rows.fingerprint(functools.partial(given, max_length=7)) != token_rows.fingerprint(given)
    code = token_rows.code_of(script.tokenize_texts)
    assert {"tokenize_texts", "find_word_starts", "is_word_character", "REFERENCE_COLUMN"} <= code.keys()
    assert not {"main", "Collator", "np", "loss_fn"} & code.keys()
