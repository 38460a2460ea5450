"""From a log to batches: order, candidates, length buckets, the share of this process, and a position to resume from.

Everything that a batch holds is a function of (seed, epoch, step), so a run that is resumed at a position sees what it would
have seen, and the processes of a run agree without talking. Source: ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from aif_jax.config import Config
from aif_jax.data.batches import Batch, make_batch
from aif_jax.data.candidates import Draw, Source
from aif_jax.data.dataset import Dataset
from aif_jax.data.prefetch import Prefetch
from aif_jax.data.sampling import epoch_order

SHUFFLE = 2  # stream of random numbers: the order of the batches of a window, see sampling.ORDER


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fed:
    """A batch on its way to the step, and what is known of it on the host.

    Attributes:
      batch: None where there is a problem.
      positions: int64 [B] of its samples in the log, where they are known.
      place: (epoch, batch of it), counted from 0.
      cursor: plain JSON; `Pipeline.batches(cursor)` goes on behind this batch. None where the source cannot resume.
      samples: B.
      places, events: of the long histories: B times the length, and how many of these hold an event.
      problem: why the batch must not be trained on: "empty", or what is corrupt; None for a good one.
    """

    batch: Batch | None
    positions: np.ndarray | None = None
    place: tuple[int, int] | None = None
    cursor: dict[str, int] | None = None
    samples: int = 0
    places: int = 0
    events: int = 0
    problem: str | None = None

    @property
    def padding(self) -> float:
        """Share of the places of the long histories without an event."""
        return 1 - self.events / self.places if self.places else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pipeline:
    """Batches of a data set, the same ones in every run.

    **Processes.** `batch_size` is that of the whole step; process p of n takes the p-th of n equal slices, so that all run
    equally many steps and no sample twice. Random candidates are drawn for each process apart.

    **Length buckets.** With `buckets`, a window of batches is sorted by the length of the samples' histories, cut into batches,
    and the batches are put in random order again. Each is made with the smallest of the lengths that holds its longest history:
    the scores are the same, the step has less padding to work on. Each length compiles once. Samples share a batch with samples
    of like length; a window of 1 leaves the order as it is.

    Attributes:
      dataset: with signatures where the config uses them.
      positions: of the samples: an array, a `range` or a `Positions`; see `epoch_batches`.
      candidates: a source of `aif_jax.data.candidates`.
      config: of the model; gives the history lengths.
      batch_size: B of the whole step.
      epochs: how often every sample comes.
      seed: of order and candidates.
      block: neighbouring positions that stay together, for a log on disk; see `EpochOrder`. 0 mixes everything.
      block_window: blocks that are mixed with each other.
      buckets: ascending lengths of the long history; `config.long_length` is always among them. () for one length.
      window: batches that are sorted by length together.
      process_index, process_count: which slice of every batch is made.

    Raises:
      ValueError: sizes that do not fit together; names the field.

    Example:
      >>> from aif_jax import tiny
      >>> from aif_jax.data import candidates, synthetic
      >>> dataset = synthetic.synthetic_world(0, users=8, items=40, topics=12, categories=8, events_per_user=20).dataset
      >>> config = tiny(dataset.schema, memory=(), simtier="off")
      >>> source = candidates.pointwise(dataset, threshold=2)
      >>> feed = Pipeline(dataset=dataset, positions=range(160), candidates=source, config=config, batch_size=32)
      >>> fed = [fed for fed in feed.batches()]
      >>> len(feed), fed[1].cursor["step"], fed[1].batch.labels.shape
      (5, 2, (32, 1))
      >>> rest = list(feed.batches(fed[1].cursor))
      >>> len(rest), bool((rest[0].positions == fed[2].positions).all())
      (3, True)
    """

    dataset: Dataset
    positions: Any
    candidates: Source
    config: Config
    batch_size: int
    epochs: int = 1
    seed: int = 0
    block: int = 0
    block_window: int = 64
    buckets: tuple[int, ...] = ()
    window: int = 16
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        for field, least in (("batch_size", 1), ("epochs", 1), ("seed", 0), ("window", 1), ("process_count", 1)):
            _expect(getattr(self, field) >= least, field, f"at least {least}", getattr(self, field))
        count = self.process_count
        _expect(0 <= self.process_index < count, "process_index", f"0 to {count - 1}", self.process_index)
        _expect(self.batch_size % count == 0, "batch_size", f"a multiple of process_count={count}", self.batch_size)
        lengths, longest = self.buckets, self.config.long_length
        _expect(
            all(1 <= b <= longest for b in lengths) and list(lengths) == sorted(set(lengths)),
            "buckets",
            f"ascending lengths from 1 to long_length={longest}",
            lengths,
        )
        _expect(self.steps_per_epoch >= 1, "positions", f"at least batch_size={self.batch_size}", len(self.positions))

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of an epoch; the samples left over differ from epoch to epoch."""
        return len(self.positions) // self.batch_size

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of the long history that batches may have."""
        return tuple(dict.fromkeys((*self.buckets, self.config.long_length)))

    def __len__(self) -> int:
        """Batches of all epochs."""
        return self.epochs * self.steps_per_epoch

    def batches(self, cursor: dict[str, int] | None = None) -> Iterator[Fed]:
        """Batches from the start, or from a cursor on.

        A batch that cannot be made, because a record is corrupt or because it has no candidate, comes as a `Fed` with a
        `problem`; `loop.fit` says what happens with it.

        Args:
          cursor: `Fed.cursor` of the last batch that was trained on.

        Raises:
          ValueError: a cursor of another pipeline: other samples, seed or batch size.
        """
        mark = self._mark()
        epoch, step = 0, 0
        if cursor is not None:
            if {name: cursor.get(name) for name in mark} != mark:
                raise ValueError(f"cursor: expected one of a pipeline with {mark}, got {cursor}")
            epoch, step = cursor["epoch"], cursor["step"]
        return self._batches(mark, epoch, step)

    def _batches(self, mark: dict[str, int], epoch: int, step: int) -> Iterator[Fed]:
        for at_epoch in range(epoch, self.epochs):
            take = epoch_order(self.positions, seed=self.seed, epoch=at_epoch, block=self.block, window=self.block_window)
            for first in range(step - step % self.window, self.steps_per_epoch, self.window):
                samples, lengths = self._window(take, at_epoch, first)
                for at_step in range(max(step, first), first + len(samples)):
                    done = at_step + 1 == self.steps_per_epoch
                    after = {"epoch": at_epoch + done, "step": 0 if done else at_step + 1}
                    yield self._make(samples[at_step - first], lengths[at_step - first], at_epoch, at_step, mark | after)
            step = 0

    def _window(self, take: Any, epoch: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples [W, B] of the batches from step `first` on, and the length of the long history of each batch [W]."""
        count = min(self.window, self.steps_per_epoch - first)
        at = take(first * self.batch_size, (first + count) * self.batch_size)
        longest = self.config.long_length
        if not self.buckets:
            return at.reshape(count, -1), np.full(count, longest)
        log, choices = self.dataset.log, np.array(self.lengths)
        users = np.clip(log.user[at], 0, log.users - 1)  # a corrupt one is reported when its batch is made
        history = np.clip(log.history_end_at(users, log.time[at]) - log.offsets[users], 0, longest)
        bucket = np.searchsorted(choices, history)
        order = np.argsort(bucket, kind="stable")
        batches = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(SHUFFLE, epoch, first)))
        shuffled = batches.permutation(count) if self.window > 1 else np.arange(count)
        samples = at[order].reshape(count, -1)[shuffled]
        return samples, choices[bucket[order].reshape(count, -1).max(axis=1)[shuffled]]

    def _make(self, samples: np.ndarray, length: int, epoch: int, step: int, cursor: dict[str, int]) -> Fed:
        size = self.batch_size // self.process_count
        at = samples[self.process_index * size : (self.process_index + 1) * size]
        fed = Fed(batch=None, positions=at, place=(epoch, step), cursor=cursor, samples=size)
        draw = Draw(self.seed, epoch, step * self.process_count + self.process_index)
        try:
            found = self.candidates(at, draw)
            batch = make_batch(
                self.dataset, at, found.rows, found.labels, config=self.config, log_q=found.log_q, long=int(length)
            )
        except ValueError as error:  # every check of data raises one, and names the record
            return dataclasses.replace(fed, problem=str(error))
        if problem := problem_of(batch):
            return dataclasses.replace(fed, problem=problem)
        mask = np.asarray(batch.users.long.mask)
        return dataclasses.replace(fed, batch=batch, places=mask.size, events=int(np.count_nonzero(mask)))

    def _mark(self) -> dict[str, int]:
        return {"seed": self.seed, "batch_size": self.batch_size, "samples": len(self.positions)}


