"""What training minimises: pointwise, listwise, and distillation from a ranker's scores, and weighted sums of these.

    loss = losses.listwise_softmax + 0.1 * losses.pointwise_bce
    loss = losses.distill_listwise(temperature=2.0)

A `Loss` is called as `loss(scores, targets, *, where=None, log_q=None)` on logits [..., C] of C candidates, targets of the same
shape and a mask, true where an entry counts, and returns a float32 scalar in nats. Called with options alone it returns the
loss with these options. Masked entries contribute nothing to value or gradient, whatever they hold (NaN too); nothing valid
gives 0 with zero gradients. A NaN among valid entries gives NaN, so that training notices. Shapes or dtypes that do not fit
raise ValueError. Half-precision scores are converted to float32.

Sources: sampled softmax and its logQ correction, Bengio and Senecal 2008, Yi et al. 2019; distillation with temperature, Hinton
et al. 2015 (arXiv 1503.02531); one signature for all, google/rax.

*Consistency.* Losses that teach a pre-ranker the choice of the ranker behind it: `pairwise_ndcg`, `distill_listwise` and
`lcron` read the ranker's score of each candidate, `margin_info_nce` how far it came; see `tasks.Goals`.

Sources: the weights of pairs are LambdaRank's, Burges 2010; InfoNCE, van den Oord et al. 2018 (arXiv 1807.03748), with an
additive margin, Wang et al. 2018 (arXiv 1801.05599); passing a whole cascade, LCRON (arXiv 2503.09492).

*Sequence.* `SequenceLoss`, an auxiliary loss of the user tower. The main loss teaches one event a sample; here each event of
the short history is also the target of the state before it, as in SASRec (Kang and McAuley 2018, arXiv 1808.09781), against
negatives that the whole batch shares. A state and an item meet in the space in which the user tower reads behaviours.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp

from aif_jax import user
from aif_jax.blocks.block import recent
from aif_jax.checks import expect, expect_like_scores, expect_types
from aif_jax.config import Config
from aif_jax.data.pipeline import Batch
from aif_jax.model import PreRanker
from aif_jax.types import Array, Behaviours, Params

__all__ = [
    "pointwise_bce", "listwise_softmax", "distill_pointwise", "distill_listwise", "pairwise_ndcg", "lcron", "margin_info_nce",
    "Loss", "term", "entries", "lists", "lists_with_a_positive",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Term:
    """One mean of a loss: over entries, or over lists.

    Attributes:
      values: (scores, targets, where, log_q, **options) -> the value of every entry or list. All inputs have the shape of the
        scores; masked scores and targets are 0; log_q is 0 where there is none.
      counts: (targets, where) -> bool, true for the entries or lists that the mean is over. It does not see the scores.
      targets: what the targets are called in messages.
    """

    values: Callable[..., jax.Array]
    counts: Callable[[jax.Array, jax.Array], jax.Array]
    targets: str = "labels"
    options: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(unsafe_hash=True, repr=False)
class Loss:
    """A weighted sum of terms, each a mean whose divisor is known before the scores are; composed with `+` and `*`.

    So a batch may be taken in parts that are scored once: `norms` of the batch first, then the sum of `part` over its parts.

    Example:
      >>> from aif_jax.train.losses import listwise_softmax, pointwise_bce
      >>> loss = listwise_softmax + 0.1 * pointwise_bce
      >>> loss
      listwise_softmax + 0.1 * pointwise_bce
      >>> scores, labels = jnp.array([[2.0, 1.0]]), jnp.array([[1, 0]])
      >>> [round(float(f(scores, labels)), 4) for f in (listwise_softmax, pointwise_bce, loss)]
      [0.3133, 0.7201, 0.3853]
    """

    terms: tuple[tuple[float, Term], ...]

    @overload
    def __call__(
        self, scores: Array, targets: Array, /, *, where: Array | None = ..., log_q: Array | None = ..., **options: Any
    ) -> jax.Array: ...
    @overload
    def __call__(self, /, **options: Any) -> Loss: ...

    def __call__(
        self, scores: Any = None, targets: Any = None, /, *, where: Any = None, log_q: Any = None, **options: Any
    ) -> jax.Array | Loss:
        """The loss of a batch, or with options alone the loss with these options."""
        loss = self._with(options) if options else self
        if scores is None:
            if where is not None or log_q is not None:
                raise TypeError(f"{self!r}: expected scores and targets with where and log_q, got none; pass both")
            return loss
        return loss.part(scores, targets, None, where=where, log_q=log_q)

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.terms + other.terms) if isinstance(other, Loss) else NotImplemented

    def __mul__(self, weight: float) -> Loss:
        expect(math.isfinite(weight), "weight", "a finite number", repr(weight))
        return Loss(tuple((weight * old, term) for old, term in self.terms))

    __rmul__ = __mul__

    def __repr__(self) -> str:
        """The sum as it would be written."""
        shown = []
        for weight, term in self.terms:
            options = ", ".join(f"{name}={value!r}" for name, value in term.options)
            name = getattr(term.values, "__name__", repr(term.values)) + (f"({options})" if options else "")
            shown.append(name if weight == 1 else f"{weight:g} * {name}")
        return " + ".join(shown)

    def norms(self, targets: Array, where: Array) -> tuple[jax.Array, ...]:
        """What each term is divided by, at least 1, from targets [..., C] and mask of a whole batch."""
        targets = jnp.asarray(targets)
        valid = jnp.broadcast_to(jnp.asarray(where), targets.shape)
        targets = jnp.where(valid, targets, jnp.zeros((), targets.dtype))
        counts = (jnp.sum(term.counts(targets, valid), dtype=jnp.int32) for _, term in self.terms)
        return tuple(jnp.maximum(count, 1) for count in counts)

    def part(
        self, scores: Array, targets: Array, norms: tuple[jax.Array, ...] | None, *, where: Any, log_q: Array | None = None
    ) -> jax.Array:
        """What a part of a batch adds to the loss of the batch; `norms` are those of the batch, None where the part is all."""
        scores, targets, valid, log_q = self._checked(scores, targets, where, log_q)
        total = jnp.zeros((), scores.dtype)
        for (weight, term), norm in zip(self.terms, norms or self.norms(targets, valid), strict=True):
            values = term.values(scores, targets, valid, log_q, **dict(term.options))
            counted = jnp.where(term.counts(targets, valid), values, jnp.zeros((), values.dtype))
            total += weight * jnp.sum(counted) / norm.astype(scores.dtype)
        return total

    def _with(self, options: dict[str, Any]) -> Loss:
        if len(self.terms) != 1:
            raise TypeError(f"{self!r}: expected options of its terms before they are added, got {sorted(options)}")
        ((weight, term),) = self.terms
        known = inspect.signature(term.values).parameters.values()
        names = [p.name for p in known if p.kind is p.KEYWORD_ONLY]
        if unknown := options.keys() - set(names):
            raise TypeError(f"{self!r}: expected options among {names}, got {sorted(unknown)}")
        temperature = options.get("temperature", 1.0)
        positive = math.isfinite(temperature) and temperature > 0
        expect(positive, "temperature", "a positive finite number", repr(temperature))
        return Loss(((weight, dataclasses.replace(term, options=tuple((dict(term.options) | options).items()))),))

    def _checked(
        self, scores: Array, targets: Array, where: Array | None, log_q: Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Scores in float32 or wider, targets, mask and log_q, all of one shape; zeros in masked places.

        Replacing masked values *before* the arithmetic keeps their NaN out of the gradient: that of a `where` after is 0 * NaN.
        """
        scores = jnp.asarray(scores)
        floating = jnp.issubdtype(scores.dtype, jnp.floating)
        expect(floating, "scores", "floating-point logits", f"dtype {scores.dtype}")
        valid = jnp.asarray(True) if where is None else jnp.asarray(where)
        expect(valid.dtype == jnp.bool_, "where", "a bool mask", f"dtype {valid.dtype}")
        shape = scores.shape
        valid = jnp.broadcast_to(valid, shape) if where is None else _broadcast(valid, "where", shape)
        targets, name = jnp.asarray(targets), self.terms[0][1].targets
        expect(targets.shape == shape, name, f"the shape of scores {shape}", targets.shape)
        scores = scores.astype(jnp.float32) if scores.dtype.itemsize < 4 else scores
        correction = jnp.zeros(shape, scores.dtype)
        if log_q is not None:
            correction = _broadcast(jnp.asarray(log_q), "log_q", shape).astype(scores.dtype)
        values = (scores, targets.astype(scores.dtype), correction)
        scores, targets, correction = (jnp.where(valid, value, jnp.zeros((), value.dtype)) for value in values)
        return scores, targets, valid, correction


