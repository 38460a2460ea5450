"""How much of a synthetic world's truth a model can reach that does not see all of it.

Claim     A model whose long history is cut, or that counts recent behaviours like earlier ones, has a lower ceiling
          than the truth: that is most of what the AIF models miss.
Command   python -m experiments.study.limits
Method    The truth's formula (`experiments.datasets.synthetic`) is evaluated with less information, on the study's requests.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from aif_jax import metrics
from aif_jax.data.candidates import NegativeSampler, item_counts
from experiments import common
from experiments.datasets.synthetic import World
from experiments.study import datasets
from experiments.study.evaluation import Requests, held_out, pick
from experiments.study.runs import SIZES


class View(NamedTuple):
    """What of the truth is seen: only the latest `window` events, whether rest is told from recency, which sources."""

    window: int | None = None
    rest: bool = True
    long_term: bool = True
    short_term: bool = True
    category_locality: bool = True


VIEWS = {
    "the truth": View(),
    "the latest 128 events of it": View(window=128),
    "recent topics not left out of the long term": View(rest=False),
    "both": View(window=128, rest=False),
    "no long term": View(long_term=False),
    "no short term": View(short_term=False),
    "no categories": View(category_locality=False),
}


def lift(world: World, requests: Requests, view: View) -> np.ndarray:
    """The lift [R, C] of every candidate as far as the view goes; with the full view `world.lift`, for observable samples."""
    log, lag, recent, shares = world.dataset.log, world.lag, world.recent, world.shares
    topics, categories = (_shares(world, group) for group in (world.topic, world.category))
    found = np.empty(requests.rows.shape)
    for i, (at, rows) in enumerate(zip(requests.positions, requests.rows, strict=True)):
        end = int(log.history_end(np.array([at]))[0])
        past = log.item[log.offsets[log.user[at]] : end]
        near = np.bincount(world.topic[past[-lag:]], minlength=len(topics))
        seen = past if view.window is None else past[-view.window :]
        far = np.bincount(world.topic[seen[:-lag]], minlength=len(topics)).astype(float) ** 2
        rests = far * (near == 0) if view.rest else far
        moment = np.bincount(world.topic[past[-recent:]], minlength=len(topics)) / recent
        met = np.bincount(world.category[seen], minlength=len(categories)).astype(float) ** 2
        topic, category = world.topic[rows], world.category[rows]
        found[i] = shares["noise"]
        if view.long_term:
            found[i] += shares["long_term"] * (rests / max(rests.sum(), 1))[topic] / topics[topic]
        if view.short_term:
            found[i] += shares["short_term"] * moment[topic] / topics[topic]
        if view.category_locality:
            found[i] += shares["category_locality"] * (met / max(met.sum(), 1))[category] / categories[category]
    return found


def gauc(world: World, requests: Requests, seen: np.ndarray, sampling: np.ndarray) -> float:
    """GAUC of the best scores that a lift [R, C] allows against negatives drawn by `sampling` [N]."""
    probability = seen * world.popularity[requests.rows]
    scores = np.log(probability) - np.log(sampling[requests.rows]) - np.log1p(-probability)
    users = np.broadcast_to(world.dataset.log.user[requests.positions][:, None], scores.shape)
    return metrics.gauc(scores, requests.labels, users).value


def observable_requests(data: datasets.StudyData, requests: int = SIZES.requests) -> tuple[Requests, np.ndarray]:
    """The observable requests of the test slice, and how negatives were drawn."""
    assert data.world is not None  # of a synthetic data set
    parts = data.split
    sampler = NegativeSampler(item_counts(data.dataset, np.sort(np.concatenate([parts.train, parts.validation]))))
    found = held_out(data.dataset, parts.test, sampler, requests=requests, seed=0)
    return pick(found, data.world.observable[found.positions]), sampler.probabilities


def main() -> None:
    """Prints the ceiling of every view."""
    common.parser(__doc__).parse_args()
    data = datasets.load("synthetic")
    assert data.world is not None
    requests, sampling = observable_requests(data)
    rows = []
    for name, view in VIEWS.items():
        seen = lift(data.world, requests, view)
        rows.append([name, f"{gauc(data.world, requests, seen, sampling):.4f}"])
    print(common.table(rows, ["what is seen", "highest GAUC"]))


def _shares(world: World, group: np.ndarray) -> np.ndarray:
    return np.bincount(group[1:], weights=world.popularity[1:])


if __name__ == "__main__":
    main()
