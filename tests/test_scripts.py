# SPDX-License-Identifier: Apache-2.0
"""What every training script promises, whatever its objective; run_mlm_flax.py keeps some of it in tests of its own."""

import functools
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    MarianConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

import run_bart_dlm_flax
import run_clm_flax
import run_mlm_flax
import run_pretraining_flax
import run_t5_mlm_flax
from flaxlm import corpus as corpus_module
from flaxlm import layers, losses, sharding, weights
from flaxlm import models as architectures
from tests.conftest import ROOT, read_events
from tests.test_checkpoints import outcome, train_until
from tests.test_streams import assert_same_run, back_to


class Script(NamedTuple):
    module: ModuleType
    model_dir: str  # the fixture with its tiny model
    length_flag: str
    dropout: str  # --config_overrides that switch it on
    model_class: str  # PyTorch's and ours
    golden: dict[str, float]  # of the first step
    learned: float  # an evaluation loss that 80 steps reach; chance is log(512) = 6.2, or for T5 log(640) = 6.5


SCRIPTS = [
    Script(
        run_mlm_flax, "roberta_dir", "--max_seq_length", "hidden_dropout_prob=0.1", "RobertaForMaskedLM",
        {"loss": 6.611804, "grad_norm": 3.721192}, 5.6,
    ),
    Script(
        run_clm_flax, "gpt2_dir", "--block_size", "resid_pdrop=0.1,embd_pdrop=0.1", "GPT2LMHeadModel",
        {"loss": 6.439316, "grad_norm": 2.041518}, 5.6,
    ),
    Script(
        run_t5_mlm_flax, "t5_dir", "--max_seq_length", "dropout_rate=0.1", "T5ForConditionalGeneration",
        {"loss": 19.871115, "grad_norm": 18.345716}, 5.6,
    ),
    Script(
        run_bart_dlm_flax, "bart_dir", "--max_seq_length", "dropout=0.1", "BartForConditionalGeneration",
        {"loss": 6.256114, "grad_norm": 0.891222}, 5.6,
    ),
]  # fmt: skip
ALL = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.module.__name__, scope="module")
# What test_runs.py, test_checkpoints.py and test_streams.py have for run_mlm_flax.py, and more of it.
ALL_BUT_MLM = pytest.mark.parametrize("script", SCRIPTS[1:], ids=lambda script: script.module.__name__, scope="module")


@pytest.fixture(scope="module")
def flags(script, request, corpus) -> list[str]:
    """Flags of a tiny run; of two that are equal the last one counts."""
    model_dir = request.getfixturevalue(script.model_dir)
    flags = ["--config_name", model_dir, "--tokenizer_name", model_dir, "--train_file", corpus, script.length_flag, 32]
    return [str(flag) for flag in flags]


@pytest.fixture(scope="module")
def train(script, flags) -> Callable:
    """train(output_dir, *more_flags): main() in this process."""

    def call(output_dir: Path, *more) -> dict[str, float]:
        return script.module.main([*flags, "--output_dir", *map(str, (output_dir, *more))])

    return call


# ---- The loss ------------------------------------------------------------------------------------------------------------

