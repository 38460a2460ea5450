"""Several services in real processes: replicas behind the proxy of the page, which hashes users, and that die by SIGKILL."""

import contextlib
import itertools
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from aif_jax.service.current import publish
from tests import proxies
from tests.client import Client, ServiceError
from tests.conftest import child_environment
from tests.replicas import CALLS, USERS, Replica, World
from tests.service_world import exports, until

pytestmark = pytest.mark.lane("experiments")


@pytest.fixture(autouse=True)
def services_share_what_was_compiled(monkeypatch):
    """Of the processes that a test starts; one that is killed is long done with compiling."""
    for name, value in child_environment().items():
        monkeypatch.setenv(name, value)


def killed_under_load(world: World, victim: Replica, address: str, users: np.ndarray) -> None:
    """Four callers, and a replica that is killed after a third of 148 calls: each is answered, by one version."""
    sent = itertools.count()

    def caller(first: int) -> list[bool]:
        answered = []
        with Client(address) as client:
            for user in np.resize(users[first::4], 37).tolist():
                with contextlib.suppress(OSError, ServiceError):
                    answered.append(world.is_of_one_version(user, client.rank(**world.call(user))))
                if next(sent) == 49:
                    victim.kill()
        return answered

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(caller, range(4)), []) == [True] * 148


@pytest.mark.parametrize("name", ["haproxy", pytest.param("nginx", marks=pytest.mark.lane("reliability"))])
def test_affinity(name, tmp_path):
    """Users find their states as often as is possible, and less often by round robin; nobody sees that a replica dies, comes
    back or follows late.
    """
    with contextlib.ExitStack() as stack:
        proxies.find(name)
        world, replicas = World(), []
        for place in range(3):
            replicas.append(Replica(world.copy(tmp_path / f"replica-{place}")))
            stack.callback(replicas[-1].end)
        for replica in replicas:
            replica.wait()

        def play(order):
            with Client(address) as client:
                found = world.play(lambda fields: client.rank(**fields), order)
            assert found["mixed"] == 0
            return found

        def await_up(wanted):
            if name == "haproxy":
                proxies.await_up(stats, wanted)
            else:
                time.sleep(1.5)  # nginx has no look at its servers from outside; it tries one that failed again after a second

        def publish_second(replica):
            publish(replica.folder, ["two"])
            with Client(replica.address) as client:
                until(lambda: client.rank(**world.call(USERS))["version"] == exports().index["two"].version)

        addresses = [replica.address for replica in replicas]
        order = np.random.default_rng(1).permutation(np.repeat(np.arange(USERS), CALLS))
        ideal, again = 1 - 1 / CALLS, np.arange(USERS, 2 * USERS)
        with proxies.proxy(name, addresses, tmp_path, affinity=False) as (address, stats):
            await_up(3)
            assert play(order)["hit_share"] < ideal - 0.2
        with proxies.proxy(name, addresses, tmp_path) as (address, stats):
            await_up(3)
            assert play(USERS + order)["hit_share"] > ideal - 0.02

            killed_under_load(world, replicas[1], address, again)
            if name == "haproxy":
                await_up(2)  # until then the dead one's users are where it sends them again, later where they stay
            play(again)
            assert play(again)["hit_share"] == 1

            replicas[1].start().wait()
            await_up(3)
            play(again)
            assert play(again)["hit_share"] == 1

            for replica in replicas[:2]:
                publish_second(replica)
            assert play(again)["versions"] == 2
            publish_second(replicas[2])
            play(again)
            assert play(again) == {"hit_share": 1, "versions": 1, "mixed": 0}


def test_the_files_of_both_proxies_are_what_runs():
    """What the tests run is the text of docs/deploy, with its addresses exchanged and nothing else."""
    for name in ("haproxy", "nginx"):
        text = proxies.proxy_config(name, ["http://127.0.0.1:1", "http://127.0.0.1:2"], port=3, stats=4)
        assert "127.0.0.1:1" in text and "127.0.0.1:2" in text and "replica-1:8080" not in text
        kept = [line for line in proxies.proxy_text(name).splitlines() if not re.search(r":\d|listen", line)]
        assert len(kept) > 10 and [line for line in kept if line not in text] == []
