"""Sources of candidates: the list that was shown, sampled negatives, retrieved items, or a logged cascade.

A source is a function of positions and a `BatchKey`; `Pipeline` calls it for every batch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from aif_jax.checks import expect, expect_integers
from aif_jax.data.cascade import STAGES, Cascade
from aif_jax.data.dataset import Dataset
from aif_jax.data.negatives import NegativeSampler, SeenPairs
from aif_jax.data.order import CHOICE, BatchKey
from aif_jax.model import name_of
from aif_jax.store.trained import digest

DESCRIBED_ROWS = 4096  # rows of a table of retrieved items that its description covers


Labels: TypeAlias = np.ndarray | dict[str, np.ndarray]
"""float32 [B, C]; or several by name, NaN where unknown: labels of each objective, the stage, a ranker's score."""


class CandidateLists(NamedTuple):
    """C candidates of each of B samples.

    Attributes:
      rows: int32 [B, C] catalogue rows, 0 where there is no candidate.
      labels: float32 [B, C], or several by name; without a meaning where the row is 0.
      log_q: float32 [B, C] log of the expected number of draws, see `losses.listwise_softmax`; None for none.
    """

    rows: np.ndarray
    labels: Labels
    log_q: np.ndarray | None = None


def population_weights(labels: np.ndarray, log_q: np.ndarray | None) -> np.ndarray | None:
    """Return how many entries of the population each candidate stands for, float64 [B, C].

    A positive stands for itself, a sampled negative for 1 / (n q); None without a correction.
    """
    return None if log_q is None else np.where(labels == 1, 1.0, np.exp(-np.asarray(log_q, np.float64)))


SourceFn: TypeAlias = Callable[[np.ndarray, BatchKey], CandidateLists]
"""`source(positions [B], key) -> CandidateLists`."""


@dataclasses.dataclass(frozen=True)
class CandidateSource:
    """A source of candidates with a description, which the cursors of a pipeline record next to the digest of the data.

    Attributes:
      lists: (positions [B], key) -> CandidateLists, the same for the same two.
      description: plain JSON that changes when the lists do, such as {"kind": "sampled", "negatives": 15, ...}.

    Example:
      >>> def newest(positions, key):
      ...     return CandidateLists(np.full((len(positions), 1), 7, np.int32), np.ones((len(positions), 1), np.float32))
      >>> CandidateSource(newest, {"kind": "newest", "version": 2})(np.array([3]), BatchKey(0, 0, 0)).rows.tolist()
      [[7]]
    """

    lists: SourceFn
    description: dict[str, Any]

    def __call__(self, positions: np.ndarray, key: BatchKey) -> CandidateLists:
        """Return the candidates of samples."""
        return self.lists(positions, key)


def describe(source: SourceFn) -> dict[str, Any]:
    """Return the description of a source; of a function of yours its qualified name."""
    return source.description if isinstance(source, CandidateSource) else {"kind": name_of(source)}


def sampled_negatives(
    dataset: Dataset, *, sampler: NegativeSampler, negatives: int, logq_correction: bool = False
) -> CandidateSource:
    """Return the event's item first, label 1, and `negatives` drawn by popularity, label 0: which item did the user turn to?

    Unless users come back to items (`Dataset.repeats`), an item that the user has met strictly before the event is no negative:
    serving filters it out. A list may then have no negative.

    Args:
      sampler: sampler of negatives, from training counts.
      negatives: n; C = 1 + n. The event's item itself never is one.
      logq_correction: also gives `log_q`, log(n q) with q among what may be drawn: both losses then learn log P of the whole
        catalogue, as in noise-contrastive estimation (arXiv 1809.01812), not log(P / q). A positive that is never drawn has 0.

    Returns:
      A source; it raises ValueError for events of unknown items or of others than `Columns.history_actions`.
    """
    engaged = None if dataset.encoder is None else dataset.encoder.engaged

    def lists(positions: np.ndarray, key: BatchKey) -> CandidateLists:
        at = expect_integers(positions, "positions", size=len(dataset.log))
        target = dataset.log.item[at]
        wrong = (target == 0) | (engaged is not None and ~np.isin(dataset.log.action[at], engaged))
        got = f"an unknown item or another action at position {at[np.argmax(wrong)] if len(at) else 0}; see NextItem.positions"
        expect(not wrong.any(), "positions", "events of known items, of Columns.history_actions if there are any", got)
        seen = None if dataset.repeats else SeenPairs(dataset, at)
        drawn = sampler.sample(len(target), negatives, avoid=target, key=key, seen=seen)
        rows = np.concatenate([target[:, None], drawn], axis=1)
        labels = np.zeros(rows.shape, np.float32)
        labels[:, 0] = 1
        if not logq_correction:
            return CandidateLists(rows, labels)
        left = 1.0 - sampler.probabilities[target]  # the rest is drawn more often
        if seen is not None:
            met = (seen.items(row) for row in range(len(target)))
            left -= [sampler.probabilities[items[items != item]].sum() for items, item in zip(met, target, strict=True)]
        log_q = sampler.log_q(rows, negatives) - np.log(np.where(drawn.any(1), left, 1.0))[:, None]
        log_q[np.isneginf(log_q)] = 0  # of a positive that is never drawn, and of no candidate
        return CandidateLists(rows, labels, log_q.astype(np.float32))

    settings = {"negatives": negatives, "corrected": logq_correction, "sampler": digest(sampler.probabilities).sha256}
    return CandidateSource(lists, {"kind": "sampled", **settings})


