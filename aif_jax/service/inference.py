"""The Open Inference Protocol v2 over REST, with the extension for binary

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

import math
import re
from typing import Any

import numpy as np

from aif_jax.encoding.vocabulary import id_array
from aif_jax.service.calls import BadCall, Failure, parse
from aif_jax.service.core import Service
from aif_jax.service.http import CALL, JSON, PLAIN, READ, HttpRequest, Response, Route, encode, json_response, parse_json
from aif_jax.store.trained import __version__

MODEL = "preranking"
SCALARS = ("user", "k", "order", "now", "feature_version", "budget")
BINARY = "application/octet-stream"
LENGTH = b"inference-header-content-length"
PATH = re.compile(PLAIN + r"(/models/(?P<model>[^/]+)(/versions/(?P<version>[^/]+))?(/(?P<action>ready|infer))?)?/*")


class Inference:
    """The routes below /v2, but for health."""

    def __init__(self, service: Service):
        self._service = service

    def route(self, path: str) -> Route | None:
        """Return the route of a path, None where there is none."""
        match = PATH.fullmatch(path)
        if match is None:
            return None
        model, version, action = match["model"], match["version"] or "", match["action"]

        async def answer(request: HttpRequest) -> Response:
            if model is None:
                extensions = ["binary_tensor_data", "parameters"]
                return json_response({"name": "aif_jax", "version": __version__, "extensions": extensions})
            if model != MODEL:
                raise Failure("NOT_FOUND", 404, f"model: expected {MODEL!r}, got {model[:200]!r}", "model")
            if action == "infer":
                return await self._infer(request, version)
            if action is None:
                return json_response(self._metadata(version))
            ready = self._is_ready(version)
            return json_response({"name": MODEL, "ready": ready}, status=200 if ready else 503)

        return CALL if action == "infer" else READ, answer

    def _is_ready(self, version: str) -> bool:
        """Return whether a version, or the service, answers."""
        try:
            return self._service.unready is None and (not version or self._service.models.named(version) is not None)
        except Failure:
            return False

    def _metadata(self, version: str) -> dict[str, Any]:
        """Return versions, inputs and outputs of the model; raises Failure for a version that is not held."""
        models = self._service.models
        held = [models.named(version)] if version else models.held
        first = held[0]
        ids = "BYTES" if getattr(first.restored.index, "kind", "") == "strings" else "INT64"
        users = "INT64" if first.users.kind == "integers" else "BYTES"
        inputs = (("user", users, 1), ("candidates", ids, -1), ("k", "INT32", 1), ("bids", "FP32", -1), ("now", "INT64", 1))
        each = (-1, len(first.objectives)) if len(first.objectives) > 1 else (-1,)
        outputs = (("ids", ids, -1), ("scores", "FP32", -1), ("logits", "FP32", *each), ("mask", "BOOL", -1))
        listed = [[{"name": n, "datatype": kind, "shape": shape} for n, kind, *shape in part] for part in (inputs, outputs)]
        versions = [served.version for served in held]
        return {"name": MODEL, "versions": versions, "platform": "aif_jax", "inputs": listed[0], "outputs": listed[1]}

    async def _infer(self, request: HttpRequest, version: str) -> Response:
        """Answer tensors: with a ranking where `k` is among them, else with scores."""
        length = request.headers.get(LENGTH)
        if length is not None and not (length.isdigit() and len(length) < 10 and int(length) <= len(request.body)):
            raise BadCall(LENGTH.decode(), f"expected at most the {len(request.body)} bytes of the body, got {length[:20]!r}")
        end, policy = len(request.body) if length is None else int(length), self._service.policy
        head = parse_json(request.body[:end])
        fields: dict[str, Any] = {"id": head.get("id", ""), "version": version or None}
        for name, array in arrays_from(head.get("inputs"), request.body[end:]).items():
            put(fields, name, array)
        asked = tensors(head.get("outputs", []), "outputs")
        method, known = ("rank", ("ids", "scores", "logits")) if "k" in fields else ("score", ("logits", "mask"))
        if unknown := [name for name in asked if name not in known]:
            raise BadCall("outputs", f"expected some of {list(known)}, got {unknown[0][:200]!r}")
        answer = (await self._service.answer(method, parse(fields, policy, size=len(request.body)))).fields()
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
            return Response(200, JSON, text)
        return Response(200, BINARY, text + b"".join(parts), ((LENGTH, str(len(text)).encode()),))


# tensors

DTYPES = {
    "BOOL": np.bool_, "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "UINT8": np.uint8,
    "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64, "FP32": np.float32, "FP64": np.float64,
}  # fmt: skip
"""By datatype. In memory and on the wire the lowest byte is first, as on every machine that JAX runs on."""
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
MAX_TENSORS = 256


def put(fields: dict[str, Any], name: str, array: np.ndarray) -> None:
    """Add a tensor as the field NAME, or to the group of GROUP.NAME; raises BadCall where there is one."""
    group, dot, key = name.partition(".")
    value: Any = array
    if name in SCALARS or group == "record":
        if array.size != 1:
            raise BadCall(name, f"expected one value, got shape {list(array.shape)}")
        (value,) = array.ravel().tolist()
    elif group == "events" and array.dtype.kind not in "iu":
        value = array.tolist()
    inside = fields.setdefault(group, {}) if dot else fields
    if not isinstance(inside, dict) or (key or group) in inside:
        raise BadCall(name[:80], "expected one value, got two; send one")
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
    return b"".join(len(text).to_bytes(4, "little") + text for text in (each.encode() for each in array.ravel().tolist()))


def expect_shape(name: str, kind: Any, shape: Any) -> None:
    """Raise BadCall for a datatype or sizes that no tensor has."""
    good = isinstance(shape, list) and len(shape) <= 4 and isinstance(kind, str) and (kind in DTYPES or kind == "BYTES")
    if not good or not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):
        expected = f"a datatype among {', '.join(DTYPES)}, BYTES and sizes of 0 or more"
        raise BadCall(name, f"expected {expected}, got {kind!r:.40} and {shape!r:.80}")


def from_bytes(name: str, kind: str, shape: list[int], raw: bytes) -> np.ndarray:
    """Return a tensor from its raw contents; raises BadCall."""
    count = math.prod(shape)
    if kind == "BYTES":
        return _texts(name, raw, count).reshape(shape)
    dtype = np.dtype(DTYPES[kind])
    if len(raw) != count * dtype.itemsize:
        raise BadCall(name, f"expected {count * dtype.itemsize} bytes for {kind}{shape}, got {len(raw)}")
    if kind == "BOOL" and raw.translate(None, b"\0\1"):
        raise BadCall(name, f"expected bytes 0 and 1 of BOOL, got {raw[:8]!r}")
    return np.frombuffer(raw, dtype).reshape(shape)


def from_values(name: str, kind: str, shape: list[int], values: Any) -> np.ndarray:
    """Return a tensor from a list of plain values, flat or nested; raises BadCall."""
    if not isinstance(values, list):
        raise BadCall(name, f"expected `data`, a list, or `parameters` with `binary_data_size`, got {type(values).__name__}")
    try:
        given = np.array(values, object if kind == "BYTES" else None)
    except ValueError as error:
        raise BadCall(name, f"expected values of {kind}: {error}") from None
    if given.size != math.prod(shape):
        raise BadCall(name, f"expected {math.prod(shape)} values for {shape}, got {given.size}")
    if kind == "BYTES":
        if strange := [value for value in given.flat if not isinstance(value, str)]:
            raise BadCall(name, f"expected texts for BYTES, got {strange[0]!r:.80}")
        return id_array(given.ravel().tolist()).reshape(shape)
    dtype = np.dtype(DTYPES[kind])
    array = given.astype(dtype) if np.can_cast(given.dtype, dtype, "same_kind") or not given.size else None
    if array is None or not (dtype.kind == "f" or np.array_equal(array, given)):
        raise BadCall(name, f"expected values of {kind}, got {given.dtype.name} that do not fit")
    return array.reshape(shape)


def _texts(name: str, raw: bytes, count: int) -> np.ndarray:
    parts, start = [], 0
    while start < len(raw) and len(parts) <= count:
        end = start + 4 + int.from_bytes(raw[start : start + 4], "little")
        parts.append(raw[start + 4 : end])
        start = end
    if start != len(raw) or len(parts) != count:
        raise BadCall(name, f"expected {count} texts, each after its length in 4 bytes, got {len(raw)} bytes of something else")
    try:
        return id_array([part.decode() for part in parts])
    except UnicodeDecodeError as error:
        raise BadCall(name, f"expected UTF-8: {error.reason}") from None


def arrays_from(listed: Any, data: bytes) -> dict[str, np.ndarray]:
    """Return tensors by name; those with `binary_data_size` take their bytes from the data."""
    arrays: dict[str, np.ndarray] = {}
    start = 0
    for name, entry in tensors(listed, "tensors").items():
        kind: Any = entry.get("datatype")
        shape: Any = entry.get("shape")
        expect_shape(name, kind, shape)
        size = parameter(entry, "binary_data_size")
        if size is None:
            arrays[name] = from_values(name, kind, shape, entry.get("data"))
        elif type(size) is int and 0 <= size <= len(data) - start:
            arrays[name] = from_bytes(name, kind, shape, data[start : start + size])
            start += size
        else:
            raise BadCall(name, f"expected binary_data_size of at most the {len(data) - start} bytes left, got {size!r:.40}")
    if start < len(data):
        raise BadCall("body", f"expected {start} bytes of tensors, got {len(data)}")
    return arrays
