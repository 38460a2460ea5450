"""Item statistics: as of a moment, never from the future, the same in training, evaluation, encoder and index."""

import dataclasses
import datetime
import functools
import importlib
import json
from typing import Any

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax.catalogue import Catalogue
from aif_jax.data import candidates
from aif_jax.data.events import EventLog
from aif_jax.data.negatives import NegativeSampler, item_counts
from aif_jax.data.pipeline import Pipeline
from aif_jax.data.statistics import ItemStatistics
from aif_jax.encoding.times import PER_SECOND, TimeUnit
from aif_jax.index import ItemIndex
from aif_jax.readers import encode_items
from aif_jax.refreshing import forget_ids
from aif_jax.schema import statistic_names
from aif_jax.train.evaluate import rank_catalogue
from tests import demo
from tests.refusals import refused

evaluating = importlib.import_module("aif_jax.train.evaluate")  # the package has a function of this name
HOUR, DAY = 3600, 86400
LIVES = (HOUR, 7 * DAY)
START = 1_600_000_000
ITEMS = 40


def events(count: int = 1200, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "user": rng.integers(1, 25, count),
        "item": rng.integers(1, ITEMS, count) * rng.integers(0, 2, count) + 1,  # one item has half of the events
        "time": START + rng.integers(0, 20 * DAY, count) // HOUR * HOUR,  # so that many are at one time
    }


def items(ids: object = range(1, ITEMS + 1)) -> dict[str, list[float]]:
    listed = list(ids)  # type: ignore[call-overload]
    return {"item": listed, "category": [i % 5 for i in listed], "price": [i / 7 for i in listed]}


def columns(**more: object) -> aif.Columns:
    return aif.Columns(item_floats=("price",), item_statistics=LIVES, **more)  # type: ignore[arg-type]


@functools.cache
def data() -> aif.Dataset:
    return aif.read(events(), items=items(), columns=columns(), progress=False)


def catalogue_at(data: aif.Dataset, time: int) -> Catalogue:
    """The catalogue with the item statistics of a moment."""
    return data.catalogue.with_statistics(data.statistics.at(np.arange(len(data.catalogue)), time))


def before(time: int, whole: aif.Dataset | None = None) -> aif.Dataset:
    """The data set as it was at a moment: no event at or after it."""
    whole = whole or data()
    parts = (np.asarray(getattr(whole.log, name))[whole.log.time < time] for name in ("user", "item", "action", "time"))
    past = dataclasses.replace(whole, log=EventLog(*parts, users=whole.log.users))
    return dataclasses.replace(past, catalogue=catalogue_at(past, time))


def trained_on(data: aif.Dataset) -> aif.Trained:
    model = aif.build(aif.presets.two_tower(data.schema, width=4, towers=(8,), short_length=4, sequence=False))
    return aif.Trained(model, demo.init(model, items=data.catalogue), encoder=data.encoder)


trained = functools.cache(lambda: trained_on(data()))


def slow(row: int, time: int) -> list[float]:
    """The formula, event by event."""
    log = data().log
    ages = [time - int(t) for i, t in zip(log.item, log.time, strict=True) if i == row and t < time]
    if not ages or row == 0:
        return [0.0] * (3 + len(LIVES))
    decayed = [sum(2.0 ** (-age / life) for age in ages) for life in LIVES]
    return [float(np.log1p(x)) / 4 for x in (len(ages), *decayed, max(ages) / HOUR, min(ages) / HOUR)]


def test_they_follow_the_formula():
    rng = np.random.default_rng(1)
    rows, times = rng.integers(0, ITEMS + 1, 200), START + rng.integers(-DAY, 25 * DAY, 200)
    rows[:20], times[20:40] = 1, data().log.time[:20]
    statistics = data().statistics
    assert statistics is not None
    got = statistics.at(rows, times)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [slow(int(row), int(time)) for row, time in zip(rows, times, strict=True)], atol=1e-6)
    assert (got[rows == 0] == 0).all() and got[:20].any()


