"""Which runs there are, the most valuable first."""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.study import datasets, models, recipes
from experiments.study.runs import BY_LENGTH, Run

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
    "precision", "signatures", "more epochs", "leave one out, validation", "streaming",
    "half-lives", "catalogue", "preset, recipes", "similarity", "lengths",
)  # fmt: skip
LONG = ("aif, L=512", "aif, L=512, seven recency windows", *models.WINDOWS)
SMALL = ("leave one out, validation", "sweeps", "precision", "signatures", "similarity", "lengths")
"""Stages that choose among models, on the validation slice with `FIXED`; they do not use the test slice."""


def runs(stage: str, *, dataset: str = "movielens", seeds: tuple[int, ...] = SEEDS) -> list[Run]:
    """The runs of a stage, in order; seed by seed, so that the first seed of all models is done first.

    Raises:
      ValueError: no such stage.
    """
    if stage not in STAGES:
        raise ValueError(f"stage: expected one of {STAGES}, got {stage!r}")
    make = _STAGES[stage]
    return make(dataset, seeds)


def everything(seeds: tuple[int, ...] = SEEDS) -> list[Run]:
    """All stages one after another, each run once."""
    return list(dict.fromkeys(run for stage in STAGES for run in runs(stage, seeds=seeds)))


def _tuning(dataset: str, seeds: tuple[int, ...]) -> list[Run]:
    return [Run(dataset=dataset, model=model, seed=0, slice="validation", **trial) for trial in TRIALS for model in FAMILIES]


def _main(dataset: str, seeds: tuple[int, ...]) -> list[Run]:
    return [Run(dataset=dataset, model=model, seed=seed) for seed in seeds for model in MAIN]


def _longer(dataset: str, seeds: tuple[int, ...]) -> list[Run]:
    return [Run(dataset=dataset, model=model, seed=seed) for seed in seeds for model in models.LONGER]


def _recipes(dataset: str, seeds: tuple[int, ...]) -> list[Run]:
    """The first recipes on one model; the one for the whole catalogue on the two-tower model and other data sets too."""
    others = ("pointwise", "listwise", "distillation", "hard negatives", recipes.CATALOGUE)
    wanted = [(dataset, recipes.MODEL, name) for name in others]
    for other in (dataset, "taobao", "synthetic"):
        wanted += [(other, model, recipes.CATALOGUE) for model in ("two_tower", recipes.MODEL)]
    runs = (Run(dataset=on, model=model, seed=seed, recipe=name) for seed in seeds for on, model, name in wanted)
    return list(dict.fromkeys(runs))


def _blocks(dataset: str, seeds: tuple[int, ...]) -> list[Run]:
    wanted = [*models.ADDITIVE, *models.MEMORIES, "minus SimTier"]
    return [Run(dataset=dataset, model=model, seed=seed) for seed in seeds for model in wanted if model not in MAIN]


def _synthetic(dataset: str, seeds: tuple[int, ...]) -> list[Run]:
    wanted = [*MAIN, *LONG, *(model for model in models.ADDITIVE if model not in MAIN)]
    return [Run(dataset="synthetic", model=model, seed=seed) for seed in seeds for model in wanted]


def _one_source(dataset: str, seeds: tuple[int, ...]) -> list[Run]:
    """Worlds with a single source of interest: which block finds which signal."""
    blocks = ("two_tower", "+ user and item blocks", "+ SIM", "minus SIM", "minus SimTier", "minus DIN on LSH", "aif")
    names = [name for name in datasets.SYNTHETIC if name != "synthetic"]
    return [Run(dataset=name, model=model, seed=seed) for seed in seeds for name in names for model in blocks]


def _taobao(dataset: str, seeds: tuple[int, ...]) -> list[Run]:
    wanted = [*MAIN, *(model for model in models.ADDITIVE if model not in MAIN)]
    return [Run(dataset="taobao", model=model, seed=seed) for seed in seeds for model in wanted]


def _sweeps(dataset: str, seeds: tuple[int, ...]) -> list[Run]:
    wanted = ("+ SimTier", "+ SimTier, L=512", *models.SWEEPS)
    return [Run(dataset=dataset, model=model, seed=seed, **FIXED) for seed in seeds[:2] for model in wanted]


def _leave_one_out(dataset: str, seeds: tuple[int, ...], **options: Any) -> list[Run]:
    """The full model without one block, on three data sets: evaluated as the main models are, on the test slice."""
    wanted = ("aif", *models.LEAVE_ONE_OUT)
    on_all = dict.fromkeys((dataset, "taobao", "synthetic"))
    return [Run(dataset=on, model=model, seed=seed, **options) for on in on_all for seed in seeds for model in wanted]


def _leave_one_out_validation(dataset: str, seeds: tuple[int, ...]) -> list[Run]:
    """The same on the validation slice."""
    return _leave_one_out(dataset, seeds, **FIXED)


