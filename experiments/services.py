"""What `cost`, `runtimes`, `quickstart` and `question` serve: models, programs, the engine, other ways, loads, a picture."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import aif_jax as aif
from aif_jax import Dataset, ItemIndex
from aif_jax.features import UserPacker, pack, unpack, user_specs
from aif_jax.serving import AsyncPreRanker, Request, ServingConfig, Timeline
from aif_jax.serving.programs import COMPILER_OPTIONS, LOGIT, Programs, orders_of
from aif_jax.serving.requests import Span
from aif_jax.serving.scoring import TopCandidates, UserSide
from aif_jax.serving.versions import compile_index
from aif_jax.store.codec import Storage
from experiments import common, drawn

Program = Callable[[int], Any]
Best = tuple[np.ndarray, np.ndarray]
"""Logits and places."""
CONTENT = 64
OPTIONS = COMPILER_OPTIONS.get(jax.default_backend())
"""Of the engine, and of every function that is compared with it."""
SESSION = 5
ENGINES = ("aif", "matching", "two_tower")
SEQUENTIAL = {"sequential": "aif", "exact": "exact"}
"""Services without an engine, and the model of each."""
STAGES = {
    "features": "features", "user": "user part", "wait_user": "wait for it", "queue": "wait for a thread",
    "lookup": "find inputs", "score": "score, top k", "fetch": "copy out",
}  # fmt: skip
"""Stages of a request, and what the picture calls them."""


class Delays(NamedTuple):
    """Delays in seconds in place of the systems around the model."""

    features: float = 0.002
    retrieval: float = 0.015

    @staticmethod
    async def wait(seconds: float) -> None:
        """Let so many seconds pass; none at all gives nobody else a turn."""
        if seconds > 0:
            await asyncio.sleep(seconds)


class Asked(NamedTuple):
    """One request, as every service takes it."""

    number: int  # of the user's features and the candidates
    key: Any  # of the user's state: requests of one key may share it
    delays: Delays = Delays()


class Served(NamedTuple):
    """One answer: what was found, and when each stage ran."""

    ids: np.ndarray  # int64 [k]
    logits: np.ndarray  # float32 [k]
    timeline: Timeline

    @property
    def critical_ms(self) -> float:
        """Milliseconds from "candidates are there" to "top-k is ready"."""
        return self.timeline.stages()["critical"] * 1e3

    @property
    def total_ms(self) -> float:
        """Milliseconds from arrival to answer."""
        return self.timeline.stages()["total"] * 1e3


class World:
    """A catalogue and 16 users drawn at random: latency does not depend on what the numbers say.

    Requests of one number have the same user and candidates in every service. No state is reused between requests.
    """

    def __init__(self, *, items: int):
        self.items, self.users = items, 16
        self.ids = np.sort(np.random.default_rng(0).choice(2**40, items, replace=False)).astype(np.int64)
        self.schema = aif.Schema(
            item_attributes=(aif.Attribute(name="item", size=items + 1), aif.Attribute(name="category", size=500)),
            user_attributes=(aif.Attribute(name="segment", size=20),),
            actions=4,
            content=CONTENT,
        )
        self._drawn: dict[tuple[int, int], np.ndarray] = {}
        self.catalogue = drawn.catalogue(self.schema)
        self.features = self.catalogue.features(np.arange(1, items + 1))

    def candidates(self, number: int, count: int) -> np.ndarray:
        """Return places of a request's candidates in `ids`, int32 [C], distinct."""
        key = number % self.users, count
        if key not in self._drawn:  # drawing takes longer than scoring
            self._drawn[key] = np.random.default_rng((0, 7, key[0])).choice(self.items, count, replace=False)
        return self._drawn[key]

    def histories(self, length: int) -> list[aif.UserFeatures]:
        """Return the features of the users of requests, with `length` places of history."""
        return [drawn.users(self.schema, length, seed=number) for number in range(self.users)]


