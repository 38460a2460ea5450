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
"""How the names of functions begin that make scores of logits, one for each of the manifest's orders."""
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
    if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
        raise ExportError(f"{MANIFEST}: expected sha256 {sha256}, got {hashlib.sha256(raw).hexdigest()}")
    manifest = parse_json(raw, MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        got = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise ExportError(f"{MANIFEST}: expected format {FORMAT!r}, got {reprlib.repr(got)}")
    if manifest.get("format_version") != FORMAT_VERSION:
        version = manifest.get("format_version")
        raise ExportError(
            f"{MANIFEST}: expected format_version {FORMAT_VERSION}, got {version!r}; export again or update the loader"
        )
    if manifest.get("sha256") != (digest := seal(manifest)):
        raise ExportError(f"{MANIFEST} was altered: expected sha256 {manifest.get('sha256')} inside, got {digest}")
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
    if digest != entry["sha256"]:
        raise ExportError(f"{name} was altered: expected sha256 {entry['sha256']}, got {digest}")
    return raw


def read_arrays(raw: bytes) -> dict[str, np.ndarray]:
    """Arrays of a safetensors file, as read-only views of its bytes; ExportError where the header does not describe them."""
    length = int.from_bytes(raw[:8], "little") if len(raw) >= 8 else -1
    if not 0 <= length <= min(len(raw) - 8, MANIFEST_BYTES):
        raise ExportError(f"arrays: expected a header of at most {min(len(raw) - 8, MANIFEST_BYTES)} bytes, got {length}")
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
        if max(len(shape), name.count("/")) > MOST_DIMENSIONS or not all(is_size(number) for number in (*shape, start, stop)):
            raise ExportError(
                f"arrays {reprlib.repr(name)}: expected at most {MOST_DIMENSIONS} groups, and as many sizes and "
                f"offsets from 0 to {LARGEST_SIZE}, got {reprlib.repr((shape, start, stop))}"
            )
        size = math.prod(shape) * dtype.itemsize
        whole = math.prod(max(1, dim) for dim in shape) * dtype.itemsize  # NumPy refuses huge axes of empty arrays too
        if start != end or stop - start != size or whole > LARGEST_SIZE:
            raise ExportError(f"arrays {name!r}: expected {size} bytes from {end}, got {start} to {stop}")
        if stop > len(data):
            raise ExportError(f"arrays {name!r}: expected {stop} bytes of data, got {len(data)}")
        arrays[name], end = np.frombuffer(data[start:stop], dtype).reshape(shape), stop
    if end != len(data):
        raise ExportError(f"arrays: expected {end} bytes of data, got {len(data)}")
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
    functions, encoder, orders = manifest["functions"], manifest.get("encoder"), manifest.get("orders", {})
    good = isinstance(orders, dict) and all(isinstance(text, str) and name.isidentifier() for name, text in orders.items())
    _expect(good, "orders", "score expressions by name", orders)
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
    if not good:
        raise ExportError(f"{MANIFEST} {field}: expected {expected}, got {type(got).__name__} {reprlib.repr(got)}")


def read_file(path: Path, name: str, *, size: int | None = None, limit: int | None = None) -> bytes:
    """The bytes of a regular file of that size, or of one below a limit."""
    try:
        status = path.lstat()
    except OSError as error:
        raise ExportError(f"{name}: expected a file in the folder, got none ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode) or ("/" in name and path.parent.is_symlink()):  # a link could lead out of the folder
        raise ExportError(f"{name}: expected a regular file, got a link, a folder or a device")
    if size is not None and status.st_size != size:
        raise ExportError(f"{name}: expected {size} bytes, got {status.st_size}")
    if limit is not None and status.st_size > limit:
        raise ExportError(f"{name}: expected at most {limit} bytes, got {status.st_size}")
    with path.open("rb") as file:
        return file.read(status.st_size + 1)  # one more than expected, so that a file that grew meanwhile does not pass


def memory() -> int:
    """Bytes of memory of this machine, or of the container that this process runs in."""
    sizes = [LARGEST_SIZE]
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not on every platform
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):  # "max" for no limit
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(sizes)
