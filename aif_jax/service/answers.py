"""Answers as fields: for frames with NumPy arrays, for JSON with lists."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from aif_jax.service.core import Reply
from aif_jax.serving import Ranking, Scores
from aif_jax.serving.requests import Answer


def rank_fields(reply: Reply[Ranking], call_id: str) -> dict[str, Any]:
    """`ids`, `scores` and `logits` of the best candidates that have a score, best first, and what the answer says of itself.

    A model of T objectives has logits [k, T], and `objectives` names them. `group` and `group_cap` are there where the cut is
    diverse.
    """
    answer = reply.answer
    arrays: dict[str, Any] = {"ids": answer.ids, "scores": answer.scores, "logits": answer.logits}
    if not answer.mask.all():
        arrays = {name: array[answer.mask] for name, array in arrays.items()}
    config = reply.served.engine.config
    cut = {} if config.group is None else {"group": config.group, "group_cap": config.group_cap}
    counts = {name: getattr(answer, name) for name in ("candidates", "unknown", "excluded")}
    return _common(reply, call_id) | counts | cut | arrays


def score_fields(reply: Reply[Scores], call_id: str) -> dict[str, Any]:
    """`logits` [C] or [C, T] in the order of the candidates, `mask` [C] false where there is none."""
    return _common(reply, call_id) | {"logits": reply.answer.logits, "mask": reply.answer.mask}


def _common(reply: Reply[Any], call_id: str) -> dict[str, Any]:
    answer: Answer = reply.answer
    return {
        "id": call_id,
        "version": answer.version,
        "degraded": answer.degraded,
        "reason": answer.reason,
        "state_age": answer.state_age,
        "non_finite": answer.non_finite,
        "stages": answer.stages,
    } | ({"objectives": list(reply.served.objectives)} if len(reply.served.objectives) > 1 else {})


def to_json(value: Any) -> Any:
    """Plain JSON values: lists for arrays, None for what JSON cannot say."""
    if isinstance(value, dict):
        return {name: to_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(inner) for inner in value]
    if isinstance(value, np.ndarray):
        finite = value.dtype.kind != "f" or np.isfinite(value).all()
        return value.tolist() if finite else [to_json(number) for number in value.tolist()]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
