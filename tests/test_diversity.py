"""The cut with at most m of a group: exact against the plain rule, on the device and in the engine."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax.serving import Candidates, Request
from aif_jax.serving.programs import LEAST_WINDOW, capped_top_k, within_cap


def plain(values, groups, k: int, most: int) -> list[int]:
    """From the best to the worst, without one whose group has `most` already."""
    chosen, count = [], {}
    for place in sorted(range(len(values)), key=lambda i: -values[i]):  # sorted is stable
        if values[place] > -np.inf and count.get(groups[place], 0) < most and len(chosen) < k:
            chosen.append(place)
            count[groups[place]] = count.get(groups[place], 0) + 1
    return chosen


@pytest.mark.parametrize(("count", "k"), [(1000, 100), (700, 300), (90, 90), (5, 3)])
def test_the_device_cuts_as_the_plain_rule_does(count, k):
    compiled = {most: jax.jit(lambda v, g, most=most: capped_top_k(v, g, k, most)) for most in (1, 3, count + 5)}
    assert (max(2 * k, LEAST_WINDOW) < count) == (count >= 700)  # the first two have a window
    for seed in range(12):
        rng = np.random.default_rng(seed)
        values = rng.normal(size=count).astype(np.float32)
        values = np.round(values, 1) + 0 if seed % 3 == 1 else values  # ties, of one zero
        values[rng.random(count) < (0.9 if seed % 4 == 3 else 0.1)] = -np.inf  # candidates that are none
        groups = rng.integers(0, (2, 20, 2000)[seed % 3], count).astype(np.float32)  # the first: too few groups for the window
        for most, function in compiled.items():
            best, positions = (np.asarray(part) for part in function(values, groups))
            expected = plain(values, groups, k, most)
            mask = best > -np.inf
            assert positions[mask].tolist() == expected, (seed, most)
            np.testing.assert_array_equal(best[mask], values[expected])
            assert not mask[len(expected) :].any()


@pytest.mark.parametrize("groups", ["none alike", "all alike", "one large", "one of a kind last"])
def test_further_windows_hold_what_the_first_lacks(groups):
    """Groups that need one window, two where nothing is left, and two or more where candidates far down enter."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=1000).astype(np.float32)
    last = np.where(np.arange(1000) < 990, np.arange(1000) // 330, np.arange(1000))
    large = np.where(rng.random(1000) < 0.8, 0, rng.integers(0, 150, 1000))
    made = {"none alike": np.arange(1000), "all alike": np.zeros(1000), "one large": large, "one of a kind last": last}[groups]
    values = np.sort(values)[::-1].copy() if groups == "one of a kind last" else values
    for dtype in (np.float32, np.int32):
        best, positions = jax.jit(lambda v, g: capped_top_k(v, g, 100, 2))(values, made.astype(dtype))
        expected = plain(values, made, 100, 2)
        assert np.asarray(positions)[np.asarray(best) > -np.inf].tolist() == expected
        assert len(expected) == {"all alike": 2, "one of a kind last": 16}.get(groups, 100)


def test_on_the_host_it_is_the_same_rule():
    rng = np.random.default_rng(1)
    for most in (1, 2, 5):
        groups = rng.integers(0, 9, 60)
        values = -np.arange(60.0)
        assert np.flatnonzero(within_cap(groups, most)).tolist() == plain(values, groups, 60, most)
    assert within_cap(np.zeros(0), 1).tolist() == []


# the engine


@pytest.fixture(scope="module")
def coarse(world) -> tuple:
    """An index whose bids are one of five numbers: the groups."""
    bids = (1 + np.arange(len(world.ids)) * 7 % 5).astype(np.float32)
    features = jax.tree.map(lambda leaf: leaf, world.features)
    features.side["bid"] = bids
    sizes = dict(batch_size=64, capacity=512, progress=False)
    return aif.ItemIndex.build(aif.Trained(world.model, world.params), features, ids=world.ids, **sizes), bids


async def test_the_engine_cuts_in_one_bucket_in_pieces_and_in_mini_batches(world, coarse):
    index, groups = coarse
    async with world.engine(index=index, group="bid", group_cap=2, buckets=(64,)) as engine:
        for count in (40, 150):  # in one piece, and in three
            logits = world.logits(3, world.ids[:count])
            answer = await engine.rank(Request(user=3, context=world.ids[:count]), 8)
            expected = plain(logits, groups[:count], 8, 2)
            assert answer.ids[answer.mask].tolist() == world.ids[expected].tolist() and len(expected) == 8
            np.testing.assert_allclose(answer.scores[:8], logits[expected], atol=1e-4)
            value = 1 / (1 + np.exp(-logits.astype(np.float64))) * groups[:count]
            priced = await engine.rank(Request(user=3, context=world.ids[:count], order="bid"), 8)
            assert priced.ids.tolist() == world.ids[plain(value, groups[:count], 8, 2)].tolist()

        async def stream():
            for start in range(0, 90, 30):
                yield world.ids[start : start + 30]
            yield np.concatenate([world.ids[:3], [7]])  # again, and one that is unknown

        answer = await engine.rank(Request(user=3, context=stream()), 8)
        assert answer.ids.tolist() == world.ids[plain(world.logits(3, world.ids[:90]), groups[:90], 8, 2)].tolist()
        assert answer.unknown == 1 and answer.candidates == 94
        twice = np.concatenate([world.ids[:40], world.ids[:40]])[:60]  # repeats take no place of their group
        answer = await engine.rank(Request(user=3, context=twice), 8)
        assert answer.ids.tolist() == world.ids[plain(world.logits(3, world.ids[:40]), groups[:40], 8, 2)].tolist()
        given = Candidates(world.ids[:40], groups[:40] * 0 + 1)
        same = await engine.rank(Request(user=3, context=given, order="bid"), 8)
        assert len(same.ids[same.mask]) == 8
        scored = await engine.score(3, world.ids[:10])
        np.testing.assert_allclose(scored.logits, world.logits(3, world.ids[:10]), atol=1e-4)


def test_groups_that_no_row_has_are_refused(world):
    with pytest.raises(ValueError, match=r"ServingConfig.group: expected a side value among \['bid'\], got 'author'"):
        world.engine(group="author")
