# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom, learn, and leave nothing behind; and they are kept as their authors wrote them."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nbclient
import nbformat
import pytest

from tests import strip_notebooks
from tests.conftest import ROOT

NOTEBOOKS = {path.stem: path for path in strip_notebooks.NOTEBOOKS}
ALL_NOTEBOOKS = pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=NOTEBOOKS)
MASKED, CAUSAL = "masked_language_modeling", "causal_language_modeling"


def source_of(path: Path, cell_id: str) -> str:
    return next(cell.source for cell in nbformat.read(path, 4).cells if cell.id == cell_id)


# ---- How they are kept -----------------------------------------------------------------------------------------------------


def test_there_are_two():
    assert sorted(NOTEBOOKS) == [CAUSAL, MASKED]


@ALL_NOTEBOOKS
def test_outputs_are_stripped(path):
    text = path.read_text("utf-8")
    assert text == strip_notebooks.stripped(text), f"{path.name}: run `make style`, which strips outputs"
    nbformat.validate(json.loads(text))


@ALL_NOTEBOOKS
def test_stripping_takes_what_running_leaves(path):
    """Outputs, counts, metadata and another layout go, and nothing that somebody wrote."""
    text = path.read_text("utf-8")
    notebook = nbformat.reads(text, 4)
    for count, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.execution_count, cell.metadata["scrolled"] = count, True
        cell.outputs = [nbformat.v4.new_output("stream", text="done\n")]
    notebook.metadata["language_info"]["version"] = "3.11.9"
    assert strip_notebooks.stripped(nbformat.writes(notebook)) == text
    assert "done" in nbformat.writes(notebook)


@ALL_NOTEBOOKS
def test_cells_have_names_and_can_be_read(path):
    """An id says what a cell is for; Jupyter's own are random. None is longer than a screen."""
    cells = nbformat.read(path, 4).cells
    assert len({cell.id for cell in cells}) == len(cells)
    for cell in cells:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", cell.id), f"{path.name}: name the cell {cell.id} for what is in it"
        assert cell.source.count("\n") < 45, cell.id


@ALL_NOTEBOOKS
def test_links_lead_somewhere(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", cell.source):
                name, _, anchor = target.partition("#")
                assert (path.parent / name).exists(), target
                headings = re.findall(r"^#+ (.*)$", (path.parent / name).read_text("utf-8"), re.MULTILINE)
                assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], target


def test_what_both_begin_with_is_the_same():
    for cell_id in ("colab", "install", "repository", "text-why", "text"):
        assert source_of(NOTEBOOKS[MASKED], cell_id) == source_of(NOTEBOOKS[CAUSAL], cell_id), cell_id


