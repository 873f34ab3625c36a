# SPDX-License-Identifier: Apache-2.0
"""Machines that a program can be compiled for, be they here or not: their devices, memory and speed."""

import contextlib
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from flaxlm import cli, processes

GIB = 2**30
EXTRA = 'pip install "flaxlm[compile]", or from a clone: pip install ".[compile]"'


class Machine(NamedTuple):
    """Devices that are alike.

    Attributes:
        name: as --compile_for takes it.
        devices: of jax; they need not exist.
        memory: bytes on each that a program can have; None where nobody tells.
        peak_flops: floating-point operations per second and device at most, by the type of activations; empty where unknown.
        compiler_options: what XLA must be told in order to compile for it.
    """

    name: str
    devices: list[jax.Device]
    memory: int | None
    peak_flops: Mapping[str, float]
    compiler_options: Mapping[str, bool] = {}

    @property
    def platform(self) -> str:
        return self.devices[0].platform

    @property
    def kind(self) -> str:
        return self.devices[0].device_kind

    def in_use(self) -> int:
        """Bytes of a device's memory that this program has by now, where they share it."""
        return memory_of_cpu()[1] // len(self.devices) if self.platform == "cpu" else 0

    def mesh(self) -> Mesh:
        return Mesh(np.array(self.devices), ("data",))


# ---- Speed ---------------------------------------------------------------------------------------------------------------

# TFLOP/s of a device in float32 and in bfloat16, without sparsity, by what jax calls it or by what that begins with. XLA
# makes float32 products of bfloat16 ones on a TPU, of TF32 on a card that has it; the last three compute bfloat16 in float32.
PEAKS = {
    "TPU v2": (23, 23), "TPU v3": (61.5, 61.5),  # devices are cores, as are those of TPU7x
    "TPU v4": (275, 275), "TPU v4 lite": (137, 137),
    "TPU v5 lite": (197, 197), "TPU v5e": (197, 197), "TPU v5": (459, 459), "TPU v5p": (459, 459),
    "TPU v6 lite": (918, 918), "TPU v6e": (918, 918), "TPU7x": (1153.5, 1153.5),
    "NVIDIA A100": (156, 312), "NVIDIA L4": (60, 121),
    "NVIDIA H100": (494.5, 989), "NVIDIA H100 PCIe": (378, 756), "NVIDIA H100 NVL": (417.5, 835),
    "NVIDIA H200": (494.5, 989), "NVIDIA H200 NVL": (417.5, 835), "NVIDIA GH200": (494.5, 989),
    "Tesla T4": (8.1, 8.1), "Tesla V100": (15.7, 15.7), "Tesla V100-PCIE": (14, 14),
}  # fmt: skip


def peak_flops(kind: str, num_cores: int | None = None) -> dict[str, float]:
    """Floating-point operations per second of such a device at most, by the type of activations; {} if that is not known.

    `num_cores` of a TPU tells whether both cores of a chip are one device, as jax makes them of v4 and v5p.
    """
    known = [name for name in PEAKS if kind == name or (kind.startswith((f"{name} ", f"{name}-")) and "TPU" not in kind)]
    if not known or " MIG " in kind:  # a part of a card
        return {}
    share = 0.5 if num_cores == 1 and kind in ("TPU v4", "TPU v5", "TPU v5p") else 1.0
    in_float32, in_bfloat16 = PEAKS[max(known, key=len)]
    return {"float32": share * in_float32 * 1e12, "bfloat16": share * in_bfloat16 * 1e12}


# ---- TPUs ----------------------------------------------------------------------------------------------------------------


class Tpu(NamedTuple):
    """A generation. Google counts cores in the names of some (two on a chip), chips in those of others."""

    topology: str  # what libtpu calls it
    counted_per_chip: int
    num_dimensions: int  # of the grid of chips
    gib: float  # of a device that XLA lets a program have, as it says where one has too little
    kind: str
    options: Mapping[str, str] = {}


MEGACORE = {"chip_config_name": "megacore"}  # the cores of a chip are one device
TPUS = {
    "v3": Tpu("v3", 2, 2, 15.48, "TPU v3"),
    "v4": Tpu("v4", 2, 3, 30.75, "TPU v4", MEGACORE),
    "v5litepod": Tpu("v5e", 1, 2, 15.75, "TPU v5 lite"),
    "v5p": Tpu("v5p", 2, 3, 95.73, "TPU v5"),
    "v6e": Tpu("v6e", 1, 2, 31.24, "TPU v6 lite"),
}


def grid(num_chips: int, num_dimensions: int) -> list[int]:
    """Sides of the most compact grid of chips, a power of two each, shortest first."""
    sides, power = [1] * num_dimensions, num_chips.bit_length() - 1
    for i in range(power):
        sides[-1 - i % num_dimensions] *= 2
    return sides if num_dimensions == 2 or num_chips > 4 else sides[::-1]


def find_tpu(generation: str, size: int) -> Machine:
    name, tpu = f"{generation}-{size}", TPUS[generation]
    num_chips = size // tpu.counted_per_chip
    if size % tpu.counted_per_chip or num_chips < 1 or num_chips & (num_chips - 1):
        cli.fail(f"--compile_for {name}: no such size; a power of two, as {generation}-8 and {generation}-32")
    need("libtpu", name)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", name)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another program may be compiling too
    topology = f"{tpu.topology}:{'x'.join(map(str, grid(num_chips, tpu.num_dimensions)))}"
    devices = describe(name, platform="tpu", topology_name=topology, **tpu.options)
    return Machine(name, devices, int(tpu.gib * GIB), peak_flops(tpu.kind))


