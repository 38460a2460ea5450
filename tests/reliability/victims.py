"""Processes that work until they are killed: a writer, a training run, a refresh. A fork server without JAX starts them."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow  # noqa: F401 (imported once by the fork server)

import aif_jax as aif
from aif_jax.connectors import SnapshotStore
from aif_jax.index.writer import snapshots
from aif_jax.refreshing import job as jobs
from tests import demo
from tests import refresh_world as world
from tests.killed import compile_into
from tests.writer_world import Items

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


def offset(number: int) -> int:
    """The offset in the stream of the nth update of a partition: they rise with gaps, as Kafka's do."""
    return 3 * number + number % 2


def count(last: int) -> int:
    """How many updates of a partition have an offset up to `last`."""
    return next(number for number in range(1, last + 2) if offset(number) > last) - 1


def items(folder: Path) -> Items:
    """The index in a folder, whose updates have these offsets."""
    return Items(folder / "table", at=offset)


def write(folder: str, updates: int, every: int, at: int | None) -> None:
    """Applies `updates` updates of each partition, from wherever the stream is; a line of `log` for start, update and end."""
    root = Path(folder)
    compile_into(str(root.parent / "compiled"))
    table = items(root)
    points = CrashPoints(table.directory, at)
    stream = table.resume(every_updates=every) if snapshots(table.directory) else table.start(every_updates=every)

    def good() -> bool:
        return table.holds(stream.index, {partition: count(last) for partition, last in stream.positions.items()})

    with open(root / "log", "a", buffering=1) as log:
        log.write(json.dumps({"start": stream.positions, "good": good()}) + "\n")
        done = {partition: count(stream.positions.get(partition, 0)) for partition in range(PARTITIONS)}
        while min(done.values()) < updates:
            partition = min(done, key=lambda p: (done[p], p))
            done[partition] += 1
            fresh = table.apply(stream, done[partition], partition=partition)
            line = {"applied": [partition, done[partition]], "fresh": fresh, "saved": stream.saved_positions}
            log.write(json.dumps(line) + "\n")
        stream.close()
        log.write(json.dumps({"done": points.count, "good": good()}) + "\n")


def run(folder: Path, later: int = 0, **options: Any) -> aif.Run:
    """Trains with `aif.fit` in a folder, from wherever the run is; events come so many seconds later."""
    n = np.arange(200)
    items = {"item": list(range(11)), "category": [n % 3 for n in range(11)]}
    data = aif.read({"user": n % 7, "item": n * n % 11, "time": 1_600_000_000 + n + later}, items=items, columns=aif.Columns())
    model = aif.build(aif.presets.two_tower(data.schema, width=4, sequence=False, short_length=4))
    given: dict[str, Any] = dict(epochs=1, batch_size=32, evaluate_every=3, k=None, progress=False)
    given |= {"task": aif.train.NextItem(negatives=3)}
    return demo.fit(model, data, out=folder, **(given | options))


def fit(folder: str, at: int | None) -> None:
    """Trains with `aif.fit`, from wherever the run is; writes parameters and figures to `end.npz`, then `end.json`."""
    root = Path(folder)
    compile_into(str(root.parent / "compiled"))
    points = CrashPoints(root / "run", at)
    made = run(root / "run", epochs=4, keep_best=None, buckets=(2,))
    import jax

    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(made.params)]
    np.savez(root / "end.partial.npz", *leaves, metrics=np.array(sorted(made.metrics.items()), dtype=object).astype(str))
    os.replace(root / "end.partial.npz", root / "end.npz")
    (root / "end.json").write_text(json.dumps({"points": points.count}))


STEPS = ("current", "read", "train", "additions", "gate", "served", "publish served", "export", "publish", "done")


def refresh(root: str, current: str, since: int, at: int | None, step: str | None = None, sealed: bool = False) -> None:
    """Refreshes `current` into root/store; killed in a step before or after it is sealed, or at crash point `at`.

    Without a kill it writes root/end.json: what the call returned, and the crash points that it passed.
    """
    folder = Path(root)
    compile_into(str(folder.parent / "compiled"))
    jobs.Job.step = killing(step, sealed)  # type: ignore[method-assign]
    points, places = CrashPoints(folder, at), {"out": folder / "store", "work": folder / "work"}
    made = world.refresh(current, world.events(5), items=world.items(5), since=since, **places, **world.OPTIONS)
    (folder / "end.json").write_text(json.dumps({"status": made.status, "name": made.name, "points": points.count}))


def killing(step: str | None, sealed: bool) -> Callable[..., Any]:
    """`Job.step` that kills this process at a step, when its work is done or when it is sealed too."""
    whole = jobs.Job.step

    def patched(self: Any, name: str, make: Any) -> Any:
        def killed(partial: Path) -> Any:
            made = make(partial)
            if name == step and not sealed:
                os.kill(os.getpid(), signal.SIGKILL)
            return made

        record = whole(self, name, killed)
        if name == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return record

    return patched


def contents(root: Path) -> dict[str, str]:
    """Digests of the files of the served model and of the new one in root/store; raises unless nothing else was left.

    Compiled functions are left out, and the manifest with their digests: they name the Python frames that called the export.
    """
    store = SnapshotStore(root / "store")
    names, (report,) = store.names(), SnapshotStore(root / "store" / "reports").names()
    assert len(names) == 2 and store.current() == names[-1] and report
    digests = {}
    for number, name in enumerate(names):
        files = json.loads((root / "store" / name / "snapshot-manifest.json").read_text())["files"]
        named_by_caller = {"manifest.json", *(relative for relative in files if relative.endswith(".jax_export"))}
        digests |= {f"{number}/{each}": entry["sha256"] for each, entry in files.items() if each not in named_by_caller}
    return digests
