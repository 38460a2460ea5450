"""The request log."""

import contextlib
import json
import shutil
import threading
import time
import tracemalloc
import types
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import aif_jax as aif
from aif_jax.encoding.vocabulary import id_array
from aif_jax.service.calls import Call
from aif_jax.service.http import parse_json
from aif_jax.service.log import RequestLog, log_schema
from tests.service_world import ANN, EVENTS, IDS, exports, read_log, running, until

pytestmark = pytest.mark.lane("standing")


class Source:
    """Knows one user."""

    async def get(self, user):
        return aif.connectors.Record({"user": "bob"}, EVENTS) if user == "bob" else None


@pytest.fixture(scope="module")
def served():
    with running(exports().root / "one", source=Source()) as service:
        yield service


@contextlib.contextmanager
def noted(served, log):
    """A client of a service whose calls a log notes until the end of the block, which closes the log."""
    served.service.observers.append(log)
    try:
        with served.client() as client:
            yield client
    finally:
        served.service.observers.remove(log)
        log.close()


@pytest.fixture(scope="module")
def logged(served, tmp_path_factory):
    """The log of five answered calls."""
    folder = tmp_path_factory.mktemp("log")
    with noted(served, log := RequestLog(folder)) as client:
        client.rank(**ANN, candidates=IDS, k=5, id="r1")
        client.score(**ANN, candidates=IDS[:3], bids=np.ones(3), id="s1")
        client.rank(user="bob", candidates=IDS, k=5, id="r2")
        client.prepare(**ANN, feature_version=1)
        client.rank(user="ann", feature_version=1, candidates=IDS, k=5, id="r3")
        client.post("/v1/explain", ANN | {"candidates": IDS, "k": 5, "id": "e1"})
        client.request("POST", "/v1/rank")  # an error is not logged
    assert log.counters == {"log_records": 5, "log_dropped": 0, "log_failed": 0}
    return folder


def test_records_say_what_was_answered(logged):
    records = {record.id: record for record in read_log(logged)}
    expected = exports().logits("one")
    best, first = np.argsort(-expected, kind="stable")[:5], records["r1"]
    assert first.ids == IDS[best].tolist() and first.candidates == IDS.tolist() and first.k == 5
    np.testing.assert_allclose(first.logits, expected[best], atol=1e-5)
    assert first.version == exports().index["one"].version and json.loads(first.stages)["total"] > 0
    assert abs(first.time - time.time()) < 600 and first.raw is not None
    assert records["s1"].bids == [1.0] * 3 and records["s1"].ids is None and records["s1"].raw is not None
    assert records["r2"].raw is None and records["r3"].raw is None  # from the feature source; the state was there already
    assert [records[name].method for name in ("r1", "s1", "e1")] == ["rank", "score", "explain"]
    assert pq.read_schema(*logged.glob("*.parquet")).equals(log_schema())


def test_a_record_keeps_the_raw_values_that_the_answer_used(served, tmp_path):
    """Those of an earlier call under the feature version, not those that a later one brings in vain."""
    shorter = ANN | {"events": {name: values[:1] for name, values in EVENTS.items()}}
    with noted(served, RequestLog(tmp_path)) as client:
        first = client.rank(**ANN, feature_version="7a", candidates=IDS, k=5, id="first")
        again = client.rank(**shorter, feature_version="7a", candidates=IDS, k=5, id="again")
        other = client.rank(**shorter, candidates=IDS, k=5, id="other")
        late = client.rank(**shorter, feature_version="7b", candidates=IDS, k=5, id="late")
    assert first["scores"].tolist() == again["scores"].tolist() != other["scores"].tolist() == late["scores"].tolist()
    records = {record.id: record for record in read_log(tmp_path)}
    assert records["again"].raw is None
    versions = {name: record.feature_version for name, record in records.items()}
    assert versions == {"first": '"7a"', "again": '"7a"', "other": None, "late": '"7b"'}
    raw = {name: json.loads(records[name].raw) for name in ("first", "other", "late")}
    assert {name: len(one["events"]["item"]) for name, one in raw.items()} == {"first": 2, "other": 1, "late": 1}


