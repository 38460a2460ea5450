"""Edits of a model after training: SVD term, popularity correction, unseen items, calibration.

An edit is a function `(trained, data, *, ...) -> Trained` that returns another version, so build the index after the last one.
An edit of the scores removes a calibration, which was fitted on the scores before: calibrate last.
`before` is the end of the training events, in seconds since 1970. An edit raises EncodingMismatch for data that another encoder
than the model's made, and ValueError where it adds to the config of a model of `assemble`, whose functions it would replace.

*Calibration.* If a sample keeps every positive and a share r of the negatives, its odds are 1 / r times the odds outside, so
the logit is too high by -log r: this is corrected analytically. A negative that was drawn with a known rate counts for 1 / rate
entries. The rest is fitted on held-out entries by Platt scaling, two numbers an objective that keep the order, in
`params["fitted"]["calibration"]`: logit' = scale * logit + bias.

Sources: Platt 1999; Guo et al. 2017 (arXiv 1706.04599); the correction for sampled negatives, He et al. 2014.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from aif_jax.blocks.block import with_table
from aif_jax.blocks.item_offset import UNTRAINED, ItemOffset, popularity_offset
from aif_jax.blocks.pure_svd import PureSvd
from aif_jax.checks import check_encoding, expect, expect_integers
from aif_jax.config import Config
from aif_jax.data.candidates import SourceFn, population_weights
from aif_jax.data.dataset import Dataset
from aif_jax.data.negatives import counts_before
from aif_jax.data.order import BatchKey
from aif_jax.encoding.encoder import Encoder
from aif_jax.encoding.vocabulary import new_rows
from aif_jax.metrics.entries import weighted_entries
from aif_jax.model import rebuilt
from aif_jax.scores import chains, with_calibration
from aif_jax.store.trained import Trained
from aif_jax.train.evaluate import labels_of, list_scores, sampled_before
from aif_jax.trees import leaves_by_path
from aif_jax.types import Array, Params


def platt(
    scores: Any, labels: Any, *, where: Any = None, weights: Any = None, rate: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and bias float32 [] of one objective, fitted on held-out entries on the host in float64.

    Arguments as `metrics.calibration`; `rate` is the share of the population's negatives that these entries hold. Raises
    ValueError for what does not fit, entries of one class, or scores that do not rise with the labels: it would reverse them.
    """
    expect(0 < rate <= 1, "calibration rate", "a share above 0 and at most 1", rate)
    entries = weighted_entries(scores, labels, where, weights)
    s, y, w = (part[entries[2] > 0] for part in entries)
    largest, limit = np.abs(s).max(initial=0.0), 1e30  # far from the ends of float32, which `scale` and `bias` are of
    expect(largest < limit, "calibration scores", f"finite logits, none beyond {limit:g}", f"one of {largest:.3g}")
    total, positives = w.sum(), w[y].sum()
    expect(0 < positives < total, "calibration labels", "entries of both classes", f"{positives:g} positives of {total:g}")
    # scores are centred, for well-conditioned steps
    centre, spread, share = np.average(s, weights=w), max(float(s.std()), 1e-12), w / total
    features = np.stack([(s - centre) / spread, np.ones_like(s)])

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        z = theta @ features
        return share @ np.logaddexp(0, np.where(y, -z, z)), features @ (share * (scipy.special.expit(z) - y))

    start = [0.0, scipy.special.logit(share @ y)]
    theta = scipy.optimize.minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-10}).x
    scale = theta[0] / spread
    expect(scale > 0, "calibration scores", "scores that rise with the labels", f"a scale of {scale:.3g}")
    return np.asarray(scale, np.float32), np.asarray(theta[1] - scale * centre + math.log(rate), np.float32)


DEVIATION = 0.4
"""Standard deviation of the SVD term over ends of histories and trained items, in logits; see experiments/notes/study.md."""
SEED = 0  # of the vector that the iteration starts from
REQUESTS = 1000  # whose scores give the scale
Edit = Callable[..., Trained]
"""`edit(trained, data, **options)`."""


