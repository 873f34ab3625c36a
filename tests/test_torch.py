# SPDX-License-Identifier: Apache-2.0
"""PyTorch and Flax agree on saved weights. Run by `make test-torch`, which installs PyTorch."""

import shutil
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from transformers import CONFIG_MAPPING, LongT5Config, MistralConfig, MT5Config, PretrainedConfig, T5Config

import run_bart_dlm_flax
import run_clm_flax
import run_mlm_flax
import run_pretraining_flax
import run_t5_mlm_flax
from flaxlm import weights
from tests.conftest import BART_SIDE, TINY

pytestmark = pytest.mark.torch

# Where Flax has no weights: sinusoids, which PyTorch computes, and a layer that has no part in the scores.
NOT_IN_FLAX = {
    "roformer.encoder.embed_positions.weight", "model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight",
    "bert.pooler.weight", "bert.pooler.bias",
}  # fmt: skip


def load_in_pytorch(directory: Path, auto_class_name: str):
    """The PyTorch model of a directory without Flax weights: nothing missing, nothing unexpected."""
    import torch
    import transformers

    assert not (directory / "flax_model.msgpack").exists()
    model, info = getattr(transformers, auto_class_name).from_pretrained(directory, output_loading_info=True)
    assert not set(info["missing_keys"]) - NOT_IN_FLAX
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.float32
    return model.eval()


def assert_same_scores(torch_model, flax_scores, mask, **inputs) -> None:
    """To 1e-4, wherever the mask is 1."""
    import torch

    with torch.no_grad():
        torch_scores = torch_model(**{name: torch.tensor(array) for name, array in inputs.items()}).logits.numpy()
    assert np.abs(np.asarray(flax_scores) - torch_scores)[mask == 1].max() < 1e-4
    assert np.abs(flax_scores).max() > 0.5  # the weights did come along


