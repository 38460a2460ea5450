"""The training step: the optimizer on the gradient of joint, refusals, precision, one compilation."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import aif_jax as aif
from aif_jax import train
from aif_jax.data.candidates import sampled_negatives
from aif_jax.data.negatives import NegativeSampler, item_counts
from aif_jax.data.pipeline import Pipeline, PrefetchedBatch
from aif_jax.data.split import split_by_time
from aif_jax.train import losses
from experiments.datasets.synthetic import synthetic_world
from tests import demo
from tests.demo import same
from tests.refusals import refused


@pytest.fixture(scope="module")
def feed() -> Pipeline:
    """Three epochs of lists of a small data set, for a model with every approximation."""
    sizes = dict(users=40, items=120, topics=12, categories=8, events_per_user=60, lag=8, content_dim=12)
    dataset = synthetic_world(0, **sizes).dataset
    config = demo.config(schema=dataset.schema, long_length=32)
    positions = split_by_time(dataset.log, min_history=1).train
    source = sampled_negatives(dataset, sampler=NegativeSampler(item_counts(dataset, positions)), negatives=3)
    return Pipeline(dataset=dataset, positions=positions, source=source, config=config, batch_size=64, epochs=3)


@pytest.fixture(scope="module")
def model(feed) -> aif.PreRanker:
    return aif.build(feed.config)


@pytest.fixture(scope="module")
def params(feed, model) -> dict:
    return demo.init(model, items=feed.dataset.catalogue)


@pytest.fixture(scope="module")
def batch(feed):
    return next(feed.batches()).batch


@pytest.fixture(scope="module")
def trainer(model, params):
    optimizer = optax.adamw(3e-3)
    return train.init_state(params, optimizer), train.make_step(model, optimizer, loss=losses.pointwise_bce)


def copy(state):
    return jax.tree.map(jnp.array, state)


def test_training_lowers_the_loss_and_leaves_fitted_parameters(feed, trainer):
    start, step = trainer
    seen = []
    log = lambda number, values: seen.append((number, values["loss"]))  # noqa: E731
    state = train.loop(copy(start), step, feed.batches(), progress=False, log_every=1, on_log=log)
    assert [number for number, _ in seen] == list(range(1, int(state.step) + 1))
    assert np.mean([loss for _, loss in seen[-5:]]) < 0.9 * np.mean([loss for _, loss in seen[:5]])
    assert same(state.fitted, start.fitted) and "signatures_32" in start.fitted["fitted"]
    assert not same(state.trained, start.trained)
    assert sorted(state.params) == ["blocks", "embedding", "fitted", "head", "item", "user"]


def test_a_step_is_the_optimizer_on_the_gradient_of_joint(model, params, batch):
    optimizer = optax.sgd(0.5)
    start = train.init_state(params, optimizer)
    pairs = [jax.tree.map(operator.itemgetter(i), (batch.users, batch.items)) for i in range(2)]

    def objective(trained):
        scores = [model.joint(trained | {"fitted": params["fitted"]}, *pair) for pair in pairs]
        return losses.pointwise_bce(jnp.stack(scores), batch.labels[:2])

    trained = {name: group for name, group in params.items() if name != "fitted"}
    loss, gradient = jax.jit(jax.value_and_grad(objective))(trained)
    after, metrics = train.make_step(model, optimizer, loss=losses.pointwise_bce)(start, jax.tree.map(lambda x: x[:2], batch))
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, trained, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after.trained, expected)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(batch, trainer):
    start, step = trainer
    poisoned = dataclasses.replace(batch, labels=np.full_like(batch.labels, np.nan))
    after, metrics = step(copy(start), poisoned)
    assert np.isnan(metrics["loss"])
    assert same(after.trained, start.trained) and same(after.opt_state, start.opt_state)
    assert int(after.skipped) == 1 and int(after.step) == 1
    message = "all 3 steps had a loss or gradient that was not finite"
    refused(FloatingPointError, message, train.loop, copy(start), step, [PrefetchedBatch(batch=poisoned)] * 3, progress=False)
    after, metrics = step(copy(start), dataclasses.replace(batch, where=np.zeros_like(batch.where)))
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and int(after.skipped) == 0


def test_predict_gives_joint_scores_and_compiles_once(model, params, batch):
    traced = []
    counted = model._replace(joint=lambda *given: traced.append(1) or model.joint(*given))
    (first,), (second,) = (train.predict(counted, params, [batch]) for _ in range(2))
    assert len(traced) == 1
    one = jax.jit(model.joint)(params, *jax.tree.map(lambda x: x[5], (batch.users, batch.items)))
    assert first.shape == (64, 4)
    np.testing.assert_allclose(first[5], one, atol=1e-5)
    np.testing.assert_array_equal(first, second)


def test_a_short_run_trains_from_its_first_step_and_a_longer_one_warms_up():
    def first(steps):
        optimizer, weights = train.default_optimizer(steps, learning_rate=0.5, weight_decay=1e-5), {"w": jnp.ones(3)}
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update({"w": jnp.ones(3)}, optimizer.init(weights), weights)[0]["w"]

    for steps, change in ((1, 0.5), (19, 0.5), (20, 0.0), (100, 0.0)):
        np.testing.assert_allclose(-first(steps), change, rtol=1e-4)


def test_any_callable_is_a_loss_and_optax_needs_no_loose_promotion(feed, batch):
    """The default optimizer's schedule divides integers: that is allowed inside the step, and nowhere else."""
    model = aif.build(feed.config.replace(**demo.VARIANTS["base"]))  # compiles soonest
    optimizer, params = train.default_optimizer(20), demo.init(model, items=feed.dataset.catalogue)
    few = jax.tree.map(lambda x: x[:4], batch)
    squares = lambda scores, labels, *, where: jnp.mean((scores - labels) ** 2)  # noqa: E731
    after, metrics = train.make_step(model, optimizer, loss=squares)(train.init_state(params, optimizer), few)
    assert np.isfinite(metrics["loss"]) and int(after.step) == 1
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    with pytest.raises(TypeError, match=r"loss: expected a function of .*, got an unexpected keyword argument 'where'"):
        train.make_step(model, optimizer, loss=lambda scores, labels, mask: jnp.mean(scores))
