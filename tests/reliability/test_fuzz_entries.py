"""Hypothesis against every public entry: the right answer, by a slow reference in plain Python, or the documented error."""

import asyncio
import contextlib
import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

import aif_jax as aif
from aif_jax.encoding.times import FLOOR
from aif_jax.readers import encode_items
from tests import demo, writer_world
from tests.reliability import coded, damaged
from tests.reliability.sizes import FULL, RUNS, SEED, full

pytestmark = pytest.mark.lane("standing")
REFUSED = (TypeError, ValueError)
NOW = 1_700_000_000
K = 8

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4),
    st.binary(max_size=3), st.complex_numbers(),
    st.sampled_from([np.float32(1), np.int64(3), np.bool_(True), np.datetime64("nat", "s"), np.str_("7"), ()]),
)  # fmt: skip
junk = st.recursive(scalars, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=2), part, max_size=2))
known_ids = st.sampled_from(coded.IDS.tolist())
ids = st.one_of(known_ids, known_ids, known_ids, st.integers(-(2**63) + 1, 2**63 - 1))


def is_integer(value: Any, *, low: int = -(2**63), high: int = 2**63) -> bool:
    """Whether a value is an integer as ids are: no boolean, within int64."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and low <= int(value) < high


class World:
    """An open engine on the coded model, and a loop to call it from plain functions."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.given: Any = None
        self.features: Any = None

        async def features(request: aif.Request) -> Any:
            return coded.user_features(3) if self.features is None else self.features

        async def retrieval(request: aif.Request) -> Any:
            return self.given

        config = aif.ServingConfig(buckets=(16, 128), max_k=K, fallback=False, callable_timeout=None)
        trained = aif.Trained(coded.MODEL, coded.params(1))
        self.engine = aif.AsyncPreRanker(trained, coded.index(1), features=features, retrieval=retrieval, config=config)
        self.loop.run_until_complete(self.engine.__aenter__())

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """What a method of the engine returns or raises; a call that hangs fails."""
        return self.loop.run_until_complete(asyncio.wait_for(getattr(self.engine, method)(*arguments, **options), 60))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World()
    yield world
    world.call("close")
    world.loop.close()


def ids_in(value: Any) -> Any:
    """What candidates hold as ids, good or bad; None for what has no length."""
    value = value.args[0] if isinstance(value, partial) else value
    return value if isinstance(value, list | tuple) or isinstance(value, np.ndarray) and value.ndim else None


def plain_ids(value: Any) -> list[int] | None:
    """The ids in candidates as retrieval may give them; None where they must be refused."""
    value = ids_in(value)
    if isinstance(value, np.ndarray):
        if value.ndim != 1 or value.dtype.kind not in "iuO":
            return None
        value = value.tolist()
    if not isinstance(value, list | tuple) or not all(map(is_integer, value)):
        return None
    return [int(item) for item in value]


@st.composite
def candidate_arrays(draw: Any) -> Any:
    good = draw(st.lists(ids, max_size=70))
    dtypes = st.sampled_from(["int64", "float32", "bool", "<U3", "S2", "M8[s]", "complex64", "int8"])
    place, size = draw(st.integers(0, len(good))), draw(st.sampled_from([len(good), len(good), len(good) + 1]))
    kinds = {
        "list": lambda: good,
        "tuple": lambda: tuple(good),
        "int64": lambda: np.array(good, np.int64),
        "int32": lambda: np.array([item % 2**31 for item in good], np.int32),
        "uint64": lambda: np.array([item % 2**64 for item in good], np.uint64),
        "object": lambda: np.array([*good, draw(scalars)], object),
        "mixed": lambda: [*good[:place], draw(junk), *good[place:]],
        "strings": lambda: list(map(str, good)) or ["1"],
        "junk": lambda: draw(junk),
        "array": lambda: draw(arrays_of.arrays(dtypes, arrays_of.array_shapes(min_dims=0, max_dims=2, max_side=4))),
        "bids": lambda: partial(aif.Candidates, np.array(good, np.int64), draw(arrays_of.arrays(np.float64, size))),
    }
    return kinds[draw(st.sampled_from(list(kinds)))]()


