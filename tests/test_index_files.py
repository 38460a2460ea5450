"""Snapshots on disk and the writer: round trip, checks, resume, push, kills."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax.checkpoint import METADATA_FILE, CheckpointError
from aif_jax.data.schema import Attribute, Schema
from aif_jax.index import IndexWriter, ItemIndex, Update, inspect, snapshots, verify
from aif_jax.types import ItemFeatures
from aif_jax.version import VersionMismatch

SCHEMA = Schema(item_attributes=(Attribute(name="item", size=9), Attribute(name="category", size=3)), item_floats=8)
CONFIG = aif.Config(schema=SCHEMA, memory=(), simtier="off", width=8)
PARAMS = {"item": {"scale": np.float32(3)}}
# An item function that compiles in no time: these tests are about files and processes.
MODEL = aif.build(CONFIG)._replace(item=lambda params, f: {"vector": f.floats * params["item"]["scale"], "item": f.ids["item"]})
UPDATES = 400

# When one array of a damaged folder cannot be read, the reads of the others may end after Orbax closed its event loop, and the
# array store's thread then complains to nobody.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")


def features(numbers) -> ItemFeatures:
    numbers = np.asarray(numbers)
    item = (numbers % 9).astype(np.int32)
    floats = (numbers[:, None] + np.arange(8) / 8).astype(np.float32)
    return ItemFeatures(ids={"item": item, "category": item % 3}, floats=floats)


def build(ids=(5, 6, 7), numbers=(1, 2, 3), params=PARAMS, **options) -> ItemIndex:
    options = {"batch_size": 16, "progress": False, **options}
    return ItemIndex.build(MODEL, params, features(numbers), ids=np.asarray(ids, np.int64), **options)


def update(position: int) -> Update:
    """The stream's entry at a position: the same whenever it is asked for."""
    rng = np.random.default_rng(position)
    ids = rng.choice(60, 5, replace=False)
    return Update(position=position, ids=ids, features=None if position % 4 == 3 else features(rng.integers(0, 1 << 20, 5)))


def after(position: int) -> ItemIndex:
    """Rebuilt from what the catalogue is after the first updates of the stream."""
    catalogue = {i: f for i, f in zip((5, 6, 7), (1, 2, 3), strict=True)}
    for at in range(1, position + 1):
        entry = update(at)
        rng = np.random.default_rng(at)
        ids, numbers = rng.choice(60, 5, replace=False).tolist(), rng.integers(0, 1 << 20, 5).tolist()
        for i, number in zip(ids, numbers, strict=True):
            catalogue.pop(i, None) if entry.features is None else catalogue.update({i: number})
    return build(list(catalogue), list(catalogue.values()))


def same(a: ItemIndex, b: ItemIndex) -> bool:
    left, right = a.stored(), b.stored()
    return len(a) == len(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_round_trip(tmp_path, storage):
    index = build(storage=storage).upsert([9], features([4])).delete([5])
    index.save(tmp_path / "a", position=17)
    back = ItemIndex.load(tmp_path / "a", MODEL, PARAMS)
    assert same(back, index) and back.version == index.version and back.batch_size == 16
    assert same(back.upsert([5], features([1])), index.upsert([5], features([1])))
    manifest = verify(tmp_path / "a")
    assert (manifest.items, manifest.position, manifest.storage, manifest.version) == (3, 17, storage, index.version)
    assert manifest.config == CONFIG and manifest.nbytes == 8 + sum(leaf.nbytes for leaf in jax.tree.leaves(index.stored()))
    with pytest.raises(FileExistsError, match="stays as it is"):
        index.save(tmp_path / "a")


def test_the_same_items_give_the_same_record_whatever_their_history(tmp_path):
    build().save(tmp_path / "a")
    build((7,), (9,)).upsert([6, 5], features([2, 1])).upsert([7, 8], features([3, 4])).delete([8]).save(tmp_path / "b")
    records = [json.loads((tmp_path / name / METADATA_FILE).read_text())["custom_metadata"] for name in "ab"]
    assert records[0] == records[1]


def test_an_empty_index_goes_to_disk_and_back(tmp_path):
    build().delete([5, 6, 7]).save(tmp_path / "a")
    assert verify(tmp_path / "a").items == 0
    assert ItemIndex.load(tmp_path / "a", MODEL, PARAMS).upsert([1], features([1])).ids.tolist() == [1]


def test_what_does_not_belong_together_is_refused(tmp_path):
    index = build()
    index.save(tmp_path / "a")
    other = {"item": {"scale": np.float32(4)}}
    with pytest.raises(VersionMismatch) as error:
        ItemIndex.load(tmp_path / "a", MODEL, other)
    assert index.version in str(error.value) and build(params=other).version in str(error.value)
    with pytest.raises(ValueError, match=r"config.width: expected 16, the index has 8"):
        ItemIndex.load(tmp_path / "a", aif.build(CONFIG.replace(width=16)), PARAMS)
    wider = Schema(item_attributes=SCHEMA.item_attributes, item_floats=9)
    with pytest.raises(ValueError, match=r"config.schema.item_floats: expected 9, the index has 8"):
        ItemIndex.load(tmp_path / "a", aif.build(CONFIG.replace(schema=wider)), PARAMS)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        ItemIndex.load(tmp_path / "b", MODEL, PARAMS)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "record", "format", "no metadata"])
