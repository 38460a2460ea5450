"""Minutes of everything at once: each request is answered or refused, every answer is right, and memory stays flat."""

import asyncio
import gc
import itertools
import time
from typing import Any

import numpy as np

from tests.reliability.sizes import FULL, SMOKE, fully, generator
from tests.reliability.test_chaos import chaos


def soak(seconds: float, rng: np.random.Generator, timeout: float) -> np.ndarray:
    """Runs the mixture; returns (seconds, resident bytes) over time."""
    end, memory = time.perf_counter() + seconds, list[Any]()
    turns = itertools.takewhile(lambda _: time.perf_counter() < end, itertools.count())
    tally, engine = asyncio.run(chaos(turns, rng, timeout=timeout, memory=memory))
    print(tally)
    assert all(tally[fate] > 0 for fate in ("answered", "degraded", "refused", "failed"))
    gc.collect()
    assert engine.metrics()["gauges"]["versions_in_memory"] == 1
    return np.array(memory)


def test_a_few_seconds_of_everything():
    assert len(soak(SMOKE.soak_seconds, generator("soak", seed=0), 0.4)) > 1


@fully
def test_minutes_of_everything_in_flat_memory():
    memory = soak(FULL.soak_seconds, generator("soak"), 1.0)
    settled = memory[len(memory) // 5 :]
    first, last = (np.median(part[:, 1]) for part in (settled[: len(settled) // 4], settled[-(len(settled) // 4) :]))
    slope = np.polyfit(settled[:, 0], settled[:, 1], 1)[0] * 60 / 1e6
    print(f"resident {first / 1e6:.0f} -> {last / 1e6:.0f} MB, {slope:.2f} MB a minute")
    assert last < 1.05 * first + 8e6, f"resident memory grew from {first / 1e6:.0f} to {last / 1e6:.0f} MB"
