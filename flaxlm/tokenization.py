# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: loading them, fitting a configuration to one, using one without changing it, and how long rows may be."""

import contextlib
import importlib.util
import logging
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from flaxlm import arguments, cli, configurations, repositories

logger = logging.getLogger(__name__)


TOKENIZER_FILES = re.compile(r"(tokenizer(_config)?|vocab|special_tokens_map|added_tokens)\.json|vocab\.txt|.+\.(model|spm)")


def load_tokenizer(model_args: arguments.ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer named, or the one beside the weights."""
    source = model_args.tokenizer_name or model_args.model_name_or_path
    place = f"{'--tokenizer_name' if model_args.tokenizer_name else '--model_name_or_path'} {source}"
    options = {"trust_remote_code": model_args.trust_remote_code, "use_fast": model_args.use_fast_tokenizer}
    options |= {"cache_dir": model_args.cache_dir, "token": model_args.token, "revision": model_args.model_revision}
    has_config = not os.path.isdir(source) or os.path.isfile(os.path.join(source, "config.json"))
    if (
        not has_config
        and "tokenizer_class" not in repositories.read_json_object(os.path.join(source, "tokenizer_config.json"))[0]
    ):
        options["config"] = configurations.named_config(model_args)[0]  # the model's type says what the files are for
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if not tokenizer.get_vocab():
            raise ValueError("it has no tokens")
    except Exception as error:  # the Rust side raises Exception itself, and classes whatever they come upon
        cli.fail(f"{place}: no tokenizer can be loaded: {why_no_tokenizer(source, options, error)}")
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float) or not 1 <= length < math.inf:
        cli.fail(f"{place}: tokenizer_config.json: model_max_length={length}: must be a whole number, at least 1")
    tokenizer.model_max_length = int(length)
    return tokenizer


# Each class of transformers has its own words for a package that it misses.
MISSED = re.compile(r"to install ([\w-]+)|requires the ([\w-]+) lib|pip install ([\w-]+)|have `?([\w-]+)`? (?=or|installed)")


def why_no_tokenizer(source: str, options: Mapping[str, Any], error: Exception) -> str:
    """The reason of an error of AutoTokenizer, and what to do."""
    found = sorted(filter(TOKENIZER_FILES.fullmatch, os.listdir(source))) if os.path.isdir(source) else []
    if os.path.isdir(source) and not found:
        return "there is none in it; name another directory with --tokenizer_name"
    for name in found:
        if name.endswith(".json") and (problem := repositories.read_json_object(os.path.join(source, name))[1]):
            return f"{name} {problem}"
    match = MISSED.search(str(error))
    package = (isinstance(error, ImportError) and error.name) or (match and match[match.lastindex].lower())
    if any(name.endswith(("model", "spm")) for name in found) and importlib.util.find_spec("sentencepiece") is None:
        package = "sentencepiece"
    if package and importlib.util.find_spec({"protobuf": "google.protobuf"}.get(package, package.replace("-", "_"))) is None:
        return f"it needs a package that is not installed: pip install {package}"
    if type(error) is Exception:
        return f"tokenizer.json is damaged, or newer than tokenizers {tokenizers.__version__} knows: {cli.first_line(error)}"
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
    starts_with_eos = getattr(config, "decoder_start_token_id", None) == config.eos_token_id
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token_id = getattr(tokenizer, name)
        if token_id is None or token_id == getattr(config, name, None):
            continue
        if model_args.model_name_or_path:
            logger.warning("The tokenizer's %s is %d, the model's %s.", name, token_id, getattr(config, name, None))
        else:
            setattr(config, name, token_id)
    if config.is_encoder_decoder and (config.decoder_start_token_id is None or not model_args.model_name_or_path):
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
