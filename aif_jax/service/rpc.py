"""The gRPC front, on the event loop of the service, and its messages: deadlines and cancellation are those of the call."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory, unknown_fields

from aif_jax.checks import needs_extra
from aif_jax.service import tensors
from aif_jax.service.calls import BadCall, Call, Limits, candidates_of, parse, reported
from aif_jax.service.core import Service
from aif_jax.service.log import PARENT
from aif_jax.service.process import Listening
from aif_jax.serving import Candidates, DeadlineExceeded

PACKAGE = "aif_jax.v1"
INFERENCE = "inference"
DESCRIPTORS = Path(__file__).parent / "stubs" / "service.binpb"
DATATYPES = {"int32": "INT32", "float32": "FP32", "bool": "BOOL"}
"""The protocol's names of the dtypes of features, see `tensors`."""
PACKED = {"Candidates": {"ids", "bids"}, "RankResponse": {"scores", "logits"}, "ScoreResponse": {"logits", "known"}}
"""Arrays of the messages: what protobuf sends of them is what NumPy has in memory."""


@functools.cache
def pool(*, packed: bool = False) -> Any:
    """All messages, apart from those that other libraries of this process may have under the same names.

    With `packed`, the arrays of `PACKED` are bytes: the same on the wire, without a Python object for each number. They are
    repeated, because an array may come in several parts.
    """
    made = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes()).file:
        for each in file.message_type if packed and file.package == PACKAGE else ():
            for field in each.field:
                if field.name in PACKED.get(each.name, ()):
                    field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
        made.Add(file)
    return made


@functools.cache
def kind(name: str, *, packed: bool = False) -> Any:
    """The class of a message by its full name, see `pool`."""
    return message_factory.GetMessageClass(pool(packed=packed).FindMessageTypeByName(name))


