"""The encoder: raw users, events and items to features; every rule of its table, what it refuses, what it keeps."""

import dataclasses
import datetime
import json
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aif_jax.encoding.columns import Columns
from aif_jax.encoding.encoder import Encoder, scale_of
from aif_jax.encoding.times import PER_SECOND
from aif_jax.encoding.vocabulary import Vocabulary
from aif_jax.features import check_item_features, check_user_features
from aif_jax.readers import encode_items, read
from aif_jax.types import UserFeatures
from tests.refusals import refused

COLUMNS = Columns(
    user="uid", item="sku", time="at", action="event", actions=("view", "buy"), item_attributes=("shop",), item_bags=("tags",),
    bag_length=2, item_floats=("price",), side=("bid",), content="vector", user_attributes=("country",), user_floats=("age",),
    user_id=True, item_key="id", text=("shop",),
)  # fmt: skip
VOCABULARIES = {
    "user": Vocabulary(["ann", "bob"]),
    "item": Vocabulary([10, 20, 30]),
    "category": Vocabulary(["cup", "tea"]),
    "shop": Vocabulary(["7", "8"]),
    "tags": Vocabulary(["hot", "new"]),
    "country": Vocabulary(["DE", "FR"]),
}
NOW = 1_600_000_000


def encoder(columns: Columns = COLUMNS, vocabularies=VOCABULARIES, content: int = 2, **changes) -> Encoder:
    scales = {"item/price": (5.0, 0.5), "user/age": (40.0, 0.5)} if columns is COLUMNS else {}
    return Encoder(content=content, **dict(columns=columns, vocabularies=vocabularies, scales=scales, length=4) | changes)


def plain(unit: str = "s", **changes) -> Encoder:
    """Items 1 to 9 and nothing else."""
    columns = Columns(time_unit=unit)
    vocabularies = {"user": Vocabulary([1]), "item": Vocabulary(range(1, 10)), "category": Vocabulary([1])}
    return encoder(columns, vocabularies, 0, **changes)


def rows(features: UserFeatures) -> list[tuple]:
    """(item, action, age) of the events that there are."""
    history = features.history
    count = int(history.mask.sum())
    assert history.mask.tolist() == [True] * count + [False] * (len(history.mask) - count)
    for values in (history.item, history.action, history.age):
        assert not values[count:].any()
    return list(zip(history.item[:count].tolist(), history.action[:count].tolist(), history.age[:count].tolist(), strict=True))


EVENTS = {"sku": [10, 99, 30], "at": [NOW - 90, NOW - 60, NOW - 30], "event": ["buy", "view", "look"]}
KNOWN = [(3, 0, 30.0), (0, 1, 60.0), (1, 2, 90.0)]  # most recent first; item 99 and "look" are unknown


def test_one_user_by_hand():
    made = encoder()
    features = made({"uid": "bob", "country": "FR", "age": 25, "shoe size": 43}, EVENTS, NOW)
    assert {name: int(row) for name, row in features.ids.items()} == {"user": 2, "country": 2}
    assert features.floats.tolist() == [-30] and rows(features) == KNOWN
    assert features.encoding == made.version
    check_user_features(made.schema, features, batched=False)


NOWS = [
    NOW, np.int64(NOW), np.datetime64(NOW, "s"), datetime.datetime.fromtimestamp(NOW, datetime.UTC),
    datetime.datetime.fromtimestamp(NOW, datetime.timezone(datetime.timedelta(hours=8))),
]  # fmt: skip


