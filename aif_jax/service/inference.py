"""The Open Inference Protocol v2, over REST (with the extension for binary tensors) and gRPC.

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

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aif_jax.encoding.vocabulary import string_array
from aif_jax.service import rpc
from aif_jax.service.calls import BadCall, UnknownModel, UnknownVersion, parse, reported
from aif_jax.service.core import Service, rank_fields, score_fields, to_json
from aif_jax.service.frame import parse_json
from aif_jax.service.http import JSON, Asked, Response, json_response
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
        expected = f"a datatype among {', '.join(DATATYPES)}, BYTES and sizes of 0 or more"
        raise BadCall(name, f"expected {expected}, got {kind!r:.40} and {shape!r:.80}")
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
        if strange := [value for value in values if not isinstance(value, str | bytes)]:
            raise BadCall(name, f"expected texts for BYTES, got {strange[0]!r:.80}")
        return _texts(name, values).reshape(shape)
    wanted = {"B": bool, "I": int, "U": int}.get(kind[0], (int, float))
    if not all(isinstance(value, wanted) and (kind == "BOOL" or not isinstance(value, bool)) for value in values):
        raise BadCall(name, f"expected values of {kind}, got {values!r:.80}")
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


LENGTH = b"inference-header-content-length"
OCTETS = "application/octet-stream"


class InferenceRest:
    """The routes below /v2."""

    def __init__(self, service: Service):
        self._service = service

    async def __call__(self, asked: Asked) -> Response:
        """Answers a request; errors are `{"error": "..."}`, as the protocol has them."""
        try:
            return await self._route(asked, asked.path.strip("/").split("/")[1:])
        except Exception as error:
            problem = reported(error)
            return json_response({"error": problem.message}, status=problem.status)

    async def _route(self, asked: Asked, parts: list[str]) -> Response:
        service = self._service
        version, rest = "", parts[2:]
        if parts[:1] == ["models"] and len(parts) > 1:
            if len(parts) > 3 and parts[2] == "versions":
                version, rest = parts[3], parts[4:]
            good = rest in ([], ["ready"], ["infer"])
        else:
            good = parts in ([], ["health", "live"], ["health", "ready"])
        if not good:
            return json_response({"error": "no such path"}, status=404)
        allowed = ("POST",) if parts and rest == ["infer"] else ("GET", "HEAD")
        if asked.method not in allowed:
            listed = ", ".join(allowed)
            wrong = json_response({"error": f"{asked.path}: expected {listed}, got {asked.method}"}, status=405)
            return wrong._replace(headers=((b"allow", listed.encode()),))
        if not parts:
            return json_response(server_metadata())
        if parts[0] == "health":
            good = parts[1] == "live" or is_ready(service)
            return json_response({parts[1]: good}, status=200 if good else 503)
        expect_model(parts[1])
        if rest == ["infer"]:
            return await self._infer(asked, version)
        if rest == ["ready"]:
            good = is_ready(service, version)
            return json_response({"name": MODEL, "ready": good}, status=200 if good else 503)
        return json_response(model_metadata(service, version))

    async def _infer(self, asked: Asked, version: str) -> Response:
        length = asked.headers.get(LENGTH)
        if length is not None and not (length.isdigit() and len(length) < 10 and int(length) <= len(asked.body)):
            raise BadCall("inference-header-content-length", f"expected at most the {len(asked.body)} bytes of the body")
        end = len(asked.body) if length is None else int(length)
        head, data = parse_json(asked.body[:end]), asked.body[end:]
        inputs = _inputs(head.get("inputs"), data)
        call_id = head.get("id", "")
        wanted, binary = _outputs(head)
        answer = await infer(self._service, version=version, call_id=call_id, inputs=inputs)
        fields = {"model_name": MODEL, "model_version": answer.version, "parameters": answer.parameters}
        if call_id:
            fields["id"] = call_id
        outputs, parts = [], []
        for name, array in chosen(answer.outputs, wanted).items():
            entry: dict[str, Any] = {"name": name, "datatype": datatype(array), "shape": list(array.shape)}
            if binary.get(name, binary[""]):
                parts.append(to_bytes(array))
                entry["parameters"] = {"binary_data_size": len(parts[-1])}
            else:
                entry["data"] = to_json(array)
            outputs.append(entry)
        text = json.dumps(fields | {"outputs": outputs}).encode()
        if not parts:
            return Response(200, JSON, text)
        return Response(200, OCTETS, text + b"".join(parts), ((LENGTH, str(len(text)).encode()),))


def _inputs(listed: Any, data: bytes) -> dict[str, np.ndarray]:
    """Tensors by name; those with `binary_data_size` take their bytes from the data, in order."""
    if not isinstance(listed, list) or len(listed) > MOST_TENSORS:
        raise BadCall("inputs", f"expected a list of at most {MOST_TENSORS} tensors")
    tensors: dict[str, np.ndarray] = {}
    for entry in listed:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name in tensors:
            raise BadCall("inputs", "expected tensors with different names")
        kind: Any = entry.get("datatype")
        shape = expect_shape(name, kind, entry.get("shape"))
        parameters = entry.get("parameters") or {}
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        if size is None:
            tensors[name] = from_values(name, kind, shape, _flat(name, entry.get("data"), 4))
        elif type(size) is int and 0 <= size <= len(data):
            tensors[name], data = from_bytes(name, kind, shape, data[:size]), data[size:]
        else:
            raise BadCall(name, f"expected binary_data_size of at most the {len(data)} bytes that are left")
    if data:
        raise BadCall("body", f"expected the bytes of the inputs, got {len(data)} more")
    return tensors


def _flat(name: str, values: Any, depth: int) -> list[Any]:
    """A flat list of nested lists, row by row."""
    if not isinstance(values, list):
        raise BadCall(name, "expected `data`, a list, or `binary_data_size`")
    if depth and values and isinstance(values[0], list):
        return [value for row in values for value in _flat(name, row, depth - 1)]
    return values


def _outputs(head: dict[str, Any]) -> tuple[list[str], dict[str, bool]]:
    """The outputs that are wanted, and which of them in binary; of "" for those that do not say."""
    parameters = head.get("parameters")
    binary = {"": isinstance(parameters, dict) and parameters.get("binary_data_output") is True}
    names, listed = [], head.get("outputs", [])
    if not isinstance(listed, list) or len(listed) > MOST_TENSORS:
        raise BadCall("outputs", f"expected a list of at most {MOST_TENSORS} tensors")
    for entry in listed:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise BadCall("outputs", "expected tensors with names")
        names.append(entry["name"])
        inner = entry.get("parameters")
        if isinstance(inner, dict) and "binary_data" in inner:
            binary[entry["name"]] = inner["binary_data"] is True
    return names, binary


GRPC_SERVICE = f"{rpc.INFERENCE}.GRPCInferenceService"
CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
PARAMETERS = {bool: "bool_param", int: "int64_param", str: "string_param"}


class InferenceRpc:
    """The methods of GRPCInferenceService."""

    def __init__(self, service: Service):
        self._service = service

    def methods(self) -> dict[str, tuple[str, Any]]:
        """Name and type of the request, for `rpc.start`."""
        named = {
            "ServerLive": self._live, "ServerReady": self._ready, "ModelReady": self._model_ready,
            "ServerMetadata": self._metadata, "ModelMetadata": self._model_metadata, "ModelInfer": self._infer,
        }  # fmt: skip
        return {name: (f"{rpc.INFERENCE}.{name}Request", method) for name, method in named.items()}

    async def _live(self, given: Any, left: float | None) -> Any:
        return _made("ServerLiveResponse", live=True)

    async def _ready(self, given: Any, left: float | None) -> Any:
        return _made("ServerReadyResponse", ready=is_ready(self._service))

    async def _model_ready(self, given: Any, left: float | None) -> Any:
        known = given.name == MODEL
        return _made("ModelReadyResponse", ready=known and is_ready(self._service, given.version))

    async def _metadata(self, given: Any, left: float | None) -> Any:
        return _made("ServerMetadataResponse", **server_metadata())

    async def _model_metadata(self, given: Any, left: float | None) -> Any:
        expect_model(given.name)
        return _made("ModelMetadataResponse", **model_metadata(self._service, given.version))

    async def _infer(self, given: Any, left: float | None) -> Any:
        expect_model(given.model_name)
        inputs = _message_inputs(given.inputs, given.raw_input_contents)
        if left is not None and "budget" not in inputs:
            inputs["budget"] = np.array([left])
        answer = await infer(self._service, version=given.model_version, call_id=given.id, inputs=inputs)
        outputs = chosen(answer.outputs, [output.name for output in given.outputs])
        described = [{"name": n, "datatype": datatype(a), "shape": list(a.shape)} for n, a in outputs.items()]
        parameters = {name: {PARAMETERS[type(value)]: value} for name, value in answer.parameters.items()}
        return _made(
            "ModelInferResponse", model_name=MODEL, model_version=answer.version, id=given.id, parameters=parameters,
            outputs=described, raw_output_contents=[to_bytes(array) for array in outputs.values()],
        )  # fmt: skip


def _made(kind: str, /, **fields: Any) -> Any:
    return rpc.kind(f"{rpc.INFERENCE}.{kind}")(**fields)


def _message_inputs(listed: Sequence[Any], raw: Sequence[bytes]) -> dict[str, np.ndarray]:
    if len(listed) > MOST_TENSORS or (raw and len(raw) != len(listed)):
        raise BadCall("inputs", f"expected at most {MOST_TENSORS}, raw contents for all of them or for none")
    tensors: dict[str, np.ndarray] = {}
    for at, tensor in enumerate(listed):
        name, shape = tensor.name, expect_shape(tensor.name, tensor.datatype, list(tensor.shape))
        if name in tensors:
            raise BadCall("inputs", f"expected tensors with different names, got {name[:200]!r} twice")
        if raw:
            tensors[name] = from_bytes(name, tensor.datatype, shape, raw[at])
        else:
            values = list(getattr(tensor.contents, CONTENTS[tensor.datatype]))
            tensors[name] = from_values(name, tensor.datatype, shape, values)
    return tensors
