"""A picture of when each stage of a request ran."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from aif_jax.serving import Timeline
from experiments import common

STAGES = ["features", "user", "retrieval", "wait_user", "queue", "lookup", "upload", "score", "fetch", "shared"]
LANES = {
    "features": "user side",
    "user": "user side",
    "shared": "user side",
    "retrieval": "retrieval",
    "wait_user": "real time",
}
"""The picture's line of each stage; a stage that is not named here runs in real time."""


def draw(timelines: Mapping[str, Timeline], path: str | Path) -> None:
    """Draws requests, timelines by title, one above the other on a common clock; the ending of `path` names the format.

    Boxes that are too small for their stage's name have it in a legend below.
    """
    lanes = ("user side", "retrieval", "real time")
    longest = max((span.end for timeline in timelines.values() for span in timeline.spans), default=0.0)
    small = {}
    size = (9, 0.6 + 1.5 * len(timelines))
    with common.picture(path, len(timelines), 1, size=size, dpi=130, sharex=True, squeeze=False) as (figure, panels):
        for panel, (title, timeline) in zip(panels[:, 0], timelines.items(), strict=True):
            for stage, start, end in timeline.spans:
                if stage in ("critical", "total"):
                    continue
                lane = lanes.index(LANES.get(stage, "real time"))
                box = panel.barh(lane, (end - start) * 1e3, left=start * 1e3, color=f"C{STAGES.index(stage)}", height=0.7)
                if end - start > 0.01 * len(stage) * longest:
                    panel.text((start + end) * 500, lane, stage, ha="center", va="center", fontsize=8)
                else:  # the word would not fit
                    small[stage] = box
            panel.set_yticks(range(len(lanes)), lanes)
            panel.invert_yaxis()
            panel.set_title(title, loc="left", fontsize=9)
        panels[-1, 0].set_xlabel("milliseconds since the request arrived")
        if small:
            figure.legend(small.values(), small.keys(), loc="outside lower center", ncols=len(small), frameon=False, fontsize=8)
