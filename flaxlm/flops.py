# SPDX-License-Identifier: Apache-2.0
"""How much arithmetic a function is: the products of matrices in it, which is where nearly all of a model's work is."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count(function: Callable, *args: Any) -> float:
    """Floating-point operations of function(*args) in products of matrices, two for each multiplication and addition.

    The arguments need only shapes. Loops count as often as they run, of branches the larger one; a loop that decides itself
    when to end counts once, for there are none in a training step. Compilers don't tell this: they count a loop once.
    """
    return count_in(jax.make_jaxpr(function)(*args).jaxpr)


def count_in(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += of_product(equation)
            continue
        inner = [count_in(part) for value in equation.params.values() for part in programs_in(value)]
        if equation.primitive.name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total


def of_product(equation: core.JaxprEqn) -> float:
    """2 x the numbers in the result x the length of what is summed over."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def programs_in(value: Any) -> list[core.Jaxpr]:
    """The programs that a parameter of an operation holds: the body of a loop, branches, what is differentiated."""
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    return [part for item in value for part in programs_in(item)] if isinstance(value, tuple | list) else []
