"""The training recipe of `question`: its loss, and the lengths of its batches."""

from __future__ import annotations

from aif_jax.train import losses

DEFAULT = "listwise + pointwise"
"""A softmax over a list says nothing about the level of the list's scores, which GAUC, pooling all requests of a user, and
log-loss depend on; the pointwise part fixes it."""


def loss(recipe: str) -> losses.Loss:
    """The loss of a recipe; column 0 of every list is the positive.

    Raises:
      ValueError: no such recipe.
    """
    if recipe != DEFAULT:
        raise ValueError(f"recipe: expected {DEFAULT!r}, got {recipe!r}")
    return losses.listwise_softmax + losses.pointwise_bce


def shorter(longest: int) -> tuple[int, ...]:
    """Lengths of histories below the longest one that batches may have: each is half of the next."""
    return tuple(longest >> n for n in (4, 3, 2, 1) if longest >> n >= 64)
