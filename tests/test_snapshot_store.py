"""The snapshot store: published whole or not at all, on a disk and in S3, whatever is killed; fetched whole, and resumed."""

import contextlib
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aif_jax import cli
from aif_jax.connectors import SnapshotError, SnapshotStore
from aif_jax.connectors import snapshot_store as module
from tests import servers
from tests.killed import Life
from tests.refusals import refused
from tests.reliability.sizes import FULL, full

pytestmark = pytest.mark.lane("standing")
SIZES = {"a": 100, "manifest.json": 9, "inner/b": 40_000, "inner/deeper/c": 3}


def fill(folder: Path, number: int) -> Path:
    """A folder whose every file says which number it is of."""
    for name, size in SIZES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"{number};".encode() * size)
    return folder


def number_of(folder: Path) -> int:
    """The number that all files of a folder say; fails where they do not agree."""
    numbers = set()
    for name, size in SIZES.items():
        parts = (folder / name).read_bytes().split(b";")
        assert len(parts) == size + 1, f"{name} is torn"
        numbers |= set(map(int, parts[:-1]))
    (number,) = numbers
    return number


def test_what_was_published_is_fetched(open_store, tmp_path):
    store = open_store()
    assert store.current() is None and store.names() == []
    refused(FileNotFoundError, "expected a store with a current snapshot, got none", store.fetch, tmp_path / "out")
    names = [store.publish(fill(tmp_path / "made", number)) for number in range(5)]
    assert store.names() == names[-3:] and store.current() == names[-1]
    other = open_store()  # as another process
    assert number_of(other.fetch(tmp_path / "out")) == 4
    assert number_of(other.fetch(tmp_path / "out", names[-2])) == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names[-2:]
    refused(FileNotFoundError, "", other.fetch, tmp_path / "out", names[0])
    assert module.fetched(tmp_path / "out") == [tmp_path / "out" / name for name in (names[-1], names[-2])]  # the last one last
    assert other.fetch(tmp_path / "out", keep=1) == tmp_path / "out" / names[-1]  # as it is
    assert module.fetched(tmp_path / "out") == [tmp_path / "out" / names[-1]]


def test_a_folder_that_no_reader_would_take_is_refused(tmp_path):
    store, folder = SnapshotStore(tmp_path / "store"), fill(tmp_path / "made", 1)
    (folder / "snapshot-manifest.json").write_text("{}")
    refused(ValueError, "expected a folder without a file 'snapshot-manifest.json'", store.publish, folder)
    (fill(tmp_path / "named", 1) / "a\\b").touch()
    refused(ValueError, "path: expected names of at most 255 characters", store.publish, tmp_path / "named")
    assert store.names() == []


