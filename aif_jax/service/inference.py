"""The Open Inference Protocol v2 over REST, with the extension for binary

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

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from aif_jax.encoding.vocabulary import id_array
from aif_jax.service.calls import BadCall, UnknownModel, UnknownVersion, exact_numbers, parse, reported
from aif_jax.service.core import Service
from aif_jax.service.http import JSON, HttpRequest, Response, encode, json_response, parse_json
from aif_jax.store.trained import __version__

MODEL = "preranking"
EXTENSIONS = ("binary_tensor_data", "parameters")
SCALARS = ("user", "k", "order", "now", "feature_version", "budget")


def _scalar(array: np.ndarray, name: str) -> Any:
    if array.size != 1:
        raise BadCall(name, f"expected one value, got shape {list(array.shape)}")
    return array.reshape(-1).tolist()[0]


def _column(array: np.ndarray) -> Any:
    return array if array.dtype.kind in "iu" else array.tolist()


BINARY = "application/octet-stream"
LENGTH = b"inference-header-content-length"
ROUTE = re.compile(
    r"/v2(/health/(?P<health>live|ready)|/models/(?P<model>[^/]+)(/versions/(?P<version>[^/]+))?(/(?P<action>ready|infer))?)?"
)


class InferenceRest:
    """The routes below /v2."""

    def __init__(self, service: Service):
        self._service = service

    async def __call__(self, request: HttpRequest) -> Response:
        """Answer a request; errors are `{"error": "..."}`, as the protocol has them."""
        try:
            return await self._route(request)
        except Exception as error:
            problem = reported(error)
            return json_response({"error": problem.message}, status=problem.status)

    async def _route(self, request: HttpRequest) -> Response:
        match = ROUTE.fullmatch(request.path.rstrip("/"))
        if match is None:
            return json_response({"error": "no such path"}, status=404)
        health, model, version, action = match["health"], match["model"], match["version"] or "", match["action"]
        allowed = ("POST",) if action == "infer" else ("GET", "HEAD")
        if request.method not in allowed:
            listed = ", ".join(allowed)
            wrong = json_response({"error": f"{request.path}: expected {listed}, got {request.method}"}, status=405)
            return wrong._replace(headers=((b"allow", listed.encode()),))
        if health is not None:
            good = health == "live" or self._is_ready()
            return json_response({health: good}, status=200 if good else 503)
        if model is None:
            return json_response({"name": "aif_jax", "version": __version__, "extensions": list(EXTENSIONS)})
        if model != MODEL:
            raise UnknownModel(f"model: expected {MODEL!r}, got {model[:200]!r}")
        if action == "infer":
            return await self._infer(request, version)
        if action == "ready":
            good = self._is_ready(version)
            return json_response({"name": MODEL, "ready": good}, status=200 if good else 503)
        return json_response(self._metadata(version))

    def _is_ready(self, version: str = "") -> bool:
        """Return whether a version, or the service, answers."""
        if self._service.unready is not None:
            return False
        try:
            return not version or self._service.models.named(version) is not None
        except UnknownVersion:
            return False

    def _metadata(self, version: str) -> dict[str, Any]:
        """Return versions, inputs and outputs of the model; raises UnknownVersion."""
        models = self._service.models
        held = [models.named(version)] if version else models.held
        index = held[0].restored.index if held else None
        ids = "BYTES" if index is not None and index.kind == "strings" else "INT64"
        encoder = held[0].restored.trained.encoder if held else None
        users = "INT64" if encoder is not None and encoder.vocabularies["user"].kind == "integers" else "BYTES"
        inputs = (("user", users, 1), ("candidates", ids, -1), ("k", "INT32", 1), ("bids", "FP32", -1), ("now", "INT64", 1))
        objectives = held[0].objectives if held else ()
        each = (-1, len(objectives)) if len(objectives) > 1 else (-1,)
        outputs = (("ids", ids, -1), ("scores", "FP32", -1), ("logits", "FP32", *each), ("mask", "BOOL", -1))
        listed = [[{"name": n, "datatype": kind, "shape": shape} for n, kind, *shape in part] for part in (inputs, outputs)]
        versions = [served.version for served in held]
        return {"name": MODEL, "versions": versions, "platform": "aif_jax", "inputs": listed[0], "outputs": listed[1]}

    async def _infer(self, request: HttpRequest, version: str) -> Response:
        """Answer tensors: with a ranking where `k` is among them, else with scores."""
        length = request.headers.get(LENGTH)
        if length is not None and not (length.isdigit() and len(length) < 10 and int(length) <= len(request.body)):
            expected = f"expected at most the {len(request.body)} bytes of the body, got {length[:20]!r}"
            raise BadCall("inference-header-content-length", expected)
        end, limits = len(request.body) if length is None else int(length), self._service.policy.limits
        head, data = parse_json(request.body[:end]), request.body[end:]
        fields: dict[str, Any] = {"id": head.get("id", ""), "version": version or None}
        for name, array in arrays_from(head.get("inputs"), data, texts=limits.texts).items():
            one, column = name in SCALARS or name.startswith("record."), name.startswith("events.")
            put(fields, name, _scalar(array, name) if one else _column(array) if column else array)
        names, binary = _outputs(head)
        method, wanted = ("rank", ("ids", "scores", "logits")) if "k" in fields else ("score", ("logits", "mask"))
        if unknown := [name for name in names if name not in wanted]:
            raise BadCall("outputs", f"expected some of {list(wanted)}, got {unknown[0][:200]!r}")
        answer = (await self._service.answer(method, parse(fields, limits))).fields()
        more = {name: answer[name] for name in ("reason", "excluded") if answer.get(name)}
        shown = {"model_name": MODEL, "model_version": answer["version"], "parameters": {"degraded": answer["degraded"]} | more}
        shown |= {"id": answer["id"]} if answer["id"] else {}
        outputs, parts = [], []
        for name in names or wanted:
            outputs.append(described(name, answer[name]))
            if binary.get(name, binary[""]):
                parts.append(to_bytes(answer[name]))
                outputs[-1]["parameters"] = {"binary_data_size": len(parts[-1])}
            else:
                outputs[-1]["data"] = answer[name]
        text = encode(shown | {"outputs": outputs})
        if not parts:
            return Response(200, JSON, text)
        return Response(200, BINARY, text + b"".join(parts), ((LENGTH, str(len(text)).encode()),))


def _outputs(head: dict[str, Any]) -> tuple[list[str], dict[str, bool]]:
    """Return the outputs that are wanted, and which of them in binary; of "" for those that do not say."""
    parameters = head.get("parameters")
    binary = {"": isinstance(parameters, dict) and parameters.get("binary_data_output") is True}
    names, listed = [], head.get("outputs", [])
    if not isinstance(listed, list) or len(listed) > MAX_TENSORS:
        raise BadCall("outputs", f"expected a list of at most {MAX_TENSORS} tensors, got {type(listed).__name__}")
    for entry in listed:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise BadCall("outputs", f"expected tensors with names, got {entry!r:.80}")
        names.append(entry["name"])
        inner = entry.get("parameters")
        if isinstance(inner, dict) and "binary_data" in inner:
            binary[entry["name"]] = inner["binary_data"] is True
    return names, binary


# tensors

DATATYPES = {
    "BOOL": "?", "INT8": "<i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "UINT8": "<u1",
    "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
DTYPES = {name: np.dtype(code) for name, code in DATATYPES.items()}
NAMES = {dtype.newbyteorder("="): name for name, dtype in DTYPES.items()}  # of answers, which are in native order
MAX_TENSORS = 256


def put(fields: dict[str, Any], name: str, value: Any) -> None:
    """Add a field, GROUP.NAME to its group; raises BadCall where there is one."""
    group, dot, key = name.partition(".")
    inside = fields.setdefault(group, {}) if dot else fields
    if not isinstance(inside, dict) or (key or group) in inside:
        raise BadCall(name[:80], "expected one value, got two; send one")
    inside[key or group] = value


def described(name: str, array: np.ndarray) -> dict[str, Any]:
    """Return a tensor's name, datatype and shape."""
    return {"name": name, "datatype": NAMES.get(array.dtype, "BYTES"), "shape": list(array.shape)}