def impressions(dataset: Dataset, *, candidates: int, threshold: int | Mapping[str, int]) -> CandidateSource:
    """Return the list that was shown: all events of a request, label 1 where the action is at least `threshold`.

    A request is the events of one user at one time: its candidates share one history. An item that repeats in a request is one
    candidate, with its highest action; unknown items and actions are left out. Longer lists keep their positives (of any
    label) and a random choice of the rest.

    Args:
      dataset: the data; its log holds impressions, its action rows are in ascending order of what they mean (seen, clicked).
      candidates: C.
      threshold: the least action row with label 1; or one for each of several labels by name, {"click": 2, "like": 3}.

    Returns:
      A source whose positions are the first events of requests: `sample_positions(log, requests=True)`.

    Raises:
      ValueError: candidates below 1, a threshold that is no action row from 2 on, text actions without `Columns.actions`.
    """
    expect(candidates >= 1, "candidates", "at least 1", candidates)
    several = isinstance(threshold, Mapping)
    thresholds = dict(threshold) if several else {"": threshold}
    for name, least in thresholds.items():
        expect_threshold(dataset, least, f"threshold[{name!r}]" if several else "threshold")
    lowest = min(thresholds.values())

    def lists(positions: np.ndarray, key: BatchKey) -> CandidateLists:
        log = dataset.log
        first = expect_integers(positions, "positions", size=len(log)).astype(np.int64)
        ends, at = log.request_end(first), np.minimum(first[:, None] + np.arange(candidates), len(log) - 1)
        inside, rng = np.arange(candidates) < (ends - first)[:, None], key.random(CHOICE)
        for row in np.flatnonzero(ends - first > candidates):
            span = np.arange(first[row], ends[row])
            item, action = log.item[span], log.action[span]
            apart = (item != 0) & (action != 0) & ~_repeated(item, action)
            order = np.where(apart, np.where(action >= lowest, 0.0, 1.0) + rng.random(len(span)), 2.0)
            some = np.sort(np.argsort(order)[:candidates])
            at[row], inside[row] = span[some], apart[some]
        rows = log.item[at] * (inside & (log.action[at] > 0))
        rows[_repeated(rows, log.action[at])] = 0
        labels = {name: ((log.action[at] >= least) & inside).astype(np.float32) for name, least in thresholds.items()}
        return CandidateLists(rows, labels if several else labels[""])

    return CandidateSource(lists, {"kind": "impressed", "candidates": candidates, "threshold": thresholds})


