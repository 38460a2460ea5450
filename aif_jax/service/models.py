"""The model versions of a service: loaded and compiled while others serve, verified, swapped, kept, retired.

Which exports serve, `service.current` says; nearline jobs may bring newer indices:

    index/000001-0000000042/         a snapshot of `aif-jax index follow`; the newest one serves
    index/2026-11-26/000001-.../     the same for the export of that name, where several versions serve
"""

import asyncio
import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aif_jax.checks import ArgumentError, expect
from aif_jax.connectors.features import FeatureSource, Fetch
from aif_jax.connectors.snapshot_store import SnapshotStore
from aif_jax.export import ExportError, RestoredModel, restore
from aif_jax.index import ItemIndex, inspect
from aif_jax.index.writer import snapshots
from aif_jax.scores import objective_names
from aif_jax.service.calls import Call, Failure
from aif_jax.service.current import CURRENT, ExportEntry, mirror, path_of, read_current
from aif_jax.service.features import UserSource
from aif_jax.serving import AsyncPreRanker, ServingConfig
from aif_jax.store.sealed import MANIFEST, is_complete
from aif_jax.store.trained import Trained

logger = logging.getLogger(__name__)


class SavedIndex(NamedTuple):
    """A snapshot of the index that a nearline job wrote."""

    path: Path  # of the snapshot
    seconds: float  # when it was written, since 1970
    positions: Mapping[int, int]  # in the stream, by partition


def newest(root: Path, folder: str) -> Path | None:
    """Return the newest snapshot for the export in `folder`, or of every version; None where the job has written none yet."""
    for place in (root / folder, root):
        if is_complete(place):
            return place
        if found := snapshots(place):
            return found[-1]
    return None


def newer(root: Path, folder: str, before: SavedIndex | None, trained: Trained) -> tuple[ItemIndex, SavedIndex] | None:
    """Return the newest `ItemIndex` of a model, None for none but the one before. Raises what `ItemIndex.load` raises."""
    path = newest(root, folder)
    if path is None or (before is not None and path == before.path):
        return None
    index, positions = ItemIndex.load(path, trained), inspect(path).positions
    seconds = (path / MANIFEST).stat().st_mtime  # never before the snapshot before it, even if its writer's clock was set back
    return index, SavedIndex(path, seconds if before is None else max(seconds, before.seconds), positions)


MIN_PREFIX = 8  # digits of a version that a caller may give in place of all 64
MAX_WAIT = 30.0  # seconds between two tries of what cannot be taken over


@dataclasses.dataclass(eq=False)
class LoadedModel:
    """One version with its engine."""

    entry: ExportEntry
    restored: RestoredModel
    engine: AsyncPreRanker
    users: UserSource
    exported: float  # when the manifest of the export was written, in seconds since 1970
    index_from: SavedIndex | None = None  # the nearline snapshot of the index; None for that of the export

    @property
    def version(self) -> str:
        """Fingerprint of params, config and encoder."""
        return self.restored.trained.version

    @functools.cached_property
    def objectives(self) -> tuple[str, ...]:
        """Names of the logits, in their order."""
        return objective_names(self.restored.trained.config.objectives)

    @property
    def age(self) -> float:
        """Seconds since the export."""
        return max(0.0, time.time() - self.exported)

    @property
    def index_age(self) -> float:
        """Seconds since the index was written."""
        return self.age if self.index_from is None else max(0.0, time.time() - self.index_from.seconds)

    def status(self) -> dict[str, Any]:
        """Return what it is, how old, and what it has answered since it was loaded."""
        metrics = self.engine.metrics()
        counts, stages = metrics["counters"], metrics["stages"].items()
        return {
            "version": self.version,
            "age": self.age,
            "index_age": self.index_age,
            "index_positions": None if self.index_from is None else self.index_from.positions,
            "items": len(self.restored.index or ()),
            "answered": counts.get("answered", 0),
            "degraded": counts.get("degraded", 0),
            "stages": {stage: {"p50": seconds["p50"], "p99": seconds["p99"]} for stage, seconds in stages},
        }


class Retry(NamedTuple):
    """A failure to take something over, and when it is tried again."""

    text: str
    wait: float  # seconds between the last try and the next one
    until: float  # when it is tried again, by the monotonic clock


