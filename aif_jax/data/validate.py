"""Checks of data at the public edge: what, where, expected, got. Nothing is altered or clipped.

Source: ours. The checks run on the host, outside jit, before anything is sent to a device.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from aif_jax.data.schema import Attribute, Schema
from aif_jax.types import Behaviours, ItemFeatures, UserFeatures

BLOCK = 1 << 22  # elements looked at in one go, so that a check of a memory-mapped table stays in bounded memory


def expect_array(value: Any, name: str, *, dtype: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """`value` as a NumPy array of exactly that dtype and shape; `None` in the shape is any length.

    Args:
      value: NumPy or JAX array; anything else goes through `numpy.asarray`.
      name: where it stands, for the message.
      dtype: the dtype it must have.
      shape: the shape it must have.

    Raises:
      TypeError: wrong dtype.
      ValueError: wrong rank or length.

    Example:
      >>> expect_array(np.zeros([2, 3], np.float32), "x", dtype=np.float32, shape=(None, 3)).shape
      (2, 3)
    """
    array = np.asarray(value)
    if array.dtype != np.dtype(dtype):
        raise TypeError(f"{name}: expected dtype {np.dtype(dtype).name}, got {array.dtype.name}")
    if array.ndim != len(shape) or any(want is not None and want != got for want, got in zip(shape, array.shape, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(array.shape)}")
    return array


def expect_integers(value: Any, name: str, *, size: int) -> np.ndarray:
    """`value` as an array of integers in [0, size), of any shape and integer dtype.

    Raises:
      TypeError: not integers.
      ValueError: a value out of range; the message names the first one and its position.

    Example:
      >>> expect_integers([0, 2], "rows", size=3).tolist()
      [0, 2]
    """
    array = np.asarray(value)
    if array.size == 0 and not isinstance(value, np.ndarray):
        array = array.astype(np.int64)  # numpy reads an empty list as float64
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got dtype {array.dtype.name}")
    expect_range(array, name, size=size)
    return array


def expect_range(array: np.ndarray, name: str, *, size: int) -> None:
    """Raises ValueError unless all values are in [0, size)."""
    for start, block in _blocks(array):
        if block.size and (block.min() < 0 or block.max() >= size):
            bad = int(np.flatnonzero((block < 0) | (block >= size))[0])
            at = _position(array, start, bad)
            raise ValueError(f"{name}: expected values in [0, {size}), got {array[at]} at {_index(at)}")


def expect_finite(array: np.ndarray, name: str, *, minimum: float = -np.inf) -> None:
    """Raises ValueError unless all values are finite and at least `minimum`."""
    wanted = "finite values" if minimum == -np.inf else f"finite values of at least {minimum:g}"
    for start, block in _blocks(array):
        good = np.isfinite(block)
        if minimum > -np.inf:
            good &= block >= minimum
        if not good.all():
            at = _position(array, start, int(np.flatnonzero(~good)[0]))
            raise ValueError(f"{name}: expected {wanted}, got {array[at]} at {_index(at)}")


def expect_names(got: Any, name: str, wanted: Any) -> None:
    """Raises ValueError unless the dict `got` has exactly the keys `wanted`."""
    if not isinstance(got, dict):
        raise TypeError(f"{name}: expected a dict with keys {sorted(wanted)}, got {type(got).__name__}")
    missing, extra = sorted(set(wanted) - set(got)), sorted(set(got) - set(wanted))
    if missing or extra:
        raise ValueError(f"{name}: expected keys {sorted(wanted)}, got {sorted(got)} (missing {missing}, extra {extra})")


def expect_ids(ids: dict[str, Any], name: str, attributes: tuple[Attribute, ...], *, lead: tuple[int | None, ...]) -> None:
    """Raises unless `ids` has exactly the attributes, int32, with leading axes `lead`, every id within its vocabulary."""
    expect_names(ids, name, [a.name for a in attributes])
    for attribute in attributes:
        shape = lead if attribute.length == 1 else (*lead, attribute.length)
        array = expect_array(ids[attribute.name], f"{name}[{attribute.name!r}]", dtype=np.int32, shape=shape)
        expect_range(array, f"{name}[{attribute.name!r}]", size=attribute.size)


def check_user_features(schema: Schema, features: UserFeatures, *, batched: bool) -> None:
    """Checks one user, or a batch of users with a leading axis, against the schema.

    An empty history, a mask with holes and a batch of no users are all valid.

    Args:
      schema: what the features should be.
      features: NumPy or JAX arrays (JAX arrays are fetched).
      batched: whether every array has a leading axis B.

    Raises:
      TypeError: wrong dtype, or not a `UserFeatures`.
      ValueError: missing or extra field, wrong rank or length, id out of range, NaN or infinite float, negative age.

    Example:
      >>> from aif_jax.data.schema import Attribute, Schema
      >>> schema = Schema(item_attributes=(Attribute(name="item", size=9), Attribute(name="category", size=3)))
      >>> def history(length):
      ...     zeros = np.zeros(length, np.int32)
      ...     ids = {"item": zeros, "category": zeros}
      ...     return Behaviours(ids=ids, action=zeros, age=np.zeros(length, np.float32), mask=zeros > 0)
      >>> user = UserFeatures(ids={}, floats=np.zeros(0, np.float32), short=history(2), long=history(4))
      >>> check_user_features(schema, user, batched=False)
    """
    if not isinstance(features, UserFeatures):
        raise TypeError(f"features: expected UserFeatures, got {type(features).__name__}")
    lead: tuple[int | None, ...] = (None,) if batched else ()
    floats = expect_array(features.floats, "UserFeatures.floats", dtype=np.float32, shape=(*lead, schema.user_floats))
    lead = floats.shape[:-1]
    expect_finite(floats, "UserFeatures.floats")
    expect_ids(features.ids, "UserFeatures.ids", schema.user_attributes, lead=lead)
    words = [
        _check_behaviours(schema, behaviours, f"UserFeatures.{field}", lead=lead)
        for field, behaviours in (("short", features.short), ("long", features.long))
    ]
    if None not in words and words[0] != words[1]:
        raise ValueError(f"UserFeatures.long.signature: expected as many words as short.signature ({words[0]}), got {words[1]}")


def check_item_features(schema: Schema, features: ItemFeatures, *, batched: bool) -> None:
    """Checks one item, or a batch of items with a leading axis, against the schema.

    Args:
      schema: what the features should be.
      features: NumPy or JAX arrays (JAX arrays are fetched).
      batched: whether every array has a leading axis.

    Raises:
      TypeError: wrong dtype, or not an `ItemFeatures`.
      ValueError: missing or extra field, wrong rank or length, id out of range, NaN or infinite float or content; neither
        content nor signature although the schema has a content embedding.

    Example:
      >>> from aif_jax.data.schema import Attribute, Schema
      >>> schema = Schema(item_attributes=(Attribute(name="item", size=9), Attribute(name="category", size=3)))
      >>> item = ItemFeatures(ids={"item": np.int32(4), "category": np.int32(1)}, floats=np.zeros(0, np.float32))
      >>> check_item_features(schema, item, batched=False)
    """
    if not isinstance(features, ItemFeatures):
        raise TypeError(f"features: expected ItemFeatures, got {type(features).__name__}")
    lead: tuple[int | None, ...] = (None,) if batched else ()
    floats = expect_array(features.floats, "ItemFeatures.floats", dtype=np.float32, shape=(*lead, schema.item_floats))
    lead = floats.shape[:-1]
    expect_finite(floats, "ItemFeatures.floats")
    expect_ids(features.ids, "ItemFeatures.ids", schema.item_attributes, lead=lead)
    check_content(schema, features.content, features.signature, "ItemFeatures", lead=lead)
    check_side(schema, features.side, "ItemFeatures.side", lead=lead)


def check_content(schema: Schema, content: Any, signature: Any, name: str, *, lead: tuple[int | None, ...]) -> None:
    """Raises unless content [*lead, E] or signature [*lead, W] is there, as the schema says, and is finite."""
    if content is not None:
        if not schema.content:
            raise ValueError(f"{name}.content: expected None (schema.content is 0), got an array")
        array = expect_array(content, f"{name}.content", dtype=np.float32, shape=(*lead, schema.content))
        expect_finite(array, f"{name}.content")
    elif schema.content and signature is None:
        raise ValueError(f"{name}.content: expected float32 [..., {schema.content}] or a ready signature, got neither")
    if signature is not None:
        _check_signature(signature, f"{name}.signature", lead=lead)


def check_side(schema: Schema, side: Any, name: str, *, lead: tuple[int | None, ...]) -> None:
    """Raises unless `side` has exactly the schema's side values, float32 and finite."""
    expect_names(side, name, schema.side)
    for key in schema.side:
        expect_finite(expect_array(side[key], f"{name}[{key!r}]", dtype=np.float32, shape=lead), f"{name}[{key!r}]")


