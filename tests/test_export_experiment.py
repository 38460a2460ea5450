"""The export script at smoke size writes a folder that verifies and every figure that it promises."""

import json

from aif_jax import export
from experiments import export_checkpoint


def test_export_checkpoint(tmp_path):
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    export_checkpoint.main(["--smoke", "--out", str(out), "--json", str(figures)])
    got = json.loads(figures.read_text())
    files = [path for path in out.iterdir() if path.is_file()]  # a consumer may have left a __pycache__ there
    assert got["artifact_bytes"] == sum(path.stat().st_size for path in files)
    assert 0 <= got["max_abs_diff"] < 1e-5
    for name in ("load_s", "first_call_s", "warm_interaction_ms_exported", "warm_interaction_ms_python"):
        assert got[name] > 0, name
    assert "onnx_interaction_ms" in got
    assert export.load(out).version
