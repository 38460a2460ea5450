"""The layout of features: arrays of a user and of an item, their shapes, dtypes and bounds, for a schema.

`user_layout` and `item_layout` describe it; shapes for compilation and export, empty features, checks and packing follow.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax.checks import expect, expect_array, expect_finite, expect_names, expect_range
from aif_jax.schema import Attribute, Schema
from aif_jax.types import Behaviours, ItemFeatures, UserFeatures

Tree = TypeVar("Tree")
LENGTH = "L"  # stands in a leaf's shape for the places of the history


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array of the features."""

    dtype: Any
    shape: tuple[int | str, ...] = ()
    size: int | None = None
    minimum: float | None = None


@functools.lru_cache(maxsize=64)
def user_layout(schema: Schema) -> UserFeatures:
    """Return `UserFeatures` whose leaves are `Leaf`s."""
    leaf: Any = Leaf
    return UserFeatures(
        ids=_ids(schema.user_attributes),
        floats=leaf(dtype=np.float32, shape=(schema.user_floats,)),
        history=Behaviours(
            item=leaf(dtype=np.int32, shape=(LENGTH,), size=schema.table_sizes["item"]),
            action=leaf(dtype=np.int32, shape=(LENGTH,), size=schema.actions),
            age=leaf(dtype=np.float32, shape=(LENGTH,), minimum=0.0),
            mask=leaf(dtype=np.bool_, shape=(LENGTH,)),
        ),
    )


@functools.lru_cache(maxsize=64)
def item_layout(schema: Schema) -> ItemFeatures:
    """Return `ItemFeatures` whose leaves are `Leaf`s."""
    leaf: Any = Leaf
    return ItemFeatures(
        ids=_ids(schema.item_attributes),
        floats=leaf(dtype=np.float32, shape=(schema.item_floats,)),
        content=leaf(dtype=np.float32, shape=(schema.content,)) if schema.content else None,
        side={key: leaf(dtype=np.float32) for key in schema.side},
    )


def user_specs(schema: Schema, *, length: Any, lead: tuple[Any, ...] = ()) -> UserFeatures:
    """Return `UserFeatures` of `jax.ShapeDtypeStruct`; `length` is L, `lead` the leading axes, also symbolic dimensions."""
    return _filled(user_layout(schema), jax.ShapeDtypeStruct, lead, length)


def item_specs(schema: Schema, *, lead: tuple[Any, ...] = ()) -> ItemFeatures:
    """Return shapes and dtypes of one item's features, or of many with leading axes `lead`, as `user_specs`."""
    return _filled(item_layout(schema), jax.ShapeDtypeStruct, lead)


def empty_user(schema: Schema, *, length: int, lead: tuple[int, ...] = ()) -> UserFeatures:
    """Return the unknown user without events: NumPy zeros with `length` places of history and leading axes `lead`."""
    return _filled(user_layout(schema), np.zeros, lead, length)


def empty_items(schema: Schema, count: int = 0) -> ItemFeatures:
    """Return `count` unknown items as NumPy arrays: every id 0, floats and content 0."""
    return _filled(item_layout(schema), np.zeros, (count,))


def behaviours(item: np.ndarray, action: np.ndarray, age: np.ndarray, mask: np.ndarray) -> Behaviours:
    """Return encoded events as a history, zeros where the mask is false: arrays [..., L], recent first, ages in seconds."""
    # a product is four times as fast, but a NaN in padding would survive it
    age = np.multiply(age, mask) if age.dtype.kind in "iu" else np.where(mask, age, 0)
    return Behaviours(
        item=np.multiply(item, mask, dtype=np.int32),
        action=np.multiply(action, mask, dtype=np.int32),
        age=age.astype(np.float32),
        mask=np.ascontiguousarray(mask),
    )


def check_user_features(schema: Schema, features: UserFeatures, *, batched: bool, name: str = "UserFeatures") -> None:
    """Check one user, or a batch of users, against the schema; nothing is altered. No event and no user are valid.

    Args:
      features: NumPy or JAX arrays (JAX arrays are fetched).
      batched: whether every array has a leading axis B.
      name: name of the features in messages.

    Raises:
      TypeError: wrong dtype, or not a `UserFeatures`.
      ValueError: missing or extra field, wrong rank or length, id out of range, NaN or infinite float, negative age.

    Example:
      >>> schema = Schema(item_attributes=(Attribute(name="item", size=9), Attribute(name="category", size=3)))
      >>> check_user_features(schema, empty_user(schema, length=4), batched=False)
    """
    expect(isinstance(features, UserFeatures), name, "UserFeatures", type(features).__name__, error=TypeError)
    got = type(features.history).__name__
    expect(isinstance(features.history, Behaviours), f"{name}.history", "Behaviours", got, error=TypeError)
    mask = np.shape(features.history.mask)
    _check(user_layout(schema), features, name, batched=batched, length=mask[-1] if mask else None)


def check_item_features(schema: Schema, features: ItemFeatures, *, batched: bool, name: str = "ItemFeatures") -> None:
    """Check one item, or a batch of items, against the schema; arguments and errors as `check_user_features`.

    Example:
      >>> schema = Schema(item_attributes=(Attribute(name="item", size=9), Attribute(name="category", size=3)))
      >>> check_item_features(schema, empty_items(schema, 2), batched=True)
    """
    expect(isinstance(features, ItemFeatures), name, "ItemFeatures", type(features).__name__, error=TypeError)
    layout = item_layout(schema)
    got, wanted = features.content is not None, layout.content is not None
    expect(got or not wanted, f"{name}.content", f"float32 [..., {schema.content}]", None)
    expect(wanted or not got, f"{name}.content", "None (schema.content is 0)", "an array")
    _check(layout, features, name, batched=batched)


