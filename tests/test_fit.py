"""`aif.fit` and `Run`: how `fit` splits, the best checkpoint, exact resume, refusals, and the road to a served ranking."""

import asyncio
import dataclasses
import datetime
import re
from types import SimpleNamespace

import numpy as np
import pytest

import aif_jax as aif
from aif_jax import train
from aif_jax.checkpoint import Checkpoints, settings_of
from aif_jax.checks import EncodingMismatch
from aif_jax.data.cascade import Cascade
from aif_jax.data.negatives import SeenPairs
from aif_jax.data.order import BatchKey
from aif_jax.data.split import split_by_time, time_cuts
from aif_jax.run import Run
from aif_jax.train.baselines import baseline_scores
from aif_jax.train.loop import JsonLines
from aif_jax.train.settings import FitConfig, FitSettings
from aif_jax.train.tasks import Cascaded, Impressions, NextItem
from aif_jax.train.training import evaluation_options, held_out, plan, resolve_settings, training_positions, validation
from experiments.datasets.synthetic import synthetic_world
from tests import demo
from tests.demo import FIT, fit, same
from tests.refusals import refused


def test_a_run_that_diverges_is_an_error_and_a_rate_that_is_no_number_is_refused(data, small, tmp_path):
    for number, more in enumerate(({}, {"weight_decay": 0.0})):  # with the default decay the parameters overflow
        given = FIT | more | dict(out=tmp_path / f"run {number}", learning_rate=1000.0)
        message = r"diverged: the loss was \d.* up to step \d+; take a smaller learning rate"
        refused(FloatingPointError, message, fit, small, data, **given)
    for field, value in (("learning_rate", float("nan")), ("learning_rate", float("inf")), ("weight_decay", -1.0)):
        message = f"FitConfig.{field}: expected a finite number of at least 0, got {value}"
        refused(ValueError, message, fit, small, data, out=tmp_path / "other", **FIT | {field: value})
    assert not (tmp_path / "other").exists()


