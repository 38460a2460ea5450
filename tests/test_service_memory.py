"""Garbage collections of a process that serves: short ones, and no replaced version stays in memory."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import types
import weakref

import numpy as np
import pytest

from aif_jax.service.calls import Limits, parse
from aif_jax.service.core import Recent, Service
from aif_jax.service.models import Models, publish
from aif_jax.service.process import Frozen, Listening, run
from aif_jax.serving import Timeline
from tests.service_world import ANN, IDS, SERVING, exports

FEW = 20_000
"""Objects that a full collection may visit; the process has more than 200,000."""


@pytest.fixture
def folder(tmp_path):
    for name in ("one", "two"):
        shutil.copytree(exports().root / name, tmp_path / name)
    publish(tmp_path, ["one"])
    yield tmp_path
    gc.enable()
    assert gc.get_freeze_count() == 0  # whoever served in this process has its collections back


def parts_of(models):
    """By name, what a version takes memory with."""
    served = models.held[0]
    engine, restored = served.engine, served.restored
    version = next(iter(engine._versions))
    parts = {"served": served, "engine": engine, "users": served.users, "version": version, "trained": restored.trained}
    return {name: weakref.ref(part) for name, part in (parts | {"index": restored.index, "cache": engine._users.cache}).items()}


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def test_versions_published_under_load_are_freed_and_full_collections_visit_few_objects(folder):
    """Without any collection: what is frozen must not depend on one. Then one, to count what it has to visit."""
    calls = [
        parse({**ANN, "candidates": IDS, "k": 3}, Limits()),
        parse({**ANN, "candidates": IDS, "k": 3, "feature_version": 1}, Limits()),
    ]

    async def serve():
        models = Models(folder, config=SERVING, poll=0.02, keep=1)
        service, frozen = Service(models), Frozen(models)
        async with service, frozen.looking(every=0.05):
            held = gc.get_freeze_count()
            gc.disable()
            assert held > 100_000 and len(gc.get_objects()) < FEW
            stop, answers = False, []

            async def load(call):
                while not stop:
                    answers.append((await service.rank(call)).answer.version)

            callers = [asyncio.create_task(load(calls[number % 2])) for number in range(4)]
            replaced = []
            for number in range(6):
                replaced.append(parts_of(models))
                name = ("two", "one")[number % 2]
                publish(folder, [name])
                await until(lambda name=name: answers and answers[-1] == exports().index[name].version and not models.closing)
            stop = True
            await asyncio.gather(*callers)
            await until(lambda: frozen._publishes == models.publishes)
            await asyncio.sleep(0.2)  # several looks
            assert [name for parts in replaced for name, ref in parts.items() if ref() is not None] == []
            assert frozen.collections == 0 and len(gc.get_objects()) < FEW
            assert len(set(answers)) == 2 and gc.get_freeze_count() >= held

    asyncio.run(serve())


def test_a_replaced_version_in_a_cycle_is_collected(folder):
    async def serve():
        models = Models(folder, config=SERVING, poll=3600, keep=1)
        frozen = Frozen(models)
        async with Service(models):
            frozen.look()
            gc.disable()
            models.held[0].users.itself = models.held[0].users  # a caller's source that refers to itself
            parts = parts_of(models)
            publish(folder, ["two"])
            await models._read()
            await models._serve(models._wanted)
            await until(lambda: not models.closing)
            frozen.look()
            assert parts["users"]() is not None and parts["engine"]() is None and frozen.collections == 0
            frozen.look()
            assert parts["users"]() is None and frozen.collections == 1
            kept = parts_of(models)["index"]()  # by somebody who is no garbage
            publish(folder, ["one"])
            await models._read()
            await models._serve(models._wanted)
            await until(lambda: not models.closing)
            for _ in range(4):
                frozen.look()
            assert frozen.collections == 2 and kept is not None  # tried once
        gc.unfreeze()

    asyncio.run(serve())


def test_a_closed_engine_keeps_no_states():
    """What a cache holds is freed with the engine, by reference counts."""

    async def serve():
        models = Models(exports().root / "one", config=SERVING)
        async with Service(models) as service:
            await service.rank(parse({**ANN, "candidates": IDS, "k": 3, "feature_version": 1}, Limits()))
            parts = parts_of(models)
            state = weakref.ref(next(iter(parts["cache"]()._entries.values())).state.state.words)
            assert state() is not None
        return [*parts.values(), state]

    gc.disable()
    try:
        assert [ref() for ref in asyncio.run(serve()) if ref() is not None] == []
    finally:
        gc.enable()


def test_the_process_of_the_command_freezes_what_it_serves(folder, capsys):
    service, seen = Service(Models(folder, config=SERVING)), []

    async def serve():
        async def watch():
            await until(lambda: "ready" in capsys.readouterr().out)
            seen.append((gc.get_freeze_count(), len(gc.get_objects())))
            os.kill(os.getpid(), signal.SIGTERM)

        await asyncio.gather(run(service, Listening(http_port=0)), watch())

    asyncio.run(serve())
    [(frozen, objects)] = seen
    assert frozen > 100_000 and objects < FEW and gc.get_freeze_count() == 0


def test_collections_need_not_visit_the_calls_of_the_last_minutes():
    recent, answer = Recent(), types.SimpleNamespace(degraded=False, timeline=Timeline())
    gc.collect()
    before = len(gc.get_objects())
    for number in range(5000):
        answer.stages = {"total": 1.0 + number, "queue": 0.5}
        recent.note("rank", "a", "OK", answer)
    gc.collect()
    assert len(gc.get_objects()) < before + 1000
    assert recent.summary()["versions"]["a"]["stages"]["total"]["p50"] == 2500.5


def test_a_library_leaves_the_collections_of_its_process_alone():
    models = Models(exports().root / "one", config=SERVING)

    async def serve():
        async with Service(models) as service:
            answer = (await service.rank(parse({**ANN, "candidates": IDS, "k": 3}, Limits()))).answer
            return gc.get_freeze_count(), np.isfinite(answer.logits).all()

    assert asyncio.run(serve()) == (0, True) and gc.isenabled()
