"""The request log joined with what followed: samples without skew, everything counted, in bounded memory."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import checkpoint
from aif_jax.checks import EncodingMismatch
from aif_jax.connectors import SnapshotStore
from aif_jax.data.cascade import STAGES, open_samples
from aif_jax.data.pipeline import Pipeline, make_batch
from aif_jax.encoding.capacity import Capacity
from aif_jax.jobs import outcomes as module
from aif_jax.jobs.outcomes import join_outcomes
from aif_jax.readers import admit
from aif_jax.readers.read import read_samples
from aif_jax.refreshing import GateConfig
from aif_jax.refreshing.watch import Outcomes
from aif_jax.scores import with_calibration
from aif_jax.train.step import score
from aif_jax.train.tasks import Cascaded, Impressions
from tests.light import lightly_compiled
from tests.outcomes_world import ITEMS, NOW, TABLE, outcomes, record, world, write_large, write_log

WINDOWS = {"click": 600, "conversion": 3600}
LATER = NOW + 100_000  # every window is over
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def served():
    """(model, data, 40 records)."""
    with lightly_compiled(keep=True):
        trained, data = world()
        yield trained, data, [record(trained, data, place) for place in range(40)]


def joined(trained, log, rows, out, **changes):
    """`join_outcomes` of a model's log, with every window over."""
    return join_outcomes(log, rows, out, **{"encoder": trained.encoder, "windows": WINDOWS, "until": LATER} | changes)


def clicks(records, *, every=2, delay=5):
    """A click on the second item of every other ranking, and a conversion of every sixth."""
    rows = []
    for place, each in enumerate(records):
        if place % every == 0:
            rows.append((each.id, each.ids[1], int(each.time) + delay, "click"))
        if place % (3 * every) == 0:
            rows.append((each.id, each.ids[1], int(each.time) + 20 * delay, "conversion"))
    return rows


def test_scores_of_the_samples_are_those_that_were_served(served, tmp_path, monkeypatch):
    """No skew: under the logged version the joined samples score as they did when they were served."""
    trained, data, records = served
    monkeypatch.setattr(module, "PART_BYTES", 4096)  # several parts
    log = write_log(tmp_path / "log", records[25:], 1)
    write_log(log, records[:25], 0)
    rows = clicks(records)
    summary = joined(trained, log, outcomes(*rows[::-1]), tmp_path / "out")
    assert (summary.requests, summary.samples, summary.without_outcome) == (40, 40, 20) and not summary.left_out
    assert summary.outcomes == {"click": 20, "conversion": 7} and not summary.late and not summary.ignored
    made = read_samples(tmp_path / "out", data)
    cascade = made.cascade
    batch = make_batch(made, cascade.positions, cascade.rows, cascade.labels, config=trained.config)
    scores = np.asarray(jax.jit(lambda params, batch: score(trained.model, params, batch))(trained.params, batch))
    logit = cascade.labels["served"]
    known = ~np.isnan(logit)
    assert known.sum() == 40 * 4
    np.testing.assert_allclose(scores[known], logit[known], rtol=1e-5, atol=1e-6)
    by_time = np.argsort(made.log.time[cascade.positions])  # a minute a request
    stages = np.sort(cascade.stage[by_time][:, :10], axis=1)
    assert (stages == [STAGES.index("exposed")] * 4 + [STAGES.index("retrieved")] * 6).all() and not cascade.rows[:, 10:].any()
    for place, at in enumerate(by_time):
        each = records[place]
        shown = data.items.encode(each.ids)
        label = {int(row): cascade.labels["click"][at, slot] for slot, row in enumerate(cascade.rows[at]) if row}
        assert [label[row] for row in shown.tolist()] == [0, float(place % 2 == 0), 0, 0]
        assert np.isnan([label[row] for row in data.items.encode(each.candidates).tolist() if row not in shown]).all()
        start = cascade.positions[at]
        assert sorted(made.log.item[start : start + 4]) == sorted(shown)
        assert made.log.action[start : start + 4].max() == (3 if place % 6 == 0 else 2 if place % 2 == 0 else 1)
    assert len(made.users.raw) == 7 and made.served.features.history.mask.shape == (40, trained.config.history_length)