def test_a_fetch_that_is_interrupted_leaves_nothing(open_store, tmp_path, monkeypatch):
    store = open_store()
    name = store.publish(fill(tmp_path / "made", 7))

    def broken(path, file):
        Path(file).write_bytes(b"7;")
        if path.endswith("/b"):
            raise ConnectionError("gone")
        get(path, file)

    with monkeypatch.context() as patched:
        get = store._files.get_file
        patched.setattr(store._files, "get_file", broken)
        refused(ConnectionError, "", store.fetch, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert number_of(store.fetch(tmp_path / "out")) == 7
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_files_keep_the_time_when_they_were_written(open_store, tmp_path):
    store, made = open_store(), fill(tmp_path / "made", 7)
    os.utime(made / "a", (1_700_000_000, 1_700_000_000))
    name = store.publish(made)
    assert (store.fetch(tmp_path / "out") / "a").stat().st_mtime == 1_700_000_000
    os.utime(made / "a", (1_700_000_100, 1_700_000_100))
    assert store.publish(made, unless_current=True) == name and store.names() == [name]  # the same files, written again


def test_a_time_in_the_future_is_that_of_the_fetch(tmp_path):
    store, made = SnapshotStore(tmp_path / "store"), fill(tmp_path / "made", 7)
    late, start = time.time() + 1e6, time.time() - 10
    os.utime(made / "a", (late, late))
    name = store.publish(made)
    manifest = tmp_path / "store" / name / "snapshot-manifest.json"
    assert start < (store.fetch(tmp_path / "one", name) / "a").stat().st_mtime < late
    record = json.loads(manifest.read_text())
    record["files"]["a"]["modified_ns"] = 1e300
    manifest.write_text(json.dumps(record))
    refused(SnapshotError, "modified_ns since 1970", store.fetch, tmp_path / "three", name)


def test_what_killed_fetches_left_is_removed(tmp_path):
    store, out = SnapshotStore(tmp_path / "store"), tmp_path / "out"
    name = store.publish(fill(tmp_path / "made", 7))
    for left in ("0000000007-3f9ab2c1", name):
        store.fetch(out)
        (out / f".{left}.abcdefgh.partial" / left / "inner").mkdir(parents=True)
    assert store.fetch(out) == out / name and [path.name for path in out.iterdir()] == [name]


DEEP = b"[" * 4000


@pytest.mark.parametrize("raw", [
    b"", DEEP, b"\xff", b"{}", b"[]", b'{"name": 7, "sha256": "' + b"0" * 64 + b'"}', bytes(5000), b"latest",
    b'{"name": "../../etc", "sha256": ""}',
])  # fmt: skip
def test_a_damaged_pointer_is_a_snapshot_error(open_store, tmp_path, raw):
    store = open_store()
    store.publish(fill(tmp_path / "made", 7))
    store._put(store._path("current"), raw)
    for call in (store.current, lambda: store.fetch(tmp_path / "out"), lambda: store.publish(tmp_path / "made")):
        refused(SnapshotError, r"current", call)


def test_a_damaged_snapshot_is_a_snapshot_error(open_store, tmp_path):
    """Whatever a manifest says, and however short a file is: on a disk, and in an object store."""
    store = open_store()
    name = store.publish(fill(tmp_path / "made", 7))
    files = json.loads(store._files.cat_file(store._path(name, "snapshot-manifest.json")))["files"]

    def saying(**more):
        return json.dumps({"format": module.FORMAT, "files": files | more}).encode()

    one = {"sha256": "0" * 64, "modified_ns": 9}
    torn = (b"", DEEP * 25, b"\xff", b"[]", b"7", saying(a=one), saying(a={"sha256": "0" * 64}))
    damages = [("snapshot-manifest.json", raw) for raw in torn]
    paths = ("x" * 300, "x/" * 3000 + "y", "a/below", "inner", "a\0b", "\ud800", "/etc/passwd", "../../escaped", "none")
    damages += [("snapshot-manifest.json", saying(**{path: one})) for path in paths]
    damages += [("a", b""), ("a", b"7;" * 50), ("a", b"8" + b"7;" * 100), ("a", b"8" + (b"7;" * 100)[1:])]
    damages += [("inner/b", b"7;" * 100), ("inner/deeper/c", b"")]
    for number, (relative, raw) in enumerate(damages):
        path, out = store._path(name, relative), tmp_path / f"out{number}"
        before = store._files.cat_file(path)
        store._put(path, raw)
        for named in (None, name):
            missing = FileNotFoundError if named is not None and b"none" in raw else ()
            refused((SnapshotError, *([missing] if missing else [])), re.escape(store.url), store.fetch, out, named)
        assert not list(out.glob("0*"))
        store._put(path, before)
    assert number_of(store.fetch(tmp_path / "out")) == 7 and not (tmp_path / "escaped").exists()


def test_a_record_that_is_too_large_is_not_read(open_store, tmp_path, monkeypatch):
    """It would be in memory, whole, before anything is checked."""
    store = open_store()
    name = store.publish(fill(tmp_path / "made", 7))
    monkeypatch.setattr(module, "RECORD_BYTES", 60)
    monkeypatch.setattr(store._files, "cat_file", lambda path: 1 / 0)
    for named, file in ((None, "current"), (name, f"{name}/snapshot-manifest.json")):
        refused(SnapshotError, rf"{file}: expected at most 60 bytes, got \d+", store.fetch, tmp_path / "out", named)


def test_what_reads_back_as_something_else_is_not_published(tmp_path, monkeypatch):
    store = SnapshotStore(tmp_path / "store")
    first = store.publish(fill(tmp_path / "made", 1))
    put = store._files.put_file
    monkeypatch.setattr(store._files, "put_file", lambda a, b: (put(a, b), b.endswith("/a") and Path(b).write_bytes(b"x")))
    refused(SnapshotError, "/a: expected sha256", store.publish, fill(tmp_path / "made", 2))
    assert store.current() == first and store.names() == [first]


def test_the_pointer_does_not_go_back(tmp_path, monkeypatch):
    slow, fast = SnapshotStore(tmp_path / "store"), SnapshotStore(tmp_path / "store")
    fill(tmp_path / "made", 1)
    put = slow._put

    def later(path, data):
        put(path, data)
        if path.endswith("snapshot-manifest.json"):
            monkeypatch.setattr(slow, "_put", put)
            fast.publish(tmp_path / "made")

    monkeypatch.setattr(slow, "_put", later)
    refused(SnapshotError, "expected the current snapshot before 0000000001.*, got 0000000002", slow.publish, tmp_path / "made")
    assert str(fast.current()).startswith("0000000002")


def test_a_reader_of_a_snapshot_that_is_removed_gets_the_new_one(tmp_path, monkeypatch):
    store = SnapshotStore(tmp_path / "store", keep=1)
    store.publish(fill(tmp_path / "made", 1))
    reader = SnapshotStore(tmp_path / "store")
    get = reader._files.get_file

    def meanwhile(*arguments):
        monkeypatch.setattr(reader._files, "get_file", get)
        store.publish(fill(tmp_path / "made", 2))
        get(*arguments)

    monkeypatch.setattr(reader._files, "get_file", meanwhile)
    assert number_of(reader.fetch(tmp_path / "out")) == 2


def test_interrupted_uploads_are_collected(open_store, tmp_path):
    store = open_store()
    store.publish(fill(tmp_path / "made", 1))
    torn = store._path("0000000002-00000000", "a")
    store._make_parent(torn)
    store._files.pipe_file(torn, b"x")
    name = store.publish(tmp_path / "made")
    assert name.startswith("0000000003") and len(store.names()) == 2 and store.names() == list(store._listed())


def test_secrets_are_in_no_message(bucket, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "aif_jax")
    stores = [SnapshotStore("s3://bucket/x", **bucket), SnapshotStore("s3://bucket/x", **bucket | {"secret": "WRONGSECRET"})]
    shown = [repr(store) for store in stores]
    fill(tmp_path / "made", 1)
    with pytest.raises(OSError) as refused:
        stores[1].publish(tmp_path / "made")
    shown += [str(refused.value), caplog.text]
    assert not any(word in text for text in shown for word in (servers.KEY, servers.SECRET, "WRONGSECRET"))
    assert SnapshotStore("file:///tmp/x?token=SECRET").url == "file:///tmp/x?***"


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda f: SnapshotStore(f).publish("s3://b/x"), ValueError, "folder: expected a local path, got the URL"),
    (lambda f: SnapshotStore(f).fetch("s3://b/x"), ValueError, "directory: expected a local path, got the URL"),
    (lambda f: SnapshotStore(f).fetch(f, "latest"), ValueError, "name: expected the name of a snapshot"),
])  # fmt: skip
def test_wrong_arguments_are_named(tmp_path, call, error, message):
    refused(error, message, call, tmp_path)


