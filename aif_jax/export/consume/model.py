"""An exported model: user, item and interaction as functions of flat dicts of arrays."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from .files import ORDER, PROBABILITY, ExportError, checked, digest_of, expect, local, memory, read_arrays, read_manifest
from .functions import Function, Ids, axis_of, read_axes

try:
    import resource
except ModuleNotFoundError:  # on Windows, where there is a limit of time alone
    resource = None

MAX_SECONDS = 300.0


def load(
    folder: str | Path,
    *,
    buckets: Mapping[str, Sequence[int]] | None = None,
    sha256: str | None = None,
    max_bytes: int | None = None,
    trusted: bool = False,
    max_seconds: float = MAX_SECONDS,
) -> ExportedModel:
    """Reads an exported folder, checksums first, as functions of flat dicts of arrays.

    A server gives `sha256`: then nothing but the folder that `save` wrote is read, at once. Without it (or `trusted`) a child
    process first does what `verify` does, which takes the time of a start of JAX and of compiling every function.

    Args:
      folder: what `aif_jax.export.save` wrote.
      buckets: sizes that are compiled, by axis, in place of the manifest's: "c" candidates, "l" history, "n" catalogue rows,
        "b" users. Every size is padded up to the next bucket, so that a new count does not compile.
      sha256: the digest of the manifest as `save` returned it; given, the whole folder is pinned to it.
      max_bytes: refuse folders that say they are larger, and functions that take more memory in a child process; None takes
        half of the memory of this machine.
      trusted: whoever can write the folder may run code here: no child process.
      max_seconds: limit of time of the child process.

    Raises:
      ExportError: a file is missing, altered, misplaced or too large; the format or JAX is of another version; the functions
        crash, take too long or too much memory in the child process.
    """
    folder = local(folder)
    manifest, _ = _open(folder, math.inf, sha256, max_bytes, trusted, max_seconds)
    return ExportedModel(folder, manifest, buckets=buckets)


@dataclasses.dataclass(frozen=True)
class ExportedIndex:
    """The rows of an exported index.

    Attributes:
      ids, table: int64 [N], ascending (hashes of string ids), and arrays [N] on the device by path.
    """

    ids: np.ndarray
    table: dict[str, jax.Array]
    _known: Ids = dataclasses.field(repr=False)

    def lookup(self, ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """Rows int64 [C] for raw item ids, 0 for unknown ones, and which are known; ExportError for ids of another kind."""
        places = self._known.positions(ids)
        return np.maximum(places, 0), places >= 0


class ExportedModel:
    """User, item and interaction of one exported model.

    Inputs are dicts of arrays, flat ("history.item") or nested, or dataclasses with those fields. Dtypes, shapes and values
    must be those that the manifest names; an input that the model does not read may be left out.

    Attributes:
      manifest: the parsed manifest.
      version: fingerprint of params, config and encoder.
      encoding: version of the encoder that features must come from; "" where the export has none.
      config: the model's config, its schema included, as JSON values.
      orders: text of the score expressions by name.
      index: the exported index, or None.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], *, buckets: Mapping[str, Sequence[int]] | None = None):
        def arrays(name: Any) -> dict[str, np.ndarray]:
            return read_arrays(checked(folder, manifest, name))

        self.manifest = manifest
        self.version: str = manifest["version"]
        self.encoding: str = manifest["encoding"]
        self.config: dict[str, Any] = manifest["config"]
        self.orders: dict[str, str] = dict(manifest.get("orders", {}))
        axes, params = read_axes(manifest, buckets or {}), jax.device_put(arrays(manifest["params"]))
        self.functions = {
            name: Function(name, spec, checked(folder, manifest, spec.get("file")), params, axes)
            for name, spec in manifest["functions"].items()
        }
        self._score = jax.jit(self._gather_and_score)
        self._vocabularies = _vocabularies(arrays(manifest["encoder"].get("file"))) if manifest.get("encoder") else {}
        self.index = _index(arrays(manifest["index"])) if manifest.get("index") else None

    def user(self, features: Any) -> dict[str, jax.Array]:
        """The state of ONE user, on the device; its history is padded to its bucket, or cut to the places that the model reads.

        Raises:
          ExportError: features of another encoder, or that do not fit the schema: names, dtypes, shapes, ids out of range,
            floats that are not finite, negative ages.
        """
        return self.functions["user"].on_device(self._features(features))

    def users(self, features: Any) -> dict[str, np.ndarray]:
        """States of B users, all inputs with a leading axis B; raises as `user`."""
        return self.functions["users"].on_host(self._features(features))

    def item(self, features: Any) -> dict[str, np.ndarray]:
        """Rows of N items, all inputs with a leading axis N; any N, in blocks of bounded size; raises as `user`."""
        return self.functions["item"].on_host(self._features(features))

    def interaction(self, state: Any, rows: Any) -> np.ndarray:
        """Logits float32 [C], or [C, T] of T objectives, of one user's state and C rows; any C."""
        given = {f"state.{k}": v for k, v in flatten(state).items()} | {f"rows.{k}": v for k, v in flatten(rows).items()}
        return self.functions["interaction"].on_host(given)["logits"]

    def score(self, state: Any, table: Mapping[str, Any], rows: np.ndarray) -> np.ndarray:
        """Logits float32 [C] or [C, T] of the rows of a table on the device: gather and interaction in one compiled function.

        Args:
          state: state of one user.
          table: what `item` returned, put on a device, or `index.table`; compiled once for each number of rows.
          rows: integers [C] in [0, N).

        Raises:
          ExportError: rows that the table does not have.
        """
        function, rows = self.functions["interaction"], np.asarray(rows)
        expect(rows.ndim == 1 and rows.dtype.kind in "iu", "rows", "integers [C]", f"{rows.dtype}{list(rows.shape)}")
        needed = [name[5:] for name in function.inputs if name.startswith("rows.")]
        if missing := [name for name in needed if name not in table]:
            raise ExportError(f"table: expected columns {needed}, got none named {missing}")
        size = len(table[needed[0]])
        if rows.size and (rows.min() < 0 or rows.max() >= size):
            raise ExportError(f"rows: expected values in [0, {size}), got {rows.min()} to {rows.max()}")
        given = {f"state.{name}": value for name, value in flatten(state).items()}
        states = jax.device_put(function.take(given, [name for name in function.inputs if name.startswith("state.")]))
        columns = {name: table[name] for name in needed}
        blocks = [np.zeros((0, *function.outputs["logits"].shape[1:]), np.float32)]  # type: ignore[arg-type]
        for start, stop, bucket in function.axes["c"].blocks(len(rows)):
            padded = np.zeros(bucket, np.int32)
            padded[: stop - start] = rows[start:stop]
            logits = self._score(function.params, states, columns, jax.device_put(padded))
            blocks.append(jax.device_get(logits)[: stop - start])
        return np.concatenate(blocks)

    def probabilities(self, logits: Any) -> np.ndarray:
        """Calibrated probabilities of logits, of their shape; that of a conditional objective is where its condition is true.

        Raises:
          ExportError: logits that do not fit; an export of one objective without calibration or orders: then it is the sigmoid.
        """
        expected, got = "a calibration, orders or several objectives", "none; export a calibrated model"
        expect(PROBABILITY in self.functions, "probabilities", expected, got)
        return self.functions[PROBABILITY].on_host({"logits": np.asarray(logits)})["probabilities"]

    def value(self, order: str, logits: Any, side: Mapping[str, Any] | None = None) -> np.ndarray:
        """What candidates are ranked by, float32 [C]: a score expression that the model was exported with.

        Args:
          order: its name among `orders`.
          logits: float32 [C] or [C, T].
          side: float32 [C] each: the side values that it reads, of `index.table` ("side.bid" is "bid") or from elsewhere.

        Raises:
          ExportError: another order, logits or side values that do not fit.
        """
        expect(order in self.orders, "order", f"one of {sorted(self.orders)}", repr(order))
        function = self.functions[f"{ORDER}{order}"]
        given = {f"side.{name}": np.asarray(values) for name, values in (side or {}).items()}
        return function.on_host({"logits": np.asarray(logits)} | given)["scores"]

    def warm_up(self, *, table: Mapping[str, Any] | None = None) -> ExportedModel:
        """Compiles user function and interaction at their buckets, before requests come; `score` too for a `table`."""
        user, interaction = self.functions["user"], self.functions["interaction"]
        for length in user.axes["l"].buckets if "l" in user.used_axes else (1,):
            state = self.user(user.zeros({"l": length}))
            for count in interaction.axes["c"].buckets:
                self.interaction(state, interaction.zeros({"c": count}, prefix="rows."))
                if table is not None:
                    self.score(state, table, np.zeros(count, np.int32))
        return self

    def encode(self, name: str, raw: Any) -> np.ndarray:
        """Raw ids of a vocabulary to int32 rows of the same shape, 0 for unknown ones; ExportError for other names or kinds."""
        expect(name in self._vocabularies, "vocabulary", f"one of {sorted(self._vocabularies)}", repr(name))
        known, rows = self._vocabularies[name]
        return rows[known.positions(raw)]

    def _features(self, features: Any) -> dict[str, Any]:
        """Features by name; their encoding must be the model's where both are known."""
        given = flatten(features)
        encoding = given.pop("encoding", "")
        fits = not self.encoding or (isinstance(encoding, str) and encoding in ("", self.encoding))
        why = "their ids and floats mean something else to this model: encode with the encoder that it was exported with"
        expect(fits, "features", f"the encoding {self.encoding}", f"{encoding}; {why}")
        return given

    def _gather_and_score(self, params, states, columns, rows):
        gathered = {f"rows.{name}": column[rows] for name, column in columns.items()}
        return self.functions["interaction"].exported.call(params, states | gathered)["logits"]


