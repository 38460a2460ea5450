"""Writers of a run's figures: JSON lines and TensorBoard. A resumed run leaves no step twice."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any, Protocol

from aif_jax.folders import local

FLUSH_SECONDS = 5


class LogWriter(Protocol):
    """What the training loop calls."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one row."""
        ...

    def rewind(self, step: int) -> None:
        """Drops the rows behind `step`, which a run that starts there will write again; at 0 all of them."""
        ...


class JsonLines:
    """One JSON object a line: {"step": ..., "loss": ...}, on disk when `write` returns; null for values that are not finite.

    Example:
      >>> import tempfile
      >>> log = JsonLines(tempfile.mkdtemp() + "/log.jsonl")
      >>> log.write(10, {"loss": 0.5}), log.write(20, {"loss": 0.25}), log.rewind(10), log.write(20, {"loss": 0.2})
      (None, None, None, None)
      >>> [row["loss"] for row in log.rows()]
      [0.5, 0.2]
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = local(path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")

    def rewind(self, step: int) -> None:
        """Keeps the rows up to `step`."""
        if self.path.exists():
            text = "".join(json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step)
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, self.path)  # a process that is killed leaves the old rows or the new ones

    def rows(self) -> list[dict[str, Any]]:
        """The rows, without an unfinished last line. Raises ValueError for any other line that is not JSON."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        rows = []
        for number, line in enumerate(lines, 1):
            if number == len(lines) and not line.endswith("\n"):
                break
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number}: expected JSON, got {line[:80]!r}") from error
        return rows


class TensorBoard:
    """Scalars for TensorBoard through tensorboardX, whose thread writes within seconds; each start has a file in `folder`.

    Raises:
      ImportError: tensorboardX is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        try:
            import tensorboardX
        except ImportError as error:
            raise ImportError('TensorBoard logs need tensorboardX: pip install "aif_jax[tensorboard]"') from error
        self._module = tensorboardX
        self.folder = local(folder)
        self._writer: Any = None

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to the curve of each figure."""
        writer = self._writer or self._open(None)
        for name, value in values.items():
            writer.add_scalar(name, float(value), step)

    def rewind(self, step: int) -> None:
        """Begins a new event file, which tells TensorBoard to drop the points behind `step`."""
        self.close()
        self._open(step + 1)

    def _open(self, purge_step: int | None) -> Any:
        # The name must differ from that of a run that was killed within the same second: the file would be written over.
        suffix = f".{time.time_ns()}"
        self._writer = self._module.SummaryWriter(
            str(self.folder), purge_step=purge_step, flush_secs=FLUSH_SECONDS, filename_suffix=suffix
        )
        return self._writer

    def close(self) -> None:
        """Closes the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
