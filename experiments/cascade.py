"""What pre-ranking is for: the ranker's choice, calibrated scores, several objectives, a diverse cut.

Claims    Training on the ranker's scores raises the share of its top 100 in ours (ranker recall@100) by at least 5 points over
          plain binary cross-entropy on what was shown, at equal AUC of clicks (`ranker_recall100_gain`, points). After
          calibration predicted over observed is within 3 % in every decile, under 15 sampled negatives and under logQ
          (`calibration_max_rel_error`, the worse of the two). Four objectives cost at most 1.1 times the critical path of one
          (`critical_ratio_t4_over_t1`), the group cap at most 0.1 ms at C=1,000 (`group_cap_ms`).
Command   python -m experiments.cascade                 (or --smoke, --json FILE, --quality, --speed; --help lists all)
Data      the synthetic world and a cascade over it, `experiments/datasets/cascade.py`; --recflow DIR trains and evaluates on
          days of RecFlow in its place (recall against the ranker's logged order).
Protocol  split by time; the same lists, steps and optimizer for both losses; requests of the last 10 % are evaluated once, on
          all their candidates. Calibration is fitted on shown lists of the validation slice (the isotonic form; the logistic
          one is reported next to it) and checked on the test slice; observed is the mean of the true probability of what is in
          a decile, because clicks by themselves are too noisy for 3 %.
Time      about 5 minutes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import aif_jax as aif
from aif_jax import calibration, metrics, train
from aif_jax.blocks import DotProduct
from aif_jax.data.candidates import Draw, SourceFn
from aif_jax.data.cascade import STAGE, STAGES
from aif_jax.data.dataset import Dataset
from aif_jax.data.sampling import NegativeSampler, counts_before
from aif_jax.data.split import eligible, request_starts, split_by_time, time_cuts
from aif_jax.serving.diversity import capped_top_k
from aif_jax.serving.programs import COMPILER_OPTIONS
from aif_jax.train.evaluate import list_scores
from aif_jax.train.goals import Goal, Goals
from aif_jax.train.losses import distill_listwise, listwise_softmax, pointwise_bce
from experiments import common
from experiments.datasets.cascade import WHOLE, synthetic_cascade
from experiments.datasets.recflow import recflow
from experiments.datasets.synthetic import CLICK, World, synthetic_world

TARGETS = {
    "ranker_recall100_gain": 5.0,
    "calibration_max_rel_error": 0.03,
    "critical_ratio_t4_over_t1": 1.1,
    "group_cap_ms": 0.1,
}
COUNTS = {"exposed": 10, "ranked": 30, "pre_ranked": 10, "retrieved": 30}
OBJECTIVES = ("click", "long_view|click", "like", "share|click")
CAP_K, CAP_CANDIDATES, CAP_MOST = 100, 1000, 3


def main(arguments: list[str] | None = None) -> None:
    """Runs the parts that are asked for, all by default, and prints their figures."""
    options = parse(arguments)
    began, figures = time.perf_counter(), {}
    both = options.quality == options.speed
    if options.quality or both:
        world = synthetic_world(options.seed, **options.world)
        if options.recflow is None:
            made = synthetic_cascade(world, requests=options.requests, candidates=options.candidates, ranked=options.ranked)
            figures |= consistency(made.dataset, "click", WHOLE, options)
        else:
            figures |= consistency(recflow(options.recflow, days=options.days), "effective_view", "ranker", options)
        figures |= calibrations(world, options)
    if options.speed or both:
        figures |= speed(options)
    rows = [[name, figures[name], target] for name, target in TARGETS.items() if name in figures]
    print("\n" + common.table(rows, ["figure", "measured", "goal"]))
    rest = [[name, value] for name, value in figures.items() if name not in TARGETS and isinstance(value, float)]
    print("\n" + common.table(rest, ["figure", "measured"]))
    print(f"done in {time.perf_counter() - began:.0f} s")
    common.write_json(options.json, figures | {"seconds": time.perf_counter() - began})


def parse(arguments: list[str] | None):
    """The command line; unset sizes depend on --smoke."""
    parser = common.parser(__doc__)
    parser.add_argument("--quality", action="store_true", help="the ranker's choice and calibration alone")
    parser.add_argument("--speed", action="store_true", help="critical path and group cap alone")
    parser.add_argument("--recflow", metavar="DIR", type=Path, help="a folder with RecFlow's files")
    parser.add_argument("--days", nargs="*", help="days of RecFlow to read (default all)")
    parser.add_argument("--epochs", type=int, help="passes over the requests (default 4; smoke 1)")
    parser.add_argument("--batch-size", type=int, help="requests a step (default 128; smoke 32)")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 300; smoke 5)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--figures", metavar="DIR", type=Path, default=Path("."), help="where the picture goes (default .)")
    options = parser.parse_args(arguments)
    smoke = options.smoke
    options.world = dict(users=40, items=120, topics=12, categories=8, events_per_user=60, lag=8, content_dim=12)
    options.world = options.world if smoke else dict(users=600, items=2000, events_per_user=200, lag=32)
    options.requests, options.candidates, options.ranked = (160, 60, 20) if smoke else (6000, 400, 150)
    options.epochs = options.epochs or (1 if smoke else 4)
    options.rounds = options.rounds or (5 if smoke else 300)
    options.k = 10 if smoke else 100
    options.batch_size = options.batch_size or (32 if smoke else 128)
    tiny = dict(width=8, towers=(16,), head=(16, 8), short_length=8, long_length=8, sequence=False, blocks=(DotProduct(),))
    options.model = tiny if smoke else dict(long_length=128)
    return options


# the ranker's choice


def consistency(data: Dataset, label: str, truth: str, options) -> dict[str, Any]:
    """Figures of requests of the test slice, trained with and without the ranker's scores."""
    assert data.cascade is not None
    model = aif.build(aif.presets.aif(data.schema, objectives=(label,), **options.model))
    plain = Goals(Goal(pointwise_bce, label))
    ways = {
        "bce": plain,
        "consistent": Goals(
            *plain.goals,
            Goal(distill_listwise, "ranker"),
            Goal(0.5 * train.pairwise_ndcg(k=options.k), "ranker"),
            Goal(0.2 * train.margin_info_nce(margin=0.5), STAGE),
        ),
    }
    task = train.Cascaded(**COUNTS)
    figures: dict[str, Any] = {"requests": len(data.cascade)}
    for name, loss in ways.items():
        run = aif.fit(
            model, data, task=task, loss=loss, epochs=options.epochs, batch_size=options.batch_size, seed=options.seed, k=None,
            requests=300, keep_best="auc",
        )  # fmt: skip
        _, test = time_cuts(data.log)
        at = task.positions(data, min_history=1, since=test, before=None)
        lists = aif.data.logged(data)(at, Draw(0, 0, 0))
        assert isinstance(lists.labels, dict)
        scores = list_scores(run.model, run.params, data, at, lists, batch_size=16)
        where, known = lists.rows > 0, ~np.isnan(lists.labels[label])
        clicked = np.nan_to_num(lists.labels[label])
        stages = metrics.hit_rate_by_stage(scores, lists.labels[STAGE].astype(int), k=options.k, names=STAGES[:3], where=where)
        figures |= {
            f"ranker_recall100_{name}": metrics.ranker_recall_at_k(scores, lists.labels[truth], k=options.k, where=where).value,
            f"order_agreement_{name}": metrics.order_agreement(scores, lists.labels[truth], where=where).value,
            f"auc_{name}": metrics.auc(scores, clicked, where=where & known),
            **{f"hr_{stage}_{name}": value.value for stage, value in stages.items()},
        }
    figures["ranker_recall100_gain"] = 100 * (figures["ranker_recall100_consistent"] - figures["ranker_recall100_bce"])
    figures["auc_difference"] = figures["auc_consistent"] - figures["auc_bce"]
    return figures


