"""Memory with half-lives: a mean over a whole life that events update, however they are split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif_jax import layers
from aif_jax.blocks import DecayedMemory, EventView
from aif_jax.blocks.decayed_memory import NOTHING, YEAR
from aif_jax.types import Events
from tests import demo
from tests.blocks import parts
from tests.reference import decayed as reference

pytestmark = pytest.mark.usefixtures("light_compilation")
BLOCK = DecayedMemory(width=8)
MODEL, PARAMS = demo.build(blocks=(BLOCK,))
OWN = PARAMS["blocks"]["decayed_memory"]


def events(count=40, *, seed=0, span=8 * YEAR) -> Events:
    """Events over years, some of one moment, the oldest first."""
    rng = np.random.default_rng(seed)
    time = np.sort(1 + (span * rng.random(count) ** 3).astype(np.uint32))
    time[3:6], time[-2:] = time[3], time[-1]
    item = rng.integers(1, demo.ITEMS, count).astype(np.int32)
    return Events(item=item, action=rng.integers(0, 4, count).astype(np.int32), time=time)


@jax.jit
def update(memory, new, own=OWN):
    return BLOCK.update(own, memory, EventView(config=MODEL.config, params=PARAMS, events=new))


def part(new: Events, at) -> Events:
    return jax.tree.map(lambda leaf: leaf[at], new)


def split(new: Events, sizes):
    memory, start = BLOCK.empty(MODEL.config), 0
    for size in sizes:
        memory, start = update(memory, part(new, slice(start, start + size))), start + size
    return memory


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize("span", [3600.0, 8 * YEAR, 80 * YEAR])
def test_the_means_are_those_of_the_reference(span):
    new = events(span=span)
    view = EventView(config=MODEL.config, params=PARAMS, events=jax.tree.map(jnp.asarray, new))
    keys = np.asarray(layers.dense(OWN["key"], view.embedded), np.float64)
    keys = np.concatenate([keys, np.zeros((len(keys), 1))], 1)
    expected = reference.means(keys, np.asarray(view.embedded, np.float64), new.time.astype(float), BLOCK.half_lives(OWN))
    np.testing.assert_allclose(split(new, [40]).means, expected, atol=2e-6)


@pytest.mark.parametrize("sizes", [[1] * 40, [13, 1, 26], [0, 39, 0, 1], [4, 1, 35]])
def test_any_split_comes_to_the_same(sizes):
    close(split(events(), sizes), split(events(), [40]))


def test_the_order_of_arrival_does_not_matter():
    new = events()
    shuffled = part(new, np.random.default_rng(1).permutation(40))
    close(split(shuffled, [10] * 4), split(new, [40]))


def test_thousands_of_updates_keep_their_precision():
    new = events(3000, span=30 * YEAR)
    close(split(new, [1] * 3000), split(new, [3000]))


def test_nothing_overflows():
    """Keys of hundreds, ages of a century: the largest weight is 1."""
    large = jax.tree.map(lambda leaf: 300 * leaf, OWN) | {"log_factor": OWN["log_factor"] - 9}
    new = part(events(span=100 * YEAR), np.r_[0:3, 39])
    memory = BLOCK.empty(MODEL.config)
    for at in range(4):
        memory = update(memory, part(new, slice(at, at + 1)), large)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(memory))
    gradient = jax.grad(lambda own: update(BLOCK.empty(MODEL.config), new, own).means.sum())(large)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_no_events_change_nothing_and_padding_is_none():
    memory = split(events(), [40])
    close(update(memory, part(events(), slice(0, 0))), memory, 0)
    padded = jax.tree.map(lambda leaf: np.concatenate([np.zeros(5, leaf.dtype), leaf]), events())
    close(update(BLOCK.empty(MODEL.config), padded), memory, 1e-6)
    empty = update(BLOCK.empty(MODEL.config), jax.tree.map(np.zeros_like, events(4)))
    assert np.all(empty.means == 0) and np.all(empty.log_sums == NOTHING) and empty.time == 0


def test_a_recent_event_outweighs_an_old_one_in_entries_that_forget_fast():
    old, new = part(events(), slice(0, 1)), part(events(), slice(39, 40))
    memory = update(update(BLOCK.empty(MODEL.config), old), new)
    alone = update(BLOCK.empty(MODEL.config), new)
    np.testing.assert_allclose(memory.means[0], alone.means[0], atol=1e-6)
    assert np.abs(memory.means[-1] - alone.means[-1]).max() > 0.01


def test_half_lives_begin_log_spaced_and_are_learned():
    own = BLOCK.init(jax.random.key(0), MODEL.config)
    lives = np.asarray(BLOCK.half_lives(own))
    np.testing.assert_allclose(lives[:-1], np.geomspace(BLOCK.shortest, BLOCK.longest, 8), rtol=1e-6)
    assert lives[-1] == np.float32(BLOCK.longest)
    gradient = jax.grad(lambda own: update(BLOCK.empty(MODEL.config), events(), own).means.var())(OWN)
    assert np.abs(gradient["log_factor"]).max() > 0


def test_fixed_half_lives_have_no_parameter():
    block = DecayedMemory(width=4, learned=False)
    assert "log_factor" not in block.init(jax.random.key(0), parts.config(block))
    np.testing.assert_allclose(block.half_lives({})[:4], np.geomspace(block.shortest, block.longest, 4), rtol=1e-6)