@pytest.mark.parametrize(("events", "now"), [*((EVENTS, now) for now in NOWS), *((events, NOW) for events in (
    {name: values[::-1] for name, values in EVENTS.items()},
    {name: [values[i] for i in (1, 2, 0)] for name, values in EVENTS.items()},
    {name: np.array(values) for name, values in EVENTS.items()},
    {name: np.array(values, object if name == "event" else None) for name, values in EVENTS.items()},
    pa.RecordBatch.from_pydict(EVENTS | {"sku": pa.array(EVENTS["sku"]).cast(pa.decimal128(38))}),  # as of a database
    pa.table(EVENTS | {"at": pa.array(EVENTS["at"], pa.timestamp("s", "UTC"))}),
    pa.concat_tables([pa.table(EVENTS).slice(1), pa.table(EVENTS).slice(0, 1)]),
    EVENTS | {"at": np.array(EVENTS["at"], "datetime64[s]").astype("datetime64[ns]")},
    EVENTS | {"something": [None] * 3},
))])  # fmt: skip
def test_events_in_any_order_and_form_and_now_as_an_integer_or_a_date(events, now):
    assert rows(encoder().user(None, events, now)) == KNOWN


def test_the_unknown_user_and_no_events():
    made = encoder()
    for user in (None, {"uid": "eve", "country": None, "age": None}, {"uid": None, "country": "XX", "age": 40}):
        features = made.user(user, None, NOW)
        assert not features.ids["user"] and not features.ids["country"] and features.floats.tolist() == [0]
        assert rows(features) == []
        check_user_features(made.schema, features, batched=False)
    for empty in ({"sku": [], "at": [], "event": []}, pa.table(EVENTS).slice(0, 0), {k: np.array([]) for k in EVENTS}):
        assert rows(made.user(None, empty, NOW)) == []


def test_events_later_than_the_request_or_of_its_second():
    events = {"item": [1, 2], "time": [NOW - 5, NOW + 60]}
    assert rows(plain().user(None, events, NOW)) == [(1, 1, 5.0)]  # clocks differ a little
    message = r"events, column 'time': expected times up to the request's, 60 s .* got one 61 s later at position \[1\]"
    refused(ValueError, message, plain().user, None, events, NOW - 1)
    refused(ValueError, "5 s of clock skew allowed", plain(max_skew=5).user, None, events, NOW)
    # of the same second: a history ends before it, because the order within a second is not known
    events = {"item": [1, 2, 3, 4], "time": [NOW * 1000 - 1, NOW * 1000, NOW * 1000 + 400, NOW * 1000 + 600]}
    assert rows(plain("ms").user(None, events, NOW * 1000 + 500)) == [(1, 1, 1.0)]


@pytest.mark.parametrize(("unit", "likely"), [
    ("s", "ms"), ("s", "us"), ("ms", "s"), ("us", "ms"), ("us", "ns"), ("ns", "ms"), ("ns", "us"),
])  # fmt: skip
def test_times_in_another_unit_are_refused_with_the_likely_one(unit, likely):
    per_second, made = PER_SECOND[unit], plain(unit)
    good, wrong = NOW * per_second, NOW * PER_SECOND[likely]
    for events, now, where in (([wrong], good, "events, column 'time'"), ([good - per_second], wrong, "now")):
        message = rf"{where}: expected a time .* in '{unit}', got {wrong}.*looks like '{likely}'"
        refused(ValueError, message, made.user, None, {"item": [1] * len(events), "time": events}, now)
    files = {"events": {"user": [1], "item": [1], "time": [wrong]}, "items": {"item": [1], "category": [1]}}
    refused(ValueError, f"got {wrong}, which looks like '{likely}'", read, **files, columns=made.columns)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(-5, 12)), max_size=30), st.integers(1, 6), st.randoms())
def test_histories_equal_a_plain_loop(events, length, random):
    events = [(item, NOW + second) for item, second in events]
    earlier = sorted(((time, item) for item, time in events if time < NOW), reverse=True)[:length]
    random.shuffle(events)
    table = {"item": [item for item, _ in events], "time": [time for _, time in events]}
    got = rows(plain(length=length).user(None, table, NOW))
    assert got == [(item if 1 <= item <= 9 else 0, 1, float(NOW - time)) for time, item in earlier]


def test_a_missing_column_is_named():
    made, events = encoder(), {name: EVENTS[name] for name in ("sku", "at")}
    refused(ValueError, r"^events: expected a column 'event', got \['sku', 'at'\]", made.user, None, events, NOW)
    message = r"user: expected values of \['age'\], None or null where unknown, got none among \['uid', 'country'\]"
    refused(ValueError, message, made.user, {"uid": "ann", "country": "DE"}, None, NOW)
    refused(ValueError, r"now: expected one time, got an array of shape \[2\]", made.user, None, None, [NOW, NOW])


