"""Columns of raw values as they come: lists, NumPy arrays, Arrow arrays; in a mapping, an Arrow batch or an Arrow table.

Arrow arrays are used through their methods, so pyarrow need not be installed.
"""

import decimal
import numbers
from typing import Any

import numpy as np

from aif_jax.checks import expect, expect_finite

NUMBERS = (numbers.Real, decimal.Decimal, np.bool_, type(None))  # a missing one becomes NaN


def names_in(table: Any) -> list[str]:
    """Return the columns of a mapping or of an Arrow batch or table."""
    return table.schema.names if hasattr(table, "schema") else list(table)


def column_of(table: Any, name: str) -> Any:
    """Return a column of a mapping or of an Arrow batch or table as a list or a NumPy array."""
    if name not in (present := names_in(table)):
        raise ValueError(f"expected a column {name!r}, got {present}")
    values = plain(table.column(name) if hasattr(table, "schema") else table[name])
    values = values if isinstance(values, list | np.ndarray) else np.asarray(values)
    if not (isinstance(values, list) or values.ndim):
        raise ValueError(f"column {name!r}: expected a list of values, got {table[name]!r:.80}")
    return values


def plain(values: Any) -> Any:
    """Return Arrow values as NumPy, [n, m] of lists of one length, or as a list where some are missing; others as they are."""
    if not hasattr(values, "to_pylist"):
        return values
    for step in ("combine_chunks", "dictionary_decode"):
        values = getattr(values, step)() if hasattr(values, step) else values
    if not values.null_count and hasattr(values, "value_lengths") and len(values):
        flat, lengths = values.flatten(), values.value_lengths().to_numpy(zero_copy_only=False)
        if not flat.null_count and (lengths == lengths[0]).all():
            return flat.to_numpy(zero_copy_only=False).reshape(len(values), -1)
    listed = values.null_count or hasattr(values, "value_lengths")
    return values.to_pylist() if listed else values.to_numpy(zero_copy_only=False)


def select(values: list[Any] | np.ndarray, at: np.ndarray | slice) -> Any:
    """Return some values of a column; a slice means all of them."""
    return values if isinstance(at, slice) else [values[i] for i in at] if isinstance(values, list) else values[at]


def drop_missing(values: Any) -> tuple[np.ndarray, Any]:
    """Return which values are not missing, bool [n], and these values."""
    if isinstance(values, np.ndarray) and values.dtype.kind != "O":
        return np.ones(len(values), bool), values
    present = np.array([value is not None and value == value for value in values], bool)  # pandas marks a missing one by NaN
    return present, [value for value, there in zip(values, present, strict=True) if there]


def flat_lists(values: Any, separator: str | None = None) -> tuple[Any, np.ndarray, np.ndarray]:
    """Return the values of n lists, and for each its row and its place in the list; text is split, None is an empty list."""
    if isinstance(values, np.ndarray) and values.ndim == 2:
        lengths, flat = np.full(len(values), values.shape[1]), values.reshape(-1)
    else:
        lists = [[] if v is None else v.split(separator) if isinstance(v, str) else v for v in values]
        lengths, flat = np.array(list(map(len, lists)), np.int64), [value for one in lists for value in one]
    row = np.repeat(np.arange(len(lengths)), lengths)
    return flat, row, np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def expect_1d(array: np.ndarray, where: str, what: str = "value") -> np.ndarray:
    """Check that a column is one-dimensional and return it; raises ValueError with its shape."""
    expect(array.ndim == 1, where, f"one {what} in each row", f"shape {list(array.shape)}")
    return array


def floats_of(values: Any, name: str, *, file: str = "") -> np.ndarray:
    """Return float32 [n] of numbers; raises where one is not a finite number, or a list of them."""
    where = f"{file}column {name!r}"
    array = expect_1d(np.asarray(values), where, "number")
    strange = {type(value).__name__ for value in array if not isinstance(value, NUMBERS)} if array.dtype.kind == "O" else set()
    if array.dtype.kind not in "iufbO" or strange:
        raise TypeError(f"{where}: expected numbers, got {', '.join(sorted(strange)) or f'dtype {array.dtype}'}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is found below
        try:
            array = array.astype(np.float64).astype(np.float32)
        except OverflowError:
            raise ValueError(f"{where}: expected finite values, got an integer that is too large") from None
    expect_finite(array, where)
    return array
