"""Shards of an index: who holds an item, what a shard's index has, how answers are merged and refused; calls sent again."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading

import jax
import numpy as np
import pytest

from aif_jax import Trained, cli
from aif_jax.checks import VersionMismatch
from aif_jax.index import ItemIndex, shard_of
from aif_jax.service import tensors
from aif_jax.service.client import HEADER, Client, ServiceError, affinity_key
from aif_jax.service.shards import ShardedClient, ShardsMissing, merged
from aif_jax.serving import Candidates
from tests.service_world import EVENTS, IDS, NOW, SERVING, exports, running
from tests.serving_world import shared

# who holds an item


def test_items_are_spread_evenly_whatever_their_steps():
    for ids in (np.arange(8000), 1000 * np.arange(8000), -np.arange(8000) << 20, [f"item-{n}" for n in range(8000)]):
        counts = np.bincount(shard_of(ids, 8), minlength=8)
        assert counts.sum() == 8000 and np.abs(counts - 1000).max() < 150  # five deviations
    assert shard_of([7, 8, 9], 1).tolist() == [0, 0, 0] and shard_of([], 3).tolist() == []


def test_the_hash_stays_as_it_is():
    """Indexes that were built long ago are asked for the same items."""
    assert shard_of([0, 1, -1, 10**18, 17, 1017], 1000).tolist() == GOLDEN_INTEGERS
    assert shard_of(["", "a", "item 17", "日本"], 1000).tolist() == GOLDEN_STRINGS


GOLDEN_INTEGERS = [0, 789, 67, 34, 182, 695]
GOLDEN_STRINGS = [83, 190, 68, 953]


def test_shards_hold_every_item_once_with_the_rows_of_the_whole():
    world = shared()
    build = dict(batch_size=64, progress=False)
    shards = [
        ItemIndex.build(Trained(world.model, world.params), world.features, ids=world.ids, shard=(n, 3), **build)
        for n in range(3)
    ]
    assert sum(map(len, shards)) == len(world.ids)
    for place, shard in enumerate(shards):
        assert (shard_of(shard.ids, 3) == place).all() and shard.version == world.index.version
        ids, rows = shard.stored(decoded=True)
        whole, _ = world.index.take(ids)
        assert len(jax.tree.leaves(rows)) > 1
        jax.tree.map(np.testing.assert_array_equal, rows, whole)
    with pytest.raises(ValueError, match="shard: expected .place, N. with 0 <= place < N, got .3, 3."):
        ItemIndex.build(Trained(world.model, world.params), world.features, ids=world.ids, shard=(3, 3), **build)


@pytest.mark.parametrize("text", ["3/3", "1", "-1/3", "a/b", "1/0"])
def test_the_commands_refuse_a_shard_that_is_none(text, capsys):
    for command in ("build", "update", "follow"):
        with pytest.raises(SystemExit):
            cli.main(["index", command, "--checkpoint", "x", "--items", "y", "--out", "z", f"--shard={text}"])
        assert "expected PLACE/N with 0 <= PLACE < N" in capsys.readouterr().err


# merging


def answer_of(ids, scores, **changes):
    """What one shard answers."""
    scores = np.asarray(scores, np.float32)
    said = {"id": "", "version": "v", "degraded": False, "reason": None, "state_age": 1.0, "non_finite": 0, "stages": {}}
    said |= {"candidates": 0, "unknown": 0, "excluded": 0}
    return said | {"ids": np.asarray(ids), "scores": scores, "logits": scores} | changes


def test_ties_are_merged_in_the_order_of_the_candidates():
    given = Candidates.of([30, 10, 20, 40, 10])
    answers = {0: answer_of([20, 10], [1, 1]), 1: answer_of([40, 30], [2, 1], unknown=1, non_finite=2, state_age=3.0)}
    answer = merged(answers, given, 3)
    assert answer["ids"].tolist() == [40, 30, 10] and answer["scores"].tolist() == [2, 1, 1]
    assert (answer["unknown"], answer["non_finite"], answer["state_age"]) == (1, 2, 3.0)
    assert merged({0: answer_of([10, 20], [1, 1])}, given, 1)["ids"].tolist() == [10]


@pytest.mark.parametrize("strings", [False, True])
def test_merging_equals_one_engine(strings):
    """Against the engine's rule, written down: an item once, with the first of its highest bids, then by score and place."""
    rng = np.random.default_rng(3)
    for _ in range(200):
        numbers = rng.integers(0, 30, rng.integers(1, 40))
        ids = np.array([f"item {n}" for n in numbers]) if strings else numbers.astype(np.int64)
        bids = rng.integers(0, 3, len(ids)).astype(np.float32) if rng.random() < 0.5 else None
        scores = (numbers % 3).astype(np.float32) if bids is None else bids
        k, shards = int(rng.integers(1, 20)), int(rng.integers(1, 5))

        def best(places, bids=bids, numbers=numbers, scores=scores, k=k):
            price = np.zeros(len(numbers)) if bids is None else bids
            once = [min(places[numbers[places] == n], key=lambda at: (-price[at], at)) for n in set(numbers[places].tolist())]
            return sorted(once, key=lambda at: (-scores[at], at))[:k]

        owners = shard_of(ids, shards)
        answers = {}
        for shard in set(owners.tolist()):
            chosen = best(np.flatnonzero(owners == shard))
            answers[shard] = answer_of(ids[chosen], scores[chosen])
        expected = best(np.arange(len(ids)))
        answer = merged(answers, Candidates.of(ids if bids is None else Candidates(ids, bids)), k)
        assert answer["ids"].tolist() == ids[expected].tolist() and answer["scores"].tolist() == scores[expected].tolist()


