"""What blocks give to the head, from the features of a user and of items: their definitions, one pair at a time; and the
forms of `Sim` and `MatchingStatistics` on their own.
"""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

import aif_jax as aif
from aif_jax import blocks, heads, layers
from aif_jax.blocks import MatchingStatistics, matching, sim
from aif_jax.blocks.block import own
from aif_jax.blocks.linear_memory import sum_softmax, sum_softmax_trained
from aif_jax.export.functions import axis_bounds, export_all
from aif_jax.trees import leaves_by_path
from tests import demo, lanes
from tests.blocks import parts
from tests.reference import blocks as reference

SHORT, LONG, WIDTH = 6, 24, 8


def by_bridges(block, seen):
    bridges = seen.own["bridges"]
    values = np.stack([reference.attend(bridge, seen.sequence, seen.mask[:SHORT]) for bridge in bridges])
    return softmax(seen.query @ bridges.T / math.sqrt(WIDTH), axis=1) @ values


def by_attention(block, seen):
    target = isinstance(block, blocks.TargetAttention)
    values = seen.embedded if target else seen.sequence
    read = [reference.attend(query, values, seen.mask[: len(values)]) for query in seen.query]
    return np.concatenate([read, seen.mean], 1) if target else read


def by_sums(block, seen):
    """Of signs of signatures, or of trained queries and keys; softmax keys are n times the shares of the n events."""
    if isinstance(block, blocks.LshDin):
        words = reference.signed(demo.catalogue().items.content, seen.own["projections"])
        queries, keys = (reference.signs(words[at]) for at in (seen.items, seen.history.item))
    else:
        queries, keys = seen.query, seen.embedded @ seen.own["key"]["kernel"] + seen.own["key"]["bias"]
        if block.keys == "softmax" and seen.mask.any():
            keys[seen.mask] = seen.mask.sum() * softmax(keys[seen.mask], axis=0)
    return np.concatenate([seen.mean, reference.deviation(queries, keys, seen.embedded, seen.mask)], 1)


def by_tiers(block, seen):
    words = reference.signed(demo.catalogue().items.content, seen.own["projections"])
    mask = seen.mask & (np.arange(LONG) < (block.length or LONG))
    return np.log1p(reference.histogram(words[seen.items], words[seen.history.item], mask, block.tiers))


def by_slots(block, seen):
    value, history = demo.catalogue().items.ids[block.field], seen.history
    cache = reference.sim_slots(value[history.item], seen.embedded, history.age, seen.mask, block.slots, block.length)
    wanted = value[seen.items]
    return np.concatenate([reference.sim_lookup(cache, seen.query, wanted), reference.sim_flags(cache, wanted)], 1)


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


@pytest.mark.parametrize("name", lanes.but_for(("bridges", "linear keys"), CASES))
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
        seen.mean = np.tile(reference.mean(seen.embedded, mask), (7, 1))
        if block.tables:
            seen.own |= {"projections": params["fitted"][block.tables[0].name]}
        expected = np.array(definition(block, seen))
        assert expected.shape[1] == sum(widths.values())
        np.testing.assert_allclose(inputs, expected, rtol=1e-4, atol=1e-5)
        read = expected[:, WIDTH:] if "deviation" in widths else expected[:, :WIDTH]
        dotted = (read * seen.vectors).sum(-1) / math.sqrt(WIDTH) if getattr(block, "dot_product", False) else 0.0
        np.testing.assert_allclose(logit, dotted, rtol=1e-4, atol=1e-5)


def test_an_exported_function_takes_the_places_that_count(monkeypatch):
    config = demo.config()
    assert blocks.SimTier(length=9).least_history(config) == 9 < config.long_length
    assert blocks.SimTier(length=config.long_length).least_history(config) == blocks.SimTier().least_history(config) == 1
    model, params = demo.build(blocks=(blocks.SimTier(tiers=4, bits=32, length=9),))
    assert axis_bounds(model, leaves_by_path(params))["l"] == (9, config.history_length)
    monkeypatch.setattr(blocks.SimTier, "least_history", lambda *_: 1)
    with pytest.raises(ValueError, match="sizes: numbers or axes, got .*min.*see `Block.least_history`"):
        export_all(model, leaves_by_path(params), axis_bounds(model, leaves_by_path(params)), platforms=("cpu",), orders={})


def test_two_tower_is_a_dot_product_and_a_bias_and_does_not_see_the_long_history():
    model, params = demo.build(**demo.VARIANTS["two_tower"])
    features, items = demo.user(model.config), demo.items(6)

    @jax.jit
    def run(params):
        rows = jax.vmap(model.item, (None, 0))(params, items)
        return model.user(params, features), rows, model.joint(params, features, items)

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


