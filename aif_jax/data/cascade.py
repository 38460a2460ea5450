"""The cascade: logged requests with all retrieved candidates, how far each came, and the ranker's scores.

Pre-ranking sees what retrieval found, not what was shown. `candidates.logged` makes lists for training of a cascade.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from aif_jax.checks import expect, expect_array, expect_range
from aif_jax.data.events import EventLog

STAGE = "stage"
"""The label that says how far a candidate came: a position in STAGES."""
RANKER = "ranker"
"""The label with the ranker's scores, which evaluation compares the model's order with."""
STAGES = ("exposed", "ranked", "pre_ranked", "retrieved")
"""How far a candidate came, the furthest first: shown; scored by the ranker and not shown; passed on by pre-ranking and not
scored; cut by pre-ranking."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cascade:
    """Logged requests, at most M candidates each.

    Attributes:
      positions: int64 [R] ascending positions in the event log: the first event of each request, for user, time and history.
      rows: int32 [R, M] catalogue rows, 0 where there is no candidate.
      stage: int8 [R, M] position in `STAGES`; undefined for padding.
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
        expect_range(stage, "Cascade.stage", size=len(STAGES))
        expect(STAGE not in self.labels, "Cascade.labels", f"no label {STAGE!r}, which Cascade.stage is", sorted(self.labels))
        for name, values in self.labels.items():
            expect_array(values, f"Cascade.labels[{name!r}]", dtype=np.float32, shape=rows.shape)
            finite = not np.isinf(values).any()
            expect(finite, f"Cascade.labels[{name!r}]", "finite values, NaN where unknown", "an infinite one")

    def __len__(self) -> int:
        return len(self.positions)

    def __repr__(self) -> str:
        counts = np.bincount(self.stage[self.rows > 0], minlength=len(STAGES))
        stages = ", ".join(f"{count:,} {name}" for name, count in zip(STAGES, counts, strict=True))
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
    log: EventLog, *, user: np.ndarray, time: np.ndarray, rows: np.ndarray, stage: np.ndarray,
    labels: Mapping[str, np.ndarray], candidates: int,
) -> tuple[Cascade, int, int]:  # fmt: skip
    """Return a cascade from one line a candidate, the number of requests left out, and the number of candidates cut.

    A request is the events of one user at one time; without an event in the log it has no history and is left out, as are lines
    of row 0. Of more than `candidates` the furthest stages are kept, then the first lines. A candidate comes once in a request.
    """
    expect(candidates >= 1, "candidates", "at least 1", candidates)
    lines = np.flatnonzero((rows > 0) & (user > 0))
    start = log.request_start(user[lines], time[lines])
    unseen, lines = lines[start < 0], lines[start >= 0]
    without = len(set(zip(user[unseen].tolist(), time[unseen].tolist(), strict=True)))
    positions, request = np.unique(start[start >= 0], return_inverse=True)
    order = np.lexsort((stage[lines], request))
    place = np.arange(len(order)) - np.searchsorted(request[order], request[order])
    kept = order[place < candidates]
    kept = kept[np.lexsort((rows[lines[kept]], stage[lines[kept]], request[kept]))]
    at = request[kept], place[place < candidates]  # 0, 1, ... in each request, as before the sort within requests

    def table(values: np.ndarray, dtype: Any, fill: Any) -> np.ndarray:
        filled = np.full((len(positions), candidates), fill, dtype)
        filled[at] = values[lines[kept]]
        return filled

    named = {name: table(values, np.float32, np.nan) for name, values in labels.items()}
    cascade = Cascade(positions=positions, rows=table(rows, np.int32, 0), stage=table(stage, np.int8, 0), labels=named)
    return cascade, without, len(lines) - len(kept)
