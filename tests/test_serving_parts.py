"""The parts of the engine that need no engine: buckets, cache, single-flight, metrics."""

import asyncio
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aif_jax.serving import Timeline, prometheus_text
from aif_jax.serving.metrics import BOUNDS, Histogram, Metrics
from aif_jax.serving.requests import Span
from aif_jax.serving.scoring import UserSide
from aif_jax.serving.users import ENTRY_BYTES, LEAF_BYTES, SingleFlight, StateCache, StateKey
from experiments.services import draw


def key(user, feature=None, version="v"):
    return StateKey(user, feature, version)


EACH = ENTRY_BYTES + LEAF_BYTES  # of a state of one array, in addition to its bytes


def state(size=10, ago=0.0):
    return UserSide(np.zeros(size, np.uint8), time.perf_counter() - ago)


def test_cache_is_bounded_in_bytes_and_drops_the_least_recently_used():
    cache = StateCache(3 * (EACH + 10))
    for name in "abc":
        cache.put(key(name, 1), state())
    assert cache.get(key("a", 1)) is not None  # now b is the least recently used
    cache.put(key("d", 1), state())
    assert cache.get(key("b", 1)) is None and cache.get(key("a", 1)) is not None
    assert (cache.bytes, len(cache), cache.evictions) == (3 * (EACH + 10), 3, 1)
    cache.put(key("e", 1), state(2 * EACH + 31))  # larger than the whole cache
    assert cache.get(key("e", 1)) is None and len(cache) == 3
    cache.put(key("a", 1), state(5))
    assert cache.bytes == 3 * EACH + 25


def test_an_older_computation_leaves_a_newer_state():
    cache, old, new = StateCache(100_000), state(ago=2.0), state(ago=1.0)
    cache.put(key("a", 2), new)
    for feature in (2, 1):  # of an older feature version too, which came later
        cache.put(key("a", feature), old)
    assert cache.get(key("a", 2)) is cache.stale("a", "v") is new and cache.get(key("a", 1)) is old


def test_a_state_is_of_its_feature_version_and_model_version():
    cache = StateCache(100_000)
    cache.put(key("a", 1, "v"), state())
    assert cache.get(key("a", 2, "v")) is None and cache.get(key("a", 1, "w")) is None
    assert cache.stale("a", "v") is not None and cache.stale("a", "w") is None
    cache.put(key("a", 1, "w"), state())
    assert cache.get(key("a", 1, "w")) is cache.stale("a", "w") is not cache.stale("a", "v")
    cache.clear()
    assert cache.bytes == len(cache) == 0


def test_states_grow_old():
    cache = StateCache(100_000, unversioned_ttl=50.0, max_age=100.0)
    for feature in (None, 1):
        for ago, fresh, stale in ((49.0, True, True), (51.0, feature is not None, True), (101.0, False, False)):
            cache.clear()
            cache.put(key("a", feature), state(ago=ago))
            assert (cache.get(key("a", feature)) is not None) == fresh
            assert (cache.stale("a", "v") is not None) == stale == bool(len(cache))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(1, 40)), max_size=60))
def test_cache_accounts_agree_with_its_contents(puts):
    limit = 3 * EACH + 60
    cache = StateCache(limit)
    for user, feature, size in puts:
        cache.put(key(user, feature), state(EACH * (size % 3) + size))
        assert cache.bytes == sum([EACH + side.state.nbytes for side, _ in cache._entries.values()]) <= limit


MEASURED = """
import ctypes, gc, json
import jax, jax.numpy as jnp
from aif_jax.serving.scoring import UserSide
from aif_jax.serving.users import StateCache, StateKey

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

caches, count = [], 6000  # the first one stays, so that the second takes memory of its own
for arrays in (2, 12):
    caches.append(cache := StateCache(1 << 40))
    made = jax.jit(lambda x: [jnp.full((16,), i) + x for i in range(arrays)])
    warm = [made(float(i)) for i in range(500)]
    del warm
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what compiling has left free would be taken before the process grows
    before = resident()
    for i in range(count):
        cache.put(StateKey(f"user {i}", i, "v" * 64), UserSide(made(float(i)), 1e12))
    jax.block_until_ready(cache.get(StateKey(f"user {count - 1}", count - 1, "v" * 64)).state)
    gc.collect()
    print(json.dumps([cache.bytes, resident() - before, count * arrays * 64]))
"""


