"""The engine over a user table: rows in place of histories, the same answers, never a row of another model."""

from __future__ import annotations

import asyncio
import dataclasses

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax.checks import VersionMismatch
from aif_jax.index import ItemIndex
from aif_jax.serving import AsyncPreRanker, Request, ServingConfig
from aif_jax.user_table import UserTable
from tests.test_user_table import ARRIVAL, DATA, ENCODER, MODEL, PARAMS, raw

pytestmark = pytest.mark.usefixtures("light_compilation")
NOW = int(DATA.log.time.max()) + 100
CANDIDATES = np.asarray(DATA.items.raw)[:40]
SIZES = dict(buckets=(64,), max_k=8, since_lengths=(16,))


NEWER = jax.tree.map(lambda leaf: leaf + 0.01, {group: part for group, part in PARAMS.items() if group != "fitted"})
NEWER |= {"fitted": PARAMS["fitted"]}


def table_of(params, storage="float32", users=None) -> UserTable:
    made = UserTable(aif.Trained(MODEL, params, ENCODER), storage=storage, batch_size=8)
    at = ARRIVAL if users is None else ARRIVAL[np.isin(DATA.log.user[ARRIVAL], users)]
    made.update(raw(at))
    return made


def index_of(params) -> ItemIndex:
    return ItemIndex.build(aif.Trained(MODEL, params, ENCODER), DATA.catalogue, batch_size=64, progress=False)


def whole(request: Request) -> aif.UserFeatures:
    mine = ARRIVAL[DATA.log.user[ARRIVAL] == request.user]
    return ENCODER.with_length(128).user(None, raw(mine), NOW)


def engine_of(features, storage="float32", **options) -> AsyncPreRanker:
    config = ServingConfig(**SIZES, user_storage=storage, **options)
    return AsyncPreRanker(aif.Trained(MODEL, PARAMS, ENCODER), index_of(PARAMS), features=features, config=config)


@pytest.mark.parametrize("storage", ["float32", "int8"])
async def test_rows_and_histories_get_the_same_answers(storage):
    table = table_of(PARAMS, storage)
    since = raw(ARRIVAL[:0])

    def features(request: Request):
        return table.features(request.user, now=NOW, events=since) if request.context == "row" else whole(request)

    async with engine_of(features, storage, batch_size=2) as engine:
        compiled = dict(engine.metrics()["counters"])
        for user in range(1, 6):
            asked = (Request(user=user, context=how) for how in ("row", "history"))
            row, history = await asyncio.gather(*(engine.score(request, CANDIDATES) for request in asked))
            assert not row.degraded and not history.degraded, (row.reason, history.reason)
            tolerance = 1e-4 if storage == "float32" else 0.05
            np.testing.assert_allclose(row.logits, history.logits, atol=tolerance)
        assert {k: v for k, v in engine.metrics()["counters"].items() if k.startswith("compiled")} == {
            k: v for k, v in compiled.items() if k.startswith("compiled")
        }


async def test_events_since_the_row_count():
    table, mine = table_of(PARAMS, users=[n for n in range(1, 15) if n != 3]), ARRIVAL[DATA.log.user[ARRIVAL] == 3]
    table.update(raw(mine[:-5]))

    def features(request: Request):
        return table.features(3, now=NOW, events=raw(mine[-5:])) if request.context == "row" else whole(request)

    async with engine_of(features) as engine:
        answers = [await engine.score(Request(user=3, context=how), CANDIDATES) for how in ("row", "history")]
        np.testing.assert_allclose(answers[0].logits, answers[1].logits, atol=1e-4)


async def test_a_new_version_takes_its_own_rows_and_histories_until_they_are_there():
    """While rows of the new version are built: its own where a user has one, else the whole history; none of the old one."""
    old, new = table_of(PARAMS), table_of(NEWER, users=[1, 2])
    tables = {table.version: table for table in (old, new)}
    used = []

    def features(request: Request):
        table = tables[request.version]
        used.append((request.version, request.user in table))
        return table.features(request.user, now=NOW) if request.user in table else whole(request)

    async with engine_of(features) as engine:
        before = [await engine.score(user, CANDIDATES) for user in (1, 5)]
        await engine.publish(aif.Trained(MODEL, NEWER, ENCODER), index_of(NEWER))
        after = [await engine.score(user, CANDIDATES) for user in (1, 5)]
    assert used == [(old.version, True), (old.version, True), (new.version, True), (new.version, False)]
    joint, items = jax.jit(MODEL.joint), DATA.catalogue.features(np.arange(1, 41))
    for params, answers in ((PARAMS, before), (NEWER, after)):
        for user, answer in zip((1, 5), answers, strict=True):
            expected = joint(params, dataclasses.replace(whole(Request(user=user)), encoding=""), items)
            np.testing.assert_allclose(answer.logits, expected, atol=1e-4)


async def test_a_row_of_another_model_is_refused():
    table = table_of(NEWER, users=[1])
    async with engine_of(lambda request: table.features(1, now=NOW), fallback=False) as engine:
        with pytest.raises(VersionMismatch, match="UserFeatures.history: expected version"):
            await engine.score(1, CANDIDATES)


@pytest.mark.parametrize(
    ("made", "storage", "message"),
    [
        ("float32", None, "expected a whole history: ServingConfig.user_storage is None, got a row"),
        ("int8", "float32", "expected a row of a UserTable of this model and storage, got Packed"),
        ("decoded", "float32", "expected a row of a UserTable of this model and storage, got UserMemory"),
        ("words", "float32", "expected a row of a UserTable of this model and storage, got Packed"),
        ("places", "float32", "expected one of a history of L=128, a row and 16 events since, got a row and 3 events since"),
    ],
)
async def test_what_the_engine_was_not_compiled_for_is_refused(made, storage, message):
    table = table_of(PARAMS, made if made in ("int8", "float32") else "float32", users=[1])

    def features(request: Request):
        found = table.features(1, now=NOW, places=3 if made == "places" else 16)
        if made == "words":
            row = found.history.memory
            wrong = dataclasses.replace(row, words=row.words.view(np.float32))
            found = dataclasses.replace(found, history=dataclasses.replace(found.history, memory=wrong))
        if made == "decoded":
            found = dataclasses.replace(found, history=dataclasses.replace(found.history, memory=table.memory(1)))
        return found

    async with engine_of(features, storage, fallback=False) as engine:
        with pytest.raises(ValueError, match=message):
            await engine.score(1, CANDIDATES)


def test_events_after_the_request_are_refused_or_left_out():
    table, later = table_of(PARAMS, users=[1]), raw(ARRIVAL[DATA.log.user[ARRIVAL] == 1][:1]) | {"time": np.array([NOW + 61])}
    with pytest.raises(ValueError, match="events: expected times up to 60 s after the request's, got a later one"):
        table.features(1, now=NOW, events=later)
    for seconds in (0, 60):  # clocks differ
        found = table.features(1, now=NOW, events=later | {"time": np.array([NOW + seconds])})
        assert not found.history.since.time.any()
