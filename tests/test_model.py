import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import interaction, user
from tests import demo


def test_shapes_of_what_crosses_a_component():
    model, params = demo.build(simtier="codes", codes_per_item=2)
    c = model.config
    state = jax.eval_shape(model.user, params, demo.user(c))
    assert state.vector.shape == (c.width,)
    assert state.bridge.shape == (c.bridges, c.width)
    assert state.memory["lsh"].moments.shape == (c.signature_bits, c.width)
    assert state.memory["learned"].moments.shape == (c.memory_width, c.width)
    assert state.tiers.shape == (c.codes, c.tiers)
    assert state.sim["category"].entries.shape == (c.sim_slots, c.sim_length, c.width)
    rows = jax.eval_shape(jax.vmap(model.item, (None, 0)), params, demo.items(c, 9))
    assert rows.vector.shape == (9, c.width) and rows.vector.dtype == jnp.float32
    assert rows.bridge.shape == (9, c.bridges)
    assert rows.signature.shape == (9, c.signature_words) and rows.signature.dtype == jnp.uint32
    assert rows.codes.shape == rows.code_weights.shape == (9, 2)
    assert rows.side["bid"].shape == (9,)


def test_a_block_that_is_off_leaves_nothing_behind():
    model, params = demo.build(**demo.VARIANTS["base"])
    state = model.user(params, demo.user(model.config))
    row = jax.eval_shape(jax.vmap(model.item, (None, 0)), params, demo.items(model.config, 2))
    assert state.bridge is None and state.tiers is None and state.memory == {} and state.sim == {}
    assert row.query is None and row.bridge is None and row.signature is None and row.codes is None
    assert "bridge" not in params and "frozen" not in params


def test_a_ready_signature_is_taken_as_it_is():
    model, params = demo.build()
    items = demo.items(model.config, 3)
    made = jax.vmap(model.item, (None, 0))(params, items)
    given = np.full((3, model.config.signature_words), 7, np.uint32)
    kept = jax.vmap(model.item, (None, 0))(params, aif.ItemFeatures(**{**vars(items), "signature": given}))
    np.testing.assert_array_equal(kept.signature, given)
    np.testing.assert_array_equal(kept.vector, made.vector)
    assert not np.array_equal(made.signature, given)


def test_init_is_a_function_of_the_key():
    model, _ = demo.build()
    one, same, other = (model.init(jax.random.key(seed)) for seed in (1, 1, 2))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, same))
    assert not np.array_equal(one["embedding"]["item"], other["embedding"]["item"])


def test_frozen_parameters_of_another_config_are_refused():
    model, _ = demo.build()
    other = aif.tiny(signature_bits=64)
    frozen = aif.lsh.fit(np.random.default_rng(0).normal(size=(50, 12)), other)
    with pytest.raises(ValueError, match=r"frozen parameters: expected shapes .*\(12, 32\).* got .*\(12, 64\)"):
        model.init(jax.random.key(0), frozen=frozen)


def test_the_exact_baseline_needs_content():
    with pytest.raises(ValueError, match="pass frozen=lsh.fit"):
        aif.build(aif.tiny(architecture="exact")).init(jax.random.key(0))


def test_the_model_functions_hold_under_strict_dtype_promotion():
    for changes in demo.VARIANTS.values():
        model, params = demo.build(**changes)
        with jax.numpy_dtype_promotion("strict"):
            scores = jax.eval_shape(model.joint, params, demo.user(model.config), demo.items(model.config, 40))
        assert scores.dtype == jnp.float32


def test_assemble_takes_a_tower_of_ones_own():
    from aif_jax import interaction, item, user

    def slow_init(key, config):
        return user.init(key, config) | {"scale": jnp.full((), 2.0)}

    def slow_user(params, features, *, config, candidates=None):
        state = user.apply(params, features, config=config, candidates=candidates)
        return jax.tree.map(lambda x: x, state).__class__(**{**vars(state), "vector": state.vector * params["user"]["scale"]})

    config = aif.tiny()
    model = aif.assemble(
        config,
        user=aif.Component(slow_init, slow_user),
        item=aif.Component(item.init, item.apply),
        interaction=aif.Component(interaction.init, interaction.apply),
    )
    params = model.init(jax.random.key(0))
    plain = aif.build(config).user(params, demo.user(config))
    np.testing.assert_allclose(model.user(params, demo.user(config)).vector, 2 * plain.vector)


def test_each_block_changes_the_scores():
    """A switch that changed nothing would be a block that is not wired."""
    model, params = demo.build()
    features, items = demo.user(model.config), demo.items(model.config, 40)
    joint = jax.jit(model.joint)
    scores = joint(params, features, items)
    for block in params["interaction"]["first"]["kernels"]:
        kernels = params["interaction"]["first"]["kernels"]
        without = {**kernels, block: jnp.zeros_like(kernels[block])}
        changed = {
            **params,
            "interaction": {**params["interaction"], "first": {**params["interaction"]["first"], "kernels": without}},
        }
        assert np.abs(joint(changed, features, items) - scores).max() > 1e-6, block


def test_tiers_by_window_are_those_of_the_stretches_of_the_history():
    model, params = demo.build(tier_windows=(2, 6), simtier="exact")
    config = model.config
    features, rows = demo.user(config), jax.vmap(model.item, (None, 0))(params, demo.items(config, 5))
    plain = config.replace(tier_windows=())
    long, at = features.long, np.arange(config.long_length)
    blocks = []
    for kept in (at < 2, (at >= 2) & (at < 6), at >= 6):
        part = dataclasses.replace(features, long=dataclasses.replace(long, mask=long.mask & kept))
        blocks.append(interaction.tier_block(user.apply(params, part, config=plain), rows, config=plain))
    got = interaction.tier_block(model.user(params, features), rows, config=config)
    np.testing.assert_array_equal(got, np.concatenate(blocks, 1))
    assert all(block.any() for block in blocks)
