"""Peers: lists are the study's, score files are checked, figures by hand, baselines against their formulas, the command."""

import json
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import aif_jax as aif
from aif_jax import checkpoint, metrics
from aif_jax.data.candidates import NegativeSampler, item_counts
from aif_jax.train.evaluate import rank_catalogue
from experiments.peers import baselines, export, figures, lists, ours, outcomes, report, scores, tuning
from experiments.peers.__main__ import main
from experiments.peers.feeds import batches
from experiments.peers.lists import Lists
from experiments.peers.outcomes import MISSED
from experiments.peers.scores import Scores
from experiments.study import datasets, evaluation, models, records
from tests.test_docs import fences

README = Path(lists.__file__).with_name("README.md")

pytestmark = pytest.mark.usefixtures("light_compilation")


@pytest.fixture(scope="module")
def data() -> datasets.StudyData:
    return datasets.load("smoke")


def small(**changes) -> Lists:
    """Five items, of which 4 and 5 have no training event; three requests of two users, who have met item 1, 2 and nothing."""
    made = {
        "about": {"format": 1, "dataset": "small", "slice": "test", "repeats": False, "power": 0.75, "untrained_share": 1 / 3},
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
        "position": np.array([3, 4, 5]),
        "offsets": np.array([0, 1, 3, 3]),
        "history": {
            "item": np.array([1, 1, 2], np.int32),
            "action": np.ones(3, np.int32),
            "time": np.array([40, 40, 55]),
        },
        "target": np.array([2, 4, 3], np.int32),
        "negatives": np.array([[1, 3], [3, 3], [1, 2]], np.int32),
        "mixed_negatives": np.array([[4, 3], [5, 3], [1, 5]], np.int32),
    }
    return Lists(**(made | changes))


SCORES = np.array(
    [
        # item: 0     1     2    3    4     5
        [99.0, 9.0, 2.0, 1.0, 3.0, 2.0],
        [99.0, 9.0, 9.0, 2.0, 4.0, 5.0],
        [99.0, 1.0, 2.0, 2.0, 0.0, 7.0],
    ],
    np.float32,
)


EVENTS = {
    "user": np.array([1, 1, 1, 1, 2, 2], np.int32),
    "item": np.array([4, 5, 6, 7, 8, 9], np.int32),
    "time": np.array([10, 20, 20, 30, 10, 40]),
}


def model(values=SCORES, **about) -> Scores:
    return Scores(name="one", catalogue=values, about=about)


# lists


@pytest.mark.parametrize("slice_", export.SLICES)
def test_lists_are_those_of_the_study(data, slice_):
    """Requests and candidates are those of `evaluation`; histories are strictly earlier events."""
    made = export.lists_of(data, slice_, requests=64)
    dataset, split = data.dataset, data.split
    test = slice_ == "test"
    trained = np.sort(np.concatenate([split.train, split.validation])) if test else split.train
    held = split.test if test else split.validation
    wanted = evaluation.held_out(dataset, held, NegativeSampler(item_counts(dataset, trained)), requests=64)
    np.testing.assert_array_equal(made.position, wanted.positions)
    np.testing.assert_array_equal(np.concatenate([made.target[:, None], made.negatives], 1), wanted.rows)
    log = dataset.log
    for r in range(0, len(made.position), 7):
        earlier = (log.user == made.user[r]) & (log.time < made.time[r])
        part = slice(made.offsets[r], made.offsets[r + 1])
        np.testing.assert_array_equal(made.history["item"][part], log.item[earlier])
        np.testing.assert_array_equal(made.history["time"][part], log.time[earlier])
    np.testing.assert_array_equal(made.count, np.bincount(log.item[trained], minlength=len(dataset.catalogue)))
    assert made.events["time"].max() < log.time[held].min()


def test_lists_round_trip(data, tmp_path):
    made = export.lists_of(data, "test", requests=20)
    lists.write(tmp_path / "test", made)
    got = lists.read(tmp_path / "test")
    assert got.about == made.about and got.fields.keys() == made.fields.keys()
    for name in ("count", "user", "time", "position", "offsets", "target", "negatives", "mixed_negatives", "content"):
        np.testing.assert_array_equal(getattr(got, name), getattr(made, name), err_msg=name)
    for group in ("fields", "events", "history"):
        for name, values in getattr(made, group).items():
            np.testing.assert_array_equal(getattr(got, group)[name], values, err_msg=name)
    candidates = pq.read_table(tmp_path / "test" / "candidates.parquet").column("items").to_pylist()
    assert candidates == [row.tolist() for row in made.candidates]
    assert "target" not in pq.read_table(tmp_path / "test" / "requests.parquet").column_names


