"""The user table: built, streamed, saved and resumed, with the scores of whole histories; rows in memory and in a server."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
import types
from functools import partial

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import blocks
from aif_jax.checks import EncodingMismatch, VersionMismatch
from aif_jax.connectors import MemoryStream, SinkTarget, ValkeyStream
from aif_jax.store.codec import STORAGES, Packed
from aif_jax.user_table import ClockError, MemoryRows, RemoteRows, Stored, UpdateCounts, UserTable, UserTableWriter
from aif_jax.user_table.rows import NONE
from aif_jax.user_table.table import read_rows, write_rows
from experiments.datasets.synthetic import synthetic_world
from tests import demo
from tests.writer_world import rows

WORLD = synthetic_world(0, users=14, items=60, topics=6, categories=5, interests=2, favourites=2, events_per_user=90)
LOG = WORLD.dataset.log
TIES = np.lexsort((LOG.action, LOG.item, LOG.time, LOG.user))  # as files are read: those of one moment by item and action
DATA = dataclasses.replace(
    WORLD.dataset, log=dataclasses.replace(LOG, **{name: getattr(LOG, name)[TIES] for name in ("item", "action", "time")})
)
ENCODER = DATA.encoder
STREAMING = (
    blocks.DecayedSim("category", slots=3, length=3),
    blocks.DecayedMemory(width=16, dot_product=True),
    blocks.SimTier(tiers=4, bits=32, length=24),
    blocks.DotProduct(),
)
CONFIG = aif.Config(schema=DATA.schema, width=16, short_length=6, long_length=128, towers=(16,), head=(16,), blocks=STREAMING)
MODEL = aif.build(CONFIG)
PARAMS = demo.init(MODEL, items=DATA.catalogue)
VERSION = "a" * 64
TRAINED = aif.Trained(MODEL, PARAMS, ENCODER).with_version(VERSION)
UPDATES = 40


def raw(at) -> dict[str, np.ndarray]:
    """Raw events at some positions of the log."""
    log = DATA.log
    names = {"user": DATA.users.raw[log.user[at] - 1], "item": DATA.items.raw[log.item[at] - 1]}
    return names | {"action": log.action[at], "time": log.time[at]}


ARRIVAL = np.argsort(DATA.log.time, kind="stable")  # as a stream brings them
MESSAGES = np.array_split(ARRIVAL, UPDATES)


def table(**options) -> UserTable:
    return UserTable(TRAINED, **{"batch_size": 8} | options)


@pytest.fixture(scope="module")
def streamed() -> UserTable:
    """All events, message by message."""
    made = table()
    counts = [made.update(raw(at), position=position) for position, at in enumerate(MESSAGES)]
    assert sum(count.events for count in counts) == len(DATA.log) and not any(count.repeated for count in counts)
    return made


@pytest.fixture(scope="module")
def built() -> UserTable:
    return UserTable.build(TRAINED, DATA, batch_size=8, position=UPDATES - 1, progress=False)


def consume(table: UserTable, messages=MESSAGES) -> UserTable:
    """The table with messages of a stream, one by one."""
    for position, at in enumerate(messages):
        table.update(raw(at), position=position)
    return table


def memories(table: UserTable) -> dict:
    return {user: table.memory(user) for user in sorted(table.rows.of)}


def assert_near(a: UserTable, b: UserTable) -> None:
    """The same users and memories, but for rounding."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), memories(a), memories(b))


def test_a_build_is_what_the_stream_comes_to(streamed, built):
    assert_near(built, streamed)
    assert [int(memory.count) for memory in memories(built).values()] == [90] * 14


@pytest.mark.parametrize("unit", ["s", "ms"])
def test_a_build_up_to_a_moment_takes_it_in_the_unit_of_the_columns(unit):
    columns = dataclasses.replace(ENCODER.columns, time_unit=unit)
    encoder = dataclasses.replace(ENCODER, columns=columns)
    catalogue = dataclasses.replace(DATA.catalogue, schema=encoder.schema)
    data = dataclasses.replace(DATA, encoder=encoder, schema=encoder.schema, catalogue=catalogue)
    second = int(np.median(data.log.time))
    model = aif.build(MODEL.config.replace(schema=encoder.schema))  # of this encoder's data
    trained = aif.Trained(model, PARAMS, encoder).with_version(VERSION)
    build = partial(UserTable.build, trained, data, batch_size=8, progress=False)
    until = build(until=second * {"s": 1, "ms": 1000}[unit])
    assert sum(int(memory.count) for memory in memories(until).values()) == (data.log.time < second).sum()
    assert rows(until) == rows(build(until=str(np.datetime64(second, "s"))))
    with pytest.raises(ValueError, match="until: expected an ISO date such as '2022-05-06', a datetime, or an integer in"):
        build(until="yesterday")


