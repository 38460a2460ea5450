"""The asynchronous engine. Unknown, repeated and no candidates: `tests/reliability/test_fuzz_entries.py`."""

import asyncio
import dataclasses
import io
import os
import re
import subprocess
import sys
import threading
import time
from collections import defaultdict
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import output as progress
from aif_jax.features import pack
from aif_jax.serving import Candidates, DeadlineExceeded, EngineClosed, NonFiniteScores, Overloaded, Request, ServingConfig
from aif_jax.serving.metrics import count_unknown, prometheus_text
from aif_jax.serving.programs import LOGIT, Orders, Programs, orders_of
from aif_jax.serving.scoring import CompiledIndex, UserSide, Version
from aif_jax.serving.versions import compile_index
from tests.refusals import refused_later
from tests.serving_world import ITEMS, WatchedIndex, bids_for, shared, until


def expect(world, answer, user, ids, k, params=None):
    """The answer is the best k of `joint` on these candidates."""
    assert answer.reason is None or "stale" in answer.reason
    logits = world.logits(user, ids, params)
    best = np.argsort(-logits, kind="stable")[:k]
    best = best[logits[best] > -np.inf]
    assert answer.mask.tolist() == [True] * len(best) + [False] * (k - len(best))
    np.testing.assert_array_equal(answer.ids[answer.mask], np.asarray(ids)[best])
    np.testing.assert_allclose(answer.logits[answer.mask], logits[best], rtol=1e-5, atol=1e-5)
    assert np.all(answer.scores[~answer.mask] == -np.inf)


async def test_rank_equals_joint_for_any_number_of_candidates(world):
    async with world.engine() as engine:
        for count in (1, 16, 17, 64):  # within, at and above buckets
            engine.candidates = world.ids[:count]
            answer = await engine.rank(3, 8)
            expect(world, answer, 3, world.ids[:count], 8)
            assert (answer.candidates, answer.unknown, answer.degraded, answer.reason) == (count, 0, False, None)
            assert answer.scores.flags.writeable and answer.logits.flags.writeable
            assert answer.version == world.index.version
        await refused_later(ValueError, "candidates: expected at most 64, .* got 65", engine.score(3, world.ids[:65]))


async def test_excluded_items_are_not_ranked(world):
    """They are counted apart from unknown ones; a repeat of an excluded item is excluded too."""
    ids = np.concatenate([world.ids[:40], [5], world.ids[3:5]])
    best = ids[np.argsort(-world.logits(3, ids), kind="stable")[:6:2]]
    exclude = np.append(best, [7, world.ids[200]])  # of the best, and two that never came
    left = ids[~np.isin(ids, exclude)]
    async with world.engine() as engine:
        for given in (exclude, exclude.tolist(), np.concatenate([exclude, exclude])):
            answer = await engine.rank(Request(user=3, context=ids, exclude=given), 8)
            expect(world, answer, 3, left[np.sort(np.unique(left, return_index=True)[1])], 8)
            assert (answer.candidates, answer.unknown) == (len(ids), 1)
            assert answer.excluded == np.isin(ids, exclude).sum() >= 3
        assert engine.metrics()["counters"]["excluded_candidates"] == 3 * answer.excluded
        scores = await engine.score(Request(user=3, exclude=exclude), ids)
        assert scores.mask.tolist() == (np.isin(ids, left) & (ids != 5)).tolist()
        nothing = await engine.rank(Request(user=3, context=ids[:9], exclude=world.ids), 8)
        assert not nothing.mask.any() and nothing.excluded == 9
        for given in (None, []):
            wrong = engine.rank(Request(user=3, exclude=["a"]), 4, candidates=given)
            await refused_later(TypeError, "Request.exclude: expected integers as the index has, got strings", wrong)
        assert (await engine.rank(Request(user=3, exclude=[]), 4)).excluded == 0


async def test_a_repeat_counts_by_its_higher_bid_where_that_scores_less(world):
    """The best have the cheaper twin alone; whether the request before had repeats makes no difference."""
    ids, bids = world.ids[[5, 5, 3, 9, *range(10, 20)]], np.float32([1, 99, 2, 3, *range(10, 20)])
    async with world.engine(orders={"cheap": lambda p, bid: p[""] * 0 - bid}) as engine:
        for before in (world.ids[:4], world.ids[[7, 7]]):
            await engine.rank(Request(user=3, context=before), 2)
            answer = await engine.rank(Request(user=3, order="cheap", context=Candidates(ids, bids)), 2)
            assert answer.ids.tolist() == world.ids[[3, 9]].tolist() and answer.scores.tolist() == [-2, -3]