def test_lists_of_another_data_set_are_refused(data, tmp_path):
    lists.write(tmp_path, small())
    with pytest.raises(ValueError, match=r"expected lists of \('smoke', 'test'\), got \('small', 'test'\)"):
        export.once(tmp_path, "smoke", "test", lambda: data, requests=5)
    (tmp_path / "about.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="expected format 1, got 0"):
        lists.read(tmp_path)


def test_samples_have_strictly_earlier_events():
    items, histories = small(events=EVENTS).samples(2)
    assert items.tolist() == [5, 6, 7, 9] and histories.tolist() == [[4, 0], [4, 0], [6, 5], [8, 0]]
    assert small().recent(3).tolist() == [[1, 0, 0], [2, 1, 0], [0, 0, 0]]


def test_mixed_negatives_have_the_share_of_the_targets():
    rng = np.random.default_rng(0)
    count = np.append(0, np.repeat([5, 0], [40, 10]))
    target = rng.integers(1, 51, 400)
    negatives = rng.integers(1, 41, (400, 50)).astype(np.int32)
    got = export.mixed(negatives, target, count, share=0.2, seed=1)
    replaced = count[got] == 0
    assert abs(replaced.mean() - 0.2) < 0.01 and not (got == target[:, None])[replaced].any()
    np.testing.assert_array_equal(got[~replaced], negatives[~replaced])
    drawn = np.bincount(got[replaced], minlength=51)[41:]
    assert drawn.min() > 0.85 * drawn.mean() and drawn.max() < 1.15 * drawn.mean()
    np.testing.assert_array_equal(got, export.mixed(negatives, target, count, share=0.2, seed=1))
    alone = np.append(0, np.repeat([5, 0], [40, 1]))  # the only untrained item is the target
    one = export.mixed(negatives, np.full(400, 41), alone, share=0.9, seed=1)
    np.testing.assert_array_equal(one, negatives)


# score files


def test_score_files_round_trip(tmp_path):
    scores.write_catalogue(tmp_path, "one", SCORES, {"sampler_power": 0.75, "seed": 4})
    got = scores.read(tmp_path, "one", requests=3, items=6)
    np.testing.assert_array_equal(got.catalogue, SCORES)
    assert got.sampler_power == 0.75 and got.about["seed"] == 4
    scores.write_pairs(tmp_path, "two", "top", [2, 0, 1], [3, 2, 1], [0.5, 1.0, 2.0])
    got = scores.read(tmp_path, "two", requests=3, items=6)
    assert got.top.request.tolist() == [0, 1, 2] and got.top.score.tolist() == [1.0, 2.0, 0.5] and got.sampler_power is None
    assert scores.names(tmp_path) == ["one", "two"]
    backwards = pa.table({"request": [2, 1, 0], "scores": pa.array(SCORES[::-1].tolist(), pa.list_(pa.float64()))})
    pq.write_table(backwards, tmp_path / "three.catalogue.parquet")  # as another tool would write it
    np.testing.assert_array_equal(scores.read(tmp_path, "three", requests=3, items=6).catalogue, SCORES)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"request": [0, 1], "scores": [[1.0] * 6] * 2}, "expected each of 3 requests once, got 2 rows"),
        ({"request": [0, 1, 1], "scores": [[1.0] * 6] * 3}, "expected each of 3 requests once"),
        ({"request": [0, 1, 2], "scores": [[1.0] * 5] * 3}, r"expected 6 scores a request, .* got \[5\]"),
        ({"request": [0, 1, 3], "scores": [[1.0] * 6] * 3}, r"expected request in \[0, 3\), got 0 to 3"),
        ({"request": [0.0, 1.0, 2.0], "scores": [[1.0] * 6] * 3}, "expected integers in column 'request'"),
        ({"request": [0, 1, 2], "scores": [[1.0] * 5 + [float("nan")]] * 3}, "expected no NaN among the scores, got 3"),
        ({"request": [0, 1, 2], "score": [1.0] * 3}, r"expected the columns \['request', 'scores'\]"),
    ],
)
def test_wrong_catalogue_files_are_refused(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "one.catalogue.parquet")
    with pytest.raises(ValueError, match=message) as error:
        scores.read(tmp_path, "one", requests=3, items=6)
    assert "one.catalogue.parquet" in str(error.value)


