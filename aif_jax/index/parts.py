"""Encoded rows as Arrow record batches, as `engines.ItemJob` makes them, and the way back from such batches.

| column | type | holds |
|---|---|---|
| `id` | int64 or string | raw id |
| `row` | binary | the stored row: its words as little-endian bytes, see `store.codec.Packed` |
| `made_by` | string | what made the row, see `RowVersion` |

Every type is one that Parquet, Ray Data and Spark keep. Each row says what made it, so that parts of two models never mix.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Self

import numpy as np

from aif_jax.checks import VersionMismatch, expect
from aif_jax.encoding.raw import plain
from aif_jax.encoding.vocabulary import IdKind
from aif_jax.index.ids import kind_of, raw_keys
from aif_jax.readers.tables import pyarrow
from aif_jax.store.codec import STORAGES, Storage


class RowVersion(NamedTuple):
    """What made some rows; as text "VERSION STORAGE BATCH_SIZE"."""

    version: str  # fingerprint of params, config and encoder
    storage: Storage  # of vectors
    batch_size: int  # rows in one run of the function: two of them may differ in the last bit

    def __str__(self) -> str:
        return " ".join(map(str, self))

    @classmethod
    def parse(cls, text: str, where: str) -> Self:
        """Return what a text says; ValueError for one that no job writes."""
        words = text.split()
        good = len(words) == 3 and words[1] in STORAGES and words[2].isdecimal() and 1 <= int(words[2]) < 1 << 31
        expect(good, where, f"a version, one of {STORAGES} and a batch size", repr(text))
        return cls(words[0], words[1], int(words[2]))  # type: ignore[arg-type]  one of STORAGES


def schema(kind: IdKind) -> Any:
    """Return the Arrow schema of encoded rows with ids of a kind."""
    arrow = pyarrow()
    ids = arrow.int64() if kind == "integers" else arrow.string()
    return arrow.schema({"id": ids, "row": arrow.binary(), "made_by": arrow.string()})


def to_batch(ids: np.ndarray, words: np.ndarray, made_by: RowVersion) -> Any:
    """Return an Arrow record batch of raw ids [n], int64 or strings, and the words uint32 [n, W] of their rows, below 2 GiB."""
    arrow, count = pyarrow(), len(words)
    limit = "encoded rows below 2 GiB, the limit of an Arrow array"
    expect(words.nbytes < 1 << 31, "batch_size", limit, f"{words.nbytes} bytes")
    data = arrow.py_buffer(np.ascontiguousarray(words.astype("<u4", copy=False)))
    rows = arrow.FixedSizeBinaryArray.from_buffers(arrow.binary(4 * words.shape[1]), count, [None, data])
    wanted = schema("integers" if ids.dtype.kind == "i" else "strings")
    columns = [arrow.array(ids.tolist(), wanted.field("id").type), rows.cast(arrow.binary())]
    return arrow.RecordBatch.from_arrays([*columns, arrow.repeat(str(made_by), count)], schema=wanted)


def opened(parts: Iterable[Any], made_by: RowVersion) -> tuple[RowVersion, Iterator[tuple[str, Any]]]:
    """Return storage and batch size of the first row in `made_by`, if there is one, and the `_tables` of parts."""
    tables = _tables(parts)
    if (first := next(tables, None)) is None:
        return made_by, tables
    name, table = first
    stamp = RowVersion.parse(str(table.column("made_by")[0]), f"{name}, row 0")
    return stamp._replace(version=made_by.version), itertools.chain([first], tables)


def rows(tables: Iterable[tuple[str, Any]], made_by: RowVersion, *, width: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield keys [n] and words uint32 [n, W = width] of each table; raises as `ItemIndex.from_parts`."""
    arrow, compute, kind = pyarrow(), pyarrow("pyarrow.compute"), None
    for name, table in tables:
        same = plain(compute.equal(table.column("made_by"), str(made_by)))
        if not same.all():
            got = str(table.column("made_by")[at := int(np.argmin(same))])
            raise VersionMismatch(f"{name}, row {at}", expected=str(made_by), got=got)
        lengths = plain(compute.binary_length(table.column("row")))
        at = int(np.argmax(lengths != 4 * width))
        expect(lengths[at] == 4 * width, f"{name}, row {at}", f"a row of {4 * width} bytes", lengths[at])
        keys = raw_keys(plain(table.column("id")), f"{name}, column 'id'", like=kind)
        kind, data = kind_of(keys), table.column("row").chunk(0).cast(arrow.binary(4 * width))
        words = np.frombuffer(data.buffers()[1], "<u4", len(keys) * width, data.offset * 4 * width)
        yield keys, words.reshape(len(keys), width).astype(np.uint32, copy=False)


def _tables(parts: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and Arrow table, in one piece, of each part that has rows; ids may have any type, as engines make them."""
    arrow, wanted = pyarrow(), schema("strings")
    expect(isinstance(parts, Iterable), "parts", "an iterable of Arrow batches", type(parts).__name__, error=TypeError)
    for number, part in enumerate(parts):
        name = f"batch {number}"
        expect(hasattr(part, "schema"), f"parts, {name}", "Arrow record batches", type(part).__name__, error=TypeError)
        try:
            table = arrow.table(part).select(wanted.names).combine_chunks()
            table = table.cast(wanted.set(0, table.schema.field("id")))
        except (KeyError, arrow.ArrowException) as error:
            got = ", ".join(f"{field.name}: {field.type}" for field in part.schema)
            raise ValueError(f"{name}: expected columns id, row and made_by once each, got {got} ({error})") from error
        for column in wanted.names:
            nulls = table.column(column).null_count
            expect(not nulls, f"{name}, column {column!r}", "values", f"{nulls} nulls; encode the items again")
        if table.num_rows:
            yield name, table
