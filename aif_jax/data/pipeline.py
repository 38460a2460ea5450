"""From a log to batches: order, candidates, length buckets, the share of this process, and a cursor to resume from.

Every batch is a function of (seed, epoch, step), so resumed runs and several processes see the same batches.
"""

import contextlib
import dataclasses
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import jax
import numpy as np

from aif_jax.checks import check_encoding, expect, expect_integer, expect_integers
from aif_jax.config import Config
from aif_jax.data.candidates import Labels, SourceFn, describe
from aif_jax.data.dataset import Dataset
from aif_jax.data.order import HIDDEN, SHUFFLE, BatchKey, permuted
from aif_jax.store.trained import digest
from aif_jax.trees import differences
from aif_jax.types import Array, ItemFeatures, UserFeatures, record

WINDOW = 16  # batches that are sorted by length together
NAMED = 8  # positions of samples that a message names
AHEAD = 3  # batches that are ready or being made while a step runs, at most


@record
class Batch:
    """B samples, each of one user with C candidates.

    Attributes:
      users, items: features [B] and [B, C].
      labels: float32 [B, C], or several by name, there with NaN where unknown.
      where: bool [B, C] false where there is no candidate.
      log_q: float32 [B, C] log of the expected number of draws, for a corrected softmax; None for none.
      display_positions: int32 [B, C] where each was shown, see `Dataset.display_positions_of`; None for none.
    """

    users: UserFeatures
    items: ItemFeatures
    labels: Any
    where: Array
    log_q: Array | None = None
    display_positions: Array | None = None


