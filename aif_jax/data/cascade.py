"""The cascade: logged requests with what retrieval found, how far each candidate came, and what the ranker said of it.

Pre-ranking sees what retrieval found, not what was shown. `candidates.staged` makes lists for training of a cascade.

Samples of requests that a service answered: features as they were served, from arrays on disk.

`jobs.outcomes.join_outcomes` writes such a folder from a request log. Nothing of a user is computed again, so what a model
trains on is what the served one was given.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aif_jax.checks import expect, expect_array, expect_integers, expect_range
from aif_jax.data.events import ItemStatistics
from aif_jax.features import check_user_features, user_layout
from aif_jax.schema import Schema
from aif_jax.store.folders import local
from aif_jax.trees import leaves_by_path
from aif_jax.types import UserFeatures

STAGE = "stage"
"""The label that says how far a candidate came: a position in STAGES."""
STAGES = ("exposed", "ranked", "pre_ranked", "retrieved", "in_batch", "sampled")
"""How far a candidate came, the furthest first: shown; scored by the ranker and not shown; passed on by pre-ranking and not
scored; cut by pre-ranking; another sample's exposed item; drawn by popularity."""
LOGGED = STAGES[:4]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cascade:
    """Logged requests, at most M candidates each.

    Attributes:
      positions: int64 [R] ascending positions in the event log: the first event of each request, which gives its user, its
        time, and so its history.
      rows: int32 [R, M] catalogue rows, 0 where there is no candidate.
      stage: int8 [R, M] position in `STAGES[:4]`; of no meaning where there is no candidate.
      labels: float32 [R, M] each, NaN where the log does not know: the objectives' labels, a ranker's score.

    Raises:
      TypeError, ValueError: parts that do not fit together, infinite labels.
    """

    positions: np.ndarray
    rows: np.ndarray
    stage: np.ndarray
    labels: Mapping[str, np.ndarray]

    def __post_init__(self):
        positions = expect_array(self.positions, "Cascade.positions", dtype=np.int64, shape=(None,))
        rows = expect_array(self.rows, "Cascade.rows", dtype=np.int32, shape=(len(positions), None))
        expect((np.diff(positions) > 0).all(), "Cascade.positions", "ascending positions", positions)
        stage = expect_array(self.stage, "Cascade.stage", dtype=np.int8, shape=rows.shape)
        expect_range(stage, "Cascade.stage", size=len(LOGGED))
        expect(STAGE not in self.labels, "Cascade.labels", f"no label {STAGE!r}, which Cascade.stage is", sorted(self.labels))
        for name, values in self.labels.items():
            expect_array(values, f"Cascade.labels[{name!r}]", dtype=np.float32, shape=rows.shape)
            finite = not np.isinf(values).any()
            expect(finite, f"Cascade.labels[{name!r}]", "finite values, NaN where unknown", "an infinite one")

    def __len__(self) -> int:
        return len(self.positions)

    def __repr__(self) -> str:
        counts = np.bincount(self.stage[self.rows > 0], minlength=len(LOGGED))
        stages = ", ".join(f"{count:,} {name}" for name, count in zip(LOGGED, counts, strict=True))
        size = f"{len(self):,} requests of up to {self.rows.shape[1]:,} candidates"
        return f"Cascade({size}: {stages}; labels {sorted(self.labels)})"

    def at(self, positions: Any) -> np.ndarray:
        """int64 [B] requests of positions in the log; ValueError for one that the cascade lacks."""
        return _requests_at(self.positions, positions, "first events of requests of the cascade")

    def taken(self, at: Any, places: Any) -> dict[str, np.ndarray]:
        """Stage and labels by name, of some candidates of some requests, float32."""
        return {STAGE: self.stage[at, places].astype(np.float32)} | {name: v[at, places] for name, v in self.labels.items()}


def _requests_at(known: np.ndarray, positions: Any, expected: str, way_out: str = "") -> np.ndarray:
    """int64 [B] where each position is among the known ones, which ascend; ValueError for one that is not."""
    wanted = np.asarray(positions)
    at = np.searchsorted(known, wanted)
    there = np.append(known, -1)[at] == wanted
    expect(there.all(), "positions", expected, f"{wanted[~there][:1]}{way_out}")
    return at


