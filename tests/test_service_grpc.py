"""The service over gRPC: generated stubs, deadlines, cancellation, errors, health, reflection."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

grpc = pytest.importorskip("grpc", reason="needs the extra 'grpc'")

from google.protobuf import descriptor_pb2  # noqa: E402
from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: E402

from aif_jax.service import rpc  # noqa: E402
from aif_jax.service.core import Policy  # noqa: E402
from aif_jax.service.process import Listening  # noqa: E402
from aif_jax.service.stubs import preranking_pb2 as pb  # noqa: E402
from aif_jax.service.stubs.preranking_pb2_grpc import PreRankingStub  # noqa: E402
from tests.service_world import EVENTS, IDS, NOW, SERVING, Slow, exports, running, until  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
STUBS = "aif_jax/service/stubs"


@pytest.fixture(scope="module")
def served():
    with running(exports().root / "one", where=Listening(http_port=0, grpc_port=0), grpc=rpc.start) as service:
        yield service


@pytest.fixture
def channel(served):
    with grpc.insecure_channel(served.addresses["grpc"]) as channel:
        yield channel


@pytest.fixture
def stub(channel):
    return PreRankingStub(channel)


def ann(**changes) -> pb.User:
    events = {name: pb.Column(integers=values) for name, values in EVENTS.items()}
    fields = {"id": pb.Id(text="ann"), "record": {"user": pb.Value(text="ann")}, "events": events, "now": NOW}
    return pb.User(**fields | changes)


def refusal(call, *arguments, **options) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as error:
        call(*arguments, **options)
    return error.value


def test_generated_files_are_those_of_the_proto_files(tmp_path):
    def protoc(*words):
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *words], cwd=ROOT, check=True, timeout=60)

    protoc("-I", ".", "--python_out", tmp_path, "--grpc_python_out", tmp_path, f"{STUBS}/preranking.proto")
    services = "preranking_pb2_grpc.py"

    def code(folder: Path) -> list[str]:
        lines = (folder / STUBS / services).read_text().splitlines()
        return [line for line in lines if "GENERATED_VERSION =" not in line]

    assert code(tmp_path) == code(ROOT), "run the commands of stubs/README.md"
    protoc("-I", STUBS, "--descriptor_set_out", tmp_path / "set", "preranking.proto", "inference.proto")
    assert (tmp_path / "set").read_bytes() == (ROOT / STUBS / "service.binpb").read_bytes()
    (first, _) = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file
    stub = descriptor_pb2.FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    assert _words(stub) == _words(first)


def _words(file) -> list[str]:
    """A description without its path, and without the JSON names that stubs leave out."""
    return [line for line in str(file).splitlines()[1:] if "json_name" not in line]


def test_an_answer_says_what_it_is_of(stub):
    answer = stub.Rank(pb.RankRequest(user=ann(), candidates=pb.Candidates(ids=IDS), k=5, request_id="r1"))
    assert answer.about.request_id == "r1" and answer.candidates == len(IDS)
    assert not answer.about.degraded and answer.about.stages["total"] > 0 and answer.about.state_age > 0
    assert stub.Score(pb.ScoreRequest(user=ann(), candidates=pb.Candidates(ids=[5, 17]))).logits[0] == -np.inf


def test_a_tensor_with_too_few_bytes_is_refused(stub):
    tensors = {"history.item": pb.Tensor(dtype="int32", shape=[8], data=bytes(31))}
    wrong = refusal(stub.Score, pb.ScoreRequest(user=pb.User(id=pb.Id(text="a"), features=tensors)))
    assert wrong.code() == grpc.StatusCode.INVALID_ARGUMENT and "features.history.item: expected 32 bytes" in wrong.details()


def test_numbers_come_packed_in_parts_or_one_by_one(stub, channel):
    """What protobuf allows beside one packed array, as a client of another language may send it."""
    expected = stub.Score(pb.ScoreRequest(user=ann(), candidates=pb.Candidates(ids=IDS[:4])))
    start = pb.ScoreRequest(user=ann()).SerializeToString()
    ids = [int(number).to_bytes(8, "little") for number in IDS[:4]]
    parts = b"\x0a\x10" + ids[0] + ids[1] + b"\x0a\x10" + ids[2] + ids[3]  # field 1, packed, 16 bytes, twice
    single = b"".join(b"\x09" + number for number in ids)  # field 1, 8 bytes, four times
    score = channel.unary_unary(f"/{rpc.PRE_RANKING}/Score", response_deserializer=pb.ScoreResponse.FromString)
    for candidates in (parts, single):
        answer = score(start + b"\x22" + bytes([len(candidates)]) + candidates)
        assert list(answer.logits) == list(expected.logits) and len(answer.logits) == 4
    wrong = refusal(score, start + b"\x22\x09\x0a\x07" + ids[0][:7])
    assert wrong.code() == grpc.StatusCode.INVALID_ARGUMENT and "candidates: expected 8 bytes" in wrong.details()


def test_each_batch_of_a_stream_leaves_excluded_items_out(stub):
    best = list(stub.Rank(pb.RankRequest(user=ann(), candidates=pb.Candidates(ids=IDS), k=5)).best.ids)
    request = pb.RankRequest(user=ann(), candidates=pb.Candidates(ids=IDS), k=3, exclude=pb.Candidates(ids=best[:2]))
    answer = stub.RankStream(iter([request, pb.RankRequest(candidates=pb.Candidates(ids=best[:3]))]))
    assert list(answer.best.ids) == best[2:] and (answer.unknown, answer.excluded) == (0, 4)  # each batch brought both


def test_prepare_then_rank_by_the_id_alone(stub):
    prepared = stub.Prepare(pb.PrepareRequest(user=ann(feature_version=pb.Id(number=3)), request_id="p"))
    user = pb.User(id=pb.Id(text="ann"), feature_version=pb.Id(number=3))
    answer = stub.Rank(pb.RankRequest(user=user, candidates=pb.Candidates(ids=IDS), k=5, version=prepared.version))
    assert not answer.about.degraded and "user" not in answer.about.stages and prepared.request_id == "p"
    new = pb.User(id=pb.Id(text="new"), known=True)  # known to have no events
    assert not stub.Rank(pb.RankRequest(user=new, candidates=pb.Candidates(ids=IDS), k=5)).about.degraded


def test_candidates_in_mini_batches(stub):
    whole = stub.Rank(pb.RankRequest(user=ann(), candidates=pb.Candidates(ids=IDS), k=5))

    def parts(sizes):
        start, first = 0, {"user": ann(), "k": 5}
        for size in sizes:
            yield pb.RankRequest(candidates=pb.Candidates(ids=IDS[start : start + size]), **first)
            start, first = start + size, {}
            time.sleep(0.01)

    answer = stub.RankStream(parts([10, 0, 25, 5]))
    assert list(answer.best.ids) == list(whole.best.ids) and answer.candidates == len(IDS)
    wrong = refusal(stub.RankStream, iter([]))
    assert wrong.code() == grpc.StatusCode.INVALID_ARGUMENT
    mixed = [
        pb.RankRequest(user=ann(), k=1, candidates=pb.Candidates(ids=[17])),
        pb.RankRequest(candidates=pb.Candidates(texts=["a"])),
    ]
    wrong = refusal(stub.RankStream, iter(mixed))
    assert wrong.code() == grpc.StatusCode.INVALID_ARGUMENT and "expected integers" in wrong.details()


def test_errors_name_the_field(stub):
    good = {"user": ann(), "candidates": pb.Candidates(ids=IDS), "k": 5}
    for changes, code, field in (
        ({"user": pb.User()}, "INVALID_ARGUMENT", "user"),
        ({"candidates": pb.Candidates(ids=[1], bids=[float("nan")])}, "INVALID_ARGUMENT", "bids"),
        ({"candidates": pb.Candidates(ids=[1], texts=["a"])}, "INVALID_ARGUMENT", "candidates"),
        ({"exclude": pb.Candidates(ids=[1], texts=["a"])}, "INVALID_ARGUMENT", "exclude"),
        ({"exclude": pb.Candidates(ids=[1], bids=[1.0])}, "INVALID_ARGUMENT", "exclude"),
        ({"exclude": pb.Candidates(texts=["a"])}, "INVALID_ARGUMENT", "exclude"),
        ({"candidates": pb.Candidates(texts=["x" * 1025])}, "INVALID_ARGUMENT", "candidates"),
        ({"user": pb.User(id=pb.Id(number=7))}, "INVALID_ARGUMENT", "user"),
    ):
        error = refusal(stub.Rank, pb.RankRequest(**good | changes))
        assert error.code() == grpc.StatusCode[code], (changes, error.details())
        assert dict(error.trailing_metadata())["aif-field"] == field
    missing = refusal(stub.Rank, pb.RankRequest(user=ann(), candidates=pb.Candidates(ids=IDS)))
    assert dict(missing.trailing_metadata())["aif-field"] == "k" and "got none; send k" in missing.details()


def test_a_refused_caller_is_told_when_to_try_again(stub):
    request = pb.RankRequest(user=ann(), candidates=pb.Candidates(ids=np.tile(IDS, 200)), k=5)
    calls, codes = [stub.Rank.future(request) for _ in range(60)], []
    for call in calls:
        try:
            call.result()
        except grpc.RpcError:
            codes.append(call.code())
            assert dict(call.trailing_metadata())["grpc-retry-pushback-ms"] == "50"
    assert set(codes) == {grpc.StatusCode.RESOURCE_EXHAUSTED}


def test_deadline_and_cancellation_reach_the_engine():
    source, where, config = Slow(), Listening(http_port=0, grpc_port=0), dataclasses.replace(SERVING, reserve=1.0)
    with running(exports().root / "one", where=where, grpc=rpc.start, source=source, config=config) as service:
        with grpc.insecure_channel(service.addresses["grpc"]) as channel:
            stub = PreRankingStub(channel)
            request = pb.RankRequest(user=pb.User(id=pb.Id(text="ann")), candidates=pb.Candidates(ids=IDS), k=5)
            answer = stub.Rank(request, timeout=2.0)  # the engine answers without the user before the deadline of the call
            assert answer.about.degraded and "late" in answer.about.reason
            call = stub.Rank.future(request)
            until(lambda: len(source.started) == 2)
            call.cancel()
            engine = service.service.models.held[0].engine
            until(lambda: service.call(lambda: engine.metrics()["counters"].get("cancelled")) == 1)
            error = refusal(stub.Rank, request, timeout=1e-6)
            assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_health_and_reflection(channel):
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", rpc.PRE_RANKING):
        wanted = health_pb2.HealthCheckRequest(service=name)
        until(lambda wanted=wanted: health.Check(wanted).status == health_pb2.HealthCheckResponse.SERVING)
    ask = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
    (listed,) = ask(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name for service in listed.list_services_response.service}
    assert {rpc.PRE_RANKING, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= names
    (file,) = ask(iter([reflection_pb2.ServerReflectionRequest(file_containing_symbol=rpc.PRE_RANKING)]))
    (raw,) = file.file_descriptor_response.file_descriptor_proto
    assert descriptor_pb2.FileDescriptorProto.FromString(raw).package == "aif_jax.v1"


def test_not_ready_once_draining(served, channel, monkeypatch):
    monkeypatch.setattr(served.service, "ready", False)
    health, asked = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest()
    until(lambda: health.Check(asked).status != health_pb2.HealthCheckResponse.SERVING)
    with served.client() as client:
        assert json.loads(client.request("GET", "/health/ready")[2]) == {"ready": False, "reason": "starting"}


def test_malformed_messages_and_other_methods(served, channel):
    for method in ("Rank", "Score", "Prepare"):
        call = channel.unary_unary(f"/{rpc.PRE_RANKING}/{method}")
        for raw in (b"\xff" * 9, b"\x1a\xff\xff\xff\xff\x0f", b"\x0a\x02\xff\xfe", b"\x08"):
            error = refusal(call, raw)
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, (raw, error.details())
    assert refusal(channel.unary_unary(f"/{rpc.PRE_RANKING}/None"), b"").code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_token_is_asked_for_calls_are_bounded_and_a_stream_must_begin():
    from aif_jax.service.calls import Limits

    where = Listening(http_port=0, grpc_port=0, connections=2, token="open sesame")
    policy, end = Policy(limits=Limits(body_bytes=4000, body_seconds=0.3)), threading.Event()

    def silent():
        end.wait(60)
        yield from ()

    with running(exports().root / "one", where=where, grpc=rpc.start, policy=policy) as service:
        with grpc.insecure_channel(service.addresses["grpc"]) as channel:
            stub, request = PreRankingStub(channel), pb.RankRequest(user=ann(), candidates=pb.Candidates(ids=IDS), k=1)
            for metadata in ((), (("authorization", "Bearer open"),), (("authorization", "open sesame"),)):
                assert refusal(stub.Rank, request, metadata=metadata).code() == grpc.StatusCode.UNAUTHENTICATED
                assert refusal(stub.RankStream, iter([request]), metadata=metadata).code() == grpc.StatusCode.UNAUTHENTICATED
            metadata = (("authorization", "Bearer open sesame"),)
            assert list(stub.Rank(request, metadata=metadata).best.ids)
            large = pb.RankRequest(user=ann(), candidates=pb.Candidates(ids=np.tile(IDS, 20)), k=1)
            assert refusal(stub.Rank, large, metadata=metadata).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status
            calls = [stub.RankStream.future(silent(), metadata=metadata) for _ in range(3)]
            codes = sorted(call.code().name for call in calls)  # waits for them
            end.set()
            assert codes == ["DEADLINE_EXCEEDED"] * 2 + ["RESOURCE_EXHAUSTED"]
