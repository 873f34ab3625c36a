# SPDX-License-Identifier: Apache-2.0
"""Configurations of which no model can be made, or another than in PyTorch: one line before any text is looked at."""

import copy
import json
import re
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from transformers import CONFIG_MAPPING, FlaxPreTrainedModel, PretrainedConfig

import run_bart_dlm_flax
import run_clm_flax
import run_mlm_flax
import run_pretraining_flax
import run_t5_mlm_flax
from flaxlm import arguments, cli, configurations, patches, weights
from tests.test_torch import NOT_IN_FLAX, SIZES, assert_same_scores, load_in_pytorch, make_inputs

MODULES = MLM, CLM, T5, BART, NSP = run_mlm_flax, run_clm_flax, run_t5_mlm_flax, run_bart_dlm_flax, run_pretraining_flax
LENGTH = 80  # tokens in the rows of make_inputs


def make(module: ModuleType, row_length: int = 32, **model_args) -> PretrainedConfig:
    """What main() does with a configuration before it looks at the text."""
    training_args = arguments.TrainingArguments(output_dir="out")
    args = arguments.Arguments(arguments.ModelArguments(**model_args), module.DataTrainingArguments(), training_args)
    config = configurations.load_config(args.model, module.MODELS)
    args.data.adapt_config(config, row_length)
    weights.check(config, args, module.MODELS)
    return config


# ---- Overrides that make no model ----------------------------------------------------------------------------------------

