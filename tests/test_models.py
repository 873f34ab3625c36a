# SPDX-License-Identifier: Apache-2.0
"""Configurations of which no model can be made, or another than in PyTorch: one line before any text is looked at."""

import copy
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from transformers import PretrainedConfig

import run_bart_dlm_flax
import run_clm_flax
import run_mlm_flax
import run_pretraining_flax
import run_t5_mlm_flax
from flaxlm import arguments, cli, configurations, layouts, models, weights
from tests import oracle
from tests.test_fields import CASES, KINDS
from tests.test_torch import LENGTH, load_in_pytorch, small_config

MLM, CLM, T5, BART, NSP = run_mlm_flax, run_clm_flax, run_t5_mlm_flax, run_bart_dlm_flax, run_pretraining_flax


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
    (T5, "umt5", "num_heads=0", "num_heads=0" + WHOLE),
    (BART, "bart", "d_model=100,encoder_attention_heads=3", "encoder_attention_heads=3: does not divide the hidden"),
    (BART, "bart", "decoder_layers=-1", "decoder_layers=-1" + WHOLE),
    (BART, "bart", "dropout=1.5", "dropout=1.5" + RATE),
    (BART, "bart", "num_hidden_layers=2", "num_hidden_layers: would leave the decoder as it is; set encoder"),
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


# ---- Fields that nothing here computes -----------------------------------------------------------------------------------