D, H = 6, 3
fill_cache = jax.jit(sim.fill_cache, static_argnames=("slots", "length", "size"))
read = jax.jit(sim.read)


@jax.jit
def flags(cache, value):
    """The slot features of every candidate, as `Sim.score` puts them together."""
    return jnp.eye(1, sim.FLAGS) + sim.own_slot(cache, value).astype(jnp.float32) @ sim.slot_flags(cache)


def case(seed=0, length=30, values=6, kept=0.8, top=None):
    rng = np.random.default_rng(seed)
    value = rng.integers(0, values, length).astype(np.int32) if top is None else rng.integers(top - values, top, length)
    return (
        value.astype(np.int32),
        rng.normal(size=(length, D)).astype(np.float32),
        np.sort(rng.random(length) * 1e6).astype(np.float32),
        rng.random(length) < kept,
    )


def check(cache, expected, slots):
    for field, empty in (("value", -1), ("count", 0), ("age", 0)):
        np.testing.assert_array_equal(getattr(cache, field), [s[field] for s in expected] + [empty] * (slots - len(expected)))
    for q, slot in enumerate(expected):
        filled = len(slot["entries"])
        np.testing.assert_array_equal(cache.mask[q], np.arange(cache.mask.shape[1]) < filled)
        np.testing.assert_array_equal(cache.entries[q, :filled], slot["entries"])
        assert np.all(cache.entries[q, filled:] == 0)
    assert not np.any(cache.mask[len(expected) :]) and np.all(cache.entries[len(expected) :] == 0)


@pytest.mark.lane("standing")
@pytest.mark.parametrize(
    ("slots", "kept_each", "length", "values", "kept"),
    [(4, 3, 30, 6, 0.8), (2, 1, 30, 6, 0.8), (16, 8, 30, 6, 0.8), (5, 40, 30, 3, 0.8), (8, 3, 5, 9, 0.8), (3, 2, 12, 6, 0.0)],
)
@pytest.mark.parametrize("size", [None, 10, 2**29])
def test_cache_matches_the_reference(slots, kept_each, length, values, kept, size):
    """By one sort key where value and place fit into 32 bits (size 10), by two where not or where it is not known."""
    value, embedded, age, mask = case(0, length, values, kept)
    cache = fill_cache(value, embedded, age, mask, slots=slots, length=kept_each, size=size)
    assert cache.entries.shape == (slots, kept_each, D)
    assert (cache.value.dtype, cache.count.dtype, cache.mask.dtype) == (jnp.int32, jnp.int32, jnp.bool_)
    check(cache, reference.sim_slots(value, embedded, age, mask, slots, kept_each), slots)


def test_which_values_get_a_slot_by_hand():
    """7 stands twice and later than 5, 3 once and latest, 9 only in padding, 0 is unknown."""
    value = np.array([3, 7, 5, 0, 0, 0, 7, 5, 9], np.int32)
    cache = fill_cache(value, np.eye(9, dtype=np.float32), np.arange(9, dtype=np.float32), np.arange(9) < 8, slots=4, length=1)
    assert cache.value.tolist() == [7, 5, 3, -1]
    assert cache.count.tolist() == [2, 2, 1, 0]
    assert cache.age.tolist() == [1, 2, 0, 0]
    assert cache.entries[0, 0].tolist() == np.eye(9)[1].tolist()


@pytest.mark.parametrize(("top", "size"), [(2**31 - 2, None), (2**24, None), (None, None), (None, 6)])
def test_values_of_any_size_have_a_slot_and_those_below_zero_none(top, size):
    value, embedded, age, mask = case(3, top=top)
    value[:5] = -7
    cache = fill_cache(value, embedded, age, mask, slots=8, length=3, size=size)
    check(cache, reference.sim_slots(value, embedded, age, mask, 8, 3), 8)


