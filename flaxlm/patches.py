# SPDX-License-Identifier: Apache-2.0
"""What is done to transformers' Flax classes from outside, since they are not ours to edit.

Two ways: flax calls an interceptor for every module, so that dropout, dense layers and vocabulary heads can be computed as
is fast here; and names that a file of classes looks up (its attention function, `jnp`, a method) are replaced where the
classes cannot be told otherwise or are wrong. Each says why. Models of our own would need none of it.
"""

import contextlib
import functools
import json
import math
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from transformers import FlaxPreTrainedModel, PretrainedConfig
from transformers.models.gemma import modeling_flax_gemma
from transformers.models.gpt2.modeling_flax_gpt2 import FlaxConv1D
from transformers.models.llama import modeling_flax_llama
from transformers.models.longt5.modeling_flax_longt5 import (
    FlaxLongT5Attention,
    FlaxLongT5LocalAttention,
    FlaxLongT5TransientGlobalAttention,
)
from transformers.models.mistral import modeling_flax_mistral
from transformers.models.mistral.modeling_flax_mistral import FlaxMistralAttention
from transformers.models.t5.modeling_flax_t5 import FlaxT5Attention

from flaxlm import arguments, cli, layers, losses
from flaxlm.attention import chunked_attention

# ---- Attention ---------------------------------------------------------------------------------------------------------


ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "dropout_rate")  # in configurations


class AttentionWeights(NamedTuple):
    """Weights that transformers' classes ask for, put off until they are multiplied by the values."""

    query: jax.Array  # [batch, queries, heads, head size]
    key: jax.Array  # [batch, keys, heads, head size]
    options: dict[str, Any]

    def astype(self, dtype: jnp.dtype) -> "AttentionWeights":
        return self


@contextlib.contextmanager
def attention(implementation: str, model: FlaxPreTrainedModel) -> Iterator[None]:
    """Within this context, or a function decorated with it, the classes of a model compute their attention in this way.

    They all call flax's dot_product_attention_weights and multiply the result by the values with one einsum. In the file of
    the classes these two names are replaced while a step is traced; no class is edited.
    """
    modeling = attention_file(type(model))
    if implementation == "auto":  # measured on CPUs only: elsewhere nothing is changed unasked
        implementation = "chunked" if jax.default_backend() == "cpu" and modeling else "eager"
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        cli.fail(
            f"--attention_implementation cudnn: is for NVIDIA GPUs, and JAX runs on {jax.default_backend()} here: use chunked"
        )
    if implementation == "eager":
        yield
        return

    if modeling is None:
        cli.fail(
            f"--attention_implementation {implementation}: {type(model).__name__} has attention of its own: leave the flag out"
        )
    originals = {name: getattr(modeling, name) for name in ("dot_product_attention_weights", "jnp")}

    def make_weights(query, key, **options):
        if query.ndim != 4:  # of blocks, as in LongT5
            return originals["dot_product_attention_weights"](query, key, **options)
        return AttentionWeights(query, key, options)

    def einsum(subscripts, *operands, **options):
        if not isinstance(operands[0], AttentionWeights):
            return jnp.einsum(subscripts, *operands, **options)
        if subscripts == "...hqk,h->...hqk":  # with a mask of heads: all ones, since the scripts pass none
            return operands[0]
        return attend(*operands, implementation)

    modeling.dot_product_attention_weights = make_weights
    modeling.jnp = types.SimpleNamespace(**vars(jnp) | {"einsum": einsum})
    try:
        yield
    finally:
        vars(modeling).update(originals)


def attention_file(model_class: type[FlaxPreTrainedModel]) -> types.ModuleType | None:
    """The file of a model's attention classes, if they attend as `attention` expects."""
    modeling = sys.modules[model_class.module_class.__module__]
    return modeling if hasattr(modeling, "dot_product_attention_weights") else None


