"""Losses of several labels: for each objective, for each stage of the cascade, and of a ranker's scores, added up.

    loss = Goals(
        Goal(pointwise_bce, "click"),
        Goal(pointwise_bce, "conversion"),                         # "conversion|click": over all candidates, by the product
        Goal(0.1 * pointwise_bce, "conversion", within="click"),   # the conditional logit, where clicked
        Goal(0.5 * distill_listwise, "ranker", stages=("exposed", "ranked")),
    )

Where a batch has several labels by name (`candidates.Labels`), a goal reads one of them; NaN is a label that the log does not
know, and counts nowhere unless `missing` says what it means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.checks import expect
from aif_jax.data.cascade import STAGE, STAGES
from aif_jax.scores import objective_names, over_all
from aif_jax.train.losses import Loss, pointwise_bce


@dataclasses.dataclass(frozen=True)
class Goal:
    """One loss, of one label and one objective.

    Attributes:
      loss: with its weight: `0.2 * pointwise_bce`.
      target: the label that it reads, by name.
      objective: whose logit it teaches; None takes the objective of the target's name, or the first one. That of a conditional
        objective is over all candidates: the logit of the product (ESMM).
      within: a label: only candidates that have it positive count, and a conditional objective is taught its own logit.
      stages: only candidates of these stages count, of `data.cascade.STAGES`; () for all.
      missing: what an unknown label means, such as 0.0 for candidates that were not shown; None leaves them out.

    Raises:
      TypeError: a loss that is none.
      ValueError: an unknown stage.
    """

    loss: Loss
    target: str
    _: dataclasses.KW_ONLY
    objective: str | None = None
    within: str | None = None
    stages: tuple[str, ...] = ()
    missing: float | None = None

    def __post_init__(self):
        if not isinstance(self.loss, Loss):
            raise TypeError(f"Goal.loss: expected a losses.Loss, got {type(self.loss).__name__}")
        unknown = [stage for stage in self.stages if stage not in STAGES]
        expect(isinstance(self.stages, tuple) and not unknown, "Goal.stages", f"a tuple of stages among {STAGES}", self.stages)

    def __repr__(self) -> str:
        """What a record of a run shows."""
        fields = ("objective", "within", "stages", "missing")
        options = [f"{name}={value!r}" for name in fields if (value := getattr(self, name)) not in (None, ())]
        return ", ".join([f"Goal({self.loss!r}, {self.target!r}", *options]) + ")"


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Goals:
    """A sum of goals; `make_step` and `fit` take it as a loss. It adds up over parts of a batch as a `Loss` does.

    Example:
      >>> from aif_jax.train.losses import pointwise_bce
      >>> loss = Goals(Goal(pointwise_bce, "click"), Goal(0.5 * pointwise_bce, "conversion"))
      >>> loss = loss.bind(("click", "conversion|click"))
      >>> labels = {"click": jnp.array([[1.0, 0.0]]), "conversion": jnp.array([[0.0, jnp.nan]])}
      >>> round(float(loss(jnp.zeros((1, 2, 2)), labels)), 4)  # log 2, and half of -log(1 - 1/4)
      0.837
    """

    goals: tuple[Goal, ...]
    objectives: tuple[str, ...]

    def __init__(self, *goals: Goal, objectives: tuple[str, ...] = ()):
        expect(len(goals) > 0, "Goals", "at least one goal", "none")
        object.__setattr__(self, "goals", goals)
        object.__setattr__(self, "objectives", objectives)

    @classmethod
    def of(cls, objectives: tuple[str, ...]) -> Goals:
        """Binary cross-entropy of every objective over all candidates, all of weight 1."""
        expected = "names of the objectives, such as ('click', 'like'), for a loss of each, or a loss for fit"
        expect(len(objectives) > 0, "Config.objectives", expected, "none")
        return cls(*(Goal(pointwise_bce, name) for name in objective_names(objectives)), objectives=objectives)

    def __repr__(self) -> str:
        """The sum as it would be written."""
        return " + ".join(map(repr, self.goals))

    def bind(self, objectives: tuple[str, ...]) -> Goals:
        """The same for a model with these objectives; ValueError for a goal of an objective that it lacks."""
        known = objective_names(objectives)
        for goal in self.goals:
            fits = goal.objective is None or goal.objective in known
            expect(fits, f"{goal!r}", f"an objective of the model, {list(known)}", repr(goal.objective))
        return Goals(*self.goals, objectives=objectives)

    def __call__(self, scores: Any, labels: Mapping[str, Any], *, where: Any = None, log_q: Any = None) -> jax.Array:
        """The loss of a batch: scores [..., C] or [..., C, T], labels [..., C] by name."""
        return self.part(scores, labels, None, where=True if where is None else where, log_q=log_q)

    def norms(self, labels: Mapping[str, Any], where: Any) -> tuple[tuple[jax.Array, ...], ...]:
        """The divisors of each goal's loss, from the labels of a whole batch."""
        return tuple(goal.loss.norms(*self._read(goal, labels, where)) for goal in self.goals)

    def part(self, scores: Any, labels: Mapping[str, Any], norms: Any, *, where: Any, log_q: Any = None) -> jax.Array:
        """What a part of a batch adds to the loss of the batch, as `Loss.part`."""
        scores = jnp.asarray(scores)
        total = jnp.zeros((), jnp.float32)
        for goal, norm in zip(self.goals, norms or [None] * len(self.goals), strict=True):
            targets, valid = self._read(goal, labels, where)
            total += goal.loss.part(self._logit(goal, scores), targets, norm, where=valid, log_q=log_q)
        return total

    def _logit(self, goal: Goal, scores: jax.Array) -> jax.Array:
        """Logits [..., C] that a goal teaches."""
        known = objective_names(self.objectives)
        if len(known) < 2:
            return scores
        name = goal.objective or (goal.target if goal.target in known else known[0])
        if goal.within is not None:
            return scores[..., known.index(name)]
        return over_all(scores, self.objectives, name, jnp)

    def _read(self, goal: Goal, labels: Any, where: Any) -> tuple[jax.Array, jax.Array]:
        """Targets and mask [..., C] of a goal."""
        wanted = {goal.target, *((goal.within,) if goal.within else ()), *((STAGE,) if goal.stages else ())}
        got = sorted(labels) if isinstance(labels, Mapping) else "one array without a name"
        expect(isinstance(labels, Mapping) and wanted <= set(labels), f"{goal!r}", f"labels {sorted(wanted)}", got)
        targets = jnp.asarray(labels[goal.target])
        valid = jnp.broadcast_to(jnp.asarray(where), targets.shape)
        if goal.missing is not None:
            targets = jnp.where(jnp.isnan(targets), jnp.asarray(goal.missing, targets.dtype), targets)
        if goal.within is not None:
            valid &= jnp.asarray(labels[goal.within]) > 0
        if goal.stages:
            stage = jnp.asarray(labels[STAGE])
            codes = np.array([STAGES.index(name) for name in goal.stages], stage.dtype)
            valid &= (stage[..., None] == codes.reshape((1,) * stage.ndim + (-1,))).any(-1)
        return targets, valid & ~jnp.isnan(targets)
