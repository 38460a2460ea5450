"""A model of several objectives through every way in: T logits of a candidate, orders by name."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from aif_jax.service import processes
from aif_jax.service.log import RequestLog, read_log, replay
from aif_jax.service.process import Listening
from tests.service_world import ANN, EVENTS, IDS, NOW, SERVING, exports, running

grpc = pytest.importorskip("grpc", reason="needs the extra 'grpc'")
tritonclient = pytest.importorskip("tritonclient.http", reason="needs tritonclient")

from aif_jax.service.stubs import preranking_pb2 as pb  # noqa: E402
from aif_jax.service.stubs.preranking_pb2_grpc import PreRankingStub  # noqa: E402

NAMES = ["click", "like"]
SERVING_BOTH = dataclasses.replace(SERVING, orders={"both": "p.click * p.like"})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    log = RequestLog(folder)
    where = Listening(http_port=0, grpc_port=0)
    config = {"config": SERVING_BOTH, "observers": (log,), "routes": processes.routes, "grpc": processes.start_grpc}
    with running(exports("objectives").root / "one", where=where, **config) as service:
        service.log = log
        yield service


def test_answers_have_the_logits_of_each_objective(served):
    expected = exports("objectives").logits("one")
    assert expected.shape == (len(IDS), 2)
    with served.client() as client:
        scores = client.score(**ANN, candidates=IDS)
        np.testing.assert_allclose(scores["logits"], expected, atol=1e-5)
        assert scores["objectives"] == NAMES and scores["mask"].shape == (len(IDS),)
        answer = client.rank(**ANN, candidates=np.append(IDS[:3], 5), k=5)
        assert answer["logits"].shape == (3, 2) and answer["ids"].tolist() == IDS[np.argsort(-expected[:3, 0])].tolist()
        product = 1 / ((1 + np.exp(-expected[:, 0])) * (1 + np.exp(-expected[:, 1])))
        both = client.rank(**ANN, candidates=IDS, k=4, order="both")
        assert both["ids"].tolist() == IDS[np.argsort(-product)[:4]].tolist()
        body = json.dumps({**ANN, "candidates": [17, 5]}).encode()
        raw = client.request("POST", "/v1/score", body, {"content-type": "application/json"})[2]
        assert json.loads(raw)["logits"][1] == [None, None]
        body = json.dumps({**ANN, "candidates": IDS.tolist(), "k": 3}).encode()
        raw = client.request("POST", "/v1/explain", body, {"content-type": "application/json"})[2]
        explained = json.loads(raw)
    assert np.shape(explained["logits"]) == (3, 2)
    assert {name: len(part) for name, part in explained["contributions"].items()} == {"tower": 3, "dot_product": 3}


def test_over_grpc_they_come_candidate_by_candidate(served):
    expected = exports("objectives").logits("one")
    user = pb.User(
        id=pb.Id(text="ann"), record={"user": pb.Value(text="ann")}, now=NOW,
        events={name: pb.Column(integers=values) for name, values in EVENTS.items()},
    )  # fmt: skip
    with grpc.insecure_channel(served.addresses["grpc"]) as channel:
        stub = PreRankingStub(channel)
        scores = stub.Score(pb.ScoreRequest(user=user, candidates=pb.Candidates(ids=IDS)))
        answer = stub.Rank(pb.RankRequest(user=user, candidates=pb.Candidates(ids=IDS), k=3, order="both"))
    np.testing.assert_allclose(np.reshape(scores.logits, (len(IDS), 2)), expected, atol=1e-5)
    assert list(scores.about.objectives) == NAMES and len(answer.logits) == 2 * len(answer.best.ids) == 6


def test_the_open_inference_protocol_says_their_shape(served):
    with tritonclient.InferenceServerClient(served.addresses["http"].removeprefix("http://")) as triton:
        outputs = {output["name"]: output for output in triton.get_model_metadata("preranking")["outputs"]}
        assert outputs["logits"]["shape"] == [-1, 2] and outputs["scores"]["shape"] == [-1]
        inputs = [tritonclient.InferInput("user", [1], "BYTES"), tritonclient.InferInput("candidates", [len(IDS)], "INT64")]
        inputs[0].set_data_from_numpy(np.array([b"ann"], np.object_))
        inputs[1].set_data_from_numpy(IDS)
        inputs.append(tritonclient.InferInput("record.user", [1], "BYTES"))
        inputs[2].set_data_from_numpy(np.array([b"ann"], np.object_))
        result = triton.infer("preranking", inputs)
    assert result.as_numpy("logits").shape == (len(IDS), 2)


def test_a_log_of_them_is_replayed(served):
    served.log.close()
    records = list(read_log(served.log.folder))
    assert {len(record.logits) / len(record.ids or record.candidates) for record in records} == {2}
    report = replay(served.log.folder, exports("objectives").root / "one", config=SERVING_BOTH)
    assert report.records == len(records) and report.overlap == 1.0 and report.logit_difference["largest"] < 1e-5
    other = replay(served.log.folder, exports().root / "one", config=SERVING)  # a model of one objective
    assert other.records == len(records) and other.logit_difference["largest"] > 0
