"""What pre-ranking is for: the ranker's choice, calibrated scores, several objectives.

Claims    Training on the ranker's scores raises the share of its top 100 in ours (ranker recall@100) by at least 5 points over
          plain binary cross-entropy on what was shown, at equal AUC of clicks (`ranker_recall100_gain`, points). After
          calibration predicted over observed is within 3 % in every decile, under 15 sampled negatives and under logQ
          (`calibration_max_rel_error`, the worse of the two). Four objectives cost at most 1.1 times the critical path of one
          (`critical_ratio_t4_over_t1`).
Command   python -m experiments.cascade                 (or --smoke, --json FILE, --quality, --speed; --help lists all)
Data      the synthetic world and a cascade over it, `experiments/datasets/cascade.py`; --recflow DIR trains and evaluates on
          days of RecFlow in its place (recall against the ranker's logged order).
What is   One logit cannot do both: the ranker shows what has many clicks or much quality, so among the shown the two are
compared  opposed, and the ranker's own order has an AUC of clicks of 0.56 where the truth has 0.71. So the ranker's choice is a
          second objective, and requests are served by `p["click"] * p["chosen"] ** weight`. Recall and AUC are of the same
          order; AUC is of clicks on what was shown, `auc_all` of clicks drawn from the truth for every candidate, which no
          log has. The weight is the largest of `WEIGHTS` whose AUC on the validation slice is at most `EQUAL` below plain
          cross-entropy's; the frontier of all weights is drawn in cascade_frontier.png.
Protocol  split by time; the same lists, steps and optimizer for both losses; requests of the last 10 % are evaluated once, on
          all their candidates; three seeds, each with another world. Calibration is fitted on lists shown in the
          validation slice and checked on the test slice: all requests,
          1.3 million items each, because the standard error of a decile of n with rate p, sqrt((1 - p) / (p n)), must be below
          3 % where it is fitted too. Observed is the mean of the true probability of what is in a decile;
          `calibration_clicks_*` is against drawn clicks, `standard_errors_*` are theirs.
Needs     Three things are needed for 3 %. Histories grow in this world, by a tenth from validation to test, and what a score
          means depends on their length: the models read whole histories, and requests of the validation slice are weighed so
          that their lengths are those of the test slice, whose labels are not read (`calibration_no_weights_*` is without).
          Under logQ a score holds the log of popularity, which clicks on what is shown do not follow, so they even fall where
          it rises: an `ItemOffset` takes it off.
Time      286 s a seed with other load on the machine, about 5 minutes of CPU; on an idle one not known.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import aif_jax as aif
from aif_jax import Dataset, metrics, train
from aif_jax import scores as aif_scores
from aif_jax.blocks import DotProduct, popularity_offset, with_item_offset
from aif_jax.data.candidates import CandidateLists, NegativeSampler, SampleKey, SourceFn, counts_before
from aif_jax.data.cascade import STAGE, STAGES
from aif_jax.data.split import eligible, request_starts, split_by_time, time_cuts
from aif_jax.train.edits import calibration, platt
from aif_jax.train.evaluate import list_scores
from aif_jax.train.losses import distill_listwise, lists, listwise_softmax, pointwise_bce, term
from aif_jax.train.tasks import Goal, Goals
from aif_jax.types import Params
from experiments import common
from experiments.datasets.cascade import WHOLE, synthetic_cascade
from experiments.datasets.recflow import recflow
from experiments.datasets.synthetic import CLICK, SMALL, World, synthetic_world
from experiments.services import compiled

TARGETS = {
    "ranker_recall100_gain": 5.0,
    "calibration_max_rel_error": 0.03,
    "critical_ratio_t4_over_t1": 1.1,
}
COUNTS = {"exposed": 10, "ranked": 30, "pre_ranked": 10, "retrieved": 30}
CHOSEN = "chosen"
"""Label and objective: whether the ranker puts a candidate among its best k."""
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
"""Of the ranker's choice in the order `p["click"] * p["chosen"] ** weight`."""
EQUAL = 0.005
"""AUC on the validation slice that counts as equal: below its standard error there, 0.007 with 6,000 labels."""
OBJECTIVES = ("click", "long_view|click", "like", "share|click")
K, CANDIDATES = 100, 1000


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Runs the parts that are asked for, all by default, and prints their figures."""
    options = parse(arguments)
    began, figures = time.perf_counter(), {}
    both = options.quality == options.speed
    if options.quality or both:
        parts = [quality(seed, options) for seed in options.seeds]
        figures |= over_seeds(parts)
        figures["calibration_max_rel_error"] = max(part["calibration_max_rel_error"] for part in parts)
        plot_frontier(figures, options.k, options.figures / "cascade_frontier.png")
    if options.speed or both:
        figures |= speed(options)
    rows = [[name, figures[name], target] for name, target in TARGETS.items() if name in figures]
    print("\n" + common.table(rows, ["figure", "measured", "goal"]))
    common.report(figures | {"seconds": time.perf_counter() - began}, options.json, hidden=("seeds",))


def quality(seed: int, options) -> dict[str, Any]:
    """Figures of one world and training."""
    world = synthetic_world(seed, **options.world)
    sizes = dict(requests=options.requests, candidates=options.candidates, ranked=options.ranked)
    if options.recflow is None:
        made = synthetic_cascade(world, **sizes, seed=seed)
        figures = consistency(made.dataset, "click", WHOLE, options, seed, made.click)
    else:
        days = None if options.days == ["all"] else options.days
        figures = consistency(recflow(options.recflow, days=days), "effective_view", "ranker", options, seed)
    print(f"seed {seed}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items() if isinstance(v, float)), flush=True)
    figures |= calibrations(world, options, seed)
    print(f"seed {seed}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items() if k.startswith("cal")), flush=True)
    return figures


def over_seeds(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, the sample deviation under NAME_sd, and every seed under "seeds"."""
    made: dict[str, Any] = {"seeds": parts}
    for name in parts[0]:
        values = np.asarray([part[name] for part in parts], np.float64)
        made[name] = values.mean(0).tolist()
        if values.ndim == 1 and len(values) > 1:
            made[f"{name}_sd"] = float(values.std(ddof=1))
    return made


