# SPDX-License-Identifier: Apache-2.0
"""t5_tokenizer_model.py: special ids, normal forms, unknown characters, saving, and trainings that agree."""

import json
import os
import textwrap
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Config

import t5_tokenizer_model
from flaxlm import arguments, tokenization
from t5_tokenizer_model import SentencePieceUnigramTokenizer, VocabularyTooSmallError, reproducible

VARIANTS = {
    "default": ("<pad>", "</s>", "<unk>", {}),
    "names": ("[P]", "[E]", "[U]", {"pad_token": "[P]", "eos_token": "[E]", "unk_token": "[U]"}),
    "tokens": (
        "[P]", "[E]", "[U]",
        {"pad_token": AddedToken("[P]"), "eos_token": AddedToken("[E]", special=True), "unk_token": AddedToken("[U]")},
    ),
    "one token": ("<pad>", "[E]", "<unk>", {"eos_token": AddedToken("[E]", normalized=False)}),
}  # fmt: skip


def trained(texts: list[str], vocab_size: int = 400, **kwargs) -> SentencePieceUnigramTokenizer:
    tokenizer = SentencePieceUnigramTokenizer(**kwargs)
    tokenizer.train_from_iterator(texts, vocab_size, show_progress=False)
    return tokenizer


@pytest.fixture(scope="module")
def lower(texts) -> SentencePieceUnigramTokenizer:
    return trained(texts[:200])


