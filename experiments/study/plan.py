"""Which cells there are, the most valuable first."""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.study import arms, benches, recipes
from experiments.study.cells import Cell

SEEDS = (0, 1, 2)
MAIN = ("exact", "two_tower", "aif", "cold", "+ SimTier")
FAMILIES = ("two_tower", "aif", "cold", "exact")
TRIALS: tuple[dict[str, Any], ...] = tuple(
    dict(learning_rate=rate, epochs=epochs, weight_decay=decay)
    for rate, epochs, decay in ((1e-2, 1, 1e-5), (1e-2, 1, 0.1), (2e-2, 1, 1e-5), (1e-2, 2, 0.1), (5e-3, 2, 0.1))
)
"""The tuning budget of a family: each trial is one run with seed 0, judged by GAUC on the validation slice."""
STAGES = (
    "tuning", "main", "longer", "blocks", "synthetic", "taobao", "recipes", "liked", "leave one out", "sweeps", "one source",
    "precision", "signatures", "more epochs", "leave one out, validation",
)  # fmt: skip
LONG = ("aif, L=512", "aif, L=512, tiers by octaves", *arms.WINDOWS)
SMALL = ("leave one out, validation", "sweeps", "precision", "signatures")
"""Stages that choose among models: they stand on the validation slice with `FIXED`, and leave the test slice alone."""


def cells(stage: str, *, bench: str = "movielens", seeds: tuple[int, ...] = SEEDS) -> list[Cell]:
    """The cells of a stage, in order; seed by seed, so that what is done first stands on all arms.

    Raises:
      ValueError: no such stage.
    """
    if stage not in STAGES:
        raise ValueError(f"stage: expected one of {STAGES}, got {stage!r}")
    make = _STAGES[stage]
    return make(bench, seeds)


def everything(seeds: tuple[int, ...] = SEEDS) -> list[Cell]:
    """All stages one after another, each cell once."""
    return list(dict.fromkeys(cell for stage in STAGES for cell in cells(stage, seeds=seeds)))


def _tuning(bench: str, seeds: tuple[int, ...]) -> list[Cell]:
    return [Cell(bench=bench, arm=arm, seed=0, slice="validation", **trial) for trial in TRIALS for arm in FAMILIES]


def _main(bench: str, seeds: tuple[int, ...]) -> list[Cell]:
    return [Cell(bench=bench, arm=arm, seed=seed) for seed in seeds for arm in MAIN]


def _longer(bench: str, seeds: tuple[int, ...]) -> list[Cell]:
    return [Cell(bench=bench, arm=arm, seed=seed) for seed in seeds for arm in arms.LONGER]


def _recipes(bench: str, seeds: tuple[int, ...]) -> list[Cell]:
    """All recipes on one model; the one that is made for the whole catalogue on the two-tower model and other data sets too."""
    wanted = [(bench, recipes.ARM, name) for name in recipes.NAMES if name != recipes.DEFAULT]
    for other in (bench, "taobao", "synthetic"):
        wanted += [(other, arm, recipes.CATALOGUE) for arm in ("two_tower", recipes.ARM)]
    return list(dict.fromkeys(Cell(bench=on, arm=arm, seed=seed, recipe=name) for seed in seeds for on, arm, name in wanted))


def _blocks(bench: str, seeds: tuple[int, ...]) -> list[Cell]:
    wanted = [*arms.ADDITIVE, *arms.MEMORIES, "minus SimTier"]
    return [Cell(bench=bench, arm=arm, seed=seed) for seed in seeds for arm in wanted if arm not in MAIN]


def _synthetic(bench: str, seeds: tuple[int, ...]) -> list[Cell]:
    wanted = [*MAIN, *LONG, *(arm for arm in arms.ADDITIVE if arm not in MAIN)]
    return [Cell(bench="synthetic", arm=arm, seed=seed) for seed in seeds for arm in wanted]


def _one_source(bench: str, seeds: tuple[int, ...]) -> list[Cell]:
    """Worlds with a single source of interest: which block finds which signal."""
    blocks = ("two_tower", "+ user and item blocks", "+ SIM", "minus SIM", "minus SimTier", "minus DIN on LSH", "aif")
    names = [name for name in benches.SYNTHETIC if name != "synthetic"]
    return [Cell(bench=name, arm=arm, seed=seed) for seed in seeds for name in names for arm in blocks]


def _taobao(bench: str, seeds: tuple[int, ...]) -> list[Cell]:
    wanted = [*MAIN, *(arm for arm in arms.ADDITIVE if arm not in MAIN)]
    return [Cell(bench="taobao", arm=arm, seed=seed) for seed in seeds for arm in wanted]


def _sweeps(bench: str, seeds: tuple[int, ...]) -> list[Cell]:
    wanted = ("+ SimTier", "+ SimTier, L=512", *arms.SWEEPS)
    return [Cell(bench=bench, arm=arm, seed=seed, **FIXED) for seed in seeds[:2] for arm in wanted]


def _leave_one_out(bench: str, seeds: tuple[int, ...], **options: Any) -> list[Cell]:
    """The full model without one block, on three data sets: as the main arms are asked, on the test slice."""
    wanted = ("aif", *arms.LEAVE_ONE_OUT)
    on_all = dict.fromkeys((bench, "taobao", "synthetic"))
    return [Cell(bench=on, arm=arm, seed=seed, **options) for on in on_all for seed in seeds for arm in wanted]


def _leave_one_out_validation(bench: str, seeds: tuple[int, ...]) -> list[Cell]:
    """The same before the test slice was asked."""
    return _leave_one_out(bench, seeds, **FIXED)


def _liked(bench: str, seeds: tuple[int, ...]) -> list[Cell]:
    found = [Cell(bench=bench, arm=arm, seed=seed) for seed in seeds for arm in MAIN]
    return [dataclasses.replace(cell, task="liked", recipe="pointwise") for cell in found]


FIXED: dict[str, Any] = dict(slice="validation", learning_rate=1e-2, epochs=1, weight_decay=0.1)
"""Of the small comparisons, which leave the test slice alone: hyperparameters that do well for every family."""


def _precision(bench: str, seeds: tuple[int, ...]) -> list[Cell]:
    kinds = ("float32", "bfloat16")
    return [Cell(bench=bench, arm="+ SimTier", seed=seed, compute=kind, **FIXED) for seed in seeds for kind in kinds]


def _signatures(bench: str, seeds: tuple[int, ...]) -> list[Cell]:
    wanted, kinds = ("+ SimTier", *arms.SIGNATURES), ("rotated", "random")
    return [
        Cell(bench=bench, arm=arm, seed=seed, projection=kind, **FIXED)
        for seed in seeds[:2]
        for arm in wanted
        for kind in kinds
    ]


def _more_epochs(bench: str, seeds: tuple[int, ...]) -> list[Cell]:
    """Whether SIM, where it is not the signal, ranks worse for good or learns more slowly."""
    wanted = ("+ user and item blocks", "+ SIM")
    return [
        dataclasses.replace(Cell(bench="synthetic-short", arm=arm, seed=seed, **FIXED), epochs=n)
        for seed in seeds[:2]
        for n in (2, 6)
        for arm in wanted
    ]


_STAGES = dict(
    zip(
        STAGES,
        (
            _tuning, _main, _longer, _blocks, _synthetic, _taobao, _recipes, _liked, _leave_one_out, _sweeps, _one_source,
            _precision, _signatures, _more_epochs, _leave_one_out_validation,
        ),  # fmt: skip
        strict=True,
    )
)
