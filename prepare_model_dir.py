#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make a model directory from a corpus: train a tokenizer and write the configuration of a fresh model that fits it.

The directory holds no weights; a training script starts from it. These commands work as pasted:

    python quickstart/python_docs_corpus.py --output_dir corpus
    python prepare_model_dir.py --model_type roberta --train_file corpus/train.txt --vocab_size 8192 \
        --config_overrides "hidden_size=256,num_hidden_layers=4,intermediate_size=1024" --output_dir my-roberta

The tokenizer puts the model type's special tokens around texts, every id it gives has an embedding, and the model's limit
of positions is its limit too; T5 has none. Same data, flags and seed give the same files. The last line logged is the
command to train. t5 and mt5 need t5_tokenizer_model.py beside this script; the other types need nothing.
"""

import importlib.util
import math
import os
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

try:
    import flaxlm
except ImportError:
    print(
        f"{Path(__file__).name}: error: needs the package flaxlm 0.5.0: install it, from a clone of its repository with"
        " `pip install .`, or copy the folder flaxlm from there beside this script",
        file=sys.stderr,
    )
    raise SystemExit(2) from None
flaxlm.begin("0.5.0", __file__, as_program=__name__ == "__main__")

import datasets
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CONFIG_MAPPING,
    BertTokenizer,
    GPT2Tokenizer,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from flaxlm import (
    arguments,
    cli,
    configurations,
    files,
    formats,
    inputs,
    randomness,
    text,
)

DEFAULT_MIN_FREQUENCY = 2


# ---- Arguments -----------------------------------------------------------------------------------------------------------


@dataclass
class PrepareArguments:
    """Which text, which kind of model, and where to write."""

    output_dir: str = field(metadata={"help": "Directory for the tokenizer and config.json."})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Write into a non-empty output_dir, replacing its tokenizer and configuration."},
    )
    model_type: str | None = field(
        default=None, metadata={"help": "roberta, bert, modernbert, gpt2, bart, t5 or mt5. Unset: the type of config_name."}
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "Configuration to start from (Hub id or directory). Unset: the library's default; t5: T5 v1.1, base size."
        },
    )
    config_overrides: str | None = field(default=None, metadata={"help": "Changes to the configuration: key=value,key=value."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, or a local directory (data files, or written by save_to_disk); train split."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_file: list[str] | None = field(default=None, metadata={"help": arguments.TRAIN_FILE_HELP})
    encoding: str | None = field(default=None, metadata={"help": arguments.ENCODING_HELP})
    text_column_name: str | None = field(
        default=None, metadata={"help": "Column with the text. Unset: 'text' if there is one, else the first text column."}
    )
    max_train_samples: int = field(
        default=1_000_000,
        metadata={
            "help": "Text rows to train the tokenizer on, drawn at random with the seed. All distinct words are held in"
            " memory, so a whole corpus may not fit, and more rows than a few million change little."
        },
    )
    vocab_size: int | None = field(
        default=None,
        metadata={
            "help": "Entries of the tokenizer, special tokens included, of which t5 and mt5 have 103. Unset: 50265 (gpt2:"
            " 50257, bert: 30522, t5: 32100, mt5: 250100)."
        },
    )
    min_frequency: int = field(
        default=DEFAULT_MIN_FREQUENCY,
        metadata={"help": "Pieces are merged into a new entry if they stand together so many times; not for t5 and mt5."},
    )
    lowercase: bool = field(
        default=False,
        metadata={"help": "bert: ignore case and accents, as uncased BERT does; t5, mt5: ignore case. Unset: keep both."},
    )
    mode_tokens: bool = field(
        default=False, metadata={"help": "t5, mt5: add [NLU], [NLG] and [S2S], which run_t5_mlm_flax.py --objective ul2 needs."}
    )
    fim_tokens: bool = field(
        default=False,
        metadata={"help": "gpt2: add <fim_prefix>, <fim_middle> and <fim_suffix>, which run_clm_flax.py --fim_rate needs."},
    )
    seed: int = field(default=42, metadata={"help": "Draws the max_train_samples rows."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and converted data are kept."})
    token: str | None = field(
        default=None, repr=False, metadata={"help": "Hub token for private models and data; never logged or written."}
    )


def read_arguments(argv: Sequence[str] | None) -> PrepareArguments:
    """Read the command line (or its JSON file) and check all that can be checked without loading anything."""
    parser = cli.ScriptArgumentParser(PrepareArguments, description=__doc__.splitlines()[0])
    (args,) = parser.parse(argv)
    args.output_dir = os.path.expanduser(args.output_dir)
    if args.model_type is None and args.config_name is None:
        cli.fail(f"no model: give --model_type ({', '.join(FAMILIES)}) or --config_name")
    if args.model_type is not None and args.model_type not in FAMILIES:
        cli.fail(f"--model_type {args.model_type}: not supported; choose {', '.join(FAMILIES)}")
    if args.train_file and args.dataset_name:
        cli.fail("--train_file and --dataset_name: give one of them, not both")
    if not (args.train_file or args.dataset_name):
        cli.fail("no data: give --train_file or --dataset_name")
    if args.dataset_config_name and not args.dataset_name:
        cli.fail("--dataset_config_name: names a part of --dataset_name, which is not given")
    if args.train_file:
        found = inputs.find(args.train_file, "--train_file", args.token)
    if args.encoding:
        formats.check_encoding_name(args.encoding, found.paths if args.train_file else [])
    for name in ("max_train_samples", "min_frequency", "vocab_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            cli.fail(f"--{name} {value}: must be at least 1")
    if args.seed < 0:
        cli.fail(f"--seed {args.seed}: must be at least 0")
    check_output_dir(args)
    return args


def check_output_dir(args: PrepareArguments) -> None:
    """Refuse a directory that cannot be used, or whose files are worth more than the run."""
    if os.path.exists(args.output_dir) and not os.path.isdir(args.output_dir):
        cli.fail(f"--output_dir {args.output_dir}: is a file; name a directory")
    names = sorted(os.listdir(args.output_dir)) if os.path.isdir(args.output_dir) else []
    if names and not args.overwrite_output_dir:
        cli.fail(f"--output_dir {args.output_dir}: is not empty; name another or add --overwrite_output_dir")
    for name in names:
        if name.endswith((".msgpack", ".safetensors", ".bin")) or name.startswith("checkpoint-"):
            cli.fail(f"--output_dir {args.output_dir}: {name} would lose its tokenizer; remove it, or name another directory")
    try:
        os.makedirs(args.output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output_dir):
            pass
    except OSError as error:
        cli.fail(f"--output_dir {args.output_dir}: cannot be written to: {error.strerror}")


# ---- Text ----------------------------------------------------------------------------------------------------------------


class TextSample:
    """The rows to train on; iterating gives lists of texts, always in the same order, as often as needed."""

    def __init__(self, dataset: datasets.Dataset, column: str):
        self.dataset, self.column = dataset.select_columns(column), column

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[list[str]]:
        for batch in self.dataset.iter(1000):
            yield [text or "" for text in batch[self.column]]


def load_sample(args: PrepareArguments) -> TextSample:
    """Load the text, and draw from it if it has more than `max_train_samples` rows."""
    if args.train_file:
        options = {"encoding": args.encoding, "token": args.token}
        source, dataset = inputs.shown(args.train_file), files.load(args.train_file, "--train_file", args.cache_dir, **options)
    else:
        source, dataset = args.dataset_name, load_train_split(args)
    column, num_rows = files.find_text_column(dataset, args.text_column_name), len(dataset)
    if num_rows > args.max_train_samples:
        chosen = randomness.host_rng(args.seed, "tokenizer sample").choice(num_rows, args.max_train_samples, replace=False)
        dataset = dataset.select(np.sort(chosen))  # in the order of the data, which reads faster
    sample = TextSample(dataset, column)
    if not any(text and not text.isspace() for texts in sample for text in texts):
        flag = "--train_file" if args.train_file else "--dataset_name"
        cli.fail(f"{flag} {source}: has no text in column '{column}' of its {len(sample)} row(s)")
    cli.logger.info("Text: %s of %s rows, column '%s' of %s", f"{len(sample):,}", f"{num_rows:,}", column, source)
    return sample


def load_train_split(args: PrepareArguments) -> datasets.Dataset:
    """Load the training split of a dataset of the Hub, or of a local directory."""
    name = args.dataset_name
    options = {"cache_dir": args.cache_dir, "token": args.token, "encoding": args.encoding}
    found = text.find_named_splits(name, args.dataset_config_name, **options)
    if "train" not in found:
        cli.fail(f"--dataset_name {name}: has no train split, only {', '.join(found)}")
    return text.load_source(found["train"], args.cache_dir)


# ---- Model types: yours to extend ----------------------------------------------------------------------------------------


class Family(NamedTuple):
    """How a model type makes its tokenizer, and which fields of its configuration follow from it."""

    build_tokenizer: Callable[[TextSample, "Family", int, PrepareArguments], PreTrainedTokenizerFast]
    tokenizer_class: type[PreTrainedTokenizerFast]
    special_tokens: tuple[str, ...]  # take the first ids, in this order
    vocab_size: int  # unless --vocab_size is given
    min_vocab_size: int
    training_script: str
    config_ids: Mapping[str, str] = {}  # field of the configuration -> the tokenizer's id, beside pad, bos and eos
    config: Mapping[str, Any] = {}  # changes to the library's default configuration, unless --config_name is given


def build_byte_level_bpe(
    sample: TextSample, family: Family, vocab_size: int, args: PrepareArguments
) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of UTF-8 bytes: any text can be encoded, and comes back unchanged.

    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2.
    """
    added = FIM_TOKENS * args.fim_tokens
    tokenizer = train_byte_level_bpe(sample, [*family.special_tokens, *added], vocab_size, args.min_frequency)
    names: dict[str, Any] = {"extra_special_tokens": [*added]} if added else {}
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.model.save(directory)
        if "<mask>" in family.special_tokens:
            names["mask_token"] = AddedToken("<mask>", lstrip=True, normalized=False, special=True)
        return family.tokenizer_class.from_pretrained(directory, **names)


