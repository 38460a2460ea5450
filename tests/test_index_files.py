"""Snapshots on disk and the writer: round trip, checks, resume, push, kills."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import signal
import threading
import time
from multiprocessing import Process
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax.checkpoint import METADATA_FILE, CheckpointError
from aif_jax.index import IndexWriter, ItemIndex, WriterConflict, inspect, snapshots, verify
from aif_jax.store import sealed
from aif_jax.store import snapshots as snapshot_files
from aif_jax.store.version import EncodingMismatch, VersionMismatch
from tests import demo
from tests.killed import CONTEXT, killed, last_position

SCHEMA = aif.Schema(item_attributes=(aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=3)), item_floats=8)
CONFIG = aif.Config(schema=SCHEMA, width=8)
PARAMS = {"item": {"scale": np.float32(3)}}
# An item function that compiles in no time: these tests are about files and processes.
MODEL = aif.build(CONFIG)._replace(item=lambda params, f: {"vector": f.floats * params["item"]["scale"], "item": f.ids["item"]})
TRAINED = aif.Trained(MODEL, PARAMS)
UPDATES = 400

# When one array of a damaged folder cannot be read, the reads of the others may end after Orbax closed its event loop, and the
# array store's thread then complains to nobody.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")


def features(numbers) -> aif.ItemFeatures:
    numbers = np.asarray(numbers)
    item = (numbers % 9).astype(np.int32)
    floats = (numbers[:, None] + np.arange(8) / 8).astype(np.float32)
    return aif.ItemFeatures(ids={"item": item, "category": item % 3}, floats=floats)


def build(ids=(5, 6, 7), numbers=(1, 2, 3), params=PARAMS, encoder=None, **options) -> ItemIndex:
    options = {"batch_size": 16, "progress": False, **options}
    return ItemIndex.build(aif.Trained(MODEL, params, encoder), features(numbers), ids=list(ids), **options)


def change(position: int) -> tuple[list[int], list[int] | None]:
    """The stream's entry at a position, the same at every call: item ids, and their new numbers or None for a deletion."""
    rng = np.random.default_rng(position)
    ids, numbers = rng.choice(60, 5, replace=False).tolist(), rng.integers(0, 1 << 20, 5).tolist()
    return ids, None if position % 4 == 3 else numbers


def apply(to: IndexWriter, position: int, **options) -> bool:
    ids, numbers = change(position)
    if numbers is None:
        return to.delete(ids, position=position, **options)
    return to.upsert(ids, features(numbers), position=position, **options)


def after(position: int) -> ItemIndex:
    """Rebuilt from what the catalogue is after the first updates of the stream."""
    catalogue = {i: f for i, f in zip((5, 6, 7), (1, 2, 3), strict=True)}
    for at in range(1, position + 1):
        ids, numbers = change(at)
        for place, i in enumerate(ids):
            catalogue.pop(i, None) if numbers is None else catalogue.update({i: numbers[place]})
    return build(list(catalogue), list(catalogue.values()))


def same(a: ItemIndex, b: ItemIndex) -> bool:
    return len(a) == len(b) and demo.same(a.stored(), b.stored())


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_round_trip(tmp_path, storage):
    index = build(storage=storage).upsert([9], features([4])).delete([5])
    index.save(tmp_path / "a", positions={0: 17, 3: 5})
    back = ItemIndex.load(tmp_path / "a", TRAINED)
    assert same(back, index) and back.version == index.version
    assert same(back.upsert([5], features([1])), index.upsert([5], features([1])))
    manifest = verify(tmp_path / "a")
    assert (manifest.items, manifest.storage, manifest.version) == (3, storage, index.version)
    assert (manifest.positions, manifest.ids, manifest.batch_size) == ({0: 17, 3: 5}, "integers", 16)
    assert manifest.config == CONFIG and manifest.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(index.stored()))
    with pytest.raises(FileExistsError, match="something is there"):
        index.save(tmp_path / "a")


