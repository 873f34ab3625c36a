# SPDX-License-Identifier: Apache-2.0
"""The copies in the scripts are the same, and the checker would notice if they were not."""

import subprocess
import sys

from tests.conftest import ROOT


def check(*flags):
    return subprocess.run(
        [sys.executable, ROOT / "utils" / "check_copies.py", *map(str, flags)], capture_output=True, text=True
    )


def test_copies_are_the_same():
    done = check()
    assert done.returncode == 0, done.stdout


def test_a_drifted_copy_is_found_and_mended(tmp_path):
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    drifted = tmp_path / "prepare_model_dir.py"
    drifted.write_text(drifted.read_text().replace('"takes a number"', '"wants a number"', 1))
    done = check("--root", tmp_path)
    assert done.returncode == 1
    assert "parse_as differs between prepare_model_dir.py, " in done.stdout
    assert check("--root", tmp_path, "--fix").returncode == 0
    assert drifted.read_text() == (ROOT / "prepare_model_dir.py").read_text()
