"""Promise: what is written and read back scores like what it was written from: checkpoint, export, index."""

import jax
import numpy as np
import pytest

from aif_jax import checkpoint, export, index
from aif_jax.version import fingerprint
from tests import demo

OPTIONS = dict(platforms=("cpu",), stablehlo=False, buckets={"b": [4], "c": [128], "n": [128]})


@pytest.mark.parametrize("name", ["codes", "two_tower"])
def test_an_export_scores_like_the_model(name, tmp_path):
    model, params = demo.build(**demo.VARIANTS[name])
    user, items = demo.user(model.config), demo.items(model.config, 70)
    export.save(tmp_path / "model", model, params, **OPTIONS)
    loaded = export.load(tmp_path / "model")
    got = loaded.interaction(loaded.user(user), loaded.item(items))
    np.testing.assert_allclose(got, jax.jit(model.joint)(params, user, items), rtol=0, atol=1e-6)
    assert loaded.version == fingerprint(params, model.config)


def test_a_checkpoint_becomes_an_export_of_the_same_version(tmp_path):
    model, params = demo.build(**demo.VARIANTS["base"])
    checkpoint.save(tmp_path / "checkpoint", params, model.config)
    read = checkpoint.load(tmp_path / "checkpoint")
    assert fingerprint(read.params, read.config) == fingerprint(params, model.config)
    user, items = demo.user(model.config), demo.items(model.config, 70)
    expected, got = jax.jit(model.joint)(params, user, items), jax.jit(model.joint)(read.params, user, items)
    np.testing.assert_array_equal(got, expected)


def test_an_exported_index_scores_like_the_index(tmp_path):
    model, params = demo.build(**demo.VARIANTS["base"])
    user, items = demo.user(model.config), demo.items(model.config, 49)
    ids = np.arange(49) * 10**10 + 7
    table = index.ItemIndex.build(model, params, [(ids, items)], batch_size=16).delete(ids[3:5])
    export.save(tmp_path / "model", model, params, table, **OPTIONS)
    loaded = export.load(tmp_path / "model")
    assert loaded.index is not None
    stored, rows = loaded.index
    kept = np.delete(np.arange(49), [3, 4])
    np.testing.assert_array_equal(np.sort(stored), ids[kept])
    got = loaded.score(loaded.user(user), rows, np.searchsorted(np.sort(stored), ids[kept]))
    expected = np.asarray(jax.jit(model.joint)(params, user, items))[kept]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
