"""The compiled functions of an engine, and what they rank by.

All is compiled ahead of time for exact shapes, so a request can neither trace nor transfer anything that is not written down.
For b = batch_size requests, however many came, a call uploads user features int32 [b, n], or rows int32 [b, bucket] and, for an
order by bids that candidates carry, bids float32 [b, bucket]; it downloads int32 [b, (2 + T) min(max_k, bucket) + 1]: the
scores, logits (of T objectives) and positions of the best, and a count; or, where all are to come back, logits float32
[b, bucket] or [.., T].
"""

import functools
import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.checks import expect
from aif_jax.config import Config
from aif_jax.features import unpack, user_specs
from aif_jax.model import PreRanker
from aif_jax.scores import Order, objective_names, probabilities, reads_bid
from aif_jax.serving.config import ServingConfig
from aif_jax.store import codec
from aif_jax.types import Params

logger = logging.getLogger(__name__)
LOGIT, BID = "logit", "bid"
COUNT = jax.ShapeDtypeStruct((), np.int32)
NO_BID = math.nan
"""Stands for the bid of a candidate that brings none: the side value in its item's row is used."""


class Orders(NamedTuple):
    """The orders of an engine by name, hashable: every program holds all of them, and runs the one that a request chooses."""

    names: tuple[str, ...]
    functions: tuple[Order, ...]
    bid: str  # the side value that candidates may bring in place of the row's
    need_bids: frozenset[str]  # names of those that read it where the row has none

    def expect(self, order: str, *, given: bool) -> None:
        """Raise ValueError for a request's order that there is none of, or that reads a bid that is nowhere."""
        expect(order in self.names, "Request.order", f"one of {[LOGIT, *self.names]}", repr(order))
        expected = f"for {order!r} bids with the candidates, or a model whose items have the side value {self.bid!r}"
        expect(given or order not in self.need_bids, "Request.order", expected, "neither; send bids, or take another order")


def orders_of(config: Config, serving: ServingConfig) -> Orders:
    """Return the orders of an engine: "bid", the probability of the first objective times the bid, and those given.

    Raises:
      ValueError: a name that is taken by the logit, an order that does not fit the model, see `scores.reads_bid`, or none of
        the name that requests take by default.
    """
    bid, given = serving.bid, serving.orders
    expect(LOGIT not in given, "orders", f"another name than {LOGIT!r}, which is the order without a function", list(given))
    orders = {BID: _times_bid((*objective_names(config.objectives), "")[0])} | dict(given)
    names = [LOGIT, *orders]
    expect(serving.order in names, "ServingConfig.order", f"one of {names}", repr(serving.order))
    read = {name for name, order in orders.items() if reads_bid(name, order, config.objectives)}
    return Orders(tuple(orders), tuple(orders.values()), bid, frozenset() if bid in config.schema.side else frozenset(read))


@functools.cache  # one function a name, since programs are compiled for it
def _times_bid(objective: str) -> Order:
    return lambda p, bid: p[objective] * bid


COMPILER_OPTIONS: dict[str, dict[str, Any]] = {"cpu": {"xla_cpu_prefer_vector_width": 512}}
"""By platform. XLA's own choice is 256 bits: with 512, where a CPU has them, scoring takes a fifth less time."""


def compute_inline() -> None:
    """Let JAX on a CPU run each compiled function in the thread that calls it, not in a thread of JAX's own.

    A scoring call then wakes no thread and waits for none. `aif-jax serve` calls it; call it in a process of yours that only
    serves, before JAX makes its first array: JAX reads the setting then, for the whole process. Training wants JAX's default,
    which prepares the next step meanwhile. Other devices are not affected. Where the environment has
    JAX_CPU_ENABLE_ASYNC_DISPATCH, that holds.
    """
    if "JAX_CPU_ENABLE_ASYNC_DISPATCH" not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)