# services


@contextlib.contextmanager
def gone():
    """The address of a host that answers nothing, not even that it refuses: its queue of connections is full."""
    with socket.socket() as silent, socket.socket() as first, socket.socket() as second:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        for each in (first, second):
            each.setblocking(False)
            each.connect_ex(silent.getsockname())
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"


def test_a_diverse_cut_is_refused_and_every_service_is_named_that_does_not_answer():
    call = {"user": "ann", "events": EVENTS, "now": NOW, "k": 3}
    config = dataclasses.replace(SERVING, buckets=(64,), group="bid")
    with running(exports().root / "one", config=config) as service, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and silent: connections are refused
        dead, alive = f"http://127.0.0.1:{nobody.getsockname()[1]}", service.addresses["http"]
        with (
            ShardedClient([alive]) as client,
            pytest.raises(ValueError, match="cut: expected shards without ServingConfig.group"),
        ):
            client.rank(**call, candidates=IDS)
        own = IDS[shard_of(IDS, 2) == 1]
        fields = {"user": "ann", "events": EVENTS, "now": NOW}
        with ShardedClient([dead, alive]) as client:
            with pytest.raises(
                ShardsMissing, match=rf"{len(IDS) - len(own)} of {len(IDS)} candidates have no score: no answer of"
            ) as caught:
                client.score(**fields, candidates=IDS)
            assert set(caught.value.missing) == {0} and dead in str(caught.value)
            assert client.score(**fields, candidates=own)["mask"].all()  # the other shard has none of these
            with pytest.raises(ShardsMissing, match="no answer of shard 0 of 2"):
                client.prepare(**fields)
        with ShardedClient([dead, alive], missing="degrade") as client:
            answer = client.score(**fields, candidates=IDS)
            assert answer["degraded"] and "shard 0 of 2" in answer["reason"] and client.retried > 0
            assert (answer["mask"] == (shard_of(IDS, 2) == 1)).all() and (answer["logits"][~answer["mask"]] == -np.inf).all()
            with pytest.raises(ShardsMissing):
                client.score(**fields, candidates=IDS[shard_of(IDS, 2) == 0])
        with gone() as silent, ShardedClient([silent, alive], missing="degrade", timeout=1) as client:
            answer = client.score(**fields, candidates=IDS)
            assert answer["degraded"] and (answer["mask"] == (shard_of(IDS, 2) == 1)).all()
            assert client.retried == 0  # it would keep all waiting for as long again


@contextlib.contextmanager
def scripted(*replies: bytes):
    """A server that gives each request the next of some replies, b"" for none and a closed connection; yields what it read."""
    seen: list[bytes] = []

    def serve() -> None:
        for reply in replies:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                return
            connection.settimeout(30)
            with connection:
                data = b""
                while b"\r\n\r\n" not in data:
                    data += connection.recv(1 << 16)
                head, _, body = data.partition(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                while len(body) < length:
                    body += connection.recv(1 << 16)
                seen.append(head)
                connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)  # for a test that fails before it has asked for every reply
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
        finally:
            thread.join(30)


