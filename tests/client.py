"""A small client of a service over HTTP, for experiments and tests, on the standard library alone."""

from __future__ import annotations

import http.client
import json
import ssl
import time
import urllib.parse
from typing import Any

import numpy as np

from aif_jax.service.calls import USER_HEADER, affinity_key

GONE = (502, 503)  # a proxy that found no replica, a service that starts or drains: another try may find another one
PAUSE = 0.05  # seconds between two tries
ARRAYS = ("scores", "logits", "mask")


class ServiceError(RuntimeError):
    """The service answered with an error."""

    def __init__(self, status: int, error: dict[str, Any]):
        super().__init__(f"{error.get('code')}: {error.get('message')}")
        self.status, self.code, self.field = status, error.get("code", ""), error.get("field", "")
        self.retry_after = error.get("retry_after")


def packed(fields: dict[str, Any]) -> bytes:
    """The body of a call; arrays become lists."""
    return json.dumps(fields, default=lambda array: array.tolist()).encode()


def unpacked(body: bytes) -> dict[str, Any]:
    """The fields of an answer, its lists as arrays."""
    fields = json.loads(body)
    fields |= {name: np.array(fields[name], bool if name == "mask" else float) for name in ARRAYS if name in fields}
    if "ids" in fields:
        fields["ids"] = np.array(fields["ids"], None if fields["ids"] else np.int64)
    return fields


class Client:
    """One connection, of one thread, that is opened again where the service closed it; what broke or was refused by a proxy or
    a service that starts or drains is sent again, twice: calls change nothing.
    """

    def __init__(self, address: str, *, token: str | None = None, timeout: float = 10.0, trust: str | None = None):
        parts = urllib.parse.urlsplit(address)
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=trust)
            self._connection: Any = http.client.HTTPSConnection(parts.netloc, timeout=timeout, context=context)
        else:
            self._connection = http.client.HTTPConnection(parts.netloc, timeout=timeout)
        self._headers = {} if token is None else {"authorization": f"Bearer {token}"}
        self.retried = 0

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()

    def rank(self, **fields: Any) -> dict[str, Any]:
        """The best k."""
        return self.post("/v1/rank", fields)

    def score(self, **fields: Any) -> dict[str, Any]:
        """Logits of candidates."""
        return self.post("/v1/score", fields)

    def prepare(self, **fields: Any) -> dict[str, Any]:
        """Says that a user is coming."""
        return self.post("/v1/prepare", fields)

    def post(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Sends a call and reads the answer; ServiceError for an error, OSError for a connection that breaks."""
        headers, body = {"content-type": "application/json"}, packed(fields)
        if isinstance(user := fields.get("user"), int | str):
            headers[USER_HEADER] = affinity_key(user)
        for left in (2, 1, 0):
            try:
                status, _, answer = self.request("POST", path, body, headers)
                if status == 200:
                    return unpacked(answer)
                raise ServiceError(status, _error(answer, status))
            except TimeoutError:
                raise
            except OSError:
                if not left:
                    raise
            except ServiceError as error:
                if error.status not in GONE or not left:
                    raise
                time.sleep(PAUSE)
            self.retried += 1
        raise AssertionError("unreachable: the last try returns or raises")

    def request(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, str, bytes]:
        """Status, content type and body of any path."""
        try:
            self._connection.request(method, path, body, self._headers | (headers or {}))
            response = self._connection.getresponse()
            return response.status, response.headers.get("content-type", ""), response.read()
        except BaseException as error:
            self._connection.close()  # whatever comes yet belongs to no later call
            if isinstance(error, http.client.HTTPException) and not isinstance(error, OSError):
                raise ConnectionError(f"the answer broke off: {error!r}") from error
            raise


def _error(body: bytes, status: int) -> dict[str, Any]:
    """What a service says of an error; of a proxy, whose errors are pages, the status alone."""
    try:
        return dict(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return {"code": "UNAVAILABLE" if status in GONE else "INTERNAL", "message": f"status {status} of a proxy"}