@pytest.fixture(scope="module")
def cased(texts) -> SentencePieceUnigramTokenizer:
    return trained(texts[:200], lowercase=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_special_tokens(variant, texts):
    """Defect 62: the end of text was looked for under the name of the AddedToken object."""
    pad, eos, unk, kwargs = VARIANTS[variant]
    tokenizer = trained(texts[:60], 300, **kwargs)
    assert [tokenizer.id_to_token(i) for i in range(3)] == [pad, eos, unk]
    encoded = tokenizer.encode("return the value")
    assert (encoded.tokens[-1], encoded.ids[-1], encoded.tokens.count(eos)) == (eos, 1, 1)
    assert encoded.special_tokens_mask == [0] * (len(encoded) - 1) + [1]
    assert tokenizer.encode("return", "value").tokens.count(eos) == 2
    assert 2 not in encoded.ids
    assert tokenizer.encode("模").ids[-2:] == [2, 1]
    assert tokenizer.decode(encoded.ids) == "return the value"


def test_special_tokens_must_differ():
    with pytest.raises(ValueError, match="three different tokens"):
        SentencePieceUnigramTokenizer(pad_token="</s>")


def test_case(lower, cased):
    assert lower.encode("THE Value").ids == lower.encode("the value").ids
    assert cased.encode("THE Value").ids != cased.encode("the value").ids
    assert cased.decode(cased.encode("The Value").ids) == "The Value"
    assert lower.decode(lower.encode("The Value").ids) == "the value"
    assert not any(piece != piece.lower() for piece in lower.get_vocab())


@pytest.mark.parametrize("text", ["a  b", "a \t b", "a\nb", "a\r\n\n b", "a\u00a0\u3000b"])
def test_white_space_is_one_space(cased, text):
    assert cased.encode(text).ids == cased.encode("a b").ids


def test_normal_form_is_nfkc(cased):
    assert cased.normalize("ﬁne ｗｉｄｅ x²") == "fine wide x2"


def test_digits_and_punctuation_stand_alone(cased, texts):
    assert cased.encode("x 120, (2)").tokens[-9:-1] == ["1", "2", "0", ",", "▁", "(", "2", ")"]
    for piece in list(cased.get_vocab())[3:]:
        assert len(piece) == 1 or not any(character.isdigit() or character in "()[],.'\"-_" for character in piece), piece
        assert "▁" not in piece[1:]


def test_prefix_space(texts, cased):
    without = trained(texts[:60], 300, lowercase=False, add_prefix_space=False)
    assert cased.encode("return").tokens[0].startswith("▁")
    assert not without.encode("return").tokens[0].startswith("▁")
    for tokenizer in (cased, without):
        assert tokenizer.decode(tokenizer.encode("return it").ids) == "return it"


def test_another_replacement(texts):
    tokenizer = trained(texts[:60], 300, replacement="_")
    assert tokenizer.encode("return it").tokens[0][0] == "_"
    assert tokenizer.decode(tokenizer.encode("return it").ids) == "return it"


def test_files_and_iterators_agree(texts, lower, tmp_path):
    """Also lists of texts, with a length; and several files, whose line ends count for nothing."""
    lists = SentencePieceUnigramTokenizer()
    lists.train_from_iterator([texts[:150], texts[150:200]], 400, show_progress=False, length=200)
    files = SentencePieceUnigramTokenizer()
    for name, part in (("a.txt", texts[:150]), ("b.txt", texts[150:200])):
        (tmp_path / name).write_bytes(("\r\n" if name == "b.txt" else "\n").join(part).encode())
    files.train([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], 400, show_progress=False)
    assert lists.to_str() == files.to_str() == lower.to_str()


@pytest.mark.parametrize("num_texts, vocab_size", [(60, 300), (60, 2000), (200, 400)])
def test_trainings_agree(texts, num_texts, vocab_size):
    """The trainer alone gives other scores and ids every time; characters it has seen once, by up to 0.001 each."""
    first, *others = (trained(texts[:num_texts], vocab_size).to_str() for _ in range(4))
    assert all(other == first for other in others)


def test_reproducible_is_idempotent_and_keeps_what_matters():
    vocab = [("<unk>", 0.0), ("b", -9.9998), ("a", -9.9999), ("c", -10.0), ("no", -10.0), ("▁", -1.00000001), ("xy", -1.0)]
    once = reproducible(vocab, 1)
    assert once == [("<unk>", 0.0), ("xy", -1.0), ("▁", -1.0), ("a", -10.0), ("b", -10.0), ("c", -10.0), ("no", -10.0)]
    assert reproducible(once, 1) == once


def test_add_unk_id_changes_nothing_after_training(lower):
    before = lower.to_str()
    assert json.loads(before)["model"]["unk_id"] == 2
    lower.add_unk_id()
    assert lower.to_str() == before


@pytest.mark.parametrize("vocab_size", range(4, 16))
def test_small_vocabularies_end(vocab_size):
    """Between 7, the characters, and 10 entries the trainer alone never ends, or gives more entries than asked for."""
    texts = ["some text, some text"] * 3  # ▁ , e m o s t x
    if vocab_size < 8 + 3 + 1:
        with pytest.raises(VocabularyTooSmallError, match=f"vocab_size {vocab_size}: too small") as caught:
            trained(texts, vocab_size)
        assert caught.value.needed == 12
    else:
        assert trained(texts, vocab_size).get_vocab_size() <= vocab_size


def test_the_size_is_the_one_asked_for(lower):
    assert lower.get_vocab_size() == 400


@pytest.mark.parametrize("load", ["any", "ours", "tokenizers"])
def test_saved_and_loaded(cased, load, tmp_path):
    copy = SentencePieceUnigramTokenizer(lowercase=False)
    copy._tokenizer = Tokenizer.from_str(cased.to_str())
    copy.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(100))])
    copy.save(str(tmp_path / "tokenizer.json"))
    T5Config().save_pretrained(tmp_path)
    file = str(tmp_path / "tokenizer.json")
    text = "Return the <extra_id_0> of 模 it 's 12."
    if load == "tokenizers":
        assert Tokenizer.from_file(file).encode(text).ids == copy.encode(text).ids
        return
    loaded = {
        "any": lambda: PreTrainedTokenizerFast(tokenizer_file=file, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"),
        "ours": lambda: tokenization.load_tokenizer(arguments.ModelArguments(tokenizer_name=str(tmp_path))),
    }[load]()
    loaded.save_pretrained(tmp_path / "again")
    for tokenizer in (loaded, AutoTokenizer.from_pretrained(tmp_path / "again")):
        assert tokenizer(text).input_ids == copy.encode(text).ids
        assert len(tokenizer) == 500
        assert (tokenizer.convert_tokens_to_ids("<extra_id_0>"), tokenizer.pad_token_id, tokenizer.eos_token_id) == (499, 0, 1)


def test_the_example_works(corpus, tmp_path, monkeypatch, capsys):
    """That of the module's docstring, as pasted."""
    monkeypatch.chdir(tmp_path)
    Path("corpus").mkdir()
    os.symlink(corpus, "corpus/train.txt")
    start = t5_tokenizer_model.__doc__.index("    from")
    example = t5_tokenizer_model.__doc__[start : t5_tokenizer_model.__doc__.index("\nText that")]
    exec(compile(textwrap.dedent(example), "example", "exec"), {})
    assert "'<extra_id_0>'" in capsys.readouterr().out