def plot_calibration(series: dict[str, metrics.Deciles], path: Path) -> None:
    """Predicted over observed clicks by tenth of the prediction."""
    with common.picture(path, size=(6, 4.5), dpi=130) as (_, axis):
        axis.axhline(1, color="0.7", linestyle="--")
        for name, made in series.items():
            axis.plot(np.divide(made.predicted, made.observed), marker="o", label=name)
        axis.set(xlabel="tenth of the prediction", ylabel="predicted / observed", ylim=(0, 2), title="clicks, test slice")
        axis.legend()


def plot_frontier(figures: dict[str, Any], k: int, path: Path) -> None:
    """Ranker recall against AUC by the weight of the ranker's choice, and the model without it."""
    weights, recall, auc = zip(*figures["frontier"], strict=True)
    with common.picture(path, size=(5, 4), dpi=130) as (_, axis):
        axis.plot(auc, recall, marker="o", label="p[click] * p[chosen] ** weight, by weight")
        for place in zip(weights, auc, recall, strict=True):
            axis.annotate(f"{place[0]:g}", place[1:], textcoords="offset points", xytext=(4, 4), fontsize=8)
        shown = "cross-entropy on what was shown"
        axis.plot(figures["auc_bce"], figures["ranker_recall100_bce"], "s", color="0.3", label=shown)
        axis.set(xlabel="AUC of clicks on what was shown", ylabel=f"ranker recall@{k}")
        axis.set_title("the ranker's choice against clicks, mean over seeds")
        axis.legend()


