"""Item statistics: how popular an item is at a moment, by exponentially decayed counts of the events before it."""

from typing import Any

import numpy as np

from aif_jax.checks import expect_integers
from aif_jax.data.events import EventLog
from aif_jax.schema import Schema

HOUR = 3600
SCALE = 4.0  # the logarithms below are up to about 16: divided by it they are of the size of other inputs
SMOOTHING = 20.0  # events of the average rate that an item's own are added to


class ItemStatistics:
    """Popularity of items as of a moment, from events that are strictly earlier.

    For an item with n events before the moment, s_i seconds before it, and each half-life h:

        log(1 + n),   log(1 + sum_i 2^(-s_i / h)),   log(1 + hours since the first),   log(1 + hours since the last)

    divided by 4; all are 0 for an item without an earlier event and for row 0. With `Schema.statistic_actions` the first two
    are of each, n_a events of it, and are followed by how often it is the one taken, smoothed and compared with all items:

        log(((n_a + 20 p_a) / (sum_b n_b + 20)) / p_a),   with p_a its share of all earlier events of these actions

    also divided by 4. A value depends on no event at or after the moment: training reads the statistics as of each sample, from
    the whole log, and serving as of the last refresh, from the events so far.

    Building takes O(n log n), reading one item a binary search. Memory for each event: 16 bytes and 8 a half-life, with
    these actions 32 and 8.

    Args:
      schema: half-lives, actions that count apart, and how many items there are.
      log: events of any action.
    """

    def __init__(self, schema: Schema, log: EventLog):
        self._items, self.width = schema.table_sizes["item"], len(schema.statistics)
        lives, actions = np.array(schema.item_statistics, np.float64), range(1, len(schema.statistic_actions) + 1)
        self._all = _Counts(log.item, log.time, self._items, lives[:0] if actions else lives)
        of_action = [log.action == row for row in actions]
        self._apart = [_Counts(log.item[where], log.time[where], self._items, lives) for where in of_action]

    def at(self, rows: Any, times: Any) -> np.ndarray:
        """Return statistics float32 [..., width] of item rows of any shape at moments, seconds that broadcast to that shape.

        [B, 1] moments are for candidates [B, C] of samples. TypeError or ValueError for rows out of range.
        """
        rows = expect_integers(rows, "rows", size=self._items).astype(np.int64)
        times = np.broadcast_to(np.asarray(times, np.int64), rows.shape)
        kinds, values = self._apart or [self._all], []
        counts = np.stack([each.before(rows, times) for each in kinds], -1)
        all_items = np.stack([np.searchsorted(each.times, times) for each in kinds], -1)
        share = all_items / np.maximum(all_items.sum(-1, keepdims=True), 1)  # of an action, as items without events have it
        rates = (counts + SMOOTHING * share) / (counts.sum(-1, keepdims=True) + SMOOTHING)
        rates = np.log(np.divide(rates, share, out=np.ones_like(rates), where=share > 0))
        for place, each in enumerate(kinds):
            values += [np.log1p(counts[..., place, None]), np.log1p(each.decayed(rows, times))]
            values += [rates[..., place, None]] if self._apart else []
        hours, met = self._all.since(rows, times) / HOUR, (self._all.before(rows, times) > 0) & (rows > 0)
        return np.where(met[..., None], np.concatenate([*values, np.log1p(hours)], -1) / SCALE, 0).astype(np.float32)


class _Counts:
    """Events of one kind, by item and then by time; without half-lives they are only counted."""

    def __init__(self, item: np.ndarray, time: np.ndarray, items: int, lives: np.ndarray):
        self._start, end = (int(time.min()), int(time.max())) if len(time) else (0, 0)
        self._span = end - self._start + 2
        self._keys = np.append(np.sort(item.astype(np.int64) * self._span + (time - self._start)), items * self._span)
        self._first = np.searchsorted(self._keys, np.arange(items + 1, dtype=np.int64) * self._span)
        self.times = np.sort(time)  # of unknown items too: a rate stays as it is when items are forgotten
        self._lives, self._sums = lives, self._decayed_sums(lives)

    def before(self, rows: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Return int64: events of items strictly before moments."""
        place = np.clip(times - self._start, 0, self._span - 1)  # later than all events: all of them
        return np.searchsorted(self._keys, rows * self._span + place) - self._first[rows]

    def since(self, rows: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Return int64 [..., 2]: seconds since an item's first and its last event before moments; 0 without one."""
        count = self.before(rows, times)
        places = np.stack([self._first[rows], self._first[rows] + count - 1], -1)
        seconds = times[..., None] - self._start - self._keys[np.where(count[..., None] > 0, places, 0)] % self._span
        return np.where(count[..., None] > 0, seconds, 0)

    def decayed(self, rows: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Return float64 [..., half-lives]: decayed counts of an item's events before moments."""
        count = self.before(rows, times)
        last, gap = np.where(count > 0, self._first[rows] + count - 1, 0), self.since(rows, times)[..., 1:]
        return np.where(count[..., None] > 0, self._sums[last] * np.exp2(-gap / self._lives), 0.0)

    def _decayed_sums(self, lives: np.ndarray) -> np.ndarray:
        """Return decayed counts [n, half-lives] of an item's events up to each event, that one included.

        The sum over the last 2 m events is that over the last m and, decayed, that over the m before them.
        """
        row, time = np.divmod(self._keys, self._span)
        place, sums, step = np.arange(len(time)) - self._first[row], np.ones((len(time), len(lives))), 1
        while len(later := np.flatnonzero(place >= step)):
            sums[later] += sums[later - step] * np.exp2(-(time[later] - time[later - step])[:, None] / lives)
            step *= 2
        return sums
