"""Feature sources: the records of Valkey, the features of training, nothing lost."""

import asyncio
import contextlib
import json
import re
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax.connectors import Fetch, ValkeyFeatures, features
from aif_jax.serving import AsyncPreRanker, ServingConfig
from experiments.datasets.synthetic import synthetic_world
from tests import servers
from tests.refusals import refused, refused_later
from tests.servers import append

pytestmark = pytest.mark.lane("standing")
DATA = synthetic_world(0, users=14, items=60, topics=6, categories=5, interests=2, favourites=2, events_per_user=90).dataset
ENCODER = DATA.encoder
COLUMNS = ENCODER.columns
ARRIVAL = np.argsort(DATA.log.time, kind="stable")  # as a stream brings them
NOW = int(DATA.log.time.max()) + 100


def events_of(user: int, at=ARRIVAL) -> dict[str, list]:
    """Raw events of a user at some positions of the log."""
    log = DATA.log
    mine = at[DATA.users.raw[log.user[at] - 1] == user]
    columns = {"item": DATA.items.raw[log.item[mine] - 1], "time": log.time[mine], "action": log.action[mine]}
    return {name: values.tolist() for name, values in columns.items()}


T = 1_600_000_000


def some(*numbers: int) -> dict[str, list]:
    """Events, each known by its item."""
    return {"item": [*numbers], "time": [T + n for n in numbers], "action": [1] * len(numbers)}


@pytest.fixture
def client(valkey_url):
    with pytest.importorskip("redis").Redis.from_url(valkey_url, socket_timeout=10) as made:
        made.flushall()
        yield made


def read(url: str, users: list, **options) -> list:
    """Records of some users from the server, by one connection."""
    from redis import asyncio as redis

    async def get() -> list:
        async with redis.Redis.from_url(url, socket_timeout=10) as made:
            source = ValkeyFeatures(made, COLUMNS, **options)
            return [await source.get(user) for user in users]

    return asyncio.run(get())


def test_valkey_keeps_what_is_written(valkey_url, client):
    users = range(1, 15)
    for at in np.array_split(ARRIVAL, 9):
        for user in users:
            append(client, user, events_of(user, at), length=40)
    client.set("aif:{i:3}:profile", json.dumps({"city": "Zürich", "age": 41.5, "tags": ["a", None]}))
    client.set("aif:{s:3}:profile", '{"city": "Rom"}')
    append(client, "4", some(7, 8))
    found = read(valkey_url, [*range(1, 15), "4", "3", "nobody"], length=40)
    for user, record in zip(users, found, strict=False):
        assert record.events == {name: values[-40:] for name, values in events_of(user).items()}
    assert found[-1] is None and found[-2].events is None and found[2].attributes["city"] == "Zürich"
    assert len(found[2].events["item"]) == client.llen("aif:{i:3}:events") == 40
    assert read(valkey_url, [3], length=3)[0].events["item"] == found[2].events["item"][-3:]
    assert found[-3].events == {"item": [7, 8], "time": [T + 7, T + 8], "action": [1, 1]}


def test_another_program_writes(valkey_url, client):
    """What connectors.md says of the keys is enough."""
    name = "aif:{i:7}"
    client.set(f"{name}:profile", '{"city": "Oslo"}')
    for n in (1, 2):
        client.rpush(f"{name}:events", json.dumps({"item": n, "time": T + n, "action": n > 1, "price": 9.5}))
    (record,) = read(valkey_url, [7])
    assert record == ({"city": "Oslo"}, {"item": [1, 2], "time": [T + 1, T + 2], "action": [False, True]})


def test_writers_of_one_user_at_once_lose_nothing(valkey_url, client):
    """A reader meanwhile finds the first events of each writer, in its order."""

    def expect_whole(items: list[int]) -> None:
        for first in (0, 1000, 2000):
            mine = [item for item in items if first <= item < first + 1000]
            assert mine == [*range(first, first + len(mine))]

    def write(first: int) -> None:
        for n in range(first, first + 150):
            append(client, 5, some(n))

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(write, first) for first in (0, 1000, 2000)]
        while not all(done.done() for done in running):
            for record in read(valkey_url, [5] * 5):
                expect_whole(record.events["item"] if record is not None else [])
        for done in running:
            done.result()
    (record,) = read(valkey_url, [5])
    expect_whole(record.events["item"])
    assert len(record.events["item"]) == 450


GOOD = f'{{"item": 1, "time": {T}, "action": 1}}'


@pytest.mark.parametrize(
    ("which", "value"),
    [("profile", value) for value in ("", "{", "[1]", "null", "\\xff", "[" * 100_000, ["a list"])]
    + [("events", [GOOD, value, GOOD]) for value in (
        "", GOOD[:-1], GOOD[1:], "[]", "7", "{}", "null", f"{GOOD},{GOOD}", "[" * 100_000,
        GOOD.replace("1,", "1.5,"), GOOD.replace("1,", "true,"), GOOD.replace("1,", '"x",'), GOOD.replace("1,", "[1],"),
        GOOD.replace(str(T), f'"{T}"'), GOOD.replace(str(T), "null"), GOOD.replace("item", "sku"),
    )]
    + [("events", "a string"), ("events", [GOOD[:12], GOOD[12:]])],
)  # fmt: skip
def test_damage_names_its_key(valkey_url, client, which, value):
    append(client, 1, some(1, 2))
    client.set("aif:{i:1}:profile", '{"city": "Oslo"}')
    key = f"aif:{{i:1}}:{which}"
    client.delete(key)
    client.rpush(key, *value) if isinstance(value, list) else client.set(key, value.encode("latin-1"))
    refused(ValueError, f"{re.escape(key)}: expected", read, valkey_url, [1])


