"""Distillation in `fit`: a teacher's scores are one more label; what does not fit is refused."""

import dataclasses

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax.data import lengths
from aif_jax.data.candidates import describe, sampled_negatives
from aif_jax.data.cascade import RANKER
from aif_jax.data.negatives import NegativeSampler, item_counts
from aif_jax.data.order import BatchKey
from aif_jax.data.pipeline import make_batch
from aif_jax.train import Impressions, NextItem, Teacher, losses, predict, training
from aif_jax.train import distillation as distill
from experiments.datasets.synthetic import synthetic_world
from tests.demo import fit
from tests.refusals import refused

pytestmark = pytest.mark.lane("standing")
GIVEN = dict(task=NextItem(), epochs=1, batch_size=64, k=None, progress=False, learning_rate=0.02)


@pytest.fixture(scope="module")
def data():
    sizes = dict(users=30, items=60, topics=6, categories=5, events_per_user=90, lag=4, interests=3, content_dim=4)
    return synthetic_world(0, **sizes).dataset


@pytest.fixture(scope="module")
def student(data):
    return aif.build(aif.presets.two_tower(data.schema, width=4, short_length=4, sequence=False, long_length=8))


@pytest.fixture(scope="module")
def teacher(data):
    sizes = dict(width=4, short_length=4, long_length=128, head=aif.heads.Mlp((8,)))
    model = aif.build(aif.presets.two_tower_matching(data.schema, **sizes))
    return aif.Trained(model, model.init(jax.random.key(5), data.catalogue))


@pytest.fixture(scope="module")
def source(data):
    return sampled_negatives(data, sampler=NegativeSampler(item_counts(data, np.arange(len(data.log)))), negatives=3)


def test_the_labels_hold_the_scores_of_the_teacher(data, teacher, source, monkeypatch):
    """The same candidates; scores of histories of like length read together are those of whole ones."""
    monkeypatch.setattr(lengths, "COMPILE", 0)
    monkeypatch.setattr(lengths, "SHORTEST_LENGTH", 32)
    at = np.flatnonzero(data.log.history_end(np.arange(len(data.log))) > 0)[::40]
    taught = distill.distilled(source, distill.scores_of(teacher, data), name=teacher.version)
    rows, labels, log_q = taught(at, BatchKey(0, 0, 0))
    plain = source(at, BatchKey(0, 0, 0))
    np.testing.assert_array_equal(rows, plain.rows)
    np.testing.assert_array_equal(labels["label"], plain.labels)
    assert log_q is None
    (whole,) = predict(teacher.model, teacher.params, [make_batch(data, at, rows, plain.labels, config=teacher.config)])
    np.testing.assert_allclose(labels["teacher"], whole, atol=1e-5)
    assert describe(taught) == {"kind": "distilled", "teacher": teacher.version, "of": describe(source)}


def popular(positions, rows):
    """A teacher that is a function: low rows score high."""
    return (-np.asarray(rows) / 10).astype(np.float32)


def newest(data):
    """Retrieval that finds the same eight items for all, the last ones of the catalogue."""
    return lambda positions: np.tile(np.arange(53, 61, dtype=np.int32), (len(positions), 1))


@pytest.mark.parametrize("retrieved", [False, True])
def test_a_student_takes_the_order_of_its_teacher(data, student, tmp_path, retrieved):
    """Of the candidates of the task, or of what retrieval finds: then the run keeps its scores."""
    teacher = Teacher(popular, 50.0 * losses.distill_listwise, candidates=newest(data) if retrieved else None)
    given = GIVEN | dict(out=tmp_path / "run", epochs=2)
    run, plain = fit(student, data, teacher=teacher, **given), fit(student, data, **GIVEN)
    positions, rows = np.arange(100, 160), np.tile(np.arange(53 if retrieved else 1, 61, dtype=np.int32), (60, 1))
    scores = [distill.model_scores(one.model, one.params, data)(positions, rows) for one in (run, plain)]
    agreed = [np.corrcoef(one.ravel(), popular(positions, rows).ravel())[0, 1] for one in scores]
    assert agreed[0] > 0.7 > agreed[1] + 0.2
    assert "test_distill.popular" in run.settings.teacher
    assert run.settings.loss == "listwise_softmax.of('label') + pointwise_bce.of('label') + 50 * distill_listwise.of('teacher')"
    assert aif.Run.load(tmp_path / "run").settings == run.settings and plain.settings.teacher is None
    assert (", 40 candidates of tests.test_distill.newest" in run.settings.teacher) == retrieved
    assert (tmp_path / "run" / "ranker_scores" / "00000").exists() == retrieved
    other = dataclasses.replace(teacher, candidates=None) if retrieved else None
    refused(ValueError, "teacher", fit, student, data, teacher=other, **given)


