"""Options that name the columns of files: a flag for each field of `Columns`, with the help text of its docstring."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
from pathlib import Path

from aif_jax.columns import Columns


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Adds `--columns FILE` and a flag for each field of `Columns`."""
    group = parser.add_argument_group("columns of the files (see aif_jax.Columns)")
    group.add_argument("--columns", type=Path, metavar="FILE", help="JSON file with these settings; flags override it")
    for field in dataclasses.fields(Columns):
        flag, text = "--" + field.name.replace("_", "-"), meaning(field.name).replace("%", "%%")
        if isinstance(field.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif isinstance(field.default, tuple):
            group.add_argument(flag, nargs="*", metavar="NAME", help=f"{text} (default: none)")
        else:
            kind, name = (int, "NUMBER") if isinstance(field.default, int) else (str, "NAME")
            group.add_argument(flag, type=kind, metavar=name, help=f"{text} (default: {field.default})")


def read_columns(options: argparse.Namespace) -> Columns:
    """The columns that the options name.

    Raises:
      FileNotFoundError: no such `--columns` file.
      argparse.ArgumentTypeError: a file that is not a JSON object of these settings, or values that do not fit together.
    """
    try:
        settings = {} if options.columns is None else json.loads(options.columns.read_text("utf-8"))
        flags = {field.name: getattr(options, field.name) for field in dataclasses.fields(Columns)}
        return Columns(**settings | {name: value for name, value in flags.items() if value is not None})
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{options.columns or 'columns'}: {error}") from error


def meaning(name: str) -> str:
    """The docstring of `Columns` on one field, without the last full stop."""
    text = inspect.getdoc(Columns) or ""  # -OO drops docstrings
    entry = re.search(rf"^  (?:\w+, )*{name}(?:, \w+)*: (.*(?:\n    .*)*)", text, re.M)
    return re.sub(r"\s+", " ", entry[1]).rstrip(".").replace("`", "") if entry else ""
