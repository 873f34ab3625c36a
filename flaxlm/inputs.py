# SPDX-License-Identifier: Apache-2.0
"""Which files a flag names: several, patterns, directories, addresses. One after the other, in the order of the flag."""

import glob
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flaxlm import addresses, cli, formats


class Found(NamedTuple):
    """The files that a flag names, all of one format, each once."""

    paths: list[str]
    num_ignored: int  # files in directories, or of patterns, that are of no format of ours
    repeated: list[str]  # named twice


def as_list(names: str | Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def shown(names: str | Sequence[str] | None) -> str:
    """Names as they were typed, a few of them, for messages."""
    words = [addresses.shown(name) for name in as_list(names)]
    return " ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def find(names: str | Sequence[str], flag: str, token: str | None = None) -> Found:
    """All files that are named: patterns and directories by path. Whatever cannot be read ends the program with a line."""
    paths: dict[str, str] = {}  # by what tells that two are the same
    num_ignored, repeated = 0, []
    for name in as_list(names):
        found, ignored = find_address(name, flag, token) if addresses.is_address(name) else find_local(name, flag)
        num_ignored += ignored
        for path in found:
            known = path if addresses.is_address(path) else os.path.realpath(path)
            if known in paths:
                repeated.append(path)
            paths.setdefault(known, path)
    check_one_format(list(paths.values()), flag)
    return Found(list(paths.values()), num_ignored, repeated)


def find_local(name: str, flag: str) -> tuple[list[str], int]:
    """The files that one local name stands for, and how many others lie there."""
    if not os.path.lexists(name) and name.startswith("~"):
        name = os.path.expanduser(name)
    if os.path.isdir(name):
        if is_saved_to_disk(name):
            cli.fail(f"{flag} {name}: was written by save_to_disk; read it with --dataset_name")
        return of_our_formats(sorted(walk(name)), f"{flag} {name}", "in it")
    if is_pattern(name) and not os.path.lexists(name):
        matches = sorted(path for path in glob.glob(name, recursive=True) if not os.path.isdir(path))
        return of_our_formats(matches, f"{flag} {name}", "of that name")
    check_suffix(name, flag)
    if not os.path.isfile(name):
        cli.fail(f"{flag} {name}: no such file")
    check_size(name, flag)
    return [name], 0


def is_pattern(name: str) -> bool:
    return any(character in name for character in "*?[")


def walk(directory: str) -> Iterator[str]:
    """All files below a directory that are not hidden, links followed."""
    visited = set()
    for parent, directories, names in os.walk(directory, followlinks=True):
        if os.path.realpath(parent) in visited:  # a link that goes in a circle
            directories.clear()
            continue
        visited.add(os.path.realpath(parent))
        directories[:] = [name for name in directories if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in names if not name.startswith("."))


def of_our_formats(paths: Sequence[str], what: str, where: str) -> tuple[list[str], int]:
    """Those of a list that can be read, none of them empty, and how many cannot."""
    ours = [path for path in paths if formats.loader_of(path)]
    if not ours:
        others = f", only {len(paths)} other(s) as {paths[0]}" if paths else ""
        cli.fail(f"{what}: there is no {', '.join(formats.DATA_LOADERS)} file {where}{others}")
    for path in ours:
        if not addresses.is_address(path):
            check_size(path, what.partition(" ")[0])
    return ours, len(paths) - len(ours)


def find_address(name: str, flag: str, token: str | None) -> tuple[list[str], int]:
    """The same of an address. Lists are for file systems that list: on the web there are single files."""
    if addresses.is_of_web(name):
        check_suffix(name, flag)
    with addresses.told_of(flag, name):
        found = addresses.find(name, flag, token)
    if found.is_list:
        ours = of_our_formats(found.names, f"{flag} {addresses.shown(name)}", "there")
    else:
        check_suffix(name, flag)
        ours = found.names, 0
    for path, size in zip(found.names, found.sizes, strict=True):
        if size == 0 and path in ours[0]:
            cli.fail(f"{flag} {addresses.shown(path)}: is empty")
    return ours


def check_suffix(name: str, flag: str) -> None:
    if formats.loader_of(name) is None:
        known = ", ".join(formats.DATA_LOADERS)
        cli.fail(f"{flag} {addresses.shown(name)}: unknown suffix; use {known}, or one of these with .gz, .bz2 or .xz")


def check_size(path: str, flag: str) -> None:
    if not os.path.exists(path):
        cli.fail(f"{flag} {path}: is a link to a file that is not there; remove one or restore the other")
    if os.path.getsize(path) == 0:
        cli.fail(f"{flag} {path}: is empty")


def check_one_format(paths: Sequence[str], flag: str) -> None:
    """Files are read one after the other into the same columns."""
    examples: dict[str, str] = {}
    for path in paths:
        suffix = formats.suffixes(path)[0]
        examples.setdefault("tsv" if suffix == "tsv" else formats.DATA_LOADERS[suffix], addresses.shown(path))
    if len(examples) > 1:
        cli.fail(f"{flag}: names files of several formats, as {' and '.join(examples.values())}; name those of one format")


def is_saved_to_disk(name: str) -> bool:
    """Is it a directory that Dataset.save_to_disk or DatasetDict.save_to_disk wrote?"""
    return any(os.path.isfile(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json"))
