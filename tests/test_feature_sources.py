"""Feature sources: the same records from memory, Valkey and Parquet, the features of training, nothing lost or doubled."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aif_jax.connectors import EventLayout, Fetch, MemoryFeatures, ParquetFeatures, ValkeyFeatures, ValkeyFeatureWriter
from aif_jax.connectors.valkey import keys_of
from aif_jax.serving import Request
from experiments.datasets.synthetic import synthetic_world

WORLD = synthetic_world(0, users=14, items=60, topics=6, categories=5, interests=2, favourites=2, events_per_user=90)
LOG = WORLD.dataset.log
TIES = np.lexsort((LOG.action, LOG.item, LOG.time, LOG.user))  # as files are read: those of one moment by item and action
DATA = dataclasses.replace(
    WORLD.dataset, log=dataclasses.replace(LOG, **{name: getattr(LOG, name)[TIES] for name in ("item", "action", "time")})
)
ENCODER = DATA.encoder
ARRIVAL = np.argsort(DATA.log.time, kind="stable")  # as a stream brings them
LAYOUT = EventLayout.of(ENCODER)
TEXT = EventLayout(action="event", item_bytes=12, action_bytes=5)
NOW = int(DATA.log.time.max()) + 100


def raw(at) -> dict[str, np.ndarray]:
    """Raw events at some positions of the log."""
    log = DATA.log
    names = {"user": DATA.users.raw[log.user[at] - 1], "item": DATA.items.raw[log.item[at] - 1]}
    return names | {"action": log.action[at], "time": log.time[at]}


T = 1_600_000_000


@pytest.fixture
def client(valkey_url):
    redis = pytest.importorskip("redis")
    with redis.Redis.from_url(valkey_url, socket_timeout=10) as made:
        made.flushall()
        yield made


def read(url: str, users: list, layout: EventLayout = LAYOUT, **options) -> list:
    """Records of some users from the server, by one connection."""
    from redis import asyncio as redis

    async def get() -> list:
        async with redis.Redis.from_url(url, **{"socket_timeout": 10} | options.pop("client", {})) as made:
            source = ValkeyFeatures(made, layout, **options)
            return [await source.get(user) for user in users]

    return asyncio.run(get())


def same(a, b) -> bool:
    plain = [
        None if r is None else (r.attributes, {k: np.asarray(v).tolist() for k, v in (r.events or {}).items()}) for r in (a, b)
    ]
    return plain[0] == plain[1]


def test_the_layout_is_that_of_the_encoder():
    assert (LAYOUT.item, LAYOUT.action, LAYOUT.item_bytes, LAYOUT.action_bytes, LAYOUT.nbytes) == ("item", "action", 0, 0, 28)
    packed = LAYOUT.pack(raw(ARRIVAL))
    columns = LAYOUT.columns_of(LAYOUT.checked(packed.tobytes(), "events"))
    for name, values in raw(ARRIVAL).items():
        if name != "user":
            np.testing.assert_array_equal(columns[name], values)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=4), st.integers(0, 4 * 10**9), st.sampled_from(["buy", "é", ""])), max_size=5))
def test_text_is_packed_and_read_back(events):
    item, time_, action = (list(column) for column in zip(*events, strict=True)) if events else ([], [], [])
    given_ = {"item": item, "time": np.asarray(time_, np.int64), "event": action}
    if any(len(text.encode("utf8", "replace")) > 12 or text.endswith("\0") for text in item):
        assume(False)
    packed = TEXT.pack(given_)
    columns = TEXT.columns_of(TEXT.checked(packed.tobytes(), "events"))
    assert columns["item"] == item and columns["event"] == action and columns["time"].tolist() == time_


def test_every_flipped_bit_is_noticed():
    data = TEXT.pack({"item": ["tea", "cup"], "time": [T, T + 1], "event": ["buy", "view"]}).tobytes()
    for place in range(8 * len(data)):
        wrong = bytearray(data)
        wrong[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError, match=r"events: expected events with their checksums, got 1 altered"):
            TEXT.checked(bytes(wrong), "events")
    with pytest.raises(ValueError, match="expected whole events of 32 bytes, got 63 bytes"):
        TEXT.checked(data[:-1], "events")


def test_memory_and_valkey_keep_the_same(valkey_url, client):
    sinks = MemoryFeatures(LAYOUT, length=40), ValkeyFeatureWriter(client, LAYOUT, length=40)
    for sink in sinks:
        assert sum(sink.update(raw(at), position=n) for n, at in enumerate(np.array_split(ARRIVAL, 9))) == len(ARRIVAL)
        sink.put_user(3, {"city": "Zürich", "age": 41.5, "tags": ["a", None]})
        sink.put_user("3", {"city": "Rom"})
    users = [*range(1, 15), "3", "nobody"]
    found = read(valkey_url, users, length=40)
    for user, record in zip(users, found, strict=True):
        assert same(record, asyncio.run(sinks[0].get(user))), user
    assert found[-1] is None and found[-2].events is None and found[2].attributes["city"] == "Zürich"
    assert len(found[2].events["item"]) == 40 and found[2].version == 90


def test_features_from_every_source_are_those_of_training(valkey_url, client, tmp_path):
    """Held-out positions, encoded from what the stores deliver."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    memory, writer = MemoryFeatures(LAYOUT), ValkeyFeatureWriter(client, LAYOUT)
    for sink in (memory, writer):
        sink.update(raw(ARRIVAL))
    parquet.write_table(pyarrow.table(raw(np.random.default_rng(0).permutation(ARRIVAL))), tmp_path / "events.parquet")
    files = ParquetFeatures(tmp_path / "events.parquet", columns=ENCODER.columns)
    assert len(files) == 14
    encoder = ENCODER.with_length(50)
    positions = np.array([DATA.log.offsets[user] + 70 for user in range(1, 15)])
    expected = DATA.user_features(positions, length=50)
    for place, position in enumerate(positions):
        user, now = int(DATA.log.user[position]), int(DATA.log.time[position])
        (stored,) = read(valkey_url, [user])

        class Stored:
            async def get(self, user, record=stored):
                return record

        for source in (memory, files, Stored()):
            fetch = Fetch(source, encoder, now=lambda request, now=now: now, past_only=True)
            got = asyncio.run(fetch(Request(user=user)))
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
                np.testing.assert_array_equal(a, b[place])