def _check_behaviours(schema: Schema, behaviours: Any, name: str, *, lead: tuple[int | None, ...]) -> int | None:
    """Checks one history; returns the words of its signature, if it has one."""
    if not isinstance(behaviours, Behaviours):
        raise TypeError(f"{name}: expected Behaviours, got {type(behaviours).__name__}")
    mask = expect_array(behaviours.mask, f"{name}.mask", dtype=np.bool_, shape=(*lead, None))
    shape = mask.shape
    attributes = tuple(schema.item_attribute(field) for field in schema.behaviour_fields)
    expect_ids(behaviours.ids, f"{name}.ids", attributes, lead=shape)
    action = expect_array(behaviours.action, f"{name}.action", dtype=np.int32, shape=shape)
    expect_range(action, f"{name}.action", size=schema.actions)
    expect_finite(expect_array(behaviours.age, f"{name}.age", dtype=np.float32, shape=shape), f"{name}.age", minimum=0)
    if behaviours.signature is None:
        return None
    return _check_signature(behaviours.signature, f"{name}.signature", lead=shape)


def _check_signature(signature: Any, name: str, *, lead: tuple[int | None, ...]) -> int:
    words = expect_array(signature, name, dtype=np.uint32, shape=(*lead, None)).shape[-1]
    if words < 1:
        raise ValueError(f"{name}: expected at least 1 word, got 0")
    return words


def _blocks(array: np.ndarray):
    """(first row, rows) in blocks of bounded size; a scalar is one block."""
    if array.size <= BLOCK:
        yield 0, array.reshape(1) if array.ndim == 0 else array
        return
    step = max(1, BLOCK // math.prod(array.shape[1:]))
    for start in range(0, len(array), step):
        yield start, array[start : start + step]


def _position(array: np.ndarray, start: int, flat: int) -> tuple[int, ...]:
    """The index in `array` of the flat position `flat` of the block that starts at row `start`."""
    if array.ndim == 0:
        return ()
    row, *rest = np.unravel_index(flat, (len(array) - start, *array.shape[1:]))
    return (start + int(row), *(int(r) for r in rest))


def _index(at: tuple[int, ...]) -> str:
    return f"position {list(at)}" if at else "the only position"
