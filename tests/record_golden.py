# SPDX-License-Identifier: Apache-2.0
"""Record what transformers' Flax classes compute: writes tests/golden, which tests/golden.py describes and reads.

Needs transformers 4 (4.57.6 was used), the last with these classes, and the flaxlm of that time with its flaxlm.patches (commit
24707ac was used). It stays as the record of how the files were made. It was run as: JAX_PLATFORMS=cpu python -m
tests.record_golden
"""

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import CONFIG_MAPPING, FlaxPreTrainedModel, PretrainedConfig

import run_bart_dlm_flax
import run_clm_flax
import run_mlm_flax
import run_pretraining_flax
import run_t5_mlm_flax
from flaxlm import patches
from tests import golden

# ---- Sizes -------------------------------------------------------------------------------------------------------------


COMMON = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 24}
ENCODER = COMMON | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ROBERTA = ENCODER | {"pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1}
GPT = COMMON | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
LLAMA = ENCODER | {"num_key_value_heads": 4, "rms_norm_eps": 1e-6}
T5 = {
    "vocab_size": 40, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "d_model": 32, "d_kv": 6, "d_ff": 48,
    "num_layers": 2, "num_heads": 4,
}  # fmt: skip
SIDES = {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()
}
BART = COMMON | SIDES | {"d_model": 32, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
BART_IDS = {"pad_token_id": 1, "bos_token_id": 0}
SIZES: dict[str, dict[str, Any]] = {
    "albert": ENCODER | {"embedding_size": 16},
    "bart": BART | BART_IDS,
    "bert": ENCODER,
    "big_bird": ENCODER | {"attention_type": "original_full"},
    "blenderbot": BART | {"decoder_start_token_id": 1},
    "blenderbot-small": BART | {"decoder_start_token_id": 1},
    "bloom": COMMON | {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "distilbert": COMMON | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "electra": ENCODER | {"embedding_size": 16},
    "gemma": LLAMA | {"num_key_value_heads": 2, "head_dim": 8},
    "gpt2": GPT,
    "gpt_neo": COMMON
    | {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4, "attention_types": [[["global", "local"], 1]]},
    "gptj": GPT | {"rotary_dim": 4},
    "llama": LLAMA,
    "marian": BART | {"pad_token_id": 3, "decoder_start_token_id": 3, "eos_token_id": 0, "forced_eos_token_id": 0},
    "mbart": BART | BART_IDS,
    "mistral": LLAMA | {"num_key_value_heads": 2, "rope_theta": 10000.0, "sliding_window": None},
    "mt5": T5,
    "opt": ENCODER | {"pad_token_id": 1, "bos_token_id": 2, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "pegasus": BART | {"eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": 1},
    "roberta": ROBERTA,
    "roberta-prelayernorm": ROBERTA,
    "roformer": ENCODER,
    "t5": T5,
    "xglm": COMMON
    | {"pad_token_id": 1, "bos_token_id": 0, "decoder_start_token_id": 2, "d_model": 32, "ffn_dim": 48}
    | {"num_layers": 2, "attention_heads": 4},
    "xlm-roberta": ROBERTA,
}
SMALL = {  # of the models that are saved
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "n_embd": 16, "n_inner": 24, "d_model": 16, "d_kv": 3,
    "d_ff": 24, "dim": 16, "hidden_dim": 24, "ffn_dim": 24, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "embedding_size": 8,
    "head_dim": 4, "word_embed_proj_dim": 16, "rotary_dim": 2, "max_position_embeddings": 16, "n_positions": 16,
}  # fmt: skip
SPREAD = dict.fromkeys(("initializer_range", "init_std"), 0.2)  # so that their scores differ

# ---- Variants ----------------------------------------------------------------------------------------------------------


UNTIED, TIED, BASE = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}, {}
RELU, CROSS = {"hidden_act": "relu"}, {"add_cross_attention": True}
SKEWED = {"encoder_layers": 1, "decoder_layers": 3, "decoder_ffn_dim": 40, "decoder_attention_heads": 2}
SCALED = {"scale_embedding": True}
ACTIVATIONS = {name: {"hidden_act": name} for name in ("quick_gelu", "tanh")}
SEQ2SEQ = {"base": BASE, "untied": UNTIED, "skewed": SKEWED}
VARIANTS: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "masked": {
        "albert": {
            "base": BASE,
            "untied": UNTIED,
            "groups": {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2},
            "relu": RELU | {"layer_norm_eps": 0.01},
        },
        "bart": {"base": BASE, "untied": UNTIED},
        "bert": {
            "base": BASE,
            "untied": UNTIED,
            "relu": RELU | {"chunk_size_feed_forward": 7, "layer_norm_eps": 0.01},
        }
        | ACTIVATIONS,
        "big_bird": {
            "base": BASE,
            "untied": UNTIED,
            "rescaled": {"rescale_embeddings": True} | RELU,
            "no bias": {"use_bias": False},
        },
        "distilbert": {
            "base": BASE,
            "untied": UNTIED,
            "sinusoids": {"sinusoidal_pos_embds": True},
            "relu": {"activation": "relu"},
        },
        "electra": {"base": BASE, "untied": UNTIED, "one size": {"embedding_size": 32}, "relu": RELU},
        "mbart": {"base": BASE, "untied": UNTIED},
        "roberta": {"base": BASE, "untied": UNTIED, "two types": {"type_vocab_size": 2}, "relu": RELU | {"pad_token_id": 0}},
        "roberta-prelayernorm": {"base": BASE, "untied": UNTIED, "two types": {"type_vocab_size": 2} | RELU},
        "roformer": {"base": BASE, "untied": UNTIED, "rotary value": {"rotary_value": True}, "relu": RELU},
        "xlm-roberta": {"base": BASE, "untied": UNTIED},
    },
    "causal": {
        "bart": {"base": BASE, "untied": UNTIED, "scaled": SCALED | {"activation_function": "relu"}},
        "bert": {"base": BASE, "untied": UNTIED, "cross attention": CROSS, "relu": RELU},
        "big_bird": {"base": BASE, "untied": UNTIED, "cross attention": CROSS},
        "bloom": {
            "base": BASE,
            "untied": UNTIED,
            "post layernorm": {"apply_residual_connection_post_layernorm": True},
        },
        "electra": {"base": BASE, "untied": UNTIED, "one size": {"embedding_size": 32}, "relu": RELU},
        "gemma": {
            "base": BASE,
            "untied": UNTIED,
            "one key head": {"num_key_value_heads": 1, "head_dim": 16, "attention_bias": True},
            "silu": {"hidden_activation": "silu"},
            "rope_theta": {"rope_theta": 500.0},
        },
        "gpt2": {
            "base": BASE,
            "untied": UNTIED,
            "inner": {"n_inner": 48, "activation_function": "relu", "layer_norm_epsilon": 0.01},
            "cross attention": CROSS,
            "unscaled": {"scale_attn_weights": False},
            "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
        },
        "gpt_neo": {
            "base": BASE,
            "untied": UNTIED,
            "three layers": {"num_layers": 3, "attention_types": [[["local"], 2], [["global"], 1]], "intermediate_size": 48},
            "relu": {"activation_function": "relu"},
        },
        "gptj": {
            "base": BASE,
            "whole heads": {"rotary_dim": 8, "n_inner": 48, "activation_function": "relu"},
        },
        "llama": {
            "base": BASE,
            "grouped": {"num_key_value_heads": 2, "attention_bias": True},
            "gelu": {"hidden_act": "gelu", "rms_norm_eps": 0.01, "num_key_value_heads": 1},
            "tied": TIED,
            "rope_theta": {"rope_theta": 500.0},
        },
        "mistral": {
            "base": BASE,
            "window": {"sliding_window": 4},
            "gelu": {"hidden_act": "gelu", "num_key_value_heads": 4},
            "tied": TIED,
            "rope_theta": {"rope_theta": 500.0},
        },
        "opt": {
            "base": BASE,
            "untied": UNTIED,
            "350m": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
            "projected": {"word_embed_proj_dim": 16, "activation_function": "gelu"} | UNTIED,
            "no final norm": {"_remove_final_layer_norm": True},
        },
        "roberta": {"base": BASE, "untied": UNTIED, "cross attention": CROSS, "two types": {"type_vocab_size": 2}},
        "roberta-prelayernorm": {"base": BASE, "untied": UNTIED, "cross attention": CROSS},
        "xglm": {
            "base": BASE,
            "untied": UNTIED,
            "unscaled": {"scale_embedding": False, "activation_function": "relu"},
        },
        "xlm-roberta": {"base": BASE, "untied": UNTIED},
    },
    "seq2seq": {
        "t5": {
            "base": BASE,
            "v1.1": {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 3} | UNTIED,
            "gated silu": {"feed_forward_proj": "gated-silu", "layer_norm_epsilon": 0.01},
            "few buckets": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10} | UNTIED,
        },
        "mt5": {"base": BASE, "tied": TIED},
        "bart": SEQ2SEQ | {"scaled": SCALED, "relu": {"activation_function": "relu"}},
        "mbart": SEQ2SEQ | {"scaled": SCALED},
        "blenderbot": SEQ2SEQ | {"scaled": SCALED},
        "blenderbot-small": SEQ2SEQ | {"scaled": SCALED},
        "marian": SEQ2SEQ | {"scaled": SCALED},
        "pegasus": SEQ2SEQ | {"scaled": SCALED},
    },
    "pretraining": {
        "bert": {"base": BASE, "untied": UNTIED, "relu": RELU},
        "big_bird": {"base": BASE, "untied": UNTIED},
    },
}

# Found by comparison with PyTorch's classes of 4.57.6, on the same weights: all other cases agree to 1e-5 with those.
OWN_HEAD = "has a vocabulary head with weights of its own; PyTorch's class has that of the embeddings"
BASE_10000 = "turns positions by powers of 10000, whatever rope_theta says"
WRONG: dict[tuple[str, str], str] = {
    ("big_bird", "no bias"): "has biases of query, key and value with use_bias=False too; PyTorch's class has none",
    ("blenderbot-small", "scaled"): "scales the decoder's embeddings, PyTorch's class does not: a norm follows, so 2e-4 differ",
    ("electra", "relu"): "has hidden_act in the vocabulary head too; PyTorch's class has gelu there",
    ("gemma", "rope_theta"): BASE_10000,
    ("gpt2", "unscaled"): "divides scores by the root of a head's size with scale_attn_weights=False too",
    ("gpt2", "scaled by layer"): "does not divide scores by the layer's number, as scale_attn_by_inverse_layer_idx=True asks",
    ("llama", "rope_theta"): BASE_10000,
    ("llama", "tied"): OWN_HEAD,
    ("mistral", "rope_theta"): BASE_10000,
    ("mistral", "tied"): OWN_HEAD,
}

# ---- Recording ---------------------------------------------------------------------------------------------------------


def script(kind: str, model_type: str) -> ModuleType:
    """The script that trains such models."""
    if kind == "seq2seq":
        return run_t5_mlm_flax if model_type in ("t5", "mt5") else run_bart_dlm_flax
    return {"masked": run_mlm_flax, "causal": run_clm_flax, "pretraining": run_pretraining_flax}[kind]


def make_config(kind: str, model_type: str, fields: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration as the script makes it of these fields."""
    config = CONFIG_MAPPING[model_type](**SIZES[model_type] | fields)
    script(kind, model_type).DataTrainingArguments().adapt_config(config, golden.LENGTH)
    return config


def compute(model: FlaxPreTrainedModel, params: Any, kind: str, config: Mapping[str, Any]) -> list[np.ndarray]:
    """The model's logits, and of pairs those of next sentences."""
    inputs = golden.inputs_by_rule(kind, config)

    def call(params: Any) -> tuple[jax.Array, ...]:
        with patches.attention("eager", model):
            return model(**inputs, params=params).to_tuple()[: 2 if kind == "pretraining" else 1]

    fast = {"xla_backend_optimization_level": 0}
    return [np.asarray(array, np.float32) for array in jax.jit(call, compiler_options=fast)(params)]


def named(key: str, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of `compute` by their names in logits.npz."""
    return dict(zip((key, f"{key}/next_sentence"), arrays, strict=False))


def record(kind: str, model_type: str, variant: str) -> tuple[golden.Case, dict[str, np.ndarray]]:
    """A case and its logits."""
    config = make_config(kind, model_type, VARIANTS[kind][model_type][variant])
    fields = json.loads(json.dumps(config.to_dict()))
    models = script(kind, model_type).MODELS
    model = models.auto_class.from_config(copy.deepcopy(config), _do_init=False)
    tree = jax.eval_shape(lambda: model.init_weights(jax.random.key(0), model.input_shape))
    shapes = sorted((path, list(leaf.shape)) for path, leaf in flatten_dict(tree, sep="/").items())
    params = unflatten_dict(golden.weights_by_rule(shapes), sep="/")
    wrong = WRONG.get((model_type, variant))
    case = golden.Case(kind, model_type, variant, fields, shapes, wrong)
    return case, named(case.key, compute(model, params, kind, fields))


def record_saved(kind: str, model_type: str) -> tuple[golden.Saved, dict[str, np.ndarray]]:
    """Save a model with fresh weights; and its logits."""
    known = CONFIG_MAPPING[model_type]().to_dict().keys()
    config = make_config(kind, model_type, {name: value for name, value in (SMALL | SPREAD).items() if name in known})
    model = script(kind, model_type).MODELS.auto_class.from_config(config, seed=1)
    saved = golden.Saved(kind, model_type)
    model.save_pretrained(saved.directory)
    (saved.directory / "generation_config.json").unlink(missing_ok=True)
    return saved, named(saved.key, compute(model, model.params, kind, config.to_dict()))


def main_kinds() -> dict[str, str]:
    """The kind that a type's model is saved for, that of its first paper or of transformers' examples."""
    kinds = {model_type: kind for kind in ("causal", "masked", "seq2seq") for model_type in VARIANTS[kind]}
    return kinds | {"big_bird": "pretraining", "bert": "pretraining"}


def compact(cases: list[golden.Case], saved: list[golden.Saved]) -> dict[str, Any]:
    """What cases.json holds: fields that all types have, and trees that several cases have, are in it once."""
    common = json.loads(json.dumps(PretrainedConfig().to_dict()))
    trees = list({json.dumps(case.shapes): case.shapes for case in cases}.values())
    items = []
    for case in cases:
        fields = {name: value for name, value in case.config.items() if name not in common or common[name] != value}
        assert common | fields == case.config
        item = {"kind": case.kind, "model_type": case.model_type, "variant": case.variant, "config": fields}
        items.append(item | {"tree": trees.index(case.shapes)} | ({"wrong": case.wrong} if case.wrong else {}))
    return {"common": [common], "trees": trees, "cases": items, "saved": [model._asdict() for model in saved]}


def main() -> None:
    """Write all of tests/golden anew."""
    shutil.rmtree(golden.DIRECTORY, ignore_errors=True)
    golden.DIRECTORY.mkdir()
    cases, saved, logits = [], [], {}
    for name in [(kind, *pair) for kind, types in VARIANTS.items() for pair in pairs(types)]:
        case, arrays = record(*name)
        print(case.key, {key: round(float(array.std()), 2) for key, array in arrays.items()}, flush=True)
        cases.append(case)
        logits |= arrays
    for model_type, kind in main_kinds().items():
        model, arrays = record_saved(kind, model_type)
        print(model.key, {name: round(float(array.std()), 2) for name, array in arrays.items()}, flush=True)
        saved.append(model)
        logits |= arrays
    np.savez_compressed(golden.DIRECTORY / "logits.npz", **logits)
    write_json(compact(cases, saved))


def pairs(types: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Types and variants."""
    return ((model_type, variant) for model_type, variants in types.items() for variant in variants)


def write_json(sections: Mapping[str, list[Any]]) -> None:
    """Write cases.json, a case or tree on each line."""
    lines = {name: ",\n".join(json.dumps(item, separators=(",", ":")) for item in items) for name, items in sections.items()}
    text = ",\n".join(f'"{name}": [\n{items}\n]' for name, items in lines.items())
    (golden.DIRECTORY / "cases.json").write_text(f"{{{text}}}\n", "utf-8")


if __name__ == "__main__":
    main()
