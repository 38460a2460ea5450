"""Where rows of users are kept: the interface to a store, and the one in memory.

The update function as a table runs it: batches of users with some events each, rows as words.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.checks import expect
from aif_jax.index.store import ReadWriteLock
from aif_jax.model import PreRanker
from aif_jax.store import codec
from aif_jax.store.codec import STORAGES, Packed, Storage
from aif_jax.store.snapshots import integer
from aif_jax.trees import take
from aif_jax.types import Events, Params, UserMemory

UserId: TypeAlias = int | str
"""A raw user id."""
NONE = int(np.iinfo(np.int64).min)  # position of a user without a row, or of a row without a stream
AT_ONCE = 64  # rows that are written while readers wait: below 1 MB


class Stored(NamedTuple):
    """Rows of n users, each with how far in the stream it is. A user's events come by one partition.

    Attributes:
      words: uint32 [n, W], see `store.codec.Packed`.
      position: int64 [n] position of the last event in the row, `NONE` where there is no row.
      partition: int32 [n] partition of the user's events.
    """

    words: np.ndarray
    position: np.ndarray
    partition: np.ndarray

    def take(self, at: np.ndarray | slice) -> Stored:
        """Some of the rows."""
        return Stored(*(leaf[at] for leaf in self))


class Rows(Protocol):
    """A store of rows. A put of one row is atomic; rows of one call may be written one after another."""

    def get(self, users: Sequence[UserId]) -> Stored:
        """The rows of some users; words of zeros and position `NONE` where a user has none."""
        ...

    def put(self, users: Sequence[UserId], rows: Stored, *, expected: np.ndarray) -> np.ndarray:
        """Writes each row whose user is still at the position `expected` int64 [n]; says which were written, bool [n]."""
        ...


class MemoryRows(Rows):
    """Rows in this process: one array that grows, and a dict of users. One thread at a time writes; any may read.

    A reader gets each row as it was before or after an update, never half of one: rows are written a few at a time, while no
    reader copies one.
    """

    def __init__(self, width: int, *, capacity: int = 1024):
        self.width = width
        self.of: dict[UserId, int] = {}
        fields: Any = [("words", np.uint32, (width,)), ("position", np.int64), ("partition", np.int32)]
        self._table: Any = np.zeros(max(1, capacity), fields)  # so that a row is read and written in one step
        self._lock = ReadWriteLock()

    def __len__(self) -> int:
        return len(self.of)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are used."""
        return self._table.itemsize * len(self.of)

    def get(self, users: Sequence[UserId]) -> Stored:
        """As `Rows.get`; the arrays are copies."""
        at = self._places(users)
        with self._lock.reading():  # the table is read after `of`: it has every row that `of` has
            rows = self._table.take(at)
        unknown = at < 0
        rows["words"][unknown], rows["position"][unknown], rows["partition"][unknown] = 0, NONE, 0
        return Stored(*(rows[name] for name in Stored._fields))

    def put(self, users: Sequence[UserId], rows: Stored, *, expected: np.ndarray) -> np.ndarray:
        first, known = len(self.of), self._places(users)
        good = np.where(known >= 0, self._table["position"][known], NONE) == expected
        new = [user for user, at, ok in zip(users, known, good, strict=True) if ok and at < 0]
        self._grow(first + len(new))
        places = dict(zip(new, range(first, first + len(new)), strict=True))
        at = np.array([places.get(user, at) for user, at in zip(users, known.tolist(), strict=True)], np.int64)[good]
        written: Any = np.empty(len(at), self._table.dtype)
        for name, leaf in rows._asdict().items():
            written[name] = leaf[good]
        for start in range(0, len(at), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            with self._lock.writing():
                self._table[at[some]] = written[some]
        self.of |= places  # last, so that a reader finds whole rows
        return good

    def copy(self) -> MemoryRows:
        """A copy of the rows."""
        made, used = MemoryRows(self.width, capacity=0), max(1, len(self.of))
        made.of, made._table = dict(self.of), self._table[:used].copy()
        return made

    def _places(self, users: Sequence[UserId]) -> np.ndarray:
        return np.fromiter((self.of.get(user, -1) for user in users), np.int64, len(users))

    def _grow(self, least: int) -> None:
        if least > (size := len(self._table)):
            more = np.zeros(max(1024, least, size * 5 // 4) - size, self._table.dtype)
            self._table = np.concatenate([self._table, more])


def positions_of(position: Any, count: int) -> np.ndarray:
    """int64 [count]: the position in the stream of each of `count` events; `NONE` for events that are not from a stream.

    Args:
      position: one for all, one for each in rising order, or None.

    Raises:
      TypeError: what is no integer.
      ValueError: positions that fall, not one for each event, or outside 0 to 2^63 - 1.
    """
    if position is None:
        return np.full(count, NONE)
    if np.ndim(position) == 0:
        return np.full(count, integer(position, "position"), np.int64)
    at = np.asarray(position)
    expect(at.dtype.kind in "iu", "position", "integers", at.dtype, error=TypeError)
    one_each = f"one, or one for each of {count} events"
    expect(at.shape == (count,), "position", one_each, f"an array of shape {list(at.shape)}")
    expect((at[1:] >= at[:-1]).all(), "position", "positions of events in the order of the stream", "some that fall")
    for end in at[[0, -1]] if count else ():
        integer(end, "position")
    return at.astype(np.int64)


HEADER = struct.Struct("<4sIqiI")  # magic and format, words, position, partition, CRC-32 of all the rest
MAGIC = b"AUT1"
PUT = """
local before = redis.call('GETRANGE', KEYS[1], 8, 15)
if before == '' then before = ARGV[1] end
if before ~= ARGV[2] then return 0 end
local time, noted = redis.call('TIME'), redis.call('HGET', KEYS[2], ARGV[5])
local now, before = time[1] .. '.' .. string.format('%06d', time[2]), noted and string.match(noted, ' (%S+)$')
if before and tonumber(before) > tonumber(now) then now = before end
redis.call('HSET', KEYS[2], ARGV[5], ARGV[6] .. ' ' .. now)
if ARGV[4] == '0' then redis.call('SET', KEYS[1], ARGV[3]) return 1 end
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return 1
"""
"""Sets a row, and how far its partition is, if its position is the expected one; a missing row has the position of none.

Times are the server's, one clock for all writers, and never fall."""


class Progress(NamedTuple):
    """How far the rows of a partition are.

    Attributes:
      position: position of the last event that was put, `NONE` for events without positions.
      seconds: when a row was last written, since 1970 by the server's clock; never falls.
    """

    position: int
    seconds: float


class RemoteRows(Rows):
    """Rows of one model version as values of a Valkey or Redis server; one round trip for any number of users.

    Args:
      client: `redis.Redis` or `valkey.Valkey`, not decoding responses, with the timeouts and retries that suit you. Its
        errors come through.
      version: version of the table: rows of two versions have different keys, so a new version is built next to the old one.
      width: words of a row, `UserTable.row_bytes / 4`.
      seconds: after which a row that is not written again is forgotten, so that old versions go away; None keeps it.

    Raises:
      ValueError: a value at a row's key that is torn, altered, or no row of this width.
    """

    def __init__(self, client: Any, *, version: str, width: int, prefix: str = "aif", seconds: float | None = None):
        expect(width >= 1, "width", "at least 1", width)
        expect(seconds is None or seconds > 0, "seconds", "None or more than 0", seconds)
        self._client, self._width = client, width
        self._prefix = f"{prefix}:{version[:32]}:"
        self._progress = f"{self._prefix}progress"
        self._lives = 0 if seconds is None else max(1, round(seconds * 1000))
        self._put = client.register_script(PUT)

    def key(self, user: UserId) -> str:
        """Where a user's row is; the integer 7 and the string "7" are two users."""
        return f"{self._prefix}{'s' if isinstance(user, str) else 'i'}:{user}"

    def get(self, users: Sequence[UserId]) -> Stored:
        words = np.zeros((len(users), self._width), np.uint32)
        found = Stored(words, np.full(len(users), NONE), np.zeros(len(users), np.int32))
        keys = [self.key(user) for user in users]
        for place, value in enumerate(self._client.mget(keys) if keys else ()):
            if value is not None:
                found.words[place], found.position[place], found.partition[place] = self._row(value, keys[place])
        return found

    def put(self, users: Sequence[UserId], rows: Stored, *, expected: np.ndarray) -> np.ndarray:
        """As `Rows.put`; each row is compared and set by the server."""
        pipe, none = self._client.pipeline(transaction=False), struct.pack("<q", NONE)
        furthest: dict[int, int] = {}  # of the rows so far: a writer that dies here has noted none that it had not sent
        for place, user in enumerate(users):
            words, position, partition = rows.words[place], int(rows.position[place]), int(rows.partition[place])
            before = struct.pack("<q", int(expected[place]))
            value = self._value(words, position, partition)
            furthest[partition] = max(furthest.get(partition, NONE), position)
            arguments = [none, before, value, self._lives, partition, furthest[partition]]
            self._put(keys=[self.key(user), self._progress], args=arguments, client=pipe)
        return np.array(pipe.execute(), bool) if len(users) else np.zeros(0, bool)

    def progress(self) -> dict[int, Progress]:
        """How far each partition is, for all writers together; {} before the first row."""
        found = {int(name): value.split() for name, value in self._client.hgetall(self._progress).items()}
        return {partition: Progress(int(position), float(seconds)) for partition, (position, seconds) in sorted(found.items())}

    def _value(self, words: np.ndarray, position: int, partition: int) -> bytes:
        body = words.astype("<u4").tobytes()
        head = HEADER.pack(MAGIC, len(words), position, partition, 0)
        return HEADER.pack(MAGIC, len(words), position, partition, zlib.crc32(body, zlib.crc32(head))) + body

    def _row(self, value: bytes, key: str) -> tuple[np.ndarray, int, int]:
        wanted = HEADER.size + 4 * self._width
        if len(value) != wanted or value[:4] != MAGIC:
            got = f"{len(value)} bytes: {value[:8]!r}..."
            raise ValueError(f"{key}: expected a row of {wanted} bytes of this format, got {got}")
        magic, width, position, partition, checksum = HEADER.unpack_from(value)
        head, body = HEADER.pack(magic, width, position, partition, 0), value[HEADER.size :]
        if width != self._width or checksum != zlib.crc32(body, zlib.crc32(head)):
            raise ValueError(f"{key}: expected a row with the checksum {checksum}, got one that is torn or altered")
        return np.frombuffer(body, "<u4"), position, partition


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
        empty = _empty_row(model.new_user, storage)
        self.layout = empty.layout
        self.empty = np.asarray(empty.words)
        """uint32 [W], the row of a user without events."""
        self._compiled = _compiled(model.update_user, storage, empty.layout)

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
                filled = partial(_filled, size=size)
                result = self._compiled(self.params, filled(words[users]), jax.tree.map(filled, part))
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
            part = take(events, ranges(starts[now], sizes[now]))
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


@lru_cache(maxsize=16)
def _empty_row(new_user: Any, kind: Storage) -> Packed:
    return jax.jit(lambda: pack(new_user(), kind))()


@lru_cache(maxsize=16)
def _compiled(update_user: Any, kind: Storage, layout: Any) -> Any:
    def one(params: Params, words: jax.Array, events: Events) -> tuple[Any, ...]:
        memory = Packed(words=words, layout=layout).widened()
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
