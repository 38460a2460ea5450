"""A model of several objectives through every way in: T logits of a candidate, orders by name."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from aif_jax.service import processes
from aif_jax.service.log import RequestLog, read_log, replay
from aif_jax.service.process import Listening
from tests.service_world import ANN, IDS, SERVING, exports, running

grpc = pytest.importorskip("grpc", reason="needs the extra 'grpc'")
tritonclient = pytest.importorskip("tritonclient.http", reason="needs tritonclient")


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
        assert scores["objectives"] == NAMES and scores["mask"].shape == (len(IDS),)
        answer = client.rank(**ANN, candidates=np.append(IDS[:3], 5), k=5)
        assert answer["logits"].shape == (3, 2) and answer["ids"].tolist() == IDS[np.argsort(-expected[:3, 0])].tolist()
        client.rank(**ANN, candidates=IDS, k=4, order="both")  # for the log
        body = json.dumps({**ANN, "candidates": [17, 5]}).encode()
        raw = client.request("POST", "/v1/score", body, {"content-type": "application/json"})[2]
        assert json.loads(raw)["logits"][1] == [None, None]
        body = json.dumps({**ANN, "candidates": IDS.tolist(), "k": 3}).encode()
        raw = client.request("POST", "/v1/explain", body, {"content-type": "application/json"})[2]
        explained = json.loads(raw)
    assert np.shape(explained["logits"]) == (3, 2)
    assert {name: len(part) for name, part in explained["contributions"].items()} == {"tower": 3, "dot_product": 3}


def test_the_open_inference_protocol_says_their_shape(served):
    with tritonclient.InferenceServerClient(served.addresses["http"].removeprefix("http://")) as triton:
        outputs = {output["name"]: output for output in triton.get_model_metadata("preranking")["outputs"]}
        assert outputs["logits"]["shape"] == [-1, 2] and outputs["scores"]["shape"] == [-1]


def test_a_log_of_them_is_replayed(served):
    served.log.close()
    records = list(read_log(served.log.folder))
    assert {len(record.logits) / len(record.ids or record.candidates) for record in records} == {2}
    report = replay(served.log.folder, exports("objectives").root / "one", config=SERVING_BOTH)
    assert report.records == len(records) and report.overlap == 1.0 and report.logit_difference["largest"] < 1e-5
    other = replay(served.log.folder, exports().root / "one", config=SERVING)  # a model of one objective
    assert other.records == len(records) and other.logit_difference["largest"] > 0
