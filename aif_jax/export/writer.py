"""Writes a model as one folder: functions, parameters, config, vocabularies, golden case, checksums, the loader.

Source: ours.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aif_jax.config import Config
from aif_jax.data.schema import Vocabulary
from aif_jax.export import consume, functions
from aif_jax.export.arrays import vocabulary_arrays, write_arrays
from aif_jax.export.golden import golden_case
from aif_jax.model import PreRanker, build
from aif_jax.trees import describe, leaves_by_path, listed, mismatches, nest
from aif_jax.types import Params
from aif_jax.version import VersionMismatch, fingerprint

PLATFORMS = ("cpu", "cuda", "tpu")
PACKAGES = ("aif_jax", "jax", "jaxlib", "numpy", "flax")
FIXED_CANDIDATES = 1024


class CoverageError(ValueError):
    """A parameter that no exported function reads, or a model that needs one that is not there."""


def save(
    folder: str | Path,
    model: PreRanker,
    params: Params,
    index: Any = None,
    *,
    vocabularies: Mapping[str, Vocabulary] | None = None,
    training_only: Sequence[str] = (),
    platforms: Sequence[str] = PLATFORMS,
    buckets: Mapping[str, Sequence[int]] | None = None,
    stablehlo: bool = True,
    onnx: bool = False,
) -> str:
    """Writes a model for a place without its code, replays the golden case, and only then puts the folder in its place.

    Args:
      folder: to be made; its parent must exist.
      model: built by `aif_jax.build`, or by `assemble` from towers of one's own.
      params: of the whole model, `frozen` included.
      index: an `ItemIndex` of the same version, or None.
      vocabularies: raw ids by attribute name.
      training_only: paths of parameters that only training uses, such as "user/auxiliary"; a path covers what is under it.
      platforms: names among "cpu", "cuda", "rocm", "tpu", all served by the same artefact.
      buckets: default sizes of the axes b, c, l, n in place of `functions.buckets`.
      stablehlo: also write `.mlir` texts of fixed shapes.
      onnx: also try ONNX; a part that cannot be converted is named in the manifest with the reason.

    Returns:
      sha256 of the manifest, which pins every other file: give it to `load(folder, sha256=...)`.

    Raises:
      FileExistsError: the folder exists.
      CoverageError: leaves missing or unused, by path.
      VersionMismatch: the index is of other parameters.
      ModuleNotFoundError: flatbuffers is not installed.

    Example:
      >>> import jax, tempfile, aif_jax as aif
      >>> from aif_jax import export
      >>> model = aif.build(aif.tiny(sequence=False, bridges=0, sim_fields=(), memory=(), simtier="off"))
      >>> folder = Path(tempfile.mkdtemp()) / "model"
      >>> digest = export.save(folder, model, model.init(jax.random.key(0)), platforms=("cpu",), stablehlo=False)
      >>> export.load(folder, sha256=digest).version == export.verify(folder)["version"]
      True
    """
    _require_flatbuffers()
    leaves = {path: np.asarray(leaf) for path, leaf in leaves_by_path(params).items()}
    check_leaves(model, params, training_only)
    exported = functions.export_all(model, leaves, platforms=platforms)
    unused = coverage(exported, leaves, training_only)
    golden = golden_case(model, leaves)
    config = model.config
    version = fingerprint(params, config)
    with _placed(Path(folder)) as target:
        used = {path: leaf for path, leaf in leaves.items() if path not in unused}
        write_arrays(target / "params.safetensors", used)
        if unused:
            write_arrays(target / "training_only.safetensors", {path: leaves[path] for path in unused})
        write_arrays(target / "golden.safetensors", golden)
        shutil.copyfile(consume.__file__, target / "consume.py")
        manifest: dict[str, Any] = {
            "format": consume.FORMAT,
            "format_version": consume.FORMAT_VERSION,
            "version": version,
            "made_with": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
            "platforms": list(platforms),
            "config": config.to_json(),
            "axes": _axes(config, buckets or {}),
            "functions": {name: _function(target, name, built) for name, built in exported.items()},
            "params": "params.safetensors",
            "training_only": list(unused),
            "golden": "golden.safetensors",
        }
        if vocabularies:
            write_arrays(target / "vocabularies.safetensors", vocabulary_arrays(vocabularies))
            manifest["vocabularies"] = "vocabularies.safetensors"
        if index is not None:
            write_arrays(target / "index.safetensors", index_arrays(index, version))
            manifest["index"] = "index.safetensors"
        if stablehlo:
            _write_stablehlo(target, manifest, exported, leaves)
        if onnx:
            from aif_jax.export import onnx as converter

            for name in exported:
                made = converter.write(target, name, exported[name], leaves, golden, candidates=FIXED_CANDIDATES)
                manifest["functions"][name]["onnx"] = made
        digest = _write_manifest(target, manifest)
        consume.verify(target, sha256=digest)
    return digest


def rebuild(folder: str | Path, new: str | Path, *, model: PreRanker | None = None, tolerance: float = 1e-4) -> str:
    """Writes the functions of a folder anew with the JAX that is here, from its parameters and config.

    For folders whose functions JAX no longer reads, or does not read yet. The rebuilt model must give the old golden outputs.

    Args:
      folder: what `save` wrote, under any JAX.
      new: folder to be made.
      model: for towers of one's own; the config's architecture otherwise.
      tolerance: of the old golden outputs, see `verify`.

    Returns:
      sha256 of the new manifest.

    Raises:
      ExportError: the old folder is damaged, or the rebuilt model gives other outputs.
    """
    folder = Path(folder)
    manifest = consume.read_manifest(folder)
    config = Config.from_json(manifest["config"])
    leaves = consume.read_arrays(consume.checked(folder, manifest, manifest["params"]))
    if manifest["training_only"]:
        leaves |= consume.read_arrays(consume.checked(folder, manifest, "training_only.safetensors"))
    params = nest(leaves)
    if fingerprint(params, config) != manifest["version"]:
        raise consume.ExportError(f"{folder}: expected params and config of version {manifest['version']}, got others")
    model = build(config) if model is None else model
    extra = [name for name in ("vocabularies", "index") if manifest.get(name)]
    with _placed(Path(new)) as target:
        scratch = target / "rebuilt"
        save(
            scratch,
            model,
            params,
            training_only=manifest["training_only"],
            platforms=manifest["platforms"],
            buckets={name: axis["buckets"] for name, axis in manifest["axes"].items()},
            stablehlo=any("stablehlo" in spec for spec in manifest["functions"].values()),
        )
        made = json.loads((scratch / consume.MANIFEST).read_bytes())
        for name in (manifest["golden"], *(manifest[name] for name in extra)):
            (scratch / name).write_bytes(consume.checked(folder, manifest, name))
        made |= {name: manifest[name] for name in extra}
        for path in scratch.iterdir():
            path.rename(target / path.name)
        scratch.rmdir()
        digest = _write_manifest(target, made)
        consume.verify(target, tolerance=tolerance, sha256=digest)
    return digest


def check_leaves(model: PreRanker, params: Params, training_only: Sequence[str]) -> None:
    """Raises CoverageError unless params has the leaves, by path and shape, that the model's `init` makes."""
    frozen = params.get("frozen")
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), frozen=frozen))
    expected = {path: str(list(leaf.shape)) for path, leaf in leaves_by_path(made).items()}
    got = {path: str(list(leaf.shape)) for path, leaf in leaves_by_path(params).items()}
    got = {path: shape for path, shape in got.items() if path in expected or not covered(path, training_only)}
    lines = mismatches(got, expected, source="params")
    if lines:
        raise CoverageError(f"params: expected the leaves of the model\n{listed(lines)}")


