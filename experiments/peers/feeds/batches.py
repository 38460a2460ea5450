"""What every feed shares: features of histories and items, batches with sampled negatives, a budget of processor time."""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.peers.lists import Lists

LENGTH = 50  # last events of a history


@dataclasses.dataclass(kw_only=True)
class Budget:
    """Processor seconds of this process, counted from the first batch.

    Attributes:
      seconds: how many there are.
      steps: batches that were begun.
      samples: positives in them.
      peak_mb: the most memory of the process until the last batch was begun.
    """

    seconds: float
    steps: int = 0
    samples: int = 0
    peak_mb: float = 0.0
    began: float | None = None

    def step(self, samples: int) -> None:
        """Counts a batch."""
        self.began = time.process_time() if self.began is None else self.began
        self.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.steps += 1
        self.samples += samples

    def left(self) -> bool:
        """Whether there is time for another batch; for the first one always."""
        return self.began is None or time.process_time() - self.began < self.seconds


class Samples:
    """Positives with their histories, and negatives drawn by count ** power as candidates are.

    Where users do not come back to items, what a user has a training event with is no negative: 0, no item, where five draws
    give nothing else.

    Args:
      lists: the slice.
      negatives: for each positive.
      seed: of order and negatives.
    """

    def __init__(self, lists: Lists, *, negatives: int, seed: int):
        self.lists, self.negatives = lists, negatives
        self.users, self.items, self.histories = lists.samples(LENGTH)
        self.rng = np.random.default_rng(seed)
        weights = lists.count ** float(lists.about["power"])
        weights[lists.count == 0] = 0
        self._cumulative = np.cumsum(weights) / weights.sum()
        self._met = np.unique(self._pair(lists.events["user"], lists.events["item"]))

    def order(self, size: int, among: np.ndarray, budget: Budget, *, rounded: int = 1) -> Iterator[np.ndarray]:
        """Places of positives, `size` at a time, in a new order each time round, until the budget is spent.

        Args:
          size: of a batch.
          among: places of the positives that are trained on.
          budget: counts the batches.
          rounded: the number of batches is a multiple of this.
        """
        places = iter(())
        while budget.left() or budget.steps % rounded:
            start = next(places, None)
            if start is None:
                among = self.rng.permutation(among)
                places = iter(range(0, max(len(among) - size + 1, 1), size))
                start = next(places)
            some = among[start : start + size]
            budget.step(len(some))
            yield some

    def lists_at(self, places: np.ndarray) -> np.ndarray:
        """The positive and its negatives, int32 [B, 1 + n]."""
        drawn = np.zeros((len(places), self.negatives), np.int64)
        for _ in range(1 if self.lists.about["repeats"] else 5):
            empty = drawn == 0
            drawn[empty] = np.searchsorted(self._cumulative, self.rng.random(empty.sum()), side="right")
            if not self.lists.about["repeats"]:
                drawn[np.isin(self._pair(self.users[places, None], drawn), self._met)] = 0
        return np.concatenate([self.items[places, None], drawn], axis=1).astype(np.int32)

    def _pair(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        return user.astype(np.int64) * len(self.lists.count) + item


def user_features(lists: Lists, histories: np.ndarray) -> dict[str, np.ndarray]:
    """Features [B, ...] of histories [B, LENGTH]: items, each single-valued field of them, mean content."""
    made = {"history": histories}
    made |= {f"history_{name}": ids[histories] for name, ids in lists.fields.items() if ids.ndim == 1}
    if lists.content is not None:
        length = np.maximum((histories > 0).sum(1, keepdims=True), 1)
        made["history_content"] = lists.content[histories].sum(1) / length  # row 0 is all zeros
    return made


def item_features(lists: Lists, items: np.ndarray) -> dict[str, np.ndarray]:
    """Features of items of any shape: the id, each single-valued field, content."""
    made = {"item": items} | {name: ids[items] for name, ids in lists.fields.items() if ids.ndim == 1}
    return made if lists.content is None else made | {"content": lists.content[items]}


def sizes(lists: Lists) -> dict[str, int]:
    """Rows of the embedding table of the item and of each single-valued field."""
    fields = {name: int(ids.max()) + 1 for name, ids in lists.fields.items() if ids.ndim == 1}
    return {"item": len(lists.count)} | fields


def tensors(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """The same as tensors of PyTorch; copies, since an array may be part of a file that is mapped."""
    import torch

    return {name: torch.tensor(values) for name, values in batch.items()}
