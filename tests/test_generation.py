# SPDX-License-Identifier: Apache-2.0
"""Text that a model writes: the same tokens as a plain loop, and as PyTorch's generate; what a run does with it."""

import html
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from transformers import AutoTokenizer

import run_bart_dlm_flax
import run_clm_flax
import run_mlm_flax
import run_t5_mlm_flax
from flaxlm import cli, command_line, files, generation, models, sharding
from tests import oracle
from tests.test_checkpoints import MEASURED
from tests.test_sharding import run_lines
from tests.test_streams import assert_same_run, back_to
from tests.test_torch import small_config

CAUSAL = ["gpt2", "llama", "opt", "bloom", "gpt_neo", "mistral"]
SEQ2SEQ = ["t5", "umt5", "bart", "pegasus"]
TYPES = [*CAUSAL, *SEQ2SEQ]
LENGTHS = (6, 3, 1, 4)


def model_of(model_type: str, **more: Any) -> tuple[str, Any, Any]:
    """(kind, model, weights) of a small model whose parts all matter."""
    kind = "seq2seq" if model_type in SEQ2SEQ else "causal"
    classes = models.SPANS | models.DENOISING if kind == "seq2seq" else models.CAUSAL
    config = small_config(model_type, is_decoder=True, forced_eos_token_id=None, forced_bos_token_id=None, **more)
    config.forced_eos_token_id = None  # which generate() would put at the end
    if kind == "seq2seq":
        config.decoder_start_token_id = config.pad_token_id
    model = classes[model_type](config)
    params = oracle.random_weights(model, oracle.make_inputs(kind, config), 0.3)

    def changed(path: tuple, array: np.ndarray) -> np.ndarray:  # or some types write one token only
        name = jax.tree_util.keystr(path)
        return array * (4 if "position" in name else 0 if ("norm" in name and "bias" in name) or "logits_bias" in name else 1)

    return kind, model, jax.tree_util.tree_map_with_path(changed, params)


def prompts_of(kind: str, config: Any) -> generation.Prompts:
    rng = np.random.default_rng(3)
    rows = [rng.integers(5, config.vocab_size, length).tolist() for length in LENGTHS]
    return (
        generation.Prompts([[config.decoder_start_token_id]] * len(rows), rows)
        if kind == "seq2seq"
        else generation.Prompts(rows)
    )


def written(model, params, prompts, max_new_tokens=12, row_length=64, step=0, devices=None, **sampling) -> list[list[int]]:
    sampling = generation.Sampling(**sampling)
    devices = devices or sharding.one_device()
    return generation.Generator(model, prompts, max_new_tokens, row_length, sampling, devices)(params, step)


def loop(model: Any, params: Any, begun: list[int], source: list[int] | None, num_tokens: int, eos: int | None) -> list[int]:
    """The likeliest token of the growing row, one after the other."""
    ones = lambda row: np.ones((1, len(row)), np.int32)  # noqa: E731

    @jax.jit
    def scores_of_next(*inputs: np.ndarray) -> jax.Array:
        return model.apply({"params": params}, model.apply({"params": params}, *inputs)[0, -1], method="scores")

    ids, before = list(begun), () if source is None else (np.array([source]), ones(source))
    while len(ids) < len(begun) + num_tokens:
        scores = scores_of_next(*before, np.array([ids]), ones(ids))
        if int(scores.argmax()) == eos:
            break
        ids.append(int(scores.argmax()))
    return ids[len(begun) :]


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bart"])
def test_the_likeliest_tokens(model_type):
    """Prompts of different lengths in one batch: what a loop writes that takes them one by one; ends at the end of text."""
    kind, model, params = model_of(model_type)
    prompts = prompts_of(kind, model.config)
    sources = prompts.source or [None] * len(LENGTHS)
    expected = [loop(model, params, *row, 5, None) for row in zip(prompts.begun, sources, strict=True)]
    assert written(model, params, prompts, 5) == expected
    assert len({tuple(ids) for ids in expected}) > 1
    eos = expected[0][3]
    stopped = [loop(model, params, *row, 5, eos) for row in zip(prompts.begun, sources, strict=True)]
    assert written(model, params, prompts, 5, eos_token_id=eos) == stopped
    assert len(stopped[0]) <= 3


