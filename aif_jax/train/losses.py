"""What training minimises: pointwise, listwise, and distillation from a ranker's scores, and weighted sums of these.

    loss = losses.listwise_softmax + 0.1 * losses.pointwise_bce

Of several labels by name (`candidates.Labels`), each term reads one:

    loss = pointwise_bce.of("click") + pointwise_bce.of("conversion")  # of "conversion|click": over all, by the product
    loss += 0.5 * distill_listwise.of("ranker", objective="click")  # the ranker's scores

A `Loss` is called as `loss(scores, targets, *, where=None, log_q=None)` on logits [..., C] of C candidates, targets of the same
shape and a mask, true where an entry counts, and returns a float32 scalar in nats. Masked entries contribute nothing to value
or gradient, whatever they hold (NaN too); nothing valid gives 0 with zero gradients. A NaN among valid entries gives NaN, so
that training notices. Shapes or dtypes that do not fit raise ValueError. Half-precision scores are converted to float32.

Sources: sampled softmax and its logQ correction, Bengio and Senecal 2008, Yi et al. 2019; distillation, Hinton et al. 2015
(arXiv 1503.02531); one signature for all, google/rax.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from optax.losses import kl_divergence_with_log_targets, sigmoid_binary_cross_entropy

from aif_jax.checks import expect, expect_like_scores
from aif_jax.scores import objective_names, over_all
from aif_jax.types import Array

__all__ = [
    "pointwise_bce", "listwise_softmax", "distill_listwise", "bce_of_each",
    "Loss", "term", "entries", "lists", "lists_with_a_positive",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Term:
    """One mean of a loss: over entries, or over lists.

    Attributes:
      values: (scores, targets, where, log_q) -> the value of every entry or list. All inputs have the shape of the scores;
        masked scores and targets are 0; log_q is 0 where there is none.
      counts: (targets, where) -> bool, true for the entries or lists that the mean is over. It does not see the scores.
      targets: what the targets are called in messages.
      label, objective: see `Loss.of`; without a label the targets are one array.
    """

    values: Callable[..., jax.Array]
    counts: Callable[[jax.Array, jax.Array], jax.Array]
    targets: str = "labels"
    label: str | None = None
    objective: str | None = None

    def __repr__(self) -> str:
        """Return the term as it would be written."""
        name = getattr(self.values, "__name__", repr(self.values))
        objective = "" if self.objective is None else f", objective={self.objective!r}"
        return name if self.label is None else f"{name}.of({self.label!r}{objective})"

    def logit(self, scores: jax.Array, objectives: tuple[str, ...]) -> jax.Array:
        """Return the logits [..., C] that the term teaches, of scores [..., C] or [..., C, T] of several objectives."""
        names = objective_names(objectives)
        if self.label is None or len(names) < 2:
            return scores
        return over_all(scores, objectives, self.objective or (self.label if self.label in names else names[0]), jnp)

    def read(self, labels: Any, where: Any) -> tuple[Any, Any]:
        """Return targets and mask [..., C] of the term."""
        by_name = isinstance(labels, Mapping)
        got = sorted(labels) if by_name else "one array without a name"
        if self.label is None:
            expect(not by_name, f"{self!r}", "one array of labels, or the name of one by .of(name)", got)
            return labels, where
        expect(by_name and self.label in labels, f"{self!r}", f"labels by name, {self.label!r} among them", got)
        targets = jnp.asarray(labels[self.label])
        valid = jnp.broadcast_to(jnp.asarray(True if where is None else where), targets.shape)
        return targets, valid & ~jnp.isnan(targets)


@dataclasses.dataclass(unsafe_hash=True, repr=False)
class Loss:
    """A weighted sum of terms, each a mean whose divisor is known before the scores are; composed with `+` and `*`.

    So a batch may be taken in parts that are scored once: `norms` of the batch first, then the sum of the loss over its parts.

    Attributes:
      terms: each with its weight.
      objectives: names of the logits that terms of a label read; the training step binds those of its model.

    Example:
      >>> from aif_jax.train.losses import listwise_softmax, pointwise_bce
      >>> loss = listwise_softmax + 0.1 * pointwise_bce
      >>> loss
      listwise_softmax + 0.1 * pointwise_bce
      >>> scores, labels = jnp.array([[2.0, 1.0]]), jnp.array([[1, 0]])
      >>> [round(float(f(scores, labels)), 4) for f in (listwise_softmax, pointwise_bce, loss)]
      [0.3133, 0.7201, 0.3853]
      >>> loss = (pointwise_bce.of("click") + 0.5 * pointwise_bce.of("conversion")).bind(("click", "conversion|click"))
      >>> labels = {"click": jnp.array([[1.0, 0.0]]), "conversion": jnp.array([[0.0, jnp.nan]])}
      >>> round(float(loss(jnp.zeros((1, 2, 2)), labels)), 4)  # log 2, and half of -log(1 - 1/4)
      0.837
    """

    terms: tuple[tuple[float, Term], ...]
    objectives: tuple[str, ...] = ()

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.terms + other.terms) if isinstance(other, Loss) else NotImplemented

    def __mul__(self, weight: float) -> "Loss":
        expect(math.isfinite(weight), "weight", "a finite number", repr(weight))
        return Loss(tuple((weight * old, term) for old, term in self.terms))

    __rmul__ = __mul__

    def __repr__(self) -> str:
        """Return the sum as it would be written."""
        return " + ".join(repr(term) if weight == 1 else f"{weight:g} * {term!r}" for weight, term in self.terms)

    def of(self, label: str, *, objective: str | None = None) -> "Loss":
        """Return the same loss of one label by name; terms that have a label keep it. NaN is unknown and does not count.

        Args:
          objective: whose logit it teaches; None takes the objective of the label's name, or the first one. That of a
            conditional objective is over all candidates: the logit of the product (ESMM).
        """
        given: dict[str, Any] = {"label": label, "objective": objective}
        named = ((w, term if term.label is not None else dataclasses.replace(term, **given)) for w, term in self.terms)
        return Loss(tuple(named))

    def bind(self, objectives: tuple[str, ...]) -> "Loss":
        """Return the same for a model with these objectives; ValueError for a term of an objective that it lacks."""
        known = objective_names(objectives)
        for _, term in self.terms:
            fits = term.objective is None or term.objective in known
            expect(fits, f"{term!r}", f"an objective of the model, {list(known)}", repr(term.objective))
        return Loss(self.terms, objectives)

    def norms(self, labels: Any, where: Any) -> tuple[jax.Array, ...]:
        """Return what each term is divided by, at least 1, from labels [..., C] and mask of a whole batch."""

        def norm(targets: Any, where: Any, term: Term) -> jax.Array:
            targets = jnp.asarray(targets)
            valid = jnp.broadcast_to(jnp.asarray(where), targets.shape)
            counted = term.counts(jnp.where(valid, targets, jnp.zeros((), targets.dtype)), valid)
            return jnp.maximum(jnp.sum(counted, dtype=jnp.int32), 1)

        return tuple(norm(*term.read(labels, where), term) for _, term in self.terms)

    def __call__(
        self, scores: Any, targets: Any, *, where: Any = None, log_q: Any = None, norms: tuple[jax.Array, ...] | None = None
    ) -> jax.Array:
        """Return the loss of a batch; with its `norms`, what a part of the batch adds to it."""
        total: Any = 0.0
        for (weight, term), norm in zip(self.terms, norms or [None] * len(self.terms), strict=True):
            logits = term.logit(jnp.asarray(scores), self.objectives)
            logits, labels, valid, correction = _checked(logits, *term.read(targets, where), log_q, name=term.targets)
            counted, values = term.counts(labels, valid), term.values(logits, labels, valid, correction)
            expect(values.shape == counted.shape, f"{term!r}", f"a value for each it counts, {counted.shape}", values.shape)
            divisor = jnp.maximum(jnp.sum(counted, dtype=jnp.int32), 1) if norm is None else norm
            total += weight * jnp.sum(jnp.where(counted, values, jnp.zeros((), values.dtype))) / divisor.astype(values.dtype)
        return total


def _checked(
    scores: jax.Array, targets: Any, where: Any, log_q: Array | None, *, name: str
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return scores in float32 or wider, targets, mask and log_q, all of one shape; zeros in masked places.

    Replacing masked values *before* the arithmetic keeps their NaN out of the gradient: that of a `where` after is 0 * NaN.
    """
    expect(jnp.issubdtype(scores.dtype, jnp.floating), "scores", "floating-point logits", f"dtype {scores.dtype}")
    shape, targets = scores.shape, jnp.asarray(targets)
    valid = jnp.ones(shape, jnp.bool_) if where is None else jnp.asarray(where)
    expect(valid.dtype == jnp.bool_, "where", "a bool mask", f"dtype {valid.dtype}")
    correction = jnp.zeros(shape) if log_q is None else jnp.asarray(log_q)
    for argument, value in (("where", valid), ("log_q", correction)):
        expect_like_scores(value.shape, argument, shape)
    expect(targets.shape == shape, name, f"the shape of scores {shape}", targets.shape)
    scores = scores.astype(jnp.float32) if scores.dtype.itemsize < 4 else scores
    valid, correction = (jnp.broadcast_to(value, shape) for value in (valid, correction))
    values = (scores, targets.astype(scores.dtype), correction.astype(scores.dtype))
    scores, targets, correction = (jnp.where(valid, value, jnp.zeros((), value.dtype)) for value in values)
    return scores, targets, valid, correction


