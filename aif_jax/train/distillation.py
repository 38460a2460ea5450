"""Distillation: a ranker's scores are one more label, of the candidates of a task and of those that retrieval finds.

*Why.* A pre-ranker is judged by what the ranker behind it loses (`metrics.ranker_recall_at_k`). The loss of a task teaches one
event against its negatives; the ranker's scores of everything that retrieval finds teach the rest.

*Candidates of the task* are scored batch by batch, again in every epoch. *Retrieved candidates* are scored once, before
training, into folders from which a killed run resumes; every epoch draws some again. *A logged ranker* is a label of
`Dataset.cascade`.

Sources: Hinton et al. 2015 (arXiv 1503.02531); for a pre-ranker RankFlow (Qin et al. 2022) and HCCP (arXiv 2502.10284).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from aif_jax.checks import check_encoding, expect, expect_array, expect_finite
from aif_jax.data.candidates import CandidateLists, CandidateSource, SourceFn, describe, retrieved
from aif_jax.data.cascade import Cascade
from aif_jax.data.dataset import Dataset
from aif_jax.data.lengths import choose_lengths, sampled_lengths
from aif_jax.data.order import DRAWS, BatchKey
from aif_jax.data.pipeline import make_batch
from aif_jax.model import PreRanker, name_of
from aif_jax.output import hidden, track
from aif_jax.scores import objective_names
from aif_jax.store import sealed
from aif_jax.store.trained import Trained, digest
from aif_jax.train.evaluate import item_rows, predict
from aif_jax.train.losses import Loss, distill_listwise
from aif_jax.trees import take
from aif_jax.types import ItemRow, Params, UserFeatures

LABEL, TEACHER = "label", "teacher"
"""Names of the labels of a batch with a ranker's scores."""
FORMAT = "aif_jax ranker scores 1"
USERS = 32  # requests that are scored together
PART = 8192  # requests of a folder of scores: what a killed run scores again at most
WEIGHT, COUNT = 16.0, 40  # of the ranker's term, and drawn candidates of each sample: those of all results

Scores: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""`scores(positions [B] of the log, catalogue rows int32 [B, C]) -> float32 [B, C]`."""
Ranker: TypeAlias = Trained | Scores | str
"""A trained model, a function, or the name of a label of `Dataset.cascade`."""
Retrieval: TypeAlias = Callable[[np.ndarray], Any] | np.ndarray
"""`retrieval(positions [B] of the log) -> catalogue rows int [B, N]`, 0 for none; or such rows [n, N] of every event."""


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A ranker whose scores are trained on too, for a model of one objective: `fit(teacher=Teacher(run.trained))`.

    Attributes:
      ranker: a `Trained` model of this data, such as `run.trained`; a function of positions [B] in the log and catalogue rows
        [B, C] that returns float32 [B, C]; or the name of a label of `Dataset.cascade`, scores that any ranker has logged.
      loss: the loss of the ranker's scores, with its weight.
      candidates: retrieved candidates of each sample, scored once, before training: a file of `readers.read_candidates`; a
        function of positions [B] in the log that returns catalogue rows [B, N]; or rows [n, N] of all events. None: the ranker
        scores the candidates of the task alone, in every epoch.
      count: how many retrieved or logged candidates of each sample are drawn for a batch.

    Raises:
      ValueError: a count below 1; candidates next to a label, which is of logged ones.
    """

    ranker: Ranker
    loss: Loss = WEIGHT * distill_listwise
    candidates: Retrieval | str | Path | None = None
    count: int = COUNT

    def __post_init__(self):
        fits, got = isinstance(self.ranker, Trained | str) or callable(self.ranker), type(self.ranker).__name__
        expect(fits, "Teacher.ranker", "a Trained (run.trained), a function or the name of a label", got, error=TypeError)
        expect(self.count >= 1, "Teacher.count", "at least 1", self.count)
        fits = self.candidates is None or not isinstance(self.ranker, str)
        expect(fits, "Teacher.candidates", "None for a label of the cascade, whose candidates are logged", self.candidates)

    @property
    def name(self) -> str:
        """The teacher in the record of a run: version of a model, name of a function or of a label, digest of an array."""
        of, found = self.ranker, self.candidates
        ranker = of if isinstance(of, str) else of.version if isinstance(of, Trained) else name_of(of)
        if found is None:
            return f"{ranker}, {self.count} candidates" if isinstance(of, str) else ranker
        found = name_of(found) if callable(found) else digest(found).sha256 if isinstance(found, np.ndarray) else found
        return f"{ranker}, {self.count} candidates of {found}"


