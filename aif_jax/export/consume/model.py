"""An exported model: user, item and interaction as functions of flat dicts of arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from .files import ORDER, PROBABILITY, ExportError, checked, checked_arrays, expect, local, read_manifest
from .functions import Function, axis_of, read_axes
from .ids import HASHES, Ids, ids_by_name


def load(folder: str | Path, *, buckets: Mapping[str, Sequence[int]] | None = None, sha256: str | None = None) -> ExportedModel:
    """Read an exported folder, checksums first, as functions of flat dicts of arrays.

    Functions are programs that this process runs: without `sha256`, whoever can write the folder can run code here.

    Args:
      folder: what `aif_jax.export.save` wrote.
      buckets: sizes that are compiled, by axis, in place of the manifest's: "c" candidates, "l" history, "n" catalogue rows.
        Every size is padded up to the next bucket, so that a new count does not compile.
      sha256: digest of the manifest as `save` returned it, which pins the whole folder.

    Raises ExportError: a file is missing or altered; the format or JAX is of another version.
    """
    folder = local(folder)
    manifest = read_manifest(folder, sha256=sha256)
    check_versions(manifest)
    return ExportedModel(folder, manifest, buckets=buckets)


class ExportedIndex:
    """The rows of an exported index.

    Attributes:
      ids, table: int64 [N], ascending (of strings their two hashes), and arrays [N] on the device by path.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        kinds = {name: array for name, array in arrays.items() if name in ("ids", *HASHES)}
        self._known = Ids(kinds, "index")
        self.ids = self._known.raw
        table = {name: array for name, array in arrays.items() if name not in kinds}
        if other := [name for name, array in table.items() if array.shape[:1] != (len(self.ids),)]:
            raise ExportError(f"index: expected {len(self.ids)} rows, got another number in {other}")
        self.table: dict[str, jax.Array] = jax.device_put(table)

    def lookup(self, ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return rows int64 [C] for raw item ids, 0 for unknown ones, and which are known; ExportError for other kinds."""
        places = self._known.positions(ids)
        return np.maximum(places, 0), places >= 0


class ExportedModel:
    """User, item and interaction of one exported model.

    Inputs are dicts of arrays, flat ("history.item") or nested, or dataclasses of `aif_jax`. Dtypes, shapes and values
    must be those that the manifest names; an input that the model does not read may be left out.

    Attributes:
      manifest: the parsed manifest.
      version: fingerprint of params, config and encoder.
      encoding: version of the encoder that features must come from; "" where the export has none.
      config: the model's config, its schema included, as JSON values.
      orders: names of the orders.
      index: the exported index, or None.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], *, buckets: Mapping[str, Sequence[int]] | None = None):
        self.manifest = manifest
        self.version: str = manifest["version"]
        self.encoding: str = manifest["encoding"]
        self.config: dict[str, Any] = manifest["config"]
        self.orders: tuple[str, ...] = tuple(manifest.get("orders", ()))
        axes = read_axes(manifest, buckets or {})
        params = jax.device_put(checked_arrays(folder, manifest, manifest["params"]))
        self.functions = {
            name: Function(name, spec, checked(folder, manifest, spec.get("file")), params, axes)
            for name, spec in manifest["functions"].items()
        }
        self._score = jax.jit(self._gather_and_score)
        encoder = manifest.get("encoder") or {}
        self._vocabularies = ids_by_name(checked_arrays(folder, manifest, encoder.get("file"))) if encoder else {}
        self._actions = _listed_actions(encoder)
        self.index = ExportedIndex(checked_arrays(folder, manifest, manifest["index"])) if manifest.get("index") else None

    def user(self, features: Any) -> dict[str, jax.Array]:
        """Return the state of ONE user, on the device; its history is padded to its bucket, or cut to what the model reads.

        Raises:
          ExportError: features of another encoder, or that do not fit the schema: names, dtypes, shapes, ids out of range,
            floats that are not finite, negative ages.
        """
        return self.functions["user"].on_device(self._features(features))

    def item(self, features: Any) -> dict[str, np.ndarray]:
        """Return rows of N items, all inputs with a leading axis N; any N, in blocks of bounded size; raises as `user`."""
        return self.functions["item"].on_host(self._features(features))

    def interaction(self, state: Any, rows: Any) -> np.ndarray:
        """Return logits float32 [C], or [C, T] of T objectives, of one user's state and C rows; any C."""
        given = {f"state.{k}": v for k, v in flatten(state).items()} | {f"rows.{k}": v for k, v in flatten(rows).items()}
        return self.functions["interaction"].on_host(given)["logits"]

    def score(self, state: Any, table: Mapping[str, Any], rows: np.ndarray) -> np.ndarray:
        """Return logits float32 [C] or [C, T] of the rows of a table on the device: gather and interaction in one program.

        Args:
          state: state of one user.
          table: what `item` returned, put on a device, or `index.table`; compiled once for each number of rows.
          rows: integers [C] in [0, N).

        Raises ExportError: rows that the table does not have.
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
        states = jax.device_put(function.prepared(given, prefix="state.")[0])
        columns = {name: table[name] for name in needed}
        blocks = [np.zeros((0, *function.outputs["logits"].shape[1:]), np.float32)]  # type: ignore[arg-type]
        for start, stop, bucket in function.axes["c"].blocks(len(rows)):
            padded = np.zeros(bucket, np.int32)
            padded[: stop - start] = rows[start:stop]
            logits = self._score(function.params, states, columns, jax.device_put(padded))
            blocks.append(jax.device_get(logits)[: stop - start])
        return np.concatenate(blocks)

    def probabilities(self, logits: Any) -> np.ndarray:
        """Return calibrated probabilities of logits, of their shape; that of a conditional objective is given its condition.

        Raises:
          ExportError: logits that do not fit; an export of one objective without calibration or orders: then it is the sigmoid.
        """
        expected, got = "a calibration, orders or several objectives", "none; export a calibrated model"
        expect(PROBABILITY in self.functions, "probabilities", expected, got)
        return self.functions[PROBABILITY].on_host({"logits": np.asarray(logits)})["probabilities"]

    def value(self, order: str, logits: Any, bid: Any = None) -> np.ndarray:
        """Return what candidates are ranked by, float32 [C]: an order that the model was exported with.

        Args:
          order: its name among `orders`.
          logits: float32 [C] or [C, T].
          bid: float32 [C], such as "side.bid" of `index.table`; None for an order that does not read it.

        Raises ExportError: another order, logits or bids that do not fit.
        """
        expect(order in self.orders, "order", f"one of {sorted(self.orders)}", repr(order))
        p = self.functions[PROBABILITY].on_host({"logits": np.asarray(logits)})
        given = {name: values for name, values in p.items() if name.startswith("p.")}
        given |= {} if bid is None else {"bid": np.asarray(bid)}
        return self.functions[f"{ORDER}{order}"].on_host(given)["scores"]

    def encode(self, name: str, raw: Any) -> np.ndarray:
        """Encode raw ids of a vocabulary as int32 rows of the same shape, 0 for unknown ones; ExportError for other kinds.

        "action" takes raw actions, as integers or texts, also where the columns of the training files listed them.
        """
        if name == "action" and self._actions:
            given = np.array(raw, object)
            rows = [self._actions.get(str(value), 0) for value in given.reshape(-1).tolist()]
            return np.array(rows, np.int32).reshape(given.shape)
        names = sorted({*self._vocabularies, *(["action"] if self._actions else [])})
        expect(name in self._vocabularies, "vocabulary", f"one of {names}", repr(name))
        return (self._vocabularies[name].positions(raw) + 1).astype(np.int32)

    def _features(self, features: Any) -> dict[str, Any]:
        """Return features by name; their encoding must be the model's where both are known."""
        given = flatten(features)
        encoding = given.pop("encoding", getattr(features, "encoding", ""))
        fits = not self.encoding or (isinstance(encoding, str) and encoding in ("", self.encoding))
        why = "their ids and floats mean something else to this model: encode with the encoder that it was exported with"
        expect(fits, "features", f"the encoding {self.encoding}", f"{encoding}; {why}")
        return given

    def _gather_and_score(self, params, states, columns, rows):
        gathered = {f"rows.{name}": column[rows] for name, column in columns.items()}
        return self.functions["interaction"].exported.call(params, states | gathered)["logits"]


