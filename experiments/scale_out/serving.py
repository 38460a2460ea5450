"""Replicas behind a consistent hash: do states hit, what is a hop?

Processes are real: `aif-jax serve`, and the proxy of docs/deploy. They die by SIGKILL.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from aif_jax.service.models import publish
from experiments import common
from experiments.client import Client, ServiceError
from experiments.scale_out.replicas import NAMES, Proxy, Replica, World, await_up, counters, proxy

CALLS = 4  # of a user, so that all but a quarter can find a state


def measure_affinity(smoke: bool, name: Proxy = "haproxy") -> dict[str, Any]:
    """Three replicas behind a proxy, by round robin and by the user's hash; one dies under load, comes back, follows late.

    Returns:
      `affinity_hit_share_gap`: points that the share of calls whose state was cached is below the ideal, every call but the
      first of a user, with the consistent hash; hit shares of both ways in [0, 1], after the death, the return and the publish
      too; calls while a replica died, how many failed, how many were sent again and by whom; answers that mix versions over all
      of it; milliseconds that the proxy adds to a call.

    Raises FileNotFoundError where the proxy is not installed.
    """
    users = 24 if smoke else 200
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        folder = Path(root)
        world = World(
            folder / "models", users=2 * users, **({} if smoke else {"items": 20_000, "candidates": 1000, "small": False})
        )
        folders = [world.copy(folder / f"replica-{place}") for place in range(3)]
        replicas = _started(stack, folders, buckets=(world.count,) if not smoke else (64,))
        addresses = [replica.address for replica in replicas]
        order = np.random.default_rng(1).permutation(np.repeat(np.arange(users), CALLS))
        figures: dict[str, Any] = {"proxy": name, "ideal_hit_share": 1 - 1 / CALLS}
        with proxy(name, addresses, folder, affinity=False) as (address, stats):
            _await(name, stats, 3)
            played = _play(world, address, order)
        figures["round_robin_hit_share"], mixed = played["hit_share"], played["mixed"]
        with proxy(name, addresses, folder) as (address, stats):
            _await(name, stats, 3)
            played = _play(world, address, users + order)
            mixed += played["mixed"]
            figures["affinity_hit_share"] = played["hit_share"]
            figures["affinity_hit_share_gap"] = 100 * (figures["ideal_hit_share"] - played["hit_share"])
            figures |= _hop(world, addresses, address, 20 if smoke else 300)

            again = np.arange(users, 2 * users)
            tally = _death(world, replicas[1], address, again, calls=150 if smoke else 3000)
            if name == "haproxy":
                figures["death_sent_again_by_proxy"] = counters(stats)["BACKEND"]["wredis"]
            figures |= {f"death_{key}": tally[key] for key in ("calls", "failed", "sent_again_by_client")}
            mixed += tally["mixed"]
            if name == "haproxy":
                await_up(stats, 2)  # until then the dead one's users are where it sends them again, later where they stay
            mixed += _play(world, address, again)["mixed"]
            played = _play(world, address, again)
            figures["hit_share_after_death"], mixed = played["hit_share"], mixed + played["mixed"]

            replicas[1].start().wait()
            _await(name, stats, 3)
            mixed += _play(world, address, again)["mixed"]
            played = _play(world, address, again)
            figures["hit_share_after_return"], mixed = played["hit_share"], mixed + played["mixed"]

            for each in folders[:2]:
                publish(each, NAMES[1:])
            _await_versions(replicas[:2], world, again[0], list(world.logits)[1])
            played = _play(world, address, again)
            figures["versions_while_one_lags"], mixed = played["versions"], mixed + played["mixed"]
            publish(folders[2], NAMES[1:])
            _await_versions(replicas[2:], world, again[0], list(world.logits)[1])
            mixed += _play(world, address, again)["mixed"]
            played = _play(world, address, again)
            figures["hit_share_after_publish"], mixed = played["hit_share"], mixed + played["mixed"]
            figures["versions_after_publish"] = played["versions"]
        return figures | {"mixed_answers": mixed}


def _started(stack: contextlib.ExitStack, folders: Sequence[Path], **options: Any) -> list[Replica]:
    """Replicas that are ready, and end with the stack."""
    replicas = []
    for folder in folders:
        replicas.append(Replica(folder, **options))
        stack.callback(replicas[-1].stop)
    return [replica.wait() for replica in replicas]


def play(world: World, ask: Callable[[dict[str, Any]], dict[str, Any]], order: np.ndarray) -> dict[str, Any]:
    """Calls one after another: the share whose state was cached, the versions that answered, answers that mix them, the p50."""
    hits = mixed = 0
    versions, seconds = set(), []
    for user in order.tolist():
        fields = world.call(user)
        start = time.perf_counter()
        answer = ask(fields)
        seconds.append(time.perf_counter() - start)
        hits += "user" not in answer["stages"]
        versions.add(answer["version"])
        mixed += not world.is_of_one_version(user, answer)
    p50 = 1e3 * float(np.median(seconds))
    return {"hit_share": hits / len(order), "versions": len(versions), "mixed": mixed, "p50_ms": p50}


def _play(world: World, address: str, order: np.ndarray) -> dict[str, Any]:
    with Client(address) as client:
        return play(world, lambda fields: client.rank(**fields), order)


def _death(world: World, victim: Replica, address: str, users: np.ndarray, *, calls: int) -> Counter[str]:
    """Four callers, and a replica that is killed after a third of the calls."""
    sent = itertools.count()

    def caller(first: int) -> Counter[str]:
        tally = Counter(calls=0, failed=0, mixed=0, sent_again_by_client=0)
        with Client(address) as client:
            for turn in range(calls // 4):
                user = int(users[(first + 4 * turn) % len(users)])
                tally["calls"] += 1
                try:
                    tally["mixed"] += not world.is_of_one_version(user, client.rank(**world.call(user)))
                except (OSError, ServiceError):
                    tally["failed"] += 1
                if next(sent) == calls // 3:
                    victim.kill()
            tally["sent_again_by_client"] = client.retried
        return tally

    with ThreadPoolExecutor(4) as threads:
        return sum(threads.map(caller, range(4)), Counter())


def _hop(world: World, addresses: Sequence[str], address: str, rounds: int) -> dict[str, float]:
    """Milliseconds of a call with a cached state, straight to a replica and through the proxy, interleaved."""
    with Client(addresses[0]) as straight, Client(address) as through:
        for client in (straight, through):
            client.rank(**world.call(0))
        ways = {"direct": straight.rank, "proxied": through.rank}
        times = common.interleaved({way: _timed(world, ask, 5, users=1) for way, ask in ways.items()}, rounds)
    medians = {f"{way}_call_p50_ms": float(np.median(values)) for way, values in times.items()}
    return medians | {"proxy_hop_p50_ms": medians["proxied_call_p50_ms"] - medians["direct_call_p50_ms"]}


def _timed(world: World, ask: Callable[..., Any], k: int, *, users: int | None = None) -> Callable[[int], float]:
    """Milliseconds of the call of one user after another."""
    users = users or len(world.users)

    def run(turn: int) -> float:
        call = world.call(turn % users, k=k)
        start = time.perf_counter()
        ask(**call)
        return 1e3 * (time.perf_counter() - start)

    return run


def _await(name: Proxy, stats: str, wanted: int) -> None:
    if name == "haproxy":
        await_up(stats, wanted)
    else:
        time.sleep(1.5)  # nginx has no look at its servers from outside; it tries one that failed again after a second


def _await_versions(replicas: Sequence[Replica], world: World, user: int, version: str) -> None:
    """Waits until replicas answer with a version, with a user's cached state or without."""
    until = time.monotonic() + 120
    for replica in replicas:
        with Client(replica.address) as client:
            while client.rank(**world.call(int(user)))["version"] != version:
                if time.monotonic() > until:
                    raise RuntimeError(f"{replica.address}: expected version {version[:12]}")
                time.sleep(0.05)
