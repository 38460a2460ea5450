"""The binary body of a call and of an answer: a line of JSON, then tensors as the Open Inference Protocol packs them.

    {"user": "ann", "k": 5, "tensors": [{"name": "candidates", "datatype": "INT64", "shape": [9], "parameters":
     {"binary_data_size": 72}}]} | newline | the bytes of each tensor in order, little-endian

GROUP.NAME is a value in a group of fields, such as events.item. Each text of BYTES comes after its length in 4 bytes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from aif_jax.encoding.vocabulary import id_array
from aif_jax.service.calls import BadCall

CONTENT_TYPE = "application/octet-stream"
DATATYPES = {
    "BOOL": "?", "INT8": "<i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "UINT8": "<u1",
    "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
DTYPES = {name: np.dtype(code) for name, code in DATATYPES.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}  # `dtype.name` takes longer than the rest of an array
IS_LITTLE = sys.byteorder == "little"
MOST_TENSORS = 256
ENCODE = json.JSONEncoder(separators=(",", ":")).encode


@functools.cache
def _orjson() -> Any:
    """The package of the extra `service`: a tenth of the time of `json`. None for a client without it."""
    try:
        import orjson
    except ImportError:
        return None
    return orjson


def encode(value: Any) -> bytes:
    """Plain values of an answer as JSON."""
    if (fast := _orjson()) is not None:
        with contextlib.suppress(TypeError):  # keys that are no texts, integers beyond 64 bits, halves of surrogate pairs
            return fast.dumps(value)
    return ENCODE(value).encode()


def pack(fields: Mapping[str, Any], *, encode: Callable[[Any], bytes] = lambda value: ENCODE(value).encode()) -> bytes:
    """A body of fields; NumPy arrays, also those in a group of fields, become tensors; plain values as `encode` has them.

    Example:
      >>> unpack(pack({"user": "ann", "events": {"item": np.arange(3)}}))["events"]["item"].tolist()
      [0, 1, 2]
    """
    arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    plain = {name: value for name, value in fields.items() if name not in arrays}
    for name, group in fields.items():
        if isinstance(group, dict) and (inside := [key for key, value in group.items() if isinstance(value, np.ndarray)]):
            plain[name] = {key: value for key, value in group.items() if key not in inside}
            arrays |= {f"{name}.{key}": group[key] for key in inside}
    parts = list(map(to_bytes, arrays.values()))
    sizes = zip(arrays.items(), map(len, parts), strict=True)
    listed = ",".join([_entry(name, datatype(array), array.shape, size) for (name, array), size in sizes])
    return b"".join([encode(plain)[:-1], b"," if plain else b"", f'"tensors":[{listed}]}}\n'.encode(), *parts])


@functools.lru_cache(maxsize=1024)
def _entry(name: str, kind: str, shape: tuple[int, ...], size: int) -> str:
    """What `described` says, as JSON: encoding it takes longer than the rest of an answer."""
    parameters = {"binary_data_size": size}
    return ENCODE({"name": name, "datatype": kind, "shape": list(shape), "parameters": parameters})


def unpack(body: bytes, *, texts: int = 1 << 24) -> dict[str, Any]:
    """The fields of a body. Raises BadCall for anything that `pack` does not write."""
    end = body.find(b"\n") % (len(body) + 1)  # without a line's end all of it is the head
    fields, data = parse_json(body[:end]), memoryview(body)[end + 1 :]
    for name, value in arrays_from(fields.pop("tensors", []), data, texts=texts).items():
        put(fields, name, value)
    return fields


def put(fields: dict[str, Any], name: str, value: Any) -> None:
    """Adds a field, GROUP.NAME to its group; raises BadCall where there is one."""
    group, dot, key = name.partition(".")
    inside = fields.setdefault(group, {}) if dot else fields
    if not isinstance(inside, dict) or (key or group) in inside:
        raise BadCall(name[:80], "expected one value, got two; send one")
    inside[key or group] = value


def parse_json(raw: bytes) -> dict[str, Any]:
    """A JSON object; BadCall for anything else, NaN, infinities and half a surrogate pair among it."""
    fast = None if b"0" * 19 in raw.translate(DIGITS) else _orjson()  # which reads integers beyond 64 bits as floats
    try:
        value = _decoded(raw) if fast is None else fast.loads(raw)
    except (ValueError, RecursionError):
        try:
            value = _decoded(raw)  # which says what is wrong in the same words everywhere
        except (ValueError, RecursionError) as error:
            raise BadCall("body", f"expected JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadCall("body", f"expected a JSON object, got {type(value).__name__}")
    return value


def _decoded(raw: bytes) -> Any:
    value = DECODE(text := raw.decode())
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # text that is no Unicode would fail later, and not for its caller
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"expected a JSON number, got {name}")


DIGITS = bytes.maketrans(b"123456789", b"0" * 9)
DECODE = json.JSONDecoder(parse_constant=_refuse).decode


def described(name: str, array: np.ndarray, raw: bytes | None = None) -> dict[str, Any]:
    """A tensor's name, datatype and shape, and the size of its bytes where they come after the JSON."""
    entry: dict[str, Any] = {"name": name, "datatype": datatype(array), "shape": list(array.shape)}
    if raw is not None:
        entry["parameters"] = {"binary_data_size": len(raw)}
    return entry


def datatype(array: np.ndarray) -> str:
    """The protocol's name of a dtype; raises BadCall for one that it does not have."""
    name = NAMES.get(array.dtype) or NAMES.get(array.dtype.newbyteorder("<")) if array.dtype.kind not in "UTO" else "BYTES"
    if name is None:
        raise BadCall("array", f"expected a dtype among {', '.join(map(str, NAMES))} or texts, got {array.dtype}")
    return name


