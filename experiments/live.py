"""The main job with real neighbours: a feature store, update streams, retrieval, snapshots, and the freshness of it all.

Claim     With features in a server and retrieval by a two-tower model the user side hides behind retrieval; a change of an item
          and an event of a user are in a ranking within a second (p99), at 1,000 of each a second.
Command   python -m experiments.live --json live.json --figure live.png      (or --smoke; --help lists all)
Time      5 minutes on 2 CPU cores
Parts     Valkey or Redis where it is installed, else what the package has in memory: users (`ValkeyFeatures`), states
          (`ValkeyStates`), two update streams (`ValkeyStream`). Retrieval: `presets.two_tower` trained on the same samples, the
          1,000 best by `BruteForce`. Snapshots of the index go to a `SnapshotStore` in a temporary folder.
Data      The synthetic world; users' histories in the store are filled up with older events to --history.
Method    Fetches: one at a time, nothing else at work. Then three threads write item changes, write user events and apply both
          streams, while requests come one after another, each for the user whose event has waited longest. Freshness: from the
          write of a change to the end of the first ranking that started after the engine took the index with it; from the write
          of an event to the end of the first ranking of its user whose record holds it. Critical path and request: of rankings
          under these writes. Recall: the share of held-out next items among the candidates.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

import aif_jax as aif
from aif_jax import neighbours
from aif_jax.data.dataset import Dataset
from aif_jax.index import IndexWriter, ItemIndex
from aif_jax.serving import AsyncPreRanker, Request, ServingConfig, StateKey, Timeline
from aif_jax.serving.shared import to_bytes
from experiments import common, timelines
from experiments.datasets.synthetic import synthetic_world

SMOKE: dict[str, Any] = dict(width=16, towers=(16,), head=(16,))


def main(arguments: list[str] | None = None) -> None:
    """Runs the job and prints its figures."""
    options = parse(arguments)
    data = synthetic_world(0, users=options.users, items=options.items, events_per_user=options.events).dataset
    small = SMOKE if options.smoke else {}
    towers = {key: value for key, value in small.items() if key != "head"}
    runs = {
        "aif": aif.fit(
            aif.build(aif.presets.aif(data.schema, long_length=options.history, **small)), data, requests=200, k=None
        ),
        "two_tower": aif.fit(aif.build(aif.presets.two_tower(data.schema, **towers)), data, requests=200, k=None),
    }
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
    parser = common.parser(__doc__)
    parser.add_argument("--figure", metavar="PNG", type=Path, help="picture of a typical request")
    parser.add_argument("--users", type=int, default=1000, help="default %(default)s")
    parser.add_argument("--items", type=int, default=20_000, help="default %(default)s")
    parser.add_argument("--events", type=int, default=200, help="of a user, to train on (default %(default)s)")
    parser.add_argument("--history", type=int, default=4096, help="events of a user in the store (default %(default)s)")
    parser.add_argument("--rate", type=int, default=1000, help="item changes and user events a second (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="under writes (default %(default)s)")
    parser.add_argument("--reads", type=int, default=500, help="fetches that are timed (default %(default)s)")
    parser.add_argument("--embedded", action="store_true", help="no server, although there is one")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.users, options.items, options.events, options.history = 60, 300, 100, 64
        options.rate, options.seconds, options.reads = 100, 2.0, 20
    return options


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
        layout = neighbours.EventLayout.of(encoder)
        if url is None:
            self.source = self.sink = neighbours.MemoryFeatures(layout, length=length)
            self.states: Any = MemoryStates()
            self.items: Any = neighbours.MemoryStream()
            self.events: Any = neighbours.MemoryStream()
            return
        import redis
        from redis import asyncio as aioredis

        client = aioredis.Redis.from_url(url)
        self.source = neighbours.ValkeyFeatures(client, layout, length=length)
        self.sink = neighbours.ValkeyFeatureWriter(redis.Redis.from_url(url), layout, length=length)
        self.states = neighbours.ValkeyStates(client, timeout=1.0)
        self.items, self.events = (neighbours.ValkeyStream(redis.Redis.from_url(url), [key]) for key in ("items", "events"))


class Watch:
    """When changes were written, and when a ranking first had them; used from several threads."""

    def __init__(self):
        self.waiting: dict[Any, list[tuple[int, float]]] = {}  # by user, or None for items: (number, when), in order
        self.seconds: list[float] = []
        self._lock = threading.Lock()

    def wrote(self, whose: Any, number: int) -> None:
        """A change was written now."""
        with self._lock:
            self.waiting.setdefault(whose, []).append((number, time.perf_counter()))

    def saw(self, whose: Any, number: int | None) -> None:
        """A ranking that had the changes up to that number has ended."""
        with self._lock:
            waiting = self.waiting.get(whose, [])
            seen = [when for n, when in waiting if number is not None and n <= number]
            self.waiting[whose] = waiting[len(seen) :]
            self.seconds += [time.perf_counter() - when for when in seen]

    def longest(self) -> Any:
        """Whose change has waited longest; None for nobody's."""
        with self._lock:
            first = {whose: changes[0][1] for whose, changes in self.waiting.items() if changes}
        return min(first, key=first.__getitem__, default=None)