class DataWorld(World):
    """The items of a data set; requests of its log at `positions` [R], with catalogue rows [R, C] that retrieval found."""

    def __init__(self, data: Dataset, positions: np.ndarray, found: np.ndarray):
        self.data, self.positions, self._found = data, positions, found
        self.items, self.users = len(data.items) - 1, len(positions)
        self.ids, self.schema, self.catalogue = data.items.raw, data.schema, data.catalogue
        self.features = data.catalogue.features(np.arange(1, self.items + 1))

    def candidates(self, number: int, count: int) -> np.ndarray:
        """Return places of a request's candidates in `ids`, int32 [C], distinct."""
        return self._found[number % self.users, :count] - 1

    def histories(self, length: int) -> list[aif.UserFeatures]:
        """Return the features of the users of requests, with `length` places of history."""
        users = self.data.user_features(self.positions, length=length)
        return [jax.tree.map(lambda leaf, n=n: leaf[n], users) for n in range(self.users)]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and everything about it that all ways of serving share."""

    world: World
    model: aif.PreRanker
    params: Any
    users: list[aif.UserFeatures]  # of requests 0 to `world.users` - 1, and again from the first
    index: ItemIndex

    @classmethod
    def of(cls, world: World, trained: aif.Trained, *, storage: Storage = "float32") -> Model:
        """Return a trained model with the users and the catalogue of a world."""
        users = world.histories(trained.model.config.history_length)
        index = ItemIndex.build(trained, [(world.ids, world.features)], storage=storage, progress=False)
        return cls(world, trained.model, jax.device_put(trained.params), users, index)

    @classmethod
    def drawn(cls, world: World, config: aif.Config, *, storage: Storage = "float32") -> Model:
        """Return the same with random parameters."""
        model = aif.build(config)
        return cls.of(world, aif.Trained(model, model.init(jax.random.key(0), world.catalogue)), storage=storage)

    @property
    def config(self) -> aif.Config:
        """Of the model."""
        return self.model.config

    @functools.cached_property
    def _packer(self) -> UserPacker:
        return UserPacker(self.world.schema, self.config.history_length)

    def user(self, number: int) -> aif.UserFeatures:
        """Return features of a request's user."""
        return self.users[number % self.world.users]

    def words(self, number: int) -> np.ndarray:
        """Return the features of a request's user, checked, as words int32 [n]."""
        return self._packer(self.user(number))

    def candidates(self, number: int, count: int) -> np.ndarray:
        """Return raw ids int64 [C] of a request's candidates."""
        return self.world.ids[self.world.candidates(number, count)]


