"""The mixture behind the synthetic world: events are drawn from it, and it says how likely any item was; see `synthetic`."""

from __future__ import annotations

from typing import Any

import numpy as np


class Truth:
    """The mixture: draws events from it, then answers how likely any item was at any of them.

    Positions are user * events_per_user + event; users and events count from 0, item rows from 1.
    """

    def __init__(
        self,
        *,
        popularity: np.ndarray,
        topic: np.ndarray,
        category: np.ndarray,
        shares: tuple[float, ...],  # long term, short term, categories, noise
        lag: int,
        recent: int,
        interests: np.ndarray,  # int [users, interests]
        favourites: np.ndarray,  # int [users, favourites]
    ):
        self.topic, self.category, self.shares, self.lag, self.recent = topic, category, shares, lag, recent
        self.interests, self.favourites = interests, favourites
        self._topic_items, self._category_items = _Groups(topic, popularity), _Groups(category, popularity)
        self._any_item = _Groups(np.where(topic < 0, -1, 0), popularity)

    def simulate(self, rng: np.random.Generator, length: np.ndarray) -> np.ndarray:
        """Draws int [users, events] item rows; length [users, events] is the number of strictly earlier events of each."""
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
        """lift(i, h) of item rows; the other arguments broadcast against them."""
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
        """An item row of each group for a number in [0, 1)."""
        at = np.searchsorted(self._cumulative, self._bounds[group] + uniform * self.share[group], side="right")
        return self._rows[np.minimum(at, self._last[group])]  # rounding may step over a group's end


class _Occurrences:
    """How often a label occurs in a stretch of a user's events, by binary search."""

    def __init__(self, labels: np.ndarray, size: int):
        users, self._events = labels.shape
        self._size = size
        self._keys = np.sort(self._key(np.arange(users)[:, None], labels, np.arange(self._events)).ravel())

    def count(self, user: np.ndarray, label: np.ndarray, start: Any, stop: Any) -> np.ndarray:
        """Events of the user with that label among events start:stop."""
        return np.searchsorted(self._keys, self._key(user, label, stop)) - np.searchsorted(
            self._keys, self._key(user, label, start)
        )

    def _key(self, user: np.ndarray, label: np.ndarray, event: Any) -> np.ndarray:
        return (user * np.int64(self._size) + label) * (self._events + 1) + event


def _draw(rng: np.random.Generator, cumulative: np.ndarray) -> np.ndarray:
    """A column of each row, with the probabilities whose running sums, times any factor, are given."""
    return (cumulative > rng.random((len(cumulative), 1)) * cumulative[:, -1:]).argmax(axis=1)


def _uniform(preferred: np.ndarray, user: np.ndarray, label: np.ndarray) -> np.ndarray:
    """1 / count where the label is one of the user's `count` preferred ones, else 0."""
    user, label = np.broadcast_arrays(user, label)
    return sum((preferred[user, i] == label for i in range(preferred.shape[1])), np.zeros(label.shape)) / preferred.shape[1]
