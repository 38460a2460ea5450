"""The pipeline: the same batches in every run, resumed, shared by processes, cut to length, made ahead; bad records named."""

import dataclasses
import itertools
import json
import re
import threading
import time
from functools import partial

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import blocks, train
from aif_jax.data.candidates import CandidateLists, CandidateSource, sampled_negatives
from aif_jax.data.negatives import NegativeSampler, item_counts
from aif_jax.data.order import BatchKey
from aif_jax.data.pipeline import BadBatch, Pipeline, PrefetchedBatch, to_device
from aif_jax.data.split import sample_positions
from aif_jax.train import losses
from tests import demo
from tests.demo import same
from tests.refusals import refused
from tests.service_world import until


def pipeline(data, *, counted=None, **changes) -> Pipeline:
    """`counted` is the data set that popularity is taken from, where `data` has another log."""
    config = aif.Config(schema=data.schema, width=8, short_length=4, long_length=32, blocks=(blocks.Bea(bridges=2),))
    positions = sample_positions((counted or data).log, min_history=1)
    source = sampled_negatives(data, sampler=NegativeSampler(item_counts(counted or data, positions)), negatives=2)
    return Pipeline(**dict(dataset=data, positions=positions, source=source, config=config, batch_size=48, epochs=2) | changes)


SHAPES = [{}, {"buckets": (8, 16)}, {"positions": range(1199, 0, -1)}, {"positions": [*range(0, 1200, 2), *range(1, 1200, 2)]}]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_sample_once_an_epoch_and_a_cursor_resumes(data, shape):
    feed = pipeline(data, **shape)
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
        rest = list(pipeline(data, **shape).batches(cursor))
        assert len(rest) == len(feed) - at - 1
        assert all(same(one.batch, other.batch) for one, other in zip(rest, whole[at + 1 :], strict=True))


def mine(positions, key: BatchKey) -> CandidateLists:
    return CandidateLists(np.ones((len(positions), 3), np.int32), np.ones((len(positions), 3), np.float32))


def test_a_cursor_of_another_pipeline_is_refused_and_the_difference_named(data):
    """Everything that decides which sample comes when: seen once, a cursor of another pipeline feeds some samples twice."""
    base = pipeline(data)
    cursor, counts = next(base.batches()).cursor, item_counts(data, base.positions)
    shorter = dataclasses.replace(base.config, long_length=16)

    def sampled(negatives: int = 2, counts: np.ndarray = counts) -> CandidateSource:
        return sampled_negatives(data, sampler=NegativeSampler(counts), negatives=negatives)

    others = {
        "seed": ({"seed": 1}, "pipeline.seed: expected 1, the cursor has 0"),
        "batch size": ({"batch_size": 24}, "pipeline.batch_size: expected 24, the cursor has 48"),
        "buckets": ({"buckets": (8, 16)}, r"pipeline.buckets: expected \[8, 16\], the cursor has \[\]"),
        "length": ({"config": shorter}, "pipeline.history_length: expected 16, the cursor has 32"),
        "content": ({"positions": base.positions[::-1]}, "pipeline.positions.content: expected '"),
        "negatives": ({"source": sampled(negatives=3)}, "pipeline.candidates.negatives: expected 3, the cursor has 2"),
        "sampler": ({"source": sampled(counts=counts + 1)}, "pipeline.candidates.sampler: expected '"),
        "a function": ({"source": mine}, "candidates.kind: expected 'tests.test_pipeline.mine', the cursor has 'sampled'"),
        "a source": ({"source": CandidateSource(mine, {"kind": "mine"})}, "expected 'mine', the cursor has 'sampled'"),
    }
    for changes, message in others.values():
        with pytest.raises(ValueError, match=f"cursor: expected one of this pipeline, got one of another:(.|\n)*{message}"):
            pipeline(data, **changes).batches(cursor)
    log = data.log
    fewer = aif.EventLog(*(getattr(log, name)[:-1] for name in ("user", "item", "action", "time")), users=log.users)
    with pytest.raises(ValueError, match="pipeline.data.events: expected 1199, the cursor has 1200"):
        pipeline(dataclasses.replace(data, log=fewer), positions=base.positions[:-1], counted=data).batches(cursor)
    for message in ("pipeline: expected {.*}, the cursor has None", "or start without a cursor"):
        refused(ValueError, message, base.batches, {"epoch": 0, "step": 0})
    assert json.loads(json.dumps(cursor)) == cursor
    for same_ in (
        {},
        {"epochs": 9},
        {"process_count": 3},
        {"positions": list(base.positions)},
        {"positions": base.positions.astype(np.int32)},
    ):
        pipeline(data, **same_).batches(cursor)