def svd_term(trained: Trained, data: Dataset, *, before: int) -> Trained:
    """Give the model's `PureSvd` block, a new one without, the factors of the training events, see `svd_factors`."""
    trained = _uncalibrated(trained, data)
    config, log = trained.config, data.history_log
    block, size = config.find("pure_svd") or PureSvd(), config.schema.table_sizes["item"]
    user, item = (part[log.time < before] for part in (log.user, log.item))
    params, config = with_table(trained.params, svd_factors(user, item, size=size, block=block), block, config=config)
    return trained.replace(model=rebuilt(trained.model, config, "svd_term"), params=params)


def popularity_correction(trained: Trained, data: Dataset, *, before: int, untrained: float | None = UNTRAINED) -> Trained:
    """Add the log of each item's sampling probability to its logit, see `blocks.popularity_offset`."""
    trained, table = _uncalibrated(trained, data), popularity_offset(counts_before(data, before), untrained=untrained)
    params, config = with_table(trained.params, table, ItemOffset(), config=trained.config)
    return trained.replace(model=rebuilt(trained.model, config, "popularity_correction"), params=params)


def unseen_items(trained: Trained, data: Dataset, *, before: int, known: Any = False) -> Trained:
    """Give items without a training event the embedding of the unknown item, which `Pipeline.id_dropout` trains.

    `known` is bool [N], true for items that keep their embedding without an event too.
    """
    trained = _uncalibrated(trained, data)
    embedding = trained.params["embedding"]
    table, seen = jnp.asarray(embedding["item"]), (counts_before(data, before) > 0) | known
    shared = jnp.where(seen[:, None], table, table[:1])
    return trained.replace(params=trained.params | {"embedding": embedding | {"item": shared}})


def calibration(
    trained: Trained, data: Dataset, *, positions: Any, candidates: SourceFn | None = None,
    calibration_negatives: int | None = 15, rate: float = 1.0,
) -> Trained:  # fmt: skip
    """Add scale and bias of each objective, by which serving turns logits into calibrated probabilities.

    The candidates decide what the probabilities mean: for shown lists, a click given that the item is shown; for sampled ones,
    being the event's item among them, or among all items if the source gives `log_q`. A conditional objective is fitted where
    its condition is true. Items that a popularity correction has put below all do not count. Raises as `evaluate` and `platt`.

    Args:
      positions: integers [n], held-out events.
      candidates: source of their lists; None draws them as `evaluate` does.
      calibration_negatives: candidates after the first that count, as in `evaluate`; None takes all, as do lists with `log_q`.
      rate: share of the negatives of production that these lists hold, if a log keeps only some.
    """
    trained = _uncalibrated(trained, data)
    model, positions = trained.model, expect_integers(positions, "positions", size=len(data.log)).astype(np.int64)
    lists = (candidates or sampled_before(data, positions))(positions, BatchKey(0, 0, 0))
    count = None if calibration_negatives is None or lists.log_q is not None else 1 + calibration_negatives
    lists = jax.tree.map(lambda values: values[:, :count], lists)
    scores = list_scores(model, trained.params, data, positions, lists.rows)
    offsets = np.asarray(trained.params["fitted"].get("item_offset", {}).get("table", np.zeros(len(data.catalogue))))
    labels, parts, objectives = labels_of(model.config, lists.labels), [], chains(model.config.objectives) or {"": (0,)}
    for name, (place, *given) in objectives.items():
        known = (lists.rows > 0) & ~np.isnan(labels[name]) & (offsets[lists.rows] > UNTRAINED)
        if given:
            known &= labels[list(objectives)[given[0]]] == 1
        raw = scores[..., place] if model.config.outputs > 1 else scores
        weights = population_weights(labels[name], lists.log_q)
        entries = (np.where(known, values, 0) for values in (raw, labels[name]))
        try:
            parts.append(platt(*entries, where=known, weights=weights, rate=1.0 if given else rate))
        except ValueError as error:
            error.args = (": ".join(filter(None, (name, *error.args))),)
            raise
    scale, bias = parts[0] if len(parts) == 1 else map(np.stack, zip(*parts, strict=True))
    return trained.replace(params=with_calibration(trained.params, {"scale": scale, "bias": bias}))


