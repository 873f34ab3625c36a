# SPDX-License-Identifier: Apache-2.0
"""Configurations."""

import json
import math

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http
from transformers import CONFIG_MAPPING, AutoConfig

from flaxlm import arguments, configurations, models, repositories
from tests.conftest import TINY
from tests.hub_server import serve


def test_max_positions():
    """RoBERTa's positions start behind its padding id; other types use the whole table (defects 16, 66, 71, 72)."""
    assert configurations.max_positions(AutoConfig.for_model("roberta", max_position_embeddings=514)) == 512
    assert configurations.max_positions(AutoConfig.for_model("bert")) == 512
    assert configurations.max_positions(AutoConfig.for_model("gpt2", n_positions=48)) == 48
    assert configurations.max_positions(AutoConfig.for_model("bloom")) is None


def test_parse_as():
    assert configurations.parse_as(int, "12") == 12
    assert configurations.parse_as(float, "3") == 3.0
    assert configurations.parse_as(bool, "False") is False
    assert configurations.parse_as(str, "gelu") == "gelu"
    assert [configurations.parse_as(type(None), value) for value in ("7", "0.5", "true", "word")] == [7, 0.5, True, "word"]
    for kind, value in ((int, "1.5"), (float, "x"), (bool, "2"), (list, "1")):
        with pytest.raises(ValueError, match=r"takes|is a"):
            configurations.parse_as(kind, value)


def test_model_type_alone_and_config_overrides(byte_level_tokenizer, corpus, tmp_path):
    """A fresh configuration takes the tokenizer's special ids; heads that no longer fit are adapted."""
    import run_mlm_flax as script

    byte_level_tokenizer.save_pretrained(tmp_path / "tokenizer")
    overrides = "hidden_size=128,num_hidden_layers=1,intermediate_size=64,vocab_size=512,hidden_act=relu,layer_norm_eps=1e-6"
    script.main(
        ["--model_type", "bert", "--tokenizer_name", str(tmp_path / "tokenizer"), "--train_file", str(corpus), "--max_steps",
         "1", "--output_dir", str(tmp_path / "out"), "--max_seq_length", "32", "--config_overrides", overrides]
    )  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_attention_heads"] == 2
    assert config["hidden_act"] == "relu"
    assert config["layer_norm_eps"] == 1e-6
    assert config["pad_token_id"] == byte_level_tokenizer.pad_token_id == 1
    assert config["architectures"] == ["BertForMaskedLM"]


# The types of the training scripts, by what is trained.
MODELS = {"mlm": models.MASKED, "clm": models.CAUSAL, "t5": models.SPANS, "bart": models.DENOISING}


# ---- Configurations that are none ----------------------------------------------------------------------------------------


def load(objective="mlm", **model_args):
    return configurations.load_config(arguments.ModelArguments(**model_args), MODELS[objective])


BERT = TINY | {"model_type": "bert", "vocab_size": 512, "max_position_embeddings": 64}


