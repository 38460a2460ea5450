"""Promise: adding a head touches one file. `tests/own_head.py` is trained, indexed, served and exported as it is."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import aif_jax as aif
from aif_jax import blocks, checkpoint, export, train
from aif_jax.index import ItemIndex
from aif_jax.serving import AsyncPreRanker, ServingConfig
from aif_jax.train import losses
from tests import demo
from tests.own_head import Experts
from tests.serving_world import run
from tests.test_sparse import batch_of

CHANGES = dict(head=Experts(experts=2, width=8), blocks=(blocks.Bea(bridges=3, dot_product=True), blocks.LinearMemory(width=8)))
USERS = {name: demo.user(demo.config(), events=5 * name, seed=name) for name in range(3)}


@pytest.fixture(scope="module")
def trained():
    """The model, its parameters before and after some steps, and the loss of every step."""
    model, params = demo.build(**CHANGES)
    optimizer, batch = optax.adam(1e-2), batch_of(model.config, seed=1)
    step, state, seen = train.make_step(model, optimizer, loss=losses.pointwise_bce), train.init_state(params, optimizer), []
    start = jax.tree.map(np.array, params)
    for _ in range(8):
        state, metrics = step(state, batch)
        seen.append(float(metrics["loss"]))
    return aif.Trained(model, state.params), start, seen


@pytest.fixture(scope="module")
def expected(trained):
    """Logits of every known item for every user, from `joint`."""
    items, joint = demo.catalogue().features(np.arange(1, 50)), jax.jit(trained[0].model.joint)
    return {name: np.asarray(joint(trained[0].params, features, items)) for name, features in USERS.items()}


def test_the_package_does_not_know_it():
    sources = Path(aif.__file__).parent.rglob("*.py")
    assert not [path for path in sources if re.search(r"\bExperts\b", path.read_text())]


def test_training_moves_all_of_it(trained):
    made, start, seen = trained
    assert seen[-1] < seen[0] and np.isfinite(seen).all()
    width = sum(width for widths in made.model.config.head_features.values() for width in widths.values())
    assert start["head"]["gate"]["kernel"].shape == (width, 2) and start["head"]["hidden"]["kernel"].shape == (width, 2, 8)
    for layer, leaves in start["head"].items():
        assert all(np.any(leaf != made.params["head"][layer][name]) for name, leaf in leaves.items()), layer
    assert demo.without_gradient(made.model, made.params, USERS[2]) == []


def test_json_and_a_checkpoint_keep_it(trained, tmp_path):
    config = trained[0].model.config
    record = json.loads(json.dumps(config.to_json()))
    assert record["head"] == {"head": "Experts", "experts": 2, "width": 8, "outputs": 1}
    assert aif.Config.from_json(record) == config and hash(aif.Config.from_json(record)) == hash(config)
    checkpoint.save(tmp_path / "checkpoint", trained[0])
    saved = checkpoint.load(tmp_path / "checkpoint")
    assert saved.config == config
    jax.tree.map(np.testing.assert_array_equal, saved.params, jax.tree.map(np.asarray, trained[0].params))


def test_it_is_served_from_the_index_and_exported(trained, expected, tmp_path):
    index = ItemIndex.build(trained[0], demo.catalogue(), batch_size=64, progress=False)
    ids = np.arange(100, 149)

    async def serve():
        engine = AsyncPreRanker(
            trained[0], index, features=lambda request: USERS[request.user], retrieval=lambda request: ids,
            config=ServingConfig(buckets=(64,), max_k=8),
        )  # fmt: skip
        async with engine:
            return {name: await engine.rank(name, 8) for name in USERS}

    for name, answer in run(serve()).items():
        best = np.argsort(-expected[name], kind="stable")[:8]
        assert answer.ids.tolist() == ids[best].tolist() and answer.reason is None
        np.testing.assert_allclose(answer.logits, expected[name][best], rtol=1e-5, atol=1e-5)
    sizes = dict(platforms=("cpu",), buckets={"b": [4], "c": [64], "n": [64]})
    digest = export.save(tmp_path / "model", trained[0], index, **sizes)
    loaded = export.load(tmp_path / "model", sha256=digest)
    rows = loaded.item(demo.catalogue().features(np.arange(1, 50)))
    for name, features in USERS.items():
        np.testing.assert_allclose(loaded.interaction(loaded.user(features), rows), expected[name], rtol=1e-5, atol=1e-5)


def test_logits_of_another_shape_are_refused():
    """A module that gives one logit for a model of two objectives."""
    config = demo.config(**CHANGES, objectives=("click", "like"))
    model = aif.build(config)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), None, fitted=aif.fit_tables(config, demo.catalogue())))
    with pytest.raises(ValueError, match=r"head Experts: expected logits \[C, 2\], got shape \[5, 1\]"):
        jax.eval_shape(model.joint, params, demo.user(config), demo.items(5))
