"""A small client of the lean HTTP route, on the standard library alone: an example for other languages, and for tests."""

from __future__ import annotations

import hashlib
import http.client
import json
import ssl
import time
import urllib.parse
from typing import Any

from aif_jax.checks import expect
from aif_jax.service import tensors

HEADER = "x-aif-user"
"""Header that a consistent hash reads; `Client` sends it with every call."""


def affinity_key(user: int | str) -> str:
    """16 hex digits that depend on the user alone: the start of the SHA-256 of the id as UTF-8, decimal for integers.

    A digest, so that neither the logs of a proxy nor its limits of a header see ids.

    Example:
      >>> affinity_key("ann"), affinity_key(7) == affinity_key("7")
      ('49915e0d7d4b402e', True)
    """
    return hashlib.sha256(str(user).encode("utf-8", "surrogatepass")).hexdigest()[:16]


GONE = (502, 503)  # a proxy that found no replica, a service that starts or drains: another try may find another one
LONGEST_PAUSE = 0.1  # seconds between two tries


class ServiceError(RuntimeError):
    """The service answered with an error.

    Attributes:
      field: field of the call that is wrong; "" where none is.
      retry_after: seconds to wait before another try; None where there is no use.
      counts: what the service says in numbers, such as "non_finite" where no candidate has a finite score.
    """

    def __init__(self, status: int, error: dict[str, Any]):
        super().__init__(f"{error.get('code')}: {error.get('message')}")
        self.status, self.code, self.field = status, error.get("code", ""), error.get("field", "")
        self.retry_after: float | None = error.get("retry_after")
        self.counts: dict[str, int] = error.get("counts", {})


class Client:
    """One connection, used from one thread, that is opened again where the service closed it.

    Calls change nothing, so one whose connection broke is sent again, and so is one that a proxy, or a service that starts or
    drains, refused. A call that ran into the timeout is not.

    Args:
      address: such as "http://127.0.0.1:8080".
      trust: PEM file of the authority of an https address; None takes the system's.

    Raises:
      ValueError: retries below 0.
    """

    def __init__(
        self, address: str, *, token: str | None = None, timeout: float = 10.0, trust: str | None = None, retries: int = 2
    ):
        expect(retries >= 0, "Client retries", "0 or more", retries)
        parts = urllib.parse.urlsplit(address)
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=trust)
            self._connection: Any = http.client.HTTPSConnection(parts.netloc, timeout=timeout, context=context)
        else:
            self._connection = http.client.HTTPConnection(parts.netloc, timeout=timeout)
        self._headers = {} if token is None else {"authorization": f"Bearer {token}"}
        self._retries, self._timeout = retries, timeout
        self.retried = 0

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; the next call opens another."""
        self._connection.close()

    def rank(self, **fields: Any) -> dict[str, Any]:
        """The best k; fields as `aif_jax.service.calls.Call`, ids and bids as NumPy arrays. Raises as `post`."""
        return self.post("/v1/rank", fields)

    def score(self, **fields: Any) -> dict[str, Any]:
        """Logits of candidates."""
        return self.post("/v1/score", fields)

    def prepare(self, **fields: Any) -> dict[str, Any]:
        """Says that a user is coming."""
        return self.post("/v1/prepare", fields)

    def post(self, path: str, fields: dict[str, Any], *, within: float | None = None) -> dict[str, Any]:
        """Sends a call in tensors and reads the answer.

        Args:
          within: seconds for all tries; None gives each `timeout`.

        Raises:
          ServiceError: the service, or a proxy before it, answered with an error.
          OSError: no connection, or one that broke or was silent for `timeout` seconds.
        """
        headers = {"content-type": tensors.CONTENT_TYPE}
        if isinstance(user := fields.get("user"), int | str):
            headers[HEADER] = affinity_key(user)
        body, until = tensors.pack(fields), None if within is None else time.monotonic() + within
        for left in range(self._retries, -1, -1):
            try:
                status, kind, answer = self.request("POST", path, body, headers, within=_left(until))
                if status != 200:
                    raise ServiceError(status, _error(answer, status))
                return tensors.unpack(answer) if kind == tensors.CONTENT_TYPE else json.loads(answer)
            except TimeoutError:
                raise
            except OSError:
                if not left:
                    raise
            except ServiceError as error:
                if error.status not in GONE or not left:
                    raise
                time.sleep(min(error.retry_after or 0.0, LONGEST_PAUSE, _left(until) or LONGEST_PAUSE))
            self.retried += 1
        raise AssertionError("unreachable: the last try returns or raises")

    def request(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, *, within: float | None = None
    ) -> tuple[int, str, bytes]:
        """Status, content type and body of any path; `within` shortens the timeout of this call, in seconds."""
        connection = self._connection
        connection.timeout = self._timeout if within is None else min(within, self._timeout)  # of a new connection
        if connection.sock is not None:
            connection.sock.settimeout(connection.timeout)
        try:
            connection.request(method, path, body, self._headers | (headers or {}))
            response = connection.getresponse()
            return response.status, response.headers.get("content-type", ""), response.read()
        except http.client.HTTPException as error:  # of a service that died in the middle of its answer
            self.close()
            if isinstance(error, OSError):
                raise
            raise ConnectionError(f"the answer broke off: {error!r}") from error
        except BaseException:
            self.close()  # whatever comes yet belongs to no later call
            raise


def _left(until: float | None) -> float | None:
    """Seconds that are left, a moment at least; None without an end."""
    return None if until is None else max(until - time.monotonic(), 1e-3)


def _error(body: bytes, status: int) -> dict[str, Any]:
    """What a service says of an error; of a proxy, whose errors are pages, the status alone."""
    try:
        return dict(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return {"code": "UNAVAILABLE" if status in GONE else "INTERNAL", "message": f"status {status} of a proxy"}
