"""The signature study: its measures by hand, and a smoke run."""

import json

import numpy as np

from experiments import signatures


def test_rank_correlation_by_hand():
    assert signatures.rank_correlation(np.array([1, 2, 3, 4]), np.array([10, 20, 30, 90])) == 1
    np.testing.assert_allclose(signatures.rank_correlation(np.array([1, 2, 3]), np.array([3, 2, 1])), -1)
    np.testing.assert_allclose(signatures.rank_correlation(np.array([1, 1, 2]), np.array([1, 2, 3])), 3**0.5 / 2)
    assert signatures.rank_correlation(np.array([1, 1, 1]), np.array([1, 2, 3])) == 0


def test_smoke(tmp_path):
    signatures.main(["--smoke", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())["agreement"]
    assert {"random K=64", "rotated K=64", "itq K=64", "codes by bits R=16", "codes by cosine R=64"} <= set(figures)
    assert figures["random K=64"]["top"] > figures["random K=32"]["top"] > 0.5
    assert figures["codes by cosine R=64"]["histogram"] < figures["codes by cosine R=16"]["histogram"]
