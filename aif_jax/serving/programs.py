"""The compiled functions of an engine, what they rank by, and what crosses between host and device around them.

All is compiled ahead of time for exact shapes, so a request can neither trace nor transfer anything that is not written here.
It uploads the user features, int32 rows [bucket] and, where candidates carry bids, float32 bids [bucket]; it downloads k
scores, k logits (of each objective), k positions and a count.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.checks import check_encoding, expect
from aif_jax.config import Config
from aif_jax.features import check_user_features, unpack, user_specs
from aif_jax.model import PreRanker
from aif_jax.scores import Order, objective_names, probabilities, reads_bid
from aif_jax.store import codec
from aif_jax.types import Params, UserFeatures

logger = logging.getLogger(__name__)
LOGIT, BID = "logit", "bid"
ROWS_OWN = math.nan
"""The bid of candidates that bring none: the side value of their item counts."""


class Orders(NamedTuple):
    """The orders of an engine by name, hashable: every program computes each of them, and a request chooses one."""

    names: tuple[str, ...]
    functions: tuple[Order, ...]
    bid: str  # the side value that candidates may bring in place of the row's
    need_bids: frozenset[str]  # names of those that read it where the row has none

    def expect(self, order: str, *, given: bool) -> None:
        """Raises ValueError for an order that there is none of, or that reads a bid that is nowhere."""
        if order == LOGIT:
            return
        expect(order in self.names, "Request.order", f"one of {[LOGIT, *self.names]}", repr(order))
        expected = f"bids with the candidates or {self.bid!r} in schema.side"
        expect(given or order not in self.need_bids, f"order {order!r}", expected, "neither; send bids, or take another order")

    def place(self, order: str) -> int:
        """Which branch of a program ranks by that order: the logit is the first."""
        return (LOGIT, *self.names).index(order)


def orders_of(config: Config, bid: str, given: Mapping[str, Any]) -> Orders:
    """The orders of an engine: "bid", the probability of the first objective times the bid, and those given.

    Raises:
      ValueError: a name that is taken by the logit, or an order that does not fit the model, see `scores.reads_bid`.
    """
    expect(isinstance(given, Mapping), "orders", "functions f(p, bid) by name", type(given).__name__)
    expect(LOGIT not in given, "orders", f"another name than {LOGIT!r}, which is the order without a function", list(given))
    orders = {BID: _times_bid((*objective_names(config.objectives), "")[0])} | dict(given)
    read = {name for name, order in orders.items() if reads_bid(name, order, config.objectives)}
    return Orders(tuple(orders), tuple(orders.values()), bid, frozenset() if bid in config.schema.side else frozenset(read))


@functools.cache  # one function a name, since programs are compiled for it
def _times_bid(objective: str) -> Order:
    return lambda p, bid: p[objective] * bid


COMPILER_OPTIONS: dict[str, dict[str, Any]] = {"cpu": {"xla_cpu_prefer_vector_width": 512}}
"""By platform. XLA's own choice is 256 bits: with 512, where a CPU has them, scoring takes a fifth less time."""


def compute_inline() -> None:
    """Lets JAX on a CPU run each compiled function in the thread that calls it, not in a thread of JAX's own.

    A scoring call then wakes no thread and waits for none. `aif-jax serve` calls it; call it in a process of yours that only
    serves, before JAX makes its first array: JAX reads the setting then, for the whole process. Training wants JAX's default,
    which prepares the next step meanwhile. Other devices are not affected. Where the environment has
    JAX_CPU_ENABLE_ASYNC_DISPATCH, that holds.
    """
    if "JAX_CPU_ENABLE_ASYNC_DISPATCH" not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def history_length(features: Any) -> int:
    """Places L of the history of features; -1 where they are none, which the check reports."""
    size = getattr(getattr(getattr(features, "history", None), "mask", None), "size", 0)
    return size if isinstance(size, int) and size else -1


