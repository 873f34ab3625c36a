# SPDX-License-Identifier: Apache-2.0
"""The model card: what the Hub reads of it, what people read, and that a resumed run writes the same."""

import json
import re
import shlex

import huggingface_hub
import pytest

import run_clm_flax
import run_mlm_flax
from flaxlm import arguments, cards, cli, command_line
from tests.conftest import run
from tests.test_streams import back_to

MEASURED = r"^(\| (training time|tokens per second|memory in use).*\n)"  # lines that are others in every run


@pytest.fixture(scope="module")
def finished(roberta_dir, corpus, tmp_path_factory):
    """(output_dir, train): a run of 6 steps, and what trains so; the name of the text needs quoting."""
    text = tmp_path_factory.mktemp("text") / "my text.txt"
    text.write_text(corpus.read_text("utf-8"), "utf-8")

    def train(output_dir, *flags):
        more = ["--max_steps", 6, "--save_steps", 3, "--eval_steps", 3, "--max_eval_samples", 16, "--save_total_limit", 9]
        return run(output_dir, roberta_dir, "--train_file", text, *more, "--no_save_safetensors", *flags)

    output_dir = tmp_path_factory.mktemp("finished") / "my-model"
    train(output_dir)
    return output_dir, train


def test_metadata_are_in_the_schema_of_the_hub(finished):
    """Read by the Hub's own library: what it shows beside the model, and all results, unrounded."""
    card = huggingface_hub.ModelCard.load(finished[0] / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "fill-mask")
    assert card.data.tags == ["jax", "flax", "roberta", "generated_from_script"]
    assert card.data.model_name == "my-model"
    results = json.loads((finished[0] / "eval_results.json").read_text())
    assert {f"eval_{result.metric_type}": result.metric_value for result in card.data.eval_results} == results
    (where,) = {(result.task_type, result.dataset_name, result.dataset_type) for result in card.data.eval_results}
    assert where == ("fill-mask", "a held-out part of my text.txt", "text")
    assert not {"license", "language", "datasets", "base_model"} & card.data.to_dict().keys()  # nobody told


def test_a_resumed_run_writes_the_same(finished, tmp_path):
    output_dir, train = finished
    resumed = back_to(output_dir, tmp_path / "my-model", 3)
    train(resumed, "--resume_from_checkpoint")
    whole, again = (
        re.sub(MEASURED, "", (path / "README.md").read_text(), flags=re.MULTILINE) for path in (output_dir, resumed)
    )
    assert whole == again
    assert "training loss" in whole


def test_the_command_is_one(finished):
    """Over several lines, quoted: the parser takes it, and finds what the run had."""
    card = (finished[0] / "README.md").read_text()
    (command,) = re.findall(r"```bash\n(.*?)```", card, re.DOTALL)
    assert max(map(len, command.splitlines())) <= 102
    python, script, *flags = shlex.split(command.replace("\\\n", ""))
    assert (python, script) == ("python", "run_mlm_flax.py")
    parts = [arguments.ModelArguments, run_mlm_flax.DataTrainingArguments, arguments.TrainingArguments]
    _, data_args, training_args = cli.ScriptArgumentParser(parts).parse(flags)
    assert data_args.train_file == ["my text.txt"]
    assert (training_args.max_steps, training_args.save_safetensors) == (6, False)


SHORT = "run_clm_flax.py --config_name x --tokenizer_name x --train_file a.txt --output_dir out"


@pytest.mark.parametrize(
    ("flags", "command"),
    [
        ([], SHORT),
        (["--do_train", "--do_eval"], SHORT),
        (["--do_train"], f"{SHORT} --do_train"),
        (["--resume_from_checkpoint", "--resume_changes", "max_steps"], SHORT),
        (["--optim", "lion"], f"{SHORT} --optim lion"),
        (["--optim", "lion", "--adam_beta2", "0.999"], f"{SHORT} --optim lion --adam_beta2 0.999"),
        (["--lamb"], f"{SHORT} --optim lamb"),
        (["--no_keep_linebreaks"], SHORT.replace(" --output_dir", " --keep_linebreaks false --output_dir")),
        (["--report_to", "tensorboard", "trackio"], f"{SHORT} --report_to tensorboard trackio"),
        (
            ["--eval_steps", "1", "--load_best_model_at_end", "--greater_is_better", "False"],
            f"{SHORT} --eval_steps 1 --load_best_model_at_end --greater_is_better false",
        ),
    ],
)
def test_the_command_is_short_and_leads_to_the_same_run(flags, command, tmp_path, monkeypatch):
    """From flags and from a file of them: none that is as if unset, none of how a run was resumed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")

    def parse(words):
        args = command_line.parse(words, run_clm_flax.DataTrainingArguments, run_clm_flax.MODELS, None)
        return args, arguments.public(*args) | {"resume_from_checkpoint": None, "resume_changes": None}

    args, found = parse([*SHORT.split()[1:], *flags])
    python, *words = shlex.split(cards.command("run_clm_flax.py", args).replace("\\\n", ""))
    assert (python, words) == ("python", shlex.split(command))
    assert parse(words[1:])[1] == found
    values = {name: value for name, value in found.items() if value is not None}
    (tmp_path / "flags.json").write_text(json.dumps(values))
    args, _ = parse(["flags.json"])
    assert shlex.split(cards.command("run_clm_flax.py", args).replace("\\\n", "")) == [python, *words]


def test_what_there_is_not_has_no_section(finished, tmp_path):
    _, train = finished
    train(tmp_path / "run", "--do_train")
    cards_found = [(path / "README.md").read_text() for path in (finished[0], tmp_path / "run")]
    headings = [re.findall(r"^## (.*)$", card, re.MULTILINE) for card in cards_found]
    assert headings == [["Results", *(rest := ["How to use it", "How it was trained", "Limits"])], rest]
    assert "model-index" not in cards_found[1]
    for card in cards_found:
        assert "\n\n\n" not in card
        assert not re.search(r"\bNone\b|\{|\}", re.sub(r"```.*?```", "", card, flags=re.DOTALL))


@pytest.mark.parametrize(
    ("name", "found"),
    [("oscar", True), ("my-name/my_data.v2", True), ("./data", False), ("/data", False), ("~/data", False), ("csv", False),
     ("hf://datasets/a/b", False), ("a/b/c", False), (None, False), ("here", False)],
)  # fmt: skip
def test_names_of_the_hub(name, found, tmp_path, monkeypatch):
    """Only those are links in a card: not what is a directory here, nor a kind of file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert cards.on_the_hub(name) == (name if found else None)


def test_every_objective_has_its_words():
    """Of the mappings in flaxlm.models, each with models."""
    found = {name for name, value in vars(cards.models).items() if name.isupper() and isinstance(value, dict)}
    assert cards.OBJECTIVES.keys() == found
