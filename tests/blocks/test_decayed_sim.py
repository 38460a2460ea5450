"""SIM over a whole life: which values stay, what they count, where late events go."""

import jax
import numpy as np
import pytest

from aif_jax.blocks import DecayedSim, EventView
from aif_jax.blocks.decayed_sim import DAY
from aif_jax.types import Events
from tests import demo
from tests.reference import decayed as reference

pytestmark = pytest.mark.usefixtures("light_compilation")
BLOCK = DecayedSim("item", slots=4, length=3, half_life=30 * DAY)
MODEL, PARAMS = demo.build(blocks=(BLOCK,))


@jax.jit
def update(memory, new):
    return BLOCK.update({}, memory, EventView(config=MODEL.config, params=PARAMS, events=new))


def events(count, *, seed=0, values=9, late=0.0) -> Events:
    rng = np.random.default_rng(seed)
    item = np.minimum(rng.geometric(0.3, count), values).astype(np.int32)
    time = np.sort(rng.integers(1, int(200 * DAY), count)).astype(np.uint32)
    time = np.where(rng.random(count) < late, time - np.minimum(time - 1, int(20 * DAY)), time).astype(np.uint32)
    return Events(item=item, action=rng.integers(0, 4, count).astype(np.int32), time=time)


def expect(values, cache: reference.Cache):
    got = {int(v): at for at, v in enumerate(values.value) if v}
    assert got.keys() == {one["value"] for one in cache.values}
    for one in cache.values:
        at = got[one["value"]]
        np.testing.assert_allclose(values.count[at], one["count"], rtol=1e-4)
        short = BLOCK.length - len(one["events"])
        assert values.code[at].tolist() == [code for code, _ in one["events"]] + [0] * short
        assert values.time[at].tolist() == [time for _, time in one["events"]] + [0] * short


@pytest.mark.parametrize("late", [0.0, 0.3])
@pytest.mark.parametrize("count", [1, 5, 60, 400])
def test_the_cache_is_that_of_the_reference(count, late):
    new, cache = events(count, late=late), reference.Cache(4, 3, 30 * DAY)
    for item, action, time in zip(new.item.tolist(), new.action.tolist(), new.time.tolist(), strict=True):
        cache.add(item, item * 4 + action, time)
    expect(update(BLOCK.empty(MODEL.config), new), cache)


def test_any_split_is_the_same_bit_for_bit():
    new = events(200)
    whole, memory = update(BLOCK.empty(MODEL.config), new), BLOCK.empty(MODEL.config)
    for at in range(200):
        memory = update(memory, jax.tree.map(lambda leaf, at=at: leaf[at : at + 1], new))
    jax.tree.map(np.testing.assert_array_equal, memory, whole)


def test_values_that_come_once_push_out_each_other():
    """A value of many events stays whatever comes between them, with its true count."""
    rng = np.random.default_rng(3)
    item = np.where(rng.random(500) < 0.4, 7, rng.integers(10, demo.ITEMS, 500)).astype(np.int32)
    time = np.arange(1, 501, dtype=np.uint32)  # within a few minutes: nothing decays
    memory = update(BLOCK.empty(MODEL.config), Events(item=item, action=np.ones(500, np.int32), time=time))
    at = memory.value.tolist().index(7)
    np.testing.assert_allclose(memory.count[at], (item == 7).sum(), rtol=1e-3)


def test_an_interest_that_rests_stays_and_a_new_one_comes_in():
    year = int(365 * DAY)
    item = np.array([5] * 9 + [1, 2, 3, 4, 6] * 6 + [8] * 3, np.int32)
    time = np.r_[np.arange(1, 10), year + np.arange(1, 31), 2 * year + np.arange(3)].astype(np.uint32)
    new = Events(item=item, action=np.ones(len(item), np.int32), time=time)
    slow = DecayedSim("item", slots=4, length=3, half_life=730 * DAY)

    def after(count: int) -> set[int]:
        view = EventView(config=MODEL.config, params=PARAMS, events=jax.tree.map(lambda leaf: leaf[:count], new))
        return set(slow.update({}, slow.empty(MODEL.config), view).value.tolist())

    assert 5 in after(39)  # it was not met for a year, in which five others were
    assert {5, 8} < after(42)


def test_unknown_items_and_padding_have_no_slot():
    new = Events(item=np.array([0, 3, 4], np.int32), action=np.ones(3, np.int32), time=np.array([5, 6, 0], np.uint32))
    assert sorted(update(BLOCK.empty(MODEL.config), new).value.tolist()) == [0, 0, 0, 3]
