"""Writes a model as one folder: functions, parameters, config, encoder, golden case, checksums, the loader."""

import dataclasses
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aif_jax.checks import VersionMismatch, expect, needs_extra
from aif_jax.config import Config
from aif_jax.export import consume, functions
from aif_jax.export.consume import files
from aif_jax.export.consume.ids import HASHES, TEXT
from aif_jax.export.functions import golden_case
from aif_jax.features import LENGTH, Leaf, item_layout, user_layout
from aif_jax.index import ItemIndex
from aif_jax.schema import Schema
from aif_jax.scores import Order, reads_bid
from aif_jax.store.folders import new_folder
from aif_jax.store.sealed import digest_of, write_arrays
from aif_jax.store.trained import Trained, __version__
from aif_jax.trees import leaves_by_path

PLATFORMS = ("cpu", "cuda", "tpu")
KNOWN = (*PLATFORMS, "rocm")
PACKAGES = ("jax", "jaxlib", "numpy", "flax")


def save(
    folder: str | Path, trained: Trained, index: ItemIndex | None = None,
    *, platforms: tuple[str, ...] = PLATFORMS, orders: Mapping[str, Order] | None = None,
) -> str:  # fmt: skip
    """Write a model for a place without its code, replay the golden case, and only then give the folder its name.

    Args:
      folder: that does not exist yet.
      trained: model to write, with its encoder: vocabularies and scales travel with the model.
      index: an `ItemIndex` of the same version, or None.
      platforms: names among "cpu", "cuda", "rocm", "tpu", this process's too, all served by the same artefact.
      orders: JAX functions of probabilities and bid by name, see `aif_jax.scores`; the export has them compiled, no Python.

    Returns:
      sha256 of the manifest, which pins every other file: give it to `load(folder, sha256=...)`.

    Raises:
      FileExistsError: the folder exists.
      VersionMismatch: the index is of other parameters or another encoder.
      ImportError: flatbuffers is not installed.

    Example:
      >>> import jax, tempfile, aif_jax as aif
      >>> from aif_jax import export
      >>> schema = Schema(item_attributes=(aif.Attribute(name="item", size=9), aif.Attribute(name="category", size=3)))
      >>> model = aif.build(aif.presets.two_tower(schema, width=4, sequence=False))
      >>> catalogue = aif.Catalogue.from_items(schema, range(8), ids={"category": [1, 2] * 4})
      >>> folder = Path(tempfile.mkdtemp()) / "model"
      >>> params = model.init(jax.random.key(0), catalogue)
      >>> digest = export.save(folder, aif.Trained(model, params), platforms=("cpu",))
      >>> export.load(folder, sha256=digest).version == export.verify(folder)["version"]
      True
    """
    expect_platforms(platforms)
    if index is not None and index.version != trained.version:
        raise VersionMismatch("index", expected=trained.version, got=index.version)
    model, encoder, orders = trained.model, trained.encoder, orders or {}
    leaves = {path: np.asarray(leaf) for path, leaf in leaves_by_path(trained.params).items()}
    bounds = functions.axis_bounds(model, leaves)
    for name, order in orders.items():
        expect(isinstance(name, str) and name.isidentifier(), "orders", "names of letters, digits and _", repr(name))
        reads_bid(name, order, model.config.objectives)  # or raises
    with new_folder(folder) as partial:
        exported = functions.export_all(model, leaves, bounds, platforms=platforms, orders=orders)
        manifest: dict[str, Any] = {
            "format": files.FORMAT,
            "format_version": files.FORMAT_VERSION,
            "version": trained.version,
            "encoding": "" if encoder is None else encoder.version,
            "made_with": {"python": platform.python_version(), "aif_jax": __version__}
            | {name: metadata.version(name) for name in PACKAGES},
            "platforms": list(platforms),
            "config": model.config.to_json(),
            "axes": _axes(model.config, bounds),
            "functions": {name: _function(partial, name, built, model.config.schema) for name, built in exported.items()},
        }
        if orders:
            manifest["orders"] = list(orders)
        if trained.settings is not None:
            manifest["settings"] = dict(trained.settings)
        parts = {"params": leaves, "golden": golden_case(model, leaves, orders)}
        if index is not None:
            parts["index"] = index_arrays(index)
        if encoder is not None:
            write_arrays(partial / "encoder.safetensors", encoder.to_arrays())
            manifest["encoder"] = {"record": encoder.to_record(), "file": "encoder.safetensors"}
            if trained.items is not None:
                parts["items"] = leaves_by_path(dataclasses.replace(trained.items, encoding=""))
        for name, arrays in parts.items():
            manifest[name] = f"{name}.safetensors"
            write_arrays(partial / manifest[name], arrays)
        shutil.copytree(Path(consume.__file__).parent, partial / "consume", ignore=shutil.ignore_patterns("__pycache__"))
        names = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
        manifest["files"] = {
            name: {"bytes": (partial / name).stat().st_size, "sha256": digest_of(partial / name)} for name in names
        }
        manifest["sha256"] = consume.seal(manifest)
        (partial / files.MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="ascii")
        digest = digest_of(partial / files.MANIFEST)
        try:
            consume.verify(partial, sha256=digest)
        except consume.ExportError as error:
            way_out = "padding may not change a score: see `Block.score`, `Head.apply`"
            raise consume.ExportError(f"{folder}: expected the golden case again, got {error}; {way_out}") from error
        return digest


