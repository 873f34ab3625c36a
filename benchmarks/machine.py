# SPDX-License-Identifier: Apache-2.0
"""The machine that figures hold for: its name, its peak, and how much memory a process has taken."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parent.parent


def resident_bytes(what: str) -> int | None:
    """VmRSS or VmHWM of this process; None where the system does not tell."""
    try:
        return 1024 * int(re.search(rf"{what}:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    except OSError:
        return None


def forget_peak() -> None:
    """Let VmHWM start from what is resident now: making the model and compiling it don't count."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def cpu_name() -> str:
    try:
        return re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def simd() -> str | None:
    """The widest vector instructions of an x86 processor; what XLA and PyTorch multiply with depends on them."""
    try:
        flags = set(re.search(r"flags\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[1].split())
    except (OSError, TypeError):
        return None
    return next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), None)


def memory_gib() -> float | None:
    """Of the machine, in units of 2^30 bytes; None where the system does not tell."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def git(*argv: str) -> str | None:
    """What git says of this checkout; None where there is no git, or no checkout."""
    try:
        done = subprocess.run(["git", "-C", ROOT, *argv], capture_output=True, text=True)
    except OSError:
        return None
    return None if done.returncode else done.stdout.strip()


def is_clean(written: Iterable[str] = ()) -> bool | None:
    """Are the files that git knows as they were committed, those left out that the asking program writes itself?"""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":(exclude){path}" for path in written))
    return None if changed is None else not changed


def installed_versions() -> dict[str, str]:
    """Of Python and the libraries that figures depend on, compilers for other machines among them."""
    names = ("jax", "flax", "optax", "transformers", "torch", "numpy", "libtpu", "jax-cuda12-plugin")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def environment(written: Iterable[str] = ()) -> dict[str, Any]:
    """What the figures hold for. Changes in the files `written`, relative to the checkout, don't count as such."""
    return {
        "device": jax.devices()[0].device_kind,
        "cpu": cpu_name(),
        "simd": simd(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": memory_gib(),
        "load_average": os.getloadavg()[0],
        "versions": installed_versions(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": git("rev-parse", "HEAD"),
        "is_clean": is_clean(written),
        "command": " ".join(sys.argv),
    }