def check_candidates(world: World, data: Any) -> None:
    """Any candidates, ranked or scored."""
    given, method = data.draw(candidate_arrays()), data.draw(st.sampled_from(["rank", "score"]))
    wanted, good_bids = plain_ids(given), True
    with np.errstate(all="ignore"):  # the engine reads bids as float32
        if isinstance(given, partial):
            bids = given.args[1].astype(np.float32)
            good_bids = bool((np.isfinite(bids) & (bids >= 0)).all()) and len(bids) == len(given.args[0])
        try:
            candidates = given() if isinstance(given, partial) else given
            if method == "rank":
                world.given = candidates
                answer = world.call("rank", aif.Request(user=1), K)
            else:
                answer = world.call("score", aif.Request(user=1), candidates)
        except REFUSED as error:
            assert str(error)
            assert wanted is None or not good_bids, f"good candidates were refused: {error}"
            return
    nothing = (listed := ids_in(given)) is not None and len(listed) == 0  # no ids are of any kind
    assert (wanted is not None or nothing) and good_bids, "bad candidates were answered"
    wanted = np.array(wanted or [], np.int64)
    if method == "score":
        code = coded.codes(3, wanted)
        assert (answer.mask == (code >= 0)).all()
        if answer.mask.any():
            assert (coded.parts(answer.logits[answer.mask])[2] == code[code >= 0]).all()
        return
    best, code = coded.expected_ranking(3, wanted, K)
    assert answer.candidates == len(wanted) and answer.unknown == (coded.codes(3, wanted) < 0).sum()
    assert answer.ids[answer.mask].tolist() == best.tolist() and (answer.ids[~answer.mask] == -1).all()
    if len(best):
        assert (coded.parts(answer.logits[answer.mask])[2] == code).all()


def check_requests(world: World, data: Any) -> None:
    """Any user, feature version, order, k and budget."""
    user, feature_version, order = data.draw(scalars), data.draw(scalars), data.draw(st.just("logit") | junk)
    k, budget = data.draw(st.integers(-2, K + 2) | scalars), data.draw(st.none() | st.floats(0, 100) | scalars)
    world.given = coded.IDS
    good_k = is_integer(k, low=1, high=K + 1)
    good_budget = budget is None or isinstance(budget, int | float | np.number) and not isinstance(budget, complex)
    good_budget = good_budget and (budget is None or 0 < budget < math.inf)
    either = isinstance(k, bool) or isinstance(budget, bool)  # Python's integers 0 and 1
    good_order = order is None or order == "logit"
    try:
        answer = world.call("rank", aif.Request(user=user, feature_version=feature_version, order=order), k, budget=budget)
    except aif.DeadlineExceeded:
        assert good_budget and budget is not None and budget < 10
    except REFUSED as error:
        assert str(error) and (either or not good_order or not good_k or not good_budget), f"refused: {error}"
    else:
        assert either or good_order and good_k and good_budget, "a bad request was answered"
        best, _ = coded.expected_ranking(3, coded.IDS, int(k))
        assert answer.ids.tolist() == best.tolist()


FITTING: dict[str, tuple[str, tuple[int, ...], Callable[[Any], Any]]] = {
    "floats": ("float32", (1,), np.isfinite), "item": ("int32", (2,), lambda row: (row >= 0) & (row <= coded.ITEMS)),
    "action": ("int32", (2,), lambda row: (row >= 0) & (row < coded.SCHEMA.actions)),
    "age": ("float32", (2,), lambda age: np.isfinite(age) & (age >= 0)), "mask": ("bool", (2,), np.isfinite),
}  # fmt: skip
"""Dtype, shape and right values of each array of a user."""


def check_features(world: World, data: Any) -> None:
    """User features with any one part replaced."""
    good = coded.user_features(data.draw(st.integers(0, coded.USERS - 1)))
    part = data.draw(st.sampled_from(["floats", "item", "action", "age", "mask", "ids", "history", "all"]))
    dtype = data.draw(st.sampled_from(["int32", "float32", "bool", "int64", "float64"]))
    shape = data.draw(st.sampled_from([(2,), (2,), (1,), (1,), (), (3,), (2, 1), (0,)]))
    values = st.sampled_from([0, 0, 1, 2, 49, 64, 65, -1, 2**31 - 1])
    if dtype.startswith("float"):
        values |= st.sampled_from([math.nan, math.inf, -math.inf, -0.0])
    array = np.array(data.draw(arrays_of.arrays(object, shape, elements=values)).tolist(), object)
    with np.errstate(all="ignore"):
        array = array.astype(dtype) if dtype != "int32" else array.astype(np.int64).astype(np.int32)
    number = array if part == "floats" else good.floats
    if part == "floats":
        good = dataclasses.replace(good, floats=array)
    elif part in FITTING:
        good = dataclasses.replace(good, history=dataclasses.replace(good.history, **{part: array}))
    else:
        other = data.draw(junk)
        good = other if part == "all" else dataclasses.replace(good, **{part: other})
    fits = part == "ids" and isinstance(good.ids, dict) and good.ids == {}
    if part in FITTING:
        *kind, right = FITTING[part]
        fits = [dtype, shape] == kind and bool(np.all(right(array)))
    world.given, world.features = coded.IDS, good
    if good is None:
        world.features = 0  # None means the default here
    try:
        answer = world.call("rank", aif.Request(user=1), K)
    except REFUSED as error:
        assert str(error) and not fits, f"good features were refused: {error}"
        return
    finally:
        world.features = None
    assert fits, "bad features were answered"
    if 0 <= number[0] <= 64:
        best, _ = coded.expected_ranking(int(number[0]), coded.IDS, K)
        assert answer.ids.tolist() == best.tolist()


