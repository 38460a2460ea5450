"""Encoded rows as Arrow record batches, as `engines.ItemJob` makes them, and the way back from such batches.

| column | type | holds |
|---|---|---|
| `id` | int64 or string | raw id |
| `row` | binary | the stored row: its words as little-endian bytes, see `storage.Packed` |
| `version` | string | fingerprint of params, config and encoder |
| `storage` | string | of vectors |
| `batch_size` | int32 | rows in one run of the function: two of them may differ in the last bit |

Every type is one that Parquet, Ray Data and Spark keep. Each row says what made it, so that parts of two models are never
mixed, whatever shuffles them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from aif_jax.checks import VersionMismatch, expect
from aif_jax.encoding.raw import plain
from aif_jax.encoding.vocabulary import Kind, as_ids
from aif_jax.export.consume.files import memory
from aif_jax.readers.tables import pyarrow
from aif_jax.store.codec import STORAGES, Storage


class RowVersion(NamedTuple):
    """What made some rows."""

    version: str
    storage: Storage
    batch_size: int


class Part(NamedTuple):
    """Encoded rows, and which batch of all they are."""

    name: str  # "batch 3"
    batch: Any  # Arrow record batch or table

    def locate(self, row: int) -> str:
        """Return where a row of these is."""
        return f"{self.name}, row {row}"


def schema(kind: Kind) -> Any:
    """Return the Arrow schema of encoded rows with ids of a kind."""
    arrow = pyarrow()
    named = {"id": arrow.int64() if kind == "integers" else arrow.string(), "row": arrow.binary()}
    stamp = {"version": arrow.string(), "storage": arrow.string(), "batch_size": arrow.int32()}
    return arrow.schema(named | stamp)


def to_batch(ids: np.ndarray, words: np.ndarray, stamp: RowVersion) -> Any:
    """Return an Arrow record batch of raw ids [n], int64 or strings, and the words uint32 [n, W] of their rows, below 2 GiB."""
    arrow, count = pyarrow(), len(words)
    limit = "encoded rows below 2 GiB, the limit of an Arrow array"
    expect(words.nbytes < 1 << 31, "batch_size", limit, f"{words.nbytes} bytes")
    data = np.ascontiguousarray(words.astype("<u4", copy=False))
    ends = np.arange(count + 1, dtype=np.int32) * np.int32(4 * data.shape[1])
    rows = arrow.Array.from_buffers(arrow.binary(), count, [None, arrow.py_buffer(ends), arrow.py_buffer(data)])
    integers = ids.dtype.kind == "i"
    columns = [arrow.array(ids) if integers else arrow.array(ids.tolist(), arrow.string()), rows]
    wanted = schema("integers" if integers else "strings")
    columns += [arrow.repeat(arrow.scalar(value, wanted.field(name).type), count) for name, value in stamp._asdict().items()]
    return arrow.RecordBatch.from_arrays(columns, schema=wanted)


def read(batches: Iterable[Any]) -> Iterator[Part]:
    """Yield numbered Arrow record batches; empty ones are left out. Raises TypeError for anything else."""
    if not isinstance(batches, Iterable) or hasattr(batches, "schema") or isinstance(batches, str):
        raise TypeError(f"parts: expected an iterable of Arrow batches, got {type(batches).__name__}")
    for number, batch in enumerate(batches):
        if not hasattr(batch, "schema"):
            raise TypeError(f"parts, batch {number}: expected Arrow record batches, got {type(batch).__name__}")
        if batch.num_rows:
            yield Part(f"batch {number}", batch)


def stored_by(parts: Iterable[Any], version: str, batch_size: int) -> tuple[RowVersion, Iterator[Part]]:
    """Return how rows of a version are stored, and the rows, see `read`: as the first says, or as float32 without any, in parts
    of that size. Raises ValueError for missing columns, or for what no job writes.
    """
    stream = read(parts)
    first = next(stream, None)
    if first is None:
        return RowVersion(version, "float32", batch_size), stream
    columns = _columns(first)
    stamp = RowVersion(*(columns[name][0].as_py() for name in RowVersion._fields))
    good = isinstance(stamp.version, str) and stamp.storage in STORAGES and type(stamp.batch_size) is int
    good = good and 1 <= stamp.batch_size <= memory()
    expect(good, first.locate(0), f"a version, one of {STORAGES} and a batch size", tuple(stamp))
    return stamp._replace(version=version), itertools.chain([first], stream)


def rows_of(part: Part, stamp: RowVersion, width: int) -> tuple[Any, np.ndarray]:
    """Return raw ids [n], int64 or a list of strings, and words uint32 [n, W = width]; raises as `ItemIndex.from_parts`."""
    columns = _columns(part)
    compute = pyarrow("pyarrow.compute")
    for name, expected in stamp._asdict().items():
        same = plain(compute.equal(columns[name], expected))
        if not same.all():
            at = int(np.argmin(same))
            got = columns[name][at].as_py()
            if name == "version":
                raise VersionMismatch(part.locate(at), expected=str(expected), got=str(got))
            raise ValueError(f"{part.locate(at)}: expected {name} {expected} as the rows before, got {got}")
    lengths = plain(compute.binary_length(columns["row"]))
    if (lengths != 4 * width).any():
        at = int(np.argmax(lengths != 4 * width))
        raise ValueError(f"{part.locate(at)}: expected a row of {4 * width} bytes, got {lengths[at]}")
    ids = as_ids(plain(columns["id"]), f"{part.name}, column 'id'")
    _, ends, data = columns["row"].buffers()
    start = int(np.frombuffer(ends, np.int32)[columns["row"].offset])
    words = np.frombuffer(data, np.uint8, len(lengths) * 4 * width, start).view("<u4")
    return ids, words.reshape(len(lengths), width).astype(np.uint32, copy=False)


def _columns(part: Part) -> dict[str, Any]:
    """Return the columns of `schema` by name, each one Arrow array without nulls; ValueError for others."""
    arrow, names = pyarrow(), ("id", "row", *RowVersion._fields)
    present = part.batch.schema.names
    missing = [name for name in names if present.count(name) != 1]
    expect(not missing, part.name, "columns id, row, version, storage and batch_size once each", f"{present}: no {missing}")
    type_, test = part.batch.schema.field("id").type, arrow.types
    type_ = type_.value_type if test.is_dictionary(type_) else type_
    text = test.is_string(type_) or test.is_large_string(type_)
    expect(text or test.is_integer(type_), f"{part.name}, column 'id'", "integers or strings", type_)
    wanted = schema("strings" if text else "integers")
    columns = {}
    for name in names:
        try:  # engines make other types of them: large, of a fixed size, dictionaries
            values = part.batch.column(name).cast(wanted.field(name).type)
        except arrow.ArrowException as error:
            got = f"{part.batch.schema.field(name).type}: {error}"
            raise ValueError(f"{part.name}, column {name!r}: expected {wanted.field(name).type}, got {got}") from error
        columns[name] = values.combine_chunks() if hasattr(values, "combine_chunks") else values
        if values.null_count:
            at = int(np.argmax(plain(values.is_null())))
            raise ValueError(f"{part.locate(at)}, column {name!r}: expected a value, got null; encode the items again")
    return columns
