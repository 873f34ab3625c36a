# SPDX-License-Identifier: Apache-2.0
"""Programs over all devices: what lies where, gathering weights that are spread, compiled steps, the state they update."""

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flaxlm import cli, processes

logger = logging.getLogger(__name__)


REPLICATED, PER_ROW, PER_MICRO_BATCH = PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")
SMALL = 2**14  # numbers in an array; a smaller one lies on every device, whatever the flags say


class Devices(NamedTuple):
    """The devices that train together, each with a share of the rows, and of the weights too if they are spread.

    Attributes:
        mesh: all devices in one row, the axis "data".
        spread: weights, gradients and optimizer state are divided among the devices, and a layer's weights are gathered where
            they are used (Zhao et al. 2023, PyTorch FSDP, arXiv:2304.11277).
    """

    mesh: Mesh
    spread: bool = False

    def spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        """Where an array of weights or of their statistics lies: divided along its longest axis that all can share."""
        size = self.mesh.size
        axes = [axis for axis in range(len(shape)) if shape[axis] % size == 0]
        if not (self.spread and size > 1 and axes) or math.prod(shape) < SMALL:
            return REPLICATED
        longest = max(axes, key=lambda axis: shape[axis])
        return PartitionSpec(*[None] * longest, "data")

    def specs(self, tree: Any) -> Any:
        return jax.tree.map(lambda array: self.spec(array.shape), tree)

    def shardings(self, tree: Any) -> Any:
        return jax.tree.map(lambda array: NamedSharding(self.mesh, self.spec(array.shape)), tree)


def all_devices(spread: bool = False) -> Devices:
    """Those of all processes."""
    return Devices(Mesh(np.array(processes.devices()), ("data",)), spread)


def one_device() -> Devices:
    """The first of this process, alone."""
    return Devices(Mesh(np.array(jax.local_devices()[:1]), ("data",)))


# ---- Weights that are spread -----------------------------------------------------------------------------------------------


GATHERED = "gathered weights"  # what a policy of jax.checkpoint calls them


class Part(meta.AxisMetadata, struct.PyTreeNode):
    """A device's part of an array of weights. A model that reads it gets the whole array, gathered from all devices.

    The transpose of gathering is to sum and divide: the gradient of a part is the same part of the gradient, summed over the
    devices.
    """

    array: jax.Array
    axis: int = struct.field(pytree_node=False)

    def unbox(self) -> jax.Array:
        """The whole array; flax calls this where a module reads a weight."""
        return checkpoint_name(jax.lax.all_gather(self.array, "data", axis=self.axis, tiled=True), GATHERED)

    def replace_boxed(self, val: jax.Array) -> "Part":
        return self.replace(array=val)

    def add_axis(self, index: int, params: Any) -> "Part":
        raise NotImplementedError  # flax's own stacks of layers are not used

    remove_axis = add_axis


def whole(tree: Any) -> Any:
    """The same weights with nothing divided."""
    return meta.unbox(tree)


def is_part(node: Any) -> bool:
    return isinstance(node, Part)


def sum_over_devices(tree: Any) -> Any:
    """Sums of what each device has; gradients of divided weights are summed already."""
    others = jax.tree.map(lambda node: None if is_part(node) else node, tree, is_leaf=is_part)
    summed = jax.lax.psum(others, "data")
    return jax.tree.map(lambda node, total: node if is_part(node) else total, tree, summed, is_leaf=is_part)