@pytest.mark.parametrize(
    ("request_", "item", "message"),
    [
        ([0, 1, 1], [1, 1, 2], "expected scores of each of 3 requests, got none of 1"),
        ([0, 1, 2, 2], [1, 1, 2, 2], "expected each pair once, got request 2 and item 2 twice"),
        ([0, 1, 2], [1, 1, 6], r"expected item in \[0, 6\), got 1 to 6"),
    ],
)
def test_wrong_pairs_are_refused(tmp_path, request_, item, message):
    scores.write_pairs(tmp_path, "one", "candidates", request_, item, np.ones(len(item)))
    with pytest.raises(ValueError, match=message):
        scores.read(tmp_path, "one", requests=3, items=6)


def test_other_mistakes_with_score_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a score file of 'one', such as one.catalogue.parquet; got none"):
        scores.read(tmp_path, "one", requests=3, items=6)
    with pytest.raises(ValueError, match=r"kind: expected one of \('candidates', 'top'\), got 'catalogue'"):
        scores.write_pairs(tmp_path, "one", "catalogue", [0], [1], [1.0])
    scores.write_catalogue(tmp_path, "one", SCORES, {"sampler_power": "0.75"})
    with pytest.raises(ValueError, match=r"expected sampler_power in \[0, 1\] or none, got '0.75'"):
        scores.read(tmp_path, "one", requests=3, items=6)
    part = Scores(name="one", candidates=scores.Pairs(request=np.arange(3), item=np.ones(3, int), score=np.ones(3)))
    with pytest.raises(ValueError, match=r"one: expected a score of every candidate, got none of item 2 for request 0"):
        outcomes.outcomes(small(), part)


# figures by hand


def test_catalogue_ranks_by_hand():
    """As asked: request 0 cannot have item 1 (met), so 2 with score 2 is behind 4 and tied with 5: rank 2. Request 1 without
    1 and 2: item 4 behind 5, rank 1. Request 2: item 3 behind 5, tied with 2: rank 2.
    """
    made = outcomes.outcomes(small(), model(sampler_power=0.75))
    assert made.ranks["asked"].tolist() == [2, 1, 2]
    # corrected: 4 and 5 are masked. Request 0: 2 gains 0.75 log 4 = 1.04, 3 gains 0: rank 0. Request 1 wants 4: a miss.
    # Request 2: 1 + 0.75 log 8 = 2.56 and 2 + 1.04 = 3.04 are above 2: rank 2.
    assert made.ranks["corrected"].tolist() == [0, MISSED, 2]
    # without the correction item 1 of request 2 is below the target
    assert outcomes.outcomes(small(), model()).ranks["corrected"].tolist() == [0, MISSED, 1]
    # users who come back to items: what was met stays
    again = small(about=small().about | {"repeats": True})
    assert outcomes.outcomes(again, model()).ranks["asked"].tolist() == [3, 3, 2]


def test_a_met_target_stays_a_candidate():
    one = small(target=np.array([1, 4, 3], np.int32))
    assert outcomes.outcomes(one, model()).ranks["asked"].tolist() == [0, 1, 2]


def test_ranks_within_a_retrieval_by_hand():
    retrieved = np.array([[5, 2, 3], [3, 5, 0], [3, 1, 0]], np.int32)
    made = outcomes.outcomes(small(), model(sampler_power=0.75), retrieved=retrieved)
    assert made.ranks["asked retrieved"].tolist() == [1, MISSED, 0]  # tied with 5; 4 was not found; 3 is above 1
    assert made.ranks["corrected retrieved"].tolist() == [0, MISSED, 1]  # 5 is masked; 1 + 0.75 log 8 is above 2
    best = outcomes.best_rows(small(), model(sampler_power=0.75), "corrected", k=3)
    assert best.tolist() == [[2, 3, 0], [3, 0, 0], [2, 1, 3]]
    assert outcomes.best_rows(small(), model(), "asked", k=2)[:2].tolist() in ([[4, 2], [5, 4]], [[4, 5], [5, 4]])


