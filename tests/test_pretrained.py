# SPDX-License-Identifier: Apache-2.0
"""Configuration and tokenizer."""

import io
import json
import math
import sys
from pathlib import Path

import pytest
import sentencepiece
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GPT2Config,
    GPT2TokenizerFast,
)
from transformers.modeling_flax_utils import ACT2FN

import run_bart_dlm_flax
import run_clm_flax
import run_mlm_flax as script
import run_pretraining_flax
import run_t5_mlm_flax
from flaxlm import arguments, pretrained
from tests.conftest import ROOT, TINY


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


# ---- Configurations that are none ----------------------------------------------------------------------------------------


def load(module=script, **model_args):
    return pretrained.load_config(arguments.ModelArguments(**model_args), module.MODELS)


BERT = TINY | {"model_type": "bert", "vocab_size": 512, "max_position_embeddings": 64}


@pytest.mark.parametrize("content", ["[]", "5", "null", "{", "", "\x00", "[" * 100_000])
def test_a_config_that_is_no_json_object(content, refuses, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with refuses(rf"^--config_name {tmp_path}: config.json (must hold one JSON object|cannot be read as JSON: )"):
        load(config_name=str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hidden_size": 32}, "its config.json has no model_type"),
        ({"model_type": "newer"}, "has model type `newer` but Transformers does not recognize"),
        ({"model_type": ["bert"]}, "unhashable"),
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}},
            "code of its own, which is not run unless --trust_rem",
        ),
    ],
)
def test_a_config_of_no_type(fields, reason, refuses, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with refuses(rf"^--config_name {tmp_path}: no configuration can be loaded: .*{reason}"):
        load(config_name=str(tmp_path))


WHOLE, RATE, NUMBER, TRUTH = "must be a whole number", "must be a number from 0 to", "must be a number", "must be true or false"
WRONG = [
    ("hidden_size", "abc", WHOLE), ("hidden_size", None, WHOLE), ("hidden_size", 32.0, WHOLE), ("hidden_size", -32, WHOLE),
    ("hidden_size", True, WHOLE), ("hidden_size", [32], WHOLE), ("hidden_size", math.nan, WHOLE), ("hidden_size", 0, WHOLE),
    ("vocab_size", None, WHOLE), ("vocab_size", "512", WHOLE), ("vocab_size", 1.5, WHOLE), ("vocab_size", 0, WHOLE),
    ("num_hidden_layers", -1, WHOLE), ("num_hidden_layers", {"a": 1}, WHOLE), ("num_attention_heads", 0, WHOLE),
    ("num_attention_heads", "2", WHOLE), ("max_position_embeddings", None, WHOLE), ("type_vocab_size", 0, WHOLE),
    ("hidden_dropout_prob", 1.5, RATE), ("hidden_dropout_prob", 1, RATE), ("hidden_dropout_prob", None, RATE),
    ("attention_probs_dropout_prob", -0.1, RATE), ("attention_probs_dropout_prob", "none", RATE),
    ("layer_norm_eps", "small", NUMBER), ("layer_norm_eps", None, NUMBER), ("layer_norm_eps", math.inf, NUMBER),
    ("initializer_range", -1, NUMBER), ("initializer_range", True, NUMBER),
    ("hidden_act", "foo", "must be one of gelu, "), ("hidden_act", None, "must be one"), ("hidden_act", ["gelu"], "must be"),
    ("is_decoder", "no", TRUTH), ("tie_word_embeddings", None, TRUTH), ("is_encoder_decoder", True, "must be false"),
    ("position_embedding_type", 5, "must be a str"), ("pad_token_id", "<pad>", "must be the id"), ("eos_token_id", 1.5, "must"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "reason"), WRONG)
def test_a_field_of_the_wrong_kind(field, value, reason, refuses, tmp_path):
    """In a config.json: the file and the field are named."""
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    assert load(config_name=str(tmp_path)).hidden_size == 32
    (tmp_path / "config.json").write_text(json.dumps(BERT | {field: value}))
    with refuses(rf"^--config_name {tmp_path}: config.json: {field}=.*: {reason}"):
        load(config_name=str(tmp_path))
    with refuses(rf"^--model_name_or_path {tmp_path}: config.json: {field}=.*: {reason}"):
        load(model_name_or_path=str(tmp_path))


@pytest.mark.parametrize(
    ("module", "model_type", "field", "value"),
    [
        (run_clm_flax, "llama", "hidden_size", "abc"),  # which the class itself divides
        (run_clm_flax, "llama", "num_attention_heads", 0),
        (run_clm_flax, "llama", "rope_scaling", "linear"),
        (run_clm_flax, "gpt2", "n_embd", "abc"),
        (run_clm_flax, "gpt2", "num_hidden_layers", 1.0),  # another name of n_layer
        (run_clm_flax, "gpt2", "n_inner", "wide"),
        (run_clm_flax, "mistral", "sliding_window", "none"),
        (run_clm_flax, "bloom", "hidden_dropout", 1.0),
        (run_t5_mlm_flax, "t5", "d_kv", None),
        (run_t5_mlm_flax, "t5", "feed_forward_proj", "gated-foo"),
        (run_t5_mlm_flax, "t5", "relative_attention_num_buckets", 2),
        (run_bart_dlm_flax, "bart", "encoder_attention_heads", "16"),
        (run_bart_dlm_flax, "bart", "is_encoder_decoder", False),
        (run_pretraining_flax, "big_bird", "attention_type", "dense"),
    ],
)
def test_a_field_of_the_wrong_kind_in_other_types(module, model_type, field, value, refuses, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, field: value}))
    with refuses(rf"^--config_name {tmp_path}: config.json: {field}=.*: must be "):
        load(module, config_name=str(tmp_path))


