"""Peers: requests are the study's, scores are judged as models are, baselines, tuning, the command."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax.train.evaluate import catalogue_scores
from experiments.peers import baselines, judge, report
from experiments.peers.__main__ import main, tuned
from experiments.peers.judge import GAUC, HIT_RATE, Lists, Scores
from experiments.study import datasets, models, question, records
from tests.test_docs import fences
from tests.test_question import met_once

pytestmark = pytest.mark.lane("experiments")
README = Path(judge.__file__).with_name("README.md")


@pytest.fixture(scope="module")
def slices() -> dict[str, judge.Slice]:
    return {name: judge.slice_of(datasets.load("smoke"), name) for name in judge.SLICES}


@pytest.mark.parametrize("slice_", judge.SLICES)
def test_requests_are_those_of_the_study(slices, slice_):
    """Requests and candidates are those that `question` judges its models on; histories are strictly earlier events."""
    on = slices[slice_]
    made, data, log = judge.lists_of(on), on.data, on.data.dataset.log
    trial = question.Trial(dataset="smoke", model=question.AIF, split=slice_)
    (part,) = question.parts_of(trial, data)
    at = question.requests_of(trial, part, data).positions
    np.testing.assert_array_equal(on.requests.positions, at)
    np.testing.assert_array_equal(made.count, np.bincount(log.item[part.seen], minlength=len(data.dataset.catalogue)))
    for r in range(0, len(at), 7):
        earlier = (log.user == log.user[at[r]]) & (log.time < log.time[at[r]])
        np.testing.assert_array_equal(made.item[made.start[r] : made.end[r]], log.item[earlier])
    assert made.events["time"].max() < log.time[part.held].min()


@pytest.mark.parametrize("name", ["smoke", "met once"])
def test_scores_are_judged_like_models(slices, name, monkeypatch):
    """A model's scores as a peer get what `question.evaluate` gives the model, where met items stay and where not."""
    monkeypatch.setitem(question.REQUESTS, "test", 64)
    data = slices["test"].data if name == "smoke" else met_once(slices["test"].data, name)
    on = judge.slice_of(data, "test")
    config = aif.Config(schema=data.dataset.schema, blocks=(models.DOT,), **models.SMOKE | dict(head=aif.heads.LogitSum()))
    built = aif.build(config)
    params = built.init(jax.random.key(0), data.dataset.catalogue)
    wanted = question.evaluate(question.Trial(dataset=name, model=question.BASE, split="test"), on.part, built, params, data)
    every = np.zeros((len(on.requests.positions), len(on.counts)), np.float32)
    whole = dataclasses.replace(data.dataset, repeats=True)  # a peer scores what was met too: the judge leaves it out
    for rows, found in catalogue_scores(built, params, whole, on.requests.positions):
        every[rows] = np.where(np.isinf(found), 0, np.exp(found))
    got = judge.judged(judge.scored(lambda places: every[places], on), on, {GAUC: 0.0, HIT_RATE: 0.75})
    assert got.keys() == wanted.keys() and data.repeats == (name == "smoke")
    for metric in (one for one in wanted if "@" not in one or "@-100" in one):  # others place items without a training event
        np.testing.assert_array_equal(got[metric].users, wanted[metric].users, err_msg=metric)
        np.testing.assert_allclose(got[metric].values, wanted[metric].values, atol=2e-3, err_msg=metric)


def by_hand(on: judge.Slice, value: np.ndarray) -> Scores:
    """Scores of every request that are those of the items [N]."""
    return judge.scored(lambda places: np.broadcast_to(value, (len(places), len(value))), on)


def test_the_best_power_is_the_one_with_the_best_figure(slices):
    on = slices["validation"]
    found = by_hand(on, np.exp(np.random.default_rng(1).normal(size=len(on.counts))))
    best, figures = judge.best_powers(found, on)
    for name in judge.JUDGED:
        tried = {power: judge.judged(found, on, {name: power})[name].mean for power in judge.POWERS}
        assert tried[best[name]] == max(tried.values()) > min(tried.values())
        assert figures[name] == pytest.approx(tried[best[name]], abs=1e-12)


@pytest.fixture(scope="module")
def exported(slices) -> Lists:
    return judge.lists_of(slices["test"])._replace(repeats=False)


def scored(one: Lists, scorer: judge.Scorer) -> np.ndarray:
    """float [R, N], some requests at a time."""
    return np.concatenate([scorer(places) for places in np.array_split(np.arange(len(one.start)), 3)])


def dense(one: Lists, last: int) -> tuple[np.ndarray, np.ndarray]:
    """The binary matrices of users and of requests, one event at a time."""
    x = np.zeros((one.events["user"].max() + 1, len(one.count)))
    for user, item in zip(one.events["user"], one.events["item"], strict=True):
        x[user, item] = item > 0
    h = np.zeros((len(one.start), len(one.count)))
    for r in range(len(h)):
        h[r, one.item[one.start[r] : one.end[r]][-last:]] = 1
    h[:, 0] = 0
    return x, h


