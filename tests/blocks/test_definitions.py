"""What blocks give to the head, from the features of a user and of items: their definitions, one pair at a time."""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif_jax import blocks, heads, layers
from aif_jax.blocks.block import own
from aif_jax.blocks.linear_memory import sum_softmax, sum_softmax_trained
from aif_jax.export.functions import axis_bounds
from aif_jax.trees import leaves_by_path
from tests import demo
from tests.reference import bridge, lsh, memory, simtier
from tests.reference import sim as slots
from tests.reference.losses import softmax

SHORT, LONG, WIDTH = 6, 24, 8


def by_bridges(block, seen):
    values = bridge.user_half(seen.own["bridges"], seen.sequence, seen.mask[:SHORT])
    return [bridge.item_half(seen.own["bridges"], query) @ values for query in seen.query]


def by_attention(block, seen):
    target = isinstance(block, blocks.TargetAttention)
    values = seen.embedded if target else seen.sequence
    read = [bridge.attend(query, values, seen.mask[: len(values)]) for query in seen.query]
    return np.concatenate([read, seen.mean], 1) if target else read


def by_sums(block, seen):
    """Of signs of signatures, or of trained queries and keys; softmax keys are n times the shares of the n events."""
    if isinstance(block, blocks.LshDin):
        words = lsh.signed(demo.catalogue().content, seen.own["projections"])
        queries, keys = (np.array([lsh.signs(row) for row in words[at]]) for at in (seen.items, seen.history.item))
    else:
        queries, keys = seen.query, seen.embedded @ seen.own["key"]["kernel"] + seen.own["key"]["bias"]
        if block.keys == "softmax" and seen.mask.any():
            keys[seen.mask] = seen.mask.sum() * np.stack([softmax(list(key)) for key in keys[seen.mask].T], 1)
    return np.concatenate([seen.mean, memory.deviation(queries, keys, seen.embedded, seen.mask)], 1)


def by_tiers(block, seen):
    words = lsh.signed(demo.catalogue().content, seen.own["projections"])
    mask = seen.mask & (np.arange(LONG) < (block.length or LONG))
    return np.log1p(simtier.histogram(words[seen.items], words[seen.history.item], mask, block.tiers))


def by_slots(block, seen):
    value, history = demo.catalogue().ids[block.field], seen.history
    cache = slots.user_half(value[history.item], seen.embedded, history.age, seen.mask, block.slots, block.length)
    wanted = value[seen.items]
    return np.concatenate([slots.lookup(cache, seen.query, wanted), slots.flags(cache, wanted)], 1)


CASES = {
    "bridges": (blocks.Bea(bridges=4, dot_product=True), by_bridges),
    "cross attention": (blocks.CrossAttention(dot_product=True), by_attention),
    "target attention": (blocks.TargetAttention(dot_product=True), by_attention),
    "linear keys": (blocks.LinearMemory(width=7, keys="linear", dot_product=True), by_sums),
    "softmax keys": (blocks.LinearMemory(width=7), by_sums),
    "signatures": (blocks.LshDin(bits=32), by_sums),
    "tiers": (blocks.SimTier(tiers=5, bits=64), by_tiers),
    "tiers of the last behaviours": (blocks.SimTier(tiers=4, bits=32, length=9), by_tiers),
    "slots of items": (blocks.Sim("item", slots=4, length=3), by_slots),
    "slots of a field": (blocks.Sim("category", slots=4, length=3), by_slots),
}