WHOLE, RATE = r": must be a whole number, at least 1$", r": must be a number from 0 to below 1$"
NO_MODEL = [  # script, model type, overrides, and which of them is named, with what reason
    (MLM, "bert", "hidden_size=0", "hidden_size=0" + WHOLE),
    (MLM, "bert", "hidden_size=-32", "hidden_size=-32" + WHOLE),
    (MLM, "bert", "num_hidden_layers=0", "num_hidden_layers=0" + WHOLE),
    (MLM, "bert", "num_hidden_layers=-1", "num_hidden_layers=-1" + WHOLE),
    (MLM, "bert", "intermediate_size=0", "intermediate_size=0" + WHOLE),
    (MLM, "bert", "num_attention_heads=0", "num_attention_heads=0" + WHOLE),
    (MLM, "bert", "vocab_size=0", "vocab_size=0" + WHOLE),
    (MLM, "bert", "type_vocab_size=0", "type_vocab_size=0" + WHOLE),
    (MLM, "bert", "hidden_size=32,num_attention_heads=3", "num_attention_heads=3: does not divide the hidden size, 32"),
    (MLM, "bert", "hidden_act=foo", "hidden_act=foo: must be one of gelu, "),
    (MLM, "bert", "hidden_dropout_prob=1.5", "hidden_dropout_prob=1.5" + RATE),
    (MLM, "bert", "attention_probs_dropout_prob=-1", "attention_probs_dropout_prob=-1.0" + RATE),
    (MLM, "bert", "hidden_dropout_prob=1", "hidden_dropout_prob=1.0" + RATE),
    (MLM, "bert", "layer_norm_eps=nan", "layer_norm_eps=NaN: must be a number, at least 0"),
    (MLM, "bert", "initializer_range=-1", "initializer_range=-1.0: must be a number, at least 0"),
    (MLM, "bert", "is_encoder_decoder=true", "is_encoder_decoder=true: must be false"),
    (MLM, "roberta", "max_position_embeddings=2", "max_position_embeddings=2: must be at least 3"),
    (MLM, "distilbert", "dropout=1.5", "dropout=1.5" + RATE),
    (MLM, "distilbert", "activation=mish", "activation=mish: must be one of gelu, "),
    (MLM, "albert", "hidden_size=48,num_attention_heads=5", "num_attention_heads=5: does not divide the hidden size, 48"),
    (MLM, "albert", "inner_group_num=0", "inner_group_num=0" + WHOLE),
    (MLM, "roformer", "hidden_size=36,num_attention_heads=4", "num_attention_heads=4: makes heads of 9, an odd number"),
    (MLM, "big_bird", "attention_type=dense", "attention_type=dense: must be one of block_sparse, original_full"),
    (MLM, "big_bird", "block_size=0", "block_size=0" + WHOLE),
    (CLM, "gpt2", "n_embd=33,n_head=2", "n_head=2: does not divide the hidden size, 33"),
    (CLM, "gpt2", "hidden_size=33,num_attention_heads=2", "num_attention_heads=2: does not divide the hidden size, 33"),
    (CLM, "gpt2", "n_positions=0", "n_positions=0" + WHOLE),
    (CLM, "gpt2", "n_inner=wide", "n_inner=wide" + WHOLE),
    (CLM, "gpt2", "resid_pdrop=2", "resid_pdrop=2.0" + RATE),
    (CLM, "gptj", "rotary_dim=7", "rotary_dim=7: must be even"),
    (CLM, "gptj", "n_embd=32,n_head=4,rotary_dim=16", "rotary_dim=16: must be even, and at most a head's size, 8"),
    (CLM, "llama", "hidden_size=32,num_attention_heads=4,num_key_value_heads=3", "num_key_value_heads=3: does not divide"),
    (CLM, "llama", "num_key_value_heads=0", "num_key_value_heads=0" + WHOLE),
    (CLM, "llama", "hidden_size=36,num_attention_heads=4", "num_attention_heads=4: makes heads of 9, an odd number"),
    (CLM, "gemma", "head_dim=7", "head_dim=7: makes heads of 7, an odd number"),
    (CLM, "bloom", "hidden_size=32,n_head=3", "n_head=3: does not divide the hidden size, 32"),
    (CLM, "gpt_neo", "window_size=0", "window_size=0" + WHOLE),
    (T5, "t5", "d_kv=0", "d_kv=0" + WHOLE),
    (T5, "t5", "num_decoder_layers=0", "num_decoder_layers=0" + WHOLE),
    (T5, "t5", "feed_forward_proj=gated-foo", "feed_forward_proj=gated-foo: write NAME or gated-NAME"),
    (T5, "t5", "dropout_rate=1", "dropout_rate=1.0" + RATE),
    (T5, "t5", "relative_attention_num_buckets=2", "relative_attention_num_buckets=2: must be a whole number, at"),
    (T5, "t5", "relative_attention_max_distance=16", "relative_attention_max_distance=16: must be at least 17"),
    (T5, "longt5", "encoder_attention_type=global", "encoder_attention_type=global: must be one of local, trans"),
    (T5, "longt5", "local_radius=0", "local_radius=0" + WHOLE),
    (BART, "bart", "d_model=100,encoder_attention_heads=3", "encoder_attention_heads=3: does not divide the hidden"),
    (BART, "bart", "decoder_layers=-1", "decoder_layers=-1" + WHOLE),
    (BART, "bart", "dropout=1.5", "dropout=1.5" + RATE),
    (BART, "bart", "num_hidden_layers=2", "num_hidden_layers: has no effect here; set encoder_layers"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "model_type", "overrides", "expected"), NO_MODEL, ids=[" ".join(row[1:3]) for row in NO_MODEL]
)
def test_overrides_that_make_no_model(module, model_type, overrides, expected, refuses):
    with refuses(f"^--config_overrides {expected}"):
        make(module, model_type=model_type, config_overrides=overrides)


@pytest.mark.parametrize("spoil", ["hidden_act=foo", "hidden_size=0", "hidden_dropout_prob=1.5", "num_attention_heads=3"])
def test_such_overrides_end_a_run_before_it_begins(spoil, roberta_dir, corpus, error_of, monkeypatch, tmp_path):
    """Nothing is tokenised, nothing written."""
    monkeypatch.setattr(MLM.corpus, "prepare", lambda *args: pytest.fail("the text was looked at"))
    flags = ["--config_name", roberta_dir, "--tokenizer_name", roberta_dir, "--train_file", corpus, "--max_steps", 1]
    flags += ["--output_dir", tmp_path / "out", "--config_overrides", spoil]
    assert f"error: --config_overrides {spoil}: " in error_of(MLM.main, [str(flag) for flag in flags])
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