ENCODER = damaged.encoder()
USERS, CITIES, ITEMS, ACTIONS = ["ann", "bob", "zoë"], ["Oslo", "Rom"], [7, 8, 10**12], ["view", "buy"]
BRANDS, CATEGORIES, TAGS = [1, 2], ["b", "é"], ["a", "b", "c"]


class MustRefuse(Exception):
    """Raised by a reference for an input that has no right answer."""


class Loose:
    """Whether a reference met a value that may be refused or be counted as unknown."""

    def __init__(self) -> None:
        self.seen = False

    def row(self, vocabulary: list, value: Any, kind: type) -> int:
        """The row of a value; one of another kind may be refused."""
        if value is None or isinstance(value, float) and math.isnan(value):
            return 0
        plain = int(value) if kind is int and is_integer(value) else value
        if not isinstance(plain, kind) or isinstance(plain, bool):
            self.seen = True
            return 0
        return vocabulary.index(plain) + 1 if plain in vocabulary else 0

    def number(self, value: Any, scale: tuple[float, float]) -> np.float32:
        """A scaled float; what is no finite float32 must be refused."""
        if isinstance(value, bool | np.bool_):
            self.seen = True
        elif not isinstance(value, int | float | np.number) or isinstance(value, complex):
            raise MustRefuse(f"no number: {value!r}")
        with np.errstate(over="ignore"):
            try:
                narrow = np.float32(float(value))
            except OverflowError:
                raise MustRefuse("a number beyond float64") from None
        if not np.isfinite(narrow):
            raise MustRefuse("no finite float32")
        mean, deviation = np.float32(scale[0]), np.float32(scale[1])
        with np.errstate(over="ignore"):
            return np.float32((narrow - mean) / deviation)


def expected_history(events: Any, now: int, loose: Loose) -> list[np.ndarray]:
    """item, action, age, mask [4], from raw events, by the table in the docstring of `Encoder`."""
    rows: list[tuple[int, int, int, int]] = []
    if events is not None:
        columns = [events["item"], events["time"], events["event"]]
        if len({len(column) for column in columns}) > 1:
            raise MustRefuse("columns of several lengths")
        for item, time, event in zip(*columns, strict=True):
            if not is_integer(time) or not FLOOR <= time <= 4_102_444_800 or time > now + 60:
                raise MustRefuse(f"the time {time!r}")
            loose.seen |= not is_integer(item) or not isinstance(event, str)
            row = ITEMS.index(item) + 1 if is_integer(item) and item in ITEMS else 0
            action = ACTIONS.index(event) + 1 if isinstance(event, str) and event in ACTIONS else 0
            if time < now:
                rows.append((time, int(item) if is_integer(item) else 0, action, row))
    rows = sorted(rows, reverse=True)[: ENCODER.length]
    time, _, action, item = np.array([*rows, *[(now, 0, 0, 0)] * (ENCODER.length - len(rows))]).T
    mask = np.arange(ENCODER.length) < len(rows)
    return [item.astype(np.int32), action.astype(np.int32), (now - time).astype(np.float32), mask]


