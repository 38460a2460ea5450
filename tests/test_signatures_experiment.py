"""The studies of signatures and codes: their measures by hand, and smoke runs."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from aif_jax.blocks.signatures import signs
from experiments import signatures

pytestmark = pytest.mark.usefixtures("light_compilation")


def test_rank_correlation_by_hand():
    assert signatures.rank_correlation(np.array([1, 2, 3, 4]), np.array([10, 20, 30, 90])) == 1
    np.testing.assert_allclose(signatures.rank_correlation(np.array([1, 2, 3]), np.array([3, 2, 1])), -1)
    np.testing.assert_allclose(signatures.rank_correlation(np.array([1, 1, 2]), np.array([1, 2, 3])), 3**0.5 / 2)
    assert signatures.rank_correlation(np.array([1, 1, 1]), np.array([1, 2, 3])) == 0


def test_smoke(tmp_path):
    signatures.main(["--smoke", "--part", "projections", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())["agreement"]
    assert {"random K=64", "rotated K=64", "itq K=64", "itq at the origin K=64"} <= set(figures)
    assert figures["random K=64"]["top"] > figures["random K=32"]["top"] > 0.5
    assert 0 < figures["random K=64"]["histogram"] < 1


def test_codes_smoke(tmp_path):
    """Codes that cover the catalogue give the histogram itself; fewer lose some of it."""
    signatures.main(["--smoke", "--part", "codes", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())["codes"]
    covered, few = figures["R=1024 J=1"], figures["R=16 J=1"]
    np.testing.assert_allclose(covered["float"], 1)
    assert covered["error"] < 1e-3 < few["error"] and few["float"] < 0.95
    assert covered["state"] == 1024 * 8 * 4 / 1024 and covered["table ms"] > 0
    assert covered["float"] > figures["signatures"]["float"] > 0.5 and set(figures["moments"]) >= {"float", "top"}


def test_moments_are_the_mean_and_deviation_of_the_similarity():
    rng = np.random.default_rng(0)
    item, past = (rng.integers(0, 2**32, (n, 2), dtype=np.uint32) for n in (5, 30))
    mask = np.arange(30) < 20
    share = 1 - np.bitwise_count(item[:, None] ^ past[None, :20]).sum(-1) / 64
    mean, deviation = signatures.spread(signs(jnp.asarray(item)), *signatures.moments(jnp.asarray(past), jnp.asarray(mask)))
    np.testing.assert_allclose(mean, share.mean(1), rtol=1e-5)
    np.testing.assert_allclose(deviation, share.std(1), rtol=1e-4)