def _liked(dataset: str, seeds: tuple[int, ...]) -> list[Run]:
    found = [Run(dataset=dataset, model=model, seed=seed) for seed in seeds for model in MAIN]
    return [dataclasses.replace(run, task="liked", recipe="pointwise") for run in found]


FIXED: dict[str, Any] = dict(slice="validation", learning_rate=1e-2, epochs=1, weight_decay=0.1)
"""Of the comparisons on the validation slice: hyperparameters that do well for every family."""


def _precision(dataset: str, seeds: tuple[int, ...]) -> list[Run]:
    kinds = ("float32", "bfloat16")
    return [Run(dataset=dataset, model="+ SimTier", seed=seed, compute=kind, **FIXED) for seed in seeds for kind in kinds]


def _signatures(dataset: str, seeds: tuple[int, ...]) -> list[Run]:
    wanted, kinds = ("+ SimTier", *models.SIGNATURES), ("rotated", "random")
    return [
        Run(dataset=dataset, model=model, seed=seed, projection=kind, **FIXED)
        for seed in seeds[:2]
        for model in wanted
        for kind in kinds
    ]


def _more_epochs(dataset: str, seeds: tuple[int, ...]) -> list[Run]:
    """Whether SIM, where it is not the signal, ranks worse for good or learns more slowly."""
    wanted = ("+ user and item blocks", "+ SIM")
    return [
        dataclasses.replace(Run(dataset="synthetic-short", model=model, seed=seed, **FIXED), epochs=n)
        for seed in seeds[:2]
        for n in (2, 6)
        for model in wanted
    ]


def _streaming(dataset: str, seeds: tuple[int, ...]) -> list[Run]:
    """Users nearline: memory and SIM updated by every event, against the window, on the test slice."""
    other, resting = ("taobao", "synthetic"), "synthetic-rest"
    main = [(on, model) for on in (dataset, *other) for model in ("streaming", "preset")]
    main += [(resting, model) for model in models.RESTING]
    return [Run(dataset=on, model=model, seed=seed) for seed in seeds for on, model in main]


def _half_lives(dataset: str, seeds: tuple[int, ...]) -> list[Run]:
    """Learned half-lives against fixed ones, and how many of them."""
    wanted = ("streaming", *models.HALF_LIVES)
    return [Run(dataset=dataset, model=model, seed=seed) for seed in seeds for model in wanted]


def _catalogue(dataset: str, seeds: tuple[int, ...]) -> list[Run]:
    """The question of the whole catalogue: the presets as they come, the two-tower model by its best recipe, and both taught
    by the longer preset.
    """
    wanted = [("two_tower", recipes.DEFAULT), ("preset", recipes.DEFAULT), ("preset, L=2048", recipes.DEFAULT)]
    wanted += [("two_tower", recipes.CATALOGUE), ("two_tower", recipes.FROM_LONGER)]
    taught = dict(model="preset, L=2048", recipe=recipes.FROM_LONGER, batches=BY_LENGTH)
    return [
        run
        for seed in seeds
        for run in (
            *(Run(dataset=dataset, model=model, seed=seed, recipe=name) for model, name in wanted),
            Run(dataset=dataset, seed=seed, **taught),
        )
    ]


def _preset_recipes(dataset: str, seeds: tuple[int, ...]) -> list[Run]:
    """What may raise hit rate and GAUC of the preset: the validation slice, the hyperparameters that won there."""
    wanted, tuned = (recipes.DEFAULT, *recipes.OF_PRESET), dict(FIXED, epochs=2)
    return [
        Run(dataset=dataset, model=model, seed=seed, recipe=name, **tuned)
        for seed in seeds
        for name in wanted
        for model in ("two_tower", "preset")
    ]


def _similarity(dataset: str, seeds: tuple[int, ...]) -> list[Run]:
    """Other forms of content similarity in the preset."""
    return [Run(dataset=dataset, model=model, seed=0, **FIXED) for model in ("preset", *models.SIMILARITY)]


def _lengths(dataset: str, seeds: tuple[int, ...]) -> list[Run]:
    """How long a history the preset reads: one seed, the validation slice, the hyperparameters that won there."""
    wanted, tuned = ("preset", "preset, L=2048", *models.LENGTHS), dict(FIXED, epochs=2)
    mixed = [Run(dataset=dataset, model=model, seed=0, **tuned) for model in wanted]
    return [*mixed, Run(dataset=dataset, model="preset, L=2048", seed=0, batches=BY_LENGTH, **tuned)]


_STAGES = dict(
    zip(
        STAGES,
        (
            _tuning,
            _main,
            _longer,
            _blocks,
            _synthetic,
            _taobao,
            _recipes,
            _liked,
            _leave_one_out,
            _sweeps,
            _one_source,
            _precision,
            _signatures,
            _more_epochs,
            _leave_one_out_validation,
            _streaming,
            _half_lives,
            _catalogue,
            _preset_recipes,
            _similarity,
            _lengths,
        ),  # fmt: skip
        strict=True,
    )
)