def test_the_commands_of_a_store(tmp_path, capsys):
    url = str(tmp_path / "store")

    def run(*words: str, code: int = 0) -> str:
        assert cli.main(["snapshots", *words]) == code
        return "".join(capsys.readouterr()).strip()

    assert json.loads(run("list", url)) == {"current": None, "snapshots": []}
    (fill(tmp_path / "made", 0) / "manifest.json").unlink()
    bare = run("publish", url, str(tmp_path / "made"), code=2)
    assert "expected an export, or a snapshot of an index, got a folder without manifest.json" in bare
    names = [run("publish", url, str(fill(tmp_path / "made", number)), "--keep", "2") for number in range(1, 4)]
    assert json.loads(run("list", url)) == {"current": names[2], "snapshots": names[1:]}
    folder = run("fetch", url, str(tmp_path / "here"))
    assert Path(folder).name == names[2] and number_of(Path(folder)) == 3
    assert number_of(Path(run("fetch", url, str(tmp_path / "here"), "--name", names[1]))) == 2
    assert "keep: expected at least 1, got 0" in run("publish", url, str(tmp_path / "made"), "--keep", "0", code=2)
    assert "expected a folder with files, got none" in run("publish", url, str(tmp_path / "nothing"), code=2)
    gone = run("fetch", url, str(tmp_path / "here"), "--name", names[0], code=2)
    assert f"expected the snapshot {names[0]}, got none" in gone