def verify(
    folder: str | Path,
    *,
    tolerance: float = 1e-4,
    sha256: str | None = None,
    max_bytes: int | None = None,
    trusted: bool = False,
    max_seconds: float = MAX_SECONDS,
) -> dict[str, Any]:
    """Checks every checksum of a folder and replays its golden inputs, in a child process unless the folder is trusted.

    The child process runs on the CPU. With `trusted` or `sha256` the functions run here, on this process's device.

    Args:
      folder, sha256, max_bytes, trusted, max_seconds: as `load`.
      tolerance: largest |got - golden| / max(1, |golden|) of a float; integers must agree exactly. Wider for accelerators that
        multiply in lower precision.

    Returns:
      `version`; `max_abs_diff`, the largest difference of all; `functions`, the same for each function.

    Raises:
      ExportError: as `load`; an output that differs by more.
    """
    folder = local(folder)
    manifest, report = _open(folder, tolerance, sha256, max_bytes, trusted, max_seconds)
    if report is not None:
        return report
    for name in manifest["files"]:
        checked(folder, manifest, name)
    model = ExportedModel(folder, manifest)
    golden = read_arrays(checked(folder, manifest, manifest["golden"]))
    largest = {}
    for name, function in model.functions.items():
        inputs, expected = (
            {key.removeprefix(start): golden[key] for key in golden if key.startswith(start)}
            for start in (f"{name}.inputs/", f"{name}.outputs/")
        )
        try:
            got = function.on_host(inputs) if axis_of(name) else jax.device_get(function.on_device(inputs))
        except ExportError:
            raise
        except Exception as error:  # whatever a foreign function does when it runs
            raise ExportError(f"{name}: expected golden outputs, the function failed: {error}") from error
        expect(set(got) == set(expected), name, f"golden outputs {sorted(expected)}", sorted(got))
        differences = {key: difference(f"{name} {key}", got[key], expected[key], tolerance) for key in expected}
        largest[name] = max(differences.values(), default=0.0)
    return {"version": model.version, "max_abs_diff": max(largest.values(), default=0.0), "functions": largest}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Arrays by dotted name, from nested dicts, tuples or dataclasses; None is left out.

    Example:
      >>> flatten({"history": {"item": 1, "mask": 3}, "content": None, "floats": 2})
      {'history.item': 1, 'history.mask': 3, 'floats': 2}
    """
    if isinstance(value, Mapping):
        named = value.items()
    elif dataclasses.is_dataclass(value):
        named = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, tuple):
        named = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    else:
        return {} if value is None else {prefix: value}
    flat: dict[str, Any] = {}
    for name, inner in named:
        flat |= flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    return flat


def check_versions(manifest: Mapping[str, Any]) -> None:
    """Raises where this JAX cannot read the functions: exports read forward within JAX's window, not backward."""
    made, here = str(manifest["made_with"].get("jax")), jax.__version__
    advice = "params and config are still readable: `aif_jax.export.rebuild(folder, new)` writes the functions again"
    expect(_release(made) <= _release(here), "jax", f"at least {made}, which wrote this export", f"{here}; {advice}")
    low = jax.export.minimum_supported_calling_convention_version
    high = jax.export.maximum_supported_calling_convention_version
    for name, spec in manifest["functions"].items():
        version = spec.get("calling_convention_version")
        reads = type(version) is int and low <= version <= high
        expected = f"a calling convention of {low} to {high}, as jax {here} reads"
        expect(reads, name, expected, f"{version} of jax {made}; {advice}")