LISTS = [[1, 2], [3], [4]]


@pytest.mark.parametrize(("column", "value", "error", "message"), [
    ("sku", "10", ValueError, "events, column 'sku': expected a list of values, got '10'"),
    ("sku", ["a", "b", "c"], TypeError, "events, column 'sku': expected integers like the vocabulary, got dtype <U1"),
    ("sku", [10, None, 30], TypeError, "got int, then NoneType at position 1"),
    ("sku", [True] * 3, TypeError, "events, column 'sku': expected integers or strings as ids, got bool"),
    ("sku", LISTS, TypeError, "events, column 'sku': expected integers like the vocabulary, got list"),
    ("sku", [[1], [2], [3]], ValueError, "events, column 'sku': expected one value in each row, got shape [3, 1]"),
    ("at", NOW, ValueError, f"events, column 'at': expected a list of values, got {NOW}"),
    ("at", [1.5, 2.5, 3.5], TypeError, "events, column 'at': expected integer times in 's' or datetime64, got dtype float64"),
    ("at", np.array([1, "NaT", 3], "datetime64[s]"), ValueError, "expected a time, got none at position [1]"),
    ("at", pa.array([1, None, 3]), ValueError, "events, column 'at': expected a time, got none at position [1]"),
    ("at", [1, 2], ValueError, "events: expected columns of one length, got {'sku': 3, 'at': 2, 'event': 3}"),
    ("at", LISTS, TypeError, "events, column 'at': expected integer times in 's' or datetime64, got lists of several lengths"),
    ("at", [[NOW]] * 3, ValueError, "events, column 'at': expected one time in each row, got shape [3, 1]"),
    ("at", [20240501] * 3, ValueError, "got 20240501, a date written as a number, before a request of 16"),
    ("at", ("2020-09-13", 20200913, 20200913), TypeError, "events, column 'at': expected integer times in 's' or datetime64"),
    ("event", ["buy", None, "view"], TypeError, "got str, then NoneType at position 1"),
    ("event", [True, None, False], TypeError, "got int, then NoneType at position 1"),
    ("event", [0.5, 1.5, 2.5], TypeError, "events, column 'event': expected integers or strings, got dtype float64"),
    ("uid", 7, TypeError, "user, column 'uid': expected strings like the vocabulary, got dtype int64"),
    ("uid", True, TypeError, "user, column 'uid': expected integers or strings as ids, got bool"),
    ("country", True, TypeError, "user, column 'country': expected strings like the vocabulary, got dtype int64"),
    ("country", ["DE"], ValueError, "user, column 'country': expected one value in each row, got shape [1, 1]"),
    ("age", "old", TypeError, "user, column 'age': expected a number, got 'old'"),
    ("age", np.datetime64("NaT", "s"), TypeError, "user, column 'age': expected a number, got np.datetime64('NaT'"),
    ("age", float("nan"), ValueError, "user, column 'age': expected a finite float32, got nan"),
    ("age", 1e300, ValueError, "user, column 'age': expected a finite float32, got 1e+300"),
    ("age", 3e38, ValueError, "user, column 'age': expected a number that is finite once scaled, got 3e+38"),
    pytest.param("age", 10**400, ValueError, "expected a finite float32, got an integer that is too large", id="huge"),
])  # fmt: skip
def test_a_wrong_value_is_named_by_its_column(column, value, error, message):
    user, events = {"uid": "ann", "country": "DE", "age": 40.0}, dict(EVENTS)
    (events if column in events else user)[column] = value
    refused(error, re.escape(message), encoder().user, user, events, NOW)


