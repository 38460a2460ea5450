"""Update streams: what a stream says is in the index and the feature store exactly once, whatever is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aif_jax as aif
from aif_jax import checkpoint, cli
from aif_jax.connectors import (
    EventLayout,
    Follower,
    IndexTarget,
    KafkaStream,
    MemoryFeatures,
    MemoryStream,
    MessageError,
    SinkTarget,
    SnapshotStore,
    StreamError,
    ValkeyFeatureWriter,
    ValkeyStream,
    decode,
    encode,
    encode_deleted,
    tombstone_key,
)
from aif_jax.connectors.streams import Message
from aif_jax.connectors.valkey import id_of, position_of
from aif_jax.index import IndexWriter, ItemIndex
from aif_jax.store.snapshots import snapshots
from tests import demo, servers
from tests.beside import meanwhile
from tests.conftest import child_environment
from tests.killed import Life
from tests.reliability.sizes import FULL
from tests.stream_world import NAMES, PARAMS, PARTITIONS, T, encoder, first_index, items, model, open_stream, prices, work

pytestmark = pytest.mark.usefixtures("light_compilation")
ENCODER, MODEL = encoder(), model()
KINDS = ["memory", "valkey", "kafka"]


class Broker:
    """A stream of some kind: writers `send`, any number of followers `open`."""

    def __init__(self, kind: str, address: str, name: str):
        self.kind, self.address, self.name = kind, address, name
        self._memory = MemoryStream(partitions=PARTITIONS)
        if kind == "valkey":
            import redis

            self.client = redis.Redis.from_url(address)
        if kind == "kafka":
            import confluent_kafka
            from confluent_kafka.admin import AdminClient, NewTopic

            admin = AdminClient({"bootstrap.servers": address})
            topics = [NewTopic(name, PARTITIONS, 1), NewTopic(f"{name}.rejected", 1, 1)]
            for done in admin.create_topics(topics).values():
                done.result(20)
            self.producer = confluent_kafka.Producer({"bootstrap.servers": address, "transactional.id": name})
            self.producer.init_transactions(20)

    @property
    def keys(self) -> list[str]:
        return [f"{self.name}:{partition}" for partition in range(PARTITIONS)]

    @property
    def url(self) -> str:
        return f"{self.address}/{','.join(self.keys)}" if self.kind == "valkey" else f"kafka://{self.address}/{self.name}"

    def open(self, **options):
        """A stream to follow."""
        if self.kind == "memory":
            return self._memory
        return open_stream(self.kind, self.address, self.name, **options)

    def send(self, value: bytes | None, *, key: bytes | None = None, partition: int = 0) -> None:
        if self.kind == "memory":
            self._memory.send(value, key=key, partition=partition, gap=1)
        elif self.kind == "valkey":
            ValkeyStream(self.client, self.keys).send(value, key=key, partition=partition)
        else:  # a transaction for each: the offsets have gaps
            self.producer.begin_transaction()
            self.producer.produce(self.name, value, key, partition=partition)
            self.producer.commit_transaction(20)

    def rejected(self) -> list[bytes | None]:
        """Values of rejected messages."""
        if self.kind == "memory":
            return [message.value for message, _ in self._memory.rejected]
        if self.kind == "valkey":
            return [fields.get(b"value") for key in self.keys for _, fields in self.client.xrange(f"{key}.rejected")]
        stream = KafkaStream(self.address, f"{self.name}.rejected", rejected="none")
        stream.begin({})
        found, until = [], time.monotonic() + 3
        while time.monotonic() < until and not found:
            found += [message.value for message in stream.poll(0.2, 100)]
        stream.close()
        return found


@pytest.fixture(params=KINDS)
def broker(request, tmp_path):
    fixture = {"memory": None, "valkey": "valkey_url", "kafka": "kafka_address"}[request.param]
    address = request.getfixturevalue(fixture) if fixture else ""
    return Broker(request.param, address, "".join(c if c.isalnum() else "-" for c in tmp_path.name))


def drain(follower: Follower, *, until: int, seconds: float = 60) -> None:
    """Steps until so many messages were polled."""
    end = time.monotonic() + seconds
    while follower.counters["messages"] < until:
        follower.step(0.05)
        assert time.monotonic() < end, follower.counters


def test_an_index_follows(broker, tmp_path):
    """Changes, deletions, tombstones and poison, by two partitions; resumed from a snapshot."""
    broker.send(encode(items({"i1": 5.0, "i2": 6.0})))
    broker.send(encode(items({"i3": 7.0})), partition=1)
    broker.send(b"poison")
    broker.send(encode_deleted(["i2", "i9"]))
    broker.send(encode(items({"i1": 8.0})), key=tombstone_key("i1"))
    broker.send(encode({"item": ["i4"], "category": ["a"]}))  # no price
    broker.send(None, key=tombstone_key("i3"), partition=1)
    broker.send(None, key=b"{")
    writer = IndexWriter.start(tmp_path / "w", first_index(), every_updates=100)
    seen = []
    stream = broker.open()
    follower = Follower(stream, IndexTarget(writer), changed=lambda: seen.append(prices(writer.index)))
    drain(follower, until=8)
    assert prices(writer.index) == {"i0": 1.0, "i1": 8.0} == seen[-1]
    assert (follower.counters["rejected"], follower.counters["applied"], follower.counters["repeated"]) == (3, 5, 0)
    values = broker.rejected()
    assert values[0] == b"poison" and len(values) == 3
    metrics = follower.metrics()
    assert metrics["counters"]["stream_messages"] == 8 and metrics["gauges"]["stream_age_seconds"] < 60
    writer.close()
    stream.close()

    broker.send(encode(items({"i5": 2.0})), partition=1)
    resumed = IndexWriter.resume(tmp_path / "w", aif.Trained(MODEL, PARAMS, ENCODER))
    again = Follower(broker.open(), IndexTarget(resumed))
    drain(again, until=1)
    assert prices(resumed.index) == {"i0": 1.0, "i1": 8.0, "i5": 2.0}
    assert again.counters["messages"] == again.counters["applied"] == 1
    assert again.metrics()["gauges"]["stream_lag"] <= PARTITIONS  # Kafka: the end of a transaction is an offset too
    resumed.close()
    again.stream.close()


def test_what_was_not_saved_comes_again(broker, tmp_path):
    for number in range(6):
        broker.send(encode(items({f"i{number}": float(number)})), partition=number % 2)
    writer = IndexWriter.start(tmp_path / "w", first_index(), every_updates=100)
    drain(Follower(broker.open(), IndexTarget(writer), max_batch=2), until=6)
    writer._lease.release()  # as after a kill: nothing of this was saved
    assert writer.saved_positions == {}
    resumed = IndexWriter.resume(tmp_path / "w", aif.Trained(MODEL, PARAMS, ENCODER))
    again = Follower(broker.open(), IndexTarget(resumed))
    drain(again, until=6)
    assert prices(resumed.index) == prices(writer.index) == {f"i{n}": float(n) for n in range(6)}
    resumed.close()


def test_a_feature_store_follows_and_doubles_nothing(broker, valkey_url):
    """The same messages by two followers, of which one comes late: each event is in the store once."""
    import redis

    layout = EventLayout()
    with redis.Redis.from_url(valkey_url) as client:
        remote = ValkeyFeatureWriter(client, layout, prefix=broker.name)
        for number in range(20):
            event = {"user": [number % 3], "item": [number], "time": [T + number]}
            broker.send(encode(event), partition=number % 3 % 2)
        for sink in (remote, MemoryFeatures(layout)):
            followers = [Follower(broker.open(), SinkTarget(sink), max_batch=n) for n in (7, 3)]
            if broker.kind == "memory":  # both read one list
                drain(followers[0], until=20)
                followers[0].stream.begin({})
            for follower in followers[broker.kind == "memory" :]:
                drain(follower, until=20)
            fresh = {"user": [0], "item": [0], "time": [T]}
            assert sink.update(fresh, position=0, partition=0) == 0
            if sink is remote:
                counts = [int(client.getrange(f"{broker.name}:{{i:{user}}}:e", 12, 31)) for user in range(3)]
                assert counts == [7, 7, 6]


def test_partitions_move_within_a_group(kafka_address, tmp_path):
    """Two consumers share the partitions, one leaves in the middle and the other takes all: each event is in once."""
    broker, layout = Broker("kafka", kafka_address, "moves-" + tmp_path.name.replace("_", "-")), EventLayout()
    sink = MemoryFeatures(layout)  # what the consumers share

    def send(numbers: range) -> None:
        for number in numbers:
            broker.send(encode({"user": [number % 4], "item": [number], "time": [T]}), partition=number % 2)

    def step_until(followers: list[Follower], ready) -> None:
        until = time.monotonic() + 60
        while not ready():
            for follower in followers:
                follower.step(0.02)
            assert time.monotonic() < until, [follower.counters for follower in followers]

    def events() -> int:
        return sum(len(asyncio.run(sink.get(user)).events["item"]) for user in range(4) if user in sink._events)

    options = {"heartbeat.interval.ms": 100, "session.timeout.ms": 6000}
    streams = [KafkaStream(kafka_address, broker.name, group="g", options=options) for _ in range(2)]
    followers = [Follower(stream, SinkTarget(sink), max_batch=3) for stream in streams]
    step_until(followers, lambda: [len(stream.lag()) for stream in streams] == [1, 1])
    send(range(8))
    step_until(followers, lambda: events() == 8)
    assert [follower.counters["applied"] for follower in followers] == [4, 4]
    send(range(8, 16))
    followers[0].step(0.5)  # some of these, which the other one does not get again
    streams[0].close()
    send(range(16, 24))
    step_until(followers[1:], lambda: events() == 24)
    assert len(streams[1].lag()) == 2 and streams[1].rebalances >= 2
    assert [asyncio.run(sink.get(user)).events["item"].tolist() for user in range(4)] == [[*range(u, 24, 4)] for u in range(4)]
    assert followers[0].counters["applied"] > 4 and sum(follower.counters["applied"] for follower in followers) == 24
    streams[1].close()


def test_metrics_are_read_while_the_follower_runs():
    follower = Follower(MemoryStream(), SinkTarget(MemoryFeatures(EventLayout())))
    with meanwhile(follower.metrics, switch=1e-5):
        for number in range(20_000):  # as `step` does for new partitions
            follower.counters[f"new {number % 500}"] += 1
            follower._age[number % 500] = 0.0
            if number % 500 == 499:
                follower._age.clear()
                follower.counters.clear()


def test_a_group_never_commits_back():
    """Another consumer had partition 1 for a while and went further than this one, which still has its old position."""
    from confluent_kafka import TopicPartition

    class Consumer:
        offsets, commits = {0: 5, 1: 5}, []

        def committed(self, places, seconds):
            return [TopicPartition("t", place.partition, self.offsets[place.partition]) for place in places]

        def assign(self, places):
            pass

        def commit(self, *, offsets, asynchronous):
            self.commits.append({place.partition: place.offset for place in offsets})

    stream, consumer = KafkaStream("127.0.0.1:1", "t", group="g"), Consumer()
    stream.close()
    stream._consumer = consumer
    places = [TopicPartition("t", 0), TopicPartition("t", 1)]
    stream._assigned(consumer, places)
    stream.commit({0: 6, 1: 7})
    stream._revoked(consumer, places[1:])
    stream.commit({0: 9, 1: 7})
    consumer.offsets = {0: 10, 1: 100}
    stream._assigned(consumer, places)
    stream.commit({0: 9, 1: 7})
    stream.commit({0: 12, 1: 7})
    stream.commit({0: 12, 1: 120})
    assert consumer.commits == [{0: 7, 1: 8}, {0: 10}, {0: 13}, {1: 121}]


@pytest.mark.reliability
@pytest.mark.timeout(300)
def test_replicas_of_a_group_share_the_partitions(kafka_address, valkey_url, tmp_path):
    """A second consumer joins, the first one leaves in the middle: rebalances lose and double nothing."""
    import redis

    broker = Broker("kafka", kafka_address, "group-" + tmp_path.name.replace("_", "-"))
    quick = {"session.timeout.ms": 6000, "max.poll.interval.ms": 6000}
    stop, joined, failures = [threading.Event(), threading.Event()], threading.Event(), []

    def follow(number: int) -> None:
        with redis.Redis.from_url(valkey_url) as client:
            sink = ValkeyFeatureWriter(client, EventLayout(), prefix=broker.name)
            stream = KafkaStream(kafka_address, broker.name, group="g", options=quick)
            follower = Follower(stream, SinkTarget(sink), max_batch=5, changed=joined.set if number else None)
            try:
                follower.run(lambda: stop[number].is_set() or (joined.set() if number and stream.rebalances else False))
                assert stream.rebalances >= 1
            except Exception as error:
                failures.append(error)
            finally:
                stream.close()

    def wait(ready) -> None:
        until = time.monotonic() + 30
        while not ready() and time.monotonic() < until and not failures:
            time.sleep(0.02)
        assert failures == [] and ready()

    def counts(client) -> list[int]:
        return [int(client.getrange(f"{broker.name}:{{i:{user}}}:e", 12, 31) or 0) for user in range(4)]

    threads = [threading.Thread(target=follow, args=(number,), daemon=True) for number in range(2)]
    with redis.Redis.from_url(valkey_url) as client:
        threads[0].start()
        for number in range(120):
            broker.send(encode({"user": [number % 4], "item": [number], "time": [T]}), partition=number % 2)
            if number == 39:
                wait(lambda: sum(counts(client)) == 40)
                threads[1].start()
            if number == 79:
                wait(lambda: joined.is_set() and sum(counts(client)) == 80)
                stop[0].set()
        wait(lambda: sum(counts(client)) == 120)
        time.sleep(0.2)
        assert failures == []
        assert counts(client) == [30] * 4
    for event, thread in zip(stop, threads, strict=True):
        event.set()
        thread.join(30)


@pytest.fixture
def following(tmp_path):
    """Starts a stream in memory, a writer in `w` with options, and what follows the stream, with further options."""
    with contextlib.ExitStack() as stack:

        def start(written: dict[str, Any], **options: Any) -> tuple[MemoryStream, IndexWriter, Follower]:
            stream, writer = MemoryStream(), IndexWriter.start(tmp_path / "w", first_index(), **written)
            stack.callback(writer.close)
            return stream, writer, Follower(stream, IndexTarget(writer), **options)

        yield start


def test_snapshots_are_published(following, tmp_path):
    store = SnapshotStore(tmp_path / "store")
    stream, writer, follower = following({"every_updates": 1}, max_batch=1, store=store)
    for number in range(4):
        stream.send(encode(items({f"i{number}": float(number)})))
        follower.step()
        fetched = store.fetch(tmp_path / "out")
        index = ItemIndex.load(fetched, aif.Trained(MODEL, PARAMS, ENCODER))
        assert prices(index) == prices(writer.index) and aif.index.inspect(fetched).positions == {0: number}
    assert follower.counters["published"] == 4 and stream.committed == {0: 3}


def test_a_stream_that_pauses_is_saved_by_time(following, tmp_path):
    clock = [0.0]
    stream, _, follower = following({"every_updates": None, "every_seconds": 5, "clock": lambda: clock[0]})
    stream.send(encode(items({"i1": 2.0})))
    follower.step()
    assert stream.committed == {} and len(snapshots(tmp_path / "w")) == 1
    clock[0] = 6.0
    follower.step()
    follower.step()
    assert stream.committed == {0: 0} and len(snapshots(tmp_path / "w")) == 2


def test_a_save_that_fails_stops_nothing(following, monkeypatch):
    stream, writer, follower = following({"every_updates": 1})
    monkeypatch.setattr(ItemIndex, "save", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    stream.send(encode(items({"i1": 2.0})))
    follower.step()
    assert prices(writer.index)["i1"] == 2.0 and follower.counters["failed_saves"] == 1 and stream.committed == {}
    monkeypatch.undo()
    stream.send(encode(items({"i1": 3.0})))
    follower.step()
    assert stream.committed == {0: 1}


def test_a_message_that_cannot_be_rejected_is_not_passed(following, monkeypatch):
    stream, writer, follower = following({})
    monkeypatch.setattr(stream, "reject", lambda *a: (_ for _ in ()).throw(OSError("broker gone")))
    stream.send(b"poison")
    with pytest.raises(OSError, match="broker gone"):
        follower.step()
    assert writer.positions == {}


def test_a_stream_of_another_kind_stops_the_follower(following):
    stream, _, follower = following({}, max_rejected=10)
    stream.send_many([encode({"sku": ["a"]})] * 12)
    message = "expected messages of this model, got 10 in a row that do not fit; ValueError.*'item'"
    with pytest.raises(StreamError, match=message):
        follower.step()


def test_messages_that_are_gone_are_noticed(valkey_url, kafka_address, tmp_path):
    import redis

    with redis.Redis.from_url(valkey_url) as client:
        stream = ValkeyStream(client, ["gone"])
        places = [*(stream.send(b"x") for _ in range(4)), *stream.send_many([b"x"] * 6)]
        for at in (places[2], places[-1]):
            ValkeyStream(client, ["gone"]).begin({0: at})
        client.xtrim("gone", maxlen=3, approximate=False)
        ValkeyStream(client, ["gone"]).begin({0: places[-1]})
        ValkeyStream(client, ["gone"]).begin({0: places[7]})
        with pytest.raises(StreamError, match="stream 'gone': messages after .* are gone"):
            ValkeyStream(client, ["gone"]).begin({0: places[2]})
        with pytest.raises(StreamError):
            ValkeyStream(client, ["never"]).begin({0: places[2]})
    name = "gone-" + tmp_path.name.replace("_", "-")
    Broker("kafka", kafka_address, name).send(b"x")
    for position in (50, 1000):
        with contextlib.closing(KafkaStream(kafka_address, name)) as stream:
            with pytest.raises(StreamError, match=f"expected messages after {position}, it has 0 to"):
                stream.begin({0: position})
    with contextlib.closing(KafkaStream(kafka_address, name)) as stream:
        with pytest.raises(StreamError, match="got no \\[7\\]"):
            stream.begin({7: 0})


def test_positions_of_ids_rise_and_fit():
    ids = ["0-1", "5-0", "5-1", "6-0", "1795726653252-0", "1795726653252-2097151", "4102444800000-0"]
    places = [position_of(entry) for entry in ids]
    assert places == sorted(set(places)) and max(places) < 2**63 and [id_of(place) for place in places] == ids
    with pytest.raises(ValueError, match="fewer than 2097152 entries in a millisecond"):
        position_of("5-2097152")


def test_every_damaged_message_is_refused_or_the_same():
    value = encode(items({"i1": 5.0, "i2": 6.0}))
    whole = decode(Message(0, 0, None, value)).table
    refused, rng = 0, np.random.default_rng(0)
    for _ in range(400):
        wrong = bytearray(value)
        wrong[rng.integers(len(wrong))] ^= 1 << rng.integers(8)
        try:
            table = decode(Message(0, 0, None, bytes(wrong[: rng.integers(1, 2 * len(wrong))]))).table
            assert table is None or table.num_rows >= 0
        except MessageError:
            refused += 1
    assert refused > 100 and whole.num_rows == 2


@pytest.mark.parametrize("key", [None, b"", b"{", b"null", b"true", b"1.5", b"[1]"])
def test_a_tombstone_names_an_item(key):
    with pytest.raises(
        MessageError, match="message 3 of partition 1: expected a value, or a key that is the JSON of an item's id"
    ):
        decode(Message(1, 3, key, None))
    assert decode(Message(1, 3, tombstone_key(7), None)).deleted == [7]


# kills


@pytest.mark.parametrize("kind", ["valkey", "kafka"])
def test_kills_of_a_follower_lose_and_double_nothing(kind, valkey_url, request, tmp_path):
    kill_followers(kind, valkey_url, request, tmp_path, kills=3)


@pytest.mark.reliability
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["valkey", "kafka"])
def test_many_kills_of_a_follower_lose_and_double_nothing(kind, valkey_url, request, tmp_path):
    kill_followers(kind, valkey_url, request, tmp_path, kills=FULL.follower_kills)


def kill_followers(kind, valkey_url, request, folder: Path, *, kills: int, updates: int = 60) -> None:
    """Followers that are killed at work, each after the other; whenever all is in, a new stream and directory begin."""
    chance, done, number = random.Random(0), 0, 0
    address = valkey_url if kind == "valkey" else request.getfixturevalue("kafka_address")
    while done < kills:
        number += 1
        name, root = f"{folder.name.replace('_', '-')}-{number}", folder / str(number)
        root.mkdir()
        brokers = [Broker(kind, address, name), Broker(kind, address, f"{name}-events")]
        expected, ends = {"i0": 1.0}, []
        for n in range(updates):
            item, partition = n % 10, n % 2
            if n % 7 == 3:
                brokers[0].send(None, key=tombstone_key(f"i{item}"), partition=partition)
                expected.pop(f"i{item}", None)
            elif n % 11 == 5:
                brokers[0].send(b"poison", partition=partition)
            else:
                brokers[0].send(encode(items({f"i{item}": float(n)})), partition=partition)
                expected[f"i{item}"] = float(n)
            brokers[1].send(encode({"user": [n % 4, n % 4], "item": [n, n], "time": [T, T]}), partition=partition)
        for broker in brokers:  # the position of the last message of each partition
            stream, last = broker.open(), {}
            stream.begin({})
            while len(last) < PARTITIONS or any(stream.poll(0.0, 1000)):
                last |= {message.partition: message.position for message in stream.poll(0.2, 1000)}
            ends.append(last)
            stream.close()
        (root / "ends").write_text(json.dumps(ends))
        (root / "log").touch()
        arguments = (kind, f"{address} {valkey_url}", name, str(root), updates, str(folder / "cache"))
        while True:
            seen, life = (root / "log").stat().st_size, Life(work, *arguments)
            if done < kills:
                life.await_word(root / "log", "saved", after=seen)
                life.kill(after=chance.uniform(0, 0.15))
            if not life.killed():
                break
            done += 1
        saved: dict = {}
        for line in (root / "log").read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line that a kill cut
                word, positions = json.loads(line)
                if word == "start":
                    assert all(positions.get(p, -1) >= at for p, at in saved.items()), "a saved message was lost"
                saved = saved | positions
        final = IndexWriter.resume(root / "w", aif.Trained(MODEL, PARAMS, ENCODER))
        assert prices(final.index) == expected
        final.close()
        import redis

        with redis.Redis.from_url(valkey_url) as client:
            counts = [int(client.getrange(f"{name}:{{i:{user}}}:e", 12, 31)) for user in range(4)]
            assert counts == [updates // 2] * 4, "an event was lost or doubled"


# the command


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a model that runs as it is saved, and an index of it."""
    folder = tmp_path_factory.mktemp("trained")
    config = aif.presets.two_tower(ENCODER.schema, width=4, short_length=4, towers=(4,), sequence=False)
    params = demo.init(aif.build(config), items=ENCODER.items(items(dict.fromkeys(["unknown", *NAMES], 0.0)))[1])
    checkpoint.save(folder / "model", aif.Trained(aif.build(config), params, ENCODER))
    made = ItemIndex.build(aif.Trained(aif.build(config), params, ENCODER), [items({"i0": 1.0})], batch_size=8, progress=False)
    made.save(folder / "index")
    return folder


