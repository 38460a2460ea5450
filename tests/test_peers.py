"""Peers: requests are the study's, score files are checked and judged as models are, baselines, tuning, the command."""

import json
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import aif_jax as aif
from aif_jax.blocks.item_offset import popularity_offset
from aif_jax.train.evaluate import catalogue_scores
from experiments.peers import baselines, judge, lists, report, scores, tuning
from experiments.peers.__main__ import main
from experiments.peers.judge import GAUC, HIT_RATE
from experiments.peers.lists import Lists
from experiments.peers.scores import Scores
from experiments.study import datasets, models, question
from tests.test_docs import fences
from tests.test_question import met_once

README = Path(lists.__file__).with_name("README.md")


@pytest.fixture(scope="module")
def slices() -> dict[str, judge.Slice]:
    data = datasets.load("smoke")
    return {name: judge.slice_of(data, name) for name in judge.SLICES}


def small(**changes) -> Lists:
    """Five items, of which 4 and 5 have no training event; three requests of two users, who have met item 1, 2 and nothing."""
    made = {
        "about": {"format": lists.FORMAT, "dataset": "small", "slice": "test", "repeats": False, "power": 0.75},
        "count": np.array([0, 8, 4, 1, 0, 0]),
        "fields": {"category": np.array([0, 1, 1, 2, 2, 2], np.int32)},
        "content": None,
        "events": {
            "user": np.array([1, 1, 2], np.int32),
            "item": np.array([1, 2, 3], np.int32),
            "action": np.ones(3, np.int32),
            "time": np.array([10, 20, 30]),
        },
        "user": np.array([7, 7, 9], np.int32),
        "time": np.array([50, 60, 70]),
        "offsets": np.array([0, 1, 3, 3]),
        "history": {"item": np.array([1, 1, 2], np.int32), "action": np.ones(3, np.int32), "time": np.array([40, 40, 55])},
        "candidates": np.array([[1, 2, 3], [3, 3, 4], [1, 2, 3]], np.int32),
        "whole": np.array([True, False, True]),
    }
    return Lists(**(made | changes))


CANDIDATES = np.array([[9.0, 2.0, 1.0], [2.0, 2.0, 4.0], [1.0, 2.0, 2.5]], np.float32)
CATALOGUE = np.array([[np.nan, 9.0, 2.0, 1.0, 3.0, 2.0], [0.0, 1.0, 2.0, 2.5, 0.0, 7.0]], np.float32)


# requests


@pytest.mark.parametrize("slice_", judge.SLICES)
def test_requests_are_those_of_the_study(slices, slice_):
    """Requests and candidates are those that `question` judges its models on; histories are strictly earlier events."""
    on = slices[slice_]
    made, data, log = judge.lists_of(on), on.data, on.data.dataset.log
    trial = question.Trial(dataset="smoke", model=question.AIF, split=slice_)
    (part,) = question.parts_of(trial, data)
    wanted = question.requests_of(trial, part, data)
    at = wanted.positions
    np.testing.assert_array_equal(made.candidates, np.sort(wanted.rows, axis=1))
    np.testing.assert_array_equal(made.user, log.user[at])
    np.testing.assert_array_equal(at[made.whole], question.catalogue_requests(wanted))
    np.testing.assert_array_equal(made.count, np.bincount(log.item[part.seen], minlength=len(data.dataset.catalogue)))
    for r in range(0, len(at), 7):
        earlier = (log.user == made.user[r]) & (log.time < made.time[r])
        some = slice(made.offsets[r], made.offsets[r + 1])
        np.testing.assert_array_equal(made.history["item"][some], log.item[earlier])
        np.testing.assert_array_equal(made.history["time"][some], log.time[earlier])
    assert made.events["time"].max() < log.time[part.held].min()


def test_requests_round_trip(slices, tmp_path):
    made = judge.lists_of(slices["test"])
    lists.write(tmp_path / "test", made)
    got = lists.read(tmp_path / "test")
    assert got.about == made.about and got.fields.keys() == made.fields.keys()
    for name in ("count", "user", "time", "offsets", "candidates", "whole", "content"):
        np.testing.assert_array_equal(getattr(got, name), getattr(made, name), err_msg=name)
    for group in ("fields", "events", "history"):
        for name, values in getattr(made, group).items():
            np.testing.assert_array_equal(getattr(got, group)[name], values, err_msg=name)