def test_the_share_of_untrained_items_at_the_top():
    """Below a hundred items all unmet ones count: 4 and 5 among 2..5, 3..5 and 1..5."""
    np.testing.assert_allclose(outcomes.outcomes(small(), model()).untrained_at_top, [2 / 4, 2 / 3, 2 / 5])


def test_gauc_by_hand():
    """User 7: positives 2 and 4, negatives 9, 1 and 2, 2: of 8 pairs 2 is above 1, tied twice; 4 above three: 5 of 8.
    User 9: 2 against 1 and 2: 1.5 of 2. Weights 6 and 3.
    """
    one = small()
    made = outcomes.outcomes(one, model()).aucs
    assert made["asked"].value.tolist() == [5 / 8, 3 / 4] and made["asked"].weight.tolist() == [6, 3]
    assert figures.level(made["asked"]) == pytest.approx((6 * 5 / 8 + 3 * 3 / 4) / 9)
    # mixed: user 7 has 2 and 4 against 3, 1 and 5, 2: 2 above 1, tied with 2; 4 above 3, 1, 2: 4.5 of 8
    assert made["mixed asked"].value.tolist() == [4.5 / 8, 1 / 2]
    # a likelihood, p = 0: lists ask for it over count ** 0.75, so 0.75 log(8, 4, 1, 1, 1) = 1.56, 1.04, 0, 0, 0 go off.
    # User 7: .96 and 4 against 7.44, 1 and 2, 2: 3 of 8 for 4, none for 2. User 9: 2 against -.56 and .96: both.
    likelihood = outcomes.outcomes(one, model(sampler_power=0)).aucs
    assert likelihood["corrected"].value.tolist() == [3 / 8, 1] and likelihood["asked"].value.tolist() == [5 / 8, 3 / 4]
    for same in (model(), model(sampler_power=0.75)):
        np.testing.assert_array_equal(outcomes.outcomes(one, same).aucs["corrected"].value, [5 / 8, 3 / 4])


def test_gauc_is_the_metric_of_the_study(data):
    made = export.lists_of(data, "test", requests=64)
    values = np.random.default_rng(0).normal(size=(64, len(made.count))).round(1).astype(np.float32)
    rows = np.concatenate([made.target[:, None], made.negatives], 1)
    picked = np.take_along_axis(values, rows, 1)
    labels = np.zeros(picked.shape)
    labels[:, 0] = 1
    wanted = metrics.gauc(picked, labels, np.broadcast_to(made.user[:, None], picked.shape)).value
    assert figures.level(outcomes.outcomes(made, model(values)).aucs["asked"]) == pytest.approx(wanted, abs=1e-12)


def test_a_bonus_for_untrained_items_gains_on_popular_lists_alone():
    """The hole of lists drawn by popularity: of the positives a fifth is untrained, of the negatives none."""
    rng = np.random.default_rng(2)
    count = np.append(0, np.repeat([5, 0], [80, 20]))
    target = rng.integers(1, 101, 500).astype(np.int32)
    negatives = rng.integers(1, 81, (500, 20)).astype(np.int32)
    share = (count[target] == 0).mean()
    one = small(
        count=count, target=target, negatives=negatives, user=np.ones(500, np.int32), offsets=np.zeros(501, np.int64),
        history={name: values[:0] for name, values in small().history.items()},
        mixed_negatives=export.mixed(negatives, target, count, share=float(share), seed=0),
    )  # fmt: skip
    bonus = np.broadcast_to((count == 0).astype(np.float32), (500, 101))
    aucs = outcomes.outcomes(one, model(bonus)).aucs
    assert figures.level(aucs["asked"]) == pytest.approx(0.5 + share / 2)
    assert abs(figures.level(aucs["mixed asked"]) - 0.5) < 0.01


