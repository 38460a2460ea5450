"""Rows of users beside a writer: whoever reads gets each row whole, as it was before or after an update."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from aif_jax.user_table import MemoryRows, Stored
from aif_jax.user_table.rows import NONE
from tests.beside import meanwhile
from tests.reliability.sizes import FULL, SMOKE

WIDTH, USERS = 3000, 400
SPREAD = np.arange(WIDTH, dtype=np.uint32) * np.uint32(2_654_435_761)


def sealed(users: np.ndarray, position: int) -> Stored:
    """Rows whose every word follows from user and position: a row of two updates shows it."""
    words = (users[:, None] * 7919 + position).astype(np.uint32) ^ SPREAD
    return Stored(words, np.full(len(users), position), np.full(len(users), position % 97, np.int32))


def check(users: np.ndarray, found: Stored) -> None:
    """Fails for half of an update, and for a row of another user."""
    there = found.position > NONE
    expected = (users[:, None] * 7919 + found.position[:, None]).astype(np.uint32) ^ SPREAD
    np.testing.assert_array_equal(found.words, np.where(there[:, None], expected, np.uint32(0)))
    np.testing.assert_array_equal(found.partition, np.where(there, found.position % 97, 0))


def read_beside_a_writer(updates: int) -> int:
    """Two readers beside a writer whose table grows; returns how many rows they read."""
    rows, counts, chance = MemoryRows(WIDTH, capacity=1), [0, 0], np.random.default_rng(2)

    def reads(number: int) -> Iterator[None]:
        chance, last = np.random.default_rng(number), np.full(USERS, NONE)
        while True:
            users = chance.choice(USERS, chance.integers(1, 40), replace=False)
            found = rows.get(users.tolist())
            check(users, found)
            assert (found.position >= last[users]).all(), "a row went back"
            last[users] = found.position
            counts[number] += len(users)
            yield

    with meanwhile(reads(0).__next__, reads(1).__next__) as failed:
        for position in range(updates):
            if failed():
                break
            users = chance.choice(max(8, USERS * (position + 1) // updates), 8, replace=False)
            assert rows.put(users.tolist(), sealed(users, position), expected=rows.get(users.tolist()).position).all()
    return sum(counts)


def test_a_reader_sees_no_half_of_an_update():
    assert read_beside_a_writer(SMOKE.row_updates) > 0


@pytest.mark.reliability
@pytest.mark.timeout(1800)
def test_readers_see_no_half_of_many_updates():
    print(f"{read_beside_a_writer(FULL.row_updates):,} rows read, {FULL.row_updates:,} updates, none torn")


def test_an_interrupted_writer_leaves_whole_rows_that_can_be_read(monkeypatch):
    """An interrupt within a write keeps no reader and no later writer waiting."""
    rows, one = MemoryRows(WIDTH), np.array([5])
    rows.put([5], sealed(one, 1), expected=np.array([NONE]))

    class Interrupted(np.ndarray):
        def __setitem__(self, at, values):
            raise KeyboardInterrupt

    whole = rows._table
    monkeypatch.setattr(rows, "_table", whole.view(Interrupted))
    with pytest.raises(KeyboardInterrupt):
        rows.put([5], sealed(one, 2), expected=np.array([1]))
    monkeypatch.setattr(rows, "_table", whole)
    check(one, rows.get([5]))
    assert rows.put([5], sealed(one, 2), expected=np.array([1])).all()
    check(one, rows.get([5]))