def test_requests_of_another_data_set_are_refused(slices, tmp_path):
    lists.write(tmp_path, small())
    with pytest.raises(ValueError, match=r"expected lists of \('smoke', 'test'\), got \('small', 'test'\); remove the folder"):
        judge.once(tmp_path, slices["test"])
    (tmp_path / "about.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match="expected format 2, got 1; remove the folder"):
        lists.read(tmp_path)


def test_recent_items_come_first():
    assert small().recent(3).tolist() == [[1, 0, 0], [2, 1, 0], [0, 0, 0]]


# score files


def test_score_files_round_trip(tmp_path):
    one = small()
    every = np.stack([CATALOGUE[0], CATALOGUE[0] - 1, CATALOGUE[1]])
    scores.write(tmp_path, "one", one, lambda places: every[places], {"logits": True, "seed": 4})
    got = scores.read(tmp_path, "one", one)
    np.testing.assert_array_equal(got.catalogue, CATALOGUE)
    assert got.candidates.tolist() == [[9, 2, 1], [0, 0, 2], [1, 2, 2.5]] and got.logits and got.about["seed"] == 4
    scores.write_candidates(tmp_path, "two", CANDIDATES)
    got = scores.read(tmp_path, "two", one)
    assert got.catalogue is None and not got.logits and scores.names(tmp_path) == ["one", "two"]
    backwards = pa.table({"request": [2, 1, 0], "scores": pa.array(CANDIDATES[::-1].tolist(), pa.list_(pa.float64()))})
    pq.write_table(backwards, tmp_path / "three.candidates.parquet")  # as another tool would write it
    np.testing.assert_array_equal(scores.read(tmp_path, "three", one).candidates, CANDIDATES)


@pytest.mark.parametrize(("kind", "columns", "message"), [
    ("candidates", {"request": [0, 1], "scores": [[1.0] * 3] * 2}, "expected each of 3 requests once, .* got 2 rows"),
    ("candidates", {"request": [0, 1, 1], "scores": [[1.0] * 3] * 3}, "expected each of 3 requests once, .* of 2 requests"),
    ("catalogue", {"request": [0, 1], "scores": [[1.0] * 6] * 2}, "expected each of 2 requests once, .* of which 1 are"),
    ("catalogue", {"request": [0, 2], "scores": [[1.0] * 5] * 2}, r"expected 6 scores a request, got \[5\]"),
    ("candidates", {"request": [0.0, 1.0, 2.0], "scores": [[1.0] * 3] * 3}, "expected integers in column 'request'"),
    ("catalogue", {"request": [0, 2], "scores": [[1.0] * 5 + [float("nan")]] * 2}, "expected no NaN among .*, got 2"),
    ("candidates", {"request": [0, 1, 2], "score": [1.0] * 3}, r"expected the columns \['request', 'scores'\]"),
])  # fmt: skip
def test_wrong_score_files_are_refused(tmp_path, kind, columns, message):
    scores.write_candidates(tmp_path, "one", CANDIDATES)
    pq.write_table(pa.table(columns), tmp_path / f"one.{kind}.parquet")
    with pytest.raises(ValueError, match=message) as error:
        scores.read(tmp_path, "one", small())
    assert f"one.{kind}.parquet" in str(error.value)


def test_other_mistakes_with_score_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"one.candidates.parquet: expected the scores of 'one', got no such file"):
        scores.read(tmp_path, "one", small())
    scores.write_candidates(tmp_path, "one", CANDIDATES, {"logits": "yes"})
    with pytest.raises(ValueError, match="expected logits to be true or false, got 'yes'"):
        scores.read(tmp_path, "one", small())


# judged


@pytest.mark.parametrize("name", ["smoke", "met once"])
def test_score_files_are_judged_like_models(slices, tmp_path, name, monkeypatch):
    """A model's scores in a peer's files get what `question.evaluate` gives the model, where met items stay and where not."""
    monkeypatch.setitem(question.REQUESTS, "test", 64)
    data = slices["test"].data if name == "smoke" else met_once(slices["test"].data, name)
    on = judge.slice_of(data, "test")
    config = aif.Config(schema=data.dataset.schema, blocks=(models.DOT,), **models.SMOKE | dict(head=aif.heads.LogitSum()))
    built = aif.build(config)
    params = built.init(jax.random.key(0), data.dataset.catalogue)
    trial = question.Trial(dataset=name, model=question.BASE, split="test")
    wanted = question.evaluate(trial, on.part, built, params, data, progress=False)
    one = judge.lists_of(on)
    every = np.zeros((len(one.user), len(one.count)), np.float32)
    given = dict(repeats=True, batch_size=8, progress=False)  # a peer scores what was met too: the judge leaves it out
    for rows, found in catalogue_scores(built, params, data.dataset, on.requests.positions, **given):
        every[rows] = np.where(np.isinf(found), 0, found)
    scores.write(tmp_path, "ours", one, lambda places: every[places], {"logits": True})
    got = judge.judged(scores.read(tmp_path, "ours", one), on, {GAUC: 0.0, HIT_RATE: 0.75})
    assert got.keys() == wanted.keys() and data.repeats == (name == "smoke")
    for metric, one_metric in wanted.items():
        np.testing.assert_array_equal(got[metric].users, one_metric.users, err_msg=metric)
        np.testing.assert_allclose(got[metric].values, one_metric.values, atol=2e-3, err_msg=metric)


