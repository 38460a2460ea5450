"""The update function as a table runs it: batches of users with some events each, rows as words."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.checks import expect
from aif_jax.model import PreRanker
from aif_jax.store import codec
from aif_jax.store.codec import STORAGES, Packed, Storage
from aif_jax.types import Events, Params, UserMemory

EVENTS = (1, 16, 256)
"""Events of a user in one run, padded up to the next of these."""
LANES = 64
"""Users in one run for events of a stream: always as many, since a row may depend on their number in the last bit."""


class Updated(NamedTuple):
    """Rows after some events, and what became of these."""

    words: np.ndarray  # uint32 [n, W]
    late: np.ndarray  # int32 [n] events that were older than one before them
    beyond: np.ndarray  # int32 [n] of these, older than every event that is kept


class UserProgram:
    """`model.update_user` for many users at once, compiled for a few numbers of users and of events."""

    def __init__(self, model: PreRanker, params: Params, *, storage: Storage, batch_size: int):
        expect(storage in STORAGES, "storage", f"one of {STORAGES}", repr(storage))
        expect(batch_size >= 1, "batch_size", "at least 1", batch_size)
        self.model = model
        self.params = jax.device_put(params)
        self.storage: Storage = storage
        self.batch_size = batch_size
        self.lanes = min(LANES, batch_size)
        self.sizes = tuple(size for size in (1, 16) if size < batch_size) + (batch_size,)
        empty = jax.jit(lambda: pack(model.new_user(), storage))()
        self.layout = empty.layout
        self.empty = np.asarray(empty.words)
        """uint32 [W], the row of a user without events."""
        self._compiled = _compiled(model.update_user, storage, empty.layout)

    @property
    def row_bytes(self) -> int:
        """Bytes of one user's row."""
        return self.empty.nbytes

    def __call__(self, words: np.ndarray, events: Events, counts: np.ndarray, *, lanes: int | None = None) -> Updated:
        """Rows after events.

        Args:
          words: uint32 [n, W] rows; zeros are a user without events.
          events: [sum of counts] of one user after the other, each user's in the order in which they are applied.
          counts: int64 [n] events of each user.
          lanes: runs always so many users, and as many events as each of them needs by themselves, so that a row does not
            depend on the users that come with it, to the last bit. None takes what is fastest.
        """
        new = (words == 0).all(1)
        words = np.where(new[:, None], self.empty, words)
        ends = np.cumsum(counts)
        starts, late, beyond = ends - counts, np.zeros(len(counts), np.int32), np.zeros(len(counts), np.int32)
        order = np.argsort(-counts, kind="stable")  # users with equally many events run together
        done = np.zeros(len(counts), np.int64)
        while len(left := order[counts[order] > done[order]]):
            widths = np.take(EVENTS, np.searchsorted(EVENTS[:-1], counts[left] - done[left]))
            width = int(widths[0])
            left = left[widths == width] if lanes else left
            for first in range(0, len(left), lanes or self.batch_size):
                users = left[first : first + (lanes or self.batch_size)]
                part = _window(events, starts[users] + done[users], ends[users], width)
                size = lanes or next(size for size in self.sizes if size >= len(users))
                result = self._compiled(
                    self.params, _filled(words[users], size), jax.tree.map(partial(_filled, size=size), part)
                )
                for mine, made in zip((words, late, beyond), result, strict=True):
                    made = np.asarray(made)[: len(users)]
                    mine[users] = made if mine is words else mine[users] + made
            done[left] += width
        return Updated(words, late, beyond)

    def in_order(self, words: np.ndarray, events: Events, counts: np.ndarray, at: np.ndarray, *, lanes: int) -> Updated:
        """Rows after messages of a stream, applied one after the other whatever others came with them.

        Args:
          words, events, counts, lanes: as above; each user's events by rising position.
          at: int64 [sum of counts] position of each event: those of one user and position are applied together.
        """
        owner = np.repeat(np.arange(len(counts)), counts)
        starts = np.flatnonzero(np.append(True, (np.diff(owner) != 0) | (np.diff(at) != 0)))
        users, sizes = owner[starts], np.diff(np.append(starts, len(owner)))
        turns = np.arange(len(users)) - np.searchsorted(users, users)  # of a user's messages: the first, the second, ...
        made = Updated(words.copy(), *np.zeros((2, len(counts)), np.int32))
        for turn in range(int(turns.max(initial=-1)) + 1):
            mine, now = users[turns == turn], turns == turn
            part = jax.tree.map(lambda leaf, now=now: leaf[ranges(starts[now], sizes[now])], events)
            result = self(made.words[mine], part, sizes[now], lanes=lanes)
            made.words[mine] = result.words
            made.late[mine] += result.late
            made.beyond[mine] += result.beyond
        return made


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64 [sum of counts]: `counts` [n] numbers from each of `starts` [n] on."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


def pack(memory: UserMemory, kind: Storage) -> Packed:
    """ONE user's memory as words: matrices in `kind`, everything else as it is."""
    return codec.pack(codec.encode(memory, kind, axes=2))


def unpack(packed: Packed) -> UserMemory:
    """The memory of ONE user that `pack` packed."""
    return packed.widened()


@lru_cache(maxsize=16)
def _compiled(update_user: Any, kind: Storage, layout: Any) -> Any:
    def one(params: Params, words: jax.Array, events: Events) -> tuple[Any, ...]:
        memory = unpack(Packed(words=words, layout=layout))
        there = events.time > 0
        late = there & (events.time < jax.lax.cummax(jnp.append(memory.recent.time[0], events.time))[:-1])
        updated = update_user(params, memory, events)
        beyond = late & (events.time < updated.recent.time[-1])
        return pack(updated, kind).words, late.sum(dtype=jnp.int32), beyond.sum(dtype=jnp.int32)

    return jax.jit(jax.vmap(one, (None, 0, 0)))


def _window(events: Events, start: np.ndarray, end: np.ndarray, width: int) -> Events:
    """The events [n, width] from `start` [n] on, up to `end` [n]; time 0 behind it."""
    at = start[:, None] + np.arange(width)
    there = at < end[:, None]
    at = np.minimum(at, len(events.time) - 1)
    return jax.tree.map(lambda leaf: np.where(there, leaf[at], leaf.dtype.type(0)), events)


def _filled(leaf: np.ndarray, size: int) -> np.ndarray:
    """An array [n, ...] as [size, ...]: the rest repeats the last row, or is zeros."""
    short = size - len(leaf)
    return leaf if not short else np.concatenate([leaf, np.repeat(leaf[-1:], short, 0)])
