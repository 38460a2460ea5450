r"""A synthetic world whose truth is known: what each block of a model is for is planted.

**Items.** Item i has a popularity pop_i ~ rank^-skew, a hidden topic k_i and a category c_i, drawn independently of each other.
The content embedding shows the topic: unit(centre of k_i + spread * noise). The category is an ordinary attribute.

**Events.** Let h be the user's events strictly earlier than the sample (ties are left out, as a model's history leaves them
out), *near* the latest `lag` of them, *far* the others, *last* the latest `recent`; n_w(x) counts the events of topic or
category x in window w. The next item is drawn from a mixture of four:

    P(i | h) = pop_i * lift(i, h)
    lift(i, h) = noise + long_term         * L(k_i) / pop(k_i)
                       + short_term        * S(k_i) / pop(k_i)
                       + category_locality * C(c_i) / pop(c_i)

    L(k) ~ n_far(k)^2 where n_near(k) = 0, else 0     interests that rest: only the far history shows them
    S(k) = n_last(k) / |last|                         topics of the moment
    C(c) ~ n_h(c)^2                                   categories of the whole history

pop(k) and pop(c) are sums of pop_i; the four weights are scaled to sum 1. The truth is a function of the history and of fixed
properties of the item, so a model can reach it. Only a user's first 2 * `lag` events (and the few later ones where no far
topic rests) come from hidden preferences: L is then uniform over `interests` topics and C over `favourites` categories of that
user. `World.observable` is false for those samples. A first event has S(k) = pop(k).

**Clicks.** Each event is a click (action 2) with probability lift / (lift + m), else merely seen (action 1); m is the median
lift of all events. Clicks do not change what comes next.

**Long views.** The second objective, which the log does not hold: a clicked item is watched for long with probability
sigmoid(g_i - 1). Its signal is another one: the hidden quality g_i of the item, the sum of a normal number of its topic and one
of its category over sqrt 2, says nothing of clicks, and histories say nothing of it.

Users come back to items: negatives must not leave out what the user has seen, or the truth is another one.
The signals are those that SIM (2006.05639), ETA (2108.04468) and SimTier (2407.19467) are made for.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from aif_jax import Catalogue, Columns, Dataset, EventLog, Vocabulary
from aif_jax.encoding.encoder import Encoder
from experiments.datasets.content import unit_rows

SEEN, CLICK = 1, 2
SKEW, SPREAD, MEAN_GAP = 0.8, 0.5, 6 * 3600
"""Popularity of the r-th item ~ r^-SKEW, length of the noise round a topic's centre, seconds between events that do not tie."""
SMALL: dict[str, Any] = dict(users=40, items=120, topics=12, categories=8, events_per_user=60, lag=8, content_dim=12)
"""Sizes of a world for smoke runs."""