def test_the_same_items_give_the_same_record_whatever_their_history(tmp_path):
    build().save(tmp_path / "a")
    build((7,), (9,)).upsert([6, 5], features([2, 1])).upsert([7, 8], features([3, 4])).delete([8]).save(tmp_path / "b")
    for name in ("manifest.json", "arrays.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_empty_index_goes_to_disk_and_back(tmp_path):
    build().delete([5, 6, 7]).save(tmp_path / "a")
    assert verify(tmp_path / "a").items == 0
    assert ItemIndex.load(tmp_path / "a", TRAINED).upsert([1], features([1])).ids.tolist() == [1]


def test_strings_go_to_disk_and_back(tmp_path):
    index = build(["a", "bb", ""])
    index.save(tmp_path / "a")
    back = ItemIndex.load(tmp_path / "a", TRAINED)
    assert verify(tmp_path / "a").ids == "strings" and back.lookup(["bb", "", "b"])[1].tolist() == [True, True, False]
    assert same(back.upsert(["c"], features([4])).delete(["a"]), index.upsert(["c"], features([4])).delete(["a"]))


@pytest.mark.parametrize("url", ["s3://bucket/index", Path("gs://bucket/index"), "file:///tmp/index"])
def test_a_url_is_no_folder(url):
    calls = (lambda path: build().save(path), inspect, verify, lambda path: ItemIndex.load(path, TRAINED))
    for call in calls:
        with pytest.raises(ValueError, match="path: expected a local path, got the URL .*aif_jax.connectors.SnapshotStore"):
            call(url)
    assert not Path(str(url).split(":")[0] + ":").exists()


class OtherWords:
    """What an index needs of an encoder to tell it from another."""

    schema = CONFIG.schema

    def __init__(self, version):
        self.version = version


def test_what_another_encoder_made_is_refused_by_name(tmp_path):
    index = build(encoder=OtherWords("a" * 64))
    assert index.version != build().version and index.encoding == "a" * 64
    index.save(tmp_path / "a")
    assert ItemIndex.load(tmp_path / "a", aif.Trained(MODEL, PARAMS, OtherWords("a" * 64))).version == index.version
    with pytest.raises(EncodingMismatch, match=f"index in .*: expected the encoding {'b' * 64}, got {'a' * 64}"):
        ItemIndex.load(tmp_path / "a", aif.Trained(MODEL, PARAMS, OtherWords("b" * 64)))
    encoded = aif.ItemFeatures(ids=features([1]).ids, floats=features([1]).floats, encoding="b" * 64)
    with pytest.raises(EncodingMismatch, match="ItemFeatures: expected the encoding aaa"):
        index.upsert([1], encoded)
    assert len(build().upsert([1], encoded)) == 4


def test_what_does_not_belong_together_is_refused(tmp_path):
    index = build()
    index.save(tmp_path / "a")
    other = {"item": {"scale": np.float32(4)}}
    with pytest.raises(VersionMismatch) as error:
        ItemIndex.load(tmp_path / "a", aif.Trained(MODEL, other))
    assert index.version in str(error.value) and build(params=other).version in str(error.value)
    with pytest.raises(ValueError, match=r"config.width: expected 16, the snapshot has 8"):
        ItemIndex.load(tmp_path / "a", aif.Trained(aif.build(CONFIG.replace(width=16)), PARAMS))
    wider = aif.Schema(item_attributes=SCHEMA.item_attributes, item_floats=9)
    with pytest.raises(ValueError, match=r"config.schema.item_floats: expected 9, the snapshot has 8"):
        ItemIndex.load(tmp_path / "a", aif.Trained(aif.build(CONFIG.replace(schema=wider)), PARAMS))
    with pytest.raises(FileNotFoundError, match="expected a snapshot, found nothing"):
        ItemIndex.load(tmp_path / "b", TRAINED)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "record", "format", "no manifest", "earlier"])