def check_encoder_user(world: Any, data: Any) -> None:
    """Any user record, events and time of the request."""
    rare = st.integers(0, 19).flatmap(lambda n: scalars if n == 0 else st.nothing())
    user = data.draw(
        st.none()
        | st.fixed_dictionaries({
            "user": st.sampled_from([*USERS, "eve"]) | rare | st.none(),
            "city": st.sampled_from([*CITIES, "Ulm"]) | rare | st.none(),
            "age": st.floats(0, 100) | rare | st.none(),
        })
    )  # fmt: skip
    count = data.draw(st.integers(0, 8))

    def column(values: Any) -> Any:
        listed = data.draw(st.lists(values, min_size=count, max_size=count))
        if data.draw(st.integers(0, 19)) == 0:
            listed = listed + listed[:1]
        return listed

    offsets = st.integers(-5, 5) | st.integers(-1000, 61)
    odd = data.draw(st.integers(0, 9)) == 0
    events = data.draw(st.booleans()) and {
        "item": column(st.sampled_from([*ITEMS, 5]) | (scalars if odd else st.nothing())),
        "time": column(offsets.map(lambda n: NOW + n) | (st.sampled_from([1.5, None, 10**13, "5"]) if odd else st.nothing())),
        "event": column(st.sampled_from([*ACTIONS, "zap"]) | (scalars if odd else st.nothing())),
    } or None  # fmt: skip
    now = data.draw(st.sampled_from([NOW, NOW, NOW, NOW, np.int64(NOW)]) | rare)
    loose, refuse = Loose(), True
    with contextlib.suppress(MustRefuse):
        if not is_integer(now) or not FLOOR <= now <= 4_102_444_800:
            raise MustRefuse("the time of the request")
        history = expected_history(events, int(now), loose)
        floats = np.zeros(1, np.float32)
        rows = {"user": 0, "city": 0}
        if user is not None:
            rows = {"user": loose.row(USERS, user["user"], str), "city": loose.row(CITIES, user["city"], str)}
            if user["age"] is not None:
                floats[0] = loose.number(user["age"], ENCODER.scales["user/age"])
        refuse = False
    try:
        got = ENCODER.user(user, events, now)
    except REFUSED as error:
        assert str(error) and (refuse or loose.seen), f"refused: {error!r} for {user}, {events}, {now}"
        return
    assert not refuse, f"accepted {user}, {events}, {now}"
    assert {name: int(value) for name, value in got.ids.items()} == rows
    assert demo.same([got.history.item, got.history.action, got.history.age, got.history.mask], history)
    np.testing.assert_array_equal(got.floats, floats)


def check_encoder_items(world: Any, data: Any) -> None:
    count = data.draw(st.integers(0, 5))
    odd = data.draw(st.sampled_from([None, None, "item", "category", "brand", "tags", "price", "bid"]))
    good = {
        "item": st.sampled_from([*ITEMS, 5]), "category": st.sampled_from([*CATEGORIES, "x"]) | st.none(),
        "brand": st.sampled_from([*BRANDS, 9]) | st.none(), "tags": st.sampled_from(["a", "a|b", "b|c|a|z", "|a||", "", None]),
        "price": st.floats(-1e6, 1e6), "bid": st.floats(0, 100),
    }  # fmt: skip
    table = {
        name: data.draw(st.lists(values | (junk if name == odd else st.nothing()), min_size=count, max_size=count))
        for name, values in good.items()
    }
    loose, refuse = Loose(), True
    with contextlib.suppress(MustRefuse):
        if not all(is_integer(value) or isinstance(value, str) for value in table["item"]):
            raise MustRefuse("an id")
        loose.seen |= any(isinstance(value, str) for value in table["item"])  # "7" is 7, in files too
        loose.seen |= any(isinstance(value, float) for value in (*table["category"], *table["brand"]))  # a column of NaN
        tags = []
        for value in table["tags"]:
            loose.seen |= not isinstance(value, str | None)
            parts = [part for part in value.split("|") if part] if isinstance(value, str) else []  # empty text is no value
            tags.append(([TAGS.index(p) + 1 if p in TAGS else 0 for p in parts] + [0] * 3)[:3])
        rows = {
            "item": [loose.row(ITEMS, value, int) for value in table["item"]],
            "category": [loose.row(CATEGORIES, value, str) for value in table["category"]],
            "brand": [loose.row(BRANDS, value, int) for value in table["brand"]],
            "tags": tags,
        }
        price = np.array([loose.number(value, ENCODER.scales["item/price"]) for value in table["price"]], np.float32)
        bid = np.array([loose.number(value, (0, 1)) for value in table["bid"]], np.float32)
        refuse = False
    try:
        raw, got = encode_items(table, ENCODER)
    except REFUSED as error:
        assert str(error) and (refuse or loose.seen or not count), f"refused: {error!r} for {table}"
        return
    assert not refuse, f"accepted {table}"
    if not loose.seen:
        assert raw.tolist() == table["item"]
        assert {name: value.tolist() for name, value in got.ids.items()} == rows
        np.testing.assert_array_equal(got.floats, price[:, None])
        np.testing.assert_array_equal(got.side["bid"], bid)