def on_each_device(function: Callable, devices: Devices, batch_spec: PartitionSpec, gives_gradients: bool = False) -> Callable:
    """function(params, batch, *rest) of whole arrays, computed on each device of its own rows.

    What it returns must be the same on all devices: sums, and behind them the gradients of params if it `gives_gradients`,
    which then lie where params do.
    """

    def run(params: Any, batch: Mapping[str, jax.Array], *rest: Any) -> Any:
        specs = devices.specs(params)

        def run_on_one(params: Any, batch: Mapping[str, jax.Array], *rest: Any) -> Any:
            parts = jax.tree.map(lambda a, spec: Part(a, len(spec) - 1) if len(spec) else a, params, specs)
            results = function(parts, batch, *rest)
            if not gives_gradients:
                return results
            sums, grads = results
            return sums, jax.tree.map(lambda n: n.array if is_part(n) else n, grads, is_leaf=is_part)

        in_specs = (specs, batch_spec, *[REPLICATED] * len(rest))
        out_specs = (REPLICATED, specs) if gives_gradients else REPLICATED
        sharded = jax.shard_map(run_on_one, mesh=devices.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return sharded(params, batch, *rest)

    return run


# ---- State and steps -------------------------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """What an update changes. `step` counts completed updates (int32 scalar)."""

    step: jax.Array
    params: Any
    opt_state: Any


def create_train_state(params: Any, optimizer: optax.GradientTransformation, devices: Devices) -> TrainState:
    """State before the first update; it takes over the buffers of `params`, which training donates."""

    create = functools.partial(first_state, optimizer=optimizer)
    shapes = jax.eval_shape(create, params)
    shardings = devices.shardings(shapes)
    if devices.spread:
        spread, all_of_it = (bytes_per_device(shapes, of) / 2**20 for of in (shardings, None))
        line = "Weights and optimizer state: %.1f MiB on each device instead of %.1f MiB"
        logger.info(line + ("; one device has nobody to share with" if devices.mesh.size == 1 else ""), spread, all_of_it)
    return jax.jit(create, out_shardings=shardings, donate_argnums=0)(params)


def bytes_per_device(tree: Any, shardings: Any = None) -> int:
    """Of arrays, or their shapes, if they lie like that; without `shardings`, if all of them lie on each device."""
    shapes = jax.tree.leaves(tree)
    parts = [s.shape for s in shapes]
    if shardings is not None:
        parts = [of.shard_shape(s.shape) for s, of in zip(shapes, jax.tree.leaves(shardings), strict=True)]
    return sum(math.prod(part) * s.dtype.itemsize for part, s in zip(parts, shapes, strict=True))


def first_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def shapes_of_state(params: Any, optimizer: optax.GradientTransformation, devices: Devices) -> TrainState:
    """The same state without its numbers, from the shapes of weights: what lies where."""
    shapes = jax.eval_shape(functools.partial(first_state, optimizer=optimizer), params)
    place = lambda array, where: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)  # noqa: E731
    return jax.tree.map(place, shapes, devices.shardings(shapes))


class CompiledStep:
    """A step as one program over all devices, compiled once, at its first call if not before; it says so.

    With `gives_state` its first argument is a state whose place the first result takes, wherever its parts lie.
    """

    def __init__(self, name: str, step_fn: Callable, gives_state: bool = False):
        self.name, self.step_fn, self.gives_state, self.compiled = name, step_fn, gives_state, None

    def lower(self, *args) -> jax.stages.Lowered:
        """Trace it for arguments of these shapes and places; they need not exist."""
        if not self.gives_state:
            return jax.jit(self.step_fn).lower(*args)
        shardings = jax.tree.map(lambda array: array.sharding, args[0])
        mesh = jax.tree.leaves(shardings)[0].mesh
        out_shardings = (shardings, NamedSharding(mesh, REPLICATED))
        return jax.jit(self.step_fn, donate_argnums=0, out_shardings=out_shardings).lower(*args)

    def compile(self, *args) -> None:
        """Compile for arguments of these shapes, unless that is done."""
        if self.compiled is not None:
            return
        start = time.monotonic()
        logger.info("Compiling the %s step ...", self.name)
        with self.fitting():
            self.compiled = self.lower(*args).compile()
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
            flags = {
                "training": "--per_device_train_batch_size (more --gradient_accumulation_steps keep the batch)",
                "generation": "--max_new_tokens, or the number of prompts of --generate_samples",
            }
            flag = flags.get(self.name, "--per_device_eval_batch_size")
            cli.fail(
                f"the {self.name} step does not fit into the memory of a device: lower {flag}, or the tokens per row; what else"
                " there is (--gradient_checkpointing, --fsdp, --dtype bfloat16) and what it saves, --compile_for this says"
            )
