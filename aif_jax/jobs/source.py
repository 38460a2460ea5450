"""The model of a job, on the machine that plans it and on those that run it: by the path of a folder, or by value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from aif_jax.checks import expect
from aif_jax.encoding.encoder import Encoder
from aif_jax.export.contents import open as open_model
from aif_jax.model import PreRanker, build
from aif_jax.readers.sources import pyarrow
from aif_jax.store.folders import local
from aif_jax.store.trained import Trained
from aif_jax.store.version import VersionMismatch


class Source:
    """Gives a `Trained`; two of one version are equal, so that a process that runs many tasks keeps one compiled program.

    Pickled, it is the path of its folder, or its config and parameters as NumPy arrays; the version goes with it, and a worker
    that finds another one in the folder raises `VersionMismatch`.
    """

    def __init__(self, trained: Trained, folder: Path | None = None):
        trained.need_encoder("job" if folder is None else str(folder))
        self.version = trained.version
        self.folder = folder
        self._trained: Trained | None = trained

    @classmethod
    def of_folder(cls, path: str | Path) -> Source:
        """The model in a folder: an export, a run or a checkpoint; everything in it is checked here and now."""
        folder = local(path)
        return cls(open_model(folder), folder)

    @property
    def encoder(self) -> Encoder:
        """The encoder of the model."""
        return self.open().need_encoder("job")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Source) and (self.version, self.folder) == (other.version, other.folder)

    def __hash__(self) -> int:
        return hash((self.version, self.folder))

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = {"version": self.version, "folder": self.folder}
        if self.folder is not None:
            return state
        trained = self.open()
        same = _functions(trained.model) == _functions(build(trained.config))
        expected = "a model that `build` makes of its config; a job of an assembled one is made on the worker"
        expect(same, "job, to be pickled", expected, repr(trained.model))
        params = jax.tree.map(np.asarray, trained.params)
        return state | {"config": trained.config, "params": params, "encoder": trained.encoder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.version, self.folder, self._trained = state["version"], state["folder"], None
        if self.folder is None:
            trained = Trained(build(state["config"]), state["params"], state["encoder"])
            self._trained = trained.with_version(self.version)

    def open(self) -> Trained:
        """The model; a worker reads it from the folder."""
        if self._trained is None and self.folder is not None:
            trained = open_model(self.folder)
            if trained.version != self.version:
                raise VersionMismatch(f"job, model in {self.folder}", expected=self.version, got=trained.version)
            self._trained = trained
        assert self._trained is not None
        return self._trained


def _functions(model: PreRanker) -> list[Any]:
    """What the components are, without the config bound to them."""
    return [getattr(function, "func", function) for function in (model.user, model.item, model.update_user)]


class Numbered(NamedTuple):
    """Some rows of a batch."""

    number: int  # of the batch in its iterator, from 0
    first: int  # the row of the batch that is the first here
    batch: Any  # Arrow record batch


def refuse(given: Sequence[Numbered], check: Callable[[Any], object], error: Exception, *, id_column: str) -> NoReturn:
    """Raises the error that `check` raised of some rows, with the batch and the first row that it refuses.

    Halves the rows, so it takes a few more calls; an error of no row, such as a missing column, names the batch alone.
    """
    arrow = pyarrow()
    table = arrow.Table.from_batches([one.batch for one in given]).combine_chunks()
    where = (
        f"batch {given[0].number}"
        if given[0].number == given[-1].number
        else f"batches {given[0].number} to {given[-1].number}"
    )
    if not _fails(check, table.slice(0, 0)) and _fails(check, table):
        good, bad = 0, table.num_rows  # rows that pass, rows that do not
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (good, middle) if _fails(check, table.slice(0, middle)) else (middle, bad)
        number, row = _place(given, good)
        name = repr(table.column(id_column)[good].as_py()) if id_column in table.schema.names else "unknown"
        where, error = f"batch {number}, row {row} ({id_column} {name})", _error(check, table.slice(good, 1)) or error
    kind = TypeError if isinstance(error, TypeError) else ValueError
    raise kind(f"{where}: {error}") from error


def _place(given: Sequence[Numbered], row: int) -> tuple[int, int]:
    for one in given:
        if row < one.batch.num_rows:
            return one.number, one.first + row
        row -= one.batch.num_rows
    raise IndexError(row)


def _fails(check: Callable[[Any], object], table: Any) -> bool:
    return _error(check, table) is not None


def _error(check: Callable[[Any], object], table: Any) -> Exception | None:
    try:
        check(table)
    except (TypeError, ValueError) as error:
        return error
    return None