def _open(
    folder: Path, tolerance: float, sha256: str | None, max_bytes: int | None, trusted: bool, max_seconds: float
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The manifest, and for a folder that is neither pinned nor trusted the report of the child process that checked it."""
    digest = sha256 or digest_of(folder)  # the child and this process read the same bytes
    manifest = read_manifest(folder, sha256=digest, max_bytes=max_bytes)
    check_versions(manifest)
    if trusted or sha256 is not None:
        return manifest, None
    for name in manifest["files"]:  # before a child process, which takes seconds
        checked(folder, manifest, name)
    limits = {"max_bytes": max_bytes, "max_seconds": max_seconds}
    return manifest, verify_in_child(folder, manifest["platforms"], tolerance=tolerance, sha256=digest, **limits)


def _vocabularies(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[Ids, np.ndarray]]:
    """Ids and their rows int32 [n + 1], 0 for position -1, from "NAME/ids", or "NAME/utf8" and "NAME/offsets".

    A vocabulary of fixed size has "NAME/rows" too; its counts are of no use here.
    """
    parts: dict[str, dict[str, np.ndarray]] = {}
    for path, array in arrays.items():
        name, _, kind = path.rpartition("/")
        parts.setdefault(name, {})[kind] = array
    made = {}
    for name, part in parts.items():
        more = {"rows", "size", "count", "last"} if "rows" in part else set()  # and the ids that are counted
        ids = {kind: part[kind] for kind in part.keys() - more if not (more and kind.startswith("counted_"))}
        known = Ids(ids, f"vocabulary {name!r}")
        rows = part.get("rows", np.arange(1, len(known) + 1))
        if rows.shape != (len(known),) or rows.dtype.kind != "i" or (rows < 1).any():
            raise ExportError(f"vocabulary {name!r}: expected a row of at least 1 for each of {len(known)} ids, got {rows[:5]}")
        made[name] = known, np.append(rows, 0).astype(np.int32)
    return made


def _index(arrays: Mapping[str, np.ndarray]) -> ExportedIndex:
    kinds = {name: array for name, array in arrays.items() if name in ("ids", "keys")}
    known = Ids(kinds, "index")
    # Marks tell strings of one hash apart where an index is restored; here a hash is enough.
    table = {name: array for name, array in arrays.items() if name not in kinds and name != "marks"}
    if other := [name for name, array in table.items() if array.shape[:1] != (len(known),)]:
        raise ExportError(f"index: expected {len(known)} rows, got another number in {other}")
    return ExportedIndex(known.raw, jax.device_put(table), known)


def difference(what: str, got: Any, expected: np.ndarray, tolerance: float) -> float:
    """The largest difference from a golden output; ExportError where it is more than the tolerance allows."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise ExportError(f"{what}: expected {expected.dtype}{list(expected.shape)}, got {got.dtype}{list(got.shape)}")
    if not expected.size:
        return 0.0
    wanted = expected.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinities are refused below
        gap = np.abs(got.astype(np.float64) - wanted)
    allowed = tolerance * np.maximum(1.0, np.abs(wanted)) if jnp.issubdtype(expected.dtype, jnp.floating) else 0.0
    expect((gap <= allowed).all(), what, f"the golden output within {tolerance}", f"a difference of {gap.max()}")
    return float(gap.max())


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d{1,9}", version.split("+")[0].split(".dev")[0])[:3])


# This very package, imported by its path: neither the folder, nor the working directory, nor other packages are imported.
START = """
import importlib.util, sys
home, order, *sys.path[:] = sys.argv[1:]
spec = importlib.util.spec_from_file_location("consume", home + "/__init__.py", submodule_search_locations=[home])
sys.modules["consume"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
importlib.import_module("consume.model").verify_within(order)
"""
SETTINGS = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0", "MALLOC_ARENA_MAX": "2"}
"""Accelerators belong to the parent; an arena of memory for each thread would count as memory that the functions take."""


def verify_in_child(
    folder: Path, platforms: Any, *, tolerance: float, sha256: str, max_bytes: int | None, max_seconds: float
) -> dict[str, Any]:
    """The report of `verify(folder, trusted=True)`, run on the CPU of a child process.

    Raises:
      ExportError: as `verify`; the child crashed, or took more than `max_bytes` (None: half of the memory) or `max_seconds`;
        functions that do not run on a CPU.
    """
    expect("cpu" in platforms, "platforms", "cpu, where a child process checks", f"{platforms}; trusted=True runs here")
    limit = memory() // 2 if max_bytes is None else max_bytes
    order = {"folder": str(folder.absolute()), "tolerance": tolerance, "sha256": sha256, "max_bytes": max_bytes}
    path = [os.path.abspath(entry) for entry in sys.path if entry]
    command = [sys.executable, "-I", "-c", START, str(Path(__file__).parent), json.dumps([order, limit, max_seconds]), *path]
    what = "functions: expected ones that a child process can read and run with the golden inputs"
    try:
        done = subprocess.run(
            command, env=os.environ | SETTINGS, stdin=subprocess.DEVNULL, capture_output=True, timeout=max_seconds
        )
    except subprocess.TimeoutExpired:
        raise ExportError(f"{what} in at most {max_seconds:g} s, got no end; max_seconds sets the limit") from None
    except OSError as error:
        raise ExportError(f"{what}, got no child process ({error}); trusted=True does without") from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ExportError(f"{what} in at most {limit} bytes of memory, it died of {name}; max_bytes sets the limit")
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        words = done.stderr.decode(errors="replace").strip()[-500:]
        raise ExportError(f"{what}, it ended with code {done.returncode}: {words}") from None
    if "error" in answer:
        raise ExportError(answer["error"])
    return answer


def verify_within(text: str) -> None:
    """The child: takes its limits, verifies, prints the report or the error as JSON."""
    order, limit, seconds = json.loads(text)
    jax.devices()  # what JAX itself needs is not counted
    if resource is not None:
        # The parent stops a child that takes too long; by its processor time it also ends where the parent was killed.
        processor = int(min(seconds, 1e6) * (os.cpu_count() or 1)) + 1
        limits = {resource.RLIMIT_AS: _address_space() + limit, resource.RLIMIT_CPU: processor, resource.RLIMIT_CORE: 0}
        for kind, most in limits.items():
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        answer = verify(trusted=True, **order)
    except ExportError as error:
        answer = {"error": str(error)[:2000]}
    except MemoryError:
        answer = {"error": f"functions: expected ones that run in at most {limit} bytes of memory; max_bytes sets the limit"}
    print("\n" + json.dumps(answer), flush=True)
    os._exit(0)  # nothing of the functions runs any more


def _address_space() -> int:
    """Bytes of address space that this process has."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):
        return 8 << 30
    return pages * os.sysconf("SC_PAGE_SIZE")
