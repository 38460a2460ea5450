"""Deltas: what a short training moved equals a full rebuild bit for bit, in model, index and user table, or is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import aif_jax as aif
from aif_jax import export
from aif_jax.data.pipeline import Pipeline
from aif_jax.export import Delta, MovedRows, WrongBase
from aif_jax.export.delta import Chain
from aif_jax.refreshing.frozen import moving_tables, rows_state, rows_step, whole_params
from aif_jax.store.trained import Trained
from aif_jax.train import init_state, make_step
from aif_jax.train.fit import init_params
from aif_jax.train.tasks import NextItem
from aif_jax.trees import leaves_by_path
from aif_jax.user_table import RemoteRows, UserTable
from tests import refresh_world as world
from tests.demo import same

TASK = NextItem(negatives=3)


@dataclasses.dataclass
class Start:
    """A served model of the small shop with its index and user table."""

    data: aif.Dataset
    trained: Trained
    index: aif.ItemIndex
    users: UserTable


def start(config: aif.Config, data: aif.Dataset, params: Any = None) -> Start:
    model = aif.build(config)
    trained = Trained(model, params or init_params(model, data, seed=0), data.encoder)
    index = aif.ItemIndex.build(trained, data.catalogue, progress=False)
    return Start(data, trained, index, UserTable.build(trained, data, clock=None, progress=False))


@pytest.fixture(scope="module")
def data() -> aif.Dataset:
    return dataclasses.replace(world.data(5))


@pytest.fixture(scope="module")
def streaming(data) -> Start:
    """A model whose users' rows hold sums of item embeddings."""
    sizes: dict[str, Any] = dict(width=8, towers=(8,), short_length=4, long_length=8)
    return start(aif.presets.streaming(data.schema, **sizes), data)


def moved(params: Any, seed: int, tables: tuple[str, ...] = ("item",), share: float = 0.2) -> dict[str, MovedRows]:
    """Some rows of tables, moved at random."""
    rng, made = np.random.default_rng(seed), {}
    for name in tables:
        table = np.asarray(params["embedding"][name])
        at = 1 + np.sort(rng.choice(len(table) - 1, max(1, int(share * (len(table) - 1))), replace=False)).astype(np.int32)
        made[name] = MovedRows(at, table[at] + rng.normal(size=table[at].shape).astype(np.float32))
    return made


def with_rows(params: Any, rows: dict[str, MovedRows]) -> Any:
    """The parameters with these rows, by NumPy."""
    tables = {name: np.array(table) for name, table in params["embedding"].items()}
    for name, (at, values) in rows.items():
        tables[name][at] = values
    return {**params, "embedding": tables}


def rows_of(table: UserTable) -> dict[Any, bytes]:
    """The row of each user."""
    copy = table.copy().rows
    return {user: copy.get([user]).words.tobytes() for user in copy.of}


def check(applied: Any, data: aif.Dataset, params: Any = None, catalogue: Any = None) -> None:
    """Raises unless what is behind deltas equals a full rebuild of its parameters, which are these."""
    assert params is None or same(applied.trained.params, params)
    rebuilt = Trained(aif.build(applied.trained.config), applied.trained.params, data.encoder)
    index = aif.ItemIndex.build(rebuilt, catalogue or data.catalogue, progress=False)
    assert len(applied.item_index) == len(index) and same(applied.item_index.stored(), index.stored())
    table = UserTable.build(rebuilt, data, clock=None, progress=False)
    assert rows_of(applied.user_table) == rows_of(table) and len(applied.user_table) == len(table)


