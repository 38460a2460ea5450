"""Promise: staged == joint. Three functions compiled apart give what the composition gives."""

from functools import partial

import jax
import numpy as np
import pytest

from tests import demo


@pytest.mark.parametrize("name", demo.VARIANTS)
@pytest.mark.parametrize("candidates", [1, 5, 40])
def test_staged_equals_joint(name, candidates):
    model, params = demo.build(**demo.VARIANTS[name])
    features, items = demo.user(model.config), demo.items(model.config, candidates)
    joint = jax.jit(model.joint)(params, features, items)
    state = jax.jit(model.user)(params, features)
    rows = jax.jit(jax.vmap(model.item, (None, 0)))(params, items)
    staged = jax.jit(model.interaction)(params, state, rows)
    assert joint.shape == (candidates,) and joint.dtype == np.float32
    assert np.ptp(np.asarray(joint)) > 1e-3 or candidates == 1  # scores that do not differ would agree by chance
    np.testing.assert_allclose(staged, joint, atol=1e-5)


@pytest.mark.parametrize("name", ["every block", "codes"])
def test_the_unfolded_form_for_few_candidates_gives_the_folded_scores(name):
    model, params = demo.build(**demo.VARIANTS[name])
    features, items = demo.user(model.config), demo.items(model.config, 3)
    rows = jax.vmap(model.item, (None, 0))(params, items)
    interaction = jax.jit(model.interaction)
    folded = interaction(params, jax.jit(model.user)(params, features), rows)
    unfolded = interaction(params, jax.jit(partial(model.user, candidates=1))(params, features), rows)
    np.testing.assert_allclose(unfolded, folded, atol=1e-5)


@pytest.mark.parametrize("name", demo.VARIANTS)
def test_every_trained_parameter_gets_a_gradient(name):
    model, params = demo.build(**demo.VARIANTS[name])
    features, items = demo.user(model.config), demo.items(model.config, 40)
    trained = {key: group for key, group in params.items() if key != "frozen"}
    frozen = {key: group for key, group in params.items() if key == "frozen"}
    gradient = jax.jit(jax.grad(lambda trained: (model.joint(trained | frozen, features, items) ** 2).sum()))(trained)
    silent = [jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(gradient) if not leaf.any()]
    assert not silent
