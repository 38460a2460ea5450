"""The model versions of a service: loaded and compiled while others serve, verified, swapped, kept, retired."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aif_jax.connectors.fetch import Reads
from aif_jax.connectors.records import FeatureSource
from aif_jax.export import Restored, restore
from aif_jax.export.consume.files import MANIFEST
from aif_jax.index import ItemIndex
from aif_jax.scores import objective_names
from aif_jax.service.calls import Call, UnknownVersion
from aif_jax.service.exports import ExportEntry, path_of, read_current
from aif_jax.service.features import UserSource
from aif_jax.service.nearline import Nearline, Written, newer, progress_in, table_in
from aif_jax.serving import AsyncPreRanker, ServingConfig
from aif_jax.user_table import UserTable

logger = logging.getLogger(__name__)
LEAST_PREFIX = 8  # digits of a version that a caller may give in place of all 64
LONGEST_WAIT = 60.0  # seconds between two tries of a version that cannot be loaded


@dataclasses.dataclass(eq=False)
class Served:
    """One version with its engine."""

    entry: ExportEntry
    restored: Restored
    engine: AsyncPreRanker
    users: UserSource
    exported: float  # when its manifest was written, in seconds since 1970
    loaded: float  # when it could serve first
    difference: float  # from the golden outputs
    index_from: Written | None = None  # the nearline snapshot of the index; None for that of the export
    table_from: Written | None = None  # the nearline job of users' rows; None for none, or for rows of unknown age

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
        return self.age if self.index_from is None else self.index_from.age

    @property
    def user_table_age(self) -> float | None:
        """Seconds since the rows of users were written, infinite where that is not known; None without such rows."""
        if self.users.table is None:
            return None
        return math.inf if self.table_from is None else self.table_from.age


class Models:
    """The versions that a folder says, used from the event loop's thread.

    Args:
      root: an export, or exports with a file `current`.
      config: config of every engine; its score expressions come on top of those of the export.
      only: name of the one folder to serve, whatever `current` says.
      keep: versions in memory that callers may still name after they were replaced, those that serve among them.
      source: source of features, for calls that bring an id alone.
      source_timeout: seconds for one read of the source; None leaves it to the source and to `ServingConfig.callable_timeout`.
      nearline: where jobs write newer indexes, and rows of users for calls that bring an id alone.
      poll: seconds between two looks at `current`.
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
        nearline: Nearline | None = None,
        poll: float = 1.0,
    ):
        self.root = Path(root)
        self.config = config or ServingConfig()
        self.held: list[Served] = []  # the latest first
        self.shares: list[tuple[float, Served]] = []  # that serve, with their shares of the users
        self.problem: str | None = None  # of the latest version that could not be loaded
        self.publishes = self.failures = 0
        self.reads = None if source is None else Reads(source, timeout=source_timeout)  # of all versions
        self._only, self._keep, self._poll = only, max(1, keep), poll
        self._nearline = nearline or Nearline()
        self._entries: list[ExportEntry] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._follower: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Loads what serves and begins to follow. Raises what `restore` raises, or ValueError for an export without index."""
        await self._serve(read_current(self.root, only=self._only))
        try:
            await self._refresh()
        except Exception as error:  # of an index that comes later: that of the export serves
            self._failed(error)
        moves = self._only is None and self._entries[0].folder
        if moves or self._nearline != Nearline():
            self._follower = asyncio.get_running_loop().create_task(self._follow())

    async def close(self) -> None:
        """Stops following, and drains every engine."""
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        self.shares = []
        await asyncio.gather(*(served.engine.close() for served in self.held), *self._closing)
        self.held = []

    def pick(self, call: Call) -> Served:
        """The version that answers a call: the one that it names, else that of its user. Raises UnknownVersion."""
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
            raise UnknownVersion("no version serves")
        return self.shares[0][1]  # rounding of the shares

    def named(self, version: str) -> Served:
        """The version in memory of that name or prefix, or of the folder of that name. Raises UnknownVersion."""
        for served in self.held:
            prefix = len(version) >= LEAST_PREFIX and served.version.startswith(version)
            if prefix or (served.entry.folder == version != ""):
                return served
        listed = ", ".join(f"{served.version[:12]} ({served.entry.folder or 'the served folder'})" for served in self.held)
        raise UnknownVersion(f"version: expected one of {listed or 'none'}, got {version!r}")

    async def load(self, entry: ExportEntry) -> Served:
        """A version ready to serve: read, compared with its golden outputs, compiled, warmed up."""
        before = self.held[0] if self.held else None
        restored, difference, exported = await asyncio.to_thread(self._restore, entry, before)
        if restored.index is None:
            raise ValueError(f"{path_of(self.root, entry)}: expected an export with an index, got one without")
        trained = restored.trained
        config, orders = trained.config, dict(restored.manifest.get("orders", {}))
        table, table_from = await asyncio.to_thread(self._table, entry, restored)
        storage = self.config.user_storage if table is None else table.storage
        serving = dataclasses.replace(self.config, orders=orders | dict(self.config.orders), user_storage=storage)
        users = UserSource(config.schema, config.history_length, trained.encoder, self.reads, table, serving.since_lengths)
        same = before is not None and before.restored.trained.config == config and before.engine.config == serving
        like = before.engine if before is not None and same else None
        engine = AsyncPreRanker(
            trained, restored.index,
            features=users.fetch, config=serving, compiled_from=like,
        )  # fmt: skip
        await engine.__aenter__()
        return Served(entry, restored, engine, users, exported, time.time(), difference, table_from=table_from)

    def _table(self, entry: ExportEntry, restored: Restored) -> tuple[UserTable | None, Written | None]:
        """The rows of a version's users, without which it is not served where there is to be such a table."""
        users = self._nearline.users
        if users is None:
            return None, None
        if isinstance(users, str):
            table, written = table_in(users, restored.trained, storage=self.config.user_storage or "float32"), None
            with contextlib.suppress(Exception):  # of a server that is away, as `_refresh` will say
                written = progress_in(table)
            return table, written
        found = newer(UserTable, users, entry.folder, None, restored.trained)
        assert found is not None
        return found

    async def _refresh(self) -> None:
        """Takes over newer snapshots of nearline jobs. Raises what `newer` raises."""
        index, users = self._nearline.index, self._nearline.users
        for _, served in self.shares:
            folder = served.entry.folder
            if index is not None:
                found = await asyncio.to_thread(newer, ItemIndex, index, folder, served.index_from, served.restored.trained)
                if found is not None:
                    await served.engine.update_index(found[0])
                    served.restored, served.index_from = dataclasses.replace(served.restored, index=found[0]), found[1]
            if isinstance(users, str) and served.users.table is not None:
                served.table_from = await asyncio.to_thread(progress_in, served.users.table)
            elif isinstance(users, Path):
                rows = await asyncio.to_thread(newer, UserTable, users, folder, served.table_from, served.restored.trained)
                if rows is not None:
                    served.users.table, served.table_from = rows

    def _restore(self, entry: ExportEntry, before: Served | None) -> tuple[Restored, float, float]:
        path = path_of(self.root, entry)
        restored = restore(path, compiled_from=None if before is None else before.restored, sha256=entry.sha256)
        return restored, restored.check_golden(), (path / MANIFEST).stat().st_mtime

    async def _serve(self, entries: Sequence[ExportEntry]) -> None:
        """Swaps to these versions, all of them or none."""
        known = {(served.entry.folder, served.entry.sha256): served for served in self.held}
        loaded: list[Served] = []
        try:
            for entry in entries:
                loaded.append(known.get((entry.folder, entry.sha256)) or await self.load(entry))
        except BaseException:
            await asyncio.gather(*(served.engine.close() for served in loaded if served not in self.held))
            raise
        self.shares = [(entry.share, served) for entry, served in zip(entries, loaded, strict=True)]
        self._entries = list(entries)
        self.held = loaded + [served for served in self.held if served not in loaded]
        self.publishes += 1
        self.problem = None
        for served in loaded:
            logger.info("version %s of %s serves", served.version[:12], served.entry.folder or self.root)
        while len(self.held) > max(self._keep, len(loaded)):
            task = asyncio.get_running_loop().create_task(self.held.pop().engine.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _follow(self) -> None:
        wait = self._poll
        while True:
            await asyncio.sleep(wait)
            try:
                entries = await asyncio.to_thread(read_current, self.root, only=self._only)
                if entries != self._entries:
                    await self._serve(entries)
                await self._refresh()
                wait, self.problem = self._poll, None
            except Exception as error:  # of folders that others write: what serves goes on
                wait = min(2 * wait, LONGEST_WAIT)
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self.problem = f"{type(error).__name__}: {error}"
        logger.error("%s: not taken over, what was there before serves: %s", self.root, self.problem)

    def status(self) -> list[dict[str, Any]]:
        """What is in memory, for the page."""
        shares = {id(served): share for share, served in self.shares}
        return [
            {
                "version": served.version,
                "folder": served.entry.folder or self.root.name,
                "share": shares.get(id(served)),
                "age": served.age,
                "index_age": served.index_age,
                "index_positions": None if served.index_from is None else served.index_from.positions,
                "user_rows": served.users.table is not None,
                "user_table_age": served.user_table_age,
                "user_table_positions": None if served.table_from is None else served.table_from.positions,
                "objectives": list(served.objectives),
                "loaded": served.loaded,
                "items": len(served.restored.index or ()),
                "golden_difference": served.difference,
                "blocks": [block.name for block in served.restored.trained.config.blocks],
            }
            for served in self.held
        ]


def share_of(user: int | str) -> float:
    """A number in [0, 1) that depends on the user alone, the same in every process.

    Example:
      >>> share_of("ann") == share_of("ann") and share_of(7) != share_of("7")
      True
    """
    digest = hashlib.blake2b(f"{type(user).__name__}:{user}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