def test_what_came_before_is_skipped_user_by_user(client):
    for sink in (MemoryFeatures(LAYOUT), ValkeyFeatureWriter(client, LAYOUT)):
        one, two = ({"user": [u], "item": [3], "action": [1], "time": [T]} for u in (1, 2))
        both = {name: one[name] + two[name] for name in one}
        assert sink.update(one, position=2**62 + 5) == 1
        assert sink.update(both, position=2**62 + 5) == 1
        assert sink.update(both, position=2**62 + 4) == 0
        assert sink.update(both, position=2**62 + 6) == 2
        assert sink.update(both) == 2
        with pytest.raises(ValueError, match="expected events of user 1 by partition 0, as before, got partition 3"):
            sink.update(one, position=2**62 + 9, partition=3)


def test_messages_that_come_together_keep_their_positions(client):
    """Events of a user that the store has are left out, those of later messages are appended."""
    layout = EventLayout()
    raw = {"user": [1, 2, 1, 1], "item": [10, 20, 11, 12], "time": [T, T, T, T]}
    for sink in (MemoryFeatures(layout), ValkeyFeatureWriter(client, layout, prefix="together")):
        assert sink.update({"user": [1], "item": [10], "time": [T]}, position=4) == 1
        assert sink.update(raw, position=np.array([4, 5, 5, 7])) == 3
        assert sink.update(raw, position=np.array([4, 5, 5, 7])) == 0
        assert sink.update({"user": [1], "item": [13], "time": [T]}, position=8) == 1
        with pytest.raises(ValueError, match="position: expected positions of events in the order of the stream"):
            sink.update(raw, position=np.array([9, 9, 9, 8]))


