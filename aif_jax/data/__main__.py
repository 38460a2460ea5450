"""`python -m aif_jax.data check`: lists every problem of one's own event, item and user files.

Exit codes: 0 no problem, 1 problems (or a file that is not there), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from aif_jax.data.check import ORDERS, check
from aif_jax.data.columns import Columns
from aif_jax.data.problems import CAP
from aif_jax.data.tabular import load_vocabularies

CLEAN, PROBLEMS, USAGE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = parser().parse_args(arguments)
    try:
        given = {} if options.columns is None else json.loads(Path(options.columns).read_text("utf-8"))
        flags = {field.name: getattr(options, field.name) for field in dataclasses.fields(Columns)}
        columns = Columns(**given | {name: value for name, value in flags.items() if value is not None})
    except (OSError, ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    try:
        report = check(
            options.events,
            items=options.items,
            users=options.users,
            columns=columns,
            vocabularies=None if options.vocabularies is None else load_vocabularies(options.vocabularies),
            order=options.order,
            cap=options.cap,
        )
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return PROBLEMS
    if options.json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        print(report)
    return CLEAN if report.clean else PROBLEMS


def parser() -> argparse.ArgumentParser:
    """The command line; the flags that say which column is what are the fields of `Columns`."""
    whole = argparse.ArgumentParser(
        prog="python -m aif_jax.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(required=True, metavar="check")
    one = commands.add_parser(
        "check",
        help="list every problem of one's own files",
        description="Lists every problem of event, item and user files (Parquet, CSV or TSV), with row numbers.",
        epilog="Exit codes: 0 no problem, 1 problems, 2 wrong usage.",
    )
    one.add_argument("--events", required=True, help="file or folder: one row for each interaction")
    one.add_argument("--items", help="file or folder: one row for each item")
    one.add_argument("--users", help="file or folder: one row for each user")
    one.add_argument("--vocabularies", help="JSON of a trained model (tabular.save_vocabularies); values it lacks are problems")
    one.add_argument("--order", choices=ORDERS, default="auto", help="what the events are sorted by (default: %(default)s)")
    one.add_argument("--cap", type=_positive, default=CAP, help="problems of one kind that are listed (default: %(default)s)")
    one.add_argument("--json", action="store_true", help="print the report as JSON")
    which = one.add_argument_group("which column is what (see aif_jax.data.columns.Columns)")
    which.add_argument("--columns", help="JSON file with these settings; the flags below go before it")
    for field in dataclasses.fields(Columns):
        flag, text = "--" + field.name.replace("_", "-"), _meaning(field.name).replace("%", "%%")
        if isinstance(field.default, bool):
            which.add_argument(flag, action="store_true", default=None, help=text)
        elif isinstance(field.default, tuple):
            which.add_argument(flag, nargs="+", metavar="NAME", help=f"{text} (default: none)")
        else:
            kind = int if isinstance(field.default, int) else str
            name = "NUMBER" if kind is int else "NAME"
            which.add_argument(flag, type=kind, metavar=name, help=f"{text} (default: {field.default})")
    return whole


def _meaning(name: str) -> str:
    """What the docstring of `Columns` says of a field."""
    text = inspect.getdoc(Columns) or ""  # Python 3.13 indents docstrings otherwise than those before, and -OO drops them
    found = re.search(rf"^  (?:\w+, )*{name}(?:, \w+)*: (.*(?:\n    .*)*)", text, re.M)
    return re.sub(r"\s+", " ", found[1]).rstrip(".").replace("`", "") if found else ""


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
