"""From logits to what candidates are ranked by: objectives, calibration, orders.

*Objectives*: the events whose probabilities a model's T logits give. An objective is a name, or "NAME|GIVEN": the probability
of NAME if GIVEN is true. ("click", "conversion|click", "like") is a model with three logits. Over all candidates the
probability of a conversion is the product of click and conversion|click, which trains it on every impression, without selection
by clicks: the entire-space multi-task model (ESMM, Ma et al. 2018, arXiv 1804.07931).

*Calibration*: from a logit to a probability that can be multiplied with a bid, see `train.edits.calibration`.

*Orders*: what candidates are ranked by, a JAX function `f(p, bid)` that returns float32 [C].

    lambda p, bid: p["click"] * bid
    lambda p, bid: p["conversion"] * bid + 0.1 * p["like"]
    lambda p, bid: p["click"] * p["conversion|click"] ** 0.5

`p[NAME]`, float32 [C], is the calibrated probability of an objective over all candidates, as `evaluate` reports it: for a
conditional objective the product. `p["NAME|GIVEN"]` is the probability if GIVEN is true; `p[""]` is for a model whose one
objective has no name. `bid` is float32 [C]. An order is compiled into the scoring program and must compute each candidate's
value from that candidate alone, since C is padded.
"""

import keyword
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from aif_jax.checks import expect
from aif_jax.types import Array, Params

GROUP = "calibration"
"""Its place in `params["fitted"]`."""
Order = Callable[[Mapping[str, Any], Any], Any]
"""float32 [C] of the probabilities [C] by name and the bid [C]."""
PROBED = 3  # candidates that an order is traced with


def chains(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Parse `Config.objectives`: by name, the places of those whose product is its probability over all candidates.

    The first is its own, the second that of the objective that must be true for it. Raises ValueError for invalid or repeated
    names, or one after an objective that depends on it.
    """
    known: dict[str, tuple[int, ...]] = {}
    for place, text in enumerate(texts):
        name, bar, given = text.partition("|") if isinstance(text, str) else (text, "", "")
        plain = isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
        expect(plain, "Config.objectives", "names such as 'click', or 'conversion|click'", repr(text))
        expect(name not in known, "Config.objectives", "different names", texts)
        wanted = f"after '|' an objective named before, of {list(known)}"
        expect(not bar or given in known, "Config.objectives", wanted, repr(text))
        known[name] = (place, *(known[given] if bar else ()))
    return known


def objective_names(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the names alone, without what is given."""
    return tuple(chains(texts))


def over_all(logits: Any, texts: Sequence[str], name: str, xp: Any) -> Any:
    """Return the logit [...] of an objective over all candidates, from the T logits [..., T]; `xp` is `numpy` or `jax.numpy`.

    With p = sigmoid(a) sigmoid(b), (1 - p) / p = e^-a + e^-b + e^-(a + b): no difference of numbers near 1 is taken.
    """
    total, *others = (logits[..., place] for place in chains(texts)[name])
    for logit in others:
        total = -xp.logaddexp(xp.logaddexp(-total, -logit), -total - logit)
    return total


def calibrated(params: Params, logits: Array, xp: Any = jnp) -> Any:
    """Return logits [...] or, with T objectives, [..., T] of calibrated probabilities; unchanged without a calibration.

    `xp` is `jax.numpy`, or `numpy` for logits on the host.
    """
    logits, made = xp.asarray(logits), params.get("fitted", {}).get(GROUP)
    if made is None:
        return logits
    expect("scale" in made, "calibration", "scale and bias; calibrate the model again", sorted(made))
    scale, bias = (xp.asarray(made[name]) for name in ("scale", "bias"))
    shape = (1,) * (logits.ndim - scale.ndim) + scale.shape  # of one rank, as JAX may be told to want
    return logits * scale.reshape(shape) + bias.reshape(shape)


def with_calibration(params: Params, made: dict[str, Any] | None) -> Params:
    """Return parameters with `scale` and `bias` [] or [T], or without calibration for None; the rest is shared, not copied."""
    rest = {name: part for name, part in params["fitted"].items() if name != GROUP}
    return params | {"fitted": rest if made is None else rest | {GROUP: made}}


def probabilities(params: Params, logits: Any, objectives: Sequence[str], xp: Any = jnp) -> dict[str, Any]:
    """Return calibrated probabilities [C] by objective, of logits [C] or [C, T]; "" where the only one has no name.

    They are over all candidates; a conditional objective has "NAME|GIVEN" too. `xp` is `jax.numpy` or `numpy`.
    """
    made = calibrated(params, logits, xp)
    made = jax.nn.sigmoid(made) if xp is jnp else xp.exp(-xp.logaddexp(xp.zeros_like(made), -made))
    known = chains(objectives)
    if len(known) < 2:
        return {next(iter(known), ""): made}
    whole = {name: math.prod(made[..., place] for place in places) for name, places in known.items()}
    return whole | {text: made[..., place] for place, text in enumerate(objectives) if "|" in text}


def order_inputs(objectives: Sequence[str], size: Any) -> tuple[dict[str, Any], jax.ShapeDtypeStruct]:
    """Return shapes of the probabilities by name and of the bid that an order of C candidates takes; `size` is C."""
    spec = jax.ShapeDtypeStruct((size,), np.float32)
    logits = jax.ShapeDtypeStruct((size, len(objectives)), np.float32) if len(objectives) > 1 else spec
    return jax.eval_shape(lambda logits: probabilities({}, logits, objectives), logits), spec


def reads_bid(name: str, order: Any, objectives: Sequence[str]) -> bool:
    """Return whether an order reads the bid; ValueError for no function of an order's inputs, or one of another output."""
    p, bid = order_inputs(objectives, PROBED)
    way_out = f'write lambda p, bid: p["{next(iter(p))}"] * bid'
    expect(callable(order), f"orders {name!r}", "a function f(p, bid)", f"{order!r}; {way_out}")
    expected = f"a JAX function of p, with {sorted(p)}, and the bid to float32 [C]"
    try:
        traced, shape = jax.make_jaxpr(lambda p, bid: jnp.asarray(order(p, bid), jnp.float32), return_shape=True)(p, bid)
    except Exception as error:  # whatever a caller's function raises
        raise ValueError(f"orders {name!r}: expected {expected}, got {type(error).__name__}: {error}") from error
    expect(shape.shape == bid.shape, f"orders {name!r}", expected, f"shape {list(shape.shape)} for C = {PROBED}")
    _, read = dce_jaxpr(traced.jaxpr, [True])
    expect(any(read), f"orders {name!r}", expected, f"one that reads neither; {way_out}")
    return read[-1]
