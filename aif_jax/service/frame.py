"""The binary body of the lean HTTP route: a JSON header and packed arrays, little-endian, each from a multiple of 8 bytes on.

    "AIF1" | uint32 bytes of the header | header, JSON | padding | array | padding | array ...

The header has the fields of the message and `arrays`: a list of [name, dtype, shape] in the order of the data. A list of
strings is two arrays, NAME.utf8 (uint8) and NAME.offsets (int64 [n + 1]). GROUP.NAME is a value in a group of fields, such as
events.item.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from aif_jax.encoding.vocabulary import string_array
from aif_jax.service.calls import BadCall

CONTENT_TYPE = "application/x-aif-frame"
MAGIC = b"AIF1"
DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("int64", "int32", "float32", "float64", "uint8", "bool")}
NAMES = {dtype: name for name, dtype in DTYPES.items()}  # `dtype.name` takes longer than everything else of an array
MOST_ARRAYS = 256
HEADER_BYTES = 1 << 20
ENCODE = json.JSONEncoder(separators=(",", ":")).encode


def pack(fields: Mapping[str, Any]) -> bytes:
    """A frame of fields; NumPy arrays, also those of a group of fields, are packed, arrays of strings as their UTF-8 bytes.

    Example:
      >>> unpack(pack({"user": "ann", "events": {"item": np.arange(3)}}))["events"]["item"].tolist()
      [0, 1, 2]
    """
    plain, arrays = _split(fields)
    for name, value in plain.items():
        if isinstance(value, dict):
            plain[name], inner = _split(value)
            arrays |= {f"{name}.{key}": array for key, array in inner.items()}
    flat = {key: array for name, value in arrays.items() for key, array in _packable(name, value)}
    plain["arrays"] = [[name, NAMES.get(array.dtype) or array.dtype.name, array.shape] for name, array in flat.items()]
    text = ENCODE(plain).encode()
    text += b" " * (-(8 + len(text)) % 8)
    parts: list[Any] = [MAGIC, len(text).to_bytes(4, "little"), text]
    for array in flat.values():
        parts += [np.ascontiguousarray(array, array.dtype.newbyteorder("<")), bytes(-array.nbytes % 8)]
    return b"".join(parts)


def unpack(body: bytes) -> dict[str, Any]:
    """The fields of a frame, arrays without a copy. Raises BadCall for anything that is not a frame."""
    if body[:4] != MAGIC or len(body) < 8:
        raise BadCall("body", f"expected a frame that starts with {MAGIC.decode()}")
    size = int.from_bytes(body[4:8], "little")
    if size > min(HEADER_BYTES, len(body) - 8):
        raise BadCall("body", f"expected a header of at most {min(HEADER_BYTES, len(body) - 8)} bytes, it says {size}")
    fields = parse_json(body[8 : 8 + size])
    arrays = _arrays(body, fields.pop("arrays", []), 8 + size + -size % 8)
    for name in [name for name in arrays if name.endswith(".utf8")]:
        whole = name.removesuffix(".utf8")
        arrays[whole] = _texts(arrays.pop(name), arrays.pop(f"{whole}.offsets", None), whole)
    for name, value in arrays.items():
        group, dot, key = name.partition(".")
        inside = fields.setdefault(group, {}) if dot else fields
        if not isinstance(inside, dict) or (key or group) in inside:
            raise BadCall(name[:80], "expected one value, got two")
        inside[key or group] = value
    return fields


def parse_json(raw: bytes) -> dict[str, Any]:
    """A JSON object; BadCall for anything else, NaN, infinities and half a surrogate pair among it."""
    try:
        value = DECODE(text := raw.decode())
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # text that is no Unicode would fail later, and not for its caller
    except (ValueError, RecursionError) as error:
        raise BadCall("body", f"expected JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadCall("body", f"expected a JSON object, got {type(value).__name__}")
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


DECODE = json.JSONDecoder(parse_constant=_refuse).decode


def _split(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields without arrays, and the arrays."""
    arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    return {name: value for name, value in fields.items() if name not in arrays}, arrays


def _packable(name: str, array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    if array.dtype.kind not in "UTO":
        return [(name, array)]
    data = [text.encode() for text in array.tolist()]
    offsets = np.cumsum([0, *map(len, data)], dtype=np.int64)
    return [(f"{name}.utf8", np.frombuffer(b"".join(data), np.uint8)), (f"{name}.offsets", offsets)]


def _arrays(body: bytes, listed: Any, start: int) -> dict[str, Any]:
    """The arrays of a body by name, which end where the body does."""
    if not isinstance(listed, list) or len(listed) > MOST_ARRAYS:
        raise BadCall("arrays", f"expected a list of at most {MOST_ARRAYS} [name, dtype, shape]")
    arrays: dict[str, Any] = {}
    for entry in listed:
        good = isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str) and isinstance(entry[2], list)
        good = good and isinstance(entry[1], str) and entry[1] in DTYPES and len(entry[2]) <= 4 and entry[0] not in arrays
        if not good or not all(type(size) is int and 0 <= size < 1 << 40 for size in entry[2]):
            raise BadCall("arrays", f"expected [name, dtype among {', '.join(DTYPES)}, shape], got {str(entry)[:80]}")
        name, dtype, shape = entry[0], DTYPES[entry[1]], entry[2]
        count = math.prod(shape)
        stop = start + count * dtype.itemsize
        if stop > len(body):
            raise BadCall(name[:80], f"expected {stop - start} bytes of {entry[1]}{shape}, the body ends before")
        if dtype.kind == "b" and body[start:stop].translate(None, b"\0\1"):
            raise BadCall(name[:80], "expected bytes 0 and 1 of a bool")
        arrays[name] = np.frombuffer(body, dtype, count, start).reshape(shape)
        start = stop + -stop % 8
    if start != len(body):
        raise BadCall("body", f"expected {start} bytes as the header says, got {len(body)}")
    return arrays


def _texts(utf8: np.ndarray, offsets: Any, name: str) -> np.ndarray:
    """Strings [n]; BadCall where the two arrays do not fit."""
    good = isinstance(offsets, np.ndarray) and offsets.dtype == np.int64 and offsets.ndim == 1 and len(offsets) > 0
    good = good and utf8.dtype == np.uint8 and utf8.ndim == 1 and offsets[0] == 0 and offsets[-1] == len(utf8)
    if not good or (offsets[1:] < offsets[:-1]).any():
        raise BadCall(name[:80], "expected utf8 uint8 [m] and offsets int64 [n + 1] that rise from 0 to m")
    data, bounds = utf8.tobytes(), offsets.tolist()
    try:
        return string_array([data[start:stop].decode() for start, stop in itertools.pairwise(bounds)])
    except UnicodeDecodeError as error:
        raise BadCall(name[:80], f"expected UTF-8: {error.reason}") from None
