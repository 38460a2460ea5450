"""Matching statistics: exact counts of the user's meetings with the candidate's values, in both of their forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import aif_jax as aif
from aif_jax.blocks import MatchingStatistics, matching
from tests import demo
from tests.blocks import parts
from tests.reference import matching as reference

ACTIONS = 4
BLOCK = MatchingStatistics(("item", "category"), recent_events=3)
WIDTH = matching.STATISTICS + ACTIONS
ITSELF = jnp.eye(WIDTH)
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
    kernel = rng.normal(size=(WIDTH, 3)).astype(np.float32)
    for kind, size in ((matching.Table, 160), (matching.Sorted, 161)):
        made = halves(item, categories, action, age, mask, values=size)
        assert [type(half) for half in made] == [kind, kind]
        found = look_up(made, wanted)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, slow, rtol=2e-5, atol=1e-6)
        for few in (1, 100):  # candidates: fewer than values, and more
            some = np.resize(wanted, (few, 2))
            np.testing.assert_allclose(look_up(made, some, kernel), np.resize(slow, (few, *slow.shape[1:])) @ kernel, atol=1e-4)


def test_by_hand():
    """Item 7 met twice: last at place 1, two days ago, once among the last 3 events, by actions 2 and 1."""
    item, action = np.array([3, 7, 3, 0, 7], np.int32), np.array([1, 2, 1, 1, 1], np.int32)
    age, mask = np.array([1, 2, 3, 4, 5], np.float32) * 86400, np.array([True, True, True, True, True])
    categories = np.zeros(40, np.int32)
    categories[[3, 7]] = 5
    found = look_up(halves(item, categories, action, age, mask), np.array([[7, 5], [9, 4], [0, 0]], np.int32))
    of_item = [1, np.log(3), 2 / 5, 1 / 2, np.log(3), np.log(2), 0, np.log(2), np.log(2), 0]
    of_category = [1, np.log(5), 4 / 5, 1, np.log(2), np.log(4), 0, np.log(4), np.log(2), 0]
    np.testing.assert_allclose(found[0], [of_item, of_category], rtol=1e-6)
    assert BLOCK.widths(demo.config()) == {"statistics": 2 * WIDTH} == {"statistics": 2 * found.shape[-1]}
    assert not np.any(found[1:])  # values that were not met, and row 0, whatever stands in the history
