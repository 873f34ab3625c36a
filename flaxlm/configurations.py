# SPDX-License-Identifier: Apache-2.0
"""Configurations: loading them, changing fields and what follows from these, and whether a model can be made of one."""

import itertools
import json
import logging
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from flaxlm import arguments, cli

logger = logging.getLogger(__name__)


class Origin(NamedTuple):
    """Where a configuration is from, for messages: a file or a flag, and the fields that --config_overrides set, as typed."""

    name: str
    overrides: Mapping[str, str] = {}

    def fail(self, field: str, value: Any, reason: str) -> NoReturn:
        """End the program because of a field's value."""
        place = f"--config_overrides {self.overrides[field]}" if field in self.overrides else f"{self.name}: {field}"
        cli.fail(f"{place}={value if isinstance(value, str) else json.dumps(value, default=str)}: {reason}")


def read_config(source: str, flag: str, **options) -> PretrainedConfig:
    """The configuration in a directory or on the Hub; `flag` is the one that named it."""
    path = os.path.join(source, "config.json") if os.path.isdir(source) else source
    # transformers would guess a configuration from the path, if there is a model type somewhere in it.
    if os.path.isdir(source) and not os.path.isfile(path):
        cli.fail(f"{flag} {source}: no configuration can be loaded: there is no config.json in it")
    if os.path.isfile(path):
        fields, problem = read_json_object(path)
        kind, is_foreign = str(fields.get("model_type")), "auto_map" in fields and options.get("trust_remote_code")
        if problem:
            cli.fail(f"{flag} {source}: config.json {problem}")
        if kind in CONFIG_MAPPING and not is_foreign:
            check_values(fields, CONFIG_MAPPING[kind], Origin(f"{flag} {source}: config.json"))
    try:
        return AutoConfig.from_pretrained(source, **{"trust_remote_code": False} | options)
    except Exception as error:  # whatever a class makes of values that it does not expect
        cli.fail(f"{flag} {source}: no configuration can be loaded: {plain_reason(error, options)}")


LEADS_ASTRAY = {  # what is in messages of transformers, and what to say instead
    "Unrecognized model": "its config.json has no model_type",
    "Repo id must be": "there is no such directory, and no repository of the Hub can have that name",
    "custom code": "it comes with code of its own, which is not run",
    "not NoneType|'NoneType' object|model_proto": "a file that its class needs is missing",
    "SentencePiece and Tiktoken failed": "it is cut short or damaged, or of tiktoken: pip install tiktoken blobfile",
}


def plain_reason(error: Exception, options: Mapping[str, Any]) -> str:
    """The first line of an error, or better; `options` say whether there is a flag --trust_remote_code."""
    reason = cli.first_line(error)
    advice = " unless --trust_remote_code is added" if "custom code" in reason and "trust_remote_code" in options else ""
    replacement = next((LEADS_ASTRAY[part] + advice for part in LEADS_ASTRAY if re.search(part, reason)), None)
    return replacement or reason


def read_json_object(path: str) -> tuple[dict[str, Any], str | None]:
    """What a JSON file holds, and what is wrong with it, if anything is."""
    try:
        fields = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"cannot be read as JSON: {cli.first_line(error)}"
    return (fields, None) if isinstance(fields, dict) else ({}, "must hold one JSON object")


def named_config(model_args: arguments.ModelArguments) -> tuple[PretrainedConfig, Origin]:
    """The configuration that the flags name, as it is, and where it is from."""
    source = model_args.config_name or model_args.model_name_or_path
    if source is None:
        return CONFIG_MAPPING[model_args.model_type](), Origin(f"--model_type {model_args.model_type}")
    flag = "--config_name" if model_args.config_name else "--model_name_or_path"
    options = {"cache_dir": model_args.cache_dir, "token": model_args.token, "revision": model_args.model_revision}
    config = read_config(source, flag, trust_remote_code=model_args.trust_remote_code, **options)
    return config, Origin(f"{flag} {source}: config.json")


def load_config(model_args: arguments.ModelArguments, classes: arguments.Classes) -> PretrainedConfig:
    """The configuration to build the model from, with `config_overrides` applied to a fresh one."""
    try:
        config, origin = named_config(model_args)
    except ValueError:  # encoder-decoder and the like are made of two other models
        cli.fail(f"--model_type {model_args.model_type}: has no default configuration; {arguments.supported(classes)}")
    if not (model_args.config_name or model_args.model_name_or_path):
        logger.warning("Fresh weights in the default configuration of %s.", model_args.model_type)
    if config.model_type not in classes:
        cli.fail(f"model type {config.model_type}: has no Flax class for this objective; {arguments.supported(classes)}")
    check_values(config.to_dict(), type(config), origin)
    if model_args.config_overrides:
        origin = origin._replace(overrides=apply_config_overrides(config, model_args.config_overrides))
    check_sizes(config, origin)
    return config