def test_the_end_of_a_row():
    """Where there is no more room, one row ends before another."""
    kind, model, params = model_of("gpt2")
    prompts = prompts_of(kind, model.config)
    assert list(map(len, written(model, params, prompts, 12, row_length=10))) == [4, 7, 9, 6]
    assert list(map(len, written(model, params, prompts, 2, row_length=7))) == [1, 2, 2, 2]


def test_tokens_that_the_tokenizer_has():
    """A model has rows for more tokens than a tokenizer, which could not decode them."""
    kind, model, params = model_of("gpt2")
    prompts = prompts_of(kind, model.config)
    assert (
        max(map(max, written(model, params, prompts, num_tokens=100))) < 100 <= max(map(max, written(model, params, prompts)))
    )


def test_what_is_drawn():
    """By (seed, step, row): the same again, other at another step or seed; near zero the likeliest, as with a low top_p."""
    kind, model, params = model_of("gpt2")
    prompts = prompts_of(kind, model.config)
    drawn = written(model, params, prompts, temperature=1.0, step=3)
    assert drawn == written(model, params, prompts, temperature=1.0, step=3)
    assert drawn != written(model, params, prompts, temperature=1.0, step=4)
    assert drawn != written(model, params, prompts, temperature=1.0, step=3, seed=1)
    likeliest = written(model, params, prompts)
    assert drawn != likeliest
    assert likeliest == written(model, params, prompts, temperature=1e-4)
    assert likeliest == written(model, params, prompts, temperature=1.0, top_p=1e-6)


@pytest.mark.parametrize(("top_p", "kept"), [(1.0, 4), (0.9, 3), (0.79, 2), (0.5, 1), (0.51, 2), (0.01, 1)])
def test_the_likeliest_that_have_a_probability_together(top_p, kept):
    """Drawn as often as their share of what is kept."""
    scores = jnp.log(jnp.array([0.3, 0.5, 0.15, 0.05]))
    num_draws = 4000
    sampling = generation.Sampling(1.0, top_p)
    rows = jnp.arange(num_draws)
    drawn = generation.choose(jnp.tile(scores, (num_draws, 1)), rows, jnp.zeros_like(rows), jax.random.key(0), sampling)
    shares = np.bincount(np.asarray(drawn), minlength=4) / num_draws
    expected = np.where(np.argsort([1, 0, 2, 3]) < kept, [0.3, 0.5, 0.15, 0.05], 0)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.03)
    assert (shares[expected == 0] == 0).all()


@pytest.mark.torch
@pytest.mark.parametrize("model_type", TYPES)
def test_the_tokens_of_pytorch(model_type):
    """generate(do_sample=False) writes the same on the same weights, its prompts filled up on the left."""
    import torch

    kind, model, params = model_of(model_type)
    config, prompts = model.config, prompts_of(kind, model.config)
    other = oracle.torch_model(kind, config, params)
    rows = prompts.source or prompts.begun
    width = max(map(len, rows))
    left = kind == "causal"
    ids = [[0] * (width - len(row)) * left + row + [0] * (width - len(row)) * (not left) for row in rows]
    mask = [[0] * (width - len(row)) * left + [1] * len(row) + [0] * (width - len(row)) * (not left) for row in rows]
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": 20, "use_cache": False}
    with torch.no_grad():
        found = other.generate(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **options).numpy()
    eos = config.eos_token_id
    expected = [[*row[: row.index(eos) if eos in row else None]] for row in found[:, width if left else 1 :].tolist()]
    assert written(model, params, prompts, 20, eos_token_id=eos) == expected
    assert sum(map(len, expected)) > 40


# ---- What a run does with it -----------------------------------------------------------------------------------------------


PROMPTS = "Return the *number* of\r\n\n  The <b>default</b> `value` ```is\nOne\n"
RUNS = {
    "clm": (run_clm_flax, "gpt2_dir", "--block_size"),
    "t5": (run_t5_mlm_flax, "t5_dir", "--max_seq_length"),
    "bart": (run_bart_dlm_flax, "bart_dir", "--max_seq_length"),
}


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(PROMPTS.encode())
    return tmp_path / "prompts.txt"


@pytest.fixture
def line(request, corpus, prompts):
    """line(objective, output_dir, *flags): the command line of a short run that writes samples."""

    def make(objective: str, output_dir: Path, *flags: Any) -> list[str]:
        _, directory, length = RUNS[objective]
        directory = request.getfixturevalue(directory)
        given = ["--config_name", directory, "--tokenizer_name", directory, "--train_file", corpus, length, 32]
        given += ["--max_steps", 8, "--eval_steps", 4, "--save_steps", 6, "--logging_steps", 7, "--max_eval_samples", 16]
        given += ["--learning_rate", 1e-2, "--generate_samples", prompts, "--max_new_tokens", 10, "--output_dir", output_dir]
        return [str(flag) for flag in [*given, *flags]]

    return make


