# SPDX-License-Identifier: Apache-2.0
"""Tokenizers."""

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import sentencepiece
from transformers import AutoTokenizer, GPT2Config, GPT2TokenizerFast

from flaxlm import arguments, tokenization
from tests.conftest import ROOT


@dataclasses.dataclass
class Blocks(arguments.DataArguments):
    """Like those of run_clm_flax.py."""

    row_length_flag: ClassVar[str] = "block_size"
    cuts_row_length: ClassVar[bool] = True
    block_size: int | None = None


def test_block_size_is_cut(gpt2_dir, monkeypatch):
    """As in the original, with a warning; and what is taken where the flag is not given."""
    warnings = []
    monkeypatch.setattr(tokenization.logger, "warning", lambda message, *args: warnings.append(message % args))
    tokenizer = GPT2TokenizerFast.from_pretrained(gpt2_dir, model_max_length=1000)
    data_args = Blocks(block_size=80)
    assert tokenization.choose_row_length(data_args, GPT2Config(n_positions=48), tokenizer) == 48
    assert warnings == ["--block_size 80 is cut to what tokenizer and model can take, 48."]
    data_args = Blocks()
    assert tokenization.choose_row_length(data_args, GPT2Config(n_positions=48), tokenizer) == 48
    tokenizer.model_max_length = 2000
    assert tokenization.choose_row_length(data_args, GPT2Config(n_positions=4096), tokenizer) == 1024


# ---- Tokenizers that cannot be loaded ------------------------------------------------------------------------------------


def load_tokenizer(path, model_type="roberta", **flags):
    return tokenization.load_tokenizer(arguments.ModelArguments(tokenizer_name=str(path), model_type=model_type, **flags))


@pytest.fixture
def tokenizer_dir(byte_level_tokenizer, tmp_path) -> Path:
    byte_level_tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", [lambda text: text[: len(text) // 2], lambda text: "", lambda text: "[]", lambda text: "\x00"]
)
def test_a_tokenizer_file_that_is_damaged(name, content, tokenizer_dir, refuses):
    path = tokenizer_dir / name
    path.write_text(content(path.read_text()))
    with refuses(
        rf"^--tokenizer_name {tokenizer_dir}: no tokenizer can be loaded: {name} (cannot be read as JSON|must hold one)"
    ):
        load_tokenizer(tokenizer_dir)


@pytest.mark.parametrize(
    "change",
    [
        {"version": "9.0"},
        {"model": {"type": "Newer"}},
        {"pre_tokenizer": {"type": "Newer"}},
        {"added_tokens": 5},
        {"post_processor": {}},
    ],
)
def test_a_tokenizer_of_a_newer_kind(change, tokenizer_dir, refuses):
    path = tokenizer_dir / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with refuses(r"no tokenizer can be loaded: tokenizer.json is damaged, or newer than tokenizers 0\.\d+\.\d+ knows: "):
        load_tokenizer(tokenizer_dir)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokenizer_class": "NoSuchTokenizer"}, "Tokenizer class NoSuchTokenizer does not exist"),
        ({"tokenizer_class": 5}, "must be string"),
        ({"tokenizer_class": "BertTokenizer"}, "a file that its class needs is missing"),
        ({"tokenizer_class": "LlamaTokenizer"}, "a file that its class needs is missing"),
        ({"mask_token": 5}, "mask_token has to be either str or AddedToken"),
        ({"added_tokens_decoder": []}, "no attribute 'items'"),
        ({"model_max_length": "long"}, "model_max_length=long: must be a whole number"),
        ({"model_max_length": -1}, "model_max_length=-1: must be a whole number"),
    ],
)
def test_a_tokenizer_config_with_wrong_values(change, reason, tokenizer_dir, refuses):
    path = tokenizer_dir / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with refuses(rf"^--tokenizer_name {tokenizer_dir}: .*{reason}"):
        load_tokenizer(tokenizer_dir)


@pytest.mark.parametrize(
    ("tokenizer_class", "package", "more"),
    [
        ("XLMTokenizer", "sacremoses", {}),
        ("FlaubertTokenizer", "sacremoses", {}),
        ("RoFormerTokenizer", "rjieba", {}),
        ("BertJapaneseTokenizer", "fugashi", {"word_tokenizer_type": "mecab"}),
    ],
)
def test_a_tokenizer_whose_package_is_missing(tokenizer_class, package, more, refuses, monkeypatch, tmp_path):
    """The line says what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nword\n")
    (tmp_path / "vocab.json").write_text('{"<unk>": 0}')
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class} | more))
    with refuses(f"no tokenizer can be loaded: it needs a package that is not installed: pip install {package}$"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("package", ["sentencepiece", "protobuf"])
def test_without_sentencepiece(package, sentencepiece_files, run_script, tmp_path):
    """In a process of its own, which cannot import it."""
    module = {"protobuf": "google.protobuf"}.get(package, package)
    (tmp_path / "without.py").write_text(
        f"""import sys
sys.modules["{module}"] = None
from flaxlm import arguments, cli, tokenization
for directory, model_type in zip(sys.argv[1::2], sys.argv[2::2]):
    args = arguments.ModelArguments(tokenizer_name=directory, model_type=model_type)
    assert cli.run(lambda: tokenization.load_tokenizer(args), "script.py") == 2
