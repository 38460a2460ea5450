"""Optimizers: the default, and row-wise Adagrad for large embedding tables. Any Optax transformation serves as well.

*Sparse updates.* A training step reads and writes only the embedding rows that its batch names. They are gathered out of the
table and the optimizer's state, any Optax transformation updates them as if they were the table, and they are put back:

    table [N, D], state [N, ...]  --take the U rows of the batch-->  [U, D], [U, ...]  --update-->  put back

An optimizer for which a zero gradient changes nothing (SGD, Adagrad, row-wise Adagrad) gives the same result as its dense form.
Adam becomes lazy Adam: moments, weights and decoupled decay of a row move only in steps whose batch names it, the bias
correction counts all steps. Gradients of several occurrences are summed first; norms for clipping are of the whole gradient. An
optimizer whose state or step mixes rows (Adafactor's columns, LARS) is refused or gives another result; `optax.MultiSteps` and
`optax.apply_every`, which move rows in later steps, are refused.

`layers.Rows` replaces the table in the model. Unique ids are found without sorting, by an int32 slot for each row of the table:
every occurrence writes its index to the slot of its id, and the one whose index stays is the id's first. Then the slot holds
the id's number among the rows taken. Sizes are static in a compiled function, so unique ids are counted first, and the step is
compiled for a few sizes, each half of the one before; the smallest that holds the rows runs.

Sources: lazy Adam as in TensorFlow Addons and torch.optim.SparseAdam.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from aif_jax.checks import expect
from aif_jax.config import Config
from aif_jax.layers import behaviour_fields
from aif_jax.schema import Schema
from aif_jax.trees import leaves_by_path
from aif_jax.types import ItemFeatures, Params, UserFeatures, record


def default_optimizer(steps: int, *, learning_rate: float = 1e-2, weight_decay: float = 0.1) -> optax.GradientTransformation:
    """Return AdamW with a warm-up from 0 over 5 % of the steps, a cosine decay, and gradients clipped to norm 1."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, max(1, steps), learning_rate / 100)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=weight_decay))


MIN_ROWS = 20_000
"""Rows from which a sparse update is cheaper than a dense one, on two CPU cores."""
SMALLEST = 1024
"""Rows below which an update's cost is its overhead; no smaller size is compiled."""

Slots = dict[str, jax.Array]
"""Scratch by table: int32 [N]. What it holds before a step does not matter."""


@record
class UniqueIds:
    """The unique ids of a batch for one table, U of them, in no particular order."""

    ids: jax.Array  # int32 [n] every occurrence
    first: jax.Array  # bool [n] true for one occurrence of each id
    number: jax.Array  # int32 [n] number of the occurrence's id, in [0, U)
    count: jax.Array  # int32 [] U