def read(name: str, raw: bytes) -> Any:
    """A message from bytes, its arrays packed; BadCall for bytes that are none."""
    try:
        return kind(name, packed=True).FromString(raw)
    except (message.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadCall("message", f"expected a {name}: {error}") from None


def call_of(given: Any, limits: Limits, *, budget: float | None) -> Call:
    """The call that a request says; raises BadCall."""
    fields: dict[str, Any] = {"id": given.request_id, "version": given.version or None, "budget": budget}
    fields |= _user(given.user)
    names = given.DESCRIPTOR.fields_by_name
    if "k" in names:
        fields |= {"k": given.k or None, "order": given.order or None}  # protobuf has 0 for what a caller did not set
    if "candidates" in names:
        fields |= _candidates(given.candidates)
        if len(given.exclude.ids) or given.exclude.texts or given.exclude.bids:
            excluded = _candidates(given.exclude, "exclude")
            if "bids" in excluded:
                raise BadCall("exclude", "expected ids or texts without bids, got bids")
            fields["exclude"] = excluded["candidates"]
    return parse(fields, limits)


def rank_response(fields: Mapping[str, Any]) -> Any:
    """A RankResponse of `rank_fields`."""
    ids = fields["ids"]
    best = {"ids": [_bytes(ids, "<i8")]} if ids.dtype.kind == "i" else {"texts": ids.tolist()}
    return kind(f"{PACKAGE}.RankResponse", packed=True)(
        about=_about(fields), best=best, scores=[_bytes(fields["scores"])], logits=[_bytes(fields["logits"])],
        candidates=fields["candidates"], unknown=fields["unknown"], excluded=fields["excluded"],
    )  # fmt: skip


def score_response(fields: Mapping[str, Any]) -> Any:
    """A ScoreResponse of `score_fields`."""
    return kind(f"{PACKAGE}.ScoreResponse", packed=True)(
        about=_about(fields), logits=[_bytes(fields["logits"])], known=[_bytes(fields["mask"], "?")]
    )


def prepare_response(fields: Mapping[str, Any]) -> Any:
    """A PrepareResponse."""
    return kind(f"{PACKAGE}.PrepareResponse")(request_id=fields["id"], version=fields["version"])


RESPONSES = {"rank": rank_response, "score": score_response, "prepare": prepare_response}


def _bytes(array: np.ndarray, dtype: str = "<f4") -> bytes:
    return array.astype(dtype, copy=False).tobytes()


def _about(fields: Mapping[str, Any]) -> dict[str, Any]:
    names = ("version", "degraded", "reason", "state_age", "non_finite", "stages", "objectives")
    return {"request_id": fields["id"]} | {name: fields[name] for name in names if fields.get(name) is not None}


def _user(user: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"user": _id(user.id, "user")}
    if user.HasField("feature_version"):
        fields["feature_version"] = _id(user.feature_version, "feature_version")
    if user.HasField("now"):
        fields["now"] = user.now
    if user.features:
        fields["features"] = {name: _tensor(tensor, name) for name, tensor in user.features.items()}
        fields["encoding"] = user.encoding
    if user.record or user.events or user.known:
        chosen = {name: (value, value.WhichOneof("value")) for name, value in user.record.items()}
        fields["record"] = {name: which and getattr(value, which) for name, (value, which) in chosen.items()} or None
        fields["events"] = {name: _column(column, name) for name, column in user.events.items()}
        fields["events"] = fields["events"] or ({} if fields["record"] is None else None)
    return fields


def _id(given: Any, field: str) -> Any:
    which = given.WhichOneof("id")
    if which is None:
        raise BadCall(field, "expected a number or a text, got none; set one of them")
    return getattr(given, which)


def _candidates(given: Any, field: str = "candidates") -> dict[str, Any]:
    if len(unknown_fields.UnknownFieldSet(given)):  # numbers that came one by one, not packed, as protobuf allows
        plain = kind(f"{PACKAGE}.Candidates").FromString(given.SerializeToString())
        given = kind(f"{PACKAGE}.Candidates", packed=True).FromString(plain.SerializeToString())
    ids, bids = _numbers(given.ids, field, "<i8"), _numbers(given.bids, "bids", "<f4")
    if len(ids) and given.texts:
        raise BadCall(field, "expected ids or texts, got both; set one of them")
    return {"candidates": list(given.texts) if given.texts else ids} | ({"bids": bids} if len(bids) else {})


def _numbers(parts: Any, field: str, dtype: str) -> np.ndarray:
    raw, wanted = parts[0] if len(parts) == 1 else b"".join(parts), np.dtype(dtype)
    if len(raw) % wanted.itemsize:
        raise BadCall(field, f"expected {wanted.itemsize} bytes for each, got {len(raw)}")
    return np.frombuffer(raw, wanted)


def _column(column: Any, name: str) -> Any:
    parts = [list(part) for part in (column.integers, column.numbers, column.texts) if part]
    if len(parts) > 1:
        raise BadCall(f"events.{name}", "expected integers, numbers or texts, got several of them")
    if not parts:
        return np.zeros(0, np.int64)
    return np.array(parts[0], np.int64) if column.integers else parts[0]


def _tensor(tensor: Any, name: str) -> np.ndarray:
    field, kind = f"features.{name}", DATATYPES.get(tensor.dtype)
    if kind is None:
        raise BadCall(field, f"expected a dtype among {', '.join(DATATYPES)}, got {tensor.dtype!r:.40}")
    return tensors.from_bytes(field, kind, tensors.expect_shape(field, kind, list(tensor.shape)), tensor.data)


PRE_RANKING = f"{PACKAGE}.PreRanking"
HEALTH = "grpc.health.v1.Health"
METADATA_BYTES = 16 << 10
WAY_BACK = 0.005  # seconds of a deadline that are left for the answer to travel
HEALTH_SECONDS = 0.1  # between two looks at readiness

Method = Callable[[Any, float | None], Awaitable[Any]]
"""`await method(request message, seconds left or None) -> response message`."""


class PreRanking:
    """The methods of the service of that name."""

    def __init__(self, service: Service):
        self._service = service
        self._limits = service.policy.limits

    def methods(self) -> dict[str, Method]:
        """The methods of one request by name."""
        return {name.title(): functools.partial(self._called, name) for name in RESPONSES}

    async def _called(self, name: str, given: Any, left: float | None) -> Any:
        return RESPONSES[name](await self._service.fields(name, call_of(given, self._limits, budget=left)))

    async def rank_stream(self, parts: AsyncIterator[bytes], left: float | None) -> Any:
        """The method RankStream."""
        name = f"{PACKAGE}.RankRequest"
        try:
            async with asyncio.timeout(self._limits.body_seconds):  # the engine limits the wait for later ones
                raw = await anext(parts, b"")
        except TimeoutError:
            raise DeadlineExceeded(f"expected a first message within {self._limits.body_seconds:g} s") from None
        call = call_of(read(name, raw), self._limits, budget=left)

        async def batches() -> AsyncIterator[Candidates]:
            room = self._limits.candidates
            batch = call.candidates
            while batch is not None:
                room -= len(batch.ids)
                if room < 0:
                    raise BadCall("candidates", f"expected at most {self._limits.candidates} in all, got more; send fewer")
                if len(batch.ids):
                    yield batch
                raw = await anext(parts, None)
                fields = {} if raw is None else _candidates(read(name, raw).candidates)
                batch = candidates_of(fields["candidates"], fields.get("bids"), self._limits) if fields else None

        return rank_response(await self._service.fields("rank", call, batches=batches()))


async def start(
    service: Service, where: Listening, *, more: Mapping[str, Mapping[str, Method]] | None = None
) -> tuple[int, Callable[[float], Awaitable[None]]]:
    """Starts gRPC with health and reflection; returns the port and `stop(seconds)`, which waits for calls in flight.

    Args:
      more: methods of further services, by full name, as `PreRanking.methods` gives them; NAME takes a message NAMERequest.

    Raises:
      ImportError: grpc is missing.
      OSError: the port is taken.
    """
    with needs_extra("gRPC needs grpcio", "grpc"):
        import grpc
        from grpc_health.v1 import health, health_pb2, health_pb2_grpc
        from grpc_reflection.v1alpha import reflection, reflection_pb2

    token = None if where.token is None else f"Bearer {where.token}".encode()

    async def answered(context: Any, work: Callable[[float | None], Awaitable[Any]]) -> bytes:
        try:
            PARENT.set(str(dict(context.invocation_metadata() or ()).get("traceparent", "")))
            left = context.time_remaining()
            if left is not None and left <= 0:
                raise DeadlineExceeded("the deadline passed before the call was read")
            # gRPC says "no deadline" as one in many years; an answer needs some time for its way back
            budget = None if left is None or left > 1e6 else left - min(WAY_BACK, 0.1 * left)
            return (await work(budget)).SerializeToString()
        except Exception as error:
            problem = reported(error)
        trailing = [("aif-field", problem.field)] if problem.field.isprintable() and problem.field.isascii() else []
        if problem.retry_after is not None:  # the name that gRPC's own retry policy reads
            trailing.append(("grpc-retry-pushback-ms", str(round(1000 * problem.retry_after))))
        text = problem.message.encode("utf-8", "replace").decode()[:4000]
        await context.abort(grpc.StatusCode[problem.code], text, tuple(trailing))
        raise AssertionError("unreachable: abort raises")

    def handled(kind: Any, method: Callable[[Any, float | None], Awaitable[Any]], given: Callable[[Any], Any]) -> Any:
        """The handler of a kind of call; `given` makes what the method takes of what came."""

        async def handle(came: Any, context: Any) -> bytes:
            return await answered(context, lambda left: method(given(came), left))

        return kind(handle)

    class Authorized(grpc.aio.ServerInterceptor):
        """Refuses calls without the token, except health checks."""

        async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
            """The handler of the call, or one that refuses it."""
            given = next((value for key, value in handler_call_details.invocation_metadata if key == "authorization"), "")
            given = given if isinstance(given, bytes) else given.encode("utf-8", "replace")
            assert token is not None
            if handler_call_details.method.startswith(f"/{HEALTH}/") or hmac.compare_digest(given, token):
                return await continuation(handler_call_details)

            async def refuse(request: Any, context: Any) -> None:
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "expected the metadata 'authorization: Bearer TOKEN'")

            handler = await continuation(handler_call_details)
            stream = handler is not None and handler.request_streaming
            return (grpc.stream_unary_rpc_method_handler if stream else grpc.unary_unary_rpc_method_handler)(refuse)

    options = [
        ("grpc.max_receive_message_length", service.policy.limits.body_bytes),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.so_reuseport", int(where.reuse_port)),
    ]
    interceptors = [] if token is None else [Authorized()]
    server = grpc.aio.server(interceptors=interceptors, options=options, maximum_concurrent_rpcs=where.connections)
    pre_ranking = PreRanking(service)
    services = {PRE_RANKING: pre_ranking.methods(), **(more or {})}
    for name, methods in services.items():
        package = name.rpartition(".")[0]
        requests = {each: functools.partial(read, f"{package}.{each}Request") for each in methods}
        handlers = {each: handled(grpc.unary_unary_rpc_method_handler, methods[each], requests[each]) for each in methods}
        if name == PRE_RANKING:
            handlers["RankStream"] = handled(grpc.stream_unary_rpc_method_handler, pre_ranking.rank_stream, aiter)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    checks = health.aio.HealthServicer()  # type: ignore[attr-defined]  # a module that it imports as a name
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    described = pool()
    for other in (health_pb2, reflection_pb2):
        described.AddSerializedFile(other.DESCRIPTOR.serialized_pb)
    reflection.enable_server_reflection([*services, HEALTH, reflection.SERVICE_NAME], server, pool=described)

    address = f"[{where.host}]:{where.grpc_port}" if ":" in where.host else f"{where.host}:{where.grpc_port}"
    try:
        if where.certificate is None or where.key is None:
            port = server.add_insecure_port(address)
        else:
            pair = (where.key.read_bytes(), where.certificate.read_bytes())
            port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except RuntimeError as error:
        raise OSError(f"{address}: gRPC could not listen: {error}") from error
    await server.start()

    async def follow_readiness() -> None:
        shown: Any = None
        while True:
            named = health_pb2.HealthCheckResponse
            status = named.SERVING if service.unready is None else named.NOT_SERVING
            if status != shown:
                for name in ("", *services):
                    await checks.set(name, status)
                shown = status
            await asyncio.sleep(HEALTH_SECONDS)

    following = asyncio.get_running_loop().create_task(follow_readiness())

    async def stop(seconds: float) -> None:
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following
        await checks.enter_graceful_shutdown()
        await server.stop(seconds)

    return port, stop