class BadBatch(ValueError):
    """A batch that must not be trained on; the message names the reason and the samples."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefetchedBatch:
    """A batch for the training step, with its metadata on the host.

    Attributes:
      batch: None for one without a candidate, unless several processes share it: the shares of others may have some.
      positions: int64 [B] of its samples in the log, if known.
      place: (epoch, batch of it), counted from 0.
      cursor: plain JSON; `Pipeline.batches(cursor)` continues after this batch. None where the source cannot resume.
    """

    batch: Batch | None
    positions: np.ndarray | None = None
    place: tuple[int, int] | None = None
    cursor: dict[str, Any] | None = None

    @property
    def origin(self) -> str:
        """Which batch this is, and which samples, as the end of a message; "" where neither is known."""
        if self.place is None or self.positions is None:
            return ""
        named = ", ".join(str(at) for at in self.positions[:NAMED]) + ", ..." * (len(self.positions) > NAMED)
        return f" (batch {self.place[1]} of epoch {self.place[0]}; samples at positions {named} of the log)"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pipeline:
    """Batches of a data set, the same ones in every run.

    Memory does not grow with the samples: the order of an epoch is computed batch by batch.

    **Processes.** `batch_size` is of the whole step; process p of n takes the p-th of n equal slices of each batch. Every
    process draws the candidates of all samples, so any number of processes sees the same data and resumes from any cursor.

    **Length buckets.** With `buckets`, 16 batches at a time are sorted by the length of the samples' histories, cut again, and
    shuffled. Each batch has the smallest of the lengths that holds its longest history: the same scores with less padding,
    one compilation for each length.

    **Cursors** hold everything that decides which sample comes when (`description`), with a digest of the data, so a pipeline
    refuses the cursor of another.

    Attributes:
      dataset: the data.
      positions: positions of the samples, integers [n], memory-mapped perhaps.
      source: a source of `aif_jax.data.candidates`, or a function of yours, see `candidates.CandidateSource`.
      config: config of the model; gives the length of the history.
      batch_size: B of the whole step.
      epochs: how often every sample comes.
      seed: seed of order and candidates.
      buckets: ascending lengths of the history; `config.history_length` is always among them. () for one length.
      id_dropout: share of candidates that get the unknown item's id; other features stay. So the model learns
        to score an unseen item by its other features, see `Run.with_unseen_items`.
      process_index, process_count: which slice of every batch is made.

    Example:
      >>> import aif_jax as aif
      >>> from aif_jax.data import candidates
      >>> events = {"user": [1] * 80, "item": [3, 5] * 40, "time": [*range(80)], "rating": [1, 2] * 40}
      >>> columns = aif.Columns(action="rating", actions=(1, 2))
      >>> dataset = aif.read(events, items={"item": [3, 5], "category": [1, 2]}, columns=columns)
      >>> source = candidates.impressions(dataset, candidates=1, threshold=2)
      >>> config = aif.presets.two_tower(dataset.schema)
      >>> feed = Pipeline(dataset=dataset, positions=range(80), source=source, config=config, batch_size=16)
      >>> fed = list(feed.batches())
      >>> len(feed), fed[1].cursor["step"], fed[1].batch.labels.shape
      (5, 2, (16, 1))
      >>> rest = list(feed.batches(fed[1].cursor))
      >>> len(rest), bool((rest[0].positions == fed[2].positions).all())
      (3, True)
    """

    dataset: Dataset
    positions: Any
    source: SourceFn
    config: Config
    batch_size: int
    epochs: int = 1
    seed: int = 0
    buckets: tuple[int, ...] = ()
    id_dropout: float = 0.0
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        for field, least in dict(batch_size=1, epochs=1, seed=0, process_count=1).items():
            expect_integer(getattr(self, field), f"Pipeline.{field}", least=least)
        count = self.process_count
        expect(0 <= self.process_index < count, "Pipeline.process_index", f"0 to {count - 1}", self.process_index)
        expect(self.batch_size % count == 0, "Pipeline.batch_size", f"a multiple of process_count={count}", self.batch_size)
        expect(0 <= self.id_dropout < 1, "Pipeline.id_dropout", "a share from 0 to below 1", self.id_dropout)
        lengths, longest = self.buckets, self.config.history_length
        fits = all(1 <= b <= longest for b in lengths) and list(lengths) == sorted(set(lengths))
        expect(fits, "Pipeline.buckets", f"ascending lengths from 1 to history_length={longest}", lengths)
        check_encoding("Pipeline.dataset", expected=self.config.schema.encoding, got=self.dataset.encoding)
        placed = not self.config.reads_display_positions or self.dataset.display_positions is not None
        expect(placed, "Pipeline.dataset", "the places of shown items, for a `training_logit`", "none; name Columns.position")
        object.__setattr__(self, "positions", expect_integers(self.positions, "Pipeline.positions", size=len(self.dataset.log)))
        least = f"at least one batch of batch_size={self.batch_size} to train on"
        hint = "take a smaller one" if len(self.positions) else "see min_history, since and the splits"
        expect(self.steps_per_epoch >= 1, "samples", least, f"{len(self.positions)}; {hint}")

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of an epoch; the samples left over differ from epoch to epoch."""
        return len(self.positions) // self.batch_size

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of the history that batches may have."""
        return tuple(dict.fromkeys((*self.buckets, self.config.history_length)))

    @cached_property
    def description(self) -> dict[str, Any]:
        """Everything that decides which sample comes when, with which candidates, as plain JSON."""
        data, log = self.dataset, self.dataset.log
        positions = digest(self.positions.astype(np.int64, copy=False)).sha256
        counts = {"events": len(log), "users": log.users, "items": len(data.catalogue)}
        described = {
            "data": {"name": data.name, **counts, "digest": data.digest},
            "positions": {"content": positions, "count": len(self.positions)},
            "candidates": describe(self.source),
            "history_length": self.config.history_length,
            **{field: getattr(self, field) for field in ("batch_size", "seed", "buckets")},
            **({"id_dropout": self.id_dropout} if self.id_dropout else {}),
        }
        return json.loads(json.dumps(described))

    def __len__(self) -> int:
        """Return batches of all epochs."""
        return self.epochs * self.steps_per_epoch

    def batches(self, cursor: dict[str, Any] | None = None) -> Iterator[PrefetchedBatch]:
        """Return batches from the start, or from a cursor (`PrefetchedBatch.cursor` of the last batch that was trained on) on.

        Raises TypeError, ValueError as `start`, BadBatch for a label that is not finite.
        """
        return self._batches(*self.start(cursor))

    def start(self, cursor: dict[str, Any] | None) -> tuple[int, int]:
        """Return epoch and batch of it at which `batches(cursor)` begins; (0, 0) without a cursor.

        Raises:
          TypeError: no cursor.
          ValueError: a cursor of another pipeline, with the differences; a place that this pipeline does not have.
        """
        if cursor is None:
            return 0, 0
        expected = "`PrefetchedBatch.cursor` of a batch, or None"
        expect(isinstance(cursor, Mapping), "cursor", expected, repr(cursor), error=TypeError)
        if other := "\n".join(differences(cursor.get("pipeline"), self.description, path="pipeline", source="cursor")):
            way_out = "Go on with the data and settings that it was made with, or start without a cursor"
            raise ValueError(f"cursor: expected one of this pipeline, got one of another:\n{other}\n{way_out}")
        epoch = expect_integer(cursor.get("epoch"), "cursor epoch", least=0, most=self.epochs)
        most = self.steps_per_epoch - 1 if epoch < self.epochs else 0
        return epoch, expect_integer(cursor.get("step"), f"cursor step in epoch {epoch}", least=0, most=most)

    def _batches(self, epoch: int, step: int) -> Iterator[PrefetchedBatch]:
        for current in range(epoch, self.epochs):
            for first in range(step - step % WINDOW, self.steps_per_epoch, WINDOW):  # a resume makes its whole window again
                samples, lengths = self._window(current, first)
                for number in range(max(step, first), first + len(samples)):
                    yield self._make(samples[number - first], int(lengths[number - first]), current, number)
            step = 0

    def _window(self, epoch: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Return samples [W, B] of the batches from step `first` on, and the length of the history of each batch [W]."""
        count = min(WINDOW, self.steps_per_epoch - first)
        start, stop = first * self.batch_size, (first + count) * self.batch_size
        at = self.positions[permuted(len(self.positions), start, stop, seed=self.seed, epoch=epoch)].astype(np.int64)
        longest = self.config.history_length
        if not self.buckets:
            return at.reshape(count, -1), np.full(count, longest)
        choices = np.array(self.lengths)
        bucket = np.searchsorted(choices, np.clip(self.dataset.history_lengths(at), 0, longest))
        by_length = np.argsort(bucket, kind="stable")
        shuffled = BatchKey(self.seed, epoch, first).random(SHUFFLE).permutation(count)
        samples = at[by_length].reshape(count, -1)[shuffled]
        return samples, choices[bucket[by_length].reshape(count, -1).max(axis=1)[shuffled]]

    def _make(self, samples: np.ndarray, length: int, epoch: int, step: int) -> PrefetchedBatch:
        size, last = self.batch_size // self.process_count, step + 1 == self.steps_per_epoch
        share = slice(self.process_index * size, (self.process_index + 1) * size)
        at, cursor = samples[share], {"epoch": epoch + last, "step": 0 if last else step + 1, "pipeline": self.description}
        fed = PrefetchedBatch(batch=None, positions=at, place=(epoch, step), cursor=cursor)
        key = BatchKey(self.seed, epoch, step)
        rows, labels, log_q = jax.tree.map(lambda leaf: leaf[share], self.source(samples, key))
        batch = make_batch(self.dataset, at, rows, labels, config=self.config, log_q=log_q, length=length)
        if not np.any(batch.where) and self.process_count == 1:
            return fed
        expect_labels(batch, fed.origin)
        if self.id_dropout:
            item = np.asarray(batch.items.ids["item"])
            hidden = key.random(HIDDEN).random((self.batch_size, item.shape[1]))[share] < self.id_dropout
            ids = {**batch.items.ids, "item": np.where(hidden, 0, item).astype(item.dtype)}
            batch = dataclasses.replace(batch, items=dataclasses.replace(batch.items, ids=ids))
        return dataclasses.replace(fed, batch=batch)


