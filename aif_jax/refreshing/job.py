"""Steps in a folder, each done once: sealed when it ends, so that a killed job goes on behind the last one."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aif_jax.output import say
from aif_jax.store.folders import WriteLock, new_folder, remove_folder, remove_unfinished, write_file
from aif_jax.trees import differences

SEAL = "step.json"
RECORD = "job.json"
DONE = "done"
"""The step that ends a job: what is there then is removed by the next one."""


class Job:
    """The job in a folder, in which each step is a folder; `begin` opens it.

    `records` holds what each step that was called returned, by name in their order.
    """

    def __init__(self, folder: Path, arguments: Any):
        self.folder, self.arguments = folder, arguments
        self.records: dict[str, dict[str, Any]] = {}

    def sealed(self, name: str) -> dict[str, Any] | None:
        """Return the record of a step that is done, None for one that is not."""
        file = self.folder / name / SEAL
        return json.loads(file.read_text("utf-8")) if file.is_file() else None

    def restart(self) -> None:
        """Remove all steps, and note the arguments."""
        if self.folder.exists():
            remove_folder(self.folder)
        self.folder.mkdir()
        write_file(self.folder / RECORD, json.dumps(self.arguments, indent=1).encode())

    def step(self, name: str, make: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the record of a step: `make` fills a folder and returns it, unless a job before the kill did.

        The record is plain JSON; "line" in it is printed, "seconds" is added. The folder appears whole or not at all.
        """
        record = self.sealed(name)
        if record is None:
            began = time.perf_counter()
            with new_folder(self.folder / name) as partial:
                result = make(partial)
                text = json.dumps({"seconds": time.perf_counter() - began, **result}, indent=1)
                (partial / SEAL).write_text(text, "utf-8")
            record = json.loads(text)
            say(f"refresh: {name}: {record['line']} ({record['seconds']:.1f} s)")
        else:
            say(f"refresh: {name}: {record['line']} (done before)")
        self.records[name] = record
        return record


@contextlib.contextmanager
def begin(
    work: Path, arguments: Mapping[str, Any],
    *, folders: tuple[Path, ...] = (), check: Callable[[], None] = lambda: None,
) -> Iterator[Job]:  # fmt: skip
    """Open the job in a work folder, new or to be resumed, which it locks, as it does `folders`.

    Before a new job `check` raises for inputs that cannot be used; nothing is written then. An unfinished job of other
    arguments is removed: nothing of it was published.

    Raises WriterConflict: a job runs there; names its process and host.
    """
    folder, record = work / "job", json.loads(json.dumps(arguments, default=str))

    def unfinished() -> dict[str, Any] | None:
        file, done = folder / RECORD, folder / DONE / SEAL
        return json.loads(file.read_text("utf-8")) if file.is_file() and not done.is_file() else None

    if unfinished() != record:
        check()
    with contextlib.ExitStack() as until_end:
        for each in dict.fromkeys((work, *folders)):
            until_end.enter_context(contextlib.closing(WriteLock(each)))
        remove_unfinished(work)
        job = Job(folder, record)
        if (before := unfinished()) != record:
            if before is not None:
                lines = differences(before, record, path="refresh", source="unfinished job")
                say("refresh: an unfinished job of other arguments is dropped: " + "; ".join(lines[:3]))
            job.restart()
        yield job