def of(item: list[int], time: list[int], lives: tuple[int, ...]) -> ItemStatistics:
    """Statistics of events of one user and one action."""
    attributes = (aif.Attribute(name="item", size=3), aif.Attribute(name="category", size=2))
    schema = aif.Schema(item_attributes=attributes, item_floats=3 + len(lives), item_statistics=lives)
    return ItemStatistics(schema, EventLog([1] * len(item), item, [1] * len(item), time))


def test_an_event_at_the_moment_itself_is_not_counted():
    statistics = of([1, 1], [START, START + HOUR], LIVES)
    log_count = statistics.at(np.array([1, 1, 1]), np.array([START, START + HOUR, START + HOUR + 1]))[:, 0] * 4
    np.testing.assert_allclose(np.expm1(log_count), [0, 1, 2], atol=1e-5)
    assert of([], [], (HOUR,)).at(np.array([[1, 2]]), np.array([[START]])).tolist() == [[[0.0] * 4] * 2]


@pytest.mark.parametrize("days", [0, 3, 11, 30])
def test_nothing_of_the_future_changes_a_bit(days):
    time, rows = START + days * DAY, np.arange(ITEMS + 1)
    whole, past = data().item_features(rows, time).floats, before(time).item_features(rows, time).floats
    np.testing.assert_array_equal(whole, past)
    after = data().item_features(rows, time + 1).floats
    happened = np.unique(data().log.item[data().log.time == time])
    assert sorted(np.flatnonzero(after[:, 1] != whole[:, 1])) == sorted(happened)  # the count of what happens right then


def test_training_batches_hold_them_as_of_each_sample():
    sampler = NegativeSampler(item_counts(data(), np.arange(len(data().log))))
    source = candidates.sampled_negatives(data(), sampler=sampler, negatives=3)
    positions = np.flatnonzero(data().log.time > START + DAY)
    feed = Pipeline(dataset=data(), positions=positions, source=source, config=trained().model.config, batch_size=6, seed=3)
    fed = next(iter(feed.batches()))
    assert fed.batch is not None and fed.positions is not None
    rows, floats = np.asarray(fed.batch.items.ids["item"]), np.asarray(fed.batch.items.floats)
    for sample, position in enumerate(fed.positions):
        time = int(data().log.time[position])
        np.testing.assert_array_equal(floats[sample], before(time).item_features(rows[sample], time).floats)
    assert len({float(x) for x in floats[rows == 1][:, 1]}) > 3  # the popular item changes from sample to sample


def test_encoded_online_equals_encoded_offline():
    time, ids = START + 9 * DAY, [3, 1, 40, 1000]
    encoder, known = data().encoder, before(START + 9 * DAY)
    assert encoder is not None
    _, online = encode_items(items(ids) | known.statistic_columns(ids, time), encoder)
    np.testing.assert_array_equal(online.floats[:3], data().item_features(data().items.encode(ids), time).floats[:3])
    np.testing.assert_array_equal(online.floats[3, 1:], np.zeros(3 + len(LIVES)))  # an unknown item has no event


@pytest.mark.parametrize("rows", [True, False], ids=["table", "catalogue"])
def test_an_index_updated_later_equals_one_rebuilt_later(rows):
    first, later = START + 5 * DAY, START + 12 * DAY
    index = ItemIndex.build(trained(), catalogue_at(data(), first), batch_size=16, progress=False)
    rebuilt = ItemIndex.build(trained(), catalogue_at(data(), later), batch_size=16, progress=False)
    ids = np.arange(1, ITEMS + 1)
    table = items(ids) | before(later).statistic_columns(ids, later)
    updated = index.upsert(table) if rows else ItemIndex.build(trained(), table, batch_size=16, progress=False)
    one, other, stale = (jax.tree.map(np.asarray, some.take(ids)[0]) for some in (updated, rebuilt, index))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert (stale.vector != other.vector).any()