def apply_config_overrides(config: PretrainedConfig, overrides: str) -> dict[str, str]:
    """Set fields from "key=value,key=value", values of the type that a field has now; returns them with the keys as typed."""
    fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    typed = {}
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
        if kind is int and IS_RATE.search(name):
            kind = float  # some defaults are a plain 0
        try:
            setattr(config, name, parse_as(kind, text))
        except ValueError as error:
            cli.fail(f"--config_overrides {override}: {key} {error}")
        typed[name] = key
    check_values(config.to_dict(), type(config), Origin("the configuration", typed))
    update_derived_fields(config, fields, typed.keys())
    try:
        type(config)(**config.to_dict())
    except Exception as error:  # of a configuration that its own class would not read again
        cli.fail(f"--config_overrides {overrides}: make no configuration of {config.model_type}: {cli.first_line(error)}")
    return typed


def update_derived_fields(config: PretrainedConfig, before: Mapping[str, Any], changed: Collection[str]) -> None:
    """Change what follows from the changed fields, unless it was changed itself; `before` are all fields as they were."""
    hidden, heads = (config.attribute_map.get(name, name) for name in ("hidden_size", "num_attention_heads"))
    old, follows = before.get, {}

    def set_unless_changed(name: str, value: Any) -> None:
        if name in before and name not in changed and getattr(config, name) != value:
            follows[name] = value
            setattr(config, name, value)

    if hidden in changed:
        size = getattr(config, hidden)
        for name in (heads, "decoder_attention_heads"):
            if name in before and size % getattr(config, name):
                set_unless_changed(name, max(1, size // 64))  # heads of 64
        if old("word_embed_proj_dim") == old(hidden):  # OPT
            set_unless_changed("word_embed_proj_dim", size)
    if {hidden, heads} <= before.keys() and {hidden, heads} & set(changed):
        head_size = getattr(config, hidden) // getattr(config, heads)
        if old("head_dim") is not None:  # Llama, Mistral, Gemma
            set_unless_changed("head_dim", head_size)
        if old("rotary_dim") is not None:  # GPT-J
            set_unless_changed("rotary_dim", min(config.rotary_dim, head_size))
    if old("num_key_value_heads") and getattr(config, heads) != old(heads):  # as many queries to a key as before
        set_unless_changed("num_key_value_heads", max(1, getattr(config, heads) * old("num_key_value_heads") // old(heads)))
    if "num_layers" in changed and old("num_decoder_layers") == old("num_layers"):  # T5
        set_unless_changed("num_decoder_layers", config.num_layers)
    if "num_layers" in changed and "attention_types" in before:  # GPT-Neo
        config.attention_layers = list(itertools.islice(itertools.cycle(config.attention_layers), config.num_layers))
        config.attention_types = [[config.attention_layers, 1]]
    if "encoder_layers" in before:  # BART and its kind
        if "num_hidden_layers" in changed and "encoder_layers" not in changed:
            cli.fail("--config_overrides num_hidden_layers: has no effect here; set encoder_layers and decoder_layers")
        config.num_hidden_layers = config.encoder_layers
    if "feed_forward_proj" in changed:  # T5
        name = config.feed_forward_proj.removeprefix("gated-")
        if name not in ACTIVATIONS:
            kinds = f"NAME or gated-NAME, as gated-gelu; NAME is one of {', '.join(ACTIVATIONS)}"
            cli.fail(f"--config_overrides feed_forward_proj={config.feed_forward_proj}: write {kinds}")
        derived = type(config)(feed_forward_proj=config.feed_forward_proj)
        config.dense_act_fn, config.is_gated_act = derived.dense_act_fn, derived.is_gated_act
    if follows:
        logger.info("With %s follow: %s", ", ".join(changed), ", ".join(f"{name}={value}" for name, value in follows.items()))


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


# ---- Can a model be made of it? ----------------------------------------------------------------------------------------


IS_RATE = re.compile("drop|prob")  # in names of fields
OF_OTHER_USE = re.compile("classif|summary_|^qa_|label|use_cache")  # fields that no objective here reads
READ_HERE = {"tie_word_embeddings", "is_decoder", "is_encoder_decoder", "add_cross_attention"}  # of those of all types
MAY_BE_NONE = {
    "n_inner", "intermediate_size", "head_dim", "hidden_activation", "rope_scaling", "sliding_window", "rotary_dim",
    "num_key_value_heads", "num_decoder_layers", "embedding_size", "word_embed_proj_dim", "decoder_vocab_size",
}  # fmt: skip
ACTIVATION_FIELDS = {"hidden_act", "hidden_activation", "activation", "activation_function", "dense_act_fn"}
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish", "tanh")
CHOICES = {"attention_type": ("block_sparse", "original_full"), "encoder_attention_type": ("local", "transient-global")}
CHOICES |= dict.fromkeys(ACTIVATION_FIELDS, ACTIVATIONS)


def check_values(fields: Mapping[str, Any], config_class: type[PretrainedConfig], origin: Origin) -> None:
    """Refuse values of the wrong kind, and numbers that no model has; `fields` are as in a config.json, aliases included."""
    if config_class.has_no_defaults_at_init or not config_class.__module__.startswith("transformers."):
        return  # it is made of others, or comes with a Hub repository
    typed = {config_class.attribute_map.get(key, key): key for key in fields}
    general = PretrainedConfig().to_dict().keys() - READ_HERE
    for name, default in config_class().to_dict().items():
        key, is_id = typed.get(name, name), name.endswith("_token_id")
        value = fields.get(key, default)
        if (not is_id and (name in general or OF_OTHER_USE.search(name))) or (value is None and (is_id or name in MAY_BE_NONE)):
            continue
        if objection := object_to(name, value, default):
            origin.fail("feed_forward_proj" if name == "dense_act_fn" else key, value, objection)


def object_to(name: str, value: Any, default: Any) -> str | None:
    """What is wrong with a field's value, `default` being one that is right; None if nothing is."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if name.endswith("_token_id"):
        ids = value if isinstance(value, list) else [value]
        return None if all(type(token_id) is int for token_id in ids) else "must be the id of a token"
    if name in CHOICES:
        return None if value in CHOICES[name] else f"must be one of {', '.join(CHOICES[name])}"
    if IS_RATE.search(name):
        return None if is_number and 0 <= value < 1 else "must be a number from 0 to below 1"
    if isinstance(default, bool):
        is_right = value is default if name == "is_encoder_decoder" else isinstance(value, bool)
        return None if is_right else f"must be {json.dumps(default) if isinstance(value, bool) else 'true or false'}"
    if isinstance(default, float):
        return None if is_number and value >= 0 else "must be a number, at least 0"
    if isinstance(default, int) or name in ("n_inner", "intermediate_size", "head_dim"):
        least = 4 if name == "relative_attention_num_buckets" else int(default != 0)
        return None if type(value) is int and value >= least else f"must be a whole number, at least {least}"
    if name == "rope_scaling":
        return None if isinstance(value, dict) else "must be null or a JSON object"
    return None if default is None or isinstance(value, type(default)) else f"must be a {type(default).__name__}"


def check_sizes(config: PretrainedConfig, origin: Origin) -> None:
    """Refuse sizes that do not go together; each by itself is right (check_values)."""

    def require(holds: bool, name: str, reason: str) -> None:
        if not holds:
            origin.fail(config.attribute_map.get(name, name), getattr(config, name), reason)

    limit, kind = max_positions(config), config.model_type
    if limit is not None:
        require(limit > 0, "max_position_embeddings", f"must be at least {config.max_position_embeddings - limit + 1}")
    if hasattr(config, "relative_attention_max_distance"):  # T5, whose heads have a width of their own
        least = config.relative_attention_num_buckets // 2 + 1  # a logarithm of the ratio is taken
        require(config.relative_attention_max_distance >= least, "relative_attention_max_distance", f"must be at least {least}")
        return
    for name in ("num_attention_heads", "decoder_attention_heads"):
        is_whole = kind == "gemma" or config.hidden_size % getattr(config, name, 1) == 0
        require(is_whole, name, f"does not divide the hidden size, {config.hidden_size}, so no model can be made of it")
    heads, key_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    require(not key_heads or heads % key_heads == 0, "num_key_value_heads", f"does not divide the number of heads, {heads}")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if kind in ("llama", "mistral", "gemma", "roformer"):
        name = "head_dim" if kind == "gemma" else "num_attention_heads"
        require(head_size % 2 == 0, name, f"makes heads of {head_size}, an odd number, which cannot be turned in pairs")
    is_right = (getattr(config, "rotary_dim", None) or 0) in range(0, head_size + 1, 2)
    require(is_right, "rotary_dim", f"must be even, and at most a head's size, {head_size}")


def max_positions(config: PretrainedConfig) -> int | None:
    """Longest row the position table takes; None if there is no table."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and "roberta" in config.model_type:
        return limit - (config.pad_token_id or 0) - 1  # RoBERTa counts positions from pad_token_id + 1
    return limit


def give_full_attention(config: PretrainedConfig, row_length: int) -> None:
    """BigBird's sparse attention is not here; rows too short for it have full attention in PyTorch too."""
    if config.model_type != "big_bird" or config.attention_type != "block_sparse":
        return
    longest_full = (5 + 2 * config.num_random_blocks) * config.block_size
    if row_length > longest_full:
        advice = f"rows of more than {longest_full} tokens would have it: add --config_overrides attention_type=original_full"
        cli.fail(f"attention_type=block_sparse: sparse attention is not here, and {advice}")
    config.attention_type = "original_full"
    logger.info("attention_type=original_full: rows of at most %d tokens have full attention.", longest_full)
