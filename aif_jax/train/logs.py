"""Writers of a run's figures: JSON lines and TensorBoard. A resumed run leaves no step twice."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from aif_jax.checks import needs_extra
from aif_jax.store.folders import local, sync, write_file

logger = logging.getLogger(__name__)
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
        fresh = not self.path.exists()
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if fresh:
            sync(self.path.parent)

    def rewind(self, step: int) -> None:
        """Keeps the rows up to `step`."""
        if self.path.exists():
            self._replace([row for row in self.rows() if row["step"] <= step])

    def restore(self, step: int, figures: Mapping[int, Mapping[str, float]]) -> None:
        """Adds rows that a power cut took, as far as checkpoints have them, and reports which are gone.

        Args:
          step: up to which a run has rows, its last one among them, such as the step of its last checkpoint.
          figures: what is known of some steps.
        """
        rows = [row for row in self.rows() if row["step"] <= step]
        last = max((row["step"] for row in rows), default=0)
        if last >= step:
            return
        lost = {at: dict(known) for at, known in figures.items() if last < at <= step and known}
        logger.warning(
            "%s: the rows of the steps after %d up to %d are gone; the figures of the steps %s come from the checkpoints",
            self.path, last, step, sorted(lost),
        )  # fmt: skip
        self._replace(rows + [{"step": at, **lost[at]} for at in sorted(lost)])

    def rows(self) -> list[dict[str, Any]]:
        """The rows, without an unfinished last line, which is reported. ValueError for any other line that is not JSON."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            logger.warning("%s, line %d: left out, it is cut: %r", self.path, len(lines), lines.pop()[:80])
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                text = line[:80].decode("utf-8", "replace")
                raise ValueError(f"{self.path}, line {number}: expected JSON, got {text!r}") from error
        return rows

    def _replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())


class TensorBoard:
    """Scalars for TensorBoard through tensorboardX, whose thread writes within seconds; each start has a file in `folder`.

    Raises:
      ImportError: tensorboardX is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        with needs_extra("TensorBoard logs need tensorboardX", "tensorboard"):
            import tensorboardX
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