def test_pairs_answer_like_the_catalogue():
    """Candidates give its GAUC, the top its ranks, as deep as the file goes."""
    one, whole = small(), outcomes.outcomes(small(), model())
    request = np.repeat(np.arange(3), [len(row) for row in one.candidates])
    item = np.concatenate(one.candidates)
    pairs = scores.Pairs(request=request, item=item, score=SCORES[request, item].astype(np.float64))
    made = outcomes.outcomes(one, Scores(name="one", candidates=pairs))
    for name, wanted in whole.aucs.items():
        np.testing.assert_array_equal(made.aucs[name].value, wanted.value)
    assert made.ranks == {} and made.untrained_at_top is None
    request, item = np.repeat(np.arange(3), 5), np.tile(np.arange(1, 6), 3)
    top = scores.Pairs(request=request, item=item, score=SCORES[request, item].astype(np.float64))
    assert outcomes.ranks_of_top(one, top).tolist() == whole.ranks["asked"].tolist()
    assert outcomes.depth(one, top) == 3  # request 1 has met two of the five
    kept = SCORES[request, item] >= 4  # 5 alone is left of request 1's other items; 2 of request 0 is not there
    few = scores.Pairs(request=request[kept], item=item[kept], score=SCORES[request, item][kept].astype(np.float64))
    assert outcomes.ranks_of_top(one, few).tolist() == [MISSED, 1, MISSED]
    shown = figures.figures(one, outcomes.outcomes(one, Scores(name="one", top=top)), deepest=10)
    assert set(shown) == {"hr@10 asked"}


def test_hits_by_user_and_their_mean():
    made = figures.hits_by_user(np.array([0, 10, 3]), np.array([7, 7, 9]), k=10)
    assert made.value.tolist() == [0.5, 1.0] and made.weight.tolist() == [2, 1] and figures.level(made) == pytest.approx(2 / 3)


def test_differences_are_paired():
    """Models that differ by a constant differ by it in every sample, however far users are apart; the error of a mean of n
    users is their deviation over sqrt(n).
    """
    rng = np.random.default_rng(0)
    weight, value = np.full(400, 10.0), rng.normal(size=400)
    one, other = outcomes.ByUser(value=value, weight=weight), outcomes.ByUser(value=value - 0.01, weight=weight)
    samples = figures.resampled(400)
    assert (samples.sum(1) == 400).all() and samples.shape == (figures.DRAWS, 400)
    got = figures.difference(one, other, samples)
    assert got["value"] == pytest.approx(0.01) and got["low"] == pytest.approx(0.01) and got["high"] == pytest.approx(0.01)
    assert figures.error(one, samples) == pytest.approx(value.std() / 20, rel=0.06)
    noise = outcomes.ByUser(value=value + rng.normal(size=400), weight=weight)
    got = figures.difference(noise, one, samples)
    assert got["error"] == pytest.approx(0.05, rel=0.1) and got["high"] - got["low"] == pytest.approx(
        3.92 * got["error"], rel=0.05
    )
    with pytest.raises(ValueError, match="expected figures of the same requests of the same users"):
        figures.difference(one, outcomes.ByUser(value=value, weight=weight + 1), samples)


def test_weights_count_in_resampled_users():
    """A user with weight 0 changes nothing; two users, one with three times the weight."""
    figure = outcomes.ByUser(value=np.array([1.0, 0.0, 7.0]), weight=np.array([3.0, 1.0, 0.0]))
    assert figures.level(figure) == 0.75
    samples = np.array([[1, 1, 1], [2, 0, 1], [0, 2, 1], [1, 1, 1]])
    assert figures.error(figure, samples) == pytest.approx(np.std([0.75, 1.0, 0.0, 0.75], ddof=1))


def test_what_masking_hides():
    made = outcomes.Outcomes(ranks={"asked": np.array([2, 100, 5])}, untrained_at_top=np.array([0.5, 0.0, 0.1]))
    got = figures.others(small(), made)
    assert got["untrained in the top 100"] == pytest.approx(0.2)
    assert got["hr@100 asked, untrained targets"] == 0 and got["hr@100 asked, trained targets"] == 1


# baselines


@pytest.fixture(scope="module")
def exported(data) -> Lists:
    return export.lists_of(data, "test", requests=32)