def test_ranks_in_the_catalogue_do_not_depend_on_the_future(monkeypatch):
    log, time = data().log, START + 15 * DAY
    positions = np.flatnonzero((log.time >= time) & (log.time < time + 6 * HOUR))
    assert len(positions) > 2
    model, params = trained().model, trained().params
    assert data().repeats
    catalogues, make = [], evaluating.item_rows
    monkeypatch.setattr(evaluating, "item_rows", lambda *given, **more: catalogues.append(given[2]) or make(*given, **more))
    whole = rank_catalogue(model, params, data(), positions)
    assert len(catalogues) == 1 and catalogues[0] is not data().catalogue  # no rows are made that none reads
    ended = before(time + 6 * HOUR)
    same = np.flatnonzero((ended.log.time >= time) & (ended.log.time < time + 6 * HOUR))
    np.testing.assert_array_equal(whole, rank_catalogue(model, params, ended, same))
    np.testing.assert_array_equal(rank_catalogue(model, params, data(), positions[::-1])[::-1], whole)


def test_a_table_of_items_without_them_is_refused_with_the_way_out(tmp_path):
    message, written = r"column 'events_half_life_3600': missing .*statistic_columns\(ids, time\)", tmp_path / "items.csv"
    refused(ValueError, message, encode_items, items(), data().encoder)
    written.write_text("item,category,price\n1,1,1.0\n")
    for name, model in (("since_last_event", trained()), ("events_rate_shown", trained_on(by_action()))):
        message = rf"column '{name}': missing column: .*statistic_columns\(ids, time\)"
        refused(ValueError, message, ItemIndex.build, model, written, progress=False)


ACTIONS = ("shown", "click")


def by_action(unit: TimeUnit = "s") -> aif.Dataset:
    """Item 1: shown an hour before and clicked half an hour before 2 h; item 2: shown twice at 0 h; item 3: never."""
    half = HOUR // 2
    table = {
        "user": [1, 1, 2, 2, 1], "item": [1, 1, 2, 2, 2], "what": ["shown", "click", "shown", "shown", "click"],
        "time": PER_SECOND[unit] * np.array([START + HOUR, START + 3 * half, START, START, START + 4 * half]),
    }  # fmt: skip
    columns = aif.Columns(action="what", actions=ACTIONS, item_statistics=(HOUR,), time_unit=unit)
    return aif.read(table, items={"item": [1, 2, 3], "category": [1, 1, 2]}, columns=columns, progress=False)


def test_actions_are_counted_apart_with_the_rate_of_each():
    data, time = by_action(), START + 2 * HOUR
    found = data.statistic_columns([1, 2, 3, 9], time)
    assert tuple(found) == data.schema.statistics == data.encoder.columns.statistics  # type: ignore[union-attr]
    assert list(found) == [
        "events_so_far_shown", "events_half_life_3600_shown", "events_rate_shown", "events_so_far_click",
        "events_half_life_3600_click", "events_rate_click", "since_first_event", "since_last_event",
    ]  # fmt: skip
    for moment in (time * 1000 + 999, datetime.datetime.fromtimestamp(time, datetime.UTC)):
        jax.tree.map(np.testing.assert_array_equal, by_action("ms").statistic_columns([1, 2, 3, 9], moment), found)
    half = 2**-0.5
    log1p = {
        "events_so_far_shown": [1, 2], "events_half_life_3600_shown": [0.5, 0.5], "events_so_far_click": [1, 0],
        "events_half_life_3600_click": [half, 0], "since_first_event": [1, 2], "since_last_event": [0.5, 2],
    }  # fmt: skip
    for name, values in log1p.items():
        np.testing.assert_allclose(np.expm1(4 * found[name]), [*values, 0, 0], atol=1e-5, err_msg=name)
    # of the four events before, three are shows: 20 events more at 3/4 and 1/4
    for name, shares in (("shown", [16 / 22 / 0.75, 17 / 22 / 0.75]), ("click", [6 / 22 / 0.25, 5 / 22 / 0.25])):
        np.testing.assert_allclose(np.exp(4 * found[f"events_rate_{name}"]), [*shares, 1, 1], rtol=1e-5)


