"""Catalogues in Arrow and Parquet as batches of features.

One column for each item attribute (a list for a multi-valued one, shorter lists are filled up with 0), for each side value, and
where the schema has them `floats`, `content` and `signature` as lists of fixed length; one column of ids, integers or strings.
Needs the `data` extra. Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax.data.schema import Schema
from aif_jax.index.idmap import raw_ids
from aif_jax.types import ItemFeatures

ID_COLUMN = "id"
ROWS = 1 << 16  # read from a file in one go


def parquet_batches(
    path: str | Path, schema: Schema, *, id_column: str = ID_COLUMN
) -> Iterator[tuple[np.ndarray, ItemFeatures]]:
    """Pairs (ids [n], features [n]) of a Parquet file or directory, in bounded memory.

    Raises:
      ImportError: pyarrow is not installed.
      FileNotFoundError: nothing at `path`.
      ValueError, TypeError: a column that is missing or does not fit the schema.
    """
    for batch in record_batches(path):
        yield from_arrow(batch, schema, id_column=id_column)


def record_batches(path: str | Path) -> Iterator[Any]:
    """Arrow record batches of a Parquet file or directory, in the order of file names."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no Parquet file or directory")
    dataset = _pyarrow("pyarrow.dataset").dataset(str(path), format="parquet")
    yield from (batch for batch in dataset.to_batches(batch_size=ROWS) if batch.num_rows)


def from_arrow(batch: Any, schema: Schema, *, id_column: str = ID_COLUMN) -> tuple[np.ndarray, ItemFeatures]:
    """(ids int64 [n], features [n]) of an Arrow record batch or table.

    Raises:
      ImportError: pyarrow is not installed.
      ValueError: a column that is missing, holds nulls, or lists of the wrong length.
    """
    names = set(batch.schema.names)

    def column(name: str) -> Any:
        if name not in names:
            raise ValueError(f"catalogue: expected a column {name!r}, got {sorted(names)}")
        values = batch.column(name)
        values = values.combine_chunks() if hasattr(values, "combine_chunks") else values
        if values.null_count:
            raise ValueError(f"catalogue column {name!r}: expected no nulls, got {values.null_count}")
        return values

    def numbers(name: str, dtype: Any) -> np.ndarray:
        return _cast(column(name).to_numpy(zero_copy_only=False), name, dtype)

    def lists(name: str, length: int | None, dtype: Any, *, shorter: bool = False) -> np.ndarray:
        return _cast(_lists(column(name), name, length, shorter=shorter), name, dtype)

    content = lists("content", schema.content, np.float32) if schema.content and "content" in names else None
    signature = lists("signature", None, np.uint32) if "signature" in names else None
    return raw_ids(column(id_column).to_numpy(zero_copy_only=False), f"catalogue column {id_column!r}"), ItemFeatures(
        ids={
            a.name: numbers(a.name, np.int32) if a.length == 1 else lists(a.name, a.length, np.int32, shorter=True)
            for a in schema.item_attributes
        },
        floats=lists("floats", schema.item_floats, np.float32)
        if schema.item_floats
        else np.zeros((batch.num_rows, 0), np.float32),
        content=content,
        signature=signature,
        side={name: numbers(name, np.float32) for name in schema.side},
    )


def _lists(values: Any, name: str, length: int | None, *, shorter: bool) -> np.ndarray:
    """A column of lists as [n, length]."""
    types = _pyarrow("pyarrow").types
    if types.is_fixed_size_list(values.type):
        array = values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), values.type.list_size)
    elif types.is_list(values.type) or types.is_large_list(values.type):
        offsets = values.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
        counts = np.diff(offsets)
        width = int(counts.max(initial=0)) if length is None else max(length, int(counts.max(initial=0)))
        flat = values.values.slice(offsets[0], offsets[-1] - offsets[0]).to_numpy(zero_copy_only=False)
        array = np.zeros((len(values), width), flat.dtype)
        within = np.arange(len(flat)) - np.repeat(offsets[:-1] - offsets[0], counts)
        array[np.repeat(np.arange(len(values)), counts), within] = flat
        if not shorter and len(counts) and counts.min() < width:
            raise ValueError(f"catalogue column {name!r}: expected lists of {width}, got one of {counts.min()}")
    else:
        raise ValueError(f"catalogue column {name!r}: expected lists, got {values.type}")
    if length is not None and array.shape[1] != length:
        raise ValueError(f"catalogue column {name!r}: expected lists of {length}, got one of {array.shape[1]}")
    return array


def _cast(values: np.ndarray, name: str, dtype: Any) -> np.ndarray:
    """Integers stay integers, and none loses its value."""
    if np.issubdtype(dtype, np.integer) and values.dtype.kind not in "iu":
        raise TypeError(f"catalogue column {name!r}: expected integers, got {values.dtype.name}")
    if not np.issubdtype(dtype, np.integer) and values.dtype.kind not in "iuf":
        raise TypeError(f"catalogue column {name!r}: expected numbers, got {values.dtype.name}")
    cast = values.astype(dtype, copy=False)
    if np.issubdtype(dtype, np.integer) and not np.array_equal(cast, values):
        raise ValueError(f"catalogue column {name!r}: expected values that fit {np.dtype(dtype).name}")
    return cast


def _pyarrow(module: str) -> Any:
    try:
        return __import__(module, fromlist=["*"])
    except ImportError as error:
        raise ImportError("Arrow and Parquet catalogues need pyarrow: pip install 'aif_jax[data]'") from error
