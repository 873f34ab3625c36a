# SPDX-License-Identifier: Apache-2.0
"""The architectures, one family in a file, and which of them an objective can train.

A model gives hidden states, and by its method `scores` the scores of the vocabulary from them; `head_weights` says where the
weights are that `scores` reads. Its tree of weights has the names that transformers 4's Flax classes and PyTorch's modules
have. Token ids come with segment ids: 0 is padding, and tokens see those of the same segment only. Dropout is on where there
is a random key named "dropout".

Left out: LongT5, and BigBird's sparse attention: their blocks would be a second way to attend, with masks, biases and dropout
of its own, and few train them; BigBird has full attention here.
"""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
from transformers import PretrainedConfig

from flaxlm import arguments, cli, layers
from flaxlm.models import (
    albert,
    bart,
    bert,
    bloom,
    distilbert,
    electra,
    fields,
    gpt2,
    gpt_neo,
    gptj,
    llama,
    modernbert,
    opt,
    roberta,
    roformer,
    t5,
    xglm,
)

MASKED: arguments.Classes = {
    "albert": albert.AlbertForMaskedLM,
    "bart": bart.BartForMaskedLM,
    "bert": bert.BertForMaskedLM,
    "big_bird": bert.BigBirdForMaskedLM,
    "camembert": roberta.CamembertForMaskedLM,
    "distilbert": distilbert.DistilBertForMaskedLM,
    "electra": electra.ElectraForMaskedLM,
    "mbart": bart.MBartForMaskedLM,
    "modernbert": modernbert.ModernBertForMaskedLM,
    "roberta": roberta.RobertaForMaskedLM,
    "roberta-prelayernorm": roberta.RobertaPreLayerNormForMaskedLM,
    "roformer": roformer.RoFormerForMaskedLM,
    "xlm-roberta": roberta.XLMRobertaForMaskedLM,
}
CAUSAL: arguments.Classes = {
    "bart": bart.BartForCausalLM,
    "bert": bert.BertLMHeadModel,
    "big_bird": bert.BigBirdForCausalLM,
    "bloom": bloom.BloomForCausalLM,
    "camembert": roberta.CamembertForCausalLM,
    "electra": electra.ElectraForCausalLM,
    "gemma": llama.GemmaForCausalLM,
    "gemma2": llama.Gemma2ForCausalLM,
    "gpt2": gpt2.GPT2LMHeadModel,
    "gpt_neo": gpt_neo.GPTNeoForCausalLM,
    "gptj": gptj.GPTJForCausalLM,
    "llama": llama.LlamaForCausalLM,
    "mistral": llama.MistralForCausalLM,
    "opt": opt.OPTForCausalLM,
    "qwen2": llama.Qwen2ForCausalLM,
    "qwen3": llama.Qwen3ForCausalLM,
    "roberta": roberta.RobertaForCausalLM,
    "roberta-prelayernorm": roberta.RobertaPreLayerNormForCausalLM,
    "roformer": roformer.RoFormerForCausalLM,
    "xglm": xglm.XGLMForCausalLM,
    "xlm-roberta": roberta.XLMRobertaForCausalLM,
}
SENTENCE_PAIRS: arguments.Classes = {"bert": bert.BertForPreTraining, "big_bird": bert.BigBirdForPreTraining}
SPANS: arguments.Classes = {
    "t5": t5.T5ForConditionalGeneration,
    "mt5": t5.MT5ForConditionalGeneration,
    "umt5": t5.UMT5ForConditionalGeneration,
}
DENOISING: arguments.Classes = {
    "bart": bart.BartForConditionalGeneration,
    "mbart": bart.MBartForConditionalGeneration,
    "blenderbot": bart.BlenderbotForConditionalGeneration,
    "blenderbot-small": bart.BlenderbotSmallForConditionalGeneration,
    "marian": bart.MarianMTModel,
    "pegasus": bart.PegasusForConditionalGeneration,
}

DROPOUT_OF_ATTENTION = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "dropout_rate")  # in configurations


def has_decoder(model: nn.Module) -> bool:
    """Does it take ids for a decoder, after those of its encoder?"""
    return "decoder_input_ids_BT" in inspect.signature(type(model).__call__).parameters


def pytorch_class(model: nn.Module) -> str:
    """The name of the class that computes the same in PyTorch; ours has it too, as a rule."""
    return getattr(model, "pytorch_class", type(model).__name__)


def check(config: PretrainedConfig, implementation: str) -> None:
    """Refuse fields of a configuration that nothing here computes, and a way to attend that the model cannot take."""
    fields.check(config)
    if implementation in ("xla", "cudnn") and getattr(config, "attn_logit_softcapping", None):
        reason = "cannot squeeze scores, which attn_logit_softcapping asks for: set it to null, or use chunked"
        cli.fail(f"--attention_implementation {implementation}: {reason}")
    rates = {name: getattr(config, name) for name in DROPOUT_OF_ATTENTION if getattr(config, name, 0)}
    if implementation in ("xla", "cudnn") and rates:
        rate = "=".join(map(str, next(iter(rates.items()))))
        reason = f"cannot drop attention weights, and the configuration has {rate}: set it to 0, or use chunked"
        cli.fail(f"--attention_implementation {implementation}: {reason}")


def build(
    config: PretrainedConfig, args: arguments.Arguments, classes: arguments.Classes, platform: str | None = None
) -> nn.Module:
    """The model of a configuration, computed as the flags say on a platform, else on that at hand; it holds no weights."""
    implementation = args.training.attention_implementation
    backend = platform or jax.default_backend()
    if implementation == "auto":  # of what is exact with dropout too it takes the least memory everywhere (RESULTS.md)
        implementation = "chunked"
    if implementation == "cudnn" and backend != "gpu":
        cli.fail(f"--attention_implementation cudnn: is for NVIDIA GPUs, and JAX runs on {backend} here: use chunked")
    # A loop of layers compiles in half the time. On a CPU it is a fifth slower; for a TPU XLA is better at choosing what to
    # keep for the backward pass where layers stand one by one, unless nothing is kept.
    remat = args.training.gradient_checkpointing
    scan = {"cpu": False, "tpu": remat}.get(backend, True)
    # BART's layers, with two norms behind sums and an error function in them, would take 14 of the 15 GiB of a TPU v3.
    lean = backend == "tpu" and args.model.dtype == "float32" and config.model_type in DENOISING
    compute = layers.Compute(jnp.dtype(args.model.dtype), implementation, remat, scan, lean)
    return classes[config.model_type](config, compute)
