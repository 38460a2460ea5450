"""Arrow IPC as a body of the HTTP route."""

from __future__ import annotations

import json

import numpy as np
import pyarrow
import pyarrow.ipc
import pytest

from aif_jax.service import tensors
from aif_jax.service.calls import BadCall
from tests.service_world import ANN, IDS, exports, running


def test_arrow_answers_what_frames_do():
    with running(exports().root / "one") as service, service.client() as client:
        same_answers(client)


def same_answers(client):
    flat = ANN | {"candidates": IDS, "k": 5}
    status, kind, body = client.request("POST", "/v1/rank", tensors.pack_arrow(flat), {"content-type": tensors.ARROW})
    assert (status, kind) == (200, tensors.ARROW)
    answer, expected = tensors.unpack_arrow(body), client.rank(**ANN, candidates=IDS, k=5)
    for name in ("ids", "scores", "logits"):
        np.testing.assert_array_equal(answer[name], expected[name])
    assert answer["version"] == expected["version"] and answer["reason"] is None
    table = pyarrow.ipc.open_stream(body).read_all()
    assert table.column("ids").type == pyarrow.list_(pyarrow.int64()) and answer["stages"]["total"] > 0
    status, _, body = client.request("POST", "/v1/rank", tensors.pack_arrow(flat | {"k": "5"}), {"content-type": tensors.ARROW})
    assert (status, json.loads(body)["error"]["field"]) == (400, "k")


def _compressed(batch) -> bytes:
    sink = pyarrow.BufferOutputStream()
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"ARROW1", "expected an Arrow stream"),
        (tensors.pack_arrow({"user": 1})[:-40], "expected an Arrow stream"),
        (tensors.pack_arrow({"user": 1, "a": [{"b": 1}]}), "expected numbers, strings or lists"),
        (tensors.pack_arrow({"user": 1, "a": 1, "a.b": 1}), "expected one value, got two"),
        (_compressed(pyarrow.record_batch({"candidates": [list(range(9999))]})), "not compressed"),
        (_compressed(pyarrow.record_batch({"user": pyarrow.array(["a"]).dictionary_encode()})), "a schema and a record batch"),
    ],
)
def test_a_broken_arrow_stream_is_refused(body, message):
    with pytest.raises(BadCall, match=message):
        tensors.unpack_arrow(body)
