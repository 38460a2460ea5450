"""The study's own forms of content similarity: sums over behaviours, or over centroids of them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from aif_jax.blocks import DotProduct
from experiments.study.similarity import TEMPERATURES, KernelSums, Prototypes
from tests import demo


def test_as_many_prototypes_as_events_are_the_events():
    """A centroid for each of 8 events is that event, counted once, so both blocks score alike; padding counts nowhere."""
    rng = np.random.default_rng(0)
    content = rng.normal(size=(8, 5)).astype(np.float32)
    content /= np.linalg.norm(content, axis=1, keepdims=True)
    mask = np.arange(8) < 6
    points, weights = Prototypes(count=8).points(content, mask)
    np.testing.assert_allclose(points[:6], content[:6], atol=1e-6)
    assert weights.tolist() == [1.0] * 6 + [0.0] * 2
    few, counts = Prototypes(count=2).points(content, mask)
    assert counts.sum() == 6 and (counts >= 1).all()
    np.testing.assert_allclose(np.linalg.norm(few, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("form", [KernelSums(), KernelSums(learned=True), Prototypes(count=4, learned=True)])
def test_staged_is_joint_and_sums_are_those_of_the_formula(form):
    model, params = demo.build(blocks=(form, DotProduct()))
    user, items = demo.user(model.config), demo.items(6)
    state, rows = model.user(params, user), jax.vmap(model.item, (None, 0))(params, items)
    np.testing.assert_allclose(model.interaction(params, state, rows), model.joint(params, user, items), atol=1e-5)
    own = state.blocks[form.name]
    if not form.learned:
        np.testing.assert_allclose(own["temperature"], TEMPERATURES)
    kernel = np.eye(len(TEMPERATURES) + 1, dtype=np.float32)
    got = np.asarray(form.score({}, state, rows, {"sums": kernel}).rest)
    content = np.asarray(rows.fitted[form.tables[0].name])
    for i, x in enumerate(content):
        cosine = np.asarray(own["points"]) @ x
        sums = [np.log1p((np.exp((cosine - 1) / t) * own["weights"]).sum()) for t in np.asarray(own["temperature"])]
        mean = (cosine * own["weights"]).sum() / max(float(np.sum(own["weights"])), 1)
        np.testing.assert_allclose(got[i], [*sums, mean], rtol=2e-5, atol=2e-5)
