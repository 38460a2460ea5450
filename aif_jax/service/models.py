"""The model versions of a service: loaded and compiled while others serve, verified, swapped, kept, retired.

Which exports serve, `service.current` says; nearline jobs may bring newer indices:

    index/0000000042/                a snapshot of `aif-jax index follow`; the newest one serves
    index/0000000042-3f9ab2c1/       one of `aif-jax snapshots fetch`; the last one fetched serves where no follower writes
    index/2026-11-26/0000000042/     the same for the export of that name, where several versions serve
"""

import asyncio
import dataclasses
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aif_jax.checks import ArgumentError, expect
from aif_jax.connectors.features import FeatureSource, Fetch
from aif_jax.connectors.snapshot_store import SnapshotStore, fetched
from aif_jax.export import ExportError, RestoredModel, restore
from aif_jax.index import ItemIndex, inspect
from aif_jax.index.writer import snapshots
from aif_jax.scores import objective_names
from aif_jax.service.calls import Call, Failure, affinity_key, problem_of
from aif_jax.service.current import CURRENT, ExportEntry, mirror, read_current
from aif_jax.service.features import UserSource
from aif_jax.serving import AsyncPreRanker, EngineClosed, ServingConfig
from aif_jax.store.sealed import MANIFEST, is_complete
from aif_jax.store.trained import Trained

logger = logging.getLogger(__name__)


class SavedIndex(NamedTuple):
    """A snapshot of the index that a nearline job wrote."""

    path: Path  # of the snapshot
    modified: int  # time of its manifest in ns: another snapshot of this path has another
    seconds: float  # when it was written, since 1970
    positions: Mapping[int, int]  # in the stream, by partition


def newest(directory: Path, folder: str) -> Path | None:
    """Return the newest snapshot in the export's own folder, else in that of every version; None where there is none yet."""
    for place in (directory / folder, directory):
        if is_complete(place):
            return place
        if found := snapshots(place) or [path for path in fetched(place) if is_complete(path)]:
            return found[-1]
    return None


def newer(directory: Path, folder: str, before: SavedIndex | None, trained: Trained) -> tuple[ItemIndex, SavedIndex] | None:
    """Return a model's newest `ItemIndex`; None where there is none, or only the one before. Raises as `ItemIndex.load`."""
    path = newest(directory, folder)
    if path is None:
        return None
    modified = (path / MANIFEST).stat().st_mtime_ns  # first: a snapshot that replaces this one meanwhile has another
    if before is not None and (path, modified) == (before.path, before.modified):
        return None
    index, positions = ItemIndex.load(path, trained), inspect(path).positions
    seconds = modified / 1e9  # never before the snapshot before it, even if its writer's clock was set back
    return index, SavedIndex(path, modified, seconds if before is None else max(seconds, before.seconds), positions)


MIN_PREFIX = 8  # digits of a version that a caller may give in place of all 64
MAX_WAIT = 30.0  # seconds between two tries of what cannot be taken over


@dataclasses.dataclass(eq=False)
class LoadedModel:
    """One version with its engine."""

    name: str  # of its folder
    version: str  # fingerprint of params, config and encoder
    objectives: tuple[str, ...]  # names of the logits, in their order
    entry: ExportEntry
    restored: RestoredModel
    engine: AsyncPreRanker
    users: UserSource
    exported: float  # when the manifest of the export was written, in seconds since 1970
    index_from: SavedIndex | None = None  # the nearline snapshot of the index; None for that of the export

    async def take_index(self, directory: Path) -> None:
        """Take over the newest index of a nearline job, once there is one. Raises what `newer` raises."""
        found = await asyncio.to_thread(newer, directory, self.entry.folder, self.index_from, self.restored.trained)
        if found is not None:
            await self.engine.update_index(found[0])
            self.restored, self.index_from = dataclasses.replace(self.restored, index=found[0]), found[1]

    def status(self) -> dict[str, Any]:
        """Return what it is, how old, and what it has answered since it was loaded."""
        metrics = self.engine.metrics()
        counts, stages = metrics["counters"], metrics["stages"].items()
        written = self.exported if self.index_from is None else self.index_from.seconds
        return {
            "version": self.version,
            "folder": self.name,
            "age": max(0.0, time.time() - self.exported),
            "index_age": max(0.0, time.time() - written),
            "index_positions": None if self.index_from is None else self.index_from.positions,
            "items": len(self.restored.index or ()),
            "answered": counts.get("answered", 0),
            "degraded": counts.get("degraded", 0),
            "stages": {stage: {"p50": seconds["p50"], "p99": seconds["p99"]} for stage, seconds in stages},
        }


