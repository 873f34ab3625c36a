# SPDX-License-Identifier: Apache-2.0
"""prepare_model_dir.py: the directory it writes is right when loaded, for every model type, and mistakes are named."""

import bz2
import gzip
import json
import lzma
import os
import random
import re
import shutil
import unicodedata
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    GPT2Config,
    ModernBertConfig,
    MT5Config,
    RobertaConfig,
    T5Config,
)

import prepare_model_dir
from flaxlm import arguments, tokenization
from prepare_model_dir import FAMILIES
from tests.conftest import ROOT

BYTE_LEVEL = ("roberta", "modernbert", "gpt2", "bart")
UNIGRAM = ("t5", "mt5")
VOCAB_SIZE = 700  # no multiple of 64
POSITIONS = 66
SMALL = dict.fromkeys(FAMILIES, f"hidden_size=32,max_position_embeddings={POSITIONS}") | dict.fromkeys(
    UNIGRAM, "hidden_size=32"
)
NASTY = (
    " leading, double  and trailing ",
    "tab\tnew\nline\r\nno-break\u00a0space\u2028line separator\u3000ideographic",
    "naïve ﬁancée, İstanbul, Straße; combining: e\u0301 a\u0308",
    "中文字符 日本語テスト 한국어 العربية עברית ไทย हिन्दी",
    "👩‍👩‍👧‍👦 🏳️‍🌈 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff \ufeff\ufffd\u0000\u001b[0m",
    "it 's n't do n't . , ! ? they 're",  # spaces that clean_up_tokenization_spaces would eat
    "",
)  # fmt: skip


def prepare(output_dir: Path, corpus: Path, *flags, model_type: str | None = "roberta", vocab_size: int = VOCAB_SIZE) -> Path:
    """Run the script in this process; returns the directory."""
    argv = ["--output_dir", output_dir, "--train_file", corpus, "--vocab_size", vocab_size, *flags]
    argv += ["--model_type", model_type] if model_type else []
    prepare_model_dir.main([str(part) for part in argv])
    return output_dir


@pytest.fixture(autouse=True, scope="module")
def no_progress_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def model_dirs(corpus, tmp_path_factory) -> dict[str, Path]:
    """One directory for every model type."""
    root = tmp_path_factory.mktemp("models")
    return {name: prepare(root / name, corpus, "--config_overrides", SMALL[name], model_type=name) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request, model_dirs) -> tuple[str, Path]:
    """Model type and directory, for every model type."""
    return request.param, model_dirs[request.param]


@pytest.fixture(scope="module")
def few_texts(texts, tmp_path_factory) -> Path:
    """A file of 60 paragraphs, for tests that train often."""
    path = tmp_path_factory.mktemp("few") / "few.txt"
    path.write_text("\n".join(texts[:60]) + "\n", "utf-8")
    return path


# ---- The tokenizer, loaded again -----------------------------------------------------------------------------------------


def test_special_tokens_surround_texts(family):
    """Defect 68: the tokenizers of the old README put nothing around texts, so documents ran into each other."""
    name, path = family
    tokenizer = AutoTokenizer.from_pretrained(path)
    first, second = (tokenizer(text, add_special_tokens=False).input_ids for text in ("The first text.", "And another."))
    bos, eos, cls, sep = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id
    single, pair = {
        "roberta": ([bos, *first, eos], [bos, *first, eos, eos, *second, eos]),
        "bart": ([bos, *first, eos], [bos, *first, eos, eos, *second, eos]),
        **dict.fromkeys(("bert", "modernbert"), ([cls, *first, sep], [cls, *first, sep, *second, sep])),
        "gpt2": (first, first + second),
        **dict.fromkeys(UNIGRAM, ([*first, eos], [*first, eos, *second, eos])),
    }[name]
    assert tokenizer("The first text.").input_ids == single
    assert tokenizer("The first text.", "And another.").input_ids == pair
    mask = tokenizer("The first text.", return_special_tokens_mask=True).special_tokens_mask
    assert [bool(flag) for flag in mask] == [token_id in (bos, eos, cls, sep) for token_id in single]


def test_special_ids_are_those_of_the_published_models(family):
    name, path = family
    vocabulary = AutoTokenizer.from_pretrained(path).get_vocab()
    first = sorted(vocabulary, key=vocabulary.get)[:5]
    roberta, bert = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    expected = {"roberta": roberta, "bart": roberta, "bert": bert, "modernbert": bert}
    assert first == expected.get(name, first)
    assert first[:3] == ["<pad>", "</s>", "<unk>"] or name not in UNIGRAM
    assert first[0] == "<|endoftext|>" or name != "gpt2"


