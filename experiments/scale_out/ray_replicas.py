"""Two replicas on Ray Serve, by its consistent hash and by its own router: do states hit, and what is a call by a handle?"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax.engines.ray_serve import call, replicas
from aif_jax.service.core import Service
from aif_jax.service.models import Models
from aif_jax.serving import ServingConfig
from experiments.scale_out.replicas import World
from experiments.scale_out.serving import CALLS, play

ROOT = Path(__file__).resolve().parent.parent.parent


def measure_ray_serve(smoke: bool) -> dict[str, Any]:
    """Hit shares, a replica that is killed, and the milliseconds of a call by a handle against the service in one process.

    Returns:
      `ray_affinity_hit_share_gap` in points below the ideal, and the hit shares of both routers in [0, 1]; calls after a
      replica's death that had to be sent again; the hit share once Ray has replaced it; answers that mix versions; medians of a
      call by a handle and of one in process, in milliseconds.

    Raises ImportError where Ray Serve is not installed.
    """
    users = 24 if smoke else 100
    sizes: dict[str, Any] = {} if smoke else {"items": 20_000, "candidates": 1000, "small": False}
    with tempfile.TemporaryDirectory() as root, cluster() as serve:
        world = World(Path(root) / "models", users=2 * users, **sizes)
        folder = world.copy(Path(root) / "served")
        config = ServingConfig(buckets=(64 if smoke else world.count,), max_k=64)
        order = np.random.default_rng(1).permutation(np.repeat(np.arange(users), CALLS))
        ideal = 1 - 1 / CALLS
        figures: dict[str, Any] = {"ray_ideal_hit_share": ideal, **asyncio.run(_in_process(world, folder, config, order))}
        options: dict[str, Any] = {
            "count": 2,
            "config": config,
            "ray_actor_options": {"num_cpus": 0.5},
            "health_check_period_s": 1,
        }

        handle = serve.run(replicas(folder, affinity=False, **options), name="any", route_prefix=None)
        played = _play(world, handle, order)
        figures["ray_default_hit_share"], mixed = played["hit_share"], played["mixed"]
        serve.delete("any")

        handle = serve.run(replicas(folder, **options), name="affinity", route_prefix=None)
        played = _play(world, handle, users + order)
        figures |= {"ray_affinity_hit_share": played["hit_share"], "ray_handle_call_p50_ms": played["p50_ms"]}
        figures["ray_affinity_hit_share_gap"] = 100 * (ideal - played["hit_share"])
        mixed += played["mixed"]

        again = np.arange(users, 2 * users)
        os.kill(_replica_processes("affinity")[0], signal.SIGKILL)
        played = _play(world, handle, again)
        figures["ray_death_sent_again"], mixed = played["sent_again"], mixed + played["mixed"]
        for replaced in (False, True):
            _await_running(serve, replaced)
        mixed += _play(world, handle, again)["mixed"]
        played = _play(world, handle, again)
        figures["ray_hit_share_after_death"], mixed = played["hit_share"], mixed + played["mixed"]
        return figures | {"ray_mixed_answers": mixed}


@contextlib.contextmanager
def cluster() -> Iterator[Any]:
    """Ray on this machine with Serve and no HTTP, until the end of the block."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is reported to anybody
    import ray
    from ray import serve

    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        serve.start(proxy_location="Disabled")
        yield serve
    finally:
        serve.shutdown()
        ray.shutdown()


def _play(world: World, handle: Any, order: np.ndarray) -> dict[str, Any]:
    """Calls one after another; one whose replica died is sent again."""
    from ray.exceptions import RayActorError

    sent_again = 0

    def ask(fields: dict[str, Any]) -> Any:
        nonlocal sent_again
        while True:
            try:
                return call(handle, "rank", fields).result(timeout_s=60)
            except RayActorError:
                sent_again += 1

    return play(world, ask, order) | {"sent_again": sent_again}


async def _in_process(world: World, folder: Path, config: ServingConfig, order: np.ndarray) -> dict[str, float]:
    """Median of the same calls by the same class without Ray."""
    from aif_jax.service.calls import parse

    seconds = []
    async with Service(Models(folder, config=config)) as service:
        for user in order.tolist():
            fields = world.call(user)
            start = time.perf_counter()
            await service.rank(parse(fields, service.policy.limits))
            seconds.append(time.perf_counter() - start)
    return {"service_call_p50_ms": 1e3 * float(np.median(seconds))}


def _await_running(serve: Any, both: bool) -> None:
    """Waits until Ray says that both replicas run, or that they do not."""
    until = time.monotonic() + 180
    while (serve.status().applications["affinity"].deployments["PreRanking"].replica_states.get("RUNNING", 0) == 2) != both:
        if time.monotonic() > until:
            raise RuntimeError(f"Ray did not {'replace' if both else 'miss'} the replica: {serve.status()}")
        time.sleep(0.1)


def _replica_processes(application: str) -> list[int]:
    """Processes of the replicas of an application of this cluster, by the title that Ray gives them."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"ServeReplica:{application}:PreRanking" in (entry / "cmdline").read_text():
                found.append(int(entry.name))
    return sorted(found)
