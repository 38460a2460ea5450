"""The steps of a refresh: each fills a folder of the job and returns its record, see `Job.step`."""

import dataclasses
import functools
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np

from aif_jax import checkpoint, export, output
from aif_jax.blocks import with_table
from aif_jax.checkpoint import CheckpointError
from aif_jax.checks import ArgumentError, expect
from aif_jax.connectors.snapshot_store import SnapshotError, SnapshotStore
from aif_jax.data.dataset import Dataset
from aif_jax.encoding.times import iso_text
from aif_jax.encoding.vocabulary import new_rows
from aif_jax.export.consume.files import MANIFEST as EXPORTED
from aif_jax.index import ItemIndex
from aif_jax.readers import read, read_items
from aif_jax.readers.tables import Source
from aif_jax.refreshing.config import RefreshConfig
from aif_jax.refreshing.gate import Requests, judge, measure, volume
from aif_jax.refreshing.job import Job
from aif_jax.refreshing.served import training_record
from aif_jax.refreshing.warm import forget_ids, warm_start, with_served_vocabulary
from aif_jax.run import fit
from aif_jax.scores import GROUP, with_calibration
from aif_jax.store.trained import Trained
from aif_jax.train import edits, training
from aif_jax.train.distillation import Teacher
from aif_jax.train.settings import FitSettings
from aif_jax.train.tasks import TASKS, NextItem, Task, task_of

