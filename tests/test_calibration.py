"""Calibration: what a fit must find, what it must refuse, and that it travels with the parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit as sigmoid
from sklearn.linear_model import LogisticRegression

import aif_jax as aif
from aif_jax import metrics, train
from aif_jax import scores as aif_scores
from aif_jax.data.split import split_by_time
from aif_jax.run import Run
from aif_jax.scores import probabilities
from aif_jax.serving import Request
from aif_jax.train import edits
from aif_jax.train.evaluate import list_scores
from aif_jax.train.tasks import NextItem
from aif_jax.train.training import ranking_figures
from tests import demo
from tests.refusals import refused, refused_later
from tests.serving_world import bids_for

pytestmark = pytest.mark.lane("standing")


def drawn(count: int, truth, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and labels that are positive with probability sigmoid(truth(score))."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=count)
    return scores, (rng.random(count) < sigmoid(truth(scores))).astype(np.float64)


def fit(scores, labels, **options) -> dict[str, np.ndarray]:
    return dict(zip(("scale", "bias"), edits.platt(scores, labels, **options), strict=True))


deciles = functools.partial(metrics.calibration, by="size")


def worst(tenths: metrics.Calibration) -> float:
    """The largest |predicted / observed - 1|."""
    predicted, observed = tenths.predicted, tenths.observed
    return np.abs(np.divide(predicted, observed, where=observed > 0, out=np.full(len(observed), np.inf)) - 1).max()


def apply(made, scores) -> np.ndarray:
    return np.asarray(aif_scores.calibrated(aif_scores.with_calibration({"fitted": {}}, made), np.asarray(scores, np.float32)))


def test_logistic_form_is_that_of_scikit_learn_and_finds_the_truth():
    scores, labels = drawn(40_000, lambda s: 0.7 * s - 2)
    made, peer = fit(scores, labels), LogisticRegression(C=1e9, tol=1e-10).fit(scores[:, None], labels)
    assert (made["scale"], made["bias"]) == pytest.approx((peer.coef_[0, 0], peer.intercept_[0]), abs=1e-4)
    assert (made["scale"], made["bias"]) == pytest.approx((0.7, -2), abs=0.06)
    assert made["scale"].dtype == made["bias"].dtype == np.float32
    shifted = fit(1e3 * scores - 5e4, labels)  # an ill-conditioned line is found too
    np.testing.assert_allclose(shifted["scale"] * (1e3 * scores - 5e4) + shifted["bias"], 0.7 * scores - 2, atol=0.2)


def test_entries_of_no_weight_count_for_nothing():
    scores, labels = np.repeat([0.0, 1.0], 500), np.r_[np.zeros(450), np.ones(50), np.zeros(250), np.ones(250)]
    np.testing.assert_allclose(sigmoid(apply(fit(scores, labels), [0.0, 1.0])), [0.1, 0.5], atol=2e-3)
    given = np.r_[np.ones(1000), np.zeros(3)]
    assert fit(np.r_[scores, 9, 9, 9], np.r_[labels, 0, 1, 0], weights=given) == fit(scores, labels)


@pytest.mark.parametrize("several", [False, True])
def test_on_the_host_and_on_the_device_it_is_the_same(several):
    """With -inf, which a candidate has that is none, among the logits."""
    parts = [fit(*drawn(2000, lambda s: s - 1, seed=seed)) for seed in range(1 + several)]
    made = {name: np.stack([part[name] for part in parts]) for name in ("scale", "bias")} if several else parts[0]
    params = aif_scores.with_calibration({"fitted": {}}, made)
    logits = np.random.default_rng(0).normal(size=(50, 2) if several else 50).astype(np.float32) * 3
    logits[0] = -np.inf
    host, device = aif_scores.calibrated(params, logits, np), aif_scores.calibrated(params, logits)
    assert isinstance(host, np.ndarray) and host.dtype == np.float32 and host.shape == logits.shape
    np.testing.assert_allclose(host, device, rtol=1e-5, atol=1e-6)
    names = ("click", "like") if several else ()
    p = probabilities(params, logits, names, np)
    assert set(p) == set(names or ("",)) and all((value[0] == 0) and (value[1:] > 0).all() for value in p.values())
    for place, made in enumerate(parts):
        one = apply(made, logits[..., place] if several else logits)
        np.testing.assert_allclose(host[..., place] if several else host, one, rtol=1e-5, atol=1e-6)


def test_a_sampled_log_is_corrected_analytically():
    """All positives and a share of the negatives, with its rate, or with weights, give the calibration of the whole log."""
    scores, labels = drawn(200_000, lambda s: s - 3)
    kept = (labels == 1) | (np.random.default_rng(1).random(len(labels)) < 0.2)
    few = scores[kept], labels[kept]
    assert worst(deciles(apply(fit(*few), scores), labels)) > 1  # what sampling does
    for options in ({"rate": 0.2}, {"weights": np.where(few[1] == 1, 1, 5.0)}):
        made = deciles(apply(fit(*few, **options), scores), labels)
        assert worst(made) < 0.15 and sum(made.predicted) == pytest.approx(sum(made.observed), rel=0.02), options
    np.testing.assert_allclose(apply(fit(*few, rate=0.2), scores), apply(fit(*few), scores) + np.log(0.2), atol=1e-5)


def test_deciles_by_hand():
    scores, labels = np.log([[1 / 3, 1.0], [3.0, 3.0]]), np.array([[0, 1], [1, 1]])
    made = deciles(scores, labels, bins=2)
    assert made.predicted == pytest.approx([0.375, 0.75])
    assert (made.observed.tolist(), made.entries.tolist()) == ([0.5, 1], [2, 2])
    weighted = deciles(scores, labels, weights=np.array([[3.0, 1.0], [1.0, 1.0]]), bins=2)
    assert weighted.observed == pytest.approx([0, 1]) and weighted.entries.tolist() == [3, 3]
    masked = deciles(scores, labels, where=np.array([[True, False], [True, False]]), bins=10)
    assert masked.observed[masked.entries > 0].tolist() == [0, 1] and masked.entries.sum() == 2
    assert np.isnan(deciles([], []).observed).all() and deciles(np.zeros(4), [1, 1, 0, 0], bins=2).error == 0  # in any order
    rates = metrics.calibration([0.0, 0.0], [1, 0], weights=[1.0, 3.0])
    assert (rates.ratio, rates.error) == (2.0, 0.25) and rates.entries[5] == 4


@pytest.fixture(scope="module")
def run(data, small, tmp_path_factory) -> Run:
    task = NextItem(negatives=7, evaluated=20, logq_correction=True)
    return demo.fit(small, data, out=tmp_path_factory.mktemp("calibrated") / "run", **demo.FIT | dict(task=task, k=None))


def test_a_run_is_calibrated_on_its_validation_slice_and_writes_when_told_to(data, run, tmp_path):
    raw = run.evaluate(data, "validation", k=None, progress=False)
    assert abs(raw.calibration - 1) > 0.2  # what logQ does to a sigmoid
    fitted = run.calibrate(data, progress=False)
    got = fitted.evaluate(data, "validation", k=None, progress=False)
    assert got.calibration == pytest.approx(1, abs=1e-3) and got.calibration_error < raw.calibration_error
    assert got.log_loss < raw.log_loss and (got.auc, got.gauc) == (raw.auc, raw.gauc)
    assert len(got.deciles.predicted) == 10 and worst(got.deciles) < worst(raw.deciles)
    assert fitted.version != run.version
    ranking = {"auc", "gauc", "gauc_mean"}
    assert run.metrics.keys() == ranking | {"log_loss", "calibration", "calibration_error"}
    assert fitted.metrics == {name: run.metrics[name] for name in ranking}  # the others were of the logits before
    several = {"click.log_loss": 1.0, "click.gauc": 0.5, "click.calibration": 2.0, "hr@10": 0.1}
    assert ranking_figures(several) == {"click.gauc": 0.5, "hr@10": 0.1}
    assert Run.load(run.folder).version == run.version and fitted.folder is None  # in memory until it is saved
    fitted.save(tmp_path / "calibrated")
    loaded = Run.load(tmp_path / "calibrated")
    assert demo.same(loaded.params, fitted.params) and loaded.metrics == fitted.metrics
    assert "calibration" not in loaded.edit(data, lambda trained, data: trained).params["fitted"]  # whatever an edit changes
    refused(TypeError, "result of an edit: expected a Trained, got NoneType", loaded.edit, data, lambda trained, data: None)
    again = loaded.calibrate(data, rate=0.5, progress=False)  # replaces, does not add up
    shift = again.params["fitted"]["calibration"]["bias"] - fitted.params["fitted"]["calibration"]["bias"]
    assert shift == pytest.approx(np.log(0.5), abs=1e-5)
    knots = aif_scores.with_calibration(run.params, {"x": np.zeros(2, np.float32), "y": np.zeros(2, np.float32)})
    message = r"calibration: expected scale and bias; calibrate the model again, got \['x', 'y'\]"
    refused(ValueError, message, aif_scores.calibrated, knots, jnp.zeros(3))


def test_candidates_with_log_q_calibrate_for_the_whole_catalogue(data, run):
    """The mean probability over all items is that of one item in all of them, though few negatives were drawn."""
    positions = split_by_time(data.log, min_history=3).validation
    sampler = aif.data.NegativeSampler(aif.data.item_counts(data, split_by_time(data.log).train))
    source = aif.data.sampled_negatives(data, sampler=sampler, negatives=60, logq_correction=True)
    plain = aif.data.sampled_negatives(data, sampler=sampler, negatives=60)
    params = edits.calibration(run.trained, data, positions=positions, candidates=source).params
    rows = np.broadcast_to(np.arange(1, len(data.catalogue), dtype=np.int32), (len(positions), len(data.catalogue) - 1))
    lists = aif.data.CandidateLists(rows, (rows == data.log.item[positions][:, None]).astype(np.float32))
    scores = list_scores(run.model, params, data, positions, lists.rows)
    logits = np.asarray(aif_scores.calibrated(params, jnp.asarray(scores)))
    drawable = sampler.probabilities[rows] > 0
    assert metrics.calibration(logits, lists.labels, where=drawable).ratio == pytest.approx(1, abs=0.25)
    weighed = train.evaluate(run.model, params, data, positions, k=None, candidates=source, progress=False)
    assert weighed.calibration == pytest.approx(1, abs=1e-3)
    refused(ValueError, "log_q", weighed.against, train.evaluate(run.model, params, data, positions, candidates=plain, k=None))


def test_untrained_items_that_a_popularity_correction_puts_last_do_not_count(data, run):
    positions = split_by_time(data.log, min_history=3).validation
    (item, *_), offset = data.log.item[positions], np.zeros(len(data.catalogue), np.float32)
    offset[item] = -100.0  # of `popularity_offset`
    params, config = aif.blocks.with_table(run.params, offset, aif.blocks.ItemOffset(), config=run.config)
    both = run.trained, run.trained.replace(params=params, model=aif.build(config))
    plain, last = (edits.calibration(one, data, positions=positions).params["fitted"]["calibration"] for one in both)
    assert last["scale"] == pytest.approx(plain["scale"], rel=0.1)


def test_fitting_again_and_growing_keep_their_word(data, run):
    fitted = aif_scores.with_calibration(run.params, fit([0.0, 1.0, 2.0, 0.5], [0, 1, 1, 1]))
    rows = np.arange(len(data.catalogue))
    grown, _ = edits.grow_vocabulary(fitted, "item", rows, len(rows) + 5, jax.random.key(0), config=run.config)
    assert grown["fitted"]["calibration"]["scale"] is fitted["fitted"]["calibration"]["scale"]
    assert aif_scores.with_calibration(fitted, None)["fitted"].keys() == run.params["fitted"].keys()
    run.model.init(jax.random.key(0), None, fitted=fitted["fitted"])  # a calibrated model's tables start another training


async def test_order_by_bid_multiplies_the_calibrated_probability(world):
    params = aif_scores.with_calibration(world.params, {"scale": np.float32(3.0), "bias": np.float32(-1.0)})
    ids = world.ids[:40]
    async with world.engine() as engine:
        request = Request(user=3, order="bid", context=bids_for(ids))
        raw = await engine.rank(request, 8)
        await refused_later(aif.VersionMismatch, "", engine.publish(aif.Trained(engine.model, params), world.index))
        await engine.publish(aif.Trained(engine.model, params), world.index_of(params))
        got = await engine.rank(request, 8)
    logits, bids = world.logits(3, ids), bids_for(ids).bids
    for answer, scale, bias in ((raw, 1, 0), (got, 3, -1)):
        value = sigmoid(scale * logits + bias) * bids
        best = np.argsort(-value, kind="stable")[:8]
        assert answer.ids.tolist() == ids[best].tolist()
        np.testing.assert_allclose(answer.scores, value[best], rtol=1e-4)
        np.testing.assert_allclose(answer.logits, logits[best], rtol=1e-4, atol=1e-5)
        (p,) = answer.probabilities.values()
        assert p.dtype == np.float32
        np.testing.assert_allclose(p, sigmoid(scale * logits[best] + bias), rtol=1e-4)
    assert raw.ids.tolist() != got.ids.tolist()
