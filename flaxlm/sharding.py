# SPDX-License-Identifier: Apache-2.0
"""Programs over all devices: the mesh, what lies where, compiled steps, and the state that they update."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxlm import cli, processes

logger = logging.getLogger(__name__)


REPLICATED, PER_ROW, PER_MICRO_BATCH = PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")


def make_mesh() -> Mesh:
    """All devices of all processes in one row: each holds all weights and a share of the data."""
    return Mesh(np.array(processes.devices()), ("data",))


class TrainState(NamedTuple):
    """What an update changes; the same on every device. `step` counts completed updates (int32 scalar)."""

    step: jax.Array
    params: Any
    opt_state: Any


def create_train_state(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """State before the first update, on every device; it takes over the buffers of `params`, which training donates."""

    def create(params):
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(create, out_shardings=NamedSharding(mesh, REPLICATED), donate_argnums=0)(params)


class CompiledStep:
    """A step as one program over all devices of the mesh, compiled once, at its first call if not before; it says so."""

    def __init__(self, name: str, step_fn: Callable, mesh: Mesh, in_specs: tuple, donate_argnums: tuple = ()):
        sharded = jax.shard_map(step_fn, mesh=mesh, in_specs=in_specs, out_specs=REPLICATED, check_vma=False)
        self.name, self.jitted, self.compiled = name, jax.jit(sharded, donate_argnums=donate_argnums), None

    def compile(self, *args) -> None:
        """Compile for arguments of these shapes, unless that is done."""
        if self.compiled is not None:
            return
        start = time.monotonic()
        logger.info("Compiling the %s step ...", self.name)
        with self.fitting():
            self.compiled = self.jitted.lower(*args).compile()
        logger.info("Compiled the %s step in %.1f s", self.name, time.monotonic() - start)

    def __call__(self, *args):
        self.compile(*args)
        with self.fitting():
            return self.compiled(*args)

    @contextlib.contextmanager
    def fitting(self) -> Iterator[None]:
        """Too little memory is told with the flags that change it."""
        try:
            yield
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and not isinstance(error, MemoryError):
                raise
            flags = {"training": "--per_device_train_batch_size (more --gradient_accumulation_steps keep the batch)"}
            flag = flags.get(self.name, "--per_device_eval_batch_size")
            cli.fail(f"the {self.name} step does not fit into the memory of a device: lower {flag}, or the tokens per row")


def compile_train_step(step_fn: Callable, mesh: Mesh) -> CompiledStep:
    """step_fn(state, batch [A, ...], dropout_rng) over all devices; the new state takes the place of the old one."""
    return CompiledStep("training", step_fn, mesh, (REPLICATED, PER_MICRO_BATCH, REPLICATED), donate_argnums=(0,))


def compile_eval_step(step_fn: Callable, mesh: Mesh) -> CompiledStep:
    """step_fn(params, batch) over all devices."""
    return CompiledStep("evaluation", step_fn, mesh, (REPLICATED, PER_ROW))
