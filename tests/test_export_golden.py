"""An artefact of the lowest supported JAX, made once by tests/golden/make_export.py, loads and scores under this one."""

import json
from pathlib import Path

import jax
import numpy as np

import aif_jax as aif
from aif_jax import export
from aif_jax.export import consume
from aif_jax.trees import nest
from tests import demo
from tests.golden import make_export

FOLDER = Path(make_export.__file__).parent / "export"


def test_the_golden_artefact_replays_under_this_jax_and_todays_code_agrees():
    made = json.loads((FOLDER / "manifest.json").read_text())["made_with"]["jax"]
    report = export.verify(FOLDER)
    assert made == "0.10.2" and report["max_abs_diff"] < 1e-5
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 250_000
    loaded = export.load(FOLDER)
    config = aif.Config.from_json(loaded.manifest["config"])
    model = aif.build(config)
    params = nest(consume.read_arrays((FOLDER / loaded.manifest["params"]).read_bytes()))
    user, items = demo.user(config), demo.items(70)
    got = loaded.interaction(loaded.user(user), loaded.item(items))
    np.testing.assert_allclose(got, jax.jit(model.joint)(params, user, items), rtol=0, atol=1e-5)
