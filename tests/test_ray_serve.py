"""Replicas on Ray Serve: do states hit, by its consistent hash and by its own router? `python -m pytest -m engines`."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aif_jax.engines.ray_serve import call, replicas
from aif_jax.serving import ServingConfig
from tests.conftest import ROOT
from tests.replicas import CALLS, USERS, World
from tests.service_world import until

pytestmark = [pytest.mark.lane("engines"), pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]  # Ray's imports warn
OPTIONS: dict[str, Any] = {
    "num_replicas": 2, "config": ServingConfig(buckets=(64,), max_k=64), "ray_actor_options": {"num_cpus": 0.5},
    "health_check_period_s": 1,
}  # fmt: skip


@pytest.fixture
def serve(monkeypatch) -> Iterator[Any]:
    """Ray on this machine with Serve and no HTTP."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
    serve = pytest.importorskip("ray.serve", reason="needs the extra 'ray'")
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    serve.start(proxy_location="Disabled")
    yield serve
    serve.shutdown()
    ray.shutdown()


def play(world: World, handle: Any, order: np.ndarray) -> float:
    """The hit share in [0, 1] of calls one after another; one whose replica died is sent again, and none mixes versions."""
    from ray.exceptions import RayActorError

    def ask(fields: dict[str, Any]) -> Any:
        while True:
            with contextlib.suppress(RayActorError):
                return call(handle, "rank", fields).result(timeout_s=60)

    played = world.play(ask, order)
    assert played["mixed"] == 0
    return played["hit_share"]


def replica_processes(application: str) -> Iterator[int]:
    """Processes of the replicas of an application of this cluster, by the title that Ray gives them."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"ServeReplica:{application}:PreRanking" in (entry / "cmdline").read_text():
                yield int(entry.name)


def test_affinity(serve, tmp_path):
    """Users find their states as often as is possible, half as often by Ray's own router, also after a replica died."""
    world = World()
    folder, ideal = world.copy(tmp_path / "served"), 1 - 1 / CALLS
    order, again = np.random.default_rng(1).permutation(np.repeat(np.arange(USERS), CALLS)), np.arange(USERS, 2 * USERS)
    own = serve.config.RequestRouterConfig()  # Ray's router, which does not know users
    handle = serve.run(replicas(folder, request_router_config=own, **OPTIONS), name="any", route_prefix=None)
    assert play(world, handle, order) < ideal - 0.1
    serve.delete("any")
    handle = serve.run(replicas(folder, **OPTIONS), name="affinity", route_prefix=None)
    assert play(world, handle, USERS + order) > ideal - 0.02

    os.kill(min(replica_processes("affinity")), signal.SIGKILL)
    play(world, handle, again)
    states = lambda: serve.status().applications["affinity"].deployments["PreRanking"].replica_states  # noqa: E731
    for both in (False, True):
        until(lambda both=both: (states().get("RUNNING", 0) == 2) == both, 180)
    for _ in range(20):  # the handle hears of the new replica after Ray says that it runs
        if play(world, handle, again) == 1:
            break
    assert play(world, handle, again) == 1
