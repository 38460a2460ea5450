"""What nearline jobs write between two exports, and a service follows: snapshots of the index, rows of users.

root/000001-0000000042/            a snapshot of `aif-jax index follow` or of a `UserTableWriter`; the newest one serves
root/2026-11-26/000001-.../        the same for the export of that name, where several versions serve
root/2026-11-26/users/             rows of users within the export of that name, as `aif.refresh` publishes them
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from aif_jax.connectors.connect import open_client
from aif_jax.index import ItemIndex
from aif_jax.store.codec import Storage
from aif_jax.store.sealed import MANIFEST, is_complete
from aif_jax.store.snapshots import snapshots
from aif_jax.store.trained import Trained
from aif_jax.user_table import RemoteRows, UserTable
from aif_jax.user_table.rows import NONE

USERS = "users"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nearline:
    """Where the jobs write.

    Attributes:
      index: folder of index snapshots that `aif-jax index follow` writes, of the one version or one in it for each export's
        name; None serves the index of the export.
      users: rows of users for calls that bring an id alone: folder of snapshots of a `UserTable`, as for `index`, or redis://
        URL; None for none.
    """

    index: Path | None = None
    users: str | Path | None = None


Table = TypeVar("Table", ItemIndex, UserTable)


class Written(NamedTuple):
    """What a nearline job wrote and a service reads."""

    path: Path | None  # of the snapshot; None for rows in a server
    seconds: float  # when it was written, since 1970; of rows in a server, the partition that was written longest ago
    positions: Mapping[int, int]  # in the stream, by partition

    @property
    def age(self) -> float:
        """Seconds since it was written."""
        return max(0.0, time.time() - self.seconds)


def newest(root: Path, folder: str, *, inside: str = "") -> Path:
    """The newest snapshot for the export in `folder`, first that `inside` the export. FileNotFoundError where there is none."""
    for place in (*([root / folder / inside] if inside else []), root / folder, root):
        if is_complete(place):
            return place
        if found := snapshots(place):
            return found[-1]
    raise FileNotFoundError(f"{root}: expected snapshots, of {folder or 'the export'} or of every version, got none")


def newer(kind: type[Table], root: Path, folder: str, before: Written | None, trained: Trained) -> tuple[Table, Written] | None:
    """The newest `ItemIndex` or `UserTable` of a model, unless it is the one before. Raises what `newest` and `load` raise."""
    path = newest(root, folder, inside=USERS if kind is UserTable else "")
    if before is not None and path == before.path:
        return None
    table, positions = kind.load(path, trained), kind.inspect(path).positions
    seconds = (path / MANIFEST).stat().st_mtime  # never before the snapshot before it, even if its writer's clock was set back
    return table, Written(path, seconds if before is None else max(seconds, before.seconds), positions)


def table_in(server: str, trained: Trained, *, storage: Storage) -> UserTable:
    """Rows of a model's users in a server, `redis://HOST:PORT/DATABASE`. Raises ImportError without its client."""
    client = open_client(server, {"socket_timeout": 1.0, "socket_connect_timeout": 1.0})
    table = UserTable(trained, storage=storage)
    table.rows = RemoteRows(client, version=trained.version, width=table.row_bytes // 4)
    return table


def progress_in(table: UserTable) -> Written | None:
    """How far the rows in a server are; None before the first one. Raises what its client raises."""
    assert isinstance(table.rows, RemoteRows)
    found = table.rows.progress()
    positions = {partition: each.position for partition, each in found.items() if each.position > NONE}
    return Written(None, min(each.seconds for each in found.values()), positions) if found else None
