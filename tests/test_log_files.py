"""Logs larger than memory: columns in files, sorted by user and time, are read in bounded memory."""

import json
import shutil

import pytest

from tests.reliability.sizes import full

STREAM = """
import json, sys, threading, time
import numpy as np
import aif_jax as aif
import aif_jax.run  # whose modules are all changed by the next line
for module in [module for name, module in sys.modules.items() if name.startswith("aif_jax.") and hasattr(module, "BLOCK")]:
    module.BLOCK = {block}
from aif_jax.data import candidates
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import COLUMNS, EventLog
from aif_jax.data.pipeline import Pipeline
from aif_jax.data.negatives import NegativeSampler, item_counts
from aif_jax.data.split import sample_positions, time_cuts
from aif_jax.encoding.vocabulary import Vocabulary

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon"))

events, users, items, chunk_users = {events}, {users}, {items}, {chunk_users}
per_user = events // users
peak = 0.0

def watch():  # the peak counts, not only what is left at the end
    global peak
    while True:
        peak = max(peak, resident() - before)
        time.sleep(0.005)

def columns():
    rng = np.random.default_rng(0)
    new = np.lib.format.open_memmap
    files = {{name: new({folder!r} + f"/{{name}}.npy", "w+", kind, (events,)) for name, kind in COLUMNS.items()}}
    for first in range(1, users + 1, chunk_users):
        rows = min(chunk_users, users + 1 - first)
        user = np.repeat(np.arange(first, first + rows, dtype=np.int32), per_user)
        time_ = np.sort(rng.integers(0, 10_000_000, (rows, per_user)), axis=1).ravel()
        item = rng.integers(0, items, rows * per_user, dtype=np.int32)
        for name, column in dict(user=user, item=item, action=np.ones_like(item), time=time_).items():
            files[name][(first - 1) * per_user : (first - 1 + rows) * per_user] = column
    return files

schema = aif.Schema(item_attributes=(aif.Attribute(name="item", size=items), aif.Attribute(name="category", size=9)))
catalogue = aif.Catalogue.from_items(schema, np.arange(items - 1), ids=dict(category=np.arange(items - 1) % 8 + 1))
vocabularies = dict(users=Vocabulary(np.arange(users)), items=Vocabulary(np.arange(items - 1)))
config = aif.Config(schema=schema)
aif.build(config)  # loads what is loaded when it is first used
before = resident()

threading.Thread(target=watch, daemon=True).start()
log = EventLog(**columns(), users=users + 1)
dataset = Dataset(name="large", log=log, catalogue=catalogue, user_ids=dict(),
                  user_floats=np.zeros((users + 1, 0), np.float32), **vocabularies)
_, first_validation, _ = time_cuts(log.time)
positions = sample_positions(log, min_history=1, before=first_validation, file={folder!r} + ".positions.npy")
sampler = NegativeSampler(item_counts(dataset, positions))
feed = Pipeline(dataset=dataset, positions=positions, config=config, batch_size=1024,
                source=candidates.sampled_negatives(dataset, sampler=sampler, negatives=1), epochs=10)
for fed, _ in zip(feed.batches(), range({steps}), strict=False):
    assert fed.batch is not None
print(json.dumps(dict(events=len(log), samples=len(positions), anon_mb=peak, log_mb=len(log) * 20 / 2**20)))
"""


LARGE = dict(events=100_000_000, users=1_000_000, items=100_000, chunk_users=10_000, block=1 << 22, steps=300)
"""The log takes 1,907 MB, its permutation would take 763 MB."""
SMALL = dict(events=4_000_000, users=40_000, items=1000, chunk_users=500, block=1 << 16, steps=10)
"""With blocks so small that a copy of any column would show: one int64 for each event would be 0.4 of the log."""


@pytest.mark.parametrize(("sizes", "most"), [(SMALL, 0.4), full(LARGE, 0.157)])
def test_a_log_streams_in_bounded_memory(python, tmp_path, sizes, most):
    (tmp_path / "log").mkdir()
    try:
        said = python(STREAM.format(folder=str(tmp_path / "log"), **sizes), timeout=1200)
    finally:
        shutil.rmtree(tmp_path / "log", ignore_errors=True)  # pytest would keep it
    print(report := json.loads(said.splitlines()[-1]))
    assert report["events"] == sizes["events"] and report["samples"] > 0.75 * report["events"]
    assert report["anon_mb"] < most * report["log_mb"], report