@pytest.mark.parametrize(("actions", "raw", "expected"), [
    (("view", "buy"), ["buy", "view", "x"], [2, 1, 0]),
    ((4, 2), [2, 4, 3], [2, 1, 0]),
    (("4", "2"), np.array([2, 4, 3], np.int8), [2, 1, 0]),  # a command line names integers as text
    ((4, 2), np.array(["2", "4", "04"]), [2, 1, 0]),
    (("view", "buy"), [1, 2], [0, 0]),
    (("07", "--1"), [7, -1], [0, 0]),  # which name no integers
    ((), ["wish", "look"], [2, 0]),  # those of the vocabulary
])  # fmt: skip
def test_actions_in_the_order_of_the_columns(actions, raw, expected):
    known = VOCABULARIES if actions else VOCABULARIES | {"action": Vocabulary(["view", "wish"])}
    made = encoder(dataclasses.replace(COLUMNS, actions=actions), known)
    assert made.action_rows(raw).tolist() == expected
    assert made.schema.actions == 3


def test_booleans_that_files_spell_in_several_ways_are_refused():
    made = encoder(dataclasses.replace(COLUMNS, actions=("true", "False")))
    refused(TypeError, "'event': expected text, because the files spell .* ways, got bool", made.action_rows, [True])


ITEMS = {
    "id": [20, 99, 30],
    "category": ["tea", "cup", "pot"],
    "shop": ["8", "9", None],
    "tags": [["new", "hot", "new"], [], None],
    "price": [7.0, 5.0, 1.0],
    "bid": [0.5, 1.0, 2.0],
    "vector": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]],
}


@pytest.mark.parametrize("table", [
    ITEMS, pa.RecordBatch.from_pydict(ITEMS), pa.table(ITEMS | {"category": pa.array(ITEMS["category"]).dictionary_encode()}),
    pa.table(ITEMS | {"tags": pa.array(ITEMS["tags"], pa.list_(pa.dictionary(pa.int32(), pa.string())))}),
    ITEMS | {"tags": ["|new||hot|new", "|", None], "shop": [8, 9, None]}, ITEMS | {"shop": ["8", "9", float("nan")]},
    ITEMS | {"vector": np.array(ITEMS["vector"]), "price": np.array(ITEMS["price"]), "shop": np.array(["8", "9", None])},
    pa.table(ITEMS | {"vector": pa.array(ITEMS["vector"], pa.list_(pa.float32(), 2)), "shop": pa.array([8, 9, None])}),
])  # fmt: skip
def test_items_by_hand(table):
    made = encoder()
    ids, features = encode_items(table, made)
    assert ids.tolist() == [20, 99, 30] and ids.dtype == np.int64
    assert features.ids["item"].tolist() == [2, 0, 3]  # 99 is unknown; what is known of it counts all the same
    assert features.ids["category"].tolist() == [2, 1, 0] and features.ids["shop"].tolist() == [2, 0, 0]
    assert features.ids["tags"].tolist() == [[2, 1], [0, 0], [0, 0]]
    assert features.floats.tolist() == [[4], [0], [-8]] and features.side["bid"].tolist() == [0.5, 1, 2]
    assert features.content.tolist() == ITEMS["vector"] and features.encoding == made.version
    check_item_features(made.schema, features, batched=True)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"vector": [[1.0, 2.0], [3.0], [5.0, 6.0]]}, ValueError, "row 2, column 'vector': wrong length: expected 2 numbers"),
    ({"vector": [[1.0], [3.0], [5.0]]}, ValueError, "row 1, column 'vector': wrong length: expected 2 numbers like the enc"),
    ({"vector": [[1.0, 2.0], None, [5.0, 6.0]]}, ValueError, "row 2, column 'vector': null: expected a list of numbers"),
    ({"vector": [[1.0, 2.0], [3.0, np.nan], [5.0, 6.0]]}, ValueError, "row 2, column 'vector': not finite: expected a finite"),
    ({"price": [1.0, None, 2.0]}, ValueError, "items, row 2, column 'price': null: expected a number, got nothing"),
    ({"price": [1.0, -3e38, 2.0]}, ValueError, "item, column 'price': expected a number that is finite once scaled, got -3e+3"),
    ({"price": ["1", "2", "3"]}, ValueError, "items, column 'price': wrong type: expected numbers, got string"),
    ({"price": [[1.0], [2.0], [3.0]]}, ValueError, "items, column 'price': wrong type: expected numbers, got list"),
    ({"price": [1.0, 2.0]}, ValueError, "items: expected columns of one length"),
    ({"id": ["a", "b", "c"]}, ValueError, "'id': wrong type: expected integers like the vocabulary 'item' given, got text"),
    ({"id": [20, None, 30]}, ValueError, "items, row 2, column 'id': null: expected an id, got nothing"),
    ({"id": [True, False, True]}, ValueError, "items, column 'id': wrong type: expected integers or text, got bool"),
    ({"category": [1, 2, 3]}, ValueError, "'category': wrong type: expected text like the vocabulary 'category' given, got"),
    ({"tags": [[["new"]], [], None]}, ValueError, "column 'tags': wrong type: expected lists of integers or text"),
    ({"tags": [[0.5], [], None]}, ValueError, "column 'tags': wrong type: expected lists of integers or text"),
    ({"tags": [[1, 2**63], [], None]}, TypeError, "column 'tags': expected values that Arrow holds, got others: "),
])  # fmt: skip
def test_wrong_items_are_refused(change, error, message):
    refused(error, re.escape(message), encode_items, ITEMS | change, encoder())


