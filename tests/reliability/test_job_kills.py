"""Kills of a training run and of a refresh: each ends as one not killed."""

import abc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aif_jax.connectors import SnapshotStore
from aif_jax.train.loop import JsonLines
from tests import refresh_world
from tests.killed import Life
from tests.reliability import refresher, victims
from tests.reliability.sizes import FULL, full, generator

pytestmark = pytest.mark.lane("standing")


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

    work, steps, full = staticmethod(refresher.refresh), refresher.STEPS, FULL.refresh_kills

    def __init__(self, folder: Path):
        run = refresh_world.first(folder / "run")
        super().__init__(folder, str(folder / "run"), run.settings.first_validation)
        assert self.whole[0] == "published" and len(self.whole[1]) > 5

    def outcome(self, root: Path) -> Any:
        return self.end(root)["status"], refresher.contents(root)


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