def check_attention(implementation: str, config: PretrainedConfig, models: arguments.ModelClasses) -> None:
    """Can the model attend in this way? Fails before the text is prepared."""
    flag = f"--attention_implementation {implementation}"
    if implementation in ("auto", "eager") or type(config) not in models.by_config:
        return
    if attention_file(models.by_config[type(config)]) is None:
        cli.fail(f"{flag}: {config.model_type} has attention of its own: leave the flag out")
    rates = {name: getattr(config, name) for name in ATTENTION_DROPOUT if getattr(config, name, 0)}
    if implementation != "chunked" and rates:
        rate = "=".join(map(str, next(iter(rates.items()))))
        cli.fail(f"{flag}: cannot drop attention weights, and the configuration has {rate}: set it to 0, or use chunked")


def attend(weights: AttentionWeights, value: jax.Array, implementation: str) -> jax.Array:
    """softmax(query key / sqrt(head size) + bias) value, with dropout: [batch, queries, heads, head size]."""
    query, key, options = weights
    bias, rate, keep = options.get("bias"), options.get("dropout_rate", 0), None
    if rate and not options.get("deterministic"):  # as flax draws it: the same for all rows and heads
        keep = jax.random.bernoulli(options["dropout_rng"], 1 - rate, (query.shape[1], key.shape[1])) / (1 - rate)
    if implementation == "chunked":
        return chunked_attention(query / math.sqrt(query.shape[-1]), key, value, bias, keep)
    if keep is not None:  # of a class that comes with a Hub repository, whose configuration check_attention can't read
        cli.fail(f"--attention_implementation {implementation}: cannot drop attention weights: use chunked")
    bias = None if bias is None else bias.astype(query.dtype)
    return jax.nn.dot_product_attention(query, key, value, bias, implementation=implementation)


# ---- Dropout and dense layers ------------------------------------------------------------------------------------------


