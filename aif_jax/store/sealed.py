"""Sealed folders: named arrays and a record in one folder that checks itself, complete or not there at all.

    manifest.json         the record, size and SHA-256 of the other file; a SHA-256 of all this
    arrays.safetensors    the arrays by path, in the public safetensors layout

`export.consume` reads such files, also where this package is not installed; here they are written.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from aif_jax.checks import expect
from aif_jax.export.consume import files
from aif_jax.export.consume.files import MANIFEST, seal
from aif_jax.store.folders import METADATA_FILE, CheckpointError, local, new_folder, unfinished
from aif_jax.store.trained import __version__
from aif_jax.trees import leaves_by_path, nest

ARRAYS = "arrays.safetensors"


def write(path: str | Path, trees: Any, record: Mapping[str, Any], *, format: str) -> None:
    """Write a pytree of arrays and a record of plain JSON into a new folder: complete and on disk, or not there at all.

    Raises FileExistsError, ValueError for a record that is none or too large, TypeError for a leaf that safetensors lacks.
    """
    expect(is_json(record), "record", "plain JSON", repr(record))
    with new_folder(path) as partial:
        manifest = {**record, "format": format, "aif_jax": __version__, "jax": jax.__version__}
        manifest["files"] = {ARRAYS: write_arrays(partial / ARRAYS, leaves_by_path(trees))}
        content = json.dumps({**manifest, "sha256": seal(json.loads(json.dumps(manifest)))}, indent=2).encode() + b"\n"
        expect(len(content) <= files.MANIFEST_BYTES, "record", f"at most {files.MANIFEST_BYTES} bytes", len(content))
        (partial / MANIFEST).write_bytes(content)


def is_complete(folder: Path) -> bool:
    """Return whether a folder holds a snapshot or checkpoint of any format version."""
    return any((folder / name).is_file() for name in (ARRAYS, METADATA_FILE))


def inspect(path: str | Path, *, format: str, rebuild: str = "write it again") -> dict[str, Any]:
    """Return the manifest of a folder; reads no arrays. `rebuild` is the way out for messages.

    Raises FileNotFoundError: nothing there; CheckpointError: torn, altered, or of another format.
    """
    path = local(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: expected a snapshot, found nothing{unfinished(path)}; {rebuild}")
    with as_checkpoint_error(path, rebuild):
        return files.read_sealed(path, MANIFEST, format=format)


def read(path: str | Path, *, format: str, rebuild: str = "write it again") -> dict[str, Any]:
    """Return the arrays of a folder in nested dicts, compared with their checksum, as read-only views of the bytes read.

    Raises FileNotFoundError, CheckpointError: as `inspect`, or arrays that are torn or altered.
    """
    path = local(path)
    manifest = inspect(path, format=format, rebuild=rebuild)
    with as_checkpoint_error(path, rebuild):
        return nest(files.checked_arrays(path, manifest, ARRAYS))


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Write a safetensors file of arrays by name; returns its bytes and SHA-256. TypeError for a dtype that readers lack."""
    host = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    for name, value in host.items():
        known = value.dtype.name in files.DTYPE_NAMES
        expect(known, name, f"a dtype among {sorted(files.DTYPE_NAMES)}", value.dtype, error=TypeError)
    save_file(host, path)
    return {"bytes": path.stat().st_size, "sha256": digest_of(path)}


def digest_of(path: Path) -> str:
    """Return SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def as_checkpoint_error(where: str | Path, rebuild: str) -> Iterator[None]:
    """Raise ExportErrors of the block as CheckpointErrors that name the folder and, as the way out, how to `rebuild` it."""
    try:
        yield
    except files.ExportError as refused:
        raise CheckpointError(f"{where}: {refused}; {rebuild}") from refused.__cause__


def is_json(value: Any) -> bool:
    """Return whether a value is the same after a round trip through JSON."""
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False
