"""One order of a history: training and serving sort events by times of one resolution, however a time is written."""

import asyncio
import dataclasses
import datetime

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import aif_jax as aif
from aif_jax.connectors import Fetch, ValkeyFeatures
from aif_jax.encoding.times import PER_SECOND
from aif_jax.encoding.vocabulary import new_rows
from aif_jax.refreshing import forget_ids
from tests import servers

START, USERS, ITEMS, LENGTH = 1_700_000_000 * 10**6, 8, 30, 16
RNG = np.random.default_rng(0)


def bursts() -> dict[str, np.ndarray]:
    """Events [n] of some users with times in microseconds, one to four in a second, in no order."""
    parts = []
    for user in range(USERS):
        for second in range(20):
            count = RNG.integers(1, 5)
            times = START + second * 10**6 + RNG.integers(0, 10**6, count)
            parts.append((np.full(count, user), RNG.integers(0, ITEMS, count), RNG.integers(1, 3, count), times))
    columns = (np.concatenate(values) for values in zip(*parts, strict=True))
    order = RNG.permutation(sum(len(values) for values, *_ in parts))
    return dict(zip(("user", "item", "action", "time"), (column[order] for column in columns), strict=True))


EVENTS = bursts()
CATALOGUE = {"item": np.arange(ITEMS), "category": np.arange(ITEMS) % 3}
NOW = START // 10**6 + 20  # after every event
DATES = EVENTS["time"].astype("datetime64[us]")


def read(path, unit: str) -> aif.Dataset:
    """The events with times as timestamps in microseconds."""
    pq.write_table(pa.table(EVENTS | {"time": pa.array(DATES)}), path)
    return aif.read(path, items=CATALOGUE, columns=aif.Columns(action="action", actions=(1, 2), time_unit=unit))