# calibration


def calibrations(world: World, options) -> dict[str, Any]:
    """The worst decile of calibrated clicks, for models of clicked items among sampled ones, with and without logQ."""
    data = world.dataset
    parts = split_by_time(data.log)
    first, _ = time_cuts(data.log)
    # with popularity itself as the sampler the best score of a next item is its lift, up to a constant: that of a click too
    sampler = NegativeSampler(counts_before(data, first), power=1.0)
    config = aif.presets.aif(data.schema, **options.model)
    figures: dict[str, Any] = {}
    series: dict[str, metrics.Deciles] = {}
    for name, corrected in (("sampled", False), ("logq", True)):
        model = aif.build(config)
        source = aif.data.sampled(data, sampler=sampler, negatives=15, corrected=corrected)
        params = _trained(model, data, eligible(data.log, parts.train, min_history=1), source, options)
        shown = aif.data.impressed(data, candidates=1, threshold=CLICK)
        held = [request_starts(data.log, min_history=1, since=since, before=before) for since, before in _slices(data)]
        lists = shown(held[1], Draw(0, 0, 0))
        scores = list_scores(model, params, data, held[1], lists)
        truth = world.click_probability(held[1], lists.rows)
        raw = deciles(scores, truth)
        series[f"{name}, raw"] = raw
        figures[f"calibration_raw_{name}"] = raw.worst
        for form in ("logistic", "isotonic"):
            fitted = train.calibrate(model, params, data, held[0], candidates=shown, calibrated=None, form=form)
            made = deciles(np.asarray(calibration.calibrated(fitted, scores)), truth)
            figures[f"calibration_{form}_{name}"] = made.worst
            series[f"{name}, {form}"] = made
    figures["calibration_max_rel_error"] = max(figures[f"calibration_isotonic_{name}"] for name in ("sampled", "logq"))
    options.figures.mkdir(parents=True, exist_ok=True)
    metrics.plot_deciles(series, options.figures / "cascade_calibration.png", title="clicks by decile, test slice")
    return figures


