"""Arrow IPC as a body of the HTTP route: a stream of one record batch with one row, a column for each field of a call.

Arrays are list columns (`candidates: list<int64>`), and GROUP.NAME is a value in a group of fields, such as `events.item`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from aif_jax.readers.sources import pyarrow
from aif_jax.service.calls import BadCall
from aif_jax.service.tensors import put

CONTENT_TYPE = "application/vnd.apache.arrow.stream"
MOST_COLUMNS = 256


def unpack(body: bytes) -> dict[str, Any]:
    """The fields of a body, numbers without a copy. Raises BadCall for what is no such stream, ImportError without pyarrow."""
    arrow = pyarrow()
    try:
        _expect_plain(body)
        (batch,) = pyarrow("pyarrow.ipc").open_stream(body)
        batch.validate(full=True)
        if batch.num_rows != 1 or batch.num_columns > MOST_COLUMNS:
            raise BadCall("body", f"expected one row of at most {MOST_COLUMNS} columns, got {batch.num_rows} rows")
        fields: dict[str, Any] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            put(fields, name, _value(arrow, column, name[:80]))
        return fields
    except BadCall:
        raise
    except (arrow.ArrowException, OSError, ValueError, struct.error) as error:
        raise BadCall("body", f"expected an Arrow stream of one record batch: {error}") from None


def pack(fields: Mapping[str, Any]) -> bytes:
    """A body of fields.

    Example:
      >>> unpack(pack({"user": "ann", "candidates": np.arange(3), "k": 2}))
      {'user': 'ann', 'candidates': array([0, 1, 2]), 'k': 2}
    """
    arrow, sink = pyarrow(), pyarrow().BufferOutputStream()
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    batch = arrow.record_batch({name: _column(arrow, value) for name, value in flat.items()})
    with pyarrow("pyarrow.ipc").new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _column(arrow: Any, value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "biuf":
        return arrow.ListArray.from_arrays([0, len(value)], arrow.array(value))
    return arrow.array([value.tolist() if isinstance(value, np.ndarray) else value])


def _value(arrow: Any, column: Any, name: str) -> Any:
    """The one value of a column: a scalar, or of a list column an array, a list where it has strings or nulls."""
    kinds, kind = arrow.types, column.type
    listed = kinds.is_list(kind) or kinds.is_large_list(kind)
    inner = kind.value_type if listed else kind
    numbers = kinds.is_integer(inner) or kinds.is_floating(inner) or kinds.is_boolean(inner)
    if not numbers and not kinds.is_string(inner) and not kinds.is_large_string(inner) and not kinds.is_null(inner):
        raise BadCall(name, f"expected numbers, strings or lists of them, got {kind}")
    if not listed or not column.is_valid()[0].as_py():
        return column[0].as_py()
    values = column.flatten()
    return values.to_numpy(zero_copy_only=False) if numbers and not values.null_count else values.to_pylist()


def _expect_plain(body: bytes) -> None:
    """Raises BadCall for compressed buffers, which could be of any size once they are not, and for dictionaries with such."""
    reader = pyarrow("pyarrow.ipc").MessageReader.open_stream(body)
    for message in iter(reader.read_next_message, None):
        if message.type not in ("schema", "record batch"):
            raise BadCall("body", f"expected a schema and a record batch, got a {message.type}")
        if message.type == "record batch" and _is_compressed(message.metadata.to_pybytes()):
            raise BadCall("body", "expected buffers that are not compressed")


def _is_compressed(metadata: bytes) -> bool:
    """Whether the flatbuffer `Message` has a `RecordBatch` with the field `compression`, after the format's Message.fbs."""

    def field(table: int, slot: int) -> int:
        """Where a field of a table is; 0 where it is absent."""
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        size = struct.unpack_from("<H", metadata, vtable)[0]
        offset = struct.unpack_from("<H", metadata, vtable + 4 + 2 * slot)[0] if 4 + 2 * slot < size else 0
        return table + offset if offset else 0

    header = field(struct.unpack_from("<I", metadata)[0], 2)
    return field(header + struct.unpack_from("<I", metadata, header)[0], 3) > 0
