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
          item changes and user events and apply both streams (`Writes`), while requests come one after
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
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import aif_jax as aif
from aif_jax import Dataset, IndexWriter, ItemIndex, connectors
from aif_jax.output import track
from aif_jax.serving import AsyncPreRanker, Request, ServingConfig, StateKey, Timeline
from aif_jax.serving.users import to_bytes
from experiments import common, services
from experiments.datasets.synthetic import synthetic_world
from experiments.scale_out.replicas import free_port

SMOKE: dict[str, Any] = dict(width=8, towers=(8,), short_length=8)
BUCKETS = (64, 128, 256, 512, 1024)
"""Lengths of histories in training."""


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Runs the job and prints its figures."""
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
    options = common.options(__doc__, arguments, settings, figure="picture of a typical request (PNG)")
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
    if options.figure:
        services.draw({f"a ranking over {'Valkey' if url else 'memory'}, median of all": example}, options.figure)
    common.report(figures, options.json)


@contextlib.contextmanager
def server(embedded: bool) -> Iterator[str | None]:
    """The URL of a Valkey or Redis server on a free port of this machine; None where none is installed."""
    program = None if embedded else shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        yield None
        return
    import redis

    port = free_port()
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


# under writes

POLL = 0.02  # seconds that a follower waits for messages
DRAIN = 30.0  # seconds that the followers have for what is left at the end


class Change(NamedTuple):
    """A change that was written."""

    position: int  # in its stream
    when: float  # before it was written, by `time.perf_counter`
    user: Any = None  # whose event it is
    number: int = 0  # of the user's events with this one


def upto(waiting: deque[Change], position: int | None) -> list[Change]:
    """Takes out the changes up to a position; they are in the order of their positions, and another thread adds to them."""
    taken = []
    while position is not None and waiting and waiting[0].position <= position:
        taken.append(waiting.popleft())
    return taken


class Queue:
    """Users whose events no ranking of the usual requests has had yet; used from several threads."""

    def __init__(self):
        self.seconds: list[float] = []
        self._waiting: dict[Any, deque[Change]] = {}
        self._lock = threading.Lock()

    def add(self, change: Change) -> None:
        """An event was written."""
        with self._lock:
            self._waiting.setdefault(change.user, deque()).append(change)

    def next(self) -> Any:
        """Whose event has waited longest; None for nobody's."""
        with self._lock:
            first = {user: changes[0].when for user, changes in self._waiting.items() if changes}
        return min(first, key=first.__getitem__, default=None)

    def saw(self, user: Any, number: int) -> None:
        """A ranking of the user that had so many events has ended."""
        now = time.perf_counter()
        with self._lock:
            changes = self._waiting[user]
            while changes and changes[0].number <= number:
                self.seconds.append(now - changes.popleft().when)


