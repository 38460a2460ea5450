"""Calls in other threads, beside what a test does."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor


@contextlib.contextmanager
def meanwhile(
    *calls: Callable[[], object], switch: float | None = None, ignoring: tuple[type[Exception], ...] = ()
) -> Iterator[Callable[[], bool]]:
    """Calls each function again and again, in a thread of its own, until the end of the block; then raises their first error.

    Yields whether a thread has ended. Threads change after `switch` seconds, and go on after the errors in `ignoring`.
    """
    stop, before = threading.Event(), sys.getswitchinterval()

    def again(call: Callable[[], object]) -> None:
        while not stop.is_set():
            with contextlib.suppress(*ignoring):
                call()

    with ThreadPoolExecutor(len(calls)) as pool:
        sys.setswitchinterval(switch or before)
        try:
            ends = [pool.submit(again, call) for call in calls]
            yield lambda: any(end.done() for end in ends)
        finally:
            stop.set()
            sys.setswitchinterval(before)
    for end in ends:
        end.result()
