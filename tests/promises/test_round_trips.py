"""Promise: what is written and read back scores like what it was written from: checkpoint, export, index."""

import jax
import numpy as np
import pytest

import aif_jax as aif
from aif_jax import checkpoint, export
from aif_jax.encoding.columns import Columns
from aif_jax.index import ItemIndex
from aif_jax.readers import read
from aif_jax.store.trained import fingerprint
from tests import demo

OPTIONS = dict(platforms=("cpu",), buckets={"b": [4], "c": [128], "n": [128]})


@pytest.fixture(scope="module")
def raw():
    """Raw items, and a data set with the encoder that was learned from them; item ids are strings."""
    rng = np.random.default_rng(0)
    items = {"item": [f"sku-{n}" for n in range(40)], "category": rng.integers(0, 5, 40), "price": rng.uniform(1, 9, 40)}
    events = {
        "user": rng.integers(1, 9, 300),
        "item": [f"sku-{n}" for n in rng.integers(0, 40, 300)],
        "time": np.sort(rng.integers(1_600_000_000, 1_600_900_000, 300)),
    }
    return items, read(events, items=items, columns=Columns(user_id=True, item_floats=("price",)))


def test_a_checkpoint_alone_scores_raw_users_and_items(raw, tmp_path):
    """Raw events and items through the checkpoint's encoder give the scores of the model and encoder that were saved."""
    items, data = raw
    blocks = (aif.blocks.Sim("category", slots=4, length=3),)  # reads a fitted table
    config = aif.Config(
        schema=data.schema, width=8, short_length=4, long_length=16, head=aif.heads.Mlp((8,)), sequence=False, blocks=blocks
    )
    model = aif.build(config)
    params = demo.init(model, items=data.catalogue)
    checkpoint.save(tmp_path / "checkpoint", aif.Trained(model, params, data.encoder))
    restored = checkpoint.load(tmp_path / "checkpoint")
    assert restored.encoder is not None
    assert restored.version == fingerprint(params, model.config, data.encoder)
    events = {"item": ["sku-3", "sku-999", "sku-7"], "time": [1_600_000_001, 1_600_000_002, 1_600_000_003]}
    user = {"user": 3}
    scores = []
    for encoder, built, weights in (
        (data.encoder, model, params),
        (restored.encoder, aif.build(restored.config), restored.params),
    ):
        features = encoder.user(user, events, 1_600_000_100)
        scores.append(jax.jit(built.joint)(weights, features, encoder.items(items)[1]))
        assert features.encoding == encoder.version
    np.testing.assert_array_equal(scores[0], scores[1])
    assert np.std(scores[0]) > 0


def test_an_exported_index_scores_like_the_index(tmp_path):
    model, params = demo.build(**demo.VARIANTS["base"])
    user, items = demo.user(model.config), demo.items(49)
    ids = np.arange(49) * 10**10 + 7
    index = ItemIndex.build(aif.Trained(model, params), [(ids, items)], batch_size=16, progress=False).delete(ids[3:5])
    digest = export.save(tmp_path / "model", aif.Trained(model, params), index, **OPTIONS)
    loaded = export.load(tmp_path / "model", sha256=digest)
    assert loaded.index is not None
    rows, known = loaded.index.lookup(ids)
    left = np.delete(np.arange(49), [3, 4])
    np.testing.assert_array_equal(np.flatnonzero(known), left)
    got = loaded.score(loaded.user(user), loaded.index.table, rows[left])
    expected = np.asarray(jax.jit(model.joint)(params, user, items))[left]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