def test_default_configurations_are_right():
    """Of all types; and no field is refused for a value that another type's default has."""
    for module in (script, run_clm_flax, run_t5_mlm_flax, run_bart_dlm_flax, run_pretraining_flax):
        for config_class in module.MODELS.by_config:
            load(module, model_type=config_class.model_type)
            assert CONFIG_MAPPING[config_class.model_type] is config_class
    assert set(pretrained.FLAX_ACTIVATIONS) == set(ACT2FN)


# ---- Overrides, and what follows from them -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "model_type", "overrides", "expected"),
    [
        (run_clm_flax, "llama", "hidden_size=32,num_attention_heads=4", {"head_dim": 8, "num_key_value_heads": 4}),
        (run_clm_flax, "llama", "hidden_size=32,num_attention_heads=4,num_key_value_heads=2", {"head_dim": 8}),
        (run_clm_flax, "llama", "num_attention_heads=64", {"head_dim": 64, "num_key_value_heads": 64}),
        (run_clm_flax, "llama", "intermediate_size=64", {"head_dim": 128, "num_key_value_heads": 32}),
        (run_clm_flax, "llama", "hidden_size=100", {"num_attention_heads": 1, "head_dim": 100, "num_key_value_heads": 1}),
        (run_clm_flax, "mistral", "hidden_size=32,num_attention_heads=4", {"head_dim": None, "num_key_value_heads": 1}),
        (run_clm_flax, "gemma", "hidden_size=32,num_attention_heads=4", {"head_dim": 8, "num_key_value_heads": 4}),
        (run_clm_flax, "gemma", "hidden_size=32,num_attention_heads=4,head_dim=16", {"head_dim": 16}),
        (run_clm_flax, "gptj", "n_embd=32,n_head=4", {"rotary_dim": 8}),
        (run_clm_flax, "gptj", "hidden_size=32,n_head=4,rotary_dim=4", {"rotary_dim": 4}),
        (run_clm_flax, "opt", "hidden_size=32,num_attention_heads=4", {"word_embed_proj_dim": 32}),
        (run_clm_flax, "gpt_neo", "num_layers=3", {"attention_layers": ["global", "local", "global"]}),
        (run_bart_dlm_flax, "bart", "encoder_layers=2", {"num_hidden_layers": 2, "decoder_layers": 12}),
        (run_bart_dlm_flax, "bart", "d_model=100", {"encoder_attention_heads": 1, "decoder_attention_heads": 1}),
    ],
)
def test_what_follows_from_overrides(module, model_type, overrides, expected):
    """Unless it is set itself; and the class reads the configuration back as it is."""
    config = load(module, model_type=model_type, config_overrides=overrides)
    assert {name: getattr(config, name) for name in expected} == expected
    assert type(config)(**config.to_dict()).to_dict() == config.to_dict()


def test_a_head_size_of_mistral_follows_where_it_is_set(tmp_path):
    """As in the configurations of published ones."""
    CONFIG_MAPPING["mistral"](head_dim=128).save_pretrained(tmp_path)
    overrides = "hidden_size=32,num_attention_heads=4,num_key_value_heads=2"
    assert load(run_clm_flax, config_name=str(tmp_path), config_overrides=overrides).head_dim == 8


# ---- Tokenizers that cannot be loaded ------------------------------------------------------------------------------------


def load_tokenizer(path, model_type="roberta", **flags):
    return pretrained.load_tokenizer(arguments.ModelArguments(tokenizer_name=str(path), model_type=model_type, **flags))


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
from flaxlm import arguments, cli, pretrained
for directory, model_type in zip(sys.argv[1::2], sys.argv[2::2]):
    args = arguments.ModelArguments(tokenizer_name=directory, model_type=model_type)
    assert cli.run(lambda: pretrained.load_tokenizer(args), "script.py") == 2
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
