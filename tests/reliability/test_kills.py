"""Kills of writers, of training and of refreshes: nothing lost, left out or done twice, and the end is that of a whole run."""

import abc
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aif_jax.connectors import SnapshotStore
from aif_jax.index import WriterConflict, inspect
from aif_jax.index.writer import snapshots
from aif_jax.train.loop import JsonLines
from tests import refresh_world
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
        return [json.loads(row) for row in self.log.read_text().splitlines(keepends=True) if row.endswith("\n")]

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
    finally:
        life.process.kill()
        life.process.join()
    taken = table.resume()
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


class Killed(abc.ABC):
    """A job in processes, each of which goes on where the one before was killed; and what comes of one that is not."""

    work: Any
    arguments: tuple[Any, ...] = ()
    steps: tuple[str, ...]
    full: int

    def __init__(self, folder: Path, *arguments: Any):
        self.folder, self.arguments, self.number = folder, arguments, 0
        root, began = self.new(), time.perf_counter()
        assert not self.start(root).killed()
        self.seconds = time.perf_counter() - began
        self.points, self.whole = self.end(root)["points"], self.outcome(root)

    def new(self) -> Path:
        """A place for the next chain of processes."""
        self.number += 1
        (root := self.folder / str(self.number)).mkdir()
        return root

    def start(self, root: Path, *step: Any, at: int | None = None) -> Life:
        """The next process; it dies in a step, before or after it is sealed, or at a crash point."""
        return Life(self.work, str(root), *self.arguments, at, *step)

    @staticmethod
    def end(root: Path) -> dict[str, Any]:
        """What the process that was not killed returned."""
        return json.loads((root / "end.json").read_text())

    @abc.abstractmethod
    def outcome(self, root: Path) -> Any:
        """All that must be the same whatever was killed."""


class Training(Killed):
    """`aif.fit`: the same parameters and figures, bit for bit; each step logged once."""

    work, steps, full = staticmethod(victims.fit), (), FULL.training_crash_points

    def __init__(self, folder: Path):
        (folder / "warm").mkdir()
        assert not self.start(folder / "warm").killed()  # compiles
        super().__init__(folder)
        self.rows = len(self.whole[1])
        assert len(self.whole[0]) > 5 and self.rows > 5

    def outcome(self, root: Path) -> Any:
        with np.load(root / "end.npz") as arrays:
            parameters = {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in arrays.items()}
        timings = ("examples_per_s", "input_share")
        rows = [{k: v for k, v in row.items() if k not in timings} for row in JsonLines(root / "run" / "log.jsonl").rows()]
        return parameters, rows, sorted(path.name for path in (root / "run").iterdir() if path.is_dir())


class Refreshing(Killed):
    """A served model is refreshed: the same files, published once, with one report."""

    work, steps, full = staticmethod(victims.refresh), victims.STEPS, FULL.refresh_kills

    def __init__(self, folder: Path):
        super().__init__(folder, str(folder / "run"), refresh_world.first(folder / "run").settings.first_validation)
        assert self.whole[0] == "published" and len(self.whole[1]) > 5

    def outcome(self, root: Path) -> Any:
        return self.end(root)["status"], victims.contents(root)


@pytest.fixture(scope="module")
def job(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("job"))


@pytest.mark.parametrize("job", [Refreshing], indirect=True)
def test_a_job_is_killed_once_in_every_step(job):
    root = job.new()
    for number, step in enumerate(job.steps):
        sealed = (len(job.steps) - number) % 2 == 0  # by turns before and after; the last one before, or the job is over
        assert job.start(root, step, sealed).killed(), step
        published = sum(name.startswith("publish") for name in job.steps[: number + 1])
        names = SnapshotStore(root / "store").names()
        assert len(names) == published, f"{step}: half published, twice, or not when it was sealed"
        assert SnapshotStore(root / "store").current() == (names[-1] if names else None)
    assert not job.start(root).killed()
    assert job.outcome(root) == job.whole


@pytest.mark.parametrize("job", [full(Training), full(Refreshing)], indirect=True)
def test_a_job_is_killed_before_any_change_of_a_file(job):
    rng = generator(type(job).__name__)
    kill_anywhere(job, job.full, lambda root: job.start(root, at=int(rng.integers(1, job.points))))


@pytest.mark.parametrize("kills", [2, full(FULL.training_kills)])
@pytest.mark.parametrize("job", [Training], indirect=True)
def test_a_job_is_killed_at_any_moment(job, kills):
    rng = generator("training, random moments")

    def killed(root: Path) -> Life:
        life, at_work = job.start(root), rng.random() < 0.5
        if at_work:
            life.await_word(root / "run" / "log.jsonl", "\n", times=int(rng.integers(1, job.rows)))
        life.kill(after=rng.uniform(0, 0.01 if at_work else job.seconds))
        return life

    kill_anywhere(job, kills, killed)


def kill_anywhere(job: Killed, wanted: int, start: Callable[[Path], Life]) -> None:
    """Chains of processes that `start` starts and kills, each against the one that nobody killed."""
    kills = 0
    while kills < wanted:
        root = job.new()
        while (start if kills < wanted else job.start)(root).killed():
            kills += 1
        assert job.outcome(root) == job.whole
    print(f"{kills} kills of {job.number - 1} chains, {job.points} crash points each")
