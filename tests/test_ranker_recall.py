"""The cascade of `experiments.ranker_recall`: what a cut keeps, what retrieval finds, and the script in small."""

import dataclasses

import numpy as np
import pytest

from aif_jax import metrics
from aif_jax.data import EventLog, item_counts
from aif_jax.data.split import sample_positions
from experiments import ranker_recall as cascade
from experiments.study import datasets, question, retrieval
from tests.test_question import met_once
from tests.test_scripts import measured


def test_a_cut_by_hand():
    """Four candidates; the ranker's order is 0 1 2 3, the pre-ranker's 2 0 3 1; the event's item is 1, 2, and not there."""
    ranker = np.tile([4.0, 3.0, 2.0, 1.0], (3, 1))
    ours = np.tile([3.0, 1.0, 4.0, 2.0], (3, 1))
    hit = np.array([[False, True, False, False], [False, False, True, False], [False] * 4])
    found = cascade.of_cuts(ours, ranker, hit, (2, 3))
    assert found["survives@-2"].tolist() == [0, 1, 0] and found["survives@-3"].tolist() == [0, 1, 0]
    assert found["retrieved@"].tolist() == [1, 1, 0] and found["own_hr10@"].tolist() == [1, 1, 0]
    np.testing.assert_allclose(found["ndcg10@-2"], [0, 1 / np.log2(3), 0])  # behind candidate 0 alone
    np.testing.assert_allclose(found["ranker_ndcg10@"], [1 / np.log2(3), 1 / 2, 0])


@pytest.mark.parametrize("seed", range(3))
def test_a_cut_agrees_with_the_metrics_of_the_package(seed):
    rng = np.random.default_rng(seed)
    ours, ranker = rng.normal(size=(2, 20, 80))
    hit = np.arange(80) == rng.integers(0, 80, 20)[:, None]
    found = cascade.of_cuts(ours, ranker, hit, (20, 60))
    for cut in (20, 60):
        kept = metrics.top_k_labels(ours, k=cut).astype(bool)
        for top in (10, 50):
            if top <= cut:
                expected = metrics.ranker_recall_at_k(ours, ranker, k=cut, top=top).value
                assert found[f"recall{top}@-{cut}"].mean() == pytest.approx(expected)
        assert found[f"survives@-{cut}"].mean() == pytest.approx(metrics.hit_rate_at_k(ours, hit, k=cut).value)
        behind = metrics.hit_rate_at_k(np.where(kept, ranker, -100 - np.arange(80)), hit & kept, k=10)
        assert found[f"hr10@-{cut}"].sum() == pytest.approx(behind.value * behind.used)
    assert found["ranker_hr10@"].mean() == pytest.approx(metrics.hit_rate_at_k(ranker, hit, k=10).value)
    assert found["ranker_ndcg10@"].mean() == pytest.approx(metrics.ndcg_at_k(ranker, hit, k=10).value)


@pytest.mark.parametrize("once", [False, True], ids=["users return", "users do not"])
def test_retrieval_finds_trained_items_and_reads_the_past_alone(once):
    data = datasets.load("smoke")
    data = met_once(data, "smoke") if once else data
    trial = question.Trial(dataset="smoke", model="")
    (part,) = question.parts_of(trial, data)
    requests, log = question.requests_of(trial, part, data), data.dataset.log
    counts = item_counts(data.dataset, part.seen)
    taught_at = np.intersect1d(part.seen, sample_positions(log, min_history=1))[100:200]
    found = retrieval.of_requests(data, part, requests, counts)
    taught = retrieval.of_training(data, part, taught_at, counts)
    assert np.flatnonzero(taught.any(1)).tolist() == taught_at.tolist()
    for rows, positions in ((found, requests.positions), (taught[taught_at], taught_at)):
        assert (counts[rows][rows > 0] > 0).all()
        for own, at in zip(rows, positions, strict=True):
            met = set(log.item[log.offsets[log.user[at]] : log.history_end(np.array([at]))[0]])
            assert bool(met & set(own[own > 0])) != once
    for own in found:
        assert len(set(own[own > 0])) == (own > 0).sum()
    if not once:  # met items come first, the latest first
        at = requests.positions[0]
        latest = log.item[log.history_end(np.array([at]))[0] - 1]
        assert found[0, 0] == latest
    later = np.where(np.isin(np.arange(len(log)), part.held), 1, log.item)
    changed = EventLog.from_arrays(log.user, later, log.action, log.time, users=log.users)
    other = dataclasses.replace(data, dataset=dataclasses.replace(data.dataset, log=changed, repeats=data.repeats))
    again = retrieval.of_training(other, part, taught_at, counts)
    np.testing.assert_array_equal(again, taught)


def test_ranker_recall(tmp_path):
    folders = ("--results", str(tmp_path / "results"), "--work", str(tmp_path / "work"))
    got = measured(tmp_path, "experiments.ranker_recall", *folders)
    assert got["preset"] == {}  # figures are of the test split of public data
    found = cascade.records.read(tmp_path / "results")
    assert [one["weight"] for one in found.values()] == [0.0, 4.0]
    for one in found.values():
        assert 0 < one["figures"]["recall10@40-10"] <= one["figures"]["recall10@40-20"] <= 1
        assert one["figures"]["hr10@40-20"] <= one["figures"]["survives@40-20"] <= one["figures"]["retrieved@40"] <= 1
    assert cascade.chosen_weights(tmp_path / "results") == {}
    table = cascade.report(tmp_path / "results")
    assert "smoke, validation" in table and "matching, taught, weight 4 (1)" in table