# ---- GPUs ----------------------------------------------------------------------------------------------------------------


class Gpu(NamedTuple):
    """A card, as XLA asks about it."""

    kind: str
    capability: str
    num_cores: int
    fpus_per_core: int
    clock_ghz: float
    memory: int
    bandwidth: float  # bytes per second
    l2_cache: int
    shared_memory: int  # bytes of a core


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", "major: 8", 108, 64, 1.41, 84_974_239_744, 2.039e12, 41_943_040, 167_936),
    "h100": Gpu("NVIDIA H100 80GB HBM3", "major: 9", 132, 128, 1.98, 84_978_434_048, 3.352e12, 52_428_800, 233_472),
    "h200": Gpu("NVIDIA H200", "major: 9", 132, 128, 1.98, 150_110_011_392, 4.8e12, 52_428_800, 233_472),
}
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared_memory} shared_memory_per_block_optin: {optin}
  core_count: {num_cores} fpus_per_core: {fpus_per_core} clock_rate_ghz: {clock_ghz}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f} l2_cache_size: {l2_cache} device_memory_size: {memory}
  cuda_compute_capability {{ {capability} }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 3 }}
device_description_str: "{kind}"
"""
CARDS_PER_HOST = 8


def find_gpu(card: str, num_cards: int) -> Machine:
    name, gpu = f"{card}:{num_cards}", GPUS[card]
    num_hosts = -(-num_cards // CARDS_PER_HOST)
    if num_cards < 1 or (num_hosts > 1 and num_cards % CARDS_PER_HOST):
        cli.fail(f"--compile_for {name}: no such number of cards; up to {CARDS_PER_HOST}, or a multiple of that")
    need("jax_cuda12_plugin", name)
    config = TARGET.format(optin=gpu.shared_memory - 1024, **gpu._asdict())
    shape = f"1x{num_hosts}x{num_cards // num_hosts}"
    devices = describe(name, platform="cuda", topology_name=card, topology=shape, target_config=config)
    memory = int(gpu.memory * share_of_gpu())
    # XLA finds the tiles of Triton's products by trying them on a card, and some shapes have no others.
    options = {"xla_gpu_enable_triton_gemm": False}
    return Machine(name, devices, memory, peak_flops(gpu.kind), compiler_options=options)


def share_of_gpu() -> float:
    """How much of a card's memory jax takes: three quarters unless told otherwise."""
    with contextlib.suppress(ValueError):
        return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", ""))
    return 0.75


# ---- Any -----------------------------------------------------------------------------------------------------------------


def find(name: str) -> Machine:
    """The machine that --compile_for names."""
    if name == "this":
        return this()
    if (match := re.fullmatch(r"(\w+)-(\d+)", name)) and match[1] in TPUS:
        return find_tpu(match[1], int(match[2]))
    if (match := re.fullmatch(r"(\w+)(?::(\d+))?", name)) and match[1] in GPUS:
        return find_gpu(match[1], int(match[2] or 1))
    tpus, gpus = ", ".join(f"{name}-8" for name in TPUS), ", ".join(GPUS)
    cli.fail(f"--compile_for {name}: unknown; TPUs: {tpus} and other sizes; GPUs: {gpus}, :8 for eight; this: the one here")


def this() -> Machine:
    """The one at hand, with what is known of it."""
    devices = processes.devices()
    kind, stats = devices[0].device_kind, jax.local_devices()[0].memory_stats() or {}  # those of others don't tell
    if devices[0].platform == "cpu":
        memory, _ = memory_of_cpu()
        return Machine("this", devices, memory and memory // len(devices), {})
    return Machine("this", devices, stats.get("bytes_limit"), peak_flops(kind, getattr(devices[0], "num_cores", None)))


class Memory(NamedTuple):
    """Bytes."""

    used: int
    limit: int


def memory_in_use() -> Memory | None:
    """What the fullest device of this process had in use at most so far; on a CPU what the process holds now.

    None where nobody tells. No device is waited for.
    """
    if jax.default_backend() == "cpu":
        limit, used = memory_of_cpu()
        return Memory(used, limit) if limit else None
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    found = [Memory(s["peak_bytes_in_use"], s["bytes_limit"]) for s in told if {"peak_bytes_in_use", "bytes_limit"} <= s.keys()]
    return max(found, default=None)


def memory_of_cpu() -> tuple[int | None, int]:
    """Bytes that the machine has, and that this process holds of them; where the system does not tell, None and 0."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError, ValueError):
        return None, 0


def need(package: str, name: str) -> None:
    """Refuse a machine whose compiler is not installed."""
    if not importlib.util.find_spec(package):
        cli.fail(f"--compile_for {name}: needs the compiler, which comes with {package}; {EXTRA}")


def describe(name: str, **options: str) -> list[jax.Device]:
    """The devices of a machine that is not here."""
    jax.devices()  # so that plugins are found
    try:
        return list(topologies.get_topology_desc(**options).devices)
    except Exception as error:  # whatever the compilers make of it
        cli.fail(f"--compile_for {name}: {cli.first_line(error)}")
