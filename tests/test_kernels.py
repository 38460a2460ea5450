"""The kernel benchmark runs at smoke size and writes the figures that its issue names."""

import json
import math

from experiments import kernels

KEYS = ("din_linear", "din_direct", "din_softmax", "simtier", "simtier_naive", "simtier_codes", "interaction", "head_only")


def test_smoke(tmp_path):
    kernels.main(["--smoke", "--json", str(tmp_path / "figures.json"), "--plot", str(tmp_path / "kernels.png")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    for key in (*KEYS, "numpy_hamming"):
        assert list(figures[f"{key}_ms"]) == ["40,64"]
        assert all(math.isfinite(x) and x > 0 for x in figures[f"{key}_ms"].values()), key
    assert figures["rates"]["popcounts_per_second"] > 0
    assert (tmp_path / "kernels.png").stat().st_size > 10_000
