"""How `fit` splits: shares of the task's samples, moments, `since`; what it says of the samples and of its figures."""

import dataclasses
import datetime

import numpy as np
import pytest

import aif_jax as aif
from aif_jax.checkpoint import settings_of
from aif_jax.data.cascade import Cascade
from aif_jax.data.split import time_cuts
from aif_jax.run import Run
from aif_jax.train.settings import FitConfig, FitSettings
from aif_jax.train.tasks import Cascaded, Impressions, NextItem
from aif_jax.train.training import cuts, note, samples_line, samples_of
from experiments.datasets.synthetic import synthetic_world
from tests import demo
from tests.demo import fit
from tests.refusals import refused

DAY = 86_400
TASKS = [NextItem(), Impressions(candidates=3, threshold=2), Cascaded()]


@pytest.fixture(scope="module")
def listed():
    """Histories whose second half has requests of eight events; a cascade whose requests are all in the last third."""
    data = synthetic_world(0, users=60, items=90, topics=12, categories=8, events_per_user=60, lag=8).dataset
    log, time = data.log, data.log.time.copy()
    for start, end in zip(log.offsets[:-1], log.offsets[1:], strict=True):
        place = np.arange(end - start)
        first = np.where(place < len(place) // 2, place, place - (place - len(place) // 2) % 8)
        time[start:end] = time[start:end][first]
    log = aif.data.EventLog(log.user, log.item, log.action, time)
    data = dataclasses.replace(data, log=log)
    starts = aif.data.sample_positions(log, requests=True, since=int(np.quantile(time, 0.67)))
    rows = log.item[starts][:, None].astype(np.int32)
    given = dict(stage=np.zeros(rows.shape, np.int8), labels={"click": np.ones(rows.shape, np.float32)})
    return dataclasses.replace(data, cascade=Cascade(positions=starts, rows=rows, **given))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_shares_are_of_the_samples_of_the_task(listed, task):
    times = listed.log.time[task.positions(listed, min_history=0, since=None, before=None)]
    made = cuts(task, listed, FitConfig(test=0.2))
    held = [(times >= made[name]).mean() for name in ("first_validation", "first_test")]
    assert held == pytest.approx([0.3, 0.2], abs=0.02)
    settings = FitSettings(task=task, loss="", optimizer="", **made)
    samples = samples_of(listed, settings)
    assert sum(samples[:3]) + samples.short == len(times) and samples.earlier == 0
    line = samples_line(samples, settings)
    assert f"{type(task).__name__}: {samples.train:,} {task.samples} to train on, {samples.validation:,} for validation" in line
    why = f"{samples.short} with fewer than 1 earlier events of the user (min_history)" if samples.short else "none"
    if isinstance(task, Impressions):
        log = listed.log
        users, sizes = np.unique(np.stack([log.user, log.time]), axis=1, return_counts=True)
        shown = np.array([(log.time[(log.user == user) & (log.action < 2)] <= at).any() for user, at in users.T])
        eight = int((sizes[shown] > 3).sum())
        assert samples.longer == eight > 0 and shown.sum() == len(times) == users.shape[1] - samples.unknown
        why += f", {samples.unknown} before the first impression of their user, histories alone"
        why += f"; {eight:,} lists have more than `candidates` items: positives are kept"
    assert line.endswith(f"left out: {why}")


def test_a_next_item_is_split_by_its_events(listed):
    made = cuts(NextItem(), listed, FitConfig())
    assert (None, made["first_validation"], made["first_test"]) == time_cuts(listed.log.time)
    settings = FitSettings(loss="", optimizer="", **made)
    assert FitSettings.from_json(settings.to_json()) == settings


@pytest.mark.parametrize(("given", "expected"), [
    (dict(validation=0.2, test=0.2), (None, 40, 50)),
    (dict(validation=0, test=0), (None, 51, 51)),
    (dict(validation=0.0, test=35), (None, 35, 35)),
    (dict(validation=0.2, test=35), (None, 30, 35)),
    (dict(validation=15, test=0.2), (None, 15, 50)),
    (dict(validation=15, test=np.int64(35)), (None, 15, 35)),
    (dict(validation=0.5, test=0, since=20), (20, 40, 51)),
    (dict(validation="1970-01-01T00:00:15", test=np.datetime64(35, "s")), (None, 15, 35)),
    (dict(validation=0.2, test=datetime.datetime.fromisoformat("1970-01-01T01:00:35+01:00")), (None, 30, 35)),
])  # fmt: skip
def test_shares_and_moments_by_hand(given, expected):
    assert time_cuts(np.array([30, 10, 50, 20, 40]), **given) == expected


def test_an_integer_is_in_the_unit_of_the_columns():
    start = int(np.datetime64("2022-05-01", "s").astype(int))
    times = start + DAY * np.arange(10)
    assert time_cuts(times, test=1000 * (start + 5 * DAY), unit="ms")[2] == start + 5 * DAY
    assert time_cuts(times, test="2022-05-06", unit="ms")[2] == start + 5 * DAY


def test_a_run_by_dates_resumes_is_evaluated_and_says_its_samples(data, small, tmp_path, capsys, caplog):
    time = np.sort(data.log.time)
    moments = [str(np.datetime64(int(time[place]), "s")) for place in (200, 800, 1000)]
    since, validation, test = moments
    given = dict(epochs=1, out=tmp_path / "run", batch_size=64, task=NextItem(negatives=3, evaluated=20), requests=60, k=10)
    given |= dict(since=since, validation=validation, test=test)
    run = fit(small, data, **given)
    said = capsys.readouterr().err
    samples = samples_of(data, run.settings)
    assert samples_line(samples, run.settings) in said and f"{samples.earlier:,} before {since} (since)" in said
    assert samples.earlier >= 200 and samples.train < 600
    lacks = "hr@10 and ndcg@10 are of scores before the SVD term and the popularity correction; with them: "
    assert f"{lacks}run.with_svd(data).with_popularity_correction(data).evaluate(data)" in said
    whole = NextItem().positions(data, min_history=1, **run.settings.span("train"))
    assert len(whole) == samples.train and data.log.time[whole].min() >= np.datetime64(since, "s").astype(int)
    assert settings_of(run.folder)["first_test"] == int(time[1000]) and settings_of(run.folder)["since"] == int(time[200])
    again = fit(small, data, progress=False, **given)  # finished: resumes, and trains nothing
    assert again.metrics == run.metrics and Run.load(run.folder).settings == run.settings
    with caplog.at_level("INFO", logger="aif_jax.train.training"):
        fit(small, data, progress=False, **given)
    assert samples_line(samples, run.settings) in caplog.text
    refused(ValueError, r"fit.since: expected .*the run has", fit, small, data, progress=False, **given | {"since": None})
    evaluation = run.evaluate(data, k=10, progress=False)
    assert evaluation.requests == samples.test and "with them: run.with_svd(data)" in str(evaluation)
    assert run.evaluate(data, k=None, progress=False).note == ""


def test_the_note_names_what_is_lacking(listed):
    config = demo.config(schema=listed.schema, **demo.SMALL)
    assert note(config, NextItem(), 5).startswith("hr@5 and ndcg@5 are of scores before the SVD term and the popularity")
    lacks = "before the SVD term; with it: run.with_svd(data).evaluate(data)"
    assert note(config, NextItem(logq_correction=True), 5).endswith(lacks)
    assert note(config, NextItem(), None) == note(config, Impressions(candidates=3, threshold=2), None) == ""
