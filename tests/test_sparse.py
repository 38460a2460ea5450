"""Sparse updates: those of the dense optimizer on the rows that a batch names, in one part or many."""

import dataclasses
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import aif_jax as aif
from aif_jax import train
from aif_jax.blocks import Block, DotProduct, HeadInputs, block
from aif_jax.data.pipeline import Batch, PrefetchedBatch
from aif_jax.train import losses, optimizers
from aif_jax.train import step as training
from tests import demo

pytestmark = pytest.mark.lane("standing")
ITEM = ("item",)


def batch_of(config: aif.Config, *, seed: int, samples: int = 6, candidates: int = 2) -> Batch:
    """Features of several users, with candidates of each."""
    users = [demo.user(config, events=5 + seed + i, seed=10 * seed + i) for i in range(samples)]
    items = [demo.items(candidates, seed=100 * seed + i) for i in range(samples)]
    stack = lambda *x: np.stack(x)  # noqa: E731
    return Batch(
        users=jax.tree.map(stack, *users),
        items=jax.tree.map(stack, *items),
        labels=np.random.default_rng(seed).integers(0, 2, (samples, candidates)).astype(np.float32),
        where=np.ones((samples, candidates), bool),
    )


def run(model, params, optimizer, batches, *, sparse, part=None, loss=losses.pointwise_bce):
    """Train in parts of `part` samples, None for whole batches; returns the state and the metrics of each step."""
    state, metrics = train.init_state(params, optimizer), []
    step = train.make_step(model, optimizer, loss=loss, sparse=sparse)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "part_size", lambda *given: part)
        for batch in batches:
            state, values = step(state, batch)
            metrics.append({name: float(value) for name, value in values.items()})
    return state, metrics


