"""A loss as a value: a weighted sum of means, each with a divisor that is known before the scores are.

So losses compose with `+` and `*`, and a batch may be taken in parts that are scored once. `losses` has the usual ones.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, overload

import jax
import jax.numpy as jnp

from aif_jax.checks import expect, expect_like_scores
from aif_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Term:
    """One mean of a loss: over entries, or over lists.

    Attributes:
      values: (scores, targets, where, log_q, **options) -> the value of every entry or list. All inputs have the shape of the
        scores; masked scores and targets are 0; log_q is 0 where there is none.
      counts: (targets, where) -> bool, true for the entries or lists that the mean is over. It does not see the scores.
      targets: what the targets are called in messages.
      options: of `values`, by name.
      maps: functions that make this term's targets from the batch's, in order, see `Loss.of`.
    """

    values: Callable[..., jax.Array]
    counts: Callable[[jax.Array, jax.Array], jax.Array]
    targets: str = "labels"
    options: tuple[tuple[str, Any], ...] = ()
    maps: tuple[Callable[[jax.Array], jax.Array], ...] = ()

    def mapped(self, targets: jax.Array, where: jax.Array) -> jax.Array:
        """This term's targets, 0 where masked."""
        for f in self.maps:
            targets = jnp.where(where, f(targets).astype(targets.dtype), jnp.zeros((), targets.dtype))
        return targets


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

    def __init__(self, *terms: tuple[float, Term]):
        self.terms = terms

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
                raise TypeError(f"{self!r}: expected scores and targets with where and log_q, got none")
            return loss
        scores, targets, valid, log_q = loss._checked(scores, targets, where, log_q)
        return loss._weighed(scores, targets, valid, log_q, loss._norms(targets, valid))

    def __add__(self, other: Loss) -> Loss:
        return Loss(*self.terms, *other.terms) if isinstance(other, Loss) else NotImplemented

    def __mul__(self, weight: float) -> Loss:
        expect(math.isfinite(weight), "weight", "a finite number", repr(weight))
        return Loss(*((weight * old, term) for old, term in self.terms))

    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Loss) and self.terms == other.terms

    def __hash__(self) -> int:
        return hash(self.terms)

    def __repr__(self) -> str:
        """The sum as it would be written."""
        shown = []
        for weight, term in self.terms:
            options = ", ".join(f"{name}={value!r}" for name, value in term.options)
            name = getattr(term.values, "__name__", repr(term.values)) + (f"({options})" if options else "")
            shown.append(name if weight == 1 else f"{weight:g} * {name}")
        return " + ".join(shown)

    def of(self, f: Callable[[jax.Array], jax.Array]) -> Loss:
        """The same loss of f(targets) [..., C], each list by itself, for a sum whose terms read different targets.

        Example:
          >>> from aif_jax.train.losses import distill_listwise, pointwise_bce
          >>> clicked = lambda teacher: (teacher > 0).astype(jnp.float32)
          >>> loss = distill_listwise + pointwise_bce.of(clicked)
          >>> round(float(loss(jnp.zeros((1, 2)), jnp.zeros((1, 2)))), 4)
          0.6931
        """
        return Loss(*((weight, dataclasses.replace(term, maps=(f, *term.maps))) for weight, term in self.terms))

    def norms(self, targets: Array, where: Array) -> tuple[jax.Array, ...]:
        """What each term is divided by, at least 1, from targets [..., C] and mask of a whole batch."""
        targets = jnp.asarray(targets)
        valid = jnp.broadcast_to(jnp.asarray(where), targets.shape)
        return self._norms(jnp.where(valid, targets, jnp.zeros((), targets.dtype)), valid)

    def part(
        self, scores: Array, targets: Array, norms: tuple[jax.Array, ...], *, where: Array, log_q: Array | None = None
    ) -> jax.Array:
        """What a part of a batch adds to the loss of the batch; `norms` are those of the whole batch."""
        return self._weighed(*self._checked(scores, targets, where, log_q), norms)

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
        return Loss((weight, dataclasses.replace(term, options=tuple((dict(term.options) | options).items()))))

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

    def _norms(self, targets: jax.Array, valid: jax.Array) -> tuple[jax.Array, ...]:
        counts = (jnp.sum(term.counts(term.mapped(targets, valid), valid), dtype=jnp.int32) for _, term in self.terms)
        return tuple(jnp.maximum(count, 1) for count in counts)

    def _weighed(
        self, scores: jax.Array, targets: jax.Array, valid: jax.Array, log_q: jax.Array, norms: tuple[jax.Array, ...]
    ) -> jax.Array:
        total = jnp.zeros((), scores.dtype)
        for (weight, term), norm in zip(self.terms, norms, strict=True):
            own = term.mapped(targets, valid)
            values = term.values(scores, own, valid, log_q, **dict(term.options))
            counted = jnp.where(term.counts(own, valid), values, jnp.zeros((), values.dtype))
            total += weight * jnp.sum(counted) / norm.astype(scores.dtype)
        return total


def term(counts: Callable[[jax.Array, jax.Array], jax.Array], *, targets: str = "labels") -> Callable[..., Loss]:
    """Decorates `Term.values` of your loss, which then adds up over parts of a batch.

    Args:
      counts: `entries`, `lists`, `lists_with_a_positive` or yours, see `Term.counts`.
      targets: what the targets are called in messages.

    Example:
      >>> @term(entries)
      ... def squared(scores, labels, where, log_q, *, margin=0.0):
      ...     return jnp.maximum(jnp.abs(scores - labels) - margin, 0) ** 2
      >>> float(squared(jnp.array([3.0, 1.0]), jnp.array([1.0, 1.0])))
      2.0
    """

    def make(values: Callable[..., jax.Array]) -> Loss:
        loss = Loss((1.0, Term(values, counts, targets)))
        loss.__doc__, loss.__module__ = values.__doc__, values.__module__
        loss.__wrapped__ = values  # type: ignore[attr-defined]  # doctest finds its example
        return loss

    return make


def as_loss(loss: Any) -> Loss | None:
    """The `Loss` behind a callable: itself, or a `functools.partial` of one with options; None for any other."""
    if isinstance(loss, partial) and isinstance(loss.func, Loss) and not loss.args:
        return loss.func(**loss.keywords)
    return loss if isinstance(loss, Loss) else None


def entries(targets: jax.Array, where: jax.Array) -> jax.Array:
    """Counts every valid entry."""
    return where


def lists(targets: jax.Array, where: jax.Array) -> jax.Array:
    """Counts every list with a valid entry."""
    return jnp.any(where, axis=-1)


def lists_with_a_positive(targets: jax.Array, where: jax.Array) -> jax.Array:
    """Counts every list with a valid positive target; NaN counts, so that it shows."""
    return jnp.any(where & ~(targets <= 0), axis=-1)


def _broadcast(value: jax.Array, name: str, shape: tuple[int, ...]) -> jax.Array:
    expect_like_scores(value.shape, name, shape)
    return jnp.broadcast_to(value, shape)
