"""Matching statistics: how often, how recently and by which actions the user met each of the candidate's field values."""

from typing import Any

import jax
import jax.numpy as jnp

from aif_jax import layers
from aif_jax.blocks.block import Block, ItemView, UserView, block, expect
from aif_jax.blocks.sim import sort_by_value
from aif_jax.config import Config
from aif_jax.heads import BlockKernels, HeadInputs
from aif_jax.types import Array, ItemRow, Params, UserState, record

STATISTICS = 6  # of a value next to the counts by action
DAY = 86400.0
FEW = 64  # candidates up to which comparing each with the whole history costs less than sorting the history


@record
class Met:
    """Statistics of a field's values in a history: of all V values if these are at most L, else of the history's."""

    value: Array | None = None  # None for all V values; int32 [L] ascending, the largest int32 for padding
    statistics: Array  # float32 [V, STATISTICS + actions], 0 for one not met; [L, ...]: the first place of a value has them


@record
class Unsorted:
    """All fields for few candidates: each is compared with every behaviour."""

    value: Array  # int32 [F, L], 0 for padding
    counted: Array  # float32 [L, 2 + actions] added to the counts by a behaviour: 1, whether it is recent, its action
    days: Array  # float32 [L] since the behaviour
    events: Array  # float32 []


@block
class MatchingStatistics(Block):
    """Exact statistics of the user's earlier meetings with each of the candidate's field values.

    For the value v of each field, over the whole long history with n events, n_v of them with that value, the last one at place
    p (0 is the most recent event) and d days ago:

        met = [n_v > 0],  log(1 + n_v),  n_v / n,  1 / (1 + p),  log(1 + d),  log(1 + recent n_v),  log(1 + n_v by action)

    All are 0 for a value that the user has not met, and for row 0, "unknown". They have no parameters. The user half has them
    for every value of a field with few values; for the others it sorts the history by value and sums each run of equal ones,
    and in real time a candidate finds its run by binary search. The head's kernel is applied once a value, not a candidate.

    - Paper: counted features of a user and an item's fields are a classic of click prediction (He et al. 2014, "Practical
      Lessons from Predicting Clicks on Ads at Facebook"); AIF's paper does not have this block.
    - Cost: user side a sort of L per field; real time L x H products, C x log2 L comparisons and C sums of H per field, no
      sort and no comparisons where a field has at most L values.
    - When: always; most of the gain if users come back to items or categories.

    Attributes:
      fields: behaviour fields of the schema, such as ("item", "category"); one value of an item each.
      recent_events: how many of the last events count as recent.

    Example:
      >>> MatchingStatistics(("item", "category")).name
      'matching_statistics'
    """

    fields: tuple[str, ...] = ("item", "category")
    recent_events: int = 32

    def __post_init__(self):
        distinct = len(self.fields) > 0 and len(set(self.fields)) == len(self.fields)
        expect(distinct, self, "fields", "at least one field, each once", self.fields)
        expect(self.recent_events >= 1, self, "recent_events", "at least 1", self.recent_events)

    def check(self, config: Config) -> None:
        known = config.schema.behaviour_fields
        unknown = [field for field in self.fields if field not in known]
        expect(not unknown, self, "fields", f"behaviour fields of the schema, {known}", unknown)

    def widths(self, config: Config) -> dict[str, int]:
        return {"statistics": len(self.fields) * (STATISTICS + config.schema.actions)}

    def user(self, params: Params, user: UserView) -> tuple[Met, ...] | Unsorted:
        schema, long = user.config.schema, user.long
        mask, action = jnp.asarray(long.mask), jnp.asarray(long.action)
        fields = layers.behaviour_fields(user.params, schema, long.item)
        value = jnp.stack([jnp.where(mask, fields[name], 0) for name in self.fields]).astype(jnp.int32)
        place = jnp.arange(mask.shape[0], dtype=jnp.int32)
        ones = jnp.stack([mask, mask & (place < self.recent_events)], 1).astype(jnp.float32)
        actions = jax.nn.one_hot(jnp.where(mask, action, -1), schema.actions, dtype=jnp.float32)  # zeros if out of range
        counted, days = jnp.concatenate([ones, actions], 1), jnp.maximum(jnp.asarray(long.age), 0.0) / DAY
        days, events = jnp.where(mask, days, 0.0), mask.sum().astype(jnp.float32)
        if user.candidates is not None and user.candidates <= FEW:
            return Unsorted(value=value, counted=counted, days=days, events=events)
        sizes = [schema.table_sizes[name] for name in self.fields]
        made = [_table if size <= user.config.long_length else _sorted for size in sizes]
        return tuple(made[f](value[f], counted, days, events, size=size) for f, size in enumerate(sizes))

    def item(self, params: Params, item: ItemView) -> jax.Array:
        """Return int32 [F], the item's values."""
        return jnp.stack([jnp.asarray(item.features.ids[name]) for name in self.fields]).astype(jnp.int32)

    def score(self, params: Params, state: UserState, rows: ItemRow, kernels: BlockKernels) -> HeadInputs:
        half, wanted, kernel = state.blocks[self.name], jnp.asarray(rows.blocks[self.name]), kernels["statistics"]
        if isinstance(half, Unsorted):
            return HeadInputs(pairs=((compare(half, wanted).reshape(wanted.shape[0], kernel.shape[0]), kernel),))
        kernels_by_field = jnp.split(kernel, len(self.fields))
        return HeadInputs(rest=sum(look_up(half[f], wanted[:, f], own) for f, own in enumerate(kernels_by_field)))


