"""Deltas that admit items into free rows: equal to a full rebuild under the new encoder, or refused."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax.blocks import CosineTiers, ItemOffset, LshDin, PureSvd, SimTierCodes
from aif_jax.checks import EncodingMismatch
from aif_jax.encoding.capacity import Capacity
from aif_jax.export import AdmittedItems, Delta
from aif_jax.readers import admit, read_items
from tests import refresh_world as world
from tests.demo import same
from tests.test_delta import Start, check, moved, rows_of, start, with_rows

pytestmark = pytest.mark.usefixtures("light_compilation")
NEW = [131, 134]
CONTENT = (np.arange(100, 136), np.random.default_rng(3).normal(size=(36, 6)).astype(np.float32))


def data_of(encoder: aif.Encoder) -> aif.Dataset:
    files: Any = dict(items=world.items(5), encoder=encoder, unknown="skip", progress=False)
    return aif.read(world.events(5), content=CONTENT if encoder.schema.content else None, **files)


def base_of(*, content: bool, rows: int = 34) -> aif.Dataset:
    """The shop when items have rows that had an event by the fourth day."""
    days = aif.read(
        world.events(5), items=world.items(5), columns=world.COLUMNS, content=CONTENT if content else None, progress=False
    )
    encoder, turnover = admit(days.encoder, world.events(4), capacity={"item": Capacity(rows=rows)}, fresh=True)
    assert turnover["item"].held == 30
    return data_of(encoder)


def features_of(encoder: aif.Encoder, ids: list[int]) -> aif.ItemFeatures:
    content = CONTENT if encoder.schema.content else None
    raw, features = next(iter(read_items(world.items(5), encoder, content=content)))
    return jax.tree.map(lambda leaf: leaf[np.searchsorted(raw, ids)], features)


def admitted(base: Start, ids: list[int] = NEW) -> tuple[AdmittedItems, aif.Dataset]:
    """The items in free rows, the last one first, and the data under the new encoder."""
    vocabulary = base.data.items
    free = np.setdiff1d(np.arange(1, len(vocabulary)), vocabulary.rows)[::-1][: len(ids)]
    more = aif.Vocabulary(ids, rows=free.astype(np.int32), size=len(vocabulary))
    made = AdmittedItems.make(base.trained, more, features_of(base.data.encoder, more.raw.tolist()))
    return made, data_of(base.data.encoder.with_items(more))


@functools.cache
def streaming() -> Start:
    """A model whose users' rows hold sums."""
    data = base_of(content=False)
    return start(aif.presets.streaming(data.schema, width=8, towers=(8,), short_length=4, long_length=8), data)


def fitted() -> Start:
    """A model with every kind of fitted table."""
    data = base_of(content=True)
    blocks = (LshDin(), SimTierCodes(codes=8, tiers=4), CosineTiers(tiers=4), ItemOffset(), PureSvd(width=4, length=8))
    config = aif.presets.two_tower(data.schema, width=8, towers=(8,), head=(8,), short_length=4, long_length=8)
    made = start(config.replace(blocks=blocks), data)
    tables, rng = made.trained.params["fitted"], np.random.default_rng(2)
    size = len(data.items)
    offset = np.where(np.arange(size) % 7 == 0, -100.0, rng.normal(size=size)).astype(np.float32)
    tables |= {"item_offset": {"table": offset}, "pure_svd": {"table": rng.normal(size=(size, 4)).astype(np.float32)}}
    tables["pure_svd"]["table"][0] = 0
    return start(made.trained.config, data, made.trained.params)


@pytest.mark.parametrize("make", [streaming, fitted])
def test_a_delta_with_new_items_equals_a_full_rebuild(make, tmp_path):
    base = make()
    new, data = admitted(base)
    rows = moved(base.trained.params, 1)
    Delta.make(base.trained, rows, data.catalogue, events=data, admitted=new).save(tmp_path / "delta")
    delta = Delta.load(tmp_path / "delta")
    assert set(NEW) <= set(delta.items.key) and "2 of them new" in repr(delta)
    before = base.index.stored()
    applied = delta.apply(base.trained, base.index, base.users)
    assert applied.trained.encoding == data.encoding == new.encoding != base.trained.encoding
    params = with_rows(base.trained.params, rows)
    at = new.ids.rows
    params["fitted"] = jax.tree.map(np.array, params["fitted"])
    for group, tables in new.fitted.items():
        for name, values in tables.items():
            params["fitted"][group][name][at] = values
    assert applied.trained.config == base.trained.config.with_encoding(data.encoding)
    check(applied, data, params)
    assert len(applied.item_index) == len(base.index) + 2 and applied.item_index.lookup(NEW)[1].all()
    assert rows_of(applied.user_table) != rows_of(base.users)
    assert same(base.index.stored(), before), "the base moved"
    for field in ("category", "brand"):
        wanted = np.asarray(data.catalogue.ids[field])
        assert field not in params["fitted"]["fields"] or np.array_equal(params["fitted"]["fields"][field][at], wanted[at])
    assert delta.apply(*applied).item_index is applied.item_index, "applied twice, it changes nothing"


