# SPDX-License-Identifier: Apache-2.0
"""The tokenizer that T5 is pretrained with, trained on your text: pieces of a unigram language model.

`prepare_model_dir.py --model_type t5` uses it, and writes a whole model directory. This works as pasted, after
`python quickstart/python_docs_corpus.py --output_dir corpus`:

    from t5_tokenizer_model import SentencePieceUnigramTokenizer

    tokenizer = SentencePieceUnigramTokenizer(lowercase=False)
    tokenizer.train("corpus/train.txt", vocab_size=4000)
    # The sentinels of span corruption go last and backwards: the first one, <extra_id_0>, has the highest id.
    tokenizer.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(100))])
    tokenizer.save("tokenizer.json")

    from transformers import PreTrainedTokenizerFast

    # Not T5Tokenizer: that of transformers 5 takes the pieces from the file, and neither normal form nor borders of words.
    loaded = PreTrainedTokenizerFast(tokenizer_file="tokenizer.json", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    print(loaded("Thank you <extra_id_0> me").tokens())

Text that is encoded and decoded comes back in NFKC form, with runs of white space as one space, and if asked to in lower
case; characters that the training text lacks come back as the unknown token.
"""

import json
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.implementations import BaseTokenizer
from tokenizers.models import Unigram


class VocabularyTooSmallError(ValueError):
    """The vocabulary has no room for every character of the text; `needed` entries would do."""

    def __init__(self, vocab_size: int, needed: int):
        super().__init__(f"vocab_size {vocab_size}: too small; special tokens and the characters of this text take {needed}")
        self.needed = needed


class SentencePieceUnigramTokenizer(BaseTokenizer):
    """Unigram pieces as T5 has them: ids 0, 1 and 2 are padding, end of text and unknown; texts end with the second.

    Pieces never span two words; every digit and every punctuation mark is a piece of its own. Same text, same files: see
    `reproducible`. Kudo 2018, "Subword Regularization"; Raffel et al. 2020, "Exploring the Limits of Transfer Learning
    with a Unified Text-to-Text Transformer", section 2.2.

    Args:
        replacement: The one character that stands for a space in pieces.
        add_prefix_space: Whether the first word of a text is encoded like the same word after a space.
        unk_token, eos_token, pad_token: Three different tokens.
        lowercase: Whether to ignore case, in training and after.
    """

    def __init__(
        self,
        replacement: str = "▁",
        add_prefix_space: bool = True,
        unk_token: str | AddedToken = "<unk>",
        eos_token: str | AddedToken = "</s>",
        pad_token: str | AddedToken = "<pad>",
        lowercase: bool = True,
    ):
        self.special_tokens = [pad_token, eos_token, unk_token]
        pad, eos, unk = names = [str(getattr(token, "content", token)) for token in self.special_tokens]
        if len(set(names)) < 3:
            raise ValueError(f"pad_token {pad}, eos_token {eos} and unk_token {unk}: must be three different tokens")
        self.unk_id, self.unk_name, self.replacement = names.index(unk), unk, replacement

        tokenizer = Tokenizer(Unigram())
        steps = [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
        tokenizer.normalizer = normalizers.Sequence(steps + [normalizers.Lowercase()] * lowercase)
        spaces = {"replacement": replacement, "prepend_scheme": "always" if add_prefix_space else "never"}
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(**spaces), pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation()]
        )
        tokenizer.decoder = decoders.Metaspace(**spaces)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["$A", eos], pair=["$A", eos, "$B:0", eos], special_tokens=[(eos, names.index(eos))]
        )
        parameters = {"model": "SentencePieceUnigram", "add_prefix_space": add_prefix_space, "lowercase": lowercase}
        super().__init__(tokenizer, parameters | {"replacement": replacement})

    def train(self, files: str | list[str], vocab_size: int = 8000, show_progress: bool = True) -> None:
        """Train on the lines of text files in UTF-8; otherwise as `train_from_iterator`."""
        # Not the trainer's own reader: it leaves line ends on, and each would count as one more word.
        self.train_from_iterator(lines_of([files] if isinstance(files, str) else files), vocab_size, show_progress)

    def train_from_iterator(
        self,
        iterator: Iterable[str] | Iterable[list[str]],
        vocab_size: int = 8000,
        show_progress: bool = True,
        length: int | None = None,
    ) -> None:
        """Train on texts, or lists of texts; `length` is their number, for the progress bar alone.

        All distinct words are held in memory. A small text yields fewer than `vocab_size` entries, special tokens
        included; a `VocabularyTooSmallError` says that there is no room for all its characters.
        """
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size,
            special_tokens=self.special_tokens,
            unk_token=self.unk_name,
            show_progress=show_progress,
        )
        # While it reads, the tokenizer cannot be asked for its normalizer.
        texts = self.checked(iterator, vocab_size, self.normalizer)
        self._tokenizer.train_from_iterator(texts, trainer, length=length)
        self.add_unk_id()

    def checked(
        self, iterator: Iterable[str] | Iterable[list[str]], vocab_size: int, normalizer: normalizers.Normalizer
    ) -> Iterator[list[str]]:
        """Pass texts on to the trainer; after the last, but before it trains, make sure that it can.

        With fewer entries than characters it gives an error without a number, but with few more it runs forever or
        exceeds `vocab_size`. It needs one piece that is no single character to get the size right.
        """
        alphabet = {self.replacement}
        for item in iterator:
            texts = [item] if isinstance(item, str) else item
            alphabet.update(normalizer.normalize_str("\n".join(texts)))
            yield texts
        needed = len(self.special_tokens) + len(alphabet - {" "}) + 1
        if vocab_size < needed:
            raise VocabularyTooSmallError(vocab_size, needed)

    def add_unk_id(self) -> None:
        """Give characters without a piece the unknown id, and the vocabulary its final order; training ends with it.

        Public because scripts written for older versions call it after training, when it changes nothing.
        """
        vocab = [(piece, score) for piece, score in json.loads(self.to_str())["model"]["vocab"]]
        self._tokenizer.model = Unigram(reproducible(vocab, len(self.special_tokens)), self.unk_id, False)


def reproducible(vocab: list[tuple[str, float]], num_special: int) -> list[tuple[str, float]]:
    """What two trainings on the same text agree about: same pieces, same scores (log-probabilities), same ids.

    The trainer walks through hash tables, whose order is another one in every process. So sums of probabilities differ in
    their last digits (by up to 4e-11 as measured), which reorders pieces of equal score, and characters that it learned
    no score for get the lowest score plus 0.0001 times a random rank. Here scores have 4 digits, such characters all get
    the lowest score, and pieces are in order. The set of pieces was the same in all trainings we compared.
    """
    special, pieces = vocab[:num_special], vocab[num_special:]
    lowest = min((score for piece, score in pieces if len(piece) == 1), default=0.0)
    hardly_learned = lowest + 1e-4 * sum(len(piece) == 1 for piece, _ in pieces)
    pieces = [(p, lowest if len(p) == 1 and score < hardly_learned else score) for p, score in pieces]
    return special + sorted(((p, round(score, 4)) for p, score in pieces), key=lambda piece: (-piece[1], piece[0]))


def lines_of(files: Iterable[str]) -> Iterator[str]:
    for path in files:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                yield line.rstrip("\n")
