"""One HTTP connection: uvicorn's, with budgets in bytes and seconds for whatever a caller sends, or leaves unsent and unread.

| state | bytes | seconds | then |
|---|---|---|---|
| a request's head is awaited or arrives | `HEAD_BYTES` | `HEAD_SECONDS` | 400 for too many, closed |
| trailers, or anything else of a body that is not its content | `HEAD_BYTES` in a row | `Limits.body_seconds` | 400, closed |
| idle between two requests | none that start no request | `keep_alive` | closed |
| answers that the caller does not read | the transport's buffer | `UNREAD_SECONDS` | aborted |

Requests that come before their predecessors' answers are read `AHEAD` at a time and answered in order, whatever follows them.
"""

from __future__ import annotations

import asyncio
from typing import Any

HEAD_BYTES = 32 << 10
HEAD_SECONDS = 10.0  # from the connection, or from the first byte of a request, to the end of its head
UNREAD_SECONDS = 30.0  # that an answer may wait for its caller to read
AHEAD = 8  # requests of a connection whose answers are not complete
RESERVE = 32  # connections beyond the bound while all others have a call in flight: health is answered on them
NEW_SECONDS = 1.0  # for which a connection without a request yet is kept before those that wait longer, or again
SLICE = 2048  # bytes that the parser gets at a time: so many requests, and no more, come out of it at once


def bounded(base: Any, *, connections: int) -> Any:
    """The class of connections, from uvicorn's `HttpToolsProtocol`, with the budgets of this module.

    Args:
      base: uvicorn's class.
      connections: open at once. With one more the connection that has waited longest for its caller is closed: for a request,
        for the rest of a head or of a body. One whose call is in flight is never closed for another.
    """

    class Connection(base):
        _open = 0  # requests whose head is there and whose answer is not complete
        _reading = "head"  # what comes next: "head", "body", or "" between two requests
        _size = 0  # bytes of the head, or bytes in a row without content of a body
        _left = 0  # bytes of the body that are to come; 0 where its length is not known
        _since = 0.0  # since when the caller is awaited
        _asked = False  # whether a head of a request has come
        _refusal: str | None = None  # the last answer, once the others are sent; "" closes without one
        _timer: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        # from the transport

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._held, self._since = bytearray(), self.loop.time()
            self._within(HEAD_SECONDS, self._end)
            if len(self.connections) > connections:
                self._make_room()

        def connection_lost(self, exc: Exception | None) -> None:
            self._within(None)
            self.resume_writing()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self._unread or self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def data_received(self, data: bytes) -> None:
            if self._refusal is None:
                self._held += data
                self._parse()

        def _parse(self) -> None:
            """Gives the parser what has come, as far as answers keep up with it."""
            while self._held and self._open < AHEAD and self._refusal is None and not self.transport.is_closing():
                size = max(self._left, SLICE) if self._reading == "body" else SLICE
                part, before = bytes(self._held[:size]), self._reading
                del self._held[:size]
                self._size += len(part)
                super().data_received(part)
                if self._size > HEAD_BYTES and before == self._reading:
                    self._end(f"expected at most {HEAD_BYTES} bytes before the body, and after it, got more")
            if self._held:
                self.flow.pause_reading()

        # from the parser

        def on_message_begin(self) -> None:
            self._reading, self._size = "head", 0
            self._within(HEAD_SECONDS, self._end)
            super().on_message_begin()

        def on_header(self, name: bytes, value: bytes) -> None:
            if self._reading == "head":  # trailers are not used, and so not kept
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._reading, self._size, self._since = "body", 0, self.loop.time()
            self._left = next((int(value) for name, value in self.headers if name == b"content-length"), 0)
            self._open, self._asked = self._open + 1, True
            self._within(None)
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._size, self._left = 0, max(0, self._left - len(body))
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._reading, self._size = "", 0
            super().on_message_complete()

        # answers and the end

        def send_400_response(self, msg: str) -> None:
            self._end(msg)

        def on_response_complete(self) -> None:
            self._open -= 1
            self._since = self.loop.time()
            super().on_response_complete()
            if self.transport.is_closing():
                self._within(UNREAD_SECONDS, self.transport.abort)
            elif self._refusal is not None:
                self._end_if_answered()
            else:
                if not self._open and not self._reading:
                    self._within(self.timeout_keep_alive, self._end)
                self._parse()

        def timeout_keep_alive_handler(self) -> None:
            self._end()

        def _end(self, refusal: str = "") -> None:
            """Reads nothing more; closes, with a refusal or without, when the requests before are answered."""
            if self._refusal is None:
                self._refusal = refusal
                self._held.clear()
                self._within(None)
                self.flow.pause_reading()
                self._end_if_answered()

        def _end_if_answered(self) -> None:
            incomplete = self._reading == "body"  # the last request itself is what the refusal answers
            if self._open > incomplete or self.transport.is_closing():
                return
            if self._refusal and not (incomplete and self.cycle.response_started):
                super().send_400_response(self._refusal)
            self.transport.close()
            self._within(UNREAD_SECONDS, self.transport.abort)

        def _make_room(self) -> None:
            others = [each for each in self.connections if each is not self and not each.transport.is_closing()]
            waiting = [each for each in others if each._open <= (each._reading == "body")]
            # a connection of a moment ago may have its first request in the socket: only if all others are as young
            new = self._since - NEW_SECONDS
            if len(others) >= connections and waiting:
                min(waiting, key=lambda each: (not each._asked and each._since > new, each._since)).transport.abort()
            elif len(others) >= connections + RESERVE:
                self.transport.abort()

        def _within(self, seconds: float | None, then: Any = None) -> None:
            """Does something after some seconds, unless another state comes before that."""
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None if seconds is None else self.loop.call_later(seconds, then)

    return Connection
