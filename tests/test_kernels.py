"""The kernel benchmark runs at smoke size and writes the figures that its issue names."""

import json
import math

import jax
import pytest

from experiments import kernels

pytestmark = pytest.mark.usefixtures("light_compilation")
KEYS = ("din_linear", "din_direct", "din_softmax", "simtier", "simtier_naive", "simtier_codes", "interaction", "head_only")


def test_smoke(tmp_path):
    kernels.main(["--smoke", "--json", str(tmp_path / "figures.json"), "--plot", str(tmp_path / "kernels.png")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    for key in (*KEYS, "numpy_hamming"):
        assert list(figures[f"{key}_ms"]) == ["40,64"]
        assert all(math.isfinite(x) and x > 0 for x in figures[f"{key}_ms"].values()), key
    assert all(rate > 0 for rate in figures["rates"].values()) and "multiply_adds_per_second" in figures["rates"]
    for name in kernels.BOUNDED:
        assert 0 < figures[f"{name}_bound_ms"]["40,64"] < math.inf
    assert figures["interaction_longest_over_shortest"] == {"40": 1.0}  # one length
    assert 0 < figures["simtier_extra_mib"]["40,64"] < 1
    assert (tmp_path / "kernels.png").stat().st_size > 10_000


def test_nothing_of_the_size_of_the_history_reaches_the_interaction_by_codes():
    """Inputs of every form that is timed as flat in L have the same shapes at any L."""
    short, long = (kernels.fixed_forms(5, n, 64) for n in (64, 96))
    for name, (_, inputs) in short.items():
        shapes = [[x.shape for x in jax.tree.leaves(made)] for made in (inputs, long[name][1])]
        assert shapes[0] == shapes[1], name
