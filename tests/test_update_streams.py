"""Update streams: what a stream says is in the index exactly once, whatever is killed."""

import contextlib
import json
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aif_jax as aif
from aif_jax import checkpoint, cli
from aif_jax.connectors import Follower, KafkaStream, SnapshotStore, StreamError, follow, kafka
from aif_jax.connectors.streams import MAX_BYTES, Message, decode, encode, tombstone_key
from aif_jax.index import IndexWriter, ItemIndex
from aif_jax.index import writer as writers
from aif_jax.index.writer import snapshots
from tests import demo, servers
from tests.beside import meanwhile
from tests.conftest import child_environment
from tests.killed import Life
from tests.refusals import refused
from tests.reliability.sizes import FULL, full
from tests.stream_world import NAMES, PARAMS, PARTITIONS, encoder, first_index, items, model, prices, work

pytestmark = pytest.mark.lane("standing")
ENCODER, MODEL = encoder(), model()


class Broker:
    """A topic: writers `send`, any number of followers `open`."""

    def __init__(self, address: str, name: str, *, transactions: bool = True):
        self.address, self.name, self.transactions = address, name, transactions
        import confluent_kafka
        from confluent_kafka.admin import AdminClient, NewTopic

        admin = AdminClient({"bootstrap.servers": address})
        topics = [NewTopic(name, PARTITIONS, 1), NewTopic(f"{name}.rejected", 1, 1)]
        for done in admin.create_topics(topics).values():
            done.result(20)
        options = {"transactional.id": name} if transactions else {}
        self.producer = confluent_kafka.Producer({"bootstrap.servers": address, **options})
        if transactions:
            self.producer.init_transactions(20)

    @property
    def url(self) -> str:
        return f"kafka://{self.address}/{self.name}"

    def open(self) -> "Noted":
        return Noted(self.url)

    def send(self, value: bytes | None, *, key: bytes | None = None, partition: int = 0) -> None:
        if self.transactions:  # one for each: the offsets have gaps
            self.producer.begin_transaction()
        self.producer.produce(self.name, value, key, partition=partition)
        if self.transactions:
            self.producer.commit_transaction(20)
        assert not self.producer.flush(20)

    def rejected(self) -> list[tuple[bytes | None, bytes | None]]:
        stream = KafkaStream(f"kafka://{self.address}/{self.name}.rejected")
        stream.begin({})
        found, until = [], time.monotonic() + 3
        while time.monotonic() < until and not found:
            found += [(message.key, message.value) for message in stream.poll(0.2, 100)]
        stream.close()
        return found


class Noted(KafkaStream):
    """A stream that notes what it commits."""

    def __init__(self, url: str):
        super().__init__(url)
        self.committed: dict[int, int] = {}

    def commit(self, positions: Mapping[int, int]) -> None:
        super().commit(positions)
        self.committed |= positions


def topic_of(folder: Path) -> str:
    return "".join(c if c.isalnum() else "-" for c in folder.name)


def drain(follower: Follower, *, until: int, seconds: float = 60) -> None:
    """Steps until so many messages were polled."""
    end = time.monotonic() + seconds
    while follower.counters["messages"] < until:
        follower.step(0.05)
        assert time.monotonic() < end, follower.counters


def test_an_index_follows(kafka_address, tmp_path):
    """Changes, deletions, tombstones and poison, by two partitions; resumed from a snapshot."""
    broker = Broker(kafka_address, topic_of(tmp_path))
    broker.send(encode(items({"i1": 5.0, "i2": 6.0})))
    broker.send(encode(items({"i3": 7.0})), partition=1)
    broker.send(b"poison")
    broker.send(None, key=tombstone_key("i2"))
    broker.send(None, key=tombstone_key("i9"))
    broker.send(encode(items({"i1": 8.0})), key=tombstone_key("i1"))
    broker.send(encode({"item": ["i4"], "category": ["a"]}))  # no price
    broker.send(None, key=tombstone_key("i3"), partition=1)
    broker.send(None, key=b"{")
    writer = IndexWriter.start(tmp_path / "w", first_index(), every_updates=100)
    stream = broker.open()
    follower = Follower(stream, writer)
    drain(follower, until=9)
    assert prices(writer.index) == {"i0": 1.0, "i1": 8.0}
    assert (follower.counters["rejected"], follower.counters["applied"], follower.counters["repeated"]) == (3, 6, 0)
    rejected = broker.rejected()
    assert rejected[0] == (None, b"poison") and len(rejected) == 3
    metrics = follower.metrics()
    assert metrics["counters"]["stream_messages"] == 9 and metrics["gauges"]["stream_age_seconds"] < 60
    writer.close()
    stream.close()

    broker.send(encode(items({"i5": 2.0})), partition=1)
    resumed = IndexWriter.resume(tmp_path / "w", aif.Trained(MODEL, PARAMS, ENCODER))
    again = Follower(broker.open(), resumed)
    drain(again, until=1)
    assert prices(resumed.index) == {"i0": 1.0, "i1": 8.0, "i5": 2.0}
    assert again.counters["messages"] == again.counters["applied"] == 1
    again.step(1.0)
    assert again.metrics()["gauges"]["stream_lag"] == 0  # in Kafka the end of a transaction is an offset too
    resumed.close()
    again.stream.close()