def build_bert_bpe(sample: TextSample, family: Family, vocab_size: int, args: PrepareArguments) -> PreTrainedTokenizerFast:
    """The same with BERT's special tokens around texts, as ModernBERT has it (Warner et al. 2024, arXiv:2412.13663)."""
    tokenizer = train_byte_level_bpe(sample, family.special_tokens, vocab_size, args.min_frequency)
    tokenizer.decoder = decoders.ByteLevel()
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ids)
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), BERT_TOKENS, strict=True))
    return family.tokenizer_class(tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **named)


def train_byte_level_bpe(sample: TextSample, special_tokens: Sequence[str], vocab_size: int, min_frequency: int) -> Tokenizer:
    """A tokenizer of UTF-8 bytes; special tokens have the first ids, and a mask takes in the space before it, as published."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[AddedToken(t, lstrip="mask" in t.lower(), normalized=False, special=True) for t in special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(sample, trainer, length=len(sample))
    return tokenizer


def build_wordpiece(sample: TextSample, family: Family, vocab_size: int, args: PrepareArguments) -> PreTrainedTokenizerFast:
    """WordPiece as BERT uses it: words are cut into known pieces; those after the first are written with ##.

    The characters are listed before training, as special tokens, because the trainer numbers them differently every time.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=args.lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    alphabet = wordpiece_alphabet(sample, tokenizer, limit=max(1000, vocab_size // 4))
    num_needed = len(family.special_tokens) + len(alphabet)
    if num_needed > vocab_size:
        cli.fail(f"--vocab_size {vocab_size}: too small; special tokens and the characters of this text take {num_needed}")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=args.min_frequency,
        special_tokens=[*family.special_tokens, *alphabet],
        limit_alphabet=0,
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(sample, trainer, length=len(sample))
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.model.save(directory)
        return family.tokenizer_class.from_pretrained(directory, do_lower_case=args.lowercase)


def wordpiece_alphabet(sample: TextSample, tokenizer: Tokenizer, limit: int) -> list[str]:
    """The `limit` most frequent characters, and again with ## those that can stand inside a word; others become [UNK]."""
    counts: Counter[str] = Counter()
    for texts in sample:
        counts.update(tokenizer.normalizer.normalize_str("\n".join(texts)))

    def num_words(text: str) -> int:
        return len(tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)))

    characters = [character for character in counts if num_words(character) > 0]  # no spaces
    characters = sorted(sorted(characters, key=lambda c: (-counts[c], c))[:limit])
    return characters + ["##" + c for c in characters if num_words("a" + c) == 1]  # no punctuation, no Chinese