@pytest.mark.parametrize("name", CASES)
def test_inputs_of_the_head_are_those_of_the_definition(name):
    """With the dot product of what is read and the item; an empty history and a short one too."""
    block, definition = CASES[name]
    model, params = demo.build(blocks=(block,))
    config, items, widths = model.config, demo.items(7), block.widths(model.config)

    @jax.jit
    def run(params, features):
        state, rows, of_block = model.user(params, features), jax.vmap(model.item, (None, 0))(params, items), own(params, block)
        terms = block.score(of_block, state, rows, heads.identity(widths))
        embedded = layers.embed_behaviours(params, config.schema, features.history)
        sequence = layers.dense(params["user"]["sequence"], embedded[:SHORT] + params["user"]["position"])
        query = layers.dense(of_block["query"], rows.vector) if "query" in of_block else None
        given = dict(vectors=rows.vector, embedded=embedded, sequence=sequence, query=query, own=of_block)
        return heads.joined([terms], rows.vector), terms.logit, given

    for events in (0, 3, 19):
        features = demo.user(config, events=events)
        inputs, logit, given = jax.tree.map(np.array, run(params, features))
        mask = features.history.mask
        seen = types.SimpleNamespace(**given, items=items.ids["item"], history=features.history, mask=mask)
        seen.mean = np.tile(memory.mean(seen.embedded, mask), (7, 1))
        if block.tables:
            seen.own |= {"projections": params["fitted"][block.tables[0].name]}
        expected = np.array(definition(block, seen))
        assert expected.shape[1] == sum(widths.values())
        np.testing.assert_allclose(inputs, expected, rtol=1e-4, atol=1e-5)
        read = expected[:, WIDTH:] if "deviation" in widths else expected[:, :WIDTH]
        dotted = (read * seen.vectors).sum(-1) / math.sqrt(WIDTH) if getattr(block, "dot_product", False) else 0.0
        np.testing.assert_allclose(logit, dotted, rtol=1e-4, atol=1e-5)


def test_an_exported_function_takes_the_places_that_count():
    config = demo.config()
    assert blocks.SimTier(length=9).least_history(config) == 9 < config.long_length
    assert blocks.SimTier(length=config.long_length).least_history(config) == blocks.SimTier().least_history(config) == 1
    model, params = demo.build(blocks=(blocks.SimTier(tiers=4, bits=32, length=9),))
    assert axis_bounds(model, leaves_by_path(params))["l"] == (9, config.history_length)


def test_two_tower_is_a_dot_product_and_a_bias_and_does_not_see_the_long_history():
    model, params = demo.build(**demo.VARIANTS["two_tower"])
    features, items = demo.user(model.config), demo.items(6)

    @jax.jit
    def run(params):
        return (
            model.user(params, features),
            jax.vmap(model.item, (None, 0))(params, items),
            model.joint(params, features, items),
        )

    state, rows, logits = run(params)
    popularity, bias = params["blocks"]["dot_product"]["popularity"], params["head"]["bias"]
    np.testing.assert_allclose(logits, rows.vector @ (state.vector / math.sqrt(8) + popularity) + bias, rtol=1e-5, atol=1e-6)
    assert set(params["head"]) == {"bias"}
    short = model.config.short_length
    other = demo.user(model.config, seed=9).history
    spliced = jax.tree.map(lambda a, b: np.concatenate([a[:short], b[short:]]), features.history, other)
    assert not np.array_equal(spliced.item, features.history.item)
    joint = jax.jit(model.joint)
    changed = dataclasses.replace(features, history=spliced)
    np.testing.assert_array_equal(joint(params, features, items), joint(params, changed, items))


@pytest.mark.parametrize("length", [11, 2 * layers.CHUNK + 3])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_form_for_training_has_the_same_values_and_gradients(scale, length):
    """For histories of every length down to none; masked places hold zeros, as embeddings do."""
    rng = np.random.default_rng(1)
    kernel, bias, weight = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((6, 7), 7, (7, 6)))
    key = {"kernel": scale * kernel, "bias": bias}
    mask = np.arange(length) < np.array([length, 6, 1, 0])[:, None]
    values = np.where(mask[..., None], rng.normal(size=(4, length, 6)), 0).astype(np.float32)

    def plain(key, values, mask):
        return sum_softmax(key["kernel"].T @ values.T + key["bias"][:, None], values, mask)

    def outputs(summed):
        def loss(key, values):
            made = jax.vmap(summed, (None, 0, 0))(key, values, mask)
            return (jnp.tanh(made.moments) * weight[None]).sum() + (made.total**2).sum()

        return jax.jit(jax.vmap(summed, (None, 0, 0)))(key, values, mask), jax.jit(jax.grad(loss, (0, 1)))(key, values)

    (expected, wanted), (got, gradient) = outputs(plain), outputs(sum_softmax_trained)
    for ours, usual in zip(jax.tree.leaves((got, gradient)), jax.tree.leaves((expected, wanted)), strict=True):
        kept = mask[..., None] if ours.shape == values.shape else True  # embeddings of masked places take no gradient
        np.testing.assert_allclose(np.where(kept, ours, 0), np.where(kept, usual, 0), rtol=1e-3, atol=1e-4)
    assert np.all(np.isfinite(gradient[1])) and not got.moments[3].any()