def check_index(world: Any, data: Any) -> None:
    """A sequence of upserts and deletions of anything; what is refused changes nothing."""
    index = writer_world.build([5, 6], [1, 2], capacity=64)
    model = {5: 1, 6: 2}
    some = st.lists(st.integers(0, 20), min_size=1, max_size=6)
    for _ in range(data.draw(st.integers(1, 5))):
        keys: Any = data.draw(some | some | some | st.lists(st.integers(0, 20) | junk, max_size=4) | junk)
        good = isinstance(keys, list) and all(map(is_integer, keys)) and -(2**63) not in keys
        old, before = index, dict(model)
        upsert = data.draw(st.booleans())
        try:
            if upsert:
                count = len(keys) if isinstance(keys, list) else 1
                numbers = data.draw(st.lists(st.integers(0, 1000), min_size=count, max_size=count))
                features = writer_world.features(np.array(numbers, np.int64))
                bad = data.draw(st.sampled_from([None, None, None, "nan", "longer", "dtype", "range", "junk"]))
                if bad == "nan" and count:
                    features.floats[0, 0] = math.nan
                elif bad == "longer":
                    features = writer_world.features(np.array([*numbers, 3], np.int64))
                elif bad == "dtype":
                    features = dataclasses.replace(features, floats=features.floats.astype(np.float64))
                elif bad == "range" and count:
                    features.ids["item"][0] = 9
                elif bad == "junk":
                    features = data.draw(junk)
                good = good and (bad is None or bad in ("nan", "range") and not count)
                index = index.upsert(keys, features)
                for key, number in zip(keys, numbers, strict=True):
                    model[int(key)] = number
            else:
                index = index.delete(keys)
                for key in keys:
                    model.pop(int(key), None)
        except REFUSED as error:
            assert str(error) and not good, f"refused: {error!r}"
            assert index is old and model == before
        else:
            assert good or not len(keys), f"accepted {keys!r}"
        assert index.ids.tolist() == sorted(model)
        rows, mask = index.take(sorted(model) or [0])
        vectors = np.asarray(writer_world.features([model[key] for key in sorted(model)] or [0]).floats) * np.float32(3)
        assert mask.all() == bool(model) and (not model or np.array_equal(rows["vector"], vectors))


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(inner, (*path, key))


SETTINGS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "columns": (ENCODER.columns.to_json(), lambda given: aif.Columns(**given)),
    "schema": (ENCODER.schema.to_json(), aif.Schema.from_json),
    "config": (aif.presets.aif(ENCODER.schema).to_json(), aif.Config.from_json),
    "encoder": (ENCODER.to_record(), lambda record: aif.Encoder.from_record(record, ENCODER.to_arrays())),
}


def check_settings(world: Any, data: Any) -> None:
    """Columns, schema, config and encoder from JSON with one place replaced, removed or added."""
    name = data.draw(st.sampled_from(sorted(SETTINGS)))
    record, parse = SETTINGS[name]
    changed = json.loads(json.dumps(record))
    path = data.draw(st.sampled_from([path for path in _places(changed) if path]))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    deed = data.draw(st.sampled_from(["replace", "replace", "remove", "add"]))
    values = st.none() | st.booleans() | st.integers(-3, 5) | st.integers() | st.floats() | st.text(max_size=5)
    nested = st.recursive(values, lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=3), v, max_size=2))
    value = data.draw(nested)
    if deed == "replace":
        inner[path[-1]] = value
    elif deed == "remove":
        del inner[path[-1]]
    elif isinstance(inner, dict):
        inner["another"] = value
    before = copy.deepcopy(changed)
    try:
        got = parse(changed)
    except REFUSED as error:
        assert str(error) and repr(changed) != repr(record)  # 1 in place of true is a change
        return
    assert repr(changed) == repr(before), "the parser changed its input"
    if name == "encoder":
        assert got.version == ENCODER.version, "an encoder of another meaning with the version of the old one"
    else:
        assert parse(json.loads(json.dumps(got.to_json()))) == got


