"""Options that several commands share: columns of files, a trained model, one word for each exit code."""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import json
import re
import signal
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from aif_jax.checks import expect
from aif_jax.connectors.snapshot_store import SnapshotError, SnapshotStore
from aif_jax.encoding.columns import Columns
from aif_jax.encoding.encoder import Encoder
from aif_jax.export.contents import open as open_model
from aif_jax.export.writer import PLATFORMS
from aif_jax.store.trained import Trained
from aif_jax.train.distillation import COUNT, WEIGHT, Teacher
from aif_jax.train.losses import distill_listwise
from aif_jax.train.tasks import TASKS, Task

FINE, PROBLEMS, USAGE, REFUSED = 0, 1, 2, 3
UNREAD = 141  # as shells have it for a command that SIGPIPE ended


def fields_of(kind: Any) -> list[str]:
    """Return names of the fields of a dataclass."""
    return [field.name for field in dataclasses.fields(kind)]


FIELDS = fields_of(Columns)
_FIELDS_OF = {name: ", ".join(fields_of(kind)) for name, kind in TASKS.items()}
PLATFORM_HELP = f"what the export is compiled for (default: {' '.join(PLATFORMS)})"
TASK_HELP = f"a task and its fields, of {'; '.join(f'{name} ({fields})' for name, fields in _FIELDS_OF.items())}"


class Parser(argparse.ArgumentParser):
    """A parser, and those of its commands, that take flags as they are written: `--check` is no `--checkpoint`."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, allow_abbrev=False, **options)


class UsageError(Exception):
    """Options that do not fit together, or a settings file that cannot be read."""


@contextlib.contextmanager
def as_usage(option: str) -> Iterator[None]:
    """Turn what a value of an option raises into a `UsageError` that names the option."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(f"{option}: {error}") from error


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether this process got SIGTERM or SIGINT."""
    told: list[int] = []
    handlers = {number: signal.signal(number, lambda got, _: told.append(got)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(told)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    """Add a command to what `add_subparsers` returned; `run` returns the exit code, its docstring is the help text."""
    text = inspect.getdoc(run)  # None with -OO
    one = commands.add_parser(name, help=text, description=text)
    one.set_defaults(run=run)
    return one


def add_shown(parser: argparse.ArgumentParser, *, printed: str = "the result") -> None:
    """Add what every job has: `--json`, and `--quiet`, which `main` looks at."""
    parser.add_argument("--json", action="store_true", help=f"print {printed} as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Add `--columns FILE` and a flag for each field of `Columns`, with the help text of its docstring."""
    group = parser.add_argument_group("columns of the files (see aif_jax.Columns)")
    group.add_argument("--columns", type=Path, metavar="FILE", help="JSON file with these settings; flags override it")
    add_flags(group, Columns, FIELDS)


def add_flags(parser: Any, documented: Any, names: Iterable[str] | Mapping[str, str]) -> None:
    """Add flags for some fields of a dataclass, or arguments of a function, by the same names or those in a mapping.

    Types and defaults come from the signature, help texts from the lines "NAME: text" of the docstring; `flags_given` and
    `config_of` read them. Type `Any` takes a number or a date, a dataclass FIELD=VALUE words; "none" is None if allowed.
    """
    flags = names if isinstance(names, Mapping) else {name: name for name in names}
    parameters = inspect.signature(documented).parameters
    written = {name: parameters[name].annotation for name in flags}  # others may name types that are no values
    hints = typing.get_type_hints(type("Flags", (), {"__annotations__": written}), vars(sys.modules[documented.__module__]))
    for name, flag in flags.items():
        default, hint = parameters[name].default, hints[name]
        kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
        words = _words(hint)
        text = flag_help(documented, name, default)
        option: dict[str, Any] = {"help": text, "dest": flag, "default": argparse.SUPPRESS}
        if hint is Any:
            option |= {"type": number_or_text, "metavar": "NUMBER|DATE"}
        elif dataclasses.is_dataclass(kinds[0]):
            text = f"{meaning(documented, name)}; fields in JSON: {', '.join(fields_of(kinds[0]))}"
            option |= {"nargs": "+", "metavar": "FIELD=VALUE", "help": text}
        elif typing.get_args(kinds[0]) == (Any, Any):
            option |= {"type": number_or_text, "nargs": 2, "metavar": ("FROM", "BEFORE")}
        elif bool in kinds:
            option["action"] = argparse.BooleanOptionalAction
        elif any(typing.get_origin(kind) is tuple for kind in (hint, *kinds)) and words:
            numbers = any(int in typing.get_args(kind) for kind in kinds)
            option |= {"type": number_or_text, "nargs": "*", "metavar": f"{words[0]}|{'NUMBER' if numbers else 'NAME'}"}
        elif typing.get_origin(hint) is tuple:
            numbers = typing.get_args(hint)[0] is int
            option |= {"type": int if numbers else str, "nargs": "*", "metavar": "NUMBER" if numbers else "NAME"}
        elif words:
            option["choices"] = words
        else:
            number = kinds[0] in (int, float)
            option |= {"type": kinds[0], "metavar": "NUMBER" if number else "PATH" if kinds[0] is Path else "NAME"}
            if len(typing.get_args(hint)) > 1 and not isinstance(None, kinds[0]):
                option["type"] = functools.partial(_or_none, kinds[0])
        parser.add_argument("--" + flag.replace("_", "-"), **option)