async def test_a_request_that_is_late_in_scoring_makes_the_next_one_keep_more_time(world, monkeypatch):
    run, hold, request = CompiledIndex.run, threading.Event(), Request(user=3, feature_version=1)
    async with world.engine() as engine:
        await engine.rank(request, 4)
        before, start = engine._metrics.scoring, time.perf_counter()
        monkeypatch.setattr(CompiledIndex, "run", lambda *words: hold.wait(20) and run(*words))
        await refused_later(DeadlineExceeded, "scoring", engine.rank(request, 4, budget=0.5))
        hold.set()
        assert before < 0.25 < engine._metrics.scoring < time.perf_counter() - start


async def test_item_ids_may_be_strings(world):
    names = np.array([f"item-{raw}" for raw in world.ids])
    trained, sizes = aif.Trained(world.model, world.params), dict(batch_size=64, capacity=512)
    index = aif.ItemIndex.build(trained, (names, world.features), progress=False, **sizes)
    async with world.engine(index=index) as engine:
        by_number = {count: await engine.rank(Request(user=3, context=list(names[:count])), 8) for count in (40, 5)}
        assert by_number[40].ids.tolist() == names[np.argsort(-world.logits(3, world.ids[:40]), kind="stable")[:8]].tolist()
        assert by_number[5].ids[5:].tolist() == ["", "", ""] and not by_number[5].mask[5:].any()
        assert (await engine.rank(Request(user=3, context=names[:0]), 2)).ids.tolist() == ["", ""]


@pytest.mark.parametrize("order", ["logit", "zero"])
async def test_ties_keep_the_candidates_order(world, order):
    """0 and -0 are equal too."""
    alike = np.arange(ITEMS) % 5
    sizes: dict = dict(batch_size=64, capacity=512, progress=False)
    index = aif.ItemIndex.build(aif.Trained(world.model, world.params), [(world.ids, world.take(alike))], **sizes)
    orders = {"zero": lambda p, bid: p[""] * 0 * (bid - 1.5)}
    kind = dict(zip(world.ids.tolist(), alike.tolist() if order == "logit" else [0] * ITEMS, strict=True))
    rng = np.random.default_rng(4)
    async with world.engine(index=index, buckets=(48,), batch_size=2, orders=orders) as engine:
        for user in range(8):
            candidates = rng.permutation(world.ids)[:34]
            answer = await engine.rank(Request(user=user, context=candidates, order=order), 8)
            same = [name for name in candidates.tolist() if kind[name] == kind[int(answer.ids[0])]][:8]
            assert answer.ids.tolist()[: len(same)] == same and len(set(answer.scores[: len(same)].tolist())) == 1


async def test_batched_requests_get_the_answers_of_single_ones(world):
    def break_on_one(ids):
        if 666 in ids:
            raise LookupError("a broken shard")

    index = WatchedIndex(world.index, break_on_one)
    async with world.engine(batch_size=4, score_threads=1, buckets=(32,), index=index) as engine:
        users = [(name, name % 3) for name in range(11)]
        contexts = [world.ids[:13], bids_for(world.ids[:20]), world.ids[5:15]]
        requests = [Request(user=name, context=contexts[kind]) for name, kind in users]
        bad = Request(user=99, context=np.array([666]))
        answers = await asyncio.gather(*[engine.rank(r, 5) for r in [*requests, bad]], return_exceptions=True)
        for request, answer in zip(requests, answers, strict=False):
            expect(world, answer, request.user, getattr(request.context, "ids", request.context), 5)
        assert isinstance(answers[-1], LookupError)
        mixed = [Request(user=1, context=world.ids[:20]), Request(user=2, context=contexts[1], order="bid")]
        by_logit, by_bid = await asyncio.gather(*[engine.rank(r, 5) for r in mixed])
        expect(world, by_logit, 1, world.ids[:20], 5)
        assert by_bid.scores.min() > 0


