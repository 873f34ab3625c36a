# SPDX-License-Identifier: Apache-2.0
"""A script runs from a clone, through a link, after `pip install .`, and beside a copy of the package; else it says how."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import flaxlm
from tests.conftest import ROOT

SCRIPT = ROOT / "run_clm_flax.py"
SCRIPTS = [path for path in sorted(ROOT.glob("*.py")) if "flaxlm" in path.read_text()]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A directory into which the package is installed, by pip from a copy of the clone."""
    clone, site = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "requirements.txt", "README.md"):
        shutil.copy(ROOT / name, clone)
    shutil.copytree(ROOT / "flaxlm", clone / "flaxlm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_clm_flax.py", "prepare_model_dir.py"):  # which are not of the package
        shutil.copy(ROOT / name, clone)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(site / "wheel"), str(clone)]
    subprocess.run(wheel, check=True, capture_output=True, text=True)
    (built,) = (site / "wheel").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site / "packages")
    return site / "packages"


def test_the_wheel_holds_the_package_and_its_requirements(site):
    names = {path.name for path in site.iterdir()}
    assert names == {"flaxlm", f"flaxlm-{flaxlm.__version__}.dist-info"}
    assert {path.name for path in (site / "flaxlm").rglob("*.py")} == {p.name for p in (ROOT / "flaxlm").rglob("*.py")}
    metadata = next(site.glob("*.dist-info")).joinpath("METADATA").read_text().splitlines()
    found = {line.removeprefix("Requires-Dist: ") for line in metadata if line.startswith("Requires-Dist: ")}
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    wanted = {line for line in lines if line}
    assert len(wanted) > 10
    extras = {line for line in found if "extra ==" in line}
    assert {Requirement(line) for line in found - extras} == {Requirement(line) for line in wanted}
    assert {Requirement(line).name for line in extras} == {
        "jax", "nvidia-cuda-nvcc-cu12", "nvidia-cuda-runtime-cu12", "wandb", "trackio",
    }  # fmt: skip


@pytest.fixture
def alone(tmp_path) -> Path:
    """A copy of a script in a directory of its own, that is no git repository."""
    (tmp_path / "alone").mkdir()
    return Path(shutil.copy(SCRIPT, tmp_path / "alone"))


@pytest.fixture
def flags(gpt2_dir, corpus) -> list:
    source = ["--config_name", gpt2_dir, "--tokenizer_name", gpt2_dir, "--train_file", corpus, "--block_size", 32]
    return [*source, "--max_steps", 1, "--do_train", "--output_dir", "out"]


def without_package() -> dict[str, str]:
    return {"PYTHONPATH": "", "PYTHONSAFEPATH": ""}


def test_installed(site, alone, flags, run_script):
    done = run_script(alone.name, *flags, cwd=alone.parent, env={"PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stderr
    assert (alone.parent / "out" / "model.safetensors").exists()


def test_beside_a_copy_of_the_package(alone, flags, run_script):
    shutil.copytree(ROOT / "flaxlm", alone.parent / "flaxlm", ignore=shutil.ignore_patterns("__pycache__"))
    done = run_script(alone.name, *flags, cwd=alone.parent, env=without_package())
    assert done.returncode == 0, done.stderr


def test_through_a_link_from_a_model_directory(gpt2_dir, flags, run_script, tmp_path):
    """In the clone, without installing; the flags in a .args file beside the link."""
    directory = shutil.copytree(gpt2_dir, tmp_path / "model")
    os.symlink(SCRIPT, directory / SCRIPT.name)
    line = " ".join(str(flag) for flag in [*flags[:-1], "ignored"])
    (directory / SCRIPT.with_suffix(".args").name).write_text(line.replace("--max_steps", "--max-steps"))
    assert os.access(SCRIPT, os.X_OK)
    done = run_script(f"./{SCRIPT.name}", "--output_dir", "./", "--overwrite_output_dir", cwd=directory, env=without_package())
    assert done.returncode == 0, done.stderr
    assert (directory / "flax_model.msgpack").exists()
    assert not (directory / "ignored").exists()


def test_a_changed_copy_speaks_for_itself(site, alone, flags, run_script):
    """Its own name in messages, record and card; and the commit of its own repository, if it is in one."""
    own = alone.rename(alone.with_name("my_objective.py"))
    environment = {"PYTHONPATH": str(site)}

    def record() -> dict:
        done = run_script(own.name, *flags, "--overwrite_output_dir", cwd=own.parent, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads((own.parent / "out" / "run_info.json").read_text())

    assert (record()["script"], record()["git_commit"]) == (own.name, None)
    git = ["git", "-C", str(own.parent), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "--quiet"], ["add", own.name], ["commit", "--quiet", "--message", "mine"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert record()["git_commit"] == head
    assert f"\npython {own.name} --" in (own.parent / "out" / "README.md").read_text()
    done = run_script(own.name, *flags, cwd=own.parent, env=environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"{own.name}: error: --output_dir out: is not empty")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_without_the_package(path, run_script, tmp_path):
    """One line that says both ways to get it."""
    shutil.copy(path, tmp_path)
    done = run_script(path.name, "--help", cwd=tmp_path, env=without_package())
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"{path.name}: error: needs the package flaxlm {flaxlm.__version__}: install it, ")
    assert "`pip install .`" in done.stderr
    assert "copy the folder flaxlm" in done.stderr


def test_with_the_package_of_another_version(alone, run_script):
    package = shutil.copytree(ROOT / "flaxlm", alone.parent / "flaxlm", ignore=shutil.ignore_patterns("__pycache__"))
    text = (package / "__init__.py").read_text()
    (package / "__init__.py").write_text(text.replace(f'"{flaxlm.__version__}"', '"0.1.9"'))
    done = run_script(alone.name, "--help", cwd=alone.parent, env=without_package())
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"needs the package flaxlm {flaxlm.__version__}, and {package} is 0.1.9: install that one" in done.stderr
