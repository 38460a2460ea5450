"""Do gates between objectives earn their place? A head of experts and gates (MMoE) against one head with T logits.

Claim     none: the question is whether the package should have it. It should not, unless gates gain on some objective beyond
          the spread of seeds without a loss on another, against a single head of as many parameters.
Command   python -m experiments.gates                   (or --smoke, --json FILE)
Data      the synthetic cascade, `experiments/datasets/cascade.py`: clicks follow the history, long views a hidden quality of
          the item, and the ranker's choice both, which makes clicks and quality opposed among what is shown. The user tower
          pools by the mean and the blocks are BEA, SIM and the dot product, so that nine trainings take minutes.
Heads     *single*: the head's first layer, then 64 -> 32 -> T. *wide*: the same with 64 -> 128 -> T, as many parameters as
          *gates*: four experts 64 -> 32 over the same first layer, for each objective a softmax gate over them from that layer,
          and a logit 32 -> 1 (Ma et al. 2018, without towers of several layers). All keep the first layer split by block, so
          the critical path has one small product more. Direct logits of the blocks are weighed by objective in all.
Protocol  as `experiments.cascade`: split by time, test slice evaluated once, the same lists and steps; three seeds.
Measured  gates over *wide*, seeds 0 / 1 / 2: AUC of clicks +0.009 / +0.022 / -0.015, of long views +0.004 / +0.007 / -0.011, of
          the ranker's choice -0.004 / 0.000 / -0.002. No gain beyond the spread of seeds: the package has one head.
Time      under 10 minutes of CPU
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import aif_jax as aif
from aif_jax import Component, Config, head, interaction, layers, metrics, train
from aif_jax.blocks import Bea, DotProduct, Sim
from aif_jax.data import SampleKey, time_cuts
from aif_jax.train.evaluate import list_scores
from aif_jax.train.losses import distill_listwise, pointwise_bce
from aif_jax.train.tasks import Goal, Goals
from aif_jax.types import Params
from experiments import common
from experiments.cascade import CHOSEN, over_seeds, with_choice
from experiments.datasets.cascade import WHOLE, synthetic_cascade
from experiments.datasets.synthetic import SMALL, synthetic_world

EXPERTS = 4
OBJECTIVES = ("click", "long_view|click", CHOSEN)


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Trains every head with every seed and prints their figures."""
    options = common.options(__doc__, arguments, {"seeds": ([0, 1, 2], [0], "worlds and trainings")})
    common.report(over_seeds([compare(seed, smoke=options.smoke) for seed in options.seeds]), options.json, hidden=("seeds",))


