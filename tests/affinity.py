"""Replicas behind a proxy that hashes users: real processes of `aif-jax serve` that die by SIGKILL."""

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

from aif_jax.service.current import publish
from tests.client import Client, ServiceError
from tests.proxies import Proxy, await_up, proxy
from tests.replicas import NAMES, Replica, World

CALLS, USERS = 4, 24
"""Calls of a user, so that all but a quarter can find a state, and users."""


def measure(name: Proxy) -> dict[str, Any]:
    """Three replicas behind a proxy, by round robin and by the user's hash; one dies under load, comes back, follows late.

    Returns:
      `affinity_hit_share_gap`: points that the share of calls whose state was cached is below the ideal, every call but the
      first of a user, with the consistent hash; hit shares of both ways in [0, 1], after the death, the return and the publish
      too; calls while a replica died and how many of them failed; answers that mix versions over all of it.

    Raises FileNotFoundError where the proxy is not installed.
    """
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        folder = Path(root)
        world = World(folder / "models", users=2 * USERS)
        folders = [world.copy(folder / f"replica-{place}") for place in range(3)]
        replicas = _started(stack, folders)
        addresses = [replica.address for replica in replicas]
        order = np.random.default_rng(1).permutation(np.repeat(np.arange(USERS), CALLS))
        figures: dict[str, Any] = {"ideal_hit_share": 1 - 1 / CALLS}
        with proxy(name, addresses, folder, affinity=False) as (address, stats):
            _await(name, stats, 3)
            played = _play(world, address, order)
        figures["round_robin_hit_share"], mixed = played["hit_share"], played["mixed"]
        with proxy(name, addresses, folder) as (address, stats):
            _await(name, stats, 3)
            played = _play(world, address, USERS + order)
            mixed += played["mixed"]
            figures["affinity_hit_share_gap"] = 100 * (figures["ideal_hit_share"] - played["hit_share"])

            again = np.arange(USERS, 2 * USERS)
            tally = _death(world, replicas[1], address, again, calls=150)
            figures |= {f"death_{key}": tally[key] for key in ("calls", "failed")}
            mixed += tally["mixed"]
            if name == "haproxy":
                await_up(stats, 2)  # until then the dead one's users are where it sends them again, later where they stay

            def settled(event: str) -> dict[str, Any]:
                nonlocal mixed
                mixed += _play(world, address, again)["mixed"]
                played = _play(world, address, again)
                figures[f"hit_share_after_{event}"] = played["hit_share"]
                mixed += played["mixed"]
                return played

            settled("death")
            replicas[1].start().wait()
            _await(name, stats, 3)
            settled("return")

            for each in folders[:2]:
                publish(each, NAMES[1:])
            _await_versions(replicas[:2], world, again[0], list(world.logits)[1])
            played = _play(world, address, again)
            figures["versions_while_one_lags"], mixed = played["versions"], mixed + played["mixed"]
            publish(folders[2], NAMES[1:])
            _await_versions(replicas[2:], world, again[0], list(world.logits)[1])
            figures["versions_after_publish"] = settled("publish")["versions"]
        return figures | {"mixed_answers": mixed}


def _started(stack: contextlib.ExitStack, folders: Sequence[Path]) -> list[Replica]:
    """Replicas that are ready, and end with the stack."""
    replicas = []
    for folder in folders:
        replicas.append(Replica(folder))
        stack.callback(replicas[-1].stop)
    return [replica.wait() for replica in replicas]


def play(world: World, ask: Callable[[dict[str, Any]], dict[str, Any]], order: np.ndarray) -> dict[str, Any]:
    """Calls one after another: the share whose state was cached, how many versions answered, answers that mix them."""
    hits = mixed = 0
    versions = set()
    for user in order.tolist():
        answer = ask(world.call(user))
        hits += "user" not in answer["stages"]
        versions.add(answer["version"])
        mixed += not world.is_of_one_version(user, answer)
    return {"hit_share": hits / len(order), "versions": len(versions), "mixed": mixed}


def _play(world: World, address: str, order: np.ndarray) -> dict[str, Any]:
    with Client(address) as client:
        return play(world, lambda fields: client.rank(**fields), order)


def _death(world: World, victim: Replica, address: str, users: np.ndarray, *, calls: int) -> Counter[str]:
    """Four callers, and a replica that is killed after a third of the calls."""
    sent = itertools.count()

    def caller(first: int) -> Counter[str]:
        tally = Counter(calls=0, failed=0, mixed=0)
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
        return tally

    with ThreadPoolExecutor(4) as threads:
        return sum(threads.map(caller, range(4)), Counter())


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
