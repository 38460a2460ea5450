"""Logs written as a stream: equal to logs made in memory, refused where they are out of order, bounded in memory."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aif_jax.data.events import COLUMNS, EventLog, write_log
from tests.refusals import refused


def table(size: int, seed: int = 0) -> EventLog:
    rng = np.random.default_rng(seed)
    columns = (rng.integers(low, high, size) for low, high in ((1, 40), (0, 90), (0, 4), (0, 60)))
    return EventLog.from_arrays(*columns, users=50)


def chunks(log: EventLog, cuts):
    for start, stop in zip([0, *cuts], [*cuts, len(log)], strict=True):
        yield {name: getattr(log, name)[start:stop] for name in COLUMNS}


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 500), max_size=6).map(sorted), seed=st.integers(0, 9))
def test_a_streamed_log_equals_one_made_in_memory(tmp_path_factory, cuts, seed):
    log = table(500, seed)
    folder = tmp_path_factory.mktemp("logs") / "log"
    streamed = write_log(folder, chunks(log, cuts), users=50)
    for name in (*COLUMNS, "offsets"):
        np.testing.assert_array_equal(getattr(streamed, name), getattr(log, name))
        assert getattr(streamed, name).dtype == getattr(log, name).dtype
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{name}.npy" for name in (*COLUMNS, "offsets"))


def events(user, time, **columns):
    ones = [1] * len(user)
    return {"user": user, "item": ones, "action": ones, "time": time, **columns}


def test_users_default_to_the_largest_row_and_an_empty_log_is_a_log(tmp_path):
    assert write_log(tmp_path / "a", [events([2], [1]), events([], [])]).offsets.tolist() == [0, 0, 0, 1]
    assert len(write_log(tmp_path / "b", [])) == 0
    assert write_log(tmp_path / "c", [], users=4).users == 4


@pytest.mark.parametrize("user, time, at", [([2], [19], 2), ([1], [99], 2), ([2, 2, 2], [20, 30, 29], 4), ([3, 2], [5, 30], 3)])
def test_events_out_of_order_are_refused_within_and_across_chunks(tmp_path, user, time, at):
    with pytest.raises(ValueError, match=f"got event {at} out of order"):
        write_log(tmp_path / "log", [events([1, 2], [10, 20]), events(user, time)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong, error, message", [
    ({"user": [1, 5]}, ValueError, r"user: expected values in \[1, 5\), got 5 at position 2"),
    ({"item": [-1, 0]}, ValueError, r"item: expected values in \[0, 2147483648\), got -1 at position 1"),
    ({"time": [1, 2, 3]}, ValueError, "columns of one length"),
    ({"action": [0.5, 1]}, TypeError, "action: expected integers"),
])  # fmt: skip
def test_bad_values_are_refused_with_their_position_in_the_log(tmp_path, wrong, error, message):
    refused(error, message, write_log, tmp_path / "log", [events([1], [10]), events([1, 1], [10, 10]) | wrong], users=5)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(tmp_path):
    write_log(tmp_path / "log", chunks(table(9), []))
    refused(FileExistsError, "something is there", write_log, tmp_path / "log", [])
    assert len(EventLog.load(tmp_path / "log")) == 9
    refused(ValueError, "users: expected at least 1", write_log, tmp_path / "none", [], users=0)


STREAM = """
import json, sys, threading, time
import numpy as np
import aif_jax as aif
import aif_jax.run  # whose modules are all changed by the next line
for module in [module for name, module in sys.modules.items() if name.startswith("aif_jax.") and hasattr(module, "BLOCK")]:
    module.BLOCK = {block}
from aif_jax.data import candidates
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import write_log
from aif_jax.data.pipeline import Pipeline
from aif_jax.data.negatives import NegativeSampler, item_counts
from aif_jax.data.split import sample_positions, time_cuts
from aif_jax.encoding.vocabulary import Vocabulary

def resident(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) / 1024

