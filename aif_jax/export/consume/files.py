"""Reads the files of an exported folder: manifest, checksums, arrays.

Arrays are in the public safetensors layout: eight bytes of header length, a JSON header, data.
"""

import hashlib
import json
import re
import reprlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

FORMAT = "aif_jax.export"
FORMAT_VERSION = 3
MANIFEST = "manifest.json"
MANIFEST_BYTES = 4 << 20
PROBABILITY = "probability"
ORDER = "order_"
"""How the names of functions begin that make scores of probabilities and bid, one for each of the manifest's orders."""
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
DTYPES = {
    "BOOL": np.dtype("?"), "U8": np.dtype("u1"), "I8": np.dtype("i1"), "I16": np.dtype("<i2"), "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"), "U32": np.dtype("<u4"), "I64": np.dtype("<i8"), "U64": np.dtype("<u8"), "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "BF16": np.dtype(jnp.bfloat16), "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
}  # fmt: skip
DTYPE_NAMES = {dtype.name: dtype for dtype in DTYPES.values()}


class ExportError(ValueError):
    """A folder that is not what its manifest says, that this process cannot run, or inputs that do not fit the model."""


def expect(ok: Any, name: str, expected: object, got: object) -> None:
    """Raise ExportError "name: expected ..., got ..." unless `ok`."""
    if not ok:
        raise ExportError(f"{name}: expected {expected}, got {got}")


def local(folder: str | Path) -> Path:
    """Return path of a local folder; ExportError for a URL, which may hold a password, so that only its protocol is shown."""
    if URL.match(str(folder)):
        protocol, hint = str(folder).partition(":")[0], "aif_jax.connectors.SnapshotStore fetches folders from there"
        raise ExportError(f"folder: expected a local folder, got a URL of {protocol!r}; {hint}")
    return Path(folder)


def read_manifest(folder: Path, *, sha256: str | None = None) -> dict[str, Any]:
    """Return the manifest, whose digest must be `sha256` where one is given; no other file is opened. Raises ExportError."""
    manifest = read_sealed(folder, MANIFEST, format=FORMAT, sha256=sha256)
    version, way_out = manifest.get("format_version"), "export again or update the loader"
    expect(version == FORMAT_VERSION, MANIFEST, f"format_version {FORMAT_VERSION}", f"{version!r}; {way_out}")
    return manifest


def read_sealed(
    folder: Path, name: str, *, format: str, limit: int = MANIFEST_BYTES, sha256: str | None = None, entry: str | None = None
) -> dict[str, Any]:
    """Return the sealed record of a format in a JSON file, or in an `entry` of it; see `read_manifest`."""
    raw = read_file(folder / name, name, limit=limit)
    digest = hashlib.sha256(raw).hexdigest()
    expect(sha256 in (None, digest), name, f"sha256 {sha256}", digest)
    record: Any = parse_json(raw, name)
    record = record.get(entry) if entry and isinstance(record, dict) else record
    got = record.get("format") if isinstance(record, dict) else record
    expect(isinstance(record, dict) and got == format, name, f"the format {format!r}", reprlib.repr(got))
    inside, digest = record.get("sha256"), seal(record)
    expect(inside == digest, f"{name} was altered", f"sha256 {inside} inside", digest)
    return record


def seal(manifest: Mapping[str, Any]) -> str:
    """Return sha256 of all in a manifest but the seal: finds accidents, while a digest given to `load` finds attackers."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    try:
        return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    except RecursionError:
        raise ExportError(f"{MANIFEST}: expected JSON, got something nested too deeply") from None


def checked(folder: Path, manifest: Mapping[str, Any], name: Any) -> bytes:
    """Return the bytes of a file that the manifest lists, after size and checksum fit."""
    entry = manifest["files"].get(name) if isinstance(name, str) else None
    if entry is None:
        raise ExportError(f"{MANIFEST}: expected {name!r} among its files, got {sorted(manifest['files'])}")
    raw = read_file(folder / name, name, size=entry["bytes"])
    digest = hashlib.sha256(raw).hexdigest()
    expect(digest == entry["sha256"], f"{name} was altered", f"sha256 {entry['sha256']}", digest)
    return raw


def checked_arrays(folder: Path, manifest: Mapping[str, Any], name: Any) -> dict[str, np.ndarray]:
    """Return the arrays of a file that the manifest lists; see `checked` and `read_arrays`."""
    return read_arrays(checked(folder, manifest, name))


def read_arrays(raw: bytes) -> dict[str, np.ndarray]:
    """Return arrays of a safetensors file, read-only views of its bytes; ExportError if the header is not of them."""
    length, limit = int.from_bytes(raw[:8], "little") if len(raw) >= 8 else -1, min(len(raw) - 8, MANIFEST_BYTES)
    expect(0 <= length <= limit, "arrays", f"a header of at most {limit} bytes", length)
    header = parse_json(raw[8 : 8 + length], "arrays: header")
    data, arrays, end = memoryview(raw)[8 + length :], {}, 0
    try:
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (start, stop), dtype = entry["data_offsets"], DTYPES[entry["dtype"]]
            fits = start == end and stop <= len(data)
            expect(fits, f"arrays {name!r}", f"{end} to {len(data)} at most", f"{start} to {stop}")
            arrays[name], end = np.frombuffer(data[start:stop], dtype).reshape(entry["shape"]), stop
    except ExportError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ExportError(f"arrays: expected a safetensors header, got something else ({error!r})") from None
    expect(end == len(data), "arrays", f"{end} bytes of data", len(data))
    return arrays


def parse_json(raw: bytes, name: str) -> Any:
    """Return the JSON value of some bytes; ExportError for no JSON, or one nested too deeply."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{name}: expected JSON, got something else ({error})") from None


def read_file(path: Path, name: str, *, size: int | None = None, limit: int | None = None) -> bytes:
    """Return the bytes of a regular file of that size, or of one below a limit."""
    try:
        status = path.lstat()
    except OSError as error:
        raise ExportError(f"{name}: expected a file in the folder, got none ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode) or ("/" in name and path.parent.is_symlink()):  # a link could lead out of the folder
        raise ExportError(f"{name}: expected a regular file, got a link, a folder or a device")
    expect(size in (None, status.st_size), name, f"{size} bytes", status.st_size)
    expect(limit is None or status.st_size <= limit, name, f"at most {limit} bytes", status.st_size)
    with path.open("rb") as file:
        return file.read(status.st_size + 1)  # one more than expected, so that a file that grew meanwhile does not pass
