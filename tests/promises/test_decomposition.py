"""Promise: staged == joint: three functions compiled apart give what the composition gives; a score depends on that user and
that item only; padding never leaks, and an empty history gives finite answers.
"""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from aif_jax.trees import take
from tests import demo, lanes, light

CANDIDATES = (0, 1, 5, 40)
VARIANTS = lanes.but_for(("every block", "matching", "two_tower"), demo.VARIANTS)
"""The default lane takes all blocks at once, what `presets.aif` is made of, and the baseline."""


@pytest.mark.parametrize("name", VARIANTS)
def test_staged_equals_joint(name):
    model, params = demo.build(**demo.VARIANTS[name])
    features, user = demo.user(model.config), jax.jit(model.user)
    item, interaction = jax.jit(jax.vmap(model.item, (None, 0))), jax.jit(model.interaction)
    state, rows = user(params, features), item(params, demo.items(40))
    # one program for all numbers of candidates; XLA shares nothing with the staged programs, which are compiled apart
    every = jax.jit(lambda params, *candidates: [model.joint(params, features, items) for items in candidates])
    inputs = params, *(take(demo.items(40), slice(count)) for count in CANDIDATES)
    joint = every.lower(*inputs).compile(light.options())(*inputs)
    for count, logits in zip(CANDIDATES, joint, strict=True):
        staged = interaction(params, state, take(rows, slice(count)))
        assert logits.shape == (count,) and logits.dtype == np.float32
        assert count < 2 or np.ptp(np.asarray(logits)) > 1e-3  # scores that do not differ would agree by chance
        np.testing.assert_allclose(staged, logits, atol=1e-5)
    # permuting, splitting and padding candidates change nothing
    order = np.random.default_rng(0).permutation(40)
    whole = np.asarray(interaction(params, state, rows))
    np.testing.assert_allclose(interaction(params, state, take(rows, order)), whole[order], atol=1e-6)
    for at in (np.arange(7, 8), np.arange(3, 8), np.append(np.arange(7), np.zeros(33, int))):
        np.testing.assert_allclose(interaction(params, state, take(rows, at)), whole[at], atol=1e-6)
    # the form for few candidates, which training takes and serving does not
    few = jax.jit(partial(model.user, candidates=1)).lower(params, features).compile(light.options())(params, features)
    rows = take(rows, slice(5))
    np.testing.assert_allclose(interaction(params, few, rows), interaction(params, state, rows), atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_trained_parameter_gets_a_gradient(name):
    model, params = demo.build(**demo.VARIANTS[name])
    assert demo.without_gradient(model, params, demo.user(model.config)) == []


@pytest.mark.parametrize("name", VARIANTS)
def test_other_users_of_a_batch(name):
    model, params = demo.build(**demo.VARIANTS[name])
    users = [demo.user(model.config, events=n, seed=n) for n in (0, 7, 24)]
    items = demo.items(5)
    joint, inputs = jax.jit(model.joint), (params, jax.tree.map(lambda *x: np.stack(x), *users), items)
    together = jax.jit(jax.vmap(model.joint, (None, 0, None))).lower(*inputs).compile(light.options())
    for features, scores in zip(users, together(*inputs), strict=True):
        np.testing.assert_allclose(joint(params, features, items), scores, atol=1e-5)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    """A model, its parameters, its jitted joint function, and 5 candidates, a program of `test_decomposition` too."""
    model, params = demo.build(**demo.VARIANTS[request.param])
    return model, params, jax.jit(model.joint), demo.items(5)


def test_padding_changes_nothing_and_an_empty_history_is_finite(variant):
    """NaN ages, ids of other items: bit for bit the same scores; more places do not matter."""
    model, params, joint, items = variant
    features, length = demo.user(model.config, events=4), model.config.history_length
    events = jax.tree.map(lambda x: x[:4], features.history)
    poisoned = dataclasses.replace(features, history=demo.pad(events, length, poison=True))
    assert np.isnan(poisoned.history.age[4:]).all() and (poisoned.history.item[4:] != features.history.item[4:]).all()
    np.testing.assert_array_equal(joint(params, poisoned, items), joint(params, features, items))
    features = demo.user(model.config, events=10)
    longer = dataclasses.replace(features, history=demo.pad(features.history, 3 * length, poison=True))
    np.testing.assert_allclose(joint(params, longer, items), joint(params, features, items), atol=1e-6)
    for events in (0, 1):
        assert np.isfinite(joint(params, demo.user(model.config, events=events), items)).all()


def test_gradients_of_an_empty_history_are_finite(variant):
    model, params, _, items = variant
    trained = {name: group for name, group in params.items() if name != "fitted"}

    def gradients(trained, features):
        return jax.grad(lambda trained: model.joint(trained | {"fitted": params["fitted"]}, features, items).sum())(trained)

    users = [demo.user(model.config, events=events) for events in (0, 1)]
    compiled = jax.jit(gradients).lower(trained, users[0]).compile(light.options())
    for user in users:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(compiled(trained, user)))


@pytest.fixture(scope="module")
def every_block():
    model, params = demo.build()
    return params, demo.user(model.config), demo.items(5), jax.jit(model.joint)


def test_an_id_out_of_range_reads_the_unknown_row(every_block):
    params, features, items, joint = every_block
    unknown = dataclasses.replace(items, ids={**items.ids, "item": np.zeros(5, np.int32)})
    nobody = dataclasses.replace(features, history=dataclasses.replace(features.history, item=np.zeros(24, np.int32)))
    for wrong in (-1, 50, 2**31 - 1):
        outside = dataclasses.replace(items, ids={**items.ids, "item": np.full(5, wrong, np.int32)})
        np.testing.assert_array_equal(joint(params, features, outside), joint(params, features, unknown))
        strange = dataclasses.replace(features.history, item=np.full(24, wrong, np.int32))
        scores = joint(params, dataclasses.replace(features, history=strange), items)
        np.testing.assert_array_equal(scores, joint(params, nobody, items))


def test_a_bad_float_stays_with_its_item(every_block):
    params, features, items, joint = every_block
    floats = np.asarray(items.floats).copy()
    floats[2] = np.nan
    scores = np.asarray(joint(params, features, dataclasses.replace(items, floats=floats)))
    assert np.isnan(scores[2]) and np.isfinite(scores[[0, 1, 3, 4]]).all()
