"""Runs an exported model with jax, numpy and the standard library; no model code, no flax, no optax, no orbax.

A copy of this file stands in every exported folder, so that a serving team can `import consume` from there. Whoever does not
trust a folder takes the copy in the package, `aif_jax.export.load`, which is the same code: nothing in a folder is executed
before its checksums fit, no pickle is read, and only files that the loader needs are opened.

Source: ours, on `jax.export`. Arrays stand in the public safetensors layout: eight bytes of header length, a JSON header, data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

FORMAT = "aif_jax.export"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_BYTES = 16 << 20
MAX_BYTES = 256 << 30
PARTS = ("inputs", "outputs", "params", "ignored")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)+")
SAFE_CALLS = re.compile(
    r"stablehlo\.custom_call @(shape_assertion|stablehlo\.dynamic_reduce_window|stablehlo\.dynamic_top_k|Sharding)\("
)
"""Placeholders of symbolic shapes; none is left, and none runs anything, once the sizes are known."""
DTYPES = {
    "BOOL": np.dtype("?"), "U8": np.dtype("u1"), "I8": np.dtype("i1"), "I16": np.dtype("<i2"), "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"), "U32": np.dtype("<u4"), "I64": np.dtype("<i8"), "U64": np.dtype("<u8"), "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "BF16": np.dtype(jnp.bfloat16), "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
}  # fmt: skip


class ExportError(ValueError):
    """A folder that is not what its manifest says, or that this process cannot run."""


def load(
    folder: str | Path,
    *,
    buckets: Mapping[str, Sequence[int]] | None = None,
    sha256: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> ExportedModel:
    """Reads an exported folder, checksums first.

    Args:
      folder: what `aif_jax.export.save` wrote.
      buckets: sizes that are compiled, by axis, in place of the manifest's: "c" candidates, "l" long history, "n" catalogue
        rows, "b" users. Every size is padded up to the next bucket, so that a new count does not compile.
      sha256: the digest of the manifest as `save` returned it; given, the whole folder is pinned to it.
      max_bytes: refuse folders that say they are larger.

    Returns:
      The model as functions of flat dicts of arrays.

    Raises:
      ExportError: a file is missing, altered, misplaced or too large; the format or JAX is of another version.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, sha256=sha256, max_bytes=max_bytes)
    check_versions(manifest)
    return ExportedModel(folder, manifest, buckets=buckets)


