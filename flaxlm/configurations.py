# SPDX-License-Identifier: Apache-2.0
"""Configurations: loading them, changing fields and what follows from these, and whether a model can be made of one."""

import contextlib
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, NoReturn

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from flaxlm import arguments, cli, repositories

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
    # transformers would guess a configuration from the path, if there is a model type somewhere in it.
    if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "config.json")):
        cli.fail(f"{flag} {source}: no configuration can be loaded: there is no config.json in it")
    flags, options = options, {"trust_remote_code": False} | options
    with repositories.reading(f"{flag} {source}: no configuration can be loaded", flags):
        fields, problem = repositories.read_json_object(repositories.find_file(source, "config.json", options))
        kind, is_foreign = str(fields.get("model_type")), "auto_map" in fields and options["trust_remote_code"]
        if problem:
            cli.fail(f"{flag} {source}: config.json {problem}")
        if kind in CONFIG_MAPPING and not is_foreign:
            check_values(fields, CONFIG_MAPPING[kind], Origin(f"{flag} {source}: config.json"))
        return AutoConfig.from_pretrained(source, **options)


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
    except cli.Ending:
        raise
    except Exception:  # of types that are made of others, which have to be named
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
    typed, values = {}, {}
    for override in filter(None, (part.strip() for part in re.split(r",(?![^{]*})", overrides))):  # not within a JSON object
        key, equals, text = (part.strip() for part in override.partition("="))
        name = config.attribute_map.get(key, key)
        if not equals:
            cli.fail(f"--config_overrides {override}: write key=value")
        if name in ("dense_act_fn", "is_gated_act"):
            cli.fail(f"--config_overrides {key}: follows from feed_forward_proj; set that")
        if name == "encoder_layers" != key:
            cli.fail(f"--config_overrides {key}: would leave the decoder as it is; set encoder_layers and decoder_layers")
        if "rope_parameters" in fields and name in ROPE_FIELDS:
            name, present = "rope_parameters", values.get("rope_parameters") or fields["rope_parameters"]
            values[name] = with_rope(present, key, text, config.model_type)
        elif name not in fields:
            cli.fail(f"--config_overrides {key}: is no field of a {config.model_type} configuration")
        else:
            kind = type(fields[name])
            if kind is int and IS_RATE.search(name):
                kind = float  # some defaults are a plain 0
            try:
                values[name] = parse_as(kind, text)
            except ValueError as error:
                cli.fail(f"--config_overrides {override}: {key} {error}")
        typed[name] = key
    origin = Origin("the configuration", typed)
    check_values(fields | values, type(config), origin)
    for name, value in values.items():
        try:
            setattr(config, name, value)
        except Exception as error:  # of a class that is stricter than we are
            origin.fail(name, value, repositories.plain_reason(error, {}))
    update_derived_fields(config, fields, typed.keys())
    check_reads_back(config, origin)
    return typed


# In older configurations, and in overrides: which layers a field is about, where these have rotations of their own.
ROPE_FIELDS = {
    "rope_parameters": None, "rope_scaling": None, "rope_theta": "full_attention", "global_rope_theta": "full_attention",
    "local_rope_theta": "sliding_attention", "rope_local_base_freq": "sliding_attention",
}  # fmt: skip


def with_rope(parameters: Mapping[str, Any], key: str, text: str, model_type: str) -> dict[str, Any]:
    """`rope_parameters` with one of ROPE_FIELDS changed: a JSON object adds to what is there, null does away with scaling."""
    value, layers = parse_as(type(None), text), ROPE_FIELDS[key]
    kinds = [kind for kind, part in parameters.items() if isinstance(part, dict)]  # of layers; none where all are alike
    if layers and not kinds and key != "rope_theta":
        cli.fail(f"--config_overrides {key}: is no field of a {model_type} configuration")
    if layers:
        change, chosen = {"rope_theta": value}, [layers]
    elif value is None:
        thetas = {kind: {"rope_type": "default", "rope_theta": parameters[kind]["rope_theta"]} for kind in kinds}
        return thetas or {"rope_type": "default", "rope_theta": parameters["rope_theta"]}
    elif not isinstance(value, dict):
        cli.fail(f"--config_overrides {key}={text}: must be null or a JSON object")
    elif kinds and value.keys() <= set(kinds):
        return {kind: {**parameters[kind], **value.get(kind, {})} for kind in kinds}
    else:
        change, chosen = {"rope_type" if name == "type" else name: part for name, part in value.items()}, kinds
    if not kinds:
        return {**parameters, **change}
    return {kind: {**parameters[kind], **(change if kind in chosen else {})} for kind in kinds}