async def live(
    runs: dict[str, aif.Run], data: Dataset, url: str | None, folder: Path, options
) -> tuple[dict[str, Any], Timeline]:
    """All figures, and the timeline of the ranking of median time."""
    run, tower_run = runs["aif"], runs["two_tower"]
    assert run.encoder is not None and tower_run.encoder is not None
    parts = Parts(url, run.encoder, options.history)
    counts = fill(parts.sink, data, options)
    tower = neighbours.TwoTower(tower_run.model, tower_run.params, encoder=tower_run.encoder)
    vectors = tower.vectors(tower_run.index(data.catalogue, progress=False), data.items.raw)
    search, k = neighbours.BruteForce(*vectors), min(1000, options.items // 4)
    figures: dict[str, Any] = {"retrieval_recall1000": recall(tower, search, data, k, options), "retrieval_k": k}
    versions: dict[Any, int] = {}

    def encode(request: Request, record: Any, now: Any) -> Any:
        versions[request.context] = 0 if record is None else record.version
        assert run.encoder is not None
        return run.encoder.user(*((None, None) if record is None else record[:2]), now)

    fetch = neighbours.Fetch(parts.source, encode=encode, now=lambda request: int(time.time()) + 1)
    retrieval = neighbours.Retrieval(fetch, tower, search, k=k)
    store = neighbours.SnapshotStore(folder / "store")
    writer = IndexWriter.start(
        folder / "index", run.index(data.catalogue, progress=False), every_updates=None, every_seconds=5.0
    )
    config = ServingConfig(buckets=(256, 1024) if k > 256 else (256,), max_k=64)
    async with AsyncPreRanker(
        run.model, run.params, writer.index, features=fetch, retrieval=retrieval, config=config, states=parts.states
    ) as engine:
        figures |= await fetches(engine, parts, data, options)
        under_writes = Writes(engine, writer, store, parts, data, counts, options)
        figures |= await under_writes.run(versions)
    writer.close()
    figures |= {"server": url is not None, "history": options.history, "rate": options.rate}
    return figures, under_writes.typical()


def fill(sink: Any, data: Dataset, options) -> dict[Any, int]:
    """Puts every user's events into the store, older ones repeated up to the length; returns how many each has."""
    log, columns, counts = data.log, data.encoder.columns, {}
    for user in tqdm(range(1, log.users), desc="store", leave=False):
        at = np.arange(log.offsets[user], log.offsets[user + 1])
        at = np.concatenate([np.resize(at, max(0, options.history - len(at))), at])
        name = data.users.raw[user - 1].item()
        raw = {columns.user: [name] * len(at), columns.item: data.items.raw[log.item[at] - 1], columns.time: log.time[at]}
        sink.update(raw if columns.action is None else raw | {columns.action: log.action[at]})
        counts[name] = len(at)
    return counts


def recall(tower: neighbours.TwoTower, search: neighbours.BruteForce, data: Dataset, k: int, options) -> float:
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
    state = to_bytes(np.asarray(side.state.words), side.state.layout, side.form, age=0.0)
    await parts.states.put(key := StateKey("someone", 1, version), state)
    seconds: dict[str, list[float]] = {"feature": [], "state": []}
    for user in users:
        for name, call in (("feature", parts.source.get(user)), ("state", parts.states.get(key))):
            start = time.perf_counter()
            assert await call is not None
            seconds[name].append(time.perf_counter() - start)
    figures = {f"{name}_fetch_p50_ms": float(np.median(times)) * 1e3 for name, times in seconds.items()}
    return figures | {"state_bytes": len(state)}


class Writes:
    """Threads that write and apply changes, and the requests meanwhile."""

    def __init__(self, engine: AsyncPreRanker, writer: IndexWriter, store: Any, parts: Parts, data: Dataset, counts, options):
        self.engine, self.writer, self.parts, self.data, self.counts, self.options = (
            engine,
            writer,
            parts,
            data,
            counts,
            options,
        )
        self.items, self.users = Watch(), Watch()
        self.loop = asyncio.get_running_loop()
        self.visible = -1  # number of the last item message in the engine's index
        self.numbers: dict[int, int] = {}  # position of an item message to its number
        self.rankings: list[Any] = []
        self.failures: list[BaseException] = []
        self._stop = threading.Event()
        self._updating: Any = None
        self.followers = (
            neighbours.Follower(parts.items, neighbours.IndexTarget(writer, data.encoder), changed=self.publish, store=store),
            neighbours.Follower(parts.events, neighbours.SinkTarget(parts.sink)),
        )

    async def run(self, versions: dict[Any, int]) -> dict[str, Any]:
        """Figures under writes."""
        work = [
            self.write_items,
            self.write_events,
            *(lambda f=f: f.run(self._stop.is_set, seconds=0.02) for f in self.followers),
        ]
        threads = [threading.Thread(target=self._guarded, args=(function,), daemon=True) for function in work]
        for thread in threads:
            thread.start()
        until, number = time.perf_counter() + self.options.seconds, 0
        try:
            while time.perf_counter() < until and not self.failures:
                user = self.users.longest()
                if user is None:
                    await asyncio.sleep(0.001)
                    continue
                number, visible = number + 1, self.visible
                ranking = await self.engine.rank(Request(user=user, context=number), 10)
                self.items.saw(None, visible)
                self.users.saw(user, versions.pop(number, None))
                self.rankings.append(ranking)
        finally:
            self._stop.set()
            for thread in threads:
                await asyncio.to_thread(thread.join, 30)
        if self.failures:
            raise self.failures[0]
        stages = [ranking.stages for ranking in self.rankings]
        late = [stage.get("wait_user", 0.0) for stage in stages]
        return {
            "item_freshness_p99_s": quantile(self.items.seconds, 0.99),
            "item_freshness_p50_s": quantile(self.items.seconds, 0.5),
            "user_freshness_p99_s": quantile(self.users.seconds, 0.99),
            "user_freshness_p50_s": quantile(self.users.seconds, 0.5),
            "critical_p50_ms": quantile([stage["critical"] for stage in stages], 0.5) * 1e3,
            "request_p50_ms": quantile([stage["total"] for stage in stages], 0.5) * 1e3,
            "retrieval_p50_ms": quantile([stage["retrieval"] for stage in stages], 0.5) * 1e3,
            "waited_for_user_p50_ms": quantile(late, 0.5) * 1e3,
            "rankings": len(self.rankings),
            "degraded": sum(ranking.degraded for ranking in self.rankings),
            "item_messages_applied": self.followers[0].counters["applied"],
            "event_messages_applied": self.followers[1].counters["applied"],
            "rejected": sum(follower.counters["rejected"] for follower in self.followers),
            "snapshots_published": self.followers[0].counters["published"],
        }

    def typical(self) -> Timeline:
        """The timeline of the ranking of median time."""
        ordered = sorted(self.rankings, key=lambda ranking: ranking.stages["total"])
        return ordered[len(ordered) // 2].timeline

    def publish(self) -> None:
        """Hands the newest index to the engine, one at a time; called by the follower's thread."""
        if self._updating is not None:
            self._updating.result(60)
        position = self.writer.positions.get(0)
        reached = max((number for place, number in list(self.numbers.items()) if place <= position), default=-1)
        self._updating = asyncio.run_coroutine_threadsafe(self._publish(self.writer.index, reached), self.loop)

    async def _publish(self, index: ItemIndex, number: int) -> None:
        await self.engine.update_index(index)
        self.visible = max(self.visible, number)

    def write_items(self) -> None:
        """Item changes at the rate: known items with another content."""
        data, encoder = self.data, self.data.encoder
        rng, schema = np.random.default_rng(1), data.schema
        categories = encoder.vocabularies["category"].raw
        for number, count in self._paced():
            rows = rng.integers(1, len(data.items) + 0, count)
            table: dict[str, Any] = {encoder.columns.item_id: data.items.raw[rows - 1]}
            table[encoder.columns.category] = categories[data.catalogue.ids["category"][rows] - 1]
            if schema.content:
                table[encoder.columns.content or "content"] = list(data.catalogue.content[rows])
            self.numbers[self.parts.items.send(neighbours.encode(table))] = number
            self.items.wrote(None, number)

    def write_events(self) -> None:
        """User events at the rate, one message each."""
        data, columns = self.data, self.data.encoder.columns
        rng = np.random.default_rng(2)
        for _, count in self._paced():
            for _ in range(count):
                user = data.users.raw[rng.integers(len(data.users) - 1)].item()
                event = {columns.user: [user], columns.item: [data.items.raw[rng.integers(len(data.items) - 1)]]}
                event |= {columns.time: [int(time.time())]} | ({} if columns.action is None else {columns.action: [1]})
                self.counts[user] += 1
                self.parts.events.send(neighbours.encode(event))
                self.users.wrote(user, self.counts[user])

    def _paced(self) -> Iterator[tuple[int, int]]:
        """(number, changes) every hundredth of a second, until the end."""
        start, number, done = time.perf_counter(), 0, 0
        while not self._stop.is_set():
            due = int((time.perf_counter() - start) * self.options.rate) - done
            if due > 0:
                yield number, due
                number, done = number + 1, done + due
            time.sleep(0.01)

    def _guarded(self, function: Any) -> None:
        try:
            function()
        except BaseException as error:
            self.failures.append(error)


def quantile(seconds: list[float], share: float) -> float:
    """A quantile; infinite of nothing."""
    return float(np.quantile(seconds, share)) if seconds else float("inf")


if __name__ == "__main__":
    main()
