"""Reports installed versions and extras and runs a smoke test: `aif-jax doctor`."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aif_jax import Attribute, Catalogue, Schema, Trained, __version__, build, checkpoint, presets

NEXT = """all well. Next:
  python -m experiments.quickstart            from a clone: trains on MovieLens and answers requests
  aif-jax check --events FILE --items FILE    what is wrong with files of yours
  aif-jax train --help                        trains on them; then index, export, serve"""
FIX = "NOT WELL. Reinstall, then run this again:\n  python -m pip install --upgrade --force-reinstall aif_jax\n  aif-jax doctor"


def examine() -> dict[str, Any]:
    """The report as plain JSON values: versions by extra, None for missing packages, and what the smoke test found."""
    found = {re.sub("[-_.]+", "-", made.name).lower(): made.version for made in importlib.metadata.distributions()}
    versions: dict[str, dict[str, str | None]] = {}
    for need in (importlib.metadata.requires("aif_jax") or ()) if "aif-jax" in found else ():
        package, extra = re.split(r"[^\w-]", need)[0], re.search(r"extra == ['\"](\w+)", need)
        if extra is None or extra[1] not in ("tests", "docs"):  # those are for work on the package itself
            versions.setdefault(extra[1] if extra else "needed", {})[package] = found.get(package.lower())
    try:
        healthy, finding = True, smoke_test()
    except Exception as error:  # whatever goes wrong is the finding
        healthy, finding = False, f"{type(error).__name__}: {error}"
    about = {"aif_jax": __version__, "python": platform.python_version(), "platform": platform.platform()}
    return about | {"versions": versions, "smoke test": finding, "healthy": healthy}


def smoke_test() -> str:
    """Builds a small model, saves and loads it. ValueError if other parameters come back."""
    schema = Schema(item_attributes=(Attribute(name="item", size=9), Attribute(name="category", size=3)))
    model = build(presets.two_tower(schema, width=8, short_length=4, towers=(8,), sequence=False))
    params = model.init(jax.random.key(0), Catalogue.from_items(schema, range(10, 18), ids={"category": [1, 2] * 4}))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "checkpoint", Trained(model, params))
        loaded = checkpoint.load(Path(folder) / "checkpoint", config=model.config).params
    if not all(jax.tree.leaves(jax.tree.map(lambda got, saved: bool(np.array_equal(got, saved)), loaded, params))):
        raise ValueError("expected the parameters that were saved, got others; is the disk or the device broken?")
    return f"a model was built, saved and loaded on {', '.join(map(str, jax.devices()))}"


def render(report: dict[str, Any]) -> str:
    """The report for a person to read, with the next commands to type, or what to do about a failed smoke test."""
    lines = [f"aif_jax {report['aif_jax']}, Python {report['python']}, {report['platform']}"]
    for extra, versions in report["versions"].items():
        missing = ", ".join(name for name, version in versions.items() if version is None)
        here = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        lines.append(f"{extra}: {here}" + (f' (missing {missing}: pip install "aif_jax[{extra}]")' if missing else ""))
    return "\n".join([*lines, f"smoke test: {report['smoke test']}", NEXT if report["healthy"] else FIX])