def flag_help(documented: Any, name: str, default: Any) -> str:
    """Return meaning and default of an argument; "; None: WHAT" of the docstring is the default where that is None."""
    text, _, without = meaning(documented, name).partition("; None: ")
    first, _, rest = without.partition(". ")
    if without and default is None:
        default, text = first, f"{text}. {rest}" if rest else text
    words = {"None": "none", "()": "none", "True": "yes", "False": "no"}
    return f"{text} (default: {words.get(str(default), default)})".replace("%", "%%")


def _words(hint: Any) -> list[str]:
    """Return the words that a type hint lists, alone or next to other types."""
    literals = [kind for kind in (hint, *typing.get_args(hint)) if typing.get_origin(kind) is Literal]
    return [word for kind in literals for word in typing.get_args(kind)]


def number_or_text(text: str) -> int | float | str:
    """Return the number that a text is, else the text."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def flags_given(options: argparse.Namespace, names: Iterable[str] | Mapping[str, str]) -> dict[str, Any]:
    """Return values of the flags of `add_flags` that were given, by field or argument."""
    flags = names if isinstance(names, Mapping) else {name: name for name in names}
    return {name: getattr(options, flag) for name, flag in flags.items() if hasattr(options, flag)}


def config_of(options: argparse.Namespace, kind: Any, command: str) -> Any:
    """Return the dataclass that the flags of all its fields say; UsageError for values that do not fit."""
    hints, values = typing.get_type_hints(kind), flags_given(options, fields_of(kind))
    for name, value in values.items():
        inner, flag = (typing.get_args(hints[name]) or (hints[name],))[0], "--" + name.replace("_", "-")
        if dataclasses.is_dataclass(inner) and value != ["none"]:
            with as_usage(flag):
                values[name] = inner(**read_fields(value, flag, fields_of(inner)))  # type: ignore[operator]
        elif value == ["none"]:
            values[name] = None
        elif isinstance(value, list):
            values[name] = value[0] if value in ([word] for word in _words(hints[name])) else tuple(value)
    with as_usage(command):
        return kind(**values)


def _or_none(kind: type, text: str) -> Any:
    return None if text == "none" else kind(text)


def read_task(words: Sequence[str]) -> Task:
    """Return the task of the words `NAME FIELD=VALUE...`; UsageError for another name, or fields that do not fit."""
    name, *fields = words
    expect(name in TASKS, "--task", f"one of {', '.join(TASKS)}", repr(name), error=UsageError)
    values = read_fields(fields, f"--task {name}", fields_of(TASKS[name]))
    with as_usage("--task"):
        return TASKS[name](**values)


def add_teacher(parser: argparse.ArgumentParser, *, label: str = "") -> None:
    """Add `--teacher` and `--candidates`; `label` says what else than a folder the teacher may be."""
    text = f"folder of a trained model{label}, whose scores are trained on too, see train.Teacher; fields: weight in the loss "
    text += f"(default: {WEIGHT:g}), candidates drawn for each sample, count ({COUNT}), corrected=true to teach the order "
    text += "after the popularity correction, which the scores have too"
    parser.add_argument("--teacher", nargs="+", metavar=("FOLDER", "FIELD=VALUE"), help=text)
    text = "file of what retrieval finds, for the teacher to score: a line for each candidate of a request, in order, with the "
    text += "columns of user, item and time that the events have; about 64 for each training event are enough"
    parser.add_argument("--candidates", metavar="FILE", help=text)


def read_teacher(options: argparse.Namespace, *, labels: bool = False) -> Teacher | None:
    """Return teacher of `--teacher`: the model in a folder or, where there are `labels`, the label; UsageError for another."""
    if options.teacher is None:
        expect(options.candidates is None, "--candidates", "a ranker of them", "none; give --teacher", error=UsageError)
        return None
    text, *words = options.teacher
    given = {"weight": WEIGHT, "count": COUNT} | read_fields(words, "--teacher", ("weight", "count", "corrected"))
    is_folder, expected = Path(text).is_dir(), "the folder of a model, or with --cascade a label of it"
    expect(labels or is_folder, "--teacher", expected, repr(text), error=UsageError)
    ranker = open_model(text) if is_folder else text
    with as_usage("--teacher"):
        loss = distill_listwise(corrected=True) if given.get("corrected") else distill_listwise
        return Teacher(ranker, given["weight"] * loss, options.candidates, given["count"])


def read_columns(options: argparse.Namespace) -> Columns | None:
    """Return the columns that options name, or None; FileNotFoundError, UsageError for a file or values that do not fit."""
    settings = flags_given(options, FIELDS)
    if options.columns is None and not settings:
        return None
    with as_usage("columns" if options.columns is None else f"--columns {options.columns}"):
        return Columns(**(read_json(options.columns, "--columns") or {}) | settings)


def read_json(path: Path | None, option: str) -> dict[str, Any] | None:
    """Return the settings in a JSON file, None for None; a UsageError shows none of its contents, which may be secret."""
    if path is None:
        return None
    expect(path.is_file(), f"{option} {path}", "a JSON file of settings", "no such file", error=UsageError)
    try:
        settings = json.loads(path.read_text("utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):  # its contents may be secret
        got = "no JSON" if settings is None else f"JSON of {type(settings).__name__}"
        raise UsageError(f"{option} {path}: expected a JSON object of settings, got {got}")
    return settings


@contextlib.contextmanager
def open_store(url: str, **options: Any) -> Iterator[SnapshotStore]:
    """Open a snapshot store; errors of its file system's client become a `SnapshotError` that names the store."""
    with as_usage("store"):
        store = SnapshotStore(url, **options)
    try:
        yield store
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise SnapshotError(f"{store.url}: cannot be read or written: {type(error).__name__}: {error}") from error


