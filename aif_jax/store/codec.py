"""How a row is stored: vectors as float32, bfloat16 or int8 with a scale for each row; everything else as it is.

*Columns*: the type of a compact vector, bfloat16 or a small record, tells how to widen it. *Words*: all columns of a row are
one run of 32-bit words, so a request gathers once and an update writes once. Files hold columns, the device holds words.
"""

import dataclasses
import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from aif_jax.types import Array, record

Storage = Literal["float32", "bfloat16", "int8"]
STORAGES = ("float32", "bfloat16", "int8")
NARROW = 8
"""Vectors narrower than this stay float32: the scale would cost what int8 saves."""

WIDE = 32
"""Words of a row from which it is gathered in pairs: LLVM unrolls the copy of 32 to 64 words into moves of one word each, and
leaves pairs a loop of wide moves. A gather of 44 words takes a third of the time (x86-64, XLA of JAX 0.10)."""


@record
class Scaled:
    """int8 vectors, each with a scale: x = values * scale."""

    values: Array  # int8 [..., D]
    scale: Array  # float32 [...] largest |x| / 127


def encode(row: Any, storage: Storage) -> Any:
    """Return ONE row as it is stored: float vectors of at least `NARROW` entries in `storage`."""
    return jax.tree.map(partial(_encode_leaf, storage=storage), row)


def widen(columns: Any) -> Any:
    """Return the columns of rows with float32 vectors, whatever they were stored as."""
    return jax.tree.map(_widen, columns, is_leaf=lambda leaf: isinstance(leaf, Scaled))


class Column(NamedTuple):
    """The part of a row's words that is one array."""

    shape: tuple[int, ...]  # of one row
    dtype: str
    words: int


class Layout(NamedTuple):
    """What the words of a row mean."""

    tree: Any  # structure of the columns
    columns: tuple[Column, ...]


@partial(jax.tree_util.register_dataclass, data_fields=["words"], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """Rows as runs of words; the layout is part of the type, so two tables of one layout share their compiled functions."""

    words: Array  # uint32 [..., words of a row]
    layout: Layout

    def widened(self) -> Any:
        """Return the columns of ONE packed row, with float32 vectors."""
        one = unpack(Packed(words=jnp.asarray(self.words)[None], layout=self.layout))
        return widen(jax.tree.map(lambda leaf: leaf[0], one))


def pack(columns: Any) -> Packed:
    """Return the columns of ONE row as words; narrow columns fill up their last word. TypeError for what is no number."""
    leaves, tree = jax.tree.flatten(columns)
    words = [_to_words(leaf) for leaf in leaves]
    shapes = [(tuple(leaf.shape), jnp.dtype(leaf.dtype).name) for leaf in leaves]
    layout = Layout(tree, tuple(Column(*shape, len(word)) for shape, word in zip(shapes, words, strict=True)))
    return Packed(words=jnp.concatenate(words or [jnp.zeros(0, jnp.uint32)]), layout=layout)


def unpack(packed: Packed) -> Any:
    """Return the columns of packed rows [n]."""
    words, start, leaves = jnp.asarray(packed.words), 0, []
    for column in packed.layout.columns:
        leaves.append(_from_words(words[:, start : start + column.words], column))
        start += column.words
    return jax.tree.unflatten(packed.layout.tree, leaves)


def decode(table: Packed, rows: Array) -> Any:
    """Return rows [C] of a table as the interaction takes them, for use inside jit; negative rows read row 0, to be masked."""
    words = jnp.asarray(table.words)
    width, at = words.shape[-1], jnp.maximum(jnp.asarray(rows), 0)
    if width % 2 == 0 and width >= WIDE:
        words = words.reshape(-1, width // 2, 2)
    words = words.at[at].get(mode="clip").reshape(*at.shape, width)
    # Without the barrier XLA gathers again for every column.
    return widen(unpack(Packed(words=jax.lax.optimization_barrier(words), layout=table.layout)))


def _encode_leaf(leaf: jax.Array, *, storage: Storage) -> Any:
    if storage == "float32" or jnp.ndim(leaf) == 0 or leaf.shape[-1] < NARROW or leaf.dtype != jnp.float32:
        return leaf
    if storage == "bfloat16":
        return leaf.astype(jnp.bfloat16)
    scale = jnp.max(jnp.abs(leaf), axis=-1) / 127.0
    return Scaled(values=jnp.round(leaf / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(jnp.int8), scale=scale)


def _widen(leaf: Any) -> Any:
    if isinstance(leaf, Scaled):
        return jnp.asarray(leaf.values).astype(jnp.float32) * jnp.asarray(leaf.scale)[..., None]
    return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf


def _to_words(leaf: jax.Array) -> jax.Array:
    """Return uint32 [words] with the bits of one row's column."""
    flat = jnp.asarray(leaf).reshape(-1)
    if flat.dtype == jnp.bool_:
        flat = flat.astype(jnp.uint8)
    if flat.dtype.kind not in "iufV" or flat.dtype.itemsize > 4:
        raise TypeError(f"row or state: expected at most 32 bits, see jax_enable_x64, got dtype {flat.dtype.name}; cast it")
    a_word = 4 // flat.dtype.itemsize
    if a_word > 1:
        flat = jnp.pad(flat, (0, -len(flat) % a_word)).reshape(-1, a_word)
    return jax.lax.bitcast_convert_type(flat, jnp.uint32)


def _from_words(words: jax.Array, column: Column) -> jax.Array:
    """Return [n, *shape] of the column that `_to_words` made [n, words] of."""
    boolean = column.dtype == "bool"
    values = jax.lax.bitcast_convert_type(words, jnp.uint8 if boolean else jnp.dtype(column.dtype))
    values = values.reshape(len(words), -1)[:, : math.prod(column.shape)].reshape(len(words), *column.shape)
    return values != 0 if boolean else values