def changed(data, part):
    """Data with the same counts, one value of which is another."""
    log = data.log
    arrays = {name: getattr(log, name).copy() for name in ("user", "item", "action", "time")}
    if part == "an item":
        arrays["item"][700] = arrays["item"][700] % 80 + 1
    if part == "a time":
        arrays["time"][log.offsets[4] - 1] += 1  # last of user 3
    if part in ("an item", "a time"):
        return dataclasses.replace(data, log=aif.EventLog(*arrays.values(), users=log.users))
    content = data.catalogue.items.content.copy()
    content[5, 2] += 1
    items = dataclasses.replace(data.catalogue.items, content=content)
    return dataclasses.replace(data, catalogue=dataclasses.replace(data.catalogue, items=items))


@pytest.mark.parametrize("part", ["an item", "a time", "content"])
def test_a_cursor_of_other_data_with_the_same_counts_is_refused(data, part):
    base = pipeline(data, source=mine)
    cursor = json.loads(json.dumps(next(base.batches()).cursor))
    other = pipeline(changed(data, part), source=mine, positions=base.positions)
    refused(ValueError, r"pipeline.data.digest: expected '\w{64}', the cursor has '\w{64}'", other.batches, cursor)
    assert pipeline(dataclasses.replace(data), source=mine).start(cursor) == (0, 1)


def test_what_is_no_cursor_is_refused(data):
    base = pipeline(data)
    cursor, last = next(base.batches()).cursor, base.steps_per_epoch - 1
    for wrong in (-5, "3", [], 0):
        refused(TypeError, r"cursor: expected `PrefetchedBatch.cursor` of a batch, or None, got", base.batches, wrong)
    for field in ("epoch", "step"):
        for value in ("3", None, 1.0, True):
            with pytest.raises(TypeError, match=f"cursor {field}.*: expected an integer, got {re.escape(repr(value))}"):
                base.batches(cursor | {field: value})
    for change, message in (
        ({"epoch": -5}, "cursor epoch: expected 0 to 2, got -5"),
        ({"step": -5}, f"cursor step in epoch 0: expected 0 to {last}, got -5"),
        ({"step": last + 1}, f"cursor step in epoch 0: expected 0 to {last}, got {last + 1}"),
        ({"epoch": 3}, "cursor epoch: expected 0 to 2, got 3"),
        ({"epoch": 2, "step": 1}, "cursor step in epoch 2: expected 0 to 0, got 1"),
    ):
        refused(ValueError, message, base.batches, cursor | change)
    assert list(base.batches(cursor | {"epoch": 2, "step": 0})) == []  # the end


@pytest.mark.parametrize("shape", SHAPES)
def test_processes_share_every_batch_without_overlap(data, shape):
    one = [fed for fed in pipeline(data, **shape).batches()]
    parts = [list(pipeline(data, process_index=p, process_count=3, **shape).batches()) for p in range(3)]
    assert {len(part) for part in parts} == {len(one)}
    for whole, *slices in zip(one, *parts, strict=True):
        np.testing.assert_array_equal(whole.positions, np.concatenate([fed.positions for fed in slices]))
        assert {fed.batch.users.history.mask.shape for fed in slices} == {(16, whole.batch.users.history.mask.shape[1])}
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(fed.batch for fed in slices))
        jax.tree.map(np.testing.assert_array_equal, joined, whole.batch)
        assert {json.dumps(fed.cursor) for fed in slices} == {json.dumps(whole.cursor)}