def test_samples_say_which_version_served_them(served, tmp_path, monkeypatch):
    trained, _, records = served
    monkeypatch.setattr(module, "PART_BYTES", 4096)  # several parts
    records = [each._replace(version=f"{place % 3}" * 64) for place, each in enumerate(records[:20])]
    log = write_log(tmp_path / "log", records)
    rows = outcomes(*clicks(records))
    joined(trained, log, rows, tmp_path / "out")
    record, arrays = open_samples(tmp_path / "out")
    seconds = arrays["time"][arrays["positions"]].tolist()
    served_by = {int(each.time): each.version for each in records}
    assert [record["versions"][code] for code in arrays["version"]] == [served_by[second] for second in seconds]


def test_what_a_version_showed_has_the_calibrated_logit_of_its_first_objective(tmp_path):
    trained, data = world(("click", "conversion"))
    made = {"scale": np.array([0.5, 1], np.float32), "bias": np.array([-1, 0], np.float32)}
    served = trained.replace(params=with_calibration(trained.params, made))
    checkpoint.save(tmp_path / "model", served)
    name = (store := SnapshotStore(tmp_path / "store")).publish(tmp_path / "model")
    records = [record(served, data, place) for place in range(6)]
    records[5] = records[5]._replace(version="f" * 64)
    log, windows = write_log(tmp_path / "log", records), {"conversion": 3600, "click": 600}  # the objective's is not the first
    rows = [(each.id, each.ids[1], int(each.time) + 5, "click") for each in records]
    rows.append((records[0].id, records[0].ids[0], int(records[0].time) + 5, "conversion"))
    joined(served, log, outcomes(*rows), tmp_path / "samples" / "first", windows=windows)
    (tmp_path / "samples" / ".second").mkdir()
    (tmp_path / "samples" / ".second" / "samples.json").write_text("not yet")
    shown = Outcomes(tmp_path / "samples", store, [name]).shown(name, {served.version[:12], "0" * 12})
    wanted = sorted((0.5 * each.logits[2 * at] - 1, float(at == 1)) for each in records[:5] for at in range(4))
    found = sorted(zip(shown.logits.tolist(), shown.labels.tolist(), strict=True))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert len(np.unique(shown.users)) == 5 and len(shown.users) == 20
    other = Outcomes(tmp_path / "samples" / "first", store, [name]).shown(name, {"f" * 12})
    assert len(other.users) == 4 and other.labels.sum() == 1


def test_everything_that_is_no_sample_is_counted(served, tmp_path):
    trained, data, records = served
    first, second, third = records[:3]
    twin = records[3]._replace(id="twin", time=first.time, user=first.user)
    log = write_log(
        tmp_path / "log",
        [
            first, first._replace(time=first.time + 9), twin, second, third,
            records[4]._replace(features=None), records[5]._replace(encoding="other"), records[6]._replace(time=float(LATER)),
            records[7]._replace(candidates=None, candidate_texts=["a"]), records[8]._replace(ids=[999], candidates=[999]),
            records[9]._replace(ids=[999, *records[9].ids[:1]], logits=[1.0, 0.5]),
        ],
    )  # fmt: skip
    at = int(first.time)
    rows = [
        (first.id, first.ids[0], at + 600, "click"), (first.id, first.ids[0], at + 30, "click"),  # once counts
        (first.id, first.ids[1], at + 601, "click"), (first.id, first.ids[2], at + 3600, "conversion"),
        (first.id, first.ids[3], at - 61, "click"), (first.id, first.ids[3], at - 60, "click"),  # a minute of skew
        (first.id, 999, at + 5, "click"), (first.id, first.ids[0], at + 5, "like"), ("nobody", first.ids[0], at + 5, "click"),
        (records[4].id, records[4].ids[0], int(records[4].time) + 5, "click"),
        ("twin", twin.ids[0], int(twin.time) + 5, "click"),
        (second.id, next(item for item in ITEMS if item not in second.candidates), int(second.time) + 5, "click"),
    ]  # fmt: skip
    summary = joined(trained, log, outcomes(*rows), tmp_path / "out")
    assert summary.left_out == {
        module.DUPLICATE: 1, module.SAME_SECOND: 1, module.NO_FEATURES: 1, module.OTHER_ENCODING: 1, module.OPEN: 1,
        module.OTHER_IDS: 1, module.NOT_SHOWN: 1,
    }  # fmt: skip
    assert summary.requests == 11 and summary.samples == 4 == summary.requests - sum(summary.left_out.values())
    assert summary.outcomes == {"click": 2, "conversion": 1} and summary.late == {"click": 1}
    assert summary.ignored == {
        "more than once": 1, "before the request": 1, "of an item without a row": 1, "of another name": 1,
        "without a request": 1, "of a request that was left out": 2, "of an item that was no candidate": 1,
    }  # fmt: skip
    assert len(rows) == sum(summary.outcomes.values()) + sum(summary.late.values()) + sum(summary.ignored.values())
    assert summary.without_outcome == 3 and "4 samples of 11 requests" in str(summary)
    saved = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert saved["summary"] == dataclasses.asdict(summary)
    assert len(read_samples(tmp_path / "out", data).cascade) == 4