@pytest.mark.parametrize("content", ["[]", "5", "null", "{", "", "\x00", "[" * 100_000])
def test_a_config_that_is_no_json_object(content, refuses, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with refuses(rf"^--config_name {tmp_path}: config.json (must hold one JSON object|cannot be read as JSON: )"):
        load(config_name=str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hidden_size": 32}, "its config.json has no model_type"),
        ({"model_type": "newer"}, "has model type `newer` but Transformers does not recognize"),
        ({"model_type": ["bert"]}, "unhashable"),
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}},
            "code of its own, which is not run unless --trust_rem",
        ),
    ],
)
def test_a_config_of_no_type(fields, reason, refuses, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with refuses(rf"^--config_name {tmp_path}: no configuration can be loaded: .*{reason}"):
        load(config_name=str(tmp_path))


WHOLE, RATE, NUMBER, TRUTH = "must be a whole number", "must be a number from 0 to", "must be a number", "must be true or false"
WRONG = [
    ("hidden_size", "abc", WHOLE), ("hidden_size", None, WHOLE), ("hidden_size", 32.0, WHOLE), ("hidden_size", -32, WHOLE),
    ("hidden_size", True, WHOLE), ("hidden_size", [32], WHOLE), ("hidden_size", math.nan, WHOLE), ("hidden_size", 0, WHOLE),
    ("vocab_size", None, WHOLE), ("vocab_size", "512", WHOLE), ("vocab_size", 1.5, WHOLE), ("vocab_size", 0, WHOLE),
    ("num_hidden_layers", -1, WHOLE), ("num_hidden_layers", {"a": 1}, WHOLE), ("num_attention_heads", 0, WHOLE),
    ("num_attention_heads", "2", WHOLE), ("max_position_embeddings", None, WHOLE), ("type_vocab_size", 0, WHOLE),
    ("hidden_dropout_prob", 1.5, RATE), ("hidden_dropout_prob", 1, RATE), ("hidden_dropout_prob", None, RATE),
    ("attention_probs_dropout_prob", -0.1, RATE), ("attention_probs_dropout_prob", "none", RATE),
    ("layer_norm_eps", "small", NUMBER), ("layer_norm_eps", None, NUMBER), ("layer_norm_eps", math.inf, NUMBER),
    ("initializer_range", -1, NUMBER), ("initializer_range", True, NUMBER),
    ("hidden_act", "foo", "must be one of gelu, "), ("hidden_act", None, "must be one"), ("hidden_act", ["gelu"], "must be"),
    ("is_decoder", "no", TRUTH), ("tie_word_embeddings", None, TRUTH), ("is_encoder_decoder", True, "must be false"),
    ("pad_token_id", "<pad>", "must be the id"), ("eos_token_id", 1.5, "must"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "reason"), WRONG)
def test_a_field_of_the_wrong_kind(field, value, reason, refuses, tmp_path):
    """In a config.json: the file and the field are named."""
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    assert load(config_name=str(tmp_path)).hidden_size == 32
    (tmp_path / "config.json").write_text(json.dumps(BERT | {field: value}))
    with refuses(rf"^--config_name {tmp_path}: config.json: {field}=.*: {reason}"):
        load(config_name=str(tmp_path))
    with refuses(rf"^--model_name_or_path {tmp_path}: config.json: {field}=.*: {reason}"):
        load(model_name_or_path=str(tmp_path))


@pytest.mark.parametrize(
    ("objective", "model_type", "field", "value"),
    [
        ("clm", "llama", "hidden_size", "abc"),  # which the class itself divides
        ("clm", "llama", "num_attention_heads", 0),
        ("clm", "llama", "rope_scaling", "linear"),
        ("clm", "llama", "rope_scaling", {"type": "linear", "factor": 0}),
        ("clm", "llama", "rope_scaling", {"rope_type": "newer", "factor": 2.0}),
        ("clm", "llama", "rope_theta", "10000"),
        ("clm", "llama", "rope_theta", 0),
        ("clm", "qwen3", "rope_parameters", {"rope_theta": None}),
        ("clm", "gemma2", "layer_types", ["full"] * 26),
        ("clm", "gemma2", "layer_types", "full_attention"),
        ("clm", "gemma2", "query_pre_attn_scalar", 256.0),
        ("clm", "qwen2", "sliding_window", "none"),
        ("mlm", "modernbert", "global_rope_theta", -1),
        ("mlm", "modernbert", "rope_parameters", {"full_attention": {"rope_theta": "x"}}),
        ("mlm", "modernbert", "hidden_activation", "gelu_newer"),
        ("clm", "gpt2", "n_embd", "abc"),
        ("clm", "gpt2", "num_hidden_layers", 1.0),  # another name of n_layer
        ("clm", "gpt2", "n_inner", "wide"),
        ("clm", "mistral", "sliding_window", "none"),
        ("clm", "bloom", "hidden_dropout", 1.0),
        ("t5", "t5", "d_kv", None),
        ("t5", "t5", "feed_forward_proj", "gated-foo"),
        ("t5", "t5", "relative_attention_num_buckets", 2),
        ("bart", "bart", "encoder_attention_heads", "16"),
        ("bart", "bart", "is_encoder_decoder", False),
    ],
)
def test_a_field_of_the_wrong_kind_in_other_types(objective, model_type, field, value, refuses, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, field: value}))
    with refuses(rf"^--config_name {tmp_path}: config.json: {field}=.*: .*must be "):
        load(objective, config_name=str(tmp_path))


def test_default_configurations_are_right():
    """Of all types; and no field is refused for a value that another type's default has."""
    for objective, classes in MODELS.items():
        for model_type in classes:
            load(objective, model_type=model_type)


