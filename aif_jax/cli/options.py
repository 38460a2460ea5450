"""What commands share: flags from settings, files of columns, teachers, stores, and one word for each exit code."""

import argparse
import contextlib
import dataclasses
import inspect
import json
import re
import signal
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from aif_jax.checks import UNIONS, expect, fits, text_of
from aif_jax.connectors.snapshot_store import SnapshotError, SnapshotStore
from aif_jax.encoding.columns import Columns
from aif_jax.export.contents import open as open_model
from aif_jax.train.distillation import COUNT, WEIGHT, Teacher
from aif_jax.train.losses import distill_listwise
from aif_jax.train.tasks import TASKS, Task

FINE, PROBLEMS, USAGE, REFUSED = 0, 1, 2, 3
UNREAD = 141  # as shells have it for a command that SIGPIPE ended
Command = Callable[[argparse.Namespace], tuple[int, Any]]
"""What a command does: returns its exit code and what `main` prints, a text or JSON values; None for nothing."""


def fields_of(kind: Any) -> list[str]:
    """Return names of the fields of a dataclass."""
    return [field.name for field in dataclasses.fields(kind)]


_FIELDS_OF = {name: ", ".join(fields_of(kind)) for name, kind in TASKS.items()}
TASK_HELP = f"a task and its fields, of {'; '.join(f'{name} ({fields})' for name, fields in _FIELDS_OF.items())}"


class UsageError(Exception):
    """Options that do not fit together, or a settings file that cannot be read."""


@contextlib.contextmanager
def as_usage(option: str) -> Iterator[None]:
    """Turn what a value of an option raises into a `UsageError` that names the option."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(f"{option}: {error}") from error


class Parser(argparse.ArgumentParser):
    """A parser, and those of its commands: flags are taken as written, `--check` is no `--checkpoint`; errors are raised."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f"{message}; see {self.prog} --help")


class Value(argparse.Action):
    """A flag whose value is what `make` returns for its words; without `nargs`, for its word."""

    def __init__(self, *args: Any, make: Callable[[Any], Any], **options: Any):
        super().__init__(*args, **options)
        self.make = make

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        """Set the value."""
        with as_usage(str(option_string)):
            setattr(namespace, self.dest, self.make(values))


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


def add_command(commands: Any, name: str, run: Command) -> argparse.ArgumentParser:
    """Add a command to what `add_subparsers` returned; the docstring of `run` is its help text."""
    text = inspect.getdoc(run)  # None with -OO
    one = commands.add_parser(name, help=text, description=text)
    one.set_defaults(run=run)
    commands.metavar = "|".join(commands.choices)
    return one


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add `--quiet`, which `main` looks at."""
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Add `--columns`."""
    text = """which column is what: fields of aif_jax.Columns in a JSON file, or as JSON, such as '{"item": "sku"}'"""
    parser.add_argument("--columns", action=Value, make=read_columns, metavar="FILE|JSON", help=text)


def add_flags(parser: Any, documented: Any, names: Iterable[str] | Mapping[str, str]) -> None:
    """Add flags for some fields of a dataclass, or arguments of a function, by the same names or those in a mapping.

    Types and defaults come from the signature, help texts from the lines "NAME: text" of the docstring; `flags_given` reads
    them. Type `Any` takes a number or a date, a dataclass FIELD=VALUE words; "none" is None if allowed.
    """
    flags = names if isinstance(names, Mapping) else {name: name for name in names}
    parameters = inspect.signature(documented).parameters
    written = {name: parameters[name].annotation for name in flags}  # others may name types that are no values
    hints = typing.get_type_hints(type("Flags", (), {"__annotations__": written}), vars(sys.modules[documented.__module__]))
    for name, flag in flags.items():
        text = flag_help(documented, name, parameters[name].default)
        option = {"dest": flag, "default": argparse.SUPPRESS, "help": text} | _option(hints[name])
        parser.add_argument("--" + flag.replace("_", "-"), **option)


def _option(hint: Any) -> dict[str, Any]:
    """Return what `add_argument` is told of a flag with values of a type."""
    kinds, parts = typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,), _parts(hint)
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}
    if dataclasses.is_dataclass(hint):
        fields = {"nargs": "+", "metavar": "FIELD=VALUE"}
        return fields | {"action": Value, "make": lambda words: hint(**read_fields(words, fields_of(hint)))}  # type: ignore[operator]
    words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
    inner = next((typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is tuple), ())
    count: Any = 1 if not inner else 2 if inner == (Any, Any) else "*"

    def read(word: str) -> Any:
        if word == "none" and type(None) in kinds:
            return None
        return word if str in parts else Path(word) if Path in parts else number_or_text(word)

    def make(texts: list[str]) -> Any:
        values = tuple(map(read, texts))
        value = values[0] if count == 1 or (len(values) == 1 and fits(values[0], hint)) else values
        if not fits(value, hint):
            raise ValueError(f"expected {text_of(hint)}, got {value!r}")
        return value

    names = {Any: "NUMBER|DATE", str: "NAME", Path: "PATH", int: "NUMBER", float: "NUMBER"}
    shown = next((name for kind, name in names.items() if kind in parts), None)
    metavar: Any = ("FROM", "BEFORE") if count == 2 else "|".join(filter(None, [*words, shown]))
    return {"action": Value, "make": make, "nargs": count, "metavar": metavar}


