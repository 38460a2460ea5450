"""What the processes of one job (`jax.distributed`) tell each other, so that none waits for one that has failed.

A process that raises alone leaves the others waiting in a collective. So whatever one process may find out alone, a corrupt
record, a full disk, is told to all before the next collective: `together` for a call, `train.step` for batches. All calls here
but `end_at_once` are collectives: every process makes them in the same order, from the thread that runs the steps.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from aif_jax.sharding.meshes import replicated, row_mesh, rows

TEXT = 2000  # bytes of a message
PATIENCE = 3600  # seconds until all processes have come to their first meeting
T = TypeVar("T")


class ProcessError(RuntimeError):
    """What one or more processes of a job could not do; raised in every process, the message names each and its problem."""


def several() -> bool:
    """Whether this process is one of several of a job."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this process writes what one process writes for all: logs, records, names of folders."""
    return jax.process_index() == 0


def start_gather(values: Any) -> Callable[[], np.ndarray]:
    """Sends an array of one shape and dtype from each of P processes to all; the function returned waits for [P, *shape].

    What was dispatched before need not have ended, and what is dispatched afterwards is not waited for.
    """
    mesh, gather = _gather()
    received = in_order(gather(jax.make_array_from_process_local_data(rows(mesh), np.asarray(values)[None])))
    return lambda: np.asarray(received)


def in_order(results: T) -> T:
    """Results of a program with collectives, waited for where the next such program could overtake it: on CPUs (gloo).

    Elsewhere programs of a device run in the order of their dispatch.
    """
    return jax.block_until_ready(results) if several() and jax.default_backend() == "cpu" else results


def gather(values: Any) -> np.ndarray:
    """An array of one shape and dtype from each of P processes, [P, *shape]; waits."""
    return start_gather(values)()


def gather_texts(text: str) -> list[str]:
    """A text of each process, cut to `TEXT` bytes."""
    encoded = np.frombuffer(text.encode()[:TEXT].ljust(TEXT, b"\0"), np.uint8)
    return [bytes(line).rstrip(b"\0").decode(errors="ignore") for line in gather(encoded)]


def from_first(text: str) -> str:
    """The text of process 0, of any length, in all of them."""
    if not several():
        return text
    encoded = np.frombuffer(text.encode(), np.uint8)
    size = int(gather(np.int32(len(encoded)))[0])
    return bytes(gather(np.resize(encoded, size) if len(encoded) else np.zeros(size, np.uint8))[0]).decode()


def together(what: str, call: Callable[[], T]) -> T:
    """Calls a function in every process, and raises in all what any of them raised; alone, a process just calls it.

    Args:
      what: is done, for the message.
      call: must not contain a collective that another process may not reach.

    Raises:
      ProcessError: several processes, and `call` raised in at least one; that process has its own error as the cause.
    """
    if not several():
        return call()
    result, error = None, None
    try:
        result = call()
    except Exception as raised:
        error = raised
    problems = gather_texts("" if error is None else describe(error))
    if any(problems):
        raise ProcessError(f"{what}: {named(problems)}") from error
    return result  # type: ignore[return-value]


def by_first(what: str, call: Callable[[], Any]) -> None:
    """Calls a function in process 0; raises in all what it raised, see `together`."""
    together(what, call if first() else lambda: None)


def expect_equal(what: str, values: dict[str, bytes]) -> None:
    """Raises ProcessError unless all processes have equal values by name, digests of one length; names those that differ."""
    if not several() or not values:
        return
    held = gather(np.stack([np.frombuffer(value, np.uint8) for value in values.values()]))
    for process, others in enumerate(held):
        other = [name for name, same in zip(values, (others == held[0]).all(axis=1), strict=True) if not same]
        if other:
            more = f" and {len(other) - 1} more" if len(other) > 1 else ""
            got = f"another {other[0]!r}{more} in process {process}"
            raise ProcessError(f"{what}: expected the same in every process, got {got}")


def named(problems: Sequence[str]) -> str:
    """The problems that are not "", each with the processes that have it."""
    texts = dict.fromkeys(text for text in problems if text)
    who = {text: [str(at) for at, other in enumerate(problems) if other == text] for text in texts}
    lines = [f"process{'es' if len(at) > 1 else ''} {', '.join(at)} of {len(problems)}: {text}" for text, at in who.items()]
    return "; ".join(lines)


def describe(error: BaseException) -> str:
    """Type and message of an error."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@contextlib.contextmanager
def end_at_once() -> Iterator[None]:
    """Ends this process with exit code 1 when the block raises, without waiting for the others, which then fail too.

    For the main block of a script. Without it, a process that raises waits for the others before it ends
    (`jax.distributed.shutdown`), while they wait for it in the next step.
    """
    try:
        yield
    except BaseException as error:
        if not several() or (isinstance(error, SystemExit) and not error.code):
            raise
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


@functools.cache
def _gather() -> tuple[Any, Any]:
    """A mesh with one device of each process, in their order, and a compiled copy to all."""
    # On CPUs the first collective fails after 30 s where a process comes later, because it reads more or compiles longer.
    if several():
        from jax._src import distributed  # JAX has no public barrier that takes a time; tested with JAX 0.10.2 and 0.12

        client = distributed.global_state.client
        if client is not None:
            client.wait_at_barrier("aif_jax.sharding.processes", 1000 * PATIENCE)
    devices = {device.process_index: device for device in reversed(jax.devices())}
    mesh = row_mesh([devices[process] for process in range(jax.process_count())])
    return mesh, jax.jit(lambda values: values, out_shardings=replicated(mesh))
