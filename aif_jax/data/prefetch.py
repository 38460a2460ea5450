"""Batches made and sent to the device by a thread, a few ahead of the step. The only file of `data` that knows threads."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

from aif_jax.checks import expect

T = TypeVar("T")
_ITEM, _ERROR, _END = range(3)


class Prefetch(Generic[T]):
    """Iterates over `items` in their order, while one thread makes the next ones; `place` is applied to each in the thread.

    At most `ahead` finished items wait, one more is being made. An error is raised where its item would have come. Leaving
    the `with` block, `close`, or dropping the last reference stops the thread.
    """

    def __init__(self, items: Iterable[Any], *, ahead: int = 2, place: Callable[[Any], T] | None = None):
        expect(ahead >= 1, "ahead", "at least 1", ahead)
        ready: queue.Queue[tuple[int, Any]] = queue.Queue(ahead)
        stop = threading.Event()
        # The thread holds no reference to this object, so that dropping the last reference stops the thread.
        thread = threading.Thread(target=_fill, args=(items, place, ready, stop), name="aif_jax.prefetch", daemon=True)
        self._ready, self._thread, self._ended = ready, thread, False
        self._stop = weakref.finalize(self, _end, ready, stop)
        thread.start()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        what, value = self._ready.get()
        if what == _ITEM:
            return value
        self._ended = True
        if what == _ERROR:
            raise value
        raise StopIteration

    def close(self) -> None:
        """Stops the thread and waits for it; what was made ahead is dropped."""
        self._ended = True
        self._stop()
        self._thread.join()


def _fill(items: Iterable[Any], place: Callable[[Any], Any] | None, ready: queue.Queue, stop: threading.Event) -> None:
    try:
        for item in items:
            if stop.is_set():
                return
            ready.put((_ITEM, item if place is None else place(item)))
            if stop.is_set():
                return
        ready.put((_END, None))
    except BaseException as error:  # whatever it is, it belongs to the one who asks for the item
        if not stop.is_set():
            ready.put((_ERROR, error))


def _end(ready: queue.Queue, stop: threading.Event) -> None:
    """Tells the thread to stop, and makes room where it waits for some: it puts at most once more."""
    stop.set()
    try:
        while True:
            ready.get_nowait()
    except queue.Empty:
        pass
