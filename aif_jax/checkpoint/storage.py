"""Named trees of arrays and a JSON record in one folder that checks itself, on Orbax.

The record holds a SHA-256 of every leaf, which `read` compares with what it read. Orbax alone can read the arrays: nested dicts
under the trees' names. Processes of one job write sealed folders (`store.sealed`), since Orbax's saves wait for all of them:
arrays that are spread over them lie in parts, one folder of each process.

    100/            what every process holds whole, and the record; written by process 0
    100/part-0/     the rows of process 0, with their digests
    100/part-1/

Each process writes and reads on its own, and all tell each other how it went: no process waits in a collective for one that
failed. The folder gets its name when all parts are complete. It is read by any number of processes: each reads the parts that
hold its rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from aif_jax.checks import expect
from aif_jax.export.consume.files import memory
from aif_jax.sharding import local as here
from aif_jax.sharding import processes
from aif_jax.sharding.meshes import place, rows_beside
from aif_jax.sharding.processes import by_first, together
from aif_jax.store import sealed
from aif_jax.store.folders import METADATA_FILE, CheckpointError, local, new_folder, unfinished
from aif_jax.store.sealed import MANIFEST, is_json, seal
from aif_jax.store.version import Digest, __version__, digest, holds
from aif_jax.trees import describe, is_key, leaves_by_path, listed, mismatches, nest

RECORD = "custom_metadata"  # as Orbax names it
RECORD_BYTES = 32 << 20
DAMAGED = "restore a copy, or take an earlier step"
LARGEST_SIZE = 1 << 40  # of one axis, and of a leaf in bytes
MOST_FILES = 1 << 16
MOST_DEPTH = 32  # axes of a leaf, groups over it
KEY_IMPLEMENTATIONS = {"key<fry>": ("threefry2x32", 2), "key<rbg>": ("rbg", 4), "key<urbg>": ("unsafe_rbg", 4)}

Packed: TypeAlias = tuple[dict[str, Any], dict[str, Any]]
"""What Orbax writes: nested dicts of arrays, and the record with a digest of every leaf."""


def write(path: str | Path, trees: Mapping[str, Any], record: Mapping[str, Any], *, format: str) -> None:
    """Writes named trees and a record into a new folder: complete, or not there at all.

    Args:
      path: a folder that does not exist yet.
      trees: pytrees by name; leaves are arrays of numbers or strings, or typed random keys.
      record: plain JSON.
      format: name and number of the layout, which `read` must be given.

    Raises:
      FileExistsError: something is there already; nothing is ever overwritten.
      ValueError: a record that is not plain JSON, or a leaf that is no array.
    """
    write_packed(path, pack(trees, record, format=format))


def write_packed(path: str | Path, packed: Packed, *, into: bool = False) -> None:
    """Writes what `pack` returned, as `write` does; with `into`, into the empty folder of a `new_folder`."""
    arrays, record = packed
    with contextlib.nullcontext(Path(path)) if into else new_folder(path) as partial:
        if jax.process_count() > 1:
            return sealed.fill(partial, arrays, {RECORD: record}, format=record["format"])
        with _context():
            ocp.save_checkpointables(str(partial), arrays, overwrite=True, custom_metadata=record)


def pack(trees: Mapping[str, Any], record: Mapping[str, Any], *, format: str, copy: bool = False) -> Packed:
    """Checks and hashes trees and record, as `write`; `copy` copies all arrays to the host: the caller may donate them."""
    expect(is_json(record), "record", "plain JSON", repr(record))
    named = {name: leaves_by_path(tree) for name, tree in trees.items()}
    if not any(named.values()):
        raise ValueError(f"expected at least one array to save, got none in {sorted(trees)}")
    for name, tree in named.items():
        for path, leaf in tree.items():
            if not isinstance(leaf, jax.Array) and np.asarray(leaf).dtype.kind in "OS":
                raise ValueError(f"{name}/{path}: expected an array, got {type(leaf).__name__}")
    leaves = {
        name: {path: dataclasses.asdict(digest(leaf, path)) for path, leaf in tree.items()} for name, tree in named.items()
    }
    metadata = {**record, "format": format, "aif_jax": __version__, "jax": jax.__version__, "leaves": leaves}
    metadata |= {"sha256": seal(metadata)}
    # Orbax refuses arrays of size 0; the record has all there is to know of them.
    arrays = {name: {path: _encode(leaf) for path, leaf in tree.items() if np.size(leaf)} for name, tree in named.items()}
    if copy or jax.process_count() > 1:  # Orbax takes no array of one process where there are several
        arrays = {name: {path: np.array(leaf) for path, leaf in tree.items()} for name, tree in arrays.items()}
    return {name: nest(tree) for name, tree in arrays.items() if tree}, metadata


def inspect(path: str | Path, *, format: str | tuple[str, ...]) -> tuple[dict[str, dict[str, Digest]], dict[str, Any]]:
    """The digest of every leaf by tree and path, and the record given to `write`; reads no arrays.

    Raises:
      FileNotFoundError: nothing there.
      CheckpointError: torn, altered or foreign.
    """
    path = local(path)
    if not path.is_dir():
        work = unfinished(path)
        hint = f"; {work[0]} is being written, or was left by a save that was killed" if work else ""
        raise FileNotFoundError(f"{path}: no checkpoint{hint}; give the folder of one, or the --out of train")
    if not sealed.is_complete(path):
        steps = complete_steps(path)
        hint = f"; it holds the steps {steps} of a run, which Checkpoints({str(path)!r}) reads" if steps else ""
        raise CheckpointError(f"{path}: not a complete checkpoint: {METADATA_FILE} is missing{hint}; {DAMAGED}")
    _check_files(path)
    file = MANIFEST if (path / MANIFEST).is_file() else METADATA_FILE
    try:
        metadata = json.loads((path / file).read_text())[RECORD]
        formats = format if isinstance(format, tuple) else (format,)
        if metadata["format"] not in formats:
            raise CheckpointError(f"{path}: expected the format {formats}, got {metadata['format']!r}; {DAMAGED}")
        if metadata["sha256"] != seal(metadata):
            raise CheckpointError(f"{path}: the record in {file} was altered; {DAMAGED}")
        leaves = {
            name: {leaf: digest_of(path, f"{name}/{leaf}", entry) for leaf, entry in tree.items()}
            for name, tree in metadata["leaves"].items()
        }
        for tree in leaves.values():
            nest(dict.fromkeys(tree))  # no leaf is a group too
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: {file} is torn, altered or not of this library: {error!r}; {DAMAGED}") from error
    return leaves, metadata


def read(
    path: str | Path, like: Mapping[str, Any], *, format: str | tuple[str, ...], spread: ShardedArrays | None = None
) -> dict[str, Any]:
    """Reads some trees of a folder and checks every leaf of them.

    Args:
      path: what `write` wrote.
      like: what to read: a template for each name, see `load`. None takes the tree as nested dicts on the default device,
        `np.ndarray` as nested dicts of NumPy arrays.
      format: as given to `write`; several are allowed.
      spread: what else is in the trees.

    Raises:
      FileNotFoundError, CheckpointError: as `inspect`.
      ValueError: a tree that is not there, or leaves missing, renamed or resized against the template: by path.
    """
    path = local(path)
    leaves, record = inspect(path, format=format)
    parts = {} if spread is None else spread.leaves
    if missing := like.keys() - leaves.keys() - parts.keys():
        raise ValueError(f"{path}: expected {sorted(missing)}, but it was saved without; it has {sorted(leaves)}")
    size, limit = sum(nbytes(leaf) for name in like for leaf in leaves.get(name, {}).values()), memory()
    if size > limit:
        limit = f"at most the {limit} bytes of memory here"
        raise CheckpointError(f"{path}: expected {limit}, it lists {size}; take a larger machine")
    held = leaves_by_path(sealed.read(path, format=record["format"])) if (path / MANIFEST).is_file() else None
    return {
        name: _restore(path, name, leaves.get(name, {}), template, spread if name in parts else None, held)
        for name, template in like.items()
    }


def nbytes(leaf: Digest) -> int:
    """Bytes of a leaf."""
    width = 4 * KEY_IMPLEMENTATIONS[leaf.dtype][1] if leaf.dtype in KEY_IMPLEMENTATIONS else jnp.dtype(leaf.dtype).itemsize
    return math.prod(leaf.shape) * width


def complete_steps(directory: Path) -> list[int]:
    """Steps of a run on disk, ascending; CheckpointError for one without its record: saves are complete or not there at all."""
    if not directory.is_dir():
        return []
    steps = [path for path in directory.iterdir() if path.name.isdigit() and path.is_dir()]
    damaged = [path for path in steps if not sealed.is_complete(path) and path.is_dir()]
    if damaged:
        raise CheckpointError(f"{damaged[0]}: damaged, {METADATA_FILE} is missing; remove the folder to go on with other steps")
    return sorted(int(path.name) for path in steps)


def _check_files(path: Path) -> None:
    """Raises for more or larger files than a checkpoint has; their size as they say it, so sparse ones are refused too."""
    count = 0
    for root, _, names in os.walk(path):
        for name in names:
            arrays = name == sealed.ARRAYS or os.path.basename(root) == "d"  # Orbax keeps data in folders of this name
            limit = memory() if arrays else RECORD_BYTES
            size, count = os.lstat(os.path.join(root, name)).st_size, count + 1
            if size > limit or count > MOST_FILES:
                expected = f"at most {MOST_FILES} files, this one of at most {limit} bytes"
                raise CheckpointError(f"{path}: {name}: expected {expected}, got file {count} of {size} bytes; {DAMAGED}")


def digest_of(path: Path, name: str, entry: Mapping[str, Any]) -> Digest:
    """The digest of a leaf as the record has it; CheckpointError for a dtype or a shape that no leaf has."""
    leaf = Digest(**{**entry, "shape": tuple(entry["shape"])})
    sizes = max(len(leaf.shape), name.count("/")) <= MOST_DEPTH
    sizes = sizes and all(type(dim) is int and 0 <= dim <= LARGEST_SIZE for dim in leaf.shape)
    whole = math.prod(max(1, dim) for dim in leaf.shape) if sizes else 0  # NumPy refuses huge axes of empty arrays too
    if not sizes or not isinstance(leaf.dtype, str) or whole * nbytes(Digest(leaf.dtype, (), "")) > LARGEST_SIZE:
        got = reprlib.repr((leaf.dtype, leaf.shape))
        expected = f"at most {MOST_DEPTH} sizes and groups, and {LARGEST_SIZE} bytes"
        raise CheckpointError(f"{path}: {name:.200}: expected {expected}, got {got}; {DAMAGED}")
    return leaf


def _context() -> ocp.Context:
    """How Orbax works here: by each process for itself."""
    context = ocp.Context()
    # Where making a folder fails in the background, Orbax's threads wait minutes for a folder that never comes.
    context.asynchronous.create_directories_asynchronously = False
    if jax.process_count() > 1:
        context.multiprocessing.active_processes = {jax.process_index()}
        context.multiprocessing.primary_host = jax.process_index()
    return context


def _restore(
    path: Path, name: str, leaves: Mapping[str, Digest], like: Any, spread: ShardedArrays | None, held: Mapping[str, Any] | None
) -> Any:
    """One tree: its leaves read, checked against the record, and put into the form of the template."""
    nested = like is None or like is np.ndarray
    parts = {} if spread is None else spread.leaves[name]
    every = {**leaves, **parts}
    templates = dict.fromkeys(every, like) if nested else leaves_by_path(like)
    if not nested:
        lines = mismatches(
            {p: str(leaf) for p, leaf in every.items()},
            {p: _describe(t, every.get(p)) for p, t in templates.items()},
            source="checkpoint",
        )
        expect(not lines, str(path), f"{name} like the template", f"others:\n{listed(lines)}")
    arrays = {p: _abstract(leaf, templates[p]) for p, leaf in leaves.items()}
    if stored := {p: leaf for p, leaf in arrays.items() if leaf.size}:
        try:
            if held is not None:
                arrays |= {p: held[f"{name}/{p}"] for p in stored}
            else:
                with _context():
                    arrays |= leaves_by_path(ocp.load(str(path), nest(stored), checkpointable_name=name))
        except PermissionError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0][:300]
            raise CheckpointError(f"{path}: {name} is torn or altered: {type(error).__name__}: {reason}; {DAMAGED}") from error
    decoded = {p: _decode(arrays[p], leaves[p], templates[p], f"{path}: {name}/{p}") for p in templates if p in leaves}
    if spread is not None:
        ranges = {p: _rows_here(templates[p], parts[p].shape) for p in parts}
        rows = spread.rows(name, ranges)
        decoded |= {p: _from_rows(rows.pop(p), ranges[p][0], templates[p], parts[p]) for p in parts}
    placed = {p: decoded[p] for p in templates}
    return nest(placed) if nested else jax.tree.unflatten(jax.tree.structure(like), placed.values())


def _encode(leaf: Any) -> jax.Array | np.ndarray:
    """A leaf as Orbax takes it."""
    if is_key(leaf):
        return jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array):
        return leaf
    array = np.asarray(leaf)
    return np.ascontiguousarray(array[..., None]).view(np.uint32) if array.dtype.kind == "U" else array


def _abstract(leaf: Digest, template: Any) -> Any:
    """The array to request from Orbax: with the sharding of the template where it has one, else in NumPy."""
    if leaf.dtype in KEY_IMPLEMENTATIONS:
        return np.empty((*leaf.shape, KEY_IMPLEMENTATIONS[leaf.dtype][1]), np.uint32)
    dtype = jnp.dtype(leaf.dtype)
    if dtype.kind == "U":
        return np.empty((*leaf.shape, dtype.itemsize // 4), np.uint32)
    sharding = _sharding(template)
    if sharding is None or _placed_later(template, leaf):
        return np.empty(leaf.shape, dtype)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)


def _sharding(template: Any) -> Any:
    """The sharding that a template insists on, None for none: an array that was never placed by hand has one too."""
    return getattr(template, "sharding", None) if getattr(template, "committed", True) else None


def _placed_later(template: Any, leaf: Digest) -> bool:
    """Whether an array is read whole and then placed: by one of several processes, or with rows that pad it."""
    return _sharding(template) is not None and (jax.process_count() > 1 or template.shape != leaf.shape)


def _describe(template: Any, leaf: Digest | None) -> str:
    """A template without the rows that pad it, as a leaf is described."""
    if leaf is not None and leaf.shape and rows_beside(template, leaf.shape[0]):
        template = jax.ShapeDtypeStruct((leaf.shape[0], *template.shape[1:]), template.dtype)
    return describe(template)


def _rows_here(template: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    """(first row, end) that this process needs of a spread array: those of its devices where the template has a sharding."""
    sharding = _sharding(template)
    if sharding is None:
        return 0, shape[0]
    rows = [index[0].indices(template.shape[0]) for index in sharding.addressable_devices_indices_map(template.shape).values()]
    return min(start for start, _, _ in rows), max(stop for _, stop, _ in rows)


def _from_rows(rows: np.ndarray, first: int, template: Any, leaf: Digest) -> Any:
    """The rows [first, ...) of a spread array in the form of the template, see `_decode`."""
    sharding = _sharding(template)
    if sharding is None:
        return rows if template is np.ndarray or isinstance(template, np.ndarray) else jnp.asarray(rows)

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(template.shape[0])
        return rows[(slice(start - first, stop - first), *index[1:])]

    return jax.make_array_from_callback(template.shape, sharding, part)


def _decode(array: Any, leaf: Digest, template: Any, name: str) -> Any:
    """The inverse of `_encode`: checked against what was saved, and moved to where the template wants it.

    The template is an array, a `jax.ShapeDtypeStruct`, None for the default device, or `np.ndarray` for NumPy.
    """
    if leaf.dtype in KEY_IMPLEMENTATIONS:
        array = jax.random.wrap_key_data(jnp.asarray(array), impl=KEY_IMPLEMENTATIONS[leaf.dtype][0])
    elif leaf.dtype.startswith("<U"):
        array = array.view(leaf.dtype)[..., 0]
    got = digest(array)
    expect(got.dtype == leaf.dtype, name, leaf.dtype, f"{got.dtype} of JAX here; set jax_enable_x64 or use NumPy")
    if got != leaf:
        raise CheckpointError(f"{name} was altered: its contents are not those that were saved; {DAMAGED}")
    if _placed_later(template, leaf) or (_sharding(template) is not None and isinstance(array, np.ndarray)):
        return place(array, template.sharding, count=template.shape[0] if template.shape else None)
    if isinstance(array, jax.Array) or template is np.ndarray or isinstance(template, np.ndarray) or array.dtype.kind == "U":
        return array
    moved = jnp.asarray(array)
    return moved if moved.dtype == array.dtype else array  # 64 bits stay in NumPy where JAX would cut them


PART_FORMAT = "aif_jax.checkpoint.part/1"
MOST_PARTS = 1 << 16
Trees = dict[str, dict[str, Any]]
"""Arrays by tree and path."""


@dataclasses.dataclass(frozen=True)
class ShardedArrays:
    """The spread arrays of a folder, as its record has them.

    Attributes:
      path: path of the folder.
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
            raise CheckpointError(f"{path}: the list of its parts cannot be read: {error!r}; {DAMAGED}") from error
        return cls(path, leaves, parts)

    def rows(self, name: str, wanted: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
        """Rows [first, end) of the spread arrays of one tree, by path; zeros follow the last row. Parts read are checked."""
        leaves = self.leaves[name]
        widths = {leaf: nbytes(leaves[leaf]) // max(1, leaves[leaf].shape[0]) for leaf in wanted}
        size = sum(widths[leaf] * (end - first) for leaf, (first, end) in wanted.items())
        if size > memory():
            way_out = "take a larger machine"
            raise CheckpointError(f"{self.path}: expected arrays that fit the memory, it lists {size} bytes; {way_out}")
        result = {}
        for leaf, (first, end) in wanted.items():
            result[leaf] = np.zeros((end - first, *leaves[leaf].shape[1:]), jnp.dtype(leaves[leaf].dtype))
        for number, (checksum, part) in enumerate(self.parts):
            held = None
            for leaf, (first, end) in wanted.items():
                start, stop = part[name][leaf]
                low, high = max(first, start), min(end, stop)
                if low >= high:
                    continue
                held = held if held is not None else self._part(number, checksum, name)
                expected = f"{leaves[leaf].dtype}{[stop - start, *leaves[leaf].shape[1:]]}"
                where, got = f"{self.path}: part {number}: {name}/{leaf}", describe(held[leaf]) if leaf in held else None
                expect(got == expected, where, expected, f"{got}; {DAMAGED}", error=CheckpointError)
                result[leaf][low - first : high - first] = held[leaf][low - start : high - start]
        return result

    def _part(self, number: int, checksum: str, name: str) -> dict[str, np.ndarray]:
        """One tree of a part by path, checked to be of this checkpoint."""
        folder = self.path / f"part-{number}"
        if inspect(folder, format=PART_FORMAT)[1]["sha256"] != checksum:
            raise CheckpointError(f"{folder}: expected the part of this checkpoint, got that of another; {DAMAGED}")
        return leaves_by_path(read(folder, {name: np.ndarray}, format=PART_FORMAT)[name])


def write_together(
    path: Path, trees: Mapping[str, Any], record: Mapping[str, Any],
    *, formats: tuple[str, str], rows: Callable[[str, Any], int],
) -> None:  # fmt: skip
    """Writes a folder in all processes of a job; each calls this with the same record and its part of the same arrays.

    Args:
      path: a folder that does not exist yet, on a disk that all processes see.
      trees: pytrees by name. Arrays may be spread over processes by their leading axis, in order of the processes.
      record: plain JSON.
      formats: formats of a folder without spread arrays, and of one with them.
      rows: rows of a leaf by path, without those that pad it.

    Raises:
      ProcessError: a process could not do its part, holds other values of what all hold, or does not see the folder. Nothing
        is at `path` then.
    """
    what = f"checkpoint {path}"
    whole, own, spread, ranges = together(what, lambda: _divide(trees, rows))
    mine = jax.process_index()
    has = [any(b > a for tree in part.values() for a, b in tree.values()) for part in ranges]
    part = together(what, lambda: pack(own, {}, format=PART_FORMAT) if has[mine] else None)
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
                raise FileNotFoundError(f"{partial}: not there; give an `out` on a disk that all processes see")
            if part is not None:
                write_packed(partial / f"part-{mine}", part)

        def end() -> None:
            missing = [n for n, one in enumerate(has) if one and not sealed.is_complete(partial / f"part-{n}")]
            if missing:
                raise FileNotFoundError(f"{partial}: no parts of processes {missing}; give an `out` on a disk that all see")
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
                held, count = here(leaf), rows(path, leaf) if np.ndim(leaf) else 0
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
