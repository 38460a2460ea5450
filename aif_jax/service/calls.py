"""Calls, checked once before any work is done for them, and errors as HTTP answers."""

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from aif_jax.encoding.vocabulary import MOST_CHARACTERS, expect_short
from aif_jax.serving import DeadlineExceeded, EngineClosed, NonFiniteScores, Overloaded
from aif_jax.serving.requests import CallerError, Candidates, plain_ids

MAX_VALUES, MAX_EVENTS = 100_000, 1 << 16
"""Candidates or excluded ids, and values of a column of a call: more is refused before memory is taken for it."""
INT64 = range(-(1 << 63), 1 << 63)


class BadCall(CallerError):
    """A call that is not what it should be; `field` names the part."""

    def __init__(self, field: str, message: str):
        field = field[:MOST_CHARACTERS]  # a caller's name may have any length
        super().__init__(f"{field}: {message}")
        self.field = field


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One call of `rank`, `score` or `prepare`.

    Attributes:
      candidates: to rank or score; None for `prepare`.
      exclude: item ids [E] that are not ranked or scored, of the candidates' kind, see `Request.exclude`; None for none.
      k: how many candidates `rank` returns; None where the call does not say.
      order: name of the order, see `Request.order`; None takes the engine's.
      budget: seconds that the engine has; None takes its default.
      version: model version that must answer: 64 hex digits, the first 8 or more, or an export's name; None: the user's.
      record: raw user attributes by column.
      now: time of the request in the time unit of the columns; None takes the clock.
      size: bytes that the call came in.
    """

    user: int | str
    candidates: Candidates | None = None
    exclude: np.ndarray | None = None
    k: int | None = None
    order: str | None = None
    budget: float | None = None
    feature_version: int | str | None = None
    version: str | None = None
    record: Mapping[str, Any] | None = None
    events: Mapping[str, Any] | None = None
    now: int | None = None
    id: str = ""
    size: int = 0


def parse(fields: Mapping[str, Any], most: int = MAX_VALUES, *, size: int = 0) -> Call:
    """Return the call that fields say; arrays may be lists, of `most` values. Raises BadCall with the name of the field."""
    values = {name: value for name, value in fields.items() if value is not None}
    if unknown := [str(name) for name in fields if name not in FIELDS]:
        raise BadCall(unknown[0], f"expected one of the fields {', '.join(FIELDS)}, got {unknown[0][:80]!r}")
    for name, (fits, expected) in CHECKS.items():
        if (name in values or name == "user") and not fits(value := values.get(name)):
            raise BadCall(name, f"expected {expected}, got {_shown(value)}")
    for name in ("candidates", "exclude"):
        _expect_at_most(most, values.get(name), name)
    for name in ("record", "events"):
        _expect_columns(values.get(name, {}), name, min(most, MAX_EVENTS))
    bids = values.pop("bids", None)
    try:
        if "candidates" in values:
            values["candidates"] = Candidates(values["candidates"], bids)
        if "exclude" in values:
            values["exclude"] = plain_ids(values["exclude"], "exclude")
        for name, column in values.get("events", {}).items():
            if isinstance(column, list | np.ndarray):
                expect_short(column, f"events: {name[:MOST_CHARACTERS]}")
    except (TypeError, ValueError) as error:
        field, _, message = str(error).partition(": ")
        raise BadCall(field, message) from None
    return Call(**values, size=size)


def _expect_at_most(most: int, value: Any, field: str) -> None:
    size = np.size(value) if isinstance(value, np.ndarray) else len(value) if isinstance(value, list) else 0
    if size > most:
        raise BadCall(field, f"expected at most {most} values, got {size}")


def _expect_columns(value: Any, field: str, most: int) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise BadCall(field, f"expected values by name, got {_shown(value)}")
    for name, column in value.items():
        _expect_at_most(most, column, f"{field}.{name[:MOST_CHARACTERS]}")


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, int | float | str) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:80]}..."


TEXT = (lambda value: isinstance(value, str) and len(value) <= MOST_CHARACTERS), f"text of at most {MOST_CHARACTERS} characters"
INTEGER = (lambda value: type(value) is int and value in INT64), "an integer of 64 bits"
ID = (lambda value: INTEGER[0](value) or TEXT[0](value)), f"{INTEGER[1]} or {TEXT[1]}"
SECONDS = (lambda value: type(value) in (int, float) and 0 < value < sys.float_info.max), "more than 0 seconds"
CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "user": ID, "k": INTEGER, "order": TEXT, "budget": SECONDS,
    "feature_version": ID, "version": TEXT, "now": INTEGER, "id": TEXT,
}  # fmt: skip
"""What plain fields must be, and the words for it."""
FIELDS = (*CHECKS, "candidates", "bids", "exclude", "record", "events")


def affinity_key(user: int | str) -> str:
    """Return the value of the header `x-aif-user`, by which a proxy routes: the same 16 hex digits for all calls of a user.

    They are the start of the SHA-256 of the id as UTF-8, decimal for integers: neither logs nor limits of a proxy see ids.

    Example:
      >>> affinity_key("ann"), affinity_key(7) == affinity_key("7")
      ('49915e0d7d4b402e', True)
    """
    return hashlib.sha256(str(user).encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclasses.dataclass(eq=False)
class Failure(Exception):
    """An error as a caller sees it.

    Attributes:
      code: kind of the error, such as "INVALID_ARGUMENT".
      status: HTTP status code.
      field: part of the call that is at fault, "" for none.
      retry_after: seconds until another try may succeed; None for no hint.
      headers: more headers of the answer.
    """

    code: str
    status: int
    message: str
    field: str = ""
    retry_after: float | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the body of an HTTP answer."""
        more = {name: value for name in ("field", "retry_after") if (value := getattr(self, name)) not in ("", None)}
        return {"error": {"code": self.code, "message": self.message} | more}


PROBLEMS: tuple[tuple[type[Exception], str, int, float | None], ...] = (
    (BadCall, "INVALID_ARGUMENT", 400, None),
    (Overloaded, "RESOURCE_EXHAUSTED", 429, 0.05),  # about the time of a few requests
    (DeadlineExceeded, "DEADLINE_EXCEEDED", 504, None),
    (EngineClosed, "UNAVAILABLE", 503, 1.0),
    (NonFiniteScores, "INTERNAL", 500, None),
)
"""Code, HTTP status and `retry_after` of errors whose text a caller may read."""


def problem_of(error: BaseException) -> Failure:
    """Return how an error is answered; the text of what no caller can help stays here."""
    if isinstance(error, Failure):
        return error
    for kind, code, status, retry_after in PROBLEMS:
        if isinstance(error, kind):
            return Failure(code, status, str(error), getattr(error, "field", ""), retry_after)
    return Failure("INTERNAL", 500, f"the service failed: {type(error).__name__}")


def blamed(error: TypeError | ValueError) -> BadCall:
    """Return what the caller is told of what the engine refuses of a request; elsewhere such an error is the service's."""
    if isinstance(error, BadCall):
        return error
    head, _, text = str(error).partition(": ")
    field = head.removeprefix("Request.").removeprefix("rank ")
    return BadCall(field, text) if field in FIELDS else BadCall("candidates", str(error))
