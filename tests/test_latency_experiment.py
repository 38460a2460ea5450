"""`experiments/latency.py` and `experiments/cost.py` run from end to end and write the figures that they promise."""

import json

import numpy as np
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
    assert "critical_p50_ms" in capsys.readouterr().out


def test_cost_smoke(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra 'experiments' is not installed")
    from experiments import cost

    cost.main(["--smoke", "--json", str(tmp_path / "cost.json"), "--figure", str(tmp_path / "cost.png")])
    figures = json.loads((tmp_path / "cost.json").read_text())
    for key in ("cpu_ms", "max_rps", "critical_p50_ms"):
        assert set(figures[key]) == SERVICES | {"streaming"}
        assert all(set(kinds) == set(cost.KINDS) for kinds in figures[key].values())
    assert all(value > 0 for kinds in figures["cpu_ms"].values() for value in kinds.values())
    ratios = [key for key in figures if "_ratio_" in key]
    assert len(ratios) == 4
    for key in ("floor_cpu_ms", "engine_over_floor", *ratios):
        assert set(figures[key]) == set(cost.KINDS)
    ratio = figures["cpu_ms"]["aif"]["new"] / figures["floor_cpu_ms"]["new"]
    assert figures["engine_over_floor"]["new"] == pytest.approx(ratio)
    assert set(figures["overhead_p50_ms"]) == {"after_wait", "back_to_back"}
    assert figures["score_over_head"] > 0 and figures["score_10000_over_head"] > 0 and figures["score_in_halves"] > 0
    assert figures["score_10000_in_halves"] > 0 and figures["halves_difference"] < 1e-4 and figures["halves_same_places"] > 0.9
    assert (tmp_path / "cost.png").stat().st_size > 1000
    assert "cpu_ratio_sequential_over_aif" in capsys.readouterr().out


def test_cost_parses_only_sensible_sizes(capsys):
    from experiments import cost

    for wrong in (["--concurrency"], ["--concurrency", "0"], ["--rounds", "0"]):
        with pytest.raises(SystemExit):
            cost.parse(wrong)
    assert "expected" in capsys.readouterr().err


PROGRAMS = {"user", "score", "whole", "score_10000", "whole_10000"}


def test_runtimes_smoke(tmp_path, capsys):
    pytest.importorskip("torch", reason="the extra 'benchmarks' is not installed")
    for name in ("onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="the extra 'benchmarks' is not installed")
    from experiments import runtimes

    runtimes.main(["--smoke", "--json", str(tmp_path / "runtimes.json")])
    figures = json.loads((tmp_path / "runtimes.json").read_text())
    times = figures["runtime_ms"]
    assert set(times) == {"aif_jax", "torch", "onnxruntime"} and all(set(ms) == PROGRAMS for ms in times.values())
    for name in ("torch", "onnxruntime"):
        assert figures[f"over_{name}"] == pytest.approx({what: times[name][what] / times["aif_jax"][what] for what in PROGRAMS})
    assert figures["score_over_head"] == pytest.approx(times["aif_jax"]["score"] / figures["head_ms"][""])
    assert "over_onnxruntime" in capsys.readouterr().out


def test_runtimes_refuse_another_network(capsys):
    from experiments import runtimes

    ours = np.array([2.0, 1.0], np.float32), np.array([0, 1])
    runtimes.check("torch", ours, ours)
    with pytest.raises(SystemExit, match="torch: expected the logits of ours, got some that differ by 1.0e-03"):
        runtimes.check("torch", ours, (ours[0] + np.float32(1e-3), ours[1]))


def test_a_runtime_that_is_not_installed_is_left_out(monkeypatch, capsys):
    from experiments import runtimes

    monkeypatch.setattr(runtimes, "NEEDED", {"torch": ("no_such_package",)})
    figures = runtimes.measure(rounds=1, smoke=True)
    assert set(figures["runtime_ms"]) == {"aif_jax"} and not any(name.startswith("over_") for name in figures)
    assert "torch: left out, no_such_package not installed" in capsys.readouterr().out
