"""The services that `latency.py` compares: the engine, and the sequential way with any model."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

import aif_jax as aif
from aif_jax.data.dataset import Dataset
from aif_jax.index import ItemIndex
from aif_jax.serving import AsyncPreRanker, Overloaded, Request, ServingConfig, Timeline
from aif_jax.serving.programs import COMPILER_OPTIONS
from experiments import drawn

CONTENT = 64
OPTIONS = COMPILER_OPTIONS.get(jax.default_backend())
"""Of the engine, and of every function that is compared with it."""


class Delays(NamedTuple):
    """Delays in seconds in place of the systems around the model."""

    features: float = 0.002
    retrieval: float = 0.015

    @staticmethod
    async def wait(seconds: float) -> None:
        """Lets so many seconds pass; none at all gives nobody else a turn."""
        if seconds > 0:
            await asyncio.sleep(seconds)


class Served(NamedTuple):
    """One answer: what was found, and when each stage ran."""

    ids: np.ndarray  # int64 [k]
    logits: np.ndarray  # float32 [k]
    timeline: Timeline
    degraded: bool = False

    @property
    def critical_ms(self) -> float:
        """Milliseconds from "candidates are there" to "top-k is ready"."""
        return self.timeline.stages()["critical"] * 1e3

    @property
    def total_ms(self) -> float:
        """Milliseconds from arrival to answer."""
        return self.timeline.stages()["total"] * 1e3


class Service(Protocol):
    """A service under test."""

    async def rank(self, number: int, k: int, *, budget: float | None = None) -> Served: ...
    async def __aenter__(self) -> Any: ...
    async def __aexit__(self, *error: object) -> None: ...


class World:
    """A catalogue and users drawn at random: latency does not depend on what the numbers say.

    Requests of one number have the same user and candidates in every service. No state is reused between requests.
    """

    def __init__(self, *, items: int, users: int = 16, seed: int = 0):
        self.items, self.users, self.seed = items, users, seed
        self.ids = np.sort(np.random.default_rng(seed).choice(2**40, items, replace=False)).astype(np.int64)
        self.schema = aif.Schema(
            item_attributes=(aif.Attribute(name="item", size=items + 1), aif.Attribute(name="category", size=500)),
            user_attributes=(aif.Attribute(name="segment", size=20),),
            actions=4,
            content=CONTENT,
        )
        self._drawn: dict[tuple[int, int], np.ndarray] = {}
        self.catalogue = drawn.catalogue(self.schema, seed=seed)
        self.features = self.catalogue.features(np.arange(1, items + 1))

    def candidates(self, number: int, count: int) -> np.ndarray:
        """Places of a request's candidates in `ids`, int32 [C], distinct."""
        key = number % self.users, count
        if key not in self._drawn:  # drawing takes longer than scoring
            self._drawn[key] = np.random.default_rng((self.seed, 7, key[0])).choice(self.items, count, replace=False)
        return self._drawn[key]


class DataWorld(World):
    """The items of a data set; candidates are drawn from them."""

    def __init__(self, data: Dataset, *, users: int = 16, seed: int = 0):
        self.items, self.users, self.seed = len(data.items) - 1, users, seed
        self.ids, self.schema, self.catalogue, self._drawn = data.items.raw, data.schema, data.catalogue, {}
        self.features = data.catalogue.features(np.arange(1, self.items + 1))


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and everything about it that both ways of serving share."""

    world: World
    model: aif.PreRanker
    params: Any
    users: list[aif.UserFeatures]  # of requests 0 to `world.users` - 1, and again from the first
    index: ItemIndex

    @classmethod
    def drawn(cls, world: World, config: aif.Config) -> Model:
        """Random parameters and users."""
        model = aif.build(config)
        params = jax.device_put(model.init(jax.random.key(0), world.catalogue))
        users = [drawn.users(world.schema, config.history_length, seed=number) for number in range(world.users)]
        index = ItemIndex.build(aif.Trained(model, params), world.features, ids=world.ids, progress=False)
        return cls(world, model, params, users, index)

    @classmethod
    def trained(cls, world: World, run: aif.Run, data: Dataset, *, seed: int = 0) -> Model:
        """A trained model, and the users of some of the latest tenth of the events."""
        latest = np.argsort(data.log.time, kind="stable")[-max(world.users, len(data.log) // 10) :]
        positions = np.random.default_rng(seed).choice(latest, world.users, replace=False)
        users = data.user_features(positions, length=run.config.history_length)
        listed = [jax.tree.map(lambda leaf, n=n: leaf[n], users) for n in range(world.users)]
        return cls(world, run.model, jax.device_put(run.params), listed, run.index(data.catalogue, progress=False))

    @property
    def config(self) -> aif.Config:
        """Of the model."""
        return self.model.config

    def user(self, number: int) -> aif.UserFeatures:
        """Features of a request's user."""
        return self.users[number % self.world.users]


