"""The same calls through JSON and Open Inference (judged by `tritonclient`), and answers of several objectives."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.lane("standing")
triton = pytest.importorskip("tritonclient.http", reason="needs tritonclient")

from tritonclient.utils import InferenceServerException  # noqa: E402

from aif_jax.service.calls import MAX_EVENTS, MAX_VALUES, BadCall, parse  # noqa: E402
from aif_jax.service.inference import MODEL, described, from_bytes, put, to_bytes, values_from  # noqa: E402
from aif_jax.service.log import RequestLog  # noqa: E402
from tests.refusals import refused  # noqa: E402
from tests.service_world import ANN, EVENTS, IDS, NOW, SERVING, exports, read_log, running  # noqa: E402

DATATYPES = {"int64": "INT64", "int32": "INT32", "float32": "FP32", "float64": "FP64", "bool": "BOOL", "object": "BYTES"}


class Refused(Exception):
    """A front refused a call; the arguments are code, field and message as far as its protocol has them."""


def ask_json(service: Any, method: str, fields: dict) -> dict:
    with service.client() as client:
        status, answer = client.post(f"/v1/{method}", fields)
    if status != 200:
        raise Refused(*(answer["error"][name] for name in ("code", "field", "message")))
    return answer | {name: np.array(answer[name], float) for name in ("logits", "scores") if name in answer}


def tensors_of(fields: dict) -> list:
    """Inputs of a call of the Open Inference Protocol."""
    inputs = []
    for name, value in fields.items():
        array = np.array([value.encode()], np.object_) if isinstance(value, str) else np.asarray(value)
        array = array if isinstance(value, np.ndarray | np.generic) else np.atleast_1d(array)
        inputs.append(triton.InferInput(name, list(array.shape), DATATYPES[array.dtype.name]))
        inputs[-1].set_data_from_numpy(array)
    return inputs


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    client = triton.InferenceServerClient(address.removeprefix("http://"))
    try:
        yield client
    finally:
        client.close()
        client.close = lambda: None  # its `__del__` would close it once more, in whatever thread collects it


def ask_inference(service: Any, method: str, fields: dict) -> dict:
    groups = {f"{name}.{key}": v for name in ("record", "events") for key, v in fields.get(name, {}).items()}
    flat = {name: value for name, value in fields.items() if name not in ("record", "events", "version")}
    with connected(service.addresses["http"]) as client:
        try:
            result = client.infer(MODEL, tensors_of(flat | groups), fields.get("version", ""))
        except InferenceServerException as error:
            raise Refused(None, None, error.message()) from error
    about = result.get_response()
    found = {name: result.as_numpy(name) for name in ("ids", "scores", "logits", "mask")}
    return found | {"version": about["model_version"], "excluded": about["parameters"].get("excluded", 0)}


FRONTS = {"json": ask_json, "inference": ask_inference}
BOTH = dataclasses.replace(SERVING, orders={"both": lambda p, bid: p["click"] * p["like"]})
CONFIGS = {"integers": SERVING, "objectives": BOTH}


def started(kind: str, **options: Any) -> Any:
    return running(exports(kind).root / "one", config=CONFIGS[kind], **options)


@pytest.fixture(scope="module", params=CONFIGS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def served(kind):
    with started(kind) as service:
        yield service


@pytest.fixture(params=FRONTS)
def ask(request, served):
    """`ask(method, **fields)` through one front, with what a call brings of ann."""

    def call(method: str, **fields: Any) -> dict:
        return FRONTS[request.param](served, method, {**ANN, "candidates": IDS, **fields})

    return call


def test_scores_and_ranks_are_what_the_model_says(ask, kind):
    expected, version = exports(kind).logits("one"), exports(kind).index["one"].version
    scores = ask("score", candidates=np.append(IDS, 5))
    np.testing.assert_allclose(np.asarray(scores["logits"])[:-1], expected, atol=1e-5)
    assert list(scores["mask"]) == [True] * len(IDS) + [False] and scores["version"] == version
    first = expected if kind == "integers" else expected[:, 0]
    best = np.argsort(-first, kind="stable")[:5]
    ranked = ask("rank", k=5)
    assert list(ranked["ids"]) == IDS[best].tolist() and ranked["version"] == version
    np.testing.assert_allclose(ranked["logits"], expected[best], atol=1e-5)
    np.testing.assert_allclose(ranked["scores"], first[best], atol=1e-5)
    left = ask("rank", k=3, exclude=IDS[best[:2]])
    assert list(left["ids"]) == IDS[best[2:]].tolist() and left["excluded"] == 2
    assert list(ask("score", candidates=IDS[best], exclude=IDS[best[1:2]])["mask"]) == [True, False, True, True, True]


def test_orders_are_by_name_and_bids(ask, kind):
    bids = np.linspace(3, 0, len(IDS)).astype(np.float32)
    probability = 1 / (1 + np.exp(-exports(kind).logits("one")))
    value, fields = (probability * bids, {"bids": bids, "order": "bid"}) if kind == "integers" else (
        probability.prod(1), {"order": "both"}
    )  # fmt: skip
    ranked = ask("rank", k=3, **fields)
    assert list(ranked["ids"]) == IDS[np.argsort(-value, kind="stable")[:3]].tolist()
    np.testing.assert_allclose(ranked["scores"], np.sort(value)[::-1][:3], rtol=1e-4)


@pytest.mark.parametrize(("fields", "code", "field", "message"), [
    ({"k": 99}, "INVALID_ARGUMENT", "k", "expected 1 to max_k=8"),
    ({"user": ""}, "INVALID_ARGUMENT", "user", "user: expected the user's id, got an empty text"),
    ({"order": "colour"}, "INVALID_ARGUMENT", "order", "order: expected one of"),
    ({"bids": np.full(len(IDS), -1, np.float32)}, "INVALID_ARGUMENT", "bids", "bids: expected finite bids"),
    ({"exclude": np.array(["a"], object)}, "INVALID_ARGUMENT", "exclude", "exclude: expected integers"),
    ({"user": "x" * 1025}, "INVALID_ARGUMENT", "user", "at most 1024 characters"),
    ({"version": "0" * 64}, "FAILED_PRECONDITION", "version", "version: expected one of"),
])  # fmt: skip
def test_refusals_name_code_field_and_what_was_expected(ask, fields, code, field, message):
    with pytest.raises(Refused) as error:
        ask("rank", **{"k": 5} | fields)
    assert error.value.args[0] in (code, None) and error.value.args[1] in (field, None) and message in error.value.args[2]


INTEGERS, OBJECTIVES = (pytest.mark.parametrize("kind", [kind], indirect=True) for kind in ("integers", "objectives"))


@pytest.fixture
def client(served):
    with connected(served.addresses["http"]) as client:
        yield client


def ann(**more: Any) -> list:
    brought = {"user": "ann", "candidates": IDS, "record.user": "ann", "now": NOW}
    return tensors_of(brought | {f"events.{name}": np.array(values) for name, values in EVENTS.items()} | more)


def test_health_and_metadata(client, kind):
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(MODEL)
    version = exports(kind).index["one"].version
    assert client.is_model_ready(MODEL, version) and not client.is_model_ready(MODEL, "0" * 64)
    metadata, model = client.get_server_metadata(), client.get_model_metadata(MODEL)
    shapes = {"ids": [-1], "scores": [-1], "logits": [-1] if kind == "integers" else [-1, 2], "mask": [-1]}
    assert metadata["name"] == "aif_jax" and "binary_tensor_data" in metadata["extensions"]
    assert model["versions"] == [version] and {"name": "candidates", "datatype": "INT64", "shape": [-1]} in model["inputs"]
    assert {output["name"]: output["shape"] for output in model["outputs"]} == shapes


@INTEGERS
def test_an_answer_has_the_id_of_its_call_and_the_outputs_that_are_asked_for(client, kind):
    scores = client.infer(MODEL, ann(), request_id="r7")
    assert scores.get_response()["id"] == "r7" and scores.as_numpy("mask").dtype == np.bool_
    answer = client.infer(MODEL, ann(k=3), outputs=[triton.InferRequestedOutput("ids")])
    np.testing.assert_array_equal(answer.as_numpy("ids"), IDS[np.argsort(-exports().logits("one"), kind="stable")[:3]])
    assert answer.as_numpy("scores") is None


@INTEGERS
def test_what_inference_refuses_is_named(client, kind):
    for inputs, message in (
        (ann(k=np.array([1, 2])), "k: expected one value"),
        (ann(colour=np.array([1])), "colour: expected one of the fields"),
        (ann(version="one"), "version: expected another name, got one that is taken"),
        (ann()[1:], "user: expected an integer of 64 bits or text"),
    ):
        refused(InferenceServerException, message, client.infer, MODEL, inputs)
    colour = [triton.InferRequestedOutput("colour")]
    refused(InferenceServerException, "expected some of", client.infer, MODEL, ann(), outputs=colour)


@INTEGERS
def test_plain_json(served, kind):
    inputs = [
        {"name": "user", "datatype": "BYTES", "shape": [1], "data": ["ann"]},
        {"name": "candidates", "datatype": "INT64", "shape": [2], "data": [17, 5]},
        {"name": "events.item", "datatype": "INT64", "shape": [2], "data": [17, 1017]},
        {"name": "events.time", "datatype": "INT64", "shape": [2], "data": EVENTS["time"]},
    ]

    def infer(fields, path=f"/v2/models/{MODEL}/infer"):
        with served.client() as client:
            return client.post(path, fields)

    record = {"name": "record.user", "datatype": "BYTES", "shape": [1], "data": ["ann"]}
    status, answer = infer({"id": "x", "inputs": [*inputs, record]})
    assert status == 200 and answer["id"] == "x" and answer["parameters"] == {"degraded": False}
    by_name = {output["name"]: output for output in answer["outputs"]}
    assert by_name["mask"]["data"] == [True, False] and by_name["logits"]["data"][1] is None
    for change, message in (
        ({"shape": [3]}, "expected 3 values"),
        ({"data": [1.5, 2.5]}, "expected values of INT64"),
        ({"data": [1 << 70, 1]}, "expected values of INT64"),
        ({"data": 7}, "expected `data`"),
    ):
        status, answer = infer({"inputs": [inputs[0], inputs[1] | change]})
        assert status == 400 and message in answer["error"], (change, answer)
    assert "inputs: expected a list" in infer({})[1]["error"]
    assert infer({}, "/v2/models/other/infer")[0] == 404 and infer({}, "/v2/none")[0] == 404


def packed(arrays: dict) -> tuple[list, bytes]:
    """Tensors as the protocol lists them, and the bytes after the JSON."""
    parts = {name: to_bytes(array) for name, array in arrays.items()}
    listed = [described(name, arrays[name]) | {"parameters": {"binary_data_size": len(raw)}} for name, raw in parts.items()]
    return listed, b"".join(parts.values())


def test_a_value_of_the_record_that_is_not_known_is_null_in_json_and_nan_in_binary():
    age, fields = {"name": "record.age", "datatype": "FP64", "shape": [1], "data": [None]}, {}
    listed, data = packed({"record.income": np.float32([np.nan])})
    for name, values in values_from([age, *listed], data, MAX_VALUES).items():
        put(fields, name, values)
    assert fields == {"record": {"age": None, "income": None}}


def test_tensors_come_back_as_they_went():
    arrays = {
        "candidates": np.arange(5), "bids": np.ones(5, np.float32),
        "events.item": np.array(["é", "", "b"], np.dtypes.StringDType()),
        "record.x": np.zeros(0, np.float32), "large": np.array([2**63 + 1], np.uint64), "every second": np.arange(6)[::2],
    }  # fmt: skip
    back = values_from(*packed(arrays), MAX_VALUES)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert list(back[name]) == array.tolist() and getattr(back[name], "dtype", array.dtype) == array.dtype


@pytest.mark.parametrize(("change", "more", "message"), [
    ({}, -8, "binary_data_size of at most the 24 bytes left, got 32"),
    ({}, 8, "expected 32 bytes of tensors, got 40"),
    ({"datatype": "BOOL", "shape": [32]}, 0, "datatype among"),
    ({"shape": [-4]}, 0, "a shape of one axis"),
    ({"shape": [2, 2]}, 0, "a shape of one axis"),
    ({"shape": [5]}, 0, "expected 40 bytes for INT64"),
    ({"name": 7}, 0, "expected different names, got 7"),
])  # fmt: skip
def test_broken_tensors_are_refused(change, more, message):
    [entry], data = packed({"candidates": np.arange(2, 6)})
    values_from([entry], data, MAX_VALUES)
    refused(BadCall, message, values_from, [entry | change], data[:more] if more < 0 else data + bytes(more), MAX_VALUES)


def test_texts_as_bytes():
    raw = to_bytes(np.array(["é", "", "abc"], np.dtypes.StringDType()))
    assert raw == b"\x02\0\0\0\xc3\xa9\0\0\0\0\x03\0\0\0abc"
    assert from_bytes("x", "BYTES", 3, raw) == ["é", "", "abc"]
    for broken in (raw[:-1], raw + b"\0", b"\xff\xff\xff\xff"):
        refused(BadCall, "expected 3 texts", from_bytes, "x", "BYTES", 3, broken)
    refused(BadCall, "expected 1 texts in UTF-8", from_bytes, "x", "BYTES", 1, b"\x01\0\0\0\xc3")


def test_texts_beyond_the_bound_are_refused_before_they_are_read():
    """A body of 16 MiB may hold four million empty ones: a second of the event loop, and twenty times its memory."""
    entry = {"name": "exclude", "datatype": "BYTES", "shape": [9], "parameters": {"binary_data_size": 36}}
    listed = [entry, {"name": "candidates", "datatype": "BYTES", "shape": [9], "data": [""] * 9}]
    assert len(values_from(listed, bytes(36), 9)["exclude"]) == 9
    for most in (8, 4):
        refused(BadCall, f"expected at most {2 * most} texts in all", values_from, listed, bytes(36), most)


@OBJECTIVES
def test_answers_have_the_logits_of_each_objective(served, kind):
    with served.client() as client:
        scores = client.score(**ANN, candidates=IDS)
        assert scores["objectives"] == ["click", "like"] and scores["mask"].shape == (len(IDS),)
        assert client.rank(**ANN, candidates=np.append(IDS[:3], 5), k=5)["logits"].shape == (3, 2)
        assert client.post("/v1/score", ANN | {"candidates": [17, 5]})[1]["logits"][1] == [None, None]
        _, explained = client.post("/v1/explain", ANN | {"candidates": IDS, "k": 3})
    assert np.shape(explained["logits"]) == (3, 2)
    assert {name: len(part) for name, part in explained["contributions"].items()} == {"tower": 3, "dot_product": 3}


def test_a_log_has_the_calls_through_every_front(tmp_path):
    with contextlib.closing(RequestLog(tmp_path)) as log, started("objectives", observers=(log,)) as service:
        for ask in FRONTS.values():
            for method, fields in (("score", {}), ("rank", {"k": 4}), ("rank", {"k": 4, "order": "both"})):
                ask(service, method, ANN | {"candidates": IDS} | fields)
    records = list(read_log(tmp_path))
    assert {len(record.logits) / len(record.ids or record.candidates) for record in records} == {2}
    assert {record.order for record in records} >= {"logit", "both"}
    logits = exports("objectives").logits("one")
    for record in records:
        expected = logits[np.searchsorted(IDS, record.ids or record.candidates)]
        np.testing.assert_allclose(np.reshape(record.logits, (-1, 2)), expected, atol=1e-5)
    assert len(records) == 6


def test_events_of_a_call_have_a_bound_below_that_of_candidates():
    events = {"item": [7] * (MAX_EVENTS + 1)}
    refused(BadCall, f"events.item: expected at most {MAX_EVENTS} values", parse, {"user": "ann", "events": events})
    assert parse({"user": "ann", "events": {"item": events["item"][1:]}}).events
    refused(BadCall, "events.item: expected at most 5 values", parse, {"user": "ann", "events": {"item": [7] * 6}}, 5)