def build_unigram(sample: TextSample, family: Family, vocab_size: int, args: PrepareArguments) -> PreTrainedTokenizerFast:
    """Unigram pieces and T5's sentinels, the first of which has the highest id, as in the published models (defect 55)."""
    from t5_tokenizer_model import SentencePieceUnigramTokenizer, VocabularyTooSmallError  # check_tokenizer_flags saw it

    tokenizer = SentencePieceUnigramTokenizer(lowercase=args.lowercase)
    added = MODE_TOKENS * args.mode_tokens + tuple(f"<extra_id_{i}>" for i in reversed(range(NUM_SENTINELS)))
    try:
        tokenizer.train_from_iterator(sample, vocab_size - len(added), sys.stderr.isatty(), length=len(sample))
    except VocabularyTooSmallError as error:
        needed = error.needed + len(added)
        cli.fail(f"--vocab_size {vocab_size}: too small; special tokens and the characters of this text take {needed}")
    tokenizer.add_special_tokens(list(added))
    named = dict(zip(("pad_token", "eos_token", "unk_token"), family.special_tokens, strict=True))
    # Not T5Tokenizer, which takes the pieces alone: normal form, digits and punctuation would be lost.
    return family.tokenizer_class(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_str()),
        extra_special_tokens=list(reversed(added)),
        model_input_names=["input_ids", "attention_mask"],
        **named,
    )