def test_a_read_takes_one_round_trip(valkey_url, client, monkeypatch):
    from redis.asyncio.connection import AbstractConnection

    append(client, 1, some(1))
    read(valkey_url, [1])
    sent, send = [], AbstractConnection.send_packed_command

    async def counted(self, command, *args, **kwargs):
        sent.append(command)
        return await send(self, command, *args, **kwargs)

    monkeypatch.setattr(AbstractConnection, "send_packed_command", counted)
    client.config_resetstat()
    read(valkey_url, [1] * 10)
    commands = {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in client.info("commandstats").items()}
    assert {name: commands[name] for name in ("multi", "get", "lrange", "exec")} == dict(multi=10, get=10, lrange=10, exec=10)
    assert sum(b"LRANGE" in b"".join(command if isinstance(command, list) else [command]) for command in sent) == 10
    assert len(sent) < 15  # the rest is of the connection's start


async def test_requests_of_one_user_share_a_read():
    """What a fetch counts of reads that fail: `test_service.py`, through the door."""

    class Source:
        reads = 0

        async def get(self, user):
            self.reads += 1
            await asyncio.sleep(0.02)

    source = Source()
    fetch = Fetch(source)
    made = await asyncio.gather(*(fetch.encode("new", ENCODER) for _ in range(5)), fetch.record("new"))
    assert source.reads == 1 and not made[0].history.mask.any() and made[-1] is None
    first, second = (asyncio.create_task(fetch.encode("gone", ENCODER)) for _ in range(2))
    await asyncio.sleep(0.005)
    first.cancel()  # a request that is over does not take the read from the other
    await second
    await refused_later(RuntimeError, "feature source: expected `async get.*, got a plain", (plain := Fetch({})).record(7))
    refused(ValueError, "record: expected Record.attributes, events", features.encoded, ENCODER, 7, {"events": {}}, 0)
    assert source.reads == 2 and fetch.values()["stages"]["read"]["count"] == 2 and plain.counters == {"failed": 1}


def test_a_read_that_hangs_is_not_shared_for_ever(monkeypatch):
    """Later calls read again; a read is cancelled with the last who waits for it, and dropped if it ends."""

    class Source:
        def __init__(self):
            self.released, self.cancelled, self.reads = asyncio.Event(), 0, 0

        async def get(self, user):
            self.reads += 1
            if self.reads > 2:
                return None
            try:
                await self.released.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                if user == "deaf":
                    await self.released.wait()
                raise
            raise ConnectionError("the old read")

    monkeypatch.setattr(features, "SHARED", 0.05)

    async def test(user) -> None:
        source = Source()
        fetch = Fetch(source)
        patient = asyncio.create_task(fetch.record(user))
        await asyncio.sleep(0.06)
        await refused_later(TimeoutError, "", asyncio.wait_for(fetch.record(user), 0.06))  # the second read hangs too
        await asyncio.sleep(0)
        assert (source.reads, source.cancelled) == (2, 1)  # the first has somebody who waits, the second has nobody
        assert await asyncio.wait_for(fetch.record(user), 10) is None and source.reads == 3
        assert (fetch.counters["overdue"], fetch.counters["abandoned"]) == (1, 1) and not patient.done()
        source.released.set()
        await refused_later(ConnectionError, "the old read", patient)
        assert await fetch.record(user) is None and source.reads == 4 and not fetch._reading.by_key

    for user in ("ann", "deaf"):
        asyncio.run(asyncio.wait_for(test(user), 20))


async def test_a_read_that_is_given_up_leaves_its_connection_sound(valkey_url, client):
    from redis import asyncio as redis

    async with redis.Redis.from_url(valkey_url) as made:
        fetch = Fetch(ValkeyFeatures(made, COLUMNS))
        await fetch.encode(1, ENCODER)
        client.client_pause(300)
        await refused_later(TimeoutError, "", asyncio.wait_for(fetch.encode(1, ENCODER), 0.05))
        await asyncio.sleep(0.4)
        await fetch.encode(1, ENCODER)
        assert dict(fetch.counters) == {"missing": 2, "abandoned": 1}


async def test_without_its_server_an_engine_answers_degraded():
    from redis import asyncio as redis

    model = aif.build(aif.presets.two_tower(DATA.schema, width=4, short_length=8, towers=(4,)))
    trained = aif.Trained(model, model.init(jax.random.key(0), DATA.catalogue), ENCODER)
    ids = DATA.items.raw
    rows = DATA.catalogue.features(np.arange(1, len(ids) + 1))
    index = aif.ItemIndex.build(trained, [(ids, rows)], batch_size=64, progress=False)
    with contextlib.ExitStack() as server:
        url = server.enter_context(servers.valkey())
        made = redis.Redis.from_url(url, socket_timeout=1)
        with pytest.importorskip("redis").Redis.from_url(url) as writer:
            append(writer, 1, events_of(1))
        encoder = ENCODER.with_length(model.config.history_length)
        fetch, config = Fetch(ValkeyFeatures(made, COLUMNS)), ServingConfig(buckets=(8,), max_k=4)

        async def read(request):
            return await fetch.encode(request.user, encoder, NOW)

        async with AsyncPreRanker(trained, index, features=read, retrieval=lambda request: ids[:4], config=config) as engine:
            live = await engine.rank(1, 4)
            server.close()
            known, other = [await engine.rank(user, 4) for user in (1, 2)]
        await made.aclose()
    assert not live.degraded and known.degraded and other.degraded
    assert "stale state" in known.reason and known.ids.tolist() == live.ids.tolist()
    assert "unknown user" in other.reason and other.mask.all() and fetch.counters["failed"] == 2