def by_hand(on: judge.Slice, value: np.ndarray, **about) -> Scores:
    """Scores of every request that are those of the items [N]."""
    rows = np.sort(on.requests.rows, axis=1)
    catalogue = np.broadcast_to(value, (len(on.at), len(value)))
    return Scores(name="one", candidates=value[rows], catalogue=catalogue, about=about)


def test_popularity_is_added_to_logarithms_and_multiplies_other_scores(slices):
    """log s of a peer with `logits` and s of one without are judged alike, and a power brings the order back."""
    on = slices["validation"]
    rng = np.random.default_rng(0)
    value = rng.uniform(0.5, 2, len(on.counts)).astype(np.float32)
    wanted = judge.judged(by_hand(on, value), on, {})
    off = (value * np.maximum(on.counts, 0.5) ** -0.5).astype(np.float32)
    powers = {GAUC: 0.5, HIT_RATE: 0.5}
    for found in (by_hand(on, off), by_hand(on, np.log(off), logits=True)):
        got = judge.judged(found, on, powers)
        assert got[GAUC].mean == pytest.approx(wanted[GAUC].mean) and got[HIT_RATE].mean == wanted[HIT_RATE].mean
    offset = popularity_offset(on.counts, power=0.5)  # that of a model's correction
    added = judge.judged(by_hand(on, np.log(off) + offset, logits=True), on, {})
    assert added[HIT_RATE].mean == wanted[HIT_RATE].mean


def test_the_best_power_is_the_one_with_the_best_figure(slices):
    on = slices["validation"]
    noise = np.random.default_rng(1).normal(size=len(on.counts)).astype(np.float32)
    found = by_hand(on, noise, logits=True)
    best, figures = judge.best_powers(found, on)
    for name in judge.JUDGED:
        tried = {power: judge.judged(found, on, {name: power})[name].mean for power in judge.POWERS}
        assert tried[best[name]] == max(tried.values()) > min(tried.values())
        assert figures[name] == pytest.approx(tried[best[name]], abs=1e-12)
    alone = Scores(name="one", candidates=found.candidates)
    assert judge.best_powers(alone, on)[0].keys() == {GAUC} and HIT_RATE not in judge.judged(alone, on, {})


# baselines


@pytest.fixture(scope="module")
def exported(slices) -> Lists:
    one = judge.lists_of(slices["test"])
    return Lists(**{**vars(one), "about": one.about | {"repeats": False}})


def scored(one: Lists, scorer: scores.Scorer) -> np.ndarray:
    """float [R, N], some requests at a time."""
    return np.concatenate([scorer(places) for places in np.array_split(np.arange(len(one.user)), 3)])


def dense(one: Lists, last: int) -> tuple[np.ndarray, np.ndarray]:
    """The binary matrices of users and of requests, one event at a time."""
    x = np.zeros((one.events["user"].max() + 1, len(one.count)))
    for user, item in zip(one.events["user"], one.events["item"], strict=True):
        x[user, item] = item > 0
    h = np.zeros((len(one.user), len(one.count)))
    for r in range(len(h)):
        h[r, one.history["item"][one.offsets[r] : one.offsets[r + 1]][-last:]] = 1
    h[:, 0] = 0
    return x, h


def test_ease_is_the_closed_form(exported):
    x, h = dense(exported, 20)
    p = np.linalg.inv(x.T @ x + 30 * np.eye(x.shape[1]))
    b = -p / np.diag(p)[None, :]
    np.fill_diagonal(b, 0)
    given = dict(regularization=30.0, last=20)
    np.testing.assert_allclose(scored(exported, baselines.ease(exported, **given)), h @ b, atol=1e-5)
    again = Lists(**{**vars(exported), "about": exported.about | {"repeats": True}})  # met items have 1 added
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
    for r, (first, end) in enumerate(zip(exported.offsets[:-1], exported.offsets[1:], strict=True)):
        last = exported.history["item"][max(first, end - 3) : end][::-1]
        expected[r] = (1.0 + np.arange(len(last))) ** -0.5 @ vectors[last] @ vectors.T
    scale = (got * expected).sum() / (expected**2).sum()
    assert scale > 0
    np.testing.assert_allclose(got, scale * expected, atol=2e-3 * np.abs(got).max())


def test_recent_popularity():
    one = small(events=small().events | {"time": np.array([0, 5 * baselines.DAY, 6 * baselines.DAY])})
    got = baselines.recent_popularity(one, days=2.0)(np.arange(2))[1]
    assert np.argsort(-got)[:3].tolist() == [2, 3, 1] and got[2] == pytest.approx(1 + 4 / 9) and got[4] == 0


