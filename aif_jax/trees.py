"""Trees of arrays by path: names for leaves, and differences in words. Used where trees meet files."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

LISTED = 8  # differences that an error message spells out


def leaves_by_path(tree: Any, *, separator: str = "/") -> dict[str, Any]:
    """Return leaves by path such as "item/kernel", in the tree's order; raises ValueError where two have one path."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator=separator): leaf for path, leaf in flat}
    if len(named) != len(flat):
        got = f"two leaves with the same path; avoid {separator!r} in keys"
        raise ValueError(f"expected a different path for every leaf, got {got}")
    return named


def take(tree: Any, at: Any) -> Any:
    """Return some entries of a tree of arrays [n, ...]: `at` is what an array takes between brackets."""
    return jax.tree.map(lambda leaf: leaf[at], tree)


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return leaves by path as nested dicts."""
    return traverse_util.unflatten_dict(leaves, sep="/")


def is_key(leaf: Any) -> bool:
    """Return whether a leaf, or the abstract form of one, is a typed random key."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(leaf: Any) -> str:
    """Return dtype and shape of a leaf, such as "float32[2, 3]"."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{leaf.dtype}{list(leaf.shape)}"


def differences(got: Any, expected: Any, *, path: str = "", source: str) -> list[str]:
    """Return values in which two trees of JSON differ, a line each, by path, in the order of `got`, which `source` names."""
    if isinstance(got, Mapping) and isinstance(expected, Mapping):
        lines = []
        for key in [*got, *(key for key in expected if key not in got)]:
            at = f"{path}.{key}" if path else key
            if key not in expected:
                lines.append(f"{at}: only in the {source}, {got[key]!r}")
            elif key not in got:
                lines.append(f"{at}: not in the {source}, expected {expected[key]!r}")
            else:
                lines += differences(got[key], expected[key], path=at, source=source)
        return lines
    if isinstance(got, list | tuple) and isinstance(expected, list | tuple) and len(got) == len(expected):
        pairs = enumerate(zip(got, expected, strict=True))
        return [line for i, (g, e) in pairs for line in differences(g, e, path=f"{path}[{i}]", source=source)]
    return [] if got == expected else [f"{path}: expected {expected!r}, the {source} has {got!r}"]


def listed(lines: Sequence[str]) -> str:
    """Return the first lines, indented, and how many more there are."""
    rest = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n".join(f"  {line}" for line in [*lines[:LISTED], *rest])
