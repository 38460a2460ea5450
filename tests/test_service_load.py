"""The experiment `service_load` runs and writes the figures of its claim."""

from __future__ import annotations

import json

import pytest

from experiments import service_load
from tests.conftest import child_environment
from tests.light import flags

pytest.importorskip("grpc", reason="needs the extra 'grpc'")


@pytest.mark.timeout(900)
def test_smoke(tmp_path, monkeypatch, capsys):
    for name, value in child_environment(flags=flags()).items():  # of the services, which share what is compiled
        monkeypatch.setenv(name, value)
    service_load.main(["--smoke", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    names = {
        "http_overhead_p50_ms", "grpc_overhead_p50_ms", "http_rps_share", "grpc_rps_share", "publish_failed", "publish_mixed",
        "workers_scaling", "workers_ceiling", "workers_and_cores_scaling", "http_service_cpu_ms", "grpc_client_cpu_ms",
        "engine_cpu_ms", "soak_growth_mb", "soak_mb_a_minute",
    }  # fmt: skip
    assert names <= figures.keys() and names - {"soak_growth_mb"} <= set(capsys.readouterr().out.split())
    assert figures["publish_failed"] == figures["publish_mixed"] == 0 and figures["publish_calls"] > 0
    assert figures["http_rps_share"] > 0 and figures["grpc_rps_share"] > 0 and figures["workers_scaling"] > 0