def test_a_loss_of_labels_by_name_keeps_its_labels():
    both = distill.with_teacher(losses.pointwise_bce.of("click"), losses.distill_listwise)
    assert repr(both) == "pointwise_bce.of('click') + distill_listwise.of('teacher')"


def test_what_does_not_fit_is_refused(data, student, teacher):
    message, two = r"fit teacher: expected a model of one objective; .*, got \['click', 'like'\]", ("click", "like")
    refused(ValueError, message, distill.with_teacher, losses.pointwise_bce, losses.distill_listwise, two)
    message, loss = "fit loss: expected a losses.Loss next to a teacher", lambda scores, labels, *, where: scores.sum()
    refused(ValueError, message, fit, student, data, teacher=Teacher(teacher), loss=loss, **GIVEN)
    refused(TypeError, r"Teacher.ranker: expected a Trained \(run.trained\), a function or .*, got NoneType", Teacher, None)
    several = aif.build(teacher.config.replace(objectives=two))
    message = r"teacher: expected a model of one objective, or a function, got one of \['click'"
    several = aif.Trained(several, several.init(jax.random.key(5), data.catalogue))
    refused(ValueError, message, distill.scores_of, several, data)
    other = aif.Trained(aif.build(teacher.config.with_encoding("another")), teacher.params)
    refused(aif.EncodingMismatch, "teacher", distill.scores_of, other, data)
    at = np.arange(100, 104)
    for made, error in (
        (lambda positions, rows: rows, TypeError),
        (lambda positions, rows: np.zeros(4, np.float32), ValueError),
        (lambda positions, rows: np.full(rows.shape, np.nan, np.float32), ValueError),
    ):
        refused(error, "teacher scores: ", distill.scores_of(made, data), at, np.ones((4, 2), np.int32))
    for given, wanted in (
        (popular, "fit teacher: expected a train.Teacher, got <function popular"),
        (Teacher(popular, candidates=lambda at: np.zeros((len(at), 0), np.int32)), "retrieval: expected rows"),
        (Teacher("score"), "Teacher.ranker: expected data with a cascade"),
    ):
        refused(ValueError, wanted, fit, student, data, teacher=given, **GIVEN)


def test_retrieved_candidates_are_scored_once_and_some_are_drawn_for_each_batch(data, teacher, source, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "PART", 50)
    at, given = np.arange(100, 220), dict(folder=tmp_path / "scores")
    asked = []

    def counted(positions, rows):
        asked.append(len(positions))
        return distill.model_scores(teacher.model, teacher.params, data)(positions, rows)

    ranked = distill.rank_retrieved(counted, data, at, newest(data), name="one", **given)
    assert asked == [50, 50, 20] and ranked.rows.shape == (120, 9)
    np.testing.assert_array_equal(ranked.rows[:, 0], data.log.item[at])
    plain = make_batch(data, at, ranked.rows, np.zeros(ranked.rows.shape, np.float32), config=teacher.config)
    (whole,) = predict(teacher.model, teacher.params, [plain])
    there = ranked.rows > 0  # an item that retrieval found is one candidate
    np.testing.assert_allclose(ranked.scores[there], whole[there], atol=1e-5)
    again = distill.rank_retrieved(counted, data, at, newest(data), name="one", **given)
    np.testing.assert_array_equal(again.scores, ranked.scores)
    assert len(asked) == 3
    message = "expected scores of this ranker, retrieval and data, got others; remove the folder"
    refused(ValueError, message, distill.rank_retrieved, counted, data, at, newest(data), name="another", **given)
    log = aif.EventLog(data.log.user, np.roll(data.log.item, 1), data.log.action, data.log.time, users=data.log.users)
    other = dataclasses.replace(data, log=log)  # of the same encoder
    refused(ValueError, message, distill.rank_retrieved, counted, other, at, newest(data), name="one", **given)

    taught = distill.distilled(source, ranked, name="one", count=5)
    rows, labels, _ = taught(at[:40], BatchKey(0, 0, 0))
    assert rows.shape == (40, 4 + 5) and np.isnan(labels["label"][:, 4:]).all()
    scores = {(place, row): ranked.scores[place, at] for (place, at), row in np.ndenumerate(ranked.rows[:40]) if row}
    for place in range(40):
        assert labels["teacher"][place, 0] == scores[place, rows[place, 0]]
        kept = rows[place][rows[place] > 0]
        assert len(set(rows[place, 4:][rows[place, 4:] > 0])) == (rows[place, 4:] > 0).sum()
        known = [scores.get((place, row), np.nan) for row in kept]
        np.testing.assert_array_equal(labels["teacher"][place][rows[place] > 0], np.float32(known))
    other, _, _ = taught(at[:40], BatchKey(0, 1, 0))
    assert (other[:, 4:] != rows[:, 4:]).any()
    missing, unknown, _ = taught(np.array([99]), BatchKey(0, 0, 0))
    assert not missing[0, 4:].any() and np.isnan(unknown["teacher"]).all()


