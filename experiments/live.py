"""The main job with real neighbours: a feature store, update streams, retrieval, snapshots, and the freshness of it all.

Claim     A change of an item and an event of a user are in a ranking within a second (p99), at 1,000 of each a second; the
          user side hides behind a retrieval that takes as long as it does.
Command   python -m experiments.live --json live.json --figure live.png      (or --smoke; --help lists all)
Time      about 3 minutes on 2 CPU cores
Parts     Valkey or Redis where it is installed, else what the package has in memory: users (`ValkeyFeatures`), states
          (`ValkeyStates`), two update streams (`ValkeyStream`). Retrieval: `presets.two_tower` trained on the same samples, the
          1,000 best by `BruteForce`. Snapshots of the index go to a `SnapshotStore` in a temporary folder.
Data      The synthetic world; users' histories in the store are filled up with older events to --history.
Training  One epoch, the last 10 % of time held out. `presets.aif` is built for --history and fed batches that are as long as
          their longest history (`fit(buckets=...)`): the same sums as with padding up to --history, which is masked.
Method    Fetches, then rankings with nothing else at work, without and with `prepare` before: one at a time. Then threads write
          item changes and user events and apply both streams (`experiments.live_writes`), while requests come one after
          another, each for the user whose event has waited longest. Freshness of an item change: from its write to the end of
          the first ranking that started after the engine took the index with it. Freshness of a user's event, of one in
          --probe events: from its write to the end of the first ranking of its user whose record holds it, where a request for
          the user comes the moment the event is in the store. `user_applied`: from the write of every event until it is in the
          store. `user_queue`: until the end of the first ranking of its user among the requests that come one after another:
          the queue of users, not of the system. Critical path and request: of all rankings under these writes. Cores: CPU time
          of each thread over the time under writes. Recall: the share of held-out next items among the candidates.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import aif_jax as aif
from aif_jax import connectors
from aif_jax.data.dataset import Dataset
from aif_jax.index import IndexWriter
from aif_jax.output import track
from aif_jax.serving import AsyncPreRanker, Request, ServingConfig, StateKey, Timeline
from aif_jax.serving.users import to_bytes
from experiments import common, timelines
from experiments.datasets.synthetic import synthetic_world
from experiments.live_writes import Writes, stages

SMOKE: dict[str, Any] = dict(width=8, towers=(8,), short_length=8)
BUCKETS = (64, 128, 256, 512, 1024)
"""Lengths of histories in training."""


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Runs the job and prints its figures."""
    options = parse(arguments)
    data = synthetic_world(0, users=options.users, items=options.items, events_per_user=options.events).dataset
    small, head = (SMOKE, dict(head=(8,))) if options.smoke else ({}, {})
    configs = {
        "aif": aif.presets.aif(data.schema, long_length=options.history, **small, **head),
        "two_tower": aif.presets.two_tower(data.schema, **small, **(dict(sequence=False) if options.smoke else {})),
    }
    runs = {}
    for name, config in configs.items():
        buckets = tuple(length for length in BUCKETS if length < config.history_length)
        runs[name] = aif.fit(aif.build(config), data, buckets=buckets, validation=0.0, keep_best=False)
    with server(options.embedded) as url, tempfile.TemporaryDirectory() as folder:
        figures, example = asyncio.run(live(runs, data, url, Path(folder), options))
    for name, value in figures.items():
        print(f"{name}: {value}")
    if options.figure:
        timelines.draw({f"a ranking over {'Valkey' if url else 'memory'}, median of all": example}, options.figure)
        print(f"timeline drawn in {options.figure}")
    common.write_json(options.json, figures)


def parse(arguments: list[str] | None):
    """The command line."""
    settings = {
        "users": (1000, 40, "users"),
        "items": (20_000, 200, "items"),
        "events": (200, 70, "events of a user, to train on"),
        "history": (4096, 64, "events of a user in the store"),
        "rate": (1000, 100, "item changes and user events a second"),
        "seconds": (30.0, 1.5, "seconds under writes"),
        "reads": (500, 10, "fetches that are timed"),
        "probe": (50, 5, "events for one request at once"),
        "embedded": (False, None, "no server, although there is one"),
    }
    return common.options(__doc__, arguments, settings, figure="picture of a typical request (PNG)")


@contextlib.contextmanager
def server(embedded: bool) -> Iterator[str | None]:
    """The URL of a Valkey or Redis server on a free port of this machine; None where none is installed."""
    program = None if embedded else shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        yield None
        return
    import redis

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with contextlib.closing(redis.Redis(port=port)) as client:
            for _ in range(200):
                with contextlib.suppress(redis.ConnectionError):
                    client.ping()
                    break
                time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


class MemoryStates:
    """A state store in this process, where there is no server."""

    def __init__(self):
        self._states: dict[StateKey, bytes] = {}

    async def get(self, key: StateKey) -> bytes | None:
        """The bytes of a state, or None."""
        return self._states.get(key)

    async def put(self, key: StateKey, state: bytes) -> None:
        """Keeps the bytes of a state."""
        self._states[key] = state


class Parts:
    """The neighbours: of a server, or of this process."""

    def __init__(self, url: str | None, encoder: aif.Encoder, length: int):
        layout, self._client = connectors.EventLayout.of(encoder), None
        if url is None:
            self.source = self.sink = connectors.MemoryFeatures(layout, length=length)
            self.states: Any = MemoryStates()
            self.items: Any = connectors.MemoryStream()
            self.events: Any = connectors.MemoryStream()
            return
        import redis
        from redis import asyncio as aioredis

        client = aioredis.Redis.from_url(url)
        self.source = connectors.ValkeyFeatures(client, layout, length=length)
        self.sink = connectors.ValkeyFeatureWriter(redis.Redis.from_url(url), layout, length=length)
        self.states = connectors.ValkeyStates(client, timeout=1.0)
        self.items, self.events = (connectors.ValkeyStream(redis.Redis.from_url(url), [key]) for key in ("items", "events"))
        self._client = client

    async def close(self) -> None:
        """Leaves the server."""
        if self._client is not None:
            await self._client.aclose()