def test_features_of_a_table_are_features_of_the_model(built, streamed):
    """`model.user` takes the packed row: the state is that of the row decoded, in every storage."""
    now = int(DATA.log.time.max()) + 60
    compact = table(storage="int8")
    compact.update(raw(ARRIVAL))
    for one in (built, compact):
        user = next(iter(one.rows.of))
        features = one.features(user, now=now)
        decoded = dataclasses.replace(features, history=dataclasses.replace(features.history, memory=one.memory(user)))
        states = [jax.jit(MODEL.user)(PARAMS, given) for given in (features, decoded)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *states)


def test_a_build_from_raw_batches_is_the_same(built):
    made = UserTable.build(TRAINED, map(raw, MESSAGES), batch_size=8, position=UPDATES - 1, progress=False)
    assert_near(made, built)


def test_a_run_makes_its_table(built):
    run = aif.Run(trained=TRAINED, metrics={}, settings=None)  # type: ignore[arg-type]
    made = run.user_table(DATA, batch_size=8, position=UPDATES - 1, progress=False)
    assert rows(made) == rows(built)
    with pytest.raises(ValueError, match="UserTable: expected a model with an encoder, which reads raw data, got one without"):
        dataclasses.replace(run, trained=run.trained.replace(encoder=None)).user_table(DATA)


