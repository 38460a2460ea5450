"""One HTTP connection: uvicorn's, with a bound on the head of a request, for which its fast parser has none."""

from __future__ import annotations

import asyncio
from typing import Any

HEAD_BYTES = 32 << 10
HEAD_SECONDS = 10.0  # from the connection, or from the first byte of a request, to the end of its head


def bounded(base: Any) -> Any:
    """The class of connections, from uvicorn's `HttpToolsProtocol`.

    It refuses a request whose head is too long, and ends a connection that is silent, or slow, before a head is there.
    """

    class Connection(base):
        _size = 0  # bytes of the head so far
        _timer: asyncio.TimerHandle | None = None  # while a head is awaited

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_head()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._timer is not None and not self.transport.is_closing():
                self._size += len(data)
                if self._size > HEAD_BYTES:
                    self.send_400_response(f"expected at most {HEAD_BYTES} bytes before the body")

        def on_message_begin(self) -> None:
            self._await_head()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._end_head()
            super().on_headers_complete()

        def _await_head(self) -> None:
            if self._timer is None:
                self._size, self._timer = 0, self.loop.call_later(HEAD_SECONDS, self.transport.close)

        def _end_head(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Connection