def assert_close(a, b, *, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def items_of(batch: Batch) -> np.ndarray:
    return np.unique(np.concatenate([[0], np.ravel(batch.items.ids["item"]), np.ravel(batch.users.history.item)]))


@pytest.mark.parametrize("name", ["every block", "two SIM fields", "exact"])
def test_every_model_takes_the_step_of_the_dense_form(name):
    """Every table read through its rows, ids as they are: SIM's comparison, a history's categories, the bags of candidates."""
    model, params = demo.build(**demo.VARIANTS[name])
    optimizer, batches = optax.sgd(0.3), [batch_of(model.config, seed=1)]
    every = tuple(model.config.schema.table_sizes)
    assert optimizers.sparse_tables(model.config.schema, every) == ("item", "category", "tags", "gender", "interests")
    dense, expected = run(model, params, optimizer, batches, sparse=())
    got, metrics = run(model, params, optimizer, batches, sparse=every, part=4)
    assert_close(got.params, dense.params)
    assert metrics[0] == pytest.approx(expected[0], rel=1e-4)


@pytest.mark.parametrize("part", [None, 4, 50])
def test_the_size_of_the_parts_changes_nothing(part):
    model, params = demo.build(**demo.SMALL)
    batches, optimizer = [batch_of(model.config, seed=s) for s in (1, 2)], optax.adagrad(0.1)
    expected, _ = run(model, params, optimizer, batches, sparse=())
    for sparsely in ((), ITEM):
        got, _ = run(model, params, optimizer, batches, sparse=sparsely, part=part)
        assert_close((got.trained, got.opt_state), (expected.trained, expected.opt_state))


WITHOUT_LOG_Q = {"pointwise_bce": losses.pointwise_bce, "listwise_softmax": losses.listwise_softmax}
CORRECTED = losses.listwise_softmax + 0.1 * losses.pointwise_bce
WITH_LOG_Q = {"corrected sum": CORRECTED, "distilled sum": losses.distill_listwise + 2.0 * losses.pointwise_bce}


@pytest.mark.parametrize("name", [*WITHOUT_LOG_Q, *WITH_LOG_Q])
def test_a_mean_over_terms_adds_up_over_the_parts(name):
    """Parts with many, few and no terms; the last one is filled up with a sample that must not count. Each is scored once."""
    model, params = demo.build(**demo.SMALL)
    batch, rng = batch_of(model.config, seed=1, candidates=3), np.random.default_rng(0)
    where = rng.random((6, 3)) < 0.8
    where[4:] = [[False, False, False], [True, True, False]]
    labels = np.eye(3)[[1, 0, 1, 2, 0, 1]] * [[1], [1], [0], [1], [1], [1]]
    log_q = rng.normal(size=(6, 3)).astype(np.float32) if name in WITH_LOG_Q else None
    batch = dataclasses.replace(batch, where=where, labels=labels.astype(np.float32), log_q=log_q)
    loss = (WITHOUT_LOG_Q | WITH_LOG_Q)[name]
    assert 0 < where.sum() < where.size
    results, scored = [], []
    model = model._replace(joint=lambda *given, joint=model.joint: scored.append(part) or joint(*given))
    for part in (None, 4, 1):
        state, (metrics,) = run(model, params, optax.sgd(0.5), [batch], sparse=None, part=part, loss=loss)
        results.append((state.trained, metrics["loss"], metrics["grad_norm"]))
    assert scored == [None, 4, 1]  # traced once for each size
    assert float(results[0][2]) > 1e-3
    assert_close(results[0], results[1])
    assert_close(results[0], results[2])


class CountedExecutor(ThreadPoolExecutor):
    def __init__(self):
        super().__init__(1)
        self.calls = 0

    def submit(self, *given):
        self.calls += 1
        return super().submit(*given)


@pytest.mark.parametrize("sparse", [(), ITEM])
def test_shares_of_a_batch_give_the_same_bits_on_any_number_of_cores(sparse, monkeypatch):
    model, params = demo.build(**demo.SMALL)
    batch, optimizer, results = batch_of(model.config, seed=1, samples=13), optax.adam(0.1), []
    loss = losses.listwise_softmax + 0.5 * losses.pointwise_bce
    for calls in ([], [1], [1, 1, 0]):  # of other threads than this one: 13 parts are 3 shares
        threads = [CountedExecutor() for _ in calls]
        monkeypatch.setattr("aif_jax.train.step._threads", lambda threads=threads: threads)
        results.append(run(model, params, optimizer, [batch], sparse=sparse, part=1, loss=loss))
        assert [thread.calls for thread in threads] == calls
        for thread in threads:
            thread.shutdown()
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])
    whole, metrics = run(model, params, optimizer, [batch], sparse=sparse, loss=loss)
    assert_close(results[0][1], metrics)
    assert_close(results[0][0].trained, whole.trained)


def test_two_models_that_train_at_once_share_no_thread(monkeypatch):
    """XLA runs the calls of one thread one after the other: a small model would train at the pace of a large one beside it."""
    model, _ = demo.build(**demo.SMALL)
    made = []
    monkeypatch.setattr(training, "_threads", lambda: made.append(object()) or ())
    for _ in range(2):
        train.make_step(model, optax.sgd(0.1), loss=losses.pointwise_bce)
    assert len(made) == 2