def test_torn_and_altered_snapshots_say_so(tmp_path, damage):
    index = build(range(100), range(100))
    index.save(tmp_path / "a")
    data = max((f for f in (tmp_path / "a").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size * ("/d/" in str(f)))
    metadata = tmp_path / "a" / METADATA_FILE
    if damage == "flip":
        octets = bytearray(data.read_bytes())
        octets[len(octets) // 2] ^= 1
        data.write_bytes(octets)
    elif damage == "cut":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif damage == "remove":
        data.unlink()
    elif damage == "record":
        metadata.write_text(metadata.read_text().replace('"position": 0', '"position": 9'))
    elif damage == "format":
        metadata.write_text(metadata.read_text().replace("aif_jax.index/1", "aif_jax.index/2"))
    else:
        metadata.unlink()
    wanted = {"record": "was altered", "format": r"expected the format 'aif_jax.index/1', got 'aif_jax.index/2'"}
    wanted["no metadata"] = "not a complete checkpoint"
    for read in (verify, lambda path: ItemIndex.load(path, MODEL, PARAMS)):
        with pytest.raises(CheckpointError, match=wanted.get(damage, "torn or altered|was altered")) as error:
            read(tmp_path / "a")
        assert str(tmp_path / "a") in str(error.value)


def test_writer_snapshots_by_count_and_keeps_the_last_three(tmp_path):
    with IndexWriter(tmp_path / "w", build(), every_updates=4) as writer:
        assert [inspect(f).position for f in snapshots(tmp_path / "w")] == [0]
        for position in range(1, 19):
            assert writer.apply(update(position))
        assert [inspect(f).position for f in snapshots(tmp_path / "w")] == [8, 12, 16] and writer.saved_position == 16
        assert not writer.apply(update(18)) and not writer.apply(update(3)) and writer.position == 18
        with pytest.raises(ValueError, match="expected position 19, got 20: updates are missing"):
            writer.apply(update(20))
    assert [inspect(f).position for f in snapshots(tmp_path / "w")] == [12, 16, 18]
    assert same(writer.index, after(18))
    again = IndexWriter.resume(tmp_path / "w", MODEL, PARAMS)
    assert again.position == 18 and same(again.index, after(18))
    with pytest.raises(FileExistsError, match="holds 3 snapshots already; use IndexWriter.resume"):
        IndexWriter(tmp_path / "w", build())


def test_writer_snapshots_by_time(tmp_path):
    now = [0.0]
    writer = IndexWriter(tmp_path, build(), every_updates=None, every_seconds=10, clock=lambda: now[0])
    for position, at in enumerate((3.0, 9.9, 10.0, 12.0, 20.0), 1):
        now[0] = at
        writer.apply(update(position))
    assert [inspect(f).position for f in snapshots(tmp_path)] == [0, 3, 5]


def test_a_snapshot_written_in_the_background_holds_its_own_moment(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        writer = IndexWriter(tmp_path / "w", build(), every_updates=5, submit=pool.submit)
        for position in range(1, 18):
            writer.apply(update(position))
        writer.close()
        for folder in snapshots(tmp_path / "w"):
            assert same(ItemIndex.load(folder, MODEL, PARAMS), after(inspect(folder).position))
        (tmp_path / "w" / "0000000005").mkdir()  # in the way of the next one
        writer.apply(update(18))
        writer.snapshot()
        with pytest.raises(FileExistsError):
            writer.wait()


def test_a_push_catches_up_with_the_updates_that_came_meanwhile(tmp_path):
    new_params = {"item": {"scale": np.float32(0.5)}}
    writer = IndexWriter(tmp_path, build(), every_updates=4)
    for position in range(1, 6):
        writer.apply(update(position))
    with pytest.raises(RuntimeError, match="expected begin_push"):
        writer.finish_push(build())
    writer.begin_push()
    catalogue = after(5).ids  # as the source of truth has it when the build reads it
    beside = build(catalogue, np.zeros(len(catalogue)), params=new_params)
    beside = beside.upsert(catalogue, features(after(5).take(catalogue)[0]["vector"][:, 0].astype(np.int64) // 3))
    for position in range(6, 10):
        writer.apply(update(position))
    old = writer.index
    new = writer.finish_push(beside)
    assert writer.index is new and new.version != old.version
    assert same(old, after(9)) and np.array_equal(new.ids, old.ids)
    assert np.array_equal(new.take(new.ids)[0]["item"], old.take(new.ids)[0]["item"])
    np.testing.assert_array_equal(new.take(new.ids)[0]["vector"] * 6, old.take(new.ids)[0]["vector"])
    writer.apply(update(10))
    writer.close()
    resumed = IndexWriter.resume(tmp_path, MODEL, new_params)
    assert same(resumed.index, writer.index) and resumed.position == 10
    with pytest.raises(VersionMismatch):
        IndexWriter.resume(tmp_path, MODEL, PARAMS)


def test_resume_names_the_snapshot_that_it_cannot_read(tmp_path):
    writer = IndexWriter(tmp_path / "w", build(), every_updates=1)
    writer.apply(update(1))
    newest = snapshots(tmp_path / "w")[-1]
    text = (newest / METADATA_FILE).read_text()
    (newest / METADATA_FILE).write_text(text.replace('"position": 1', '"position": 7'))
    with pytest.raises(CheckpointError, match=str(newest)) as error:
        IndexWriter.resume(tmp_path / "w", MODEL, PARAMS)
    assert "0000000000" in error.value.__notes__[0]
    with pytest.raises(FileNotFoundError, match="no complete snapshot"):
        IndexWriter.resume(tmp_path / "nothing", MODEL, PARAMS)


@pytest.mark.parametrize("metadata", ["whole", "empty", "missing"])
def test_a_snapshot_that_never_got_its_name_is_none(tmp_path, metadata):
    """A kill between Orbax's last file, or the first byte of it, and the renaming of the folder."""
    writer = IndexWriter(tmp_path, build(), every_updates=1)
    writer.apply(update(1))
    first, newest = snapshots(tmp_path)
    unfinished = newest.rename(tmp_path / f"{newest.name}.orbax-checkpoint-tmp")
    if metadata == "empty":
        (unfinished / METADATA_FILE).write_text("")
    elif metadata == "missing":
        (unfinished / METADATA_FILE).unlink()
    assert snapshots(tmp_path) == [first]
    resumed = IndexWriter.resume(tmp_path, MODEL, PARAMS)
    assert resumed.position == 0 and not unfinished.exists()
    resumed.apply(update(1))
    resumed.close()
    assert same(IndexWriter.resume(tmp_path, MODEL, PARAMS).index, after(1))


def work(directory: str, log: str, start: float) -> None:
    """A process that applies the stream, from wherever it stands, until it is killed."""
    if snapshots(directory):
        writer = IndexWriter.resume(directory, MODEL, PARAMS, every_updates=3)
    else:
        writer = IndexWriter(directory, build(), every_updates=3)
    with open(log, "a", buffering=1) as lines:
        lines.write(f"start {writer.position}\n")
        for position in range(writer.position + 1, UPDATES + 1):
            writer.apply(update(position))
            lines.write(f"applied {position} saved {writer.saved_position}\n")
        writer.close()
        lines.write("done\n")


def saving(directory: str) -> bool:
    """Whether a snapshot is being written, or was when its writer died."""
    folder = Path(directory)
    return folder.is_dir() and any(".orbax-checkpoint-tmp" in f.name for f in folder.iterdir())


def test_kills_at_random_points_lose_nothing(tmp_path):
    """At least 50 kills of a real process; what it leaves is never less than what it had saved, and ends as a rebuild."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_index_files"])
    directory, log, chance = str(tmp_path / "w"), tmp_path / "log", random.Random(0)
    log.touch()
    kills, torn = 0, 0
    while True:
        process = context.Process(target=work, args=(directory, str(log), time.monotonic()))
        process.start()
        seen, awaited = log.read_text(), ("start", "applied")[kills % 2]  # half of the kills come while it compiles
        while awaited not in log.read_text()[len(seen) :] and process.is_alive():
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.15))
        while kills % 3 == 2 and process.is_alive() and not saving(directory):  # a third come in the middle of a save
            time.sleep(0.0005)
        if kills < 50 and process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, process.exitcode
        kills += 1
        torn += saving(directory)
    saved = position = 0
    for line in log.read_text().splitlines():
        word, *rest = line.split()
        if word == "start":
            assert int(rest[0]) >= saved, "an update that had been saved was lost"
            position = int(rest[0])
        elif word == "applied":
            assert int(rest[0]) == position + 1, "an update was left out or applied twice"
            position, saved = int(rest[0]), max(saved, int(rest[2]))
    assert position == UPDATES and kills >= 50 and torn > 0
    final = IndexWriter.resume(directory, MODEL, PARAMS)
    assert final.position == UPDATES and same(final.index, after(UPDATES))
