#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make a corpus of real English that every Python brings along: the documentation strings of the standard library.

    python quickstart/python_docs_corpus.py --output_dir corpus

Writes `train.txt` and `validation.txt`, one paragraph per line and none twice (CPython 3.11: about 18,000 paragraphs, 2 MB).
A paragraph goes to one of them by a checksum of its text, so both stay the same from run to run. Nothing is downloaded.
With --documents the paragraphs of a module stay together, a blank line divides modules, and a module goes to one of them.
"""

import argparse
import ast
import itertools
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

HELD_OUT_PERCENT = 5  # of paragraphs; of documents, whose sizes differ, twice that


def standard_library_files() -> list[Path]:
    """All Python sources of the running interpreter, packages installed later left out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    return [path for path in files if "site-packages" not in path.parts]


def paragraphs(files: Iterable[Path]) -> Iterator[str]:
    """The paragraphs of all documents, in order."""
    return itertools.chain.from_iterable(documents(files))


def documents(files: Iterable[Path]) -> Iterator[list[str]]:
    """The paragraphs of each file's documentation strings, white space folded, none below 30 characters or met before."""
    seen = set()
    for path in files:
        try:
            with warnings.catch_warnings(action="ignore"):  # some test sources hold invalid escapes on purpose
                tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, ValueError, RecursionError):
            continue
        found = []
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                paragraph = " ".join(paragraph.split())
                if len(paragraph) > 30 and paragraph not in seen:
                    seen.add(paragraph)
                    found.append(paragraph)
        if found:
            yield found


def is_held_out(text: str, percent: int) -> bool:
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % 100 < percent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="directory for train.txt and validation.txt")
    parser.add_argument("--documents", action="store_true", help="keep modules together, a blank line between two")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    found = documents(tqdm(standard_library_files(), desc="Reading the standard library", unit="file"))
    for text in map("\n".join, found) if args.documents else itertools.chain.from_iterable(found):
        splits["validation" if is_held_out(text, HELD_OUT_PERCENT * (1 + args.documents)) else "train"].append(text)
    for split, texts in splits.items():
        path = args.output_dir / f"{split}.txt"
        path.write_text(("\n\n" if args.documents else "\n").join(texts) + "\n", "utf-8", errors="replace")
        kind = "documents" if args.documents else "paragraphs"
        print(f"{path}: {len(texts):,} {kind}, {sum(map(len, texts)) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
