# SPDX-License-Identifier: Apache-2.0
"""The flags that all training scripts share, and which models an objective can train."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import datasets
import flax.linen as nn
from transformers import PretrainedConfig

from flaxlm import addresses, files


@dataclass
class TrainingArguments:
    """How to train: batch sizes, steps, optimizer, and what to write when. A step is one optimizer update."""

    output_dir: str = field(metadata={"help": "Directory for weights, tokenizer, results and TensorBoard events."})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Train into a non-empty output_dir; its old events and results are removed, weights replaced."},
    )
    do_train: bool = field(default=False, metadata={"help": "Train. With neither do_train nor do_eval, both are done."})
    do_eval: bool = field(default=False, metadata={"help": "Evaluate, every eval_steps and at the end. Alone: only that."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Training rows per device and step."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Evaluation rows per device and step."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate; typically 1e-4 to 1e-3 from scratch."})
    weight_decay: float = field(
        default=0.0, metadata={"help": "Decoupled decay, times the learning rate, of matrices; not of biases and norms."}
    )
    optim: Literal["adamw", "adafactor", "lamb", "lion", "muon"] = field(
        default="adamw",
        metadata={
            "help": "Optimizer. adafactor: far less memory; lamb: for very large batches; lion: half AdamW's memory, a third "
            "to a tenth of its learning rate; muon: orthogonal updates of the layers' matrices, AdamW for all else."
        },
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW: decay of the first moment, in [0, 1)."})
    adam_beta2: float = field(
        default=0.999, metadata={"help": "AdamW: decay of the second moment, in [0, 1). Unset: with --optim lion 0.99."}
    )
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW: added to the denominator."})
    adafactor: bool = field(default=False, metadata={"help": "The same as --optim adafactor."})
    lamb: bool = field(default=False, metadata={"help": "The same as --optim lamb; flags of AdamW hold for it too."})
    lamb_no_bias_correction: bool = field(default=False, metadata={"help": "LAMB without Adam's bias correction."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients to this global norm; 0 does not clip."})
    z_loss: float = field(
        default=0.0,
        metadata={
            "help": "Add this times log(Z)^2 per label to what is minimised, Z being what softmax divides by; PaLM 1e-4. It "
            "keeps scores from drifting; evaluation is without it."
        },
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the training rows; fractions count."})
    max_steps: int = field(
        default=-1,
        metadata={"aliases": ["--num_train_steps"], "help": "Number of steps; if positive, it overrides num_train_epochs."},
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "polynomial", "inverse_sqrt", "warmup_stable_decay"] = field(
        default="linear",
        metadata={
            "help": "Learning rate after the warmup: down to min_lr_ratio in a line, a cosine or a polynomial; kept; kept, "
            "then down in a line at the end (warmup_stable_decay); or falling with the root of the step (inverse_sqrt)."
        },
    )
    min_lr_ratio: float = field(default=0.0, metadata={"help": "Share of the peak that the learning rate ends at, in [0, 1]."})
    num_decay_steps: int | None = field(
        default=None,
        metadata={"help": "warmup_stable_decay: steps of the decay at the end. Unset: a tenth of all steps, rounded up."},
    )
    lr_power: float = field(
        default=1.0, metadata={"help": "polynomial: power of the share of steps that is left, above 0; 1 is a line."}
    )
    groupbert_schedule: bool = field(
        default=False, metadata={"help": "Warmup along a square root instead of a line, then a line down to 1e-7 instead of 0."}
    )
    warmup_steps: int = field(default=0, metadata={"help": "Steps in which the learning rate grows linearly from zero."})
    warmup_ratio: float = field(default=0.0, metadata={"help": "Warmup as a share of all steps, if warmup_steps is 0."})
    logging_steps: int = field(default=500, metadata={"help": "Steps between two lines of the training log."})
    logging_first_step: bool = field(default=False, metadata={"help": "Log the first step too."})
    report_to: str = field(
        default="tensorboard",
        metadata={"nargs": "+", "help": "Where points go: any of tensorboard, wandb, trackio; or none."},
    )
    project: str | None = field(
        default=None, metadata={"help": "wandb, trackio: the project. Unset: flaxlm; for wandb first WANDB_PROJECT."}
    )
    run_name: str | None = field(default=None, metadata={"help": "wandb, trackio: the run. Unset: the name of output_dir."})
    profile_steps: str | None = field(
        default=None,
        metadata={"help": "first:last, as 10:13: a trace of these steps in output_dir, for TensorBoard's profiler."},
    )
    save_steps: int = field(default=500, metadata={"help": "Steps between two saves; the end is always saved."})
    save_safetensors: bool = field(
        default=True, metadata={"help": "Write model.safetensors in PyTorch layout beside flax_model.msgpack."}
    )
    eval_steps: int | None = field(default=None, metadata={"help": "Steps between two evaluations; unset: only at the end."})
    generate_samples: str | None = field(
        default=None,
        metadata={"help": "txt file of prompts, one per line, which the model continues at each evaluation."},
    )
    max_new_tokens: int = field(default=64, metadata={"help": "generate_samples: tokens behind a prompt, at most."})
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "generate_samples: below 1 likely tokens are drawn more often; 0: always the likeliest. Unset: 0.7, and 0 "
            "for a model with an encoder."
        },
    )
    top_p: float = field(
        default=1.0,
        metadata={"help": "generate_samples: draw only among the likeliest tokens that together have this probability."},
    )
    seed: int = field(default=42, metadata={"help": "Everything random follows from it."})
    attention_implementation: Literal["auto", "eager", "chunked", "xla", "cudnn"] = field(
        default="auto",
        metadata={
            "help": "chunked: exact, with the least memory; eager: keeps all scores; xla, cudnn: "
            "jax.nn.dot_product_attention, without attention dropout. auto: chunked."
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: less memory, about 30%% more time."}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Micro-batches in one update: multiplies the batch, not the memory."}
    )
    fsdp: bool = field(
        default=False,
        metadata={
            "help": "Spread weights, gradients and optimizer state over the devices instead of keeping all on each: less "
            "memory, more traffic between them."
        },
    )
    compile_for: str | None = field(
        default=None,
        metadata={
            "help": "Train nothing: compile for a machine that need not be there (v3-8, v5litepod-8, h100:8, ...; this: the "
            "one here) and say what of it is needed; exit status 1 if that is too much."
        },
    )
    json: bool = field(default=False, metadata={"help": "compile_for: print JSON."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep, the newest ones."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": "latest",
            "help": "Go on from a checkpoint as if never stopped: from the newest in output_dir (bare flag), from that one if "
            "there is one and else from the beginning (auto), or from a path.",
        },
    )
    resume_changes: str | None = field(
        default=None,
        metadata={
            "nargs": "+",
            "help": "Flags that may differ from those of the checkpoint, as max_steps,learning_rate: the run goes on with the "
            "new ones, knowingly otherwise than an uninterrupted one would.",
        },
    )
    load_best_model_at_end: bool = field(
        default=False,
        metadata={"help": "The model is that of the best evaluation, not of the last step; each best state is saved."},
    )
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "What is best, as loss or eval_accuracy. Unset: the evaluation loss."}
    )
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "More of it is better. Unset: unless it is a loss, a perplexity or bits per byte."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations in a row that were not better than the best before."}
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "How much better an evaluation must be to count for early_stopping_patience."}
    )
    multihost: bool = field(
        default=False, metadata={"help": "Train with several processes, which find each other (TPU pod, SLURM, Open MPI)."}
    )
    coordinator_address: str | None = field(
        default=None, metadata={"help": "host:port of process 0, where processes can't find each other; implies multihost."}
    )
    num_processes: int | None = field(default=None, metadata={"help": "Number of processes, with coordinator_address."})
    process_id: int | None = field(default=None, metadata={"help": "Number of this process, from 0."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload output_dir to the Hub, in the background."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository. Unset: the name of output_dir."})
    hub_token: str | None = field(
        default=None, repr=False, metadata={"help": "Token to write with. Unset: the one of `hf auth login` or HF_TOKEN."}
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Create the repository as a private one."})
    hub_strategy: Literal["end", "every_save", "checkpoint"] = field(
        default="every_save",
        metadata={"help": "Upload at the end, at every save too, or with the newest training state as last-checkpoint."},
    )

    least_log_lines: ClassVar[int] = 0  # in a run, however short; set where logging_steps was not


@dataclass
class ModelArguments:
    """Which model and tokenizer to start from."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Weights to start from, Flax or PyTorch layout (Hub id or directory). Unset: fresh."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Architecture with its default configuration, if no configuration is named."}
    )
    config_name: str | None = field(default=None, metadata={"help": "Configuration (Hub id or directory)."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to the configuration of a fresh model: key=value,key=value."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer (Hub id or directory). Unset: the one of model_name_or_path."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and tokenised data are kept."})
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the Hub repositories of configuration, tokenizer, weights."}
    )
    resize_token_embeddings: bool = field(
        default=False, metadata={"help": "Give tokens that the weights don't know rows, the mean of the others."}
    )
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Use the Rust tokenizer."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={"help": "Precision of activations; weights and loss stay float32. float16 is refused, see the error."},
    )
    token: str | None = field(
        default=None, repr=False, metadata={"help": "Hub token for private models and data; never logged or written."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code of configurations and tokenizers that comes with a Hub repository."}
    )


TRAIN_FILE_HELP = (
    "Training text: txt, csv, tsv, json, jsonl or parquet, also .gz, .bz2 or .xz. Files, patterns, directories or addresses "
    "(https://, hf://, s3://, gs://), several of them too, all of one format."
)
ENCODING_HELP = "Encoding of txt, csv, tsv and json files, as Python names it. Unset: UTF-8."


@dataclass
class DataArguments:
    """Which text to train on. An objective adds its own flags, and may override the methods."""

    row_length_flag: ClassVar[str] = "max_seq_length"  # the flag that sets the tokens per row
    token_depths: ClassVar[tuple[int, ...]] = (1,)  # how data may be tokenised already, as in files.DEPTHS
    cuts_row_length: ClassVar[bool] = False  # what happens if it is more than the model can take: cut or refused
    writes_text: ClassVar[bool] = False  # can its models continue a text, for generate_samples?
    noise: ClassVar[tuple[str, ...]] = ()  # flags of the objective that leave the rows as they are, and act on batches of them
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {}  # of the objective's own flags, as in LIMITS

    dataset_name: str | None = field(
        default=None,
        metadata={"aliases": ["--dataset_path"], "help": "Hub id, or a local directory (of data files, or by save_to_disk)."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    data_dir: str | None = field(default=None, metadata={"help": "Directory within the dataset to take data files from."})
    train_split_name: str | None = field(default=None, metadata={"help": "Split of the dataset to train on. Unset: train."})
    eval_split_name: str | None = field(default=None, metadata={"help": "Split to evaluate. Unset: validation, else held out."})
    train_file: list[str] | None = field(default=None, metadata={"help": TRAIN_FILE_HELP})
    validation_file: list[str] | None = field(default=None, metadata={"help": "Evaluation text, named as for train_file."})
    encoding: str | None = field(default=None, metadata={"help": ENCODING_HELP})
    mixture_file: str | None = field(
        default=None,
        metadata={"help": "JSON or YAML file that maps names to corpora, each with a weight, to train on them together."},
    )
    text_column_name: str | None = field(
        default=None,
        metadata={
            "help": "Column with the text. Unset: input_ids if that holds lists of token ids, which are used as they are; "
            "'text' if there is one; else the first that holds words."
        },
    )
    document_attention: bool = field(
        default=False, metadata={"help": "Where a row holds several texts, tokens see those of their own text only."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenise again even if a cached result exists."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Percentage of rows drawn as validation set if the data has none."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Keep only the first n training rows of tokens."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Keep only the first n evaluation rows of tokens."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the data while training instead of preparing it first; needs max_steps."}
    )
    shuffle_buffer_size: int = field(
        default=10_000, metadata={"help": "streaming: texts in a window, whose rows of tokens are shuffled."}
    )
    num_eval_samples: int = field(
        default=50_000, metadata={"help": "streaming: rows of tokens for evaluation, from the beginning, never trained on."}
    )

    def check(self, model_args: ModelArguments) -> None:
        """Refuse impossible settings of the objective before anything is loaded."""

    def adapt_config(self, config: PretrainedConfig, row_length: int) -> None:
        """Set what the objective, or its rows of that many tokens, need of the model's configuration."""

    def text_loader_options(self) -> dict[str, Any]:
        """Options for reading txt files, also those of a directory: keep_linebreaks, or sample_by="paragraph"."""
        return {}

    def add_columns(self, dataset: datasets.Dataset, split: str) -> datasets.Dataset:
        """Add columns that the objective reads beside the text."""
        return dataset

    def source_column(self, dataset: datasets.Dataset, collator: Any) -> str:
        """The column of which rows of tokens are made; mistakes in the data, or a stream's first rows, may be refused here."""
        tokens = files.find_token_column(dataset, self.text_column_name, self.token_depths)
        return tokens or files.find_text_column(dataset, self.text_column_name)

    def reason_for_no_rows(self, text_column: str) -> str:
        """Why all the data makes no row, and what to do; goes on from "the train data"."""
        return f"holds no text in column {text_column}"


Classes = Mapping[str, type[nn.Module]]  # the models that an objective can train, by their type


def supported(classes: Classes) -> str:
    """A sentence listing the types."""
    return f"supported are {', '.join(classes)}"


def optimizer_of(training_args: TrainingArguments) -> str:
    """The value of --optim that the flags mean, --adafactor and --lamb being older ones for two of them."""
    if training_args.adafactor or training_args.lamb:
        return "adafactor" if training_args.adafactor else "lamb"
    return training_args.optim


LION_BETA2 = 0.99  # where --adam_beta2 is not set


class Arguments(NamedTuple):
    """All flags of a run."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments


def public(*arguments: Any) -> dict[str, Any]:
    """All flags of this run except the secret ones, which are those that don't show in a repr, and what signs an address."""
    return {f.name: without_secrets(getattr(part, f.name)) for part in arguments for f in dataclasses.fields(part) if f.repr}


def without_secrets(value: Any) -> Any:
    """Addresses in a list of files as they may be shown to others."""
    return [addresses.shown(word) for word in value] if isinstance(value, list) else value


def changed_values(*arguments: Any) -> dict[str, Any]:
    """The public flags that were set to something else than what they are unset."""
    unset = {f.name: f.default for part in arguments for f in dataclasses.fields(part)}
    found = public(*arguments)
    if found.get("do_train") and found.get("do_eval"):  # what is done where neither is set
        unset |= {"do_train": True, "do_eval": True}
    if found.get("optim") == "lion":
        unset["adam_beta2"] = LION_BETA2
    return {name: value for name, value in found.items() if value != unset[name]}


def changed(*arguments: Any) -> str:
    """The same, as one would type them."""
    return " ".join(f"--{name} {typed(value)}" for name, value in changed_values(*arguments).items())


def typed(value: Any) -> Any:
    """A value as one would type it: those of a list one after the other."""
    return " ".join(value) if isinstance(value, list) else value