@pytest.mark.lane("standing")
def test_the_bytes_of_a_cache_are_those_of_the_process():
    """States of two and of twelve small arrays: what they hold beyond their numbers is most of it."""
    run = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, timeout=240, check=True)
    sizes = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(sizes) == 2
    for counted, taken, numbers in sizes:
        assert taken / 1.6 < counted < taken * 1.6 and counted > 4 * numbers, sizes


async def test_a_computation_beyond_those_that_may_run_on_without_a_waiter_is_cancelled():
    ended = []

    async def work(name):
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            ended.append(name)
            raise

    running = SingleFlight(detached_limit=1)
    kept, over = (running.join(name, lambda name=name: work(name)) for name in "bc")
    await asyncio.sleep(0)
    for computation in (kept, over):
        running.leave(computation, keep=True)
    assert running.by_key == {"b": kept} and running.join("c", lambda: work("c again")) is not over
    running.leave(running.join("b", lambda: work("never")), keep=False)
    assert running.by_key["b"] is kept  # for the one that left it to run on
    running.forget(kept)  # nobody waits for it: it ends
    await running.close()
    assert sorted(ended) == ["b", "c"] and not running.by_key  # "c again" was cancelled before it began


def test_histogram_quantiles_are_within_a_bucket_and_metrics_are_plain():
    histogram = Histogram()
    for at in range(1, 1001):
        histogram.observe(at * 1e-5)
    step = BOUNDS[1] / BOUNDS[0]
    assert 0.005 / step <= histogram.quantile(0.5) <= 0.005 * step
    assert 0.0099 / step <= histogram.quantile(0.99) <= 0.0099 * step
    assert Histogram().quantile(0.5) == 0.0
    values = histogram.values()
    assert values["count"] == 1000 and values["cumulative"][float("inf")] == 1000
    assert values["sum"] == pytest.approx(5.005)
    histogram.observe(1e9)  # beyond the last bound
    assert histogram.quantile(1.0) == BOUNDS[-1]
    metrics = Metrics()
    metrics.stages["total"].observe(0.1)
    assert json.loads(json.dumps(metrics.values()))["stages"]["total"]["count"] == 1


def test_prometheus_text_is_read_back_by_the_client_library():
    parser = pytest.importorskip("prometheus_client.parser", reason="the extra 'metrics' is not installed")
    metrics = Metrics()
    metrics.counters["answered"] = 3
    metrics.degraded["late, stale state"] = 2
    metrics.stages["critical"].observe(0.001)
    metrics.stages["critical"].observe(0.002)
    text = prometheus_text({**metrics.values(), "gauges": {"pending": 4}})
    samples = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            samples[sample.name, *dict(sorted(sample.labels.items())).values()] = sample.value
    assert samples["aif_answered_total",] == 3 and samples["aif_pending",] == 4
    assert samples["aif_degraded_reason_total", "late, stale state"] == 2
    assert samples["aif_stage_seconds_count", "critical"] == 2
    assert samples["aif_stage_seconds_bucket", "+Inf", "critical"] == 2
    assert samples["aif_stage_seconds_sum", "critical"] == pytest.approx(0.003)


@pytest.mark.lane("experiments")
def test_timeline_has_stages_and_draws(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra 'experiments' is not installed")
    timeline = Timeline(100.0, [Span("retrieval", 100.0, 100.010), Span("score", 100.010, 100.013)])
    assert timeline.stages() == {"retrieval": pytest.approx(0.010), "score": pytest.approx(0.003)}
    timeline.clocked.append(Span("critical", 100.010, 100.013))
    draw({"one": timeline, "two": timeline}, tmp_path / "timeline.png", title="two requests")
    assert (tmp_path / "timeline.png").read_bytes()[:4] == b"\x89PNG"


def test_a_lone_late_request_keeps_no_time_of_others():
    metrics = Metrics()
    assert metrics.scoring == 0.0
    for _ in range(40):
        metrics.scorings.append(0.002)
    metrics.scorings.append(2.0)
    assert metrics.scoring == 0.002  # the collector's pause of one request is no reason to answer others without their states
    for _ in range(3):
        metrics.scorings.append(0.5)
    assert metrics.scoring > 0.4  # one in ten is
    for _ in range(40):
        metrics.scorings.append(0.002)
    assert metrics.scoring == 0.002
