"""Calibration of a trained model, fitted on held-out events.

Sampling shifts the logits of a model. Where a sample keeps every positive and a share r of the negatives, the odds in it are
1 / r times those outside, so the logit is too high by -log r, whatever the features: that part is corrected analytically. Where
each negative was drawn with a known rate, an entry counts for 1 / rate entries of the population. What is left (a loss that
teaches the order, a model that is too sure) is fitted on held-out entries:

    logistic    logit' = scale * logit + bias                              two numbers an objective (Platt scaling)
    isotonic    logit' = a rising line through K knots                     for a shape that is not logistic (SciPy pools)

The result is a part of the parameters, `params["fitted"]["calibration"]`, so the version, the checkpoint and the export have
it; training never changes it. Both forms rise with the logit: they change no order.

Sources: Platt 1999; Guo et al. 2017 (arXiv 1706.04599); isotonic regression by pooling adjacent violators, Zadrozny and Elkan
2002; the correction for sampled negatives, He et al. 2014.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np
from scipy.optimize import isotonic_regression

from aif_jax.checks import expect, expect_integers, expect_like_scores
from aif_jax.data.candidates import SampleKey, SourceFn, population_weights
from aif_jax.data.dataset import Dataset
from aif_jax.model import PreRanker
from aif_jax.scores import parse_objectives, with_calibration
from aif_jax.store.version import check_encoding
from aif_jax.train.evaluate import list_scores, sampled_before
from aif_jax.types import Params

Form = Literal["logistic", "isotonic"]
KNOTS = 32
STEPS = 100  # of Newton's method, which needs about six
LEAST_SLOPE = 1e-3  # of the line between two knots: pooled knots keep the order of their logits


def calibrate(
    model: PreRanker,
    params: Params,
    data: Dataset,
    positions: Any,
    *,
    candidates: SourceFn | None = None,
    calibration_negatives: int | None = 15,
    rate: float = 1.0,
    weights: Any = None,
    form: Form = "logistic",
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = True,
) -> Params:
    """Parameters whose logits serving turns into calibrated probabilities, fitted on held-out events.

    What the probabilities are of is what the candidates are: of lists that were shown, the chance of a click where an item is
    shown; of an event's item among sampled ones, the chance to be the event's among these, and with a source that gives `log_q`
    among all items. A conditional objective is fitted where its condition is true.

    Args:
      model, params: what to calibrate; an earlier calibration is replaced.
      data, positions: held-out events, as in `evaluate`: the validation slice.
      candidates: lists with labels; None draws as `evaluate` does.
      calibration_negatives: candidates after the first that count, as in `evaluate`; None takes all.
      rate: share of the negatives of production that these lists hold, where a log keeps only some: corrected analytically.
      weights: [n] how many requests of production each of the positions stands for, such as more where histories are long
        because they have grown since; None for one each.
      form: "logistic", two numbers an objective, or "isotonic", a rising line through 32 knots.

    Raises:
      EncodingMismatch, ValueError: as `evaluate` and `fit_calibration`.
    """
    check_encoding("data", expected=model.config.schema.encoding, got=data.encoding)
    positions = expect_integers(positions, "positions", size=len(data.log)).astype(np.int64)
    expect(len(positions) > 0, "positions", "at least one held-out event", "none; move the split, or lower min_history")
    if weights is not None:
        weights = np.asarray(weights, np.float64)
        expected, got = f"one for each of {len(positions)} positions", f"shape {list(weights.shape)}"
        expect(weights.shape == positions.shape, "calibrate weights", expected, got)
    source = sampled_before(data, positions) if candidates is None else candidates
    lists = source(positions, SampleKey(seed, 0, 0))
    scores = list_scores(model, params, data, positions, lists, batch_size=batch_size, progress=progress)
    few = slice(None) if calibration_negatives is None else slice(1 + calibration_negatives)
    where = lists.rows > 0
    objectives, labels = parse_objectives(model.config.objectives), lists.labels
    if not isinstance(labels, dict):
        expect(len(objectives) <= 1, "labels", "those of every objective by name", "one array; give them by name")
        labels = {objectives[0].name if objectives else "": labels}
    names = [(objective.name, objective.given) for objective in objectives] or [(next(iter(labels)), None)]
    parts = []
    for place, (name, given) in enumerate(names):
        expect(name in labels, "labels", f"those of the objective {name!r}", sorted(labels))
        known = where & ~np.isnan(labels[name])
        if given is not None:
            known &= labels[given] == 1
        raw = scores[..., place] if model.config.outputs > 1 else scores
        options: dict[str, Any] = {"rate": rate if given is None else 1.0, "form": form, "where": known[:, few]}
        weighed = population_weights(labels[name], lists.log_q)
        if weights is not None:
            weighed = weights[:, None] * np.broadcast_to(1.0 if weighed is None else weighed, raw.shape)
        if weighed is not None:
            options["weights"] = weighed[:, few]
        parts.append(fit_calibration(np.where(known, raw, 0)[:, few], np.where(known, labels[name], 0)[:, few], **options))
    return with_calibration(params, stack_calibrations(parts))


def fit_calibration(
    scores: Any,
    labels: Any,
    *,
    where: Any = None,
    weights: Any = None,
    rate: float = 1.0,
    form: Form = "logistic",
    knots: int = KNOTS,
) -> dict[str, np.ndarray]:
    """Fits a calibration of one objective on held-out entries, on the host in float64.

    Args:
      scores: raw logits of the model, any shape.
      labels: 0 or 1, the same shape.
      where: bool, true where an entry counts; rank of `scores` and broadcastable to it.
      weights: how many entries of the population each stands for, as `where`: 1 for a positive and 1 / (n q) for a negative
        that n draws from q gave. None for 1.
      rate: share of the population's negatives that these entries hold, where all are kept alike.

    Returns:
      `scale` and `bias` float32 [], or `x` and `y` float32 [K] in ascending order: for `with_calibration`. `stack_calibrations`
      joins those of several objectives.

    Raises:
      ValueError: shapes, NaN scores, weights or a rate that do not fit; entries of one class only; scores that do not
        rise with the labels, whose calibration would turn the order round; logits that float32 cannot hold or scale.

    Example:
      >>> made = fit_calibration([-1.0, -1.0, 1.0, 1.0] * 25, [0, 1, 0, 1] * 24 + [0, 0, 1, 1], rate=0.5)
      >>> {name: round(float(value), 2) for name, value in made.items()}
      {'scale': 0.08, 'bias': -0.69}
    """
    expect(form in get_args(Form), "calibration form", f"one of {get_args(Form)}", repr(form))
    expect(0 < rate <= 1, "calibration rate", "a share above 0 and at most 1", rate)
    expect(knots >= 4, "calibration knots", "at least 4", knots)
    s, y, w = _entries(scores, labels, where, weights)
    total, positives = w.sum(), (w * y).sum()
    expect(0 < positives < total, "calibration labels", "entries of both classes", f"{positives:g} positives of {total:g}")
    shift = math.log(rate)
    if form == "logistic":
        scale, bias = _newton(s, y, w)
        expect(scale > 0, "calibration scores", "scores that rise with the labels", f"a scale of {scale:.3g}")
        made = {"scale": _float32(scale)[()], "bias": _float32(bias + shift)[()]}
        normal = made["scale"] >= np.finfo(np.float32).tiny
        expect(normal, "calibration scores", "smaller logits, that float32 can scale", f"a scale of {scale:.3g}")
        return made
    x, line = _pooled(s, y, w, max(2, knots - 2))
    return {"x": _rising(x), "y": _rising(line + shift)}


def stack_calibrations(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The calibrations of T objectives as one: [] to [T], knots [K] to [T, K]; that of one objective stays as it is.

    Lines of fewer knots are continued with the slope 1 that they have anyway.
    """
    if len(parts) == 1:
        return parts[0]
    if "scale" in parts[0]:
        return {name: np.stack([part[name] for part in parts]) for name in ("scale", "bias")}
    most = max(len(part["x"]) for part in parts)

    def longer(part: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        step = max(1.0, *(float(np.spacing(np.abs(values[-1]))) for values in part.values()))  # 1 may be lost in a large knot
        more = step * np.arange(1, most - len(part["x"]) + 1, dtype=np.float64)
        return {name: _rising(np.append(values, values[-1] + more)) for name, values in part.items()}

    return {name: np.stack([longer(part)[name] for part in parts]) for name in ("x", "y")}


def _float32(values: Any) -> np.ndarray:
    """Values as float32; ValueError where one is too large."""
    largest = np.max(np.abs(values), initial=0.0)
    expect(largest < np.finfo(np.float32).max / 2, "calibration scores", "logits that float32 holds", f"one of {largest:.3g}")
    return np.asarray(values, np.float32)


def _rising(values: np.ndarray) -> np.ndarray:
    """Ascending knots [K] as float32 that rise at each: one that the cast makes equal to the last takes the next number."""
    knots = _float32(values)
    for place in range(1, len(knots)):
        knots[place] = max(knots[place], np.nextafter(knots[place - 1], np.float32(np.inf)))
    return knots


def _entries(scores: Any, labels: Any, where: Any, weights: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, labels and weights of the entries that count, float64 [n]."""
    s, y = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    expect(y.shape == s.shape, "calibration labels", f"the shape of scores {s.shape}", y.shape)
    valid, w = np.asarray(True if where is None else where), np.asarray(1.0 if weights is None else weights, np.float64)
    for value, name, given in ((valid, "where", where), (w, "weights", weights)):
        if given is not None:
            expect_like_scores(value.shape, name, s.shape)
    valid, w = np.broadcast_to(valid, s.shape), np.broadcast_to(w, s.shape)
    s, y, w = s[valid], y[valid], w[valid]
    expect(np.isfinite(s).all(), "calibration scores", "finite logits", "some that are not")
    _float32(s)
    expect(np.isin(y, (0, 1)).all(), "calibration labels", "0 or 1", np.unique(y)[:5])
    expect((np.isfinite(w) & (w >= 0)).all(), "calibration weights", "finite weights of 0 or more", "some that are not")
    return s[w > 0], y[w > 0], w[w > 0]


def _newton(s: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[float, float]:
    """Scale and bias of the least weighted log-loss; scores are centred first, for well-conditioned steps."""
    centre, spread = np.average(s, weights=w), max(float(s.std()), 1e-12)
    features = np.stack([(s - centre) / spread, np.ones_like(s)])
    rate = np.average(y, weights=w)
    theta = np.array([0.0, math.log(rate / (1 - rate))])

    def loss(theta: np.ndarray) -> float:
        z = theta @ features
        return float((w * np.logaddexp(0, np.where(y > 0, -z, z))).sum())

    before = loss(theta)
    for _ in range(STEPS):
        p = np.exp(-np.logaddexp(0, -(theta @ features)))
        gradient = features @ (w * (p - y))
        curvature = (features * (w * p * (1 - p))) @ features.T + 1e-9 * w.sum() * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        after, size = loss(theta - step), 1.0
        while not after <= before and size > 1e-6:  # Newton's step may overshoot where the classes can be separated
            size /= 2
            after = loss(theta - size * step)
        theta = theta - size * step
        if abs(before - after) <= 1e-12 * max(1.0, abs(before)):
            break
        before = after
    scale = theta[0] / spread
    return float(scale), float(theta[1] - scale * centre)


def _pooled(s: np.ndarray, y: np.ndarray, w: np.ndarray, knots: int) -> tuple[np.ndarray, np.ndarray]:
    """Knots of the isotonic form: groups of scores of equal weight, adjacent violators pooled, logits of the rates.

    Half a positive and half a negative are added to each, so that no knot is infinite.
    """
    values, at = np.unique(s, return_inverse=True)  # equal scores are of one group
    mass, hits = np.bincount(at, w), np.bincount(at, w * y)
    group = np.minimum((np.cumsum(mass) - mass / 2) / w.sum() * knots, knots - 1).astype(np.int64)
    first = np.flatnonzero(np.append(True, group[1:] != group[:-1]))
    mass, hits, mean = (np.add.reduceat(value, first) for value in (mass, hits, mass * values))
    unit = w.sum() / len(w)  # weight of one entry
    pooled = isotonic_regression(hits / mass, weights=mass).blocks
    sizes = np.diff(pooled)
    expect(len(sizes) > 1, "calibration scores", "scores that rise with the labels", "one rate for all of them")
    weight, positives = (np.add.reduceat(value, pooled[:-1]) for value in (mass, hits))
    x = mean / mass
    line = np.repeat(np.log(positives + unit / 2) - np.log(weight - positives + unit / 2), sizes)
    gaps = np.maximum(np.diff(x), 1e-6)
    slopes = np.maximum(np.diff(line) / gaps, LEAST_SLOPE)
    x, line = (np.append(first, first + np.cumsum(steps)) for first, steps in ((x[0], gaps), (line[0], slopes * gaps)))
    # The halves of the outer groups that no knot bounds go on as steep as their neighbours, and no steeper than slope 1.
    ends = np.array([min(values[0], x[0] - 1e-6), max(values[-1], x[-1] + 1e-6)])
    outer = line[[0, -1]] + np.minimum(slopes[[0, -1]], 1) * (ends - x[[0, -1]])
    return np.concatenate([ends[:1], x, ends[1:]]), np.concatenate([outer[:1], line, outer[1:]])
