"""The Open Inference Protocol v2, as tensors: what REST and gRPC share.

| input | type and shape | |
|---|---|---|
| user | INT64 or BYTES [1] | raw id |
| candidates | INT64 or BYTES [C] | raw ids |
| k | INT32 or INT64 [1] | with it the best k are answered, without it a logit for each candidate |
| exclude | INT64 or BYTES [E] | optional: ids that are not ranked or scored |
| bids, order, now, feature_version, budget | FP32 [C], BYTES [1], INT64 [1], INT64 or BYTES [1], FP64 [1] | optional |
| features.NAME | as the model's features | optional: encoded |
| record.COLUMN, events.COLUMN | INT64, FP64 or BYTES, [1] and [n] | optional: raw |

Outputs are ids, scores and logits [at most k], or logits and mask [C]; of a model of T objectives logits are [.., T].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aif_jax.encoding.vocabulary import string_array
from aif_jax.service.answers import rank_fields, score_fields
from aif_jax.service.calls import BadCall, parse
from aif_jax.service.core import Service
from aif_jax.service.errors import UnknownModel, UnknownVersion
from aif_jax.store.version import __version__

DATATYPES = {
    "BOOL": "?", "INT8": "<i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "UINT8": "<u1",
    "UINT16": "<u2", "UINT32": "<u4", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
NAMES = {np.dtype(code).name: name for name, code in DATATYPES.items()}
MODEL = "preranking"
EXTENSIONS = ("binary_tensor_data", "parameters")
SCALARS = ("user", "k", "order", "now", "feature_version", "budget")
GROUPS = ("features", "record", "events")
MOST_TENSORS = 256


class Inferred(NamedTuple):
    """An answer in tensors."""

    version: str
    outputs: dict[str, np.ndarray]
    parameters: dict[str, Any]  # degraded; where it is, reason; of a ranking that leaves ids out, excluded


def expect_model(name: str) -> None:
    """Raises UnknownModel unless the name is that of the one model there is."""
    if name != MODEL:
        raise UnknownModel(f"model: expected {MODEL!r}, got {name[:200]!r}")


def is_ready(service: Service, version: str = "") -> bool:
    """Whether a version, or the service, answers."""
    if service.unready is not None:
        return False
    try:
        return not version or service.models.named(version) is not None
    except UnknownVersion:
        return False


def server_metadata() -> dict[str, Any]:
    """Name, version and extensions."""
    return {"name": "aif_jax", "version": __version__, "extensions": list(EXTENSIONS)}


def model_metadata(service: Service, version: str = "") -> dict[str, Any]:
    """Versions, inputs and outputs; raises UnknownVersion."""
    held = [service.models.named(version)] if version else service.models.held
    index = held[0].restored.index if held else None
    ids = "BYTES" if index is not None and index.kind == "strings" else "INT64"
    inputs = (("user", "BYTES", 1), ("candidates", ids, -1), ("k", "INT32", 1), ("bids", "FP32", -1))
    objectives = held[0].objectives if held else ()
    each = (-1, len(objectives)) if len(objectives) > 1 else (-1,)
    outputs = (("ids", ids, -1), ("scores", "FP32", -1), ("logits", "FP32", *each), ("mask", "BOOL", -1))
    listed = [[{"name": n, "datatype": kind, "shape": shape} for n, kind, *shape in part] for part in (inputs, outputs)]
    versions = [served.version for served in held]
    return {"name": MODEL, "versions": versions, "platform": "aif_jax", "inputs": listed[0], "outputs": listed[1]}


async def infer(service: Service, *, version: str, call_id: str, inputs: Mapping[str, np.ndarray]) -> Inferred:
    """The answer to tensors: a ranking where `k` is among them, else scores; raises as `Service.rank`."""
    fields: dict[str, Any] = {"id": call_id, "version": version or None}
    for name, array in inputs.items():
        group, dot, key = name.partition(".")
        if dot and group in GROUPS:
            one = group == "record"
            fields.setdefault(group, {})[key] = (
                _scalar(array, name) if one else array if group == "features" else _column(array)
            )
        else:
            fields[name] = _scalar(array, name) if name in SCALARS else array
    call = parse(fields, service.policy.limits)
    if "k" in fields:
        answer = rank_fields(await service.rank(call), call.id)
        outputs = {name: answer[name] for name in ("ids", "scores", "logits")}
    else:
        answer = score_fields(await service.score(call), call.id)
        outputs = {name: answer[name] for name in ("logits", "mask")}
    more = {name: answer[name] for name in ("reason", "excluded") if answer.get(name)}
    return Inferred(answer["version"], outputs, {"degraded": answer["degraded"]} | more)


def chosen(outputs: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The outputs that were asked for, all where none were named; raises BadCall for others."""
    if unknown := [name for name in names if name not in outputs]:
        raise BadCall("outputs", f"expected some of {list(outputs)}, got {unknown[0][:200]!r}")
    return {name: outputs[name] for name in names} if names else outputs


