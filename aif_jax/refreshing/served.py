"""The served model and the record of its training: from which moment samples are new, task, periods that it was judged on."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from aif_jax.checks import ArgumentError, expect
from aif_jax.connectors.snapshot_store import CURRENT, SnapshotStore
from aif_jax.encoding.times import seconds_of
from aif_jax.export.consume.files import MANIFEST as EXPORTED
from aif_jax.export.contents import open as open_model
from aif_jax.store.folders import URL
from aif_jax.store.trained import Trained
from aif_jax.train.settings import FitSettings
from aif_jax.train.tasks import Task


def training_record(trained: Trained) -> dict[str, Any]:
    """Return the record of a model's training, from the settings of its run.

    `since` is the moment from which samples are new: the end of a run's validation slice, of a refresh the end of its training.
    `task` and `repeats` of its data are None for unknown, as `since`. `periods` [from, before] it was judged and never trained
    on; a refresh takes the first that the events hold. `newest` is the latest event that it was judged on, -1 for none.
    """
    record: dict[str, Any] = {"since": None, "newest": -1, "task": None, "repeats": None, "periods": []}
    record |= {"id_dropout": 0.0, "seed": 0}
    if trained.settings is None or "first_validation" not in trained.settings:
        return record
    settings = FitSettings.from_json(trained.settings, "settings of the served model")
    record |= {name: getattr(settings, name) for name in ("repeats", "id_dropout", "seed")}
    record |= {"since": settings.first_test, "task": task_record(settings.task)}
    if settings.without is not None:  # trained by a refresh, which judged it on that period, and on what came last
        last = [settings.first_test, settings.newest + 1]
        record |= {"since": settings.first_validation, "newest": settings.newest, "periods": [list(settings.without), last]}
    elif settings.validates:
        record["periods"] = [[settings.first_validation, settings.first_test]]
    return record


def task_record(task: Task) -> dict[str, Any]:
    """Return a task as plain JSON."""
    return {"name": type(task).__name__} | dataclasses.asdict(task)


def open_served(current: Trained | str | Path, since: Any, task: Task | None) -> tuple[Trained, dict[str, Any]]:
    """Return the served model and its record, with the task and `since` as given or as recorded.

    Raises:
      FileNotFoundError: no served model. ArgumentError: no moment; another task than the model's, or one of cascades.
    """
    got = f"{type(current).__name__}; give run.trained"
    expect(isinstance(current, Trained | str | Path), "refresh current", "a Trained, a folder or a URL", got, error=TypeError)
    if isinstance(current, Trained):
        trained = current
    else:
        folder, is_url = Path(current), URL.match(str(current)) is not None
        there, got = is_url or any(folder.glob("[!.]*")), "nothing; give `current`, such as the --out of `aif-jax train`"
        expect(there, str(current), "a served model", got, error=FileNotFoundError)
        with tempfile.TemporaryDirectory() as fetched:
            if is_url or ((folder / CURRENT).is_file() and not (folder / EXPORTED).is_file()):
                folder = SnapshotStore(current).fetch(fetched)
            trained = open_model(folder)
    record = training_record(trained)
    known, given = record["task"], None if task is None else task_record(task)
    other = known is not None and given not in (None, known)
    expect(not other, "refresh task", f"that of the served model, {known}", f"{given}; leave it out", error=ArgumentError)
    got = "Cascaded, whose requests it does not read; write a job of aif.read(earlier=), read_cascade and fit(start=)"
    expect((known or given or {}).get("name") != "Cascaded", "refresh task", "NextItem, Impressions", got, error=ArgumentError)
    unit = trained.need_encoder("refresh").columns.time_unit
    since = record["since"] if since is None else seconds_of(since, "since", unit=unit)
    expected = "the moment from which events are new, because the served model does not say until when it was trained"
    got = "None; give it, such as --since 2026-05-06; a model that refresh, fit or `aif-jax add` wrote says it"
    expect(since is not None, "refresh since", expected, got, error=ArgumentError)
    return trained, record | {"task": known or given, "since": since}
