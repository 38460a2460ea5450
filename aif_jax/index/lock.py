"""Many readers or one writer: an update writes into arrays only while no computation is being handed to the device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadWriteLock:
    """A lock that readers share; a waiting writer goes before readers that come after it. Not reentrant."""

    def __init__(self):
        self._entry = threading.Lock()  # a writer holds it from the moment it waits
        self._left = threading.Condition()
        self._readers = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Held while arrays are read or given to a compiled function; not until its result is there."""
        with self._entry, self._left:
            self._readers += 1
        try:
            yield
        finally:
            with self._left:
                self._readers -= 1
                self._left.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Held while arrays are replaced."""
        with self._entry:
            with self._left:
                self._left.wait_for(lambda: not self._readers)
            yield
