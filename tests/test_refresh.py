"""`aif.refresh`: from a served model and newer events to the next version in service, and every reason of the gate."""

import dataclasses
import functools
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

import aif_jax as aif
from aif_jax import cli
from aif_jax.blocks import Block, ItemOffset, block, popularity_offset, with_table
from aif_jax.checkpoint import CheckpointError
from aif_jax.checks import ArgumentError
from aif_jax.connectors import SnapshotStore
from aif_jax.connectors.snapshot_store import SnapshotError
from aif_jax.data.cascade import Cascade
from aif_jax.encoding.times import iso_text
from aif_jax.index import WriterConflict
from aif_jax.metrics import ByUser
from aif_jax.readers import encode_items
from aif_jax.refreshing import GateConfig, Measurement, Requests, forget_ids, judge, measure, volume, warm_start
from aif_jax.refreshing.job import begin
from aif_jax.refreshing.served import training_record
from aif_jax.refreshing.steps import REPORT, Refresh
from aif_jax.scores import with_calibration
from aif_jax.store.folders import WriteLock
from aif_jax.train.settings import FitSettings
from aif_jax.train.tasks import Cascaded, NextItem
from aif_jax.train.training import training_positions
from tests import demo
from tests import refresh_world as world
from tests.demo import same
from tests.refusals import refused


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> aif.Run:
    """The model of the first four days, with everything that is fitted after training, in a folder of `fit`."""
    return world.first(tmp_path_factory.mktemp("refresh") / "run")


@pytest.fixture(scope="module")
def served(run, tmp_path_factory) -> Path:
    """A checkpoint of it with SVD term, popularity correction and calibration."""
    days = world.data(4)
    whole = run.with_svd(days).with_popularity_correction(days, untrained=None)
    whole.calibrate(days, progress=False).save(folder := tmp_path_factory.mktemp("served") / "model")
    return folder


@pytest.fixture(scope="module")
def published(served, run, tmp_path_factory) -> tuple[Path, aif.refreshing.RefreshResult]:
    """A store with the model of day five, published by a refresh, and what the refresh returned."""
    store = tmp_path_factory.mktemp("published") / "store"
    since = run.settings.first_validation
    return store, world.refresh(served, world.events(5), items=world.items(5), out=store, since=since, **world.OPTIONS)


@pytest.fixture
def stocked(tmp_path) -> Path:
    """A store with a version, into which no served model is published first."""
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "export").touch()
    SnapshotStore(tmp_path / "stocked").publish(tmp_path / "earlier")
    return tmp_path / "stocked"


def test_a_refresh_publishes_a_model_that_knows_the_new_ids_and_reports_what_changed(published, served):
    store, made = published
    assert made.status == "published" and made.name == SnapshotStore(store).current()
    fetched = SnapshotStore(store).fetch(store.parent / "here")
    trained, old = aif.open(fetched), aif.open(served)
    assert trained.version == made.trained.version != old.version
    assert [made.report[step]["version"] for step in ("current", "additions")] == [old.version, trained.version]
    assert len(trained.encoder.vocabularies["item"]) == 1 + world.ITEMS == len(old.encoder.vocabularies["item"]) + world.NEW
    assert [block.name for block in trained.config.blocks] == [block.name for block in old.config.blocks]
    assert "calibration" in trained.params["fitted"] and "popularity correction" in made.report["additions"]["additions"]
    fitted, before = (np.asarray(one.params["fitted"]["pure_svd"]["table"]) for one in (trained, old))
    again = fitted[trained.encoder.vocabularies["item"].encode(old.encoder.vocabularies["item"].raw)]
    assert again.any() and not np.array_equal(again, before[1:]) and "SVD term" in made.report["additions"]["additions"]
    index = aif.export.restore(fetched).index
    assert np.array_equal(np.sort(index.ids), np.arange(100, 100 + world.ITEMS))
    assert same(index.take([100, 135])[0], aif.ItemIndex.build(trained, world.items(5), progress=False).take([100, 135])[0])
    report = json.loads((SnapshotStore(store / "reports").fetch(store.parent / "reports") / REPORT).read_text())
    assert report == made.report and report["read"]["vocabularies"]["item"] == {"before": 30, "after": 36}
    assert report["name"] == made.name and {"gauc", "hr@5"} <= report["gate"]["metrics"]["newest"].keys()
    assert list(report) == [
        "status", "name", "current", "read", "train", "additions", "gate", "served", "publish served", "export", "publish",
    ]  # fmt: skip


def test_the_next_refresh_begins_where_this_one_ended_and_a_repeated_one_does_nothing(published, tmp_path, capsys):
    store, made = published
    again = world.refresh(store, world.events(5), items=world.items(5), out=store, **(world.OPTIONS | {"progress": True}))
    assert again.status == "nothing new" and SnapshotStore(store).current() == made.name
    until = FitSettings.from_json(made.report["train"]["settings"]).first_validation
    assert f"new from {iso_text(until)}" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    of_elsewhere = made.trained.replace(settings=None)
    with pytest.raises(ArgumentError, match="refresh since: expected the moment from which events .* got None; give it"):
        world.refresh(of_elsewhere, world.events(5), items=world.items(5), out=tmp_path / "other" / "store", **world.OPTIONS)
    assert not list((tmp_path / "other").rglob("*"))  # no folder of steps, no store, no lock
    again = refreshed(made.trained, world.events(6), tmp_path / "third", gate=REFUSING)
    assert again.status == "refused" and again.report["current"]["since"] == until


REFUSING = dataclasses.replace(world.GATE, floor=1.0)
"""For tests of what comes before the gate: nothing is indexed, exported and published."""


def refreshed(current: Any, table: Any, store: Path, **changes: Any) -> aif.refreshing.RefreshResult:
    """A refresh of the first five days with other options."""
    return world.refresh(current, table, out=store, **({"items": world.items(5)} | world.OPTIONS | changes))


