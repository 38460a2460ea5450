"""`Service`: calls in, answers out; knows versions and observers, and nothing of networks."""

import asyncio
import dataclasses
import hashlib
from collections import Counter
from typing import Any, Literal, Self

import jax
import numpy as np

from aif_jax.connectors.features import clock
from aif_jax.interaction import contributions
from aif_jax.service.calls import BadCall, Call, blamed
from aif_jax.service.features import Context
from aif_jax.service.models import LoadedModel, Models
from aif_jax.serving import Request
from aif_jax.serving.requests import Timeline
from aif_jax.types import UserFeatures

ABOUT = ("version", "degraded", "reason", "state_age", "non_finite", "stages")
COUNTS, RANKED = ("candidates", "unknown", "excluded"), ("ids", "scores", "logits")


@dataclasses.dataclass(frozen=True, eq=False)
class Reply:
    """A call that was answered.

    Attributes:
      method: "rank", "score", "prepare", or "explain" (a rank whose blocks' contributions are shown).
      call: as it came; where there are observers and it brought raw values, `now` is filled in.
      served: version that answered.
      answer: `Ranking` or `Scores`; None of "prepare".
      order: name of the order of a ranking, "" otherwise.
      features: that call or source brought; None where a prepared or versioned state answered, and of a stand-in.
    """

    method: str
    call: Call
    served: LoadedModel
    answer: Any
    order: str = ""
    features: UserFeatures | None = None

    def fields(self) -> dict[str, Any]:
        """Return what a front sends: of a ranking `ids`, `scores` and `logits` of the candidates with a score, best first.

        Of scores `logits` [C] or [C, T] in the order of the candidates, and `mask` [C], false where there is none. With more
        than one objective, `objectives` names them.
        """
        answer = self.answer
        if answer is None:
            return {"id": self.call.id, "version": self.served.version}
        names = (*ABOUT, *COUNTS, *RANKED) if self.method != "score" else (*ABOUT, "logits", "mask")
        fields = {"id": self.call.id} | {name: getattr(answer, name) for name in names}
        if self.method != "score" and not answer.mask.all():
            fields |= {name: fields[name][answer.mask] for name in RANKED}
        return fields | ({"objectives": self.served.objectives} if len(self.served.objectives) > 1 else {})


class Service:
    """Answers calls with the versions of a folder: `async with Service(models) as service: await service.answer("rank", call)`.

    Args:
      observers: whoever wants to know of rankings and scores that were answered, such as a log: `observe(reply)` gets a
        `Reply`, returns at once and raises nothing.
    """

    def __init__(self, models: Models, *, observers: tuple[Any, ...] = ()):
        self.models = models
        self.observers = list(observers)
        self.calls: Counter[tuple[str, str]] = Counter()  # that a front got, by method and code
        self.latest: tuple[str, Timeline] | None = None  # version and stages of the latest answer
        self.unready: Literal["starting", "draining"] | None = "starting"  # why no traffic should come; None where it may

    async def __aenter__(self) -> Self:
        await self.models.start()
        self.unready = None
        return self

    async def __aexit__(self, *error: object) -> None:
        """Stop being ready, answer the calls in flight, and close the engines."""
        self.unready = "draining"
        await self.models.close()

    async def answer(self, method: str, call: Call) -> Reply:
        """Answer a call: "rank" or "explain" with the best k candidates, "score" with all logits; "prepare" computes a state.

        Raises:
          BadCall: what the caller can correct.
          Failure: a version that is not held.
          Overloaded, DeadlineExceeded, EngineClosed, ...: as `AsyncPreRanker.rank`.
        """
        served = self.models.pick(call)
        engine = served.engine
        if method == "prepare":
            await engine.prepare(self._request(call, served, prepare=True))
            return Reply(method, call, served, None)
        if call.candidates is None:
            raise BadCall("candidates", "expected item ids, got none; send candidates")
        request, order = self._request(call, served), ""
        try:
            if method != "score":
                answer: Any = await engine.rank(request, call.k, candidates=call.candidates)  # type: ignore[arg-type]
                order = call.order or engine.config.order
            else:
                answer = await engine.score(request, call.candidates)
        except (TypeError, ValueError) as error:
            raise blamed(error) from None
        reply = Reply(method, request.context.call, served, answer, order, None if answer.stand_in else request.context.used)
        self.latest = answer.version, answer.timeline
        for observer in self.observers:
            observer.observe(reply)
        return reply

    def _request(self, call: Call, served: LoadedModel, *, prepare: bool = False) -> Request:
        """Return the engine's request. Its feature version keys the user's state:

        | call's feature version | call's data | engine's feature version |
        |---|---|---|
        | given, state held | any | the call's; nothing is encoded |
        | given | features | the call's |
        | given | id alone | ("source", the call's), so that no call with features joins a read of the source |
        | none | features | a digest of them; None in a `prepare` |
        | none | id alone | None, which finds what a `prepare` left |
        """
        if call.now is None and self.observers and (call.record is not None or call.events is not None):
            call = dataclasses.replace(call, now=clock(served.users.encoder))  # as the log will say
        context, feature_version = Context(call), call.feature_version
        request = Request(
            user=call.user, feature_version=feature_version, context=context,
            budget=call.budget, order=call.order or None, exclude=call.exclude,
        )  # fmt: skip
        if feature_version is not None and served.engine.holds_state(request):
            return request  # the feature version says that nothing is new: a tenth of a call's time is saved
        context.features = served.users.of(call)
        if feature_version is not None and context.features is None:
            return dataclasses.replace(request, feature_version=("source", feature_version))
        if feature_version is None and context.features is not None and not prepare:
            context.used = context.features  # also right where the cache answers: equal digest, equal features
            leaves = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(context.features))
            return dataclasses.replace(request, feature_version=hashlib.blake2b(leaves, digest_size=16).digest())
        return request


MAX_EXPLAINED = 100  # rows of the answer that are kept


async def explain(service: Service, call: Call) -> dict[str, Any]:
    """Return the first rows of the answer of "rank", its spans, and what each block added to the first objective's logit.

    Contributions are computed from the features that call or source brought: none where a prepared or versioned state answered.
    """
    reply = await service.answer("explain", call)
    fields = reply.fields()
    fields |= {name: value[:MAX_EXPLAINED] for name, value in fields.items() if isinstance(value, np.ndarray)}
    parts = {} if reply.features is None else await asyncio.to_thread(_parts, reply, fields["ids"])
    fields["ids"] = list(map(str, fields["ids"].tolist()))  # a browser's numbers end at 2^53
    return fields | {"spans": list(map(list, reply.answer.timeline.spans)), "contributions": parts}


def _parts(reply: Reply, ids: np.ndarray) -> dict[str, list[float]]:
    restored = reply.served.restored
    model, params, index = restored.trained.model, restored.trained.params, restored.index
    if index is None or not len(ids):
        return {}
    rows, known = index.take(np.resize(ids, MAX_EXPLAINED))  # every count of rows has one compiled function
    if not known.all():
        return {}
    parts = _contributions(params, jax.jit(model.user)(params, reply.features), rows, config=model.config)
    return {name: np.asarray(part)[: len(ids)].reshape(len(ids), -1)[:, 0].tolist() for name, part in parts.items()}


_contributions = jax.jit(contributions, static_argnames="config")
