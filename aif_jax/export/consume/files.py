"""Reads the files of an exported folder: manifest, checksums, arrays. Sizes are bounded before memory is taken.

Arrays are in the public safetensors layout: eight bytes of header length, a JSON header, data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
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
MOST_FILES = 1024
FUNCTIONS = ("user", "users", "item", "interaction")
PROBABILITY = "probability"
ORDER = "order_"
"""How the names of functions begin that make scores of probabilities and bid, one for each of the manifest's orders."""
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
PLAIN_NAME = re.compile(r"(consume/)?[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)+")
PARTS = ("inputs", "outputs", "params", "ignored")
MOST_BUCKETS = 64
MOST_DIMENSIONS = 32
LARGEST_SIZE = 1 << 40
"""Of one axis of an array, and of an array in bytes."""
DTYPES = {
    "BOOL": np.dtype("?"), "U8": np.dtype("u1"), "I8": np.dtype("i1"), "I16": np.dtype("<i2"), "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"), "U32": np.dtype("<u4"), "I64": np.dtype("<i8"), "U64": np.dtype("<u8"), "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "BF16": np.dtype(jnp.bfloat16), "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
}  # fmt: skip
DTYPE_NAMES = {dtype.name: dtype for dtype in DTYPES.values()}


class ExportError(ValueError):
    """A folder that is not what its manifest says, that this process cannot run, or inputs that do not fit the model."""


def expect(ok: Any, name: str, expected: object, got: object) -> None:
    """Raises ExportError "name: expected ..., got ..." unless `ok`."""
    if not ok:
        raise ExportError(f"{name}: expected {expected}, got {got}")


def local(folder: str | Path) -> Path:
    """The path of a local folder; ExportError for a URL, which may hold a password, so that only its protocol is shown."""
    if URL.match(str(folder)):
        protocol, hint = str(folder).partition(":")[0], "aif_jax.connectors.SnapshotStore fetches folders from there"
        raise ExportError(f"folder: expected a local folder, got a URL of {protocol!r}; {hint}")
    return Path(folder)


def read_manifest(folder: Path, *, sha256: str | None = None, max_bytes: int | None = None) -> dict[str, Any]:
    """The manifest, its form checked; no other file is opened.

    `sha256` is the digest that it must have; a folder that says it has more than `max_bytes` (None: half of this machine's
    memory) is refused. Raises ExportError.
    """
    raw = read_file(folder / MANIFEST, MANIFEST, limit=MANIFEST_BYTES)
    digest = hashlib.sha256(raw).hexdigest()
    expect(sha256 in (None, digest), MANIFEST, f"sha256 {sha256}", digest)
    manifest = parse_json(raw, MANIFEST)
    got = manifest.get("format") if isinstance(manifest, dict) else manifest
    expect(isinstance(manifest, dict) and got == FORMAT, MANIFEST, f"format {FORMAT!r}", reprlib.repr(got))
    version, way_out = manifest.get("format_version"), "export again or update the loader"
    expect(version == FORMAT_VERSION, MANIFEST, f"format_version {FORMAT_VERSION}", f"{version!r}; {way_out}")
    inside, digest = manifest.get("sha256"), seal(manifest)
    expect(inside == digest, f"{MANIFEST} was altered", f"sha256 {inside} inside", digest)
    _check_form(manifest)
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    limit = memory() // 2 if max_bytes is None else max_bytes
    if total > limit:
        raise ExportError(f"{MANIFEST}: expected at most {limit} bytes in all, it lists {total}; max_bytes sets the limit")
    return manifest


def seal(manifest: Mapping[str, Any]) -> str:
    """sha256 of everything in a manifest but the seal: finds accidents, while a digest given to `load` finds attackers."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    try:
        return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    except RecursionError:
        raise ExportError(f"{MANIFEST}: expected JSON, got something nested too deeply") from None


def digest_of(folder: Path) -> str:
    """sha256 of the manifest."""
    return hashlib.sha256(read_file(folder / MANIFEST, MANIFEST, limit=MANIFEST_BYTES)).hexdigest()


def checked(folder: Path, manifest: Mapping[str, Any], name: Any) -> bytes:
    """The bytes of a file that the manifest lists, after size and checksum fit."""
    entry = manifest["files"].get(name) if isinstance(name, str) else None
    if entry is None:
        raise ExportError(f"{MANIFEST}: expected {name!r} among its files, got {sorted(manifest['files'])}")
    raw = read_file(folder / name, name, size=entry["bytes"])
    digest = hashlib.sha256(raw).hexdigest()
    expect(digest == entry["sha256"], f"{name} was altered", f"sha256 {entry['sha256']}", digest)
    return raw


def read_arrays(raw: bytes) -> dict[str, np.ndarray]:
    """Arrays of a safetensors file, as read-only views of its bytes; ExportError where the header does not describe them."""
    length, limit = int.from_bytes(raw[:8], "little") if len(raw) >= 8 else -1, min(len(raw) - 8, MANIFEST_BYTES)
    expect(0 <= length <= limit, "arrays", f"a header of at most {limit} bytes", length)
    header = parse_json(raw[8 : 8 + length], "arrays: header")
    try:
        header.pop("__metadata__", None)
        offsets = sorted((*value["data_offsets"], name) for name, value in header.items())
        entries = [(n, DTYPES[header[n]["dtype"]], tuple(header[n]["shape"]), start, stop) for start, stop, n in offsets]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"arrays: expected a safetensors header, got something else ({error!r})") from None
    data = memoryview(raw)[8 + length :]
    arrays, end = {}, 0
    for name, dtype, shape, start, stop in entries:
        few = max(len(shape), name.count("/")) <= MOST_DIMENSIONS and all(map(is_size, (*shape, start, stop)))
        expected = f"at most {MOST_DIMENSIONS} groups, and as many sizes and offsets from 0 to {LARGEST_SIZE}"
        expect(few, f"arrays {reprlib.repr(name)}", expected, reprlib.repr((shape, start, stop)))
        size = math.prod(shape) * dtype.itemsize
        whole = math.prod(max(1, dim) for dim in shape) * dtype.itemsize  # NumPy refuses huge axes of empty arrays too
        fits = (start, stop) == (end, end + size) and whole <= LARGEST_SIZE
        expect(fits, f"arrays {name!r}", f"{size} bytes from {end}", f"{start} to {stop}")
        expect(stop <= len(data), f"arrays {name!r}", f"{stop} bytes of data", len(data))
        arrays[name], end = np.frombuffer(data[start:stop], dtype).reshape(shape), stop
    expect(end == len(data), "arrays", f"{end} bytes of data", len(data))
    return arrays


def parse_json(raw: bytes, name: str) -> Any:
    """The JSON value of some bytes; ExportError for no JSON, or one nested too deeply."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{name}: expected JSON, got something else ({error})") from None


