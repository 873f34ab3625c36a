# SPDX-License-Identifier: Apache-2.0
"""run_bert_flax.py: what is timed is the whole model, in the precision asked for; results parse; mistakes are named."""

import dataclasses
import importlib.util
import json
import logging
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from flax.traverse_util import unflatten_dict
from transformers import AlbertConfig, BertConfig, BigBirdConfig, DistilBertConfig, GPT2Config, RobertaConfig

import run_bert_flax as script
from flaxlm import cli, models, weights
from tests.conftest import ROOT, TINY

SMALL = ("--batch_size", "2", "--seq_length", "8", "--num_batches", "3", "--num_warmup_batches", "1")
NUMBER = r"\d+\.\d+"


@pytest.fixture(scope="module")
def tiny_config() -> BertConfig:
    return BertConfig(vocab_size=600, max_position_embeddings=16, **TINY)


@pytest.fixture(scope="module")
def tiny_bert(tiny_config, tmp_path_factory) -> str:
    """A directory with configuration and weights."""
    path = tmp_path_factory.mktemp("tiny-bert")
    rng, shapes = np.random.default_rng(1), weights.shapes_of(models.MASKED["bert"](tiny_config))
    params = {name: np.float32(0.3) * rng.standard_normal(shape.shape, np.float32) for name, shape in shapes.items()}
    tiny_config.save_pretrained(path)
    (path / "flax_model.msgpack").write_bytes(msgpack_serialize(unflatten_dict(params)))
    return str(path)


@pytest.fixture(autouse=True)
def restored_logger():
    yield
    cli.logger.handlers, cli.logger.propagate = [], True


@pytest.fixture
def messages(monkeypatch, caplog):
    monkeypatch.setattr(cli, "set_up_logging", lambda: None)
    caplog.set_level(logging.INFO, "flaxlm")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("flaxlm")]


def time_it(source, *flags) -> dict:
    return script.main(["--model_name_or_path", str(source), *SMALL, *map(str, flags)])


def prepare(source, *flags) -> tuple:
    """Arguments, configuration, weights and inputs, as main makes them."""
    args = script.read_timing_arguments(["--model_name_or_path", str(source), *SMALL, *map(str, flags)])
    config, params = script.load_encoder(args)
    return args, config, params, script.make_inputs(config, args)


# ---- Output --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", script.PRECISIONS)
def test_one_precision_prints_the_original_line(precision, tiny_bert, capsys, messages):
    results = time_it(tiny_bert, "--precision", precision)
    match = re.fullmatch(rf"({NUMBER}) seconds, (\d+\.\d{{3}}) examples per second\n", capsys.readouterr().out)
    assert match
    assert results.keys() == {precision}
    figures = results[precision]
    assert float(match[2]) == pytest.approx(3 * 2 / figures["elapsed_seconds"], abs=1e-3)
    assert 0 < figures["median_ms"] <= figures["p90_ms"] <= 1000 * figures["elapsed_seconds"]
    said = "\n".join(messages())
    for expected in ("Device: cpu", "3 batches, 1 before", "2 rows of 8", f"Compiling for {precision}", "90th percentile"):
        assert expected in said


