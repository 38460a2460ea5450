"""SIM pre-cache: which values get a slot, what a slot holds, what a candidate reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif_jax.blocks import sim as module
from tests.reference import sim as reference

D, H = 6, 3
fill_cache = jax.jit(module.fill_cache, static_argnames=("slots", "length", "size"))
read = jax.jit(module.read)


@jax.jit
def flags(cache, value):
    """The slot features of every candidate, as `Sim.score` puts them together."""
    return jnp.eye(1, module.FLAGS) + module.own_slot(cache, value).astype(jnp.float32) @ module.slot_flags(cache)


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
    np.testing.assert_array_equal(cache.value, [s["value"] for s in expected] + [-1] * (slots - len(expected)))
    np.testing.assert_array_equal(cache.count, [s["count"] for s in expected] + [0] * (slots - len(expected)))
    np.testing.assert_array_equal(cache.age, [s["age"] for s in expected] + [0] * (slots - len(expected)))
    for q, slot in enumerate(expected):
        filled = len(slot["entries"])
        np.testing.assert_array_equal(cache.mask[q], np.arange(cache.mask.shape[1]) < filled)
        np.testing.assert_array_equal(cache.entries[q, :filled], slot["entries"])
        assert np.all(cache.entries[q, filled:] == 0)
    assert not np.any(cache.mask[len(expected) :]) and np.all(cache.entries[len(expected) :] == 0)


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
    check(cache, reference.user_half(value, embedded, age, mask, slots, kept_each), slots)


def test_which_values_get_a_slot_by_hand():
    """7 stands twice and later than 5, 3 once and latest, 9 only in padding, 0 is unknown."""
    value = np.array([3, 7, 5, 0, 0, 0, 7, 5, 9], np.int32)
    mask = np.arange(9) < 8
    cache = fill_cache(value, np.eye(9, dtype=np.float32), np.arange(9, dtype=np.float32), mask, slots=4, length=1)
    assert cache.value.tolist() == [7, 5, 3, -1]
    assert cache.count.tolist() == [2, 2, 1, 0]
    assert cache.age.tolist() == [1, 2, 0, 0]
    assert cache.entries[0, 0].tolist() == np.eye(9)[1].tolist()


@pytest.mark.parametrize(("top", "size"), [(2**31 - 2, None), (2**24, None), (None, None), (None, 6)])
def test_values_of_any_size_have_a_slot_and_those_below_zero_none(top, size):
    value, embedded, age, mask = case(3, top=top)
    value[:5] = -7
    cache = fill_cache(value, embedded, age, mask, slots=8, length=3, size=size)
    check(cache, reference.user_half(value, embedded, age, mask, 8, 3), 8)


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
    slow = reference.user_half(value, embedded, age, mask, slots, kept_each)
    expected = reference.lookup(slow, query, wanted) @ kernel
    assert np.any(expected != 0)
    np.testing.assert_allclose(read(cache, query, wanted, kernel), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(flags(cache, wanted), reference.flags(slow, wanted), rtol=1e-5, atol=1e-6)
