"""The command line `aif-jax`: check files, train, build and follow an index, export, verify, refresh, serve.

Exit codes, the same for every command: 0 fine; 1 problems were found, a folder failed its verification, or data was refused;
2 the command could not start: wrong usage, a file or package that is missing, an output that exists already; 3 `refresh`
refused a model; 141 nobody reads the output any more, as after `| head`.

Commands keep compiled programs in the user's cache folder. `JAX_COMPILATION_CACHE_DIR` names another folder;
`JAX_ENABLE_COMPILATION_CACHE=false` keeps none.
"""

import argparse
import logging
import os
import pkgutil
import select
import sys
from collections.abc import Sequence
from pathlib import Path

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
    commands.metavar = "|".join(commands.choices)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; `argv` None takes the words of this process. Returns the exit code; reasons are on stderr.

    Example:
      >>> main(["index", "inspect", "no-such-folder"])
      2
    """
    try:
        try:
            return _run(parser_of().parse_args(argv))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # at the end of the process a closed pipe would leave a traceback
    except OSError as error:  # of stdout: nobody reads it any more, or its disk is full
        broken = isinstance(error, BrokenPipeError)
        if broken and not _is_unread():
            raise
        if not broken:
            print(f"error: stdout: {error}", file=sys.stderr)
        with open(os.devnull, "wb") as nowhere:  # where what is left to write goes
            os.dup2(nowhere.fileno(), (sys.stdout or sys.stderr).fileno())
        return UNREAD if broken else PROBLEMS


def _run(options: argparse.Namespace) -> int:
    """Return the exit code of a command; prints what went wrong."""
    try:
        for module in options.modules:
            pkgutil.resolve_name(module)
        keep_compiled()
        with hidden(getattr(options, "quiet", False)):
            return options.run(options)
    except (UsageError, ArgumentError, FileNotFoundError, FileExistsError, NotADirectoryError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except (ArithmeticError, OSError, RuntimeError, TypeError, ValueError, *_of_clients()) as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            raise
        print(f"error: {error}", file=sys.stderr)
        return PROBLEMS


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
    """Return exceptions of the loaded clients of brokers, such as for a server that does not answer."""
    named = (("redis", "RedisError"), ("confluent_kafka", "KafkaException"))
    return [getattr(sys.modules[module], name) for module, name in named if module in sys.modules]


def _is_unread() -> bool:
    """Return whether stdout is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # none, closed, or no file
        return False