@dataclasses.dataclass(frozen=True, eq=False)
class RankedCandidates:
    """A ranker's scores of candidates of R requests.

    Attributes:
      positions: int64 [R] positions in the log, ascending.
      rows: int32 [R, N] catalogue rows, 0 for none.
      scores: float32 [R, N] logits, the higher the better; NaN for a candidate that the ranker did not score.
    """

    positions: np.ndarray
    rows: np.ndarray
    scores: np.ndarray

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and scores [B, N] of some requests; 0 and NaN for a request without."""
        place = np.searchsorted(self.positions, positions)
        there = (np.append(self.positions, -1)[place] == positions)[:, None]
        place = np.minimum(place, len(self.positions) - 1)
        return np.where(there, self.rows[place], 0), np.where(there, self.scores[place], np.float32(np.nan))


def with_teacher(loss: Any, term: Loss, objectives: tuple[str, ...] = ()) -> Loss:
    """Return the loss of the labels plus a loss of the ranker's scores, for a model of one objective."""
    names = objective_names(objectives)
    expect(len(names) < 2, "fit teacher", "a model of one objective; give a loss with the label of each", list(names))
    expect(isinstance(loss, Loss), "fit loss", "a losses.Loss next to a teacher", f"{loss!r}")
    return loss.of(LABEL) + term.of(TEACHER)


