"""When each stage of one request ran, and a picture of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

STAGES = ["features", "user", "retrieval", "wait_user", "queue", "lookup", "upload", "score", "fetch"]
LANES = {"features": "user side", "user": "user side", "retrieval": "retrieval", "wait_user": "real time"}
"""The picture's line of each stage; a stage that is not named here runs in real time."""


class Span(NamedTuple):
    """One stage: start and end in seconds since the request arrived."""

    stage: str
    start: float
    end: float


@dataclasses.dataclass(eq=False)
class Timeline:
    """Spans of one request.

    Stages: `features` (fetch), `user` (upload and user function), `retrieval`; then, with the candidates there,
    `wait_user` (the user side was not ready yet), `queue` (for a scoring thread), `lookup`, `upload`, `score`
    (interaction and top-k on the device), `fetch`; `critical` (candidates there -> answer ready) and `total`.
    """

    arrival: float = dataclasses.field(default_factory=time.perf_counter)
    spans: list[Span] = dataclasses.field(default_factory=list)

    def add(self, stage: str, start: float, end: float) -> None:
        """Notes a stage by the clock of `time.perf_counter`."""
        self.spans.append(Span(stage, start - self.arrival, end - self.arrival))

    def stages(self) -> dict[str, float]:
        """Seconds by stage; a stage that ran several times (mini-batches) is summed."""
        seconds: dict[str, float] = {}
        for stage, start, end in self.spans:
            seconds[stage] = seconds.get(stage, 0.0) + end - start
        return seconds


def draw(timelines: Mapping[str, Timeline], path: str | Path) -> None:
    """Draws requests, timelines by title, one above the other on a common clock; the ending of `path` names the format.

    Raises:
      ImportError: matplotlib is not there.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('draw needs matplotlib: pip install "aif_jax[experiments]"') from error
    lanes = ("user side", "retrieval", "real time")
    figure = Figure(figsize=(9, 0.6 + 1.5 * len(timelines)), layout="constrained")
    longest = max((span.end for timeline in timelines.values() for span in timeline.spans), default=0.0)
    panels = figure.subplots(len(timelines), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (title, timeline) in zip(panels, timelines.items(), strict=True):
        for stage, start, end in timeline.spans:
            if stage in ("critical", "total"):
                continue
            lane = lanes.index(LANES.get(stage, "real time"))
            panel.barh(lane, (end - start) * 1e3, left=start * 1e3, color=f"C{STAGES.index(stage)}", height=0.7)
            if end - start > 0.01 * len(stage) * longest:  # else the word would not fit
                panel.text((start + end) * 500, lane, stage, ha="center", va="center", fontsize=8)
        panel.set_yticks(range(len(lanes)), lanes)
        panel.invert_yaxis()
        panel.set_title(title, loc="left", fontsize=9)
    panels[-1].set_xlabel("milliseconds since the request arrived")
    figure.savefig(path, dpi=130)
