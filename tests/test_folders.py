"""Folders that appear complete or not at all: errors, kills in the middle, concurrent writers; that of compiled programs."""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import aif_jax as aif
from aif_jax import checkpoint, export
from aif_jax.index import snapshots
from aif_jax.store import folders
from aif_jax.store.folders import new_file, new_folder, redacted, remove_folder, remove_unfinished, unfinished, write_file
from tests.killed import Life, killed_at
from tests.refusals import refused
from tests.writer_world import TRAINED, build


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def leftovers(target):
    return list(target.parent.glob(f".{target.name}.*.partial"))


def fill(folder, word="new"):
    with new_folder(folder) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text(word)
        assert not folder.exists() or contents(folder) != {"inner/file": word}, "visible before it is complete"


def test_a_folder_appears_with_its_parents_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "a" / "b"
    with new_folder(target) as partial:
        (partial / "file").write_text("x")
        (partial.parent / "scratch.zip").write_text("gone at the end")
        assert not target.exists() and leftovers(target) == [partial.parent]
        assert unfinished(target) == f"; {partial.parent} is being written, or was left by a save that was killed"
    assert contents(target) == {"file": "x"}
    assert [path.name for path in target.parent.iterdir()] == ["b"]
    assert os.stat(target).st_mode & 0o777 == 0o777 & ~umask()
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), new_folder(tmp_path / "c") as partial:
            (partial / "file").write_text("x")
            raise error
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_nothing_is_overwritten(tmp_path):
    fill(tmp_path / "a", "old")
    message = "a: expected a new folder, but something is there; name another, or remove it"
    refused(FileExistsError, message, fill, tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(FileExistsError, "", fill, tmp_path / "link")
    with pytest.raises(FileExistsError), new_folder(tmp_path / "b") as partial:
        (partial / "file").write_text("slow")
        (tmp_path / "b").mkdir()  # another process was faster; a rename onto an empty folder would go through
    assert contents(tmp_path / "a") == {"inner/file": "old"} and not list((tmp_path / "b").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "link"]


def test_a_file_is_replaced_whole_and_forced_to_disk_before_and_after_its_rename(tmp_path, monkeypatch):
    target, done = tmp_path / "new" / "fit.json", []
    refused(FileNotFoundError, "", write_file, target, b"one")
    target.parent.mkdir()
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def replaced(old, new):
        done.append("replace")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    for content in (b"one", b"two"):
        done.clear()
        write_file(target, content)
        partial, *rest = done
        assert Path(partial).name == "fit.json" and Path(partial).parent != target.parent
        assert rest == ["replace", str(target.parent)] and target.read_bytes() == content
        assert os.stat(target).st_mode & 0o777 == 0o666 & ~umask()
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), new_file(target) as partial:
            partial.write_bytes(b"half")
            raise error
    assert contents(tmp_path) == {"new/fit.json": "two"} and not leftovers(target)


def test_a_pipe_is_written_into_and_a_folder_is_refused(tmp_path):
    """Neither is replaced: a replaced `/dev/null` would be a file that grows."""
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        write_file(pipe, b"figures")
        assert os.read(reader, 100) == b"figures" and pipe.is_fifo()
    finally:
        os.close(reader)
    refused(IsADirectoryError, "folder", write_file, folder, b"figures")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