def test_shares_hold_no_more_gradients_than_fit():
    assert training.in_shares(256, 4, training.SHARES_BYTES // 3) == (3, 4)
    assert training.in_shares(256, 4, 2 * training.SHARES_BYTES) == (1, 4)


def test_parts_hold_samples_of_like_length():
    """What blocks compute of a part ends with its longest history."""
    model, _ = demo.build(**demo.SMALL)
    batch = batch_of(model.config, seed=1)
    mask = np.arange(4) < np.array([4, 1, 3, 2, 0, 1])[:, None]
    history = dataclasses.replace(batch.users.history, **{
        name: getattr(batch.users.history, name)[:, :4] for name in ("item", "action", "age")}, mask=mask)  # fmt: skip
    batch = dataclasses.replace(batch, users=dataclasses.replace(batch.users, history=history))
    parts = training._parts(batch, jnp.argsort(jnp.asarray(mask).sum(1)), 4, (0, 1))
    assert parts.users.history.mask.sum(-1).tolist() == [[0, 1, 1, 2], [3, 4, 4, 4]]
    assert parts.where.any(-1).tolist() == [[True] * 4, [True, True, False, False]]
    np.testing.assert_array_equal(parts.labels[1, :2], batch.labels[[2, 0]])


@block
class Embedding(Block):
    """Its parameter is called as a table is."""

    def widths(self, config): return {"read": 2}  # fmt: skip

    def init(self, key, config): return {"item": jnp.zeros((config.width, 2))}  # fmt: skip

    def score(self, params, state, rows, kernels):
        return HeadInputs(rest=rows.vector @ params["item"] @ kernels["read"])


@pytest.mark.parametrize("optimizer", [
    optax.adagrad(0.1), optax.sgd(optax.linear_schedule(0.3, 0.0, 10)),
    optax.chain(optax.clip_by_global_norm(0.05), optax.adagrad(0.1)),
    optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)),  # which reads the loss
], ids=["adagrad", "sgd under a schedule", "clipped", "plateau"])  # fmt: skip
def test_where_a_zero_gradient_changes_nothing_the_whole_table_is_that_of_the_dense_optimizer(optimizer):
    model, params = demo.build(**demo.SMALL | {"blocks": (DotProduct(), Embedding()), "head": aif.heads.Mlp()})
    batches = [batch_of(model.config, seed=s, samples=2) for s in range(4)]
    dense, expected = run(model, params, optimizer, batches, sparse=())
    got, metrics = run(model, params, optimizer, batches, sparse=ITEM)
    assert_close((got.trained, got.opt_state), (dense.trained, dense.opt_state))
    np.testing.assert_allclose([m["grad_norm"] for m in metrics], [m["grad_norm"] for m in expected], rtol=1e-4)


def test_an_optimizer_may_keep_the_parameters_in_its_state():
    model, params = demo.build(**demo.SMALL)
    _, metrics = run(model, params, optax.contrib.prodigy(), [batch_of(model.config, seed=1)] * 3, sparse=())
    assert metrics[2]["loss"] < metrics[0]["loss"]


def test_lazy_adam_is_dense_adam_on_rows_that_every_batch_names():
    model, params = demo.build(**demo.SMALL)
    batches = [batch_of(model.config, seed=1)] * 4
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.01, weight_decay=0.1))
    dense, _ = run(model, params, optimizer, batches, sparse=())
    got, _ = run(model, params, optimizer, batches, sparse=ITEM)
    rows = items_of(batches[0])
    others = np.setdiff1d(np.arange(50), rows)
    assert len(others) and len(rows) > 5
    table, expected, start = (np.asarray(p["embedding"]["item"]) for p in (got.params, dense.params, params))
    np.testing.assert_allclose(table[rows], expected[rows], atol=2e-5)
    np.testing.assert_array_equal(table[others], start[others])
    assert np.abs(expected[others] - start[others]).max() > 0  # the dense form decays them


def test_lazy_adam_by_its_formula():
    """Rows move only in steps whose batch names them; the bias correction counts every step."""
    rng = np.random.default_rng(0)
    table, optimizer = rng.normal(size=(7, 3)).astype(np.float32), optax.adamw(0.1, weight_decay=0.2)
    params = {"embedding": {"item": jnp.asarray(table), "other": jnp.ones(2)}}
    state, slot = optimizer.init(params), jnp.zeros(7, jnp.int32)
    dense, marked = np.zeros((5, 7, 3)), np.zeros((5, 7), bool)
    for step in range(5):
        ids = jnp.asarray(rng.integers(0, 4, 6) + (step % 2) * 3, jnp.int32)
        occurrences = rng.normal(size=(6, 3)).astype(np.float32)
        np.add.at(dense[step], ids, occurrences)
        marked[step, ids] = True
        slot, unique = optimizers.number_ids(slot, ids)
        assert int(unique.count) == len(np.unique(ids))

        def update(gradient, params, state):
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, ()

        named = {"item": optimizers.row_ids(unique, 6, none=7)}
        summed = {"item": jnp.zeros((6, 3)).at[unique.number].add(jnp.asarray(occurrences))}
        params, state, _ = optimizers.update_rows(update, params, state, {"embedding": {"other": jnp.zeros(2)}}, named, summed)
    expected, first, second = np.float64(table), np.zeros((7, 3)), np.zeros((7, 3))
    for step, (gradient, rows) in enumerate(zip(dense, marked, strict=True), 1):
        first[rows] = 0.9 * first[rows] + 0.1 * gradient[rows]
        second[rows] = 0.999 * second[rows] + 0.001 * gradient[rows] ** 2
        moved = (first[rows] / (1 - 0.9**step)) / (np.sqrt(second[rows] / (1 - 0.999**step)) + 1e-8)
        expected[rows] -= 0.1 * (moved + 0.2 * expected[rows])
    np.testing.assert_allclose(params["embedding"]["item"], expected, atol=1e-5)


