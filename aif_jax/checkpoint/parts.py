"""A checkpoint of several processes: arrays that are spread over them lie in parts, one folder of each process.

    100/            what every process holds whole, and the record; written by process 0
    100/part-0/     the rows of process 0, a folder of `storage` with its digests
    100/part-1/

Each process writes and reads on its own, and all tell each other how it went: no process waits in a collective for one that
failed. The folder gets its name when all parts are complete. It is read by any number of processes: each reads the parts that
hold its rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.checkpoint.storage import CheckpointError, digest_of, inspect, nbytes, pack, read, write_packed
from aif_jax.sharding import local, processes
from aif_jax.sharding.processes import by_first, together
from aif_jax.store import sealed
from aif_jax.store.folders import memory, new_folder
from aif_jax.store.version import Digest, holds
from aif_jax.trees import describe, leaves_by_path

FORMAT = "aif_jax.checkpoint.part/1"
MOST_PARTS = 1 << 16
Trees = dict[str, dict[str, Any]]
"""Arrays by tree and path."""


@dataclasses.dataclass(frozen=True)
class ShardedArrays:
    """The spread arrays of a folder, as its record has them.

    Attributes:
      path: of the folder.
      leaves: dtype and whole shape, by tree and path; the digests are those of the parts.
      parts: for each part the hash of its record, and (first row, end) by tree and path.
    """

    path: Path
    leaves: dict[str, dict[str, Digest]]
    parts: list[tuple[str, dict[str, dict[str, tuple[int, int]]]]]

    @classmethod
    def of(cls, path: Path, record: Mapping[str, Any]) -> ShardedArrays:
        """Reads the record; CheckpointError for one that is none."""
        try:
            leaves = {
                name: {leaf: digest_of(path, f"{name}/{leaf}", {**entry, "sha256": ""}) for leaf, entry in tree.items()}
                for name, tree in record.get("spread", {}).items()
            }
            parts = [(str(part["sha256"]), _ranges_of(part["rows"])) for part in record.get("parts", [])]
            for name, tree in leaves.items():
                for leaf, digest in tree.items():
                    rows = [part[name][leaf] for _, part in parts]
                    whole = [0, *(end for _, end in rows)] == [*(start for start, _ in rows), digest.shape[0]]
                    if not whole or any(start > end for start, end in rows) or len(parts) > MOST_PARTS:
                        raise ValueError(f"{name}/{leaf}: expected rows that follow each other, got {rows[:8]}")
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise CheckpointError(f"{path}: the list of its parts cannot be read: {error!r}") from error
        return cls(path, leaves, parts)

    def rows(self, name: str, wanted: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
        """Rows [first, end) of the spread arrays of one tree, by path; zeros follow the last row. Parts read are checked."""
        leaves = self.leaves[name]
        widths = {leaf: nbytes(leaves[leaf]) // max(1, leaves[leaf].shape[0]) for leaf in wanted}
        size = sum(widths[leaf] * (end - first) for leaf, (first, end) in wanted.items())
        if size > memory():
            raise CheckpointError(f"{self.path}: expected arrays that fit the memory of this machine, it lists {size} bytes")
        result = {}
        for leaf, (first, end) in wanted.items():
            result[leaf] = np.zeros((end - first, *leaves[leaf].shape[1:]), jnp.dtype(leaves[leaf].dtype))
        for number, (seal, part) in enumerate(self.parts):
            held = None
            for leaf, (first, end) in wanted.items():
                start, stop = part[name][leaf]
                low, high = max(first, start), min(end, stop)
                if low >= high:
                    continue
                held = held if held is not None else self._part(number, seal, name)
                rows, shape = held.get(leaf), (stop - start, *leaves[leaf].shape[1:])
                if rows is None or (str(rows.dtype), rows.shape) != (leaves[leaf].dtype, shape):
                    got = None if rows is None else describe(rows)
                    expected = f"{leaves[leaf].dtype}{list(shape)}"
                    raise CheckpointError(f"{self.path}: part {number}: {name}/{leaf}: expected {expected}, got {got}")
                result[leaf][low - first : high - first] = rows[low - start : high - start]
        return result

    def _part(self, number: int, seal: str, name: str) -> dict[str, np.ndarray]:
        """One tree of a part by path, checked to be of this checkpoint."""
        folder = self.path / f"part-{number}"
        if inspect(folder, format=FORMAT)[1]["sha256"] != seal:
            raise CheckpointError(f"{folder}: expected the part of this checkpoint, got that of another")
        return leaves_by_path(read(folder, {name: np.ndarray}, format=FORMAT)[name])


def write_together(
    path: Path,
    trees: Mapping[str, Any],
    record: Mapping[str, Any],
    *,
    formats: tuple[str, str],
    rows: Callable[[str, Any], int],
) -> None:
    """Writes a folder in all processes of a job; each calls this with the same record and its part of the same arrays.

    Args:
      path: a folder that does not exist yet, on a disk that all processes see.
      trees: pytrees by name. Arrays may be spread over processes by their leading axis, in order of the processes.
      record: plain JSON.
      formats: of a folder without spread arrays, and of one with them.
      rows: of a leaf by path, without those that pad it.

    Raises:
      ProcessError: a process could not do its part, holds other values of what all hold, or does not see the folder. Nothing
        is at `path` then.
    """
    what = f"checkpoint {path}"
    whole, own, spread, ranges = together(what, lambda: _divide(trees, rows))
    mine = jax.process_index()
    has = [any(b > a for tree in part.values() for a, b in tree.values()) for part in ranges]
    part = together(what, lambda: pack(own, {}, format=FORMAT) if has[mine] else None)
    seals = processes.gather_texts(part[1]["sha256"] if part else "")
    if spread:
        parts = [{"sha256": seal, "rows": rows} for seal, rows in zip(seals, ranges, strict=True)]
        record = {**record, "spread": spread, "parts": json.loads(json.dumps(parts))}
    main = together(what, lambda: pack(whole, record, format=formats[bool(spread)]))
    digests = {f"{name}/{leaf}": entry["sha256"] for name, tree in main[1]["leaves"].items() for leaf, entry in tree.items()}
    digests["record"] = main[1]["sha256"]
    processes.expect_equal(what, {name: bytes.fromhex(digest) for name, digest in digests.items()})
    with contextlib.ExitStack() as stack:
        opened: list[Path] = []

        def begin() -> None:
            opened.append(stack.enter_context(new_folder(path)))
            write_packed(opened[0], main, into=True)

        def add() -> None:
            if not sealed.is_complete(partial):
                raise FileNotFoundError(
                    f"{partial}: not there; checkpoints of several processes need a disk that all of them see"
                )
            if part is not None:
                write_packed(partial / f"part-{mine}", part)

        def end() -> None:
            missing = [n for n, one in enumerate(has) if one and not sealed.is_complete(partial / f"part-{n}")]
            if missing:
                raise FileNotFoundError(f"{partial}: the parts of processes {missing} are not there; do all see this disk?")
            stack.close()

        by_first(what, begin)
        partial = Path(processes.from_first(str(opened[0]) if opened else ""))
        together(what, add)
        by_first(what, end)


def _ranges_of(rows: Mapping[str, Any]) -> dict[str, dict[str, tuple[int, int]]]:
    """(first row, end) by tree and path, from a record."""
    return {name: {leaf: (int(first), int(end)) for leaf, (first, end) in tree.items()} for name, tree in rows.items()}


def _divide(trees: Mapping[str, Any], rows: Callable[[str, Any], int]) -> tuple[Trees, Trees, dict[str, Any], list[Any]]:
    """Arrays held whole, the rows of this process of the others, dtype and shape of those, and every process's rows of them."""
    whole: Trees = {}
    own: Trees = {}
    spread: dict[str, Any] = {}
    ranges: list[dict[str, dict[str, tuple[int, int]]]] = [{} for _ in range(jax.process_count())]
    for name, tree in trees.items():
        whole[name] = {}
        for path, leaf in leaves_by_path(tree).items():
            if holds(leaf):
                held, count = local(leaf), rows(path, leaf) if np.ndim(leaf) else 0
                whole[name][path] = held[:count] if np.ndim(leaf) and count < len(leaf) else held
                continue
            count = rows(path, leaf)
            spread.setdefault(name, {})[path] = {"dtype": str(leaf.dtype), "shape": [count, *leaf.shape[1:]]}
            for process, (first, end) in enumerate(_ranges(leaf, f"{name}/{path}")):
                ranges[process].setdefault(name, {})[path] = (min(first, count), min(end, count))
            first, end = ranges[jax.process_index()][name][path]
            shards = {shard.index[0].start or 0: shard.data for shard in leaf.addressable_shards}
            held = np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
            own.setdefault(name, {})[path] = held[: end - first]
    return whole, own, spread, ranges


def _ranges(leaf: jax.Array, name: str) -> list[tuple[int, int]]:
    """(first row, end) of each process."""
    found: dict[int, set[tuple[int, int]]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        start, stop, _ = index[0].indices(leaf.shape[0])
        found.setdefault(device.process_index, set()).add((start, stop))
        if any(i.indices(n) != (0, n, 1) for i, n in zip(index[1:], leaf.shape[1:], strict=True)):
            raise ValueError(f"{name}: expected an array that is spread by its rows, got {leaf.sharding}")
    blocks = [sorted(found.get(process, set())) for process in range(jax.process_count())]
    flat = [block for one in blocks for block in one]
    if [0, *(end for _, end in flat)] != [*(first for first, _ in flat), leaf.shape[0]] or not all(blocks):
        raise ValueError(f"{name}: expected rows spread in the order of the processes, got {flat}; see sharding.row_mesh")
    return [(one[0][0], one[-1][1]) for one in blocks]