@pytest.mark.lane("standing")
def test_what_a_killed_writer_of_a_file_left_goes_with_the_next_write(tmp_path):
    target = tmp_path / "a"
    write_file(target, b"old")
    assert Life(killed_at, "os.rename", "partial", write_file, target, b"half").killed()
    assert target.read_bytes() == b"old" and len(leftovers(target)) == 1
    write_file(target, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and target.read_bytes() == b"new"


@pytest.mark.lane("standing")
@pytest.mark.parametrize(("event", "pattern", "there"), [
    ("os.mkdir", "inner", False), ("open", "inner/file", False), ("os.rename", "partial", False),
    ("shutil.rmtree", "partial", True),
])  # fmt: skip
def test_a_killed_process_leaves_all_or_nothing(tmp_path, event, pattern, there):
    target = tmp_path / "a"
    assert Life(killed_at, event, pattern, fill, target).killed()
    assert target.exists() == there and (not there or contents(target) == {"inner/file": "new"})
    assert len(leftovers(target)) == 1
    fill(tmp_path / "a.b")  # another name: not its business
    assert len(leftovers(target)) == 1
    if there:
        remove_unfinished(tmp_path)
    else:
        fill(target)
    assert contents(target) == {"inner/file": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.b"]
    remove_folder(target)
    refused(FileNotFoundError, "", remove_folder, target)
    assert [path.name for path in tmp_path.iterdir()] == ["a.b"]


@pytest.mark.lane("standing")
def test_the_work_folder_of_a_running_process_stays(tmp_path):
    target = tmp_path / "a"
    code = f"""
import sys
from aif_jax.store.folders import new_folder
with new_folder({str(target)!r}) as partial:
    (partial / "file").write_text("slow")
    print("ready", flush=True)
    sys.stdin.readline()
"""
    slow = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert slow.stdout is not None and slow.stdin is not None and slow.stdout.readline() == "ready\n"
    with pytest.raises(RuntimeError), new_folder(target):
        raise RuntimeError
    remove_unfinished(tmp_path)
    assert len(leftovers(target)) == 1
    slow.communicate("\n", timeout=60)
    assert slow.returncode == 0 and contents(target) == {"file": "slow"}


def test_many_threads_write_one_name(tmp_path, monkeypatch):
    """One wins, the others are told; nobody removes another's work folder."""
    check = folders.expect_nothing  # after it all wait, until the last has checked
    monkeypatch.setattr(folders, "expect_nothing", lambda target: (check(target), time.sleep(0.1)))

    def write(number):
        try:
            with new_folder(tmp_path / "a") as partial:
                (partial / "file").write_text(str(number))
        except FileExistsError:
            return "refused"
        return "written"

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(write, range(8)))
    assert sorted(results) == ["refused"] * 7 + ["written"] and not leftovers(tmp_path / "a")
    assert len(contents(tmp_path / "a")) == 1


URLS = ("s3://bucket/folder", "file:///tmp/folder", Path("gs://bucket/folder"))
DOORS = {
    "new_folder": lambda url: new_folder(url).__enter__(),
    "checkpoint.settings_of": checkpoint.settings_of,
    "checkpoint.load": checkpoint.load,
    "Checkpoints": aif.Checkpoints,
    "Run.load": aif.Run.load,
    "snapshots": snapshots,
    "ItemIndex.save": lambda url: build().save(url),
    "ItemIndex.load": lambda url: aif.ItemIndex.load(url, TRAINED),
    "index.inspect": aif.index.inspect,
    "index.verify": aif.index.verify,
    "IndexWriter": lambda url: aif.IndexWriter(url, build()),
    "JsonLines": aif.train.JsonLines,
    "export.load": export.load,
    "export.verify": export.verify,
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses_a_url_and_names_the_snapshot_store(door, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in URLS:
        refused(ValueError, "expected a local .*URL.*aif_jax.connectors.SnapshotStore", DOORS[door], url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("url", "shown"), [
    ("s3://KEY:SEC/RET@bucket/a", "s3://***@bucket/a"),
    (Path("s3://KEY:SECRET@bucket/a"), "s3:/***@bucket/a"),
    ("https://host/a?X-Amz-Signature=SECRET", "https://host/a?***"),
    ("/plain/path@2", "/plain/path@2"),
])  # fmt: skip
def test_urls_are_shown_without_secrets(url, shown):
    assert redacted(os.fspath(url)) == shown


def test_the_folder_is_named_by_versions_and_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = folders.compiled_folder("aif_jax-tests")
    assert here.parent == tmp_path / "aif_jax-tests"
    monkeypatch.setattr(folders.jaxlib, "__version__", "0.0.1")
    assert folders.compiled_folder("aif_jax-tests").name.startswith(f"jax-{folders.jax.__version__}-jaxlib-0.0.1-")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(folders, "cpu_features", lambda: "avx512f of another machine")
    assert folders.compiled_folder("aif_jax-tests") != here
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert folders.compiled_folder("aif_jax-tests").parent == tmp_path / "home" / ".cache" / "aif_jax-tests"


def test_features_of_a_processor(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: x\nflags\t\t: fpu avx2\n\nmodel name\t: x\nflags\t\t: fpu avx2\n")
    assert folders.cpu_features(info) == "fpu avx2"
    assert folders.cpu_features(tmp_path / "none") == folders.platform.processor()


def test_what_no_run_used_goes(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = folders.compiled_folder() / "program"
    other = tmp_path / "aif_jax" / "other" / "program"
    other.parent.mkdir()
    for age, stay in ((folders.DAYS - 1, True), (folders.DAYS + 1, False)):
        for path in (here, other):
            path.write_text("p")
            os.utime(path, (time.time() - age * 86_400,) * 2)
        assert folders.compiled_folder() == here.parent and here.exists() == other.exists() == stay


@pytest.mark.lane("standing")
def test_commands_keep_compiled_programs(tmp_path):
    """In the user's cache folder; a folder of the user's choice stays, and one that cannot be written only warns."""
    code = "import jax; from aif_jax.cli import keep_compiled; print(keep_compiled(), jax.config.jax_compilation_cache_dir)"

    def run(**changes: str) -> subprocess.CompletedProcess:
        kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        return subprocess.run([sys.executable, "-c", code], env=kept | changes, capture_output=True, text=True, check=True)

    folder, setting = run(XDG_CACHE_HOME=str(tmp_path)).stdout.split()
    assert folder == setting and Path(folder).is_relative_to(tmp_path / "aif_jax") and Path(folder).is_dir()
    chosen = str(tmp_path / "mine")
    assert run(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=chosen).stdout.split() == [chosen, chosen]
    (tmp_path / "file").write_text("")
    failed = run(XDG_CACHE_HOME=str(tmp_path / "file"))
    way_out = r"a folder that can be written, got .*file/aif_jax/.*JAX_COMPILATION_CACHE_DIR=FOLDER"
    assert failed.stdout.split() == ["None", "None"] and re.search(way_out, failed.stderr)
