"""The sequence loss: against a slow reference, causal, blind to padding, alone in training, in `fit`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import aif_jax as aif
from aif_jax import train, user
from aif_jax.data.candidates import NegativeSampler, SampleKey, item_counts, sampled_negatives
from aif_jax.data.pipeline import make_batch
from aif_jax.train import SequenceLoss, losses
from experiments.datasets.synthetic import synthetic_world
from tests.reference.sequence import sequence_loss as reference
from tests.test_objectives import check_parts_add_up

pytestmark = pytest.mark.usefixtures("light_compilation")

SIZES = dict(width=8, short_length=10, towers=(8,), head=(8,))
LAYERS = (0, 1, 2)


@pytest.fixture(scope="module")
def data():
    return synthetic_world(
        0, users=30, items=60, topics=6, categories=5, events_per_user=30, lag=4, interests=3, content_dim=4
    ).dataset


@pytest.fixture(scope="module")
def models(data):
    made = {}
    for layers in LAYERS:
        model = aif.build(aif.presets.two_tower_matching(data.schema, long_length=16, encoder_layers=layers, **SIZES))
        made[layers] = model, model.init(jax.random.key(layers), data.catalogue)
    return made


@pytest.fixture(scope="module")
def batch(data, models):
    """Samples with short, long and empty histories, an unknown item and a sample without candidates among them."""
    first = data.log.offsets[1:]  # of each user; row 0 is the unknown one
    at = np.concatenate([first[:6], first[:6] + 5, first[1:8] - 1])
    sampler = NegativeSampler(item_counts(data, np.arange(len(data.log))))
    source = sampled_negatives(data, sampler=sampler, negatives=4, logq_correction=True, repeats=True)
    rows, labels, log_q = source(at, SampleKey(0, 0, 0))
    rows[-1], rows[3, 2] = 0, data.log.item[at[-2] - 3]
    made = make_batch(data, at, rows, labels, config=models[0][0].config, log_q=log_q)
    made.users.history.item[12, 2] = 0
    return made


def part(loss, model, params, batch):
    """Value of a whole batch."""
    bound = loss.bind(model)
    return jax.jit(lambda params: bound.over(batch, model.config)(params, batch))(params)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("repeats", [True, False])
def test_equal_to_the_reference(models, batch, layers, repeats):
    model, params = models[layers]
    loss = SequenceLoss(weight=0.5, negatives=33, repeats=repeats)
    shared = loss.shared(batch, model.config)
    flat = np.where(batch.where, batch.items.ids["item"], 0).T[::-1].ravel()
    assert shared.item.tolist() == [row for row in flat if row][:33]
    rows, draws = np.asarray(batch.items.ids["item"]), 4
    log_q_of = dict(zip(rows.ravel().tolist(), np.asarray(batch.log_q).ravel().tolist(), strict=True))
    changed = rows[3, 2]  # its log_q is that of the item that it took the place of
    wanted = [log_q_of[row] + np.log(33 / draws) for row in shared.item.tolist()]
    same = np.asarray(shared.item) != changed
    np.testing.assert_allclose(np.asarray(shared.log_q)[same], np.array(wanted)[same], rtol=1e-5)
    every = np.arange(model.config.schema.item_attribute("item").size)
    vectors = np.asarray(user.targets(params, every, config=model.config))
    total, count = 0.0, 0
    for row in range(len(rows)):
        history = jax.tree.map(lambda x, row=row: x[row], batch.users.history)
        if not batch.where[row].any():
            continue
        states, _ = user.states(params, jax.tree.map(lambda x: x[:10], history), config=model.config)
        given = (np.asarray(states), vectors, history.item, history.mask, shared.item.tolist())
        lost, places = reference(*given, log_q=np.asarray(shared.log_q), repeats=repeats)
        total, count = total + lost, count + places
    assert count == int(shared.targets) > 50
    np.testing.assert_allclose(part(loss, model, params, batch), 0.5 * total / count, rtol=1e-4)
    other = dataclasses.replace(loss, repeats=not repeats)
    assert abs(float(part(other, model, params, batch)) - 0.5 * total / count) > 1e-4


@pytest.mark.parametrize("layers", LAYERS)
def test_later_events_change_no_earlier_state(models, batch, layers):
    model, params = models[layers]
    history = jax.tree.map(lambda x: jnp.asarray(x[-2][:10]), batch.users.history)
    assert history.mask.all()
    states = jax.jit(lambda history: user.states(params, history, config=model.config)[0])
    before = states(history)
    for place in (0, 3, 7):
        later = np.arange(10) < place + 1
        changed = dataclasses.replace(
            history, item=jnp.where(later, 1 + history.item % 50, history.item), age=jnp.where(later, 7.0, history.age)
        )
        after = states(changed)
        np.testing.assert_array_equal(after[place + 1 :], before[place + 1 :])
        assert np.abs(after[place] - before[place]).max() > 1e-3


def test_later_events_change_no_earlier_places_of_the_loss(models, batch):
    """One target counts, that of the oldest pair of events: nothing later moves it, without `repeats` neither."""
    model, params = models[1]
    one = jax.tree.map(lambda x: np.asarray(x)[-2:-1].copy(), batch)
    one.users.history.mask[:, 10:] = False
    loss = SequenceLoss(repeats=False).bind(model)
    shared = loss.shared(one, model.config)

    def gradient(item_moved):
        moved = jax.tree.map(np.copy, one)
        moved.users.history.item[0, :8] = item_moved
        keep = np.zeros((1, 16), bool)
        keep[0, 8:10] = True  # of the pairs of events, one whose two places count
        only = dataclasses.replace(moved.users.history, mask=keep)
        moved = dataclasses.replace(moved, users=dataclasses.replace(moved.users, history=only))
        return float(loss.part(params, moved, shared=shared._replace(targets=jnp.int32(1)), config=model.config))

    assert gradient(one.users.history.item[0, :8]) == gradient(int(shared.item[0])) > 0


@pytest.mark.parametrize("layers", LAYERS)
def test_padding_changes_neither_loss_nor_scores(models, batch, layers):
    model, params = models[layers]
    loss = SequenceLoss(repeats=False)
    history = batch.users.history
    garbage = dataclasses.replace(history, item=np.where(history.mask, history.item, 7))
    noisy = dataclasses.replace(batch, users=dataclasses.replace(batch.users, history=garbage))
    short = jax.tree.map(lambda x: x[:6, :5], batch.users.history)
    assert not batch.users.history.mask[:6, 5:].any()
    cut = jax.tree.map(lambda x: x[:6], batch)
    few = dataclasses.replace(cut, users=dataclasses.replace(cut.users, history=short))
    for left, right in ((batch, noisy), (cut, few)):
        np.testing.assert_allclose(part(loss, model, params, left), part(loss, model, params, right), rtol=1e-5)
        np.testing.assert_allclose(train.score(model, params, left), train.score(model, params, right), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", LAYERS)
def test_gradient_is_that_of_the_loss_and_reaches_the_encoder(models, batch, layers):
    model, params = models[layers]
    loss = SequenceLoss(weight=1.0, repeats=False).bind(model)
    shared = loss.shared(batch, model.config)
    trained = {name: group for name, group in params.items() if name != "fitted"}

    @jax.jit
    def of(trained):
        return loss.part(trained | {"fitted": params["fitted"]}, batch, shared=shared, config=model.config)

    gradient = jax.jit(jax.grad(of))(trained)
    direction = jax.tree.map(lambda x: 0.001 * jax.random.normal(jax.random.key(3), x.shape), trained)
    moved = [jax.tree.map(lambda x, d, sign=sign: x + sign * d, trained, direction) for sign in (1, -1)]
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float(jnp.sum(g * d)), gradient, direction)))
    np.testing.assert_allclose(slope, (float(of(moved[0])) - float(of(moved[1]))) / 2, rtol=0.05)
    inside = gradient["user"].get("encoder", {"layer_0": gradient["user"].get("feed_forward")})
    reached = inside["layer_0"]["out" if layers else "layer_0"]
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(reached))
    assert not any(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient["item"]))  # the tower; tables are shared


def test_parts_of_a_batch_add_up(models, batch):
    model, params = models[1]
    of_sequence = SequenceLoss(repeats=False).bind(model).over(batch, model.config)
    check_parts_add_up(model, params, batch, losses.listwise_softmax + losses.pointwise_bce, of_sequence)


@pytest.mark.parametrize("sparse", [None, train.SparseConfig(min_rows=1)])
def test_a_step_adds_it_to_the_loss(models, batch, sparse):
    model, params = models[1]
    main = losses.listwise_softmax + losses.pointwise_bce
    optimizer = optax.sgd(0.1)
    figures = {}
    for weight in (None, 0.25, 0.5):
        loss = None if weight is None else SequenceLoss(weight=weight)
        step = train.make_step(model, optimizer, loss=main, sequence_loss=loss, sparse=sparse)
        _, metrics = step(train.init_state(params, optimizer), batch)
        figures[weight] = float(metrics["loss"])
    added = float(part(SequenceLoss(weight=0.25), model, params, batch))
    assert figures[0.25] - figures[None] == pytest.approx(added, rel=1e-3)
    assert figures[0.5] - figures[None] == pytest.approx(2 * added, rel=1e-3)


def test_the_model_is_the_same_with_and_without_the_loss(models, data):
    """It is of training alone: no parameter and no config knows of it. Without layers versions stay what they were."""
    model, params = models[0]
    assert "encoder_layers" not in model.config.to_json() and models[2][0].config.to_json()["encoder_layers"] == 2
    for layers in LAYERS:
        config = models[layers][0].config
        assert aif.Config.from_json(config.to_json()) == config
    assert sorted(params["user"]) == ["feed_forward", "norm", "position", "profile_constant", "sequence", "tower"]


def test_fit_learns_the_sequence_and_resumes_under_the_same_settings(data, models, tmp_path):
    model, _ = models[1]
    given = dict(task=train.NextItem(), batch_size=64, k=None, buckets=(), progress=False, epochs=1, learning_rate=0.02)
    run = aif.fit(model, data, out=tmp_path / "run", sequence_loss=SequenceLoss(), **given)
    assert run.settings.sequence_loss == f"SequenceLoss(weight=0.1, negatives=256, repeats={data.repeats})"
    assert aif.Run.load(tmp_path / "run").settings == run.settings
    plain = aif.fit(model, data, **given)
    assert "sequence_loss" not in plain.settings.to_json()
    assert run.trained.config == plain.trained.config and run.version != plain.version
    shapes = [jax.tree.map(jnp.shape, one.params) for one in (run, plain)]
    assert shapes[0] == shapes[1]
    with pytest.raises(ValueError, match="sequence_loss"):
        aif.fit(model, data, out=tmp_path / "run", **given)
