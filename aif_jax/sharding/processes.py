"""Several processes of one job (`jax.distributed`): all run the same calls in the same order, each with its share of a batch.

A process that raises alone leaves the others waiting in a collective, until JAX misses its heartbeat: see `end_at_once`.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import TypeVar

import jax

T = TypeVar("T")


def several() -> bool:
    """Return whether this process is one of several of a job."""
    return jax.process_count() > 1


def first() -> bool:
    """Return whether this process writes what one process writes for all: logs, records."""
    return jax.process_index() == 0


def in_order(results: T) -> T:
    """Return results of a program with collectives, waited for where the next such program could overtake it: on CPUs (gloo).

    Elsewhere programs of a device run in the order of their dispatch.
    """
    return jax.block_until_ready(results) if several() and jax.default_backend() == "cpu" else results


@contextlib.contextmanager
def end_at_once() -> Iterator[None]:
    """End this process with exit code 1 when the block raises, without waiting for the others, which then fail too.

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