def texts_in(output_dir: Path) -> dict[int, str]:
    """What TensorBoard's text tab has by step, as HTML."""
    events = EventAccumulator(str(output_dir))
    events.Reload()
    assert events.SummaryMetadata("samples").plugin_data.plugin_name == "text"
    return {event.step: markdown_to_safe_html(event.tensor_proto.string_val[0]) for event in events.Tensors("samples")}


def samples_of(output_dir: Path) -> list[dict[str, str]]:
    return json.loads((output_dir / "samples.json").read_text())["samples"]


@pytest.mark.parametrize("objective", RUNS)
def test_what_a_run_writes(objective, line, tmp_path, messages_logged, monkeypatch):
    """At each evaluation, in the log, samples.json, TensorBoard and the card; whether it does changes nothing else."""
    module = RUNS[objective][0]
    monkeypatch.setattr(cli, "set_up_logging", lambda: None)  # which would take the messages away
    results = module.main(line(objective, tmp_path / "one"))
    assert "Compiling the generation step ..." in messages_logged
    assert sum(message.startswith("Wrote 3 samples in ") for message in messages_logged) == 2
    samples = samples_of(tmp_path / "one")
    reads = [sample["reads"] for sample in samples]
    assert reads == ["Return the *number* of", "  The <b>default</b> `value` ```is", "One"]
    assert any(sample["writes"] for sample in samples)
    for sample in samples:
        assert f"  {' '.join(sample['reads'].split())} | {generation.in_a_line(sample['writes'])}" in messages_logged
    texts = texts_in(tmp_path / "one")
    assert list(texts) == [4, 8]
    assert html.escape(reads[1], quote=False) in texts[8]  # nothing of it is markup
    card = (tmp_path / "one" / "README.md").read_text()
    section = card.partition("## What it writes\n")[2].partition("## How to use it")[0]
    assert "````text\nreads:    The <b>default</b> `value` ```is\nwrites: " in section

    without = [flag for flag in line(objective, tmp_path / "two") if flag != "--generate_samples" and "prompts.txt" not in flag]
    i = without.index("--max_new_tokens")
    others = module.main([*without[:i], *without[i + 2 :]])
    assert {k: v for k, v in results.items() if k not in MEASURED} == {k: v for k, v in others.items() if k not in MEASURED}
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert "What it writes" not in (tmp_path / "two" / "README.md").read_text()


def test_a_resumed_run_writes_the_same(line, tmp_path):
    """From a checkpoint between two evaluations, the texts of both; and what was finished already is left as it is."""
    run_clm_flax.main(line("clm", tmp_path / "whole"))
    resumed = back_to(tmp_path / "whole", tmp_path / "resumed", 6)
    run_clm_flax.main(line("clm", resumed, "--resume_from_checkpoint"))
    assert_same_run(tmp_path / "whole", resumed)
    assert texts_in(tmp_path / "whole") == texts_in(resumed)
    assert samples_of(tmp_path / "whole") == samples_of(resumed)
    (resumed / "README.md").unlink()
    run_clm_flax.main(line("clm", resumed, "--resume_from_checkpoint"))  # evaluated at its last step already
    assert "## What it writes" in (resumed / "README.md").read_text()
    assert texts_in(tmp_path / "whole") == texts_in(resumed)


def test_of_the_best_model(line, tmp_path):
    """Where that is the model in the end, samples.json and the card have what it wrote, not the last one; resumed too."""
    flags = ["--lr_scheduler_type", "constant", "--eval_steps", 2, "--load_best_model_at_end", "--greater_is_better", "true"]
    run_clm_flax.main(line("clm", tmp_path / "whole", *flags))
    best = json.loads((tmp_path / "whole" / "train_results.json").read_text())["best_step"]
    found = json.loads((tmp_path / "whole" / "samples.json").read_text())
    assert found["step"] == best == 2  # where the loss is the highest
    assert generation.printable(found["samples"][0]["writes"].strip()) in (tmp_path / "whole" / "README.md").read_text()
    run_clm_flax.main(line("clm", tmp_path / "whole", *flags, "--resume_from_checkpoint"))
    assert json.loads((tmp_path / "whole" / "samples.json").read_text()) == found


