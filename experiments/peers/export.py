"""Writes the requests and candidates of `question` as files: those that the models of this package are judged on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.peers import lists as files
from experiments.peers.judge import Slice
from experiments.peers.lists import Lists

SLICES = ("validation", "test")
POWER = 0.75  # of the study's sampler


def lists_of(on: Slice) -> Lists:
    """The files' contents for one slice: "validation", trained on the first 80 % of events, or "test", on the first 90 %."""
    dataset, at, seen = on.data.dataset, on.requests.positions, on.part.seen
    log = dataset.log
    start, end = log.offsets[log.user[at]], log.history_end(at)
    places = np.concatenate([np.arange(first, last) for first, last in zip(start, end, strict=True)])
    about = {"dataset": on.data.name, "slice": on.name, "repeats": on.data.repeats, "power": POWER}
    return Lists(
        about={"format": files.FORMAT} | about,
        count=on.counts,
        fields={name: ids for name, ids in dataset.catalogue.ids.items() if name != "item"},
        content=dataset.catalogue.content,
        events={name: getattr(log, name)[seen] for name in ("user", "item", "action", "time")},
        user=log.user[at],
        time=log.time[at],
        offsets=np.append(0, np.cumsum(end - start)),
        history={name: getattr(log, name)[places] for name in ("item", "action", "time")},
        candidates=np.sort(on.requests.rows, axis=1).astype(np.int32),
        whole=np.isin(at, on.at),
    )


def once(folder: Path, on: Slice) -> Lists:
    """The lists of a slice in a folder, written where there are none.

    Raises:
      ValueError: lists of another data set or slice are there.
    """
    if not (folder / "about.json").exists():
        files.write(folder, lists_of(on))
    found = files.read(folder)
    wanted, got = (on.data.name, on.name), (found.about["dataset"], found.about["slice"])
    if got != wanted:
        raise ValueError(f"{folder}: expected lists of {wanted}, got {got}; remove the folder")
    return found
