"""What `fit` says of a run in words: the samples of each split and what was left out, where its time went, what is missing."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from aif_jax.blocks import item_offset, pure_svd
from aif_jax.config import Config
from aif_jax.data import lengths
from aif_jax.data.dataset import Dataset
from aif_jax.data.pipeline import Pipeline, PrefetchedBatch
from aif_jax.encoding.times import shown
from aif_jax.output import progress as output
from aif_jax.sharding import processes
from aif_jax.train.tasks import NextItem, Task

logger = logging.getLogger(__name__)


class Samples(NamedTuple):
    """How many samples each split of a run has, and how many are in none."""

    train: int
    validation: int
    test: int
    earlier: int  # before `since`
    short: int  # whose user has too few earlier events
    unknown: int  # events that are no sample of the task


def samples_of(data: Dataset, settings: Any) -> Samples:
    """Counts the samples of a run with these `fit.FitSettings`."""
    task, span = settings.task, {"since": settings.since, "before": None}
    everything = task.positions(data, min_history=0, since=None, before=None)
    inside = task.positions(data, min_history=0, **span) if settings.since is not None else everything
    times = data.log.time[task.positions(data, min_history=settings.min_history, **span)]
    validation, test = (int((times >= first).sum()) for first in (settings.first_validation, settings.first_test))
    return Samples(
        train=len(times) - validation, validation=validation - test, test=test,
        earlier=len(everything) - len(inside), short=len(inside) - len(times),
        unknown=len(data.log) - len(everything) if task.samples == "events" else 0,
    )  # fmt: skip


def samples_line(samples: Samples, settings: Any) -> str:
    """The line of text on the samples of a run."""
    task, least = settings.task, settings.min_history
    evaluated = f" ({min(settings.requests, samples.validation):,} evaluated)" if samples.validation else ""
    left_out = {
        f"before {shown(settings.since or 0)} (since)": samples.earlier,
        f"with fewer than {least} earlier events of the user (min_history)": samples.short,
        task.no_sample: samples.unknown,
    }
    why = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count) or "none"
    return (
        f"{type(task).__name__}: {samples.train:,} {task.samples} to train on, "
        f"{samples.validation:,} for validation{evaluated} from {shown(settings.first_validation)}, "
        f"{samples.test:,} for the test from {shown(settings.first_test)}; left out: {why}"
    )


def repeats_line(data: Dataset, repeats: bool) -> str:
    """The line of text on whether users come back to items."""
    does = "stay candidates" if repeats else "are no negatives in training, and no candidates in evaluation"
    return f"{data.repeated:.1%} of the events repeat an item of their user: met items {does} (repeats={repeats})"


def plan(feed: Pipeline, settings: Any, samples: Samples) -> Iterator[str]:
    """Lines of text before a run: steps, lengths and padding, what validation costs, what else would be faster or smaller."""
    longest, steps, size = feed.config.history_length, len(feed), feed.batch_size
    histories = lengths.history_lengths(feed.dataset, feed.positions, longest=longest)
    places, most = lengths.mean_places(histories, feed.lengths), int(np.quantile(histories, 0.99, method="higher"))
    padded = f"{lengths.padding(histories, feed.lengths):.0%} padding"
    if feed.buckets:
        padded += f" (one length: {lengths.padding(histories, (longest,)):.0%})"
    yield (
        f"batches: {steps:,} steps of {size:,} samples, lengths of the history {', '.join(map(str, feed.lengths))}; about "
        f"{padded}; half of the histories have up to {int(np.median(histories)):,} events, 99 % up to {most:,}"
    )
    every, requests = settings.evaluate_every or feed.steps_per_epoch, min(settings.requests, samples.validation)
    times = -(-steps // every)
    if users := times * requests:
        items = len(feed.dataset.catalogue) - 1
        whole = f" and, over the catalogue of {items:,} items (k={settings.k}), {users * items:,} scores" if settings.k else ""
        yield f"validation: {times:,} of {requests:,} requests: {users:,} users{whole}; training: {steps * size:,} users"
    advice = []
    other = lengths.choose(histories, longest=longest, batch_size=size, steps=steps)
    if lengths.mean_places(histories, (*other, longest)) < 0.8 * places:
        advice.append(f"buckets='auto' takes {(*other, longest)}, {lengths.padding(histories, (*other, longest)):.0%} padding")
    if users > steps * size / 4:
        advice.append(f"validation reads {users / (steps * size):.0%} as many users as training: requests=, evaluate_every=")
    if (enough := max(lengths.SHORTEST, 1 << max(most - 1, 1).bit_length())) <= longest // 2:
        advice.append(f"Config.long_length={enough} holds 99 % of the histories whole, for smaller user states")
    if jax.default_backend() != "cpu" and settings.compute_dtype == "float32":
        advice.append("compute_dtype='bfloat16'")
    if advice:
        yield f"faster or smaller: {'; '.join(advice)}"


@dataclasses.dataclass
class Spent:
    """Where the time and the places of the batches of a run went."""

    began: float = dataclasses.field(default_factory=time.perf_counter)
    evaluations: int = 0
    evaluating: float = 0.0  # seconds
    places: int = 0  # of histories
    events: int = 0  # in them

    def timed(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose time is counted."""

        def measured(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return evaluate(*args)
            finally:
                self.evaluations, self.evaluating = self.evaluations + 1, self.evaluating + time.perf_counter() - start

        return measured

    def counted(self, batches: Iterable[PrefetchedBatch]) -> Iterator[PrefetchedBatch]:
        """The same batches, whose padding is counted."""
        for fed in batches:
            self.places, self.events = self.places + fed.places, self.events + fed.events
            yield fed

    def line(self) -> str:
        """The line of text."""
        seconds = time.perf_counter() - self.began
        parts = [f"{seconds:.1f} s"]
        if self.evaluations:
            share = f"{self.evaluating / seconds:.0%} of them in {self.evaluations} validations"
            parts.append(f"{share} (fit takes requests=, evaluate_every=, k=)")
        if self.places:
            share = f"{1 - self.events / self.places:.0%} of the places of histories in a batch are padding"
            parts.append(f"{share} (fit takes buckets=)")
        return "training: " + "; ".join(parts)


def note(config: Config, task: Task, k: int | None) -> str:
    """Which terms the catalogue figures of a run lack, and the next call; "" where they lack none."""
    if k is None or not isinstance(task, NextItem):
        return ""
    terms = {} if pure_svd.present(config) else {"the SVD term": "with_svd(data)"}
    if not item_offset.present(config) and not task.logq_correction and not task.uniform:
        terms["the popularity correction"] = "with_popularity_correction(data)"
    if not terms:
        return ""
    calls = ".".join(["run", *terms.values(), "evaluate(data)"])
    them = "them" if len(terms) > 1 else "it"
    return f"hr@{k} and ndcg@{k} are of scores before {' and '.join(terms)}; with {them}: {calls}"


def say(line: str, *, progress: bool) -> None:
    """Prints a line of process 0 on stderr, where the progress bar is; without a bar it goes to the log as INFO."""
    if not processes.first():
        return
    if progress:
        output.say(line)
    else:
        logger.info(line)
