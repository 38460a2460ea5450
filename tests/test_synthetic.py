"""The synthetic world: the truth is its formula, and events are drawn from it, whatever source a knob leaves."""

import dataclasses
import hashlib

import numpy as np
import pytest

from aif_jax import metrics
from experiments.datasets.synthetic import CLICK, synthetic_world

pytestmark = pytest.mark.lane("experiments")
SIZES = dict(users=150, items=300, categories=20, topics=25, events_per_user=120, content_dim=16)
SMALL = SIZES | dict(lag=16, interests=4, favourites=2)
OFF = dict(long_term=0.0, short_term=0.0, category_locality=0.0, noise=0.5)


@pytest.fixture(scope="module")
def world():
    return synthetic_world(7, **SMALL)


def everything(world):
    data, fields = world.dataset, ("user", "item", "action", "time", "offsets")
    arrays = [getattr(data.log, f) for f in fields] + [data.catalogue.items.content, data.catalogue.items.ids["category"]]
    return [*arrays, world.popularity, world.topic, world.observable]


def test_the_same_seed_gives_the_same_world_which_is_that_of_the_records(world):
    again, other = synthetic_world(7, **SMALL), synthetic_world(8, **SMALL)
    for a, b in zip(everything(world), everything(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(world.dataset.log.item, other.dataset.log.item)
    log = world.dataset.log  # recorded results of the study are of these draws
    digest = hashlib.sha256(b"".join(getattr(log, name).tobytes() for name in ("user", "item", "action", "time"))).hexdigest()
    assert digest == "252336cc6362091d5fa05571213dd12141c93f96dcc2fc9bc27683b8f7e2652d"


def test_features_are_those_of_raw_events():
    """Without ties, whose order the log keeps as they happened and the encoder by item."""
    data, position = synthetic_world(7, **SMALL | {"users": 3}, tie_rate=0.0).dataset, 300
    before = slice(data.log.offsets[data.log.user[position]], position)
    raw = {"item": data.items.raw[data.log.item[before] - 1], "action": data.log.action[before], "time": data.log.time[before]}
    encoded = dataclasses.replace(data.encoder, length=32).user(None, raw, data.log.time[position])
    offline = data.user_features([position], length=32).history
    for field in ("item", "action", "age", "mask"):
        np.testing.assert_array_equal(getattr(encoded.history, field), getattr(offline, field)[0], field)


def test_sizes_what_a_model_sees_and_which_events_are_observable(world):
    data = world.dataset
    assert (len(data.users) - 1, len(data.items) - 1, len(data.log)) == (150, 300, 150 * 120)
    assert [a.name for a in data.schema.item_attributes] == ["item", "category"] and data.schema.content == 16
    assert set(np.unique(data.log.action)) == {1, 2}
    np.testing.assert_array_equal(data.catalogue.items.ids["category"], world.category + 1)
    early = data.log.history_end(np.arange(len(data.log))) - data.log.offsets[data.log.user] < 32
    assert not world.observable[early].any() and world.observable[~early].mean() > 0.95


def lift_by_hand(world, position, row, lag=16, recent=4):
    """The docstring's formula for one event and one item, counted event by event."""
    log, weights = world.dataset.log, np.array([0.4, 0.2, 0.2, 0.2])
    history = [p for p in range(len(log)) if log.user[p] == log.user[position] and log.time[p] < log.time[position]]
    topics = [int(world.topic[log.item[p]]) for p in history]
    categories = [int(world.category[log.item[p]]) for p in history]
    far, near, last = topics[:-lag], topics[-lag:], topics[-recent:]
    resting = {k: far.count(k) ** 2 for k in set(far) if k not in near}
    k, c = world.topic[row], world.category[row]
    share_k, share_c = world.popularity[world.topic == k].sum(), world.popularity[world.category == c].sum()
    long_term = resting.get(int(k), 0) / sum(resting.values())
    short_term = last.count(int(k)) / len(last)
    local = categories.count(int(c)) ** 2 / sum(categories.count(x) ** 2 for x in set(categories))
    return weights @ [long_term / share_k, short_term / share_k, local / share_c, 1]


def test_truth_is_the_formula(world):
    log, rng = world.dataset.log, np.random.default_rng(0)
    positions = rng.choice(np.flatnonzero(world.observable), 12)
    rows = rng.integers(1, 301, (12, 3))
    rows[:, 0] = log.item[positions]
    found = world.lift(positions, rows)
    expected = [[lift_by_hand(world, p, r) for r in row] for p, row in zip(positions, rows, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(world.probability(positions, rows), expected * world.popularity[rows], rtol=1e-12)
    np.testing.assert_array_equal(world.lift(positions, rows[:, 0]), found[:, 0])


@pytest.mark.parametrize("weights", [{}, {"noise": 0.0}, {"long_term": 0.0}])
def test_probabilities_sum_to_one_at_every_event(weights):
    world = synthetic_world(3, **SMALL, **weights)
    positions = np.r_[0:240:3, np.random.default_rng(0).choice(len(world.dataset.log), 100)]  # whole first histories too
    items = np.tile(np.arange(1, 301), (len(positions), 1))
    np.testing.assert_allclose(world.probability(positions, items).sum(axis=1), 1, rtol=1e-9)


@pytest.mark.parametrize("source", ["all", "long_term", "short_term", "category_locality"])
def test_events_are_drawn_from_the_truth(source):
    """The mean log probability of what happened is its expectation, within what chance allows."""
    world = synthetic_world(7, **SMALL, **({} if source == "all" else OFF | {"noise": 0.2, source: 0.8}))
    positions = np.arange(0, len(world.dataset.log), 6)
    p = world.probability(positions, np.tile(np.arange(1, 301), (len(positions), 1)))
    log_p = np.log(p)
    expected = (p * log_p).sum(axis=1)
    variance = (p * log_p**2).sum(axis=1) - expected**2
    surprise = np.log(world.probability(positions, world.dataset.log.item[positions])) - expected
    assert abs(surprise.sum()) < 4 * np.sqrt(variance.sum())
    # and not from another distribution: under popularity alone the sum would lie far outside
    assert abs(((world.popularity[1:] * log_p).sum(axis=1) - expected).sum()) > 20 * np.sqrt(variance.sum())


def test_without_noise_nothing_else_happens():
    world = synthetic_world(7, **SMALL, noise=0.0)
    assert (world.lift(np.arange(len(world.dataset.log)), world.dataset.log.item) > 0).all()


def test_first_events_have_topics_by_popularity_where_only_the_moment_counts():
    world = synthetic_world(7, **SMALL | {"users": 2000, "events_per_user": 2}, **OFF | {"noise": 0.0, "short_term": 1.0})
    first = world.topic[world.dataset.log.item[world.dataset.log.offsets[1:-1]]]
    share = np.bincount(world.topic[1:], weights=world.popularity[1:])
    assert (np.abs(np.bincount(first, minlength=25) / 2000 - share) < 4.5 * np.sqrt(share * (1 - share) / 2000)).all()


def test_clicks_are_drawn_from_the_truth(world):
    log = world.dataset.log
    p, clicked = world.click_probability(np.arange(len(log)), log.item), log.action == CLICK
    for low, high in ((0, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1)):
        inside = (p >= low) & (p < high)
        assert inside.sum() > 100
        assert abs((clicked - p)[inside].sum()) < 4 * np.sqrt((p * (1 - p))[inside].sum())


def test_content_shows_the_topic_and_the_category_does_not(world):
    content = world.dataset.catalogue.items.content[1:]
    np.testing.assert_allclose(np.linalg.norm(content, axis=1), 1, rtol=1e-5)
    similarity, topic, category = content @ content.T, world.topic[1:], world.category[1:]
    pairs = np.triu_indices(300, 1)
    assert metrics.auc(similarity[pairs], (topic[:, None] == topic)[pairs]) > 0.99
    assert metrics.auc(similarity[pairs], (category[:, None] == category)[pairs]) == pytest.approx(0.5, abs=0.03)


def test_ties_share_their_truth(world):
    log = world.dataset.log
    tied = np.flatnonzero((log.user[1:] == log.user[:-1]) & (log.time[1:] == log.time[:-1]))
    assert 0.13 < len(tied) / len(log) < 0.17
    positions, items = tied[::20], np.tile(np.arange(1, 301), (len(tied[::20]), 1))
    np.testing.assert_array_equal(world.lift(positions, items), world.lift(positions + 1, items))
    untied = synthetic_world(7, **SMALL, tie_rate=0.0).dataset.log
    assert (np.diff(untied.time)[untied.user[1:] == untied.user[:-1]] > 0).all()
