"""Kills of an index writer and of a training run: nothing lost, nothing applied twice, training ends bit for bit the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aif_jax.train.loop import JsonLines
from tests.reliability import victims
from tests.reliability.sizes import FULL, generator

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.reliability.victims"])


class Life:
    """One process, from its start to its kill or its end."""

    def __init__(self, work: Callable[..., None], *arguments: Any):
        self.process = CONTEXT.Process(target=work, args=arguments)
        self.process.start()

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGKILL)

    def wait(self, seconds: float) -> None:
        """Until it ends, at most so long."""
        self.process.join(seconds)

    def killed(self) -> bool:
        """Waits for its end; False where it did all its work, and an error where it failed."""
        self.process.join(300)
        code = self.process.exitcode
        self.process.close()
        assert code in (0, -signal.SIGKILL), f"a process failed: exit code {code}"
        return code != 0


# the index writer


class Stream:
    """A stream that writers apply one after the other, each from where the one before was killed."""

    def __init__(self, folder: Path, *, updates: int, every: int, background: bool):
        self.folder, self.arguments = folder, (str(folder), updates, every, background)
        self.updates, self.every = updates, every
        self.log = folder / "log"
        folder.mkdir(parents=True)
        self.log.touch()

    def start(self, at: int | None = None) -> Life:
        """The next writer; it dies at crash point `at`."""
        whole, _, torn = self.log.read_text().rpartition("\n")
        if torn:  # the last line of a process that was killed while it wrote
            self.log.write_text(whole + "\n" if whole else "")
        return Life(victims.write, *self.arguments, at)

    def saving(self) -> bool:
        """Whether a snapshot is being written or removed, or was when its writer died."""
        folder = self.folder / "index"
        return folder.is_dir() and any(name.endswith(".partial") for name in os.listdir(folder))

    def lines(self) -> list[dict[str, Any]]:
        """What the writers noted."""
        rows = self.log.read_text().splitlines(keepends=True)
        return [json.loads(row) for row in rows if row.endswith("\n")]

    def check(self) -> int:
        """Raises unless nothing was lost, left out or applied twice so far; returns how many writers have started."""
        saved: dict[str, int] = {}
        done: dict[int, int] = {}
        starts = 0
        for line in self.lines():
            if "start" in line:
                starts += 1
                for partition, last in saved.items():
                    got = line["start"].get(partition, 0)
                    assert got >= last, f"partition {partition}: {last} was saved, the next writer starts at {got}"
                for partition, last in line["start"].items():
                    # one more than noted: a writer may die after the save that an entry brings, before it notes the entry
                    applied = victims.offset(done.get(int(partition), 0) + 1)
                    assert last <= applied, f"partition {partition}: {last} in a snapshot, only {applied} was applied"
                assert line["good"], f"the snapshot at {line['start']} is not what the stream up to there makes"
                done = {int(p): victims._entry(last) for p, last in line["start"].items()}
            elif "applied" in line:
                partition, entry = line["applied"]
                assert entry == done.get(partition, 0) + 1, "an entry was left out or applied twice"
                assert line["fresh"], "an entry was taken for one applied before"
                done[partition], saved = entry, saved | line["saved"]
            else:
                assert line["good"] and set(done.values()) == {self.updates}
        return starts

    def check_end(self) -> None:
        """Raises unless the work of all writers is what an undisturbed one does, with nothing left over."""
        self.check()
        assert "done" in self.lines()[-1]
        assert victims.newest(self.folder) == {p: victims.offset(self.updates) for p in range(victims.PARTITIONS)}
        assert not self.saving(), "a work folder was left behind"
        complete = [folder.name for folder in victims.snapshots(self.folder / "index")]
        named = sorted(name for name in os.listdir(self.folder / "index") if not name.startswith("."))
        assert named == sorted(complete) and len(complete) <= 3, "half a snapshot has its name, or old ones were left"


@pytest.mark.reliability
@pytest.mark.timeout(3600)
def test_writer_killed_at_random_moments(tmp_path):
    rng, started = generator("writer, random moments"), time.perf_counter()
    kills = torn = before_start = 0
    number = 0
    while kills < FULL.writer_kills:
        number += 1
        stream = Stream(tmp_path / str(number), updates=80, every=3, background=bool(number % 2))
        while True:
            seen = stream.log.stat().st_size
            life = stream.start()
            if kills % 3 and kills < FULL.writer_kills:  # two thirds die at work, the others while they start
                while life.process.is_alive() and stream.log.stat().st_size == seen:
                    life.wait(0.002)
                life.wait(rng.uniform(0, 0.15))
                while kills % 3 == 2 and life.process.is_alive() and not stream.saving():
                    time.sleep(0.0003)
                life.kill()
            elif kills < FULL.writer_kills:
                life.wait(rng.uniform(0, 0.5))
                life.kill()
            if not life.killed():
                break
            kills += 1
            torn += stream.saving()
            before_start += stream.log.stat().st_size == seen
        stream.check_end()
    minutes = (time.perf_counter() - started) / 60
    print(f"{kills} kills of {number} streams, {torn} in a save, {before_start} at a start, {kills / minutes:.0f} a minute")
    assert torn > 0 and before_start > 0


@pytest.mark.reliability
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("background", [False, True])
def test_writer_killed_at_crash_points(tmp_path, background):
    """Dies before the nth change of a file, for n spread over a whole life: claim, saves, removals, recovery, close."""
    rng, started = generator("writer, crash points"), time.perf_counter()
    sizes: dict[str, Any] = dict(every=3, background=background)
    whole = Stream(tmp_path / "whole", updates=6, **sizes)
    assert not whole.start().killed()
    whole.check_end()
    points = whole.lines()[-1]["done"]
    assert points > 40, "too few crash points to be all changes of files"
    wanted = -(-FULL.writer_crash_points // 2)
    chosen = (rng.permutation(wanted) * points // wanted + 1).tolist()
    kills = number = 0
    while chosen:
        number += 1
        stream = Stream(tmp_path / str(number), updates=60, **sizes)
        while True:
            life = stream.start(chosen[-1] if chosen else None)
            if not life.killed():
                break
            chosen.pop()
            kills += 1
        stream.check_end()
    minutes = (time.perf_counter() - started) / 60
    print(f"{kills} kills at crash points 1 to {points} of {number} streams, {kills / minutes:.0f} a minute")


# the training run


class Training:
    """Runs of `aif.fit` in folders, compared with one that nobody kills."""

    def __init__(self, folder: Path):
        self.folder, self.cache, self.number = folder, str(folder / "compiled"), 0
        self.whole = folder / "whole"
        for name in ("warm", "whole"):  # the first one compiles
            start = time.perf_counter()
            assert not self.start(folder / name).killed()
            self.seconds = time.perf_counter() - start
        self.points = int((self.whole / "points").read_text())
        self.end = self.arrays(self.whole)
        self.rows = self.figures(self.whole)

    def start(self, run: Path, at: int | None = None) -> Life:
        """A process that trains in that folder, from wherever the run is."""
        run.mkdir(parents=True, exist_ok=True)
        return Life(victims.fit, str(run), self.cache, at)

    def new(self) -> Path:
        """Folder of the next run."""
        self.number += 1
        return self.folder / str(self.number)

    @staticmethod
    def arrays(run: Path) -> dict[str, np.ndarray]:
        """Parameters and validation figures at the end."""
        with np.load(run / "end.npz") as arrays:
            return dict(arrays)

    @staticmethod
    def figures(run: Path) -> list[dict[str, float]]:
        """The log without timings: step, loss, gradient norm, validation figures and so on."""
        rows = JsonLines(run / "run" / "log.jsonl").rows()
        return [{name: v for name, v in row.items() if name not in ("examples_per_s", "input_share")} for row in rows]

    def check(self, run: Path) -> None:
        """Raises unless a run that was killed ended as the one that was not."""
        got = self.arrays(run)
        assert got.keys() == self.end.keys() and len(got) > 5
        for name in got:
            np.testing.assert_array_equal(got[name], self.end[name], err_msg=f"{run}: {name}")
        kept = [sorted(path.name for path in (folder / "run").iterdir() if path.is_dir()) for folder in (run, self.whole)]
        assert kept[0] == kept[1], "other checkpoints, or a work folder was left behind"
        assert self.figures(run) == self.rows, "a step was logged twice, not at all or with other figures"


@pytest.mark.reliability
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("where", ["random moments", "crash points"])
def test_training_is_killed(tmp_path, where):
    rng = generator(f"training, {where}")
    training, started, kills = Training(tmp_path), time.perf_counter(), 0
    wanted = FULL.training_kills if where == "random moments" else FULL.training_crash_points
    while kills < wanted:
        run = training.new()
        while True:
            at = int(rng.integers(1, training.points)) if where == "crash points" and kills < wanted else None
            life = training.start(run, at)
            if at is None and kills < wanted:
                life.wait(rng.uniform(0, training.seconds))
                life.kill()
            if not life.killed():
                break
            kills += 1
        training.check(run)
    minutes = (time.perf_counter() - started) / 60
    print(
        f"{kills} kills at {where} of {training.number} runs ({len(training.rows)} log rows, {training.points} crash points "
        f"each, {training.seconds:.1f} s undisturbed), {kills / minutes:.0f} a minute"
    )
