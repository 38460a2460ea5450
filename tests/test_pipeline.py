"""The pipeline: the same batches in every run, resumed, shared among processes, cut to length; bad records named."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import losses, train
from aif_jax.data.candidates import sampled
from aif_jax.data.events import EventLog
from aif_jax.data.pipeline import Pipeline, problem_of, to_device
from aif_jax.data.positions import Positions
from aif_jax.data.sampling import NegativeSampler, item_counts
from aif_jax.data.synthetic import synthetic_world


@pytest.fixture(scope="module")
def dataset():
    return synthetic_world(0, users=30, items=120, topics=12, categories=8, events_per_user=40, lag=8, content_dim=12).dataset


def pipeline(dataset, *, counted=None, **changes) -> Pipeline:
    """`counted` is the data set that popularity is taken from, where `dataset` has a damaged log."""
    config = aif.Config(schema=dataset.schema, width=8, short_length=4, long_length=32, memory=(), simtier="off", bridges=2)
    positions = Positions.eligible((counted or dataset).log, min_history=1)
    sampler = NegativeSampler(item_counts(counted or dataset, positions))
    source = sampled(dataset, sampler=sampler, negatives=2)
    return Pipeline(
        **{
            "dataset": dataset, "positions": positions, "candidates": source, "config": config, "batch_size": 48, "epochs": 2,
            **changes,
        }
    )  # fmt: skip


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


SHAPES = [{}, {"buckets": (8, 16), "window": 4}, {"block": 10, "block_window": 8}]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_sample_once_an_epoch_and_a_cursor_resumes(dataset, shape):
    feed = pipeline(dataset, **shape)
    whole = list(feed.batches())
    assert len(whole) == len(feed) == 2 * feed.steps_per_epoch > 20
    for epoch in range(2):
        fed = whole[epoch * feed.steps_per_epoch : (epoch + 1) * feed.steps_per_epoch]
        taken = np.concatenate([one.positions for one in fed])
        assert len(np.unique(taken)) == len(taken) == feed.steps_per_epoch * 48
        assert [one.place for one in fed] == [(epoch, step) for step in range(feed.steps_per_epoch)]
    assert not np.array_equal(whole[0].positions, whole[feed.steps_per_epoch].positions)
    for at in (0, 6, feed.steps_per_epoch - 1, feed.steps_per_epoch, len(feed) - 1):
        cursor = json.loads(json.dumps(whole[at].cursor))  # as a checkpoint keeps it
        rest = list(pipeline(dataset, **shape).batches(cursor))
        assert len(rest) == len(feed) - at - 1
        assert all(same(one.batch, other.batch) for one, other in zip(rest, whole[at + 1 :], strict=True))


def test_a_cursor_of_another_pipeline_is_refused(dataset):
    cursor = next(pipeline(dataset).batches()).cursor
    for other in ({"seed": 1}, {"batch_size": 24}, {"positions": range(100)}):
        with pytest.raises(ValueError, match="cursor: expected one of a pipeline with"):
            pipeline(dataset, **other).batches(cursor)


@pytest.mark.parametrize("shape", SHAPES)
def test_processes_share_every_batch_without_overlap(dataset, shape):
    one = [fed for fed in pipeline(dataset, **shape).batches()]
    parts = [list(pipeline(dataset, process_index=p, process_count=3, **shape).batches()) for p in range(3)]
    assert {len(part) for part in parts} == {len(one)}
    for whole, *slices in zip(one, *parts, strict=True):
        np.testing.assert_array_equal(whole.positions, np.concatenate([fed.positions for fed in slices]))
        assert {fed.batch.users.long.mask.shape for fed in slices} == {(16, whole.batch.users.long.mask.shape[1])}
        negatives = [fed.batch.items.ids["item"][:, 1:].tolist() for fed in slices]
        assert negatives[0] != negatives[1] != negatives[2]  # drawn apart


def test_buckets_cut_padding_and_lose_no_event(dataset):
    plain, cut = pipeline(dataset), pipeline(dataset, buckets=(8, 16), window=8)
    assert cut.lengths == (8, 16, 32)
    lengths = []
    for fed in cut.batches():
        long, log = fed.batch.users.long, dataset.log
        history = np.minimum(log.history_end(fed.positions) - log.offsets[log.user[fed.positions]], 32)
        lengths.append(long.mask.shape[1])
        np.testing.assert_array_equal(long.mask.sum(axis=1), history)
        assert lengths[-1] == min(length for length in cut.lengths if length >= history.max())
        assert fed.padding == pytest.approx(1 - history.sum() / (48 * lengths[-1]))
    assert set(lengths) == {8, 16, 32}
    assert lengths != sorted(lengths)  # short and long batches are mixed
    places = [sum(fed.places for fed in feed.batches()) for feed in (plain, cut)]
    events = [sum(fed.events for fed in feed.batches()) for feed in (plain, cut)]
    padding = [1 - e / p for e, p in zip(events, places, strict=True)]
    assert padding[1] < 0.65 * padding[0], padding


def test_the_loss_of_a_sample_does_not_depend_on_its_bucket(dataset):
    config = aif.tiny(dataset.schema, long_length=32)
    frozen = aif.lsh.fit(dataset.catalogue.content, config)
    signed = dataset.with_signatures(np.asarray(aif.lsh.sign(frozen, jnp.asarray(dataset.catalogue.content))))
    model = aif.build(config)
    params = jax.jit(model.init)(jax.random.key(0), frozen=frozen)
    cut = pipeline(signed, config=config, buckets=(8,), window=8, batch_size=16)
    fed = next(fed for fed in cut.batches() if fed.batch.users.long.mask.shape[1] == 8)

    def loss(batch):
        scores = train.score(model, params, batch)
        return jax.vmap(losses.listwise_softmax)(scores, batch.labels, where=batch.where)

    full = cut._make(fed.positions, 32, *fed.place, fed.cursor)
    assert full.batch.users.long.mask.shape[1] == 32 and same(full.batch.items, fed.batch.items)
    short, long = jax.jit(loss)(fed.batch), jax.jit(loss)(full.batch)
    assert np.std(long) > 0.01
    np.testing.assert_allclose(short, long, rtol=2e-5, atol=2e-6)


def test_a_thread_on_the_way_to_the_device_changes_nothing(dataset):
    feed = pipeline(dataset, epochs=1)
    with to_device(feed.batches()) as batches:
        for fed, plain in zip(batches, feed.batches(), strict=True):
            assert isinstance(fed.batch.labels, jax.Array) and same(fed.batch, plain.batch)
            assert (fed.cursor, fed.padding, fed.place) == (plain.cursor, plain.padding, plain.place)


def damaged(dataset, tmp_path, *, column: str, at: int, value: int):
    """The data set on a log in files, one value of which is overwritten after it was opened and checked."""
    dataset.log.save(tmp_path / "log")
    opened = dataclasses.replace(dataset, log=EventLog.load(tmp_path / "log"))
    np.load(tmp_path / "log" / f"{column}.npy", mmap_mode="r+")[at] = value
    return opened


@pytest.mark.parametrize("buckets", [(), (8,)])
@pytest.mark.parametrize(
    "column, value, message",
    [
        ("item", 10**6, r"expected item in \[0, 121\), got 1000000; it is in the history of user 5"),
        ("item", -1, r"expected item in \[0, 121\), got -1; it is in the history of user 5"),
        ("action", 77, r"expected action in \[0, 3\), got 77; it is in the history of user 5"),
        ("time", -(2**62) - 9, r"expected age in \[0, \d+\), got \d+; it is in the history of user 5"),
    ],
)
def test_a_corrupt_record_in_a_history_is_named_by_its_position(dataset, tmp_path, buckets, column, value, message):
    event = int(dataset.log.offsets[5]) + 10
    broken = damaged(dataset, tmp_path, column=column, at=event, value=value)
    after = np.arange(event + 1, event + 20)
    fed = next(pipeline(broken, counted=dataset, positions=after, batch_size=len(after), buckets=buckets).batches())
    assert fed.batch is None and re.search(f"event {event} of the log is corrupt: {message}", fed.problem), fed.problem
    untouched = np.arange(int(dataset.log.offsets[6]), int(dataset.log.offsets[8]))
    fed = next(pipeline(broken, counted=dataset, positions=untouched, batch_size=len(untouched), buckets=buckets).batches())
    assert fed.problem is None


@pytest.mark.parametrize("buckets", [(), (8,)])
@pytest.mark.parametrize("column, limit", [("user", 31), ("item", 121)])
def test_a_corrupt_sample_is_named_by_its_position(dataset, tmp_path, buckets, column, limit):
    broken = damaged(dataset, tmp_path, column=column, at=50, value=999)
    feed = pipeline(broken, counted=dataset, positions=[49, 50, 51], batch_size=3, buckets=buckets)
    assert f"event 50 of the log is corrupt: expected {column} in [0, {limit}), got 999" in next(feed.batches()).problem


def test_problems_of_a_batch(dataset):
    batch = next(pipeline(dataset).batches()).batch
    assert problem_of(batch) is None
    assert problem_of(dataclasses.replace(batch, where=np.zeros_like(batch.where))) == "empty"
    labels = batch.labels.copy()
    labels[7, 1] = np.nan
    assert problem_of(dataclasses.replace(batch, labels=labels)) == "a label of sample 7 of the batch is not finite"
    where = batch.where.copy()
    where[7, 1] = False
    assert problem_of(dataclasses.replace(batch, labels=labels, where=where)) is None  # masked: contributes nothing
    floats = np.zeros((48, 3, 2), np.float32)
    floats[3, 2, 1] = np.inf
    broken = dataclasses.replace(batch, items=dataclasses.replace(batch.items, floats=floats))
    assert problem_of(broken) == "an item float of sample 3 of the batch is not finite"


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"batch_size": 0}, "Pipeline.batch_size: expected at least 1, got 0"),
        ({"batch_size": 50, "process_count": 4}, "Pipeline.batch_size: expected a multiple of process_count=4, got 50"),
        ({"process_index": 1}, "Pipeline.process_index: expected 0 to 0, got 1"),
        ({"buckets": (16, 8)}, "Pipeline.buckets: expected ascending lengths from 1 to long_length=32"),
        ({"buckets": (64,)}, "Pipeline.buckets: expected ascending lengths from 1 to long_length=32"),
        ({"positions": range(10)}, "Pipeline.positions: expected at least batch_size=48, got 10"),
        ({"epochs": 0}, "Pipeline.epochs: expected at least 1"),
        ({"window": 0}, "Pipeline.window: expected at least 1"),
    ],
)
def test_a_wrong_pipeline_is_refused(dataset, wrong, message):
    with pytest.raises(ValueError, match=message):
        pipeline(dataset, **wrong)
