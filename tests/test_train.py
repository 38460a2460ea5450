import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import aif_jax as aif
from aif_jax import loop, losses, train
from aif_jax.data.batches import next_item_batches
from aif_jax.data.sampling import NegativeSampler, item_counts
from aif_jax.data.split import eligible, split_by_time
from aif_jax.data.synthetic import synthetic_world
from tests import demo
from tests.test_sparse import batch_of


@pytest.fixture(scope="module")
def world():
    """A data set with signatures, a tiny model of it, its training positions and a sampler."""
    dataset = synthetic_world(
        0, users=40, items=120, topics=12, categories=8, events_per_user=60, lag=8, content_dim=12
    ).dataset
    config = aif.tiny(dataset.schema, long_length=32)
    frozen = aif.lsh.fit(dataset.catalogue.content, config)
    dataset = dataset.with_signatures(np.asarray(aif.lsh.sign(frozen, jnp.asarray(dataset.catalogue.content))))
    positions = eligible(dataset.log, split_by_time(dataset.log).train, min_history=1)
    return dataset, aif.build(config), frozen, positions, NegativeSampler(item_counts(dataset, positions))


def batches(world, *, epoch=0, start=0):
    dataset, model, _, positions, sampler = world
    return next_item_batches(
        dataset, positions, config=model.config, sampler=sampler, batch_size=64, negatives=3, seed=0, epoch=epoch, start=start
    )


@pytest.fixture(scope="module")
def trainer(world):
    _, model, frozen, _, _ = world
    optimizer = optax.adamw(3e-3)
    return train.init_state(model.init(jax.random.key(0), frozen=frozen), optimizer), train.make_step(
        model, optimizer, loss=losses.pointwise_bce
    )


def copy(state):
    return jax.tree.map(jnp.array, state)


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_training_lowers_the_loss_and_leaves_frozen_parameters(world, trainer):
    start, step = trainer
    seen = []
    state = copy(start)
    for epoch in range(3):
        state = loop.fit(
            state,
            step,
            batches(world, epoch=epoch),
            progress=False,
            log_every=1,
            on_log=lambda at, v: seen.append((at, v["loss"])),
        )
    assert [at for at, _ in seen] == list(range(1, int(state.step) + 1))
    assert np.mean([loss for _, loss in seen[-5:]]) < 0.9 * np.mean([loss for _, loss in seen[:5]])
    assert same(state.frozen, start.frozen)
    assert not same(state.trained, start.trained)
    assert sorted(state.params) == ["bridge", "embedding", "frozen", "interaction", "item", "user"]


def test_a_step_is_the_optimizer_on_the_gradient_of_joint(world):
    _, model, frozen, _, _ = world
    optimizer = optax.sgd(0.5)
    start = train.init_state(model.init(jax.random.key(1), frozen=frozen), optimizer)
    batch = next(batches(world))
    params = copy(start).params
    pairs = [jax.tree.map(operator.itemgetter(i), (batch.users, batch.items)) for i in range(2)]

    def objective(trained):
        whole = trained | {"frozen": params["frozen"]}
        scores = [model.joint(whole, *pair) for pair in pairs]
        return losses.pointwise_bce(jnp.stack(scores), batch.labels[:2])

    trained = {name: group for name, group in params.items() if name != "frozen"}
    gradient = jax.jit(jax.grad(objective))(trained)
    few = jax.tree.map(lambda x: x[:2], batch)
    after, metrics = train.make_step(model, optimizer, loss=losses.pointwise_bce)(start, few)
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, trained, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after.trained, expected)
    np.testing.assert_allclose(metrics["loss"], objective(trained), rtol=1e-5)


def test_resuming_at_a_step_continues_bit_for_bit(world, trainer):
    start, step = trainer
    whole = loop.fit(copy(start), step, batches(world), progress=False)
    half = copy(start)
    for _, batch in zip(range(7), batches(world), strict=False):
        half, _ = step(half, batch)
    resumed = loop.fit(copy(half), step, batches(world, start=7), progress=False)
    assert int(whole.step) == int(resumed.step) > 10
    assert same(whole, resumed)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(world, trainer):
    start, step = trainer
    batch = next(batches(world))
    poisoned = dataclasses.replace(batch, labels=np.full_like(batch.labels, np.nan))
    after, metrics = step(copy(start), poisoned)
    assert np.isnan(metrics["loss"])
    assert same(after.trained, start.trained) and same(after.opt_state, start.opt_state)
    assert int(after.skipped) == 1 and int(after.step) == 1
    with pytest.raises(FloatingPointError, match="3 of 3 steps had a loss or gradient that was not finite"):
        loop.fit(copy(start), step, [poisoned] * 3, progress=False, max_skipped=2)


def test_an_all_padded_batch_teaches_nothing(world, trainer):
    start, step = trainer
    batch = next(batches(world))
    nothing = dataclasses.replace(batch, where=np.zeros_like(batch.where))
    after, metrics = step(copy(start), nothing)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and int(after.skipped) == 0


def test_predict_gives_joint_scores(world, trainer):
    _, model, _, _, _ = world
    state, _ = trainer
    batch = next(batches(world))
    (scores,) = train.predict(model, state.params, [batch])
    one = model.joint(state.params, *jax.tree.map(lambda x: x[5], (batch.users, batch.items)))
    assert scores.shape == (64, 4)
    np.testing.assert_allclose(scores[5], one, atol=1e-5)


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32():
    model, params = demo.build(architecture="two_tower", sequence=False)
    batch = batch_of(model.config, seed=1)
    optimizer = optax.sgd(0.1)
    seen = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        step = train.make_step(model, optimizer, loss=losses.pointwise_bce, compute_dtype=dtype)
        state, metrics = step(train.init_state(params, optimizer), batch)
        assert {leaf.dtype for leaf in jax.tree.leaves(state.trained)} == {jnp.dtype("float32")}
        assert metrics["loss"].dtype == jnp.float32
        seen[dtype] = float(metrics["loss"])
    assert 0 < abs(seen[jnp.bfloat16] - seen[jnp.float32]) < 0.02
    scores = jax.eval_shape(lambda p: train._score(model, p, batch.users, batch.items, compute_dtype=jnp.bfloat16), params)
    assert scores.dtype == jnp.float32 and scores.shape == batch.labels.shape


def test_ages_keep_their_buckets_in_bfloat16():
    """A bfloat16 has 8 bits: an age of 2^k - 1 seconds would be rounded into the next bucket."""
    model, params = demo.build(architecture="two_tower", sequence=False)
    batch = batch_of(model.config, seed=1)
    ages = np.full_like(batch.users.short.age, 2.0**16 - 2)
    short = dataclasses.replace(batch.users.short, age=ages)
    batch = dataclasses.replace(batch, users=dataclasses.replace(batch.users, short=short))
    optimizer = optax.sgd(1.0)
    step = train.make_step(model, optimizer, loss=losses.pointwise_bce, compute_dtype=jnp.bfloat16)
    state, _ = step(train.init_state(params, optimizer), batch)
    moved = np.abs(np.asarray(state.params["embedding"]["behaviour.age"]) - params["embedding"]["behaviour.age"]).max(1) > 0
    assert np.flatnonzero(moved).tolist() == [15]
