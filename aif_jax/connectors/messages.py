"""Messages of update streams: Arrow IPC streams of raw items or raw events, as the files have them; and deletions."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np

from aif_jax.checks import expect
from aif_jax.connectors.streams import Message
from aif_jax.encoding.raw import column_of
from aif_jax.readers.sources import pyarrow

DELETED = b"aif_jax.deleted"  # in the metadata of a schema: the batch names items to delete
LARGEST = 64 << 20  # bytes of a message


class MessageError(ValueError):
    """A message that is no Arrow IPC stream of raw columns, and no tombstone."""


class Change(NamedTuple):
    """What a message says."""

    table: Any  # Arrow table of raw columns; None for a deletion
    deleted: Any  # raw item ids; None for a table


def encode(table: Any) -> bytes:
    """Raw items or events by column as the value of a message.

    Args:
      table: a mapping of columns (arrays or lists), an Arrow record batch or an Arrow table.

    Raises:
      ImportError: pyarrow is missing.
      ValueError: columns of different lengths, no rows, or more bytes than a message may have.
    """
    return _written(_table(table))


def encode_deleted(ids: Any, *, column: str = "item") -> bytes:
    """A deletion of items, by raw id, as the value of a message; arguments and errors as `encode`.

    A Kafka tombstone does the same: a message without a value, whose key is the JSON of one id (`tombstone_key`).
    """
    return _written(_table({column: ids}).replace_schema_metadata({DELETED: b"1"}))


def tombstone_key(item: int | str) -> bytes:
    """The key of a message about one item; without a value it deletes the item."""
    return json.dumps(item).encode()


def decode(message: Message) -> Change:
    """What a message says. Raises MessageError for one that is torn, foreign or too large."""
    where = f"message {message.position} of partition {message.partition}"
    if message.value is None:
        return Change(None, [_tombstone(message.key, where)])
    if len(message.value) > LARGEST:
        raise MessageError(f"{where}: expected at most {LARGEST} bytes, got {len(message.value)}")
    arrow, ipc = pyarrow(), pyarrow("pyarrow.ipc")
    try:
        with ipc.open_stream(arrow.py_buffer(message.value)) as reader:
            table = reader.read_all()
        table.validate(full=True)
    except (arrow.ArrowException, OSError, ValueError, TypeError, LookupError, MemoryError) as error:
        first = str(error).partition("\n")[0]
        raise MessageError(f"{where}: expected an Arrow IPC stream, got {message.value[:16]!r}...: {first}") from error
    if table.num_rows == 0:
        raise MessageError(f"{where}: expected rows, got none")
    if (table.schema.metadata or {}).get(DELETED) != b"1":
        return Change(table, None)
    if table.num_columns != 1:
        raise MessageError(f"{where}: expected one column of ids to delete, got {table.schema.names}")
    return Change(None, column_of(table, table.schema.names[0]).to_pylist())


def joined(changes: list[Change]) -> list[Change]:
    """The same changes in the same order: neighbours of one kind, and of one schema, in one."""
    arrow = pyarrow()
    groups: list[list[Change]] = []
    for change in changes:
        last = groups[-1][-1] if groups else None
        alike = last is not None and (last.table is None) == (change.table is None)
        if alike and last is not None and (change.table is None or last.table.schema.equals(change.table.schema)):
            groups[-1].append(change)
        else:
            groups.append([change])
    return [
        Change(None, [item for change in group for item in change.deleted])
        if group[0].table is None
        else Change(arrow.concat_tables([change.table for change in group]), None)
        for group in groups
    ]


def _table(table: Any) -> Any:
    arrow = pyarrow()
    if isinstance(table, arrow.RecordBatch):
        table = arrow.Table.from_batches([table])
    if not isinstance(table, arrow.Table):
        table = arrow.table({name: _column(values) for name, values in table.items()})
    expect(table.num_rows, "table", "at least one row", 0)
    return table.combine_chunks()


def _column(values: Any) -> Any:
    array = np.asarray(values) if not hasattr(values, "drop_null") else values
    two = isinstance(array, np.ndarray) and array.ndim == 2
    return list(array) if two else values if isinstance(values, list) else array


def _written(table: Any) -> bytes:
    arrow, ipc = pyarrow(), pyarrow("pyarrow.ipc")
    sink = arrow.BufferOutputStream()
    with ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    value = sink.getvalue().to_pybytes()
    expect(len(value) <= LARGEST, "message", f"at most {LARGEST} bytes; split it", f"{len(value)}")
    return value


def _tombstone(key: bytes | None, where: str) -> int | str:
    try:
        item = json.loads(key or b"")
        expect(isinstance(item, int | str) and not isinstance(item, bool), "key", "an integer or a string", item)
    except (ValueError, TypeError, RecursionError) as error:
        raise MessageError(f"{where}: expected a value, or a key that is the JSON of an item's id, got {key!r}") from error
    return item
