"""SIM with pre-caching: attention over the user's behaviours in the candidate's category."""

import math

import jax
import jax.numpy as jnp

from aif_jax import layers
from aif_jax.blocks.block import Block, ItemView, UserView, block, expect
from aif_jax.config import Config
from aif_jax.heads import BlockKernels, HeadInputs
from aif_jax.types import Array, ItemRow, Params, UserState, record

FLAGS = 3  # slot features next to the attention: missing, log1p(count), log1p(age in days)


@record
class SimCache:
    """The user's last P behaviours for each of Q values of an item field."""

    value: Array  # int32 [Q] the field's value (category id), -1 where the slot is empty
    entries: Array  # float32 [Q, P, D] behaviour embeddings
    mask: Array  # bool [Q, P]
    count: Array  # int32 [Q] behaviours of this value in the whole long history, not only the P kept
    age: Array  # float32 [Q] seconds since the last of them


@block
class Sim(Block):
    """SIM with pre-caching: attention over the user's behaviours that share a field with the candidate, such as its category.

    Hard-search SIM reads the behaviours of the candidate's value, which is not known before the candidates are. The user's
    values are: the user side caches, for the Q values with the most behaviours, the last P. In real time the candidate picks
    its slot:

        o = softmax(q E_slot^T / sqrt D) E_slot    q: item query [D], E_slot: cached behaviour embeddings [P, D]

    The key map is part of the item's query, the value map part of the head's first layer: both are linear, so this loses
    nothing. The head also gets flags: missing, log1p(count), log1p(age in days).

    - Paper: SIM (arXiv 2006.05639), pre-caching as in AIF (2511.12934); the rule for choosing slots is ours.
    - Cost: user side a sort of L; real time C x P x D, independent of L; a state holds Q x P x D numbers.
    - When: to reproduce the paper (`presets.paper`); next to matching statistics it gained nothing.

    Attributes:
      field: one of the schema's behaviour fields, such as "category".
      slots: Q, cached values: the most frequent ones of the long history.
      length: P, behaviours cached for each value.
    """

    field: str = "category"
    slots: int = 16
    length: int = 8

    def __post_init__(self):
        expect(self.slots >= 1, self, "slots", "at least 1", self.slots)
        expect(self.length >= 1, self, "length", "at least 1", self.length)

    @property
    def name(self) -> str:
        return f"sim_{self.field}"

    def check(self, config: Config) -> None:
        fields = config.schema.behaviour_fields
        expect(self.field in fields, self, "field", f"one of schema.behaviour_fields {fields}", self.field)

    def widths(self, config: Config) -> dict[str, int]:
        return {"read": config.width, "flags": FLAGS}

    def init(self, key: jax.Array, config: Config) -> Params:
        return {"query": layers.dense_init(key, config.width, config.width)}

    def item(self, params: Params, item: ItemView) -> dict[str, jax.Array]:
        return {"query": layers.dense(params["query"], item.vector), "value": jnp.asarray(item.features.ids[self.field])}

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: BlockKernels) -> HeadInputs:
        slots, row = state.blocks[self.name], rows.blocks[self.name]
        value, flags = jnp.asarray(row["value"]), kernels["flags"]
        return HeadInputs(
            once=flags[0],
            pairs=((own_slot(slots, value).astype(flags.dtype), slot_flags(slots).astype(flags.dtype) @ flags),),
            rest=read(slots, jnp.asarray(row["query"]), value, kernels["read"]),
        )

    def user(self, params: Params, user: UserView) -> SimCache:
        schema, long = user.config.schema, user.long
        value = layers.behaviour_fields(user.params, schema, long.item)[self.field]
        age, mask = jnp.asarray(long.age), jnp.asarray(long.mask)
        sizes = {"slots": self.slots, "length": self.length, "size": schema.table_sizes[self.field]}
        return fill_cache(value, user.embedded, age, mask, **sizes)


def fill_cache(
    value: jax.Array, embedded: jax.Array, age: jax.Array, mask: jax.Array, *, slots: int, length: int, size: int | None = None
) -> SimCache:
    """Cache the last `length` behaviours of each of the `slots` most frequent values int32 [L], the most recent first on ties.

    Values up to 0 have no slot. Where `size` bounds the values, value and place sort as one number, four times as fast as two.
    """
    group, order = sort_by_value(value, mask & (value > 0), size=size)
    first, count = _most_frequent(group, order, slots)
    filled = count > 0
    own = jnp.where(filled, value[first], -1)
    start, within = (group[None, :] < own[:, None]).sum(1, dtype=jnp.int32), jnp.arange(length, dtype=jnp.int32)
    kept = within[None, :] < count[:, None]
    events = order[jnp.minimum(start[:, None] + within[None, :], value.shape[0] - 1)]
    entries = jnp.where(kept[..., None], embedded[events], jnp.zeros((), embedded.dtype))
    return SimCache(value=own, entries=entries, mask=kept, count=count, age=jnp.where(filled, age[first], 0.0))


