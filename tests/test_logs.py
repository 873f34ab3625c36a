# SPDX-License-Identifier: Apache-2.0
"""The clock of training, and advice about the machine."""

import re
import time

import jax
import matplotlib.axes
import numpy as np
import pytest

import run_clm_flax
from flaxlm import arguments, batches, cards, cli, command_line, configurations, estimates, logs, machines, tokenization


def test_stopwatch_leaves_out_the_stops():
    watch = logs.Stopwatch()
    watch.start()
    time.sleep(0.05)
    watch.stop()
    time.sleep(0.2)
    watch.start()
    assert 0.05 <= watch.seconds() < 0.15


@pytest.mark.parametrize(("cpuinfo", "warned"), [("flags : avx2 avx512_bf16", False), ("Features : asimd", True)])
def test_bfloat16_without_instructions_for_it(cpuinfo, warned, monkeypatch, caplog):
    assert jax.default_backend() == "cpu"  # which reads files too, at first
    monkeypatch.setattr(logs.sys, "platform", "linux")
    monkeypatch.setattr(logs.Path, "exists", lambda path: False)
    monkeypatch.setattr(logs.Path, "read_text", lambda path: cpuinfo)
    monkeypatch.setattr(cli.logger, "propagate", True)
    logs.advise_on_cpu("bfloat16")
    assert ("saves memory but no time" in caplog.text) == warned
    caplog.clear()
    logs.advise_on_cpu("float32")
    assert not caplog.text


def plan_of(num_steps: int) -> batches.Plan:
    sizes = {"train_batch_size": 4, "eval_batch_size": 4, "num_micro_batches": 1, "steps_per_epoch": 0, "num_warmup_steps": 0}
    return batches.Plan(num_local_devices=1, num_processes=1, process_index=0, num_steps=num_steps, **sizes)


def lines_of(num_steps: int, messages_logged, **flags) -> list[int]:
    """The steps that are logged."""
    messages_logged.clear()
    training_args = arguments.TrainingArguments(output_dir="", **flags)
    if not flags:
        training_args.least_log_lines = 10  # as where --logging_steps is not given
    log = logs.TrainingLog(training_args, plan_of(num_steps), None)
    metrics = {"loss": 1.0, "weight": 1.0, "grad_norm": 1.0, "learning_rate": 1.0, "stop": 0.0}
    for step in range(1, num_steps + 1):
        log.add(step, metrics, 1)
    log.fetch()
    log.close()
    return [int(step) for step in re.findall(r"step (\d+) of", "\n".join(messages_logged))]


def test_a_short_run_is_not_silent(messages_logged):
    """Ten lines at least, unless asked otherwise."""
    assert lines_of(100, messages_logged) == list(range(10, 101, 10))
    assert lines_of(3, messages_logged) == [1, 2, 3]
    assert lines_of(100, messages_logged, logging_steps=500) == [100]


def test_utilisation():
    """4 devices of 100 TFLOP/s, 10 steps of 20 TFLOP in 2 seconds."""
    assert logs.mfu(logs.Speed(20e12, 4, 100e12), 10, 2.0) == pytest.approx(0.25)


@pytest.mark.parametrize("extra", [[], ["--gradient_checkpointing"]], ids=["plain", "checkpointing"])
def test_a_line_tells_how_much_of_the_devices_is_used(extra, gpt2_dir, corpus, messages_logged):
    """By the arithmetic of a script's step, as a formula has it; what is computed again to save memory does not count."""
    flags = ["--config_name", gpt2_dir, "--tokenizer_name", gpt2_dir, "--output_dir", "x", "--train_file", corpus]
    flags += [
        "--logging_steps",
        2,
        "--block_size",
        32,
        "--per_device_train_batch_size",
        4,
        "--gradient_accumulation_steps",
        2,
        *extra,
    ]
    args = command_line.parse([str(flag) for flag in flags], run_clm_flax.DataTrainingArguments, run_clm_flax.MODELS, None)
    config = configurations.load_config(args.model, run_clm_flax.MODELS)
    collator = run_clm_flax.Collator(tokenization.load_tokenizer(args.model), config, args.data, 32)
    parts = run_clm_flax.MODELS, run_clm_flax.loss_fn, run_clm_flax.make_steps
    found, _ = estimates.count_flops(args, estimates.Script(config, collator, *parts))
    num_weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    assert found == 2 * 4 * 32 * (6 * num_weights + 12 * config.n_layer * config.n_embd * 32)

    log = logs.TrainingLog(args.training, plan_of(2), None)
    log.speed = logs.Speed(found, 1, found)  # a device that takes a second for a step if it does nothing else
    log.window_started, log.stopwatch.total = 1.0, 5.0
    metrics = {"loss": 1.0, "weight": 1.0, "grad_norm": 1.0, "learning_rate": 1.0, "stop": 0.0}
    for step in (1, 2):
        log.add(step, metrics, 100)
    log.fetch()
    memory, limit = machines.memory_in_use()
    total = f"{limit / 2**30:.1f} GiB"
    line = messages_logged[-1]
    assert re.search(rf"gradient norm 1, 50 tokens/s, MFU 50.0%, memory \d\.\d of {total}$", line), line
    results = log.results(2, None)
    assert results["train_mfu"] == pytest.approx(2 / 5)
    assert 0.1 * memory < results["train_memory_gib"] * 2**30 <= 2 * memory


def test_a_device_that_does_not_tell_its_speed(messages_logged):
    lines_of(3, messages_logged)
    assert "MFU" not in "".join(messages_logged)
    assert machines.this().peak_flops == {}


def test_the_code_in_a_card_runs(trained, byte_level_tokenizer, monkeypatch):
    """In the directory of the card: the model, and the scores of a text."""
    card = (trained[0] / "README.md").read_text()
    with_pytorch, with_flax = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "model = RobertaForMaskedLM.from_pretrained" in with_pytorch
    monkeypatch.chdir(trained[0])
    ids = np.array([byte_level_tokenizer("one two three").input_ids])
    names = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    exec(with_flax, names)
    assert names["scores"].shape == (*ids.shape, 512)
    assert np.isfinite(names["scores"]).all()


def test_one_log_line_gives_a_point_in_the_picture(tmp_path, monkeypatch):
    """A line through one point cannot be seen."""
    drawn = []
    plot = matplotlib.axes.Axes.plot

    def noted(axes, *args, **kwargs):
        drawn.append(args)
        return plot(axes, *args, **kwargs)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", noted)
    cards.draw_curves(str(tmp_path / "one.png"), [(3, 1.0)], {})
    cards.draw_curves(str(tmp_path / "two.png"), [(3, 1.0), (6, 0.5)], {})
    assert [args[-1] for args in drawn] == ["o", "-"]
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
