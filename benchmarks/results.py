#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Take all figures of README.md and benchmarks/RESULTS.md anew, in one go, and write them into the pages.

    python benchmarks/results.py                          # all that can be measured here; an hour on 2 cores
    python benchmarks/results.py --only throughput        # a group of sections, or one: throughput/clm
    python benchmarks/results.py --tables                 # measure nothing: the pages from benchmarks/results.json
    python benchmarks/results.py --check                  # do the pages say what is in benchmarks/results.json?
    python benchmarks/results.py --quick                  # does all of it work? A minute or two a section, other files

Figures are kept in benchmarks/results.json with date, commit, processor and versions of each section; between marks in the
pages stands what is made of them (benchmarks/tables.py), and docs/images/quickstarts.png is drawn of the curves. All of them
are written after each section, so that a run that is stopped loses one. A section that fails leaves the older figures.
Exit status: 0; 1 if a section failed or --check finds a difference; 2 if it cannot begin.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import curves, machine, tables
from benchmarks.sections import GROUPS, SECTIONS, FailedError, Runner

RESULTS = "benchmarks/results.json"
PAGES = ("README.md", "benchmarks/RESULTS.md")
WRITTEN = (RESULTS, *PAGES, curves.PATH)
KEPT = ("device", "cpu", "simd", "cores", "memory_gib", "load_average", "versions", "date", "git_commit", "is_clean")


def read_results(root: Path) -> dict[str, Any]:
    try:
        return json.loads((root / RESULTS).read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        fail(f"{root / RESULTS}: is not JSON ({error}); restore it, or delete it and measure all anew")


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, "utf-8")
    partial.replace(path)


