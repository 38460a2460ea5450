"""Baselines beside a model: scores by hand, ranks by brute force, and data where popularity is all."""

import numpy as np
import pytest

import aif_jax as aif
from aif_jax import metrics, train
from aif_jax.data.candidates import SampleKey
from aif_jax.data.split import split_by_time
from aif_jax.train.baselines import baseline_scores, catalogue_ranks

START = 1_700_000_000
ITEMS = 40
TASK = train.NextItem(negatives=4, evaluated=20, power=0.0)  # candidates are drawn from all items alike


@pytest.fixture(scope="module")
def popular() -> aif.Dataset:
    """Every event draws its item from one distribution, whoever the user is."""
    rng = np.random.default_rng(0)
    chance = 0.9 ** np.arange(ITEMS)
    items = rng.choice(np.arange(1, ITEMS + 1), 3000, p=chance / chance.sum())
    events = {"user": rng.integers(1, 41, 3000), "item": items, "time": START + 60 * np.arange(3000)}
    catalogue = {"item": np.arange(1, ITEMS + 1), "category": np.ones(ITEMS, np.int64)}
    return aif.read(events, items=catalogue, columns=aif.Columns(), progress=False)


def test_where_popularity_is_all_it_is_as_good_as_a_model(popular):
    model = aif.build(aif.presets.two_tower(popular.schema, width=4, sequence=False, short_length=8))
    config = aif.FitConfig(epochs=2, batch_size=64, k=None, learning_rate=0.02)
    run = aif.fit(model, popular, config, task=TASK, progress=False)
    positions = split_by_time(popular.log, min_history=1).test
    before = int(popular.log.time[positions].min())
    source, scores = TASK.source(popular, before=before, held_out=True), baseline_scores(popular, before=before)
    given = dict(k=5, candidates=source, baselines=scores, progress=False)
    got = train.evaluate(run.model, run.params, popular, positions, **given)
    figures = got.figures()
    assert figures["baseline.popularity.gauc"] > max(0.7, got.gauc - 0.02)
    assert figures["baseline.popularity.hr@5"] > got.hit_rate - 0.05
    assert abs(figures["baseline.latest.gauc"] - 0.5) < abs(figures["baseline.popularity.gauc"] - 0.5)
    assert set(got.intervals()) == set(figures)
    lines = str(got).splitlines()
    assert len(lines) == 3 and lines[1].startswith(f"baseline popularity: auc {figures['baseline.popularity.auc']:.4f}, gauc ")
    gap = got.gauc - figures["baseline.popularity.gauc"]
    assert f"; the model's gauc {gap:+.4f} [" in lines[1] and "baseline" not in lines[0]
    assert list(got.against(got)) == [name for name in figures if "baseline" not in name]
    rows, labels, _ = source(positions, SampleKey(0, 0, 0))
    given = scores["popularity"][rows], labels
    assert figures["baseline.popularity.auc"] == pytest.approx(metrics.auc(*given))
    by_user = metrics.gauc(*given, popular.log.user[positions][:, None])
    assert figures["baseline.popularity.gauc"] == pytest.approx(by_user.value)


def test_scores_are_of_earlier_events():
    actions = ["shown", "click", "shown", "shown", "click", "click", "click"]
    events = {"user": [1, 1, 2, 2, 1, 2, 1], "item": [1, 2, 2, 1, 2, 3, 3], "time": [10, 20, 30, 40, 50, 60, 70]}
    columns = aif.Columns(action="what", actions=("shown", "click"), history_actions=("click",))
    catalogue = {"item": [1, 2, 3, 4], "category": [1] * 4}
    data = aif.read(events | {"what": actions}, items=catalogue, columns=columns, progress=False)
    scores = {name: values[1:].tolist() for name, values in baseline_scores(data, before=60, thresholds={"click": 2}).items()}
    assert scores["popularity"] == [0, 2, 0, 0]  # of histories, which hold clicks
    assert scores["latest"] == [10, 20, -np.inf, -np.inf]
    share = 2 / 5
    assert scores["click_rate"] == pytest.approx([20 * share / 22, (2 + 20 * share) / 23, share, share])


@pytest.mark.parametrize("repeats", [False, True])
def test_ranks_count_ties_and_leave_out_what_the_user_has_met(popular, repeats):
    log = popular.log
    positions = np.flatnonzero(log.time > np.quantile(log.time, 0.9))[::7]
    scores = np.random.default_rng(0).integers(0, 9, len(popular.catalogue)).astype(np.float64)
    for position, rank in zip(positions, catalogue_ranks(scores, popular, positions, repeats=repeats), strict=True):
        target, user = log.item[position], log.user[position]
        others = set(range(1, len(scores))) - {int(target)}
        if not repeats:
            others -= set(log.item[log.offsets[user] : log.history_end([position])[0]].tolist())
        assert rank == sum(scores[row] >= scores[target] for row in others)


def test_a_run_is_evaluated_beside_baselines_of_before_the_slice():
    """Impressions whose clicks follow a rate of each item: the click rate so far orders them, popularity by shows does not."""
    rng = np.random.default_rng(2)
    rate, shows = rng.permutation(np.linspace(0.05, 0.9, ITEMS)), rng.permutation(np.linspace(0.2, 1.8, ITEMS) / ITEMS)
    lists = np.stack([rng.choice(ITEMS, 6, replace=False, p=shows / shows.sum()) for _ in range(500)])
    events = {
        "user": np.repeat(np.arange(500) % 25, 6), "item": 1 + lists.ravel(), "time": START + 60 * np.repeat(np.arange(500), 6),
        "what": np.where(rng.random(3000) < rate[lists.ravel()], "click", "shown"),
    }  # fmt: skip
    items = {"item": np.arange(1, ITEMS + 1), "category": np.ones(ITEMS, np.int64)}
    columns = aif.Columns(action="what", actions=("shown", "click"), history_actions=("click",))
    data = aif.read(events, items=items, columns=columns, progress=False)
    model = aif.build(aif.presets.two_tower(data.schema, width=4, sequence=False, short_length=8))
    task = train.Impressions(candidates=6, threshold=2)
    run = aif.fit(model, data, aif.FitConfig(epochs=1, batch_size=64), task=task, progress=False)
    got = run.evaluate(data, progress=False)
    figures = got.figures()
    assert figures["baseline.click_rate.gauc"] > 0.7 > figures["baseline.latest.gauc"]
    assert not any("baseline" in name for name in run.metrics) and len(str(got).splitlines()) == 4
    scores = train.baseline_scores(data, before=run.settings.first_test, thresholds={"click": 2})
    positions = task.positions(data, min_history=1, since=run.settings.first_test, before=None)
    rows, labels, _ = task.source(data, before=0)(positions, SampleKey(0, 0, 0))
    expected = metrics.gauc(scores["click_rate"][rows], labels, data.log.user[positions][:, None], where=rows > 0).value
    assert figures["baseline.click_rate.gauc"] == pytest.approx(expected)