def test_both_prints_a_table(tiny_bert, capsys, messages):
    results = time_it(tiny_bert, "--precision", "both")
    header, *rows = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert header == ["precision", "compile s", "median ms", "p90 ms", "examples/s", "ratio"]
    assert [row[0] for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        assert all(re.fullmatch(NUMBER, cell) for cell in row[1:])
        assert float(row[4]) == pytest.approx(results[row[0]]["examples_per_second"], abs=0.06)
    assert float(rows[0][5]) == 1
    assert float(rows[1][5]) > 0


def test_alone_in_an_empty_folder_from_a_json_file(tiny_bert, run_script, tmp_path):
    """As a program, copied, its arguments in a file and overridden behind it: only the result on standard output."""
    copied = tmp_path / "run_bert_flax.py"
    copied.write_text((ROOT / "run_bert_flax.py").read_text("utf-8"), "utf-8")
    values = {"model_name_or_path": tiny_bert, "batch_size": 2, "seq_length": 8, "num_batches": 50, "num_warmup_batches": 0}
    (tmp_path / "time.json").write_text(json.dumps(values))
    done = run_script(copied, "time.json", "--num-batches", 2, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"{NUMBER} seconds, {NUMBER} examples per second\n", done.stdout)
    assert re.search(r"INFO Compiled for float32 in \d", done.stderr)
    assert "2 batches, 0 before" in done.stderr
    assert "Timed batches" not in done.stderr  # no bar in a log of what is done in seconds
    assert "WARNING" not in done.stderr


# ---- What is timed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", script.PRECISIONS)
def test_weights_and_inputs_are_arguments(precision, tiny_bert):
    """Of a program that closes over them XLA computes what it likes while compiling (defect 114)."""
    _, config, params, inputs = prepare(tiny_bert)
    encoder = script.TimedEncoder(precision, config, params, inputs[0])
    entry = encoder.compiled.as_text().split("ENTRY", 1)[1]
    used = jax.tree.leaves((encoder.params["bert"], inputs[0]))  # all but the head, whose scores are not asked for
    assert len(jax.tree.leaves(params)) > len(used) - 2 > 30
    assert entry.count(" parameter(") == len(used)
    num_bytes = sum(array.nbytes for array in used)
    assert encoder.compiled.memory_analysis().argument_size_in_bytes >= num_bytes
    # The work is done: every position of every layer, at two operations per weight of a matrix (4 H x H, 2 H x F).
    H, F = config.hidden_size, config.intermediate_size
    flops = 2 * inputs[0]["input_ids"].size * config.num_hidden_layers * (4 * H * H + 2 * H * F)
    assert encoder.compiled.cost_analysis()["flops"] >= flops


def test_weights_are_cast_once_before_timing(tiny_bert):
    _, config, params, inputs = prepare(tiny_bert)
    encoder = script.TimedEncoder("bfloat16", config, params, inputs[0])
    assert {array.dtype for array in jax.tree.leaves(encoder.params)} == {jnp.dtype("bfloat16")}
    outputs = encoder.compiled(encoder.params, inputs[0])
    assert (outputs.shape, outputs.dtype) == ((2, 8, 32), jnp.bfloat16)
    signature = encoder.compiled.as_text().splitlines()[0]  # entry_computation_layout: what goes in and out
    assert "f32[" not in signature
    assert {array.dtype for array in jax.tree.leaves(params)} == {jnp.dtype("float32")}  # what float32 is timed with


def test_outputs_are_those_of_the_checkpoint(tiny_bert):
    """Its weights, its activation; in bfloat16 the same but for rounding."""
    _, config, params, inputs = prepare(tiny_bert)
    assert config.hidden_act == "gelu"
    model, loaded = weights.from_pretrained(tiny_bert, models.MASKED)
    expected = model.apply({"params": loaded}, inputs[0]["input_ids"], inputs[0]["attention_mask"])
    for precision, tolerance in (("float32", 1e-5), ("bfloat16", 0.1)):
        encoder = script.TimedEncoder(precision, config, params, inputs[0])
        hidden_BTH = encoder.compiled(encoder.params, inputs[0])
        np.testing.assert_allclose(np.float32(hidden_BTH), expected, atol=tolerance)
    _, changed, _, _ = prepare(tiny_bert, "--hidden_act", "gelu_new")
    assert changed.hidden_act == "gelu_new"


@pytest.mark.torch
def test_outputs_are_those_of_pytorch(tiny_config, tmp_path):
    """Of a checkpoint that it wrote, without a head."""
    import torch
    from transformers import BertModel

    torch.manual_seed(1)
    model = BertModel(tiny_config).eval()
    model.save_pretrained(tmp_path)
    _, config, params, inputs = prepare(tmp_path)
    encoder = script.TimedEncoder("float32", config, params, inputs[0])
    with torch.no_grad():
        expected = model(**{name: torch.tensor(np.asarray(array)).long() for name, array in inputs[0].items()})
    hidden_BTH = encoder.compiled(encoder.params, inputs[0])
    np.testing.assert_allclose(hidden_BTH, expected.last_hidden_state.numpy(), atol=1e-4)


def test_inputs_vary_and_follow_the_seed(tiny_bert):
    args, *_, inputs = prepare(tiny_bert, "--num_batches", 100)
    ids = np.stack([batch["input_ids"] for batch in inputs])
    assert ids.shape == (script.NUM_INPUTS, 2, 8)
    assert len({batch.tobytes() for batch in ids}) == script.NUM_INPUTS
    assert ids.min() >= 300  # half of a small vocabulary; the first thousand of a large one
    assert ids.max() < 600
    for batch in inputs:
        assert batch.keys() == {"input_ids", "attention_mask"}  # without types of tokens all are of the first
        assert np.all(batch["attention_mask"] == 1)
    again, other = (prepare(tiny_bert, "--seed", seed)[-1] for seed in (args.seed, 7))
    assert np.array_equal(again[0]["input_ids"], ids[0])
    assert not np.array_equal(other[0]["input_ids"], ids[0])
    large = script.make_inputs(BertConfig(eos_token_id=1001, vocab_size=1003), args)
    assert min(int(batch["input_ids"].min()) for batch in large) >= 501
    assert not any(bool((batch["input_ids"] == 1001).any()) for batch in large)


def test_each_result_is_waited_for(monkeypatch):
    """The clock is read after the result is there (defect 113), not after the call has come back."""
    events = []
    encoder = script.TimedEncoder.__new__(script.TimedEncoder)
    encoder.params, encoder.compiled = "weights", lambda params, batch: events.append("called") or "result"
    monkeypatch.setattr(script.jax, "block_until_ready", lambda result: events.append(result))
    monkeypatch.setattr(script, "time", types.SimpleNamespace(perf_counter=lambda: events.append("clock") or len(events)))
    assert encoder("batch") == 3
    assert events == ["clock", "called", "result", "clock"]


def test_precisions_take_turns():
    args = script.read_timing_arguments([*SMALL, "--num_batches", "4"])
    calls = []

    class Fake:
        def __init__(self, name: str, duration: float):
            self.name, self.duration, self.seconds = name, duration, []

        def __call__(self, batch) -> float:
            calls.append((self.name, batch))
            return self.duration

    a, b = Fake("A", 0.2), Fake("B", 0.1)
    script.time_in_turns([a, b], [0, 1, 2], args)
    assert calls == [("A", 0), ("B", 0), *[(name, batch) for batch in (1, 2, 0, 1) for name in "AB"]]
    assert (a.seconds, b.seconds) == ([0.2] * 4, [0.1] * 4)  # the warm-up is not in
    b.seconds[0] = 9.0  # something else ran in that turn
    assert script.turn_ratio(a, b) == 2


# ---- Models --------------------------------------------------------------------------------------------------------------

OTHERS = {
    "distilbert": DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64),  # without types of tokens
    "roberta": RobertaConfig(**TINY),
    "albert": AlbertConfig(embedding_size=16, **TINY),
    "big_bird": BigBirdConfig(**TINY),  # with full attention
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_encoders_without_weights(model_type, tmp_path, capsys, messages):
    """A directory that only holds a configuration is timed with random weights, and it says so."""
    config = OTHERS[model_type]
    config.update({"vocab_size": 100, "num_hidden_layers": 1})
    config.save_pretrained(tmp_path)
    time_it(tmp_path, "--num_batches", 1)
    assert "examples per second" in capsys.readouterr().out
    assert any("random ones are timed" in message for message in messages())


def test_base_model_gets_random_weights_without_the_hub(monkeypatch, tiny_config, tmp_path, capsys, messages):
    """BERT-base has 110 million parameters, so a small one stands in for it here; its shape is checked apart."""
    real = script.BertConfig()
    shapes = weights.shapes_of(script.MODELS["bert"](real))
    sizes = {name: sum(shape.size for path, shape in shapes.items() if path[0] == name) for name in ("bert", "cls")}
    pooler = 768 * 768 + 768  # of the model of 110 million, which is not timed
    assert sizes == {"bert": 109_482_240 - pooler, "cls": 768 * 768 + 3 * 768 + 30522}
    assert (real.vocab_size, real.hidden_act) == (30522, "gelu")
    monkeypatch.setattr(script, "BertConfig", lambda: tiny_config)
    results = time_it("bert-base-uncased", "--cache_dir", tmp_path)
    assert results["float32"]["examples_per_second"] > 0
    assert "examples per second" in capsys.readouterr().out
    warnings = messages()[:2]
    assert warnings[0].startswith("bert-base-uncased cannot be loaded: ")
    assert "random" in warnings[1]


# ---- Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--batch_size", 0), ("--seq_length", 0), ("--seq_length", 17), ("--num_batches", 0), ("--num_warmup_batches", -1),
        ("--seed", -1), ("--precision", "float16"), ("--hidden_act", "gloo"), ("--batch_size", "many"), ("--steps", 3),
    ],
)  # fmt: skip
def test_impossible_flags(flag, value, tiny_bert, error_of):
    assert flag in error_of(time_it, tiny_bert, flag, value)


