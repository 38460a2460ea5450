"""What processes agree on before each step: that each has its share of the same batch, and nothing against training on it.

The answers for batch n + 1 are sent before step n is dispatched and read after it, so no step waits for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from aif_jax.data.pipeline import PrefetchedBatch
from aif_jax.sharding import processes
from aif_jax.sharding.processes import ProcessError

GOOD, EMPTY, BAD, ENDED, FAILED = range(5)


def agreed(batches: Iterable[PrefetchedBatch]) -> Iterator[PrefetchedBatch]:
    """The same batches, each as all processes have it: a problem of one is a problem of all, and counts are those of all.

    Of a batch that comes with a problem, `batch` and `positions` are None; the problem names the process and its samples.

    Raises:
      ProcessError: the source of one process raised, has another batch than process 0, or ended before the others.
    """
    waiting: tuple[_Share, Callable[[], np.ndarray]] | None = None
    for share in _shares(batches):
        sent = processes.start_gather(share.answer())
        if waiting is not None:
            fed = _settle(*waiting)
            if fed is None:
                return
            yield fed
        waiting = share, sent


@dataclasses.dataclass(frozen=True)
class _Share:
    """What this process has of the next batch."""

    code: int
    fed: PrefetchedBatch | None = None
    error: Exception | None = None

    def answer(self) -> np.ndarray:
        """What the others must know of it: int32 [6]."""
        fed = self.fed or PrefetchedBatch(batch=None)
        return np.array([self.code, *(fed.place or (-1, -1)), fed.samples, fed.places, fed.events], np.int32)

    def problem(self) -> str:
        """For a message: "" for none."""
        if self.error is not None:
            return processes.describe(self.error)
        return f"{self.fed.problem}{self.fed.origin}" if self.code == BAD and self.fed is not None else ""


def _shares(batches: Iterable[PrefetchedBatch]) -> Iterator[_Share]:
    """The batches of this process, and how they ended, twice: others send one answer more before they read that one."""
    source = iter(batches)
    while True:
        try:
            fed = next(source, None)
        except Exception as error:
            yield from (_Share(FAILED, error=error), _Share(ENDED))
            return
        if fed is None:
            yield from (_Share(ENDED), _Share(ENDED))
            return
        yield _Share(GOOD if fed.problem is None else EMPTY if fed.problem == "empty" else BAD, fed)


def _settle(share: _Share, sent: Callable[[], np.ndarray]) -> PrefetchedBatch | None:
    """The batch as all processes have it, None at their end."""
    answers = sent()
    codes, places = answers[:, 0], answers[:, 1:3]
    if (codes == ENDED).all():
        return None
    if (codes == FAILED).any():
        raise ProcessError(processes.named(processes.gather_texts(share.problem()))) from share.error
    for process, (code, place) in enumerate(zip(codes, places, strict=True)):
        if (code == ENDED) != (codes[0] == ENDED) or (place != places[0]).any():
            got = "no more" if code == ENDED else f"batch {place[1]} of epoch {place[0]}"
            expected = f"batch {places[0][1]} of epoch {places[0][0]}" if codes[0] != ENDED else "the end"
            message = f"process {process} of {len(codes)}: expected {expected}, as process 0, got {got}"
            raise ProcessError(f"{message}; start all from the same checkpoint, data and settings")
    assert share.fed is not None
    if (codes == BAD).any():
        problem = processes.named(processes.gather_texts(share.problem()))
        return dataclasses.replace(share.fed, batch=None, positions=None, problem=problem)
    samples, at, events = (int(total) for total in answers[:, 3:].sum(axis=0, dtype=np.int64))
    empty = bool((codes == EMPTY).all())
    return dataclasses.replace(
        share.fed, batch=None if empty else share.fed.batch, samples=samples, places=at, events=events,
        problem="empty" if empty else None,
    )  # fmt: skip
