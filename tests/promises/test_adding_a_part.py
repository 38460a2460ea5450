"""Promise: adding a block or a head touches one file, `tests/own_block.py` or `tests/own_head.py`."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import aif_jax as aif
from aif_jax import blocks, checkpoint, export, heads, train
from aif_jax.train import losses
from tests import demo
from tests.own_block import Decay
from tests.own_head import Experts
from tests.refusals import refused
from tests.serving_world import run
from tests.test_sparse import batch_of

PARTS = {
    "Decay": dict(blocks=(blocks.Bea(bridges=3), Decay(rates=2))),
    "Experts": dict(
        head=Experts(experts=2, width=8), blocks=(blocks.Bea(bridges=3, dot_product=True), blocks.LinearMemory(width=8))
    ),
}
"""Config of the model with each part, by the name of its class."""
USERS = {name: demo.user(demo.config(), events=5 * name, seed=name) for name in range(4)}
IDS, KNOWN = np.arange(100, 149), demo.catalogue().features(np.arange(1, 50))
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


class Own:
    """The model with a part: `start` before some steps, `trained` after them, the loss of every step, the index."""

    def __init__(self, name: str):
        model, params = demo.build(**PARTS[name])
        optimizer, batch = optax.adam(1e-2), batch_of(model.config, seed=1)
        step, state = train.make_step(model, optimizer, loss=losses.pointwise_bce), train.init_state(params, optimizer)
        self.name, self.start, self.losses = name, jax.tree.map(np.array, params), []
        for _ in range(8):
            state, metrics = step(state, batch)
            self.losses.append(float(metrics["loss"]))
        self.model, self.params, self.trained = model, state.params, aif.Trained(model, state.params)
        self.index = aif.ItemIndex.build(self.trained, demo.catalogue(), batch_size=64, progress=False)

    @functools.cached_property
    def expected(self) -> dict[int, np.ndarray]:
        """Logits of every known item for every user, from `joint`."""
        joint = jax.jit(self.model.joint)
        return {name: np.asarray(joint(self.params, features, KNOWN)) for name, features in USERS.items()}


made = functools.cache(Own)


@pytest.fixture(params=PARTS)
def own(request) -> Own:
    return made(request.param)


@pytest.mark.parametrize("name", PARTS)
def test_the_package_does_not_know_it(name):
    assert not [path for path in Path(aif.__file__).parent.rglob("*.py") if re.search(rf"\b{name}\b", path.read_text())]


def test_training_moves_all_of_it(own):
    assert own.losses[-1] < own.losses[0] and np.isfinite(own.losses).all()
    assert demo.without_gradient(own.model, own.params, USERS[3]) == []
    (fitted, trained), (after, moved) = (({"fitted": one["fitted"]}, one | {"fitted": {}}) for one in (own.start, own.params))
    assert jax.tree.all(jax.tree.map(lambda start, end: bool(np.any(start != end)), trained, moved))
    assert demo.same(fitted, after)


def test_json_and_a_checkpoint_keep_it(own, tmp_path):
    config, record = own.model.config, json.loads(json.dumps(own.model.config.to_json()))
    head = {"head": "Experts", "revision": 1, "experts": 2, "width": 8, "outputs": 1}
    kept = {"Decay": {"block": "Decay", "revision": 2, "rates": 2}, "Experts": head}
    assert kept[own.name] in (*record["blocks"], record["head"])
    assert heads.HEADS.from_json({"head": "Experts"}, by_hand=True) == Experts()  # of --set
    assert aif.Config.from_json(record) == config and hash(aif.Config.from_json(record)) == hash(config)
    checkpoint.save(tmp_path / "checkpoint", own.trained)
    saved = checkpoint.load(tmp_path / "checkpoint")
    assert saved.config == config
    jax.tree.map(np.testing.assert_array_equal, saved.params, jax.tree.map(np.asarray, own.params))


def test_it_is_served_from_the_index(own):
    async def serve():
        engine = aif.AsyncPreRanker(
            own.trained, own.index, features=lambda request: USERS[request.user], retrieval=lambda request: IDS,
            config=aif.ServingConfig(buckets=(64,), max_k=8),
        )  # fmt: skip
        async with engine:
            return {name: await engine.rank(name, 8) for name in USERS}

    for name, answer in run(serve()).items():
        best = np.argsort(-own.expected[name], kind="stable")[:8]
        assert answer.ids.tolist() == IDS[best].tolist() and answer.reason is None
        close(answer.logits, own.expected[name][best])


def test_it_is_exported(own, tmp_path):
    digest = export.save(tmp_path / "model", own.trained, own.index, platforms=("cpu",))
    loaded = export.load(tmp_path / "model", sha256=digest)
    rows = loaded.item(KNOWN)
    for name, features in USERS.items():
        close(loaded.interaction(loaded.user(features), rows), own.expected[name])
    assert loaded.config == json.loads(json.dumps(own.model.config.to_json()))


def test_it_is_checked_like_any_block():
    refused(ValueError, "Decay.rates: expected at least 1, got 0", Decay, rates=0)
    schema = dataclasses.replace(demo.schema(), content=0)
    refused(ValueError, "Decay: expected schema.content > 0, got 0", demo.config, schema=schema, blocks=(Decay(),))


def test_the_index_holds_its_rows():
    """Also of an item that comes later, unknown to the fit."""
    block = made("Decay")
    model, params = block.model, block.params
    score, state = jax.jit(model.interaction), jax.jit(model.user)(params, USERS[3])
    rows, mask = block.index.take(IDS)
    assert mask.all()
    close(score(params, state, rows), block.expected[3])
    items = demo.items(2)
    fresh = dataclasses.replace(items, ids=items.ids | {"item": np.zeros(2, np.int32)})
    later, mask = block.index.upsert([900, 901], fresh).take([900, 901])
    assert mask.all() and later.blocks["decay"]["unusual"].tolist() == [params["fitted"]["decay"]["unusual"][0]] * 2
    close(score(params, state, later), jax.jit(model.joint)(params, USERS[3], fresh))