class Programs:
    """Compiled functions, shared by all versions of a model whose shapes are the same."""

    def __init__(self, model: PreRanker, *, max_k: int):
        self.model = model
        self.max_k = max_k
        self.compiles: Counter[str] = Counter()
        self.transfers: Counter[str] = Counter()
        self.warm_seconds = 0.0  # of the slowest scoring function, once warm
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def user(self, params: Params, size: int = 1) -> Callable[..., tuple[Any, ...]]:
        """Return the compiled user function of these parameters for up to `size` users.

        (packed features int32 [size, n], count of users []) -> states, each of them one array.
        """
        specs = user_specs(self.model.config.schema, length=self.model.config.history_length)
        packed = jax.ShapeDtypeStruct((size, sum(spec.size for spec in jax.tree.leaves(specs))), np.int32)

        def users(params, packed, count):
            def user(words):
                return codec.pack(self.model.user(params, unpack(words, specs)))

            states = each(user, count, packed)
            return tuple(jax.tree.map(itemgetter(place), states) for place in range(size))

        return self._get("user", users, params, (packed, COUNT))

    def score(
        self, params: Params, states: tuple[Any, ...], index: Any, bucket: int, orders: Orders
    ) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """Return compiled interaction, gather, orders and top-k of these parameters for `len(states)` requests of a bucket.

        (states, table, rows [b, bucket], bids [b, bucket], order [], count of requests []) ->
        (int32 [b, (2 + T) k + 1], logits [b, bucket] or [b, bucket, T]).
        """
        model, decode, k = self.model, index.decode, min(self.max_k, bucket)
        objectives, several = model.config.objectives, model.config.outputs > 1

        def one(params, state, table, rows, bids, order):
            items = decode(table, rows)
            known, logits = rows >= 0, model.interaction(params, state.widened(), items)
            finite = known & (jnp.isfinite(logits).all(-1) if several else jnp.isfinite(logits))
            logits = jnp.where(finite[:, None] if several else finite, logits, -jnp.inf)
            bid = jnp.where(jnp.isnan(bids), getattr(items, "side", {}).get(orders.bid, bids), bids)

            def by(function):
                return lambda: jnp.asarray(function(probabilities(params, logits, objectives), bid), jnp.float32)

            value = jax.lax.switch(order, [lambda: logits[:, 0] if several else logits, *map(by, orders.functions)])
            value = jnp.where(finite & jnp.isfinite(value), value, -jnp.inf)
            value = jnp.where(value == 0, 0.0, value)  # top-k puts 0 above -0, which are a tie
            # Without the barrier XLA computes both again for every reader.
            logits, value = jax.lax.optimization_barrier((logits, value))
            best, positions = jax.lax.top_k(value, k)
            as_bits = [jax.lax.bitcast_convert_type(part, jnp.int32).ravel() for part in (best, logits[positions])]
            non_finite = jnp.sum(known & (value == -jnp.inf), dtype=jnp.int32)
            return jnp.concatenate([*as_bits, positions, non_finite[None]]), logits

        def score(params, states, table, rows, bids, order, count):
            states = jax.tree.map(lambda *words: jnp.stack(words), *states)
            return each(lambda state, rows, bids: one(params, state, table, rows, bids, order), count, states, rows, bids)

        shapes = [jax.ShapeDtypeStruct((len(states), bucket), dtype) for dtype in (np.int32, np.float32)]
        return self._get("score", score, params, (states, index.shapes, *shapes, COUNT, COUNT), static=orders)

    def _get(
        self, kind: str, function: Callable[..., Any], params: Params, arguments: Any, *, static: Any = None
    ) -> Callable[..., Any]:
        """Return compiled `function(params, *arguments)`, bound to the parameters; JAX drops those that it does not read."""
        leaves, tree = jax.tree.flatten((params, arguments))
        key = (kind, tree, static, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        with self._lock:
            if key not in self._compiled:
                start, lowered = time.perf_counter(), jax.jit(function).lower(params, *arguments)
                self._compiled[key] = lowered.compile(COMPILER_OPTIONS.get(jax.default_backend()))
                self.compiles[kind] += 1
                logger.info("compiled %s function %d in %.1f s", kind, self.compiles[kind], time.perf_counter() - start)
        return functools.partial(self._compiled[key], params)


def each(function: Callable[..., Any], count: Any, *batches: Any) -> Any:
    """Return `function` of the first `count` entries of batches [size, ...]; what stands in other places has no meaning.

    One by one: so empty places cost nothing, and a CPU's caches hold the arrays of one request.
    """
    size, function = len(jax.tree.leaves(batches)[0]), jax.jit(function)  # so that it is traced once

    def step(place, results):
        result = function(*jax.tree.map(itemgetter(place), batches))
        return jax.tree.map(lambda whole, part: whole.at[place].set(part), results, result)

    shapes = jax.eval_shape(function, *jax.tree.map(itemgetter(0), batches))
    return jax.lax.fori_loop(0, count, step, jax.tree.map(lambda of: jnp.zeros((size, *of.shape), of.dtype), shapes))