class ExportedModel:
    """User, item and interaction of one exported model.

    Inputs are dicts of arrays, flat ("short.ids.item") or nested, or dataclasses with those fields. Dtypes and shapes are
    those that the manifest names; an input that the model does not read may be left out.

    Attributes:
      manifest: the parsed manifest.
      version: fingerprint of params and config.
      config: the model's config, its schema included, as JSON values.
      index: ids int64 [N] and table of the exported index, or None.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], *, buckets: Mapping[str, Sequence[int]] | None = None):
        self.manifest = manifest
        self.version: str = manifest["version"]
        self.config: dict[str, Any] = manifest["config"]
        axes = _axes(manifest, buckets or {})
        params = jax.device_put(read_arrays(checked(folder, manifest, manifest["params"])))
        functions = manifest["functions"]
        modules = {name: _deserialize(checked(folder, manifest, spec["file"]), name) for name, spec in functions.items()}
        self.functions = {name: Function(name, functions[name], modules[name], params, axes) for name in functions}
        self._score = jax.jit(self._gather_and_score)
        self._vocabularies = {}
        if manifest.get("vocabularies"):
            self._vocabularies = _read_vocabularies(read_arrays(checked(folder, manifest, manifest["vocabularies"])))
        self.index: tuple[np.ndarray, dict[str, jax.Array]] | None = None
        if manifest.get("index"):
            table = read_arrays(checked(folder, manifest, manifest["index"]))
            self.index = table.pop("id"), jax.device_put(table)

    def user(self, features: Any) -> dict[str, jax.Array]:
        """The state of ONE user, on the device; a long history is padded to its bucket."""
        return self.functions["user"].on_device(features)

    def users(self, features: Any) -> dict[str, np.ndarray]:
        """States of B users, all inputs with a leading axis B."""
        return self.functions["users"].on_host(features, "b")

    def item(self, features: Any) -> dict[str, np.ndarray]:
        """Rows of N items, all inputs with a leading axis N; any N, in blocks of bounded size."""
        return self.functions["item"].on_host(features, "n")

    def interaction(self, state: Any, rows: Any) -> np.ndarray:
        """Logits float32 [C] of one user's state and C rows; any C."""
        return self.functions["interaction"].on_host({"state": flatten(state), "rows": flatten(rows)}, "c")["logits"]

    def score(self, state: Any, table: Mapping[str, Any], rows: np.ndarray) -> np.ndarray:
        """Logits float32 [C] of the rows of a table on the device: the gather and the interaction in one compiled function.

        Args:
          state: of one user.
          table: what `item` returned, put on a device; compiled once for each number of rows.
          rows: integers [C] in [0, N).

        Raises:
          ExportError: rows that the table does not have.
        """
        function = self.functions["interaction"]
        rows = np.asarray(rows)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise ExportError(f"rows: expected integers [C], got {rows.dtype}{list(rows.shape)}")
        needed = [name[5:] for name in function.inputs if name.startswith("rows.")]
        missing = [name for name in needed if name not in table]
        if missing:
            raise ExportError(f"table: expected columns {needed}, got none named {missing}")
        size = len(table[needed[0]])
        if rows.size and (rows.min() < 0 or rows.max() >= size):
            raise ExportError(f"rows: expected values in [0, {size}), got {rows.min()} to {rows.max()}")
        given = {f"state.{name}": value for name, value in flatten(state).items()}
        states = jax.device_put(function.take(given, [name for name in function.inputs if name.startswith("state.")]))
        columns = {name: table[name] for name in needed}
        blocks = [np.zeros(0, np.float32)]
        for start, stop, bucket in function.axes["c"].blocks(len(rows)):
            padded = np.zeros(bucket, np.int32)
            padded[: stop - start] = rows[start:stop]
            logits = self._score(function.params, states, columns, jax.device_put(padded))
            blocks.append(jax.device_get(logits)[: stop - start])
        return np.concatenate(blocks)

    def warm_up(self, *, candidates: Iterable[int] | None = None, table: Mapping[str, Any] | None = None) -> ExportedModel:
        """Compiles the user function at its buckets and the interaction at those of the counts named, before requests come.

        Args:
          candidates: counts that requests will have; every bucket where None.
          table: also compiles `score` for a table of these shapes.
        """
        axis = self.functions["interaction"].axes["c"]
        counts = sorted(set(axis.buckets) if candidates is None else {axis.bucket(count) for count in candidates})
        user = self.functions["user"]
        lengths = user.axes["l"].buckets if "l" in user.used_axes else (1,)
        for length in lengths:
            state = self.user(user.zeros({"l": length}))
            rows = self.functions["interaction"].zeros({"c": 1}, prefix="rows.")
            for count in counts:
                self.interaction(state, {name: np.repeat(value, count, axis=0) for name, value in rows.items()})
                if table is not None:
                    self.score(state, table, np.zeros(count, np.int32))
        return self

    def encode(self, name: str, raw: Sequence | np.ndarray) -> np.ndarray:
        """Raw ids of an attribute to int32 rows; unknown ids give 0.

        Raises:
          ExportError: the export holds no vocabulary of that name.
        """
        if name not in self._vocabularies:
            raise ExportError(f"vocabulary: expected one of {sorted(self._vocabularies)}, got {name!r}")
        known, raw = self._vocabularies[name], np.asarray(raw)
        if not len(known):
            return np.zeros(raw.shape, np.int32)
        at = np.minimum(np.searchsorted(known, raw), len(known) - 1)
        return np.where(known[at] == raw, at + 1, 0).astype(np.int32)

    def _gather_and_score(self, params, states, columns, rows):
        gathered = {f"rows.{name}": column[rows] for name, column in columns.items()}
        return self.functions["interaction"].exported.call(params, states | gathered)["logits"]