LEFT_OUT = [  # script, model type, fields of a config.json, the field that is named, with its value, and the words on it
    (CLM, "llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope_parameters.rope_type="dynamic": positions'),
    (CLM, "llama", {"partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor=0.5: heads that are turned in part"),
    (
        CLM, "mistral", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        'rope_parameters.rope_type="yarn": positions stretched in that way',
    ),
    (CLM, "mistral", {"mlp_bias": True}, "mlp_bias=true: biases, which only Llama has there"),
    (CLM, "qwen2", {"attention_bias": True}, "attention_bias=true: biases, of which this type has its own"),
    (CLM, "gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=true: sight of what comes after"),
    (MLM, "modernbert", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 'rope_parameters.rope_type="yarn": positions'),
    (CLM, "bert", {"position_embedding_type": "relative_key"}, 'position_embedding_type="relative_key": positions relative'),
    (MLM, "bert", {"position_embedding_type": "relative_key_query"}, 'position_embedding_type="relative_key_query": posit'),
    (MLM, "bert", {"pruned_heads": {"0": [1]}}, 'pruned_heads={"0": [1]}: layers of fewer heads'),
    (MLM, "bert", {"quantization_config": {"quant_method": "gptq"}}, 'quantization_config={"quant_method": "gptq"}: quantised'),
    (MLM, "bert", {"add_cross_attention": True}, "add_cross_attention=true: attention to what an encoder says"),
    (CLM, "gpt2", {"add_cross_attention": True}, "add_cross_attention=true: attention to what an encoder says"),
    (MLM, "roberta", {"position_embedding_type": "relative_key"}, 'position_embedding_type="relative_key": positions relative'),
    (MLM, "xlm-roberta", {"position_embedding_type": "relative_key"}, 'position_embedding_type="relative_key": positions rela'),
    (MLM, "camembert", {"position_embedding_type": "relative_key"}, 'position_embedding_type="relative_key": positions relat'),
    (MLM, "roberta-prelayernorm", {"position_embedding_type": "relative_key"}, 'position_embedding_type="relative_key": po'),
    (MLM, "electra", {"position_embedding_type": "relative_key"}, 'position_embedding_type="relative_key": positions relative'),
    (MLM, "albert", {"position_embedding_type": "relative_key"}, 'position_embedding_type="relative_key": positions relative'),
    (NSP, "bert", {"position_embedding_type": "relative_key"}, 'position_embedding_type="relative_key": positions relative'),
    (BART, "pegasus", {"tie_encoder_decoder": True}, "tie_encoder_decoder=true: one set of weights for encoder and decoder"),
    (T5, "t5", {"tie_encoder_decoder": True}, "tie_encoder_decoder=true: one set of weights for encoder and decoder"),
    (BART, "marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings=false: a vocabulary for"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "model_type", "fields", "expected"), LEFT_OUT, ids=[f"{row[1]} {next(iter(row[2]))}" for row in LEFT_OUT]
)
def test_fields_that_nothing_computes(module, model_type, fields, expected, refuses, tmp_path):
    """The line names the field and its value, and says what would be left out; also where weights are loaded."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} | fields))
    line = f"^{re.escape(expected)}.*: not here; ({model_type} takes only|take the field out)"
    with refuses(line):
        make(module, config_name=str(tmp_path))
    (tmp_path / "flax_model.msgpack").write_bytes(b"not read")
    with refuses(line):
        make(module, model_name_or_path=str(tmp_path))


def test_a_window_without_a_width(refuses, tmp_path):
    fields = {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 1, "sliding_window": None}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with refuses("config.json: sliding_window=null: must be the number of tokens seen"):
        make(CLM, config_name=str(tmp_path))


TINY_LLAMA = "hidden_size=32,num_attention_heads=4,num_hidden_layers=1,intermediate_size=48,vocab_size=512"


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (
            'rope_scaling={"rope_type": "yarn", "factor": 2.0}',
            'rope_parameters.rope_type="yarn": positions stretched in that way',
        ),
        ('rope_parameters={"rope_type": "dynamic", "factor": 2.0}', 'rope_parameters.rope_type="dynamic": positions stretched'),
    ],
)
def test_such_fields_end_a_run_before_it_begins(field, expected, gpt2_dir, corpus, error_of, monkeypatch, tmp_path):
    monkeypatch.setattr(CLM.corpus, "prepare", lambda *args: pytest.fail("the text was looked at"))
    flags = ["--model_type", "llama", "--tokenizer_name", gpt2_dir, "--train_file", corpus, "--output_dir", tmp_path / "out"]
    line = error_of(CLM.main, [str(flag) for flag in [*flags, "--config_overrides", f"{TINY_LLAMA},{field}"]])
    assert f"error: {expected}" in line


FOLLOWED = [  # values that a model is made of; the first ones transformers' Flax classes left out
    (CLM, "llama", {"tie_word_embeddings": True}),
    (CLM, "llama", {"rope_theta": 500000.0}),
    (CLM, "llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    (CLM, "llama", {"mlp_bias": True}),
    (CLM, "llama", {"head_dim": 64}),
    (CLM, "mistral", {"tie_word_embeddings": True}),
    (CLM, "mistral", {"rope_theta": 1000000.0}),
    (CLM, "mistral", {"head_dim": 64}),
    (CLM, "gemma", {"rope_theta": 1000.0}),
    (CLM, "gemma", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    (CLM, "gptj", {"tie_word_embeddings": True}),
    (CLM, "gpt2", {"scale_attn_weights": False}),
    (CLM, "gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    (CLM, "opt", {"enable_bias": False}),
    (CLM, "opt", {"layer_norm_elementwise_affine": False}),
    (CLM, "opt", {"layerdrop": 0.1}),
    (CLM, "xglm", {"layerdrop": 0.1}),
    (MLM, "electra", {"hidden_act": "relu"}),
    (MLM, "big_bird", {"use_bias": False}),
    (MLM, "roformer", {"is_decoder": True}),
    (MLM, "bart", {"tie_word_embeddings": False}),
    (BART, "bart", {"tie_word_embeddings": False}),
    (BART, "mbart", {"tie_word_embeddings": False}),
    (BART, "bart", {"encoder_layerdrop": 0.1}),
    (BART, "marian", {"decoder_layerdrop": 0.1}),
    (CLM, "llama", {"rope_theta": 10000}),
    (CLM, "llama", {"rope_scaling": {"rope_type": "default"}}),
    (CLM, "llama", {"attention_bias": True, "head_dim": 128}),
    (CLM, "mistral", {"head_dim": 128, "sliding_window": None}),
    (CLM, "gemma", {"head_dim": 64, "attention_bias": True, "tie_word_embeddings": False}),
    (CLM, "gemma", {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}),  # as google/gemma-2b has it
    (CLM, "gemma", {"hidden_act": "silu"}),
    (CLM, "bart", {"tie_word_embeddings": False}),
    (MLM, "bert", {"position_embedding_type": "absolute", "tie_word_embeddings": False, "chunk_size_feed_forward": 8}),
    (MLM, "electra", {"hidden_act": "gelu", "embedding_size": 32}),
    (BART, "bart", {"scale_embedding": True, "activation_dropout": 0.1}),
    (BART, "blenderbot", {"tie_word_embeddings": False}),
    (T5, "t5", {"tie_word_embeddings": False, "feed_forward_proj": "gated-silu"}),
]  # fmt: skip


@pytest.mark.parametrize(("module", "model_type", "fields"), FOLLOWED)
def test_fields_that_are_followed(module, model_type, fields, tmp_path):
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
    """Its old configurations say gelu, and mean an approximation of it."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma"} | fields))
    assert make(CLM, config_name=str(tmp_path)).hidden_act == expected


# ---- Short tables of positions -------------------------------------------------------------------------------------------


