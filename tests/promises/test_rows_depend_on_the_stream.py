"""A user's row depends on the stream alone: on its messages and their order, not on batches, kills, replicas or clocks."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aif_jax import Trained
from aif_jax.connectors import Follower, MemoryStream, SinkTarget, UserTarget, encode
from aif_jax.user_table import ClockError, UserTable, UserTableWriter
from tests.reliability.sizes import FULL, SMOKE, generator
from tests.test_user_table import DATA, ENCODER, MODEL, PARAMS, VERSION, table
from tests.writer_world import rows

T = 1_700_000_000
FIVE = np.random.default_rng(5).choice(DATA.items.raw, 5, replace=False)
USERS = DATA.users.raw[:4]
BUSY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Batches(MemoryStream):
    """A stream whose polls bring as many messages as they are told to."""

    def __init__(self, sizes, **options):
        super().__init__(**options)
        self.sizes = sizes

    def poll(self, seconds, most):
        return super().poll(seconds, next(self.sizes, most))


def messages(seed: int, count: int = 30) -> list[dict[str, np.ndarray]]:
    """Messages of one to twenty events, many of one second, late and repeated ones among them."""
    chance = np.random.default_rng(seed)
    made = []
    for number in range(count):
        size = int(chance.choice([1, 1, 1, 2, 3, 20]))
        columns = {"user": chance.choice(USERS, size), "item": chance.choice(FIVE, size), "action": chance.integers(1, 3, size)}
        made.append(columns | {"time": T + number // 3 - chance.integers(0, 2, size) * int(chance.integers(0, 9))})
    return made


def sent(stream: MemoryStream, sent_messages) -> MemoryStream:
    """The stream with the messages, and poison among them."""
    for number, message in enumerate(sent_messages):
        stream.send(encode(message))
        if number % 7 == 6:
            stream.send(b"poison")
    return stream


def poison(count: int) -> set[int]:
    """Positions of what is rejected of a stream with so many good messages."""
    return {number + number // 7 + 1 for number in range(6, count, 7)} | {count + count // 7}


def one_by_one(given_messages, storage: str) -> UserTable:
    made = table(storage=storage)
    position = -1
    for number, message in enumerate(given_messages):
        position += 1 + (number > 0 and number % 7 == 0)
        made.update(message, position=position)
    return made


def follow(folder: Path, given_messages, sizes, kills, storage: str, *, ahead: int = 0) -> UserTable:
    """The table of a follower that polls batches of `sizes`, and is killed after the polls `kills`.

    Its clock is `ahead` of the broker's, by which the last message brings an event of the future.
    """
    stream = sent(Batches(iter(sizes), clock=lambda: T + 30.0), given_messages)
    stream.send(encode({"user": USERS[:1], "item": FIVE[:1], "action": [1], "time": [T + 200]}))
    writer = UserTableWriter.start(folder, table(storage=storage), every_updates=5)
    writer.table._clock = lambda: T + 30.0 + ahead
    follower, polls = Follower(stream, UserTarget(writer)), 0
    while follower.step():
        polls += 1
        if polls in kills:
            writer._lease.release()  # as the end of the process does; what was not saved is lost
            writer = UserTableWriter.resume(folder, Trained(MODEL, PARAMS, ENCODER).with_version(VERSION), every_updates=5)
            writer.table._clock = lambda: T + 30.0 + ahead
            follower = Follower(stream, UserTarget(writer))
    writer._lease.release()
    assert {message.position for message, _ in stream.rejected} == poison(len(given_messages))
    return writer.table


def check(expected: UserTable, got: UserTable) -> None:
    assert rows(got) == rows(expected), {user: row for user, row in rows(got).items() if user in expected.rows.of}


STREAM = messages(0)
SIZES = st.lists(st.integers(1, 12), max_size=30)


@pytest.fixture(scope="module", params=["float32", "int8"])
def expected(request) -> UserTable:
    return one_by_one(STREAM, request.param)


@given(sizes=SIZES, kills=st.sets(st.integers(1, 8), max_size=2), ahead=st.integers(-3600, 3600))
@settings(BUSY, max_examples=8)
def test_at_any_borders_of_batches_and_after_kills(expected, sizes, kills, ahead):
    with tempfile.TemporaryDirectory() as folder:
        check(expected, follow(Path(folder) / "w", STREAM, sizes, kills, expected.storage, ahead=ahead))


@given(sizes=st.tuples(SIZES, SIZES), turns=st.lists(st.booleans(), max_size=60))
@settings(BUSY, max_examples=8)
def test_by_two_replicas_that_share_the_rows(expected, sizes, turns):
    """Both consume the whole stream, each in different batches, whoever is first."""
    one, two = table(storage=expected.storage), table(storage=expected.storage)
    two.rows = one.rows
    followers = [
        Follower(sent(Batches(iter(each)), STREAM), SinkTarget(sink)) for each, sink in zip(sizes, (one, two), strict=True)
    ]
    for turn in turns:
        followers[turn].step()
    for follower in followers:
        while follower.step():
            pass
    check(expected, one)


@pytest.mark.parametrize("ahead", [-3600, -61, 0, 61, 3600])
def test_at_any_clock_of_the_machine_where_the_stream_has_the_brokers(ahead):
    """An event that is later than its own message is poison for every follower, and no other is for any."""
    stream = MemoryStream(clock=lambda: T + 30.0)
    good = [{"user": USERS[:1], "item": FIVE[:1], "action": [1], "time": [T + at]} for at in (0, 29, 90)]
    wrong = good[0] | {"time": [T + 91]}
    for message in (*good[:2], wrong, good[2]):
        stream.send(encode(message))
    sink = table(clock=lambda: T + 30.0 + ahead)
    follower = Follower(stream, SinkTarget(sink))
    assert follower.step() == 4
    (rejected, reason), *more = stream.rejected
    assert rejected.position == 2 and not more
    assert reason.startswith(f"ValueError: events: expected times up to that of their message, {T + 30}, 60 s of skew allowed")
    plain = table()
    for position, message in ((0, good[0]), (1, good[1]), (3, good[2])):
        plain.update(message, position=position)
    check(plain, sink)


class Told(MemoryStream):
    """A stream with the producers' clock, or without one."""

    def __init__(self, *, seconds):
        super().__init__()
        self.seconds = seconds

    def poll(self, seconds, most):
        return [m._replace(time=self.seconds, by_broker=False) for m in super().poll(seconds, most)]


