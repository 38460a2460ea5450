"""Promise: an index that is split by item id over services answers as the whole one does, bit for bit."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from aif_jax import Trained, export
from aif_jax.index import ItemIndex, shard_of
from aif_jax.service.client import ServiceError
from aif_jax.service.shards import ShardedClient
from aif_jax.serving import ServingConfig
from tests.service_world import EVENTS, IDS, ITEMS, NOW, exports, running

pytestmark = pytest.mark.usefixtures("light_compilation")
SHARDS = 3
CALL = {"user": "ann", "record": {"user": "ann"}, "events": EVENTS, "now": NOW}
SERVING = ServingConfig(
    buckets=(64,), max_k=48, orders={"cheap": "p * 0 - bid", "half": "p * 0 + 1", "odd": "p * log(bid - 1.5)"}
)


@functools.cache
def folders(kind: str) -> list[Path]:
    """Exports of one model with the items of a shard each."""
    world, root = exports(kind), Path(tempfile.mkdtemp(prefix="aif_jax-shards-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    ids = IDS if kind == "integers" else [f"item {number}" for number in IDS]
    items = {"item": ids, "category": ["tea", "cup", "pot", "tin"] * (ITEMS // 4), "bid": np.linspace(1, 2, ITEMS)}
    model, params = world.model, world.params["one"]
    for place in range(SHARDS):
        shard = ItemIndex.build(
            Trained(model, params, world.encoder), [items], batch_size=64, shard=(place, SHARDS), progress=False
        )
        assert shard.version == world.index["one"].version and len(shard) < ITEMS
        export.save(root / str(place), Trained(model, params, world.encoder), shard, platforms=("cpu",), stablehlo=False)
    return [root / str(place) for place in range(SHARDS)]


@contextlib.contextmanager
def served(kind: str):
    """A client of the service with the whole index, and one of three with a shard each."""
    with contextlib.ExitStack() as stack:
        started = [running(each, config=SERVING) for each in (exports(kind).root / "one", *folders(kind))]
        whole, *shards = [stack.enter_context(each) for each in started]
        sharded = ShardedClient([each.addresses["http"] for each in shards])
        yield stack.enter_context(whole.client()), stack.enter_context(sharded), shards


def expect_equal(whole: dict, sharded: dict) -> None:
    """Everything but the times, bit for bit."""
    assert whole.keys() == sharded.keys()
    for name in whole.keys() - {"stages", "state_age"}:
        got, wanted = sharded[name], whole[name]
        same = np.array_equal(got, wanted) and got.dtype == wanted.dtype if isinstance(wanted, np.ndarray) else got == wanted
        assert same, f"{name}: expected {wanted}, got {got}"


def cases(rng: np.random.Generator):
    """Fields of calls by name: of every order, with unknown and repeated candidates, few, many and none."""
    mixed = np.concatenate([rng.permutation(IDS), [5, 6, 5], IDS[3:9]])
    some_bids = rng.integers(0, 3, len(mixed)).astype(np.float32)  # few numbers: ties
    yield "all", {"candidates": rng.permutation(IDS), "k": 8}
    yield "k above any share", {"candidates": rng.permutation(IDS), "k": 30}
    yield "k above all", {"candidates": IDS[:7], "k": 48}
    yield "repeats and unknown ones", {"candidates": mixed, "k": 20}
    for order in ("bid", "cheap", "half", "odd"):
        yield order, {"candidates": mixed, "k": 45, "order": order}
        yield f"{order}, cut", {"candidates": rng.permutation(mixed), "k": 3, "order": order}
    yield "bids of the call", {"candidates": mixed, "bids": some_bids, "k": 20, "order": "bid"}
    yield "bids all alike", {"candidates": mixed, "bids": 0 * some_bids, "k": 20, "order": "bid"}
    yield "one candidate", {"candidates": IDS[:1], "k": 3}
    yield "unknown ones alone", {"candidates": np.array([1, 2, 3, 4, 5]), "k": 3}
    yield "none", {"candidates": IDS[:0], "k": 3}


def test_integers():
    shares = np.bincount(shard_of(IDS, SHARDS))
    assert len(shares) == SHARDS and shares.min() >= 5
    with served("integers") as (whole, sharded, services):
        for name, fields in cases(np.random.default_rng(0)):
            one, many = whole.rank(**CALL, **fields), sharded.rank(**CALL, **fields)
            expect_equal(one, many)
            expected = {"half": len(set(IDS)), "odd": ITEMS // 2, "none": 0, "k above all": 7}.get(name)
            assert expected is None or len(one["ids"]) == expected, name
        scored = {"candidates": np.concatenate([IDS[::-1], [5], IDS[:4]])}
        expect_equal(whole.score(**CALL, **scored), sharded.score(**CALL, **scored))

        met = {"candidates": IDS, "k": 7, "exclude": IDS[::3]}
        expect_equal(whole.rank(**CALL, **met), sharded.rank(**CALL, **met))
        assert sharded.rank(**CALL, **met)["excluded"] == len(IDS[::3])

        # a shard whose candidates have no finite score says so, and the others answer
        nan = IDS[np.linspace(1, 2, ITEMS) <= 1.5]
        owners = shard_of(IDS, SHARDS)
        lame = np.concatenate([nan[shard_of(nan, SHARDS) == 0], IDS[(owners > 0)], [5, 6, 7]])
        fields = {"candidates": lame, "k": 40, "order": "odd"}
        one = whole.rank(**CALL, **fields)
        expect_equal(one, sharded.rank(**CALL, **fields))
        assert one["non_finite"] > np.sum(shard_of(nan, SHARDS) == 0) > 0 and one["unknown"] == 3
        for client in (whole, sharded):
            with pytest.raises(ServiceError, match="NaN or infinity for all") as caught:
                client.rank(**CALL, candidates=nan, k=3, order="odd")
            assert caught.value.field == "scores" and caught.value.counts["non_finite"] > 0

        # what a caller does wrong is said as a service alone says it, and the connections go on
        for wrong in ({"k": 49}, {"k": 3, "order": "none"}, {"k": 3, "candidates": [1.5]}):
            for client in (whole, sharded):
                with pytest.raises((ServiceError, TypeError)):
                    client.rank(**{**CALL, "candidates": IDS, **wrong})
        expect_equal(whole.rank(**CALL, candidates=IDS, k=5), sharded.rank(**CALL, candidates=IDS, k=5))

        # the asynchronous half: every shard computes the state, the later call brings the id alone
        version = sharded.prepare(**CALL | {"user": "bob"})["version"]
        later = sharded.rank(user="bob", candidates=IDS, k=5, version=version)
        assert "user" not in later["stages"] and not later["degraded"]
        assert [each.service.calls["prepare", "OK"] for each in services] == [1] * SHARDS


def test_strings():
    names = np.array([f"item {number}" for number in IDS])
    rng = np.random.default_rng(1)
    call = CALL | {"events": EVENTS | {"item": [f"item {number}" for number in EVENTS["item"]]}}
    with served("strings") as (whole, sharded, _):
        for fields in ({"k": 8}, {"k": 45, "order": "half"}, {"k": 9, "order": "half"}):
            candidates = rng.permutation(np.concatenate([names, ["neither", "nor"], names[:5]]))
            expect_equal(
                whole.rank(**call, candidates=candidates, **fields), sharded.rank(**call, candidates=candidates, **fields)
            )
