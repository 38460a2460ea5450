"""A small client of a service over HTTP, on the standard library alone."""

import http.client
import json
import time
import urllib.parse
from typing import Any, Self

import numpy as np

from aif_jax.service.calls import affinity_key

GONE = (502, 503)  # a proxy that found no replica, a service that starts or drains: another try may find another one
ARRAYS = {"scores": float, "logits": float, "mask": bool}


class ServiceError(RuntimeError):
    """The service answered with an error; a proxy's, which is a page, has no code."""

    def __init__(self, status: int, error: dict[str, Any]):
        super().__init__(f"{status} {error.get('code')}: {error.get('message')}")
        self.status, self.code, self.field = status, error.get("code", ""), error.get("field", "")
        self.retry_after = error.get("retry_after")


class Client:
    """One connection, of one thread, that is opened again where the service closed it."""

    def __init__(self, address: str, *, token: str | None = None, timeout: float = 10.0):
        self._connection = http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc, timeout=timeout)
        self._headers = {} if token is None else {"authorization": f"Bearer {token}"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()

    def rank(self, **fields: Any) -> dict[str, Any]:
        """The best k."""
        return self._answer("/v1/rank", fields)

    def score(self, **fields: Any) -> dict[str, Any]:
        """Logits of candidates."""
        return self._answer("/v1/score", fields)

    def prepare(self, **fields: Any) -> dict[str, Any]:
        """Says that a user is coming."""
        return self._answer("/v1/prepare", fields)

    def _answer(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of an answer, its lists as arrays; ServiceError for an error, OSError for a connection that breaks.

        What broke, or was refused by a proxy or a service that starts or drains, is sent again, twice: calls change nothing.
        """
        for left in (2, 1, 0):
            try:
                status, answer = self.post(path, fields)
            except OSError as error:
                if isinstance(error, TimeoutError) or not left:
                    raise
                continue
            if status == 200:
                answer |= {name: np.array(answer[name], kind) for name, kind in ARRAYS.items() if name in answer}
                if "ids" in answer:
                    answer["ids"] = np.array(answer["ids"], None if answer["ids"] else np.int64)
                return answer
            if status not in GONE or not left:
                break
            time.sleep(0.05)
        raise ServiceError(status, answer.get("error", {}))

    def post(self, path: str, fields: dict[str, Any], kind: str = "application/json") -> tuple[int, dict[str, Any]]:
        """Status and JSON of the answer to a call in JSON, {} where it is none; arrays become lists."""
        user, body = fields.get("user"), json.dumps(fields, default=lambda array: array.tolist()).encode()
        headers = {"content-type": kind} | ({"x-aif-user": affinity_key(user)} if isinstance(user, int | str) else {})
        status, answered, answer = self.request("POST", path, body, headers)
        return status, json.loads(answer) if answered == "application/json" else {}

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
