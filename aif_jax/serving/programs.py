"""The compiled functions of an engine and what crosses between host and device around them.

Everything is compiled ahead of time for exact shapes and called with arrays that were put on the device explicitly, so a
request can neither trace nor transfer anything that is not written here. For a request go up: the user features, int32 rows
[bucket] and, only where candidates carry bids, float32 bids [bucket]. Down come k scores, k logits and k positions.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.config import Config
from aif_jax.data.validate import check_user_features
from aif_jax.model import PreRanker
from aif_jax.serving.buckets import pad
from aif_jax.types import Behaviours, Params, UserFeatures

BY_LOGIT, BY_ROW_BID, BY_GIVEN_BID = 0, 1, 2


class Part(NamedTuple):
    """The best of one batch of candidates, on the host."""

    scores: np.ndarray  # float32 [min(max_k, bucket)], best first, -inf behind the last
    logits: np.ndarray  # float32 [min(max_k, bucket)]
    positions: np.ndarray  # int32 [min(max_k, bucket)]


class Programs:
    """Compiled functions, shared by all versions of a model whose shapes are the same.

    Args:
      model: pure functions.
      max_k: best candidates that come back.
      bid: name of the side value that holds an index row's bid.
    """

    def __init__(self, model: PreRanker, *, max_k: int, bid: str):
        self.model = model
        self.max_k = max_k
        self.bid = bid
        self.compiles: Counter[str] = Counter()
        self.transfers: Counter[str] = Counter()
        self.warm_seconds = 0.0  # of the slowest scoring function, once warm
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._constants: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def user(self, params: Params, features: UserFeatures) -> Callable[..., Any]:
        """The compiled user function for features of these shapes: (params, packed features) -> state."""
        layout = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), features)
        packed = jax.ShapeDtypeStruct((sum(leaf.size for leaf in jax.tree.leaves(layout)),), np.int32)

        def user(params, packed):
            return self.model.user(params, unpack_words(packed, layout))

        return self._get("user", (params, packed), lambda: user, of=layout)

    def score(self, params: Params, states: tuple[Any, ...], index: Any, bucket: int) -> Callable[..., Any]:
        """The compiled interaction for `len(states)` requests of one bucket, with gather and top-k:
        (params, states, table, rows [b, bucket], bids [b, bucket], order [b]) -> (int32 [b, 3, k], logits [b, bucket]).

        Args:
          params: of the version.
          states: of the requests.
          index: whose table is read; only its `shapes` and `decode` are looked at.
          bucket: candidates of each request.
          compile: False raises RuntimeError in place of compiling; requests pass False.
        """
        count = len(states)
        shapes = jax.ShapeDtypeStruct((count, bucket), np.int32), jax.ShapeDtypeStruct((count, bucket), np.float32)
        arguments = (params, states, index.shapes, *shapes, jax.ShapeDtypeStruct((count,), np.int32))
        return self._get("score", arguments, lambda: self._score_fn(index.decode, bucket))

    def upload_features(self, features: UserFeatures) -> jax.Array:
        """The checked features of one user on the device, as one array: a transfer for each leaf would take longer."""
        return jax.device_put(self._count_up(pack_words(features)))

    def upload_rows(self, rows: list[np.ndarray], bids: list[np.ndarray | None], orders: list[str], bucket: int) -> Any:
        """Rows [b, bucket], bids [b, bucket] and order [b] of b requests on the device.

        Bids and orders go up only where requests bring bids or differ in order; otherwise device constants stand in.
        """
        modes = [
            BY_LOGIT if order == "logit" else BY_ROW_BID if given is None else BY_GIVEN_BID
            for order, given in zip(orders, bids, strict=True)
        ]
        padded = [pad(r.astype(np.int32, copy=False), bucket, -1) for r in rows]
        if BY_GIVEN_BID not in modes and len(set(modes)) == 1:  # nearly every request: one array goes up, as it is
            sent = padded[0][None] if len(padded) == 1 else np.stack(padded)
            on_device, constant = jax.device_put(self._count_up(sent)), self._constant((len(rows),), modes[0])
            return on_device, self._constant((len(rows), bucket), 0.0), constant
        more: dict[str, np.ndarray] = {"rows": np.stack(padded)}
        if BY_GIVEN_BID in modes:
            empty = np.zeros(0, np.float32)
            more["bids"] = np.stack([pad(empty if given is None else given, bucket, 0.0) for given in bids])
        if len(set(modes)) > 1:
            more["orders"] = np.asarray(modes, np.int32)
        put = jax.device_put(self._count_up(more))
        return (
            put["rows"],
            put["bids"] if "bids" in more else self._constant((len(rows), bucket), 0.0),
            put["orders"] if "orders" in more else self._constant((len(rows),), modes[0]),
        )

    def download(self, value: jax.Array) -> np.ndarray:
        """An array on the host."""
        self.transfers["device_to_host"] += 1
        self.transfers["device_to_host_bytes"] += value.nbytes
        return jax.device_get(value)

    @staticmethod
    def unpack(packed: np.ndarray) -> Part:
        """int32 [3, k] -> the scores, logits and positions that it packs into one transfer."""
        return Part(packed[0].view(np.float32), packed[1].view(np.float32), packed[2])

    def _score_fn(self, decode: Callable[..., Any], bucket: int) -> Callable[..., Any]:
        model, bid, kept = self.model, self.bid, min(self.max_k, bucket)

        def one(params, state, table, rows, bids, order):
            items = decode(table, rows)
            logits = model.interaction(params, state, items)
            logits = jnp.where((rows >= 0) & ~jnp.isnan(logits), logits, -jnp.inf)
            own = side(items).get(bid, bids)
            price = jnp.where(order == BY_ROW_BID, jnp.asarray(own), bids)
            value = jnp.where(order == BY_LOGIT, logits, jax.nn.sigmoid(logits) * price)
            value = jnp.where((logits > -jnp.inf) & ~jnp.isnan(value), value, -jnp.inf)
            best, positions = jax.lax.top_k(value, kept)
            as_bits = [jax.lax.bitcast_convert_type(part, jnp.int32) for part in (best, logits[positions])]
            return jnp.stack([*as_bits, positions]), logits

        def many(params, states, table, rows, bids, order):
            if len(states) == 1:
                packed, logits = one(params, states[0], table, rows[0], bids[0], order[0])
                return packed[None], logits[None]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
            return jax.vmap(one, (None, 0, None, 0, 0, 0))(params, stacked, table, rows, bids, order)

        return many

    def _get(self, kind: str, arguments: Any, make: Callable[[], Callable[..., Any]], *, of: Any = None) -> Any:
        leaves, tree = jax.tree.flatten((arguments, of))
        key = (kind, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = jax.jit(make()).lower(*arguments).compile()
                self.compiles[kind] += 1
        return self._compiled[key]

    def _constant(self, shape: tuple[int, ...], value: float | int) -> jax.Array:
        """Device arrays that most requests share, so that nothing goes up for them."""
        key = (shape, value, type(value))
        if key not in self._constants:
            self._constants[key] = jax.device_put(np.full(shape, value, np.int32 if isinstance(value, int) else np.float32))
        return self._constants[key]

    def _count_up(self, tree: Any) -> Any:
        leaves = jax.tree.leaves(tree)
        self.transfers["host_to_device"] += len(leaves)
        self.transfers["host_to_device_bytes"] += sum(leaf.nbytes for leaf in leaves)
        return tree


def pack_words(tree: Any) -> np.ndarray:
    """All leaves of a tree of 32-bit and boolean NumPy arrays as one int32 array, a word for each value."""
    words = [leaf.astype(np.int32) if leaf.dtype == np.bool_ else leaf.view(np.int32) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([word.ravel() for word in words])


def unpack_words(words: jax.Array, layout: Any) -> Any:
    """The tree that `pack_words` packed, inside jit; `layout` has its shapes and dtypes."""
    leaves, tree = jax.tree.flatten(layout)
    unpacked, start = [], 0
    for leaf in leaves:
        part = words[start : start + leaf.size].reshape(leaf.shape)
        boolean = leaf.dtype == np.bool_
        unpacked.append(part != 0 if boolean else jax.lax.bitcast_convert_type(part, leaf.dtype))
        start += leaf.size
    return jax.tree.unflatten(tree, unpacked)


def side(rows: Any) -> dict[str, jax.Array]:
    """The side values of rows of any architecture."""
    return rows.side if hasattr(rows, "side") else rows.row.side


def prepare_features(config: Config, features: UserFeatures) -> UserFeatures:
    """Features of one user as NumPy arrays of the one layout that is compiled, checked against the schema.

    Signatures are dropped where the model reads none, so that features with and without them meet the same function.
    """
    check_user_features(config.schema, features, batched=False)

    def plain(behaviours: Behaviours, signature: Any) -> Behaviours:
        return Behaviours(
            ids={field: np.asarray(behaviours.ids[field]) for field in config.schema.behaviour_fields},
            action=np.asarray(behaviours.action),
            age=np.asarray(behaviours.age),
            mask=np.asarray(behaviours.mask),
            signature=None if signature is None else np.asarray(signature),
        )

    signature = features.long.signature if config.uses_signatures else None
    if config.uses_signatures:
        got = None if signature is None else np.shape(signature)[-1]
        if got != config.signature_words:
            raise ValueError(f"UserFeatures.long.signature: expected {config.signature_words} words, got {got}")
    return UserFeatures(
        ids={a.name: np.asarray(features.ids[a.name]) for a in config.schema.user_attributes},
        floats=np.asarray(features.floats),
        short=plain(features.short, None),
        long=plain(features.long, signature),
    )


def empty_features(config: Config, *, short: int | None = None, long: int | None = None) -> UserFeatures:
    """An unknown user: every id 0, floats 0, histories empty.

    Args:
      config: of the model.
      short: S; the config's where None.
      long: L; the config's where None.
    """

    def history(length: int) -> Behaviours:
        zeros = np.zeros(length, np.int32)
        return Behaviours(
            ids={field: zeros for field in config.schema.behaviour_fields},
            action=zeros,
            age=np.zeros(length, np.float32),
            mask=np.zeros(length, bool),
            signature=np.zeros((length, config.signature_words), np.uint32) if config.uses_signatures else None,
        )

    schema = config.schema
    return UserFeatures(
        ids={a.name: np.zeros(() if a.length == 1 else (a.length,), np.int32) for a in schema.user_attributes},
        floats=np.zeros(schema.user_floats, np.float32),
        short=history(short or config.short_length),
        long=history(long or config.long_length),
    )


def best_of(parts: list[Part], offsets: list[int], k: int) -> Part:
    """The best k of several batches of candidates; positions count from the first batch's first candidate.

    Args:
      parts: of each batch.
      offsets: candidates before each batch.
      k: how many to keep; missing ones have score -inf and position 0.
    """
    if len(parts) == 1:
        scores, logits, positions = (field[:k] for field in parts[0])
    else:
        scores = np.concatenate([part.scores for part in parts] or [np.zeros(0, np.float32)])
        logits = np.concatenate([part.logits for part in parts] or [np.zeros(0, np.float32)])
        shifted = [part.positions + at for part, at in zip(parts, offsets, strict=True)]
        positions = np.concatenate(shifted or [np.zeros(0, np.int32)])
        best = np.argsort(-scores, kind="stable")[:k]
        scores, logits, positions = scores[best], logits[best], positions[best]
    if len(scores) < k:
        return Part(pad(scores, k, -np.inf), pad(logits, k, -np.inf), pad(positions, k, 0))
    return Part(scores, logits, positions)
