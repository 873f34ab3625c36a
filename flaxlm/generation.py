# SPDX-License-Identifier: Apache-2.0
"""Text that a model writes: prompts continued token by token, in one program over all devices.

N prompts, a row each; T tokens of a row, of the prompt and of what is written; S tokens that an encoder reads.
"""

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from transformers import PreTrainedTokenizerBase

from flaxlm import arguments, cli, files, models, randomness, sharding, tokenization

logger = logging.getLogger(__name__)


class Sampling(NamedTuple):
    """How a token is chosen among those that may follow."""

    temperature: float = 0.0  # scores are divided by it; 0: always the likeliest
    top_p: float = 1.0  # only among the likeliest, which together have this probability (Holtzman et al., arXiv:1904.09751)
    seed: int = 0
    num_tokens: int | None = None  # the vocabulary of the tokenizer, where the model has rows beyond it
    eos_token_id: int | None = None  # ends a text


class Prompts(NamedTuple):
    """Rows that have begun, and what an encoder reads beside them."""

    begun: Sequence[Sequence[int]]  # of each row at least a token; of a decoder behind an encoder its first
    source: Sequence[Sequence[int]] | None = None


class Sample(NamedTuple):
    """What a model reads, and what it writes."""

    reads: str
    writes: str


# ---- Tokens ----------------------------------------------------------------------------------------------------------------


class Generator:
    """Continues rows of tokens: one program, compiled once; the devices share the rows.

    The model reads the whole row again for each token, since it keeps nothing of the last one: up to `max_new_tokens` times the
    forward pass of all rows, and scores of one position of each. An encoder reads once.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Prompts,
        max_new_tokens: int,
        row_length: int,
        sampling: Sampling,
        devices: sharding.Devices,
    ):
        """Rows end at `max_new_tokens` behind what has begun, at an end of text, or at `row_length` tokens."""
        self.prompts, self.devices, self.seed = prompts, devices, sampling.seed
        size = devices.mesh.size
        num_rows = size * -(-len(prompts.begun) // size)  # each device has as many
        longest = max(map(len, prompts.begun))
        width = min(longest + max_new_tokens, max(row_length, longest))
        ids_NT, starts_N = fill_up(prompts.begun, num_rows, width)
        limits_N = np.minimum(starts_N + max_new_tokens, width) * (starts_N > 0)
        self.batch = {"ids": ids_NT, "starts": starts_N, "limits": limits_N, "rows": np.arange(num_rows, dtype=np.int32)}
        if prompts.source is not None:
            source_NS, lengths_N = fill_up(prompts.source, num_rows, max(map(len, prompts.source)))
            segments_NS = (np.arange(source_NS.shape[1]) < lengths_N[:, None]).astype(np.int32)
            self.batch |= {"source": source_NS, "source_segments": segments_NS}
        write_fn = functools.partial(write_tokens, model=model, sampling=sampling)
        self.p_write = sharding.CompiledStep("generation", sharding.on_each_device(write_fn, devices, sharding.PER_ROW))

    def arguments(self, params: Any, step: int) -> tuple:
        where = NamedSharding(self.devices.mesh, sharding.PER_ROW)
        place = lambda array: jax.make_array_from_callback(array.shape, where, array.__getitem__)  # noqa: E731
        key = jax.random.fold_in(randomness.device_rng(self.seed, "samples"), step)
        return params, {name: place(array) for name, array in self.batch.items()}, key

    def compile(self, params: Any) -> None:
        self.p_write.compile(*self.arguments(params, 0))

    def __call__(self, params: Any, step: int = 0) -> list[list[int]]:
        """What follows on each row that has begun, the end of text left out. What is random follows from (seed, step, row)."""
        ids_NT, ends_N = (np.asarray(array.addressable_data(0)) for array in self.p_write(*self.arguments(params, step)))
        starts = map(len, self.prompts.begun)
        return [ids[start:end].tolist() for ids, start, end in zip(ids_NT, starts, ends_N, strict=False)]


def fill_up(rows: Sequence[Sequence[int]], num_rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as an array [num_rows, width], filled up with zeros and empty rows, and their lengths."""
    ids_NT, lengths_N = np.zeros((num_rows, width), np.int32), np.zeros(num_rows, np.int32)
    for i, row in enumerate(rows):
        ids_NT[i, : len(row)], lengths_N[i] = row, len(row)
    return ids_NT, lengths_N


