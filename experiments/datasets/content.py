"""Content embeddings from texts, rows of unit length, and clusters of items as categories.

They take the place of the multimodal embeddings of a production catalogue. Source: TF-IDF and truncated SVD (latent semantic
analysis, Deerwester et al. 1990) and k-means by scikit-learn.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from aif_jax.encoding.vocabulary import Vocabulary

Content: TypeAlias = str | os.PathLike | tuple[np.ndarray, np.ndarray]
"""(raw item ids [n], embeddings [n, E]), or a path to an .npz with `embedding` and one other array, the raw item ids."""


def text_embedding(texts: Sequence[str], *, width: int = 64, seed: int = 0) -> np.ndarray:
    """Embed n texts by TF-IDF and truncated SVD: float32 [n, width], rows of unit length, zeros for a text without words.

    With the TF-IDF matrix X ~ U S V^T of rank `width`, text i gets row i of U S, scaled to unit length. Where texts have fewer
    independent words than `width`, the last columns are zeros. ValueError where no text has a word.

    Example:
      >>> e = text_embedding(["red dog", "red dog runs", "blue sky"], width=2)
      >>> bool(e[0] @ e[1] > e[0] @ e[2])
      True
    """
    if width < 1:
        raise ValueError(f"text_embedding: expected width of at least 1, got {width}")
    try:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise _missing("text_embedding") from error
    try:
        matrix = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    except ValueError as error:
        raise ValueError(f"text_embedding: expected texts with words of two letters or more, got none ({error})") from error
    rank = min(width, *matrix.shape)
    embedding = np.zeros((len(texts), width), np.float32)
    if rank == 1:  # a single direction: unit length leaves nothing to decompose
        embedding[:, 0] = np.asarray(matrix.sum(axis=1)).ravel() > 0
        return embedding
    embedding[:, :rank] = TruncatedSVD(rank, random_state=seed).fit_transform(matrix)
    return unit_rows(embedding)


def unit_rows(array: np.ndarray) -> np.ndarray:
    """Return the rows scaled to unit length, in float32; rows of zeros stay zeros."""
    array = np.asarray(array, np.float32)
    norm = np.linalg.norm(array, axis=1, keepdims=True)
    return array / np.where(norm > 0, norm, 1)


def clusters(content: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """Cluster items by content float [n, E] with k-means: int32 [n] in [0, count), the same for the same seed.

    Example:
      >>> clusters(np.float32([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0]]), 2).tolist() in ([0, 0, 1], [1, 1, 0])
      True
    """
    if not 1 <= count <= len(content):
        raise ValueError(f"clusters: expected a count from 1 to {len(content)} (items), got {count}")
    try:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise _missing("clusters") from error
    with threadpool_limits(1):  # with more threads sums may come out in another order, and borderline items move
        labels = KMeans(count, max_iter=30, random_state=seed).fit_predict(np.asarray(content, np.float32))
    return labels.astype(np.int32)


def _missing(what: str) -> ImportError:
    return ImportError(f'{what} needs scikit-learn: pip install "aif_jax[experiments]"')


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