VOCAB_SIZE = 131  # a prime, as no other size here
SIZES = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64, "num_key_value_heads": 2, "head_dim": 16, "n_embd": 32, "n_layer": 1, "n_head": 2,
    "n_positions": 64, "rotary_dim": 8, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "ffn_dim": 48,
    "attention_heads": 2, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_layers": 1,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 48, "embedding_size": 16, "word_embed_proj_dim": 32, "seq_length": 64,
    "attention_types": [[["local"], 1]], "window_size": 8, "decoder_start_token_id": 0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def make_config(model_type: str, **more) -> PretrainedConfig:
    """A small one of any type."""
    return CONFIG_MAPPING[model_type](**SIZES | more)


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Special tokens of all objectives first, then words, then sentinels: VOCAB_SIZE in all."""
    specials = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
    aliases = {"cls_token": "<s>", "sep_token": "</s>"}
    sentinels = [f"<extra_id_{j}>" for j in range(20)]
    words = [f"word{i}" for i in range(VOCAB_SIZE - len(specials) - len(sentinels))]
    vocab = {token: i for i, token in enumerate([*specials.values(), *words, *sentinels])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocab["</s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **specials, **aliases)


def make_batch(module: ModuleType, config: PretrainedConfig) -> dict[str, np.ndarray]:
    """Three rows as the script's own collator makes them: one is not real, one is short; some labels are id 0."""
    collator = module.Collator(small_tokenizer(), config, module.DataTrainingArguments(), 57)
    rng = np.random.default_rng(0)
    rows = {name: rng.integers(0, 2, (3, collator.row_length)) for name in collator.columns}
    rows["input_ids"] = rng.integers(5, 100, (3, collator.row_length)).astype(np.int32)
    for name, filling in collator.columns.items():
        rows[name][2, 9:] = filling
    batch = collator(rows, rng.random((3, collator.draws_per_row)), np.array([True, False, True]), 1)
    if batch["label_weights"].ndim == 2:  # else a list of labels
        assert (batch["label_weights"].sum(axis=1) > 0).tolist() == [True, False, True]
        batch["labels"][0, :2] = 0
    return batch


def make_model(module: ModuleType, config: PretrainedConfig, compute: layers.Compute | None = None) -> nn.Module:
    """The script's model of a configuration."""
    return module.MODELS[config.model_type](config, compute or layers.Compute())


def make_params(model: nn.Module) -> dict:
    """Random weights, not those of the model's initialisation, where some are all zeros or ones."""
    rng, shapes = np.random.default_rng(1), weights.shapes_of(model)
    return unflatten_dict(
        {
            path: 0.2 * rng.standard_normal(shapes[path].shape, np.float32) + (len(shapes[path].shape) == 1)
            for path in sorted(shapes)
        }
    )


