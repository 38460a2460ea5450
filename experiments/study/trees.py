"""A ranker of boosted trees: LambdaMART by LightGBM on raw features of a request and a candidate.

Features  of the candidate: events and recent events until the request, days since the latest one. Of the user and each field of
          the candidate, the item itself first: meetings, their share of the history, how many events and days ago the last one
          was. Length of the history. Similarity of PureSVD factors and users in common with the last events. All events that
          are read are strictly before the request; factors and users in common are of the training events of *other* users,
          of a training request too, so that no feature holds the answer that the trees are taught.
Training  groups of the event's item (1), and what retrieval finds and popular negatives (0), of a sample of late events,
          without items that have no event before the request
Scale     LambdaMART orders and has no scale. The scores are multiplied by one number that makes the event's item likeliest in a
          softmax over the lists of a tenth of the groups, held out: logits that listwise distillation can teach. What
          the popularity correction of serving adds is taken off in advance.

Source: C. Burges, From RankNet to LambdaRank to LambdaMART, MSR-TR-2010-82.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, sparse

from aif_jax.blocks import PureSvd
from aif_jax.data import NegativeSampler, SeenPairs
from aif_jax.data.candidates import retrieved
from aif_jax.data.order import BatchKey
from aif_jax.data.split import sample_positions
from aif_jax.output import track
from aif_jax.store import sealed
from aif_jax.store.trained import digest
from aif_jax.train.distillation import Scores
from aif_jax.train.edits import svd_factors
from experiments.study.datasets import StudyData
from experiments.study.question import MIN_HISTORY, Part

FORMAT = "ranker of trees 1"
GROUPS, POPULAR = 8_000, 100  # training requests, and popular negatives of each
LATE = 0.3  # share of the training events, the latest ones, that groups are drawn of
TREES = 300
OPTIONS: dict[str, Any] = dict(
    objective="lambdarank", num_leaves=31, learning_rate=0.1, min_data_in_leaf=50, feature_fraction=0.8,
    lambdarank_truncation_level=20, num_threads=1, deterministic=True, force_row_wise=True, seed=0, verbose=-1,
)  # fmt: skip
DAY = 86400
RECENT = (1, 30)  # days of recent events
FOLDS = 4  # of users: each has the factors of the others
SVD, DECAYS = PureSvd(width=32, length=128), (0.5, 2.0)  # how fast older events count less: the history, the last events
LAST = 20  # events whose users are counted
TIES = np.float32(1e-3)  # of the popularity correction stays: what the trees cannot tell apart is ordered by popularity
BLOCK = 128  # requests whose features are in memory


class Counts:
    """How many events a key had before a moment, and when the last one was: keys and moments are integers of at least 0."""

    def __init__(self, keys: np.ndarray, moments: np.ndarray):
        self._span = int(moments.max()) + 2
        self._events = np.sort(keys.astype(np.int64) * self._span + moments)

    def between(self, keys: np.ndarray, first: Any, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return events of the keys at moments of at least `first` and before `end`, and the last moment, of one shape."""
        begin = keys.astype(np.int64) * self._span
        low, high = (np.searchsorted(self._events, begin + np.clip(moment, 0, self._span - 1)) for moment in (first, end))
        return high - low, self._events[np.maximum(high - 1, 0)] - begin


def fields_of(data: StudyData) -> dict[str, np.ndarray]:
    """Return the item and what a history has of it: int32 [N] by field."""
    return {name: data.dataset.catalogue.items.ids[name] for name in data.dataset.schema.behaviour_fields}


