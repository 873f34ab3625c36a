# SPDX-License-Identifier: Apache-2.0
"""Machines to compile for; those that are not here in test_estimates.py, where their compilers are."""

import importlib.util

import jax
import pytest

from flaxlm import machines


@pytest.mark.parametrize(
    ("num_chips", "num_dimensions", "sides"),
    [
        (1, 2, [1, 1]), (4, 2, [2, 2]), (8, 2, [2, 4]), (16, 2, [4, 4]), (256, 2, [16, 16]),
        (1, 3, [1, 1, 1]), (2, 3, [2, 1, 1]), (4, 3, [2, 2, 1]), (8, 3, [2, 2, 2]), (16, 3, [2, 2, 4]), (64, 3, [4, 4, 4]),
    ],
)  # fmt: skip
def test_grid_of_chips(num_chips, num_dimensions, sides):
    assert machines.grid(num_chips, num_dimensions) == sides


def test_this_one():
    machine = machines.find("this")
    assert machine.devices == jax.devices()
    assert machine.platform == "cpu"
    assert 2**30 < machine.memory < 2**45
    assert 2**26 < machine.in_use() < machine.memory
    assert not machine.peak_flops


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("v3-7", "--compile_for v3-7: no such size; a power of two, as v3-8 and v3-32"),
        ("v5p-1", "--compile_for v5p-1: no such size"),
        ("v9-8", "--compile_for v9-8: unknown; TPUs: v3-8, v4-8, v5litepod-8, v5p-8, v6e-8 and other sizes; GPUs: a100, h100"),
        ("h100:0", "--compile_for h100:0: no such number of cards; up to 8, or a multiple of that"),
        ("h100:12", "no such number of cards"),
        ("h100:", "unknown"),
        ("", "unknown"),
    ],
)
def test_unknown_ones(name, reason, refuses):
    with refuses(reason):
        machines.find(name)


@pytest.mark.parametrize(("name", "package"), [("v3-8", "libtpu"), ("h100:8", "jax_cuda12_plugin")])
def test_a_compiler_that_is_not_installed_is_named(name, package, refuses, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with refuses(f"--compile_for {name}: needs the compiler, which comes with {package}; pip install"):
        machines.find(name)


@pytest.mark.parametrize(("said", "share"), [("", 0.75), ("0.9", 0.9), ("much", 0.75)])
def test_what_of_a_gpu_jax_takes(said, share, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", said)
    assert machines.share_of_gpu() == share


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("TPU v2", (23, 23)), ("TPU v3", (61.5, 61.5)), ("TPU v4", (275, 275)), ("TPU v5 lite", (197, 197)),
        ("TPU v5", (459, 459)), ("TPU v6 lite", (918, 918)),
        ("NVIDIA A100-SXM4-40GB", (156, 312)), ("NVIDIA A100-SXM4-80GB", (156, 312)), ("NVIDIA A100 80GB PCIe", (156, 312)),
        ("NVIDIA H100 80GB HBM3", (494.5, 989)), ("NVIDIA H100 PCIe", (378, 756)), ("NVIDIA H200", (494.5, 989)),
        ("NVIDIA L4", (60, 121)), ("Tesla T4", (8.1, 8.1)), ("Tesla V100-SXM2-16GB", (15.7, 15.7)),
        ("Tesla V100-PCIE-16GB", (14, 14)),
        ("cpu", None), ("NVIDIA L40S", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("TPU v4 superb", None),
    ],
)  # fmt: skip
def test_peaks(kind, tflops):
    """Of a device as jax names it, in float32 and bfloat16; of a part of a card, or another card of like name, nothing."""
    peaks = machines.peak_flops(kind)
    assert peaks == ({} if tflops is None else dict(zip(("float32", "bfloat16"), [1e12 * t for t in tflops], strict=True)))


@pytest.mark.parametrize(
    ("version", "kind", "num_cores"),
    [
        ("v2", "TPU v2", 1), ("v3", "TPU v3", 1), ("v4i", "TPU v4 lite", 1), ("v4", "TPU v4", 1), ("v4", "TPU v4", 2),
        ("v5e", "TPU v5 lite", 1), ("v5p", "TPU v5", 1), ("v5p", "TPU v5", 2), ("v6e", "TPU v6 lite", 1), ("7x", "TPU7x", 1),
    ],
)  # fmt: skip
def test_peaks_are_those_of_jax(version, kind, num_cores):
    """Whose kernels know their chips, and of v3 another clock; with one or both cores of a chip in a device."""
    from jax.experimental.pallas import tpu

    per_core = tpu.get_tpu_info_for_chip(tpu.ChipVersion(version), num_cores).bf16_ops_per_second
    found = machines.peak_flops(kind, num_cores)["bfloat16"]
    assert found == pytest.approx(per_core * num_cores, rel=0.13 if version == "v3" else 0.01)
