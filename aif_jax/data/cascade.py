"""The cascade: logged requests with all retrieved candidates, how far each came, and the ranker's scores.

Pre-ranking sees what retrieval found, not what was shown. `candidates.staged` makes lists for training of a cascade.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from aif_jax.checks import expect, expect_array, expect_integers, expect_range

STAGE = "stage"
"""The label that says how far a candidate came: a position in STAGES."""
RANKER = "ranker"
"""The label with the ranker's scores, which evaluation compares the model's order with."""
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
      stage: int8 [R, M] position in `STAGES[:4]`; undefined for padding.
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
        """Return the requests int64 [B] at positions of the log; ValueError for a position without a request."""
        wanted = np.asarray(positions)
        at = np.searchsorted(self.positions, wanted)
        there = np.append(self.positions, -1)[at] == wanted
        expect(there.all(), "positions", "first events of requests of the cascade", f"{wanted[~there][:1]}")
        return at

    def labels_at(self, at: Any, places: Any) -> dict[str, np.ndarray]:
        """Return stage and labels by name of some candidates of some requests, float32."""
        return {STAGE: self.stage[at, places].astype(np.float32)} | {name: v[at, places] for name, v in self.labels.items()}


def from_columns(
    log: Any, *, user: Any, time: Any, rows: Any, stage: Any, labels: Mapping[str, Any], candidates: int,
    names: Callable[[int, int], tuple[str, str, str]] | None = None,
) -> tuple[Cascade, int, int]:  # fmt: skip
    """Return a cascade from one line a candidate, the number of requests left out, and the number of candidates cut.

    A request is the events of one user at one time; without an event in the log it has no history and is left out, as are lines
    of row 0. Of more than `candidates` the furthest stages are kept, then the first lines. `names(line, other line)` gives the
    names of item, request and lines for the error about a repeated candidate; default: rows, seconds, lines counted from 1.

    Raises:
      TypeError, ValueError: values that are no integers in range; arrays that do not fit together; a candidate that is repeated
        in a request; infinite labels.
    """
    given = {"user": (user, 2**31), "item": (rows, 2**31), STAGE: (stage, len(LOGGED))}
    user, rows, stage = (expect_integers(v, name, size=size).astype(np.int64) for name, (v, size) in given.items())
    time = np.asarray(time)
    expect(time.dtype.kind in "iu", "time", "integer seconds", f"dtype {time.dtype.name}")
    time = time.astype(np.int64)
    expect(candidates >= 1, "candidates", "at least 1", candidates)
    for name, values in {"time": time, "item": rows, STAGE: stage, **labels}.items():
        expect(np.shape(values) == user.shape, name, f"{len(user)} values like the users", np.shape(values))
    lines = np.flatnonzero((rows > 0) & (user > 0) & (user < log.users))
    order = lines[np.lexsort((rows[lines], time[lines], user[lines]))]  # stable: equal ones in the order of the lines
    same = np.flatnonzero(np.logical_and.reduce([np.diff(values[order]) == 0 for values in (user, time, rows)]))
    if same.size:
        at = same[np.argmin(order[same + 1])]
        one, other = map(int, order[at : at + 2])
        plain = f"item row {rows[one]}", f"user row {user[one]} at {time[one]} s", f"lines {one + 1} and {other + 1}"
        item, who, where = plain if names is None else names(one, other)
        more = f"; {same.size} such lines in all" if same.size > 1 else ""
        expect(False, "cascade", "every item once in a request", f"{item} twice in the request of {who}, in {where}{more}")
    start = log.request_start(user[lines], time[lines])
    unseen, lines = lines[start < 0], lines[start >= 0]
    without = len(set(zip(user[unseen].tolist(), time[unseen].tolist(), strict=True)))
    positions, request = np.unique(start[start >= 0], return_inverse=True)
    order = np.lexsort((stage[lines], request))
    place = np.arange(len(order)) - np.searchsorted(request[order], request[order])
    chosen = order[place < candidates]
    chosen = chosen[np.lexsort((rows[lines[chosen]], stage[lines[chosen]], request[chosen]))]
    at, chosen = (request[chosen], place[place < candidates]), lines[chosen]

    def table(values: Any, dtype: Any, fill: Any) -> np.ndarray:
        filled = np.full((len(positions), candidates), fill, dtype)
        filled[at] = np.asarray(values)[chosen]
        return filled

    cascade = Cascade(
        positions=positions,
        rows=table(rows, np.int32, 0),
        stage=table(stage, np.int8, 0),
        labels={name: table(values, np.float32, np.nan) for name, values in labels.items()},
    )
    return cascade, without, len(lines) - len(chosen)
