"""Promise: padding never leaks; an empty history and no candidates give finite answers."""

import dataclasses

import jax
import numpy as np
import pytest

from tests import demo


@pytest.mark.parametrize("name", demo.VARIANTS)
def test_what_stands_in_padding_does_not_matter(name):
    model, params = demo.build(**demo.VARIANTS[name])
    config = model.config
    items = demo.items(config, 7)
    features = demo.user(config, events=4)
    poisoned = dataclasses.replace(
        features,
        short=demo.pad(jax.tree.map(lambda x: x[:4], features.short), config.short_length, poison=True),
        long=demo.pad(jax.tree.map(lambda x: x[:4], features.long), config.long_length, poison=True),
    )
    joint = jax.jit(model.joint)
    np.testing.assert_array_equal(joint(params, poisoned, items), joint(params, features, items))


@pytest.mark.parametrize("name", demo.VARIANTS)
def test_more_padding_changes_nothing(name):
    model, params = demo.build(**demo.VARIANTS[name])
    items, features = demo.items(model.config, 7), demo.user(model.config, events=10)
    longer = dataclasses.replace(features, long=demo.pad(features.long, 3 * model.config.long_length, poison=True))
    joint = jax.jit(model.joint)
    np.testing.assert_allclose(joint(params, longer, items), joint(params, features, items), atol=1e-6)


@pytest.mark.parametrize("name", demo.VARIANTS)
@pytest.mark.parametrize("events", [0, 1])
def test_empty_and_shortest_history(name, events):
    model, params = demo.build(**demo.VARIANTS[name])
    features, items = demo.user(model.config, events=events), demo.items(model.config, 7)
    objective = jax.value_and_grad(lambda p: model.joint(p, features, items).sum(), allow_int=True)
    scores, gradient = jax.jit(objective)(params)
    assert np.isfinite(scores)
    trained = [leaf for name, group in gradient.items() if name != "frozen" for leaf in jax.tree.leaves(group)]
    assert all(np.isfinite(leaf).all() for leaf in trained)


@pytest.mark.parametrize("name", demo.VARIANTS)
def test_no_candidates(name):
    model, params = demo.build(**demo.VARIANTS[name])
    assert model.joint(params, demo.user(model.config), demo.items(model.config, 0)).shape == (0,)


def test_an_id_out_of_range_reads_the_unknown_row():
    model, params = demo.build()
    features = demo.user(model.config)
    items = demo.items(model.config, 4)
    joint = jax.jit(model.joint)
    unknown = dataclasses.replace(items, ids={**items.ids, "item": np.zeros(4, np.int32)})
    for wrong in (-1, 50, 2**31 - 1):
        outside = dataclasses.replace(items, ids={**items.ids, "item": np.full(4, wrong, np.int32)})
        np.testing.assert_array_equal(joint(params, features, outside), joint(params, features, unknown))


def test_a_bad_float_stays_with_its_item():
    model, params = demo.build()
    items = demo.items(model.config, 4)
    floats = np.asarray(items.floats).copy()
    floats[2] = np.nan
    scores = np.asarray(model.joint(params, demo.user(model.config), dataclasses.replace(items, floats=floats)))
    assert np.isnan(scores[2]) and np.isfinite(scores[[0, 1, 3]]).all()