def rounded(value: Any) -> Any:
    """Five digits say more than any of this is exact to."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def as_json(value: Any, depth: int = 0) -> str:
    """Indented, but in a line what fits into one, and points of curves."""
    line, pad = json.dumps(value, ensure_ascii=False), " " * (depth + 1)
    is_points = isinstance(value, list) and all(isinstance(item, int | float | list) for item in value)
    if not isinstance(value, dict | list) or is_points or (len(line) + depth < 120 and depth > 1):
        return line
    if isinstance(value, dict):
        items = [f"{pad}{json.dumps(key)}: {as_json(item, depth + 1)}" for key, item in value.items()]
    else:
        items = [f"{pad}{as_json(item, depth + 1)}" for item in value]
    begin, end = "{}" if isinstance(value, dict) else "[]"
    return f"{begin}\n" + ",\n".join(items) + f"\n{' ' * depth}{end}" if items else line


def ordered(results: dict[str, Any]) -> dict[str, Any]:
    """Sections in the order in which they are measured, and then the rest."""
    return {name: results[name] for name in [*SECTIONS, *results] if name in results}


def publish(results: dict[str, Any], root: Path) -> list[str]:
    """Write the pages and the picture of these results under a directory; names of those that changed."""
    changed = []
    drawn = curves.curves_of(results)
    if drawn and curves.drawn_checksum(root / curves.PATH) != curves.checksum(drawn):
        curves.draw(drawn, root / curves.PATH)
        changed.append(curves.PATH)
    for name in PAGES:
        old = (root / name).read_text("utf-8")
        new = tables.fill(old, results)
        if new != old:
            write(root / name, new)
            changed.append(name)
    return changed


def differences(root: Path) -> list[str]:
    """What in the pages and the picture is not what the results make, a line each."""
    results, found = read_results(root), []
    for name in PAGES:
        page = (root / name).read_text("utf-8")
        for old, new in zip(tables.MARK.finditer(page), tables.MARK.finditer(tables.fill(page, results)), strict=True):
            if old[0] != new[0]:
                line = page[: old.start()].count("\n") + 1
                found.append(f"{name}, line {line}: `{old[2]}` is not what {RESULTS} says")
    drawn = curves.curves_of(results)
    if drawn and curves.drawn_checksum(root / curves.PATH) != curves.checksum(drawn):
        found.append(f"{curves.PATH}: is not of the curves in {RESULTS}")
    return found


def chosen_sections(only: list[str] | None) -> list[str]:
    """Names of sections; without --only those that can be measured here, the others being said."""
    if only:
        unknown = [name for name in only if name not in SECTIONS and name not in GROUPS]
        if unknown:
            fail(f"--only {unknown[0]}: there is no such section; known are {', '.join([*GROUPS, *SECTIONS])}")
        names = [name for name in SECTIONS if name in only or name.partition("/")[0] in only]
        for name in names:
            if reason := SECTIONS[name].missing():
                fail(f"--only {name}: {reason}")
        return names
    names = []
    for name, section in SECTIONS.items():
        if reason := section.missing():
            print(f"Left out: {name}: {reason}", file=sys.stderr)
        else:
            names.append(name)
    return names


def fail(line: str) -> None:
    print(f"{Path(__file__).name}: error: {line}", file=sys.stderr)
    raise SystemExit(2)


def measure(names: list[str], runner: Runner, root: Path) -> list[str]:
    """Measure sections one after the other, and write after each; names of those that failed."""
    failed, minutes = [], sum(SECTIONS[name].minutes for name in names)
    about = "" if runner.quick else f", about {minutes:.0f} minutes"
    print(f"{len(names)} sections{about}; logs: {os.path.relpath(runner.directory / 'logs')}", file=sys.stderr)
    for i, name in enumerate(names, 1):
        print(f"[{i} of {len(names)}] {name}", file=sys.stderr, flush=True)
        environment, started = machine.environment(WRITTEN), time.monotonic()
        try:
            figures = SECTIONS[name].measure(runner)
        except Exception as error:
            reason = error if isinstance(error, FailedError) else f"{type(error).__name__}: {error}"
            print(f"[{i} of {len(names)}] {name} failed: {reason}", file=sys.stderr, flush=True)
            failed.append(name)
            continue
        kept = {key: environment[key] for key in KEPT} | {"seconds": time.monotonic() - started}
        results = read_results(root)  # somebody may have measured another section meanwhile
        results[name] = rounded({"environment": kept} | figures)
        write(root / RESULTS, as_json(ordered(results)) + "\n")
        publish(results, root)
        print(f"[{i} of {len(names)}] {name}: {tables.clock(kept['seconds'])}", file=sys.stderr, flush=True)
    return failed


def copy_pages(to: Path) -> None:
    """The pages as they are, and no results: what --quick writes into."""
    for name in PAGES:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(machine.ROOT / name, to / name)
    (to / RESULTS).unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=f"sections: {', '.join(SECTIONS)}", allow_abbrev=False
    )
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these sections, or groups of them")
    parser.add_argument("--quick", action="store_true", help="a few steps of each, written into --output_dir alone")
    parser.add_argument("--output_dir", type=Path, help="what --quick writes; default: quickstart/build/quick-results")
    parser.add_argument("--tables", action="store_true", help="measure nothing: pages and picture of the results that are kept")
    parser.add_argument("--check", action="store_true", help="measure nothing: are pages and picture those of the results?")
    args = parser.parse_args()
    if args.output_dir and not args.quick:
        fail("--output_dir: goes with --quick; the results of all else stand in the checkout")
    if sum((args.quick, args.tables, args.check)) > 1 or (args.only and (args.tables or args.check)):
        fail("--quick, --tables and --check exclude each other, and --only goes with measuring")
    if args.check:
        if found := differences(machine.ROOT):
            print("\n".join([*found, "Set it right with: python benchmarks/results.py --tables"]), file=sys.stderr)
        raise SystemExit(bool(found))
    if args.tables:
        print("\n".join(publish(read_results(machine.ROOT), machine.ROOT)) or "Nothing to change.")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is running is stopped, too
    names = chosen_sections(args.only)
    root, directory = machine.ROOT, machine.ROOT / "quickstart/build/results"
    if args.quick:
        root = (args.output_dir or machine.ROOT / "quickstart/build/quick-results").resolve()
        directory = root / "runs"
        copy_pages(root)
    failed = measure(names, Runner(directory, args.quick), root)
    if failed:
        print(f"Failed, with the figures left that were there: {', '.join(failed)}", file=sys.stderr)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
