"""The gRPC front, on the event loop of the service: deadlines and cancellation are those of the call."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from aif_jax.service import messages
from aif_jax.service.core import Service
from aif_jax.service.errors import Problem, reported
from aif_jax.service.serve import Listening
from aif_jax.service.traces import PARENT
from aif_jax.serving import Candidates, DeadlineExceeded

PRE_RANKING = f"{messages.PACKAGE}.PreRanking"
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

    def methods(self) -> dict[str, tuple[str, Method]]:
        """Name and type of the request, for each method of one request."""
        named = {"Rank": self._rank, "Score": self._score, "Prepare": self._prepare}
        return {name: (f"{messages.PACKAGE}.{name}Request", method) for name, method in named.items()}

    async def _rank(self, given: Any, left: float | None) -> Any:
        call = messages.call_of(given, self._limits, budget=left)
        return messages.rank_response(await self._service.rank(call), call.id)

    async def _score(self, given: Any, left: float | None) -> Any:
        call = messages.call_of(given, self._limits, budget=left)
        return messages.score_response(await self._service.score(call), call.id)

    async def _prepare(self, given: Any, left: float | None) -> Any:
        call = messages.call_of(given, self._limits, budget=left)
        version = (await self._service.prepare(call)).version
        return messages.kind(f"{messages.PACKAGE}.PrepareResponse")(request_id=call.id, version=version)

    async def rank_stream(self, parts: AsyncIterator[bytes], left: float | None) -> Any:
        """The method RankStream."""
        name = f"{messages.PACKAGE}.RankRequest"
        try:
            async with asyncio.timeout(self._limits.body_seconds):  # the engine limits the wait for later ones
                raw = await anext(parts, b"")
        except TimeoutError:
            raise DeadlineExceeded(f"expected a first message within {self._limits.body_seconds:g} s") from None
        first = messages.read(name, raw)
        call = messages.call_of(first, self._limits, budget=left)

        async def batches() -> AsyncIterator[Candidates]:
            room = self._limits.candidates
            batch = call.candidates
            while batch is not None:
                room -= len(batch.ids)
                if room < 0:
                    raise messages.BadCall("candidates", f"expected at most {self._limits.candidates} in all batches")
                if len(batch.ids):
                    yield batch
                raw = await anext(parts, None)
                batch = None if raw is None else messages.candidates_in(messages.read(name, raw), self._limits)

        return messages.rank_response(await self._service.rank(call, batches=batches()), call.id)


async def start(
    service: Service, where: Listening, *, more: Mapping[str, Mapping[str, tuple[str, Method]]] | None = None
) -> tuple[int, Callable[[float], Awaitable[None]]]:
    """Starts gRPC with health and reflection; returns the port and `stop(seconds)`, which waits for calls in flight.

    Args:
      service: that answers.
      where: to listen.
      more: methods of further services, by full name, as `PreRanking.methods` gives them.

    Raises:
      ImportError: grpc is missing.
      OSError: the port is taken.
    """
    try:
        import grpc
        from grpc_health.v1 import health, health_pb2, health_pb2_grpc
        from grpc_reflection.v1alpha import reflection, reflection_pb2
    except ImportError as error:
        raise ImportError('gRPC needs grpcio: pip install "aif_jax[grpc]"') from error

    token = None if where.token is None else f"Bearer {where.token}".encode()

    async def fail(context: Any, problem: Problem) -> None:
        trailing = [("aif-field", problem.field)] if problem.field.isprintable() and problem.field.isascii() else []
        if problem.retry_after is not None:  # the name that gRPC's own retry policy reads
            trailing.append(("grpc-retry-pushback-ms", str(round(1000 * problem.retry_after))))
        text = problem.message.encode("utf-8", "replace").decode()[:4000]
        await context.abort(grpc.StatusCode[problem.code], text, tuple(trailing))

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
        await fail(context, problem)
        raise AssertionError("unreachable: abort raises")

    def unary(name: str, method: Method) -> Any:
        async def handle(raw: bytes, context: Any) -> bytes:
            async def work(left: float | None) -> Any:
                return await method(messages.read(name, raw), left)

            return await answered(context, work)

        return grpc.unary_unary_rpc_method_handler(handle)

    def streamed(method: Callable[[AsyncIterator[bytes], float | None], Awaitable[Any]]) -> Any:
        async def handle(parts: AsyncIterator[bytes], context: Any) -> bytes:
            return await answered(context, lambda left: method(parts.__aiter__(), left))

        return grpc.stream_unary_rpc_method_handler(handle)

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
    handlers = {name: unary(*method) for name, method in pre_ranking.methods().items()}
    handlers["RankStream"] = streamed(pre_ranking.rank_stream)
    services = {PRE_RANKING: handlers}
    for name, methods in (more or {}).items():
        services[name] = {method: unary(*entry) for method, entry in methods.items()}
    for name, named in services.items():
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, named),))
    checks = health.aio.HealthServicer()  # type: ignore[attr-defined]  # a module that it imports as a name
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    pool = messages.pool()
    for other in (health_pb2, reflection_pb2):
        pool.AddSerializedFile(other.DESCRIPTOR.serialized_pb)
    reflection.enable_server_reflection([*services, HEALTH, reflection.SERVICE_NAME], server, pool=pool)

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
