"""Calibration of a trained model on held-out events; the maths is that of `aif_jax.calibration`."""

from __future__ import annotations

from typing import Any

import numpy as np

from aif_jax.calibration import Form, fit, stack, with_calibration
from aif_jax.checks import expect, expect_integers
from aif_jax.data.candidates import Draw, SourceFn, population_weights
from aif_jax.data.dataset import Dataset
from aif_jax.model import PreRanker
from aif_jax.objectives import parse
from aif_jax.train.evaluate import list_scores, sampled_before
from aif_jax.types import Params
from aif_jax.version import check_encoding


def calibrate(
    model: PreRanker,
    params: Params,
    data: Dataset,
    positions: Any,
    *,
    candidates: SourceFn | None = None,
    calibrated: int | None = 15,
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
      calibrated: candidates after the first that count, as in `evaluate`; None takes all.
      rate: share of the negatives of production that these lists hold, where a log keeps only some: corrected analytically.
      weights: [n] how many requests of production each of the positions stands for, such as more where histories are long
        because they have grown since; None for one each.
      form: "logistic", two numbers an objective, or "isotonic", a rising line through 32 knots.
      seed: of sampled candidates.
      batch_size: requests scored at a time.
      progress: whether to show a bar.

    Raises:
      EncodingMismatch, ValueError: as `evaluate` and `calibration.fit`.
    """
    check_encoding("data", expected=model.config.schema.encoding, got=data.encoding)
    positions = expect_integers(positions, "positions", size=len(data.log)).astype(np.int64)
    expect(len(positions) > 0, "positions", "at least one held-out event", "none")
    if weights is not None:
        weights = np.asarray(weights, np.float64)
        expected, got = f"one for each of {len(positions)} positions", f"shape {list(weights.shape)}"
        expect(weights.shape == positions.shape, "calibrate weights", expected, got)
    source = sampled_before(data, positions) if candidates is None else candidates
    lists = source(positions, Draw(seed, 0, 0))
    scores = list_scores(model, params, data, positions, lists, batch_size=batch_size, progress=progress)
    few = slice(None) if calibrated is None else slice(1 + calibrated)
    where = lists.rows > 0
    objectives, labels = parse(model.config.objectives), lists.labels
    if not isinstance(labels, dict):
        expect(len(objectives) <= 1, "labels", "those of every objective by name", "one array")
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
        parts.append(fit(np.where(known, raw, 0)[:, few], np.where(known, labels[name], 0)[:, few], **options))
    return with_calibration(params, stack(parts))