def test_torn_and_altered_snapshots_say_so(tmp_path, damage):
    index = build(range(100), range(100))
    index.save(tmp_path / "a")
    data, metadata = tmp_path / "a" / "arrays.safetensors", tmp_path / "a" / "manifest.json"
    if damage == "flip":
        octets = bytearray(data.read_bytes())
        octets[len(octets) // 2] ^= 1
        data.write_bytes(octets)
    elif damage == "cut":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif damage == "remove":
        data.unlink()
    elif damage == "record":
        metadata.write_text(metadata.read_text().replace('"items": 100', '"items": 99'))
    elif damage == "format":
        metadata.write_text(metadata.read_text().replace("aif_jax.index/3", "aif_jax.index/9"))
    elif damage == "earlier":
        metadata.rename(tmp_path / "a" / METADATA_FILE)
    else:
        metadata.unlink()
    wanted = {"record": "was altered", "format": "expected the format 'aif_jax.index/3', got 'aif_jax.index/9'; build"}
    wanted |= {"no manifest": "not a complete snapshot", "remove": "expected a file in the folder", "cut": "expected .* bytes"}
    wanted["earlier"] = "got one of an earlier version; build the index again: ItemIndex.build, run.index or aif-jax"
    for read in (verify, lambda path: ItemIndex.load(path, TRAINED)):
        with pytest.raises(CheckpointError, match=wanted.get(damage, "torn or altered|was altered")) as error:
            read(tmp_path / "a")
        assert str(tmp_path / "a") in str(error.value)


def positions(directory) -> list[int]:
    """Of partition 0, of every complete snapshot."""
    return [inspect(folder).positions.get(0, 0) for folder in snapshots(directory)]


def test_writer_snapshots_by_count_and_keeps_the_last_three(tmp_path):
    with IndexWriter.start(tmp_path / "w", build(), every_updates=4) as stream:
        assert positions(tmp_path / "w") == [0]
        for position in range(1, 19):
            assert apply(stream, position)
        assert positions(tmp_path / "w") == [8, 12, 16] and stream.saved_positions == {0: 16}
        assert not apply(stream, 18) and not apply(stream, 3) and stream.positions == {0: 18}
    assert positions(tmp_path / "w") == [12, 16, 18] == sorted(positions(tmp_path / "w"))
    assert same(stream.index, after(18)) and stream.saved_positions == {0: 18}
    with IndexWriter.resume(tmp_path / "w", TRAINED) as again:
        assert again.positions == again.saved_positions == {0: 18} and same(again.index, after(18))
    assert positions(tmp_path / "w") == [12, 16, 18], "nothing new, nothing saved"
    with pytest.raises(FileExistsError, match="holds 3 snapshots already; use IndexWriter.resume"):
        IndexWriter.start(tmp_path / "w", build())
    with IndexWriter.resume(tmp_path / "w", TRAINED) as third:
        apply(third, 19)
    assert positions(tmp_path / "w") == [16, 18, 19]


def test_a_writer_that_was_only_made_writes_nothing(tmp_path):
    IndexWriter(tmp_path / "w", build())
    assert not (tmp_path / "w").exists()


def test_positions_rise_within_a_partition_and_may_have_gaps(tmp_path):
    stream = IndexWriter.start(tmp_path / "w", build(), positions={2: 7}, every_updates=None)
    assert stream.delete([], position=0) and not stream.delete([], position=0), "offsets may begin at 0"
    assert stream.delete([5], position=1_000_000) and not stream.delete([6], position=999_999)
    assert stream.upsert([9], features([1]), position=np.int64(3), partition=1)
    assert not stream.delete([9], position=7, partition=2)
    assert stream.positions == {2: 7, 0: 1_000_000, 1: 3} and stream.saved_positions == {2: 7}
    stream.close()
    assert stream.saved_positions == stream.positions == IndexWriter.resume(tmp_path / "w", TRAINED).positions


@pytest.mark.parametrize("position", [1.5, float("nan"), "1", None, True, np.float64(2)])
def test_positions_that_are_no_integers_are_refused(tmp_path, position):
    stream = IndexWriter.start(tmp_path / "w", build())
    for call in (lambda: stream.delete([5], position=position), lambda: stream.delete([5], position=1, partition=position)):
        with pytest.raises(TypeError, match="(position|partition): expected an integer, got"):
            call()
    with pytest.raises(TypeError, match="position: expected an integer, got"):
        IndexWriter(tmp_path / "x", build(), positions={0: position})
    assert len(stream.index) == 3 and stream.positions == {}


@pytest.mark.parametrize("option", ["every_updates", "every_seconds", "keep"])
def test_options_out_of_range_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match=f"{option}: expected more than 0, got 0"):
        IndexWriter.start(tmp_path / "w", build(), **{option: 0})
    assert not (tmp_path / "w").exists()


