"""Content embeddings from elsewhere than the items file: given arrays, or an .npz."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np

from aif_jax.checks import expect
from aif_jax.encoding.vocabulary import Vocabulary

Content: TypeAlias = str | os.PathLike | tuple[np.ndarray, np.ndarray]
"""(raw item ids [n], embeddings [n, E]), or a path to an .npz with `embedding` and one other array, the raw item ids."""


def load(content: Content) -> tuple[np.ndarray, np.ndarray]:
    """Raw item ids [n] and float32 [n, E]. Raises ValueError for wrong arrays, values that are not finite, an id twice."""
    if isinstance(content, tuple):
        where = "content"
        ids, embedding = (np.asarray(part) for part in content)
    else:
        where = str(content)
        ids, embedding = _read_npz(Path(content))
    numbers = embedding.ndim == 2 and embedding.dtype.kind in "fiu" and embedding.shape[1] > 0
    expect(numbers, where, "numbers of shape [items, E]", f"{embedding.dtype} {list(embedding.shape)}")
    one_each = ids.shape == embedding.shape[:1]
    expect(one_each, where, f"one id for each of {len(embedding)} rows", f"ids of shape {list(ids.shape)}")
    embedding = embedding.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(embedding).all(axis=1))
    if bad.size:
        raise ValueError(f"{where}: expected finite values, got NaN or infinity for item {ids[bad[0]]} (row {bad[0]})")
    unique, count = np.unique(ids, return_counts=True)
    if len(unique) != len(ids):
        raise ValueError(f"{where}: expected each item once, got item {unique[count > 1][0]} more than once")
    return ids, embedding


def lookup(content: Content) -> Callable[[np.ndarray], np.ndarray]:
    """A function from raw item ids [n] to their embeddings float32 [n, E]; it raises ValueError for an item without one."""
    ids, embedding = load(content)
    known = Vocabulary(ids)
    embedding = embedding[np.argsort(known.encode(ids))]

    def rows_of(items: np.ndarray) -> np.ndarray:
        rows = known.encode(items)
        missing = np.asarray(items)[rows == 0]
        got = f"none for {missing.size}: {', '.join(map(str, missing[:5]))}"
        expect(not missing.size, "content", f"an embedding for each of {len(rows)} items", got)
        return embedding[rows - 1]

    return rows_of


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    expected = "an .npz with a content embedding"
    expect(path.is_file(), f"{path}", expected, "no such file")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = list(arrays)
            others = [name for name in names if name != "embedding"]
            if "embedding" in names and len(others) == 1:
                return arrays[others[0]], arrays["embedding"]
    except Exception as error:
        raise ValueError(f"{path}: expected {expected}, got one that does not load: {error}") from error
    raise ValueError(f"{path}: expected `embedding` and one array of item ids, got {names}")
