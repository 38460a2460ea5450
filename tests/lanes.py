"""Lanes: each test is in exactly one, and `python -m pytest` runs the default lane alone.

A file, a test or a case says its lane by the mark `lane`, the nearest of which counts: `pytestmark = pytest.mark.lane("docs")`.
"""

import collections
from collections.abc import Collection
from typing import Any

import pytest

DEFAULT = "default"
LANES = {
    DEFAULT: "the package, its promises, the doors",
    "docs": "every page runs, every link leads somewhere",
    "experiments": "the scripts and data sets of experiments/",
    "standing": "child processes, servers, brokers, a browser, kills in their short form, options beyond `presets.aif`",
    "reliability": "kills, storm, fuzz, chaos, soak in full size",
    "engines": "Ray and Spark; needs their extras and Java: .ci/run engines",
}
"""Markers that a test gets by its lane, and what each lane holds."""


def lane_of(item: pytest.Item) -> str:
    """The lane of a test: that of its nearest mark; else `standing` if it starts a process, and else the default one."""
    if mark := item.get_closest_marker("lane"):
        return mark.args[0]
    return "standing" if "python" in getattr(item, "fixturenames", ()) else DEFAULT


def but_for(few: Collection[str], names: Collection[str]) -> list[Any]:
    """Parameters of a test, of which all but a few are in the lane `standing`."""
    assert set(few) <= set(names)
    return [name if name in few else pytest.param(name, marks=pytest.mark.lane("standing")) for name in names]


def left_out(expression: str) -> list[str]:
    """Lanes that a run with `-m expression` leaves out."""
    names = [collections.defaultdict(bool, {lane: True}) for lane in LANES]
    return [lane for lane, chosen in zip(LANES, names, strict=True) if expression and not eval(expression, {}, chosen)]