def coverage(
    exported: Mapping[str, functions.Exported], leaves: Mapping[str, Any], training_only: Sequence[str]
) -> tuple[str, ...]:
    """Paths of the leaves that training alone uses.

    Raises:
      CoverageError: a leaf that no function reads and `training_only` does not name, or one that it names and a function reads.
    """
    used = {path for built in exported.values() for path in built.params}
    unused = [path for path in leaves if path not in used]
    unnamed = [path for path in unused if not covered(path, training_only)]
    read = sorted(path for path in used if covered(path, training_only))
    absent = [name for name in training_only if not any(covered(path, [name]) for path in leaves)]
    lines = [f"{path}: {describe(leaves[path])} is read by no exported function" for path in unnamed]
    lines += [f"{path}: named as training-only, but an exported function reads it" for path in read]
    lines += [f"{name}: named as training-only, but no leaf is there" for name in absent]
    if lines:
        raise CoverageError(f"params: expected every leaf in an exported function or in training_only\n{listed(lines)}")
    return tuple(unused)


def covered(path: str, names: Sequence[str]) -> bool:
    """Whether a path is one of the names, or under one."""
    return any(path == name or path.startswith(f"{name}/") for name in names)


def index_arrays(index: Any, version: str) -> dict[str, np.ndarray]:
    """Ids and decoded table of an index's live rows."""
    if index.version != version:
        raise VersionMismatch("index", expected=version, got=index.version)
    ids = np.asarray(index.ids, np.int64)
    rows, _ = index.take(ids)
    return {"id": ids} | {name: np.asarray(value) for name, value in functions.named(rows).items()}


