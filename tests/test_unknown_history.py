"""What the model does not know of a history: counted, and marked in the answer above a bound."""

import dataclasses

import numpy as np
import pytest

from aif_jax.serving import Request, ServingConfig
from aif_jax.serving.metrics import count_unknown, prometheus_text
from tests.serving_world import shared

COUNTED = ("history_events", "unknown_events", "unknown_actions", "unknown_attributes")


def user(events: int, *, items: int = 0, actions: int = 0, attributes: bool = True):
    """Features with so many events, of which so many have an unknown item, and others an unknown action."""
    made = shared().user(events)
    assert (mask := made.history.mask).sum() == events
    place = np.cumsum(mask) - 1
    item = np.where(mask & (place >= items), np.maximum(made.history.item, 1), 0).astype(np.int32)
    action = np.where(mask & (place < events - actions), np.maximum(made.history.action, 1), 0).astype(np.int32)
    ids = {name: np.full_like(value, int(attributes)) for name, value in made.ids.items()}
    return dataclasses.replace(made, ids=ids, history=dataclasses.replace(made.history, item=item, action=action))


async def answers(features, config=None, requests=(3,)):
    """The answers to some requests of a user with these features, and the engine's metrics."""
    async with shared().engine(**(config or {})) as engine:
        engine.features = lambda name: features
        given = [await engine.rank(request, 5) for request in requests]
        return given, engine.metrics()


@pytest.mark.parametrize(("features", "config", "marked"), [
    (dict(events=19, items=19), {}, True),
    (dict(events=19, items=10), {}, True),
    (dict(events=18, items=9), {}, False),  # not more than half
    (dict(events=19, actions=12), {}, True),
    (dict(events=19, items=9, actions=9), {}, False),
    (dict(events=4, items=4), {}, False),  # too few to tell
    (dict(events=19), {}, False),
    (dict(events=19, attributes=False), {}, False),  # a new user
    (dict(events=0), {}, False),
    (dict(events=19, items=19), {"max_unknown": None}, False),
    (dict(events=19, items=19), {"max_unknown": 1.0}, False),
    (dict(events=19, items=2), {"max_unknown": 0.1}, True),
])  # fmt: skip
async def test_unknown_events_are_counted_and_a_large_share_marks_the_answer(features, config, marked):
    (answer,), metrics = await answers(user(**features), config)
    unknown = 0 if features.get("attributes", True) else 2
    expected = (features["events"], features.get("items", 0), features.get("actions", 0), unknown)
    assert tuple(metrics["counters"][name] for name in COUNTED) == expected
    assert answer.degraded == marked and answer.mask.all()
    assert metrics["degraded"] == ({"unknown history": 1} if marked else {})
    if marked:
        shown = f"{expected[1]} of {expected[0]} events have an unknown item, {expected[2]} an unknown action"
        assert f"history: {shown}, more than max_unknown=" in answer.reason
    else:
        assert answer.reason is None


async def test_the_mark_stays_with_the_state_and_the_events_count_once():
    requests = [Request(user=3, feature_version=1)] * 3
    given, metrics = await answers(user(19, items=15), requests=requests)
    assert [answer.degraded for answer in given] == [True] * 3 and metrics["degraded"] == {"unknown history": 3}
    assert metrics["counters"]["history_events"] == 19 and metrics["counters"]["cache_hits"] == 2


async def test_candidates_are_counted_like_events():
    world = shared()
    ids = np.append(world.ids[:30], np.arange(5))
    (ranked, _), metrics = await answers(user(5), requests=[Request(user=3, context=ids), Request(user=4)])
    assert (ranked.candidates, ranked.unknown) == (35, 5)
    assert (metrics["counters"]["candidates"], metrics["counters"]["unknown_candidates"]) == (75, 5)
    text = prometheus_text(metrics)
    for line in ("aif_unknown_candidates_total 5.0", "aif_candidates_total 75.0", "aif_history_events_total 10.0"):
        assert line in text


def test_the_world_of_these_tests_has_no_unknown_history():
    """Else the promises of other tests would rest on marked answers."""
    assert {count_unknown(shared().user(name)).warning(ServingConfig().max_unknown) for name in range(20)} == {None}
