"""The gate: old and new model on the same requests, and the reasons why the new one must not serve.

`measure` runs one model; `judge` is arithmetic on two measurements. Differences are paired by user, see `metrics.intervals`.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from aif_jax import metrics
from aif_jax.checks import Fields, expect_types
from aif_jax.data.candidates import SourceFn
from aif_jax.data.dataset import Dataset
from aif_jax.data.order import BatchKey
from aif_jax.metrics import ByUser, Interval
from aif_jax.refreshing.warm import ROWS, with_served_vocabulary
from aif_jax.scores import GROUP
from aif_jax.store.trained import Trained
from aif_jax.train.evaluate import evaluate, list_scores, rank_catalogue
from aif_jax.train.settings import LOWER_IS_BETTER
from aif_jax.types import Params

OF_PROBABILITIES = ("log_loss", "calibration", "calibration_error")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig(Fields):
    """Bounds beyond which a new model is refused.

    A metric refuses a model that is worse by more than its bound, and significantly: the 95 % interval of the difference, see
    `metrics.user_interval`, excludes 0. A loss that may be chance passes: more users, and it finds smaller losses.

    Attributes:
      gauc: GAUC that may be lost, 0.005 is half a point.
      hit_rate: HR@k that may be lost.
      log_loss: nats that log-loss may grow by; uncalibrated, that of the scores before SVD term and popularity correction.
      calibration: how much the expected calibration error may grow; of the scores of `log_loss`.
      unknown: largest share of the newest events whose item the new model lacks.
      volume: least events a day of the new part, as a share of the days before; half of the files missing is refused.
      users: least users to judge by.
      floor: what GAUC on the newest requests must surely be above, its interval as a whole; 0.5 is a random order.

    Raises ValueError: a bound below 0, a share above 1.
    """

    gauc: float = 0.005
    hit_rate: float = 0.01
    log_loss: float = 0.02
    calibration: float = 0.02
    unknown: float = 0.01
    volume: float = 0.6
    users: int = 100
    floor: float = 0.5

    def __post_init__(self):
        expect_types(self)
        for name, value in vars(self).items():
            self.expect(value >= 0, name, "at least 0")
            self.expect(value <= 1 or name not in ("unknown", "volume", "floor"), name, "a share from 0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requests:
    """Held-out requests that both models answer.

    Attributes:
      data: holds them; of an encoder that knows new users and items.
      positions: int64 [R] events in its log.
      candidates: lists with labels, such as `task.source(data, before=..., held_out=True)`.
      k: k of HR@k in the catalogue; None does not rank it.
      calibration_negatives: candidates after the first that log-loss and calibration are of, see `evaluate`.
    """

    data: Dataset
    positions: np.ndarray
    candidates: SourceFn
    k: int | None = 100
    calibration_negatives: int | None = 15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One model on requests.

    Attributes:
      finite: whether every parameter and score is; without it there is nothing else.
      by_user: metrics by name before they are averaged.
      unknown: share of the events from the first request to the last whose item the model lacks, or the data do.
    """

    finite: bool
    by_user: Mapping[str, ByUser] = dataclasses.field(default_factory=dict, repr=False)
    unknown: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Verdict of the gate.

    Attributes:
      reasons: why the model is refused, a sentence each: what, measured, bound; empty where it passed.
      metrics: by slice and name: values of the new and the old model and the interval of the difference.
    """

    reasons: tuple[str, ...]
    metrics: Mapping[str, Mapping[str, Mapping[str, Any]]] = dataclasses.field(default_factory=dict)


def measure(trained: Trained, requests: Requests) -> Measurement:
    """Run one model on the requests, as it would answer them in service (`with_served_vocabulary`).

    Log-loss and calibration need probabilities: of an uncalibrated model they leave out SVD term and popularity correction.

    Args:
      trained: model whose encoder may lack users and items of the requests.
      requests: the same for both models.

    Raises EncodingMismatch, ValueError: as `with_served_vocabulary` and `evaluate`.
    """
    data, positions, k = requests.data, requests.positions, requests.k
    served = with_served_vocabulary(trained, data.encoder)
    params, lists = served.params, requests.candidates(positions, BatchKey(0, 0, 0))
    scores = list_scores(served.model, params, data, positions, lists.rows)
    if not all(np.isfinite(np.asarray(leaf)).all() for leaf in (scores, *jax.tree.leaves(params))):
        return Measurement(finite=False)
    figures = functools.partial(
        evaluate, served.model, data=data, positions=positions, k=None, candidates=requests.candidates,
        calibration_negatives=requests.calibration_negatives,
    )  # fmt: skip
    by_user = dict(figures(params).by_user)
    if (probable := without_terms(served)) is not params:
        of_training = figures(probable).by_user
        by_user |= {name: of_training[name] for name in OF_PROBABILITIES}
    if k is not None:
        ranks = rank_catalogue(served.model, params, data, positions)
        by_user[f"hr@{k}"] = metrics.mean_by_user(ranks < k, data.log.user[positions])
    time = data.log.time
    item = data.log.item[(time >= time[positions].min()) & (time <= time[positions].max())]  # no request is for row 0
    known = np.asarray(params[ROWS]["item"])[item] if ROWS in params else item
    return Measurement(finite=True, by_user=by_user, unknown=float((known == 0).mean()))


def without_terms(trained: Trained) -> Params:
    """Return parameters whose logits give probabilities: without terms added after training, unless calibrated."""
    params, config = trained.params, trained.config
    terms = [name for name in ("pure_svd", "item_offset") if config.find(name) is not None]
    if GROUP in params.get("fitted", {}) or not terms:
        return params
    return params | {"fitted": params["fitted"] | jax.tree.map(np.zeros_like, {name: params["fitted"][name] for name in terms})}


def judge(
    slices: Mapping[str, tuple[Measurement, Measurement]],
    config: GateConfig = GateConfig(),  # noqa: B008 frozen
    *,
    volume: float | None = None,
) -> Verdict:
    """Return whether a new model may follow the old one: a pure function of measurements.

    Args:
      slices: (new, old) by name on the same requests: first the newest ones, which vocabulary and floor are judged
        on, then an earlier period, which a bad day cannot have spoilt.
      config: bounds.
      volume: events a day of the new part over those before it; None for unknown.
    """
    reasons: list[str] = []
    compared: dict[str, dict[str, dict[str, Any]]] = {}
    for name, (new, old) in slices.items():
        if not new.finite:
            return Verdict(reasons=(f"{name}: the new model has a parameter or a score that is not finite; bound: none",))
        pairs = metrics.paired_intervals(new.by_user, old.by_user) if old.finite else {}
        compared[name] = {
            metric: {"new": new.by_user[metric].mean, "old": old.by_user[metric].mean, "difference": difference}
            for metric, difference in pairs.items()
        }
        reasons += _worse(name, new, compared[name], config)
    name, (new, _) = next(iter(slices.items()))
    gauc = new.by_user.get("gauc")
    if gauc is not None and (own := metrics.user_interval(gauc)).low <= config.floor:
        interval = f"95% interval {own.low:.4f} to {own.high:.4f}"
        reasons.append(f"{name}: gauc of the new model is {own.value:.4f} ({interval}); bound: surely above {config.floor:g}")
    if new.unknown > config.unknown:
        share = f"{new.unknown:.1%} of the events are of items that the new model lacks"
        reasons.append(f"{name}: {share}; bound: at most {config.unknown:.1%}")
    if volume is not None and volume < config.volume:
        events = f"the new part has {volume:.1%} of the events a day that the days before it had"
        reasons.append(f"{events}; bound: at least {config.volume:.1%}")
    return Verdict(reasons=tuple(reasons), metrics=compared)


def volume(times: np.ndarray, since: int) -> float | None:
    """Return events a second from `since` on, as a share of those in as long a time before; None where nothing is before."""
    span = int(times.max()) + 1 - since
    start = max(int(times.min()), since - span)
    before, now = np.count_nonzero((times >= start) & (times < since)), np.count_nonzero(times >= since)
    return float(now / span / (before / (since - start))) if before and span > 0 else None


def _worse(name: str, new: Measurement, compared: Mapping[str, Mapping[str, Any]], config: GateConfig) -> Iterator[str]:
    """Yield a sentence for every metric beyond its bound, and for too few users."""
    users = len(new.by_user["gauc"].users) if "gauc" in new.by_user else 0
    if users < config.users:
        yield f"{name}: {users} users have candidates of both labels, too few to judge by; bound: at least {config.users}"
    bounds = {"gauc": config.gauc, "hr": config.hit_rate, "log_loss": config.log_loss, "calibration_error": config.calibration}
    for metric, each in compared.items():
        kind = metric.partition("@")[0]
        if (bound := bounds.get(kind)) is None:
            continue
        difference: Interval = each["difference"]
        better = -1.0 if kind in LOWER_IS_BETTER else 1.0
        if not np.isfinite(each["new"]) and np.isfinite(each["old"]):
            yield f"{name}: {metric} of the new model is {each['new']}, the old one's {each['old']:.4f}; bound: a finite number"
        elif better * difference.value < -bound and max(better * difference.low, better * difference.high) < 0:
            moved = f"{metric} went from {each['old']:.4f} to {each['new']:.4f}, a difference of {difference.value:+.4f}"
            interval = f"95% interval {difference.low:+.4f} to {difference.high:+.4f}"
            yield f"{name}: {moved} ({interval}); bound: at most {bound:g} worse"