@pytest.mark.parametrize("model_type", [config_class.model_type for config_class in run_mlm_flax.MODELS.by_config])
def test_masked_language_models(model_type, byte_level_tokenizer, corpus, tmp_path):
    """A short run's model.safetensors."""
    byte_level_tokenizer.save_pretrained(tmp_path / "tokenizer")
    sizes = TINY | {"vocab_size": 512, "max_position_embeddings": 66, "block_size": 4, "num_random_blocks": 1}
    sizes |= {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "d_model": 32, "embedding_size": 16}
    sizes |= {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in BART_SIDE.items()}
    known = CONFIG_MAPPING[model_type]().to_dict()
    overrides = ",".join(f"{name}={value}" for name, value in sizes.items() if name in known)
    run_mlm_flax.main(
        ["--model_type", model_type, "--config_overrides", overrides, "--tokenizer_name", str(tmp_path / "tokenizer"),
         "--train_file", str(corpus), "--max_steps", "20", "--learning_rate", "1e-2", "--max_seq_length", "32", "--do_train",
         "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    (tmp_path / "flax").mkdir()
    shutil.copy(tmp_path / "out" / "config.json", tmp_path / "flax")
    (tmp_path / "out" / "flax_model.msgpack").rename(tmp_path / "flax" / "flax_model.msgpack")
    flax_model = run_mlm_flax.MODELS.auto_class.from_pretrained(tmp_path / "flax")
    torch_model = load_in_pytorch(tmp_path / "out", "AutoModelForMaskedLM")

    ids = np.random.default_rng(0).integers(5, 509, (3, 32))
    mask = np.ones_like(ids)
    ids[2, 17:], mask[2, 17:] = byte_level_tokenizer.pad_token_id, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model_type == "electra":  # PyTorch's default, and what is trained with, but not Flax's default
        inputs["token_type_ids"] = np.zeros_like(ids)
    assert_same_scores(torch_model, flax_model(**inputs)[0], mask, **inputs)


def test_fine_tuning_from_a_pickle(roberta_dir, corpus, tmp_path):
    """pytorch_model.bin and nothing else: the same start as from model.safetensors."""
    import torch
    from transformers import RobertaConfig, RobertaForMaskedLM

    torch.manual_seed(1)
    model = RobertaForMaskedLM(RobertaConfig.from_pretrained(roberta_dir))
    model.lm_head.bias.data[0] = 20.0  # sure of <s> everywhere, which fresh weights are not

    def loss(kind: str) -> float:
        model.save_pretrained(tmp_path / kind, safe_serialization=kind == "safetensors")
        flags = ["--model_name_or_path", str(tmp_path / kind), "--tokenizer_name", str(roberta_dir), "--do_eval"]
        flags += ["--train_file", str(corpus), "--max_seq_length", "32", "--output_dir", str(tmp_path / f"out-{kind}")]
        return run_mlm_flax.main(flags)["eval_loss"]

    assert loss("bin") == loss("safetensors") > 15
    assert [path.name for path in (tmp_path / "bin").glob("*model*")] == ["pytorch_model.bin"]


# Rows of 80 tokens, as T5's positions and the local attention of GPT-Neo and Mistral differ from others in long rows only.
LENGTH = 80
SIZES = {
    "vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 96, "num_key_value_heads": 2, "head_dim": 8, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "n_positions": 96, "rotary_dim": 4, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 4, "ffn_dim": 48,
    "attention_heads": 4, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_layers": 2,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "embedding_size": 16, "word_embed_proj_dim": 32, "seq_length": 96,
    "attention_types": [[["global", "local"], 1]], "window_size": 20, "decoder_start_token_id": 0, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def save_random_model(module: ModuleType, config: PretrainedConfig, output_dir: Path):
    """Write PyTorch's weights as the script does; returns the Flax model, whose weights are all random, norms too."""
    model, rng = module.MODELS.auto_class.from_config(config, seed=1), np.random.default_rng(1)
    model.params = jax.tree.map(lambda a: a + 0.05 * rng.standard_normal(a.shape, np.float32), model.params)
    output_dir.mkdir(exist_ok=True)
    config.architectures = [type(model).__name__.removeprefix("Flax")]
    config.save_pretrained(output_dir)
    weights.save_file(weights.pytorch_state_dict(model.params), output_dir / "model.safetensors", metadata={"format": "pt"})
    return model


def make_inputs() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(5, 131, (3, LENGTH))
    mask = np.ones_like(ids)
    ids[2, 57:], mask[2, 57:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


CAUSAL = {config_class.__name__: (config_class, {}) for config_class in run_clm_flax.MODELS.by_config}
CAUSAL |= {f"Mistral, window of {size}": (MistralConfig, {"sliding_window": size}) for size in (None, 20)}


@pytest.mark.parametrize(("config_class", "more"), CAUSAL.values(), ids=CAUSAL)
def test_causal_models(config_class, more, tmp_path):
    config = config_class(**SIZES, **more)
    run_clm_flax.DataTrainingArguments().adapt_config(config, LENGTH)
    flax_model = save_random_model(run_clm_flax, config, tmp_path)
    inputs = make_inputs()
    if config.model_type == "electra":  # PyTorch's default, and what is trained with, but not Flax's default
        inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
    scores = flax_model(**inputs)[0]
    assert_same_scores(load_in_pytorch(tmp_path, "AutoModelForCausalLM"), scores, inputs["attention_mask"], **inputs)


UNTIED = {"tie_word_embeddings": False}
ENCODER_DECODERS = {
    "t5 v1.1": (run_t5_mlm_flax, T5Config, {"feed_forward_proj": "gated-gelu"} | UNTIED),
    "t5": (run_t5_mlm_flax, T5Config, {}),
    "mt5": (run_t5_mlm_flax, MT5Config, {}),
    "longt5": (run_t5_mlm_flax, LongT5Config, {"local_radius": 11} | UNTIED),
    "longt5, transient-global": (
        run_t5_mlm_flax,
        LongT5Config,
        {"local_radius": 11, "global_block_size": 8, "encoder_attention_type": "transient-global"},
    ),
}
for bart_config in run_bart_dlm_flax.MODELS.by_config:
    ENCODER_DECODERS[bart_config.model_type] = (run_bart_dlm_flax, bart_config, {})
    ENCODER_DECODERS[f"{bart_config.model_type} untied"] = (run_bart_dlm_flax, bart_config, UNTIED)


@pytest.mark.parametrize(("module", "config_class", "more"), ENCODER_DECODERS.values(), ids=ENCODER_DECODERS)
def test_encoder_decoders(module, config_class, more, tmp_path):
    flax_model = save_random_model(module, config_class(**SIZES | more), tmp_path)
    inputs = make_inputs()
    inputs["decoder_input_ids"] = np.random.default_rng(1).integers(5, 131, (3, LENGTH))
    scores = flax_model(**inputs)[0]
    torch_model = load_in_pytorch(tmp_path, "AutoModelForSeq2SeqLM")
    assert_same_scores(torch_model, scores, np.ones((3, LENGTH)), **inputs)


@pytest.mark.parametrize("config_class", run_pretraining_flax.MODELS.by_config)
def test_models_of_pairs(config_class, tmp_path):
    """Both heads; BigBird with sparse attention."""
    import torch

    config = config_class(**SIZES, block_size=4, num_random_blocks=1)
    run_pretraining_flax.DataTrainingArguments(pad_to_max_length=True).adapt_config(config, LENGTH)
    flax_model = save_random_model(run_pretraining_flax, config, tmp_path)
    inputs = make_inputs()
    inputs["token_type_ids"] = np.random.default_rng(1).integers(0, 2, inputs["input_ids"].shape)
    expected = flax_model(**inputs)
    torch_model = load_in_pytorch(tmp_path, "AutoModelForPreTraining")
    with torch.no_grad():
        found = torch_model(**{name: torch.tensor(array) for name, array in inputs.items()})
    differences = np.abs(found.prediction_logits.numpy() - expected.prediction_logits)
    assert differences[inputs["attention_mask"] == 1].max() < 1e-4
    assert np.abs(found.seq_relationship_logits.numpy() - expected.seq_relationship_logits).max() < 1e-4
    assert np.abs(expected.prediction_logits).max() > 0.5
    assert np.abs(expected.seq_relationship_logits).max() > 0.05  # the weights did come along
