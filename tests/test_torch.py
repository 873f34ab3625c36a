# SPDX-License-Identifier: Apache-2.0
"""From a run to PyTorch and back: files that it loads, and checkpoints of its own that are trained further.

Run by `make test-torch`, which installs PyTorch. That our models compute what PyTorch's do is in tests/test_families.py.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import CONFIG_MAPPING, AutoTokenizer, PretrainedConfig

import run_bart_dlm_flax
import run_clm_flax
import run_mlm_flax
import run_pretraining_flax
import run_t5_mlm_flax
from flaxlm import batches, weights
from tests import oracle

pytestmark = pytest.mark.torch

# Where ours has no weights: sinusoids, which PyTorch computes, and a layer that has no part in the scores.
NOT_OURS = {
    "roformer.encoder.embed_positions.weight", "model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight",
    "distilbert.embeddings.position_embeddings.weight", "bert.pooler.weight", "bert.pooler.bias",
}  # fmt: skip


def load_in_pytorch(directory: Path, auto_class_name: str, **options: Any):
    """The PyTorch model of a directory without Flax weights: nothing missing, nothing unexpected."""
    import torch
    import transformers

    assert not (directory / "flax_model.msgpack").exists()
    auto_class = getattr(transformers, auto_class_name)
    model, info = auto_class.from_pretrained(directory, output_loading_info=True, **options)
    assert not set(info["missing_keys"]) - NOT_OURS, info
    assert not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert model.dtype == torch.float32
    return model.eval()


# Rows of 80 tokens, as T5's positions and the local attention of GPT-Neo and Mistral differ from others in long rows only.
LENGTH = 80
SIZES = {
    "vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 96, "num_key_value_heads": 2, "head_dim": 8, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "n_positions": 96, "rotary_dim": 4, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 4, "ffn_dim": 48,
    "attention_heads": 4, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_layers": 2,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "embedding_size": 16, "word_embed_proj_dim": 32, "dim": 32,
    "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "num_decoder_layers": 2, "attention_types": [[["global", "local"], 1]],
    "window_size": 20, "sliding_window": 20, "local_attention": 40, "layer_types": ["sliding_attention", "full_attention"],
    "decoder_start_token_id": 0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 3,
    "cls_token_id": 4, "forced_eos_token_id": 2, "decoder_vocab_size": 131, "max_window_layers": 1,
}  # fmt: skip


def small_config(model_type: str, **more: Any) -> PretrainedConfig:
    """A configuration of a type with small numbers for those of its fields that are sizes."""
    config_class = CONFIG_MAPPING[model_type]
    known = config_class().to_dict().keys()
    return config_class(**{name: value for name, value in (SIZES | more).items() if name in known})


# ---- What a run writes ---------------------------------------------------------------------------------------------------


OBJECTIVES = {  # script, class of PyTorch, directory with a tokenizer, flag of the row length
    "mlm": (run_mlm_flax, "AutoModelForMaskedLM", "roberta_dir", "max_seq_length"),
    "clm": (run_clm_flax, "AutoModelForCausalLM", "gpt2_dir", "block_size"),
    "t5": (run_t5_mlm_flax, "AutoModelForSeq2SeqLM", "t5_dir", "max_seq_length"),
    "bart": (run_bart_dlm_flax, "AutoModelForSeq2SeqLM", "bart_dir", "max_seq_length"),
    "nsp": (run_pretraining_flax, "AutoModelForPreTraining", "bert_dir", "max_seq_length"),
}
# All masked models, and of the other objectives those that differ in more than numbers.
OTHERS = {"clm": "bart gemma2 gpt2 llama opt", "t5": "t5 umt5", "bart": "bart marian pegasus", "nsp": "bert big_bird"}
RUNS = [("mlm", model_type) for model_type in run_mlm_flax.MODELS]
RUNS += [(objective, model_type) for objective, types in OTHERS.items() for model_type in types.split()]


@pytest.fixture
def train(corpus, request, tmp_path):
    """train(objective, *flags) -> output_dir, of a short run on rows of 32 tokens."""

    def run(objective: str, *flags: Any, name: str = "out") -> tuple[Path, dict[str, float]]:
        module, _, tokenizer_dir, length_flag = OBJECTIVES[objective]
        tokenizer_dir = request.getfixturevalue(tokenizer_dir)
        given = ["--tokenizer_name", tokenizer_dir, "--train_file", corpus, f"--{length_flag}", 32, "--max_train_samples", 64]
        given += ["--output_dir", tmp_path / name, *(["--line_by_line"] if objective == "nsp" else []), *flags]
        return tmp_path / name, module.main([str(flag) for flag in given])

    return run


def overrides_of(model_type: str, num_tokens: int) -> str:
    """SIZES for --config_overrides, those that can be set there."""
    fields = small_config(model_type, vocab_size=num_tokens, block_size=32, num_random_blocks=1).to_dict()
    set_there = {**SIZES, "block_size": 0, "num_random_blocks": 0}
    return ",".join(
        f"{name}={value}"
        for name, value in fields.items()
        if name in set_there and isinstance(value, int) and not name.endswith("_token_id")
    )


@pytest.mark.parametrize(("objective", "model_type"), RUNS, ids=["-".join(row) for row in RUNS])
def test_a_run_of_each_type_loads_in_pytorch(objective, model_type, train, request, monkeypatch, capsys):
    """A short run's model.safetensors: nothing missing, nothing unexpected, and the scores of the weights that it trained."""
    import torch

    module, auto_class, tokenizer_dir, _ = OBJECTIVES[objective]
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(tokenizer_dir))
    overrides = overrides_of(model_type, 64 * math.ceil(len(tokenizer) / 64))
    flags = ["--model_type", model_type, "--config_overrides", overrides, "--max_steps", 3, "--learning_rate", 1e-2]
    output_dir, _ = train(objective, *flags, "--do_train")
    model, params = weights.from_pretrained(str(output_dir), module.MODELS)
    (output_dir / "flax_model.msgpack").unlink()
    monkeypatch.chdir(output_dir)
    exec(re.findall(r"```python\n(.*?)```", (output_dir / "README.md").read_text(), re.DOTALL)[0], {})  # as the card says
    assert capsys.readouterr().out.strip()
    kind = next(kind for kind, name in oracle.AUTO_CLASSES.items() if name == auto_class)
    inputs = oracle.make_inputs(kind, model.config, 30)
    with torch.no_grad():
        expected = oracle.torch_scores(kind, load_in_pytorch(output_dir, auto_class), inputs)
    counts = inputs[3 if kind == "seq2seq" else 1] == 1
    found = oracle.flax_scores(kind, model, params, inputs)
    for ours, theirs, where in zip(found, expected, (counts, slice(None)), strict=False):
        np.testing.assert_allclose(np.asarray(ours)[where], theirs.numpy()[where], atol=1e-4)
        assert np.abs(ours).max() > 0.02  # the weights did come along