class Models:
    """Loads and swaps the model versions that a folder names. Not thread-safe: use it from the event loop.

    Args:
      root: an export, or exports with a file `current` that says which serve.
      config: config of every engine; its orders come on top of those of the export.
      keep: versions in memory that callers may name.
      source: source of features, for calls that bring an id alone; one read may take `ServingConfig.callable_timeout` seconds.
      index: folder of index snapshots, or of such folders named like the exports, which serving versions follow; None: none.
      store: store whose current export is fetched into `root`, at once and whenever it changes; None: no store.
      poll: seconds between two looks at `current` and at the store.

    Raises:
      ArgumentError: numbers out of range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        config: ServingConfig = ServingConfig(),
        keep: int = 2,
        source: FeatureSource | None = None,
        index: Path | None = None,
        store: SnapshotStore | None = None,
        poll: float = 1.0,
    ):
        expect(keep >= 1, "keep", "at least 1", keep, error=ArgumentError)
        expect(poll > 0, "poll", "more than 0 seconds", poll, error=ArgumentError)
        self.root = Path(root)
        self.config = config
        self.held: list[LoadedModel] = []  # in the order of `current`, then those that served before
        self.serving: list[LoadedModel] = []  # those among them that `current` names
        self.publishes = self.failures = 0
        self.reads = None if source is None else Fetch(source)  # of all versions
        self._keep, self._poll = keep, poll
        self._index, self._store = index, store
        self._problems: dict[str, str] = {}  # of the store, of `current`, of the index of a version
        self._closing: set[asyncio.Task[None]] = set()
        self._followers: list[asyncio.Task[None]] = []
        self._index_followers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Load what serves and begin to follow. Raises what `restore` raises, or ValueError for an export without index.

        Without an export in the folder also what `mirror` raises.
        """
        steps: dict[str, Callable[[], Awaitable[Any]]] = {CURRENT: self._swap}
        if (store := self._store) is not None:
            steps["store"] = lambda: asyncio.to_thread(mirror, store, self.root)
            try:
                await steps["store"]()
            except Exception:  # of a store that is elsewhere: what was fetched before serves
                if not (self.root / CURRENT).is_file():
                    raise
        await self._swap()
        self._followers = [asyncio.create_task(self._follow(what, step)) for what, step in steps.items()]

    async def close(self) -> None:
        """Stop following, and drain every engine."""
        followers = [*self._followers, *self._index_followers]
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)
        self.serving = []
        await asyncio.gather(*(served.engine.close() for served in self.held), *self._closing)
        self.held = []

    def pick(self, call: Call) -> LoadedModel:
        """Return the version that answers a call: the one that it names, else that of its user.

        Raises Failure for a version that is not held, EngineClosed before the start and after the end.
        """
        if call.version:
            return self.named(call.version)
        if not self.serving:
            raise EngineClosed("the service is not started, or closed")
        place = int(affinity_key(call.user), 16) / 2**64 if len(self.serving) > 1 else 0.0  # the same in every process
        for served in self.serving:
            if place < served.entry.share:
                return served
            place -= served.entry.share
        return self.serving[0]  # rounding of the shares

    def named(self, version: str) -> LoadedModel:
        """Return the version in memory of that name or prefix, or of the folder of that name. Raises Failure."""
        for served in self.held:
            if served.name == version or (len(version) >= MIN_PREFIX and served.version.startswith(version)):
                return served
        listed = ", ".join(f"{served.version[:12]} ({served.name})" for served in self.held)
        raise Failure("FAILED_PRECONDITION", 412, f"version: expected one of {listed or 'none'}, got {version!r}", "version")

    @property
    def problem(self) -> str | None:
        """What could not be fetched or taken over; None where everything could."""
        parts = ["store", CURRENT, *(f"index {served.name}" for served in self.serving)]
        return "; ".join(self._problems[part] for part in parts if part in self._problems) or None

    def status(self) -> list[dict[str, Any]]:
        """Return what is in memory, for the page and for metrics; a version that callers may only name has the share None."""
        return [each.status() | {"share": each.entry.share if each in self.serving else None} for each in self.held]

    async def _follow(self, what: str, step: Callable[[], Awaitable[Any]]) -> None:
        """Take one thing over again and again; while it fails, it alone is tried less often, up to `MAX_WAIT` seconds apart."""
        wait = self._poll
        while True:
            await asyncio.sleep(wait)
            wait = self._poll if await self._try(what, step) else min(2 * wait, max(MAX_WAIT, self._poll))

    async def _try(self, what: str, step: Callable[[], Awaitable[Any]]) -> bool:
        """Take one thing over; note a failure and return False."""
        try:
            await step()
        except Exception as error:  # of folders that others write
            self._problems[what] = text = f"{type(error).__name__}: {error}"
            self.failures += 1
            logger.error("%s: not taken over, what was there before serves: %s", self.root, text)
            return False
        self._problems.pop(what, None)
        return True

    async def _swap(self) -> None:
        """Serve what `current` names, all of it or nothing new; does nothing where it serves already."""
        entries = await asyncio.to_thread(read_current, self.root)
        if entries == [served.entry for served in self.serving]:
            return
        loaded = await self._loaded([entry._replace(share=0.0) for entry in entries])  # a share tells no export from another
        for served, entry in zip(loaded, entries, strict=True):
            served.entry = entry  # with its share
            logger.info("version %s of %s serves", served.version[:12], served.name)
        self.publishes += 1
        # the same export loaded twice, such as once with and once without sha256: the new one is kept
        named = {(served.name, served.version) for served in loaded}
        held = loaded + [served for served in self.held if (served.name, served.version) not in named]
        before, self.serving, self.held = self.held, loaded, held[: max(self._keep, len(loaded))]
        for follower in self._index_followers:
            follower.cancel()
        if (directory := self._index) is not None:
            steps = [(f"index {served.name}", functools.partial(served.take_index, directory)) for served in loaded]
            self._index_followers = [asyncio.create_task(self._follow(*step)) for step in steps]
        for served in set(before).difference(self.held):
            task = asyncio.create_task(served.engine.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _loaded(self, entries: list[ExportEntry]) -> list[LoadedModel]:
        """Return the versions of entries without shares, each with its newest index: all of them, or none stays in memory."""
        held = {served.entry._replace(share=0.0): served for served in self.held}
        read = {entry: await asyncio.to_thread(self._restore, entry) for entry in entries if entry not in held}
        loaded: list[LoadedModel] = []
        try:
            for entry in entries:
                loaded.append(served := held.get(entry) or await self._load(entry, read[entry], [*self.held, *loaded]))
                if served not in self.serving and (index := self._index) is not None:  # a kept version's was not followed
                    taken = await self._try(f"index {served.name}", functools.partial(served.take_index, index))
                    if taken and served.index_from is None:
                        logger.warning("%s: expected a snapshot of %s, got none; its export's index serves", index, served.name)
        except BaseException:
            await asyncio.gather(*(served.engine.close() for served in loaded if served not in self.held))
            raise
        return loaded

    def _restore(self, entry: ExportEntry) -> RestoredModel:
        """Return what a folder holds, read and compared with its checksums; nothing is compiled. Raises as `start`."""
        path = self.root / entry.folder
        expect(not entry.folder or not path.is_symlink(), str(path), "a folder", "a link")  # which could lead out of the root
        try:
            restored = restore(path, sha256=entry.sha256)
        except ExportError as error:
            raise ExportError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
        restored.trained.need_encoder(str(path))
        expect(restored.index is not None, str(path), "an export with an index", "one without; add --index")
        return restored

    async def _load(self, entry: ExportEntry, restored: RestoredModel, others: list[LoadedModel]) -> LoadedModel:
        """Return a version ready to serve: compared with its golden outputs, compiled unless one of `others` was, warmed up."""
        trained, exported = restored.trained, (self.root / entry.folder / MANIFEST).stat().st_mtime
        await asyncio.to_thread(restored.check_golden)
        config = dataclasses.replace(self.config, orders={**restored.orders, **self.config.orders})
        alike = (one.engine for one in others if one.restored.trained.config == trained.config and one.engine.config == config)
        users = UserSource(trained.need_encoder(entry.folder).with_length(trained.config.history_length), self.reads)
        engine = AsyncPreRanker(
            trained, restored.index, features=users.fetch, config=config,
            describe=lambda error: problem_of(error).message, compiled_from=next(alike, None),
        )  # fmt: skip
        await engine.__aenter__()
        name, objectives = entry.folder or self.root.name, objective_names(trained.config.objectives)
        return LoadedModel(name, trained.version, objectives, entry, restored, engine, users, exported)
