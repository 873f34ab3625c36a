# SPDX-License-Identifier: Apache-2.0
"""Every field of every configuration is computed with, refused where it would be left out, or known to have no effect."""

import functools
import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig

import run_bart_dlm_flax
import run_clm_flax
import run_mlm_flax
import run_pretraining_flax
import run_t5_mlm_flax
from flaxlm import models
from flaxlm.models import fields

SCRIPTS = run_mlm_flax, run_clm_flax, run_pretraining_flax, run_t5_mlm_flax, run_bart_dlm_flax
CASES = {f"{script.__name__}/{model_type}": (script, model_type) for script in SCRIPTS for model_type in script.MODELS}
KINDS = {"run_mlm_flax": "masked", "run_clm_flax": "causal", "run_pretraining_flax": "pretraining"}

# Fields that no objective's results depend on, by the reason why. Behind a "@" stands of which cases, as a pattern.
WITHOUT_EFFECT = {
    "is of the file": "_name_or_path architectures transformers_version",
    "is the type that weights were stored in; here they are float32": "dtype",
    "says what PyTorch's calls return": "output_attentions output_hidden_states return_dict use_cache",
    "is of classes with labels": "id2label label2id problem_type classifier_dropout classifier_pooling qa_dropout"
    " classifier_dropout_prob seq_classif_dropout",
    "is of a head for several choices": "summary_activation summary_first_dropout summary_last_dropout summary_proj_to_labels"
    " summary_type summary_use_proj",
    "is of generation": "bos_token_id eos_token_id sep_token_id cls_token_id forced_eos_token_id encoder_no_repeat_ngram_size"
    " decoder_start_token_id@(clm|mlm_flax/mbart)",
    "is the tokenizer's here; PyTorch only leaves that row of the table untrained": "pad_token_id",
    "is another order of the same sums": "chunk_size_feed_forward reorder_and_upcast_attn slow_but_exact pretraining_tp"
    " deterministic_flash_attn",
    "is of a loss of PyTorch's own": "sparse_prediction sparse_pred_ignore_index",
    "cannot be another for the type": "is_encoder_decoder",
    "is about rows that are longer, or a table that is computed": "max_position_embeddings n_positions@gptj",
    "follows from the objective": "is_decoder@clm is_decoder@(t5_mlm|bart_dlm) is_decoder@mlm_flax/m?bart",
    "has given layer_types, attention_layers or the activation, which are computed with": "max_window_layers"
    " use_sliding_window attention_types feed_forward_proj",
    "is of blocks: rows in which they would differ from full attention are refused": "attention_type block_size"
    " num_random_blocks",
    "is of a side that is not there": "encoder_attention_heads@clm encoder_ffn_dim@clm encoder_layerdrop@clm"
    " encoder_layers@clm",
    "is of a vocabulary for each side, which is refused": "decoder_vocab_size",
    "is always true": "tie_word_embeddings@mt5",
}
# What is computed with as in PyTorch, though the type has no such field.
ALSO_READ = {"qwen2": {"head_dim"}, "t5": {"decoder_start_token_id"}}

REFUSED_VALUES = {
    "position_embedding_type": ["relative_key", "relative_key_query"],
    "rope_parameters.rope_type": ["dynamic", "yarn", "longrope", "proportional"],
    "rope_parameters.partial_rotary_factor": [0.5],
    "use_bidirectional_attention": [True],
    "share_encoder_decoder_embeddings": [False],
    "mlp_bias": [True],
    "attention_bias": [True],
    "add_cross_attention": [True],
    "tie_encoder_decoder": [True],
    "pruned_heads": [{0: [1]}],
    "quantization_config": [{"quant_method": "gptq"}],
}


def without_effect(case: str) -> dict[str, str]:
    """The fields that WITHOUT_EFFECT knows in a case, and why."""
    entries = ((name.partition("@"), reason) for reason, names in WITHOUT_EFFECT.items() for name in names.split())
    return {name: reason for (name, _, where), reason in entries if re.search(where, case)}


def refused(model_type: str) -> set[str]:
    """Names of fields, which may have others in them."""
    return {item.field for item in fields.REFUSED if not item.types or model_type in item.types}


# ---- Computed with -------------------------------------------------------------------------------------------------------


def variants(kind: str, model_type: str) -> list[dict[str, Any]]:
    """Tiny configurations, for every field that changes what is computed."""
    paths = sorted((Path(__file__).parent / "variants").glob("*.py"))
    found = (item for path in paths for item in importlib.import_module(f"tests.variants.{path.stem}").VARIANTS)
    return [values for found_kind, found_type, values in found if (found_kind, found_type) == (kind, model_type)]


def note_reads(config: PretrainedConfig, reads: set[str]) -> None:
    """From here on note which fields are read, by the names that they have in the configuration."""
    config_class = type(config)

    def read(self, name: str) -> Any:
        reads.add(config_class.attribute_map.get(name, name))
        return config_class.__getattribute__(self, name)

    config.__class__ = type(config_class.__name__, (config_class,), {"__getattribute__": read})