def test_others_read_it_alike(family):
    """AutoTokenizer of transformers 5, tokenizer.json by itself, and a training script."""
    name, path = family
    kinds = {"roberta": "RobertaTokenizer", "bart": "RobertaTokenizer", "bert": "BertTokenizer", "gpt2": "GPT2Tokenizer"}
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert type(tokenizer).__name__ == kinds.get(name, "TokenizersBackend")
    ours = tokenization.load_tokenizer(arguments.ModelArguments(tokenizer_name=str(path)))
    assert type(ours) is type(tokenizer)
    file = Tokenizer.from_file(str(path / "tokenizer.json"))
    for text in ("Return the first argument that isn't None: 3.14, ﬁve.", *NASTY):
        assert tokenizer(text).input_ids == ours(text).input_ids == file.encode(text).ids
    assert tokenizer.all_special_ids == ours.all_special_ids
    assert set(os.listdir(path)) == {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_the_limit_is_that_of_the_model(family):
    """Defect 68: model_max_length was 1e30. RoBERTa numbers positions from pad_token_id + 1, so it has two fewer."""
    name, path = family
    limit = AutoTokenizer.from_pretrained(path).model_max_length
    if name in UNIGRAM:
        assert limit > 1e9  # relative positions
    else:
        assert limit == (POSITIONS - 2 if name == "roberta" else POSITIONS)


@pytest.mark.parametrize("name", BYTE_LEVEL)
@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_any_text_comes_back(model_dirs, name, text):
    tokenizer = AutoTokenizer.from_pretrained(model_dirs[name])
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<|endoftext|>" not in text))
def test_any_generated_text_comes_back(model_dirs, text):
    tokenizer = load_once(model_dirs["gpt2"])
    token_ids = tokenizer(text).input_ids
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.unk_token_id not in token_ids


def load_once(path: Path, loaded: dict = {}):  # noqa: B006 (the cache)
    if path not in loaded:
        loaded[path] = AutoTokenizer.from_pretrained(path)
    return loaded[path]


def test_every_id_has_an_embedding(family):
    """Defects 68 and 76: GPT-2's <|endoftext|> had the id vocab_size, whose embedding reads as NaN."""
    _, path = family
    tokenizer, config = AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path)
    everything = "".join(map(chr, filter(lambda point: not 0xD800 <= point < 0xE000, range(0, 0x110000, 61))))
    token_ids = [*tokenizer([everything, *NASTY]).input_ids, tokenizer.all_special_ids, list(tokenizer.get_vocab().values())]
    assert max(map(max, filter(None, token_ids))) < config.vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_the_vocabulary_was_learned_from_the_text(family, texts):
    _, path = family
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) == VOCAB_SIZE
    assert sum(map(len, tokenizer(texts[:50]).input_ids)) < 0.6 * sum(map(len, texts[:50]))


@pytest.mark.parametrize("name", ("roberta", "bart", "bert", "modernbert"))
def test_a_mask_takes_the_place_of_a_word(model_dirs, name):
    """<mask> takes in the space before it, as in the published models; [MASK] stands between words that are apart anyway."""
    tokenizer = AutoTokenizer.from_pretrained(model_dirs[name])
    masked, before = tokenizer(f"Return {tokenizer.mask_token} value").input_ids, tokenizer("Return").input_ids[:-1]
    assert masked[len(before)] == tokenizer.mask_token_id
    assert masked[: len(before)] == before


def test_bert_keeps_case_unless_told_otherwise(few_texts, tmp_path):
    """Defect 62: the old tokenizer script lower-cased whatever it was given."""
    cased = AutoTokenizer.from_pretrained(prepare(tmp_path / "cased", few_texts, model_type="bert"))
    uncased = AutoTokenizer.from_pretrained(prepare(tmp_path / "uncased", few_texts, "--lowercase", model_type="bert"))
    assert cased.tokenize("THE") != cased.tokenize("the")
    assert uncased.tokenize("THÉ") == uncased.tokenize("the")
    assert not any(token[0].isupper() for token in uncased.get_vocab())


def test_bert_alphabet_has_no_useless_pieces(few_texts, tmp_path):
    """Characters that always stand alone (punctuation, Chinese) are not entered a second time with ##."""
    path = tmp_path / "text.txt"
    path.write_text(few_texts.read_text("utf-8") + "模型预测 (词语), é\n", "utf-8")
    vocabulary = AutoTokenizer.from_pretrained(prepare(tmp_path / "out", path, model_type="bert")).get_vocab()
    assert {"模", "(", "é", "##é", "a", "##a"} <= vocabulary.keys()
    assert not {"##模", "##(", "##,"} & vocabulary.keys()
    assert not any(unicodedata.category(token[-1]).startswith("Z") for token in vocabulary)


# ---- The configuration ---------------------------------------------------------------------------------------------------