@pytest.mark.parametrize(("count", "size"), [(1, 1250), (700, 1250), (5000, 5000)])
def test_the_update_fits_its_size_to_the_rows_of_the_batch(count, size):
    """5,000 occurrences may be one row or 5,000: each compiled size gives the same."""
    rows, rng = 6000, np.random.default_rng(count)
    chosen = rng.permutation(rows)[:count]
    ids = np.concatenate([chosen, rng.choice(chosen, 5000 - count)]).astype(np.int32)
    gradient = rng.normal(size=(5000, 2)).astype(np.float32)
    params = {"embedding": {"item": jnp.ones((rows, 2))}}
    _, unique = optimizers.number_ids(jnp.zeros(rows, jnp.int32), ids)
    assert int(unique.count) == count and optimizers.size_for(count, 5000) == size

    @jax.jit
    def updated(params, unique, gradient):
        def update(gradient, params, state):
            return jax.tree.map(lambda p, g: p - g, params, gradient), state, None

        named = {"item": optimizers.row_ids(unique, size, none=rows)}
        summed = {"item": jnp.zeros((size, 2)).at[unique.number].add(gradient)}
        return optimizers.update_rows(update, params, (), {"embedding": {}}, named, summed)

    after, _, _ = updated(params, unique, gradient)
    expected = np.ones((rows, 2), np.float32)
    np.subtract.at(expected, ids, gradient)
    np.testing.assert_allclose(after["embedding"]["item"], expected, atol=1e-4)