def retrieved(dataset: Dataset, *, retrieval: Callable[[np.ndarray], Any] | np.ndarray) -> CandidateSource:
    """Return the event's item, label 1, and what retrieval found for its request, label 0, without repeats: as in production.

    Unless users come back to items (`Dataset.repeats`), 0 takes the place of an item that the user met before the event.

    Args:
      retrieval: a function from positions [B] to integer catalogue rows [B, R], 0 where there is none, R at least 1; or an
        array of such rows [n, R] for every event of the log, memory-mapped perhaps. It must see the past only:
        `dataset.log.history_end`.
    """

    def lists(positions: np.ndarray, key: BatchKey) -> CandidateLists:
        answer = retrieval(positions) if callable(retrieval) else retrieval[positions]
        answer = expect_integers(answer, "retrieval", size=len(dataset.catalogue))
        fits = answer.ndim == 2 and len(answer) == len(positions) and answer.shape[1] > 0
        expect(fits, "retrieval", f"rows [{len(positions)}, R] of at least one candidate", f"shape {list(answer.shape)}")
        rows = np.column_stack([dataset.log.item[positions], answer]).astype(np.int32)
        if not dataset.repeats:
            rows = SeenPairs(dataset, positions).drop(rows, kept=rows == rows[:, :1])
        rows[_repeated(rows, np.zeros_like(rows))] = 0
        labels = np.zeros(rows.shape, np.float32)
        labels[:, 0] = rows[:, 0] > 0
        return CandidateLists(rows, labels)

    if callable(retrieval):
        table: Any = name_of(retrieval)
    else:
        some = retrieval[:: max(1, len(retrieval) // DESCRIBED_ROWS)]
        table = {"shape": list(retrieval.shape), "sha256": digest(some).sha256}
    return CandidateSource(lists, {"kind": "retrieved", "retrieval": table})


def expect_threshold(dataset: Dataset, row: Any, name: str) -> None:
    """Raise ValueError for a threshold that is no action row above another one, or whose actions are in no order of meaning."""
    raw, out = dataset.action_names, "one; name Columns.action"
    expect(dataset.schema.actions > 2, name, "events of two actions or more, such as ('shown', 'click')", out)
    rows = "".join(f"{', ' if place else ': '}{place + 1} is {value!r}" for place, value in enumerate(raw[:20]))
    good = isinstance(row, int | np.integer) and not isinstance(row, bool) and 2 <= row < dataset.schema.actions
    expect(good, name, f"an action row in [2, {dataset.schema.actions}){rows}", repr(row))
    if not dataset.columns.actions and any(isinstance(value, str) for value in raw):
        expected = "Columns.actions in ascending order of what they mean, such as ('shown', 'click'), for a threshold"
        expect(False, name, expected, f"none, which leaves them in alphabetical order{rows}")


def _repeated(rows: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Return bool [..., C], true for all entries of an item in a list but the first one with the highest action."""
    order = np.lexsort((-action, rows))
    ascending, repeated = np.take_along_axis(rows, order, axis=-1), np.zeros(rows.shape, np.bool_)
    np.put_along_axis(repeated, order[..., 1:], ascending[..., 1:] == ascending[..., :-1], axis=-1)
    return repeated


def logged(dataset: Dataset, *, counts: Mapping[str, int] | None = None) -> CandidateSource:
    """Return candidates of logged requests, with stage and labels by name; positions are `dataset.cascade.positions`.

    Unless users come back to items (`Dataset.repeats`), candidates that were not shown and that the user has met strictly
    before the request are left out: a filter does it in serving.

    Args:
      counts: candidates by stage, drawn again for every batch, such as {"exposed": 8, "ranked": 8, "retrieved": 16}; a request
        with fewer of a stage gives all of them. None takes all candidates.

    Raises:
      ValueError: data without a cascade, an unknown stage, no candidates.
    """
    cascade: Cascade = dataset.cascade  # type: ignore[assignment]
    expect(cascade is not None, "Dataset.cascade", "a Cascade, as `readers.read_cascade` gives", None)
    known = counts is None or (set(counts) <= set(STAGES) and sum(counts.values()) > 0)
    good = known and all(isinstance(count, int) and count >= 0 for count in (counts or {}).values())
    expect(good, "counts", f"numbers of candidates by stage of {STAGES}", counts)

    def lists(positions: np.ndarray, key: BatchKey) -> CandidateLists:
        at = cascade.at(positions)
        rows, stage = cascade.rows[at], cascade.stage[at]
        if not dataset.repeats:
            rows = SeenPairs(dataset, cascade.positions[at]).drop(rows, kept=stage == STAGES.index("exposed"))
        if counts is None:
            return CandidateLists(rows, cascade.labels_at(at, slice(None)))
        order, chosen, there = key.random(CHOICE).random(rows.shape), [], []
        for code, name in enumerate(STAGES):
            rank = np.where((rows > 0) & (stage == code), order, 2.0)
            chosen.append(np.argsort(rank, axis=1, kind="stable")[:, : counts.get(name, 0)])
            there.append(np.take_along_axis(rank, chosen[-1], 1) < 2)
        places = np.concatenate(chosen, axis=1)
        found = np.where(np.concatenate(there, axis=1), np.take_along_axis(rows, places, 1), 0)
        return CandidateLists(found, cascade.labels_at(at[:, None], places))

    return CandidateSource(lists, {"kind": "logged", "counts": None if counts is None else dict(counts)})
