"""Malformed calls of the service, over every way in: an error that names what is wrong, never a crash, a hang or a 500."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from aif_jax.service.inference import MODEL
from tests.reliability.sizes import RUNS, generator
from tests.service_world import EVENTS, IDS, NOW, exports, running

pytestmark = pytest.mark.lane("standing")
CALL = {"user": "ann", "record": {"user": "ann"}, "events": EVENTS, "now": NOW, "candidates": IDS.tolist(), "k": 5}
HTTP = {200, 400, 404, 412, 413, 429, 504}
JUNK: list[Any] = [
    None, True, -1, 0, 1 << 63, -(1 << 80), 1e308, 1e-320, "", "ann", "\0", "é" * 2000, [], {}, [[]], [1, "a"], [None],
    {"a": 1}, [1e999], [[1], [2, 3]], "NaN", 10**300,
]  # fmt: skip


class Mutations:
    """Calls that are wrong in one to three places."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def pick(self, values: Any) -> Any:
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
        text = json.dumps(fields).encode()
        return self.bytes(text) if self.rng.random() < 0.4 else text

    def binary(self) -> tuple[bytes, int]:
        """A call of the Open Inference Protocol with binary tensors, and the length that its header says of the JSON."""
        arrays = [("user", "BYTES", 1, b"\3\0\0\0ann"), ("candidates", "INT64", len(IDS), IDS.astype("<i8").tobytes())]
        inputs: Any = [
            {"name": name, "datatype": kind, "shape": [size], "parameters": {"binary_data_size": len(data)}}
            for name, kind, size, data in arrays
        ]
        head, data = json.dumps({"inputs": inputs}).encode(), b"".join(data for *_, data in arrays)
        if self.rng.random() < 0.5:
            return self.bytes(head + data), len(head)
        head = json.dumps(self.fields({"inputs": inputs})).encode()
        return head + data, len(head)

    def tensors(self) -> dict[str, Any]:
        """A call of the Open Inference Protocol."""

        def tensor(name: str, kind: str, data: list[Any]) -> dict[str, Any]:
            return {"name": name, "datatype": kind, "shape": [len(data)], "data": data}

        inputs = [tensor("user", "BYTES", ["ann"]), tensor("candidates", "INT64", IDS.tolist()), tensor("k", "INT32", [5])]
        inputs += [tensor(f"events.{name}", "INT64", values) for name, values in EVENTS.items()]
        return self.fields({"inputs": [*inputs, tensor("record.user", "BYTES", ["ann"])], "outputs": [{"name": "ids"}]})


@pytest.mark.parametrize(("sizes", "seed"), RUNS)
def test_malformed_calls(sizes, seed):
    mutations, answers = Mutations(generator("malformed calls", seed)), Counter()
    with running(exports().root / "one") as service, service.client() as client:
        expected = client.rank(**CALL)["ids"].tolist()
        for number in range(sizes.malformed_calls):
            way = number % 3
            path = mutations.pick(["/v1/rank", "/v1/score", "/v1/prepare", "/v1/explain"])
            headers = {"content-type": "application/json"}
            if way == 0:
                path, (body, length) = f"/v2/models/{MODEL}/infer", mutations.binary()
                headers = {"inference-header-content-length": str(length)}
            elif way == 1:
                body = mutations.text(mutations.fields(CALL))
            else:
                path, body = f"/v2/models/{MODEL}/infer", mutations.text(mutations.tensors())
            status, _, answer = client.request("POST", path, body, headers)
            assert status in HTTP, (status, path, body, answer)
            assert status == 200 or json.loads(answer)["error"], (path, body)
            answers[status] += 1
            if number % 100 == 99:
                assert client.rank(**CALL)["ids"].tolist() == expected
        assert client.request("GET", "/health/ready")[0] == 200
    print(answers)
    assert sum(answers.values()) == sizes.malformed_calls and answers[400] > sizes.malformed_calls / 3
