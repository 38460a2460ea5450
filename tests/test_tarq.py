"""Quantised target attention: its halves against the formula, its gradients, and what keeps its codebooks in use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aif_jax import layers, train
from aif_jax.blocks import DotProduct
from aif_jax.blocks.exact import Sequence
from aif_jax.train import losses
from aif_jax.types import ItemRow, UserState
from experiments.study import datasets, question
from experiments.study.tarq import QuantizationLoss, Tarq, codewords, loss_of, quantize, student_and_teacher
from tests import demo
from tests.test_sparse import batch_of

pytestmark = pytest.mark.usefixtures("light_compilation")
FORM = Tarq(levels=3, codewords=5, dot_product=True)
WIDTH = 8


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def nearest(query, codebooks):
    """The codes of one query, by the definition."""
    left, codes = np.array(query, np.float64), []
    for codebook in codebooks:
        codes.append(int(np.argmin(((left - codebook) ** 2).sum(-1))))
        left -= codebook[codes[-1]]
    return codes


def drawn(seed=0, events=20, places=24, items=6):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(places, WIDTH)) * (np.arange(places) < events)[:, None]
    params = {
        "query": {"kernel": rng.normal(size=(WIDTH, WIDTH)), "bias": rng.normal(size=WIDTH)},
        "codebooks": rng.normal(size=(3, 5, WIDTH)),
    }
    made = values, params, rng.normal(size=(items, WIDTH))
    history, params, item = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), made)
    return Sequence(values=history, mask=jnp.arange(places) < events), params, item


def test_halves_are_the_formula_of_user_and_item():
    """Both forms against a reference from behaviours and item vector, by the docstring's formulas."""
    model, params = demo.build(blocks=(FORM, DotProduct()))
    features, items = demo.user(model.config), demo.items(6)
    state, rows = model.user(params, features), jax.vmap(model.item, (None, 0))(params, items)
    hinted = jax.jit(model.user.func, static_argnames=("config", "candidates"))
    history = hinted(params, features, config=model.config, candidates=6).blocks[FORM.name]
    staged = model.interaction(params, state, rows)
    np.testing.assert_allclose(staged, model.joint(params, features, items), atol=1e-5)
    ours = jax.tree.map(np.asarray, params["blocks"][FORM.name])
    behaviours = np.asarray(history.values)[np.asarray(history.mask)]
    kernels = {"mean": np.eye(WIDTH, dtype=np.float32), "deviation": 2 * np.eye(WIDTH, dtype=np.float32)}
    for ready in (state.blocks[FORM.name], history):
        of_block = UserState(vector=state.vector, blocks={FORM.name: ready})
        got = FORM.score(params["blocks"][FORM.name], of_block, rows, kernels)
        np.testing.assert_allclose(got.once, behaviours.mean(0), atol=1e-5)
        for i, vector in enumerate(np.asarray(rows.vector)):
            codes = nearest(vector @ ours["query"]["kernel"] + ours["query"]["bias"], ours["codebooks"])
            assert np.asarray(rows.blocks[FORM.name])[i].tolist() == codes
            read = np.zeros(WIDTH)
            for codebook, code in zip(ours["codebooks"], codes, strict=True):
                read += softmax(behaviours @ codebook[code] / np.sqrt(WIDTH)) @ behaviours - behaviours.mean(0)
            np.testing.assert_allclose(got.rest[i], 2 * read, atol=1e-5)
            np.testing.assert_allclose(got.logit[i], vector @ read / np.sqrt(WIDTH), atol=1e-5)


def test_users_without_events_and_blocks_without_a_dot_product():
    for form in (FORM, Tarq(codewords=3)):
        model, params = demo.build(blocks=(form, DotProduct()))
        features, items = demo.user(model.config, events=0), demo.items(3)
        state, rows = model.user(params, features), jax.vmap(model.item, (None, 0))(params, items)
        assert not np.asarray(state.blocks[form.name].deviations).any()
        np.testing.assert_allclose(model.interaction(params, state, rows), model.joint(params, features, items), atol=1e-5)


def test_a_codeword_that_is_the_query_reads_what_attention_reads():
    history, params, item = drawn()
    query = layers.dense(params["query"], item)
    params = params | {"codebooks": jnp.concatenate([query[None], jnp.zeros((2, *query.shape))])}
    codes = quantize(query, params["codebooks"])
    assert codes[:, 0].tolist() == list(range(len(item)))
    student, teacher = student_and_teacher(params, history, item, codes)
    np.testing.assert_allclose(student, teacher, atol=1e-5)
    small = params | {"codebooks": 1e-2 * drawn(1)[1]["codebooks"]}  # sums are exact to first order in the query
    codes = jnp.tile(jnp.arange(3), (len(item), 1))
    near = {"query": {"kernel": jnp.zeros((WIDTH, WIDTH)), "bias": codewords(small["codebooks"], codes)[0].sum(0)}}
    student, teacher = student_and_teacher(small | near, history, item, codes)
    assert np.abs(student - teacher).max() < 0.01 * np.abs(teacher).max()