def write_tokens(
    params: Any, batch: Mapping[str, jax.Array], key: jax.Array, model: nn.Module, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """Continue one device's rows: (all rows of all devices [N, T], where each ends [N], before the end of text if it has one).

    Rows are filled up behind their tokens, not before, so that positions count from where they did in training; a padding has
    segment 0, and nobody sees what comes after oneself.
    """
    hidden_fn = reader(params, batch, model)
    index_T = jnp.arange(batch["ids"].shape[1])

    def write_one(state: tuple) -> tuple:
        ids_BT, ends_B, is_open_B, _ = state
        hidden_BTH = hidden_fn(ids_BT, (index_T < ends_B[:, None]).astype(jnp.int32))
        last_B = jnp.maximum(ends_B - 1, 0)[:, None, None]
        hidden_BH = jnp.take_along_axis(hidden_BTH, last_B, axis=1)[:, 0]
        scores_BV = model.apply({"params": params}, hidden_BH, method="scores").astype(jnp.float32)
        chosen_B = choose(scores_BV, batch["rows"], ends_B, key, sampling)
        is_open_B &= True if sampling.eos_token_id is None else chosen_B != sampling.eos_token_id
        ids_BT = jnp.where((index_T == ends_B[:, None]) & is_open_B[:, None], chosen_B[:, None], ids_BT)
        ends_B += is_open_B
        is_open_B &= ends_B < batch["limits"]
        return ids_BT, ends_B, is_open_B, anywhere(is_open_B)

    is_open_B = batch["starts"] < batch["limits"]
    state = batch["ids"], batch["starts"], is_open_B, anywhere(is_open_B)
    ids_BT, ends_B, *_ = jax.lax.while_loop(lambda state: state[-1], write_one, state)
    return tuple(jax.lax.all_gather(array, "data", tiled=True) for array in (ids_BT, ends_B))


def anywhere(is_open_B: jax.Array) -> jax.Array:
    """On any device? All must go on as long as one does: they gather weights together."""
    return jax.lax.pmax(is_open_B.any().astype(jnp.int32), "data") > 0


def reader(params: Any, batch: Mapping[str, jax.Array], model: nn.Module) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Ids and segments [B, T] to hidden states [B, T, H]; what the encoder makes of its side is computed here, once."""
    apply = functools.partial(model.apply, {"params": params})
    if not models.has_decoder(model):
        return apply
    memory_BSH = apply(batch["source"], batch["source_segments"], method="encode")
    return lambda ids_BT, segments_BT: apply(ids_BT, segments_BT, memory_BSH, batch["source_segments"], method="decode")


def choose(scores_BV: jax.Array, rows_B: jax.Array, positions_B: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """A token for each row: the likeliest, or one drawn by a key of its own, whichever device has the row."""
    if sampling.num_tokens is not None:
        scores_BV = jnp.where(jnp.arange(scores_BV.shape[1]) < sampling.num_tokens, scores_BV, -jnp.inf)
    if sampling.temperature == 0:
        return scores_BV.argmax(-1).astype(jnp.int32)
    scores_BV /= sampling.temperature
    if sampling.top_p < 1:
        scores_BV = jnp.where(scores_BV >= lowest_kept(scores_BV, sampling.top_p), scores_BV, -jnp.inf)

    def draw(scores_V: jax.Array, row: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, row), position), scores_V)

    return jax.vmap(draw)(scores_BV, rows_B, positions_B).astype(jnp.int32)


def lowest_kept(scores_BV: jax.Array, top_p: float) -> jax.Array:
    """The lowest score of the fewest tokens that together have the probability `top_p`: [B, 1]."""
    sorted_BV = jnp.flip(jnp.sort(scores_BV, axis=-1), axis=-1)
    probabilities_BV = nn.softmax(sorted_BV)
    is_kept_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV < top_p  # the first one always
    return jnp.where(is_kept_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)


# ---- Text ------------------------------------------------------------------------------------------------------------------


class Writer:
    """Continues the prompts of --generate_samples with the weights of a step; without that flag it writes nothing."""

    def __init__(
        self,
        args: arguments.Arguments,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        row_length: int,
        devices: sharding.Devices,
    ):
        self.tokenizer, self.generate = tokenizer, None
        training_args = args.training
        if not (training_args.generate_samples and training_args.do_eval):
            return
        self.texts = files.read_prompts(training_args.generate_samples, "--generate_samples")
        has_decoder = models.has_decoder(model)
        temperature = training_args.temperature
        if temperature is None:
            temperature = 0.0 if has_decoder else 0.7
            if has_decoder and training_args.top_p < 1:
                because = "chooses among which tokens one is drawn, and a model with an encoder draws none unless told so"
                cli.fail(f"--top_p {training_args.top_p}: {because}; add --temperature 1 or drop the flag")
        sampling = Sampling(temperature, training_args.top_p, training_args.seed, len(tokenizer), end_of_text(tokenizer))
        max_new_tokens = training_args.max_new_tokens
        if has_decoder:
            prompts = encode_for_encoder(self.texts, tokenizer, model.config.decoder_start_token_id, row_length)
        else:
            prompts = encode_to_continue(self.texts, tokenizer, row_length, max_new_tokens)
        self.generate = Generator(model, prompts, max_new_tokens, row_length, sampling, devices)

    def try_out(self, params: Any) -> None:
        """Compile: what does not fit is known before training and not behind it."""
        if self.generate:
            self.generate.compile(params)

    def __call__(self, params: Any, step: int) -> list[Sample]:
        """What these weights write, the same however often they are asked at a step."""
        if not self.generate:
            return []
        start = time.monotonic()
        written = self.generate(params, step)
        logger.info("Wrote %d samples in %.1f s", len(written), time.monotonic() - start)
        begun = [()] * len(written) if self.generate.prompts.source else self.generate.prompts.begun
        return [
            Sample(text, decode_behind(self.tokenizer, before, ids))
            for text, before, ids in zip(self.texts, begun, written, strict=True)
        ]


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def encode_to_continue(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, row_length: int, max_new_tokens: int
) -> Prompts:
    """Ids of texts as in training, without a mark of their end.

    At most as many as leave room for what is written, or half a row if that is more: the last ones, and the log says so.
    """
    with tokenization.tokenizer_as_loaded(tokenizer):
        begun = tokenizer(list(texts), return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id}
    begun = [ids[:-1] if len(ids) > 1 and ids[-1] in ends else list(ids) for ids in begun]
    for i, ids in enumerate(begun):
        if not ids:
            cli.fail(f"--generate_samples: prompt {i + 1} gives no token; drop it")
    most = max(row_length - max_new_tokens, row_length // 2)
    tell_of_cuts([len(ids) > most for ids in begun], f"the last {most} tokens", row_length)
    begun = [ids[-most:] for ids in begun]
    longest = max(map(len, begun))
    if longest + max_new_tokens > row_length:
        room = f"{row_length - longest} to {row_length - min(map(len, begun))}"
        line = "--max_new_tokens %d: a row has %d tokens, room for %s behind a prompt"
        logger.warning(line, max_new_tokens, row_length, room)
    return Prompts(begun)


def encode_for_encoder(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, decoder_start_token_id: int, row_length: int
) -> Prompts:
    """Ids of texts for an encoder, with the special tokens of the tokenizer, cut at the end if they are longer than a row."""
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    with tokenization.tokenizer_as_loaded(tokenizer):
        source = tokenizer(list(texts), truncation=True, max_length=row_length, **options)["input_ids"]
        tell_of_cuts([len(tokenizer(text, **options)["input_ids"]) > row_length for text in texts], "the beginning", row_length)
    return Prompts([[decoder_start_token_id]] * len(texts), source)


def tell_of_cuts(is_cut: Sequence[bool], what_stays: str, row_length: int) -> None:
    cut = [str(i + 1) for i, is_long in enumerate(is_cut) if is_long]
    if cut:
        logger.warning("--generate_samples: of prompt %s stays %s, in rows of %d", ", ".join(cut), what_stays, row_length)


def decode_behind(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids`, with the white space that they have behind `before`; tokens that only mark a text are left out."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    marks = {getattr(tokenizer, name) for name in names}
    before, ids = ([token for token in part if token not in marks] for part in (before, ids))
    start, whole = (tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (before, [*before, *ids]))
    if whole.startswith(start):
        return whole[len(start) :]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


# ---- To be shown -----------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Without control characters; line breaks and tabs stay."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def in_a_line(text: str, most: int = 100) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(printable(text).split())
    return line if len(line) <= most else line[: most - 4] + " ..."


def markdown(samples: Sequence[Sample]) -> str:
    """Samples as blocks of code, in which nothing is markup."""
    blocks = []
    for sample in samples:
        text = f"reads:  {printable(sample.reads)}\nwrites: {printable(sample.writes.strip())}"
        fence = "```"
        while fence in text:
            fence += "`"
        blocks.append(f"{fence}text\n{text}\n{fence}")
    return "\n\n".join(blocks) + "\n"