async def live(
    runs: dict[str, aif.Run], data: Dataset, url: str | None, folder: Path, options
) -> tuple[dict[str, Any], Timeline]:
    """All figures, and the timeline of the ranking of median time."""
    run, tower_run = runs["aif"], runs["two_tower"]
    assert run.encoder is not None and tower_run.encoder is not None
    parts = Parts(url, run.encoder, options.history)
    counts = fill(parts.sink, data, options)
    tower = connectors.TwoTower(tower_run.trained)
    vectors = tower.vectors(tower_run.index(data.catalogue, progress=False), data.items.raw)
    search, k = connectors.BruteForce(*vectors), min(1000, options.items // 4)
    figures: dict[str, Any] = {"retrieval_recall1000": recall(tower, search, data, k, options), "retrieval_k": k}
    figures |= {"items": len(search), "server": url is not None, "history": options.history, "rate": options.rate}
    versions: dict[Any, int] = {}  # of the record of each request, by its context

    def encode(request: Request, record: Any, now: Any) -> Any:
        versions[request.context] = 0 if record is None else record.version
        assert run.encoder is not None
        return run.encoder.user(*((None, None) if record is None else record[:2]), now)

    fetch = connectors.Fetch(parts.source, encode=encode, now=lambda request: int(time.time()) + 1)
    retrieval = connectors.Retrieval(fetch, tower, search, k=k)
    store = connectors.SnapshotStore(folder / "store")
    writer = IndexWriter.start(
        folder / "index", run.index(data.catalogue, progress=False), every_updates=None, every_seconds=5.0
    )
    config = ServingConfig(buckets=(256, 1024) if k > 256 else (256,), max_k=64)
    async with AsyncPreRanker(
        run.trained, writer.index, features=fetch, retrieval=retrieval, config=config, states=parts.states
    ) as engine:
        figures |= await fetches(engine, parts, data, options)
        figures |= await alone(engine, data, options)
        under_writes = Writes(engine, writer, store, parts, data, counts, versions, options)
        figures |= await under_writes.run()
    writer.close()
    await parts.close()
    return figures, under_writes.typical()


def fill(sink: Any, data: Dataset, options) -> dict[Any, int]:
    """Puts every user's events into the store, older ones repeated up to the length; returns how many each has."""
    log, columns, counts = data.log, data.encoder.columns, {}
    for user in track(range(1, log.users), label="store", unit="users", leave=False):
        at = np.arange(log.offsets[user], log.offsets[user + 1])
        at = np.concatenate([np.resize(at, max(0, options.history - len(at))), at])
        name = data.users.raw[user - 1].item()
        raw = {columns.user: [name] * len(at), columns.item: data.items.raw[log.item[at] - 1], columns.time: log.time[at]}
        sink.update(raw if columns.action is None else raw | {columns.action: log.action[at]})
        counts[name] = len(at)
    return counts


def recall(tower: connectors.TwoTower, search: connectors.BruteForce, data: Dataset, k: int, options) -> float:
    """The share of the last items of users that are among the k that retrieval finds before."""
    log = data.log
    ends = log.offsets[2:] - 1
    found = []
    for position in ends[: 20 if options.smoke else 1000]:
        features = data.user_features(np.array([position]), length=tower.encoder.length)
        one = jax.tree.map(lambda leaf: leaf[0], features)
        ids = search(tower.query(one), k).ids
        found.append(data.items.raw[log.item[position] - 1] in ids)
    return float(np.mean(found))


async def fetches(engine: AsyncPreRanker, parts: Parts, data: Dataset, options) -> dict[str, Any]:
    """Milliseconds of reading a user, and a state, one at a time."""
    users = [data.users.raw[n % (len(data.users) - 1)].item() for n in range(options.reads)]
    version = engine.metrics()["version"]
    side = engine._current.unknown[0]  # type: ignore[union-attr]
    state = to_bytes(np.asarray(side.state.words), side.state.layout, side.layout, age=0.0)
    await parts.states.put(key := StateKey("someone", 1, version), state)
    seconds: dict[str, list[float]] = {"feature": [], "state": []}
    for user in users:
        for name, call in (("feature", parts.source.get(user)), ("state", parts.states.get(key))):
            start = time.perf_counter()
            assert await call is not None
            seconds[name].append(time.perf_counter() - start)
    figures = {f"{name}_fetch_p50_ms": float(np.median(times)) * 1e3 for name, times in seconds.items()}
    return figures | {"state_bytes": len(state)}


async def alone(engine: AsyncPreRanker, data: Dataset, options) -> dict[str, Any]:
    """Milliseconds of rankings one at a time, and of rankings whose user was prepared before."""
    rankings: dict[str, list[Any]] = {"alone": [], "prepared": []}
    for number in range(options.reads):
        user = data.users.raw[number % (len(data.users) - 1)].item()
        rankings["alone"].append(await engine.rank(Request(user=user, context="alone"), 10))
        known = Request(user=user, context="alone", feature_version="alone")  # no later request has it
        await engine.prepare(known)
        rankings["prepared"].append(await engine.rank(known, 10))
    return {f"{how}_{name}": value for how, some in rankings.items() for name, value in stages(some).items()}


if __name__ == "__main__":
    main()
