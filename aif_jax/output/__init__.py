"""Progress on stderr for people and for logs: bars on a terminal, a plain line every few seconds elsewhere.

The only module that draws. Standard output stays free for results, such as those of `--json`.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

EVERY = 5.0
"""Seconds between two lines where there is no terminal; what ends earlier prints none."""
DELAY = 0.5
"""Seconds before a bar is drawn."""
SCALED = 100_000  # a bar of so many shows thousands as k
T = TypeVar("T")
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_clock = time.monotonic
_told: dict[int, float] = {}  # when a line was last written, by the id of its file


@contextlib.contextmanager
def hidden(hide: bool = True) -> Iterator[None]:
    """No bar and no line of progress within, if `hide`: what `--quiet` does."""
    token = _quiet.set(hide or _quiet.get())
    try:
        yield
    finally:
        _quiet.reset(token)


def say(line: str, *, file: TextIO | None = None) -> None:
    """Prints a line on stderr, above the bar where there is one."""
    file = sys.stderr if file is None else file
    if _is_terminal(file):
        tqdm.write(line, file=file)
    else:
        print(line, file=file, flush=True)


def track(values: Iterable[T], *, total: int | None = None, **options: Any) -> Iterator[T]:
    """The same values, counted by a `Bar` of these options; `total` defaults to their length."""
    if total is None:
        total = len(values) if hasattr(values, "__len__") else None  # type: ignore[arg-type]
    with Bar(total, **options) as bar:
        for value in values:
            yield value
            bar.update(1)


class Bar:
    """A counter that shows itself: a bar on a terminal, `EVERY` seconds a line on any other file, nothing without `show`.

    On a terminal bars within others are cleared when they close; the outermost stays with its last count. A line has count,
    share, rate and, from the second on, time left, and no control character. `close` adds a last line if there was one.

    Args:
      total: how many there are; None where nobody knows.
      label: what is counted.
      unit: plural noun of the things that are counted.
      show: False for `progress=False`.
      leave: whether an outermost bar stays on the terminal.
      file: where to write; None is stderr.
    """

    def __init__(
        self, total: int | None = None,
        *, label: str, unit: str, show: bool = True, leave: bool = True, file: TextIO | None = None,
    ):  # fmt: skip
        self.total, self.label, self.unit, self.done = total, label, unit, 0
        self._file, self._notes = sys.stderr if file is None else file, ""
        self._show = show and not _quiet.get()
        self._began = self._since = _clock()
        self._counted = 0  # at the last line
        self._lines = 0
        self._bar: tqdm | None = None
        if self._show and _is_terminal(self._file):
            size: dict[str, Any] = {"ncols": shutil.get_terminal_size().columns, "unit_scale": (total or 0) >= SCALED}
            stays = None if leave else False  # None: the outermost does
            self._bar = tqdm(total=total, desc=label, unit=f" {unit}", leave=stays, file=self._file, delay=DELAY, **size)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """Adds to the count."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._show and _clock() - max(self._since, _told.get(id(self._file), 0.0)) >= EVERY:
            self._line()

    def note(self, **values: object) -> None:
        """Values to show behind the count, such as a loss."""
        self._notes = ", ".join(f"{name} {value}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._notes)

    def close(self) -> None:
        """Ends the bar; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()
        elif self._show and self._lines:
            self._print(f"{self._count()} in {tqdm.format_interval(_clock() - self._began)}")
        self._bar, self._show = None, False

    def _count(self) -> str:
        if self.total is None:
            return f"{self.label}: {self.done:,} {self.unit}"
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        return f"{self.label}: {self.done:,} of {self.total:,} {self.unit}{share}"

    def _line(self) -> None:
        """Writes a line; its rate is that since the line before it."""
        now = _clock()
        rate = (self.done - self._counted) / (now - self._since)
        parts = [self._count(), f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s"]
        if self.total is not None and rate > 0 and self._lines:  # the first rate includes compile time
            parts.append(f"{tqdm.format_interval(max(0, self.total - self.done) / rate)} left")
        self._print(", ".join(parts) + (f"; {self._notes}" if self._notes else ""))
        self._since, self._counted, self._lines = now, self.done, self._lines + 1

    def _print(self, line: str) -> None:
        print(line, file=self._file, flush=True)
        _told[id(self._file)] = _clock()


def _is_terminal(file: Any) -> bool:
    return bool(getattr(file, "isatty", bool)())