def test_a_run_has_the_best_checkpoint_and_a_folder_that_says_what_it_was(data, small, run):
    parts = split_by_time(data.log, min_history=1)
    steps = 2 * (len(parts.train) // 64)
    with Checkpoints(run.folder, keep_best=("gauc", "max")) as checkpoints:
        assert checkpoints.steps == [steps // 2, steps]
        best = checkpoints.restore("best")
    assert same(best.params, run.params) and best.metrics == run.metrics
    logged = [row for row in JsonLines(run.folder / "log.jsonl").rows() if "gauc" in row]
    assert [row["step"] for row in logged] == [steps // 2, steps]
    assert run.metrics["gauc"] == max(row["gauc"] for row in logged)
    assert list(run.metrics) == ["auc", "gauc", "gauc_mean", "log_loss", "calibration", "calibration_error", "hr@10", "ndcg@10"]
    record = settings_of(run.folder)
    assert record["loss"] == "listwise_softmax + pointwise_bce"
    assert record["task"] == {"name": "NextItem", **vars(FIT["task"])}
    assert FitSettings.from_json(record) == run.settings
    assert run.encoder.length == run.config.history_length and run.encoder.version == data.encoder.version
    assert f"gauc {run.metrics['gauc']:.4f}" in str(run) and str(run.folder) in str(run)
    untrained = train.evaluate(small, demo.init(small, items=data.catalogue), data, parts.test, progress=False)
    assert run.evaluate(data, progress=False).log_loss < untrained.log_loss - 0.05


def test_evaluation_is_that_of_the_slice_and_of_the_run(data, run):
    parts = split_by_time(data.log, min_history=1)
    for split, part in (("test", parts.test), ("validation", parts.validation)):
        got = run.evaluate(data, split, k=10, progress=False)
        assert got.requests == len(part)
        assert got == run.evaluate(data, split, k=10, progress=False)
    few = run.evaluate(data, requests=30, min_history=20, k=None, progress=False)
    assert few.requests == 30 and few.hit_rate is None
    for split in ("tests", "train"):
        refused(ValueError, f"split: expected .* which training never saw, got '{split}'", run.evaluate, data, split)
    refused(ValueError, "k: expected None or at least 1, got 0", run.evaluate, data, k=0)
    encoder = dataclasses.replace(data.encoder, columns=dataclasses.replace(data.encoder.columns, time="another name"))
    other = dataclasses.replace(data, catalogue=dataclasses.replace(data.catalogue, schema=encoder.schema), encoder=encoder)
    refused(EncodingMismatch, "data: expected the encoding", run.evaluate, other)


def test_a_loaded_run_is_the_run(data, run):
    loaded = Run.load(run.folder)
    assert same(loaded.params, run.params) and loaded.config == run.config and loaded.settings == run.settings
    assert (loaded.metrics, loaded.folder, loaded.encoder.version) == (run.metrics, run.folder, run.encoder.version)
    assert loaded.evaluate(data, k=10, progress=False) == run.evaluate(data, k=10, progress=False)
    refused(FileNotFoundError, "expected the folder of a run, found no checkpoint of one", Run.load, run.folder / "1")


@pytest.mark.parametrize("edit", ["trained", "corrected"])
def test_ranking_in_one_call_is_the_answer_of_the_engine(data, run, edit):
    run = run if edit == "trained" else run.with_popularity_correction(data)
    user, now = 3, int(data.log.time.max()) + 60
    mine = data.log.user == user
    events = {"item": data.items.raw[data.log.item[mine] - 1], "time": data.log.time[mine], "action": data.log.action[mine]}
    raw_user = data.users.raw[user - 1]
    candidates = np.concatenate([data.items.raw[::-1], data.items.raw[:3], [10**9]])

    async def served():
        profile = {run.encoder.columns.user_record_id: raw_user}
        index, config = run.index(data.catalogue, progress=False), aif.serving.ServingConfig(buckets=(256,))
        async with run.serve(index, features=lambda _: run.encoder(profile, events, now), config=config) as engine:
            return await engine.rank("anyone", 5, candidates=candidates)

    answer = asyncio.run(served())
    ids, logits = run.rank(raw_user, {name: column[::-1] for name, column in events.items()}, candidates, 5, now=now)
    assert ids.tolist() == answer.ids.tolist() and logits == pytest.approx(answer.logits, abs=1e-5)
    assert len(run.rank(raw_user, events, candidates, 10**6, now=now)[0]) == len(data.items.raw)
    none = [run.rank(given, None, candidates, 5)[0].tolist() for given in (raw_user, {"user": raw_user}, None)]
    assert none[0] == none[1] != ids.tolist() and len(none[2]) == 5
    assert [len(part) for part in run.rank(None, None, [10**9], 5)] == [0, 0]
    refused(ValueError, "rank k: expected a whole number of at least 1, got 1.5", run.rank, None, None, candidates, 1.5)
    refused(ValueError, r"candidates: expected item ids \[C\], .* got shape \[\]", run.rank, None, None, "ab", 5)


def kill_at(step: int):
    """What ends the run at a step, before its checkpoint is written."""

    def on_log(number, values):
        if number >= step:
            raise KeyboardInterrupt

    return on_log


@pytest.mark.parametrize("cut", [False, True], ids=["killed", "power cut"])
def test_a_killed_run_ends_as_one_that_was_not(data, small, run, tmp_path, caplog, cut):
    """Where its log is cut within a row too, the run says which line is left out."""
    given = FIT | dict(out=tmp_path / "run")
    steps, log = max(Checkpoints(run.folder).steps), tmp_path / "run" / "log.jsonl"
    refused(KeyboardInterrupt, "", fit, small, data, on_log=kill_at(steps), **given)  # before its last checkpoint
    assert Checkpoints(tmp_path / "run").steps == [steps // 2]
    if cut:
        log.write_bytes(log.read_bytes()[:7])
    resumed = fit(small, data, **given)
    assert ("log.jsonl, line 1: left out, it is cut" in caplog.text) == cut
    again = fit(small, data, **given)  # finished: nothing is left to do
    for one in (resumed, again):
        assert same(one.params, run.params) and one.metrics == run.metrics
    last = [Checkpoints(folder).restore() for folder in (run.folder, tmp_path / "run")]
    assert last[0].step == last[1].step == steps and same(last[0].params, last[1].params)
    whole, values = ([(r["step"], r["loss"]) for r in JsonLines(f).rows()] for f in (run.folder / "log.jsonl", log))
    assert values == [row for row in whole if not cut or row[0] > steps // 2] and "gauc" in JsonLines(log).rows()[-1]


def test_a_folder_of_another_run_is_refused(data, small, run, tmp_path):
    given = FIT | dict(out=run.folder)
    mine = type("Evening", (NextItem,), {})(negatives=3, evaluated=20)  # no folder could be opened again
    foreign, fresh = {"out": tmp_path / "foreign"}, {"out": tmp_path / "fresh"}
    with Checkpoints(tmp_path / "foreign") as checkpoints:
        checkpoints.save_async(1, run.params, run.config)
    for changes, error, message in (
        ({"epochs": 3}, ValueError, r"expected a run with these settings, found another:\n  fit.epochs: expected 3, the"),
        ({"task": NextItem(negatives=4, evaluated=20)}, ValueError, "fit.task.negatives: expected 4, the run has 3"),
        ({"task": mine}, ValueError, "fit task: expected one of NextItem, Impressions, .* others by make_step, got"),
        (foreign, FileExistsError, "got checkpoints without settings; give another `out`"),
        (fresh | {"batch_size": 5000}, ValueError, "samples: expected at least one batch of batch_size=5000 to train on, got"),
    ):
        refused(error, message, fit, small, data, **given | changes)
    message = "cursor: expected one of this pipeline, got one of another:\n.*pipeline.data.name"
    refused(ValueError, message, fit, small, dataclasses.replace(data, name="another"), **given)
    wider = aif.build(small.config.replace(width=5))
    refused(ValueError, "expected this config and schema, got others", fit, wider, data, **given)
    assert fit(small, data, **given | fresh | {"epochs": 1}).folder == tmp_path / "fresh"  # nothing was there


@pytest.mark.parametrize("task", [Impressions(candidates=1, threshold=2), Impressions(candidates=3, threshold=2)])
def test_other_tasks_train_and_do_not_rank_the_catalogue(data, small, task):
    run = fit(small, data, **FIT | dict(task=task, epochs=1))
    assert run.folder is None and "hr@10" not in run.metrics and 0 < run.metrics["gauc"] < 1
    got = run.evaluate(data, progress=False)
    assert got.hit_rate is None and got.requests > 50
    assert FitSettings.from_json(run.settings.to_json()) == run.settings


def test_a_run_without_a_validation_slice_keeps_the_last_checkpoint(data, small):
    def mine(scores, labels, *, where):
        return train.losses.pointwise_bce(scores, labels, where=where)

    run = fit(small, data, **FIT | dict(epochs=1, validation=0.0, test=0.0, keep_best=None, loss=mine))
    assert run.metrics == {} and "no validation slice" in str(run)
    assert run.settings.loss.endswith("test_a_run_without_a_validation_slice_keeps_the_last_checkpoint.<locals>.mine")
    refused(ValueError, "test: expected a sample with 1 earlier events of its user, got none", run.evaluate, data)


@pytest.mark.parametrize("wrong, message", [
    ({"validation": 0.0}, "FitConfig.keep_best: expected None without a validation slice, got 'gauc'"),
    ({"keep_best": "hr@100"}, r"FitConfig.keep_best: expected one of \['auc', .*'hr@10', 'ndcg@10'\], got 'hr@100'"),
    ({"task": Impressions(candidates=1, threshold=9)}, r"threshold: expected an action row in \[2, 3\): 1 is 1, 2 is 2, got 9"),
    ({"min_history": 500}, "samples: expected at least one batch of batch_size=64 to train on, got 0; see min_history"),
])  # fmt: skip
def test_wrong_settings_are_refused(data, small, wrong, message):
    refused(ValueError, message, fit, small, data, **FIT | wrong)


def test_a_figure_that_the_slice_does_not_define_is_refused_before_training(data, small):
    early = data.log.time < np.quantile(data.log.time, 0.7)  # later events are seen alone
    log = aif.EventLog(data.log.user, data.log.item, np.where(early, data.log.action, 1), data.log.time)
    seen = dataclasses.replace(data, log=log)
    with pytest.raises(ValueError, match="keep_best: expected a figure that the validation slice defines, got 'gauc': none"):
        fit(small, seen, **FIT | dict(task=Impressions(candidates=1, threshold=2)))
    liked = np.where(early, 1, data.log.user % 2 + 1).astype(np.int32)  # users like all or nothing: an AUC over all is defined
    apart = dataclasses.replace(data, log=aif.EventLog(data.log.user, data.log.item, liked, data.log.time))
    settings = FitSettings(
        task=Impressions(candidates=1, threshold=2), first_validation=int(np.quantile(data.log.time, 0.8)), first_test=2**40,
        repeats=True, loss="", optimizer="", k=None, keep_best="auc",
    )  # fmt: skip
    validation(small, apart, settings)
    with pytest.raises(ValueError, match="got 'gauc_mean': none of its .* of both labels .gauc: of one user.; give"):
        validation(small, apart, dataclasses.replace(settings, keep_best="gauc_mean"))
    refused(ValueError, "got 'auc': none of its .* labels .*; give keep_best='log_loss'", validation, small, seen, settings)


def test_a_run_follows_its_data_where_nobody_comes_back(data, small, tmp_path):
    once, out = dataclasses.replace(data, repeats=False), tmp_path / "run"
    given = FIT | dict(epochs=1)
    made = fit(small, once, out=out, **given)
    assert fit(small, once, out=out, **given).metrics == made.metrics  # goes on with the run, which is done
    refused(ValueError, "fit.repeats: expected True, the run has False", fit, small, data, out=out, **given)
    positions, source = held_out(once, made.settings, "test")
    sample = np.arange(len(positions))[:, None]
    assert not SeenPairs(data, positions).contains(sample, source(positions, BatchKey(0, 0, 0)).rows[:, 1:]).any()
    left_out, kept = (made.evaluate(each, k=10, progress=False) for each in (once, data))
    assert left_out != kept and left_out.inputs["repeats"] is False and kept.inputs["repeats"] is True


TASKS = [NextItem(), Impressions(candidates=3, threshold=2), Cascaded()]


@pytest.fixture(scope="module")
def listed():
    """Histories whose second half has requests of eight events; a cascade whose requests are all in the last third."""
    data = synthetic_world(0, users=60, items=90, topics=12, categories=8, events_per_user=60, lag=8).dataset
    log, time = data.log, data.log.time.copy()
    for start, end in zip(log.offsets[:-1], log.offsets[1:], strict=True):
        place = np.arange(end - start)
        time[start:end] = time[start:end][np.where(place < len(place) // 2, place, place - (place - len(place) // 2) % 8)]
    log = aif.data.EventLog(log.user, log.item, log.action, time)
    data = dataclasses.replace(data, log=log)
    starts = aif.data.sample_positions(log, requests=True, since=int(np.quantile(time, 0.67)))
    rows = log.item[starts][:, None].astype(np.int32)
    given = dict(stage=np.zeros(rows.shape, np.int8), labels={"click": np.ones(rows.shape, np.float32)})
    return dataclasses.replace(data, cascade=Cascade(positions=starts, rows=rows, **given))


def resolved(data, task, **given) -> FitSettings:
    names = dict(task=task, out=None, loss="", optimizer="")
    return resolve_settings(FitConfig(buckets=(), **given), data, demo.config(), **names)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_shares_are_of_the_samples_of_the_task(listed, task):
    whole = task.positions(listed, min_history=0, since=None, before=None)
    times = listed.log.time[whole]
    settings = resolved(listed, task, test=0.2)
    assert (None, settings.first_validation, settings.first_test) == time_cuts(times, test=0.2)
    held = [(times >= moment).mean() for moment in (settings.first_validation, settings.first_test)]
    assert held == pytest.approx([0.3, 0.2], abs=0.02)
    spans = [task.positions(listed, min_history=0, **settings.span(split)) for split in ("train", "validation", "test")]
    np.testing.assert_array_equal(np.sort(np.concatenate(spans)), whole)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_a_plan_counts_every_sample_once(listed, task):
    """Trained on, held out, or left out and why: with replays, an excluded span, and before 1970."""
    log, later = listed.log, resolved(listed, task).first_test
    early = dataclasses.replace(listed, log=aif.data.EventLog(log.user, log.item, log.action, log.time - later))
    times = early.log.time[task.positions(early, min_history=0, since=None, before=0)]
    first, start, end = (int(np.quantile(times, share)) for share in (0.2, 0.3, 0.4))
    for given in ({}, {"without": (start, end)}, {"since": first, "replay": 0.1, "without": (start, end)}):
        settings = resolved(early, task, min_history=3, **given)
        feed = SimpleNamespace(dataset=early, positions=training_positions(early, settings))
        numbers = re.findall(r"([\d,-]+) (?:events|requests|to|for|before|in|with)\b", next(plan(feed, settings)))
        total, *parts = (int(number.replace(",", "")) for number in numbers[:7])
        assert total == sum(parts) and len(parts) == 6 and min(parts) >= 0 and parts[0] == len(feed.positions)
        assert [count > 0 for count in parts[3:5]] == ["since" in given, "without" in given]
    baselines = evaluation_options(resolved(early, task), early, "test")["baselines"]  # the test begins at second 0
    assert same(baselines, baseline_scores(early, before=0, thresholds=task.thresholds))


@pytest.mark.parametrize(("given", "expected"), [
    (dict(validation=0.2, test=0.2), (None, 40, 50)),
    (dict(validation=0, test=0), (None, 51, 51)),
    (dict(validation=0.0, test=35), (None, 35, 35)),
    (dict(validation=0.2, test=35), (None, 30, 35)),
    (dict(validation=15, test=0.2), (None, 15, 50)),
    (dict(validation=15, test=np.int64(35)), (None, 15, 35)),
    (dict(validation=0.5, test=0, since=20), (20, 40, 51)),
    (dict(validation="1970-01-01T00:00:15", test=np.datetime64(35, "s")), (None, 15, 35)),
    (dict(validation="1970-01-01T00:00:15", test=35_000, unit="ms"), (None, 15, 35)),
    (dict(validation=0.2, test=datetime.datetime.fromisoformat("1970-01-01T01:00:35+01:00")), (None, 30, 35)),
])  # fmt: skip
def test_shares_and_moments_by_hand(given, expected):
    assert time_cuts(np.array([30, 10, 50, 20, 40]), **given) == expected


def test_a_run_by_dates_resumes_is_evaluated_and_says_its_samples(data, small, tmp_path, capsys, caplog):
    time = np.sort(data.log.time)
    since, validation, test = [str(np.datetime64(int(time[place]), "s")) for place in (200, 800, 1000)]
    given = dict(epochs=1, out=tmp_path / "run", batch_size=64, task=NextItem(negatives=3, evaluated=20), requests=60, k=10)
    given |= dict(since=since, validation=validation, test=test)
    run = fit(small, data, **given)
    said = capsys.readouterr().err
    train, validated, tested = (
        NextItem().positions(data, min_history=1, **run.settings.span(split)) for split in ("train", "validation", "test")
    )
    held = f"{len(validated):,} for validation (60 evaluated) from {validation}, {len(tested):,} for the test from {test}"
    line = f"NextItem: of {len(time):,} events {len(train):,} to train on, {held}"
    assert f"{line}; left out: 200 before the first moment (since), 0 in the span excluded (without), " in said
    trained = np.unique(data.log.item[data.log.time < np.datetime64(validation, "s").astype(int)])
    (new,) = re.findall(r"validation: ([\d.]+)% of the requests are for an item without a training event", said)
    assert abs(float(new) / 100 - (~np.isin(data.log.item[validated], trained)).mean()) < 0.1  # of 60 of them
    assert len(train) < 600 and data.log.time[train].min() >= np.datetime64(since, "s").astype(int)
    assert settings_of(run.folder)["first_test"] == int(time[1000]) and settings_of(run.folder)["since"] == int(time[200])
    again = fit(small, data, progress=False, **given)  # finished: resumes, and trains nothing
    assert again.metrics == run.metrics and Run.load(run.folder).settings == run.settings
    with caplog.at_level("INFO", logger="aif_jax.output"):
        fit(small, data, progress=False, **given)
    assert line in caplog.text
    refused(ValueError, r"fit.since: expected .*the run has", fit, small, data, progress=False, **given | {"since": None})
    assert run.evaluate(data, k=10, progress=False).requests == len(tested)