def test_fitted_rows_of_a_new_item_are_what_its_content_gives():
    """By the tables that were fitted without it; what a catalogue alone gives is that of the unknown item, or the least."""
    base = fitted()
    new, _ = admitted(base)
    params, items = base.trained.params, features_of(base.data.encoder, new.ids.raw.tolist())
    before = jax.vmap(base.trained.model.item, (None, 0))(params, items)
    for table in base.trained.config.tables:
        assert (
            np.array_equal(new.fitted[table.name]["table"], before.fitted[table.name]) and new.fitted[table.name]["table"].any()
        )
    codes = new.fitted["simtier_codes"]
    assert np.array_equal(codes["nearest"], before.blocks["simtier_codes"]["codes"])
    assert np.array_equal(codes["code"], codes["nearest"][:, 0])
    offset = np.asarray(params["fitted"]["item_offset"]["table"])
    assert (new.fitted["item_offset"]["table"] == offset[offset > -100].min()).all()
    params["fitted"]["item_offset"]["table"][0] = 0.25
    again, _ = admitted(base)
    assert (again.fitted["item_offset"]["table"] == np.float32(0.25)).all() and not new.fitted["pure_svd"]["table"].any()


def test_a_new_item_ranks_by_its_own_row_after_the_delta():
    base = streaming()
    new, data = admitted(base)
    rows = moved(base.trained.params, 1, share=1.0)
    delta = Delta.make(base.trained, rows, data.catalogue, admitted=new)
    applied = delta.apply(base.trained, base.index)
    raw = {"item": [131, 101, 131], "time": [world.START + 5 * world.DAY + at for at in (1, 2, 3)]}
    now = world.START + 6 * world.DAY
    user = applied.trained.encoder.with_length(8).user({"user": 3}, raw, now)
    assert user.history.item[:3].tolist() == data.items.encode([131, 101, 131]).tolist() and user.history.item[0] > 0
    (items, there), model, params = applied.item_index.take([131, 134, 101]), applied.trained.model, applied.trained.params
    staged = jax.jit(lambda params, user, rows: model.interaction(params, model.user(params, user), rows))(params, user, items)
    joint = jax.jit(model.joint)(params, user, features_of(data.encoder, [131, 134, 101]))
    assert there.all()
    np.testing.assert_allclose(staged, joint, atol=1e-5)


def test_what_cannot_be_admitted_is_refused():
    base = streaming()
    new, data = admitted(base)
    rows, size = moved(base.trained.params, 1), len(base.data.items)
    with pytest.raises(EncodingMismatch):
        Delta.make(base.trained, rows, base.data.catalogue, admitted=new)
    taken = aif.Vocabulary([131], rows=base.data.items.rows[:1], size=size)
    with pytest.raises(ValueError, match="expected 31 distinct rows"):
        AdmittedItems.make(base.trained, taken, features_of(base.data.encoder, [131]))
    known = aif.Vocabulary([101], rows=np.array([size - 1]), size=size)
    with pytest.raises(ValueError, match="expected 31 distinct rows"):
        AdmittedItems.make(base.trained, known, features_of(base.data.encoder, [101]))
    with pytest.raises(ValueError, match=r"Vocabulary.with_ids: expected two of one fixed size, 35, got"):
        base.data.items.with_ids(aif.Vocabulary([131]))
    short = new._replace(fitted={"fields": {"category": np.zeros(3, np.int32)}})
    with pytest.raises(ValueError, match="delta, new items, 'fields': expected a row for each of them"):
        short.trained(base.trained)
    other = new._replace(encoding="0" * 64)
    with pytest.raises(ValueError, match="delta, new items: expected the encoder 0000"):
        other.trained(base.trained)
    applied = Delta.make(base.trained, rows, data.catalogue, admitted=new).trained(base.trained)
    with pytest.raises(ValueError, match="distinct rows"):
        new.trained(applied)
