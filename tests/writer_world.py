"""An item index that a writer keeps, a stream of updates for it, and what it comes to.

Nothing runs when this is imported, so that a fork server may import it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import aif_jax as aif
from aif_jax.index import IndexWriter, ItemIndex, inspect
from aif_jax.index.writer import snapshots

SCHEMA = aif.Schema(item_attributes=(aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=3)), item_floats=8)
CONFIG = aif.Config(schema=SCHEMA, width=8)
PARAMS = {"item": {"scale": np.float32(3)}, "fitted": {}}
made = dict(init=lambda *_, **__: PARAMS, item=lambda p, f: {"vector": f.floats * p["item"]["scale"], "item": f.ids["item"]})
MODEL = aif.build(CONFIG)._replace(**made)  # compiles in no time: these tests are about files and processes
TRAINED = aif.Trained(MODEL, PARAMS)


def features(numbers: Any) -> aif.ItemFeatures:
    """Features of items, each known by one number."""
    numbers = np.asarray(numbers)
    item = (numbers % 9).astype(np.int32)
    floats = (numbers[:, None] + np.arange(8) / 8).astype(np.float32)
    return aif.ItemFeatures(ids={"item": item, "category": item % 3}, floats=floats)


def build(
    ids: Any = (5, 6, 7), numbers: Any = (1, 2, 3), params: Any = PARAMS, encoder: Any = None, **options: Any
) -> ItemIndex:
    """An index of items by their numbers."""
    options = {"batch_size": 16, "progress": False, **options}
    return ItemIndex.build(aif.Trained(MODEL, params, encoder), [(list(ids), features(numbers))], **options)


class Items:
    """An index in a directory of snapshots, with a stream of numbered updates in partitions: items come, change and go.

    The update `number` of partition 0 or 1 is the same at every call. `at` tells its position, which may rise with gaps.
    """

    def __init__(self, directory: Path, *, at: Callable[[int], int] = int):
        self.directory, self.at = directory, at

    def start(self, **options: Any) -> Any:
        """A writer of the first index."""
        return IndexWriter.start(self.directory, build(), **options)

    def resume(self, **options: Any) -> Any:
        """A writer that goes on."""
        return IndexWriter.resume(self.directory, TRAINED, **options)

    def positions(self) -> list[int]:
        """Of partition 0, in every complete snapshot."""
        return [inspect(folder).positions.get(0, 0) for folder in snapshots(self.directory)]

    @staticmethod
    def change(partition: int, number: int) -> tuple[list[int], list[int] | None]:
        """Ids of items of that partition, odd in partition 1, and their new numbers or None for a deletion."""
        odd = int(partition == 1)
        rng = np.random.default_rng((odd, number))
        ids = (rng.choice(30, 4, replace=False) * 2 + odd).tolist()
        return ids, None if rng.random() < 0.25 else rng.integers(0, 1 << 16, 4).tolist()

    def apply(self, writer: Any, number: int, *, position: Any = ..., partition: Any = 0) -> bool:
        """Gives an update to a writer, by default of partition 0 at its own position."""
        ids, numbers = self.change(partition, number)
        place = {"position": self.at(number) if position is ... else position, "partition": partition}
        return writer.delete(ids, **place) if numbers is None else writer.upsert(ids, features(numbers), **place)

    def numbers(self, counts: dict[int, int]) -> dict[int, int]:
        """The number of each item after so many updates of each partition."""
        items = {5: 1, 6: 2, 7: 3}
        for partition, count in counts.items():
            for number in range(1, count + 1):
                ids, numbers = self.change(partition, number)
                for place, item in enumerate(ids):
                    items.pop(item, None) if numbers is None else items.update({item: numbers[place]})
        return dict(sorted(items.items()))

    def holds(self, table: ItemIndex, counts: dict[int, int]) -> bool:
        """Whether an index is what so many updates of each partition make of the first one, bit for bit."""
        items = self.numbers(counts)
        ids, columns = table.stored()
        expected = features(list(items.values()))  # by NumPy alone
        vector = np.asarray(expected.floats) * PARAMS["item"]["scale"]
        equal = np.array_equal(columns["vector"], vector) and np.array_equal(columns["item"], expected.ids["item"])
        return len(table) == len(items) and np.array_equal(ids, list(items)) and equal