@dataclasses.dataclass(frozen=True)
class Axis:
    """A symbolic axis: sizes that are compiled, the least one that the function allows."""

    name: str
    minimum: int
    buckets: tuple[int, ...]
    trim: bool  # false where a mask among the outputs tells padding apart

    def bucket(self, size: int) -> int:
        """The size to which `size` is padded: the next bucket, or a multiple of the largest one."""
        largest = self.buckets[-1]
        return next((b for b in self.buckets if b >= size), -(-size // largest) * largest)

    def blocks(self, size: int) -> list[tuple[int, int, int]]:
        """(start, stop, bucket) of the blocks that a size is worked off in."""
        starts = range(0, size, self.buckets[-1])
        return [(s, min(s + self.buckets[-1], size), self.bucket(min(self.buckets[-1], size - s))) for s in starts]


class Function:
    """One exported function: checks its inputs by the manifest, pads symbolic axes to buckets, runs."""

    def __init__(self, name: str, spec: dict[str, Any], exported: Any, params: Mapping[str, Any], axes: dict[str, Axis]):
        missing = [path for path in spec["params"] if path not in params]
        if missing:
            raise ExportError(f"{name}: expected parameters {missing} in the params file, got none of that name")
        self.name, self.exported, self.axes = name, exported, axes
        self.params = {path: params[path] for path in spec["params"]}
        self.inputs = {entry["name"]: (tuple(entry["shape"]), np.dtype(entry["dtype"])) for entry in spec["inputs"]}
        self.outputs = {entry["name"]: tuple(entry["shape"]) for entry in spec["outputs"]}
        self.ignored = frozenset(spec["ignored"])
        self.used_axes = {dim for shape, _ in self.inputs.values() for dim in shape if isinstance(dim, str)}
        self._check_signature()
        self._run = jax.jit(lambda params, inputs: exported.call(params, inputs))

    def on_device(self, inputs: Any) -> dict[str, jax.Array]:
        """Runs once and leaves the outputs where they are."""
        given = self.take(flatten(inputs), self.inputs)
        sizes = {axis: self.axes[axis].bucket(size) for axis, size in self.sizes(given).items()}
        return self._run(self.params, jax.device_put(self._pad(given, sizes)))

    def on_host(self, inputs: Any, over: str) -> dict[str, np.ndarray]:
        """Runs in blocks of the axis `over` and brings the outputs back without padding."""
        given = self.take(flatten(inputs), self.inputs)
        sizes = self.sizes(given)
        whole = {axis: self.axes[axis].bucket(size) for axis, size in sizes.items() if axis != over}
        parts: list[dict[str, np.ndarray]] = []
        for start, stop, bucket in self.axes[over].blocks(sizes[over]):
            block = {k: v if over not in self.inputs[k][0] else v[start:stop] for k, v in given.items()}
            out = self._run(self.params, jax.device_put(self._pad(block, whole | {over: bucket})))
            parts.append({k: v[: stop - start] for k, v in jax.device_get(out).items()})
        if not parts:  # no candidates, no items: nothing runs
            none = whole | {over: 0}
            shapes = {k: [none[d] if isinstance(d, str) else d for d in shape] for k, shape in self.outputs.items()}
            return {k: np.zeros(shapes[k], aval.dtype) for k, aval in self._out_avals().items()}
        return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]} if len(parts) > 1 else parts[0]

    def take(self, given: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """The inputs named, checked for names and dtypes; inputs that the model does not read are dropped."""
        names = list(names)
        missing = [name for name in names if name not in given]
        extra = [name for name in given if name not in self.inputs and name not in self.ignored]
        if missing or extra:
            raise ExportError(f"{self.name} inputs: expected {sorted(names)}; missing {missing}, unknown {extra}")
        taken = {name: value if isinstance(value := given[name], jax.Array) else np.asarray(value) for name in names}
        for name, value in taken.items():
            if value.dtype != self.inputs[name][1]:
                raise ExportError(f"{self.name} input {name}: expected dtype {self.inputs[name][1]}, got {value.dtype}")
        return taken

    def sizes(self, given: Mapping[str, Any]) -> dict[str, int]:
        """The size of every symbolic axis, from shapes that fit the manifest and each other."""
        sizes: dict[str, int] = {}
        for name, value in given.items():
            shape = self.inputs[name][0]
            fits = len(shape) == value.ndim and all(
                (sizes.setdefault(want, got) if isinstance(want, str) else want) == got
                for want, got in zip(shape, value.shape, strict=True)
            )
            if not fits:
                expected = [sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in shape]
                raise ExportError(f"{self.name} input {name}: expected shape {expected}, got {list(value.shape)}")
        return sizes

    def zeros(self, sizes: Mapping[str, int], *, prefix: str = "") -> dict[str, np.ndarray]:
        """Inputs of zeros, for warming up."""
        shapes = {name: value for name, value in self.inputs.items() if name.startswith(prefix)}
        return {
            name[len(prefix) :]: np.zeros([sizes[dim] if isinstance(dim, str) else dim for dim in shape], dtype)
            for name, (shape, dtype) in shapes.items()
        }

    def _pad(self, given: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
        padded = {}
        for name, value in given.items():
            shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.inputs[name][0])
            if value.shape != shape:  # on the host: padding on the device would compile for every new size
                array = np.zeros(shape, self.inputs[name][1])
                array[tuple(map(slice, value.shape))] = np.asarray(value)
                value = array
            padded[name] = value
        return padded

    def _out_avals(self) -> dict[str, Any]:
        return jax.tree.unflatten(self.exported.out_tree, self.exported.out_avals)

    def _check_signature(self) -> None:
        """Raises unless the module takes exactly what the manifest says."""
        args, kwargs = jax.tree.unflatten(self.exported.in_tree, self.exported.in_avals)
        if len(args) != 2 or kwargs or not all(isinstance(arg, dict) for arg in args):
            raise ExportError(f"{self.name}: expected a function of params and inputs")
        taken = [
            (self.params, args[0], {k: (v.shape, v.dtype) for k, v in self.params.items()}),
            (self.inputs, args[1], self.inputs),
        ]
        for wanted, avals, shapes in taken:
            if set(wanted) != set(avals):
                raise ExportError(f"{self.name}: expected arguments {sorted(wanted)}, the module takes {sorted(avals)}")
            for key, (shape, dtype) in shapes.items():
                got = tuple(dim if isinstance(dim, int) else str(dim) for dim in avals[key].shape)
                if tuple(shape) != got or dtype != avals[key].dtype:
                    raise ExportError(
                        f"{self.name} {key}: expected {dtype}{list(shape)}, the module takes {avals[key].dtype}{list(got)}"
                    )
        if set(self._out_avals()) != set(self.outputs):
            raise ExportError(f"{self.name}: expected outputs {sorted(self.outputs)}, the module gives others")


def verify(
    folder: str | Path, *, tolerance: float = 1e-4, sha256: str | None = None, max_bytes: int = MAX_BYTES
) -> dict[str, Any]:
    """Checks every checksum of a folder and replays its golden inputs.

    Args:
      folder: what `save` wrote.
      tolerance: largest |got - golden| / max(1, |golden|) of a float; integers must agree exactly. Wider for accelerators that
        multiply in lower precision.
      sha256: see `load`.
      max_bytes: see `load`.

    Returns:
      `version`; `max_abs_diff`, the largest difference of all; `functions`, the same for each function.

    Raises:
      ExportError: as `load`; an output that differs by more.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, sha256=sha256, max_bytes=max_bytes)
    for name in manifest["files"]:
        checked(folder, manifest, name)
    model = load(folder, sha256=sha256, max_bytes=max_bytes)
    golden = read_arrays(checked(folder, manifest, manifest["golden"]))
    axes = {"users": "b", "item": "n", "interaction": "c"}
    largest = {}
    for name, function in model.functions.items():
        inputs = {key.removeprefix(f"{name}.inputs/"): golden[key] for key in golden if key.startswith(f"{name}.inputs/")}
        expected = {key.removeprefix(f"{name}.outputs/"): golden[key] for key in golden if key.startswith(f"{name}.outputs/")}
        got = function.on_host(inputs, axes[name]) if name in axes else jax.device_get(function.on_device(inputs))
        if set(got) != set(expected):
            raise ExportError(f"{name}: expected golden outputs {sorted(got)}, got {sorted(expected)}")
        differences = {key: _difference(f"{name} {key}", got[key], expected[key], tolerance) for key in expected}
        largest[name] = max(differences.values(), default=0.0)
    return {"version": model.version, "max_abs_diff": max(largest.values(), default=0.0), "functions": largest}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Arrays by dotted name, from nested dicts or dataclasses; None is left out.

    Example:
      >>> flatten({"short": {"ids": {"item": 1}, "signature": None}, "floats": 2})
      {'short.ids.item': 1, 'floats': 2}
    """
    if isinstance(value, Mapping):
        named = value.items()
    elif dataclasses.is_dataclass(value):
        named = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        return {} if value is None else {prefix: value}
    flat: dict[str, Any] = {}
    for name, inner in named:
        flat |= flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    return flat


def read_manifest(folder: Path, *, sha256: str | None = None, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The manifest, its form checked; no other file is opened.

    Raises:
      ExportError: not a manifest of this format, another digest, a file name that leaves the folder, too many bytes.
    """
    path = folder / MANIFEST
    raw = _read(path, _regular_size(path, MANIFEST), limit=MANIFEST_BYTES)
    if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
        raise ExportError(f"{MANIFEST}: expected sha256 {sha256}, got {hashlib.sha256(raw).hexdigest()}")
    try:
        manifest = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{MANIFEST}: expected JSON, got something else ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ExportError(f"{MANIFEST}: expected format {FORMAT!r}")
    if manifest.get("format_version") != FORMAT_VERSION:
        version = manifest.get("format_version")
        raise ExportError(f"{MANIFEST}: expected format_version {FORMAT_VERSION}, got {version!r}; update the loader")
    _check_form(manifest)
    for name, entry in manifest["files"].items():
        if not PLAIN_NAME.fullmatch(name):
            raise ExportError(f"{MANIFEST} files: expected plain file names inside the folder, got {name!r}")
        size = entry.get("bytes") if isinstance(entry, dict) else None
        if type(size) is not int or size < 0 or not isinstance(entry.get("sha256"), str):
            raise ExportError(f"{MANIFEST} files {name!r}: expected bytes and sha256, got {entry!r}")
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    if total > max_bytes:
        raise ExportError(f"{MANIFEST}: expected at most {max_bytes} bytes in all, it lists {total}")
    return manifest


def checked(folder: Path, manifest: dict[str, Any], name: Any) -> bytes:
    """The bytes of a file that the manifest lists, after size and checksum fit."""
    entry = manifest["files"].get(name) if isinstance(name, str) else None
    if entry is None:
        raise ExportError(f"{MANIFEST}: expected {name!r} among its files, got {sorted(manifest['files'])}")
    size = _regular_size(folder / name, name)
    if size != entry["bytes"]:
        raise ExportError(f"{name}: expected {entry['bytes']} bytes, got {size}")
    raw = _read(folder / name, size, limit=size)
    digest = hashlib.sha256(raw).hexdigest()
    if digest != entry["sha256"]:
        raise ExportError(f"{name} was altered: expected sha256 {entry['sha256']}, got {digest}")
    return raw


def check_versions(manifest: dict[str, Any]) -> None:
    """Raises where this JAX cannot read the functions: exports read forward within JAX's window, not backward."""
    made, here = str(manifest["made_with"].get("jax")), jax.__version__
    advice = "params and config are still readable: `python -m aif_jax.export rebuild FOLDER NEW` writes the functions anew"
    if _release(made) > _release(here):
        raise ExportError(f"written under jax {made}, newer than jax {here} here: expected at least {made}; {advice}")
    low = jax.export.minimum_supported_calling_convention_version
    high = jax.export.maximum_supported_calling_convention_version
    for name, spec in manifest["functions"].items():
        version = spec.get("calling_convention_version")
        if type(version) is not int or not low <= version <= high:
            raise ExportError(
                f"{name}: written under jax {made} with calling convention {version}, jax {here} here reads {low} to {high}; "
                f"{advice}"
            )


def read_arrays(raw: bytes) -> dict[str, np.ndarray]:
    """Arrays of a safetensors file, as read-only views of its bytes.

    Raises:
      ExportError: a header that does not describe the bytes.
    """
    length = int.from_bytes(raw[:8], "little") if len(raw) >= 8 else -1
    if not 0 <= length <= min(len(raw) - 8, MANIFEST_BYTES):
        raise ExportError(f"arrays: expected a header of at most {min(len(raw) - 8, MANIFEST_BYTES)} bytes, got {length}")
    try:
        header = json.loads(raw[8 : 8 + length])
        header.pop("__metadata__", None)
        entries = [(str(k), DTYPES[v["dtype"]], tuple(v["shape"]), *v["data_offsets"]) for k, v in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ExportError(f"arrays: expected a safetensors header, got something else ({error!r})") from None
    for name, _, shape, start, stop in entries:
        if any(type(number) is not int or number < 0 for number in (*shape, start, stop)):
            raise ExportError(f"arrays {name!r}: expected sizes and offsets of at least 0, got {shape}, {start}, {stop}")
    data = memoryview(raw)[8 + length :]
    arrays, end = {}, 0
    for name, dtype, shape, start, stop in sorted(entries, key=lambda entry: entry[3:]):
        size = math.prod(shape) * dtype.itemsize
        if start != end or stop - start != size:
            raise ExportError(f"arrays {name!r}: expected {size} bytes from {end}, got {start} to {stop}")
        arrays[name], end = np.frombuffer(data[start:stop], dtype).reshape(shape), stop
    if end != len(data):
        raise ExportError(f"arrays: expected {end} bytes of data, got {len(data)}")
    return arrays


def _deserialize(raw: bytes, name: str) -> Any:
    try:
        exported = jax.export.deserialize(bytearray(raw))
        text = exported.mlir_module()
    except Exception as error:  # whatever JAX says of a foreign blob, in words that name the function
        raise ExportError(f"{name}: expected a function serialised by jax.export, jax {jax.__version__} says {error}") from None
    # A call to a host function could run anything in this process, so only those that JAX itself needs are let through.
    rest = SAFE_CALLS.sub("", text)
    if "custom_call" in rest:
        line = next(line.strip()[:120] for line in rest.splitlines() if "custom_call" in line)
        raise ExportError(f"{name}: expected no calls out of the module, got one: {line}")
    return exported


def _axes(manifest: dict[str, Any], buckets: Mapping[str, Sequence[int]]) -> dict[str, Axis]:
    unknown = sorted(set(buckets) - set(manifest["axes"]))
    if unknown:
        raise ExportError(f"buckets: expected axes among {sorted(manifest['axes'])}, got {unknown}")
    axes = {}
    for name, spec in manifest["axes"].items():
        try:
            sizes = tuple(sorted({int(size) for size in buckets.get(name, spec["buckets"])}))
            axes[name] = Axis(name, int(spec["minimum"]), sizes, bool(spec["trim"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ExportError(f"axis {name!r}: expected minimum, buckets and trim, got {spec!r} ({error!r})") from None
        if not sizes or sizes[0] < axes[name].minimum:
            raise ExportError(f"buckets {name!r}: expected sizes of at least {axes[name].minimum}, got {list(sizes)}")
    return axes


def _check_form(manifest: dict[str, Any]) -> None:
    """Raises unless the fields that the loader walks have the types that it expects."""
    wanted = {"files": dict, "functions": dict, "axes": dict, "config": dict, "made_with": dict, "version": str, "params": str}
    for name, kind in (wanted | {"golden": str}).items():
        if not isinstance(manifest.get(name), kind):
            raise ExportError(f"{MANIFEST} {name}: expected {kind.__name__}, got {type(manifest.get(name)).__name__}")
    for needed in ("user", "users", "item", "interaction"):
        spec = manifest["functions"].get(needed)
        if not isinstance(spec, dict) or not all(isinstance(spec.get(part), list) for part in PARTS):
            raise ExportError(f"{MANIFEST} functions: expected {needed!r} with inputs, outputs, params and ignored")
        for entry in (*spec["inputs"], *spec["outputs"]):
            known = isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("shape"), list)
            if not known or not all(type(d) is int or (type(d) is str and d in manifest["axes"]) for d in entry["shape"]):
                raise ExportError(f"{MANIFEST} {needed}: expected name, shape and dtype, got {entry!r}")


def _regular_size(path: Path, name: str) -> int:
    try:
        found = path.lstat()
    except OSError as error:
        raise ExportError(f"{name}: expected a file in {path.parent}, got none ({error.strerror})") from None
    if not stat.S_ISREG(found.st_mode):  # a link could lead out of the folder
        raise ExportError(f"{name}: expected a regular file, got a link, a folder or a device")
    return found.st_size


def _read(path: Path, size: int, *, limit: int) -> bytes:
    if size > limit:
        raise ExportError(f"{path.name}: expected at most {limit} bytes, got {size}")
    with path.open("rb") as file:
        return file.read(size + 1)  # one more than expected, so that a file that grew meanwhile does not pass


def _read_vocabularies(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Raw ids by attribute: int64, or strings as UTF-8 bytes with offsets."""
    found = {}
    for key, value in arrays.items():
        name, _, kind = key.rpartition("/")
        if kind == "ids":
            found[name] = value
        elif kind == "utf8":
            ends = arrays[f"{name}/offsets"].tolist()
            text = value.tobytes()
            found[name] = np.array([text[a:b].decode() for a, b in zip(ends[:-1], ends[1:], strict=True)], dtype=np.str_)
    return found


def _difference(what: str, got: Any, expected: np.ndarray, tolerance: float) -> float:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise ExportError(f"{what}: golden output {expected.dtype}{list(expected.shape)}, got {got.dtype}{list(got.shape)}")
    if not expected.size:
        return 0.0
    wanted = expected.astype(np.float64)
    gap = np.abs(got.astype(np.float64) - wanted)
    allowed = tolerance * np.maximum(1.0, np.abs(wanted)) if jnp.issubdtype(expected.dtype, jnp.floating) else 0.0
    if not (gap <= allowed).all():
        raise ExportError(f"{what}: expected the golden output within {tolerance}, got a difference of {gap.max()}")
    return float(gap.max())


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0].split(".dev")[0])[:3])
