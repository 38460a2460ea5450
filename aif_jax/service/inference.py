"""The Open Inference Protocol v2 over REST, with the extension for binary tensor data:

| input | type and shape | |
|---|---|---|
| user | INT64 or BYTES [1] | raw id |
| candidates | INT64 or BYTES [C] | raw ids |
| k | INT32 or INT64 [1] | with it the best k are answered, without it a logit for each candidate |
| exclude | INT64 or BYTES [E] | optional: ids that are not ranked or scored |
| bids, order, now, feature_version, budget | FP32 [C], BYTES [1], INT64 [1], INT64 or BYTES [1], FP64 [1] | optional |
| record.COLUMN, events.COLUMN | INT64, FP64 or BYTES, [1] and [n] | optional: raw |

Outputs are ids, scores and logits [at most k], or logits and mask [C]; of a model of T objectives logits are [.., T].
"""

import functools
import re
import struct
from typing import Any, TypeAlias

import numpy as np

from aif_jax.service.calls import BadCall, Failure, parse
from aif_jax.service.core import Service
from aif_jax.service.http import CALL, READ, V2, Headers, Response, Route, encode, parse_json
from aif_jax.store.trained import __version__

MODEL = "preranking"
SCALARS = ("user", "k", "order", "now", "feature_version", "budget")
BINARY = "application/octet-stream"
LENGTH = b"inference-header-content-length"
SIZE = struct.Struct("<I")  # of a text, before it
PATH = re.compile(rf"{V2}(?:/models/([^/]+)(?:/versions/([^/]+))?(/ready|/infer)?)?/*")


class Inference:
    """The routes below /v2, but for health; `most` candidates of a call, see `Listening.max_candidates`."""

    def __init__(self, service: Service, most: int):
        self._service, self._most = service, most

    def route(self, path: str) -> Route:
        """Return the route of a path. Raises Failure where there is none, and for another model."""
        match = PATH.fullmatch(path)
        if match is None:
            raise Failure("NOT_FOUND", 404, "no such path")
        model, version, action = match.groups()
        if model is None:
            about = {"name": "aif_jax", "version": __version__, "extensions": ["binary_tensor_data", "parameters"]}
            return READ, lambda: Response(encode(about))
        if model != MODEL:
            raise Failure("NOT_FOUND", 404, f"model: expected {MODEL!r}, got {model[:200]!r}", "model")
        if action == "/infer":
            return CALL, functools.partial(self._infer, version)
        return READ, functools.partial(self._ready if action else self._metadata, version)

    def _ready(self, version: str | None) -> Response:
        """Return whether the service answers; raises Failure for a version that is not held."""
        ready = self._service.unready is None
        if version:
            self._service.models.named(version)
        return Response(encode({"name": MODEL, "ready": ready}), status=200 if ready else 503)

    def _metadata(self, version: str | None) -> Response:
        """Return versions, inputs and outputs of the model; raises Failure for a version that is not held."""
        models = self._service.models
        held = [models.named(version)] if version else models.held
        first = held[0]
        ids = "BYTES" if getattr(first.restored.index, "kind", "") == "strings" else "INT64"
        users = "INT64" if first.users.encoder.vocabularies["user"].kind == "integers" else "BYTES"
        inputs = (("user", users, 1), ("candidates", ids, -1), ("k", "INT32", 1), ("bids", "FP32", -1), ("now", "INT64", 1))
        each = (-1, len(first.objectives)) if len(first.objectives) > 1 else (-1,)
        outputs = (("ids", ids, -1), ("scores", "FP32", -1), ("logits", "FP32", *each), ("mask", "BOOL", -1))
        listed = [[{"name": n, "datatype": kind, "shape": shape} for n, kind, *shape in part] for part in (inputs, outputs)]
        versions = [served.version for served in held]
        about = {"name": MODEL, "versions": versions, "platform": "aif_jax", "inputs": listed[0], "outputs": listed[1]}
        return Response(encode(about))

    async def _infer(self, version: str | None, headers: Headers, body: bytes) -> Response:
        """Answer tensors: with a ranking where `k` is among them, else with scores."""
        length = headers.get(LENGTH)
        if length is not None and not (length.isdigit() and len(length) < 10 and int(length) <= len(body)):
            raise BadCall(LENGTH.decode(), f"expected at most the {len(body)} bytes of the body, got {length[:20]!r}")
        end = len(body) if length is None else int(length)
        head = parse_json(body[:end])
        fields: dict[str, Any] = {"id": head.get("id", ""), "version": version}
        for name, values in values_from(head.get("inputs"), body[end:], self._most).items():
            put(fields, name, values)
        asked = tensors(head.get("outputs", []), "outputs")
        method, known = ("rank", ("ids", "scores", "logits")) if "k" in fields else ("score", ("logits", "mask"))
        if unknown := [name for name in asked if name not in known]:
            raise BadCall("outputs", f"expected some of {list(known)}, got {unknown[0][:200]!r}")
        answer = (await self._service.answer(method, parse(fields, self._most, size=len(body)))).fields()
        more = {name: answer[name] for name in ("reason", "excluded") if answer.get(name)}
        shown = {"model_name": MODEL, "model_version": answer["version"], "parameters": {"degraded": answer["degraded"]} | more}
        shown |= {"id": answer["id"]} if answer["id"] else {}
        outputs, parts, default = [], [], parameter(head, "binary_data_output")
        for name in asked or known:
            outputs.append(described(name, answer[name]))
            binary = parameter(asked.get(name, {}), "binary_data")
            if (default if binary is None else binary) is True:
                parts.append(to_bytes(answer[name]))
                outputs[-1]["parameters"] = {"binary_data_size": len(parts[-1])}
            else:
                outputs[-1]["data"] = answer[name]
        text = encode(shown | {"outputs": outputs})
        if not parts:
            return Response(text)
        return Response(text + b"".join(parts), BINARY, headers=((LENGTH, str(len(text)).encode()),))