def check_reads_back(config: PretrainedConfig, origin: Origin) -> None:
    """Refuse a configuration that its own class would not read again, or not with the values that were set."""
    try:
        again = type(config)(**config.to_dict())
    except Exception as error:
        with contextlib.suppress(AttributeError):  # of a type that we know nothing about
            check_sizes(config, origin)
        typed = ",".join(f"{key}={getattr(config, name)}" for name, key in origin.overrides.items())
        reason = f"make no configuration of {config.model_type}: {repositories.plain_reason(error, {})}"
        cli.fail(f"--config_overrides {typed}: {reason}")
    for name in origin.overrides:
        if getattr(again, name) != getattr(config, name):
            kept = json.dumps(getattr(again, name), default=str)
            origin.fail(name, getattr(config, name), f"is not kept: read again, a {config.model_type} configuration has {kept}")


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
        if old("head_dim") is not None:  # Llama, Mistral, Gemma, Qwen 3
            set_unless_changed("head_dim", head_size)
            if old("query_pre_attn_scalar") == old("head_dim"):  # Gemma 2, as it is by default
                set_unless_changed("query_pre_attn_scalar", config.head_dim)
        if old("rotary_dim") is not None:  # GPT-J
            set_unless_changed("rotary_dim", min(config.rotary_dim, head_size))
    if old("num_key_value_heads") and getattr(config, heads) != old(heads):  # as many queries to a key as before
        set_unless_changed("num_key_value_heads", max(1, getattr(config, heads) * old("num_key_value_heads") // old(heads)))
    if "num_layers" in changed and old("num_decoder_layers") == old("num_layers"):  # T5
        set_unless_changed("num_decoder_layers", config.num_layers)
    if "num_layers" in changed and "attention_types" in before:  # GPT-Neo
        config.attention_layers = list(itertools.islice(itertools.cycle(config.attention_layers), config.num_layers))
        config.attention_types = [[config.attention_layers, 1]]
    if old("layer_types") is not None:
        config.layer_types = fitting_layer_types(config, before)
    if "rope_parameters" in changed:
        config.standardize_rope_params()
    if "feed_forward_proj" in changed:  # T5
        name = config.feed_forward_proj.removeprefix("gated-")
        if name not in ACTIVATIONS:
            kinds = f"NAME or gated-NAME, as gated-gelu; NAME is one of {', '.join(ACTIVATIONS)}"
            cli.fail(f"--config_overrides feed_forward_proj={config.feed_forward_proj}: write {kinds}")
        derived = type(config)(feed_forward_proj=config.feed_forward_proj)
        config.dense_act_fn, config.is_gated_act = derived.dense_act_fn, derived.is_gated_act
    if follows:
        logger.info("With %s follow: %s", ", ".join(changed), ", ".join(f"{name}={value}" for name, value in follows.items()))


def fitting_layer_types(config: PretrainedConfig, before: Mapping[str, Any]) -> list[str]:
    """The kind of each layer's attention: as its class orders them, or as they were as far as there are layers."""

    def usual(fields: Mapping[str, Any]) -> list[str]:
        names = [name for name in fields if re.search("layers|window|pattern", name)]
        return type(config)(**{name: fields[name] for name in names}).layer_types

    if before["layer_types"] == usual(before):
        return usual(config.to_dict())
    if config.num_hidden_layers > len(before["layer_types"]):
        reason = f"layer_types of the config.json tells of {len(before['layer_types'])} layers only; edit it"
        cli.fail(f"--config_overrides num_hidden_layers={config.num_hidden_layers}: {reason}")
    return before["layer_types"][: config.num_hidden_layers]


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
OF_OTHER_USE = re.compile("classif|summary_|^qa_|label|use_cache|sparse_pred")  # fields that no objective here reads
READ_HERE = {"tie_word_embeddings", "is_decoder", "is_encoder_decoder", "add_cross_attention"}  # of those of all types
MAY_BE_NONE = {
    "n_inner", "intermediate_size", "head_dim", "hidden_activation", "rope_scaling", "rope_parameters", "sliding_window",
    "rotary_dim", "num_key_value_heads", "num_decoder_layers", "embedding_size", "word_embed_proj_dim", "decoder_vocab_size",
    "layer_types", "final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention",
}  # fmt: skip
ACTIVATION_FIELDS = {"hidden_act", "hidden_activation", "activation", "activation_function", "dense_act_fn"}
ACTIVATIONS = (
    "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish", "tanh",
)  # fmt: skip
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
CHOICES = {"attention_type": ("block_sparse", "original_full"), "encoder_attention_type": ("local", "transient-global")}
CHOICES |= dict.fromkeys(ACTIVATION_FIELDS, ACTIVATIONS)


def check_values(fields: Mapping[str, Any], config_class: type[PretrainedConfig], origin: Origin) -> None:
    """Refuse values of the wrong kind, and numbers that no model has; `fields` are as in a config.json, aliases included."""
    if config_class.sub_configs or not config_class.__module__.startswith("transformers."):
        return  # it is made of others, or comes with a Hub repository
    typed = {config_class.attribute_map.get(key, key): key for key in fields}
    general, defaults = PretrainedConfig().to_dict().keys() - READ_HERE, config_class().to_dict()
    for key in ROPE_FIELDS.keys() & fields.keys() if "rope_parameters" in defaults else ():
        if objection := object_to_rope(key, fields[key]):
            origin.fail(key, fields[key], objection)
    for name, default in defaults.items():
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
    if isinstance(default, int) or name in ("n_inner", "intermediate_size", "head_dim", "sliding_window"):
        least = 4 if name == "relative_attention_num_buckets" else int(default != 0)
        return None if type(value) is int and value >= least else f"must be a whole number, at least {least}"
    if name == "layer_types":
        is_right = isinstance(value, list) and set(map(str, value)) <= {"full_attention", "sliding_attention"}
        return None if is_right else "must be a list of full_attention and sliding_attention"
    return None if default is None or isinstance(value, type(default)) else f"must be a {type(default).__name__}"


def object_to_rope(name: str, value: Any) -> str | None:
    """The same for one of ROPE_FIELDS."""
    if ROPE_FIELDS[name]:
        return None if is_positive(value) else "must be a number above 0"
    if value is None or not isinstance(value, dict):
        return None if value is None else "must be null or a JSON object"
    for part in (value, *(part for part in value.values() if isinstance(part, dict))):
        kind = part.get("rope_type", part.get("type", "default"))
        if kind not in ROPE_TYPES:
            return f"its rope_type must be one of {', '.join(ROPE_TYPES)}"
        if wrong := [key for key in ("rope_theta", "factor") if key in part and not is_positive(part[key])]:
            return f"its {wrong[0]} must be a number above 0"
    return None


def is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


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
        is_whole = kind in OWN_WIDTH or config.hidden_size % getattr(config, name, 1) == 0
        require(is_whole, name, f"does not divide the hidden size, {config.hidden_size}, so no model can be made of it")
    heads, key_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    require(not key_heads or heads % key_heads == 0, "num_key_value_heads", f"does not divide the number of heads, {heads}")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if kind == "roformer" or hasattr(config, "rope_parameters"):
        name = "head_dim" if kind in OWN_WIDTH else "num_attention_heads"
        require(head_size % 2 == 0, name, f"makes heads of {head_size}, an odd number, which cannot be turned in pairs")
    has_window = "sliding_attention" in (getattr(config, "layer_types", None) or []) and hasattr(config, "sliding_window")
    require(not has_window or config.sliding_window is not None, "sliding_window", "layers of sliding attention need one")
    is_right = kind != "gptj" or (config.rotary_dim or 0) in range(2, head_size + 1, 2)
    require(is_right, "rotary_dim", f"must be even, and at most a head's size, {head_size}")
    if getattr(config, "use_sliding_window", False):  # Qwen
        require(config.sliding_window is not None, "sliding_window", "must be the number of tokens seen, or drop the window")


OWN_WIDTH = ("gemma", "mistral", "qwen3")  # types of which all heads together may be wider or narrower than the hidden size


def max_positions(config: PretrainedConfig) -> int | None:
    """Longest row the position table takes; None if there is no table."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and "roberta" in config.model_type:
        return limit - (config.pad_token_id or 0) - 1  # RoBERTa counts positions from pad_token_id + 1
    return limit


def give_full_attention(
    config: PretrainedConfig, row_length: int, remedy: str = "add --config_overrides attention_type=original_full"
) -> None:
    """BigBird's sparse attention is not here; rows too short for it have full attention in PyTorch too."""
    if config.model_type != "big_bird" or config.attention_type != "block_sparse":
        return
    longest_full = (5 + 2 * config.num_random_blocks) * config.block_size
    if row_length > longest_full:
        reason = f"sparse attention is not here, and rows of more than {longest_full} tokens would have it"
        cli.fail(f"attention_type=block_sparse: {reason}: {remedy}")
    config.attention_type = "original_full"
    logger.info("attention_type=original_full: rows of at most %d tokens have full attention.", longest_full)
