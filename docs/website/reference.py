"""Writes the generated pages of the reference: `python docs/website/reference.py`; a test holds that they are current.

The command line comes from its parsers, settings from their dataclasses, errors from the names of api.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from aif_jax.cli import parser_of
from aif_jax.cli.options import meaning
from aif_jax.refreshing import GateConfig, RefreshConfig
from aif_jax.serving import ServingConfig
from aif_jax.train import FitConfig

DOCS = Path(__file__).resolve().parent.parent


def commands(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Every command that runs something, in the order of the help, with its parser."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield words, parser
    for action in below:
        for name, one in action.choices.items():
            yield from commands(one, (*words, name))


def cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def told(action: argparse.Action) -> str:
    """The help text of an argument, as argparse prints it."""
    return (action.help or "") % {"default": action.default}


def flag(action: argparse.Action) -> str:
    """How an argument is written."""
    value = action.metavar or ("" if action.nargs == 0 else action.dest.upper())
    value = " ".join(value) if isinstance(value, tuple) else value
    if action.choices:
        value = "|".join(map(str, action.choices))
    if not action.option_strings:
        return value
    several = " ..." * (action.nargs in ("*", "+") and not isinstance(action.metavar, tuple))
    return ", ".join(action.option_strings) + ("" if action.nargs == 0 else f" {value}{several}")


HEAD = """# Command line

Generated from the parsers by `python docs/website/reference.py`. Exit codes: 0 fine; 1 problems were found, or data was
refused; 2 the command could not start; 3 `refresh` refused a model; 141 broken pipe.
"""


def command_line() -> str:
    """The page of the command line: what commands share comes first, once, and a flag's most frequent meaning."""
    parsers = [(words, one, list(map(row, filter(shown, one._actions)))) for words, one in commands(parser_of())]
    single = [each for _, _, rows in parsers for each in rows]
    often = {each for each in single if single.count(each) > 1 and each[0].startswith("`--")}
    shared = sorted({bare(one[0]): one for one in sorted(often, key=lambda one: (single.count(one), one))}.values())
    before = listing(map(row, filter(shown, parser_of()._optionals._group_actions)))
    parts = [HEAD, "## Before the command\n", before, "## Shared arguments\n", listing(shared)]
    for words, one, rows in parsers:
        text = re.sub(r"`(Run\.\w+)`", r"[`\1`](api.md#aif_jax.\1)", one.description or "")
        parts.append(f"## aif-jax {' '.join(words)}\n{text}\n")
        others = ", ".join(f"`{bare(name)}`" for name, text in rows if (name, text) in shared)
        own = listing(each for each in rows if each not in shared)
        parts.append(own + f"- {others} ([shared](#shared-arguments))\n" * bool(others))
    return "\n".join(parts)


def bare(name: str) -> str:
    """The flag of "`--flag VALUE`"."""
    return re.split("[ ,`]", name[1:])[0]


def shown(action: argparse.Action) -> bool:
    """Whether `--help` of a command tells of it, --help itself left out."""
    return action.help is not argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)


def row(action: argparse.Action) -> tuple[str, str]:
    """An argument and its meaning."""
    required = "required. " * bool(action.required and action.option_strings)
    return f"`{flag(action)}`".replace(", --", "`, `--"), required + re.sub(r"\s+", " ", told(action)).strip()


DEFAULT = re.compile(r" ?\(default: ([^()]*)\)$")


def listing(rows: Iterable[tuple[str, str]]) -> str:
    """Arguments with their meanings; neighbours that differ in name and default alone share a line."""
    merged: list[tuple[list[str], str, list[str]]] = []
    for name, told_of in rows:
        text, default = DEFAULT.sub("", told_of), DEFAULT.findall(told_of)
        if merged and merged[-1][1] == text and bool(default) == bool(merged[-1][2]):
            merged[-1][0].append(name)
            merged[-1][2].extend(default)
        else:
            merged.append(([name], text, default))
    lines = []
    for names, text, defaults in merged:
        text += f" (default: {', '.join(defaults[:1] if len(set(defaults)) == 1 else defaults)})" * bool(defaults)
        lines.append(f"- {', '.join(names)}: {text}".replace(":  (", " (").rstrip(": ") + "\n")
    return "".join(lines)


def fields(kind: type) -> Iterator[str]:
    """A row for each field of a dataclass: name, default, meaning. Neighbours with one meaning share a row."""
    rows: list[tuple[list[str], list[str], str]] = []
    for name, default, text in _fields(kind):
        if rows and rows[-1][2] == text:
            rows[-1][0].append(name)
            rows[-1][1].append(default)
        else:
            rows.append(([name], [default], text))
    return (f"| {', '.join(names)} | {', '.join(dict.fromkeys(defaults))} | {text} |" for names, defaults, text in rows)


def _fields(kind: type) -> Iterator[tuple[str, str, str]]:
    parameters = inspect.signature(kind).parameters
    for field in dataclasses.fields(kind):
        default = parameters[field.name].default
        factory = field.default_factory
        default = default if factory is dataclasses.MISSING else factory()
        value = "required" if default is inspect.Parameter.empty else f"`{default!r}`"
        yield f"`{field.name}`", cell(value), cell(meaning(kind, field.name))


def settings() -> str:
    """The page of the settings and the errors."""
    kinds: dict[str, tuple[type, str]] = {
        "FitConfig": (FitConfig, "A training run. In `aif-jax train`: a flag for each field, `--batch-size 256`."),
        "RefreshConfig": (RefreshConfig, "A refresh. In `aif-jax refresh`: a flag for each field."),
        "ServingConfig": (ServingConfig, "An engine. In `aif-jax serve`: `--serving FIELD=VALUE`."),
        "GateConfig": (GateConfig, "When a refreshed model is refused. In `aif-jax refresh`: `--gate FIELD=VALUE`."),
    }
    parts = ["# Settings and errors\n\nGenerated by `python docs/website/reference.py`. Settings of a service are the flags of"]
    parts[0] += "\n[`aif-jax serve`](reference_cli.md#aif-jax-serve).\n"
    for name, (kind, text) in kinds.items():
        parts.append(
            "\n".join([f"## {name}\n\n{text}\n", "| field | default | meaning |", "|---|---|---|", *fields(kind)]) + "\n"
        )
    return "\n".join([*parts, ERRORS, *errors()]) + "\n"


ERRORS = """## Errors

Wrong arguments are a `ValueError` or `TypeError` whose message says where, what was expected and got, and what to do. Others:

| error | is a | when |
|---|---|---|"""


def errors() -> Iterator[str]:
    """A row for each exception of the API reference."""
    spec = importlib.util.spec_from_file_location("entries", Path(__file__).parent / "entries.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(entries := importlib.util.module_from_spec(spec))
    for name in sorted(entries.names((DOCS / "api.md").read_text(encoding="utf-8")), key=lambda name: name.rpartition(".")[2]):
        package, _, last = name.rpartition(".")
        kind = getattr(importlib.import_module(package), last)
        if inspect.isclass(kind) and issubclass(kind, Exception):
            base = next(base.__name__ for base in kind.__mro__ if base.__module__ == "builtins")
            text = cell((inspect.getdoc(kind) or "").partition("\n\n")[0])
            yield f"| [`{last}`](api.md#{name}) | `{base}` | {text} |"


PAGES: dict[str, Any] = {"reference_cli.md": command_line, "reference_settings.md": settings}


def main() -> None:
    """Writes the pages."""
    for name, made in PAGES.items():
        (DOCS / name).write_text(made(), encoding="utf-8")
        print(f"written: docs/{name}")


if __name__ == "__main__":
    main()
