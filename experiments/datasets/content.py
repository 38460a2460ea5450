"""Content embeddings of a catalogue: looked up by item, scaled to unit length, and clustered as categories."""

from __future__ import annotations

import os
from typing import TypeAlias

import numpy as np

from aif_jax.encoding.vocabulary import Vocabulary

Content: TypeAlias = str | os.PathLike | tuple[np.ndarray, np.ndarray]
"""(raw item ids [n], embeddings [n, E]), or a path to an .npz with `embedding` and one other array, the raw item ids."""


def unit_rows(array: np.ndarray) -> np.ndarray:
    """Return the rows scaled to unit length, in float32; rows of zeros stay zeros."""
    array = np.asarray(array, np.float32)
    norm = np.linalg.norm(array, axis=1, keepdims=True)
    return array / np.where(norm > 0, norm, 1)


def clusters(content: np.ndarray, count: int) -> np.ndarray:
    """Cluster items by content float [n, E] with k-means: int32 [n] in [0, count), the same every time."""
    if not 1 <= count <= len(content):
        raise ValueError(f"clusters: expected a count from 1 to {len(content)} (items), got {count}")
    try:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError('clusters needs scikit-learn: pip install "aif_jax[experiments]"') from error
    with threadpool_limits(1):  # with more threads sums may come out in another order, and borderline items move
        labels = KMeans(count, max_iter=30, random_state=0).fit_predict(np.asarray(content, np.float32))
    return labels.astype(np.int32)


def lookup(content: Content, items: np.ndarray) -> np.ndarray:
    """Return the embeddings float32 [n, E] of raw items [n]. Raises ValueError for items without one."""
    if not isinstance(content, tuple):
        with np.load(content) as arrays:
            (name,) = set(arrays) - {"embedding"}
            content = arrays[name], arrays["embedding"]
    ids, embedding = content
    known = Vocabulary(ids)
    rows = known.encode(items)
    if len(missing := items[rows == 0]):
        raise ValueError(
            f"content: expected an embedding for each of {len(items)} items, got none for {len(missing)}: "
            f"{', '.join(map(str, missing[:5]))}"
        )
    return embedding.astype(np.float32)[np.argsort(known.encode(ids))][rows - 1]
