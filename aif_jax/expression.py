"""Score expressions: what candidates are ranked by, declared in one line over probabilities and side values.

    p * bid
    p.click * p.conversion * value + 0.1 * p.like

`p.NAME` is the calibrated probability of an objective, `p` that of a model with one; any other name is a side value of the
item's row. There are numbers, + - * / **, parentheses, `min`, `max`, `log`, `exp` and `sqrt`, and nothing else: the text is
parsed into a tree of these, never evaluated by Python, and becomes a part of the compiled program.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from aif_jax.calibration import calibrated
from aif_jax.checks import expect
from aif_jax.objectives import names
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
        """float32 [C] from probabilities [C] by objective ("" for the one without a name) and side values [C]."""
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
    """
    expect(isinstance(text, str), "score expression", "text such as 'p * bid'", repr(text))
    expect(len(text) <= LONGEST, "score expression", f"at most {LONGEST} characters", len(text))
    known, read, used = names(objectives), set(), set()
    for node in _walk(_tree(text), text):
        if isinstance(node, ast.Name) and node.id != PROBABILITY:
            expect(node.id in side, f"score expression {text!r}", f"side values among {sorted(side)}", repr(node.id))
            used.add(node.id)
        elif isinstance(node, ast.Attribute):
            expected = f"{PROBABILITY}.NAME with a name among {list(known)}"
            expect(node.attr in known, f"score expression {text!r}", expected, f"{PROBABILITY}.{node.attr}")
            read.add(node.attr)
        elif isinstance(node, ast.Name):
            expected = f"{PROBABILITY}.NAME for one of the objectives {list(known)}"
            expect(len(known) < 2, f"score expression {text!r}", expected, f"{PROBABILITY} alone")
            read.add("")
    expect(len(read) > 0, f"score expression {text!r}", f"a probability, {PROBABILITY} or {PROBABILITY}.NAME", "none")
    return Expression(text, tuple(objectives), tuple(sorted(used)))


def probabilities(params: Params, logits: Any, objectives: Sequence[str], xp: Any = jnp) -> dict[str, Any]:
    """Calibrated probabilities [C] by objective, of logits [C] or [C, T]; "" where the only one has no name.

    A conditional objective has its own probability, where its condition is true. `xp` is `jax.numpy` or `numpy`.
    """
    made = calibrated(params, logits, xp)
    made = jax.nn.sigmoid(made) if xp is jnp else xp.exp(-xp.logaddexp(xp.zeros_like(made), -made))
    known = names(objectives) or ("",)
    return {known[0]: made} if len(known) == 1 else {name: made[..., place] for place, name in enumerate(known)}


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
    if isinstance(node, ast.Attribute):
        return jnp.float32(probabilities[node.attr])
    assert isinstance(node, ast.Name)
    if node.id == PROBABILITY:
        (value,) = probabilities.values()
        return jnp.float32(value)
    return jnp.float32(side[node.id])


def _is_probability(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == PROBABILITY