class Engine:
    """`AsyncPreRanker` over a model.

    Args:
      made: the model.
      candidates: C.
      delays: before features and candidates.
      ready: whether the user's state comes from the cache, after the first request of each user; else every request is of a
        new user.
      config: changes to the engine's config.
    """

    def __init__(
        self, made: Model, *, candidates: int, delays: Delays, ready: bool = False, config: dict[str, Any] | None = None
    ):
        self._made, self._count, self._delays, self._ready = made, candidates, delays, ready
        bucket = -(-candidates // 128) * 128
        cache = {} if ready else {"cache_bytes": 0}
        serving = ServingConfig(**{"buckets": (bucket,), "max_k": 300, **cache, **(config or {})})
        self.engine = AsyncPreRanker(
            made.index.trained, made.index, features=self._features, retrieval=self._retrieve, config=serving
        )

    async def __aenter__(self) -> Engine:
        await self.engine.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.engine.close()

    async def rank(self, number: int, k: int, *, budget: float | None = None) -> Served:
        """One request."""
        user = number % self._made.world.users if self._ready else (number, object())
        request = Request(user=user, feature_version=0 if self._ready else None, context=number)
        answer = await self.engine.rank(request, k, budget=budget)
        return Served(answer.ids, answer.logits, answer.timeline, answer.degraded)

    async def _features(self, request: Request) -> aif.UserFeatures:
        await self._delays.wait(self._delays.features)
        return self._made.user(request.context)

    async def _retrieve(self, request: Request) -> np.ndarray:
        rows = self._made.world.candidates(request.context, self._count)
        await self._delays.wait(self._delays.retrieval)
        return self._made.world.ids[rows]


def sequential_answer(model: aif.PreRanker, k: int) -> Callable[..., jax.Array]:
    """(params, features, catalogue, rows [C]) -> the best k as int32 [2, k]: bits of the logits, positions."""

    def answer(params: Any, features: Any, catalogue: Any, rows: jax.Array) -> jax.Array:
        items = jax.tree.map(lambda column: column[rows], catalogue)
        return best(model.joint(params, features, items), k)

    return answer


def best(logits: jax.Array, k: int) -> jax.Array:
    """The best k of logits [C] as int32 [2, k]: bits of the logits, positions."""
    logits, positions = jax.lax.top_k(logits, k)
    return jnp.stack([jax.lax.bitcast_convert_type(logits, jnp.int32), positions])


class Sequential:
    """Everything of the model starts when the candidates are there: one compiled function of user, items and top-k.

    Features are on the device before the clock starts and the catalogue's features stay there, so only compute is compared.
    """

    def __init__(self, made: Model, *, candidates: int, k: int, delays: Delays, max_pending: int = 64):
        self._made, self._count, self._k, self._delays = made, candidates, k, delays
        self._max_pending, self._pending = max_pending, 0
        self._catalogue = jax.device_put(made.world.features)
        self._users = [jax.device_put(user) for user in made.users]
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="sequential")

    async def __aenter__(self) -> Sequential:
        rows = jax.device_put(np.zeros(self._count, np.int32))
        arguments = (self._made.params, self._users[0], self._catalogue, rows)
        self._answer = jax.jit(sequential_answer(self._made.model, self._k)).lower(*arguments).compile(OPTIONS)
        jax.block_until_ready(self._answer(*arguments))
        return self

    async def __aexit__(self, *error: object) -> None:
        self._threads.shutdown(wait=False)

    async def rank(self, number: int, k: int, *, budget: float | None = None) -> Served:
        """One request."""
        if self._pending >= self._max_pending:
            raise Overloaded(f"expected at most {self._max_pending} requests at a time, got one more")
        self._pending += 1
        try:
            async with asyncio.timeout(budget):
                return await self._rank(number)
        finally:
            self._pending -= 1

    async def _rank(self, number: int) -> Served:
        timeline = Timeline()
        candidates = self._made.world.candidates(number, self._count)
        await self._delays.wait(self._delays.features)
        timeline.add("features", timeline.arrival, time.perf_counter())
        await self._delays.wait(self._delays.retrieval - self._delays.features)
        there = time.perf_counter()
        timeline.add("retrieval", timeline.arrival, there)
        packed, started = await asyncio.get_running_loop().run_in_executor(self._threads, self._compute, number, candidates)
        end = time.perf_counter()
        for stage, start in (("queue", there), ("critical", there), ("total", timeline.arrival)):
            timeline.add(stage, start, started if stage == "queue" else end)
        timeline.add("score", started, end)
        return Served(self._made.world.ids[candidates[packed[1]]], packed[0].view(np.float32), timeline)

    def _compute(self, number: int, candidates: np.ndarray) -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        rows = jax.device_put(candidates.astype(np.int32))
        features = self._users[number % len(self._users)]
        return jax.device_get(self._answer(self._made.params, features, self._catalogue, rows)), start


class Bare:
    """Compiled functions alone, called from the main thread on ready inputs: what no service can be faster than."""

    def __init__(self, made: Model, *, candidates: int, k: int):
        model, params, self.users = made.model, made.params, made.world.users
        features = jax.device_put(made.user(0))
        state = jax.block_until_ready(jax.jit(model.user)(params, features))
        rows = jnp.asarray(made.world.candidates(0, candidates), jnp.int32)
        table, decode = made.index.copy_table(), made.index.decode
        ready = jax.block_until_ready(jax.jit(decode)(table, rows))

        def staged(params: Any, state: Any, table: Any, rows: jax.Array) -> jax.Array:
            return best(model.interaction(params, state, decode(table, rows)), k)

        catalogue = jax.device_put(made.world.features)
        self.staged = self._timed(staged, params, state, table, rows)
        self.sequential = self._timed(sequential_answer(model, k), params, features, catalogue, rows)
        self.interaction = self._timed(model.interaction, params, state, ready)
        head, inputs = drawn.head_alone(made.config, candidates)
        self.head = self._timed(head, params["head"], inputs)

    @staticmethod
    def _timed(function: Any, *arguments: Any) -> Any:
        compiled = jax.jit(function).lower(*arguments).compile(OPTIONS)
        jax.block_until_ready(compiled(*arguments))

        def once() -> float:
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            return (time.perf_counter() - start) * 1e3

        return once
