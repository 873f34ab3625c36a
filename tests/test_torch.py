# SPDX-License-Identifier: Apache-2.0
"""PyTorch and Flax agree on saved weights. Run by `make test-torch`, which installs PyTorch."""

import numpy as np
import pytest
from transformers import FlaxAutoModelForMaskedLM

import run_mlm_flax as script
from tests.conftest import TINY

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("model_type", ["roberta", "bert", "albert", "distilbert", "roformer", "xlm-roberta"])
def test_logits_agree(model_type, byte_level_tokenizer, corpus, tmp_path):
    """A short run's model.safetensors in PyTorch: nothing missing, nothing unexpected, the same scores to 1e-4."""
    import torch
    from transformers import AutoModelForMaskedLM

    byte_level_tokenizer.save_pretrained(tmp_path / "tokenizer")
    sizes = TINY | {"vocab_size": 512, "max_position_embeddings": 66, "embedding_size": 32}
    sizes |= {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    known = script.CONFIG_MAPPING[model_type]().to_dict()
    overrides = ",".join(f"{name}={value}" for name, value in sizes.items() if name in known)
    script.main(
        ["--model_type", model_type, "--config_overrides", overrides, "--tokenizer_name", str(tmp_path / "tokenizer"),
         "--train_file", str(corpus), "--max_steps", "20", "--learning_rate", "1e-2", "--max_seq_length", "32", "--do_train",
         "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    (tmp_path / "flax").mkdir()
    for name in ("config.json", "flax_model.msgpack"):
        (tmp_path / "out" / name).rename(tmp_path / "flax" / name)
    (tmp_path / "out" / "config.json").write_bytes((tmp_path / "flax" / "config.json").read_bytes())
    flax_model = FlaxAutoModelForMaskedLM.from_pretrained(tmp_path / "flax")
    torch_model, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    computed = {"roformer.encoder.embed_positions.weight"}  # sinusoids: no weights in Flax, filled in by PyTorch
    assert not set(info["missing_keys"]) - computed
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch_model.dtype == torch.float32

    ids = np.random.default_rng(0).integers(5, 509, (3, 24))
    mask = np.ones_like(ids)
    ids[2, 17:], mask[2, 17:] = byte_level_tokenizer.pad_token_id, 0
    flax_logits = np.asarray(flax_model(ids, mask)[0])
    with torch.no_grad():
        torch_logits = torch_model.eval()(torch.tensor(ids), torch.tensor(mask)).logits.numpy()
    difference = np.abs(flax_logits - torch_logits)[mask == 1].max()
    assert difference < 1e-4
    assert np.abs(flax_logits).max() > 0.5  # the weights did come along