def from_columns(
    log: Any, *, user: Any, time: Any, rows: Any, stage: Any, labels: Mapping[str, Any], candidates: int,
    names: Callable[[int, int], tuple[str, str, str]] | None = None,
) -> tuple[Cascade, int, int]:  # fmt: skip
    """A cascade from one line for each candidate; how many requests have no event in the log, so no history: left out; and how
    many candidates of the others are.

    A request is the events of one user at one time. Lines of row 0 are left out; of more than `candidates` the furthest stages
    are kept, then those whose lines come first. Where a candidate comes twice in a request, the message has what
    `names(line, other line)` calls the item, the request and the lines; by default rows, seconds, and lines counted from 1.

    Raises:
      TypeError, ValueError: values that are no integers in range; arrays that do not fit together; a candidate that comes twice
        in a request, with the request, the item and both lines; infinite labels.
    """
    given = {"user": (user, 2**31), "item": (rows, 2**31), STAGE: (stage, len(LOGGED))}
    user, rows, stage = (expect_integers(v, name, size=size).astype(np.int64) for name, (v, size) in given.items())
    time = np.asarray(time)
    expect(time.dtype.kind in "iu", "time", "integer seconds", f"dtype {time.dtype.name}")
    time = time.astype(np.int64)
    expect(candidates >= 1, "candidates", "at least 1", candidates)
    for name, values in {"time": time, "item": rows, STAGE: stage, **labels}.items():
        expect(np.shape(values) == user.shape, name, f"{len(user)} values like the users", np.shape(values))
    good = (rows > 0) & (user > 0) & (user < log.users)
    order = np.lexsort((rows, stage, time, user))
    order = order[good[order]]
    user, time, rows, stage = (values[order] for values in (user, time, rows, stage))
    new = np.append(True, (user[1:] != user[:-1]) | (time[1:] != time[:-1]))[: len(user)]
    request, first = np.cumsum(new) - 1, np.flatnonzero(new)
    by_item = np.lexsort((order, rows, request))
    same = np.flatnonzero((np.diff(request[by_item]) == 0) & (np.diff(rows[by_item]) == 0))
    if same.size:
        first = same[np.argmin(order[by_item[same + 1]])]  # by line
        one, other = (int(order[by_item[i]]) for i in (first, first + 1))
        at = by_item[first]
        plain = f"item row {rows[at]}", f"user row {user[at]} at {time[at]} s", f"lines {one + 1} and {other + 1}"
        item, asked, lines = plain if names is None else names(one, other)
        more = f"; {same.size} such lines in all" if same.size > 1 else ""
        got = f"{item} twice in the request of {asked}, in {lines}{more}"
        expect(False, "cascade", "every item once in a request", got)
    ends = log.history_end_at(user[first], time[first])
    kept = np.flatnonzero(ends < log.offsets[user[first] + 1])
    kept = kept[log.time[ends[kept]] == time[first][kept]]
    kept = kept[np.argsort(ends[kept], kind="stable")]
    place_of = np.full(len(first), -1, np.int64)
    place_of[kept] = np.arange(len(kept))
    by_line = np.lexsort((order, stage, request))
    rank = np.empty_like(by_line)
    rank[by_line] = np.arange(len(user)) - first[request]  # requests lie together in both orders
    there = place_of[request] >= 0
    here = there & (rank < candidates)
    before = np.cumsum(here) - here
    at = place_of[request][here], (before - before[first][request])[here]

    def table(values: np.ndarray, dtype: Any, fill: Any) -> np.ndarray:
        made = np.full((len(kept), candidates), fill, dtype)
        made[at] = values[here]
        return made

    made = Cascade(
        positions=ends[kept].astype(np.int64),
        rows=table(rows, np.int32, 0),
        stage=table(stage, np.int8, 0),
        labels={name: table(np.asarray(values, np.float32)[order], np.float32, np.nan) for name, values in labels.items()},
    )
    return made, len(first) - len(kept), int(np.count_nonzero(there & ~here))


RECORD = "samples.json"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ServedFeatures:
    """Features as served, one user's for each request.

    Attributes:
      positions: int64 [R], ascending: the first event of each request in the event log.
      features: UserFeatures [R] of NumPy arrays, memory-mapped perhaps, with L places of history.
      outcomes: names of what may follow on an item, such as ("click", "conversion"): the log's action 1 is an item that was
        shown, action 2 one with the first outcome, and so on.
      statistics: item statistics of the events, where the schema has them; the log has what was shown.

    Raises:
      TypeError, ValueError: arrays of other dtypes or lengths.
    """

    positions: np.ndarray
    features: UserFeatures
    outcomes: tuple[str, ...]
    statistics: ItemStatistics | None = None

    def __post_init__(self):
        positions = expect_array(self.positions, "ServedFeatures.positions", dtype=np.int64, shape=(None,))
        expect((np.diff(positions) > 0).all(), "ServedFeatures.positions", "ascending positions", positions)
        counts = {len(leaf) for leaf in jax.tree.leaves(self.features)}
        expect(counts == {len(positions)}, "ServedFeatures.features", f"arrays of {len(positions)} requests", sorted(counts))

    def at(self, positions: Any) -> np.ndarray:
        """int64 [B] requests of positions in the log; ValueError for one that is not the first event of a request."""
        way_out = "; served features are of requests: train and evaluate the tasks Impressions and Cascaded"
        return _requests_at(self.positions, positions, "first events of served requests", way_out)

    def of(self, positions: Any, *, length: int) -> UserFeatures:
        """The features of some requests [B], in memory, with `length` places of history: cut, or padded with no event."""
        at = self.at(positions)
        features = jax.tree.map(lambda leaf: np.asarray(leaf[at]), self.features)

        def fitted(leaf: np.ndarray) -> np.ndarray:
            padding = max(0, length - leaf.shape[1])
            return np.pad(leaf, ((0, 0), (0, padding)))[:, :length] if padding else np.ascontiguousarray(leaf[:, :length])

        return dataclasses.replace(features, history=jax.tree.map(fitted, features.history))

    def history_lengths(self, positions: Any) -> np.ndarray:
        """int64 [B] events in the histories of some requests."""
        return np.count_nonzero(self.features.history.mask[self.at(positions)], axis=1)


