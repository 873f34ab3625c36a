# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: loading them, fitting a configuration to one, using one without changing it, and how long rows may be."""

import contextlib
import importlib.util
import json
import logging
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flaxlm import arguments, cli, configurations, repositories

logger = logging.getLogger(__name__)


TOKENIZER_FILES = re.compile(r"(tokenizer(_config)?|vocab|special_tokens_map|added_tokens)\.json|vocab\.txt|.+\.(model|spm)")


def load_tokenizer(model_args: arguments.ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer named, or the one beside the weights."""
    source = model_args.tokenizer_name or model_args.model_name_or_path
    place = f"{'--tokenizer_name' if model_args.tokenizer_name else '--model_name_or_path'} {source}"
    options = {"trust_remote_code": model_args.trust_remote_code, "cache_dir": model_args.cache_dir}
    options |= {"token": model_args.token, "revision": model_args.model_revision}
    if not model_args.use_fast_tokenizer:
        logger.warning("--no_use_fast_tokenizer: has no effect, since transformers has one tokenizer of a kind, in Rust.")
    if os.path.isdir(source):
        names_class = check_files(source, place)
        if not (names_class or os.path.isfile(os.path.join(source, "config.json"))):
            options["config"] = configurations.named_config(model_args)[0]  # the model's type says what the files are for
    with cli.reading(f"{place}: no tokenizer can be loaded"):
        try:
            tokenizer = as_its_files_say(build(source, options), source, options)
        except Exception as error:  # the Rust side raises Exception itself, and classes whatever they come upon
            if isinstance(error, cli.Ending) or cli.is_accident(error):
                raise
            cli.fail(f"{place}: no tokenizer can be loaded: {why_no_tokenizer(source, options, error)}")
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float) or not 1 <= length < math.inf:
        cli.fail(f"{place}: tokenizer_config.json: model_max_length={length}: must be a whole number, at least 1")
    tokenizer.model_max_length = int(length)
    return tokenizer


def check_files(directory: str, place: str) -> bool:
    """Refuse a directory without a tokenizer, and files that are no JSON; is a class named for the tokenizer?"""
    found = sorted(filter(TOKENIZER_FILES.fullmatch, os.listdir(directory)))
    if not found:
        cli.fail(f"{place}: no tokenizer can be loaded: there is none in it; name another directory with --tokenizer_name")
    for name in (*found, *["config.json"] * os.path.isfile(os.path.join(directory, "config.json"))):
        fields, problem = repositories.read_json_object(os.path.join(directory, name)) if name.endswith("json") else ({}, None)
        if problem:
            cli.fail(f"{place}: no tokenizer can be loaded: {name} {problem}")
        if not isinstance(fields.get("tokenizer_class", ""), str | None):
            cli.fail(f"{place}: {name}: tokenizer_class={json.dumps(fields['tokenizer_class'])}: must be the name of a class")
    return "tokenizer_class" in repositories.read_json_object(os.path.join(directory, "tokenizer_config.json"))[0]


def build(source: str, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers makes of a directory or a repository."""
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except TypeError:  # of a class that builds another kind of model than tokenizer.json has
        if not find_file(source, "tokenizer.json", options):
            raise
        return PreTrainedTokenizerFast.from_pretrained(source, **plain(options))


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of AutoTokenizer.from_pretrained, as those of the tokenizers that have no class of their own."""
    return {name: value for name, value in options.items() if name not in ("trust_remote_code", "config")}


def as_its_files_say(tokenizer: PreTrainedTokenizerBase, source: str, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The same tokenizer, if it does as its files say; else one that does.

    Classes of transformers 5 take no more than the vocabulary from a tokenizer.json, so that other normal forms, other
    borders of words or another model are lost without a word, and make do with special tokens where there is no vocabulary.
    """
    if not type(tokenizer).__module__.startswith("transformers."):
        return tokenizer  # it comes with a Hub repository, and reads what it likes
    kinds = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
    files = {name: find_file(source, name, options) for name in (*kinds, *tokenizer.vocab_files_names.values())}
    vocabularies = {name: path for name, path in files.items() if path and name not in kinds[1:]}
    if not vocabularies:
        needed = ", ".join(tokenizer.vocab_files_names.values())
        raise ValueError(f"a {type(tokenizer).__name__} is read from {needed}, which is not there; {WITH_VERSION_4}")
    settings = {name: repositories.read_json_object(files[name])[0] for name in kinds[1:] if files[name]}
    if not files["tokenizer.json"]:
        for path in vocabularies.values():
            if path.endswith((".model", ".spm")):
                check_sentencepiece(path, tokenizer)
                is_plain = type(tokenizer) is PreTrainedTokenizerFast  # of Llama and its kind, which begin texts
                if is_plain and tokenizer.bos_token and "add_bos_token" not in settings.get("tokenizer_config.json", {}):
                    tokenizer.add_bos_token = True
        return tokenizer
    as_file, rust = tokenizers.Tokenizer.from_file(files["tokenizer.json"]), getattr(tokenizer, "backend_tokenizer", None)
    if type(tokenizer) is PreTrainedTokenizerFast or (rust and does_the_same(as_file, rust, settings)):
        return tokenizer
    vocabulary = as_file.get_vocab()
    names = {name: token for name, token in tokenizer.special_tokens_map.items() if token in vocabulary}
    names["extra_special_tokens"] = [token for token in tokenizer.extra_special_tokens if str(token) in vocabulary]
    names |= {"model_input_names": tokenizer.model_input_names, "model_max_length": tokenizer.model_max_length}
    logger.info("The tokenizer is the one of tokenizer.json, which is no %s.", type(tokenizer).__name__)
    return PreTrainedTokenizerFast.from_pretrained(source, **plain(options), **names)


WITH_VERSION_4 = "load and save it once with transformers 4, which makes a tokenizer.json"
# What tokenizer_config.json may set otherwise than tokenizer.json: its name there, and in parts of the Rust tokenizer.
SETTINGS = {
    "do_lower_case": ("lowercase",), "strip_accents": ("strip_accents",), "tokenize_chinese_chars": ("handle_chinese_chars",),
    "add_prefix_space": ("add_prefix_space", "prepend_scheme"),
}  # fmt: skip


def check_sentencepiece(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if a file, or the normal form that it asks for, was not read as its own library reads it."""
    import sentencepiece  # only where there is such a file: it is not everywhere

    name = os.path.basename(path)
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=path)
    except Exception as error:
        raise ValueError(f"{name} is cut short or damaged: {cli.first_line(error)}") from error
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if rust and "fi" in processor.normalize("\ufb01") and "fi" not in (rust.normalizer or Unchanged()).normalize_str("\ufb01"):
        raise ValueError(f"transformers loses the normal form of {name}; {WITH_VERSION_4}")


class Unchanged:
    """A normalizer that is not there."""

    def normalize_str(self, text: str) -> str:
        return text


def does_the_same(file: tokenizers.Tokenizer, built: tokenizers.Tokenizer, settings: Mapping[str, Mapping[str, Any]]) -> bool:
    """Does what a class has built give the same ids as its tokenizer.json, but for what the files beside it set?"""
    asked = settings.get("tokenizer_config.json", {})
    ignored = {"vocab", "merges", "trim_offsets", "use_regex"}.union(
        *(SETTINGS[name] for name in SETTINGS.keys() & asked.keys())
    )

    def relevant(part: Any) -> Any:
        if isinstance(part, list):
            return [relevant(value) for value in part]
        return {k: relevant(v) for k, v in part.items() if k not in ignored} if isinstance(part, dict) else part or None

    parts = [json.loads(tokenizer.to_str()) for tokenizer in (file, built)]
    for name in ("normalizer", "pre_tokenizer", "model", *["decoder"] * bool(parts[0]["decoder"])):
        if relevant(parts[0][name]) != relevant(parts[1][name]):
            return False
    surroundings = []
    for tokenizer in (file, built):
        copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        copy.no_truncation()
        copy.no_padding()
        encodings = [copy.encode(*texts) for texts in (("a",), ("a", "b"))]
        columns = [zip(it.special_tokens_mask, it.ids, it.type_ids, strict=True) for it in encodings]
        surroundings.append([[column[1:] for column in rows if column[0]] for rows in columns])
    one, other, named = file.get_vocab(), built.get_vocab(), json.dumps([*settings.values()], ensure_ascii=False)
    added = other.keys() - one.keys()
    return surroundings[0] == surroundings[1] and one.items() <= other.items() and all(token in named for token in added)


def find_file(source: str, name: str, options: Mapping[str, Any]) -> str | None:
    """The path of a file of a tokenizer, None if it is not there."""
    try:
        return repositories.find_file(source, name, options)
    except OSError:
        return None


# Each class of transformers has its own words for a package that it misses.
MISSED = re.compile(r"to install ([\w-]+)|requires the ([\w-]+) lib|pip install ([\w-]+)|have `?([\w-]+)`? (?=or|installed)")


def why_no_tokenizer(source: str, options: Mapping[str, Any], error: Exception) -> str:
    """The reason of an error of AutoTokenizer, and what to do."""
    found = sorted(filter(TOKENIZER_FILES.fullmatch, os.listdir(source))) if os.path.isdir(source) else []
    if path := find_file(source, "tokenizer.json", options):
        try:
            tokenizers.Tokenizer.from_file(path)
        except Exception as problem:
            version, reason = tokenizers.__version__, cli.first_line(problem)
            return f"tokenizer.json is damaged, or newer than tokenizers {version} knows: {reason}"
    match = MISSED.search(str(error))
    packages = [isinstance(error, ImportError) and error.name, match and match[match.lastindex].lower()]
    if any(name.endswith(("model", "spm")) for name in found):
        packages = ["sentencepiece", "protobuf"]  # whatever else it tries then
    for package in filter(None, packages):
        if importlib.util.find_spec({"protobuf": "google.protobuf"}.get(package, package.replace("-", "_"))) is None:
            return f"it needs a package that is not installed: pip install {package}"
    kind = f", read as one for {options['config'].model_type}" if "config" in options else ""
    return repositories.plain_reason(error, options) + (f" (there is {', '.join(found)}{kind})" if found else "")


def match_config_and_tokenizer(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, model_args: arguments.ModelArguments
) -> None:
    """Every token id needs an embedding (else it reads NaN), and a fresh model the tokenizer's special ids."""
    num_ids = max(tokenizer.get_vocab().values()) + 1
    enough = 64 * math.ceil(num_ids / 64)
    if num_ids > config.vocab_size and model_args.resize_token_embeddings:
        logger.info("vocab_size=%d, a multiple of 64 that holds the tokenizer's ids; it was %d.", enough, config.vocab_size)
        config.vocab_size = enough
    if num_ids > config.vocab_size and config.is_encoder_decoder and not model_args.model_name_or_path:
        config.vocab_size = enough
        logger.warning("vocab_size=%d: the configuration has fewer than the tokenizer's ids.", config.vocab_size)
    if num_ids > config.vocab_size:
        remedy = "use the tokenizer these weights were trained with, or add --resize_token_embeddings"
        if not model_args.model_name_or_path:
            remedy = f"add --config_overrides vocab_size={enough}"
        cli.fail(f"the tokenizer has ids up to {num_ids - 1}, the model embeds only {config.vocab_size}: {remedy}")
    starts_with_eos = getattr(config, "decoder_start_token_id", None) == config.eos_token_id is not None
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token_id = getattr(tokenizer, name)
        if token_id is None or token_id == getattr(config, name, None):
            continue
        if model_args.model_name_or_path:
            logger.warning("The tokenizer's %s is %d, the model's %s.", name, token_id, getattr(config, name, None))
        else:
            setattr(config, name, token_id)
    starts = getattr(config, "decoder_start_token_id", None) is not None  # T5 has no such field until it is set
    if config.is_encoder_decoder and not (starts and model_args.model_name_or_path):
        config.decoder_start_token_id = config.eos_token_id if starts_with_eos else config.pad_token_id


def choose_row_length(data_args: arguments.DataArguments, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens per row: what is asked for if the model can take it, else the limit of tokenizer and model, at most 1024."""
    flag, asked, limit = (
        data_args.row_length_flag,
        getattr(data_args, data_args.row_length_flag),
        configurations.max_positions(config),
    )
    if asked is None:
        return min(tokenizer.model_max_length, limit or 1024, 1024)
    if limit is not None and asked > limit and not data_args.cuts_row_length:
        cli.fail(f"--{flag} {asked}: the model has positions for {limit} tokens; lower it, or train a model with more")
    most = min(tokenizer.model_max_length, limit or asked)
    if asked > most:
        logger.warning("--%s %d is cut to what tokenizer and model can take, %d.", flag, asked, most)
    return min(asked, most)


@contextlib.contextmanager
def tokenizer_as_loaded(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Within this context calls may truncate or not: a Rust tokenizer remembers the last one, and would be saved with that.

    Its fingerprint would change too, so that what was tokenised with it would not be found again in the cache.
    """
    rust = getattr(tokenizer, "backend_tokenizer", None)
    with TOKENIZER_IN_USE:
        truncation, padding = (rust.truncation, rust.padding) if rust else (None, None)
        try:
            yield
        finally:
            if rust:
                rust.enable_truncation(**truncation) if truncation else rust.no_truncation()
                rust.enable_padding(**padding) if padding else rust.no_padding()


TOKENIZER_IN_USE = threading.RLock()  # a stream tokenises in a thread of its own while the model is saved
