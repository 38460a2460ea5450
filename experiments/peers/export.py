"""Writes the study's samples and lists as files: the same requests and negatives that the study's models are evaluated on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from aif_jax.data.candidates import NegativeSampler, item_counts
from experiments.peers import lists as files
from experiments.peers.lists import Lists
from experiments.study.datasets import StudyData
from experiments.study.evaluation import held_out

SLICES = ("validation", "test")
POWER = 0.75  # of the study's sampler
MIXED = 1  # stream of random numbers of the mixed negatives


def lists_of(data: StudyData, slice_: str, *, requests: int, seed: int = 0) -> Lists:
    """The files' contents for one slice.

    Args:
      data: a data set of the study.
      slice_: "validation", whose training events are `split.train`, or "test", with the validation events too.
      requests: how many at most; 3,000 in the study.
      seed: of requests and negatives; 0 in the study.

    Raises:
      ValueError: an unknown slice.
    """
    if slice_ not in SLICES:
        raise ValueError(f"slice: expected one of {SLICES}, got {slice_!r}")
    dataset, split = data.dataset, data.split
    test = slice_ == "test"
    trained = np.sort(np.concatenate([split.train, split.validation])) if test else split.train
    count = item_counts(dataset, trained)
    found = held_out(
        dataset, split.test if test else split.validation, NegativeSampler(count, power=POWER), requests=requests, seed=seed
    )
    log, at = dataset.log, found.positions
    target, negatives = found.rows[:, 0], found.rows[:, 1:]
    share = float((count[target] == 0).mean())
    start, end = log.offsets[log.user[at]], log.history_end(at)
    places = np.concatenate([np.arange(first, last) for first, last in zip(start, end, strict=True)])
    about = {
        "format": files.FORMAT,
        "dataset": data.name,
        "slice": slice_,
        "repeats": data.repeats,
        "power": POWER,
        "untrained_share": share,
        "seed": seed,
        "requests": len(at),
    }
    return Lists(
        about=about,
        count=count,
        fields={name: ids for name, ids in dataset.catalogue.ids.items() if name != "item"},
        content=dataset.catalogue.content,
        events={name: getattr(log, name)[trained] for name in ("user", "item", "action", "time")},
        user=log.user[at],
        time=log.time[at],
        position=at,
        offsets=np.append(0, np.cumsum(end - start)),
        history={name: getattr(log, name)[places] for name in ("item", "action", "time")},
        target=target,
        negatives=negatives,
        mixed_negatives=mixed(negatives, target, count, share=share, seed=seed),
    )


def mixed(negatives: np.ndarray, target: np.ndarray, count: np.ndarray, *, share: float, seed: int) -> np.ndarray:
    """The negatives [R, n] with each replaced, at a chance of `share`, by an item without a training event.

    Those are drawn uniformly, without the request's target. A list whose negatives were all drawn by popularity has none of
    them, so that a model gains by scoring every item without events high: as many positives are such items.
    """
    rng = np.random.default_rng([seed, MIXED])
    untrained = 1 + np.flatnonzero(count[1:] == 0)
    chosen = rng.random(negatives.shape) < share
    place = np.searchsorted(untrained, target)
    own = np.append(untrained, 0)[place] == target  # the target is one of them
    left = len(untrained) - own
    drawn = (rng.random(negatives.shape) * left[:, None]).astype(np.int64)
    drawn += own[:, None] & (drawn >= place[:, None])
    chosen &= left[:, None] > 0
    return np.where(chosen, np.append(untrained, 0)[np.where(chosen, drawn, -1)], negatives).astype(np.int32)


def once(folder: Path, name: str, slice_: str, load: Callable[[], StudyData], *, requests: int) -> Lists:
    """The lists of a data set in a folder; where there are none, `load` gives the data set and they are written first.

    Raises:
      ValueError: lists of another data set or slice are there.
    """
    if not (folder / "about.json").exists():
        files.write(folder, lists_of(load(), slice_, requests=requests))
    found = files.read(folder)
    got = found.about["dataset"], found.about["slice"]
    if got != (name, slice_):
        raise ValueError(f"{folder}: expected lists of {(name, slice_)}, got {got}; remove the folder")
    return found
