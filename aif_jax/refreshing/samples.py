"""The service's own log as a stream: runs of `jobs.join_outcomes`, a folder each, with features as they were served."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from aif_jax.data.cascade import RECORD, join_samples
from aif_jax.data.dataset import Dataset
from aif_jax.readers.read import read_samples
from aif_jax.store.folders import local
from aif_jax.train.fit import expect_labels
from aif_jax.train.tasks import Task


class SampleRuns:
    """Samples of the runs in a folder, in the order in which the runs came; what a `Follower` and its target are to a stream.

    A run that is there is whole, so a position is its number of samples by name. Samples without a history, and those from
    before `until`, count as used. Runs whose samples are all used are not read again.

    Raises what `read_samples` raises; ValueError for samples without a label that the task needs.
    """

    def __init__(self, folder: str | Path, data: Dataset, task: Task, objectives: tuple[str, ...], until: int):
        self.folder, self.until, self._data, self._task = local(folder, "samples"), until, data, task
        self._objectives = objectives
        self.positions: dict[str, int] = {}
        self.used = np.zeros(0, bool)

    def __len__(self) -> int:
        return len(self.used)

    def step(self, seconds: float) -> int:
        """Takes runs that are new, or waits; returns the number of their samples."""
        names = sorted(file.parent.name for file in self.folder.glob(f"[!.]*/{RECORD}"))
        before = len(self)
        for name in names:
            if name not in self.positions:
                self._add(name)
        if len(self) == before:
            time.sleep(seconds)
        return len(self) - before

    def flush(self) -> None:
        """Nothing to commit: folders stay."""

    def resume(self, positions: Mapping[str, int]) -> None:
        """Goes on behind the runs of a sealed micro-batch."""
        for name, count in positions.items():
            if name not in self.positions:
                self._add(name, count)

    def dataset(self) -> tuple[Dataset, np.ndarray]:
        """The runs with samples that wait, and the number of the sample at each position of their log, -1 for none."""
        names, starts = list(self.positions), np.cumsum([0, *self.positions.values()])
        some = [at for at, name in enumerate(names) if not self.used[starts[at] : starts[at + 1]].all()]
        if not some:
            return self._data, np.full(len(self._data.log), -1)
        folders = [self.folder / names[at] for at in some]
        data, (_, arrays) = read_samples(folders, self._data), join_samples(folders)
        serial = np.full(len(data.log), -1)
        serial[arrays["positions"]] = starts[some][arrays["run"]] + arrays["sample"]
        return data, serial

    def _add(self, name: str, count: int | None = None) -> None:
        data = read_samples(self.folder / name, self._data)
        expect_labels(self._task, data, self._objectives)
        usable = self._task.positions(data, min_history=1, since=self.until, before=None)
        used = ~np.isin(data.cascade.positions, usable)  # type: ignore[union-attr]
        self.positions[name], self.used = len(used) if count is None else count, np.append(self.used, used)