DTYPES = {
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "UINT8": np.uint8, "UINT16": np.uint16,
    "UINT32": np.uint32, "UINT64": np.uint64, "FP32": np.float32, "FP64": np.float64,
}  # fmt: skip
"""Numbers by datatype. In memory and on the wire the lowest byte is first, as on every machine that JAX runs on."""
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()} | {np.dtype(np.bool_): "BOOL"}
MAX_TENSORS = 256
Values: TypeAlias = np.ndarray | list[Any]


def put(fields: dict[str, Any], name: str, values: Values) -> None:
    """Add a tensor's values as the field NAME, or to the group of GROUP.NAME; raises BadCall where there is one."""
    group, dot, key = name.partition(".")
    value: Any = values
    if name in SCALARS or group == "record":
        if len(values) != 1:
            raise BadCall(name, f"expected one value, got {len(values)}")
        (value,) = values.tolist() if isinstance(values, np.ndarray) else values
        value = None if dot and value != value else value  # NaN: not known, as null
    inside = fields.setdefault(group, {}) if dot else fields
    if not isinstance(inside, dict) or (key or group) in inside:
        raise BadCall(name[:80], "expected another name, got one that is taken; id is a field of the body, version of the path")
    inside[key or group] = value


def tensors(listed: Any, where: str) -> dict[str, dict[str, Any]]:
    """Return what a call lists of tensors by name; raises BadCall."""
    if not isinstance(listed, list) or len(listed) > MAX_TENSORS:
        raise BadCall(where, f"expected a list of at most {MAX_TENSORS} tensors, got {listed!r:.40}")
    named: dict[str, dict[str, Any]] = {}
    for entry in listed:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name in named:
            raise BadCall(where, f"expected different names, got {name!r:.80}")
        named[name] = entry
    return named


def parameter(entry: dict[str, Any], name: str) -> Any:
    """Return a parameter of a call or a tensor, None for none."""
    parameters = entry.get("parameters")
    return parameters.get(name) if isinstance(parameters, dict) else None


def described(name: str, array: np.ndarray) -> dict[str, Any]:
    """Return a tensor's name, datatype and shape."""
    return {"name": name, "datatype": NAMES.get(array.dtype, "BYTES"), "shape": list(array.shape)}


def to_bytes(array: np.ndarray) -> bytes:
    """Return a tensor's raw contents."""
    if array.dtype in NAMES:
        return array.tobytes()
    return b"".join(len(text).to_bytes(4, "little") + text for text in (each.encode() for each in array.tolist()))


def values_from(listed: Any, data: bytes, most: int) -> dict[str, Values]:
    """Return the values of tensors of one axis by name; those with `binary_data_size` are in the data, one after the other."""
    values: dict[str, Values] = {}
    start, room = 0, 2 * most  # texts
    for name, entry in tensors(listed, "inputs").items():
        kind, shape = entry.get("datatype"), entry.get("shape")
        if not isinstance(kind, str) or not (kind in DTYPES or kind == "BYTES"):
            raise BadCall(name, f"expected a datatype among {', '.join(DTYPES)}, BYTES, got {kind!r:.40}")
        if not (isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int and shape[0] >= 0):
            raise BadCall(name, f"expected a shape of one axis, such as [1], got {shape!r:.80}")
        size, (count,) = parameter(entry, "binary_data_size"), shape
        room -= count if kind == "BYTES" else 0
        if room < 0:  # each takes time and memory, also one without a character
            raise BadCall(name, f"expected at most {2 * most} texts in all, got {count} with those before")
        if size is None:
            values[name] = from_json(name, kind, count, entry.get("data"))
        elif type(size) is int and 0 <= size <= len(data) - start:
            values[name] = from_bytes(name, kind, count, data[start : start + size])
            start += size
        else:
            raise BadCall(name, f"expected binary_data_size of at most the {len(data) - start} bytes left, got {size!r:.40}")
    if start < len(data):
        raise BadCall("body", f"expected {start} bytes of tensors, got {len(data)}")
    return values


def from_bytes(name: str, kind: str, count: int, raw: bytes) -> Values:
    """Return a tensor's values from its raw contents; raises BadCall."""
    if kind != "BYTES":
        dtype = np.dtype(DTYPES[kind])
        if len(raw) != count * dtype.itemsize:
            raise BadCall(name, f"expected {count * dtype.itemsize} bytes for {kind}[{count}], got {len(raw)}")
        return np.frombuffer(raw, dtype)
    texts, end = [], 0
    try:
        for _ in range(count):
            start = end + SIZE.size
            end = start + SIZE.unpack_from(raw, end)[0]
            texts.append(raw[start:end].decode())
    except (struct.error, UnicodeDecodeError):
        end = -1
    if end != len(raw):
        raise BadCall(name, f"expected {count} texts in UTF-8, each after its length in 4 bytes, got {len(raw)} other bytes")
    return texts


def from_json(name: str, kind: str, count: int, values: Any) -> list[Any]:
    """Return a tensor's values, which JSON has as a list, null where /v1 takes it; raises BadCall."""
    if not isinstance(values, list):
        raise BadCall(name, f"expected `data`, a list, or `parameters` with `binary_data_size`, got {type(values).__name__}")
    if len(values) != count:
        raise BadCall(name, f"expected {count} values, got {len(values)}")
    types: Any = str if kind == "BYTES" else (int, float) if kind.startswith("FP") else int
    if strange := [each for each in values if (each is not None and not isinstance(each, types)) or isinstance(each, bool)]:
        raise BadCall(name, f"expected values of {kind}, got {strange[0]!r:.80}")
    return values
