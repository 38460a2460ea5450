"""`Service`: calls in, answers out; knows versions, limits and observers, and nothing of networks."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import math
import secrets
import time
import types
from collections import Counter, defaultdict, deque
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import jax
import numpy as np

from aif_jax.checks import expect
from aif_jax.interaction import contributions
from aif_jax.model import INTERACTION
from aif_jax.service.calls import BadCall, Call, Limits, Stale, engine_checks, problem_of
from aif_jax.service.features import Context, candidates_from
from aif_jax.service.models import Models, Served
from aif_jax.serving import Candidates, Ranking, Request, Scores
from aif_jax.serving.programs import BID, LOGIT
from aif_jax.serving.requests import Answer, Timeline
from aif_jax.types import UserFeatures

SECONDS = 300.0
MOST = 20_000
STAGES = "features user retrieval wait_user queue lookup upload score fetch critical total".split()


class EndedCall(NamedTuple):
    """One call that ended."""

    at: float  # seconds since 1970
    method: str
    version: str
    code: str  # "OK", or that of the problem
    degraded: bool
    stages: tuple[str, ...]
    seconds: tuple[float, ...]  # of each stage


class Recent:
    """Calls of the last minutes, at most `MOST`; noted from one thread, summed up from any."""

    def __init__(self):
        self._calls: deque[tuple[Any, ...]] = deque(maxlen=MOST)  # plain tuples of an `EndedCall`: no collection visits them
        self._latest: tuple[str, Timeline] | None = None

    def note(self, method: str, version: str, code: str, answer: Answer | None) -> None:
        """Count a call that has ended."""
        stages = {} if answer is None else answer.stages
        degraded = answer is not None and answer.degraded
        self._calls.append((time.time(), method, version, code, degraded, tuple(stages), tuple(stages.values())))
        if answer is not None and method == "rank":
            self._latest = version, answer.timeline

    def summary(self, *, seconds: float = SECONDS) -> dict[str, Any]:
        """Call a second, codes, and p50 and p99 of every stage by version, over the last seconds; the latest timeline."""
        now = time.time()
        noted = map(EndedCall._make, self._calls.copy())  # a copy, because more come meanwhile
        calls = [seen for seen in noted if now - seen.at <= seconds]
        span = max(min(seconds, now - calls[0].at), 1.0) if calls else seconds
        by_version: dict[str, Any] = {}
        for seen in calls:
            group = by_version.setdefault(seen.version, {"codes": Counter(), "degraded": 0, "stages": defaultdict(list)})
            group["codes"][seen.code] += 1
            group["degraded"] += seen.degraded
            for stage, value in zip(seen.stages, seen.seconds, strict=True):
                group["stages"][stage].append(value)
        for group in by_version.values():
            group["per_second"] = group["codes"].total() / span
            found = {stage: np.percentile(values, [50, 99]).tolist() for stage, values in group["stages"].items()}
            group["stages"] = {s: {"p50": found[s][0], "p99": found[s][1]} for s in STAGES if s in found}
        recent = [seen for seen in calls if now - seen.at <= 10.0]
        rate = len(recent) / min(10.0, span)
        latest = self._latest and {"version": self._latest[0], "spans": list(map(list, self._latest[1].spans))}
        return {"seconds": span, "per_second": rate, "versions": by_version, "timeline": latest}


A = TypeVar("A", bound=Answer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What an operator allows.

    Attributes:
      limits: bounds of one call.
      max_age: seconds since the export of a model after which it counts as stale; None: no bound.
      max_index_age: seconds since the index was written, after which it counts as stale; None: no bound.
        `ServingConfig.max_stale` bounds the age of one user's state.
      when_stale: "degrade" marks the answers of a stale model or index, "refuse" answers UNAVAILABLE; both end readiness.

    Raises:
      ValueError: an age that is not above 0, another word for `when_stale`.
    """

    limits: Limits = Limits()
    max_age: float | None = None
    max_index_age: float | None = None
    when_stale: Literal["degrade", "refuse"] = "degrade"

    def __post_init__(self):
        for name in ("max_age", "max_index_age"):
            expect((age := getattr(self, name)) is None or age > 0, name, "None or more than 0 seconds", age)
        expect(self.when_stale in ("degrade", "refuse"), "when_stale", "'degrade' or 'refuse'", repr(self.when_stale))


@dataclasses.dataclass(frozen=True, eq=False)
class Observed:
    """A call that was answered."""

    method: str
    call: Call
    served: Served
    answer: Any  # Ranking or Scores
    candidates: Candidates
    features: UserFeatures | None  # that the answer used; None of an earlier call's state, and of a stand-in
    now: int | None  # the clock that raw events were encoded by, in the time unit of the columns


@dataclasses.dataclass(frozen=True, eq=False)
class Reply(Generic[A]):
    """An answer and the version that gave it."""

    answer: A
    served: Served


