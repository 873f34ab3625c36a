#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make a corpus of real English that every Python brings along: the documentation strings of the standard library.

    python quickstart/python_docs_corpus.py --output_dir corpus

Writes `train.txt` and `validation.txt`, one paragraph per line and none twice (CPython 3.11: about 18,000 paragraphs, 2 MB).
A paragraph goes to one of them by a checksum of its text, so both stay the same from run to run. Nothing is downloaded.
"""

import argparse
import ast
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

HELD_OUT_PERCENT = 5


def standard_library_files() -> list[Path]:
    """All Python sources of the running interpreter, packages installed later left out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    return [path for path in files if "site-packages" not in path.parts]


def paragraphs(files: Iterable[Path]) -> Iterator[str]:
    """The paragraphs of all documentation strings, white space folded, none shorter than 30 characters or met before."""
    seen = set()
    for path in files:
        try:
            with warnings.catch_warnings(action="ignore"):  # some test sources hold invalid escapes on purpose
                tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, ValueError, RecursionError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                paragraph = " ".join(paragraph.split())
                if len(paragraph) > 30 and paragraph not in seen:
                    seen.add(paragraph)
                    yield paragraph


def is_held_out(paragraph: str) -> bool:
    return zlib.crc32(paragraph.encode("utf-8", "surrogatepass")) % 100 < HELD_OUT_PERCENT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="directory for train.txt and validation.txt")
    output_dir = parser.parse_args().output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for paragraph in paragraphs(tqdm(standard_library_files(), desc="Reading the standard library", unit="file")):
        splits["validation" if is_held_out(paragraph) else "train"].append(paragraph)
    for split, lines in splits.items():
        path = output_dir / f"{split}.txt"
        path.write_text("\n".join(lines) + "\n", "utf-8", errors="replace")
        print(f"{path}: {len(lines):,} paragraphs, {sum(map(len, lines)) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
