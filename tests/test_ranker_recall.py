"""The cascade of `experiments.ranker_recall`: what a cut keeps, what retrieval finds, and the script in small."""

import dataclasses
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from aif_jax import metrics
from aif_jax.data import EventLog, item_counts
from aif_jax.data.split import sample_positions
from experiments import ranker_recall as cascade
from experiments.study import datasets, models, question, retrieval, sequence, trees
from tests.test_experiments import measured
from tests.test_question import met_once

pytestmark = [pytest.mark.lane("experiments"), pytest.mark.usefixtures("programs_stay")]


def test_a_cut_by_hand():
    """Four candidates; the ranker's order is 0 1 2 3, the pre-ranker's 2 0 3 1; the event's item is 1, 2, and not there."""
    ranker, ours = np.tile([4.0, 3.0, 2.0, 1.0], (3, 1)), np.tile([3.0, 1.0, 4.0, 2.0], (3, 1))
    hit = np.array([[False, True, False, False], [False, False, True, False], [False] * 4])
    found = cascade.of_cuts(ours, ranker, hit, (2, 3))
    assert found["survives@-2"].tolist() == [0, 1, 0] and found["survives@-3"].tolist() == [0, 1, 0]
    assert found["retrieved@"].tolist() == [1, 1, 0] and found["own_hr10@"].tolist() == [1, 1, 0]
    np.testing.assert_allclose(found["ndcg10@-2"], [0, 1 / np.log2(3), 0])  # behind candidate 0 alone
    np.testing.assert_allclose(found["ranker_ndcg10@"], [1 / np.log2(3), 1 / 2, 0])
    assert cascade.agreement(ours[0], ranker[0]) == 0.5
    assert cascade.agreement(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 2.0])) == 0.75  # a tie of ours is one half


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
        assert found[f"survives@-{cut}"].mean() == pytest.approx(metrics.recall_at_k(ours, hit, k=cut).value)
        behind = metrics.recall_at_k(np.where(kept, ranker, -100 - np.arange(80)), hit & kept, k=10)
        assert found[f"hr10@-{cut}"].sum() == pytest.approx(behind.value * behind.used)
    assert found["ranker_hr10@"].mean() == pytest.approx(metrics.recall_at_k(ranker, hit, k=10).value)
    assert found["ranker_ndcg10@"].mean() == pytest.approx(ndcg_score(hit, ranker, k=10))


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
        assert found[0, 0] == log.item[log.history_end(np.array([at]))[0] - 1]
    later = np.where(np.isin(np.arange(len(log)), part.held), 1, log.item)
    changed = EventLog(log.user, later, log.action, log.time, users=log.users)
    other = dataclasses.replace(data, dataset=dataclasses.replace(data.dataset, log=changed, repeats=data.repeats))
    np.testing.assert_array_equal(retrieval.of_training(other, part, taught_at, counts), taught)


@pytest.fixture(scope="module")
def smoke():
    """The synthetic data, its training events, and 40 late requests with random candidates."""
    data = datasets.load("smoke")
    (part,) = question.parts_of(question.Trial(dataset="smoke", model=""), data)
    positions = np.intersect1d(part.seen, sample_positions(data.dataset.log, min_history=5))
    rng = np.random.default_rng(0)
    return data, part, rng.permutation(positions)[:40], rng.integers(1, len(data.dataset.catalogue), (40, 12)).astype(np.int32)


def test_features_of_the_trees_by_a_plain_count(smoke):
    data, part, at, rows = smoke
    log, category = data.dataset.log, data.dataset.catalogue.items.ids["category"]
    rows[:, 0] = log.item[at]
    found = trees.Features(data, part)(at, rows)
    assert found.shape == (40, 12, 2 + 1 + len(trees.RECENT) + 4 * len(trees.fields_of(data)) + len(trees.DECAYS) + 1)
    for request, (own, position) in enumerate(zip(rows, at, strict=True)):
        now, user = log.time[position], log.user[position]
        mine = np.flatnonzero((log.user == user) & (log.time < now))
        for column, row in enumerate(own):
            events = log.time[(log.item == row) & (log.time < now)]
            recent = [(events >= now - days * trees.DAY).sum() for days in trees.RECENT]
            expected = [len(mine), len(events), (now - events.max()) / trees.DAY if len(events) else np.nan, *recent]
            for of in (log.item == row, category[log.item] == category[row]):
                met = mine[of[mine]]
                past = [mine[-1] + 1 - met[-1], (now - log.time[met[-1]]) / trees.DAY] if len(met) else [np.nan, np.nan]
                expected += [len(met), len(met) / len(mine), *past]
            got = found[request, column, : len(expected)]
            np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=f"{request} {column}")