def test_an_update_that_does_not_fit_changes_nothing(tmp_path):
    stream = IndexWriter.start(tmp_path / "w", build())
    with pytest.raises(ValueError, match="features: expected 1 items like ids, got 2"):
        stream.upsert([5], features([1, 2]), position=1)
    assert stream.positions == {} and apply(stream, 1)


def test_writer_snapshots_by_time(tmp_path):
    now = [0.0]
    stream = IndexWriter.start(tmp_path, build(), every_updates=None, every_seconds=10, clock=lambda: now[0])
    for position, at in enumerate((3.0, 9.9, 10.0, 12.0, 20.0), 1):
        now[0] = at
        apply(stream, position)
    assert positions(tmp_path) == [0, 3, 5]


def test_a_snapshot_written_in_the_background_holds_its_own_moment(tmp_path):
    with IndexWriter.start(tmp_path / "w", build(), every_updates=5, background=True) as stream:
        for position in range(1, 18):
            apply(stream, position)
    assert positions(tmp_path / "w") == [10, 15, 17]
    for folder in snapshots(tmp_path / "w"):
        assert same(ItemIndex.load(folder, TRAINED), after(inspect(folder).positions[0]))


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


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_saves_no_position_and_close_says_so(tmp_path, monkeypatch, background):
    disk = Disk(monkeypatch)
    stream = IndexWriter.start(tmp_path / "w", build(), every_updates=2, background=background)
    apply(stream, 1)
    disk.full = True
    with pytest.raises(OSError, match="No space left"):
        apply(stream, 2)
        stream.wait()  # in the background it fails there
    assert stream.positions == {0: 2} and stream.saved_positions == {} and same(stream.index, after(2))
    assert not apply(stream, 2), "the update is in, its snapshot is not"
    with pytest.raises(OSError, match="No space left"):
        stream.close()
    assert stream.saved_positions == {} and positions(tmp_path / "w") == [0]
    disk.full = False
    with IndexWriter.resume(tmp_path / "w", TRAINED, every_updates=2, background=background) as again:
        assert again.positions == {}
        disk.full = True
        apply(again, 1)
        with contextlib.suppress(OSError):
            apply(again, 2)
        disk.full = False
    assert again.saved_positions == {0: 2} == again.positions and positions(tmp_path / "w") == [0, 2], "close tried again"