NUM_SENTINELS = 100  # as the published models have
FIM_TOKENS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")  # as StarCoder's are called
MODE_TOKENS = ("[NLU]", "[NLG]", "[S2S]")
ROBERTA_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MODERNBERT_IDS = {
    "bos_token_id": "cls_token_id", "eos_token_id": "sep_token_id",
    "cls_token_id": "cls_token_id", "sep_token_id": "sep_token_id",
}  # fmt: skip
BART_IDS = {"decoder_start_token_id": "eos_token_id", "forced_eos_token_id": "eos_token_id"}
T5_TOKENS = ("<pad>", "</s>", "<unk>")
T5_IDS = {"decoder_start_token_id": "pad_token_id"}
T5_MIN_VOCAB_SIZE = len(T5_TOKENS) + NUM_SENTINELS + 2
T5_V1_1_BASE = {
    "d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,  # of which transformers 5 makes scale_decoder_outputs=false
}  # fmt: skip
FAMILIES = {
    "roberta": Family(build_byte_level_bpe, RobertaTokenizer, ROBERTA_TOKENS, 50265, 256 + 5, "run_mlm_flax.py"),
    "bert": Family(build_wordpiece, BertTokenizer, BERT_TOKENS, 30522, 5 + 1, "run_mlm_flax.py"),
    "modernbert": Family(
        build_bert_bpe, PreTrainedTokenizerFast, BERT_TOKENS, 50368, 256 + 5, "run_mlm_flax.py", MODERNBERT_IDS
    ),
    "gpt2": Family(build_byte_level_bpe, GPT2Tokenizer, ("<|endoftext|>",), 50257, 256 + 1, "run_clm_flax.py"),
    "bart": Family(
        build_byte_level_bpe, RobertaTokenizer, ROBERTA_TOKENS, 50265, 256 + 5, "run_bart_dlm_flax.py", BART_IDS
    ),
    "t5": Family(
        build_unigram, PreTrainedTokenizerFast, T5_TOKENS, 32100, T5_MIN_VOCAB_SIZE, "run_t5_mlm_flax.py", T5_IDS, T5_V1_1_BASE
    ),
    "mt5": Family(
        build_unigram, PreTrainedTokenizerFast, T5_TOKENS, 250100, T5_MIN_VOCAB_SIZE, "run_t5_mlm_flax.py", T5_IDS
    ),
}  # fmt: skip