@pytest.mark.parametrize("told", [None, T + 0.0])
def test_a_slow_clock_stops_a_follower_and_loses_nothing(told, tmp_path):
    """Half of the events are fresh: before, each of them was rejected, and the follower went on."""
    stream, now = Told(seconds=told), [T - 3600.0]
    old_and_fresh = [m | {"time": np.asarray(m["time"]) - 7200 * (n % 2)} for n, m in enumerate(messages(3, 12))]
    for message in old_and_fresh:
        stream.send(encode(message))
    writer = UserTableWriter.start(tmp_path / "w", table(clock=lambda: now[0]))
    with pytest.raises(ClockError, match=r"expected times up to this machine's clock.*set the clock right.*LogAppendTime"):
        Follower(stream, UserTarget(writer)).step()
    assert not stream.rejected and writer.positions == {} and len(writer.table) == 0
    now[0] = T + 3600.0
    assert Follower(stream, UserTarget(writer)).step() == 12 and not stream.rejected
    plain = table()
    for position, message in enumerate(old_and_fresh):
        plain.update(message, position=position)
    check(plain, writer.table)
    writer.close()


def any_stream(seed: int, storage: str, folder: Path) -> None:
    """One drawn stream, at drawn borders, kills and clock, against one message at a time."""
    chance = np.random.default_rng(seed)
    drawn = messages(seed, int(chance.integers(5, 60)))
    sizes, kills = chance.integers(1, 30, 60).tolist(), set(chance.integers(1, 12, 3).tolist())
    ahead = int(chance.integers(-3600, 3601))
    check(one_by_one(drawn, storage), follow(folder, drawn, sizes, kills, storage, ahead=ahead))


def borders(count: int) -> None:
    chance = generator("batch borders")
    for number in range(count):
        seed = int(chance.integers(2**31))
        with tempfile.TemporaryDirectory() as folder:
            try:
                any_stream(seed, ("float32", "bfloat16", "int8")[number % 3], Path(folder) / "w")
            except BaseException as error:
                error.add_note(f"any_stream({seed}, ...), stream {number}")
                raise


def test_a_few_streams():
    borders(SMOKE.streams)


@pytest.mark.reliability
@pytest.mark.timeout(3600)
def test_many_streams():
    borders(FULL.streams)
    print(f"{FULL.streams} streams, killed up to three times each, at random borders and clocks: rows equal bit for bit")
