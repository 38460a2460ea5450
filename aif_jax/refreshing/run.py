"""`refresh`: from the served model and newer events to the next version in service, in steps that a kill does not undo."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, Literal

from aif_jax import output
from aif_jax.checks import ArgumentError, expect
from aif_jax.connectors.snapshot_store import SnapshotStore
from aif_jax.encoding.times import iso_text, seconds_of
from aif_jax.export.writer import expect_platforms
from aif_jax.readers.tables import Source, files_of
from aif_jax.refreshing.config import RefreshConfig
from aif_jax.refreshing.job import DONE, begin
from aif_jax.refreshing.served import open_served
from aif_jax.refreshing.steps import Refresh
from aif_jax.store.folders import URL, local
from aif_jax.store.trained import Trained
from aif_jax.train.distillation import Teacher
from aif_jax.train.tasks import Task

REPORTS = 30  # reports that stay in OUT/reports


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefreshResult:
    """Result of a refresh.

    Attributes:
      status: "published", "refused" by the gate, or "nothing new" since the served model.
      name: name of the published snapshot; None for none.
      trained: the new model, refused or not; None for nothing new.
      report: what is in `report.json`: status, name, and what each step returned by the step's name; {} for nothing new.
    """

    status: Literal["published", "refused", "nothing new"]
    name: str | None = None
    trained: Trained | None = dataclasses.field(default=None, repr=False)
    report: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)


def refresh(
    current: Trained | str | Path,
    events: Source,
    config: RefreshConfig = RefreshConfig(),
    *,
    out: str | Path,
    items: Source,
    users: Source | None = None,
    work: str | Path | None = None,
    task: Task | None = None,
    teacher: Teacher | None = None,
    progress: bool = True,
) -> RefreshResult:
    """Train the served model on newer events, judge it against the served one, and publish it if the gate passes it.

    One job of steps: read, train, additions after training, gate, export with its index, publish. Each is sealed in `work`
    when it is done: killed at any moment, the same call resumes after the last one and ends with the same model, bit for bit. A
    second job on the same folder or store is refused.

    The new samples are split by time: training, for a calibrated model its calibration, and the newest hours for the gate. The
    next refresh trains on what this one held out. A bad day spoils both its training part and its newest hours, so the gate
    also judges on an earlier period, `RefreshConfig.fixed`, which no refresh trains on. Into an empty store the served model is
    published first, once the gate has passed the new one, so that the first refresh can be rolled back.

    Args:
      current: served model: a snapshot store of exports (such as `out`), a folder that `aif.open` reads, or a `Trained`.
      events: files or tables of `read`: new events, and earlier ones as far back as histories and `replay` should reach.
      config: what is trained, held out, forgotten and refused.
      out: snapshot store of exports, see `connectors.SnapshotStore`: what `aif-jax serve OUT --mirror DIR` follows. Reports go
        to the store OUT/reports.
      items, users: files or tables of `read`; `users` None for none.
      work: local folder of the sealed steps; default: OUT.work next to a local `out`.
      task: see `fit`; None takes that of the served model's refresh or run, if it says one. For such a model no other one.
      teacher: see `fit`; a trained model scores the new samples under the new vocabularies, and may lack some of their ids.
      progress: whether to show a line for each step and bars.

    Returns:
      `RefreshResult`; a refused model is not published, its report is.

    Raises:
      WriterConflict: another job works there; says which process on which host.
      FileNotFoundError: no served model, no such file.
      ValueError: `since` or `fixed` is needed and not given, another task than the model's, data or settings that do not fit,
        as `read` and `fit`.
      SnapshotError: the same call made a model that was rolled back.
    """
    where, needed = str(out), f"a local folder for the steps of a job on {out}"
    expect(work is not None or not URL.match(where), "work", needed, work, error=ArgumentError)
    folder = local(work if work is not None else f"{where.rstrip('/')}.work", "work")
    store, reports = SnapshotStore(where, keep=config.keep), SnapshotStore(f"{where.rstrip('/')}/reports", keep=REPORTS)
    arguments = dataclasses.asdict(config) | {
        "current": current.version if isinstance(current, Trained) else str(current), "out": store.url, "task": repr(task),
        "files": [str(each)[:200] for each in (events, items, users)],
    }  # fmt: skip
    if teacher is not None:
        arguments["teacher"] = {"name": teacher.name, "loss": repr(teacher.loss)}
    opened = functools.partial(open_served, current, config.since, task)  # again under the lock: a publish may come between

    def check() -> None:
        expect_platforms(config.platforms)
        for source in (events, items, users, None if teacher is None else teacher.candidates):
            if isinstance(source, str | os.PathLike):
                files_of(source)
        trained, _ = opened()
        for moment in config.fixed or ():
            seconds_of(moment, "fixed", unit=trained.need_encoder("refresh").columns.time_unit)

    folders = () if store.folder is None else (store.folder,)
    with output.hidden(not progress), begin(folder, arguments, folders=folders, check=check) as job:
        steps = Refresh(
            job=job, config=config, opened=opened, events=events, items=items, users=users, store=store, teacher=teacher,
        )  # fmt: skip
        if other := steps.changed():
            check()
            output.say(f"refresh: {other} since the job was killed, so its steps are done again")
            job.restart()
            steps = dataclasses.replace(steps)  # which has read nothing
        job.step("current", steps.keep_current)
        if not job.step("read", steps.read_data)["new"]:
            job.step(DONE, lambda _: {"line": f"nothing new since {iso_text(steps.since)}"})
            return RefreshResult(status="nothing new")
        job.step("train", steps.train)
        job.step("additions", steps.add)
        if not job.step("gate", steps.judge)["reasons"]:
            job.step("served", steps.export_served)
            job.step("publish served", functools.partial(steps.publish, step="served"))
            job.step("export", steps.export)
            job.step("publish", functools.partial(steps.publish, step="export"))
        report = job.step(DONE, functools.partial(steps.report, to=reports))["report"]
        return RefreshResult(status=report["status"], name=report["name"], trained=steps.trained, report=report)