def test_the_configuration_fits_the_tokenizer(family):
    """Defect 60: the vocabulary was forced to len(tokenizer), which is rarely a multiple of 64."""
    name, path = family
    tokenizer, config = AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path)
    classes = {"roberta": RobertaConfig, "bert": BertConfig, "gpt2": GPT2Config, "bart": BartConfig}
    assert type(config) is (classes | {"t5": T5Config, "mt5": MT5Config, "modernbert": ModernBertConfig})[name]
    assert config.vocab_size == 704
    assert config.hidden_size == 32
    assert config.hidden_size % config.num_attention_heads == 0
    around = {"bos_token_id": "cls_token_id", "eos_token_id": "sep_token_id"} if name == "modernbert" else {}
    for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(config, field) == getattr(tokenizer, around.get(field, field))
    written = json.loads((path / "config.json").read_text("utf-8"))
    assert "architectures" not in written


def test_configuration_ids_of_each_type(model_dirs):
    written = {name: json.loads((path / "config.json").read_text("utf-8")) for name, path in model_dirs.items()}
    ids = {name: {k: v for k, v in fields.items() if k.endswith("_token_id")} for name, fields in written.items()}
    three = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    none = dict.fromkeys(three)
    assert ids == {
        "roberta": three,
        "bert": none | {"pad_token_id": 0},
        "modernbert": {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3},
        "gpt2": none | {"bos_token_id": 0, "eos_token_id": 0},
        "bart": three | {"decoder_start_token_id": 2, "forced_eos_token_id": 2},
        **{key: none | {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1} for key in UNIGRAM},
    }


def test_a_larger_vocabulary_asked_for_wins(few_texts, tmp_path):
    path = prepare(tmp_path / "out", few_texts, "--config_overrides", "vocab_size=1001")
    assert AutoConfig.from_pretrained(path).vocab_size == 1001


def test_config_name_is_the_base(few_texts, tmp_path):
    """Its sizes stay, its ids and its architecture do not: they belong to another tokenizer and to its weights."""
    base = BartConfig(d_model=64, vocab_size=9, pad_token_id=7, forced_eos_token_id=8, architectures=["BartModel"])
    base.to_json_file(tmp_path / "config.json")
    path = prepare(tmp_path / "out", few_texts, "--config_name", tmp_path, model_type=None)
    config = AutoConfig.from_pretrained(path)
    assert (config.model_type, config.d_model, config.vocab_size) == ("bart", 64, 704)
    assert (config.pad_token_id, config.forced_eos_token_id, config.architectures) == (1, 2, None)


# ---- T5 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNIGRAM)
def test_sentinels_are_the_highest_ids_backwards(model_dirs, name):
    """Defect 55: the old README added them forwards, so the first span got <extra_id_99>."""
    tokenizer = AutoTokenizer.from_pretrained(model_dirs[name])
    sentinels = [f"<extra_id_{i}>" for i in range(100)]
    assert tokenizer.convert_tokens_to_ids(sentinels) == [VOCAB_SIZE - 1 - i for i in range(100)]
    assert set(sentinels) <= set(tokenizer.all_special_tokens)
    token_ids = tokenizer("Return <extra_id_0> value<extra_id_1>").input_ids
    assert [i for i in token_ids if i >= VOCAB_SIZE - 100] == [VOCAB_SIZE - 1, VOCAB_SIZE - 2]
    assert tokenizer.decode(token_ids, skip_special_tokens=True).split() == ["Return", "value"]


def test_t5_keeps_case_unless_told_otherwise(few_texts, tmp_path):
    """Defect 62."""
    cased = AutoTokenizer.from_pretrained(prepare(tmp_path / "cased", few_texts, model_type="t5"))
    uncased = AutoTokenizer.from_pretrained(prepare(tmp_path / "uncased", few_texts, "--lowercase", model_type="t5"))
    assert cased.tokenize("THE") != cased.tokenize("the")
    assert uncased.tokenize("THE") == uncased.tokenize("the")


def test_t5_with_mode_tokens(few_texts, tmp_path):
    """The tokens that UL2 needs are single pieces, and <extra_id_0> still is the last entry."""
    tokenizer = AutoTokenizer.from_pretrained(prepare(tmp_path / "out", few_texts, "--mode_tokens", model_type="t5"))
    assert tokenizer.tokenize("[NLG] some")[0] == "[NLG]"
    vocab = tokenizer.get_vocab()
    assert max(vocab, key=vocab.get) == "<extra_id_0>"
    assert {"[NLU]", "[NLG]", "[S2S]"} <= vocab.keys()


def test_gpt2_with_fim_tokens(few_texts, tmp_path):
    """The tokens that --fim_rate needs are single ones, within the size asked for."""
    tokenizer = AutoTokenizer.from_pretrained(prepare(tmp_path / "out", few_texts, "--fim_tokens", model_type="gpt2"))
    names = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>"]
    assert tokenizer.convert_tokens_to_ids(names) == [1, 2, 3]
    assert tokenizer("".join(names))["input_ids"] == [1, 2, 3]
    assert set(names) <= set(tokenizer.all_special_tokens)
    assert len(tokenizer) <= VOCAB_SIZE