async def test_requests_that_wait_for_a_thread_share_its_runs(world, monkeypatch):
    runs, run, hold, begun = [], CompiledIndex.run, threading.Event(), threading.Event()
    index = WatchedIndex(world.index, lambda ids: begun.set() or hold.wait(20))  # the first look-up takes until `hold` is set
    async with world.engine(batch_size=4, score_threads=1, buckets=(32,), index=index) as engine:
        engine.candidates = world.ids[:20]
        await asyncio.gather(*[engine.prepare(Request(user=name, feature_version=1)) for name in range(7)])
        monkeypatch.setattr(CompiledIndex, "run", lambda one, users, inputs: runs.append(len(users)) or run(one, users, inputs))
        running = [asyncio.create_task(engine.rank(Request(user=0, feature_version=1), 5))]
        await until(begun.is_set)
        running += [asyncio.create_task(engine.rank(Request(user=name, feature_version=1), 5)) for name in range(1, 7)]
        await until(lambda: len(engine._scoring._waiting) == 6)
        hold.set()
        for name, answer in enumerate(await asyncio.gather(*running)):
            expect(world, answer, name, world.ids[:20], 5)
        assert runs == [1, 4, 2]  # of one, which had nobody to wait for, of four, and of the two that are left


async def test_a_thread_is_woken_once_for_all_that_waits_and_the_loops_thread_runs_no_call(world, monkeypatch):
    threads, hold = [], threading.Event()
    index = WatchedIndex(world.index, lambda ids: threads.append(threading.current_thread()) or hold.wait(20))
    async with world.engine(index=index, score_threads=1, batch_size=1) as engine:
        await engine.prepare(Request(user=3, feature_version=1))
        woken, calls = [], engine._scoring._calls
        counted = SimpleNamespace(put=lambda on: woken.append(True) or calls.put(on), get=calls.get)
        monkeypatch.setattr(engine._scoring, "_calls", counted)
        running = asyncio.gather(*[engine.rank(Request(user=3, feature_version=1), 5) for _ in range(6)])
        await until(lambda: len(threads) == 1 and len(engine._scoring._waiting) == 5)
        hold.set()
        await running
        assert len(threads) == 6 and len(woken) == 1
        expect(world, await engine.rank(Request(user=3, feature_version=1), 5), 3, world.ids[:40], 5)
        assert len(woken) == 2 and threading.current_thread() not in threads


async def test_candidates_that_the_caller_has_are_ranked_without_retrieval(world):
    async with world.engine() as engine:
        engine.retrieval_error = OSError("away")
        for candidates in (world.ids[:40], Candidates(world.ids[:40]), world.ids[:40].tolist()):
            expect(world, await engine.rank(3, 5, candidates=candidates), 3, world.ids[:40], 5)
        assert (await engine.rank(Request(user=3, order="bid"), 5, candidates=bids_for(world.ids[:40]))).mask.all()
        await refused_later(TypeError, "candidates: expected integers or strings", engine.rank(3, 5, candidates=np.ones(1)))
    async with world.engine_of(lambda request: world.user(3), order="bid") as engine:
        engine._current.compiled = engine._current.compiled._replace(orders=Orders((), (), "bid", frozenset()))
        assert (await engine.score(3, world.ids[:40])).mask.all()  # which reads no order, so that none need be there
        expect(world, await engine.rank(Request(user=3, order="logit"), 5, candidates=world.ids[:40]), 3, world.ids[:40], 5)
        await refused_later(ValueError, "an engine with a retrieval callable, got none; pass candidates=", engine.rank(3, 5))


async def test_the_start_says_how_far_it_is(world, monkeypatch, caplog):
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    for name in ("DELAY", "INTERVAL"):
        monkeypatch.setattr(progress, name, 0)
    caplog.set_level("INFO", logger="aif_jax.serving.programs")
    async with world.engine(buckets=(24, 48)):
        pass
    assert re.search("engine: .* 2/2 ", terminal.getvalue())
    assert "compiled score function" in caplog.text