def test_training_with_a_short_table(gpt2_dir, corpus, tmp_path):
    overrides = TINY_LLAMA.replace("num_attention_heads=4", "num_attention_heads=1") + ",max_position_embeddings=16"
    results = CLM.main(
        ["--model_type", "llama", "--config_overrides", overrides, "--tokenizer_name", str(gpt2_dir), "--block_size", "16",
         "--train_file", str(corpus), "--max_steps", "2", "--output_dir", str(tmp_path), "--max_eval_samples", "8"]
    )  # fmt: skip
    assert 5 < results["eval_loss"] < 7


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


AUTO_CLASSES = {MLM: "AutoModelForMaskedLM", CLM: "AutoModelForCausalLM", NSP: "AutoModelForPreTraining"}
AUTO_CLASSES |= dict.fromkeys((T5, BART), "AutoModelForSeq2SeqLM")


def compare_in_pytorch(module: ModuleType, config: PretrainedConfig, directory: Path) -> None:
    """Weights as a run writes them: nothing missing, nothing unexpected, nothing of another shape, and the same scores."""
    import torch

    kind, config = KINDS.get(module.__name__, "seq2seq"), copy.deepcopy(config)
    config.use_cache = False  # where a decoder is deeper than its encoder, PyTorch's is too short
    model, inputs = module.MODELS[config.model_type](config), oracle.make_inputs(kind, config, LENGTH)
    params = oracle.random_weights(model, inputs, scale=0.1)
    config.save_pretrained(directory)
    weights.save_file(layouts.to_pytorch(params), directory / "model.safetensors", metadata={"format": "pt"})
    pytorch_model = load_in_pytorch(directory, AUTO_CLASSES[module], attn_implementation="eager")
    with torch.no_grad():
        expected = oracle.torch_scores(kind, pytorch_model, inputs)
    compute = jax.jit(
        lambda params: oracle.flax_scores(kind, model, params, inputs),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    counts = inputs[3 if kind == "seq2seq" else 1] == 1
    for found, scores, where in zip(compute(params), expected, (counts, slice(None)), strict=False):
        differences = np.abs(np.asarray(found) - scores.numpy())[where]
        assert differences.max() < 2e-4 * max(1, np.abs(scores.numpy()).max()), directory.name
        assert np.abs(scores.numpy()).max() > 0.05, directory.name  # the weights did come along


@pytest.mark.torch
@pytest.mark.parametrize(("name", "module", "overrides"), [(name, *row) for name, row in OVERRIDES.items()], ids=OVERRIDES)
def test_an_overridden_model_is_the_same_in_pytorch(name, module, overrides, tmp_path):
    """Fields that follow from others too (J2, J5)."""
    config = make(module, LENGTH, model_type=name.partition(",")[0], config_overrides=overrides)
    compare_in_pytorch(module, config, tmp_path)


NOT_COMPARED = "drop|prob|_token_id|^init|^id2label|^label2id|vocab_size|model_type|use_cache|attention_layers|attention_types"
OF_OLD = ("tie_encoder_decoder", "is_decoder", "add_cross_attention", "is_encoder_decoder")  # in files of all types


def other_value(name: str, value: Any) -> Any:
    """Another value that the field may have; None if there is none that tells."""
    if name == "rope_parameters":
        kinds = [kind for kind, part in value.items() if isinstance(part, dict)]
        linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
        return dict.fromkeys(kinds, linear) if kinds else linear
    if name in configurations.CHOICES and isinstance(value, str):
        return "silu" if name in configurations.ACTIVATION_FIELDS else None  # the others are what rows ask for
    if name == "classifier_activation":
        return "silu"
    if isinstance(value, bool):
        return not value
    return value * 3 if isinstance(value, float) else None


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_no_field_is_left_out_without_a_word(case, tmp_path):
    """Each field of a type, with another value: it is refused, or our model and PyTorch's give the same scores with it."""
    (module, model_type), num_refused, num_same = CASES[case], 0, 0
    base = small_config(model_type, block_size=32, num_random_blocks=1)  # BigBird has full attention in rows of 80
    general = PretrainedConfig().to_dict().keys() - {*OF_OLD, "tie_word_embeddings"}
    for name, value in (base.to_dict() | {name: getattr(base, name, False) for name in OF_OLD}).items():
        other = other_value(name, value)
        if other is None or name in general or re.search(NOT_COMPARED, name):
            continue
        try:
            config = check_one(module, type(base)(**base.to_dict() | {name: other}))
        except cli.Mistake:
            num_refused += 1
            continue
        compare_in_pytorch(module, config, tmp_path / name)
        num_same += 1
    assert num_refused + num_same >= 3


def check_one(module: ModuleType, config: PretrainedConfig) -> PretrainedConfig:
    """As main() checks it; returns it as it is trained with."""
    configurations.check_values(config.to_dict(), type(config), configurations.Origin("it"))
    configurations.check_sizes(config, configurations.Origin("it"))
    module.DataTrainingArguments().adapt_config(config, LENGTH)
    models.check(config, "auto")
    return config