def test_shown_says_which_items_have_labels(served, tmp_path):
    trained, data, records = served
    log, rows = write_log(tmp_path / "log", records[:3]), []
    for each in records[:2]:
        rows += [(each.id, item, int(each.time) + 1, "impression") for item in each.ids[:2]]
    rows.append((records[1].id, records[1].ids[3], int(records[1].time) + 9, "click"))  # shown, though nothing says so
    summary = joined(trained, log, outcomes(*rows), tmp_path / "samples", windows={"click": 60}, shown="impression")
    assert summary.left_out == {module.NOT_SHOWN: 1} and summary.without_outcome == 1
    assert summary.outcomes == {"click": 1, "impression": 4}
    cascade = read_samples(tmp_path / "samples", data).cascade
    assert sorted((~np.isnan(cascade.labels["click"])).sum(1).tolist()) == [2, 3]
    exposed, passed = (STAGES.index(name) for name in ("exposed", "pre_ranked"))
    assert sorted((cascade.stage[cascade.rows > 0] == passed).reshape(2, -1).sum(1).tolist()) == [1, 2]
    assert (cascade.stage[cascade.labels["click"] == 1] == exposed).all()


def test_scored_candidates_and_several_objectives(tmp_path):
    trained, data = world(("click", "conversion"))
    one = record(trained, data, 1)
    logits = np.arange(20, dtype=np.float32).reshape(10, 2)
    logits[3] = -np.inf  # an item that the index lacked
    scored = one._replace(id="scored", method="score", ids=None, order="", logits=logits.ravel().tolist(), time=one.time + 60)
    log = write_log(tmp_path / "log", [one, scored])
    rows = outcomes((scored.id, scored.candidates[0], int(scored.time), "click"))
    summary = joined(trained, log, rows, tmp_path / "out", candidates=9)
    assert summary.samples == 2
    made = read_samples(tmp_path / "out", data)
    at = int(np.argmax(made.log.time[made.cascade.positions]))
    of = dict(zip(made.cascade.rows[at].tolist(), made.cascade.labels["served"][at].tolist(), strict=True))
    row = dict(zip(scored.candidates, data.items.encode(scored.candidates).tolist(), strict=True))
    assert [of[row[item]] for place, item in enumerate(scored.candidates) if place != 3] == [0, 2, 4, 8, 10, 12, 14, 16, 18]
    again = outcomes(*[(scored.id, item, int(scored.time), "click") for item in scored.candidates])
    cut = joined(trained, log, again, tmp_path / "cut", candidates=2)
    assert cut.outcomes == {"click": 2} and cut.ignored == {"of an item beyond `candidates`": 8}
    assert row[scored.candidates[3]] not in of  # the ones that came furthest are kept
    (other,) = {0, 1} - {at}
    known = ~np.isnan(made.cascade.labels["served"][other])
    np.testing.assert_allclose(np.sort(made.cascade.labels["served"][other][known]), np.sort(one.logits[::2]), rtol=1e-6)


def test_items_and_requests_of_text_and_files(tmp_path):
    """Ids that look like numbers stay text, from CSV too."""
    trained, data = world(text=True)
    records = [record(trained, data, place)._replace(id=str(place)) for place in range(3)]
    lines = [f"{each.id},{each.id_texts[0]},{int(each.time) + 1},click" for each in records[:2]]
    (tmp_path / "clicks.csv").write_text("\n".join(["impression_id,sku,ts,event", *lines]) + "\n")
    names = {"request": "impression_id", "item": "sku", "time": "ts", "outcome": "event"}
    log = write_log(tmp_path / "log", records)
    summary = joined(trained, log, tmp_path / "clicks.csv", tmp_path / "out", windows={"click": 60}, **names)
    assert summary.outcomes == {"click": 2} and summary.samples == 3 and not summary.ignored
    cascade = read_samples(tmp_path / "out", data).cascade
    clicked = data.items.ids_of(cascade.rows[cascade.labels["click"] == 1])
    assert sorted(clicked.tolist()) == sorted(each.id_texts[0] for each in records[:2])
    other, _ = world()
    with pytest.raises(ValueError, match="at least one request"):  # they are of another encoder
        joined(other, log, outcomes(("0", 10, LATER, "click")), tmp_path / "none")