class Engine:
    """`AsyncPreRanker` over a model; `config` has changes to that of one bucket for the candidates."""

    def __init__(self, made: Model, candidates: int, k: int, config: Mapping[str, Any] | None = None):
        self._made, self._count, self._k = made, candidates, k
        given = {"buckets": (-(-candidates // 128) * 128,), "max_k": k, **(config or {})}
        self.engine = AsyncPreRanker(
            made.index.trained, made.index, features=self._features, retrieval=self._retrieve, config=ServingConfig(**given)
        )

    async def __aenter__(self) -> Engine:
        await self.engine.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.engine.close()

    async def rank(self, asked: Asked) -> Served:
        """Return one request."""
        request = Request(user=asked.key, feature_version=0, context=asked)
        answer = await self.engine.rank(request, self._k)
        return Served(answer.ids, answer.logits, answer.timeline)

    async def _features(self, request: Request) -> aif.UserFeatures:
        await Delays.wait(request.context.delays.features)
        return self._made.user(request.context.number)

    async def _retrieve(self, request: Request) -> np.ndarray:
        ids = self._made.candidates(request.context.number, self._count)
        await Delays.wait(request.context.delays.retrieval)
        return ids


class Joint:
    """A model that is not split: one compiled function of user, items and top-k, the catalogue's features on the device."""

    def __init__(self, made: Model, k: int):
        model, specs = made.model, user_specs(made.world.schema, length=made.config.history_length)
        self._inputs = made.params, jax.device_put(made.world.features)

        def answer(params: Any, catalogue: Any, words: jax.Array, rows: jax.Array) -> jax.Array:
            items = jax.tree.map(lambda column: column[rows], catalogue)
            logits, positions = jax.lax.top_k(model.joint(params, unpack(words, specs), items), k)
            return jnp.stack([jax.lax.bitcast_convert_type(logits, jnp.int32), positions])

        self._answer = jax.jit(answer, compiler_options=OPTIONS)

    def best(self, rows: np.ndarray, words: np.ndarray) -> Best:
        """Return logits and places of the best of some items for a user's packed features."""
        logits, positions = np.asarray(self._answer(*self._inputs, words, rows.astype(np.int32)))
        return logits.view(np.float32), positions


class Sequential:
    """Everything of the model starts when the candidates are there."""

    def __init__(self, made: Model, candidates: int, k: int):
        self._made, self._count, self._joint = made, candidates, Joint(made, k)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="sequential")

    async def __aenter__(self) -> Sequential:
        self._compute(0)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._threads.shutdown()

    async def rank(self, asked: Asked) -> Served:
        """Return one request."""
        timeline, delays = Timeline(), asked.delays
        await Delays.wait(delays.features)  # features and retrieval at once
        timeline.clocked.append(Span("features", timeline.arrival, time.perf_counter()))
        await Delays.wait(delays.retrieval - delays.features)
        there = time.perf_counter()
        compute = asyncio.get_running_loop().run_in_executor(self._threads, self._compute, asked.number)
        ids, logits, began, found = await compute
        end = time.perf_counter()
        spans = {"retrieval": (timeline.arrival, there), "queue": (there, began), "lookup": (began, found)}
        spans |= {"score": (found, end), "critical": (there, end), "total": (timeline.arrival, end)}
        timeline.clocked += [Span(stage, *seconds) for stage, seconds in spans.items()]
        return Served(ids, logits, timeline)

    def _compute(self, number: int) -> tuple[np.ndarray, np.ndarray, float, float]:
        began = time.perf_counter()
        ids = self._made.candidates(number, self._count)
        words = self._made.words(number)
        rows, _ = self._made.index.lookup(ids)  # row r of the index is row r of the catalogue
        found = time.perf_counter()
        logits, positions = self._joint.best(rows, words)
        return ids[positions], logits, began, found


class Compiled:
    """The engine's own compiled functions: no event loop, no threads, no deadlines, no batches.

    `sizes` are numbers of candidates that `best` takes, or pads to, and `k` the best that it finds.
    """

    def __init__(self, made: Model, sizes: Iterable[int], k: int):
        self.made = made
        programs = Programs(made.model, max_k=k)
        self._user = programs.user(made.params)
        side, config = UserSide(self.user(0), 0.0), ServingConfig(buckets=tuple(sorted(sizes)), max_k=k, batch_size=1)
        self._compiled = compile_index(programs, made.params, side, made.index, config, orders_of(made.config, config))

    def user(self, number: int) -> Any:
        """Return the state of a request's user, ready on the device."""
        return self.state(self.made.words(number))

    def state(self, words: np.ndarray) -> Any:
        """Return the state of packed features, ready on the device."""
        return jax.block_until_ready(self._user(words[None], np.int32(1))[0])

    def best(self, rows: np.ndarray, state: Any, *, size: int | None = None) -> TopCandidates:
        """Return the best of rows of the index, padded to a size."""
        size = size or len(rows)
        inputs = self._compiled.inputs([rows], [None], LOGIT, size)
        packed, _ = self._compiled.run([UserSide(state, 0.0)], inputs)
        return self._compiled.best(packed, 1)[0]


class Runtime:
    """The programs of a runtime: `user`, request number to a state, ready, and `scored`, rows and a state to the best."""

    def __init__(self, made: Model, user: Callable[[int], Any], scored: Callable[[np.ndarray, Any], Best]):
        self.user, self.scored, self._world = user, scored, made.world
        self._states = [user(number) for number in range(made.world.users)]

    def score(self, count: int, number: int) -> Best:
        """Return logits and places of the best for a user with a state."""
        return self.scored(self._world.candidates(number, count), self._states[number % len(self._states)])

    def whole(self, count: int, number: int) -> Best:
        """Return both programs."""
        return self.scored(self._world.candidates(number, count), self.user(number))


def of_engine(made: Model, counts: tuple[int, ...], top: int) -> Runtime:
    """Return the engine's compiled functions."""
    programs = Compiled(made, counts, top)

    def scored(rows: np.ndarray, state: Any) -> Best:
        best = programs.best(rows, state)
        return best.logits, best.positions

    return Runtime(made, lambda number: programs.state(pack(made.user(number))), scored)


def head(made: Model, count: int, top: int) -> Program:
    """Return the head alone over ready inputs, and top-k."""
    scores, inputs = drawn.head_alone(made.config, count)
    best = jax.jit(lambda params, inputs: jax.lax.top_k(scores(params, inputs), top), compiler_options=OPTIONS)
    return lambda i: jax.device_get(best(made.params["head"], inputs))


def turn(program: Program, i: int, *, pause: float = 0.0, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return milliseconds of one call, after a pause and a call that does not count."""
    time.sleep(pause)
    program(i + 1)
    start = clock()
    program(i)
    return (clock() - start) * 1e3


def models(world: World, length: int, *, smoke: bool) -> dict[str, Model]:
    """Return the models of all services with weights as initialised; those with a long history read `length` events."""
    sizes: dict[str, Any] = dict(short_length=8, width=8, towers=(16,), sequence=False) if smoke else {}
    presets = {"aif": aif.presets.aif, "matching": aif.presets.two_tower_matching, "exact": aif.presets.full_attention}
    configs = {name: preset(world.schema, long_length=length, **sizes) for name, preset in presets.items()}
    configs["two_tower"] = aif.presets.two_tower(world.schema, **sizes)
    return {name: Model.drawn(world, config) for name, config in configs.items()}


class Load(NamedTuple):
    """One closed loop."""

    requests: int
    seconds: float
    cpu_seconds: float
    total_ms: list[float]
    critical_ms: list[float]


_loops = itertools.count()


async def closed_loop(service: Any, kind: str, concurrency: int, seconds: float) -> Load:
    """Return `concurrency` clients for so many seconds, users of a kind of `cost.KINDS`; each sends one request at least."""
    loop, critical, total = next(_loops), [], []
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        turn = 0
        while turn == 0 or time.perf_counter() < end:
            keys = {"returning_0": ("returning", number), "session": (loop, number, turn // SESSION)}
            found = await service.rank(Asked(number + turn, keys.get(kind, (loop, number, turn))))
            critical.append(found.critical_ms)
            total.append(found.total_ms)
            turn += 1

    cpu, start = time.process_time(), time.perf_counter()
    await asyncio.gather(*[client(number) for number in range(concurrency)])
    return Load(len(total), time.perf_counter() - start, time.process_time() - cpu, total, critical)


def over_rounds(found: list[Load], concurrency: int) -> dict[str, float]:
    """Return figures of one closed loop over all rounds; p99 is the median over them."""
    cpu = [load.cpu_seconds / load.requests * 1e3 for load in found]
    total, critical = (np.concatenate([getattr(load, name) for load in found]) for name in ("total_ms", "critical_ms"))
    p99 = [np.quantile(load.total_ms, 0.99) for load in found]
    return {
        "concurrency": concurrency,
        "rps": float(np.median([load.requests / load.seconds for load in found])),
        "cpu_ms": float(np.median(cpu)),
        "cpu_spread_ms": float(np.subtract(*np.quantile(cpu, (0.75, 0.25)))),
        "p50_ms": float(np.quantile(total, 0.5)),
        "p99_ms": float(np.median(p99)),
        "critical_p50_ms": float(np.quantile(critical, 0.5)),
        "critical_p99_ms": float(np.quantile(critical, 0.99)),
    }


def draw(timelines: Mapping[str, Timeline], path: str | Path, *, title: str) -> None:
    """Draw what requests wait for after their candidates have arrived, which is 0; the ending of `path` names the format.

    One bar a request, by its title, with its milliseconds and the stages that end later; grey is between stages. Stages that
    overlap, such as a late user part, have their own line.
    """
    boxes, size = {}, (9, 1.6 + 0.8 * len(timelines))
    with common.picture(path, 1, 1, size=size) as (figure, axis):
        for place, timeline in enumerate(timelines.values()):
            there, ready = next(span[1:] for span in timeline.spans if span.stage == "critical")
            between = axis.barh(place, 1e3 * (ready - there), color="0.8", height=0.3)
            for stage, start, end in timeline.spans:
                if stage in STAGES and end > there:
                    shown, side = 1e3 * (max(start, there) - there), stage in ("user", "features")
                    at, colour = place - 0.3 * side, f"C{list(STAGES).index(stage)}"
                    boxes[stage] = axis.barh(at, 1e3 * (end - there) - shown, left=shown, color=colour, height=0.3)
            axis.text(1e3 * (ready - there), place, f"  {1e3 * (ready - there):.1f} ms", va="center")
        axis.set_yticks(range(len(timelines)), list(timelines))
        axis.invert_yaxis()
        axis.set(xlabel="milliseconds since the candidates arrived", xlim=(0, 1.1 * axis.get_xlim()[1]))
        axis.set_title(title, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        drawn = {name: boxes[stage] for stage, name in STAGES.items() if stage in boxes} | {"between": between}
        figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=len(drawn), frameon=False)