def to_bytes(array: np.ndarray) -> bytes:
    """A tensor's raw contents."""
    if datatype(array) != "BYTES":
        return (array if IS_LITTLE and array.dtype.isnative else array.astype(array.dtype.newbyteorder("<"))).tobytes()
    return b"".join(len(text).to_bytes(4, "little") + text for text in (each.encode() for each in array.ravel().tolist()))


def expect_shape(name: str, kind: Any, shape: Any) -> list[int]:
    """Sizes of a tensor; raises BadCall for what cannot be one."""
    good = isinstance(shape, list) and len(shape) <= 4 and isinstance(kind, str) and (kind in DATATYPES or kind == "BYTES")
    for size in shape if good else ():
        good = good and type(size) is int and 0 <= size < 1 << 40
    if not good:
        expected = f"a datatype among {', '.join(DATATYPES)}, BYTES and sizes of 0 or more"
        raise BadCall(name, f"expected {expected}, got {kind!r:.40} and {shape!r:.80}")
    return shape


def from_bytes(name: str, kind: str, shape: list[int], raw: bytes | memoryview) -> np.ndarray:
    """A tensor from its raw contents; raises BadCall."""
    count = math.prod(shape)
    if kind == "BYTES":
        return _texts(name, _split_texts(name, bytes(raw), count)).reshape(shape)
    dtype = DTYPES[kind]
    if len(raw) != count * dtype.itemsize:
        raise BadCall(name, f"expected {count * dtype.itemsize} bytes for {kind}{shape}, got {len(raw)}")
    if kind == "BOOL" and bytes(raw).translate(None, b"\0\1"):
        raise BadCall(name, f"expected bytes 0 and 1 of BOOL, got {bytes(raw[:8])!r}")
    array = np.frombuffer(raw, dtype) if len(shape) == 1 else np.frombuffer(raw, dtype).reshape(shape)
    return array if IS_LITTLE else array.astype(dtype.newbyteorder("="))


def from_values(name: str, kind: str, shape: list[int], values: Sequence[Any]) -> np.ndarray:
    """A tensor from a flat list of plain values; raises BadCall."""
    count = math.prod(shape)
    if len(values) != count:
        raise BadCall(name, f"expected {count} values for {shape}, got {len(values)}")
    if kind == "BYTES":
        if strange := [value for value in values if not isinstance(value, str | bytes)]:
            raise BadCall(name, f"expected texts for BYTES, got {strange[0]!r:.80}")
        return _texts(name, values).reshape(shape)
    wanted = {"B": bool, "I": int, "U": int}.get(kind[0], (int, float))
    if not all(isinstance(value, wanted) and (kind == "BOOL" or not isinstance(value, bool)) for value in values):
        raise BadCall(name, f"expected values of {kind}, got {values!r:.80}")
    try:
        return np.array(values, DTYPES[kind].newbyteorder("=")).reshape(shape)
    except (OverflowError, ValueError) as error:
        raise BadCall(name, f"expected values of {kind}: {error}") from None


def _split_texts(name: str, raw: bytes, count: int) -> list[bytes]:
    parts, start = [], 0
    while start < len(raw) and len(parts) <= count:
        size = int.from_bytes(raw[start : start + 4], "little")
        start += 4
        parts.append(raw[start : start + size])
        start += size
    if start != len(raw) or len(parts) != count:
        raise BadCall(name, f"expected {count} texts, each after its length in 4 bytes, got {len(raw)} bytes of something else")
    return parts


def _texts(name: str, values: Sequence[Any]) -> np.ndarray:
    try:
        return id_array([value.decode() if isinstance(value, bytes) else value for value in values])
    except UnicodeDecodeError as error:
        raise BadCall(name, f"expected UTF-8: {error.reason}") from None


def arrays_from(listed: Any, data: bytes | memoryview, *, texts: int = 1 << 24) -> dict[str, np.ndarray]:
    """Tensors by name, with at most so many texts in all; those with `binary_data_size` take their bytes from the data."""
    if not isinstance(listed, list) or len(listed) > MOST_TENSORS:
        raise BadCall("tensors", f"expected a list of at most {MOST_TENSORS}, got {listed!r:.40}")
    arrays: dict[str, np.ndarray] = {}
    start = 0
    for entry in listed:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name in arrays:
            raise BadCall("tensors", f"expected different names, got {name!r:.80}")
        kind: Any = entry.get("datatype")
        shape = expect_shape(name, kind, entry.get("shape"))
        if kind == "BYTES" and (texts := texts - math.prod(shape)) < 0:
            raise BadCall(name, f"expected fewer texts in all, got {shape}; send fewer")
        parameters = entry.get("parameters") or {}
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        if size is None:
            arrays[name] = from_values(name, kind, shape, _flat(name, entry.get("data"), 4))
        elif type(size) is int and 0 <= size <= len(data) - start:
            arrays[name] = from_bytes(name, kind, shape, data[start : start + size])
            start += size
        else:
            raise BadCall(name, f"expected binary_data_size of at most the {len(data) - start} bytes left, got {size!r:.40}")
    if start < len(data):
        raise BadCall("body", f"expected {start} bytes of tensors, got {len(data)}")
    return arrays


def _flat(name: str, values: Any, depth: int) -> list[Any]:
    """A flat list of nested lists, row by row."""
    if not isinstance(values, list):
        raise BadCall(name, f"expected `data`, a list, or `parameters` with `binary_data_size`, got {type(values).__name__}")
    if depth and values and isinstance(values[0], list):
        return [value for row in values for value in _flat(name, row, depth - 1)]
    return values
