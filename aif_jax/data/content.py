"""Content embeddings: from text, or given as an array; clusters of them as categories.

They take the place of the multimodal embeddings of a production catalogue. Unit-length rows suit what compares them later:
cosines, and the LSH signatures that approximate them. Source: TF-IDF and truncated SVD (latent semantic analysis, Deerwester
et al. 1990) and k-means by scikit-learn.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from aif_jax.vocabulary import Vocabulary

Content: TypeAlias = str | os.PathLike | tuple[np.ndarray, np.ndarray]
"""A path to an .npz, or (raw item ids [n], embeddings [n, E])."""


def text_embedding(texts: Sequence[str], *, width: int = 64, seed: int = 0) -> np.ndarray:
    """Embeds texts by TF-IDF and truncated SVD.

    With the TF-IDF matrix X ~ U S V^T of rank `width`, text i gets row i of U S, scaled to unit length.

    Args:
      texts: one text for each item, such as "title. genres. tags".
      width: E. Where texts have fewer independent words than that, the last columns are zeros.
      seed: of the randomised SVD; the same seed gives the same array.

    Returns:
      float32 [n, width]; rows of unit length, zeros for a text without words.

    Raises:
      ImportError: scikit-learn is not installed.
      ValueError: width below 1, or no text has a word.

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
    """The rows scaled to unit length, in float32; rows of zeros stay zeros."""
    array = np.asarray(array, np.float32)
    norm = np.linalg.norm(array, axis=1, keepdims=True)
    return array / np.where(norm > 0, norm, 1)


def clusters(content: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """Clusters items by content with k-means.

    Args:
      content: float [n, E].
      count: how many clusters, at most n.
      seed: of the starting centres; the same seed gives the same clusters.

    Returns:
      int32 [n], the cluster of each item in [0, count).

    Raises:
      ImportError: scikit-learn is not installed.
      ValueError: count out of range.

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


def load(content: Content) -> tuple[np.ndarray, np.ndarray]:
    """Reads and checks a content embedding.

    Args:
      content: (raw item ids [n], embeddings [n, E]), or a path to an .npz that holds `embedding` [n, E] and one other
        array with the raw item ids [n], such as `movieId`.

    Returns:
      raw item ids [n] and float32 [n, E].

    Raises:
      ValueError: names what was expected and what came: missing array, wrong shape, NaN or infinity, an id twice.

    Example:
      >>> load((np.array([7, 9]), np.eye(2)))[1].dtype
      dtype('float32')
    """
    if isinstance(content, tuple):
        where = "content"
        ids, embedding = (np.asarray(part) for part in content)
    else:
        where = str(content)
        ids, embedding = _read_npz(Path(content))
    if embedding.ndim != 2 or embedding.dtype.kind not in "fiu" or not embedding.shape[1]:
        raise ValueError(f"{where}: expected numbers of shape [items, E], got {embedding.dtype} {list(embedding.shape)}")
    if ids.shape != embedding.shape[:1]:
        raise ValueError(f"{where}: expected one id for each of {len(embedding)} rows, got ids of shape {list(ids.shape)}")
    embedding = embedding.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(embedding).all(axis=1))
    if bad.size:
        raise ValueError(f"{where}: expected finite values, got NaN or infinity for item {ids[bad[0]]} (row {bad[0]})")
    unique, count = np.unique(ids, return_counts=True)
    if len(unique) != len(ids):
        raise ValueError(f"{where}: expected each item once, got item {unique[count > 1][0]} more than once")
    return ids, embedding


def align(content: Content, items: np.ndarray) -> np.ndarray:
    """The embeddings of `items`, in their order.

    Args:
      content: as in `load`; ids beyond `items` are left out.
      items: raw item ids [n].

    Returns:
      float32 [n, E].

    Raises:
      ValueError: as `load`, or an item without an embedding.
    """
    return lookup(content)(items)


def lookup(content: Content) -> Callable[[np.ndarray], np.ndarray]:
    """A function from raw item ids [n] to their embeddings float32 [n, E], for items that come in parts; see `align`."""
    ids, embedding = load(content)
    known = Vocabulary(ids)
    embedding = embedding[np.argsort(known.encode(ids))]

    def rows_of(items: np.ndarray) -> np.ndarray:
        rows = known.encode(items)
        missing = np.asarray(items)[rows == 0]
        if missing.size:
            shown = ", ".join(str(i) for i in missing[:5])
            raise ValueError(
                f"content: expected an embedding for each of {len(rows)} items, got none for {missing.size}: {shown}"
            )
        return embedding[rows - 1]

    return rows_of


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path}: expected an .npz with a content embedding, got no such file")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = list(arrays)
            others = [name for name in names if name != "embedding"]
            if "embedding" in names and len(others) == 1:
                return arrays[others[0]], arrays["embedding"]
    except Exception as error:
        raise ValueError(f"{path}: expected an .npz with a content embedding, got one that does not load: {error}") from error
    raise ValueError(f"{path}: expected `embedding` and one array of item ids, got {names}")


def _missing(what: str) -> ImportError:
    return ImportError(f'{what} needs scikit-learn: pip install "aif_jax[experiments]"')