# ---- Overrides, and what follows from them -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "model_type", "overrides", "expected"),
    [
        ("clm", "llama", "hidden_size=32,num_attention_heads=4", {"head_dim": 8, "num_key_value_heads": 4}),
        ("clm", "llama", "hidden_size=32,num_attention_heads=4,num_key_value_heads=2", {"head_dim": 8}),
        ("clm", "llama", "num_attention_heads=64", {"head_dim": 64, "num_key_value_heads": 64}),
        ("clm", "llama", "intermediate_size=64", {"head_dim": 128, "num_key_value_heads": 32}),
        ("clm", "llama", "hidden_size=100", {"num_attention_heads": 1, "head_dim": 100, "num_key_value_heads": 1}),
        ("clm", "mistral", "hidden_size=32,num_attention_heads=4", {"head_dim": 8, "num_key_value_heads": 1}),
        ("clm", "gemma", "hidden_size=32,num_attention_heads=4", {"head_dim": 8, "num_key_value_heads": 4}),
        ("clm", "gemma", "hidden_size=32,num_attention_heads=4,head_dim=16", {"head_dim": 16}),
        ("clm", "gptj", "n_embd=32,n_head=4", {"rotary_dim": 8}),
        ("clm", "gptj", "hidden_size=32,n_head=4,rotary_dim=4", {"rotary_dim": 4}),
        ("clm", "opt", "hidden_size=32,num_attention_heads=4", {"word_embed_proj_dim": 32}),
        ("clm", "gpt_neo", "num_layers=3", {"attention_layers": ["global", "local", "global"]}),
        ("clm", "qwen2", "hidden_size=64,num_attention_heads=4", {"num_key_value_heads": 4}),
        ("clm", "qwen2", "num_hidden_layers=3", {"layer_types": ["full_attention"] * 3}),
        ("clm", "qwen3", "hidden_size=64,num_attention_heads=4", {"head_dim": 16, "num_key_value_heads": 4}),
        ("clm", "qwen3", "num_attention_heads=4,head_dim=64", {"head_dim": 64, "hidden_size": 4096}),
        ("clm", "gemma2", "num_hidden_layers=3", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
        ("clm", "gemma2", "hidden_size=64,num_attention_heads=4", {"head_dim": 16, "query_pre_attn_scalar": 16}),
        ("clm", "gemma2", "head_dim=64", {"head_dim": 64, "query_pre_attn_scalar": 256}),
        ("mlm", "modernbert", "num_hidden_layers=2", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("mlm", "modernbert", "hidden_size=100", {"num_attention_heads": 1}),
        ("t5", "umt5", "num_layers=2,d_model=96", {"num_decoder_layers": 2, "num_heads": 6, "d_kv": 64}),
        (
            "clm",
            "qwen2",
            "num_hidden_layers=3,use_sliding_window=true,sliding_window=8,max_window_layers=2",
            {"layer_types": ["full_attention", "full_attention", "sliding_attention"], "sliding_window": 8},
        ),
        ("bart", "bart", "encoder_layers=2", {"num_hidden_layers": 2, "decoder_layers": 12}),
        ("bart", "bart", "d_model=100", {"encoder_attention_heads": 1, "decoder_attention_heads": 1}),
    ],
)
def test_what_follows_from_overrides(objective, model_type, overrides, expected):
    """Unless it is set itself; and the class reads the configuration back as it is."""
    config = load(objective, model_type=model_type, config_overrides=overrides)
    assert {name: getattr(config, name) for name in expected} == expected
    assert type(config)(**config.to_dict()).to_dict() == config.to_dict()


def test_a_head_size_of_mistral_follows_where_it_is_set(tmp_path):
    """As in the configurations of published ones."""
    CONFIG_MAPPING["mistral"](head_dim=128).save_pretrained(tmp_path)
    overrides = "hidden_size=32,num_attention_heads=4,num_key_value_heads=2"
    assert load("clm", config_name=str(tmp_path), config_overrides=overrides).head_dim == 8


def test_layers_that_are_not_as_usual(refuses, tmp_path):
    """Their order is kept as far as it is known."""
    kinds = ["full_attention", "full_attention", "sliding_attention"]
    CONFIG_MAPPING["gemma2"](num_hidden_layers=3, layer_types=kinds).save_pretrained(tmp_path)
    assert load("clm", config_name=str(tmp_path), config_overrides="num_hidden_layers=2").layer_types == kinds[:2]
    with refuses("^--config_overrides num_hidden_layers=4: layer_types of the config.json tells of 3 layers only"):
        load("clm", config_name=str(tmp_path), config_overrides="num_hidden_layers=4")


LINEAR = '{"type": "linear", "factor": 2.0}'


@pytest.mark.parametrize(
    ("model_type", "overrides", "expected"),
    [
        ("llama", "rope_theta=500000.0", {"rope_theta": 500000.0, "rope_type": "default"}),
        ("llama", "rope_theta=500000,hidden_size=64", {"rope_theta": 500000, "rope_type": "default"}),
        ("llama", f"rope_scaling={LINEAR}", {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}),
        ("llama", f"rope_theta=5,rope_scaling={LINEAR},vocab_size=64", {"rope_theta": 5, "rope_type": "linear", "factor": 2.0}),
        ("llama", f"rope_scaling={LINEAR},rope_scaling=null", {"rope_theta": 1e4, "rope_type": "default"}),
        (
            "mistral", 'rope_parameters={"rope_type": "yarn", "factor": 2}',
            {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 131072},
        ),
        (
            "modernbert", "global_rope_theta=5,local_rope_theta=6",
            {
                "full_attention": {"rope_theta": 5, "rope_type": "default"},
                "sliding_attention": {"rope_theta": 6, "rope_type": "default"},
            },
        ),
        (
            "modernbert", 'rope_parameters={"full_attention": {"rope_theta": 7}}',
            {
                "full_attention": {"rope_theta": 7, "rope_type": "default"},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
        ),
    ],
)  # fmt: skip
def test_rotations_are_set_by_their_old_names(model_type, overrides, expected):
    """transformers 5 keeps them in one field, for each kind of layer."""
    config = load("mlm" if model_type == "modernbert" else "clm", model_type=model_type, config_overrides=overrides)
    assert config.rope_parameters == expected
    assert type(config)(**config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("objective", "model_type", "overrides", "line"),
    [
        ("clm", "llama", "rope_theta=big", 'rope_theta={"rope_theta": "big", "rope_type": "default"}: its rope_theta must be'),
        ("clm", "llama", "rope_scaling=linear", "rope_scaling=linear: must be null or a JSON object"),
        ("clm", "llama", 'rope_scaling={"type": "linear"}', ".*make no configuration of llama: .*{'factor'}"),
        ("clm", "llama", "local_rope_theta=5", "local_rope_theta: is no field of a llama configuration"),
        ("clm", "gpt2", "rope_theta=5", "rope_theta: is no field of a gpt2 configuration"),
        ("clm", "llama", "hidden_size=64,num_attention_heads=6", "num_attention_heads=6: does not divide the hidden size, 64"),
        ("clm", "qwen2", "use_sliding_window=true", "sliding_window=null: must be the number of tokens seen"),
        ("clm", "qwen2", "sliding_window=8", "sliding_window=8: is not kept: read again, a qwen2 configuration has null"),
        ("t5", "t5", "tie_word_embeddings=false", "tie_word_embeddings=false: is not kept: read again, .* has true"),
        ("clm", "gemma2", "layer_types=full_attention", "layer_types=full_attention: layer_types is a list, which cannot be"),
        ("clm", "qwen3", "head_dim=7", "head_dim=7: makes heads of 7, an odd number"),
        ("clm", "mistral", "num_key_value_heads=5", "num_key_value_heads=5: does not divide the number of heads, 32"),
        ("bart", "bart", "num_hidden_layers=2", "num_hidden_layers: would leave the decoder as it is"),
    ],
)
def test_overrides_that_make_no_model(objective, model_type, overrides, line, refuses):
    with refuses(f"^(--config_overrides |--model_type {model_type}: ){line}"):
        load(objective, model_type=model_type, config_overrides=overrides)


# ---- Configurations of transformers 4 ------------------------------------------------------------------------------------


OLD = {
    "llama": (
        {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 4.0}, "torch_dtype": "bfloat16"},
        {"rope_parameters": {"type": "linear", "rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0}},
    ),
    "mistral": ({"rope_theta": 1e6, "rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "gpt2": ({"n_embd": 64, "n_head": 4, "n_ctx": 128, "pruned_heads": {}}, {"hidden_size": 64, "num_attention_heads": 4}),
    "gpt_neo": (
        {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
        {"num_hidden_layers": 2, "attention_layers": ["global", "local"]},
    ),
    "t5": (
        {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True},
        {"scale_decoder_outputs": False, "dense_act_fn": "gelu_new"},
    ),
    "bart": (
        {"num_hidden_layers": 12, "forced_bos_token_id": 0, "max_length": 142, "early_stopping": True, "d_model": 64},
        {"hidden_size": 64, "encoder_layers": 12},
    ),
    "bert": ({"position_embedding_type": "absolute", "tie_encoder_decoder": False, "output_past": True}, {"hidden_size": 768}),
    "modernbert": (
        {"global_attn_every_n_layers": 2, "num_hidden_layers": 3, "global_rope_theta": 8e4, "local_rope_theta": 1e4},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "num_hidden_layers": 3},
    ),
    "gemma2": (
        {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "num_hidden_layers": 2},
        {"head_dim": 256},
    ),
}


@pytest.mark.parametrize("model_type", OLD)
def test_a_configuration_of_transformers_4(model_type, tmp_path):
    fields, expected = OLD[model_type]
    written = {"model_type": model_type, "transformers_version": "4.57.6", **fields}
    (tmp_path / "config.json").write_text(json.dumps(written))
    objective = next(name for name, classes in MODELS.items() if model_type in classes)
    config = load(objective, config_name=str(tmp_path))
    assert {name: getattr(config, name) for name in expected} == expected
    config.save_pretrained(tmp_path)
    again = load(objective, config_name=str(tmp_path))
    assert {name: getattr(again, name) for name in expected} == expected


# ---- From the Hub --------------------------------------------------------------------------------------------------------


hub = pytest.fixture(serve, name="hub")


@pytest.fixture
def load_pushed(hub, tmp_path):
    """load_pushed({name: content}, **flags): the configuration of a repository that holds these files."""
    api = HfApi(token="hf_good")

    def call(files: dict[str, str], **flags):
        api.create_repo("model", exist_ok=True, private=True)
        for name, content in files.items():
            api.upload_file(path_or_fileobj=content.encode(), path_in_repo=name, repo_id="tester/model")
        flags = {"token": "hf_good", "cache_dir": str(tmp_path / "cache")} | flags
        return load(config_name="tester/model", **flags)

    return call


def test_a_configuration_of_the_hub(load_pushed):
    assert load_pushed({"config.json": json.dumps(BERT)}).hidden_size == 32


@pytest.mark.parametrize(
    ("files", "flags", "reason"),
    [
        ({"config.json": "[1, 2]"}, {}, "config.json must hold one JSON object"),
        ({"config.json": "{"}, {}, "config.json cannot be read as JSON"),
        ({"config.json": json.dumps(BERT | {"hidden_size": "wide"})}, {}, "config.json: hidden_size=wide: must be a whole"),
        ({"config.json": json.dumps(BERT | {"layer_norm_eps": 1})}, {}, ".*'layer_norm_eps' expected float, got int"),
        ({"config.json": "{}"}, {}, "no configuration can be loaded: its config.json has no model_type"),
        ({"README.md": "nothing"}, {}, "no configuration can be loaded: there is no config.json in that repository"),
        ({"config.json": json.dumps(BERT)}, {"token": "hf_bad"}, "no configuration can be loaded: there is no such directory"),
        ({"config.json": json.dumps(BERT)}, {"model_revision": "0" * 40}, "no configuration can be loaded: 0+ is not a valid"),
        (
            {"config.json": json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}})}, {},
            "no configuration can be loaded: it comes with code of its own, which is not run unless --trust_remote_code",
        ),
        (
            {"config.json": '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}', "mine.py": "import no_such"},
            {"trust_remote_code": True}, "no configuration can be loaded: .*no_such",
        ),
        (
            {"config.json": '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}', "mine.py": "1 / 0"},
            {"trust_remote_code": True}, "no configuration can be loaded: .*division by zero",
        ),
    ],
)  # fmt: skip
def test_a_configuration_of_the_hub_that_is_none(files, flags, reason, load_pushed, refuses, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with refuses(f"^--config_name tester/model: {reason}"):
        load_pushed(files, **flags)


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_a_hub_in_trouble(status, hub, refuses, monkeypatch):
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    hub.fail("GET", "/resolve/|/revision/|/api/models", status, times=1000)
    hub.fail("HEAD", "/resolve/", status, times=1000)
    with refuses(rf"^--config_name tester/model: no configuration can be loaded: .* \(HTTP {status}\)$"):
        load(config_name="tester/model", token="hf_good")


def test_the_number_of_a_status_in_an_address_is_not_the_status():
    request = httpx2.Request("GET", "http://127.0.0.1:42923")
    error = OSError("We couldn't connect to 'http://127.0.0.1:42923' to load the files.")
    error.__cause__ = HfHubHTTPError("429 Too Many Requests", response=httpx2.Response(429, request=request))
    assert repositories.plain_reason(error, {}).endswith("load the files. (HTTP 429)")
    assert repositories.plain_reason(error.__cause__, {}) == "429 Too Many Requests"


def test_a_hub_that_answers_with_something_else(hub, load_pushed, refuses):
    load_pushed({"config.json": json.dumps(BERT)})
    hub.garble("/", times=1000)
    with refuses("^--config_name tester/model: (config.json cannot be read as JSON|no configuration can be loaded): ."):
        load(config_name="tester/model", token="hf_good", model_revision="main")
