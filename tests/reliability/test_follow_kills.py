"""Kills of a process that follows a real stream and admits new items, in every step: each event is trained on once, each delta
published once."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import redis

from aif_jax.connectors import SnapshotStore, ValkeyStream
from tests import follow_world as world
from tests import servers
from tests.killed import Life
from tests.reliability import refresher
from tests.reliability.sizes import FULL, generator

KILLS = (
    ("current", False), ("batch 000001", False), ("batch 000001", True), ("publish 000001", False), ("publish 000001", True),
    ("batch 000002", True), ("publish 000002", False),
)  # fmt: skip
"""Steps, and whether they are killed when their work is done or when it is sealed too."""


class Following:
    """A published model, a stream of later events in a real server, and what an undisturbed process makes of them."""

    def __init__(self, folder: Path, url: str):
        self.folder, self.url, self.number = folder, f"{url}/events", 0
        SnapshotStore(folder / "store").publish(world.export_of(folder / "export", rows=37))
        stream = ValkeyStream(redis.Redis.from_url(url), ["events"])
        stream.send_many(world.messages(world.until(folder / "store") - 20_000))
        root = self.new()
        assert not self.start(root).killed()
        end = self.end(root)
        self.points, self.version, self.deltas = end["points"], end["version"], refresher.deltas(root)
        self.samples = world.trained_on(root / "work" / "job")
        assert end["published"] == len(self.deltas) == refresher.FOLLOWED and len(self.samples) == end["trained"] > 0
        assert len(set(self.samples)) == len(self.samples)  # the world has no event twice in one second
        assert end["admitted"] == 6

    def new(self) -> Path:
        """A copy of the store for the next chain."""
        self.number += 1
        root = self.folder / str(self.number)
        shutil.copytree(self.folder / "store", root / "store")
        return root

    def start(self, root: Path, *, step: str | None = None, sealed: bool = False, at: int | None = None) -> Life:
        """The next process."""
        given: tuple[Any, ...] = (str(root), self.url, step, sealed, at)
        return Life(refresher.follow, *given)

    @staticmethod
    def end(root: Path) -> dict[str, Any]:
        """What the process that was not killed returned."""
        return json.loads((root / "end.json").read_text())

    def check(self, root: Path) -> None:
        """Raises unless a chain that was killed is the one that was not: the same deltas, once, of the same samples, once."""
        assert self.end(root)["version"] == self.version
        assert refresher.deltas(root) == self.deltas
        assert world.trained_on(root / "work" / "job") == self.samples


@pytest.fixture(scope="module")
def following(tmp_path_factory):
    with servers.valkey() as url:
        yield Following(tmp_path_factory.mktemp("follow"), url)


def test_a_follower_is_killed_in_every_step(following):
    root = following.new()
    for step, sealed in KILLS:
        assert following.start(root, step=step, sealed=sealed).killed(), (step, sealed)
    assert not following.start(root).killed()
    following.check(root)


@pytest.mark.reliability
@pytest.mark.timeout(7200)
def test_a_follower_is_killed_anywhere(following):
    rng, kills, chains = generator("follow"), Counter(), 0
    while kills.total() < FULL.follow_kills:
        root = following.new()
        chains += 1
        while following.start(root, at=int(rng.integers(1, following.points))).killed():
            kills[refresher.working_on(root, refresher.FOLLOWING)] += 1
        following.check(root)
    print(f"{kills.total()} kills of {chains} chains, {following.points} crash points each: {dict(kills)}")