def test_events_are_trimmed_to_the_length(valkey_url, client):
    writer = ValkeyFeatureWriter(client, LAYOUT, length=16)
    for n in range(100):
        writer.update({"user": [1], "item": [n], "action": [1], "time": [T + n]})
        assert client.strlen(keys_of("aif", 1)[1]) <= 64 + 18 * LAYOUT.nbytes
    writer.update({"user": [2] * 50, "item": range(50), "action": [1] * 50, "time": [T] * 50})
    one, two = read(valkey_url, [1, 2], length=16)
    assert one.events["item"].tolist() == list(range(84, 100)) and one.version == 100
    assert two.events["item"].tolist() == list(range(34, 50)) and two.version == 50


def test_two_writers_of_one_user_lose_and_double_nothing(valkey_url, client):
    """Two replicas consume the same stream at once."""
    writers = [ValkeyFeatureWriter(client, LAYOUT) for _ in range(2)]

    def consume(writer: ValkeyFeatureWriter) -> int:
        message = {"user": [5], "item": [0], "action": [1], "time": [T]}
        return sum(writer.update(message | {"item": [n], "time": [T + n]}, position=n) for n in range(200))

    with ThreadPoolExecutor(2) as pool:
        new = list(pool.map(consume, writers))
    (record,) = read(valkey_url, [5])
    assert record.events["item"].tolist() == list(range(200)) and sum(new) == 200


@pytest.mark.parametrize("change", ["torn", "altered", "foreign", "another layout", "attributes", "short"])
def test_torn_and_foreign_values_are_refused(valkey_url, client, change):
    writer = ValkeyFeatureWriter(client, LAYOUT)
    writer.update({"user": [1, 1], "item": [1, 2], "action": [1, 1], "time": [T, T]})
    writer.put_user(1, {"city": "Oslo"})
    attributes, events = keys_of("aif", 1)
    value = client.get(events)
    layout = EventLayout(action="action", action_bytes=8) if change == "another layout" else LAYOUT
    changed = {"torn": value[:-3], "altered": value[:-1] + b"x", "foreign": b"something else", "short": value[:20]}
    if change in changed:
        client.set(events, changed[change])
    if change == "attributes":
        client.set(attributes, client.get(attributes)[:-1] + b"x")
    key = attributes if change == "attributes" else events
    with pytest.raises(ValueError, match=f"{key.replace('{', '.').replace('}', '.')}: expected"):
        read(valkey_url, [1], layout)
    if change not in ("altered", "attributes"):  # appending reads no old event
        with pytest.raises(ValueError, match="expected"):
            ValkeyFeatureWriter(client, layout).update(
                {"user": [1], "item": [1], "action": ["b"] if layout != LAYOUT else [1], "time": [T]}
            )


def test_users_are_forgotten_in_time(valkey_url, client):
    writer = ValkeyFeatureWriter(client, LAYOUT, seconds=0.05)
    writer.update({"user": [1], "item": [1], "action": [1], "time": [T]})
    writer.put_user(1, {})
    assert read(valkey_url, [1])[0].version == 1
    time.sleep(0.1)
    assert read(valkey_url, [1]) == [None]


def test_a_read_takes_one_round_trip(valkey_url, client):
    writer = ValkeyFeatureWriter(client, LAYOUT)
    writer.update({"user": [1], "item": [1], "action": [1], "time": [T]})
    client.config_resetstat()
    read(valkey_url, [1] * 10)
    commands = {name: stat["calls"] for name, stat in client.info("commandstats").items()}
    assert commands["cmdstat_mget"] == 10 and not {"cmdstat_get", "cmdstat_getrange", "cmdstat_exec"} & commands.keys()


