"""Reports installed versions and extras and runs a smoke test: `aif-jax doctor`."""

import importlib.metadata
import platform
import re
import tempfile

import jax
import numpy as np

from aif_jax import checkpoint, presets
from aif_jax.catalogue import Catalogue
from aif_jax.cli.options import FINE, PROBLEMS, Result
from aif_jax.model import build
from aif_jax.schema import Attribute, Schema
from aif_jax.store.trained import Trained, __version__

NEXT = """all well. Next:
  python -m experiments.quickstart            from a clone: trains on MovieLens and answers requests
  aif-jax check --events FILE --items FILE    what is wrong with files of yours; then train, index, export, serve"""
FIX = "NOT WELL. Reinstall, then run this again:\n  python -m pip install --upgrade --force-reinstall aif_jax\n  aif-jax doctor"


def doctor() -> Result:
    """Report installed versions and extras, and run a smoke test."""
    found = {re.sub("[-_.]+", "-", made.name).lower(): made.version for made in importlib.metadata.distributions()}
    versions: dict[str, dict[str, str | None]] = {}
    for need in (importlib.metadata.requires("aif_jax") or ()) if "aif-jax" in found else ():
        package, extra = re.split(r"[^\w-]", need)[0], (re.findall(r"extra == ['\"](\w+)", need) or ["needed"])[0]
        versions.setdefault(extra, {})[package] = found.get(package.lower())
    lines = [f"aif_jax {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    for extra, packages in versions.items():
        missing = ", ".join(name for name, version in packages.items() if version is None)
        here = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
        lines.append(f"{extra}: {here}" + (f' (missing {missing}: pip install "aif_jax[{extra}]")' if missing else ""))
    try:
        well, said = True, smoke_test()
    except Exception as error:  # whatever goes wrong is the finding
        well, said = False, f"{type(error).__name__}: {error}"
    return FINE if well else PROBLEMS, "\n".join([*lines, f"smoke test: {said}", NEXT if well else FIX])


def smoke_test() -> str:
    """Build a small model, save and load it. AssertionError if other parameters come back."""
    schema = Schema(item_attributes=(Attribute(name="item", size=9), Attribute(name="category", size=3)))
    model = build(presets.two_tower(schema, width=8, short_length=4, towers=(8,), sequence=False))
    params = model.init(jax.random.key(0), Catalogue.from_items(schema, range(10, 18), ids={"category": [1, 2] * 4}))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(f"{folder}/model", Trained(model, params))
        loaded = checkpoint.load(f"{folder}/model", config=model.config).params
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    return f"a model was built, saved and loaded on {', '.join(map(str, jax.devices()))}"
