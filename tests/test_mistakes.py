# SPDX-License-Identifier: Apache-2.0
"""A person's mistakes: one line that names the flag or file, exit status 2, nothing computed or lost."""

import json
import math

import pytest
from transformers import BertConfig, BigBirdConfig, RobertaConfig

import run_mlm_flax as script
from flaxlm import configurations
from tests.conftest import TINY


@pytest.fixture
def flags(roberta_dir, corpus, tmp_path):
    """Flags of a run that would work; tests add what spoils it (the last of two equal flags counts)."""
    return [
        "--config_name", roberta_dir, "--tokenizer_name", roberta_dir, "--train_file", corpus,
        "--output_dir", tmp_path / "out", "--max_seq_length", 32, "--max_steps", 4,
    ]  # fmt: skip


@pytest.fixture
def mistake(error_of):
    def run(*flags) -> str:
        return error_of(script.main, [str(flag) for flag in flags])

    return run


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (["--mlm_probability", 0], "--mlm_probability 0.0: must lie between 0 and 1"),
        (["--mlm_probability", 1], "--mlm_probability 1.0: must lie between 0 and 1"),
        (["--logging_steps", 0], "--logging_steps 0: must be at least 1"),
        (["--save_steps", -1], "--save_steps -1: must be at least 1"),
        (["--eval_steps", 0], "--eval_steps 0: must be at least 1"),
        (["--per_device_train_batch_size", 0], "--per_device_train_batch_size 0: must be at least 1"),
        (["--per_device_eval_batch_size", -8], "--per_device_eval_batch_size -8: must be at least 1"),
        (["--num_train_epochs", 0], "--num_train_epochs 0.0: must be more than 0"),
        (["--max_steps", 0], "--max_steps 0: must be at least 1"),
        (["--learning_rate", -1], "--learning_rate -1.0: must be at least 0"),
        (["--learning_rate", math.nan], "--learning_rate nan: must be a finite number"),
        (["--adam_beta2", 1], "--adam_beta2 1.0: must be between 0 and 1"),
        (["--warmup_ratio", 1.5], "--warmup_ratio 1.5: must be between 0 and 1"),
        (["--warmup_steps", 4], "--warmup_steps: a warmup of 4 steps does not fit into 4 steps"),
        (["--warmup_ratio", 1], "--warmup_ratio: a warmup of 4 steps does not fit into 4 steps"),
        (["--validation_split_percentage", 100], "--validation_split_percentage 100: must be between 1 and 99"),
        (["--max_seq_length", 65], "--max_seq_length 65: the model has positions for 64 tokens"),
        (["--max_train_samples", 0], "--max_train_samples 0: must be at least 1"),
        (["--dtype", "float16"], "--dtype float16: would need loss scaling"),
        (["--dtype", "float64"], "--dtype"),
        (["--seed", -1], "--seed -1: must be at least 0"),
        (["--lr_scheduler_type", "exponential"], "--lr_scheduler_type"),
        (["--learning_rate", "fast"], "--learning_rate"),
        (["--no_such_flag"], "--no_such_flag: no such flag"),
        (["--model_type", "perceptron"], "--model_type perceptron: unknown; supported are albert, bart, bert"),
        (["--config_overrides", "hidden_sice=64"], "--config_overrides hidden_sice: is no field of a roberta configuration"),
        (["--config_overrides", "hidden_size=big"], "--config_overrides hidden_size=big: hidden_size takes a whole number"),
        (["--config_overrides", "hidden_size"], "--config_overrides hidden_size: write key=value"),
        (["--config_overrides", "layer_norm_eps=x"], "layer_norm_eps takes a number"),
        (["--config_overrides", "use_cache=maybe"], "use_cache takes true or false"),
        (["--config_overrides", "hidden_size=32,num_attention_heads=3"], "no model"),
        (["--config_overrides", "vocab_size=448"], "add --config_overrides vocab_size=512"),
        (["--train_file", "missing.txt"], "--train_file missing.txt: no such file"),
        (["--train_file", "corpus.docx"], "--train_file corpus.docx: unknown suffix; use txt, csv, json, jsonl, parquet"),
        (["--train_file", "corpus"], "--train_file corpus: unknown suffix"),
        (["--validation_file", "missing.csv"], "--validation_file missing.csv: no such file"),
        (["--text_column_name", "body"], "--text_column_name body: the data has no such text column, only ['text']"),
        (["--train_ref_file", "missing.ref", "--whole_word_mask"], "--train_ref_file missing.ref: no such file"),
        (["--train_ref_file", "m.ref"], "--train_ref_file: holds word references, which only --whole_word_mask uses"),
        (["--validation_ref_file", "v.ref", "--whole_word_mask"], "--validation_ref_file: refers to the rows of"),
        (["--whole_word_mask", "--no_use_fast_tokenizer"], "--whole_word_mask: needs the fast tokenizer"),
        (["--config_name", "no/such-config"], "--config_name no/such-config: no configuration can be loaded"),
        (["--tokenizer_name", "no/such-tokenizer"], "--tokenizer_name no/such-tokenizer: no tokenizer can be loaded"),
        (["--model_name_or_path", "no/such-weights"], "--model_name_or_path no/such-weights: no model"),
        (["--dataset_name", "no/such-dataset"], "--dataset_name no/such-dataset: cannot be loaded"),
        (["--per_device_train_batch_size", 100_000], "fewer than one batch of 100000"),
    ],
)  # fmt: skip
def test_mistakes_in_flags(mistake, flags, spoil, expected):
    assert expected in mistake(*flags, *spoil)