def test_buckets_cut_padding_and_lose_no_event(data):
    plain, cut = pipeline(data), pipeline(data, buckets=(8, 16))
    assert cut.lengths == (8, 16, 32)
    lengths = []
    for fed in cut.batches():
        places, log = fed.batch.users.history.mask, data.log
        history = np.minimum(log.history_end(fed.positions) - log.offsets[log.user[fed.positions]], 32)
        lengths.append(places.shape[1])
        np.testing.assert_array_equal(places.sum(axis=1), history)
        assert lengths[-1] == min(length for length in cut.lengths if length >= history.max())
    assert set(lengths) == {8, 16, 32}
    assert lengths != sorted(lengths)  # short and long batches are mixed
    masks = ([fed.batch.users.history.mask for fed in feed.batches()] for feed in (plain, cut))
    padding = [1 - sum(mask.sum() for mask in of) / sum(mask.size for mask in of) for of in masks]
    assert padding[1] < 0.65 * padding[0], padding


def test_the_loss_of_a_sample_does_not_depend_on_its_bucket(data):
    """Buckets shorter and longer than the short history."""
    config = demo.config(schema=data.schema, long_length=32)
    model = aif.build(config)
    params = demo.init(model, items=data.catalogue)
    cut = pipeline(data, config=config, buckets=(3, 8), batch_size=16)

    @jax.jit
    def loss(batch):
        return jax.vmap(losses.listwise_softmax)(train.score(model, params, batch), batch.labels, where=batch.where)

    for length in (3, 8):
        fed = next(fed for fed in cut.batches() if fed.batch.users.history.mask.shape[1] == length)
        full = cut._make(fed.positions, 32, *fed.place)
        assert full.batch.users.history.mask.shape[1] == 32 and same(full.batch.items, fed.batch.items)
        short, long = loss(fed.batch), loss(full.batch)
        assert np.std(long) > 0.01
        np.testing.assert_allclose(short, long, rtol=2e-5, atol=2e-6)


def test_hidden_item_ids(data):
    plain, hidden = (list(pipeline(data, epochs=1, id_dropout=share).batches()) for share in (0.0, 0.25))
    assert len(plain) == len(hidden) > 5
    met = []
    for one, two in zip(plain, hidden, strict=True):
        before, after = one.batch.items.ids["item"], two.batch.items.ids["item"]
        assert set(np.unique(after[after != before])) <= {0} and after.dtype == before.dtype
        met.append(after == 0)
        rest = dataclasses.replace(two.batch.items, ids={**two.batch.items.ids, "item": before})
        assert same(dataclasses.replace(two.batch, items=rest), one.batch)  # all else stays
    assert np.mean(met) == pytest.approx(0.25, abs=0.03) and not np.array_equal(met[0], met[1])
    again = pipeline(data, epochs=1, id_dropout=0.25)
    assert all(same(a.batch, b.batch) for a, b in zip(hidden, again.batches(), strict=True))
    refused(ValueError, "id_dropout", again.batches, plain[0].cursor)
    refused(ValueError, "Pipeline.id_dropout: expected a share", pipeline, data, id_dropout=1.0)


def test_a_thread_on_the_way_to_the_device_changes_nothing(data):
    feed = pipeline(data, epochs=1)
    with to_device(feed.batches()) as batches:
        for fed, plain in zip(batches, feed.batches(), strict=True):
            assert isinstance(fed.batch.labels, jax.Array) and same(fed.batch, plain.batch)
            assert (fed.cursor, fed.place) == (plain.cursor, plain.place)


