"""Content embeddings of a catalogue: looked up by item, scaled to unit length, and clustered as categories."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from aif_jax.encoding.vocabulary import Vocabulary


def unit_rows(array: np.ndarray) -> np.ndarray:
    """Return the rows scaled to unit length, in float32; rows of zeros stay zeros."""
    array = np.asarray(array, np.float32)
    norm = np.linalg.norm(array, axis=1, keepdims=True)
    return array / np.where(norm > 0, norm, 1)


def clusters(content: np.ndarray, count: int) -> np.ndarray:
    """Cluster items by content float [n, E] with k-means: int32 [n] in [0, count), the same every time."""
    try:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError('clusters needs scikit-learn: pip install "aif_jax[experiments]"') from error
    with threadpool_limits(1):  # with more threads sums may come out in another order, and borderline items move
        labels = KMeans(count, max_iter=30, random_state=0).fit_predict(np.asarray(content, np.float32))
    return labels.astype(np.int32)


def lookup(file: Path, items: np.ndarray) -> np.ndarray:
    """Return the embeddings float32 [n, E] of raw items [n] in an .npz with `embedding` and ids; ValueError for none of one."""
    with np.load(file) as arrays:
        (name,) = set(arrays) - {"embedding"}
        ids, embedding = arrays[name], arrays["embedding"]
    known = Vocabulary(ids)
    rows = known.encode(items)
    if len(missing := items[rows == 0]):
        raise ValueError(
            f"{file}: expected an embedding for each of {len(items)} items, got none for {len(missing)}: "
            f"{', '.join(map(str, missing[:5]))}"
        )
    return embedding.astype(np.float32)[np.argsort(known.encode(ids))][rows - 1]
