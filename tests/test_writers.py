"""Writers of snapshots, saved in time, durable, one owner, bad updates refused."""

import contextlib
import errno
import fcntl
import os
import re
import threading

import numpy as np
import pytest

import aif_jax as aif
from aif_jax.checkpoint import CheckpointError
from aif_jax.index import IndexWriter, WriterConflict, snapshots
from aif_jax.index import writer as writer_files
from aif_jax.store import sealed
from tests.demo import same
from tests.refusals import refused
from tests.writer_world import MODEL, PARAMS, TRAINED, Items, build, features


@pytest.fixture
def world(tmp_path) -> Items:
    return Items(tmp_path / "w")


def test_snapshots_by_count_and_the_last_three_are_kept(world):
    IndexWriter(world.directory, build())
    assert not world.directory.exists(), "a writer that was only made writes nothing"
    with world.start(every_updates=4) as stream:
        assert world.positions() == [0]
        for number in range(1, 19):
            assert world.apply(stream, number)
        assert world.positions() == [8, 12, 16] and stream.saved_positions == {0: 16}
        assert not world.apply(stream, 18) and not world.apply(stream, 3) and stream.positions == {0: 18}
    assert world.positions() == [12, 16, 18] == sorted(world.positions())
    assert world.holds(stream.index, {0: 18}) and stream.saved_positions == {0: 18}
    with world.resume() as again:
        assert again.positions == again.saved_positions == {0: 18} and world.holds(again.index, {0: 18})
        assert not world.apply(again, 18)
    assert world.positions() == [12, 16, 18], "nothing new, nothing saved"
    refused(FileExistsError, "holds 3 snapshots already; use IndexWriter.resume", world.start)
    with world.resume() as third:
        world.apply(third, 19)
    assert world.positions() == [16, 18, 19] and world.holds(third.index, {0: 19})


def test_positions_rise_within_a_partition_and_may_have_gaps(world):
    stream = world.start(positions={2: 7}, every_updates=None)
    assert stream.delete([], position=0) and not world.apply(stream, 1, position=0), "offsets may begin at 0"
    assert not stream.delete([], position=0) and world.holds(stream.index, {}), "a deletion of no ids moves the position alone"
    assert world.apply(stream, 1, position=1_000_000) and not world.apply(stream, 2, position=999_999)
    assert world.apply(stream, 1, position=np.int64(3), partition=1)
    assert not world.apply(stream, 1, position=7, partition=2)
    assert world.apply(stream, 2, position=2**63 - 1) and not world.apply(stream, 2, position=2**63 - 1)
    assert stream.positions == {2: 7, 0: 2**63 - 1, 1: 3} and stream.saved_positions == {2: 7}
    stream.close()
    with world.resume() as again:
        assert stream.saved_positions == stream.positions == again.positions


POSITION, PARTITION = (f"expected 0 to {2**bits - 1}, got " for bits in (63, 31))


@pytest.mark.parametrize("wrong", [1.5, float("nan"), "1", "3", None, True, np.float64(2), 2**63, -5])
def test_what_is_no_position_is_refused(world, wrong, tmp_path):
    """By updates, by a start and by a save: nothing changes, and the error says what is expected."""
    ranged = type(wrong) is int
    error, words = (ValueError, f"{POSITION}{wrong}") if ranged else (TypeError, f"expected an integer, got {wrong!r}")
    stream = world.start()
    for door in (
        lambda: world.apply(stream, 1, position=wrong),
        lambda: IndexWriter(tmp_path / "n", build(), positions={0: wrong}),
        lambda: IndexWriter.start(tmp_path / "n", build(), positions={0: wrong}),
        lambda: stream.index.save(tmp_path / "n", positions={0: wrong}),
    ):
        refused(error, re.escape(f"position: {words}"), door)
    partition = f"{PARTITION}{wrong}" if ranged else words
    refused(error, re.escape(f"partition: {partition}"), world.apply, stream, 1, partition=wrong)
    assert world.holds(stream.index, {}) and stream.positions == {} and not (tmp_path / "n").exists()
    stream.close()


@pytest.mark.parametrize("option", ["every_updates", "every_seconds", "keep"])
def test_options_out_of_range_are_refused(world, option):
    refused(ValueError, f"{option}: expected more than 0, got 0", world.start, **{option: 0})
    assert not world.directory.exists()


def test_an_update_that_does_not_fit_changes_nothing(world):
    stream = world.start()
    refused(ValueError, "features: expected 1 items like ids, got 2", stream.upsert, [5], features([1, 2]), position=1)
    assert world.holds(stream.index, {}) and stream.positions == {} and world.apply(stream, 1)
    stream.close()


class Disk:
    """Stands for `sealed.write`: full or slow as told."""

    def __init__(self, monkeypatch):
        self.full = False
        self.reached, self.go = threading.Event(), threading.Event()
        self.go.set()
        self.write = sealed.write
        monkeypatch.setattr(sealed, "write", self)

    def __call__(self, *arguments, **options):
        self.reached.set()
        self.go.wait()
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.write(*arguments, **options)