class Service:
    """Answers calls with the versions of a folder: `async with Service(models) as service: await service.rank(call)`.

    Args:
      policy: limits and what to do with a stale model.
      observers: whoever wants to know of calls that were answered, such as a log: `observe(seen)` gets an
        `Observed`, returns at once and raises nothing.
    """

    def __init__(self, models: Models, *, policy: Policy | None = None, observers: tuple[Any, ...] = ()):
        self.models = models
        self.policy = policy or Policy()
        self.observers = list(observers)
        self.recent = Recent()
        self.calls: Counter[tuple[str, str]] = Counter()  # by method and code
        self.ready = False
        self.draining = False

    async def __aenter__(self) -> Service:
        await self.models.start()
        self.ready = True
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop being ready, answer the calls in flight, and close the engines."""
        self.ready = False
        self.draining = True
        await self.models.close()

    @property
    def unready(self) -> str | None:
        """Why no traffic should come; None where it may."""
        if not self.ready:
            return "draining" if self.draining else "starting"
        return next((why for share, served in self.models.shares if share and (why := self._stale(served))), None)

    async def rank(self, call: Call) -> Reply[Ranking]:
        """Return the best k candidates of a call.

        Raises:
          BadCall, TypeError, ValueError: what the caller can correct.
          UnknownVersion, EncodingMismatch: a version that is not held, features of another encoder.
          Stale: a model older than the policy allows.
          Overloaded, DeadlineExceeded, EngineClosed, ...: as `AsyncPreRanker.rank`.
        """
        return await self._answered("rank", self._scored("rank", call))

    async def score(self, call: Call) -> Reply[Scores]:
        """Return logits of a call's candidates, in their order; raises as `rank`."""
        return await self._answered("score", self._scored("score", call))

    async def prepare(self, call: Call) -> Served:
        """Compute the state of a user who is coming, for a later call that brings the id alone; raises as `rank`."""
        return (await self._answered("prepare", self._prepare(call))).served

    async def fields(self, method: str, call: Call) -> dict[str, Any]:
        """Return what a front sends of the answer to a call of "rank", "score" or "prepare"; raises as `rank`."""
        if method == "rank":
            return rank_fields(await self.rank(call), call.id)
        if method == "score":
            return score_fields(await self.score(call), call.id)
        return {"id": call.id, "version": (await self.prepare(call)).version}

    async def _prepare(self, call: Call) -> Reply[Any]:
        served = self._picked(call)
        await served.engine.prepare(self._request(call, served, prepare=True))
        return Reply(None, served)

    async def _scored(self, method: str, call: Call) -> Reply[Any]:
        served = self._picked(call)
        engine, config = served.engine, served.engine.config
        order, known = call.order or config.order, (LOGIT, BID, *config.orders)
        if order not in known:
            raise BadCall("order", f"expected one of {', '.join(known)}, got {order[:80]!r}")
        candidates = candidates_from(call)
        if method == "rank" and call.k is None:
            raise BadCall("k", f"expected 1 to max_k={config.max_k}, got none; send k, how many to answer with")
        request = self._request(call, served)
        with engine_checks():
            if method == "rank":
                answer: Any = await engine.rank(request, call.k, candidates=candidates)  # type: ignore[arg-type]
            else:
                answer = await engine.score(request, candidates)
        answer = self._marked(answer, served)
        self._observe(method, call, served, answer, candidates, request)
        return Reply(answer, served)

    async def _answered(self, method: str, work: Any) -> Any:
        code, reply = "OK", None
        try:
            reply = await work
            return reply
        except BaseException as error:
            code = "CANCELLED" if isinstance(error, asyncio.CancelledError) else problem_of(error).code
            raise
        finally:
            self.calls[method, code] += 1
            version, answer = ("", None) if reply is None else (reply.served.version, reply.answer)
            self.recent.note(method, version, code, answer)

    def _observe(
        self, method: str, call: Call, served: Served, answer: Answer, candidates: Candidates, request: Request
    ) -> None:
        if not self.observers:
            return
        if method == "rank":
            call = dataclasses.replace(call, order=call.order or served.engine.config.order)
        features = None if answer.stand_in else request.context.used
        seen = Observed(method, call, served, answer, candidates, features, request.context.now)
        for observer in self.observers:
            observer.observe(seen)

    def _picked(self, call: Call) -> Served:
        served = self.models.pick(call)
        if self.policy.when_stale == "refuse" and (stale := self._stale(served)):
            raise Stale(f"version {served.version[:12]}: {stale}")
        return served

    def _stale(self, served: Served) -> str | None:
        """Return which part of a version is older than it may be, in words."""
        policy = self.policy
        for part, most, age in (("model", policy.max_age, served.age), ("index", policy.max_index_age, served.index_age)):
            if most is not None and age > most:
                return f"the {part} is {age:.0f} s old, more than {most:g} s"
        return None

    def _marked(self, answer: A, served: Served) -> A:
        """Return the answer, degraded where the version is stale."""
        if (stale := self._stale(served)) is None:
            return answer
        reason = stale if answer.reason is None else f"{answer.reason}; {stale}"
        return dataclasses.replace(answer, degraded=True, reason=reason)

    def _request(self, call: Call, served: Served, *, prepare: bool = False) -> Request:
        if call.now is None and self.observers and (call.record is not None or call.events is not None):
            call = dataclasses.replace(call, now=served.users.clock())  # as the log will say
        context = Context(None, now=call.now, call=call)
        version = call.feature_version
        told: dict[str, Any] = {"budget": call.budget, "order": call.order, "exclude": call.exclude}
        request = Request(user=call.user, feature_version=version, context=context, **told)
        if version is not None and served.engine.holds_state(request):
            return request  # the feature version says that nothing is new: a tenth of a call's time is saved
        context.features = served.users.of(call)
        if version is None and context.features is not None and not prepare:
            context.used = context.features  # what the call brings counts, whatever was prepared for its user
            return dataclasses.replace(request, feature_version=digest_of(context.features))
        return request