def pack(features: Any) -> np.ndarray:
    """Return all leaves (32-bit or boolean NumPy) as one int32 array, a word for each value: one transfer in place of many."""
    words = [leaf.astype(np.int32) if leaf.dtype == np.bool_ else leaf.view(np.int32) for leaf in jax.tree.leaves(features)]
    return np.concatenate(words, axis=None)


def unpack(words: jax.Array, specs: Tree) -> Tree:
    """Return the tree that `pack` packed, inside jit; `specs` has its shapes and dtypes."""
    leaves, tree = jax.tree.flatten(specs)
    unpacked, start = [], 0
    for leaf in leaves:
        part = words[start : start + leaf.size].reshape(leaf.shape)
        unpacked.append(part != 0 if leaf.dtype == np.bool_ else jax.lax.bitcast_convert_type(part, leaf.dtype))
        start += leaf.size
    return jax.tree.unflatten(tree, unpacked)


ARRAYS = attrgetter("ids", "floats", "history")  # of a user's features, without the encoding
EVERY_BIT, SIGN, INFINITY = 0xFFFFFFFF, 0x80000000, 0x7F800000


class UserPacker:
    """Checks and packs one user whose history has L places: all values are checked at once, by their words.

    As uint32, a word is below the size of its vocabulary where the id is in range, and below the bits of infinity where the
    float is finite and 0 or more; floats that may be negative go without their sign. Only what fails is looked at leaf by leaf.
    """

    def __init__(self, schema: Schema, length: int):
        self._schema, self._length = schema, length
        layout: list[Leaf]
        layout, self._tree = jax.tree.flatten(ARRAYS(user_layout(schema)))
        signed = [leaf.size is None and leaf.minimum is None and leaf.dtype == np.float32 for leaf in layout]
        ends = np.array([INFINITY if leaf.size is None else leaf.size for leaf in layout], np.uint32)
        specs = jax.tree.leaves(user_specs(schema, length=length))
        sizes = [spec.size for spec in specs]
        self._kinds = [(spec.dtype, spec.shape) for spec in specs]
        self._bits = np.repeat(np.where(signed, EVERY_BIT ^ SIGN, EVERY_BIT).astype(np.uint32), sizes)  # those that count
        self._limits = np.repeat(ends, sizes)

    def __call__(self, features: UserFeatures) -> np.ndarray:
        """Return words int32 [n] of a user's features, see `pack`; raises as `check_user_features`."""
        if isinstance(features, UserFeatures):
            leaves, tree = jax.tree.flatten(ARRAYS(features))
            arrays = [np.asarray(leaf) for leaf in leaves]
            if tree == self._tree and [(array.dtype, array.shape) for array in arrays] == self._kinds:
                words = pack(arrays)
                if ((words.view(np.uint32) & self._bits) < self._limits).all():
                    return words
        check_user_features(self._schema, features, batched=False)
        length = np.size(features.history.mask)
        expect(length == self._length, "UserFeatures.history", f"L={self._length}", f"L={length}; see Encoder.with_length")
        return pack(jax.tree.map(np.asarray, features))  # no check failed: an age is -0, whose sign bit is above every limit


def _ids(attributes: tuple[Attribute, ...]) -> dict[str, Any]:
    return {a.name: Leaf(dtype=np.int32, shape=() if a.length == 1 else (a.length,), size=a.size) for a in attributes}


def _filled(layout: Tree, make: Callable[..., Any], lead: tuple[Any, ...], length: Any = 0) -> Tree:
    """Return the layout with `make(shape, dtype)` in place of each leaf."""

    def filled(leaf: Leaf) -> Any:
        return make((*lead, *(length if size == LENGTH else size for size in leaf.shape)), jnp.dtype(leaf.dtype))

    return jax.tree.map(filled, layout)


def _check(layout: Any, features: Any, name: str, *, batched: bool, length: int | None = None) -> None:
    """Compare features with a layout leaf by leaf; the first leaf tells the leading axis for the others."""
    for field in ("ids", "side"):
        if hasattr(layout, field):
            expect_names(getattr(features, field), f"{name}.{field}", getattr(layout, field))
    if layout.encoding != features.encoding:
        layout = dataclasses.replace(layout, encoding=features.encoding)
    leaves, tree = jax.tree_util.tree_flatten_with_path(layout)
    lead: tuple[int | None, ...] = (None,) if batched else ()
    for (path, leaf), value in zip(leaves, tree.flatten_up_to(features), strict=True):
        where, sizes = name + jax.tree_util.keystr(path), tuple(length if size == LENGTH else size for size in leaf.shape)
        array = expect_array(value, where, dtype=leaf.dtype, shape=(*lead, *sizes))
        lead = array.shape[: len(lead)]
        if leaf.size is not None:
            expect_range(array, where, size=leaf.size)
        elif leaf.dtype == np.float32:
            expect_finite(array, where, minimum=-math.inf if leaf.minimum is None else leaf.minimum)
