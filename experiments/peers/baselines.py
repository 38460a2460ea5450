"""Closed-form baselines: recent popularity, item-kNN, EASE, PureSVD.

Each reads training events as a binary matrix of users and items, and a request as the binary row of its last events: how many
is a setting, since a whole history says less of what comes next. EASE and item-kNN give an item nothing for itself; where users
come back to items, a met item has its similarity to itself, 1, added: without it neither could name one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
from scipy import sparse

from aif_jax.blocks import PureSvd
from aif_jax.train.edits import svd_factors
from experiments.peers.judge import Lists, Scorer

DAY = 86400


def recent_popularity(lists: Lists, *, days: float) -> Scorer:
    """Return training events of each item in the last days of training, ties by all events: the same for every request."""
    since = lists.events["time"].max() - days * DAY
    recent = np.bincount(lists.events["item"][lists.events["time"] > since], minlength=len(lists.count))
    score = recent + lists.count / (1 + lists.count.max())
    return lambda places: np.broadcast_to(score, (len(places), len(score)))


def item_knn(lists: Lists, *, neighbours: int, last: int) -> Scorer:
    """Return item-kNN: each item i of the history gives its similarity to its nearest neighbours j.

    s_ij = |U_i and U_j| / sqrt(|U_i| |U_j|), the `neighbours` largest of each item i, without j = i.
    """
    x, h = matrix(lists), histories(lists, last)
    norm = np.sqrt(np.maximum(np.bincount(x.indices, minlength=x.shape[1]), 1))
    items = np.unique(h.indices)
    scaled = sparse.csr_array(x.multiply(1 / norm))
    similar = sparse.csr_array(scaled[:, items].T @ scaled)
    row = np.repeat(np.arange(len(items)), np.diff(similar.indptr))
    similar.data[similar.indices == items[row]] = 0
    place = np.lexsort((-similar.data, row))  # the rows as they are, the largest of each first
    similar.data[place[np.arange(len(row)) - similar.indptr[row] >= neighbours]] = 0
    similar.eliminate_zeros()
    columns = sparse.csr_array(h[:, items])
    return lambda places: (columns[places] @ similar).toarray() + _met(lists, h, places)


def ease(lists: Lists, *, regularization: float, last: int) -> Scorer:
    """Return EASE: a linear model of each item by all others.

    P = (X^T X + r I)^-1, B_ij = -P_ij / P_jj off the diagonal and 0 on it, score = h B.

    P = (I - X^T K X) / r where K = (X X^T + r I)^-1: with fewer users than items no matrix of items by items is made.

    Source: H. Steck, Embarrassingly Shallow Autoencoders for Sparse Data, arXiv 1905.03375.
    """
    x = matrix(lists)
    x = x[np.unique(x.nonzero()[0])]  # users with an event
    values, vectors = np.linalg.eigh((x @ x.T).toarray())
    spread = x.T @ vectors  # [N, U]
    inner = spread / (values + regularization)
    diagonal = (1 - (spread * inner).sum(1)) / regularization
    h, inner = histories(lists, last), inner.astype(np.float32).T

    def scores(places: np.ndarray) -> np.ndarray:
        rows = h[places]
        projected = (rows.toarray() - (rows @ spread).astype(np.float32) @ inner) / regularization  # h P
        return rows.toarray() - projected / diagonal + _met(lists, h, places)

    return scores


def pure_svd(lists: Lists, *, width: int, decay: float, last: int) -> Scorer:
    """Return the term of `blocks.PureSvd` alone, whose history counts less by place."""
    block = PureSvd(width=width, length=last, decay=decay)
    factors = svd_factors(lists.events["user"], lists.events["item"], size=len(lists.count), block=block)
    weight = np.arange(1.0, last + 1.0) ** -decay
    items = lists.recent(last)
    return lambda places: np.stack([weight @ factors[row] for row in items[places]]) @ factors.T


def _grid(**values: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    return tuple(dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))


BASELINES: dict[str, tuple[Callable[..., Scorer], tuple[dict[str, Any], ...]]] = {
    "recent-popularity": (recent_popularity, _grid(days=(30, 365))),
    "item-knn": (item_knn, _grid(neighbours=(30, 100, 300), last=(10, 20))),
    "ease": (ease, _grid(regularization=(200.0, 1000.0, 3000.0), last=(10, 20))),
    "pure-svd": (pure_svd, _grid(width=(16, 32, 64), decay=(0.5, 0.7, 1.0), last=(512,))),
}
"""Name to the function and the settings that are tried on the validation slice."""


def matrix(lists: Lists) -> sparse.csr_array:
    """Return which user has a training event with which item, float64 [users, N] of 0 and 1."""
    user, item = lists.events["user"], lists.events["item"]
    return _binary(user, item, (int(user.max()) + 1, len(lists.count)))


def histories(lists: Lists, last: int) -> sparse.csr_array:
    """Return which items are among the last events before each request, float64 [R, N] of 0 and 1."""
    items = lists.recent(last)
    request = np.repeat(np.arange(len(items)), last)
    return _binary(request, items.reshape(-1), (len(items), len(lists.count)))


def _met(lists: Lists, h: sparse.csr_array, places: np.ndarray) -> np.ndarray | float:
    return h[places].toarray() if lists.repeats else 0.0


def _binary(row: np.ndarray, item: np.ndarray, shape: tuple[int, int]) -> sparse.csr_array:
    """Return the entries without repeats, and without item 0, which is no item."""
    known = item > 0
    pairs = np.unique(row[known].astype(np.int64) * shape[1] + item[known])
    return sparse.csr_array((np.ones(len(pairs)), (pairs // shape[1], pairs % shape[1])), shape=shape)