class Writes:
    """Threads that write changes and apply them, the requests meanwhile, and the figures of both.

    Args:
      engine: that ranks.
      writer: of its index, which is saved and published to `store`.
      parts: streams and feature store.
      counts: events of each user in the feature store.
      versions: of the record of each request by its context, which the engine's `features` fills.
    """

    def __init__(
        self, engine: AsyncPreRanker, writer: IndexWriter, store: Any, parts: Any, data: Dataset, counts: dict[Any, int],
        versions: dict[Any, int], options: Any,
    ):  # fmt: skip
        self.engine, self.writer, self.parts, self.data, self.options = engine, writer, parts, data, options
        self.counts, self.versions = counts, versions
        self.rankings: list[Any] = []
        self._loop, self._tasks = asyncio.get_running_loop(), asyncio.TaskGroup()
        self._items: deque[Change] = deque()
        self._events: deque[Change] = deque()
        self._queue = Queue()
        self._served: int | None = None  # position of the last item message in the engine's index
        self._seconds: dict[str, list[float]] = {"item_freshness": [], "user_freshness": [], "user_applied": []}
        self._cores: dict[str, float] = {}  # seconds of CPU time of each thread
        self._written = {"items": 0, "events": 0}
        self._probes: set[asyncio.Task[None]] = set()
        self._probed = self._again = 0
        self._end_writing, self._end = threading.Event(), threading.Event()
        self._updating: Any = None
        self._followers = {
            "item follower": connectors.Follower(
                parts.items, connectors.IndexTarget(writer), changed=self._publish, store=store
            ),
            "event follower": connectors.Follower(parts.events, connectors.SinkTarget(parts.sink)),
        }

    async def run(self) -> dict[str, Any]:
        """Figures under writes."""
        work: dict[str, Callable[[], Any]] = {"item writer": self._write_items, "event writer": self._write_events}
        work |= {name: partial(self._follow, follower) for name, follower in self._followers.items()}
        start = time.perf_counter()
        async with self._tasks:
            running = {name: self._tasks.create_task(asyncio.to_thread(self._timed, name, f)) for name, f in work.items()}
            try:
                while (seconds := time.perf_counter() - start) < self.options.seconds:
                    if (user := self._queue.next()) is None:
                        await asyncio.sleep(0.001)
                    else:
                        self._queue.saw(user, await self._rank(user))
                self._end_writing.set()
                await asyncio.wait([running["item writer"], running["event writer"]])
                until = time.perf_counter() + DRAIN
                while (self._items or self._events or self._probes) and time.perf_counter() < until:
                    await self._rank(self.data.users.raw[0].item())  # what is left shows itself by further rankings
            finally:
                self._end_writing.set()
                self._end.set()
                for probe in list(self._probes):
                    probe.cancel()
        return self._figures(seconds)

    def typical(self) -> Timeline:
        """The timeline of the ranking of median time."""
        ordered = sorted(self.rankings, key=lambda ranking: ranking.stages["total"])
        return ordered[len(ordered) // 2].timeline

    def _figures(self, seconds: float) -> dict[str, Any]:
        counters = {name: follower.counters for name, follower in self._followers.items()}
        figures = {
            f"{name}_{label}_s": quantile(some, share)
            for name, some in (*self._seconds.items(), ("user_queue", self._queue.seconds))
            for label, share in (("p99", 0.99), ("p50", 0.5))
        }
        return {
            **figures,
            **stages(self.rankings),
            "rankings": len(self.rankings),
            "rankings_per_s": len(self.rankings) / seconds,
            "degraded": sum(ranking.degraded for ranking in self.rankings),
            "item_changes_per_s": self._written["items"] / seconds,
            "user_events_per_s": self._written["events"] / seconds,
            "changes_not_seen": len(self._items) + len(self._events),
            "probes": self._probed,
            "probes_sent_again": self._again,
            "cores": {name: spent / seconds for name, spent in self._cores.items()},
            "item_messages_applied": counters["item follower"]["applied"],
            "event_messages_applied": counters["event follower"]["applied"],
            "rejected": sum(counted["rejected"] for counted in counters.values()),
            "snapshots_published": counters["item follower"]["published"],
        }

    async def _rank(self, user: Any) -> int:
        """Ranks for a user; returns how many events the record had. What the index had was seen then."""
        context, served = object(), self._served
        ranking = await self.engine.rank(Request(user=user, context=context), 10)
        now = time.perf_counter()
        self._seconds["item_freshness"] += [now - change.when for change in upto(self._items, served)]
        self.rankings.append(ranking)
        return self.versions.pop(context, 0)

    async def _probe(self, change: Change) -> None:
        """Ranks for the user of an event until a ranking has it."""
        while await self._rank(change.user) < change.number:
            self._again += 1
        self._seconds["user_freshness"].append(time.perf_counter() - change.when)

    def _start_probe(self, change: Change) -> None:
        if not self._end.is_set():
            task = self._tasks.create_task(self._probe(change))
            self._probes.add(task)
            task.add_done_callback(self._probes.discard)

    def _follow(self, follower: connectors.Follower) -> None:
        """Applies a stream until the end."""
        while not self._end.is_set():
            follower.step(POLL)
            if follower is self._followers["event follower"]:
                self._applied(follower.target.positions.get(0))

    def _applied(self, position: int | None) -> None:
        """Notes that the events up to a position are in the feature store now."""
        now = time.perf_counter()
        for change in upto(self._events, position):
            self._seconds["user_applied"].append(now - change.when)
            if len(self._seconds["user_applied"]) % self.options.probe == 0:
                self._probed += 1
                self._loop.call_soon_threadsafe(self._start_probe, change)

    def _publish(self) -> None:
        """Hands the newest index to the engine, one at a time; called by the follower's thread."""
        if self._updating is not None:
            self._updating.result(600)
        given = self._serve(self.writer.index, self.writer.positions[0])
        self._updating = asyncio.run_coroutine_threadsafe(given, self._loop)

    async def _serve(self, index: ItemIndex, position: int) -> None:
        await self.engine.update_index(index)
        self._served = position

    def _write_items(self) -> None:
        """Item changes at the rate: known items with another content."""
        data, encoder = self.data, self.data.encoder
        rng, schema = np.random.default_rng(1), data.schema
        categories = encoder.vocabularies["category"].raw
        for count in self._paced():
            rows = rng.integers(1, len(data.items), count)
            table: dict[str, Any] = {encoder.columns.item_id: data.items.raw[rows - 1]}
            table[encoder.columns.category] = categories[data.catalogue.ids["category"][rows] - 1]
            if schema.content:
                table[encoder.columns.content or "content"] = list(data.catalogue.content[rows])
            when = time.perf_counter()
            self._items.append(Change(self.parts.items.send(connectors.encode(table)), when))
            self._written["items"] += count

    def _write_events(self) -> None:
        """User events at the rate, one message each; those that are due are written in one round trip."""
        data, columns = self.data, self.data.encoder.columns
        rng = np.random.default_rng(2)
        for count in self._paced():
            users = [data.users.raw[n].item() for n in rng.integers(0, len(data.users) - 1, count)]
            items, when, values = rng.integers(0, len(data.items) - 1, count), time.perf_counter(), []
            for user, item in zip(users, items, strict=True):
                event = {columns.user: [user], columns.item: [data.items.raw[item]], columns.time: [int(time.time())]}
                values.append(connectors.encode(event | ({} if columns.action is None else {columns.action: [1]})))
            for user, position in zip(users, self.parts.events.send_many(values), strict=True):
                self.counts[user] += 1
                change = Change(position, when, user, self.counts[user])
                self._events.append(change)
                self._queue.add(change)
            self._written["events"] += count

    def _paced(self) -> Iterator[int]:
        """How many changes are due, every hundredth of a second until the end."""
        start, done = time.perf_counter(), 0
        while not self._end_writing.is_set():
            due = int((time.perf_counter() - start) * self.options.rate) - done
            if due > 0:
                yield due
                done += due
            time.sleep(0.01)

    def _timed(self, name: str, function: Callable[[], Any]) -> None:
        """Counts the CPU time of what a thread does."""
        start = time.thread_time()
        function()
        self._cores[name] = time.thread_time() - start


def stages(rankings: list[Any]) -> dict[str, float]:
    """Medians over rankings, in milliseconds: when user side and retrieval were there, the critical path, the whole request."""
    ends = {"user_side": ("features", "user", "shared"), "retrieval": ("retrieval",)}
    figures = {
        f"{name}_p50_ms": [max((s.end for s in r.timeline.spans if s.stage in of), default=0.0) for r in rankings]
        for name, of in ends.items()
    }
    seconds = [ranking.stages for ranking in rankings]
    for name, stage in (("waited_for_user", "wait_user"), ("critical", "critical"), ("request", "total")):
        figures[f"{name}_p50_ms"] = [one.get(stage, 0.0) for one in seconds]
    return {name: quantile(values, 0.5) * 1e3 for name, values in figures.items()}


def quantile(seconds: list[float], share: float) -> float:
    """A quantile; infinite of nothing."""
    return float(np.quantile(seconds, share)) if seconds else float("inf")


if __name__ == "__main__":
    main()