def look_up(half: Met, wanted: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return statistics of the candidates' values int32 [C], times the kernel [STATISTICS + actions, H] -> [C, H].

    The kernel is applied to the half's rows, or to what is found where candidates are fewer than rows.
    """
    rows = jnp.asarray(half.statistics)
    sizes = rows.shape[0], wanted.shape[0]
    first = not all(isinstance(size, int) for size in sizes) or sizes[0] <= sizes[1]  # under jax.export sizes are symbols
    rows = rows @ kernel if first else rows
    if half.value is None:
        found = rows.at[wanted].get(mode="fill", fill_value=0)
    else:
        value = jnp.asarray(half.value)
        start = _begin(value, wanted)
        met = (value.at[start].get(mode="promise_in_bounds") == wanted) & (wanted > 0)
        found = jnp.where(met[:, None], rows.at[start].get(mode="promise_in_bounds"), 0.0)
    return found if first else found @ kernel


def _begin(value: jax.Array, wanted: jax.Array) -> jax.Array:
    """Return the first place whose value is not smaller, for each of int32 [C], or the last: a binary search in values [L]."""
    length = value.shape[0]
    bits = length.bit_length() if isinstance(length, int) else 31  # under jax.export the length is a symbol
    start = jnp.zeros_like(wanted)  # how many values are known to be smaller
    for bit in reversed(range(bits)):
        further = start + (1 << bit)
        smaller = value.at[jnp.minimum(further, length) - 1].get(mode="promise_in_bounds") < wanted
        start = jnp.where((further <= length) & smaller, further, start)
    return jnp.minimum(start, length - 1)


def compare(history: Unsorted, wanted: jax.Array) -> jax.Array:
    """Return what `look_up` does, by comparing every candidate with every behaviour."""
    value, counted, days = (jnp.asarray(array) for array in (history.value, history.counted, history.days))
    length = value.shape[1]

    def add(_: Any, wanted: jax.Array, chunk: Any, total: Any) -> tuple[Any, None]:
        (value, counted, place), (counts, last) = chunk, total
        equal = (wanted[:, :, None] == value.T[None]) & (wanted > 0)[:, :, None]  # [C, F, chunk]
        last = jnp.minimum(last, jnp.where(equal, place, length - 1).min(-1))
        return (counts + equal.astype(counted.dtype) @ counted, last), None

    places = jnp.arange(length, dtype=jnp.int32)
    none = jnp.zeros((*wanted.shape, counted.shape[1]), counted.dtype), jnp.full_like(wanted, length - 1)
    (counts, last), _ = layers.fold_events(add, None, wanted, (value.T, counted, places), counted[:, 0] > 0, none)
    return jnp.where(counts[..., :1] > 0, _statistics(counts, last, days[last], jnp.asarray(history.events)), 0.0)


def _sorted(value: jax.Array, counted: jax.Array, days: jax.Array, events: jax.Array, *, size: int) -> Met:
    """Return the statistics of values int32 [L], 0 for none; a run of equal values begins at its most recent event."""
    group, order = sort_by_value(value, value > 0, size=size)
    length = group.shape[0]
    place, begins = jnp.arange(length, dtype=jnp.int32), jnp.concatenate([jnp.ones(1, bool), group[1:] != group[:-1]])
    nexts = jnp.concatenate([jnp.where(begins, place, length)[1:], jnp.full(1, length, jnp.int32)])
    end = jax.lax.cummin(nexts, reverse=True)
    before = jnp.concatenate([jnp.zeros((1, counted.shape[1])), jnp.cumsum(counted[order], 0)])
    return Met(statistics=_statistics(before[end] - before[place], order, days[order], events), value=group)


def _table(value: jax.Array, counted: jax.Array, days: jax.Array, events: jax.Array, *, size: int) -> Met:
    """Return the statistics of values int32 [L] below `size`, 0 for none."""
    length, counts = value.shape[0], jnp.zeros((size, counted.shape[1])).at[value].add(counted)
    last = jnp.full(size, length - 1, jnp.int32).at[value].min(jnp.arange(length, dtype=jnp.int32))
    met = (counts[:, :1] > 0) & (jnp.arange(size) > 0)[:, None]
    return Met(statistics=jnp.where(met, _statistics(counts, last, days[last], events), 0.0))


def _statistics(counts: jax.Array, last: jax.Array, days: jax.Array, events: jax.Array) -> jax.Array:
    """Return statistics [..., STATISTICS + actions] from counts [..., 2 + actions] and the last event's place and days."""
    number, recent, by_action = counts[..., 0], counts[..., 1], counts[..., 2:]
    place = last.astype(jnp.float32)
    stacked = (
        jnp.ones_like(number), jnp.log1p(number), number / jnp.maximum(events, 1.0), 1.0 / (1.0 + place), jnp.log1p(days),
        jnp.log1p(recent),
    )  # fmt: skip
    return jnp.concatenate([jnp.stack(stacked, -1), jnp.log1p(by_action)], -1)