def test_the_earlier_period_travels_and_is_never_trained_on(run, published, tmp_path):
    """Of a run its validation span; each refresh keeps it, and takes its held-out hours where the events no longer hold it."""
    store, made = published
    first, after = run.settings.first_validation, run.settings.first_test
    record = training_record(aif.open(SnapshotStore(store).fetch(tmp_path / "here")))
    settings = FitSettings.from_json(made.trained.settings)
    newest = int(world.events(5)["time"].max())
    assert record["periods"] == [[first, after], [settings.first_test, newest + 1]] and settings.without == (first, after)
    assert training_record(made.trained) == record and record["newest"] == newest
    message = "refresh fixed: expected an earlier period with samples of at least 900 users .* 2"
    gate = dataclasses.replace(world.GATE, users=900)
    refused(ArgumentError, message, refreshed, store, world.events(6), tmp_path / "store", gate=gate)
    late = {name: column[world.events(6)["time"] >= after] for name, column in world.events(6).items()}
    again = refreshed(store, late, tmp_path / "again", gate=REFUSING)
    assert FitSettings.from_json(again.trained.settings).without == (settings.first_test, newest + 1)
    data, with_replay = world.data(5), dataclasses.replace(settings, replay=9.0)
    times = data.log.time[training_positions(data, with_replay)]
    assert (times < first).any() and (times >= after).any() and not ((times >= first) & (times < after)).any()
    refused(ValueError, "without: expected two moments, the first ea", dataclasses.replace, settings, without=(after, first))


def test_the_first_refresh_can_be_rolled_back_and_is_not_made_again(served, run, published, tmp_path):
    folder = shutil.copytree(published[0], tmp_path / "store")
    store, old = SnapshotStore(folder), aif.open(served)
    (before, name) = store.names()
    assert published[1].name == name and store.rollback() == before == store.current()
    restored = aif.export.restore(store.fetch(tmp_path / "here"))
    assert restored.trained.version == old.version and len(restored.index) == world.ITEMS
    assert training_record(restored.trained) == training_record(old)
    given = {"since": run.settings.first_validation, "work": tmp_path / "other"}
    message = f"a model that was not rolled back, got that of {name}, which was rolled back; give newer events, other settings"
    for changes in ({}, {}, {"requests": 79}):  # a call that resumes, and one that makes the same model
        refused(SnapshotError, message, refreshed, served, world.events(5), folder, **given | changes)
        assert store.current() == before
    again = refreshed(served, world.events(5), folder, seed=1, **given)
    assert again.status == "published" and store.names() == [before, again.name]


@pytest.fixture(scope="module")
def corrected(run, tmp_path_factory) -> Path:
    """A folder with the files of four and of five days, the run with both terms as `aif-jax add` writes it, and its export."""
    folder = tmp_path_factory.mktemp("corrected")
    for days in (4, 5):
        for name, table in (("events", world.events(days)), ("items", world.items(days))):
            pa.csv.write_csv(pa.table(table), folder / f"{name}{days}.csv")
    words = ["--run", str(run.folder), "--events", str(folder / "events4.csv"), "--items", str(folder / "items4.csv")]
    assert cli.main(["add", "svd", "popularity", *words, "--out", str(folder / "corrected"), "--quiet"]) == 0
    words = ["--checkpoint", str(folder / "corrected"), "--platforms", "cpu"]
    assert cli.main(["export", *words, "--out", str(folder / "EXPORT")]) == 0
    return folder


def refresh_words(folder: Path, *more: str) -> list[str]:
    files = ["--events", str(folder / "events5.csv"), "--items", str(folder / "items5.csv")]
    sizes = ["--batch-size", "64", "--learning-rate", "0.02", "--requests", "80", "--k", "5", "--platforms", "cpu", "--quiet"]
    bounds = "--gate.users 5 --gate.gauc 0.05 --gate.hit-rate 0.2 --gate.log-loss 0.2 --gate.calibration 0.2"
    return ["refresh", *files, *sizes, *bounds.split(), *more]


@pytest.mark.lane("standing")
def test_what_add_and_export_write_says_until_when_it_was_trained(run, corrected, tmp_path, capsys):
    """The road of the tutorial: train, add, export, publish, refresh; and from the run with both terms itself."""
    store, until = tmp_path / "store", run.settings.first_test  # what is before, it was trained or chosen on
    assert cli.main(["snapshots", "publish", str(store), str(corrected / "EXPORT")]) == 0
    first = capsys.readouterr().out.strip()
    refused = ["--gate.volume", "1", "--current", str(corrected / "corrected")]
    for words, code, status in ((refused, 3, "refused"), ([], 0, "published")):
        assert cli.main(refresh_words(corrected, *words, "--out", str(store))) == code, words
        out, err = capsys.readouterr()
        report = json.loads(out)
        assert report["current"]["since"] == until and err == ""
        assert report["additions"]["additions"] == ["SVD term", "popularity correction"]
        too_few = re.search(r"events a day that the days before it had; bound: at least 100.0%", out)
        assert report["status"] == status and bool(too_few) == (status == "refused")
        assert SnapshotStore(store).current() == (report["name"] or first)
    assert len(SnapshotStore(store / "reports").names()) == 2  # the refused model's too
    versions = [aif.open(corrected / name).version for name in ("corrected", "EXPORT")]
    whole = aif.Trained(run.model, run.params, run.encoder)  # a model of which nothing more is known is the same model
    assert whole.version == run.version and versions[0] == versions[1] != run.version
    assert aif.open(corrected / "EXPORT").settings == run.settings.to_json()


