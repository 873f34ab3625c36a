# SPDX-License-Identifier: Apache-2.0
"""What the tests share: a small corpus of real text, tokenizers of three kinds, tiny model directories, compiled programs."""

import os
import tempfile

# Before jax, datasets and huggingface_hub are imported: no Hub, no accelerator, caches of our own.
CACHE = os.path.join(tempfile.gettempdir(), f"flax-lm-tests-{os.getuid()}")
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_CACHE": os.path.join(CACHE, "datasets"),
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": os.path.join(CACHE, "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    "TOKENIZERS_PARALLELISM": "false",
}

import _pydecimal
import argparse
import asyncio.base_events
import contextlib
import functools
import json
import logging
import optparse
import pydoc
import re
import subprocess
import sys
import typing
import unittest.mock
from pathlib import Path
from types import ModuleType

import datasets
import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BertConfig,
    BertTokenizer,
    GPT2Config,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaTokenizer,
    T5Config,
)

from flaxlm import cli, token_rows
from quickstart.python_docs_corpus import paragraphs
from t5_tokenizer_model import SentencePieceUnigramTokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.1,  # so narrow a model learns in a hundred steps
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """About 800 paragraphs of English."""
    modules = (argparse, asyncio.base_events, json, subprocess, tempfile, typing, unittest.mock, _pydecimal, optparse, pydoc)
    found = list(paragraphs(Path(module.__file__) for module in modules))
    assert len(found) > 400
    return found


@pytest.fixture(scope="session")
def corpus(texts, tmp_path_factory) -> Path:
    """The texts as a txt file, one paragraph per line."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(texts) + "\n", "utf-8")
    return path


@pytest.fixture(scope="session")
def byte_level_tokenizer(texts) -> RobertaTokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=509,  # no multiple of 64: the embedding is larger than the tokenizer
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return RobertaTokenizer(tokenizer_object=tokenizer, model_max_length=64)


@pytest.fixture(scope="session")
def word_piece_tokenizer(texts) -> BertTokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        [*texts, "模型预测词语"], trainers.WordPieceTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return BertTokenizer(tokenizer_object=tokenizer, model_max_length=64, do_lower_case=False)


@pytest.fixture(scope="session")
def unigram_tokenizer(texts) -> PreTrainedTokenizerFast:
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=600, special_tokens=specials, unk_token="<unk>", show_progress=False)
    )
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), specials, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


@pytest.fixture(scope="session")
def roberta_dir(byte_level_tokenizer, tmp_path_factory) -> Path:
    """Tokenizer and configuration of a tiny RoBERTa without dropout: 64 tokens, vocabulary of 512."""
    path = tmp_path_factory.mktemp("roberta")
    byte_level_tokenizer.save_pretrained(path)
    RobertaConfig(vocab_size=512, max_position_embeddings=66, **TINY).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def bert_dir(word_piece_tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    word_piece_tokenizer.save_pretrained(path)
    BertConfig(vocab_size=640, max_position_embeddings=64, **TINY).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def gpt2_dir(texts, tmp_path_factory) -> Path:
    """The same of a tiny GPT-2: 64 tokens, and as in the original one special token and none around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=509,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    path = tmp_path_factory.mktemp("gpt2")
    GPT2Tokenizer(tokenizer_object=tokenizer, model_max_length=64).save_pretrained(path)
    sizes = {"vocab_size": 512, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "initializer_range": 0.1}
    GPT2Config(**sizes, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def t5_dir(texts, tmp_path_factory) -> Path:
    """The same of a tiny T5 v1.1, as prepare_model_dir.py makes them: 100 sentinels, no limit of the length."""
    tokenizer = SentencePieceUnigramTokenizer(lowercase=False)
    tokenizer.train_from_iterator(texts, 500, show_progress=False)
    tokenizer.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(100))])
    path = tmp_path_factory.mktemp("t5")
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    names |= {
        "extra_special_tokens": [f"<extra_id_{i}>" for i in range(100)],
        "model_input_names": ["input_ids", "attention_mask"],
    }
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.to_str()), **names).save_pretrained(path)
    sizes = {"vocab_size": 640, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    kind = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
    T5Config(**sizes, **kind, dropout_rate=0.0).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def bart_dir(byte_level_tokenizer, tmp_path_factory) -> Path:
    """The same of a tiny BART: 64 tokens, vocabulary of 512."""
    path = tmp_path_factory.mktemp("bart")
    RobertaTokenizer(tokenizer_object=byte_level_tokenizer.backend_tokenizer, model_max_length=64).save_pretrained(path)
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in BART_SIDE.items()}
    BartConfig(vocab_size=512, max_position_embeddings=64, d_model=32, dropout=0.0, init_std=0.1, **sides).save_pretrained(path)
    return path


