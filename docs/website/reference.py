"""Writes the generated pages of the reference: `python docs/website/reference.py`; a test holds that they are current.

The command line comes from its parsers, settings from their dataclasses.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aif_jax.cli import parser_of
from aif_jax.cli.options import meaning
from aif_jax.refreshing import GateConfig
from aif_jax.service.core import Policy
from aif_jax.serving import ServingConfig

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
        value = " or ".join(map(str, action.choices))
    if not action.option_strings:
        return value
    names = [name for name in action.option_strings if not name.startswith("--no-")]
    return ", ".join(names) + ("" if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction) else f" {value}")


def command_line() -> str:
    """The page of the command line."""
    parts = [
        "# Command line\n",
        "Generated from the parsers by `python docs/website/reference.py`. Exit codes: 0 fine; 1 problems",
    ]
    parts[-1] += " were found, or data was refused; 2 the command could not start; 3 the gate of `refresh` refused a model.\n"
    first: dict[tuple[str, ...], str] = {}
    for words, one in commands(parser_of()):
        name, told_before = f"aif-jax {' '.join(words)}", []
        parts.append(f"## {name}\n\n{one.description or ''}\n")
        rows = []
        for group in one._action_groups:
            made = tuple(row(action) for action in group._group_actions if shown(action))
            if len(made) > 3 and (earlier := first.setdefault(made, name)) != name:
                told_before.append(f"Also the {group.title}, as for [{earlier}](#{earlier.replace(' ', '-')}).\n")
            else:
                rows += made
        parts += ["\n".join(["| argument | meaning |", "|---|---|", *rows]) + "\n"] * bool(rows) + told_before
    return "\n".join(parts)


def shown(action: argparse.Action) -> bool:
    """Whether `--help` of a command tells of it, --help itself left out."""
    return action.help is not argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)


def row(action: argparse.Action) -> str:
    """An argument as a row of a table."""
    return f"| `{cell(flag(action))}` | {'required. ' * bool(action.required and action.option_strings)}{cell(told(action))} |"


def fields(kind: type) -> Iterator[str]:
    """A row for each field of a dataclass: name, default, meaning."""
    parameters = inspect.signature(kind).parameters
    for field in dataclasses.fields(kind):
        default = parameters[field.name].default
        factory = field.default_factory
        default = default if factory is dataclasses.MISSING else factory()
        shown = "required" if default is inspect.Parameter.empty else f"`{default!r}`"
        yield f"| `{field.name}` | {cell(shown)} | {cell(meaning(kind, field.name))} |"


def settings() -> str:
    """The page of the settings."""
    kinds: dict[str, tuple[type, str]] = {
        "ServingConfig": (ServingConfig, "An engine. In `aif-jax serve`: `--serving FIELD=VALUE`."),
        "Policy": (Policy, "A service: flags of `aif-jax serve`."),
        "GateConfig": (GateConfig, "When a refreshed model is refused. In `aif-jax refresh`: `--gate FIELD=VALUE`."),
    }
    parts = ["# Settings\n\nGenerated from the dataclasses by `python docs/website/reference.py`.\n"]
    for name, (kind, text) in kinds.items():
        parts.append(
            "\n".join([f"## {name}\n\n{text}\n", "| field | default | meaning |", "|---|---|---|", *fields(kind)]) + "\n"
        )
    return "\n".join(parts)


PAGES: dict[str, Any] = {"reference_cli.md": command_line, "reference_settings.md": settings}


def main() -> None:
    """Writes the pages."""
    for name, made in PAGES.items():
        (DOCS / name).write_text(made(), encoding="utf-8")
        print(f"written: docs/{name}")


if __name__ == "__main__":
    main()