def scores_of(teacher: Trained | Scores, data: Dataset) -> Scores:
    """Return the teacher as a function whose scores are checked; ValueError, EncodingMismatch for one that does not fit."""
    if isinstance(teacher, Trained):
        check_encoding("teacher", expected=data.encoding, got=teacher.config.schema.encoding)
        several = objective_names(teacher.config.objectives)
        expect(len(several) < 2, "teacher", "a model of one objective, or a function", f"one of {list(several)}")
        scores = model_scores(teacher.model, teacher.params, data)
    else:
        scores = teacher

    def checked(positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        logits = expect_array(scores(positions, rows), "teacher scores", dtype=np.float32, shape=rows.shape)
        expect_finite(np.where(rows > 0, logits, 0), "teacher scores")
        return logits

    return checked


def model_scores(model: PreRanker, params: Params, data: Dataset) -> Scores:
    """Return logits of a model by row, as in serving: the item function runs once for all items, histories by length.

    With item statistics, which are as of each request, it runs for each candidate.
    """
    longest, events = model.config.history_length, len(data.log)
    histories = sampled_lengths(data, np.arange(events), longest=longest)
    choices = (*choose_lengths(histories, longest=longest, batch_size=USERS, steps=events // USERS), longest)
    tables: list[ItemRow] = []  # made by the first call

    def some(positions: np.ndarray, rows: np.ndarray, length: int) -> np.ndarray:
        if data.statistics is not None:
            batch = make_batch(data, positions, rows, np.zeros(rows.shape, np.float32), config=model.config, length=length)
            return next(predict(model, params, [batch]))
        if not tables:
            with hidden():
                tables.append(item_rows(model, params, data.catalogue))
        return np.asarray(_scores(params, data.user_features(positions, length=length), tables[0], rows, model=model))

    def scores(positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        fits, made = np.searchsorted(choices, data.history_lengths(positions)), np.empty(rows.shape, np.float32)
        for place, length in enumerate(choices):
            mine = np.flatnonzero(np.minimum(fits, len(choices) - 1) == place)
            for start in range(0, len(mine), USERS):
                at = mine[start : start + USERS]
                full = np.resize(at, USERS)  # so that one shape is compiled
                made[at] = some(positions[full], rows[full], length)[: len(at)]
        return made

    return scores


@partial(jax.jit, static_argnames="model")
def _scores(params: Params, users: UserFeatures, table: ItemRow, rows: Any, *, model: PreRanker) -> jax.Array:
    """Return logits [B, C] of the interaction function for B users and rows [B, C] of a table."""
    states = jax.vmap(model.user, (None, 0))(params, users)
    return jax.lax.map(lambda of: model.interaction(params, of[0], take(table, of[1])), (states, rows))


def rank_retrieved(
    scores: Scores, data: Dataset, positions: np.ndarray, retrieval: Retrieval, *, folder: Path, name: str
) -> RankedCandidates:
    """Return a ranker's scores of each request's item and its retrieved candidates, each once; a killed call resumes by part.

    `positions` ascend. Unless users come back to items (`Dataset.repeats`), items that they have met are no candidates.
    ValueError for a folder with parts of another ranker or retrieval, by its name in words, or of other data.
    """
    source = retrieved(data, retrieval=retrieval)
    parts = [positions[start : start + PART] for start in range(0, len(positions), PART)]
    made: list[dict[str, np.ndarray]] = []
    for number, at in enumerate(track(parts, label="ranker scores", unit="parts")):
        path, record = folder / f"{number:05d}", {"of": name, "positions": digest(at).sha256, "data": data.digest}
        if not sealed.is_complete(path):
            rows = source(at, BatchKey(0, 0, 0)).rows
            path.parent.mkdir(parents=True, exist_ok=True)
            sealed.write(path, {"rows": rows, "scores": scores(at, rows)}, record, format=FORMAT)
        arrays, found = sealed.read(path, format=FORMAT), sealed.inspect(path, format=FORMAT)
        same = {key: found.get(key) for key in record} == record
        expect(same, str(path), "scores of this ranker, retrieval and data", "others; remove the folder")
        made.append(arrays)
    rows, scored = (np.concatenate([arrays[part] for arrays in made]) for part in ("rows", "scores"))
    return RankedCandidates(positions, rows, scored)


def logged_ranks(data: Dataset, label: str, positions: np.ndarray) -> RankedCandidates:
    """Return a logged ranker's scores, a label of `Dataset.cascade`; ValueError for none, or no event of a logged request."""
    cascade: Cascade = data.cascade  # type: ignore[assignment]
    expect(cascade is not None, "Teacher.ranker", "data with a cascade for the label of a ranker", f"{data!r}")
    expect(label in cascade.labels, "Teacher.ranker", f"a label of the cascade {sorted(cascade.labels)}", repr(label))
    starts = data.log.history_end(positions)  # the first event of the same request
    there = np.isin(starts, cascade.positions)
    expect(there.any(), "Teacher.ranker", "a training event whose request is in the cascade", f"none of {len(positions)}")
    at = cascade.at(starts[there])
    return RankedCandidates(positions[there], cascade.rows[at], cascade.labels[label][at])


def distilled(source: SourceFn, scores: Scores | RankedCandidates, *, name: str, count: int = COUNT) -> CandidateSource:
    """Return the same candidates with the ranker's logits as one more label; a label without a name is called `LABEL`.

    Of retrieved candidates those of `source` get their scores, and `count` others are drawn without replacement for each list,
    whose other labels are unknown (NaN). `name` is ranker and retrieval in words, for the description.
    """

    def lists(positions: np.ndarray, key: BatchKey) -> CandidateLists:
        rows, labels, log_q = source(positions, key)
        named = labels if isinstance(labels, dict) else {LABEL: labels}
        if isinstance(scores, RankedCandidates):
            found, of = scores.at(positions)
            same = (rows[:, :, None] == found[:, None, :]) & (found[:, None, :] > 0) & ~np.isnan(of[:, None, :])
            own = np.where(same.any(-1), np.take_along_axis(of, same.argmax(-1), 1), np.float32(np.nan))
            left = (found > 0) & ~np.isnan(of) & ~same.any(1)
            drawn = np.argsort(np.where(left, key.random(DRAWS).random(found.shape), 2.0), axis=1)[:, :count]
            more, taught, here = (np.take_along_axis(values, drawn, 1) for values in (found, of, left))
            unknown, rows = np.full(more.shape, np.nan, np.float32), np.concatenate([rows, np.where(here, more, 0)], 1)
            named = {name: np.concatenate([value, unknown], 1) for name, value in named.items()}
            named[TEACHER] = np.concatenate([own, np.where(here, taught, unknown)], 1)
            log_q = None if log_q is None else np.concatenate([log_q, np.zeros(more.shape, np.float32)], 1)
        else:
            named = named | {TEACHER: scores(positions, rows)}
        return CandidateLists(rows, named, log_q)

    settings = {"teacher": name, "of": describe(source)} | ({"count": count} if isinstance(scores, RankedCandidates) else {})
    return CandidateSource(lists, {"kind": "distilled", **settings})