def _uncalibrated(trained: Trained, data: Dataset) -> Trained:
    """Return the model without its calibration, to start an edit from; EncodingMismatch for data of another encoder."""
    check_encoding("data", expected=trained.encoding, got=data.encoding)
    return trained.replace(params=with_calibration(trained.params, None))


def svd_factors(user: Any, item: Any, *, size: int, block: PureSvd | None = None) -> np.ndarray:
    """Return factors of training events, for `PureSvd`: float32 [size, R], scaled to `DEVIATION`.

    Args:
      user, item: integers [E], rows of each training event, by time for each user. Item row 0, the unknown one, has no factor.
      size: N, rows of the catalogue.
      block: gives R, and how the history counts.

    Raises:
      TypeError, ValueError: rows that are not integers, not of one length or out of range.

    Example:
      >>> factors = svd_factors([0, 0, 1, 1, 2], [1, 2, 1, 2, 3], size=5, block=PureSvd(width=2))
      >>> bool(factors[1] @ factors[2] > abs(factors[1] @ factors[3]))  # 1 and 2 have their users in common
      True
    """
    block = block or PureSvd()
    user, item = expect_integers(user, "user", size=2**62), expect_integers(item, "item", size=size)
    expect(user.ndim == 1 and user.shape == item.shape, "user, item", "one of each for an event", [user.shape, item.shape])
    factors = np.zeros((size, block.width), np.float32)
    user, item = user[item > 0], item[item > 0]
    if not len(item):
        return factors
    users, row = np.unique(user, return_inverse=True)
    met = scipy.sparse.csr_array((np.ones(len(item)), (row, item)), shape=(len(users), size))
    met.data[:] = 1.0  # repeats count once
    least, known = min(met.shape), np.unique(item)
    if least <= block.width + 1:
        vectors = np.linalg.svd(met.toarray(), full_matrices=False)[2].T[:, : block.width]
    else:
        start = np.random.default_rng(SEED).normal(size=least)
        vectors = np.asarray(scipy.sparse.linalg.svds(met, k=block.width, v0=start)[2])[::-1].T
    vectors *= np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0))  # a singular vector has no sign
    factors[known, : vectors.shape[1]] = vectors[known]
    spread = float((_sums(row, factors[item], block) @ factors[known].T).std())
    return factors * np.float32(np.sqrt(DEVIATION / spread)) if spread > 0 else factors


def _sums(user: np.ndarray, factors: np.ndarray, block: PureSvd) -> np.ndarray:
    """Return the block's user half float64 [U, R] after the last event of some users, from events [E] by time for each."""
    order, ends = np.argsort(user, kind="stable"), np.cumsum(np.bincount(user))
    chosen = np.random.default_rng(SEED).permutation(len(ends))[:REQUESTS]
    sums = np.zeros((len(chosen), factors.shape[1]))
    for place, who in enumerate(chosen):
        last = order[max(ends[who] - block.length, ends[who - 1] if who else 0) : ends[who]][::-1]
        sums[place] = (1.0 + np.arange(len(last))) ** -block.decay @ factors[last]
    return sums


def grow_vocabulary(
    params: Params, name: str, rows: np.ndarray, size: int, key: jax.Array, *, config: Config
) -> tuple[Params, Config]:
    """Return parameters and config under another vocabulary of an attribute, see `carry_over`.

    Args:
      name: attribute whose table float [old size, D] changes, for every attribute that reads it.
      rows: int [old size], the new row of each old row, 0 first, -1 for an id that is gone.
      size: rows of the new table.
    """
    table, kept = jnp.asarray(params["embedding"][name]), np.flatnonzero(rows >= 0)
    grown = jnp.std(table[kept]) * jax.random.normal(key, (size, *table.shape[1:]), table.dtype)
    embedding = params["embedding"] | {name: grown.at[rows[kept]].set(table[kept])}
    made = params | {"embedding": embedding, "fitted": _fitted(params["fitted"], name, size, rows, config)}
    schema, fields = config.schema, ("item_attributes", "user_attributes")

    def sized(size: int) -> Config:
        of = {f: tuple(dataclasses.replace(a, size=size) if a.name == name else a for a in getattr(schema, f)) for f in fields}
        return config.replace(schema=dataclasses.replace(schema, encoding="", **of))

    for block in config.blocks:
        init = jax.jit(block.init, static_argnums=1)
        one, other = ((block.widths(of), init.eval_shape(key, of)) for of in (sized(size), sized(size + 1)))
        expect(one == other, f"block {block.name!r}", f"no width or trained row by {name!r}", "one: fit it, or read embeddings")
    return made, sized(size)