async def test_users_who_wait_for_a_thread_share_a_call_and_get_the_states_of_single_ones(world, monkeypatch):
    hold, calls = threading.Event(), []
    states = Version.states

    def slow(self, words):
        calls.append(len(words))
        hold.wait(20)
        return states(self, words)

    async with world.engine(batch_size=4, user_threads=1, buckets=(32,)) as engine:
        monkeypatch.setattr(Version, "states", slow)
        engine.candidates = world.ids[:20]
        engine.features = lambda name: world.user(name) if name != 5 else "no features"
        running = [asyncio.create_task(engine.rank(0, 5))]
        await until(lambda: calls)
        running += [asyncio.create_task(engine.rank(name, 5)) for name in range(1, 9)]
        await until(lambda: len(engine._users.batches._waiting) == 8)
        hold.set()
        answers = await asyncio.gather(*running)
        for name in range(9):
            if name != 5:
                expect(world, answers[name], name, world.ids[:20], 5)
        assert answers[5].degraded and "failed: TypeError: UserFeatures: expected" in answers[5].reason
        assert calls == [1, 4, 1, 1, 1]  # each is tried alone where one of them fails


async def test_a_state_is_cached_by_user_and_feature_version_and_computed_once_at_a_time(world):
    async with world.engine() as engine:
        for version in ("a", "a", "b"):
            await engine.rank(Request(user=3, feature_version=version), 3)
        assert engine.fetched == [3, 3]
        counters = engine.metrics()["counters"]
        assert (counters["cache_hits"], counters["cache_misses"]) == (1, 2)
        await engine.rank(4, 3)
        await engine.rank(4, 3)
        assert engine.fetched == [3, 3, 4, 4]  # of no known version: each request asks again
        engine.feature_delay = 0.02
        answers = await asyncio.gather(*[engine.rank(Request(user=3, feature_version=1), 3) for _ in range(6)])
        assert engine.fetched == [3, 3, 4, 4, 3]
        metrics = engine.metrics()
        assert metrics["counters"]["cache_joins"] == 5
        assert [metrics["stages"][stage]["count"] for stage in ("features", "user", "total")] == [5, 5, 11]
        for answer in answers:
            expect(world, answer, 3, world.ids[:40], 3)


async def test_requests_without_a_feature_version_share_no_state(world):
    histories = {"before": world.user(3), "after": world.user(17)}

    async def features(request):
        await asyncio.sleep(0.01)
        return histories[request.context]

    async with world.engine_of(features) as engine:
        requests = [Request(user=3, context=when) for when in histories]
        answers = await asyncio.gather(*[engine.score(request, world.ids[:40]) for request in requests])
        for answer, seed in zip(answers, (3, 17), strict=True):
            np.testing.assert_allclose(answer.logits, world.logits(seed, world.ids[:40]), rtol=1e-5, atol=1e-5)
        # but one that `prepare` makes serves them all: the newest, also before it is ready
        await engine.prepare(requests[1])
        preparing = [asyncio.create_task(engine.prepare(request)) for request in requests[::-1]]
        await asyncio.sleep(0)
        for _ in range(2):
            answer = await engine.score(requests[1], world.ids[:40])
            np.testing.assert_allclose(answer.logits, world.logits(3, world.ids[:40]), rtol=1e-5, atol=1e-5)
            await asyncio.gather(*preparing)
        assert engine.metrics()["counters"]["cache_joins"] == 1


async def test_prepare_takes_the_user_side_off_the_request(world):
    async with world.engine() as engine:
        await engine.prepare(3)
        engine.feature_delay = 10.0
        answer = await engine.rank(3, 5, budget=5.0)
        expect(world, answer, 3, world.ids[:40], 5)
        assert engine.fetched == [3] and "user" not in answer.stages
        engine.feature_error, engine.feature_delay = OSError("no features"), 0.0
        await refused_later(OSError, "no features", engine.prepare(4))
        stages = engine.metrics()["stages"]
        assert (stages["features"]["count"], stages["user"]["count"]) == (2, 1)  # also the call that failed


