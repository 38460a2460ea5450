"""`follow`: micro-batches of a stream become deltas that equal a full rebuild, each event trained on once, or are refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aif_jax as aif
from aif_jax import cli, export
from aif_jax.checks import ArgumentError
from aif_jax.connectors import MemoryStream, SnapshotStore, encode
from aif_jax.export import Delta, restore
from aif_jax.export.delta import Chain
from aif_jax.refreshing import follow
from aif_jax.refreshing.continuous import name_of
from aif_jax.train.tasks import Cascaded
from aif_jax.trees import leaves_by_path
from aif_jax.user_table import ClockError, UserTable
from tests import follow_world as world
from tests import refresh_world as shop
from tests.test_delta import check, rows_of

pytestmark = pytest.mark.usefixtures("light_compilation")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    SnapshotStore(folder / "store").publish(world.export_of(folder / "export"))
    return folder / "store"


@pytest.fixture
def store(published, tmp_path) -> Path:
    """A copy of the store, without deltas."""
    shutil.copytree(published, tmp_path / "store")
    return tmp_path / "store"


def stream_of(values: list[bytes]) -> MemoryStream:
    stream = MemoryStream()
    stream.send_many(values)
    return stream


def run(store: Path, stream: MemoryStream, **changes: Any) -> Any:
    return follow(stream, world.files(), out=store, **(world.OPTIONS | {"items": shop.items(5), "batches": 3} | changes))


def test_rows_of_users_lack_no_event_that_they_had_or_that_came(store, tmp_path):
    """The stream is behind the files that the export's rows are of, and brings an event that came too late for them."""
    first, events = world.until(store), world.log()
    moment = next(time for time in range(first - 500, first) if time not in events["time"])
    late = {"user": np.array([3]), "item": np.array([107]), "time": np.array([moment])}
    stream = stream_of([encode(late), *world.messages(first)])
    assert run(store, stream, batches=1).published == 1
    came = np.flatnonzero(events["time"] >= first)[: stream.committed[0] * world.A_MESSAGE]
    assert events["time"][came].max() < world.files()["time"].max()
    parts = [world.files(), late]
    data = aif.read(
        {name: np.concatenate([part[name] for part in parts]) for name in late}, items=shop.items(5),
        encoder=aif.open(store / SnapshotStore(store).current()).encoder, unknown="skip", progress=False,
    )  # fmt: skip
    applied = world.applied_to(store, tmp_path / "here")
    assert rows_of(applied.user_table) == rows_of(UserTable.build(applied.trained, data, clock=None, progress=False))


def test_deltas_of_a_stream_equal_a_full_rebuild(store, tmp_path):
    first, events = world.until(store), world.log()
    stream = stream_of([b"poison", encode({"item": [101]}), *world.messages(first - 20_000)])
    made = run(store, stream)
    assert [message.value is not None for message, _ in stream.rejected] == [True, True]
    assert (made.published, made.refused) == (3, 0) and made.trained % 32 == 0 and made.waiting > 0
    root, applied = restore(store / SnapshotStore(store).current()), world.applied_to(store, tmp_path / "here")
    assert len(Chain(tmp_path / "here").on(root.trained.version)) == 3 and {part.version for part in applied} == {made.version}
    old, new = leaves_by_path(root.trained.params), leaves_by_path(applied.trained.params)
    assert [path for path in old if np.asarray(old[path]).tobytes() != np.asarray(new[path]).tobytes()] == ["embedding/item"]
    assert applied.trained.config == root.trained.config
    latest = max(time for _, _, time in world.trained_on(tmp_path / "store.follow" / "job"))
    some = np.isin(events["time"], np.append(world.files()["time"], world.arrived(tmp_path / "store.follow" / "job")))
    part = {name: column[some] for name, column in events.items()}
    data = aif.read(part, items=shop.items(5), encoder=root.trained.encoder, unknown="skip", progress=False)
    check(applied, data, catalogue=shop.items(5))
    assert latest >= first


