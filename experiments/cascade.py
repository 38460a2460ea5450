"""The ranker's choice as a second objective, in a synthetic cascade whose ranker is known for every candidate.

Claim     Training on the ranker's scores raises the share of its top 100 in ours (ranker recall@100) by at least 5 points over
          plain binary cross-entropy on what was shown, at equal AUC of clicks (`ranker_recall100_gain`, points).
Command   python -m experiments.cascade                 (or --smoke, --json FILE; --help lists all)
Data      the synthetic world and a cascade over it, `experiments/datasets/cascade.py`
What is   One logit cannot do both: the ranker shows what has many clicks or much quality, so among the shown the two are
compared  opposed, and the ranker's own order has an AUC of clicks of 0.56 where the truth has 0.71. So the ranker's choice is a
          second objective, and requests are served by `p["click"] * p["chosen"] ** weight`. Recall and AUC are of the same
          order; AUC is of clicks on what was shown. The weight is the largest of `WEIGHTS` whose AUC on the validation slice is
          at most `EQUAL` below plain cross-entropy's; `frontier` has recall and AUC of all weights.
Protocol  split by time; the same lists, steps and optimizer for both losses; requests of the last 10 % are evaluated once, on
          all their candidates; three seeds, each with another world
Time      a few minutes a seed on two cores
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import aif_jax as aif
from aif_jax import Dataset, metrics, train
from aif_jax.blocks import DotProduct
from aif_jax.data import BatchKey, CandidateLists
from aif_jax.data.cascade import STAGE
from aif_jax.data.split import time_cuts
from aif_jax.train.evaluate import list_scores
from aif_jax.train.losses import Loss, distill_listwise, lists, pointwise_bce, term
from experiments import common
from experiments.datasets.cascade import WHOLE, synthetic_cascade
from experiments.datasets.synthetic import SMALL, synthetic_world

COUNTS = {"exposed": 10, "ranked": 30, "pre_ranked": 10, "retrieved": 30}
CLICK, CHOSEN = "click", "chosen"
"""Labels and objectives; the second: whether the ranker puts a candidate among its best k."""
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
"""Of the ranker's choice in the order `p["click"] * p["chosen"] ** weight`."""
EQUAL = 0.005
"""AUC on the validation slice that counts as equal: below its standard error there, 0.007 with 6,000 labels."""
TINY: dict[str, Any] = dict(
    width=8, towers=(16,), head=aif.heads.Mlp((16, 8)), short_length=8, long_length=8, sequence=False, blocks=(DotProduct(),)
)


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Train in the world of each seed and print means, the sample deviation under NAME_sd, and every seed under "seeds"."""
    settings = {
        "epochs": (3, 1, "passes over the requests"),
        "batch_size": (128, 32, "requests a step"),
        "seeds": ([0, 1, 2], [2], "worlds and trainings"),
    }
    options = common.options(__doc__, arguments, settings)
    options.k = 10 if options.smoke else 100
    figures: dict[str, Any] = {"seeds": [quality(seed, options) for seed in options.seeds]}
    for name in figures["seeds"][0]:
        values = np.asarray([part[name] for part in figures["seeds"]], np.float64)
        figures[name] = values.mean(0).tolist()
        if values.ndim == 1 and len(values) > 1:
            figures[f"{name}_sd"] = float(values.std(ddof=1))
    common.report(figures, options.json, hidden=("seeds",))


def quality(seed: int, options) -> dict[str, Any]:
    """Return figures of one world and training."""
    large = dict(users=600, items=2000, events_per_user=200, lag=32), dict(requests=6000, candidates=400, ranked=150)
    world, sizes = (SMALL, dict(requests=160, candidates=60, ranked=20)) if options.smoke else large
    figures = consistency(synthetic_cascade(synthetic_world(seed, **world), **sizes, seed=seed), options, seed)
    print(f"seed {seed}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items() if isinstance(v, float)), flush=True)
    return figures


def consistency(data: Dataset, options, seed: int) -> dict[str, Any]:
    """Return figures of requests of the test slice, trained with and without the ranker's scores, labels "ranker" and WHOLE."""
    data = with_choice(data, options.k)
    task = train.Cascaded(**COUNTS)
    plain = pointwise_bce.of(CLICK)
    agreement = (distill_listwise + 0.5 * pairwise_ndcg(options.k)).of("ranker", objective=CHOSEN)
    agreement += 0.2 * margin_info_nce.of(STAGE, objective=CHOSEN) + pointwise_bce.of(CHOSEN)
    ways = {"bce": ((CLICK,), plain), "consistent": ((CLICK, CHOSEN), plain + agreement)}
    _, validation, test = time_cuts(data.log.time)
    slices = {"validation": (validation, test), "test": (test, None)}
    held = {split: Held.of(data, task, span) for split, span in slices.items()}
    moments: dict[str, Any] = {split: np.datetime64(since, "s") for split, (since, _) in slices.items()}
    scored: dict[str, dict[str, np.ndarray]] = {}
    for name, (objectives, loss) in ways.items():
        model = aif.build(
            aif.presets.aif(data.schema, objectives=objectives, **(TINY if options.smoke else {"long_length": 128}))
        )
        sizes = dict(epochs=options.epochs, batch_size=options.batch_size, requests=300)
        config = aif.FitConfig(seed=seed, k=None, keep_best="auc", **sizes, **moments)
        run = aif.fit(model, data, config, task=task, loss=loss)
        scored[name] = {
            split: list_scores(run.model, run.params, data, part.positions, part.lists.rows) for split, part in held.items()
        }
    frontier = {
        split: {weight: part.figures(served(scored["consistent"][split], weight), options.k) for weight in WEIGHTS}
        for split, part in held.items()
    }
    plain_auc = held["validation"].figures(scored["bce"]["validation"], options.k)["auc"]
    kept = [weight for weight in WEIGHTS if frontier["validation"][weight]["auc"] >= plain_auc - EQUAL]
    weight = max(kept, default=0.0)
    bce = held["test"].figures(scored["bce"]["test"], options.k)
    best = frontier["test"][weight]
    figures = {f"{key}_{way}": value for way, one in (("bce", bce), ("consistent", best)) for key, value in one.items()}
    return figures | {
        "ranker_recall100_gain": 100 * (best["ranker_recall100"] - bce["ranker_recall100"]),
        "auc_difference": best["auc"] - bce["auc"],
        "weight": weight,
        "requests": len(held["test"].positions),
        "frontier": [[w, made["ranker_recall100"], made["auc"]] for w, made in frontier["test"].items()],
    }


