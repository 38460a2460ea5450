"""The try-it form of the page: a ranking with each block's contribution, and the timeline of its request."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import secrets
from typing import Any

import jax
import numpy as np

from aif_jax.config import Config
from aif_jax.interaction import contributions
from aif_jax.model import INTERACTION
from aif_jax.service.answers import rank_fields
from aif_jax.service.calls import Call
from aif_jax.service.core import Observed, Reply, Service
from aif_jax.serving import Ranking
from aif_jax.types import Streamed, UserFeatures
from aif_jax.user_table.program import unpack

MOST = 100  # rows that are explained


async def explain(service: Service, call: Call) -> dict[str, Any]:
    """The answer of `Service.rank`, its spans, what each block contributed to each logit, and what the user's row held.

    The contributions are computed from the features of the call. They are none where those are not known, because the state
    came from an earlier call, and for a model whose interaction is not that of this package. `row` is None for a call without
    a row of a user table; else its `events`, how many came `since` by the feature source, and `last_event`, the age in seconds
    of the latest of all, None where there is none.
    """
    call = dataclasses.replace(call, id=secrets.token_hex(8))  # by which its answer is recognised
    found: list[Observed] = []

    class Once:
        """Keeps what was answered to this call."""

        def observe(self, seen: Observed) -> None:
            """Keeps it."""
            if seen.call.id == call.id:
                found.append(seen)

    watcher = Once()
    service.observers.append(watcher)
    try:
        reply = await service.rank(call)
    finally:
        service.observers.remove(watcher)
    fields = rank_fields(reply, call.id)
    fields = {name: value[:MOST] if isinstance(value, np.ndarray) else value for name, value in fields.items()}
    features = found[0].features if found else None
    if features is not None and isinstance(history := features.history, Streamed):
        memory = await asyncio.to_thread(unpack, history.memory)
        features = dataclasses.replace(features, history=dataclasses.replace(history, memory=memory, version=""))
    parts = {} if features is None else await asyncio.to_thread(_parts, reply, features, fields["ids"])
    fields["ids"] = list(map(str, fields["ids"].tolist()))  # a browser's numbers end at 2^53
    spans = [list(span) for span in reply.answer.timeline.spans]
    return fields | {"spans": spans, "contributions": parts, "row": None if features is None else _row(features.history)}


def _row(history: Any) -> dict[str, int | None] | None:
    """What a row of the user table held, see `explain`."""
    if not isinstance(history, Streamed):
        return None
    times = np.concatenate([np.asarray(history.memory.recent.time), np.asarray(history.since.time)])
    last = int(history.now) - int(times.max()) if times.any() else None
    since = int(np.count_nonzero(history.since.time))
    return {"events": int(history.memory.count), "since": since, "last_event": last}


def _parts(reply: Reply[Ranking], features: UserFeatures, ids: np.ndarray) -> dict[str, list[float]]:
    restored = reply.served.restored
    model, index = restored.trained.model, restored.index
    if index is None or getattr(model.interaction, "func", None) is not INTERACTION.apply or not len(ids):
        return {}
    # every count of rows has one compiled function
    rows, known = index.take(np.resize(ids, MOST))
    if not known.all():
        return {}
    state = _state(model.user)(restored.trained.params, features)
    parts = _contributions(model.config)(restored.trained.params, state, rows)
    return {name: np.asarray(part)[: len(ids)].reshape(len(ids), -1)[:, 0].tolist() for name, part in parts.items()}


@functools.lru_cache(maxsize=4)
def _state(user: Any) -> Any:
    return jax.jit(user)


@functools.lru_cache(maxsize=4)
def _contributions(config: Config) -> Any:
    return jax.jit(functools.partial(contributions, config=config))
