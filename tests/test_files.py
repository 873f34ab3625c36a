# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole."""

import json

import pytest

from flaxlm import files


def test_write_json_is_standard_json(tmp_path):
    """No NaN, no Infinity (defect 35)."""
    files.write_json(str(tmp_path / "a.json"), {"a": float("nan"), "b": float("inf"), "c": 1.5})
    values = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert values == {"a": None, "b": None, "c": 1.5}
