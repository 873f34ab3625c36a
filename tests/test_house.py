# SPDX-License-Identifier: Apache-2.0
"""How the house is built: arrows between modules go one way, rooms are small, and what scripts share by text is the same."""

import ast
import re
from pathlib import Path

import pytest

import flaxlm
from tests.conftest import ROOT

PACKAGE = sorted((ROOT / "flaxlm").rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))
TRAINING_SCRIPTS = [path for path in SCRIPTS if "arguments.DataArguments" in path.read_text()]


def imported(path: Path) -> set[str]:
    """Names of modules of this repository that a file imports, as flaxlm.x or x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            is_package = node.module in ("flaxlm", "flaxlm.models")
            found |= {f"{node.module}.{alias.name}" if is_package else node.module for alias in node.names}
    ours = {"flaxlm", "benchmarks", "quickstart", "tests", *(script.stem for script in SCRIPTS)}
    return {name for name in found if name.partition(".")[0] in ours}


def room(path: Path) -> str:
    """The module of the list in flaxlm/__init__.py that a file is, or is a part of: the folder models is one."""
    inside = path.relative_to(ROOT / "flaxlm").parts
    return "" if inside == ("__init__.py",) else inside[0].removesuffix(".py")


def test_arrows_go_one_way():
    """A module imports only those above it in the list of flaxlm/__init__.py; none imports a script."""
    order = re.findall(r"^    (\w+)  +\w", flaxlm.__doc__.partition("Shape letters")[0], re.MULTILINE)
    modules = sorted({room(path) for path in PACKAGE} - {""})
    assert sorted(order) == modules, "the list of modules in flaxlm/__init__.py is not what is in the folder"
    for path in PACKAGE:
        allowed = [*order[: order.index(room(path))], ""] if room(path) else []  # "" is the package itself
        for name in imported(path):
            package, _, module = name.partition(".")
            assert package == "flaxlm", f"{path.name} imports {name}"
            module = module.partition(".")[0]
            is_within = path.parent != ROOT / "flaxlm" and module == room(path)
            assert is_within or module in allowed, f"{path.name} imports {module}, which is not above it in flaxlm/__init__.py"


def test_families_import_each_other_without_a_circle():
    """Of the files in flaxlm/models only __init__.py knows them all; none of them knows it."""
    found = {path.stem: within(path) for path in PACKAGE if room(path) == "models"}
    assert found.pop("__init__") == found.keys()
    while found:
        roots = {name for name, others in found.items() if not others & found.keys()}
        assert roots, f"these files of flaxlm/models import each other: {', '.join(sorted(found))}"
        found = {name: others for name, others in found.items() if name not in roots}


def within(path: Path) -> set[str]:
    """Names of the files of flaxlm/models that one of them imports."""
    names = {name.removeprefix("flaxlm.models").removeprefix(".") for name in imported(path) if "flaxlm.models" in name}
    assert "" not in names, f"{path.name} imports flaxlm.models as a whole"
    return names


def test_rooms_are_named_for_what_is_in_them():
    shared = {"utils", "util", "common", "misc", "helpers", "base", "core"}
    assert not shared & {path.stem for path in [*PACKAGE, *SCRIPTS, *ROOT.glob("*/*.py")]}
    for path in PACKAGE:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path.name} does not say what it is for"


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS, *(ROOT / "benchmarks").glob("*.py")], ids=lambda path: path.name)
def test_nothing_is_too_long_to_be_read(path):
    """Scripts up to 750 lines, modules up to 400, functions up to 80."""
    text = path.read_text()
    assert text.count("\n") <= (750 if path in SCRIPTS else 400)
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    long = {
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines" for node in functions if node.end_lineno - node.lineno > 79
    }
    assert not long


def source_of(path: Path, name: str) -> str:
    text = path.read_text("utf-8")
    node = next(node for node in ast.parse(text).body if getattr(node, "name", None) == name)
    return ast.get_source_segment(text, node)


# What the training scripts have in common by text, and who has a text of their own, for a reason.
SHARED = {
    "sum_gradients": {"run_pretraining_flax.py"},  # two losses, each divided by a number of its own
    "train_step": {"run_pretraining_flax.py"},
    "eval_step": set(),
    "make_steps": set(),
    "main": set(),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_scripts_share_by_text_is_the_same(name):
    reference, *others = [path for path in TRAINING_SCRIPTS if path.name not in SHARED[name]]
    assert len(TRAINING_SCRIPTS) == 5
    for path in others:
        assert source_of(path, name) == source_of(reference, name), (
            f"{name} differs between {reference.name} and {path.name}: copy the better one over the other; or if the objective"
            f" needs it, name {path.name} in SHARED here, with the reason"
        )


def test_scripts_and_package_are_of_one_version():
    for path in SCRIPTS:
        if "flaxlm" in path.read_text():
            assert f'flaxlm.begin("{flaxlm.__version__}", __file__' in path.read_text(), path.name


def test_what_must_not_come_back():
    """No list of dependencies but requirements.txt, no checker of copies, nothing that changes classes of others."""
    assert "dependencies = [" not in (ROOT / "pyproject.toml").read_text()
    assert not (ROOT / "flaxlm" / "patches.py").exists()
    for path in [*PACKAGE, *SCRIPTS]:
        assert not re.search(r"intercept_methods|modeling_flax|FlaxPreTrainedModel|FlaxAuto", path.read_text()), path.name


SETTINGS = {"sys.unraisablehook", "threading.excepthook"}  # made to be set


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], ids=lambda path: path.name)
def test_nothing_of_other_libraries_is_replaced(path):
    """No attribute of an imported module or class is set, but those that a library offers as settings."""
    tree, found = ast.parse(path.read_text("utf-8")), []
    modules = {alias.asname or alias.name.partition(".")[0] for node in ast.walk(tree) for alias in getattr(node, "names", [])
               if isinstance(node, ast.Import | ast.ImportFrom)}  # fmt: skip
    for node in ast.walk(tree):
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)] if isinstance(node, ast.stmt) else []
        for target in targets:
            root = target
            while isinstance(root, ast.Attribute | ast.Subscript):
                root = root.value
            if isinstance(target, ast.Attribute) and isinstance(root, ast.Name) and root.id in modules:
                found.append(ast.unparse(target))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr" and ast.unparse(node.args[0]) in modules:
            found.append(ast.unparse(node))
    assert set(found) <= SETTINGS, found
