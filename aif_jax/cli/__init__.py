"""The command line `aif-jax`: check files, train, build and follow an index, export, verify, refresh, serve.

Exit codes, the same for every command: 0 fine; 1 problems were found, a folder failed its verification, data was refused, or a
snapshot was not published; 2 the command could not start: wrong usage, a file or package that is missing, an output that exists
already; 3 `refresh` refused a model; 141 nobody reads the output any more, as after `| head`.

Commands keep compiled programs in the user's cache folder. `JAX_COMPILATION_CACHE_DIR` names another folder;
`JAX_ENABLE_COMPILATION_CACHE=false` keeps none.
"""

import json
import logging
import os
import pkgutil
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import jax
from cyclopts import App, Parameter

from aif_jax.checks import ArgumentError, expect
from aif_jax.cli import commands, doctor, service
from aif_jax.cli.options import FINE, PROBLEMS, UNREAD, USAGE, Result, UsageError
from aif_jax.output import hidden
from aif_jax.store.folders import compiled_folder
from aif_jax.store.trained import __version__

__all__ = ["main"]
logger = logging.getLogger(__name__)

MISUSE = cyclopts.CycloptsError, UsageError, ArgumentError, FileNotFoundError, FileExistsError, NotADirectoryError, ImportError
"""What a command raises that could not start."""
MANY = Parameter(consume_multiple=True, negative_iterable=(), negative_none=(), parse=re.compile("^(?!orders$)"))
"""A flag of several values takes all words up to the next flag; every parameter is a flag but `orders`, of Python functions."""
app = App("aif-jax", help=__doc__, version=__version__, default_parameter=MANY, result_action="return_value")
groups = {
    "": app,
    "index": app.command(App("index", help="Build, update and verify item indexes on disk.")),
    "snapshots": app.command(App("snapshots", help="Look into a snapshot store, publish into it and fetch from it.")),
}
for one in (doctor.doctor, *commands.COMMANDS, *service.COMMANDS):
    group, _, name = one.__name__.rpartition("_")
    groups[group].command(one, name=name)


@app.meta.default
def run(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    modules: Annotated[list[str] | None, Parameter("--import", consume_multiple=False)] = None,
    quiet: Annotated[bool, Parameter(negative="")] = False,
) -> Result:
    """Run the command of some words.

    Args:
      modules: module with blocks and heads of your own; may be repeated.
      quiet: no progress bar.
    """
    for module in modules or ():
        expect(not module.endswith(".py"), "--import", "a module name such as mine", repr(module), error=UsageError)
        try:
            pkgutil.resolve_name(module)
        except ModuleNotFoundError as error:
            raise UsageError(f"--import: expected modules that Python finds, got {error}; set PYTHONPATH=FOLDER") from error
    keep_compiled()
    with hidden(quiet):
        return app(words, exit_on_error=False, print_error=False) or (FINE, None)  # None: of --help


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; `argv` None takes the words of this process. Returns the exit code; reasons are on stderr."""
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
        return app.meta(sys.argv[1:] if argv is None else argv, exit_on_error=False, print_error=False) or (FINE, None)
    except MISUSE as error:
        code, text = USAGE, error
    except (ArithmeticError, OSError, RuntimeError, TypeError, ValueError, *_of_clients()) as error:
        code, text = PROBLEMS, error
    print(f"error: {text}", file=sys.stderr)
    return code, None


def keep_compiled() -> Path | None:
    """Let JAX keep and load compiled programs in the folder that is set, or in `compiled_folder()`; returns it.

    None where it cannot be written, which a warning says: programs are then compiled again.
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
