"""Cascades: from lines to requests, lists by stage, RecFlow's layout, the synthetic one; losses of `experiments.cascade`."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

import aif_jax as aif
from aif_jax import data as sources
from aif_jax import train
from aif_jax.data.cascade import RANKER, STAGES, Cascade, from_columns
from aif_jax.data.order import BatchKey
from aif_jax.train.losses import bce_of_each, distill_listwise
from aif_jax.train.tasks import Cascaded
from experiments.cascade import margin_info_nce, pairwise_ndcg
from experiments.datasets import recflow
from experiments.datasets.cascade import WHOLE, synthetic_cascade
from experiments.datasets.synthetic import synthetic_world
from tests import demo
from tests.refusals import refused

pytestmark = pytest.mark.lane("experiments")
EVENTS = {"user": ["ann", "ann", "ann", "bob"], "item": [7, 8, 9, 7], "time": [10, 20, 20, 30]}
ITEMS = {"item": [6, 7, 8, 9], "category": ["tea", "tea", "cup", "cup"]}
LINES = {
    "user": ["bob", "ann", "ann", "ann", "ann", "ann", "eve"],
    "item": [7, 9, 6, 8, 7, 8, 6],
    "time": [30, 20, 20, 20, 15, 15, 30],
    "stage": ["exposed", "exposed", "retrieved", "ranked", "exposed", "ranked", "ranked"],
    "score": [1.0, 3.0, float("nan"), 2.0, 5.0, 4.0, 0.0],
    "click": [1.0, 0.0, float("nan"), float("nan"), 1.0, float("nan"), 1.0],
}


@pytest.fixture(scope="module")
def plain():
    return aif.read(EVENTS, items=ITEMS, columns=aif.Columns())


@pytest.fixture(scope="module")
def world():
    return synthetic_world(0, users=40, items=90, topics=12, categories=8, events_per_user=40, lag=8, content_dim=12)


@pytest.fixture(scope="module")
def data(world):
    return synthetic_cascade(world, requests=150, candidates=60, ranked=20)


def test_lines_become_requests(plain, caplog):
    known = aif.read_cascade(LINES | {"user": [*LINES["user"][:6], "bob"]}, plain, labels={"score": "ranker", "click": "click"})
    made = known.cascade
    assert made.positions.tolist() == [1, 3]  # ann at 20 and bob at 30; ann at 15 has no event, so nothing was shown
    assert "1 requests without an event in the log" in caplog.text
    assert known.items.ids_of(made.rows[0, :1]) == [9]  # the furthest stage first
    assert made.stage[0, :3].tolist() == [0, 1, 3] and made.rows[0, 3:].max() == 0
    assert made.labels["ranker"][0, :2].tolist() == [3, 2] and np.isnan(made.labels["ranker"][0, 2:]).all()
    assert made.labels["click"][1, 0] == 1 and len(made) == 2
    assert repr(made).startswith("Cascade(2 requests of up to 1,024 candidates: 2 exposed, 2 ranked, 0 pre_ranked, 1 retrieved")
    no_requests = Cascade(positions=made.positions[:0], rows=made.rows[:0], stage=made.stage[:0], labels={})
    digests = {each.digest for each in (plain, known, dataclasses.replace(plain, cascade=no_requests))}
    assert len(digests) == 3  # forgetting all of its users leaves a cascade without requests
    few = aif.read_cascade({name: values[:6] for name, values in LINES.items()}, plain, candidates=2)
    assert few.cascade.rows.shape == (2, 2) and few.cascade.stage[0].tolist() == [0, 1]


def test_of_a_long_request_the_furthest_stages_are_kept_then_the_order_of_the_lines(plain, caplog):
    lines = {"user": [1] * 4 + [2], "time": [20] * 4 + [30], "rows": [3, 2, 4, 1, 1], "stage": [1, 1, 0, 1, 0]}
    given = {name: np.array(values) for name, values in lines.items()} | {"labels": {"x": np.arange(1, 6) / 10}}
    made, without, cut = from_columns(plain.log, **given, candidates=3)
    assert (without, cut) == (0, 1) and made.rows.tolist() == [[4, 2, 3], [1, 0, 0]]  # row 1 came last; by row in a stage
    assert made.stage[0].tolist() == [0, 1, 1] and made.labels["x"][0].tolist() == pytest.approx([0.3, 0.2, 0.1])
    assert from_columns(plain.log, **given, candidates=4)[0].rows[0].tolist() == [4, 1, 2, 3]
    lines = {"user": ["ann"] * 3, "item": [9, 8, 7], "time": [20] * 3, "stage": ["exposed", "ranked", "ranked"]}
    assert aif.read_cascade(lines, plain, candidates=2).cascade.rows.tolist() == [plain.items.encode([9, 8]).tolist()]
    assert "1 candidates of requests with more than candidates=2 are left out" in caplog.text


def test_a_csv_has_empty_values_where_the_log_does_not_know(plain, tmp_path):
    rows = ["user,item,time,stage,score", "ann,9,20,exposed,3", "ann,8,20,ranked,", "bob,7,30,exposed,1.5"]
    (tmp_path / "log.csv").write_text("\n".join(rows) + "\n")
    made = aif.read_cascade(tmp_path / "log.csv", plain, labels=("score",)).cascade
    assert made.labels["score"][0, 0] == 3 and np.isnan(made.labels["score"][0, 1]) and made.labels["score"][1, 0] == 1.5
    (tmp_path / "log.csv").write_text("\n".join([*rows, "bob,8,30,ranked,much"]) + "\n")
    refused(ValueError, "score.*a number, got 'much'", aif.read_cascade, tmp_path / "log.csv", plain, labels=("score",))


def test_a_line_that_comes_twice_is_named_as_its_file_has_it(tmp_path):
    """Times in milliseconds."""
    rows = ["user,item,time,stage", "bob,7,30000,exposed", "ann,9,20001,exposed", "ann,8,20001,ranked", "ann,9,20500,ranked"]
    (tmp_path / "log.csv").write_text("\n".join(rows) + "\n")
    in_ms = {"time": [1000 * time for time in EVENTS["time"]]}
    data = aif.read(EVENTS | in_ms, items=ITEMS, columns=aif.Columns(time_unit="ms"))
    message = r"log.csv, row 4 after the header, column 'item': duplicate item: .*, got 9 twice in the request of user 'ann'$"
    refused(ValueError, message, aif.read_cascade, tmp_path / "log.csv", data)
    (tmp_path / "log.csv").write_text("\n".join(rows).replace("8,20001,ranked", "8,20001,") + "\n")
    message = r"log.csv, row 3 after the header, column 'stage': null: expected a value in every row, got nothing"
    refused(ValueError, message, aif.read_cascade, tmp_path / "log.csv", data)


def test_wrong_cascades_are_refused(plain):
    six = {name: values[:6] for name, values in LINES.items()}
    message = "cascade, row 2, column 'stage': unknown stage: expected one of 'exposed', .*, got 'shown'"
    refused(ValueError, message, aif.read_cascade, six | {"stage": ["ranked", *["shown"] * 5]}, plain)
    twice = r"column 'item': duplicate item: expected .* \(one user and second\), got 9 twice in the request of user 'ann'"
    refused(ValueError, f"^cascade, row 3, {twice}$", aif.read_cascade, six | {"item": [7, 9, 9, 8, 7, 8]}, plain)
    both = rf"^cascade, row 4, {twice}\n.* row 6, .* 7 twice .*'ann'\n\(2 problems in all\)$"
    refused(ValueError, both, aif.read_cascade, six | {"item": [7, 9, 8, 9, 7, 7]}, plain)
    for labels in (("item",), ("stage",), {"score": "y", "click": "y"}, "score"):
        refused(ValueError, "labels: expected columns other than", aif.read_cascade, six, plain, labels=labels)
    none = "cascade: expected a known item, at the user and time of an event, got none in 1 lines"
    refused(ValueError, none, aif.read_cascade, {name: values[4:5] for name, values in LINES.items()}, plain)
    good = aif.read_cascade({name: values[1:2] for name, values in LINES.items()}, plain, candidates=2).cascade
    for change, message in (
        ({"positions": np.array([1], np.int32)}, "Cascade.positions: expected dtype int64"),
        ({"positions": np.array([2, 1]), "rows": good.rows.repeat(2, 0)}, "Cascade.positions: expected ascending"),
        ({"stage": np.full((1, 2), 4, np.int8)}, r"Cascade.stage: expected values in \[0, 4\)"),
        ({"labels": {"stage": good.rows.astype(np.float32)}}, "Cascade.labels: expected no label 'stage'"),
        ({"labels": {"x": np.zeros((1, 3), np.float32)}}, r"Cascade.labels\['x'\]: expected shape \[1, 2\]"),
        ({"labels": {"x": np.full((1, 2), -np.inf, np.float32)}}, r"labels\['x'\]: expected finite values, NaN where unknown"),
    ):
        refused((TypeError, ValueError), message, dataclasses.replace, good, **change)
    with pytest.raises(ValueError, match=r"Dataset.cascade.rows: expected values in \[0, 5\)"):
        dataclasses.replace(plain, cascade=dataclasses.replace(good, rows=np.full((1, 2), 9, np.int32)))
    refused(ValueError, "Dataset.cascade: expected a Cascade", sources.logged, plain)


def test_lists_have_so_many_of_each_stage(data):
    cascade, counts = data.cascade, {"exposed": 4, "ranked": 6, "retrieved": 5}
    source, at = sources.logged(data, counts=counts), cascade.positions[:40]
    lists = source(at, BatchKey(0, 0, 0))
    assert lists.rows.shape == (40, 15) and set(lists.labels) == {"stage", "click", "long_view", RANKER, WHOLE}
    starts = np.cumsum([0, *counts.values()])
    for (name, count), start in zip(counts.items(), starts, strict=False):
        part = slice(start, start + count)
        assert (lists.labels["stage"][:, part][lists.rows[:, part] > 0] == STAGES.index(name)).all()
        for request, rows in enumerate(lists.rows[:, part]):
            own, kept = cascade.rows[request][cascade.stage[request] == STAGES.index(name)], rows[rows > 0]
            assert len(kept) == min(count, np.count_nonzero(own)) == len(set(kept)) and set(kept) <= set(own)
    assert lists.labels["click"][0, 0] == cascade.labels["click"][0, np.argmax(cascade.rows[0] == lists.rows[0, 0])]
    again, other = source(at, BatchKey(0, 0, 0)), source(at, BatchKey(0, 0, 1))
    assert np.array_equal(again.rows, lists.rows) and not np.array_equal(other.rows, lists.rows)
    assert source.description == {"kind": "logged", "counts": counts}
    later = dataclasses.replace(cascade, labels={**cascade.labels, RANKER: cascade.labels[RANKER] + 1})  # a later ranker's log
    logs = (cascade, later, dataclasses.replace(cascade, stage=np.minimum(cascade.stage, 0)), None)
    assert len({dataclasses.replace(data, cascade=log).digest for log in logs}) == 4  # by which a cursor tells them apart
    assert np.array_equal(sources.logged(data)(at, BatchKey(0, 0, 0)).rows, cascade.rows[:40])
    other = np.setdiff1d(np.arange(len(data.log)), cascade.positions)[:1]
    refused(ValueError, "positions: expected first events of requests of the cascade", source, other, BatchKey(0, 0, 0))
    for wrong, message in (({"shown": 3}, "counts: expected numbers"), ({}, "counts")):
        refused(ValueError, message, sources.logged, data, counts=wrong)


def test_the_synthetic_cascade_follows_its_rules(world, data):
    cascade = data.cascade
    there = cascade.rows > 0
    stages = np.where(there, cascade.stage, 9)
    shown = stages == 0
    assert ((stages == 0).sum(1) == 10).all() and ((stages <= 1).sum(1) <= 21).all()
    assert (cascade.rows == world.dataset.log.item[cascade.positions][:, None]).any(1).all()  # the event's item is shown
    assert np.array_equal(~np.isnan(cascade.labels["click"]), stages == 0)
    assert np.array_equal(~np.isnan(cascade.labels[RANKER]), stages <= 1) and (~np.isnan(cascade.labels[WHOLE]) == there).all()
    assert (cascade.labels["long_view"][shown] <= cascade.labels["click"][shown]).all()
    assert 0 < cascade.labels["click"][shown].mean() < 1
    request, place = np.nonzero(shown)
    chance = world.click_probability(cascade.positions[request], cascade.rows[request, place])
    assert cascade.labels["click"][shown].mean() == pytest.approx(chance.mean(), abs=0.05)
    refused(ValueError, "larger sample than population", synthetic_cascade, world, requests=10**6, candidates=60, ranked=20)


def test_fit_trains_on_a_cascade_and_evaluates_each_objective(data, tmp_path):
    small = demo.SMALL | {"head": aif.heads.Mlp((16,))}
    config = demo.config(schema=data.schema, objectives=("click", "long_view|click"), **small)
    loss = bce_of_each(config.objectives) + 0.5 * distill_listwise.of(RANKER, objective="click")
    task = Cascaded(exposed=4, ranked=4, pre_ranked=2, retrieved=4)
    given = dict(task=task, batch_size=32, epochs=1, requests=20, progress=False, k=None, keep_best="auc")
    run = demo.fit(aif.build(config), data, loss=loss, out=tmp_path / "run", **given)
    assert {"auc", "click.auc", "long_view.auc"} <= run.metrics.keys()
    assert run.settings.loss.endswith(" + 0.5 * distill_listwise.of('ranker', objective='click')")
    loaded = aif.Run.load(tmp_path / "run")
    assert loaded.settings.task == task
    labels = data.cascade.labels | {"long_view": np.zeros_like(data.cascade.labels["click"])}
    never = dataclasses.replace(data, cascade=dataclasses.replace(data.cascade, labels=labels))
    refused(ValueError, "^long_view: calibration labels: expected entries of both", loaded.calibrate, never, progress=False)
    got = loaded.calibrate(data, progress=False).evaluate(data, progress=False)
    assert set(got.objectives) == {"click", "long_view"} and got.requests <= 20
    assert repr(bce_of_each(config.objectives)) == "pointwise_bce.of('click') + pointwise_bce.of('long_view')"
    plain = dataclasses.replace(data, cascade=None)
    refused(ValueError, "Cascaded: expected data with a cascade", demo.fit, aif.build(config), plain, **given)
    counts = {name: 2 * values for name, values in data.cascade.labels.items()}
    twice = dataclasses.replace(data, cascade=dataclasses.replace(data.cascade, labels=counts))
    refused(ValueError, r"labels 'click': expected 0 or 1, .* got \[2.0, ", demo.fit, aif.build(config), twice, **given)
    none = Cascaded(exposed=0, ranked=0, pre_ranked=0, retrieved=0)
    refused(ValueError, "counts: expected numbers of candidates", none.source, data, before=0)


def test_evaluation_says_what_share_of_the_rankers_top_is_kept():
    """The log passes on 4, 2 and 3 candidates, so 3 are kept. The last request has no ranker's score and does not count."""
    items = {"item": [1, 2, 3, 4, 5, 6], "category": [1] * 6}
    events = {"user": [1, 2, 3, 1, 2, 3], "item": [1, 1, 1, 2, 2, 2], "time": [10, 10, 10, 20, 30, 40]}
    none = float("nan")
    lines = {
        "user": [1] * 6 + [2] * 4 + [3] * 4, "time": [20] * 6 + [30] * 4 + [40] * 4,
        "item": [1, 2, 3, 4, 5, 6, 1, 2, 5, 6, 1, 2, 3, 6],
        "stage": ["exposed", "exposed", "ranked", "pre_ranked", "retrieved", "retrieved",
                  "exposed", "ranked", "retrieved", "retrieved", "exposed", "ranked", "ranked", "retrieved"],
        "ranker": [1, 3, 2, none, none, none, 5, 4, none, none, none, none, none, none],
    }  # fmt: skip
    data = aif.read(events, items=items, columns=aif.Columns(), repeats=True, progress=False)
    data = aif.read_cascade(lines | {"click": [1.0, 0.0] * 7}, data, labels=("ranker", "click"), candidates=6)
    model = aif.build(demo.config(schema=data.schema, objectives=("click",), **demo.SMALL))
    params = demo.init(model, items=data.catalogue)
    by_row = np.array([0, 9, 1, 8, 7, 6, 0.5])  # keeps items 1, 3, 4 of the first request and 1, 5, 2 of the second
    given = dict(k=None, candidates=sources.logged(data), baselines={"row": by_row}, progress=False)
    got = train.evaluate(model, params, data, data.cascade.positions, **given)
    assert got.kept == 3 and got.figures()["baseline.row.ranker_recall"] == pytest.approx((2 / 3 + 1) / 2)
    assert {"ranker_recall", "baseline.row.ranker_recall"} <= set(got.intervals())
    assert "; ranker_recall: the ranker's top 10 among 3 kept)" in str(got)


