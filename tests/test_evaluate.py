"""Evaluation by request, against scores and ranks worked out one request at a time; and baselines beside a model."""

import dataclasses
import functools
import importlib

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import metrics, train
from aif_jax.data.candidates import CandidateLists, impressions
from aif_jax.data.events import EventLog
from aif_jax.data.order import BatchKey
from aif_jax.data.split import split_by_time
from aif_jax.train.baselines import baseline_scores, catalogue_ranks
from aif_jax.train.evaluate import list_scores, rank_catalogue, sampled_before
from tests import demo
from tests.refusals import refused

evaluating = importlib.import_module("aif_jax.train.evaluate")  # the package has a function of this name


@pytest.fixture(scope="module")
def params(data, small) -> dict:
    return demo.init(small, items=data.catalogue)


@pytest.fixture(scope="module")
def positions(data) -> np.ndarray:
    return split_by_time(data.log, min_history=5).test


def one_by_one(model, params, data, position: int) -> np.ndarray:
    """Scores [N] of the whole catalogue for one event."""
    user = jax.tree.map(lambda x: x[0], data.user_features([position], length=model.config.history_length))
    return np.asarray(jax.jit(model.joint)(params, user, data.catalogue.items))


def test_figures_are_the_metrics_of_the_joint_scores(data, small, params, positions):
    lists = sampled_before(data, positions)(positions, BatchKey(0, 0, 0))
    few = np.arange(0, len(positions), 9)
    scores = list_scores(small, params, data, positions, lists.rows)
    for i in few:
        np.testing.assert_allclose(scores[i], one_by_one(small, params, data, positions[i])[lists.rows[i]], atol=1e-5)
    got = train.evaluate(small, params, data, positions, k=10, calibration_negatives=4, progress=False)
    users = data.log.user[positions][:, None]
    assert (got.requests, got.users) == (len(positions), len(np.unique(users)))
    assert got.auc == pytest.approx(metrics.auc(scores, lists.labels), abs=1e-6)
    assert got.gauc == pytest.approx(metrics.gauc_by_user(scores, lists.labels, users).mean, abs=1e-6)
    assert got.gauc_mean == pytest.approx(metrics.gauc_by_user(scores, lists.labels, users).values.mean(), abs=1e-6)
    few, expected = scores[:, :5], np.where(lists.labels[:, :5] == 1, 1, -1)
    assert got.log_loss == pytest.approx(np.logaddexp(0, -expected * few).mean(), abs=1e-5)
    rates = metrics.calibration(scores[:, :5], lists.labels[:, :5])
    assert (got.calibration, got.calibration_error) == pytest.approx((rates.ratio, rates.error), abs=1e-5)
    ranks = rank_catalogue(small, params, data, positions)
    assert got.figures() == pytest.approx({name: one.value for name, one in got.intervals().items()})
    assert list(got.intervals()) == list(got.figures())
    gain = np.mean(1 / np.log2(ranks + 2) * (ranks < 10))
    assert got.hit_rate == (ranks < 10).mean() and got.figures()["ndcg@10"] == pytest.approx(gain)
    assert list(got.figures())[-2:] == ["hr@10", "ndcg@10"] and "hr@10 " in str(got)


@pytest.mark.parametrize("repeats", [False, True])
def test_ranks_leave_out_row_0_and_what_the_user_has_met(data, small, params, positions, repeats, monkeypatch):
    data, log, few = dataclasses.replace(data, repeats=repeats), data.log, positions[::11]
    monkeypatch.setattr(evaluating, "REQUESTS", 4)
    ranks = rank_catalogue(small, params, data, few)
    met_again = 0
    for position, rank in zip(few, ranks, strict=True):
        scores = one_by_one(small, params, data, position)
        target, user = log.item[position], log.user[position]
        others = set(range(1, len(scores))) - {int(target)}
        if not repeats:
            met = set(log.item[log.offsets[user] : log.history_end([position])[0]].tolist())
            met_again += target in met
            others -= met
        assert rank == sum(scores[i] >= scores[target] for i in others)
    assert repeats or met_again  # a target that the user has met before stays a candidate


def test_negatives_are_of_the_past(data):
    """An item whose first event is later than the evaluated ones is never drawn."""
    log = data.log
    positions = np.flatnonzero((log.time > np.quantile(log.time, 0.3)) & (log.time < np.quantile(log.time, 0.35)))
    rows = sampled_before(data, positions)(positions, BatchKey(0, 0, 0)).rows[:, 1:]
    earlier = np.unique(log.item[log.time < log.time[positions].min()])
    assert set(np.unique(rows)) <= set(earlier.tolist()) < set(range(len(data.catalogue)))