def test_an_id_without_a_row_stays_unknown_until_the_next_full_refresh(store, tmp_path):
    """Its item is no candidate, its events are of an unknown item and not trained on, and those of a new user are left out."""
    first, of_day = world.until(store), shop.START + 5 * shop.DAY
    new = {"user": [3] * 40 + [777], "item": [999] * 40 + [101], "time": [of_day + at for at in range(41)]}
    own = {"item": 999, "category": "category 1", "brand": "brand 1"}
    later = {name: [*column, own[name]] for name, column in shop.items(5).items()}
    made = run(store, stream_of([encode(new), *world.messages(first)]), items=later, batches=1, max_messages=1000)
    assert made.published == 1 and all(item for _, item, _ in world.trained_on(tmp_path / "store.follow" / "job"))
    root, applied = restore(store / SnapshotStore(store).current()), world.applied_to(store, tmp_path / "here")
    assert applied.trained.encoding == root.trained.encoding
    assert applied.item_index.take([999, 101])[1].tolist() == [False, True]
    events = {name: np.append(column, new[name]) for name, column in world.log().items()}
    data = aif.read(events, items=shop.items(5), encoder=root.trained.encoder, unknown="skip", progress=False)
    table = UserTable.build(applied.trained, data, clock=None, progress=False)
    assert rows_of(applied.user_table)[3] == rows_of(table)[3] and 777 not in rows_of(applied.user_table)


def test_an_event_of_the_future_is_rejected_or_ends_the_call(store, tmp_path):
    now = shop.START + 7 * shop.DAY
    future = encode({"user": [1], "item": [101], "time": [now + 61]})
    stream = MemoryStream(clock=lambda: now)
    stream.send_many([future, *world.messages(world.until(store))])
    assert run(store, stream, batches=1, clock=lambda: now - 10 * shop.DAY).published == 1  # the broker's clock counts
    ((_, reason),) = stream.rejected
    assert f"expected times up to that of their message, {now}, 60 s of skew allowed, got {now + 61}" in reason

    class Untimed(MemoryStream):
        def poll(self, seconds, max_messages):
            return [message._replace(time=None, by_broker=False) for message in super().poll(seconds, max_messages)]

    stream = Untimed()
    stream.send_many([encode({"user": [1], "item": [101], "time": [now + 60]}), future])
    words = f"times up to this machine's clock, {now}, 60 s of skew allowed, got {now + 61}, 61 s later"
    with pytest.raises(ClockError, match=words):
        run(store, stream, batches=1, clock=lambda: now, work=tmp_path / "other")
    assert not stream.rejected and not stream.committed


def test_each_sample_is_trained_on_once_and_the_newest_wait(store, tmp_path):
    """Events from before the chain are left out, a repeated call goes on, and what is left waits."""
    first = world.until(store)
    stream = stream_of(world.messages(first - 20_000))
    one = run(store, stream, batches=1)
    two = run(store, stream, batches=2)
    assert one.published == 1 and two.published == 3 and stream.committed[0] > 0
    samples = world.trained_on(tmp_path / "store.follow" / "job")
    assert len(samples) == two.trained and min(time for _, _, time in samples) >= first
    events = world.log()
    counts = {time: int(count) for time, count in zip(*np.unique(events["time"], return_counts=True), strict=True)}
    of_times = {time: 0 for _, _, time in samples}
    for _, _, time in samples:
        of_times[time] += 1
    assert all(of_times[time] <= counts[time] for time in of_times)
    whole = shutil.copytree(tmp_path / "store.follow", tmp_path / "copy")
    shutil.rmtree(store / "deltas")
    shutil.rmtree(tmp_path / "store.follow")
    again = run(store, stream_of(world.messages(first - 20_000)), batches=3)
    assert again.version == two.version and world.trained_on(tmp_path / "store.follow" / "job") == samples
    assert (whole / "job" / name_of(3)).is_dir()


def test_a_refused_micro_batch_stays_out_and_the_next_goes_on(store, tmp_path, capsys):
    first = world.until(store)
    stream = stream_of(world.messages(first))
    strict = dataclasses.replace(world.GATE, size=0.5)
    refused = run(store, stream, batches=1, gate=strict, progress=True)
    root = restore(store / SnapshotStore(store).current()).trained
    assert (refused.published, refused.refused, refused.trained) == (0, 1, 0) and refused.version == root.version
    assert not (store / "deltas").exists() or SnapshotStore(store / "deltas").names() == []
    assert "batch 000001: refused" in capsys.readouterr().err
    after = run(store, stream, batches=1)
    assert (after.published, after.refused) == (1, 1)
    (name,) = SnapshotStore(store / "deltas").names()
    delta = Delta.load(SnapshotStore(store / "deltas").fetch(tmp_path / "here", name))
    assert delta.base == root.version and delta.number == 1
    samples = world.trained_on(tmp_path / "store.follow" / "job")
    assert len(set(samples)) == len(samples) > after.trained