# ---- What the Flax classes leave out -------------------------------------------------------------------------------------

LEFT_OUT = [  # script, model type, fields of a config.json, and the words on what the class does
    (CLM, "llama", {"tie_word_embeddings": True}, "has a vocabulary head with weights of its own"),
    (CLM, "llama", {"rope_theta": 500000.0}, "turns positions by powers of 10000"),
    (CLM, "llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "does not scale positions"),
    (CLM, "llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "does not scale positions"),
    (CLM, "llama", {"mlp_bias": True}, "has no biases in its feed-forward layers"),
    (CLM, "llama", {"head_dim": 64}, "divides hidden_size among the heads"),
    (CLM, "mistral", {"tie_word_embeddings": True}, "has a vocabulary head with weights of its own"),
    (CLM, "mistral", {"rope_theta": 1000000.0}, "turns positions by powers of 10000"),
    (CLM, "mistral", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "does not scale positions"),
    (CLM, "mistral", {"head_dim": 64}, "divides hidden_size among the heads"),
    (CLM, "gemma", {"rope_theta": 1000.0}, "turns positions by powers of 10000"),
    (CLM, "gemma", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "does not scale positions"),
    (CLM, "gptj", {"tie_word_embeddings": True}, "has a vocabulary head with weights of its own"),
    (CLM, "gpt2", {"scale_attn_weights": False}, "scales scores by the size of a head"),
    (CLM, "gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scales scores alike in all layers"),
    (CLM, "opt", {"enable_bias": False}, "has biases"),
    (CLM, "opt", {"layer_norm_elementwise_affine": False}, "has norms with weights"),
    (CLM, "opt", {"layerdrop": 0.1}, "cannot leave out layers"),
    (CLM, "xglm", {"layerdrop": 0.1}, "cannot leave out layers"),
    (CLM, "bert", {"position_embedding_type": "relative_key"}, "adds absolute positions"),
    (MLM, "bert", {"position_embedding_type": "relative_key_query"}, "adds absolute positions"),
    (MLM, "bert", {"pruned_heads": {"0": [1]}}, "has all heads"),
    (MLM, "bert", {"quantization_config": {"quant_method": "gptq"}}, "has no quantised weights"),
    (MLM, "bert", {"add_cross_attention": True}, "asks for what an encoder says"),
    (MLM, "roberta", {"position_embedding_type": "relative_key"}, "adds absolute positions"),
    (MLM, "xlm-roberta", {"position_embedding_type": "relative_key"}, "adds absolute positions"),
    (MLM, "roberta-prelayernorm", {"position_embedding_type": "relative_key"}, "adds absolute positions"),
    (MLM, "electra", {"position_embedding_type": "relative_key"}, "adds absolute positions"),
    (MLM, "electra", {"hidden_act": "relu"}, "has it in the vocabulary head too"),
    (MLM, "albert", {"position_embedding_type": "relative_key"}, "adds absolute positions"),
    (MLM, "big_bird", {"use_bias": False}, "has biases"),
    (MLM, "roformer", {"is_decoder": True}, "sees both sides of a token"),
    (MLM, "bart", {"tie_word_embeddings": False}, "has one table for both sides"),
    (BART, "bart", {"tie_word_embeddings": False}, "has one table for both sides"),
    (BART, "mbart", {"tie_word_embeddings": False}, "has one table for both sides"),
    (BART, "bart", {"encoder_layerdrop": 0.1}, "cannot leave out layers"),
    (BART, "marian", {"decoder_layerdrop": 0.1}, "cannot leave out layers"),
    (BART, "pegasus", {"tie_encoder_decoder": True}, "has weights for each side"),
    (T5, "t5", {"tie_encoder_decoder": True}, "has weights for each side"),
    (NSP, "bert", {"position_embedding_type": "relative_key"}, "adds absolute positions"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "model_type", "fields", "does"), LEFT_OUT, ids=[f"{row[1]} {next(iter(row[2]))}" for row in LEFT_OUT]
)
def test_fields_that_a_class_leaves_out(module, model_type, fields, does, refuses, tmp_path):
    """The line names the field and its value, and says what the class does; also where weights are loaded."""
    ((field, value),) = fields.items()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} | fields))
    if field == "rope_scaling" and "type" in value:
        value = value | {"rope_type": value["type"]}  # which the class adds
    shown = json.dumps({int(k): v for k, v in value.items()} if field == "pruned_heads" else value).replace("[", r"\[")
    with refuses(rf"^{field}={shown}: transformers' Flax class of {model_type} {does}"):
        make(module, config_name=str(tmp_path))
    (tmp_path / "flax_model.msgpack").write_bytes(b"not read")
    with refuses(f"^{field}="):
        make(module, model_name_or_path=str(tmp_path))