@dataclasses.dataclass(eq=False)
class Truth:
    """The mixture: draws events from it, then answers how likely any item was at any of them.

    Positions are user * events_per_user + event; users and events count from 0, item rows from 1.
    """

    popularity: np.ndarray
    topic: np.ndarray
    category: np.ndarray
    shares: tuple[float, ...]  # long term, short term, categories, noise
    lag: int
    recent: int
    interests: np.ndarray  # int [users, interests]
    favourites: np.ndarray  # int [users, favourites]

    def __post_init__(self):
        self._topic_items, self._category_items = (_Groups(of, self.popularity) for of in (self.topic, self.category))
        self._any_item = _Groups(np.where(self.topic < 0, -1, 0), self.popularity)

    def simulate(self, rng: np.random.Generator, length: np.ndarray) -> np.ndarray:
        """Draw int [users, events] item rows; length [users, events] is the number of strictly earlier events of each."""
        users, events = length.shape
        item = np.zeros((users, events), np.int64)
        near, far = (np.zeros((users, len(self._topic_items)), np.int64) for _ in range(2))
        met = np.zeros((users, len(self._category_items)), np.int64)
        far_mass, category_mass = np.zeros((users, events)), np.zeros((users, events))
        everyone, counted = np.arange(users), np.zeros(users, np.int64)
        for event in range(events):
            h = length[:, event]
            while (counted < h).any():  # moves the windows on to the strictly earlier events
                who = np.flatnonzero(counted < h)
                entering = item[who, counted[who]]
                met[who, self.category[entering]] += 1
                near[who, self.topic[entering]] += 1
                old = who[counted[who] >= self.lag]
                leaving = self.topic[item[old, counted[old] - self.lag]]
                near[old, leaving] -= 1
                far[old, leaving] += 1
                counted[who] += 1
            resting, squared = np.cumsum(np.square(far) * (near == 0), axis=1), np.cumsum(np.square(met), axis=1)
            far_mass[:, event], category_mass[:, event] = resting[:, -1], squared[:, -1]
            formative = h < 2 * self.lag

            hidden = self.interests[everyone, rng.integers(self.interests.shape[1], size=users)]
            long_term = np.where(formative | (resting[:, -1] == 0), hidden, _draw(rng, resting))
            before = h - 1 - (rng.random(users) * np.minimum(h, self.recent)).astype(np.int64)
            short_term = self.topic[item[everyone, np.maximum(before, 0)]]
            hidden = self.favourites[everyone, rng.integers(self.favourites.shape[1], size=users)]
            local = np.where(formative, hidden, _draw(rng, squared))

            source = np.searchsorted(np.cumsum(self.shares), rng.random(users), side="right")
            source[(source == 1) & (h == 0)] = 3  # no topic of the moment yet
            at = rng.random(users)
            by_topic = self._topic_items.item(np.where(source == 1, short_term, long_term), at)
            by_category = self._category_items.item(local, at)
            by_popularity = self._any_item.item(np.zeros(users, np.int64), at)
            item[:, event] = np.choose(np.minimum(source, 3), [by_topic, by_topic, by_category, by_popularity])
        self.far_mass, self.category_mass = far_mass.ravel(), category_mass.ravel()
        self.formative = (length < 2 * self.lag).ravel()
        self._topic_events = _Occurrences(self.topic[item], len(self._topic_items))
        self._category_events = _Occurrences(self.category[item], len(self._category_items))
        return item

    def lift(self, position: np.ndarray, user: np.ndarray, length: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return lift(i, h) of item rows; the other arguments broadcast against them."""
        topic, category = self.topic[rows], self.category[rows]
        topic_share, category_share = self._topic_items.share[topic], self._category_items.share[category]
        formative, mass = self.formative[position], self.far_mass[position]

        far = np.maximum(length - self.lag, 0)
        rests = self._topic_events.count(user, topic, far, length) == 0
        remembered = rests * self._topic_events.count(user, topic, 0, far) ** 2 / np.maximum(mass, 1)
        long_term = np.where(formative | (mass == 0), _uniform(self.interests, user, topic), remembered)

        last = np.minimum(length, self.recent)
        moment = self._topic_events.count(user, topic, length - last, length) / np.maximum(last, 1)
        short_term = np.where(last == 0, topic_share, moment)

        met = self._category_events.count(user, category, 0, length) ** 2 / np.maximum(self.category_mass[position], 1)
        local = np.where(formative, _uniform(self.favourites, user, category), met)

        resting, of_the_moment, by_category, by_chance = self.shares
        by_topic = (resting * long_term + of_the_moment * short_term) / topic_share
        return by_chance + by_topic + by_category * local / category_share


class _Groups:
    """Items by topic or category; draws one of a group by popularity."""

    def __init__(self, group: np.ndarray, popularity: np.ndarray):
        self._rows = np.argsort(group, kind="stable")
        self._cumulative = np.cumsum(popularity[self._rows])
        last = np.searchsorted(group[self._rows], np.arange(group.max() + 1), side="right") - 1
        self._bounds = np.append(0, self._cumulative[last])  # group -1, the unknown item, comes first and weighs nothing
        self._last = last
        self.share = np.diff(self._bounds)

    def __len__(self) -> int:
        return len(self.share)

    def item(self, group: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Return an item row of each group for a number in [0, 1)."""
        at = np.searchsorted(self._cumulative, self._bounds[group] + uniform * self.share[group], side="right")
        return self._rows[np.minimum(at, self._last[group])]  # rounding may step over a group's end


class _Occurrences:
    """How often a label occurs in a stretch of a user's events, by binary search."""

    def __init__(self, labels: np.ndarray, size: int):
        users, self._events = labels.shape
        self._size = size
        self._keys = np.sort(self._key(np.arange(users)[:, None], labels, np.arange(self._events)).ravel())

    def count(self, user: np.ndarray, label: np.ndarray, start: Any, stop: Any) -> np.ndarray:
        """Return events of the user with that label among events start:stop."""
        return np.searchsorted(self._keys, self._key(user, label, stop)) - np.searchsorted(
            self._keys, self._key(user, label, start)
        )

    def _key(self, user: np.ndarray, label: np.ndarray, event: Any) -> np.ndarray:
        return (user * np.int64(self._size) + label) * (self._events + 1) + event


def _draw(rng: np.random.Generator, cumulative: np.ndarray) -> np.ndarray:
    """Return a column of each row, with the probabilities whose running sums, times any factor, are given."""
    return (cumulative > rng.random((len(cumulative), 1)) * cumulative[:, -1:]).argmax(axis=1)


def _uniform(preferred: np.ndarray, user: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Return 1 / count where the label is one of the user's `count` preferred ones, else 0."""
    user, label = np.broadcast_arrays(user, label)
    return sum((preferred[user, i] == label for i in range(preferred.shape[1])), np.zeros(label.shape)) / preferred.shape[1]


class World(NamedTuple):
    """A data set and the truth behind it."""

    dataset: Dataset  # what a model may see
    popularity: np.ndarray  # float64 [N], sums to 1; row 0 is 0
    topic: np.ndarray  # int32 [N] hidden topic, -1 in row 0
    category: np.ndarray  # int32 [N] the schema's category minus 1, -1 in row 0
    quality: np.ndarray  # float64 [N] hidden quality g, 0 in row 0
    observable: np.ndarray  # bool [n] whether the truth at an event depends on its history alone
    median_lift: float  # m of the click probability
    truth: Truth

    def lift(self, positions: Any, items: Any) -> np.ndarray:
        """Return how much likelier than its popularity each item is to be the next one, float64 of the shape of `items`.

        Args:
          positions: [B] integer positions of events in the log; the history is what is strictly earlier.
          items: [B] or [B, C] integer catalogue rows, at least 1.
        """
        log = self.dataset.log
        at, rows = np.asarray(positions), np.asarray(items)
        length = log.history_end(at) - log.offsets[log.user[at]]
        shape = (len(at), *[1] * (rows.ndim - 1))
        return self.truth.lift(at.reshape(shape), log.user[at].reshape(shape) - 1, length.reshape(shape), rows)

    def probability(self, positions: Any, items: Any) -> np.ndarray:
        """Return P(i | h), how likely each item is to be the next one; arguments and result as those of `lift`."""
        return self.lift(positions, items) * self.popularity[np.asarray(items)]

    def click_probability(self, positions: Any, items: Any) -> np.ndarray:
        """Return how likely a click is where the item is shown; arguments and result as those of `lift`."""
        lift = self.lift(positions, items)
        return lift / (lift + self.median_lift)


def synthetic_world(
    seed: int = 0,
    *,
    users: int = 500,
    items: int = 2000,
    categories: int = 100,
    topics: int = 100,
    events_per_user: int = 300,
    long_term: float = 0.4,
    short_term: float = 0.2,
    category_locality: float = 0.2,
    noise: float = 0.2,
    lag: int = 32,
    recent: int = 4,
    interests: int = 10,
    favourites: int = 3,
    content_dim: int = 32,
    tie_rate: float = 0.15,
) -> World:
    """Make a world, the same for the same seed and knobs; the module's docstring has the formulas.

    Args:
      users, items, categories, topics, events_per_user: sizes; users and items without the unknown row.
      long_term, short_term, category_locality, noise: weights of the four sources; 0 switches one off.
      lag: how many events separate the far history from now; a model with a shorter window cannot see long-term interests.
      recent: events that make up the short-term interest.
      interests, favourites: hidden topics and categories of a user, which fill the first 2 * lag events.
      tie_rate: share of events that have the time of the one before.

    Example:
      >>> world = synthetic_world(users=20, items=100, topics=10, categories=5, interests=2, events_per_user=80)
      >>> world.probability([70], np.arange(1, 101)[None]).sum().round(9)
      np.float64(1.0)
    """
    weights = np.array([long_term, short_term, category_locality, noise])
    rng = np.random.default_rng(seed)
    popularity = rng.permutation((1.0 + np.arange(items)) ** -SKEW)
    popularity = np.append(0, popularity / popularity.sum())
    topic, category = (np.append(-1, rng.permutation(np.arange(items) % n)).astype(np.int32) for n in (topics, categories))
    centres = unit_rows(rng.standard_normal((topics, content_dim)))
    scatter = rng.standard_normal((items, content_dim)) * SPREAD / np.sqrt(content_dim)
    content = unit_rows(centres[topic[1:]] + scatter)

    time, length = _times(rng, users, events_per_user, tie_rate)
    preferred = _choose(rng, users, topics, interests), _choose(rng, users, categories, favourites)
    truth = Truth(popularity, topic, category, tuple(weights / weights.sum()), lag, recent, *preferred)
    chosen = truth.simulate(rng, length)

    user, position = np.arange(users * events_per_user) // events_per_user, np.arange(users * events_per_user)
    lift = truth.lift(position, user, length.ravel(), chosen.ravel())
    median = float(np.median(lift))
    clicked = rng.random(len(lift)) * (lift + median) < lift
    action = np.where(clicked, CLICK, SEEN)
    # From another generator: what it draws changes no other number of the world.
    quality = _quality(np.random.default_rng((seed, 1)), topic, category)
    columns = Columns(action="action", actions=(SEEN, CLICK))
    counts = {"user": users, "item": items, "category": categories}
    vocabularies = {name: Vocabulary(np.arange(1, count + 1)) for name, count in counts.items()}
    encoder = Encoder(columns=columns, vocabularies=vocabularies, content=content_dim)
    dataset = Dataset(
        name="synthetic",
        log=EventLog(user + 1, chosen.ravel(), action, time.ravel(), users=users + 1),
        catalogue=Catalogue.from_items(
            encoder.schema, vocabularies["item"].raw, ids={"category": category[1:] + 1}, content=content
        ),
        user_ids={},
        user_floats=np.zeros((users + 1, 0), np.float32),
        users=vocabularies["user"],
        items=vocabularies["item"],
        encoder=encoder,
    )
    observable = ~(truth.formative | (truth.far_mass == 0))
    return World(dataset, popularity, topic, category, quality, observable, median, truth)


def _times(rng: np.random.Generator, users: int, events: int, tie_rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Return seconds int64 [users, events] in ascending order, and how many events of the user are strictly earlier."""
    new = rng.random((users, events)) >= tie_rate
    new[:, 0] = True
    gap = np.where(new, 1 + rng.exponential(MEAN_GAP, (users, events)), 0).astype(np.int64)
    gap[:, 0] = 1_500_000_000 + rng.random(users) * (1 - tie_rate) * MEAN_GAP * events / 2  # users begin at different times
    earlier = np.maximum.accumulate(np.where(new, np.arange(events), 0), axis=1)
    return np.cumsum(gap, axis=1), earlier


def _quality(rng: np.random.Generator, topic: np.ndarray, category: np.ndarray) -> np.ndarray:
    """Return float64 [N] hidden quality: what its topic and its category add; 0 for the unknown item."""
    parts = [rng.normal(size=group.max() + 1)[group] for group in (topic, category)]
    return np.where(topic < 0, 0, sum(parts) / np.sqrt(2))


def _choose(rng: np.random.Generator, users: int, size: int, count: int) -> np.ndarray:
    """Return `count` different values below `size` for each user."""
    return np.argsort(rng.random((users, size)), axis=1)[:, :count]