def model_inputs(batch: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Of a batch what a model is called with, in its order."""
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "token_type_ids")
    return tuple(batch[name] for name in names if name in batch)


def assert_plain_loss(module: ModuleType, config: PretrainedConfig, monkeypatch) -> Callable:
    """Loss, count, right guesses and all gradients of the script are those computed from the model's own full scores, but
    its program never holds these. Returns a function that gives the scores of a batch.
    """
    monkeypatch.setattr(losses, "CHUNK_SCORES", VOCAB_SIZE * 8)
    monkeypatch.setattr(losses, "MAX_CHUNKS", 4)
    batch, model = make_batch(module, config), make_model(module, config)
    num_labels, params = batch["labels"].size, make_params(model)
    assert num_labels % 4

    def plain_loss(params, batch):
        hidden = model.apply({"params": params}, *model_inputs(batch))
        logits = model.apply({"params": params}, hidden, method="scores").astype(jnp.float32)
        loss_BT = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]) * batch["label_weights"]
        return loss_BT.sum(), (((logits.argmax(-1) == batch["labels"]) * batch["label_weights"]).sum(), logits)

    def script_loss(params, batch):
        return module.loss_fn(params, batch, model)

    plain, fused = (jax.value_and_grad(loss, has_aux=True) for loss in (plain_loss, script_loss))
    # One program, whose common parts are compiled once, and hardly optimised: compiling is what takes time here.
    options = {"xla_backend_optimization_level": 0}
    compute = jax.jit(lambda params, batch: (plain(params, batch), fused(params, batch)), compiler_options=options)
    ((loss, (correct, _)), grads), ((found, aux), found_grads) = compute(params, batch)
    assert float(found) == pytest.approx(float(loss), rel=1e-5)
    assert float(aux["weight"]) == batch["label_weights"].sum()
    assert float(aux["correct"]) == float(correct)
    # Where a gradient is zero, as that of the bias of keys, rounding is all there is.
    noise = 1e-6 * max(np.abs(grad).max() for grad in jax.tree.leaves(grads))
    for (path, found_grad), grad in zip(jax.tree.leaves_with_path(found_grads), jax.tree.leaves(grads), strict=True):
        name, tolerance = jax.tree_util.keystr(path), 1e-5 * np.abs(grad).max() + noise
        np.testing.assert_allclose(found_grad, grad, rtol=0, atol=tolerance, err_msg=name)

    assert not found_grads.get("final_logits_bias", np.zeros(1)).any()  # which is no weight in PyTorch

    program = str(jax.make_jaxpr(fused)(params, batch))
    shapes = [[int(size) for size in shape.split(",")] for shape in re.findall(r"\bf32\[([\d,]+)\]", program)]
    largest = max(math.prod(shape) for shape in shapes if VOCAB_SIZE in shape)
    assert VOCAB_SIZE * num_labels / 4 <= largest < VOCAB_SIZE * num_labels
    return lambda batch: compute(params, batch)[0][0][1][1]


CAUSAL = {model_type: (model_type, {}) for model_type in run_clm_flax.MODELS}
CAUSAL["mistral without window"] = ("mistral", {"sliding_window": None})


@pytest.mark.parametrize(("model_type", "more"), CAUSAL.values(), ids=CAUSAL)
def test_causal_loss(model_type, more, monkeypatch):
    """In every family; and scores depend on what came before, not on what follows, in encoders by default too."""
    config = make_config(model_type, **more)
    run_clm_flax.DataTrainingArguments().adapt_config(config, 57)
    scores_of = assert_plain_loss(run_clm_flax, config, monkeypatch)
    batch = make_batch(run_clm_flax, config)
    scores = scores_of(batch)
    changed = batch["input_ids"] + (np.arange(57) == 8)  # not in place: jax may hold the array
    others = scores_of(batch | {"input_ids": changed})
    np.testing.assert_array_equal(scores[:, :8], others[:, :8])
    assert np.abs(scores - others)[0, [8, 12]].max(axis=-1).min() > 1e-4


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
ENCODER_DECODERS = {
    f"{model_type}{' untied' * (fields == UNTIED)}": (module, model_type, fields)
    for module in (run_bart_dlm_flax, run_t5_mlm_flax)
    for model_type in module.MODELS
    for fields in (TIED, UNTIED)
}


@pytest.mark.parametrize(("module", "model_type", "more"), ENCODER_DECODERS.values(), ids=ENCODER_DECODERS)
def test_encoder_decoder_loss(module, model_type, more, monkeypatch):
    """With vocabulary heads of their own or not, and in BART and its kind with a bias that it adds behind its head."""
    assert_plain_loss(module, make_config(model_type, **more), monkeypatch)


TRAINED = {
    f"{objective} {model_type}": (module, model_type, {})
    for objective, module in (("masked", run_mlm_flax), ("pairs", run_pretraining_flax), ("causal", run_clm_flax))
    for model_type in module.MODELS
} | {name: family for name, family in ENCODER_DECODERS.items() if "untied" not in name}


@pytest.mark.parametrize(("module", "model_type", "more"), TRAINED.values(), ids=TRAINED)
def test_every_type_trains(module, model_type, more):
    """The step of a run, with dropout, again and again on one batch: the loss falls."""
    config = make_config(model_type, **more)
    data_args = module.DataTrainingArguments()
    data_args.pad_to_max_length = True
    data_args.adapt_config(config, 57)
    if config.model_type == "big_bird":
        assert config.attention_type == "original_full"
    batch, model = make_batch(module, config), make_model(module, config)
    batch = {name: array[None] for name, array in batch.items()} | {"stop": np.zeros((1, 1), np.int32)}
    loss_fn, rng, optimizer = functools.partial(module.loss_fn, model=model), jax.random.key(0, impl="rbg"), optax.adam(2e-2)
    devices = sharding.one_device()
    p_train_step, _ = module.make_steps(loss_fn, optimizer, optax.constant_schedule(2e-2), devices)
    state, found = sharding.create_train_state(make_params(model), optimizer, devices), []
    step = p_train_step.lower(state, batch, rng).compile({"xla_backend_optimization_level": 0})
    for _ in range(20):
        state, metrics = step(state, batch, rng)
        found.append(float(metrics["loss"]))
    assert found[-1] < 0.8 * found[0], found


MODEL_OF = {
    run_mlm_flax: "roberta", run_clm_flax: "gpt2", run_t5_mlm_flax: "t5", run_bart_dlm_flax: "bart",
    run_pretraining_flax: "bert",
}  # fmt: skip


@pytest.mark.parametrize("module", MODEL_OF, ids=lambda module: module.__name__)
def test_z_loss_is_of_training_only(module):
    """A step of plain descent goes down the slope of cross-entropy and z-loss; it tells each alone. Evaluation has none."""
    config = make_config(MODEL_OF[module], tie_word_embeddings=True)
    module.DataTrainingArguments().adapt_config(config, 57)
    for name in vars(config):
        if re.search("drop", name) and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    batch, model = make_batch(module, config), make_model(module, config)
    loss_fn, devices, optimizer = functools.partial(module.loss_fn, model=model), sharding.one_device(), optax.sgd(1.0)
    options, params = {"xla_backend_optimization_level": 0}, make_params(model)
    rows, rng = {name: array[None] for name, array in batch.items()} | {"stop": np.zeros((1, 1), np.int32)}, jax.random.key(0)
    found = {}
    for z_loss in (0.0, 0.1):
        p_train_step, p_eval_step = module.make_steps(loss_fn, optimizer, optax.constant_schedule(1.0), devices, z_loss)
        state = sharding.create_train_state(jax.tree.map(jnp.array, params), optimizer, devices)
        state, metrics = p_train_step.lower(state, rows, rng).compile(options)(state, rows, rng)
        one = batch | {"stop": np.zeros(1, np.int32)}
        sums = p_eval_step.lower(params, one).compile(options)(params, one)
        found[z_loss] = state.params, {name: float(value) for name, value in (metrics | {"eval": sums["loss"]}).items()}
        assert sums.keys() & {"z_loss"} == set()

    def penalty(params):
        hidden = model.apply({"params": params}, *model_inputs(batch))
        labelled = hidden.reshape(-1, hidden.shape[-1])[batch.get("label_positions", slice(None))]
        scores = model.apply({"params": params}, labelled, method="scores")
        weights_N = batch["label_weights"].reshape(-1)
        return 0.1 * (jax.nn.logsumexp(scores, -1) ** 2 * weights_N).sum() / weights_N.sum()

    expected, slope = jax.jit(jax.value_and_grad(penalty), compiler_options=options)(params)
    (plain, without), (moved, metrics) = found[0.0], found[0.1]
    assert metrics.pop("z_loss") == pytest.approx(float(expected), rel=1e-5)
    assert without.pop("grad_norm") != pytest.approx(metrics.pop("grad_norm"), rel=1e-2)
    assert metrics == pytest.approx(without, rel=1e-6)
    for (path, grad), one, other in zip(
        *(jax.tree.leaves_with_path(slope), *map(jax.tree.leaves, (plain, moved))), strict=True
    ):
        name, tolerance = jax.tree_util.keystr(path), 1e-4 * np.abs(grad).max() + 1e-5
        np.testing.assert_allclose(one - other, grad, rtol=0, atol=tolerance, err_msg=name)


STEPS = [
    "--max_steps", "5", "--learning_rate", "1e-3", "--logging_steps", "1", "--max_eval_samples", "19",
    "--adam_epsilon", "1e-4",  # gradients that are zero but for rounding, as that of the bias of keys, Adam would blow up
]  # fmt: skip


# ---- The first step ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fixed_data(tmp_path_factory) -> tuple[Path, Path]:
    """A text and the directory of a tokenizer that depend on nothing which is installed."""
    directory = tmp_path_factory.mktemp("fixed")
    rng = np.random.default_rng(0)
    numbers = 90 * rng.random((400, 24)) ** 3  # low ones are more frequent
    (directory / "text.txt").write_text("".join(f"{' '.join(f'word{int(i)}' for i in line)}\n" for line in numbers))
    small_tokenizer().save_pretrained(directory / "tokenizer")
    return directory / "text.txt", directory / "tokenizer"


@ALL
def test_golden_first_step(script, train, fixed_data, tmp_path):
    text, tokenizer = fixed_data
    train(tmp_path, "--train_file", text, "--tokenizer_name", tokenizer, "--do_train", *STEPS)
    points = read_events(tmp_path)
    found = {name: points[f"train_{name}"][0][1] for name in script.golden}
    assert found == pytest.approx(script.golden, rel=1e-4), (
        f"The first step changed: {found}. If the change of noise, order, initialisation or loss was meant, update the"
        " numbers in SCRIPTS and say so in the commit; if not, it is a bug."
    )


# ---- Alone, and on several devices ---------------------------------------------------------------------------------------


@ALL
def test_alone_on_four_devices_equals_here_on_one(script, flags, train, run_script, tmp_path):
    """A copy of the script in an empty directory, 4 x 2 rows; then 1 x 8: the same curve, evaluation and weights."""
    shutil.copy(script.module.__file__, tmp_path)
    name = Path(script.module.__file__).name
    four = ["--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 2, "--output_dir", "four"]
    done = run_script(name, *flags, *STEPS, *four, devices=4, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "on 4 device(s)" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {name, "four"}
    assert json.loads((tmp_path / "four" / "run_info.json").read_text())["script"] == name
    assert f"```bash\npython {name} " in (tmp_path / "four" / "README.md").read_text()
    train(tmp_path / "one", *STEPS)
    one, four = (read_events(tmp_path / name) for name in ("one", "four"))
    for tag in ("train_loss", "train_grad_norm", "eval_loss", "eval_accuracy"):
        assert [x for x, _ in one[tag]] == [x for x, _ in four[tag]]
        assert [v for _, v in one[tag]] == pytest.approx([v for _, v in four[tag]], rel=1e-5), tag
    one, four = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "four"))
    for key in one:
        np.testing.assert_allclose(one[key], four[key], atol=2e-5, err_msg=key)


# ---- Resumed -------------------------------------------------------------------------------------------------------------


# Dropout, two micro-batches; epochs, saves, evaluations and log lines end at different steps.
SIX_STEPS = [
    "--max_steps", 6, "--save_steps", 2, "--eval_steps", 3, "--logging_steps", 5, "--learning_rate", 1e-3,
    "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2,
]  # fmt: skip


RESUMED = pytest.mark.parametrize(
    ("script", "more"),
    [(script, []) for script in SCRIPTS[1:]] + [(script, ["--document_attention"]) for script in SCRIPTS],
    ids=lambda value: value.module.__name__ if isinstance(value, Script) else "".join(value),
    scope="module",
)


@RESUMED
def test_resumed_equals_uninterrupted(script, more, train, tmp_path):
    """Stopped after step 3 of 6: bit for bit the same weights, optimizer state, curves and results."""
    flags = [*SIX_STEPS, "--max_train_samples", 43, "--max_eval_samples", 12, "--config_overrides", script.dropout, *more]
    train(tmp_path / "whole", *flags)
    train_until(train, tmp_path / "stopped", 3, *flags)
    train(tmp_path / "stopped", *flags, "--resume_from_checkpoint")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


OPTIMIZERS = {
    "muon": ["--max_grad_norm", 0.5, "--lr_scheduler_type", "warmup_stable_decay", "--z_loss", 1e-3, "--weight_decay", 0.1],
    "lion": ["--lr_scheduler_type", "inverse_sqrt", "--weight_decay", 0.1],
}


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("script", SCRIPTS[1:2], ids=lambda script: script.module.__name__, scope="module")
def test_resumed_with_other_optimizers(script, optim, train, capsys, tmp_path):
    """The same with each; the z-loss is a part of its own in log and curves, and no part of the loss."""
    flags = [*SIX_STEPS, "--max_train_samples", 43, "--max_eval_samples", 12, "--config_overrides", script.dropout]
    flags += ["--optim", optim, *OPTIMIZERS[optim]]
    train(tmp_path / "whole", *flags)
    train_until(train, tmp_path / "stopped", 3, *flags)
    train(tmp_path / "stopped", *flags, "--resume_from_checkpoint")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    points = read_events(tmp_path / "whole")
    assert ("train_z_loss" in points) == (optim == "muon")
    line = re.search(r"loss \d\.\d{4}, z loss 0\.0\d{3}, learning rate", capsys.readouterr().err)
    assert (line is not None) == (optim == "muon")


@RESUMED
def test_resumed_stream_equals_uninterrupted(script, more, train, tmp_path):
    """Cut off after the checkpoint of step 4."""
    flags = [*SIX_STEPS, "--streaming", "--shuffle_buffer_size", 60, "--num_eval_samples", 12]
    flags += ["--config_overrides", script.dropout, *more]
    train(tmp_path / "whole", *flags)
    resumed = back_to(tmp_path / "whole", tmp_path / "resumed", 4)
    (resumed / "model.safetensors").unlink()
    train(resumed, *flags, "--resume_from_checkpoint")
    assert_same_run(tmp_path / "whole", resumed)


# ---- Trained -------------------------------------------------------------------------------------------------------------


@ALL_BUT_MLM
def test_training_learns(script, train, tmp_path):
    """Real text for 80 steps; and what it leaves behind: results, weights in both formats, a card that says how to load."""
    results = train(
        tmp_path, "--max_steps", 80, "--learning_rate", 1e-2, "--warmup_steps", 10, "--per_device_train_batch_size", 16,
        "--logging_steps", 40, "--eval_steps", 40, "--max_eval_samples", 64,
    )  # fmt: skip
    saved = json.loads((tmp_path / "eval_results.json").read_text())
    of_its_own = {"eval_bits_per_byte"} if script.module is run_clm_flax else set()
    assert set(saved) == {"eval_accuracy", "eval_loss", "eval_perplexity"} | of_its_own
    assert saved.items() <= results.items()
    assert results["train_steps"] == 80
    assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    assert results["eval_loss"] < min(script.learned, 0.9 * read_events(tmp_path)["train_loss"][0][1])
    assert 0.03 < results["eval_accuracy"] < 1  # 0.002 by chance

    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"config.json", "tokenizer.json", "model.safetensors", "flax_model.msgpack", "README.md"}
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [script.model_class]
    card = (tmp_path / "README.md").read_text()
    assert f"import {script.model_class}, AutoTokenizer" in card
    classes = next(name for name, value in vars(architectures).items() if value is script.module.MODELS)
    assert f'model, params = weights.from_pretrained(".", models.{classes})' in card
    model, params = weights.from_pretrained(str(tmp_path), script.module.MODELS)
    assert type(model).__name__ == script.model_class
    assert {path: array.shape for path, array in flatten_dict(params).items()} == {
        path: shape.shape for path, shape in weights.shapes_of(model).items()
    }
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("A tokenizer")["input_ids"], skip_special_tokens=True) == "A tokenizer"


# ---- Mistakes, in one line, and flags of an objective --------------------------------------------------------------------


@pytest.fixture
def mistake(error_of, tmp_path):
    """mistake(module, model_dir, *flags): main() that ends with an error, and that error."""

    def call(module: ModuleType, model_dir: Path, *flags) -> str:
        base = ["--config_name", model_dir, "--tokenizer_name", model_dir, "--output_dir", tmp_path / "out", "--max_steps", 1]
        return error_of(module.main, [str(flag) for flag in [*base, *flags]])

    return call


@pytest.fixture
def bare_tokenizer_dir(tmp_path) -> Path:
    """A tokenizer with words and an unknown token only."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "word": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path / "bare")
    return tmp_path / "bare"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--block_size", 1], "--block_size 1: must be at least 2"),
        (["--append_eos_token", "--tokenizer_name", "BARE"], "--append_eos_token: the tokenizer has no end-of-sequence token"),
        (["--config_name", "T5", "--tokenizer_name", "T5"], "model type t5: has no Flax class for this objective"),
    ],
    ids=["block_size", "eos", "t5"],
)
def test_mistakes_with_causal_models(flags, message, mistake, gpt2_dir, t5_dir, bare_tokenizer_dir, corpus):
    directories = {"BARE": bare_tokenizer_dir, "T5": t5_dir}
    line = mistake(run_clm_flax, gpt2_dir, "--train_file", corpus, *(directories.get(flag, flag) for flag in flags))
    assert message in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_seq_length", 4000], r"--max_seq_length 4000 .*: up to \d+ spans in a row, .* but the tokenizer has 100:"),
        (["--mlm_probability", 1.0], r"--mlm_probability 1.0: must lie between 0 and 1, both excluded"),
        (["--tokenizer_name", "BARE"], r"--tokenizer_name: has no pad_token"),
        (["--config_name", "GPT2"], r"model type gpt2: has no Flax class for this objective; supported are t5, mt5"),
    ],
    ids=["sentinels", "mlm_probability", "bare tokenizer", "gpt2"],
)
def test_mistakes_with_t5(flags, message, mistake, t5_dir, gpt2_dir, bare_tokenizer_dir, corpus, monkeypatch):
    """All of them before any text is looked at."""
    monkeypatch.setattr(corpus_module, "prepare", lambda *args: pytest.fail("it was"))
    directories = {"BARE": bare_tokenizer_dir, "GPT2": gpt2_dir}
    line = mistake(run_t5_mlm_flax, t5_dir, "--train_file", corpus, *(directories.get(flag, flag) for flag in flags))
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mlm_probability", 1.0], "--mlm_probability 1.0: must be at least 0 and below 1"),
        (["--permute_sentence_ratio", 1.5], "--permute_sentence_ratio 1.5: must lie between 0 and 1"),
        (["--poisson_lambda", 0], "--poisson_lambda 0.0: must be above 0"),
        (["--max_seq_length", 65], "--max_seq_length 65: the model has positions for 64 tokens"),
        (["--tokenizer_name", "BARE"], "--tokenizer_name: has no mask_token"),
        (["--config_name", "GPT2"], "model type gpt2: has no Flax class for this objective; supported are bart"),
    ],
    ids=["mlm_probability", "permute_sentence_ratio", "poisson_lambda", "max_seq_length", "bare tokenizer", "gpt2"],
)
def test_mistakes_with_bart(flags, message, mistake, bart_dir, gpt2_dir, bare_tokenizer_dir, corpus, monkeypatch):
    """All of them before any text is looked at."""
    monkeypatch.setattr(corpus_module, "prepare", lambda *args: pytest.fail("it was"))
    directories = {"BARE": bare_tokenizer_dir, "GPT2": gpt2_dir}
    line = mistake(run_bart_dlm_flax, bart_dir, "--train_file", corpus, *(directories.get(flag, flag) for flag in flags))
    assert message in line


