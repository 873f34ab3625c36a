# SPDX-License-Identifier: Apache-2.0
"""run_mlm_flax.py from the command line to the files it leaves, on tiny models and real text."""

import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

import run_mlm_flax as script
from tests.conftest import ROOT, read_events, run


def test_training_learns(trained):
    _, results = trained
    assert results["eval_loss"] < 0.9 * math.log(512)
    assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    assert 0.015 < results["eval_accuracy"] < 1  # 1 / 512 by chance
    assert results["train_steps"] == 120


def test_files_left_behind(trained):
    """Always at the end, in both formats (defects 1, 5, 8); nothing else, and no temporary files."""
    output_dir, results = trained
    names = {path.name for path in output_dir.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert len(events) == 2
    assert names - events - {"checkpoint-120"} == {
        "config.json", "flax_model.msgpack", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "train_results.json", "eval_results.json", "run_info.json", "README.md", "training_curves.png",
    }  # fmt: skip
    saved = json.loads((output_dir / "eval_results.json").read_text())
    assert set(saved) == {"eval_accuracy", "eval_loss", "eval_perplexity"}
    assert saved["eval_loss"] == results["eval_loss"]
    info = json.loads((output_dir / "run_info.json").read_text())
    assert info["arguments"]["learning_rate"] == 0.01
    assert info["versions"]["jax"] == jax.__version__
    assert oct((output_dir / "model.safetensors").stat().st_mode) == oct((output_dir / "config.json").stat().st_mode)


def test_tensorboard_tags(trained):
    """The original tags, one point per update, x = completed updates; the last window and the last evaluation too
    (defects 2, 36); train_time never falls and counts training only (defect 37)."""
    output_dir, results = trained
    points = read_events(output_dir)
    assert set(points) == {
        "train_loss", "train_learning_rate", "train_grad_norm", "train_time", "train_tokens_per_second",
        "train_memory_gib", "eval_loss", "eval_accuracy", "eval_perplexity",
    }  # fmt: skip
    for tag in ("train_loss", "train_learning_rate", "train_grad_norm"):
        assert [step for step, _ in points[tag]] == list(range(1, 121))
    assert [step for step, _ in points["train_time"]] == [1, 50, 100, 120]
    times = [value for _, value in points["train_time"]]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(results["train_runtime"], abs=0.5)
    assert [step for step, _ in points["eval_loss"]] == [60, 120]
    assert points["eval_loss"][-1][1] == pytest.approx(results["eval_loss"], rel=1e-5)


def test_learning_rate_curve(trained):
    """lr * s / w, then a line to zero: last update lr / (T - w)."""
    points = dict(read_events(trained[0])["train_learning_rate"])
    assert points[1] == 0
    assert points[6] == pytest.approx(1e-2 * 5 / 10)
    assert points[11] == pytest.approx(1e-2, rel=1e-4)
    assert points[120] == pytest.approx(1e-2 / 110, rel=1e-4)


def test_saved_weights_are_the_evaluated_ones(trained, roberta_dir, corpus, tmp_path):
    """--do_eval alone evaluates, and finds what the training run reported (defects 5, 11, 12): from Flax weights, and
    from the PyTorch layout alone, without torch."""
    output_dir, results = trained
    for weights in ("flax_model.msgpack", "model.safetensors"):
        source = tmp_path / weights.split(".")[0]
        shutil.copytree(output_dir, source, ignore=shutil.ignore_patterns("*.msgpack", "model.safetensors", "events*"))
        shutil.copy(output_dir / weights, source)
        target = tmp_path / f"evaluation-{source.name}"
        evaluated = script.main(
            ["--do_eval", "--model_name_or_path", str(source), "--train_file", str(corpus), "--max_seq_length", "32",
             "--output_dir", str(target)]
        )  # fmt: skip
        assert evaluated["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-6)
        assert "train_loss" not in evaluated
        assert not list(target.glob("*.msgpack"))
        assert json.loads((target / "eval_results.json").read_text()) == evaluated


def test_same_seed_same_run_and_evaluation_changes_nothing(roberta_dir, corpus, tmp_path):
    """Bit for bit, however often it is evaluated (defects 33, 91); another seed differs."""
    flags = ["--train_file", corpus, "--max_steps", 6, "--logging_steps", 2]
    losses = {}
    for name, more in {"a": ["--eval_steps", 2], "b": ["--do_train"], "c": ["--seed", 7]}.items():
        run(tmp_path / name, roberta_dir, *flags, *more)
        losses[name] = read_events(tmp_path / name)["train_loss"]
    assert losses["a"] == losses["b"] != losses["c"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all((first[key] == second[key]).all() for key in first)


def test_evaluation_does_not_depend_on_the_batch_size(roberta_dir, corpus, tmp_path):
    """9 rows in batches of 8 and of 9: the same result, no padding row counted (defects 22, 23, 26, 27)."""
    results = []
    for batch_size in (8, 9, 64):
        flags = ["--train_file", corpus, "--do_eval", "--max_eval_samples", 9, "--per_device_eval_batch_size", batch_size]
        results.append(run(tmp_path / str(batch_size), roberta_dir, *flags))
    for other in results[1:]:  # a perplexity of 600 is rounded six times as coarsely as its loss
        assert results[0] == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        ["--adafactor", "--weight_decay", "0.01"],
        ["--dtype", "bfloat16", "--max_grad_norm", "1", "--lr_scheduler_type", "cosine"],
        ["--gradient_checkpointing", "--no_save_safetensors", "--warmup_ratio", "0.3", "--lr_scheduler_type", "constant"],
        ["--line_by_line", "--pad_to_max_length", "--mlm_probability", "0.4", "--whole_word_mask"],
    ],
)
def test_other_flags_train(flags, roberta_dir, corpus, tmp_path):
    results = run(
        tmp_path, roberta_dir, "--train_file", corpus, "--max_steps", 40, "--learning_rate", 1e-2, "--max_train_samples",
        64, "--max_eval_samples", 16, "--overwrite_cache", *flags,
    )  # fmt: skip
    assert results["eval_loss"] < 6.1  # at first: 6.5
    assert results["train_samples"] == 64
    assert (tmp_path / "model.safetensors").exists() == ("--no_save_safetensors" not in flags)


def test_bfloat16_computes_in_bfloat16_and_saves_float32(roberta_dir, corpus, tmp_path):
    run(tmp_path / "low", roberta_dir, "--train_file", corpus, "--max_steps", 2, "--dtype", "bfloat16", "--do_train")
    run(tmp_path / "full", roberta_dir, "--train_file", corpus, "--max_steps", 2, "--do_train")
    low, full = (read_events(tmp_path / name)["train_loss"][0][1] for name in ("low", "full"))
    assert low != full
    assert low == pytest.approx(full, rel=1e-2)
    assert {a.dtype for a in load_file(tmp_path / "low" / "model.safetensors").values()} == {np.dtype("float32")}


def test_fractional_epochs_and_save_steps(roberta_dir, corpus, tmp_path):
    """T = ceil(epochs * steps per epoch) (defect 17); weights are there at save_steps already (defect 1)."""
    flags = ["--train_file", corpus, "--max_train_samples", 50, "--save_steps", 3, "--do_train"]
    results = run(tmp_path, roberta_dir, *flags, "--num_train_epochs", 1.3)
    assert results["train_steps"] == math.ceil(1.3 * (50 // 8))
    assert "eval_loss" not in results


def test_overwriting_clears_old_results(trained, roberta_dir, corpus, tmp_path):
    """What an earlier run left does not pass for this one's results (defects 6, 112)."""
    shutil.copytree(trained[0], tmp_path / "out")
    run(tmp_path / "out", roberta_dir, "--train_file", corpus, "--max_steps", 1, "--do_train", "--overwrite_output_dir")
    assert not (tmp_path / "out" / "eval_results.json").exists()
    assert [step for step, _ in read_events(tmp_path / "out")["train_loss"]] == [1]


def test_secrets_stay_out(run_script, roberta_dir, corpus, tmp_path):
    """Neither log nor file holds the token (defect 104)."""
    flags = ["--config_name", roberta_dir, "--tokenizer_name", roberta_dir, "--train_file", corpus, "--output_dir", tmp_path]
    done = run_script(script.__file__, *flags, "--max_seq_length", 32, "--max_steps", 1, "--token", "hf_verysecret")
    assert done.returncode == 0, done.stderr
    assert "hf_verysecret" not in done.stdout + done.stderr
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"hf_verysecret" not in path.read_bytes(), path


def test_json_arguments_and_overrides(roberta_dir, corpus, tmp_path):
    """The only argument may be a JSON file; flags after it win."""
    arguments = {
        "config_name": str(roberta_dir), "tokenizer_name": str(roberta_dir), "train_file": str(corpus), "max_steps": 9,
        "output_dir": str(tmp_path / "out"), "max_seq_length": 32, "do_train": True, "eval_steps": None,
    }  # fmt: skip
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    assert script.main([str(tmp_path / "arguments.json"), "--max_steps", "2"])["train_steps"] == 2


def test_saved_tokenizer_loads(trained, byte_level_tokenizer):
    text = "A tokenizer as it was."
    assert AutoTokenizer.from_pretrained(trained[0])(text)["input_ids"] == byte_level_tokenizer(text)["input_ids"]


def test_import_has_no_side_effects(run_script, tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import run_mlm_flax as m; assert not m.cli.logger.handlers"
    (tmp_path / "probe.py").write_text(code + "; import jax; assert not jax._src.xla_bridge._backends; print('clean')")
    done = run_script(tmp_path / "probe.py", ROOT, cwd=tmp_path)
    assert done.stdout.strip() == "clean", done.stderr
    assert {path.name for path in Path(tmp_path).iterdir()} == {"probe.py"}