def verify(folder: str | Path, *, tolerance: float = 1e-4, sha256: str | None = None) -> dict[str, Any]:
    """Check every checksum of a folder and replay its golden inputs, on this process's device.

    Args:
      folder: as `load`.
      tolerance: largest |got - golden| / max(1, |golden|) of a float, more on accelerators of low precision; integers: exact.
      sha256: digest of the manifest, as `save` returned it: pins every file; None: not compared.

    Returns:
      `version`; `max_abs_diff`, the largest difference of all; `functions`, the same for each function.

    Raises ExportError: as `load`; an output that differs by more.
    """
    model, folder = load(folder, sha256=sha256), Path(folder)
    for name in model.manifest["files"]:
        checked(folder, model.manifest, name)
    golden, largest = checked_arrays(folder, model.manifest, model.manifest["golden"]), {}
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


def flatten(value: Any) -> dict[str, Any]:
    """Return arrays by dotted name, from nested dicts, tuples or dataclasses of `aif_jax`; None is left out.

    Example:
      >>> flatten({"history": {"item": 1, "mask": 3}, "content": None, "floats": 2})
      {'floats': 2, 'history.item': 1, 'history.mask': 3}
    """
    leaves = jax.tree_util.tree_flatten_with_path(value)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def check_versions(manifest: Mapping[str, Any]) -> None:
    """Raise where this JAX cannot read the functions: exports read forward within JAX's window, not backward."""
    made, here = str(manifest["made_with"].get("jax")), jax.__version__
    advice = "params and config are still readable: save aif_jax.open(folder) by aif_jax.export.save"
    expect(_release(made) <= _release(here), "jax", f"at least {made}, which wrote this export", f"{here}; {advice}")
    low = jax.export.minimum_supported_calling_convention_version
    high = jax.export.maximum_supported_calling_convention_version
    for name, spec in manifest["functions"].items():
        version = spec.get("calling_convention_version")
        reads = type(version) is int and low <= version <= high
        expected = f"a calling convention of {low} to {high}, as jax {here} reads"
        expect(reads, name, expected, f"{version} of jax {made}; {advice}")


def _listed_actions(encoder: Mapping[str, Any]) -> dict[str, int]:
    """Return numbers 1, 2, ... of the actions that the columns list, by their text; {} if their vocabulary has them."""
    for part in ("record", "columns", "actions"):
        encoder = encoder.get(part) if isinstance(encoder, dict) else None  # type: ignore[assignment]
    return {str(value): number for number, value in enumerate(encoder, start=1)} if isinstance(encoder, list) else {}


def difference(what: str, got: Any, expected: np.ndarray, tolerance: float) -> float:
    """Return the largest difference from a golden output; ExportError where it is more than the tolerance allows."""
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