async def test_late_user_side_is_answered_with_the_unknown_user_then_with_the_stale_state(world):
    go = asyncio.Event()

    async def features(request):
        await go.wait()
        return world.user(3)

    async with world.engine_of(features, lambda request: world.ids[:40], reserve=1.0) as engine:
        start = time.perf_counter()
        answer = await engine.rank(3, 5, budget=1.5)
        assert time.perf_counter() - start < 1.5
        assert answer.degraded and "late" in answer.reason and answer.stand_in == "unknown user"
        expect_fallback(world, answer)
        go.set()
        await until(lambda: engine.metrics()["gauges"]["cached_states"])  # the late user side still fills the cache
        assert engine.metrics()["stages"]["features"]["sum"] > 0.4  # a late call shows in its stage
        go.clear()
        answer = await engine.rank(3, 5, budget=1.5)
        assert answer.degraded and "stale state" in answer.reason
        assert answer.stand_in == "stale state"
        expect(world, answer, 3, world.ids[:40], 5)
        assert engine.metrics()["degraded"] == {"late, unknown user": 1, "late, stale state": 1}


async def test_no_answer_uses_a_state_older_than_max_stale(world, monkeypatch):
    async with world.engine(max_stale=0.5) as engine:
        request, now = Request(user=3, feature_version=1), [2.0**32 + 30]  # where a float32 counts by 512
        monkeypatch.setattr(time, "perf_counter", lambda: now[0])
        monkeypatch.setattr("aif_jax.serving.engine.Timeline", lambda: aif.serving.requests.Timeline(now[0]))
        first = await engine.rank(request, 5, budget=np.float32(5))
        assert 0 <= first.state_age < 0.5 and first.stand_in is None
        now[0] += 0.2
        assert (await engine.rank(request, 5)).state_age > first.state_age  # the same state
        engine.feature_error = OSError("away")
        stale = await engine.rank(Request(user=3, feature_version=2), 5)
        assert "stale state of 0." in stale.reason and 0.1 < stale.state_age < 0.5
        now[0] += 0.5
        for version in (1, 2):  # of the same features too: the ages of their events have changed
            answer = await engine.rank(Request(user=3, feature_version=version), 5)
            assert "unknown user" in answer.reason and answer.state_age is None
        assert engine.metrics()["gauges"]["cached_states"] == 0


async def test_features_of_another_encoder_are_refused_by_name(world):
    trained = aif.Trained(world.model, world.params, SimpleNamespace(version="ab12", schema=world.model.config.schema))
    index = WatchedIndex(world.index, trained=trained, encoding="ab12", version=trained.version)
    async with world.engine(index=index) as engine:
        compiled = dict(world.programs.compiles)
        for encoding, reason in (("ab12", None), ("", None), ("cd34", "UserFeatures: expected the encoding ab12, got cd")):
            encoded = dataclasses.replace(world.user(3), encoding=encoding)
            engine.features = lambda name, encoded=encoded: encoded
            answer = await engine.rank(3, 5)
            assert reason in answer.reason if reason else not answer.degraded
        assert dict(world.programs.compiles) == compiled  # the name of an encoding is no shape


def expect_fallback(world, answer):
    config = world.model.config
    unknown = aif.empty_user(config.schema, length=config.history_length)
    logits = np.asarray(world.joint(world.params, unknown, world.features))[:40]
    np.testing.assert_array_equal(answer.ids, world.ids[np.argsort(-logits, kind="stable")[: len(answer.ids)]])


async def test_failing_and_wrong_features_degrade_that_request_alone(world):
    wrong = dataclasses.replace(world.user(4), floats=np.zeros(1, np.float32))
    async with world.engine() as engine:
        engine.feature_error = OSError("feature store is away")
        answer = await engine.rank(3, 5)
        assert answer.degraded and "feature store is away" in answer.reason
        expect_fallback(world, answer)
        engine.feature_error = None
        engine.features = lambda name: wrong if name == 4 else world.user(name)
        answers = await asyncio.gather(engine.rank(3, 5), engine.rank(4, 5))
        expect(world, answers[0], 3, world.ids[:40], 5)
        assert "UserFeatures.floats: expected shape" in answers[1].reason


async def test_without_fallback_the_error_is_raised(world):
    async with world.engine(fallback=False) as engine:
        engine.feature_error = OSError("away")
        await refused_later(OSError, "away", engine.rank(3, 5))
        engine.feature_error, engine.feature_delay = None, 5.0
        for late in (engine.rank(3, 5, budget=0.05), engine.score(3, world.ids[:9], budget=0.05)):
            await refused_later(DeadlineExceeded, "^user side", late)


