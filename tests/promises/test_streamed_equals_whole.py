"""A user whose events came one by one has the state of a user whose whole history came at once."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from aif_jax import blocks
from aif_jax.encoding.times import stamps
from aif_jax.features import behaviours, no_events
from aif_jax.types import Events, Streamed, UserFeatures
from tests import demo

pytestmark = pytest.mark.usefixtures("light_compilation")
STREAMING = (
    blocks.Bea(bridges=4),
    blocks.DecayedSim("category", slots=3, length=3),
    blocks.DecayedSim("item", slots=8, length=2),
    blocks.DecayedMemory(width=8, dot_product=True),
    blocks.SimTier(tiers=4, bits=32, length=16, windows=(4,), by_action=True),
    blocks.DotProduct(),
)
NOW, EVENTS = 1_700_000_000, 64
MODELS = {
    "blocks that stream": {"blocks": STREAMING, "long_length": EVENTS},
    "blocks of a window": {"long_length": EVENTS},  # they read the last events, which are kept
    "exact": {"blocks": demo.EXACT, "long_length": EVENTS},
    "encoder": {"blocks": (blocks.DotProduct(),), "long_length": EVENTS, "encoder_layers": 2},
}


def log(seed: int) -> tuple[np.ndarray, ...]:
    """Item, action and time of events over years, some of one second, by time."""
    rng = np.random.default_rng(seed)
    reach = rng.choice([60, 3600, 86400, 30 * 86400, 8 * 365 * 86400], EVENTS)
    time = np.sort(NOW - 1 - (reach * rng.random(EVENTS)).astype(np.int64))
    time[7:10], time[-3:] = time[7], time[-1]
    return rng.integers(0, demo.ITEMS, EVENTS).astype(np.int32), rng.integers(0, 4, EVENTS).astype(np.int32), time


@pytest.fixture(scope="module", params=MODELS, ids=lambda name: name.replace(" ", "_"))
def made(request):
    model, params = demo.build(**MODELS[request.param])
    return model, params, jax.jit(model.user), jax.jit(model.update_user), demo.user(model.config)


def streamed(user: UserFeatures, memory, since: Events | None = None, places: int = 8) -> UserFeatures:
    empty = no_events(places)
    since = empty if since is None else jax.tree.map(lambda e, leaf: np.concatenate([leaf, e[len(leaf) :]]), empty, since)
    return dataclasses.replace(user, history=Streamed(memory=memory, since=since, now=stamps(NOW)[()]))


def part(events: Events, at) -> Events:
    return jax.tree.map(lambda leaf: leaf[at], events)


@pytest.mark.parametrize("sizes", [[1] * EVENTS, [EVENTS], [40, 1, 23], [0, 63, 1]])
def test_at_any_split(made, sizes):
    model, params, user_fn, update, user = made
    item, action, time = log(0)
    history = behaviours(item[::-1], action[::-1], NOW - time[::-1], np.ones(EVENTS, bool))
    whole = user_fn(params, dataclasses.replace(user, history=history))
    events, memory, start = Events(item=item, action=action, time=stamps(time)), model.new_user(), 0
    for size in sizes:
        memory, start = update(params, memory, part(events, slice(start, start + size))), start + size
    assert int(memory.count) == EVENTS
    same(user_fn(params, streamed(user, memory)), whole)


def test_the_last_events_may_come_with_the_request(made):
    model, params, user_fn, update, user = made
    item, action, time = log(2)
    events = Events(item=item, action=action, time=stamps(time))
    memory = update(params, model.new_user(), part(events, slice(0, 57)))
    whole = update(params, memory, part(events, slice(57, None)))
    same(user_fn(params, streamed(user, memory, part(events, slice(57, None)))), user_fn(params, streamed(user, whole)))


def test_a_user_without_events_is_the_same_both_ways(made):
    model, params, user_fn, _, user = made
    none = jax.tree.map(np.zeros_like, demo.history(EVENTS, 0))
    same(user_fn(params, streamed(user, model.new_user())), user_fn(params, dataclasses.replace(user, history=none)))


def test_scores_are_the_same(made):
    model, params, user_fn, update, user = made
    item, action, time = log(3)
    history = behaviours(item[::-1], action[::-1], NOW - time[::-1], np.ones(EVENTS, bool))
    memory = update(params, model.new_user(), Events(item=item, action=action, time=stamps(time)))
    joint, items = jax.jit(model.joint), demo.items(30)
    expected = joint(params, dataclasses.replace(user, history=history), items)
    np.testing.assert_allclose(joint(params, streamed(user, memory), items), expected, rtol=1e-5, atol=1e-5)


def test_under_vmap_users_do_not_mix(made):
    model, params, _, update, _ = made
    logs = [log(seed) for seed in range(3)]
    events = Events(**{name: np.stack([one[i] for one in logs]) for i, name in enumerate(("item", "action"))},
                    time=np.stack([stamps(one[2]) for one in logs]))  # fmt: skip
    empty = jax.tree.map(lambda leaf: np.stack([leaf] * 3), model.new_user())
    together = jax.jit(jax.vmap(model.update_user, (None, 0, 0)))(params, empty, events)
    for n in range(3):
        same(part(together, n), update(params, model.new_user(), part(events, n)))


def same(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)
