"""Edits of a model after training: SVD term, popularity correction, unseen items, calibration.

An edit is a function `(Trained, Dataset) -> Trained`; `chain` composes several. Each returns another version, so the index is
built after the last. An edit that changes the scores removes a calibration, which is of the scores before: calibrate last.

*Warm start.* Yesterday's parameters under today's vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import sparse
from scipy.sparse.linalg import svds

from aif_jax import checks
from aif_jax.blocks.item_offset import UNTRAINED, popularity_offset, with_item_offset
from aif_jax.blocks.pure_svd import PureSvd, present, with_pure_svd
from aif_jax.config import Config
from aif_jax.data.candidates import SourceFn
from aif_jax.data.dataset import Dataset
from aif_jax.data.sampling import counts_before
from aif_jax.encoding.capacity import new_rows
from aif_jax.encoding.encoder import Encoder
from aif_jax.model import build
from aif_jax.scores import GROUP, with_calibration
from aif_jax.store.trained import Trained
from aif_jax.train.calibrate import calibrate
from aif_jax.trees import table_of
from aif_jax.types import Array, Params

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
    """Adds the log of each item's sampling probability to its logit, see `blocks.popularity_offset`; `before` as `svd_term`.

    Args:
      power: power of the popularity by which training drew candidates.
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
      deviation: deviation of the block's term over users (at the end of their events) and trained items, in logits: how much
        it says. The
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
      user, item, deviation: see `svd_factors`.
      sizes: sizes of the `PureSvd` that is added; none where the model has one.

    Raises:
      TypeError, ValueError: as those two; sizes for a block that the model has already.
    """
    there = present(config)
    if there is not None and sizes:
        raise ValueError(f"sizes: expected none, since the model has {there}, got {sizes}. Leave out width=, length=, decay=")
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


def grow_vocabulary(
    params: Params, name: str, size: int, key: jax.Array, *, config: Config, rows: np.ndarray | None = None
) -> tuple[Params, Config]:
    """Parameters and config with another vocabulary: old ids keep their embedding, new ids get a fresh one.

    New embeddings are Gaussian with the standard deviation of the old table. In `params["fitted"]` old items keep their values
    and new items get those of the unknown item, until you refit on the new catalogue:
    `params | {"fitted": aif.fit_tables(config, catalogue)}`. The optimizer state starts afresh: init it from the result.

    Args:
      name: attribute whose table `params["embedding"][name]`, float [old size, D], grows.
      size: rows of the new vocabulary, the unknown row 0 included.
      rows: int [old size], the new row of each old row, for ids that moved, and -1 for a row whose id is gone: what takes its
        place, if anything, starts new. None where new ids were appended. With a `Vocabulary` before and after:
        `encoding.capacity.new_rows(before, after)`.

    Returns:
      (params, config) of the new vocabulary.

    Raises:
      KeyError: no such attribute.
      ValueError: a smaller size without `rows`, or `rows` that are not distinct rows of the new table with row 0 first.

    Example:
      >>> import jax, numpy as np, aif_jax as aif
      >>> item, category = aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=6)
      >>> config = aif.presets.two_tower(aif.Schema(item_attributes=(item, category)))
      >>> params = {"embedding": {"category": np.ones((6, 8), np.float32)}}
      >>> grown, larger = grow_vocabulary(params, "category", 9, jax.random.key(1), config=config)
      >>> grown["embedding"]["category"].shape, larger.schema.item_attribute("category").size
      ((9, 8), 9)
    """
    schema = config.schema
    groups = {"item_attributes": schema.item_attributes, "user_attributes": schema.user_attributes}
    known = [attribute.name for group in groups.values() for attribute in group]
    if name not in known:
        raise KeyError(f"attribute: expected one of {known}, got {name!r}")
    table = jnp.asarray(params["embedding"][name])
    old = table.shape[0]
    if size < old and rows is None:
        raise ValueError(f"{name}: expected a size of at least the old {old}, got {size}; rows are never dropped")
    place = np.arange(old) if rows is None else np.asarray(rows)
    kept = np.flatnonzero(place >= 0)
    distinct = place.shape == (old,) and place[0] == 0 and len(np.unique(place[kept])) == len(kept)
    if not distinct or place.min() < -1 or place.max() >= size:
        raise ValueError(f"rows: expected {old} distinct rows below {size}, or -1, with row 0 first, got {place}")
    grown = jnp.std(table[kept]) * jax.random.normal(key, (size, *table.shape[1:]), table.dtype)
    larger = {
        field: tuple(dataclasses.replace(a, size=size) if a.name == name else a for a in group)
        for field, group in groups.items()
    }
    grown_params = {**params, "embedding": {**params["embedding"], name: grown.at[place[kept]].set(table[kept])}}
    if "fitted" in params:
        grown_params["fitted"] = _fitted(params["fitted"], name, size, place, config)
    return grown_params, config.replace(schema=dataclasses.replace(schema, encoding="", **larger))


def carry_over(trained: Trained, encoder: Encoder, *, key: jax.Array) -> Trained:
    """The model under the vocabularies of a newer encoder: an id that both know keeps everything that stands at its row.

    A row whose id is gone, and one that has a new id, start new: the embedding as in `grow_vocabulary`, and the values of the
    unknown item in every table of `params["fitted"]`: signatures, codes, SVD factors, popularity corrections, the fields of
    items. A field's value that is gone becomes unknown in the fields of all items. Indexes and user states carry the version
    that they were made with, so none of the model before is taken; build them from the result. Fit the tables again on the new
    catalogue, and run the edits after training again, so that new items have theirs.

    With vocabularies of fixed size the config stays but for the encoder's version, and so do compiled programs.

    Args:
      trained: model of the encoder before, not changed; not one of `assemble`, whose functions this cannot build.
      encoder: encoder of the same columns, such as from `readers.admit`, or from reading newer files.

    Raises:
      ValueError: a model without an encoder, an encoder of other columns, actions or scales.
    """
    before, params, config = trained.need_encoder("carry_over"), trained.params, trained.config
    same = before.columns == encoder.columns and before.scales == encoder.scales
    same = same and before.vocabularies.get("action") == encoder.vocabularies.get("action")
    checks.expect(same, "encoder", "the columns, actions and scales of the model's encoder", "others; derive it from that one")
    embedded = {a.name: a for a in (*config.schema.item_attributes, *config.schema.user_attributes) if a.table is None}
    for number, (name, after) in enumerate(encoder.vocabularies.items()):
        old = before.vocabularies[name]
        if name not in embedded or old == after:
            continue
        size = max(len(after), 2)  # of an attribute without any value
        rows = np.append(new_rows(old, after), np.full(embedded[name].size - len(old), -1))
        params, config = grow_vocabulary(params, name, size, jax.random.fold_in(key, number), config=config, rows=rows)
    return Trained(build(config.with_encoding(encoder.version)), params, encoder.with_length(before.length))


def carry_over_state(opt_state: Any, optimizer: optax.GradientTransformation, before: Trained, after: Trained) -> Any:
    """The optimizer state of `before` for the model that `carry_over` made of it.

    An id that both know keeps its moments, dense or sparse; rows that are new start as in `optimizer.init`. Moments of other
    parameters, and the count of steps, go on.

    Args:
      opt_state: opt state of `optimizer` for the trained groups of `before`, as in `TrainState.opt_state`.
      optimizer: which treats rows apart, as `train.optimizers` needs it.

    Raises:
      ValueError: state that has not one row for each row of a table whose rows changed.
    """
    trained = {name: group for name, group in after.params.items() if name != "fitted"}
    with jax.numpy_dtype_promotion("standard"):
        fresh = optimizer.init(trained)
    old, new = (each.need_encoder("carry_over_state").vocabularies for each in (before, after))
    names = {a.name for group in (before.config.schema.item_attributes, before.config.schema.user_attributes) for a in group}
    place = {name: new_rows(old[name], new[name]) for name in names & old.keys() if old[name] != new[name]}

    def one(path: tuple, leaf: Any, start: Any) -> Any:
        name = table_of(path, place)
        if name is None:
            return leaf
        rows = (np.shape(before.params["embedding"][name])[0], np.shape(after.params["embedding"][name])[0])
        expected, got = f"one row for each of {rows[0]} rows of table {name!r}", f"shape {np.shape(leaf)}"
        fits = (np.shape(leaf)[:1], np.shape(start)[:1]) == ((rows[0],), (rows[1],))
        checks.expect(fits, f"optimizer state {jax.tree_util.keystr(path)}", expected, got)
        kept = np.flatnonzero(place[name] >= 0)
        return jnp.asarray(start).at[place[name][kept]].set(jnp.asarray(leaf)[kept])

    return jax.tree_util.tree_map_with_path(one, opt_state, fresh)


def unseen_as_unknown(params: Params, counts: Any, *, config: Config) -> Params:
    """Parameters in which items without a training event have the embedding of the unknown item.

    For models that are trained with `Pipeline.id_dropout`, which teaches that embedding. What is fitted on content stays.

    Args:
      counts: integers [N], training events of each catalogue row.

    Raises:
      TypeError, ValueError: not one count for each item of the schema; a model whose schema does not embed the item id.
    """
    name = config.schema.item_attribute("item").table_name
    size = config.schema.item_attribute("item").size
    counts = checks.expect_integers(counts, "counts", size=2**62)
    checks.expect(counts.shape == (size,), "counts", f"one for each of {size} items", f"shape {list(counts.shape)}")
    checks.expect(name in params["embedding"], "params", f"an embedding {name!r}", list(params["embedding"]))
    table = jnp.asarray(params["embedding"][name])
    shared = jnp.where((counts == 0)[:, None], table[:1], table)
    return params | {"embedding": params["embedding"] | {name: shared}}


def _fitted(fitted: Params, name: str, size: int, place: np.ndarray, config: Config) -> Params:
    """The fitted group: values of items in their new rows, or ids of a field that are new rows."""

    kept = np.flatnonzero(place >= 0)

    def grow(values: Array) -> jax.Array:
        values = jnp.asarray(values)
        return jnp.broadcast_to(values[:1], (size, *values.shape[1:])).at[place[kept]].set(values[kept])

    fields = fitted.get("fields", {})
    if name != "item":
        moved = {name: jnp.asarray(np.maximum(place, 0), jnp.int32)[fields[name]]} if name in fields else {}
        return {**fitted, "fields": {**fields, **moved}}
    tables = {table.name for table in config.tables}
    return {
        group: values_by_name
        if group == GROUP
        else {
            # A table's values are per item by contract; in a block's group those with the vocabulary's length are.
            leaf: grow(values) if (leaf == "table" if group in tables else len(values) == len(place)) else values
            for leaf, values in values_by_name.items()
        }
        for group, values_by_name in fitted.items()
    }
