# SPDX-License-Identifier: Apache-2.0
"""Rows of a causal language model."""

import functools

import pytest
from transformers import (
    AutoTokenizer,
    GPT2Config,
)

import run_clm_flax
from flaxlm import command_line
from flaxlm import corpus as corpus_module


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