def publish_all(open_store: Callable[..., SnapshotStore], folder: str, log: str) -> None:
    """Publishes folders with rising numbers until it is killed; notes each that is published."""
    store = open_store()
    with open(log, "a") as notes:
        number = 1 + sum(1 for _ in open(log))
        while True:
            store.publish(fill(Path(folder), number))
            print(number, file=notes, flush=True)
            number += 1


@pytest.mark.parametrize("kills", [3, full(FULL.upload_kills)])
def test_kills_of_a_publisher_tear_nothing(open_store, tmp_path, kills):
    """Publishers that are killed in the middle of an upload; a reader comes all the time and must find whole folders."""
    chance, log, reader, last, reads = random.Random(0), tmp_path / "log", open_store(), 0, 0
    log.touch()
    for kill in range(kills):
        noted = len(log.read_text().split())
        life = Life(publish_all, open_store, str(tmp_path / "made"), str(log))
        until = None
        while until is None or time.monotonic() < until:
            if until is None and len(log.read_text().split()) > noted:
                until = time.monotonic() + chance.uniform(0, 0.15)
            assert life.process.is_alive()
            with contextlib.suppress(FileNotFoundError):  # nothing published yet, or every try met a removal
                found = number_of(reader.fetch(tmp_path / f"out{kill}"))
                assert found >= last, "an older snapshot became the current one"
                last, reads = found, reads + 1
        life.kill()
        assert life.killed()
        published = max(map(int, log.read_text().split()))
        got = number_of(reader.fetch(tmp_path / f"after{kill}"))
        assert published <= got <= published + 1, "a published snapshot was lost"
        with log.open("a") as notes:  # what was current but not noted when the kill came
            if got > published:
                print(got, file=notes)
    assert reads >= kills
    reader.publish(fill(tmp_path / "made", 10**6))
    assert len(reader._listed()) <= 3


def test_the_pointer_goes_back_and_a_later_publish_follows(open_store, tmp_path, capsys):
    store = open_store(keep=2)
    refused(FileNotFoundError, "expected a snapshot to go back to, got an empty store", store.rollback)
    first, second = (store.publish(fill(tmp_path / f"made{number}", number)) for number in (1, 2))
    assert store.rollback() == first == store.current() and store.names() == [first, second]
    assert number_of(store.fetch(tmp_path / "here")) == 1
    refused(FileNotFoundError, f"got none before {first}, which stays current", store.rollback)
    third = store.publish(tmp_path / "made2")
    assert third > second and store.current() == third and store.names() == [first, third]
    if not open_store.keywords:  # a disk: no word of a command has the keys of a bucket
        assert cli.main(["rollback", "--out", store.url]) == 0 and capsys.readouterr().out.strip() == first == store.current()


def test_a_publish_that_was_killed_before_its_pointer_is_not_doubled(open_store, tmp_path, monkeypatch):
    """Everything but the pointer was there: the next call points to it, and a rollback does not meet the same model twice."""
    store = open_store()
    before = store.publish(fill(tmp_path / "made", 1))
    fill(tmp_path / "made", 2)
    with monkeypatch.context() as patched:
        patched.setattr(SnapshotStore, "_point", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        refused(KeyboardInterrupt, "", store.publish, tmp_path / "made", unless_current=True)
    assert store.current() == before and len(store.names()) == 2
    name = store.publish(tmp_path / "made", unless_current=True)
    assert store.names() == [before, name] and store.current() == name and number_of(store.fetch(tmp_path / "here")) == 2
    assert store.rollback() == before


def test_what_was_rolled_back_does_not_come_back_by_itself(open_store, tmp_path):
    """A refresh that runs again ends with the same files; a person may still publish them."""
    store = open_store()
    before, undone = (store.publish(fill(tmp_path / f"made{number}", number)) for number in (1, 2))
    store.rollback()
    for _ in range(2):
        message = f"files that were not rolled back, got those of {undone}, which was; publish newer"
        refused(SnapshotError, message, store.publish, tmp_path / "made2", unless_current=True)
        assert store.current() == before
    assert store.publish(tmp_path / "made1", unless_current=True) == before
    assert store.publish(tmp_path / "made2") == store.current() > undone
