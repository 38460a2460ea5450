"""Names batch and row of raw input that a job cannot take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from aif_jax.readers.sources import pyarrow


class Numbered(NamedTuple):
    """Some rows of a batch."""

    number: int  # of the batch in its iterator, from 0
    first: int  # the row of the batch that is the first here
    batch: Any  # Arrow record batch


def refuse(given: Sequence[Numbered], check: Callable[[Any], object], error: Exception, *, id_column: str) -> NoReturn:
    """Raises the error that `check` raised of some rows, with the batch and the first row that it refuses.

    Halves the rows, so it takes a few more calls; an error of no row, such as a missing column, names the batch alone.
    """
    arrow = pyarrow()
    table = arrow.Table.from_batches([one.batch for one in given]).combine_chunks()
    where = (
        f"batch {given[0].number}"
        if given[0].number == given[-1].number
        else f"batches {given[0].number} to {given[-1].number}"
    )
    if not _fails(check, table.slice(0, 0)) and _fails(check, table):
        good, bad = 0, table.num_rows  # rows that pass, rows that do not
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (good, middle) if _fails(check, table.slice(0, middle)) else (middle, bad)
        number, row = _place(given, good)
        name = repr(table.column(id_column)[good].as_py()) if id_column in table.schema.names else "unknown"
        where, error = f"batch {number}, row {row} ({id_column} {name})", _error(check, table.slice(good, 1)) or error
    kind = TypeError if isinstance(error, TypeError) else ValueError
    raise kind(f"{where}: {error}") from error


def _place(given: Sequence[Numbered], row: int) -> tuple[int, int]:
    for one in given:
        if row < one.batch.num_rows:
            return one.number, one.first + row
        row -= one.batch.num_rows
    raise IndexError(row)


def _fails(check: Callable[[Any], object], table: Any) -> bool:
    return _error(check, table) is not None


def _error(check: Callable[[Any], object], table: Any) -> Exception | None:
    try:
        check(table)
    except (TypeError, ValueError) as error:
        return error
    return None