def test_features_of_the_trees_read_neither_the_request_nor_the_users_own_training_events(smoke):
    """The user turns to other items from the request on: neither counts change, nor what other users' events say."""
    data, part, at, rows = smoke
    log, user = data.dataset.log, data.dataset.log.user[at[0]]
    later = (log.user == user) & (log.time >= log.time[at[0]])
    item = np.where(later, 1 + (log.item + 7) % (len(data.dataset.catalogue) - 1), log.item).astype(np.int32)
    changed = dataclasses.replace(data.dataset, log=EventLog(log.user, item, log.action, log.time, users=log.users))
    other = dataclasses.replace(data, dataset=changed)
    before, after = (trees.Features(one, part)(at[:1], rows[:1]) for one in (data, other))
    np.testing.assert_array_equal(before, after)


def test_the_scale_of_scores_is_the_likeliest():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(20_000, 6))
    right = (3 * scores + rng.gumbel(size=scores.shape)).argmax(1)  # a softmax of three times the scores
    swapped = np.take_along_axis(scores, (np.arange(6) + right[:, None]) % 6, 1)
    assert trees.likeliest_scale(swapped) == pytest.approx(3, rel=0.05)
    assert trees.likeliest_scale(np.pad(swapped, ((0, 0), (0, 1)), constant_values=-np.inf)) == pytest.approx(3, rel=0.05)


def test_windows_of_the_sequences_hold_training_events_of_one_user(smoke):
    data, part, *_ = smoke
    log, ends = data.dataset.log, {user: [] for user in range(data.dataset.log.users)}
    for position in part.seen:
        ends[log.user[position]].append(log.item[position])
    events, after, taught = sequence.windows(log, part.seen, np.random.default_rng(0), 50)
    assert events.item.shape == after.shape == taught.shape == (50, sequence.LENGTH) and taught.any(1).all()
    for items, following in zip(events.item, after, strict=True):
        count = (following > 0).sum()
        window = [*items[: count + 1]]
        np.testing.assert_array_equal(items[1 : count + 1], following[:count])
        assert any(window == own[start : start + count + 1] for own in ends.values() for start in range(len(own) - count))