MODEL, EXPORT = "model", "export"  # folders in those of steps: a model, and what is published
REPORT = "report.json"
DAY = 86_400


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refresh:
    """A refresh under way; its steps are methods, which read the results of earlier steps from the job's folder."""

    job: Job
    config: RefreshConfig
    opened: Callable[[], tuple[Trained, dict[str, Any]]]  # the served model and its record, see `open_served`
    events: Source
    items: Source
    users: Source | None
    store: SnapshotStore  # of exports
    teacher: Teacher | None  # see `fit`

    def model(self, step: str) -> Trained:
        """Return the model that a step wrote."""
        return checkpoint.load(self.job.folder / step / MODEL).trained()

    @functools.cached_property
    def served(self) -> Trained:
        """The served model."""
        return self.model("current")

    @functools.cached_property
    def data(self) -> Dataset:
        """The data that both models are judged on, under vocabularies with the ids of the served model and the new ones."""
        options: dict[str, Any] = {"unknown": self.config.unknown, "repeats": training_record(self.served)["repeats"]}
        return read(self.events, items=self.items, users=self.users, earlier=self.served, **options)

    @functools.cached_property
    def kept(self) -> Dataset:
        """The data without the ids that are forgotten: what the new model knows."""
        return forget_ids(self.data, self.forget) if self.forget else self.data

    @functools.cached_property
    def forget(self) -> int:
        """Seconds since 1970, ids without an event from then on are forgotten; 0 for none."""
        if self.config.forget is None:
            return 0
        times = self.data.log.time
        since = int(times.max(initial=0)) - round(self.config.forget * DAY)
        if (times <= since).any():
            return since
        output.say(f"refresh: forget: nothing, since no event is of {iso_text(since)} or earlier")
        return 0

    @functools.cached_property
    def trained(self) -> Trained:
        """The new model."""
        return self.model("additions")

    @functools.cached_property
    def settings(self) -> FitSettings:
        """Settings of the training."""
        return FitSettings.from_json(self.job.records["train"]["settings"])

    @functools.cached_property
    def task(self) -> Task:
        """Task of both models."""
        task = dict(self.job.records["current"]["task"] or {})
        return task_of(self.data, TASKS[task.pop("name")](**task) if task else None)

    def changed(self) -> str:
        """Return what changed since a killed job sealed steps: the served model, code of blocks and heads, the data; or ""."""
        current, before = self.job.sealed("current"), self.job.sealed("read")
        undone = [json.loads(manifest)["version"] for manifest in self.store.rolled_back(EXPORTED).values()] if current else []
        if current and current["version"] in undone:
            return "the served model was rolled back"
        try:
            if current and self.served.version != current["version"]:  # loaded by today's code: a new field counts
                return "a block or head got other fields"
        except CheckpointError as error:
            return f"the served model changed ({error})"
        return "the data changed" if before and before["digest"] != self.data.digest else ""

    @property
    def since(self) -> int:
        """Seconds since 1970, from which events are new."""
        return self.job.records["current"]["since"]

    @property
    def calibrated(self) -> bool:
        """Whether the served model has a calibration, for which a part of the new samples is kept."""
        return GROUP in self.served.params["fitted"]

    # the steps

    def keep_current(self, folder: Path) -> dict[str, Any]:
        """Return the served model as a checkpoint: what is current elsewhere may move meanwhile."""
        trained, record = self.opened()
        checkpoint.save(folder / MODEL, trained)
        line = f"version {trained.version[:12]}, new from {iso_text(record['since'])}"
        return record | {"version": trained.version, "line": line}

    def read_data(self, _: Path) -> dict[str, Any]:
        """Return digest and sizes of the data, whether anything is new, and the earlier period to judge on."""
        data, newest = self.data, int(self.data.log.time.max(initial=0))
        positions = self.task.positions(data, min_history=1, since=self.since, before=None)
        own, newer, left = (
            {name: len(vocabulary.raw) for name, vocabulary in encoder.vocabularies.items()}  # type: ignore[union-attr]
            for encoder in (self.served.need_encoder("refresh"), data.encoder, self.kept.encoder)
        )
        sizes = {name: {"before": own[name], "after": left[name]} for name in own}
        line = f"{len(data.log):,} events; new ids: {', '.join(f'{newer[name] - own[name]:,} of {name}' for name in own)}"
        if self.forget:
            sizes = {name: each | {"forgotten": newer[name] - left[name]} for name, each in sizes.items()}
            line += f"; forgotten ids: {', '.join(f'{newer[name] - left[name]:,} of {name}' for name in own)}"
        record = {"line": line, "digest": data.digest, "events": len(data.log), "vocabularies": sizes}
        if newest <= self.job.records["current"]["newest"] or not len(positions):
            return record | {"new": False}
        return record | {"new": True, "fixed": self._earlier_period()}

    def _earlier_period(self) -> tuple[int, int]:
        """Return the earlier period to judge on: the one given, else the first of the served model's that the events hold."""
        given, least = training.span_of(self.config.fixed, self.data, "fixed"), self.config.gate.users
        counts = {}
        for first, after in self.job.records["current"]["periods"] if given is None else [given]:
            if first < self.forget:
                continue  # the new model does not know ids that have events before `forget` alone
            positions = self.task.positions(self.data, min_history=0, since=first, before=after)
            users = counts[f"{iso_text(first)} to {iso_text(after)}"] = len(np.unique(self.data.log.user[positions]))
            if users >= least:
                return first, after
        expected = f"an earlier period with samples of at least {least} users in the events, to judge both models on"
        expected += f", that begins after what is forgotten, {iso_text(self.forget)}" if self.forget else ""
        got = ", ".join(f"{users} users from {span}" for span, users in counts.items()) or "none that the served model says"
        out = "give older files, or a period such as --fixed 2026-05-01 2026-05-02 that this and later refreshes leave out"
        raise ArgumentError(f"refresh fixed: expected {expected}, got {got}; {out}")

    def train(self, folder: Path) -> dict[str, Any]:
        """Return the served model under the new vocabularies, after training on the new samples."""
        kept, held_out = self.kept, self.config.held_out
        encoder: Any = kept.encoder
        seed = self.job.records["current"]["seed"] if self.config.seed is None else self.config.seed
        start = warm_start(self.served, encoder, kept.catalogue, forget=self.forget > 0, seed=seed)
        first, after = map(_moment, self.job.records["read"]["fixed"])
        config = self.config.training(
            since=_moment(self.since), validation=held_out if self.calibrated else 0.0, test=held_out, without=(first, after),
            id_dropout=self.job.records["current"]["id_dropout"], seed=seed,
        )  # fmt: skip
        teacher = self.teacher
        if teacher is not None and isinstance(teacher.ranker, Trained):
            teacher = dataclasses.replace(teacher, ranker=with_served_vocabulary(teacher.ranker, encoder))
        options: dict[str, Any] = {"out": self.job.folder / "fit", "start": start.params, "task": self.task, "teacher": teacher}
        run = fit(start.model, kept, config, **options)
        checkpoint.save(folder / MODEL, run.trained)
        trained = training.training_positions(kept, run.settings)
        new = int((kept.log.time[trained] >= self.since).sum())
        line = f"{new:,} new samples until {iso_text(run.settings.first_validation)}, {len(trained) - new:,} earlier ones"
        return {"line": line, "settings": run.settings.to_json(), "samples": new, "replayed": len(trained) - new}

    def add(self, folder: Path) -> dict[str, Any]:
        """Fit the edits again that the served model has, and with `id_dropout` the row of items without an event."""
        settings, old, task, data = self.settings, self.served, self.task, self.kept
        model, before, added, faults = self.model("train"), settings.first_validation, [], []
        new, served = (each.need_encoder("refresh").vocabularies["item"] for each in (model, old))
        own = new_rows(new, served)  # the served model's row of each new row; 0 or -1: it has none
        if settings.id_dropout:
            table = np.asarray(old.params["embedding"]["item"])  # whose rows but the unknown item's own are known
            model = edits.unseen_items(model, data, before=before, known=(table[np.maximum(own, 0)] != table[0]).any(1))
            added.append("unseen items")
        tables = {name: old.params["fitted"].get(name, {}).get("table", 0) for name in ("pure_svd", "item_offset")}
        if np.any(tables["pure_svd"]):
            model = edits.svd_term(model, data, before=before)
            added.append("SVD term")
        if np.any(offsets := np.asarray(tables["item_offset"])):
            if isinstance(task, NextItem) and not task.logq_correction:
                model = edits.popularity_correction(model, data, before=before, untrained=float(np.min(offsets)))
                added.append("popularity correction")
            else:  # given by hand
                carried, block = offsets[np.maximum(own, 0)], cast(Any, model.config.find("item_offset"))
                model = model.replace(params=with_table(model.params, carried, block, config=model.config)[0])
                added.append("item offsets as they were")
        if self.calibrated:
            positions, source = training.held_out(data, settings, "validation")  # raises: nothing to judge without a sample
            options: dict[str, Any] = {"positions": positions, "candidates": source}
            try:
                model = edits.calibration(model, data, calibration_negatives=task.calibration_negatives, **options)
            except ValueError as error:  # such as scores that fall where labels rise: the served calibration, for the gate
                model = model.replace(params=with_calibration(model.params, old.params["fitted"][GROUP]))
                faults = [f"no calibration fits it: {error}"]
            added.append("calibration")
        checkpoint.save(folder / MODEL, model)
        line = "; ".join([", ".join(added) or "none: the served model has none", *faults])
        return {"version": model.version, "line": line, "additions": added, "faults": faults}

    def judge(self, _: Path) -> dict[str, Any]:
        """Return the gate's verdict as plain JSON. Raises SnapshotError for a model that was rolled back."""
        settings, data = dataclasses.replace(self.settings, min_history=0), self.data  # users without a history count
        for name, manifest in self.store.rolled_back(EXPORTED).items():
            got = f"that of {name}, which was rolled back; give newer events, other settings, or publish it by itself"
            other = json.loads(manifest)["version"] != self.trained.version
            expect(other, "refresh", "a model that was not rolled back", got, error=SnapshotError)
        first, after = self.job.records["read"]["fixed"]
        span = dataclasses.replace(settings, first_validation=first, first_test=after, since=None, replay=0.0, keep_best=None)
        slices = {
            "newest": training.held_out(data, settings, "test", requests=self.config.requests),
            "fixed": training.held_out(data, span, "validation", requests=self.config.requests),
        }
        measured = {}
        for name, (positions, candidates) in slices.items():
            requests = Requests(
                data=data, positions=positions, candidates=candidates, k=settings.k,
                calibration_negatives=self.task.calibration_negatives,
            )  # fmt: skip
            measured[name] = measure(self.trained, requests), measure(self.served, requests)
        share = volume(data.log.time, self.since)
        verdict = judge(measured, self.config.gate, volume=share)
        reasons = [*self.job.records["additions"]["faults"], *verdict.reasons]
        return {
            "line": "refused: " + "; ".join(reasons) if reasons else "passed", "reasons": reasons,
            "metrics": verdict.metrics, "volume": share,
            "requests": len(slices["newest"][0]),
        }  # fmt: skip

    def export_served(self, folder: Path) -> dict[str, Any]:
        """Export the served model, for a store without one: what a rollback of the first refresh goes back to."""
        if self.store.current() is not None:
            return {"line": f"{self.store.url} has a version before"}
        return self.export(folder, self.served)

    def export(self, folder: Path, trained: Trained | None = None) -> dict[str, Any]:
        """Export the new model, or another, with the index of the items file and the item statistics after the last event."""
        trained, target = trained or self.trained, folder / EXPORT
        today = functools.partial(self.data.statistic_columns, time=_moment(int(self.data.counted.time.max()) + 1))
        rows = read_items(self.items, trained.need_encoder("refresh"), statistics=today)  # `data` counts forgotten items too
        index = ItemIndex.build(trained, rows)
        export.save(target, trained, index, platforms=self.config.platforms)
        size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        return {"line": f"{len(index):,} items, {size:,} bytes", "bytes": size}

    def publish(self, _: Path, *, step: str) -> dict[str, Any]:
        """Publish the folder that a step made, if any, unless the killed job did."""
        source = self.job.folder / step / EXPORT
        if not source.is_dir():
            return {"line": "not needed"}
        name = self.store.publish(source, unless_current=True)
        return {"line": f"{self.store.url}: {name}", "name": name}

    def report(self, folder: Path, *, to: SnapshotStore) -> dict[str, Any]:
        """Publish `report.json`: what every step returned."""
        status = "refused" if self.job.records["gate"]["reasons"] else "published"
        report = {"status": status, "name": self.job.records.get("publish", {}).get("name"), **self.job.records}
        (folder / EXPORT).mkdir()
        (folder / EXPORT / REPORT).write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        to.publish(folder / EXPORT, unless_current=True)
        return {"line": status, "report": report}


def _moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
