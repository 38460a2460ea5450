"""The command line `aif-jax`: check files, train, build and follow an index, export, verify, refresh, serve.

Exit codes, the same for every command: 0 fine; 1 problems were found, a folder failed its verification, or data was refused;
2 the command could not start: wrong usage, a file or package that is missing, an output that exists already; 3 `refresh`
refused a model; 141 nobody reads the output any more, as after `| head`.

Commands keep compiled programs in the user's cache folder. `JAX_COMPILATION_CACHE_DIR` names another folder;
`JAX_ENABLE_COMPILATION_CACHE=false` keeps none.
"""

import argparse
import json
import logging
import os
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from aif_jax.checks import ArgumentError
from aif_jax.cli.commands import add_commands, add_refresh_commands
from aif_jax.cli.options import PROBLEMS, UNREAD, USAGE, Parser, UsageError
from aif_jax.cli.service import add_service_commands, add_snapshot_commands
from aif_jax.output import hidden
from aif_jax.store.folders import compiled_folder

__all__ = ["main"]
logger = logging.getLogger(__name__)


def parser_of() -> argparse.ArgumentParser:
    """Return the parser of every command, whose options `main` runs."""
    parser = Parser(prog="aif-jax", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--import", dest="modules", metavar="MODULE", action="append", default=[],
        help="module with blocks and heads of your own, before the command; may be repeated",
    )  # fmt: skip
    commands = parser.add_subparsers(required=True)
    add_commands(commands)
    add_snapshot_commands(commands)
    add_refresh_commands(commands)
    add_service_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; `argv` None takes the words of this process. Returns the exit code; reasons are on stderr.

    Example:
      >>> main(["index", "verify", "no-such-folder"])
      2
    """
    try:
        try:
            code, told = _run(argv)
            if told is not None:
                print(told if isinstance(told, str) else json.dumps(told, indent=2))
            return code
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # at the end of the process a closed pipe would leave a traceback
    except OSError as error:  # of stdout: nobody reads it any more, or its disk is full
        unread = isinstance(error, BrokenPipeError)
        if not unread:
            print(f"error: stdout: {error}", file=sys.stderr)
        with open(os.devnull, "wb") as nowhere:  # where what is left to write goes
            os.dup2(nowhere.fileno(), (sys.stdout or sys.stderr).fileno())
        return UNREAD if unread else PROBLEMS


def _run(argv: Sequence[str] | None) -> tuple[int, Any]:
    """Return the exit code of a command, and what is printed; its errors go to stderr."""
    try:
        options = parser_of().parse_args(argv)
        for module in options.modules:
            pkgutil.resolve_name(module)
        keep_compiled()
        with hidden(getattr(options, "quiet", False)):
            return options.run(options)
    except (UsageError, ArgumentError, FileNotFoundError, FileExistsError, NotADirectoryError, ImportError) as error:
        code, text = USAGE, error
    except (ArithmeticError, OSError, RuntimeError, TypeError, ValueError, *_of_clients()) as error:
        code, text = PROBLEMS, error
    print(f"error: {text}", file=sys.stderr)
    return code, None


def keep_compiled() -> Path | None:
    """Let JAX keep and load compiled programs in this process, in the folder that is set already or in `compiled_folder()`.

    Returns:
      The folder; None where it cannot be written, which a warning says: programs are then compiled again.
    """
    if (chosen := getattr(jax.config, "jax_compilation_cache_dir", None)) is not None:
        return Path(chosen)
    try:
        folder = compiled_folder()
    except OSError as error:
        logger.warning("%s", error)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return folder


def _of_clients() -> list[type[Exception]]:
    """Return exceptions of the loaded client of a broker, such as for a server that does not answer."""
    client = sys.modules.get("confluent_kafka")
    return [] if client is None else [client.KafkaException]
