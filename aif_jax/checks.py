"""Checks of settings and arrays at the public edge, on the host: what, where, expected, got. Nothing is altered or clipped."""

import contextlib
import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np

UNIONS = (typing.Union, types.UnionType)
BLOCK = 1 << 22  # elements looked at in one go, so that a check of a large table stays in bounded memory


class ArgumentError(ValueError):
    """An argument of a call that is missing or does not fit, whatever the data: a command ends with the code of wrong usage."""


class Fields:
    """Base of settings: a misspelt field is an ArgumentError that suggests the nearest name."""

    def __new__(cls, *_: Any, **given: Any):
        """Raise ArgumentError for a misspelt field."""
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in given:
            near = difflib.get_close_matches(name, names, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            expect(name in names, cls.__name__, f"the fields {', '.join(names)}", f"{name!r}{meant}", error=ArgumentError)
        return super().__new__(cls)

    def expect(self, ok: bool, field: str, expected: str) -> None:
        """Raise ArgumentError unless a field fits: "FitConfig.epochs: expected at least 1, got 0"."""
        expect(ok, f"{type(self).__name__}.{field}", expected, repr(getattr(self, field)), error=ArgumentError)


class VersionMismatch(ValueError):
    """Two parts of the system come from different parameters, config or encoder; `expected` and `got` are their versions."""

    MESSAGE = (
        "{what}: expected version {expected}, got {got}; both must be made from the same params, config and encoder. "
        "Rebuild it with the model that serves, such as run.index(items), or publish both together"
    )

    def __init__(self, what: str, *, expected: str, got: str):
        super().__init__(self.MESSAGE.format(what=what, expected=expected, got=got))
        self.expected = expected
        self.got = got


class EncodingMismatch(VersionMismatch):
    """Features, or something made from features, were encoded by another encoder than the model's."""

    MESSAGE = (
        "{what}: expected the encoding {expected}, got {got}; its ids and floats mean something else to this model. "
        "Other vocabularies, columns or scales: encode with run.encoder, or read with aif.read(..., encoder=run.encoder); "
        "a new model is built on data.schema"
    )


def check_encoding(what: str, *, expected: str, got: str) -> None:
    """Raise `EncodingMismatch` where two encodings are known (not "") and differ; `what` carries `got`."""
    if expected and got and got != expected:
        raise EncodingMismatch(what, expected=expected, got=got)


def expect(ok: Any, name: str, expected: object, got: object, *, error: type[Exception] = ValueError) -> None:
    """Raise `error` "name: expected ..., got ..." unless `ok`."""
    if not ok:
        raise error(f"{name}: expected {expected}, got {got}")


def expect_types(value: Any) -> None:
    """Raise ArgumentError unless plain values of a dataclass, words and tuples of them are as annotated."""
    for name, hint in _hints(type(value)).items():
        got = getattr(value, name)
        if not fits(got, hint):
            expect(False, f"{type(value).__name__}.{name}", text_of(hint), repr(got), error=ArgumentError)


@contextlib.contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """Wrap the import of an optional package: an ImportError then says what needs it and names the extra that has it."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{what} ({error}): pip install "aif_jax[{extra}]"') from error


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # a type that is known inside a function alone, or to type checkers
        return {}
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value has a plain type, is a listed word, or a tuple of any length of these; True for other types."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in UNIONS:
        return any(fits(value, part) for part in parts)
    if typing.get_origin(hint) is typing.Literal:
        return value in parts
    if typing.get_origin(hint) is tuple and parts[1:] == (...,):
        return isinstance(value, tuple) and all(fits(each, parts[0]) for each in value)
    plain = {float: (int, float), int: (int,), bool: (bool,), str: (str,), type(None): (type(None),)}
    return type(value) in plain.get(hint, (type(value),))


def text_of(hint: Any) -> str:
    """Return a type as messages say it: "int or None", "'error' or 'skip'"."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, parts))
    if typing.get_origin(hint) in UNIONS:
        return " or ".join(map(text_of, parts)).replace("NoneType", "None")
    return hint.__name__ if isinstance(hint, type) else str(hint)


def expect_array(value: Any, name: str, *, dtype: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """Return `value` as a NumPy array of exactly that dtype and shape (None: any length), else TypeError or ValueError."""
    array = np.asarray(value)
    expect(array.dtype == np.dtype(dtype), name, f"dtype {np.dtype(dtype).name}", array.dtype.name, error=TypeError)
    if array.ndim != len(shape) or any(want is not None and want != got for want, got in zip(shape, array.shape, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(array.shape)}")
    return array


def expect_integer(value: Any, name: str, *, least: int, most: int | None = None) -> int:
    """Return `value` as an int. Raises TypeError for a bool or another type, ValueError outside of `least` to `most`."""
    fits = isinstance(value, int | np.integer) and not isinstance(value, bool)
    expect(fits, name, "an integer", f"{value!r} ({type(value).__name__})", error=TypeError)
    expected = f"at least {least}" if most is None else f"{least} to {most}"
    expect(least <= value and (most is None or value <= most), name, expected, value)
    return int(value)


def expect_integers(value: Any, name: str, *, size: int) -> np.ndarray:
    """Return `value` as an array of integers in [0, size) of any shape; TypeError, ValueError with the position."""
    array = np.asarray(value)
    if array.size == 0 and not isinstance(value, np.ndarray):
        array = array.astype(np.int64)  # numpy reads an empty list as float64
    expect(array.dtype.kind in "iu", name, "integers", f"dtype {array.dtype.name}", error=TypeError)
    expect_range(array, name, size=size)
    return array


def expect_range(array: np.ndarray, name: str, *, size: int) -> None:
    """Raise ValueError unless all values are in [0, size)."""
    if array.size and (array.min() < 0 or array.max() >= size):
        expect_entries((array >= 0) & (array < size), array, name, f"values in [0, {size})")


def expect_finite(array: np.ndarray, name: str, *, minimum: float = -np.inf) -> None:
    """Raise ValueError unless all values are finite and at least `minimum`."""
    if array.size and not (np.isfinite(low := array.min()) and np.isfinite(array.max()) and low >= minimum):
        wanted = "finite values" if minimum == -np.inf else f"finite values of at least {minimum:g}"
        expect_entries(np.isfinite(array) & (array >= minimum), array, name, wanted)


def expect_like_scores(shape: tuple[int, ...], name: str, scores: tuple[int, ...]) -> None:
    """Raise ValueError unless a shape broadcasts to that of scores and has its rank: [B] fits [B, B] along a wrong axis."""
    fits = len(shape) == len(scores) and all(have in (1, want) for have, want in zip(shape, scores, strict=True))
    expect(fits, name, f"a shape of the same rank that broadcasts to scores {scores}", shape)


def expect_names(got: Any, name: str, wanted: Any) -> None:
    """Raise ValueError unless the dict `got` has exactly the keys `wanted`."""
    expect(isinstance(got, dict), name, f"a dict with keys {sorted(wanted)}", type(got).__name__, error=TypeError)
    missing, extra = sorted(set(wanted) - set(got)), sorted(set(got) - set(wanted))
    expect(not missing + extra, name, f"keys {sorted(wanted)}", f"{sorted(got)} (missing {missing}, extra {extra})")


def expect_entries(fits: np.ndarray, array: np.ndarray, name: str, expected: str) -> None:
    """Raise ValueError for the first entry of an array that does not fit."""
    if not fits.all():
        at = tuple(map(int, np.unravel_index(np.argmin(fits), fits.shape)))
        place = f"position {list(at)}" if at else "the only position"
        raise ValueError(f"{name}: expected {expected}, got {array[at]} at {place}")
