"""Several objectives from one head: logits, losses with masks and products, training, evaluation, index, engine, export."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit as sigmoid

import aif_jax as aif
from aif_jax import export, metrics, train
from aif_jax import scores as aif_scores
from aif_jax.blocks import ItemOffset, PureSvd, with_table
from aif_jax.data.candidates import CandidateLists
from aif_jax.data.order import BatchKey
from aif_jax.data.pipeline import BadBatch, expect_labels, make_batch
from aif_jax.train.evaluate import list_scores
from aif_jax.train.losses import Loss, bce_of_each, distill_listwise, listwise_softmax, pointwise_bce
from aif_jax.train.step import loss_and_gradient
from tests import demo
from tests.refusals import refused
from tests.serving_world import World, bids_for

pytestmark = pytest.mark.lane("standing")
NAMES = ("click", "conversion|click", "like")


def test_objectives_are_parsed_and_chained():
    assert aif_scores.objective_names(NAMES) == ("click", "conversion", "like")
    deep = ("a", "b|a", "c|b")
    assert aif_scores.chains(deep) == {"a": (0,), "b": (1, 0), "c": (2, 1, 0)}
    logits = np.random.default_rng(0).normal(size=(50, 3)) * 8
    for name, count in (("a", 1), ("b", 2), ("c", 3)):
        whole = aif_scores.over_all(logits, deep, name, np)
        np.testing.assert_allclose(sigmoid(whole), sigmoid(logits[:, :count]).prod(1), rtol=1e-9)
    assert aif_scores.over_all(np.full(2, 60.0), deep[:2], "b", np) == pytest.approx(60 - np.log(2))  # no difference near 1


def test_the_config_of_one_objective_is_what_it_was():
    plain, named = demo.config(), demo.config(objectives=("click",))
    assert "objectives" not in plain.to_json() and plain.outputs == named.outputs == 1
    assert aif.fingerprint({}, plain) != aif.fingerprint({}, named)
    for config in (plain, named, demo.config(objectives=NAMES)):
        assert aif.Config.from_json(config.to_json()) == config
    refused(ValueError, "a head with layers for several", demo.config, objectives=NAMES, **demo.VARIANTS["two_tower"])


def test_each_column_is_a_model_of_one_objective():
    """Column t of [C, T] is the model whose last layer is that column, its blocks' own logits weighed by `direct`[t]."""
    many, params = demo.build(objectives=NAMES, **demo.VARIANTS["dot products"])
    one, user, items = aif.build(many.config.replace(objectives=())), demo.user(many.config), demo.items(9)
    joint, alone = jax.jit(many.joint), jax.jit(one.joint)
    head, last = params["head"], max(params["head"]["rest"])

    def logits(weights) -> np.ndarray:
        return np.asarray(joint(params | {"head": head | {"direct": jnp.asarray(weights, jnp.float32)}}, user, items))

    whole, without = logits(np.ones(3)), logits(np.zeros(3))
    assert whole.shape == (9, 3) and head["direct"].shape == (3,) and np.abs(whole - without).max() > 0.01
    for place in range(3):
        column = jax.tree.map(lambda leaf, place=place: leaf[..., place : place + 1], head["rest"][last])
        single = {"first": head["first"], "rest": head["rest"] | {last: column}}
        np.testing.assert_allclose(alone(params | {"head": single}, user, items), whole[:, place], atol=1e-5)
    np.testing.assert_allclose(logits([2, 1, 0.5]), without + (whole - without) * np.array([2, 1, 0.5]), atol=1e-5)
    rows = jax.jit(jax.vmap(many.item, (None, 0)))(params, items)
    staged = jax.jit(many.interaction)(params, jax.jit(many.user)(params, user), rows)
    np.testing.assert_allclose(staged, joint(params, user, items), atol=2e-5)


