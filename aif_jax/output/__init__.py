"""Progress on stderr: tqdm's bars on a terminal, nothing elsewhere. The only module that draws.

Standard output stays free for results.
"""

import contextlib
import logging
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, TextIO

from tqdm import tqdm

DELAY, INTERVAL = 0.5, 0.1
"""Seconds before a bar is drawn, and between two drawings."""
logger = logging.getLogger(__name__)
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


class Bar(tqdm):
    """A bar of tqdm without its thread: it draws in `update` alone."""

    monitor_interval = 0


@contextlib.contextmanager
def hidden(hide: bool = True) -> Iterator[None]:
    """Show no bar within, if `hide`: what `--quiet` and `progress=False` do."""
    token = _quiet.set(hide or _quiet.get())
    try:
        yield
    finally:
        _quiet.reset(token)


def say(line: str, *, file: TextIO | None = None) -> None:
    """Print a line on stderr, above the bar where there is one; where bars are hidden it goes to the log as INFO."""
    if _quiet.get():
        return logger.info(line)
    tqdm.write(line, file=sys.stderr if file is None else file)


def track(values: Iterable[Any] | None = None, *, label: str, unit: str, **options: Any) -> Bar:
    """Return a bar of tqdm over values; without them a context whose `update(count)` counts.

    Args:
      values: what is iterated and counted.
      label: what is counted.
      unit: plural noun of the things that are counted.
      options: arguments of tqdm such as `total`, and `leave=False` for a bar that always goes; by default those within others
        go and the outermost stays.
    """
    drawn: dict[str, Any] = {"delay": DELAY, "mininterval": INTERVAL, "miniters": 1}
    options = {"leave": None, "disable": _quiet.get() or None, "ncols": shutil.get_terminal_size().columns} | drawn | options
    return Bar(values, desc=label, unit=f" {unit}", **options)