@pytest.mark.parametrize("tables", [("item",), ("item", "category", "brand")])
def test_a_chain_of_deltas_equals_a_full_rebuild(streaming, data, tmp_path, tables):
    """Through files, delta upon delta, with rows of users who have new events meanwhile."""
    parts: Any = (streaming.trained, streaming.index, streaming.users)
    params = streaming.trained.params
    before = streaming.index.stored(), rows_of(streaming.users)
    for number in (1, 2, 3):
        rows = moved(params, number, tables)
        made = Delta.make(parts[0], rows, data.catalogue, number=number, events=data)
        made.save(tmp_path / f"{number}")
        read = Delta.load(tmp_path / f"{number}")
        assert read.version == made.version and read.base == parts[0].version and read.number == number
        parts, params = read.apply(*parts), with_rows(params, rows)
        assert {part.version for part in parts} == {made.version}
    check(parts, data, params)
    assert same(before[0], streaming.index.stored()), "the base moved"
    assert rows_of(streaming.users) == before[1]
    walked = Chain(tmp_path).on(streaming.trained.version)
    assert [path.name for path in walked.values()] == ["1", "2", "3"] and list(walked)[-1] == parts[0].version
    assert Chain(tmp_path).on("other") == Chain(tmp_path / "none").on(streaming.trained.version) == {}


def test_only_what_reads_a_row_that_moved_is_in_a_delta(streaming, data):
    """An item by its id and by each attribute; a user by the items of the whole history."""
    one = int(data.catalogue.ids["category"][1])
    of_category = data.catalogue.raw[data.catalogue.ids["category"][1:] == one]
    table = np.asarray(streaming.trained.params["embedding"]["category"])
    rows = {"category": MovedRows(np.array([one], np.int32), table[[one]] + 1)}
    made = Delta.make(streaming.trained, rows, data.catalogue, events=data)
    assert set(made.items.key) == set(of_category)
    read = np.isin(data.log.item, np.flatnonzero(data.catalogue.ids["category"] == one))
    assert set(made.users.users) == set(data.users.ids_of(np.unique(data.log.user[read])).tolist())
    last = 1 + int(np.bincount(data.log.item, minlength=len(data.items))[1:].argmin())
    item = np.asarray(streaming.trained.params["embedding"]["item"])[[last]]
    few = Delta.make(streaming.trained, {"item": MovedRows(np.array([last], np.int32), item + 1)}, data.catalogue, events=data)
    assert few.items.key.tolist() == [data.items.raw[last - 1]]
    assert set(few.users.users) == set(data.users.ids_of(np.unique(data.log.user[data.log.item == last])).tolist())
    extra = Delta.make(
        streaming.trained, {"item": MovedRows(np.array([last], np.int32), item + 1)}, data.catalogue, events=data, also=[1]
    )
    assert set(extra.users.users) == {*few.users.users, data.users.ids_of(np.array([1]))[0]}


def test_rows_of_users_of_a_model_that_keeps_no_sums_stay(data):
    """The events of a user are in the row as ids, so nothing of it depends on an embedding."""
    made = start(aif.presets.two_tower(data.schema, width=4, towers=(8,), short_length=4), data)
    rows = moved(made.trained.params, 1, ("item", "category"))
    delta = Delta.make(made.trained, rows, data.catalogue, events=data)
    assert delta.users.users == []
    applied = delta.apply(made.trained, made.index, made.users)
    check(applied, data, with_rows(made.trained.params, rows))


def test_a_user_table_takes_events_after_a_delta(streaming, data):
    delta = Delta.make(streaming.trained, moved(streaming.trained.params, 1), data.catalogue, events=data)
    applied = delta.apply(streaming.trained, streaming.index, streaming.users)
    before = rows_of(streaming.users)
    raw = {"user": [3, 10_001], "item": [101, 102], "time": [world.START + 6 * world.DAY] * 2}
    counts = applied.user_table.update(raw, position=5)
    assert counts.users == 2 and applied.user_table.update(raw, position=5).repeated == 2
    assert rows_of(streaming.users) == before and len(applied.user_table) == len(streaming.users) + 1
    whole = UserTable.build(applied.trained, data, clock=None, progress=False)
    whole.update(raw, position=5)
    assert rows_of(whole) == rows_of(applied.user_table)