def parse(arguments: list[str] | None):
    """The command line, and the sizes of worlds and models."""
    settings = {
        "quality": (False, None, "the ranker's choice and calibration alone"),
        "speed": (False, None, "the critical path alone"),
        "days": (["all"], None, "days of RecFlow to read"),
        "epochs": (4, 1, "passes over the requests"),
        "batch_size": (128, 32, "requests a step"),
        "rounds": (300, 5, "timed rounds"),
        "seeds": ([0, 1, 2], [2], "worlds and trainings"),
        "figures": (Path("."), None, "where the pictures go"),
    }
    options = common.options(__doc__, arguments, settings, recflow="a folder with RecFlow's files")
    smoke = options.smoke
    options.world = SMALL if smoke else dict(users=600, items=2000, events_per_user=200, lag=32)
    options.shown_requests, options.shown, options.passes = (150, 20, 4) if smoke else (20_000, 128, 1)
    options.history = 8 if smoke else options.world["events_per_user"]
    options.requests, options.candidates, options.ranked = (160, 60, 20) if smoke else (6000, 400, 150)
    options.k = 10 if smoke else 100
    tiny = dict(width=8, towers=(16,), head=(16, 8), short_length=8, long_length=8, sequence=False, blocks=(DotProduct(),))
    options.model = tiny if smoke else dict(long_length=128)
    return options


# the ranker's choice