def test_no_items_are_encoded_as_none():
    ids, features = encode_items({name: [] for name in ITEMS}, encoder())
    check_item_features(encoder().schema, features, batched=True)
    assert ids.tolist() == [] and features.content.shape == (0, 2) and features.encoding == encoder().version
    refused(ValueError, "items, column 'bid': missing column", encode_items, {"id": []}, encoder())


ALL = {"uid": ["bob", "ann", "bob", "eve"], "sku": [10, 10, 30, 20], "at": [NOW - 90, NOW - 80, NOW - 70, NOW - 60]}
ALL |= {"event": ["buy", "view", "buy", "view"]}
BOB = {"uid": "bob", "country": "FR", "age": 25}


@pytest.mark.parametrize("form", ["lists", "arrays", "arrow"])
def test_events_of_everybody_are_refused(form):
    made = encoder()

    def table(events):
        arrow = {"lists": lambda given: given, "arrays": lambda given: {k: np.array(v) for k, v in given.items()}}
        return arrow.get(form, pa.RecordBatch.from_pydict)(events)

    expected = r"events, column 'uid': expected rows of user 'bob' alone, got 2 of 4 of others, such as 'ann' at position \[1\]"
    refused(ValueError, expected + r"; give events\[events\['uid'\] == 'bob'\]", made, BOB, table(ALL), NOW)
    message = "expected rows of user 'eve' alone, got 3 of 4 of others, such as 'bob'"
    refused(ValueError, message, made, BOB | {"uid": "eve"}, table(ALL), NOW)
    bobs = [place for place, user in enumerate(ALL["uid"]) if user == "bob"]
    alone = {name: [values[place] for place in bobs] for name, values in ALL.items()}
    bare = {name: values for name, values in alone.items() if name != "uid"}
    assert rows(made(BOB, table(alone), NOW)) == rows(made(BOB, table(bare), NOW)) == [(3, 2, 70.0), (1, 2, 90.0)]
    refused(ValueError, "expected rows of user 'bob' alone, got 2 of 4 of others", made, None, table(ALL), NOW)
    assert len(rows(made(None, table(alone), NOW))) == 2
    assert rows(made(BOB, {name: [] for name in ALL}, NOW)) == []


def test_an_unknown_item_may_have_a_long_id_whether_or_not_it_ties():
    known = {name: Vocabulary(["a"]) for name in ("user", "item", "category")}
    events = {"user": ["a"] * 2, "item": ["x" * 1100, "a"], "time": [NOW - 20, NOW - 20]}
    assert rows(encoder(Columns(), known, 0)({"user": "a"}, events, NOW)) == [(0, 1, 20.0), (1, 1, 20.0)]