def test_als_scores_by_the_last_events(exported):
    """What was met lately scores high, what has no event 0; the same seed gives the same scores."""
    pytest.importorskip("implicit", reason="needs the extra 'peers'")
    got = scored(exported, baselines.als(exported, factors=8, regularization=0.1, last=20))
    assert got.shape == (len(exported.user), len(exported.count)) and np.isfinite(got).all()
    _, h = dense(exported, 20)
    met, others = got[h > 0].mean(), got[(h == 0) & (exported.count[None] > 0)].mean()
    assert met > others + 0.1 and np.abs(got[:, exported.count == 0]).max(initial=0) < 1e-6
    np.testing.assert_array_equal(got, scored(exported, baselines.als(exported, factors=8, regularization=0.1, last=20)))


# tuning, the command


def test_the_best_trial_is_chosen_and_kept(slices, tmp_path):
    """The trial with the right order wins, an interrupted tuning goes on, and a score file that is there stays."""
    made = {name: judge.lists_of(on) for name, on in slices.items()}
    workplace = tuning.Workplace(folder=tmp_path, lists=made, slices=slices)
    written = []

    def write(slice_, settings, name):
        written.append((slice_, dict(settings)))
        target = slices[slice_].data.dataset.log.item[slices[slice_].requests.positions]
        right = (np.arange(len(made[slice_].count)) == target[:, None]).astype(np.float32)
        value = right if settings["good"] else -right
        scores.write(workplace.scores(slice_), name, made[slice_], lambda places: value[places], {"settings": settings})

    trials = ({"good": 0}, {"good": 1}, {"good": 2})
    tuning.tuned("one", workplace, trials[:2], write)
    assert written == [*(("validation", each) for each in trials[:2]), ("test", {"good": 1})]
    about = workplace.read("one").about
    assert about["chosen"] == {"good": 1} and [t["settings"] for t in about["trials"]] == [*trials[:2]]
    assert about["trials"][1]["figures"] == {GAUC: 1, HIT_RATE: 1} and about["trials"][0]["figures"][GAUC] == 0
    tuning.tuned("one", workplace, trials, write)
    assert len(written) == 3
    for path in workplace.scores("test").iterdir():
        path.unlink()
    tuning.tuned("one", workplace, trials, write)  # the trials that were done are not done again
    assert written[3:] == [("validation", {"good": 2}), ("test", {"good": 1})]


def test_smoke(tmp_path, capsys, monkeypatch):
    """The command on a synthetic world; foreign score files in its folder are judged too, that of the README among them."""
    monkeypatch.chdir(tmp_path)
    work, json_ = tmp_path / "out" / "peers", tmp_path / "one.json"
    names = ["ease", "item-knn"]
    command = ["--smoke", "--baselines", *names, "--json", str(json_)]
    main(command)
    folder = work / "smoke" / "test"
    one = lists.read(folder)
    on = judge.slice_of(datasets.load("smoke"), "test")
    truth = one.candidates == on.data.dataset.log.item[on.requests.positions][:, None]
    scores.write_candidates(folder / "scores", "truth", truth.astype(np.float32))
    (block,) = fences(README, "python")
    exec(compile(block, str(README), "exec"), {})
    for model, epochs in ((question.AIF, question.EPOCHS), (question.BASE, question.EPOCHS)):
        trial = question.Trial(dataset="smoke", model=model, split="test", epochs=epochs)
        ease = judge.judged(scores.read(folder / "scores", "ease", one), on, {})
        question.keep(tmp_path / "ours", trial, ease, met_items=0.0)
    main([*command, "--page", str(tmp_path), "--ours", str(tmp_path / "ours")])
    found = {record["model"]: record for record in json.loads(json_.read_text())["models"].values()}
    assert found.keys() == {*names, "truth", "popular-and-seen"}
    assert found["truth"]["figures"][GAUC] == 1 and HIT_RATE not in found["truth"]["figures"]
    assert found["ease"]["about"]["chosen"] in [trial["settings"] for trial in found["ease"]["about"]["trials"]]
    page = (tmp_path / report.PAGE).read_text()
    assert "| truth | 1.000 [1.000, 1.000] | -" in page and "| two-tower | " in page and page in capsys.readouterr().out
    main(["--report-only", "--results", str(work / "results"), "--ours", str(tmp_path / "ours")])
    assert page in capsys.readouterr().out


def test_the_page_is_that_of_the_records():
    page = README.parents[1] / "notes" / report.PAGE
    heading, title, tables = page.read_text(encoding="utf-8").partition("## ")
    assert heading.startswith("# ") and title + tables == report.markdown(report.RESULTS, question.RESULTS)
