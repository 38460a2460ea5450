r"""A small cascade over the synthetic world, with a ranker whose list is known for every candidate.

**Objectives.** Clicks and, where clicked, long views have the world's probabilities: lift / (lift + m), and sigmoid(g_i - 1) of
the hidden quality g_i.

**Ranker.** R(i | h) = log P(click) + g_i + noise: it knows the truth of clicks, and quality, which clicks do not show.

**Requests.** At an event of the log, retrieval finds M items: half by popularity ** 0.75, half of the topics and categories of
the user's history, and the event's item. An earlier pre-ranker (log P(click) + noise) passes on a half, the ranker scores the
best of them, and shows the best ten; the event's item is always shown, because the log says so. Labels of shown items are drawn
again, that of the event's item is the log's.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from aif_jax.data import Dataset, sample_positions
from aif_jax.data.cascade import RANKER, STAGES, from_columns
from experiments.datasets.synthetic import CLICK, World

SHOWN = 10
NOISE = 0.1  # its deviation in the ranker's score
WHOLE = "ranker_of_all"
"""Label: what the ranker would say of every candidate, for evaluation alone; RANKER is its score where it scored."""


def synthetic_cascade(world: World, *, requests: int, candidates: int, ranked: int, seed: int = 0) -> Dataset:
    """Make a cascade at requests of a world, drawn at random among those whose user has 5 earlier events.

    The module's docstring has the rules. A request has M = `candidates`, or fewer where retrieval finds an item twice, of which
    the ranker scores `ranked`.
    """
    data, rng = world.dataset, np.random.default_rng(seed)
    log, total = data.log, len(data.catalogue)
    starts = sample_positions(data.log, min_history=5, requests=True)
    at = np.sort(rng.choice(starts, requests, replace=False))
    popular = world.popularity**0.75 / (world.popularity**0.75).sum()
    of_topic, of_category = (_members(group) for group in (world.topic, world.category))
    lines: list[dict[str, np.ndarray]] = []
    for position in at:
        end, first = log.history_end([position])[0], log.offsets[log.user[position]]
        history = log.item[first:end]
        some = rng.choice(history, candidates // 4)
        near = [rng.choice(of_topic[world.topic[row]]) for row in some]
        near += [rng.choice(of_category[world.category[row]]) for row in some]
        drawn = rng.choice(total, candidates - len(near) - 1, p=popular)
        rows = np.unique(np.concatenate([[log.item[position]], near, drawn]).astype(np.int64))
        click = world.click_probability(np.full(len(rows), position), rows)
        ranker = np.log(click) + world.quality[rows] + NOISE * rng.normal(size=len(rows))
        passed = np.argsort(-(np.log(click) + rng.normal(size=len(rows))))[: len(rows) // 2]
        scored = passed[np.argsort(-ranker[passed])][:ranked]
        own = int(np.searchsorted(rows, log.item[position]))
        shown = np.append(scored[scored != own][: SHOWN - 1], own)
        stage = np.full(len(rows), STAGES.index("retrieved"))
        stage[passed], stage[scored], stage[shown] = (STAGES.index(name) for name in ("pre_ranked", "ranked", "exposed"))
        clicked = (rng.random(len(rows)) < click).astype(np.float64)
        clicked[own] = log.action[position] >= CLICK
        long_view = clicked * (rng.random(len(rows)) < 1 / (1 + np.exp(1 - world.quality[rows])))
        known, heard = stage == 0, stage <= 1
        lines.append({
            "user": np.full(len(rows), log.user[position]), "time": np.full(len(rows), log.time[position]),
            "rows": rows, "stage": stage, "click": np.where(known, clicked, np.nan),
            "long_view": np.where(known, long_view, np.nan), RANKER: np.where(heard, ranker, np.nan), WHOLE: ranker,
        })  # fmt: skip
    table = {name: np.concatenate([line[name] for line in lines]) for name in lines[0]}
    labels = {name: table[name].astype(np.float32) for name in ("click", "long_view", RANKER, WHOLE)}
    made, without, _ = from_columns(
        log, **{name: table[name] for name in ("user", "time", "rows", "stage")}, labels=labels, candidates=candidates
    )
    assert not without  # every request is at an event
    return dataclasses.replace(data, cascade=made)


def _members(group: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each group; row 0, of group -1, is none."""
    order = np.argsort(group[1:], kind="stable") + 1
    return np.split(order, np.searchsorted(group[order], np.arange(1, group.max() + 1)))
