"""Reports installed versions and runs a smoke test: `aif-jax doctor`."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aif_jax import checkpoint, export, presets
from aif_jax.catalogue import Catalogue
from aif_jax.model import PreRanker, build
from aif_jax.schema import Attribute, Schema
from aif_jax.store.trained import Trained
from aif_jax.store.version import __version__
from aif_jax.types import Params

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "lazy-loader", "tqdm")
EXTRAS = {
    "data": ("pyarrow",), "export": ("flatbuffers",), "metrics": ("prometheus-client",),
    "service": ("uvicorn", "httptools", "uvloop", "orjson", "prometheus-client", "pyarrow"),
    "remote": ("redis", "hiredis"), "kafka": ("confluent-kafka", "pyarrow"), "store": ("fsspec", "s3fs"),
    "ray": ("ray", "pyarrow"),
    "spark": ("pyspark", "pyarrow"), "experiments": ("scikit-learn", "matplotlib", "pyarrow"),
    "peers": ("implicit", "scipy", "pyarrow"), "benchmarks": ("torch", "onnxruntime", "onnxscript", "faiss-cpu"),
}  # fmt: skip
"""Packages of each extra of pyproject.toml but those for work on the package itself."""
ENVIRONMENT = ("JAX_PLATFORMS", "XLA_FLAGS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "JAX_ENABLE_X64", "AIF_JAX_DATA")


NEXT = (
    ("python -m experiments.quickstart", "from a clone: trains on MovieLens and answers requests"),
    ("aif-jax check --events FILE --items FILE", "what is wrong with files of yours"),
    ("aif-jax train --help", "trains on them; then index, export, serve"),
)
"""Commands and what they do, for somebody whose installation works."""


class Skipped(Exception):
    """A check that cannot run here; the message says what to install."""


def check_compute() -> str:
    """A compiled matrix product against NumPy."""
    a = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    difference = float(np.abs(np.asarray(jax.jit(jnp.matmul)(a, a)) - a @ a).max())
    if not difference < 1.0:  # TF32 and bfloat16 products differ by some 0.01 to 0.1; a broken device by far more
        raise ValueError(f"expected NumPy's product of 64 x 64 normal numbers, got one that differs by {difference:.3g}")
    return f"a compiled product equals NumPy's to {difference:.1e}"


def check_checkpoint() -> str:
    """Saves and loads a small model."""
    model, params = _small_model()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        checkpoint.save(path, Trained(model, params))
        loaded = checkpoint.load(path, config=model.config)
    same = jax.tree.map(lambda got, expected: bool(np.array_equal(got, expected)), loaded.params, params)
    if not all(jax.tree.leaves(same)):
        raise ValueError(f"expected what was saved, got others: {same}")
    return f"saved and loaded {len(jax.tree.leaves(params))} arrays, equal to the bit"


def check_export() -> str:
    """Exports the three functions of a small model, loads them, and replays their golden case."""
    if _version("flatbuffers") is None:
        raise Skipped('needs flatbuffers: pip install "aif_jax[export]"')
    model, params = _small_model()
    platforms = ("cpu",) if jax.default_backend() == "cpu" else ("cpu", "cuda", "tpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        digest = export.save(path, Trained(model, params), platforms=platforms, stablehlo=False)
        export.verify(path, sha256=digest)
    return "exported, loaded and replayed user, item and interaction"


CHECKS: dict[str, Callable[[], str]] = {"compute": check_compute, "checkpoint": check_checkpoint, "export": check_export}


def examine() -> dict[str, Any]:
    """The report as plain JSON values; each check has status "ok", "failed" or "skipped"; `healthy` where none failed."""
    checks = {name: _run(check) for name, check in CHECKS.items()}
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "aif_jax": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "threads": {"cpus": os.cpu_count(), "usable": usable},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "extras": {extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()},
        "checks": checks,
        "healthy": all(check["status"] != "failed" for check in checks.values()),
    }


def render(report: dict[str, Any]) -> str:
    """The report for a person to read."""
    lines = [f"aif_jax {report['aif_jax']}, Python {report['python']}, {report['platform']}", "", "versions"]
    lines += [f"  {name:<18}{version or 'missing'}" for name, version in report["versions"].items()]
    lines += ["", "devices", *(f"  {device}" for device in report["devices"]), "", "threads"]
    lines += [f"  {name:<18}{count}" for name, count in report["threads"].items() if count is not None]
    lines += [f"  {name:<18}{value}" for name, value in report["environment"].items()]
    lines += ["", "extras"]
    for extra, versions in report["extras"].items():
        missing = [name for name, version in versions.items() if version is None]
        here = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        hint = f'  (missing {", ".join(missing)}: pip install "aif_jax[{extra}]")' if missing else ""
        lines.append(f"  {extra:<18}{here}{hint}")
    lines += ["", "checks"]
    for name, check in report["checks"].items():
        lines.append(f"  {name:<18}{check['status']:<9}{check['finding']} ({check['seconds']:.1f} s)")
    return "\n".join([*lines, "", *verdict(report)])


def verdict(report: dict[str, Any]) -> list[str]:
    """What the report comes to, and the next three commands to type; of a failed check what to do about it."""
    failed = [name for name, check in report["checks"].items() if check["status"] == "failed"]
    if failed:
        fix = 'python -m pip install --upgrade --force-reinstall "aif_jax[export]"'
        return [f"NOT WELL: {', '.join(failed)} failed. Reinstall, then run this again:", f"  {fix}", "  aif-jax doctor"]
    skipped = [name for name, check in report["checks"].items() if check["status"] == "skipped"]
    left_out = f"; skipped: {', '.join(skipped)}, see above" if skipped else ""
    return [f"all well{left_out}. Next:", *(f"  {command:<42}{what}" for command, what in NEXT)]


def _run(check: Callable[[], str]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        status, finding = "ok", check()
    except Skipped as reason:
        status, finding = "skipped", str(reason)
    except Exception as error:  # whatever goes wrong is the finding
        status, finding = "failed", f"{type(error).__name__}: {error}"
    return {"status": status, "finding": finding, "seconds": time.perf_counter() - start}


def _devices() -> list[str]:
    try:
        return [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()]
    except RuntimeError as error:  # JAX_PLATFORMS names one that is not here
        return [f"none: {error}"]


@functools.cache
def _small_model() -> tuple[PreRanker, Params]:
    """The smallest model: the checks are of the way out and back, not of the blocks."""
    schema = Schema(item_attributes=(Attribute(name="item", size=9), Attribute(name="category", size=3)))
    catalogue = Catalogue.from_items(schema, range(10, 18), ids={"category": [1, 2] * 4})
    model = build(presets.two_tower(schema, width=8, short_length=4, towers=(8,), sequence=False))
    return model, model.init(jax.random.key(0), catalogue)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