def test_rates_stay_when_an_item_is_forgotten_that_only_one_action_has_and_where_users_are_unknown():
    table = {"user": [1, 1, 2], "item": [1, 1, 3], "what": ["shown", "click", "shown"], "time": [START + 9, START + 9, START]}
    data = aif.read(table, items={"item": [1, 3], "category": [1, 1]}, columns=by_action().columns, progress=False)
    fewer = dataclasses.replace(forget_ids(data, START + 9))  # as `read_cascade` does
    assert fewer.items.raw.tolist() == [1]
    jax.tree.map(np.testing.assert_array_equal, *(each.statistic_columns([1], START + 10) for each in (data, fewer)))
    more = {name: [*values, values[0]] for name, values in table.items()} | {"user": [1, 1, 2, 9]}
    ways: list[dict[str, Any]] = [{"columns": data.columns}, {"encoder": data.encoder, "unknown": "skip"}]  # of user 9
    both = [aif.read(more, items={"item": [1, 3], "category": [1, 1]}, progress=False, **way) for way in ways]
    jax.tree.map(np.testing.assert_array_equal, *((d.catalogue.items.floats, d.statistics.at([1], START + 10)) for d in both))


def test_statistics_by_action_are_those_of_the_moment_wherever_they_are_read():
    data, rows = by_action(), np.arange(4)
    table = {"item": [1, 2, 3], "category": [1, 1, 2]}
    for time in (START, START + 1, START + 2 * HOUR, START + 9 * HOUR):
        past, of_sample = before(time, data), data.item_features(rows, time).floats
        np.testing.assert_array_equal(of_sample, past.item_features(rows, time).floats)
        np.testing.assert_array_equal(of_sample, catalogue_at(data, time).items.floats)
        _, encoded = encode_items(table | past.statistic_columns([1, 2, 3], time), data.encoder)
        np.testing.assert_array_equal(of_sample[1:], encoded.floats)
    floats = data.catalogue.items.floats
    np.testing.assert_array_equal(floats, catalogue_at(data, START + 2 * HOUR + 1).items.floats)  # after the last event
    assert not floats[0].any()


def test_what_is_fitted_once_sees_none_of_them(monkeypatch):
    """A fitted array serves every moment: with the numbers of one it would show training samples their own events."""
    monkeypatch.setattr(aif.blocks.ItemOffset, "fit", lambda _, items, *__, seed: {"table": jax.numpy.asarray(items.floats)})
    fitted = aif.fit_tables(trained().model.config.replace(blocks=(aif.blocks.ItemOffset(),)), data().catalogue)
    assert fitted["item_offset"]["table"][:, 0].any() and not fitted["item_offset"]["table"][:, 1:].any()


def test_they_travel_with_schema_and_encoder():
    for one, width in ((data(), 1 + len(statistic_names(LIVES))), (by_action(), 8)):
        encoder = one.encoder
        assert encoder is not None and one.schema.item_floats == width
        assert aif.Schema.from_json(json.loads(json.dumps(one.schema.to_json()))) == one.schema
        again = type(encoder).from_record(json.loads(json.dumps(encoder.to_record())), encoder.to_arrays())
        assert again.version == encoder.version and again.columns.statistics == encoder.columns.statistics
    assert by_action().schema.statistic_actions == ACTIONS


def test_one_action_is_counted_as_events_without_any_are():
    table, given = events() | {"what": ["click"] * 1200}, dict(item_statistics=(HOUR,))
    named, plain = (
        aif.read(table, items=items(), columns=aif.Columns(**given, item_floats=("price",), **more), progress=False)
        for more in ({"action": "what", "actions": ("click",)}, {})
    )
    assert named.schema.statistics == plain.schema.statistics and named.schema.statistic_actions == ()
    np.testing.assert_array_equal(named.catalogue.items.floats, plain.catalogue.items.floats)
    assert "statistic_actions" not in json.dumps(named.schema.to_json())