def deciles(logits: np.ndarray, truth: np.ndarray) -> metrics.Deciles:
    """Predicted against the mean of the true probability, by decile of the prediction."""
    predicted, truth = 1 / (1 + np.exp(-logits.ravel().astype(np.float64))), truth.ravel()
    parts = np.array_split(np.argsort(predicted, kind="stable"), 10)
    means = [tuple(float(values[part].mean()) for part in parts) for values in (predicted, truth)]
    return metrics.Deciles(*means, tuple(float(len(part)) for part in parts))


def _slices(data: Dataset) -> tuple[tuple[int, int | None], ...]:
    validation, test = time_cuts(data.log)
    return (validation, test), (test, None)


def _trained(model: aif.PreRanker, data: Dataset, positions: np.ndarray, source: SourceFn, options) -> aif.types.Params:
    """Parameters after one pass over the clicked events of the training slice."""
    clicked = positions[data.log.action[positions] == CLICK]
    given: dict[str, Any] = dict(config=model.config, batch_size=2 * options.batch_size, seed=options.seed)
    feed = aif.data.Pipeline(dataset=data, positions=clicked, candidates=source, **given)
    optimizer = train.default_optimizer(len(feed), learning_rate=3e-3, weight_decay=1e-5)
    step = train.make_step(model, optimizer, loss=listwise_softmax + pointwise_bce)
    state = train.init_state(model.init(jax.random.key(options.seed), data.catalogue), optimizer)
    with aif.data.to_device(feed.batches()) as batches:
        return train.loop(state, step, batches, total=len(feed)).params


# speed


def speed(options) -> dict[str, Any]:
    """Milliseconds of the interaction with one and with four objectives, and of the cut with and without a cap."""
    world = synthetic_world(options.seed, users=20, items=1200, topics=40, categories=20, events_per_user=80, lag=8)
    data, rng = world.dataset, np.random.default_rng(0)
    rows = rng.integers(1, len(data.catalogue), CAP_CANDIDATES)
    compiled = {f"t{len(names) or 1}": _critical(data, names, rows, options) for names in ((), OBJECTIVES)}
    values = jax.device_put(rng.normal(size=CAP_CANDIDATES).astype(np.float32))
    groups = jax.device_put(rng.integers(0, 200, CAP_CANDIDATES).astype(np.float32))
    few = jax.device_put(rng.integers(0, 20, CAP_CANDIDATES).astype(np.float32))
    plain = _compiled(lambda v, g: jax.lax.top_k(v, CAP_K), values, groups)
    capped = _compiled(lambda v, g: capped_top_k(v, g, CAP_K, CAP_MOST), values, groups)
    cuts = {"top_k": lambda: plain(values, groups), "capped": lambda: capped(values, groups)}
    cuts["sorted"] = lambda: capped(values, few)
    times = common.interleaved({name: _timed(call) for name, call in (compiled | cuts).items()}, options.rounds + 3)
    p50 = {name: float(np.median(values[3:])) for name, values in times.items()}
    return {
        "critical_ratio_t4_over_t1": p50["t4"] / p50["t1"],
        "group_cap_ms": p50["capped"] - p50["top_k"],
        "group_cap_few_groups_ms": p50["sorted"] - p50["top_k"],
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
        return jax.lax.top_k(value, CAP_K)

    given = params, state, table, jnp.asarray(rows)
    function = _compiled(answer, *given)
    return lambda: function(*given)


def _compiled(function: Any, *given: Any) -> Any:
    return jax.jit(function).lower(*given).compile(COMPILER_OPTIONS.get(jax.default_backend()))


def _timed(call: Any) -> Any:
    def once(_: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return (time.perf_counter() - start) * 1e3

    return once


if __name__ == "__main__":
    main()
