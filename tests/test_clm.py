# SPDX-License-Identifier: Apache-2.0
"""Rows of a causal language model."""

import functools
import json
import math

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2Tokenizer

import run_clm_flax
from flaxlm import command_line
from flaxlm import corpus as corpus_module
from flaxlm import text as text_module


@pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streaming"])
def test_line_breaks_and_ends_of_texts(streaming, gpt2_dir, tmp_path):
    """--keep_linebreaks, on by default, keeps the line break of each line of a txt file; --append_eos_token ends each."""
    module, lines = run_clm_flax, ["One line.", "Another one", "a third", "and a last one."]
    more = ["and so on"] * 9  # of which a stream drops the end, where it fills no row
    (tmp_path / "a.txt").write_text("".join(f"{line}\n" for line in lines + more))

    def text_of(*flags) -> str:
        """What the rows of tokens hold."""
        argv = ["--validation_file", tmp_path / "a.txt", "--config_name", gpt2_dir, "--tokenizer_name", gpt2_dir]
        argv += ["--output_dir", tmp_path / "out", "--do_eval", *["--streaming"] * streaming, *flags]
        args = command_line.parse([str(flag) for flag in argv], module.DataTrainingArguments, module.MODELS, None)
        tokenizer = AutoTokenizer.from_pretrained(gpt2_dir)
        collator = module.Collator(tokenizer, GPT2Config(), args.data, 8)
        tokenize_fn = functools.partial(module.tokenize_texts, tokenizer=tokenizer, **collator.tokenize_options)
        rows = corpus_module.prepare(args, tokenize_fn, collator).validation
        return tokenizer.decode([token for token in rows["input_ids"].reshape(-1).tolist() if token >= 0])

    for linebreaks, end in (([], "\n"), (["--keep_linebreaks"], "\n"), (["--no_keep_linebreaks"], "")):
        for eos, append in (("", []), ("<|endoftext|>", ["--append_eos_token"])):
            expected = "".join(f"{line}{end}{eos}" for line in [*lines, more[0]])
            assert text_of(*linebreaks, *append).startswith(expected)


# ---- Bits per byte ---------------------------------------------------------------------------------------------------------


def prepared(directory, text_file, *flags, row_length: int = 8) -> corpus_module.Corpus:
    """The evaluation rows of a file and the size of its text."""
    module = run_clm_flax
    argv = ["--validation_file", text_file, "--config_name", directory, "--tokenizer_name", directory]
    argv += ["--output_dir", directory / "out", "--do_eval", *flags]
    args = command_line.parse([str(flag) for flag in argv], module.DataTrainingArguments, module.MODELS, None)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    collator = module.Collator(tokenizer, GPT2Config(), args.data, row_length)
    tokenize_fn = functools.partial(module.tokenize_texts, tokenizer=tokenizer, **collator.tokenize_options)
    return corpus_module.prepare(args, tokenize_fn, collator)


FOREIGN = "Grüße, naïve façade — 模型预测词语\n\nand an empty line before, \U0001f600 too\nno line break at the end"


FLAGS = ["", "--no_keep_linebreaks", "--append_eos_token", "--max_eval_samples 2"]


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["prepared", "streaming"])
@pytest.mark.parametrize("more", FLAGS)
def test_the_size_of_the_evaluation_text(streaming, more, gpt2_dir, tmp_path):
    """Bytes as in the file, with its line breaks or without; tokens as a tokenizer counts them; all, however many rows stay."""
    (tmp_path / "a.txt").write_text(FOREIGN, "utf-8")
    keeps = more != "--no_keep_linebreaks"
    lines = [line for line in FOREIGN.splitlines(keepends=keeps) if line]
    tokenizer = AutoTokenizer.from_pretrained(gpt2_dir)
    num_tokens = sum(len(tokenizer(line)["input_ids"]) + (more == "--append_eos_token") for line in lines)
    num_bytes = (tmp_path / "a.txt").stat().st_size - (0 if keeps else FOREIGN.count("\n"))
    data = prepared(gpt2_dir, tmp_path / "a.txt", *streaming, *more.split())
    assert data.validation_text == (num_tokens, num_bytes)
    assert num_tokens % 8  # the last row is filled up
    assert data.num_validation_rows == (2 if more.startswith("--max") else -(-num_tokens // 8))


def test_the_size_of_a_part_that_is_held_out(gpt2_dir, texts, tmp_path):
    """Rows of a shuffled split, from a file with a column that may be empty."""
    rows = [{"body": text if i % 5 else None} for i, text in enumerate(texts[:100])]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["--train_file", tmp_path / "a.jsonl", "--config_name", gpt2_dir, "--tokenizer_name", gpt2_dir, "--do_eval"]
    argv += ["--output_dir", tmp_path / "out", "--text_column_name", "body"]
    args = command_line.parse([str(flag) for flag in argv], run_clm_flax.DataTrainingArguments, run_clm_flax.MODELS, None)
    tokenizer = AutoTokenizer.from_pretrained(gpt2_dir)
    collator = run_clm_flax.Collator(tokenizer, GPT2Config(), args.data, 8)
    splits = text_module.load_splits(args, collator)
    held_out = [text for text in splits["validation"]["body"] if text]
    tokenize_fn = functools.partial(run_clm_flax.tokenize_texts, tokenizer=tokenizer, **collator.tokenize_options)
    size = corpus_module.prepare(args, tokenize_fn, collator).validation_text
    assert size == (sum(map(len, tokenizer(held_out)["input_ids"])), sum(len(text.encode()) for text in held_out))
    assert 0 < len(held_out) < 100


def test_bits_per_byte_of_a_model_that_knows_nothing(gpt2_dir, texts, tmp_path):
    """Each token of V costs log2(V) bits, whatever the tokenizer: that many per token, times the tokens in a byte."""
    text = "\n".join(texts[:40])
    (tmp_path / "a.txt").write_text(text)
    for vocab_size, tokenizer_dir in ((512, gpt2_dir), (320, small_byte_tokenizer(tmp_path, texts))):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        overrides = f"vocab_size={vocab_size},n_layer=1,n_head=2,n_embd=8,initializer_range=0"
        argv = ["--validation_file", tmp_path / "a.txt", "--config_name", gpt2_dir, "--tokenizer_name", tokenizer_dir]
        argv += ["--config_overrides", overrides, "--block_size", 16, "--do_eval", "--output_dir", tmp_path / str(vocab_size)]
        results = run_clm_flax.main([str(flag) for flag in argv])
        num_tokens = sum(len(tokenizer(line)["input_ids"]) for line in text.splitlines(keepends=True))
        assert results["eval_perplexity"] == pytest.approx(vocab_size, rel=1e-5)
        assert results["eval_bits_per_byte"] == pytest.approx(math.log2(vocab_size) * num_tokens / len(text.encode()), rel=1e-6)
        assert json.loads((tmp_path / str(vocab_size) / "eval_results.json").read_text()) == results


def small_byte_tokenizer(directory, texts) -> str:
    """Bytes, and a few merges of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], **options))
    GPT2Tokenizer(tokenizer_object=tokenizer, model_max_length=64).save_pretrained(directory / "bytes")
    return str(directory / "bytes")


def test_no_bits_per_byte_without_text():
    """Where there were tokens only."""
    totals = {"loss": 2.0, "weight": 1.0, "correct": 0.0}
    assert "eval_bits_per_byte" not in run_clm_flax.eval_metrics(totals)
    metrics = run_clm_flax.eval_metrics(totals | {"text_tokens": 3, "text_bytes": 12})
    assert metrics["eval_bits_per_byte"] == pytest.approx(2 / math.log(2) / 4)