class TopCandidates(NamedTuple):
    """The best of one batch of candidates, on the host."""

    scores: np.ndarray  # float32 [min(max_k, bucket)], best first, -inf behind the last
    logits: np.ndarray  # float32 [min(max_k, bucket)], or [.., T]
    positions: np.ndarray  # int32 [min(max_k, bucket)]
    non_finite: int  # known candidates of the whole batch without a finite score


class Programs:
    """Compiled functions, shared by all versions of a model whose shapes are the same."""

    def __init__(self, model: PreRanker, *, max_k: int, bid: str):
        self.model = model
        self.max_k = max_k
        self.orders = orders_of(model.config, bid, {})  # of an engine that declares none
        self.compiles: Counter[str] = Counter()
        self.transfers: Counter[str] = Counter()
        self.warm_seconds = 0.0  # of the slowest scoring function, once warm
        self.one_by_one = jax.default_backend() == "cpu"  # its caches hold the arrays of one request of a batch
        # The least share of a compiled size that must be filled: one by one, a place to spare costs as much as a request.
        self.full = 1.0 if self.one_by_one else 0.75
        self.batchers: weakref.WeakSet[Any] = weakref.WeakSet()  # whose work shares the device
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._constants: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def user(self, params: Params, length: int, count: int = 1) -> Callable[..., Any]:
        """The compiled user function of these parameters for `count` histories of one length: packed features [count, n] ->
        states, each of them one array.
        """
        specs = user_specs(self.model.config.schema, length=length)
        packed = jax.ShapeDtypeStruct((count, sum(spec.size for spec in jax.tree.leaves(specs))), np.int32)

        def users(params, packed):
            def user(words):
                return codec.pack(self.model.user(params, unpack(words, specs)))

            if count == 1:
                return (user(packed[0]),)
            states = self._each(user, packed)
            return tuple(jax.tree.map(itemgetter(place), states) for place in range(count))

        return self._get("user", users, params, (packed,), of=specs)

    def plain(self, features: UserFeatures, *, encoding: str) -> UserFeatures:
        """Features of one user, checked, as NumPy arrays; without the encoder's version, on which no compiled function depends.

        Raises:
          EncodingMismatch: made by another encoder than the model's.
          TypeError, ValueError: as `check_user_features`.
        """
        check_encoding("UserFeatures", expected=encoding, got=getattr(features, "encoding", ""))
        check_user_features(self.model.config.schema, features, batched=False)
        return jax.tree.map(np.asarray, dataclasses.replace(features, encoding=""))

    def score(
        self, params: Params, states: tuple[Any, ...], index: Any, bucket: int, orders: Orders | None = None
    ) -> Callable[..., Any]:
        """The compiled interaction of these parameters for `len(states)` requests of one bucket, with gather, orders and
        top-k: (states, table, rows [b, bucket], bids [b, bucket], order [b]) -> (int32 [b, (2 + T) k + 1], logits
        [b, bucket] or [b, bucket, T]).
        """
        count = len(states)
        shapes = jax.ShapeDtypeStruct((count, bucket), np.int32), jax.ShapeDtypeStruct((count, bucket), np.float32)
        arguments = (states, index.shapes, *shapes, jax.ShapeDtypeStruct((count,), np.int32))
        orders = orders or self.orders
        return self._get("score", self._score_fn(index.decode, bucket, orders), params, arguments, static=orders)

    def upload_features(self, words: list[np.ndarray]) -> np.ndarray:
        """The packed features of some users as one array, which goes up with the call: one transfer for all leaves."""
        return self._count_up(words[0][None] if len(words) == 1 else np.stack(words))

    def upload_rows(
        self, rows: list[np.ndarray], bids: list[np.ndarray | None], orders: list[str], bucket: int, known: Orders | None = None
    ) -> Any:
        """Rows [b, bucket], bids [b, bucket] and order [b] of b requests, which go up with the call.

        Bids and orders go up only where requests bring bids or differ in order; device constants take their place otherwise.
        """
        places = [(known or self.orders).place(order) for order in orders]
        padded = [pad(r.astype(np.int32, copy=False), bucket, -1) for r in rows]
        stacked = self._count_up(padded[0][None] if len(padded) == 1 else np.stack(padded))
        prices, order = self._constant((len(rows), bucket), ROWS_OWN), self._constant((len(rows),), places[0])
        if any(place and given is not None for place, given in zip(places, bids, strict=True)):
            some = [np.zeros(0, np.float32) if given is None else given for given in bids]
            prices = self._count_up(np.stack([pad(given, bucket, ROWS_OWN) for given in some]))
        if len(set(places)) > 1:
            order = self._count_up(np.asarray(places, np.int32))
        return stacked, prices, order

    @staticmethod
    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        """What a compiled function returns, not ready yet; arrays on the host go up with the call, the fastest way."""
        with jax.transfer_guard_host_to_device("allow"):  # meant
            return function(*arguments)

    def download(self, value: jax.Array) -> np.ndarray:
        """An array on the host."""
        self.transfers["device_to_host"] += 1
        self.transfers["device_to_host_bytes"] += value.nbytes
        with jax.transfer_guard_device_to_host("allow"):  # meant, and sooner there than by `device_get`
            return np.asarray(value)

    def download_best(self, packed: jax.Array) -> list[TopCandidates]:
        """int32 [b, (2 + T) k + 1] -> the scores, logits, positions and count that a request's row packs into one transfer."""
        parts, outputs = [], self.model.config.outputs
        for row in self.download(packed):
            k = (len(row) - 1) // (2 + outputs)
            scores, logits, positions = row[:k], row[k : -1 - k], row[-1 - k : -1]
            shaped = logits.view(np.float32) if outputs == 1 else logits.view(np.float32).reshape(k, outputs)
            parts.append(TopCandidates(scores.view(np.float32), shaped, positions, int(row[-1])))
        return parts

    def _score_fn(self, decode: Callable[..., Any], bucket: int, orders: Orders) -> Callable[..., Any]:
        model, k, each = self.model, min(self.max_k, bucket), self._each
        objectives, several = model.config.objectives, model.config.outputs > 1

        def one(params, state, table, rows, bids, order):
            items = decode(table, rows)
            known, logits = rows >= 0, model.interaction(params, state, items)
            finite = known & (jnp.isfinite(logits).all(-1) if several else jnp.isfinite(logits))
            logits = jnp.where(finite[:, None] if several else finite, logits, -jnp.inf)
            bid = jnp.where(jnp.isnan(bids), getattr(items, "side", {}).get(orders.bid, bids), bids)

            def by(function):
                return lambda: jnp.asarray(function(probabilities(params, logits, objectives), bid), jnp.float32)

            value = jax.lax.switch(order, [lambda: logits[:, 0] if several else logits, *map(by, orders.functions)])
            value = jnp.where(finite & jnp.isfinite(value), value, -jnp.inf)
            value = jnp.where(value == 0, 0.0, value)  # top-k puts 0 above -0: no tie, which it is for the merge on the host
            # Without the barrier XLA computes both again for every reader.
            logits, value = jax.lax.optimization_barrier((logits, value))
            best, positions = jax.lax.top_k(value, k)
            as_bits = [jax.lax.bitcast_convert_type(part, jnp.int32).ravel() for part in (best, logits[positions])]
            non_finite = jnp.sum(known & (value == -jnp.inf), dtype=jnp.int32)
            return jnp.concatenate([*as_bits, positions, non_finite[None]]), logits

        def many(params, states, table, rows, bids, order):
            stacked = codec.unpack(jax.tree.map(lambda *words: jnp.stack(words), *states))
            if len(states) == 1:
                state = jax.tree.map(itemgetter(0), stacked)
                alone = one(params, state, table, rows[0], bids[0], order[0])
                return jax.tree.map(lambda leaf: leaf[None], alone)
            return each(lambda state, *inputs: one(params, state, table, *inputs), stacked, rows, bids, order)

        return many

    def _each(self, function: Callable[..., Any], *batches: Any) -> Any:
        """`function` of every entry [b, ...] of some batches."""
        if self.one_by_one:
            return jax.lax.map(lambda entry: function(*entry), batches)
        return jax.vmap(function)(*batches)

    def _get(
        self, kind: str, function: Callable[..., Any], params: Params, arguments: Any, *, of: Any = None, static: Any = None
    ) -> Callable[..., Any]:
        """The compiled `function(params, *arguments)`, bound to the parameters; those that it does not read stay outside."""
        leaves, tree = jax.tree.flatten((params, arguments, of))
        key = (kind, tree, static, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        with self._lock:
            if key not in self._compiled:
                start = time.perf_counter()
                lowered = jax.jit(function).lower(params, *arguments)
                self._compiled[key] = lowered.compile(COMPILER_OPTIONS.get(jax.default_backend()))
                self.compiles[kind] += 1
                logger.info("compiled %s function %d in %.1f s", kind, self.compiles[kind], time.perf_counter() - start)
        return functools.partial(self._compiled[key], params)

    def _constant(self, shape: tuple[int, ...], value: float | int) -> jax.Array:
        """Device arrays that most requests share, so that nothing goes up for them."""
        key = (shape, value, type(value))
        if key not in self._constants:
            self._constants[key] = jax.device_put(np.full(shape, value, np.int32 if isinstance(value, int) else np.float32))
        return self._constants[key]

    def _count_up(self, array: np.ndarray) -> np.ndarray:
        self.transfers["host_to_device"] += 1
        self.transfers["host_to_device_bytes"] += array.nbytes
        return array


def pad(values: np.ndarray, size: int, fill: float) -> np.ndarray:
    """A new array [size, ...] that starts with `values` [n, ...] and ends with `fill`; a device may be given its memory."""
    padded = np.full((size, *values.shape[1:]), fill, values.dtype)
    padded[: len(values)] = values
    return padded


def best_of(parts: list[TopCandidates], rows: list[np.ndarray], k: int, *, outputs: int = 1) -> TopCandidates:
    """The best k of several batches of candidates; positions count from the first batch's first candidate.

    Args:
      parts: parts of each batch; none has an item twice.
      rows: int32 [n] index rows of each batch's candidates: an item of several batches comes once, with its best score.
      k: how many to keep; missing ones have score -inf and position 0.
      outputs: T, logits of a candidate.
    """
    if len(parts) == 1:
        scores, logits, positions = (field[:k] for field in parts[0][:3])
    else:
        offsets = np.cumsum([0, *map(len, rows)])[: len(rows)]
        scores = np.concatenate([part.scores for part in parts] or [np.zeros(0, np.float32)])
        none = np.zeros(0 if outputs == 1 else (0, outputs), np.float32)
        logits = np.concatenate([part.logits for part in parts] or [none])
        shifted = [part.positions + offset for part, offset in zip(parts, offsets, strict=True)]
        positions = np.concatenate(shifted or [np.zeros(0, np.int32)])
        best = np.argsort(-scores, kind="stable")
        best = best[scores[best] > -np.inf]
        _, first = np.unique(np.concatenate(rows)[positions[best]] if rows else best, return_index=True)
        best = best[np.sort(first)][:k]
        scores, logits, positions = scores[best], logits[best], positions[best]
    if len(scores) < k:
        scores, logits, positions = pad(scores, k, -np.inf), pad(logits, k, -np.inf), pad(positions, k, 0)
    return TopCandidates(scores, logits, positions, sum(part.non_finite for part in parts))


def has_repeats(rows: np.ndarray) -> bool:
    """Whether some known row comes twice."""
    ordered = np.sort(rows)
    return bool(((ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)).any())


def without_repeats(rows: np.ndarray, bids: np.ndarray | None) -> np.ndarray:
    """Rows int32 [C] of candidates with -1 for those that repeat another: the first of the highest bid is left."""
    keys = (np.arange(len(rows)), rows) if bids is None else (np.arange(len(rows)), -bids, rows)
    order = np.lexsort(keys)
    once = np.full_like(rows, -1)
    first = order[np.flatnonzero(np.diff(rows[order], prepend=-2))]
    once[first] = rows[first]
    return once
