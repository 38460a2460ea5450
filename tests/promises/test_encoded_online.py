"""What a feature store delivers is encoded to what training saw: identical arrays, so identical scores."""

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

import aif_jax as aif
from aif_jax.connectors.features import Record, encoded
from aif_jax.data.split import split_by_time
from aif_jax.readers import encode_items, read, read_items

COLUMNS = aif.Columns(
    user="shopper", item="sku", time="at", time_unit="ms", action="event", actions=("view", "cart", "buy"),
    category="group", item_attributes=("brand",), item_bags=("tags",), bag_length=2, item_floats=("price",), side=("bid",),
    content="vector", behaviour_fields=("brand",), user_attributes=("country",), user_floats=("age",), user_id=True,
    item_key="id",
)  # fmt: skip
SHOPPERS, ITEMS, EVENTS, LENGTH = 12, 60, 900, 24
START = 1_700_000_000_000


def tables() -> dict[str, dict[str, list]]:
    """Raw data with what makes encoding hard: events of one moment and of one second, missing values, unordered rows."""
    rng = np.random.default_rng(0)
    sku = [f"SKU-{number:03d}" for number in range(ITEMS)]
    activity = np.arange(1, SHOPPERS + 1) / np.sum(np.arange(1, SHOPPERS + 1))
    return {
        "events": {
            "shopper": (500 + rng.choice(SHOPPERS, EVENTS, p=activity)).tolist(),
            "sku": [sku[i] for i in rng.integers(0, ITEMS, EVENTS)],
            "at": (START + 500 * rng.integers(0, 600, EVENTS)).tolist(),  # some 40 % of a user's events share their second
            "event": [COLUMNS.actions[i] for i in rng.integers(0, 3, EVENTS)],
        },
        "items": {
            "id": sku,
            "group": [f"group {i % 5}" for i in range(ITEMS)],
            "brand": [None if i % 7 == 0 else f"brand {i % 4}" for i in range(ITEMS)],
            "tags": [["new", "hot", "red"][: i % 4] for i in range(ITEMS)],
            "price": rng.uniform(1, 900, ITEMS).tolist(),
            "bid": rng.uniform(1, 2, ITEMS).tolist(),
            "vector": rng.normal(size=(ITEMS, 8)).tolist(),
        },
        "users": {
            "shopper": list(range(500, 500 + SHOPPERS)),
            "country": [None if i == 3 else ["DE", "FR", "IT"][i % 3] for i in range(SHOPPERS)],
            "age": rng.uniform(18, 80, SHOPPERS).tolist(),
        },
    }


RAW = tables()


@pytest.fixture(scope="module", params=["parquet", "csv"])
def data(request, tmp_path_factory) -> aif.Dataset:
    folder = tmp_path_factory.mktemp("raw")
    for name, table in RAW.items():
        if request.param == "parquet" or name == "items":  # lists of numbers do not fit into CSV
            pq.write_table(pa.table(table), folder / f"{name}.parquet")
        else:
            csv.write_csv(pa.table(table), folder / f"{name}.csv")
    suffix = request.param
    return read(folder / f"events.{suffix}", items=folder / "items.parquet", users=folder / f"users.{suffix}", columns=COLUMNS)


def delivered(user: int, now: int, rng: np.random.Generator, form: str):
    """Record and events of a user before `now`, in any order, as a feature store would have them."""
    events, at = RAW["events"], np.array(RAW["events"]["at"])
    rows = rng.permutation(np.flatnonzero((np.array(events["shopper"]) == user) & (at < now)))
    history = {name: [events[name][i] for i in rows] for name in ("sku", "at", "event")}
    if form == "arrow":
        types = {"sku": pa.string(), "at": pa.int64(), "event": pa.string()}
        history = pa.RecordBatch.from_arrays([pa.array(history[name], types[name]) for name in types], names=list(types))
    if form == "numpy":
        history = {name: np.array(values, np.int64 if name == "at" else str) for name, values in history.items()}
    return {name: RAW["users"][name][user - 500] for name in ("country", "age")}, history  # the request has the id


@pytest.mark.parametrize("form", ["lists", "numpy", "arrow"])
def test_users_encoded_online_equal_users_encoded_offline(data, form):
    rng, encoder = np.random.default_rng(1), data.encoder.with_length(LENGTH)
    positions = split_by_time(data.log, min_history=1).test
    offline = data.user_features(positions, length=LENGTH)
    assert len(positions) > 50 and offline.history.mask.all(axis=1).any() and not offline.history.mask.all()
    for i, position in enumerate(positions):
        user = int(data.users.raw[data.log.user[position] - 1])
        now = int(data.log.time[position]) * 1000 + int(rng.integers(0, 1000))
        record = Record(*delivered(user, now, rng, form))
        online = encoded(encoder, user, record, now)
        assert online.encoding == offline.encoding == encoder.version
        assert encoded(encoder, user, Record(None, record.events), now).ids["user"] == online.ids["user"] > 0
        for got, expected in zip(jax.tree.leaves(online), jax.tree.leaves(offline), strict=True):
            np.testing.assert_array_equal(got, expected[i], strict=True)


def test_items_encoded_online_equal_items_encoded_offline(data, tmp_path):
    offline = data.catalogue.features(np.arange(1, len(data.catalogue)))
    table = {name: [values[i] for i in np.random.default_rng(2).permutation(ITEMS)] for name, values in RAW["items"].items()}
    pq.write_table(pa.table(table), tmp_path / "items.parquet")
    (from_file,) = read_items(tmp_path / "items.parquet", data.encoder)
    for ids, online in (encode_items(table, data.encoder), encode_items(pa.table(table), data.encoder), from_file):
        back = np.argsort(data.items.encode(ids))
        assert online.encoding == data.encoder.version
        for got, expected in zip(jax.tree.leaves(online), jax.tree.leaves(offline), strict=True):
            np.testing.assert_array_equal(got[back], expected, strict=True)
    _, one = encode_items({name: values[5:6] for name, values in RAW["items"].items()}, data.encoder)
    for got, expected in zip(jax.tree.leaves(one), jax.tree.leaves(offline), strict=True):
        np.testing.assert_array_equal(got, expected[5:6])