def make_batch(
    dataset: Dataset, positions: Any, rows: np.ndarray, labels: Labels,
    *, config: Config, log_q: np.ndarray | None = None, length: int | None = None,
) -> Batch:  # fmt: skip
    """Return the features of samples and their candidates, as NumPy arrays.

    Args:
      rows: int32 [B, C] candidates; row 0 marks the absence of one.
      config: config of the model; gives the length of the history, and whether content is read.
      length: places of the history, where fewer than `config.history_length` hold all events of these users.
    """
    users = dataset.user_features(positions, length=length or config.history_length)
    items = dataset.item_features(rows, dataset.log.time[positions][:, None], content=config.reads_content)
    read = config.reads_display_positions and dataset.display_positions is not None
    shown = dataset.display_positions_of(positions, rows) if read else None
    return Batch(users=users, items=items, labels=labels, where=rows > 0, log_q=log_q, display_positions=shown)


def expect_labels(batch: Batch, origin: str) -> None:
    """Raise BadBatch for a label that is not finite; floats of users and items are, since the data set checked them."""
    labels, named = batch.labels, isinstance(batch.labels, dict)  # whose NaN says that the log does not know
    known = [np.where(batch.where & ~(named & np.isnan(v)), v, 0) for v in (labels.values() if named else [labels])]
    finite = np.isfinite(np.concatenate(known, axis=1)).all(axis=1)
    if not finite.all():
        raise BadBatch(f"a bad batch: a label of sample {int(np.argmin(finite))} of the batch is not finite{origin}")


@contextlib.contextmanager
def to_device(
    batches: Iterable[PrefetchedBatch], *, place: Callable[[Batch], Any] = jax.device_put
) -> Iterator[Iterator[PrefetchedBatch]]:
    """Give the same batches in a `with` block, made and sent to the device by a thread that stays `AHEAD` of the step.

    An error is raised where its batch would have come. The end of the `with` block stops the thread.

    Args:
      place: batch of NumPy arrays to batch of device arrays; for several devices or processes one that knows the sharding.

    Example:
      >>> with to_device([PrefetchedBatch(batch=None, place=(0, 3))]) as prefetched:
      ...     [fed.place for fed in prefetched]
      [(0, 3)]
    """
    source = iter(batches)

    def make() -> PrefetchedBatch | None:
        fed = next(source, None)
        return fed if fed is None or fed.batch is None else dataclasses.replace(fed, batch=place(fed.batch))

    with ThreadPoolExecutor(1, "aif_jax.prefetch") as pool:
        ready = deque(pool.submit(make) for _ in range(AHEAD))

        def ordered() -> Iterator[PrefetchedBatch]:
            while (fed := ready.popleft().result()) is not None:
                ready.append(pool.submit(make))
                yield fed

        try:
            yield ordered()
        finally:
            pool.shutdown(cancel_futures=True)