def expect_platforms(platforms: Sequence[str]) -> None:
    """Raise ImportError where an export cannot be written here, ValueError for unknown platforms, or without this one."""
    with needs_extra("exports need flatbuffers", "export"):
        import flatbuffers  # noqa: F401
    here = jax.export.default_export_platform()  # where it is verified
    fits = here in platforms and set(platforms) <= set(KNOWN)
    expect(fits, "platforms", f"names among {list(KNOWN)}, {here} one of them", list(platforms))


def index_arrays(index: ItemIndex) -> dict[str, np.ndarray]:
    """Return ids int64 [N], ascending, or the two hashes of strings, and the decoded table of an index's live rows."""
    keys, rows = index.stored(decoded=True)
    return ({name: keys[name] for name in HASHES} if keys.dtype == TEXT else {"ids": keys}) | functions.named(rows)


def _function(target: Path, name: str, built: functions.ExportedFunction, schema: Schema) -> dict[str, Any]:
    (target / f"{name}.jax_export").write_bytes(built.exported.serialize())
    return {
        "file": f"{name}.jax_export",
        "calling_convention_version": built.exported.calling_convention_version,
        "inputs": _inputs(name, built, schema),
        "outputs": _entries(built.outputs),
        "ignored": list(built.ignored),
        "params": list(built.params),
    }


def _inputs(name: str, built: functions.ExportedFunction, schema: Schema) -> list[dict[str, Any]]:
    """Return inputs, those of features with the bounds of their layout."""
    entries, layout = _entries(built.inputs), {"user": user_layout, "item": item_layout}.get(name)
    leaves = {} if layout is None else functions.named(layout(schema))
    for entry in entries:
        leaf: Leaf | None = leaves.get(entry["name"])
        if leaf is not None:
            if LENGTH in leaf.shape:
                entry["shape"][-1] = "l"  # also where the functions take one length alone
            bounds = {"size": leaf.size, "finite": leaf.dtype == np.float32 or None, "minimum": leaf.minimum}
            entry |= {bound: value for bound, value in bounds.items() if value is not None}
    return entries


def _entries(specs: functions.Specs) -> list[dict[str, Any]]:
    shapes = {name: [dim if isinstance(dim, int) else str(dim) for dim in spec.shape] for name, spec in specs.items()}
    return [{"name": name, "shape": shape, "dtype": str(specs[name].dtype)} for name, shape in shapes.items()]


def _axes(config: Config, bounds: functions.Bounds) -> dict[str, Any]:
    """Return bounds and compiled sizes of every axis."""
    sizes = {"c": [1 << i for i in range(6, 15) if 1 << i >= bounds["c"][0]], "l": [config.history_length], "n": [1, 64, 4096]}
    return {name: {"minimum": low, "maximum": high, "buckets": sizes[name]} for name, (low, high) in bounds.items()}