@functools.cache
def fields_computed_with(script: ModuleType, model_type: str) -> set[str]:
    """What is read of the configuration while a model is made and trained, and by the script itself."""
    reads: set[str] = set()
    ids_BT, kind = jnp.ones((2, 8), jnp.int32), KINDS.get(script.__name__, "seq2seq")

    def train(config: PretrainedConfig) -> Any:
        model = script.MODELS[config.model_type](config)
        inputs = (ids_BT, ids_BT) * (2 if models.has_decoder(model) else 1)
        variables = model.init(jax.random.key(0), *inputs)
        hidden_BTH = model.apply(variables, *inputs, rngs={"dropout": jax.random.key(1)})
        methods = ["scores", *(["next_sentence_scores"] if kind == "pretraining" else [])]
        return [model.apply(variables, hidden_BTH, method=method) for method in methods], len(model.head_weights)

    made = [CONFIG_MAPPING[model_type](**values) for values in variants(kind, model_type)]
    assert made, f"tests/variants has no configuration of {model_type} for {kind}"
    for config in made:
        note_reads(config, reads)
        jax.eval_shape(functools.partial(train, config))
    text = Path(script.__file__).read_text("utf-8").partition("---- Rows to batches")[2]
    return {name for name in reads if not name.startswith("__")} | set(re.findall(r"\bconfig\.(\w+_token_id)\b", text))


@pytest.mark.parametrize("case", CASES)
def test_every_field_is_one_of_three(case):
    script, model_type = CASES[case]
    known, computed_with = set(CONFIG_MAPPING[model_type]().to_dict()), fields_computed_with(script, model_type)
    ignored, left_out = without_effect(case), refused(model_type)
    for name in sorted(known):
        found = {
            "computed with": name in computed_with,
            "without effect": name in ignored and name not in computed_with,
            "refused": name in left_out and name not in computed_with,
        }
        assert any(found.values()), (
            f"{name}, a field of {model_type}, is in no list: does PyTorch's class compute something else if it is changed?"
            " Then compute that in flaxlm/models, with a configuration in tests/variants, or add it to REFUSED in"
            " flaxlm/models/fields.py and to REFUSED_VALUES here. If not, name it in WITHOUT_EFFECT here, with the reason."
        )
        assert sum(found.values()) == 1, f"{name}, a field of {model_type}, is {' and '.join(k for k, v in found.items() if v)}"


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_computed_with_that_is_no_field(case):
    """What a config.json has beside the fields of its type is nothing to PyTorch's class, and must be nothing to ours."""
    script, model_type = CASES[case]
    known = set(CONFIG_MAPPING[model_type]().to_dict()) | ALSO_READ.get(model_type, set()) | refused(model_type)
    derived = {name for name in fields_computed_with(script, model_type) if hasattr(type(CONFIG_MAPPING[model_type]()), name)}
    assert fields_computed_with(script, model_type) <= known | derived


def test_the_table_holds_nothing_old():
    """Each of its names is a field of a case for which it is meant, and not one that is computed with in all of them."""
    meant: dict[str, list[bool]] = {}
    for case, (script, model_type) in CASES.items():
        for name in without_effect(case).keys() & CONFIG_MAPPING[model_type]().to_dict().keys():
            meant.setdefault(name, []).append(name in fields_computed_with(script, model_type))
    assert meant.keys() == {name.partition("@")[0] for names in WITHOUT_EFFECT.values() for name in names.split()}
    assert not [name for name, is_read in meant.items() if all(is_read)]


# ---- Refused -------------------------------------------------------------------------------------------------------------


def test_default_configurations_are_not_refused():
    for _, model_type in CASES.values():
        fields.check(CONFIG_MAPPING[model_type]())


def set_field(config: PretrainedConfig, field: str, value: Any) -> bool:
    """Set a field of a configuration, or of the last of those in it; false if it has none, or none that takes the value."""
    name, _, part = field.partition(".")
    if not part:
        try:
            setattr(config, name, value)
        except StrictDataclassError:
            return False
        return True
    parameters = getattr(config, name, None)
    if parameters is None:
        return False
    parts = [kind for kind in parameters.values() if isinstance(kind, dict)]
    (parts[-1] if parts else parameters)[part] = value
    return True


@pytest.mark.parametrize("item", fields.REFUSED, ids=lambda item: item.field)
def test_what_is_refused(item, refuses):
    """In a line that names field and value, for each type; and the values with which nothing is left out are taken."""
    num_types = 0
    for model_type in item.types or dict.fromkeys(model_type for _, model_type in CASES.values()):
        for value in REFUSED_VALUES[item.field]:
            config = CONFIG_MAPPING[model_type]()
            if not set_field(config, item.field, value):
                continue
            shown = re.escape(fields.json.dumps(value))
            with refuses(
                rf"^{re.escape(item.field)}={shown}: {item.what}: not here; ({model_type} takes only|take the field out)"
            ):
                fields.check(config)
            num_types += 1
        for value in item.same:
            config = CONFIG_MAPPING[model_type]()
            if set_field(config, item.field, value):
                fields.check(config)
    assert num_types >= len(item.types or (1,))


def test_every_refused_field_is_tested():
    assert REFUSED_VALUES.keys() == {item.field for item in fields.REFUSED}