def expect_like(encoder: Encoder, own: Encoder) -> None:
    """Raise ValueError unless an encoder has the columns, scales and actions of a model's own one; its ids may be others."""
    actions = [each.vocabularies.get("action") for each in (encoder, own)]
    parts = ("columns", encoder.columns, own.columns), ("scales", encoder.scales, own.scales), ("actions", *actions)
    others = [name for name, got, expected in parts if got != expected]
    expect(not others, "encoder", "the columns, scales and actions of the model's", f"other {others}; derive it from that one")


def carry_over(trained: Trained, encoder: Encoder, *, key: jax.Array) -> Trained:
    """Return the model under the vocabularies of a newer encoder: ids that both know keep the values of their rows.

    Rows of new ids get a Gaussian embedding with the standard deviation of the old table, and the values of the unknown item in
    every table of `params["fitted"]`, until you fit the tables on the new catalogue and run the edits again. Fitted arrays
    without a row for each item stay as they are, see `Block.per_item`. A field's value that is gone becomes unknown in the
    fields of all items. Build indexes from the result: its version is another.

    Args:
      trained: model of the encoder before, not changed.
      encoder: encoder of the same columns, such as from reading newer files.

    Raises:
      ValueError: a model without an encoder or one of `assemble`, whose functions this cannot build; an encoder of other
        columns, actions or scales; a block whose trained arrays have a row for each id, or whose fitted may: see `per_item`.
    """
    before, params, config = trained.need_encoder("carry_over"), trained.params, trained.config
    expect_like(encoder, before)
    sizes = config.schema.table_sizes
    for number, (name, after) in enumerate(encoder.vocabularies.items()):
        old = before.vocabularies[name]
        if name not in sizes or old == after:
            continue
        size = max(len(after), 2)  # of an attribute without any value
        rows = np.append(new_rows(old, after), np.full(sizes[name] - len(old), -1))
        params, config = grow_vocabulary(params, name, rows, size, jax.random.fold_in(key, number), config=config)
    model = rebuilt(trained.model, config.with_encoding(encoder.version), "carry_over")
    return trained.replace(model=model, params=params, encoder=encoder.with_length(before.length), items=None)


def _fitted(fitted: Params, name: str, size: int, place: np.ndarray, config: Config) -> Params:
    """Return the fitted group: values of items in their new rows, or ids of a field that are new rows."""
    kept = np.flatnonzero(place >= 0)

    def grow(values: Array) -> jax.Array:
        values = jnp.asarray(values)
        return jnp.broadcast_to(values[:1], (size, *values.shape[1:])).at[place[kept]].set(values[kept])

    fields = fitted.get("fields", {})
    paths = {*(f"fields/{field}" for field in fields), *(f"{table.name}/table" for table in config.tables)}
    for block in config.blocks:
        paths |= {f"{block.name}/{path}" for path in block.per_item or ()}
        leaves = leaves_by_path(fitted.get(block.name, {})) if block.per_item is None else {}
        doubtful = sorted(path for path, array in leaves.items() if np.shape(array)[:1] == place.shape)
        expected = "names of the fitted arrays with a row for each item, () if no array has a row for each id"
        expect(not doubtful, f"block {block.name!r}, per_item", expected, f"None; {doubtful} may have one for each {name!r}")
    if name != "item":
        moved = jnp.asarray(np.maximum(place, 0), jnp.int32)
        return {**fitted, "fields": {**fields, name: moved[fields[name]]}} if name in fields else fitted
    grown = [grow(leaf) if path in paths else leaf for path, leaf in leaves_by_path(fitted).items()]
    return jax.tree.unflatten(jax.tree.structure(fitted), grown)