def test_what_add_writes_is_a_run(run, corrected, tmp_path):
    days = world.data(4)
    shutil.copytree(corrected / "corrected", tmp_path / "run")
    again, whole = aif.Run.load(tmp_path / "run"), run.with_svd(days).with_popularity_correction(days)
    assert again.version == whole.version and again.settings == run.settings and again.folder == tmp_path / "run"
    options: dict[str, Any] = {"split": "validation", "k": 5, "progress": False}
    assert again.evaluate(days, **options).figures() == whole.evaluate(days, **options).figures()
    again.calibrate(days, progress=False).save(tmp_path / "saved")
    assert aif.Run.load(tmp_path / "saved").version == aif.open(tmp_path / "saved").version != again.version
    refused(FileExistsError, "a new folder or one of a run, got a checkpoint; give another", world.first, tmp_path / "run")
    aif.checkpoint.save(tmp_path / "bare", run.trained.replace(settings=None))
    refused(FileNotFoundError, "the folder of a run, found a checkpoint; open it by aif.open", aif.Run.load, tmp_path / "bare")
    mine = run.edit(days, lambda trained, _: aif.Trained(trained.model, trained.params, trained.encoder))
    mine.save(tmp_path / "mine")
    assert aif.Run.load(tmp_path / "mine").settings == run.settings
    aif.checkpoint.save(tmp_path / "newer", run.trained.replace(settings={"first_validation": 1, "unknown": 2}))
    assert aif.open(tmp_path / "newer").version == run.version
    refused(CheckpointError, "model: expected the record of a run, got another", training_record, aif.open(tmp_path / "newer"))


def test_a_refresh_without_a_needed_argument_is_wrong_usage_and_leaves_nothing(corrected, tmp_path, capsys):
    aif.checkpoint.save(tmp_path / "old", aif.open(corrected / "corrected").replace(settings=None))
    current, out = ["--current", str(tmp_path / "old")], ["--out", str(tmp_path / "store")]
    for words, message in (
        ([*current, *out], "refresh since: expected the moment"),
        ([*current, *out, "--since", "soon"], "since: expected an ISO date"),
        ([*current, *out, "--since", "20231118"], "since: expected a moment, got 20231118"),
        ([*current, *out, "--since", "2023-11-18", "--forget", "0"], "forget: expected days above 0, got 0"),
        (out, "store: expected a served model, got nothing; give `current`"),
        ([*current, "--out", "s3://bucket/models"], ""),
    ):
        assert cli.main(refresh_words(corrected, *words)) == cli.options.USAGE == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_second_job_is_refused_and_an_unfinished_one_of_other_data_is_dropped(tmp_path, capsys):
    with begin(tmp_path / "work", {"k": 1}, folders=(tmp_path / "out",)) as job:
        assert job.step("read", lambda _: {"line": "done"})["line"] == "done"
        assert job.step("read", lambda _: {"line": "again"})["line"] == "done"
        for folder in ("work", "out"):
            refused(WriterConflict, r"process \d+ on .* is writing here", WriteLock, tmp_path / folder)
    with begin(tmp_path / "work", {"k": 1}) as job:
        assert job.sealed("read") is not None
    with begin(tmp_path / "work", {"k": 2}) as job:
        assert job.sealed("read") is None
        message = "other arguments is dropped: refresh.k: expected 2, the unfinished job has 1"
        assert capsys.readouterr().err.strip().endswith(message)


def test_a_killed_refresh_does_not_go_on_with_a_model_of_other_code(run, stocked, tmp_path, monkeypatch, capsys):
    def grown(**fields: Any) -> aif.PreRanker:
        return aif.build(run.config.replace(blocks=(*run.config.blocks, block(type("Level", (Block,), fields))())))

    aif.checkpoint.save(served := tmp_path / "served", run.trained.replace(model=grown()))
    monkeypatch.setattr(Refresh, "judge", lambda *_: sys.exit())  # killed
    refused(SystemExit, "", refreshed, served, world.events(5), stocked, progress=True)
    grown(revision=1)
    message = "/served: the config .*; block 'Level': expected revision 1, that of the class, got 0; use the code that wrote it"
    refused(CheckpointError, message, refreshed, served, world.events(5), stocked, progress=True)
    grown(__annotations__={"kind": int}, kind=2)
    monkeypatch.undo()
    made = refreshed(served, world.events(5), stocked, progress=True)
    assert made.status == "published" and made.report["current"]["version"] == aif.open(served).version
    assert "a block or head got other fields since the job was killed, so its steps are done again" in capsys.readouterr().err


