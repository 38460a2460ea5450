"""What errors say: what was expected, what came, and the way out; read from every `raise` and every `expect` of the package."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import aif_jax

PACKAGE = Path(aif_jax.__file__).parent
STATES = {
    "DeadlineExceeded": "time ran out", "EngineClosed": "an engine that does not serve",
    "Overloaded": "more calls than can be answered", "Failure": "an HTTP request that is no call, or what no call can help",
    "OSError": "a disk, a port or a broker", "RuntimeError": "another process or thread",
    "WriterConflict": "another writer",
    "BadBatch": "the input of a step, which it names", "FloatingPointError": "a step that diverged, whose samples it names",
    "NonFiniteScores": "a model whose scores are NaN", "SourceError": "a record of the feature source",
}  # fmt: skip
"""Errors of a state, in which no value was given: there is nothing that was expected in its place."""
PASSED_ON = {
    "cli/options.py:as_usage": "the message of an error, behind the option",
    "connectors/kafka.py:KafkaStream.poll": "the broker's error",
    "encoding/times.py:in_unit": "`wrong_unit` makes the text",
    "engines/items.py:_encoded": "the message of an error, behind the place",
    "readers/tables.py:Problems.expect_none": "the problems of files, each with expected and got",
    "engines/ray_serve.py:Replica.check_health": "what the service says",
    "serving/callables.py:TimeLimitedCall._contained": "calls that hang",
    "service/calls.py:parse": "the message of `Candidates`, `plain_ids` or `expect_short`",
    "service/core.py:Service.answer": "the engine's message",
    "service/models.py:Models._restore": "the message of an export, behind its folder",
    "service/features.py:UserSource.of": "the encoder's message",
    "store/sealed.py:as_checkpoint_error": "the message of `export.consume`",
    "checkpoint/storage.py:read": "the arrays that a checkpoint lacks, and those that it has",
}  # fmt: skip
"""Places whose text comes from elsewhere, and from where."""
DAMAGE = ("CheckpointError", "SnapshotError", "StreamError", "FileNotFoundError", "FileExistsError")
"""What a person meets in files and streams: each says what to do about it."""
VALUE = "\N{LOZENGE}"
"""Stands for a value that a message shows."""
SUBJECTS = "got|found|it|something|the module|the function|the buckets|missing|jax"
CAME = re.compile(rf"expected .*?(, (but )?({SUBJECTS})\b|: {VALUE})", re.S)
EMPTY = re.compile(r"got (a |an |the )?(another|others?|none|one|some|more|less|fewer|nothing|neither|both|without)\.?$")
WAY_OUT = re.compile(
    r"(; |\. |: )(add|build|check|create|encode|export|fit|give|import|name|open|publish|pass|read|rebuild|remove|restore|"
    rf"resume|save|send|set|start|stop|take|try|use|write|begin|max_\w+ sets|aif_jax\.\w+\.\w+ copies)\b|; {VALUE}|no such file"
)


class Message(NamedTuple):
    """One message."""

    where: str  # file of the package and function
    error: str  # class
    texts: tuple[str, ...]  # as far as the source tells, one for each branch
    line: int


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
        if isinstance(node, ast.NamedExpr):
            yield node.target.id, node.value
        for target in node.targets if isinstance(node, ast.Assign) else ():
            tuples = isinstance(target, ast.Tuple)
            values = (node.value.body, node.value.orelse) if tuples and isinstance(node.value, ast.IfExp) else (node.value,)
            for value in values:
                pairs = zip(target.elts, getattr(value, "elts", ()), strict=False) if tuples else [(target, value)]
                yield from ((one.id, part) for one, part in pairs if isinstance(one, ast.Name))


def problems_of(message: Message) -> list[str]:
    """What a message lacks."""
    if message.error in STATES or message.where in PASSED_ON:
        return []
    if message.error == "ImportError":
        return [text for text in message.texts if 'pip install "aif_jax[' not in text]
    found = [] if message.texts else ["a text that can be read from the source"]
    for text in message.texts:
        if message.error in DAMAGE:
            if not WAY_OUT.search(text):
                found.append(f"what to do: {text}")
        elif not CAME.search(text):
            found.append(f"expected ..., got ...: {text}")
        if EMPTY.search(text):
            found.append(f"what came, or what to do: {text}")
    return found


def test_every_message_says_what_came_and_what_to_do_and_every_exception_is_needed():
    found = [one for path in sorted(PACKAGE.rglob("*.py")) for one in messages_in(path, path.relative_to(PACKAGE).as_posix())]
    assert len(found) > 500  # the reader still finds them
    lacking = [f"{message.where}, line {message.line}: {problem}" for message in found for problem in problems_of(message)]
    assert not lacking, "\n".join(lacking)
    assert set(STATES) <= {message.error for message in found}
    assert set(PASSED_ON) <= {message.where for message in found}


def test_the_test_finds_what_is_wrong(tmp_path):
    right = ["ValueError(f'x: expected 1, got {x}')", "ValueError('x: expected one, got none; give x=1')",
             "FileNotFoundError(f'{x}: expected a folder, got a file; name another')"]  # fmt: skip
    wrong = ["ValueError(f'x is wrong: {x}')", "ValueError('x: expected 1')", "ValueError('x: expected one, got another')",
             "FileNotFoundError(f'{x}: expected a folder, got a file')", "ImportError('needs a library')"]  # fmt: skip
    bodies = [*(f"raise {text}" for text in wrong), "expect(x, 'x', 'one', 'none')",
              "got = 'none' if x is None else x\n    expect(x, 'x', 'one', got)",
              "text = str(x)\n    raise ValueError(text)"]  # fmt: skip
    for body, count in [*((f"raise {text}", 0) for text in right), *((body, 1) for body in bodies)]:
        (tmp_path / "one.py").write_text(f"def f(x):\n    {body}")
        (message,) = messages_in(tmp_path / "one.py", "one.py")
        assert len(problems_of(message)) == count, body