def hashed_dropout(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
    """Interceptor of flax modules: dropout by hashing (layers.dropout)."""
    module = context.module
    if not isinstance(module, nn.Dropout) or module.broadcast_dims or kwargs.get("rng") is not None:
        return next_fun(*args, **kwargs)
    deterministic = kwargs.get("deterministic", args[1] if len(args) > 1 else None)
    if module.rate == 0 or (module.deterministic if deterministic is None else deterministic):
        return args[0]
    return layers.dropout(args[0], module.rate, module.make_rng(module.rng_collection))


def dense_on_cpu(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
    """Interceptor of flax modules: dense layers through `matmul` where the processor computes them; else as they are."""
    module = context.module
    is_dense = isinstance(module, (nn.Dense, FlaxConv1D)) and context.method_name == "__call__"
    if not is_dense or module.name in VOCABULARY_HEADS or jax.default_backend() != "cpu":  # heads: others intercept them
        return next_fun(*args, **kwargs)
    kernel, bias = module.get_variable("params", "kernel"), module.get_variable("params", "bias")
    inputs = args[0].astype(module.dtype or jnp.result_type(args[0], kernel))
    outputs = layers.matmul(inputs, kernel.T if isinstance(module, FlaxConv1D) else kernel)
    return outputs if bias is None else outputs + bias.astype(outputs.dtype)


@contextlib.contextmanager
def fast_layers() -> Iterator[None]:
    """Within this context a model in training has its dropout by hashing, and on a CPU its dense layers by `layers.matmul`."""
    with nn.intercept_methods(hashed_dropout), nn.intercept_methods(dense_on_cpu):
        yield


def dense_in_wide_sums(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
    """Interceptor of flax modules: dense layers by `layers.contract` on a CPU, so that bfloat16 is multiplied natively."""
    module = context.module
    if not isinstance(module, nn.Dense) or context.method_name != "__call__" or jax.default_backend() != "cpu":
        return next_fun(*args, **kwargs)
    kernel, bias = module.get_variable("params", "kernel"), module.get_variable("params", "bias")
    inputs, kernel, bias = nn.dtypes.promote_dtype(args[0], kernel, bias, dtype=module.dtype)
    outputs = layers.contract(inputs, kernel, inputs.ndim - 1, 0, inputs.dtype)
    return outputs if bias is None else outputs + bias


@contextlib.contextmanager
def wide_sums_on_cpu() -> Iterator[None]:
    """Within this context a CPU multiplies bfloat16 natively in dense layers: for inference, in any layout of inputs."""
    with nn.intercept_methods(dense_in_wide_sums):
        yield


# ---- Vocabulary heads --------------------------------------------------------------------------------------------------


# The module that turns hidden states into scores of the vocabulary, by the name it has in the Flax classes.
VOCABULARY_HEADS = ("lm_head", "predictions", "vocab_projector", "generator_lm_head")


def vocabulary_scores(head: nn.Module, variables: Mapping[str, Any], *args, **kwargs) -> jax.Array:
    """What an unbound vocabulary head returns; a bias of its own is added outside of it, where its gradient is cheap.

    So it is with heads that add their bias at the end, as those of transformers and flax do; others stay as they are.
    """
    bias_V = variables.get("params", {}).get("bias")
    if bias_V is None or not type(head).__module__.startswith(("transformers.models.", "flax.")):
        return head.apply(variables, *args, **kwargs)
    params = {**variables["params"], "bias": jnp.zeros_like(bias_V)}
    return layers.add_bias(head.apply({**variables, "params": params}, *args, **kwargs), bias_V)


def labelled_positions_only(positions_K: jax.Array):
    """Within this context a model's vocabulary head sees only the hidden states at flat positions into B * T.

    The scores then are [1, K, V] instead of [B, T, V]. No model class is edited: flax calls the interceptor for every module.
    """

    def interceptor(next_fun, args, kwargs, context):
        if context.module.name in VOCABULARY_HEADS and context.method_name == "__call__":
            hidden_BTH = args[0]
            hidden_1KH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])[positions_K][None]
            return vocabulary_scores(*context.module.unbind(), hidden_1KH, *args[1:], **kwargs)
        return next_fun(*args, **kwargs)

    return nn.intercept_methods(interceptor)


class FusedHead:
    """Within this context a model's vocabulary head computes loss and gradients, a chunk of the tokens at a time.

    Scores of all tokens over the whole vocabulary, [N, V], would be the largest array of the step by far. No model class is
    edited: flax calls the interceptor for every module. `sums` is (loss, number of highest scores that are right), or None
    where the model has no head of a known name; the scores that the model returns are a placeholder.
    """

    CHUNK_SCORES = 2**22  # scores at a time, 16 MiB in float32, or more if there were more than ...
    MAX_CHUNKS = 16  # ... so many chunks: small ones keep no accelerator busy

    def __init__(self, labels: jax.Array, weights: jax.Array, vocab_size: int, bias_V: jax.Array | None = None):
        self.labels_N, self.weights_N, self.bias_V = labels.reshape(-1), weights.reshape(-1), bias_V
        self.num_chunks = min(math.ceil(self.labels_N.size * vocab_size / self.CHUNK_SCORES), self.MAX_CHUNKS)
        self.sums: tuple[jax.Array, jax.Array] | None = None

    def __enter__(self) -> "FusedHead":
        self.interception = nn.intercept_methods(self.intercept)
        self.interception.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.interception.__exit__(*exception)

    def intercept(self, next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if context.module.name not in VOCABULARY_HEADS or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        head, variables = context.module.unbind()

        def head_fn(head_inputs, hidden_CH):
            variables, args, kwargs, bias_V = head_inputs
            scores_CV = vocabulary_scores(head, variables, hidden_CH, *args, **kwargs).astype(jnp.float32)
            return scores_CV if bias_V is None else scores_CV + jax.lax.stop_gradient(bias_V)

        hidden_NH = args[0].reshape(-1, args[0].shape[-1])
        chunks = jax.tree.map(self.cut, (hidden_NH, self.labels_N, self.weights_N))
        self.sums = losses.chunked_cross_entropy(head_fn, (variables, args[1:], kwargs, self.bias_V), *chunks)
        return jnp.zeros((1,) * args[0].ndim, args[0].dtype)

    def cut(self, array: jax.Array) -> jax.Array:
        """[N, ...] to [chunks, C, ...], the last one filled up with zeros: its weights too."""
        size = math.ceil(len(array) / self.num_chunks)
        array = jnp.pad(array, [(0, size * self.num_chunks - len(array)), *[(0, 0)] * (array.ndim - 1)])
        return array.reshape(self.num_chunks, size, *array.shape[1:])


# ---- What the classes leave out ----------------------------------------------------------------------------------------


class LeftOut(NamedTuple):
    """A field of configurations that Flax classes do not read as PyTorch's do: of which types (none: all), the values with
    which both compute the same, what the Flax class does with any other, and which classes (by name) do so."""

    field: str
    types: tuple[str, ...]
    same: tuple[Any, ...]
    does: str
    classes: str = ""


LLAMA = ("llama", "mistral", "gemma")
BERT = ("bert", "roberta", "roberta-prelayernorm", "xlm-roberta", "electra")
BART = ("bart", "mbart", "blenderbot", "blenderbot-small", "marian", "pegasus")
NOT_CAUSAL = "(?<!CausalLM)(?<!LMHeadModel)$"
NO_SCALING = (None, {"rope_type": "default"}, {"type": "default", "rope_type": "default"})
LEFT_OUT = (
    LeftOut("rope_theta", LLAMA, (10000,), "turns positions by powers of 10000"),
    LeftOut("rope_scaling", LLAMA, NO_SCALING, "does not scale positions"),
    LeftOut("mlp_bias", ("llama",), (False,), "has no biases in its feed-forward layers"),
    LeftOut("tie_word_embeddings", ("llama", "mistral", "gptj"), (False,), "has a vocabulary head with weights of its own"),
    LeftOut("tie_word_embeddings", BART[:2], (True,), "has one table for both sides, PyTorch's one for each", NOT_CAUSAL),
    LeftOut("tie_encoder_decoder", (), (False,), "has weights for each side"),
    LeftOut("position_embedding_type", (*BERT, "albert"), ("absolute",), "adds absolute positions"),
    LeftOut("hidden_act", ("electra",), ("gelu",), "has it in the vocabulary head too, PyTorch's has gelu there", "LM$"),
    LeftOut("use_bias", ("big_bird",), (True,), "has biases"),
    LeftOut("is_decoder", ("roformer",), (False,), "sees both sides of a token"),
    LeftOut("add_cross_attention", (*BERT, "big_bird", "roformer"), (False,), "asks for what an encoder says", NOT_CAUSAL),
    LeftOut("add_cross_attention", ("gptj",), (False,), "asks for what an encoder says"),
    LeftOut("scale_attn_weights", ("gpt2",), (True,), "scales scores by the size of a head"),
    LeftOut("scale_attn_by_inverse_layer_idx", ("gpt2",), (False,), "scales scores alike in all layers"),
    LeftOut("enable_bias", ("opt",), (True,), "has biases"),
    LeftOut("layer_norm_elementwise_affine", ("opt",), (True,), "has norms with weights"),
    LeftOut("layerdrop", ("opt", "xglm"), (0,), "cannot leave out layers now and then"),
    LeftOut("encoder_layerdrop", BART, (0,), "cannot leave out layers now and then"),
    LeftOut("decoder_layerdrop", BART, (0,), "cannot leave out layers now and then"),
    LeftOut("pruned_heads", (), ({},), "has all heads"),
    LeftOut("quantization_config", (), (None,), "has no quantised weights"),
)


def check_fields(config: PretrainedConfig, model_class: type[FlaxPreTrainedModel]) -> None:
    """Refuse a configuration of which the Flax class would leave something out without a word, and PyTorch's would not.

    Found in transformers 4.57.6 by comparing the scores of both, field by field, and what they read.
    """
    kind, name = config.model_type, model_class.__name__
    rules = [rule for rule in LEFT_OUT if (not rule.types or kind in rule.types) and re.search(rule.classes, name)]
    if kind in ("llama", "mistral"):
        size = config.hidden_size // config.num_attention_heads
        rules.append(LeftOut("head_dim", LLAMA, (size, None), "divides hidden_size among the heads"))
    for field, _, same, does, _ in rules:
        value = getattr(config, field, same[0])
        if value not in same:
            value, right = (json.dumps(value, default=str) for value in (value, same[0]))
            cli.fail(f"{field}={value}: transformers' Flax class of {kind} {does}; it takes only {field}={right}")


# ---- Faults of the classes ---------------------------------------------------------------------------------------------


def rotary_positions(num_positions: int, head_size: int, create: Callable[[int, int], jax.Array]) -> jax.Array:
    """Sines and cosines of positions, [positions, 1, 2 * head size], from one of transformers' functions."""
    return create(max(num_positions, 2 * head_size), head_size)[:num_positions]


# transformers 4.57.6 keeps only so many numbers of a position as there are positions, too few where the table is short.
for modeling in (modeling_flax_llama, modeling_flax_mistral, modeling_flax_gemma):
    modeling.create_sinusoidal_positions = functools.partial(rotary_positions, create=modeling.create_sinusoidal_positions)


def set_up_mistral_attention(attention: FlaxMistralAttention, setup: Callable = FlaxMistralAttention.setup) -> None:
    """Let a token see itself and the `sliding_window` - 1 before it, or all of them if there is no window, as in PyTorch."""
    setup(attention)
    positions = jnp.arange(attention.config.max_position_embeddings)
    distance = positions[:, None] - positions
    attention.causal_mask = ((distance >= 0) & (distance < (attention.config.sliding_window or len(positions))))[None, None]


# transformers 4.57.6 shows it one token more, and without a window itself alone.
FlaxMistralAttention.setup = set_up_mistral_attention


def relative_position_bucket(
    relative_position: jax.Array, bidirectional: bool = True, num_buckets: int = 32, max_distance: int = 128
) -> jax.Array:
    """Bucket of T5's position bias for key minus query positions (Raffel et al. 2020, section 2.1), int32, same shape.

    Half of a direction's buckets are for one distance each, the others grow like a logarithm up to `max_distance`.
    """
    relative_position = relative_position.astype(jnp.int32)  # LongT5 counts its blocks in whole floats
    num_buckets = num_buckets // 2 if bidirectional else num_buckets
    distance = jnp.abs(relative_position) if bidirectional else jnp.maximum(-relative_position, 0)
    num_exact = num_buckets // 2
    growth = jnp.log(jnp.maximum(distance, 1) / num_exact) / math.log(max_distance / num_exact)
    far = jnp.minimum((num_exact + growth * (num_buckets - num_exact)).astype(jnp.int32), num_buckets - 1)
    bucket = jnp.where(distance < num_exact, distance, far)
    return bucket + num_buckets * (relative_position > 0) if bidirectional else bucket


# transformers 4.57.6 calls jnp.clip with a_max, which jax no longer has. This can go when a release of 4.x calls it with max.
for attention_class in (
    FlaxT5Attention,
    FlaxLongT5Attention,
    FlaxLongT5LocalAttention,
    FlaxLongT5TransientGlobalAttention,
):
    attention_class._relative_position_bucket = staticmethod(relative_position_bucket)


def create_position_bias(
    attention: FlaxT5Attention, key: jax.Array, *others: Any, create: Callable = FlaxT5Attention._create_position_bias
) -> jax.Array:
    """T5's position bias, repeated for each row of the batch as adding the mask will do anyway."""
    bias = create(attention, key, *others)
    return layers.repeat_rows(bias, len(key)) if len(bias) == 1 else bias


FlaxT5Attention._create_position_bias = create_position_bias