async def test_retrieval_that_fails_or_is_late_is_the_callers_error_in_time(world):
    async with world.engine() as engine:
        engine.retrieval_error = KeyError("shard 3")
        await refused_later(KeyError, "shard 3", engine.rank(3, 5))
        engine.retrieval_error = TimeoutError("of its own")
        await refused_later(TimeoutError, "of its own", engine.rank(3, 5, budget=20.0))
        engine.retrieval_error, engine.retrieval_delay = None, 100.0
        start = time.perf_counter()
        await refused_later(DeadlineExceeded, "retrieval", engine.rank(3, 5, budget=0.05))
        assert time.perf_counter() - start < 10.0  # retrieval would take a hundred
        await asyncio.sleep(0)
        assert engine.ended[-1] == "retrieval"
        assert engine.metrics()["failed"] == {"KeyError": 1, "TimeoutError": 1, "DeadlineExceeded": 1}


async def test_cancelling_a_request_frees_what_it_held(world):
    async with world.engine() as engine:
        engine.feature_delay = engine.retrieval_delay = 10.0
        task, other = (asyncio.create_task(engine.rank(Request(user=3, feature_version=1), 5)) for _ in range(2))
        await until(lambda: engine.metrics()["gauges"]["pending"] == 2 and engine.fetched)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert engine.ended == ["retrieval"]  # the other one still waits for the same user
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)
        await asyncio.sleep(0)
        assert engine.ended == ["retrieval", "retrieval", "features"]
        metrics = engine.metrics()
        assert metrics["gauges"]["pending"] == metrics["gauges"]["user_sides_running"] == 0
        assert metrics["counters"]["cancelled"] == 2
        engine.feature_delay = engine.retrieval_delay = 0.0
        expect(world, await engine.rank(3, 5), 3, world.ids[:40], 5)


async def test_a_request_that_could_not_be_answered_in_time_is_refused_at_once(world):
    index = WatchedIndex(world.index, lambda ids: time.sleep(0.05))
    async with world.engine(score_threads=1, buckets=(64,), index=index) as engine:
        for name in range(30):  # the engine learns what a request takes
            await engine.rank(name, 5)
        budget = 10 * engine._scoring.seconds
        many = [engine.rank(name, 5, budget=budget) for name in range(40)]
        answers = await asyncio.gather(*many, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, Overloaded)]
        assert 25 <= len(refused) < 40 and f"too much for an answer within {budget} s" in str(refused[0])
        assert engine.metrics()["counters"]["refused"] == len(refused)
        assert len(await asyncio.gather(*[engine.rank(name, 5) for name in range(20)])) == 20  # without a budget


async def test_more_requests_than_max_pending_are_refused_at_once(world):
    go = asyncio.Event()

    async def retrieval(request):
        await go.wait()
        return world.ids[:40]

    async with world.engine_of(lambda request: world.user(request.user), retrieval, max_pending=2) as engine:
        running = [asyncio.create_task(engine.rank(name, 5)) for name in (1, 2)]
        await asyncio.sleep(0)
        await refused_later(Overloaded, "2 requests", engine.rank(3, 5))  # while the ones under way wait
        go.set()
        for name, answer in zip((1, 2), await asyncio.gather(*running), strict=True):
            expect(world, answer, name, world.ids[:40], 5)
        expect(world, await engine.rank(3, 5), 3, world.ids[:40], 5)
        assert engine.metrics()["counters"]["refused"] == 1


async def test_shutdown_drains_and_refuses_what_is_new(world):
    engine = world.engine()
    await refused_later(EngineClosed, "", engine.rank(3, 5))
    async with engine:
        engine.retrieval_delay = 0.05
        running = asyncio.create_task(engine.rank(3, 5))
        await asyncio.sleep(0)
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        await refused_later(EngineClosed, "", engine.rank(4, 5))
        await closing
        expect(world, await running, 3, world.ids[:40], 5)
    await refused_later(EngineClosed, "starts once", engine.__aenter__())
    starting = asyncio.create_task((other := world.engine()).__aenter__())
    await asyncio.sleep(0)
    await other.close()
    await refused_later(EngineClosed, "closed while it started", starting)