def test_ids_of_users_that_are_text_may_come_as_numbers():
    columns = Columns(text=("user",))
    made = encoder(columns, {"user": Vocabulary(["1"]), "item": Vocabulary(range(1, 10)), "category": Vocabulary([1])}, 0)
    events = {"user": [1, 1], "item": [3, 4], "time": [NOW - 20, NOW - 10]}
    assert len(rows(made({"user": "1"}, events, NOW))) == 2
    refused(ValueError, "expected rows of user '2' alone, got 2 of 2 of others, such as 1", made, {"user": "2"}, events, NOW)


def test_record_and_arrays_bring_it_back():
    made = encoder(length=9, max_skew=5)
    record, arrays = json.loads(json.dumps(made.to_record())), made.to_arrays()
    assert sorted(arrays)[:3] == ["category/offsets", "category/utf8", "country/offsets"]
    assert arrays["item/ids"].dtype == np.int64
    again = Encoder.from_record(record, arrays)
    assert (again.version, again.length, again.max_skew) == (made.version, 9, 5)
    assert again.columns == made.columns and again.vocabularies == made.vocabularies and again.scales == made.scales
    assert len(made.version) == 64 and repr(made).startswith(f"Encoder({made.version[:12]}, Schema(items: item 4")


def test_a_record_that_does_not_fit_its_arrays_is_refused():
    made = encoder()
    record, arrays = made.to_record(), made.to_arrays()
    other = arrays | {"item/ids": np.array([10, 20, 31])}
    without = {name: array for name, array in arrays.items() if not name.startswith("user/")}
    for one, parts, message in (
        (record, other, f"expected vocabularies and settings of version {made.version}, got"),
        (record, without, r"encoder: expected arrays of every vocabulary, got none of \['user'\]"),
        ({"schema": record["schema"]}, arrays, "expected a record of Encoder.to_record, got another: KeyError"),
        (record | {"scales": None}, arrays, "expected a record of Encoder.to_record, got another: AttributeError"),
    ):
        refused(ValueError, message, Encoder.from_record, one, parts)


def test_the_version_is_that_of_what_ids_and_floats_mean():
    made = encoder()
    assert made.version == encoder().version == made.with_length(99).version
    others = [
        encoder(vocabularies=VOCABULARIES | {"user": Vocabulary(["ann", "rob"])}),
        encoder(scales={"item/price": (5.0, 3.0), "user/age": (40.0, 10.0)}),
        encoder(scales={}),
        encoder(dataclasses.replace(COLUMNS, time_unit="ms")),
        encoder(dataclasses.replace(COLUMNS, actions=("buy", "view"))),
        encoder(content=3),
    ]
    assert len({made.version, *(other.version for other in others)}) == 7


@pytest.mark.parametrize(("changes", "message"), [
    ({"length": 0}, "Encoder.length: expected at least 1, got 0"),
    ({"max_skew": -1}, "Encoder.max_skew: expected 0 seconds or more, got -1"),
    ({"scales": {"item/price": (0.0, 1.0)}}, r"Encoder.scales: expected those of \['item/price', 'user/age'\], or none, got"),
    *(({"scales": {"item/price": scale, "user/age": (0.0, 1.0)}}, r"scales\['item/price'\]: expected \(mean, deviation\), or")
      for scale in ((1.0,), (0.0, 1.0, 2.0), (0.0, 1.0, 3.0, 2.0))),
    ({"vocabularies": {"item": Vocabulary([1])}}, "Encoder.vocabularies: expected"),
])  # fmt: skip
def test_parts_that_do_not_fit_together_are_refused(changes, message):
    refused(ValueError, message, dataclasses.replace, encoder(), **changes)


def test_scales_by_hand():
    assert scale_of(np.float32([1, 2, 3, 6])) == (3.0, float(np.float32(np.sqrt(3.5))))
    assert scale_of(np.full(7, 0.1, np.float32)) == (float(np.float32(0.1)), 1.0)
    assert encoder(scales={}).user({"uid": "ann", "country": "DE", "age": 25}, None, NOW).floats.tolist() == [25]