def test_a_full_disk_saves_no_position_and_close_says_so(world, monkeypatch):
    disk = Disk(monkeypatch)
    stream = world.start(every_updates=2)
    world.apply(stream, 1)
    disk.full = True
    refused(OSError, "No space left", world.apply, stream, 2)
    assert stream.positions == {0: 2} and stream.saved_positions == {} and world.holds(stream.index, {0: 2})
    assert not world.apply(stream, 2), "the update is in, its snapshot is not"
    refused(OSError, "No space left", stream.close)
    assert stream.saved_positions == {} and world.positions() == [0]
    disk.full = False
    with world.resume(every_updates=2) as again:
        assert again.positions == {}
        disk.full = True
        world.apply(again, 1)
        with contextlib.suppress(OSError):
            world.apply(again, 2)
        disk.full = False
    assert again.saved_positions == {0: 2} == again.positions and world.positions() == [0, 2], "close tried again"


def test_a_failed_removal_is_tried_again_and_stops_no_save(world, monkeypatch, caplog):
    stream = world.start(every_updates=1, keep=2)
    remove, failures = writer_files.remove_folder, [2]

    def fragile(path):
        if failures[0]:
            failures[0] -= 1
            raise PermissionError(errno.EACCES, "busy", str(path))
        remove(path)

    monkeypatch.setattr(writer_files, "remove_folder", fragile)
    for number, there in enumerate(([0, 1], [0, 1, 2], [0, 1, 2, 3], [3, 4]), 1):
        world.apply(stream, number)
        assert world.positions() == there and stream.saved_positions == {0: number}
    assert caplog.text.count("an old snapshot was not removed, tried again after the next save") == 2
    stream.close()


def test_a_writer_with_nothing_to_save_removes_what_a_kill_left(world):
    """The writer before it was killed between its last save and the removal of the oldest snapshot."""
    with world.start(every_updates=1, keep=4) as stream:
        for number in range(1, 4):
            world.apply(stream, number)
    assert world.positions() == [0, 1, 2, 3]
    world.resume(keep=2).close()
    assert world.positions() == [2, 3]


def test_resume_names_the_snapshot_that_it_cannot_read(world, tmp_path):
    with world.start(every_updates=1) as stream:
        world.apply(stream, 1)
    before, newest = snapshots(world.directory)
    (newest / "manifest.json").write_text((newest / "manifest.json").read_text().replace('"0": 1', '"0": 7'))
    for _ in range(2):  # a failed resume holds no lock
        with pytest.raises(CheckpointError, match=str(newest)) as error:
            world.resume()
        assert before.name in error.value.__notes__[0]
    refused(FileNotFoundError, "expected a complete snapshot, got none", IndexWriter.resume, tmp_path / "nothing", TRAINED)
    assert not (tmp_path / "nothing").exists()


def test_one_writer_owns_a_directory(world):
    stream = world.start()
    for call in (world.start, world.resume):
        refused(WriterConflict, rf"process {os.getpid()} on .* \(since .*\) is writing here", call)
    world.apply(stream, 1)
    stream.close()
    for closed in stream.snapshot, lambda: world.apply(stream, 2), lambda: world.apply(IndexWriter("new", stream.index), 1):
        refused(WriterConflict, "expected a writer of `start` or `resume`, got none, or one closed", closed)
    second = world.resume()
    assert second.positions == {0: 1}
    del second  # as if it had been forgotten: the lock goes with it
    third = world.resume()
    world.apply(third, 2)
    third.close()
    assert [folder.name for folder in snapshots(world.directory)] == ["0000000001", "0000000002", "0000000003"]


def test_a_file_system_without_locks_is_refused(world, monkeypatch):
    world.start().close()
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
    refused(OSError, "No locks available", world.resume)
    monkeypatch.undo()
    world.resume().close()


def test_a_new_version_catches_up_in_a_directory_of_its_own(world):
    """Built while the old one follows the stream, it starts from the positions of its build and replays the rest."""
    new_params = PARAMS | {"item": {"scale": np.float32(0.5)}}
    old = world.start(every_updates=4)
    for number in range(1, 6):
        world.apply(old, number)
    positions, catalogue = old.positions, world.numbers({0: 5})  # as the source of truth has it when the build reads it
    rebuilt = build(catalogue, list(catalogue.values()), params=new_params)
    new = IndexWriter.start(world.directory.parent / "new", rebuilt, positions=positions)
    for number in range(6, 10):
        world.apply(old, number)
    assert [world.apply(new, number) for number in range(1, 10)] == [False] * 5 + [True] * 4  # the build had 5
    assert world.holds(old.index, {0: 9}) and new.index.version != old.index.version and new.positions == {0: 9}
    assert np.array_equal(new.index.ids, old.index.ids)
    assert np.array_equal(new.index.take(old.index.ids)[0]["item"], old.index.take(old.index.ids)[0]["item"])
    np.testing.assert_array_equal(new.index.take(new.index.ids)[0]["vector"] * 6, old.index.take(old.index.ids)[0]["vector"])
    new.close()
    old.close()
    refused(aif.VersionMismatch, "", IndexWriter.resume, world.directory.parent / "new", aif.Trained(MODEL, PARAMS))
    resumed = IndexWriter.resume(world.directory.parent / "new", aif.Trained(MODEL, new_params))
    assert same(resumed.index.stored(), new.index.stored()) and resumed.positions == {0: 9}