def test_directories_that_cannot_be_timed(tmp_path, tiny_bert, tiny_config, error_of, monkeypatch):
    for source in (tmp_path / "missing", tmp_path, "tester/no-such-model", f"{tiny_bert}/config.json"):
        line = error_of(time_it, source)
        assert "--model_name_or_path" in line
        assert str(source) in line
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    assert "gpt2 is no encoder of text; supported are albert, bert" in error_of(time_it, tmp_path / "gpt2")
    tiny_config.save_pretrained(tmp_path / "damaged")
    (tmp_path / "damaged" / "flax_model.msgpack").write_bytes(b"not weights")
    assert "damaged: no model: flax_model.msgpack is cut short, damaged" in error_of(time_it, tmp_path / "damaged")
    # A directory of the base model's name is a directory: nothing is timed in its place.
    (tmp_path / "bert-base-uncased").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "cannot be loaded" in error_of(time_it, "bert-base-uncased")
    DistilBertConfig().save_pretrained(tmp_path / "distilbert")
    assert "--hidden_act" in error_of(time_it, tmp_path / "distilbert", "--hidden_act", "gelu_new")


ADVICE = re.compile(r"--\w+|\w+=True")  # flags and arguments that a message names


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"hidden_size": "abc"}, "config.json: hidden_size=abc: must be a whole number"),
        ({"num_attention_heads": 5}, "config.json: num_attention_heads=5: does not divide the hidden size, 32"),
        ({"hidden_act": "foo"}, "config.json: hidden_act=foo: must be one of gelu,"),
        (
            {"position_embedding_type": "relative_key"},
            'position_embedding_type="relative_key": positions relative to each other: not here',
        ),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}, "it comes with code of its own, which is not run"),
        ({"vocab_size": 900}, "the configuration is not that of the weights: "),
    ],
)
def test_advice_that_can_be_followed(fields, expected, tiny_bert, error_of, tmp_path):
    """A configuration that is damaged or another's: one line, which names no flag that the script does not have."""
    shutil.copytree(tiny_bert, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    line = error_of(time_it, tmp_path)
    assert expected in line
    assert set(ADVICE.findall(line)) <= {f"--{field.name}" for field in dataclasses.fields(script.TimingArguments)}


def test_weights_in_a_pickle(tiny_config, error_of, tmp_path, monkeypatch):
    """Only PyTorch can read them: that is what the line says, and no flag that the script does not have."""
    tiny_config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = error_of(time_it, tmp_path)
    assert "its weights are in pytorch_model.bin, which needs PyTorch: install it (pip install torch)" in line
    assert set(ADVICE.findall(line)) == {"--model_name_or_path"}


@pytest.mark.torch
def test_a_pickle_is_timed(tiny_config, capsys, tmp_path):
    import torch
    from transformers import BertModel

    tiny_config.save_pretrained(tmp_path)
    torch.save(BertModel(tiny_config).state_dict(), tmp_path / "pytorch_model.bin")
    time_it(tmp_path)
    assert "examples per second" in capsys.readouterr().out


def test_a_length_that_the_model_does_not_take(tmp_path, error_of):
    """Rows that would have sparse attention."""
    sizes = {"block_size": 1, "num_random_blocks": 1, "max_position_embeddings": 16}
    BigBirdConfig(vocab_size=100, **sizes, **TINY).save_pretrained(tmp_path)
    line = error_of(time_it, tmp_path)
    assert "attention_type=block_sparse: sparse attention is not here, and rows of more than 7 tokens would have it" in line
    assert set(ADVICE.findall(line)) == {"--seq_length"}