def pairwise_ndcg(k: int) -> Loss:
    """Return pairs in the ranker's order, weighed by what NDCG@k loses if they swap places (LambdaRank's weights, Burges 2010).

    sum over pairs i above j of |G_i - G_j| |D_i - D_j| log(1 + exp(s_j - s_i)) / sum of the same weights, with
    G_i = 2^(-r_i / k) and D_i = 1 / log2(2 + r_i) for the ranker's ranks r_i < k, 0 from k on. C^2 pairs a list.
    """

    @term(lists, targets="teacher_scores")
    def pairwise(scores: jax.Array, teacher_scores: jax.Array, where: jax.Array, log_q: jax.Array) -> jax.Array:
        above = (teacher_scores[..., :, None] > teacher_scores[..., None, :]) & where[..., :, None] & where[..., None, :]
        rank = jnp.sum(above, axis=-2).astype(scores.dtype)  # how many the ranker has above
        gain, discount = (jnp.where((rank < k) & where, each, 0.0) for each in (jnp.exp2(-rank / k), 1 / jnp.log2(2 + rank)))
        change = jnp.abs(gain[..., :, None] - gain[..., None, :]) * jnp.abs(discount[..., :, None] - discount[..., None, :])
        weight = jnp.where(above, change, 0.0)
        total = jnp.sum(weight, axis=(-1, -2))
        lost = jnp.sum(weight * jax.nn.softplus(scores[..., None, :] - scores[..., :, None]), axis=(-1, -2))
        return lost / jnp.where(total > 0, total, 1.0)

    return pairwise


@term(lists, targets="stages")
def margin_info_nce(scores: jax.Array, stages: jax.Array, where: jax.Array, log_q: jax.Array) -> jax.Array:
    """Return every candidate against all that came less far (InfoNCE, arXiv 1807.03748, additive margin: arXiv 1801.05599).

    -log( e^(s_i - m) / (e^(s_i - m) + sum over j of a later stage of e^s_j) ), the mean over the candidates of a list; m = 1/2.
    """
    behind = (stages[..., None, :] > stages[..., :, None]) & where[..., None, :] & where[..., :, None]
    others, own = jnp.where(behind, scores[..., None, :], -1e30), scores - 0.5
    lost = jnp.where(jnp.any(behind, axis=-1), jnp.logaddexp(own, jax.nn.logsumexp(others, axis=-1)) - own, 0.0)
    return jnp.sum(lost, axis=-1) / jnp.maximum(jnp.sum(jnp.any(behind, axis=-1), axis=-1), 1).astype(lost.dtype)


def served(logits: np.ndarray, weight: float) -> np.ndarray:
    """Return what the order `p["click"] * p["chosen"] ** weight` ranks by, as a logarithm [R, C], from logits [R, C, 2]."""
    label, chosen = (-np.logaddexp(0, -logits[..., place].astype(np.float64)) for place in range(2))
    return label + weight * chosen


def with_choice(data: Dataset, k: int) -> Dataset:
    """Return the same with the label "chosen": 1 for the k candidates that the ranker scored highest, 0 for the others."""
    assert data.cascade is not None
    scores = np.nan_to_num(data.cascade.labels["ranker"], nan=-np.inf)
    best = metrics.top_k_labels(scores, k=k, where=np.isfinite(scores)).astype(np.float32)
    labels = {**data.cascade.labels, CHOSEN: np.where(data.cascade.rows > 0, best, np.float32(np.nan))}
    return dataclasses.replace(data, cascade=dataclasses.replace(data.cascade, labels=labels))


class Held(NamedTuple):
    """Requests of a slice with all their candidates."""

    positions: np.ndarray
    lists: CandidateLists
    ranker: np.ndarray  # [R, C] the ranker's score of every candidate
    label: np.ndarray  # [R, C] clicks, NaN where it was not shown

    @classmethod
    def of(cls, data: Dataset, task: Any, span: tuple[int, int | None]) -> Held:
        """Return requests of a span of time."""
        positions = task.positions(data, min_history=1, since=span[0], before=span[1])
        lists = aif.data.logged(data)(positions, BatchKey(0, 0, 0))
        assert isinstance(lists.labels, dict)
        return cls(positions, lists, lists.labels[WHOLE], lists.labels[CLICK])

    def figures(self, scores: np.ndarray, k: int) -> dict[str, float]:
        """Return Recall of the ranker's best, and AUC of clicks where shown, of one order."""
        where, known = self.lists.rows > 0, ~np.isnan(self.label)
        return {
            "ranker_recall100": metrics.ranker_recall_at_k(scores, self.ranker, k=k, where=where).value,
            "auc": metrics.auc(scores, np.nan_to_num(self.label), where=where & known),
        }


if __name__ == "__main__":
    main()
