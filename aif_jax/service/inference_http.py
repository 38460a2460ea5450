"""The Open Inference Protocol v2 over REST, with the extension for binary tensors."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from aif_jax.service import inference
from aif_jax.service.answers import to_json
from aif_jax.service.calls import BadCall
from aif_jax.service.core import Service
from aif_jax.service.errors import reported
from aif_jax.service.frame import parse_json
from aif_jax.service.http import JSON, Asked, Response, json_response

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
            return json_response(inference.server_metadata())
        if parts[0] == "health":
            good = parts[1] == "live" or inference.is_ready(service)
            return json_response({parts[1]: good}, status=200 if good else 503)
        inference.expect_model(parts[1])
        if rest == ["infer"]:
            return await self._infer(asked, version)
        if rest == ["ready"]:
            good = inference.is_ready(service, version)
            return json_response({"name": inference.MODEL, "ready": good}, status=200 if good else 503)
        return json_response(inference.model_metadata(service, version))

    async def _infer(self, asked: Asked, version: str) -> Response:
        length = asked.headers.get(LENGTH)
        if length is not None and not (length.isdigit() and len(length) < 10 and int(length) <= len(asked.body)):
            raise BadCall("inference-header-content-length", f"expected at most the {len(asked.body)} bytes of the body")
        end = len(asked.body) if length is None else int(length)
        head, data = parse_json(asked.body[:end]), asked.body[end:]
        inputs = _inputs(head.get("inputs"), data)
        call_id = head.get("id", "")
        wanted, binary = _outputs(head)
        answer = await inference.infer(self._service, version=version, call_id=call_id, inputs=inputs)
        fields = {"model_name": inference.MODEL, "model_version": answer.version, "parameters": answer.parameters}
        if call_id:
            fields["id"] = call_id
        outputs, parts = [], []
        for name, array in inference.chosen(answer.outputs, wanted).items():
            entry: dict[str, Any] = {"name": name, "datatype": inference.datatype(array), "shape": list(array.shape)}
            if binary.get(name, binary[""]):
                parts.append(inference.to_bytes(array))
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
    if not isinstance(listed, list) or len(listed) > inference.MOST_TENSORS:
        raise BadCall("inputs", f"expected a list of at most {inference.MOST_TENSORS} tensors")
    tensors: dict[str, np.ndarray] = {}
    for entry in listed:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name in tensors:
            raise BadCall("inputs", "expected tensors with different names")
        kind: Any = entry.get("datatype")
        shape = inference.expect_shape(name, kind, entry.get("shape"))
        parameters = entry.get("parameters") or {}
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        if size is None:
            tensors[name] = inference.from_values(name, kind, shape, _flat(name, entry.get("data"), 4))
        elif type(size) is int and 0 <= size <= len(data):
            tensors[name], data = inference.from_bytes(name, kind, shape, data[:size]), data[size:]
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
    if not isinstance(listed, list) or len(listed) > inference.MOST_TENSORS:
        raise BadCall("outputs", f"expected a list of at most {inference.MOST_TENSORS} tensors")
    for entry in listed:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise BadCall("outputs", "expected tensors with names")
        names.append(entry["name"])
        inner = entry.get("parameters")
        if isinstance(inner, dict) and "binary_data" in inner:
            binary[entry["name"]] = inner["binary_data"] is True
    return names, binary
