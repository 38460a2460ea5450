"""Closed-form baselines: popularity, recent popularity, item-kNN, EASE, PureSVD; and ALS, whose code is the package `implicit`.

Each reads training events as a binary matrix of users and items, and a request as the binary row of its last events: how many
is a setting, since a whole history says less of what comes next.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
from scipy import sparse

from aif_jax.blocks import PureSvd
from aif_jax.train.edits import svd_factors
from experiments.peers.lists import Lists

DAY = 86400
BLOCK = 512  # items whose similarities are held at a time


def popularity(lists: Lists) -> np.ndarray:
    """Training events of each item: float32 [R, N], the same for every request."""
    return np.broadcast_to(lists.count.astype(np.float32), (len(lists.target), len(lists.count)))


def recent_popularity(lists: Lists, *, days: float) -> np.ndarray:
    """The same of the last days of training, ties by all events."""
    since = lists.events["time"].max() - days * DAY
    recent = np.bincount(lists.events["item"][lists.events["time"] > since], minlength=len(lists.count))
    score = recent + lists.count / (1 + lists.count.max())
    return np.broadcast_to(score.astype(np.float32), (len(lists.target), len(lists.count)))


def item_knn(lists: Lists, *, neighbours: int, shrink: float, last: int) -> np.ndarray:
    """Item-kNN: each item i of the history gives its similarity to its nearest neighbours j, float32 [R, N].

    s_ij = |U_i and U_j| / (sqrt(|U_i| |U_j|) + shrink), the `neighbours` largest of each item i, without j = i.
    """
    x, h = matrix(lists), histories(lists, last)
    norm = np.sqrt(np.bincount(x.indices, minlength=x.shape[1]))
    columns = sparse.csc_array(x)
    made = np.zeros(h.shape, np.float32)
    items = np.unique(h.indices)
    for start in range(0, len(items), BLOCK):
        some = items[start : start + BLOCK]
        similar = (columns[:, some].T @ x).toarray() / np.maximum(norm[some, None] * norm + shrink, 1e-9)
        similar[np.arange(len(some)), some] = 0
        if neighbours < similar.shape[1]:
            far = np.argpartition(similar, -neighbours, axis=1)[:, :-neighbours]
            np.put_along_axis(similar, far, 0, axis=1)
        made += h[:, some] @ similar.astype(np.float32)
    return made


def ease(lists: Lists, *, regularization: float, last: int) -> np.ndarray:
    """EASE: a linear model of each item by all others, float32 [R, N].

    P = (X^T X + r I)^-1, B_ij = -P_ij / P_jj off the diagonal and 0 on it, score = h B.

    P = (I - X^T K X) / r where K = (X X^T + r I)^-1: with fewer users than items no matrix of items by items is made.

    Source: H. Steck, Embarrassingly Shallow Autoencoders for Sparse Data, arXiv 1905.03375.
    """
    x = matrix(lists)
    x = x[np.unique(x.nonzero()[0])]  # users with an event
    values, vectors = np.linalg.eigh((x @ x.T).toarray())
    spread = (x.T @ vectors).T  # [U, N]
    inner = spread / (values + regularization)[:, None]
    diagonal = (1 - (spread * inner).sum(0)) / regularization
    rows = histories(lists, last)
    h = rows.toarray()
    projected = (h - (rows @ (x.T @ vectors)) @ inner) / regularization  # h P
    return (h - projected / diagonal).astype(np.float32)


def pure_svd(lists: Lists, *, width: int, decay: float, last: int) -> np.ndarray:
    """The term of `blocks.PureSvd` alone, whose history counts less by place: float32 [R, N]."""
    block = PureSvd(width=width, length=last, decay=decay)
    factors = svd_factors(lists.events["user"], lists.events["item"], size=len(lists.count), block=block)
    weight = np.arange(1.0, last + 1.0) ** -decay
    items = lists.recent(last)
    sums = np.stack([weight @ factors[row] for row in items])
    return (sums @ factors.T).astype(np.float32)


def als(lists: Lists, *, factors: int, regularization: float, last: int, iterations: int = 15, seed: int = 0) -> np.ndarray:
    """ALS of `implicit`; a request's factors come from its last events by one half-step: float32 [R, N].

    Raises:
      ImportError: `implicit` is not installed: the extra 'peers' has it.
    """
    try:
        from implicit.cpu.als import AlternatingLeastSquares
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError("als: expected the package implicit (pip install 'aif-jax[peers]')") from error
    with threadpool_limits(1, "blas"):  # the package warns where BLAS has threads
        model = AlternatingLeastSquares(
            factors=factors,
            regularization=regularization,
            iterations=iterations,
            num_threads=1,
            random_state=seed,
        )
        model.fit(sparse.csr_matrix(matrix(lists), dtype=np.float32), show_progress=False)
        rows = sparse.csr_matrix(histories(lists, last), dtype=np.float32)
        users = model.recalculate_user(np.arange(rows.shape[0]), rows)
    return np.asarray(users @ model.item_factors.T, np.float32)


BASELINES: dict[str, tuple[Callable[..., np.ndarray], tuple[dict[str, Any], ...]]] = {
    "popularity": (popularity, ({},)),
    "recent-popularity": (recent_popularity, tuple({"days": days} for days in (7, 30, 90, 180, 365, 730))),
    "item-knn": (
        item_knn,
        tuple({"neighbours": n, "shrink": s, "last": k} for n, s, k in product((30, 100, 1000), (0.0,), (10, 20))),
    ),
    "ease": (ease, tuple({"regularization": r, "last": k} for r, k in product((500.0, 1000.0, 2000.0), (5, 10, 20)))),
    "pure-svd": (
        pure_svd,
        tuple({"width": w, "decay": d, "last": 512} for w, d in product((32, 64, 128), (0.5, 0.7, 1.0))),
    ),
    "als": (
        als,
        tuple({"factors": f, "regularization": r, "last": k} for f, r, k in product((32, 64, 128), (0.1, 10.0), (10, 20))),
    ),
}
"""Name to the function and the settings that are tried on the validation slice."""


def versions(name: str) -> dict[str, str]:
    """Versions of what computes a baseline."""
    used = ("implicit", "numpy") if name == "als" else ("numpy", "scipy")
    return {package: importlib.metadata.version(package) for package in used}


def matrix(lists: Lists) -> sparse.csr_array:
    """Which user has a training event with which item, float64 [users, N] of 0 and 1."""
    user, item = lists.events["user"], lists.events["item"]
    return _binary(user, item, (int(user.max()) + 1, len(lists.count)))


def histories(lists: Lists, last: int) -> sparse.csr_array:
    """Which items are among the last events before each request, float64 [R, N] of 0 and 1."""
    items = lists.recent(last)
    request = np.repeat(np.arange(len(items)), last)
    return _binary(request, items.reshape(-1), (len(items), len(lists.count)))


def _binary(row: np.ndarray, item: np.ndarray, shape: tuple[int, int]) -> sparse.csr_array:
    """Without repeats, and without item 0, which is no item."""
    known = item > 0
    pairs = np.unique(row[known].astype(np.int64) * shape[1] + item[known])
    return sparse.csr_array((np.ones(len(pairs)), (pairs // shape[1], pairs % shape[1])), shape=shape)