def test_ease_is_the_closed_form(exported):
    x, h = dense(exported, 20)
    p = np.linalg.inv(x.T @ x + 30 * np.eye(x.shape[1]))
    b = -p / np.diag(p)[None, :]
    np.fill_diagonal(b, 0)
    given = dict(regularization=30.0, last=20)
    np.testing.assert_allclose(scored(exported, baselines.ease(exported, **given)), h @ b, atol=1e-5)
    again = exported._replace(repeats=True)  # met items have 1 added
    np.testing.assert_allclose(scored(exported, baselines.ease(again, **given)), h @ b + h, atol=1e-5)


@pytest.mark.parametrize("neighbours", [1000, 5])
def test_item_knn_is_a_sum_of_similarities(exported, neighbours):
    x, h = dense(exported, 50)
    norm = np.sqrt(x.sum(0))
    similar = (x.T @ x) / np.maximum(norm[:, None] * norm, 1e-9)
    np.fill_diagonal(similar, 0)
    least = -np.sort(-similar, axis=1)[:, min(neighbours, len(similar)) - 1, None]
    got = scored(exported, baselines.item_knn(exported, neighbours=neighbours, last=50))
    assert np.all(got >= h @ (similar * (similar > least + 1e-9)) - 1e-4)
    assert np.all(got <= h @ (similar * (similar >= least - 1e-9)) + 1e-4)  # of tied neighbours some are left out


def test_pure_svd_scores_by_the_factors_of_what_was_met(exported):
    got = scored(exported, baselines.pure_svd(exported, width=4, decay=0.5, last=3))
    x, _ = dense(exported, 3)
    vectors = np.linalg.svd(x, full_matrices=False)[2][:4].T
    expected = np.zeros_like(got)
    for r, (first, end) in enumerate(zip(exported.start, exported.end, strict=True)):
        last = exported.item[max(first, end - 3) : end][::-1]
        expected[r] = (1.0 + np.arange(len(last))) ** -0.5 @ vectors[last] @ vectors.T
    scale = (got * expected).sum() / (expected**2).sum()
    assert scale > 0
    np.testing.assert_allclose(got, scale * expected, atol=2e-3 * np.abs(got).max())


def test_recent_popularity_and_recent_items_first():
    """Five items, two without a training event; three requests of two users, who have met item 1, 2 and nothing."""
    time = np.array([0, 5, 6]) * baselines.DAY
    events = {"user": np.array([1, 1, 2]), "item": np.array([1, 2, 3]), "action": np.ones(3, int), "time": time}
    count, item, start, end = map(np.array, ([0, 8, 4, 1, 0, 0], [1, 2, 5], [0, 0, 2], [1, 2, 2]))
    one = Lists(repeats=False, count=count, events=events, item=item, start=start, end=end)
    got = baselines.recent_popularity(one, days=2.0)(np.arange(2))[1]
    assert np.argsort(-got)[:3].tolist() == [2, 3, 1] and got[2] == pytest.approx(1 + 4 / 9) and got[4] == 0
    assert one.recent(3).tolist() == [[1, 0, 0], [2, 1, 0], [0, 0, 0]]


def test_the_best_trial_is_chosen(slices, monkeypatch):
    """The trial with the right order wins on the validation slice, and scores the test slice."""
    tried = []

    def function(one: Lists, good: int) -> judge.Scorer:
        (slice_,) = (name for name, on in slices.items() if on.counts is one.count)
        tried.append((slice_, good))
        target = slices[slice_].data.dataset.log.item[slices[slice_].requests.positions]
        right = (np.arange(len(one.count)) == target[:, None]).astype(np.float32)
        return lambda places: (right if good else -right)[places]

    monkeypatch.setitem(baselines.BASELINES, "one", (function, ({"good": 0}, {"good": 1})))
    scores, about = tuned("one", slices)
    assert tried == [("validation", 0), ("validation", 1), ("test", 1)] and about["chosen"] == {"good": 1}
    assert about["trials"][1]["figures"] == {GAUC: 1, HIT_RATE: 1} and about["trials"][0]["figures"][GAUC] == 0
    assert judge.judged(scores, slices["test"], about["powers"])[GAUC].mean == 1


def test_smoke(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["ease", "item-knn"]
    command = ["--smoke", "--baselines", *names, "--json", "one.json", "--ours", "ours"]
    main(command)
    (block,) = fences(README, "python")
    exec(compile(block, str(README), "exec"), {})
    assert "{'gauc_trained': 0." in capsys.readouterr().out
    found = {record["model"]: record for record in json.loads(Path("one.json").read_text())["models"].values()}
    assert found.keys() == {*names}
    about = found["ease"]["about"]
    assert about["chosen"] in [trial["settings"] for trial in about["trials"]]
    for model in (question.AIF, question.BASE):
        trial = question.Trial(dataset="smoke", model=model, split="test", epochs=question.EPOCHS)
        ease = {name: records.by_user(Path("out/peers"), found["ease"], name) for name in found["ease"]["figures"]}
        question.keep(Path("ours"), trial, ease, met_items=0.0)
    main([*command, "--page", "."])
    told, page = capsys.readouterr().out, Path(report.PAGE).read_text()
    assert "item-knn, {" not in told and "| ease | 0." in page and "| two-tower | " in page and page in told


def test_the_page_is_that_of_the_records():
    heading, title, tables = (README.parents[1] / "notes" / report.PAGE).read_text(encoding="utf-8").partition("## ")
    assert heading.startswith("# ") and title + tables == report.page(report.RESULTS, question.RESULTS)
