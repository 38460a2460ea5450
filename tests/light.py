"""Programs that a test runs a few times, compiled in a quarter of the time: XLA leaves out most optimizations.

For maths that is compared within a tolerance, and for scripts and pages that must run. Not for promises of equal bits, the hot
path, exports or the form of the compiled program: those test what is shipped, but for programs of a few operations.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax._src import compiler  # JAX has no public way to set options of every program

WANTED = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,  # a module of parts costs a fifth more, and the workers fill the cores
}


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


FEW = 8
"""Operations of a program that is always compiled lightly: one of `jax.numpy` alone, thousands of which are no hot path."""
_open = 0  # blocks of `lightly_compiled`


def install(*, always: bool = False) -> None:
    """From here on this process compiles lightly what is inside `lightly_compiled`, or all, and programs of few operations."""
    global _open
    _open += always
    usual = compiler.compile_or_get_cached
    options()  # compiles, so it comes first

    @functools.wraps(usual)
    def compile_or_get_cached(backend: Any, computation: Any, devices: Any, settings: Any, *rest: Any, **more: Any) -> Any:
        if _open or operations(computation, FEW + 1) <= FEW:
            settings.env_option_overrides = list((options() | dict(settings.env_option_overrides)).items())
        return usual(backend, computation, devices, settings, *rest, **more)

    compiler.compile_or_get_cached = compile_or_get_cached


def operations(module: Any, most: int) -> int:
    """Operations in the functions of a program, those in loops and branches too, counted up to a number."""

    def inside(part: Any) -> Iterator[Any]:
        for region in part.regions:
            for block in region.blocks:
                for each in block.operations:
                    yield each
                    yield from inside(each)

    return sum(1 for _ in itertools.islice((each for part in module.body.operations for each in inside(part)), most))


@contextlib.contextmanager
def lightly_compiled(*, keep: bool = False) -> Iterator[None]:
    """Compiles with `options()`. With `keep` a next block finds the programs, and the caller clears JAX's caches."""
    global _open
    _open += 1
    try:
        yield
    finally:
        _open -= 1
        if not keep:
            jax.clear_caches()  # what other tests share with these is compiled as shipped
