"""Yesterday's model under today's vocabulary: as a start for training, and as it would answer today in service."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.catalogue import Catalogue
from aif_jax.checks import expect
from aif_jax.config import Config
from aif_jax.encoding.encoder import Encoder, schema_of
from aif_jax.encoding.vocabulary import Vocabulary, new_rows
from aif_jax.model import PreRanker, fit_tables
from aif_jax.store.trained import Trained
from aif_jax.train.edits import carry_over
from aif_jax.types import ItemFeatures, Params, UserFeatures

ROWS = "rows_of_newer_ids"  # group of params: the row of each newer id in the model's own tables


def grown(encoder: Encoder, newer: Encoder) -> Encoder:
    """An encoder with the ids of both; columns, scales and listed actions are those of the first, so floats mean the same.

    Args:
      encoder: encoder of the served model. Itself is returned where `newer` has no further id.
      newer: encoder of newer data with the same columns. Its actions are left out where they are a vocabulary: their number is
        part of the model.

    Raises:
      ValueError: other columns; ids that are integers in one and text in the other.

    Example:
      >>> from aif_jax.encoding.columns import Columns
      >>> def encoder(*items):
      ...     known = {"user": Vocabulary([1]), "item": Vocabulary(items), "category": Vocabulary(["tea"])}
      ...     return Encoder(schema=schema_of(Columns(), known), columns=Columns(), vocabularies=known)
      >>> grown(encoder(7, 9), encoder(8, 9)).vocabularies["item"].raw.tolist()
      [7, 8, 9]
    """
    expect(encoder.columns == newer.columns, "columns", f"those of the served model, {encoder.columns}", newer.columns)
    vocabularies = dict(encoder.vocabularies)
    for name, vocabulary in vocabularies.items():
        other = newer.vocabularies[name]
        if name == "action" or not len(other.raw) or other == vocabulary:
            continue
        same = vocabulary.kind in (None, other.kind)
        expect(same, f"ids of {name!r}", f"{vocabulary.kind} like those of the served model", other.kind)
        ids = np.union1d(vocabulary.raw, other.raw) if other.kind == "integers" else [*vocabulary.raw, *other.raw]
        vocabularies[name] = Vocabulary(ids)
    if vocabularies == dict(encoder.vocabularies):
        return encoder
    schema = schema_of(encoder.columns, vocabularies, content=encoder.schema.content)
    return dataclasses.replace(encoder, schema=schema, vocabularies=vocabularies)


def warm_start(trained: Trained, encoder: Encoder, catalogue: Catalogue, *, seed: int = 0) -> Trained:
    """The model under a larger vocabulary: old ids keep their rows, new ids get random ones, fitted tables are fitted again.

    An SVD term and a popularity correction are zero until they are fitted again after training; a calibration is left out.

    Args:
      trained: model with an encoder.
      encoder: what `grown` returned.
      catalogue: items of `encoder`.
      seed: seed of new rows, and of what is fitted on the catalogue: that of the model's own training keeps its signatures.

    Raises:
      ValueError: a model without an encoder, or an encoder that lacks ids of the model's.
    """
    old = trained.need_encoder("warm_start")
    for name in (a.name for a in (*old.schema.item_attributes, *old.schema.user_attributes)):
        vocabulary = old.vocabularies[name]
        lacks = vocabulary.raw[new_rows(vocabulary, encoder.vocabularies[name])[1:] < 0]
        expect(not len(lacks), f"encoder, {name!r}", "every id of the model's", f"none of {lacks[:5].tolist()}")
    carried = carry_over(trained, encoder, key=jax.random.key(seed))
    fitted = fit_tables(carried.config, catalogue, seed=seed)
    return carried.replace(params=carried.params | {"fitted": fitted})


def as_served(trained: Trained, encoder: Encoder | None) -> Trained:
    """The model for features of another encoder, with the scores that it gives in service: ids that it lacks are unknown.

    A request in service is encoded by the model's own encoder, where an id that the vocabulary lacks is row 0 and everything
    else of the item stays. The same is done here to features that are encoded already, so that two models answer the same
    requests.

    Args:
      trained: any model; one of `encoder` is returned as it is.
      encoder: encoder of the features, with the same columns; None returns the model.

    Raises:
      ValueError: other columns, another width of content, or a model without an encoder.
    """
    if encoder is None or trained.encoding == encoder.version:
        return trained
    own = trained.need_encoder("as_served")
    expect(own.columns == encoder.columns, "as_served columns", f"those of the model, {own.columns}", encoder.columns)
    attributes = (*encoder.schema.item_attributes, *encoder.schema.user_attributes)
    vocabularies = encoder.vocabularies
    places = {a.name: np.maximum(new_rows(vocabularies[a.name], own.vocabularies[a.name]), 0) for a in attributes}
    rows = {a.name: np.pad(places[a.name], (0, a.size - len(places[a.name]))) for a in attributes}
    config = trained.config.replace(schema=encoder.schema)
    return Trained(mapped(trained.model, config, encoder.version), trained.params | {ROWS: rows})


def under(items: ItemFeatures, before: Encoder, after: Encoder) -> ItemFeatures:
    """The features that one encoder made under the ids of another of the same columns, where what it lacks is unknown."""
    places = {name: np.maximum(new_rows(before.vocabularies[name], after.vocabularies[name]), 0) for name in items.ids}
    ids = {name: places[name][rows] for name, rows in items.ids.items()}
    return dataclasses.replace(items, ids=ids, encoding=after.version)


@functools.lru_cache(maxsize=8)  # one model for each pair, so that its programs are compiled once
def mapped(base: PreRanker, config: Config, features: str) -> PreRanker:
    """A model for features of another encoder (version `features`): `params[ROWS]` maps their ids to its own, by attribute.

    `config` has the sizes of that encoder.
    """
    encoding = base.config.schema.encoding

    def ids(params: Params, given: dict[str, Any]) -> dict[str, Any]:
        return {name: jnp.asarray(params[ROWS][name])[values] for name, values in given.items()}

    def init(*given: Any, **options: Any) -> Params:
        attributes = (*config.schema.item_attributes, *config.schema.user_attributes)
        return base.init(*given, **options) | {ROWS: {a.name: jnp.zeros(a.size, jnp.int32) for a in attributes}}

    def user(params: Params, features: UserFeatures) -> Any:
        item = jnp.asarray(params[ROWS]["item"])[features.history.item]
        history = dataclasses.replace(features.history, item=item)
        own_ids = ids(params, features.ids)
        return base.user(params, dataclasses.replace(features, ids=own_ids, history=history, encoding=encoding))

    def item(params: Params, features: ItemFeatures) -> Any:
        return base.item(params, dataclasses.replace(features, ids=ids(params, features.ids), encoding=encoding))

    def joint(params: Params, features: UserFeatures, items: ItemFeatures) -> jax.Array:
        return base.interaction(params, user(params, features), jax.vmap(item, (None, 0))(params, items))

    return base._replace(config=config.with_encoding(features), init=init, user=user, item=item, joint=joint)
