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

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from aif_jax.checks import VersionMismatch, expect
from aif_jax.encoding.raw import plain
from aif_jax.encoding.vocabulary import IdKind
from aif_jax.index.ids import kind_of, raw_keys
from aif_jax.readers.tables import pyarrow
from aif_jax.store.codec import STORAGES, Storage


class RowVersion(NamedTuple):
    """What made some rows."""

    version: str
    storage: Storage
    batch_size: int


def schema(kind: IdKind) -> Any:
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


class EncodedParts:
    """Arrow batches of encoded rows, all made by one model in one way, in their order.

    Attributes:
      made_by: as the first row says; for no rows float32, in batches of `batch_size`.

    Raises TypeError, ValueError: no Arrow batches, missing columns, or a first row that no job writes.
    """

    def __init__(self, parts: Any, *, version: str, batch_size: int):
        if not isinstance(parts, Iterable) or hasattr(parts, "schema") or isinstance(parts, str):
            raise TypeError(f"parts: expected an iterable of Arrow batches, got {type(parts).__name__}")
        self._stream = _read(parts)
        self.made_by = RowVersion(version, "float32", batch_size)
        if (first := next(self._stream, None)) is not None:
            name, columns = first
            stamp = RowVersion(*(columns[field][0].as_py() for field in RowVersion._fields))
            good = stamp.storage in STORAGES and 1 <= stamp.batch_size < 1 << 31
            expect(good, f"{name}, row 0", f"a version, one of {STORAGES} and a batch size", tuple(stamp))
            self.made_by = stamp._replace(version=version)
            self._stream = itertools.chain([first], self._stream)

    def rows(self, width: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield keys [n] and words uint32 [n, W = width] of each batch, once; raises as `ItemIndex.from_parts`."""
        kind = None
        for name, columns in self._stream:
            self._expect_made_alike(name, columns)
            lengths = plain(pyarrow("pyarrow.compute").binary_length(columns["row"]))
            if (wrong := lengths != 4 * width).any():
                at = int(np.argmax(wrong))
                raise ValueError(f"{name}, row {at}: expected a row of {4 * width} bytes, got {lengths[at]}")
            keys = raw_keys(plain(columns["id"]), f"{name}, column 'id'", like=kind)
            kind = kind_of(keys)
            _, ends, data = columns["row"].buffers()
            offset = int(np.frombuffer(ends, np.int32)[columns["row"].offset])
            words = np.frombuffer(data, np.uint8, len(lengths) * 4 * width, offset).view("<u4")
            yield keys, words.reshape(len(lengths), width).astype(np.uint32, copy=False)

    def _expect_made_alike(self, name: str, columns: dict[str, Any]) -> None:
        """Raise VersionMismatch for a row of another version, ValueError for one that is stored in another way."""
        for field, expected in self.made_by._asdict().items():
            same = plain(pyarrow("pyarrow.compute").equal(columns[field], expected))
            if not same.all():
                at = int(np.argmin(same))
                got = columns[field][at].as_py()
                if field == "version":
                    raise VersionMismatch(f"{name}, row {at}", expected=str(expected), got=str(got))
                raise ValueError(f"{name}, row {at}: expected {field} {expected} as the rows before, got {got}")


def _read(batches: Iterable[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and columns of batches that have rows: Arrow arrays of the types of `schema`, without nulls."""
    arrow, names = pyarrow(), ("id", "row", *RowVersion._fields)
    for number, batch in enumerate(batches):
        name = f"batch {number}"
        expect(hasattr(batch, "schema"), f"parts, {name}", "Arrow record batches", type(batch).__name__, error=TypeError)
        if not batch.num_rows:
            continue
        present = batch.schema.names
        missing = [each for each in names if present.count(each) != 1]
        expect(not missing, name, "columns id, row, version, storage and batch_size once each", f"{present}: no {missing}")
        id_type = batch.schema.field("id").type
        id_type = id_type.value_type if arrow.types.is_dictionary(id_type) else id_type
        text = arrow.types.is_string(id_type) or arrow.types.is_large_string(id_type)
        expect(text or arrow.types.is_integer(id_type), f"{name}, column 'id'", "integers or strings", id_type)
        yield name, {field.name: _column(batch, field, name) for field in schema("strings" if text else "integers")}


def _column(batch: Any, field: Any, name: str) -> Any:
    """Return a column as an Arrow array of the field's type: engines make other types of them, large or dictionaries."""
    where = f"{name}, column {field.name!r}"
    try:
        values = batch.column(field.name).cast(field.type)
    except pyarrow().ArrowException as error:
        raise ValueError(f"{where}: expected {field.type}, got {batch.schema.field(field.name).type}: {error}") from error
    if values.null_count:
        at = int(np.argmax(plain(values.is_null())))
        raise ValueError(f"{name}, row {at}, column {field.name!r}: expected a value, got null; encode the items again")
    return values.combine_chunks() if hasattr(values, "combine_chunks") else values