def to_bytes(array: np.ndarray) -> bytes:
    """Return a tensor's raw contents."""
    if array.dtype in NAMES:
        return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return b"".join(len(text).to_bytes(4, "little") + text for text in (each.encode() for each in array.ravel().tolist()))


def expect_shape(name: str, kind: Any, shape: Any) -> list[int]:
    """Return sizes of a tensor; raises BadCall for what cannot be one."""
    good = isinstance(shape, list) and len(shape) <= 4 and isinstance(kind, str) and (kind in DATATYPES or kind == "BYTES")
    for size in shape if good else ():
        good = good and type(size) is int and 0 <= size < 1 << 40
    if not good:
        expected = f"a datatype among {', '.join(DATATYPES)}, BYTES and sizes of 0 or more"
        raise BadCall(name, f"expected {expected}, got {kind!r:.40} and {shape!r:.80}")
    return shape


def from_bytes(name: str, kind: str, shape: list[int], raw: bytes | memoryview) -> np.ndarray:
    """Return a tensor from its raw contents; raises BadCall."""
    count = math.prod(shape)
    if kind == "BYTES":
        return _texts(name, _split_texts(name, bytes(raw), count)).reshape(shape)
    dtype = DTYPES[kind]
    if len(raw) != count * dtype.itemsize:
        raise BadCall(name, f"expected {count * dtype.itemsize} bytes for {kind}{shape}, got {len(raw)}")
    if kind == "BOOL" and bytes(raw).translate(None, b"\0\1"):
        raise BadCall(name, f"expected bytes 0 and 1 of BOOL, got {bytes(raw[:8])!r}")
    return np.frombuffer(raw, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def from_values(name: str, kind: str, shape: list[int], values: Any) -> np.ndarray:
    """Return a tensor from a list of plain values, flat or nested; raises BadCall."""
    if not isinstance(values, list):
        raise BadCall(name, f"expected `data`, a list, or `parameters` with `binary_data_size`, got {type(values).__name__}")
    try:
        array = np.array(values, object).ravel() if kind == "BYTES" else exact_numbers(values, DTYPES[kind])
    except (TypeError, ValueError, OverflowError) as error:
        raise BadCall(name, f"expected values of {kind}: {error}") from None
    if array.size != math.prod(shape):
        raise BadCall(name, f"expected {math.prod(shape)} values for {shape}, got {array.size}")
    if kind == "BYTES":
        if strange := [value for value in array if not isinstance(value, str)]:
            raise BadCall(name, f"expected texts for BYTES, got {strange[0]!r:.80}")
        array = _texts(name, array.tolist())
    return array.reshape(shape)


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
    """Return tensors by name, with at most so many texts; those with `binary_data_size` take their bytes from the data."""
    if not isinstance(listed, list) or len(listed) > MAX_TENSORS:
        raise BadCall("tensors", f"expected a list of at most {MAX_TENSORS}, got {listed!r:.40}")
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
            arrays[name] = from_values(name, kind, shape, entry.get("data"))
        elif type(size) is int and 0 <= size <= len(data) - start:
            arrays[name] = from_bytes(name, kind, shape, data[start : start + size])
            start += size
        else:
            raise BadCall(name, f"expected binary_data_size of at most the {len(data) - start} bytes left, got {size!r:.40}")
    if start < len(data):
        raise BadCall("body", f"expected {start} bytes of tensors, got {len(data)}")
    return arrays