def test_samples_follow_ids_that_come_and_go(served, tmp_path):
    """The rows of served features are renamed to those of the encoder to train with; what is gone is unknown."""
    trained, data, records = served
    events = {
        "user": ["user 1", "user 2"] * 10,
        "item": ITEMS[:19] + [777],
        "time": [NOW + 9_000_000] * 20,
        "event": ["buy"] * 20,
    }
    rules = {"item": Capacity(rows=40, evict_after=1000), "user": Capacity(rows=20)}
    middle, _ = admit(trained.encoder, events, capacity=rules)  # what was never counted is as old as the oldest
    events |= {"time": [NOW + 9_002_000] * 20}
    newer, turnover = admit(middle, events, capacity=rules)
    assert middle.vocabularies["item"].encode([777])[0] == 31
    assert turnover["item"].evicted == 11 and turnover["item"].held == 20
    log = write_log(tmp_path / "log", records)
    joined(trained, log, outcomes(*clicks(records)), tmp_path / "before")
    joined(trained, log, outcomes(*clicks(records)), tmp_path / "after", to=newer)
    table = {"item": [*ITEMS, 777], "category": [*TABLE["category"], "tea"]}
    later = aif.read(events, items=table, encoder=newer, unknown="skip", progress=False)
    before, after = read_samples(tmp_path / "before", data), read_samples(tmp_path / "after", later)
    raw = {row: item for item, row in zip(ITEMS, trained.encoder.vocabularies["item"].encode(ITEMS).tolist(), strict=True)}
    known = dict(zip(newer.vocabularies["item"].raw.tolist(), newer.vocabularies["item"].rows.tolist(), strict=True))
    request_of = dict(zip(before.log.time[before.cascade.positions].tolist(), range(40), strict=True))
    for at, second in enumerate(after.log.time[after.cascade.positions].tolist()):
        then = request_of[second]
        old, new = (each.served.features for each in (before, after))
        wanted = [known.get(raw.get(row), 0) for row in old.history.item[then].tolist()]
        assert new.history.item[at].tolist() == wanted
        np.testing.assert_array_equal(new.history.age[at], old.history.age[then])
        assert set(after.cascade.rows[at].tolist()) <= {0, *known.values()}
    with pytest.raises(EncodingMismatch):
        read_samples(tmp_path / "before", later)
    other = aif.read(events, items=table, columns=dataclasses.replace(data.encoder.columns, scale=False), progress=False)
    with pytest.raises(ValueError, match="to: expected an encoder of the same columns"):
        joined(trained, log, outcomes(), tmp_path / "none", to=other.encoder)


@pytest.mark.parametrize(
    "task", [Impressions(candidates=4, threshold={"click": 2, "conversion": 3}), Cascaded()], ids=["list", "cascade"]
)
def test_both_tasks_take_the_samples(served, tmp_path, task):
    trained, data, records = served
    log = write_log(tmp_path / "log", records)
    joined(trained, log, outcomes(*clicks(records)), tmp_path / "out")
    made = read_samples(tmp_path / "out", data)
    options = {"min_history": 3, "since": None, "before": None}
    positions = task.positions(made, **options)
    events = made.history_lengths(made.cascade.positions)
    assert 0 < len(positions) < 40 and (made.history_lengths(positions) >= 3).all()
    assert len(positions) == np.count_nonzero(events >= 3)
    feed = Pipeline(
        dataset=made,
        positions=positions,
        candidates=task.source(made, before=LATER),
        config=trained.config,
        batch_size=4,
        buckets=(6,),
    )
    for fed in feed.batches():
        assert fed.problem is None and set(fed.batch.labels) >= {"click", "conversion"}
        expected = made.served.of(fed.positions, length=fed.batch.users.history.mask.shape[1])
        jax.tree.map(
            np.testing.assert_array_equal,
            dataclasses.replace(fed.batch.users, encoding=""),
            dataclasses.replace(expected, encoding=""),
        )
    with pytest.raises(ValueError, match="train and evaluate the tasks Impressions and Cascaded"):
        made.user_features([int(made.cascade.positions[0]) + 1], length=4)
    with pytest.raises(ValueError, match="request_features"):
        made.request_features([1], [NOW], length=4)
    assert made.digest != data.digest


def test_fit_trains_on_served_requests(served, tmp_path):
    trained, data, records = served
    log = write_log(tmp_path / "log", records)
    joined(trained, log, outcomes(*clicks(records, every=1)), tmp_path / "out")
    made = read_samples(tmp_path / "out", data)
    task = Impressions(candidates=4, threshold=2)
    run = aif.fit(trained.model, made, task=task, batch_size=8, epochs=1, validation=0.2, test=0.2, progress=False)
    assert run.encoder.version == trained.encoder.version and 0 <= run.metrics["gauc"] <= 1


