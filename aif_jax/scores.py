"""From logits to what candidates are ranked by: objectives, calibration, score expressions.

*Objectives*: what each of a model's T logits is the probability of. An objective is a name, or "NAME|GIVEN": the probability of
NAME where GIVEN is true. ("click", "conversion|click", "like") is a model with three logits. Over all candidates, clicked or
not, the probability of a conversion is the product of both: the entire-space multi-task model (ESMM, Ma et al. 2018, arXiv
1804.07931), which trains the conversion on every impression and so knows no selection by clicks.

*Calibration*: from a logit to a probability that can be multiplied with a bid. It is a part of the parameters,
`params["fitted"]["calibration"]`, so the version, the checkpoint and the export have it. `train.edits.calibration` fits it.

*Score expressions*: what candidates are ranked by, declared in one line over probabilities and side values.

    p * bid
    p.conversion * value + 0.1 * p.like
    p.click * p["conversion|click"] ** 0.5

`p.NAME` is the calibrated probability of an objective over all candidates, the one that `evaluate` reports under this name: of
a conditional objective "NAME|GIVEN" the product with what is given. `p["NAME|GIVEN"]` is the probability where GIVEN is true.
`p` is the probability of a model with one objective; any other name is a side value of the item's row. There are numbers,
+ - * / **, parentheses, `min`, `max`, `log`, `exp` and `sqrt`, and nothing else: the text is parsed into a tree of these, never
evaluated by Python, and becomes a part of the compiled program.
"""

from __future__ import annotations

import ast
import dataclasses
import keyword
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aif_jax.checks import expect
from aif_jax.types import Array, Params

GROUP = "calibration"
"""Its place in `params["fitted"]`."""


class Objective(NamedTuple):
    """One objective."""

    name: str
    given: str | None  # the objective that must be true for this one