def test_an_error_of_a_source_is_raised(data):
    """A bug is no bad batch."""

    def broken(positions, key):
        raise ValueError("my mistake")

    refused(ValueError, "my mistake", next, pipeline(data, source=broken).batches())
    unknown = dataclasses.replace(data, log=aif.EventLog([1] * 60, [0] * 60, [1] * 60, range(60), users=31))
    with pytest.raises(ValueError, match="expected events of known items, .* got an unknown item"):
        next(pipeline(unknown, counted=data, positions=range(60)).batches())


def test_a_label_that_is_not_finite_ends_a_run_and_an_empty_batch_does_not(data):
    source = pipeline(data).source

    def lists(positions, key, *, of) -> CandidateLists:
        rows, labels, log_q = source(positions, key)
        if key.step == 3:
            labels[7, 1], rows[7, 1] = np.nan, 0 if of == "masked" else rows[7, 1]
            rows[:] *= of != "empty"
        return CandidateLists(rows, labels, log_q)

    with pytest.raises(BadBatch, match=r"a label of sample 7 of the batch is not finite \(batch 3 of epoch 0; samples at"):
        list(pipeline(data, source=partial(lists, of="valid")).batches())
    for of, there in (("masked", True), ("empty", False)):  # a masked label contributes nothing
        assert (list(pipeline(data, source=partial(lists, of=of)).batches())[3].batch is not None) == there


@pytest.mark.parametrize("wrong, message", [
    ({"batch_size": 0}, "Pipeline.batch_size: expected at least 1, got 0"),
    ({"batch_size": 50, "process_count": 4}, "Pipeline.batch_size: expected a multiple of process_count=4, got 50"),
    ({"process_index": 1}, "Pipeline.process_index: expected 0 to 0, got 1"),
    ({"buckets": (16, 8)}, "Pipeline.buckets: expected ascending lengths from 1 to history_length=32"),
    ({"buckets": (64,)}, "Pipeline.buckets: expected ascending lengths from 1 to history_length=32"),
    ({"positions": range(-1, 99)}, r"Pipeline.positions: expected values in \[0, 1200\), got -1"),
    ({"positions": range(10)}, "samples: expected at least one batch of batch_size=48 to train on, got 10; take"),
    ({"epochs": 0}, "Pipeline.epochs: expected at least 1"),
])  # fmt: skip
def test_a_wrong_pipeline_is_refused(data, wrong, message):
    refused(ValueError, message, pipeline, data, **wrong)
    refused(TypeError, "Pipeline.positions: expected integers", pipeline, data, positions=np.arange(0.0, 99))


def threads() -> int:
    return sum(thread.name.startswith("aif_jax.prefetch") for thread in threading.enumerate())


def numbered(number: int) -> PrefetchedBatch:
    return PrefetchedBatch(batch=None, cursor={"step": number, "thread": threading.current_thread().name})


def test_batches_come_in_order_from_another_thread_and_then_it_ends():
    with to_device(map(numbered, range(20))) as batches:
        cursors = [fed.cursor for fed in batches]
        assert [cursor["step"] for cursor in cursors] == [*range(20)]
        assert all(cursor["thread"].startswith("aif_jax.prefetch") for cursor in cursors) and list(batches) == []
    assert threads() == 0


def test_no_more_is_made_than_allowed():
    made = []
    with to_device(made.append(i) or numbered(i) for i in range(100)) as batches:
        until(lambda: len(made) == 3)  # two wait, one is in the hand of the thread
        time.sleep(0.05)
        assert len(made) == 3
        assert next(batches).cursor["step"] == 0
        until(lambda: len(made) == 4)


def test_an_error_is_raised_where_its_batch_would_have_come():
    def broken():
        yield numbered(1)
        yield numbered(2)
        raise OSError("the disk is gone")

    with to_device(broken()) as batches:
        assert [next(batches).cursor["step"], next(batches).cursor["step"]] == [1, 2]
        refused(OSError, "the disk is gone", next, batches)
        assert list(batches) == []
    assert threads() == 0


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_in_the_middle_stops_the_thread(taken):
    with to_device(map(numbered, itertools.count())) as batches:
        for _ in range(taken):
            next(batches)
        assert threads() == 1
    assert threads() == 0