def reply(status: str, body: bytes, kind: str = "text/html") -> bytes:
    return (
        f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body
    )


def test_calls_that_broke_are_sent_again_and_counted():
    good = reply("200 OK", tensors.pack({"version": "v"}), tensors.CONTENT_TYPE)
    half = reply("200 OK", tensors.pack({"version": "v"}), tensors.CONTENT_TYPE)[:-4]
    for first in (b"", half, reply("502 Bad Gateway", b"<html>"), reply("503 Unavailable", b"<html>")):
        with scripted(first, good) as (address, seen), Client(address) as client:
            assert client.prepare(user="ann") == {"version": "v"} and client.retried == 1
            assert len(seen) == 2 and all(f"{HEADER}: {affinity_key('ann')}".encode() in head for head in seen)
    with scripted(b"", b"", b"") as (address, _), Client(address) as client, pytest.raises(OSError):
        client.prepare(user="ann")
    with scripted(b"") as (address, _), Client(address, retries=0) as client, pytest.raises(OSError):
        client.prepare(user="ann")
    with scripted(reply("500 Error", b"<html>")) as (address, _), Client(address) as client:
        with pytest.raises(ServiceError, match="INTERNAL: status 500 of a proxy"):
            client.prepare(user="ann")


def test_a_call_that_ran_out_of_time_is_not_sent_again():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Client(address, timeout=0.05) as client, pytest.raises(TimeoutError):
            client.prepare(user="ann")
        assert client.retried == 0
        with ShardedClient([address] * 4, timeout=0.3) as client, pytest.raises(ShardsMissing, match="timed out"):
            client.prepare(user="ann")


def test_further_tries_share_the_time_of_the_first_one():
    """A host that breaks off, then says nothing: the caller waits once, whatever the timeout of the shard's client."""
    with scripted(b"") as (address, _), Client(address, timeout=60) as client:
        with pytest.raises(OSError):
            client.post("/v1/prepare", {"user": "ann"}, within=0.3)
        assert client.retried == 1 and client._connection.timeout <= 0.3


def test_all_tries_of_a_shard_share_the_time_of_the_call():
    with scripted(b"") as (address, seen), ShardedClient([address], timeout=0.5) as client:
        with pytest.raises(ShardsMissing, match="no answer of shard 0 of 1"):
            client.prepare(user="ann")
        assert len(seen) == 1 and client.retried == 1


def frames(version: str) -> bytes:
    said = {"id": "", "version": version, "degraded": False, "reason": None, "state_age": None, "non_finite": 0, "stages": {}}
    body = tensors.pack(said | {"logits": np.zeros(1, np.float32), "mask": np.ones(1, bool)})
    return reply("200 OK", body, tensors.CONTENT_TYPE)


def test_shards_without_a_common_version_are_refused():
    ids = np.array([next(n for n in range(99) if shard_of([n], 2)[0] == place) for place in (0, 1)])
    unknown = reply("412 Precondition", b'{"error": {"code": "FAILED_PRECONDITION", "message": "x", "field": "version"}}')
    with scripted(frames("a" * 64), unknown) as (first, _), scripted(frames("b" * 64), unknown) as (second, seen):
        with ShardedClient([first, second]) as client:
            with pytest.raises(VersionMismatch, match="shards: .* aaaaaaaaaaaa of shard 0, bbbbbbbbbbbb of shard 1"):
                client.score(user="ann", candidates=ids)
    assert len(seen) == 2


def test_a_shard_that_lags_is_waited_for_by_the_others():
    """The version of the call before is asked for first: the shards that are ahead still hold it."""
    ids = np.array([next(n for n in range(99) if shard_of([n], 2)[0] == place) for place in (0, 1)])
    old, new = "b" * 64, "a" * 64
    with (
        scripted(frames(old), frames(new), frames(old)) as (first, ahead),
        scripted(frames(old), frames(old)) as (second, late),
    ):
        with ShardedClient([first, second]) as client:
            assert client.score(user="ann", candidates=ids)["version"] == old
            assert client.score(user="ann", candidates=ids)["version"] == old
    assert (len(ahead), len(late)) == (3, 2)
