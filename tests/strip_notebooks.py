#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Strip notebooks of what running them leaves, so that a diff shows what somebody wrote.

    python tests/strip_notebooks.py

Outputs, counts and metadata go; the file is written as Jupyter writes it, so that saving it there changes nothing else.
"""

import json
from pathlib import Path

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def stripped(text: str) -> str:
    """The same notebook without outputs, one line of source in a line of the file."""
    notebook = json.loads(text)
    cells = []
    for cell in notebook["cells"]:
        lines = "".join(cell["source"]).rstrip("\n").splitlines(keepends=True)
        kept = {"cell_type": cell["cell_type"], "id": cell["id"], "metadata": {}, "source": lines}
        cells.append(kept | ({"execution_count": None, "outputs": []} if cell["cell_type"] == "code" else {}))
    clean = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(clean, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main() -> None:
    for path in NOTEBOOKS:
        text = path.read_text("utf-8")
        if text != stripped(text):
            path.write_text(stripped(text), "utf-8")
            print(f"stripped {path}")


if __name__ == "__main__":
    main()
