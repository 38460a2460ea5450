"""The part of `experiments.live` that runs under writes: threads that write and apply changes, the requests meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from aif_jax import connectors
from aif_jax.data.dataset import Dataset
from aif_jax.index import IndexWriter, ItemIndex
from aif_jax.serving import AsyncPreRanker, Request, Timeline

POLL = 0.02  # seconds that a follower waits for messages
DRAIN = 30.0  # seconds that the followers have for what is left at the end


class Change(NamedTuple):
    """A change that was written."""

    position: int  # in its stream
    when: float  # before it was written, by `time.perf_counter`
    user: Any = None  # whose event it is
    number: int = 0  # of the user's events with this one


class Waiting:
    """Changes by rising position; one thread adds, another takes."""

    def __init__(self):
        self._changes: deque[Change] = deque()

    def __len__(self) -> int:
        return len(self._changes)

    def add(self, change: Change) -> None:
        """Adds the next change."""
        self._changes.append(change)

    def upto(self, position: int | None) -> list[Change]:
        """Takes the changes up to a position out."""
        taken = []
        while position is not None and self._changes and self._changes[0].position <= position:
            taken.append(self._changes.popleft())
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
        self._loop = asyncio.get_running_loop()
        self._items, self._events, self._queue = Waiting(), Waiting(), Queue()
        self._served: int | None = None  # position of the last item message in the engine's index
        self._seconds: dict[str, list[float]] = {"item_freshness": [], "user_freshness": [], "user_applied": []}
        self._cores: dict[str, float] = {}  # seconds of CPU time of each thread
        self._written = {"items": 0, "events": 0}
        self._probes: set[asyncio.Task[None]] = set()
        self._probed = self._again = 0
        self._failures: list[BaseException] = []
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
        threads = {
            name: threading.Thread(target=self._guarded, args=(name, function), name=name, daemon=True)
            for name, function in work.items()
        }
        start = time.perf_counter()
        for thread in threads.values():
            thread.start()
        try:
            while time.perf_counter() - start < self.options.seconds and not self._failures:
                if (user := self._queue.next()) is None:
                    await asyncio.sleep(0.001)
                else:
                    self._queue.saw(user, await self._rank(user))
            seconds = time.perf_counter() - start
            self._end_writing.set()
            for name in ("item writer", "event writer"):
                await asyncio.to_thread(threads[name].join, DRAIN)
            until = time.perf_counter() + DRAIN
            while self._items or self._events or self._probes:  # what is left shows itself by further rankings
                await self._rank(self.data.users.raw[0].item())
                if self._failures or time.perf_counter() > until:
                    break
        finally:
            self._end_writing.set()
            self._end.set()
            for thread in threads.values():
                await asyncio.to_thread(thread.join, DRAIN)
        if self._failures:
            raise self._failures[0]
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
        self._seconds["item_freshness"] += [now - change.when for change in self._items.upto(served)]
        self.rankings.append(ranking)
        return self.versions.pop(context, 0)

    async def _probe(self, change: Change) -> None:
        """Ranks for the user of an event until a ranking has it."""
        while await self._rank(change.user) < change.number:
            self._again += 1
        self._seconds["user_freshness"].append(time.perf_counter() - change.when)

    def _start_probe(self, change: Change) -> None:
        task = self._loop.create_task(self._probe(change))
        self._probes.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._probes.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failures.append(error)

    def _follow(self, follower: connectors.Follower) -> None:
        """Applies a stream until the end."""
        while not self._end.is_set():
            follower.step(POLL)
            if follower is self._followers["event follower"]:
                self._applied(follower.target.positions.get(0))

    def _applied(self, position: int | None) -> None:
        """Notes that the events up to a position are in the feature store now."""
        now = time.perf_counter()
        for change in self._events.upto(position):
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
            self._items.add(Change(self.parts.items.send(connectors.encode(table)), when))
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
                self._events.add(change)
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

    def _guarded(self, name: str, function: Callable[[], Any]) -> None:
        try:
            function()
        except BaseException as error:
            self._failures.append(error)
        finally:
            self._cores[name] = time.thread_time()


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
