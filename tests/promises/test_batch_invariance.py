"""Promise: a score depends on that user and that item only. Permuting, splitting or padding candidates changes nothing."""

import jax
import numpy as np
import pytest

from tests import demo, light


@pytest.fixture(params=list(demo.VARIANTS), scope="module")
def staged(request):
    model, params = demo.build(**demo.VARIANTS[request.param])
    user, items = demo.user(model.config), demo.items(60)
    state = jax.jit(model.user).lower(params, user).compile(light.options())(params, user)
    rows = jax.jit(jax.vmap(model.item, (None, 0))).lower(params, items).compile(light.options())(params, items)
    score = jax.jit(lambda rows: model.interaction(params, state, rows))
    return score, rows, np.asarray(score(rows))


def test_permuting_splitting_and_padding_candidates(staged):
    score, rows, scores = staged
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_allclose(score(demo.part(rows, order)), scores[order], atol=1e-6)
    parts = [score(demo.part(rows, slice(*cut))) for cut in ((0, 1), (1, 20), (20, 60))]
    np.testing.assert_allclose(np.concatenate(parts), scores, atol=1e-6)
    padded = demo.part(rows, np.concatenate([np.arange(60), np.zeros(36, int)]))
    np.testing.assert_allclose(score(padded)[:60], scores, atol=1e-6)


@pytest.mark.parametrize("name", demo.VARIANTS)
def test_other_users_of_a_batch(name):
    model, params = demo.build(**demo.VARIANTS[name])
    users = [demo.user(model.config, events=n, seed=n) for n in (0, 7, 24)]
    items = demo.items(5)
    joint = jax.jit(model.joint)
    together = jax.jit(jax.vmap(model.joint, (None, 0, None)))(params, jax.tree.map(lambda *x: np.stack(x), *users), items)
    for features, scores in zip(users, together, strict=True):
        np.testing.assert_allclose(joint(params, features, items), scores, atol=1e-5)