def bce_of_each(objectives: tuple[str, ...]) -> Loss:
    """Return binary cross-entropy of every objective over all candidates, all of weight 1."""
    expected = "names of the objectives, such as ('click', 'like'), for a loss of each, or a loss for fit"
    expect(len(objectives) > 0, "Config.objectives", expected, "none; name them")
    return Loss(tuple(term for name in objective_names(objectives) for term in pointwise_bce.of(name).terms))


def term(counts: Callable[[jax.Array, jax.Array], jax.Array], *, targets: str = "labels") -> Callable[..., Loss]:
    """Decorate `Term.values` of your loss, which then add up over parts of a batch.

    Args:
      counts: `entries`, `lists`, `lists_with_a_positive` or yours, see `Term.counts`.

    Example:
      >>> @term(entries)
      ... def squared(scores, labels, where, log_q):
      ...     return (scores - labels) ** 2
      >>> float(squared(jnp.array([3.0, 1.0]), jnp.array([1.0, 1.0])))
      2.0
    """

    def make(values: Callable[..., jax.Array]) -> Loss:
        loss = Loss(((1.0, Term(values, counts, targets)),))
        loss.__doc__, loss.__module__ = values.__doc__, values.__module__
        loss.__wrapped__ = values  # type: ignore[attr-defined]  # doctest finds its example
        return loss

    return make


