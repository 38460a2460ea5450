"""Kills of writers of an index: nothing lost, nothing left out, nothing applied twice."""

import fcntl
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from aif_jax.index import WriterConflict, inspect
from aif_jax.index.writer import snapshots
from tests.killed import Life
from tests.refusals import refused
from tests.reliability import victims
from tests.reliability.sizes import FULL, SEED, full, fully, generator

pytestmark = pytest.mark.lane("standing")


class Stream:
    """A stream that writers of one table apply one after the other, each from where the one before was killed."""

    def __init__(self, folder: Path, *, updates: int, every: int = 3):
        self.folder, self.arguments = folder, (str(folder), updates, every)
        self.updates, self.table, self.log = updates, victims.items(folder), folder / "log"
        folder.mkdir(parents=True)
        self.log.touch()

    def start(self, at: int | None = None) -> Life:
        """The next writer; it dies at crash point `at`."""
        whole, _, torn = self.log.read_text().rpartition("\n")
        if torn:  # the last line of a process that was killed while it wrote
            self.log.write_text(whole + "\n" if whole else "")
        return Life(victims.write, *self.arguments, at)

    def size(self) -> int:
        """Of the log: it grows with the first line of a writer."""
        return self.log.stat().st_size

    def unfinished(self) -> list[Path]:
        """Snapshots that are being written or removed, or were when their writer died."""
        folder = self.table.directory
        return [path for path in folder.iterdir() if path.name.endswith(".partial")] if folder.is_dir() else []

    def lines(self) -> list[dict[str, Any]]:
        """What the writers noted."""
        rows = self.log.read_text().splitlines(keepends=True)
        return [json.loads(row) for row in rows if row.endswith("\n")]

    def check(self) -> None:
        """Raises unless nothing was lost, left out or applied twice so far."""
        saved: dict[str, int] = {}
        done: dict[int, int] = {}
        for line in self.lines():
            if "start" in line:
                for partition, last in saved.items():
                    got = line["start"].get(partition, 0)
                    assert got >= last, f"partition {partition}: {last} was saved, the next writer starts at {got}"
                for partition, last in line["start"].items():
                    # one more than noted: a writer may die after the save that an update brings, before it notes the update
                    applied = victims.offset(done.get(int(partition), 0) + 1)
                    assert last <= applied, f"partition {partition}: {last} in a snapshot, only {applied} was applied"
                assert line["good"], f"the snapshot at {line['start']} is not what the stream up to there makes"
                done = {int(p): victims.count(last) for p, last in line["start"].items()}
            elif "applied" in line:
                partition, number = line["applied"]
                assert number == done.get(partition, 0) + 1, "an update was left out or applied twice"
                assert line["fresh"], "an update was taken for one applied before"
                done[partition], saved = number, saved | line["saved"]
            else:
                assert line["good"] and set(done.values()) == {self.updates}

    def check_end(self) -> None:
        """Raises unless the work of all writers is what an undisturbed one does, with nothing left over."""
        self.check()
        assert "done" in self.lines()[-1]
        complete = snapshots(self.table.directory)
        assert inspect(complete[-1]).positions == {p: victims.offset(self.updates) for p in range(victims.PARTITIONS)}
        assert not self.unfinished(), "a work folder was left behind"
        named = {name for name in os.listdir(self.table.directory) if not name.startswith(".")}
        assert named == {folder.name for folder in complete}, "half a snapshot has its name"
        assert len(complete) <= 3, "old snapshots were left"


@pytest.mark.parametrize(("kills", "seed"), [(12, 0), full(FULL.writer_kills, SEED)])
def test_writers_killed_at_random_moments(tmp_path, kills, seed):
    rng = generator("writer of index, random moments", seed)
    done = torn = before_start = number = 0
    while done < kills:
        number += 1
        stream = Stream(tmp_path / str(number), updates=80)
        while True:
            seen, life = stream.size(), stream.start()
            if done % 3 and done < kills:  # two thirds die at work, the others while they start
                while life.process.is_alive() and stream.size() == seen:
                    time.sleep(0.002)
                life.process.join(rng.uniform(0, 0.15))
                while done % 3 == 2 and life.process.is_alive() and not stream.unfinished():
                    time.sleep(0.0003)
                life.kill()
            elif done < kills:
                life.kill(after=rng.uniform(0, 0.5) if done % 2 else 0.0)  # half of them before anything is read
            if not life.killed():
                break
            done += 1
            torn += bool(stream.unfinished())
            before_start += stream.size() == seen
        stream.check_end()
    print(f"{done} kills of {number} streams, {torn} in a save, {before_start} at a start")
    assert torn > 0 and before_start > 0


@fully
def test_writers_killed_at_crash_points(tmp_path):
    """Dies before the nth change of a file, for n spread over a whole life: claim, saves, removals, recovery, close."""
    rng, number = generator("writer of index, crash points"), 0
    whole = Stream(tmp_path / "whole", updates=6)
    assert not whole.start().killed()
    whole.check_end()
    points = whole.lines()[-1]["done"]
    assert points > 40, "too few crash points to be all changes of files"
    wanted = FULL.writer_crash_points
    chosen = (rng.permutation(wanted) * points // wanted + 1).tolist()
    while chosen:
        number += 1
        stream = Stream(tmp_path / str(number), updates=60)
        while stream.start(chosen[-1] if chosen else None).killed():
            chosen.pop()
        stream.check_end()
    print(f"{wanted} kills at crash points 1 to {points} of {number} streams")


def stopped_while_saving(life: Life, stream: Stream) -> list[Path]:
    """The work folders of a process that is stopped now; none where it was stopped before it had locked one."""
    while not stream.unfinished():
        time.sleep(0.0002)
    os.kill(life.process.pid, signal.SIGSTOP)
    threads = Path(f"/proc/{life.process.pid}/task")
    while threads.exists() and any(f.read_text().rpartition(")")[2].split()[0] != "T" for f in threads.glob("*/stat")):
        time.sleep(0.001)  # a call to the system that it is in ends first
    begun = stream.unfinished()
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


def test_a_second_process_is_refused_until_the_first_one_is_dead(tmp_path):
    """A stopped process keeps its lock, a killed one does not; nothing that a live writer has begun is removed."""
    stream = Stream(tmp_path / "stream", updates=10_000)
    life, table = stream.start(), stream.table
    life.await_word(stream.log, "applied")
    try:
        while not (begun := stopped_while_saving(life, stream)):
            os.kill(life.process.pid, signal.SIGCONT)
        refused(WriterConflict, f"process {life.process.pid} on .* is writing here", table.resume)
        assert all(folder.exists() for folder in begun)
        taken = table.resume(takeover=True)
        assert all(folder.exists() for folder in begun), "a takeover leaves them too: their process may go on"
        os.kill(life.process.pid, signal.SIGCONT)
        life.process.join(60)
        assert life.process.exitcode == 1, "WriterConflict ends it"
    finally:
        life.process.kill()
        life.process.join()
    saved = victims.count(taken.positions.get(0, 0))
    table.apply(taken, saved + 1)
    taken.close()
    seen, third = stream.size(), stream.start()
    third.await_word(stream.log, "applied", after=seen)
    third.kill()
    assert third.killed()
    with table.resume() as last:
        counts = {partition: victims.count(at) for partition, at in last.positions.items()}
        assert counts[0] > saved and table.holds(last.index, counts)