def test_the_command_follows_and_goes_on(trained, valkey_url, tmp_path, capsys):
    broker = Broker("valkey", valkey_url, "command")
    words = ["index", "follow", "--checkpoint", str(trained / "model"), "--index", str(trained / "index"), "--until-idle"]
    words += ["--stream", broker.url, "--directory", str(tmp_path / "w"), "--quiet"]
    words += ["--store", str(tmp_path / "store")]
    for number in range(1, 3):
        broker.send(encode(items({f"i{number}": 1.0})), partition=number % 2)
        broker.send(b"poison")
        assert cli.main(words) == 0
        metrics = json.loads(capsys.readouterr().out)
        assert metrics["counters"]["stream_applied"] == metrics["counters"]["stream_rejected"] == 1
        assert metrics["counters"]["stream_published"] == 2 and metrics["gauges"]["stream_lag"] == 0
        fetched = SnapshotStore(tmp_path / "store").fetch(tmp_path / "out")
        assert aif.index.verify(fetched).items == number + 1


def test_a_command_that_is_told_to_end_saves(trained, valkey_url, tmp_path):
    broker = Broker("valkey", valkey_url, "told")
    broker.send(encode(items({"i1": 1.0})))
    command = [sys.executable, "-m", "aif_jax", "index", "follow", "--checkpoint", str(trained / "model"), "--quiet"]
    command += ["--index", str(trained / "index"), "--directory", str(tmp_path / "w"), "--every-seconds", "3600"]
    command += ["--stream", broker.url, "--store", str(tmp_path / "store")]
    command += ["--metrics", str(port := servers.free_port())]
    process = subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    store, until = SnapshotStore(tmp_path / "store"), time.monotonic() + 90
    while store.current() is None and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)  # the first snapshot is published with the first step
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        scraped = answer.read().decode()
    process.terminate()
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert json.loads(out)["counters"]["stream_applied"] == 1
    assert "\naif_stream_messages_total 1.0\n" in scraped and "\naif_stream_lag 0.0\n" in scraped
    assert float(re.findall(r"^aif_stream_age_seconds (.*)$", scraped, re.M)[0]) > 0
    assert aif.index.verify(snapshots(tmp_path / "w")[-1]).items == 2