def test_wrong_bases_and_repeats_have_an_answer(streaming, data):
    first = Delta.make(streaming.trained, moved(streaming.trained.params, 1), data.catalogue, events=data)
    applied = first.apply(streaming.trained, streaming.index, streaming.users)
    second = Delta.make(applied.trained, moved(applied.trained.params, 2), data.catalogue, number=2, events=data)
    with pytest.raises(WrongBase, match="apply the deltas between them first, in their order, or load the export"):
        second.apply(streaming.trained)
    with pytest.raises(WrongBase, match="delta for index: expected one that builds on version"):
        second.apply(applied.trained, streaming.index)
    with pytest.raises(WrongBase, match="delta for user table"):
        second.apply(applied.trained, applied.item_index, streaming.users)
    again = first.apply(*applied)
    assert all(a is b for a, b in zip(again, applied, strict=True)), "applied twice, it changes nothing"
    with pytest.raises(WrongBase):
        first.apply(second.apply(*applied).trained)
    without = Delta.make(streaming.trained, moved(streaming.trained.params, 1), data.catalogue)
    with pytest.raises(ValueError, match="expected one with rows of users for a user table, got one without; publish a full"):
        without.apply(streaming.trained, streaming.index, streaming.users)
    table = streaming.users
    remote = table.copy()
    remote.rows = RemoteRows(Scripts(), version=table.version, width=table.row_bytes // 4)
    with pytest.raises(ValueError, match="expected rows in this process, got others; rows in RemoteRows belong to one version"):
        first.apply(streaming.trained, None, remote)
    compact = aif.ItemIndex.build(streaming.trained, data.catalogue, storage="int8", progress=False)
    with pytest.raises(ValueError, match="index storage: expected 'float32', in which deltas hold rows, got 'int8'"):
        first.apply(streaming.trained, compact)


class Scripts:
    """As much of a client as `RemoteRows` needs to be made."""

    def register_script(self, text: str) -> str:
        return text


@pytest.mark.parametrize(
    "rows, message",
    [
        ({}, "Delta.rows: expected rows of at least one table, got none"),
        ({"item": MovedRows(np.array([3, 3], np.int32), np.zeros((2, 8), np.float32))}, "expected ascending rows, at least"),
        ({"item": MovedRows(np.array([3], np.int32), np.full((1, 8), np.nan, np.float32))}, "Delta.rows 'item'"),
        ({"item": MovedRows(np.array([0], np.int32), np.zeros((1, 8), np.float32))}, "expected rows from 1 on, got row 0; le"),
        ({"shop": MovedRows(np.array([3], np.int32), np.zeros((1, 8), np.float32))}, "delta: expected tables among"),
        ({"item": MovedRows(np.array([900], np.int32), np.zeros((1, 8), np.float32))}, "delta, table 'item': expected rows of"),
        ({"item": MovedRows(np.array([3], np.int32), np.zeros((1, 9), np.float32))}, "delta, table 'item': expected rows of"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_refused(streaming, data, rows, message):
    with pytest.raises(ValueError, match=message):
        Delta.make(streaming.trained, rows, data.catalogue)


def test_an_index_of_strings_and_an_item_that_was_deleted(data):
    """Deltas go by raw id; an item that the index lost since stays out of it."""
    items = {name: list(values) for name, values in world.items(5).items()}
    items["item"] = [f"item {number}" for number in items["item"]]
    events = {**world.events(5), "item": [f"item {number}" for number in world.events(5)["item"]]}
    named = aif.read(events, items=items, columns=world.COLUMNS, progress=False)
    made = start(aif.presets.two_tower(named.schema, width=4, towers=(8,), short_length=4), named)
    rows = moved(made.trained.params, 1, ("item",), 0.9)
    delta = Delta.make(made.trained, rows, named.catalogue)
    gone = delta.items.key[0]
    raw = [name for name in items["item"] if aif.index.string_ids([name])[0] == gone]
    applied = delta.apply(made.trained, made.index.delete(raw))
    assert len(applied.item_index) == len(made.index) - 1 and not applied.item_index.lookup(raw)[1][0]
    rebuilt = aif.ItemIndex.build(Trained(made.trained.model, with_rows(made.trained.params, rows), named.encoder),
                                  named.catalogue, progress=False).delete(raw)  # fmt: skip
    assert same(applied.item_index.stored(), rebuilt.stored())


def test_items_upserted_after_a_delta_are_of_its_version(streaming, data):
    delta = Delta.make(streaming.trained, moved(streaming.trained.params, 1), data.catalogue)
    applied = delta.apply(streaming.trained, streaming.index)
    items = {name: values[:2] for name, values in world.items(5).items()}
    rebuilt = aif.ItemIndex.build(applied.trained, [world.items(5)], progress=False)
    after = applied.item_index.delete(items["item"]).upsert(items)
    assert same(after.stored(), rebuilt.stored()) and after.version == delta.version
    old = streaming.index.delete(items["item"]).upsert(items)  # from the snapshot before: a copy
    assert old.version == streaming.trained.version
    assert same(old.stored(), streaming.index.stored())


def test_an_export_of_what_is_behind_a_delta_names_its_contents(streaming, data, tmp_path):
    applied = Delta.make(streaming.trained, moved(streaming.trained.params, 1), data.catalogue).apply(
        streaming.trained, streaming.index
    )
    export.save(tmp_path / "export", applied.trained, applied.item_index, platforms=("cpu",), stablehlo=False)
    read = export.restore(tmp_path / "export")
    flat = Trained(applied.trained.model, applied.trained.params, data.encoder)
    assert read.trained.version == read.index.version == flat.version != applied.trained.version
    assert same(read.trained.params, applied.trained.params)
    assert same(read.index.stored(), applied.item_index.stored())


# training that moves rows alone


@pytest.mark.parametrize("optimizer", [optax.adam(0.05), optax.sgd(0.5)])
def test_training_moves_rows_that_a_batch_reads_and_nothing_else(streaming, data, optimizer):
    trained = streaming.trained
    tables = moving_tables(data.schema)
    assert "item" in tables and not {"category", "brand"} & set(tables)
    state = rows_state(trained.params, tables, optimizer)
    step = rows_step(trained.model, optimizer, loss=TASK.loss, tables=tables)
    positions = TASK.positions(data, min_history=1, since=None, before=None)[:64]
    feed = Pipeline(
        dataset=data, positions=positions, candidates=TASK.source(data, before=1 << 33), config=trained.config, batch_size=16
    )
    read: set[int] = set()
    for fed in feed.batches():
        read |= set(np.unique(np.asarray(fed.batch.items.ids["item"])))
        read |= set(np.unique(np.asarray(fed.batch.users.history.item))) | {0}
        state, metrics = step(state, fed.batch)
        assert np.isfinite(metrics["loss"])
    after = whole_params(state.params)
    old, new = leaves_by_path(trained.params), leaves_by_path(after)
    assert [path for path in old if np.asarray(old[path]).tobytes() != np.asarray(new[path]).tobytes()] == ["embedding/item"]
    assert jax.tree.structure(after) == jax.tree.structure(trained.params)
    a, b = (np.asarray(params["embedding"]["item"]) for params in (trained.params, after))
    at = np.flatnonzero((a != b).any(axis=1))
    assert len(at) and set(at) <= read


def test_gradients_of_rows_are_those_of_a_whole_training(streaming, data):
    """One step of plain gradient descent moves a row as far as the step of the whole model does."""
    trained, optimizer = streaming.trained, optax.sgd(0.1)
    feed = Pipeline(
        dataset=data, positions=TASK.positions(data, min_history=1, since=None, before=None)[:16],
        candidates=TASK.source(data, before=1 << 33), config=trained.config, batch_size=16,
    )  # fmt: skip
    (fed,) = feed.batches()
    rows, _ = rows_step(trained.model, optimizer, loss=TASK.loss, tables=("item", "category"))(
        rows_state(trained.params, ("item", "category"), optimizer), fed.batch
    )
    whole, _ = make_step(trained.model, optimizer, loss=TASK.loss)(init_state(trained.params, optimizer), fed.batch)
    for name in ("item", "category"):
        np.testing.assert_allclose(rows.params["embedding"][name], whole.params["embedding"][name], atol=1e-6)
    assert not jnp.array_equal(whole.params["embedding"]["brand"], trained.params["embedding"]["brand"])


def test_tables_that_move_are_checked(data):
    with pytest.raises(ValueError, match="tables that move: expected at least one of .* got \\('shop',\\)"):
        moving_tables(data.schema, ("shop",))
    with pytest.raises(ValueError, match="tables that move"):
        moving_tables(data.schema, ())
