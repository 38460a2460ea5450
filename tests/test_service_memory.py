"""No replaced version stays in memory."""

import asyncio
import gc
import weakref

import pytest

from aif_jax.service.calls import parse
from aif_jax.service.core import Service
from aif_jax.service.current import publish
from aif_jax.service.models import Models
from tests.service_world import ANN, IDS, SERVING, exports
from tests.serving_world import until


@pytest.fixture(autouse=True)
def collector():
    yield
    gc.enable()


def parts_of(models):
    """By name, what a version takes memory with."""
    served = models.held[0]
    engine, restored = served.engine, served.restored
    version = next(iter(engine._versions))
    parts = {"served": served, "engine": engine, "users": served.users, "version": version, "trained": restored.trained}
    return {name: weakref.ref(part) for name, part in (parts | {"index": restored.index, "cache": engine._users.cache}).items()}


def test_versions_published_under_load_are_freed(tmp_path):
    """By reference counts alone, without any collection."""
    exports().copied(tmp_path)
    publish(tmp_path, ["one"])
    calls = [parse({**ANN, "candidates": IDS, "k": 3} | more) for more in ({}, {"feature_version": 1})]

    async def serve():
        models = Models(tmp_path, config=SERVING, poll=0.02, keep=1)
        async with Service(models) as service:
            gc.disable()
            stop, answers = False, []

            async def load(call):
                while not stop:
                    answers.append((await service.answer("rank", call)).served.version)

            callers = [asyncio.create_task(load(calls[number % 2])) for number in range(4)]
            replaced = []
            for number in range(6):
                replaced.append(parts_of(models))
                name = ("two", "one")[number % 2]
                publish(tmp_path, [name])
                await until(lambda name=name: answers and answers[-1] == exports().index[name].version and not models._closing)
            stop = True
            await asyncio.gather(*callers)
            assert [name for parts in replaced for name, ref in parts.items() if ref() is not None] == []
            assert len(set(answers)) == 2

    asyncio.run(serve())


def test_a_closed_engine_keeps_no_states():
    """What a cache holds is freed with the engine, by reference counts."""

    async def serve():
        models = Models(exports().root / "one", config=SERVING)
        async with Service(models) as service:
            await service.answer("rank", parse({**ANN, "candidates": IDS, "k": 3, "feature_version": 1}))
            parts = parts_of(models)
            state = weakref.ref(next(iter(parts["cache"]()._entries.values()))[0].state.words)
            assert state() is not None
        return [*parts.values(), state]

    gc.disable()
    assert [ref() for ref in asyncio.run(serve()) if ref() is not None] == []
