"""The service over HTTP: JSON, errors, limits, the life cycle of versions."""

import asyncio
import contextlib
import dataclasses
import functools
import http.client
import json
import re
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

import aif_jax as aif
from aif_jax.connectors import Record
from aif_jax.export import ExportError, restore
from aif_jax.service import core
from aif_jax.service import http as front
from aif_jax.service.calls import BadCall, Call, affinity_key, parse
from aif_jax.service.current import ExportEntry, parse_current, publish, read_current
from aif_jax.service.features import UserSource
from aif_jax.service.inference import MODEL
from aif_jax.service.process import Listening
from tests.beside import meanwhile
from tests.client import Client, ServiceError
from tests.refusals import refused
from tests.service_world import ANN, EVENTS, IDS, NOW, SERVING, Slow, exports, running, until

BODY = json.dumps({"user": "ann", "candidates": IDS.tolist(), "k": 5}).encode()
HEAD = b"POST /v1/rank HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(BODY)


@pytest.fixture(scope="module")
def served():
    with running(exports().root / "one") as service:
        yield service


@pytest.fixture
def client(served):
    with served.client() as client:
        yield client


def refusal(call, **fields) -> ServiceError:
    with pytest.raises(ServiceError) as error:
        call(**fields)
    return error.value


def test_json_keeps_numbers_and_text_and_refuses_what_is_no_json():
    text = '{"a": [1e-7, -0.0], "a": [18446744073709551615, 2.5], "b": "\\ud83d\\ude00 é\\n", "c": {"d": null}}'
    assert front.parse_json(text.encode()) == {"a": [2**64 - 1, 2.5], "b": "😀 é\n", "c": {"d": None}}
    assert isinstance(front.parse_json(b'{"a": 18446744073709551616}')["a"], float)  # no id: each field refuses it
    for wrong in (
        "NaN", '{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', '{"a": "\\ud800"}', "", "{} x", "{'a': 1}", '{"a": 01}',
        '{"a": 1.}', '{"a": "\t"}', '{"a": 1,}', "\ufeff{}", "[" * 10**5,
    ):  # fmt: skip
        refused(BadCall, "body: expected JSON", front.parse_json, wrong.encode())
    for other in (b"[]", b"3"):
        refused(BadCall, "body: expected a JSON object", front.parse_json, other)
    refused(BadCall, "body: expected JSON", front.parse_json, b'{"a": "\xff"}')


def test_an_answer_is_json_whatever_its_numbers_are():
    texts = np.array(["é", ""], np.dtypes.StringDType())
    fields = {"scores": np.float32([0.1, -np.inf]), "ids": texts, "positions": {3: 14}, "age": np.nan}
    assert json.loads(front.encode(fields)) == {"scores": [0.1, None], "ids": ["é", ""], "positions": {"3": 14}, "age": None}


def test_a_callers_name_comes_back_cut():
    assert len(str(BadCall("x" * 10**6, "no"))) < 1100


WRONG = {
    "user": (None, True, 1 << 64, 1.5, "x" * 2000), "candidates": (7, [1, "a"], [[1]], [1 << 70], list(range(101))),
    "bids": ([-1], ["a"], [1, 2]), "exclude": (7, [1, "bid"], ["x" * 1025], list(range(101))), "k": ("5",),
    "budget": (0, float("inf"), 10**400), "events": ([1],), "features": ({},), "colour": (3,), "now": ("today",),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "field"), [
    *(({field: value}, field) for field, values in WRONG.items() for value in values),
    ({"events": {"item": list(range(101))}}, "events.item"),
])  # fmt: skip
def test_a_call_is_checked_field_by_field(fields, field):
    refused(BadCall, f"^{field}: expected", parse, {"user": 1, "candidates": [1], "events": {}} | fields, 100)


def test_answers_say_what_they_are_of(client):
    assert client.score(**ANN, candidates=IDS, id="r1")["id"] == "r1"
    answer = client.rank(**ANN, candidates=IDS, k=5)
    assert not answer["degraded"] and answer["stages"]["total"] > 0
    assert (answer["candidates"], answer["unknown"]) == (len(IDS), 0)
    few = client.rank(**ANN, candidates=np.array([17, 5]), k=5)
    assert few["ids"].tolist() == [17] and few["unknown"] == 1
    _, answer = client.post("/v1/score", {**ANN, "candidates": [5, 17]}, "application/json; charset=utf-8")
    logits = answer["logits"]
    assert logits[0] is None and isinstance(logits[1], float)