async def test_shutdown_ends_what_does_not_drain(world):
    async with world.engine(drain_timeout=0.05) as engine:
        engine.retrieval_delay = 30.0
        running = [asyncio.create_task(engine.rank(3, 5, budget=budget)) for budget in (None, 20.0)]
        await asyncio.sleep(0.01)
    for request in running:
        await refused_later(EngineClosed, "retrieval: no answer before the engine closed", request)
    assert engine.metrics()["failed"] == {"EngineClosed": 2} and engine.metrics()["counters"]["cancelled"] == 0


async def test_wrong_questions_get_plain_answers(world):
    async with world.engine() as engine:
        for k in (0, 9, 2.5, None):
            await refused_later(ValueError, "expected 1 to max_k=8", engine.rank(3, k))
        for budget in (0, -1, np.nan, np.inf, "1"):
            await refused_later(ValueError, "budget: expected None or more than 0 seconds", engine.rank(3, 5, budget=budget))
        for ids, message in (
            (np.array([1.5]), "candidates: expected integers or strings.* got dtype float64"),
            ([1000, "1000"], "candidates: .* got int, then str at position 1"),
            (np.array([1000, None]), "candidates: .* got int, then NoneType at position 1"),
            (np.array([1000, 2**63], object), "candidates: expected integers .* got 9223372036854775808"),
            (np.array([1000, 2**63], np.uint64), "candidates: expected integers .*2.63"),
            (np.array(["a", None], np.dtypes.StringDType(na_object=None)), "candidates: .* got str, then NoneType"),
            (["a", "b"], "expected integers"),  # which the index has
        ):
            await refused_later(TypeError, message, engine.rank(Request(user=3, context=ids), 3))
        for ids, got in ((np.zeros((2, 2), np.int64), r"shape \[2, 2\]"), ({1000}, "set")):
            message = rf"expected item ids \[C\], .* got {got}"
            await refused_later(ValueError, message, engine.rank(Request(user=3, context=ids), 3))
        assert (await engine.rank(Request(user=3, order=None), 4)).mask.all()


async def test_an_index_of_other_params_is_refused_and_updates_are_seen_by_new_requests(world):
    other = world.other_params(1)
    unlike = aif.AsyncPreRanker(aif.Trained(world.model, other), world.index, features=lambda request: None)
    await refused_later(aif.VersionMismatch, "", unlike.__aenter__())
    async with world.engine() as engine:
        await refused_later(aif.VersionMismatch, "", engine.publish(aif.Trained(engine.model, other), world.index))
        await refused_later(aif.VersionMismatch, "", engine.update_index(world.index_of(other)))
        await refused_later(TypeError, "index: expected one of ItemIndex.build or load, got None", engine.update_index(None))
        expect(world, await engine.rank(3, 5), 3, world.ids[:40], 5)
        await engine.update_index(world.index.delete(world.ids[:1]))
        answer = await engine.rank(3, 5)
        assert answer.unknown == 1 and world.ids[0] not in answer.ids
        await engine.update_index(world.index)
        expect(world, await engine.rank(3, 5), 3, world.ids[:40], 5)


async def test_a_model_with_non_finite_parameters_or_scores_never_serves(world):
    broken = jax.tree.map(np.array, world.other_params(1))
    broken["user"]["tower"]["layer_0"]["bias"][3] = np.nan
    overflowing = jax.tree.map(np.array, world.other_params(1))
    for layer in overflowing["head"]["rest"].values():
        layer["kernel"] *= np.float32(1e30)
    async with world.engine() as engine:
        with pytest.raises(ValueError, match=r"params user/tower/layer_0/bias: expected finite values, got nan"):
            await engine.publish(aif.Trained(engine.model, broken), world.index_of(broken))
        with pytest.raises(NonFiniteScores, match="scores of .* user.* are NaN or infinite"):
            await engine.publish(aif.Trained(engine.model, overflowing), world.index_of(overflowing))
        answer = await engine.rank(3, 5)
        expect(world, answer, 3, world.ids[:40], 5)
        assert answer.version == world.index.version and engine.metrics()["counters"].get("publishes", 0) == 0


