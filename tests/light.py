"""Programs that a test runs a few times, compiled in a quarter of the time: XLA leaves out most optimizations.

For maths that is compared within a tolerance, and for scripts and pages that must run. Not for promises of equal bits, the hot
path, exports or the form of the compiled program: those test what is shipped.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src import compiler  # JAX has no public way to set options of every program

WANTED = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


@functools.cache
def options() -> dict[str, Any]:
    """For `jax.stages.Lowered.compile`: those of WANTED that this XLA has, since options come and go with its versions."""
    lowered = jax.jit(lambda x: x).lower(jax.ShapeDtypeStruct((), np.float32))

    def known(name: str) -> bool:
        try:
            lowered.compile({name: WANTED[name]})
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            return False
        return True

    return {name: value for name, value in WANTED.items() if known(name)}


def flags() -> str:
    """The same for XLA_FLAGS of another process, which XLA ends where it does not know one."""
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options().items())


@contextlib.contextmanager
def lightly_compiled(*, keep: bool = False) -> Iterator[None]:
    """What is compiled inside is compiled with `options()`.

    Args:
      keep: leave the programs for a next block; the caller clears JAX's caches before a test of what is shipped.
    """
    usual, few = compiler.get_compile_options, options()

    @functools.wraps(usual)
    def light(*arguments: Any, env_options_overrides: dict[str, Any] | None = None, **more: Any) -> Any:
        return usual(*arguments, env_options_overrides=few | (env_options_overrides or {}), **more)

    try:
        with mock.patch.object(compiler, "get_compile_options", light):
            yield
    finally:
        if not keep:
            jax.clear_caches()  # what other tests share with these is compiled as shipped