def consistency(data: Dataset, label: str, truth: str, options, seed: int, click: np.ndarray | None = None) -> dict[str, Any]:
    """Figures of requests of the test slice, trained with and without the ranker's scores.

    Args:
      data: with a cascade whose label "ranker" is the ranker's score.
      label: the objective that is the same in both trainings; `truth` the label with the ranker's score for every candidate.
      options: of the command line; `seed` of training.
      click: true probabilities of the label [R, M], where they are known, for its AUC over all candidates.
    """
    data = with_choice(data, options.k)
    task = train.Cascaded(**COUNTS)
    plain = Goal(pointwise_bce, label)
    agreement = (
        Goal(distill_listwise, "ranker", objective=CHOSEN),
        Goal(0.5 * pairwise_ndcg(k=options.k), "ranker", objective=CHOSEN),
        Goal(0.2 * margin_info_nce(margin=0.5), STAGE, objective=CHOSEN),
        Goal(pointwise_bce, CHOSEN),
    )
    ways = {"bce": ((label,), Goals(plain)), "consistent": ((label, CHOSEN), Goals(plain, *agreement))}
    slices = _slices(data)
    held = {split: Held.of(data, task, label, truth, span, click) for split, span in slices.items()}
    moments: dict[str, Any] = {split: np.datetime64(since, "s") for split, (since, _) in slices.items()}
    scored: dict[str, dict[str, np.ndarray]] = {}
    for name, (objectives, loss) in ways.items():
        model = aif.build(aif.presets.aif(data.schema, objectives=objectives, **options.model))
        run = aif.fit(
            model, data, task=task, loss=loss, learning_rate=3e-3, weight_decay=1e-5, epochs=options.epochs,
            batch_size=options.batch_size, seed=seed, k=None, requests=300, keep_best="auc", **moments,
        )  # fmt: skip
        scored[name] = {
            split: list_scores(run.model, run.params, data, part.positions, part.lists, batch_size=16)
            for split, part in held.items()
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
    figures: dict[str, Any] = {f"{key}_bce": value for key, value in bce.items()}
    figures |= {f"{key}_consistent": value for key, value in best.items()}
    alone = held["test"].figures(scored["consistent"]["test"][..., 1], options.k)
    figures |= {f"{key}_ranker_logit": alone[key] for key in ("ranker_recall100", "auc")}
    return figures | {
        "ranker_recall100_gain": 100 * (best["ranker_recall100"] - bce["ranker_recall100"]),
        "auc_difference": best["auc"] - bce["auc"],
        "weight": weight,
        "requests": len(held["test"].positions),
        "frontier": [[w, made["ranker_recall100"], made["auc"]] for w, made in frontier["test"].items()],
    }


@term(lists, targets="teacher_scores")
def pairwise_ndcg(
    scores: jax.Array, teacher_scores: jax.Array, where: jax.Array, log_q: jax.Array, *, k: int = 100
) -> jax.Array:
    """Pairs in the ranker's order, weighed by what NDCG@k loses if they swap places (LambdaRank's weights, Burges 2010).

    sum over pairs i above j of |G_i - G_j| |D_i - D_j| log(1 + exp(s_j - s_i)) / sum of the same weights, with
    G_i = 2^(-r_i / k) and D_i = 1 / log2(2 + r_i) for the ranker's ranks r_i < k, 0 from k on. C^2 pairs a list.
    """
    above = (teacher_scores[..., :, None] > teacher_scores[..., None, :]) & where[..., :, None] & where[..., None, :]
    rank = jnp.sum(above, axis=-2).astype(scores.dtype)  # how many the ranker has above
    gain, discount = (jnp.where((rank < k) & where, each, 0.0) for each in (jnp.exp2(-rank / k), 1 / jnp.log2(2 + rank)))
    change = jnp.abs(gain[..., :, None] - gain[..., None, :]) * jnp.abs(discount[..., :, None] - discount[..., None, :])
    weight = jnp.where(above, change, 0.0)
    total = jnp.sum(weight, axis=(-1, -2))
    lost = jnp.sum(weight * jax.nn.softplus(scores[..., None, :] - scores[..., :, None]), axis=(-1, -2))
    return lost / jnp.where(total > 0, total, 1.0)


@term(lists, targets="stages")
def margin_info_nce(
    scores: jax.Array, stages: jax.Array, where: jax.Array, log_q: jax.Array, *, margin: float = 0.0
) -> jax.Array:
    """Every candidate against all that came less far (InfoNCE, arXiv 1807.03748, with an additive margin, arXiv 1801.05599).

    -log( e^(s_i - m) / (e^(s_i - m) + sum over j of a later stage of e^s_j) ), the mean over the candidates of a list.
    """
    behind = (stages[..., None, :] > stages[..., :, None]) & where[..., None, :] & where[..., :, None]
    others, own = jnp.where(behind, scores[..., None, :], -1e30), scores - margin
    lost = jnp.where(jnp.any(behind, axis=-1), jnp.logaddexp(own, jax.nn.logsumexp(others, axis=-1)) - own, 0.0)
    return jnp.sum(lost, axis=-1) / jnp.maximum(jnp.sum(jnp.any(behind, axis=-1), axis=-1), 1).astype(lost.dtype)


def served(logits: np.ndarray, weight: float) -> np.ndarray:
    """What the order `p[LABEL] * p["chosen"] ** weight` ranks by, as a logarithm [R, C], from logits [R, C, 2]."""
    label, chosen = (-np.logaddexp(0, -logits[..., place].astype(np.float64)) for place in range(2))
    return label + weight * chosen


def with_choice(data: Dataset, k: int) -> Dataset:
    """The same with the label "chosen": 1 for the k candidates that the ranker scored highest, 0 for the others."""
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
    label: np.ndarray  # [R, C] NaN where it was not shown
    found: np.ndarray | None  # [R, C] the label drawn from its true probability, of every candidate

    @classmethod
    def of(
        cls, data: Dataset, task: Any, label: str, truth: str, span: tuple[int, int | None], click: np.ndarray | None
    ) -> Held:
        """Requests of a span of time."""
        positions = task.positions(data, min_history=1, since=span[0], before=span[1])
        lists = aif.data.logged(data)(positions, SampleKey(0, 0, 0))
        assert data.cascade is not None and isinstance(lists.labels, dict)
        found = None
        if click is not None:
            chance = click[data.cascade.at(positions)]
            found = (np.random.default_rng(0).random(chance.shape) < chance).astype(np.float64)
        return cls(positions, lists, lists.labels[truth], lists.labels[label], found)

    def figures(self, scores: np.ndarray, k: int) -> dict[str, float]:
        """Recall of the ranker's best, AUC of the label where shown (and over all candidates), HR@k by stage, of one order."""
        assert isinstance(self.lists.labels, dict)
        where, known = self.lists.rows > 0, ~np.isnan(self.label)
        stages = metrics.hit_rate_by_stage(scores, self.lists.labels[STAGE].astype(int), k=k, names=STAGES[:3], where=where)
        made = {
            "ranker_recall100": metrics.ranker_recall_at_k(scores, self.ranker, k=k, where=where).value,
            "auc": metrics.auc(scores, np.nan_to_num(self.label), where=where & known),
            **{f"hr_{stage}": value.value for stage, value in stages.items()},
        }
        return made if self.found is None else made | {"auc_all": metrics.auc(scores, self.found, where=where)}


# calibration


def calibrations(world: World, options, seed: int) -> dict[str, Any]:
    """The worst decile of calibrated clicks, for models of clicked items among sampled ones, with and without logQ."""
    data = world.dataset
    parts, slices = split_by_time(data.log), _slices(data)
    # with popularity itself as the sampler the best score of a next item is its lift, up to a constant: that of a click too
    counts = counts_before(data, slices["validation"][0])
    sampler = NegativeSampler(counts, power=1.0)
    config = aif.presets.aif(data.schema, **options.model | {"long_length": options.history})
    shown = {split: impressions(world, span, options, seed) for split, span in slices.items()}
    at, fitted_on, _ = shown["validation"]
    positions, lists, chance = shown["test"]
    weights = like(*(data.log.history_end(p) - data.log.offsets[data.log.user[p]] for p in (at, positions)))
    figures: dict[str, Any] = {"impressions": lists.rows.size}
    series: dict[str, metrics.Deciles] = {}
    for name, corrected in (("sampled", False), ("logq", True)):
        model = aif.build(config)
        source = aif.data.sampled_negatives(data, sampler=sampler, negatives=15, logq_correction=corrected)
        params = _trained(model, data, eligible(data.log, parts.train, min_history=1), source, options, seed)
        scores, held = (list_scores(model, params, data, *part) for part in ((positions, lists), (at, fitted_on)))
        figures[f"calibration_raw_{name}"] = deciles(scores, chance).worst
        if corrected:
            offset = -popularity_offset(counts, power=1.0, untrained=None)
            params, shifted = with_item_offset(params, offset, config=config)
            model, scores, held = aif.build(shifted), scores + offset[lists.rows], held + offset[fitted_on.rows]
        figures[f"calibration_no_weights_{name}"] = after((held, fitted_on.labels, np.ones(len(at))), scores, chance).worst
        edit = calibration(lambda _: (at, lambda *_: fitted_on), calibration_negatives=None, weights=weights)
        logits = aif_scores.calibrated(edit(aif.Trained(model, params, data.encoder), data).params, scores, np)
        made, clicks = deciles(logits, chance), metrics.deciles(logits, np.asarray(lists.labels))
        series[name], figures[f"calibration_{name}"] = made, made.worst
        figures[f"calibration_clicks_{name}"] = clicks.worst
        errors = [deviation / observed for deviation, observed in zip(clicks.deviations, clicks.observed, strict=True)]
        figures[f"standard_errors_{name}"] = errors
        figures[f"standard_error_{name}"] = max(errors)
    figures["calibration_max_rel_error"] = max(figures[f"calibration_{name}"] for name in ("sampled", "logq"))
    options.figures.mkdir(parents=True, exist_ok=True)
    plot_calibration(series, options.figures / "cascade_calibration.png")
    return figures


def after(held: tuple[Any, Any, np.ndarray], scores: np.ndarray, truth: np.ndarray) -> metrics.Deciles:
    """Deciles of scores [R, C] after a calibration on held-out scores, labels and weights of requests."""
    scale, bias = platt(held[0], held[1], weights=held[2][:, None])
    return deciles(scores * scale + bias, truth)


def like(lengths: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Weights of requests with histories of some `lengths`, so that each tenth of the `wanted` lengths weighs the same."""
    edges = np.quantile(wanted, np.arange(0.1, 0.95, 0.1))
    counts, goal = (np.bincount(np.searchsorted(edges, values), minlength=10) for values in (lengths, wanted))
    return (goal / np.maximum(counts, 1))[np.searchsorted(edges, lengths)]


def impressions(
    world: World, span: tuple[int, int | None], options, seed: int
) -> tuple[np.ndarray, CandidateLists, np.ndarray]:
    """Requests of a slice, what was shown to each with clicks drawn from the truth, and the true probabilities [R, C].

    Retrieval finds twice as many items, half by popularity and half among the user's earlier ones; shown is the half with the
    highest log P(click) + noise.
    """
    data, rng = world.dataset, np.random.default_rng((seed, *(bound or 0 for bound in span)))
    log = data.log
    positions = request_starts(log, min_history=1, since=span[0], before=span[1])
    positions = np.sort(rng.choice(positions, min(options.shown_requests, len(positions)), replace=False))
    count, first = options.shown, log.offsets[log.user[positions]][:, None]
    length = log.history_end(positions)[:, None] - first
    known = log.item[first + (rng.random((len(positions), count)) * length).astype(np.int64)]
    popular = rng.choice(len(data.catalogue), (len(positions), count), p=world.popularity)
    rows = np.concatenate([known, popular], axis=1).astype(np.int32)
    chance = world.click_probability(positions, rows)
    best = np.argsort(-(np.log(chance) + rng.gumbel(size=rows.shape)), axis=1)[:, :count]
    rows, chance = (np.take_along_axis(values, best, 1) for values in (rows, chance))
    return positions, CandidateLists(rows, (rng.random(rows.shape) < chance).astype(np.float32)), chance


def deciles(logits: np.ndarray, truth: np.ndarray) -> metrics.Deciles:
    """Predicted against the mean of the true probability, by decile of the prediction."""
    predicted, truth = 1 / (1 + np.exp(-logits.ravel().astype(np.float64))), truth.ravel()
    parts = np.array_split(np.argsort(predicted, kind="stable"), 10)
    mean, observed = (tuple(float(values[part].mean()) for part in parts) for values in (predicted, truth))
    return metrics.Deciles(mean, observed, tuple(float(len(part)) for part in parts))


def _slices(data: Dataset) -> dict[str, tuple[int, int | None]]:
    validation, test = time_cuts(data.log)
    return {"validation": (validation, test), "test": (test, None)}


def _trained(model: aif.PreRanker, data: Dataset, positions: np.ndarray, source: SourceFn, options, seed: int) -> Params:
    """Parameters after `options.passes` over the clicked events of the training slice."""
    clicked = positions[data.log.action[positions] == CLICK]
    given: dict[str, Any] = dict(config=model.config, batch_size=2 * options.batch_size, seed=seed)
    feed = aif.data.Pipeline(dataset=data, positions=clicked, candidates=source, epochs=options.passes, **given)
    optimizer = train.default_optimizer(len(feed), learning_rate=3e-3, weight_decay=1e-5)
    step = train.make_step(model, optimizer, loss=listwise_softmax + pointwise_bce)
    state = train.init_state(model.init(jax.random.key(seed), data.catalogue), optimizer)
    with aif.data.to_device(feed.batches()) as batches:
        return train.loop(state, step, batches, total=len(feed)).params


# speed


def speed(options) -> dict[str, Any]:
    """Milliseconds of the interaction with one and with four objectives."""
    world = synthetic_world(0, users=20, items=1200, topics=40, categories=20, events_per_user=80, lag=8)
    data, rng = world.dataset, np.random.default_rng(0)
    rows = rng.integers(1, len(data.catalogue), CANDIDATES)
    ways = {f"t{len(names) or 1}": _critical(data, names, rows, options) for names in ((), OBJECTIVES)}
    p50 = common.medians(ways, options.rounds, warm=3)
    return {
        "critical_ratio_t4_over_t1": p50["t4"] / p50["t1"],
        **{f"{name}_ms": value for name, value in p50.items()},
    }


def _critical(data: Dataset, names: tuple[str, ...], rows: np.ndarray, options) -> Any:
    """Gather, interaction, score and top-k of 1,000 candidates, compiled as the engine compiles."""
    config = aif.presets.aif(data.schema, objectives=names, **options.model)
    model = aif.build(config)
    params = model.init(jax.random.key(0), data.catalogue)
    users = data.user_features([len(data.log) - 1], length=config.history_length)
    state = jax.jit(model.user)(params, jax.tree.map(lambda leaf: leaf[0], users))
    table = jax.jit(jax.vmap(model.item, (None, 0)))(params, data.catalogue.features(np.arange(len(data.catalogue))))

    def answer(params, state, table, rows):
        logits = model.interaction(params, state, jax.tree.map(lambda leaf: leaf[rows], table))
        p = jax.nn.sigmoid(logits)
        value = p[:, 0] * p[:, 1] + 0.1 * p[:, 2] + 0.1 * p[:, 0] * p[:, 3] if names else p
        return jax.lax.top_k(value, K)

    return compiled(answer, params, state, table, jnp.asarray(rows))


if __name__ == "__main__":
    main()
