"""Touched rows: a training step reads and writes only the embedding rows that its batch names.

A dense optimizer walks over the whole table at every step, whatever the batch. Here the rows of the batch are gathered out of
the table and out of the optimizer's state, any Optax transformation updates them as if they were the table, and they are put
back in place:

    table [N, D], state [N, ...]  --take the U rows of the batch-->  [U, D], [U, ...]  --update-->  put back

A gradient row that no id of the batch names is zero. So an optimizer for which a zero gradient changes nothing (SGD, Adagrad,
row-wise Adagrad) gives what its dense form gives. Adam becomes lazy Adam: moments and weights of a row move only in steps that
touch it, the bias correction counts all steps, and decoupled weight decay reaches touched rows only; rows that every step
touches get exactly dense Adam. Gradients of several occurrences are summed before the update, and norms for clipping are those
of the whole gradient. The optimizer must treat rows alike and apart: one whose state or step mixes rows (Adafactor's columns,
LARS) is refused or gives another result.

The model does not know: `Rows` stands in the place of the table, and `layers.embedding_lookup` reads through it with the ids
as they are. Distinct ids are found without sorting, by a slot for each row of the table (int32, 4 bytes): every occurrence
writes its place to the slot of its id, and whichever stays represents the id. Then the slot holds the id's number, its row
among those that were taken: a few thousand rows side by side stay in the cache through forward and backward pass, whatever the
size of the table.

Sizes are static in a compiled function, the number of distinct rows is not. So they are counted first (`find`), and the step is
compiled for a few sizes, each half of the one before; the smallest that holds the rows runs.

Source: ours; lazy Adam as in TensorFlow Addons and torch.optim.SparseAdam; row-wise Adagrad as in DLRM (arXiv 1906.00091).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from aif_jax.data.schema import Schema
from aif_jax.types import Array, ItemFeatures, Params, UserFeatures, record

MIN_ROWS = 20_000
"""Rows from which touching only a batch's rows is cheaper: `python -m experiments.train_throughput --threshold`."""
SMALLEST = 1024
"""Rows below which an update's cost is its overhead; no smaller size is compiled."""

Slots = dict[str, jax.Array]
"""Scratch by table: int32 [N]. What stands in it before a step does not matter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Which embedding tables are updated by touched rows.

    Attributes:
      min_rows: tables with at least so many rows.
      tables: exactly these instead, by name.

    Raises:
      ValueError: min_rows below 1.
    """

    min_rows: int = MIN_ROWS
    tables: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.min_rows < 1:
            raise ValueError(f"SparseConfig.min_rows: expected at least 1, got {self.min_rows}")


@record
class Rows:
    """Stands in the place of an embedding table: the rows that a batch names, read by the same ids."""

    table: Array  # float32 [size, D]
    slot: Array  # int32 [N] position in `table` of every id of the batch; undefined for others

    def read(self, ids: jax.Array) -> jax.Array:
        """Rows [..., D] of ids [...] that stand in the batch; ids out of range read row 0."""
        known = (ids >= 0) & (ids < self.slot.shape[0])
        at = jnp.asarray(self.slot).at[jnp.where(known, ids, 0)].get(mode="promise_in_bounds")
        return jnp.asarray(self.table).at[at].get(mode="promise_in_bounds")


@record
class Touched:
    """The distinct ids of a batch for one table, U of them, in no particular order."""

    ids: jax.Array  # int32 [n] every occurrence
    own: jax.Array  # bool [n] true for one occurrence of each id
    at: jax.Array  # int32 [n] number of the occurrence's id, in [0, U)
    count: jax.Array  # int32 [] U


def tables(schema: Schema, sparse: SparseConfig | None) -> tuple[str, ...]:
    """Names of the tables that are updated by touched rows.

    Raises:
      ValueError: a name that is no table of the schema.

    Example:
      >>> import aif_jax as aif
      >>> tables(aif.tiny().schema, SparseConfig(min_rows=50))
      ('item',)
    """
    if sparse is None:
        return ()
    sizes = schema.table_sizes
    if sparse.tables is None:
        return tuple(name for name, size in sizes.items() if size >= sparse.min_rows)
    if unknown := set(sparse.tables) - sizes.keys():
        raise ValueError(f"SparseConfig.tables: expected names among {sorted(sizes)}, got {sorted(unknown)}")
    return sparse.tables


