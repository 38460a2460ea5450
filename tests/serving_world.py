"""A small world to serve: model, users, items with an index, and an engine that tests can make slow or fail."""

import asyncio
import dataclasses
import functools
from collections.abc import Callable, Coroutine
from typing import Any

import jax
import numpy as np

from aif_jax import Trained
from aif_jax.index import ItemIndex
from aif_jax.serving import AsyncPreRanker, Candidates, Request, ServingConfig
from aif_jax.serving.programs import Programs
from aif_jax.trees import take
from aif_jax.types import ItemFeatures
from tests import demo

ITEMS = 300


class World:
    """Everything needed to make engines and to say what they should answer."""

    def __init__(self, **changes: Any):
        self.changes = changes or demo.VARIANTS["dot products"]  # an engine does not care: compiles in less time
        self.model, self.params = demo.build(**self.changes)
        floats = np.random.default_rng(2).normal(size=(ITEMS, 1)).astype(np.float32)  # no two items have one score
        self.features = dataclasses.replace(demo.items(ITEMS), floats=floats)
        self.ids = np.arange(ITEMS, dtype=np.int64) * 7 + 1000
        self.joint = jax.jit(self.model.joint)
        self.index = self.index_of(self.params)
        self.programs = Programs(self.model, max_k=8)  # compiled once for all engines of a world

    def index_of(self, params: Any, *, capacity: int = 512) -> Any:
        sizes: dict[str, Any] = dict(batch_size=64, capacity=capacity, progress=False)
        return ItemIndex.build(Trained(self.model, params), [(self.ids, self.features)], **sizes)

    def take(self, rows: np.ndarray) -> ItemFeatures:
        """Features of some items."""
        return take(self.features, rows)

    def other_params(self, seed: int) -> Any:
        """Parameters as another training might have left them."""
        rng = np.random.default_rng(seed)
        trained = {name: group for name, group in self.params.items() if name != "fitted"}
        moved = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), trained)
        return moved | {"fitted": self.params["fitted"]}

    def user(self, name: Any):
        return demo.user(self.model.config, events=int(name) % 20, seed=int(name))

    def logits(self, name: Any, ids: Any, params: Any = None) -> np.ndarray:
        """What `joint` says of these items, -inf for unknown ones."""
        rows = np.searchsorted(self.ids, np.asarray(ids)).clip(0, ITEMS - 1)
        everything = np.asarray(self.joint(self.params if params is None else params, self.user(name), self.features))
        return np.where(self.ids[rows] == ids, everything[rows], -np.inf)

    def engine(self, *, index: Any = None, **changes: Any) -> "Engine":
        return Engine(self, index or self.index, config_of(**changes))

    def engine_of(self, features: Any, retrieval: Any = None, **changes: Any) -> AsyncPreRanker:
        """An engine with a test's own callables."""
        trained, config = Trained(self.model, self.params), config_of(**changes)
        return share_programs(AsyncPreRanker(trained, self.index, features=features, retrieval=retrieval, config=config), self)


def config_of(**changes: Any) -> ServingConfig:
    """The config of engines of a world."""
    return ServingConfig(**{"buckets": (16, 64), "max_k": 8, **changes})


class Engine(AsyncPreRanker):
    """An engine whose callables wait and fail as told, and note who called them."""

    def __init__(self, world: World, index: Any, config: ServingConfig):
        trained = Trained(world.model, world.params, index.trained.encoder)
        super().__init__(trained, index, features=self.fetch, retrieval=self.find, config=config)
        share_programs(self, world)
        self.world = world
        self.fetched: list[Any] = []
        self.ended: list[str] = []
        self.feature_delay = self.retrieval_delay = 0.0
        self.feature_error: BaseException | None = None
        self.retrieval_error: BaseException | None = None
        self.candidates: Any = world.ids[:40]
        self.features: Any = world.user

    async def fetch(self, request: Request):
        self.fetched.append(request.user)
        await self._wait("features", self.feature_delay, self.feature_error)
        return self.features(request.user)

    async def find(self, request: Request):
        await self._wait("retrieval", self.retrieval_delay, self.retrieval_error)
        return request.context if request.context is not None else self.candidates

    async def _wait(self, name: str, delay: float, error: BaseException | None) -> None:
        try:
            await asyncio.sleep(delay)
        except asyncio.CancelledError:
            self.ended.append(name)
            raise
        if error:
            raise error


class WatchedIndex:
    """An index of which `before` gets the ids of each look-up first; `attributes` stand in place of its own."""

    def __init__(self, index: Any, before: Callable[[Any], Any] = id, **attributes: Any):
        self.index, self.before = index, before
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.index, name)

    def __len__(self) -> int:
        return len(self.index)

    def lookup(self, ids: Any) -> Any:
        self.before(ids)
        return self.index.lookup(ids)


def share_programs(engine: AsyncPreRanker, world: World) -> AsyncPreRanker:
    """Lets an engine use what the world's other engines have compiled."""
    engine._programs = world.programs
    return engine


@functools.cache
def shared() -> World:
    """One world for all tests of a process that change nothing in it: its functions are compiled once."""
    return World()


def run(test: Coroutine[Any, Any, Any]) -> Any:
    """Runs a test's coroutine to its end; one that hangs fails."""

    async def limited() -> Any:
        async with asyncio.timeout(240):
            return await test

    return asyncio.run(limited())


async def until(condition: Callable[[], Any]) -> None:
    """Waits for something, so that no test waits for a while in which a busy machine may not come to it."""
    while not condition():
        await asyncio.sleep(0.001)


def bids_for(ids: np.ndarray) -> Candidates:
    """Candidates whose order by bid is far from their order by logit."""
    return Candidates(ids, np.random.default_rng(5).uniform(0.0, 10.0, len(ids)).astype(np.float32))