def _function(target: Path, name: str, built: functions.Exported) -> dict[str, Any]:
    (target / f"{name}.jax_export").write_bytes(built.exported.serialize())
    return {
        "file": f"{name}.jax_export",
        "calling_convention_version": built.exported.calling_convention_version,
        "inputs": _entries(built.inputs),
        "outputs": _entries(built.outputs),
        "ignored": [*built.ignored, *(["signature"] if name == "item" else [])],
        "params": list(built.params),
    }


def _entries(specs: functions.Specs) -> list[dict[str, Any]]:
    shape = lambda spec: [dim if isinstance(dim, int) else str(dim) for dim in spec.shape]  # noqa: E731
    return [{"name": name, "shape": shape(spec), "dtype": str(spec.dtype)} for name, spec in specs.items()]


def _axes(config: Config, buckets: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    sizes = functions.buckets(config) | {name: sorted(values) for name, values in buckets.items()}
    least = functions.minimums(config)
    if set(sizes) != set(least):
        raise ValueError(f"buckets: expected axes among {sorted(least)}, got {sorted(buckets)}")
    for name, values in sizes.items():
        if not values or values[0] < least[name]:
            raise ValueError(f"buckets[{name!r}]: expected sizes of at least {least[name]}, got {list(values)}")
    return {name: {"minimum": least[name], "buckets": list(map(int, sizes[name])), "trim": name != "l"} for name in least}


def _write_stablehlo(target: Path, manifest: dict[str, Any], exported: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    sizes = {name: max(axis["buckets"]) for name, axis in manifest["axes"].items()}
    sizes |= {"b": 1, "c": max(FIXED_CANDIDATES, functions.minimums(Config.from_json(manifest["config"]))["c"])}
    specs = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    for name, built in exported.items():
        text, arguments = functions.stablehlo(built, specs, sizes, platform=manifest["platforms"][0])
        (target / f"{name}.mlir").write_text(text)
        entry = {"file": f"{name}.mlir", "platform": manifest["platforms"][0], "sizes": sizes, "arguments": arguments}
        manifest["functions"][name]["stablehlo"] = entry | {"results": sorted(built.outputs)}


def _write_manifest(target: Path, manifest: dict[str, Any]) -> str:
    names = sorted(path.name for path in target.iterdir() if path.name != consume.MANIFEST)
    manifest["files"] = {name: _entry(target / name) for name in names}
    raw = json.dumps(manifest, indent=1).encode()
    (target / consume.MANIFEST).write_bytes(raw)
    return hashlib.sha256(raw).hexdigest()


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@contextlib.contextmanager
def _placed(folder: Path) -> Iterator[Path]:
    """A folder beside the one wanted, renamed to it when all went well, so that no half-written folder ever has its name."""
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{folder}: expected a folder that does not exist yet")
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        os.rename(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _version(package: str) -> str:
    if package == "aif_jax":
        import aif_jax

        return aif_jax.__version__
    return metadata.version(package)


def _require_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError('exports are serialised with flatbuffers: pip install "aif_jax[export]"') from None
