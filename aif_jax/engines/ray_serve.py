"""Replicas on Ray Serve: the service behind handles, a user's calls at the replica with the state. Needs the extra `ray`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aif_jax.checks import needs_extra
from aif_jax.service.calls import affinity_key, parse
from aif_jax.service.core import Service
from aif_jax.service.models import Models
from aif_jax.serving import ServingConfig


def replicas(
    folder: str | Path, *, config: ServingConfig | None = None, models: Mapping[str, Any] | None = None, **options: Any
) -> Any:
    """Return an application for `serve.run`, whose handle `call` calls.

    Args:
      folder: an export, or exports with a file `current`, at the same path on every node.
      config: settings of the engines; None takes the defaults.
      models: options of `aif_jax.service.models.Models`, such as `poll`.
      options: keyword arguments of `ray.serve.deployment`, such as `num_replicas` and `ray_actor_options={"num_cpus": 2}`;
        `max_ongoing_requests` is by default that of the engine's `max_pending`, the router that by the user's hash.
    """
    with needs_extra("replicas need Ray Serve", "ray"):
        from ray import serve  # pyright: ignore[reportMissingImports]
        from ray.serve.config import RequestRouterConfig  # pyright: ignore[reportMissingImports]
        from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter  # pyright: ignore[reportMissingImports]
    config, router = config or ServingConfig(), RequestRouterConfig(request_router_class=ConsistentHashRouter)
    given = {"name": "PreRanking", "max_ongoing_requests": config.max_pending, "request_router_config": router}
    return serve.deployment(**given | options)(Replica).bind(str(folder), config=config, **dict(models or {}))


def call(handle: Any, method: str, fields: Mapping[str, Any]) -> Any:
    """Call the service by the handle of `serve.run`; returns Ray's response: `.result()`, or await it.

    Args:
      handle: handle of the application, as `serve.run(replicas("models"))` returns it.
      method: "rank", "score" or "prepare".
      fields: those of a call, see `aif_jax.service.calls.Call`.
    """
    return handle.options(method_name="call", session_id=affinity_key(fields["user"])).remote(method, dict(fields))


class Replica:
    """What an actor of `replicas` runs: the versions of a folder, with the engine on the actor's event loop."""

    async def __init__(self, folder: str, *, config: ServingConfig, **models: Any):  # type: ignore[misc]
        self._service = await Service(Models(folder, config=config, **models)).__aenter__()

    async def call(self, method: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of the answer, with arrays; raises what the service raises."""
        return (await self._service.answer(method, parse(fields))).fields()

    async def check_health(self) -> None:
        """Answer what Ray asks: raise where the service should get no traffic, so that the replica is replaced."""
        if self._service.unready is not None:
            raise RuntimeError(self._service.unready)

    async def __del__(self) -> None:
        await self._service.__aexit__()
