# SPDX-License-Identifier: Apache-2.0
"""What README and docs/ say can be done."""

import itertools
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from flaxlm import arguments, cli
from flaxlm.models import fields
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "train.sbatch"]
ALL_PAGES = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
OPERATORS = {"&&", "||", "|", "&", ";", ">", "2>&1"}  # between commands, or behind one


def blocks_of(page: Path) -> list[str]:
    """The fenced blocks of a page, cells of notebooks without their ! and %; of a batch file the commands in its comment."""
    text = page.read_text("utf-8")
    if page.suffix == ".sbatch":
        return ["\n".join(re.findall(r"^#     (.*)$", text, re.MULTILINE))]
    return [
        re.sub(r"^[!%]", "", block, flags=re.MULTILINE) for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
    ]


def commands_in(page: Path) -> list[list[str]]:
    """The commands of a page, joined at backslashes, with shell arrays filled in; those for another machine too."""
    text = "\n".join(blocks_of(page)).replace("\\\n", " ")
    arrays = dict(re.findall(r"^([A-Z]+)=\((.*?)\)$", text, re.DOTALL | re.MULTILINE))
    text = re.sub(r"^[A-Z]+=\(.*?\)$", "", text, flags=re.DOTALL | re.MULTILINE)
    return split(re.sub(r'"\$\{([A-Z]+)\[@\]\}"', lambda name: " ".join(arrays[name[1]].split()), text))


def split(text: str) -> list[list[str]]:
    """Commands as lists of words; of `ssh ... --command="..."` also the commands that it gives."""
    commands, begun = [], ""
    for line in text.splitlines():
        begun += line + "\n"
        try:
            words = shlex.split(begun, comments=True)
        except ValueError:  # goes on in the next line
            continue
        begun = ""
        for is_operator, group in itertools.groupby(words, OPERATORS.__contains__):
            commands += [] if is_operator else [list(group)]
        commands += [command for word in words if word.startswith("--command=") for command in split(word.partition("=")[2])]
    assert not begun, begun
    return commands


def script_and_flags(command: list[str]) -> list[str]:
    """What of a command comes behind the name of Python: a script and its flags; [] if that is not what it runs."""
    words = list(itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=.*", word), command))
    if words[:1] == ["sbatch"]:
        (place,) = [i for i, word in enumerate(words) if word.endswith(".sbatch")]
        assert (ROOT / words[place]).exists(), command
        return words[place + 1 :]
    if words and words[0] in ("timeout", "nohup"):
        words = list(itertools.dropwhile(lambda word: not word.endswith("python"), words))
    is_script = len(words) > 1 and Path(words[0]).name in ("python", "python3") and words[1].endswith(".py")
    return words[1:] if is_script else []


def parser_of(script: str) -> cli.ScriptArgumentParser:
    module = __import__(Path(script).stem)
    parts = [arguments.ModelArguments, getattr(module, "DataTrainingArguments", None), arguments.TrainingArguments]
    if parts[1] is None:
        parts = [part for name, part in vars(module).items() if name.endswith("Arguments")]
    return cli.ScriptArgumentParser(parts)


@ALL_PAGES
def test_commands_parse(page):
    """Each command names a script that exists and flags that it knows (defect 111)."""
    targets = set(re.findall(r"^([a-z0-9-]+(?: [a-z0-9-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {name for names in targets for name in names.split()}
    for command in commands_in(page):
        if command[0] == "make":
            assert {word for word in command[1:] if "=" not in word} <= targets, command
        script, *flags = script_and_flags(command) or [""]
        assert not script or (ROOT / script).exists(), command
        if not script or "/" in script or script.startswith("t5_"):
            continue
        parser = parser_of(script)
        if flags and flags[0].endswith(".json"):
            assert set(json.loads((ROOT / flags[0]).read_text())) <= {action.dest for action in parser._actions}
            flags[:1] = ["--output_dir", "x"]
        parser.parse(flags)


def test_commands_are_found():
    def number(path: str) -> int:
        return sum(bool(script_and_flags(command)) for command in commands_in(ROOT / path))

    assert number("README.md") > 5
    for machine in ("tpu.md", "gpu.md", "slurm.md", "kaggle-and-colab.md", "train.sbatch"):
        assert number(f"docs/{machine}") >= 2, machine
    assert ["make", "quickstart"] in commands_in(ROOT / "README.md")


@ALL_PAGES
def test_blocks_are_shell(page):
    for block in blocks_of(page):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), block


@ALL_PAGES
def test_links_lead_somewhere(page):
    """Files that a page links to exist; headings within a page or another do."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        linked = page if not path else page.parent / path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


def test_tables_of_model_types_are_complete():
    """docs/model-types.md: the types of each script, and each field that is refused, for which types and what it takes."""
    lines = (ROOT / "docs" / "model-types.md").read_text("utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    said = {first.strip("`").partition("`")[0]: rest for first, *rest in rows}
    for script in ("run_mlm_flax", "run_clm_flax", "run_t5_mlm_flax", "run_bart_dlm_flax", "run_pretraining_flax"):
        types = re.sub(r" \([^)]*\)", "", said[f"{script}.py"][0]).split(", ")
        assert sorted(types) == sorted(__import__(script).MODELS), script
    for item in fields.REFUSED:
        types, takes, _ = said[item.field]
        assert not item.types or set(types.split(", ")) == set(item.types) or types == "the same", item.field
        values = {json.dumps(value) for value in item.same if value is not None}
        assert values == set(re.findall("`(.*?)`", takes)), item.field


def test_make_help_tells_every_target():
    """One line each, in the order of the Makefile; plain `make` prints the same and builds nothing."""
    makefile = (ROOT / "Makefile").read_text()
    targets = [name for names in re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE) for name in names.split()]
    assert len(targets) > 15
    for command in (["make", "help"], ["make"]):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        _, *lines = done.stdout.splitlines()
        told = [line.split(maxsplit=1) for line in lines]
        assert sorted(name for name, _ in told) == sorted(targets)
        assert all(text[0].islower() and len(line) <= 160 for (_, text), line in zip(told, lines, strict=True))


def test_plain_commands_are_those_of_make_quickstart():
    """Who has no make reads them in README.md: the same, in the same order."""
    recipe = re.search(r"^quickstart: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    made = [line.replace("$(RUN)", "python").replace("$(BUILD)", "quickstart/build").split() for line in recipe.splitlines()]
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    (plain,) = [block for block in blocks if "-m venv" in block]
    environment, libraries, *commands = plain.splitlines()
    assert environment == "python3 -m venv .venv && . .venv/bin/activate"
    assert libraries == "python -m pip install -r requirements.txt"
    assert [shlex.split(command) for command in commands] == made