def scaled(at: np.ndarray, unit: str) -> np.ndarray:
    return at * (PER_SECOND[unit] // 10**6) if unit == "ns" else at // (10**6 // PER_SECOND[unit])


FORMS = {
    "integers": lambda at, unit: scaled(at, unit).tolist(),
    "unsigned": lambda at, unit: scaled(at, unit).astype(np.uint64),
    "datetime64[us]": lambda at, unit: at.astype("datetime64[us]"),
    "datetime64[ns]": lambda at, unit: at.astype("datetime64[us]").astype("datetime64[ns]"),
    "datetime": lambda at, unit: at.astype("datetime64[us]").tolist(),
    "text": lambda at, unit: [f"{time}Z" for time in at.astype("datetime64[us]").astype(str)],
    "arrow": lambda at, unit: pa.array(at.astype("datetime64[us]"), pa.timestamp("us", "UTC")),
}


def delivered(user: int, unit: str, form: str) -> dict:
    """The events of a user as a call brings them, in another order than the file has."""
    at = RNG.permutation(np.flatnonzero(EVENTS["user"] == user))
    table = {name: EVENTS[name][at].tolist() for name in ("item", "action")} | {"time": FORMS[form](EVENTS["time"][at], unit)}
    return pa.table({name: pa.array(values) for name, values in table.items()}) if form == "arrow" else table


def from_server(url: str, prefix: str, encoder: aif.Encoder) -> list[aif.UserFeatures]:
    """The features of all users, as an engine gets them."""
    redis = pytest.importorskip("redis")
    with redis.Redis.from_url(url) as client:
        for user in range(USERS):
            servers.append(client, user, delivered(user, prefix, "integers"), prefix=prefix)

    async def get() -> list[aif.UserFeatures]:
        async with redis.asyncio.Redis.from_url(url) as client:
            fetch = Fetch(ValkeyFeatures(client, encoder.columns, prefix=prefix))
            now = datetime.datetime.fromtimestamp(NOW, datetime.UTC)
            return [await fetch.encode(user, encoder, now) for user in range(USERS)]

    return asyncio.run(get())


@pytest.mark.parametrize("unit", PER_SECOND)
def test_what_training_reads_is_what_a_request_is_encoded_to(tmp_path, unit, valkey_url):
    """A timestamp column, `time_unit="s"` by default, bursts of one to four events in a second."""
    data = read(tmp_path / "events.parquet", unit)
    assert data.encoder is not None
    encoder = aif.Encoder.from_record(data.encoder.to_record(), data.encoder.to_arrays()).with_length(LENGTH)  # of a checkpoint
    rows, now = data.users.encode(np.arange(USERS)), NOW * PER_SECOND[unit]
    trained = data.request_features(rows, np.full(USERS, NOW), length=LENGTH)
    served_by_server = from_server(valkey_url, unit, encoder)
    for user in range(USERS):
        expected = jax.tree.map(lambda leaf, user=user: leaf[user], trained)
        served = {form: encoder(None, delivered(user, unit, form), now) for form in FORMS}
        served["server"] = served_by_server[user]
        for form, features in served.items():
            for got, want in zip(jax.tree.leaves(features.history), jax.tree.leaves(expected.history), strict=True):
                np.testing.assert_array_equal(got, want, err_msg=f"{form}, user {user}", strict=True)
    by_time = np.flatnonzero(EVENTS["user"] == 0)
    by_time = by_time[np.argsort(EVENTS["time"][by_time])][: -LENGTH - 1 : -1]
    in_order = trained.history.item[0].tolist() == (EVENTS["item"][by_time] + 1).tolist()
    assert in_order == (unit != "s"), "within a second the order is by item where times are seconds, else by time"


@pytest.mark.parametrize(("unit", "name"), [("s", int), ("s", "item {}".format), ("ms", int)])
def test_the_order_is_the_same_whichever_items_a_vocabulary_knows(unit, name):
    """Items that are skipped, forgotten, or unknown to one of two models stay where they were among those of one moment."""
    columns = aif.Columns(action="action", actions=(1, 2), time_unit=unit)
    table = EVENTS | {"time": scaled(EVENTS["time"], unit)}
    now, known = NOW * PER_SECOND[unit], np.arange(0, ITEMS, 3)
    later = {"user": known % USERS, "item": known, "action": known % 2 + 1, "time": np.full(len(known), now + PER_SECOND[unit])}
    table = {name: np.append(column, later[name]) for name, column in table.items()}
    table["item"] = np.array(list(map(name, table["item"].tolist())))
    whole = aif.read(table, items={"item": list(map(name, range(ITEMS))), "category": CATALOGUE["category"]}, columns=columns)
    part = {"item": list(map(name, known.tolist())), "category": known % 3}
    for data in (aif.read(table, items=part, columns=columns, unknown="skip"), forget_ids(whole, NOW)):
        assert len(data.items.raw) == len(known)
        trained = data.request_features(data.users.encode(np.arange(USERS)), np.full(USERS, NOW), length=LENGTH).history
        rows = np.maximum(new_rows(whole.items, data.items), 0)
        for user in range(USERS):
            at = RNG.permutation(np.flatnonzero((table["user"] == user) & (table["time"] < now)))
            events = {name: table[name][at] for name in ("item", "action", "time")}
            served, others = (each.encoder.with_length(LENGTH)(None, events, now).history for each in (data, whole))
            jax.tree.map(np.testing.assert_array_equal, served, jax.tree.map(lambda leaf, user=user: leaf[user], trained))
            jax.tree.map(np.testing.assert_array_equal, served, dataclasses.replace(others, item=rows[others.item]))


def test_a_reader_is_told_that_an_order_is_lost():
    events = {"user": [1] * 3, "item": [2, 1, 3], "time": np.array([10, 20, 5000], "datetime64[ms]")}
    items = {"item": [1, 2, 3], "category": [1] * 3}
    (suspicion,) = [s for s in aif.check(events, items=items).suspicions if s.kind == "rounded time"]
    expected = "Columns.time_unit='s', to which times are rounded down: 1 of 3 events have the time of their user's one before"
    assert expected in suspicion.got
    for columns in (aif.Columns(time_unit="ms"), aif.Columns(time_unit="ns")):
        assert not [s for s in aif.check(events, items=items, columns=columns).suspicions if s.kind == "rounded time"]
