# SPDX-License-Identifier: Apache-2.0
"""Configuration and tokenizer."""

import json

import pytest
from transformers import (
    AutoConfig,
    GPT2Config,
    GPT2TokenizerFast,
)

import run_clm_flax
import run_mlm_flax as script
from flaxlm import pretrained


def test_max_positions():
    """RoBERTa's positions start behind its padding id; other types use the whole table (defects 16, 66, 71, 72)."""
    assert pretrained.max_positions(AutoConfig.for_model("roberta", max_position_embeddings=514)) == 512
    assert pretrained.max_positions(AutoConfig.for_model("bert")) == 512
    assert pretrained.max_positions(AutoConfig.for_model("gpt2", n_positions=48)) == 48
    assert pretrained.max_positions(AutoConfig.for_model("bloom")) is None


def test_parse_as():
    assert pretrained.parse_as(int, "12") == 12
    assert pretrained.parse_as(float, "3") == 3.0
    assert pretrained.parse_as(bool, "False") is False
    assert pretrained.parse_as(str, "gelu") == "gelu"
    assert [pretrained.parse_as(type(None), value) for value in ("7", "0.5", "true", "word")] == [7, 0.5, True, "word"]
    for kind, value in ((int, "1.5"), (float, "x"), (bool, "2"), (list, "1")):
        with pytest.raises(ValueError, match=r"takes|is a"):
            pretrained.parse_as(kind, value)


def test_block_size_is_cut(gpt2_dir, monkeypatch):
    """As in the original, with a warning; and what is taken where the flag is not given."""
    warnings = []
    monkeypatch.setattr(pretrained.logger, "warning", lambda message, *args: warnings.append(message % args))
    tokenizer = GPT2TokenizerFast.from_pretrained(gpt2_dir, model_max_length=1000)
    data_args = run_clm_flax.DataTrainingArguments(block_size=80)
    assert pretrained.choose_row_length(data_args, GPT2Config(n_positions=48), tokenizer) == 48
    assert warnings == ["--block_size 80 is cut to what tokenizer and model can take, 48."]
    data_args = run_clm_flax.DataTrainingArguments()
    assert pretrained.choose_row_length(data_args, GPT2Config(n_positions=48), tokenizer) == 48
    tokenizer.model_max_length = 2000
    assert pretrained.choose_row_length(data_args, GPT2Config(n_positions=4096), tokenizer) == 1024


def test_model_type_alone_and_config_overrides(byte_level_tokenizer, corpus, tmp_path):
    """A fresh configuration takes the tokenizer's special ids; heads that no longer fit are adapted."""
    byte_level_tokenizer.save_pretrained(tmp_path / "tokenizer")
    overrides = "hidden_size=128,num_hidden_layers=1,intermediate_size=64,vocab_size=512,hidden_act=relu,layer_norm_eps=1e-6"
    script.main(
        ["--model_type", "bert", "--tokenizer_name", str(tmp_path / "tokenizer"), "--train_file", str(corpus), "--max_steps",
         "1", "--output_dir", str(tmp_path / "out"), "--max_seq_length", "32", "--config_overrides", overrides]
    )  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_attention_heads"] == 2
    assert config["hidden_act"] == "relu"
    assert config["layer_norm_eps"] == 1e-6
    assert config["pad_token_id"] == byte_level_tokenizer.pad_token_id == 1
    assert config["architectures"] == ["BertForMaskedLM"]
