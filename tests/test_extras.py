"""Where an optional package is missing, the error names what needs it and the extra that installs it."""

import asyncio
import sys
import tomllib

import pytest

from aif_jax import connectors
from aif_jax.engines import encode_with_ray, encode_with_spark, ray_serve, ray_train
from aif_jax.export import writer
from aif_jax.readers.tables import pyarrow
from aif_jax.service.process import Listening, listening
from aif_jax.serving.metrics import prometheus_text
from tests.refusals import refused
from tests.test_package import PACKAGE


async def serve_http(folder):
    async with listening(None, Listening(port=0)):
        pytest.fail("a service without its packages")


DOORS = [
    ("confluent_kafka", "kafka", lambda folder: connectors.KafkaStream("kafka://127.0.0.1:1/topic")),
    ("fsspec", "store", lambda folder: connectors.SnapshotStore(folder)),
    ("s3fs", "store", lambda folder: connectors.SnapshotStore("s3://bucket/folder")),
    ("flatbuffers", "export", lambda folder: writer.save(folder, None)),
    ("pyarrow", "data", lambda folder: pyarrow()),
    ("ray", "ray", lambda folder: ray_serve.replicas(folder)),
    ("ray", "ray", lambda folder: encode_with_ray(None, None)),
    ("ray", "ray", lambda folder: ray_train.joined(folder).__enter__()),
    ("pyspark", "spark", lambda folder: encode_with_spark(None, None)),
    ("prometheus_client", "metrics", lambda folder: prometheus_text({})),
    ("uvicorn", "service", lambda folder: asyncio.run(serve_http(folder))),
    ("httptools", "service", lambda folder: asyncio.run(serve_http(folder))),
]
"""Optional package, its extra, and what somebody calls who lacks it."""
WITHOUT_DOOR = {"tests", "docs", "experiments", "benchmarks"}
"""For work in a clone."""


def test_every_extra_has_a_door():
    extras = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {extra for _, extra, _ in DOORS} | WITHOUT_DOOR == extras.keys()


@pytest.mark.parametrize(("package", "extra", "door"), DOORS)
def test_without_the_package_the_extra_is_named(package, extra, door, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    if package == "httptools":  # an earlier test may have imported what takes it
        monkeypatch.delitem(sys.modules, "uvicorn.protocols.http.httptools_impl", raising=False)
    if package == "s3fs":
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False) if "fsspec" in sys.modules else None
    refused(ImportError, rf'need.*\(.*{package}.*\): pip install "aif_jax\[{extra}\]"$', door, tmp_path)