def datatype(array: np.ndarray) -> str:
    """The protocol's name of a dtype."""
    return NAMES.get(array.dtype.name, "BYTES")


def to_bytes(array: np.ndarray) -> bytes:
    """A tensor's raw contents."""
    if datatype(array) != "BYTES":
        return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    return b"".join(len(text).to_bytes(4, "little") + text for text in (each.encode() for each in array.tolist()))


def expect_shape(name: str, kind: Any, shape: Any) -> list[int]:
    """Sizes of a tensor; raises BadCall for what cannot be one."""
    sizes = shape if isinstance(shape, list) else []
    good = isinstance(shape, list) and len(sizes) <= 4 and all(type(size) is int and 0 <= size < 1 << 40 for size in sizes)
    if not good or not isinstance(kind, str) or (kind not in DATATYPES and kind != "BYTES"):
        raise BadCall(name, f"expected a datatype among {', '.join(DATATYPES)}, BYTES and sizes of 0 or more, got others")
    return sizes


def from_bytes(name: str, kind: str, shape: list[int], raw: bytes) -> np.ndarray:
    """A tensor from its raw contents; raises BadCall."""
    count = math.prod(shape)
    if kind == "BYTES":
        return _texts(name, _split(name, raw, count)).reshape(shape)
    dtype = np.dtype(DATATYPES[kind])
    if len(raw) != count * dtype.itemsize:
        raise BadCall(name, f"expected {count * dtype.itemsize} bytes for {kind}{shape}, got {len(raw)}")
    if kind == "BOOL" and (np.frombuffer(raw, np.uint8) > 1).any():
        raise BadCall(name, "expected bytes 0 and 1 of BOOL")
    return np.frombuffer(raw, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def from_values(name: str, kind: str, shape: list[int], values: Sequence[Any]) -> np.ndarray:
    """A tensor from a flat list of plain values; raises BadCall."""
    count = math.prod(shape)
    if len(values) != count:
        raise BadCall(name, f"expected {count} values for {shape}, got {len(values)}")
    if kind == "BYTES":
        if not all(isinstance(value, str | bytes) for value in values):
            raise BadCall(name, "expected texts for BYTES, got others")
        return _texts(name, values).reshape(shape)
    wanted = {"B": bool, "I": int, "U": int}.get(kind[0], (int, float))
    if not all(isinstance(value, wanted) and (kind == "BOOL" or not isinstance(value, bool)) for value in values):
        raise BadCall(name, f"expected values of {kind}, got others")
    try:
        return np.array(values, np.dtype(DATATYPES[kind]).newbyteorder("=")).reshape(shape)
    except (OverflowError, ValueError) as error:
        raise BadCall(name, f"expected values of {kind}: {error}") from None


def _split(name: str, raw: bytes, count: int) -> list[bytes]:
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
        return string_array([value.decode() if isinstance(value, bytes) else value for value in values])
    except UnicodeDecodeError as error:
        raise BadCall(name, f"expected UTF-8: {error.reason}") from None


def _scalar(array: np.ndarray, name: str) -> Any:
    if array.size != 1:
        raise BadCall(name, f"expected one value, got shape {list(array.shape)}")
    return array.reshape(-1).tolist()[0]


def _column(array: np.ndarray) -> Any:
    return array if array.dtype.kind in "iu" else array.tolist()