def test_t5_is_the_base_size_of_its_second_version(few_texts, tmp_path):
    """Entries and embeddings, by default, are those of google/t5-v1_1-base and google/mt5-small too."""
    config = AutoConfig.from_pretrained(prepare(tmp_path / "out", few_texts, model_type="t5"))
    sizes = (config.d_model, config.d_kv, config.d_ff, config.num_layers, config.num_decoder_layers, config.num_heads)
    assert sizes == (768, 64, 2048, 12, 12, 12)
    assert (config.feed_forward_proj, config.is_gated_act, config.dense_act_fn) == ("gated-gelu", True, "gelu_new")
    assert not config.scale_decoder_outputs  # what transformers 5 makes of embeddings that are not tied
    assert [-(-FAMILIES[name].vocab_size // 64) * 64 for name in UNIGRAM] == [32128, 250112]


@pytest.mark.parametrize(
    "name, overrides, expected",
    [
        ("t5", "num_layers=4", {"num_layers": 4, "num_decoder_layers": 4}),
        ("t5", "num_hidden_layers=4", {"num_layers": 4, "num_decoder_layers": 4}),
        ("t5", "num_layers=4,num_decoder_layers=2", {"num_layers": 4, "num_decoder_layers": 2}),
        ("t5", "num_decoder_layers=2", {"num_layers": 12, "num_decoder_layers": 2}),
        ("t5", "feed_forward_proj=relu", {"is_gated_act": False, "dense_act_fn": "relu"}),
        ("t5", "d_model=96,num_heads=5,d_kv=8,d_ff=40", {"d_model": 96, "num_heads": 5, "d_kv": 8, "d_ff": 40}),
        ("t5", "d_model=256", {"d_model": 256, "num_heads": 4}),
        ("mt5", "dropout_rate=0", {"d_model": 512, "num_heads": 6, "dropout_rate": 0.0, "num_layers": 8}),
    ],
)  # fmt: skip
def test_overrides_of_t5(name, overrides, expected):
    """Also fields that the class derives from others only when it makes a configuration."""
    args = prepare_model_dir.PrepareArguments("out", model_type=name, config_overrides=overrides)
    config = prepare_model_dir.load_base_config(args)
    assert {field: getattr(config, field) for field in expected} == expected
    assert type(config)(**config.to_dict()).to_dict() == config.to_dict()


def test_a_decoder_of_another_depth_is_kept(tmp_path):
    T5Config(num_layers=6, num_decoder_layers=2).to_json_file(tmp_path / "config.json")
    args = prepare_model_dir.PrepareArguments("out", config_name=str(tmp_path), config_overrides="num_layers=4")
    config = prepare_model_dir.load_base_config(args)
    assert (config.num_layers, config.num_decoder_layers) == (4, 2)


def test_log_of_t5(few_texts, tmp_path, capsys):
    out = prepare(tmp_path / "out", few_texts, model_type="t5", vocab_size=20000)
    log = capsys.readouterr().err
    assert f"run_t5_mlm_flax.py --config_name {out} --tokenizer_name {out}" in log
    assert "embeddings; rows of any length" in log
    assert "a lower --vocab_size.\n" in log


def test_t5_alone_in_a_folder(few_texts, tmp_path, run_script):
    """Copied without the tokenizer's file, the script says what it needs."""
    script = shutil.copy(prepare_model_dir.__file__, tmp_path)
    flags = ("--model_type", "t5", "--train_file", few_texts, "--output_dir", "out")
    shutil.copytree(ROOT / "flaxlm", tmp_path / "flaxlm")
    result = run_script(script, *flags, cwd=tmp_path)
    assert result.returncode == 2
    assert "error: --model_type t5: needs t5_tokenizer_model.py" in result.stderr.splitlines()[-1]


# ---- Text ----------------------------------------------------------------------------------------------------------------


def write_formats(directory: Path, rows: list[str]) -> dict[str, list[str]]:
    """The same rows in every format; returns the flags that name each."""
    records = [{"title": "x", "body": row} for row in rows]
    jsonl = "".join(json.dumps(record) + "\n" for record in records).encode()
    dataset = datasets.Dataset.from_list(records)
    files = {"a.json": json.dumps(records).encode(), "a.jsonl": jsonl}
    files |= {"a.jsonl.gz": gzip.compress(jsonl), "a.jsonl.bz2": bz2.compress(jsonl), "a.jsonl.xz": lzma.compress(jsonl)}
    for name, content in files.items():
        (directory / name).write_bytes(content)
    dataset.to_csv(directory / "a.csv")
    dataset.to_parquet(directory / "a.parquet")
    (directory / "hub").mkdir()
    (directory / "hub" / "train.jsonl").write_bytes(jsonl)
    dataset.save_to_disk(directory / "saved")
    datasets.DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(directory / "saved_dict")
    flags = {name: ["--train_file", str(directory / name)] for name in (*files, "a.csv", "a.parquet")}
    flags |= {name: ["--dataset_name", str(directory / name)] for name in ("hub", "saved", "saved_dict")}
    return {name: [*given_by, "--text_column_name", "body"] for name, given_by in flags.items()}


def test_all_formats_give_the_same_tokenizer(few_texts, tmp_path):
    rows = few_texts.read_text("utf-8").splitlines()
    expected = (prepare(tmp_path / "txt", few_texts, vocab_size=400) / "tokenizer.json").read_bytes()
    for name, flags in write_formats(tmp_path, rows).items():
        out = tmp_path / "out" / name
        prepare_model_dir.main([*flags, "--model_type", "roberta", "--vocab_size", "400", "--output_dir", str(out)])
        assert (out / "tokenizer.json").read_bytes() == expected, name


def test_several_files_and_encodings(few_texts, tmp_path, capsys):
    """A directory of parts in another encoding makes the tokenizer of the whole; the command to go on with names both."""
    lines = few_texts.read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "parts").mkdir()
    for number, part in enumerate((lines[:20], lines[20:])):
        (tmp_path / "parts" / f"{number}.txt").write_text("".join(part), "utf-16")
    prepare(tmp_path / "whole", few_texts)
    prepare(tmp_path / "several", tmp_path / "parts", "--encoding", "utf-16")
    assert f"--train_file {tmp_path / 'parts'} --encoding utf-16 --output_dir ..." in capsys.readouterr().err
    parts = [tmp_path / "parts" / f"{number}.txt" for number in (0, 1)]
    prepare(tmp_path / "both", few_texts, "--train_file", *parts, "--encoding", "utf-16")
    for name in ("several", "both"):
        assert (tmp_path / name / "tokenizer.json").read_bytes() == (tmp_path / "whole" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", FAMILIES)
def test_same_text_same_files(name, few_texts, tmp_path):
    """Also for WordPiece, whose trainer numbers characters in the order of a hash table."""
    paths = [prepare(tmp_path / part, few_texts, model_type=name) for part in "ab"]
    for file in sorted(os.listdir(paths[0])):
        assert (paths[0] / file).read_bytes() == (paths[1] / file).read_bytes()
    assert sorted(os.listdir(paths[0])) == sorted(os.listdir(paths[1]))


def test_rows_are_drawn_at_random_from_all_of_the_data(tmp_path):
    """With the seed: again the same ones; with another seed, others."""
    words = random.Random(0).sample([f"{a}{b}{c}" for a in "bdfg" for b in "aeiou" for c in "klmnprst"], 60)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{word} {word}\n" for word in words[:30] for _ in range(20)) + "omega omega\n" * 600, "utf-8")
    flags = ("--max_train_samples", "40", "--seed")
    paths = [prepare(tmp_path / f"out{i}", text, *flags, seed) for i, seed in enumerate(("1", "1", "2"))]
    first, again, other = (json.loads((path / "tokenizer.json").read_text("utf-8"))["model"]["merges"] for path in paths)
    assert first == again != other
    vocabulary = AutoTokenizer.from_pretrained(paths[0]).get_vocab()
    assert "omega" in vocabulary
    assert 1 <= sum(word in vocabulary for word in words) < 30


def test_a_small_corpus_is_said_to_be_small(few_texts, tmp_path, capsys):
    path = prepare(tmp_path / "out", few_texts, vocab_size=50000)
    reached = len(AutoTokenizer.from_pretrained(path))
    assert 300 < reached < 5000
    log = capsys.readouterr().err
    assert f"Vocabulary: {reached} entries of 50000 asked for" in log
    assert "The text is too small" in log
    assert AutoConfig.from_pretrained(path).vocab_size == -(-reached // 64) * 64


def test_min_frequency(few_texts, tmp_path):
    sizes = [len(AutoTokenizer.from_pretrained(prepare(tmp_path / n, few_texts, "--min_frequency", n))) for n in ("2", "50")]
    assert sizes[0] == VOCAB_SIZE
    assert sizes[1] < VOCAB_SIZE


def test_cache_dir_is_used(few_texts, tmp_path):
    prepare(tmp_path / "out", few_texts, "--cache_dir", tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*.arrow"))


# ---- The directory -------------------------------------------------------------------------------------------------------


def test_overwriting_leaves_no_file_of_another_type(few_texts, tmp_path):
    out = prepare(tmp_path / "out", few_texts)
    for name in ("README.md", "added_tokens.json"):
        (out / name).write_text("{}")
    prepare(out, few_texts, "--overwrite_output_dir", model_type="bert")
    assert set(os.listdir(out)) == {"config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert type(AutoTokenizer.from_pretrained(out)).__name__ == "BertTokenizer"
    (out / "vocab.txt").touch()
    prepare(out, few_texts, "--overwrite_output_dir", model_type="gpt2")
    assert not (out / "vocab.txt").exists()
    assert type(AutoTokenizer.from_pretrained(out)).__name__ == "GPT2Tokenizer"


def test_a_run_that_fails_changes_nothing(few_texts, tmp_path, error_of):
    out = prepare(tmp_path / "out", few_texts)
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n\n")
    error_of(prepare, out, blank, "--overwrite_output_dir")
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before


def test_weights_are_not_deprived_of_their_tokenizer(few_texts, tmp_path, error_of):
    out = prepare(tmp_path / "out", few_texts)
    (out / "model.safetensors").write_bytes(b"weights")
    assert f"--output_dir {out}: model.safetensors" in error_of(prepare, out, few_texts, "--overwrite_output_dir")


def test_log_says_how_to_go_on_and_keeps_the_token(few_texts, tmp_path, capsys):
    out = prepare(tmp_path / "my out", few_texts, "--token", "hf_secret", model_type="bart")
    log = capsys.readouterr().err
    assert f"run_bart_dlm_flax.py --config_name '{out}' --tokenizer_name '{out}' --train_file {few_texts}" in log
    assert "hf_secret" not in log
    assert not any(b"hf_secret" in (out / name).read_bytes() for name in os.listdir(out))


def test_alone_in_a_folder_with_a_json_file(few_texts, tmp_path, run_script):
    """The script, copied away from all others, in a process of its own; flags after the file override it."""
    script = Path(shutil.copy(prepare_model_dir.__file__, tmp_path / "copy.of.it.py"))
    arguments = {"model_type": "bert", "train_file": str(few_texts), "vocab_size": 500, "output_dir": "out", "lowercase": True}
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    result = run_script(script, "arguments.json", "--vocab_size", 600, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == 600
    assert tokenizer.do_lower_case
    assert re.search(r"To train from it: python run_mlm_flax.py .*", result.stderr.splitlines()[-1])


# ---- Mistakes ------------------------------------------------------------------------------------------------------------

TEXT = ["--train_file", "text.txt"]
ROBERTA = ["--model_type", "roberta"]
T5 = ["--model_type", "t5"]
MISTAKES = {
    "no data": (ROBERTA, "--train_file or --dataset_name"),
    "two sources": ([*ROBERTA, *TEXT, "--dataset_name", "x"], "--train_file and --dataset_name"),
    "file missing": ([*ROBERTA, "--train_file", "nowhere.txt"], "--train_file nowhere.txt: no such file"),
    "file empty": ([*ROBERTA, "--train_file", "empty.txt"], "--train_file empty.txt: is empty"),
    "suffix unknown": ([*ROBERTA, "--train_file", "text.doc"], "--train_file text.doc: unknown suffix"),
    "file broken": ([*ROBERTA, "--train_file", "broken.csv"], "--train_file broken.csv: is empty or cannot be read as csv"),
    "column missing": ([*ROBERTA, *TEXT, "--text_column_name", "body"], "--text_column_name body"),
    "no text column": ([*ROBERTA, "--train_file", "numbers.csv"], "--text_column_name"),
    "no text": ([*ROBERTA, "--train_file", "blank.txt"], "--train_file blank.txt: has no text"),
    "no text in a dataset": ([*ROBERTA, "--dataset_name", "blanks"], "--dataset_name blanks: has no text"),
    "no train split": ([*ROBERTA, "--dataset_name", "only_test"], "--dataset_name only_test: has no train split"),
    "dataset broken": ([*ROBERTA, "--dataset_name", "broken"], "train.csv: is empty or cannot be read as csv: row 1 opens"),
    "surplus fields in a dataset": ([*ROBERTA, "--dataset_name", "surplus"], "read as csv: row 1 (line 2) has 2 fields"),
    "dataset unreachable": ([*ROBERTA, "--dataset_name", "nobody/none"], "--dataset_name nobody/none: cannot be loaded"),
    "dataset part alone": ([*ROBERTA, *TEXT, "--dataset_config_name", "x"], "--dataset_config_name"),
    "no type": (TEXT, "--model_type (roberta, bert, modernbert, gpt2, bart, t5, mt5) or --config_name"),
    "type unknown": ([*TEXT, "--model_type", "rnn"], "--model_type rnn: not supported; choose roberta, bert, modernbert"),
    "type known elsewhere": ([*TEXT, "--model_type", "llama"], "--model_type llama: not supported"),
    "config unreachable": ([*TEXT, "--config_name", "nobody/none"], "--config_name nobody/none: no configuration"),
    "config of no such type": ([*TEXT, "--config_name", "llama"], "--config_name llama: type llama is not supported"),
    "types disagree": ([*TEXT, *ROBERTA, "--config_name", "bert"], "--model_type roberta: but --config_name bert"),
    "no key=value": ([*ROBERTA, *TEXT, "--config_overrides", "hidden_size"], "hidden_size: write key=value"),
    "key unknown": ([*ROBERTA, *TEXT, "--config_overrides", "hiden_size=3"], "--config_overrides hiden_size"),
    "value of another type": ([*ROBERTA, *TEXT, "--config_overrides", "hidden_size=big"], "hidden_size takes a whole number"),
    "heads": (
        [*ROBERTA, *TEXT, "--config_overrides", "hidden_size=100,num_attention_heads=3"],
        "--config_overrides num_attention_heads=3: does not divide the hidden size, 100",
    ),
    "heads of the decoder": (
        [*TEXT, "--model_type", "bart", "--config_overrides", "d_model=64,decoder_attention_heads=7"],
        "--config_overrides decoder_attention_heads=7",
    ),
    "no layers": ([*ROBERTA, *TEXT, "--config_overrides", "num_hidden_layers=0"], "--config_overrides num_hidden_layers=0"),
    "no positions": (
        [*ROBERTA, *TEXT, "--config_overrides", "max_position_embeddings=2"],
        "--config_overrides max_position_embeddings=2",
    ),
    "layers of bart": (
        [*TEXT, "--model_type", "bart", "--config_overrides", "num_hidden_layers=2"],
        "--config_overrides num_hidden_layers: would leave the decoder as it is; set encoder_layers",
    ),
    "ids are fixed": ([*ROBERTA, *TEXT, "--config_overrides", "pad_token_id=5"], "--config_overrides pad_token_id"),
    "embeddings too few": (
        [*ROBERTA, *TEXT, "--vocab_size", "500", "--config_overrides", "vocab_size=499"],
        "--config_overrides vocab_size=499",
    ),
    "no room for bytes": ([*ROBERTA, *TEXT, "--vocab_size", "260"], "--vocab_size 260: too small"),
    "no room for bytes, gpt2": ([*TEXT, "--model_type", "gpt2", "--vocab_size", "256"], "--vocab_size 256: too small"),
    "no room for characters": ([*TEXT, "--model_type", "bert", "--vocab_size", "10"], "--vocab_size 10: too small"),
    "vocab_size negative": ([*ROBERTA, *TEXT, "--vocab_size", "-1"], "--vocab_size -1: must be at least 1"),
    "no rows": ([*ROBERTA, *TEXT, "--max_train_samples", "0"], "--max_train_samples 0: must be at least 1"),
    "min_frequency": ([*ROBERTA, *TEXT, "--min_frequency", "0"], "--min_frequency 0: must be at least 1"),
    "seed": ([*ROBERTA, *TEXT, "--seed", "-1"], "--seed -1: must be at least 0"),
    "no room for characters, t5": ([*TEXT, *T5, "--vocab_size", "110"], "--vocab_size 110: too small; special tokens and the"
        " characters of this text take 111"),
    "no room for sentinels": ([*TEXT, *T5, "--vocab_size", "100"], "--vocab_size 100: too small"),
    "mode tokens of bert": ([*TEXT, "--model_type", "bert", "--mode_tokens"], "--mode_tokens: only t5 and mt5"),
    "fim tokens of bert": ([*TEXT, "--model_type", "bert", "--fim_tokens"], "--fim_tokens: only causal models"),
    "no room for bytes, fim": ([*TEXT, "--model_type", "gpt2", "--fim_tokens", "--vocab_size", "259"], "259: too small"),
    "min_frequency of t5": ([*TEXT, *T5, "--min_frequency", "3"], "--min_frequency 3: has no effect here"),
    "derived": ([*TEXT, *T5, "--config_overrides", "is_gated_act=no"], "is_gated_act: follows from feed_forward_proj"),
    "activation": ([*TEXT, *T5, "--config_overrides", "feed_forward_proj=a-b"], "--config_overrides feed_forward_proj=a-b"),
    "heads of t5": ([*TEXT, *T5, "--config_overrides", "num_heads=0"], "--config_overrides num_heads=0: must be a whole"),
    "width of heads": ([*TEXT, *T5, "--config_overrides", "d_kv=0"], "--config_overrides d_kv=0: must be a whole"),
    "buckets": (
        [*TEXT, *T5, "--config_overrides", "relative_attention_num_buckets=2"], "relative_attention_num_buckets=2: must"
    ),
    "distance": (
        [*TEXT, *T5, "--config_overrides", "relative_attention_max_distance=16"], "max_distance=16: must be at least 17"
    ),
    "lowercase": ([*ROBERTA, *TEXT, "--lowercase"], "--lowercase"),
    "activation unknown": ([*ROBERTA, *TEXT, "--config_overrides", "hidden_act=foo"], "hidden_act=foo: must be one of gelu,"),
    "activation of t5": ([*TEXT, *T5, "--config_overrides", "feed_forward_proj=gated-foo"], "feed_forward_proj=gated-foo: "),
    "no width": ([*ROBERTA, *TEXT, "--config_overrides", "hidden_size=0"], "hidden_size=0: must be a whole number, at least 1"),
    "layers below none": ([*ROBERTA, *TEXT, "--config_overrides", "num_hidden_layers=-1"], "num_hidden_layers=-1: must"),
    "no vocabulary": ([*ROBERTA, *TEXT, "--config_overrides", "vocab_size=0"], "vocab_size=0: must be a whole number"),
    "dropout": ([*TEXT, "--model_type", "bart", "--config_overrides", "dropout=1.5"], "dropout=1.5: must be a number"),
    "dropout of t5": ([*TEXT, *T5, "--config_overrides", "dropout_rate=1"], "dropout_rate=1.0: must be a number from 0 to"),
    "dropout of gpt2": ([*TEXT, "--model_type", "gpt2", "--config_overrides", "attn_pdrop=-1"], "attn_pdrop=-1.0: must be"),
    "heads of gpt2": (
        [*TEXT, "--model_type", "gpt2", "--config_overrides", "n_embd=64,n_head=7"],
        "--config_overrides n_head=7: does not divide the hidden size, 64",
    ),
    "epsilon": ([*ROBERTA, *TEXT, "--config_overrides", "layer_norm_eps=nan"], "layer_norm_eps=NaN: must be a number"),
    "an encoder alone": ([*ROBERTA, *TEXT, "--config_overrides", "is_encoder_decoder=yes"], "is_encoder_decoder=true: must be"),
    "inner size": ([*TEXT, "--model_type", "gpt2", "--config_overrides", "n_inner=wide"], "n_inner=wide: must be"),
    "config is a list": ([*TEXT, "--config_name", "list"], "--config_name list: config.json must hold one JSON object"),
    "config is cut": ([*TEXT, "--config_name", "cut"], "--config_name cut: config.json cannot be read as JSON"),
    "config with text for a number": ([*TEXT, "--config_name", "text"], "--config_name text: config.json: hidden_size=wide"),
    "config with heads that don't fit": (
        [*TEXT, "--config_name", "heads"],
        "--config_name heads: config.json: num_attention_heads=5: does not divide the hidden size, 64",
    ),
    "config with code of its own": ([*TEXT, "--config_name", "code"], "it comes with code of its own, which is not run"),
    "directory full": ([*ROBERTA, *TEXT, "--output_dir", "bert"], "--output_dir bert: is not empty"),
    "directory is a file": ([*ROBERTA, *TEXT, "--output_dir", "text.txt"], "--output_dir text.txt: is a file"),
    "directory impossible": ([*ROBERTA, *TEXT, "--output_dir", "text.txt/x"], "--output_dir text.txt/x: cannot be written to"),
    "no such flag": ([*ROBERTA, *TEXT, "--vocabulary", "9"], "--vocabulary"),
    "JSON file missing": (["none.json"], "none.json: cannot be read as JSON"),
    "JSON file with a list": (["list.json"], "list.json: must hold one JSON object"),
    "JSON file with another flag": (["flag.json"], "flag.json: 'vocabulary': no such flag"),
    "no number": ([*ROBERTA, *TEXT, "--vocab_size", "many"], "--vocab_size"),
}  # fmt: skip


@pytest.fixture
def playground(tmp_path, monkeypatch) -> None:
    """A working directory with the files that MISTAKES name."""
    monkeypatch.chdir(tmp_path)
    files = {"text.txt": "some text\n", "text.doc": "text", "empty.txt": "", "blank.txt": " \n\n\t\n"}
    files |= {"broken.csv": 'a,b\n"1,2\n', "blanks/train.txt": "\n \n", "broken/train.csv": 'a,b\n"1,2\n'}
    files["surplus/train.csv"] = "text\nHello, how are you\n"
    files |= {"numbers.csv": "a,b\n1,2\n", "list.json": "[]", "flag.json": '{"vocabulary": 9}'}
    files |= {f"{name}/config.json": json.dumps({"model_type": name}) for name in ("bert", "llama")}
    files |= {"list/config.json": "[]", "cut/config.json": '{"model_type": "be'}
    files["text/config.json"] = '{"model_type": "bert", "hidden_size": "wide"}'
    files["heads/config.json"] = '{"model_type": "bert", "hidden_size": 64, "num_attention_heads": 5}'
    files["code/config.json"] = '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}'
    for name, content in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content, "utf-8")
    datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": ["a"]})).save_to_disk("only_test")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_in_one_line(mistake, playground, error_of):
    flags, expected = MISTAKES[mistake]
    output = [] if "--output_dir" in flags else ["--output_dir", "out"]
    assert expected in error_of(prepare_model_dir.main, [*flags, *output])
    assert not os.path.isdir("out") or os.listdir("out") == []


def test_output_dir_is_required(playground, error_of):
    assert "--output_dir" in error_of(prepare_model_dir.main, [*ROBERTA, *TEXT])