def test_a_refresh_trains_on_served_requests(served, tmp_path):
    """The next model comes from the log alone: joined samples, trained on, judged and published as files are."""
    trained, data, _ = served
    records = [record(trained, data, place) for place in range(120)]
    log = write_log(tmp_path / "log", records)
    joined(trained, log, outcomes(*clicks(records, every=1)), tmp_path / "samples")
    made, task = read_samples(tmp_path / "samples", data), Impressions(candidates=4, threshold=2)
    bounds = GateConfig(users=2, gauc=1.0, hit_rate=1.0, log_loss=5.0, calibration=1.0, overlap=0.0, slowdown=1000.0)
    given = {"task": task, "batch_size": 8, "gate": bounds, "platforms": ("cpu",), "progress": False, "held_out": 0.2}
    refreshed = aif.refresh(trained, made, out=tmp_path / "store", since=NOW + 60 * 40, **given)
    assert refreshed.status == "published" and refreshed.report["data"]["samples"] > 40
    assert refreshed.trained.encoding == trained.encoding and refreshed.trained.version != trained.version
    again = aif.refresh(tmp_path / "store", made, out=tmp_path / "store", **given)
    assert again.status == "nothing new"


def test_bad_input_is_refused_and_leaves_nothing(served, tmp_path):
    trained, data, records = served
    log = write_log(tmp_path / "log", records[:2])
    rows = outcomes((records[0].id, records[0].ids[0], int(records[0].time), "click"))
    for changes, words in (
        ({"windows": {}}, "windows"), ({"windows": {"click": 0}}, "windows"), ({"shown": "click"}, "windows"),
        ({"candidates": 0}, "candidates"), ({"until": 0}, "at least one request that can be a sample"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            joined(trained, log, rows, tmp_path / "out", **changes)
    with pytest.raises(ValueError, match="item"):
        joined(trained, log, rows | {"item": ["text"]}, tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        joined(trained, tmp_path / "nothing", rows, tmp_path / "out")
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match="expected a request log"):
        joined(trained, tmp_path / "bad.parquet", rows, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.parquet", "log"]
    joined(trained, log, rows, tmp_path / "out")
    with pytest.raises(FileExistsError):
        joined(trained, log, rows, tmp_path / "out")
    (tmp_path / "out" / "item.npy").write_bytes(b"cut")
    with pytest.raises(ValueError, match="item.npy"):
        read_samples(tmp_path / "out", data)
    with pytest.raises(FileNotFoundError, match="expected a folder of join_outcomes"):
        read_samples(tmp_path / "log", data)


MEASURE = """
import json, sys
from pathlib import Path
import numpy as np
import pyarrow.compute, pyarrow.parquet
from aif_jax.encoding.encoder import Encoder
from aif_jax.jobs.outcomes import join_outcomes
folder = Path(sys.argv[1])
encoder = Encoder.from_record(json.loads((folder / "encoder.json").read_text()), dict(np.load(folder / "encoder.npz")))
Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
status = lambda name: int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) / 1024
before = status("VmRSS")
summary = join_outcomes(folder / "log", folder / "outcomes.parquet", folder / "out", encoder=encoder,
                        windows={"click": 60}, until=2 * 10**9, candidates=16)
print(json.dumps([summary.samples, summary.outcomes["click"], status("VmHWM") - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from Linux's /proc")
@pytest.mark.parametrize(
    "requests", [20_000, pytest.param(1_000_000, marks=[pytest.mark.reliability, pytest.mark.timeout(1800)])]
)
def test_memory_does_not_grow_with_the_log(tmp_path, requests):
    """A part of the log is in memory, not the log: the peak of a child process."""
    folder = tmp_path / "files"
    write_large(folder, requests=requests, users=requests // 3)
    words, environment = [sys.executable, "-c", MEASURE, str(folder)], {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=1500)
    assert child.returncode == 0, child.stderr[-2000:]
    samples, followed, grown = json.loads(child.stdout)
    assert samples == followed == requests
    whole, log = (sum(path.stat().st_size for path in (folder / name).iterdir()) / 2**20 for name in ("out", "log"))
    print(f"{requests:,} requests: {grown:.0f} MiB more at the peak; the log has {log:.0f} MiB, the samples {whole:.0f}")
    assert grown < 200