def _parts(hint: Any) -> set[Any]:
    """Return a type and all that it is made of."""
    return {hint}.union(*map(_parts, typing.get_args(hint)))


def flag_help(documented: Any, name: str, default: Any) -> str:
    """Return meaning and default of an argument; "; None: WHAT" of the docstring is the default where that is None."""
    text, _, without = meaning(documented, name).partition("; None: ")
    if dataclasses.is_dataclass(default):
        return f"{text}; fields in JSON: {', '.join(fields_of(default))}"
    first, _, rest = without.partition(". ")
    if without and default is None:
        default, text = first, f"{text}. {rest}" if rest else text
    words = {"None": "none", "()": "none", "True": "yes", "False": "no"}
    return f"{text} (default: {words.get(str(default), default)})".replace("%", "%%")


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


def read_fields(words: Sequence[str], fields: Sequence[str]) -> dict[str, Any]:
    """Return settings from FIELD=VALUE words, the values in JSON; lists become tuples. ValueError for others."""
    settings = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            value = json.loads(text)
        except ValueError:
            raise ValueError(f"expected FIELD=VALUE with the value in JSON, got {word!r}") from None
        if name not in fields:
            raise ValueError(f"expected one of the fields {', '.join(fields)}, got {name!r}")
        settings[name] = tuple(value) if isinstance(value, list) else value
    return settings


def read_json(path: str) -> dict[str, Any]:
    """Return the settings in a JSON file; a ValueError shows none of its contents, which may be secret."""
    expect(Path(path).is_file(), path, "a JSON file of settings", "no such file")
    try:
        settings = json.loads(Path(path).read_text("utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        got = "no JSON" if settings is None else f"JSON of {type(settings).__name__}"
        raise ValueError(f"{path}: expected a JSON object of settings, got {got}")
    return settings


def read_task(words: Sequence[str]) -> Task:
    """Return the task of the words `NAME FIELD=VALUE...`; ValueError for another name, or fields that do not fit."""
    name, *fields = words
    if name not in TASKS:
        raise ValueError(f"expected one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name](**read_fields(fields, fields_of(TASKS[name])))


def read_columns(word: str) -> Columns:
    """Return the columns in a JSON file or text; ValueError for others."""
    return Columns(**(json.loads(word) if word.startswith("{") else read_json(word)))


def add_teacher(parser: argparse.ArgumentParser, *, label: str = "") -> None:
    """Add `--teacher` and `--candidates`; `label` says what else than a folder the teacher may be."""
    text = f"folder of a trained model{label}, whose scores are trained on too, see train.Teacher; fields: weight in the loss "
    text += f"(default: {WEIGHT:g}), candidates drawn for each sample, count ({COUNT})"
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
    is_folder, expected = Path(text).is_dir(), "the folder of a model, or with --cascade a label of it"
    expect(labels or is_folder, "--teacher", expected, repr(text), error=UsageError)
    ranker = open_model(text) if is_folder else text
    with as_usage("--teacher"):
        fields = {"weight": WEIGHT, "count": COUNT} | read_fields(words, ("weight", "count"))
        return Teacher(ranker, fields["weight"] * distill_listwise, options.candidates, fields["count"])


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


def meaning(documented: Any, name: str) -> str:
    """Return the docstring's text on one field or argument, without the last full stop."""
    text = inspect.getdoc(documented) or ""  # -OO drops docstrings
    entry = re.search(rf"^  (?:\w+, )*{name}(?:, \w+)*: (.*(?:\n    .*)*)", text, re.M)
    return re.sub(r"\s+", " ", entry[1]).rstrip(".").replace("`", "") if entry else ""


def add_checkpoint(parser: Any, *, required: bool = False, use: str = "") -> None:
    """Add `--checkpoint`; `use` says what for."""
    text = "folder of a checkpoint or an export, or the --out of train" + (f"; {use}" if use else "")
    parser.add_argument("--checkpoint", type=Path, required=required, help=text)
