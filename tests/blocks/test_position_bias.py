"""Position bias: places by hand, and nothing of it in serving."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import aif_jax as aif
from aif_jax import blocks, train
from aif_jax.blocks import PositionBias
from aif_jax.refreshing.warm import forget_ids
from aif_jax.train import losses
from aif_jax.train.evaluate import predict
from tests import demo
from tests.test_sparse import batch_of


def test_places_are_those_of_the_request_in_the_log(tmp_path):
    lines = ["1,3,10,1", "1,1,10,2", "2,2,10,4", "1,2,20,", "2,1,30,0", "1,2,10,7"]
    (tmp_path / "events.csv").write_text("\n".join(["user,item,time,place", *lines]) + "\n")
    items = {"item": [1, 2, 3], "category": [1] * 3}
    columns = aif.Columns(position="place")
    data = aif.read(tmp_path / "events.csv", items=items, columns=columns, progress=False)
    one, two, three = data.items.encode([1, 2, 3])
    at = {(user, time): n for n, (user, time) in enumerate(zip(data.log.user, data.log.time, strict=True))}
    first, later, other = at[1, 10], at[1, 20], at[2, 10]  # any event of a request
    rows = np.array([[three, one, two, 0], [two, one, three, 0], [one, two, 0, three]], np.int32)
    places = data.display_positions_of([first, later, other], rows)
    assert places.tolist() == [[1, 2, 7, 0], [0, 0, 0, 0], [0, 4, 0, 0]] and places.dtype == np.int32
    assert columns.of("events").keys() == aif.Columns().of("events").keys()  # serving needs none
    plain = aif.read(tmp_path / "events.csv", items=items, columns=aif.Columns(), progress=False)
    assert plain.display_positions is None and "position" not in aif.Columns().to_json()
    with pytest.raises(ValueError, match="Dataset.display_positions: expected those of shown items, got None; give Columns"):
        plain.display_positions_of([first], rows[:1])
    fewer = forget_ids(data, 20)  # item 3 goes, whose place stays with the event
    assert fewer.display_positions.tolist() == data.display_positions.tolist() and len(fewer.items) == len(data.items) - 1


@pytest.mark.parametrize("objectives", [(), ("click", "like")])
def test_the_bias_is_added_in_training_alone(objectives):
    part = PositionBias(positions=3)
    changes = dict(blocks=(blocks.DotProduct(), part), head=aif.heads.Mlp((4,)), objectives=objectives)
    model, params = demo.build(**demo.SMALL | changes)
    bias = np.linspace(-1, -2, 2 * max(1, len(objectives))).astype(np.float32).reshape(2, *(objectives and (2,)))
    moved = params | {"blocks": params["blocks"] | {part.name: {"bias": jnp.asarray(bias)}}}
    batch = batch_of(model.config, seed=1)
    served, expected = (next(predict(model, of, [batch])) for of in (moved, params))
    np.testing.assert_array_equal(served, expected)
    places = np.array([[1, 2], [2, 3], [3, 9], [0, 1], [0, 0], [1, 1]], np.int32)
    added = np.concatenate([np.zeros_like(bias), bias])[np.array([[0, 2], [2, 3], [3, 3], [0, 0], [0, 0], [0, 0]])]
    found = part.training_logit(moved["blocks"][part.name], places)
    np.testing.assert_array_equal(found, added)

    squared = losses.term(losses.entries)(lambda scores, labels, where, log_q: jnp.square(scores))
    loss = (lambda scores, labels, *, where: jnp.square(scores).mean()) if objectives else squared
    batch = dataclasses.replace(batch, display_positions=places)
    step = train.make_step(model, optax.sgd(0.1), loss=loss, part=None if objectives else 2)
    state, figures = step(train.init_state(moved, optax.sgd(0.1)), batch)
    assert (np.asarray(state.params["blocks"][part.name]["bias"]) > bias).all()  # a squared score falls
    assert float(figures["loss"]) == pytest.approx(np.square(expected + added).mean(), rel=1e-5)
