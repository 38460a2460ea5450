"""Vocabularies: raw ids to rows 1..n in ascending order of the raw id; row 0 is everything unknown."""

import functools
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

IdKind: TypeAlias = Literal["integers", "strings"]

NESTED = {list, tuple, np.ndarray}
MOST_CHARACTERS = 1024  # of an id of text, where requests and indexes take ids
LIMIT = str(2**63)  # 19 digits: smaller numbers of 19 begin like it, then a digit is smaller
SMALLER = [f"{LIMIT[:at]}[{at == 0:d}-{int(d) - 1}][0-9]{{{18 - at}}}" for at, d in enumerate(LIMIT) if d != "0"]
WHOLE = rf"^(0|-?([1-9][0-9]{{0,17}}|{'|'.join(SMALLER)})|-{LIMIT})$"  # int64 as text, each in one spelling: "07" is none
SPREAD = 4  # a direct table holds at most this many places for each id


class Vocabulary:
    """The known values of one categorical feature, integers or strings, and their rows.

    Strings take the room of their length, not of the longest. "07" and "7" are two strings; neither is the integer 7.

    Args:
      raw: ids in any order, repeated or not: integers within int64, or strings, all of one kind.

    Raises:
      TypeError: ids that are neither integers nor strings, None or a mixture of kinds among them, integers beyond int64.

    Attributes:
      raw: the n ids, ascending, int64 or NumPy's StringDType; `raw[i]` has row i + 1.

    Example:
      >>> vocabulary = Vocabulary([30, 10, 20])
      >>> vocabulary.encode([10, 99, 30]).tolist()
      [1, 0, 3]
    """

    def __init__(self, raw: Any):
        ids = as_ids(raw, "Vocabulary", short=False)
        self.raw = np.unique(ids) if isinstance(ids, np.ndarray) else id_array(sorted(set(ids)))

    def __len__(self) -> int:
        """Return rows, the unknown row 0 included: the `size` of the attribute."""
        return len(self.raw) + 1

    def __repr__(self) -> str:
        return f"Vocabulary({len(self.raw)} ids + unknown)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def ids_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the raw ids of known rows [n]; IndexError for a larger one."""
        return self.raw[rows - 1]

    @property
    def kind(self) -> IdKind | None:
        """Kind of the ids; None for a vocabulary without ids, which fits both."""
        return None if not len(self.raw) else "integers" if self.raw.dtype.kind == "i" else "strings"

    def encode(self, raw: Any, name: str = "Vocabulary.encode") -> np.ndarray:
        """Return int32 rows of raw ids, of their shape; unknown ids give 0. The first call builds an index.

        Errors call the ids by `name`.

        Raises:
          TypeError: ids of another kind than the vocabulary's, which would all be unknown; None among them.
        """
        if self.kind == "strings" and isinstance(raw, list | np.ndarray) and (rows := self._rows_of(raw)) is not None:
            return rows
        ids = as_ids(raw, name, like=self.kind, short=False)
        shape = (len(ids),) if (isinstance(raw, list) and not (raw and type(raw[0]) in NESTED)) else np.shape(raw)
        if not len(self.raw) or not len(ids):
            return np.zeros(shape, np.int32)
        if not isinstance(ids, np.ndarray):
            rows = np.array(list(map(self._rows_by_string.get, ids, itertools.repeat(0))), np.int32)
        elif self._dense_rows is not None:
            first, last = self.raw[0], self.raw[-1]
            rows = self._dense_rows[np.where((ids >= first) & (ids <= last), ids - first, -1)]
        else:
            order = np.argsort(ids, kind="stable")  # a search for ascending ids stays in the cache
            at = np.empty(len(ids), np.int64)
            at[order] = np.searchsorted(self.raw, ids[order])
            np.minimum(at, len(self.raw) - 1, out=at)
            rows = np.where(self.raw[at] == ids, at + 1, 0).astype(np.int32)
        return rows.reshape(shape)

    def _rows_of(self, raw: list[Any] | np.ndarray) -> np.ndarray | None:
        """Return rows of strings, checking the types of unknown ones only; None where something is no string."""
        values = raw if isinstance(raw, list) else raw.reshape(-1).tolist()
        try:
            rows = np.fromiter(list(map(self._rows_by_string.get, values, itertools.repeat(0))), np.int32, len(values))
        except TypeError:  # lists in a list
            return None
        if not all(isinstance(values[i], str) for i in np.flatnonzero(rows == 0)):
            return None
        return rows if isinstance(raw, list) else rows.reshape(raw.shape)

    @functools.cached_property
    def digest(self) -> str:
        """64 hex digits over the ids: equal vocabularies have equal digests."""
        state = hashlib.sha256(b"" if self.kind is None else self.kind.encode())
        for array in self.to_arrays().values() if self.kind is not None else ():
            state.update(array.data)
        return state.hexdigest()

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return ids as plain arrays: {"ids": int64 [n]}, or for strings {"utf8": uint8 [bytes], "offsets": int64 [n + 1]}."""
        if self.raw.dtype.kind == "i":
            return {"ids": self.raw}
        encoded = [text.encode() for text in self.raw.tolist()]
        offsets = np.cumsum([0, *map(len, encoded)]).astype(np.int64)
        return {"utf8": np.frombuffer(b"".join(encoded), np.uint8), "offsets": offsets}

    @functools.cached_property
    def _rows_by_string(self) -> dict[Any, int]:
        return dict(zip(self.raw.tolist(), itertools.count(1)))

    @functools.cached_property
    def _dense_rows(self) -> np.ndarray | None:
        """int32 rows by id, counted from the smallest one; the last entry is 0. None where ids are sparse."""
        first, last = int(self.raw[0]), int(self.raw[-1])
        if last - first >= SPREAD * len(self.raw) + 1024:
            return None
        rows = np.zeros(last - first + 2, np.int32)
        rows[self.raw - first] = np.arange(1, len(self))
        return rows


def new_rows(before: Vocabulary, after: Vocabulary) -> np.ndarray:
    """Return where each row of a vocabulary is in the one after it: int32 [len(before)], -1 for a row that lost its id."""
    place = np.full(len(before), -1, np.int32)
    place[0] = 0
    if before.kind is not None and after.kind in (before.kind, None):
        row = after.encode(before.raw)
        place[1:] = np.where(row > 0, row, -1)
    return place


def as_ids(raw: Any, name: str, *, like: IdKind | None = None, short: bool = True) -> np.ndarray | list[str]:
    """Return raw ids of any shape, flat: int64 [n], or a list of n strings; `like` is the kind that they must have.

    Raises TypeError for ids of another kind, mixed kinds, None, integers beyond int64; ValueError for strings of more than
    `MOST_CHARACTERS`, unless they need not be `short`, such as the values of a category.
    """
    wanted = "integers or strings, all of one kind" if like is None else f"{like} like the vocabulary"
    if not isinstance(raw, np.ndarray):
        nested = not isinstance(raw, list | tuple) or not NESTED.isdisjoint(map(type, raw))
        flat: Any = np.array(raw, object).reshape(-1).tolist() if nested else raw
    else:
        flat = raw.reshape(-1) if raw.dtype.kind in "iumM" else raw.reshape(-1).tolist()  # a list would make integers of ns
    if not len(flat):
        return np.zeros(0, np.int64)
    if isinstance(flat, np.ndarray):
        if flat.dtype == np.uint64 and flat.max() >= 2**63:
            raise TypeError(f"{name}: expected integers below 2^63, got {flat.max()}")
        ids = flat.astype(np.int64, copy=False) if flat.dtype.kind in "iu" else None
    else:
        ids = _of_objects(flat, name, wanted)
    if ids is None or like not in (None, "integers" if isinstance(ids, np.ndarray) else "strings"):
        got = type(flat[0]).__name__ if type(flat[0]) in NESTED else f"dtype {np.asarray(raw).dtype}"
        raise TypeError(f"{name}: expected {wanted.split(',')[0]}, got {got}")
    if short and isinstance(ids, list) and max(map(len, ids)) > MOST_CHARACTERS:
        expect_short(ids, name)
    return ids


def expect_short(values: Sequence[Any] | np.ndarray, name: str) -> None:
    """Raise ValueError for a string of more than `MOST_CHARACTERS` among values [n]; names the position."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "UT":
        narrow = values.dtype.kind == "U" and values.dtype.itemsize <= 4 * MOST_CHARACTERS
        if narrow or np.strings.str_len(values).max(initial=0) <= MOST_CHARACTERS:
            return
    for at, value in enumerate(values):
        if isinstance(value, str) and len(value) > MOST_CHARACTERS:
            got = f"{len(value)} at position {at}; give long ones a short id, such as a digest, in all data"
            raise ValueError(f"{name}: expected ids of at most {MOST_CHARACTERS} characters, got {got}")


def id_array(ids: np.ndarray | list[str]) -> np.ndarray:
    """Return ids [n] of `as_ids` as one array: integers as they are, strings as NumPy's StringDType, each at its length."""
    return ids if isinstance(ids, np.ndarray) else np.array(ids, np.dtypes.StringDType())


def _of_objects(values: Sequence[Any], name: str, wanted: str) -> np.ndarray | list[str] | None:
    """Convert Python values to ids; None if all share one type that is no id."""
    kinds = set(map(type, values))
    if all(issubclass(kind, str) for kind in kinds):
        return values if isinstance(values, list) else list(values)
    if all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds):
        try:
            return np.fromiter(values, np.int64, len(values))
        except OverflowError:
            beyond = next(value for value in values if not -(2**63) <= value < 2**63)
            raise TypeError(f"{name}: expected integers from -2^63 to below 2^63, got {beyond}") from None
    if len(kinds) == 1 and type(None) not in kinds:
        return None
    first = type(values[0])
    at = next((i for i, each in enumerate(values) if each is None or type(each) is bool or not isinstance(each, first)), 0)
    before = f"{first.__name__}, then " if at else ""
    raise TypeError(f"{name}: expected {wanted}, got {before}{type(values[at]).__name__} at position {at}")
