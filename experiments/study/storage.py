"""What narrow rows of the item index do to ranking: bfloat16 and int8 against float32.

Claim     rows of a half or a third of the bytes rank as float32 rows do.
Command   python -m experiments.study.storage --data DIR --work DIR, with the models of `question`'s --plan validation
Protocol  that of `question`, validation split, `presets.aif`. A row is written in a storage and read again; the rest of the
          model computes in float32. Means over seeds; intervals are 95 % over users, paired.
Figures   GAUC points and the ratio of HR@100 against float32 rows, of requests whose item has a training event
"""

from __future__ import annotations

from pathlib import Path

import jax

import aif_jax as aif
from aif_jax import item, metrics
from aif_jax.model import ITEM
from aif_jax.store import codec
from experiments import common
from experiments.study import datasets, question
from experiments.study.question import AIF, SEEDS, Trial


def stored(config: aif.Config, storage: codec.Storage) -> aif.PreRanker:
    """Return the model whose item rows have been written in a storage and read again."""

    def apply(params: aif.types.Params, features: aif.ItemFeatures, *, config: aif.Config) -> aif.ItemRow:
        return codec.widen(codec.encode(item.apply(params, features, config=config), storage))

    return aif.assemble(config, item=ITEM._replace(apply=apply))


def compare(data: datasets.StudyData, work: Path, *, seeds: tuple[int, ...] = SEEDS) -> dict[str, dict[str, list[float]]]:
    """Return [value, low, high] of each figure by storage."""
    found: dict[str, list[dict[str, metrics.ByUser]]] = {storage: [] for storage in codec.STORAGES}
    for seed in seeds:
        trial = Trial(dataset=data.name, model=AIF, seed=seed)
        (part,) = question.parts_of(trial, data)
        made = question.trained(trial, part, data, work=work)
        for storage in codec.STORAGES:
            narrow = stored(made.model.config, storage)
            found[storage].append(question.evaluate(trial, part, narrow, made.params, data))
            jax.clear_caches()
    gaps: dict[str, dict[str, list[float]]] = {}
    for storage in codec.STORAGES[1:]:
        gaps[storage] = {}
        for metric, ratio in (("gauc_trained", False), ("hr100_trained", True)):
            ours, plain = (question.over_seeds([one[metric] for one in found[name]]) for name in (storage, "float32"))
            gap = metrics.paired_interval(ours, plain, ratio=ratio)
            gaps[storage]["hr100_ratio" if ratio else "gauc_points"] = [value * (1 if ratio else 100) for value in gap]
    return gaps


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Compare on both data sets, or on a synthetic one of a size for tests."""
    parser = common.parser(__doc__, data=True, work=question.WORK)
    options = parser.parse_args(arguments)
    names, seeds = (("smoke",), (0,)) if options.smoke else (("movielens", "taobao"), SEEDS)
    common.report({name: compare(datasets.load(name, options.data), options.work, seeds=seeds) for name in names}, options.json)


if __name__ == "__main__":
    main()
