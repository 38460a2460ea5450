"""Kills of a refresh, and of a follower of a real stream that admits new items, in every step: each ends as one not killed."""

from __future__ import annotations

import abc
import contextlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import redis

from aif_jax.connectors import SnapshotStore, ValkeyStream
from tests import follow_world, refresh_world, servers
from tests.killed import Life
from tests.reliability import refresher
from tests.reliability.sizes import FULL, generator


class Killed(abc.ABC):
    """A job in processes, each of which goes on where the one before was killed; and what comes of one that is not."""

    work: Any
    steps: tuple[str, ...]
    kills: tuple[tuple[str, bool], ...]
    """Steps, and whether they are killed when their work is done or when it is sealed too."""
    full: int
    store = "store"
    """Where the steps publish to."""

    def __init__(self, folder: Path, *arguments: Any):
        self.folder, self.arguments, self.number = folder, arguments, 0
        root = self.new()
        assert not self.start(root).killed()
        self.points, self.whole = self.end(root)["points"], self.outcome(root)

    def new(self) -> Path:
        """A place for the next chain of processes."""
        self.number += 1
        (root := self.folder / str(self.number)).mkdir()
        return root

    def start(self, root: Path, *, step: str | None = None, sealed: bool = False, at: int | None = None) -> Life:
        """The next process; it dies in a step or at a crash point."""
        return Life(self.work, str(root), *self.arguments, step, sealed, at)

    @staticmethod
    def end(root: Path) -> dict[str, Any]:
        """What the process that was not killed returned."""
        return json.loads((root / "end.json").read_text())

    @abc.abstractmethod
    def outcome(self, root: Path) -> Any:
        """All that must be the same whatever was killed."""


class Refreshing(Killed):
    """A served model is refreshed: the same files, published once, with one report."""

    work, steps, full = staticmethod(refresher.refresh), refresher.STEPS, FULL.refresh_kills
    kills = tuple((step, bool(number % 2)) for number, step in enumerate(steps))  # by turns before and after it is sealed

    def __init__(self, folder: Path):
        run = refresh_world.first(folder / "run")
        super().__init__(folder, str(folder / "run"), run.settings.first_validation)
        assert self.whole[0] == "published" and len(self.whole[1]) > 5

    def outcome(self, root: Path) -> Any:
        return self.end(root)["status"], refresher.contents(root)


class Following(Killed):
    """A published model follows later events in a real server: each is trained on once, each delta published once."""

    work, steps, full = staticmethod(refresher.follow), refresher.FOLLOWING, FULL.follow_kills
    store = "store/deltas"
    kills = (
        ("current", False), ("batch 000001", False), ("batch 000001", True), ("publish 000001", False),
        ("publish 000001", True), ("batch 000002", True), ("publish 000002", False),
    )  # fmt: skip

    def __init__(self, folder: Path, url: str):
        store = folder / "store"
        SnapshotStore(store).publish(follow_world.export_of(folder / "export", rows=37))
        stream = ValkeyStream(redis.Redis.from_url(url), ["events"])
        stream.send_many(follow_world.messages(follow_world.until(store) - 20_000))
        super().__init__(folder, f"{url}/events")
        end, (_, deltas, samples) = self.end(folder / "1"), self.whole
        assert end["published"] == len(deltas) == refresher.FOLLOWED and len(samples) == end["trained"] > 0
        assert len(set(samples)) == len(samples)  # the world has no event twice in one second
        assert end["admitted"] == 6

    def new(self) -> Path:
        root = super().new()
        shutil.copytree(self.folder / "store", root / "store")
        return root

    def outcome(self, root: Path) -> Any:
        return self.end(root)["version"], refresher.deltas(root), follow_world.trained_on(root / "work" / "job")


@pytest.fixture(scope="module", params=[Refreshing, Following])
def job(request, tmp_path_factory):
    with contextlib.ExitStack() as server:
        url = (server.enter_context(servers.valkey()),) if request.param is Following else ()
        yield request.param(tmp_path_factory.mktemp("job"), *url)


def test_a_job_is_killed_once_in_every_step(job):
    root = job.new()
    for step, sealed in job.kills:
        assert job.start(root, step=step, sealed=sealed).killed(), (step, sealed)
        published = sum(name.startswith("publish") for name in job.steps[: job.steps.index(step) + 1])
        names = SnapshotStore(root / job.store).names()
        assert len(names) == published, f"{step}: half published, twice, or not when it was sealed"
        assert SnapshotStore(root / job.store).current() == (names[-1] if names else None)
    assert not job.start(root).killed()
    assert job.outcome(root) == job.whole


@pytest.mark.reliability
@pytest.mark.timeout(7200)
def test_a_job_is_killed_anywhere(job):
    rng, kills, chains = generator(type(job).__name__), Counter(), 0
    while kills.total() < job.full:
        root = job.new()
        chains += 1
        while job.start(root, at=int(rng.integers(1, job.points))).killed():
            kills[refresher.working_on(root, job.steps)] += 1
        assert job.outcome(root) == job.whole
    print(f"{kills.total()} kills of {chains} chains, {job.points} crash points each: {dict(kills)}")