"""
    )
    flags = [flag for model_type, path in sentencepiece_files.items() for flag in (path.parent, model_type)]
    done = run_script(tmp_path / "without.py", *flags, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert len(errors) == len(sentencepiece_files)
    assert all(line.endswith(f"it needs a package that is not installed: pip install {package}") for line in errors), errors


def test_a_directory_without_a_tokenizer(refuses, tmp_path):
    with refuses(f"^--tokenizer_name {tmp_path}: no tokenizer can be loaded: there is none in it"):
        load_tokenizer(tmp_path)
    with refuses("^--tokenizer_name /no/such/place: no tokenizer can be loaded: there is no such directory"):
        load_tokenizer("/no/such/place")


# ---- Tokenizers of few files ---------------------------------------------------------------------------------------------

SENTENCEPIECE = {  # the name of the file, and how its pieces are numbered
    "t5": ("spiece.model", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
    "albert": ("spiece.model", {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1}),
    "xlm-roberta": ("sentencepiece.bpe.model", {"unk_id": 0, "bos_id": 1, "eos_id": 2}),
    "llama": ("tokenizer.model", {"model_type": "bpe", "byte_fallback": True}),
}


def train_sentencepiece(path: Path, texts, vocab_size=400, **options) -> None:
    model = io.BytesIO()
    options |= {"model_writer": model, "vocab_size": vocab_size, "minloglevel": 2, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())


@pytest.fixture(scope="module")
def sentencepiece_files(texts, tmp_path_factory) -> dict[str, Path]:
    """A file of each kind, alone in its directory."""
    root, files = tmp_path_factory.mktemp("sentencepiece"), {}
    for model_type, (name, options) in SENTENCEPIECE.items():
        files[model_type] = root / model_type / name
        if model_type == "albert":
            options = options | {"control_symbols": ["[CLS]", "[SEP]", "[MASK]"]}
        train_sentencepiece(files[model_type], texts[:200], **options)
    return files


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])
@pytest.mark.parametrize("model_type", SENTENCEPIECE)
def test_a_sentencepiece_file_alone(model_type, fast, sentencepiece_files):
    """The model's type says what it is for; its pieces are those of the library."""
    path = sentencepiece_files[model_type]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    tokenizer = load_tokenizer(path.parent, model_type, use_fast_tokenizer=fast)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode("Return the value.", out_type=str)
    text = "Return the value." if model_type != "albert" else "return the value."
    expected = pieces if model_type != "albert" else tokenizer.tokenize(text)
    assert tokenizer.tokenize("Return the value.") == expected
    assert tokenizer.decode(tokenizer("Return the value.").input_ids, skip_special_tokens=True) == text


def test_a_sentencepiece_file_cut_short(sentencepiece_files, refuses, tmp_path):
    for model_type, path in sentencepiece_files.items():
        (tmp_path / model_type).mkdir()
        (tmp_path / model_type / path.name).write_bytes(path.read_bytes()[:2000])
        with refuses("no tokenizer can be loaded: .*" + path.name):
            load_tokenizer(tmp_path / model_type, model_type)


def test_training_with_a_sentencepiece_file_alone(sentencepiece_files, corpus, tmp_path):
    """What is saved is a whole tokenizer, which gives the same ids."""
    import run_t5_mlm_flax

    source = sentencepiece_files["t5"].parent
    sizes = "d_model=32,d_kv=16,d_ff=64,num_layers=1,num_heads=2"
    run_t5_mlm_flax.main(
        ["--model_type", "t5", "--config_overrides", sizes, "--tokenizer_name", str(source), "--train_file", str(corpus),
         "--max_seq_length", "32", "--max_steps", "1", "--output_dir", str(tmp_path)]
    )  # fmt: skip
    assert (tmp_path / "tokenizer.json").exists()
    text = "Return the value."
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == load_tokenizer(source, "t5")(text).input_ids


def test_mt5_sentinels_in_a_sentencepiece_file(texts, tmp_path):
    """As google/mt5-* have them: pieces, and no added tokens (J1)."""
    sentinels = [f"▁<extra_id_{j}>" for j in reversed(range(100))]
    options = SENTENCEPIECE["t5"][1] | {"user_defined_symbols": sentinels, "vocab_size": 500}
    train_sentencepiece(tmp_path / "spiece.model", texts[:200], **options)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
    tokenizer = load_tokenizer(tmp_path, "mt5")
    import run_t5_mlm_flax

    found = run_t5_mlm_flax.find_sentinel_ids(tokenizer, 100, "--max_seq_length 512")
    assert tokenizer.convert_ids_to_tokens(found.tolist()) == sentinels[::-1]
    assert len(tokenizer) == 500


@pytest.mark.parametrize("keep", [["tokenizer.json"], ["vocab.json", "merges.txt"]])
def test_other_files_alone(keep, byte_level_tokenizer, tokenizer_dir):
    for path in tokenizer_dir.iterdir():
        if path.name not in keep:
            path.unlink()
    tokenizer = load_tokenizer(tokenizer_dir)
    assert type(tokenizer) is type(byte_level_tokenizer)
    assert tokenizer("Return the value.").input_ids == byte_level_tokenizer("Return the value.").input_ids
