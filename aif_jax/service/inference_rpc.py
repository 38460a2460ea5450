"""The Open Inference Protocol v2 over gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from aif_jax.service import inference, messages
from aif_jax.service.calls import BadCall
from aif_jax.service.core import Service

NAME = f"{messages.INFERENCE}.GRPCInferenceService"
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
        return {name: (f"{messages.INFERENCE}.{name}Request", method) for name, method in named.items()}

    async def _live(self, given: Any, left: float | None) -> Any:
        return _made("ServerLiveResponse", live=True)

    async def _ready(self, given: Any, left: float | None) -> Any:
        return _made("ServerReadyResponse", ready=inference.is_ready(self._service))

    async def _model_ready(self, given: Any, left: float | None) -> Any:
        known = given.name == inference.MODEL
        return _made("ModelReadyResponse", ready=known and inference.is_ready(self._service, given.version))

    async def _metadata(self, given: Any, left: float | None) -> Any:
        return _made("ServerMetadataResponse", **inference.server_metadata())

    async def _model_metadata(self, given: Any, left: float | None) -> Any:
        inference.expect_model(given.name)
        return _made("ModelMetadataResponse", **inference.model_metadata(self._service, given.version))

    async def _infer(self, given: Any, left: float | None) -> Any:
        inference.expect_model(given.model_name)
        inputs = _inputs(given.inputs, given.raw_input_contents)
        if left is not None and "budget" not in inputs:
            inputs["budget"] = np.array([left])
        answer = await inference.infer(self._service, version=given.model_version, call_id=given.id, inputs=inputs)
        outputs = inference.chosen(answer.outputs, [output.name for output in given.outputs])
        described = [{"name": n, "datatype": inference.datatype(a), "shape": list(a.shape)} for n, a in outputs.items()]
        parameters = {name: {PARAMETERS[type(value)]: value} for name, value in answer.parameters.items()}
        return _made(
            "ModelInferResponse", model_name=inference.MODEL, model_version=answer.version, id=given.id, parameters=parameters,
            outputs=described, raw_output_contents=[inference.to_bytes(array) for array in outputs.values()],
        )  # fmt: skip


def _made(kind: str, /, **fields: Any) -> Any:
    return messages.kind(f"{messages.INFERENCE}.{kind}")(**fields)


def _inputs(listed: Sequence[Any], raw: Sequence[bytes]) -> dict[str, np.ndarray]:
    if len(listed) > inference.MOST_TENSORS or (raw and len(raw) != len(listed)):
        raise BadCall("inputs", f"expected at most {inference.MOST_TENSORS}, raw contents for all of them or for none")
    tensors: dict[str, np.ndarray] = {}
    for at, tensor in enumerate(listed):
        name, shape = tensor.name, inference.expect_shape(tensor.name, tensor.datatype, list(tensor.shape))
        if name in tensors:
            raise BadCall("inputs", f"expected tensors with different names, got {name[:200]!r} twice")
        if raw:
            tensors[name] = inference.from_bytes(name, tensor.datatype, shape, raw[at])
        else:
            values = list(getattr(tensor.contents, CONTENTS[tensor.datatype]))
            tensors[name] = inference.from_values(name, tensor.datatype, shape, values)
    return tensors