def test_parts_are_larger_where_each_would_write_many_rows():
    events = 2 + 3 + 4
    few = training.PART_EVENTS // events
    assert training.part_size(12, events) is None and few > 12
    parts = -(-4000 * 12 // few)
    assert training.part_size(4000 * 12, events) == -(-4000 * 12 // parts) <= few  # even parts: little of the last is filling
    assert training.part_size(256, training.PART_EVENTS // 125) == 86  # 3 x 86, not 3 x 125
    assert training.part_size(4000 * 12, events, training.PART_BYTES // 3) == 4000 * 12 // 3
    assert training.part_size(4000 * 12, events, 2 * training.PART_BYTES) is None


def test_a_step_on_one_cpu_takes_parts_by_what_the_model_reads(monkeypatch):
    model, params = demo.build(**demo.SMALL)
    batch = batch_of(model.config, seed=0, samples=12)
    longer = dataclasses.replace(batch.users, history=jax.tree.map(lambda x: np.repeat(x, 9, axis=1), batch.users.history))
    seen = []
    monkeypatch.setattr(training, "part_size", lambda *given: seen.append(given) or None)
    step = train.make_step(model, optax.sgd(0.1), loss=losses.pointwise_bce)
    for users in (batch.users, longer):
        step(train.init_state(params, optax.sgd(0.1)), dataclasses.replace(batch, users=users))
    assert seen == [(12, 2 + 3 + 4, 0)] * 2


def test_places_that_the_model_does_not_read_update_no_row():
    """Lazy Adam would move them."""
    model, params = demo.build(**demo.SMALL)
    batch = batch_of(model.config, seed=1)
    history = jax.tree.map(lambda x: np.concatenate([x, x], axis=1), batch.users.history)
    history = dataclasses.replace(history, item=np.where(np.arange(8) < 4, history.item, 49).astype(np.int32))
    longer = dataclasses.replace(batch, users=dataclasses.replace(batch.users, history=history))
    assert 49 not in items_of(batch)
    (short, _), (long, _) = (run(model, params, optax.adam(0.1), [b] * 2, sparse=ITEM) for b in (batch, longer))
    assert_close(long.trained, short.trained)


def test_ids_out_of_range_read_and_train_row_0():
    model, params = demo.build(**demo.SMALL)
    batch = batch_of(model.config, seed=1)
    ids = batch.items.ids | {"item": np.array(batch.items.ids["item"])}
    ids["item"][0], ids["item"][1] = -3, 50
    batch = dataclasses.replace(batch, items=dataclasses.replace(batch.items, ids=ids))
    dense, _ = run(model, params, optax.sgd(0.3), [batch], sparse=())
    got, _ = run(model, params, optax.sgd(0.3), [batch], sparse=ITEM)
    assert_close(got.trained, dense.trained)
    assert not np.allclose(dense.params["embedding"]["item"][0], params["embedding"]["item"][0])


def test_a_tower_that_reads_a_row_outside_the_batch_does_not_train_on_another_one(caplog, monkeypatch):
    """Such as the next item's: its row is not among those that the step took, so the loss is NaN and the way out is named."""
    config = demo.build(**demo.SMALL)[0].config

    def next_item(params, features, *, config):
        row = aif.model.ITEM.apply(params, features, config=config)
        other = aif.layers.lookup(params["embedding"]["item"], (jnp.asarray(features.ids["item"]) + 1) % demo.ITEMS)
        return dataclasses.replace(row, vector=row.vector + other)

    model = aif.assemble(config, item=aif.Component(aif.model.ITEM.init, next_item))
    params, batch = model.init(jax.random.key(0), demo.catalogue()), batch_of(config, seed=1)
    assert not set((items_of(batch) + 1) % demo.ITEMS) <= set(items_of(batch))
    optimizer = optax.sgd(0.3)
    step = train.make_step(model, optimizer, loss=losses.pointwise_bce, sparse=ITEM)
    with caplog.at_level("WARNING"):
        state = train.loop(train.init_state(params, optimizer), step, [PrefetchedBatch(batch=batch)], progress=False)
    assert int(state.skipped) == 1 and "step 1 changed nothing: loss nan" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    assert "reads an embedding row outside the batch needs sparse=()" in caplog.text
    monkeypatch.setattr(sys.modules["aif_jax.train.loop"], "MOST_SKIPPED", 0)  # `train.loop` is the function
    with pytest.raises(FloatingPointError, match="reads an embedding row outside the batch needs sparse=\\(\\)"):
        train.loop(train.init_state(params, optimizer), step, [PrefetchedBatch(batch=batch)], progress=False)
    whole, values = run(model, params, optimizer, [batch], sparse=())
    assert np.isfinite(values[0]["loss"]) and int(whole.skipped) == 0


def test_a_step_that_is_not_finite_changes_no_row():
    model, params = demo.build(**demo.SMALL)
    poisoned = dataclasses.replace(batch_of(model.config, seed=1), labels=np.full((6, 2), np.nan, np.float32))
    state, _ = run(model, params, optax.adam(0.1), [poisoned], sparse=ITEM)
    start = train.init_state(params, optax.adam(0.1))
    assert int(state.skipped) == 1
    assert_equal((state.trained, state.opt_state), (start.trained, start.opt_state))


def test_config_names_what_is_wrong_and_an_optimizer_that_mixes_rows_is_refused():
    schema = demo.schema()
    assert optimizers.sparse_tables(schema, ()) == () and optimizers.sparse_tables(schema, None) == ()
    with pytest.raises(ValueError, match=r"names among \['category', 'gender', 'interests', 'item', 'tags'\], got"):
        optimizers.sparse_tables(schema, ("behaviour.age",))
    model, params = demo.build(**demo.SMALL)
    gathers = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(), optax.apply_every(2)
    for optimizer in (optax.adafactor(0.1, min_dim_size_to_factor=2), optax.sm3(0.1), *gathers):
        with pytest.raises(ValueError, match="one row for each of the 50 rows of table 'item', which only its batch moves"):
            run(model, params, optimizer, [batch_of(model.config, seed=1)], sparse=ITEM)
