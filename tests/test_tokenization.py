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
from huggingface_hub import HfApi
from huggingface_hub.utils import _http
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2Config, GPT2TokenizerFast

from flaxlm import arguments, tokenization
from tests.conftest import ROOT
from tests.hub_server import serve


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
        ({"tokenizer_class": 5}, "tokenizer_config.json: tokenizer_class=5: must be the name of a class"),
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


SAMPLES = ["Return the 12 values, ﬁrst!", " two  spaces", "<mask> [MASK] <extra_id_0> of </s>", "naïve 模型 THE"]


@pytest.mark.parametrize("name", ["NoSuchTokenizer", "BertTokenizer", "LlamaTokenizer", "T5TokenizerFast"])
def test_a_class_that_is_not_the_tokenizers(name, byte_level_tokenizer, tokenizer_dir, tmp_path):
    """tokenizer.json says it all; and what is saved is read like that by others, too."""
    path = tokenizer_dir / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": name}))
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.save_pretrained(tmp_path / "saved")
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert loaded(SAMPLES).input_ids == byte_level_tokenizer(SAMPLES).input_ids
        assert loaded.mask_token_id == byte_level_tokenizer.mask_token_id


def digits_apart(file: dict) -> None:
    digits = {"type": "Digits", "individual_digits": True}
    file["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, file["pre_tokenizer"]]}


def lower_case(file: dict) -> None:
    file["normalizer"] = {"type": "Lowercase"}


def nothing_around(file: dict) -> None:
    file["post_processor"] = None


@pytest.mark.parametrize("change", [digits_apart, lower_case, nothing_around])
@pytest.mark.parametrize("kind", ["roberta", "bert", "gpt2", "t5", "bart"])
def test_the_file_is_the_tokenizer(kind, change, request, tmp_path):
    """Classes of transformers 5 would read the vocabulary alone; a pad token and the like stay."""
    source = request.getfixturevalue(f"{kind}_dir")
    for path in source.glob("*token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    change(file)
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    tokenizer, before = load_tokenizer(tmp_path, kind), load_tokenizer(source, kind)
    expected = [Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids for text in SAMPLES]
    assert tokenizer(SAMPLES).input_ids == expected
    assert tokenizer.special_tokens_map == before.special_tokens_map
    assert tokenizer.all_special_ids == before.all_special_ids
    assert tokenizer.model_max_length == before.model_max_length
    tokenizer.save_pretrained(tmp_path / "saved")
    for again in (load_tokenizer(tmp_path / "saved", kind), AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert again(SAMPLES).input_ids == expected


@pytest.mark.parametrize(("settings", "changed"), [({"do_lower_case": True}, "the"), ({"do_lower_case": False}, "THE")])
def test_what_tokenizer_config_sets(settings, changed, bert_dir, tmp_path):
    """Lower case and the like may be set beside tokenizer.json."""
    for path in bert_dir.glob("*token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    tokenizer = load_tokenizer(tmp_path, "bert")
    assert type(tokenizer).__name__ == "BertTokenizer"
    assert tokenizer("THE").input_ids == tokenizer(changed).input_ids
    assert ("T" in "".join(tokenizer.tokenize("THE"))) != settings["do_lower_case"]


def test_files_of_transformers_4(byte_level_tokenizer, tokenizer_dir):
    """special_tokens_map.json and added_tokens.json are read."""
    config = {
        "tokenizer_class": "RobertaTokenizer",
        "model_max_length": 64,
        "use_fast": True,
        "clean_up_tokenization_spaces": False,
    }
    (tokenizer_dir / "tokenizer_config.json").write_text(json.dumps(config))
    mask = {"content": "<mask>", "lstrip": True, "normalized": False, "rstrip": False, "single_word": False}
    special = {"bos_token": "<s>", "mask_token": mask, "additional_special_tokens": ["<new>"]}
    (tokenizer_dir / "special_tokens_map.json").write_text(json.dumps(special))
    (tokenizer_dir / "added_tokens.json").write_text(json.dumps({"<new>": 509, "word": 510}))
    tokenizer = load_tokenizer(tokenizer_dir)
    assert tokenizer("Return").input_ids == byte_level_tokenizer("Return").input_ids
    assert tokenizer.convert_tokens_to_ids(["<mask>", "<new>"]) == [4, 509]
    assert {4, 509} <= set(tokenizer.all_special_ids)


def test_use_fast_tokenizer(tokenizer_dir, monkeypatch):
    """There is nothing to choose any more, which is said."""
    said = []
    monkeypatch.setattr(tokenization.logger, "warning", said.append)
    assert load_tokenizer(tokenizer_dir, use_fast_tokenizer=False).is_fast
    assert said == ["--no_use_fast_tokenizer: has no effect, since transformers has one tokenizer of a kind, in Rust."]


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


@pytest.mark.parametrize("model_type", SENTENCEPIECE)
def test_a_sentencepiece_file_alone(model_type, sentencepiece_files, tmp_path):
    """The model's type says what it is for; its pieces are those of the library."""
    path = sentencepiece_files[model_type]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    tokenizer = load_tokenizer(path.parent, model_type)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode("Return the value.", out_type=str)
    text = "Return the value." if model_type != "albert" else "return the value."
    expected = pieces if model_type != "albert" else tokenizer.tokenize(text)
    assert tokenizer.tokenize("Return the value.") == expected
    assert tokenizer.decode(tokenizer("Return the value.").input_ids, skip_special_tokens=True) == text
    start = {"llama": "<s>", "albert": "[CLS]", "xlm-roberta": "<s>"}.get(model_type)
    assert start in (None, tokenizer("Return").tokens()[0])
    tokenizer.save_pretrained(tmp_path)
    for again in (load_tokenizer(tmp_path, model_type), AutoTokenizer.from_pretrained(tmp_path)):
        assert again(text).input_ids == tokenizer(text).input_ids


def test_a_sentencepiece_file_cut_short(sentencepiece_files, refuses, tmp_path):
    for model_type, path in sentencepiece_files.items():
        (tmp_path / model_type).mkdir()
        (tmp_path / model_type / path.name).write_bytes(path.read_bytes()[:1999])
        with refuses("no tokenizer can be loaded: .*cut short or damaged.*" + path.name):
            load_tokenizer(tmp_path / model_type, model_type)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("xglm", "a XGLMTokenizer is read from tokenizer.json, which is not there; load and save it once with transformers 4"),
        ("gemma", "a GemmaTokenizer is read from tokenizer.json, which is not there"),
        ("mbart", "transformers loses the normal form of sentencepiece.bpe.model; load and save it once with transformers 4"),
    ],
)
def test_a_sentencepiece_file_that_would_be_read_wrongly(model_type, reason, sentencepiece_files, refuses, tmp_path):
    """transformers 5 makes a tokenizer without a vocabulary of it, or without its normal form, and says nothing."""
    path = sentencepiece_files["xlm-roberta"]
    name = path.name if model_type != "gemma" else "tokenizer.model"
    (tmp_path / name).write_bytes(path.read_bytes())
    with refuses(f"no tokenizer can be loaded: {reason}"):
        load_tokenizer(tmp_path, model_type)


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
    assert tokenizer.convert_tokens_to_ids(sentinels) == list(range(3, 103))
    assert tokenizer("<extra_id_7> x").input_ids[0] == tokenizer.convert_tokens_to_ids("▁<extra_id_7>")
    import run_t5_mlm_flax

    found = run_t5_mlm_flax.find_sentinel_ids(tokenizer, 100, "--max_seq_length 512")
    assert tokenizer.convert_ids_to_tokens(found.tolist()) == sentinels[::-1]
    assert len(tokenizer) == 500


@pytest.mark.parametrize("keep", [["tokenizer.json"], ["vocab.json", "merges.txt"]])
def test_other_files_alone(keep, byte_level_tokenizer, tokenizer_dir):
    byte_level_tokenizer.backend_tokenizer.model.save(str(tokenizer_dir))
    for path in tokenizer_dir.iterdir():
        if path.name not in keep:
            path.unlink()
    tokenizer = load_tokenizer(tokenizer_dir)
    assert type(tokenizer) is type(byte_level_tokenizer)
    assert tokenizer("Return the value.").input_ids == byte_level_tokenizer("Return the value.").input_ids


# ---- From the Hub --------------------------------------------------------------------------------------------------------


hub = pytest.fixture(serve, name="hub")


@pytest.fixture
def load_pushed(hub, roberta_dir, tmp_path):
    """load_pushed({name: content or None}, **flags): that of a repository like roberta_dir, but for these files."""
    api = HfApi(token="hf_good")

    def call(changes: dict[str, str | None], **flags):
        api.create_repo("model", exist_ok=True, private=True)
        files = {path.name: path.read_text() for path in roberta_dir.iterdir()} | changes
        for name, content in files.items():
            if content is not None:
                api.upload_file(path_or_fileobj=content.encode(), path_in_repo=name, repo_id="tester/model")
        flags = {"token": "hf_good", "cache_dir": str(tmp_path / "cache")} | flags
        return load_tokenizer("tester/model", None, **flags)

    return call


def test_a_tokenizer_of_the_hub(load_pushed, byte_level_tokenizer):
    """With a class that is not its own; without a configuration."""
    for changes in ({}, {"tokenizer_config.json": '{"tokenizer_class": "T5Tokenizer", "mask_token": "<mask>"}'}):
        assert load_pushed(changes)(SAMPLES).input_ids == byte_level_tokenizer(SAMPLES).input_ids


@pytest.mark.parametrize(
    ("changes", "flags", "reason"),
    [
        ({"tokenizer.json": "[1, 2]"}, {}, "tokenizer.json is damaged, or newer than tokenizers"),
        ({"tokenizer.json": "{"}, {}, "tokenizer.json is damaged"),
        ({"tokenizer.json": '{"model": {"type": "Newer"}}'}, {}, "tokenizer.json is damaged, or newer"),
        ({"tokenizer_config.json": "[1, 2]"}, {}, "."),
        ({"tokenizer_config.json": "{"}, {}, "."),
        ({"tokenizer.json": None, "tokenizer_config.json": None}, {}, "a RobertaTokenizer is read from vocab.json, merges.txt"),
        ({}, {"token": "hf_bad"}, "there is no such directory, and no repository of that name which this token"),
        ({}, {"model_revision": "0" * 40}, "."),
        (
            {"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["mine.Mine", null]}}', "mine.py": "1 / 0"},
            {"trust_remote_code": True}, "division by zero",
        ),
        ({"tekken.json": "{}", "tokenizer.json": None}, {}, "."),
    ],
)  # fmt: skip
def test_a_tokenizer_of_the_hub_that_is_none(changes, flags, reason, load_pushed, refuses, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with refuses(rf"^--tokenizer_name tester/model: no tokenizer can be loaded: .*{reason}"):
        load_pushed(changes, **flags)


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_a_hub_in_trouble(status, hub, refuses, monkeypatch):
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    hub.fail("GET", "/resolve/|/revision/|/api/models", status, times=1000)
    hub.fail("HEAD", "/resolve/", status, times=1000)
    with refuses(rf"^--tokenizer_name tester/model: no tokenizer can be loaded: .* \(HTTP {status}\)$"):
        load_tokenizer("tester/model", None, token="hf_good")


def test_a_hub_that_answers_with_something_else(hub, refuses):
    hub.garble("/", times=1000)
    with refuses("^--tokenizer_name tester/model: no tokenizer can be loaded: ."):
        load_tokenizer("tester/model", None, token="hf_good")
