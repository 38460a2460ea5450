"""A small client of the lean HTTP route, on the standard library alone: an example for other languages, and for tests."""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.parse
from typing import Any

from aif_jax.service import frame


class ServiceError(RuntimeError):
    """The service answered with an error.

    Attributes:
      status: of HTTP.
      code: of gRPC, such as "INVALID_ARGUMENT".
      field: of the call that is wrong; "" where none is.
      retry_after: seconds to wait before another try; None where there is no use.
    """

    def __init__(self, status: int, error: dict[str, Any]):
        super().__init__(f"{error.get('code')}: {error.get('message')}")
        self.status, self.code, self.field = status, error.get("code", ""), error.get("field", "")
        self.retry_after: float | None = error.get("retry_after")


class Client:
    """One connection, used from one thread, that is opened again where the service closed it.

    Args:
      address: such as "http://127.0.0.1:8080".
      token: bearer token.
      timeout: seconds that an answer may take.
      trust: PEM file of the authority of an https address; None takes the system's.
    """

    def __init__(self, address: str, *, token: str | None = None, timeout: float = 10.0, trust: str | None = None):
        parts = urllib.parse.urlsplit(address)
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=trust)
            self._connection: Any = http.client.HTTPSConnection(parts.netloc, timeout=timeout, context=context)
        else:
            self._connection = http.client.HTTPConnection(parts.netloc, timeout=timeout)
        self._headers = {} if token is None else {"authorization": f"Bearer {token}"}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()

    def rank(self, **fields: Any) -> dict[str, Any]:
        """The best k; fields as `aif_jax.service.calls.Call`, ids and bids as NumPy arrays. Raises ServiceError."""
        return self.post("/v1/rank", fields)

    def score(self, **fields: Any) -> dict[str, Any]:
        """Logits of candidates."""
        return self.post("/v1/score", fields)

    def prepare(self, **fields: Any) -> dict[str, Any]:
        """Says that a user is coming."""
        return self.post("/v1/prepare", fields)

    def post(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Sends a frame and reads one."""
        status, kind, body = self.request("POST", path, frame.pack(fields), {"content-type": frame.CONTENT_TYPE})
        if status != 200:
            raise ServiceError(status, json.loads(body)["error"])
        return frame.unpack(body) if kind == frame.CONTENT_TYPE else json.loads(body)

    def request(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, str, bytes]:
        """Status, content type and body of any path."""
        self._connection.request(method, path, body, self._headers | (headers or {}))
        response = self._connection.getresponse()
        return response.status, response.headers.get("content-type", ""), response.read()