def test_prepare_then_rank_by_the_id_alone(client):
    version = client.prepare(**ANN, feature_version=7)["version"]
    answer = client.rank(user="ann", feature_version=7, candidates=IDS, k=5, version=version)
    assert client.rank(**ANN, candidates=IDS, k=1, version="one")["version"] == version  # the name of the served folder
    assert not answer["degraded"] and "user" not in answer["stages"]
    np.testing.assert_array_equal(answer["ids"], client.rank(**ANN, candidates=IDS, k=5)["ids"])


def test_features_of_a_call_count_whatever_was_prepared(client):
    whole = ANN | {"user": "prepared"}
    other = whole | {"events": {name: values[:1] for name, values in EVENTS.items()}}
    expected = client.rank(**whole, candidates=IDS, k=5)["scores"].tolist()
    for prepared in (whole, other):  # the later one counts
        client.prepare(**prepared)
    assert client.rank(**whole, candidates=IDS, k=5)["scores"].tolist() == expected
    prepared = client.rank(user="prepared", candidates=IDS, k=5)["scores"].tolist()
    assert prepared == client.rank(**other, candidates=IDS, k=5)["scores"].tolist() != expected


def test_a_feature_source_knows_users_and_the_service_says_how_often_it_fails_and_how_slow_it_is():
    recent = EVENTS | {"time": [time.time_ns() // 10**9 - 70] * 2}  # far from 64 s, where the recency changes
    records = {"ann": Record({"user": "ann"}, recent), "torn": Record({"user": "torn"}, {"item": [17], "time": ["soon"]})}
    reads = []

    async def get(user):
        reads.append(user)
        if user == "down":
            raise ConnectionError("down")
        await asyncio.sleep(30 if user == "slow" else 0.3 if user == "ann" else 0)
        return records.get(user)

    config = dataclasses.replace(SERVING, callable_timeout=1.0)
    with running(exports().root / "one", source=SimpleNamespace(get=get), config=config) as service, service.client() as client:
        whole = client.rank(user="ann", candidates=IDS, k=3)
        assert not whole["degraded"] and whole["stages"]["features"] > 0
        new = client.score(user="new", candidates=IDS)
        np.testing.assert_allclose(new["logits"], exports().logits("one", None, user="new"), atol=1e-5)
        assert not new["degraded"]
        for user, why in (
            ("slow", "within callable_timeout=1.0 s"),
            ("down", "the service failed: ConnectionError; answered"),
            ("torn", "the service failed: SourceError; answered"),
        ):
            answer = client.rank(user=user, candidates=IDS, k=3)
            assert answer["degraded"] and why in answer["reason"], answer["reason"]
        counts = {"found": 2, "missing": 1, "abandoned": 1, "failed": 1, "damaged": 1}
        assert service.service.models.reads.counters == Counter(counts)
        with service.client() as other, ThreadPoolExecutor(2) as pool:  # calls of one user at one time share one read
            calls = [pool.submit(each.rank, user="ann", candidates=IDS, k=3) for each in (client, other)]
            assert all(call.result()["ids"].tolist() == whole["ids"].tolist() for call in calls)
        assert reads.count("ann") == 2
        text = client.request("GET", "/metrics")[2].decode()
        for kind, count in (("found", 3), ("abandoned", 1), ("failed", 1), ("damaged", 1)):
            (line,) = [line for line in text.splitlines() if line.startswith(f"aif_features_{kind}_total")]
            assert line.endswith(f" {count}.0"), line
        (line,) = [line for line in text.splitlines() if line.startswith("aif_stage_seconds_count") and 'stage="read"' in line]
        assert line.endswith(" 4.0")


def test_a_damaged_record_is_no_fault_of_the_caller(caplog):
    records = {"torn": Record({"user": "torn"}, {"item": [17], "time": ["soon"]})}

    async def get(user):
        if user == "wrong":
            raise ValueError("a torn row")
        return records[user]

    config = dataclasses.replace(SERVING, fallback=False)
    with running(exports().root / "one", source=SimpleNamespace(get=get), config=config) as service, service.client() as client:
        for user in ("torn", "wrong"):
            with pytest.raises(ServiceError, match="the service failed: SourceError") as refused:
                client.rank(user=user, candidates=IDS, k=3)
            assert refused.value.status == 500
    assert caplog.text.count("a call failed: ") == 1  # in a minute
    with running(exports().root / "one", config=config) as service, service.client() as client:
        for call in (client.prepare, functools.partial(client.score, candidates=IDS)):
            with pytest.raises(ServiceError, match="got a user id alone") as refused:
                call(user="ann")
            assert (refused.value.status, refused.value.field) == (400, "events")


def test_a_wrong_time_is_the_callers_and_no_damage_of_the_record():
    async def get(user):
        return Record({"user": "ann"}, EVENTS)

    with running(exports().root / "one", source=SimpleNamespace(get=get)) as service, service.client() as client:
        for now, call in ((1000 * NOW, client.prepare), (1000 * NOW, functools.partial(client.rank, candidates=IDS, k=3))):
            error = refusal(call, user="ann", now=now)
            assert (error.status, error.field) == (400, "now") and "expected a time before 2100" in str(error)
        early = EVENTS["time"][0] - 1000
        error = refusal(client.prepare, user="ann", now=early)
        assert (error.status, error.field) == (400, "now") and "expected a time after the user's events" in str(error)
        answer = client.rank(user="ann", now=early, candidates=IDS, k=3)
        assert answer["degraded"] and "failed: now: expected a time after" in answer["reason"]
        assert not client.rank(user="ann", now=NOW, candidates=IDS, k=3)["degraded"]
        assert service.service.models.reads.counters == Counter(found=3)


def test_a_call_that_brings_its_events_does_not_wait_for_the_source_with_others_of_its_feature_version():
    source, config = Slow(), dataclasses.replace(SERVING, callable_timeout=3.0)
    with running(exports().root / "one", source=source, config=config) as service, ThreadPoolExecutor(1) as pool:
        with service.client() as client, service.client() as other:
            alone = {"user": "ann", "feature_version": 7, "candidates": IDS, "k": 5}
            waiting = pool.submit(client.rank, **alone)
            until(lambda: source.started)
            whole = other.rank(**ANN | alone)
            assert not whole["degraded"] and not waiting.done()
            assert other.rank(**alone)["ids"].tolist() == whole["ids"].tolist() and source.started == ["ann"]
            assert "stale state" in waiting.result()["reason"]


def test_ids_are_strings_and_a_long_text_in_any_field_is_refused():
    """Hashed character by character it would keep the threads that score; each answer names the field."""
    long = "x" * (1 << 20)
    with running(exports("strings").root / "one") as service, service.client() as client:
        good = {"user": "ann", "record": {"user": "ann"}, "events": {}, "candidates": ["item 17"], "k": 1}
        ids = np.array(["item 1017", "item 17", "none"], np.dtypes.StringDType())
        answer = client.rank(**good | {"candidates": ids, "k": 3})
        assert sorted(answer["ids"].tolist()) == ["item 1017", "item 17"] and answer["unknown"] == 1
        for field, value in (
            *((field, long) for field in ("user", "feature_version", "version", "order", "id")),
            ("candidates", ["item 17", long]),
            ("events", {"item": ["item 17", long], "time": [NOW - 9, NOW - 8]}),
            ("events", {"item": ["item 17"], "time": [long]}),
        ):
            status, answer = client.post("/v1/rank", good | {field: value})
            error = answer["error"]
            assert (status, error["field"]) == (400, field) and "at most 1024 characters" in error["message"], error
        array = np.array(["item 17", long], np.dtypes.StringDType())
        assert refusal(client.rank, **good | {"candidates": array}).field == "candidates"
        assert refusal(client.rank, **good | {"record": {"user": long[: 1 << 19]}}).field == "record"


def test_features_are_not_read_where_the_state_is_there(client):
    known = client.rank(**ANN, feature_version=9, candidates=IDS, k=5)
    wrong = {"user": "ann", "record": {}, "events": {"colour": [1]}, "candidates": IDS, "k": 5}
    again = client.rank(**wrong, feature_version=9)
    assert again["ids"].tolist() == known["ids"].tolist() and not again["degraded"]
    for version in (None, 10):
        assert refusal(client.rank, **wrong, feature_version=version).field == "events"


def test_a_call_ends_with_its_caller():
    source = Slow()
    with running(exports().root / "one", source=source) as service:
        with service.connect(HEAD + BODY):
            until(lambda: source.started)
        until(lambda: service.service.calls["rank", "CANCELLED"] and source.cancelled)
        assert source.cancelled == ["ann"] and service.service.models.held[0].engine.metrics()["counters"]["cancelled"] == 1
        with service.client() as client:
            assert client.score(**ANN, candidates=IDS)["mask"].all()


def test_a_call_that_is_cut_off_is_told_to_go_elsewhere_and_counted(tmp_path, caplog):
    """By the end of its version, by that of the service, and by that while its body comes."""
    exports().copied(tmp_path)
    publish(tmp_path, ["one"])
    source, config = Slow(), dataclasses.replace(SERVING, drain_timeout=0.6, callable_timeout=None)
    with contextlib.ExitStack() as end:
        with running(tmp_path, source=source, config=config, keep=1) as service:
            callers = [end.enter_context(service.connect(HEAD + BODY))]
            until(lambda: source.started)
            publish(tmp_path, ["two"])
            until(service.service.calls.total)  # that of the first version
            callers += [end.enter_context(service.connect(HEAD + part)) for part in (BODY, BODY[:9])]
            until(lambda: len(source.started) == 2)
        answers = [http.client.HTTPResponse(caller) for caller in callers]
        for answer in answers:
            answer.begin()
    assert [answer.status for answer in answers] == [503] * 3 and +service.service.calls == {("rank", "UNAVAILABLE"): 3}
    texts = [json.loads(answer.read())["error"]["message"] for answer in answers]
    assert [text.partition("no answer before the ")[2] for text in texts] == ["engine closed", "service ended", "service ended"]
    assert "Traceback" not in caplog.text and "Exception in ASGI" not in caplog.text


def test_a_connection_of_the_last_moment_is_ended():
    """One that was accepted while the service stops to listen: nobody asks anything on it, so nothing is waited for."""
    with contextlib.ExitStack() as end:
        with running(exports().root / "one", config=dataclasses.replace(SERVING, drain_timeout=1.0)) as service:
            service.loop.call_soon_threadsafe(time.sleep, 0.3)
            late = end.enter_context(service.connect(b""))
        late.settimeout(5)
        assert late.recv(1) == b""


def test_errors_name_the_field(client):
    codes = {400: "INVALID_ARGUMENT", 412: "FAILED_PRECONDITION", 504: "DEADLINE_EXCEEDED"}
    texts = np.array(["a"], np.dtypes.StringDType())
    for fields, status, field, message in (
        ({"candidates": None}, 400, "candidates", ""), ({"candidates": texts}, 400, None, "expected integers"),
        ({"version": "01"}, 412, "version", ""), ({"budget": 1e-9}, 504, "", ""), ({"user": 7}, 400, "user", ""),
        ({"events": {"item": [1]}}, 400, "events", "expected a column 'time'"),
        ({"events": {"item": [17], "time": [NOW + 999]}}, 400, "events", ""), ({"k": 0}, 400, "k", "got 0"),
        ({"k": None}, 400, "k", "ARGUMENT: k: expected 1 to max_k=8, got None"),
    ):  # fmt: skip
        error = refusal(client.rank, **ANN | {"candidates": IDS, "k": 1} | fields)
        assert (error.status, error.code) == (status, codes[status]) and message in str(error), (fields, str(error))
        assert field in (error.field, None), (fields, str(error))


NAMES = {"user": "listener", "item": "track", "time": "at", "action": "what"}
OWN = aif.Columns(**NAMES, actions=("play", "skip"), user_attributes=("country",))
ROWS = {"user": ["ann", "bob"], "item": [17, 18], "category": ["x"], "country": ["DE", "JP"]}
PLAYED = {"track": [17], "at": [NOW - 60], "what": ["play"]}


def source(columns: aif.Columns = OWN, **rows) -> UserSource:
    vocabularies = {name: aif.Vocabulary(ids) for name, ids in (ROWS | rows).items() if ids is not None}
    return UserSource(aif.Encoder(columns=columns, vocabularies=vocabularies).with_length(8), None)


@pytest.mark.parametrize(("call", "field", "message"), [
    ({"record": {"country": 3}}, "record", "column 'country': expected strings like the vocabulary, got dtype int64"),
    ({"record": {"country": ["JP", "DE"]}}, "record", "column 'country': expected one value"),
    ({"record": {"contry": "JP"}}, "record", "expected values of ['country'], None or null where unknown, got"),
    ({"record": {"country": "JP", "listener": "bob"}}, "record", "column 'listener': expected 'ann', the user's id"),
    ({"record": {"country": "JP", "listener": [[1], [1, 2]]}}, "record", "column 'listener': expected 'ann', the user's id"),
    ({"events": PLAYED | {"listener": ["bob"]}}, "events", "column 'listener': expected rows of user 'ann' alone"),
    ({"events": PLAYED | {"track": ["17"]}}, "events", "column 'track': expected integers like the vocabulary, got dtype <U2"),
    ({"events": PLAYED | {"track": 17}}, "events", "column 'track': expected a list of values, got 17"),
    ({"events": PLAYED | {"at": ["today"]}}, "events", "column 'at': expected a date and time in ISO form"),
    ({"events": PLAYED | {"what": [1.5]}}, "events", "column 'what': expected integers or strings, got dtype float64"),
    ({"events": {"item": [17], "time": [NOW], "action": ["play"]}}, "events", "expected a column 'track', got ['item', 'time'"),
    ({"events": PLAYED, "now": 1000 * NOW}, "now", "expected a time before 2100"),
])  # fmt: skip
def test_what_a_call_brings_is_named_by_field_and_column(call, field, message):
    whole = Call(**{"user": "ann", "record": {"country": "JP"}, "events": {}, "now": NOW} | call)
    refused(BadCall, f"^{re.escape(f'{field}: {message}')}", source().of, whole)


def test_a_call_leaves_out_nothing_that_the_model_reads():
    whole = {"record": {"country": "JP"}, "events": PLAYED}
    for left_out, message in (
        ("record", r"record: expected values of \['country'\], .* got none; send null for unknown ones"),
        ("events", r"events: expected the user's events, got none; send {} or empty tensors for a user without events"),
    ):
        call = Call(user="ann", now=NOW, **{name: value for name, value in whole.items() if name != left_out})
        refused(BadCall, f"^{message}", source().of, call)
    known = source().of(Call(user="ann", now=NOW, **whole))
    new = source().of(Call(user="ann", now=NOW, record={"country": None}, events={}))
    assert (known.ids["country"], new.ids["country"]) == (2, 0) and known.history.mask.sum() == 1 and not new.history.mask.any()
    assert source().of(Call(user="ann")) is None  # an id alone: prepared before, or known to the feature source


def test_user_ids_are_of_the_kind_in_the_files():
    call = {"record": {"country": "JP"}, "events": PLAYED, "now": NOW}
    for ids, good, wrong, message in (
        (["ann"], "new", 7, "expected text, as in this model's files, got 7"),
        ([1, 2], 7, "7", "expected an integer, as in this model's files, got '7'"),
        (["ann"], "new", "", "expected the user's id, got an empty text"),
    ):
        assert source(user=ids).of(Call(user=good, **call)) is not None and source(user=ids).of(Call(user=good)) is None
        for brought in (call, {}):
            refused(BadCall, f"^user: {message}", source(user=ids).of, Call(user=wrong, **brought))
    assert source(user=["", "ann"]).of(Call(user="", **call)) is not None  # the files have it


def test_a_user_id_alone_leaves_a_line_and_a_count(caplog):
    with running(exports().root / "one") as service, service.client() as client:
        for user in ("who", "else"):
            assert client.rank(user=user, candidates=IDS, k=3)["degraded"]
        (line,) = [record for record in caplog.records if record.name == "aif_jax.serving.callables"]
        text = client.request("GET", "/metrics")[2].decode()
    assert "features refused a request: BadCall: events: expected raw events or" in line.getMessage()
    assert "Traceback" not in caplog.text and line.exc_info is None and "who" not in caplog.text
    assert re.search(r'aif_callable_errors_total{.*reason="features BadCall".*} 2.0', text)
    assert re.search(r"aif_refused_total{.*} 0.0", text) and re.search("{.*INTERNAL.*score.*} 0.0", text)


def test_overload_says_when_to_try_again():
    barrier, errors = threading.Barrier(40), []

    def call():
        with service.client(timeout=60) as client:
            barrier.wait()
            try:
                client.rank(**ANN, candidates=IDS, k=5)
            except ServiceError as error:
                errors.append(error)

    config = dataclasses.replace(SERVING, max_pending=1)
    with running(exports().root / "one", config=config) as service, ThreadPoolExecutor(40) as pool:
        list(pool.map(lambda _: call(), range(40)))
    assert errors and {error.code for error in errors} == {"RESOURCE_EXHAUSTED"}
    assert {error.status for error in errors} == {429} and errors[0].retry_after == pytest.approx(0.05)


def test_paths_methods_and_types(client):
    for method, path, kind, status in (
        ("GET", "/../../etc/passwd", "", 404),
        ("GET", "/page.js/../../http.py", "", 404),
        ("GET", "/index.html", "", 404),
        ("POST", "/v1/rank", "text/plain", 400),
        ("HEAD", "/health/live", "", 200),
    ):
        assert client.request(method, path, b"", {"content-type": kind})[0] == status, (method, path)
    packed = client.request("POST", "/v1/rank", b"x", {"content-type": "application/json", "content-encoding": "gzip"})
    assert packed[0] == 400 and b"content-encoding: expected a body as it is, got b'gzip'" in packed[2]
    sizes = set()
    for method in ("GET", "HEAD"):
        client._connection.request(method, "/page.js", headers=client._headers)
        with client._connection.getresponse() as response:
            sizes.add(response.headers["content-length"])
            assert bool(response.read()) == (method == "GET")
    assert len(sizes) == 1 and sizes != {"0"}


def test_other_methods_are_refused_and_told_which_are_not(client):
    model = f"/v2/models/{MODEL}"
    reads = "/metrics", "/v2", "/v2/health/live", "/v2/health/ready", model, f"{model}/ready", f"{model}/versions/9/ready"
    calls = "/v1/rank", f"{model}/infer", f"{model}/versions/9/infer"
    for path, allowed in (dict.fromkeys(reads, "GET, HEAD") | dict.fromkeys(calls, "POST")).items():
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            client._connection.request(method, path)
            with client._connection.getresponse() as response:
                told = response.read() or method == "HEAD"
            assert (response.status == 405) == (method not in allowed) and told, (method, path)
            assert response.headers["allow"] == (allowed if response.status == 405 else None), (method, path)


def test_a_body_is_bounded():
    where = Listening(port=0, max_bytes=1000, body_seconds=0.2)
    with running(exports().root / "one", where=where) as served:
        with served.client() as client:
            status, _, body = client.request("POST", "/v1/rank", bytes(1001), {"content-type": "application/json"})
        assert status == 413 and json.loads(body)["error"]["field"] == "body"
        for head, answer in (
            (b"content-length: 99999999999999999999999\r\n\r\n", (b" 413 ", b" 400 ")),
            (b"transfer-encoding: chunked\r\n\r\n" + b"320\r\n" + bytes(800) + b"\r\n" + b"320\r\n" + bytes(800), (b" 413 ",)),
            (b"content-length: 500\r\n\r\n1234", (b" 408 ",)),
        ):
            with served.connect(b"POST /v1/rank HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + head) as slow:
                line = slow.recv(64)
                assert any(code in line for code in answer), (head[:30], line)


def test_a_token_is_asked_for_and_an_idle_connection_closed_after_its_time():
    where = Listening(port=0, keep_alive=1)
    with running(exports().root / "one", where=where, token="open sesame") as service:
        with service.connect(b"HEAD /health/live HTTP/1.1\r\nhost: x\r\n\r\n") as idle:
            assert b" 200 " in idle.recv(1 << 16)
            assert idle.recv(1) == b""
        with service.client() as client:
            assert client.rank(**ANN, candidates=IDS, k=1)["ids"].shape == (1,)
        for token in (None, "open", "open sesame "[::-1], ""):
            with Client(service.addresses["http"], token=token) as client:
                assert refusal(client.rank, **ANN, candidates=IDS, k=1).status == 401
                assert client.request("GET", "/metrics")[0] == 401
                assert client.request("GET", "/health/ready")[0] == 200


def test_metrics_are_scraped(client, monkeypatch):
    from prometheus_client.parser import text_string_to_metric_families

    def scraped():
        status, kind, body = client.request("GET", "/metrics")
        assert status == 200 and kind.startswith("text/plain")
        families = {family.name: family for family in text_string_to_metric_families(body.decode())}
        return families, {(s.labels["method"], s.labels["code"]): s.value for s in families["aif_calls"].samples}

    client.rank(**ANN, candidates=IDS, k=1)
    infers = scraped()[1].get(("infer", "INVALID_ARGUMENT"), 0)
    for path in ("/v1/score", f"/v2/models/{MODEL}/infer/", "/v1/none"):
        assert client.post(path, {"colour": 3})[0] in (400, 404)  # refused before any engine
    with monkeypatch.context() as broken:
        broken.setattr(core, "_parts", lambda reply, ids: {}[reply])
        assert client.post("/v1/explain", ANN | {"candidates": IDS, "k": 5})[0] == 500
    families, calls = scraped()
    assert calls["rank", "OK"] >= 1 and calls["score", "INVALID_ARGUMENT"] and calls["infer", "INVALID_ARGUMENT"] == infers + 1
    assert calls["explain", "INTERNAL"] == 1 and not {method for method, _ in calls} - set(front.CALLS)
    assert families["aif_answered"].samples[0].labels == {"version": exports().index["one"].version[:12], "folder": "one"}
    assert families["aif_model_age_seconds"].samples[0].value > 0
    assert {s.labels["stage"] for s in families["aif_stage_seconds"].samples} >= {"user", "score", "total"}


def test_publish_writes_what_is_read(tmp_path):
    exports().copied(tmp_path)
    publish(tmp_path, ["one", ExportEntry("two", exports().digests["two"], 0.25)])
    assert read_current(tmp_path) == [ExportEntry("one", None, 0.75), ExportEntry("two", exports().digests["two"], 0.25)]
    assert read_current(tmp_path / "two") == [ExportEntry("", None, 1.0)]
    refused(FileNotFoundError, "expected an exported folder", publish, tmp_path, ["three"])
    refused(FileNotFoundError, "got neither", read_current, tmp_path / "one" / "consume")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "one", "two"]
    shares = [0.2, 0.4, 0.3, 0.1]  # which may add up to one, though as floats one by one they are more
    text = "\n".join(["one", *(f"part{n} share={share}" for n, share in enumerate(shares))])
    assert [entry.share for entry in parse_current(text)] == [0.0, *shares]


def test_publishing_under_load_fails_no_call_and_mixes_no_version(tmp_path):
    """Answers of every moment are those of one version, whole; the version before may still be named."""
    world = exports().copied(tmp_path)
    publish(tmp_path, ["one"])
    expected = {world.index[name].version: world.logits(name) for name in ("one", "two")}
    seen = []

    def call(client):
        answer = client.score(**ANN, candidates=IDS)
        np.testing.assert_allclose(answer["logits"], expected[answer["version"]], atol=1e-5)
        seen.append(answer["version"])

    with running(tmp_path, keep=2) as service, service.client() as one, service.client() as two, service.client() as three:
        with meanwhile(*(functools.partial(call, client) for client in (one, two, three))) as failed:
            for name in ("two", "one", "two"):
                publish(tmp_path, [ExportEntry(name, world.digests[name])])
                version = world.index[name].version
                until(lambda version=version: (seen and seen[-1] == version) or failed())
        assert set(seen) == set(expected)
        assert one.score(**ANN, candidates=IDS, version="one")["version"] == world.index["one"].version
        assert len(service.service.models.held) == 2


def test_two_exports_of_one_model_have_series_each_and_one_export_has_none_twice(tmp_path):
    """By version and folder; held once more by its digest, an export that no call could name is retired."""
    digest = exports().copied(tmp_path).digests["one"]
    shutil.copytree(tmp_path / "one", tmp_path / "newer")
    publish(tmp_path, ["one"])
    with running(tmp_path, keep=4) as service, service.client() as client:
        for held, entry in enumerate(("newer", ExportEntry("newer", digest), ExportEntry("one", digest)), start=2):
            publish(tmp_path, [entry])
            until(lambda held=held: service.service.models.publishes == held)
        text = client.request("GET", "/metrics")[2].decode()
        lines = [line.rpartition(" ")[0] for line in text.splitlines() if line[0] != "#"]
        assert len(set(lines)) == len(lines) and [each.name for each in service.service.models.held] == ["one", "newer"]


def test_a_broken_version_is_not_published(tmp_path):
    world = exports().copied(tmp_path)
    publish(tmp_path, ["one"])
    with running(tmp_path) as service, service.client() as client:
        params = tmp_path / "two" / "params.safetensors"
        whole = params.read_bytes()
        params.write_bytes(whole[:-4])
        publish(tmp_path, ["two"])
        until(lambda: service.service.models.problem is not None)
        assert "params.safetensors" in service.service.models.problem
        assert client.rank(**ANN, candidates=IDS, k=1)["version"] == world.index["one"].version
        params.write_bytes(whole)  # the copy was not complete yet: it is tried again
        until(lambda: client.rank(**ANN, candidates=IDS, k=1)["version"] == world.index["two"].version)
        publish(tmp_path, ["one", ExportEntry("two", "0" * 64, 0.5)])  # all of them or none
        until(lambda: "sha256" in (service.service.models.problem or ""))
        assert client.rank(**ANN, candidates=IDS, k=1)["version"] == world.index["two"].version


def test_golden_outputs_are_compared_before_the_swap():
    restored = restore(exports().root / "one")
    assert restored.check_golden() < 1e-5
    wrong = dict(restored.golden) | {"interaction.outputs/logits": restored.golden["interaction.outputs/logits"] + 1}
    other = dataclasses.replace(restored, golden=wrong)
    refused(ExportError, "interaction logits: expected the golden output", other.check_golden)


def test_users_are_split_between_versions(tmp_path):
    world = exports().copied(tmp_path)
    publish(tmp_path, ["one", ExportEntry("two", share=0.3)])
    with running(tmp_path) as service, service.client() as client:
        versions = {}
        for user in range(60):
            fields = {"user": f"u{user}", "record": {}, "events": {}, "candidates": IDS, "k": 1}
            versions[user] = client.rank(**fields)["version"]
            assert client.rank(**fields)["version"] == versions[user]
        expected = {u: "two" if int(affinity_key(f"u{u}"), 16) >= 0.7 * 2**64 else "one" for u in range(60)}
        assert versions == {u: world.index[name].version for u, name in expected.items()}
        assert {"one", "two"} == set(expected.values())
        status = json.loads(client.request("GET", "/status.json")[2])
        assert {model["folder"]: model["share"] for model in status["models"]} == {"one": pytest.approx(0.7), "two": 0.3}
        assert {model["version"]: model["answered"] for model in status["models"]} == Counter(2 * list(versions.values()))
        assert len({served.engine._programs for served in service.service.models.held}) == 1  # compiled once
        assert status["codes"] == {"OK": 120} and status["timeline"]["version"] == versions[59]
        assert all(0 < model["stages"]["total"]["p50"] <= model["stages"]["total"]["p99"] for model in status["models"])
    with running(tmp_path / "two") as service, service.client() as client:
        assert client.rank(**ANN, candidates=IDS, k=1)["version"] == world.index["two"].version


def test_no_folder_outside_is_served(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    shutil.copytree(exports().root / "one", outside)
    root.mkdir()
    (root / "link").symlink_to(outside)
    (root / "current").write_text("link\n")
    refused(ValueError, "expected a folder, got a link", running(root).__enter__)