def test_no_data(mistake, roberta_dir, tmp_path):
    line = mistake("--config_name", roberta_dir, "--tokenizer_name", roberta_dir, "--output_dir", tmp_path)
    assert "no data: give --dataset_name, or --train_file" in line


def test_training_without_training_data(mistake, flags, corpus):
    flags[flags.index("--train_file")] = "--validation_file"
    assert "--do_train: needs --train_file or --dataset_name" in mistake(*flags)


def test_no_model_and_no_tokenizer(mistake, flags, corpus, tmp_path, roberta_dir):
    data = ["--train_file", corpus, "--output_dir", tmp_path / "out"]
    assert "no model: give --config_name, --model_type or" in mistake(*data, "--tokenizer_name", roberta_dir)
    assert "no tokenizer: give --tokenizer_name" in mistake(*data, "--config_name", roberta_dir)


def test_output_dir_is_required(mistake, corpus):
    assert "--output_dir" in mistake("--train_file", corpus)


def test_output_dir_not_empty(mistake, flags, tmp_path):
    """Also when do_train is not given: training would happen all the same (defect 7)."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    assert "is not empty; name another or add --overwrite_output_dir" in mistake(*flags)
    assert (tmp_path / "out" / "precious").read_text() == "kept"


def test_output_dir_is_a_file(mistake, flags, tmp_path):
    (tmp_path / "out").write_text("")
    assert "is a file; name a directory" in mistake(*flags)


def test_empty_file(mistake, flags, tmp_path):
    (tmp_path / "empty.txt").touch()
    assert f"--train_file {tmp_path / 'empty.txt'}: is empty" in mistake(*flags, "--train_file", tmp_path / "empty.txt")


def test_blank_file(mistake, flags, tmp_path):
    """Rows without a word: nothing to train on, though the file is not empty."""
    (tmp_path / "blank.txt").write_text("\n \n\n" * 10)
    assert "holds no text" in mistake(*flags, "--train_file", tmp_path / "blank.txt", "--max_steps", 1)


def test_file_that_is_not_what_its_suffix_says(mistake, flags, tmp_path):
    for suffix in ("json", "parquet", "txt.gz"):
        path = tmp_path / f"corpus.{suffix}"
        path.write_bytes(b'{"text": \xff\xfe broken')
        assert f"--train_file {path}: is empty or cannot be read as" in mistake(*flags, "--train_file", path)


def test_no_text_column(mistake, flags, tmp_path):
    (tmp_path / "numbers.jsonl").write_text('{"n": 1}\n{"n": 2}\n')
    line = mistake(*flags, "--train_file", tmp_path / "numbers.jsonl")
    assert "the data has no text column, only n (numbers): write the texts as strings" in line


def test_tokenizer_without_mask_token(mistake, flags, byte_level_tokenizer, tmp_path):
    byte_level_tokenizer.save_pretrained(tmp_path / "maskless")
    path = tmp_path / "maskless" / "tokenizer_config.json"
    changes = {"mask_token": None, "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    line = mistake(*flags, "--tokenizer_name", tmp_path / "maskless")
    assert "has no mask_token, needed to hide words" in line


def test_tokenizer_larger_than_the_embedding_of_loaded_weights(mistake, flags, roberta_dir, tmp_path):
    """An id without an embedding would read NaN (defect 76)."""
    RobertaConfig(vocab_size=128, max_position_embeddings=66, **TINY).save_pretrained(tmp_path / "small")
    line = mistake(*flags[2:], "--model_name_or_path", tmp_path / "small")
    assert "ids up to 508, the model embeds only 128: use the tokenizer these weights were trained with, or add" in line
    assert line.endswith("--resize_token_embeddings")


def test_config_overrides_with_weights(mistake, flags, roberta_dir):
    line = mistake(*flags, "--model_name_or_path", roberta_dir, "--config_overrides", "hidden_size=64")
    assert "--config_overrides: changes fresh models only" in line


def test_model_type_without_a_class_for_this_objective(mistake, flags):
    assert "model type gpt2: has no Flax class for this objective; supported are albert" in mistake(
        *flags[2:], "--model_type", "gpt2"
    )


def test_rows_that_would_have_sparse_attention(mistake, flags):
    """It is not here; the line says with what they can be trained."""
    overrides = "vocab_size=512,block_size=4,num_random_blocks=1"
    line = mistake(*flags[2:], "--model_type", "big_bird", "--config_overrides", overrides)
    assert "error: attention_type=block_sparse: sparse attention is not here, and rows of more than 28 tokens would" in line
    assert line.endswith("add --config_overrides attention_type=original_full")


def test_rows_too_short_for_sparse_attention(monkeypatch):
    """Full attention, as PyTorch gives them, and a line that says so; asked for, it is nothing to speak of."""
    messages = []
    monkeypatch.setattr(configurations.logger, "info", lambda message, *args: messages.append(message % args))
    for row_length in (28, 27):
        config = BigBirdConfig(block_size=4, num_random_blocks=1)
        script.DataTrainingArguments().adapt_config(config, row_length)
        assert config.attention_type == "original_full"
    assert messages == ["attention_type=original_full: rows of at most 28 tokens have full attention."] * 2
    config = BigBirdConfig(block_size=4, num_random_blocks=1, attention_type="original_full")
    script.DataTrainingArguments().adapt_config(config, 512)
    assert config.attention_type == "original_full"
    assert len(messages) == 2


def test_references_that_do_not_match(mistake, flags, bert_dir, tmp_path):
    (tmp_path / "zh.txt").write_text("模型\n\n词语\n")
    for text, expected in (("[2]\n", "has 1 word references for 3 rows (1 of them blank)"), ("2]\n", "is not one JSON list")):
        (tmp_path / "zh.ref").write_text(text)
        line = mistake(
            *flags, "--tokenizer_name", bert_dir, "--config_name", bert_dir, "--whole_word_mask",
            "--train_file", tmp_path / "zh.txt", "--train_ref_file", tmp_path / "zh.ref",
        )  # fmt: skip
        assert expected in line


def test_one_row_cannot_be_split(mistake, flags, tmp_path):
    (tmp_path / "one.txt").write_text("a single row\n")
    assert "too few to hold some out; give --validation_file" in mistake(*flags, "--train_file", tmp_path / "one.txt")


def test_hub_unreachable(run_script, flags):
    """The real client, a port where nobody listens: it tries for 25 seconds, then there is one line."""
    closed = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run_script(script.__file__, *flags, "--dataset_name", "someone/something", env=closed)
    assert done.returncode == 2
    assert "error: --dataset_name someone/something: cannot be loaded: Couldn't reach" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_json_arguments(mistake, tmp_path):
    path = tmp_path / "arguments.json"
    for content, expected in (
        ("{", f"{path}: cannot be read as JSON"),
        ("[]", f"{path}: must hold one JSON object"),
        ('{"output_dir": "x", "learning_rat": 1}', f"{path}: 'learning_rat': no such flag"),
        ('{"output_dir": "x", "max_steps": 2.5}', "max_steps"),
    ):
        path.write_text(content)
        assert expected in mistake(path)
    assert "no_such.json: cannot be read as JSON" in mistake("no_such.json")


def test_long_rows_beyond_a_bert_position_table(mistake, flags, bert_dir, tmp_path):
    BertConfig(vocab_size=640, max_position_embeddings=20, **TINY).save_pretrained(tmp_path / "short")
    line = mistake(*flags, "--config_name", tmp_path / "short", "--tokenizer_name", bert_dir, "--max_seq_length", 21)
    assert "--max_seq_length 21: the model has positions for 20 tokens" in line
