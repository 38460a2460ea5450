"""Options that several commands share: columns of files, a trained model, one word for each exit code."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aif_jax import checkpoint
from aif_jax.checkpoint import Checkpoint, Checkpoints
from aif_jax.columns import Columns
from aif_jax.encoder import Encoder

FINE, PROBLEMS, USAGE = 0, 1, 2


class UsageError(Exception):
    """Options that do not fit together, or a settings file that cannot be read."""


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    """A command of `commands`, what `add_subparsers` returned; `run` returns the exit code."""
    one = commands.add_parser(name, help=text, description=text)
    one.set_defaults(run=run)
    return one


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Adds `--columns FILE` and a flag for each field of `Columns`, with the help text of its docstring."""
    group = parser.add_argument_group("columns of the files (see aif_jax.Columns)")
    group.add_argument("--columns", type=Path, metavar="FILE", help="JSON file with these settings; flags override it")
    for field in dataclasses.fields(Columns):
        flag, text = "--" + field.name.replace("_", "-"), meaning(field.name).replace("%", "%%")
        if isinstance(field.default, bool):
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=None, help=f"{text} (default: {field.default})"
            )
        elif isinstance(field.default, tuple):
            group.add_argument(flag, nargs="*", metavar="NAME", help=f"{text} (default: none)")
        else:
            kind, name = (int, "NUMBER") if isinstance(field.default, int) else (str, "NAME")
            group.add_argument(flag, type=kind, metavar=name, help=f"{text} (default: {field.default})")


def read_columns(options: argparse.Namespace) -> Columns | None:
    """The columns that the options name; None where they name none.

    Raises:
      FileNotFoundError: no such `--columns` file.
      UsageError: a file that is not a JSON object of these settings, or values that do not fit together.
    """
    flags = {field.name: getattr(options, field.name) for field in dataclasses.fields(Columns)}
    settings = {name: value for name, value in flags.items() if value is not None}
    if options.columns is None and not settings:
        return None
    try:
        return Columns.from_json(({} if options.columns is None else json.loads(options.columns.read_text("utf-8"))) | settings)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{options.columns or 'columns'}: {error}") from error


def meaning(name: str) -> str:
    """The docstring of `Columns` on one field, without the last full stop."""
    text = inspect.getdoc(Columns) or ""  # -OO drops docstrings
    entry = re.search(rf"^  (?:\w+, )*{name}(?:, \w+)*: (.*(?:\n    .*)*)", text, re.M)
    return re.sub(r"\s+", " ", entry[1]).rstrip(".").replace("`", "") if entry else ""


def add_checkpoint(parser: Any, *, required: bool = False, use: str = "") -> None:
    """Adds `--checkpoint`; `use` says what for."""
    text = "folder of a checkpoint, or the --out of train" + (f"; {use}" if use else "")
    parser.add_argument("--checkpoint", type=Path, required=required, help=text)


def load_model(path: Path) -> Checkpoint:
    """The checkpoint at a path, or the latest one of a run."""
    if (path / checkpoint.METADATA_FILE).is_file() or not path.is_dir():
        return checkpoint.load(path)
    return Checkpoints(path).restore()


def encoder_of(path: Path, model: Checkpoint) -> Encoder:
    """The encoder of a checkpoint. Raises UsageError for one without."""
    if model.encoder is None:
        raise UsageError(f"{path}: expected a checkpoint with an encoder, to read raw files; it was saved without")
    return model.encoder
