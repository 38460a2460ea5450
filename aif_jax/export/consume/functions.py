"""One exported function: reads it, checks its inputs by the manifest, pads symbolic axes to buckets, runs it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export
import numpy as np

from .files import DTYPE_NAMES, ORDER, PROBABILITY, ExportError, expect

OVER = {"users": "b", "item": "n", "interaction": "c"}
"""The axis over which a function runs in blocks; older exports have `users`, the user function of a batch."""


def axis_of(name: str) -> str | None:
    """Return the axis over which a function runs in blocks; None for one of one user."""
    return "c" if name == PROBABILITY or name.startswith(ORDER) else OVER.get(name)


@dataclasses.dataclass(frozen=True)
class Axis:
    """A symbolic axis: the sizes that are compiled, and those that the function allows."""

    minimum: int
    maximum: int | None  # the model reads no place beyond it
    buckets: tuple[int, ...]

    def bucket(self, size: int) -> int:
        """Return the size to which `size` is padded: the next bucket, or a multiple of the largest one."""
        largest = self.buckets[-1]
        padded = next((b for b in self.buckets if b >= size), -(-size // largest) * largest)
        return padded if self.maximum is None else min(padded, self.maximum)

    def blocks(self, size: int) -> list[tuple[int, int, int]]:
        """Return (start, stop, bucket) of the blocks that a size is processed in.

        All are of one bucket: programs of two sizes may differ in the last bit of equal entries, whose scores must tie.
        """
        bucket = self.bucket(min(size, self.buckets[-1]))
        return [(start, min(start + bucket, size), bucket) for start in range(0, size, bucket)]


def read_axes(manifest: Mapping[str, Any], buckets: Mapping[str, Sequence[int]]) -> dict[str, Axis]:
    """Return the axes of a manifest, with other buckets for some; ExportError for sizes that the functions do not allow."""
    axes, unknown = {}, sorted(set(buckets) - set(manifest["axes"]))
    expect(not unknown, "buckets", f"axes among {sorted(manifest['axes'])}", unknown)
    for name, spec in manifest["axes"].items():
        low, high = spec["minimum"], spec.get("maximum")
        sizes = tuple(sorted({int(size) for size in buckets.get(name, spec["buckets"])}))
        if not sizes or sizes[0] < max(1, low) or (high is not None and sizes[-1] > high):
            allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise ExportError(f"buckets {name!r}: expected sizes {allowed}, got {list(sizes)}")
        axes[name] = Axis(low, high, sizes)
    return axes


@dataclasses.dataclass(frozen=True)
class Input:
    """What one input must be."""

    shape: tuple[int | str, ...]  # a string is a symbolic axis
    dtype: np.dtype
    size: int | None = None  # ids are in [0, size)
    finite: bool = False
    minimum: float | None = None

    def check(self, name: str, array: np.ndarray) -> None:
        """Raise ExportError where a value is none that the model was made for."""
        if self.size is not None:
            bad, expected = (array < 0) | (array >= self.size), f"values in [0, {self.size})"
        elif self.finite:
            bad, expected = ~np.isfinite(array), "finite values"
            if self.minimum is not None:
                bad, expected = bad | (array < array.dtype.type(self.minimum)), f"finite values of at least {self.minimum:g}"
        else:
            return
        if bad.any():
            place = np.unravel_index(int(np.argmax(bad)), np.shape(bad))
            where = f"position {list(map(int, place))}" if place else "the only position"
            raise ExportError(f"{name}: expected {expected}, got {array[place]} at {where}")


class Function:
    """One exported function with its parameters."""

    def __init__(self, name: str, spec: Mapping[str, Any], raw: bytes, params: Mapping[str, Any], axes: dict[str, Axis]):
        self.name, self.axes = name, axes
        self.params = {path: params[path] for path in spec["params"]}
        self.inputs = {entry["name"]: _input(entry) for entry in spec["inputs"]}
        self.outputs = {entry["name"]: _input(entry) for entry in spec["outputs"]}
        self.ignored = frozenset(spec["ignored"])
        self.exported = exported = deserialize(raw, name)
        self._run = jax.jit(lambda params, inputs: callable_here(exported, name)(params, inputs))

    def on_device(self, inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Run once and leave the outputs where they are."""
        given, sizes = self.prepared(inputs)
        return self._run(self.params, jax.device_put(self._pad(given, {a: self.axes[a].bucket(n) for a, n in sizes.items()})))

    def on_host(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run in blocks of the function's own axis and brings the outputs back without padding."""
        given, sizes = self.prepared(inputs)
        over = str(axis_of(self.name))
        whole = {axis: self.axes[axis].bucket(size) for axis, size in sizes.items() if axis != over}
        parts: list[dict[str, np.ndarray]] = []
        for start, stop, bucket in self.axes[over].blocks(sizes[over]):
            block = {k: v if over not in self.inputs[k].shape else v[start:stop] for k, v in given.items()}
            out = self._run(self.params, jax.device_put(self._pad(block, whole | {over: bucket})))
            parts.append({k: v[: stop - start] for k, v in jax.device_get(out).items()})
        if not parts:  # no candidates, no items: nothing runs
            return {k: np.zeros(_sized(entry.shape, whole | {over: 0}), entry.dtype) for k, entry in self.outputs.items()}
        return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]} if len(parts) > 1 else parts[0]

    def prepared(self, inputs: Mapping[str, Any], *, prefix: str = "") -> tuple[dict[str, Any], dict[str, int]]:
        """Return the inputs of that prefix, checked, and the size of every symbolic axis.

        Inputs and places that the model does not read are left out.
        """
        names = [name for name in self.inputs if name.startswith(prefix)]
        missing = [name for name in names if name not in inputs]
        extra = [name for name in inputs if name not in self.inputs and name not in self.ignored]
        if missing or extra:
            raise ExportError(f"{self.name} inputs: expected {sorted(names)}, missing {missing}, unknown {extra}")
        given: dict[str, Any] = {}
        sizes: dict[str, int] = {}
        for name in names:
            value, wanted, where = inputs[name], self.inputs[name], f"{self.name} input {name}"
            if wanted.size is not None or wanted.finite or not isinstance(value, jax.Array):
                value = np.asarray(jax.device_get(value))
            expect(value.dtype == wanted.dtype, where, f"dtype {wanted.dtype}", value.dtype)
            fits = len(wanted.shape) == value.ndim and all(
                (sizes.setdefault(want, got) if isinstance(want, str) else want) == got
                for want, got in zip(wanted.shape, value.shape, strict=True)
            )
            if not fits:
                expected = [sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in wanted.shape]
                raise ExportError(f"{where}: expected shape {expected}, got {list(value.shape)}")
            if isinstance(value, np.ndarray):
                wanted.check(where, value)
            given[name] = value
        most = {a: high for a, size in sizes.items() if (high := self.axes[a].maximum) is not None and size > high}
        if most:
            given = {k: v[tuple(slice(most.get(str(dim))) for dim in self.inputs[k].shape)] for k, v in given.items()}
        return given, sizes | most

    def _pad(self, given: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
        padded = {}
        for name, value in given.items():
            shape = _sized(self.inputs[name].shape, sizes)
            if value.shape != shape:  # on the host: padding on the device would compile for every new size
                array = np.zeros(shape, self.inputs[name].dtype)
                array[tuple(map(slice, value.shape))] = np.asarray(value)
                value = array
            padded[name] = value
        return padded


def deserialize(raw: bytes, name: str) -> Any:
    """Return the `jax.export.Exported` of some bytes; ExportError for others."""
    try:
        return jax.export.deserialize(bytearray(raw))
    except Exception as error:  # whatever JAX says of a foreign blob, in words that name the function
        raise ExportError(f"{name}: expected a function serialised by jax.export, jax {jax.__version__} says {error}") from None


def callable_here(exported: Any, name: str) -> Any:
    """Return the call of a `jax.export.Exported`; ExportError where it was made for other platforms than this process's."""
    here = jax.export.default_export_platform()
    got = f"one for {', '.join(exported.platforms)}; export it with {here} among the platforms"
    expect(here in exported.platforms, name, f"a function for {here}", got)
    return exported.call


def _input(entry: Mapping[str, Any]) -> Input:
    fields = {name: entry[name] for name in ("size", "finite", "minimum") if name in entry}
    return Input(tuple(entry["shape"]), DTYPE_NAMES[entry["dtype"]], **fields)


def _sized(shape: Sequence[int | str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in shape)