def test_other_sources_leave_the_catalogue_alone(data, small, params, positions):
    given = dict(k=None, candidates=impressions(data, candidates=1, threshold=2), calibration_negatives=0, progress=False)
    liked = train.evaluate(small, params, data, positions, **given)
    assert liked.hit_rate is None and "hr" not in str(liked)
    assert 0 < liked.gauc < 1 and list(liked.figures()) == [
        "auc", "gauc", "gauc_mean", "log_loss", "calibration", "calibration_error"
    ]  # fmt: skip
    shown = impressions(data, candidates=3, threshold=2)
    some = train.evaluate(small, params, data, positions, k=None, candidates=shown, calibration_negatives=3, progress=False)
    assert 0 < some.auc < 1  # masked places of short lists count nowhere

    def all_positive(at, draw):
        return CandidateLists(np.ones((len(at), 2), np.int32), np.ones((len(at), 2), np.float32))

    nothing = train.evaluate(small, params, data, positions, k=None, candidates=all_positive, progress=False)
    assert np.isnan(nothing.auc) and np.isnan(nothing.gauc) and nothing.log_loss > 0


def test_evaluation_compiles_once_for_all_calls(data, small, params, positions):
    traced = []
    counted = small._replace(
        joint=lambda *given: traced.append("joint") or small.joint(*given),
        item=lambda *given: traced.append("item") or small.item(*given),
        interaction=lambda *given: traced.append("interaction") or small.interaction(*given),
    )
    for few in (positions[:40], positions[:52], positions):
        train.evaluate(counted, params, data, few, progress=False)
    assert sorted(traced) == ["interaction", "item", "joint"]