class Models:
    """Loads and swaps the model versions that a folder names. Not thread-safe: use it from the event loop.

    Args:
      root: an export, or exports with a file `current` that says which serve.
      config: config of every engine; its orders come on top of those of the export.
      only: the one folder to serve, whatever `current` says; None: as `current` says.
      keep: versions in memory that callers may name.
      source: source of features, for calls that bring an id alone.
      source_timeout: seconds for one read of the feature source; None: ServingConfig.callable_timeout.
      index: folder of index snapshots that `aif-jax index follow` writes, or a folder of such folders, named like the exports;
        None: the export's index.
      store: store whose current export is fetched into `root`, at once and whenever it changes; None: no store.
      poll: seconds between two looks at `current` and at the store.

    Raises:
      ArgumentError: numbers out of range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        config: ServingConfig | None = None,
        only: str | None = None,
        keep: int = 2,
        source: FeatureSource | None = None,
        source_timeout: float | None = None,
        index: Path | None = None,
        store: SnapshotStore | None = None,
        poll: float = 1.0,
    ):
        expect(keep >= 1, "keep", "at least 1", keep, error=ArgumentError)
        expect(poll > 0, "poll", "more than 0 seconds", poll, error=ArgumentError)
        good = source_timeout is None or source_timeout > 0
        expect(good, "source_timeout", "None or more than 0 seconds", source_timeout, error=ArgumentError)
        self.root = Path(root)
        self.config = config or ServingConfig()
        self.held: list[LoadedModel] = []  # the latest first
        self.shares: list[tuple[float, LoadedModel]] = []  # that serve, with their shares of the users
        self.publishes = self.failures = 0
        self.reads = None if source is None else Fetch(source, timeout=source_timeout)  # of all versions
        self._only, self._keep, self._poll = only, keep, poll
        self._index, self._store = index, store
        self._entries: list[ExportEntry] = []  # that serve
        self._failing: dict[str, Retry] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._followers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Load what serves and begin to follow. Raises what `restore` raises, or ValueError for an export without index.

        Without an export in the folder also what `mirror` raises.
        """
        if self._store is not None:
            try:
                await self._fetch(self._store)
            except Exception:  # of a store that is elsewhere: what was fetched before serves
                if not (self.root / CURRENT).is_file():
                    raise
        await self._swap()
        await self._catch_up()
        if self._index is not None and any(served.index_from is None for _, served in self.shares):
            logger.warning(
                "%s: expected a snapshot for each version, got none; until then that of the export serves", self._index
            )
        loop = asyncio.get_running_loop()
        self._followers = [loop.create_task(self._follow())]
        if self._store is not None:
            self._followers.append(loop.create_task(self._follow_store(self._store)))

    async def close(self) -> None:
        """Stop following, and drain every engine."""
        for follower in self._followers:
            follower.cancel()
        await asyncio.gather(*self._followers, return_exceptions=True)
        self.shares = []
        await asyncio.gather(*(served.engine.close() for served in self.held), *self._closing)
        self.held = []

    def pick(self, call: Call) -> LoadedModel:
        """Return the version that answers a call: the one that it names, else that of its user. Raises Failure."""
        if call.version is not None:
            return self.named(call.version)
        if len(self.shares) == 1:
            return self.shares[0][1]
        place = share_of(call.user)
        for share, served in self.shares:
            if place < share:
                return served
            place -= share
        if not self.shares:
            text = "version: expected one that serves, got none; try again once the service is ready"
            raise Failure("FAILED_PRECONDITION", 412, text, "version")
        return self.shares[0][1]  # rounding of the shares

    def named(self, version: str) -> LoadedModel:
        """Return the version in memory of that name or prefix, or of the folder of that name. Raises Failure."""
        for served in self.held:
            prefix = len(version) >= MIN_PREFIX and served.version.startswith(version)
            if prefix or self._name(served) == version:
                return served
        listed = ", ".join(f"{served.version[:12]} ({served.entry.folder or 'the served folder'})" for served in self.held)
        text = f"version: expected one of {listed or 'none'}, got {version!r}"
        raise Failure("FAILED_PRECONDITION", 412, text, "version")

    async def _load(self, entry: ExportEntry, restored: RestoredModel) -> LoadedModel:
        """Return a version ready to serve: compared with its golden outputs, compiled, warmed up."""
        before, trained = self.held[0] if self.held else None, restored.trained
        exported = (path_of(self.root, entry) / MANIFEST).stat().st_mtime
        await asyncio.to_thread(restored.check_golden)
        config = dataclasses.replace(self.config, orders={**restored.orders, **self.config.orders})
        same = before is not None and before.restored.trained.config == trained.config and before.engine.config == config
        users = UserSource(trained.need_encoder(entry.folder).with_length(trained.config.history_length), self.reads)
        like = before.engine if before is not None and same else None
        engine = AsyncPreRanker(trained, restored.index, features=users.fetch, config=config, compiled_from=like)
        await engine.__aenter__()
        return LoadedModel(entry, restored, engine, users, exported)

    @property
    def problem(self) -> str | None:
        """What could not be fetched or taken over; None where everything could."""
        return "; ".join(failing.text for failing in self._failing.values()) or None

    async def _try(self, what: str, step: Callable[[], Awaitable[None]]) -> None:
        """Take one thing over; if that fails, only this is tried less often."""
        failing = self._failing.get(what)
        if failing is not None and time.monotonic() < failing.until:
            return
        try:
            await step()
            self._failing.pop(what, None)
        except Exception as error:  # of folders that others write
            text, wait = f"{type(error).__name__}: {error}", min(2 * (failing.wait if failing else self._poll), MAX_WAIT)
            self._failing[what] = Retry(text, wait, time.monotonic() + wait)
            self.failures += 1
            logger.error("%s: not taken over, what was there before serves: %s", self.root, text)

    async def _catch_up(self) -> None:
        """Take over what nearline jobs wrote, each for each version that serves."""
        if (root := self._index) is not None:
            for _, served in self.shares:
                await self._try(f"index {served.entry.folder}", functools.partial(self._newer_index, root, served))

    async def _newer_index(self, root: Path, served: LoadedModel) -> None:
        """Take over the newest index of a nearline job, once there is one. Raises what `newer` raises."""
        found = await asyncio.to_thread(newer, root, served.entry.folder, served.index_from, served.restored.trained)
        if found is not None:
            await served.engine.update_index(found[0])
            served.restored, served.index_from = dataclasses.replace(served.restored, index=found[0]), found[1]

    def _restore(self, entry: ExportEntry) -> RestoredModel:
        """Return what a folder holds, read and compared with its checksums; nothing is compiled. Raises as `start`."""
        path = path_of(self.root, entry)
        try:
            restored = restore(path, compiled_from=self.held[0].restored if self.held else None, sha256=entry.sha256)
        except ExportError as error:
            text = str(error)
            raise ExportError(text if str(path) in text else f"{path}: {text}") from error
        restored.trained.need_encoder(str(path))
        expect(restored.index is not None, str(path), "an export with an index", "one without; add --index")
        return restored

    async def _serve(self, entries: Sequence[ExportEntry]) -> None:
        """Swap to these versions, all of them or none."""
        known = {served.entry[:2]: served for served in self.held}
        read = {entry[:2]: await asyncio.to_thread(self._restore, entry) for entry in entries if entry[:2] not in known}
        loaded: list[LoadedModel] = []
        try:
            for entry in entries:
                loaded.append(known.get(entry[:2]) or await self._load(entry, read[entry[:2]]))
        except BaseException:
            await asyncio.gather(*(served.engine.close() for served in loaded if served not in self.held))
            raise
        self.shares = [(entry.share, served) for entry, served in zip(entries, loaded, strict=True)]
        self._entries = list(entries)
        self.held = loaded + [served for served in self.held if served not in loaded]
        self.publishes += 1
        self._failing = {what: failing for what, failing in self._failing.items() if what == "store"}
        for served in loaded:
            logger.info("version %s of %s serves", served.version[:12], served.entry.folder or self.root)
        self._close_old()

    def _close_old(self) -> None:
        """Drain the engines beyond the last `keep` versions."""
        keep = max(self._keep, len(self.shares))
        self.held, old = self.held[:keep], self.held[keep:]
        for served in old:
            task = asyncio.get_running_loop().create_task(served.engine.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _follow_store(self, store: SnapshotStore) -> None:
        while True:
            await self._try("store", functools.partial(self._fetch, store))
            await asyncio.sleep(self._poll)

    async def _fetch(self, store: SnapshotStore) -> None:
        await asyncio.to_thread(mirror, store, self.root, only=self._only)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._poll)
            await self._try(CURRENT, self._swap)
            await self._catch_up()

    async def _swap(self) -> None:
        """Serve the versions that should, unless they do."""
        entries = await asyncio.to_thread(read_current, self.root, only=self._only)
        if entries != self._entries:
            await self._serve(entries)

    def status(self) -> list[dict[str, Any]]:
        """Return what is in memory, for the page and for metrics."""
        shares = {id(served): share for share, served in self.shares}
        return [served.status() | {"folder": self._name(served), "share": shares.get(id(served))} for served in self.held]

    def _name(self, served: LoadedModel) -> str:
        """Return the folder of a version."""
        return served.entry.folder or self.root.name


def share_of(user: int | str) -> float:
    """Return a number in [0, 1) that depends on the user alone, the same in every process.

    Example:
      >>> share_of("ann") == share_of("ann") and share_of(7) != share_of("7")
      True
    """
    digest = hashlib.blake2b(f"{type(user).__name__}:{user}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