def test_a_teacher_ranks_the_lists_of_the_validation_slice(data, student, tmp_path):
    names = dict(loss="", optimizer="AdamW", teacher="popular")
    settings = training.resolve_settings(aif.FitConfig(), data, student.config, task=NextItem(), out=None, **names)
    judged = training.with_ranker(data, settings, Teacher(popular), folder=tmp_path).cascade
    expected = np.where(judged.rows > 0, popular(None, judged.rows), np.nan)
    np.testing.assert_array_equal(judged.labels[RANKER], expected)
    data = dataclasses.replace(data, cascade=dataclasses.replace(judged, labels={RANKER: 0 * expected, "other": -expected}))
    for teacher, scores in (Teacher("other"), -expected), (Teacher(popular), expected):  # whatever another ranker said
        again = training.with_ranker(data, settings, teacher, folder=tmp_path / "logged").cascade
        np.testing.assert_array_equal(again.labels[RANKER], scores)
    rows, columns = np.arange(400), aif.Columns(action="action", actions=("shown", "click"))
    events = {"user": rows // 40, "item": rows % 8, "time": rows // 4, "action": np.where(rows % 4, "shown", "click")}
    met = aif.read(events, items={"item": range(8), "category": [1] * 8}, columns=columns, repeats=False, progress=False)
    task = Impressions(candidates=4, threshold=2)  # of shown items, whether met before or not
    settings = training.resolve_settings(aif.FitConfig(), met, student.config, task=task, out=None, **names)
    judged = training.with_ranker(met, settings, Teacher(popular), folder=tmp_path / "shown")
    assert (judged.cascade.rows > 0).sum() == 4 * 9 and judged.repeats and not met.repeats


def test_a_logged_ranker_is_a_column_of_scores():
    events = {"user": [1, 1, 1, 2, 2], "item": [1, 2, 3, 4, 5], "time": [10, 20, 20, 10, 30]}
    data = aif.read(events, items={"item": range(1, 7), "category": [1] * 6}, columns=aif.Columns(), progress=False)
    lines = {"user": [1, 1, 1], "time": [20] * 3, "item": [3, 5, 6], "stage": ["ranked", "ranked", "retrieved"]}
    data = aif.read_cascade(lines | {"score": [2.0, 1.0, float("nan")]}, data, labels={"score": "ranker"}, candidates=4)
    row = {item: int(data.encoder.vocabularies["item"].encode([item])[0]) for item in range(1, 7)}
    ranked = distill.logged_ranks(data, "ranker", np.arange(5))
    assert ranked.positions.tolist() == [1, 2]  # both events of the request
    rows, scores = ranked.at(np.array([2, 4]))
    assert sorted(rows[0]) == sorted([row[3], row[5], row[6], 0]) and not rows[1].any() and np.isnan(scores[1]).all()
    assert scores[0][rows[0] == row[3]] == 2 and np.isnan(scores[0][rows[0] == row[6]])
    message = r"Teacher.ranker: expected a label of the cascade \['ranker'\], got 'other'"
    refused(ValueError, message, distill.logged_ranks, data, "other", np.arange(5))
    message = "a training event whose request is in the cascade, got none"
    refused(ValueError, message, distill.logged_ranks, data, "ranker", np.array([0, 3]))