def digest_of(features: UserFeatures) -> bytes:
    """Return the same for the same features."""
    made = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(features):
        made.update(np.asarray(leaf).tobytes())
    return made.digest()


def rank_fields(reply: Reply[Ranking], call_id: str) -> dict[str, Any]:
    """Return `ids`, `scores` and `logits` of the best candidates with a score, best first, and metadata of the answer.

    A model of T objectives has logits [k, T], and `objectives` names them.
    """
    answer = reply.answer
    arrays: dict[str, Any] = {"ids": answer.ids, "scores": answer.scores, "logits": answer.logits}
    if not answer.mask.all():
        arrays = {name: array[answer.mask] for name, array in arrays.items()}
    counts = {name: getattr(answer, name) for name in ("candidates", "unknown", "excluded")}
    return _common(reply, call_id) | counts | arrays


def score_fields(reply: Reply[Scores], call_id: str) -> dict[str, Any]:
    """Return `logits` [C] or [C, T] in the order of the candidates, `mask` [C] false where there is none."""
    return _common(reply, call_id) | {"logits": reply.answer.logits, "mask": reply.answer.mask}


def _common(reply: Reply[Any], call_id: str) -> dict[str, Any]:
    answer: Answer = reply.answer
    about = {
        "id": call_id, "version": answer.version, "degraded": answer.degraded, "reason": answer.reason,
        "state_age": answer.state_age, "non_finite": answer.non_finite, "stages": answer.stages,
    }  # fmt: skip
    return about | ({"objectives": list(reply.served.objectives)} if len(reply.served.objectives) > 1 else {})


def to_json(value: Any) -> Any:
    """Return plain JSON values: lists for arrays, None for what JSON cannot say."""
    if isinstance(value, dict):
        return {name: to_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(inner) for inner in value]
    if isinstance(value, np.ndarray):
        finite = value.dtype.kind != "f" or np.isfinite(value).all()
        return value.tolist() if finite else [to_json(number) for number in value.tolist()]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


MOST_EXPLAINED = 100  # rows that are explained


async def explain(service: Service, call: Call) -> dict[str, Any]:
    """Return the answer of `Service.rank`, its spans, and what each block contributed to each logit.

    The contributions are computed from the features of the call. They are none where those are not known, because the state
    came from an earlier call, and for a model whose interaction is not that of this package.
    """
    call = dataclasses.replace(call, id=secrets.token_hex(8))  # by which its answer is told from others
    found: list[Observed] = []
    watcher = types.SimpleNamespace(observe=found.append)
    service.observers.append(watcher)
    try:
        reply = await service.rank(call)
    finally:
        service.observers.remove(watcher)
    fields = rank_fields(reply, call.id)
    fields = {name: value[:MOST_EXPLAINED] if isinstance(value, np.ndarray) else value for name, value in fields.items()}
    features = next((seen.features for seen in found if seen.call.id == call.id), None)
    parts = {} if features is None else await asyncio.to_thread(_parts, reply, features, fields["ids"])
    fields["ids"] = list(map(str, fields["ids"].tolist()))  # a browser's numbers end at 2^53
    spans = [list(span) for span in reply.answer.timeline.spans]
    return fields | {"spans": spans, "contributions": parts}


def _parts(reply: Reply[Ranking], features: UserFeatures, ids: np.ndarray) -> dict[str, list[float]]:
    restored = reply.served.restored
    model, index = restored.trained.model, restored.index
    if index is None or getattr(model.interaction, "func", None) is not INTERACTION.apply or not len(ids):
        return {}
    # every count of rows has one compiled function
    rows, known = index.take(np.resize(ids, MOST_EXPLAINED))
    if not known.all():
        return {}
    state = _state(model.user)(restored.trained.params, features)
    parts = _contributions(model.config)(restored.trained.params, state, rows)
    return {name: np.asarray(part)[: len(ids)].reshape(len(ids), -1)[:, 0].tolist() for name, part in parts.items()}


_state = functools.lru_cache(maxsize=4)(jax.jit)
_contributions = functools.lru_cache(maxsize=4)(lambda config: jax.jit(functools.partial(contributions, config=config)))