# ---- What PyTorch wrote ---------------------------------------------------------------------------------------------------


CHECKPOINTS = [
    ("mlm", "bert", {}),
    ("mlm", "bert", {"tie_word_embeddings": False}),
    ("mlm", "modernbert", {}),
    ("mlm", "roberta", {"tie_word_embeddings": False}),
    ("clm", "gpt2", {}),
    ("clm", "llama", {}),
    ("clm", "llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}),
    ("clm", "qwen3", {"use_sliding_window": True}),
    ("t5", "t5", {}),
    ("t5", "t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    ("bart", "bart", {}),
]


@pytest.mark.parametrize(("objective", "model_type", "more"), CHECKPOINTS)
def test_fine_tuning_from_what_pytorch_wrote(
    objective, model_type, more, train, request, monkeypatch, messages_logged, tmp_path
):
    """The script's evaluation is PyTorch's loss on the same rows, to 1e-5; and a step of training makes it smaller."""
    import torch
    import transformers

    _, auto_class, tokenizer_dir, _ = OBJECTIVES[objective]
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(tokenizer_dir))
    sizes = {"vocab_size": 64 * math.ceil(len(tokenizer) / 64), "decoder_start_token_id": 2 if objective == "bart" else 0}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    ids = {name: token_id for name, token_id in ids.items() if token_id is not None}
    config = small_config(model_type, **sizes | ids | more)
    torch.manual_seed(1)
    model = getattr(transformers, auto_class).from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")

    rows, eval_batches = [], batches.eval_batches

    def noting(*args):
        for batch in eval_batches(*args):
            rows.append(batch)
            yield batch

    monkeypatch.setattr(batches, "eval_batches", noting)
    flags = ["--model_name_or_path", tmp_path / "source", "--max_eval_samples", 24]
    _, results = train(objective, *flags, "--do_eval", name="evaluated")
    assert results["eval_loss"] == pytest.approx(pytorch_loss(model, rows), rel=1e-5)
    assert not [message for message in messages_logged if "Fresh" in message or "Not used" in message]
    monkeypatch.setattr(batches, "eval_batches", eval_batches)
    _, tuned = train(objective, *flags, "--max_steps", 8, "--learning_rate", 1e-2, name="tuned")
    assert tuned["eval_loss"] < results["eval_loss"] - 0.1


def pytorch_loss(model: Any, rows: list[dict[str, np.ndarray]]) -> float:
    """Cross-entropy per label of batches as the scripts make them."""
    import torch

    total = weight = 0.0
    for batch in rows:
        inputs = {name: torch.tensor(array).long() for name, array in batch.items() if name.endswith(("input_ids", "_mask"))}
        with torch.no_grad():
            scores_NV = model(**inputs).logits.flatten(0, 1)
        if "label_positions" in batch:
            scores_NV = scores_NV[torch.tensor(batch["label_positions"]).long()]
        labels_N, weights_N = torch.tensor(batch["labels"]).flatten().long(), torch.tensor(batch["label_weights"]).flatten()
        losses_N = torch.nn.functional.cross_entropy(scores_NV, labels_N, reduction="none")
        total, weight = total + float((losses_N * weights_N).sum()), weight + float(weights_N.sum())
    return total / weight


def test_fine_tuning_from_a_pickle(train, roberta_dir, tmp_path):
    """pytorch_model.bin and nothing else: the same start as from model.safetensors."""
    import torch
    from transformers import RobertaConfig, RobertaForMaskedLM

    torch.manual_seed(1)
    model = RobertaForMaskedLM(RobertaConfig.from_pretrained(roberta_dir))
    model.lm_head.bias.data[0] = 20.0  # sure of <s> everywhere, which fresh weights are not

    def loss(kind: str) -> float:
        model.save_pretrained(tmp_path / kind)
        if kind == "bin":  # as earlier versions wrote it; this one does no longer
            (tmp_path / kind / "model.safetensors").unlink()
            torch.save(model.state_dict(), tmp_path / kind / "pytorch_model.bin")
        return train("mlm", "--model_name_or_path", tmp_path / kind, "--do_eval", name=f"out-{kind}")[1]["eval_loss"]

    assert loss("bin") == loss("safetensors") > 15
    assert [path.name for path in (tmp_path / "bin").glob("*model*")] == ["pytorch_model.bin"]
