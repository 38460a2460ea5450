"""Malformed calls of the service, over every way in: an error that names what is wrong, never a crash, a hang or a 500."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from aif_jax.service import processes, tensors
from aif_jax.service.inference import MODEL
from aif_jax.service.process import Listening
from tests.reliability.sizes import FULL, SMOKE, generator
from tests.service_world import EVENTS, IDS, NOW, exports, running

pytest.importorskip("grpc", reason="needs the extra 'grpc'")

CALL = {"user": "ann", "record": {"user": "ann"}, "events": EVENTS, "now": NOW, "candidates": IDS.tolist(), "k": 5}
HTTP = {200, 400, 404, 412, 413, 429, 504}
GRPC = {"OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "NOT_FOUND"}
JUNK: list[Any] = [
    None, True, -1, 0, 1 << 63, -(1 << 80), 1e308, 1e-320, "", "ann", "\0", "é" * 2000, [], {}, [[]], [1, "a"], [None],
    {"a": 1}, [1e999], [[1], [2, 3]], "NaN", 10**300,
]  # fmt: skip


class Mutations:
    """Calls that are wrong in one to three places."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def pick(self, values: Any) -> Any:
        """One of some values."""
        return values[int(self.rng.integers(len(values)))]

    def fields(self, value: Any) -> Any:
        """A call with values of other kinds, names that are missing or new, at any depth."""
        if self.rng.random() < 0.15 or not isinstance(value, dict | list) or not value:
            return self.pick(JUNK)
        made = dict(value) if isinstance(value, dict) else list(value)
        at = self.pick(list(made)) if isinstance(made, dict) else int(self.rng.integers(len(made)))
        how = self.rng.random()
        if how < 0.15:
            made.pop(at)
        elif how < 0.25 and isinstance(made, dict):
            made[self.pick(["colour", "", "arrays", "candidates.utf8", "features", "budget", "version"])] = self.pick(JUNK)
        else:
            made[at] = self.fields(made[at])
        return made

    def bytes(self, raw: bytes) -> bytes:
        """Bytes flipped, cut out, doubled or put in."""
        data = bytearray(raw)
        for _ in range(int(self.rng.integers(1, 4))):
            at, size = int(self.rng.integers(len(data) + 1)), int(self.rng.integers(1, 16))
            how = self.rng.random()
            if how < 0.5 and at < len(data):
                data[at] = int(self.rng.integers(256))
            elif how < 0.7:
                del data[at : at + size]
            elif how < 0.85:
                data[at:at] = self.rng.bytes(size)
            else:
                data[at:at] = data[at : at + size]
        return bytes(data)

    def text(self, fields: Any) -> bytes:
        """A JSON body."""
        text = json.dumps(fields).encode()
        return self.bytes(text) if self.rng.random() < 0.4 else text

    def body(self) -> bytes:
        """A binary body."""
        fields = {**CALL, "candidates": IDS, "bids": np.ones(len(IDS), np.float32)}
        raw = tensors.pack(fields)
        if self.rng.random() < 0.5:
            return self.bytes(raw)
        head, newline, data = raw.partition(b"\n")
        return json.dumps(self.fields(json.loads(head))).encode() + newline + data

    def tensors(self) -> dict[str, Any]:
        """A call of the Open Inference Protocol."""

        def tensor(name: str, kind: str, data: list[Any]) -> dict[str, Any]:
            return {"name": name, "datatype": kind, "shape": [len(data)], "data": data}

        inputs = [tensor("user", "BYTES", ["ann"]), tensor("candidates", "INT64", IDS.tolist()), tensor("k", "INT32", [5])]
        inputs += [tensor(f"events.{name}", "INT64", values) for name, values in EVENTS.items()]
        return self.fields({"inputs": [*inputs, tensor("record.user", "BYTES", ["ann"])], "outputs": [{"name": "ids"}]})