def test_sequences_read_the_last_events_before_the_request_alone(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(sequence, "LENGTH", 16)  # shorter than most histories
    data, part, at, rows = smoke
    counts, log = item_counts(data.dataset, part.seen), data.dataset.log
    given = dict(counts=counts, offset=np.zeros(len(counts), np.float32), folder=tmp_path / "model", steps=2)
    scores, version = sequence.fit(data, part, **given)
    item = log.item.copy()
    item[log.history_end(at[:1])[0] : log.offsets[log.user[at[0]] + 1]] = 1
    changed = dataclasses.replace(data.dataset, log=EventLog(log.user, item, log.action, log.time, users=log.users))
    other, again = sequence.fit(dataclasses.replace(data, dataset=changed), part, **given)
    assert again == version
    first = scores(at, rows)
    np.testing.assert_array_equal(first[:1], other(at[:1], rows[:1]))
    np.testing.assert_allclose(first[5:7], scores(at[5:7], rows[5:7]), rtol=1e-5, atol=1e-6)


def test_similar_events_by_hand():
    """Two events of the candidate's cluster, at places 0 and 2; what the other sums are by recency."""
    params = {"table": np.array([[0], [1], [2]], np.int32)}
    history = SimpleNamespace(item=np.array([2, 1, 2, 0]), mask=np.array([True, True, True, False]))
    (sums,) = models.Similar(clusters=(2,)).user(params, SimpleNamespace(long=history))
    lives = np.array(models.HALF_LIVES)
    np.testing.assert_allclose(sums[2], np.log1p([2, *(1 + 2 ** (-2 / lives))]), rtol=1e-6)
    np.testing.assert_allclose(sums[1], np.log1p([1, *2 ** (-1 / lives)]), rtol=1e-6)
    assert not sums[0].any()


def test_recency_is_a_vector_for_each_half_life():
    history, embedded = SimpleNamespace(mask=np.array([True, True, False])), np.array([[1.0, 0], [0, 1], [9, 9]], np.float32)
    maps = {"map": np.stack([np.eye(2, dtype=np.float32)] * 4)}
    vectors = models.RecentVectors().user(maps, SimpleNamespace(long=history, embedded=embedded))
    older = 2 ** (-1 / np.array(models.HALF_LIVES))
    np.testing.assert_allclose(vectors, np.stack([1 / (1 + older), older / (1 + older)], 1), rtol=1e-6)


def test_clusters_are_of_items_with_a_training_event():
    config = question.config_of(question.Trial(dataset="smoke", model=cascade.MODELS["aif_similar"]), datasets.load("smoke"))
    config = config.replace(blocks=(models.Similar(clusters=(2, 5)),))
    user, item = np.random.default_rng(0).integers(1, 60, (2, 900))
    made = np.asarray(models.with_clusters({"fitted": {}}, config, user, item)["fitted"]["similar"]["table"])
    assert not made[0].any() and not made[60:].any() and made[np.unique(item)].all()
    assert np.unique(made[:, 0]).tolist() == [0, 1, 2] and made[:, 1].max() == 5


def test_ranker_recall(tmp_path):
    folders = ("--results", str(tmp_path / "results"), "--work", str(tmp_path / "work"))
    got = measured(tmp_path, "experiments.ranker_recall", *folders)
    assert got["preset"] == {}  # figures are of the test split of public data
    found = cascade.read(tmp_path / "results")
    assert [one["weight"] for one in found.values()] == [0.0, 16.0]
    for one in found.values():
        assert 0 < one["figures"]["recall10@40-10"] <= one["figures"]["recall10@40-20"] <= 1
        assert one["figures"]["hr10@40-20"] <= one["figures"]["survives@40-20"] <= one["figures"]["retrieved@40"] <= 1
    table = cascade.report(tmp_path / "results")
    assert "smoke, validation, ranker attention" in table and "matching, weight=16, 40 candidates (1)" in table


@pytest.mark.parametrize("ranker", ["trees", "sequence"])
def test_rankers_of_other_families(tmp_path, monkeypatch, ranker):
    """Each has scores of its own, from files when they are there, and the same models that nobody taught."""
    monkeypatch.setattr(trees, "TREES", 30)
    monkeypatch.setattr(sequence, "LENGTH", 16)  # shorter than most histories
    data = datasets.load("smoke")
    world = cascade.world_of(data, "validation", ranker, tmp_path / "work")
    np.testing.assert_array_equal(world.ranker, cascade.world_of(data, "validation", ranker, tmp_path / "work").ranker)
    assert np.isfinite(world.ranker).all() and world.ranker.shape == world.found.shape
    rows, scores = world.ranked.at(world.ranked.positions[:5])
    assert np.isfinite(scores[rows > 0]).all()
    (alone, taught), (other, _) = (cascade.plan("smoke", name) for name in (ranker, "attention"))
    assert alone.id != other.id and alone.trained == other.trained and taught.trained == taught.id
    assert taught.id == f"smoke/validation/{ranker}/matching/weight=16, 40 candidates/seed 0"


def test_figures_of_the_test_split_by_ranker(tmp_path):
    """AIF loses 1 %, matching 3, two-tower 20; before trees AIF loses 5 % more than matching."""
    users, of = np.arange(50), {"two_tower": 0.8, "matching": 0.97, "aif": 0.99}
    for ranker, model in product(("attention", "trees"), of):
        trial = cascade.Trial(dataset="taobao", model=model, ranker=ranker, split="test", **cascade.USUAL._asdict())
        recall = of[model] - 0.07 * (ranker == "trees" and model == "aif") + 0.001 * np.cos(users)
        names = ("hr10@1000-100", "ndcg10@1000-100", "own_hr10@1000", "ranker_hr10@1000", "ranker_ndcg10@1000")
        values = dict.fromkeys((*names, "gauc", "hr100@0"), np.full(50, 0.5)) | {"recall10@1000-100": recall}
        record = {"id": trial.id, **dataclasses.asdict(trial)}
        if ranker == "attention":
            del record["ranker"], record["learning_rate"]  # as the first records were
        cascade.records.keep(tmp_path, record, {name: metrics.mean_by_user(one, users) for name, one in values.items()})
    made = cascade.keys(tmp_path)["taobao"]
    assert made["order_holds"] == {"attention": True, "trees": False}
    assert made["lost10_aif"] == pytest.approx(1, abs=0.01) and 1 < made["lost10_aif_high"] < 1.1
    assert made["trees"]["lost10_less_than_matching_high"] < -4 and made["lost10_less_than_matching_low"] > 1.9
    assert made["lost10_ratio_over_two_tower"] == pytest.approx(0.05, rel=0.01) and made["cascade_hr10_share"] == 1


def test_a_model_is_judged_next_to_aif_on_the_same_seeds(tmp_path):
    """AIF loses 3 %, without linear memory 2; a seed that one of them lacks does not count."""
    users = np.arange(50)
    for model, seeds, recall in (("aif", (0, 1), 0.97), ("aif_no_linear", (1, 2), 0.98)):
        for seed in seeds:
            trial = cascade.Trial(dataset="taobao", model=model, seed=seed, **cascade.USUAL._asdict())
            values = {f"recall10@1000-{cut}": np.full(50, recall if seed == 1 else 0.5) for cut in (50, 100)}
            found = {name: metrics.mean_by_user(one, users) for name, one in values.items()}
            cascade.records.keep(tmp_path, {"id": trial.id, **dataclasses.asdict(trial)}, found)
    more = cascade.lost_more(cascade.read(tmp_path), tmp_path, "taobao", ("aif", "aif_no_linear"))
    np.testing.assert_allclose(more, [1.0, 1.0, 1.0], atol=1e-5)
    assert cascade.lost_more(cascade.read(tmp_path), tmp_path, "movielens", ("aif", "aif_no_linear")) is None