def test_the_command_follows_users(trained, valkey_url, capsys):
    """Into a feature store; called again, it goes on, and counts nothing twice."""
    import redis

    broker = Broker("valkey", valkey_url, "users")
    words = ["users", "follow", "--checkpoint", str(trained / "model"), "--until-idle", "--quiet", "--stream", broker.url]
    words += ["--features", valkey_url, "--length", "9", "--prefix", "f"]
    for number in range(1, 3):
        broker.send(encode({"user": [1, 1], "item": ["i0", "i1"], "time": [T, T + 1]}))
        assert cli.main(words) == 0, capsys.readouterr().err
        metrics = json.loads(capsys.readouterr().out)
        assert metrics["counters"]["stream_applied"] == number
        with redis.Redis.from_url(valkey_url) as client:
            assert int(client.getrange("f:{i:1}:e", 12, 31)) == 2 * number


USERS, INDEX = (
    ["users", "follow", "--stream", "redis://localhost:1/x", "--features"],
    ["index", "follow", "--directory", "w", "--stream"],
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*USERS, "redis://me:secret@/x"], "server: expected redis://HOST:PORT[/DATABASE], got 'redis://***@/x'"),
        (
            [*USERS, "redis://h:1", "--group", "g"],
            "--stream: group: expected None: only topics of Kafka have groups",
        ),
        (
            [*USERS, "redis://h:1", "--server-options", "wrong.json"],
            "wrong.json: expected a JSON object of settings",
        ),
        ([*INDEX, "redis://localhost:1/x"], "expected --index, to start from, got none"),
        ([*INDEX, "nats://host/topic"], "expected kafka://HOST:PORT/TOPIC or redis://HOST:PORT/KEY"),
        ([*INDEX, "redis://me:secret@host/"], "got 'redis://***@host/'"),
        ([*INDEX, "kafka://host"], "expected kafka://"),
    ],
)
def test_wrong_words_of_follow_are_named(trained, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.json").write_text('["secret"')
    assert cli.main([*words, "--checkpoint", str(trained / "model")]) == 2
    told = capsys.readouterr().err
    assert message in told and "secret" not in told