def problem_of(batch: Batch) -> str | None:
    """Why a batch of NumPy arrays must not be trained on, or None: no candidate at all, or a number that is not finite.

    Example:
      >>> from aif_jax.data.batches import Batch
      >>> problem_of(Batch(users=None, items=None, labels=np.zeros((2, 1)), where=np.zeros((2, 1), bool)))
      'empty'
    """
    where = np.asarray(batch.where)
    if not where.any():
        return "empty"
    bad = where & ~np.isfinite(batch.labels)
    for name, wrong in (
        ("a label", bad.any(axis=1)),
        ("a user float", _has_nonfinite(batch.users.floats)),
        ("an item float", _has_nonfinite(batch.items.floats)),
    ):
        if wrong.any():
            return f"{name} of sample {int(np.argmax(wrong))} of the batch is not finite"
    return None


def _has_nonfinite(floats: Any) -> np.ndarray:
    """bool [B]"""
    floats = np.asarray(floats)
    return ~np.isfinite(floats.reshape(len(floats), -1)).all(axis=1)


def to_device(batches: Iterator[Fed], *, ahead: int = 2, place: Any = jax.device_put) -> Prefetch[Fed]:
    """The same batches, made and sent to the device by a thread that stays `ahead` of the step.

    Args:
      batches: such as `Pipeline.batches()`.
      ahead: batches that may wait on the device.
      place: batch of NumPy arrays to batch of device arrays; for several devices or processes one that knows the sharding.

    Example:
      >>> with to_device(iter([Fed(batch=None, problem="empty")])) as batches:
      ...     [fed.problem for fed in batches]
      ['empty']
    """

    def send(fed: Fed) -> Fed:
        return fed if fed.batch is None else dataclasses.replace(fed, batch=place(fed.batch))

    return Prefetch(batches, ahead=ahead, place=send)


def _expect(ok: bool, field: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"Pipeline.{field}: expected {expected}, got {got!r}")