@pytest.mark.parametrize(
    ("module", "model_type", "message"),
    [
        (
            run_t5_mlm_flax,
            "encoder-decoder",
            "model type encoder-decoder: has no Flax class for this objective; supported are t5,",
        ),
        (run_t5_mlm_flax, "bart", "model type bart: has no Flax class for this objective; supported are t5, mt5, umt5"),
        (run_bart_dlm_flax, "encoder-decoder", "has no Flax class for this objective; supported are bart, mbart, blenderbot, "),
        (run_bart_dlm_flax, "t5", "model type t5: has no Flax class for this objective; supported are bart, mbart"),
        (
            run_pretraining_flax,
            "albert",
            "model type albert: has no Flax class for this objective; supported are bert, big_bird",
        ),
    ],
)
def test_types_that_are_not_trained(module, model_type, message, error_of, bart_dir, corpus, tmp_path):
    flags = ["--model_type", model_type, "--tokenizer_name", bart_dir, "--train_file", corpus, "--output_dir", tmp_path]
    assert message in error_of(module.main, [str(flag) for flag in flags])


def test_marian_with_two_vocabularies(refuses):
    """Ours would give both sides the encoder's."""
    with refuses("share_encoder_decoder_embeddings=false: a vocabulary for each side: not here"):
        architectures.check(MarianConfig(share_encoder_decoder_embeddings=False), "auto")
