"""A refresh that works until it is killed, in a separate process."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow  # noqa: F401 (imported once by the fork server)

from aif_jax.connectors import SnapshotStore
from aif_jax.refreshing import job as jobs
from tests import refresh_world as world
from tests.killed import compile_into
from tests.reliability.victims import CrashPoints

STEPS = ("current", "read", "warm start", "train", "additions", "gate", "served", "publish served", "export",
         "publish", "report", "done")  # fmt: skip


def refresh(root: str, current: str, since: int, at: int | None, step: str | None = None, sealed: bool = False) -> None:
    """Refreshes `current` into root/store; killed in a step before or after it is sealed, or at crash point `at`.

    Without a kill it writes root/end.json: what the call returned, and the crash points that it passed.
    """
    folder = Path(root)
    compile_into(str(folder.parent / "compiled"))
    jobs.Job.step = killing(step, sealed)  # type: ignore[method-assign]
    points, places = CrashPoints(folder, at), {"out": folder / "store", "work": folder / "work"}
    made = world.refresh(current, world.events(5), items=world.items(5), since=since, **places, **world.OPTIONS)
    end = {"status": made.status, "name": made.name, "points": points.count}
    (folder / "end.json").write_text(json.dumps(end))


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
