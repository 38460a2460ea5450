"""The served model under newer vocabularies: as a start for training, and as it answers newer requests in service."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.catalogue import Catalogue
from aif_jax.checks import expect
from aif_jax.config import Config
from aif_jax.data.cascade import Cascade
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import EventLog
from aif_jax.encoding.encoder import Encoder, reencode
from aif_jax.encoding.vocabulary import Vocabulary, new_rows
from aif_jax.model import PreRanker, fit_tables
from aif_jax.store.trained import Trained
from aif_jax.train.edits import carry_over, expect_like
from aif_jax.trees import take
from aif_jax.types import ItemFeatures, Params, UserFeatures

ROWS = "rows_of_newer_ids"  # group of params: the row of each newer id in the model's own tables


def forget_ids(data: Dataset, since: int) -> Dataset:
    """Return the data without ids that had no event since a moment: items, users, and attribute values of them alone.

    Events of a forgotten item stay in histories as events of the unknown item; events of a forgotten user are left out, but
    item statistics still count them. Candidates of a logged request count as events.

    Args:
      data: data with an encoder.
      since: seconds since 1970.

    Example:
      >>> from aif_jax.encoding.columns import Columns
      >>> from aif_jax.readers import read
      >>> events = {"user": [1, 2, 2], "item": [7, 8, 7], "time": [10, 20, 90]}
      >>> data = read(events, items={"item": [7, 8], "category": ["tea", "cup"]}, columns=Columns())
      >>> fewer = forget_ids(data, 50)
      >>> {name: vocabulary.raw.tolist() for name, vocabulary in fewer.encoder.vocabularies.items()}
      {'user': [2], 'item': [7], 'category': ['tea']}
      >>> fewer.log.item.tolist()
      [0, 1]
    """
    before, log, cascade = data.encoder, data.log, data.cascade
    if before is None:
        raise ValueError("forget_ids: expected data with an encoder, got data without; read(..., encoder=...)")
    recent = log.time >= since
    logged = () if cascade is None else cascade.rows[recent[cascade.positions]]
    items, users = (np.union1d(0, rows) for rows in (np.append(log.item[recent], logged).astype(int), log.user[recent]))
    kept = {"item": [items], "user": [users]}  # rows that stay, 0 among them
    for table, rows in ((data.catalogue.items.ids, items), (data.user_ids, users)):
        for name in set(table) - {"item", "user"}:
            kept.setdefault(name, []).append(np.ravel(table[name][rows]))
    vocabularies = dict(before.vocabularies)
    for name, rows in kept.items():
        vocabularies[name] = Vocabulary(vocabularies[name].ids_of(np.setdiff1d(np.concatenate(rows), 0)))
    encoder = dataclasses.replace(before, vocabularies=vocabularies)
    places = {name: np.maximum(new_rows(before.vocabularies[name], encoder.vocabularies[name]), 0) for name in kept}
    item, user = places["item"][log.item], places["user"][log.user]
    known, features = user > 0, reencode(take(data.catalogue.items, items), before, encoder)
    if cascade is not None:
        there = known[cascade.positions]
        cascade = Cascade(
            positions=(np.cumsum(known) - 1)[cascade.positions[there]],
            rows=places["item"][cascade.rows[there]],
            stage=cascade.stage[there],
            labels={name: values[there] for name, values in cascade.labels.items()},
        )
    every = data.counted
    counted = EventLog(every.user, places["item"][every.item], every.action, every.time)  # statistics read no users
    return dataclasses.replace(
        data,
        log=EventLog(*(c[known] for c in (user, item, log.action, log.time)), users=len(vocabularies["user"])),
        catalogue=Catalogue(schema=encoder.schema, raw=vocabularies["item"].raw, items=features),
        user_ids={name: places[name][table[users]] for name, table in data.user_ids.items()},
        user_floats=data.user_floats[users],
        users=vocabularies["user"],
        items=vocabularies["item"],
        encoder=encoder,
        cascade=cascade,
        display_positions=None if data.display_positions is None else data.display_positions[known],
        counted_log=counted if encoder.schema.item_statistics else None,  # all events, as in service
    )


def warm_start(trained: Trained, encoder: Encoder, catalogue: Catalogue, *, forget: bool = False, seed: int = 0) -> Trained:
    """Return the model under another vocabulary: old ids keep their rows, new ids get random ones, tables are fitted again.

    SVD term and popularity correction are zero until they are fitted again after training; a calibration is left out.

    Args:
      trained: model with an encoder.
      encoder: encoder of newer data, such as of `read(earlier=trained)`.
      catalogue: items of `encoder`.
      forget: whether `encoder` may lack ids of the model, whose rows are dropped.
      seed: seed of new rows and fitted tables; the seed of the model's training keeps its signatures.

    Raises ValueError: a model without an encoder, or without `forget` an encoder that lacks ids of the model's.
    """
    old = trained.need_encoder("warm_start")
    for name in (a.name for a in (*old.schema.item_attributes, *old.schema.user_attributes)):
        vocabulary = old.vocabularies[name]
        lacks = vocabulary.raw[new_rows(vocabulary, encoder.vocabularies[name])[1:] < 0]
        expect(forget or not len(lacks), f"encoder, {name!r}", "every id of the model's", f"none of {lacks[:5].tolist()}")
    carried = carry_over(trained.replace(params=trained.params | {"fitted": {}}), encoder, key=jax.random.key(seed))
    fitted = fit_tables(carried.config, catalogue, seed=seed)
    return carried.replace(params=carried.params | {"fitted": fitted}, items=catalogue.items)


def with_served_vocabulary(trained: Trained, encoder: Encoder | None) -> Trained:
    """Return a model for features of another encoder, with the scores that it gives in service: ids that it lacks are row 0.

    So that two models of different vocabularies answer the same encoded requests.

    Args:
      trained: any model; one of `encoder` is returned as it is.
      encoder: encoder of the features, with the same columns, scales and actions; None returns the model.

    Raises ValueError: other columns, scales or actions, another width of content, or a model without an encoder.
    """
    if encoder is None or trained.encoding == encoder.version:
        return trained
    own = trained.need_encoder("with_served_vocabulary")
    expect_like(encoder, own)
    attributes = (*encoder.schema.item_attributes, *encoder.schema.user_attributes)
    places = {a.name: np.maximum(new_rows(encoder.vocabularies[a.name], own.vocabularies[a.name]), 0) for a in attributes}
    rows = {a.name: np.pad(places[a.name], (0, a.size - len(places[a.name]))) for a in attributes}
    config = trained.config.replace(schema=encoder.schema)
    return Trained(map_ids(trained.model, config, encoder.version), trained.params | {ROWS: rows})


@functools.lru_cache(maxsize=8)  # one model for each pair, so that its programs are compiled once
def map_ids(base: PreRanker, config: Config, features: str) -> PreRanker:
    """Return a model for features of another encoder (version `features`, sizes of `config`): `params[ROWS]` maps its ids."""
    encoding = base.config.schema.encoding

    def own(params: Params, features: Any, **changes: Any) -> Any:
        ids = {name: jnp.asarray(params[ROWS][name])[values] for name, values in features.ids.items()}
        return dataclasses.replace(features, ids=ids, encoding=encoding, **changes)

    def init(*given: Any, **options: Any) -> Params:
        attributes = (*config.schema.item_attributes, *config.schema.user_attributes)
        return base.init(*given, **options) | {ROWS: {a.name: jnp.zeros(a.size, jnp.int32) for a in attributes}}

    def user(params: Params, features: UserFeatures) -> Any:
        item = jnp.asarray(params[ROWS]["item"])[features.history.item]
        return base.user(params, own(params, features, history=dataclasses.replace(features.history, item=item)))

    def item(params: Params, features: ItemFeatures) -> Any:
        return base.item(params, own(params, features))

    def joint(params: Params, features: UserFeatures, items: ItemFeatures) -> jax.Array:
        return base.interaction(params, user(params, features), jax.vmap(item, (None, 0))(params, items))

    return base._replace(config=config.with_encoding(features), init=init, user=user, item=item, joint=joint)