def test_a_record_keeps_no_raw_values_where_a_stand_in_answers(served, tmp_path, monkeypatch):
    engine = served.service.models.held[0].engine

    async def failed(*_):
        raise RuntimeError("no room")

    monkeypatch.setattr(engine._users, "_make", failed)
    with noted(served, RequestLog(tmp_path)) as client:
        answer = client.rank(**ANN | {"user": "stood in for"}, candidates=IDS, k=5)
    assert answer["degraded"] and "unknown user" in answer["reason"]
    (record,) = read_log(tmp_path)
    assert record.raw is None and record.degraded


def test_a_record_says_what_a_call_excluded_and_that_it_had_no_candidates(served, tmp_path):
    best = IDS[np.argsort(-exports().logits("one"), kind="stable")]
    with noted(served, RequestLog(tmp_path)) as client:
        client.rank(**ANN, candidates=IDS, exclude=best[:3], k=5, id="r1")
        client.rank(**ANN, candidates=IDS[:0], k=5, id="r2")
    first, second = read_log(tmp_path)
    assert first.exclude == best[:3].tolist() and first.ids == best[3:8].tolist() and first.exclude_texts is None
    assert second.candidates == second.ids == [] and second.exclude is None


BODIES = {  # JSON of a record's column; values that take most memory once they are read
    "lists": b"[" + b"[]," * 20_000 + b"1]",
    "texts": b"[" + b'"ab",' * 10_000 + b"1]",
    "wide": '"\U0001f600'.encode() + b"a" * 60_000 + b'"',
}


def reply_to(kind: str) -> Any:
    """An answer to a call whose values no other call shares."""
    numbers, record = np.arange(5000) + np.random.default_rng().integers(1 << 40), None
    if kind in BODIES:
        record = parse_json(b'{"note": %s}' % BODIES[kind])
    texts = id_array([f"a text of an item that is longer than an array holds: {n}" for n in numbers])
    ids, size = (texts, sum(map(len, texts.tolist()))) if kind == "ids" else (numbers, 0)
    events = {"item": numbers.tolist()} if kind == "events" else None
    call = Call(user="ann", candidates=aif.Candidates(ids), record=record, events=events, size=size)
    answer = types.SimpleNamespace(
        ids=ids[:2000].copy(), mask=np.ones(2000, bool), logits=np.ones(2000, np.float32),
        version="0" * 64, degraded=False, reason=None, stages={"total": 0.1},
    )  # fmt: skip
    return types.SimpleNamespace(method="rank", call=call, answer=answer, order="logit", features=1)


@pytest.mark.parametrize("kind", [*BODIES, "events", "ids", "numbers"])
def test_a_slow_disk_holds_up_no_call_and_its_memory_is_bounded(tmp_path, monkeypatch, kind):
    disk, most = threading.Event(), 8 << 20
    monkeypatch.setattr(RequestLog, "_write", lambda log, rows: disk.wait(60))
    reply_to(kind), pa.array([1])  # what is made once
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes()
        log = RequestLog(tmp_path, waiting_bytes=most)
        while not log.counters["log_dropped"]:
            log.observe(reply_to(kind))
        until(lambda: log._waiting.empty() or 2 * log._came > most)  # the thread has a file's half and writes
        taken = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before
    finally:
        tracemalloc.stop()
        disk.set()
        log.close()
    assert 0.3 * most < taken < 1.1 * most, taken / most


def test_a_log_of_no_share_is_empty(tmp_path):
    with contextlib.closing(RequestLog(tmp_path, share=0.0)) as none:
        none.observe(reply_to("numbers"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_loses_records_and_says_so(served, tmp_path, caplog):
    with noted(served, log := RequestLog(tmp_path / "log")) as client:
        shutil.rmtree(tmp_path / "log")
        (tmp_path / "log").touch()  # no folder can be made
        client.rank(**ANN, candidates=IDS, k=1)
    assert log.counters["log_failed"] == 1 and "1 records lost" in caplog.text
    with noted(served, log := RequestLog(tmp_path / "other")) as client:
        shutil.rmtree(tmp_path / "other")  # by a job that has read it
        client.rank(**ANN, candidates=IDS, k=1)
    assert log.counters["log_records"] == len(list((tmp_path / "other").iterdir())) == 1