@pytest.mark.parametrize("objective", RUNS)
def test_the_same_on_eight_devices(objective, line, tmp_path):
    """Weights on each of them or spread over them, and on one: the same weights write the same."""
    module = RUNS[objective][0]
    module.main(line(objective, tmp_path / "model", "--max_steps", 4))
    flags = ["--do_eval", "--model_name_or_path", tmp_path / "model", "--max_eval_samples", 8, "--temperature", 1.0]
    runs = [line(objective, tmp_path / name, *flags, *more) for name, more in (("eight", []), ("spread", ["--fsdp"]))]
    run_lines(module.__name__ + ".py", *map(" ".join, runs))
    module.main(line(objective, tmp_path / "one", *flags))
    samples = samples_of(tmp_path / "one")
    assert samples == samples_of(tmp_path / "eight") == samples_of(tmp_path / "spread")
    assert any(sample["writes"] for sample in samples)


def test_the_same_of_two_processes(line, tmp_path):
    """Each has a part of the prompts; the first writes the files."""
    run_clm_flax.main(line("clm", tmp_path / "model", "--max_steps", 4))
    flags = ["--do_eval", "--model_name_or_path", tmp_path / "model", "--max_eval_samples", 8]
    run_clm_flax.main(line("clm", tmp_path / "one", *flags))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, run_clm_flax.__file__, *line("clm", tmp_path / "two", *flags)]
    command += ["--coordinator_address", address, "--num_processes", "2", "--process_id"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    started = [subprocess.Popen([*command, str(i)], env=environment, stderr=subprocess.PIPE, text=True) for i in range(2)]
    ended = [process.communicate(timeout=200)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    assert samples_of(tmp_path / "one") == samples_of(tmp_path / "two")
    assert "Wrote 3 samples" in ended[0] and "Wrote 3 samples" not in ended[1]


def test_prompts_that_are_too_long(gpt2_dir, bart_dir, messages_logged):
    """The end of what is continued stays, the beginning of what an encoder reads; the log says so."""
    tokenizer = AutoTokenizer.from_pretrained(gpt2_dir)
    ids = tokenizer("one two three four five six seven eight nine ten")["input_ids"]
    texts = ["one", tokenizer.decode(ids)]
    found = generation.encode_to_continue(texts, tokenizer, 16, 10)
    assert found.begun == [tokenizer("one")["input_ids"], ids[-8:]]
    assert messages_logged == [
        "--generate_samples: of prompt 2 stays the last 8 tokens, in rows of 16",
        f"--max_new_tokens 10: a row has 16 tokens, room for 8 to {16 - len(found.begun[0])} behind a prompt",
    ]
    assert generation.encode_to_continue(texts, tokenizer, len(ids) + 10, 10).begun[1] == ids
    assert len(messages_logged) == 2

    tokenizer = AutoTokenizer.from_pretrained(bart_dir)
    whole = tokenizer(texts[1])["input_ids"]
    assert generation.encode_to_continue(texts, tokenizer, 64, 8).begun[1] == whole[:-1]  # without </s>
    found = generation.encode_for_encoder(texts, tokenizer, 2, 8)
    assert found == ([[2], [2]], [tokenizer("one")["input_ids"], [*whole[:7], whole[-1]]])
    assert messages_logged[2:] == ["--generate_samples: of prompt 2 stays the beginning, in rows of 8"]


def test_a_text_behind_another(gpt2_dir, t5_dir):
    """White space as it is; of special tokens those that mean something to the reader."""
    tokenizer = AutoTokenizer.from_pretrained(gpt2_dir)
    before, ids = (tokenizer(text)["input_ids"] for text in ("One two", " three\n four"))
    assert generation.decode_behind(tokenizer, before, ids) == " three\n four"
    tokenizer = AutoTokenizer.from_pretrained(t5_dir)
    before, ids = (tokenizer(text)["input_ids"] for text in ("The value", "is <extra_id_0> returned"))
    assert generation.decode_behind(tokenizer, before, ids).split() == ["is", "<extra_id_0>", "returned"]
    assert "<extra_id_0>" in generation.decode_behind(tokenizer, [], ids)


def test_shown_without_harm():
    sample = generation.Sample("a```` b", "c\x1b[31m\r\n d\0")
    assert generation.markdown([sample]) == "`````text\nreads:  a```` b\nwrites: c\ufffd[31m\ufffd\n d\ufffd\n`````\n"
    assert generation.in_a_line("a\n  b\x07" + "x" * 200) == "a b\ufffd" + "x" * 92 + " ..."


@pytest.mark.parametrize(
    ("module", "content", "flags", "message"),
    [
        (run_mlm_flax, "one", [], "^--generate_samples .*: a model of this script fills gaps and continues no text"),
        (run_clm_flax, "one", ["--do_train"], "^--generate_samples .*: .* when the model is evaluated; add --do_eval"),
        (run_clm_flax, "one", ["--top_p", 0.5, "--temperature", 0], "^--top_p: .*--temperature 0 draws none"),
        (run_clm_flax, "one", ["--top_p", 1.5], "^--top_p 1.5: must be"),
        (run_clm_flax, "one", ["--max_new_tokens", 0], "^--max_new_tokens 0: must be"),
        (run_clm_flax, "", [], "^--generate_samples .*: is empty"),
        (run_clm_flax, " \n\n", [], "^--generate_samples .*: has blank lines only"),
        (run_clm_flax, "a\n" * 2000, [], "^--generate_samples .*: has more than 1024 lines"),
        (run_clm_flax, "a" * (2**24 + 1), [], "^--generate_samples .*: has more than 16 MiB"),
        (
            run_clm_flax,
            "one",
            ["--generate_samples", "p.md"],
            "^--generate_samples p.md: must be a txt file",
        ),
        (
            run_clm_flax,
            "one",
            ["--generate_samples", "https://a.b/p.txt"],
            "^--generate_samples https.*: an address",
        ),
        (
            run_clm_flax,
            "Grüße".encode("latin-1"),
            [],
            "^--generate_samples .*: .*cannot be read as text: .*; convert it",
        ),
        (
            run_clm_flax,
            "one\n".encode("utf-16"),
            [],
            "^--generate_samples .*: .*cannot be read as text: .*; convert it",
        ),
    ],
)
def test_mistakes(module, content, flags, message, corpus, tmp_path, refuses):
    """Before anything is loaded."""
    (tmp_path / "p.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    base = ["--config_name", "x", "--tokenizer_name", "x", "--train_file", corpus, "--output_dir", tmp_path / "out"]
    argv = [str(flag) for flag in [*base, "--generate_samples", tmp_path / "p.txt", *flags]]
    with refuses(message):
        command_line.parse(argv, module.DataTrainingArguments, module.MODELS, None)


def test_how_prompts_are_named(tmp_path, monkeypatch, refuses):
    """By a path, also from home; a pattern or a directory if it is of one file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfone \r\n\r\n \xe2\x80\xa8two\0\n \n")
    for name in ("p.txt", "~/p.txt", "*.txt"):
        assert files.read_prompts(name, "--generate_samples") == ["one ", " \u2028two\0"]
    (tmp_path / "q.txt").write_text("three")
    with refuses("^--generate_samples: names 2 files, as p.txt; name one of them"):
        files.read_prompts("*.txt", "--generate_samples")


def test_tokens_are_drawn_among_the_likeliest_or_it_is_told(line, tmp_path, refuses):
    """T5 and BART draw none unless told so: --top_p alone would do nothing."""
    with refuses(r"^--top_p 0.5: .*a model with an encoder draws none unless told so; add --temperature 1"):
        run_t5_mlm_flax.main(line("t5", tmp_path / "out", "--top_p", 0.5))


def test_flags_that_do_nothing_alone(corpus, tmp_path, refuses):
    base = ["--config_name", "x", "--tokenizer_name", "x", "--train_file", corpus, "--output_dir", tmp_path / "out"]
    for flag in ("--max_new_tokens", "--temperature", "--top_p"):
        argv = [str(part) for part in [*base, flag, "1" if flag != "--top_p" else "0.5"]]
        with refuses(f"^{flag}: says how --generate_samples writes"):
            command_line.parse(argv, run_clm_flax.DataTrainingArguments, run_clm_flax.MODELS, None)
    for path, message in (("nothing.txt", "no such file"), (corpus.with_suffix(".json"), "must be a txt file")):
        with refuses(f"^--generate_samples .*: {message}"):
            argv = [str(part) for part in [*base, "--generate_samples", path]]
            command_line.parse(argv, run_clm_flax.DataTrainingArguments, run_clm_flax.MODELS, None)
