"""Two replicas on Ray Serve, by its consistent hash and by its own router: do states hit?"""

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax.engines.ray_serve import call, replicas
from aif_jax.serving import ServingConfig
from tests.conftest import ROOT
from tests.replicas import CALLS, USERS, World
from tests.service_world import until


def measure() -> dict[str, Any]:
    """Hit shares in [0, 1] by users and by Ray's own router, the gap to the ideal in points, answers that mix versions."""
    with tempfile.TemporaryDirectory() as root, cluster() as serve:
        world = World()
        folder = world.copy(Path(root) / "served")
        order = np.random.default_rng(1).permutation(np.repeat(np.arange(USERS), CALLS))
        ideal = 1 - 1 / CALLS
        options: dict[str, Any] = {
            "num_replicas": 2,
            "config": ServingConfig(buckets=(64,), max_k=64),
            "ray_actor_options": {"num_cpus": 0.5},
            "health_check_period_s": 1,
        }

        own = serve.config.RequestRouterConfig()  # Ray's router, which does not know users
        handle = serve.run(replicas(folder, request_router_config=own, **options), name="any", route_prefix=None)
        played = _play(world, handle, order)
        figures = {"ideal_hit_share": ideal, "default_hit_share": played["hit_share"]}
        mixed = played["mixed"]
        serve.delete("any")

        handle = serve.run(replicas(folder, **options), name="affinity", route_prefix=None)
        played = _play(world, handle, USERS + order)
        figures["affinity_hit_share_gap"] = 100 * (ideal - played["hit_share"])
        mixed += played["mixed"]

        again = np.arange(USERS, 2 * USERS)
        os.kill(_replica_processes("affinity")[0], signal.SIGKILL)
        mixed += _play(world, handle, again)["mixed"]
        for replaced in (False, True):
            _await_running(serve, replaced)
        shares = [0.0]
        while shares[-1] < 1 and len(shares) < 20:  # the handle hears of the new replica after Ray says that it runs
            played = _play(world, handle, again)
            mixed, shares = mixed + played["mixed"], [*shares, played["hit_share"]]
        played = _play(world, handle, again)
        return figures | {"hit_share_after_death": played["hit_share"], "mixed_answers": mixed + played["mixed"]}


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

    def ask(fields: dict[str, Any]) -> Any:
        while True:
            with contextlib.suppress(RayActorError):
                return call(handle, "rank", fields).result(timeout_s=60)

    return world.play(ask, order)


def _await_running(serve: Any, both: bool) -> None:
    """Waits until Ray says that both replicas run, or that they do not."""
    states = lambda: serve.status().applications["affinity"].deployments["PreRanking"].replica_states  # noqa: E731
    until(lambda: (states().get("RUNNING", 0) == 2) == both, 180)


def _replica_processes(application: str) -> list[int]:
    """Processes of the replicas of an application of this cluster, by the title that Ray gives them."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"ServeReplica:{application}:PreRanking" in (entry / "cmdline").read_text():
                found.append(int(entry.name))
    return sorted(found)
