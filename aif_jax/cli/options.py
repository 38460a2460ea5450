"""What commands share: groups of flags, teachers, stores, and one word for each exit code."""

import contextlib
import dataclasses
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from cyclopts import Parameter

from aif_jax.checks import expect
from aif_jax.connectors.snapshot_store import SnapshotStore
from aif_jax.data.dataset import Dataset
from aif_jax.encoding.columns import Columns
from aif_jax.export.contents import open as open_model
from aif_jax.readers import read
from aif_jax.train.distillation import COUNT, WEIGHT, Teacher
from aif_jax.train.losses import distill_listwise
from aif_jax.train.tasks import TASKS, Task

FINE, PROBLEMS, USAGE, REFUSED = 0, 1, 2, 3
UNREAD = 141  # as shells have it for a command that SIGPIPE ended
Result: TypeAlias = tuple[int, Any]
"""What a command returns: its exit code and what `main` prints, a text or JSON values; None for nothing."""
FLAGS = Parameter(name="*")
"""Marks a dataclass whose fields are flags of the command, by their names."""


class UsageError(Exception):
    """Options that do not fit together, or a settings file that cannot be read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """Files of a data set.

    Attributes:
      events: file or folder: one row for each interaction.
      items: file or folder: one row for each item.
      users: file or folder: one row for each user.
    """

    events: str
    items: str
    users: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingFiles(Files):
    """Files of a data set, and how they are read.

    Attributes:
      unknown: for users, items, actions and categories that encoder, file of items or users, or `Columns.actions` lack: error,
        or skip, see `read`: leaves out lines of unknown users, their events, which item statistics alone count, and lines of
        the items file with an unknown item. Others become row 0: events with an unknown item are no positives, those with an
        unknown action no candidates of Impressions. A warning counts them.
      repeats: whether users come back to items, see `Dataset`. Default: as estimated, see the log; in add as the run has it.
    """

    unknown: Literal["error", "skip"] = "error"
    repeats: bool | None = None

    def read(self, **given: Any) -> Dataset:
        """Return the data set."""
        return read(**vars(self), **given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teaching:
    """The teacher of a training.

    Attributes:
      teacher: folder of a trained model, or with --cascade a label, whose scores are trained on too, see `train.Teacher`.
      teacher_weight: weight of these scores in the loss.
      teacher_count: retrieved or logged candidates that are drawn for each sample.
      candidates: file of what retrieval finds, for the teacher to score: a line for each candidate of a request, in order, with
        the columns of user, item and time that the events have; about 64 for each training event are enough.
    """

    teacher: str | None = None
    teacher_weight: float = WEIGHT
    teacher_count: int = COUNT
    candidates: str | None = None

    def read(self, *, labels: bool = False) -> Teacher | None:
        """Return the model in a folder or, where there are `labels`, the label as a teacher; UsageError for another."""
        if self.teacher is None:
            expect(self.candidates is None, "--candidates", "a ranker of them", "none; give --teacher", error=UsageError)
            return None
        is_folder, expected = Path(self.teacher).is_dir(), "the folder of a model, or with --cascade a label of it"
        expect(labels or is_folder, "--teacher", expected, repr(self.teacher), error=UsageError)
        ranker = open_model(self.teacher) if is_folder else self.teacher
        with as_usage("--teacher"):
            return Teacher(ranker, self.teacher_weight * distill_listwise, self.candidates, self.teacher_count)


@contextlib.contextmanager
def as_usage(option: str) -> Iterator[None]:
    """Turn what a value of an option raises into a `UsageError` that names the option."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(f"{option}: {error}") from error


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether this process got SIGTERM or SIGINT."""
    told: list[int] = []
    handlers = {number: signal.signal(number, lambda got, _: told.append(got)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(told)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def read_fields(words: Sequence[str], fields: Sequence[str]) -> dict[str, Any]:
    """Return settings from FIELD=VALUE words, the values in JSON; lists become tuples. ValueError for others."""
    settings = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            value = json.loads(text)
        except ValueError:
            raise ValueError(f"expected FIELD=VALUE with the value in JSON, got {word!r}") from None
        if name not in fields:
            raise ValueError(f"expected one of the fields {', '.join(fields)}, got {name!r}")
        settings[name] = tuple(value) if isinstance(value, list) else value
    return settings


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the settings in a JSON file; a ValueError shows none of its contents, which may be secret."""
    expect(Path(path).is_file(), str(path), "a JSON file of settings", "no such file")
    try:
        settings = json.loads(Path(path).read_text("utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        got = "no JSON" if settings is None else f"JSON of {type(settings).__name__}"
        raise ValueError(f"{path}: expected a JSON object of settings, got {got}")
    return settings


def read_task(words: Sequence[str] | None) -> Task | None:
    """Return the task of the words `NAME FIELD=VALUE...`; UsageError for another name, or fields that do not fit."""
    if words is None:
        return None
    with as_usage("--task"):
        name, *fields = words
        expect(name in TASKS, "name", f"one of {', '.join(TASKS)}", repr(name))
        return TASKS[name](**read_fields(fields, list(TASKS[name].__dataclass_fields__)))


def read_columns(text: str | None) -> Columns | None:
    """Return the columns in a JSON file or text; UsageError for others."""
    if text is None:
        return None
    with as_usage("--columns"):
        return Columns(**(json.loads(text) if text.startswith("{") else read_json(text)))


def open_store(url: str, **options: Any) -> SnapshotStore:
    """Return a snapshot store; UsageError for what is none."""
    with as_usage("store"):
        return SnapshotStore(url, **options)