@pytest.mark.parametrize("preset", ["two_tower", "full_attention"])
def test_evaluation_is_in_bounded_memory(data, positions, preset, monkeypatch):
    """No program scores more pairs than the chunk, whatever the catalogue and the lists; scores stay the same."""
    model = aif.build(aif.presets.PRESETS[preset](data.schema, width=8, short_length=8, long_length=16))
    params, few = demo.init(model, items=data.catalogue), positions[:10]
    rows = np.random.default_rng(0).integers(1, len(data.catalogue), (len(few), 200), dtype=np.int32)
    lists = CandidateLists(rows, (rows % 3 == 0).astype(np.float32))
    pairs: dict[str, set[int]] = {"_scores": set(), "_rank": set()}

    def measured(name: str, function, *given, **options):
        logits = function(*given, **options)
        pairs[name].add(logits.size)
        return logits

    for name in pairs:
        monkeypatch.setattr(evaluating, name, functools.partial(measured, name, getattr(evaluating, name)))

    def scores() -> tuple[np.ndarray, np.ndarray]:
        return list_scores(model, params, data, few, lists.rows), rank_catalogue(model, params, data, few)

    monkeypatch.setattr(evaluating, "REQUESTS", len(few))
    expected, ranks = scores()
    assert pairs == {"_scores": {len(few) * 200}, "_rank": {len(few) * len(data.catalogue)}}
    for chunk, sizes in ((450, {2 * 200}), (150, {200})):
        pairs["_scores"].clear(), pairs["_rank"].clear()
        monkeypatch.setattr(evaluating, "CHUNK", chunk)
        got, again = scores()
        assert pairs == {"_scores": sizes, "_rank": {chunk // len(few) * len(few)}}
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(again, ranks)


def test_wrong_positions_are_refused(data, small, params):
    refused(ValueError, "positions: expected at least one held-out event, got none", train.evaluate, small, params, data, [])
    refused(ValueError, "positions: expected values in", train.evaluate, small, params, data, [len(data.log)])
    empty = dataclasses.replace(data, log=EventLog([1] * 9, [0] * 9, [1] * 9, range(9), users=data.log.users))
    refused(ValueError, "to draw as negatives", train.evaluate, small, params, empty, [3], progress=False)


def test_met_items_are_left_out_where_the_data_say_so(data, small, params, positions):
    assert data.repeats
    once, given = dataclasses.replace(data, repeats=False), dict(k=10, progress=False)
    left_out, usual = (train.evaluate(small, params, one, positions, **given) for one in (once, data))
    assert left_out.figures()["ndcg@10"] > usual.figures()["ndcg@10"] and left_out.gauc != usual.gauc
    other = dataclasses.replace(left_out, inputs=usual.inputs | {"repeats": False})
    refused(ValueError, "evaluation.repeats: expected True, the other has False", usual.against, other)


def test_figures_have_intervals_and_two_models_are_compared_on_the_same_users(data, small, params, positions):
    other = demo.init(small, 1, items=data.catalogue)
    one, two = (train.evaluate(small, p, data, positions, k=10, progress=False) for p in (params, other))
    sure = one.intervals()
    for name, value in one.figures().items():
        assert sure[name].low <= value <= sure[name].high, name
    assert sure["gauc"].low < sure["gauc"].high
    shown = f"gauc {one.gauc:.4f} [{sure['gauc'].low:.3f}, {sure['gauc'].high:.3f}]"
    assert shown in str(one) and f"({len(positions)} requests of" in str(one)
    gap = one.against(two)
    assert list(gap) == list(one.figures())
    assert gap["gauc"].value == pytest.approx(one.gauc - two.gauc) and gap["hr@10"].value == one.hit_rate - two.hit_rate
    assert {name: interval.value for name, interval in one.against(one).items()} == dict.fromkeys(gap, 0.0)
    few = train.NextItem(evaluated=20).source(data, before=2**40, held_out=True)
    for changes in ({"k": 5}, {"candidates": few}, {"calibration_negatives": 3}):
        wrong = train.evaluate(small, params, data, positions, **({"k": 10, "progress": False} | changes))
        message = "Evaluation.against: expected an evaluation of the same requests and candidates"
        refused(ValueError, message, one.against, wrong)
    fewer = train.evaluate(small, params, data, positions[1:], k=10, progress=False)
    refused(ValueError, rf"evaluation.requests.count: expected {len(positions)}, the other has", one.against, fewer)


START = 1_700_000_000
ITEMS = 40


def test_baselines_are_evaluated_beside_the_model(data, small, params, positions):
    scores = baseline_scores(data, before=int(data.log.time[positions].min()))
    got = train.evaluate(small, params, data, positions, k=5, baselines=scores, progress=False)
    figures, lines = got.figures(), str(got).splitlines()
    assert "baseline.latest.gauc" in figures and set(got.intervals()) == set(figures)
    assert len(lines) == 3 and lines[1].startswith(f"baseline popularity: auc {figures['baseline.popularity.auc']:.4f}, gauc ")
    gap = got.gauc - figures["baseline.popularity.gauc"]
    assert f"; the model's gauc {gap:+.4f} [" in lines[1] and "baseline" not in lines[0]
    assert list(got.against(got)) == [name for name in figures if "baseline" not in name]
    rows, labels, _ = sampled_before(data, positions)(positions, BatchKey(0, 0, 0))
    given = scores["popularity"][rows], labels
    assert figures["baseline.popularity.auc"] == pytest.approx(metrics.auc(*given))
    by_user = metrics.gauc_by_user(*given, data.log.user[positions][:, None])
    assert figures["baseline.popularity.gauc"] == pytest.approx(by_user.mean)
    assert figures["baseline.popularity.hr@5"] == (catalogue_ranks(scores["popularity"], data, positions) < 5).mean()


def test_scores_are_of_earlier_events():
    actions = ["shown", "click", "shown", "shown", "click", "click", "click", "gift"]  # the last is unknown, so no show
    events = {"user": [1, 1, 2, 2, 1, 2, 1, 1], "item": [1, 2, 2, 1, 2, 3, 3, 1], "time": [10, 20, 30, 40, 50, 60, 70, 15]}
    columns = aif.Columns(action="what", actions=("shown", "click"), history_actions=("click",))
    catalogue = {"item": [1, 2, 3, 4], "category": [1] * 4}
    data = aif.read(events | {"what": actions}, items=catalogue, columns=columns, unknown="skip", progress=False)
    scores = {name: values[1:].tolist() for name, values in baseline_scores(data, before=60, thresholds={"click": 2}).items()}
    assert scores["popularity"] == [0, 2, 0, 0]  # of histories, which hold clicks
    assert scores["latest"] == [10, 20, -np.inf, -np.inf]
    share = 2 / 5
    assert scores["click_rate"] == pytest.approx([20 * share / 22, (2 + 20 * share) / 23, share, share])


@pytest.mark.parametrize("repeats", [False, True])
def test_ranks_count_ties_and_leave_out_what_the_user_has_met(data, repeats):
    data, log = dataclasses.replace(data, repeats=repeats), data.log
    positions = np.flatnonzero(log.time > np.quantile(log.time, 0.9))[::7]
    scores = np.random.default_rng(0).integers(0, 9, len(data.catalogue)).astype(np.float64)
    for position, rank in zip(positions, catalogue_ranks(scores, data, positions), strict=True):
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
    rows, labels, _ = task.source(data, before=0)(positions, BatchKey(0, 0, 0))
    expected = metrics.gauc_by_user(scores["click_rate"][rows], labels, data.log.user[positions][:, None], where=rows > 0).mean
    assert figures["baseline.click_rate.gauc"] == pytest.approx(expected)