def test_a_new_export_begins_a_new_chain(store, tmp_path, capsys):
    first = world.until(store)
    stream = stream_of(world.messages(first))
    run(store, stream, batches=1)
    SnapshotStore(store).publish(world.export_of(tmp_path / "export", seed=1, until=first + 30_000))
    later = run(store, stream_of(world.messages(first)), batches=1, learning_rate=0.05, progress=True)
    assert later.published == 1 and "an unfinished job of other arguments is dropped: refresh.root" in capsys.readouterr().err
    samples = world.trained_on(tmp_path / "store.follow" / "job")
    assert min(time for _, _, time in samples) >= world.until(store) > first
    names = SnapshotStore(store / "deltas").names()
    bases = [Delta.load(SnapshotStore(store / "deltas").fetch(tmp_path / "here", name)).base for name in names]
    assert len(names) == 2 and bases[1] == aif.open(tmp_path / "export").version


def test_too_few_users_to_judge_by_wait(store):
    stream = stream_of(world.messages(world.until(store)))
    calls = iter(range(400))
    many = dataclasses.replace(world.GATE, users=1000)
    made = run(store, stream, gate=many, stop=lambda: next(calls) > 60)
    assert (made.published, made.refused) == (0, 0) and made.waiting > 100


def test_what_cannot_be_followed_is_named(store, tmp_path, published):
    stream = stream_of(world.messages(world.until(store)))
    with pytest.raises(FileNotFoundError, match="expected a store with an export to build on, got none; start with"):
        run(tmp_path / "empty", stream)
    other = SnapshotStore(tmp_path / "other")
    root = restore(store / SnapshotStore(store).current())
    of_elsewhere = root.trained.replace(settings=None)
    export.save(tmp_path / "export", of_elsewhere, root.index, platforms=("cpu",), stablehlo=False)
    other.publish(tmp_path / "export")
    with pytest.raises(ValueError, match="expected an export that says until when it was trained, as those of refresh and"):
        run(tmp_path / "other", stream)
    for changes, message in (
        ({"held_out": 0.7}, "held_out: expected a share above 0, below 0.5, got 0.7"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"every": -1.0}, "every: expected 0 seconds or more, got -1.0"),
        ({"tables": ("shop",)}, "tables that move: expected at least one of"),
        ({"events": world.log(4)}, "expected files with the events in the rows of users of .*; give the files that"),
        ({"items": None}, "follow items: expected the items file that belongs to events, got None"),
        ({"task": Cascaded()}, "follow task: expected one whose samples are events, got Cascaded"),
    ):
        options = world.OPTIONS | {"events": world.files(), "items": shop.items(5), "batches": 1} | changes
        with pytest.raises(ValueError, match=message):
            follow(stream, out=store, **options)
    with pytest.raises(ArgumentError, match="work: expected a local folder for the micro-batches of s3://bucket/models, got"):
        follow(stream, world.files(), items=shop.items(5), out="s3://bucket/models")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--every", "10min"], "refresh: expected --follow with --every"),
        (["--follow", "redis://h:1/k", "--epochs", "2"], "refresh --follow: expected none of --epochs, which are for a full"),
        (["--follow", "nothing"], "--follow: stream: expected kafka://HOST:PORT/TOPIC or redis://HOST:PORT/KEY"),
        (["--follow", "redis://h:1/k", "--every", "soon"], "expected a time such as 90s, 10min or 1h, got 'soon'"),
    ],
)
def test_flags_that_do_not_fit_are_named(words, message, capsys):
    base = ["refresh", "--events", "e.csv", "--items", "i.csv", "--out", "store"]
    try:
        code = cli.main([*base, *words])
    except SystemExit as ended:  # of argparse
        code = ended.code
    assert code == 2 and message in " ".join(capsys.readouterr().err.split())
