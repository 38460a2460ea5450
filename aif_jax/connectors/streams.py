"""Messages of an update stream, ordered by partition and position: what they carry, written and read."""

import itertools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from aif_jax.checks import expect
from aif_jax.readers.tables import pyarrow


class StreamError(RuntimeError):
    """A stream that cannot be followed: messages that were not applied yet are gone, or the broker refuses."""


class Message(NamedTuple):
    """One message.

    Attributes:
      partition, position: its place in the stream; positions rise within a partition, with gaps.
      key: raw item id.
      value: what `encode` made; None deletes the item that the key names.
      time: when it was written, seconds since 1970; None if unknown.
    """

    partition: int
    position: int
    key: bytes | None
    value: bytes | None
    time: float | None = None


MAX_BYTES = 64 << 20  # bytes of a message


def encode(table: Any) -> bytes:
    """Return raw items as the value of a message: a mapping of columns (arrays or lists), an Arrow record batch or table.

    Raises ValueError for columns of different lengths, no rows, or a message that is too large, ImportError without pyarrow.
    """
    arrow, ipc = pyarrow(), pyarrow("pyarrow.ipc")
    if isinstance(table, Mapping):
        table = {name: list(values) if getattr(values, "ndim", 1) == 2 else values for name, values in table.items()}
    table = arrow.table(table)
    expect(table.num_rows, "table", "at least one row", 0)
    sink = arrow.BufferOutputStream()
    with ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    value = sink.getvalue().to_pybytes()
    expect(len(value) <= MAX_BYTES, "message", f"at most {MAX_BYTES} bytes; split it", f"{len(value)}")
    return value


def tombstone_key(item: int | str) -> bytes:
    """Return the key of a message about one item, the JSON of its id; without a value, a tombstone, it deletes the item."""
    return json.dumps(item).encode()


def decode(message: Message) -> Any:
    """Return the content of a message: an Arrow table of raw columns, or a list of raw item ids that are deleted.

    Raises ValueError for one that is torn, foreign or too large.
    """
    where = f"message {message.position} of partition {message.partition}"
    if message.value is None:
        return [_tombstone(message.key, where)]
    expect(len(message.value) <= MAX_BYTES, where, f"at most {MAX_BYTES} bytes", len(message.value))
    arrow, ipc = pyarrow(), pyarrow("pyarrow.ipc")
    try:
        with ipc.open_stream(arrow.py_buffer(message.value)) as reader:
            table = reader.read_all()
        table.validate(full=True)
    except (arrow.ArrowException, OSError, ValueError, TypeError, LookupError, MemoryError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"{where}: expected an Arrow IPC stream, got {message.value[:16]!r}...: {first}") from error
    expect(table.num_rows, where, "rows", "a table of 0")
    return table


def joined(changes: list[Any]) -> list[Any]:
    """Return the same contents in the same order: neighbours of one kind, and of one schema, in one."""
    groups = itertools.groupby(changes, lambda change: getattr(change, "schema", None))
    return [sum(group, []) if schema is None else pyarrow().concat_tables(group) for schema, group in groups]


def _tombstone(key: bytes | None, where: str) -> int | str:
    try:
        item = json.loads(key or b"")
        expect(isinstance(item, int | str) and not isinstance(item, bool), "key", "an integer or a string", item)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{where}: expected a value, or a key that is the JSON of an item's id, got {key!r}") from error
    return item