def _check_form(manifest: dict[str, Any]) -> None:
    """Raises unless the fields that the loader walks have the types that it expects."""
    wanted = {"files": dict, "functions": dict, "axes": dict, "config": dict, "made_with": dict}
    wanted |= {"platforms": list, "training_only": list}
    for name, kind in (wanted | dict.fromkeys(("version", "encoding", "params", "golden"), str)).items():
        _expect(isinstance(manifest.get(name), kind), name, kind.__name__, manifest.get(name))
    _expect(len(manifest["files"]) <= MOST_FILES, "files", f"at most {MOST_FILES}", manifest["files"])
    for name, entry in manifest["files"].items():
        _expect(PLAIN_NAME.fullmatch(name), "files", "plain file names inside the folder", name)
        good = isinstance(entry, dict) and is_size(entry.get("bytes")) and isinstance(entry.get("sha256"), str)
        _expect(good, f"files {name!r}", "bytes and sha256", entry)
    for name, axis in manifest["axes"].items():
        good = isinstance(axis, dict) and is_size(axis.get("minimum")) and isinstance(axis.get("buckets"), list)
        good = good and all(map(is_size, axis["buckets"])) and (axis.get("maximum") is None or is_size(axis["maximum"]))
        _expect(good and 0 < len(axis["buckets"]) <= MOST_BUCKETS, f"axes {name!r}", "minimum, maximum and buckets", axis)
    functions, encoder, orders = manifest["functions"], manifest.get("encoder"), manifest.get("orders", [])
    good = isinstance(orders, list) and all(isinstance(name, str) and name.isidentifier() for name in orders)
    _expect(good, "orders", "names of compiled functions; export again with orders={NAME: lambda p, bid: ...}", orders)
    names = {*FUNCTIONS, *(ORDER + name for name in orders)}
    _expect(set(functions) - {PROBABILITY} == names, "functions", ", ".join(map(repr, FUNCTIONS)), sorted(functions))
    for name, spec in functions.items():
        good = isinstance(spec, dict) and all(isinstance(spec.get(part), list) for part in PARTS)
        good = good and all(isinstance(text, str) for text in (*spec["params"], *spec["ignored"]))
        _expect(good, f"functions {name!r}", ", ".join(PARTS), spec)
        for entry in (*spec["inputs"], *spec["outputs"]):
            _expect(_is_entry(entry, manifest["axes"]), name, "name, shape and dtype, and size or minimum", entry)
    good = encoder is None or isinstance(encoder, dict) and isinstance(encoder.get("record"), dict)
    _expect(good, "encoder", "record and file, or none", encoder)


def _is_entry(entry: Any, axes: Mapping[str, Any]) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not isinstance(entry.get("shape"), list):
        return False
    known = all(is_size(dim) or (isinstance(dim, str) and dim in axes) for dim in entry["shape"])
    dtype, size, minimum = entry.get("dtype"), entry.get("size"), entry.get("minimum")
    # Values that are compared with numbers of the dtype.
    good = minimum is None or (type(minimum) in (int, float) and abs(minimum) <= 1e30 and dtype == "float32")
    bounds = good and (size is None or is_size(size)) and entry.get("finite") in (None, True, False)
    return known and bounds and len(entry["shape"]) <= MOST_DIMENSIONS and isinstance(dtype, str) and dtype in DTYPE_NAMES


def is_size(number: Any) -> bool:
    """Whether a number can be a size."""
    return type(number) is int and 0 <= number <= LARGEST_SIZE


def _expect(good: Any, field: str, expected: str, got: Any) -> None:
    expect(good, f"{MANIFEST} {field}", expected, f"{type(got).__name__} {reprlib.repr(got)}")


def read_file(path: Path, name: str, *, size: int | None = None, limit: int | None = None) -> bytes:
    """The bytes of a regular file of that size, or of one below a limit."""
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


def memory() -> int:
    """Bytes of memory of this machine, or of the container that this process runs in: no file to be read is larger."""
    sizes = []
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not on every platform
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):  # "max" for no limit
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(sizes, default=LARGEST_SIZE)