def read(cache: SimCache, query: jax.Array, value: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return attention of every candidate over its own slot, times the head's kernel [D, H] -> [C, H]; else zeros.

    With few candidates each gathers its own slot. With many, all Q * P entries are scored in one product and multiplied by the
    kernel once; a candidate sums its P projected entries, so that no [C, P, D] array is made.
    """
    slots, length, width = cache.entries.shape
    own = own_slot(cache, value)
    slot = jnp.argmax(own, 1).astype(jnp.int32)
    kept = _take(cache.mask, slot) & own.any(1, keepdims=True)
    if value.shape[0] <= slots:
        entries = _take(cache.entries, slot)
        scores = jnp.einsum("cd,cpd->cp", query, entries) / math.sqrt(width)
        return jnp.einsum("cp,cpd->cd", layers.masked_softmax(scores, kept), entries) @ kernel
    entries = jnp.asarray(cache.entries).reshape(slots * length, width)
    scores = (query @ entries.T / math.sqrt(width)).reshape(-1, slots, length)
    scores = jnp.take_along_axis(scores, slot[:, None, None], 1, mode="promise_in_bounds")[:, 0]
    weights, projected = layers.masked_softmax(scores, kept), (entries @ kernel).reshape(slots, length, -1)
    return sum((weights[:, p, None] * _take(projected[:, p], slot) for p in range(length)), 0.0)  # type: ignore[return-value]


def own_slot(cache: SimCache, value: jax.Array) -> jax.Array:
    """Return which slot is the candidate's: bool [C, Q], no more than one of a row; an empty slot (value -1) is nobody's.

    Times `slot_flags`, plus 1 for "missing", it gives the candidate's slot features.
    """
    return (value[:, None] == jnp.asarray(cache.value)[None, :]) & (jnp.asarray(cache.count) > 0)[None, :]


def slot_flags(cache: SimCache) -> jax.Array:
    """Return features of every slot: [Q, FLAGS] = -1, log1p(count), log1p(age in days)."""
    age = jnp.asarray(cache.age)
    count, days = jnp.asarray(cache.count).astype(jnp.float32), jnp.maximum(age, 0.0) / 86400.0
    return jnp.stack([-jnp.ones_like(age), jnp.log1p(count), jnp.log1p(days)], -1)


def _take(table: Array, slot: jax.Array) -> jax.Array:
    return jnp.asarray(table).at[slot].get(mode="promise_in_bounds")


def sort_by_value(value: jax.Array, mask: jax.Array, *, size: int | None) -> tuple[jax.Array, jax.Array]:
    """Return values in ascending order, equal ones by place, and the places of them; int32 [L] each, masked ones last."""
    total, last = value.shape[0], jnp.iinfo(jnp.int32).max
    place = jnp.arange(total, dtype=jnp.int32)
    bits = max(1, (total - 1).bit_length()) if isinstance(total, int) else 32  # under jax.export the length is a symbol
    if size is None or (size + 1) << bits > 1 << 32:
        group, order = jax.lax.sort((jnp.where(mask, value, last), place), num_keys=2)
        return group, order
    key = jnp.where(mask & (value < size), value, size).astype(jnp.uint32) << bits | place.astype(jnp.uint32)
    key = jax.lax.sort(key, is_stable=False)
    group = (key >> bits).astype(jnp.int32)
    return jnp.where(group < size, group, last), (key & ((1 << bits) - 1)).astype(jnp.int32)


def _most_frequent(group: jax.Array, order: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """Place of the last behaviour of each of the most frequent values, ties by that place, and their counts; [Q] each.

    Takes one maximum after another: Q passes over L are cheaper than sorting it.
    """
    total = group.shape[0]
    place, starts = jnp.arange(total, dtype=jnp.int32), jnp.concatenate([jnp.ones(1, bool), group[1:] != group[:-1]])
    nexts = jnp.concatenate([jnp.where(starts, place, total)[1:], jnp.full(1, total, jnp.int32)])
    runs = jnp.where(starts & (group < jnp.iinfo(jnp.int32).max), jax.lax.cummin(nexts, reverse=True) - place, 0)

    def following(last: tuple[jax.Array, jax.Array], _: None):
        count, first = last
        left = (runs < count) | (runs == count) & (order > first)
        count = jnp.where(left, runs, 0).max()
        first = jnp.where(left & (runs == count) & (count > 0), order, total - 1).min()
        return (count, first), (first, count)

    return jax.lax.scan(following, (jnp.int32(total + 1), jnp.int32(0)), None, length=slots)[1]
