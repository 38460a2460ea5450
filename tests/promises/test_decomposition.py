"""Promise: staged == joint: three functions compiled apart give what the composition gives; a score depends on that user and
that item only.
"""

from functools import partial

import jax
import numpy as np
import pytest

from tests import demo, light

CANDIDATES = (0, 1, 5, 40)


@pytest.mark.parametrize("name", demo.VARIANTS)
def test_staged_equals_joint(name):
    model, params = demo.build(**demo.VARIANTS[name])
    features, user = demo.user(model.config), jax.jit(model.user)
    item, interaction = jax.jit(jax.vmap(model.item, (None, 0))), jax.jit(model.interaction)
    state, rows = user(params, features), item(params, demo.items(40))
    # one program for all numbers of candidates; XLA shares nothing with the staged programs, which are compiled apart
    every = jax.jit(lambda params, *candidates: [model.joint(params, features, items) for items in candidates])
    inputs = params, *(demo.part(demo.items(40), slice(count)) for count in CANDIDATES)
    joint = every.lower(*inputs).compile(light.options())(*inputs)
    for count, logits in zip(CANDIDATES, joint, strict=True):
        staged = interaction(params, state, demo.part(rows, slice(count)))
        assert logits.shape == (count,) and logits.dtype == np.float32
        assert count < 2 or np.ptp(np.asarray(logits)) > 1e-3  # scores that do not differ would agree by chance
        np.testing.assert_allclose(staged, logits, atol=1e-5)
    # permuting, splitting and padding candidates change nothing
    order = np.random.default_rng(0).permutation(40)
    whole = np.asarray(interaction(params, state, rows))
    np.testing.assert_allclose(interaction(params, state, demo.part(rows, order)), whole[order], atol=1e-6)
    for at in (np.arange(7, 8), np.arange(3, 8), np.append(np.arange(7), np.zeros(33, int))):
        np.testing.assert_allclose(interaction(params, state, demo.part(rows, at)), whole[at], atol=1e-6)
    # the form for few candidates, which training takes and serving does not
    few = jax.jit(partial(model.user, candidates=1)).lower(params, features).compile(light.options())(params, features)
    rows = demo.part(rows, slice(5))
    np.testing.assert_allclose(interaction(params, few, rows), interaction(params, state, rows), atol=1e-5)


@pytest.mark.parametrize("name", demo.VARIANTS)
def test_every_trained_parameter_gets_a_gradient(name):
    model, params = demo.build(**demo.VARIANTS[name])
    assert demo.without_gradient(model, params, demo.user(model.config)) == []


@pytest.mark.parametrize("name", demo.VARIANTS)
def test_other_users_of_a_batch(name):
    model, params = demo.build(**demo.VARIANTS[name])
    users = [demo.user(model.config, events=n, seed=n) for n in (0, 7, 24)]
    items = demo.items(5)
    joint = jax.jit(model.joint)
    together = jax.jit(jax.vmap(model.joint, (None, 0, None)))(params, jax.tree.map(lambda *x: np.stack(x), *users), items)
    for features, scores in zip(users, together, strict=True):
        np.testing.assert_allclose(joint(params, features, items), scores, atol=1e-5)
