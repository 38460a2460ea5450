"""The dot products beside the head: by hand, in both forms of the memory, and in the exact baseline."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import head, interaction, memory
from aif_jax.types import UnfoldedMemory
from tests import demo


def test_two_tower_logit_by_hand():
    params = {"matching": {"popularity": jnp.array([1.0, 0.0, 0.0, 2.0])}}
    item = jnp.array([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    user = jnp.array([2.0, 0.0, 2.0, 0.0])
    assert head.matching(params, user, item).tolist() == [(2 + 6) / 2 + 1 + 8, 0.0]


def test_match_is_the_dot_product_with_what_the_memory_reads():
    rng = np.random.default_rng(0)
    query, item = rng.normal(size=(5, 7)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    keys, values = rng.normal(size=(9, 7)).astype(np.float32), rng.normal(size=(9, 4)).astype(np.float32)
    mask = np.arange(9) < 6
    read = query @ keys[:6].T @ values[:6] / (7**0.5 * 6)
    expected = (read * item).sum(-1)
    forms = (
        memory.fold(jnp.asarray(keys), jnp.asarray(values), jnp.asarray(mask)),
        UnfoldedMemory(keys=keys, values=values, mask=mask),
    )
    for history in forms:
        np.testing.assert_allclose(memory.match(history, jnp.asarray(query), jnp.asarray(item)), expected, rtol=1e-5)


def test_softmax_keys_by_hand():
    keys = jnp.log(jnp.array([[1.0, 1.0], [3.0, 1.0], [99.0, 99.0]]))
    shares = memory.softmax_keys(keys, jnp.array([True, True, False]))
    np.testing.assert_allclose(shares, [[0.5, 1.0], [1.5, 1.0], [0.0, 0.0]], rtol=1e-6)  # n = 2 times 1/4, 3/4 and 1/2, 1/2
    assert not memory.softmax_keys(keys, jnp.zeros(3, bool)).any()


def test_matching_adds_to_the_logits_of_the_same_head():
    model, params = demo.build(matching=True, memory_keys="softmax")
    plain = aif.build(model.config.replace(matching=False))
    features, items = demo.user(model.config), demo.items(model.config, 5)
    own = params["interaction"]
    shifted = params | {"interaction": own | {"matching": {"popularity": own["matching"]["popularity"] + 0.5}}}
    without = params | {"interaction": {name: group for name, group in own.items() if name != "matching"}}

    @jax.jit
    def parts(params):
        state = model.user(params, features)
        rows = jax.vmap(model.item, (None, 0))(params, items)
        return interaction.matching(params["interaction"], state, rows), rows.vector.sum(-1)

    added, total = parts(params)
    logits, more, fewer = (
        jax.jit(m.joint)(p, features, items) for m, p in ((model, params), (model, shifted), (plain, without))
    )
    np.testing.assert_allclose(logits - fewer, added, atol=1e-5)
    np.testing.assert_allclose(more - logits, 0.5 * total, atol=1e-5)
    assert np.ptp(np.asarray(added)) > 1e-3


def test_few_candidates_take_the_direct_form_with_the_same_scores():
    model, params = demo.build(matching=True, memory_keys="softmax")
    features, items = demo.user(model.config), demo.items(model.config, 3)
    rows = jax.vmap(model.item, (None, 0))(params, items)
    score = jax.jit(model.interaction)
    folded = score(params, jax.jit(model.user)(params, features), rows)
    unfolded = score(params, jax.jit(partial(model.user, candidates=1))(params, features), rows)
    np.testing.assert_allclose(unfolded, folded, atol=1e-5)


def test_exact_reads_with_its_dot_products_too():
    model, params = demo.build(architecture="exact", matching=True)
    features, items = demo.user(model.config), demo.items(model.config, 5)
    without = params | {"interaction": {name: group for name, group in params["interaction"].items() if name != "matching"}}
    plain = aif.build(model.config.replace(matching=False))
    difference = jax.jit(model.joint)(params, features, items) - jax.jit(plain.joint)(without, features, items)
    assert np.ptp(np.asarray(difference)) > 1e-3


def test_config_names_a_wrong_key_form():
    with pytest.raises(ValueError, match="memory_keys: expected one of"):
        aif.tiny(memory_keys="sharp")
