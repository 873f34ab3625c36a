# SPDX-License-Identifier: Apache-2.0
"""What README and docs/ say can be done."""

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

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL_PAGES = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands_in(page: Path) -> list[list[str]]:
    """The commands in the fenced blocks of a page, joined at backslashes, with shell arrays filled in."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    arrays = dict(re.findall(r"^([A-Z]+)=\((.*?)\)$", text, re.DOTALL | re.MULTILINE))
    text = re.sub(r"^[A-Z]+=\(.*?\)$", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = re.sub(r'"\$\{([A-Z]+)\[@\]\}"', lambda name: " ".join(arrays[name[1]].split()), text).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip() and not line.strip().startswith("#")]


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
        words = [word for word in command if not re.fullmatch(r"[A-Z_]+=.*", word)]
        words = words[words.index("python") :] if words[0] == "timeout" else words
        if words[0] not in ("python", "python3") or not words[1].endswith(".py"):
            continue
        assert (ROOT / words[1]).exists(), command
        if "/" in words[1] or words[1].startswith("t5_"):
            continue
        parser, flags = parser_of(words[1]), words[2:]
        if flags and flags[0].endswith(".json"):
            assert set(json.loads((ROOT / flags[0]).read_text())) <= {action.dest for action in parser._actions}
            flags[:1] = ["--output_dir", "x"]
        parser.parse(flags)


def test_commands_are_found():
    assert sum(command[0] == "python" for page in PAGES for command in commands_in(page)) > 5
    assert ["make", "quickstart"] in commands_in(ROOT / "README.md")


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
