"""The same calls through every front give the same answers and refusals: HTTP in two forms of body, gRPC, Open Inference."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

grpc = pytest.importorskip("grpc", reason="needs the extra 'grpc'")
triton_http = pytest.importorskip("tritonclient.http", reason="needs tritonclient")
triton_grpc = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient")

from tritonclient.utils import InferenceServerException  # noqa: E402

from aif_jax.service import processes  # noqa: E402
from aif_jax.service.client import ServiceError  # noqa: E402
from aif_jax.service.inference import MODEL  # noqa: E402
from aif_jax.service.process import Listening  # noqa: E402
from aif_jax.service.stubs import preranking_pb2 as pb  # noqa: E402
from aif_jax.service.stubs.preranking_pb2_grpc import PreRankingStub  # noqa: E402
from tests.service_world import ANN, EVENTS, IDS, NOW, SERVING, exports, running  # noqa: E402

DATATYPES = {"int64": "INT64", "int32": "INT32", "float32": "FP32", "float64": "FP64", "bool": "BOOL", "object": "BYTES"}


class Refused(Exception):
    """A front refused a call; the arguments are code, field and message as far as its protocol has them."""


def ask_binary(service: Any, method: str, fields: dict) -> dict:
    with service.client() as client:
        try:
            return getattr(client, method)(**fields)
        except ServiceError as error:
            raise Refused(error.code, error.field, str(error)) from error


def ask_json(service: Any, method: str, fields: dict) -> dict:
    packed, kind = json.dumps(fields, default=lambda value: value.tolist()).encode(), "application/json"
    with service.client() as client:
        status, answered, body = client.request("POST", f"/v1/{method}", packed, {"content-type": kind})
    answer = json.loads(body)
    if status != 200:
        raise Refused(*(answer["error"][name] for name in ("code", "field", "message")))
    assert answered == kind
    return answer | {name: np.array(answer[name], float) for name in ("logits", "scores") if name in answer}


def ask_grpc(service: Any, method: str, fields: dict) -> dict:
    user = {"id": pb.Id(text=fields["user"])} if "user" in fields else {}
    if "events" in fields:
        columns = {name: pb.Column(integers=values) for name, values in fields["events"].items()}
        user |= {"record": {"user": pb.Value(text=fields["record"]["user"])}, "events": columns, "now": fields["now"]}
    if "features" in fields:
        parts = fields["features"].items()
        user["features"] = {n: pb.Tensor(dtype=a.dtype.name, shape=a.shape, data=a.tobytes()) for n, a in parts}
    request: dict = {"user": pb.User(**user), "candidates": pb.Candidates(ids=fields["candidates"], bids=fields.get("bids"))}
    request |= {"exclude": pb.Candidates(ids=fields["exclude"])} if "exclude" in fields else {}
    request |= {name: fields[name] for name in ("k", "order", "version") if name in fields}
    with grpc.insecure_channel(service.addresses["grpc"]) as channel:
        stub = PreRankingStub(channel)
        try:
            answer = stub.Rank(pb.RankRequest(**request)) if method == "rank" else stub.Score(pb.ScoreRequest(**request))
        except grpc.RpcError as error:
            raise Refused(error.code().name, dict(error.trailing_metadata())["aif-field"], error.details()) from error
    about, logits = answer.about, np.array(answer.logits)
    ids = {"ids": np.array(answer.best.ids), "scores": answer.scores} if method == "rank" else {"mask": answer.known}
    excluded = {"excluded": answer.excluded} if method == "rank" else {}
    return ids | excluded | {"logits": logits.reshape(-1, len(about.objectives) or 1).squeeze(), "version": about.version}


def ask_inference(package: Any, address: str) -> Any:
    def ask(service: Any, method: str, fields: dict) -> dict:
        groups = {f"{name}.{key}": v for name in ("record", "events", "features") for key, v in fields.get(name, {}).items()}
        flat = {
            name: value for name, value in fields.items() if name not in ("record", "events", "features", "version")
        } | groups
        inputs = []
        for name, value in flat.items():
            array = np.array([value.encode()], np.object_) if isinstance(value, str) else np.asarray(value)
            array = array if isinstance(value, np.ndarray | np.generic) else np.atleast_1d(array)
            inputs.append(package.InferInput(name, list(array.shape), DATATYPES[array.dtype.name]))
            inputs[-1].set_data_from_numpy(array)
        client = package.InferenceServerClient(service.addresses[address].removeprefix("http://"))
        try:
            result = client.infer(MODEL, inputs, fields.get("version", ""))
        except InferenceServerException as error:
            raise Refused(None, None, error.message()) from error
        finally:
            client.close()
            client.close = lambda: None  # its `__del__` would close it once more, in whatever thread collects it
        answer = result.get_response()
        about = answer if isinstance(answer, dict) else {"model_version": answer.model_version, "parameters": answer.parameters}
        found = {name: result.as_numpy(name) for name in ("ids", "scores", "logits", "mask")}
        excluded = about["parameters"]["excluded"] if "excluded" in about["parameters"] else 0
        return found | {"version": about["model_version"], "excluded": getattr(excluded, "int64_param", excluded)}

    return ask


FRONTS = {
    "binary": ask_binary, "json": ask_json, "grpc": ask_grpc,
    "inference": ask_inference(triton_http, "http"), "inference grpc": ask_inference(triton_grpc, "grpc"),
}  # fmt: skip


@pytest.fixture(scope="module", params=["integers", "objectives"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def served(kind):
    config = dataclasses.replace(SERVING, orders={"both": "p.click * p.like"} if kind == "objectives" else {})
    options = {"routes": processes.routes, "grpc": processes.start_grpc, "config": config}
    with running(exports(kind).root / "one", where=Listening(http_port=0, grpc_port=0), **options) as service:
        yield service


@pytest.fixture(params=FRONTS)
def ask(request, served):
    """`ask(method, **fields)` through one front, with what a call brings of ann but for its features."""

    def call(method: str, **fields: Any) -> dict:
        brought = {"user": "ann"} if "features" in fields else ANN
        return FRONTS[request.param](served, method, {**brought, "candidates": IDS, **fields})

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


def test_encoded_features_and_raw_events_give_one_answer(ask, kind):
    features = exports(kind).encoder.with_length(8).user({"user": "ann"}, EVENTS, NOW)
    history = {f"history.{name}": getattr(features.history, name) for name in ("item", "action", "age", "mask")}
    encoded = {"ids.user": features.ids["user"], "floats": features.floats, **history}
    np.testing.assert_allclose(ask("score", features=encoded)["logits"], ask("score")["logits"], atol=1e-6)


@pytest.mark.parametrize(("fields", "code", "field", "message"), [
    ({"k": 99}, "INVALID_ARGUMENT", "k", "expected 1 to max_k=8"),
    ({"k": 0}, "INVALID_ARGUMENT", "k", "k: expected"),
    ({"order": "colour"}, "INVALID_ARGUMENT", "order", "order: expected one of"),
    ({"bids": np.full(len(IDS), -1, np.float32)}, "INVALID_ARGUMENT", "bids", "bids: expected finite bids"),
    ({"user": "x" * 1025}, "INVALID_ARGUMENT", "user", "at most 1024 characters"),
    ({"now": 1000 * NOW}, "INVALID_ARGUMENT", "now", "now: expected a time"),
    ({"version": "0" * 64}, "FAILED_PRECONDITION", "version", "version: expected one of"),
])  # fmt: skip
def test_refusals_name_code_field_and_what_was_expected(ask, fields, code, field, message):
    with pytest.raises(Refused) as error:
        ask("rank", **{"k": 5} | fields)
    assert error.value.args[0] in (code, None) and error.value.args[1] in (field, None) and message in error.value.args[2]
