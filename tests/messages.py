"""The text of every error that the package raises, read from its source: what `tests/test_messages.py` checks."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

VALUE = "\N{LOZENGE}"
"""Stands for a value that a message shows."""


@dataclasses.dataclass(frozen=True)
class Message:
    """One message."""

    where: str  # file of the package and function
    error: str  # class
    texts: tuple[str, ...]  # as far as the source tells, one for each branch
    line: int

    def __str__(self) -> str:
        return f"{self.where}, line {self.line}: {self.error}: {' | '.join(self.texts)}"


def messages_in(path: Path, name: str) -> Iterator[Message]:
    """Of every `raise` of a new error with a text, and of every call of `expect`, in a module."""
    for function, node in _nodes(ast.parse(path.read_text()), "module", None):
        scope, label = function
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            error = node.exc.func.attr if isinstance(node.exc.func, ast.Attribute) else getattr(node.exc.func, "id", "")
            texts = _texts(node.exc, error, scope)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "expect":
            if len(node.args) < 4:
                continue
            error = "ValueError"
            texts = [f"{a}: expected {b}, got {c}" for a in _text(node.args[1], scope)
                     for b in _text(node.args[2], scope) for c in _text(node.args[3], scope)]  # fmt: skip
        else:
            continue
        yield Message(f"{name}:{label}", error, tuple(dict.fromkeys(texts)), node.lineno)


def _nodes(tree: ast.AST, label: str, scope: ast.AST | None) -> Iterator[tuple[tuple[ast.AST | None, str], ast.AST]]:
    for node in ast.iter_child_nodes(tree):
        yield (scope, label), node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = node.name if label == "module" else f"{label}.{node.name}"
            yield from _nodes(node, inner, scope if isinstance(node, ast.ClassDef) else node)
        else:
            yield from _nodes(node, label, scope)


def _texts(call: ast.Call, error: str, scope: ast.AST | None) -> list[str]:
    """Of an error: its keywords `expected` and `got`, else its longest argument, which is the text."""
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    if {"expected", "got"} <= named.keys():
        return [f"expected {a}, got {b}" for a in _text(named["expected"], scope) for b in _text(named["got"], scope)]
    return max(([*_text(argument, scope)] for argument in call.args), key=lambda texts: max(map(len, texts)), default=[])


def _text(node: ast.AST, scope: ast.AST | None, depth: int = 4) -> list[str]:
    """What an expression may read like; a name stands for what its function assigned to it."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        found = [""]
        for part in node.values:
            inner = part.value if isinstance(part, ast.FormattedValue) else part
            options = _text(inner, scope, depth) if not isinstance(part, ast.FormattedValue) or depth else [VALUE]
            found = [before + one for before in found for one in options][:16]
        return found
    if isinstance(node, ast.IfExp):
        return [*_text(node.body, scope, depth), *_text(node.orelse, scope, depth)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in _text(node.left, scope, depth) for b in _text(node.right, scope, depth)][:16]
    if isinstance(node, ast.Name) and depth and scope is not None:
        given = [value for target, value in _assignments(scope) if target == node.id]
        texts = [text for value in given for text in _text(value, None if value is node else scope, depth - 1)]
        if texts and any(text != VALUE for text in texts):
            return texts[:16]
    return [VALUE]


def _assignments(scope: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(scope):
        if isinstance(node, ast.NamedExpr) and isinstance(node.target, ast.Name):
            yield node.target.id, node.value
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Name):
                yield target.id, node.value
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for one, value in zip(target.elts, node.value.elts, strict=False):
                    if isinstance(one, ast.Name):
                        yield one.id, value
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.IfExp):
                for branch in (node.value.body, node.value.orelse):
                    for one, value in zip(target.elts, getattr(branch, "elts", ()), strict=False):
                        if isinstance(one, ast.Name):
                            yield one.id, value
