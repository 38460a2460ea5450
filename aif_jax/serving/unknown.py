"""How much of a user's features the model does not know: ids of another table, or of another encoder, are row 0 throughout."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from aif_jax.index.storage import Layout
from aif_jax.schema import Schema
from aif_jax.types import Streamed, UserFeatures

LEAST_EVENTS = 5
"""Events that a history must have before its unknown share marks an answer."""


class Known(NamedTuple):
    """Counts of one user's features."""

    events: int = 0  # of the history; of a row those that it keeps one by one
    items: int = 0  # events whose item is unknown
    actions: int = 0  # events whose action is unknown
    attributes: int = 0  # of the user, unknown or missing

    def warning(self, bound: float | None) -> str | None:
        """Why an answer is marked: a share of unknown items or actions above the bound. None where it is not."""
        if bound is None or self.events < LEAST_EVENTS or max(self.items, self.actions) <= bound * self.events:
            return None
        unknown = f"{self.items} of {self.events} events have an unknown item, {self.actions} an unknown action"
        return f"history: {unknown}, more than max_unknown={bound}; expected ids and actions as the model's encoder read them"


def known_of(schema: Schema, features: UserFeatures) -> Known:
    """Counts of checked features of NumPy arrays."""
    attributes = sum(not np.any(value) for value in features.ids.values())
    history: Any = features.history
    if not isinstance(history, Streamed):
        return _known(history.item, history.action, history.mask, attributes)
    since: Any = history.since
    words, (code, time, count) = history.memory.words, _recent(history.memory.layout)
    item, action = np.divmod(words[code : code + count], np.uint32(schema.actions))
    kept = _known(item, action, words[time : time + count] > 0)
    new = _known(since.item, since.action, since.time > 0)
    return Known(kept.events + new.events, kept.items + new.items, kept.actions + new.actions, attributes)


def _known(item: np.ndarray, action: np.ndarray, mask: np.ndarray, attributes: int = 0) -> Known:
    events, items, actions = (int(np.count_nonzero(there)) for there in (mask, mask & (item == 0), mask & (action == 0)))
    return Known(events, items, actions, attributes)


@functools.lru_cache(maxsize=16)
def _recent(layout: Layout) -> tuple[int, int, int]:
    """Where the codes and the times of the last events begin among the words of a row, and how many there are."""
    starts = np.cumsum([0, *(column.words for column in layout.columns)])
    places: Any = jax.tree.unflatten(layout.tree, range(len(layout.columns)))
    code, time = places.recent.code, places.recent.time
    return int(starts[code]), int(starts[time]), layout.columns[code].words
