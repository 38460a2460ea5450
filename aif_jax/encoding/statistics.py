"""Item statistics: how popular an item is at a moment, by exponentially decayed counts of the events before it."""

from __future__ import annotations

from typing import Any

import numpy as np

from aif_jax.checks import expect, expect_integers

HOUR = 3600
SCALE = 4.0  # the logarithms below are up to about 16: divided by it they are of the size of other inputs


class ItemStatistics:
    """Popularity of items as of a moment, from events that are strictly earlier.

    For an item with n events before the moment, s_i seconds before it, and each half-life h:

        log(1 + n),   log(1 + sum_i 2^(-s_i / h)),   log(1 + hours since the first),   log(1 + hours since the last)

    divided by 4; all are 0 for an item without an earlier event and for row 0. A value depends on no event at or after the
    moment: the statistics of a log up to `now` are bit for bit those of a longer log as of `now`. So training reads them as of
    each sample, from the whole log, and serving as of the last refresh, from the events so far.

    Building them takes O(n log n), one item's statistics a binary search. Memory: 8 bytes and 8 a half-life for each event.

    Args:
      item: [n] item rows of the events, in any order; row 0 is the unknown item.
      time: [n] seconds of the events.
      items: N, rows of the catalogue.
      half_lives: seconds; at least one.

    Raises:
      TypeError, ValueError: rows out of range, no half-life, or one below a second.

    Example:
      >>> statistics = ItemStatistics([1, 1, 2], [0, 3600, 7200], items=3, half_lives=(3600,))
      >>> np.expm1(4 * statistics.at([1, 2], [7200, 7200])).round(3).tolist()
      [[2.0, 0.75, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    """

    def __init__(self, item: Any, time: Any, *, items: int, half_lives: tuple[int, ...]):
        good = len(half_lives) > 0 and min(half_lives) >= 1
        expect(good, "half_lives", "at least one, each of a second or more", half_lives)
        item, time = expect_integers(item, "item", size=items), np.asarray(time, np.int64)
        expect(item.shape == time.shape, "time", f"shape {list(item.shape)} like item", list(time.shape))
        self._lives = np.array(half_lives, np.float64)
        self._start, end = (int(time.min()), int(time.max())) if len(time) else (0, 0)
        self._span = end - self._start + 2
        self._keys = np.sort(item.astype(np.int64) * self._span + (time - self._start))  # by item, then by time
        self._first = np.searchsorted(self._keys, np.arange(items, dtype=np.int64) * self._span)
        self._sums = self._decayed()

    @property
    def width(self) -> int:
        """How many floats an item has."""
        return 3 + len(self._lives)

    def at(self, rows: Any, times: Any) -> np.ndarray:
        """Statistics float32 [..., width] of item rows of any shape at moments, seconds that broadcast to that shape.

        [B, 1] moments are for candidates [B, C] of samples. TypeError or ValueError for rows out of range.
        """
        count = self.counts(rows, times)
        rows, times = np.asarray(rows), np.broadcast_to(np.asarray(times, np.int64), count.shape)
        first, met = self._first[rows], (count > 0) & (rows > 0)
        last = np.where(met, first + count - 1, 0)
        first = np.where(met, first, 0)
        if not len(self._keys):
            return np.zeros((*rows.shape, self.width), np.float32)
        since = [np.maximum(times - self._start - self._keys[at] % self._span, 0) for at in (first, last)]
        sums = self._sums[last] * np.exp2(-since[1][..., None] / self._lives)
        hours = np.stack(since, -1) / HOUR
        found = np.concatenate([count[..., None], sums, hours], -1)
        return np.where(met[..., None], np.log1p(found) / SCALE, 0).astype(np.float32)

    def counts(self, rows: Any, times: Any) -> np.ndarray:
        """How many events of items are strictly earlier than moments, int64 of the shape of `rows`; arguments as for `at`."""
        rows = expect_integers(rows, "rows", size=len(self._first)).astype(np.int64)
        times = np.broadcast_to(np.asarray(times, np.int64), rows.shape)
        place = np.clip(times - self._start, 0, self._span - 1)  # later than all events: all of them
        return np.searchsorted(self._keys, rows * self._span + place) - self._first[rows]

    def _decayed(self) -> np.ndarray:
        """Decayed counts [n, half-lives] of an item's events up to each event, that one included.

        The sum over the last 2 m events is that over the last m and, decayed, that over the m before them.
        """
        row, time = np.divmod(self._keys, self._span)
        place, sums, step = np.arange(len(time)) - self._first[row], np.ones((len(time), len(self._lives))), 1
        while len(later := np.flatnonzero(place >= step)):
            gap = (time[later] - time[later - step])[:, None]
            sums[later] += sums[later - step] * np.exp2(-gap / self._lives)
            step *= 2
        return sums
