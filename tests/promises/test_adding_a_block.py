"""Promise: adding a block touches one file. `tests/own_block.py` is trained, indexed, served and exported as it is."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import aif_jax as aif
from aif_jax import checkpoint, export, train
from aif_jax.blocks import Bea
from aif_jax.index import ItemIndex
from aif_jax.serving import AsyncPreRanker, ServingConfig
from aif_jax.train import losses
from tests import demo
from tests.own_block import Decay
from tests.serving_world import run
from tests.test_sparse import batch_of

BLOCKS = (Bea(bridges=3), Decay(rates=2))
USERS = {name: demo.user(demo.config(), events=5 * name, seed=name) for name in range(4)}


@pytest.fixture(scope="module")
def trained():
    """The model, its parameters before and after some steps, and the loss of every step."""
    model, params = demo.build(blocks=BLOCKS)
    optimizer, batch = optax.adam(1e-2), batch_of(model.config, seed=1)
    step, state, seen = train.make_step(model, optimizer, loss=losses.pointwise_bce), train.init_state(params, optimizer), []
    start = jax.tree.map(np.array, params)
    for _ in range(8):
        state, metrics = step(state, batch)
        seen.append(float(metrics["loss"]))
    return model, start, state.params, seen


@pytest.fixture(scope="module")
def expected(trained):
    """Logits of every known item for every user, from `joint`."""
    model, _, params, _ = trained
    items = demo.catalogue().features(np.arange(1, 50))
    joint = jax.jit(model.joint)
    return {name: np.asarray(joint(params, features, items)) for name, features in USERS.items()}


@pytest.fixture(scope="module")
def index(trained):
    model, _, params, _ = trained
    return ItemIndex.build(aif.Trained(model, params), demo.catalogue(), batch_size=64, progress=False)


def test_the_package_does_not_know_it():
    sources = Path(aif.__file__).parent.rglob("*.py")
    assert not [path for path in sources if re.search(r"\bDecay\b", path.read_text())]
    assert Decay().name == "decay" and demo.config(blocks=(Decay(),)).blocks == (Decay(rates=2),)


def test_its_parameters_have_their_places(trained):
    model, start, _, _ = trained
    assert {name: leaf.shape for name, leaf in start["blocks"]["decay"].items()} == {"rate": (2,), "gate": (2,)}
    assert start["fitted"]["decay"]["unusual"].shape == (50,)
    kernels = start["head"]["first"]["kernels"]["decay"]
    assert {name: kernel.shape for name, kernel in kernels.items()} == {"recent": (16, 16), "unusual": (1, 16)}
    assert model.config.blocks == BLOCKS


def test_it_is_checked_like_any_block():
    with pytest.raises(ValueError, match="Decay.rates: expected at least 1, got 0"):
        Decay(rates=0)
    with pytest.raises(ValueError, match="Decay: expected schema.content > 0, got 0"):
        demo.config(schema=dataclasses.replace(demo.schema(), content=0), blocks=(Decay(),))


def test_training_moves_what_is_trained_alone_and_all_of_it(trained):
    model, start, params, seen = trained
    assert seen[-1] < seen[0] and np.isfinite(seen).all()
    for name in ("rate", "gate"):
        assert np.all(params["blocks"]["decay"][name] != start["blocks"]["decay"][name]), name
    for name in ("recent", "unusual"):
        before, after = (one["head"]["first"]["kernels"]["decay"][name] for one in (start, params))
        assert np.any(before != after), name
    np.testing.assert_array_equal(params["fitted"]["decay"]["unusual"], start["fitted"]["decay"]["unusual"])
    assert demo.without_gradient(model, params, USERS[3]) == []


def test_padding_does_not_leak(trained):
    model, _, params, _ = trained
    events = jax.tree.map(lambda x: x[:4], USERS[3].history)
    poisoned, clean = (dataclasses.replace(USERS[3], history=demo.pad(events, 24, poison=poison)) for poison in (True, False))
    joint, items = jax.jit(model.joint), demo.items(5)
    np.testing.assert_array_equal(joint(params, poisoned, items), joint(params, clean, items))


def test_json_and_a_checkpoint_keep_it(trained, tmp_path):
    model, _, params, _ = trained
    text = json.dumps(model.config.to_json())
    assert {"block": "Decay", "rates": 2} in json.loads(text)["blocks"]
    assert aif.Config.from_json(json.loads(text)) == model.config
    checkpoint.save(tmp_path / "checkpoint", aif.Trained(model, params))
    saved = checkpoint.load(tmp_path / "checkpoint")
    assert saved.config == model.config
    jax.tree.map(np.testing.assert_array_equal, saved.params, jax.tree.map(np.asarray, params))


def test_the_index_holds_its_rows(trained, index, expected):
    """Also of an item that comes later, unknown to the fit."""
    model, _, params, _ = trained
    score, state = jax.jit(model.interaction), jax.jit(model.user)(params, USERS[3])
    rows, mask = index.take(np.arange(100, 149))
    assert mask.all()
    np.testing.assert_allclose(score(params, state, rows), expected[3], rtol=1e-5, atol=1e-5)
    items = demo.items(2)
    fresh = dataclasses.replace(items, ids=items.ids | {"item": np.zeros(2, np.int32)})
    later, mask = index.upsert([900, 901], fresh).take([900, 901])
    assert mask.all() and later.blocks["decay"]["unusual"].tolist() == [params["fitted"]["decay"]["unusual"][0]] * 2
    np.testing.assert_allclose(score(params, state, later), jax.jit(model.joint)(params, USERS[3], fresh), rtol=1e-5, atol=1e-5)


def test_it_is_served(trained, index, expected):
    model, _, params, _ = trained
    ids = np.arange(100, 149)

    async def serve():
        engine = AsyncPreRanker(
            aif.Trained(model, params), index, features=lambda request: USERS[request.user], retrieval=lambda request: ids,
            config=ServingConfig(buckets=(64,), max_k=8),
        )  # fmt: skip
        async with engine:
            return {name: await engine.rank(name, 8) for name in USERS}

    for name, answer in run(serve()).items():
        best = np.argsort(-expected[name], kind="stable")[:8]
        assert answer.ids.tolist() == ids[best].tolist() and answer.reason is None
        np.testing.assert_allclose(answer.logits, expected[name][best], rtol=1e-5, atol=1e-5)


def test_it_is_exported(trained, index, expected, tmp_path):
    """To a folder that runs without this package, with the index in it."""
    model, _, params, _ = trained
    sizes = dict(platforms=("cpu",), buckets={"b": [4], "c": [64], "n": [64]})
    digest = export.save(tmp_path / "model", aif.Trained(model, params), index, **sizes)
    loaded = export.load(tmp_path / "model", sha256=digest)
    rows = loaded.item(demo.catalogue().features(np.arange(1, 50)))
    for name, features in USERS.items():
        np.testing.assert_allclose(loaded.interaction(loaded.user(features), rows), expected[name], rtol=1e-5, atol=1e-5)
    assert loaded.config == json.loads(json.dumps(model.config.to_json()))
