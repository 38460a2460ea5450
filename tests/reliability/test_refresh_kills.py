"""Kills of a refresh in every step: it ends with the same files as one that was not killed, published once, with one report."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests import refresh_world as world
from tests.killed import Life
from tests.reliability import refresher
from tests.reliability.sizes import FULL, generator


class Refreshing:
    """A served model, and what an undisturbed refresh makes of it."""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, 0
        run = world.first(folder / "run")
        self.since = run.settings.first_validation
        root = self.new()
        assert not self.start(root).killed()
        end = json.loads((root / "end.json").read_text())
        self.points, self.files = end["points"], refresher.contents(root)
        assert end["status"] == "published" and len(self.files) > 5

    def new(self) -> Path:
        """A place for the next refresh."""
        self.number += 1
        (root := self.folder / str(self.number)).mkdir()
        return root

    def start(self, root: Path, *, step: str | None = None, sealed: bool = False, at: int | None = None) -> Life:
        """The next process of a refresh."""
        given: tuple[Any, ...] = (str(root), str(self.folder / "run"), self.since, step, sealed, at)
        return Life(refresher.refresh, *given)

    def check(self, root: Path) -> None:
        """Raises unless a refresh that was killed ended as the one that was not."""
        assert refresher.contents(root) == self.files
        assert json.loads((root / "end.json").read_text())["status"] == "published"


@pytest.fixture(scope="module")
def refreshing(tmp_path_factory) -> Refreshing:
    return Refreshing(tmp_path_factory.mktemp("refresh"))


def test_a_refresh_is_killed_once_in_every_step(refreshing):
    """By turns before and after the step is sealed; each process goes on where the one before was killed."""
    root = refreshing.new()
    for number, step in enumerate(refresher.STEPS):
        assert refreshing.start(root, step=step, sealed=bool(number % 2)).killed(), step
        whole = (root / "store" / "current").exists()
        assert whole == (number >= refresher.STEPS.index("publish")), "half published, or not when it was sealed"
    assert not refreshing.start(root).killed()
    refreshing.check(root)


@pytest.mark.reliability
@pytest.mark.timeout(7200)
def test_a_refresh_is_killed_anywhere(refreshing):
    rng, kills, refreshes = generator("refresh"), Counter(), 0
    while kills.total() < FULL.refresh_kills:
        root = refreshing.new()
        refreshes += 1
        while refreshing.start(root, at=int(rng.integers(1, refreshing.points))).killed():
            kills[refresher.working_on(root, refresher.STEPS)] += 1
        refreshing.check(root)
    print(f"{kills.total()} kills of {refreshes} refreshes, {refreshing.points} crash points each: {dict(kills)}")
