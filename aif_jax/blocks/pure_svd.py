"""Co-engagement: a dot product of what the history and the candidate have in common with other users.

PureSVD (Cremonesi, Koren, Turrin 2010, doi:10.1145/1864708.1864721) scores an item c for a user by the sum of v_j . v_c over
the history, where V [N, R] are the leading right singular vectors of the matrix of users and items of the training events. A
model that is trained on sampled candidates sees co-engagement one event at a time; the factors hold all of it. Here the n-th
last event counts n ** -decay, since a whole history says less of what comes next (the decay is ours).

They are fitted on the training events after training and never before: an event of a training sample is in them, and a model
that could read it there would trust them too much. The user half is the sum, so real time does not grow with the history.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse
from scipy.sparse.linalg import svds

from aif_jax import checks, layers
from aif_jax.blocks.block import Block, ItemView, Terms, UserView, block, expect, recent
from aif_jax.config import Config
from aif_jax.types import ItemFeatures, ItemRow, Params, UserState

SEED = 0  # of the vector that the iteration starts from
REQUESTS = 1000  # whose scores give the scale


@block
class PureSvd(Block):
    """Adds sum_n n ** -decay v_n . v_c to the logit, where v_n is the factor of the n-th last event and v_c the candidate's.

    Its factors are zeros until `Run.with_factors` or you give others. An item without a training event, or newer than the
    table, has a factor of zeros.

    Attributes:
      width: R, numbers of a factor.
      length: last events that count.
      decay: how fast older ones count less, by their place.

    Raises:
      ValueError: sizes below 1, a decay below 0.
    """

    width: int = 64
    length: int = 512
    decay: float = 0.7

    def __post_init__(self):
        expect(self.width >= 1, self, "width", "at least 1", self.width)
        expect(self.length >= 1, self, "length", "at least 1", self.length)
        expect(self.decay >= 0, self, "decay", "at least 0", self.decay)

    def recent(self, config: Config) -> int:
        return min(self.length, config.long_length)

    def fit(self, items: ItemFeatures, config: Config, *, seed: int) -> Params:
        return {"table": jnp.zeros((config.schema.item_attribute("item").size, self.width))}

    def user(self, params: Params, user: UserView) -> dict[str, jax.Array]:
        events = recent(user.long, self.length)
        mask = jnp.asarray(events.mask)
        factors = layers.lookup(params["table"], jnp.asarray(events.item))
        place = jnp.arange(1, mask.shape[0] + 1).astype(jnp.float32)  # floats only then: an export's length is a symbol
        weight = jnp.where(mask, place**-self.decay, 0.0)
        return {"sum": weight.astype(factors.dtype) @ factors}

    def item(self, params: Params, item: ItemView) -> dict[str, jax.Array]:
        return {"factor": layers.lookup(params["table"], jnp.asarray(item.features.ids["item"]))}

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: Mapping[str, jax.Array]) -> Terms:
        return Terms(logit=jnp.asarray(rows.blocks[self.name]["factor"]) @ jnp.asarray(state.blocks[self.name]["sum"]))


def svd_factors(user: Any, item: Any, *, size: int, block: PureSvd | None = None, deviation: float = 0.4) -> np.ndarray:
    """Factors of training events, for `with_pure_svd`: float32 [size, R].

    Args:
      user, item: integers [E], the row of the user and of the item of each training event, by time for each user. Item row 0 is
        the unknown item and has no factor.
      size: N, rows of the catalogue.
      block: gives R, and how the history counts.
      deviation: of the block's term over users (at the end of their events) and trained items, in logits: how much it says. The
        default was chosen on the validation slice of merged MovieLens (docs/study.md).

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


def with_pure_svd(params: Params, table: Any, *, config: Config, block: PureSvd | None = None) -> tuple[Params, Config]:
    """Parameters and config of the same model with a `PureSvd` that has these factors.

    Args:
      params: of the model; not changed.
      table: float32 [N, R], such as `svd_factors(...)`.
      config: of `params`; a `PureSvd` that it has already gets the new factors.
      block: what is added where there is none; None takes the defaults with `width` R.

    Raises:
      TypeError, ValueError: not R finite float32 for each item of the schema.
    """
    there = present(config)
    added = there or block or PureSvd(width=np.shape(table)[-1])
    size = config.schema.item_attribute("item").size
    table = checks.expect_array(table, "table", dtype=np.float32, shape=(size, added.width))
    checks.expect_finite(table, "table")
    if there is None:
        config = config.replace(blocks=(*config.blocks, added))
    return params | {"fitted": params["fitted"] | {added.name: {"table": jnp.asarray(table)}}}, config


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


def present(config: Config) -> PureSvd | None:
    """The block of a model that has one."""
    return next((block for block in config.blocks if isinstance(block, PureSvd)), None)


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