def test_an_offset_is_of_the_first_objective_and_not_weighed():
    model, params = demo.build(objectives=NAMES, **demo.VARIANTS["dot products"])
    params = params | {"head": params["head"] | {"direct": jnp.asarray([0.8, 0.9, 1.1], jnp.float32)}}
    table = np.linspace(-2, 1, model.config.schema.table_sizes["item"], dtype=np.float32)
    changed, config = with_table(params, table, ItemOffset(), config=model.config)
    user, items = demo.user(model.config), demo.items(9)
    before, after = model.joint(params, user, items), aif.build(config).joint(changed, user, items)
    np.testing.assert_allclose(after[:, 0] - before[:, 0], table[np.asarray(items.ids["item"])], atol=1e-5)
    np.testing.assert_array_equal(after[:, 1:], before[:, 1:])
    svd, config = with_table(changed, np.stack([table, table**2], 1), PureSvd(width=2), config=config)
    more = aif.build(config).joint(svd, user, items)
    assert np.abs(more[:, 0] - after[:, 0]).min() > 1e-3
    np.testing.assert_array_equal(more[:, 1:], before[:, 1:])


def test_losses_of_labels_are_those_that_they_name():
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.normal(size=(4, 5, 3)), jnp.float32)
    click = (rng.random((4, 5)) < 0.5).astype(np.float32)
    labels = {
        "click": click,
        "conversion": click * (rng.random((4, 5)) < 0.5),
        "like": np.where(rng.random((4, 5)) < 0.3, np.nan, 1 - click).astype(np.float32),
        "ranker": rng.normal(size=(4, 5)).astype(np.float32),
    }
    where = rng.random((4, 5)) < 0.8

    def alone(loss: Loss) -> float:
        return float(loss.bind(NAMES)(scores, labels, where=where))

    p = sigmoid(scores)
    both, y = p[..., 0] * p[..., 1], labels["conversion"]
    expected = -(y * np.log(both) + (1 - y) * np.log(1 - both))[where].mean()
    assert alone(pointwise_bce.of("conversion")) == pytest.approx(expected, rel=1e-5)  # ESMM
    expected = float(pointwise_bce(scores[..., 2], np.nan_to_num(labels["like"]), where=where & ~np.isnan(labels["like"])))
    assert alone(pointwise_bce.of("like")) == pytest.approx(expected, rel=1e-6)
    expected = float(distill_listwise(scores[..., 0], labels["ranker"], where=where))
    assert alone(distill_listwise.of("ranker")) == pytest.approx(expected, rel=1e-5)
    two = (0.5 * pointwise_bce.of("click"), 2 * listwise_softmax.of("click", objective="like"))
    assert alone(two[0] + two[1]) == pytest.approx(sum(map(alone, two)), rel=1e-6)
    assert repr(two[0] + two[1]) == "0.5 * pointwise_bce.of('click') + 2 * listwise_softmax.of('click', objective='like')"
    assert bce_of_each(NAMES) == pointwise_bce.of("click") + pointwise_bce.of("conversion") + pointwise_bce.of("like")
    shifted = pointwise_bce.of("click").bind(NAMES)(scores, labels, where=where, log_q=np.full((4, 5), 0.5))
    assert float(shifted) == pytest.approx(float(pointwise_bce(scores[..., 0] - 0.5, click, where=where)), rel=1e-5)


def labelled(data, at, draw):
    """The event's item and three others; what is clicked, converts, is liked follows from row numbers; some is unknown."""
    rows = np.random.default_rng(draw.step).integers(1, len(data.catalogue), (len(at), 4)).astype(np.int32)
    rows[:, 0] = data.log.item[at]
    click = (rows % 2).astype(np.float32)
    like = np.where(rows % 5 == 0, np.nan, rows % 7 == 0).astype(np.float32)
    return CandidateLists(rows, {"click": click, "conversion": click * (rows % 3 == 0), "like": like})