def entries(targets: jax.Array, where: jax.Array) -> jax.Array:
    """Count every valid entry."""
    return where


def lists(targets: jax.Array, where: jax.Array) -> jax.Array:
    """Count every list with a valid entry."""
    return jnp.any(where, axis=-1)


def lists_with_a_positive(targets: jax.Array, where: jax.Array) -> jax.Array:
    """Count every list with a valid positive target; NaN counts, so that it shows."""
    return jnp.any(where & ~(targets <= 0), axis=-1)


@term(entries)
def pointwise_bce(scores: jax.Array, labels: jax.Array, where: jax.Array, log_q: jax.Array) -> jax.Array:
    """Return binary cross-entropy of logits, the mean over valid entries.

    -[y log sigmoid(s - log q) + (1 - y) log(1 - sigmoid(s - log q))]

    Args:
      labels: 0 or 1, or probabilities in between.
      log_q: logQ correction, see `listwise_softmax`, so that both losses teach the same score; 0 where there is none.

    Example:
      >>> round(float(pointwise_bce(jnp.array([0.0, 2.0]), jnp.array([1, 0]))), 4)
      1.41
    """
    return sigmoid_binary_cross_entropy(scores - log_q, labels)


@term(lists_with_a_positive)
def listwise_softmax(scores: jax.Array, labels: jax.Array, where: jax.Array, log_q: jax.Array) -> jax.Array:
    """Return softmax cross-entropy over the candidates of each list, the mean over lists that have a positive.

    -sum_c p_c log softmax(s - log q)_c, with p = labels / sum(labels)

    Where candidates are a sample, subtracting log q makes the loss estimate that of the softmax over the whole catalogue;
    without it popular items, sampled often, are pushed down. The correction belongs to training only: serve the raw scores.
    Mask a sampled negative that happens to be the list's positive item.

    Args:
      scores: logits [..., C].
      labels: not negative, graded or 0/1 [..., C]; every list weighs the same, however many positives it has.
      where: bool, true where a candidate counts; rank of `scores` and broadcastable to it.
      log_q: log of the expected number of times that the list holds the candidate as a negative, up to a constant per list:
        log(n q) for n draws from q, of the positive too (noise-contrastive estimation, arXiv 1809.01812, which
        `candidates.sampled_negatives` gives and which fits `pointwise_bce` as well); or 0 for a positive that every list holds
        (sampled softmax). Rank of `scores` and broadcastable to it: [1, C] for candidates that the whole batch shares.

    Example:
      >>> scores = jnp.array([[2.0, 1.0, 0.0]])
      >>> round(float(listwise_softmax(scores, jnp.array([[1, 0, 0]]))), 4)
      0.4076
    """
    total, cross_entropy = jnp.sum(labels, axis=-1), -jnp.sum(labels * _log_softmax(scores - log_q, where), axis=-1)
    return cross_entropy / jnp.where(total > 0, total, jnp.ones_like(total))


@term(lists, targets="teacher_scores")
def distill_listwise(scores: jax.Array, teacher_scores: jax.Array, where: jax.Array, log_q: jax.Array) -> jax.Array:
    """Return the divergence of each list's softmax from the teacher's, the mean over lists that are not empty.

    KL(softmax(teacher) || softmax(s)): only differences within a list are taught. The teacher gets no gradient.

    Args:
      teacher_scores: the teacher's logits, shape of `scores`.

    Example:
      >>> teacher = jnp.array([[1.0, -3.0, 0.5]])
      >>> abs(float(distill_listwise(teacher + 4.0, teacher))) < 1e-6
      True
    """
    log_teacher = _log_softmax(jax.lax.stop_gradient(teacher_scores), where)
    return kl_divergence_with_log_targets(_log_softmax(scores, where), log_teacher)  # where masked, both are 0


def _log_softmax(scores: jax.Array, valid: jax.Array) -> jax.Array:
    """Return the log-softmax over the last axis among valid entries; 0 where not valid. `scores` are finite where not valid."""
    some = valid | ~jnp.any(valid, axis=-1, keepdims=True)  # an empty list takes part as a whole: it has no softmax
    return jnp.where(valid, jax.nn.log_softmax(scores, where=some), jnp.zeros((), scores.dtype))
