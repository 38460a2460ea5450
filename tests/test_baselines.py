import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax import baselines
from tests import demo


def test_two_tower_is_a_dot_product():
    model, params = demo.build(architecture="two_tower")
    features, items = demo.user(model.config), demo.items(model.config, 6)
    u = model.user(params, features).vector
    i = jax.vmap(model.item, (None, 0))(params, items).vector
    own = params["interaction"]
    expected = i @ (u / math.sqrt(model.config.width)) + i @ own["popularity"] + own["bias"]
    np.testing.assert_allclose(model.joint(params, features, items), expected, rtol=1e-5)


def test_two_tower_does_not_see_the_long_history():
    model, params = demo.build(architecture="two_tower")
    features, items = demo.user(model.config), demo.items(model.config, 6)
    other = dataclasses.replace(features, long=demo.user(model.config, seed=9).long)
    np.testing.assert_array_equal(model.joint(params, features, items), model.joint(params, other, items))


def test_float_tiers_against_loops():
    model, params = demo.build(architecture="exact", tiers_by_action=True, tier_windows=(2, 6))
    config = model.config
    assert config.tier_groups == 3 * 4
    features = demo.user(config, events=15)
    state = model.user(params, features)
    rows = jax.vmap(model.item, (None, 0))(params, demo.items(config, 5))
    got = baselines.float_tiers(jnp.asarray(rows.content), state, config=config)
    expected = np.zeros((5, config.tier_groups, config.tiers))
    for c in range(5):
        for j in range(config.long_length):
            if state.long_mask[j]:
                assert state.group[j] == features.long.action[j] + 4 * ((j >= 2) + (j >= 6))
                cosine = float(np.dot(rows.content[c], state.content[j]))
                expected[c, int(state.group[j]), min(max(int((1 + cosine) / 2 * config.tiers), 0), config.tiers - 1)] += 1
    assert expected.sum() == 5 * 15
    np.testing.assert_allclose(got, np.log1p(expected).reshape(5, -1), atol=1e-6)


def test_exact_reads_the_whole_long_history():
    model, params = demo.build(architecture="exact")
    features, items = demo.user(model.config), demo.items(model.config, 6)
    mask = np.asarray(features.long.mask).copy()
    mask[19] = False  # the oldest event
    without = dataclasses.replace(features, long=dataclasses.replace(features.long, mask=mask))
    assert np.abs(model.joint(params, features, items) - model.joint(params, without, items)).max() > 1e-6


def test_cold_ignores_the_order_of_history():
    model, params = demo.build(architecture="cold")
    features, items = demo.user(model.config, events=6), demo.items(model.config, 6)
    order = np.array([3, 1, 0, 2, 5, 4])
    shuffled = dataclasses.replace(features, short=jax.tree.map(lambda x: x[order], features.short))
    np.testing.assert_allclose(model.joint(params, shuffled, items), model.joint(params, features, items), atol=1e-6)