@pytest.fixture(scope="module")
def small(data):
    model = aif.build(demo.config(schema=data.schema, objectives=NAMES, **(demo.SMALL | {"head": aif.heads.Mlp((16,))})))
    return model, demo.init(model, items=data.catalogue)


def test_parts_of_a_batch_add_up(data, small):
    model, params = small
    at = np.flatnonzero(data.log.history_end(np.arange(len(data.log))) > 3)[:21]
    lists = labelled(data, at, BatchKey(0, 0, 0))
    batch = make_batch(data, at, lists.rows, lists.labels, config=model.config)
    expect_labels(batch, "")
    bad = dataclasses.replace(batch, labels=lists.labels | {"like": np.full((21, 4), np.inf, np.float32)})
    refused(BadBatch, "a label of sample 0 of the batch is not finite", expect_labels, bad, "")
    trained = {name: group for name, group in params.items() if name != "fitted"}

    def scores_of(given, some):
        return train.score(model, given | {"fitted": params["fitted"]}, some)

    whole, parts = (
        jax.jit(lambda p, part=part: loss_and_gradient(scores_of, p, batch, bce_of_each(NAMES).bind(NAMES), part=part))(trained)
        for part in (None, 8)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), whole, parts)


def test_steps_teach_every_objective_and_evaluation_says_so(data, small):
    model, params = small
    optimizer = train.default_optimizer(60, learning_rate=0.02, weight_decay=0.0)
    step = train.make_step(model, optimizer, loss=bce_of_each(NAMES))
    state = train.init_state(params, optimizer)
    at = np.flatnonzero(data.log.history_end(np.arange(len(data.log))) > 3)
    held, losses = at[-200:], []
    for number in range(60):
        some = np.random.default_rng(number).choice(at[:-200], 64)
        lists = labelled(data, some, BatchKey(0, 0, number))
        state, figures = step(state, make_batch(data, some, lists.rows, lists.labels, config=model.config))
        losses.append(float(figures["loss"]))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])

    def source(at, draw):
        return labelled(data, at, draw)

    given = dict(k=10, candidates=source, calibration_negatives=3, progress=False)
    got = aif.evaluate(model, state.params, data, held, **given)
    lists = source(held, BatchKey(0, 0, 0))
    scores = list_scores(model, state.params, data, held, lists.rows)
    assert list(got.objectives) == ["click", "conversion", "like"] and got.objectives["click"].auc == got.auc
    product, like = np.log(sigmoid(scores[..., 0]) * sigmoid(scores[..., 1])), lists.labels["like"]
    assert got.objectives["conversion"].auc == pytest.approx(metrics.auc(product, lists.labels["conversion"]), abs=1e-4)
    expected = metrics.auc(scores[..., 2], np.nan_to_num(like), where=~np.isnan(like))
    assert got.objectives["like"].auc == pytest.approx(expected, abs=1e-6)
    assert min(evaluation.auc for evaluation in got.objectives.values()) > 0.55
    assert {"auc", "hr@10", "conversion.auc", "like.calibration"} <= got.figures().keys() and got.hit_rate is not None
    calibration = partial(train.edits.calibration, positions=held, calibration_negatives=None)
    fitted = calibration(aif.Trained(model, state.params, data.encoder), data, candidates=source).params
    assert fitted["fitted"]["calibration"]["scale"].shape == (3,)
    after = aif.evaluate(model, fitted, data, held, **given)
    assert after.objectives["click"].calibration == pytest.approx(1, abs=1e-3)
    assert after.objectives["conversion"].calibration == pytest.approx(1, abs=0.1)  # the product of two fitted ones

    def without(at, draw):
        return CandidateLists(lists.rows, {name: lists.labels[name] for name in ("click", "conversion")})

    message = r"labels: expected one for each objective of the model \['click', 'conversion', 'like'\], by name, got \['click'"
    refused(ValueError, message, aif.evaluate, model, fitted, data, held, **given | {"candidates": without})
    refused(ValueError, "by name, got one array", aif.evaluate, model, fitted, data, held, **given | {"candidates": None})