def test_the_query_gets_the_gradient_of_attention_and_codewords_that_of_what_they_read():
    history, params, item = drawn()
    codes = quantize(layers.dense(params["query"], item), params["codebooks"])
    weight = np.random.default_rng(2).normal(size=(len(item), WIDTH)).astype(np.float32)
    kernels = {"mean": jnp.zeros((WIDTH, WIDTH)), "deviation": jnp.eye(WIDTH)}

    def read(params):
        state = UserState(vector=jnp.zeros(0), blocks={"tarq": history})
        row = ItemRow(vector=item, fitted={}, blocks={"tarq": codes}, side={})
        return (weight * Tarq(levels=3, codewords=5).score(params, state, row, kernels).rest).sum()

    gradient = jax.grad(read)(params)
    student = jax.grad(lambda params: (weight * student_and_teacher(params, history, item, codes)[0]).sum())(params)
    teacher = jax.grad(lambda params: (weight * student_and_teacher(params, history, item, codes)[1]).sum())(params)
    np.testing.assert_allclose(gradient["query"]["kernel"], teacher["query"]["kernel"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient["codebooks"], student["codebooks"], rtol=1e-5, atol=1e-6)
    assert np.abs(gradient["query"]["bias"]).max() > 0 and not np.asarray(teacher["codebooks"]).any()
    used = np.zeros((3, 5), bool)
    used[np.arange(3), np.asarray(codes)] = True
    assert ((np.abs(gradient["codebooks"]).max(-1) > 0) == used).all()


def batch(model):
    made = batch_of(model.config, seed=0, candidates=4)
    made.where[1, 2:] = False
    return made


def test_the_loss_is_a_mean_over_candidates_whatever_the_parts():
    model, params = demo.build(blocks=(FORM, DotProduct()))
    whole = batch(model)
    loss = QuantizationLoss(block=FORM, weight=2.0, balance=0.0).bind(model)
    of = jax.jit(lambda params, batch: loss.over(whole, model.config)(params, batch))
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 2], whole) for i in (0, 2, 4)]
    np.testing.assert_allclose(sum(of(params, part) for part in parts), of(params, whole), rtol=1e-5)
    ours, total = jax.tree.map(np.asarray, params["blocks"][FORM.name]), 0.0
    for i in range(6):
        features, items = (jax.tree.map(lambda x, i=i: x[i], tree) for tree in (whole.users, whole.items))
        rows = jax.vmap(model.item, (None, 0))(params, items)
        history = model.user.func(params, features, config=model.config, candidates=4).blocks[FORM.name]
        student, teacher = student_and_teacher(ours, history, rows.vector, rows.blocks[FORM.name])
        for c in np.flatnonzero(whole.where[i]):
            left = np.asarray(rows.vector[c]) @ ours["query"]["kernel"] + ours["query"]["bias"]
            for codebook, code in zip(ours["codebooks"], nearest(left, ours["codebooks"]), strict=True):
                left = left - codebook[code]
                total += 1.25 * (left**2).mean()
            total += float(((teacher[c] - student[c]) ** 2).mean())
    np.testing.assert_allclose(of(params, whole), 2 * total / whole.where.sum(), rtol=1e-4)
    with pytest.raises(ValueError, match=r"Tarq.QuantizationLoss: expected a block of the model"):
        QuantizationLoss(block=Tarq()).bind(model)


def test_training_brings_codewords_to_the_queries_and_keeps_them_in_use():
    model, params = demo.build(blocks=(FORM, DotProduct()))
    away = np.array([1.5, 2, 2, 2, 2], np.float32)[None, :, None]  # one codeword of each level is nearest to every query
    params["blocks"][FORM.name]["codebooks"] += away
    given, left = batch(model), {}
    for balance in (0.0, 0.3):
        optimizer = optax.adam(0.1)
        state = train.init_state(params, optimizer)
        loss = QuantizationLoss(block=FORM, balance=balance)
        step = train.make_step(model, optimizer, loss=losses.listwise_softmax, sequence_loss=loss)
        for _ in range(60):
            state, _ = step(state, given)
        rows = jax.vmap(jax.vmap(model.item, (None, 0)), (None, 0))(state.params, given.items)
        ours, codes = state.params["blocks"][FORM.name], np.asarray(rows.blocks[FORM.name])
        query = layers.dense(ours["query"], rows.vector)
        rest = query - codewords(ours["codebooks"], codes).sum(-2)
        left[balance] = float(jnp.square(rest).sum() / jnp.square(query - query.mean((0, 1), keepdims=True)).sum())
        used = [len(np.unique(codes[..., level])) for level in range(3)]
        assert (min(used) > 1) == (balance > 0)
    assert left[0.3] < left[0.0]


def test_question_trains_the_codebooks():
    smoke = datasets.load("smoke")
    trial = question.Trial(dataset="smoke", model="aif with TARQ in place of linear memory")
    config = question.config_of(trial, smoke)
    assert loss_of(config) == QuantizationLoss(block=question.TARQ)
    assert loss_of(question.config_of(question.Trial(dataset="smoke", model=question.AIF), smoke)) is None
    (part,) = question.parts_of(trial, smoke)
    part = part._replace(seen=part.seen[-200:])
    model, params, said = question.train_model(trial, part, smoke, progress=False)
    start = model.init(jax.random.key(trial.seed), None, fitted=params["fitted"])
    moved = np.abs(params["blocks"]["tarq"]["codebooks"] - start["blocks"]["tarq"]["codebooks"]).max(-1)
    assert said["steps"] and (moved > 1e-3).all()  # the balance moves codewords that no item has, too
    found = question.evaluate(trial, part._replace(held=part.held[:40]), model, params, smoke, progress=False)
    assert 0 <= found["gauc"].mean <= 1