def test_a_position_is_saved_when_it_is_durable_no_sooner(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    stream = IndexWriter.start(tmp_path / "w", build(), every_updates=1, background=True)
    disk.go.clear()
    apply(stream, 1)
    assert stream.positions == {0: 1} and stream.saved_positions == {} and positions(tmp_path / "w") == [0]
    disk.go.set()
    stream.wait()
    assert stream.saved_positions == {0: 1} and positions(tmp_path / "w") == [0, 1]


def test_a_failed_removal_is_tried_again_and_stops_no_save(tmp_path, monkeypatch, caplog):
    stream = IndexWriter.start(tmp_path / "w", build(), every_updates=1, keep=2)
    remove, failures = snapshot_files.remove_folder, [2]

    def fragile(path):
        if failures[0]:
            failures[0] -= 1
            raise PermissionError(errno.EACCES, "busy", str(path))
        remove(path)

    monkeypatch.setattr(snapshot_files, "remove_folder", fragile)
    for position, there in enumerate(([0, 1], [0, 1, 2], [0, 1, 2, 3], [3, 4]), 1):
        apply(stream, position)
        assert positions(tmp_path / "w") == there and stream.saved_positions == {0: position}
    assert caplog.text.count("an old snapshot was not removed, tried again after the next save") == 2


def test_a_push_catches_up_with_the_updates_that_came_meanwhile(tmp_path):
    new_params = {"item": {"scale": np.float32(0.5)}}
    stream = IndexWriter.start(tmp_path, build(), every_updates=4)
    for position in range(1, 6):
        apply(stream, position)
    with pytest.raises(RuntimeError, match="expected begin_push"):
        stream.finish_push(build())
    stream.begin_push()
    catalogue = after(5).ids  # as the source of truth has it when the build reads it
    new = build(catalogue, np.zeros(len(catalogue)), params=new_params)
    new = new.upsert(catalogue, features(after(5).take(catalogue)[0]["vector"][:, 0].astype(np.int64) // 3))
    for position in range(6, 10):
        apply(stream, position)
    old = stream.index
    new = stream.finish_push(new)
    assert stream.index is new and new.version != old.version
    assert same(old, after(9)) and np.array_equal(new.ids, old.ids)
    assert np.array_equal(new.take(new.ids)[0]["item"], old.take(new.ids)[0]["item"])
    np.testing.assert_array_equal(new.take(new.ids)[0]["vector"] * 6, old.take(new.ids)[0]["vector"])
    apply(stream, 10)
    stream.close()
    with pytest.raises(VersionMismatch):
        IndexWriter.resume(tmp_path, TRAINED)
    resumed = IndexWriter.resume(tmp_path, aif.Trained(MODEL, new_params))
    assert same(resumed.index, stream.index) and resumed.positions == {0: 10}


def test_a_push_that_is_not_on_disk_is_saved_by_close(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    stream = IndexWriter.start(tmp_path, build())
    stream.begin_push()
    disk.full = True
    with pytest.raises(OSError, match="No space left"):
        stream.finish_push(build(params={"item": {"scale": np.float32(0.5)}}))
    disk.full = False
    stream.close()
    assert inspect(snapshots(tmp_path)[-1]).version == stream.index.version != build().version


def test_a_writer_with_nothing_to_save_removes_what_a_kill_left(tmp_path):
    """The writer before it was killed between its last save and the removal of the oldest snapshot."""
    with IndexWriter.start(tmp_path / "w", build(), every_updates=1, keep=4) as stream:
        for position in range(1, 4):
            apply(stream, position)
    assert positions(tmp_path / "w") == [0, 1, 2, 3]
    IndexWriter.resume(tmp_path / "w", TRAINED, keep=2).close()
    assert positions(tmp_path / "w") == [2, 3]


def test_resume_names_the_snapshot_that_it_cannot_read(tmp_path):
    with IndexWriter.start(tmp_path / "w", build(), every_updates=1) as stream:
        apply(stream, 1)
    before, newest = snapshots(tmp_path / "w")
    text = (newest / "manifest.json").read_text()
    (newest / "manifest.json").write_text(text.replace('"0": 1', '"0": 7'))
    for _ in range(2):  # a failed resume holds no lock
        with pytest.raises(CheckpointError, match=str(newest)) as error:
            IndexWriter.resume(tmp_path / "w", TRAINED)
        assert before.name in error.value.__notes__[0]
    with pytest.raises(FileNotFoundError, match="expected a complete snapshot, got none"):
        IndexWriter.resume(tmp_path / "nothing", TRAINED)
    assert not (tmp_path / "nothing").exists()


def test_one_writer_owns_a_directory(tmp_path):
    stream = IndexWriter.start(tmp_path / "w", build())
    for call in (
        lambda: IndexWriter.start(tmp_path / "w", build()),
        lambda: IndexWriter.resume(tmp_path / "w", TRAINED),
    ):
        with pytest.raises(WriterConflict, match=rf"process {os.getpid()} on .* \(owner 1, since .*\) is writing here"):
            call()
    apply(stream, 1)
    stream.close()
    with pytest.raises(WriterConflict, match="this writer is closed"):
        stream.snapshot()
    second = IndexWriter.resume(tmp_path / "w", TRAINED)
    assert second.positions == {0: 1}
    del second  # as if it had been forgotten: the lock goes with it
    third = IndexWriter.resume(tmp_path / "w", TRAINED)
    apply(third, 2)
    third.close()
    assert [folder.name[:6] for folder in snapshots(tmp_path / "w")] == ["000001", "000001", "000003"]


def test_a_writer_that_was_taken_over_saves_nothing_more(tmp_path):
    old = IndexWriter.start(tmp_path / "w", build(), every_updates=None)
    apply(old, 1)
    new = IndexWriter.resume(tmp_path / "w", TRAINED, takeover=True, every_updates=None)
    apply(old, 2)
    for call in (old.snapshot, old.close):
        with pytest.raises(WriterConflict, match=r"owner 2, since .*\) took over; this writer \(owner 1\) saves no more"):
            call()
    assert old.saved_positions == {} and positions(tmp_path / "w") == [0]
    with pytest.raises(WriterConflict, match="owner 2"):
        IndexWriter.resume(tmp_path / "w", TRAINED)
    apply(new, 1)
    new.close()
    assert positions(tmp_path / "w") == [0, 1]


def test_a_save_that_is_overtaken_counts_as_none_and_sorts_before_the_new_owners(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    old = IndexWriter.start(tmp_path / "w", build(), every_updates=2, background=True)
    disk.go.clear()
    disk.reached.clear()
    apply(old, 1)
    apply(old, 2)  # its save hangs
    disk.reached.wait()
    new = IndexWriter.resume(tmp_path / "w", TRAINED, takeover=True, every_updates=1)
    assert new.positions == {}
    disk.go.set()
    with pytest.raises(WriterConflict, match="took over"):
        old.wait()
    assert old.saved_positions == {}
    apply(new, 1)
    assert positions(tmp_path / "w") == [0, 2, 1]
    new.close()
    assert IndexWriter.resume(tmp_path / "w", TRAINED).positions == {0: 1}, "the new owner's, whatever came late"


def test_the_number_of_owners_rises_even_if_their_files_are_lost(tmp_path):
    for _ in range(2):
        with contextlib.closing(
            IndexWriter.resume(tmp_path, TRAINED) if snapshots(tmp_path) else IndexWriter.start(tmp_path, build())
        ) as stream:
            stream.snapshot()
        for claim in tmp_path.glob(".owner-*"):
            claim.unlink()
    assert [folder.name[:6] for folder in snapshots(tmp_path)] == ["000001", "000001", "000002"]


CONTEXT.set_forkserver_preload(["tests.test_index_files"])


def work(directory: str, log: str, kills: int = 0) -> None:
    """A process that applies the stream, from wherever it is, until it is killed; of the first `kills` none gets to the end."""
    if snapshots(directory):
        stream = IndexWriter.resume(directory, TRAINED, every_updates=3)
    else:
        stream = IndexWriter.start(directory, build(), every_updates=3)
    with open(log, "a", buffering=1) as lines:
        start = stream.positions.get(0, 0)
        lines.write(f"start {start}\n")
        until = UPDATES if Path(log).read_text().count("start") > kills else start + UPDATES // (kills + 1)
        for position in range(start + 1, until + 1):
            fresh = apply(stream, position)
            lines.write(f"applied {position} {int(fresh)} {stream.saved_positions.get(0, 0)}\n")
        while until < UPDATES:
            signal.pause()
        stream.close()


def started(directory: Path, log: Path) -> Process:
    """A process that works, once it has applied something."""
    seen = log.read_text().count("applied") if log.exists() else 0
    process = CONTEXT.Process(target=work, args=(str(directory), str(log)))
    process.start()
    while not log.exists() or log.read_text().count("applied") == seen:
        assert process.is_alive()
        time.sleep(0.01)
    return process


def stopped_while_saving(pid: int, directory: Path) -> list[Path]:
    """The work folders of a process that is stopped now; none where it was stopped before it had locked one."""
    while not saving(directory):
        time.sleep(0.0002)
    os.kill(pid, signal.SIGSTOP)
    threads = Path(f"/proc/{pid}/task")
    while threads.exists() and any(f.read_text().rpartition(")")[2].split()[0] != "T" for f in threads.glob("*/stat")):
        time.sleep(0.001)  # a call to the system that it is in ends first
    begun = [folder for folder in directory.iterdir() if folder.name.endswith(".partial")]
    return begun if all(map(locked, begun)) else []


def locked(folder: Path) -> bool:
    """Whether a process holds the lock of a folder; one that it has just made has none yet, and may be removed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def saving(directory: str | Path) -> bool:
    """Whether a snapshot is being written, or was when its writer died."""
    folder = Path(directory)
    return folder.is_dir() and any(f.name.endswith(".partial") for f in folder.iterdir())


def test_a_second_process_is_refused_until_the_first_one_is_dead(tmp_path):
    """A stopped process keeps its lock, a killed one does not; nothing that a live writer has begun is removed."""
    directory, log = tmp_path / "w", tmp_path / "log"
    process = started(directory, log)
    try:
        while not (begun := stopped_while_saving(process.pid, directory)):
            os.kill(process.pid, signal.SIGCONT)
        with pytest.raises(WriterConflict, match=f"process {process.pid} on .* is writing here"):
            IndexWriter.resume(directory, TRAINED)
        assert all(folder.exists() for folder in begun)
        taken = IndexWriter.resume(directory, TRAINED, takeover=True)
        assert all(folder.exists() for folder in begun), "a takeover leaves them too: their process may go on"
        os.kill(process.pid, signal.SIGCONT)
        process.join(60)
        assert process.exitcode == 1, "WriterConflict ends it"
    finally:
        process.kill()
        process.join()
    saved = taken.positions.get(0, 0)
    apply(taken, saved + 1)
    taken.close()
    process = started(directory, log)  # a third one
    process.kill()
    process.join()
    with IndexWriter.resume(directory, TRAINED) as last:
        assert last.positions[0] > saved and same(last.index, after(last.positions[0]))


def test_kills_at_random_points_lose_nothing(tmp_path):
    """What a killed process leaves is never less than what it had saved, and ends as a rebuild.

    A dozen kills; `tests/reliability/test_kills.py` kills index writers and training runs a thousand times.
    """
    directory, log = str(tmp_path / "w"), tmp_path / "log"

    def await_save(number: int, process: Any) -> None:
        end = time.monotonic() + 2  # it may have seen no save
        while number % 3 == 2 and process.is_alive() and not saving(directory) and time.monotonic() < end:
            time.sleep(0.0005)  # a third come in the middle of a save

    def awaited(number: int) -> tuple[str, int]:  # half of the kills come while it compiles
        return ("applied", 1 + 2 * number) if number % 2 else ("start", 1)

    options = {"kills": 12, "pause": 0.1, "chance": random.Random(0), "awaited": awaited, "before": await_save}
    torn = [saving(directory) for _ in killed(work, (directory, str(log), 12), log, **options)]
    assert last_position(log, first=0) == UPDATES and len(torn) == 12 and any(torn)
    final = IndexWriter.resume(directory, TRAINED)
    assert final.positions == {0: UPDATES} and same(final.index, after(UPDATES)) and not saving(directory)