def dense(one: Lists, last: int) -> tuple[np.ndarray, np.ndarray]:
    """The binary matrices of users and of requests, one event at a time."""
    x = np.zeros((one.events["user"].max() + 1, len(one.count)))
    for user, item in zip(one.events["user"], one.events["item"], strict=True):
        x[user, item] = item > 0
    h = np.zeros((len(one.target), len(one.count)))
    for r in range(len(h)):
        h[r, one.history["item"][one.offsets[r] : one.offsets[r + 1]][-last:]] = 1
    h[:, 0] = 0
    return x, h


def test_ease_is_the_closed_form(exported):
    x, h = dense(exported, 20)
    p = np.linalg.inv(x.T @ x + 30 * np.eye(x.shape[1]))
    b = -p / np.diag(p)[None, :]
    np.fill_diagonal(b, 0)
    np.testing.assert_allclose(baselines.ease(exported, regularization=30.0, last=20), h @ b, atol=1e-5)


@pytest.mark.parametrize(("neighbours", "shrink"), [(1000, 0.0), (5, 10.0)])
def test_item_knn_is_a_sum_of_similarities(exported, neighbours, shrink):
    x, h = dense(exported, 50)
    norm = np.sqrt(x.sum(0))
    similar = (x.T @ x) / np.maximum(norm[:, None] * norm + shrink, 1e-9)
    np.fill_diagonal(similar, 0)
    least = -np.sort(-similar, axis=1)[:, min(neighbours, len(similar)) - 1, None]
    got = baselines.item_knn(exported, neighbours=neighbours, shrink=shrink, last=50)
    assert np.all(got >= h @ (similar * (similar > least)) - 1e-4)
    assert np.all(got <= h @ (similar * (similar >= least)) + 1e-4)  # of tied neighbours some are left out


def test_pure_svd_scores_by_the_factors_of_what_was_met(exported):
    got = baselines.pure_svd(exported, width=4, decay=0.5, last=3)
    x, _ = dense(exported, 3)
    vectors = np.linalg.svd(x, full_matrices=False)[2][:4].T
    expected = np.zeros_like(got)
    for r, (first, end) in enumerate(zip(exported.offsets[:-1], exported.offsets[1:], strict=True)):
        last = exported.history["item"][max(first, end - 3) : end][::-1]
        expected[r] = (1.0 + np.arange(len(last))) ** -0.5 @ vectors[last] @ vectors.T
    scale = (got * expected).sum() / (expected**2).sum()
    assert scale > 0
    np.testing.assert_allclose(got, scale * expected, atol=2e-3 * np.abs(got).max())


def test_popularity_and_recent_popularity():
    one = small(events=small().events | {"time": np.array([0, 5 * baselines.DAY, 6 * baselines.DAY])})
    assert baselines.popularity(one).tolist() == [[0, 8, 4, 1, 0, 0]] * 3
    got = baselines.recent_popularity(one, days=2.0)[0]
    assert np.argsort(-got)[:3].tolist() == [2, 3, 1] and got[2] == pytest.approx(1 + 4 / 9) and got[4] == 0


def test_als_scores_by_the_last_events(exported):
    """What was met lately scores high, what has no event 0; the same seed gives the same scores."""
    pytest.importorskip("implicit", reason="needs the extra 'peers'")
    got = baselines.als(exported, factors=8, regularization=0.1, last=20)
    assert got.shape == (32, len(exported.count)) and np.isfinite(got).all()
    _, h = dense(exported, 20)
    met, others = got[h > 0].mean(), got[(h == 0) & (exported.count[None] > 0)].mean()
    assert met > others + 0.1 and np.abs(got[:, exported.count == 0]).max(initial=0) < 1e-6
    np.testing.assert_array_equal(got, baselines.als(exported, factors=8, regularization=0.1, last=20))


# what feeds share


