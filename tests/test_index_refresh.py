"""`experiments/index_refresh.py` runs from end to end and writes the figures that it promises."""

import json

import pytest

pytestmark = pytest.mark.usefixtures("light_compilation")


def test_smoke(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra 'experiments' is not installed")
    from experiments import index_refresh

    index_refresh.main(["--smoke", "--json", str(tmp_path / "figures.json"), "--figures", str(tmp_path)])
    figures = json.loads((tmp_path / "figures.json").read_text())
    for name in (
        "build_items_per_s", "bare_items_per_s", "build_over_bare", "freshness_p50_ms", "freshness_p99_ms",
        "request_p99_ratio_under_updates",
    ):  # fmt: skip
        assert figures[name] > 0, name
    for name in ("upsert_1000_ms", "lookup_10k_ms"):
        assert set(figures[name]) == {"2000", "8000"} and min(figures[name].values()) > 0
    assert figures["freshness_p50_ms"] <= figures["freshness_p99_ms"]
    rows = figures["bytes_per_row"]
    assert rows["int8"] < rows["bfloat16"] < rows["float32"]
    assert figures["score_error_over_std"]["float32"] == 0 < figures["score_error_over_std"]["bfloat16"]
    assert (tmp_path / "index_refresh.png").stat().st_size > 1000
    assert "build_over_bare" in capsys.readouterr().out
