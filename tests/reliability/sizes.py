"""How large the reliability suites are, and the seed they draw with: the one place for both.

AIF_JAX_RELIABILITY_SCALE multiplies every size (0.01 is a smoke of under a minute); AIF_JAX_RELIABILITY_SEED repeats a run.
"""

import dataclasses
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one run of all suites; `scaled` multiplies, and keeps at least what a suite needs to test anything."""

    writer_kills: int = 600  # at random moments
    writer_crash_points: int = 200  # at a given change of a file
    follower_kills: int = 100  # of a process that applies an update stream
    upload_kills: int = 50  # of a process that publishes snapshots
    training_kills: int = 100
    training_crash_points: int = 100
    refresh_kills: int = 100  # of a job that refreshes a model
    storm_requests: int = 1_000_000
    storm_publishes: int = 100
    damaged_files: int = 1500  # of each format
    examples: int = 3000  # drawn by hypothesis, of each entry
    chaos_requests: int = 10_000  # to async callables, and as many to plain ones
    soak_seconds: int = 600
    exports: int = 60  # of presets, lengths and additions
    roads: int = 12  # from the files of a company to the service
    malformed_calls: int = 10_000  # of the service, over all ways in
    flood_bytes: int = 512 << 20  # that a hostile caller tries to send, of each flood
    drips: int = 500  # connections at once, of all kinds together

    def scaled(self, scale: float) -> "Sizes":
        """The same suites in another size."""
        least = {"storm_publishes": 3, "storm_requests": 2000, "soak_seconds": 3, "chaos_requests": 200, "examples": 10}
        least |= {"damaged_files": 8, "malformed_calls": 300, "roads": 1}
        least |= {"flood_bytes": 128 << 20, "drips": 20}
        fields = dataclasses.asdict(self).items()
        return Sizes(**{name: max(least.get(name, 4), round(size * scale)) for name, size in fields})


def _seed() -> int:
    given = os.environ.get("AIF_JAX_RELIABILITY_SEED")
    # The processes of one run of pytest-xdist share this name, and so the seed.
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    return int(given) if given else zlib.crc32(run.encode()) if run else int.from_bytes(os.urandom(4), "little")


FULL = Sizes().scaled(float(os.environ.get("AIF_JAX_RELIABILITY_SCALE", "1")))
SMOKE = Sizes().scaled(0.0)
SEED = _seed()


def fully(test: Any) -> Any:
    """Marks a test that runs at full size alone."""
    return pytest.mark.lane("reliability")(pytest.mark.timeout(7200)(test))


def full(*values: Any) -> Any:
    """The parameters of a test at full size."""
    return pytest.param(*values, id="full", marks=[pytest.mark.lane("reliability"), pytest.mark.timeout(7200)])


RUNS = [pytest.param(SMOKE, 0, id="short"), full(FULL, SEED)]
"""Parameters (sizes, seed) of a suite that is the same at every size."""


def resident() -> int:
    """Bytes of memory of this process that are in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def generator(name: str, seed: int = SEED) -> np.random.Generator:
    """A random generator for one suite; prints how to draw the same again."""
    print(f"{name}: AIF_JAX_RELIABILITY_SEED={seed}")
    return np.random.default_rng((seed, zlib.crc32(name.encode())))
