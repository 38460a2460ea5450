"""The two tables that a writer keeps, an item index and a user table: a stream of updates for each, and what it comes to.

Nothing runs when this is imported, so that a fork server may import it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import aif_jax as aif
from aif_jax.index import IndexWriter, ItemIndex
from aif_jax.store.snapshots import snapshots
from aif_jax.user_table import UserTable, UserTableWriter
from tests import demo

SCHEMA = aif.Schema(item_attributes=(aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=3)), item_floats=8)
CONFIG = aif.Config(schema=SCHEMA, width=8)
PARAMS = {"item": {"scale": np.float32(3)}}
# An item function that compiles in no time: these tests are about files and processes.
MODEL = aif.build(CONFIG)._replace(item=lambda params, f: {"vector": f.floats * params["item"]["scale"], "item": f.ids["item"]})
TRAINED = aif.Trained(MODEL, PARAMS)
T = 1_600_000_000


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
    return ItemIndex.build(aif.Trained(MODEL, params, encoder), features(numbers), ids=list(ids), **options)


@functools.cache
def shop() -> aif.Dataset:
    """Nine items, and their encoder."""
    events = {"user": [1, 2], "item": [0, 1], "time": [T, T]}
    return aif.read(events, items={"item": list(range(9)), "category": [0, 1, 2] * 3}, columns=aif.Columns(), progress=False)


@functools.cache
def users() -> aif.Trained:
    """A model whose users' rows hold sums, with an encoder."""
    data = shop()
    sizes: dict[str, Any] = dict(width=4, towers=(4,), head=(4,), short_length=4, long_length=8)
    model = aif.build(aif.presets.two_tower(data.schema, **sizes).replace(blocks=(aif.blocks.DecayedMemory(width=4),)))
    return aif.Trained(model, demo.init(model, items=data.catalogue), data.encoder).with_version("a" * 64)


def drawn(partition: Any, number: int) -> tuple[int, np.random.Generator]:
    """1 for partition 1, whose ids are odd, else 0; and the generator that draws the update of this number."""
    odd = int(partition == 1)
    return odd, np.random.default_rng((odd, number))


def rows(table: UserTable) -> dict[Any, tuple[bytes, int, int]]:
    """Words and place in the stream of every user."""
    copy = table.copy().rows
    names = sorted(copy.of)
    words, position, partition = copy.get(names)
    return {name: (words[at].tobytes(), int(position[at]), int(partition[at])) for at, name in enumerate(names)}


class Owner:
    """A kind of table in a directory of snapshots, with a stream of numbered updates in partitions.

    The update `number` of partition 0 or 1 is the same at every call. `at` tells its position, which may rise with gaps.

    A kind has its model `trained()`; the table `first()` before any update; `apply(writer, number)`, which gives an update to a
    writer, by default of partition 0 at its own position; `misfit(writer)`, which gives it one at position 1 that does not fit;
    and `holds(table, counts)`: whether a table is what so many updates of each partition make of the first one, bit for bit.
    """

    kind: Any
    writer: Any
    trained: Any
    first: Any

    def __init__(self, directory: Path, *, at: Callable[[int], int] = int):
        self.directory, self.at = directory, at

    def start(self, **options: Any) -> Any:
        """A writer of the first table."""
        return self.writer.start(self.directory, self.first(), **options)

    def resume(self, **options: Any) -> Any:
        """A writer that goes on."""
        return self.writer.resume(self.directory, self.trained(), **options)

    def positions(self) -> list[int]:
        """Of partition 0, in every complete snapshot."""
        return [self.kind.inspect(folder).positions.get(0, 0) for folder in snapshots(self.directory)]


class Items(Owner):
    """An index: items come, change and go."""

    kind, writer = ItemIndex, IndexWriter

    def trained(self) -> aif.Trained:
        return TRAINED

    def first(self) -> ItemIndex:
        return build()

    @staticmethod
    def change(partition: int, number: int) -> tuple[list[int], list[int] | None]:
        """Ids of items of that partition, and their new numbers or None for a deletion."""
        odd, rng = drawn(partition, number)
        ids = (rng.choice(30, 4, replace=False) * 2 + odd).tolist()
        return ids, None if rng.random() < 0.25 else rng.integers(0, 1 << 16, 4).tolist()

    def apply(self, writer: Any, number: int, *, position: Any = ..., partition: Any = 0) -> bool:
        ids, numbers = self.change(partition, number)
        place = {"position": self.at(number) if position is ... else position, "partition": partition}
        return writer.delete(ids, **place) if numbers is None else writer.upsert(ids, features(numbers), **place)

    def misfit(self, writer: Any) -> None:
        writer.upsert([5], features([1, 2]), position=1)

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
        items = self.numbers(counts)
        ids, columns = table.stored()
        expected = features(list(items.values()))  # by NumPy alone
        vector = np.asarray(expected.floats) * PARAMS["item"]["scale"]
        equal = np.array_equal(columns["vector"], vector) and np.array_equal(columns["item"], expected.ids["item"])
        return len(table) == len(items) and np.array_equal(ids, list(items)) and equal


class Users(Owner):
    """A user table: events come."""

    kind, writer = UserTable, UserTableWriter

    def trained(self) -> aif.Trained:
        return users()

    def first(self) -> UserTable:
        return UserTable(users(), batch_size=8)

    @staticmethod
    def events(partition: int, number: int) -> dict[str, Any]:
        """A message: four events of users of that partition."""
        odd, rng = drawn(partition, number)
        user, item = rng.integers(5, size=4) * 2 + odd, rng.integers(9, size=4)
        return {"user": user, "item": item, "time": T + 60 * number + np.arange(4)}

    def apply(self, writer: Any, number: int, *, position: Any = ..., partition: Any = 0) -> bool:
        at = self.at(number) if position is ... else position
        return writer.update(self.events(partition, number), position=at, partition=partition)

    def misfit(self, writer: Any) -> None:
        writer.update(self.events(0, 1) | {"time": [T]}, position=1)

    def holds(self, table: UserTable, counts: dict[int, int]) -> bool:
        expected = self.first()
        for partition, count in counts.items():
            for number in range(1, count + 1):
                expected.update(self.events(partition, number), position=self.at(number), partition=partition)
        return rows(table) == rows(expected)


OWNERS = {"index": Items, "users": Users}
