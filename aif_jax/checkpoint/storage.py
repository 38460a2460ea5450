"""Named trees of arrays and a JSON record in one folder that checks itself, on Orbax.

The record holds a SHA-256 of every leaf, which `read` checks. Orbax alone can read the arrays: nested dicts under the trees'
names. Several processes of one job all call `write` with the same arrays, and Orbax writes them once; each reads for itself.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import multihost
from orbax.checkpoint import v1 as ocp

from aif_jax.checks import expect
from aif_jax.export.consume import files
from aif_jax.sharding.meshes import place
from aif_jax.sharding.processes import several
from aif_jax.store import sealed
from aif_jax.store.folders import METADATA_FILE, CheckpointError, local, new_folder, unfinished
from aif_jax.store.sealed import is_json, seal
from aif_jax.store.trained import Digest, __version__, digest
from aif_jax.trees import describe, differences, is_key, leaves_by_path, listed, nest

FORMAT = "aif_jax.checkpoint/2"
RECORD = "custom_metadata"  # as Orbax names it
RECORD_BYTES, NUMBER_BYTES = 32 << 20, 16  # at most
DAMAGED = "restore a copy, or take an earlier step"
MOST_FILES = 1 << 16
PATIENCE = 3600  # seconds until all processes have met
KEY_IMPLEMENTATIONS = {"key<fry>": ("threefry2x32", 2), "key<rbg>": ("rbg", 4), "key<urbg>": ("unsafe_rbg", 4)}

Payload: TypeAlias = tuple[dict[str, Any], dict[str, Any]]
"""What Orbax writes: nested dicts of arrays, and the record with a digest of every leaf."""


def write(path: str | Path, packed: Payload) -> None:
    """Write what `pack` returned into a new folder: complete, or not there at all; FileExistsError if it exists."""
    arrays, record = packed
    if several():  # Orbax gives the folder its name once all processes are here
        expect(not local(path).exists(), str(path), "a new folder", "one that is there already", error=FileExistsError)
        with _context():
            return ocp.save_checkpointables(str(local(path)), arrays, custom_metadata=record)
    with new_folder(path) as partial, _context():
        ocp.save_checkpointables(str(partial), arrays, overwrite=True, custom_metadata=record)


def pack(trees: Mapping[str, Any], record: Mapping[str, Any]) -> Payload:
    """Copy pytrees of arrays of numbers or typed keys to the host, so that the caller may donate them, and hash them.

    Raises ValueError for other leaves, or a `record` that is not plain JSON.
    """
    expect(is_json(record), "record", "plain JSON", repr(record))
    named = {name: leaves_by_path(tree) for name, tree in trees.items()}
    expect(any(named.values()), "checkpoint", "at least one array to save", f"none in {sorted(trees)}")
    for name, tree in named.items():
        for path, leaf in tree.items():
            if not isinstance(leaf, jax.Array) and np.asarray(leaf).dtype.kind in "OSUT":
                raise ValueError(f"{name}/{path}: expected an array of numbers, got {type(leaf).__name__}")
    leaves = {
        name: {path: dataclasses.asdict(digest(leaf, path)) for path, leaf in tree.items()} for name, tree in named.items()
    }
    metadata = {**record, "format": FORMAT, "aif_jax": __version__, "jax": jax.__version__, "leaves": leaves}
    metadata |= {"sha256": seal(metadata)}
    # Orbax refuses arrays of size 0; the record has all there is to know of them.
    arrays = {name: {path: _encode(leaf) for path, leaf in tree.items() if np.size(leaf)} for name, tree in named.items()}
    return {name: nest(tree) for name, tree in arrays.items() if tree}, metadata


def inspect(path: str | Path) -> tuple[dict[str, dict[str, Digest]], dict[str, Any]]:
    """Return the digest of every leaf by tree and path, and the record given to `pack`; reads no arrays.

    Raises:
      FileNotFoundError: nothing there.
      CheckpointError: torn, altered or foreign.
    """
    path = local(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no checkpoint{unfinished(path)}; give the folder of one, or the --out of train")
    if not sealed.is_complete(path):
        steps = complete_steps(path)
        hint = f"; it holds the steps {steps} of a run, which Checkpoints({str(path)!r}) reads" if steps else ""
        raise CheckpointError(f"{path}: not a complete checkpoint: {METADATA_FILE} is missing{hint}; {DAMAGED}")
    with sealed.as_checkpoint_error(path, DAMAGED):
        record = files.read_sealed(path, METADATA_FILE, format=FORMAT, limit=RECORD_BYTES, entry=RECORD)

    def digests(tree: Mapping[str, Any]) -> dict[str, Digest]:
        return {leaf: Digest(**one | {"shape": tuple(map(operator.index, one["shape"]))}) for leaf, one in tree.items()}

    leaves = parsed(path, record, "leaves", lambda trees: {name: digests(tree) for name, tree in trees.items()})
    _check_files(path, sum(NUMBER_BYTES * math.prod(leaf.shape) for tree in leaves.values() for leaf in tree.values()))
    return leaves, record


def parsed(path: str | Path, record: Mapping[str, Any], name: str, parse: Callable[[Any], Any]) -> Any:
    """Return a part of the record as an object; CheckpointError where that is none."""
    try:
        return parse(record[name])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        by = record.get("aif_jax", __version__)
        written = "" if by == __version__ else f" (written by aif_jax {by}, this is {__version__})"
        raise CheckpointError(f"{path}: the {name} inside cannot be read{written}; {error}") from error


def read(path: str | Path, leaves: Mapping[str, Mapping[str, Digest]], like: Mapping[str, Any]) -> dict[str, Any]:
    """Read some trees of a folder and check every leaf of them by its digest in `leaves`; raises as `load`.

    `like` has a template for each name, see `load`: None takes the tree as nested dicts on the default device, `np.ndarray` as
    nested dicts of NumPy arrays.
    """
    path = local(path)
    if missing := like.keys() - leaves.keys():
        raise ValueError(f"{path}: expected {sorted(missing)}, but it was saved without; it has {sorted(leaves)}")
    return {name: _restore(path, name, leaves[name], template) for name, template in like.items()}


@functools.cache
def meet() -> None:
    """Wait, once, until all processes of a job are here; alone, a process goes on at once."""
    # On CPUs the first collective fails after 30 s where a process comes later, because it reads more or compiles longer.
    multihost.get_barrier_sync_fn()(key="aif_jax.checkpoint.storage.meet", timeout_ms=1000 * PATIENCE)


def complete_steps(directory: Path) -> list[int]:
    """Return steps of a run on disk, ascending; CheckpointError for one without its record: a save is whole or not there."""
    if not directory.is_dir():
        return []
    steps = [path for path in directory.iterdir() if path.name.isdigit() and path.is_dir()]
    damaged = [path for path in steps if not sealed.is_complete(path) and path.is_dir()]
    if damaged:
        raise CheckpointError(f"{damaged[0]}: damaged, {METADATA_FILE} is missing; remove the folder to go on with other steps")
    return sorted(int(path.name) for path in steps)


def _check_files(path: Path, data: int) -> None:
    """Raise for more or larger files than a checkpoint of these bytes of `data` has; sparse ones are refused too."""
    for count, file in enumerate((file for file in path.rglob("*") if not file.is_dir()), start=1):
        limit = RECORD_BYTES + (data if file.parent.name == "d" else 0)  # Orbax keeps data in folders of this name
        if (size := file.lstat().st_size) > limit or count > MOST_FILES:
            expected = f"at most {MOST_FILES} files, this one of at most {limit} bytes"
            raise CheckpointError(f"{path}: {file.name}: expected {expected}, got file {count} of {size} bytes; {DAMAGED}")


def _context(*, alone: bool = False) -> ocp.Context:
    """Return how Orbax works here: with all processes of a job, or by this one for itself."""
    context = ocp.Context()
    # Where making a folder fails in the background, Orbax's threads wait minutes for a folder that never comes.
    context.asynchronous.create_directories_asynchronously = False
    if alone and several():
        context.multiprocessing.active_processes = {jax.process_index()}
        context.multiprocessing.primary_host = jax.process_index()
    return context


def _restore(path: Path, name: str, leaves: Mapping[str, Digest], like: Any) -> Any:
    """Return one tree: its leaves read, checked against the record, and put into the form of the template."""
    nested = like is None or like is np.ndarray
    templates = dict.fromkeys(leaves, like) if nested else leaves_by_path(like)
    if not nested:
        stored = {p: str(leaf) for p, leaf in leaves.items()}
        lines = differences(stored, {p: describe(t) for p, t in templates.items()}, source="checkpoint")
        expect(not lines, str(path), f"{name} like the template", f"others:\n{listed(lines)}")
    arrays = {p: _stored(leaf) for p, leaf in leaves.items()}
    if stored := {p: array for p, array in arrays.items() if array.size}:
        try:
            with _context(alone=True):
                arrays |= leaves_by_path(ocp.load(str(path), nest(stored), checkpointable_name=name))
        except PermissionError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0][:300]
            raise CheckpointError(f"{path}: {name} is torn or altered: {type(error).__name__}: {reason}; {DAMAGED}") from error
    placed = {p: _decode(arrays[p], leaves[p], templates[p], f"{path}: {name}/{p}") for p in templates}
    return nest(placed) if nested else jax.tree.unflatten(jax.tree.structure(like), placed.values())


def _encode(leaf: Any) -> np.ndarray:
    """Return a copy of a leaf on the host, as Orbax takes it."""
    return np.array(jax.random.key_data(leaf) if is_key(leaf) else leaf)


def _stored(leaf: Digest) -> np.ndarray:
    """Return an array of the shape and dtype in which `_encode` stored a leaf."""
    if leaf.dtype in KEY_IMPLEMENTATIONS:
        return np.empty((*leaf.shape, KEY_IMPLEMENTATIONS[leaf.dtype][1]), np.uint32)
    return np.empty(leaf.shape, jnp.dtype(leaf.dtype))


def _decode(array: Any, leaf: Digest, template: Any, name: str) -> Any:
    """Return the inverse of `_encode`: checked against what was saved, and moved to where the template wants it.

    The template is an array, a `jax.ShapeDtypeStruct`, None for the default device, or `np.ndarray` for NumPy.
    """
    if leaf.dtype in KEY_IMPLEMENTATIONS:
        array = jax.random.wrap_key_data(jnp.asarray(array), impl=KEY_IMPLEMENTATIONS[leaf.dtype][0])
    if digest(array) != leaf:
        raise CheckpointError(f"{name} was altered: its contents are not those that were saved; {DAMAGED}")
    if isinstance(template, np.ndarray) or template is np.ndarray:
        return array
    # an array that was never placed by hand has a sharding that does not bind
    sharding = getattr(template, "sharding", None) if getattr(template, "committed", True) else None
    if sharding is not None:
        array = place(array, sharding)
        expect(str(array.dtype) == leaf.dtype, name, leaf.dtype, f"{array.dtype} of JAX here; set jax_enable_x64 or use NumPy")
    moved = array if isinstance(array, jax.Array) else jax.device_put(array)  # `jnp.asarray` compiles a program for each shape
    return moved if moved.dtype == array.dtype else array  # 64 bits stay in NumPy where JAX would cut them