# ---- Configuration -------------------------------------------------------------------------------------------------------


def load_base_config(args: PrepareArguments) -> PretrainedConfig:
    """The configuration to start from, with `config_overrides` applied and checked."""
    origin = configurations.Origin(f"--config_name {args.config_name}: config.json")
    if args.config_name is None:
        config = CONFIG_MAPPING[args.model_type](**FAMILIES[args.model_type].config)
    else:
        config = configurations.read_config(args.config_name, "--config_name", cache_dir=args.cache_dir, token=args.token)
        if config.model_type not in FAMILIES:
            cli.fail(f"--config_name {args.config_name}: type {config.model_type} is not supported, only {', '.join(FAMILIES)}")
        if args.model_type not in (None, config.model_type):
            cli.fail(f"--model_type {args.model_type}: but --config_name {args.config_name} is of type {config.model_type}")
        configurations.check_values(config.to_dict(), type(config), origin)
    if args.config_overrides:
        origin = origin._replace(overrides=configurations.apply_config_overrides(config, args.config_overrides))
    configurations.check_sizes(config, origin)
    for name in sorted(origin.overrides):
        if name.endswith("_token_id"):
            cli.fail(f"--config_overrides {name}: follows from the tokenizer and cannot be set")
    return config


def overridden_fields(args: PrepareArguments) -> set[str]:
    return {part.partition("=")[0].strip() for part in (args.config_overrides or "").split(",")}


def check_tokenizer_flags(model_type: str, args: PrepareArguments) -> None:
    """Refuse flags that this kind of tokenizer has no use for, and a script that was copied without what it needs."""
    build = FAMILIES[model_type].build_tokenizer
    if args.lowercase and build in (build_byte_level_bpe, build_bert_bpe):
        cli.fail(
            f"--lowercase: {model_type} tokenizers give text back unchanged; only bert, t5 and mt5 have a form without case"
        )
    if args.mode_tokens and build is not build_unigram:
        cli.fail(f"--mode_tokens: only t5 and mt5 are trained with them, not {model_type}")
    if args.fim_tokens and FAMILIES[model_type].training_script != "run_clm_flax.py":
        cli.fail(f"--fim_tokens: only causal models are trained with them, not {model_type}")
    if build is build_unigram:
        if args.min_frequency != DEFAULT_MIN_FREQUENCY:
            cli.fail(
                f"--min_frequency {args.min_frequency}: has no effect here; {model_type} tokenizers are not made by merging"
            )
        if importlib.util.find_spec("t5_tokenizer_model") is None:
            cli.fail(f"--model_type {model_type}: needs t5_tokenizer_model.py; copy it into the directory of this script")


def choose_vocab_size(config: PretrainedConfig, args: PrepareArguments) -> int:
    """Entries the tokenizer is to have."""
    family = FAMILIES[config.model_type]
    check_tokenizer_flags(config.model_type, args)
    vocab_size = family.vocab_size if args.vocab_size is None else args.vocab_size
    least = family.min_vocab_size + len(FIM_TOKENS) * args.fim_tokens
    if vocab_size < least:
        cli.fail(f"--vocab_size {vocab_size}: too small; characters and special tokens alone take {least}")
    if "vocab_size" in overridden_fields(args) and config.vocab_size < vocab_size:
        cli.fail(
            f"--config_overrides vocab_size={config.vocab_size}: fewer embeddings than the tokenizer may have ids;"
            f" raise it, or lower --vocab_size, which is {vocab_size}"
        )
    return vocab_size


