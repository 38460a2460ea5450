"""The Open Inference Protocol v2, judged by `tritonclient` over REST and gRPC."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("tritonclient.http", reason="needs tritonclient")
pytest.importorskip("tritonclient.grpc", reason="needs tritonclient")

import tritonclient.grpc as triton_grpc  # noqa: E402
import tritonclient.http as triton_http  # noqa: E402
from tritonclient.utils import InferenceServerException  # noqa: E402

from aif_jax.service import processes  # noqa: E402
from aif_jax.service.inference import MODEL  # noqa: E402
from aif_jax.service.process import Listening  # noqa: E402
from aif_jax.service.tensors import from_bytes, to_bytes  # noqa: E402
from tests.service_world import EVENTS, IDS, NOW, exports, running  # noqa: E402

CLIENTS = {"http": triton_http, "grpc": triton_grpc}


@pytest.fixture(scope="module")
def served():
    where = Listening(http_port=0, grpc_port=0)
    with running(exports().root / "one", where=where, routes=processes.routes, grpc=processes.start_grpc) as service:
        yield service


@pytest.fixture(params=CLIENTS)
def client(request, served):
    """The package of a client, and a client of it."""
    address = served.addresses[request.param].removeprefix("http://")
    client = CLIENTS[request.param].InferenceServerClient(address)
    yield CLIENTS[request.param], client
    client.close()
    client.close = lambda: None  # its `__del__` would close it once more, in whatever thread collects it


def tensor(package, name, array, *, datatype=None):
    array = np.asarray(array)
    kinds = {"int64": "INT64", "int32": "INT32", "float32": "FP32", "float64": "FP64", "bool": "BOOL", "object": "BYTES"}
    made = package.InferInput(name, list(array.shape), datatype or kinds[array.dtype.name])
    made.set_data_from_numpy(array)
    return made


def text(*values):
    return np.array([value.encode() for value in values], np.object_)


def ann(package, **more):
    arrays = {"user": text("ann"), "candidates": IDS, "record.user": text("ann"), "now": np.array([NOW])}
    arrays |= {f"events.{name}": np.array(values) for name, values in EVENTS.items()} | more
    return [tensor(package, name, array) for name, array in arrays.items()]


def test_health_and_metadata(client):
    _, client = client
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(MODEL)
    version = exports().index["one"].version
    assert client.is_model_ready(MODEL, version) and not client.is_model_ready(MODEL, "0" * 64)
    metadata, model = client.get_server_metadata(), client.get_model_metadata(MODEL)
    if isinstance(metadata, dict):
        assert metadata["name"] == "aif_jax" and "binary_tensor_data" in metadata["extensions"]
        assert model["versions"] == [version] and {"name": "candidates", "datatype": "INT64", "shape": [-1]} in model["inputs"]
    else:
        assert metadata.name == "aif_jax" and list(model.versions) == [version]
        assert {entry.name for entry in model.outputs} == {"ids", "scores", "logits", "mask"}


def test_an_answer_has_the_id_of_its_call(client):
    package, client = client
    scores = client.infer(MODEL, ann(package), request_id="r7")
    response = scores.get_response()
    assert (response["id"] if isinstance(response, dict) else response.id) == "r7" and scores.as_numpy("mask").dtype == np.bool_


def test_infer_answers_the_outputs_that_are_asked_for(client):
    package, client = client
    bids = np.linspace(3, 0, len(IDS)).astype(np.float32)
    inputs = ann(package, k=np.array([3]), bids=bids, order=text("bid"))
    answer = client.infer(MODEL, inputs, outputs=[package.InferRequestedOutput("ids")])
    expected = 1 / (1 + np.exp(-exports().logits("one"))) * bids
    np.testing.assert_array_equal(answer.as_numpy("ids"), IDS[np.argsort(-expected, kind="stable")[:3]])
    assert answer.as_numpy("scores") is None


def test_errors(client):
    package, client = client
    for inputs, model, message in (
        (ann(package, k=np.array([1, 2])), MODEL, "k: expected one value"),
        (ann(package, colour=np.array([1])), MODEL, "colour: expected one of the fields"),
        (ann(package, bids=np.full(len(IDS), np.nan, np.float32)), MODEL, "bids: expected finite bids"),
        (ann(package)[1:], MODEL, "user: expected an integer or a string"),
        (ann(package), "other", "expected 'preranking'"),
    ):
        with pytest.raises(InferenceServerException, match=message):
            client.infer(model, inputs)
    with pytest.raises(InferenceServerException, match="expected some of"):
        client.infer(MODEL, ann(package), outputs=[package.InferRequestedOutput("colour")])


def test_plain_json(served):
    inputs = [
        {"name": "user", "datatype": "BYTES", "shape": [1], "data": ["ann"]},
        {"name": "candidates", "datatype": "INT64", "shape": [2], "data": [17, 5]},
        {"name": "events.item", "datatype": "INT64", "shape": [1, 2], "data": [[17, 1017]]},
        {"name": "events.time", "datatype": "INT64", "shape": [2], "data": EVENTS["time"]},
    ]

    def infer(fields, path=f"/v2/models/{MODEL}/infer", method="POST"):
        with served.client() as client:
            status, _, body = client.request(method, path, json.dumps(fields).encode(), {"content-type": "application/json"})
            return status, json.loads(body)

    inputs[2] |= {"shape": [2], "data": [17, 1017]}
    record = {"name": "record.user", "datatype": "BYTES", "shape": [1], "data": ["ann"]}
    status, answer = infer({"id": "x", "inputs": [*inputs, record]})
    assert status == 200 and answer["id"] == "x" and answer["parameters"] == {"degraded": False}
    by_name = {output["name"]: output for output in answer["outputs"]}
    assert by_name["mask"]["data"] == [True, False] and by_name["logits"]["data"][1] is None
    for change, message in (
        ({"datatype": "FP16"}, "expected a datatype among"),
        ({"shape": [-2]}, "sizes of 0 or more"),
        ({"shape": [3]}, "expected 3 values"),
        ({"data": [1.5, 2.5]}, "expected values of INT64"),
        ({"data": [1 << 70, 1]}, "expected values of INT64"),
        ({"data": 7}, "expected `data`"),
        ({"parameters": {"binary_data_size": 99}}, "binary_data_size"),
    ):
        status, answer = infer({"inputs": [inputs[0], inputs[1] | change]})
        assert status == 400 and message in answer["error"], (change, answer)
    assert infer({"inputs": [inputs[0], inputs[0]]})[0] == 400
    assert infer({}, "/v2/models/other/infer")[0] == 404 and infer({}, "/v2/none")[0] == 404
    long = {"name": "candidates", "datatype": "BYTES", "shape": [1], "data": ["x" * 1025]}
    status, answer = infer({"inputs": [inputs[0], long]})
    assert status == 400 and "candidates: expected ids of at most 1024 characters, got 1025" in answer["error"]


def test_other_methods_are_refused_and_told_which_are_not(served):
    """DELETE was answered as GET is."""
    model = f"/v2/models/{MODEL}"
    with served.client() as client:
        for paths, allowed in (
            (("/v2", "/v2/health/live", "/v2/health/ready", model, f"{model}/ready", f"{model}/versions/9/ready"), "GET, HEAD"),
            ((f"{model}/infer", f"{model}/versions/9/infer"), "POST"),
        ):
            for path in paths:
                for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
                    client._connection.request(method, path)
                    response = client._connection.getresponse()
                    response.read()
                    assert (response.status == 405) == (method not in allowed), (method, path)
                    assert response.headers["allow"] == (allowed if response.status == 405 else None), (method, path)


def test_texts_as_bytes():
    raw = to_bytes(np.array(["é", "", "abc"], np.dtypes.StringDType()))
    assert raw == b"\x02\0\0\0\xc3\xa9\0\0\0\0\x03\0\0\0abc"
    assert from_bytes("x", "BYTES", [3], raw).tolist() == ["é", "", "abc"]
    for broken in (raw[:-1], raw + b"\0", b"\xff\xff\xff\xff"):
        with pytest.raises(ValueError, match="expected 3 texts"):
            from_bytes("x", "BYTES", [3], broken)