def test_metrics_are_read_while_the_follower_runs(following):
    _, _, follower = following({})
    with meanwhile(follower.metrics, switch=1e-5):
        for number in range(20_000):  # as `step` does for new partitions
            follower.counters[f"new {number % 500}"] += 1
            follower._age[number % 500] = 0.0
            if number % 500 == 499:
                follower._age.clear()
                follower.counters.clear()


@pytest.fixture
def following(kafka_address, tmp_path):
    """Starts a topic, a writer in `w` with options, and what follows the topic, with further options."""
    with contextlib.ExitStack() as stack:

        def start(written: dict[str, Any], **options: Any) -> tuple[Broker, IndexWriter, Follower]:
            broker = Broker(kafka_address, topic_of(tmp_path), transactions=False)
            writer = stack.enter_context(IndexWriter.start(tmp_path / "w", first_index(), **written))
            return broker, writer, Follower(stack.enter_context(contextlib.closing(broker.open())), writer, **options)

        yield start


def test_snapshots_are_published(following, tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "MAX_BATCH", 1)
    store = SnapshotStore(tmp_path / "store")
    broker, writer, follower = following({"every_updates": 1}, store=store)
    follower.step(0.05)  # publishes the first
    for number in range(4):
        broker.send(encode(items({f"i{number}": float(number)})))
        drain(follower, until=number + 1)
        fetched = store.fetch(tmp_path / "out")
        index = ItemIndex.load(fetched, aif.Trained(MODEL, PARAMS, ENCODER))
        assert prices(index) == prices(writer.index) and aif.index.inspect(fetched).positions == {0: number}
    assert follower.counters["published"] == 5 and follower.stream.committed == {0: 3}


def test_an_outage_of_the_store_stops_nothing_and_ends_by_itself(following, tmp_path, monkeypatch):
    """Nothing listens where the bucket should be: its client raises errors of its own."""
    monkeypatch.setattr(follow, "RETRY", 0.0)
    address, once = f"http://127.0.0.1:{servers.free_port()}", {"retries": {"max_attempts": 0}}
    away = SnapshotStore("s3://bucket/index", key="a", secret="b", endpoint_url=address, config_kwargs=once)
    refused(OSError, "s3://bucket/index: cannot be read or written: EndpointConnectionError", away.current)
    broker, writer, follower = following({"every_updates": 1}, store=away)
    broker.send(encode(items({"i1": 2.0})))
    drain(follower, until=1)
    assert prices(writer.index)["i1"] == 2.0 and follower.stream.committed == {} and not follower.flush()
    monkeypatch.setattr(follow, "RETRY", 60.0)
    follower._store = back = SnapshotStore(tmp_path / "store")
    follower.step(0.05)  # the stream pauses
    assert follower.counters["published"] == 1 and follower.stream.committed == {0: 0}
    follower._store = away
    broker.send(encode(items({"i1": 3.0})))
    drain(follower, until=2)
    follower._store = back
    follower.step(0.05)  # less than `RETRY` after the last try
    assert follower.counters["published"] == 1 and follower.flush() and follower.counters["published"] == 2