async def test_a_fetch_counts_what_happened_and_shares_reads():
    class Source:
        reads = 0

        async def get(self, user):
            self.reads += 1
            await asyncio.sleep(0.02)
            if user == "slow":
                await asyncio.sleep(5)
            if user == "torn":
                raise ValueError("torn")
            if user == "down":
                raise ConnectionError("down")
            return None if user == "new" else await MemoryFeatures(LAYOUT).get(user)

    source = Source()
    fetch = Fetch(source, ENCODER, timeout=0.1, now=lambda request: NOW)
    made = await asyncio.gather(*(fetch(Request(user="new")) for _ in range(5)), fetch.record("new"))
    assert source.reads == 1 and not made[0].history.mask.any() and made[-1] is None
    for user, error in (("slow", TimeoutError), ("torn", ValueError), ("down", ConnectionError)):
        with pytest.raises(error):
            await fetch(Request(user=user))
    assert dict(fetch.counters) == {"missing": 1, "timeouts": 1, "damaged": 1, "failed": 1}
    first = asyncio.create_task(fetch(Request(user="gone")))
    second = asyncio.create_task(fetch(Request(user="gone")))
    await asyncio.sleep(0.005)
    first.cancel()  # a request that is over does not take the read from the other
    await second
    assert source.reads == 5 and fetch.values()["stages"]["read"]["count"] == 2


def test_a_timeout_of_the_source_itself_keeps_its_text():
    class Source:
        async def get(self, user):
            raise TimeoutError("the server did not answer")

    fetch = Fetch(Source(), ENCODER, timeout=30, now=lambda request: NOW)
    with pytest.raises(TimeoutError, match="the server did not answer"):
        asyncio.run(fetch(Request(user="ann")))
    assert dict(fetch.counters) == {"timeouts": 1}


def test_a_read_that_hangs_is_not_shared_for_ever():
    """Later calls read again; a read is cancelled with the last who waits for it, and dropped if it ends."""

    class Source:
        def __init__(self):
            self.released, self.cancelled, self.reads = asyncio.Event(), 0, 0

        async def get(self, user):
            self.reads += 1
            if self.reads > 2:
                return await MemoryFeatures(LAYOUT).get(user)
            try:
                await self.released.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                if user == "deaf":
                    await self.released.wait()
                raise
            raise ConnectionError("the old read")

    async def test(user) -> None:
        source = Source()
        fetch = Fetch(source, ENCODER, share=0.05, now=lambda request: NOW)
        patient = asyncio.create_task(fetch.record(user))
        await asyncio.sleep(0.06)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(fetch.record(user), 0.06)  # the second read hangs too
        await asyncio.sleep(0)
        assert (source.reads, source.cancelled) == (2, 1)  # the first has somebody who waits, the second has nobody
        assert await asyncio.wait_for(fetch.record(user), 10) is None and source.reads == 3
        assert (fetch.counters["overdue"], fetch.counters["abandoned"]) == (1, 1) and not patient.done()
        source.released.set()
        with pytest.raises(ConnectionError, match="the old read"):
            await patient
        assert await fetch.record(user) is None and source.reads == 4 and not fetch._reading

    for user in ("ann", "deaf"):
        asyncio.run(asyncio.wait_for(test(user), 20))


async def test_a_server_that_does_not_answer_is_a_timeout(valkey_url, client):
    from redis import asyncio as redis

    async with redis.Redis.from_url(valkey_url) as made:
        fetch = Fetch(ValkeyFeatures(made, LAYOUT), ENCODER, timeout=0.05, now=lambda request: NOW)
        await fetch(Request(user=1))
        client.client_pause(300)
        with pytest.raises(TimeoutError, match="no answer of the source within 0.05 s"):
            await fetch(Request(user=1))
        await asyncio.sleep(0.4)
        await fetch(Request(user=1))  # the connection is sound again
        assert dict(fetch.counters) == {"missing": 2, "timeouts": 1}


def test_parquet_files_that_do_not_fit_are_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    with pytest.raises(FileNotFoundError, match="expected a Parquet file or folder"):
        ParquetFeatures(tmp_path / "none", columns=ENCODER.columns)
    parquet.write_table(pyarrow.table({"user": [1], "item": [1]}), tmp_path / "events.parquet")
    with pytest.raises(ValueError, match="none of \\['time', 'action'\\]"):
        ParquetFeatures(tmp_path / "events.parquet", columns=ENCODER.columns)