TINY_LLAMA = "hidden_size=32,num_attention_heads=4,num_hidden_layers=1,intermediate_size=48,vocab_size=512"


@pytest.mark.parametrize("field", ["tie_word_embeddings=true", "rope_theta=500000.0", "mlp_bias=true", "head_dim=16"])
def test_such_fields_end_a_run_before_it_begins(field, gpt2_dir, corpus, error_of, monkeypatch, tmp_path):
    monkeypatch.setattr(CLM.corpus, "prepare", lambda *args: pytest.fail("the text was looked at"))
    flags = ["--model_type", "llama", "--tokenizer_name", gpt2_dir, "--train_file", corpus, "--output_dir", tmp_path / "out"]
    line = error_of(CLM.main, [str(flag) for flag in [*flags, "--config_overrides", f"{TINY_LLAMA},{field}"]])
    assert f"error: {field}: transformers' Flax class of llama " in line


FOLLOWED = [  # values that are what the class computes
    (CLM, "llama", {"rope_theta": 10000}),
    (CLM, "llama", {"rope_scaling": {"rope_type": "default"}}),
    (CLM, "llama", {"attention_bias": True, "head_dim": 128}),
    (CLM, "mistral", {"head_dim": 128, "sliding_window": None}),
    (CLM, "gemma", {"head_dim": 64, "attention_bias": True, "tie_word_embeddings": False}),
    (CLM, "gemma", {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}),  # as google/gemma-2b has it
    (CLM, "gemma", {"hidden_act": "silu"}),
    (CLM, "bart", {"tie_word_embeddings": False}),
    (CLM, "bert", {"add_cross_attention": True}),
    (MLM, "bert", {"position_embedding_type": "absolute", "tie_word_embeddings": False, "chunk_size_feed_forward": 8}),
    (MLM, "electra", {"hidden_act": "gelu", "embedding_size": 32}),
    (BART, "bart", {"scale_embedding": True, "activation_dropout": 0.1}),
    (BART, "blenderbot", {"tie_word_embeddings": False}),
    (T5, "t5", {"tie_word_embeddings": False, "feed_forward_proj": "gated-silu"}),
]  # fmt: skip


