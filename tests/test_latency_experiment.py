"""`experiments/latency.py` runs from end to end and writes the figures that it promises."""

import json

import pytest

pytestmark = pytest.mark.usefixtures("light_compilation")
SERVICES = {"aif", "sequential", "exact", "two_tower", "cold"}


def test_smoke(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra 'experiments' is not installed")
    from experiments import latency

    latency.main(["--smoke", "--json", str(tmp_path / "latency.json"), "--figures", str(tmp_path)])
    figures = json.loads((tmp_path / "latency.json").read_text())
    assert set(figures["critical_p50_ms"]) == set(figures["critical_p99_ms"]) == SERVICES
    assert all(value > 0 for value in figures["critical_p50_ms"].values())
    ratio = figures["critical_p50_ms"]["sequential"] / figures["critical_p50_ms"]["aif"]
    assert figures["critical_ratio_sequential_over_aif"] == pytest.approx(ratio)
    for name in (
        "critical_ratio_exact_over_aif", "critical_ratio_aif_over_two_tower", "engine_overhead_ms", "max_rps_aif",
        "max_rps_sequential", "critical_ms_by_history", "goodput_at_twice_over_max",
    ):  # fmt: skip
        assert name in figures
    assert set(figures["critical_ms_by_history"]) == {"64"}
    assert figures["machine"]["device"]
    for picture in ("timeline", "latency_by_history", "latency_by_load"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 1000
    assert "critical path" in capsys.readouterr().out