def test_a_stream_that_pauses_is_saved_by_time(following, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(writers, "monotonic", lambda: clock[0])
    broker, _, follower = following({"every_updates": None, "every_seconds": 5})
    broker.send(encode(items({"i1": 2.0})))
    drain(follower, until=1)
    assert follower.stream.committed == {} and len(snapshots(tmp_path / "w")) == 1
    clock[0] = 6.0
    follower.step(0.05)
    follower.step(0.05)
    assert follower.stream.committed == {0: 0} and len(snapshots(tmp_path / "w")) == 2


def test_a_save_that_fails_stops_nothing(following, monkeypatch):
    broker, writer, follower = following({"every_updates": 1})
    monkeypatch.setattr(ItemIndex, "save", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    broker.send(encode(items({"i1": 2.0})))
    drain(follower, until=1)
    assert prices(writer.index)["i1"] == 2.0 and follower.counters["failed_saves"] == 1 and follower.stream.committed == {}
    monkeypatch.undo()
    broker.send(encode(items({"i1": 3.0})))
    drain(follower, until=2)
    assert follower.stream.committed == {0: 1}


def test_a_message_that_cannot_be_rejected_is_not_passed(following, monkeypatch):
    broker, writer, follower = following({})
    monkeypatch.setattr(follower.stream, "reject", lambda *a: (_ for _ in ()).throw(OSError("broker gone")))
    broker.send(b"poison")
    refused(OSError, "broker gone", drain, follower, until=1)
    assert writer.positions == {}


def test_of_a_rejected_message_that_is_too_large_the_key_is_left(following):
    broker, _, follower = following({})
    follower.stream.reject(Message(0, 7, b"key", bytes(3 * MAX_BYTES)), "no item")
    assert broker.rejected() == [(b"key", None)]


def test_a_broker_that_does_not_answer_stops_nothing(following, monkeypatch):
    broker, _, follower = following({})
    monkeypatch.setattr(kafka, "REFRESH", 0.0)
    monkeypatch.setattr(kafka, "SECONDS", 1e-6)
    refused(follower.stream._client.KafkaException, "", follower.stream._partitions)
    broker.send(encode(items({"i1": 2.0})))
    drain(follower, until=1)


def test_a_stream_of_another_kind_stops_the_follower(following, monkeypatch):
    monkeypatch.setattr(follow, "MAX_REJECTED", 10)
    broker, _, follower = following({})
    for _ in range(12):
        broker.send(encode({"sku": ["a"]}))
    message = "expected messages of this model, got 10 in a row that do not fit; ValueError.*'item'"
    refused(StreamError, message, drain, follower, until=12)


def test_messages_that_are_gone_are_noticed(kafka_address, tmp_path):
    name = topic_of(tmp_path)
    Broker(kafka_address, name).send(b"x")
    after = "expected messages after {}, got 0 to"
    for positions, message in (({0: 50}, after.format(50)), ({0: 1000}, after.format(1000)), ({7: 0}, r"got no \[7\]")):
        with contextlib.closing(KafkaStream(f"kafka://{kafka_address}/{name}")) as stream:
            refused(StreamError, message, stream.begin, positions)


def test_every_damaged_message_is_refused_or_the_same():
    value = encode(items({"i1": 5.0, "i2": 6.0}))
    whole = decode(Message(0, 0, None, value))
    refused, rng = 0, np.random.default_rng(0)
    for _ in range(400):
        wrong = bytearray(value)
        wrong[rng.integers(len(wrong))] ^= 1 << rng.integers(8)
        try:
            assert decode(Message(0, 0, None, bytes(wrong[: rng.integers(1, 2 * len(wrong))]))).num_rows >= 0
        except ValueError:
            refused += 1
    assert refused > 100 and whole.num_rows == 2


@pytest.mark.parametrize("key", [None, b"", b"{", b"null", b"true", b"1.5", b"[1]"])
def test_a_tombstone_names_an_item(key):
    message = "message 3 of partition 1: expected a value, or a key that is the JSON of an item's id"
    refused(ValueError, message, decode, Message(1, 3, key, None))
    assert decode(Message(1, 3, tombstone_key(7), None)) == [7]


@pytest.mark.parametrize("kills", [3, full(FULL.follower_kills)])
def test_kills_of_a_follower_lose_and_double_nothing(kafka_address, tmp_path, kills):
    """Followers that are killed at work, each after the other; whenever all is in, a new stream and directory begin."""
    chance, updates, done, number = random.Random(0), 60, 0, 0
    while done < kills:
        number += 1
        broker, root = Broker(kafka_address, f"{topic_of(tmp_path)}-{number}"), tmp_path / str(number)
        root.mkdir()
        expected, last = {"i0": 1.0}, {}
        for n in range(updates):
            item, partition = n % 10, n % 2
            if n % 7 == 3:
                broker.send(None, key=tombstone_key(f"i{item}"), partition=partition)
                expected.pop(f"i{item}", None)
            elif n % 11 == 5:
                broker.send(b"poison", partition=partition)
            else:
                broker.send(encode(items({f"i{item}": float(n)})), partition=partition)
                expected[f"i{item}"] = float(n)
        with contextlib.closing(broker.open()) as stream:  # the position of the last message of each partition
            stream.begin({})
            count = 0
            while count < updates:
                messages = stream.poll(0.2, 1000)
                count += len(messages)
                last |= {message.partition: message.position for message in messages}
        (root / "ends").write_text(json.dumps(last))
        (root / "log").touch()
        arguments = (kafka_address, broker.name, str(root), str(tmp_path / "cache"))
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a model that runs as it is saved, and an index of it."""
    folder = tmp_path_factory.mktemp("trained")
    config = aif.presets.two_tower(ENCODER.schema, width=4, short_length=4, towers=(4,), sequence=False)
    ids, floats = {"category": [1] * len(NAMES)}, np.zeros((len(NAMES), 1))
    catalogue = aif.Catalogue.from_items(ENCODER.schema, ENCODER.vocabularies["item"].raw, ids=ids, floats=floats)
    params = demo.init(aif.build(config), items=catalogue)
    checkpoint.save(folder / "model", aif.Trained(aif.build(config), params, ENCODER))
    made = ItemIndex.build(aif.Trained(aif.build(config), params, ENCODER), [items({"i0": 1.0})], batch_size=8, progress=False)
    made.save(folder / "index")
    return folder


def test_the_command_follows_and_goes_on(trained, kafka_address, tmp_path, capsys, monkeypatch):
    broker = Broker(kafka_address, topic_of(tmp_path), transactions=False)
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
        assert aif.index.verify(SnapshotStore(tmp_path / "store").fetch(tmp_path / "out")).items == number + 1
    assert cli.main([*words[:-1], f"{__file__}/store"]) == 1 and capsys.readouterr()  # below a file: nothing is published
    broker.send(encode(items({"i3": 1.0})))
    poll, silent = KafkaStream.poll, iter(range(3))  # a broker that takes seconds to answer
    monkeypatch.setattr(KafkaStream, "poll", lambda *given: [] if next(silent, None) is not None else poll(*given))
    monkeypatch.setattr("aif_jax.cli.service.PATIENCE", 2)
    for left in (1, 0):
        assert (cli.main(words), json.loads(capsys.readouterr().out)["gauges"]["stream_lag"]) == (left, left)


def test_a_command_that_is_told_to_end_saves(trained, kafka_address, tmp_path):
    broker = Broker(kafka_address, topic_of(tmp_path), transactions=False)
    broker.send(encode(items({"i1": 1.0})))
    command = [sys.executable, "-m", "aif_jax", "index", "follow", "--checkpoint", str(trained / "model"), "--quiet"]
    command += ["--index", str(trained / "index"), "--directory", str(tmp_path / "w"), "--every-seconds", "3600"]
    command += ["--stream", broker.url, "--store", str(tmp_path / "store")]
    command += ["--metrics", str(port := servers.free_port())]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=child_environment(), **pipes)
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


INDEX = ["index", "follow", "--directory", "w", "--stream"]


@pytest.mark.parametrize(("words", "message"), [
    ([*INDEX, "kafka://localhost:1/x", "--stream-options", "wrong.json"], "wrong.json: expected a JSON object of settings"),
    ([*INDEX, "kafka://localhost:1/x"], "expected --index, to start from, got none"),
    ([*INDEX, "nats://host/topic"], "expected kafka://HOST:PORT/TOPIC, got 'nats://host/topic'"),
    ([*INDEX, "kafka://me:secret@host/x"], "got 'kafka://***@host/x'; give other settings as options"),
    ([*INDEX, "kafka://host/x", "--stream-options", "own.json"], "which a follower needs as they are, got ['isolation.level']"),
    ([*INDEX, "kafka://host"], "expected kafka://"),
])  # fmt: skip
def test_wrong_words_of_follow_are_named(trained, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.json").write_text('["secret"')
    (tmp_path / "own.json").write_text('{"isolation.level": "secret", "group.id": "mine"}')
    assert cli.main([*words, "--checkpoint", str(trained / "model")]) == 2
    told = capsys.readouterr().err
    assert message in told and "secret" not in told