def test_batches_end_with_the_budget(monkeypatch):
    """Every positive comes once each time round, in another order each time; the number of batches can be rounded up."""
    clock = iter(range(100))
    monkeypatch.setattr(batches.time, "process_time", lambda: next(clock))
    made = batches.Samples(small(events=EVENTS), negatives=2, seed=0)
    assert made.items.tolist() == [5, 6, 7, 9]
    budget = batches.Budget(seconds=4)
    taken = [places.tolist() for places in made.order(2, np.arange(4), budget)]
    assert budget.steps == len(taken) == 4  # the clock ticks once a look
    assert sorted(taken[0] + taken[1]) == sorted(taken[2] + taken[3]) == [0, 1, 2, 3] and taken[:2] != taken[2:]
    assert len(list(made.order(2, np.arange(4), batches.Budget(seconds=4), rounded=3))) == 6
    assert len(list(made.order(9, np.arange(4), batches.Budget(seconds=0)))) == 1  # there is always a first batch


def test_negatives_are_drawn_like_those_of_the_lists():
    one = small(events=EVENTS, count=np.array([0, 16, 1, 0, 0, 0, 0, 0, 0, 0]))
    drawn = batches.Samples(one, negatives=3000, seed=0).lists_at(np.array([2, 0]))
    assert drawn[:, 0].tolist() == [7, 5] and set(drawn[:, 1:].ravel().tolist()) == {1, 2}
    assert (drawn[:, 1:] == 1).mean() == pytest.approx(8 / 9, abs=0.01)


def test_features_of_histories_and_items():
    content = np.array([[0, 0], [1, 3], [3, 5], [0, 1], [2, 2], [4, 4]], np.float32)
    fields = small().fields | {"genres": np.ones((6, 2), np.int32)}  # a field of several values is left to whoever wants it
    one = small(content=content, fields=fields)
    made = batches.user_features(one, one.recent(3))
    assert made["history"].tolist() == [[1, 0, 0], [2, 1, 0], [0, 0, 0]]
    assert made["history_category"].tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert made["history_content"].tolist() == [[1, 3], [2, 4], [0, 0]]
    items = batches.item_features(one, np.array([3, 1]))
    assert items["item"].tolist() == [3, 1] and items["category"].tolist() == [2, 1] and items["content"].tolist()[0] == [0, 1]
    assert set(made) == {"history", "history_category", "history_content"} and batches.sizes(one) == {"item": 6, "category": 3}


# tuning, checkpoints, the command


def test_the_best_trial_is_chosen_and_kept(tmp_path):
    """The trial with the right order wins, an interrupted tuning goes on, and a score file that is there stays."""
    one = small()
    workplace = tuning.Workplace(folder=tmp_path, lists={"validation": one, "test": one})
    right = np.zeros((3, 6), np.float32)
    right[np.arange(3), one.target] = 1
    written = []

    def write(slice_, settings, name):
        written.append((slice_, dict(settings)))
        made = right if settings["good"] else -right
        scores.write_catalogue(workplace.scores(slice_), name, made, {"settings": settings})

    trials = ({"good": 0}, {"good": 1}, {"good": 2})
    tuning.tuned("one", workplace, (trials[:2], (), ({"more": 5},)), write)
    longer = {"good": 1, "more": 5}  # of the best, which it does not beat
    assert written == [
        (name, each) for name, each in zip(["validation"] * 3 + ["test"], (*trials[:2], longer, trials[1]), strict=True)
    ]
    about = workplace.read("one").about
    assert about["chosen"] == {"good": 1} and [t["settings"] for t in about["trials"]] == [*trials[:2], longer]
    assert about["trials"][1]["gauc asked"] == 1 and about["trials"][0]["hr@100 corrected"] == pytest.approx(2 / 3)
    tuning.tuned("one", workplace, (trials,), write)
    assert len(written) == 4
    for path in workplace.scores("test").iterdir():
        path.unlink()
    tuning.tuned("one", workplace, (trials,), write)  # the trials that were done are not done again
    assert written[4:] == [("validation", {"good": 2}), ("test", {"good": 1})]


def test_a_feed_that_fails_says_so(tmp_path, data):
    workplace = tuning.Workplace(
        folder=tmp_path, lists={name: export.lists_of(data, name, requests=4) for name in export.SLICES}
    )
    with pytest.raises(RuntimeError, match=r"rechub-dssm: its feed failed in .*"):
        tuning.trained("rechub-dssm", workplace, "false", tuning.Budget())
    with pytest.raises(ValueError, match="peer: expected one of .*, got 'unknown'"):
        tuning.trained("unknown", workplace, "false", tuning.Budget())