def fit_to_each_other(config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, args: PrepareArguments) -> None:
    """Give the model an embedding for every id and the tokenizer's special ids; give the tokenizer the model's limit."""
    if "vocab_size" not in overridden_fields(args):
        config.vocab_size = 64 * math.ceil(len(tokenizer) / 64)  # a multiple of 64 makes faster matrix products
    ids = {name: name for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    for config_name, tokenizer_name in (ids | FAMILIES[config.model_type].config_ids).items():
        setattr(config, config_name, getattr(tokenizer, tokenizer_name))
    config.architectures = None  # the training script decides
    tokenizer.model_max_length = (
        configurations.max_positions(config) or VERY_LARGE_INTEGER
    )  # T5 has relative positions: no limit


# Files by which AutoTokenizer or a model would take on traits of what was in the directory before.
REPLACED_FILES = {
    "added_tokens.json", "chat_template.jinja", "config.json", "generation_config.json", "merges.txt",
    "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "vocab.json", "vocab.txt",
}  # fmt: skip


def write_model_dir(output_dir: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Write all files, each whole or not at all, in place of those of an earlier run; returns their names."""
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".saving-") as staging:
        tokenizer.save_pretrained(staging)
        config.to_json_file(os.path.join(staging, "config.json"))
        for name in REPLACED_FILES:
            Path(output_dir, name).unlink(missing_ok=True)
        names = sorted(os.listdir(staging))
        for name in names:
            os.replace(os.path.join(staging, name), os.path.join(output_dir, name))
    return names


def log_result(
    args: PrepareArguments, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, asked: int, written: list[str]
) -> None:
    """Say what was made, and how to go on."""
    limit = configurations.max_positions(config)
    cli.logger.info(
        "Vocabulary: %d entries of %d asked for, %d embeddings; rows of %s",
        len(tokenizer), asked, config.vocab_size, "any length" if limit is None else f"up to {limit} tokens",
    )  # fmt: skip
    if len(tokenizer) < asked:
        is_unigram = FAMILIES[config.model_type].build_tokenizer is build_unigram
        lower = "--vocab_size" if is_unigram else "--vocab_size or --min_frequency"
        cli.logger.warning("The text is too small for more entries; give more text, or a lower %s.", lower)
    cli.logger.info("Wrote to %s: %s", args.output_dir, ", ".join(written))
    names = arguments.public(args)["train_file"]
    data = ["--train_file", *names] if names else ["--dataset_name", args.dataset_name]
    data += ["--dataset_config_name", args.dataset_config_name] if args.dataset_config_name else []
    data += ["--encoding", args.encoding] if args.encoding else []
    command = ["python", FAMILIES[config.model_type].training_script]
    command += ["--config_name", args.output_dir, "--tokenizer_name", args.output_dir, *data]
    cli.logger.info("To train from it: %s --output_dir ...", shlex.join(command))


# ---- Main ----------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Write tokenizer and configuration as the arguments say (default: the command line)."""
    cli.set_up_logging()
    args = read_arguments(argv)
    cli.logger.info("Arguments other than the defaults: %s", arguments.changed(args))
    config = load_base_config(args)
    family, vocab_size = FAMILIES[config.model_type], choose_vocab_size(config, args)
    sample = load_sample(args)
    cli.logger.info("Training a tokenizer of %s entries; this takes minutes on a large corpus", f"{vocab_size:,}")
    tokenizer = family.build_tokenizer(sample, family, vocab_size, args)
    fit_to_each_other(config, tokenizer, args)
    written = write_model_dir(args.output_dir, config, tokenizer)
    log_result(args, config, tokenizer, vocab_size, written)


if __name__ == "__main__":
    cli.end(cli.run(main, __file__))
