"""Columns of raw values as they come: lists, NumPy arrays, Arrow arrays; in a mapping, an Arrow batch or an Arrow table.

Arrow arrays are used through their methods, so pyarrow need not be installed.
"""

import decimal
import numbers
from typing import Any

import numpy as np

from aif_jax.checks import expect

NUMBERS = (numbers.Real, decimal.Decimal, np.bool_)


def names_in(table: Any) -> list[str]:
    """Return the columns of a mapping, a data frame, or an Arrow batch or table."""
    return table.column_names if hasattr(table, "column_names") else list(getattr(table, "columns", table))


def column_of(table: Any, name: str) -> Any:
    """Return a column of events, as `names_in` takes them, as a list or a NumPy array."""
    expect(name in (present := names_in(table)), "events", f"a column {name!r}", present)
    values = plain(table.column(name) if hasattr(table, "column_names") else table[name])
    values = list(values) if isinstance(values, list | tuple) else np.asarray(values)
    if not (isinstance(values, list) or values.ndim):
        raise ValueError(f"events, column {name!r}: expected a list of values, got {table[name]!r:.80}")
    return values


def plain(values: Any) -> Any:
    """Return Arrow values as NumPy, or as a list where some are missing or lists; others as they are."""
    if not hasattr(values, "to_pylist"):
        return values
    for step in ("combine_chunks", "dictionary_decode"):
        values = getattr(values, step)() if hasattr(values, step) else values
    if getattr(values.type, "scale", 1) == 0:  # whole decimals, as databases have them
        try:
            values = values.cast("int64")
        except ValueError:  # ids from 2^63 on, which files have as text
            values = values.cast("string")
    listed = values.null_count or hasattr(values, "value_lengths")
    return values.to_pylist() if listed else values.to_numpy(zero_copy_only=False)


def select(values: list[Any] | np.ndarray, at: np.ndarray | None) -> Any:
    """Return some values of a column; None for all of them."""
    return values if at is None else [values[i] for i in at] if isinstance(values, list) else values[at]


def expect_1d(array: np.ndarray, where: str, what: str = "value") -> np.ndarray:
    """Check that a column is one-dimensional and return it; raises ValueError with its shape."""
    expect(array.ndim == 1, where, f"one {what} in each row", f"shape {list(array.shape)}")
    return array


def float_of(value: Any, where: str) -> np.float32:
    """Return ONE number as float32; TypeError for anything else, ValueError for a number that is not finite."""
    if not isinstance(value, NUMBERS):
        raise TypeError(f"{where}: expected a number, got {value!r:.80}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        try:
            number = np.float32(float(value))
        except OverflowError:
            raise ValueError(f"{where}: expected a finite float32, got an integer that is too large") from None
    expect(np.isfinite(number), where, "a finite float32", value)
    return number