def ids_of(schema: Schema, table: str, users: UserFeatures, items: ItemFeatures) -> jax.Array:
    """Every id of a batch that reads a table, int32 [n] in [0, N), row 0 first: padding and unknown ids read it."""
    size = schema.table_sizes[table]
    found = [items.ids[a.name] for a in schema.item_attributes if a.table_name == table]
    found += [users.ids[a.name] for a in schema.user_attributes if a.table_name == table]
    if table in schema.behaviour_fields:
        found += [users.short.ids[table], users.long.ids[table]]
    flat = jnp.concatenate([jnp.zeros(1, jnp.int32), *(jnp.ravel(jnp.asarray(ids)) for ids in found)])
    return jnp.where((flat >= 0) & (flat < size), flat, 0)


def mark(slot: jax.Array, ids: jax.Array) -> jax.Array:
    """The scratch with a place in `ids` [n] for each of the ids; several occurrences agree on one place."""
    return slot.at[ids].set(jnp.arange(ids.shape[0], dtype=jnp.int32), mode="promise_in_bounds")


def distinct(slot: jax.Array, ids: jax.Array) -> tuple[jax.Array, Touched]:
    """Numbers the distinct ids among `ids` [n]; also gives the scratch back.

    Example:
      >>> _, touched = distinct(jnp.zeros(10, jnp.int32), jnp.array([0, 7, 3, 7]))
      >>> int(touched.count), touched.at.tolist()
      (3, [0, 2, 1, 2])
    """
    slot = mark(slot, ids)
    representative = slot.at[ids].get(mode="promise_in_bounds")
    own = representative == jnp.arange(ids.shape[0], dtype=jnp.int32)
    number = _cumulative(own) - 1
    return slot, Touched(ids=ids, own=own, at=number.at[representative].get(mode="promise_in_bounds"), count=number[-1] + 1)


def find(slots: Slots, schema: Schema, users: UserFeatures, items: ItemFeatures) -> tuple[Slots, dict[str, Touched]]:
    """The distinct ids of a batch for the tables of these slots, and the slots with the number of each of them."""
    made: Slots = {}
    touched: dict[str, Touched] = {}
    for name, slot in slots.items():
        slot, found = distinct(slot, ids_of(schema, name, users, items))
        made[name], touched[name] = slot.at[found.ids].set(found.at, mode="promise_in_bounds"), found
    return made, touched


