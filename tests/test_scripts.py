"""Experiments that run within this process at `--smoke` size, the figures that each promises, and their own arithmetic."""

import importlib
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import kernels
from tests.conftest import child_environment
from tests.light import flags

pytestmark = pytest.mark.lane("experiments")


def measured(folder: Path, name: str, *words: str, needs: tuple[str, ...] = ()) -> dict:
    """The figures that a script writes, where all that it needs is installed."""
    for package in needs:
        pytest.importorskip(package, reason="the extra 'experiments' or 'benchmarks' is not installed")
    importlib.import_module(name).main(["--smoke", "--json", str(folder / "figures.json"), *words])
    return json.loads((folder / "figures.json").read_text())


def test_kernels(tmp_path):
    figures = measured(tmp_path, "experiments.kernels")
    names = "din_linear", "simtier", "interaction", "interaction_exact", "head_only"
    for key in names:
        assert list(figures[f"{key}_ms"]) == ["40,64"]
        assert all(math.isfinite(x) and x > 0 for x in figures[f"{key}_ms"].values()), key
    assert figures["interaction_longest_over_shortest"] == {"40": 1.0}  # one length


def test_nothing_of_the_size_of_the_history_reaches_the_interaction():
    """Inputs of every form that is timed as flat in L have the same shapes at any L."""
    short, long = (kernels.fixed_forms(5, n) for n in (64, 96))
    for name, form in short.items():
        shapes = [[x.shape for x in jax.tree.leaves(made.args)] for made in (form, long[name])]
        assert shapes[0] == shapes[1], name


def test_index_refresh(tmp_path, capsys):
    figures = measured(tmp_path, "experiments.index_refresh")
    for name in ("build_items_per_s", "bare_items_per_s", "build_over_bare", "freshness_p50_ms", "freshness_p99_ms"):
        assert figures[name] > 0, name
    for name in ("upsert_1000_ms", "lookup_10k_ms"):
        assert set(figures[name]) == {"2000", "8000"} and min(figures[name].values()) > 0
    assert figures["freshness_p50_ms"] <= figures["freshness_p99_ms"]
    rows = figures["bytes_per_row"]
    assert rows["int8"] < rows["bfloat16"] < rows["float32"]
    assert "build_over_bare" in capsys.readouterr().out


SERVICES = {"aif", "sequential", "exact", "matching", "two_tower"}


def test_cost(tmp_path, monkeypatch, capsys):
    from experiments import cost

    for name, value in child_environment(flags=flags()).items():  # of the process of the empty engine
        monkeypatch.setenv(name, value)
    found = measured(tmp_path, "experiments.cost")
    assert list(found) == ["C=60, L=64", "empty_engine_requests_per_second", "machine"]
    assert found["empty_engine_requests_per_second"] > 0
    figures = found["C=60, L=64"]
    for key in ("cpu_ms", "max_rps", "lone_p50_ms", "lone_p99_ms", "critical_p50_ms", "critical_p99_ms"):
        assert set(figures[key]) == SERVICES
        assert all(set(kinds) == set(cost.KINDS) for kinds in figures[key].values())
    assert all(value > 0 for kinds in figures["cpu_ms"].values() for value in kinds.values())
    ratios = [key for key in figures if "_ratio_" in key]
    assert len(ratios) == 2
    for key in ("floor_cpu_ms", "engine_over_floor", *ratios):
        assert set(figures[key]) == set(cost.KINDS)
    ratio = figures["cpu_ms"]["aif"]["new"] / figures["floor_cpu_ms"]["new"]
    assert figures["engine_over_floor"]["new"] == pytest.approx(ratio)
    assert set(figures["overhead_p50_ms"]) == {"after_wait", "back_to_back"}
    assert all(figures["critical_p50_ms"][name]["new"] < figures["lone_p50_ms"][name]["new"] for name in SERVICES)
    assert "cpu_ratio_sequential_over_aif" in capsys.readouterr().out


def test_runtimes(tmp_path, capsys):
    figures = measured(tmp_path, "experiments.runtimes", needs=("torch", "onnxscript", "onnxruntime"))
    programs, times = {"user", "score", "whole", "score_10000", "whole_10000"}, figures["runtime_ms"]
    assert set(times) == {"aif_jax", "torch", "onnxruntime"} and all(set(ms) == programs for ms in times.values())
    for name in ("torch", "onnxruntime"):
        assert figures[f"over_{name}"] == pytest.approx({what: times[name][what] / times["aif_jax"][what] for what in programs})
    assert figures["score_over_head"] == pytest.approx(times["aif_jax"]["score"] / figures["head_ms"][""])
    ours_alone = ("over_bfloat16", "over_int8")
    assert all(figures[f"{score}_{name}"] > 0 for score in ("score", "score_10000") for name in ours_alone)
    assert "over_onnxruntime" in capsys.readouterr().out


def test_storage(tmp_path, capsys):
    from experiments.study import datasets, question, storage

    figures = measured(tmp_path, "experiments.study.storage", "--work", str(tmp_path / "work"))["smoke"]
    for narrow in ("bfloat16", "int8"):
        assert all(low <= value <= high for value, low, high in figures[narrow].values())
    data, trial = datasets.load("smoke"), question.Trial(dataset="smoke", model=question.AIF)
    model, params, _ = question.trained(trial, question.parts_of(trial, data)[0], data, work=tmp_path / "work", progress=False)
    one = jax.tree.map(lambda leaf: leaf[1], data.dataset.catalogue.features(np.arange(2)))
    exact, rounded = (np.asarray(each.item(params, one).vector) for each in (model, storage.stored(model.config, "int8")))
    assert 0 < np.abs(rounded - exact).max() < 0.01 * np.abs(exact).max()


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


@pytest.mark.timeout(900)
def test_service_load(tmp_path, monkeypatch, capsys):
    for name, value in child_environment(flags=flags()).items():  # of the services, which share what is compiled
        monkeypatch.setenv(name, value)
    figures = measured(tmp_path, "experiments.service_load")
    names = {"http_overhead_p50_ms", "http_rps_share", "http_service_cpu_ms", "http_client_cpu_ms", "engine_cpu_ms"}
    assert names <= figures.keys() and names <= set(capsys.readouterr().out.split())
    assert figures["http_rps_share"] > 0


def test_train_throughput(tmp_path):
    figures = measured(tmp_path, "experiments.train_throughput")
    assert set(figures["step_ms_by_history"]) == {"16", "32"}
    times = figures["step_ms_by_table_rows"]
    assert figures["step_ratio_1e7_over_1e4"] == pytest.approx(list(times.values())[-1] / list(times.values())[0])