def term(counts: Callable[[jax.Array, jax.Array], jax.Array], *, targets: str = "labels") -> Callable[..., Loss]:
    """Decorates `Term.values` of your loss, which then adds up over parts of a batch.

    Args:
      counts: `entries`, `lists`, `lists_with_a_positive` or yours, see `Term.counts`.

    Example:
      >>> @term(entries)
      ... def squared(scores, labels, where, log_q, *, margin=0.0):
      ...     return jnp.maximum(jnp.abs(scores - labels) - margin, 0) ** 2
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
    """Counts every valid entry."""
    return where


def lists(targets: jax.Array, where: jax.Array) -> jax.Array:
    """Counts every list with a valid entry."""
    return jnp.any(where, axis=-1)


def lists_with_a_positive(targets: jax.Array, where: jax.Array) -> jax.Array:
    """Counts every list with a valid positive target; NaN counts, so that it shows."""
    return jnp.any(where & ~(targets <= 0), axis=-1)


@term(entries)
def pointwise_bce(
    scores: jax.Array, labels: jax.Array, where: jax.Array, log_q: jax.Array, *, logq_correction: bool = True
) -> jax.Array:
    """Binary cross-entropy of logits, the mean over valid entries.

    -[y log sigmoid(s - log q) + (1 - y) log(1 - sigmoid(s - log q))]

    Args:
      labels: 0 or 1, or probabilities in between.
      logq_correction: whether to subtract `log_q` where it is given, so that both losses teach the same score.

    Example:
      >>> round(float(pointwise_bce(jnp.array([0.0, 2.0]), jnp.array([1, 0]))), 4)
      1.41
    """
    return _cross_entropy(scores - log_q if logq_correction else scores, labels)


@term(lists_with_a_positive)
def listwise_softmax(
    scores: jax.Array, labels: jax.Array, where: jax.Array, log_q: jax.Array, *, logq_correction: bool = True,
    temperature: float = 1.0,
) -> jax.Array:  # fmt: skip
    """Softmax cross-entropy over the candidates of each list, the mean over lists that have a positive.

    -sum_c p_c log softmax(s / t - log q)_c, with p = labels / sum(labels)

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
      logq_correction: whether to subtract `log_q` where it is given.
      temperature: t > 0 and finite; below 1 the candidates that score highest weigh more.

    Example:
      >>> scores = jnp.array([[2.0, 1.0, 0.0]])
      >>> round(float(listwise_softmax(scores, jnp.array([[1, 0, 0]]))), 4)
      0.4076
    """
    total = jnp.sum(labels, axis=-1)
    scores = scores / temperature
    cross_entropy = -jnp.sum(labels * _log_softmax(scores - log_q if logq_correction else scores, where), axis=-1)
    return cross_entropy / jnp.where(total > 0, total, jnp.ones_like(total))


@term(entries, targets="teacher_scores")
def distill_pointwise(
    scores: jax.Array, teacher_scores: jax.Array, where: jax.Array, log_q: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """Each score is taught the teacher's probability, the mean over valid entries.

    t^2 KL(sigmoid(teacher / t) || sigmoid(s / t)); the factor t^2 keeps the size of gradients the same for every temperature.
    The teacher gets no gradient. `log_q` is not read: the teacher's scores are not corrected either.

    Args:
      teacher_scores: the teacher's logits, shape of `scores`.
      temperature: t > 0 and finite; above 1 softens the targets.

    Example:
      >>> teacher = jnp.array([1.0, -3.0])
      >>> float(distill_pointwise(teacher, teacher, temperature=2.0))
      0.0
    """
    scores, teacher = scores / temperature, jax.lax.stop_gradient(teacher_scores) / temperature
    probability = jax.nn.sigmoid(teacher)
    return (_cross_entropy(scores, probability) - _cross_entropy(teacher, probability)) * temperature**2


@term(lists, targets="teacher_scores")
def distill_listwise(
    scores: jax.Array, teacher_scores: jax.Array, where: jax.Array, log_q: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """Each list is taught the teacher's softmax over the same candidates, the mean over lists that are not empty.

    t^2 KL(softmax(teacher / t) || softmax(s / t)): only differences within a list are taught. Arguments as `distill_pointwise`.

    Example:
      >>> teacher = jnp.array([[1.0, -3.0, 0.5]])
      >>> abs(float(distill_listwise(teacher + 4.0, teacher))) < 1e-6
      True
    """
    log_teacher = _log_softmax(jax.lax.stop_gradient(teacher_scores) / temperature, where)
    probability = jnp.where(where, jnp.exp(log_teacher), jnp.zeros_like(log_teacher))
    log_student = _log_softmax(scores / temperature, where)
    return jnp.sum(probability * (log_teacher - log_student), axis=-1) * temperature**2


def _cross_entropy(scores: jax.Array, probability: jax.Array) -> jax.Array:
    # log_sigmoid of both signs, not softplus(s) - s p: that one cancels to 0 in float32 from s = 17 on.
    return -probability * jax.nn.log_sigmoid(scores) - (1 - probability) * jax.nn.log_sigmoid(-scores)


def _log_softmax(scores: jax.Array, valid: jax.Array) -> jax.Array:
    """Over the last axis among valid entries; 0 where not valid. `scores` are finite where not valid."""
    zero = jnp.zeros((), scores.dtype)
    highest = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf, where=valid)
    shifted = jnp.where(valid, scores - jax.lax.stop_gradient(jnp.where(jnp.isneginf(highest), zero, highest)), zero)
    total = jnp.sum(jnp.where(valid, jnp.exp(shifted), zero), axis=-1, keepdims=True)
    # The inner `where` keeps 0 * 1/0 of an empty list out of the backward pass: jax_debug_nans would stop there.
    return jnp.where(valid, shifted - jnp.log(jnp.where(total > 0, total, jnp.ones_like(total))), zero)


def _broadcast(value: jax.Array, name: str, shape: tuple[int, ...]) -> jax.Array:
    expect_like_scores(value.shape, name, shape)
    return jnp.broadcast_to(value, shape)


@term(lists, targets="teacher_scores")
def pairwise_ndcg(
    scores: jax.Array, teacher_scores: jax.Array, where: jax.Array, log_q: jax.Array, *, k: int = 100, temperature: float = 1.0
) -> jax.Array:
    """Pairs in the ranker's order, each weighed by what NDCG@k loses if they swap places; the mean over lists.

    sum over pairs i above j of |G_i - G_j| |D_i - D_j| log(1 + exp(-(s_i - s_j) / t)) / sum of the same weights

    The ranker's own order gives gain and discount: G_i = 2^(-r_i / k), D_i = 1 / log2(2 + r_i) for ranks r_i < k, 0 from k on.
    So pairs across the cut and near the top count, and pairs below it not at all. C^2 pairs a list.

    Args:
      scores: the student's logits [..., C].
      teacher_scores: the ranker's scores, higher is better [..., C]; ties are no pair.
      k: places that the ranker fills.

    Example:
      >>> teacher = jnp.array([[3.0, 2.0, 1.0]])
      >>> bool(pairwise_ndcg(teacher * 9, teacher) < 0.01 < pairwise_ndcg(-teacher, teacher))
      True
    """
    teacher = jax.lax.stop_gradient(teacher_scores)
    above = (teacher[..., :, None] > teacher[..., None, :]) & where[..., :, None] & where[..., None, :]
    rank = jnp.sum(above, axis=-2).astype(scores.dtype)  # how many the ranker has above
    inside = (rank < k) & where
    zero = jnp.zeros_like(rank)
    gain = jnp.where(inside, jnp.exp2(-rank / k), zero)
    discount = jnp.where(inside, 1 / jnp.log2(2 + rank), zero)
    change = jnp.abs(gain[..., :, None] - gain[..., None, :]) * jnp.abs(discount[..., :, None] - discount[..., None, :])
    weight = jnp.where(above, change, jnp.zeros_like(change))
    gap = (scores[..., :, None] - scores[..., None, :]) / temperature
    total = jnp.sum(weight, axis=(-1, -2))
    lost = jnp.sum(weight * -jax.nn.log_sigmoid(gap), axis=(-1, -2))
    return _nan_if_any(teacher, lost / jnp.where(total > 0, total, jnp.ones_like(total)))


@term(lists, targets="teacher_scores")
def lcron(
    scores: jax.Array, teacher_scores: jax.Array, where: jax.Array, log_q: jax.Array, *, k: int = 10, single: float = 1.0,
    temperature: float = 1.0,
) -> jax.Array:  # fmt: skip
    """The ranker's k best must pass this stage and the ranker: the mean over candidates, then over lists.

    BCE(p_i r_i, y_i) + single * BCE(p_i, y_i), y_i = 1 for the ranker's k best

    p_i and r_i are the probabilities that candidate i is among the first k in a soft order of this stage and of the ranker:
    NeuralSort's P_r = softmax(((n + 1 - 2 r) s - sum_j |s - s_j|) / t) for places r = 1 to n, its columns scaled to sum 1.
    The product bounds passing both stages in LCRON from below (Wang et al., ICML 2025, arXiv 2503.09492), the second term is
    its loss of one stage. The ranker is fixed here, so it gets no gradient; in the paper it is trained too, with learned
    weights of the terms. NeuralSort: Grover et al. 2019 (arXiv 1903.08850). C^2 numbers a list.

    Args:
      teacher_scores: the ranker's scores, higher is better [..., C].
      k: places that the ranker fills; lists of at most k candidates add nothing.
      single: weight of the second term.
      temperature: t > 0, of both orders.

    Example:
      >>> ranker = jnp.array([[3.0, 2.0, 1.0, 0.0]])
      >>> bool(lcron(9 * ranker, 9 * ranker, k=2) < 0.1 < lcron(-9 * ranker, 9 * ranker, k=2))
      True
    """
    teacher = jax.lax.stop_gradient(teacher_scores)
    above = (teacher[..., :, None] > teacher[..., None, :]) & where[..., :, None] & where[..., None, :]
    best = jnp.sum(above, axis=-2) < k
    ours, rankers = (_passing(values, where, k, temperature) for values in (scores, teacher))

    def lost(probability: jax.Array) -> jax.Array:
        return -jnp.where(best, jnp.log(probability + TINY), jnp.log(1 - probability + TINY))

    count = jnp.sum(where, axis=-1)
    each = jnp.where(where, lost(ours * rankers) + single * lost(ours), jnp.zeros_like(ours))
    mean = jnp.sum(each, axis=-1) / jnp.maximum(count, 1).astype(each.dtype)
    return jnp.where(count > k, mean, jnp.zeros_like(mean))


TINY = 1e-6  # keeps the logarithm of a probability finite


def _passing(scores: jax.Array, where: jax.Array, k: int, temperature: float) -> jax.Array:
    """The probability [..., C] of being among the first k of a soft order; 0 where not valid."""
    both = where[..., :, None] & where[..., None, :]
    zero = jnp.zeros((), scores.dtype)
    apart = jnp.sum(jnp.where(both, jnp.abs(scores[..., :, None] - scores[..., None, :]), zero), axis=-1)
    count = jnp.sum(where, axis=-1)[..., None, None]
    place = jnp.arange(1, scores.shape[-1] + 1).reshape((1,) * (scores.ndim - 1) + (-1, 1))
    weight = (count + 1 - 2 * place).astype(scores.dtype)
    valid = jnp.broadcast_to(where[..., None, :], both.shape) & (place <= count)
    order = _log_softmax((weight * scores[..., None, :] - apart[..., None, :]) / temperature, valid)
    order = jnp.where(valid, jnp.exp(order), zero)
    whole = jax.lax.stop_gradient(jnp.sum(order, axis=-2))
    return jnp.sum(order[..., :k, :], axis=-2) / jnp.where(whole > 0, whole, jnp.ones_like(whole))


@term(lists, targets="stages")
def margin_info_nce(
    scores: jax.Array, stages: jax.Array, where: jax.Array, log_q: jax.Array, *, margin: float = 0.0, temperature: float = 1.0,
    logq_correction: bool = True,
) -> jax.Array:  # fmt: skip
    """Every candidate against all that came less far, with a margin: the mean over the candidates of a list, then over lists.

    -log( e^((s_i - m) / t) / (e^((s_i - m) / t) + sum over j of a later stage of e^(s_j / t)) )

    Args:
      stages: how far each came, 0 the furthest, as `data.STAGES` counts [..., C].
      where: bool, true where a candidate counts; the last stage of a list is negatives alone.
      log_q: subtracted from the scores where the candidates are sampled, see `losses.listwise_softmax`.
      margin: m, in logits: how far ahead a candidate must be.

    Example:
      >>> round(float(margin_info_nce(jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[0.0, 1.0, 1.0]]))), 4)
      0.5514
    """
    s = (scores - log_q if logq_correction else scores) / temperature
    behind = (stages[..., None, :] > stages[..., :, None]) & where[..., None, :] & where[..., :, None]
    has_any = jnp.any(behind, axis=-1)
    others = jnp.where(behind, jnp.broadcast_to(s[..., None, :], behind.shape), jnp.full_like(s[..., None, :], -1e30))
    own = s - margin / temperature
    lost = jnp.logaddexp(own, jax.nn.logsumexp(others, axis=-1)) - own
    count = jnp.sum(has_any, axis=-1).astype(s.dtype)
    total = jnp.sum(jnp.where(has_any, lost, jnp.zeros_like(lost)), axis=-1)
    return _nan_if_any(stages, total / jnp.maximum(count, jnp.ones_like(count)))


def _nan_if_any(targets: jax.Array, values: jax.Array) -> jax.Array:
    """Values [...] of lists, NaN where a target [..., C] is: comparisons do not carry it on."""
    return jnp.where(jnp.isnan(targets).any(axis=-1), jnp.nan, values)


class Shared(NamedTuple):
    """What all parts of a batch share."""

    item: jax.Array  # int32 [M] negatives, 0 for none
    log_q: jax.Array  # float32 [M] log of how often M draws hold them, 0 without a correction
    targets: jax.Array  # int32 [] how many the batch has, at least 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceLoss:
    """Next item at every place of the short history; `fit` and `make_step` add it to the loss of the candidates.

    -weight * mean over places p of log( e^(h_p z+) / (e^(h_p z+) + sum_j e^(h_p z_j - log q_j)) )

    h_p is the causal state of the user tower after event p, see `Config.encoder_layers`, z+ the item of the next event, and z_j
    are M negatives: candidates of the batch, those sampled last first. If candidates come with `log_q`, the M draws are
    corrected as in sampled softmax. The target itself and unknown items are no negatives; without `repeats`, nor are items that
    the user has met up to p.

    Attributes:
      weight: weight of the loss, added to the main one.
      negatives: M, at most the candidates of a batch.
      repeats: whether users come back to items; None takes that of `fit`, and True in `make_step`.

    Example:
      >>> import aif_jax as aif
      >>> from aif_jax.train import losses
      >>> import optax
      >>> item, category = aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=6)
      >>> config = aif.presets.two_tower(aif.Schema(item_attributes=(item, category)), short_length=128, encoder_layers=1)
      >>> given = dict(loss=losses.listwise_softmax, sequence_loss=SequenceLoss(weight=0.2))
      >>> step = aif.train.make_step(aif.build(config), optax.sgd(0.1), **given)
    """

    weight: float = 0.1
    negatives: int = 256
    repeats: bool | None = None

    def __post_init__(self):
        expect_types(self)
        expect(math.isfinite(self.weight) and self.weight > 0, "SequenceLoss.weight", "a finite number above 0", self.weight)
        expect(self.negatives >= 1, "SequenceLoss.negatives", "at least 1", self.negatives)

    def bind(self, model: PreRanker, *, repeats: bool = True) -> SequenceLoss:
        """The same for a model, and for users who come back to items or not, unless it says so itself.

        ValueError for a model whose user tower has no states.
        """
        reads = model.config.sequence and model.config.towers is not None
        expect(reads, "sequence_loss", "a model with towers and Config.sequence=True", f"{model.config!r}")
        ours = getattr(model.user, "func", None) is user.apply
        expect(ours, "sequence_loss", "the user tower of aif_jax.user", f"{model!r}")
        return dataclasses.replace(self, repeats=repeats) if self.repeats is None else self

    def shared(self, batch: Batch, config: Config) -> Shared:
        """Negatives of a whole batch, and how many targets it has."""
        item = jnp.where(jnp.asarray(batch.where), jnp.asarray(batch.items.ids["item"]), 0)
        last_first = item.T[::-1].reshape(-1)  # of lists that begin with their positive, the sampled ones first
        order = jnp.argsort(last_first == 0, stable=True)[: self.negatives]
        chosen = last_first[order]
        log_q = jnp.zeros(chosen.shape)
        if batch.log_q is not None:
            of_each = jnp.broadcast_to(jnp.asarray(batch.log_q), item.shape).T[::-1].reshape(-1)
            log_q = of_each[order] + math.log(len(chosen) / max(1, item.shape[1] - 1))
        history = jax.vmap(lambda history: recent(history, config.short_length))(batch.users.history)
        count = jnp.sum(_is_target(history) & jnp.asarray(batch.where).any(-1)[:, None], dtype=jnp.int32)
        return Shared(chosen, log_q, jnp.maximum(count, 1))

    def over(self, batch: Batch, config: Config) -> Callable[[Params, Batch], jax.Array]:
        """`part` of a batch, with what is shared: a function of parameters and a part."""
        return partial(self.part, shared=self.shared(batch, config), config=config)

    def part(self, params: Params, batch: Batch, *, shared: Shared, config: Config) -> jax.Array:
        """What a part of a batch adds to the loss."""
        negatives = user.targets(params, shared.item, config=config)

        def of_user(history: Behaviours) -> jax.Array:
            short = recent(history, config.short_length)
            states, items = user.states(params, short, config=config)
            states, items = states[1:].astype(jnp.float32), items[:-1].astype(jnp.float32)
            target, place = jnp.asarray(short.item)[:-1, None], jnp.arange(1, len(short.item))[:, None]
            item = shared.item[None, :]
            allowed = (item > 0) & (item != target)
            if not self.repeats:
                met = (jnp.asarray(history.item)[:, None] == item) & jnp.asarray(history.mask)[:, None]
                first = jnp.max(jnp.where(met, jnp.arange(len(met))[:, None], -1), axis=0)  # the place where it was met first
                allowed &= first[None, :] < place
            others = jnp.where(allowed, states @ negatives.astype(jnp.float32).T - shared.log_q[None, :], -1e30)
            own = jnp.sum(states * items, axis=-1)
            lost = jnp.logaddexp(own, jax.nn.logsumexp(others, axis=-1)) - own
            return jnp.sum(jnp.where(_is_target(short), lost, 0.0))

        lost = jax.vmap(of_user)(batch.users.history)
        valid = jnp.asarray(batch.where).any(-1)
        return self.weight * jnp.sum(jnp.where(valid, lost, 0.0)) / shared.targets.astype(jnp.float32)


def _is_target(history: Behaviours) -> jax.Array:
    """bool [..., S - 1]: whether a known item follows the event of each place from 1 on."""
    mask, item = jnp.asarray(history.mask), jnp.asarray(history.item)
    return mask[..., 1:] & mask[..., :-1] & (item[..., :-1] > 0)