BART_SIDE = {"layers": 1, "attention_heads": 2, "ffn_dim": 64}


@pytest.fixture
def run_script():
    """Run a script in a process of its own: run_script(path, *flags, devices=1) -> CompletedProcess."""

    def run(script: Path | str, *flags, devices: int = 1, env: dict | None = None, **kwargs):
        environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} | (env or {})
        command = [sys.executable, str(script), *map(str, flags)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **kwargs)

    return run


@pytest.fixture
def messages_logged(monkeypatch) -> list[str]:
    """What our loggers say from here on, whatever a run before has set up."""
    said: list[str] = []

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    monkeypatch.setattr(cli.logger, "handlers", [Noting()])
    monkeypatch.setattr(cli.logger, "propagate", False)
    monkeypatch.setattr(cli.logger, "level", logging.INFO)
    for name in [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "flaxlm"]:
        logging.getLogger(name)._cache.clear()  # each remembers what it may say
    return said


@pytest.fixture
def refuses():
    """with refuses(pattern): a person's mistake, which will end the program with status 2 and a line that matches."""

    @contextlib.contextmanager
    def expect(pattern: str):
        with pytest.raises(cli.Mistake) as caught:
            yield
        assert caught.value.status == 2
        assert "\n" not in str(caught.value)
        assert re.search(pattern, str(caught.value)), caught.value

    return expect


@pytest.fixture
def error_of(capsys):
    """Call something that must end with a person's mistake: exit status 2 and one line on standard error."""

    def call(function, *args) -> str:
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli, "silence_late_writes", lambda: None)  # for programs: it would silence pytest too
            status = cli.run(functools.partial(function, *args), "run_mlm_flax.py")
        lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
        assert status == 2
        assert len(lines) == 1, lines
        return lines[0]

    return call


def rows_of(module: ModuleType, tokenizer, collator, data_args, dataset: datasets.Dataset) -> token_rows.TokenRows:
    """The rows of tokens that a script makes of a dataset of texts."""
    tokenize_fn = functools.partial(module.tokenize_texts, tokenizer=tokenizer, **collator.tokenize_options)
    return token_rows.tokenize_and_group({"train": dataset}, tokenize_fn, collator, data_args, None)["train"]


def run(output_dir, model_dir, *flags, **kwargs) -> dict:
    """main() with a model directory; flags as on the command line."""
    import run_mlm_flax  # not for tests that train nothing: it takes seconds

    base = ["--config_name", model_dir, "--tokenizer_name", model_dir, "--output_dir", output_dir, "--max_seq_length", 32]
    return run_mlm_flax.main([str(flag) for flag in [*base, *flags]])


def read_events(output_dir) -> dict[str, list[tuple[int, float]]]:
    """All points, as TensorBoard itself reads them."""
    events = EventAccumulator(str(output_dir), tensor_size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, float(event.tensor_proto.float_val[0])) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
        if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"
    }


@pytest.fixture(scope="session")
def trained(roberta_dir, corpus, tmp_path_factory):
    """A run that learns: (output_dir, results). Neither do_train nor do_eval given: both are done."""
    output_dir = tmp_path_factory.mktemp("trained") / "deep" / "run"
    results = run(
        output_dir, roberta_dir, "--train_file", corpus, "--max_steps", 120, "--learning_rate", 1e-2, "--warmup_steps", 10,
        "--per_device_train_batch_size", 16, "--logging_steps", 50, "--logging_first_step", "--eval_steps", 60,
    )  # fmt: skip
    return output_dir, results