def parse_objectives(texts: Sequence[str]) -> tuple[Objective, ...]:
    """The objectives of `Config.objectives`; ValueError for names that are none, repeat, or come after what depends on them.

    Example:
      >>> parse_objectives(("click", "conversion|click"))[1]
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


def objective_names(texts: Sequence[str]) -> tuple[str, ...]:
    """The names alone, without what is given."""
    return tuple(objective.name for objective in parse_objectives(texts))


def chain(texts: Sequence[str], name: str) -> tuple[int, ...]:
    """Places of the objectives whose product is the probability of `name` over all candidates: its own first.

    Example:
      >>> chain(("click", "like", "conversion|click"), "conversion")
      (2, 0)
    """
    known = {objective.name: (place, objective.given) for place, objective in enumerate(parse_objectives(texts))}
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


def calibrated(params: Params, logits: Array, xp: Any = jnp) -> Any:
    """Logits [...] or, with T objectives, [..., T] of calibrated probabilities; as they are where `params` has no calibration.

    `xp` is `jax.numpy`, or `numpy` for logits on the host.

    Example:
      >>> params = with_calibration({"fitted": {}}, {"scale": jnp.float32(0.5), "bias": jnp.float32(-1)})
      >>> calibrated(params, jnp.array([2.0, 4.0])).tolist(), calibrated({"fitted": {}}, jnp.array([2.0])).tolist()
      ([0.0, 1.0], [2.0])
    """
    logits, made = xp.asarray(logits), params.get("fitted", {}).get(GROUP)
    if made is None:
        return logits
    expect("scale" in made, "calibration", "scale and bias; calibrate the model again", sorted(made))
    scale, bias = (xp.asarray(made[name]) for name in ("scale", "bias"))
    shape = (1,) * (logits.ndim - scale.ndim) + scale.shape  # of one rank, as JAX may be told to want
    return logits * scale.reshape(shape) + bias.reshape(shape)


def with_calibration(params: Params, made: dict[str, Any] | None) -> Params:
    """Parameters with `scale` and `bias` [] or [T], or without any calibration for None; the rest is shared, not copied."""
    rest = {name: part for name, part in params["fitted"].items() if name != GROUP}
    return params | {"fitted": rest if made is None else rest | {GROUP: made}}


PROBABILITY = "p"
LONGEST = 500  # characters, so that no text nests deeper than a parser goes
OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: jnp.add, ast.Sub: jnp.subtract, ast.Mult: jnp.multiply, ast.Div: jnp.divide, ast.Pow: jnp.power,
}  # fmt: skip
FUNCTIONS: dict[str, tuple[Callable[..., Any], int]] = {
    "min": (jnp.minimum, 2), "max": (jnp.maximum, 2), "log": (jnp.log, 1), "exp": (jnp.exp, 1), "sqrt": (jnp.sqrt, 1),
}  # fmt: skip
"""By name: the function, and how many arguments it takes."""


@dataclasses.dataclass(frozen=True)
class Expression:
    """A parsed expression, equal to another of the same text.

    Attributes:
      text: as it was given.
      objectives: those of the model that it was checked for.
      side: the side values that it reads, in alphabetical order.
    """

    text: str
    objectives: tuple[str, ...]
    side: tuple[str, ...]

    def __call__(self, probabilities: Mapping[str, Any], side: Mapping[str, Any]) -> jax.Array:
        """float32 [C] from what `probabilities` gives and side values [C]."""
        return jnp.asarray(_value(_tree(self.text), probabilities, side), jnp.float32)


def parse_expression(text: str, *, objectives: Sequence[str] = (), side: Sequence[str] = ()) -> Expression:
    """Checks an expression for a model with the objectives of `Config.objectives` and side values of these names.

    Raises:
      ValueError: what is no expression, and where; a name that is neither an objective nor a side value; an expression that
        reads no probability.

    Example:
      >>> value = parse_expression("p.click * bid", objectives=("click", "like"), side=("bid",))
      >>> value({"click": 0.5, "like": 0.1}, {"bid": 3.0}).item()
      1.5
      >>> parse_expression("p.like * bid", objectives=("click", "like|click"))
      Traceback (most recent call last):
      ValueError: score expression 'p.like * bid': expected p.click, p.like, p["like|click"] or side values among [], got 'bid'
    """
    expect(isinstance(text, str), "score expression", "text such as 'p * bid'", repr(text))
    expect(len(text) <= LONGEST, "score expression", f"at most {LONGEST} characters", len(text))
    known, read, used = objective_names(objectives), set(), set()
    conditional = [objective for objective in objectives if "|" in objective]
    there = ", ".join([f"{PROBABILITY}.{name}" for name in known] + [f'{PROBABILITY}["{name}"]' for name in conditional])
    for node in _walk(_tree(text), text):
        if isinstance(node, ast.Name) and node.id != PROBABILITY:
            expected = f"{there or PROBABILITY} or side values among {sorted(side)}"
            expect(node.id in side, f"score expression {text!r}", expected, repr(node.id))
            used.add(node.id)
        elif isinstance(node, ast.Name):
            expect(len(known) < 2, f"score expression {text!r}", f"one of {there}", f"{PROBABILITY} alone")
            read.add("")
        else:
            name = _named(node)
            good = name in (known if isinstance(node, ast.Attribute) else conditional)
            expect(good, f"score expression {text!r}", f"one of {there or PROBABILITY}", ast.unparse(node))
            read.add(name)
    expect(len(read) > 0, f"score expression {text!r}", f"{PROBABILITY} or {PROBABILITY}.NAME", "none; add one")
    return Expression(text, tuple(objectives), tuple(sorted(used)))


def probabilities(params: Params, logits: Any, objectives: Sequence[str], xp: Any = jnp) -> dict[str, Any]:
    """Calibrated probabilities [C] by objective, of logits [C] or [C, T]; "" where the only one has no name.

    They are over all candidates; of a conditional objective there is the probability where its condition is true too, under
    "NAME|GIVEN". `xp` is `jax.numpy` or `numpy`.
    """
    made = calibrated(params, logits, xp)
    made = jax.nn.sigmoid(made) if xp is jnp else xp.exp(-xp.logaddexp(xp.zeros_like(made), -made))
    known = objective_names(objectives) or ("",)
    if len(known) == 1:
        return {known[0]: made}
    each = {text: made[..., place] for place, text in enumerate(objectives)}
    whole = {name: math.prod(made[..., place] for place in chain(objectives, name)) for name in known}
    return whole | {text: values for text, values in each.items() if "|" in text}


def _tree(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"score expression {text!r}: expected an expression such as 'p * bid', got none: {error}") from None


def _walk(node: ast.AST, text: str) -> Iterator[ast.AST]:
    """The leaves that name something, of a tree that has nothing but what is allowed; ValueError for anything else."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield from _walk(node.left, text)
        yield from _walk(node.right, text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        yield from _walk(node.operand, text)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        expect(node.value < 1e30, f"score expression {text!r}", "numbers below 1e30", ast.unparse(node))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords:
        count = FUNCTIONS[node.func.id][1]
        expected, got = f"{count} argument{'s' * (count > 1)} of {node.func.id}", len(node.args)
        expect(got == count, f"score expression {text!r}", expected, got)
        for argument in node.args:
            yield from _walk(argument, text)
    elif isinstance(node, ast.Name) or _is_probability(node):
        yield node
    else:
        got, allowed = ast.unparse(node), f"numbers, names, + - * / ** and {', '.join(FUNCTIONS)}"
        raise ValueError(f"score expression {text!r}: expected {allowed}, got {got!r}")


def _value(node: ast.AST, probabilities: Mapping[str, Any], side: Mapping[str, Any]) -> Any:
    """float32 [C], or [] where it reads no name."""
    if isinstance(node, ast.BinOp):
        left, right = (_value(part, probabilities, side) for part in (node.left, node.right))
        return OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp):
        value = _value(node.operand, probabilities, side)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Call):
        arguments = [_value(argument, probabilities, side) for argument in node.args]
        return FUNCTIONS[node.func.id][0](*arguments)  # type: ignore[attr-defined]
    if isinstance(node, ast.Constant):
        return jnp.float32(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.Attribute | ast.Subscript):
        return jnp.float32(probabilities[_named(node)])
    assert isinstance(node, ast.Name)
    if node.id == PROBABILITY:
        (value,) = probabilities.values()
        return jnp.float32(value)
    return jnp.float32(side[node.id])


def _is_probability(node: ast.AST) -> bool:
    """Whether a node is `p.NAME`, or `p[TEXT]` with a text that has a bar."""
    if not isinstance(node, ast.Attribute | ast.Subscript) or not isinstance(node.value, ast.Name):
        return False
    return node.value.id == PROBABILITY and "|" in (_named(node) if isinstance(node, ast.Subscript) else "|")


def _named(node: Any) -> str:
    """The objective that `p.NAME` or `p["NAME|GIVEN"]` names, "" for another subscript."""
    if isinstance(node, ast.Attribute):
        return node.attr
    text = node.slice.value if isinstance(node.slice, ast.Constant) else ""
    return text if isinstance(text, str) else ""