def test_a_killed_refresh_does_not_go_on_from_a_model_that_was_rolled_back(served, published, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(published[0], tmp_path / "store")
    call = functools.partial(refreshed, folder, world.events(6), folder, items=world.items(6), progress=True)
    monkeypatch.setattr(Refresh, "judge", lambda *_: sys.exit())  # killed
    refused(SystemExit, "", call)
    SnapshotStore(folder).rollback()
    monkeypatch.undo()
    assert call().report["current"]["version"] == aif.open(served).version != published[1].trained.version
    assert "the served model was rolled back since the job was killed" in capsys.readouterr().err


def test_a_day_that_no_calibration_fits_is_refused_with_a_report(served, run, tmp_path):
    """Events of the newest days that say the opposite of what the model learned, as a fault of a log does."""
    table = world.events(5)
    turned = table["time"] >= world.START + 4 * world.DAY
    table["item"] = np.where(turned, (table["item"] - 100 + 2) % world.ITEMS + 100, table["item"])
    options = world.OPTIONS | {"since": run.settings.first_validation, "held_out": 0.3, "learning_rate": 1e-6, "batch_size": 32}
    made = world.refresh(served, table, items=world.items(5), out=tmp_path / "store", **options)
    assert made.status == "refused" and SnapshotStore(tmp_path / "store").current() is None
    says = "no calibration fits it: calibration scores: expected scores that rise"
    assert any(says in each for each in made.report["gate"]["reasons"])
    assert made.trained.params["fitted"]["calibration"]["scale"] == aif.open(served).params["fitted"]["calibration"]["scale"]


def test_a_shuffled_day_is_refused_by_the_floor(run, tmp_path):
    """Both models are as bad on its newest hours, so their difference says nothing."""
    table, rng = world.events(5), np.random.default_rng(0)
    day = table["time"] >= world.START + 4 * world.DAY
    table["item"] = np.where(day, rng.permutation(world.ITEMS)[table["item"] - 100] + 100, table["item"])
    table["item"][day] = rng.permutation(table["item"][day])
    made = refreshed(run.folder, table, tmp_path / "store")
    (reason,) = [each for each in made.report["gate"]["reasons"] if each.startswith("newest: gauc")]
    assert re.search(r"gauc of the new model is 0\.\d+ \(95% interval .*\); bound: surely above 0.5", reason)
    assert made.status == "refused" and SnapshotStore(tmp_path / "store").current() is None


def test_a_day_of_wrong_items_is_refused_by_the_earlier_period(run, tmp_path):
    """The new model learns that each event is of the next category, and beats the served one on the newest hours."""
    table, rng = world.events(5, a_day=900), np.random.default_rng(0)
    day = np.flatnonzero(table["time"] >= world.START + 4 * world.DAY)
    for user in range(world.USERS):
        at = day[table["user"][day] == user]
        table["item"][at] = 100 + 4 * rng.integers(0, 9, len(at)) + (user + np.arange(len(at))) % world.CATEGORIES
    since = world.START + 4 * world.DAY
    options = {"fixed": (since - world.DAY // 2, since), "epochs": 6, "learning_rate": 0.15, "replay": 0.0}
    made = refreshed(run.folder, table, tmp_path / "store", since=since, **options)
    newest, fixed = (made.report["gate"]["metrics"][name]["gauc"] for name in ("newest", "fixed"))
    assert newest["new"] > newest["old"] + 0.05 and fixed["new"] < fixed["old"] - 0.05
    assert made.report["gate"]["reasons"] and all(each.startswith("fixed: ") for each in made.report["gate"]["reasons"])


def test_a_teacher_scores_the_new_samples_under_the_new_vocabularies(served, run, stocked, tmp_path, capsys):
    """It is the model of the first days, which knows none of the new ids; retrieval found some of them."""
    events = world.events(5)
    found = {name: np.tile(events[name], 3) for name in ("user", "time")}
    found["item"] = np.concatenate([np.roll(events["item"], n) for n in (1, 2, 3)])
    for name, table in {"events5": events, "items5": world.items(5), "found": found}.items():
        pa.csv.write_csv(pa.table(table), tmp_path / f"{name}.csv")
    words = ["--current", str(run.folder), "--out", str(stocked), "--teacher", str(served), "--teacher-weight", "2"]
    words += ["--candidates", str(tmp_path / "found.csv")]
    assert cli.main(refresh_words(tmp_path, *words)) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "published"
    made = aif.open(SnapshotStore(stocked).fetch(tmp_path / "made"))
    assert made.settings["loss"].endswith("2 * distill_listwise.of('teacher')")
    ranker, _, found = made.settings["teacher"].partition(", 40 candidates of ")
    whole = aif.refreshing.with_served_vocabulary(aif.open(served), made.encoder)  # with SVD term, correction and calibration
    assert ranker == whole.version and found and len(made.encoder.vocabularies["item"]) == 1 + world.ITEMS


def test_inputs_are_checked_before_an_unfinished_job_is_dropped(run, tmp_path):
    pa.csv.write_csv(pa.table(world.items(5)), tmp_path / "items.csv")
    with begin(tmp_path / "work", {"k": 1}) as job:
        job.step("read", lambda _: {"line": "done"})
    lock = WriteLock(tmp_path / "out")
    for changes, error, message in (
        ({"events": tmp_path / "typo.csv"}, FileNotFoundError, "typo.csv: expected a file or folder, got no such file"),
        ({"items": str(tmp_path / "typo.csv")}, FileNotFoundError, "typo.csv: expected"),
        ({"current": tmp_path / "typo"}, FileNotFoundError, "typo: expected a served model, got nothing; give `current`"),
        ({"task": NextItem(negatives=3)}, ArgumentError, "refresh task: expected that of the served model, .* leave it out"),
        ({"current": run.trained.replace(settings=None), "task": Cascaded()}, ArgumentError, "got Cascaded, .* write a job"),
        ({"current": run}, TypeError, "refresh current: expected a Trained, .* got Run; give run.trained"),
        ({"fixed": ("soon", "later")}, ArgumentError, "fixed: expected an ISO date"),
        ({"platforms": ("cpu", "gpu")}, ValueError, "platforms: expected names among .*, cpu one of them, got .*gpu"),
        ({"platforms": ("cuda",)}, ValueError, "platforms: expected names among .*, cpu one of them, got .'cuda'"),
        ({"out": f"file://{tmp_path}/out", "work": tmp_path / "other"}, WriterConflict, "is writing here"),
        ({"epochs": 0}, ValueError, "FitConfig.epochs: expected at least 1, got 0"),
        ({"held_out": 0.7}, ValueError, "held_out: expected a share above 0, below 0.5, got 0.7"),
        ({"out": "s3://b/m", "work": None}, ValueError, "work: expected a local folder for the steps of a job on s3://b/m"),
        ({"unknown": "keep"}, ArgumentError, "unknown: expected 'skip' or 'error', got 'keep'"),
    ):  # fmt: skip
        given = {"current": run.folder, "events": world.events(5), "items": tmp_path / "items.csv", "out": tmp_path / "store"}
        given |= {"work": tmp_path / "work"} | world.OPTIONS
        refused(error, message, world.refresh, **given | changes)
        assert (tmp_path / "work" / "job" / "read" / "step.json").is_file(), message
    lock.close()


@pytest.mark.lane("standing")
def test_new_items_stay_unseen_in_a_refresh_of_a_model_with_id_dropout(tmp_path):
    """Items without an event score as the unknown item; one that the served model has learned keeps its row."""
    once = dataclasses.replace(world.data(4), repeats=False)  # which the events do not show: the refresh takes it from the run
    first = world.first(None, once, id_dropout=0.3, epochs=1).with_unseen_items(once)
    days = world.events(5)
    known = (days["item"] < 100 + world.ITEMS - world.NEW) & (days["item"] != 100)  # no event of the new items
    table = {name: column[known & (days["time"] >= world.START + world.DAY)] for name, column in days.items()}
    made = refreshed(first.trained, table, tmp_path / "store", gate=REFUSING)
    rows = np.asarray(made.trained.params["embedding"]["item"])
    assert made.report["additions"]["additions"] == ["unseen items"]
    settings = FitSettings.from_json(made.trained.settings)
    assert settings.id_dropout == 0.3 and settings.repeats is False and world.data(4).repeats
    assert (rows[-world.NEW :] == rows[0]).all() and (rows[1 : -world.NEW] != rows[0]).any(1).all()


WIDE = dataclasses.replace(world.GATE, gauc=1.0, hit_rate=1.0, log_loss=9.0, calibration=1.0, floor=0.0)


def test_items_that_left_the_items_file_keep_what_was_known_of_them(stocked, tmp_path, caplog):
    """Through two refreshes: category, floats and content as first read, statistics of today, in the model and in the index."""
    more: dict[str, Any] = {"item_floats": ("price",), "item_statistics": (3600,), "content": "content"}
    columns, rng = dataclasses.replace(world.COLUMNS, **more), np.random.default_rng(3)
    price, vectors = rng.gamma(2.0, 10.0, world.ITEMS), rng.normal(size=(world.ITEMS, 4)).astype(np.float32)
    leaves = rng.permutation(world.ITEMS - world.NEW)[: round(0.3 * world.ITEMS)] + 100

    def files(days: int, gone: Any = ()) -> dict[str, Any]:
        table = {name: np.array(column) for name, column in world.items(days).items()}
        table |= {"price": price[table["item"] - 100], "content": vectors[table["item"] - 100]}
        return {"items": {name: column[~np.isin(table["item"], gone)] for name, column in table.items()}}

    days = aif.read(world.events(4), **files(4), columns=columns, progress=False)
    first = world.first(tmp_path / "run", days, epochs=1)
    again = {"unknown": "error", "gate": WIDE}
    earlier = refreshed(tmp_path / "run", world.events(5), stocked, **files(5, leaves), **again | {"gate": REFUSING})
    made = refreshed(earlier.trained, world.events(6), stocked, **files(6, leaves[1:]), **again)
    assert made.status == "published" and "left" not in caplog.text
    whole = aif.read(world.events(6), **files(6), columns=columns, progress=False)
    moved, known = made.trained.items, first.trained.items
    assert moved is not None and known is not None and moved.side == {}
    row, before, today = (each.encoder.vocabularies["item"].encode(leaves) for each in (made.trained, first, whole))
    fields = made.trained.params["fitted"]["fields"]
    for name in ("category", "brand"):
        raw = first.encoder.vocabularies[name].ids_of(known.ids[name][before])
        assert np.array_equal(made.trained.encoder.vocabularies[name].ids_of(moved.ids[name][row]), raw)
        if name in fields:  # what events of a history say of their item
            assert np.array_equal(made.trained.encoder.vocabularies[name].ids_of(np.asarray(fields[name])[row]), raw)
    assert np.array_equal(moved.floats[row, :1], known.floats[before, :1]) and known.floats[before, 0].std() > 0.1
    np.testing.assert_allclose(moved.floats[row, 1:], whole.catalogue.items.floats[today, 1:], rtol=1e-6)
    assert moved.content is not None and np.array_equal(moved.content[row], vectors[leaves - 100])
    assert same(aif.open(fetched := SnapshotStore(stocked).fetch(tmp_path / "here")).items, moved)
    index, table = aif.export.restore(fetched).index, files(6, leaves[1:])["items"]
    assert np.array_equal(np.sort(index.ids), np.sort(ids := table["item"]))
    table |= {"content": vectors[ids - 100]} | whole.statistic_columns(ids, int(whole.log.time.max()) + 1)
    assert same(index.take(ids)[0], aif.ItemIndex.build(made.trained, table, progress=False).take(ids)[0])


def aged(days: int) -> dict[str, Any]:
    """Files in which five items, of a brand of their own, and five users, of a town of theirs, have no event after day 0."""
    table, items = world.events(days), world.items(days)
    late = table["time"] >= world.START + world.DAY
    items["brand"][:5] = ["brand old"] * 5
    kept = ~(late & ((table["item"] < 105) | (table["user"] < 5)))
    users = {"user": np.arange(world.USERS), "town": ["old" if n < 5 else f"town {n % 3}" for n in range(world.USERS)]}
    return {"events": {name: column[kept] for name, column in table.items()}, "items": items, "users": users}


@pytest.mark.lane("standing")
def test_ids_without_an_event_for_so_long_are_forgotten(stocked, tmp_path, capsys):
    columns = dataclasses.replace(world.COLUMNS, user_id=True, user_attributes=("town",), item_statistics=(3600,))
    first = world.first(None, aif.read(**aged(4), columns=columns, progress=False), epochs=1)
    newer = aif.read(**aged(5), earlier=first.trained, progress=False)
    since = int(newer.log.time.max()) - 3 * world.DAY
    fewer = forget_ids(newer, since)
    started = warm_start(first.trained, fewer.encoder, fewer.catalogue, forget=True)
    gone = {"item": range(100, 105), "user": range(5), "brand": ["brand old"], "town": ["old"], "category": []}
    for name, ids in gone.items():
        before, after = first.encoder.vocabularies[name], fewer.encoder.vocabularies[name]
        assert set(newer.encoder.vocabularies[name].raw.tolist()) - set(after.raw.tolist()) == set(ids)
        kept = after.raw[np.isin(after.raw, before.raw)]
        old, new = (np.asarray(each.params["embedding"][name]) for each in (first, started))
        assert np.array_equal(new[after.encode(kept)], old[before.encode(kept)]) and np.array_equal(new[0], old[0])
        assert len(new) == len(after)
    row, own = (each.items.encode(np.arange(105, 136)) for each in (newer, fewer))
    now = since + world.DAY
    np.testing.assert_allclose(fewer.statistics.at(own, now), newer.statistics.at(row, now), rtol=1e-6)
    given = world.OPTIONS | {"gate": WIDE, "current": first.trained, "out": stocked, "progress": True}
    made = world.refresh(**aged(5), **given, forget=3)
    assert made.status == "published" and made.trained.encoder.version == fewer.encoding
    assert made.report["read"]["vocabularies"]["item"] == {"before": 30, "after": 31, "forgotten": 5}
    assert "forgotten ids: 5 of user, 5 of item, 0 of category, 1 of brand, 1 of town" in capsys.readouterr().err
    events = {"item": [100, 110], "time": [since, since + 1]}
    features = made.trained.encoder.user({"user": 3, "town": "old"}, events, since + 9)
    assert (features.ids["user"], features.ids["town"], features.history.item[:3].tolist()) == (0, 0, [6, 0, 0])
    index = aif.export.restore(SnapshotStore(stocked).fetch(tmp_path / "here")).index
    table = aged(5)["items"] | newer.statistic_columns(ids := np.arange(100, 136), int(newer.log.time.max()) + 1)
    rebuilt = aif.ItemIndex.build(made.trained, table, progress=False)
    assert len(index) == world.ITEMS and same(index.take(ids)[0], rebuilt.take(ids)[0])
    made = world.refresh(**aged(5), **given | {"gate": REFUSING}, forget=30)
    assert made.report["read"]["vocabularies"]["item"] == {"before": 30, "after": 36}
    assert "refresh: forget: nothing, since no event is of" in capsys.readouterr().err


def test_logged_requests_stay_those_of_their_users_when_ids_are_forgotten():
    data = aif.read(**aged(5), columns=world.COLUMNS, progress=False)
    positions = np.arange(0, len(data.log), 7)
    rows = np.stack([data.log.item[positions], np.full(len(positions), data.items.encode([100])[0])], 1).astype(np.int32)
    labels = {"score": np.arange(2.0 * len(positions), dtype=np.float32).reshape(-1, 2)}
    cascade = Cascade(positions=positions, rows=rows, stage=np.zeros(rows.shape, np.int8), labels=labels)
    data = dataclasses.replace(data, cascade=cascade)
    fewer = forget_ids(data, int(data.log.time.max()) - 3 * world.DAY)
    assert data.cascade is not None and fewer.cascade is not None and 100 in fewer.items.raw and 101 not in fewer.items.raw
    there = data.log.user[positions] > 5  # whose first five are forgotten
    for name in ("time", "action"):
        ours, theirs = (getattr(each.log, name)[each.cascade.positions] for each in (data, fewer))
        assert np.array_equal(ours[there], theirs)
    assert np.array_equal(data.cascade.labels["score"][there], fewer.cascade.labels["score"])
    raw, own = data.items.ids_of(rows[there]), fewer.cascade.rows
    assert np.array_equal(own, fewer.items.encode(raw)) and (own[raw != 100] > 0).sum() > 100


@pytest.fixture(scope="module")
def newer(run) -> aif.Dataset:
    """Five days under the ids of the model and the new ones."""
    return aif.read(world.events(5), items=world.items(5), earlier=run.trained, progress=False)


def test_a_warm_start_keeps_the_rows_of_old_ids(run, newer):
    warm = warm_start(run.trained, newer.encoder, newer.catalogue)
    for name in ("item", "category", "brand"):
        before, after = run.encoder.vocabularies[name], newer.encoder.vocabularies[name]
        rows = np.append(0, after.encode(before.raw))
        old, new = (np.asarray(params["embedding"][name]) for params in (run.params, warm.params))
        assert np.array_equal(new[rows], old) and len(new) == len(after) and np.isfinite(new).all()
    given: dict[str, Any] = {"earlier": run.trained, "progress": False}
    assert aif.read(world.events(4), items=world.items(4), **given).encoding == run.trained.encoding
    lost = "encoder, 'item': expected every id of the model's"
    refused(ValueError, lost, warm_start, warm, run.encoder, world.data(4).catalogue)
    named = [{**table, "item": [f"i{item}" for item in table["item"]]} for table in (world.events(5), world.items(5))]
    message = r"(?s)expected integers like the vocabulary 'item' given, got text\n.*\n\(2 problems in all\)$"
    refused(ValueError, message, aif.read, named[0], items=named[1], **given)
    refused(ValueError, "encoder: expected none with e", aif.read, world.events(5), items=None, encoder=run.encoder, **given)


def test_the_old_model_answers_new_requests_as_in_service(run, newer):
    """Encoded by its own encoder, as a service would, new items among candidates and history.

    Tables of other sizes are multiplied in another order of sums, which JAX 0.12 shows in the last bit.
    """
    served = aif.refreshing.with_served_vocabulary(run.trained, newer.encoder)
    position = int(np.flatnonzero((newer.log.item >= 31) & (newer.log.history_end(np.arange(len(newer.log))) > 0))[-1])
    user = int(newer.log.user[position])
    start, end = int(newer.log.offsets[user]), int(newer.log.history_end([position])[0])
    raw = newer.items.raw[newer.log.item[start:end] - 1]
    events = {"user": newer.users.raw[np.full(end - start, user) - 1], "item": raw, "time": newer.log.time[start:end]}
    features = run.encoder.user(None, events, now=int(newer.log.time[position]))
    _, items = encode_items(world.items(5), run.encoder)
    expected = run.model.joint(run.params, features, items)
    own = jax.tree.map(lambda leaf: leaf[0], newer.user_features([position], length=run.config.history_length))
    got = served.model.joint(served.params, own, newer.catalogue.features(np.arange(1, 1 + world.ITEMS)))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    again = aif.refreshing.with_served_vocabulary(run.trained, newer.encoder)
    assert again.model is served.model  # so that programs are compiled once


def test_training_goes_on_from_given_parameters_with_a_replay(run, newer):
    warm = warm_start(run.trained, newer.encoder, newer.catalogue)
    since = world.START + 4 * world.DAY
    options: dict[str, Any] = dict(start=warm.params, since=since, validation=0.0, test=0.2, keep_best=None, k=None)
    options |= dict(batch_size=64, progress=False)
    more = demo.fit(warm.model, newer, replay=0.5, learning_rate=1e-9, **options)
    record = more.settings.to_json()
    assert record["replay"] == 0.5 and len(record["start"]) == 64 and FitSettings.from_json(record) == more.settings
    positions = training_positions(newer, more.settings)
    new = newer.log.time[positions] >= since
    assert (~new).sum() == round(0.5 * new.sum()) and (np.diff(positions) > 0).all()
    item = np.asarray(more.params["embedding"]["item"])
    np.testing.assert_allclose(item, warm.params["embedding"]["item"], atol=1e-5)  # hardly moved
    refused(ValueError, "replay: expected 0 without", demo.fit, warm.model, newer, replay=0.5, **options | {"since": None})


def measured(gauc: float = 0.8, **changes: Any) -> Measurement:
    """A measurement of 200 users whose metrics spread a little."""
    users, spread = np.arange(200), 0.02 * np.sin(np.arange(200))
    values = {"gauc": gauc, "hr@5": 0.5, "log_loss": 0.3, "calibration_error": 0.01} | changes.pop("metrics", {})
    by_user = {name: ByUser(users, value + spread, np.ones(200)) for name, value in values.items()}
    return Measurement(**{"finite": True, "by_user": by_user} | changes)


NOISY = {"gauc": ByUser(np.arange(200), 0.79 + 0.3 * np.cos(7 * np.arange(200.0)), np.ones(200))}
REFUSALS = {
    "not finite": (measured(finite=False), {}, "a parameter or a score that is not finite"),
    "gauc": (measured(0.79), {}, "gauc went from 0.80.. to 0.79.., a difference of -0.0100 .* bound: at most 0.005 worse"),
    "hit rate": (measured(metrics={"hr@5": 0.45}), {}, "hr@5 went from 0.5.* to 0.45.* bound: at most 0.01 worse"),
    "log-loss": (measured(metrics={"log_loss": 0.35}), {}, r"log_loss went from 0.3.* difference of \+0.0500 .* 0.02 worse"),
    "calibration": (measured(metrics={"calibration_error": 0.05}), {}, r"calibration_error .* difference of \+0.0400"),
    "an undefined metric": (measured(metrics={"gauc": np.nan}), {}, "gauc of the new model is nan"),
    "vocabulary": (measured(unknown=0.2), {}, "20.0% of the events are of items that the new model lacks"),
    "lost data": (measured(), {"volume": 0.5}, "50.0% of the events a day .* bound: at least 60.0%"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSALS)
def test_the_gate_refuses(fault):
    new, options, message = REFUSALS[fault]
    (reason,) = judge({"newest": (new, measured())}, **options).reasons
    assert re.search(message, reason) and "bound" in reason, reason


def test_the_gate_needs_an_order_that_is_surely_no_chance():
    few = ByUser(np.arange(9), 0.55 + 0.4 * np.cos(7 * np.arange(9.0)), np.ones(9))
    new = measured(by_user=dict(measured().by_user) | {"gauc": few})
    (reason,) = judge({"newest": (new, new), "fixed": (new, new)}, GateConfig(users=5)).reasons
    assert reason.startswith("newest: gauc of the new model is 0.5") and reason.endswith("bound: surely above 0.5")
    assert not judge({"newest": (new, new)}, GateConfig(users=5, floor=0.2)).reasons


def test_the_gate_passes_what_is_no_worse():
    assert not judge({"newest": (measured(), measured())}, volume=0.9).reasons
    assert not judge({"newest": (measured(0.798, metrics={"hr@5": 0.495}), measured())}).reasons  # within the bounds
    noisy = measured(by_user=dict(measured().by_user) | NOISY)
    assert not judge({"newest": (noisy, measured())}).reasons  # beyond the bound, and may be chance
    fixed = judge({"newest": (measured(), measured()), "fixed": (measured(0.7), measured())})
    assert [reason.partition(":")[0] for reason in fixed.reasons] == ["fixed"]
    times = np.concatenate([np.arange(0, 100), np.arange(100, 200, 2)])  # events a day of the new part and before
    assert volume(times, 100) == pytest.approx(0.5, rel=0.02) and volume(times, 0) is None
    few = {"newest": (measured(), measured())}
    assert "200 users have candidates of both labels" in judge(few, GateConfig(users=300)).reasons[0]


@pytest.fixture(scope="module")
def requests(run) -> Requests:
    """Requests of the slice that the run did not train on."""
    days, task = world.data(4), NextItem()
    span = run.settings.span("validation")
    positions = task.positions(days, min_history=0, **span)[:100]
    return Requests(data=days, positions=positions, candidates=task.source(days, before=span["since"], held_out=True), k=5)


def planted(trained: aif.Trained, fault: str) -> aif.Trained:
    """The model with a fault in its table of items."""
    rows = np.asarray(trained.params["embedding"]["item"]).copy()
    if fault == "NaN":
        rows[3, 1] = np.nan
    else:
        rows = rows[np.append(0, 1 + np.random.default_rng(0).permutation(len(rows) - 1))]
    return trained.replace(params=trained.params | {"embedding": trained.params["embedding"] | {"item": rows}})


@pytest.mark.parametrize("fault", ["NaN", "swapped rows", "yesterday's vocabulary"])
def test_planted_models_are_refused(run, requests, newer, fault):
    old = measure(run.trained, requests)
    assert not judge({"newest": (old, old)}, GateConfig(users=5)).reasons
    assert old.by_user["hr@5"].mean > 0
    if fault == "yesterday's vocabulary":
        task = NextItem()
        positions = task.positions(newer, min_history=0, since=world.START + 4 * world.DAY, before=None)[:60]
        source = task.source(newer, before=world.START + 4 * world.DAY, held_out=True)
        stale = measure(run.trained, Requests(data=newer, positions=positions, candidates=source, k=5))
        assert 0.05 < stale.unknown < 0.5
        item = np.where(np.isin(np.arange(len(newer.log)), positions), newer.log.item, 0)  # others are of items nobody knows
        nobody = dataclasses.replace(newer, log=type(newer.log)(newer.log.user, item, newer.log.action, newer.log.time))
        assert measure(run.trained, Requests(data=nobody, positions=positions, candidates=source, k=5)).unknown > 0.5
        reasons = judge({"newest": (stale, stale)}, GateConfig(users=5)).reasons
    else:
        new = measure(planted(run.trained, fault), requests)
        reasons = judge({"newest": (new, old)}, GateConfig(users=5)).reasons
    assert reasons and all("bound" in reason for reason in reasons)


def with_offset(trained: aif.Trained, shift: float) -> aif.Trained:
    """The model with a popularity correction, as of a log that has grown."""
    table = popularity_offset(np.arange(len(trained.params["embedding"]["item"])), untrained=None) + np.float32(shift)
    params, config = with_table(trained.params, table, ItemOffset(), config=trained.config)
    return trained.replace(model=aif.build(config), params=params)


def test_scores_that_are_no_probabilities_are_judged_by_what_they_rank(run, requests):
    """A popularity correction moves with the number of events, and predicts nothing; a calibration does."""
    gate = GateConfig(users=5)
    old, grown = (measure(with_offset(run.trained, shift), requests) for shift in (0.0, 1.5))
    plain = measure(run.trained, requests)
    for name in ("log_loss", "calibration", "calibration_error"):
        assert old.by_user[name].mean == grown.by_user[name].mean == pytest.approx(plain.by_user[name].mean, abs=1e-6)
    assert not judge({"newest": (grown, old)}, gate).reasons and old.by_user["hr@5"].mean != plain.by_user["hr@5"].mean

    def sure(trained: aif.Trained) -> aif.Trained:  # ranks as before, and is too sure
        return trained.replace(params=with_calibration(trained.params, {"scale": np.float32(9), "bias": np.float32(3)}))

    for fault in ("NaN", "swapped rows"):
        assert judge({"newest": (measure(planted(with_offset(run.trained, 1.5), fault), requests), old)}, gate).reasons
    calibrated = run.calibrate(world.data(4), progress=False).trained
    reasons = judge({"newest": (measure(sure(calibrated), requests), measure(calibrated, requests))}, gate).reasons
    assert [reason.split()[1] for reason in reasons] == ["log_loss", "calibration_error"]
    loud = jax.tree.map(lambda leaf: 4 * leaf, run.params["embedding"])  # as of a task that it was not trained for
    loud = measure(with_offset(run.trained.replace(params=run.params | {"embedding": loud}), 0.0), requests)
    assert any("log_loss" in reason for reason in judge({"newest": (loud, old)}, gate).reasons)


def test_a_model_that_names_no_task_needs_one_for_events_of_several_actions(tmp_path):
    columns = dataclasses.replace(world.COLUMNS, action="what")
    files = [world.events(days) | {"what": np.array(["shown", "click"])[world.events(days)["item"] % 2]} for days in (4, 5)]
    days = aif.read(files[0], items=world.items(4), columns=columns, progress=False)
    model = world.model(days.schema)
    served = aif.Trained(model, demo.init(model, items=days.catalogue), days.encoder)  # which no run trained
    given = world.OPTIONS | dict(items=world.items(5), since=int(days.log.time.max()) + 1)
    message = r"task: expected a task, or positives by .*, got none for 735 'click', 765 'shown'; give task=Impressions"
    refused(ValueError, message, world.refresh, served, files[1], out=tmp_path / "store", **given)
    assert not (tmp_path / "store").exists() or SnapshotStore(tmp_path / "store").current() is None


@pytest.mark.parametrize(("corrected", "least", "added"), [
    (False, 0.0, "none: the served model has none"), (False, -9.0, "popularity correction"),
    (True, -3.0, "item offsets as they were"),
])  # fmt: skip
def test_item_offsets_are_made_again_only_where_they_correct_the_sampling(tmp_path, corrected, least, added):
    first = world.first(None, seed=5, task=NextItem(negatives=7, logq_correction=corrected)).trained
    table = np.linspace(least, 0.0, len(first.params["embedding"]["item"]), dtype=np.float32)
    params, config = with_table(first.params, table, ItemOffset(), config=first.config)
    served = first.replace(model=aif.build(config), params=params)
    made = world.refresh(served, world.events(5), items=world.items(5), out=tmp_path / "store", work=tmp_path, **world.OPTIONS)
    assert made.report["additions"]["line"] == added
    new = aif.open(SnapshotStore(tmp_path / "store").fetch(tmp_path / "here"))
    offsets = np.asarray(new.params["fitted"]["item_offset"]["table"])
    assert new.settings["seed"] == 5 and offsets[0] == least and np.array_equal(offsets[: len(table)], table) == (least != -9)
