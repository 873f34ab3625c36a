# SPDX-License-Identifier: Apache-2.0
"""Configuration and tokenizer: loading them, changing fields, fitting one to the other, and how long rows may be."""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from flaxlm import arguments, cli

logger = logging.getLogger(__name__)


def read_config(source: str, flag: str, **options) -> PretrainedConfig:
    """The configuration in a directory or on the Hub; `flag` is the one that named it."""
    # transformers would guess a configuration from the path, if there is a model type somewhere in it.
    if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "config.json")):
        cli.fail(f"{flag} {source}: no configuration can be loaded: there is no config.json in it")
    try:
        return AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        cli.fail(f"{flag} {source}: no configuration can be loaded: {cli.first_line(error)}")


def load_config(model_args: arguments.ModelArguments, models: arguments.ModelClasses) -> PretrainedConfig:
    """The configuration to build the model from, with `config_overrides` applied to a fresh one."""
    source = model_args.config_name or model_args.model_name_or_path
    if source is None:
        logger.warning("Fresh weights in the default configuration of %s.", model_args.model_type)
        try:
            config = CONFIG_MAPPING[model_args.model_type]()
        except ValueError:  # encoder-decoder and the like are made of two other models
            cli.fail(f"--model_type {model_args.model_type}: has no default configuration; {models.types()}")
    else:
        flag = "--config_name" if model_args.config_name else "--model_name_or_path"
        options = {"cache_dir": model_args.cache_dir, "token": model_args.token, "revision": model_args.model_revision}
        config = read_config(source, flag, trust_remote_code=model_args.trust_remote_code, **options)
    if type(config) not in models.by_config and not model_args.trust_remote_code:
        cli.fail(f"model type {config.model_type}: has no Flax class for this objective; {models.types()}")
    if model_args.config_overrides:
        apply_config_overrides(config, model_args.config_overrides)
    return config


def apply_config_overrides(config: PretrainedConfig, overrides: str) -> None:
    """Set fields of a configuration from "key=value,key=value"; a value must fit the type that the field has now."""
    fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    changed = []
    for override in filter(None, (part.strip() for part in overrides.split(","))):
        key, equals, text = (part.strip() for part in override.partition("="))
        name = config.attribute_map.get(key, key)
        if not equals:
            cli.fail(f"--config_overrides {override}: write key=value")
        if name in ("dense_act_fn", "is_gated_act"):
            cli.fail(f"--config_overrides {key}: follows from feed_forward_proj; set that")
        if name not in fields:
            cli.fail(f"--config_overrides {key}: is no field of a {config.model_type} configuration")
        kind = type(fields[name])
        if kind is int and ("prob" in name or "dropout" in name):
            kind = float  # some defaults are a plain 0
        try:
            setattr(config, name, parse_as(kind, text))
        except ValueError as error:
            cli.fail(f"--config_overrides {override}: {key} {error}")
        changed.append(config.attribute_map.get(name, name))
    update_derived_fields(config, fields, changed)