def test_a_build_up_to_a_moment_goes_on_with_the_stream(built):
    cut = int(np.sort(DATA.log.time)[len(DATA.log) // 2])
    made = UserTable.build(TRAINED, DATA, batch_size=8, until=cut, position=0, progress=False)
    made.update(raw(ARRIVAL[DATA.log.time[ARRIVAL] >= cut]), position=1)
    assert_near(made, built)


def test_a_row_scores_as_the_whole_history(streamed):
    """Features from the table, with and without events since, against those that training would have sampled."""
    score, candidates = jax.jit(MODEL.joint), DATA.catalogue.features(np.arange(1, 40))
    partial = consume(table(), MESSAGES[:-1])
    now = int(DATA.log.time.max()) + 100
    for user in DATA.users.raw[:4].tolist():
        mine = ARRIVAL[DATA.log.user[ARRIVAL] == user]
        whole = ENCODER.with_length(128).user(None, raw(mine), now)
        expected = score(PARAMS, whole, candidates)
        last = raw(np.array([at for at in MESSAGES[-1] if DATA.log.user[at] == user], np.int64))
        late = partial.features(user, now=now, events=last, places=32)
        for features in (streamed.features(user, now=now), late, partial.features(user, now=now, events=last, places=1)):
            history = dataclasses.replace(features.history, memory=jax.jit(Packed.widened)(features.history.memory))
            got = score(PARAMS, dataclasses.replace(features, history=history, encoding=""), candidates)
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_what_came_before_is_skipped_user_by_user():
    made = table()
    one, two = ({"user": [u], "item": [3], "action": [1], "time": [1_500_000_000]} for u in (1, 2))
    assert made.update(one, position=5) == UpdateCounts(1, 1, 0, 0, 0)
    both = {name: one[name] + two[name] for name in one}
    assert made.update(both, position=5) == UpdateCounts(1, 1, 1, 0, 0)
    assert made.update(both, position=4).repeated == 2
    assert made.update(both, position=6) == UpdateCounts(2, 2, 0, 0, 0)
    assert made.update(both) == UpdateCounts(2, 2, 0, 0, 0)  # without a position nothing is a repetition
    assert [int(made.memory(user).count) for user in (1, 2, 3)] == [3, 3, 0]


def test_messages_that_come_together_keep_their_positions(streamed):
    """A row that holds the first messages of its user takes the later ones alone."""
    some = MESSAGES[:6]
    made = consume(table(), some[:3])
    where = np.repeat(np.arange(6), [len(at) for at in some])
    applied = made.update(raw(np.concatenate(some)), position=where)
    assert applied.repeated == sum(map(len, some[:3])) and applied.events == sum(map(len, some[3:]))
    singly = consume(table(), some)
    assert made.rows.of.keys() == singly.rows.of.keys()
    for user in singly.rows.of:
        np.testing.assert_array_equal(made.memory(user).recent.code, singly.memory(user).recent.code)
        assert made.rows.get([user]).position == singly.rows.get([user]).position
    for wrong, message in (
        (where[::-1], "positions of events in the order of the stream, got some that fall"),
        (where[1:], f"one for each of {len(where)} events, got an array of shape"),
        (np.full(len(where), NONE), "position: expected an integer from 0 to 9223372036854775807, got -9223372036854775808"),
        (np.full(len(where), 2**63, np.uint64), "position: expected an integer from 0 to 9223372036854775807, got 9223372036"),
    ):
        with pytest.raises(ValueError, match=message):
            made.update(raw(np.concatenate(some)), position=wrong)
    with pytest.raises(TypeError, match="position: expected integers, got float64"):
        made.update(raw(np.concatenate(some)), position=where * 1.0)


def test_late_events_are_put_in_their_place_and_counted():
    made, ordered = table(), table()
    at = ARRIVAL[DATA.log.user[ARRIVAL] == 3]
    order = np.r_[0:60, 62, 60, 61, 63:90]
    first = sum((made.update(raw(at[[i]]), position=n).late for n, i in enumerate(order)))
    strictly = DATA.log.time[at[[60, 61]]] < DATA.log.time[at[62]]
    assert first == strictly.sum()
    ordered.update(raw(at), position=0)
    np.testing.assert_allclose(
        made.memory(3).blocks["decayed_memory"].means, ordered.memory(3).blocks["decayed_memory"].means, atol=1e-5
    )
    np.testing.assert_array_equal(made.memory(3).recent.time, ordered.memory(3).recent.time)
    old = raw(at[[0]])
    assert made.update(old) == UpdateCounts(1, 1, 0, 1, 1)  # older than the 24 events that are kept: in the sums alone
    np.testing.assert_array_equal(made.memory(3).recent.time, ordered.memory(3).recent.time)


def test_events_that_do_not_fit_change_nothing(streamed):
    before = rows(streamed)
    good = raw(MESSAGES[0])
    for change, error, message in (
        ({"time": good["time"] * 1000}, ValueError, "expected a time before 2100 in 's'"),
        ({"time": good["time"][:-1]}, ValueError, "events: expected columns of one length"),
        ({"item": good["item"].astype(str)}, TypeError, "expected integers"),
        ({"user": good["user"].astype(float)}, TypeError, "user"),
        ({"user": good["user"][:-1]}, ValueError, "events: expected a user for each event"),
        ({"time": np.full(len(good["time"]), -(10**9))}, ValueError, "column 'time': expected seconds in"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            streamed.update(good | change, position=99)
    with pytest.raises(ValueError, match="expected a column 'user'"):
        streamed.update({name: values for name, values in good.items() if name != "user"}, position=99)
    with pytest.raises(TypeError, match="position: expected an integer"):
        streamed.update(good, position="7")  # type: ignore[arg-type]
    assert rows(streamed) == before


def test_events_of_the_future_are_refused():
    last = int(DATA.log.time.max())
    on_time, behind = table(clock=lambda: last - ENCODER.max_skew), table(clock=lambda: last - ENCODER.max_skew - 1)
    assert on_time.update(raw(ARRIVAL)).events == len(ARRIVAL)
    expected = f"events: expected times up to this machine's clock, .* 60 s of skew allowed, got {last}, 61 s later; set"
    with pytest.raises(ClockError, match=expected):
        behind.update(raw(ARRIVAL))
    assert len(behind) == 0
    assert behind.update(raw(ARRIVAL[:9])).events == 9  # the stream goes on
    with pytest.raises(ClockError, match="times up to this machine's clock"):
        UserTable.build(TRAINED, DATA, clock=lambda: 0.0, progress=False)
    later = {"user": [1], "item": [1], "action": [1], "time": [4_000_000_000]}
    assert table(clock=None).update({name: later[name] for name in raw(ARRIVAL[:1])}).events == 1


def test_a_user_who_comes_by_another_partition_is_refused():
    made, one = table(), {"user": [1], "item": [3], "action": [1], "time": [1_500_000_000]}
    made.update(one, position=100, partition=2)
    with pytest.raises(ValueError, match="events of user 1 by partition 2, as before, got partition 5; build the table again"):
        made.update(one, position=3, partition=5)
    assert made.memory(1).count == 1


@pytest.mark.parametrize("storage", STORAGES)
def test_compact_rows_score_nearly_the_same(storage, streamed):
    made = consume(table(storage=storage))
    assert made.row_bytes <= streamed.row_bytes and (made.row_bytes < streamed.row_bytes) == (storage != "float32")
    score, candidates = jax.jit(MODEL.joint), DATA.catalogue.features(np.arange(1, 40))
    now, worst = int(DATA.log.time.max()) + 100, 0.0
    for user in DATA.users.raw.tolist():
        got = []
        for each in (made, streamed):
            features = each.features(user, now=now)
            history = dataclasses.replace(features.history, memory=each.memory(user))
            got.append(score(PARAMS, dataclasses.replace(features, history=history, encoding=""), candidates))
        worst = max(worst, float(np.abs(got[0] - got[1]).max()))
    assert worst <= {"float32": 0.0, "bfloat16": 0.02, "int8": 0.05}[storage]


def test_a_table_is_saved_and_loaded(tmp_path, streamed):
    streamed.save(tmp_path / "t", positions={0: 39, 2: 7})
    found = UserTable.load(tmp_path / "t", TRAINED)
    assert rows(found) == rows(streamed) and UserTable.inspect(tmp_path / "t").positions == {0: 39, 2: 7}
    again = UserTable.build(TRAINED, map(raw, MESSAGES[::-1]), progress=False)
    assert list(again.rows.of) != list(streamed.rows.of)
    with pytest.raises(FileExistsError):
        found.save(tmp_path / "t")
    with pytest.raises(VersionMismatch, match="expected version bbb"):
        UserTable.load(tmp_path / "t", aif.Trained(MODEL, PARAMS, ENCODER).with_version("b" * 64))
    other = dataclasses.replace(ENCODER, columns=dataclasses.replace(ENCODER.columns, time="when"))
    with pytest.raises(EncodingMismatch):
        UserTable.load(tmp_path / "t", aif.Trained(MODEL, PARAMS, other).with_version(VERSION))
    wider = aif.build(CONFIG.replace(head=(8,)))
    with pytest.raises(ValueError, match="expected config and schema of the model, got others"):
        UserTable.load(tmp_path / "t", aif.Trained(wider, PARAMS, ENCODER).with_version(VERSION))


def test_a_saved_table_does_not_depend_on_the_order_of_users(tmp_path):
    one, two = ({"user": [u], "item": [3], "action": [1], "time": [1_500_000_000]} for u in (1, 2))
    for name, order in (("a", (one, two)), ("b", (two, one))):
        made = table()
        for each in order:
            made.update(each)
        made.save(tmp_path / name)
    for name in ("manifest.json", "arrays.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_string_users_and_an_empty_table_go_to_disk_and_back(tmp_path):
    rows = MemoryRows(3)
    rows.put(
        ["bé", "a"], Stored(np.ones((2, 3), np.uint32), np.array([4, 5]), np.array([0, 1], np.int32)), expected=np.full(2, NONE)
    )
    for name, each in (("full", rows), ("empty", MemoryRows(3))):
        record = {"version": "v", "encoding": "e", "storage": "int8", "batch_size": 8, "layout": []}
        write_rows(tmp_path / name, each, record, CONFIG, {})
        found = read_rows(tmp_path / name, UserTable.inspect(tmp_path / name), width=3)
        assert sorted(found.of) == sorted(each.of)
        for mine, given in zip(found.get(sorted(each.of)), each.get(sorted(each.of)), strict=True):
            np.testing.assert_array_equal(mine, given)


def test_the_repr_tells_sizes(streamed):
    assert repr(streamed).startswith("UserTable(14 users, ") and "bytes a row, storage='float32'" in repr(streamed)


def test_a_table_takes_the_encoder_of_its_model():
    other = synthetic_world(0, users=5, items=20, topics=4, categories=4, interests=2, favourites=2).dataset.encoder
    with pytest.raises(ValueError, match="encoder: expected one that makes the features of"):
        UserTable(aif.Trained(MODEL, PARAMS, other))
    with pytest.raises(EncodingMismatch):
        changed = dataclasses.replace(ENCODER, columns=dataclasses.replace(ENCODER.columns, time="when"))
        UserTable.build(aif.Trained(MODEL, PARAMS, changed).with_version(VERSION), DATA, progress=False)


def test_a_writer_counts_what_became_of_events(tmp_path):
    UserTableWriter.start(tmp_path / "w", consume(table(), MESSAGES[:3]), positions={0: 2}).close()
    with UserTableWriter.resume(tmp_path / "w", TRAINED) as writer:  # since its start
        for position, at in enumerate(MESSAGES[3:9], 3):
            assert writer.update(raw(at), position=position)
        assert not writer.update(raw(MESSAGES[8]), position=8)
        assert writer.applied.events == sum(map(len, MESSAGES[3:9])) and writer.applied.repeated == 0


# rows in a server


@pytest.fixture(scope="module")
def server(valkey_url):
    """A client of a Valkey server."""
    import redis

    with redis.Redis.from_url(valkey_url, socket_timeout=10) as client:
        yield client


def remote(client, *, prefix: str, **options) -> UserTable:
    made = table()
    width = made.row_bytes // 4
    return table(rows=RemoteRows(client, version=VERSION, width=width, prefix=prefix, **options))


def test_rows_in_a_server_are_those_in_memory(server, streamed):
    made = consume(remote(server, prefix="whole"))
    for user, (words, position, partition) in rows(streamed).items():
        found = made.rows.get([user, "nobody"])
        assert found.words[0].tobytes() == words
        assert (found.position[0], found.partition[0]) == (position, partition)
        assert found.position[1] == NONE and not found.words[1].any()
    before = made.rows.progress()
    assert before.keys() == {0} and before[0].position == UPDATES - 1 and abs(before[0].seconds - time.time()) < 60
    assert made.update(raw(MESSAGES[-1]), position=UPDATES - 1).repeated == len(MESSAGES[-1])
    assert made.rows.progress() == before  # nothing was written
    with pytest.raises(ValueError, match="expected rows in this process, got those of RemoteRows"):
        len(made)


def test_integers_and_strings_are_different_users(server):
    rows = RemoteRows(server, version="v", width=2, prefix="kinds")
    made = Stored(np.array([[1, 2], [3, 4]], np.uint32), np.array([1, 2]), np.zeros(2, np.int32))
    assert rows.put([7, "7"], made, expected=np.full(2, NONE)).all()
    assert rows.get([7, "7"]).words.tolist() == [[1, 2], [3, 4]]
    assert rows.put([], made.take(np.zeros(0, int)), expected=np.zeros(0, np.int64)).shape == (0,)
    assert rows.get([]).words.shape == (0, 2)


def test_a_row_that_moved_on_is_not_overwritten(server):
    for each in (RemoteRows(server, version="v", width=1, prefix="cas"), MemoryRows(1)):
        row = Stored(np.ones((1, 1), np.uint32), np.array([5]), np.zeros(1, np.int32))
        assert each.put(["u"], row, expected=np.array([NONE])).tolist() == [True]
        assert each.put(["u"], row._replace(position=np.array([9])), expected=np.array([NONE])).tolist() == [False]
        assert each.put(["u"], row._replace(position=np.array([6])), expected=np.array([5])).tolist() == [True]
        assert each.get(["u"]).position.tolist() == [6]
        assert isinstance(each, MemoryRows) or each.progress()[0].position == 6
    rows = RemoteRows(server, version="v", width=1, prefix="furthest")
    two = Stored(np.ones((2, 1), np.uint32), np.array([7, 9]), np.zeros(2, np.int32))
    assert rows.put(["a", "b"], two, expected=np.full(2, NONE)).all() and rows.progress()[0].position == 9
    back = Stored(np.ones((3, 1), np.uint32), np.array([12, 11, 5]), np.array([0, 0, 1], np.int32))
    assert rows.put(["c", "d", "e"], back, expected=np.full(3, NONE)).all()
    assert {each: found.position for each, found in rows.progress().items()} == {0: 12, 1: 5}
    late = Stored(np.ones((2, 1), np.uint32), np.array([20, 30]), np.zeros(2, np.int32))
    assert rows.put(["f", "a"], late, expected=np.full(2, NONE)).tolist() == [True, False]
    assert rows.progress()[0].position == 20, "the row that came too late was not written"


def test_two_writers_of_one_user_lose_and_double_nothing(server):
    """Two replicas consume the same stream: every message counts once, whoever applied it."""
    at = ARRIVAL[DATA.log.user[ARRIVAL] == 2]
    tables = [remote(server, prefix="two") for _ in range(2)]

    def consume(table: UserTable) -> None:
        for position, i in enumerate(at):
            table.update(raw([i]), position=position)

    threads = [threading.Thread(target=consume, args=(each,)) for each in tables]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memory = tables[0].memory(2)
    assert int(memory.count) == 90
    alone = table()
    alone.update(raw(at))
    np.testing.assert_array_equal(memory.recent.code, alone.memory(2).recent.code)


def test_the_time_of_rows_in_a_server_is_the_servers_and_never_falls(server, monkeypatch):
    """Neither a writer's clock nor the server's takes the time of the last row back."""
    rows, now = RemoteRows(server, version="v", width=1, prefix="clock"), time.time()

    def put(user: str, position: int) -> float:
        row = Stored(np.ones((1, 1), np.uint32), np.array([position]), np.zeros(1, np.int32))
        assert rows.put([user], row, expected=np.array([NONE])).all()
        return rows.progress()[0].seconds

    monkeypatch.setattr(time, "time", lambda: now - 3600)
    first = put("a", 5)
    assert now - 60 < first < now + 600
    server.hset(rows._progress, "0", f"5 {now + 3600}")  # as before the server's clock was set back
    assert put("b", 6) == pytest.approx(now + 3600) and rows.progress()[0].position == 6


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (2**63, ValueError, "position: expected an integer from 0 to 9223372036854775807, got 9223372036854775808"),
        (-5, ValueError, "position: expected an integer from 0 to 9223372036854775807, got -5"),
        ("3", TypeError, "position: expected an integer, got '3'"),
        (None, TypeError, "position: expected an integer, got None"),
    ],
)
def test_what_is_no_position_is_refused_by_streams_and_sinks(wrong, error, message):
    """Writers and snapshots: tests/test_writers.py."""
    made, one = table(), raw(ARRIVAL[:1])
    doors = [
        lambda: MemoryStream().begin({0: wrong}),
        lambda: ValkeyStream(types.SimpleNamespace(register_script=str), ["k"]).begin({0: wrong}),
        lambda: SinkTarget(made, positions={0: wrong}),
        *([] if wrong is None else [lambda: made.update(one, position=wrong)]),  # None: events that are not of a stream
    ]
    for door in doors:
        with pytest.raises(error, match=re.escape(message)):
            door()
    assert len(made) == 0


def test_rows_are_forgotten_in_time(server):
    rows = RemoteRows(server, version="v", width=1, prefix="old", seconds=0.05)
    rows.put(["u"], Stored(np.ones((1, 1), np.uint32), np.array([5]), np.zeros(1, np.int32)), expected=np.array([NONE]))
    assert rows.get(["u"]).position[0] == 5
    time.sleep(0.1)
    assert rows.get(["u"]).position[0] == NONE and rows.progress() == {}


@pytest.mark.parametrize("change", ["torn", "altered", "foreign", "position"])
def test_torn_and_foreign_values_are_refused(server, change):
    rows = RemoteRows(server, version="v", width=4, prefix=change)
    rows.put(["u"], Stored(np.ones((1, 4), np.uint32), np.array([5]), np.zeros(1, np.int32)), expected=np.array([NONE]))
    value = bytearray(server.get(rows.key("u")))
    value = {
        "torn": value[:-3],
        "altered": value[:-1] + b"x",
        "foreign": b"something else",
        "position": value[:8] + b"\7" + value[9:],
    }[change]
    server.set(rows.key("u"), bytes(value))
    with pytest.raises(ValueError, match=re.escape(f"{rows.key('u')}: expected a row")):
        rows.get(["u"])


@pytest.mark.parametrize(
    ("fields", "message"), [({"width": 0}, "width: expected at least 1"), ({"seconds": 0.0}, "seconds: expected None or more")]
)
def test_wrong_settings_of_remote_rows_are_named(server, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RemoteRows(server, version="v", **{"width": 1} | fields)
