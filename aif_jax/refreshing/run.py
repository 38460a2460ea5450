"""`refresh`: from the served model and newer events to the next version in service, in steps that a kill does not undo."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from aif_jax import checkpoint, export, output
from aif_jax.blocks import item_offset, pure_svd
from aif_jax.checks import ArgumentError, expect
from aif_jax.connectors.snapshot_store import CURRENT, SnapshotError, SnapshotStore
from aif_jax.data.candidates import counts_before
from aif_jax.data.dataset import Dataset
from aif_jax.encoding.encoder import under
from aif_jax.encoding.times import seconds_of, shown
from aif_jax.encoding.vocabulary import new_rows
from aif_jax.export.consume.files import MANIFEST as EXPORTED
from aif_jax.export.contents import open as open_model
from aif_jax.export.writer import PLATFORMS, expect_platforms
from aif_jax.index import ItemIndex
from aif_jax.readers import read, read_items
from aif_jax.readers.tables import Source, TextFile, files_of
from aif_jax.refreshing.gate import GateConfig, Requests, bytes_of, judge, measure, volume
from aif_jax.refreshing.job import DONE, Job, begin
from aif_jax.refreshing.warm import forgotten, warm_start
from aif_jax.run import fit
from aif_jax.scores import GROUP, with_calibration
from aif_jax.store.folders import URL, local
from aif_jax.store.trained import Trained
from aif_jax.train import edits
from aif_jax.train import fit as training
from aif_jax.train.tasks import TASKS, Task, task_of

KEPT = "refresh.json"
"""File in a published export: what `training_record` says of it, and a digest of what it was made from."""
REPORT, REPORTS = "report.json", 30  # reports that stay in OUT/reports
DAY = 86_400


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refreshed:
    """What a refresh came to.

    Attributes:
      status: "published", "refused" by the gate, or "nothing new" since the served model.
      name: name of the published snapshot; None for none.
      trained: the new model, refused or not; None for nothing new.
      report: what is in `report.json`; {} for nothing new.
    """

    status: Literal["published", "refused", "nothing new"]
    name: str | None = None
    trained: Trained | None = dataclasses.field(default=None, repr=False)
    report: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)


def refresh(
    current: Trained | str | Path,
    events: Source | Dataset,
    *,
    out: str | Path,
    items: Source | None = None,
    users: Source | None = None,
    work: str | Path | None = None,
    unknown: Literal["skip", "error"] = "skip",
    task: Task | None = None,
    since: Any = None,
    forget: float | None = None,
    replay: float = 0.1,
    held_out: float = 0.1,
    epochs: int = 1,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    id_dropout: float | None = None,
    seed: int = 0,
    requests: int = 2000,
    k: int = 100,
    fixed: tuple[Any, Any] | None = None,
    gate: GateConfig = GateConfig(),  # noqa: B008 frozen
    platforms: Iterable[str] = PLATFORMS,
    keep: int = 3,
    progress: bool = True,
) -> Refreshed:
    """Trains the served model on newer events, judges it against the served one, and publishes it if the gate passes it.

    One job of steps: read, warm start, train, additions after training, gate, index, export, publish. Each is
    sealed in `work` when it is done: killed at any moment, the same call goes on behind the last one and ends with the same
    model, bit for bit. A second job on the same place is refused.

    The new samples since the served model's last one are split by time: the first are trained on, with a calibrated model the
    next part is what the calibration is fitted on, and the last part, the newest hours, is for the gate. The next refresh
    trains on what this one held out.

    A bad day spoils both its training part and its newest hours. So the gate also judges on the requests of an earlier period,
    `fixed`, which no refresh trains on.

    All inputs are checked before an unfinished job of other arguments is dropped. Into an empty store the served model is
    published first, once the gate has passed the new one, so that the first refresh can be rolled back.

    Args:
      current: served model: a snapshot store of exports (such as `out`), a folder that `aif.open` reads, or a `Trained`.
      events: files or tables of `read`: the new events, and earlier ones as far back as histories and `replay` shall reach. Or
        a `Dataset` with an encoder.
      out: snapshot store of exports, see `connectors.SnapshotStore`: what `aif-jax serve OUT --mirror DIR` follows. Reports go
        to the store OUT/reports.
      items, users: files or tables of `read`; None with a `Dataset`.
      work: local folder of the sealed steps; default: OUT.work next to a local `out`.
      unknown: what to do with events of items that are neither in `items` nor known to the served model: leave them out of
        training, or raise an error, see `read`.
      task: see `fit`; None takes that of the served model's refresh or run, if it says one. For such a model no other one.
      since: the moment from which events are new, a date or number; None: where the served model's training ended.
      forget: days without an event after which an item, a user, or an attribute value that came with them alone loses its row
        and is unknown to the new model; None: all keep theirs. Before `events` reach back that far, nothing is forgotten. An
        item or user that is new gets a row with its first event.
      replay: earlier samples to train on too, as a share of the new ones, drawn at random.
      held_out: share of the new samples that the gate judges on, and again as many for a calibration.
      epochs, learning_rate: see `fit`. One epoch at a tenth of its rate, because the parameters are trained already.
      batch_size, seed: see `fit`.
      id_dropout: see `fit`; None: that of the served model's training. Above 0, new items without a training event are
        scored as the unknown item, as by `Run.with_unseen_items`.
      requests: at most so many of the held-out samples are evaluated, drawn at random. To notice a loss of 1 GAUC point on half
        of the days the gate needs 130 to 340, of different users.
      k: k of HR@k and the overlap, for tasks that rank the catalogue.
      fixed: (first moment, first moment after) of an earlier period that both models are judged on too. No refresh trains on it
        from now on, replayed or not. None takes that of the served model's refresh, of its run the validation span; where
        `events` no longer hold `GateConfig.users` users of it, the hours that the served model's own gate judged it on.
      gate: bounds.
      platforms: see `export.save`.
      keep: exports that stay in the store.
      progress: whether to show a line for each step and bars.

    Returns:
      `Refreshed`; a refused model is not published, its report is.

    Raises:
      WriterConflict: another job works there; says which process on which host.
      FileNotFoundError: no served model, no such file.
      ValueError: `since` or `fixed` is needed and not given, another task than the model's, data or settings that do not fit,
        as `read` and `fit`.
      SnapshotError: the same call made a model that was rolled back.
    """
    expect(0 < held_out < 0.5, "held_out", "a share above 0, below 0.5", held_out, error=ArgumentError)
    expect(unknown in ("skip", "error"), "unknown", "'skip' or 'error'", repr(unknown), error=ArgumentError)
    expect(forget is None or forget > 0, "forget", "days above 0", forget, error=ArgumentError)
    where, needed = str(out), f"a local folder for the steps of a job on {out}"
    expect(work is not None or not URL.match(where), "work", needed, work, error=ArgumentError)
    folder = local(work if work is not None else f"{where.rstrip('/')}.work", "work")
    store = SnapshotStore(where, keep=keep)
    settings: dict[str, Any] = {
        "replay": replay, "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "id_dropout": id_dropout,
        "seed": seed, "requests": requests, "k": k,
    }  # fmt: skip
    arguments = settings | {
        "current": current.version if isinstance(current, Trained) else str(current), "out": store.url,
        "files": None if isinstance(events, Dataset) else [str(each)[:200] for each in (events, items, users)],
        "task": repr(task), "since": None if since is None else str(since), "forget": forget,
        "held_out": held_out,
        "fixed": None if fixed is None else list(map(str, fixed)), "unknown": unknown,
        "gate": dataclasses.asdict(gate), "platforms": list(platforms),
    }  # fmt: skip
    places = () if URL.match(where) else (local(where),)
    say = output.say if progress else lambda line: None
    opened = functools.cache(functools.partial(_open, current, since, task))

    def check() -> None:
        expect_platforms(tuple(platforms))
        given = {name: settings[name] for name in ("replay", "epochs", "batch_size", "requests")}
        training.FitConfig(since=0, **given)  # which refuses what `fit` would
        for source in (events, items, users):
            _expect_there(source)
        trained, _ = opened()
        for moment in fixed or ():
            seconds_of(moment, "fixed", unit=trained.need_encoder("refresh").columns.time_unit)

    with output.hidden(not progress), begin(folder, arguments, places=places, say=say, check=check) as job:
        served, data = _inputs(job, functools.partial(_keep, opened), functools.partial(
            _read, events, items, users, unknown=unknown, progress=progress
        ))  # fmt: skip
        newest, first = int(data.log.time.max(initial=0)), 0
        if forget is not None:
            first = newest - round(forget * DAY)
            if int(data.log.time.min(initial=newest)) > first:
                say(f"refresh: forget: nothing, since no event is of {shown(first)} or earlier")
                first = 0
        steps = _Steps(
            job=job, served=served, data=data, kept=forgotten(data, first) if first else data, since=first, items=items,
            held_out=held_out, gate=gate, progress=progress,
        )  # fmt: skip
        if newest <= served.newest or not len(served.task.positions(data, min_history=1, since=served.since, before=None)):
            job.step(DONE, lambda _: {"line": f"nothing new since {shown(served.since)}", "status": "nothing new"})
            return Refreshed(status="nothing new")
        steps = dataclasses.replace(steps, fixed=steps.period(fixed))
        inputs = json.dumps(arguments | {"current": served.trained.version, "files": data.digest, "out": ""})
        inputs = hashlib.sha256(inputs.encode()).hexdigest()
        _expect_not_rolled_back(store, inputs)
        settings["id_dropout"] = served.id_dropout if id_dropout is None else id_dropout
        job.step("warm start", functools.partial(steps.warm_start, seed))
        job.step("train", functools.partial(steps.train, settings))
        job.step("additions", steps.additions)
        trained, name = _model(job, "additions"), None
        verdict = job.step("gate", functools.partial(steps.judge, trained, requests))
        if not verdict["reasons"]:
            job.step("served", functools.partial(steps.served_export, store, tuple(platforms)))
            if (job.path("served") / EXPORT).is_dir():
                job.step("publish served", functools.partial(publish, store, job.path("served") / EXPORT))
            job.step("index", functools.partial(steps.index, trained))
            job.step("export", functools.partial(steps.export, trained, inputs, tuple(platforms)))
            name = job.step("publish", functools.partial(publish, store, job.path("export") / EXPORT))["name"]
        job.step("report", functools.partial(steps.report, trained, name))
        report = json.loads((job.path("report") / FILES / REPORT).read_text("utf-8"))
        reports = SnapshotStore(f"{where.rstrip('/')}/reports", keep=REPORTS)
        job.step(DONE, functools.partial(publish, reports, job.path("report") / FILES))
    return Refreshed(status=report["status"], name=name, trained=trained, report=report)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Served:
    """The served model and what it says of its training."""

    trained: Trained
    task: Task
    since: int  # seconds since 1970, from which events are new: the end of its training samples, unless another was given
    record: dict[str, Any]  # `training_record`

    @property
    def newest(self) -> int:
        """Time of the newest event that a refresh judged it on, -1 for none."""
        return self.record["newest"]

    @property
    def id_dropout(self) -> float:
        """Share of candidates that its training had without their item id."""
        return self.record["id_dropout"]


def training_record(trained: Trained, folder: Path | None = None) -> dict[str, Any]:
    """What a model says of its training, by the settings of its run and what a refresh wrote into the export in `folder`.

    `until` when it was trained, and its `task`, None for unknown; `periods` [from, before] that it was judged on and never
    trained on, the one to be judged on again first; the `newest` event that it was judged on, -1 for none; `id_dropout`.
    """
    record: dict[str, Any] = {"until": None, "newest": -1, "task": None, "periods": [], "id_dropout": 0.0}
    if trained.settings is not None and "first_validation" in trained.settings:
        settings = training.parsed(trained.settings, "settings of the served model")
        first = validated = settings.first_validation, settings.first_test
        if settings.without is not None:  # trained by a refresh, which judged it on that period
            first = settings.without
        until = settings.first_validation if settings.without is not None else settings.first_test
        record |= {"until": until, "task": _task_record(settings.task), "id_dropout": settings.id_dropout}
        record["periods"] = [list(first)] if settings.validates or first is not validated else []
    if folder is not None and (folder / KEPT).is_file():
        record |= json.loads((folder / KEPT).read_text("utf-8"))
    return record


def _expect_there(source: Any) -> None:
    """FileNotFoundError for the path of a file that is not there, ValueError for one of another kind."""
    if isinstance(source, str | os.PathLike):
        files_of(source)
    elif isinstance(source, TextFile):
        expect(Path(source.path).is_file(), str(source.path), "a file", "no such file", error=FileNotFoundError)


def _expect_not_rolled_back(store: SnapshotStore, inputs: str) -> None:
    """SnapshotError where an export that was made from the same inputs was rolled back."""
    for name in store.rolled_back():
        record = json.loads(store.read(name, KEPT)) if store.holds(name, KEPT) else {}
        out = "give newer events, other settings, or publish it by itself"
        got = f"those of {name}, which was rolled back; {out}"
        expect(record.get("inputs") != inputs, "refresh", "another model, data or settings", got, error=SnapshotError)


def _open(current: Trained | str | Path, since: Any, task: Task | None) -> tuple[Trained, dict[str, Any]]:
    """The served model and its record, with the task and the moment from which events are new."""
    if isinstance(current, Trained):
        trained, record = current, training_record(current)
    else:
        folder = Path(current)
        if folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir()):  # the lock of this job
            out = "give `current`, such as the --out of `aif-jax train`"
            raise ArgumentError(f"{current}: expected a served model, found an empty store; {out}")
        with tempfile.TemporaryDirectory() as fetched:
            if URL.match(str(current)) or ((folder / CURRENT).is_file() and not (folder / EXPORTED).is_file()):
                folder = SnapshotStore(current).fetch(fetched)
            trained = open_model(folder)
            record = training_record(trained, folder)
    known = record["task"]
    if task is not None and known is not None:
        got = f"{_task_record(task)}; leave it out"
        expect(_task_record(task) == known, "refresh task", f"that of the served model, {known}", got, error=ArgumentError)
    record["task"] = known or (None if task is None else _task_record(task))
    unit = trained.need_encoder("refresh").columns.time_unit
    since = record["until"] if since is None else seconds_of(since, "since", unit=unit)
    if since is None:
        expected = "the moment from which events are new, because the served model does not say until when it was trained"
        out = "give it, such as --since 2026-05-06; a model that refresh, fit or `aif-jax add` wrote says it"
        raise ArgumentError(f"refresh since: expected {expected}, got None; {out}")
    return trained, record | {"since": since}


def _keep(opened: Callable[[], tuple[Trained, dict[str, Any]]], partial: Path) -> dict[str, Any]:
    """Writes the served model as a checkpoint."""
    trained, record = opened()
    checkpoint.save(partial / MODEL, trained)
    until = "" if record["until"] is None else f", trained until {shown(record['until'])}"
    return record | {"line": f"version {trained.version[:12]}{until}", "version": trained.version}


def _inputs(
    job: Job, keep: Callable[[Path], dict[str, Any]], read_data: Callable[[Trained], Dataset]
) -> tuple[_Served, Dataset]:
    """The served model and the data; a job whose data is other than before the kill starts again."""
    record = job.step("current", keep)  # keeps the model: what is current elsewhere may move meanwhile
    given, trained = dict(record["task"] or {}), _model(job, "current")
    began = time.perf_counter()
    data = read_data(trained)
    task = task_of(data, TASKS[given.pop("name")](**given) if given else None)
    served = _Served(trained=trained, task=task, since=record["since"], record=record | {"task": _task_record(task)})
    seconds, before = time.perf_counter() - began, job.sealed("read")
    if before is not None and before["digest"] != data.digest:
        job.say("refresh: the data changed since the job was killed, so its steps are done again")
        job.restart()
        return _inputs(job, keep, read_data)
    own, newer = trained.need_encoder("refresh").vocabularies, data.encoder.vocabularies  # type: ignore[union-attr]
    sizes = {name: {"before": len(own[name].raw), "after": len(newer[name].raw)} for name in own}
    record = {"digest": data.digest, "events": len(data.log), "vocabularies": sizes, "seconds": seconds}
    more = ", ".join(f"{each['after'] - each['before']:,} of {name}" for name, each in sizes.items())
    job.step("read", lambda _: record | {"line": f"{len(data.log):,} events; new ids: {more}"})
    return served, data


def _read(
    events: Source | Dataset, items: Source | None, users: Source | None, trained: Trained, *,
    unknown: Literal["skip", "error"], progress: bool,
) -> Dataset:  # fmt: skip
    """The data under vocabularies with the ids of the served model and the new ones."""
    if isinstance(events, Dataset):
        expect(events.encoder is not None, "refresh data", "a Dataset with an encoder", "one without; read(..., encoder=...)")
        return events
    if items is None:
        raise ValueError("refresh items: expected the items file that belongs to events, got None")
    given: dict[str, Any] = {"users": users, "unknown": unknown, "progress": progress}
    return read(events, items=items, earlier=trained, **given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Steps:
    """The steps of a job between reading and publishing."""

    job: Job
    served: _Served
    data: Dataset
    kept: Dataset  # the data without the ids that are forgotten: what the new model knows
    since: int  # seconds since 1970, ids without an event from then on are forgotten; 0 for none
    items: Source | None
    held_out: float
    gate: GateConfig
    progress: bool
    fixed: tuple[int, int] = (0, 0)  # seconds since 1970, the period that no refresh trains on

    @property
    def task(self) -> Task:
        """Task of the served model."""
        return self.served.task

    @property
    def calibrated(self) -> bool:
        """Whether the served model has a calibration, for which a part of the new samples is kept."""
        return GROUP in self.served.trained.params["fitted"]

    def period(self, fixed: tuple[Any, Any] | None) -> tuple[int, int]:
        """The earlier period to judge on: the one given, else the first of the served model's that the events hold."""
        periods = self.served.record["periods"] if fixed is None else [training.span_of(fixed, self.data, "fixed")]
        counts = {}
        for first, after in (period for period in periods if period[0] >= self.since):  # with what is known of later events
            positions = self.task.positions(self.data, min_history=0, since=first, before=after)
            users = counts[f"{shown(first)} to {shown(after)}"] = len(np.unique(self.data.log.user[positions]))
            if users >= self.gate.users:
                return first, after
        expected = f"an earlier period with samples of at least {self.gate.users} users in the events, to judge both models on"
        expected += f", that begins after what is forgotten, {shown(self.since)}" if self.since else ""
        got = ", ".join(f"{users} users from {span}" for span, users in counts.items()) or "none that the served model says"
        out = "give older files, or a period such as --fixed 2026-05-01 2026-05-02 that this and later refreshes leave out"
        raise ArgumentError(f"refresh fixed: expected {expected}, got {got}; {out}")

    def warm_start(self, seed: int, partial: Path) -> dict[str, Any]:
        """The served model under the new vocabularies."""
        encoder: Any = self.kept.encoder
        started = warm_start(self.served.trained, encoder, self.kept.catalogue, forget=self.since > 0, seed=seed)
        checkpoint.save(partial / MODEL, started)
        gone = ", ".join(f"{each.get('forgotten', 0):,} of {name}" for name, each in self.vocabularies().items())
        gone = f"; forgotten ids: {gone}" if self.since else ""
        return {"line": f"{bytes_of(started):,} bytes of parameters under the new vocabularies{gone}"}

    def train(self, settings: dict[str, Any], partial: Path) -> dict[str, Any]:
        """The model after training on the new samples; `settings` are fields of `FitConfig`."""
        started = _model(self.job, "warm start")
        config = training.FitConfig(
            since=_moment(self.served.since), validation=self.held_out if self.calibrated else 0.0, test=self.held_out,
            without=(_moment(self.fixed[0]), _moment(self.fixed[1])), keep_best=None, **settings,
        )  # fmt: skip
        run = fit(
            started.model, self.kept, config, out=self.job.path("fit"), start=started.params, task=self.task,
            progress=self.progress,
        )  # fmt: skip
        checkpoint.save(partial / MODEL, run.trained)
        trained = training.training_positions(self.kept, run.settings)
        new = int((self.kept.log.time[trained] >= self.served.since).sum())
        line = f"{new:,} new samples until {shown(run.settings.first_validation)}, {len(trained) - new:,} earlier ones"
        return {"line": line, "settings": run.settings.to_json(), "samples": new, "replayed": len(trained) - new}

    def additions(self, partial: Path) -> dict[str, Any]:
        """What the served model has that is fitted after training, fitted again."""
        settings, old = self.settings(), self.served.trained
        changes: dict[str, edits.Edit] = {}
        if settings.id_dropout:
            changes["unseen items"] = functools.partial(self._unseen, settings.first_validation)
        if (term := pure_svd.present(old.config)) is not None:
            log, factors = self.kept.histories, np.asarray(old.params["fitted"][term.name]["table"])
            known, before = self._own_rows("item", self.kept), log.time < self.served.since
            deviation = edits.svd_deviation(factors, log.user[before], known[log.item[before]], block=term)
            changes["SVD term"] = edits.svd_term(before=settings.first_validation, deviation=deviation or edits.DEVIATION)
        if (block := item_offset.present(old.config)) is not None:
            least = float(np.min(old.params["fitted"][block.name]["table"]))
            changes["popularity correction"] = edits.popularity_correction(
                before=settings.first_validation, power=getattr(self.task, "power", 0.75),
                untrained=item_offset.UNTRAINED if least <= item_offset.UNTRAINED else None,
            )  # fmt: skip
        made, faults = edits.chain(*changes.values())(_model(self.job, "train"), self.kept), []
        if self.calibrated:
            of_slice = functools.partial(training.held_out, settings=settings, split="validation")
            of_slice(self.kept)  # without a sample there is nothing to judge
            served, negatives = old.params["fitted"][GROUP], self.task.calibration_negatives
            changes["calibration"] = edits.calibration(of_slice, calibration_negatives=negatives, progress=self.progress)
            try:
                made = changes["calibration"](made, self.kept)
            except ValueError as error:  # such as scores that fall where labels rise: the served calibration, for the gate
                made, faults = made.replace(params=with_calibration(made.params, served)), [f"no calibration fits it: {error}"]
        checkpoint.save(partial / MODEL, made)
        line = ", ".join(changes) or "none: the served model has none"
        return {"line": "; ".join([line, *faults]), "additions": list(changes), "faults": faults}

    def _unseen(self, before: int, trained: Trained, data: Dataset) -> Trained:
        """Items without an event score as the unknown item, unless the served model has a row for them."""
        name = data.schema.item_attribute("item").table_name
        table = np.asarray(self.served.trained.params["embedding"][name])
        own = np.maximum(self._own_rows("item", data), 0)
        has_own = (table[own] != table[0]).any(1)
        seen = np.where(has_own, 1, counts_before(data, before))
        return trained.replace(params=edits.unseen_as_unknown(trained.params, seen, config=trained.config))

    def settings(self) -> training.FitSettings:
        """Settings of the training."""
        record: Any = self.job.sealed("train")
        return training.FitSettings.from_json(record["settings"])

    def judge(self, trained: Trained, requests: int, _: Path) -> dict[str, Any]:
        """The gate's verdict as plain JSON."""
        settings, data = self.settings(), self.data
        first, after = self.fixed
        span = dataclasses.replace(settings, first_validation=first, first_test=after, since=None, replay=0.0, keep_best=None)
        slices = {
            "newest": training.held_out(data, settings, "test", requests=requests, min_history=0),
            "fixed": training.held_out(data, span, "validation", requests=requests, min_history=0),
        }
        measured = {}
        for name, (positions, candidates) in slices.items():
            asked = Requests(
                data=data, positions=positions, candidates=candidates, k=settings.k,
                calibration_negatives=self.task.calibration_negatives, repeats=settings.repeats,
            )  # fmt: skip
            new_items = self._unknown("item", data.log.item[positions])
            options: dict[str, Any] = {"new_items": new_items, "progress": self.progress}
            measured[name] = measure(trained, asked, **options), measure(self.served.trained, asked, **options)
        share = volume(data.log.time, self.served.since)
        verdict = judge(measured, self.gate, volume=share)
        positions, (new, old) = slices["newest"][0], measured["newest"]
        reasons = [*self.job.sealed("additions").get("faults", ()), *verdict.reasons]  # type: ignore[union-attr]
        return {
            "line": "refused: " + "; ".join(reasons) if reasons else "passed", "reasons": reasons,
            "metrics": verdict.plain_metrics(), "overlap": verdict.overlap, "volume": share,
            "requests": len(positions),
            "new_item_requests": int(self._unknown("item", data.log.item[positions]).sum()),
            "new_user_requests": int(self._unknown("user", data.log.user[positions]).sum()),
            "slowdown": new.seconds / old.seconds if new.seconds and old.seconds else None,
        }  # fmt: skip

    def _unknown(self, name: str, rows: np.ndarray) -> np.ndarray:
        """bool [n] which rows of the data the served model's vocabulary lacks."""
        return self._own_rows(name, self.data)[rows] <= 0

    def _own_rows(self, name: str, data: Dataset) -> np.ndarray:
        """The row that each row of data has in the served model's vocabulary, 0 or -1 for none."""
        own = self.served.trained.need_encoder("refresh").vocabularies[name]
        return new_rows(data.encoder.vocabularies[name], own)  # type: ignore[union-attr]

    def index_of(self, trained: Trained) -> ItemIndex:
        """The index of the items file, with the item statistics after the last event."""
        own, encoder = trained.need_encoder("refresh"), self.data.encoder
        if self.items is None:
            known: Any = encoder
            features = self.data.catalogue.features(np.arange(1, len(self.data.items)))
            rows: Any = [(self.data.items.raw, under(features, known, own))]
            return ItemIndex.build(trained, rows, progress=self.progress)
        today = functools.partial(self.data.statistic_columns, time=int(self.data.log.time.max()) + 1)
        rows = read_items(self.items, own, statistics=today)
        return ItemIndex.build(trained, rows, progress=self.progress)

    def served_export(self, store: SnapshotStore, platforms: tuple[str, ...], partial: Path) -> dict[str, Any]:
        """The served model as an export, for a store without one: what a rollback of the first refresh goes back to."""
        if store.current() is not None:
            return {"line": f"{store.url} has a version before"}
        trained, record = self.served.trained, self.served.record
        kept = {name: record[name] for name in ("until", "newest", "task", "periods")}
        export.save(partial / EXPORT, trained, self.index_of(trained), platforms=platforms)
        (partial / EXPORT / KEPT).write_text(json.dumps(kept), "utf-8")
        return {"line": f"version {trained.version[:12]} is published first"}

    def index(self, trained: Trained, partial: Path) -> dict[str, Any]:
        """The index of the new version: every row is new."""
        index = self.index_of(trained)
        index.save(partial / "index")
        return {"line": f"{len(index):,} items", "items": len(index)}

    def export(self, trained: Trained, inputs: str, platforms: tuple[str, ...], partial: Path) -> dict[str, Any]:
        """The folder that is published: an export with its index, and what the next refresh must know."""
        index, folder = ItemIndex.load(self.job.path("index") / "index", trained), partial / EXPORT
        export.save(folder, trained, index, platforms=platforms)
        newest, settings = int(self.data.log.time.max()), self.settings()
        periods = [list(self.fixed), [settings.first_test, newest + 1]]
        kept = {"until": settings.first_validation, "newest": newest, "task": _task_record(self.task), "periods": periods}
        (folder / KEPT).write_text(json.dumps(kept | {"inputs": inputs}), "utf-8")
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return {"line": f"{size:,} bytes", "bytes": size}

    def vocabularies(self) -> dict[str, dict[str, int]]:
        """Ids before and after by vocabulary, and how many were forgotten, where that was a question."""
        sizes = self.job.sealed("read")["vocabularies"]  # type: ignore[index]
        if not self.since:
            return sizes
        left = {name: len(vocabulary.raw) for name, vocabulary in self.kept.encoder.vocabularies.items()}  # type: ignore[union-attr]
        return {name: each | {"after": left[name], "forgotten": each["after"] - left[name]} for name, each in sizes.items()}

    def report(self, trained: Trained, name: str | None, partial: Path) -> dict[str, Any]:
        """Writes `report.json`: what the refresh changed."""
        steps = ("current", "read", "warm start", "train", "additions", "gate", "served", "publish served", "index", "export",
                 "publish")  # fmt: skip
        done = {step: record for step in steps if (record := self.job.sealed(step)) is not None}
        gate, settings = done["gate"], self.settings()
        sizes = {"parameters before": bytes_of(self.served.trained), "parameters": bytes_of(trained)}
        sizes |= {"export": done["export"]["bytes"]} if "export" in done else {}
        counts = {field: gate[field] for field in ("requests", "new_item_requests", "new_user_requests")}
        counts |= {field: done["train"][field] for field in ("samples", "replayed")}
        report = {
            "status": "refused" if gate["reasons"] else "published", "name": name,
            "versions": {"old": self.served.trained.version, "new": trained.version},
            "vocabularies": self.vocabularies(),
            "data": counts | {
                "events": done["read"]["events"], "since": shown(self.served.since),
                "until": shown(settings.first_validation),
            },
            "additions": done["additions"]["additions"],
            "gate": {field: gate[field] for field in ("reasons", "metrics", "overlap", "volume", "slowdown")},
            "bytes": sizes,
            "seconds": {step: record["seconds"] for step, record in done.items()},
        }  # fmt: skip
        (partial / FILES).mkdir()
        (partial / FILES / REPORT).write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        return {"line": report["status"], "status": report["status"]}


def _moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


MODEL, EXPORT, FILES = "model", "export", "files"  # folders in those of steps


def _model(job: Job, step: str) -> Trained:
    return checkpoint.load(job.path(step) / MODEL).trained()


def publish(store: SnapshotStore, folder: Path, _: Path) -> dict[str, Any]:
    """Publishes a folder of a step, unless the killed job did."""
    name = store.publish(folder, unless_current=True)
    return {"line": f"{store.url}: {name}", "name": name}


def _task_record(task: Task) -> dict[str, Any]:
    return {"name": type(task).__name__} | dataclasses.asdict(task)
