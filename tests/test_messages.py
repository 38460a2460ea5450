"""What errors say: what was expected, what came, and the way out; read from every `raise` and every `expect` of the package."""

import re
from pathlib import Path

import aif_jax
from tests.messages import VALUE, Message, messages_in

PACKAGE = Path(aif_jax.__file__).parent
STATES = {
    "DeadlineExceeded": "time ran out", "TimeoutError": "time ran out", "EngineClosed": "an engine that does not serve",
    "Overloaded": "more calls than can be answered", "Failure": "an HTTP request that is no call, or what no call can help",
    "OSError": "a disk, a port or a broker", "RuntimeError": "another process or thread",
    "WriterConflict": "another writer",
    "BadBatch": "the input of a step, which it names", "FloatingPointError": "a step that diverged, whose samples it names",
    "NonFiniteScores": "a model whose scores are NaN", "SourceError": "a record of the feature source",
}  # fmt: skip
"""Errors of a state, in which no value was given: there is nothing that was expected in its place."""
PASSED_ON = {
    "cli/options.py:as_usage": "the message of an error, behind the option",
    "cli/options.py:open_store": "the message of the client of a file system",
    "connectors/kafka.py:KafkaStream.poll": "the broker's error",
    "encoding/times.py:in_unit": "`wrong_unit` makes the text",
    "engines/items.py:_encoded": "the message of an error, behind the place",
    "readers/tables.py:Problems.expect_none": "the problems of files, each with expected and got",
    "engines/ray_serve.py:Replica.check_health": "what the service says",
    "serving/callables.py:TimeLimitedCall._call": "calls that hang",
    "service/calls.py:_candidates": "the message of `Candidates`",
    "service/calls.py:_columns": "the message of `expect_short`",
    "service/calls.py:blaming_caller": "the engine's message", 
    "service/models.py:Models._restore": "the message of an export, behind its folder",
    "service/features.py:UserSource._raw": "the encoder's message",
    "store/sealed.py:as_checkpoint_error": "the message of `export.consume`",
    "checkpoint/storage.py:read": "the arrays that a checkpoint lacks, and those that it has",
    "checks.py:_refuse": "the message of its caller",
}  # fmt: skip
"""Places whose text comes from elsewhere, and from where."""
DAMAGE = ("CheckpointError", "SnapshotError", "StreamError", "FileNotFoundError", "FileExistsError")
"""What a person meets in files and streams: each says what to do about it."""
SUBJECTS = "got|found|it|something|the module|the function|the buckets|missing|jax"
CAME = re.compile(rf"expected .*?(, (but )?({SUBJECTS})\b|: {VALUE})", re.S)
EMPTY = re.compile(r"got (a |an |the )?(another|others?|none|one|some|more|less|fewer|nothing|neither|both|without)\.?$")
WAY_OUT = re.compile(
    r"(; |\. |: )(add|build|check|create|encode|export|fit|give|import|name|open|publish|pass|read|rebuild|remove|restore|"
    rf"resume|save|send|set|start|stop|take|try|use|write|begin|max_\w+ sets|aif_jax\.\w+\.\w+ copies)\b|; {VALUE}|no such file"
)


def messages() -> list[Message]:
    paths = [path for path in sorted(PACKAGE.rglob("*.py"))]
    return [one for path in paths for one in messages_in(path, path.relative_to(PACKAGE).as_posix())]


def problems_of(message: Message) -> list[str]:
    """What a message lacks."""
    if message.error in STATES:
        return []
    if message.where in PASSED_ON:
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
    found = messages()
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
