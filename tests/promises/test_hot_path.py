"""Promise: every bucket is compiled once, at warm-up; then a request traces, compiles and transfers nothing in secret."""

import asyncio
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax
import aif_jax as aif
from aif_jax import Trained
from aif_jax.serving import Request
from tests.refusals import refused, refused_later
from tests.serving_world import World, bids_for


@pytest.fixture
def forbidden():
    """No tracing and no implicit transfer, in every thread: the context managers would bind this one alone."""
    usual = jax.config.jax_no_tracing, jax.config.jax_transfer_guard
    names = {"jax_no_tracing": (True, usual[0]), "jax_transfer_guard": ("disallow", usual[1])}

    def forbid(on: bool) -> None:
        for name, (strict, before) in names.items():
            jax.config.update(name, strict if on else before)

    yield forbid
    forbid(False)


async def test_requests_neither_trace_nor_transfer_in_secret(world, forbidden):
    other = world.other_params(1)
    its_index = world.index_of(other)
    async with world.engine(batch_size=2, score_threads=1, buckets=(64,)) as engine:
        forbidden(True)
        try:
            refused(RuntimeError, "no_tracing", jax.jit(lambda x: x + 1), np.zeros(3))
            await refused_later(Exception, "Disallowed|no_tracing", asyncio.to_thread(jnp.asarray, np.ones(3)))
            answers = [await engine.rank(Request(user=3, feature_version=1), 8) for _ in range(2)]
            answers.append(await engine.rank(Request(user=4, context=bids_for(world.ids[:40]), order="bid"), 8))
            answers.append(await engine.rank(Request(user=4, context=world.ids[:60], exclude=world.ids[20:40]), 8))
            answers += await asyncio.gather(*[engine.rank(name, 8) for name in range(5, 10)])
            scores = await engine.score(3, world.ids[:60])
            engine.feature_error = OSError("away")
            degraded = await engine.rank(11, 8)
        finally:
            forbidden(False)
        assert all(answer.reason is None and answer.mask.all() for answer in answers) and scores.reason is None
        assert "away" in degraded.reason
        await engine.publish(Trained(engine.model, other), its_index)
        engine.feature_error = None
        forbidden(True)
        try:
            assert (await engine.rank(3, 8)).version == its_index.version
        finally:
            forbidden(False)


async def test_what_crosses_between_host_and_device_is_rows_and_k_answers(world):
    async with world.engine(buckets=(64,), batch_size=1) as engine:
        await engine.rank(Request(user=3, feature_version=1), 8)
        before = engine.metrics()["counters"]
        await engine.rank(Request(user=3, feature_version=1), 8)
        after = engine.metrics()["counters"]
        assert {name: after[name] - before[name] for name in after if name.startswith("transfers_")} == {
            "transfers_host_to_device": 1,
            "transfers_host_to_device_bytes": 64 * 4,  # int32 rows of the bucket
            "transfers_device_to_host": 1,
            "transfers_device_to_host_bytes": (3 * 8 + 1) * 4,  # scores, logits, positions of max_k, and a count
        }


async def test_a_cached_request_runs_the_code_of_eight_files(world):
    """So that a reader can follow it: the engine, the user's state, the call of the program, the index, the counters."""
    package = Path(aif_jax.__file__).parent
    files: set[str] = set()

    def note(frame, *_):
        files.add(frame.f_code.co_filename)

    threading.setprofile(note)  # of threads that start from now on
    try:
        async with world.engine(buckets=(64,), score_threads=1) as engine:
            request = Request(user=3, feature_version=1)
            await engine.rank(request, 8, candidates=world.ids[:40])
            files.clear()
            sys.setprofile(note)
            await engine.rank(request, 8, candidates=world.ids[:40])
            sys.setprofile(None)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    ours = {Path(file).relative_to(package).as_posix() for file in files if file.startswith(str(package))}
    assert {"serving/engine.py", "serving/scoring.py", "index/ids.py"} <= ours and len(ours) <= 8, sorted(ours)


async def test_every_bucket_is_compiled_once():
    world = World()
    others = [world.other_params(seed) for seed in (1, 2)]
    async with world.engine(buckets=(16, 64)) as engine:
        compiled = world.programs.compiles
        assert dict(compiled) == {"user": 1, "score": 2}
        for count in range(0, 64, 7):
            await engine.rank(aif.Request(user=count, context=world.ids[:count]), 8)
        changed = np.arange(20)
        features = world.take(changed)
        index = world.index
        for _ in range(3):
            index = index.upsert(world.ids[changed], features)
            await engine.update_index(index)
            await engine.rank(1, 8)
        for params in others:
            await engine.publish(aif.Trained(engine.model, params), world.index_of(params))
            await engine.rank(1, 8)
        assert dict(compiled) == {"user": 1, "score": 2}
        grown = world.index_of(others[-1], capacity=1024)
        await engine.update_index(grown)  # other shapes: compiled beside the traffic, before the swap
        assert dict(compiled) == {"user": 1, "score": 4}
        await engine.rank(1, 8)
        assert dict(compiled) == {"user": 1, "score": 4}
