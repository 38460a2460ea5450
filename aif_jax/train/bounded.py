"""How many requests and items one run of a compiled function may have, so that none of its arrays is larger than a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

ARRAY = 1 << 26
"""Bytes of the largest array that a program of evaluation makes or takes from the host: 64 MiB."""


def widest(function: Callable[..., Any], *args: Any) -> int:
    """Bytes of the largest array that a function takes or makes, inner results included, from the shapes of its arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> widest(lambda x: (x[:, None] * x[None, :]).sum(), jnp.zeros(100))  # the product is float32 [100, 100]
      40000
    """
    return max(map(_bytes, _arrays(jax.make_jaxpr(function)(*args).jaxpr)), default=0)


def fitting(most: int, width_of: Callable[[int], int]) -> int:
    """The largest size up to `most` found whose `width_of` bytes are within `ARRAY`; 1 where even one is too many.

    Arrays that do not grow with the size do not count: a smaller size would not make them smaller.
    """
    size, width = most, width_of(most)
    while width > ARRAY and size > 1:
        fewer = max(1, min(size - 1, size * ARRAY // width))
        if (less := width_of(fewer)) == width:
            return size
        size, width = fewer, less
    return size


def like(tree: Any, size: int) -> Any:
    """The shapes of arrays [n, ...] as [size, ...]."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), tree)


def _arrays(jaxpr: Any) -> Iterator[Any]:
    """Arguments and results of every operation, in inner functions too."""
    yield from jaxpr.invars
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _arrays(inner)


def _bytes(variable: Any) -> int:
    shape, dtype = getattr(variable.aval, "shape", ()), getattr(variable.aval, "dtype", None)
    return math.prod(shape) * getattr(dtype, "itemsize", 8)
