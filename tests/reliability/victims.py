"""Processes that work until they are killed: an index writer, a training run. A fork server that never ran JAX starts them."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow  # noqa: F401 (imported once by the fork server)

import aif_jax as aif
from aif_jax import train
from aif_jax.index import IndexWriter, ItemIndex, inspect, snapshots

SCHEMA = aif.Schema(item_attributes=(aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=3)), item_floats=4)
PARAMS = {"item": {"scale": np.float32(3)}}
# An item function that compiles in no time: this is about files and processes.
MODEL = aif.build(aif.Config(schema=SCHEMA, width=4))
MODEL = MODEL._replace(item=lambda params, f: {"vector": f.floats * params["item"]["scale"]})
FIRST = {5: 1, 6: 2, 7: 3}
PARTITIONS = 2


class CrashPoints:
    """Counts the changes that this process makes to files under `root`, and kills it just before number `at`.

    A change is a file opened for writing, a rename, a removal, a new folder, a write, a forced write. What Orbax writes
    in threads of other languages is not counted: kills at random moments are for that.
    """

    EVENTS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "fcntl.flock"}

    def __init__(self, root: Path, at: int | None):
        self.count = 0
        self._root = str(root)
        self._at = at
        self._lock = threading.Lock()
        sys.addaudithook(self._seen)
        for name in ("fsync", "write"):
            setattr(os, name, self._counted(getattr(os, name)))

    def _seen(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            if not isinstance(path, str) or not path.startswith(self._root) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in self.EVENTS:
            return
        elif isinstance(arguments[0], str) and os.path.isabs(arguments[0]) and not arguments[0].startswith(self._root):
            return
        self._add()

    def _counted(self, function: Any) -> Any:
        def counted(descriptor: int, *rest: Any) -> Any:
            self._add()
            return function(descriptor, *rest)

        return counted

    def _add(self) -> None:
        with self._lock:
            self.count += 1
            if self.count == self._at:
                os.kill(os.getpid(), signal.SIGKILL)


# the index writer


def change(partition: int, position: int) -> tuple[list[int], list[int] | None]:
    """An entry of the stream, the same at every call: item ids of that partition, and their numbers or None for a deletion."""
    rng = np.random.default_rng((partition, position))
    ids = (rng.choice(30, 4, replace=False) * PARTITIONS + partition).tolist()
    return ids, None if rng.random() < 0.25 else rng.integers(0, 1 << 16, 4).tolist()


def offset(position: int) -> int:
    """The offset in the stream of the nth entry of a partition: they rise with gaps, as Kafka's do."""
    return 3 * position + position % 2


def features(numbers: Any) -> aif.ItemFeatures:
    """Features of items, each known by one number."""
    numbers = np.asarray(numbers)
    ids = {"item": (numbers % 9).astype(np.int32), "category": (numbers % 3).astype(np.int32)}
    return aif.ItemFeatures(ids=ids, floats=(numbers[:, None] + np.arange(4) / 8).astype(np.float32))


def expected(positions: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and vectors after the entries up to these offsets, by NumPy alone."""
    items = dict(FIRST)
    for partition, last in positions.items():
        at = 1
        while offset(at) <= last:
            ids, numbers = change(partition, at)
            for place, item in enumerate(ids):
                items.pop(item, None) if numbers is None else items.update({item: numbers[place]})
            at += 1
    ids = np.array(sorted(items), np.int64)
    numbers = np.array([items[i] for i in ids.tolist()])
    return ids, (numbers[:, None] + np.arange(4) / 8).astype(np.float32) * np.float32(3)


def holds(index: ItemIndex, positions: dict[int, int]) -> bool:
    """Whether an index is what the stream up to these offsets makes of it, bit for bit."""
    ids, vectors = expected(positions)
    stored_ids, _ = index.stored()
    return np.array_equal(stored_ids, ids) and np.array_equal(index.take(ids)[0]["vector"], vectors)


def _compiled_in(cache: str) -> None:
    import jax  # not before: the options are those of this process

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def write(folder: str, updates: int, every: int, background: bool, at: int | None) -> None:
    """Applies `updates` entries of each partition, from wherever the stream is; a line of `log` for each start and entry.

    Without a kill it ends with the line "done" and the number of crash points that it passed.
    """
    root = Path(folder)
    _compiled_in(str(root / "compiled"))
    points = CrashPoints(root / "index", at)
    options: dict[str, Any] = dict(every_updates=every, background=background)
    if snapshots(root / "index"):
        stream = IndexWriter.resume(root / "index", aif.Trained(MODEL, PARAMS), **options)
    else:
        first = ItemIndex.build(
            aif.Trained(MODEL, PARAMS),
            features(list(FIRST.values())),
            ids=list(FIRST),
            batch_size=16,
            capacity=64,
            progress=False,
        )
        stream = IndexWriter.start(root / "index", first, **options)
    with open(root / "log", "a", buffering=1) as log:
        good = holds(stream.index, stream.positions)
        log.write(json.dumps({"start": stream.positions, "good": good}) + "\n")
        done = {partition: _entry(stream.positions.get(partition, 0)) for partition in range(PARTITIONS)}
        while min(done.values()) < updates:
            partition = min(done, key=lambda p: (done[p], p))
            done[partition] += 1
            ids, numbers = change(partition, done[partition])
            place: dict[str, int] = dict(position=offset(done[partition]), partition=partition)
            fresh = stream.delete(ids, **place) if numbers is None else stream.upsert(ids, features(numbers), **place)
            line = {"applied": [partition, done[partition]], "fresh": fresh, "saved": stream.saved_positions}
            log.write(json.dumps(line) + "\n")
        stream.close()
        log.write(json.dumps({"done": points.count, "good": holds(stream.index, stream.positions)}) + "\n")


def _entry(last: int) -> int:
    """How many entries of a partition have an offset up to `last`."""
    return next(at for at in range(1, last + 2) if offset(at) > last) - 1


def newest(folder: Path) -> dict[int, int]:
    """Positions of the newest complete snapshot, {} for none."""
    there = snapshots(folder / "index")
    return inspect(there[-1]).positions if there else {}


# the training run


def fit(folder: str, cache: str, at: int | None) -> None:
    """Trains with `aif.fit`, from wherever the run is; writes parameters and figures to `end.npz`, crash points to `points`."""
    root = Path(folder)
    _compiled_in(cache)
    events = [(n % 7, n * n % 11, 1_600_000_000 + n) for n in range(200)]
    user, item, time = (list(column) for column in zip(*events, strict=True))
    data = aif.read(
        {"user": user, "item": item, "time": time},
        items={"item": list(range(11)), "category": [n % 3 for n in range(11)]},
        columns=aif.Columns(),
    )
    model = aif.build(aif.presets.two_tower(data.schema, width=4, sequence=False, short_length=4))
    points = CrashPoints(root / "run", at)
    run = aif.fit(
        model, data, out=root / "run", batch_size=32, epochs=4, evaluate_every=3, k=None, progress=False, keep_best=False,
        task=train.NextItem(negatives=3),
    )  # fmt: skip
    import jax

    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(run.params)]
    np.savez(root / "end.partial.npz", *leaves, metrics=np.array(sorted(run.metrics.items()), dtype=object).astype(str))
    os.replace(root / "end.partial.npz", root / "end.npz")
    (root / "points").write_text(str(points.count))
