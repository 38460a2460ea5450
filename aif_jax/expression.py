"""Score expressions: what candidates are ranked by, declared in one line over probabilities and side values.

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
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from aif_jax.calibration import calibrated
from aif_jax.checks import expect
from aif_jax.objectives import chain, names
from aif_jax.types import Params

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


def parse(text: str, *, objectives: Sequence[str] = (), side: Sequence[str] = ()) -> Expression:
    """Checks an expression for a model.

    Args:
      text: the expression.
      objectives: `Config.objectives`.
      side: names of side values that there are.

    Raises:
      ValueError: what is no expression, and where; a name that is neither an objective nor a side value; an expression that
        reads no probability.

    Example:
      >>> parse("p.click * bid", objectives=("click", "like"), side=("bid",))({"click": 0.5, "like": 0.1}, {"bid": 3.0}).item()
      1.5
      >>> parse("p.like * bid", objectives=("click", "like|click"))
      Traceback (most recent call last):
      ValueError: score expression 'p.like * bid': expected p.click, p.like, p["like|click"] or side values among [], got 'bid'
    """
    expect(isinstance(text, str), "score expression", "text such as 'p * bid'", repr(text))
    expect(len(text) <= LONGEST, "score expression", f"at most {LONGEST} characters", len(text))
    known, read, used = names(objectives), set(), set()
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
    expect(len(read) > 0, f"score expression {text!r}", f"a probability, {PROBABILITY} or {PROBABILITY}.NAME", "none")
    return Expression(text, tuple(objectives), tuple(sorted(used)))


def probabilities(params: Params, logits: Any, objectives: Sequence[str], xp: Any = jnp) -> dict[str, Any]:
    """Calibrated probabilities [C] by objective, of logits [C] or [C, T]; "" where the only one has no name.

    They are over all candidates; of a conditional objective there is the probability where its condition is true too, under
    "NAME|GIVEN". `xp` is `jax.numpy` or `numpy`.
    """
    made = calibrated(params, logits, xp)
    made = jax.nn.sigmoid(made) if xp is jnp else xp.exp(-xp.logaddexp(xp.zeros_like(made), -made))
    known = names(objectives) or ("",)
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