@pytest.fixture(scope="module")
def served() -> World:
    return World(objectives=NAMES, **demo.VARIANTS["base"])


async def test_the_engine_answers_with_all_logits_by_bid_and_of_nothing(served):
    ids = served.ids[:60]
    everything = np.asarray(served.joint(served.params, served.user(3), served.features))[:60]
    async with served.engine(batch_size=2) as engine:
        priced = await engine.rank(aif.Request(user=3, context=bids_for(ids), order="bid"), 5)
        np.testing.assert_allclose(priced.scores, np.sort(sigmoid(everything[:, 0]) * bids_for(ids).bids)[::-1][:5], rtol=1e-4)
        by_logit = await engine.rank(aif.Request(user=3, context=ids), 8)
        assert by_logit.logits.shape == (8, 3) and (np.diff(by_logit.scores) <= 0).all()
        nothing = await engine.rank(aif.Request(user=3, context=np.zeros(0, np.int64)), 4)
        assert nothing.logits.shape == (4, 3) and not nothing.mask.any()
        assert (await engine.score(3, np.zeros(0, np.int64))).logits.shape == (0, 3)


def test_an_export_has_all_logits_probabilities_and_orders(served, tmp_path):
    made = {"scale": np.array([2, 1, 1], np.float32), "bias": np.array([0, -1, 0.5], np.float32)}
    params = aif_scores.with_calibration(served.params, made)
    orders = {"value": lambda p, bid: p["conversion"] * bid + 0.1 * p["like"], "plain": lambda p, bid: p["like"]}
    given = dict(platforms=("cpu",), orders=orders)
    digest = export.save(tmp_path / "model", aif.Trained(served.model, params), served.index_of(params), **given)
    loaded = export.load(tmp_path / "model", sha256=digest)
    assert export.verify(tmp_path / "model", sha256=digest)["functions"].keys() >= {"probability", "order_value", "order_plain"}
    assert loaded.orders == ("value", "plain")
    state = loaded.user(served.user(3))
    rows, _ = loaded.index.lookup(served.ids[:70])
    logits = loaded.score(state, loaded.index.table, rows)
    everything = np.asarray(served.joint(params, served.user(3), served.features))[:70]
    np.testing.assert_allclose(logits, everything, atol=1e-4)
    p = sigmoid(everything * made["scale"] + made["bias"])
    np.testing.assert_allclose(loaded.probabilities(logits), p, atol=1e-4)
    bids = np.asarray(loaded.index.table["side.bid"])[rows]
    expected = p[:, 0] * p[:, 1] * bids + 0.1 * p[:, 2]
    np.testing.assert_allclose(loaded.value("value", logits, bids), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(loaded.value("plain", logits), p[:, 2], atol=1e-4)
    assert loaded.score(state, loaded.index.table, rows[:0]).shape == (0, 3)
    refused(export.ExportError, r"order: expected one of \['plain', 'value'\], got 'bid'", loaded.value, "bid", logits)
    refused(export.ExportError, "missing", loaded.value, "value", logits)
    made = export.restore(tmp_path / "model")
    assert made.check_golden() < 1e-4
    export.save(tmp_path / "again", aif.open(tmp_path / "model"), made.index, **(given | {"orders": made.orders}))
    np.testing.assert_allclose(export.load(tmp_path / "again").value("value", logits, bids), expected, rtol=1e-3, atol=1e-4)
    named = {"a b": orders["plain"]}, {"x": lambda p, bid: p["price"]}, {"x": "p.like * bid"}
    for wrong, message in zip(named, ("orders: expected names of letters", "'price'", "function f"), strict=True):
        options = given | {"orders": wrong}
        refused(ValueError, message, export.save, tmp_path / "wrong", aif.Trained(served.model, params), **options)