def read_fields(words: Sequence[str], option: str, fields: Sequence[str]) -> dict[str, Any]:
    """Return settings from FIELD=VALUE words, the values in JSON; lists become tuples. UsageError for others."""
    settings = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            value = json.loads(text)
        except ValueError:
            raise UsageError(f"{option}: expected FIELD=VALUE with the value in JSON, got {word!r}") from None
        expect(name in fields, option, f"one of the fields {', '.join(fields)}", repr(name), error=UsageError)
        settings[name] = tuple(value) if isinstance(value, list) else value
    return settings


def meaning(documented: Any, name: str) -> str:
    """Return the docstring's text on one field or argument, without the last full stop."""
    text = inspect.getdoc(documented) or ""  # -OO drops docstrings
    entry = re.search(rf"^  (?:\w+, )*{name}(?:, \w+)*: (.*(?:\n    .*)*)", text, re.M)
    return re.sub(r"\s+", " ", entry[1]).rstrip(".").replace("`", "") if entry else ""


def add_checkpoint(parser: Any, *, required: bool = False, use: str = "") -> None:
    """Add `--checkpoint`; `use` says what for."""
    text = "folder of a checkpoint or an export, or the --out of train" + (f"; {use}" if use else "")
    parser.add_argument("--checkpoint", type=Path, required=required, help=text)


def encoder_of(path: Path, trained: Trained) -> Encoder:
    """Return the encoder of the model at a path. Raises UsageError for one without."""
    with as_usage(str(path)):
        return trained.need_encoder("raw files")