def test_ranker_recall_is_of_the_cascade_whatever_the_lists(data):
    model = aif.build(demo.config(schema=data.schema, objectives=("click",), **demo.SMALL))
    params, some = demo.init(model, items=data.catalogue), data.cascade.positions[-30:]
    given = dict(k=None, progress=False)
    logged, usual = (train.evaluate(model, params, data, some, candidates=of, **given) for of in (sources.logged(data), None))
    assert usual.kept == logged.kept and usual.ranker_recall == pytest.approx(logged.ranker_recall)
    assert 0 < usual.ranker_recall < 1
    assert train.evaluate(model, params, dataclasses.replace(data, cascade=None), some, **given).ranker_recall is None


def write_recflow(folder, day, *lines):
    """Writes lines (user, video, second, flags, rank_index, effective_view) of a day, those shown also to `realshow`."""
    user, video, second, flags, rank, effective = map(np.array, zip(*lines, strict=True))
    none = dict.fromkeys((*recflow.STAGED, *recflow.SHOWN), np.zeros(len(lines), np.int64))
    given = {"user_id": user, "video_id": video, "request_timestamp": 1000 * second + 250, "rank_index": rank, "age": user + 30}
    given |= {"category_level_one": video % 3, "author_id": video, "duration": 100 * video, "effective_view": effective}
    names = ("realshow", "rank_pos", "rank_neg", "coarse_neg", "prerank_neg")
    given |= {name: np.array([name in words.split() for words in flags]).astype(int) for name in names}
    for kind, kept in (("all_stage", user > 0), ("realshow", given["realshow"] > 0)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        feather.write_feather(pa.table(none | given).filter(pa.array(kept)), str(folder / kind / f"{day}.feather"))


def test_recflow_is_read_in_its_layout(tmp_path):
    """Two days: a request of every stage, in which video 9 comes again at an earlier stage, and one that was shown alone."""
    request = [(1, 7, 20, "realshow rank_pos", 1, 1), (1, 8, 20, "rank_neg", 3, 0), (1, 9, 20, "coarse_neg", 0, 0)]
    write_recflow(tmp_path, "0213", *request, (1, 6, 20, "prerank_neg", 0, 0), (1, 9, 20, "prerank_neg", 0, 0))
    write_recflow(tmp_path, "0214", (2, 7, 30, "realshow", 0, 0))
    data = recflow.recflow(tmp_path)
    cascade, log = data.cascade, data.log
    assert (log.user.tolist(), log.time.tolist(), log.action.tolist()) == ([1, 2], [20, 30], [2, 1])
    assert {a.name for a in data.schema.user_attributes} == {"age", "gender", "province"} and data.schema.item_floats == 1
    assert data.items.raw[cascade.rows[0, :4] - 1].tolist() == [7, 8, 9, 6] and cascade.stage[0, :4].tolist() == [0, 1, 2, 3]
    assert np.count_nonzero(cascade.rows, axis=1).tolist() == [4, 1] and cascade.positions.tolist() == [0, 1]
    assert sorted(cascade.labels) == sorted([*recflow.FEEDBACK, "ranker"])
    np.testing.assert_array_equal(cascade.labels["ranker"][:, :2], [[-1, -3], [np.nan, np.nan]])
    np.testing.assert_array_equal(cascade.labels["effective_view"][:, :2], [[1, np.nan], [0, np.nan]])
    assert recflow.recflow(tmp_path, candidates=3).cascade.rows.shape[1] == 3
    refused(FileNotFoundError, "expected files realshow", recflow.recflow, tmp_path / "none")
    write_recflow(tmp_path, "0301", (1, 7, 20, "realshow", 0, 0), (1, 8, 20, "", 0, 0))
    refused(ValueError, "all_stage: expected a stage in every line", recflow.recflow, tmp_path)
    (tmp_path / "all_stage" / "0301.feather").unlink()
    refused(FileNotFoundError, "0301.feather: expected a file of RecFlow", recflow.recflow, tmp_path)


def test_met_candidates_are_left_out_where_nobody_comes_back(data):
    """Those that were shown stay: what the user did with them is known."""
    assert data.repeats
    cascade, once = data.cascade, dataclasses.replace(data, repeats=False)
    at = cascade.positions[:60]
    met, sample = sources.SeenPairs(data, at), np.arange(len(at))[:, None]
    gone = met.contains(sample, cascade.rows[:60]) & (cascade.stage[:60] > 0)
    assert gone.any() and (met.contains(sample, cascade.rows[:60]) & (cascade.stage[:60] == 0)).any()
    np.testing.assert_array_equal(sources.logged(once)(at, BatchKey(0, 0, 0)).rows, np.where(gone, 0, cascade.rows[:60]))
    np.testing.assert_array_equal(sources.logged(data)(at, BatchKey(0, 0, 0)).rows, cascade.rows[:60])
    counts = {"exposed": 4, "ranked": 6, "retrieved": 5}
    source, plain = sources.logged(once, counts=counts), sources.logged(data, counts=counts)
    lists, usual = source(at, BatchKey(0, 0, 0)), plain(at, BatchKey(0, 0, 0))
    assert not (met.contains(sample, lists.rows) & (lists.rows > 0) & (lists.labels["stage"] > 0)).any()
    assert (met.contains(sample, usual.rows) & (usual.rows > 0) & (usual.labels["stage"] > 0)).any()
    np.testing.assert_array_equal(lists.rows[:, :4], usual.rows[:, :4])
    assert once.digest != data.digest


def pairs(scores, teacher, where, k: int) -> float:
    """`pairwise_ndcg` of one list from its formula."""
    at = [i for i in range(len(scores)) if where[i]]
    rank = {i: sum(teacher[j] > teacher[i] for j in at) for i in at}
    gain = {i: 2 ** (-rank[i] / k) if rank[i] < k else 0 for i in at}
    discount = {i: 1 / np.log2(2 + rank[i]) if rank[i] < k else 0 for i in at}
    total = lost = 0.0
    for i in at:
        for j in at:
            if teacher[i] > teacher[j]:
                weight = abs(gain[i] - gain[j]) * abs(discount[i] - discount[j])
                total += weight
                lost += weight * np.log1p(np.exp(scores[j] - scores[i]))
    return lost / total if total else 0.0


def contrast(scores, stages, where) -> float:
    """`margin_info_nce` of one list from its formula."""
    at, values = [i for i in range(len(scores)) if where[i]], []
    for i in at:
        others = [np.exp(scores[j]) for j in at if stages[j] > stages[i]]
        if others:
            own = np.exp(scores[i] - 0.5)
            values.append(-np.log(own / (own + sum(others))))
    return float(np.mean(values)) if values else 0.0


@pytest.mark.parametrize("seed", range(4))
def test_losses_are_their_formulas(seed):
    rng = np.random.default_rng(seed)
    scores, teacher = rng.normal(size=(2, 4, 7)).astype(np.float32)
    teacher, where = np.round(teacher, 1) + 0, rng.random((4, 7)) < 0.8
    where[1] = np.arange(7) == 2  # one candidate: no pair
    for k in (100, 3):
        expected = np.mean([pairs(*row, k) for row in zip(scores, teacher, where, strict=True)])
        assert float(pairwise_ndcg(k)(scores, teacher, where=where)) == pytest.approx(expected, rel=1e-4)
    stages = np.random.default_rng(seed).integers(0, 4, scores.shape).astype(np.float32)
    expected = np.mean([contrast(*row) for row in zip(scores, stages, where, strict=True)])
    assert float(margin_info_nce(scores, stages, where=where)) == pytest.approx(expected, rel=1e-4)
