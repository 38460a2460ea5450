"""Position bias: places by hand, nothing of it in serving, and clicks that depend on the place as much as on the item."""

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

START = 1_700_000_000
ITEMS, SHOWN = 24, 6
CONFIG = aif.FitConfig(epochs=12, evaluate_every=10**6, keep_best=None, batch_size=64, learning_rate=0.03, weight_decay=0.0)


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
    step = train.make_step(model, optax.sgd(0.0), loss=loss, part=None if objectives else 2)
    _, figures = step(train.init_state(moved, optax.sgd(0.0)), batch)
    assert float(figures["loss"]) == pytest.approx(np.square(expected + added).mean(), rel=1e-5)


def impressions(seed: int = 0) -> tuple[aif.Dataset, np.ndarray]:
    """Lists that a house order made, which is not the users' liking; a click depends on liking and on the place."""
    rng = np.random.default_rng(seed)
    liking, house = rng.normal(size=(2, ITEMS))
    table: dict[str, list] = {"user": [], "item": [], "time": [], "what": [], "place": []}
    for number in range(1500):
        some = rng.choice(ITEMS, SHOWN, replace=False)
        order = some[np.argsort(-house[some] - 0.7 * rng.normal(size=SHOWN))]
        click = rng.random(SHOWN) < 1 / (1 + np.exp(0.5 + 0.8 * np.arange(SHOWN) - liking[order]))
        table["user"] += [number % 50] * SHOWN
        table["item"] += (1 + order).tolist()
        table["time"] += [START + 60 * number] * SHOWN
        table["place"] += range(1, SHOWN + 1)
        table["what"] += ["click" if one else "shown" for one in click]
    columns = aif.Columns(action="what", actions=("shown", "click"), history_actions=("click",), position="place")
    catalogue = {"item": np.arange(1, ITEMS + 1), "category": np.ones(ITEMS, np.int64)}
    return aif.read(table, items=catalogue, columns=columns, progress=False), liking


def test_where_clicks_depend_on_the_place_the_bias_takes_it_out_of_the_scores():
    data, liking = impressions()
    config = aif.presets.two_tower(data.schema, width=4, sequence=False, short_length=4)
    agreement, runs = {}, {}
    for name, more in {"without": (), "with": (PositionBias(positions=SHOWN),)}.items():
        model = aif.build(config.replace(blocks=(*config.blocks, *more)))
        task = train.Impressions(candidates=SHOWN, threshold=2)
        run = aif.fit(model, data, CONFIG, task=task, progress=False)
        every = np.tile(data.items.encode(np.arange(1, ITEMS + 1)).astype(np.int32), (40, 1))
        scores = train.distillation.model_scores(run.model, run.params, data)(np.arange(4000, 4040), every)
        agreement[name], runs[name] = np.corrcoef(scores.mean(0), liking)[0, 1], run
    assert agreement["with"] > 0.8 and agreement["with"] > agreement["without"] + 0.15
    bias = np.asarray(runs["with"].params["blocks"]["position_bias"]["bias"])
    assert (np.diff(bias) < 0.1).all() and bias[-1] < bias[0] - 1  # the truth falls by 0.8 a place
    assert runs["with"].metrics["gauc"] < runs["without"].metrics["gauc"]  # of clicks, which depend on the place