def compare(seed: int, *, smoke: bool) -> dict[str, Any]:
    """AUC by objective, and recall of the ranker's best by the ranker's logit, of each head."""
    sizes: dict[str, Any] = SMALL if smoke else dict(users=300, items=1000, events_per_user=200, lag=32)
    requests, candidates, ranked, k = (160, 60, 20, 10) if smoke else (3000, 200, 80, 50)
    world = synthetic_world(seed, **sizes)
    made = synthetic_cascade(world, requests=requests, candidates=candidates, ranked=ranked, seed=seed)
    data = with_choice(made.dataset, k)
    task = train.Cascaded(exposed=10, ranked=10, pre_ranked=0, retrieved=10)
    loss = Goals(
        Goal(pointwise_bce, "click"),
        Goal(pointwise_bce, "long_view"),
        Goal(pointwise_bce, CHOSEN),
        Goal(distill_listwise, "ranker", objective=CHOSEN),
    )
    blocks = (Bea(dot_product=True), Sim("category"), DotProduct())
    changes: dict[str, Any] = dict(long_length=64, sequence=False, blocks=blocks, objectives=OBJECTIVES)
    if smoke:
        changes |= dict(width=8, towers=(16,), head=(16, 8), short_length=8, long_length=8, blocks=(DotProduct(),))
    first_validation, first_test = time_cuts(data.log)
    moments: Any = dict(validation=np.datetime64(first_validation, "s"), test=np.datetime64(first_test, "s"))
    at = task.positions(data, min_history=1, since=first_test, before=None)
    lists = aif.data.logged(data)(at, SampleKey(0, 0, 0))
    assert isinstance(lists.labels, dict)
    labels, where = lists.labels, lists.rows > 0
    shown = where & ~np.isnan(labels["click"])
    figures: dict[str, float] = {}
    for way, build in HEADS.items():
        model = build(aif.presets.aif(data.schema, **changes))
        run = aif.fit(
            model, data, task=task, loss=loss, epochs=1 if smoke else 4, batch_size=32 if smoke else 128, seed=seed, k=None,
            requests=300, keep_best=False, progress=False, **moments,
        )  # fmt: skip
        scores = list_scores(model, run.params, data, at, lists, batch_size=16, progress=False)
        clicked = shown & (labels["click"] == 1)
        figures |= {
            f"auc_click_{way}": metrics.auc(scores[..., 0], np.nan_to_num(labels["click"]), where=shown),
            f"auc_long_view_{way}": metrics.auc(scores[..., 1], np.nan_to_num(labels["long_view"]), where=clicked),
            f"auc_chosen_{way}": metrics.auc(scores[..., 2], np.nan_to_num(labels[CHOSEN]), where=where),
            f"ranker_recall_{way}": metrics.ranker_recall_at_k(scores[..., 2], labels[WHOLE], k=k, where=where).value,
            f"parameters_{way}": float(sum(leaf.size for leaf in jax.tree.leaves(run.params["head"]))),
        }
        print(f"seed {seed}: {way} is done", flush=True)
    return figures


def _wide(config: Config) -> aif.PreRanker:
    """As many parameters as the experts: the second layer is as wide as all of them."""
    first, *rest = config.head
    return aif.build(config.replace(head=(first, EXPERTS * rest[0], *rest[1:])))


def _gated(config: Config) -> aif.PreRanker:
    return aif.assemble(config, interaction=Component(init, apply))


HEADS: dict[str, Callable[[Config], aif.PreRanker]] = {"single": aif.build, "wide": _wide, "gates": _gated}


def init(key: jax.Array, config: Config) -> Params:
    """The head's own first layer and direct logits; `experts` [E, H, W], `gates` [T, H, E], `towers` [T, W]."""
    first, width = config.head[:2]
    own, *keys = jax.random.split(key, 4)
    made = head.init(own, interaction.widths(config), config.head, config.outputs)
    experts = [layers.dense_init(k, first, width) for k in jax.random.split(keys[0], EXPERTS)]
    gates = [layers.dense_init(k, first, EXPERTS) for k in jax.random.split(keys[1], config.outputs)]
    towers = [layers.dense_init(k, width, 1) for k in jax.random.split(keys[2], config.outputs)]
    stacked = {name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts) for name, parts in (
        ("experts", experts), ("gates", gates), ("towers", towers)
    )}  # fmt: skip
    return {"first": made["first"], "direct": made["direct"]} | stacked


def apply(params: Params, state: Any, rows: Any, *, config: Config) -> jax.Array:
    """Logits [C, T]: for each objective a mixture of experts over the shared first layer."""
    own = params["head"]
    terms = list(interaction._terms(params, state, rows, config).values())
    nothing = {"first": own["first"], "rest": {}, "direct": jnp.zeros(config.head[0])}
    hidden = head.logits(nothing, terms)  # [C, H], the first layer after its ReLU
    direct = head.logits({"bias": jnp.zeros(())}, terms)
    experts = jax.nn.relu(jax.vmap(layers.dense, (0, None))(own["experts"], hidden))  # [E, C, W]
    gates = jax.nn.softmax(jax.vmap(layers.dense, (0, None))(own["gates"], hidden), -1)  # [T, C, E]
    mixed = jnp.einsum("tce,ecw->tcw", gates, experts)
    logits = jax.vmap(layers.dense)(own["towers"], mixed)[..., 0].T
    return logits + direct[:, None] * own["direct"][None, :]


if __name__ == "__main__":
    main()