def check_read(world: Any, data: Any) -> None:
    """Any tables in memory as a data set."""
    people, things = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4, unique=True)), [100, 101, 102]
    count = data.draw(st.integers(1, 8))

    def column(values: Any, size: int) -> list:
        return data.draw(st.lists(values, min_size=size, max_size=size))

    tables: dict[str, dict[str, list]] = {
        "events": {
            "user": column(st.sampled_from(people), count), "item": column(st.sampled_from(things), count),
            "time": column(st.integers(NOW, NOW + 5), count), "event": column(st.sampled_from(["view", "buy"]), count),
        },
        "items": {
            "item": list(things), "category": column(st.sampled_from(["tea", "cup"]), 3), "price": column(st.floats(-9, 9), 3),
        },
        "users": {"user": list(people), "city": column(st.sampled_from(["Oslo", "Rom", None]), len(people))},
    }  # fmt: skip
    altered = data.draw(st.booleans())
    if altered:
        name = data.draw(st.sampled_from(sorted(tables)))
        key = data.draw(st.sampled_from(sorted(tables[name])))
        place = data.draw(st.integers(0, len(tables[name][key]) - 1))
        value = data.draw(scalars | st.sampled_from([-1, 7, 103, NOW * 1000, 10**12, "cup", math.nan]))
        tables[name][key][place] = value
    events, items, users = tables["events"], tables["items"], tables["users"]

    def refuse() -> bool:
        """Whether something in the tables has no right reading."""
        ids = [*events["user"], *events["item"], *items["item"], *users["user"]]
        if not all(is_integer(value, low=0) for value in ids):
            return True
        repeated = len(set(items["item"])) < 3 or len(set(users["user"])) < len(people)
        lost = not set(events["item"]) <= set(items["item"]) or not set(events["user"]) <= set(users["user"])
        return repeated or lost or not all(is_integer(value, low=FLOOR, high=4_102_444_801) for value in events["time"])

    try:
        got = damaged._rows_of(aif.read(events, items=items, users=users, columns=damaged.COLUMNS))
    except REFUSED as error:
        assert str(error) and altered, f"refused: {error}"
        return
    assert not refuse(), f"accepted {tables}"
    texts = [*events["event"], *items["category"], *users["city"]]
    if not all(isinstance(value, str | None) for value in texts):
        return  # numbers among text
    listed = [event if event in ("view", "buy") else None for event in events["event"]]
    rows = zip(events["user"], events["item"], events["time"], listed, strict=True)
    assert sorted(map(repr, got["events"])) == sorted(repr((int(u), int(i), int(t), a)) for u, i, t, a in rows)
    with np.errstate(over="ignore"):
        prices = [float(np.float32(price)) for price in items["price"]]
    assert got["items"] == sorted(zip(map(int, items["item"]), items["category"], prices, strict=True))
    assert got["users"] == sorted((int(user), city) for user, city in zip(users["user"], users["city"], strict=True))


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize(("sizes", "seed"), RUNS)
@pytest.mark.parametrize("name", list(CHECKS))
def test_any_input(world, name, sizes, seed):
    options = dict(deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck), print_blob=True)

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=sizes.examples, **options)
    @hypothesis.given(st.data())
    def drawn(data: Any) -> None:
        CHECKS[name](world, data)

    print(f"{name}: AIF_JAX_RELIABILITY_SEED={seed}, {sizes.examples} examples")
    drawn()


@pytest.mark.parametrize(("name", "cases", "seed"), [("checkpoint", 25, 0), *(
    pytest.param(name, FULL.damaged_files, SEED, id=name, marks=full().marks) for name in damaged.FORMATS
)])  # fmt: skip
def test_damaged_files(python, tmp_path, name, cases, seed):
    """In a child process, which may crash."""
    print(f"AIF_JAX_RELIABILITY_SEED={seed}")
    env = {"PYTHONWARNINGS": "default"}  # readers in other languages warn of what they then refuse
    code = f"from tests.reliability import damaged; damaged.main({name!r}, {str(tmp_path)!r}, {seed}, {cases})"
    tally = json.loads(python(code, timeout=3000, env=env).splitlines()[-1])
    print(f"{name}: {tally}")
    assert sum(tally.values()) == cases and tally["refused"] > 0
    assert tally.get("unsure", 0) < cases / 2, "too few cases in which the right content is known"


# Arrow swallows an error within its handler of broken rows, such as of text in another encoding.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_few_damaged_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(damaged.resource, "setrlimit", lambda *limits: None)  # this process goes on without limits
    monkeypatch.setattr(damaged.faulthandler, "dump_traceback_later", lambda *limits, **options: None)
    damaged.main("csv", str(tmp_path), 0, 20)
    assert sum(json.loads(capsys.readouterr().out.splitlines()[-1]).values()) == 20