def protobuf(mutations: Mutations) -> tuple[str, bytes]:
    """A gRPC method and a message."""
    from aif_jax.service import rpc

    call, ids = mutations.fields(CALL) if mutations.rng.random() < 0.3 else CALL, IDS.tolist()
    events = {name: {"integers": values} for name, values in EVENTS.items()}
    user = {"id": {"text": "ann"}, "record": {"user": {"text": "ann"}}, "events": events, "now": NOW}
    k = call.get("k", 5) if isinstance(call, dict) else 5
    name = mutations.pick(["Rank", "Score", "Prepare"])
    fields: dict[str, Any] = {"user": user, "request_id": "r"}
    if name != "Prepare":
        fields["candidates"] = {"ids": ids}
    if name == "Rank":
        fields["k"] = k if type(k) is int and 0 <= k < 1 << 32 else 5
    raw = rpc.kind(f"{rpc.PACKAGE}.{name}Request")(**fields).SerializeToString()
    if mutations.rng.random() < 0.8:
        return f"/{rpc.PACKAGE}.PreRanking/{name}", mutations.bytes(raw)
    named = (("user", "BYTES", 1, b"\3\0\0\0ann"), ("candidates", "INT64", len(ids), IDS.astype("<i8").tobytes()))
    tensors = rpc.kind("inference.ModelInferRequest")(
        model_name=MODEL, inputs=[{"name": name, "datatype": kind, "shape": [size]} for name, kind, size, _ in named],
        raw_input_contents=[data for *_, data in named],
    )  # fmt: skip
    return "/inference.GRPCInferenceService/ModelInfer", mutations.bytes(tensors.SerializeToString())


def fuzz(count: int, seed: int) -> Counter[Any]:
    """Sends malformed calls; returns how often each answer came."""
    import grpc

    mutations, answers = Mutations(generator("malformed calls", seed)), Counter()
    where = Listening(http_port=0, grpc_port=0)
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(
            running(exports().root / "one", where=where, routes=processes.routes, grpc=processes.start_grpc)
        )
        client = stack.enter_context(service.client())
        channel = stack.enter_context(grpc.insecure_channel(service.addresses["grpc"]))
        expected = client.rank(**CALL)["ids"].tolist()
        for number in range(count):
            way = number % 4
            if way < 3:
                path = mutations.pick(["/v1/rank", "/v1/score", "/v1/prepare", "/v1/explain"])
                kind, body = "application/json", b""
                if way == 0:
                    kind, body = tensors.CONTENT_TYPE, mutations.body()
                elif way == 1:
                    body = mutations.text(mutations.fields(CALL))
                else:
                    path, body = f"/v2/models/{MODEL}/infer", mutations.text(mutations.tensors())
                status, _, answer = client.request("POST", path, body, {"content-type": kind})
                assert status in HTTP, (status, path, body, answer)
                assert status == 200 or json.loads(answer)["error"], (path, body)
                answers["http", status] += 1
            else:
                method, raw = protobuf(mutations)
                try:
                    channel.unary_unary(method)(raw, timeout=20)
                    code = "OK"
                except grpc.RpcError as error:
                    code = error.code().name
                    assert code in GRPC, (code, method, raw, error.details())
                answers["grpc", code] += 1
            if number % 100 == 99:
                assert client.rank(**CALL)["ids"].tolist() == expected
        assert client.request("GET", "/health/ready")[0] == 200
    return answers


def test_a_few_hundred_malformed_calls():
    answers = fuzz(SMOKE.malformed_calls, seed=7)
    assert answers["http", 400] > 100 and answers["grpc", "INVALID_ARGUMENT"] > 20


@pytest.mark.reliability
@pytest.mark.timeout(3600)
def test_ten_thousand_malformed_calls():
    from tests.reliability.sizes import SEED

    answers = fuzz(FULL.malformed_calls, SEED)
    print(answers)
    assert sum(answers.values()) == FULL.malformed_calls