class Features:
    """`features(positions [B], rows [B, C]) -> float32 [B, C, F]`, see the header; a time is NaN where there is no event."""

    def __init__(self, data: StudyData, part: Part):
        log, self.log, self.fields = data.dataset.log, data.dataset.log, fields_of(data)
        self._items = Counts(log.item, log.time)
        place = np.arange(len(log))
        self._met = {name: Counts(self._pair(ids, log.user, log.item), place) for name, ids in self.fields.items()}
        user, item = log.user[part.seen], log.item[part.seen]
        size = len(data.dataset.catalogue)
        self._factors = np.stack(
            [svd_factors(user[user % FOLDS != n], item[user % FOLDS != n], size=size, block=SVD) for n in range(FOLDS)]
        )
        pairs = np.unique(user[item > 0] * np.int64(size) + item[item > 0])
        entries = np.ones(len(pairs), np.float32), (pairs // size, pairs % size)
        self._users = sparse.csr_array(entries, shape=(log.users, size))  # who met what
        self._count = np.bincount(pairs % size, minlength=size)

    @staticmethod
    def _pair(ids: np.ndarray, users: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return users * (np.int64(ids.max()) + 1) + ids[rows]

    def __call__(self, positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        log, user = self.log, self.log.user[positions][:, None]
        start, end, now = log.offsets[user], log.history_end(positions)[:, None], log.time[positions][:, None]
        count, latest = self._items.between(rows, 0, now)
        made = [end - start, count, np.where(count > 0, (now - latest) / DAY, np.nan)]
        made += [self._items.between(rows, now - days * DAY, now)[0] for days in RECENT]
        for name, ids in self.fields.items():
            count, place = self._met[name].between(self._pair(ids, user, rows), 0, end)
            met = (count > 0) & (ids[rows] > 0)
            place = np.where(met, place, 0)
            made += [np.where(met, count, 0), np.where(met, count / np.maximum(end - start, 1), 0)]
            made += [np.where(met, past, np.nan) for past in (end - place, (now - log.time[place]) / DAY)]
        made += self._similar(positions, rows, start, end)
        return np.stack([np.broadcast_to(one, rows.shape) for one in made], -1).astype(np.float32)

    def _similar(self, positions: np.ndarray, rows: np.ndarray, start: np.ndarray, end: np.ndarray) -> list[np.ndarray]:
        """Return similarity [B, C] of candidates and last events, by PureSVD for each of DECAYS, and by users in common."""
        at = end - 1 - np.arange(SVD.length)
        items = np.where(at >= start, self.log.item[np.maximum(at, 0)], 0)
        weights = (np.arange(1, SVD.length + 1) ** -np.array(DECAYS)[:, None]).astype(np.float32)
        user = self.log.user[positions]
        fold = (user % FOLDS)[:, None]
        history = np.einsum("nl,bld->bnd", weights, self._factors[fold, items])
        by_factors = np.einsum("bnd,bcd->nbc", history, self._factors[fold, rows], optimize=True)
        norm = np.sqrt(np.maximum(self._count - self._users[user].toarray(), 1))  # by other users
        last, owner = items[:, :LAST], np.arange(len(user))
        place = np.where(last > 0, weights[0, :LAST] / np.take_along_axis(norm, last, 1), 0)
        history = sparse.csr_array((place.ravel(), (owner.repeat(LAST), last.ravel())), shape=norm.shape)
        others = (history @ self._users.T).toarray()
        others[owner, user] = 0
        shared = np.take_along_axis(others.astype(np.float32) @ self._users, rows, 1)
        return [*by_factors, shared / np.take_along_axis(norm, rows, 1)]


class Groups(NamedTuple):
    """Training requests, the event's item in column 0."""

    positions: np.ndarray  # int64 [G]
    rows: np.ndarray  # int32 [G, C], 0 for none


def groups(data: StudyData, positions: np.ndarray, teaching: np.ndarray, counts: np.ndarray) -> Groups:
    """Return a random sample of training events with their candidates."""
    log = data.dataset.log
    at = np.intersect1d(positions, sample_positions(log, min_history=MIN_HISTORY))
    at = at[log.time[at] >= np.quantile(log.time[at], 1 - LATE)]
    before = Counts(log.item, log.time)

    def known(at: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return whether anybody met a row before the request: retrieval finds no other."""
        return before.between(rows, 0, log.time[at][:, None])[0] > 0

    at = np.random.default_rng(0).permutation(at[known(at, log.item[at][:, None])[:, 0]])[:GROUPS]
    found = retrieved(data.dataset, retrieval=teaching)
    seen, key = None if data.repeats else SeenPairs(data.dataset, at), BatchKey(0, 0, 0)
    popular = NegativeSampler(counts).sample(len(at), POPULAR, key=key, avoid=log.item[at], seen=seen)
    rows = np.concatenate([found(at, key).rows, popular], 1)
    return Groups(at, np.where(known(at, rows), rows, 0))


def fit(data: StudyData, part: Part, groups: Groups, *, offset: np.ndarray, folder: Path) -> tuple[Scores, str]:
    """Return the scores of the trees and their version; trained, or read from `folder` if they were trained before.

    Args:
      offset: float32 [N], what serving adds to the scores of items.

    Raises:
      ImportError: LightGBM is not installed.
    """
    try:
        import lightgbm
    except ImportError as error:
        raise ImportError('The ranker "trees" needs LightGBM: pip install "aif_jax[experiments]"') from error
    features = Features(data, part)

    def raw(booster: Any, positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return scores [B, C] of the trees as they are."""
        made = np.empty(rows.shape, np.float32)
        for start in range(0, len(rows), BLOCK):
            inputs = features(positions[start : start + BLOCK], rows[start : start + BLOCK])
            made[start : start + BLOCK] = booster.predict(inputs.reshape(-1, inputs.shape[-1])).reshape(inputs.shape[:2])
        return made

    if not sealed.is_complete(folder):
        here, taught = groups.rows > 0, len(groups.rows) - len(groups.rows) // 10
        blocks = np.array_split(np.arange(taught), -(-taught // BLOCK))
        inputs = [
            features(groups.positions[n], groups.rows[n])[here[n]]
            for n in track(blocks, label="features of groups", unit="blocks")
        ]
        labels = np.broadcast_to(np.arange(here.shape[1]) == 0, here.shape)[:taught][here[:taught]]
        table = lightgbm.Dataset(np.concatenate(inputs), labels.astype(np.float32), group=here[:taught].sum(1))
        booster = lightgbm.train(OPTIONS, table, TREES)
        held = np.where(here, 0, -np.inf)[taught:] + raw(booster, groups.positions[taught:], groups.rows[taught:])
        scale = likeliest_scale(held)
        text = np.frombuffer(booster.model_to_string().encode(), np.uint8)
        sealed.write(folder, {"trees": text}, {"scale": scale}, format=FORMAT)
    text, scale = sealed.read(folder, format=FORMAT)["trees"], sealed.inspect(folder, format=FORMAT)["scale"]
    booster = lightgbm.Booster(model_str=text.tobytes().decode())

    def scores(positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.float32(scale) * raw(booster, positions, rows) - (1 - TIES) * offset[rows]

    return scores, digest(text).sha256[:12]


def likeliest_scale(scores: np.ndarray) -> float:
    """Return scale of scores [G, C], -inf for none, under which a softmax gives the candidates in column 0 most likelihood."""
    scores = scores - scores.max(1, keepdims=True)

    def loss(power: float) -> float:
        scaled = np.exp(power) * scores
        return float(np.mean(np.log(np.exp(scaled).sum(1)) - scaled[:, 0]))

    return float(np.exp(optimize.minimize_scalar(loss, bounds=(-5, 5), method="bounded").x))