def sparse_tables(schema: Schema, sparse: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return names of the tables that get sparse updates, for None those of `MIN_ROWS` or more; ValueError for no table."""
    sizes = schema.table_sizes
    if sparse is None:
        return tuple(name for name, size in sizes.items() if size >= MIN_ROWS)
    unknown = set(sparse) - sizes.keys()
    expect(not unknown, "sparse", f"None or a tuple of names among {sorted(sizes)}", sorted(unknown))
    return sparse


def ids_of(table: str, params: Params, users: UserFeatures, items: ItemFeatures, *, config: Config) -> jax.Array:
    """Return every id of a batch [B], [B, C] that reads a table, int32 [n] in [0, N), row 0 first: padding reads it."""
    schema = config.schema
    size, ids = schema.table_sizes[table], [features.ids[table] for features in (items, users) if table in features.ids]
    if table in schema.behaviour_fields:
        ids.append(behaviour_fields(params, schema, users.history.item[:, : config.history_length])[table])
    flat = jnp.concatenate([jnp.zeros(1, jnp.int32), *(jnp.ravel(jnp.asarray(array)) for array in ids)])
    return jnp.where((flat >= 0) & (flat < size), flat, 0)


def number_ids(slot: jax.Array, ids: jax.Array) -> tuple[jax.Array, UniqueIds]:
    """Give numbers to the unique ids among `ids` [n]; the slot of each, int32 [N], then holds its number."""
    places = jnp.arange(ids.shape[0], dtype=jnp.int32)
    slot = slot.at[ids].set(places, mode="promise_in_bounds")  # several occurrences agree on one place
    chosen = slot.at[ids].get(mode="promise_in_bounds")
    first = chosen == places
    running = jnp.cumsum(first, dtype=jnp.int32)
    number = (running - 1).at[chosen].get(mode="promise_in_bounds")
    slot = slot.at[ids].set(number, mode="promise_in_bounds")
    return slot, UniqueIds(ids=ids, first=first, number=number, count=running[-1])


def unique_ids(
    slots: Slots, params: Params, users: UserFeatures, items: ItemFeatures, *, config: Config
) -> tuple[Slots, dict[str, UniqueIds]]:
    """Return the slots with the number of each id, and the unique ids of a batch by table."""
    numbered = {name: number_ids(slot, ids_of(name, params, users, items, config=config)) for name, slot in slots.items()}
    return {name: slot for name, (slot, _) in numbered.items()}, {name: unique for name, (_, unique) in numbered.items()}


def size_for(count: int, bound: int) -> int:
    """Return the compiled size for so many unique ids: `bound`, halved while they fit and it does not fall below `SMALLEST`."""
    level = 0
    while bound // 2 ** (level + 1) >= SMALLEST and count <= -(-bound // 2 ** (level + 1)):
        level += 1
    return -(-bound // 2**level)


def split_tables(trained: Params, names: Iterable[str]) -> tuple[Params, dict[str, jax.Array]]:
    """Return parameters without the tables of these names, and those tables."""
    tables = {name: trained["embedding"][name] for name in names}
    if not tables:
        return trained, {}
    return {**trained, "embedding": {name: t for name, t in trained["embedding"].items() if name not in tables}}, tables


def join_tables(dense: Params, tables: Mapping[str, Any]) -> Params:
    """Return the inverse of `split_tables`; also puts `Rows` in the place of tables."""
    return {**dense, "embedding": {**dense["embedding"], **tables}} if tables else dense


def row_ids(unique: UniqueIds, size: int, *, none: int) -> jax.Array:
    """Return the unique ids in the order of their numbers, int32 [size]; `none` in places that are left: they take some row."""
    return jnp.full(size, none, jnp.int32).at[jnp.where(unique.first, unique.number, size)].set(unique.ids, mode="drop")


def update_rows(
    update: Callable[[Params, Params, Any], tuple[Params, Any, Any]], trained: Params, opt_state: Any, gradient: Params,
    ids: Mapping[str, jax.Array], row_gradients: Mapping[str, jax.Array],
) -> tuple[Params, Any, Any]:  # fmt: skip
    """Run an update on the dense parameters and on some rows of the tables, and put both back.

    `update` maps (gradient, params, opt_state) to (params, opt_state, anything) for trees of any number of rows; `ids` [size]
    by table are `row_ids`, `row_gradients` [size, D] in their order. ValueError unless the state has a row for each of a table.
    """
    counts = {name: trained["embedding"][name].shape[0] for name in ids}
    dense, tables = split_tables(trained, ids)
    rows = {name: table.at[ids[name]].get(mode="clip") for name, table in tables.items()}
    alike = tuple(path for path in leaves_by_path(trained) if "/embedding/" in path)
    row_state = _map_rows(lambda leaf, name: leaf.at[ids[name]].get(mode="clip"), alike, counts, opt_state)
    updated, state, rest = update(join_tables(gradient, row_gradients), join_tables(dense, rows), row_state)
    dense, rows = split_tables(updated, ids)
    tables = {name: table.at[ids[name]].set(rows[name], mode="drop") for name, table in tables.items()}
    opt_state = _map_rows(lambda leaf, name, new: leaf.at[ids[name]].set(new, mode="drop"), alike, counts, opt_state, state)
    return join_tables(dense, tables), opt_state, rest


def _map_rows(f: Callable, alike: tuple[str, ...], counts: Mapping[str, int], opt_state: Any, *rest: Any) -> Any:
    """Map f(leaf, table, *others) over what the optimizer keeps of a table; other leaves come from the last tree given.

    Paths of an optimizer's state end as those of the parameters: "embedding", name of the table. `alike` are paths of other
    parameters that end so too, such as "blocks/mine/embedding/item".
    """

    def one(path: tuple, leaf: Any, *others: Any) -> Any:
        keys = [str(getattr(key, "key", "")) for key in path]
        named = "/".join(keys).rstrip("/")  # `optax.sm3` has lists below the tables
        group, name = ["", "", *named.split("/")][-2:]
        if group != "embedding" or name not in counts or named.endswith(alike):
            return others[-1] if others else leaf
        expected = f"one row for each of the {counts[name]} rows of table {name!r}, which only its batch moves"
        got = f"shape {leaf.shape}; such an optimizer needs sparse=()"
        gathers = {"acc_grads", "grad_acc"} & {getattr(key, "name", "") for key in path}  # moves rows in a later step
        expect(leaf.shape[:1] == (counts[name],) and not gathers, f"opt_state{jax.tree_util.keystr(path)}", expected, got)
        return f(leaf, name, *others)

    return jax.tree_util.tree_map_with_path(one, opt_state, *rest)