def features_from(arrays: Mapping[str, np.ndarray], schema: Schema, *, encoding: str, name: str) -> UserFeatures:
    """UserFeatures [n] from arrays by dotted name; TypeError, ValueError for those of another schema."""
    layout = user_layout(schema)
    names = leaves_by_path(layout, separator=".")
    expect(arrays.keys() == names.keys(), name, f"the arrays {sorted(names)}", sorted(arrays))
    features = jax.tree.unflatten(jax.tree.structure(layout), [arrays[path] for path in names])
    features = dataclasses.replace(features, encoding=encoding)
    check_user_features(schema, features, batched=True, name=name)
    return features


def names_of(features: UserFeatures) -> dict[str, np.ndarray]:
    """Arrays by dotted name, as `features_from` takes them."""
    return {name: np.asarray(leaf) for name, leaf in leaves_by_path(features, separator=".").items()}


def join_samples(folders: Sequence[str | Path]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The record and the arrays of several runs as one, in memory; "run" int32 [R] and "sample" int64 [R] say where each was.

    Raises:
      FileNotFoundError, ValueError: as `open_samples`; runs that differ in encoder, outcomes or candidates, a request of one
        user and second in two of them.
    """
    records, runs = zip(*map(open_samples, folders), strict=True)
    for folder, other in zip(folders, records, strict=True):
        same = all(other[field] == records[0][field] for field in ("encoding", "outcomes", "arrays"))
        expected = f"the encoder, outcomes and candidates of {folders[0]}"
        expect(same, str(folder), expected, f"others; join both with one encoder {records[0]['encoding'][:12]}")
    users, number = np.unique(np.concatenate([run["users"] for run in runs]), return_inverse=True)
    firsts = {name: np.cumsum([0, *(len(run[name]) for run in runs)]) for name in ("users", "user")}
    user = [1 + number[run["user"] - 1 + first] for run, first in zip(runs, firsts["users"], strict=False)]
    columns = {name: np.concatenate([run[name] for run in runs]) for name in ("item", "action", "time")}
    columns["user"] = np.concatenate(user).astype(np.int32)
    order = np.lexsort((columns["time"], columns["user"]))  # stable
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    positions = place[np.concatenate([run["positions"] + first for run, first in zip(runs, firsts["user"], strict=False)])]
    by_position = np.argsort(positions)
    arrays = {name: column[order] for name, column in columns.items()}
    arrays |= {"users": users, "positions": positions[by_position]}
    arrays["offsets"] = np.searchsorted(arrays["user"], np.arange(len(users) + 2)).astype(np.int64)
    rest = [name for name in records[0]["arrays"] if name not in (*arrays, "version")]
    arrays |= {name: np.concatenate([run[name] for run in runs])[by_position] for name in rest}
    counts = [len(run["positions"]) for run in runs]
    arrays["run"] = np.repeat(np.arange(len(runs), dtype=np.int32), counts)[by_position]
    arrays["sample"] = np.concatenate([np.arange(count) for count in counts])[by_position]
    user, time = (arrays[name][arrays["positions"]] for name in ("user", "time"))
    twice = np.flatnonzero((np.diff(user) == 0) & (np.diff(time) == 0))
    if len(twice):
        one, other = (folders[int(arrays["run"][at])] for at in (twice[0], twice[0] + 1))
        got = f"one at {int(time[twice[0]])} s in {one} and {other} ({len(twice)} in all)"
        way_out = "give join_outcomes the `until` of the run before as `since`"
        raise ValueError(f"samples: expected each request in one run, got {got}; {way_out}")
    return records[0], arrays


def open_samples(folder: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The record and the arrays of a folder of samples, memory-mapped; FileNotFoundError, ValueError for what is none."""
    folder = local(folder)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        named = {name: folder / f"{name}.npy" for name in record["arrays"]}
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: expected a folder of join_outcomes, found no {RECORD}; name another") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / RECORD}: expected the record of join_outcomes, got another: {error!r}") from error
    arrays = {}
    for name, file in named.items():
        try:
            arrays[name] = np.load(file, mmap_mode="r") if file.stat().st_size > 256 else np.load(file)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{file}: expected a complete array of join_outcomes, got none: {error}") from error
    return record, arrays