def test_a_checkpoint_scores_like_the_study(data, tmp_path):
    """GAUC and ranks of a model's score file are those that the study gives the model itself."""
    built = aif.build(aif.Config(schema=data.dataset.schema, blocks=(models.DOT,), **models.SMOKE | dict(head=())))
    params = built.init(jax.random.key(0), data.dataset.catalogue)
    checkpoint.save(tmp_path / "kept", aif.Trained(built, params))
    one = export.lists_of(data, "test", requests=21)
    made, about = ours.checkpoint_scores(tmp_path / "kept", data.dataset, one, power=0.75)
    assert about["sampler_power"] == 0.75 and about["checkpoint"] == "kept"
    rows = np.concatenate([one.target[:, None], one.negatives], 1)
    labels = np.zeros(rows.shape, np.float32)
    labels[:, 0] = 1
    requests = evaluation.Requests(one.position, rows, labels)
    wanted = evaluation.sampled_scores(built, params, data.dataset, requests)
    np.testing.assert_allclose(np.take_along_axis(made, rows, 1), wanted, atol=1e-5)
    got = outcomes.outcomes(one, model(made, **about))
    ranks = rank_catalogue(built, params, data.dataset, one.position, repeats=data.repeats, progress=False).ranks
    np.testing.assert_array_equal(got.ranks["asked"], ranks)
    other = data.dataset.with_content(data.dataset.catalogue.content[:, :4])
    with pytest.raises(ValueError, match="expected a model of the schema"):
        ours.checkpoint_scores(tmp_path / "kept", other, one, power=0.75)


def test_smoke(tmp_path, capsys, monkeypatch):
    """The command on a synthetic world; foreign score files in its folder are evaluated too, that of the README among them."""
    monkeypatch.chdir(tmp_path)
    work = tmp_path / "out" / "peers"
    names = ["popularity", "ease", "item-knn"]
    command = ["--smoke", "--baselines", *names]
    main([*command, "--json", str(tmp_path / "one.json")])
    found = json.loads((tmp_path / "one.json").read_text())["models"]
    assert set(found) == set(names)
    folder = work / "smoke" / "test"
    one = lists.read(folder)
    truth = np.zeros((len(one.target), len(one.count)), np.float32)
    truth[np.arange(len(one.target)), one.target] = 1
    scores.write_catalogue(folder / "scores", "truth", truth)
    (block,) = fences(README, "python")
    exec(compile(block, str(README), "exec"), {})
    main([*command, "--json", str(tmp_path / "two.json"), "--page", str(tmp_path), "--retrieval", "item-knn"])
    found = json.loads((tmp_path / "two.json").read_text())["models"]
    assert set(found) == {*names, "truth", "popular-and-seen"} and found["truth"]["figures"]["gauc asked"] == 1
    assert found["truth"]["figures"]["hr@10 asked"] == 1 and found["truth"]["against"]["hr@10 asked"]["low"] > 0
    assert found["ease"]["against"] == {} and found["ease"]["about"]["chosen"] in [
        trial["settings"] for trial in found["ease"]["about"]["trials"]
    ]
    kept = report.read(work / "results")
    assert {one["model"]: one["figures"] for one in kept.values()} == {name: one["figures"] for name, one in found.items()}
    page = (tmp_path / report.PAGE).read_text()
    assert "| truth | 1.000 ± 0.000 |" in page and "within the 1,000 best of item-knn" in page
    printed = capsys.readouterr().out
    main(["--report-only", "--results", str(work / "results")])
    assert capsys.readouterr().out.splitlines()[0] in printed
    with pytest.raises(SystemExit, match="--reference: expected a model with a score file in .*, got 'two_tower'"):
        main([*command, "--reference", "two_tower"])


def test_flags_are_checked(capsys):
    with pytest.raises(SystemExit):
        main(["--peer", "rechub-dssm"])
    assert "expected NAME=VALUE, got 'rechub-dssm'" in capsys.readouterr().err


def test_the_page_is_that_of_the_records():
    budget = tuning.Budget()
    wanted = report.markdown(report.tables(report.read(records.RESULTS)), trial=budget.trial, longer=budget.longer)
    assert (records.RESULTS.parents[2] / "experiments" / "notes" / report.PAGE).read_text(encoding="utf-8") == wanted
