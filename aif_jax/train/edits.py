"""Edits of a model after training: SVD term, popularity correction, unseen items, calibration.

An edit is a function `(Trained, Dataset) -> Trained`; `chain` composes several. Each returns another version, so the index is
built after the last. An edit that changes the scores removes a calibration, which is of the scores before: calibrate last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import svds

from aif_jax import checks
from aif_jax.blocks.item_offset import UNTRAINED, popularity_offset, with_item_offset
from aif_jax.blocks.pure_svd import PureSvd, present, with_pure_svd
from aif_jax.config import Config
from aif_jax.data.candidates import SourceFn
from aif_jax.data.dataset import Dataset
from aif_jax.data.sampling import counts_before
from aif_jax.model import build
from aif_jax.scores import with_calibration
from aif_jax.store.trained import Trained
from aif_jax.train.calibrate import calibrate
from aif_jax.train.warm_start import unseen_as_unknown
from aif_jax.types import Params

SEED = 0  # of the vector that the iteration starts from
REQUESTS = 1000  # whose scores give the scale
Edit = Callable[[Trained, Dataset], Trained]
"""Raises EncodingMismatch for data that another encoder than the model's made."""


def chain(*edits: Edit) -> Edit:
    """The edit that applies several, one after the other."""

    def edit(trained: Trained, data: Dataset) -> Trained:
        for each in edits:
            trained = each(trained, data)
        return trained

    return edit


def svd_term(*, before: int, **options: Any) -> Edit:
    """Adds a `PureSvd` block with the factors of the training events, see `blocks.PureSvd`.

    Args:
      before: seconds since 1970, the end of the training events.
      options: `deviation`, `width`, `length` and `decay` of `fit_pure_svd`.
    """

    @_edit
    def edit(trained: Trained, data: Dataset) -> Trained:
        training = data.log.time < before
        user, item = data.log.user[training], data.log.item[training]
        params, config = fit_pure_svd(trained.params, user, item, config=trained.config, **options)
        return Trained(build(config), params, trained.encoder)

    return edit


def popularity_correction(*, before: int, power: float = 0.75, untrained: float | None = UNTRAINED) -> Edit:
    """Adds the log of each item's sampling probability to its logit, see `blocks.popularity_offset`.

    Args:
      before: seconds since 1970, the end of the training events.
      power: of the popularity by which training drew candidates.
      untrained: offset of items without a training event, see `blocks.popularity_offset`.
    """

    @_edit
    def edit(trained: Trained, data: Dataset) -> Trained:
        table = popularity_offset(counts_before(data, before), power=power, untrained=untrained)
        params, config = with_item_offset(trained.params, table, config=trained.config)
        return Trained(build(config), params, trained.encoder)

    return edit


def unseen_items(*, before: int) -> Edit:
    """Gives items without a training event the embedding of the unknown item, see `unseen_as_unknown`.

    Args:
      before: seconds since 1970, the end of the training events.
    """

    @_edit
    def edit(trained: Trained, data: Dataset) -> Trained:
        return trained.replace(params=unseen_as_unknown(trained.params, counts_before(data, before), config=trained.config))

    return edit


def calibration(held_out: Callable[[Dataset], tuple[Any, SourceFn]], **options: Any) -> Edit:
    """Fits calibrated probabilities on held-out events, see `train.calibrate`.

    Args:
      held_out: `held_out(data)`, positions of held-out events and the source of their candidates.
      options: `calibration_negatives`, `form`, `rate`, `weights`, `seed`, `batch_size` and `progress` of `train.calibrate`.
    """

    @_edit
    def edit(trained: Trained, data: Dataset) -> Trained:
        positions, candidates = held_out(data)
        given: dict[str, Any] = {"candidates": candidates} | options
        return trained.replace(params=calibrate(trained.model, trained.params, data, positions, **given))

    return edit


def _edit(change: Edit) -> Edit:
    """The edit that refuses data of another encoder and changes the model without its calibration."""

    def edit(trained: Trained, data: Dataset) -> Trained:
        checks.check_encoding("data", expected=trained.encoding, got=data.encoding)
        return change(trained.replace(params=with_calibration(trained.params, None)), data)

    return edit