def size_for(count: int, bound: int) -> int:
    """The compiled size for so many distinct rows: `bound`, halved as long as they fit and it does not fall below `SMALLEST`.

    Example:
      >>> size_for(8000, 300_000), size_for(1, 300_000), size_for(5, 100)
      (9375, 1172, 100)
    """
    level = 0
    while bound // 2 ** (level + 1) >= SMALLEST and count <= -(-bound // 2 ** (level + 1)):
        level += 1
    return -(-bound // 2**level)


def init_slots(params: Params, names: Iterable[str]) -> Slots:
    """Scratch for the tables of these names."""
    return {name: jnp.zeros(params["embedding"][name].shape[0], jnp.int32) for name in names}


def split(trained: Params, names: Iterable[str]) -> tuple[Params, dict[str, jax.Array]]:
    """Parameters without the tables of these names, and those tables."""
    embedding = dict(trained["embedding"])
    taken = {name: embedding.pop(name) for name in names}
    return {**trained, "embedding": embedding}, taken


def join(dense: Params, taken: Mapping[str, Any]) -> Params:
    """The inverse of `split`; also puts `Rows` in the place of tables."""
    return {**dense, "embedding": {**dense["embedding"], **taken}}


def row_ids(touched: Touched, size: int, *, none: int) -> jax.Array:
    """The distinct ids in the order of their numbers, int32 [size]; `none` in places that are left."""
    place = jnp.where(touched.own, touched.at, size)
    return jnp.full(size, none, jnp.int32).at[place].set(touched.ids, mode="drop")


def take(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows [size, ...] of a table by `row_ids`; places that are left hold some row."""
    return table.at[ids].get(mode="clip")


def apply(
    update: Callable[[Params, Params, Any], tuple[Params, Any, Any]],
    trained: Params,
    opt_state: Any,
    gradient: Params,
    ids: Mapping[str, jax.Array],
    row_gradients: Mapping[str, jax.Array],
) -> tuple[Params, Any, Any]:
    """Runs an update on the dense parameters and on the touched rows of the tables, and puts both back.

    Args:
      update: (gradient, params, opt_state) -> (params, opt_state, anything), for trees of any number of rows.
      trained, opt_state: whole.
      gradient: of the dense parameters, see `split`.
      ids: by table, `row_ids` [size].
      row_gradients: by table, [size, D], in the order of `ids`; zeros in places that are left.

    Returns:
      What `update` gave, with whole tables.

    Raises:
      ValueError: the optimizer keeps something of a table that is not one row for each row of the table.
    """
    rows = {name: trained["embedding"][name].shape[0] for name in ids}
    dense, whole = split(trained, ids)
    taken = {name: take(table, ids[name]) for name, table in whole.items()}
    local_state = _map_rows(lambda leaf, name: take(leaf, ids[name]), opt_state, rows)
    made, state, rest = update(join(gradient, row_gradients), join(dense, taken), local_state)
    dense, taken = split(made, ids)
    placed = {name: _put(table, ids[name], taken[name]) for name, table in whole.items()}
    back = _map_rows(lambda leaf, name, new: _put(leaf, ids[name], new), opt_state, rows, state)
    return join(dense, placed), back, rest


def table_of(path: tuple, names: Iterable[str]) -> str | None:
    """Which table a leaf of a state belongs to: optimizers mirror the parameters, so its path ends like the parameter's."""
    keys = [key.key for key in path[-2:] if isinstance(key, jax.tree_util.DictKey)]
    return keys[1] if len(keys) == 2 and keys[0] == "embedding" and keys[1] in names else None


def rowwise_adagrad(
    learning_rate: float | optax.Schedule, *, initial_accumulator: float = 0.1, eps: float = 1e-7
) -> optax.GradientTransformation:
    """Adagrad with one accumulator for each row of a matrix: 4 bytes a row in place of 4 D.

        a <- a + mean_d g_d^2,   w <- w - learning_rate g / sqrt(a + eps)

    The row is the last axis; a vector or scalar counts as one row.

    Args:
      learning_rate: a number or a schedule.
      initial_accumulator: a before the first step.
      eps: under the root.

    Returns:
      An Optax transformation, dense or by touched rows.

    Example:
      >>> optimizer = rowwise_adagrad(1.0, initial_accumulator=0.0)
      >>> table = jnp.zeros((2, 2))
      >>> updates, _ = optimizer.update(jnp.array([[2.0, 2.0], [0.0, 0.0]]), optimizer.init(table))
      >>> updates.tolist()
      [[-1.0, -1.0], [-0.0, -0.0]]
    """

    def init(params: Any) -> Any:
        return jax.tree.map(lambda x: jnp.full((*x.shape[:-1], 1) if x.ndim else (), initial_accumulator, x.dtype), params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        state = jax.tree.map(lambda a, g: a + (jnp.mean(g * g, -1, keepdims=True) if g.ndim else g * g), state, updates)
        # rows never touched, and without an accumulator to start from, divide 0 by 0 + eps
        return jax.tree.map(lambda a, g: g * jax.lax.rsqrt(a + eps), state, updates), state

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate))


def _put(table: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
    return table.at[ids].set(rows, mode="drop")


def _map_rows(f: Callable, opt_state: Any, rows: Mapping[str, int], *rest: Any) -> Any:
    """Maps f(leaf, table, *others) over what the optimizer keeps of a table; other leaves come from the last tree given."""

    def one(path: tuple, leaf: Any, *others: Any) -> Any:
        name = table_of(path, rows)
        if name is None:
            return others[-1] if others else leaf
        if not leaf.ndim or leaf.shape[0] != rows[name]:
            raise ValueError(
                f"optimizer state {jax.tree_util.keystr(path)}: expected one row for each of the {rows[name]} rows of table "
                f"{name!r}, got shape {leaf.shape}; such an optimizer needs sparse=None"
            )
        return f(leaf, name, *others)

    return jax.tree_util.tree_map_with_path(one, opt_state, *rest)


def _cumulative(own: jax.Array) -> jax.Array:
    """Running count of true entries, int32 [n]; in two levels, because XLA's own takes n log n on a CPU."""
    width = 512
    count = own.shape[0]
    blocks = jnp.pad(own.astype(jnp.int32), (0, -count % width)).reshape(-1, width)
    within = jnp.cumsum(blocks, 1)
    before = jnp.cumsum(within[:, -1]) - within[:, -1]
    return (within + before[:, None]).ravel()[:count]
