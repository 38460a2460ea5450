"""Objectives of a model: what each of its T logits is the probability of, and how conditional ones are chained.

An objective is a name, or "NAME|GIVEN": the probability of NAME where GIVEN is true. ("click", "conversion|click", "like") is
a model with three logits. Over all candidates, clicked or not, the probability of a conversion is the product of both:
the entire-space multi-task model (ESMM), which trains the conversion on every impression and so knows no selection by clicks.

Source: ESMM, Ma et al. 2018 (arXiv 1804.07931).
"""

from __future__ import annotations

import keyword
from collections.abc import Sequence
from typing import Any, NamedTuple

from aif_jax.checks import expect


class Objective(NamedTuple):
    """One objective."""

    name: str
    given: str | None  # the objective that must be true for this one


def parse(texts: Sequence[str]) -> tuple[Objective, ...]:
    """The objectives of `Config.objectives`; ValueError for names that are none, repeat, or come after what depends on them.

    Example:
      >>> parse(("click", "conversion|click"))[1]
      Objective(name='conversion', given='click')
    """
    made: list[Objective] = []
    for text in texts:
        name, bar, given = text.partition("|") if isinstance(text, str) else (text, "", "")
        plain = isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
        expect(plain, "Config.objectives", "names such as 'click', or 'conversion|click'", repr(text))
        known = [objective.name for objective in made]
        expect(name not in known, "Config.objectives", "different names", texts)
        expect(not bar or given in known, "Config.objectives", f"after '|' an objective named before, of {known}", repr(text))
        made.append(Objective(name, given or None))
    return tuple(made)


def names(texts: Sequence[str]) -> tuple[str, ...]:
    """The names alone, without what is given."""
    return tuple(objective.name for objective in parse(texts))


def chain(texts: Sequence[str], name: str) -> tuple[int, ...]:
    """Places of the objectives whose product is the probability of `name` over all candidates: its own first.

    Example:
      >>> chain(("click", "like", "conversion|click"), "conversion")
      (2, 0)
    """
    known = {objective.name: (place, objective.given) for place, objective in enumerate(parse(texts))}
    expect(name in known, "objective", f"one of {sorted(known)}", repr(name))
    places, current = [], name
    while current is not None:
        place, current = known[current]
        places.append(place)
    return tuple(places)


def product(logits: Sequence[Any], xp: Any) -> Any:
    """The logit of the product of probabilities, from their logits [...]; `xp` is `numpy` or `jax.numpy`.

    With p = sigmoid(a) sigmoid(b), (1 - p) / p = e^-a + e^-b + e^-(a + b): no difference of numbers near 1 is taken.

    Example:
      >>> import numpy as np
      >>> round(float(1 / (1 + np.exp(-product([np.log(1.0), np.log(3.0)], np)))), 4)
      0.375
    """
    total = logits[0]
    for logit in logits[1:]:
        total = -xp.logaddexp(xp.logaddexp(-total, -logit), -total - logit)
    return total


def over_all(logits: Any, texts: Sequence[str], name: str, xp: Any) -> Any:
    """The logit [...] of an objective over all candidates, from the T logits [..., T]."""
    return product([logits[..., place] for place in chain(texts, name)], xp)