@pytest.mark.lane("standing")
@pytest.mark.parametrize("candidates", [1, 7, 300])
@pytest.mark.parametrize(("slots", "kept_each"), [(4, 3), (3, 16)])
def test_read_and_flags_match_the_reference(candidates, slots, kept_each):
    value, embedded, age, mask = case(6)
    rng = np.random.default_rng(7)
    query = 3 * rng.normal(size=(candidates, D)).astype(np.float32)
    wanted = rng.integers(-1, 8, candidates).astype(np.int32)
    wanted[0] = value[mask & (value > 0)][0]
    kernel = rng.normal(size=(D, H)).astype(np.float32)
    cache = fill_cache(value, embedded, age, mask, slots=slots, length=kept_each)
    slow = reference.sim_slots(value, embedded, age, mask, slots, kept_each)
    expected = reference.sim_lookup(slow, query, wanted) @ kernel
    assert np.any(expected != 0)
    np.testing.assert_allclose(read(cache, query, wanted, kernel), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(flags(cache, wanted), reference.sim_flags(slow, wanted), rtol=1e-5, atol=1e-6)


ACTIONS = 4
BLOCK = MatchingStatistics(("item", "category"), recent_events=3)
FEATURES = matching.STATISTICS + ACTIONS
ITSELF = jnp.eye(FEATURES)
compare = jax.jit(matching.compare)


@jax.jit
def look_up(halves, wanted, kernel=ITSELF):
    """The statistics of every field, times a kernel: [C, F, H]."""
    return jnp.stack([matching.look_up(half, wanted[:, f], kernel) for f, half in enumerate(halves)], 1)


@functools.partial(jax.jit, static_argnames=("few", "values"))
def halves(item, category, action, age, mask, *, few=False, values=50):
    """The user half of many candidates, or the one for few; histories have 160 places: more values are sorted."""
    sized = [aif.Attribute(name=name, size=values) for name in ("item", "category")]
    schema = dataclasses.replace(demo.schema(), item_attributes=tuple(sized))
    config = demo.config(blocks=(BLOCK,), schema=schema, long_length=160)
    view = parts.user(config, mask, candidates=5 if few else None, item=item, action=action, age=age)
    table = jnp.append(category, 0).astype(jnp.int32)  # category of each item: items are numbered by place here
    view.params["fitted"] = {"fields": {"category": table}}
    return BLOCK.user({}, view)


def history(seed, length, values, kept=0.8):
    """Each event is an item of its category: `item` repeats as often as `category`, so that both fields have runs."""
    rng = np.random.default_rng(seed)
    categories = rng.integers(0, values, 40).astype(np.int32)
    item = rng.integers(0, 40, length).astype(np.int32)
    age = np.sort(rng.exponential(1e6, length)).astype(np.float32)
    return item, categories, rng.integers(-1, ACTIONS + 1, length).astype(np.int32), age, rng.random(length) < kept


def expected(item, categories, action, age, mask, wanted):
    """The reference for each candidate and field; an unknown action is counted in no action."""
    fields = (item, categories[item])
    options = dict(recent_events=BLOCK.recent_events, actions=ACTIONS)
    made = [
        [reference.statistics(v, action, age, mask, w, **options) for v, w in zip(fields, row, strict=True)] for row in wanted
    ]
    return np.array(made)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    length=st.sampled_from([1, 17, 150]),
    values=st.integers(1, 6),
    kept=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_all_forms_are_the_definition(seed, length, values, kept):
    item, categories, action, age, mask = history(seed, length, values, kept)
    rng = np.random.default_rng(seed + 1)
    candidates = rng.integers(0, 40, 8)
    wanted = np.stack([candidates, categories[candidates]], 1).astype(np.int32)
    wanted[0] = [39, 5]
    slow = expected(item, categories, action, age, mask, wanted)
    found = compare(halves(item, categories, action, age, mask, few=True), wanted)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, slow, rtol=2e-5, atol=1e-6)
    kernel = rng.normal(size=(FEATURES, 3)).astype(np.float32)
    for every, size in ((True, 160), (False, 161)):
        made = halves(item, categories, action, age, mask, values=size)
        assert [half.value is None for half in made] == [every, every]
        found = look_up(made, wanted)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, slow, rtol=2e-5, atol=1e-6)
        for few in (1, 100):  # candidates: fewer than values, and more
            some = np.resize(wanted, (few, 2))
            np.testing.assert_allclose(look_up(made, some, kernel), np.resize(slow, (few, *slow.shape[1:])) @ kernel, atol=1e-4)


def test_matching_statistics_by_hand():
    """Item 7 met twice: last at place 1, two days ago, once among the last 3 events, by actions 2 and 1."""
    item, action = np.array([3, 7, 3, 0, 7], np.int32), np.array([1, 2, 1, 1, 1], np.int32)
    age, mask = np.array([1, 2, 3, 4, 5], np.float32) * 86400, np.array([True, True, True, True, True])
    categories = np.zeros(40, np.int32)
    categories[[3, 7]] = 5
    found = look_up(halves(item, categories, action, age, mask), np.array([[7, 5], [9, 4], [0, 0]], np.int32))
    of_item = [1, np.log(3), 2 / 5, 1 / 2, np.log(3), np.log(2), 0, np.log(2), np.log(2), 0]
    of_category = [1, np.log(5), 4 / 5, 1, np.log(2), np.log(4), 0, np.log(4), np.log(2), 0]
    np.testing.assert_allclose(found[0], [of_item, of_category], rtol=1e-6)
    assert BLOCK.widths(demo.config()) == {"statistics": 2 * FEATURES} == {"statistics": 2 * found.shape[-1]}
    assert not np.any(found[1:])  # values that were not met, and row 0, whatever stands in the history