def update_derived_fields(config: PretrainedConfig, before: Mapping[str, Any], changed: Sequence[str]) -> None:
    """Change what follows from the changed fields; `before` are all fields as they were."""
    hidden, heads = (config.attribute_map.get(name, name) for name in ("hidden_size", "num_attention_heads"))
    if hidden in changed and heads not in changed and getattr(config, hidden) % getattr(config, heads):
        setattr(config, heads, max(1, getattr(config, hidden) // 64))
        logger.info("%s=%d: heads of 64 fit a hidden size of %d.", heads, getattr(config, heads), getattr(config, hidden))
    had_equal_depths = "num_layers" in changed and before.get("num_decoder_layers") == before["num_layers"]
    if had_equal_depths and "num_decoder_layers" not in changed:  # T5
        config.num_decoder_layers = config.num_layers
    if "feed_forward_proj" in changed:  # T5
        try:
            derived = type(config)(feed_forward_proj=config.feed_forward_proj)
        except ValueError:
            cli.fail(
                f"--config_overrides feed_forward_proj={config.feed_forward_proj}: write NAME or gated-NAME, as gated-gelu"
            )
        config.dense_act_fn, config.is_gated_act = derived.dense_act_fn, derived.is_gated_act


def parse_as(kind: type, text: str) -> Any:
    """Read `text` as a value of type `kind`; a field that is None takes a number, a truth value or text."""
    truth = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if kind is bool:
        if text.lower() not in truth:
            raise ValueError("takes true or false")
        return truth[text.lower()]
    if kind is int or kind is float:
        try:
            return kind(text)
        except ValueError:
            raise ValueError("takes a whole number" if kind is int else "takes a number") from None
    if kind is type(None):
        try:
            return json.loads({"true": "true", "false": "false", "none": "null"}.get(text.lower(), text))
        except ValueError:
            return text
    if kind is not str:
        raise ValueError(f"is a {kind.__name__}, which cannot be set here; edit the config.json")
    return text


def load_tokenizer(model_args: arguments.ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer named, or the one beside the weights."""
    source = model_args.tokenizer_name or model_args.model_name_or_path
    try:
        return AutoTokenizer.from_pretrained(
            source,
            cache_dir=model_args.cache_dir,
            use_fast=model_args.use_fast_tokenizer,
            token=model_args.token,
            revision=model_args.model_revision,
            trust_remote_code=model_args.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        flag = "--tokenizer_name" if model_args.tokenizer_name else "--model_name_or_path"
        cli.fail(f"{flag} {source}: no tokenizer can be loaded: {cli.first_line(error)}")


def match_config_and_tokenizer(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, model_args: arguments.ModelArguments
) -> None:
    """Every token id needs an embedding (else it reads NaN), and a fresh model the tokenizer's special ids."""
    num_ids = max(tokenizer.get_vocab().values()) + 1
    if num_ids > config.vocab_size and config.is_encoder_decoder and not model_args.model_name_or_path:
        config.vocab_size = 64 * math.ceil(num_ids / 64)
        logger.warning("vocab_size=%d: the configuration has fewer than the tokenizer's ids.", config.vocab_size)
    if num_ids > config.vocab_size:
        remedy = "use the tokenizer these weights were trained with"
        if not model_args.model_name_or_path:
            remedy = f"add --config_overrides vocab_size={64 * math.ceil(num_ids / 64)}"
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


def max_positions(config: PretrainedConfig) -> int | None:
    """Longest row the position table takes; None if there is no table."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and "roberta" in config.model_type:
        return limit - config.pad_token_id - 1  # RoBERTa counts positions from pad_token_id + 1
    return limit


def choose_row_length(data_args: arguments.DataArguments, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens per row: what is asked for if the model can take it, else the limit of tokenizer and model, at most 1024."""
    flag, asked, limit = data_args.row_length_flag, getattr(data_args, data_args.row_length_flag), max_positions(config)
    if asked is None:
        return min(tokenizer.model_max_length, limit or 1024, 1024)
    if limit is not None and asked > limit and not data_args.cuts_row_length:
        cli.fail(f"--{flag} {asked}: the model has positions for {limit} tokens; lower it, or train a model with more")
    most = min(tokenizer.model_max_length, limit or asked)
    if asked > most:
        logger.warning("--%s %d is cut to what tokenizer and model can take, %d.", flag, asked, most)
    return min(asked, most)


def fit_sparse_attention(config: PretrainedConfig, row_length: int, is_padded: bool) -> None:
    """BigBird's sparse attention takes whole blocks; rows too short for it get full attention, as PyTorch gives them.

    `is_padded`: are all rows of that length, rather than of the longest text's?
    """
    if config.model_type != "big_bird" or config.attention_type != "block_sparse":
        return
    longest_full = (5 + 2 * config.num_random_blocks) * config.block_size
    if row_length <= longest_full:
        config.attention_type = "original_full"
        logger.info("attention_type=original_full: sparse attention is for rows of more than %d tokens.", longest_full)
    elif row_length % config.block_size:
        cli.fail(f"--max_seq_length {row_length}: sparse attention takes multiples of {config.block_size} tokens")
    elif not is_padded:
        cli.fail(f"--max_seq_length {row_length}: sparse attention takes whole rows; add --pad_to_max_length")