@pytest.mark.parametrize(("module", "model_type", "fields"), FOLLOWED)
def test_fields_that_a_class_follows(module, model_type, fields, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} | fields))
    make(module, config_name=str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "gelu_pytorch_tanh"),
        ({"hidden_act": "silu"}, "silu"),
        ({"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
    ],
)
def test_gemma_computes_what_pytorch_will(fields, expected, tmp_path):
    """It has two fields for its activation: transformers' Flax class reads one, PyTorch's the other."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma"} | fields))
    config = make(CLM, config_name=str(tmp_path))
    assert (config.hidden_act, config.hidden_activation) == (expected, expected)


# ---- Short tables of positions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma"])
def test_fewer_positions_than_twice_the_head_size(model_type):
    """Scores are those of the same weights with a longer table (J5)."""
    ids = np.random.default_rng(0).integers(5, 131, (2, 12))
    sizes = SIZES | {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}
    short, long = (
        CLM.MODELS.auto_class.from_config(CONFIG_MAPPING[model_type](**sizes | {"max_position_embeddings": size}), seed=1)
        for size in (12, 96)
    )
    np.testing.assert_allclose(short(ids)[0], long(ids, params=short.params)[0], atol=1e-5)


def test_training_with_a_short_table(gpt2_dir, corpus, tmp_path):
    overrides = TINY_LLAMA.replace("num_attention_heads=4", "num_attention_heads=1") + ",max_position_embeddings=16"
    results = CLM.main(
        ["--model_type", "llama", "--config_overrides", overrides, "--tokenizer_name", str(gpt2_dir), "--block_size", "16",
         "--train_file", str(corpus), "--max_steps", "2", "--output_dir", str(tmp_path), "--max_eval_samples", "8"]
    )  # fmt: skip
    assert 5 < results["eval_loss"] < 7


def test_a_short_table_has_the_numbers_of_a_long_one():
    for modeling in (patches.modeling_flax_llama, patches.modeling_flax_mistral, patches.modeling_flax_gemma):
        short, long = (modeling.create_sinusoidal_positions(size, 16) for size in (5, 64))
        assert short.shape == (5, 1, 32)
        np.testing.assert_array_equal(short, long[:5])
        np.testing.assert_allclose(
            long[:, 0, :8], np.sin(np.arange(64)[:, None] * 10000 ** (-np.arange(0, 16, 2) / 16)), atol=1e-5
        )


# ---- In PyTorch ----------------------------------------------------------------------------------------------------------

SMALL = "hidden_size=32,num_attention_heads=4,vocab_size=131,max_position_embeddings=96,"
OVERRIDES = {
    "llama": (CLM, SMALL + "num_hidden_layers=2,intermediate_size=48"),
    "llama, grouped": (CLM, SMALL + "num_hidden_layers=2,intermediate_size=48,num_key_value_heads=2"),
    "llama, 80 positions and heads of 64": (
        CLM,
        "hidden_size=128,num_attention_heads=2,vocab_size=131,max_position_embeddings=80,num_hidden_layers=2,intermediate_size=48",
    ),
    "mistral": (CLM, SMALL + "num_hidden_layers=2,intermediate_size=48"),
    "gemma": (CLM, SMALL + "num_hidden_layers=2,intermediate_size=48"),
    "gptj": (CLM, "n_embd=32,n_head=4,n_layer=2,vocab_size=131,n_positions=96"),
    "gpt_neo": (
        CLM,
        "hidden_size=32,num_heads=4,num_layers=3,window_size=20,vocab_size=131,max_position_embeddings=96",
    ),
    "opt": (CLM, SMALL + "num_hidden_layers=2,ffn_dim=48"),
}


def save_random_model(module: ModuleType, config: PretrainedConfig, directory: Path) -> FlaxPreTrainedModel:
    """Write PyTorch's weights as a run does; returns the Flax model, whose weights are all random, norms too."""
    model, rng = module.MODELS.auto_class.from_config(config, seed=1), np.random.default_rng(1)
    model.params = jax.tree.map(lambda a: a + 0.05 * rng.standard_normal(a.shape, np.float32), model.params)
    directory.mkdir(exist_ok=True)
    config.save_pretrained(directory)
    weights.save_file(weights.pytorch_state_dict(model.params), directory / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.torch
@pytest.mark.parametrize(("name", "module", "overrides"), [(name, *row) for name, row in OVERRIDES.items()], ids=OVERRIDES)
def test_an_overridden_model_is_the_same_in_pytorch(name, module, overrides, tmp_path):
    """Nothing missing, nothing of another shape, and the same scores (J2, J5)."""
    config = make(module, LENGTH, model_type=name.partition(",")[0], config_overrides=overrides)
    inputs = make_inputs()
    scores = save_random_model(module, config, tmp_path)(**inputs)[0]
    assert_same_scores(load_in_pytorch(tmp_path, "AutoModelForCausalLM"), scores, inputs["attention_mask"], **inputs)


AUTO_CLASSES = {MLM: "AutoModelForMaskedLM", CLM: "AutoModelForCausalLM"}
AUTO_CLASSES |= dict.fromkeys((T5, BART), "AutoModelForSeq2SeqLM")
AUTO_CLASSES[NSP] = "AutoModelForPreTraining"
NOT_COMPARED = (
    "drop|prob|_token_id|classif|summary_|^init|label|^qa_|vocab_size|model_type|use_cache|attention_layers|attention_types"
)
GENERAL = ("tie_word_embeddings", "tie_encoder_decoder", "is_decoder", "add_cross_attention", "is_encoder_decoder")


def other_value(name: str, value):
    """Another value that the field may have; None if there is none that tells."""
    if name == "position_embedding_type":
        return "relative_key"
    if name in configurations.CHOICES and isinstance(value, str):
        return "silu" if name in configurations.ACTIVATION_FIELDS else None  # the others are what rows ask for
    if name == "hidden_activation":
        return "silu"
    if name == "rope_scaling":
        return {"rope_type": "linear", "factor": 4.0}
    if isinstance(value, bool):
        return not value
    return value * 3 if isinstance(value, float) else None


PAIRS = [(module, config_class) for module in MODULES for config_class in dict.fromkeys(module.MODELS.by_config)]


@pytest.mark.torch
@pytest.mark.parametrize(("module", "config_class"), PAIRS, ids=[f"{a.__name__} {b.model_type}" for a, b in PAIRS])
def test_no_field_is_left_out_without_a_word(module, config_class, tmp_path):
    """Each field of a type, with another value: it is refused, or Flax and PyTorch give the same scores with it."""
    base, num_refused, num_same = config_class(**SIZES | {"block_size": 4, "num_random_blocks": 1}), 0, 0
    general = PretrainedConfig().to_dict().keys() - set(GENERAL)
    fields = {name: getattr(base, name) for name in {**config_class().to_dict(), **dict.fromkeys(GENERAL)}}
    for name, value in fields.items():
        other = other_value(name, value)
        if other is None or name in general or re.search(NOT_COMPARED, name):
            continue
        try:
            config = check_one(module, config_class(**base.to_dict() | {name: other}))
        except cli.Mistake:
            num_refused += 1
            continue
        compare_in_pytorch(module, config, tmp_path / name)
        num_same += 1
    assert num_refused + num_same >= 3


def check_one(module: ModuleType, config: PretrainedConfig) -> PretrainedConfig:
    configurations.check_values(config.to_dict(), type(config), configurations.Origin("it"))
    configurations.check_sizes(config, configurations.Origin("it"))
    data_args = module.DataTrainingArguments()
    data_args.pad_to_max_length = True
    data_args.adapt_config(config, LENGTH)
    patches.check_fields(config, module.MODELS.by_config[type(config)])
    return config


def compare_in_pytorch(module: ModuleType, config: PretrainedConfig, directory: Path) -> None:
    import torch
    import transformers

    config = copy.deepcopy(config)
    config.use_cache = False  # where a decoder is deeper than its encoder, PyTorch's is too short
    flax_model, inputs = save_random_model(module, config, directory), make_inputs()
    if config.model_type == "electra":
        inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
    if module in (T5, BART):
        inputs["decoder_input_ids"] = np.random.default_rng(1).integers(5, 131, inputs["input_ids"].shape)
    compute = jax.jit(
        lambda params: flax_model(**inputs, params=params)[0], compiler_options={"xla_backend_optimization_level": 0}
    )
    scores = np.asarray(compute(flax_model.params))
    auto_class = getattr(transformers, AUTO_CLASSES[module])
    model, info = auto_class.from_pretrained(directory, output_loading_info=True, attn_implementation="eager")
    sinusoids = NOT_IN_FLAX | {"distilbert.embeddings.position_embeddings.weight"}
    assert not set(info["missing_keys"]) - sinusoids and not info["unexpected_keys"] and not info["mismatched_keys"], (
        directory.name
    )
    with torch.no_grad():
        outputs = model.eval()(**{name: torch.tensor(array) for name, array in inputs.items()})
    found = (outputs.logits if hasattr(outputs, "logits") else outputs.prediction_logits).numpy()
    is_compared = np.ones_like(inputs["attention_mask"]) if "decoder_input_ids" in inputs else inputs["attention_mask"]
    assert np.abs(scores - found)[is_compared == 1].max() < 2e-4 * max(1, np.abs(found).max()), directory.name