async def test_items_without_a_finite_score_are_counted_and_left_out(world):
    huge = world.take(np.arange(3))
    huge = dataclasses.replace(huge, content=np.full_like(huge.content, 3e38))
    async with world.engine() as engine:
        await engine.update_index(world.index.upsert(world.ids[:3], huge))
        answer = await engine.rank(3, 5)
        expect(world, answer, 3, world.ids[3:40], 5)
        assert (answer.non_finite, answer.unknown) == (3, 0)
        scores = await engine.score(3, world.ids[:6])
        assert scores.mask.tolist() == [False] * 3 + [True] * 3 and scores.non_finite == 3
        for nothing_left in (engine.rank(Request(user=3, context=world.ids[:3]), 5), engine.score(3, world.ids[:3])):
            await refused_later(NonFiniteScores, "all 3 known candidates", nothing_left)
        metrics = engine.metrics()
        assert metrics["counters"]["non_finite_scores"] == 12 and metrics["failed"] == {"NonFiniteScores": 2}


def test_a_request_gets_the_same_bits_in_every_place_of_a_batch(world):
    programs, config = Programs(world.model, max_k=8), ServingConfig(buckets=(32,), max_k=8, batch_size=3)
    words, states = np.stack([pack(world.user(name)) for name in (3, 7, 8)]), programs.user(world.params, 3)
    users = [UserSide(state, 0.0) for state in states(words, np.int32(3))]
    jax.tree.map(np.testing.assert_array_equal, states(words[[1, 2, 0]], np.int32(1))[0], users[1].state)
    compiled = compile_index(programs, world.params, users[0], world.index, config, orders_of(world.model.config, config))
    rows, found = [np.arange(first, last, dtype=np.int32) for first, last in ((0, 20), (9, 25), (0, 3))], defaultdict(set)
    for places in ([0], [1], [2], [0, 1], [1, 0], [2, 1, 0]):
        inputs = compiled.inputs([rows[place] for place in places], [None] * len(places), LOGIT, 32)
        results = map(np.asarray, compiled.run([users[place] for place in places], inputs))
        for place, best, logits in zip(places, *results, strict=False):
            found[place].add((best.tobytes(), logits.tobytes()))
    assert [len(bits) for bits in found.values()] == [1, 1, 1]


INLINE = """
import jax, jax.numpy as jnp
from aif_jax.cli import main
assert main(["serve", "no-such-folder"]) == 2
x = jnp.ones((128, 128))
step = jax.jit(lambda x: jax.lax.fori_loop(0, 300, lambda i, y: jnp.tanh(y @ x), x)).lower(x).compile()
jax.block_until_ready(x)
ready = step(x).is_ready()
print(jax.config.read("jax_cpu_enable_async_dispatch"), ready)
"""


@pytest.mark.lane("standing")
@pytest.mark.parametrize(("environment", "shown"), [({}, "False True"), ({"JAX_CPU_ENABLE_ASYNC_DISPATCH": "true"}, "True")])
def test_a_process_that_serves_computes_in_the_calling_thread(environment, shown):
    without = {name: value for name, value in os.environ.items() if name != "JAX_CPU_ENABLE_ASYNC_DISPATCH"}
    done = subprocess.run([sys.executable, "-c", INLINE], capture_output=True, text=True, check=True, env=without | environment)
    assert done.stdout.startswith(shown), done.stderr


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
        return [await engine.rank(request, 5) for request in requests], engine.metrics()


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
    given, metrics = await answers(user(19, items=15), requests=[Request(user=3, feature_version=1)] * 3)
    assert [answer.degraded for answer in given] == [True] * 3 and metrics["degraded"] == {"unknown history": 3}
    assert metrics["counters"]["history_events"] == 19 and metrics["counters"]["cache_hits"] == 2


async def test_candidates_are_counted_like_events():
    ids = np.append(shared().ids[:30], np.arange(5))
    (ranked, _), metrics = await answers(user(5), requests=[Request(user=3, context=ids), Request(user=4)])
    assert (ranked.candidates, ranked.unknown) == (35, 5)
    assert (metrics["counters"]["candidates"], metrics["counters"]["unknown_candidates"]) == (75, 5)
    text = prometheus_text(metrics)
    for line in ("aif_unknown_candidates_total 5.0", "aif_candidates_total 75.0", "aif_history_events_total 10.0"):
        assert line in text


def test_the_world_of_these_tests_has_no_unknown_history():
    """Else the promises of other tests would rest on marked answers."""
    assert {count_unknown(shared().user(name)).warning(ServingConfig().max_unknown) for name in range(20)} == {None}
