"""Several services in real processes: replicas behind the proxy of the page."""

import re

import pytest

from tests import affinity, proxies
from tests.conftest import child_environment
from tests.light import flags


@pytest.fixture(autouse=True)
def services_share_what_was_compiled(monkeypatch):
    """Of the processes that a test starts; one that is killed is long done with compiling."""
    for name, value in child_environment(flags=flags()).items():
        monkeypatch.setenv(name, value)


def installed(name: proxies.Proxy) -> proxies.Proxy:
    try:
        proxies.find(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return name


@pytest.mark.parametrize("name", ["haproxy", pytest.param("nginx", marks=pytest.mark.reliability)])
def test_affinity(name):
    """Users find their states as often as is possible, and less often by round robin; nobody sees that a replica dies, comes
    back or follows late.
    """
    got = affinity.measure(installed(name))
    assert got["affinity_hit_share_gap"] < 2 and got["round_robin_hit_share"] < got["ideal_hit_share"] - 0.2
    assert got["mixed_answers"] == got["death_failed"] == 0 and got["death_calls"] > 100
    for after in ("death", "return", "publish"):
        assert got[f"hit_share_after_{after}"] == 1, after
    assert (got["versions_while_one_lags"], got["versions_after_publish"]) == (2, 1)


def test_the_files_of_both_proxies_are_what_runs():
    """What the tests run is the text of docs/deploy, with its addresses exchanged and nothing else."""
    for name in ("haproxy", "nginx"):
        text = proxies.proxy_config(name, ["http://127.0.0.1:1", "http://127.0.0.1:2"], port=3, stats=4)
        assert "127.0.0.1:1" in text and "127.0.0.1:2" in text and "replica-1:8080" not in text
        kept = [line for line in proxies.proxy_text(name).splitlines() if not re.search(r":\d|listen", line)]
        assert len(kept) > 10 and [line for line in kept if line not in text] == []