# ---- Where they run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_colab", [True, False])
@ALL_NOTEBOOKS
def test_the_first_cell_installs_in_colab_alone(path, in_colab, monkeypatch):
    commands, places = [], []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(os, "chdir", places.append)
    if in_colab:
        monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    first = next(cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
    names: dict[str, Any] = {}
    exec(first.source, names)
    if not in_colab:
        assert (commands, places) == ([], [])
        return
    (clone, install), (place,) = commands, places
    assert clone == ["git", "clone", "--depth", "1", names["REPOSITORY"], place]
    assert install == [sys.executable, "-m", "pip", "install", "--quiet", "-r", "requirements.txt"]
    assert (ROOT / install[-1]).exists()


@ALL_NOTEBOOKS
def test_alone_it_says_what_is_missing(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="open this notebook in a clone of the repository"):
        exec(f"import sys\n{source_of(path, 'repository')}", {})


# ---- What they do ----------------------------------------------------------------------------------------------------------


class Executed:
    """A notebook that was run in a kernel of its own, and what it found out."""

    def __init__(self, notebook: nbformat.NotebookNode):
        self.cells = {cell.id: cell for cell in notebook.cells}
        self.values = json.loads(self.printed("values"))

    def printed(self, cell_id: str) -> str:
        return "".join(output.text for output in self.cells[cell_id].outputs if output.output_type == "stream")

    def displayed(self, cell_id: str, kind: str) -> str:
        """The one output of that kind, image/png or mere text/plain: it was drawn anew in its place."""
        outputs = [output.data for output in self.cells[cell_id].outputs if "data" in output]
        (found,) = [data[kind] for data in outputs if set(data) | {"text/plain"} == {kind, "text/plain"}]
        return found


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Run a notebook as Jupyter would: execute(path, values, before, num_steps) -> Executed; all that it writes is temporary.

    `values` are expressions to be known afterwards, by name; `before` is code that comes first.
    """
    for name in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))

    def run(path: Path, values: dict[str, str], before: str = "", num_steps: int | None = None) -> Executed:
        notebook = nbformat.read(path, 4)
        if num_steps:
            settings = next(cell for cell in notebook.cells if cell.id == "settings")
            settings.source, count = re.subn(r"(?m)^(NUM_STEPS\b.* = )\d+", rf"\g<1>{num_steps}", settings.source)
            assert count == 1
        report = f"import json; print(json.dumps({{{', '.join(f'{n!r}: {e}' for n, e in values.items())}}}))"
        first, last = (nbformat.v4.new_code_cell(source, id=i) for i, source in (("before", before), ("values", report)))
        notebook.cells = [first, *notebook.cells, last]
        present = files_of_the_house()
        nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(path.parent)}}).execute()
        assert files_of_the_house() == present
        return Executed(notebook)

    return run


def files_of_the_house() -> set[Path]:
    found = [*ROOT.iterdir(), *(ROOT / "notebooks").rglob("*")]
    return {path for path in found if not path.name.startswith((".", "__pycache__"))}


WITHOUT_TORCH = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
"""
VALUES = {
    "accuracy": "accuracy", "baseline": "float(baseline)", "directory": "str(OUTPUT_DIR)", "train_points": "train_points",
    "picture": "__import__('base64').b64encode(picture(train_points, eval_points).data).decode()",
}  # fmt: skip


def check_run(done: Executed, tmp_path: Path) -> None:
    """What holds for both: the curve is the last one, the loss fell, and the model was written."""
    image = done.displayed("training", "image/png").replace("\n", "")
    assert base64.b64decode(image).startswith(b"\x89PNG")
    assert image == done.values["picture"]
    losses = [loss for _, loss in done.values["train_points"]]
    assert len(losses) > 10
    assert losses[-1] < losses[0] - 2.5
    directory = Path(done.values["directory"])
    assert tmp_path in directory.parents
    written = {path.name for path in directory.iterdir() if path.stat().st_size}
    assert written == {"config.json", "flax_model.msgpack", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert str(directory / "model.safetensors") in done.printed("saving")
    assert done.printed("pytorch") == "PyTorch is not installed here; with it this cell loads the model: pip install torch\n"
    for cell in done.cells.values():
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr" or "Warning" not in output.text, f"{cell.id}: {output.text}"


def test_masked_language_modelling(execute, tmp_path):
    """It fills gaps well above the commonest token, and shows what was hidden."""
    more = {"predictions": "predictions", "block_accuracy": "float(block_accuracy)"}
    done = execute(NOTEBOOKS[MASKED], VALUES | more, WITHOUT_TORCH)
    check_run(done, tmp_path)
    assert done.values["accuracy"] > max(0.2, 4 * done.values["baseline"])
    assert done.values["block_accuracy"] < done.values["accuracy"] - 0.02
    assert done.printed("collator").count("The model reads: ") == 2
    assert re.search(r"'\[MASK\]' +was '", done.printed("collator"))
    shares = re.findall(r"([\d.]+)%", done.printed("shares"))
    assert [float(share) for share in shares] == pytest.approx([14, 80, 10, 10], abs=1)
    assert all(len(set(best)) == 5 for best in done.values["predictions"].values())
    assert "not" in done.values["predictions"]["If the file does [MASK] exist, an exception is raised."]


def test_causal_language_modelling(execute, tmp_path):
    """It knows next tokens well above the commonest one, and what it writes is text in the end."""
    more = {"first_accuracy": "first_accuracy", "samples": "samples", "text": "tokenizer.decode(likeliest[0])"}
    done = execute(NOTEBOOKS[CAUSAL], VALUES | more, WITHOUT_TORCH)
    check_run(done, tmp_path)
    assert done.values["accuracy"] > max(0.2, 4 * done.values["baseline"])
    assert done.values["first_accuracy"] < done.values["accuracy"]
    assert "is asked for nothing" in done.printed("collator").splitlines()[-1]
    assert done.printed("collator").count("is asked for nothing") == 1
    assert done.displayed("training", "text/plain").count("Return a list of | ") == len(done.values["samples"]) > 5
    assert done.values["text"].isascii()


@pytest.mark.torch
@ALL_NOTEBOOKS
def test_the_model_loads_in_pytorch(path, execute):
    """After a few steps; the same scores, and the same text."""
    values = {"difference": "torch_difference", "name": "type(torch_model).__name__"}
    if path.stem == CAUSAL:
        values |= {"ours": "tokenizer.decode(likeliest[-1])", "theirs": "torch_text"}
    done = execute(path, values, num_steps=60)
    assert done.values["name"] == {MASKED: "ModernBertForMaskedLM", CAUSAL: "LlamaForCausalLM"}[path.stem]
    assert done.values["difference"] < 1e-3
    assert done.values.get("ours") == done.values.get("theirs")
    assert "scores differ from Flax's by" in done.printed("pytorch")
