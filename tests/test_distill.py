"""Distillation in `fit`: a teacher's scores are one more label; what does not fit is refused."""

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax.data.candidates import NegativeSampler, SampleKey, describe, item_counts, sampled_negatives
from aif_jax.data.pipeline import make_batch
from aif_jax.train import Goal, Goals, NextItem, losses, predict
from aif_jax.train import fit as distill
from experiments.datasets.synthetic import synthetic_world

pytestmark = pytest.mark.usefixtures("light_compilation")

GIVEN = dict(task=NextItem(), epochs=1, batch_size=64, k=None, progress=False, learning_rate=0.02)


@pytest.fixture(scope="module")
def data():
    return synthetic_world(
        0, users=30, items=60, topics=6, categories=5, events_per_user=90, lag=4, interests=3, content_dim=4
    ).dataset


@pytest.fixture(scope="module")
def student(data):
    return aif.build(aif.presets.two_tower(data.schema, width=4, short_length=4, sequence=False, long_length=8))


@pytest.fixture(scope="module")
def teacher(data):
    model = aif.build(aif.presets.two_tower_matching(data.schema, width=4, short_length=4, long_length=128, head=(8,)))
    return aif.Trained(model, model.init(jax.random.key(5), data.catalogue))


@pytest.fixture(scope="module")
def source(data):
    return sampled_negatives(data, sampler=NegativeSampler(item_counts(data, np.arange(len(data.log)))), negatives=3)


def test_the_labels_hold_the_scores_of_the_teacher(data, teacher, source):
    """The same candidates; scores of histories of like length read together are those of whole ones."""
    at = np.flatnonzero(data.log.history_end(np.arange(len(data.log))) > 0)[::40]
    taught = distill.distilled(source, teacher, data)
    rows, labels, log_q = taught(at, SampleKey(0, 0, 0))
    plain = source(at, SampleKey(0, 0, 0))
    np.testing.assert_array_equal(rows, plain.rows)
    np.testing.assert_array_equal(labels["label"], plain.labels)
    assert log_q is None
    (whole,) = predict(teacher.model, teacher.params, [make_batch(data, at, rows, plain.labels, config=teacher.config)])
    np.testing.assert_allclose(labels["teacher"], whole, atol=1e-5)
    assert describe(taught) == {"kind": "distilled", "teacher": teacher.version, "of": describe(source)}


def popular(positions, rows):
    """A teacher that is a function: low rows score high."""
    return (-np.asarray(rows) / 10).astype(np.float32)


def test_a_student_takes_the_order_of_its_teacher(data, student, tmp_path):
    strong = dict(teacher=popular, distill=50.0 * losses.distill_listwise, epochs=2)
    run, plain = (aif.fit(student, data, out=out, **(GIVEN | more)) for out, more in ((tmp_path / "run", strong), (None, {})))
    positions, rows = np.arange(100, 160), np.tile(np.arange(1, 61, dtype=np.int32), (60, 1))
    wanted = popular(positions, rows)
    agreed = []
    for one in (run, plain):
        scores = distill.teacher_scores(one.model, one.params, data, positions, rows)
        agreed.append(np.corrcoef(scores.ravel(), wanted.ravel())[0, 1])
    assert agreed[0] > 0.7 > agreed[1] + 0.2
    assert run.settings.teacher.endswith("test_distill.popular")
    assert run.settings.loss == "Goal(listwise_softmax + pointwise_bce, 'label') + Goal(50 * distill_listwise, 'teacher')"
    assert aif.Run.load(tmp_path / "run").settings == run.settings and plain.settings.teacher is None
    assert "teacher" not in plain.settings.to_json()
    with pytest.raises(ValueError, match="teacher"):
        aif.fit(student, data, out=tmp_path / "run", **GIVEN | dict(epochs=2))


def test_a_loss_of_labels_by_name_keeps_its_goals():
    goals = Goals(Goal(losses.pointwise_bce, "click"))
    both = distill.with_teacher(goals, 2.0 * losses.distill_pointwise)
    assert repr(both) == "Goal(pointwise_bce, 'click') + Goal(2 * distill_pointwise, 'teacher')"


def test_what_does_not_fit_is_refused(data, student, teacher, source):
    with pytest.raises(ValueError, match=r"fit teacher: expected a model of one objective; .*, got \['click', 'like'\]"):
        distill.with_teacher(losses.pointwise_bce, losses.distill_listwise, ("click", "like"))
    with pytest.raises(ValueError, match="fit loss: expected a losses.Loss or Goals next to a teacher"):
        aif.fit(student, data, teacher=teacher, loss=lambda scores, labels, *, where: scores.sum(), **GIVEN)
    several = aif.build(teacher.config.replace(objectives=("click", "like")))
    with pytest.raises(ValueError, match=r"teacher: expected a model of one objective, or a function, got one of \['click'"):
        distill.distilled(source, aif.Trained(several, several.init(jax.random.key(5), data.catalogue)), data)
    other = aif.Trained(aif.build(teacher.config.with_encoding("another")), teacher.params)
    with pytest.raises(aif.EncodingMismatch, match="teacher"):
        distill.distilled(source, other, data)
    at = np.arange(100, 104)
    for made, error in (
        (lambda positions, rows: rows, TypeError),
        (lambda positions, rows: np.zeros(4, np.float32), ValueError),
        (lambda positions, rows: np.full(rows.shape, np.nan, np.float32), ValueError),
    ):
        with pytest.raises(error, match="teacher scores: "):
            distill.distilled(source, made, data)(at, SampleKey(0, 0, 0))