events, users, items, chunk_users = {events}, {users}, {items}, {chunk_users}
per_user = events // users
report, peak = dict(), 0.0

def watch():  # the peak within a phase counts, not only what is left after it
    global peak
    while True:
        peak = max(peak, resident("RssAnon") - before)
        time.sleep(0.005)

def chunks():
    rng = np.random.default_rng(0)
    for first in range(1, users + 1, chunk_users):
        rows = min(chunk_users, users + 1 - first)
        user = np.repeat(np.arange(first, first + rows, dtype=np.int32), per_user)
        time_ = np.sort(rng.integers(0, 10_000_000, (rows, per_user)), axis=1).ravel()
        item = rng.integers(0, items, rows * per_user, dtype=np.int32)
        yield dict(user=user, item=item, action=np.ones_like(item), time=time_)

schema = aif.Schema(item_attributes=(aif.Attribute(name="item", size=items), aif.Attribute(name="category", size=9)))
catalogue = aif.Catalogue.from_items(schema, np.arange(items - 1), ids=dict(category=np.arange(items - 1) % 8 + 1))
vocabularies = dict(users=Vocabulary(np.arange(users)), items=Vocabulary(np.arange(items - 1)))
config = aif.Config(schema=schema)
aif.build(config)  # loads what is loaded when it is first used
before = resident("RssAnon")

def phase(name):
    global started
    report[name] = round(time.perf_counter() - started, 2)
    started = time.perf_counter()

threading.Thread(target=watch, daemon=True).start()
started = time.perf_counter()
log = write_log({folder!r}, chunks(), users=users + 1)
phase("write_and_check_s")
dataset = Dataset(name="large", schema=schema, log=log, catalogue=catalogue, user_ids=dict(),
                  user_floats=np.zeros((users + 1, 0), np.float32), **vocabularies)
phase("dataset_s")
_, first_validation, _ = time_cuts(log.time)
positions = sample_positions(log, min_history=1, before=first_validation, file={folder!r} + ".positions.npy")
phase("positions_s")
sampler = NegativeSampler(item_counts(dataset, positions))
phase("counts_s")
for block in (0, 4096):
    feed = Pipeline(dataset=dataset, positions=positions, config=config, batch_size=1024,
                    candidates=candidates.sampled_negatives(dataset, sampler=sampler, negatives=1), epochs=10, block=block)
    for fed, _ in zip(feed.batches(), range({steps}), strict=False):
        assert fed.problem is None
    phase(f"batches_s_block_{{block}}")
report |= dict(events=len(log), samples=len(positions), anon_mb=round(peak, 1), rss_file_mb=round(resident("RssFile"), 1),
               log_mb=len(log) * 20 / 2**20)
print(json.dumps(report))
"""


LARGE = dict(events=100_000_000, users=1_000_000, items=100_000, chunk_users=10_000, block=1 << 22, steps=300)
"""The log takes 1,907 MB, its permutation would take 763 MB."""
SMALL = dict(events=4_000_000, users=40_000, items=1000, chunk_users=500, block=1 << 16, steps=10)
"""With blocks so small that a copy of any column would show: one int64 for each event would be 0.4 of the log."""
FULLY = [pytest.mark.reliability, pytest.mark.timeout(1500)]


@pytest.mark.parametrize(("sizes", "most"), [(SMALL, 0.4), pytest.param(LARGE, 0.157, marks=FULLY)], ids=["small", "large"])
def test_a_log_streams_in_bounded_memory(python, tmp_path, sizes, most):
    try:
        said = python(STREAM.format(folder=str(tmp_path / "log"), **sizes), timeout=1200)
    finally:
        shutil.rmtree(tmp_path / "log", ignore_errors=True)  # pytest would keep it
    print(report := json.loads(said.splitlines()[-1]))
    assert report["events"] == sizes["events"] and report["samples"] > 0.75 * report["events"]
    assert report["anon_mb"] < most * report["log_mb"], report