def svd_factors(user: Any, item: Any, *, size: int, block: PureSvd | None = None, deviation: float = 0.4) -> np.ndarray:
    """Factors of training events, for `with_pure_svd`: float32 [size, R].

    Args:
      user, item: integers [E], the row of the user and of the item of each training event, by time for each user. Item row 0 is
        the unknown item and has no factor.
      size: N, rows of the catalogue.
      block: gives R, and how the history counts.
      deviation: of the block's term over users (at the end of their events) and trained items, in logits: how much it says. The
        default was chosen on the validation slice of merged MovieLens (experiments/notes/study.md).

    Raises:
      TypeError, ValueError: rows that are not integers, not of one length or out of range; a deviation that is not positive.

    Example:
      >>> factors = svd_factors([0, 0, 1, 1, 2], [1, 2, 1, 2, 3], size=5, block=PureSvd(width=2))
      >>> bool(factors[1] @ factors[2] > abs(factors[1] @ factors[3]))  # 1 and 2 have their users in common
      True
    """
    block = block or PureSvd()
    user, item = checks.expect_integers(user, "user", size=2**62), checks.expect_integers(item, "item", size=size)
    checks.expect(
        user.ndim == 1 and user.shape == item.shape, "user, item", "one of each for an event", [user.shape, item.shape]
    )
    checks.expect(0 < deviation < np.inf, "deviation", "a finite value above 0", deviation)
    factors = np.zeros((size, block.width), np.float32)
    user, item = user[item > 0], item[item > 0]
    if not len(item):
        return factors
    users, row = np.unique(user, return_inverse=True)
    met = sparse.csr_array((np.ones(len(item)), (row, item)), shape=(len(users), size))
    met.data[:] = 1.0  # repeats count once
    vectors, known = _right_vectors(met, block.width), np.unique(item)
    factors[known, : vectors.shape[1]] = vectors[known]
    term = _sums(row, factors[item], block) @ factors[known].T
    spread = float(term.std())
    return factors * np.float32(np.sqrt(deviation / spread)) if spread > 0 else factors


def fit_pure_svd(
    params: Params, user: Any, item: Any, *, config: Config, deviation: float = 0.4, **sizes: Any
) -> tuple[Params, Config]:
    """`with_pure_svd` of `svd_factors`: the model with the factors of training events.

    Args:
      params, config: of the model.
      user, item, deviation: of `svd_factors`.
      sizes: of the `PureSvd` that is added; none where the model has one.

    Raises:
      TypeError, ValueError: as those two; sizes for a block that the model has already.
    """
    there = present(config)
    if there is not None and sizes:
        raise ValueError(f"sizes: expected none, since the model has {there}, got {sizes}")
    block = there or PureSvd(**sizes)
    size = config.schema.item_attribute("item").size
    table = svd_factors(user, item, size=size, block=block, deviation=deviation)
    return with_pure_svd(params, table, config=config, block=block)


def _right_vectors(met: Any, width: int) -> np.ndarray:
    """The leading right singular vectors of a sparse matrix, float32 [N, at most width], the largest value of each positive."""
    least = min(met.shape)
    if least <= width + 1:
        vectors = np.linalg.svd(met.toarray(), full_matrices=False)[2].T[:, :width]
    else:
        start = np.random.default_rng(SEED).normal(size=least)
        vectors = np.asarray(svds(met, k=width, v0=start)[2])[::-1].T
    largest = np.abs(vectors).argmax(0)
    return (vectors * np.sign(vectors[largest, np.arange(vectors.shape[1])])).astype(np.float32)


def _sums(user: np.ndarray, factors: np.ndarray, block: PureSvd) -> np.ndarray:
    """What the block's user half is after the last event of some users: events [E] by time for each -> [U, R]."""
    order = np.argsort(user, kind="stable")
    ends = np.cumsum(np.bincount(user))
    chosen = np.random.default_rng(SEED).permutation(len(ends))[:REQUESTS]
    sums = np.zeros((len(chosen), factors.shape[1]))
    for place, who in enumerate(chosen):
        first = max(ends[who] - block.length, ends[who - 1] if who else 0)
        last = order[first : ends[who]][::-1]
        sums[place] = (1.0 + np.arange(len(last))) ** -block.decay @ factors[last]
    return sums
